"""What validation means, once: used by the training loop and by every protocol in `eval/`.

Every document of the split is scored from its separator on: each of its tokens is a target, given the
separator and all that precedes it; separators themselves are no targets. A Transformer reads a document
in overlapping windows, so that every target has a stated minimum of left context; a recurrent student
reads it whole. Nats are summed over targets and exponentiated last.

Legend: B rows, W padded length, M targets of all documents in order, V vocabulary, d width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config import EvaluationConfig, UserError
from distill.signals import Head
from distill.student import LSTMForCausalLM
from distill.teacher import LanguageModel

logger = logging.getLogger(__name__)
ROWS_PER_HEAD_CALL = 128  # fp32 logits of 24 MiB at V = 49,152; more of them take longer, fewer as well


@dataclass(frozen=True)
class Documents:
    """Documents to score: token ids with the leading separator, and the size of their text."""

    tokens: Sequence[np.ndarray]
    utf8_bytes: np.ndarray
    words: np.ndarray

    @property
    def targets(self) -> int:
        """M: every token but the separators."""
        return sum(len(tokens) - 1 for tokens in self.tokens)

    def first(self, count: int | None) -> Documents:
        """The first `count` of them; None: all."""
        return Documents(self.tokens[:count], self.utf8_bytes[:count], self.words[:count])


@dataclass(frozen=True)
class Score:
    """Sums over all targets, and the figures that follow. KL and agreement are None without a teacher."""

    nll_sum_nats: float
    tokens: int
    utf8_bytes: int
    words: int
    kl_sum_nats: float | None = None
    top1_matches: int | None = None
    document_nll_nats: tuple[float, ...] = ()

    @property
    def nll_nats(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.nll_sum_nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll_nats, 700.0))

    @property
    def word_perplexity(self) -> float:
        return math.exp(min(self.nll_sum_nats / max(self.words, 1), 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nll_sum_nats / math.log(2) / max(self.utf8_bytes, 1)

    @property
    def kl_to_teacher_nats(self) -> float | None:
        """Mean KL(teacher || this model) of a token, in nats."""
        return None if self.kl_sum_nats is None else self.kl_sum_nats / self.tokens

    @property
    def top1_agreement(self) -> float | None:
        """Share of targets at which this model's likeliest token is the teacher's."""
        return None if self.top1_matches is None else self.top1_matches / self.tokens

    @property
    def curve_figures(self) -> dict[str, float | None]:
        """What a point of a validation curve holds."""
        return {
            "nll_nats": self.nll_nats,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "kl_to_teacher_nats": self.kl_to_teacher_nats,
            "top1_agreement": self.top1_agreement,
        }

    @property
    def in_words(self) -> str:
        """For the log."""
        compared = f"{self.bits_per_byte:.4f} bits a byte"
        if self.kl_to_teacher_nats is not None:
            compared = f"KL {self.kl_to_teacher_nats:.4f}, top-1 {self.top1_agreement:.3f}"
        return f"{self.nll_nats:.4f} nats (perplexity {self.perplexity:.1f}), {compared}"

    def as_dict(self) -> dict[str, float | int]:
        """The figures as they stand in `result.json`."""
        figures = {
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "nll_nats": self.nll_nats,
            "tokens": self.tokens,
            "kl_to_teacher_nats": self.kl_to_teacher_nats,
            "top1_agreement": self.top1_agreement,
        }
        return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class Reference:
    """The teacher's final hidden states at all M targets, computed once and compared with often."""

    hidden_Md: Tensor
    head: Head

    def log_p_NV(self, index_N: Tensor) -> Tensor:
        """The teacher's distributions at some of the targets; fp32."""
        teacher_Nd = self.hidden_Md[index_N].to(self.head.weight_Vd.device)
        return F.log_softmax(self.head.logits(teacher_Nd), -1, dtype=torch.float32)


@dataclass(frozen=True)
class Row:
    """One stretch that a model reads: `tokens[start:stop]` of a document, scoring targets from `first` on."""

    document: int
    start: int
    stop: int  # exclusive end of the inputs; the last target is tokens[stop]
    first: int  # position in the document of the first scored target
    offset: int  # place of that target among all M


