"""Validation against a loop that reads one document at a time and computes every logit.

    python -m pytest tests/test_metrics.py

Legend as in `distill/metrics.py`: M targets of all documents in order, V vocabulary, d width.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill.metrics import Documents, Reference, Score, build_reference, rows_of, score, score_reference
from distill.signals import Head
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import LanguageModel, wrap

V, WHOLE = 64, 256
SMALL = 4  # times the loop's own error in fp32
EPS = torch.finfo(torch.float32).eps


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<|end|>": 0, **{f"w{index}": index for index in range(1, V)}}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    return PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<|end|>")


def make_llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WHOLE,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def make_lstm(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LSTMConfig(
        vocab_size=V, embedding_size=12, hidden_size=16, num_layers=2, initializer_range=0.5, head_bias=True
    )
    return LSTMForCausalLM(config).eval()


NETWORKS = {"llama": make_llama, "lstm": make_lstm}


@pytest.fixture(scope="module", params=NETWORKS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return wrap(NETWORKS[request.param](), tokenizer(), request.param)


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return wrap(make_llama(), tokenizer(), "llama")


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Lengths below, at and above the windows of the tests; one document is nothing but its separator."""
    rng = np.random.default_rng(0)
    lengths = (1, 9, 2, 30, 17, 0, 8, 23, 5)
    tokens = [np.concatenate(([0], rng.integers(1, V, length))).astype(np.uint16) for length in lengths]
    return Documents(tokens, utf8_bytes=np.array(lengths) * 4, words=np.array(lengths))


def loop(network: PreTrainedModel, documents: Documents, window: int, context: int, dtype: torch.dtype) -> list[Tensor]:
    """log q (targets, V) of each document in turn: read `window` tokens, score those not scored before, go back
    `context` tokens from there, and so on."""
    network = copy.deepcopy(network).to(dtype)
    all_logs = []
    for document in documents.tokens:
        ids, logs = torch.from_numpy(document.astype(np.int64)), []
        while len(logs) < len(ids) - 1:
            begin = max(0, len(logs) - context) if logs else 0
            inputs = ids[begin : min(begin + window, len(ids) - 1)]
            with torch.no_grad():
                logits = network(input_ids=inputs[None], use_cache=False).logits[0]
            logs += torch.log_softmax(logits, -1)[len(logs) - begin :]
        all_logs.append(torch.stack(logs) if logs else torch.empty(0, V, dtype=dtype))
    return all_logs


def nll_by_document(documents: Documents, all_logs: list[Tensor]) -> np.ndarray:
    pairs = zip(documents.tokens, all_logs, strict=True)
    return np.array([-sum(float(log[id_]) for log, id_ in zip(logs, ids[1:], strict=True)) for ids, logs in pairs])


@pytest.mark.parametrize(("window", "context"), [(WHOLE, 0), (8, 0), (8, 3), (9, 8), (17, 5)])
def test_every_document_scores_as_in_a_plain_loop(
    model: LanguageModel, documents: Documents, window: int, context: int
) -> None:
    exact = nll_by_document(documents, loop(model.model, documents, window, context, torch.float64))
    rounded = nll_by_document(documents, loop(model.model, documents, window, context, torch.float32))
    found = score(model, documents, window=window, context=context, batch_tokens=64)
    error = max(np.abs(rounded - exact).max(), EPS * exact.max())
    assert np.abs(np.array(found.document_nll_nats) - exact).max() <= SMALL * error
    assert found.nll_sum_nats == pytest.approx(sum(found.document_nll_nats), rel=1e-12)
    assert found.tokens == documents.targets == sum(len(tokens) - 1 for tokens in documents.tokens)


def test_windows_matter_to_a_transformer(teacher: LanguageModel, documents: Documents) -> None:
    """Else the test above could not tell a wrong window from a right one."""
    whole, cut = (score(teacher, documents, window=window).nll_sum_nats for window in (WHOLE, 8))
    assert abs(whole - cut) > 0.01 * whole


