"""What a second process is worth: speed of training from a cache, and of building one, by one process and by two.

    make bench-scaling

Every process has one thread and as much work as any other: the same lanes of a training step, the same tokens of a
cache. Efficiency is tokens a second of two processes over twice those of one. What the machine itself takes away, its
memory, caches and clock being shared, is seen from two processes that know nothing of each other (`apart`), begun
together: `..._of_apart` is what two processes reach of them, and so what working together costs. Processes that train
together take each step together, so of those apart the slower one counts twice there; a cache is built at each one's
own speed.
Teacher, text and student are the quickstart's; the stage trained is forward KL to cached hidden states over the
recipe's candidates, all collectives of a step included. A cache is timed from an empty folder to the checked manifest.
Ways take turns, and each repetition is compared within itself; the medians of these ratios are given. A cache has two
whole shards for each process, because a shard is what the work is shared out in.

`rss_growth_2gb` is measured by `make bench-streaming` and taken from runs/bench/streaming.json, where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import FOLDER, finish, print_table
from benchmarks.runs import ROOT, candidates_of, recipe_parser
from distill import launch
from distill.command import guarded
from distill.config import StageConfig, TargetsConfig, UserError
from distill.job import TeacherAndText, leave, start_accelerator
from distill.recipe import load_recipe
from distill.targets import SHARD_TOKENS, cached_blocks, open_targets
from distill.train import Training
from distill.transplant import build_student

PARTS = ("train", "cache")
WAYS = {"one": (1, 1), "two": (1, 2), "apart": (2, 1)}  # commands begun together, processes of each
WARM_UP = 3
READ_TOKENS = 16_384  # cached to be trained on


class Worker:
    """One process of a measurement; prints tokens a second of all processes of its command, by part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        given = load_recipe(options.recipe, options.overrides)
        lanes = given.run.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        self.recipe = load_recipe(
            options.recipe, [*options.overrides, "tracking=none", "run.threads=1", f"run.batch_size={lanes}"]
        )
        self.accelerator = start_accelerator(self.recipe)
        self.parts = TeacherAndText(self.recipe, self.accelerator)

    def run(self) -> None:
        try:
            found = {
                part: tokens / seconds for part, (tokens, seconds) in (("train", self.train()), ("cache", self.cache()))
            }
            if self.accelerator.is_main_process:
                print(json.dumps(found), flush=True)
        finally:
            leave(self.accelerator)

    def train(self) -> tuple[int, float]:
        """Tokens and seconds of the training loop's own steps."""
        recipe = self.recipe
        tokens_per_step = recipe.run.batch_size * recipe.corpus.block_length
        steps = self.options.steps + WARM_UP
        blocks, targets = self.targets(Path(self.options.folder).parent / "read", READ_TOKENS)
        stage = StageConfig.model_validate(
            {
                "objective": "forward_kl",
                "candidates": candidates_of(self.options.recipe, self.options.overrides),
                "freeze": ["embedding", "head"],
                "length": {"steps": steps},
            }
        )
        teacher, separator = self.parts.teacher, self.parts.corpus.separator_id
        student = build_student(recipe.student, teacher, separator, seed=recipe.run.seed, transplant=True)
        unused: Any = None
        training = Training(
            "scaling", recipe=recipe, stages=(stage,), student=student, blocks=blocks, teacher=teacher,
            validate=unused, accelerator=self.accelerator, tracker=unused, targets=targets,
        )  # fmt: skip
        _, take_step = training.begin(stage)
        began = 0.0
        for number in range(steps):
            if number == WARM_UP:
                self.meet("train")
                began = time.perf_counter()
            take_step()
            training._agree(0.0, 0)
            training.progress.now.steps += 1
        self.accelerator.wait_for_everyone()
        return self.options.steps * tokens_per_step, time.perf_counter() - began

    def cache(self) -> tuple[int, float]:
        """Tokens and seconds of a cache built in an empty folder."""
        self.meet("cache")
        began = time.perf_counter()
        wanted = self.options.tokens * self.accelerator.num_processes
        blocks, _ = self.targets(Path(self.options.folder) / f"built-{self.options.number}", wanted)
        self.accelerator.wait_for_everyone()
        return len(blocks) * blocks.block_length, time.perf_counter() - began

    def targets(self, folder: Path, tokens: int) -> tuple[Any, Any]:
        blocks = cached_blocks(self.parts.blocks, tokens)
        config = TargetsConfig(signal="hidden", cache=True, cache_dir=str(folder))
        built = open_targets(
            config, self.parts.teacher, self.parts.corpus, blocks, self.accelerator,
            batch_tokens=self.recipe.evaluation.batch_tokens,
        )  # fmt: skip
        return blocks, built

    def meet(self, part: str) -> None:
        """Begin when all commands of this measurement are ready to."""
        if self.accelerator.is_main_process:
            folder = Path(self.options.folder) / part
            (folder / str(self.options.number)).touch()
            while len(list(folder.iterdir())) < self.options.commands:
                time.sleep(0.01)
        self.accelerator.wait_for_everyone()


