"""Have the teacher write a recipe's text and do nothing else; a later run of the recipe finds it.

    accelerate launch -m distill.write RECIPE [key=value ...]
    accelerate launch -m distill.write recipes/written.yaml writing.documents=5000 writing.temperature=0.8

Stopped at any time, the same command goes on. The fields are those of `writing` in the recipe; the data set's format is
in `distill/written.py`, how it is written in `distill/writing.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distill.command import guarded
from distill.config import UserError
from distill.job import TeacherAndText, leave, start_accelerator
from distill.output import print_json, print_table
from distill.recipe import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write, show; returns the exit code."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m distill.write", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML recipe with a section `writing`, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field by its dotted path")
    options = parser.parse_args(arguments)
    return guarded(lambda: write(options.recipe, options.overrides))


def write(recipe_name: str, overrides: Sequence[str]) -> None:
    """Write or complete the text of a recipe."""
    recipe = load_recipe(recipe_name, overrides)
    if recipe.writing is None:
        raise UserError(f"{recipe_name}: expected a section writing, as by writing.documents=1000, found none")
    accelerator = start_accelerator(recipe)
    try:
        written = TeacherAndText(recipe, accelerator).written
        assert written is not None
        if not accelerator.is_main_process:
            return
        figures = written.figures()
        row = {
            "documents": f"{figures['documents']:,}",
            "tokens": f"{figures['tokens']:,}",
            "written in": f"{figures['seconds']:.1f} s",
            "tokens/s": f"{figures['tokens'] / max(figures['seconds'], 1e-9):,.0f}",
        }
        print_table(str(written.folder), [row], "Seconds of one process. A corpus.source as any other folder of text.")
        print_json({"folder": str(written.folder), **figures})
    finally:
        leave(accelerator)


if __name__ == "__main__":
    sys.exit(main())
