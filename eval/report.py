"""One page about many runs: quality against speed.

    python -m eval.report runs/quickstart --measure
    python -m eval.report runs/frontier-* --output runs/frontier
    python -m eval.report runs/topics

Writes into the output folder `index.html` (self-contained: opens without a network, in light and dark, on a phone and
on paper), `report.json` (all numbers in it), `table.md`, and PNG pictures. `--measure` first runs the protocols that a
run has no results of, on the text of the first run; speeds are measured for all runs together, because only then they
compare. Runs of classifiers have measured all there is to report.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from distill.checkpoint import write_atomically, write_json
from distill.config import UserError
from distill.output import print_json, print_table
from distill.recipe import load_recipe
from distill.result import is_classification, read_result
from distill.teacher import hardware_has_bf16
from distill.tracking import log_evaluation
from eval.agreement import main as agreement
from eval.classifiers import gather_classifiers
from eval.command import Figures, execute, read_results
from eval.gather import gather
from eval.generate import main as generate
from eval.latency import main as latency
from eval.memory import main as memory
from eval.perplexity import main as perplexity
from eval.pictures import draw_pictures
from eval.shared import shared

MODELS = (
    "In the arithmetic of the training. Top-5: the teacher's likeliest token is among the model's five likeliest. "
    "Effective context: from so many tokens on perplexity stays within 1 % of that after the longest measured. "
    "Distinct-2, repetition and the teacher's perplexity are of what the model writes."
)
# Agreement comes first: it reads the text with teacher and models, and perplexity finds their losses.
MEASURES: dict[str, Callable[[list[str]], int]] = {
    "agreement": agreement,
    "agreement-bf16": lambda runs: agreement([*runs, "--dtype", "bf16", "--roles", "student"]),
    "agreement-int8": lambda runs: agreement([*runs, "--decoder", "--roles", "student"]),
    "perplexity": perplexity,
    "perplexity-bf16": lambda runs: perplexity([*runs, "--dtype", "bf16", "--roles", "student"]),
    "perplexity-int8": lambda runs: perplexity([*runs, "--decoder", "--roles", "student"]),
    "memory": memory,
    "generate": generate,
    "latency": latency,
}
# What the terminal has room for.
SHOWN = ("model, runtime", "tok/s", "bits/byte", "95 %", "KL nats", "overlap", "params M", "state KiB", "model",
         "accuracy", "agreement with the teacher", "ms/text p50")  # fmt: skip


def measure_missing(folders: Sequence[Path]) -> None:
    """Run each protocol on the runs that lack it; UserError where one fails, which has then said why."""
    missing = set()
    if not hardware_has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        missing.add("bf16")
    if importlib.util.find_spec("onnxruntime") is None:
        missing.add("int8")
    for protocol, main in MEASURES.items():
        if protocol.rpartition("-")[2] in missing:
            continue
        lacking = [str(folder) for folder in folders if read_results(folder, protocol) is None]
        if protocol == "latency":
            arguments = list(map(str, folders)) if lacking else []
        else:
            if protocol.startswith(("agreement", "generate")):  # which compare token by token
                lacking = [folder for folder in lacking if not load_recipe(folder).student.has_own_tokenizer]
            arguments = [*lacking, "--corpus", str(folders[0])] if lacking else []
        if arguments and main(arguments):
            raise UserError(f"eval.{protocol} could not be measured, as said above")


def collect(folders: Sequence[Path]) -> Figures:
    """What is known of runs, of language models or of classifiers; UserError for a mixture."""
    classifiers = [folder for folder in folders if is_classification(read_result(folder))]
    if not classifiers:
        return gather(folders)
    if len(classifiers) < len(folders):
        other = next(folder for folder in folders if folder not in classifiers)
        raise UserError(
            f"{classifiers[0]} is a classifier's run, {other} a language model's: expected one kind in a report"
        )
    return gather_classifiers(folders)


def _shown(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else format(value / unit, form)


def table_rows(report: Figures) -> list[dict[str, str]]:
    """The table of everything, each number with its unit in the column's name."""
    row = _classifier_row if report["kind"] == "classifiers" else _language_model_row
    return [row(point) for point in report["points"]]


