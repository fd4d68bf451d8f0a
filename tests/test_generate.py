"""eval.generate: its figures on texts counted by hand, and the teacher's loss of what was written.

python -m pytest tests/test_generate.py
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import World, run_eval
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from distill.teacher import load_language_model
from eval.generate import Nucleus, distinct, repetition, teacher_nll, write

CPU = torch.device("cpu")


def test_distinct_and_repetition_by_hand() -> None:
    assert distinct([[1, 2, 1], [2, 3]], 1) == pytest.approx(3 / 5)
    assert distinct([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[1]], 2) is None
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repetition([[5] * 10, list(range(10)), [1]]) == pytest.approx((6 / 7 + 0) / 2)
    assert repetition([[1, 2]]) is None


def test_the_teachers_loss_is_of_the_written_part_alone(world: World) -> None:
    model = load_language_model(str(world.teacher), device=CPU, dtype="fp32")
    prompts, texts = [[0, 5, 6], [0, 7, 8]], [[9, 10, 11, 12], []]
    found = teacher_nll(model, prompts, texts, batch=32)
    logits = model.model(torch.tensor([prompts[0] + texts[0]])).logits[0, 2:-1, : model.vocab_size]
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(texts[0])).item(), rel=1e-5)
    assert teacher_nll(model, prompts[:1], [[]], batch=32) is None


def test_writing_ends_at_the_end_of_text(world: World) -> None:
    model = load_language_model(str(world.teacher), device=CPU, dtype="fp32")
    options = argparse.Namespace(seed=0, new_tokens=200, temperature=1.0, top_p=1.0)
    texts = write(model, [[0, 5, 6]] * 8, options)
    assert all(0 not in ids for ids in texts)
    assert any(len(ids) < 200 for ids in texts) and texts[0] != texts[1]


@pytest.mark.parametrize("temperature, top_p", [(0.8, 0.95), (1.0, 0.5), (1.3, 1.0)])
def test_the_nucleus_is_that_of_the_library(temperature: float, top_p: float) -> None:
    scores_BV = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 3
    scores_BV[:, 900:] = -math.inf  # rows of the head that are no tokens
    found_BV = Nucleus(temperature, top_p)(torch.zeros(4, 1), scores_BV).softmax(-1)
    expected_BV = TemperatureLogitsWarper(temperature)(None, scores_BV)
    if top_p < 1:
        expected_BV = TopPLogitsWarper(top_p)(None, expected_BV)
    assert torch.equal(found_BV > 0, expected_BV > -math.inf)
    assert found_BV.numpy() == pytest.approx(expected_BV.softmax(-1).numpy(), rel=1e-5)


def test_the_command(world: World, other_weights: Path) -> None:
    arguments = ("--teacher", str(world.teacher), "--corpus", str(world.recipe), "--new-tokens", "12")
    size = ("--prompt-tokens", "4", "--texts", "6")
    run = run_eval("generate", str(other_weights), *arguments, *size)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    row = result["models"][str(other_weights)]
    assert 0 < row["distinct_1"] <= row["distinct_2"] <= 1 and row["texts"] == 6
    assert len(row["samples"]) == 4 and row["samples"][0]["prompt"]
    assert result["settings"]["text_itself"]["mean_length_tokens"] <= 12
    refused = run_eval("generate", str(other_weights), *arguments, "--prompt-tokens", "90")
    assert refused.returncode == 2 and "documents of more than 90 tokens" in refused.stderr
