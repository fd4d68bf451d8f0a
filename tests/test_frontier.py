"""recipes/frontier.yaml at toy scale: students of several sizes from one cache, and what make runs.

python -m pytest tests/test_frontier.py
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, World, result_of, run_command


def test_two_sizes_share_one_cache(world: World, tmp_path: Path) -> None:
    toy = [
        *(f"run.output_dir={tmp_path}", "run.threads=1", "run.precision=fp32", "tracking=none", "student.num_layers=1"),
        *(f"teacher.model={world.teacher}", "teacher.dtype=fp32", "teacher.context=4", "student.fit_tokens=128"),
        *(f"corpus.source={world.text}", "corpus.text_field=text", "corpus.separator=<|end|>"),
        *("corpus.block_length=8", f"corpus.cache_dir={tmp_path / 'cache'}", "targets.max_tokens=512"),
        *(
            "stages.0.length.steps=3",
            "stages.1.length.steps=3",
            "stages.0.candidates=12",
            "stages.1.candidates=12",
            "evaluation.every.steps=3",
        ),
        *("evaluation.new_tokens=2", "evaluation.decode_seconds=0.1"),
    ]
    logs = []
    for size in ("8", "12"):
        name = (f"run.name=frontier-{size}", f"student.hidden_size={size}")
        run = run_command(str(ROOT / "recipes/frontier.yaml"), *toy, *name)
        assert run.returncode == 0, run.stderr
        logs.append(run.stderr)
    assert "hidden targets" in logs[0] and "hidden targets" not in logs[1], "the second finds them built"
    assert len(list((tmp_path / "cache" / "targets").iterdir())) == 1
    small, large = (result_of(tmp_path / f"frontier-{size}") for size in ("8", "12"))
    assert small["targets"]["cached"] and small["targets"] == large["targets"]
    assert small["student"]["parameters"] < large["student"]["parameters"]
    assert small["teacher"]["nll_nats"] == large["teacher"]["nll_nats"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_frontier_sweeps_at_least_four_sizes_and_ends_in_the_page() -> None:
    run = subprocess.run(["make", "-n", "frontier"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "for size in 256 512 768 1024; do" in run.stdout
    last = [line for line in run.stdout.splitlines() if "eval." in line][-1]  # make within make says more after it
    assert "eval.report runs/frontier-256 runs/frontier-512 runs/frontier-768 runs/frontier-1024 --measure" in last


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("built", [True, False])
def test_make_frontier_times_the_teacher_in_a_llama_cpp_that_is_built(tmp_path: Path, built: bool) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv-llama").mkdir()
    if built:
        (tmp_path / ".venv-llama" / ".done").touch()
    run = subprocess.run(["make", "-n", "frontier"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (last,) = (line for line in run.stdout.splitlines() if "eval.report" in line)
    assert ("POTSTILL_LLAMA_PYTHON=.venv-llama/bin/python " in last) == built
