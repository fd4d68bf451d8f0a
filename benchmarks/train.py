"""What distillation costs a step: a naive online loop, TRL's GKDTrainer, ours online and from each cache, no teacher.

    make bench-train          or, without TRL's environment:  python -m benchmarks.train --skip-trl

Same teacher, student, text and batch everywhere, those of recipes/frontier.yaml. The naive loop is the one found in
most tutorials: all logits of both models, `F.kl_div` of their log-softmaxes, backward, clip, AdamW. Ours is the step of
`distill/train.py` itself. Cases take turns of two seconds or a step within one process, so that a busy machine slows
all alike, and medians of the turns are compared; GKDTrainer, whose loop cannot be interleaved, has its own process and
environment. Peak memory is that of a process which runs one case alone, from its first step on, models included.

Legend: B lanes, T block length, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.report import finish, print_table
from benchmarks.runs import ROOT, recipe_parser
from benchmarks.trl_gkd import peak_mib, reset_peak
from distill.command import guarded
from distill.config import StageConfig, TargetsConfig, UserError
from distill.corpus import lane_order
from distill.job import TeacherAndText, leave, start_accelerator
from distill.recipe import load_recipe
from distill.student import LSTMForCausalLM
from distill.targets import CachedTargets, LiveTargets, Targets, open_targets
from distill.teacher import hardware_has_bf16, resolve_model
from distill.train import Training
from distill.transplant import build_student

CACHED_TOKENS = 8192
FROZEN = ("embedding", "head")
TRL_PYTHON = Path(".venv-trl/bin/python")


@dataclass(frozen=True)
class Case:
    """One way to train: which loop, on which signal, towards what, with which parts frozen.

    `loop`: naive or ours; `source`: none, live, or the kind of a cache; `precision` of the naive loop.
    """

    loop: str
    source: str
    objective: str
    freeze: tuple[str, ...]
    precision: str = ""

    @property
    def name(self) -> str:
        trained = "frozen head" if self.freeze else "trained head"
        source = {"none": "no teacher", "live": "online"}.get(self.source, f"cached {self.source}")
        what = " ".join(filter(None, [self.objective, self.precision]))
        return f"{self.loop}, {source}: {what}, {trained}"


def cases() -> list[Case]:
    """All but GKDTrainer, in the order of the table."""
    # Where the hardware has bf16, fp32 takes twice as long with either head: one row of it is enough.
    fast = "bf16" if hardware_has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "fp32"
    ways = dict.fromkeys(((FROZEN, fast), (FROZEN, "fp32"), ((), fast)))
    naive = [Case("naive", "live", "forward_kl", *way) for way in ways]
    hidden = [Case("ours", source, "hidden_mse", FROZEN) for source in ("live", "hidden")]
    divergence = [
        Case("ours", source, "forward_kl", freeze)
        for source in ("live", "hidden", "top_k", "sampled")
        for freeze in (FROZEN, ())
    ]
    control = [Case("ours", "none", "cross_entropy", freeze) for freeze in (FROZEN, ())]
    return naive + hidden + divergence + control


@dataclass
class Timing:
    """Seconds a step of a case's turns after the warm-up, and the teacher's or cache's part of them."""

    seconds: list[float] = field(default_factory=list)
    teacher_seconds: list[float] = field(default_factory=list)


Step = Callable[[], float]  # takes one optimizer step; returns the seconds that the teacher or the cache took


