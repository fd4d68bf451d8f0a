"""The result of a run: what distillation gained, as `result.json`, a table and a picture of the curves."""

from __future__ import annotations

import json
import logging
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.markup import escape

from distill.checkpoint import write_atomically
from distill.config import UserError
from distill.output import print_table
from distill.sealed import changed, check, read_sealed

logger = logging.getLogger(__name__)
Points = list[dict[str, Any]]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]


class _Checked(BaseModel):
    """What readers of a result rely on; there may be more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Figures(_Checked):
    perplexity: Finite
    bits_per_byte: Finite
    nll_nats: Finite
    parameters: Count
    weight_bytes: Count
    tokens: Count
    decode_tokens_per_second: Finite | None
    kl_to_teacher_nats: Finite | None = None
    top1_agreement: Finite | None = None


class _Teacher(_Figures):
    model: str


class _Control(_Figures):
    match: str


class _Point(_Checked):
    tokens: Count
    seconds: Finite
    nll_nats: Finite


class _Sample(_Checked):
    prompt: str
    greedy: str
    sampled: str


class _Corpus(_Checked):
    fingerprint: str
    train_tokens: Count
    train_documents: Count


class _Result(_Checked):
    name: str
    teacher: _Teacher
    student: _Figures
    control: _Control | None = None
    distillation_gain_nats: Finite | None = None
    time_to_control_loss: Finite | None = None
    samples: list[_Sample]
    curves: dict[str, list[_Point]]
    corpus: _Corpus
    targets: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, str]] = {}

    @model_validator(mode="after")
    def _compared_with_the_control(self) -> Self:
        if self.control and (
            self.distillation_gain_nats is None or "time_to_control_loss" not in self.model_fields_set
        ):
            raise ValueError("distillation_gain_nats and time_to_control_loss: expected beside the control's figures")
        return self


class _Accuracy(_Checked):
    accuracy: Finite
    accuracy_interval: Interval
    nll_nats: Finite
    texts: Count
    parameters: Count
    weight_bytes: Count
    latency_ms_p50: Finite
    top1_agreement: Finite | None = None


class _ClassifyingTeacher(_Accuracy):
    model: str


class _ClassifyingControl(_Accuracy):
    match: str


class _LabelledCorpus(_Checked):
    fingerprint: str
    train_texts: Count


class _ClassificationResult(_Checked):
    name: str
    teacher: _ClassifyingTeacher
    student: _Accuracy
    control: _ClassifyingControl | None = None
    accuracy_gain: Finite | None = None
    accuracy_gain_interval: Interval | None = None
    speedup: Finite
    majority_accuracy: Finite
    classes: list[str]
    curves: dict[str, list[_Point]]
    corpus: _LabelledCorpus
    targets: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, str]] = {}

    @model_validator(mode="after")
    def _compared_with_the_control(self) -> Self:
        if self.control and (self.accuracy_gain is None or self.accuracy_gain_interval is None):
            raise ValueError("accuracy_gain and accuracy_gain_interval: expected beside the control's figures")
        return self


def is_classification(result: dict[str, Any]) -> bool:
    """Whether a result is that of a classifier."""
    return result.get("task") == "classification"


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a finished run; UserError where there is none, or it is damaged."""
    file = folder / "result.json"
    try:
        result = read_sealed(file)
        check(result, _ClassificationResult if is_classification(result) else _Result)
    except FileNotFoundError:
        raise UserError(f"{folder}: expected a finished run with its result.json, found none") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: expected the result of a run, found it damaged ({error}); delete it and run the recipe again, "
            "which goes on from the last checkpoint"
        ) from None
    return result


def check_files(folder: Path, result: dict[str, Any]) -> None:
    """Compare student and control with what the run has written.

    UserError for weights, and for files that cannot be read; a warning for others, which may have been edited, and
    for logs, which nothing can write again.
    """
    for name, expected in result.get("files", {}).items():
        for file in changed(folder / name, expected):
            path = folder / name / file
            if path.suffix != ".jsonl" and (path.suffix == ".safetensors" or not _is_readable(path)):
                raise UserError(
                    f"{path}: is missing or damaged since the run was finished; delete {folder / 'result.json'} and "
                    "run the recipe again, which writes it anew from the last checkpoint"
                )
            logger.warning("%s: is missing or not what the run has written; unless you did that, it is damaged", path)


