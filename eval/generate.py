"""What a model writes, in figures and samples.

    python -m eval.generate runs/quickstart
    python -m eval.generate MODEL ... --teacher TEACHER --corpus my.txt --new-tokens 64

Prompts are the first tokens of documents of the corpus; each model continues them by sampling. Reported are

- distinct-n: different n-grams over all n-grams, of all continuations together (Li et al. 2016, arXiv 1510.03055);
- repetition: the share of a continuation's 4-grams that it has had before (seq-rep-4, Welleck et al. 2019,
  arXiv 1908.04319), averaged over continuations;
- the mean length in tokens up to the end of text;
- the teacher's perplexity of what was written, given the prompt: low for text that the teacher could have written, but
  lowest for text that says the same thing over and over, so read it beside the repetition.

The text's own continuations are measured as well, as `text`. A model with a trimmed vocabulary has its own prompts, and
is judged by the teacher over those tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from distill.config import UserError
from distill.metrics import Documents, Row, scored
from distill.output import print_table
from distill.sampling import Sampler
from distill.teacher import LanguageModel
from eval.command import (
    Figures,
    Subject,
    add_corpus_options,
    execute,
    find_teacher,
    finish,
    in_tokens_of,
    make_parser,
    make_subjects,
    make_texts,
    positive,
    positive_number,
)

Ids = list[int]


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]


def distinct(texts: Sequence[Ids], n: int) -> float | None:
    """Different n-grams over all n-grams; None where there are none."""
    counts = Counter(gram for ids in texts for gram in ngrams(ids, n))
    return len(counts) / counts.total() if counts else None


def repetition(texts: Sequence[Ids], n: int = 4) -> float | None:
    """Mean share of a text's n-grams that it has had before; None where no text has any."""
    shares = [1 - len(set(grams)) / len(grams) for ids in texts if (grams := ngrams(ids, n))]
    return sum(shares) / len(shares) if shares else None


def teacher_nll(teacher: LanguageModel, prompts: Sequence[Ids], texts: Sequence[Ids], batch: int) -> float | None:
    """The teacher's mean nats a token of the texts, each given its prompt; None where nothing was written."""
    pairs = [(prompt, ids) for prompt, ids in zip(prompts, texts, strict=True) if ids]
    whole = Documents([np.array(prompt + ids) for prompt, ids in pairs], np.zeros(len(pairs)), np.zeros(len(pairs)))
    rows = [Row(n, 0, len(prompt + ids) - 1, len(prompt), 0) for n, (prompt, ids) in enumerate(pairs)]
    total = sum(part.nll_N.sum().item() for part in scored(teacher, whole, rows, batch))
    return total / sum(len(ids) for _, ids in pairs) if pairs else None


class Nucleus(LogitsProcessor):
    """Temperature and top-p as the decoder does them (`distill/sampling.py`): `generate` sorts the whole vocabulary for
    each token, which takes longer than a small model's step."""

    def __init__(self, temperature: float, top_p: float) -> None:
        self.sampler = Sampler(temperature, top_p=top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept_BV = torch.full(scores.shape, -math.inf)
        for kept_V, scores_V in zip(kept_BV, scores.float().cpu(), strict=True):
            tokens_P, weights_P = self.sampler.kept(scores_V.numpy())
            kept_V[slice(None) if tokens_P is None else torch.from_numpy(tokens_P)] = torch.from_numpy(weights_P).log()
        return kept_BV.to(scores.device)


def write(model: LanguageModel, prompts: Sequence[Ids], options: argparse.Namespace) -> list[Ids]:
    """Continuations of prompts of one length, without the end of text."""
    end, rows = prompts[0][0], cast(Any, model.model.get_output_embeddings()).weight.shape[0]
    padding = list(range(model.vocab_size, rows)) or None  # rows of the head that are no tokens
    torch.manual_seed(options.seed)
    prompt_BT = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        output_BT = cast(Any, model.model).generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=options.new_tokens, do_sample=True,
            temperature=1.0, top_p=1.0, top_k=0, eos_token_id=end, pad_token_id=end, suppress_tokens=padding,
            logits_processor=LogitsProcessorList([Nucleus(options.temperature, options.top_p)]),
        )  # fmt: skip
    written = output_BT[:, prompt_BT.shape[1] :].tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in written]


