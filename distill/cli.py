"""The command line of a run: arguments, log lines, exit codes.

Exit code 0: done. 2: something the user can mend, told in one message. 128 + n: stopped by signal n,
with everything saved.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from distill.config import UserError
from distill.progress import Interrupted
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


def guarded(work: Callable[[], object]) -> int:
    """Do the work of a command; errors become a message and an exit code."""
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        work()
    except Interrupted as stop:
        if main_process:
            print(f"\n{stop}. Run the same command to go on.", file=sys.stderr)
        return 128 + stop.signum
    except UserError as error:
        if main_process or error.every_process:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
