"""Which bytes of a text its tokens stand for.

Two tokenizers cut the same bytes at different places. What they have in common are those bytes, so every token of a
vocabulary is taken as the bytes that it spells, and its place in a document as a span of them. That is possible for
byte-level BPE, whose tokens are bytes in disguise, and for BPE with bytes to fall back on. Special tokens spell
nothing.

Legend: V tokens of a vocabulary, N of a document.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from distill.config import UserError
from distill.corpus import Encoder, Split
from distill.vocabulary import is_byte_level

COMPARED = 1000  # documents of a side whose bytes are compared one by one; of all, their number is


def alphabet() -> dict[str, int]:
    """The characters of byte-level BPE and their bytes: printable ones stand for themselves, others begin at 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert found.keys() == set(ByteLevel.alphabet())
    return found


class Spelling:
    """The bytes of each token of a tokenizer, and the tokens of any bytes."""

    def __init__(self, tokenizer: Any, field: str) -> None:
        """UserError, naming the recipe's `field`, for a tokenizer whose tokens do not stand for bytes."""
        state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
        model = state.get("model", {})
        self.byte_level = is_byte_level(state)
        if model.get("type") != "BPE" or not (self.byte_level or model.get("byte_fallback")):
            raise UserError(
                f"{field}: expected a tokenizer that can spell any bytes (byte-level BPE, or BPE with byte_fallback), "
                f"found {model.get('type') or type(tokenizer).__name__}; others cannot be aligned"
            )
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = {token["content"]: int(token["id"]) for token in state["added_tokens"] if not token["special"]}
        self.specials = {token["content"]: int(token["id"]) for token in state["added_tokens"] if token["special"]}
        self.bytes_V = [b""] * (max(vocabulary.values()) + 1)
        self._bytes = alphabet()
        self._characters = {byte: character for character, byte in self._bytes.items()}
        for token, index in vocabulary.items():
            if token not in self.specials:
                self.bytes_V[index] = token.encode() if token in added else self._spelled(token)
        self.lengths_V = np.array([len(spelled) for spelled in self.bytes_V], dtype=np.int64)
        self._backend = cast(Any, Encoder(tokenizer, -1).backend)
        self._model = self._backend.model
        # Some tokenizers begin every text with a space that it does not have.
        self.lead = len(b"".join(self.bytes_V[index] for index in self._encode("a"))) - 1
        self._pieces: dict[bytes, list[int]] = {}

    def _spelled(self, token: str) -> bytes:
        if self.byte_level:
            return bytes(self._bytes[character] for character in token)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def pieces(self, fragment: bytes) -> list[int]:
        """The tokens of some bytes out of the middle of a text, which need not be whole characters."""
        if (found := self._pieces.get(fragment)) is None:
            try:
                found = self._encode(fragment.decode()) if not self.lead else self._cut(fragment)
            except UnicodeDecodeError:
                found = self._cut(fragment)
            self._pieces[fragment] = found
        return found

    def learn(self, fragments: Iterable[bytes]) -> None:
        """Find the pieces of many fragments at once, on all cores."""
        texts = {}
        for fragment in fragments:
            if fragment not in self._pieces and not self.lead:
                try:
                    texts[fragment] = fragment.decode()
                except UnicodeDecodeError:
                    continue
        encodings = self._backend.encode_batch_fast(list(texts.values()), add_special_tokens=False)
        self._pieces |= {fragment: encoding.ids for fragment, encoding in zip(texts, encodings, strict=True)}

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _cut(self, fragment: bytes) -> list[int]:
        """As `pieces`, by the merges alone."""
        if self.byte_level:
            text = "".join(self._characters[byte] for byte in fragment)
        else:
            text = fragment.decode(errors="surrogateescape").replace(" ", "▁")
            if any("\udc80" <= character <= "\udcff" for character in text):
                return [self._model.token_to_id(f"<0x{byte:02X}>") for byte in fragment]
        return [token.id for token in self._model.tokenize(text)]

    @cached_property
    def in_order(self) -> tuple[list[bytes], list[int]]:
        """All spellings in ascending order, and their tokens."""
        pairs = sorted((spelled, index) for index, spelled in enumerate(self.bytes_V) if spelled)
        return [spelled for spelled, _ in pairs], [index for _, index in pairs]

    def beginning_with(self, prefix: bytes, and_itself: bool = False) -> list[int]:
        """The tokens whose bytes begin with a prefix and go on after it, or also those that end with it."""
        spellings, ids = self.in_order
        first = bisect_left(spellings, prefix if and_itself else prefix + b"\0")
        last = bisect_left(spellings, _after(prefix)) if prefix else len(spellings)
        return ids[first:last]

    def text(self, tokens_N: np.ndarray) -> bytes:
        """What tokens spell."""
        return b"".join(self.bytes_V[index] for index in tokens_N.tolist())


def _after(prefix: bytes) -> bytes:
    """The first bytes in ascending order that do not begin with a prefix any more."""
    while prefix and prefix[-1] == 255:
        prefix = prefix[:-1]
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else b"\xff" * 64


def check_spelling(spelling: Spelling, split: Split, field: str) -> None:
    """UserError where the tokens of a document do not stand for as many bytes as its text has."""
    for number in range(len(split)):
        tokens_N = split.document(number)
        found, expected = int(spelling.lengths_V[tokens_N].sum()), int(split.utf8_bytes[number]) + spelling.lead
        if found != expected:
            raise UserError(
                f"{field}: expected a tokenizer that keeps every byte of the text, found one that makes {found} of the "
                f"{expected} of document {number} ({spelling.text(tokens_N)[:60]!r}); choose another"
            )
    split.forget()


def check_same_text(ours: tuple[Spelling, Split], theirs: tuple[Spelling, Split], field: str) -> None:
    """UserError where two tokenisations of the same documents spell different bytes."""
    (our_spelling, our_split), (their_spelling, their_split) = ours, theirs
    for number in range(min(COMPARED, len(our_split))):
        our = our_spelling.text(our_split.document(number))[our_spelling.lead :]
        their = their_spelling.text(their_split.document(number))[their_spelling.lead :]
        if our != their:
            raise UserError(
                f"{field}: expected two tokenizers that keep the text as it is, found that one changes document "
                f"{number}: {our[:60]!r} and {their[:60]!r}; choose another"
            )
