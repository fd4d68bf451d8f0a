"""Training blocks straight from documents as they are read: for text that is too long to be tokenised beforehand.

    documents ──> chunks, shuffled ──> one stream of tokens ──> windows of G lanes x R rows ──> blocks

A stream of tokens is made as in `distill/corpus.py`, from the documents that their hash puts on the training side, and
its blocks are numbered by their position in it. A window is a piece of R * G blocks: lane l walks over the blocks
l * R to (l + 1) * R - 1 of it, so states are carried over R blocks and then begin anew. Windows follow each other
without a gap; at the end of an epoch at most G - 1 blocks are left out.

Of several processes each reads all documents and tokenises every n-th, in a thread ahead of the training; then all
get all tokens of the chunk. So blocks and lanes do not depend on the number of processes, and a position is the same
for all of them: where to read on, as plain JSON, from the chunk in which the window begins. Memory holds one window
and two chunks, whatever the length of the text.

Legend: G lanes of the whole batch, R rows of a window, T tokens of a block, N tokens, n documents.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from distill.config import CorpusConfig, UserError
from distill.corpus import BlockBatch, Blocks, Corpus, Encoder, Split, side_of
from distill.documents import TextStream, in_batches

ROWS = 64  # of a window: a lane is cut once in so many blocks
CHUNK = 1_000  # documents of a chunk that is not shuffled
NOWHERE = np.array([-1])  # a document's start before the window, whose position does not matter


@dataclass(frozen=True)
class _Chunk:
    """Documents that this process has tokenised: number i of the chunk has the next `sizes` of the tokens."""

    number: int
    position: dict[str, Any]  # in the texts, where the chunk begins
    documents: int  # of all processes and sides
    index_n: np.ndarray
    sizes_n: np.ndarray
    tokens_N: np.ndarray


class BlockStream:
    """The blocks of a recipe's stream, window by window. Collective: all processes ask for the same rows."""

    def __init__(
        self,
        config: CorpusConfig,
        tokenizer: Any,
        sample: Corpus,
        head: Blocks,
        *,
        lanes: int,
        seed: int,
        accelerator: Accelerator | None = None,
    ) -> None:
        """`sample`, `head`: the corpus of the stream's first documents, and its blocks.

        Raises UserError as `open_documents` does, here or when rows are asked for.
        """
        self.config, self.sample, self.head, self.lanes, self.seed = config, sample, head, lanes, seed
        self.split = head.split
        self.accelerator = accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.world = accelerator.num_processes if accelerator else 1
        self.encoder = Encoder(tokenizer, sample.separator_id)
        self.texts = TextStream(config)
        self.reader = ThreadPoolExecutor(1, "stream")
        self.ahead: Future[_Chunk] | None = None
        self.step = self.epoch = self.block = self.rows = 0  # the window's first step, epoch, first block, and rows
        self._begin({"step": 0, "epoch": 0, **self._start})

    def batch(self, block_ids: np.ndarray) -> BlockBatch:
        """Blocks of the window at hand; see `Blocks.batch`."""
        return self.window.batch(block_ids)

    def labels(self, block_ids: np.ndarray) -> torch.Tensor:
        """The labels (B, T) of blocks of the window at hand."""
        return self.window.labels(block_ids)

    def row(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Block numbers (G,) of all lanes in a step, and those of the step before, None where all lanes begin anew.

        A step before the window at hand takes the stream back to its start.
        """
        if step < self.step:
            self._begin({"step": 0, "epoch": 0, **self._start})
        while step >= self.step + self.rows:
            self.step, self.block = self.step + self.rows, self.block + self.rows * self.lanes
            self._fill()
            if self.rows == 0:
                self._next_epoch()
        row = step - self.step
        ids_G = self.block + np.arange(self.lanes) * self.rows + row
        return ids_G, ids_G - 1 if row else None

    def state(self) -> dict[str, Any]:
        """Where the window at hand begins; plain JSON, the same for all processes."""
        number, token, position = self.chunks[0]
        where = {"step": self.step, "epoch": self.epoch, "block": self.block}
        return {**where, "corpus": self.sample.fingerprint, "chunk": number, "token": token, "texts": position}

    def load(self, state: dict[str, Any]) -> None:
        """Go to a state; UserError if it belongs to another text."""
        if state["corpus"] != self.sample.fingerprint:
            raise UserError(
                f"corpus.source: {self.config.source} has changed since the checkpoint was written; put the text back "
                "as it was, or choose another run.name to begin anew"
            )
        self._begin(state)

    def _begin(self, state: dict[str, Any]) -> None:
        if self.ahead is not None:
            self.ahead.exception()  # it must not read on from the new position
        self.texts.seek(state["texts"])
        self.step, self.epoch, self.block = state["step"], state["epoch"], state["block"]
        self.origin = self.end = state["token"]  # positions of the first token held and after the last
        self.tokens_N, self.starts = np.zeros(0, self.encoder.dtype), np.zeros(0, np.int64)
        self.chunks: list[tuple[int, int, dict[str, Any]]] = []  # number, first token, position in the texts
        self.ended = False
        self.ahead = self.reader.submit(self._read, state["chunk"])
        self._fill()

    def _next_epoch(self) -> None:
        if self.block == 0:
            found, lanes = (self.end - 1) // self.head.block_length, self.lanes
            raise UserError(
                f"run.batch_size: expected at least {lanes} blocks, one a lane, found {found} in the stream"
            )
        self._begin({"step": self.step, "epoch": self.epoch + 1, **self._start})

    @property
    def _start(self) -> dict[str, Any]:
        """The state of an epoch's first window."""
        return {"block": 0, "chunk": 0, "token": 0, "texts": self.texts.start}

    def _fill(self) -> None:
        """Hold the tokens of the window that begins at `self.block`, and those before it that the teacher reads."""
        length, context = self.head.block_length, self.head.context
        first = max(self.block * length - context, 0)
        needed = (self.block + ROWS * self.lanes) * length + 1
        tokens, starts = [self.tokens_N], [self.starts]
        while self.end < needed and not self.ended:
            for tokens_N, starts_n in self._next_chunk():
                tokens.append(tokens_N)
                starts.append(starts_n)
        held = np.concatenate(starts)
        self.starts = held[held >= first]
        self.tokens_N = np.concatenate(tokens)[first - self.origin :].copy()  # not a view of what can be let go
        self.origin = first
        while len(self.chunks) > 1 and self.chunks[1][1] <= first:
            self.chunks.pop(0)
        self.rows = min(ROWS, ((self.end - 1) // length - self.block) // self.lanes)
        none = np.zeros(0, np.int64)
        piece = Split(self.tokens_N, np.concatenate([NOWHERE, self.starts]), utf8_bytes=none, words=none)
        self.window = Blocks(piece, length, context, self.head.reset_at_documents, origin=first)

    def _next_chunk(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and starts of the next chunk's documents, in their order of training; the last ends the stream."""
        assert self.ahead is not None
        chunk = self.ahead.result()
        self.ended = chunk.documents < self._chunk_size
        if not self.ended:
            self.ahead = self.reader.submit(self._read, chunk.number + 1)
        self.chunks.append((chunk.number, self.end, chunk.position))
        index_n, sizes_n, tokens_N = self._gather(chunk)
        place_n = np.arange(chunk.documents)
        if self.config.shuffle_buffer:
            place_n = np.random.default_rng([self.seed, self.epoch, chunk.number]).permutation(chunk.documents)
        pieces = np.split(tokens_N, np.cumsum(sizes_n)[:-1]) if len(sizes_n) else []
        ordered = [pieces[i] for i in np.argsort(place_n[index_n])]
        if self.ended:
            ordered.append(np.array([self.encoder.separator]))
        ends = self.end + np.cumsum([len(piece) for piece in ordered], dtype=np.int64)
        starts_n = np.concatenate([[self.end], ends[:-1]]) if ordered else ends
        self.end = int(ends[-1]) if ordered else self.end
        return [(np.concatenate(ordered).astype(self.encoder.dtype), starts_n)] if ordered else []

    @property
    def _chunk_size(self) -> int:
        return self.config.shuffle_buffer or CHUNK

    def _read(self, number: int) -> _Chunk:
        """Read the next chunk and tokenise this process's share of it. Runs in a thread of its own."""
        position, documents = self.texts.position(), 0
        index: list[int] = []
        tokens: list[np.ndarray] = [np.zeros(0, self.encoder.dtype)]
        for texts in in_batches(self.texts.take(self._chunk_size)):
            numbered = enumerate(texts, start=documents)
            mine = {i: text for i, text in numbered if i % self.world == self.rank}
            mine = {i: text for i, text in mine.items() if side_of(text, self.config) == "train"}
            index += mine
            tokens += self.encoder.encode(list(mine.values()))
            documents += len(texts)
        sizes_n = np.array([len(tokens_N) for tokens_N in tokens[1:]], dtype=np.int64)
        return _Chunk(number, position, documents, np.array(index, dtype=np.int64), sizes_n, np.concatenate(tokens))

    def _gather(self, chunk: _Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index, sizes and tokens of all processes' documents."""
        if self.accelerator is None or self.world == 1:
            return chunk.index_n, chunk.sizes_n, chunk.tokens_N
        columns = []
        for values in (chunk.index_n, chunk.sizes_n, chunk.tokens_N):
            # One more, as there may be none; -1 fills up and is taken out again.
            ours = torch.from_numpy(np.append(values.astype(np.int64), -1)).to(self.accelerator.device, torch.int32)
            all_ours = self.accelerator.gather(self.accelerator.pad_across_processes(ours, pad_index=-1))
            columns.append(all_ours[all_ours >= 0].cpu().numpy().astype(values.dtype))
        return columns[0], columns[1], columns[2]
