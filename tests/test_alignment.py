"""A student with a tokenizer of its own: spans of bytes, and a teacher asked in other tokens than its own.

The oracle of a translated distribution is brute force over the teacher's whole vocabulary, byte by byte.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import World, result_of, run_command, run_eval, save_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill.alignment import AlignedTeacher
from distill.bytespans import Spelling, alphabet
from distill.config import UserError
from distill.job import TeacherAndText, run
from distill.recipe import load_recipe
from distill.signals import Encoding, SparseSignal
from distill.teacher import load_language_model

CPU = torch.device("cpu")
END = "<|end|>"
WORDS = [
    "der",
    "Öltanker",
    "naïve",
    "café",
    "東京",
    "東大",
    "🙂🙃",
    "the",
    "there",
    "therein",
    "theory",
    "strasse",
    "Straße",
    "1969",
    "1970",
    "a",
    "",
    "b\n\nc\td",
]
DOCUMENTS = [" ".join(random.Random(n).choices(WORDS, k=3 + n % 23)) for n in range(240)]


def byte_level(size: int, texts: list[str], longest: int | None = None, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, max_token_length=longest, special_tokens=[END, *special.values()], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **special)


def byte_fallback(prepend: bool) -> PreTrainedTokenizerFast:
    """Spaces as ▁ and bytes for what is not a token; `prepend` begins every text with a space."""
    letters = sorted({c for text in DOCUMENTS for c in text if c.isascii()} - {" "} | {"▁", "é", "東"})
    tokens = [END, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "th", "▁th", "▁the"]
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e")]
    model = models.BPE({t: n for n, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>")


FEW, MANY = byte_level(300, DOCUMENTS), byte_level(420, DOCUMENTS, 7, pad_token="<|pad|>")
TOKENIZERS = {"few": FEW, "many": MANY, "fallback": byte_fallback(False), "prepended": byte_fallback(True)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher with many tokens, one with few, tokenizers, and a recipe over a text of many scripts."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    for name, tokenizer in TOKENIZERS.items():
        tokenizer.save_pretrained(folder / name)
        save_llama(folder / name, seed=3, vocab_size=len(tokenizer), initializer_range=0.15)
    recipe = {
        "run": {"name": "cross", "output_dir": str(folder / "runs"), "precision": "fp32", "batch_size": 4},
        "teacher": {"model": str(folder / "many"), "context": 6, "dtype": "fp32"},
        "student": {"hidden_size": 16, "num_layers": 1, "tokenizer": str(folder / "few")},
        "corpus": {
            "source": str(folder / "text.jsonl"), "block_length": 12, "validation_fraction": 0.1,
            "cache_dir": str(folder / "cache"),
        },
        "targets": {"signal": "top_k", "k": 8},
        "stages": [{"objective": {"forward_kl": 0.8, "cross_entropy": 0.2}, "length": {"steps": 6}}],
        "control": {"match": "tokens"},
        "evaluation": {"every": {"steps": 3}, "new_tokens": 4, "decode_seconds": 0.1, "prompts": ["the"]},
        "tracking": "none",
    }  # fmt: skip
    (folder / "cross.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def aligned(place: Path, *overrides: str) -> tuple[TeacherAndText, AlignedTeacher]:
    parts = TeacherAndText(load_recipe(str(place / "cross.yaml"), list(overrides)), Accelerator(cpu=True))
    assert isinstance(parts.teacher, AlignedTeacher)
    return parts, parts.teacher


# Spans of bytes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_spell_the_text(name: str) -> None:
    spelling = Spelling(TOKENIZERS[name], "x")
    assert spelling.lead == (name == "prepended")
    for text in (*DOCUMENTS[:40], "🙂", "\u00a0é\u0301", "東", " <|end|> <|pad|>", "\x00\x7f", "  ", "\n"):
        ids = Tokenizer.from_str(TOKENIZERS[name].backend_tokenizer.to_str())
        ids.encode_special_tokens = True
        found = spelling.text(np.array(ids.encode(text, add_special_tokens=False).ids))
        assert found == b" " * spelling.lead + text.encode()
    assert spelling.bytes_V[TOKENIZERS[name].eos_token_id] == b""


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=9), st.sampled_from(sorted(TOKENIZERS)))
def test_any_bytes_have_pieces(fragment: bytes, name: str) -> None:
    """Also halves of characters, of which no text consists."""
    spelling = Spelling(TOKENIZERS[name], "x")
    assert spelling.text(np.array(spelling.pieces(fragment))) == fragment
    whole = fragment * 3
    spelling.learn([whole, fragment])
    assert spelling.text(np.array(spelling.pieces(whole))) == whole


def test_the_alphabet_is_that_of_the_library() -> None:
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in ("é", "東", "🙂", " ", "\n", "a", "\u00ad", "\x7f"):
        ((shown, _),) = pieces.pre_tokenize_str(character)
        assert bytes(alphabet()[c] for c in shown) == character.encode()


@pytest.mark.parametrize("prefix", [b"", b" ", b" t", b"\xe6", b"\xff", b"zz", b"t"])
def test_tokens_beginning_with_a_prefix(prefix: bytes) -> None:
    spelling = Spelling(MANY, "x")
    expected = {
        n for n, spelled in enumerate(spelling.bytes_V) if spelled.startswith(prefix) and len(spelled) > len(prefix)
    }
    assert set(spelling.beginning_with(prefix)) == expected
    itself = {n for n, spelled in enumerate(spelling.bytes_V) if spelled == prefix and spelled}
    assert set(spelling.beginning_with(prefix, and_itself=True)) == expected | itself


def lowercasing() -> PreTrainedTokenizerFast:
    state = json.loads(FEW.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Lowercase"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)


def dropping() -> PreTrainedTokenizerFast:
    state = json.loads(FEW.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "é"}, "content": "e"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)


def test_tokenizers_that_cannot_be_aligned_are_refused(place: Path, world: World, tmp_path: Path) -> None:
    lowercasing().save_pretrained(tmp_path / "lower")
    dropping().save_pretrained(tmp_path / "dropping")
    for name, message in (
        (str(world.teacher), "expected a tokenizer that can spell any bytes.*found WordLevel"),
        (str(tmp_path / "lower"), "keep the text as it is, found that one changes document"),
        (str(tmp_path / "dropping"), "keeps every byte of the text, found one that makes"),
        (str(place / "prepended"), "adds no space to a text"),
        (str(tmp_path / "none"), "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message):
            aligned(place, f"student.tokenizer={name}")


# The translated distribution


class Oracle:
    """Probabilities of bytes by brute force over the teacher's whole vocabulary, for one document."""

    def __init__(self, teacher: AlignedTeacher, tokens: np.ndarray) -> None:
        self.teacher, self.tokens = teacher, tokens.tolist()
        self.spelled = teacher.alignment.teachers.bytes_V
        with torch.no_grad():
            logits_TV = teacher.model(input_ids=torch.tensor([self.tokens])).logits[0, :, : teacher.own.vocab_size]
        self.p_TV = logits_TV.double().softmax(-1).tolist()
        self.ends = np.cumsum([len(self.spelled[index]) for index in self.tokens]).tolist()
        self.text = b"".join(self.spelled[index] for index in self.tokens)
        self.lead = teacher.alignment.teachers.lead

    def before(self, read: int) -> tuple[int, bytes]:
        """How many tokens, less one, lie within the bytes read, and the bytes read after them."""
        last = max(n for n, end in enumerate(self.ends) if end <= read + self.lead)
        return last, self.text[self.ends[last] : read + self.lead]

    def outcomes(self, read: int) -> dict[int, float]:
        """p' after so many bytes of the text."""
        last, begun = self.before(read)
        masses: dict[int, float] = {}
        total = 0.0
        for index, p in enumerate(self.p_TV[last]):
            spelled = self.spelled[index]
            if spelled.startswith(begun) and len(spelled) > len(begun):
                first = self.teacher.alignment.spelling.pieces(spelled[len(begun) :])[0]
                masses[first], total = masses.get(first, 0.0) + p, total + p
            elif not begun and index in self.teacher.same:
                first = self.teacher.same[index]
                masses[first] = masses.get(first, 0.0) + p
        return {v: mass / (total if begun else 1.0) for v, mass in masses.items()}

    def mass(self, upto: int) -> float:
        """P of the first bytes of the text: of whole tokens, then of all that begin as the last one does."""
        last, rest = self.before(upto)
        found = math.prod(self.p_TV[n][self.tokens[n + 1]] for n in range(last))
        if not rest:
            return found
        return found * sum(
            p for p, spelled in zip(self.p_TV[last], self.spelled, strict=False) if spelled.startswith(rest)
        )