def test_whole_documents_without_a_window(model: LanguageModel, documents: Documents) -> None:
    whole = score(model, documents, window=None)
    assert whole.document_nll_nats == score(model, documents, window=WHOLE, context=7).document_nll_nats


def test_one_document_gives_transformers_own_loss(model: LanguageModel, documents: Documents) -> None:
    ids = documents.tokens[3]
    one = Documents([ids], np.array([4]), np.array([1]))
    input_ids = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        expected = model.model(input_ids=input_ids, labels=input_ids).loss.item()
    assert score(model, one, window=WHOLE).nll_nats == pytest.approx(expected, rel=16 * EPS)


@pytest.mark.parametrize("batch_tokens", [1, 20, 31, 100, 100_000])
def test_the_batch_changes_nothing(
    model: LanguageModel, teacher: LanguageModel, documents: Documents, batch_tokens: int
) -> None:
    """1 is less than a row: rows then come one by one."""
    settings = {"window": 12, "context": 4}
    reference = build_reference(teacher, documents, **settings, batch_tokens=64)
    one, other = (
        score(model, documents, **settings, reference=reference, batch_tokens=size) for size in (64, batch_tokens)
    )
    np.testing.assert_allclose(other.document_nll_nats, one.document_nll_nats, rtol=64 * EPS)
    assert other.kl_sum_nats == pytest.approx(one.kl_sum_nats, abs=64 * EPS * one.nll_sum_nats)
    assert other.top1_matches == one.top1_matches


@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    window=st.integers(1, 20),
    context=st.integers(0, 19),
)
def test_rows_score_every_target_once_and_with_enough_context(lengths: list[int], window: int, context: int) -> None:
    context = min(context, window - 1)
    tokens = [np.zeros(1 + length, dtype=np.int64) for length in lengths]
    documents = Documents(tokens, np.zeros(len(lengths)), np.zeros(len(lengths)))
    scored = []
    for row in rows_of(documents, window, context):
        assert 0 <= row.start < row.stop <= lengths[row.document], "a row reads inputs of its document"
        assert row.stop - row.start <= window
        assert row.start < row.first <= row.stop
        for target in range(row.first, row.stop + 1):
            left = target - 1 - row.start  # inputs before the one that predicts it
            assert left >= min(context, target - 1)
            scored.append((sum(lengths[: row.document]) + target - 1, row.offset + target - row.first))
    expected = list(range(documents.targets))
    assert [place for place, _ in scored] == expected, "each target of each document once, in order"
    assert [place for _, place in scored] == expected, "and stored in its own place"
    # No more rows than needed: the first scores `window` targets, each further one `window - context`.
    needed = [1 + max(0, math.ceil((n - window) / (window - context))) for n in lengths if n]
    assert len(rows_of(documents, window, context)) == sum(needed)
    assert [(row.start, row.stop) for row in rows_of(documents, None, 0)] == [(0, n) for n in lengths if n]


def test_kl_and_agreement_against_the_loop(model: LanguageModel, teacher: LanguageModel, documents: Documents) -> None:
    """The model reads whole documents, the teacher windows of 8 with 3 tokens of context."""
    reference = build_reference(teacher, documents, window=8, context=3, batch_tokens=64)
    found = score(model, documents, window=None, reference=reference)

    def figures(dtype: torch.dtype) -> tuple[float, int]:
        log_p = torch.cat(loop(teacher.model, documents, 8, 3, dtype))
        log_q = torch.cat(loop(model.model, documents, WHOLE, 0, dtype))
        kl = (log_p.exp() * (log_p - log_q)).sum().item()
        return kl, int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    exact, matches = figures(torch.float64)
    error = max(abs(figures(torch.float32)[0] - exact), EPS * exact)
    assert found.kl_sum_nats == pytest.approx(exact, abs=16 * error)
    assert found.top1_matches == matches
    assert 0 < matches < documents.targets or model.name == "llama", "the test cannot tell agreement from none"
    assert found.kl_to_teacher_nats == found.kl_sum_nats / documents.targets
    assert found.top1_agreement == matches / documents.targets


