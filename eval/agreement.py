"""How closely a student follows its teacher, token by token.

    python -m eval.agreement runs/quickstart
    python -m eval.agreement MODEL ... --teacher TEACHER --corpus my.txt

For the teacher's distribution p and the model's q at every token of the text, means of

- KL(p || q) in nats;
- top-1 agreement (both find the same token likeliest) and top-5 agreement (the teacher's likeliest token is among the
  model's five likeliest);
- the overlap sum min(p, q) = 1 - total variation: the rate at which speculative sampling accepts the model's drafts
  (Leviathan et al. 2023, arXiv 2211.17192);
- the expected calibration error of both: the distance of confidence from accuracy, over 15 bins of equal width (Guo et
  al. 2017, arXiv 1706.04599);

and the first ones by how frequent the target token is and by the teacher's entropy. Both need one vocabulary; where the
model's is a trimmed one, the teacher is read in those tokens, and its distribution is that over them. `--dtype` and
`--decoder` say in which arithmetic the models run; the teacher runs in that in which it teaches.

Legend: M targets, N some of them, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.corpus import load_corpus
from distill.decode import Decoder
from distill.metrics import (
    Documents,
    Reference,
    Scored,
    bootstrap_interval,
    build_reference,
    reading_window,
    rows_of,
    scored,
)
from distill.output import print_table
from distill.teacher import LanguageModel
from eval.command import (
    Figures,
    Subject,
    Text,
    add_corpus_options,
    add_decoder_option,
    execute,
    find_teacher,
    finish,
    in_tokens_of,
    make_parser,
    make_subjects,
    make_texts,
)
from eval.perplexity import nats_key, scored_by_decoder
from eval.shared import keep, once

BINS = 15
CACHE_ROWS = 16  # targets compared at one time: 3 MiB a distribution at V = 49,152
ENTROPY_EDGES = (0.5, 1.5, 3.0, 4.5)  # nats
FREQUENCY_EDGES = (1e-5, 1e-4, 1e-3, 1e-2)  # share of all tokens


@dataclass(frozen=True)
class PerTarget:
    """What is compared at each target: (M,) each, fp64 on the CPU."""

    kl_M: Tensor
    overlap_M: Tensor
    top1_M: Tensor
    top5_M: Tensor
    entropy_M: Tensor  # of the teacher, nats
    confidence_M2: Tensor  # highest probability of teacher, model
    correct_M2: Tensor  # whether that token came
    nll_M2: Tensor  # nats of the token that came, of teacher, model


def compare(
    model: LanguageModel, documents: Documents, reference: Reference, *, window: int | None, context: int, batch: int
) -> PerTarget:
    """Read the documents with the model and compare it with the teacher's stored states, `batch` tokens at a time."""
    return collect(scored(model, documents, rows_of(documents, window, context), batch, reference), documents.targets)


def collect(parts: Iterable[Scored], targets: int) -> PerTarget:
    """What all parts say of their targets, each with the teacher's distribution beside the model's."""
    columns = torch.zeros(targets, 11, dtype=torch.float64)
    for part in parts:
        columns[part.index_N] = _columns(part)
    kl_M, overlap_M, top1_M, top5_M, entropy_M = columns[:, :5].unbind(1)
    return PerTarget(kl_M, overlap_M, top1_M, top5_M, entropy_M, *columns[:, 5:].split(2, dim=1))


def _columns(part: Scored) -> Tensor:
    """The eleven numbers of each target, (N, 11); of a few at a time, so that what comes between stays in cache."""
    return torch.cat([_of_rows(rows) for rows in part.split(CACHE_ROWS)])


