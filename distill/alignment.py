"""A teacher that is asked about a text in another tokenizer's tokens.

Both tokenizers cut the same bytes. After the b bytes that the student has read, the teacher has read whole tokens up to
some a <= b, and has a distribution p over its next token u. Of those only the tokens that begin with the bytes s
between a and b can still come, each with p(u) / P(s), where P(s) is the mass of all that begin with s: the covering of
a prefix by tokens, with which Phan et al. turn tokens into bytes exactly (arXiv 2410.09303). Here they are turned into
the student's tokens: u stands for the token v with which the student would begin to spell what u has after s,

    p'(v) = sum of p(u) / P(s) over the u that begin with s and whose rest begins with v.

Where a = b, s is empty and P(s) = 1; where the student's tokenizer is the teacher's, v = u and p' = p. A token of the
student that reaches beyond the teacher's is the beginning of none. If it is the label, its probability is the product
of what the teacher gives to the tokens and the beginning of a token that it consists of (the likelihood of a chunk, as
in approximate likelihood matching, arXiv 2503.20083), taken from that of the first of them; other such tokens stay in
the tail. So p' becomes a sparse signal: its k most probable tokens, and all others as one.

What that does not see: other ways of the teacher to spell the same bytes than its tokenizer's own, and that the student
may spell bytes in another way within a text than it spells a single token.

Legend: B blocks, T tokens of a block, N = B * T student's tokens, W teacher's window, M teacher's tokens whose next one
matters, n and m some of N and M, V teacher's vocabulary, U some of it, S student's vocabulary, K outcomes, d width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.bytespans import Spelling, check_same_text, check_spelling
from distill.config import Recipe, UserError
from distill.corpus import BlockBatch, Blocks, Corpus, hash_tokenizer
from distill.signals import CACHE_ROWS, ENCODING_ROWS, Encoding, Head, Signal, SparseSignal, concatenate, largest
from distill.teacher import LanguageModel

SAMPLED_BLOCKS = 200  # from which shares are told
TINY = 1e-37  # in place of a mass of 0


class Place(NamedTuple):
    """What a position in the student's text is for the teacher."""

    row: int  # position in the teacher's stream of the last token it has read
    begun: bytes  # bytes of its next token that the student has read already
    crossing: bool  # the label reaches beyond that token
    full: int  # if crossing: further tokens that the label holds
    rest: bytes  # if crossing: the beginning of the token after those


class Alignment:
    """The places of the student's blocks in the teacher's stream of the same documents."""

    def __init__(self, ours: tuple[Spelling, Blocks], theirs: tuple[Spelling, Blocks]) -> None:
        """Spelling and training blocks of student and teacher."""
        (self.spelling, self.blocks), (self.teachers, self.teacher_blocks) = ours, theirs

    def places(self, block: int) -> list[Place]:
        """One for each input of a block."""
        length, split = self.blocks.block_length, self.blocks.split
        at_T = np.arange(block * length, (block + 1) * length)
        document_T = np.searchsorted(split.starts, at_T, side="right") - 1
        found: list[Place] = []
        for document in np.unique(document_T):
            inside_t = at_T[document_T == document]
            first = int(split.starts[document])
            tokens_n = split.tokens[first : inside_t[-1] + 2]  # with the last label
            ends_n = np.cumsum(self.spelling.lengths_V[tokens_n])
            found += self._in_document(int(document), ends_n[inside_t - first], ends_n[inside_t - first + 1])
        return found

    def _in_document(self, document: int, read_t: np.ndarray, label_t: np.ndarray) -> Iterator[Place]:
        """From the bytes read before each label, and after it."""
        split, spelling = self.teacher_blocks.split, self.teachers
        first = int(split.starts[document])
        tokens_n = split.document(document)
        ends_n = np.cumsum(spelling.lengths_V[tokens_n])  # bytes read after each token; the separator has none
        read_t, label_t = read_t + spelling.lead, np.minimum(label_t + spelling.lead, ends_n[-1])
        last_t = np.searchsorted(ends_n, read_t, side="right") - 1
        for read, label, last in zip(read_t.tolist(), label_t.tolist(), last_t.tolist(), strict=True):
            begun, crossing, full, rest = b"", False, 0, b""
            if last + 1 < len(tokens_n):  # else the document ends here
                begun = spelling.bytes_V[tokens_n[last + 1]][: read - int(ends_n[last])]
                crossing = bool(label > ends_n[last + 1])
            if crossing:
                stop = int(np.searchsorted(ends_n, label, side="right")) - 1
                full = stop - last - 1
                if label > ends_n[stop]:
                    rest = spelling.bytes_V[tokens_n[stop + 1]][: label - int(ends_n[stop])]
            yield Place(first + last, begun, crossing, full, rest)

    def check_window(self, limit: float, field: str) -> None:
        """UserError where context and the text of a block are more of the teacher's tokens than the `limit` it reads.

        Blocks have as many of the student's tokens each; how many of the teacher's these are, the text decides.
        """
        context, count = self.teacher_blocks.context, len(self.blocks)
        edges = [self._at(block) for block in range(count)] + [len(self.teacher_blocks.split.tokens) - 1]
        for block in np.flatnonzero(context + np.diff(edges) + 1 > limit).tolist():  # may be one too many
            first, last = rows_of(self.places(block))
            if context + last - first + 1 > limit:
                raise UserError(
                    f"{field}: windows of {context + last - first + 1} of its tokens (teacher.context {context} + "
                    f"{last - first + 1}, which the {self.blocks.block_length} student's tokens of block {block} are) "
                    f"exceed its limit of {limit:.0f}; shorten corpus.block_length or teacher.context"
                )

    def _at(self, block: int) -> int:
        """Position in the teacher's stream of the last token that it has read where a block begins."""
        split, at = self.blocks.split, block * self.blocks.block_length
        document = int(np.searchsorted(split.starts, at, side="right")) - 1
        read = int(self.spelling.lengths_V[split.tokens[split.starts[document] : at + 1]].sum())
        return next(self._in_document(document, np.array([read]), np.array([read]))).row

    def figures(self) -> dict[str, float]:
        """Shares of the training text's positions, from blocks spread over it: how well the two tokenizers fit."""
        blocks = np.linspace(0, len(self.blocks) - 1, min(len(self.blocks), SAMPLED_BLOCKS)).astype(int)
        places = [place for block in np.unique(blocks) for place in self.places(int(block))]
        return {
            "share_at_common_boundaries": sum(not place.begun for place in places) / len(places),
            "share_of_labels_beyond_teachers_token": sum(place.crossing for place in places) / len(places),
        }


