"""Weights of tokens over a whole step; in one call they are in `test_fused.py` and `test_sparse_losses.py`.

Over processes, accumulation and a stop they are in `test_invariance.py`.

    python -m pytest tests/test_token_weights.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import World

from distill import objective
from distill.job import run
from distill.recipe import load_recipe


def test_weights_of_tokens_have_mean_one(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tokens weigh the same, however much, a run is that without weights."""

    def logged(name: str, *overrides: str) -> list[dict[str, float]]:
        stage = {"objective": {"forward_kl": 0.8, "cross_entropy": 0.2}, "optimizer": "sgd", "length": {"steps": 4}}
        common = (f"stages={json.dumps([stage])}", "stages.0.learning_rate=0.5", "run.max_grad_norm=null")
        run(load_recipe(world.recipe, [f"run.output_dir={tmp_path / name}", "control=false", *common, *overrides]))
        log = (tmp_path / name / "tiny" / "student.log.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if "loss" in key} for line in log]

    monkeypatch.setattr(objective, "_teacher_weights", lambda _, teacher: torch.full_like(teacher.log_total_N1, 7.0))
    plain, weighted = logged("plain"), logged("weighted", "stages.0.token_weights=teacher_entropy")
    for row, expected in zip(weighted, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
