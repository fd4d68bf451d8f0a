"""The student's own fp32 forward behind the interface of `distill/decode.py`: its oracle, and its fallback.

Legend: B sequences, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import UserError
from distill.sampling import Sampler
from distill.session import available_cores
from distill.student import LSTMCache, LSTMForCausalLM


def load_student(folder: Path, kind: type[PreTrainedModel] = LSTMForCausalLM) -> Any:
    """A student of a kind in fp32, ready to read; UserError for a damaged file or one that lacks weights."""
    try:
        loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True)
        student, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"weights missing: {', '.join(sorted(report['missing_keys'])[:4])}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: expected a student's folder with whole weights: {reason}") from None
    return student.eval().requires_grad_(False)


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
        config = student.config
        self.student = student
        self.h_LBH, self.c_LBH = torch.zeros(2, config.num_layers, sequences, config.hidden_size)
        self.logits_BV: Tensor = torch.zeros(sequences, config.vocab_size)

    def take(self, number: int, other: TorchLanes) -> None:
        """Let sequence `number` stand where the only one of `other` stands."""
        with torch.inference_mode():
            self.h_LBH, self.c_LBH, self.logits_BV = (
                mine.index_copy(axis, torch.tensor([number]), theirs)
                for axis, mine, theirs in (
                    (1, self.h_LBH, other.h_LBH),
                    (1, self.c_LBH, other.c_LBH),
                    (0, self.logits_BV, other.logits_BV),
                )
            )

    def state(self) -> tuple[Tensor, ...]:
        """What to come back to; the tensors are replaced, never written into."""
        return self.h_LBH, self.c_LBH

    def restore(self, state: tuple[Tensor, ...]) -> None:
        """Forget what was read since `state` was taken."""
        self.h_LBH, self.c_LBH = state

    def read(self, tokens: Sequence[int]) -> None:
        """Read one token in each sequence."""
        cache = LSTMCache(self.h_LBH, self.c_LBH)
        with torch.inference_mode():
            self.logits_BV = self.student(torch.tensor(tokens)[:, None], past_key_values=cache).logits[:, 0]
        assert cache.h_LBH is not None and cache.c_LBH is not None
        self.h_LBH, self.c_LBH = cache.h_LBH, cache.c_LBH

    def logits(self, number: int) -> np.ndarray:
        """logits_V of one sequence."""
        return self.logits_BV[number].numpy()

    def choose(self, number: int, sampler: Sampler) -> int:
        """The next token of one sequence."""
        return sampler.choose(self.logits(number))
