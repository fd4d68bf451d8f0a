"""What goes wrong in a trial: each kind disturbs one or more attempts, or damages what they have left.

Everything random comes from the trial's own generator, so that a trial can be repeated by its number; moments are
shares of the time that an undisturbed run takes.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_trials import HUBS, Trial, files_below

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
YEAR = 3e7  # seconds


# -------------------------------------------------------------------- stopped


def killed(trial: Trial) -> None:
    times = trial.rng.randint(1, 3)
    for _ in range(times):
        trial.run(signum=signal.SIGKILL, after=moment(trial))
    trial.outcome.detail = f"{times} times"


def killed_while_saving(trial: Trial) -> None:
    call = trial.rng.randint(1, trial.reference.calls["file system"])
    trial.run(prepare=lambda: count_file_calls(call))
    trial.outcome.detail = f"at call {call} of {trial.reference.calls['file system']} to fsync, rename or rmtree"


def terminated(trial: Trial) -> None:
    trial.run(signum=signal.SIGTERM, after=moment(trial))


def interrupted(trial: Trial) -> None:
    trial.run(signum=signal.SIGINT, after=moment(trial))


def moment(trial: Trial) -> float:
    return trial.rng.uniform(0, trial.reference.seconds)


def count_file_calls(die_at: int = 0) -> dict[str, int]:
    """Count calls that make writing safe, and die before one of them."""
    counts = {"file system": 0}  # by what the reference knows them

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts["file system"] += 1
            if counts["file system"] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))
    return counts


# -------------------------------------------------------------------- no room


def full_disk(trial: Trial) -> None:
    """On a small tmpfs in a mount namespace of the trial's own; then it is made larger."""
    size = int(trial.reference.bytes * trial.rng.uniform(0.05, 0.95))
    mount_small(trial.disk, size)
    trial.run()
    subprocess.run(["mount", "-o", "remount,size=256m", str(trial.disk)], check=True)
    trial.outcome.detail = f"{size / trial.reference.bytes:.0%} of the room that it needs"


