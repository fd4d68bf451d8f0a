"""Whole runs of a recipe as parts of a benchmark; a finished one is kept, so that a stopped benchmark goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import FOLDER
from distill.config import UserError

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def run_recipe(benchmark: str, name: str, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The result of a run in a process of its own, under runs/bench/BENCHMARK/NAME."""
    parent = FOLDER.resolve() / benchmark
    command = [
        sys.executable,
        "distill/run.py",
        recipe,
        f"run.name={name}",
        f"run.output_dir={parent}",
        "tracking=none",
    ]
    if subprocess.run([*command, *overrides], cwd=ROOT).returncode:
        raise UserError(f"{parent / name}: the run failed, as said above")
    return json.loads((parent / name / "result.json").read_text(encoding="utf-8"))
