"""What each method and each kind of student buys at equal wall time, and the recipe that combines the best of them.

    make bench-methods          or, in half an hour:  python -m benchmarks.methods --total 30 --skip-best

Every row of `METHODS` is the recipe (recipes/frontier.yaml: the quickstart's models and text, in blocks of 128 and with
a cache of the teacher, here of fewer tokens) with other fields. The cache is built once. The wall time of all rows is
the same: those that read the cache train as long as its building left them, those that do not train so much longer, and
where the teacher writes text that is counted in. `s` in the table is what it came to. `--total` is what the whole
command may take; what is left of it beside the cache and `best` is divided among the rows, so that a slower machine
trains each for a shorter time, and the table says for how long. `--minutes` says it instead.

Losses compare per token where the tokens are the same, and per byte everywhere; intervals are bootstraps over
documents, and the two rows that others are compared with have three seeds, which show what a seed changes. Rows that
are there already are kept, so that the command can be stopped and called again with the same options. `best` is
recipes/best.yaml, run once with its own lengths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import FOLDER, finish, print_table
from benchmarks.runs import RECIPES, recipe_parser, run_recipe, run_tool
from distill.command import guarded
from distill.config import UserError
from distill.recipe import load_recipe
from eval.agreement import main as agreement
from eval.command import read_results

BEST = RECIPES / "best.yaml"
CACHE = "targets.max_tokens=40000"  # a third of a minute, and more than half a minute of soft targets reads
BEST_MINUTES = 60.0  # recipes/best.yaml, cache included
OVERHEAD_MINUTES = 0.75  # of a run: start, loading, validation, decoding, result, and its share of eval.agreement
LEAST_MINUTES = 0.15
LITTLE = ("evaluation.new_tokens=1", "evaluation.prompts=[The]", "evaluation.decode_seconds=0.1")
FROZEN = ["embedding", "head"]
Stage = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """Fields of the recipe, and stages with their shares of the time."""

    stages: tuple[tuple[float, Stage], ...]
    fields: tuple[str, ...] = ()
    live: bool = False  # the teacher answers itself, no cache is read
    seeds: int = 1

    def overrides(self, minutes: float, cached: bool) -> list[str]:
        """Words of the command line; `cached`: whether the recipe has a cache."""
        stages = [{**stage, "length": {"minutes": share * minutes}} for share, stage in self.stages]
        off = ["targets.cache=false", "targets.max_tokens=null"] if cached and self.without_cache else []
        return [f"stages={json.dumps(stages)}", *off, *self.fields]

    @property
    def without_cache(self) -> bool:
        """Nothing would be read from one."""
        return self.live or all(stage["objective"] == "cross_entropy" for _, stage in self.stages)


def text(**fields: Any) -> Stage:
    """Cross-entropy over candidates, with the teacher's embedding and head at rest."""
    return {"objective": "cross_entropy", "candidates": 4096, "freeze": FROZEN, "learning_rate": 5e-3,
            "schedule": "wsd", **fields}  # fmt: skip


def taught(objective: Any, **fields: Any) -> Stage:
    """What follows the text: a smaller learning rate."""
    return {"objective": objective, "candidates": 4096, "freeze": FROZEN, "learning_rate": 1.5e-3, **fields}


def mixed(term: str, text_rate: float = 5e-3, **fields: Any) -> tuple[tuple[float, Stage], ...]:
    """Text first, at a learning rate, then half of a divergence and half of cross-entropy."""
    return (0.55, text(learning_rate=text_rate)), (0.45, taught({term: 0.5, "cross_entropy": 0.5}, **fields))