class Bench:
    """What all cases share: the recipe's teacher, text, blocks and student."""

    def __init__(self, recipe_name: str, overrides: Sequence[str]) -> None:
        self.recipe = load_recipe(recipe_name, [*overrides, "tracking=none"])
        self.accelerator = start_accelerator(self.recipe)
        cached = self.recipe.model_copy(update={"targets": self.with_cache("hidden")})
        self.parts = TeacherAndText(cached, self.accelerator)
        self.blocks = self.parts.cached_blocks
        self.tokens_per_step = self.recipe.run.batch_size * self.recipe.corpus.block_length

    def with_cache(self, kind: str) -> TargetsConfig:
        """The recipe's targets as a small cache of this kind."""
        given = self.recipe.targets.model_dump(exclude_unset=True)
        return TargetsConfig.model_validate({**given, "signal": kind, "cache": True, "max_tokens": CACHED_TOKENS})

    def student(self) -> LSTMForCausalLM:
        """A fresh one, as the job makes it."""
        recipe = self.recipe
        return build_student(
            recipe.student,
            self.parts.teacher,
            self.parts.corpus.separator_id,
            seed=recipe.run.seed,
            transplant=recipe.student.transplant,
        )

    def targets(self, source: str) -> Targets:
        """The live teacher or a cache, built if need be."""
        if source == "live":
            return LiveTargets(self.parts.teacher, self.parts.encoding)
        return self.cache(source)

    def cache(self, kind: str) -> CachedTargets:
        return open_targets(
            self.with_cache(kind),
            self.parts.teacher,
            self.parts.corpus,
            self.blocks,
            self.accelerator,
            batch_tokens=self.recipe.evaluation.batch_tokens,
            cache_dir=self.recipe.corpus.cache_dir,
        )

    def step(self, case: Case) -> Step:
        return self.naive(case) if case.loop == "naive" else self.ours(case)

    def naive(self, case: Case) -> Step:
        """Full logits on both sides; windows are the blocks alone, so neither context nor resets cost anything."""
        device = self.accelerator.device
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        teacher = self.parts.teacher.model
        if teacher.dtype != dtype:
            teacher = cast(Any, copy.deepcopy(teacher)).to(dtype)
        student = self.student().to(device).train()
        for part in case.freeze:
            module: Any = student.get_input_embeddings() if part == "embedding" else student.get_output_embeddings()
            module.requires_grad_(False)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-3)
        order_SB = lane_order(len(self.blocks), self.recipe.run.batch_size, epoch=0, seed=self.recipe.run.seed)
        number = 0

        def step() -> float:
            nonlocal number
            inputs_BT = self.blocks.batch(order_SB[number % len(order_SB)]).inputs_BT.to(device)
            number += 1
            began = time.perf_counter()
            with torch.no_grad():
                teacher_BTV = teacher(inputs_BT).logits[..., : student.config.vocab_size]
            teacher_seconds = time.perf_counter() - began
            with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
                student_BTV = student(inputs_BT).logits
            log_q_NV = F.log_softmax(student_BTV.float(), -1).flatten(0, 1)
            log_p_NV = F.log_softmax(teacher_BTV.float(), -1).flatten(0, 1)
            loss = F.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert torch.isfinite(loss)
            return teacher_seconds

        return step

    def ours(self, case: Case) -> Step:
        """The training loop's own step."""
        stage = StageConfig.model_validate(
            {"objective": case.objective, "freeze": list(case.freeze), "length": {"steps": 1_000_000}}
        )
        unused: Any = None
        training = Training(
            "bench",
            recipe=self.recipe,
            stages=(stage,),
            student=self.student(),
            blocks=self.blocks,
            teacher=self.parts.teacher,
            validate=unused,
            accelerator=self.accelerator,
            tracker=unused,
            targets=None if case.source == "none" else self.targets(case.source),
        )
        _, take_step = training.begin(stage)

        def step() -> float:
            teacher_seconds = take_step()[2].teacher
            training.progress.now.steps += 1
            return teacher_seconds

        return step


def measure_times(bench: Bench, chosen: Sequence[Case], repeats: int, turn: float) -> dict[Case, Timing]:
    """Cases take turns of so many seconds, or one step; the first round, of one step each, is for warm-up."""
    steps = {case: bench.step(case) for case in chosen}
    timings = {case: Timing() for case in chosen}
    for number in range(repeats + 1):
        for case, step in steps.items():
            teacher_seconds, taken, began = 0.0, 0, time.perf_counter()
            while not taken or (number and time.perf_counter() - began < turn):
                teacher_seconds += step()
                taken += 1
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            if number:
                timings[case].seconds.append((time.perf_counter() - began) / taken)
                timings[case].teacher_seconds.append(teacher_seconds / taken)
    return timings


def measure_peak(bench: Bench, name: str) -> None:
    """Two steps of one case in this process; prints their peak of resident memory."""
    step = bench.step(next(case for case in cases() if case.name == name))
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what setting up took and freed is none of the case's
    reset_peak()
    for _ in range(2):
        step()
    print(json.dumps({"peak_rss_mib": peak_mib()}), flush=True)


