"""Sparse signals in the losses and in the fused gradient, against autograd over all outcomes.

Legend: N tokens, V vocabulary, K outcomes.
"""

from __future__ import annotations

import pytest
import torch
from test_losses import CONSTANTS
from torch import Tensor

from distill import losses
from distill.config import TokenWeights
from distill.objective import WEIGHT_SUM, Objective
from distill.signals import SparseSignal, sample, top_k

N, V = 6, 23
CPU = torch.device("cpu")
DIVERGENCES = tuple(losses.DIVERGENCES)


def logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def eager(name: str, student_NV: Tensor, signal: SparseSignal) -> Tensor:
    """A sparse divergence by its definition."""
    if signal.tail_N is None:
        return losses.sampled_forward_kl(student_NV, signal)
    student_NL, teacher_NL = losses.coarsen(student_NV, signal)
    return signal.temperature**2 * dense_divergence(name, student_NL, teacher_NL)


def dense_divergence(name: str, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return losses.DIVERGENCES[name](student_NV, teacher_NV, **({CONSTANTS[name]: 0.3} if name in CONSTANTS else {}))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_value_and_gradient(name: str, k: int, temperature: float) -> None:
    signal = top_k(logits(1) / temperature, k, temperature)
    student_NV = logits(2).requires_grad_()
    expected = eager(name, student_NV, signal)
    expected.backward()
    objective = Objective({name: 1.0}, temperature, jsd_beta=0.3, skew=0.3)
    sums, gradient_NV = objective.gradient(student_NV.detach(), torch.zeros(N, dtype=torch.long), signal)
    torch.testing.assert_close(sums[name], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_NV, student_NV.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_outcomes_give_the_dense_divergence(name: str) -> None:
    """k = V, and fewer outcomes never more than that (data processing inequality)."""
    student_NV, teacher_NV = logits(2), logits(1)
    dense = dense_divergence(name, student_NV, teacher_NV)
    values = [eager(name, student_NV, top_k(teacher_NV, k, 1.0)).item() for k in (1, 3, 10, V)]
    assert values[-1] == pytest.approx(dense.item(), rel=1e-4)
    assert all(fewer <= more + 1e-4 for fewer, more in zip(values, values[1:], strict=False))
    assert values[0] < 0.9 * values[-1]


def test_sampled_value_and_gradient() -> None:
    signal = sample(logits(1) / 2, 5, 2.0, torch.linspace(0.1, 0.9, N))
    student_NV = logits(2).requires_grad_()
    expected = eager("forward_kl", student_NV, signal) + losses.cross_entropy(student_NV, torch.arange(N))
    expected.backward()
    objective = Objective({"forward_kl": 1.0, "cross_entropy": 1.0}, temperature=2.0)
    sums, gradient_NV = objective.gradient(student_NV.detach(), torch.arange(N), signal)
    torch.testing.assert_close(sums["forward_kl"] + sums["cross_entropy"], expected.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient_NV, student_NV.grad, rtol=1e-3, atol=1e-5)


def test_sampled_gradient_and_value_are_unbiased() -> None:
    """The mean over 4,000 samples is the dense one, within 1 % of its size."""
    draws, student_1V, teacher_1V = 4000, logits(2)[:1], logits(1)[:1]
    signal = sample(teacher_1V.expand(draws, V), 4, 1.0, torch.rand(draws, generator=torch.Generator().manual_seed(0)))
    sums, gradient_NV = Objective({"forward_kl": 1.0}).gradient(
        student_1V.expand(draws, V), torch.zeros(draws, dtype=torch.long), signal
    )
    dense, dense_1V = Objective({"forward_kl": 1.0}).gradient(student_1V, torch.zeros(1, dtype=torch.long), teacher_1V)
    assert sums["forward_kl"].item() / draws == pytest.approx(dense["forward_kl"].item(), rel=0.02)
    assert (gradient_NV.mean(0) - dense_1V[0]).norm() <= 0.02 * dense_1V.norm()


def entropy(probs_NX: Tensor) -> Tensor:
    return -(probs_NX * probs_NX.log()).sum(-1)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        *(("top_k", name) for name in ("teacher_entropy", "teacher_confidence", "student_entropy")),
        *(("sampled", name) for name in ("teacher_entropy", "student_entropy")),
    ],
)
def test_weights_of_tokens(kind: str, weights: TokenWeights) -> None:
    """Each row's own loss and gradient, times a weight from the definition: of k outcomes and a tail, or of all."""
    T, sharpness_N1, labels_N = 2.0, torch.linspace(0.3, 2, N)[:, None], torch.arange(N)
    student_NV, teacher_NV = logits(2) * sharpness_N1, logits(1) * sharpness_N1
    p_NV, q_NV = torch.softmax(teacher_NV / T, -1), torch.softmax(student_NV / T, -1)
    if kind == "top_k":
        signal = top_k(teacher_NV / T, 4, T)
        p_NV = torch.cat([signal.probs_NK, 1 - signal.probs_NK.sum(-1, keepdim=True)], 1)
    else:
        signal = sample(teacher_NV / T, 4, T, torch.linspace(0.1, 0.9, N))
    weight_N = {
        "teacher_entropy": entropy(p_NV),
        "teacher_confidence": torch.softmax(teacher_NV / T, -1).amax(-1),
        "student_entropy": entropy(q_NV),
    }[weights]
    assert weight_N.max() > 1.2 * weight_N.min()
    terms = {"forward_kl": 0.7, "cross_entropy": 0.3}
    sums, gradient_NV = Objective(terms, T, token_weights=weights).gradient(student_NV, labels_N, signal)
    rows = [
        Objective(terms, T).gradient(student_NV[n : n + 1], labels_N[n : n + 1], signal.rows(slice(n, n + 1), CPU))
        for n in range(N)
    ]
    for name in terms:
        expected = sum(weight * row[name] for weight, (row, _) in zip(weight_N, rows, strict=True))
        torch.testing.assert_close(sums[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums[WEIGHT_SUM], weight_N.sum(), rtol=1e-4, atol=0)
    expected_NV = weight_N[:, None] * torch.cat([gradient for _, gradient in rows])
    torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-3, atol=1e-5)


def test_what_would_be_wrong_is_refused() -> None:
    signal = sample(logits(1), 4, 1.0, torch.rand(N))
    for objective in (
        *(Objective({name: 1.0}) for name in DIVERGENCES if name != "forward_kl"),
        Objective({"forward_kl": 1.0}, temperature=2.0),
        Objective({"forward_kl": 1.0}, token_weights="teacher_confidence"),
    ):
        with pytest.raises(ValueError, match="biased|temperature|likeliest"):
            objective.gradient(logits(2), torch.zeros(N, dtype=torch.long), signal)