KL = mixed("forward_kl")
WHOLE: Stage = {"candidates": None}  # over the whole vocabulary, which some methods need
METHODS: dict[str, Method] = {
    "random weights, cross-entropy": Method(((1.0, text(freeze=[])),), ("student.transplant=false",)),
    "transplanted, cross-entropy": Method(((1.0, text()),), seeds=3),
    "forward KL": Method(KL, seeds=3),
    "forward KL, live teacher": Method(KL, live=True),
    "forward KL alone": Method(((1.0, taught("forward_kl", learning_rate=5e-3, schedule="wsd")),)),
    "reverse KL": Method(mixed("reverse_kl")),
    "Jensen-Shannon": Method(mixed("jsd")),
    "total variation": Method(mixed("total_variation")),
    "skewed forward KL": Method(mixed("skewed_forward_kl")),
    "skewed reverse KL": Method(mixed("skewed_reverse_kl")),
    "hidden regression, Fisher": Method(
        ((0.3, taught("hidden_mse", metric="fisher", candidates=None, learning_rate=5e-3)), (0.25, text()), *KL[1:])
    ),
    "forward KL, whole vocabulary": Method(mixed("forward_kl", **WHOLE)),
    "weighted by the teacher's entropy": Method(mixed("forward_kl", token_weights="teacher_entropy", **WHOLE)),
    "weighted by its confidence": Method(mixed("forward_kl", token_weights="teacher_confidence", **WHOLE)),
    "temperature from 2 to 1": Method(mixed("forward_kl", temperature={"from": 2, "to": 1}, **WHOLE)),
    "mixture from KL to text": Method(
        ((0.55, text()), (0.45, taught({"forward_kl": {"from": 0.9, "to": 0.1},
                                        "cross_entropy": {"from": 0.1, "to": 0.9}}))),
    ),  # fmt: skip
    "on-policy, half of the lanes": Method(mixed("reverse_kl", student_written=0.5, **WHOLE), live=True),
    "text written by the teacher beside, cross-entropy": Method(
        ((1.0, text()),), ("writing={documents: 96, prompt_tokens: 8, max_tokens: 96}",)
    ),
    "regression layer by layer, live teacher": Method(
        ((0.3, taught("layer_mse", candidates=None, learning_rate=5e-3)), (0.7, text())),
        live=True,
    ),
    "GRU": Method(KL, ("student.cell=gru",)),
    "layer-normalised LSTM": Method(KL, ("student.cell=ln_lstm",)),
    "attention to 64 positions": Method(KL, ("student.attention_window=64",)),
    "feed-forward blocks": Method(mixed("forward_kl", 2e-3), ("student.feed_forward_size=1024",)),
    "feed-forward blocks of the teacher": Method(
        mixed("forward_kl", 1e-3), ("student.feed_forward_size=1024", "student.feed_forward_from=teacher")
    ),
    "AWD regularisers": Method(
        KL,
        ("student.recurrent_dropout=0.2", "student.output_dropout=0.1", "student.variational_dropout=true",
         "student.activation_penalty=0.1", "student.temporal_activation_penalty=0.1"),
    ),  # fmt: skip
    "own tokenizer of 8,192": Method(
        ((0.55, text(candidates=None, freeze=[])),
         (0.45, taught({"forward_kl": 0.5, "cross_entropy": 0.5}, candidates=None, freeze=[]))),
        ("student.vocabulary_size=8192", "targets.signal=top_k"), live=True,
    ),  # fmt: skip
}  # fmt: skip
COLUMNS = (
    "nll_nats", "bits_per_byte", "kl_to_teacher_nats", "top1_agreement", "overlap", "ece", "tokens_per_second",
    "train_seconds",
)  # fmt: skip


