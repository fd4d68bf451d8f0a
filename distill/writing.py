"""The teacher writes: many documents side by side, one token of each at a time (Kim and Rush 2016, arXiv 1606.07947).

A row of the batch is a document. It is begun with its prompt, read token by token like all the rest, and once it has
ended the next document takes its row, so the batch stays full until the last ones. Keys and values lie in one slab of
memory for all rows, which are at different positions of their documents but write to the same place of the slab; what
a row finds there from before its document began is masked. When the slab is full, what no row needs any more is cut
off its front. A slab is written in place; transformers' own `DynamicCache` copies all keys and values at every token.

Each document draws from a generator of its own, seeded by `writing.seed` and its number. The logits that it draws from
depend, by rounding, on the batch around it; so the unit of work is a shard of documents, which one process writes from
the beginning, and what it writes depends neither on the number of processes nor on having been stopped.

The states that the teacher computes while it writes are not kept as cached targets: the text goes through the tokenizer
again before training, as any text does, a block sees less context than the document had, and the cache's rows are
blocks. Reading the text once more is a fraction of the time that writing it took.

Legend: B rows, S places of the slab, V tokens, d width of the teacher, N tokens of a document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from distill.checkpoint import locked
from distill.config import CorpusConfig, Recipe, UserError, WritingConfig
from distill.corpus import Corpus, cache_root, hash_tokenizer, separator_id
from distill.sampling import Sampler
from distill.teacher import LanguageModel
from distill.written import MANIFEST, TEXT_FIELD, WrittenDocument, WrittenText

BATCHES_PER_SHARD = 4  # rows run dry at the end of a shard, and one that was begun is lost when the process is stopped
SLAB = 1.25  # places in the slab for each token of the longest document
Prompts = Mapping[int, list[int]]  # the tokens that each document begins with, the separator first


class SlabLayer(DynamicLayer):
    """One layer's keys and values (B, heads, S, width), of which those before `length` are filled."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places, self.length = places, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for all places."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.slabs = [
            part.new_empty(*part.shape[:2], self.places, part.shape[3]) for part in (key_states, value_states)
        ]
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write behind what is there; returns all that is filled, keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        for slab, new in zip(self.slabs, (key_states, value_states), strict=True):
            slab[:, :, self.length : end] = new
        self.length = end
        return self._show()

    def drop_first(self, places: int) -> None:
        """Forget the first places and move the others there."""
        for slab in self.slabs:
            slab[:, :, : self.length - places] = slab[:, :, places : self.length].clone()
        self.length -= places
        self._show()

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.slabs = [slab[rows] for slab in self.slabs]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (slab[:, :, : self.length] for slab in self.slabs)
        return self.keys, self.values


def _slab(places: int) -> Any:
    """A cache whose layers are made as the teacher writes to them."""
    layer: Any = partial(SlabLayer, places)
    return Cache(layer_class_to_replicate=layer)


@dataclass
class _Row:
    """A document that is being written, and the place of the slab at which it began."""

    number: int
    prompt: int  # tokens given, the separator included
    ids: list[int]
    sampler: Sampler
    start: int
    read: int = field(default=0)  # tokens that the teacher has been given


