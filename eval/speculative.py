"""Speculative decoding: a student drafts, its teacher verifies; the text is the teacher's own, sooner.

    python -m eval.speculative TEACHER STUDENT [--chains 1 2 4] [--trees 8 16] [--prompt "..."] [--new-tokens 64]

A round: the student drafts n tokens that may come next, the teacher reads them in one forward pass, and its own
choices are followed through the draft for as long as they are found there; the first that is not ends the round.
Every token is thus chosen by the teacher, greedily or by sampling, from its own distribution: drafting changes the
speed and nothing else. Reading n + 1 tokens costs a CPU little more than reading one, because weights are loaded once
(Leviathan, Kalman and Matias, ICML 2023, arXiv 2211.17192), if they lie as a product of a few rows wants them
(`packed`: else two tokens can take twice as long as one).

A draft is a chain of the likeliest tokens or a tree: starting from nothing, the continuation that is most probable of
all that are open is added, n times. A sure student makes a long chain of it, an unsure one a bush (as in SpecInfer,
arXiv 2305.09781, and EAGLE-2, arXiv 2406.16858). The teacher reads a tree under a mask in which a token sees its
ancestors alone. Probabilities are the student's, mixed with what the text itself has said before (eval/repeats.py).

The student is run by its quantised decoder on one thread (its spinning pool would take the teacher's cores) or,
with `--runtime torch`, by its own forward. Its state is a few kilobytes, so each branch keeps its own.
`generate(assistant_model=...)` of transformers does the same for chains; with `--runtime torch` it is in the table.

Legend: V vocabulary, n drafted tokens, T = n + 1 positions that the teacher reads at once, S positions before them.
"""

from __future__ import annotations

import argparse
import copy
import heapq
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from distill.command import guarded
from distill.config import UserError
from distill.decode import end_tokens, find_student, load_decoder, load_tokenizer
from distill.output import print_json, print_table
from distill.sampling import Sampler
from distill.session import available_cores
from distill.teacher import LanguageModel, load_language_model
from distill.torch_decoder import TorchDecoder
from eval.repeats import Repeats

