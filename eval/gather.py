"""What a report says, as data: the figures of many runs brought together, and their frontier of quality against speed.

Quality comes from `eval.perplexity` and `eval.agreement` (else from the run's own result), speed from `eval.latency`
at batch 1 (else from the run's own result, as runtime `generate`). A runtime's last word names its precision: where
that precision has been measured (`--dtype`, `--decoder`), its quality counts, else that of the model as it was trained,
and the point says which. What was measured on different texts, or in different ways, is refused: it would stand on
one axis and not compare. Classifiers are gathered in `eval/classifiers.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.config import UserError
from distill.recipe import load_recipe
from distill.result import read_result
from distill.writing import text_of
from eval.command import Figures, Text, read_results, run_labels

PROTOCOLS = ("perplexity", "agreement", "memory", "latency", "generate", "harness")
PRECISIONS = ("fp32", "bf16", "int8")
ROLES = ("teacher", "student", "control")
AXES: Figures = {
    "speed": {"figure": "tokens_per_second", "title": "tokens a second (batch 1)"},
    "quality": {"figure": "bits_per_byte", "title": "bits a byte (less is better)", "more_is_better": False},
}
CONTEXT = 256  # tokens before those whose speed counts, or nearly so many: where all runtimes were timed, if anywhere
Points = list[dict[str, Any]]


def gather(folders: Sequence[Path]) -> Figures:
    """All that is known of language models' runs; what `report.json` holds.

    UserError where a run has none, where teachers differ, and where figures do not compare.
    """
    runs = [_Run(folder, label) for folder, label in run_labels(folders).items()]
    if len(teachers := {run.result["teacher"]["model"] for run in runs}) > 1:
        raise UserError(f"expected runs of one teacher, found {', '.join(sorted(teachers))}; report them one by one")
    _check_alike(runs)
    timed = [contexts for run in runs for contexts in run.contexts()]
    if timed and (common := set.intersection(*timed)):
        for run in runs:
            run.context = min(common, key=lambda context: abs(context - CONTEXT))
    points = [point for number, run in enumerate(runs) for point in run.points(with_teacher=number == 0)]
    for point in points:
        point["details"] = details(point)
    latency = [run.found["latency"] for run in runs]
    mark_dominated(points, AXES)
    own_tokens = any("tokenizer" in run.result for run in runs)
    loss, unit = ("bits_per_byte", "bits a byte") if own_tokens else ("nll_nats", "nats a token")
    report: Figures = {
        "kind": "language models",
        "axes": AXES,
        "sentence": sentence(points),
        "runs": [run.label for run in runs],
        "prefix": common_prefix([run.label for run in runs]),
        "corpus": runs[0].corpus,
        "notes": [],
        "points": points,
        "models": [row for number, run in enumerate(runs) for row in run.models(number == 0)],
        "curves": {run.label: run.result["curves"] for run in runs},
        "curve_axis": {
            "figure": loss,
            "title": f"validation loss ({unit})",
            "teacher": runs[0].result["teacher"][loss],
        },
        "by_context": [line for n, run in enumerate(runs) for line in run.memory("context", n == 0)],
        "recall": [line for n, run in enumerate(runs) for line in run.memory("recall", n == 0)],
        "latency_by_context": [line for n, run in enumerate(runs) for line in run.latency_lines(n == 0)],
        "samples": [sample for run in runs for sample in run.result["samples"][:1]],
        "machine": next((found["machine"] for found in latency if found), None),
        "versions": runs[0].result["versions"],
    }
    report["notes"] = list(_notes(latency, points, report["latency_by_context"], own_tokens))
    return report


def _notes(latency: Sequence[Figures | None], points: Points, lines: Points, own_tokens: bool) -> Iterator[str]:
    """What a reader must know beside the charts."""
    if len({found["measured"] if found else None for found in latency}) > 1:
        yield "Speeds were not all measured in one go: compare them with caution."
    if len(contexts := sorted({point["context"] for point in points if "context" in point})) > 1:
        yield f"Speeds are after prompts of different lengths, {_listed(contexts)} tokens: the table says which."
    if own_tokens:
        yield "Tokenizers differ: bits a byte compare models, nats and perplexity a token do not."
    reasons = {
        f"{name}: {why}"
        for found in filter(None, latency)
        for name, why in found["settings"].get("not_available", {}).items()
    }
    for reason in sorted(reasons):
        yield f"Not measured: {reason.rstrip('.')}."
    for line in lines:
        if line["left_out"]:
            yield f"{line['name']}: no time at {_listed(line['left_out'])} tokens, {line['reason']}."


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def _check_alike(runs: Sequence[_Run]) -> None:
    """UserError where what would stand on one axis was not measured alike."""

    def check(protocol: str, what: str, found: Mapping[str, Figures]) -> None:
        (first, expected), *others = found.items()
        for name, settings in others:
            if wrong := [key for key in {**expected, **settings} if settings.get(key) != expected.get(key)]:
                said = "; ".join(f"{key} {expected.get(key)!r} and {settings.get(key)!r}" for key in wrong)
                folders = " ".join(dict.fromkeys(str(run.folder) for run in runs))
                raise UserError(
                    f"{what} of {first} and {name} do not compare: {said}. Measure them alike, in one call: "
                    f"python -m eval.{protocol} {folders}"
                )

    qualities = {f"{run.label} ({file})": text for run in runs for file, text in run.texts.items()}
    check("perplexity", "the qualities", qualities)
    for protocol, what in (("memory", "the memories"), ("latency", "the speeds"), ("generate", "the texts")):
        settings = {
            run.label: {
                **({"machine": found["machine"].get("cpu")} if protocol == "latency" else {}),
                **{key: value for key, value in found["settings"].items() if key not in VARYING},
            }
            for run in runs
            if (found := run.found[protocol])
        }
        if settings:
            check(protocol, what, settings)


# Settings that say what was found, not what was asked for.
VARYING = ("bandwidth_bytes_per_second", "not_available", "left_out", "text_itself")


class _Run:
    """One run folder's results."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.context = CONTEXT
        self.result = read_result(folder)
        names = (*PROTOCOLS, *(f"{name}-{precision}" for name in PROTOCOLS[:2] for precision in PRECISIONS))
        self.found = {name: read_results(folder, name) for name in names}
        recipe = load_recipe(folder)
        own = Text("", text_of(recipe), "validation", recipe.evaluation)
        self.own_text = _text_key(own.settings, self.result["corpus"].get("validation_documents"))
        self.corpus, self.texts = "validation", {"result.json": self.own_text}
        self._find_texts()

    def _find_texts(self) -> None:
        """Which text the quality is that of, and which text each file has read."""
        texts: dict[str, Figures] = {}
        agreement = self.found["agreement"]
        if agreement:
            texts["agreement"] = _text_key(agreement["settings"], _documents(agreement))
        for name, found in self.found.items():
            if found and name.startswith("perplexity"):
                read = {
                    label: _text_key(settings, _documents(found, label))
                    for label, settings in found["settings"]["corpora"].items()
                }
                # Of several texts the one on which the rest was measured, else the first.
                others = list(texts.values())
                label = next((label for label, text in read.items() if text in others), next(iter(read)))
                texts[name] = read[label]
                self.corpus = label if name == "perplexity" else self.corpus
            elif found and name.startswith("agreement"):
                texts[name] = _text_key(found["settings"], _documents(found))
        self.texts = texts if "perplexity" in texts else {**self.texts, **texts}

    def name(self, role: str) -> str:
        return "teacher" if role == "teacher" else f"{self.label} {role}"

    def points(self, with_teacher: bool) -> Points:
        """One for each runtime of each model."""
        points = []
        for role in ROLES:
            if role not in self.result or role == "teacher" and not with_teacher:
                continue
            for runtime, speed in self._speeds(role).items():
                size = {key: self.result[role][key] for key in ("parameters", "weight_bytes")}
                name = {"name": f"{self.name(role)}, {runtime}", "model": self.name(role), "role": role}
                points.append({**name, "runtime": runtime, **size, **self._quality(role, runtime), **speed})
        return points

    def _quality(self, role: str, runtime: str) -> Figures:
        """Quality figures of a model in a runtime's precision, and the precisions that they were measured in."""
        figures = {
            key: self.result[role][key] for key in ("perplexity", "word_perplexity", "bits_per_byte", "nll_nats")
        }
        of = "the run"
        if row := self._measured("perplexity", role, runtime, self.corpus):
            figures |= {key: row[key] for key in (*figures, "bits_per_byte_interval") if key in row}
            of = row.get("dtype", of)
        followed = {key: self.result[role].get(key) for key in ("kl_to_teacher_nats", "top1_agreement")}
        agreement_of = "the run"
        if role == "teacher":
            followed, agreement_of = {"kl_to_teacher_nats": 0.0, "top1_agreement": 1.0, "overlap": 1.0}, "itself"
        elif row := self._measured("agreement", role, runtime):
            keys = ("kl_to_teacher_nats", "top1_agreement", "overlap", "overlap_interval")
            followed, agreement_of = {key: row[key] for key in keys if key in row}, row.get("dtype", of)
            followed["expected_calibration_error"] = row["calibration"]["expected_calibration_error"]
        elif self.own_text not in self.texts.values():  # the run's own figures are of another text
            followed = dict.fromkeys(followed)
        return {**figures, **followed, "quality_measured_in": of, "agreement_measured_in": agreement_of}

    def _measured(self, protocol: str, role: str, runtime: str, corpus: str | None = None) -> Figures | None:
        """A protocol's row in a runtime's precision, else that of the model as it was trained."""
        for name in (f"{protocol}-{runtime.split()[-1]}", protocol):
            row = (self.found.get(name) or {"models": {}})["models"].get(role)
            if row and corpus is not None:
                row = row.get(corpus)
            if row:
                return row
        return None

    def models(self, with_teacher: bool) -> Points:
        """What is known of each model whatever it runs in."""
        rows = []
        found = {name: (self.found[name] or {"models": {}})["models"] for name in PROTOCOLS}
        for role in ROLES:
            if role not in self.result or role == "teacher" and not with_teacher:
                continue
            agreement, memory, text = (found[name].get(role, {}) for name in ("agreement", "memory", "generate"))
            calibration = agreement.get("calibration")
            if role == "teacher":
                calibration = next((row["teacher_calibration"] for row in found["agreement"].values()), None)
            context = memory.get("context", {})
            rows.append(
                {
                    "name": self.name(role),
                    "role": role,
                    "parameters": self.result[role]["parameters"],
                    "top5_agreement": agreement.get("top5_agreement"),
                    "expected_calibration_error": calibration and calibration["expected_calibration_error"],
                    "effective_context_tokens": context.get("effective_context_tokens"),
                    "longest_context_tokens": context["losses"][-1]["context"] if context.get("losses") else None,
                    **{key: text.get(key) for key in ("distinct_2", "repetition_4", "mean_length_tokens")},
                    "teacher_perplexity": text.get("teacher_perplexity"),
                    "tasks": found["harness"].get(role, {}),
                }
            )
        return rows

    def contexts(self) -> list[set[int]]:
        """Those in which each runtime was timed at batch 1."""
        found = self.found["latency"] or {"models": {}}
        rows = [row for figures in found["models"].values() for row in figures["runtimes"].values()]
        timed = [{case["context"] for case in row["cases"] if case["batch"] == 1} for row in rows]
        return [contexts for contexts in timed if contexts]

    def _speeds(self, role: str) -> dict[str, Figures]:
        """Speed figures by runtime, after `context` tokens at batch 1. A control runs as its student does."""
        found = self.found["latency"] or {"models": {}}
        runtimes = found["models"].get("student" if role == "control" else role, {}).get("runtimes", {})
        speeds = {}
        for runtime, row in runtimes.items():
            if not (alone := [case for case in row["cases"] if case["batch"] == 1]):
                continue
            case = min(alone, key=lambda case: abs(case["context"] - self.context))
            keys = ("context", "tokens_per_second", "token_ms_p50", "token_ms_p95", "token_ms_p99", "first_token_ms",
                    "prompt_tokens_per_second")  # fmt: skip
            more = {key: row.get(key) for key in ("load_seconds", "resident_bytes", "disk_bytes")}
            more["weight_bytes"] = row["weight_bytes"]
            kept = {key: case[key] for key in (*keys, "state_bytes", "roofline", "token_ms_p50_range")}
            shortest = min(case["context"] for case in row["cases"])
            more["tokens_per_second_by_batch"] = {
                str(case["batch"]): case["tokens_per_second"] for case in row["cases"] if case["context"] == shortest
            }
            speeds[runtime] = {**kept, **more}
        if not speeds:  # none was measured at batch 1
            speed = self.result[role]["decode_tokens_per_second"]  # None for a teacher in shards
            return {"generate": {"tokens_per_second": speed}} if speed else {}
        if role == "control":  # one point is enough: the architecture is the student's
            first = next(iter(speeds))
            speeds = {first: speeds[first]}
        return speeds

    def memory(self, what: str, with_teacher: bool) -> Points:
        """Lines of one part of `eval.memory`, one a model."""
        found = self.found["memory"] or {"models": {}}
        return [
            {"model": self.name(role), "role": role, **row[what]}
            for role, row in found["models"].items()
            if with_teacher or role != "teacher"
        ]

    def latency_lines(self, with_teacher: bool) -> Points:
        """Milliseconds a token by context at batch 1, one line a runtime; `fastest` of its model or not."""
        found = self.found["latency"] or {"models": {}}
        lines = []
        for role, figures in found["models"].items():
            if role == "teacher" and not with_teacher:
                continue
            speeds = self._speeds(role)
            fastest = max(speeds, key=lambda runtime: speeds[runtime]["tokens_per_second"], default="")
            for runtime, row in figures["runtimes"].items():
                alone, left_out = ([c for c in row[key] if c["batch"] == 1] for key in ("cases", "left_out"))
                if not alone and not left_out:
                    continue
                lines.append(
                    {
                        "name": f"{self.name(role)}, {runtime}",
                        "role": role,
                        "fastest": runtime == fastest,
                        "context": [case["context"] for case in alone],
                        "token_ms_p50": [case["token_ms_p50"] for case in alone],
                        "left_out": [case["context"] for case in left_out],
                        "reason": left_out[0]["reason"] if left_out else None,
                    }
                )
        return lines


