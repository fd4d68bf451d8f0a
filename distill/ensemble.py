"""Several teachers on one vocabulary: the targets are those of the weighted mean of their distributions.

Each teacher reads the same windows. What is handed on live are the hidden states of each, from which the mean follows
in chunks through their heads, at the temperature of the stage; what a cache keeps are sparse targets of the mean. Where
one teacher is asked for (tokenizer, transplant, hidden states, validation), it is the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distill.config import Recipe, UserError
from distill.corpus import BlockBatch
from distill.sharding import requested_engine
from distill.signals import Encoding, HiddenSignal, MixedSignal, Signal
from distill.teacher import LanguageModel, load_teacher


@dataclass(frozen=True)
class Ensemble:
    """Teachers, the first one first, with weights that sum to 1. It reads as a `LanguageModel` does."""

    members: tuple[LanguageModel, ...]
    weights: tuple[float, ...]

    @property
    def first(self) -> LanguageModel:
        return self.members[0]

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters as loaded."""
        return sum(member.weight_bytes for member in self.members)

    @property
    def weights_hash(self) -> str:
        """What the mean depends on: weight and parameters of each."""
        pairs = zip(self.weights, self.members, strict=True)
        return " + ".join(f"{weight:.9g} {member.weights_hash}" for weight, member in pairs)

    @contextmanager
    def together(self) -> Iterator[None]:
        """As of a `LanguageModel`."""
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.together())
            yield

    def trimmed(self, tokenizer: PreTrainedTokenizerBase, kept_ids: np.ndarray) -> Ensemble:
        """All over the same part of their vocabulary."""
        return Ensemble(tuple(member.trimmed(tokenizer, kept_ids) for member in self.members), self.weights)

    def check_window(self, window: int, packed: bool) -> None:
        """As of a `LanguageModel`."""
        for member in self.members:
            member.check_window(window, packed)

    def signal(self, batch: BlockBatch, encoding: Encoding) -> Signal:
        """What they say together about a batch of blocks; inner layers are those of the first."""
        parts: list[HiddenSignal] = []
        for member in self.members:
            states = member.signal(batch, Encoding("hidden", layers=() if parts else encoding.layers))
            assert isinstance(states, HiddenSignal)
            parts.append(states)
        with torch.inference_mode():
            return encoding.signal(MixedSignal(tuple(parts), self.weights), batch.block_ids_B.tolist())


def load_teachers(recipe: Recipe, device: torch.device) -> LanguageModel | Ensemble:
    """The recipe's teacher, or all of them; UserError where their vocabularies are not one."""
    if recipe.other_teachers and requested_engine():
        raise UserError(
            "other_teachers: accelerate's configuration shards the teacher, which works for one; remove one of the two"
        )
    first = load_teacher(recipe.teacher, device)
    if not recipe.other_teachers:
        return first
    others = [
        load_teacher(config, device, f"other_teachers.{number}") for number, config in enumerate(recipe.other_teachers)
    ]
    if problems := [problem for number, other in enumerate(others) if (problem := _difference(first, other, number))]:
        raise UserError(
            f"teachers whose distributions are averaged need one vocabulary, that of teacher {first.name}:\n  "
            + "\n  ".join(problems)
        )
    weights = [config.weight for config in (recipe.teacher, *recipe.other_teachers)]
    return Ensemble((first, *others), tuple(weight / sum(weights) for weight in weights))


def _difference(first: LanguageModel, other: LanguageModel, number: int) -> str | None:
    """In what another teacher's vocabulary is not the first one's."""
    expected, found = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if expected == found:
        return None
    different: Sequence[str] = sorted(
        (token for token in expected.keys() | found.keys() if expected.get(token) != found.get(token)),
        key=lambda token: (min(expected.get(token, len(expected)), found.get(token, len(found))), token),
    )
    token = different[0]
    return (
        f"other_teachers.{number}.model: {other.name}: expected {len(expected)} tokens, found {len(found)}; "
        f"{len(different)} differ, the first {token!r}: id {expected.get(token)} in the one, {found.get(token)} in the "
        "other"
    )