def rows_of(places: list[Place]) -> tuple[int, int]:
    """The first and the last position in the teacher's stream that a block's places need."""
    return places[0].row, max(place.row + place.full + bool(place.rest) for place in places)


@dataclass
class AlignedTeacher(LanguageModel):
    """A teacher over the student's vocabulary: tokenizer, head and embedding are for the student's tokens.

    `model` and `own` read the teacher's. Of a token that is not the teacher's, embedding and row of the head are the
    mean of those of the tokens that the teacher would spell it with (fast vocabulary transfer, arXiv 2402.09977).
    """

    own: LanguageModel = field(kw_only=True)
    alignment: Alignment = field(kw_only=True)
    same: dict[int, int] = field(kw_only=True)  # special tokens that both have: the student's by the teacher's
    pieces: list[list[int]] = field(kw_only=True)  # of each student's token, in the teacher's
    tables: dict[bytes, tuple[Tensor, Tensor]] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(
        cls, own: LanguageModel, tokenizer: PreTrainedTokenizerBase, ours: Corpus, theirs: Corpus, recipe: Recipe
    ) -> AlignedTeacher:
        """From two corpora of the same documents.

        UserError where their tokens do not spell the same bytes, or a block has more than the teacher can read.
        """
        where = f"student.tokenizer: {recipe.student.tokenizer or recipe.student.vocabulary_size}"
        spelling, teachers = Spelling(tokenizer, where), Spelling(own.tokenizer, f"teacher.model: {own.name}")
        if spelling.lead:
            raise UserError(f"{where}: expected one that adds no space to a text; choose another")
        for side in ("train", "validation"):
            our_split, their_split = getattr(ours, side), getattr(theirs, side)
            check_spelling(spelling, our_split, where)
            check_spelling(teachers, their_split, f"teacher.model: {own.name}")
            check_same_text((spelling, our_split), (teachers, their_split), where)
        shape = recipe.corpus.block_length, recipe.teacher.context, recipe.corpus.reset_at_documents
        alignment = Alignment((spelling, Blocks(ours.train, *shape)), (teachers, Blocks(theirs.train, *shape)))
        alignment.check_window(own.longest_window, f"teacher.model: {own.name}")
        common = teachers.specials.keys() & spelling.specials.keys()
        same = {teachers.specials[token]: spelling.specials[token] for token in common}
        same[theirs.separator_id] = ours.separator_id
        pieces = _pieces(spelling, teachers, {v: u for u, v in same.items()}, theirs.separator_id)
        bias_V, bias_S = own.head.bias_V, None
        if bias_V is not None:
            bias_S = _mean_rows(bias_V[:, None], pieces)[:, 0]
        head = Head(_mean_rows(own.head.weight_Vd, pieces), bias_S, own.head.scale, own.head.softcap)
        return cls(
            own.model, tokenizer, head, own.name, lockstep=own.lockstep, own=own, alignment=alignment, same=same,
            pieces=pieces,
        )  # fmt: skip

    @property
    def embedding_Vd(self) -> Tensor:
        return _mean_rows(self.own.embedding_Vd, self.pieces)

    def figures(self) -> dict[str, float]:
        """Sizes of both vocabularies, tokens that are the same in both, and how well they fit in the text."""
        spelled = set(self.alignment.teachers.bytes_V) - {b""}
        return {
            "student_tokens": self.vocab_size,
            "teacher_tokens": self.own.vocab_size,
            "shared_tokens": len(spelled & set(self.alignment.spelling.bytes_V)),
            **self.alignment.figures(),
        }

    @cached_property
    def weights_hash(self) -> str:
        """Of the teacher's weights and its tokenizer: a signal depends on both."""
        return hashlib.sha256(f"{self.own.weights_hash} {hash_tokenizer(self.own.tokenizer)}".encode()).hexdigest()

    def signal(self, batch: BlockBatch, encoding: Encoding) -> Signal:
        """What the teacher says about a batch of the student's blocks; N = B * T rows in the order of the labels."""
        assert encoding.kind == "top_k" and encoding.temperature == 1, "the recipe is checked for that"
        places = [self.alignment.places(block) for block in batch.block_ids_B.tolist()]
        hidden_Md, next_M, offset_B = self._read_windows(places)
        rows = [(place.row + offset, place) for block, offset in zip(places, offset_B, strict=True) for place in block]
        with torch.inference_mode():
            return self._translated(rows, hidden_Md, next_M, batch.labels_BT.flatten(), encoding.outcomes)

    def _read_windows(self, places: list[list[Place]]) -> tuple[Tensor, Tensor, list[int]]:
        """States after, and tokens following, all the teacher's positions that the places of B blocks need.

        `offset_B[b]` and a position in the teacher's stream make the number of its row, for block b.
        """
        blocks = self.alignment.teacher_blocks
        first_B, last_B = np.array([rows_of(block) for block in places]).T
        sizes_B = last_B - first_B + 1
        at_BW = first_B[:, None] + np.arange(-blocks.context, sizes_B.max())
        end = len(blocks.tokens) - 1
        # Shorter ones end with tokens that nobody asks for, and that nothing before them sees.
        window_BW, positions_BW, _ = blocks.read(np.minimum(at_BW, end))
        hidden_BWd = self._read(window_BW, positions_BW).last_hidden_state
        if not torch.isfinite(hidden_BWd).all():
            raise UserError(
                f"teacher {self.name}: its output is not finite; try teacher.dtype=fp32 (found {self.model.dtype})",
                every_process=True,
            )
        wanted_BW = (at_BW >= first_B[:, None]) & (at_BW <= last_B[:, None])
        device = self.own.head.weight_Vd.device
        hidden_Md = hidden_BWd[torch.from_numpy(wanted_BW).to(hidden_BWd.device)].to(device)
        next_M = torch.from_numpy(blocks.tokens[np.minimum(at_BW[wanted_BW] + 1, end)].astype(np.int64)).to(device)
        return hidden_Md, next_M, (np.cumsum(sizes_B) - sizes_B - first_B).tolist()

    def _translated(
        self, rows: list[tuple[int, Place]], hidden_Md: Tensor, next_M: Tensor, labels_N: Tensor, K: int
    ) -> SparseSignal:
        """p' of every place, the logits of a few teacher's rows at a time."""
        begin: dict[int, list[int]] = {}  # places by the row of their distribution
        end: dict[int, list[int]] = {}  # and by that of the token within which their label ends
        for number, (row, place) in enumerate(rows):
            begin.setdefault(row, []).append(number)
            if place.rest:
                end.setdefault(row + place.full + 1, []).append(number)
        device = hidden_Md.device
        follows_M = torch.empty(len(hidden_Md), device=device)  # probability of the token that follows
        rest_N = torch.ones(len(rows), device=device)  # and of the beginning of one with which a label ends
        parts: list[SparseSignal] = []
        masses: list[Tensor] = []
        size = CACHE_ROWS if device.type == "cpu" else ENCODING_ROWS
        for start, p_mV in self._probabilities(hidden_Md, size):
            follows_M[start : start + size] = p_mV.gather(1, next_M[start : start + size, None])[:, 0]
            for m in range(len(p_mV)):
                for number in end.get(start + m, ()):
                    rest = rows[number][1].rest
                    whole = self.alignment.teachers.beginning_with(rest, and_itself=True)
                    rest_N[number] = p_mV[m, whole].sum()
            chosen = [(m, number) for m in range(len(p_mV)) for number in begin.get(start + m, ())]
            if chosen:
                part, mass_n = self._outcomes(p_mV, [(m, rows[number][1].begun) for m, number in chosen], K)
                parts.append(part)
                masses.append(mass_n)
        signal, mass_N = concatenate(parts), torch.cat(masses)  # places come in the order of their rows
        for number, (row, place) in enumerate(rows):
            if place.crossing:
                likelihood = follows_M[row : row + place.full + 1].prod() * rest_N[number] / mass_N[number]
                self._move(signal, number, int(next_M[row]), place.begun, int(labels_N[number]), likelihood)
        return signal

    def _probabilities(self, hidden_Md: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
        """The teacher's distributions, `size` rows at a time, and the first one's number; one product for many."""
        for start in range(0, len(hidden_Md), ENCODING_ROWS):
            product_CV = self.own.head.product(hidden_Md[start : start + ENCODING_ROWS])
            for few, product_mV in enumerate(product_CV.split(size)):
                yield start + few * size, torch.softmax(self.own.head.finish(product_mV), -1)

    def _outcomes(self, p_mV: Tensor, wanted: list[tuple[int, bytes]], K: int) -> tuple[SparseSignal, Tensor]:
        """The K likeliest student's tokens after each (row, bytes begun) with a tail, and P(s)."""
        p_nS, mass_n = p_mV.new_zeros(len(wanted), self.vocab_size), p_mV.new_ones(len(wanted))
        common = [n for n, (_, begun) in enumerate(wanted) if not begun]
        if common:
            ids_U, student_U = self._table(b"")
            of_common = p_mV[[wanted[n][0] for n in common]][:, ids_U]
            p_nS[common] = torch.zeros_like(p_nS[common]).index_add_(1, student_U, of_common)
        for n, (m, begun) in enumerate(wanted):
            if begun:
                ids_U, student_U = self._table(begun)
                p_U = p_mV[m, ids_U]
                mass_n[n] = p_U.sum().clamp_min(TINY)
                p_nS[n].index_add_(0, student_U, p_U / mass_n[n])
        top_nK, ids_nK = largest(p_nS, K)
        return SparseSignal(ids_nK, top_nK, 1.0, tail_N=(1 - top_nK.sum(-1)).clamp_min(0)), mass_n

    def _table(self, begun: bytes) -> tuple[Tensor, Tensor]:
        """The teacher's tokens that begin with some bytes and go on, and the student's with which each goes on."""
        if (found := self.tables.get(begun)) is None:
            spelling, teachers = self.alignment.spelling, self.alignment.teachers
            ids = teachers.beginning_with(begun)
            rests = [teachers.bytes_V[index][len(begun) :] for index in ids]
            spelling.learn(rests)
            # What the student cannot spell (a tokenizer may lack bytes) is in the tail.
            pairs = [
                (index, pieces[0]) for index, rest in zip(ids, rests, strict=True) if (pieces := spelling.pieces(rest))
            ]
            if not begun:
                pairs = sorted([*pairs, *self.same.items()])
            table_U2 = torch.tensor(pairs, dtype=torch.int64, device=self.own.head.weight_Vd.device).view(-1, 2)
            ids_U, student_U = table_U2.unbind(1)
            found = self.tables[begun] = (ids_U, student_U)
        return found

    def _move(
        self, signal: SparseSignal, number: int, following: int, begun: bytes, label: int, likelihood: Tensor
    ) -> None:
        """Give a label that reaches beyond the token that follows its own probability, at the cost of that one."""
        assert signal.tail_N is not None
        ids_K, probs_K = signal.ids_NK[number], signal.probs_NK[number]
        if pieces := self.alignment.spelling.pieces(self.alignment.teachers.bytes_V[following][len(begun) :]):
            probs_K[ids_K == pieces[0]] -= likelihood
        if not (ids_K == label).any():
            ids_K[-1], probs_K[-1] = label, 0.0  # in place of the least probable one, which joins the tail
        probs_K[ids_K == label] += likelihood
        probs_K.clamp_(min=0)
        signal.tail_N[number] = (1 - probs_K.sum()).clamp_min(0)


def _pieces(spelling: Spelling, teachers: Spelling, same: dict[int, int], separator: int) -> list[list[int]]:
    """What the teacher spells each of the student's tokens with; a special token it does not have, as a separator."""
    teachers.learn(spelling.bytes_V)
    return [
        teachers.pieces(spelled) if spelled else [same.get(index, separator)]
        for index, spelled in enumerate(spelling.bytes_V)
    ]


def _mean_rows(weight_Vd: Tensor, pieces: list[list[int]]) -> Tensor:
    """(S, d): means of rows, in the type of the weight."""
    ids = torch.tensor([index for piece in pieces for index in piece], device=weight_Vd.device)
    starts = torch.tensor([0, *(len(piece) for piece in pieces[:-1])], device=weight_Vd.device).cumsum(0)
    mean_Sd = torch.nn.functional.embedding_bag(ids, weight_Vd.detach().float(), starts, mode="mean")
    return mean_Sd.to(weight_Vd.dtype)
