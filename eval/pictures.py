"""The report's charts as PNG files, for a README: the same data as the page draws, on white."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill.checkpoint import write_atomically
from eval.command import Figures

COLOURS = {"teacher": "#6b7280", "student": "#1f5fa8", "control": "#c1622d"}
MARKS = "oDs^*XPvh"


def draw_pictures(report: Figures, folder: Path) -> list[Path]:
    """Write frontier.png and contexts.png; the paths of those for which there is data."""
    written = [_write(_frontier(report), folder / "frontier.png")]
    if report["by_context"] or report["latency_by_context"]:
        written.append(_write(_contexts(report), folder / "contexts.png"))
    return written


def _frontier(report: Figures) -> Figure:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis: Axes = figure.subplots()
    points = report["points"]
    (speed, speed_title), (quality, quality_title) = (
        (report["axes"][which]["figure"], report["axes"][which]["title"]) for which in ("speed", "quality")
    )
    runtimes = list(dict.fromkeys(point["runtime"] for point in points))
    best = sorted((p for p in points if not p["dominated"]), key=lambda p: p[speed])
    axis.step(
        [p[speed] for p in best], [p[quality] for p in best],
        where="pre", color="#9aa4ae", linewidth=1, linestyle=":",
    )  # fmt: skip
    fastest = {point["model"]: point for point in best}
    for point in points:
        x, y = point[speed], point[quality]
        axis.scatter(
            x, y, s=70, color=COLOURS[point["role"]], alpha=0.3 if point["dominated"] else 1, linewidths=0,
            marker=MARKS[runtimes.index(point["runtime"]) % len(MARKS)],
        )  # fmt: skip
        of_runtime = point["role"] == "teacher" and report["kind"] != "classifiers"
        if not point["dominated"] and (of_runtime or point is fastest[point["model"]]):
            # Up and to the right of a point of the frontier, nothing else can be.
            name = point["runtime"] if of_runtime else _short(point["model"], report)
            axis.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    handles = [
        *(axis.scatter([], [], color=colour, label=role) for role, colour in COLOURS.items()),
        *(axis.scatter([], [], color="#444444", marker=MARKS[n % len(MARKS)], label=r) for n, r in enumerate(runtimes)),
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if not report["axes"]["quality"]["more_is_better"]:
        axis.invert_yaxis()
    _logarithmic(axis, "x")
    _finish(axis, speed_title, quality_title)
    return figure


def _contexts(report: Figures) -> Figure:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    loss, latency = figure.subplots(1, 2)
    losses = []
    for line in report["by_context"]:
        x, y = ([entry[key] for entry in line["losses"]] for key in ("context", "nll_nats"))
        losses.append((line["role"], _short(line["model"], report), x, y))
    times = [
        (line["role"], _short(line["name"], report), line["context"], line["token_ms_p50"])
        for line in report["latency_by_context"]
        if line["role"] == "teacher" or line["fastest"]
    ]
    _lines(loss, losses)
    _finish(loss, "tokens of context before the target", "nats a token")
    _lines(latency, times)
    _logarithmic(latency, "y")
    _finish(latency, "tokens of context", "milliseconds a token (p50)")
    return figure


def _short(name: str, report: Figures) -> str:
    """A model's name without what all of them have in common."""
    return name.replace(" student", "").removeprefix(report["prefix"])


def _lines(axis: Axes, lines: list[tuple[str, str, list[float], list[float]]]) -> None:
    """One colour a role; of several models of a role, the later ones are stronger."""
    for number, (role, name, x, y) in enumerate(lines):
        same = [n for n, line in enumerate(lines) if line[0] == role]
        alpha = 1.0 if len(same) == 1 else 0.35 + 0.65 * same.index(number) / (len(same) - 1)
        axis.plot(x, y, marker="o", markersize=3, label=name, color=COLOURS[role], alpha=alpha)
    if lines:
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0.0, -0.15), ncols=2)
    _logarithmic(axis, "x")


def _logarithmic(axis: Axes, which: str) -> None:
    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"{which}axis").set_major_formatter("{x:,g}")


def _finish(axis: Axes, xlabel: str, ylabel: str) -> None:
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _write(figure: Figure, target: Path) -> Path:
    write_atomically(target, lambda path: figure.savefig(path, dpi=150, format="png"), field="--output")
    return target
