"""The student's own fp32 forward behind the interface of `distill/decode.py`: its oracle, and its fallback.

Legend: B sequences, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import UserError
from distill.sampling import Sampler
from distill.session import available_cores
from distill.student import LSTMCache, LSTMForCausalLM, State

Network = TypeVar("Network", bound=PreTrainedModel)


def load_student(folder: Path) -> LSTMForCausalLM:
    """A student in fp32, ready to read; UserError for a damaged file or one that lacks weights."""
    return load_network(folder, LSTMForCausalLM)


def load_network(folder: Path, kind: type[Network]) -> Network:
    """As `load_student`, of any kind."""
    try:
        loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True)
        student, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"weights missing: {', '.join(sorted(report['missing_keys'])[:4])}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: expected a student's folder with whole weights: {reason}") from None
    network: Network = student.eval().requires_grad_(False)
    return network


class TorchDecoder:
    """What `stream` needs of a decoder, in plain PyTorch."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        torch.set_num_threads(threads or available_cores())
        self.student = load_student(folder)
        self.vocab_size = self.student.config.vocab_size

    def lanes(self, sequences: int) -> TorchLanes:
        """So many sequences side by side, from a zero state."""
        return TorchLanes(self.student, sequences)


class TorchLanes:
    """A cache of B sequences and the logits after the last token."""

    def __init__(self, student: LSTMForCausalLM, sequences: int) -> None:
        self.student, self.sequences = student, sequences
        self.parts: State = ()  # nothing read yet
        self.logits_BV: Tensor = torch.zeros(sequences, student.config.vocab_size)

    def take(self, number: int, other: TorchLanes) -> None:
        """Let sequence `number` stand where the only one of `other` stands."""
        with torch.inference_mode():
            zeros = (part.new_zeros(part.shape[0], self.sequences, *part.shape[2:]) for part in other.parts)
            pairs = zip(self.parts or zeros, other.parts, strict=True)
            place = torch.tensor([number])
            self.parts = tuple(mine.index_copy(1, place, theirs) for mine, theirs in pairs)
            self.logits_BV = self.logits_BV.index_copy(0, place, other.logits_BV)

    def state(self) -> State:
        """What to come back to; the tensors are replaced, never written into."""
        return self.parts

    def restore(self, state: State) -> None:
        """Forget what was read since `state` was taken."""
        self.parts = state

    def read(self, tokens: Sequence[int]) -> None:
        """Read one token in each sequence."""
        cache = LSTMCache(*self.parts)
        with torch.inference_mode():
            self.logits_BV = self.student(torch.tensor(tokens)[:, None], past_key_values=cache).logits[:, 0]
        self.parts = cache.state

    def logits(self, number: int) -> np.ndarray:
        """logits_V of one sequence."""
        return self.logits_BV[number].numpy()

    def choose(self, number: int, sampler: Sampler) -> int:
        """The next token of one sequence."""
        return sampler.choose(self.logits(number))
