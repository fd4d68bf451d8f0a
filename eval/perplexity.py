"""Perplexity of any causal language models on the same text.

    python -m eval.perplexity runs/quickstart
    python -m eval.perplexity runs/quickstart MODEL ... --corpus runs/quickstart my.txt --separator '<|endoftext|>'

Every document is scored as the training loop scores it (`distill/metrics.py`): a recurrent student reads it whole, a
Transformer in windows of `--window` tokens, of which each later one begins `--context` tokens before its first new
target; so the stride is their difference. Each model reads the same bytes with its own tokenizer: figures per word and
per byte compare across vocabularies, perplexity per token does not. Intervals hold 95 % of what resampling the
documents gives (bootstrap). With `--decoder` students alone are read, token by token, by their quantised decoder
(`distill/decode.py`): what it loses. Prints a table, and JSON as the last line.

Legend: M targets, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import EvaluationConfig
from distill.decode import Decoder
from distill.metrics import (
    ROWS_PER_HEAD_CALL,
    Documents,
    Reference,
    Score,
    Scored,
    bootstrap_interval,
    reading_window,
    rows_of,
    scored,
    summed,
)
from distill.output import print_table
from distill.teacher import LanguageModel
from eval.command import (
    Figures,
    Subject,
    add_corpus_options,
    add_decoder_option,
    execute,
    finish,
    make_parser,
    make_subjects,
    make_texts,
)
from eval.shared import once


def evaluate(model: LanguageModel, documents: Documents, evaluation: EvaluationConfig) -> Score:
    """Score documents: a recurrent student whole, any other model in overlapping windows."""
    return summed(documents, nats(model, documents, evaluation))


def nats(model: LanguageModel, documents: Documents, evaluation: EvaluationConfig) -> Tensor:
    """The loss of every target (M,), fp64."""
    window, context = reading_window(model, evaluation)
    rows = rows_of(documents, window, context)
    key = nats_key(model, documents, window, context)
    return once(key, lambda: _nats(scored(model, documents, rows, evaluation.batch_tokens), documents))


def nats_key(
    reader: LanguageModel | Decoder, documents: Documents, window: int | None = None, context: int = 0
) -> Hashable:
    """What the losses depend on that a model, or a decoder, has with documents."""
    text = hashlib.sha256(b"".join(np.asarray(tokens, np.int64).tobytes() for tokens in documents.tokens)).digest()
    who = (reader.model, reader.vocab_size) if isinstance(reader, LanguageModel) else (reader,)
    return ("nats", *who, text, len(documents.tokens), window, context)


def _nats(parts: Iterable[Scored], documents: Documents) -> Tensor:
    nll_M = torch.zeros(documents.targets, dtype=torch.float64)
    for part in parts:
        nll_M[part.index_N] = part.nll_N
    return nll_M


def scored_by_decoder(decoder: Decoder, documents: Documents, reference: Reference | None = None) -> Iterator[Scored]:
    """As `distill.metrics.scored`: the distributions that the decoder samples from at temperature 1."""
    start = 0
    logits: list[Tensor] = []
    labels_M = torch.from_numpy(np.concatenate([tokens[1:] for tokens in documents.tokens]).astype(np.int64))
    for tokens in documents.tokens:
        lanes = decoder.lanes(1)
        for token in tokens[:-1].tolist():
            lanes.read([token])
            logits.append(torch.from_numpy(lanes.logits(0)))
            if len(logits) == ROWS_PER_HEAD_CALL or start + len(logits) == len(labels_M):
                index_N = torch.arange(start, start + len(logits))
                log_q_NV = torch.stack(logits).log_softmax(-1)
                yield Scored(
                    index_N, log_q_NV, labels_M[index_N], None if reference is None else reference.log_p_NV(index_N)
                )
                start, logits = start + len(logits), []


def evaluate_decoder(decoder: Decoder, documents: Documents) -> Score:
    """Score documents by the distribution that the decoder samples from at temperature 1."""
    key = nats_key(decoder, documents)
    return summed(documents, once(key, lambda: _nats(scored_by_decoder(decoder, documents), documents)))


def figures_of(
    model: LanguageModel, documents: Documents, evaluation: EvaluationConfig, decoder: Decoder | None = None
) -> Figures:
    """A model's row: the score, its own or its decoder's, with its intervals, how it read, and its size."""
    found = evaluate_decoder(decoder, documents) if decoder else evaluate(model, documents, evaluation)
    nll_n = np.array(found.document_nll_nats)
    tokens_n = np.array([len(tokens) - 1 for tokens in documents.tokens])
    of_tokens, of_words, of_bytes = (
        bootstrap_interval(nll_n, weights_n) for weights_n in (tokens_n, documents.words, documents.utf8_bytes)
    )
    window, context = reading_window(model, evaluation)
    return {
        **found.as_dict(),
        "perplexity_interval": of_tokens and [math.exp(min(nats, 700.0)) for nats in of_tokens],
        "word_perplexity_interval": of_words and [math.exp(min(nats, 700.0)) for nats in of_words],
        "bits_per_byte_interval": of_bytes and [nats / math.log(2) for nats in of_bytes],
        "words": found.words,
        "utf8_bytes": found.utf8_bytes,
        "documents": len(documents.tokens),
        "window": window,
        "stride": None if window is None else window - context,
        "parameters": model.parameters,
        "dtype": "int8" if decoder else str(model.model.dtype).removeprefix("torch."),
    }


def measure(options: argparse.Namespace) -> None:
    texts = make_texts(options)
    roles = [role for role in options.roles if role != "teacher" or not options.decoder]
    subjects = make_subjects(options.models, roles, options.trust_remote_code)
    figures: dict[Subject, Figures] = {}
    counts: dict[str, int] = {}  # documents of each text: those that the first model reads, whatever their tokens
    for subject in tqdm(subjects, desc="models", disable=len(subjects) == 1):
        model = subject.load(options.dtype)
        decoder = subject.load_decoder() if options.decoder else None
        figures[subject] = {}
        for text in texts:
            documents = text.documents(model, counts.get(text.label))
            counts[text.label] = len(documents.tokens)
            figures[subject][text.label] = figures_of(model, documents, text.evaluation, decoder)
    for text in texts:
        rows = []
        for subject in subjects:
            row = figures[subject][text.label]
            low, high = row["bits_per_byte_interval"] or (math.nan, math.nan)
            rows.append(
                {
                    "model": subject.label,
                    "perplexity": f"{row['perplexity']:.2f}",
                    "per word": f"{row['word_perplexity']:.1f}",
                    "bits/byte": f"{row['bits_per_byte']:.4f}",
                    "95 %": f"{low:.3f} – {high:.3f}",
                    "loss (nats)": f"{row['nll_nats']:.4f}",
                    "tokens": f"{row['tokens']:,}",
                    "window/stride": "whole" if row["window"] is None else f"{row['window']}/{row['stride']}",
                    "parameters": f"{row['parameters'] / 1e6:.1f} M",
                }
            )
        print_table(text.label, rows)
    finish(options, figures, {"corpora": {text.label: text.settings for text in texts}})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("perplexity", __doc__)
    add_corpus_options(parser)
    add_decoder_option(parser)
    return execute(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