def _language_model_row(point: Figures) -> dict[str, str]:
    interval, batches = point.get("bits_per_byte_interval"), point.get("tokens_per_second_by_batch", {})
    quality, agreement = point["quality_measured_in"], point["agreement_measured_in"]
    return {
        "model, runtime": point["name"],
        "tok/s": _shown(point["tokens_per_second"], ",.0f"),
        **{f"at batch {batch}": _shown(speed, ",.0f") for batch, speed in batches.items() if batch != "1"},
        "context": _shown(point.get("context"), ",.0f"),
        "ms/token p50": _shown(point.get("token_ms_p50"), ".2f"),
        "p95": _shown(point.get("token_ms_p95"), ".2f"),
        "p99": _shown(point.get("token_ms_p99"), ".2f"),
        "first token ms": _shown(point.get("first_token_ms"), ",.1f"),
        "prefill tok/s": _shown(point.get("prompt_tokens_per_second"), ",.0f"),
        "bits/byte": _shown(point["bits_per_byte"], ".3f"),
        "95 %": "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}",
        "ppl/token": _shown(point["perplexity"], ",.1f"),
        "ppl/word": _shown(point["word_perplexity"], ",.0f"),
        "KL nats": _shown(point["kl_to_teacher_nats"], ".3f"),
        "top-1": _shown(point["top1_agreement"], ".3f"),
        "overlap": _shown(point.get("overlap"), ".3f"),
        "quality in": quality if agreement in (quality, "itself") else f"{quality}, KL to overlap {agreement}",
        "params M": _shown(point["parameters"], ".1f", 1e6),
        "weights MiB": _shown(point["weight_bytes"], ",.0f", 2**20),
        "on disk MiB": _shown(point.get("disk_bytes") or None, ",.0f", 2**20),
        "resident MiB": _shown(point.get("resident_bytes"), ",.0f", 2**20),
        "state KiB": _shown(point.get("state_bytes"), ",.0f", 2**10),
        "load s": _shown(point.get("load_seconds"), ".2f"),
        "roofline": _shown(point.get("roofline"), ".0%"),
    }


def _classifier_row(point: Figures) -> dict[str, str]:
    low, high = point["accuracy_interval"]
    return {
        "model": point["name"],
        "accuracy": _shown(point["accuracy"], ".3f"),
        "95 %": f"{low:.3f}–{high:.3f}",
        "nats": _shown(point["nll_nats"], ".3f"),
        "agreement with the teacher": _shown(point["top1_agreement"], ".3f"),
        "KL nats": _shown(point["kl_to_teacher_nats"], ".3f"),
        "ms/text p50": _shown(point["latency_ms_p50"], ".2f"),
        "p95": _shown(point["latency_ms_p95"], ".2f"),
        "texts/s": _shown(point["texts_per_second"], ",.0f"),
        "params M": _shown(point["parameters"], ".1f", 1e6),
        "weights MiB": _shown(point["weight_bytes"], ",.0f", 2**20),
    }


def model_rows(report: Figures) -> list[dict[str, str]]:
    """What does not depend on the runtime: calibration, memory, and what is written."""
    tasks = dict.fromkeys(
        (task, metric)
        for row in report["models"]
        for task, found in row["tasks"].items()
        for metric in found
        if metric in ("acc", "perplexity")
    )
    return [
        {
            "model": row["name"],
            "params M": _shown(row["parameters"], ".1f", 1e6),
            "top-5": _shown(row["top5_agreement"], ".3f"),
            "calibration error": _shown(row["expected_calibration_error"], ".3f"),
            "effective context": _context(row),
            "distinct-2": _shown(row["distinct_2"], ".3f"),
            "repetition": _shown(row["repetition_4"], ".3f"),
            "tokens a text": _shown(row["mean_length_tokens"], ".1f"),
            "teacher's ppl of it": _shown(row["teacher_perplexity"], ",.1f"),
            **{f"{task} {name}": _shown(row["tasks"].get(task, {}).get(name), ".3g") for task, name in tasks},
        }
        for row in report["models"]
    ]