@pytest.mark.parametrize(("own", "student"), [("many", "few"), ("few", "many"), ("prepended", "few")])
def test_translation_against_brute_force(place: Path, own: str, student: str) -> None:
    """With all outcomes kept, every place of some blocks: common boundaries, inside tokens, and labels beyond them."""
    size = len(TOKENIZERS[student])
    parts, teacher = aligned(
        place, f"teacher.model={place / own}", f"student.tokenizer={place / student}", f"targets.k={size}",
        "teacher.context=200",
    )  # fmt: skip
    blocks, spelling = parts.blocks, teacher.alignment.spelling
    kinds = {"common": 0, "inside": 0, "beyond": 0}
    ids = np.array([3, 11, 0])
    signal = teacher.signal(blocks.batch(ids), Encoding("top_k", size))
    assert isinstance(signal, SparseSignal) and signal.tail_N is not None
    oracles: dict[int, Oracle] = {}
    for row, (block, t) in enumerate((b, t) for b in ids for t in range(blocks.block_length)):
        at = block * blocks.block_length + t
        document = int(np.searchsorted(blocks.split.starts, at, side="right")) - 1
        oracle = oracles.get(document) or Oracle(teacher, parts.whole_corpus.train.document(document))
        oracles[document] = oracle
        read = len(spelling.text(blocks.split.tokens[blocks.split.starts[document] : at + 1]))
        label, expected = int(blocks.split.tokens[at + 1]), oracle.outcomes(read)
        (last, begun), end = oracle.before(read), read + len(spelling.bytes_V[label])
        kinds["inside" if begun else "common"] += 1
        if last + 1 < len(oracle.tokens) and end + oracle.lead > oracle.ends[last + 1]:
            kinds["beyond"] += 1
            moved = oracle.mass(end) / oracle.mass(read)
            expected[spelling.pieces(oracle.spelled[oracle.tokens[last + 1]][len(begun) :])[0]] -= moved
            expected[label] = expected.get(label, 0.0) + moved
        found = dict(zip(signal.ids_NK[row].tolist(), signal.probs_NK[row].tolist(), strict=True))
        assert len(found) == size
        for outcome, probability in found.items():
            assert probability == pytest.approx(expected.get(outcome, 0.0), abs=2e-6), (row, begun, label)
        assert signal.tail_N[row].item() == pytest.approx(max(0.0, 1 - sum(expected.values())), abs=1e-5)
    assert kinds["common"], kinds
    assert kinds["inside"] if own == "many" else kinds["beyond"], kinds