class TeacherWriter:
    """Writes documents with a teacher whose weights this process holds whole."""

    def __init__(self, teacher: LanguageModel, config: WritingConfig, ends: frozenset[int]) -> None:
        """`ends`: tokens that end a document. UserError for a teacher that does not go on from keys and values."""
        self.teacher, self.config, self.ends = teacher, config, ends
        if teacher.lockstep:
            raise UserError("writing: expected a teacher that each process holds whole, found one in shards")
        if config.max_tokens > teacher.longest_window:
            raise UserError(
                f"writing.max_tokens: {config.max_tokens}, but the teacher {teacher.name} reads at most "
                f"{teacher.longest_window} tokens"
            )
        self._check()

    @torch.inference_mode()
    def write(self, prompts: Prompts) -> Iterator[WrittenDocument]:
        """The documents that go on from these prompts, as they end."""
        config, waiting = self.config, deque(prompts.items())
        places = int(SLAB * config.max_tokens) + 2
        cache = _slab(places)
        rows = [self._row(*waiting.popleft(), start=0) for _ in range(min(config.batch_size, len(waiting)))]
        filled = 0
        while rows:
            if filled == places:
                dropped = min(row.start for row in rows)
                for layer in cache.layers:
                    layer.drop_first(dropped)
                for row in rows:
                    row.start -= dropped
                filled -= dropped
            hidden_Bd = self._read(rows, filled, cache)
            filled += 1
            for row in rows:
                row.read += 1
            choosing = [place for place, row in enumerate(rows) if row.read == len(row.ids)]
            logits_bV = self.teacher.head.logits(hidden_Bd[choosing]).cpu().numpy()
            over = []
            for place, logits_V in zip(choosing, logits_bV, strict=True):
                row = rows[place]
                row.ids.append(row.sampler.choose(logits_V))
                if ended := row.ids[-1] in self.ends:
                    row.ids.pop()
                if ended or len(row.ids) - 1 == config.max_tokens:
                    over.append(place)
                    yield WrittenDocument(row.number, row.ids[1:], row.prompt - 1, ended)
            for place in over:
                if waiting:
                    rows[place] = self._row(*waiting.popleft(), start=filled)
                    over = [other for other in over if other != place]
            if over:
                kept = [place for place in range(len(rows)) if place not in over]
                rows = [rows[place] for place in kept]
                for layer in cache.layers:
                    layer.keep_rows(torch.tensor(kept, device=layer.device, dtype=torch.long))

    def _row(self, number: int, ids: list[int], start: int) -> _Row:
        config = self.config
        sampler = Sampler(config.temperature, config.top_k, config.top_p, seed=(config.seed, number))
        return _Row(number, len(ids), list(ids), sampler, start)

    def _read(self, rows: list[_Row], filled: int, cache: Cache) -> Tensor:
        """The next token of each row; final hidden states (B, d)."""
        start_B1 = torch.tensor([[row.start] for row in rows])
        ids_B1 = torch.tensor([[row.ids[row.read]] for row in rows])
        seen_BS = torch.arange(filled + 1) >= start_B1
        return self.teacher.read_on(ids_B1, filled - start_B1, seen_BS, cache)

    @torch.inference_mode()
    def _check(self) -> None:
        """Two rows, one taken over by another document on the way, must come out as each alone without a cache."""
        cache = _slab(8)
        ids = [index % self.teacher.vocab_size for index in (3, 1, 4, 1, 5)]
        rows = [_Row(n, 1, ids[n:], Sampler(0), start=0) for n in range(2)]
        try:
            for filled in range(5):
                if filled == 2:
                    rows[1] = _Row(2, 1, ids, Sampler(0), start=filled)
                for row in rows:
                    row.read = filled - row.start
                hidden_Bd = self._read(rows, filled, cache)
            alone = [self.teacher.hidden(torch.tensor([ids[: 5 - row.start]]))[0, -1] for row in rows]
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"teacher {self.teacher.name}: expected one that goes on from keys and values, to write text: {reason}"
            ) from None
        found, expected = (self.teacher.head.logits(states) for states in (hidden_Bd, torch.stack(alone)))
        if not (found - expected).norm() <= 16 * torch.finfo(self.teacher.model.dtype).eps * expected.norm():
            raise UserError(
                f"teacher {self.teacher.name}: read token by token in a batch it says something else than at once, so "
                "no text is written with it; try another teacher.attn_implementation or teacher.dtype=fp32"
            )


