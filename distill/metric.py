"""The geometry of hidden states: by which metric the student's output is compared with the teacher's.

For an output layer W the difference of two hidden states matters as far as it moves the logits. With e = z - h,
the metric M makes e^T M e the squared error of all V logits (`gram`: M = Wc^T Wc / V, rows of W centred, as a
softmax does not see their mean), or KL(p || q) to second order (`fisher`: M = E[W^T (diag p - p p^T) W] / 2). Both
are d x d and computed once.

Legend: N tokens, V vocabulary, d width of the teacher, r width of the student's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
