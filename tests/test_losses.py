"""The divergences against their definitions.

`definition` below is the textbook formula, softmax and all, in whatever type its arguments have. In fp64
it is the oracle; its own error in fp32 says how much rounding a right implementation may show.

    python -m pytest tests/test_losses.py

Legend as in `distill/losses.py`: N tokens, V vocabulary, p the teacher, q the student, T the temperature.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill import losses

NAMES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "skewed_forward_kl", "skewed_reverse_kl")
CONSTANTS = {"jsd": "beta", "skewed_forward_kl": "skew", "skewed_reverse_kl": "skew"}
SMALL = 4  # times the oracle's own error in fp32
EPS = torch.finfo(torch.float32).eps


def softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    powers_NV = torch.exp(logits_NV / temperature)
    return powers_NV / powers_NV.sum(-1, keepdim=True)


def definition(
    name: str, student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, constant: float = 0.5
) -> Tensor:
    """One number per row (N,), T^2 included; the constant is beta of jsd, and the skew of the skewed ones."""
    p_NV, q_NV = softmax(teacher_NV, temperature), softmax(student_NV, temperature)
    beta, m_NV = constant, constant * p_NV + (1 - constant) * q_NV

    def kl(a_NV: Tensor, b_NV: Tensor) -> Tensor:
        return (a_NV * torch.log(a_NV / b_NV)).sum(-1)

    value_N = {
        "forward_kl": lambda: kl(p_NV, q_NV),
        "reverse_kl": lambda: kl(q_NV, p_NV),
        "jsd": lambda: beta * kl(p_NV, m_NV) + (1 - beta) * kl(q_NV, m_NV),
        "total_variation": lambda: (p_NV - q_NV).abs().sum(-1) / 2,
        "skewed_forward_kl": lambda: kl(p_NV, m_NV),
        "skewed_reverse_kl": lambda: kl(q_NV, (1 - constant) * p_NV + constant * q_NV),
    }[name]()
    return temperature**2 * value_N


def logits(rows: int = 6, vocabulary: int = 11, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, fp64 numbers that fp32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, vocabulary, generator=generator) * scale
    return pair[0].double(), pair[1].double()


def divergence(name: str, student_NV: Tensor, teacher_NV: Tensor, temperature: float, constant: float) -> Tensor:
    extra = {CONSTANTS[name]: constant} if name in CONSTANTS else {}
    return losses.DIVERGENCES[name](student_NV, teacher_NV, temperature, **extra)


def allowed(name: str, student_NV: Tensor, teacher_NV: Tensor, *constants: float) -> float:
    """A few times the worst error of one row of the definition in fp32, for every row of the sum."""
    exact_N = definition(name, student_NV, teacher_NV, *constants)
    rounded_N = definition(name, student_NV.float(), teacher_NV.float(), *constants)
    worst = (rounded_N.double() - exact_N).abs().max().item()
    return SMALL * len(exact_N) * max(worst, EPS * exact_N.max().item())


CASES = [
    *((name, temperature, 0.5) for name in NAMES for temperature in (0.5, 1.0, 3.0)),
    *((name, 2.0, constant) for name in CONSTANTS for constant in (0.01, 0.1, 0.9, 0.99)),
]


@pytest.mark.parametrize(("name", "temperature", "beta"), CASES)
def test_value_is_the_definition_summed_over_tokens(name: str, temperature: float, beta: float) -> None:
    student_NV, teacher_NV = logits()
    expected = definition(name, student_NV, teacher_NV, temperature, beta).sum()
    found = divergence(name, student_NV, teacher_NV, temperature, beta)
    assert found.shape == () and found.dtype == torch.float32
    assert abs(found.item() - expected.item()) <= allowed(name, student_NV, teacher_NV, temperature, beta)


@pytest.mark.parametrize(("name", "temperature", "beta"), CASES)
def test_gradient_is_that_of_the_definition(name: str, temperature: float, beta: float) -> None:
    def gradient(student_NV: Tensor, function) -> Tensor:
        leaf_NV = student_NV.clone().requires_grad_()
        function(leaf_NV).backward()
        return leaf_NV.grad

    student_NV, teacher_NV = logits()
    exact = gradient(student_NV, lambda z: definition(name, z, teacher_NV, temperature, beta).sum())
    rounded = gradient(student_NV.float(), lambda z: definition(name, z, teacher_NV.float(), temperature, beta).sum())
    found = gradient(student_NV.float(), lambda z: divergence(name, z, teacher_NV.float(), temperature, beta))
    error = max((rounded - exact).norm().item(), EPS * exact.norm().item())
    assert (found - exact).norm().item() <= SMALL * error

    # And without autograd: central differences of the definition in fp64.
    step, differences_NV = 1e-5, torch.zeros_like(student_NV)
    for index in range(student_NV.numel()):
        for sign in (1, -1):
            moved_NV = student_NV.clone()
            moved_NV.view(-1)[index] += sign * step
            value = definition(name, moved_NV, teacher_NV, temperature, beta).sum()
            differences_NV.view(-1)[index] += sign * value / (2 * step)
    assert (differences_NV - exact).norm() <= 1e-7 * exact.norm()


def test_two_outcomes_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2); natural logarithms."""
    teacher_NV = torch.tensor([[math.log(3.0), 0.0]])
    student_NV = torch.tensor([[0.7, 0.7]])
    by_hand = {
        "forward_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverse_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "total_variation": 0.25,
        "jsd": 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3))
        + 0.5 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)),
        # At the default skew of 0.1 the mixtures are (0.525, 0.475) and (0.725, 0.275).
        "skewed_forward_kl": 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475),
        "skewed_reverse_kl": 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275),
    }
    for name, value in by_hand.items():
        assert losses.DIVERGENCES[name](student_NV, teacher_NV).item() == pytest.approx(value, rel=8 * EPS)
    labels_N = torch.tensor([1])
    assert losses.cross_entropy(teacher_NV, labels_N).item() == pytest.approx(math.log(4), rel=8 * EPS)


