"""The command line of a run: recipe and overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distill.command import guarded
from distill.recipe import load_recipe
from distill.reference import fields_as_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into exit codes."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch distill/run.py",
        description="Distil a pretrained Transformer into an LSTM, as a recipe says.",
        epilog=fields_as_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML recipe, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field by its dotted path")
    options = parser.parse_args(arguments)

    def work() -> None:
        recipe = load_recipe(options.recipe, options.overrides)
        # Heavy imports wait until the recipe is known to be good: a typo is answered at once.
        from distill.job import run

        run(recipe)

    return guarded(work)
