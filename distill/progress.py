"""Where a training stands: clocks, the progress that a checkpoint keeps, and the wish to stop."""

from __future__ import annotations

import signal as signals
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from distill.config import Length


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; everything is saved. `signum` is the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signals.Signals(signum).name}; everything is saved")
        self.signum = signum


@dataclass
class Clock:
    """A position in a training: optimizer steps, target tokens, seconds of training."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def share(self, length: Length, since: Clock) -> float:
        """How much of `length` has passed since then; 1 or more when it is over."""
        if length.steps is not None:
            return (self.steps - since.steps) / length.steps
        if length.tokens is not None:
            return (self.tokens - since.tokens) / length.tokens
        assert length.minutes is not None
        return (self.seconds - since.seconds) / (60 * length.minutes)


@dataclass
class Spent:
    """Seconds of a step in which the teacher was asked, and in which the student wrote, None where it does not."""

    teacher: float = 0.0
    writing: float | None = None


@dataclass
class Progress:
    """Where a training stands, as it lies in a checkpoint."""

    stage: int = 0
    now: Clock = field(default_factory=Clock)
    stage_start: Clock = field(default_factory=Clock)
    last_validation: Clock = field(default_factory=Clock)
    teacher_seconds: float = 0.0
    writing_seconds: float = 0.0  # in which the student wrote, of on_policy_seconds: those of steps in which it does
    on_policy_seconds: float = 0.0
    points: list[dict[str, Any]] = field(default_factory=list)
    best_nll_nats: float | None = None
    best_step: int = 0
    stale: int = 0  # validations of this stage in a row that brought nothing
    logged: int = 0  # lines in the run's own log
    done: bool = False
    stored_steps: int = 0  # of finished stages that read stored blocks while others read a stream
    stream: dict[str, Any] | None = None  # where the stream's window begins

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Progress:
        clocks = {name: Clock(**raw[name]) for name in ("now", "stage_start", "last_validation")}
        return cls(**{**raw, **clocks})


class StopFlag:
    """Remembers SIGTERM and SIGINT while a training runs, so that it can save and leave between two steps."""

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> StopFlag:
        self._before = {s: signals.signal(s, self._remember) for s in (signals.SIGTERM, signals.SIGINT)}
        return self

    def _remember(self, signum: int, frame: Any) -> None:
        self.signum = signum

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signals.signal(signum, handler)


@contextmanager
def timed(wall_seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note how long a part of a run takes."""
    began = time.perf_counter()
    yield
    wall_seconds[part] = time.perf_counter() - began
