"""One trial of the fault campaign: a command is disturbed, the same command runs again, and its result is compared.

A process that has imported everything forks the trials, and each trial its attempts: an attempt is the command's own
`main`, from its first line to its exit code, in a process that can be killed. What a run leaves behind must equal,
bit by bit and figure by figure, what an undisturbed run has left; times are not compared, nor pictures, which show
them, nor checkpoints, which lie elsewhere when a run was stopped between two of them; of what is published, the hub's
side is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from benchmarks.tiny import World

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300.0  # seconds of waiting, not of waiting for a core, after which an attempt counts as hanging
LONGEST = 10 * LIMIT  # and in any case
TIMES = {
    *("seconds", "train_seconds", "teacher_seconds", "wall_seconds", "decode_tokens_per_second", "tokens_per_second"),
    *("teacher_seconds_per_step", "student_seconds_per_step", "time_to_control_loss", "checksum", "files"),
}
NOT_COMPARED = {
    "checkpoints",
    "hub",
    "wandb",
    "wandb_id.json",
    "curves.png",
    "README.md",
    "published.json",
    "inputs.json",
    ".checked.json",
}
# What publishing adds to a student: compared on the hub, and with the weights whenever it is read.
DERIVED = {"model.onnx", "model_int8.onnx", "model_int8.safetensors", "decoder.onnx", "decoder.safetensors"}

Command = tuple[str, tuple[str, ...]]  # module and arguments
COMMANDS: dict[str, Command] = {
    "train": ("distill.cli", ()),
    "train from a cache": ("distill.cli", ("targets.cache=true", "control=false")),
    "build a cache": ("distill.cache", ()),
    "train and publish": ("distill.cli", ("control=false", "publishing.repo=me/tiny")),
    "build and push a cache": ("distill.cache", ("--push", "me/targets")),
}
HUBS = {"train and publish": "me/tiny", "build and push a cache": "me/targets"}  # what goes to the loopback hub


@dataclass
class Outcome:
    """What came of a trial. `unclear` are tracebacks, hangs, and exits without a message."""

    number: int
    command: str
    kind: str
    detail: str = ""
    attempts: list[str] = field(default_factory=list)
    outcome: str = ""  # recovered, clear error, silently wrong, unclear
    message: str = ""


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run leaves behind, and how much of everything it took."""

    contents: dict[str, Any]
    seconds: float
    bytes: int
    calls: dict[str, int]


@dataclass(frozen=True)
class Attempt:
    code: int | None  # negative: killed by that signal; None: it hung
    text: str

    @property
    def problem(self) -> str:
        """Why this end is not a clear one; empty if it is."""
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        if self.code is None:
            return f"hangs for {LIMIT:.0f} s"
        if "Traceback (most recent call last)" in self.text:
            return "traceback: " + self.text.strip().splitlines()[-1]
        if self.code == 2 and len(errors) != 1:
            return f"exit code 2 with {len(errors)} messages"
        if self.code not in (0, 2, 130, 143, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM):
            return f"exit code {self.code}"
        return ""

    @property
    def error(self) -> str:
        return next((line[7:] for line in self.text.splitlines() if line.startswith("error: ")), "")


