"""Speculative decoding: a student drafts, its teacher verifies; the text is the teacher's own, sooner.

    python -m eval.speculative TEACHER STUDENT [--drafts 1 2 4 6] [--prompt "..."] [--new-tokens 100]

A round: the student continues the text by k tokens, the teacher reads them in one forward pass and keeps the
longest prefix that it would have written itself, plus one token of its own. Reading k + 1 tokens costs a CPU
little more than reading one, because the weights are loaded once. Greedily a draft is kept while it is the
teacher's likeliest token; when sampling, with probability min(1, p / q), and the first refused one is replaced by a
draw from max(0, p - q), which leaves exactly the teacher's distribution (Leviathan, Kalman and Matias, ICML 2023,
arXiv 2211.17192).

The student is run by its quantised decoder (0.3 ms a token) or, with `--runtime torch`, by its own forward; its
state is a few kilobytes, so what was refused is forgotten by putting a copy back. `generate(assistant_model=...)`
of transformers does the same with more ceremony a token; the table has it beside this loop.

Legend: V vocabulary, k drafted tokens, T positions that the teacher reads at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from distill.command import guarded
from distill.config import UserError
from distill.decode import find_student, load_decoder
from distill.sampling import Sampler
from distill.session import available_cores
from distill.teacher import LanguageModel, load_language_model
from distill.torch_decoder import TorchDecoder

DRAFTS = (1, 2, 3, 4, 6)
PROMPTS = (
    "The history of the city begins in",
    "In 1969, the first",
    "She was born in London and",
    "The river flows through",
    "The most important thing to know about cooking rice is",
)


@dataclass
class Count:
    """What a run of rounds came to."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were kept."""
        return self.accepted / max(self.drafted, 1)

    @property
    def accepted_length(self) -> float:
        """Mean number of drafted tokens kept a round; a round writes one more."""
        return self.accepted / max(self.rounds, 1)


@torch.inference_mode()
def speculate(
    teacher: Any, drafter: Any, prompt: Sequence[int], new_tokens: int, drafts: int, sampler: Sampler
) -> tuple[list[int], Count]:
    """`new_tokens` tokens of the teacher after a prompt of ids, drafted `drafts` at a time.

    `teacher` is a causal model of transformers whose cache can be cropped, `drafter` a Decoder or TorchDecoder. The
    same sampler draws for both.
    """
    cache, lanes, count = DynamicCache(config=teacher.config), drafter.lanes(1), Count()
    *before, last = prompt  # the last token written is read at the beginning of the next round
    if before:
        teacher(torch.tensor([before], device=teacher.device), past_key_values=cache, logits_to_keep=1)
    for token in before:
        lanes.read([token])
    written: list[int] = []
    while len(written) < new_tokens:
        size = min(drafts, new_tokens - len(written) - 1)
        proposed: list[int] = []
        states, logits, reading = [], [], last
        for _ in range(size):
            lanes.read([reading])
            states.append(lanes.state())
            if not sampler.greedy:
                logits.append(lanes.logits(0).copy())
            reading = lanes.choose(0, sampler)
            proposed.append(reading)
        input_1T = torch.tensor([[last, *proposed]], device=teacher.device)
        logits_TV = teacher(input_1T, past_key_values=cache).logits[0, :, : drafter.vocab_size].float().cpu().numpy()
        kept, bonus = verify(logits_TV, logits, proposed, sampler)
        cache.crop(kept - size)
        if kept < size:
            lanes.restore(states[kept])
        else:
            lanes.read([reading])  # the last draft was chosen, not read
        last = bonus
        written += [*proposed[:kept], bonus]
        count.rounds, count.drafted, count.accepted = count.rounds + 1, count.drafted + size, count.accepted + kept
    return written, count


def verify(
    teacher_TV: np.ndarray, student: Sequence[np.ndarray], proposed: Sequence[int], sampler: Sampler
) -> tuple[int, int]:
    """(drafted tokens kept, the token after them), given the logits of both at each drafted place."""
    for place, token in enumerate(proposed):
        if sampler.greedy:
            choice = sampler.choose(teacher_TV[place])
            if choice != token:
                return place, choice
            continue
        p_V, q_V = (_probabilities(sampler, logits[place]) for logits in (teacher_TV, student))
        if sampler.random.random() * q_V[token] >= p_V[token]:
            rest_V = np.maximum(p_V - q_V, 0)
            return place, int(sampler.random.choice(len(rest_V), p=rest_V / rest_V.sum()))
    return len(proposed), sampler.choose(teacher_TV[len(proposed)])


def _probabilities(sampler: Sampler, logits_V: np.ndarray) -> np.ndarray:
    tokens_P, weights_P = sampler.kept(logits_V)
    probabilities_V = np.zeros(len(logits_V))
    probabilities_V[slice(None) if tokens_P is None else tokens_P] = weights_P
    return probabilities_V / probabilities_V.sum()