def written_folder(recipe: Recipe) -> Path:
    """Where the text of a recipe with `writing` lies; it follows from the recipe alone."""
    config, teacher = recipe.writing, recipe.teacher
    assert config is not None
    if config.folder:
        return config.folder
    settings = {
        "writing": config.model_dump(exclude={"folder"}),
        "teacher": teacher.model_dump(include={"model", "revision", "dtype"}),
        "corpus": recipe.corpus.model_dump(mode="json", exclude={"cache_dir"}) if config.prompt_tokens else None,
        "separator": recipe.corpus.separator,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    return cache_root(recipe.corpus.cache_dir) / "written" / digest


def is_written(recipe: Recipe) -> bool:
    """Whether all of a recipe's text is there."""
    folder = written_folder(recipe)
    return (folder / MANIFEST).is_file() and not WrittenText(folder).missing()


def text_of(recipe: Recipe) -> CorpusConfig:
    """The text that a recipe trains and is validated on: `corpus.source`, or what the teacher wrote in its place."""
    if recipe.corpus.source or recipe.writing is None:
        return recipe.corpus
    return recipe.corpus.model_copy(update={"source": str(written_folder(recipe)), "text_field": TEXT_FIELD})


def write_text(recipe: Recipe, teacher: LanguageModel, corpus: Corpus | None, accelerator: Accelerator) -> WrittenText:
    """The recipe's written text, complete: validated, and written by all processes as far as it is missing or damaged.

    Collective. `teacher` and `corpus` are those of the whole vocabulary; the corpus gives the prompts, None where there
    are none. UserError names what does not match, with both values.
    """
    config, main = recipe.writing, accelerator.is_main_process
    assert config is not None
    separator = separator_id(teacher.tokenizer, recipe.corpus.separator)
    identity = {
        "teacher_weights": teacher.weights_hash,
        "tokenizer": hash_tokenizer(teacher.tokenizer),
        "separator_id": separator,
        "prompts": corpus.fingerprint if corpus and config.prompt_tokens else None,
        **config.model_dump(exclude={"folder"}),
    }
    folder = written_folder(recipe)
    with locked(folder, "writing.folder") if main else contextlib.nullcontext():
        if main:
            WrittenText.claim(folder, identity, teacher.name, config.documents, BATCHES_PER_SHARD * config.batch_size)
        accelerator.wait_for_everyone()
        written = WrittenText(folder)
        missing = written.missing()
        accelerator.wait_for_everyone()  # nobody writes while another one still looks
        if missing:
            writer = TeacherWriter(teacher, config, ends_of(teacher, separator))
            _write_missing(written, missing, writer, separator, corpus, accelerator)
        accelerator.wait_for_everyone()
    return written


def ends_of(teacher: LanguageModel, separator: int) -> frozenset[int]:
    """The tokens that end a document: the separator, and what tokenizer and model call the end of a text."""
    ends: set[int | None] = {separator, teacher.tokenizer.eos_token_id}
    for config in (teacher.model.config, teacher.model.generation_config):
        found = getattr(config, "eos_token_id", None)
        ends |= set(found) if isinstance(found, list) else {found}
    return frozenset(end for end in ends if end is not None)


def _write_missing(
    written: WrittenText,
    missing: list[int],
    writer: TeacherWriter,
    separator: int,
    corpus: Corpus | None,
    accelerator: Accelerator,
) -> None:
    """Write this process's share of the shards."""
    rank, world, tokenizer = accelerator.process_index, accelerator.num_processes, writer.teacher.tokenizer
    bar = tqdm(
        total=sum(len(written.shards[number]) for number in missing),
        desc="the teacher writes",
        unit="doc",
        disable=not accelerator.is_main_process,
    )
    began, tokens = time.perf_counter(), 0
    with bar:
        for number in missing[rank::world]:
            shard_began = time.perf_counter()
            prompts = {index: [separator, *_prompt(corpus, index, writer.config)] for index in written.shards[number]}
            documents = []
            for document in writer.write(prompts):
                documents.append(document)
                tokens += len(document.ids) - document.prompt
                bar.set_postfix_str(f"{world * tokens / (time.perf_counter() - began):,.0f} tok/s", refresh=False)
                bar.update(min(world, bar.total - bar.n))
            documents.sort(key=lambda document: document.number)
            texts = [_text(tokenizer, document) for document in documents]
            written.save(number, documents, texts, time.perf_counter() - shard_began)


def _prompt(corpus: Corpus | None, index: int, config: WritingConfig) -> list[int]:
    """What document `index` begins with, without the separator."""
    if corpus is None or not config.prompt_tokens:
        return []
    tokens_N: np.ndarray = corpus.train.document(index % len(corpus.train))
    return [int(token) for token in tokens_N[1 : 1 + config.prompt_tokens]]


def _text(tokenizer: Any, document: WrittenDocument) -> str:
    """Without special tokens, and without what a cut has left of a character."""
    text: str = tokenizer.decode(document.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if document.ended else text.rstrip("\ufffd")