def test_the_same_tokenizer_gives_the_ordinary_signal(place: Path) -> None:
    """Of the same blocks, as if there were nothing to align; within the context too."""
    parts, teacher = aligned(place, f"student.tokenizer={place / 'many'}")
    batch = parts.blocks.batch(np.arange(0, 40, 3))
    found, expected = (t.signal(batch, Encoding("top_k", 8)) for t in (teacher, parts.whole_teacher))
    assert isinstance(found, SparseSignal) and isinstance(expected, SparseSignal)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.probs_NK, expected.probs_NK, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.tail_N, expected.tail_N, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.head.weight_Vd, parts.whole_teacher.head.weight_Vd)
    torch.testing.assert_close(teacher.embedding_Vd, parts.whole_teacher.embedding_Vd)
    assert teacher.figures()["share_at_common_boundaries"] == 1


def test_a_block_that_is_too_long_for_the_teacher_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    """In the teacher's tokens: as many as the longest block's are are read, one less is refused."""
    overrides = [f"teacher.model={place / 'few'}", f"student.tokenizer={place / 'many'}"]
    parts, teacher = aligned(place, *overrides)
    windows = []
    for block in range(len(parts.blocks)):
        rows = [place.row + place.full + bool(place.rest) for place in teacher.alignment.places(block)]
        windows.append(6 + max(rows) - teacher.alignment.places(block)[0].row + 1)
    longest = max(windows)
    assert longest > 6 + 12, "the student's tokens are longer"
    for limit in (longest, longest - 1):
        save_llama(tmp_path, seed=3, vocab_size=len(FEW), max_position_embeddings=limit)
        FEW.save_pretrained(tmp_path)
        overrides[0] = f"teacher.model={tmp_path}"
        if limit == longest:
            parts, teacher = aligned(place, *overrides)
            teacher.signal(parts.blocks.batch(np.array([np.argmax(windows), 0])), Encoding("top_k", 8))
        else:
            worst = np.argmax(windows)
            message = rf"windows of {longest} of its tokens \(teacher.context 6 .* block {worst} are\) exceed"
            with pytest.raises(UserError, match=message):
                aligned(place, *overrides)


def test_new_tokens_start_from_their_pieces(place: Path) -> None:
    _, teacher = aligned(place, f"teacher.model={place / 'few'}", f"student.tokenizer={place / 'many'}")
    spelling, teachers = teacher.alignment.spelling, teacher.alignment.teachers
    composed = 0
    for index in range(teacher.vocab_size):
        pieces = teachers.pieces(spelling.bytes_V[index]) if spelling.bytes_V[index] else [0]
        composed += len(pieces) > 1
        torch.testing.assert_close(teacher.embedding_Vd[index], teacher.own.embedding_Vd[pieces].mean(0))
        torch.testing.assert_close(teacher.head.weight_Vd[index], teacher.own.head.weight_Vd[pieces].mean(0))
    assert composed > 20


