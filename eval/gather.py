"""What a report says, as data: the figures of many runs brought together, and their frontier of quality against speed.

Quality comes from `eval.perplexity` and `eval.agreement` (else from the run's own result), speed from `eval.latency`
at batch 1 (else from the run's own result, as runtime `generate`). A runtime's last word names its precision: where
`eval.perplexity --dtype` has measured that precision, its quality counts, else that of the model as it was trained,
and the point says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config import UserError
from distill.result import is_classification, read_result
from eval.command import CLASSIFIER, Figures, read_results

PROTOCOLS = ("perplexity", "agreement", "memory", "latency", "generate")
Points = list[dict[str, Any]]


def gather(folders: Sequence[Path]) -> Figures:
    """All that is known of the runs; what `report.json` holds. UserError where a run has none, or teachers differ."""
    runs = [_Run(folder) for folder in folders]
    if classifiers := [run.folder for run in runs if is_classification(run.result)]:
        raise UserError(f"{classifiers[0]}: expected a language model's run, found a classifier's; {CLASSIFIER}")
    if len(teachers := {run.result["teacher"]["model"] for run in runs}) > 1:
        raise UserError(f"expected runs of one teacher, found {', '.join(sorted(teachers))}; report them one by one")
    points = [point for number, run in enumerate(runs) for point in run.points(with_teacher=number == 0)]
    latency = [run.found["latency"] for run in runs]
    times = {found["measured"] for found in latency if found}
    mark_dominated(points)
    own_tokens = any("tokenizer" in run.result for run in runs)
    loss, unit = ("bits_per_byte", "bits a byte") if own_tokens else ("nll_nats", "nats a token")
    report = {
        "sentence": sentence(points),
        "runs": [run.folder.name for run in runs],
        "prefix": common_prefix([run.folder.name for run in runs]),
        "corpus": runs[0].corpus,
        "notes": [],
        "points": points,
        "curves": {run.folder.name: run.result["curves"] for run in runs},
        "curve_loss": {"figure": loss, "unit": unit, "teacher": runs[0].result["teacher"][loss]},
        "by_context": [line for n, run in enumerate(runs) for line in run.memory("context", n == 0)],
        "recall": [line for n, run in enumerate(runs) for line in run.memory("recall", n == 0)],
        "latency_by_context": [line for n, run in enumerate(runs) for line in run.latency_lines(n == 0)],
        "samples": [sample for run in runs for sample in run.result["samples"][:1]],
        "machine": next((found["machine"] for found in latency if found), None),
        "versions": runs[0].result["versions"],
    }
    if len(times) > 1 or (times and None in latency):
        report["notes"].append("Speeds were not all measured in one go: compare them with caution.")
    if len({run.corpus for run in runs}) > 1:
        report["notes"].append("Quality was not measured on the same text for all runs: it does not compare.")
    if own_tokens:
        report["notes"].append("Tokenizers differ: bits a byte compare models, nats and perplexity a token do not.")
    reasons = {
        f"{name}: {why}"
        for found in filter(None, latency)
        for name, why in found["settings"].get("not_available", {}).items()
    }
    report["notes"] += [f"Not measured: {reason.rstrip('.')}." for reason in sorted(reasons)]
    for line in report["latency_by_context"]:
        if line["left_out"]:
            contexts = ", ".join(f"{context:,}" for context in line["left_out"])
            report["notes"].append(f"{line['name']}: no time at {contexts} tokens, {line['reason']}.")
    return report


class _Run:
    """One run folder's results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = read_result(folder)
        names = (*PROTOCOLS, "perplexity-fp32", "perplexity-bf16", "perplexity-int8")
        self.found = {name: read_results(folder, name) for name in names}
        measured = self.found["perplexity"]
        self.corpus = next(iter(measured["settings"]["corpora"])) if measured else "validation"

    def label(self, role: str) -> str:
        return "teacher" if role == "teacher" else f"{self.folder.name} {role}"

    def points(self, with_teacher: bool) -> Points:
        """One for each runtime of each model."""
        points = []
        for role in ("teacher", "student", "control"):
            if role not in self.result or role == "teacher" and not with_teacher:
                continue
            for runtime, speed in self._speeds(role).items():
                quality, of = self._quality(role, runtime)
                size = {key: self.result[role][key] for key in ("parameters", "weight_bytes")}
                name = {"name": f"{self.label(role)}, {runtime}", "model": self.label(role), "role": role}
                points.append({**name, "runtime": runtime, **size, **quality, "quality_measured_in": of, **speed})
        return points

    def _quality(self, role: str, runtime: str) -> tuple[Figures, str]:
        """Quality figures of a model in a runtime's precision, and the precision that they were measured in."""
        own = {key: self.result[role].get(key) for key in ("kl_to_teacher_nats", "top1_agreement")}
        own |= {key: self.result[role][key] for key in ("perplexity", "word_perplexity", "bits_per_byte", "nll_nats")}
        of = "the run"
        if found := self.found.get(f"perplexity-{runtime.split()[-1]}") or self.found["perplexity"]:
            row = found["models"].get(role, {}).get(self.corpus, {})
            keys = (*own, "bits_per_byte_interval")
            own |= {key: row[key] for key in keys if key in row}
            of = row.get("dtype", of)
        agreement = (self.found["agreement"] or {"models": {}})["models"].get(role, {})
        own |= {k: agreement[k] for k in ("kl_to_teacher_nats", "top1_agreement", "overlap") if k in agreement}
        if role == "teacher":
            own |= {"kl_to_teacher_nats": 0.0, "top1_agreement": 1.0, "overlap": 1.0}
        return own, of

    def _speeds(self, role: str) -> dict[str, Figures]:
        """Speed figures by runtime, in the context nearest to 256 at batch 1. A control runs as its student does."""
        found = self.found["latency"] or {"models": {}}
        runtimes = found["models"].get("student" if role == "control" else role, {}).get("runtimes", {})
        speeds = {}
        for runtime, row in runtimes.items():
            if not (alone := [case for case in row["cases"] if case["batch"] == 1]):
                continue
            case = min(alone, key=lambda case: abs(case["context"] - 256))
            keys = ("context", "tokens_per_second", "token_ms_p50", "token_ms_p95", "token_ms_p99", "first_token_ms")
            more = {key: row.get(key) for key in ("load_seconds", "resident_bytes", "disk_bytes")}
            more["weight_bytes"] = row["weight_bytes"]
            kept = {key: case[key] for key in (*keys, "state_bytes", "roofline", "token_ms_p50_range")}
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
            {"model": self.label(role), "role": role, **row[what]}
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
                        "name": f"{self.label(role)}, {runtime}",
                        "role": role,
                        "fastest": runtime == fastest,
                        "context": [case["context"] for case in alone],
                        "token_ms_p50": [case["token_ms_p50"] for case in alone],
                        "left_out": [case["context"] for case in left_out],
                        "reason": left_out[0]["reason"] if left_out else None,
                    }
                )
        return lines


def mark_dominated(points: Points) -> None:
    """Set `dominated` where another point is at least as fast and as good, and better in one of both."""
    for point in points:
        speed, loss = point["tokens_per_second"], point["bits_per_byte"]
        point["dominated"] = any(
            other["tokens_per_second"] >= speed
            and other["bits_per_byte"] <= loss
            and (other["tokens_per_second"], other["bits_per_byte"]) != (speed, loss)
            for other in points
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