@pytest.mark.parametrize("name", NAMES)
def test_zero_where_the_two_agree_and_positive_elsewhere(name: str) -> None:
    student_NV, teacher_NV = logits(rows=50)
    shifted_NV = teacher_NV + torch.arange(50.0)[:, None]  # the same distributions, other logits
    for temperature in (1.0, 2.0):
        same = divergence(name, teacher_NV, teacher_NV, temperature, 0.3)
        assert abs(same.item()) <= 50 * temperature**2 * EPS
        # A shift by 50 costs the logits a relative 50 EPS; the divergences are of second or first order in it.
        shifted = divergence(name, shifted_NV, teacher_NV, temperature, 0.3)
        assert abs(shifted.item()) <= 50 * temperature**2 * 50 * EPS
        assert divergence(name, student_NV, teacher_NV, temperature, 0.3) > 50 * temperature**2 * 1e-3


def test_jsd_joins_the_two_directions_of_kl() -> None:
    """jsd(beta) / beta -> KL(p || q) as beta -> 0, and jsd(beta) / (1 - beta) -> KL(q || p) as beta -> 1."""
    student_NV, teacher_NV = logits(scale=1.0)
    forward = losses.forward_kl(student_NV, teacher_NV).item()
    reverse = losses.reverse_kl(student_NV, teacher_NV).item()
    assert abs(forward - reverse) > 0.05 * forward, "the test cannot tell the two apart"
    small = 1e-3
    assert losses.jsd(student_NV, teacher_NV, beta=small).item() / small == pytest.approx(forward, rel=0.01)
    assert losses.jsd(student_NV, teacher_NV, beta=1 - small).item() / small == pytest.approx(reverse, rel=0.01)
    # At 1/2 it does not matter who is who, and it never exceeds ln 2 a token.
    there, back = losses.jsd(student_NV, teacher_NV), losses.jsd(teacher_NV, student_NV)
    assert there.item() == pytest.approx(back.item(), rel=1e-5)
    apart_NV = torch.tensor([[50.0, 0.0]])
    assert losses.jsd(apart_NV, -apart_NV).item() == pytest.approx(math.log(2), rel=1e-6)


def test_forward_kl_is_the_teacher_first() -> None:
    """A student that misses one of the teacher's two modes: KL(p || q) is large, KL(q || p) is ln 2."""
    teacher_NV, student_NV = torch.tensor([[0.0, 0.0]]), torch.tensor([[20.0, 0.0]])
    assert losses.forward_kl(student_NV, teacher_NV).item() == pytest.approx(10 - math.log(2), rel=1e-4)
    assert losses.reverse_kl(student_NV, teacher_NV).item() == pytest.approx(math.log(2), rel=1e-4)


def test_skew_bounds_what_one_token_can_cost() -> None:
    """Where one side holds impossible what the other is sure of, KL is as large as the logits and these -log(skew)."""
    student_NV, teacher_NV = torch.tensor([[900.0, 0.0]]), torch.tensor([[0.0, 900.0]])
    for name in ("skewed_forward_kl", "skewed_reverse_kl"):
        for skew in (0.1, 0.5):
            found = losses.DIVERGENCES[name](student_NV, teacher_NV, skew=skew).item()
            assert found == pytest.approx(-math.log(skew), rel=1e-6), name
        assert losses.DIVERGENCES[name.removeprefix("skewed_")](student_NV, teacher_NV).item() == 900


