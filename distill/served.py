"""A served teacher: soft targets for the cache from a server that answers with the log-probabilities of a prompt.

A document is read from its start in stretches of at most `endpoint.window` tokens; a later stretch of the same document
begins `teacher.context` tokens before the first one that it scores. A request holds the tokens of a stretch, and the
answer is the distribution before each of them: at most k outcomes and, as the tail, the mass of all others.

Three kinds of server (`endpoint.server`):

    vllm        POST /v1/completions, token ids, `prompt_logprobs`
    sglang      POST /generate, token ids, `return_logprob` from position 0
    llama_cpp   POST /v1/completions, text, `echo` and `logprobs`; python -m llama_cpp.server --logits_all true

Text becomes tokens on the server, so a stretch of text must become exactly the block's tokens again. A document as a
whole does. Where a long one is cut, the cut moves back, a token at a time, until our tokenizer gives the same tokens
for the text of the stretch alone. All stretches are checked so before the first request, and a document for which it
does not hold (it spells out a special token, say) is one clear error. What the server made of the text comes back in
each answer and is compared token by token.

llama_cpp.server names outcomes by their text. Where several tokens have one text (special tokens have none at all, and
pieces of a character lose what is not whole) the text says nothing, and their mass goes to the tail. It also gives, for
prompts without its own start token, the distribution after a token in place of the one before it (version 0.3.36); two
requests that differ in their last token find that out. The distribution after a lone separator, which is then missing
from every answer, is asked for once.

Legend: R stretches, N tokens, K outcomes, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distill.config import EndpointConfig, UserError
from distill.corpus import Blocks
from distill.server import Server
from distill.signals import SparseSignal

SLACK = 32  # tokens that a cut through a text may move
Outcomes = dict[int, float]  # token id to log-probability
Answer = list[Outcomes | None]  # at all tokens of a request but the first; None where the server says nothing
Stretch = tuple[int, int, int]  # positions in the stream: first and last token of a request, first one scored
Waiting = deque[tuple[np.ndarray, dict[Stretch, asyncio.Task[Answer]]]]  # shards, and what is asked for them


class ServedTeacher:
    """Asks a server for the targets of blocks. UserError where server and tokenizer do not go together."""

    def __init__(
        self,
        endpoint: EndpointConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        blocks: Blocks,
        outcomes: int,
        processes: int = 1,
    ) -> None:
        """`outcomes`: K. `processes`: how many share the endpoint's limits."""
        self.endpoint, self.tokenizer, self.blocks, self.outcomes = endpoint, tokenizer, blocks, outcomes
        self.vocabulary = Vocabulary(tokenizer, vocab_size)
        self.concurrency = max(1, endpoint.concurrency // processes)
        self.rate = None if endpoint.requests_per_second is None else endpoint.requests_per_second / processes
        rarest = np.argsort(blocks.split.occurrences(vocab_size), kind="stable")
        self.reaching_over: dict[Stretch, asyncio.Task[Answer]] = {}
        self.rarest = [int(token) for token in rarest[: 2 * outcomes]]  # what fills up a row of fewer than K outcomes

    @property
    def name(self) -> str:
        return self.endpoint.model

    @property
    def identity(self) -> dict[str, Any]:
        """What stands for the weights, which nobody here has seen, and how the text is read."""
        window, context = self.endpoint.window, self.blocks.context
        return {
            "teacher_weights": f"{self.endpoint.model}, served by {self.endpoint.server}",
            "window": f"documents in stretches of {window}, context {context}",
        }

    def signals(self, shards: Sequence[np.ndarray]) -> Iterator[list[SparseSignal]]:
        """The signal of each shard of consecutive blocks, in order. Requests for the next ones are under way."""
        if not shards:
            return
        as_text = self.endpoint.server == "llama_cpp"
        stretches_R3 = cut(self.blocks, self.endpoint.window, self.read_again if as_text else None)
        with asyncio.Runner() as runner:  # closing it cancels what is under way
            reader = runner.run(self._open())
            try:
                waiting: Waiting = deque()
                todo = iter(shards)
                for _ in shards:
                    yield [runner.run(self._next(reader, stretches_R3, waiting, todo))]
            finally:
                runner.run(reader.server.close())

    async def _open(self) -> Reader:
        server = Server(self.endpoint, self.concurrency, self.rate)
        try:
            await server.check_model()
            reader = READERS[self.endpoint.server](self, server)
            await reader.prepare()
        except BaseException:
            await server.close()
            raise
        return reader

    async def _next(
        self, reader: Reader, stretches_R3: np.ndarray, waiting: Waiting, todo: Iterator[np.ndarray]
    ) -> SparseSignal:
        """The signal of the shard that is first in line."""
        while not waiting or sum(not t.done() for _, asked in waiting for t in asked.values()) < 2 * self.concurrency:
            if (block_ids := next(todo, None)) is None:
                break
            first, last = self._labels(block_ids)
            low = np.searchsorted(stretches_R3[:, 1], first)
            high = np.searchsorted(stretches_R3[:, 2], last, "right")
            asked = {}
            for start, stop, scored in stretches_R3[low:high].tolist():
                stretch = (start, stop, scored)
                task = self.reaching_over.get(stretch) or asyncio.create_task(reader.read(self._tokens(stretch)))
                asked[stretch] = task
            self.reaching_over = {stretch: task}  # a shard's last stretch may go on in the next one
            waiting.append((block_ids, asked))
        block_ids, asked = waiting.popleft()
        first, last = self._labels(block_ids)
        rows: list[Outcomes] = []
        for (start, _, scored), found in zip(asked, await asyncio.gather(*asked.values()), strict=True):
            for position, outcomes in enumerate(found, start + 1):
                if max(scored, first) <= position <= last:
                    if outcomes is None:
                        raise UserError(f"{self.endpoint.url}: no log-probabilities for token {position} of the text")
                    rows.append(outcomes)
        assert len(rows) == last - first + 1, "each label has one row"
        return self._signal(rows)

    def _labels(self, block_ids: np.ndarray) -> tuple[int, int]:
        """Stream positions of the first and last label of consecutive blocks."""
        length = self.blocks.block_length
        return int(block_ids[0]) * length + 1, (int(block_ids[-1]) + 1) * length

    def _tokens(self, stretch: Stretch) -> list[int]:
        return self.blocks.tokens[stretch[0] : stretch[1] + 1].tolist()

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def read_again(self, tokens: Sequence[int]) -> list[int]:
        """What their text becomes."""
        return self.tokenizer.encode(self.text(tokens), add_special_tokens=False, verbose=False)

    def _signal(self, rows: Sequence[Outcomes]) -> SparseSignal:
        K = self.outcomes
        ids_NK, probs_NK = np.zeros((len(rows), K), dtype=np.int64), np.zeros((len(rows), K), dtype=np.float32)
        for row, outcomes in enumerate(rows):
            best = sorted(outcomes.items(), key=lambda item: (-item[1], item[0]))[:K]
            ids = [token for token, _ in best]
            ids += [token for token in self.rarest if token not in outcomes][: K - len(ids)]
            ids_NK[row], probs_NK[row, : len(best)] = ids, [math.exp(logprob) for _, logprob in best]
        total_N = probs_NK.sum(-1, dtype=np.float64)
        if not np.all(total_N <= 1.01):  # also where a number is none
            raise UserError(
                f"{self.endpoint.url}: expected log-probabilities, found outcomes of a token that sum to "
                f"{total_N.max():.4g}; is the teacher's output finite?",
                every_process=True,
            )
        tail_N = np.clip(1 - total_N, 0, None).astype(np.float32)
        return SparseSignal(torch.from_numpy(ids_NK), torch.from_numpy(probs_NK), 1.0, torch.from_numpy(tail_N))


def cut(blocks: Blocks, window: int, again: Callable[[Sequence[int]], list[int]] | None = None) -> np.ndarray:
    """All stretches of the blocks' text, (R, 3) int64, in order.

    `again` says what the text of some tokens becomes: where it is given, each stretch becomes its own tokens. UserError
    names a place where none does.
    """
    tokens, last = blocks.tokens, len(blocks) * blocks.block_length
    begins = blocks.starts[blocks.starts < last]
    ends = np.append(blocks.starts[1:], len(tokens) - 1)[: len(begins)]
    stretches: list[Stretch] = []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        scored = begin + 1
        while scored <= min(end, last):
            start = begin if scored == begin + 1 else max(begin, scored - 1 - max(1, blocks.context))
            stop = min(start + window - 1, end)
            if again is not None:
                start, stop = _fit(tokens, begin, start, scored, stop, end, window, again)
            stretches.append((start, stop, scored))
            scored = stop + 1
    return np.array(stretches, dtype=np.int64).reshape(-1, 3)


def _fit(
    tokens: np.ndarray, begin: int, start: int, scored: int, stop: int, end: int, window: int, again: Callable
) -> tuple[int, int]:
    """Cuts of a document at which the text between becomes its tokens, as near as possible before the given ones."""
    for _ in range(2 * SLACK):
        ours = tokens[start : stop + 1].tolist()
        theirs = again(ours)
        if ours == theirs:
            return start, stop
        same = _common(ours, theirs)
        at_start = 2 * same < len(ours)
        if at_start and same <= SLACK and start > begin:
            start -= 1
            stop = min(stop, start + window - 1)
        elif not at_start and len(ours) - same <= SLACK and scored < stop < end:
            stop -= 1
        else:
            break
    raise UserError(
        f"endpoint.server: llama_cpp is sent text, and the text of the document at token {begin} of the corpus does "
        f"not become its tokens again (token {start + same} is {ours[same : same + 1]}, its text gives "
        f"{theirs[same : same + 1]}): take such documents out (is a special token spelled out there?), or serve the "
        "teacher by vllm or sglang, which take token ids"
    )


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the beginning that two lists share."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


class Vocabulary:
    """The text of each of our tokens, as a server would show it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        # After another token, so that no space is lost at the beginning.
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        before, *texts = tokenizer.batch_decode(
            [[anchor], *([anchor, token] for token in range(vocab_size))],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        self.whole = ["\ufffd" not in text for text in texts]
        self.texts = [_plain(text.removeprefix(before)) for text in texts]
        special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special = {token for token in special if token < vocab_size}
        shown = ["" if token in self.special else text for token, text in enumerate(self.texts)]
        counts = Counter(shown)
        self.by_text = {text: token for token, text in enumerate(shown) if text and counts[text] == 1}

    def is_shown_as(self, token: int, text: str) -> bool:
        """Whether a server that sends texts means this token."""
        return _plain(text) == self.texts[token] or (token in self.special and text == "")

    def may_be(self, token: int, text: str | None) -> bool:
        """Whether a server that sends ids may call this token so: servers differ in spaces and broken characters."""
        if text is None or not self.whole[token] or token in self.special:
            return True
        return text.replace("▁", " ").replace("Ġ", " ").strip() == self.texts[token].strip() or "\ufffd" in text


def _plain(text: str) -> str:
    """Without the marks of bytes that are no character."""
    return text.replace("\ufffd", "")


class Reader:
    """How one kind of server is asked about tokens."""

    def __init__(self, teacher: ServedTeacher, server: Server) -> None:
        self.teacher, self.server = teacher, server
        self.vocabulary, self.outcomes, self.endpoint = teacher.vocabulary, teacher.outcomes, teacher.endpoint

    async def prepare(self) -> None:
        """What is to be found out before the first stretch."""

    async def read(self, tokens: list[int]) -> Answer:
        """The outcomes at all tokens but the first."""
        raise NotImplementedError

    def refuse(self, place: int, expected: object, found: object) -> UserError:
        return UserError(
            f"endpoint.model: the tokens of {self.endpoint.model} on {self.endpoint.url} are not those of "
            f"teacher.model: token {place} of a request was {expected!r}, the server read {found!r}; teacher.model "
            "must have the vocabulary of the served model, and the server must add nothing in front",
            every_process=True,
        )

    def checked(self, outcomes: Outcomes) -> Outcomes:
        """As they are, if they are outcomes of our vocabulary."""
        if wrong := [token for token in outcomes if not 0 <= token < len(self.vocabulary.texts)]:
            raise UserError(
                f"endpoint.model: {self.endpoint.model} has a token {wrong[0]}, teacher.model only "
                f"{len(self.vocabulary.texts)} tokens; it must have the vocabulary of the served model",
                every_process=True,
            )
        return outcomes


class VLLM(Reader):
    """Ids in, ids out."""

    async def read(self, tokens: list[int]) -> Answer:
        body = {"prompt": tokens, "prompt_logprobs": self.outcomes, "max_tokens": 1, "temperature": 1.0}
        answer = await self.server.post("/v1/completions", {"model": self.endpoint.model, **body})
        places = self.server.part(answer, "choices", 0, "prompt_logprobs")
        if len(places) != len(tokens):
            raise self.refuse(0, f"the first of {len(tokens)}", f"the first of {len(places)}")
        found: Answer = []
        for place, (token, shown) in enumerate(zip(tokens[1:], places[1:], strict=True), 1):
            outcomes = {int(key): _number(value["logprob"]) for key, value in shown.items()}
            if token not in outcomes:
                raise self.refuse(place, token, sorted(outcomes))
            text = shown[str(token)].get("decoded_token")
            if not self.vocabulary.may_be(token, text):
                raise self.refuse(place, self.vocabulary.texts[token], text)
            found.append(self.checked(outcomes))
        return found


class SGLang(Reader):
    """Ids in, ids out, by its own way of asking: its /v1/completions gives no log-probabilities of a prompt."""

    async def read(self, tokens: list[int]) -> Answer:
        body = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "return_text_in_logprobs": True,
            "logprob_start_len": 0,
            "top_logprobs_num": self.outcomes,
        }
        answer = await self.server.post("/generate", body)
        entries = self.server.part(answer, "meta_info", "input_token_logprobs")  # log-probability, id, text
        read = [entry[1] for entry in entries]
        if read != tokens:
            place = _common(tokens, read)
            raise self.refuse(place, tokens[place : place + 1], read[place : place + 1])
        for place, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
            text = entry[2] if len(entry) > 2 else None
            if not self.vocabulary.may_be(token, text):
                raise self.refuse(place, self.vocabulary.texts[token], text)
        places = self.server.part(answer, "meta_info", "input_top_logprobs")
        return [self.checked({int(entry[1]): _number(entry[0]) for entry in place}) for place in places[1:]]


class LlamaCpp(Reader):
    """Text in, text out."""

    shifted = False  # whether place i of an answer holds the outcomes after token i, not before it
    after_separator: Outcomes | None = None

    async def prepare(self) -> None:
        one, other = [await self._ask(list(pair)) for pair in self._openings()]
        # Before the last token both have read the same; after it they have not.
        before, after = one[1] or {}, other[1] or {}
        common = before.keys() & after.keys()
        self.shifted = not common or max(abs(before[token] - after[token]) for token in common) > 0.02
        if self.shifted:
            self.after_separator = await self._generated(self.separator)

    @property
    def separator(self) -> int:
        return int(self.teacher.blocks.tokens[0])

    def _openings(self) -> list[tuple[int, ...]]:
        """Separator and first token of two documents that begin differently."""
        blocks, found = self.teacher.blocks, set()
        for begin in blocks.split.starts[:-1].tolist():
            pair = tuple(blocks.tokens[begin : begin + 2].tolist())
            if self.teacher.read_again(pair) == list(pair) and pair[1] not in self.vocabulary.special:
                found.add(pair)
            if len(found) == 2:
                return sorted(found)
        raise UserError("corpus.source: expected documents that begin with different words, found none")

    async def read(self, tokens: list[int]) -> Answer:
        found = await self._ask(tokens)
        if not self.shifted:
            return found[1:]
        return [self.after_separator if tokens[0] == self.separator else None, *found[1:-1]]

    async def _ask(self, tokens: list[int]) -> Answer:
        """What stands at the place of each token."""
        logprobs = await self._complete(tokens, echo=True, temperature=0.0, seed=0)
        shown = logprobs["tokens"]
        for place, token in enumerate(tokens):
            if place >= len(shown) or not self.vocabulary.is_shown_as(token, shown[place]):
                found = shown[place] if place < len(shown) else "nothing"
                raise self.refuse(place, self.vocabulary.texts[token], found)
        return [None if top is None else self._outcomes(top) for top in logprobs["top_logprobs"][: len(tokens)]]

    async def _generated(self, separator: int) -> Outcomes:
        """The outcomes after a separator alone. Where it generates the end of the text there are none: try again."""
        for seed in range(16):
            logprobs = await self._complete([separator], echo=False, temperature=1.0, seed=seed)
            if logprobs["top_logprobs"]:
                return self._outcomes(logprobs["top_logprobs"][0])
        raise UserError(f"{self.endpoint.url}: ends the text after {self.teacher.text([separator])!r} every time")

    async def _complete(self, tokens: list[int], **options: Any) -> dict[str, Any]:
        body = {"prompt": self.teacher.text(tokens), "logprobs": self.outcomes, "max_tokens": 1, **options}
        answer = await self.server.post("/v1/completions", {"model": self.endpoint.model, **body})
        return self.server.part(answer, "choices", 0, "logprobs")

    def _outcomes(self, top: dict[str, Any]) -> Outcomes:
        known = ((self.vocabulary.by_text.get(_plain(text)), logprob) for text, logprob in top.items())
        return {token: _number(logprob) for token, logprob in known if token is not None}


READERS: dict[str, type[Reader]] = {"vllm": VLLM, "sglang": SGLang, "llama_cpp": LlamaCpp}


def _number(value: Any) -> float:
    """A log-probability; not a number where a server has none."""
    return math.nan if value is None else float(value)
