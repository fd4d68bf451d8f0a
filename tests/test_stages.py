"""Stages that the teacher at hand cannot serve are refused before any work, all at once.

python -m pytest tests/test_stages.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import World

from distill.config import UserError
from distill.job import TeacherAndText, run, start_accelerator
from distill.recipe import load_recipe
from distill.stages import check_stages


def test_all_stages_are_checked_before_any_begins(world: World, tmp_path: Path) -> None:
    recipe = load_recipe(
        world.recipe,
        [
            f"run.output_dir={tmp_path}", "stages.0.metric=fisher", "stages.1.candidates=40", "control.candidates=39",
            "stages.1.freeze=[head]",
        ],
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        run(recipe)
    assert "stages.1.candidates: expected fewer than the 40 tokens of the vocabulary, found 40" in str(caught.value)
    assert "control" not in str(caught.value) and "freeze" not in str(caught.value), "39 will do; nothing is tied"
    assert not (tmp_path / "tiny" / "checkpoints").exists() and not (tmp_path / "tiny" / "inputs.json").exists()

    parts = TeacherAndText(load_recipe(world.recipe), start_accelerator(recipe))
    teacher = replace(parts.teacher, head=replace(parts.teacher.head, softcap=30.0))
    teacher.model.config.tie_word_embeddings = True
    both = load_recipe(world.recipe, ["control.candidates=41", "stages.0.metric=gram", "stages.1.freeze=[head]"])
    with pytest.raises(UserError, match="3 problems") as caught:
        check_stages(both, teacher)
    for problem in ("control.candidates: ", "stages.0.metric: gram expects", "stages.1.freeze: embedding and head are"):
        assert f"\n  {problem}" in str(caught.value)


def test_too_short_a_text_is_refused_before_its_targets_are_made(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeacherAndText, "targets", lambda _: pytest.fail("targets were made"))
    recipe = load_recipe(
        world.recipe, [f"run.output_dir={tmp_path}", "targets.cache=true", "targets.max_tokens=8", "run.batch_size=8"]
    )
    with pytest.raises(UserError, match="run.batch_size: expected at least 8 blocks, one a lane, found 1"):
        run(recipe)
