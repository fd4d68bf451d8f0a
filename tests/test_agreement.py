"""eval.agreement against closed forms, a loop over single tokens, and synthetic models of known calibration.

python -m pytest tests/test_agreement.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World, run_eval

from distill.metrics import Documents, build_reference, score
from distill.teacher import LanguageModel, load_language_model
from eval.agreement import by_band, calibration, compare, summarise


def load(path: Path) -> LanguageModel:
    return load_language_model(str(path), device=torch.device("cpu"), dtype="fp32")


@pytest.fixture(scope="module")
def documents() -> Documents:
    rng = np.random.default_rng(1)
    lengths = np.array([7, 1, 19, 4])
    return Documents([np.concatenate(([0], rng.integers(2, 40, n))) for n in lengths], lengths * 5, lengths)


def test_every_figure_is_that_of_a_loop(world: World, other_weights: Path, documents: Documents) -> None:
    teacher, model = load(world.teacher), load(other_weights)
    reference = build_reference(teacher, documents, window=64, context=0, batch_tokens=128)
    values = compare(model, documents, reference, window=64, context=0, batch=16)
    expected: dict[str, list[float]] = {name: [] for name in ("kl", "overlap", "top1", "top5", "entropy")}
    confidence, correct = [], []
    for tokens in documents.tokens:
        p_TV, q_TV = (
            network.model.double()(torch.tensor(tokens[None, :-1])).logits[0, :, : teacher.vocab_size].softmax(-1)
            for network in (teacher, model)
        )
        for p, q, label in zip(p_TV.tolist(), q_TV.tolist(), tokens[1:], strict=True):
            p, q = np.array(p), np.array(q)
            expected["kl"].append((p * np.log(p / q)).sum())
            expected["overlap"].append(np.minimum(p, q).sum())
            expected["top1"].append(p.argmax() == q.argmax())
            expected["top5"].append(p.argmax() in np.argsort(q)[-5:])
            expected["entropy"].append(-(p * np.log(p)).sum())
            confidence.append([p.max(), q.max()])
            correct.append([p.argmax() == label, q.argmax() == label])
    for name, numbers in expected.items():
        assert getattr(values, f"{name}_M").numpy() == pytest.approx(np.array(numbers, dtype=float), abs=2e-5), name
    assert values.confidence_M2.numpy() == pytest.approx(np.array(confidence), abs=1e-5)
    assert (values.correct_M2.numpy() == np.array(correct)).all()
    assert 0 < values.top1_M.mean() < 1 and 0 < values.top5_M.mean() < 1, "else nothing was told apart"


def test_the_training_loop_and_the_protocol_agree(world: World, other_weights: Path, documents: Documents) -> None:
    teacher, model = load(world.teacher), load(other_weights)
    reference = build_reference(teacher, documents, window=64, context=0, batch_tokens=128)
    values = compare(model, documents, reference, window=64, context=0, batch=16)
    found = summarise(values, documents, torch.full((documents.targets,), 0.5))
    validated = score(model, documents, window=64, reference=reference)
    assert found["kl_to_teacher_nats"] == pytest.approx(validated.kl_to_teacher_nats, rel=1e-6)
    assert found["top1_agreement"] == validated.top1_agreement


def test_a_model_agrees_with_itself(world: World, documents: Documents) -> None:
    teacher = load(world.teacher)
    reference = build_reference(teacher, documents, window=64, context=0, batch_tokens=128)
    values = compare(teacher, documents, reference, window=64, context=0, batch=128)
    assert values.kl_M.abs().max() < 1e-6
    assert values.overlap_M.numpy() == pytest.approx(1.0, abs=1e-5)
    assert values.top1_M.all() and values.top5_M.all()


@pytest.mark.parametrize("error", [0.0, 0.1, 0.25])
def test_calibration_of_a_model_with_a_known_error(error: float) -> None:
    """Confidence 0.7 where 70 % - error are right, and 0.3 where 30 % + error are."""
    confidence = torch.tensor([0.7] * 1000 + [0.3] * 3000, dtype=torch.float64)
    right = torch.zeros(4000)
    right[: round(1000 * (0.7 - error))] = 1
    right[1000 : 1000 + round(3000 * (0.3 + error))] = 1
    found = calibration(confidence, right)
    assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-9)
    assert [row["share"] for row in found["bins"]] == pytest.approx([0.75, 0.25])
    assert [row["accuracy"] for row in found["bins"]] == pytest.approx([0.3 + error, 0.7 - error])


def test_a_confidence_of_one_falls_into_the_last_bin() -> None:
    found = calibration(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert found["expected_calibration_error"] == pytest.approx(0.25)


def test_bands_part_the_targets(world: World, documents: Documents) -> None:
    teacher = load(world.teacher)
    reference = build_reference(teacher, documents, window=64, context=0, batch_tokens=128)
    values = compare(teacher, documents, reference, window=64, context=0, batch=128)
    key = torch.arange(documents.targets, dtype=torch.float64) / 20  # some lie on an edge
    bands = by_band(values, key, (0.25, 0.5, 2.0))
    assert [(band["from"], band["below"]) for band in bands] == [(0.0, 0.25), (0.25, 0.5), (0.5, 2.0)]
    assert sum(band["share"] for band in bands) == pytest.approx(1.0)
    assert bands[0]["share"] == pytest.approx((key < 0.25).double().mean().item())


def test_the_command_and_its_refusal_of_another_vocabulary(
    world: World, other_weights: Path, other_teacher: Path
) -> None:
    arguments = ("--teacher", str(world.teacher), "--corpus", str(world.recipe), "--max-tokens", "300")
    run = run_eval("agreement", str(other_weights), *arguments)
    assert run.returncode == 0, run.stderr
    row = json.loads(run.stdout.splitlines()[-1])["models"][str(other_weights)]
    low, high = row["overlap_interval"]
    assert low < row["overlap"] < high < 1
    assert row["tokens"] <= 300
    refused = run_eval("agreement", str(other_teacher), *arguments)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "vocabulary of" in refused.stderr and "eval.perplexity" in refused.stderr
