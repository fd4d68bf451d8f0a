"""What distillation buys at equal wall time: validation loss against seconds, for several ways to train one LSTM.

    make bench-quality          or, quicker:  python -m benchmarks.quality --seeds 0 --long 0

Every way has the quickstart's teacher, text and LSTM, and as many seconds of training as *ours*, the teacher's time and
the building of cached targets counted in; those from random weights have the control's learning rate:

    ours                     the recipe as it is
    control                  cross-entropy from random weights, the run's own control
    control, sampled         the same over candidates (`control.candidates`), which is cheaper
    KL, random weights       forward KL to the live teacher over the whole vocabulary, no transplant

The short ones are run once for each seed, the sampled control with the first alone; the long one has one seed, twice
the time, and ours and its control alone. Ratios compare medians over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import FOLDER, finish, print_table
from benchmarks.runs import candidates_of, recipe_parser, run_recipe
from distill.checkpoint import write_atomically
from distill.command import guarded
from distill.recipe import load_recipe
from distill.result import Points, best_point, first_crossing

EVERY = 0.25  # minutes between validations, whose time does not count: the time to a loss is read off the curve
WAYS = ("ours", "control", "control, sampled", "KL, random weights")


def compare(name: str, recipe: str, overrides: Sequence[str], seed: int, ways: Sequence[str]) -> dict[str, Any]:
    """Curves with one seed, and what follows: of ours, its control, and those of the other `ways`."""
    common = [f"evaluation.every.minutes={EVERY}", *overrides, f"run.seed={seed}"]
    candidates, learning_rate = candidates_of(recipe, common), load_recipe(recipe, common).control.learning_rate
    ours = run_recipe("quality", f"{name}-{seed}-ours", recipe, [*common, "control.candidates=null"])
    minutes = ours["student"]["train_seconds"] / 60
    curves: dict[str, Points] = {"ours": ours["curves"]["student"], "control": ours["curves"]["control"]}
    random = [*common, "control=false", "student.transplant=false", "targets.cache=false", "targets.max_tokens=null"]
    further = (("control, sampled", "cross_entropy", candidates), ("KL, random weights", "forward_kl", None))
    for way, objective, drawn in further:
        if way not in ways:
            continue
        stage = {
            "objective": objective, "length": {"minutes": minutes}, "candidates": drawn,
            "learning_rate": learning_rate,
        }  # fmt: skip
        slug = way.split()[-1] if "sampled" in way else "kl"
        result = run_recipe("quality", f"{name}-{seed}-{slug}", recipe, [*random, f"stages=[{json.dumps(stage)}]"])
        curves[way] = result["curves"]["student"]
    teacher = ours["teacher"]["nll_nats"]
    best = {way: best_point(points)["nll_nats"] for way, points in curves.items()}
    seconds = {way: first_crossing(points, best["control"]) for way, points in curves.items()}
    control_seconds = best_point(curves["control"])["seconds"]
    return {
        "seed": seed,
        "seconds": minutes * 60,
        "teacher_seconds": ours["student"]["teacher_seconds"],
        "teacher_nll_nats": teacher,
        "nll_nats": best,
        "wall_time_ratio": {way: None if s is None else s / control_seconds for way, s in seconds.items()},
        "gap_closed": {way: (best["control"] - loss) / (best["control"] - teacher) for way, loss in best.items()},
        "curves": curves,
    }


def median(values: Sequence[float | None]) -> float | None:
    """None where any value is missing."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if len(found) == len(values) else None


def plot(groups: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """Loss over seconds, a panel for each length; thin lines are seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(groups), 4), layout="constrained")
    for panel, (name, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for number, way in enumerate(WAYS):
            for row in rows:
                points = row["curves"].get(way, [])
                label = way if points and row is rows[0] else None
                panel.plot([p["seconds"] for p in points], [p["nll_nats"] for p in points], f"C{number}.-", label=label)
        panel.axhline(rows[0]["teacher_nll_nats"], color="gray", linestyle=":", label="teacher")
        panel.set(
            title=name, xlabel="seconds of training, teacher's included", ylabel="validation loss (nats per token)"
        )
        panel.legend()
    write_atomically(target, lambda path: figure.savefig(path, dpi=110, format="png"))


def benchmark(options: argparse.Namespace) -> None:
    """Run what is missing, then report."""
    groups = {
        "short": [
            compare("short", options.recipe, options.overrides, seed, WAYS if number == 0 else (*WAYS[:2], WAYS[3]))
            for number, seed in enumerate(options.seeds)
        ]
    }
    if options.long:
        recipe = load_recipe(options.recipe, options.overrides)
        scale = options.long / sum(stage.length.minutes or 0 for stage in recipe.stages)
        lengths = [f"stages.{n}.length.minutes={(s.length.minutes or 0) * scale}" for n, s in enumerate(recipe.stages)]
        overrides = [*options.overrides, *lengths]
        groups["long"] = [compare("long", options.recipe, overrides, options.seeds[0], WAYS[:2])]
    picture = FOLDER / "quality.png"
    plot(groups, picture)
    rows, figures = [], {}
    for name, found in groups.items():
        table: dict[str, dict[str, Any]] = {
            way: {
                key: median([row[key][way] for row in found if way in row[key]])
                for key in ("nll_nats", "wall_time_ratio", "gap_closed")
            }
            for way in WAYS
            if way in found[0]["curves"]
        }
        figures[name] = {**table, "seeds": len(found), "seconds": found[0]["seconds"]}
        figures[name]["teacher_seconds"] = found[0]["teacher_seconds"]
        for way, cells in table.items():
            ratio = cells["wall_time_ratio"]
            rows.append(
                {
                    "way": way,
                    "run": f"{name}, {found[0]['seconds']:.0f} s, seeds: {sum(way in row['curves'] for row in found)}",
                    "nats": f"{cells['nll_nats']:.3f}",
                    "of the control's time to its loss": "never" if ratio is None else f"{ratio:.2f}",
                    "of the gap to the teacher closed": f"{cells['gap_closed']:.2f}",
                }
            )
    print_table("Validation loss at equal wall time", rows, f"Curves: {picture}")
    last = groups.get("long", groups["short"])
    finish(
        "quality",
        {
            "wall_time_ratio_to_control_loss": figures["short"]["ours"]["wall_time_ratio"],
            "gap_closed": max(figures[name]["ours"]["gap_closed"] for name in groups),
            "teacher_nll_nats": last[0]["teacher_nll_nats"],
            **figures,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("quality", __doc__, "quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--long", type=float, default=6.4, help="minutes of the long one's stages; 0 for none")
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
