"""A softmax over candidates against the one over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.candidates import Candidates, CandidateSampler
from distill.fused import StudentWithLoss
from distill.losses import DIVERGENCES
from distill.objective import Objective
from distill.signals import DenseSignal, Head, HiddenSignal, MixedSignal, Signal
from distill.student import LSTMConfig, LSTMForCausalLM

V, D, B, T = 40, 6, 2, 9
N = B * T


def labels() -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def signal(kind: str) -> Signal:
    generator = torch.Generator().manual_seed(2)
    head = Head(torch.randn(V, D, generator=generator), torch.randn(V, generator=generator), scale=0.5, softcap=5.0)
    hidden = HiddenSignal(torch.randn(N, D, generator=generator), head)
    if kind == "mixed":
        second = HiddenSignal(torch.randn(N, 3, generator=generator), Head(torch.randn(V, 3, generator=generator)))
        return MixedSignal((hidden, second), (0.25, 0.75))
    return hidden if kind == "hidden" else DenseSignal(hidden.logits(slice(None)))


def make_student() -> LSTMForCausalLM:
    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=V, embedding_size=D, hidden_size=8, num_layers=1, head_bias=True)
    student = LSTMForCausalLM(config)
    torch.nn.init.normal_(student.lm_head.weight)
    torch.nn.init.normal_(student.lm_head.bias)
    return student


def run(
    student: LSTMForCausalLM, target: Signal, objective: Objective, candidates: Candidates | None
) -> dict[str, Tensor]:
    module = StudentWithLoss(student)
    module.zero_grad()
    loss, sums, _ = module(labels(), labels(), None, None, target, objective, candidates)
    loss.backward()
    return {**sums, **{name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kind", ["dense", "hidden", "mixed"])
@pytest.mark.parametrize("frozen", [False, True])
def test_all_tokens_as_candidates_are_the_whole_softmax(kind: str, frozen: bool) -> None:
    """Values and gradients, however the candidates are chosen and drawn: the one that is left stands for itself."""
    objective = Objective({"forward_kl": 0.5, "cross_entropy": 0.3, "reverse_kl": 0.2, "skewed_forward_kl": 0.4})
    student = make_student()
    if frozen:
        student.lm_head.requires_grad_(False)
    occurrences_V = torch.arange(V)
    occurrences_V[labels().unique()] = 0  # labels are not among the frequent ones, and come in all the same
    sampler = CandidateSampler(occurrences_V, V - 1)
    sampler.drawn = 1
    candidates = sampler.draw(labels().flatten(), seed=3)
    assert candidates.ids_C.sort().values.tolist() == list(range(V))
    expected = run(student, signal(kind), objective, None)
    found = run(student, signal(kind), objective, candidates)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_normaliser_is_estimated_without_bias() -> None:
    logits_V = torch.randn(V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sampler = CandidateSampler(torch.arange(V), 10)
    draws = [sampler.draw(labels().flatten()[:3], seed) for seed in range(4000)]
    estimates = torch.stack([(logits_V[c.ids_C] + c.log_weight_C).exp().sum() for c in draws])
    error = estimates.std() / math.sqrt(len(draws))
    assert abs(estimates.mean() - logits_V.exp().sum()) < 4 * error
    assert error < 0.01 * logits_V.exp().sum()


def test_candidates_hold_frequent_tokens_labels_and_others() -> None:
    occurrences_V = torch.arange(V)
    labels_N = torch.tensor([0, 39, 7, 7])
    drawn = CandidateSampler(occurrences_V, 10).draw(labels_N, seed=0)
    certain = drawn.ids_C[: drawn.certain]
    assert certain.tolist() == [0, 7, *range(30, 40)]
    assert not set(drawn.ids_C[drawn.certain :].tolist()) & set(certain.tolist())
    assert len(drawn.ids_C) == drawn.certain + 5
    assert drawn.log_weight_C[drawn.certain :].tolist() == pytest.approx([math.log((V - 12) / 5)] * 5)
    assert drawn.ids_C[drawn.places(labels_N)].tolist() == labels_N.tolist()
    again, other = (CandidateSampler(occurrences_V, 10).draw(labels_N, seed=seed) for seed in (0, 1))
    assert torch.equal(drawn.ids_C, again.ids_C) and not torch.equal(drawn.ids_C, other.ids_C)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_divergence_is_zero_where_student_and_teacher_agree(name: str) -> None:
    student = make_student()
    with torch.no_grad():
        z_Nd = student.model(labels()).last_hidden_state.flatten(0, 1)
    target = HiddenSignal(z_Nd, Head(student.lm_head.weight.detach(), student.lm_head.bias.detach()))
    candidates = CandidateSampler(torch.arange(V), 10).draw(labels().flatten(), seed=0)
    assert run(student, target, Objective({name: 1.0}), candidates)[name].item() == pytest.approx(0, abs=1e-4)


def test_the_teachers_own_head_is_left_alone() -> None:
    target = signal("hidden")
    assert isinstance(target, HiddenSignal)
    candidates = CandidateSampler(torch.arange(V), 10).draw(labels().flatten(), seed=0)
    restricted = candidates.signal(target)
    expected = target.logits(slice(None))[:, candidates.ids_C] + candidates.log_weight_C
    torch.testing.assert_close(restricted.logits(slice(None)), expected)
    assert target.head == replace(target.head) and target.head.offset_V is None