def mount_small(folder: Path, size: int) -> None:
    """Raises OSError or CalledProcessError where no namespaces may be made."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS) != 0:
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "no mount namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]):
        subprocess.run(["mount", *command], check=True, capture_output=True)


def can_mount() -> str:
    """Why a small disk cannot be mounted here; empty if it can."""
    child = os.fork()
    if child == 0:
        try:
            mount_small(Path("/tmp"), 10_000)
        except (OSError, subprocess.SubprocessError):
            os._exit(1)
        os._exit(0)
    return "" if os.waitpid(child, 0)[1] == 0 else "no mount namespaces may be made here"


def file_size_limit(trial: Trial) -> None:
    limit = int(trial.rng.uniform(0.1, 0.9) * max(path.stat().st_size for path in files_below(trial.world.folder)))
    trial.run(prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    trial.outcome.detail = f"{limit} bytes"


# -------------------------------------------------------------------- damage


def stop_or_finish(trial: Trial) -> None:
    """What is damaged is half done, or done."""
    if trial.rng.random() < 0.6:
        trial.run(signum=signal.SIGKILL, after=trial.reference.seconds * trial.rng.uniform(0.4, 1))
    else:
        trial.run()


def chosen_file(trial: Trial, suffix: str = "") -> Path | None:
    files = [path for path in files_below(trial.disk) if path.name.endswith(suffix) and path.stat().st_size]
    chosen = trial.rng.choice(files) if files else None
    trial.outcome.detail = str(chosen.relative_to(trial.disk)) if chosen else "nothing there yet"
    return chosen


def flipped_bit(trial: Trial) -> None:
    stop_or_finish(trial)
    if path := chosen_file(trial):
        data = bytearray(path.read_bytes())
        data[trial.rng.randrange(len(data))] ^= 1 << trial.rng.randrange(8)
        path.write_bytes(data)


def cut_file(trial: Trial) -> None:
    stop_or_finish(trial)
    if path := chosen_file(trial):
        os.truncate(path, trial.rng.randrange(path.stat().st_size))


def zeroed_file(trial: Trial) -> None:
    """As some file systems leave a file after a power cut: its length is right, its content is not."""
    stop_or_finish(trial)
    if path := chosen_file(trial):
        begin = trial.rng.randrange(path.stat().st_size)
        path.write_bytes(path.read_bytes()[:begin] + bytes(path.stat().st_size - begin))


def missing_file(trial: Trial) -> None:
    stop_or_finish(trial)
    if path := chosen_file(trial):
        path.unlink()


def cut_safetensors(trial: Trial) -> None:
    """One of the run's, or the teacher's, which is a copy of this trial."""
    if trial.rng.random() < 0.3:
        teacher = trial.folder / "teacher"
        shutil.copytree(trial.world.teacher, teacher)
        trial.overrides += (f"teacher.model={teacher}",)
        path: Path | None = teacher / "model.safetensors"
        trial.outcome.detail = "the teacher's"
    else:
        stop_or_finish(trial)
        path = chosen_file(trial, ".safetensors")
    if path:
        os.truncate(path, trial.rng.randrange(path.stat().st_size))


def damaged_shard(trial: Trial) -> None:
    stop_or_finish(trial)
    if path := chosen_file(trial, ".arrow"):
        how = trial.rng.choice([bytes(64), b"", path.read_bytes()[::-1]])
        path.write_bytes(how)


def damaged_checkpoint(trial: Trial) -> None:
    """Any one file below checkpoints/, while the run is not finished."""
    trial.run(signum=signal.SIGKILL, after=trial.reference.seconds * trial.rng.uniform(0.4, 0.95))
    files = [path for path in files_below(trial.disk) if "checkpoints" in path.parts and path.stat().st_size]
    trial.outcome.detail = "nothing there yet"
    if files:
        path = trial.rng.choice(files)
        trial.outcome.detail = str(path.relative_to(trial.disk))
        data = bytearray(path.read_bytes())
        data[trial.rng.randrange(len(data))] ^= 255
        match trial.rng.choice(["changed", "missing", "cut"]):
            case "changed":
                path.write_bytes(data)
            case "missing":
                path.unlink()
            case _:
                os.truncate(path, len(data) // 2)


# -------------------------------------------------------------------- the world around


def clock_jumps(trial: Trial) -> None:
    """The time of day leaps back and forth by up to 30 years, the machine sleeps, and files bear wrong dates."""

    def jump() -> None:
        rng, skew = trial.rng, [0.0, 0.0]
        day, counter = time.time, time.perf_counter

        def of_day() -> float:
            if rng.random() < 0.05:
                skew[0] = rng.choice([-1, 1]) * rng.random() * 30 * YEAR
            return max(0.0, day() + skew[0])

        def of_counter() -> float:
            skew[1] += rng.random() * 3600 if rng.random() < 0.01 else 0.0
            return counter() + skew[1]

        time.time, time.perf_counter = of_day, of_counter
        time.time_ns = lambda: int(of_day() * 1e9)

    stopped = trial.rng.random() < 0.5
    trial.run(jump, signal.SIGKILL if stopped else 0, moment(trial))
    for path in files_below(trial.disk):
        when = trial.rng.uniform(0, 60 * YEAR)
        os.utime(path, (when, when))
    trial.outcome.detail = "and SIGKILL" if stopped else ""


def tracker_fails(trial: Trial) -> None:
    """wandb at an address where nobody listens, or where every answer is an error."""
    with_tracker(trial)
    mode = trial.rng.choice(["nobody listens", "every answer is an error"])
    with Listener(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as listener:
        port = listener.port if mode != "nobody listens" else 9
        trial.run(prepare=lambda: track(port))
    trial.outcome.detail = mode


def tracker_hangs(trial: Trial) -> None:
    """wandb at an address that never answers, or its own service stopped in the middle of the run."""
    with_tracker(trial)
    if trial.rng.random() < 0.5:
        with Listener(b"") as listener:
            trial.run(prepare=lambda: track(listener.port))
        trial.outcome.detail = "no answer"
        return

    def stop_services(child: int) -> None:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            except OSError:
                continue
            if int(rest.split()[2]) == child and int(path.parent.name) != child and "wandb" in name:
                os.kill(int(path.parent.name), signal.SIGSTOP)

    trial.run(prepare=lambda: track(None), interfere=stop_services, after=3 * moment(trial))
    trial.outcome.detail = "its service is stopped"


def with_tracker(trial: Trial) -> None:
    """All attempts record, offline unless `track` says otherwise."""
    trial.overrides += ("tracking.tracker=wandb",)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def track(port: int | None) -> None:
    """A tracker at this port, or offline, and short patience with it."""
    import distill.tracking

    distill.tracking.START_SECONDS, distill.tracking.FINISH_SECONDS = 4.0, 4.0
    if port is not None:
        del os.environ["WANDB_MODE"]
        os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}


class Listener:
    """Accepts every connection and answers each with the same bytes, or never."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.kept = answer, list[socket.socket]()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]

    def __enter__(self) -> Listener:
        self.child = os.fork()  # not a thread: the trial goes on to fork
        if self.child == 0:
            while True:
                connection, _ = self.server.accept()
                self.kept.append(connection)
                if self.answer:
                    threading.Thread(target=self._reply, args=(connection,), daemon=True).start()
        return self

    def _reply(self, connection: socket.socket) -> None:
        try:
            connection.recv(1 << 20)
            connection.sendall(self.answer)
            connection.close()
        except OSError:
            pass

    def __exit__(self, *_: object) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        self.server.close()


