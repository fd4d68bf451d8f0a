"""What each method and each kind of student buys at equal wall time, and the recipe that combines the best of them.

    make bench-methods          or, quicker:  python -m benchmarks.methods --minutes 0.5 --skip-best

Every row of `METHODS` is the recipe (recipes/frontier.yaml: the quickstart with one cache of the teacher) with other
fields, trained as long as every other: building the cache counts as training in the rows that read it, writing text in
the rows that train on it. Losses compare per token where the tokens are the same, and per byte everywhere; intervals
are bootstraps over documents. Rows that are there already are kept, so that the command can be stopped and called
again. `best` is recipes/best.yaml, run once with its own lengths.
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
from benchmarks.runs import ROOT, recipe_parser, run_recipe
from distill.command import guarded
from distill.config import UserError
from distill.recipe import load_recipe
from eval.agreement import main as agreement
from eval.command import read_results

RECIPE, BEST = ROOT / "recipes" / "frontier.yaml", ROOT / "recipes" / "best.yaml"
FROZEN = ["embedding", "head"]
Stage = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """Fields of the recipe, and stages with their shares of the time."""

    stages: tuple[tuple[float, Stage], ...]
    fields: tuple[str, ...] = ()
    live: bool = False  # the teacher answers itself, no cache is built

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


def mixed(term: str, **fields: Any) -> tuple[tuple[float, Stage], ...]:
    """Text first, then half of a divergence and half of cross-entropy."""
    return (0.55, text()), (0.45, taught({term: 0.5, "cross_entropy": 0.5}, **fields))


KL = mixed("forward_kl")
WHOLE = {"candidates": None}  # over the whole vocabulary, which some methods need
METHODS: dict[str, Method] = {
    "random weights, cross-entropy": Method(((1.0, text(freeze=[])),), ("student.transplant=false",)),
    "transplanted, cross-entropy": Method(((1.0, text()),)),
    "forward KL": Method(KL),
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
    "text written by the teacher beside": Method(KL, ("writing={documents: 400, prompt_tokens: 8, max_tokens: 160}",)),
    "GRU": Method(KL, ("student.cell=gru",)),
    "layer-normalised LSTM": Method(KL, ("student.cell=ln_lstm",)),
    "attention to 64 positions": Method(KL, ("student.attention_window=64",)),
    "feed-forward blocks": Method(KL, ("student.feed_forward_size=1024",)),
    "feed-forward blocks of the teacher": Method(
        KL, ("student.feed_forward_size=1024", "student.feed_forward_from=teacher")
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
COLUMNS = ("nll_nats", "bits_per_byte", "kl_to_teacher_nats", "top1_agreement", "overlap", "ece", "tokens_per_second")


def measure(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """A run's figures; agreement is measured where the student has the teacher's tokens."""
    student = result["student"]
    row = {name: student.get(name) for name in ("nll_nats", "bits_per_byte", "parameters", "train_seconds")}
    row["tokens_per_second"] = student["tokens_trained"] / student["train_seconds"]
    row["teacher_share"] = student["teacher_seconds"] / student["train_seconds"]
    row["writing_share"] = student.get("writing_seconds", 0.0) / student["train_seconds"]
    if student.get("kl_to_teacher_nats") is None:
        return row
    if read_results(folder, "agreement") is None and agreement([str(folder)]):
        raise UserError(f"eval.agreement {folder}: failed, as said above")
    found = (read_results(folder, "agreement") or {"models": {}})["models"]["student"]
    names = ("kl_to_teacher_nats", "kl_to_teacher_nats_interval", "overlap", "overlap_interval", "top1_agreement")
    return row | {name: found[name] for name in names} | {"ece": found["calibration"]["expected_calibration_error"]}


def benchmark(options: argparse.Namespace) -> None:
    """Run what is missing, then the table."""
    parent = FOLDER.resolve() / "methods"
    cached = load_recipe(options.recipe, options.overrides).targets.cache
    rows: dict[str, list[dict[str, Any]]] = {}
    teacher: dict[str, Any] = {}
    for name, method in METHODS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        rows[name] = []
        for seed in options.seeds:
            run = f"{slug}-{seed}"
            given = ["control=false", f"run.seed={seed}", f"evaluation.every.minutes={options.minutes / 4}"]
            given += [*method.overrides(options.minutes, cached), *options.overrides]
            result = run_recipe("methods", run, options.recipe, given)
            teacher = teacher or result["teacher"]
            rows[name].append(measure(parent / run, result))
    best = None
    if not options.skip_best:
        result = run_recipe("methods", "best", str(BEST), options.overrides)
        teacher = teacher or result["teacher"]
        best = measure(parent / "best", result)
        rows["recipes/best.yaml"] = [best]
    medians = {name: {key: _median(found, key) for key in COLUMNS} for name, found in rows.items()}
    table = [
        {
            "method": name,
            "nats": _cell(row["nll_nats"], 3),
            "bits/byte": _cell(row["bits_per_byte"], 3),
            "KL": _interval(rows[name], "kl_to_teacher_nats"),
            "top-1": _cell(row["top1_agreement"], 3),
            "overlap": _interval(rows[name], "overlap"),
            "ECE": _cell(row["ece"], 3),
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "teacher, writing": f"{rows[name][0]['teacher_share']:.0%}, {rows[name][0]['writing_share']:.0%}",
        }
        for name, row in medians.items()
    ]
    print_table(
        f"Methods and students: {options.minutes:g} minutes of training each, seeds: {len(options.seeds)}",
        table,
        f"teacher: {teacher['nll_nats']:.3f} nats, {teacher['bits_per_byte']:.3f} bits/byte. In brackets the 95 % "
        "interval over documents, of the first seed. teacher, writing: their shares of the training time.",
    )
    figures: dict[str, Any] = {"teacher": teacher, "minutes": options.minutes, "rows": rows, "medians": medians}
    if best:
        figures |= {
            "best.nll_gap_to_teacher_nats": best["nll_nats"] - teacher["nll_nats"],
            **{f"best.{name}": best.get(name) for name in ("top1_agreement", "overlap", "ece", "parameters")},
        }
    finish("methods", figures)


def _median(found: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in found if row.get(key) is not None]
    return statistics.median(values) if values else None


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(found: Sequence[dict[str, Any]], key: str) -> str:
    middle, interval = _median(found, key), found[0].get(f"{key}_interval")
    return _cell(middle, 3) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("methods", __doc__)
    parser.set_defaults(recipe=str(RECIPE))
    parser.add_argument("--minutes", type=float, default=1.0, help="training time of each method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="methods whose name contains one of these")
    parser.add_argument("--skip-best", action="store_true", help="without recipes/best.yaml, which takes an hour")
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
