"""Divergences between teacher and student, as pure functions of logits.

Legend: N tokens, V vocabulary. p is the teacher's distribution, q the student's, both at temperature T.
Every function takes logits (N, V), computes in fp32 and returns the **sum** over the N tokens in nats,
multiplied by T^2 so that gradients keep their size as T grows (Hinton, Vinyals, Dean 2015, arXiv
1503.02531). The caller divides once by the tokens of the whole optimizer step. A divergence is 0 where
p = q.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.signals import ENCODING_ROWS, HiddenSignal, SparseSignal

TINY = 1e-37  # in place of a probability of 0, whose logarithm is infinite


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-sum log q(label) at temperature 1, in nats."""
    return F.cross_entropy(student_NV.float(), labels_N, reduction="sum")


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q): the student must cover all that the teacher holds possible."""
    log_p_NV, log_q_NV = _log_softmax(teacher_NV, temperature), _log_softmax(student_NV, temperature)
    return temperature**2 * F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


def mean_forward_kl(student: HiddenSignal, teacher: HiddenSignal) -> float:
    """KL(p || q) in nats a token of two signals of the same tokens, at temperature 1 and some rows at a time."""
    tokens = len(teacher.hidden_Nd)
    parts = [slice(start, start + ENCODING_ROWS) for start in range(0, tokens, ENCODING_ROWS)]
    with torch.inference_mode():
        return sum(forward_kl(student.logits(rows), teacher.logits(rows)).item() for rows in parts) / tokens


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p): the student must not say what the teacher would not."""
    log_p_NV, log_q_NV = _log_softmax(teacher_NV, temperature), _log_softmax(student_NV, temperature)
    return temperature**2 * F.kl_div(log_p_NV, log_q_NV, reduction="sum", log_target=True)


def jsd(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Source: Agarwal et al. 2023, arXiv 2306.13649, equation 1.
    """
    log_p_NV, log_q_NV = _log_softmax(teacher_NV, temperature), _log_softmax(student_NV, temperature)
    log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
    kl_p = F.kl_div(log_m_NV, log_p_NV, reduction="sum", log_target=True)
    kl_q = F.kl_div(log_m_NV, log_q_NV, reduction="sum", log_target=True)
    return temperature**2 * (beta * kl_p + (1 - beta) * kl_q)


def skewed_forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q): never more than -log(skew) a token, however little the student thinks of it.

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1.
    """
    return _kl_to_mixture(teacher_NV, student_NV, temperature, skew)


def skewed_reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, skew: float = 0.1) -> Tensor:
    """KL(q || (1 - skew) p + skew q), from the same source."""
    return _kl_to_mixture(student_NV, teacher_NV, temperature, skew)


def _kl_to_mixture(first_NV: Tensor, second_NV: Tensor, temperature: float, share: float) -> Tensor:
    """KL(a || share a + (1 - share) b)."""
    log_a_NV, log_b_NV = _log_softmax(first_NV, temperature), _log_softmax(second_NV, temperature)
    log_m_NV = torch.logaddexp(log_a_NV + math.log(share), log_b_NV + math.log1p(-share))
    return temperature**2 * F.kl_div(log_m_NV, log_a_NV, reduction="sum", log_target=True)


def total_variation(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """1/2 sum |p - q|: one minus the acceptance rate of speculative sampling."""
    p_NV, q_NV = _log_softmax(teacher_NV, temperature).exp(), _log_softmax(student_NV, temperature).exp()
    return temperature**2 * 0.5 * (p_NV - q_NV).abs().sum()


def hidden_mse(student_Nd: Tensor, teacher_Nd: Tensor) -> Tensor:
    """Squared distance of final hidden states (N, d), averaged over d and summed over N."""
    return (student_Nd.float() - teacher_Nd.float()).square().mean(-1).sum()


def layer_mse(projected_Nd: Tensor, teacher_Nd: Tensor) -> Tensor:
    """`hidden_mse` to an inner state of the teacher, normalised: such states have a few dimensions of huge size."""
    return hidden_mse(projected_Nd, F.layer_norm(teacher_Nd.float(), teacher_Nd.shape[-1:]))


def logit_mse(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Squared distance of logits, averaged over V and summed over N (Ba and Caruana 2014, arXiv 1312.6184)."""
    return (student_NV.float() - teacher_NV.float()).square().mean(-1).sum()


Divergence = Callable[..., Tensor]
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
}


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits_NV.float() / temperature, dim=-1)


def coarsen(student_NV: Tensor, signal: SparseSignal) -> tuple[Tensor, Tensor]:
    """Student and teacher as logits (N, K + 1), at temperature 1, of a signal's K outcomes and of all others as one.

    For a signal with a tail. Of these, a divergence at temperature 1 times T^2 is the sparse one.
    """
    assert signal.tail_N is not None, "sampled outcomes stand for all"
    student_NV = student_NV.float() / signal.temperature
    given_NK = student_NV.gather(1, signal.ids_NK)
    if signal.ids_NK.shape[1] == student_NV.shape[1]:
        return given_NK, signal.probs_NK.log()
    others_N1 = student_NV.scatter(1, signal.ids_NK, -math.inf).logsumexp(-1, keepdim=True)
    probs_NL = torch.cat([signal.probs_NK, signal.tail_N[:, None]], 1)
    return torch.cat([given_NK, others_N1], 1), probs_NL.clamp_min(TINY).log()


def sampled_forward_kl(student_NV: Tensor, signal: SparseSignal) -> Tensor:
    """KL(p || q) from sampled outcomes with importance weights: without bias, as its gradient is."""
    assert signal.entropy_N is not None, "a sampled signal brings its entropy"
    log_q_NK = _log_softmax(student_NV, signal.temperature).gather(1, signal.ids_NK)
    return signal.temperature**2 * (-(signal.probs_NK * log_q_NK).sum() - signal.entropy_N.sum())


def activation_penalty(_: Tensor, dropped_BTH: Tensor, reset_BT: Tensor | None) -> Tensor:
    """AR of AWD-LSTM: mean square of a position's outputs after dropout, summed over positions (arXiv 1708.01009)."""
    return dropped_BTH.float().square().mean(-1).sum()


def temporal_activation_penalty(output_BTH: Tensor, _: Tensor, reset_BT: Tensor | None) -> Tensor:
    """TAR of AWD-LSTM: mean square of the change of outputs from a position to the next, summed over positions.

    Of outputs before dropout (arXiv 1708.01009). A document's first position changes nothing, nor does a block's.
    """
    change_Bt = (output_BTH[:, 1:].float() - output_BTH[:, :-1].float()).square().mean(-1)
    return (change_Bt if reset_BT is None else change_Bt.masked_fill(reset_BT[:, 1:], 0.0)).sum()


# Of the outputs (B, T, H) of the student's last cell, before and after dropout, and its resets; sums over positions.
PENALTIES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "activation_penalty": activation_penalty,
    "temporal_activation_penalty": temporal_activation_penalty,
}
