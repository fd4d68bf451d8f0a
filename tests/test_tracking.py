"""Tracking: the offline wandb run is a real one, and a tracker that fails stops nothing."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, World, result_of, run_command

from distill.tracking import Tracker


def records(file: Path) -> Iterator[bytes]:
    """Records of a `.wandb` file: a LevelDB log of 32 KiB blocks, each record split into typed fragments.

    Layout: 7 bytes of file header, then fragments of checksum (4), length (2), type (1: full, 2: first, 3: middle,
    4: last) and data; what is left of a block below 7 bytes is padding.
    """
    content = file.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        data = content[position + 7 : position + 7 + length]
        position += 7 + length
        parts = data if kind in (1, 2) else parts + data
        if kind in (1, 4):
            yield parts


def history(folder: Path) -> list[dict[str, object]]:
    """Rows of metrics in the only wandb run of a run folder."""
    (file,) = folder.rglob("*.wandb")
    return rows_of(file, "history")


def rows_of(file: Path, kind: str) -> list[dict[str, object]]:
    """All `history` or `summary` records of a `.wandb` file, as rows by key."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == kind:
            items = record.history.item if kind == "history" else record.summary.update
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def test_offline_run_holds_the_curves(world: World, tmp_path: Path) -> None:
    words = (str(world.recipe), f"run.output_dir={tmp_path}", "tracking=wandb", "tracking.every=2")
    run = run_command(*words, cold=True)  # wandb's service ends with the interpreter
    assert run.returncode == 0, run.stderr
    assert "wandb sync" in run.stderr
    folder = tmp_path / "tiny"
    rows = history(folder)
    result = result_of(folder)
    for model in ("student", "control"):
        key = f"validation/nll_nats/{model}"
        found = [(row["tokens"], row[key]) for row in rows if key in row]
        assert found == [(point["tokens"], point["nll_nats"]) for point in result["curves"][model]]
        assert all("train_seconds" in row for row in rows if key in row)
    train = {key for row in rows for key in row if key.startswith("train/student/")}
    expected = "loss loss_hidden_mse loss_forward_kl learning_rate grad_norm tokens_per_second teacher_seconds_per_step"
    assert {f"train/student/{name}" for name in expected.split()} <= train
    assert any("curves" in key for row in rows for key in row), "the picture of the curves"
    assert any("validation/student_and_control" in key for row in rows for key in row), "both on one axis"
    assert any(key.startswith("samples") for row in rows for key in row)
    assert any(key.startswith("result") for row in rows for key in row)


def test_evaluations_go_into_the_same_run(world: World, tmp_path: Path) -> None:
    """Resumed by its id; also where the folder has been moved since."""
    arguments = (str(world.recipe), f"run.output_dir={tmp_path}", "tracking=wandb", "control=false")
    assert run_command(*arguments, cold=True).returncode == 0
    folder = (tmp_path / "tiny").rename(tmp_path / "moved")
    before = set(folder.rglob("*.wandb"))
    found = run_command(str(folder), launcher=("-m", "eval.perplexity"), cold=True)
    assert found.returncode == 0, found.stderr
    (file,) = set(folder.rglob("*.wandb")) - before
    assert file.name == before.pop().name, "the same id"
    summary: dict[str, object] = {}
    for row in rows_of(file, "summary"):
        summary |= {key.replace("\\", ""): value for key, value in row.items()}
    kept = json.loads((folder / "eval" / "perplexity.json").read_text(encoding="utf-8"))["models"]["student"]
    ((corpus, row),) = kept.items()
    assert summary[f"eval/perplexity/student/{corpus}/bits_per_byte"] == row["bits_per_byte"]
    assert summary[f"eval/perplexity/student/{corpus}/bits_per_byte_interval/low"] == row["bits_per_byte_interval"][0]
    # Its report: a table of all points, their plot, and the pictures.
    before = set(folder.rglob("*.wandb"))
    words = (str(folder), "--output", str(tmp_path / "report"))
    report = run_command(*words, launcher=("-m", "eval.report"), cold=True)
    assert report.returncode == 0, report.stderr
    (file,) = set(folder.rglob("*.wandb")) - before
    logged = {key for row in rows_of(file, "history") for key in row}
    for part in ("eval/frontier/points", "eval/frontier/bits_per_byte", "eval/frontier/frontier"):
        assert any(part in key for key in logged), logged