def figures_of(teacher: LanguageModel, prompts: Sequence[Ids], texts: Sequence[Ids], batch_tokens: int) -> Figures:
    """The figures of some continuations."""
    nll = teacher_nll(teacher, prompts, texts, batch_tokens)
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "repetition_4": repetition(texts),
        "mean_length_tokens": sum(map(len, texts)) / len(texts),
        "teacher_nll_nats": nll,
        "teacher_perplexity": None if nll is None else math.exp(min(nll, 700.0)),
        "texts": len(texts),
    }


def measure(options: argparse.Namespace) -> None:
    text = make_texts(options)[0]
    subjects = make_subjects(options.models, trust_remote_code=options.trust_remote_code)
    teacher = find_teacher(options).load(options.dtype)
    size, room = options.prompt_tokens + 1, teacher.longest_window
    if size + options.new_tokens > room:
        raise UserError(
            f"--new-tokens: prompt and continuation must fit into the {room} tokens that {teacher.name} reads"
        )

    def long_ones(model: LanguageModel) -> list[Ids]:
        """Documents that are longer than a prompt."""
        chosen = [tokens.tolist() for tokens in text.documents(model).tokens if len(tokens) > size][: options.texts]
        if not chosen:
            raise UserError(
                f"corpus {text.label}: expected documents of more than {size - 1} tokens for prompts, found none"
            )
        return chosen

    def row(judge: LanguageModel, prompts: Sequence[Ids], texts: Sequence[Ids]) -> Figures:
        samples = [
            {"prompt": judge.tokenizer.decode(prompt[1:]), "text": judge.tokenizer.decode(ids)}
            for prompt, ids in zip(prompts, texts, strict=True)
        ]
        return {**figures_of(judge, prompts, texts, text.evaluation.batch_tokens), "samples": samples[: options.show]}

    chosen = long_ones(teacher)
    prompts = [ids[:size] for ids in chosen]
    real = row(teacher, prompts, [ids[size : size + options.new_tokens] for ids in chosen])
    figures: dict[Subject, Figures] = {}
    for subject in subjects:
        model = teacher if subject.role == "teacher" else subject.load(options.dtype)
        judge = in_tokens_of(model, teacher)
        own = prompts if judge is teacher else [ids[:size] for ids in long_ones(judge)]
        figures[subject] = row(judge, own, write(model, own, options))
    labelled = {"text": real, **{subject.label: found for subject, found in figures.items()}}
    print_table(
        f"{len(prompts)} continuations of {options.prompt_tokens} tokens of {text.label}; temperature "
        f"{options.temperature}, top-p {options.top_p}, at most {options.new_tokens} tokens",
        [
            {
                "model": label,
                **{f"distinct-{n}": _number(found[f"distinct_{n}"], 3) for n in (1, 2, 3)},
                "repetition": _number(found["repetition_4"], 3),
                "length": _number(found["mean_length_tokens"], 1),
                "teacher's perplexity": _number(found["teacher_perplexity"], 1),
            }
            for label, found in labelled.items()
        ],
        "\n".join(
            f"{label}: {' '.join(sample['prompt'].split())} | {' '.join(sample['text'].split())}"
            for label, found in labelled.items()
            for sample in found["samples"][:1]
        ),
    )
    names = ("texts", "prompt_tokens", "new_tokens", "temperature", "top_p", "seed")
    chosen_so = {name: getattr(options, name) for name in names}
    finish(options, figures, {"corpus": text.label, **text.settings, "text_itself": real, **chosen_so})


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("generate", __doc__)
    add_corpus_options(parser)
    parser.add_argument("--teacher", metavar="MODEL", help="default: the teacher of the run folders")
    parser.add_argument("--texts", type=positive, default=32, help="continuations of each model")
    parser.add_argument("--prompt-tokens", type=positive, default=16)
    parser.add_argument("--new-tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=positive_number, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=4, help="samples kept of each model")
    return execute(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