def teacher_alone(teacher: Any, prompt: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
    """The teacher's own `generate`, greedy and past any end of text; `assistant_model` may be among the options."""
    prompt_1T = torch.tensor([list(prompt)], device=teacher.device)
    with torch.inference_mode():
        output_1T = teacher.generate(
            prompt_1T, attention_mask=torch.ones_like(prompt_1T), do_sample=False, max_new_tokens=new_tokens,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
    return output_1T[0, len(prompt) :].tolist()


def measure(
    teacher: LanguageModel, drafter: Any, prompts: Sequence[Sequence[int]], new_tokens: int, drafts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Rows by name: the teacher alone, then with each draft length. All write the same prompts' greedy continuations,
    in turns, so that a busy machine slows all alike."""

    def alone(prompt: Sequence[int]) -> tuple[list[int], Count]:
        return teacher_alone(teacher.model, prompt, new_tokens), Count()

    def drafted(size: int) -> Callable[[Sequence[int]], tuple[list[int], Count]]:
        return lambda prompt: speculate(teacher.model, drafter, prompt, new_tokens, size, Sampler(0))

    ways: dict[str, Callable[[Sequence[int]], tuple[list[int], Count]]] = {"teacher alone": alone}
    ways |= {"teacher alone, this loop": drafted(0)}
    ways |= {f"drafts of {size}": drafted(size) for size in drafts}
    if isinstance(drafter, TorchDecoder):
        options = {"assistant_model": drafter.student}
        ways["generate(assistant_model)"] = lambda prompt: (
            teacher_alone(teacher.model, prompt, new_tokens, **options),
            Count(),
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    totals = {name: Count() for name in ways}
    same = {name: 0 for name in ways}
    for way in ways.values():
        way(prompts[0][:2])  # warms up
    for prompt in prompts:
        expected: list[int] = []
        for name, way in ways.items():
            began = time.perf_counter()
            written, count = way(prompt)
            seconds[name].append(time.perf_counter() - began)
            expected = expected or written
            same[name] += _shared(expected, written)
            total = totals[name]
            total.rounds, total.drafted = total.rounds + count.rounds, total.drafted + count.drafted
            total.accepted += count.accepted
    base = np.array(seconds["teacher alone"])
    return {
        name: {
            "tokens_per_second": new_tokens * len(prompts) / sum(seconds[name]),
            "speedup": float(base.sum() / sum(seconds[name])),
            "acceptance_rate": totals[name].acceptance_rate,
            "accepted_length": totals[name].accepted_length,
            "identical_tokens": same[name] / (new_tokens * len(prompts)),
        }
        for name in ways
    }


def _shared(expected: Sequence[int], written: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(expected, written, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(expected))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.speculative", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", metavar="TEACHER", help="whatever eval.perplexity takes")
    parser.add_argument("student", metavar="STUDENT", help="a student's folder, a run folder, or a hub id")
    parser.add_argument("--drafts", type=int, nargs="+", default=list(DRAFTS), help="tokens drafted a round")
    parser.add_argument("--prompt", action="append", help="text to continue; several are averaged over")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the teacher")
    parser.add_argument("--runtime", choices=["onnx", "torch"], default="onnx", help="of the student")
    options = parser.parse_args(arguments)
    return guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    rows = compare(options)
    table = Table(title=f"{options.student} drafts for {options.teacher}, {options.new_tokens} greedy tokens a prompt")
    table.add_column("decoding")
    for heading in ("tok/s", "speed-up", "acceptance", "accepted length", "same tokens"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}", f"{row['acceptance_rate']:.3f}",
            f"{row['accepted_length']:.2f}", f"{row['identical_tokens']:.3f}",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps(rows))


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Load both models as the options say, check that they belong together, and measure."""
    if min(options.drafts) < 1 or options.new_tokens < 1:
        raise UserError(f"--drafts and --new-tokens must be at least 1, found {options.drafts}, {options.new_tokens}")
    torch.set_num_threads(available_cores())
    teacher = load_language_model(options.teacher, device=torch.device("cpu"), dtype=options.dtype, role="teacher")
    folder = find_student(options.student)
    drafter: Any = TorchDecoder(folder) if options.runtime == "torch" else load_decoder(folder)
    rows = teacher.model.get_output_embeddings().weight.shape[0]  # some are padding
    if not teacher.vocab_size <= drafter.vocab_size <= rows:
        raise UserError(
            f"{options.student} has {drafter.vocab_size} tokens and {options.teacher} {teacher.vocab_size}: a student "
            "drafts for the teacher that it was distilled from, with the same tokenizer"
        )
    ids = [teacher.tokenizer(text, add_special_tokens=False)["input_ids"] for text in options.prompt or PROMPTS]
    if not all(ids):
        raise UserError("--prompt: expected at least one token, found none; give some text")
    return measure(teacher, drafter, ids, options.new_tokens, options.drafts)


if __name__ == "__main__":
    sys.exit(main())
