"""The geometry of hidden states: by which metric the student's output is compared with the teacher's.

For an output layer W the difference of two hidden states matters as far as it moves the logits. With e = z - h,
the metric M makes e^T M e the squared error of all V logits (`gram`: M = Wc^T Wc / V, rows of W centred, as a
softmax does not see their mean), or KL(p || q) to second order (`fisher`: M = E[W^T (diag p - p p^T) W] / 2). Both
are d x d and computed once.

Legend: N tokens, V vocabulary, d width of the teacher, r width of the student's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import UserError
from distill.signals import Head

ROWS = 128  # tokens whose logits exist at one time


@dataclass(frozen=True)
class HiddenMetric:
    """e^T M e for M = factor factor^T, where e = z - projection (h - mean) in the student's r dimensions."""

    factor_rr: Tensor
    projection_rd: Tensor | None = None  # None: r = d, e = z - h
    mean_d: Tensor | None = None

    def __call__(self, z_Nr: Tensor, hidden_Nd: Tensor) -> Tensor:
        """Sum over N tokens, in fp32."""
        target_Nr = hidden_Nd.float()
        if self.projection_rd is not None:
            assert self.mean_d is not None, "a projection comes with the mean that it leaves out"
            target_Nr = (target_Nr - self.mean_d) @ self.projection_rd.t()
        with torch.autocast(z_Nr.device.type, enabled=False):
            return ((z_Nr.float() - target_Nr) @ self.factor_rr).square().sum()


class MetricSums:
    """A metric of an output layer, `gram` or `fisher`, the latter from sums over tokens."""

    def __init__(self, head: Head, name: str) -> None:
        """UserError for a head whose logits are not linear in the hidden state."""
        if head.softcap is not None:
            raise UserError(
                f"metric {name}: expected logits that are linear in the hidden state, found a softcap of "
                f"{head.softcap}; use metric identity or a divergence"
            )
        self.head, self.name = head, name
        vocab_size, width = head.weight_Vd.shape
        device = head.weight_Vd.device
        self.prob_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.moment_dd = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, hidden_Nd: Tensor) -> None:
        """Count N more tokens for `fisher`: the teacher's probabilities p and its mean outputs W^T p."""
        for start in range(0, len(hidden_Nd), ROWS):
            p_NV = torch.softmax(self.head.logits(hidden_Nd[start : start + ROWS]), -1)
            mean_Nd = (p_NV.to(self.head.weight_Vd.dtype) @ self.head.weight_Vd).double()
            self.prob_V += p_NV.sum(0, dtype=torch.float64)
            self.moment_dd += mean_Nd.t() @ mean_Nd
            self.tokens += len(p_NV)

    def metric(self, ridge: float, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> HiddenMetric:
        """M + ridge * (its mean diagonal) * I; `total` adds sums up over processes."""
        weight_Vd = self.head.weight_Vd.float()
        if self.name == "gram":
            centred_Vd = weight_Vd - weight_Vd.mean(0)
            matrix_dd = (centred_Vd.t() @ centred_Vd).double() / len(weight_Vd)
        else:
            prob_V, moment_dd, tokens = total(self.prob_V), total(self.moment_dd), total(self.tokens)
            second_dd = (weight_Vd.t() @ ((prob_V / tokens).float()[:, None] * weight_Vd)).double()
            matrix_dd = 0.5 * (second_dd - moment_dd / tokens)
        matrix_dd = matrix_dd * self.head.scale**2
        # A little more than rounding can make negative, so that the factor exists without a ridge.
        matrix_dd.diagonal().add_((ridge + 1e-6) * matrix_dd.diagonal().mean())
        return HiddenMetric(torch.linalg.cholesky(matrix_dd).float())
