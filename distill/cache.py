"""Build a recipe's cached targets and nothing else; a later run of the recipe finds them.

    accelerate launch -m distill.cache RECIPE [key=value ...] [--push OWNER/NAME]

Stopped at any time, the same command goes on. Format and validation: `distill/targets.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from distill.command import guarded
from distill.config import UserError
from distill.job import TeacherAndText, leave, start_accelerator
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
        table = Table("targets", "tokens", "shards", "bytes/token", "built in", "tokens/s", title=str(targets.folder))
        table.add_row(
            targets.encoding.kind,
            f"{tokens:,}",
            str(len(targets.manifest["shards"])),
            f"{targets.bytes_per_token:.1f}",
            f"{targets.seconds:.1f} s",
            f"{tokens / max(targets.seconds, 1e-9):,.0f}",
        )
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        if push:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError

            try:
                HfApi().create_repo(push, repo_type="dataset", private=True, exist_ok=True)
                HfApi().upload_folder(
                    repo_id=push,
                    folder_path=targets.folder,
                    repo_type="dataset",
                    ignore_patterns=[".lock"],
                )
            except (HfHubHTTPError, OSError) as error:
                raise UserError(f"--push {push}: {str(error).strip().splitlines()[0]}; the cache is complete") from None
    finally:
        leave(accelerator)


if __name__ == "__main__":
    sys.exit(main())
