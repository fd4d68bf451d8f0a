"""Perplexity of any causal language models on the same text.

    python -m eval.perplexity runs/quickstart MODEL ... --corpus runs/quickstart
    python -m eval.perplexity MODEL ... --corpus my.txt --separator '<|endoftext|>'

MODEL is anything that `AutoModelForCausalLM` loads, teacher or student: a hub id, a folder, a run folder
(its student), a `.gguf` file, `package:DISTRIBUTION/PATH`. The corpus is a recipe or run folder, whose
validation documents are then scored exactly as the training loop does (`distill/metrics.py`), or a text
source as in the recipe's `corpus.source`, all of which is scored. Each model reads the same bytes with
its own tokenizer. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from distill.config import CorpusConfig, EvaluationConfig, UserError
from distill.corpus import load_corpus, separator_id
from distill.documents import open_documents
from distill.job import select_documents
from distill.metrics import Documents, Score, reading_window, score
from distill.recipe import load_recipe
from distill.student import LSTMForCausalLM
from distill.teacher import LanguageModel, load_language_model


def evaluate(model: LanguageModel, documents: Documents, evaluation: EvaluationConfig) -> Score:
    """Score documents: a recurrent student whole, any other model in overlapping windows."""
    window, context = reading_window(model, evaluation)
    return score(model, documents, window=window, context=context, batch_tokens=evaluation.batch_tokens)


def corpus_documents(corpus: CorpusConfig, split: str, model: LanguageModel, max_tokens: int | None) -> Documents:
    """Documents of one split as the training sees it (`train`, `validation`, `test`), or `all` of the text."""
    if split != "all":
        return select_documents(getattr(load_corpus(corpus, model.tokenizer), split), max_tokens)
    separator = separator_id(model.tokenizer, corpus.separator)
    tokens: list[np.ndarray] = []
    utf8_bytes: list[int] = []
    words: list[int] = []
    total = 0
    for text in open_documents(corpus):
        ids = model.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if tokens and max_tokens is not None and total + len(ids) > max_tokens:
            break
        total += len(ids)
        tokens.append(np.array([separator, *ids], dtype=np.int64))
        utf8_bytes.append(len(text.encode()))
        words.append(len(text.split()))
    if total == 0:
        raise UserError(f"corpus {corpus.source}: expected text, found none")
    return Documents(tokens, np.array(utf8_bytes), np.array(words))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.perplexity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--corpus", required=True, help="a recipe, a run folder, or a text source")
    parser.add_argument(
        "--split",
        choices=["validation", "test", "train", "all"],
        help="default: validation of a recipe, all of a text",
    )
    parser.add_argument("--text-field", default="text", help="field of a text source's records")
    parser.add_argument("--separator", help="token that starts a document (default: the tokenizer's end of text)")
    parser.add_argument("--window", type=int, help="longest stretch that a Transformer reads, in tokens")
    parser.add_argument("--context", type=int, help="minimum left context in later windows, in tokens")
    parser.add_argument("--max-tokens", type=int, help="score the first whole documents within this many tokens")
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    corpus, evaluation, from_recipe = _settings(options)
    split = options.split or ("validation" if from_recipe else "all")
    device = Accelerator().device
    rows: dict[str, dict[str, Any]] = {}
    for name in tqdm(options.models, desc="models", disable=len(options.models) == 1):
        model = load_language_model(
            name, device=device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
        )
        if isinstance(model.model, LSTMForCausalLM) and options.dtype == "auto":
            model = load_language_model(name, device=device, dtype="fp32")  # as the training validates it
        documents = corpus_documents(corpus, split, model, evaluation.max_tokens)
        result = evaluate(model, documents, evaluation).as_dict()
        rows[name] = {
            **result,
            "parameters": model.parameters,
            "dtype": str(model.model.dtype).removeprefix("torch."),
        }
    table = Table(title=f"{corpus.source}, {split}; window {evaluation.window}, context {evaluation.context}")
    table.add_column("model")
    for heading in ("perplexity", "per word", "bits/byte", "loss (nats)", "tokens", "parameters"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['perplexity']:.2f}", f"{row['word_perplexity']:.1f}", f"{row['bits_per_byte']:.4f}",
            f"{row['nll_nats']:.4f}", f"{row['tokens']:,}", f"{row['parameters'] / 1e6:.1f} M",
        )  # fmt: skip
    Console(stderr=False).print(table)
    settings = {
        "source": corpus.source,
        "split": split,
        "window": evaluation.window,
        "context": evaluation.context,
    }
    print(json.dumps({"corpus": settings, "models": rows}))
    return 0


def _settings(options: argparse.Namespace) -> tuple[CorpusConfig, EvaluationConfig, bool]:
    """What to score and how, from a recipe or from the command line's own words."""
    path = Path(options.corpus)
    from_recipe = path.suffix in (".yaml", ".yml") or (path / "recipe.yaml").is_file()
    given = {name: getattr(options, name) for name in ("window", "context", "max_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        if from_recipe:
            recipe = load_recipe(path)
            corpus, base = recipe.corpus, recipe.evaluation.model_dump()
        else:
            corpus = CorpusConfig(source=options.corpus, text_field=options.text_field, separator=options.separator)
            base = {"max_tokens": None}
        return corpus, EvaluationConfig.model_validate({**base, **given}), from_recipe
    except ValidationError as error:
        raise UserError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    sys.exit(main())
