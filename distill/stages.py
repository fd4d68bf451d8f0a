"""What of the stages only shows once the teacher is there, checked for all of them before any work is done."""

from __future__ import annotations

from collections.abc import Iterator

from distill.config import Recipe, UserError
from distill.teacher import LanguageModel
from distill.transplant import is_tied


def check_stages(recipe: Recipe, teacher: LanguageModel) -> None:
    """UserError that names all fields of all stages which this teacher, over the student's vocabulary, cannot serve."""
    if problems := list(_problems(recipe, teacher)):
        plural = "problem" if len(problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{len(problems)} {plural} of the stages with teacher {teacher.name}", *problems]))


def _problems(recipe: Recipe, teacher: LanguageModel) -> Iterator[str]:
    candidates = {f"stages.{number}": stage.candidates for number, stage in enumerate(recipe.stages)}
    if recipe.control.enabled:
        candidates["control"] = recipe.control.candidates
    for where, found in candidates.items():
        if found is not None and found >= teacher.vocab_size:
            yield (
                f"{where}.candidates: expected fewer than the {teacher.vocab_size} tokens of the vocabulary, found "
                f"{found}; remove it for the whole vocabulary"
            )
    for number, stage in enumerate(recipe.stages):
        tied = recipe.student.is_fresh_lstm and is_tied(recipe.student, teacher)
        if tied and len(stage.freeze & {"embedding", "head"}) == 1:
            yield f"stages.{number}.freeze: embedding and head are tied, as in the teacher; freeze both or neither"
        if stage.metric != "identity" and teacher.head.softcap is not None:
            yield (
                f"stages.{number}.metric: {stage.metric} expects logits that are linear in the hidden state, found a "
                f"softcap of {teacher.head.softcap}; use metric identity or a divergence"
            )
