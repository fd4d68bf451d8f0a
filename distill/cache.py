"""Build a recipe's cached targets and nothing else; a later run of the recipe finds them.

    accelerate launch -m distill.cache RECIPE [key=value ...] [--verify] [--push OWNER/NAME]

Stopped at any time, the same command goes on. `--verify` compares all shards with their checksums, also those that
have been before. Format and validation: `distill/targets.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.command import guarded
from distill.config import UserError
from distill.job import TeacherAndText, leave, start_accelerator
from distill.output import print_json, print_table
from distill.recipe import load_recipe
from distill.shards import CHECKED


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, show; returns the exit code."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m distill.cache", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML recipe, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field by its dotted path")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the finished cache as a data set to the hub")
    parser.add_argument("--verify", action="store_true", help="compare every shard with its checksum")
    options = parser.parse_args(arguments)
    return guarded(lambda: build(options.recipe, options.overrides, options.push, options.verify))


def build(recipe_name: str, overrides: Sequence[str], push: str | None, verify: bool = False) -> None:
    """Build or complete the cache of a recipe."""
    recipe = load_recipe(recipe_name, [*overrides, "targets.cache=true"])
    if recipe.targets.is_remote:
        raise UserError(f"targets.cache_dir: {recipe.targets.cache_dir} is read only; build in a folder, then copy it")
    accelerator = start_accelerator(recipe)
    try:
        parts = TeacherAndText(recipe, accelerator)
        targets = parts.cached_targets(verify)
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
        figures = {"tokens": tokens, "bytes_per_token": targets.bytes_per_token, "seconds": targets.seconds}
        print_json({"folder": str(targets.folder), **figures})
        if push:
            from distill.hub import upload

            message = f"Soft targets of {parts.teacher.name}"
            assert isinstance(targets.folder, Path)
            upload(targets.folder, push, True, None, message, repo_type="dataset", ignore=[".lock", CHECKED])
    finally:
        leave(accelerator)


if __name__ == "__main__":
    sys.exit(main())
