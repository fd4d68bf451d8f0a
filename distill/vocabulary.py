"""A vocabulary cut down to what a text needs.

Half of a small student is its embedding and head, and every step's cost is the head's; a text of a million words
uses a part of a vocabulary that was made for the whole web. A byte-level BPE tokenizer can lose tokens and still
encode every text: a lost token falls apart into the pieces that it was merged from, at worst into bytes. So what is
kept are the tokens that occur often enough, the pieces that they are merged from, all single bytes, and the special
tokens. With `min_count` 1 the training text keeps its tokens exactly: every merge that it uses is still there, in the
same order. Other texts may be cut into more tokens than before, which perplexity per byte accounts for.

Legend: V tokens kept, in the order of the teacher's ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.config import UserError

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Trimmed:
    """The smaller tokenizer; `teacher_ids_V[i]` is the teacher's id of its token i."""

    tokenizer: PreTrainedTokenizerBase
    teacher_ids_V: np.ndarray
    counts: dict[str, int]  # tokens of the teacher, kept and cut ones, and what they are kept for


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, occurrences: np.ndarray, min_count: int) -> Trimmed:
    """Keep tokens with at least `min_count` `occurrences` (one number for each id) and what encoding needs.

    UserError for a tokenizer that is no byte-level BPE.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = state.get("model", {})
    alphabet = set(ByteLevel.alphabet()) if is_byte_level(state) else set()
    if model.get("byte_fallback"):
        alphabet |= {f"<0x{byte:02X}>" for byte in range(256)}
    if model.get("type") != "BPE" or not alphabet:
        raise UserError(
            "student.vocabulary_min_count: expected a byte-level BPE tokenizer, which can spell what is cut, found "
            f"{model.get('type') or type(tokenizer).__name__}; remove student.vocabulary_min_count"
        )
    ids: dict[str, int] = model["vocab"]
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    occurring = {token for token, index in ids.items() if index < len(occurrences) and occurrences[index] >= min_count}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    kept = _with_parts(occurring, merges) | (alphabet & ids.keys()) | (added.keys() & ids.keys())
    if model.get("unk_token"):
        kept.add(model["unk_token"])

    teacher_ids = sorted({ids[token] for token in kept} | set(added.values()))
    number = {teacher_id: own for own, teacher_id in enumerate(teacher_ids)}
    model["vocab"] = {token: number[index] for token, index in ids.items() if token in kept}
    model["merges"] = [[left, right] for left, right in merges if {left, right, left + right} <= kept]
    for token in state["added_tokens"]:
        token["id"] = number[token["id"]]
    _renumber(state.get("post_processor"), number)
    smaller = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **{name: str(token) for name in SPECIAL if (token := getattr(tokenizer, name, None)) is not None},
    )
    counts = {
        "teacher_tokens": len(tokenizer.get_vocab()),
        "kept_tokens": len(teacher_ids),
        "cut_tokens": len(tokenizer.get_vocab()) - len(teacher_ids),
        "kept_as_occurring": len(occurring),
        "kept_as_parts_bytes_or_special": len(teacher_ids) - len(occurring),
    }
    return Trimmed(smaller, np.array(teacher_ids), counts)


def _with_parts(tokens: set[str], merges: list[tuple[str, str]]) -> set[str]:
    """The tokens and all that they are merged from, by any of the merges that make them."""
    parts: dict[str, list[str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, []).extend((left, right))
    found, open_ends = set(tokens), list(tokens)
    while open_ends:
        for part in parts.get(open_ends.pop(), ()):
            if part not in found:
                found.add(part)
                open_ends.append(part)
    return found


def is_byte_level(state: dict[str, Any]) -> bool:
    """Whether the tokens of a tokenizer, given as its JSON, are bytes written as characters."""
    return any(part.get("type") == "ByteLevel" for part in _components(state.get("pre_tokenizer")))


def _components(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer, and those of a sequence."""
    if component:
        yield component
        for part in component.get("pretokenizers", component.get("processors", ())):
            yield from _components(part)


def _renumber(post_processor: dict[str, Any] | None, number: dict[int, int]) -> None:
    """Put the new ids into what adds special tokens."""
    for part in _components(post_processor):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [number[index] for index in special["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], number[part[name][1]]]
