"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-00000120/` with `model.safetensors` (weights), `optimizer.safetensors`
(moments), `lanes.safetensors` (the carried LSTM state of every lane), `state.json` (position, curves,
schedule) and the checksums of all that. Random numbers need no file: every step seeds its own from the
run's seed and the step's number.
It is written under another name, flushed to disk and renamed, so a folder with this name is always
whole. No pickle. The main process copies what is to be kept and goes on training; `Checkpoints` writes beside it,
one thing after the other.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from distill.config import UserError
from distill.sealed import damage, write_checksums

logger = logging.getLogger(__name__)
FOLDER = re.compile(r"step-(\d{8})")
WAITING = 2  # copies in memory that may wait for the disk: the best weights and a checkpoint often come together


def write_atomically(target: Path, write: Callable[[Path], object], field: str = "run.output_dir") -> None:
    """Let `write` fill a temporary path beside `target`, flush it to disk, then rename it into place.

    Works for files and folders; a folder that exists is replaced. Raises UserError where the disk refuses, with the
    recipe field that says where to write, and leaves what was there before.
    """
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{part}tmp") for part in ("", "old."))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of a process with the same number that was killed
        write(temporary)
        for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _flush(path)
        if temporary.is_dir() and target.exists():
            os.rename(target, old)  # a folder, unlike a file, must be out of the way
        try:
            os.replace(temporary, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target}: cannot be written: {error}. What was saved before is untouched; make room or choose another "
            f"{field}, then run the same command again"
        ) from None
    finally:  # whatever went wrong, be it Ctrl-C
        _remove(temporary)
        _remove(old)


def write_json(target: Path, content: Any, field: str = "run.output_dir") -> None:
    """Write JSON atomically."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"), field)


@contextlib.contextmanager
def locked(folder: Path, field: str) -> Iterator[None]:
    """One job at a time builds in a folder, which is made; another one waits and finds the work done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire()
    except OSError as error:
        raise UserError(f"{field}: {folder} cannot be written: {error}; choose another place") from None
    try:
        yield
    finally:
        lock.release()


def clear_leftovers(folder: Path) -> None:
    """Take away what killed processes were writing into a folder; put back what one had moved aside to replace it."""
    for leftover in sorted(folder.glob(".*.tmp")):
        match = re.fullmatch(r"\.(.+)\.\d+\.old\.tmp", leftover.name)
        if match and not (folder / match[1]).exists():
            os.rename(leftover, folder / match[1])
        _remove(leftover)


class Checkpoints:
    """The checkpoints of one training, in one folder: the last few, and the best weights apart.

    `save` and `save_best` return as soon as everything is copied, unless the disk is `WAITING` writes behind. What goes
    wrong in a write is raised by the next of them, or by `check` or `wait`.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writes: deque[Future[None]] = deque()

    def wait(self) -> None:
        """Until all is written."""
        while self._writes:
            self._writes.popleft().result()

    def check(self) -> None:
        """Raise what a write met with, without waiting for one that goes on."""
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()

    def _write(self, write: Callable[[], None]) -> None:
        self.check()
        while len(self._writes) > WAITING:
            self._writes.popleft().result()
        self._writes.append(self._writer.submit(write))

    def best(self, step: int) -> Path:
        """Folder of the weights that were best at this step, as a plain Hugging Face model."""
        return self.folder / f"best-{step:08d}"

    def save_best(self, step: int, student: PreTrainedModel) -> None:
        """Keep the weights as the best so far. Older bests go when no checkpoint names them any more."""
        kept = copy.deepcopy(student).cpu()

        def write(path: Path) -> None:
            kept.save_pretrained(path)
            write_checksums(path)

        self._write(lambda: write_atomically(self.best(step), write))

    def save(
        self,
        step: int,
        model: dict[str, Tensor],
        optimizer: Optimizer | None,
        lanes: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Begin to write one checkpoint atomically, and then to drop those beyond `keep`, and bests that none names.

        `model` and `lanes` are tensors by name; `state` must be plain JSON and name its `best_step`; `optimizer`
        is None between two stages.
        """
        moments, groups = _flat(optimizer) if optimizer is not None else ({}, [])
        tensors = {"model": _copies(model), "optimizer": _copies(moments), "lanes": _copies(lanes)}
        text = json.dumps({**state, "optimizer_groups": groups}, indent=1)

        def write(path: Path) -> None:
            path.mkdir()
            for name, values in tensors.items():
                save_file(values, path / f"{name}.safetensors")
            (path / "state.json").write_text(text, encoding="utf-8")
            write_checksums(path)

        self._write(lambda: self._put(step, write))

    def _put(self, step: int, write: Callable[[Path], None]) -> None:
        target = self.folder / f"step-{step:08d}"
        write_atomically(target, write)
        void = [path for path in self._all() if path.name > target.name]  # damaged ones that were not gone on from
        for path in [*void, *(path for path in self._all()[: -self.keep - len(void)])]:
            shutil.rmtree(path, ignore_errors=True)
        named = set()
        for kept in self._all():
            with contextlib.suppress(UserError):  # a damaged one cannot be gone on from, so it needs no best
                named.add(self.best(load_state(kept)["best_step"]))
        for best in self.folder.glob("best-*"):
            if best not in named:
                shutil.rmtree(best, ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, as is the best that it names; None where there has been none.

        Half-written ones bear another name and are cleared away. UserError where all are damaged.
        """
        clear_leftovers(self.folder)
        found = self._all()
        for folder in reversed(found):
            problem = self._problem(folder)
            if not problem:
                return folder
            logger.warning("%s: the checkpoint is damaged (%s), the one before is taken", folder, problem)
        if found:
            raise UserError(f"{self.folder}: all checkpoints are damaged; delete this folder to train anew")
        return None

    def _problem(self, folder: Path) -> str:
        """What is wrong with a checkpoint, in words."""
        if problem := damage(folder):
            return problem
        try:
            state = load_state(folder)
        except UserError as error:
            return str(error)
        return damage(self.best(state["best_step"])) if state.get("best_nll_nats") is not None else ""

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if FOLDER.fullmatch(path.name))


def load_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint; UserError if it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("best_step"), int):
            raise ValueError("no state of a training")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder / "state.json", error) from None


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """One tensor file of a checkpoint; UserError if it cannot be read."""
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder / name, error) from None


def restore_optimizer(optimizer: Optimizer, folder: Path, state: dict[str, Any]) -> None:
    """Put a checkpoint's moments into an optimizer over the same parameters."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in load_tensors(folder, "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": state["optimizer_groups"]})


def _flat(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    state = optimizer.state_dict()
    moments = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in state["state"].items()
        for name, value in entry.items()
    }
    return moments, state["param_groups"]


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, of their own."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: the checkpoint is damaged ({error}); delete its step-... folder to go on from the one before"
    )


def _remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
