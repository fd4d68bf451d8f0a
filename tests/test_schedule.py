"""The learning rate, and other numbers, over a stage.

python -m pytest tests/test_schedule.py
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import StageConfig
from distill.objective import Objective
from distill.schedule import learning_rate_factor, ramp

SCHEDULES = ("constant", "cosine", "linear", "wsd")
FALLING = ("cosine", "linear", "wsd")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.9])
def test_endpoints(schedule: str, warmup: float) -> None:
    start = learning_rate_factor(0.0, schedule, warmup, final=0.1)
    assert start == (1e-3 if warmup else 1.0)
    assert learning_rate_factor(warmup, schedule, warmup, final=0.1) == pytest.approx(1.0)
    end = learning_rate_factor(1.0, schedule, warmup, final=0.1)
    assert end == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert learning_rate_factor(1.2, schedule, warmup, final=0.1) == end, "a stage that is over"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_from_near_zero(schedule: str) -> None:
    for share in (0.1, 0.25, 0.5, 0.9):
        assert learning_rate_factor(0.2 * share, schedule, 0.2, final=0.0) == pytest.approx(share)
    assert learning_rate_factor(0.0, schedule, 0.2, final=0.0) == 1e-3, "the first step moves, too"


@pytest.mark.parametrize("schedule", FALLING)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_never_rises_after_warm_up(schedule: str, warmup: float) -> None:
    steps = [warmup + (1 - warmup) * index / 200 for index in range(201)]
    factors = [learning_rate_factor(progress, schedule, warmup, final=0.05) for progress in steps]
    assert all(before >= after for before, after in pairwise(factors))
    assert max(before - after for before, after in pairwise(factors)) < 0.03, "no jumps"


def test_shapes() -> None:
    """Half-way down: linear and cosine at the middle, wsd at nine tenths."""
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5), ("wsd", 0.9)):
        assert learning_rate_factor(middle, schedule, 0.0, final=0.2) == pytest.approx(0.6)
    assert learning_rate_factor(0.55, "linear", 0.1, final=0.0) == pytest.approx(0.5)
    quarter = (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate_factor(0.25, "cosine", 0.0, final=0.0) == pytest.approx(quarter)
    assert learning_rate_factor(0.79, "constant", 0.1, final=0.0) == 1.0


def test_wsd_stays_at_the_peak_until_the_last_fifth() -> None:
    assert [learning_rate_factor(p, "wsd", 0.1, 0.0) for p in (0.1, 0.4, 0.7999, 0.8)] == [1.0] * 4
    assert learning_rate_factor(0.85, "wsd", 0.1, 0.0) == pytest.approx(0.75)
    assert learning_rate_factor(0.95, "wsd", 0.1, 0.0) == pytest.approx(0.25)


@given(
    progress=st.floats(0, 1.5),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 1, exclude_max=True),
    final=st.floats(0, 1),
)
def test_always_between_final_and_the_peak(progress: float, schedule: str, warmup: float, final: float) -> None:
    factor = learning_rate_factor(progress, schedule, warmup, final)
    lowest = min(final, 1e-3) if progress < warmup else final
    assert lowest - 1e-9 <= factor <= 1 + 1e-9


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        learning_rate_factor(0.5, "step", 0.0, 0.0)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(4.0, 1.0), (0.0, 0.7), (2.0, 2.0)])
def test_a_ramp_goes_from_one_end_to_the_other(shape: str, start: float, end: float) -> None:
    values = [ramp(start, end, index / 100, shape) for index in range(101)]
    assert values[0] == start and values[-1] == pytest.approx(end) and values[50] == pytest.approx((start + end) / 2)
    assert all((after - before) * (end - start) >= 0 for before, after in pairwise(values)), "no turning back"
    assert ramp(start, end, 1.3, shape) == values[-1], "a stage that is over"


def test_shapes_of_a_ramp() -> None:
    assert ramp(4.0, 1.0, 0.25, "linear") == pytest.approx(3.25)
    assert ramp(4.0, 1.0, 0.25, "cosine") == pytest.approx(4 - 1.5 * (1 - math.cos(math.pi / 4)))
    with pytest.raises(ValueError, match="unknown shape 'step'"):
        ramp(1.0, 0.0, 0.5, "step")


def test_what_a_stage_minimises_follows_its_ramps() -> None:
    stage = StageConfig.model_validate(
        {
            "objective": {"forward_kl": {"from": 0.9, "to": 0.1}, "cross_entropy": {"from": 0, "to": 1}, "jsd": 0.5},
            "temperature": {"from": 4, "to": 1, "shape": "cosine"},
            "length": {"steps": 10}, "skew": 0.3, "jsd_beta": 0.2, "token_weights": "student_entropy",
        }
    )  # fmt: skip
    begun, half = Objective.of(stage, 0.0), Objective.of(stage, 0.5)
    assert begun.weights == {"forward_kl": 0.9, "cross_entropy": 0.0, "jsd": 0.5} and begun.temperature == 4
    assert half.weights == pytest.approx({"forward_kl": 0.5, "cross_entropy": 0.5, "jsd": 0.5})
    assert half.temperature == pytest.approx(2.5)
    assert (half.skew, half.jsd_beta, half.token_weights) == (0.3, 0.2, "student_entropy")
