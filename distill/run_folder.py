"""The run folder: whose it is, what it was begun with, and how a finished run is written into it.

A folder belongs to one recipe and to the text and the weights that it was begun with; whoever goes on in it with
others is refused. The result is written last, and marks the run as complete.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.checkpoint import clear_leftovers, write_atomically, write_json
from distill.config import Recipe, UserError
from distill.recipe import dump_recipe, load_recipe
from distill.result import plot_curves, print_result, table_rows
from distill.sealed import checksums, read_sealed, seal
from distill.session import sha256
from distill.tracking import Tracker

logger = logging.getLogger(__name__)

# What may differ between a run folder and the recipe that goes on with it: nothing that the numbers depend on.
FREE_FIELDS = {
    "run": {"output_dir", "checkpoint_every", "keep_checkpoints", "threads", "micro_batch_size"},
    "endpoint": {"url", "api_key_env", "concurrency", "requests_per_second", "retries", "timeout"},
    "corpus": {"cache_dir"},
    "writing": {"folder"},
    "evaluation": {"prompts", "new_tokens", "decode_seconds"},
    "tracking": None,
    "publishing": None,
}
SHARED_FOLDER_SECONDS = 20.0  # a network file system may show another machine's files late


def claim_folder(recipe: Recipe, accelerator: Accelerator) -> None:
    """Make the run folder and put the resolved recipe into it, or check that the one there is the same."""
    folder, file = recipe.folder, recipe.folder / "recipe.yaml"
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {folder}: cannot be made: {error}; choose another run.output_dir") from None
        if not os.access(folder, os.W_OK):
            raise UserError(f"run folder {folder}: not writable; choose another run.output_dir")
        traces = ("checkpoints", "soft_targets", "teacher", "result.json")
        begun = any((folder / name).exists() for name in traces)
        if begun:
            try:
                saved = dump_recipe(load_recipe(folder))
            except UserError as error:
                raise UserError(
                    f"run folder {folder}: its recipe.yaml is missing or damaged, so nobody knows whether this is its "
                    f"recipe; choose another run.name, or delete it ({error})"
                ) from None
            if differences := _differences(yaml.safe_load(saved), yaml.safe_load(dump_recipe(recipe))):
                raise UserError(
                    f"run folder {folder} belongs to another recipe; choose another run.name, or delete it:\n  "
                    + "\n  ".join(differences)
                )
        clear_leftovers(folder)
        write_atomically(file, lambda path: path.write_text(dump_recipe(recipe), encoding="utf-8"))
    accelerator.wait_for_everyone()
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            raise UserError(
                f"run folder {folder.resolve()}: not what the main process sees on {platform.node()}; several machines "
                "need a common file system for run.output_dir and caches",
                every_process=True,
            )
        time.sleep(0.2)


def claim_inputs(folder: Path, *, text: str, tokenizer: str, dtype: str, weights: str) -> None:
    """Note with which text, student's tokenizer and weights this run trains, or check that they are still the same."""
    file = folder / "inputs.json"
    found = {"text": text, "tokenizer": tokenizer, "teacher": {dtype: weights}}
    try:
        before = read_sealed(file)
        if before["text"] != found["text"]:
            what = "its text has changed since it was begun"
        elif before.get("tokenizer") not in (None, tokenizer):  # None: begun before it was noted
            what = "the student's tokenizer is not the one with which it was begun"
        elif before["teacher"].get(dtype) in (None, weights):
            return  # other arithmetic, as another machine may have, cannot be compared
        else:
            what = "its teacher has other weights than when it was begun"
        raise UserError(f"run folder {folder}: {what}; choose another run.name, or delete it")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, AttributeError) as error:
        logger.warning("%s is damaged (%s) and written anew", file, error)
    write_json(file, seal(found))


def write_result(
    recipe: Recipe,
    result: dict[str, Any],
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tracker: Tracker,
) -> None:
    """Models as plain Hugging Face folders, curves, and last the result that marks the run as complete."""
    folder = recipe.folder
    result["files"] = {}
    for name, network in models.items():

        def save(path: Path, network: PreTrainedModel = network) -> None:
            network.save_pretrained(path)
            tokenizer.save_pretrained(path)

        write_atomically(folder / name, save)
        result["files"][name] = checksums(folder / name)
    result["files"]["."] = {path.name: sha256(path) for path in sorted(folder.glob("*.log.jsonl"))}
    picture = folder / "curves.png"
    plot_curves(result, picture)
    tracker.log_samples(result["samples"])
    write_json(folder / "result.json", seal(result))
    tracker.log_result(result, table_rows(result), picture, [folder / "result.json", folder / "recipe.yaml"])
    print_result(result, folder)
    publish_once(recipe, result)  # last: what the hub refuses is published by the same command again


def publish_once(recipe: Recipe, result: dict[str, Any]) -> None:
    """Publish where the recipe asks for it and it has not been done."""
    publishing, file = recipe.publishing, recipe.folder / "published.json"
    if not publishing.repo:
        return
    weights = result.get("files", {}).get("student", {}).get("model.safetensors")
    done = {"repo": publishing.repo, "branch": publishing.branch, "weights": weights}
    try:
        if read_sealed(file).items() >= done.items():
            return
    except (OSError, ValueError):
        pass  # publishing twice changes nothing
    from distill.hub import publish

    write_json(file, seal({**done, "address": publish(recipe, result)}))


def _differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Fields in which two resolved recipes differ and must not."""
    found = []
    for section in given:
        free = FREE_FIELDS.get(section, set())
        if free is None:
            continue
        if not isinstance(given[section], dict):
            pairs = [(section, saved.get(section), given[section])]
        else:
            before = saved.get(section) or {}
            pairs = [(f"{section}.{k}", before.get(k), v) for k, v in given[section].items() if k not in free]
        found += [f"{name}: the run has {a!r}, the recipe {b!r}" for name, a, b in pairs if a != b]
    return found
