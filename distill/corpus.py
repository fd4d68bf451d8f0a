"""The corpus: documents become tokens, tokens become blocks.

A split is one long stream of tokens in which a separator S starts each document and ends the last:

    S the cat sat S a dog barked ... S

The LSTM reads the stream in blocks of T tokens, lane by lane, and carries its state from a lane's block to
the next (truncated backpropagation through time, as in Zaremba et al. 2014, arXiv 1409.2329). The teacher,
which has no state to carry, reads the C tokens before a block along with it.

A hash of a document's text alone decides its side, train, validation or test: copies of a text never lie on
two sides, and a corpus that grows keeps its division. The tokens are stored under a fingerprint of all that
they depend on and memory-mapped when read; making them, and reading them in any order, takes the memory of one
batch of documents, however long the text is. Text that is too long to be tokenised beforehand is streamed:
`distill/stream.py`.

Shapes: N tokens of a stream or document, n documents, B blocks of a batch, T tokens of a block, C tokens of
context, W = C + T. Try it on a file of yours:

    from transformers import AutoTokenizer
    corpus = load_corpus(CorpusConfig(source="notes.txt"), AutoTokenizer.from_pretrained("gpt2"))
    batch = Blocks(corpus.train, 128, 64, reset_at_documents=True).batch(np.arange(4))
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import mmap
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.arrays import GrowingArray
from distill.augment import Augmenter
from distill.config import AugmentationConfig, CorpusConfig, UserError
from distill.documents import Source, open_documents
from distill.sealed import changed, checksums, read_sealed, seal

logger = logging.getLogger(__name__)

FORMAT = 2  # of the stored files and what they mean; a new number makes every corpus be built anew
SIDES = ("train", "validation", "test")
COUNTED = 2**22  # tokens that are counted at one time: counting takes eight bytes for each
FORGET_EVERY = 256  # batches of blocks between two releases of the pages they were read from


@dataclass(frozen=True)
class Split:
    """The documents of one side; `len(split)` is their number."""

    tokens: np.ndarray  # (N,) memory-mapped stream: S d1 S d2 ... S dn S
    starts: np.ndarray  # (n+1,) int64, memory-mapped: position of each document's separator, and of the closing one
    utf8_bytes: np.ndarray  # (n,) int64, memory-mapped: bytes of each document's text
    words: np.ndarray  # (n,) int64, memory-mapped: whitespace-separated words of each document's text

    def __len__(self) -> int:
        return len(self.starts) - 1

    def occurrences(self, vocab_size: int) -> np.ndarray:
        """How often each token stands in the stream, (vocab_size,) int64; read a piece at a time."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self.tokens), COUNTED):
            counts += np.bincount(self.tokens[start : start + COUNTED], minlength=vocab_size)
            self.forget()
        return counts

    def forget(self) -> None:
        """Unmap what was read: the system keeps it cached, but it no longer counts as this process's memory."""
        for array in (self.tokens, self.starts):
            if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document with the separator that starts it, without the one that starts the next."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True)
class Corpus:
    """A tokenised text, divided into three."""

    train: Split
    validation: Split
    test: Split
    separator_id: int
    fingerprint: str  # hex; changes with text, tokenizer, separator, division and format
    folder: Path


