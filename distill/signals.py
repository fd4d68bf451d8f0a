"""The typed soft targets: in what form the teacher's knowledge reaches the loss.

Legend: N tokens, V vocabulary, d width of the teacher. A loss asks a signal for the teacher's logits of
some rows and does not know whether they were stored or follow from hidden states; the hidden form needs
d numbers a token in place of V and loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """A language model's output layer: logits = softcap(scale * (W h + b)).

    `weight_Vd` (V, d), `bias_V` (V,) or None; `softcap` c applies c tanh(x / c), as in Gemma 2.
    """

    weight_Vd: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_Nd: Tensor) -> Tensor:
        """(N, d) -> (N, V) in fp32; the matrix product runs in the weight's own type."""
        logits_NV = torch.nn.functional.linear(hidden_Nd.to(self.weight_Vd.dtype), self.weight_Vd, self.bias_V).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's logits (N, V) themselves."""

    logits_NV: Tensor

    def logits(self, rows: slice) -> Tensor:
        return self.logits_NV[rows]


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's final hidden states (N, d), after its last norm, and its head."""

    hidden_Nd: Tensor
    head: Head

    def logits(self, rows: slice) -> Tensor:
        return self.head.logits(self.hidden_Nd[rows])


Signal = DenseSignal | HiddenSignal
