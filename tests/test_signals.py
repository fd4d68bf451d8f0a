"""Encodings of the teacher's distribution: what is kept, and that sampling is unbiased.

Legend: N tokens, V vocabulary, K outcomes, d width of the teacher.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill import signals
from distill.signals import Encoding, Head, HiddenSignal, SparseSignal, _find, largest, sample, top_k

V, D = 40, 6


def make_head() -> Head:
    return Head(torch.randn(V, D, generator=torch.Generator().manual_seed(0)))


def make_hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))


def test_top_k_keeps_the_most_probable_and_the_rest_in_one() -> None:
    logits_NV = make_head().logits(make_hidden(9))
    p_NV = torch.softmax(logits_NV, -1)
    signal = top_k(logits_NV, 5, 1.0)
    assert signal.tail_N is not None
    torch.testing.assert_close(signal.probs_NK, p_NV.topk(5).values)
    torch.testing.assert_close(p_NV.gather(1, signal.ids_NK), signal.probs_NK)
    torch.testing.assert_close(signal.tail_N, 1 - p_NV.topk(5).values.sum(-1))


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_sampling_is_unbiased_with_weights_that_sum_to_one(sharpness: float, k: int) -> None:
    """Over 20,000 draws of one distribution, every weight's mean is its probability within 5 standard errors."""
    draws = 20_000
    logits_1V = make_head().logits(make_hidden(1)) * sharpness
    p_V = torch.softmax(logits_1V, -1)[0]
    offsets_N = torch.rand(draws, generator=torch.Generator().manual_seed(2))
    signal = sample(logits_1V.expand(draws, V), k, 1.0, offsets_N)
    torch.testing.assert_close(signal.probs_NK.sum(-1), torch.ones(draws), atol=1e-5, rtol=0)
    weights_NV = torch.zeros(draws, V).scatter_add(1, signal.ids_NK, signal.probs_NK)
    error_V = (p_V / (k * draws)).sqrt()  # an outcome that is not certain has a weight of at most 1 / k
    assert ((weights_NV.mean(0) - p_V).abs() <= 5 * error_V + 2 / draws).all()
    assert signal.entropy_N is not None
    torch.testing.assert_close(signal.entropy_N[0], torch.special.entr(p_V).sum())
    assert all(len(set(ids)) == k for ids in signal.ids_NK[:200].tolist()), "no outcome is drawn twice"


def test_certain_outcomes_have_their_exact_probability() -> None:
    p_V = torch.tensor([0.7, 0.2, *([0.1 / 8] * 8)])
    signal = sample(p_V.log()[None], 4, 1.0, torch.tensor([0.3]))
    weights = dict(zip(signal.ids_NK[0].tolist(), signal.probs_NK[0].tolist(), strict=True))
    assert weights[0] == pytest.approx(0.7) and weights[1] == pytest.approx(0.2)
    assert sorted(weights.values())[:2] == pytest.approx([0.05, 0.05]), "the two others share what is left"


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_sparse_signals_do_not_depend_on_chunks_or_company(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's draws follow from its number alone."""
    encoding, head, hidden_Nd = Encoding(kind, 5, temperature=2.0), make_head(), make_hidden(3 * 7)
    states, middle = HiddenSignal(hidden_Nd, head), HiddenSignal(hidden_Nd[7:14], head)
    whole = encoding.signal(states, [4, 9, 2])
    monkeypatch.setattr(signals, "ENCODING_ROWS", 4)
    chunked, alone = encoding.signal(states, [4, 9, 2]), encoding.signal(middle, [9])
    assert isinstance(whole, SparseSignal) and isinstance(chunked, SparseSignal) and isinstance(alone, SparseSignal)
    assert torch.equal(whole.ids_NK, chunked.ids_NK) and torch.equal(whole.ids_NK[7:14], alone.ids_NK)
    other = encoding.signal(middle, [10])
    assert isinstance(other, SparseSignal)
    assert torch.equal(other.ids_NK, alone.ids_NK) == (kind == "top_k"), "another block draws anew"


def test_hidden_and_dense_are_the_same_distribution() -> None:
    head, hidden_Nd = make_head(), make_hidden(6)
    hidden = Encoding("hidden").signal(HiddenSignal(hidden_Nd, head), [0])
    dense = Encoding("dense").signal(HiddenSignal(hidden_Nd, head), [0])
    assert isinstance(hidden, HiddenSignal) and not isinstance(dense, SparseSignal)
    torch.testing.assert_close(hidden.logits(slice(2, 5)), dense.logits(slice(2, 5)))


@pytest.mark.parametrize("vocab_size", [10, 64, 1000, 4096])
def test_the_largest_are_those_of_topk(vocab_size: int) -> None:
    values_NV = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(3))
    for k in (1, 9, min(200, vocab_size)):
        found_NK, ids_NK = largest(values_NV, k)
        torch.testing.assert_close(found_NK, values_NV.topk(k).values, rtol=0, atol=0)
        torch.testing.assert_close(values_NV.gather(1, ids_NK), found_NK, rtol=0, atol=0)


def test_draws_among_many_outcomes_follow_their_masses() -> None:
    """Draws over several groups, none of them certain: what falls on a part of the vocabulary is its mass."""
    logits_1V = torch.randn(1, 3000, generator=torch.Generator().manual_seed(4))
    p_V = torch.softmax(logits_1V, -1)[0]
    offsets_N = torch.rand(4000, generator=torch.Generator().manual_seed(5))
    signal = sample(logits_1V.expand(4000, -1), 8, 1.0, offsets_N)
    weights_V = torch.zeros(3000).scatter_add(0, signal.ids_NK.flatten(), signal.probs_NK.flatten()) / 4000
    for part in (slice(0, 500), slice(1000, 1500), slice(2900, 3000)):
        mass = p_V[part].sum()
        assert abs(weights_V[part].sum() - mass) <= 5 * (mass / 32_000).sqrt()
    assert ((weights_V - p_V).abs() <= 6 * (p_V / 32_000).sqrt() + 1e-4).all()
    sharp_1V = torch.zeros(1, 3000).index_fill_(1, torch.tensor([7]), 200.0)  # all mass on one: no other is drawn
    sharp = sample(sharp_1V, 8, 1.0, torch.tensor([0.5]))
    assert sharp.ids_NK[0, 0] == 7 and sharp.probs_NK[0].tolist() == pytest.approx([1.0, *[0.0] * 7])


def test_a_point_at_the_end_finds_the_last_place_with_mass() -> None:
    """Rounding can bring a point to the very sum, and places without mass may follow."""
    place_NK, rest_NK = _find(torch.tensor([[0.5, 2.0, 3.0]]), torch.tensor([[0.0, 1.0, 2.0, 2.0]]))
    assert place_NK.tolist() == [[1, 2, 2]]
    torch.testing.assert_close(rest_NK, torch.tensor([[0.5, 1.0, 1.0]]))
