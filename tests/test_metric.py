"""The metrics of hidden regression against what they are meant to be.

Legend: N tokens, V vocabulary, d width of the teacher.
"""

from __future__ import annotations

import pytest
import torch

from distill.config import UserError
from distill.metric import MetricSums
from distill.signals import Head

N, V, D = 300, 50, 7


def make_head(**fields: float) -> Head:
    weight_Vd = torch.randn(V, D, generator=torch.Generator().manual_seed(0)) + 0.3
    return Head(weight_Vd, torch.linspace(-1, 1, V), **fields)


def make_hidden(seed: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def test_gram_is_the_squared_error_of_all_logits() -> None:
    """Up to the mean logit, which a softmax does not see."""
    head, z_Nd, hidden_Nd = make_head(scale=0.5), make_hidden(1), make_hidden(2)
    error_NV = head.logits(z_Nd) - head.logits(hidden_Nd)
    expected = (error_NV - error_NV.mean(-1, keepdim=True)).square().mean(-1).sum()
    found = MetricSums(head, "gram").metric(ridge=0)(z_Nd, hidden_Nd)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_fisher_is_the_divergence_to_second_order() -> None:
    """KL of a small step u, the same at all tokens: its mean is what the mean Fisher information says."""
    head, hidden_Nd = make_head(), make_hidden(3)
    sums = MetricSums(head, "fisher")
    sums.add(hidden_Nd[:200])
    sums.add(hidden_Nd[200:])
    metric = sums.metric(ridge=0)
    for seed in range(4):
        step_d = 1e-2 * torch.randn(D, generator=torch.Generator().manual_seed(seed))
        log_p_NV, log_q_NV = (
            torch.log_softmax(head.logits(h_Nd).double(), -1) for h_Nd in (hidden_Nd, hidden_Nd + step_d)
        )
        divergence = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum().item()
        assert metric(hidden_Nd + step_d, hidden_Nd).item() == pytest.approx(divergence, rel=0.05)


def test_ridge_adds_to_the_diagonal_in_units_of_its_mean() -> None:
    plain, ridged = (MetricSums(make_head(), "gram").metric(ridge=r).factor_rr for r in (0.0, 0.5))
    plain_dd, ridged_dd = plain @ plain.t(), ridged @ ridged.t()
    torch.testing.assert_close(
        ridged_dd - plain_dd, 0.5 * plain_dd.diagonal().mean() * torch.eye(D), atol=1e-4, rtol=1e-3
    )


def test_a_softcap_is_refused() -> None:
    with pytest.raises(UserError, match="softcap of 30"):
        MetricSums(make_head(softcap=30.0), "fisher")