class Trial:
    """A folder of its own, the attempts of one command in it, and the hub that it publishes to."""

    def __init__(self, world: World, command: str, kind: str, number: int, seed: int, folder: Path) -> None:
        self.world, self.command, self.folder, self.number = world, command, folder, number
        self.rng = random.Random(f"{seed}/{number}")
        self.outcome = Outcome(number, command, kind)
        self.overrides: tuple[str, ...] = ()
        self.reference = Reference({}, 1.0, 1, {})
        self.log = folder.with_name(f"{folder.name}.log")
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        self.hub_process, self.address = 0, ""

    # ---------------------------------------------------------------- attempts

    @property
    def arguments(self) -> list[str]:
        module, extra = COMMANDS[self.command]
        places = [
            f"run.output_dir={self.disk}", f"corpus.cache_dir={self.disk / 'cache'}", "run.checkpoint_every.steps=2",
            "evaluation.decode_seconds=0.01",
        ]  # fmt: skip
        if module == "distill.cache" or "targets.cache=true" in extra:
            places += ["targets.cache=true", f"targets.cache_dir={self.disk / 'targets'}"]
        return [str(self.world.recipe), *places, *extra, *self.overrides]

    def run(
        self,
        prepare: Callable[[], object] = lambda: None,
        signum: int = 0,
        after: float = 0.0,
        interfere: Callable[[int], object] | None = None,
    ) -> Attempt:
        """Start the command; send it a signal after some seconds, or `interfere` with its process.

        `prepare` is called in the command's process before it begins, and what it returns at the end.
        """
        if self.command in HUBS and not self.hub_process:
            self.start_hub()
        start = self.log.stat().st_size if self.log.exists() else 0
        child = os.fork()
        if child == 0:
            self._become_the_command(prepare)
        began, sent, code, waited = time.monotonic(), not (signum or interfere), None, 0.0
        before = began
        while waited < LIMIT and time.monotonic() - began < LONGEST:
            now = time.monotonic()
            waited, before = waited + (0 if is_runnable(child) else now - before), now
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            if not sent and time.monotonic() - began >= after:
                interfere(child) if interfere else os.kill(child, signum)
                sent = True
            time.sleep(0.003)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has started, such as a tracker's service
        with self.log.open("rb") as file:
            file.seek(start)
            attempt = Attempt(code, file.read().decode("utf-8", "replace"))
        ends = {None: "hangs", 0: "done", 2: "error"}
        self.outcome.attempts.append(ends.get(code) or (f"signal {-code}" if code and code < 0 else f"exit {code}"))
        if attempt.problem:
            self.fail(attempt.problem)
        return attempt

    def _become_the_command(self, prepare: Callable[[], object]) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            # Its own is a semaphore that all forked processes share: one that is killed with it would stop the others.
            tqdm.set_lock(threading.RLock())
            self._reach_the_hub()
            finish = prepare()
            code = importlib.import_module(COMMANDS[self.command][0]).main(self.arguments)
            if callable(finish):
                finish()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _reach_the_hub(self) -> None:
        from huggingface_hub import constants

        import distill.hub

        if self.address:
            os.environ["HF_TOKEN"] = "token-of-me"
            constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = self.address, False, True
            distill.hub.PAUSES, distill.hub.TIMEOUT = (0.0, 0.0, 0.0), 1.0

    def start_hub(self, faults: list[dict[str, Any]] | None = None) -> None:
        """Before the first attempt, with faults that last until SIGUSR1."""
        self.hub_process, self.address = start_hub(faults or [])

    def fail(self, problem: str) -> None:
        """The trial's outcome is settled, and it is none of the good ones."""
        self.outcome.outcome = self.outcome.outcome or "unclear"
        self.outcome.message = self.outcome.message or problem

    def settle(self) -> Outcome:
        """Run the same command again, undisturbed, and judge."""
        last = self.run()
        outcome = self.outcome
        if not outcome.outcome and last.code == 2:
            outcome.outcome, outcome.message = "clear error", last.error
        elif not outcome.outcome and last.code != 0:
            self.fail(f"ends with {last.code}")
        elif not outcome.outcome:
            wrong = differences(self.reference.contents, self.contents())
            if "is complete already" in last.text and any(name.startswith(("cache/", "targets/")) for name in wrong):
                # A finished run opens no cache; the next reader of the cache has to find the damage.
                for name in ("result.json", "published.json"):
                    (self.disk / "tiny" / name).unlink(missing_ok=True)
                last = self.run()
                wrong = differences(self.reference.contents, self.contents())
            silent = [name for name in wrong if name.rpartition(":")[2].rpartition("/")[2] not in last.text]
            outcome.outcome = "silently wrong" if silent else "clear error" if wrong else "recovered"
            outcome.message = "; ".join(f"{name} {how}" for name, how in wrong.items())
        outcome.message = outcome.message.replace(str(self.folder), "").replace(str(self.world.folder), "")
        return outcome

    def close(self) -> None:
        if self.hub_process:
            os.kill(self.hub_process, signal.SIGKILL)
            os.waitpid(self.hub_process, 0)

    # ---------------------------------------------------------------- what is compared

    def contents(self) -> dict[str, Any]:
        """Everything that a run has left, by name, without times."""
        found = {}
        for path in files_below(self.disk):
            name = path.relative_to(self.disk)
            if not (NOT_COMPARED | DERIVED) & set(name.parts):
                found[str(name)] = self._content(path)
        if self.address:
            repo = f"{'datasets/' if self.command == 'build and push a cache' else ''}{HUBS[self.command]}"
            for entry in json.loads(self._ask(f"/api/{kind_of(repo)}/tree/main")):
                if entry["path"] not in NOT_COMPARED:
                    data = self._ask(f"/{repo}/resolve/main/{entry['path']}")
                    found[f"hub:{entry['path']}"] = without_times(entry["path"], data, str(self.disk))
        return found

    def _ask(self, path: str) -> bytes:
        request = urllib.request.Request(self.address + path, headers={"Authorization": "Bearer token-of-me"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read()
        except OSError:
            return b"[]"

    def _content(self, path: Path) -> Any:
        return without_times(path.name, path.read_bytes(), str(self.disk))


def is_runnable(process: int) -> bool:
    """Whether a process computes, or would if it had a core; False where the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


def kind_of(repo: str) -> str:
    return repo if repo.startswith("datasets/") else f"models/{repo}"


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def without_times(name: str, data: bytes, place: str) -> Any:
    """A file's content as it is compared: figures of JSON and YAML, a digest of all else."""
    try:
        text = data.decode("utf-8").replace(place, "DISK")
        if name.endswith(".jsonl"):
            return [_dropped(json.loads(line)) for line in text.splitlines()]
        if name == "recipe.yaml":
            return {key: value for key, value in yaml.safe_load(text).items() if key != "tracking"}
        if name.endswith(".json"):
            return _dropped(json.loads(text))
    except (UnicodeDecodeError, ValueError, AttributeError, yaml.YAMLError):
        pass
    return hashlib.sha256(data).hexdigest()


def _dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dropped(item) for key, item in value.items() if key not in TIMES}
    return [_dropped(item) for item in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, str]:
    """Files that are missing, surplus, or other than expected."""
    names = sorted(expected.keys() | found.keys())
    said = {(True, False): "is missing", (False, True): "is surplus"}
    return {
        name: said.get((name in expected, name in found), "differs")
        for name in names
        if expected.get(name) != found.get(name)
    }


def start_hub(faults: list[dict[str, Any]]) -> tuple[int, str]:
    """A hub in a process of its own, with so many faults until SIGUSR1 ends them. Returns process and address."""
    spec = importlib.util.spec_from_file_location("hub_server", ROOT / "tests" / "hub_server.py")
    assert spec and spec.loader
    server: Any = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = server
    spec.loader.exec_module(server)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with server.Hub() as hub:
            hub.faults += [server.Fault(**fault) for fault in faults]
            signal.signal(signal.SIGUSR1, lambda *_: hub.faults.clear())
            os.write(writing, hub.address.encode())
            while True:
                signal.pause()
    os.close(writing)
    address = os.read(reading, 100).decode()
    os.close(reading)
    return child, address
