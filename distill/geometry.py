"""The geometry of hidden states: by which metric the student's output is compared with the teacher's.

For an output layer W the difference of two hidden states matters as far as it moves the logits. With e = z - h,
the metric M makes e^T M e the squared error of all V logits (`gram`: M = Wc^T Wc / V, rows of W centred, as a
softmax does not see their mean), or KL(p || q) to second order (`fisher`: M = E[W^T (diag p - p p^T) W] / 2). Both
are d x d and computed once.

A student with a narrower head lives in a `Basis`: r coordinates of the hidden states, in which both its head and
its targets are expressed.

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
class Basis:
    """r coordinates z = projection (h - mean) of hidden states, back by h = mean + lift z; uncorrelated, of variance 1.

    Of all linear maps to r coordinates and back, this one loses the least of h in a metric M, on average over hidden
    states with covariance C: with M = L L^T and the singular value decomposition U S V^T of L^T C^(1/2), lift is
    C^(1/2) V_r and projection V_r^T C^(-1/2).
    """

    mean_d: Tensor
    projection_rd: Tensor
    lift_dr: Tensor

    @classmethod
    def of(cls, mean_d: Tensor, covariance_dd: Tensor, metric_dd: Tensor, rank: int) -> Basis:
        """In fp32; computed in fp64. Directions that hidden states never take get a little variance."""
        covariance_dd = covariance_dd.double()
        values_d, vectors_dd = torch.linalg.eigh(covariance_dd)
        values_d = values_d.clamp_min(0) + 1e-6 * values_d.mean()
        root_dd = (vectors_dd * values_d.sqrt()) @ vectors_dd.t()
        inverse_root_dd = (vectors_dd / values_d.sqrt()) @ vectors_dd.t()
        _, axes_dd = torch.linalg.eigh(root_dd @ metric_dd.double() @ root_dd)
        axes_dr = axes_dd.flip(-1)[:, :rank]  # largest first
        return cls(mean_d.float(), (axes_dr.t() @ inverse_root_dd).float(), (root_dd @ axes_dr).float())

    def coordinates(self, hidden_Nd: Tensor) -> Tensor:
        """(N, d) -> (N, r)."""
        return (hidden_Nd.float() - self.mean_d) @ self.projection_rd.t()

    def head(self, head: Head) -> Head:
        """The output layer that reads coordinates; the mean hidden state becomes a bias. Its logits have no softcap."""
        weight_Vd = head.weight_Vd.float() * head.scale
        bias_V = weight_Vd @ self.mean_d
        return Head(weight_Vd @ self.lift_dr, bias_V if head.bias_V is None else bias_V + head.bias_V * head.scale)


@dataclass(frozen=True)
class HiddenMetric:
    """e^T M e for M = factor factor^T, where e = z - h, or z - its coordinates in a basis."""

    factor_rr: Tensor
    basis: Basis | None = None

    @classmethod
    def of(cls, matrix_dd: Tensor, basis: Basis | None = None) -> HiddenMetric:
        """From M in the teacher's d dimensions, positive definite."""
        if basis is not None:
            lift_dr = basis.lift_dr.to(matrix_dd.dtype)
            matrix_dd = lift_dr.t() @ matrix_dd @ lift_dr
        return cls(torch.linalg.cholesky(matrix_dd).float(), basis)

    def __call__(self, z_Nr: Tensor, hidden_Nd: Tensor) -> Tensor:
        """Sum over N tokens, in fp32."""
        with torch.autocast(z_Nr.device.type, enabled=False):
            target_Nr = hidden_Nd.float() if self.basis is None else self.basis.coordinates(hidden_Nd)
            return ((z_Nr.float() - target_Nr) @ self.factor_rr).square().sum()


class HiddenMoments:
    """Mean and covariance of hidden states, from sums over tokens."""

    def __init__(self, width: int, device: torch.device) -> None:
        # The last row and column belong to a constant 1, so that one matrix holds all sums.
        self.sums_DD = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)

    def add(self, hidden_Nd: Tensor) -> None:
        """Count N more tokens."""
        extended_ND = torch.nn.functional.pad(hidden_Nd.double(), (0, 1), value=1.0)
        self.sums_DD += extended_ND.t() @ extended_ND

    def solve(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) in fp64; `total` adds sums up over processes."""
        moments_DD = total(self.sums_DD)
        moments_DD = moments_DD / moments_DD[-1, -1]
        mean_d = moments_DD[:-1, -1]
        return mean_d, moments_DD[:-1, :-1] - torch.outer(mean_d, mean_d)


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

    def matrix(self, ridge: float, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
        """M + ridge * (its mean diagonal) * I, (d, d) in fp64; `total` adds sums up over processes."""
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
        return matrix_dd
