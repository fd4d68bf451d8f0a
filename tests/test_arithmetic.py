"""Gradients in bf16 are those of fp32, at the sizes at which a library has been wrong, and what is wrong is found."""

import pytest
import torch
from torch import nn

from distill import arithmetic, student
from distill.arithmetic import check_gradients
from distill.config import UserError
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import hardware_has_bf16

pytestmark = pytest.mark.skipif(not hardware_has_bf16(torch.device("cpu")), reason="bf16 is emulated here, slowly")


@pytest.mark.parametrize("hidden_size", [512, 1000, 1024, 1536])
def test_gradients_in_bf16(hidden_size: int) -> None:
    check_gradients(nn.LSTM(hidden_size, hidden_size, batch_first=True))


@pytest.mark.parametrize("resets", [False, True])
def test_all_of_a_wide_student(resets: bool) -> None:
    """Weights too, and in the training type as a whole."""
    torch.manual_seed(0)
    model = LSTMForCausalLM(LSTMConfig(vocab_size=50, embedding_size=16, hidden_size=1024, num_layers=1)).train()
    ids_BT = torch.arange(32).view(2, 16) % model.config.vocab_size
    reset_BT = torch.zeros(2, 16, dtype=torch.bool) if not resets else torch.arange(32).view(2, 16) % 7 == 0
    gradients = []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            z_BTd = model.model(ids_BT, reset_mask=reset_BT).last_hidden_state
        z_BTd.float().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if "lstm" in name})
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() < 0.25 * exact.norm(), name


def test_what_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(cell, x_BTH, state, steps, dropout):
        output_BTH, last = student.run_fused(cell, x_BTH, state, steps, dropout)
        return output_BTH * (2.0 if torch.is_autocast_enabled("cpu") else 1.0), last

    monkeypatch.setattr(arithmetic, "run_fused", wrong)
    with pytest.raises(UserError, match="LSTM of 16 units .* choose run.precision=fp32"):
        check_gradients(nn.LSTM(16, 16, batch_first=True))