def reading_window(model: LanguageModel, evaluation: EvaluationConfig) -> tuple[int | None, int]:
    """(window, context) in which a model reads documents: a recurrent one whole (None), others within their limit."""
    if isinstance(model.model, LSTMForCausalLM):
        return None, 0
    window = int(min(evaluation.window, model.longest_window))
    if window < evaluation.window:
        logger.warning("%s reads at most %d tokens; evaluation.window is %d", model.name, window, evaluation.window)
    return window, min(evaluation.context, window - 1)


def rows_of(documents: Documents, window: int | None, context: int) -> list[Row]:
    """Cut documents into stretches of at most `window` inputs; later ones overlap by `context` (None: whole)."""
    rows, offset = [], 0
    for number, tokens in enumerate(documents.tokens):
        inputs = len(tokens) - 1
        size = inputs if window is None else window
        first = 1
        while first <= inputs:
            # The target `first` has input position first - 1; it gets `context` inputs before that one.
            start = 0 if first == 1 else first - 1 - context
            stop = min(start + size, inputs)
            rows.append(Row(number, start, stop, first, offset + first - 1))
            first = stop + 1
        offset += inputs
    return rows


def score(
    model: LanguageModel,
    documents: Documents,
    *,
    window: int | None,
    context: int = 0,
    batch_tokens: int = 4096,
    reference: Reference | None = None,
) -> Score:
    """Negative log-likelihood of all documents, and KL and agreement where the teacher's reference is given."""
    nll_M = torch.zeros(documents.targets, dtype=torch.float64)
    kl_sum, matches = 0.0, 0
    for part in scored(model, documents, rows_of(documents, window, context), batch_tokens, reference):
        nll_M[part.index_N] = part.nll_N
        if part.log_p_NV is not None:
            kl_sum += part.kl_N.sum().item()
            matches += int((part.log_p_NV.argmax(-1) == part.log_q_NV.argmax(-1)).sum())
    return summed(documents, nll_M, None if reference is None else kl_sum, None if reference is None else matches)


@dataclass(frozen=True)
class Scored:
    """Some targets: their places among all M (CPU), the model's distributions, labels, and the teacher's if given."""

    index_N: Tensor
    log_q_NV: Tensor
    labels_N: Tensor
    log_p_NV: Tensor | None

    def split(self, size: int) -> Iterator[Scored]:
        """The same, `size` targets at a time."""
        for start in range(0, len(self.index_N), size):
            rows = slice(start, start + size)
            log_p_NV = None if self.log_p_NV is None else self.log_p_NV[rows]
            yield Scored(self.index_N[rows], self.log_q_NV[rows], self.labels_N[rows], log_p_NV)

    @property
    def nll_N(self) -> Tensor:
        """Nats of each label, fp64 on the CPU."""
        return -self.log_q_NV.gather(1, self.labels_N[:, None])[:, 0].double().cpu()

    @property
    def kl_N(self) -> Tensor:
        """KL(teacher || model) of each target in nats, fp64."""
        assert self.log_p_NV is not None
        return F.kl_div(self.log_q_NV, self.log_p_NV, reduction="none", log_target=True).sum(-1).double()


def scored(
    model: LanguageModel,
    documents: Documents,
    rows: Sequence[Row],
    batch_tokens: int,
    reference: Reference | None = None,
) -> Iterator[Scored]:
    """The distributions at all targets of `rows`, a few at a time and in any order; fp32."""
    for index_M, hidden_Md, labels_M in _hidden_states(model, documents, rows, batch_tokens):
        for index_N, hidden_Nd, labels_N in zip(
            *(part.split(ROWS_PER_HEAD_CALL) for part in (index_M, hidden_Md, labels_M)), strict=True
        ):
            with torch.inference_mode():
                log_q_NV, log_p_NV = F.log_softmax(model.head.logits(hidden_Nd), -1, dtype=torch.float32), None
                if reference is not None:
                    log_p_NV = reference.log_p_NV(index_N).to(log_q_NV.device)
            yield Scored(index_N, log_q_NV, labels_N, log_p_NV)


