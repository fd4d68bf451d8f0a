"""The student with its loss: head and divergence in chunks, gradient in the forward pass.

The logits of a step, (tokens x vocabulary) in fp32, are by far its largest tensor, and a divergence
needs several of them. Here the head runs over a hundred tokens at a time; each chunk's gradient with
respect to its logits is written down at once, turned into gradients of the student's output and of the
head, and forgotten. Backward then only hands out what is stored, so memory does not grow with the block.

`StudentWithLoss` is one module whose `forward` returns the loss sums: wrapped by DDP, every parameter is
used inside `forward`, so gradients are synchronised.

Legend: B lanes, T tokens, N = B * T, V vocabulary, d width of student output and head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill import losses
from distill.metric import HiddenMetric
from distill.signals import HiddenSignal, Signal, SparseSignal
from distill.student import LSTMCache, LSTMForCausalLM

State = tuple[Tensor, Tensor]  # (h_LBH, c_LBH)
CHUNK_ROWS = 128  # tokens whose logits exist at one time
HEAD_ROWS = 512  # tokens between two updates of the head's gradient


@dataclass(frozen=True)
class Objective:
    """Terms by name with their weights, and the constants of the divergences."""

    weights: dict[str, float]
    temperature: float = 1.0
    jsd_beta: float = 0.5
    metric: HiddenMetric | None = None  # of hidden_mse; None is the identity

    @property
    def needs_logits(self) -> bool:
        return set(self.weights) != {"hidden_mse"}

    @property
    def needs_teacher_logits(self) -> bool:
        return not set(self.weights) <= {"cross_entropy", "hidden_mse"}

    def gradient(
        self, student_NV: Tensor, labels_N: Tensor, teacher: Tensor | SparseSignal | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each logit term's unweighted sum in nats, and the gradient (N, V) of the weighted sum in fp32.

        In closed form: for a divergence D(q) of the student's distribution q at temperature T and g = dD/dq, the
        gradient with respect to logits is T^2 q (g - <q, g>) / T. It takes half the passes over (N, V) that
        autograd takes through `distill/losses.py`, which is the oracle for both sums and gradient.
        """
        sums: dict[str, Tensor] = {}
        total_NV: Tensor | None = None
        T = self.temperature
        log_q_NV = log_p_NV = q_NV = p_NV = None
        for name, weight in self.weights.items():
            if name == "hidden_mse":
                continue
            if name == "cross_entropy":
                log_q1_NV = log_q_NV if T == 1 and log_q_NV is not None else _log_softmax(student_NV, 1.0)
                label_N1 = labels_N[:, None]
                sums[name] = -log_q1_NV.gather(1, label_N1).sum()
                grad_NV = log_q1_NV.exp()
                grad_NV.scatter_add_(1, label_N1, grad_NV.new_full((1, 1), -1.0).expand_as(label_N1))
                scale = weight
            elif isinstance(teacher, SparseSignal):
                sums[name], grad_NV = self._sparse_divergence(name, student_NV, teacher)
                sums[name] = sums[name] * T**2
                scale = weight * T
            else:
                assert teacher is not None, "the job gives every divergence a signal"
                if log_p_NV is None or log_q_NV is None or p_NV is None or q_NV is None:
                    log_q_NV, log_p_NV = _log_softmax(student_NV, T), _log_softmax(teacher, T)
                    q_NV, p_NV = log_q_NV.exp(), log_p_NV.exp()
                sums[name], grad_NV = self._divergence(name, log_p_NV, log_q_NV, p_NV, q_NV)
                sums[name] = sums[name] * T**2
                scale = weight * T
            if scale != 1:
                grad_NV.mul_(scale)
            total_NV = grad_NV if total_NV is None else total_NV.add_(grad_NV)
        assert total_NV is not None
        return sums, total_NV

    def _sparse_divergence(self, name: str, student_NV: Tensor, signal: SparseSignal) -> tuple[Tensor, Tensor]:
        """As `_divergence`, of a few outcomes: the gradient of all others is the student's softmax, scaled by row."""
        if signal.temperature != self.temperature:
            raise ValueError(f"a signal at temperature {signal.temperature} for a loss at {self.temperature}")
        ids_NK, student_NV = signal.ids_NK, student_NV.float()
        if self.temperature != 1:
            student_NV = student_NV / self.temperature
        highest_N1 = student_NV.amax(-1, keepdim=True)
        mass_NV = (student_NV - highest_N1).exp_()
        if signal.tail_N is None:
            if name != "forward_kl" or signal.entropy_N is None:
                raise ValueError(f"{name} of sampled outcomes would be biased")
            total_N1 = mass_NV.sum(-1, keepdim=True)
            log_q_NK = student_NV.gather(1, ids_NK) - (highest_N1 + total_N1.log())
            value = -(signal.probs_NK * log_q_NK).sum() - signal.entropy_N.sum()
            return value, mass_NV.div_(total_N1).scatter_add_(1, ids_NK, -signal.probs_NK)
        given_NK = mass_NV.gather(1, ids_NK)
        mass_NV.scatter_(1, ids_NK, 0.0)
        others_N1 = mass_NV.sum(-1, keepdim=True)
        # L = K + 1 outcomes; logarithms of 0 are cut off, and always meet a factor of 0.
        mass_NL = torch.cat([given_NK, others_N1], 1)
        total_N1 = mass_NL.sum(-1, keepdim=True)
        log_q_NL = torch.cat([student_NV.gather(1, ids_NK) - highest_N1, others_N1.clamp_min(losses.TINY).log()], 1)
        p_NL = torch.cat([signal.probs_NK, signal.tail_N[:, None]], 1)
        log_p_NL = p_NL.clamp_min(losses.TINY).log()
        value, grad_NL = self._divergence(name, log_p_NL, log_q_NL - total_N1.log(), p_NL, mass_NL / total_N1)
        grad_NV = mass_NV.mul_(grad_NL[:, -1:] / others_N1.clamp_min(losses.TINY))
        return value, grad_NV.scatter_(1, ids_NK, grad_NL[:, :-1])

    def _divergence(
        self, name: str, log_p_NV: Tensor, log_q_NV: Tensor, p_NV: Tensor, q_NV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """D summed over tokens, and q (g - <q, g>), both without the factors of the temperature."""
        if name == "forward_kl":  # g = -p / q
            value = (log_p_NV - log_q_NV).mul_(p_NV).sum()
            return value, q_NV - p_NV
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


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    if temperature != 1:
        logits_NV = logits_NV.float() / temperature
    return torch.log_softmax(logits_NV, -1, dtype=torch.float32)


class StudentWithLoss(nn.Module):
    """The student and its objective as one module."""

    def __init__(self, student: LSTMForCausalLM) -> None:
        super().__init__()
        self.student = student

    def forward(
        self,
        inputs_BT: Tensor,
        labels_BT: Tensor,
        reset_BT: Tensor | None,
        state: State | None,
        signal: Signal | None,
        objective: Objective,
    ) -> tuple[Tensor, dict[str, Tensor], State]:
        """Weighted loss sum in nats (with gradient), each term's sum (without), and the carried state."""
        carried = LSTMCache(*state) if state is not None else LSTMCache()
        output = self.student.model(inputs_BT, past_key_values=carried, reset_mask=reset_BT, use_cache=True)
        carried = carried.detach()
        z_Nd, labels_N = output.last_hidden_state.flatten(0, 1), labels_BT.flatten()
        loss = z_Nd.new_zeros((), dtype=torch.float32)
        sums: dict[str, Tensor] = {}
        if objective.needs_logits:
            head = self.student.lm_head
            names = [name for name in objective.weights if name != "hidden_mse"]
            loss, *parts = _ChunkedHeadLoss.apply(z_Nd, head.weight, head.bias, labels_N, signal, objective)
            sums.update(zip(names, parts, strict=True))
        if "hidden_mse" in objective.weights:
            assert isinstance(signal, HiddenSignal), "the job checks that hidden states are at hand"
            hidden_Nd, metric = signal.hidden_Nd.to(z_Nd.device), objective.metric
            sums["hidden_mse"] = metric(z_Nd, hidden_Nd) if metric else losses.hidden_mse(z_Nd, hidden_Nd)
            loss = loss + objective.weights["hidden_mse"] * sums["hidden_mse"]
        assert carried.h_LBH is not None and carried.c_LBH is not None, "a block was read"
        return loss, {name: value.detach() for name, value in sums.items()}, (carried.h_LBH, carried.c_LBH)


class _ChunkedHeadLoss(torch.autograd.Function):
    """(z, W, b) -> weighted loss sum, and each term's sum; gradients are ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        z_Nd: Tensor,
        weight_Vd: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        signal: Signal | None,
        objective: Objective,
    ) -> tuple[Tensor, ...]:
        device = z_Nd.device.type
        autocast = torch.is_autocast_enabled(device)
        compute = torch.get_autocast_dtype(device) if autocast else weight_Vd.dtype
        need_z, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            z_compute, weight_compute = z_Nd.to(compute), weight_Vd.to(compute)
            grad_z = torch.empty_like(z_Nd) if need_z else None
            grad_weight = torch.zeros_like(weight_Vd, dtype=torch.float32) if need_weight else None
            grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None
            totals: dict[str, Tensor] = {}
            # The head's gradient passes over all of it: worth more rows at a time than the softmaxes, whose
            # chunks should stay in the cache.
            for outer in range(0, len(z_Nd), HEAD_ROWS):
                z_outer = z_compute[outer : outer + HEAD_ROWS]
                grad_outer = z_outer.new_empty(len(z_outer), len(weight_Vd)) if need_weight else None
                for inner in range(0, len(z_outer), CHUNK_ROWS):
                    rows = slice(outer + inner, outer + min(inner + CHUNK_ROWS, len(z_outer)))
                    logits_NV = z_compute[rows] @ weight_compute.t()
                    if bias_V is not None:
                        logits_NV = logits_NV.float() + bias_V
                    teacher: Tensor | SparseSignal | None = None
                    if signal is not None and objective.needs_teacher_logits:
                        if isinstance(signal, SparseSignal):
                            teacher = signal.rows(rows, logits_NV.device)
                        else:
                            teacher = signal.logits(rows).to(logits_NV.device)
                    sums, grad_NV = objective.gradient(logits_NV, labels_N[rows], teacher)
                    for name, value in sums.items():
                        totals[name] = totals.get(name, 0) + value
                    if grad_bias is not None:
                        grad_bias += grad_NV.sum(0)
                    grad_compute = grad_NV.to(compute)
                    if grad_z is not None:
                        grad_z[rows] = (grad_compute @ weight_compute).to(grad_z.dtype)
                    if grad_outer is not None:
                        grad_outer[inner : inner + CHUNK_ROWS] = grad_compute
                if grad_weight is not None and grad_outer is not None:
                    grad_weight += grad_outer.t() @ z_outer
        ctx.gradients = (grad_z, grad_weight, grad_bias)
        loss = torch.stack([objective.weights[name] * value for name, value in totals.items()]).sum()
        parts = tuple(totals.values())
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward through the fused loss a second time: its gradients are given away once")
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.gradients]
        ctx.gradients = None  # scaled in place, so good for one backward only
        return *scaled, None, None, None
