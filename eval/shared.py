"""What several protocols of one report need alike, made once: loaded models, documents, what a model made of them.

    with shared():
        perplexity(["runs/quickstart"])
        agreement(["runs/quickstart"])     # finds teacher and student loaded

A command of its own makes what it needs and lets it go; inside `shared` all of it is kept to the end. That is no more
than `eval.latency` holds at once anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_kept: dict[Hashable, Any] | None = None


@contextmanager
def shared() -> Iterator[None]:
    """Keep what `once` makes."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` makes; inside `shared`, what it made when first asked with this key."""
    if _kept is None:
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def keep(key: Hashable, value: object) -> None:
    """Inside `shared`, have `once` find a value that came about on the way to another."""
    if _kept is not None:
        _kept[key] = value
