"""How every benchmark reports: a table for people, then one JSON object as the last line, kept in runs/bench/ too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.checkpoint import write_atomically
from distill.result import versions
from eval.output import machine, print_json, print_table

__all__ = ["finish", "machine", "print_table"]

FOLDER = Path("runs/bench")


def finish(name: str, figures: Mapping[str, Any]) -> None:
    """Print `figures` with machine and versions as one JSON line, and write the same to runs/bench/NAME.json."""
    result = {"benchmark": name, **figures, "machine": machine(), "versions": versions()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(FOLDER / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
    print_json(result)
