"""What a stage minimises: weighted terms, and for those of the logits value and gradient in closed form.

For a divergence D(q) of the student's distribution q at temperature T and g = dD/dq, the gradient with respect to the
logits is T^2 q (g - <q, g>) / T. Written out, it takes a third of the passes over (N, V) that autograd takes through
`distill/losses.py`, which is the oracle for both value and gradient.

Legend: N tokens, V vocabulary, K outcomes of a sparse signal, p the teacher's distribution, q the student's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distill import losses
from distill.config import HIDDEN_TERMS
from distill.geometry import HiddenMetric
from distill.signals import SparseSignal


class Softmax:
    """q of logits (N, V) at a temperature, in fp32; log q = shifted - log_total."""

    def __init__(self, logits_NV: Tensor, temperature: float) -> None:
        scaled_NV = logits_NV.float()
        highest_N1 = scaled_NV.amax(-1, keepdim=True)
        # What `float` has copied may be written over, the caller's own matrix not.
        self.shifted_NV = scaled_NV - highest_N1 if scaled_NV is logits_NV else scaled_NV.sub_(highest_N1)
        if temperature != 1:
            self.shifted_NV.div_(temperature)
        self.probs_NV = self.shifted_NV.exp()
        total_N1 = self.probs_NV.sum(-1, keepdim=True)
        self.probs_NV.mul_(total_N1.reciprocal())
        self.log_total_N1 = total_N1.log()

    @cached_property
    def log_probs_NV(self) -> Tensor:
        return self.shifted_NV - self.log_total_N1

    def log_probs_at(self, ids_NK: Tensor) -> Tensor:
        """log q of K outcomes of each token."""
        return self.shifted_NV.gather(1, ids_NK) - self.log_total_N1


@dataclass(frozen=True)
class Objective:
    """Terms by name with their weights, and the constants of the divergences."""

    weights: dict[str, float]
    temperature: float = 1.0
    jsd_beta: float = 0.5
    metric: HiddenMetric | None = None  # of hidden_mse; None is the identity
    unlabelled: bool = False  # labels below 0 may come: text that the student wrote, which cross-entropy leaves out

    @property
    def logit_terms(self) -> dict[str, float]:
        return {name: weight for name, weight in self.weights.items() if name not in HIDDEN_TERMS}

    @property
    def needs_teacher_logits(self) -> bool:
        return not set(self.logit_terms) <= {"cross_entropy"}

    def gradient(
        self, student_NV: Tensor, labels_N: Tensor, teacher: Tensor | SparseSignal | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each logit term's unweighted sum in nats, and the gradient (N, V) of the weighted sum in fp32."""
        T, terms = self.temperature, self.logit_terms
        sums: dict[str, Tensor] = {}
        total_NV: Tensor | None = None
        students: dict[float, Softmax] = {}
        dense: Softmax | None = None
        for name, weight in terms.items():
            temperature = 1.0 if name == "cross_entropy" else T
            if temperature not in students:
                students[temperature] = Softmax(student_NV, temperature)
            student = students[temperature]
            q_NV = student.probs_NV.clone() if len(terms) > 1 else student.probs_NV  # a term may write over it
            if name == "cross_entropy":
                label_N1 = labels_N[:, None].clamp_min(0)
                log_q_N1 = student.log_probs_at(label_N1)
                grad_NV = q_NV.scatter_add_(1, label_N1, q_NV.new_full((1, 1), -1.0).expand_as(label_N1))
                if self.unlabelled:
                    without_N1 = labels_N[:, None] < 0
                    log_q_N1, grad_NV = log_q_N1.masked_fill(without_N1, 0), grad_NV.masked_fill_(without_N1, 0)
                value = -log_q_N1.sum()
                scale = weight
            else:
                if isinstance(teacher, SparseSignal):
                    value, grad_NV = self._sparse_divergence(name, student, q_NV, teacher)
                else:
                    assert teacher is not None, "the job gives every divergence a signal"
                    dense = dense or Softmax(teacher, T)
                    value, grad_NV = self._divergence(name, dense, student, q_NV)
                value, scale = value * T**2, weight * T
            sums[name] = value
            if scale != 1:
                grad_NV.mul_(scale)
            total_NV = grad_NV if total_NV is None else total_NV.add_(grad_NV)
        assert total_NV is not None
        return sums, total_NV

    def _divergence(self, name: str, p: Softmax, q: Softmax, q_NV: Tensor) -> tuple[Tensor, Tensor]:
        """D summed over tokens, and q (g - <q, g>), both without the factors of the temperature."""
        if name == "forward_kl":  # g = -p / q
            log_ratio_N = torch.linalg.vecdot(p.probs_NV, p.shifted_NV - q.shifted_NV)
            return log_ratio_N.sum() + (q.log_total_N1 - p.log_total_N1).sum(), q_NV.sub_(p.probs_NV)
        return self._of_logarithms(name, p.log_probs_NV, q.log_probs_NV, p.probs_NV, q_NV)

    def _of_logarithms(
        self, name: str, log_p_NV: Tensor, log_q_NV: Tensor, p_NV: Tensor, q_NV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `_divergence`, from all four matrices."""
        if name == "forward_kl":
            return (log_p_NV - log_q_NV).mul_(p_NV).sum(), q_NV - p_NV
        if name == "reverse_kl":
            g_NV = log_q_NV - log_p_NV
            value_N = (g_NV * q_NV).sum(-1, keepdim=True)
            return value_N.sum(), g_NV.sub_(value_N).mul_(q_NV)
        if name == "total_variation":
            g_NV = (q_NV - p_NV).sign_().mul_(0.5)
            value = 0.5 * (q_NV - p_NV).abs_().sum()
        else:  # jsd: what m contributes to the derivative cancels
            beta = self.jsd_beta
            log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
            g_NV = (log_q_NV - log_m_NV).mul_(1 - beta)
            value = beta * (log_p_NV - log_m_NV).mul_(p_NV).sum() + (g_NV * q_NV).sum()
        return value, g_NV.sub_((g_NV * q_NV).sum(-1, keepdim=True)).mul_(q_NV)

    def _sparse_divergence(
        self, name: str, student: Softmax, q_NV: Tensor, signal: SparseSignal
    ) -> tuple[Tensor, Tensor]:
        """As `_divergence`, of a few outcomes: the gradient of all others is the student's softmax, scaled by row."""
        if signal.temperature != self.temperature:
            raise ValueError(f"a signal at temperature {signal.temperature} for a loss at {self.temperature}")
        ids_NK = signal.ids_NK
        log_q_NK = student.log_probs_at(ids_NK)
        if signal.tail_N is None:
            if name != "forward_kl" or signal.entropy_N is None:
                raise ValueError(f"{name} of sampled outcomes would be biased")
            value = -(signal.probs_NK * log_q_NK).sum() - signal.entropy_N.sum()
            return value, q_NV.scatter_add_(1, ids_NK, -signal.probs_NK)
        given_NK = q_NV.gather(1, ids_NK)
        others_N1 = q_NV.scatter_(1, ids_NK, 0.0).sum(-1, keepdim=True)  # 1 - sum would cancel
        # L = K + 1 outcomes; logarithms of 0 are cut off, and always meet a factor of 0.
        q_NL, p_NL = torch.cat([given_NK, others_N1], 1), torch.cat([signal.probs_NK, signal.tail_N[:, None]], 1)
        log_q_NL = torch.cat([log_q_NK, others_N1.clamp_min(losses.TINY).log()], 1)
        value, grad_NL = self._of_logarithms(name, p_NL.clamp_min(losses.TINY).log(), log_q_NL, p_NL, q_NL)
        grad_NV = q_NV.mul_(grad_NL[:, -1:] / others_N1.clamp_min(losses.TINY))
        return value, grad_NV.scatter_(1, ids_NK, grad_NL[:, :-1])
