"""How every benchmark reports: a table for people, then one JSON object as the last line, kept in runs/bench/ too."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distill.checkpoint import write_atomically
from distill.result import versions

FOLDER = Path("runs/bench")


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, torch's threads, memory, and the accelerator if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": _cpu_model(), "cores": cores, "threads": torch.get_num_threads()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    """As Linux names it, else what the platform knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(title: str, rows: Sequence[Mapping[str, str]], note: str = "") -> None:
    """Rows of equal keys, which are the columns; numbers are formatted by the caller. `note` goes below."""
    table = Table(title=title)
    for number, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    if note:
        console.print(note, highlight=False, markup=False)


def finish(name: str, figures: Mapping[str, Any]) -> None:
    """Print `figures` with machine and versions as one JSON line, and write the same to runs/bench/NAME.json."""
    result = {"benchmark": name, **figures, "machine": machine(), "versions": versions()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(FOLDER / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(json.dumps(result), flush=True)