def load_corpus(
    config: CorpusConfig,
    tokenizer: Any,
    tokenizer_hash: str | None = None,
    *,
    written: CorpusConfig | None = None,
    augmentation: AugmentationConfig | None = None,
    progress: bool = True,
) -> Corpus:
    """Read, divide and tokenise a recipe's text, or find all that done in the cache.

    `written`: more documents, which may be trained on alone, and so are the changed copies that `augmentation` makes of
    the training side. Those whose hash puts them on another side are left out, so that a document of validation that
    somebody knows by heart does not come into training through them.

    Processes that do this at once do not disturb each other: the first to finish stores its files, the
    others take them. `tokenizer_hash` stands in for `hash_tokenizer(tokenizer)`.
    Raises UserError for a text that cannot be found, read or stored, or is too short to train on.
    """
    separator = separator_id(tokenizer, config.separator)
    source = open_documents(config, progress=progress)
    more = [open_documents(written, progress=progress)] if written else []
    more += [_copies(augmentation, config)] if augmentation else []
    of_config = {"text_field", "documents", "max_documents", "validation_fraction", "test_fraction"}
    ingredients = {
        "format": FORMAT,
        "text": source.digest,
        "tokenizer": tokenizer_hash or hash_tokenizer(tokenizer),
        "separator_id": separator,
        **config.model_dump(include=of_config),
        **({"written": more[0].digest} if written else {}),
        **({"augmentation": more[-1].digest} if augmentation else {}),
    }
    fingerprint = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_root(config.cache_dir) / "corpus" / fingerprint
    if (corpus := _read(folder)) is None:
        partial = folder.with_name(f"{fingerprint}.{platform.node()}.{os.getpid()}.{uuid.uuid4().hex}.partial")
        try:
            partial.mkdir(parents=True)
            _clear_leftovers(partial)
            counts = _build(partial, config, source, more, tokenizer, separator, progress)
            report = seal({"source": config.source, "ingredients": ingredients, **counts, "files": checksums(partial)})
            (partial / "corpus.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            _install(partial, folder)
        except OSError as error:
            raise UserError(
                f"corpus.cache_dir: the tokenised text cannot be stored in {folder.parent} ({error}); "
                "make room there, or choose another place"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        corpus = _read(folder)
        assert corpus is not None, "a corpus just stored cannot be read"
    _check_usable(corpus, config)
    return corpus


def cache_root(configured: Path | None = None) -> Path:
    """Folder for what can be made again: as configured, else $POTSTILL_CACHE, else in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "potstill"
    return Path(configured or os.environ.get("POTSTILL_CACHE") or default).expanduser()


def hash_tokenizer(tokenizer: Any) -> str:
    """sha256 of what decides the tokens of a text."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        del state["truncation"], state["padding"]  # left over from its last call, whatever that was
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def separator_id(tokenizer: Any, separator: str | None = None) -> int:
    """The one token that `separator` is; by default the tokenizer's end token, else its start token."""
    token = separator or tokenizer.eos_token or tokenizer.bos_token
    if token is None:
        raise UserError("corpus.separator: expected a token, as the tokenizer has no end or start token")
    known = tokenizer.get_vocab().get(token)
    ids = tokenizer.encode(token, add_special_tokens=False) if known is None else [known]
    if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and token != tokenizer.unk_token):
        pieces = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "no tokens"
        special = " ".join(tokenizer.all_special_tokens) or "none"
        found = f"found {token!r}, which becomes {pieces}"
        raise UserError(f"corpus.separator: expected a single token, {found}; special tokens: {special}")
    return int(ids[0])


def side_of(text: str, config: CorpusConfig) -> str:
    """The side of a document: a hash of its text, read as a number in [0, 1), against the two fractions."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    if number < config.test_fraction:
        return "test"
    return "validation" if number < config.test_fraction + config.validation_fraction else "train"


class Encoder:
    """Turns documents into tokens, each behind a separator, on all cores.

    A special token that is spelled out in a text becomes ordinary tokens. A separator that comes out of the
    tokenizer nevertheless (an ordinary token such as a newline was chosen) is dropped: separators always are
    boundaries of documents. A fast tokenizer is copied, so that another thread may use it meanwhile.
    """

    def __init__(self, tokenizer: Any, separator: int) -> None:
        self.tokenizer, self.separator = tokenizer, separator
        self.dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
        self.dropped = 0  # separators inside documents so far
        self.backend = None
        if tokenizer.is_fast:
            self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
            self.backend.no_truncation()
            self.backend.no_padding()
            self.backend.encode_special_tokens = True

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The tokens (N,) of each text, a separator first."""
        if self.backend is not None:  # two to three times as fast as through transformers
            ids = (encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False))
        else:
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            ids = iter(self.tokenizer(texts, **options)["input_ids"])
        for ids_N in ids:
            tokens_N = np.array([self.separator, *ids_N], dtype=self.dtype)
            kept_N = tokens_N != self.separator
            kept_N[0] = True
            self.dropped += len(kept_N) - int(kept_N.sum())
            yield tokens_N[kept_N]