def _is_readable(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        return "\0" not in text and (path.suffix != ".json" or isinstance(json.loads(text), dict | list))
    except (OSError, ValueError, RecursionError):
        return False


def compare(student: Points, control: Points) -> dict[str, Any]:
    """What distillation gained over the control, from the validation curves of both.

    `distillation_gain_nats`: the loss of the control's kept weights minus that of the student's.
    `time_to_control_loss`: training seconds until the student's curve was first at or below the control's loss, over
    the seconds the control needed for it; None if it never was. `at_equal_tokens`: both losses at the largest number
    of tokens that both curves reach, linearly interpolated between validations.
    """
    best_control, best_student = best_point(control), best_point(student)
    reached = first_crossing(student, best_control["nll_nats"])
    tokens = min(student[-1]["tokens"], control[-1]["tokens"])
    at_tokens = {
        name: float(np.interp(tokens, [p["tokens"] for p in points], [p["nll_nats"] for p in points]))
        for name, points in (("student", student), ("control", control))
    }
    return {
        "distillation_gain_nats": best_control["nll_nats"] - best_student["nll_nats"],
        "time_to_control_loss": None if reached is None else reached / best_control["seconds"],
        "at_equal_tokens": {
            "tokens": tokens,
            **{f"{name}_nll_nats": value for name, value in at_tokens.items()},
        },
    }


def best_point(points: Points) -> dict[str, Any]:
    """The validation whose weights were kept: of the last stage's, the one with the least loss."""
    last = points[-1]["stage"]
    return min((point for point in points if point["stage"] == last), key=lambda point: point["nll_nats"])


def first_crossing(points: Points, target: float) -> float | None:
    """Seconds at which a curve first falls to `target`, linearly interpolated between validations."""
    before: dict[str, Any] | None = None
    for point in points:
        if point["nll_nats"] <= target:
            if before is None:
                return point["seconds"]
            share = (before["nll_nats"] - target) / (before["nll_nats"] - point["nll_nats"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("potstill", "torch", "transformers", "accelerate", "datasets", "wandb"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            from distill import __version__

            found[name] = __version__ if name == "potstill" else "not installed"
    return found


def table_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The short table: teacher, student, control."""
    rows = _classifier_row if is_classification(result) else _language_model_row
    return [rows(name, result[name]) for name in ("teacher", "student", "control") if name in result]


def _language_model_row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """`KL` is KL(teacher || model) in nats a token, `top-1` the share of tokens whose likeliest continuation is the
    teacher's, `tok/s` the speed of greedy decoding at batch 1.
    """
    agreement, kl = figures.get("top1_agreement"), figures.get("kl_to_teacher_nats")
    speed = figures["decode_tokens_per_second"]
    return {
        "model": name,
        "ppl": f"{figures['perplexity']:.1f}",
        "bits/byte": f"{figures['bits_per_byte']:.3f}",
        "nats": f"{figures['nll_nats']:.3f}",
        "KL": "–" if kl is None else f"{kl:.3f}",
        "top-1": "–" if agreement is None else f"{agreement:.3f}",
        **_size(figures),
        "tok/s": "–" if speed is None else f"{speed:.0f}",
    }


def _classifier_row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """`agreement` is the share of texts that get the teacher's class, `ms` the median time for one text at batch 1."""
    low, high = figures["accuracy_interval"]
    agreement = figures.get("top1_agreement")
    return {
        "model": name,
        "accuracy": f"{figures['accuracy']:.3f}",
        "95 %": f"{low:.2f}–{high:.2f}",
        "nats": f"{figures['nll_nats']:.3f}",
        "agreement": "–" if agreement is None else f"{agreement:.3f}",
        **_size(figures),
        "ms": f"{figures['latency_ms_p50']:.2f}",
    }


def _size(figures: dict[str, Any]) -> dict[str, str]:
    return {"params": f"{figures['parameters'] / 1e6:.1f} M", "MiB": f"{figures['weight_bytes'] / 2**20:.0f}"}


def print_result(result: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Table, continuations and what distillation gained, for the terminal."""
    console = console or Console()
    if is_classification(result):
        print_table(f"{result['name']}, {result['student']['texts']:,} test texts", table_rows(result), console=console)
        console.print(classification_in_words(result), highlight=False, markup=False)
        console.print(f"Run folder: {folder}", soft_wrap=True, highlight=False, markup=False)
        return
    title = f"{result['name']}, validation on {result['student']['tokens']:,} tokens"
    print_table(title, table_rows(result), console=console)
    if served := result["targets"].get("served"):
        said = f"Soft targets of {served}, served. Teacher, KL and top-1 in the table are of the local teacher."
        console.print(said, markup=False)
    if teachers := result["targets"].get("teachers"):
        said = f"Soft targets of {teachers}, averaged. Teacher, KL and top-1 in the table are of the first."
        console.print(said, markup=False)
    if "tokenizer" in result:
        console.print("Teacher and student have tokenizers of their own: bits/byte compares them, ppl and nats do not.")
    for sample in result["samples"]:
        for kind in ("greedy", "sampled"):
            prompt, text = escape(sample["prompt"]), escape(" ".join(sample[kind].split()))
            console.print(f"[dim]{kind:>8}[/dim] [bold]{prompt}[/bold] {text}", highlight=False)
    if "control" in result:
        gain, ratio = result["distillation_gain_nats"], result["time_to_control_loss"]
        time = "did not reach its loss" if ratio is None else f"reached its loss in {ratio:.0%} of its time"
        same = result["control"]["match"].replace("_", " ")
        console.print(
            f"Distillation gained {gain:+.3f} nats over the control at equal {same}, and {time}.", markup=False
        )
    console.print(f"Run folder: {folder}", soft_wrap=True, highlight=False, markup=False)


def classification_in_words(result: dict[str, Any]) -> str:
    """What a classifier's run has found."""
    said = (
        f"{len(result['classes'])} classes; the most frequent one alone is right in {result['majority_accuracy']:.1%}. "
        f"The student takes 1/{result['speedup']:.1f} of the teacher's time for a text at batch 1."
    )
    if "control" in result:
        low, high = result["accuracy_gain_interval"]
        same = result["control"]["match"].replace("_", " ")
        said += (
            f" Distillation gained {100 * result['accuracy_gain']:+.1f} points of accuracy ({100 * low:+.1f} to "
            f"{100 * high:+.1f}) over the control at equal {same}."
        )
    return said


def plot_curves(result: dict[str, Any], target: Path) -> None:
    """Validation loss, or a classifier's accuracy, of student and control over training time and over tokens, with the
    teacher's as a line: on the same text, but for a classifier's, which is of the test. Loss is per token, or per byte
    where the teacher's tokens are others."""
    from matplotlib.figure import Figure

    figure_of, unit = "nll_nats", "validation loss (nats per token)"
    if is_classification(result):
        figure_of, unit = "accuracy", "validation accuracy"
    elif "tokenizer" in result:
        figure_of, unit = "bits_per_byte", "validation loss (bits per byte)"
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    scales = (
        ("seconds", 1 / 60, "training time (minutes, teacher included)"),
        ("tokens", 1e-3, "training tokens (thousands)"),
    )
    for axis, (key, scale, label) in zip(axes, scales, strict=True):
        for name, colour in (("control", "#c1622d"), ("student", "#1f5fa8")):
            points = result["curves"].get(name)
            if points:
                x, y = [p[key] * scale for p in points], [p[figure_of] for p in points]
                axis.plot(x, y, color=colour, marker="o", markersize=4, label=name)
        axis.axhline(result["teacher"][figure_of], color="#555555", linestyle="--", linewidth=1, label="teacher")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel(unit)
    axes[1].legend(frameon=False, loc="lower right" if is_classification(result) else "upper right")
    figure.suptitle(result["name"], x=0.01, ha="left", fontsize=11)
    write_atomically(target, lambda path: figure.savefig(path, dpi=150, format="png"))