def bootstrap_interval(
    sums_n: np.ndarray, weights_n: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of sum(sums) / sum(weights) when documents are drawn anew with replacement (Efron 1979, percentiles).

    None for fewer than two documents, which say nothing about their spread.
    """
    kept_n = weights_n > 0
    sums_n, weights_n = sums_n[kept_n], weights_n[kept_n]
    count = len(sums_n)
    if count < 2:
        return None
    drawn_Rn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    low, high = np.quantile((drawn_Rn @ sums_n) / (drawn_Rn @ weights_n), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def build_reference(
    teacher: LanguageModel, documents: Documents, *, window: int | None, context: int, batch_tokens: int
) -> Reference:
    """Read all documents with the teacher once and keep its hidden states (M, d) in its own type, on the CPU."""
    hidden_Md = torch.empty(documents.targets, teacher.width, dtype=teacher.head.weight_Vd.dtype)
    rows = rows_of(documents, window, context)
    for index_N, hidden_Nd, _ in _hidden_states(teacher, documents, rows, batch_tokens):
        if not torch.isfinite(hidden_Nd).all():
            raise UserError(
                f"teacher {teacher.name}: its output on the documents is not finite; try dtype fp32 "
                f"(found {teacher.model.dtype})",
                every_process=True,
            )
        hidden_Md[index_N] = hidden_Nd.to("cpu", hidden_Md.dtype)
    return Reference(hidden_Md, teacher.head)


def score_reference(reference: Reference, documents: Documents) -> Score:
    """The teacher's own score, from its stored hidden states."""
    labels_M = torch.from_numpy(np.concatenate([tokens[1:] for tokens in documents.tokens]).astype(np.int64))
    nll_M = torch.empty(documents.targets, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, documents.targets, ROWS_PER_HEAD_CALL):
            part = slice(start, start + ROWS_PER_HEAD_CALL)
            hidden_Nd = reference.hidden_Md[part].to(reference.head.weight_Vd.device)
            logits_NV = reference.head.logits(hidden_Nd).float()
            labels_N = labels_M[part].to(logits_NV.device)
            nll_M[part] = F.cross_entropy(logits_NV, labels_N, reduction="none").double().cpu()
    return summed(documents, nll_M)


def summed(documents: Documents, nll_M: Tensor, kl_sum: float | None = None, matches: int | None = None) -> Score:
    """The score of nats at all targets, with sums over them."""
    lengths = [len(tokens) - 1 for tokens in documents.tokens]
    return Score(
        nll_sum_nats=nll_M.sum().item(),
        tokens=documents.targets,
        utf8_bytes=int(documents.utf8_bytes.sum()),
        words=int(documents.words.sum()),
        kl_sum_nats=kl_sum,
        top1_matches=matches,
        document_nll_nats=tuple(part.sum().item() for part in nll_M.split(lengths)),
    )


def _hidden_states(
    model: LanguageModel, documents: Documents, rows: Sequence[Row], batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each batch of rows: place among M (CPU), final hidden states and labels of the scored targets."""
    rows = sorted(rows, key=lambda row: row.stop - row.start, reverse=True)
    while rows:
        longest = rows[0].stop - rows[0].start
        size = max(1, batch_tokens // longest)
        batch, rows = rows[:size], rows[size:]
        inputs_BW = torch.zeros(len(batch), longest, dtype=torch.int64)
        labels_BW = torch.zeros(len(batch), longest, dtype=torch.int64)
        index_BW = torch.full((len(batch), longest), -1, dtype=torch.int64)
        for b, row in enumerate(batch):
            tokens = torch.from_numpy(documents.tokens[row.document][row.start : row.stop + 1].astype(np.int64))
            skipped = row.first - 1 - row.start
            inputs_BW[b, : len(tokens) - 1] = tokens[:-1]
            labels_BW[b, : len(tokens) - 1] = tokens[1:]
            index_BW[b, skipped : len(tokens) - 1] = row.offset + torch.arange(len(tokens) - 1 - skipped)
        # Padding stands on the right of causal models, so it needs no mask; its places are never read.
        hidden_BWd = model.hidden(inputs_BW)
        wanted = index_BW >= 0
        yield (
            index_BW[wanted],
            hidden_BWd[wanted.to(hidden_BWd.device)],
            labels_BW[wanted].to(hidden_BWd.device),
        )
