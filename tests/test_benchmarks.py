"""The benchmarks run from end to end on toy sizes, so that they cannot rot; what they measure here means nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import World, run_command

from benchmarks import train
from distill.config import UserError

TINY = ("targets.k=8", "targets.samples=4")


def last_line(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


def test_bench_train_times_every_case_and_reports_its_ratios(world: World, tmp_path: Path) -> None:
    arguments = ["--recipe", str(world.recipe), "--repeats", "2", "--skip-trl", "--skip-memory", *TINY]
    found = run_command(*arguments, launcher=("-m", "benchmarks.train"), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    result = last_line(found.stdout)
    assert json.loads((tmp_path / "runs/bench/train.json").read_text()) == result
    rows = result["rows"]
    assert list(rows) == [case.name for case in train.cases()]
    for row in rows.values():
        assert row["steps"] == 2 and row["tokens_per_second"] == pytest.approx(64 / row["ms_per_step"] * 1000)
    ms = {name: row["ms_per_step"] for name, row in rows.items()}
    naive = min(ms[f"naive, online: forward_kl {precision}, frozen head"] for precision in ("bf16", "fp32"))
    control = ms["ours, no teacher: cross_entropy, trained head"]
    assert result["hidden_stage_vs_naive_online"] == pytest.approx(
        naive / ms["ours, cached hidden: hidden_mse, frozen head"]
    )
    assert result["online_vs_naive_online"] == pytest.approx(naive / ms["ours, online: forward_kl, frozen head"])
    assert result["cached_kl_step_vs_ce_step_by_kind"] == {
        kind: pytest.approx(ms[f"ours, cached {kind}: forward_kl, trained head"] / control)
        for kind in ("top_k", "sampled")
    }
    assert result["hidden_stage_vs_trl_gkd"] is None, "it was skipped"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_one_case_is_measured_in_a_process_of_its_own(world: World, tmp_path: Path) -> None:
    name = "ours, no teacher: cross_entropy, trained head"
    arguments = ["--recipe", str(world.recipe), "--peak-of", name, *TINY]
    found = run_command(*arguments, launcher=("-m", "benchmarks.train"), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert 100 < last_line(found.stdout)["peak_rss_mib"] < 2000


def test_a_missing_environment_of_trl_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Bench", lambda *_: SimpleNamespace(accelerator=None))
    monkeypatch.setattr(train, "leave", lambda _: None)
    options = SimpleNamespace(recipe="", overrides=[], peak_of=None, skip_trl=False)
    with pytest.raises(UserError, match="make bench-train, or --skip-trl"):
        train.benchmark(options)  # type: ignore[arg-type]