def test_kl_and_agreement_in_closed_form(model: LanguageModel, documents: Documents) -> None:
    """A teacher that is sure of one token, or of none: KL is -log q of it, or ln V shifts away from entropy."""
    M, favourite, near = documents.targets, 5, 40.0
    logs = torch.cat(loop(model.model, documents, WHOLE, 0, torch.float64))
    sure = Head(torch.zeros(V, 1), near * torch.nn.functional.one_hot(torch.tensor(favourite), V).float())
    found = score(model, documents, window=None, reference=Reference(torch.zeros(M, 1), sure))
    assert found.kl_sum_nats == pytest.approx(-logs[:, favourite].sum().item(), rel=1e-4)
    assert found.top1_matches == int((logs.argmax(-1) == favourite).sum())

    unsure = Head(torch.zeros(V, 1))
    found = score(model, documents, window=None, reference=Reference(torch.zeros(M, 1), unsure))
    assert found.kl_sum_nats == pytest.approx((-math.log(V) - logs.mean(-1)).sum().item(), rel=1e-4)


def test_the_teacher_agrees_with_itself(teacher: LanguageModel, documents: Documents) -> None:
    settings = {"window": 12, "context": 4, "batch_tokens": 64}
    reference = build_reference(teacher, documents, **settings)
    found = score(teacher, documents, **settings, reference=reference)
    assert abs(found.kl_to_teacher_nats) <= 8 * EPS * found.nll_nats
    assert found.top1_agreement == 1.0
    stored = score_reference(reference, documents)
    np.testing.assert_allclose(stored.document_nll_nats, found.document_nll_nats, rtol=8 * EPS)
    assert stored.kl_to_teacher_nats is None and stored.top1_agreement is None


def test_the_head_runs_over_few_rows_at_a_time(
    model: LanguageModel, teacher: LanguageModel, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = build_reference(teacher, documents, window=WHOLE, context=0, batch_tokens=64)
    whole, own = (
        score(model, documents, window=WHOLE, reference=reference),
        score_reference(reference, documents),
    )
    monkeypatch.setattr("distill.metrics.ROWS_PER_HEAD_CALL", 7)
    parts = score(model, documents, window=WHOLE, reference=reference)
    np.testing.assert_allclose(parts.document_nll_nats, whole.document_nll_nats, rtol=64 * EPS)
    assert parts.kl_sum_nats == pytest.approx(whole.kl_sum_nats, abs=64 * EPS * whole.nll_sum_nats)
    assert parts.top1_matches == whole.top1_matches
    own_parts = score_reference(reference, documents).document_nll_nats
    np.testing.assert_allclose(own_parts, own.document_nll_nats, rtol=64 * EPS)


def test_the_figures_by_hand() -> None:
    """8 tokens of 3 bits each, that spell 12 bytes in 4 words."""
    bits = 24
    figures = Score(bits * math.log(2), tokens=8, utf8_bytes=12, words=4, kl_sum_nats=2.0, top1_matches=6)
    assert figures.nll_nats == pytest.approx(3 * math.log(2))
    assert figures.perplexity == pytest.approx(2**3)
    assert figures.word_perplexity == pytest.approx(2**6)
    assert figures.bits_per_byte == pytest.approx(2.0)
    assert figures.kl_to_teacher_nats == 0.25
    assert figures.top1_agreement == 0.75
    alone = Score(bits * math.log(2), tokens=8, utf8_bytes=12, words=4)
    assert alone.kl_to_teacher_nats is None and alone.top1_agreement is None
    without = figures.as_dict().keys() - alone.as_dict().keys()
    assert without == {"kl_to_teacher_nats", "top1_agreement"}
    assert figures.as_dict()["perplexity"] == figures.perplexity


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    assert math.isfinite(Score(1e9, tokens=10, utf8_bytes=0, words=0).perplexity)
    assert math.isfinite(Score(1e9, tokens=10, utf8_bytes=0, words=0).word_perplexity)
