"""Build a recipe's cached targets and nothing else; a later run of the recipe finds them.

    accelerate launch -m distill.cache RECIPE [key=value ...] [--push OWNER/NAME]

Stopped at any time, the same command goes on. Format and validation: `distill/targets.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distill.command import guarded
from distill.job import TeacherAndText, leave, start_accelerator
from distill.output import print_table
from distill.recipe import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, show; returns the exit code."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m distill.cache", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML recipe, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field by its dotted path")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the finished cache as a data set to the hub")
    options = parser.parse_args(arguments)
    return guarded(lambda: build(options.recipe, options.overrides, options.push))


def build(recipe_name: str, overrides: Sequence[str], push: str | None) -> None:
    """Build or complete the cache of a recipe."""
    recipe = load_recipe(recipe_name, [*overrides, "targets.cache=true"])
    accelerator = start_accelerator(recipe)
    try:
        parts = TeacherAndText(recipe, accelerator)
        targets = parts.cached_targets()
        if not accelerator.is_main_process:
            return
        tokens = len(parts.cached_blocks) * recipe.corpus.block_length
        row = {
            "targets": targets.encoding.kind,
            "tokens": f"{tokens:,}",
            "shards": str(len(targets.manifest["shards"])),
            "bytes/token": f"{targets.bytes_per_token:.1f}",
            "built in": f"{targets.seconds:.1f} s",
            "tokens/s": f"{tokens / max(targets.seconds, 1e-9):,.0f}",
        }
        print_table(str(targets.folder), [row])
        if push:
            from distill.hub import upload

            message = f"Soft targets of {parts.teacher.name}"
            upload(targets.folder, push, True, None, message, repo_type="dataset", ignore=[".lock"])
    finally:
        leave(accelerator)


if __name__ == "__main__":
    sys.exit(main())
