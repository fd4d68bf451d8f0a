"""The student with its loss: head and divergence in chunks, gradient in the forward pass.

The logits of a step, (tokens x vocabulary) in fp32, are by far its largest tensor, and a divergence needs several of
them. Here the head runs over a few hundred tokens at a time, into one buffer in the compute type. The divergence is
then taken of a few tokens at a time, whose fp32 matrices stay in the cache of a CPU, and its gradient with respect to
the logits is written over them. From there it becomes gradients of the student's output and of the head. Backward only
hands out what is stored, so memory does not grow with the block. The products walk over tiles of the vocabulary: an
fp32 head under autocast is converted tile by tile, and no second matrix of its size comes into being.

`StudentWithLoss` is one module whose `forward` returns the loss sums: wrapped by DDP, every parameter is
used inside `forward`, so gradients are synchronised. The student is our LSTM, which carries its state from block to
block, or any Transformer, which reads each block with the context before it.

Legend: B lanes, T tokens, N = B * T, W = T and the context before it (LSTM: none), V vocabulary, d width of student
output and head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import losses
from distill.candidates import Candidates
from distill.objective import Objective
from distill.signals import DenseSignal, HiddenSignal, MixedSignal, Signal, SparseSignal
from distill.student import LSTMCache, LSTMForCausalLM, LSTMModel, State


def chunk_sizes(device: str, vocabulary: int, item_bytes: int) -> tuple[int, int, int, int]:
    """Tokens of the student's logits, of the teacher's, of a divergence at one time; columns of a tile of the head.

    On a CPU: 33 MiB of student logits, for every chunk converts a trained head and passes over its gradient once;
    the fewest teacher logits at which its product runs at full speed; so few rows of fp32 that a core's second-level
    cache holds them; tiles small against all that.
    """
    student_MiB, part_MiB, tile = (33, 0.75, 1024) if device == "cpu" else (512, 256, 16384)
    rows = max(16, int(student_MiB * 2**20) // (vocabulary * item_bytes))
    return rows, max(1, rows // 4), max(1, min(rows // 4, int(part_MiB * 2**20) // (vocabulary * 4))), tile


class StudentWithLoss(nn.Module):
    """The student and its objective as one module; for `layer_mse` with a projection of each block's output."""

    def __init__(
        self,
        student: PreTrainedModel,
        layer_width: int | None = None,
        penalties: Mapping[str, float] | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        """`layer_width`: the teacher's width, with `layer_mse`. `penalties`: of `PENALTIES`, with their weights. Both
        are for an LSTM. `logit_scale`: factor behind the head."""
        super().__init__()
        self.student, self.penalties, self.logit_scale = student, penalties or {}, logit_scale
        hidden_size, blocks = student.config.hidden_size, student.config.num_layers if layer_width else 0
        self._frozen_head_Vd: Tensor | None = None  # lasts as long as this module, which is made for one stage
        self.layer_projections = nn.ModuleList(nn.Linear(hidden_size, layer_width or 0) for _ in range(blocks))

    def forward(
        self,
        inputs_BW: Tensor,
        labels_BT: Tensor,
        starts_BW: Tensor | None,
        state: State | None,
        signal: Signal | None,
        objective: Objective,
        candidates: Candidates | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], State | None]:
        """Weighted loss sum in nats (with gradient), sums of terms and penalties (without), and the carried state.

        `starts_BW` tells documents apart: where an LSTM's state is zeroed (bool), or a Transformer's position ids. With
        weights of tokens their sum is among the sums, and all of it is still to be divided by their mean. With
        `candidates` the terms of the logits are taken over these instead of the whole vocabulary.
        """
        states_BTH: list[Tensor] = []
        last_outputs: list[Tensor] = []  # of the last cell, before dropout and after it, for penalties
        if isinstance(self.student, LSTMForCausalLM):
            z_BTd, carried = self._read_on(self.student.model, inputs_BW, starts_BW, state, states_BTH, last_outputs)
        else:
            read = self.student.base_model(input_ids=inputs_BW, position_ids=starts_BW, use_cache=False)
            z_BTd, carried = read.last_hidden_state[:, -labels_BT.shape[1] :], None
        z_Nd, labels_N = z_BTd.flatten(0, 1), labels_BT.flatten()
        loss = z_Nd.new_zeros((), dtype=torch.float32)
        sums: dict[str, Tensor] = {}
        if objective.logit_terms:
            weight_Vd, teacher = self._head_weight(), signal
            bias_V: Tensor | None = self._head.bias
            scaled_Nd = z_Nd
            if self.logit_scale != 1.0:
                scaled_Nd, bias_V = z_Nd * self.logit_scale, None if bias_V is None else bias_V * self.logit_scale
            if candidates is not None:
                weight_Vd, bias_V = candidates.head(weight_Vd, bias_V)
                labels_N = candidates.places(labels_N)
                teacher = candidates.signal(signal) if objective.needs_teacher_logits else None
            loss, *parts = _ChunkedHeadLoss.apply(scaled_Nd, weight_Vd, bias_V, labels_N, teacher, objective)
            sums.update(zip(objective.sum_names, parts, strict=True))
        states = signal.parts[0] if isinstance(signal, MixedSignal) else signal
        if "hidden_mse" in objective.weights:
            assert isinstance(states, HiddenSignal), "the job checks that hidden states are at hand"
            hidden_Nd, metric = states.hidden_Nd.to(z_Nd.device), objective.metric
            sums["hidden_mse"] = metric(z_Nd, hidden_Nd) if metric else losses.hidden_mse(z_Nd, hidden_Nd)
            loss = loss + objective.weights["hidden_mse"] * sums["hidden_mse"]
        if "layer_mse" in objective.weights:
            assert isinstance(states, HiddenSignal), "the job checks that hidden states are at hand"
            pairs = zip(self.layer_projections, states_BTH, states.layers, strict=True)
            distances = [
                losses.layer_mse(project(state_BTH.flatten(0, 1)), layer_Nd.to(z_Nd.device))
                for project, state_BTH, layer_Nd in pairs
            ]
            sums["layer_mse"] = torch.stack(distances).mean()
            loss = loss + objective.weights["layer_mse"] * sums["layer_mse"]
        for name, weight in self.penalties.items():
            output_BTH, dropped_BTH = last_outputs
            sums[name] = losses.PENALTIES[name](output_BTH, dropped_BTH, starts_BW)
            loss = loss + weight * sums[name]
        return loss, {name: value.detach() for name, value in sums.items()}, carried

    def _read_on(
        self,
        model: LSTMModel,
        inputs_BT: Tensor,
        reset_BT: Tensor | None,
        state: State | None,
        states: list[Tensor],
        last_outputs: list[Tensor],
    ) -> tuple[Tensor, State]:
        """z_BTd from a state on, and the state after it; what is needed of the blocks' outputs goes to the lists."""
        carried = LSTMCache(*state) if state is not None else LSTMCache()
        watched = list(model.layers) if self.layer_projections else []
        hooks = [block.register_forward_hook(lambda _, __, output: states.append(output[0])) for block in watched]
        if self.penalties:
            dropout = model.layers[-1].get_submodule("dropout")
            hook = dropout.register_forward_hook(lambda _, inputs, output: last_outputs.extend((*inputs, output)))
            hooks.append(hook)
        output = model(inputs_BT, past_key_values=carried, reset_mask=reset_BT, use_cache=True)
        for hook in hooks:
            hook.remove()
        return output.last_hidden_state, carried.detach().state

    @property
    def _head(self) -> nn.Linear:
        return cast(nn.Linear, self.student.get_output_embeddings())

    def _head_weight(self) -> Tensor:
        """The head's weight; of a frozen head the same in the type of the step, converted once."""
        weight_Vd: Tensor = self._head.weight
        device = weight_Vd.device.type
        if weight_Vd.requires_grad or not torch.is_autocast_enabled(device):
            return weight_Vd
        if self._frozen_head_Vd is None:
            self._frozen_head_Vd = weight_Vd.detach().to(torch.get_autocast_dtype(device))
        return self._frozen_head_Vd