# Whole runs


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    made = run_command(
        str(place / "cross.yaml"), "student.vocabulary_size=320", "student.tokenizer=null", "evaluation.max_tokens=300"
    )  # which are other documents in the teacher's tokens
    assert made.returncode == 0, made.stderr
    assert "bits/byte compares them" in made.stdout
    return place / "runs" / "cross"


def test_a_run_does_not_go_on_with_another_tokenizer(place: Path, tmp_path: Path) -> None:
    """What lies in its folder has changed since it was begun, before its end."""
    tokenizer = tmp_path / "tokenizer"
    FEW.save_pretrained(tokenizer)
    words = [f"student.tokenizer={tokenizer}", f"run.output_dir={tmp_path}", "control=false"]
    given = load_recipe(str(place / "cross.yaml"), words)
    run(given)
    (given.folder / "result.json").unlink()
    byte_level(310, DOCUMENTS).save_pretrained(tokenizer)
    with pytest.raises(UserError, match="the student's tokenizer is not the one with which it was begun"):
        run(given)


def test_a_run_with_a_trained_tokenizer(finished: Path, place: Path) -> None:
    result = result_of(finished)
    assert result["tokenizer"]["student_tokens"] == 320 and result["tokenizer"]["teacher_tokens"] == len(MANY)
    assert 0.3 < result["tokenizer"]["share_at_common_boundaries"] < 1
    assert "kl_to_teacher_nats" not in result["student"]
    for role in ("teacher", "student", "control"):
        assert 0 < result[role]["bits_per_byte"] < 12
    assert all(point["bits_per_byte"] > 0 for point in result["curves"]["student"])
    losses = [point["bits_per_byte"] for point in result["curves"]["student"]]
    assert min(losses) == pytest.approx(result["student"]["bits_per_byte"])
    student = load_language_model(str(finished / "student"), device=CPU, dtype="fp32")
    assert student.vocab_size == 320 and student.tokenizer.eos_token == END


def test_all_models_are_measured_on_the_same_bytes(finished: Path) -> None:
    run = run_eval("perplexity", str(finished))
    assert run.returncode == 0, run.stderr
    rows = [row for models in json.loads(run.stdout.splitlines()[-1])["models"].values() for row in models.values()]
    assert len({row["utf8_bytes"] for row in rows}) == 1 and len({row["tokens"] for row in rows}) == 2
    result = result_of(finished)
    for row, role in zip(rows, ("teacher", "student", "control"), strict=True):
        assert row["bits_per_byte"] == pytest.approx(result[role]["bits_per_byte"], rel=1e-6)
    for protocol in ("agreement", "generate"):
        refused = run_eval(protocol, str(finished))
        assert refused.returncode == 2 and "is not that of the teacher" in refused.stderr


def test_a_cache_holds_what_the_live_teacher_says(place: Path) -> None:
    parts, teacher = aligned(place, "targets.cache=true", f"targets.cache_dir={place / 'targets'}")
    batch = parts.blocks.batch(np.array([2, 30, 7]))
    cached, live = parts.cached_targets().signal(batch), teacher.signal(batch, Encoding("top_k", 8))
    assert isinstance(cached, SparseSignal) and isinstance(live, SparseSignal)
    assert torch.equal(cached.ids_NK, live.ids_NK)
    torch.testing.assert_close(cached.probs_NK, live.probs_NK, rtol=2e-3, atol=1e-4)


def test_training_a_tokenizer_twice_gives_the_same(place: Path, tmp_path: Path) -> None:
    overrides = ["student.vocabulary_size=310", "student.tokenizer=null"]
    first, second = (
        aligned(place, *overrides, f"corpus.cache_dir={tmp_path / name}")[1].tokenizer for name in ("one", "two")
    )
    assert first.get_vocab() == second.get_vocab() and len(first) == 310


BAD = [
    (["targets.signal=hidden"], "targets.signal: expected top_k"),
    (["targets.temperature=2", "stages.0.temperature=2"], "targets.temperature: expected 1"),
    (["student.embedding_size=8"], "student.embedding_size"),
    (["corpus.streaming=true"], "corpus.streaming: expected false"),
    (["student.vocabulary_size=400"], "tokenizer, vocabulary_size: give one of them"),
    (["student.vocabulary_min_count=1"], "tokenizer, vocabulary_min_count: give one of them"),
    (["student.vocabulary_size=20", "student.tokenizer=null"], "greater than or equal to 257"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_what_cannot_be_had_is_refused(place: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(str(place / "cross.yaml"), overrides)
