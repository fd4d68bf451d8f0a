"""The student with its loss: head and divergence in chunks, gradient in the forward pass.

The logits of a step, (tokens x vocabulary) in fp32, are by far its largest tensor, and a divergence
needs several of them. Here the head runs over a few hundred tokens at a time; each chunk's gradient with
respect to its logits is taken at once, turned into gradients of the student's output and of the head, and
forgotten. Backward then only hands out what is stored, so memory does not grow with the block.

`StudentWithLoss` is one module whose `forward` returns the loss sums: wrapped by DDP, every parameter is
used inside `forward`, so gradients are synchronised.

Legend: B lanes, T tokens, N = B * T, V vocabulary, d width of student output and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill import losses
from distill.signals import HiddenSignal, Signal
from distill.student import LSTMCache, LSTMForCausalLM

State = tuple[Tensor, Tensor]  # (h_LBH, c_LBH)
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Objective:
    """Terms by name with their weights, and the constants of the divergences."""

    weights: dict[str, float]
    temperature: float = 1.0
    jsd_beta: float = 0.5

    @property
    def needs_logits(self) -> bool:
        return set(self.weights) != {"hidden_mse"}

    def on_logits(self, student_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor | None) -> dict[str, Tensor]:
        """Each logit term's unweighted sum over N tokens, in nats."""
        sums = {}
        for name in self.weights:
            if name == "cross_entropy":
                sums[name] = losses.cross_entropy(student_NV, labels_N)
            elif name != "hidden_mse":
                extra = {"beta": self.jsd_beta} if name == "jsd" else {}
                sums[name] = losses.DIVERGENCES[name](student_NV, teacher_NV, self.temperature, **extra)
        return sums


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
            sums["hidden_mse"] = losses.hidden_mse(z_Nd, signal.hidden_Nd)
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
            for start in range(0, len(z_Nd), CHUNK_TOKENS):
                rows = slice(start, start + CHUNK_TOKENS)
                logits_NV = (z_compute[rows] @ weight_compute.t()).float()
                if bias_V is not None:
                    logits_NV += bias_V
                with torch.enable_grad():
                    logits_NV = logits_NV.detach().requires_grad_()
                    teacher_NV = signal.logits(rows) if signal is not None else None
                    sums = objective.on_logits(logits_NV, labels_N[rows], teacher_NV)
                    weighted = torch.stack([objective.weights[name] * value for name, value in sums.items()]).sum()
                    (grad_NV,) = torch.autograd.grad(weighted, logits_NV)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0) + value.detach()
                grad_compute = grad_NV.to(compute)
                if grad_z is not None:
                    grad_z[rows] = (grad_compute @ weight_compute).to(grad_z.dtype)
                if grad_weight is not None:
                    grad_weight += grad_compute.t() @ z_compute[rows]
                if grad_bias is not None:
                    grad_bias += grad_NV.sum(0)
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
