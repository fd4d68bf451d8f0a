"""One page about many runs: quality against speed.

    python -m eval.report runs/quickstart --measure
    python -m eval.report runs/frontier-* --output runs/frontier

Writes into the output folder `index.html` (self-contained: opens without a network, in light and dark, on a phone and
on paper), `report.json` (all numbers in it), `table.md`, and PNG pictures. `--measure` first runs the protocols that a
run has no results of; speeds are measured for all runs together, because only then they compare.
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
from distill.teacher import hardware_has_bf16
from distill.tracking import log_evaluation
from eval.agreement import main as agreement
from eval.command import Figures, execute, read_results
from eval.gather import gather
from eval.generate import main as generate
from eval.latency import main as latency
from eval.memory import main as memory
from eval.perplexity import main as perplexity
from eval.pictures import draw_pictures

MEASURES: dict[str, Callable[[list[str]], int]] = {
    "perplexity": perplexity,
    "perplexity-bf16": lambda runs: perplexity([*runs, "--dtype", "bf16"]),
    "perplexity-int8": lambda runs: perplexity([*runs, "--decoder"]),
    "agreement": agreement,
    "memory": memory,
    "generate": generate,
    "latency": latency,
}


def measure_missing(folders: Sequence[Path]) -> None:
    """Run each protocol on the runs that lack it; UserError where one fails, which has then said why."""
    cannot = set()
    if not hardware_has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        cannot.add("perplexity-bf16")
    if importlib.util.find_spec("onnxruntime") is None:
        cannot.add("perplexity-int8")
    for protocol, main in MEASURES.items():
        if protocol in cannot:
            continue
        lacking = [str(folder) for folder in folders if read_results(folder, protocol) is None]
        if protocol in ("agreement", "generate"):  # which compare token by token
            lacking = [folder for folder in lacking if not load_recipe(folder).student.has_own_tokenizer]
        if lacking and main(list(map(str, folders)) if protocol == "latency" else lacking):
            raise UserError(f"eval.{protocol} could not be measured, as said above")


def table_rows(report: Figures) -> list[dict[str, str]]:
    """The table of everything, each number with its unit in the column's name."""

    def shown(value: float | None, form: str, unit: float = 1.0) -> str:
        return "–" if value is None else format(value / unit, form)

    rows = []
    for point in report["points"]:
        interval = point.get("bits_per_byte_interval")
        rows.append(
            {
                "model, runtime": point["name"],
                "tok/s": shown(point["tokens_per_second"], ",.0f"),
                "ms/token p50": shown(point.get("token_ms_p50"), ".2f"),
                "p95": shown(point.get("token_ms_p95"), ".2f"),
                "p99": shown(point.get("token_ms_p99"), ".2f"),
                "first token ms": shown(point.get("first_token_ms"), ",.1f"),
                "bits/byte": shown(point["bits_per_byte"], ".3f"),
                "95 %": "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}",
                "ppl/token": shown(point["perplexity"], ",.1f"),
                "ppl/word": shown(point["word_perplexity"], ",.0f"),
                "KL nats": shown(point["kl_to_teacher_nats"], ".3f"),
                "top-1": shown(point["top1_agreement"], ".3f"),
                "overlap": shown(point.get("overlap"), ".3f"),
                "params M": shown(point["parameters"], ".1f", 1e6),
                "weights MiB": shown(point["weight_bytes"], ",.0f", 2**20),
                "resident MiB": shown(point.get("resident_bytes"), ",.0f", 2**20),
                "state KiB": shown(point.get("state_bytes"), ",.0f", 2**10),
                "load s": shown(point.get("load_seconds"), ".2f"),
                "roofline": shown(point.get("roofline"), ".0%"),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """The table for a README."""
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def page(report: Figures, title: str) -> str:
    """The whole HTML page, plotting library included."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the page needs an extra: pip install 'potstill[report]'") from None
    rows = table_rows(report)
    body = "".join(
        f'<tr class="{"dominated" if point["dominated"] else ""}" style="--role: var(--{point["role"]})">'
        + "".join(
            f"<td>{'<span class=dot></span>' * (n == 0)}{html.escape(cell)}</td>" for n, cell in enumerate(row.values())
        )
        + "</tr>"
        for point, row in zip(report["points"], rows, strict=True)
    )
    head = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    samples = "".join(
        f"<blockquote><b>{html.escape(sample['prompt'])}</b> {html.escape(sample['sampled'])}</blockquote>"
        for sample in report["samples"]
    )
    machine = report["machine"] or {}
    contexts = [f"{point['context']:,} tokens of context" for point in report["points"] if "context" in point]
    speed = f"speed at batch 1 after {contexts[0] if contexts else 'a prompt'}"
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title),
        sentence=html.escape(report["sentence"]),
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in report["notes"]),
        caption=html.escape(f"Quality on {report['corpus']}; {speed}; KL, top-1 and overlap with the teacher."),
        table=f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        samples=f"<figure><h2>Samples</h2>{samples}</figure>",
        about=html.escape(" · ".join(f"{name} {value}" for name, value in {**machine, **report["versions"]}.items())),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        data=json.dumps(report).replace("<", "\\u003c"),
    )


def write_report(report: Figures, folder: Path, title: str) -> list[Path]:
    """Write all files of the report; the pictures' paths."""
    rows = table_rows(report)
    whole = page(report, title)
    write_json(folder / "report.json", report, field="--output")
    for name, text in (("table.md", markdown(rows)), ("index.html", whole)):
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"), "--output")  # type: ignore[misc]
    return draw_pictures(report, folder)


def work(options: argparse.Namespace) -> None:
    folders = [Path(name) for name in options.runs]
    if options.measure:
        measure_missing(folders)
    report = gather(folders)
    pictures = write_report(report, Path(options.output), options.title)
    rows = table_rows(report)
    shown = ("model, runtime", "tok/s", "bits/byte", "95 %", "KL nats", "overlap", "params M", "state KiB")
    print_table(options.title, [{name: row[name] for name in shown} for row in rows], report["sentence"])
    for folder in folders:
        log_evaluation(folder, "frontier", {"sentence": report["sentence"]}, rows, pictures)
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
