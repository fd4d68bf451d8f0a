"""Several teachers: their mean by its definition, live and cached, and what cannot be averaged.

The mean inside the fused loss and over candidates is in `test_fused.py` and `test_candidates.py`.

    python -m pytest tests/test_ensemble.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import World
from torch import Tensor

from distill.config import Recipe, UserError
from distill.corpus import BlockBatch
from distill.ensemble import Ensemble
from distill.job import TeacherAndText, run, start_accelerator
from distill.recipe import load_recipe
from distill.signals import Encoding, HiddenSignal, MixedSignal, SparseSignal
from distill.targets import LiveTargets


def make_recipe(world: World, folder: Path, other: Path, *overrides: str) -> Recipe:
    """The tiny recipe with a second teacher of three times the first one's weight."""
    others = json.dumps([{"model": str(other), "dtype": "fp32", "weight": 3}])
    common = [f"other_teachers={others}", f"run.output_dir={folder}", f"corpus.cache_dir={folder / 'cache'}"]
    return load_recipe(world.recipe, [*common, "control=false", *overrides])


def open_parts(recipe: Recipe) -> TeacherAndText:
    return TeacherAndText(recipe, start_accelerator(recipe))


def mean_of(parts: TeacherAndText, batch: BlockBatch, temperature: float) -> Tensor:
    """(N, V), plainly: 1/4 and 3/4 of what each network says, through its own head, about the end of each window."""
    assert isinstance(parts.teachers, Ensemble)
    means = 0.0
    for member, weight in zip(parts.teachers.members, (0.25, 0.75), strict=True):
        with torch.no_grad():
            logits_BWV = member.model(batch.window_BW, position_ids=batch.positions_BW, use_cache=False).logits
        logits_NV = logits_BWV[:, -batch.inputs_BT.shape[1] :].flatten(0, 1)[:, : parts.teacher.vocab_size]
        means = means + weight * torch.softmax(logits_NV / temperature, -1)
    return means


def test_targets_are_those_of_the_weighted_mean(world: World, other_weights: Path, tmp_path: Path) -> None:
    parts = open_parts(make_recipe(world, tmp_path, other_weights, "corpus.reset_at_documents=false"))
    assert parts.teacher is parts.teachers.first and parts.teacher.name == str(world.teacher)
    batch = parts.blocks.batch([3, 0, len(parts.blocks) - 1])
    p_NV = mean_of(parts, batch, 2.0)
    alone_NV = torch.softmax(parts.teacher.signal(batch, Encoding("dense")).logits(slice(None)) / 2, -1)
    assert (p_NV - alone_NV).abs().max() > 0.01, "the two agree, and the test shows nothing"

    mixed = parts.teachers.signal(batch, Encoding("hidden"))
    assert isinstance(mixed, MixedSignal) and mixed.weights == (0.25, 0.75)
    logits_NV = mixed.mix([part.logits(slice(None)) for part in mixed.parts], 2.0)
    torch.testing.assert_close(torch.softmax(logits_NV / 2, -1), p_NV, rtol=1e-4, atol=1e-6)

    top = parts.teachers.signal(batch, Encoding("top_k", 5, 2.0))
    assert isinstance(top, SparseSignal) and top.tail_N is not None and top.temperature == 2
    torch.testing.assert_close(top.probs_NK, p_NV.topk(5).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(p_NV.gather(1, top.ids_NK), top.probs_NK, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(top.tail_N, 1 - p_NV.topk(5).values.sum(-1), rtol=1e-3, atol=1e-6)

    V = p_NV.shape[1]
    everything = parts.teachers.signal(batch, Encoding("sampled", V, 2.0))
    assert isinstance(everything, SparseSignal) and everything.entropy_N is not None
    torch.testing.assert_close(p_NV.gather(1, everything.ids_NK), everything.probs_NK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(everything.entropy_N, torch.special.entr(p_NV).sum(-1), rtol=1e-4, atol=0)


def test_a_vocabulary_of_its_own_is_refused_before_any_work(
    world: World, other_weights: Path, other_teacher: Path, tmp_path: Path
) -> None:
    others = json.dumps([{"model": str(model)} for model in (other_weights, other_teacher)])
    recipe = make_recipe(world, tmp_path, other_weights, f"other_teachers={others}")
    with pytest.raises(UserError) as caught:
        open_parts(recipe)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "need one vocabulary" in lines[0] and str(world.teacher) in lines[0]
    assert lines[1].startswith(f"  other_teachers.1.model: {other_teacher}: expected 40 tokens, found 29; ")
    assert "the first '<|end|>': id 0 in the one, None in the other" in lines[1]
    assert not (tmp_path / "cache").exists(), "text was read"
    missing = make_recipe(world, tmp_path, tmp_path / "none")
    with pytest.raises(UserError, match=r"^other_teachers\.0 .*none: expected a model folder"):
        open_parts(missing)


def test_a_live_run_asks_the_others_where_logits_are_compared(
    world: World, other_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage of hidden states is the first one's alone."""
    asked: list[str] = []
    signal = LiveTargets.signal

    def watched(targets: LiveTargets, batch: BlockBatch, first_only: bool = False) -> object:
        found = signal(targets, batch, first_only)
        asked.append(type(found).__name__)
        return found

    monkeypatch.setattr(LiveTargets, "signal", watched)
    lengths = ("stages.0.length.steps=2", "stages.1.length.steps=3", "student.fit_tokens=0")
    run(make_recipe(world, tmp_path, other_weights, *lengths, "stages.1.temperature={from: 3, to: 1}"))
    assert asked == [HiddenSignal.__name__] * 2 + [MixedSignal.__name__] * 3
    result = json.loads((tmp_path / "tiny" / "result.json").read_text())
    assert result["targets"]["teachers"] == f"{world.teacher} + {other_weights}"


def test_a_cache_of_the_mean_belongs_to_its_teachers(
    world: World, other_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = json.dumps([{"objective": "skewed_forward_kl", "length": {"steps": 2}}])
    fields = ("targets.cache=true", f"targets.cache_dir={tmp_path / 'targets'}", f"stages={stage}")
    sparse = (*fields, "targets.signal=top_k", "targets.k=5", "targets.max_tokens=1000")
    parts = open_parts(make_recipe(world, tmp_path, other_weights, *sparse))
    batch = parts.cached_blocks.batch([3, 0])
    stored, live = parts.cached_targets().signal(batch), parts.teachers.signal(batch, parts.encoding)
    assert isinstance(stored, SparseSignal) and isinstance(live, SparseSignal)
    assert torch.equal(stored.ids_NK, live.ids_NK)
    torch.testing.assert_close(stored.probs_NK, live.probs_NK, rtol=2e-3, atol=1e-5)
    for changes in (["teacher.weight=2"], ["other_teachers=[]"]):
        with pytest.raises(UserError, match="teacher_weights: the cache has '0.25 .* 0.75 "):
            open_parts(make_recipe(world, tmp_path, other_weights, *sparse, *changes)).cached_targets()