def measure(way: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Tokens a second of all commands of one way, by part. The cache to be trained on lies beside `folder`."""
    commands, processes = WAYS[way]
    for part in PARTS:
        (folder / part).mkdir(parents=True)
    running = []
    for number in range(commands):
        words = ["--folder", str(folder), "--number", str(number), "--commands", str(commands)]
        words += ["--recipe", options.recipe, "--steps", str(options.steps), "--tokens", str(options.tokens)]
        script = Path(__file__).resolve()
        command = [sys.executable, str(script)] if processes == 1 else launch.command(processes, [], script=script)
        environment = launch.environment(processes, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        running.append(
            subprocess.Popen(
                [*command, *words, *options.overrides], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    found = [process.communicate() for process in running]
    for process, (_, said) in zip(running, found, strict=True):
        if process.returncode:
            raise UserError(f"{way}: exit code {process.returncode}:\n{said[-2000:]}")
    speeds = [json.loads(said.splitlines()[-1]) for said, _ in found]
    return {
        "train": len(speeds) * min(speed["train"] for speed in speeds),
        "cache": sum(speed["cache"] for speed in speeds),
    }


def benchmark(options: argparse.Namespace) -> None:
    speeds: dict[str, dict[str, list[float]]] = {part: {way: [] for way in WAYS} for part in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repeats):
            for way in WAYS:
                for part, speed in measure(way, options, Path(folder) / f"{number}-{way}").items():
                    speeds[part][way].append(speed)
    median = {part: {way: statistics.median(found) for way, found in ways.items()} for part, ways in speeds.items()}
    efficiency = {
        part: {
            "two": _median_ratio(ways["two"], ways["one"]) / 2,
            "apart": _median_ratio(ways["apart"], ways["one"]) / 2,
            "of apart": _median_ratio(ways["two"], ways["apart"]),
        }
        for part, ways in speeds.items()
    }
    rows = [
        {
            "work": {"train": "training from a cache", "cache": "building a cache"}[part],
            **{f"{way}, tokens/s": f"{median[part][way]:,.0f}" for way in WAYS},
            "efficiency of two": f"{efficiency[part]['two']:.1%}",
            "of apart": f"{efficiency[part]['apart']:.1%}",
            "two to apart": f"{efficiency[part]['of apart']:.1%}",
        }
        for part in PARTS
    ]
    print_table("One process and two, one thread each", rows, "apart: two processes that know nothing of each other")
    finish(
        "scaling",
        {
            "train_efficiency_2": efficiency["train"]["two"],
            "cache_efficiency_2": efficiency["cache"]["two"],
            "rss_growth_2gb": rss_growth(),
            "train_efficiency_apart": efficiency["train"]["apart"],
            "cache_efficiency_apart": efficiency["cache"]["apart"],
            "train_efficiency_of_apart": efficiency["train"]["of apart"],
            "cache_efficiency_of_apart": efficiency["cache"]["of apart"],
            "tokens_per_second": median,
            "repetitions": speeds,
        },
    )


def _median_ratio(speeds: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(speed / other for speed, other in zip(speeds, others, strict=True))


def rss_growth() -> float | None:
    file = FOLDER / "streaming.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found.get("rss_growth_2gb")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("scaling", __doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="timed training steps")
    parser.add_argument("--tokens", type=int, default=2 * SHARD_TOKENS, help="tokens of a cache for each process")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of a worker, as the next two
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--commands", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: Worker(options).run() if options.folder else benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
