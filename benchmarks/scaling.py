"""What a second process is worth: speed of training from a cache, and of building one, by one process and by two.

    make bench-scaling

Every process has one thread and as much work as any other: the same lanes of a training step, the same tokens of a
cache. Efficiency is tokens a second of two processes over twice those of one. What the machine itself takes away is
seen from two processes that know nothing of each other (`apart`), begun together, and counted as if each step had
waited for the slower of them: memory, caches and clock are shared, and no core is always as fast as the other.
`..._of_apart` is what two processes reach of that, and so what working together costs.

All processes are started once and take turns of a few seconds, those whose turn it is not sleep, and each round of
turns is compared within itself: speeds of a machine that others share change from minute to minute. The medians of
these ratios are given. Teacher, text and student are those of recipes/frontier.yaml; the stage trained is forward KL to
cached hidden states over the recipe's candidates, all collectives of a step included. A cache is timed from an empty
folder to the checked manifest, and has a whole shard for each process, because a shard is what the work is shared out
in.

`rss_growth_2gb` is measured by `make bench-streaming` and taken from runs/bench/streaming.json, where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import IO, Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

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

PARTS = {"train": "training from a cache", "cache": "building a cache"}
COMMANDS = (1, 1, 2)  # processes of each command
WAYS = {"one": (0,), "two": (2,), "apart": (0, 1)}  # commands whose turn it is
READ_TOKENS = 16_384  # cached to be trained on


class Worker:
    """A process of a command. Does the parts that it reads names of, and prints the tokens and seconds of each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.folder)
        given = load_recipe(options.recipe, options.overrides)
        lanes = given.run.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        self.recipe = load_recipe(
            options.recipe, [*options.overrides, "tracking=none", "run.threads=1", f"run.batch_size={lanes}"]
        )
        self.accelerator = start_accelerator(self.recipe)
        self.parts = TeacherAndText(self.recipe, self.accelerator)
        self.built = count()

    def run(self) -> None:
        try:
            while part := self._next_part():
                tokens, seconds = {"train": self.train, "cache": self.cache}[part]()
                if self.accelerator.is_main_process:
                    print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)
        finally:
            leave(self.accelerator)

    def _next_part(self) -> str:
        """Empty when there is none; the other processes of the command sleep until the first has read it."""
        line = [sys.stdin.readline().strip() if self.accelerator.is_main_process else ""]
        return broadcast_object_list(line)[0]

    def train(self) -> tuple[int, list[float]]:
        """Tokens of a step of the training loop, and the seconds of each."""
        seconds = []
        for _ in range(self.options.steps):
            began = time.perf_counter()
            self.take_step()
            seconds.append(time.perf_counter() - began)
        return self.recipe.run.batch_size * self.recipe.corpus.block_length, seconds

    @cached_property
    def take_step(self) -> Callable[[], None]:
        recipe = self.recipe
        blocks, targets = self._targets(self.folder / "read", READ_TOKENS)
        stage = StageConfig.model_validate(
            {
                "objective": "forward_kl",
                "candidates": candidates_of(self.options.recipe, self.options.overrides),
                "freeze": ["embedding", "head"],
                "length": {"steps": 1_000_000},
            }
        )
        teacher, separator = self.parts.teacher, self.parts.corpus.separator_id
        student = build_student(recipe.student, teacher, separator, seed=recipe.run.seed, transplant=True)
        unused: Any = None
        training = Training(
            "scaling", recipe=recipe, stages=(stage,), student=student, blocks=blocks, teacher=teacher,
            validate=unused, accelerator=self.accelerator, tracker=unused, targets=targets,
        )  # fmt: skip
        _, step = training.begin(stage)

        def take_step() -> None:
            step()
            training._agree(0.0, 0)
            training.progress.now.steps += 1

        return take_step

    def cache(self) -> tuple[int, list[float]]:
        """Tokens of a cache, and the seconds in which it was built in an empty folder."""
        wanted = self.options.tokens * self.accelerator.num_processes
        began = time.perf_counter()
        blocks, _ = self._targets(self.folder / f"built-{self.options.number}-{next(self.built)}", wanted)
        self.accelerator.wait_for_everyone()
        return len(blocks) * blocks.block_length, [time.perf_counter() - began]

    def _targets(self, folder: Path, tokens: int) -> tuple[Any, Any]:
        blocks = cached_blocks(self.parts.blocks, tokens)
        config = TargetsConfig(signal="hidden", cache=True, cache_dir=str(folder))
        built = open_targets(
            config, self.parts.teacher, self.parts.corpus, blocks, self.accelerator,
            batch_tokens=self.recipe.evaluation.batch_tokens,
        )  # fmt: skip
        return blocks, built


class Command:
    """Processes that wait for their turns."""

    def __init__(self, options: argparse.Namespace, folder: Path, number: int) -> None:
        processes = COMMANDS[number]
        words = ["--folder", str(folder), "--number", str(number)]
        words += ["--recipe", options.recipe, "--steps", str(options.steps), "--tokens", str(options.tokens)]
        script = Path(__file__).resolve()
        command = [sys.executable, str(script)] if processes == 1 else launch.command(processes, [], script=script)
        self.command = [*command, *words, *options.overrides]
        environment = launch.environment(processes, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        self.errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        with self.errors, self.process:
            self.process.terminate()  # where it has not ended by itself

    def begin(self, part: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(part + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def end(self) -> dict[str, Any]:
        """What the part took."""
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        code = self.process.wait()
        self.errors.seek(0)
        raise UserError(f"{shlex.join(self.command)}: exit code {code}:\n{self.errors.read()[-2000:]}")


def take_turn(commands: Sequence[Command], part: str) -> float:
    """Tokens a second of commands that do a part side by side, as if each step waited for the slowest of them."""
    for command in commands:
        command.begin(part)
    found = [command.end() for command in commands]
    waited = sum(map(max, zip(*(one["seconds"] for one in found), strict=True)))
    return sum(one["tokens"] * len(one["seconds"]) for one in found) / waited


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Tokens a second by part, way and round."""
    speeds: dict[str, dict[str, list[float]]] = {part: {way: [] for way in WAYS} for part in PARTS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        commands = [stack.enter_context(Command(options, Path(folder), number)) for number in range(len(COMMANDS))]
        for command in commands:  # one after the other: what is loaded and cached first is warm
            take_turn([command], "train")
        for _ in tqdm(range(options.repeats), "rounds"):
            for part in PARTS:
                for way, turn in WAYS.items():
                    speeds[part][way].append(take_turn([commands[number] for number in turn], part))
    return speeds


def benchmark(options: argparse.Namespace) -> None:
    speeds = measure(options)
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
            "work": work,
            **{f"{way}, tokens/s": f"{median[part][way]:,.0f}" for way in WAYS},
            "efficiency of two": f"{efficiency[part]['two']:.1%}",
            "of apart": f"{efficiency[part]['apart']:.1%}",
            "two to apart": f"{efficiency[part]['of apart']:.1%}",
        }
        for part, work in PARTS.items()
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
            "rounds": speeds,
        },
    )


def _median_ratio(speeds: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(speed / other for speed, other in zip(speeds, others, strict=True))


def rss_growth() -> float | None:
    file = FOLDER / "streaming.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found.get("rss_growth_2gb")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("scaling", __doc__, "frontier")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=8, help="training steps in a turn")
    parser.add_argument("--tokens", type=int, default=SHARD_TOKENS, help="tokens of a cache for each process")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of a worker, as the next one
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: Worker(options).run() if options.folder else benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