def hub_fails(trial: Trial) -> None:
    disturb_the_hub(trial, {"status": trial.rng.choice([429, 500, 502, 503])})


def hub_cuts(trial: Trial) -> None:
    disturb_the_hub(trial, {"cut_after": trial.rng.choice([0, 100])})


def hub_hangs(trial: Trial) -> None:
    disturb_the_hub(trial, {"silent_seconds": 60.0})


def disturb_the_hub(trial: Trial, how: dict[str, Any]) -> None:
    repo, kind = HUBS[trial.command], "datasets" if "targets" in HUBS[trial.command] else "models"
    requests = ["POST /api/repos/create", f"POST /api/{kind}/{repo}/preupload", f"POST /api/{kind}/{repo}/commit"]
    if kind == "models":
        requests += [f"POST /{repo}.git/info/lfs", "PUT /_lfs/"]
    times, request = trial.rng.choice([1, 2, 80]), trial.rng.choice(requests)
    trial.start_hub([{"request": request, **how}] * times)
    sleep = time.sleep

    def prepare() -> None:
        time.sleep = lambda seconds: sleep(min(float(seconds), 0.02))  # the library's own pauses

    trial.run(prepare=prepare)
    os.kill(trial.hub_process, signal.SIGUSR1)
    often = f"{times} times" if times < 80 else "until the next attempt"
    said = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in how.items())
    trial.outcome.detail = f"{request}: {said}, {often}"


def teacher_returns_nan(trial: Trial) -> None:
    call = trial.rng.randint(1, max(1, trial.reference.calls["teacher"]))
    trial.run(prepare=lambda: count_teacher_calls(call))
    trial.outcome.detail = f"at call {call} of {trial.reference.calls['teacher']}"


def count_teacher_calls(spoil: int = 0) -> dict[str, int]:
    """Count what the teacher reads, and have it return one NaN."""
    from distill.student import LSTMForCausalLM
    from distill.teacher import LanguageModel

    counts, read = {"teacher": 0}, LanguageModel._read

    def watched(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        output = read(self, *arguments, **options)
        if not isinstance(self.model, LSTMForCausalLM):
            counts["teacher"] += 1
            if counts["teacher"] == spoil:
                with torch.inference_mode():
                    output.last_hidden_state.view(-1)[-1] = float("nan")
        return output

    LanguageModel._read = watched  # type: ignore[method-assign]
    return counts


ANY = ("train", "train from a cache", "build a cache", "train and publish", "build and push a cache")
RUNS, CACHES = ("train", "train from a cache", "train and publish"), ("train from a cache", "build a cache")
KINDS: dict[str, tuple[Callable[[Trial], None], tuple[str, ...]]] = {
    "SIGKILL": (killed, ANY),
    "SIGKILL while saving": (killed_while_saving, ANY),
    "SIGTERM": (terminated, ANY),
    "Ctrl-C": (interrupted, ANY),
    "full disk": (full_disk, ANY),
    "limit on file size": (file_size_limit, ANY),
    "flipped bit": (flipped_bit, ANY),
    "file cut short": (cut_file, ANY),
    "file zeroed": (zeroed_file, ANY),
    "file missing": (missing_file, ANY),
    "safetensors cut short": (cut_safetensors, RUNS),
    "damaged shard": (damaged_shard, CACHES),
    "damaged checkpoint": (damaged_checkpoint, RUNS),
    "clock jumps": (clock_jumps, ANY),
    "tracker fails": (tracker_fails, ("train",)),
    "tracker hangs": (tracker_hangs, ("train",)),
    "hub fails": (hub_fails, tuple(HUBS)),
    "hub cuts the connection": (hub_cuts, tuple(HUBS)),
    "hub hangs": (hub_hangs, tuple(HUBS)),
    "teacher returns NaN": (teacher_returns_nan, ANY),
}
