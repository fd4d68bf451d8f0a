"""How every measurement reports: a table for people, then one JSON object as the last line."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text


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


def print_table(title: str, rows: Sequence[Mapping[str, str]], note: str = "", console: Console | None = None) -> None:
    """Keys are the columns; what a row lacks is a dash. Numbers are formatted by the caller. `note` goes below.

    All of it is shown as it stands: names come from files, and rich would take [x] in them for its own markup.
    """
    table = Table(title=Text(title, style="table.title"))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(Text(row.get(column, "–")) for column in columns))
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if note:
        console.print(note, highlight=False, markup=False)


def print_json(content: Mapping[str, Any]) -> None:
    """One line, the last of the output, for programs."""
    print(json.dumps(content), flush=True)