def run_process(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """The JSON object in the last line of a command's output."""
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True
    )
    if found.returncode:
        raise UserError(f"{' '.join(command[:4])} ...: exit code {found.returncode}:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def measure_trl(bench: Bench, python: Path, steps: int, freeze: tuple[str, ...]) -> dict[str, Any]:
    """GKDTrainer on the same teacher, student and blocks."""
    recipe = bench.recipe
    order_SB = lane_order(len(bench.blocks), recipe.run.batch_size, epoch=0, seed=recipe.run.seed)
    precision = "bf16" if bench.accelerator.mixed_precision == "bf16" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        bench.student().save_pretrained(Path(folder) / "student")
        blocks = Path(folder) / "blocks.npy"
        np.save(blocks, bench.blocks.batch(order_SB.flatten()).inputs_BT.numpy())
        return run_process(
            [
                str(python), str(ROOT / "benchmarks" / "trl_gkd.py"), resolve_model(recipe.teacher.model),
                str(Path(folder) / "student"), str(blocks), str(steps), str(recipe.run.batch_size), precision, *freeze,
            ],
            OMP_NUM_THREADS=str(torch.get_num_threads()),
            # What distill/job.py sets for ours: keep freed memory.
            MALLOC_MMAP_MAX_="0",
            MALLOC_TRIM_THRESHOLD_=str(2**31 - 1),
        )  # fmt: skip


def figures(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures by which the benchmark is judged, from rows by name."""

    def seconds(loop: str, source: str, objective: str, freeze: tuple[str, ...]) -> float:
        return min(
            rows[case.name]["ms_per_step"] / 1000
            for case in cases()
            if (case.loop, case.source, case.objective, case.freeze) == (loop, source, objective, freeze)
        )

    naive = seconds("naive", "live", "forward_kl", FROZEN)
    hidden = seconds("ours", "hidden", "hidden_mse", FROZEN)
    control = seconds("ours", "none", "cross_entropy", ())
    sparse = {kind: seconds("ours", kind, "forward_kl", ()) / control for kind in ("top_k", "sampled")}
    trl = [row["ms_per_step"] / 1000 for name, row in rows.items() if name.startswith("TRL") and "frozen" in name]
    return {
        "hidden_stage_vs_naive_online": naive / hidden,
        "hidden_stage_vs_trl_gkd": trl[0] / hidden if trl else None,
        "cached_kl_step_vs_ce_step": max(sparse.values()),
        "cached_kl_step_vs_ce_step_by_kind": sparse,
        "online_vs_naive_online": naive / seconds("ours", "live", "forward_kl", FROZEN),
        "online_vs_naive_online_trained_head": (
            seconds("naive", "live", "forward_kl", ()) / seconds("ours", "live", "forward_kl", ())
        ),
    }


def benchmark(options: argparse.Namespace) -> None:
    bench = Bench(options.recipe, options.overrides)
    try:
        if options.peak_of:
            measure_peak(bench, options.peak_of)
            return
        if not options.skip_trl and not TRL_PYTHON.is_file():
            raise UserError(f"expected TRL's environment at {TRL_PYTHON}, found none: make bench-train, or --skip-trl")
        timings = measure_times(bench, cases(), options.repeats, options.turn)
        rows = {case.name: _row(timings[case], bench.tokens_per_step) for case in timings}
        trl_versions = None
        # Only now, so that no other process is around while times are taken.
        if not options.skip_memory:
            for case in timings:
                again = [sys.executable, "-m", "benchmarks.train", "--recipe", options.recipe, "--peak-of", case.name]
                rows[case.name] |= run_process([*again, *options.overrides])
        gc.collect()
        if not options.skip_trl:
            for freeze in (FROZEN, ()):
                found = measure_trl(bench, TRL_PYTHON, max(5, options.repeats), freeze)
                name = f"TRL GKDTrainer, online: forward_kl, {'frozen' if freeze else 'trained'} head"
                rows[name] = {
                    **_row(Timing([found["seconds_per_step"]]), bench.tokens_per_step),
                    "peak_rss_mib": found["peak_rss_mib"],
                }
                trl_versions = found["versions"]
        _report(bench, rows, trl_versions)
    finally:
        leave(bench.accelerator)


def _row(timing: Timing, tokens: int) -> dict[str, Any]:
    seconds = statistics.median(timing.seconds)
    teacher = statistics.median(timing.teacher_seconds) if timing.teacher_seconds else None
    return {
        "tokens_per_second": tokens / seconds,
        "ms_per_step": seconds * 1000,
        "teacher_ms_per_step": None if teacher is None else teacher * 1000,
        "fastest_ms": min(timing.seconds) * 1000,
        "slowest_ms": max(timing.seconds) * 1000,
        "turns": len(timing.seconds),
    }


def _report(bench: Bench, rows: dict[str, dict[str, Any]], trl_versions: dict[str, str] | None) -> None:
    found = figures(rows)
    best = min(row["ms_per_step"] for name, row in rows.items() if name.startswith("naive") and "frozen" in name)

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    table = [
        {
            "loop, targets: objective": name,
            "tokens/s": cell(row["tokens_per_second"], ",.0f"),
            "ms/step": cell(row["ms_per_step"], ",.1f"),
            "of it teacher or cache": cell(row["teacher_ms_per_step"], ",.1f"),
            "peak MiB": cell(row.get("peak_rss_mib"), ",.0f"),
            "x naive": cell(best / row["ms_per_step"], ".2f"),
        }
        for name, row in rows.items()
    ]
    recipe = bench.recipe
    print_table(
        f"Training: {recipe.run.batch_size} x {recipe.corpus.block_length} tokens a step, student "
        f"{recipe.student.num_layers} x {recipe.student.hidden_size}",
        table,
        "x naive: speed against the faster naive loop with a frozen head. frozen head: embedding and head rest, as in "
        "the quickstart; trained head:\nall parameters train. Ours reads its targets with left context, the others "
        "blocks alone. Ours keeps the teacher loaded in every row.",
    )
    finish("train", {**found, "tokens_per_step": bench.tokens_per_step, "rows": rows, "trl_versions": trl_versions})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("train", __doc__, "frontier")
    parser.add_argument("--repeats", type=int, default=4, help="timed turns of each case")
    parser.add_argument("--turn", type=float, default=2.0, metavar="SECONDS", help="length of a turn, if not one step")
    parser.add_argument("--skip-trl", action="store_true", help="without GKDTrainer, which needs its own environment")
    parser.add_argument("--skip-memory", action="store_true", help="without a process for each case's peak memory")
    parser.add_argument("--peak-of", metavar="CASE", help="only print this case's peak memory")
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