CHAINS, TREES, WIDTH = (1, 2, 4), (4, 8, 12), 8
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

    def __add__(self, other: Count) -> Count:
        return Count(self.rounds + other.rounds, self.drafted + other.drafted, self.accepted + other.accepted)

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were kept."""
        return self.accepted / max(self.drafted, 1)

    @property
    def accepted_length(self) -> float:
        """Mean number of drafted tokens kept a round; a round writes one more."""
        return self.accepted / max(self.rounds, 1)


class Draft:
    """A tree of tokens that may follow the last one written, which is its node 0."""

    def __init__(self, lanes: Any, last: int, size: int, width: int, repeats: Repeats) -> None:
        """Let the student in `lanes` read the last token, and add `size` nodes of at most `width` children each.

        `repeats` has read the text up to the last token.
        """
        self.tokens, self.parents, self.lanes = [last], [-1], lanes
        lanes.read([last])
        self.states = [lanes.state()]
        self.children: list[dict[int, int]] = [{}]
        open_ends: list[tuple[float, int, int]] = []  # negative log-probability, parent, token

        def branch(node: int, cost: float) -> None:
            drafted = [self.tokens[earlier] for earlier in self.path_to(node)[1:]]
            for token, probability in _likeliest(lanes.logits(0), repeats.after(drafted), width):
                heapq.heappush(open_ends, (cost - math.log(probability), node, token))

        if size:
            branch(0, 0.0)
        while len(self.tokens) <= size:
            cost, parent, token = heapq.heappop(open_ends)
            node = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.children.append({})
            self.children[parent][token] = node
            self.states.append(None)
            if node < size:  # the last one's children would come too late
                self.go_to(node)
                branch(node, cost)

    def go_to(self, node: int) -> None:
        """Put the student's state behind a node."""
        if self.states[node] is None:
            self.lanes.restore(self.states[self.parents[node]])
            self.lanes.read([self.tokens[node]])
            self.states[node] = self.lanes.state()
        else:
            self.lanes.restore(self.states[node])

    def path_to(self, node: int) -> list[int]:
        """Nodes from 0 to this one."""
        path = [node]
        while path[-1]:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def inputs(self, before: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the teacher reads after `before` positions: ids and, unless the tree is a chain, places and a mask."""
        inputs = {"input_ids": torch.tensor([self.tokens], device=like.device)}
        if self.parents == list(range(-1, len(self.parents) - 1)):
            return inputs
        paths, T = [self.path_to(node) for node in range(len(self.tokens))], len(self.tokens)
        seen_TS = torch.zeros(T, before + T, dtype=torch.bool)
        seen_TS[:, :before] = True
        for node, path in enumerate(paths):
            seen_TS[node, [before + ancestor for ancestor in path]] = True
        mask_11TS = torch.zeros(1, 1, T, before + T, dtype=like.dtype).masked_fill(
            ~seen_TS, torch.finfo(like.dtype).min
        )
        places_1T = torch.tensor([[before + len(path) - 1 for path in paths]])
        return {**inputs, "attention_mask": mask_11TS.to(like.device), "position_ids": places_1T.to(like.device)}


def _likeliest(logits_V: np.ndarray, repeated: Mapping[int, float], width: int) -> list[tuple[int, float]]:
    """The `width` likeliest tokens with their probabilities: those `repeated`, and for the rest the student's."""
    probs_V = np.exp(logits_V - logits_V.max())
    probs_V *= (1 - sum(repeated.values())) / probs_V.sum()
    for token, probability in repeated.items():
        probs_V[token] += probability
    tokens = [int(probs_V.argmax())] if width == 1 else np.argpartition(probs_V, -width)[-width:].tolist()
    return [(token, float(probs_V[token])) for token in tokens if probs_V[token] > 0]


@torch.inference_mode()
def speculate(
    teacher: Any,
    drafter: Any,
    prompt: Sequence[int],
    new_tokens: int,
    size: int,
    sampler: Sampler,
    width: int = 1,
    *,
    student_alone: bool = False,
) -> tuple[list[int], Count]:
    """`new_tokens` tokens of the teacher after a prompt of ids, drafted `size` at a time (0: none are).

    `teacher` is a causal model of transformers, `drafter` a Decoder or TorchDecoder, `sampler` what chooses from the
    teacher's logits, `width` the number of continuations considered of each token: 1 drafts chains, more trees.
    `student_alone`: the text's own repetitions are not drafted.
    """
    cache, lanes, count = DynamicCache(config=teacher.config), drafter.lanes(1), Count()
    repeats, nothing = Repeats(prompt), Repeats()
    like = next(teacher.parameters())
    *before, last = prompt  # the last token written is read at the beginning of the next round
    if before:
        teacher(torch.tensor([before], device=like.device), past_key_values=cache, logits_to_keep=1)
    for token in before:
        lanes.read([token])
    written: list[int] = []
    while len(written) < new_tokens:
        draft = Draft(
            lanes, last, min(size, new_tokens - len(written) - 1), width, nothing if student_alone else repeats
        )
        seen = cache.get_seq_length()
        logits_TV = teacher(**draft.inputs(seen, like), past_key_values=cache).logits[0, :, : drafter.vocab_size]
        logits_TV = logits_TV.float().cpu().numpy()
        node, last = 0, sampler.choose(logits_TV[0])
        while last in draft.children[node]:
            node = draft.children[node][last]
            last = sampler.choose(logits_TV[node])
        path = draft.path_to(node)
        _keep(cache, seen, path)
        draft.go_to(node)
        new = [*(draft.tokens[kept] for kept in path[1:]), last]
        written += new
        repeats.read(new)
        count += Count(1, len(draft.tokens) - 1, len(path) - 1)
    return written, count


def _keep(cache: DynamicCache, before: int, path: Sequence[int]) -> None:
    """Of the positions read last, leave in the teacher's cache those on the path."""
    if path == list(range(len(path))):
        cache.crop(before + len(path) - cache.get_seq_length())
        return
    kept = torch.tensor([*range(before), *(before + node for node in path)])
    for layer in cast(Any, cache.layers):
        layer.keys, layer.values = (part.index_select(2, kept.to(part.device)) for part in (layer.keys, layer.values))


class PackedLinear(nn.Module):
    """A linear layer at rest, its weight laid out as oneDNN reads it fastest for a few rows at a time.

    torch lays a weight out anew, or multiplies it as it lies, in every call; with a few rows that takes longer than the
    products. The operators are those that torch.compile puts in the place of a frozen layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], ""))


def packed(model: Any) -> Any:
    """The same model with packed linear layers, for inference; all other weights are shared with the given one. Where
    oneDNN has no arithmetic for its type or device, the model itself."""
    like = next(model.parameters())
    bf16 = like.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if (
        like.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not (like.dtype == torch.float32 or bf16)
    ):
        return model
    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    return model


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
    teacher: LanguageModel,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    chains: Sequence[int],
    trees: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """Rows by name: the teacher alone, then with each kind of draft. All write the same prompts' greedy continuations,
    in turns, so that a busy machine slows all alike."""

    ways: dict[str, Callable[[Sequence[int], int], tuple[list[int], Count]]] = {
        "teacher alone": lambda prompt, tokens: (teacher_alone(teacher.model, prompt, tokens), Count())
    }

    reader = packed(teacher.model)

    def drafted(size: int, width: int, **options: bool) -> Callable[[Sequence[int], int], tuple[list[int], Count]]:
        return lambda prompt, tokens: speculate(reader, drafter, prompt, tokens, size, Sampler(0), width, **options)

    ways["teacher alone, this loop"] = drafted(0, 1)
    ways |= {f"chains of {size}": drafted(size, 1) for size in chains}
    for size in trees:
        ways[f"trees of {size}, student alone"] = drafted(size, WIDTH, student_alone=True)
        ways[f"trees of {size}"] = drafted(size, WIDTH)
    if isinstance(drafter, TorchDecoder):
        options = {"assistant_model": drafter.student}
        ways["generate(assistant_model)"] = lambda prompt, tokens: (
            teacher_alone(teacher.model, prompt, tokens, **options),
            Count(),
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    totals = {name: Count() for name in ways}
    same = {name: 0 for name in ways}
    for way in ways.values():
        way(prompts[0], 4)  # warms up
    for prompt in prompts:
        expected: list[int] = []
        for name, way in ways.items():
            began = time.perf_counter()
            written, count = way(prompt, new_tokens)
            seconds[name].append(time.perf_counter() - began)
            expected = expected or written
            same[name] += _shared(expected, written)
            totals[name] += count
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
    parser.add_argument("--chains", type=int, nargs="*", default=list(CHAINS), help="tokens of a chain, each tried")
    parser.add_argument("--trees", type=int, nargs="*", default=list(TREES), help="tokens of a tree, each tried")
    parser.add_argument("--prompt", action="append", help="text to continue; several are averaged over")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the teacher")
    parser.add_argument("--runtime", choices=["onnx", "torch"], default="onnx", help="of the student")
    options = parser.parse_args(arguments)
    return guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    rows = compare(options)
    table = [
        {
            "decoding": name,
            "tok/s": f"{row['tokens_per_second']:.1f}",
            "speed-up": f"{row['speedup']:.2f}",
            "acceptance": f"{row['acceptance_rate']:.3f}",
            "accepted length": f"{row['accepted_length']:.2f}",
            "same tokens": f"{row['identical_tokens']:.3f}",
        }
        for name, row in rows.items()
    ]
    title = f"{options.student} drafts for {options.teacher}, {options.new_tokens} greedy tokens a prompt"
    print_table(title, table)
    print_json(rows)


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Load both models as the options say, check that they belong together, and measure."""
    if min(*options.chains, *options.trees, options.new_tokens, 1) < 1:
        raise UserError("--chains, --trees and --new-tokens must be at least 1, found less")
    torch.set_num_threads(available_cores())
    teacher = load_language_model(options.teacher, device=torch.device("cpu"), dtype=options.dtype, role="teacher")
    folder = find_student(options.student)
    drafter: Any = TorchDecoder(folder) if options.runtime == "torch" else load_decoder(folder, threads=1)
    rows = teacher.model.get_output_embeddings().weight.shape[0]  # some are padding
    belongs = "a student drafts for the teacher that it was distilled from, with the same tokenizer"
    if not teacher.vocab_size <= drafter.vocab_size <= rows:
        sizes = f"{options.student} has {drafter.vocab_size} tokens and {options.teacher} {teacher.vocab_size}"
        raise UserError(f"{sizes}: {belongs}")
    ours, theirs = load_tokenizer(folder).get_vocab(), teacher.tokenizer.get_vocab()
    if others := sorted({token for token, _ in ours.items() ^ theirs.items()}):
        ids = f"{ours.get(others[0])} of {options.student} and {theirs.get(others[0])} of {options.teacher}"
        raise UserError(f"token {others[0]!r} is {ids}, and {len(others) - 1} more differ: {belongs}")
    texts = options.prompt or PROMPTS
    if not all(texts):
        raise UserError("--prompt: expected at least one token, found none; give some text")
    start = end_tokens(folder)[:1]  # as documents began when the student was distilled
    prompts = [[*start, *teacher.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    return measure(teacher, drafter, prompts, options.new_tokens, options.chains, options.trees)


if __name__ == "__main__":
    sys.exit(main())