class _TeacherRows:
    """The teacher's side of a few tokens after the other; the logits of hidden states are made `chunk` at a time."""

    def __init__(self, signal: Signal, chunk: int, temperature: float) -> None:
        """`temperature`: at which several teachers are mixed."""
        self.signal, self.chunk, self.temperature = signal, chunk, temperature
        parts = signal.parts if isinstance(signal, MixedSignal) else ()
        self.parts = [_TeacherRows(part, chunk, temperature) for part in parts]
        self.made = slice(0, 0)
        self.product_CV: Tensor | None = None

    def __call__(self, rows: slice, device: torch.device) -> Tensor | SparseSignal:
        signal = self.signal
        if isinstance(signal, SparseSignal):
            return signal.rows(rows, device)
        if isinstance(signal, DenseSignal):
            return signal.logits_NV[rows].to(device)
        if isinstance(signal, MixedSignal):
            return signal.mix([part.logits(rows, device) for part in self.parts], self.temperature)
        return self.logits(rows, device)

    def logits(self, rows: slice, device: torch.device) -> Tensor:
        """Of hidden states."""
        signal = self.signal
        assert isinstance(signal, HiddenSignal)
        if rows.stop > self.made.stop:
            self.made = slice(rows.start, rows.start + self.chunk)
            hidden_Cd = signal.hidden_Nd[self.made]
            if self.product_CV is None:
                weight_Vd = signal.head.weight_Vd
                self.product_CV = weight_Vd.new_empty(len(hidden_Cd), len(weight_Vd))
            signal.head.product(hidden_Cd, out=self.product_CV[: len(hidden_Cd)])
        assert self.product_CV is not None, "rows come in order"
        product_NV = self.product_CV[rows.start - self.made.start : rows.stop - self.made.start]
        return signal.head.finish(product_NV).to(device)


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
        (N, _), V = z_Nd.shape, len(weight_Vd)
        chunk, teacher_chunk, part, tile = chunk_sizes(device, V, compute.itemsize)
        chunk = math.ceil(N / math.ceil(N / chunk))  # all of about the same size
        tiled = need_weight or weight_Vd.dtype != compute  # else no second matrix of the head's size is in sight
        tile = min(tile, V) if tiled else V
        tiles = [slice(start, min(start + tile, V)) for start in range(0, V, tile)]
        asked = signal if objective.needs_teacher_logits else None
        teacher = _TeacherRows(asked, teacher_chunk, objective.temperature) if asked else None
        with torch.autocast(device, enabled=False):
            grad_z = torch.empty_like(z_Nd) if need_z else None
            grad_weight = torch.empty_like(weight_Vd, dtype=torch.float32) if need_weight else None
            grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None
            totals: dict[str, Tensor] = {}
            # What is computed first is what the rest is written over: one buffer of each size for the whole loop.
            logits_CV = z_Nd.new_empty(min(chunk, N), V, dtype=compute)
            tile_td = z_Nd.new_empty(tile if weight_Vd.dtype != compute else 0, z_Nd.shape[1], dtype=compute)
            product_td = z_Nd.new_empty(tile if need_weight else 0, z_Nd.shape[1], dtype=compute)

            def multiply(done: slice | None, due: slice | None) -> None:
                """Gradients of the tokens `done` and, in their place, the logits of those `due`: a tile of the head is
                converted once for both."""
                done_cd, due_cd = (None if rows is None else z_Nd[rows].to(compute) for rows in (done, due))
                grad_cd = None if done_cd is None or grad_z is None else torch.zeros_like(done_cd, dtype=torch.float32)
                for columns in tiles:
                    weight_vd = weight_Vd[columns]
                    if weight_vd.dtype != compute:
                        weight_vd = tile_td[: len(weight_vd)].copy_(weight_vd)
                    if done is not None and done_cd is not None:
                        grad_cv = logits_CV[: len(done_cd), columns]
                        if grad_cd is not None:
                            grad_cd += grad_cv @ weight_vd
                        if grad_weight is not None:
                            product_vd = torch.mm(grad_cv.t(), done_cd, out=product_td[: len(weight_vd)])
                            grad_vd = grad_weight[columns]
                            grad_vd.copy_(product_vd) if done.start == 0 else grad_vd.add_(product_vd)
                    if due_cd is not None:
                        torch.mm(due_cd, weight_vd.t(), out=logits_CV[: len(due_cd), columns])
                if grad_z is not None and grad_cd is not None:
                    grad_z[done] = grad_cd

            chunks = [slice(start, min(start + chunk, N)) for start in range(0, N, chunk)]
            for done, due in zip((None, *chunks), (*chunks, None), strict=True):
                multiply(done, due)
                if due is None:
                    break
                for start in range(due.start, due.stop, part):
                    rows = slice(start, min(start + part, due.stop))
                    logits_NV = logits_CV[start - due.start : rows.stop - due.start]
                    student_NV = logits_NV if bias_V is None else logits_NV.float() + bias_V
                    target = teacher(rows, z_Nd.device) if teacher else None
                    sums, grad_NV = objective.gradient(student_NV, labels_N[rows], target)
                    for name, value in sums.items():
                        totals[name] = totals.get(name, 0) + value
                    if grad_bias is not None:
                        grad_bias += grad_NV.sum(0)
                    logits_NV.copy_(grad_NV)
        ctx.gradients = (grad_z, grad_weight, grad_bias)
        loss = torch.stack([weight * totals[name] for name, weight in objective.logit_terms.items()]).sum()
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
