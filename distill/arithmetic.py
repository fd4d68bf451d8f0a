"""Whether a machine's low precision can be trusted with a student's gradients.

Libraries have been wrong here without a word: oneDNN's LSTM of 1,024 units or more, in bf16 on AMX, had gradients that
were off by more than their own size (torch 2.13), while its outputs were right and training went on. What is known of
that, `misread` in `distill/student.py` goes around; this finds what is not known.

Legend: B sequences, T positions, H hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from distill.config import UserError
from distill.student import Steps, run_fused

ALLOWED = 0.25  # of the gradient's norm; bf16 rightly computed is off by about 0.01


def check_gradients(model: nn.Module) -> None:
    """UserError where bf16 gives the first LSTM of a model other gradients than fp32; takes milliseconds."""
    cell = next((module for module in model.modules() if isinstance(module, nn.LSTM)), None)
    if cell is None:
        return
    weight_GH, H = cell.get_parameter("weight_hh_l0"), cell.hidden_size
    generator = torch.Generator().manual_seed(0)
    x_BTH = torch.randn(4, 8, cell.input_size, generator=generator).to(weight_GH.device).requires_grad_()
    zero_1BH = x_BTH.new_zeros(1, 4, H)
    reset_BT = torch.zeros(4, 8, dtype=torch.bool, device=weight_GH.device)
    reset_BT[0, 5] = True
    for steps in (None, Steps.of(reset_BT)):
        gradients: list[torch.Tensor] = []
        for low in (False, True):
            with torch.enable_grad(), torch.autocast(weight_GH.device.type, torch.bfloat16, enabled=low):
                output_BTH, _ = run_fused(cell, x_BTH, (zero_1BH, zero_1BH), steps, 0.0)
            gradients += torch.autograd.grad(output_BTH.float().square().sum(), x_BTH)
        exact_BTH, rounded_BTH = gradients
        error = ((rounded_BTH - exact_BTH).norm() / exact_BTH.norm()).item()
        if not error <= ALLOWED:
            raise UserError(
                f"run.precision=bf16: expected gradients of an LSTM of {H} units near those of fp32, found them off by "
                f"{error:.0%}: this machine's library computes them wrongly; choose run.precision=fp32 or another "
                "student.hidden_size"
            )
