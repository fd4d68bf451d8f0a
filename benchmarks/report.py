"""How every benchmark takes time and reports: a table for people, then one JSON object as the last line.

The object is also kept as runs/bench/NAME.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.checkpoint import write_atomically
from distill.output import machine, print_json, print_table
from distill.result import versions

__all__ = ["finish", "machine", "print_table", "seconds"]

FOLDER = Path("runs/bench")


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def finish(name: str, figures: Mapping[str, Any]) -> None:
    """Print `figures` with machine and versions as one JSON line, and write the same to runs/bench/NAME.json."""
    result = {"benchmark": name, **figures, "machine": machine(), "versions": versions()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(FOLDER / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
    print_json(result)