def _context(row: Figures) -> str:
    """The effective context in tokens, beside the longest that was measured."""
    if row["effective_context_tokens"] is None:
        return "–"
    return f"{row['effective_context_tokens']:,} of {row['longest_context_tokens']:,}"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table for a README."""
    columns = _columns(rows)
    lines = [
        columns,
        ["---", *["---:"] * (len(columns) - 1)],
        *([row.get(name, "–") for name in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _columns(rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns of the row that has most: others may lack what was not measured."""
    return max((list(row) for row in rows), key=len)


def _table(rows: Sequence[dict[str, str]], points: Sequence[Figures]) -> str:
    """An HTML table, a row for each point."""
    columns = _columns(rows)
    body = "".join(
        f'<tr class="{"dominated" if point.get("dominated") else ""}" style="--role: var(--{point["role"]})">'
        + "".join(f"<td>{html.escape(row.get(name, '–'))}</td>" for name in columns)
        + "</tr>"
        for point, row in zip(points, rows, strict=True)
    )
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _captions(report: Figures) -> tuple[str, str]:
    """What stands below the headings of the frontier and of the table of everything."""
    if report["kind"] == "classifiers":
        return (
            "One text at a time. Up and to the right is better; faint points are dominated.",
            f"Accuracy on {report['corpus']}, time for one of them at batch 1; agreement and KL with the teacher.",
        )
    contexts = [f"{point['context']:,} tokens of context" for point in report["points"] if "context" in point]
    speed = f"speed at batch 1 after {contexts[0] if contexts else 'a prompt'}"
    return (
        "Every model in every runtime, one sequence at a time. Up and to the right is better; faint: dominated.",
        f"Quality on {report['corpus']}; {speed}; KL, top-1 and overlap with the teacher.",
    )


def page(report: Figures, title: str) -> str:
    """The whole HTML page, plotting library included."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the page needs an extra: pip install 'potstill[report]'") from None
    samples = "".join(
        f"<blockquote><b>{html.escape(sample['prompt'])}</b> {html.escape(sample['sampled'])}</blockquote>"
        for sample in report["samples"]
    )
    models = _table(model_rows(report), report["models"]) if report["models"] else ""
    frontier, everything = _captions(report)
    versions = {**(report["machine"] or {}), **report["versions"]}
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title),
        sentence=html.escape(report["sentence"]),
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in report["notes"]),
        frontier=html.escape(frontier),
        caption=html.escape(everything),
        table=_table(table_rows(report), report["points"]),
        models=f'<figure class="wide"><h2>Models</h2><figcaption>{MODELS}</figcaption>{models}</figure>'
        if models
        else "",
        samples=f"<figure><h2>Samples</h2>{samples}</figure>" if samples else "",
        about=html.escape(" · ".join(f"{name} {value}" for name, value in versions.items())),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        data=json.dumps(report).replace("<", "\\u003c"),
    )


def write_report(report: Figures, folder: Path, title: str) -> list[Path]:
    """Write all files of the report; the pictures' paths."""
    rows = table_rows(report)
    whole = page(report, title)
    write_json(folder / "report.json", report, field="--output")
    tables = [markdown(found) for found in (rows, model_rows(report)) if found]
    for name, text in (("table.md", "\n".join(tables)), ("index.html", whole)):
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"), "--output")  # type: ignore[misc]
    return draw_pictures(report, folder)


def work(options: argparse.Namespace) -> None:
    folders = [Path(name) for name in options.runs]
    if options.measure:
        with shared():
            measure_missing([folder for folder in folders if not is_classification(read_result(folder))])
    report = collect(folders)
    pictures = write_report(report, Path(options.output), options.title)
    shown = [{name: row[name] for name in SHOWN if name in row} for row in table_rows(report)]
    print_table(options.title, shown, report["sentence"])
    figures = {name: report[name] for name in ("sentence", "points", "models")}
    speed, quality = (str(report["axes"][which]["figure"]) for which in ("speed", "quality"))
    for folder in folders:
        log_evaluation(folder, "frontier", figures, pictures, scatter=("points", speed, quality))
    print_json({"page": str(Path(options.output) / "index.html"), "sentence": report["sentence"]})


def main(arguments: Sequence[str] | None = None) -> int:
    parser: Any = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", default="runs/report", help="folder of the report (runs/report)")
    parser.add_argument("--title", default="Potstill: quality against speed")
    parser.add_argument("--measure", action="store_true", help="first measure what is missing")
    return execute(parser, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
