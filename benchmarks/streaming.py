"""Memory and time over the length of a text, and over the number of a cache's shards.

    make bench-streaming

Texts of several sizes are generated as parquet shards of random words. Each is read once by a process of its own, block
by block in the order of training, in two ways: *streamed* (`corpus.streaming`), and *stored*: tokenised to disk, then
read memory-mapped. Peak is the process's highest resident memory with all libraries, and growth that of the longest
text over the shortest. Time is linear where each further megabyte takes as many seconds as the ones before:
`time_linearity` is the last of these figures over the first. Seconds hold everything, the teacher's loading too.
The sample and the shuffle buffer hold 2,000 documents, about 3 MB of text, so that the shortest fills them too.

Caches of hidden states have one tiny block a shard. *Reopen* is what a later run takes to find the cache whole, and
*verify* the same with all checksums; then all blocks are read in the order of training.

The teacher has random weights and the tokenizer a word for each token: neither matters here. A picture is written to
runs/bench/streaming.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.report import FOLDER, finish, print_table
from benchmarks.tiny import save_llama, save_tokenizer
from distill.checkpoint import write_atomically
from distill.command import guarded
from distill.config import UserError

WORDS = [f"word{number}" for number in range(2000)]
SHARD_MEGABYTES = 5
WAYS = ("streamed", "stored")
SAMPLE = 2_000
LANES, BLOCK = 16, 128


def make_text(folder: Path, megabytes: int) -> None:
    """Parquet shards of random documents of about 250 words; those of a shorter text begin a longer one."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    words = np.array(WORDS, dtype=object)
    for number in range(math.ceil(megabytes / SHARD_MEGABYTES)):
        file = folder / f"{number:05d}.parquet"
        if file.exists():
            continue
        rng, texts, size = np.random.default_rng(number), [], 0
        while size < min(SHARD_MEGABYTES, megabytes - number * SHARD_MEGABYTES) * 1_000_000:
            texts.append(" ".join(words[rng.integers(len(words), size=rng.integers(50, 450))]))
            size += len(texts[-1])
        pyarrow.parquet.write_table(pa.table({"text": texts}), partial := folder / "partial", row_group_size=1000)
        partial.rename(file)


def write_recipe(folder: Path, text: Path, teacher: Path, **sections: dict[str, Any]) -> Path:
    """A recipe over a text; `sections` are added to it."""
    plain: dict[str, Any] = {
        "run": {"name": "streaming", "batch_size": LANES, "precision": "fp32", "output_dir": str(folder)},
        "teacher": {"model": str(teacher), "dtype": "fp32"},
        "corpus": {"source": str(text), "block_length": BLOCK, "cache_dir": str(folder / "cache")},
        "stages": [{"objective": "hidden_mse", "length": {"steps": 1}}],
        "tracking": "none",
    }
    for name, fields in sections.items():
        plain[name] = {**plain.get(name, {}), **fields}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return file


