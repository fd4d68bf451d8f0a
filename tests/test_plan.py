"""The plan's arithmetic by hand, and the command on toy sizes.

python -m pytest tests/test_plan.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import World, run_command

from distill.config import Length, Recipe
from distill.plan import Measured, forecast, intervals, steps_in
from distill.train import Rehearsal

TIMES = Rehearsal(step=0.5, teacher=0.3, metric=2.0, checkpoint=1.0)
MEASURED = Measured(
    start=10.0, load=20.0, reference=8.0, validation=4.0, best=1.0, groundwork=6.0,
    stages=(TIMES, Rehearsal(step=0.25, teacher=0.0, metric=0.0, checkpoint=1.0)),
    control=Rehearsal(step=0.2, teacher=0.0, metric=0.0, checkpoint=1.0),
    teacher_decode_rate=16.0, student_decode_rate=64.0, targets_rate=1000.0, bytes_per_token=100.0,
    target_tokens=50_000, train_tokens=100_000, tokens_per_step=1000,
    teacher_bytes=1, student_bytes=1, peak_bytes=1,
)  # fmt: skip


def recipe(**fields: object) -> Recipe:
    """100 steps by tokens, then a minute; a validation every 40 steps; the control for the same wall time."""
    given = {
        "run": {"name": "x", "batch_size": 10, "checkpoint_every": {"steps": 60}},
        "teacher": {"model": "m"},
        "corpus": {"source": "s", "block_length": 100},
        "stages": [
            {"objective": "forward_kl", "length": {"tokens": 99_500}},
            {"objective": "cross_entropy", "length": {"minutes": 1}},
        ],
        "evaluation": {"every": {"steps": 40}, "decode_seconds": 3, "new_tokens": 32, "prompts": ["a", "b"]},
        **fields,
    }
    return Recipe.model_validate(given)


def test_a_run_by_hand() -> None:
    found = forecast(recipe(), MEASURED)
    assert found["steps"] == 100 + 240
    trained = 6 + (2 + 100 * 0.5) + 60  # groundwork, metric and steps, a minute
    student = trained + (2 + 5) * 1.0 + (3 + 6) * 5.0  # checkpoints at 60, end; 60 ... 240, end; validations
    steps = trained / 0.2  # 590
    control = trained + (9 + 1) * 1.0 + (15 + 1) * 5.0  # one validation more, at the student's tokens
    assert steps == 590
    decoding = 2 * 2.0 + 2 * (6 * 0.5) + 2 * 2 * 0.5  # 3 s in pieces of 2 s and of 0.5 s, and the samples
    assert found["parts"] == pytest.approx(
        {
            "start": 10, "teacher_and_text": 20, "teacher_validation": 8, "targets": 0, "student": student,
            "control": control, "evaluation": 2 * (4 + 1) + decoding,
        }
    )  # fmt: skip
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["pass_seconds"] == [50, 25] and found["cache_seconds"] == 50
    assert found["shares"]["control"] == pytest.approx(trained / found["seconds"])
    assert found["shares"]["validation"] == pytest.approx((9 + 16) * 5 / found["seconds"])
    assert found["limit"] == "validation", "125 s, and the control's steps 118 s"
    assert found["shares"]["teacher"] == pytest.approx((30 + 8) / found["seconds"])


def test_a_cache_and_a_control_by_tokens() -> None:
    found = forecast(recipe(targets={"cache": True}, control={"match": "tokens"}), MEASURED)
    assert found["parts"]["targets"] == 50
    assert found["parts"]["control"] == pytest.approx(340 * 0.2 + 6 * 1.0 + 9 * 5.0)
    fetched = forecast(recipe(targets={"cache": True, "repo": "me/targets"}), MEASURED)
    assert fetched["parts"]["targets"] == 0
    alone = forecast(recipe(targets={"cache": True}, control=False), replace(MEASURED, control=None))
    assert "control" not in alone["parts"] and alone["shares"]["control"] == 0


def test_devices_share_the_work_on_tokens_alone() -> None:
    one, eight = (forecast(recipe(targets={"cache": True}), MEASURED, n, 0.9) for n in (1, 8))
    assert eight["parts"]["start"] == one["parts"]["start"]
    assert eight["cache_seconds"] == pytest.approx(50 / 7.2)
    assert eight["pass_seconds"] == pytest.approx([50 / 7.2, 25 / 7.2])
    assert eight["steps"] == 100 + 1728, "a minute stays a minute"
    endpoint = {"url": "http://h", "model": "m"}
    served = recipe(targets={"cache": True, "signal": "top_k"}, endpoint=endpoint)
    assert forecast(served, MEASURED, 8, 0.9)["cache_seconds"] == 50


def test_lengths_in_steps() -> None:
    assert steps_in(Length(steps=7), 1.0, 100) == 7
    assert steps_in(Length(tokens=701), 1.0, 100) == 8
    assert steps_in(Length(minutes=1), 0.7, 100) == 86
    assert [intervals(Length(steps=4), steps, 1.0, 1) for steps in (1, 4, 6, 8)] == [1, 1, 2, 2]


def test_the_command(world: World) -> None:
    """Live and cached targets; the last line is JSON that agrees with `forecast`."""
    for options in ([], ["targets.cache=true", "--tokens", "1000000"]):
        run = run_command(str(world.recipe), *options, "--seconds", "0.2", launcher=("-m", "distill.plan"))
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout.splitlines()[-1])
        assert list(found["devices"]) == ["1", "8", "64"]
        one = found["devices"]["1"]
        assert found["predicted_seconds"] == one["seconds"] == pytest.approx(sum(one["parts"].values()))
        assert one["steps"] == 14 and (one["parts"]["targets"] > 0) == bool(options)
        assert set(found["stage_tokens_per_second"]) == {"1 hidden_mse", "2 cross_entropy+forward_kl"}
        assert all(value > 0 for value in found["stage_tokens_per_second"].values())
        if options:
            assert found["measured"]["train_tokens"] == 1_000_000
            assert found["cache_bytes"] == pytest.approx(1e6 * 28, rel=0.1), "24 numbers and a scale"
