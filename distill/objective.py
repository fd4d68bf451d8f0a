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
from distill.config import HIDDEN_TERMS, Ramp, StageConfig, TokenWeights
from distill.geometry import HiddenMetric
from distill.schedule import ramp
from distill.signals import SparseSignal

WEIGHT_SUM = "token_weights"  # beside the terms' sums: that of the tokens' weights


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

    def entropy_N1(self) -> Tensor:
        """In nats."""
        return self.log_total_N1 - torch.linalg.vecdot(self.probs_NV, self.shifted_NV)[:, None]

    def highest_N1(self) -> Tensor:
        """The largest probability."""
        return (-self.log_total_N1).exp()


@dataclass(frozen=True)
class Objective:
    """Terms by name with their weights, and the constants of the divergences."""

    weights: dict[str, float]
    temperature: float = 1.0
    jsd_beta: float = 0.5
    metric: HiddenMetric | None = None  # of hidden_mse; None is the identity
    skew: float = 0.1
    token_weights: TokenWeights = "none"
    unlabelled: bool = False  # labels below 0 may come: text that the student wrote, which cross-entropy leaves out

    @classmethod
    def of(cls, stage: StageConfig, share: float, metric: HiddenMetric | None = None) -> Objective:
        """What a stage minimises when `share` of it is over."""

        def now(value: float | Ramp) -> float:
            return ramp(value.start, value.end, share, value.shape) if isinstance(value, Ramp) else value

        weights = {str(term): now(weight) for term, weight in stage.objective.items()}
        constants = (stage.jsd_beta, metric, stage.skew, stage.token_weights, stage.student_written > 0)
        return cls(weights, now(stage.temperature), *constants)

    def extra(self, name: str) -> dict[str, float]:
        """The constant that a divergence of `distill/losses.py` takes besides the temperature."""
        if name == "jsd":
            return {"beta": self.jsd_beta}
        return {"skew": self.skew} if name.startswith("skewed_") else {}

    @property
    def logit_terms(self) -> dict[str, float]:
        return {name: weight for name, weight in self.weights.items() if name not in HIDDEN_TERMS}

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Of what `gradient` sums up."""
        return (*self.logit_terms, *([] if self.token_weights == "none" else [WEIGHT_SUM]))

    @property
    def needs_teacher_logits(self) -> bool:
        return not set(self.logit_terms) <= {"cross_entropy"} or self.token_weights.startswith("teacher")

    def gradient(
        self, student_NV: Tensor, labels_N: Tensor, teacher: Tensor | SparseSignal | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each logit term's sum in nats, and the gradient (N, V) of their weighted sum in fp32.

        With weights of tokens, which count as constants, tokens are summed up with these, and their own sum is among
        the sums: whoever has the whole step divides by it.
        """
        T, terms = self.temperature, self.logit_terms
        sums: dict[str, Tensor] = {}
        total_NV: Tensor | None = None
        students: dict[float, Softmax] = {}

        def student_at(temperature: float) -> Softmax:
            if temperature not in students:
                students[temperature] = Softmax(student_NV, temperature)
            return students[temperature]

        target = Softmax(teacher, T) if isinstance(teacher, Tensor) else teacher
        if isinstance(target, SparseSignal) and target.temperature != T:
            raise ValueError(f"a signal at temperature {target.temperature} for a loss at {T}")
        weight_N1: Tensor | None = None
        if self.token_weights == "student_entropy":
            weight_N1 = student_at(T).entropy_N1()
        elif self.token_weights != "none":
            assert target is not None, "the job gives such weights a signal"
            weight_N1 = _teacher_weights(self.token_weights, target)
        for name, weight in terms.items():
            student = student_at(1.0 if name == "cross_entropy" else T)
            q_NV = student.probs_NV.clone() if len(terms) > 1 else student.probs_NV  # a term may write over it
            if name == "cross_entropy":
                label_N1 = labels_N[:, None].clamp_min(0)
                log_q_N1 = student.log_probs_at(label_N1)
                grad_NV = q_NV.scatter_add_(1, label_N1, q_NV.new_full((1, 1), -1.0).expand_as(label_N1))
                if self.unlabelled:
                    without_N1 = labels_N[:, None] < 0
                    log_q_N1, grad_NV = log_q_N1.masked_fill(without_N1, 0), grad_NV.masked_fill_(without_N1, 0)
                value = -_total(log_q_N1, weight_N1)
                scale = weight
            else:
                assert target is not None, "the job gives every divergence a signal"
                if isinstance(target, SparseSignal):
                    value, grad_NV = self._sparse_divergence(name, target, student, q_NV, weight_N1)
                else:
                    value, grad_NV = self._divergence(name, target, student, q_NV, weight_N1)
                value, scale = value * T**2, weight * T
            sums[name] = value
            if scale != 1:
                grad_NV.mul_(scale)
            total_NV = grad_NV if total_NV is None else total_NV.add_(grad_NV)
        assert total_NV is not None
        if weight_N1 is not None:
            sums[WEIGHT_SUM] = weight_N1.sum()
            total_NV.mul_(weight_N1)
        return sums, total_NV

    def _divergence(
        self, name: str, p: Softmax, q: Softmax, q_NV: Tensor, weight_N1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """D summed over tokens, and q (g - <q, g>), both without the factors of the temperature."""
        if name == "forward_kl":  # g = -p / q
            log_ratio_N1 = torch.linalg.vecdot(p.probs_NV, p.shifted_NV - q.shifted_NV)[:, None]
            value = _total(log_ratio_N1, weight_N1) + _total(q.log_total_N1 - p.log_total_N1, weight_N1)
            return value, q_NV.sub_(p.probs_NV)
        return self._of_logarithms(name, p.log_probs_NV, q.log_probs_NV, p.probs_NV, q_NV, weight_N1)

    def _of_logarithms(
        self, name: str, log_p_NV: Tensor, log_q_NV: Tensor, p_NV: Tensor, q_NV: Tensor, weight_N1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `_divergence`, from all four matrices."""
        if name == "forward_kl":
            return _total((log_p_NV - log_q_NV).mul_(p_NV), weight_N1), q_NV - p_NV
        if name == "reverse_kl":
            g_NV = log_q_NV - log_p_NV
            value_N1 = (g_NV * q_NV).sum(-1, keepdim=True)
            return _total(value_N1, weight_N1), g_NV.sub_(value_N1).mul_(q_NV)
        if name == "total_variation":
            g_NV = (q_NV - p_NV).sign_().mul_(0.5)
            value = 0.5 * _total((q_NV - p_NV).abs_(), weight_N1)
        elif name == "skewed_forward_kl":  # with m = a p + (1 - a) q: g = -(1 - a) p / m
            log_p_to_m_NV = log_p_NV - _log_mixture(log_p_NV, log_q_NV, self.skew)
            value = _total(log_p_to_m_NV * p_NV, weight_N1)
            g_NV = log_p_to_m_NV.exp_().mul_(self.skew - 1)
        elif name == "skewed_reverse_kl":  # with m = (1 - a) p + a q: g = log(q / m) - a q / m, and a constant
            g_NV = log_q_NV - _log_mixture(log_p_NV, log_q_NV, 1 - self.skew)
            value = _total(g_NV * q_NV, weight_N1)
            g_NV = g_NV - g_NV.exp().mul_(self.skew)
        else:  # jsd: what m contributes to the derivative cancels
            beta = self.jsd_beta
            log_m_NV = _log_mixture(log_p_NV, log_q_NV, beta)
            g_NV = (log_q_NV - log_m_NV).mul_(1 - beta)
            value = beta * _total((log_p_NV - log_m_NV).mul_(p_NV), weight_N1) + _total(g_NV * q_NV, weight_N1)
        return value, g_NV.sub_((g_NV * q_NV).sum(-1, keepdim=True)).mul_(q_NV)

    def _sparse_divergence(
        self, name: str, signal: SparseSignal, student: Softmax, q_NV: Tensor, weight_N1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `_divergence`, of a few outcomes: the gradient of all others is the student's softmax, scaled by row."""
        ids_NK = signal.ids_NK
        log_q_NK = student.log_probs_at(ids_NK)
        if signal.tail_N is None:
            if name != "forward_kl" or signal.entropy_N is None:
                raise ValueError(f"{name} of sampled outcomes would be biased")
            value = -_total(signal.probs_NK * log_q_NK, weight_N1) - _total(signal.entropy_N[:, None], weight_N1)
            return value, q_NV.scatter_add_(1, ids_NK, -signal.probs_NK)
        given_NK = q_NV.gather(1, ids_NK)
        others_N1 = q_NV.scatter_(1, ids_NK, 0.0).sum(-1, keepdim=True)  # 1 - sum would cancel
        # L = K + 1 outcomes; logarithms of 0 are cut off, and always meet a factor of 0.
        q_NL, p_NL = torch.cat([given_NK, others_N1], 1), torch.cat([signal.probs_NK, signal.tail_N[:, None]], 1)
        log_q_NL = torch.cat([log_q_NK, others_N1.clamp_min(losses.TINY).log()], 1)
        value, grad_NL = self._of_logarithms(name, p_NL.clamp_min(losses.TINY).log(), log_q_NL, p_NL, q_NL, weight_N1)
        grad_NV = q_NV.mul_(grad_NL[:, -1:] / others_N1.clamp_min(losses.TINY))
        return value, grad_NV.scatter_(1, ids_NK, grad_NL[:, :-1])


def _teacher_weights(name: TokenWeights, teacher: Softmax | SparseSignal) -> Tensor:
    """Weights (N, 1) of tokens from the teacher's distribution; of K outcomes and a tail, the tail is one more."""
    if isinstance(teacher, Softmax):
        return teacher.entropy_N1() if name == "teacher_entropy" else teacher.highest_N1()
    if name == "teacher_confidence":
        if teacher.tail_N is None:
            raise ValueError("teacher_confidence: a random sample need not hold the likeliest token")
        return teacher.probs_NK.amax(-1, keepdim=True)
    if teacher.tail_N is None:
        assert teacher.entropy_N is not None, "a sampled signal brings its entropy"
        return teacher.entropy_N[:, None]
    p_NL = torch.cat([teacher.probs_NK, teacher.tail_N[:, None]], 1)
    return -torch.xlogy(p_NL, p_NL).sum(-1, keepdim=True)


def _log_mixture(log_p_NV: Tensor, log_q_NV: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p_NV + math.log(share), log_q_NV + math.log1p(-share))


def _total(value_NX: Tensor, weight_N1: Tensor | None) -> Tensor:
    """The sum over tokens, each with its weight."""
    return value_NX.sum() if weight_N1 is None else (value_NX * weight_N1).sum()