@pytest.mark.parametrize("name", NAMES)
def test_sums_not_means(name: str) -> None:
    student_NV, teacher_NV = logits(rows=9)
    whole = divergence(name, student_NV, teacher_NV, 2.0, 0.3).item()
    parts = [divergence(name, student_NV[rows], teacher_NV[rows], 2.0, 0.3).item() for rows in (slice(4), slice(4, 9))]
    assert whole == pytest.approx(sum(parts), rel=1e-5)
    twice = divergence(name, student_NV.repeat(2, 1), teacher_NV.repeat(2, 1), 2.0, 0.3).item()
    assert twice == pytest.approx(2 * whole, rel=1e-5)


def test_cross_entropy_and_hidden_mse() -> None:
    student_NV, _ = logits(rows=7)
    labels_N = torch.arange(7) % student_NV.shape[1]
    by_row = [-math.log(softmax(row[None], 1.0)[0, label]) for row, label in zip(student_NV, labels_N, strict=True)]
    found = losses.cross_entropy(student_NV, labels_N)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(sum(by_row), rel=8 * EPS)

    # Sum over tokens, mean over the d dimensions.
    student_Nd, teacher_Nd = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert losses.hidden_mse(student_Nd, teacher_Nd).item() == (1 + 4) / 2 + 9 / 2
    student_Nd.requires_grad_()
    losses.hidden_mse(student_Nd, teacher_Nd).backward()
    assert torch.equal(student_Nd.grad, torch.tensor([[1.0, 2.0], [-3.0, 0.0]]))


@pytest.mark.parametrize("name", (*NAMES, "cross_entropy", "hidden_mse"))
def test_half_precision_inputs_are_computed_in_fp32(name: str) -> None:
    student_NV, teacher_NV = (x.bfloat16() for x in logits(rows=40))
    labels_N = torch.arange(40) % 11

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        if name == "cross_entropy":
            return losses.cross_entropy(student, labels_N)
        return {**losses.DIVERGENCES, "hidden_mse": losses.hidden_mse}[name](student, teacher)

    found = call(student_NV.requires_grad_(), teacher_NV)
    assert found.dtype == torch.float32
    assert torch.equal(found, call(student_NV.float(), teacher_NV.float()))
    found.backward()
    assert student_NV.grad.dtype == torch.bfloat16 and torch.isfinite(student_NV.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", (0.5, 1.0, 10.0))
def test_extreme_logits_stay_finite(name: str, temperature: float) -> None:
    big = 1e4
    student_NV = torch.tensor([[big, -big, 0.0], [-big, big, 0.0], [big, big, big], [big, -big, -big]])
    teacher_NV = torch.tensor([[big, -big, 0.0], [big, -big, 0.0], [-big, big, 0.0], [-big, -big, -big]])
    student_NV.requires_grad_()
    found = divergence(name, student_NV, teacher_NV, temperature, 0.5)
    found.backward()
    assert torch.isfinite(found) and found >= 0
    assert torch.isfinite(student_NV.grad).all()


@pytest.mark.parametrize(
    ("name", "curvature"),
    [
        *(("forward_kl", 1.0), ("reverse_kl", 1.0), ("jsd", 0.3 * 0.7)),
        *(("skewed_forward_kl", 0.7**2), ("skewed_reverse_kl", 0.7**2)),
    ],
)
def test_gradient_keeps_its_size_as_the_temperature_grows(name: str, curvature: float) -> None:
    """T^2 KL tends to |z - t|^2 / 2V of centred logits (Hinton, Vinyals, Dean 2015, section 2.1); without the T^2
    the gradient would fall like 1/T^2, with T it would fall like 1/T."""
    student_NV, teacher_NV = logits()
    limit_NV = student_NV - teacher_NV
    limit_NV = curvature * (limit_NV - limit_NV.mean(-1, keepdim=True)) / student_NV.shape[1]
    for temperature in (100.0, 1000.0):
        leaf_NV = student_NV.float().requires_grad_()
        divergence(name, leaf_NV, teacher_NV.float(), temperature, 0.3).backward()
        # Third-order terms fall like 1/T; what is rounded in q - p comes back multiplied by T.
        slack = 8 / temperature + temperature * EPS
        assert (leaf_NV.grad - limit_NV).norm() <= slack * limit_NV.norm()
