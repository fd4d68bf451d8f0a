"""Labelled text: what a classifier is trained, chosen and tested on, and how it is cut into tokens and batches.

Texts are divided by the hash of their content, as `distill/corpus.py` divides documents. What has no label, or none
that is asked for, is unlabelled text: it is trained on, with the teacher's word for it, and on no other side.

Legend: N texts, B texts of a batch, T tokens of its longest, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.config import ClassificationConfig, CorpusConfig, UserError
from distill.corpus import side_of
from distill.documents import LabelledSource, open_labelled

NO_LABEL = -100  # in place of a class id, as torch's losses have it
MOST_CLASSES = 1000  # more of them are no classes but a column of something else
WINDOW = 16  # batches of an epoch among which texts are sorted by length, so that a batch has little padding


@dataclass(frozen=True)
class Texts:
    """Texts and their class ids (N,), NO_LABEL where there is none."""

    texts: list[str]
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class LabelledText:
    """A labelled text, divided; unlabelled texts stand behind the labelled ones of `train`."""

    classes: tuple[str, ...]
    train: Texts
    validation: Texts
    test: Texts
    fingerprint: str  # hex; changes with text, labels and division

    @property
    def all(self) -> list[str]:
        """Every text: those of train, then validation, then test."""
        return [*self.train.texts, *self.validation.texts, *self.test.texts]

    @property
    def places(self) -> dict[str, slice]:
        """Where each side lies in `all`."""
        train, validation = len(self.train), len(self.train) + len(self.validation)
        return {"train": slice(train), "validation": slice(train, validation), "test": slice(validation, None)}


def load_labelled(corpus: CorpusConfig, config: ClassificationConfig) -> LabelledText:
    """Read and divide a recipe's text.

    Raises UserError for a text or a label's field that does not exist, for fewer than two classes, and for a side
    without labelled texts.
    """
    source = open_labelled(corpus, config.label_field)
    classes = config.labels or source.classes
    rows = _chosen(list(_rows(source, corpus.max_documents)), config.max_texts)
    counts = Counter(label for _, label in rows if label is not None)
    numbers = all(name.isdecimal() for name in counts)
    classes = classes or tuple(sorted(counts, key=int) if numbers else sorted(counts))
    _check_classes(classes, counts, config)
    ids = {name: number for number, name in enumerate(classes)}

    sides: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": [], "unlabelled": []}
    for text, label in rows:
        number = NO_LABEL if label is None else ids.get(label, NO_LABEL)
        sides["unlabelled" if number == NO_LABEL else side_of(text, corpus)].append((text, number))
    digests = [source.digest]
    if config.test_split is not None:
        if not source.from_hub:
            raise UserError(
                f"classification.test_split: {config.test_split}: data sets of the hub have splits, and corpus.source "
                f"{corpus.source} is files; remove it, and corpus.test_fraction is taken for the test"
            )
        sides["train"] += sides["test"]
        other = open_labelled(corpus.model_copy(update={"split": config.test_split}), config.label_field)
        sides["test"] = [(text, ids[label]) for text, label in _rows(other, None) if label in ids]
        digests.append(other.digest)
    # A text that stands there twice, once without a label, or in both splits, is not trained on.
    for side, seen_in in (("train", ("test",)), ("unlabelled", ("validation", "test"))):
        seen = {text for other in seen_in for text, _ in sides[other]}
        sides[side] = [row for row in sides[side] if row[0] not in seen]
    for side, least in (("train", 1), ("validation", 1), ("test", 2)):
        if len(sides[side]) < least:
            raise UserError(
                f"corpus.source: {corpus.source}: {len(sides[side]) or 'no'} labelled text for {side} among "
                f"{sum(counts.values()):,}; expected more texts, or other corpus.validation_fraction and "
                "corpus.test_fraction"
            )
    sides["train"] += sides["unlabelled"]
    of_config = {"text_field", "max_documents", "validation_fraction", "test_fraction"}
    ingredients = [digests, classes, config.label_field, config.max_texts, corpus.model_dump(include=of_config)]
    fingerprint = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]
    train, validation, test = (_texts(sides[side]) for side in ("train", "validation", "test"))
    return LabelledText(classes, train, validation, test, fingerprint)


def _texts(rows: Sequence[tuple[str, int]]) -> Texts:
    return Texts([text for text, _ in rows], np.array([label for _, label in rows], dtype=np.int64))


def _rows(source: LabelledSource, most: int | None) -> Iterator[tuple[str, str | None]]:
    """Texts with more than white space, each with the name of its class or None."""
    found = 0
    for text, label in source.rows:
        if not isinstance(text, str) or not text.strip() or found == most:
            continue
        found += 1
        yield text.encode("utf-8", "replace").decode("utf-8"), _name(label, source.classes)


def _chosen(rows: list[tuple[str, str | None]], most: int | None) -> list[tuple[str, str | None]]:
    """At most so many of them, in their order; a text that stays stays with more. Not by the hash of `side_of`."""
    if most is None or len(rows) <= most:
        return rows
    digests = [hashlib.blake2b(text.encode(), digest_size=8, person=b"chosen").digest() for text, _ in rows]
    return [rows[number] for number in sorted(sorted(range(len(rows)), key=digests.__getitem__)[:most])]


def _name(label: Any, classes: tuple[str, ...] | None) -> str | None:
    if isinstance(label, str):
        return label
    if not isinstance(label, int):
        return None
    if classes is None:
        return str(label)
    return classes[label] if 0 <= label < len(classes) else None


def _check_classes(classes: tuple[str, ...], counts: Counter[str], config: ClassificationConfig) -> None:
    where = f"classification.label_field: {config.label_field}"
    if len(classes) < 2:
        found = f"found {classes[0]!r} alone" if classes else "found no text or whole number in it"
        raise UserError(f"{where}: expected two classes at least, {found}")
    if len(classes) > MOST_CLASSES:
        raise UserError(f"{where}: expected at most {MOST_CLASSES} classes, found {len(classes):,}; is it the labels?")
    if len(set(classes)) != len(classes):
        raise UserError(f"classification.labels: expected names that differ, found {', '.join(classes)}")
    if missing := [name for name in classes if not counts[name]]:
        found = ", ".join(name for name, _ in counts.most_common(12)) or "none"
        raise UserError(f"{where}: no text has the label {missing[0]!r}; labels found: {found}")


@dataclass(frozen=True)
class Tokens:
    """Texts in one tokenizer's tokens."""

    ids: list[np.ndarray]  # (T,) each
    padding: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths_N(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def batch(self, rows_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T), padded on the right."""
        T = max(len(self.ids[row]) for row in rows_B)
        ids_BT = torch.full((len(rows_B), T), self.padding)
        mask_BT = torch.zeros(len(rows_B), T, dtype=torch.int64)
        for b, row in enumerate(rows_B):
            ids = self.ids[row]
            ids_BT[b, : len(ids)] = torch.from_numpy(ids)
            mask_BT[b, : len(ids)] = 1
        return ids_BT, mask_BT

    def in_batches(self, batch_tokens: int) -> Iterator[np.ndarray]:
        """All rows once, the longest first, in batches of about so many tokens, padding included."""
        order_N = np.argsort(-self.lengths_N, kind="stable")
        while len(order_N):
            size = max(1, batch_tokens // len(self.ids[order_N[0]]))
            yield order_N[:size]
            order_N = order_N[size:]


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """Texts in tokens, as the tokenizer itself begins and ends them, cut to `max_length`."""
    found = tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)["input_ids"] if texts else []
    lone = [tokenizer.pad_token_id]  # of a text that comes to no token at all
    return Tokens([np.array(ids or lone, dtype=np.int64) for ids in found], tokenizer.pad_token_id)


def epoch_batches(lengths_N: np.ndarray, batch_size: int, epoch: int, seed: int) -> np.ndarray:
    """Rows of an epoch's batches, (steps, batch_size): shuffled, then sorted by length among `WINDOW` batches.

    Texts that fill no batch wait for another epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order_N = rng.permutation(len(lengths_N))
    order_N = order_N[: len(order_N) // batch_size * batch_size]
    windows = [order_N[start : start + WINDOW * batch_size] for start in range(0, len(order_N), WINDOW * batch_size)]
    order_N = np.concatenate([window[np.argsort(lengths_N[window], kind="stable")] for window in windows])
    return rng.permutation(order_N.reshape(-1, batch_size))