def _of_rows(part: Scored) -> Tensor:
    assert part.log_p_NV is not None
    p_NV, q_NV = part.log_p_NV.exp(), part.log_q_NV.exp()
    (p_N, teachers_N), (q_N, own_N) = p_NV.max(-1), q_NV.max(-1)
    numbers = (
        part.kl_N,
        torch.minimum(p_NV, q_NV).sum(-1),
        teachers_N == own_N,
        (q_NV > q_NV.gather(1, teachers_N[:, None])).sum(-1) < 5,
        -(p_NV * part.log_p_NV).sum(-1),
        p_N,
        q_N,
        teachers_N == part.labels_N,
        own_N == part.labels_N,
        replace(part, log_q_NV=part.log_p_NV).nll_N,
        part.nll_N,
    )
    return torch.stack([number.double().cpu() for number in numbers], dim=1)


def calibration(confidence_M: Tensor, correct_M: Tensor, bins: int = BINS) -> Figures:
    """Expected calibration error, and the reliability diagram: confidence, accuracy and share of each filled bin."""
    bin_M = (confidence_M * bins).long().clamp(0, bins - 1)
    count_b = torch.bincount(bin_M, minlength=bins).double()
    confidence_b, accuracy_b = (
        torch.bincount(bin_M, weights=values_M.double(), minlength=bins) / count_b.clamp_min(1)
        for values_M in (confidence_M, correct_M)
    )
    error = (count_b * (confidence_b - accuracy_b).abs()).sum() / count_b.sum()
    filled = count_b > 0
    columns = (confidence_b, accuracy_b, count_b / count_b.sum())
    return {
        "expected_calibration_error": error.item(),
        "bins": [
            dict(zip(("confidence", "accuracy", "share"), row, strict=True))
            for row in torch.stack(columns, dim=1)[filled].tolist()
        ],
    }


def by_band(values: PerTarget, key_M: Tensor, edges: Sequence[float]) -> list[Figures]:
    """Means of the targets whose key lies between two edges, empty bands left out."""
    bands = []
    number_M = torch.bucketize(key_M.contiguous(), torch.tensor(edges, dtype=key_M.dtype), right=True)
    for number, (low, high) in enumerate(zip((0.0, *edges), (*edges, None), strict=True)):
        inside_M = number_M == number
        if inside_M.any():
            means = {
                "kl_to_teacher_nats": values.kl_M[inside_M].mean().item(),
                "top1_agreement": values.top1_M[inside_M].mean().item(),
                "overlap": values.overlap_M[inside_M].mean().item(),
            }
            bands.append({"from": low, "below": high, "share": inside_M.double().mean().item(), **means})
    return bands


def summarise(values: PerTarget, documents: Documents, frequency_M: Tensor) -> Figures:
    """A model's row."""
    lengths = np.array([len(tokens) - 1 for tokens in documents.tokens])

    def interval(values_M: Tensor) -> tuple[float, float] | None:
        return bootstrap_interval(np.array([part.sum().item() for part in values_M.split(lengths.tolist())]), lengths)

    return {
        "kl_to_teacher_nats": values.kl_M.mean().item(),
        "kl_to_teacher_nats_interval": interval(values.kl_M),
        "overlap": values.overlap_M.mean().item(),
        "overlap_interval": interval(values.overlap_M),
        "top1_agreement": values.top1_M.mean().item(),
        "top5_agreement": values.top5_M.mean().item(),
        "teacher_entropy_nats": values.entropy_M.mean().item(),
        "calibration": calibration(values.confidence_M2[:, 1], values.correct_M2[:, 1]),
        "teacher_calibration": calibration(values.confidence_M2[:, 0], values.correct_M2[:, 0]),
        "by_frequency": by_band(values, frequency_M, FREQUENCY_EDGES),
        "by_teacher_entropy": by_band(values, values.entropy_M, ENTROPY_EDGES),
        "tokens": documents.targets,
        "documents": len(documents.tokens),
    }


def frequencies(text: Text, documents: Documents, model: LanguageModel) -> Tensor:
    """How frequent each target is (M,): its share of the training split's tokens, or of this text's own."""
    targets_M = np.concatenate([tokens[1:] for tokens in documents.tokens]).astype(np.int64)
    if text.split == "all":
        counts_V = np.bincount(targets_M, minlength=model.vocab_size)
    else:
        counts_V = load_corpus(text.corpus, model.tokenizer, progress=False).train.occurrences(model.vocab_size)
    return torch.from_numpy(counts_V[targets_M] / counts_V.sum())