def _build(
    folder: Path,
    config: CorpusConfig,
    source: Source,
    more: Sequence[Source],
    tokenizer: Any,
    separator: int,
    progress: bool,
) -> dict[str, Any]:
    """Write the arrays of all sides; returns what `corpus.json` says about them. `more`: for training alone."""
    encoder = Encoder(tokenizer, separator)
    tokens = {side: GrowingArray(folder / f"{side}.npy", encoder.dtype) for side in SIDES}
    starts = {side: GrowingArray(folder / f"{side}.starts.npy", np.int64) for side in SIDES}
    measures = {side: GrowingArray(folder / f"{side}.documents.npy", np.int64, 2) for side in SIDES}
    further = itertools.chain.from_iterable(part.batches(progress=progress) for part in more)
    training = ([text for text in texts if side_of(text, config) == "train"] for texts in further)
    for texts in itertools.chain(source.batches(progress=progress), training):
        for text, tokens_N in zip(texts, encoder.encode(texts), strict=True):
            side = side_of(text, config)
            starts[side].append(np.array([tokens[side].length]))
            tokens[side].append(tokens_N)
            measures[side].append(np.array([[len(text.encode()), len(text.split())]]))
    for side in SIDES:
        starts[side].append(np.array([tokens[side].length]))
        tokens[side].append(np.array([separator]))
        for array in (tokens[side], starts[side], measures[side]):
            array.close()
    splits = {side: {"documents": measures[side].length, "tokens": tokens[side].length} for side in SIDES}
    if source.found == 0:
        raise UserError(f"corpus.source: {config.source}: no text, only {source.skipped} blank documents")
    if encoder.dropped:
        logger.warning("corpus.separator: %d of these tokens inside documents were dropped", encoder.dropped)
    logger.info("%s: %d documents, %d blank ones skipped", config.source, source.found, source.skipped)
    return {"splits": splits, "skipped": source.skipped, "separators_dropped": encoder.dropped}


def _copies(augmentation: AugmentationConfig, config: CorpusConfig) -> Source:
    """Changed copies of the training side, the same for every run, so that they share a cache of targets."""

    def texts() -> Iterator[str]:
        return (text for text in open_documents(config, progress=False) if side_of(text, config) == "train")

    def copies() -> Iterator[tuple[str, float]]:
        augmenter = Augmenter(augmentation, texts(), mask=None, seed=0)
        for done in range(augmentation.copies):
            for number, text in enumerate(texts()):
                yield augmenter.copy(text, number, done), done / augmentation.copies

    return Source(json.dumps(augmentation.model_dump(), sort_keys=True), copies(), None)


def _clear_leftovers(mine: Path) -> None:
    """Take away what processes of this machine were building beside this folder when they were killed."""
    for partial in mine.parent.glob("*.partial"):
        rest = partial.name.partition(".")[2]
        machine, process = rest.rsplit(".", 3)[:2] if rest.count(".") >= 3 else ("", "")
        if partial == mine or machine != platform.node() or not process.isdigit():
            continue
        try:
            os.kill(int(process), 0)  # asks whether it is there
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except OSError:
            pass  # it is, and somebody else's


def _install(partial: Path, folder: Path) -> None:
    """Move a finished corpus into place, unless another process was faster."""
    try:
        partial.rename(folder)
    except OSError:
        if _read(folder) is None:  # a damaged one is in the way
            aside = partial.with_suffix(".damaged")
            folder.rename(aside)
            partial.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)


