"""What cached targets cost and what they lose: bytes a token, speed of building, fidelity.

    make bench-cache

*Bare* is the teacher's forward pass over the same windows without a head; *head* is the head's matrix product, which
the sparse encodings need besides; `of bare + head` is their time over the time of building, checksums and files
included: the median over rounds, in each of which everything has its turn.
Peak is the fastest of a few large bf16 (fp32 where there is no bf16) matrix products in the same run.

Fidelity: KL from the exact distribution to the one that int8 hidden states give; and the final loss of a student that
learned from sampled targets less that of one which learned from dense ones, all else equal.

Legend: N tokens, V vocabulary, d width.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish, print_table, seconds
from benchmarks.runs import recipe_parser, run_recipe
from distill.command import guarded
from distill.config import TargetsConfig
from distill.job import TeacherAndText, leave, start_accelerator
from distill.losses import mean_forward_kl
from distill.recipe import load_recipe
from distill.signals import ENCODING_ROWS, Encoding, HiddenSignal
from distill.targets import cached_blocks, open_targets

KINDS = ("hidden", "top_k", "sampled")
STUDENT_TOKENS = 65_536


class Bench:
    """The recipe's teacher and its first training blocks."""

    def __init__(self, recipe_name: str, overrides: Sequence[str], tokens: int) -> None:
        self.recipe = load_recipe(recipe_name, [*overrides, "tracking=none"])
        self.accelerator = start_accelerator(self.recipe)
        self.parts = TeacherAndText(self.recipe, self.accelerator)
        self.teacher = self.parts.teacher
        self.blocks = cached_blocks(self.parts.blocks, tokens)
        self.tokens = len(self.blocks) * self.blocks.block_length
        self.window = self.blocks.context + self.blocks.block_length
        step = max(1, self.recipe.evaluation.batch_tokens // self.window)
        self.batches = [np.arange(n, min(n + step, len(self.blocks))) for n in range(0, len(self.blocks), step)]

    def bare(self) -> None:
        """The forward pass over all windows, without a head."""
        for ids in self.batches:
            batch = self.blocks.batch(ids)
            self.teacher.hidden(batch.window_BW, batch.positions_BW)

    def head(self) -> None:
        """The head's product of all tokens, in the chunks of the sparse encodings."""
        hidden_Nd = torch.randn(ENCODING_ROWS, self.teacher.width).to(self.teacher.head.weight_Vd)
        with torch.inference_mode():
            for _ in range(self.tokens // ENCODING_ROWS):
                self.teacher.head.product(hidden_Nd)

    def build(self, kind: str) -> tuple[float, Any]:
        """Seconds for a new cache of one kind, and the cache."""
        given = self.recipe.targets.model_dump(exclude_unset=True)
        config = TargetsConfig.model_validate({**given, "signal": kind, "cache": True})
        with tempfile.TemporaryDirectory() as folder:
            config = config.model_copy(update={"cache_dir": str(Path(folder) / kind)})
            targets = open_targets(
                config, self.teacher, self.parts.corpus, self.blocks, self.accelerator,
                batch_tokens=self.recipe.evaluation.batch_tokens,
            )  # fmt: skip
            loss = self.int8_kl(targets) if kind == "hidden" else None
            return targets.seconds, (targets.bytes_per_token, loss)

    def int8_kl(self, targets: Any) -> float:
        """Mean KL in nats from the exact distribution to the cached one, on the first 4,096 tokens."""
        total, tokens = 0.0, 0
        for ids in self.batches:
            batch = self.blocks.batch(ids)
            exact, stored = self.teacher.signal(batch, Encoding("hidden")), targets.signal(batch)
            assert isinstance(exact, HiddenSignal)
            total += mean_forward_kl(stored, exact) * len(exact.hidden_Nd)
            tokens += len(exact.hidden_Nd)
            if tokens >= 4096:
                break
        return total / tokens

    def flops(self) -> float:
        """Of the forward pass over all windows: two a weight and token below the embedding, and attention."""
        model = self.teacher.model
        config = model.config.get_text_config()
        embeddings = {
            id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()
        }
        weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
        attention = 2 * 2 * config.num_hidden_layers * config.hidden_size * self.window / 2
        return (2 * weights + attention) * len(self.blocks) * self.window


def peak_flops(dtype: torch.dtype, size: int = 4096) -> float:
    """Floating point operations a second of the best of a few large matrix products."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(6))


def student_losses(recipe: str, overrides: Sequence[str]) -> dict[str, float]:
    """Final validation loss of the same student by the signal that it learned from."""
    stage = {"objective": "forward_kl", "freeze": ["embedding", "head"], "length": {"tokens": STUDENT_TOKENS}}
    common = ["control=false", f"stages=[{json.dumps(stage)}]", *overrides]
    found = {
        kind: run_recipe("cache", kind, recipe, [*common, f"targets.signal={kind}"]) for kind in ("dense", "sampled")
    }
    return {kind: result["curves"]["student"][-1]["nll_nats"] for kind, result in found.items()}


def benchmark(options: argparse.Namespace) -> None:
    bench = Bench(options.recipe, options.overrides, options.tokens)
    try:
        bench.bare()  # warm-up
        times: dict[str, list[float]] = {name: [] for name in ("bare", "head", *KINDS)}
        found: dict[str, tuple[float, float | None]] = {}
        for _ in range(options.repeats):
            times["bare"].append(seconds(bench.bare))
            times["head"].append(seconds(bench.head))
            for kind in KINDS:
                spent, found[kind] = bench.build(kind)
                times[kind].append(spent)
        median = {name: float(np.median(values)) for name, values in times.items()}
        peak = peak_flops(bench.teacher.head.weight_Vd.dtype)
        share = bench.flops() / median["bare"] / peak
    finally:
        leave(bench.accelerator)
    rows = {}
    for kind in KINDS:
        allowed = [
            bare + (0 if kind == "hidden" else head) for bare, head in zip(times["bare"], times["head"], strict=True)
        ]
        rows[kind] = {
            "bytes_per_token": found[kind][0],
            "tokens_per_second": bench.tokens / median[kind],
            "of_bare_and_head": float(np.median(np.divide(allowed, times[kind]))),
        }
    losses = {} if options.skip_students else student_losses(options.recipe, options.overrides)
    table = [
        {
            "targets": kind,
            "bytes/token": f"{row['bytes_per_token']:.1f}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "of bare + head": f"{row['of_bare_and_head']:.2f}",
        }
        for kind, row in rows.items()
    ]
    kl = found["hidden"][1]
    difference = losses["sampled"] - losses["dense"] if losses else None
    note = (
        f"bare forward {bench.tokens / median['bare']:,.0f} tokens/s, {share:.0%} of the peak of {peak / 1e9:,.0f} "
        f"GFLOP/s; head {bench.tokens / median['head']:,.0f} tokens/s\nint8: KL {kl:.5f} nats"
    )
    if difference is not None:
        note += f"; sampled less dense, final loss: {difference:+.4f} nats"
    print_table(f"Caches of {bench.tokens:,} tokens; width {bench.teacher.width}", table, note)
    finish(
        "cache",
        {
            "tokens": bench.tokens,
            "width": bench.teacher.width,
            "kinds": rows,
            "build_share": min(row["of_bare_and_head"] for row in rows.values()),
            "int8_kl_nats": kl,
            "student_nll_nats": losses,
            "sampled_minus_dense_nats": difference,
            "forward_share_of_peak": share,
            "peak_gflops": peak / 1e9,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("cache", __doc__, "frontier")
    parser.add_argument("--tokens", type=int, default=8_192, help="tokens of each cache")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-students", action="store_true", help="without the two training runs")
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
