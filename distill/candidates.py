"""A softmax over a part of the vocabulary: some tokens for certain, others drawn at random to stand for the rest.

With tens of thousands of tokens the head is most of a small student's training. A step's loss needs its normaliser
Z = sum over v of exp(l_v) and the logits of few tokens. So the C candidates of a step are the tokens most frequent in
the text, the step's labels, and R others drawn uniformly with replacement, each of which stands for n / R of the n that
are left: Z is estimated without bias (importance sampling; Bengio and Senecal 2008, IEEE Trans. Neural Networks 19(4)),
its logarithm with one that falls with the variance. Teacher and student are restricted alike, so a divergence is 0
where they agree. All that enters the loss is a head of C rows and the logarithm of what each stands for.

Legend: N tokens, V vocabulary, C candidates, R drawn ones, d width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.signals import DenseSignal, HiddenSignal, MixedSignal, Signal


@dataclass(frozen=True)
class Candidates:
    """The certain ids in ascending order, then the drawn ones; a candidate stands for exp(log_weight) tokens."""

    ids_C: Tensor
    log_weight_C: Tensor
    certain: int

    def places(self, labels_N: Tensor) -> Tensor:
        """Where each label stands among the candidates; labels are certain, and none (below 0) stays none."""
        return torch.searchsorted(self.ids_C[: self.certain], labels_N).where(labels_N >= 0, labels_N)

    def head(self, weight_Vd: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
        """The student's head of C rows, differentiable; the logarithms of the weights are in its bias."""
        return weight_Vd[self.ids_C], self.log_weight_C if bias_V is None else bias_V[self.ids_C] + self.log_weight_C

    def signal(self, signal: Signal | None) -> Signal | None:
        """The teacher over the candidates."""
        if signal is None:
            return None
        if isinstance(signal, DenseSignal):
            return DenseSignal(signal.logits_NV[:, self.ids_C] + self.log_weight_C.to(signal.logits_NV.device))
        if isinstance(signal, MixedSignal):
            return replace(signal, parts=tuple(self._of_states(part) for part in signal.parts))
        if isinstance(signal, HiddenSignal):
            return self._of_states(signal)
        raise ValueError("candidates are for hidden and dense signals: a sparse one has candidates of its own")

    def _of_states(self, signal: HiddenSignal) -> HiddenSignal:
        return replace(signal, head=signal.head.rows(self.ids_C, self.log_weight_C))


class CandidateSampler:
    """Draws the candidates of a step: `frequent` tokens, the step's labels, and half as many others as `frequent`."""

    def __init__(self, occurrences_V: Tensor, frequent: int) -> None:
        assert frequent < len(occurrences_V), "check_stages comes first"
        self.drawn = max(1, frequent // 2)
        self.is_frequent_V = torch.zeros_like(occurrences_V, dtype=torch.bool)
        self.is_frequent_V[occurrences_V.argsort(descending=True, stable=True)[:frequent]] = True

    def draw(self, labels_N: Tensor, seed: int) -> Candidates:
        """The same for the same labels and seed. `labels_N` are those of the whole step, over all processes."""
        is_certain_V = self.is_frequent_V.clone()
        is_certain_V[labels_N] = True
        certain_C, rest_n = is_certain_V.nonzero()[:, 0], (~is_certain_V).nonzero()[:, 0]
        if not len(rest_n):
            return Candidates(certain_C, torch.zeros(len(certain_C), device=labels_N.device), len(certain_C))
        generator = torch.Generator().manual_seed(seed % 2**63)
        places_R = torch.randint(len(rest_n), (self.drawn,), generator=generator).to(labels_N.device)
        log_weight_C = torch.zeros(len(certain_C) + self.drawn, device=labels_N.device)
        log_weight_C[len(certain_C) :] = math.log(len(rest_n) / self.drawn)
        return Candidates(torch.cat([certain_C, rest_n[places_R]]), log_weight_C, len(certain_C))