def _read(folder: Path) -> Corpus | None:
    """The corpus stored in a folder; None where there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        report = read_sealed(folder / "corpus.json")
        if damaged := changed(folder, report.get("files", {})):
            raise ValueError(f"{damaged[0]} is missing or changed")
        splits = {side: _read_split(folder, side, report["splits"][side]) for side in SIDES}
        separator = int(report["ingredients"]["separator_id"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, AttributeError) as error:
        logger.warning("%s is damaged and will be built again: %s", folder, error)
        return None
    return Corpus(**splits, separator_id=separator, fingerprint=folder.name, folder=folder)


def _read_split(folder: Path, side: str, counts: dict[str, int]) -> Split:
    tokens_N, starts, measures_n2 = (
        np.load(folder / f"{side}{part}.npy", mmap_mode="r", allow_pickle=False)
        for part in ("", ".starts", ".documents")
    )
    found = {"documents": len(measures_n2), "tokens": len(tokens_N)}
    surplus = (folder / f"{side}.npy").stat().st_size - tokens_N.offset - tokens_N.nbytes
    if found != counts or len(starts) != len(measures_n2) + 1 or starts[-1] != len(tokens_N) - 1 or surplus:
        raise ValueError(f"{side}: expected {counts}, found {found} and {surplus} more bytes")
    return Split(tokens_N, starts, utf8_bytes=measures_n2[:, 0], words=measures_n2[:, 1])


def _check_usable(corpus: Corpus, config: CorpusConfig) -> None:
    found, needed = len(corpus.train.tokens), config.block_length + 1  # every input has a label after it
    if found < needed:
        raise UserError(
            f"corpus.block_length: expected at least {needed} tokens to train on, found {found}; "
            "add text or shorten the block"
        )
    if len(corpus.validation) == 0:
        total = sum(len(split) for split in (corpus.train, corpus.validation, corpus.test))
        raise UserError(
            f"corpus.validation_fraction: expected some documents for validation, found 0 of {total} at "
            f"{config.validation_fraction}; choose a larger fraction or add documents"
        )


@dataclass(frozen=True)
class BlockBatch:
    """Blocks for student and teacher: torch tensors, int64, `reset` bool."""

    block_ids_B: torch.Tensor
    inputs_BT: torch.Tensor
    labels_BT: torch.Tensor
    reset_BT: torch.Tensor  # a document starts at this input, and resets are on
    window_BW: torch.Tensor  # what the teacher reads: the C tokens before the block, then the inputs
    positions_BW: torch.Tensor  # the teacher's position ids

    @property
    def written_B(self) -> torch.Tensor:
        """Which blocks the student wrote: those without labels."""
        return (self.labels_BT < 0).all(1)

    def rows(self, chosen_B: torch.Tensor) -> BlockBatch:
        """Some of the blocks."""
        return BlockBatch(**{name: part[chosen_B] for name, part in vars(self).items()})


class Blocks:
    """Training blocks over a split's stream.

    Block k holds the inputs `tokens[k*T : (k+1)*T]` and the labels `tokens[k*T+1 : (k+1)*T+1]`: labels are
    shifted here and nowhere else.

    The teacher's positions restart at 0 with each document; one that began before the window starts at 0
    with the window's first token. Given `position_ids`, `use_cache=False` and no `attention_mask`,
    transformers cuts attention wherever positions do not go up by one. With a cache or a mask of ones it
    attends across documents without a word, as do its flash-attention kernels for more than one row.

    Windows that reach beyond the stream's first token are filled up with separators, a document of their
    own. Without resets that is the only place where positions restart.

    A split may be a piece of a longer stream: `origin` is the position of its first token, and `starts` are
    positions in the whole stream. Blocks keep the numbers that they have there.
    """

    def __init__(
        self, split: Split, block_length: int, context: int, reset_at_documents: bool, origin: int = 0
    ) -> None:
        self.split, self.tokens, self.block_length, self.context = split, split.tokens, block_length, context
        self.reset_at_documents, self.origin = reset_at_documents, origin
        self.starts = split.starts if reset_at_documents else np.zeros(1, dtype=np.int64)
        self.count = (origin + len(self.tokens) - 1) // block_length
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def first(self, count: int) -> Blocks:
        """The same blocks without those after the first `count`; these blocks themselves if there are no more."""
        if count >= self.count:
            return self
        fewer = copy.copy(self)
        fewer.count = count
        return fewer

    def labels(self, block_ids: np.ndarray) -> torch.Tensor:
        """The labels (B, T) of these blocks alone."""
        at_BT = np.asarray(block_ids)[:, None] * self.block_length + np.arange(1, self.block_length + 1)
        return torch.from_numpy(self.tokens[at_BT - self.origin].astype(np.int64))

    def batch(self, block_ids: np.ndarray) -> BlockBatch:
        """The blocks with these numbers, in this order."""
        block_ids_B = np.array(block_ids, dtype=np.int64)
        assert block_ids_B.min() >= 0 and block_ids_B.max() < len(self), "no such block"
        # X = W + 1: positions in the stream of the window's tokens and of the last label.
        at_BX = block_ids_B[:, None] * self.block_length + np.arange(-self.context, self.block_length + 1)
        tokens_BX, positions_BX, began_BX = self.read(at_BX)
        reset_BX = (began_BX == at_BX) & self.reset_at_documents
        self.reads += 1
        if self.reads % FORGET_EVERY == 0:
            self.split.forget()
        return BlockBatch(
            block_ids_B=torch.from_numpy(block_ids_B),
            inputs_BT=tokens_BX[:, self.context : -1],
            labels_BT=tokens_BX[:, self.context + 1 :],
            reset_BT=torch.from_numpy(reset_BX[:, self.context : -1]),
            window_BW=tokens_BX[:, :-1],
            positions_BW=positions_BX[:, :-1],
        )

    def read(self, at_BX: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Tokens at positions of the stream, one window a row, with the position ids that a Transformer needs there and
        where the document of each began; (B, X) each. Positions before the stream are filled up."""
        inside_BX = np.maximum(at_BX, 0)  # token 0, a separator, fills up
        assert inside_BX.min() >= self.origin, "before the piece at hand"
        tokens_BX = torch.from_numpy(self.tokens[inside_BX - self.origin].astype(np.int64))
        began_BX = self.starts[np.searchsorted(self.starts, inside_BX, side="right") - 1]
        first_B1 = at_BX[:, :1]
        positions_BX = at_BX - np.where(at_BX < 0, first_B1, np.maximum(began_BX, first_B1))
        return tokens_BX, torch.from_numpy(positions_BX), began_BX


@lru_cache(maxsize=1)  # a step asks for its epoch's order several times
def lane_order(num_blocks: int, lanes: int, epoch: int, seed: int) -> np.ndarray:
    """Block numbers of one epoch, (steps, lanes): each lane walks blocks that follow each other.

    Lane l is at block `rotation + l * steps + t`, modulo `num_blocks`, in step t; the rotation is drawn anew
    for each epoch. No block comes twice; at most `lanes - 1` are left out, others in each epoch.

    States have to be zeroed where an epoch begins. Where a lane walks over the stream's end to its start,
    block 0 begins with a document, so that a reset falls there; without resets, one seam an epoch remains.
    """
    if num_blocks < lanes:
        raise UserError(
            f"run.batch_size: expected at least {lanes} blocks, one a lane, found {num_blocks}; "
            "lower run.batch_size or corpus.block_length, or add text"
        )
    steps = num_blocks // lanes
    rotation = np.random.default_rng([seed, epoch]).integers(num_blocks)
    order = (rotation + np.arange(lanes) * steps + np.arange(steps)[:, None]) % num_blocks
    order.flags.writeable = False
    return order
