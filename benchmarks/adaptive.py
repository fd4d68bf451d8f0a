"""Adaptive softmax against a sampled one and the whole, for a student without the teacher's head.

    python -m benchmarks.adaptive --seconds 60

The adaptive softmax (arXiv 1609.04309; torch.nn.AdaptiveLogSoftmaxWithLoss) gives frequent tokens a head of their own
and rare ones narrow heads behind a few class tokens. All variants train the same LSTM from random weights by
cross-entropy on the recipe's text for as many seconds, with the same batches; then the loss of the whole vocabulary on
validation documents, and the time of the head alone in greedy decoding at batch 1 (fp32), are compared.

Legend: B lanes, T tokens, N = B * T, V vocabulary, d width.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.report import finish, print_table
from distill.candidates import CandidateSampler
from distill.command import guarded
from distill.corpus import Blocks, lane_order, load_corpus
from distill.fused import StudentWithLoss
from distill.job import leave, select_documents, start_accelerator
from distill.objective import Objective
from distill.recipe import load_recipe
from distill.student import LSTMCache, LSTMConfig, LSTMForCausalLM
from distill.teacher import resolve_model

CE = Objective({"cross_entropy": 1.0})
Step = Callable[[int, Any, Any], Tensor]  # (step, batch, state) -> loss sum; what carries the state is its own


class Variant:
    """A student's body with one kind of output layer."""

    def __init__(self, name: str, options: argparse.Namespace, counts_V: np.ndarray, config: LSTMConfig) -> None:
        torch.manual_seed(0)
        self.name, self.student = name, LSTMForCausalLM(config)
        self.module: Any = StudentWithLoss(self.student)
        self.sampler = (
            CandidateSampler(torch.from_numpy(counts_V), options.candidates) if name == "candidates" else None
        )
        self.adaptive: nn.AdaptiveLogSoftmaxWithLoss | None = None
        self.state: Any = None
        parameters = list(self.student.parameters())
        if name == "adaptive":
            # It wants tokens in the order of their frequency.
            order_V = np.argsort(-counts_V, kind="stable")
            self.rank_V = torch.empty(len(order_V), dtype=torch.int64)
            self.rank_V[torch.from_numpy(order_V)] = torch.arange(len(order_V))
            cutoffs = list(options.cutoffs)
            self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(config.embedding_size, config.vocab_size, cutoffs)
            parameters = [*self.student.model.parameters(), *self.adaptive.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(0.9, 0.98))
        self.parameters = parameters

    def loss(self, step: int, batch: Any, reset_BT: Tensor) -> Tensor:
        """Sum over the tokens of a step."""
        if self.adaptive is None:
            labels_N = batch.labels_BT.flatten()
            candidates = self.sampler.draw(labels_N, step) if self.sampler else None
            loss, _, self.state = self.module(
                batch.inputs_BT, batch.labels_BT, reset_BT, self.state, None, CE, candidates
            )
            return loss
        cache = LSTMCache(*self.state) if self.state else LSTMCache()
        z_BTd = self.student.model(batch.inputs_BT, past_key_values=cache, reset_mask=reset_BT, use_cache=True)[0]
        kept = cache.detach()
        self.state = (kept.h_LBH, kept.c_LBH)
        return self.adaptive(z_BTd.flatten(0, 1), self.rank_V[batch.labels_BT.flatten()]).loss * batch.labels_BT.numel()

    @torch.no_grad()
    def nll(self, documents: Sequence[np.ndarray]) -> float:
        """Nats a token over the whole vocabulary, each document from a zero state."""
        total, tokens = 0.0, 0
        for ids in documents:
            ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
            z_Td = self.student.model(ids_1T[:, :-1], use_cache=False)[0][0]
            if self.adaptive is None:
                logits_TV = self.student.lm_head(z_Td)
                total += nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum").item()
            else:
                total += self.adaptive(z_Td, self.rank_V[ids_1T[0, 1:]]).loss.item() * (len(ids) - 1)
            tokens += len(ids) - 1
        return total / tokens

    @torch.no_grad()
    def head_ms(self, repeats: int = 200) -> float:
        """Median milliseconds in which the likeliest next token of one z is found."""
        z_1d, times = torch.randn(1, self.student.config.embedding_size), []
        for _ in range(repeats):
            began = time.perf_counter()
            self.student.lm_head(z_1d).argmax(-1) if self.adaptive is None else self.adaptive.predict(z_1d)
            times.append(1000 * (time.perf_counter() - began))
        return sorted(times)[repeats // 2]


def benchmark(options: argparse.Namespace) -> None:
    """Train every variant, then the table."""
    recipe = load_recipe(options.recipe, [*options.overrides, "tracking=none"])
    accelerator = start_accelerator(recipe)
    try:
        rows = [row_of(name, recipe, options, accelerator) for name in ("whole", "candidates", "adaptive")]
    finally:
        leave(accelerator)
    print_table(f"{options.seconds:.0f} s of cross-entropy each", [{k: str(v) for k, v in row.items()} for row in rows])
    finish("adaptive", {"seconds": options.seconds, "cutoffs": options.cutoffs, "rows": rows})


def row_of(name: str, recipe: Any, options: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(recipe.teacher.model))
    corpus = load_corpus(recipe.corpus, tokenizer, progress=False)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    config = LSTMConfig(
        vocab_size=vocab_size, embedding_size=options.width, hidden_size=recipe.student.hidden_size,
        num_layers=recipe.student.num_layers, tie_word_embeddings=False,
    )  # fmt: skip
    variant = Variant(name, options, corpus.train.occurrences(vocab_size), config)
    blocks = Blocks(corpus.train, recipe.corpus.block_length, 0, recipe.corpus.reset_at_documents)
    lanes, steps, spent = recipe.run.batch_size, 0, 0.0
    tokens_per_step = lanes * recipe.corpus.block_length
    while spent < options.seconds:
        began = time.perf_counter()
        epoch, row = divmod(steps, len(blocks) // lanes)
        batch = blocks.batch(lane_order(len(blocks), lanes, epoch, 0)[row])
        reset_BT = batch.reset_BT.clone()
        reset_BT[:, 0] |= row == 0
        with accelerator.autocast():
            loss = variant.loss(steps, batch, reset_BT)
        (loss / tokens_per_step).backward()
        nn.utils.clip_grad_norm_(variant.parameters, 1.0)
        share = min(1.0, spent / options.seconds)
        for group in variant.optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, 20 * share + 1e-3, 5 * (1 - share) + 0.05)
        variant.optimizer.step()
        variant.optimizer.zero_grad(set_to_none=True)
        steps, spent = steps + 1, spent + time.perf_counter() - began
    documents = select_documents(corpus.validation, recipe.evaluation.max_tokens).tokens
    return {
        "output layer": name,
        "tokens/s": round(steps * tokens_per_step / spent),
        "tokens": steps * tokens_per_step,
        "nats": round(variant.nll(documents), 3),
        "head ms": round(variant.head_ms(), 3),
        "M parameters": round(sum(p.numel() for p in variant.parameters) / 1e6, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each variant")
    parser.add_argument("--candidates", type=int, default=4096)
    parser.add_argument("--cutoffs", type=int, nargs="+", default=[2000, 10000], help="of the adaptive softmax")
    parser.add_argument("--width", type=int, default=576, help="of embedding and head")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
