"""How far back a model remembers, which is the old question about LSTMs (Khandelwal et al. 2018, arXiv 1805.04623).

    python -m eval.memory runs/quickstart
    python -m eval.memory runs/quickstart --corpus articles.txt --unit file

- Loss by position in the document.
- Loss by context: the state is reset N tokens before the target. The same targets for every N and every model, so
  their differences are paired. A window of N + N/8 tokens serves N/8 + 1 neighbouring targets, so "N" means N to 9/8 N;
  below 8 it is exact. The effective context length is the smallest measured N whose perplexity is at most 1 % above
  that of the longest one.
- Recall: "The name of the guard is John." d tokens of the corpus. "The name of the guard is" - does the model pick
  the right one of ten? The same with nine numbers. `gain_nats` is what the mention adds to the log-probability of the
  right one, against a mention of another.
- Time constants of an LSTM's units: -1 / mean(ln f) tokens for the forget gate f, the time in which a cell's content
  falls to 1/e, over the tokens of the corpus; with a picture of their distribution. Of a GRU's units the same with the
  gate z, which says what is kept of h.

Stretches longer than a Transformer allows are left out and marked.

Legend: N tokens of context, M targets, P probes, U units of a layer, B rows, T positions, H LSTM width.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from distill.checkpoint import write_atomically
from distill.config import EvaluationConfig, UserError
from distill.metrics import Documents, Row, scored
from distill.output import print_table
from distill.student import LayerNormLSTM, LSTMBlock, LSTMForCausalLM
from distill.teacher import LanguageModel
from eval.command import (
    Figures,
    Subject,
    add_corpus_options,
    execute,
    finish,
    make_parser,
    make_subjects,
    make_texts,
    positive,
)
from eval.perplexity import nats

CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
DISTANCES = (0, 8, 32, 128, 512)
TOLERANCE = math.log(1.01)  # nats: 1 % of perplexity
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
RECALL = {  # a cue and what may stand after it
    "name": ("The name of the guard is", "John Mary Peter Anna Robert Alice George Helen Frank Lucy"),
    "number": ("The number of the room is", "17 28 34 46 52 63 75 81 90"),
}


# ---------------------------------------------------------------- loss by position


def by_position(model: LanguageModel, documents: Documents, evaluation: EvaluationConfig) -> list[Figures]:
    """Mean nats of a token by its place in the document, over places 1, 2, 3-4, 5-8, ..."""
    nll_M = nats(model, documents, evaluation)
    position_M = torch.cat([torch.arange(1, len(tokens)) for tokens in documents.tokens])
    octave_M = torch.ceil(torch.log2(position_M.double())).long()
    return [
        {
            "from": 1 if octave == 0 else 2 ** (octave - 1) + 1,
            "to": 2**octave,
            "nll_nats": nll_M[octave_M == octave].mean().item(),
            "tokens": int((octave_M == octave).sum()),
        }
        for octave in octave_M.unique().tolist()
    ]


# ---------------------------------------------------------------- loss by context


@dataclass(frozen=True)
class Stretches:
    """The targets that are read in all `contexts`: `length` neighbours from each (document, first target) on."""

    contexts: list[int]
    places: list[tuple[int, int]]
    length: int

    @property
    def targets(self) -> int:
        return len(self.places) * self.length


def choose_stretches(documents: Documents, contexts: list[int], targets: int) -> Stretches:
    """About so many targets, spread over the documents, with the longest of the contexts before each.

    Contexts for which the text has too few targets are left out; UserError where none remains.
    """
    enough = min(targets, 256, max(1, documents.targets // 4))
    for count in range(len(contexts), 0, -1):
        longest = contexts[count - 1]
        length = min(256, max(8, longest // 8))
        places = [
            (number, first)
            for number, tokens in enumerate(documents.tokens)
            for first in range(longest, len(tokens) - length + 1, length)
        ]
        keep = min(len(places), max(1, targets // length))
        if keep * length >= enough:
            chosen = np.linspace(0, len(places) - 1, keep).round().astype(int)
            return Stretches(contexts[:count], [places[at] for at in chosen], length)
    longest = max(map(len, documents.tokens), default=0) - 1
    raise UserError(
        f"corpus: expected documents with {enough} or more targets after {contexts[0]} tokens, found the longest "
        f"with {longest} tokens; give a text of longer documents with --corpus"
    )


def by_context(model: LanguageModel, documents: Documents, stretches: Stretches, N: int, batch: int) -> Tensor:
    """Nats (M,) of every target of the stretches, read from a fresh state N to 9/8 N tokens before it."""
    length, width = stretches.length, N // 8 + 1
    rows = [
        Row(document, first + start - N, first + min(start + width, length) - 1, first + start, number * length + start)
        for number, (document, first) in enumerate(stretches.places)
        for start in range(0, length, width)
    ]
    nll_M = torch.empty(stretches.targets, dtype=torch.float64)
    for part in scored(model, documents, rows, batch):
        nll_M[part.index_N] = part.nll_N
    return nll_M


def effective_context(losses: Sequence[Figures]) -> int:
    """The smallest N from which on no loss is above that of the longest context by more than 1 % of perplexity."""
    limit = losses[-1]["nll_nats"] + TOLERANCE
    above = [row["context"] for row in losses if row["nll_nats"] > limit]
    return next(row["context"] for row in losses if not above or row["context"] > above[-1])


def context_figures(model: LanguageModel, documents: Documents, stretches: Stretches, batch: int) -> Figures:
    """Loss for every N that the model can read, and the effective context length."""
    possible = [N for N in stretches.contexts if model.longest_window > N + N // 8]
    losses = []
    for N in tqdm(possible, desc=f"{model.name}, contexts", leave=False):
        nll_M = by_context(model, documents, stretches, N, batch)
        losses.append({"context": N, "nll_nats": nll_M.mean().item()})
    return {
        "losses": losses,
        "targets": stretches.targets,
        "effective_context_tokens": effective_context(losses) if losses else None,
        "beyond_limit": [N for N in stretches.contexts if N not in possible],
    }


# ---------------------------------------------------------------- recall


def candidates(model: LanguageModel, words: Sequence[str]) -> tuple[list[int], list[list[int]], list[int]]:
    """(common beginning, each word's ids, the id that tells it): what stands after a cue, told apart by one token."""
    ids = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    common = len(os.path.commonprefix(ids))
    by_token = {part[common]: part for part in ids if len(part) > common}
    return ids[0][:common], list(by_token.values()), list(by_token)


def recall(
    model: LanguageModel, cue: str, words: Sequence[str], filler: np.ndarray, distance: int, probes: int, batch: int
) -> Figures | None:
    """Share of probes in which the mentioned word is likeliest of the candidates; None beyond the model's limit."""
    prefix, mentions, tells = candidates(model, words)
    if len(tells) < 2 or len(filler) < distance:  # a vocabulary without these words, or too short a text between them
        return None
    probes = -(-probes // len(tells)) * len(tells)  # all words alike often: who always says the same is at chance
    cue_ids, full_stop = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (cue, "."))
    rng = np.random.default_rng(distance)
    sequences = []
    for probe in range(probes):
        at = rng.integers(0, max(1, len(filler) - distance))
        middle = filler[at : at + distance].tolist()
        sequences.append([*cue_ids, *mentions[probe % len(mentions)], *full_stop, *middle, *cue_ids, *prefix])
    longest = max(map(len, sequences))
    if longest + 1 > model.longest_window:
        return None
    # The last token is never read: the row's one target stands there.
    documents = Documents([np.array([*ids, 0]) for ids in sequences], np.zeros(probes), np.zeros(probes))
    rows = [Row(number, 0, len(ids), len(ids), number) for number, ids in enumerate(sequences)]
    log_q_Pk = torch.empty(probes, len(tells), dtype=torch.float64)
    for part in scored(model, documents, rows, batch):
        log_q_Pk[part.index_N] = part.log_q_NV[:, tells].double().cpu()
    right_P = torch.arange(probes) % len(tells)
    mean_k = torch.stack([log_q_Pk[right_P != k, k].mean() for k in range(len(tells))])
    gain = (log_q_Pk.gather(1, right_P[:, None])[:, 0] - mean_k[right_P]).mean()
    return {
        "distance": distance,
        "accuracy": (log_q_Pk.argmax(1) == right_P).double().mean().item(),
        "chance": 1 / len(tells),
        "gain_nats": gain.item(),
        "probes": probes,
    }


# ---------------------------------------------------------------- time constants


def time_constants(model: LanguageModel, documents: Documents, tokens: int) -> list[Tensor]:
    """-1 / mean(ln f) of every unit (GRU: z), (H,) for each layer, over about so many tokens of the documents."""
    network = model.model
    assert isinstance(network, LSTMForCausalLM)
    blocks = [block for block in network.model.layers if isinstance(block, LSTMBlock)]
    sums = [torch.zeros(block.cell.hidden_size, dtype=torch.float64) for block in blocks]
    seen = 0

    def add(total: Tensor, block: LSTMBlock, inputs_1TH: Tensor, outputs_1TH: Tensor) -> None:
        before_1TH = F.pad(outputs_1TH[:, :-1], (0, 0, 1, 0))  # h of the position before
        total += F.logsigmoid(_kept(block.cell, inputs_1TH, before_1TH)).double().sum((0, 1)).cpu()

    def watch(total: Tensor, block: LSTMBlock) -> Any:
        return block.cell.register_forward_hook(lambda _, inputs, outputs: add(total, block, inputs[0], outputs[0]))

    hooks = [watch(total, block) for total, block in zip(sums, blocks, strict=True)]
    try:
        for ids in documents.tokens:
            model.hidden(torch.from_numpy(ids[None, : tokens - seen].astype(np.int64)))
            seen += min(len(ids), tokens - seen)
            if seen >= tokens:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return [-seen / total for total in sums]


def _kept(cell: Any, x_1TH: Tensor, before_1TH: Tensor) -> Tensor:
    """The gate that says what is kept, before its sigmoid, in fp32: an LSTM's f, a GRU's z; both are torch's second."""
    kept = slice(cell.hidden_size, 2 * cell.hidden_size)
    x_1TH, before_1TH = x_1TH.float(), before_1TH.float()
    if isinstance(cell, LayerNormLSTM):  # norms go over all gates
        input_1TG = cell.input_norm(x_1TH @ cell.weight_ih.float().T) + cell.bias
        return (input_1TG + cell.recurrent_norm(before_1TH @ cell.weight_hh.float().T))[..., kept]
    x_HH, h_HH, b_H, e_H = (
        cell.get_parameter(f"{name}_l0")[kept].float() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    return x_1TH @ x_HH.T + before_1TH @ h_HH.T + (b_H + e_H)


def plot_time_constants(constants: Sequence[Tensor], target: Path) -> None:
    """A histogram of each layer's time constants on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 1.3 * len(constants)), layout="constrained")
    axes = figure.subplots(len(constants), 1, sharex=True, squeeze=False)[:, 0]
    every = torch.cat(list(constants)).numpy()
    bins = np.geomspace(max(every.min(), 0.1), max(every.max(), 1.0) * 1.01, 40)
    for layer, (axis, constants_H) in enumerate(zip(axes, constants, strict=True)):
        axis.hist(constants_H.numpy(), bins=bins, color="#1f5fa8")
        median = constants_H.median().item()
        axis.axvline(median, color="#c1622d", linewidth=1.5)
        axis.annotate(f"median {median:.1f}", (median, 0.85), xycoords=("data", "axes fraction"), color="#c1622d")
        axis.set_xscale("log")
        axis.set_ylabel(f"layer {layer + 1}\nunits")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1].set_xlabel("time constant of the gate that forgets (tokens)")
    write_atomically(target, lambda path: figure.savefig(path, dpi=150, format="png"), field="run folder")


# ---------------------------------------------------------------- the command


def measure(options: argparse.Namespace) -> None:
    text = make_texts(options)[0]
    subjects = make_subjects(options.models, trust_remote_code=options.trust_remote_code)
    figures: dict[Subject, Figures] = {}
    wanted, contexts, count = sorted(set(options.contexts)), list[int](), None
    for subject in subjects:
        model = subject.load(options.dtype)
        documents = text.documents(model, count)
        count = len(documents.tokens)
        stretches = choose_stretches(documents, wanted, options.targets)  # the same for models of one vocabulary
        contexts = contexts or stretches.contexts
        figures[subject] = _row(subject, model, documents, stretches, text.evaluation.batch_tokens, options)
        figures[subject]["by_position"] = by_position(model, documents, text.evaluation)
    left_out = [N for N in wanted if N not in contexts]
    _print(text.label, figures, contexts, f"too few targets for contexts of {left_out} tokens" if left_out else "")
    finish(options, figures, {"corpus": text.label, **text.settings, "contexts": contexts, "left_out": left_out})


def _print(label: str, figures: dict[Subject, Figures], contexts: list[int], note: str) -> None:
    rows: list[dict[str, str]] = []
    for subject, row in figures.items():
        losses = {entry["context"]: f"{entry['nll_nats']:.3f}" for entry in row["context"]["losses"]}
        rows.append({"loss by context": subject.label} | {str(N): losses.get(N, "limit") for N in contexts})
        rows[-1]["effective"] = str(row["context"]["effective_context_tokens"])
        rows[-1]["targets"] = str(row["context"]["targets"])
    print_table(f"{label}: nats a token", rows, note)
    rows = [
        {"recall by distance": f"{subject.label}, {kind}"}
        | {str(d): next((f"{e['accuracy']:.2f}" for e in entries if e["distance"] == d), "–") for d in DISTANCES}
        for subject, row in figures.items()
        for kind, entries in row["recall"].items()
    ]
    print_table("share of repeated names (of ten) and numbers (of nine) recognised", rows)


def _row(
    subject: Subject, model: LanguageModel, documents: Documents, stretches: Stretches, batch: int,
    options: argparse.Namespace,
) -> Figures:  # fmt: skip
    """What is measured of one model."""
    filler = np.concatenate([tokens[1:] for tokens in documents.tokens])
    row: Figures = {
        "context": context_figures(model, documents, stretches, batch),
        "recall": {
            kind: [
                found
                for distance in DISTANCES
                if (found := recall(model, cue, words.split(), filler, distance, options.probes, batch))
            ]
            for kind, (cue, words) in RECALL.items()
        },
    }
    if isinstance(model.model, LSTMForCausalLM):
        constants = time_constants(model, documents, options.gate_tokens)
        row["time_constants"] = [_quantiles(constants_H) for constants_H in constants]
        for run in subject.runs:
            plot_time_constants(constants, run / "eval" / f"memory_time_constants_{subject.role}.png")
    return row


def _quantiles(constants_H: Tensor) -> Figures:
    """Quantiles of a layer's time constants in tokens, and their histogram over octaves."""
    octave_H = torch.log2(constants_H).floor().long().clamp(-3, 20)
    octaves = range(int(octave_H.min()), int(octave_H.max()) + 1)
    return {
        "quantiles": {str(q): constants_H.quantile(q).item() for q in QUANTILES},
        "units_by_octave": [{"from": 2.0**o, "units": int((octave_H == o).sum())} for o in octaves],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("memory", __doc__)
    add_corpus_options(parser)
    parser.add_argument(
        "--contexts", type=positive, nargs="+", default=CONTEXTS, metavar="N", help="tokens before a target"
    )
    parser.add_argument("--targets", type=positive, default=1024, help="targets of the loss by context")
    parser.add_argument("--probes", type=positive, default=20, help="probes of each kind and distance of the recall")
    parser.add_argument("--gate-tokens", type=positive, default=4096, help="tokens over which gates are averaged")
    return execute(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