def measure(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """A run's figures; agreement was measured where the student has the teacher's tokens."""
    student = result["student"]
    row = {name: student.get(name) for name in ("nll_nats", "bits_per_byte", "parameters", "train_seconds")}
    row["tokens_per_second"] = student["tokens_trained"] / student["train_seconds"]
    row["teacher_share"] = student["teacher_seconds"] / student["train_seconds"]
    row["writing_share"] = student.get("writing_seconds", 0.0) / student["train_seconds"]
    if (agreed := read_results(folder, "agreement")) is None:
        return row
    found = agreed["models"]["student"]
    names = ("kl_to_teacher_nats", "kl_to_teacher_nats_interval", "overlap", "overlap_interval", "top1_agreement")
    return row | {name: found[name] for name in names} | {"ece": found["calibration"]["expected_calibration_error"]}


def measure_agreement(results: dict[Path, dict[str, Any]]) -> None:
    """Of all runs at once, so that the teacher reads the text once; a student with other tokens has none."""
    missing = [
        str(folder)
        for folder, result in results.items()
        if result["student"].get("kl_to_teacher_nats") is not None and read_results(folder, "agreement") is None
    ]
    if missing and agreement(missing):
        raise UserError("eval.agreement: failed, as said above")


def minutes_each(total: float, runs: int, longer: int, cache: float) -> float:
    """Training time of each of `runs`, of which `longer` do without the cache and have its minutes besides."""
    found = (total - cache * (1 + longer)) / runs - OVERHEAD_MINUTES
    if found < LEAST_MINUTES:
        least = cache * (1 + longer) + runs * (LEAST_MINUTES + OVERHEAD_MINUTES)
        raise UserError(
            f"--total: expected at least {least:.0f} minutes besides recipes/best.yaml's for {runs} runs on this "
            f"machine, found {total:g}; raise it, or choose rows with --only, or --skip-best"
        )
    return round(found, 2)


def wall_minutes(result: dict[str, Any]) -> float:
    """All of a run, with what building its cache took where that was found built, or had been begun before."""
    wall = result["wall_seconds"]
    built = max(wall.get("targets", 0.0), result.get("targets", {}).get("seconds", 0.0))
    return (sum(wall.values()) - wall.get("targets", 0.0) + built) / 60


def benchmark(options: argparse.Namespace) -> None:
    """Run what is missing, then the table."""
    given = [CACHE, "control=false", *options.overrides]
    cached = load_recipe(options.recipe, given).targets.cache
    if not options.skip_best:
        load_recipe(str(BEST), options.overrides)  # before hours of other rows
    chosen = {
        name: method
        for name, method in METHODS.items()
        if not options.only or any(word in name for word in options.only)
    }
    if options.only and not chosen and options.only != ["best"]:
        raise UserError(f"--only: expected best, or words of {', '.join(METHODS)}; found {' '.join(options.only)}")
    seeds = {name: range(options.seeds or method.seeds) for name, method in chosen.items()}
    longer = [name for name, method in chosen.items() if cached and method.without_cache]
    cache = run_tool("distill.cache", options.recipe, given)["seconds"] / 60 if len(longer) < len(chosen) else 0.0
    minutes = options.minutes or 0.0
    if chosen and not minutes:
        minutes = minutes_each(
            options.total - (0 if options.skip_best else BEST_MINUTES),
            sum(map(len, seeds.values())), sum(len(seeds[name]) for name in longer), cache,
        )  # fmt: skip

    parent = FOLDER.resolve() / "methods"
    results: dict[Path, dict[str, Any]] = {}
    folders: dict[str, list[Path]] = {}
    for name, method in chosen.items():
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        own = minutes + (cache if name in longer else 0.0)
        if any(field.startswith("writing=") for field in method.fields):
            words = [*given, *method.overrides(own, cached), *options.overrides]
            written = run_tool("distill.write", options.recipe, words)["seconds"] / 60
            own = max(own - written, LEAST_MINUTES)
        for seed in seeds[name]:
            run = f"{slug}-{minutes:g}-{seed}"
            words = [*given, f"run.seed={seed}", f"evaluation.every.minutes={own:.4f}", *LITTLE]
            words += [*method.overrides(own, cached), *options.overrides]
            folder = parent / run
            results[folder] = run_recipe("methods", run, options.recipe, words)
            folders.setdefault(name, []).append(folder)
    teacher = next(iter(results.values()))["teacher"] if results else {}
    best: dict[str, Any] = {}
    if not options.skip_best:
        folders["recipes/best.yaml"] = [parent / "best"]
        best = results[parent / "best"] = run_recipe("methods", "best", str(BEST), options.overrides)
        teacher = teacher or best["teacher"]
    measure_agreement(results)

    rows = {name: [measure(folder, results[folder]) for folder in found] for name, found in folders.items()}
    medians = {name: {key: _median(found, key) for key in COLUMNS} for name, found in rows.items()}
    table = [
        {
            "method": name + (f" (median of {len(rows[name])} seeds)" if len(rows[name]) > 1 else ""),
            "nats": _cell(row["nll_nats"], 3) + _spread(rows[name]),
            "bits/byte": _cell(row["bits_per_byte"], 3),
            "KL": _interval(rows[name], "kl_to_teacher_nats"),
            "top-1": _cell(row["top1_agreement"], 3),
            "overlap": _interval(rows[name], "overlap"),
            "ECE": _cell(row["ece"], 3),
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "s": _cell(row["train_seconds"], 0),
            "teacher, writing": f"{rows[name][0]['teacher_share']:.0%}, {rows[name][0]['writing_share']:.0%}",
        }
        for name, row in medians.items()
    ]
    print_table(
        f"Methods and students: {60 * (minutes + cache):.0f} s each, of which the cache, where it is read, took "
        f"{60 * cache:.0f}",
        table,
        f"teacher: {teacher['nll_nats']:.3f} nats, {teacher['bits_per_byte']:.3f} bits/byte. In brackets the 95 % "
        "interval over documents, of the first seed; ± half the range of the seeds. teacher, writing: their shares of "
        "the training time.",
    )
    figures: dict[str, Any] = {"teacher": teacher, "minutes": minutes, "cache_minutes": cache, "rows": rows}
    figures["medians"] = medians
    if best:
        found = rows["recipes/best.yaml"][0]
        figures |= {
            "best.nll_gap_to_teacher_nats": found["nll_nats"] - best["teacher"]["nll_nats"],
            **{f"best.{name}": found.get(name) for name in ("top1_agreement", "overlap", "ece", "parameters")},
            "best.wall_minutes": wall_minutes(best),
        }
    finish("methods", figures)


def _spread(found: Sequence[dict[str, Any]]) -> str:
    """What another seed changes."""
    values = [row["nll_nats"] for row in found]
    return f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""


def _median(found: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in found if row.get(key) is not None]
    return statistics.median(values) if values else None


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(found: Sequence[dict[str, Any]], key: str) -> str:
    middle, interval = _median(found, key), found[0].get(f"{key}_interval")
    return _cell(middle, 3) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("methods", __doc__, "frontier")
    parser.add_argument("--total", type=float, default=90.0, help="minutes that all of it may take (90)")
    parser.add_argument("--minutes", type=float, help="training time of each row, instead of what --total leaves")
    parser.add_argument("--seeds", type=int, help="of each row (one; three of the two rows to compare with)")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="methods with one of these in their names (best: none)"
    )
    parser.add_argument("--skip-best", action="store_true", help="without recipes/best.yaml, which takes an hour")
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
