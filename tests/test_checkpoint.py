"""Checkpoints: whole or not there, few, and exact.

python -m pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.checkpoint import (
    Checkpoints,
    load_state,
    load_tensors,
    restore_optimizer,
    write_atomically,
    write_json,
)
from distill.config import UserError
from distill.student import LSTMConfig, LSTMForCausalLM

FILES = {"model.safetensors", "optimizer.safetensors", "lanes.safetensors", "state.json", "checksums.json"}


def make_student() -> LSTMForCausalLM:
    return LSTMForCausalLM(LSTMConfig(vocab_size=7, embedding_size=3, hidden_size=4, num_layers=1))


def save(checkpoints: Checkpoints, step: int, best_step: int = 0, **parts: Any) -> None:
    given = {"model": {"w": torch.full((2,), float(step))}, "optimizer": None, "lanes": {}, "state": {}, **parts}
    checkpoints.save(step, **{**given, "state": {**given["state"], "best_step": best_step}})
    checkpoints.wait()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Writing


def half_a_folder(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"half")


def half_a_file(path: Path) -> None:
    path.write_bytes(b"half")


FAILURES = {
    "disk full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no permission": PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "bug": RuntimeError("a bug"),
    "Ctrl-C": KeyboardInterrupt(),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("begin", [half_a_folder, half_a_file])
def test_a_write_that_fails_midway_leaves_what_was_there(
    tmp_path: Path, begin: Callable[[Path], None], failure: str
) -> None:
    target, error = tmp_path / "runs" / "target", FAILURES[failure]

    def write(path: Path) -> None:
        begin(path)
        raise error

    expected = UserError if failure in ("disk full", "no permission", "safetensors") else type(error)
    with pytest.raises(expected) as caught:
        write_atomically(target, write)
    assert contents(tmp_path) == {} and list(target.parent.iterdir()) == [], "nothing was there before"
    if expected is UserError:
        assert str(target) in str(caught.value) and str(error) in str(caught.value)

    write_atomically(target, begin)
    before = contents(tmp_path)
    assert len(before) == 1
    with pytest.raises(expected):
        write_atomically(target, write)
    assert contents(tmp_path) == before
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("begin", [half_a_folder, half_a_file])
def test_a_rename_that_fails_leaves_what_was_there(
    tmp_path: Path, begin: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    write_atomically(target, begin)
    before = contents(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        write_atomically(target, begin)
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_written_replaces_the_old_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "target"
    write_atomically(target, lambda path: path.write_text("old"))
    write_atomically(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new"
    write_json(target, {"a": [1, None, "ä"]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": [1, None, "ä"]}

    folder = tmp_path / "folder"
    write_atomically(folder, half_a_folder)
    (folder / "from before").touch()
    write_atomically(folder, half_a_folder)
    assert contents(folder) == {"model.safetensors": b"half"}, "no mixture of old and new"
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "folder"}


def test_it_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write(path: Path) -> None:
        assert path.parent == target.parent, "a rename works within one file system only"
        half_a_folder(path)
        assert not target.exists()

    write_atomically(target, write)
    assert target.is_dir()


def test_a_file_in_the_way_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="runs"):
        write_atomically(tmp_path / "runs" / "name" / "target", half_a_file)
    assert contents(tmp_path) == {"runs": b"a file"}


# Which are kept


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 9, 10, 100):
        save(checkpoints, step)
        assert checkpoints.latest() == tmp_path / "checkpoints" / f"step-{step:08d}"
        assert load_tensors(checkpoints.latest(), "model.safetensors")["w"].tolist() == [step, step]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize("keep", [1, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(5):
        save(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in range(5 - keep, 5)]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 3, state={"turn": 1})
    save(checkpoints, 3, state={"turn": 2})
    assert load_state(checkpoints.latest())["turn"] == 2


def test_the_best_stays_as_long_as_a_kept_checkpoint_names_it(tmp_path: Path) -> None:
    checkpoints, student = Checkpoints(tmp_path, keep=2), make_student()

    def bests() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("best-*"))

    checkpoints.save_best(1, student)
    save(checkpoints, 1, best_step=1)
    save(checkpoints, 2, best_step=1)
    checkpoints.save_best(3, student)
    checkpoints.wait()
    assert bests() == ["best-00000001", "best-00000003"], "step 2 can still be resumed from"
    save(checkpoints, 3, best_step=3)
    assert bests() == ["best-00000001", "best-00000003"], "step 2 still names it"
    save(checkpoints, 4, best_step=3)
    assert bests() == ["best-00000003"]
    save(checkpoints, 5, best_step=3)
    assert bests() == ["best-00000003"], "older than every checkpoint, but the best"
    loaded = LSTMForCausalLM.from_pretrained(checkpoints.best(3))
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_half_written_checkpoints_are_not_found_and_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    half_a_folder(tmp_path / ".step-00000002.4711.tmp")
    half_a_folder(tmp_path / ".best-00000002.4711.tmp")
    (tmp_path / "step-notes").mkdir()
    assert checkpoints.latest() == tmp_path / "step-00000001"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-notes"}


def test_what_a_killed_process_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    """Between the two renames that replace a folder, the old one bears another name."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.4711.old.tmp")
    half_a_folder(tmp_path / ".step-00000001.4711.tmp")
    assert checkpoints.latest() == tmp_path / "step-00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    half_a_folder(tmp_path / ".step-00000001.4712.old.tmp")
    assert load_tensors(checkpoints.latest(), "model.safetensors")["w"].tolist() == [1, 1], "the new one is there"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained in the meantime does not reach it, and others get in line."""
    may_write = threading.Event()
    put = Checkpoints._put
    monkeypatch.setattr(Checkpoints, "_put", lambda *arguments: (may_write.wait(60), put(*arguments)))
    checkpoints, student = Checkpoints(tmp_path, keep=2), make_student()
    weights = {name: value.detach() for name, value in student.named_parameters()}
    before = {name: value.clone() for name, value in weights.items()}
    optimizer = train(student, torch.optim.AdamW(student.parameters()), [0])
    moments = {index: entry["exp_avg"].clone() for index, entry in optimizer.state_dict()["state"].items()}
    trained = {name: value.clone() for name, value in weights.items()}
    checkpoints.save(1, weights, optimizer, {}, {"best_step": 0})
    train(student, optimizer, [1, 2])
    assert not (tmp_path / "step-00000001").exists()
    checkpoints.check()  # it goes on, which is no error
    checkpoints.save(2, weights, None, {}, {"best_step": 0})
    may_write.set()
    checkpoints.wait()
    assert checkpoints.latest() == tmp_path / "step-00000002"
    found = load_tensors(tmp_path / "step-00000001", "model.safetensors")
    kept = load_tensors(tmp_path / "step-00000001", "optimizer.safetensors")
    for name, value in trained.items():
        assert torch.equal(found[name], value) and not torch.equal(value, weights[name])
    assert any(not torch.equal(before[name], value) for name, value in trained.items())
    for index, value in moments.items():
        assert torch.equal(kept[f"{index}.exp_avg"], value)


def test_a_write_that_failed_is_told_at_the_next_occasion(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    checkpoints = Checkpoints(tmp_path / "runs", keep=2)
    checkpoints.save(1, {}, None, {}, {"best_step": 0})
    with pytest.raises(UserError, match="cannot be written"):
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)
    checkpoints.check()
    checkpoints.wait()


# What is in them


def test_no_pickle(tmp_path: Path) -> None:
    model = make_student()
    optimizer = train(model, torch.optim.AdamW(model.parameters()), [0])
    checkpoints = Checkpoints(tmp_path, keep=2)
    lanes = {"h_LGH": torch.randn(1, 2, 4), "c_LGH": torch.randn(1, 2, 4)}
    save(checkpoints, 1, model=dict(model.state_dict()), optimizer=optimizer, lanes=lanes)
    folder = checkpoints.latest()
    assert {path.name for path in folder.iterdir()} == FILES
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, "pt") as file:
                assert list(file.keys())
    assert load_tensors(folder, "lanes.safetensors").keys() == lanes.keys()
    for name, value in load_tensors(folder, "lanes.safetensors").items():
        assert torch.equal(value, lanes[name])


def test_the_state_survives(tmp_path: Path) -> None:
    state = {"step": 3, "seconds": 0.1 + 0.2, "points": [{"nll_nats": 1e-300}], "done": False, "best": None}
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 3, state=state)
    found = load_state(checkpoints.latest())
    assert {name: found[name] for name in state} == state


def test_tensors_keep_type_and_values(tmp_path: Path) -> None:
    model = {
        "half": torch.randn(3).bfloat16(),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "integer": torch.tensor(2**40),
        "empty": torch.empty(0, 4),
    }
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, model=model)
    found = load_tensors(checkpoints.latest(), "model.safetensors")
    assert found.keys() == model.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in model.items())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[int]) -> torch.optim.Optimizer:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)  # as a schedule does
        optimizer.step()
    return optimizer


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(two_groups(model), lr=0.1, betas=(0.9, 0.98), weight_decay=0.01),
    "sgd": lambda model: torch.optim.SGD(two_groups(model), lr=0.1, weight_decay=0.01),
    "sgd with momentum": lambda model: torch.optim.SGD(two_groups(model), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_training_goes_on_bit_by_bit(tmp_path: Path, name: str, frozen: bool) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        model[0].requires_grad_(not frozen)
        return model

    model = make(seed=0)
    optimizer = train(model, OPTIMIZERS[name](model), [0, 1, 2])
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 3, model=dict(model.state_dict()), optimizer=optimizer)
    train(model, optimizer, [3, 4])

    folder, resumed = checkpoints.latest(), make(seed=1)
    resumed.load_state_dict(load_tensors(folder, "model.safetensors"))
    resumed_optimizer = OPTIMIZERS[name](resumed)
    restore_optimizer(resumed_optimizer, folder, load_state(folder))
    train(resumed, resumed_optimizer, [3, 4])
    for found, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
    moments: list[Tensor] = [v for entry in resumed_optimizer.state.values() for v in entry.values()]
    assert bool(moments) == (name != "sgd"), "else there was nothing to restore"


# Damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-3] + bytes([path.read_bytes()[-3] ^ 4]) + b"}\n"),
}


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_last_whole_checkpoint_is_gone_on_from(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    DAMAGES[damage](tmp_path / "step-00000003" / file)
    if (file, damage) == ("checksums.json", "missing"):
        assert checkpoints.latest() == tmp_path / "step-00000003", "as an older version wrote it"
        return
    assert checkpoints.latest() == tmp_path / "step-00000002"
    assert "step-00000003" in caplog.text and file in caplog.text
    for step in (1, 2):
        DAMAGES[damage](tmp_path / f"step-{step:08d}" / file)
    with pytest.raises(UserError, match="all checkpoints are damaged; delete this folder"):
        checkpoints.latest()


def test_a_checkpoint_without_its_best_is_no_whole_one(tmp_path: Path) -> None:
    checkpoints, student = Checkpoints(tmp_path, keep=3), make_student()
    for step in (1, 2):
        checkpoints.save_best(step, student)
        save(checkpoints, step, best_step=step, state={"best_nll_nats": 1.0})
    assert checkpoints.latest() == tmp_path / "step-00000002"
    weights = tmp_path / "best-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert checkpoints.latest() == tmp_path / "step-00000001"


@pytest.mark.parametrize("keep", [1, 2])
def test_saving_goes_on_past_damaged_checkpoints(tmp_path: Path, keep: int) -> None:
    """An older one that cannot be read stops nothing; a newer one that was not gone on from makes room."""
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (1, 2):
        save(checkpoints, step)
    save(checkpoints, 9)
    for damaged in (checkpoints._all()[0], tmp_path / "step-00000009"):
        (damaged / "state.json").write_text("{")
    save(checkpoints, 5)
    assert checkpoints.latest() == tmp_path / "step-00000005"
    assert tmp_path / "step-00000009" not in checkpoints._all()


@pytest.mark.parametrize("file", sorted(FILES - {"checksums.json"}))
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    model = make_student()
    checkpoints = Checkpoints(tmp_path, keep=1)
    optimizer = train(model, torch.optim.AdamW(model.parameters()), [0])
    lanes = {"h_LGH": torch.zeros(2, 3)}
    save(checkpoints, 1, model=dict(model.state_dict()), optimizer=optimizer, lanes=lanes)
    folder = checkpoints.latest()
    path = folder / file
    whole = path.read_bytes()
    state = load_state(folder)
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": bytes(range(256)) * 4}[damage])
    with pytest.raises(UserError, match="damaged") as caught:
        if file == "state.json":
            load_state(folder)
        elif file == "optimizer.safetensors":
            restore_optimizer(optimizer, folder, state)
        else:
            load_tensors(folder, file)
    assert "step-00000001" in str(caught.value)
    assert file in str(caught.value)
