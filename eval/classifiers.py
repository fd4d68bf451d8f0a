"""What a report says of classifiers: how often each is right, and how long it takes for a text.

All of it stands in the runs' results: nothing is left to be measured. A run may fine-tune a teacher of its own, so each
has its point. Runs of other texts or other classes do not compare, and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config import UserError
from distill.result import read_result
from eval.command import Figures, run_labels
from eval.gather import ROLES, Points, common_prefix, mark_dominated

AXES: Figures = {
    "speed": {"figure": "texts_per_second", "title": "texts a second (batch 1)"},
    "quality": {"figure": "accuracy", "title": "accuracy", "more_is_better": True},
}


def gather_classifiers(folders: Sequence[Path]) -> Figures:
    """What `report.json` holds of classifiers; UserError for runs of other texts or classes."""
    runs = {label: read_result(folder) for folder, label in run_labels(folders).items()}
    (first, one), *others = runs.items()
    for label, other in others:
        for what, mine, theirs in (
            ("texts", one["corpus"]["fingerprint"], other["corpus"]["fingerprint"]),
            ("classes", one["classes"], other["classes"]),
        ):
            if mine != theirs:
                raise UserError(
                    f"{first} and {label} were tested on other {what}, {mine} and {theirs}: report them apart"
                )
    points = [point for label, result in runs.items() for point in _points(label, result, alone=len(runs) == 1)]
    mark_dominated(points, AXES)
    return {
        "kind": "classifiers",
        "axes": AXES,
        "sentence": sentence(points),
        "runs": list(runs),
        "prefix": common_prefix(list(runs)),
        "corpus": f"{one['student']['texts']:,} test texts of {len(one['classes'])} classes",
        "notes": [
            f"The most frequent class alone is right in {one['majority_accuracy']:.1%}.",
            *(["Times were not all measured in one go: compare them with caution."] if others else []),
        ],
        "points": points,
        "models": [],
        "curves": {label: result["curves"] for label, result in runs.items()},
        "curve_axis": {"figure": "accuracy", "title": "validation accuracy", "teacher": one["teacher"]["accuracy"]},
        "by_context": [],
        "recall": [],
        "latency_by_context": [],
        "samples": [],
        "machine": None,
        "versions": one["versions"],
    }


def _points(label: str, result: Figures, alone: bool) -> Points:
    """Teacher, student and control of a run."""
    points = []
    for role in filter(result.__contains__, ROLES):
        figures = result[role]
        keys = ("accuracy", "accuracy_interval", "nll_nats", "parameters", "weight_bytes", "latency_ms_p50", "texts")
        name = role if alone and role == "teacher" else f"{label} {role}"
        point: dict[str, Any] = {"name": name, "model": name, "role": role, "runtime": "PyTorch"}
        point |= {key: figures[key] for key in keys}
        point |= {key: figures.get(key) for key in ("latency_ms_p95", "top1_agreement", "kl_to_teacher_nats")}
        point["texts_per_second"] = 1000 / figures["latency_ms_p50"]
        low, high = figures["accuracy_interval"]
        agreement = "" if role == "teacher" else f"agrees with the teacher on {figures['top1_agreement']:.1%}, "
        point["details"] = [
            f"right on {figures['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            f"{agreement}{figures['latency_ms_p50']:.2f} ms a text",
            f"{figures['parameters'] / 1e6:.1f} M parameters, {figures['weight_bytes'] / 2**20:,.0f} MiB",
        ]
        points.append(point)
    return points


def sentence(points: Points) -> str:
    """What the points show, in words: the student that is right most often, its teacher and its control."""
    best = max((point for point in points if point["role"] == "student"), key=lambda point: point["accuracy"])
    at = points.index(best)
    teacher = next(point for point in reversed(points[:at]) if point["role"] == "teacher")
    control = next((point for point in points[at + 1 : at + 2] if point["role"] == "control"), None)
    share = teacher["latency_ms_p50"] / best["latency_ms_p50"]
    said = (
        f"The {best['parameters'] / 1e6:.1f} M student ({best['name']}) is right on {best['accuracy']:.0%} of "
        f"{best['texts']:,} texts where its teacher is right on {teacher['accuracy']:.0%}, agrees with it on "
        f"{best['top1_agreement']:.0%}, and takes 1/{share:.1f} of its time "
        f"({best['latency_ms_p50']:.2f} against {teacher['latency_ms_p50']:.1f} ms a text)"
    )
    if control is None:
        return f"{said}."
    return f"{said}; the same student, trained on the labels alone, is right on {control['accuracy']:.0%}."
