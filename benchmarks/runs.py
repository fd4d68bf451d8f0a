"""What the benchmarks of a recipe share: their command line, and whole runs, which are kept when they are finished."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import FOLDER
from distill.config import UserError
from distill.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


def recipe_parser(name: str, doc: str, recipe: str) -> argparse.ArgumentParser:
    """The command line of `benchmarks.NAME`, with a recipe of ours, unless another is given, and its overrides."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the recipe")
    parser.add_argument("--recipe", default=str(RECIPES / f"{recipe}.yaml"))
    return parser


def candidates_of(recipe: str, overrides: Sequence[str]) -> int | None:
    """Those of the recipe's first stage that has some."""
    return next((stage.candidates for stage in load_recipe(recipe, overrides).stages if stage.candidates), None)


def run_tool(module: str, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The JSON line that a command of ours prints last, from a process of its own."""
    command = [sys.executable, "-m", module, recipe, *overrides]
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(found.stdout, end="", flush=True)
    if found.returncode:
        raise UserError(f"{module} {recipe}: failed, as said above")
    figures: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return figures


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
