"""What must not change the result, through the real command: accumulation, processes, being killed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, World, result_of, run_command
from safetensors.torch import load_file

RAMPED = {
    "objective": {"forward_kl": {"from": 0.9, "to": 0.1}, "cross_entropy": {"from": 0.1, "to": 0.9, "shape": "cosine"}},
    "temperature": {"from": 3, "to": 1},
    "token_weights": "teacher_entropy",
    "length": {"steps": 8},
}
STAGES = (
    {"objective": "hidden_mse", "freeze": ["embedding", "head"], "length": {"steps": 12}},
    {"objective": {"forward_kl": 0.8, "cross_entropy": 0.2}, "length": {"steps": 16}, "candidates": 12},
    RAMPED,
)
LENGTHS = (
    f"stages={json.dumps(STAGES, separators=(',', ':'))}",  # one word in any shell
    "evaluation.every.steps=7",
    "control=false",
)
OPTIMIZERS = {
    "adamw": tuple(f"stages.{number}.learning_rate=0.01" for number in range(3)),
    "sgd": (
        *(f"stages.{number}.{field}" for number in range(3) for field in ("optimizer=sgd", "learning_rate=0.5")),
        "run.max_grad_norm=null",
    ),
}
NOT_COMPARED = {
    "seconds",
    "tokens_per_second",
    "teacher_seconds_per_step",
    "student_seconds_per_step",
    "stage_name",
}


def log_of(folder: Path, name: str = "student") -> list[dict[str, Any]]:
    lines = (folder / f"{name}.log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED} for line in lines]


def points_of(folder: Path, name: str = "student") -> list[dict[str, Any]]:
    return [{k: v for k, v in point.items() if k not in NOT_COMPARED} for point in result_of(folder)["curves"][name]]


def assert_same_trajectory(first: Path, second: Path, *, bitwise: bool = False) -> None:
    for one, other in ((log_of(first), log_of(second)), (points_of(first), points_of(second))):
        assert len(one) == len(other) > 3
        for a, b in zip(one, other, strict=True):
            assert a == b if bitwise else a == pytest.approx(b, rel=2e-4, abs=1e-6)
    weights, others = (load_file(folder / "student" / "model.safetensors") for folder in (first, second))
    for name, weight in weights.items():
        if bitwise:
            assert torch.equal(weight, others[name]), name
        else:
            torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=2e-5)


def train(world: World, folder: Path, *overrides: str, launcher: tuple[str, ...] = ("distill/run.py",)) -> Path:
    run = run_command(str(world.recipe), f"run.output_dir={folder}", *overrides, launcher=launcher)
    assert run.returncode == 0, run.stderr
    return folder / "tiny"


@pytest.fixture(scope="module", params=sorted(OPTIMIZERS))
def reference(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    """An undisturbed run of one process, and the overrides that made it."""
    overrides = (*LENGTHS, *OPTIMIZERS[request.param])
    return train(world, tmp_path_factory.mktemp(request.param), *overrides), overrides


def test_training_moves_and_is_logged(reference: tuple[Path, tuple[str, ...]]) -> None:
    """The comparisons below would pass on a run that learns nothing; this one does not."""
    log = log_of(reference[0])
    assert [row["step"] for row in log] == list(range(1, 37))
    # The fit before the first step has seen the first two steps' blocks, so the third is where training begins.
    assert log[11]["loss"] < 0.9 * log[2]["loss"]
    assert all(row["grad_norm"] > 0 for row in log)
    for step, row in enumerate(log[28:]):
        weights = 0.9 - 0.8 * step / 8, 0.5 - 0.4 * math.cos(math.pi * step / 8)
        expected = weights[0] * row["loss_forward_kl"] + weights[1] * row["loss_cross_entropy"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulation_changes_nothing(reference: tuple[Path, tuple[str, ...]], world: World, tmp_path: Path) -> None:
    folder, overrides = reference
    accumulated = train(world, tmp_path, *overrides, "run.micro_batch_size=1")
    assert_same_trajectory(folder, accumulated)


def test_two_processes_equal_one(reference: tuple[Path, tuple[str, ...]], world: World, tmp_path: Path) -> None:
    folder, overrides = reference
    both = train(world, tmp_path, *overrides, launcher=("-m", "distill.launch", "--processes", "2"))
    assert result_of(both)["processes"] == 2
    assert_same_trajectory(folder, both)


def interrupted(world: World, folder: Path, overrides: tuple[str, ...], after_step: int, signum: int) -> int:
    """Start the command, send a signal to it once the log has reached a step, return its exit code."""
    log = folder / "tiny" / "student.log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "distill/run.py", str(world.recipe), f"run.output_dir={folder}", *overrides],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        if log.exists() and log.read_text(encoding="utf-8").count("\n") >= after_step:
            process.send_signal(signum)
            break
        time.sleep(0.002)
    return process.wait(timeout=60)


def test_killed_and_resumed_equals_uninterrupted(
    reference: tuple[Path, tuple[str, ...]], world: World, tmp_path: Path
) -> None:
    """SIGKILL in the first stage, then in the last with its ramps, then a third start: bit-equal losses and weights."""
    folder, overrides = reference
    frequent = (*overrides, "run.checkpoint_every.steps=3")
    assert interrupted(world, tmp_path, frequent, 5, signal.SIGKILL) == -signal.SIGKILL
    assert interrupted(world, tmp_path, frequent, 32, signal.SIGKILL) == -signal.SIGKILL
    resumed = train(world, tmp_path, *frequent)
    assert_same_trajectory(folder, resumed, bitwise=True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_save_and_leave(world: World, tmp_path: Path, signum: int) -> None:
    overrides = (*LENGTHS, *OPTIMIZERS["adamw"], "stages.0.length.steps=400", "stages.1.length.steps=1")
    assert interrupted(world, tmp_path, overrides, 9, signum) == 128 + signum
    saved = list((tmp_path / "tiny" / "checkpoints" / "student").glob("step-*"))
    assert saved, "no interval was due, so only the signal can have saved"
    steps = json.loads((saved[-1] / "state.json").read_text(encoding="utf-8"))["now"]["steps"]
    assert 9 <= steps < 400


def test_dropout_and_carried_state_resume(world: World, tmp_path: Path) -> None:
    """So are random numbers, the lanes' states and the projections of layer_mse: bit-equal without resets too."""
    overrides = (
        *LENGTHS, "student.num_layers=2", "stages.0.objective={hidden_mse: 1.0, layer_mse: 0.5}",
        "student.output_dropout=0.2", "student.recurrent_dropout=0.2", "corpus.reset_at_documents=false",
        "run.checkpoint_every.steps=3", "run.micro_batch_size=4",
    )  # fmt: skip
    whole = train(world, tmp_path / "whole", *overrides)
    assert interrupted(world, tmp_path / "killed", overrides, 8, signal.SIGKILL) == -signal.SIGKILL
    assert_same_trajectory(whole, train(world, tmp_path / "killed", *overrides), bitwise=True)