def resident(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def read_text(recipe_file: Path) -> dict[str, Any]:
    """Read a recipe's text once, in this process."""
    from distill.corpus import lane_order
    from distill.job import TeacherAndText, start_accelerator
    from distill.recipe import load_recipe
    from distill.stream import BlockStream

    recipe, blocks = load_recipe(str(recipe_file)), 0
    accelerator = start_accelerator(recipe)
    at_start, began = resident("VmRSS"), time.perf_counter()
    parts = TeacherAndText(recipe, accelerator)
    if isinstance(text := parts.text, BlockStream):
        while True:
            ids_G, _ = text.row(blocks // LANES)
            if text.epoch:
                break
            text.batch(ids_G)
            blocks += LANES
    else:
        for ids_G in lane_order(len(text), LANES, epoch=0, seed=0):
            text.batch(ids_G)
            blocks += LANES
    seconds = time.perf_counter() - began
    rss = {"rss_at_start_mib": at_start, "peak_rss_mib": resident("VmHWM")}
    return {"tokens": blocks * BLOCK, "seconds": seconds, **rss}


def read_cache(recipe_file: Path, shards: int) -> dict[str, Any]:
    """Build a cache of so many shards of one block, open it again, and read it once, in this process."""
    from distill import checkpoint, targets
    from distill.corpus import lane_order
    from distill.job import TeacherAndText, start_accelerator
    from distill.recipe import load_recipe

    targets.SHARD_TOKENS = BLOCK
    checkpoint._flush = lambda path: None  # 10,000 files would be waited for one by one
    recipe = load_recipe(str(recipe_file), [f"targets.max_tokens={shards * BLOCK}"])
    parts = TeacherAndText(recipe, start_accelerator(recipe))
    if len(parts.cached_blocks) < shards:
        raise UserError(f"--shards: the shortest text has {len(parts.cached_blocks)} blocks, fewer than {shards}")
    seconds = {}
    for name, verify in (("build", False), ("reopen", False), ("verify", True)):
        began = time.perf_counter()
        cached = parts.cached_targets(verify)
        seconds[f"{name}_seconds"] = time.perf_counter() - began
    assert len(cached.manifest["shards"]) == shards
    before, began = resident("VmRSS"), time.perf_counter()
    for ids_G in lane_order(shards, LANES, epoch=0, seed=0):
        cached.signal(parts.cached_blocks.batch(ids_G))
    seconds["read_seconds"] = time.perf_counter() - began
    grown = resident("VmRSS") - before
    return {"shards": shards, **seconds, "tokens": shards // LANES * LANES * BLOCK, "read_growth_mib": grown}


def apart(*arguments: object) -> dict[str, Any]:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--only", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed, as said above")
    return json.loads(done.stdout.splitlines()[-1])


def plot(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Peak memory and seconds over the length of the text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, clock = figure.subplots(1, 2)
    for way, rows in found.items():
        size = [row["megabytes"] for row in rows]
        memory.plot(size, [row["peak_rss_mib"] for row in rows], "o-", label=way)
        clock.plot(size, [row["seconds"] for row in rows], "o-", label=way)
    memory.set(xscale="log", xlabel="MB of text", ylabel="peak resident memory, MiB", ylim=(0, None))
    clock.set(xscale="log", yscale="log", xlabel="MB of text", ylabel="seconds for one reading")
    memory.legend()
    figure.suptitle("Memory and time over the length of a text")
    write_atomically(file, lambda path: FigureCanvasAgg(figure).print_png(str(path)))


def _slope(shorter: dict[str, Any], longer: dict[str, Any]) -> float:
    """Seconds for each further megabyte."""
    return (longer["seconds"] - shorter["seconds"]) / (longer["megabytes"] - shorter["megabytes"])


def benchmark(options: argparse.Namespace) -> None:
    folder = FOLDER.resolve() / "streaming"
    sizes = sorted(options.megabytes)
    save_tokenizer(folder / "teacher", WORDS)
    save_llama(folder / "teacher", vocab_size=len(WORDS) + 2, num_hidden_layers=1, max_position_embeddings=2048)
    corpus = {"streamed": {"streaming": True, "sample_documents": SAMPLE, "shuffle_buffer": SAMPLE}, "stored": {}}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for size in sizes:
        make_text(folder / f"text-{size}", size)
        for way in WAYS:
            place = folder / f"{way}-{size}"
            recipe = write_recipe(place, folder / f"text-{size}", folder / "teacher", corpus=corpus[way])
            shutil.rmtree(place / "cache", ignore_errors=True)
            found[way].append({"megabytes": size, **apart(way, recipe)})
            shutil.rmtree(place / "cache", ignore_errors=True)
    caches = []
    for shards in sorted(options.shards):
        place = folder / f"cache-{shards}"
        shutil.rmtree(place, ignore_errors=True)
        targets = {"cache": True, "cache_dir": str(place / "targets")}
        text = folder / f"text-{sizes[0]}"
        recipe = write_recipe(place, text, folder / "teacher", targets=targets)
        caches.append(apart(shards, recipe))
    plot(found, FOLDER / "streaming.png")
    rows = [
        {
            "text": f"{row['megabytes']:,} MB",
            "way": way,
            "tokens": f"{row['tokens']:,}",
            "seconds": f"{row['seconds']:.1f}",
            "MB/s": f"{row['megabytes'] / row['seconds']:.2f}",
            "MiB at start": f"{row['rss_at_start_mib']:.0f}",
            "peak MiB": f"{row['peak_rss_mib']:.0f}",
        }
        for way in WAYS
        for row in found[way]
    ]
    growth = {way: found[way][-1]["peak_rss_mib"] / found[way][0]["peak_rss_mib"] - 1 for way in WAYS}
    slope = {way: [_slope(*pair) for pair in itertools.pairwise(found[way])] for way in WAYS}
    note = "\n".join(
        f"{way}: peak {growth[way]:+.1%}; seconds per MB from each length to the next: "
        + ", ".join(f"{value:.4f}" for value in slope[way])
        for way in WAYS
    )
    print_table(f"One reading of a text, {LANES} lanes x {BLOCK} tokens", rows, note)
    if caches:
        names = ("build_seconds", "reopen_seconds", "verify_seconds", "read_seconds", "read_growth_mib")
        shown = [{"shards": f"{row['shards']:,}", **{name: f"{row[name]:.2f}" for name in names}} for row in caches]
        print_table("Caches of one block a shard", shown)
    finish(
        "streaming",
        {
            "rss_growth_2gb": max(growth.values()) if sizes[-1] >= 2000 else None,
            "megabytes": [sizes[0], sizes[-1]],
            "rss_growth": growth,
            "seconds_per_mb": slope,
            "time_linearity": {way: slope[way][-1] / slope[way][0] for way in WAYS if slope[way]},
            "readings": found,
            "caches": caches,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 500, 2000], help="lengths of the texts")
    parser.add_argument("--shards", type=int, nargs="*", default=[100, 5000], help="numbers of shards of the caches")
    parser.add_argument("--only", nargs=2, metavar=("WAY", "RECIPE"), help="one measurement, in this process")
    options = parser.parse_args(arguments)
    if options.only:
        way, recipe = options.only
        measured = read_text(Path(recipe)) if way in WAYS else read_cache(Path(recipe), int(way))
        print(json.dumps(measured))
        return 0
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