class Reading(NamedTuple):
    """The text in the teacher's tokens, what it makes of it, and how frequent each target is (M,)."""

    documents: Documents
    reference: Reference
    frequency_M: Tensor


def read(teacher: LanguageModel, text: Text) -> Reading:
    """What models of the teacher's tokens are compared with."""
    documents, (window, context) = text.documents(teacher), reading_window(teacher, text.evaluation)
    batch = text.evaluation.batch_tokens
    reference = build_reference(teacher, documents, window=window, context=context, batch_tokens=batch)
    return Reading(documents, reference, frequencies(text, documents, teacher))


def keep_nats(values: PerTarget, documents: Documents, text: Text, *readers: LanguageModel | Decoder) -> None:
    """Let perplexity have the losses of teacher and model, which came about on the way."""
    for reader, nll_M in zip(readers, values.nll_M2.unbind(1), strict=True):
        window, context = (None, 0) if isinstance(reader, Decoder) else reading_window(reader, text.evaluation)
        keep(nats_key(reader, documents, window, context), nll_M)


def measure(options: argparse.Namespace) -> None:
    text = make_texts(options)[0]
    roles = [role for role in options.roles if role != "teacher"]
    subjects = make_subjects(options.models, roles, options.trust_remote_code)
    teacher = find_teacher(options).load()  # as it teaches, whatever the arithmetic of the models
    readings: dict[frozenset[str], Reading] = {}  # by the tokens that a model speaks
    figures: dict[Subject, Figures] = {}
    for subject in subjects:
        reader: LanguageModel | Decoder
        reader = model = subject.load(options.dtype)
        own = in_tokens_of(model, teacher)
        tokens = frozenset(own.tokenizer.get_vocab())
        if tokens not in readings:
            readings[tokens] = once(("reading", own.model, tokens, text), partial(read, own, text))
        documents, reference, frequency_M = readings[tokens]
        if options.decoder:
            reader = decoder = subject.load_decoder()
            values = collect(scored_by_decoder(decoder, documents, reference), documents.targets)
        else:
            window, context = reading_window(model, text.evaluation)
            batch = text.evaluation.batch_tokens
            values = compare(model, documents, reference, window=window, context=context, batch=batch)
        keep_nats(values, documents, text, own, reader)
        dtype = "int8" if options.decoder else str(model.model.dtype).removeprefix("torch.")
        figures[subject] = {**summarise(values, documents, frequency_M), "dtype": dtype}
    rows = [
        {
            "model": subject.label,
            "KL (nats)": f"{row['kl_to_teacher_nats']:.3f}",
            "overlap": f"{row['overlap']:.3f}",
            "top-1": f"{row['top1_agreement']:.3f}",
            "top-5": f"{row['top5_agreement']:.3f}",
            "ECE": f"{row['calibration']['expected_calibration_error']:.3f}",
            "teacher's ECE": f"{row['teacher_calibration']['expected_calibration_error']:.3f}",
            "tokens": f"{row['tokens']:,}",
        }
        for subject, row in figures.items()
    ]
    print_table(f"agreement with {teacher.name}; {text.label}", rows)
    for name, title in (("by_frequency", "frequency of the target"), ("by_teacher_entropy", "the teacher's entropy")):
        bands = [
            {"model": subject.label}
            | {f"from {band['from']:g}": f"{band['top1_agreement']:.3f} ({band['share']:.0%})" for band in row[name]}
            for subject, row in figures.items()
        ]
        print_table(f"top-1 by {title} (share of tokens)", bands)
    finish(options, figures, {"teacher": teacher.name, "corpus": text.label, **text.settings})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("agreement", __doc__)
    add_corpus_options(parser)
    add_decoder_option(parser)
    parser.add_argument("--teacher", metavar="MODEL", help="default: the teacher of the run folders")
    return execute(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