def test_a_stream_is_shared_out_and_goes_on_exactly(world: World, tmp_path: Path) -> None:
    """Parquet shards over several epochs: killed and resumed it is bit-equal, in two processes equal."""
    (shards := tmp_path / "shards").mkdir()
    texts = [json.loads(line)["text"] for line in world.text.read_text(encoding="utf-8").splitlines()]
    for number in range(5):
        table = pyarrow.table({"text": texts[number::5]})
        pyarrow.parquet.write_table(table, shards / f"{number}.parquet", row_group_size=30)
    overrides = (
        *LENGTHS, *OPTIMIZERS["adamw"], f"corpus.source={shards}", "corpus.streaming=true", "run.batch_size=32",
        "corpus.sample_documents=150", "corpus.shuffle_buffer=50", "stages.1.length.steps=70",
    )  # fmt: skip
    whole = train(world, tmp_path / "whole", *overrides, "run.keep_checkpoints=1")
    state = json.loads(next((whole / "checkpoints" / "student").glob("step-*/state.json")).read_text(encoding="utf-8"))
    assert state["stream"]["epoch"] > 1
    frequent = (*overrides, "run.checkpoint_every.steps=3")
    assert interrupted(world, tmp_path / "killed", frequent, 45, signal.SIGKILL) == -signal.SIGKILL
    assert_same_trajectory(whole, train(world, tmp_path / "killed", *frequent), bitwise=True)
    both = train(world, tmp_path / "both", *overrides, launcher=("-m", "distill.launch", "--processes", "2"))
    assert result_of(both)["processes"] == 2
    assert_same_trajectory(whole, both)
