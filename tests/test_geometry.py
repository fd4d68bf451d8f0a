"""The metrics of hidden regression against what they are meant to be.

Legend: N tokens, V vocabulary, d width of the teacher.
"""

from __future__ import annotations

import pytest
import torch

from distill.config import UserError
from distill.geometry import Basis, HiddenMetric, HiddenMoments, MetricSums
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
    found = HiddenMetric.of(MetricSums(head, "gram").matrix(ridge=0))(z_Nd, hidden_Nd)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_fisher_is_the_divergence_to_second_order() -> None:
    """KL of a small step u, the same at all tokens: its mean is what the mean Fisher information says."""
    head, hidden_Nd = make_head(), make_hidden(3)
    sums = MetricSums(head, "fisher")
    sums.add(hidden_Nd[:200])
    sums.add(hidden_Nd[200:])
    metric = HiddenMetric.of(sums.matrix(ridge=0))
    for seed in range(4):
        step_d = 1e-2 * torch.randn(D, generator=torch.Generator().manual_seed(seed))
        log_p_NV, log_q_NV = (
            torch.log_softmax(head.logits(h_Nd).double(), -1) for h_Nd in (hidden_Nd, hidden_Nd + step_d)
        )
        divergence = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum().item()
        assert metric(hidden_Nd + step_d, hidden_Nd).item() == pytest.approx(divergence, rel=0.05)


def test_ridge_adds_to_the_diagonal_in_units_of_its_mean() -> None:
    plain_dd, ridged_dd = (MetricSums(make_head(), "gram").matrix(ridge=r) for r in (0.0, 0.5))
    expected_dd = 0.5 * plain_dd.diagonal().mean() * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(ridged_dd - plain_dd, expected_dd, atol=1e-4, rtol=1e-3)


def test_basis_loses_the_least_of_the_logits() -> None:
    """In the gram metric it is the truncated singular value decomposition of the centred logits themselves."""
    head, hidden_Nd = make_head(), make_hidden(4) @ torch.randn(D, D) + 2
    moments = HiddenMoments(D, torch.device("cpu"))
    moments.add(hidden_Nd[:100])
    moments.add(hidden_Nd[100:])
    basis = Basis.of(*moments.solve(), MetricSums(head, "gram").matrix(ridge=0), rank=3)
    logits_NV = head.logits(hidden_Nd)
    found_NV = basis.head(head).logits(basis.coordinates(hidden_Nd))
    # The mean logit of a token is not seen by a softmax, nor by the metric.
    centred_NV = (logits_NV - logits_NV.mean(-1, keepdim=True)).double()
    left_NN, sizes, right = torch.linalg.svd(centred_NV - centred_NV.mean(0), full_matrices=False)
    expected_NV = (left_NN[:, :3] * sizes[:3]) @ right[:3] + centred_NV.mean(0)
    torch.testing.assert_close((found_NV - found_NV.mean(-1, keepdim=True)).double(), expected_NV, atol=2e-3, rtol=2e-3)


def test_a_full_basis_loses_nothing() -> None:
    head, hidden_Nd = make_head(scale=0.5), make_hidden(5)
    moments = HiddenMoments(D, torch.device("cpu"))
    moments.add(hidden_Nd)
    basis = Basis.of(*moments.solve(), torch.eye(D), rank=D)
    torch.testing.assert_close(
        basis.head(head).logits(basis.coordinates(hidden_Nd)), head.logits(hidden_Nd), atol=1e-3, rtol=1e-3
    )
    back_Nd = basis.mean_d + basis.coordinates(hidden_Nd) @ basis.lift_dr.t()
    torch.testing.assert_close(back_Nd, hidden_Nd, atol=1e-3, rtol=1e-3)


def test_distance_in_coordinates_is_that_of_the_lifted_states() -> None:
    head, hidden_Nd, z_Nr = make_head(), make_hidden(6), make_hidden(7)[:, :3]
    moments = HiddenMoments(D, torch.device("cpu"))
    moments.add(hidden_Nd)
    matrix_dd = MetricSums(head, "gram").matrix(ridge=0.1)
    basis = Basis.of(*moments.solve(), matrix_dd, rank=3)
    error_Nd = ((z_Nr - basis.coordinates(hidden_Nd)) @ basis.lift_dr.t()).double()
    expected = torch.einsum("nd,de,ne->", error_Nd, matrix_dd, error_Nd)
    torch.testing.assert_close(HiddenMetric.of(matrix_dd, basis)(z_Nr, hidden_Nd).double(), expected, rtol=1e-4, atol=0)


def test_a_softcap_is_refused() -> None:
    with pytest.raises(UserError, match="softcap of 30"):
        MetricSums(make_head(softcap=30.0), "fisher")