def test_lists_of_an_evaluation_are_tables() -> None:
    """Lists of one name are one table, with numbers as numbers, and say whose rows they are."""
    figures = {
        "student": {
            "by_frequency": [{"from": 0.0, "below": 0.1, "overlap": 0.5}, {"from": 0.1, "below": None, "overlap": 1}],
            "context": {"losses": [{"context": 1, "nll_nats": 2.0, "nll_nats_interval": [1.5, 2.5]}]},
            "time_constants": [{"quantiles": {"0.5": 3.0}, "units_by_octave": [{"from": 1, "units": 4}]}],
            "tokens": 7,
        },
        "control": {"by_frequency": [{"from": 0.0, "below": 0.1, "overlap": 0.25}]},
    }
    logged: dict[str, Any] = {}
    tracker = Tracker.__new__(Tracker)
    tracker._alive, tracker._run = True, SimpleNamespace(log=logged.update, summary={})
    tracker.log_evaluation("agreement", figures, [], None)
    assert tracker._alive and tracker._run.summary == {"eval/agreement/student/tokens": 7}
    found = {name: [dict(zip(table.columns, row, strict=True)) for row in table.data] for name, table in logged.items()}
    assert found == {
        "eval/agreement/by_frequency": [
            {"of": "student", "from": 0.0, "below": 0.1, "overlap": 0.5},
            {"of": "student", "from": 0.1, "below": None, "overlap": 1},
            {"of": "control", "from": 0.0, "below": 0.1, "overlap": 0.25},
        ],
        "eval/agreement/losses": [
            {
                "of": "student/context",
                "context": 1,
                "nll_nats": 2.0,
                "nll_nats_interval/low": 1.5,
                "nll_nats_interval/high": 2.5,
            }
        ],
        "eval/agreement/time_constants": [{"of": "student", "quantiles/0.5": 3.0}],
        "eval/agreement/units_by_octave": [{"of": "student/time_constants/1", "from": 1, "units": 4}],
    }


HANGING = """
import sys, time
import accelerate.tracking
import distill.tracking
distill.tracking.START_SECONDS = distill.tracking.FINISH_SECONDS = 0.5
accelerate.tracking.WandBTracker.__init__ = lambda *_, **__: time.sleep(600)
import atexit
atexit.register(time.sleep, 600)  # as its library waits for its service
from distill.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_hanging_tracker_stops_nothing(world: World, tmp_path: Path) -> None:
    """Neither the run nor its end."""
    arguments = (str(world.recipe), f"run.output_dir={tmp_path}", "tracking.tracker=wandb", "control=false")
    run = run_command(*arguments, launcher=("-c", HANGING), timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("tracking stops here, the run goes on: TimeoutError") == 1
    assert result_of(tmp_path / "tiny")["student"]["tokens"] > 0


@pytest.mark.parametrize("place", ["start", "log"])
def test_a_failing_tracker_stops_nothing(world: World, tmp_path: Path, place: str) -> None:
    """A stand-in for wandb that raises, at the start or at the first row."""
    (tmp_path / "fake").mkdir()
    method = "__init__" if place == "start" else "log"
    (tmp_path / "fake" / "sitecustomize.py").write_text(
        "import accelerate.tracking as t\n"
        "def broken(self, *a, **k): raise RuntimeError('the tracker is down')\n"
        f"t.WandBTracker.{method} = broken\n",
        encoding="utf-8",
    )
    run = run_command(
        str(world.recipe),
        f"run.output_dir={tmp_path}",
        "tracking=wandb",
        PYTHONPATH=os.pathsep.join([str(tmp_path / "fake"), str(ROOT)]),
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("tracking stops here") == 1
    assert result_of(tmp_path / "tiny")["student"]["tokens"] > 0