def _documents(found: Figures, corpus: str | None = None) -> int | None:
    """How many documents the models of a result have read, which is the same of all."""
    row: Figures = next(iter(found["models"].values()), {})
    return (row.get(corpus, {}) if corpus is not None else row).get("documents")


def _text_key(settings: Figures, documents: int | None) -> Figures:
    """What two figures must have in common to compare. Limits in tokens do not matter, but what came of them."""
    return {**{key: settings.get(key) for key in ("text", "split", "window", "context")}, "documents": documents}


def details(point: dict[str, Any]) -> list[str]:
    """What is said of a point beside it, line by line."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    quality, agreement = point["quality_measured_in"], point["agreement_measured_in"]
    return [
        f"{number(point['tokens_per_second'], ',.0f')} tokens/s, {number(point.get('token_ms_p50'), '.2f')} ms a token",
        f"{number(point['bits_per_byte'], '.3f')} bits a byte, perplexity {number(point['perplexity'], ',.1f')} "
        f"(measured in {quality})",
        f"KL {number(point['kl_to_teacher_nats'], '.3f')} nats, top-1 {number(point['top1_agreement'], '.3f')}, "
        f"overlap {number(point.get('overlap'), '.3f')}"
        + f" (in {agreement})"
        * (agreement not in (quality, "itself")),
        f"{point['parameters'] / 1e6:.1f} M parameters, {point['weight_bytes'] / 2**20:,.0f} MiB",
    ]


def mark_dominated(points: Points, axes: Figures) -> None:
    """Set `dominated` where another point is at least as fast and as good, and better in one of both."""
    speed, quality = axes["speed"]["figure"], axes["quality"]["figure"]
    sign = 1 if axes["quality"]["more_is_better"] else -1
    places = [(point[speed], sign * point[quality]) for point in points]
    for point, (fast, good) in zip(points, places, strict=True):
        point["dominated"] = any(
            faster >= fast and better >= good and (faster, better) != (fast, good) for faster, better in places
        )


def sentence(points: Points) -> str:
    """What the frontier shows, in words: of the students that are faster than the teacher ever is, the best model in
    its fastest runtime, and the fastest of all."""
    teacher = max((p for p in points if p["role"] == "teacher"), key=lambda p: p["tokens_per_second"], default=None)
    students = sorted((p for p in points if p["role"] == "student"), key=lambda p: p["tokens_per_second"])
    if teacher is None or not students:
        return "The speed of the teacher and that of a student are needed to compare them: eval.report RUN --measure."
    faster = [p for p in students if p["tokens_per_second"] > teacher["tokens_per_second"]]
    if not faster:
        return (
            f"No student is faster than the teacher: the fastest, {students[-1]['name']}, writes "
            f"{students[-1]['tokens_per_second']:,.0f} tokens a second, {teacher['name']} "
            f"{teacher['tokens_per_second']:,.0f}."
        )
    model = min(faster, key=lambda p: p["bits_per_byte"])["model"]
    best = [p for p in faster if p["model"] == model][-1]
    kept = ""
    if best.get("overlap") is not None:
        kept = f"keeps {best['overlap']:.0%} of the teacher's probability mass "
        if best["agreement_measured_in"] != best["quality_measured_in"]:
            kept += f"(measured in {best['agreement_measured_in']}) "
    elif best.get("top1_agreement") is not None:
        kept = f"agrees with the teacher on {best['top1_agreement']:.0%} of tokens "
    said = (
        f"The {best['parameters'] / 1e6:.0f} M student ({best['name']}) {kept}at {_times(best, teacher)} the speed of "
        f"the teacher's fastest runtime ({best['tokens_per_second']:,.0f} against {teacher['tokens_per_second']:,.0f} "
        f"tokens a second, {teacher['runtime']}), and needs {best['bits_per_byte']:.2f} bits a byte where the teacher "
        f"needs {teacher['bits_per_byte']:.2f}."
    )
    fastest = faster[-1]
    if fastest is not best:
        said += (
            f" The fastest, {fastest['parameters'] / 1e6:.0f} M ({fastest['name']}), reaches "
            f"{_times(fastest, teacher)} the speed at {fastest['bits_per_byte']:.2f} bits a byte."
        )
    return said


def _times(point: dict[str, Any], teacher: dict[str, Any]) -> str:
    return f"{point['tokens_per_second'] / teacher['tokens_per_second']:.1f} times"


def common_prefix(runs: Sequence[str]) -> str:
    """What the names of several runs have in common up to a dash, so that charts can leave it out."""
    return "".join(os.path.commonprefix(list(runs)).rpartition("-")[:2]) if len(runs) > 1 else ""
