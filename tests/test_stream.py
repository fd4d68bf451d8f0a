"""Streams: the blocks of a text that is never tokenised as a whole, against the stored text as the oracle."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import World
from transformers import AutoTokenizer

from benchmarks.tiny import WORDS
from distill import stream
from distill.config import CorpusConfig, UserError
from distill.corpus import Blocks, Encoder, load_corpus
from distill.documents import TextStream
from distill.job import run
from distill.recipe import load_recipe
from distill.sealed import write_checksums
from distill.stream import BlockStream

T, C, LANES = 8, 4, 4


def make_texts(count: int) -> list[Any]:
    rng = random.Random(1)
    texts: list[Any] = [f"{' '.join(rng.choices(WORDS, k=rng.randint(4, 30)))}" for _ in range(count)]
    texts[5], texts[count // 2] = None, " "
    return texts


TEXTS = make_texts(500)


def write_parquet(folder: Path, texts: list[Any] = TEXTS, shards: int = 7) -> Path:
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(texts)), shards)):
        table = pa.table({"n": part, "text": pa.array([texts[i] for i in part], pa.string())})
        pa.parquet.write_table(table, folder / f"part-{number:03d}.parquet", row_group_size=20)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("stream") / "shards")


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROWS", 5)
    monkeypatch.setattr(stream, "CHUNK", 60)


def configure(source: Path, cache: Path, **fields: Any) -> CorpusConfig:
    default = {"block_length": T, "validation_fraction": 0.1, "sample_documents": 100, "shuffle_buffer": 0}
    return CorpusConfig(**{"source": str(source), "cache_dir": cache, "streaming": True, **default, **fields})


def open_stream(config: CorpusConfig, world: World, lanes: int = LANES, accelerator: Any = None) -> BlockStream:
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    sample = load_corpus(config, tokenizer, progress=False)
    head = Blocks(sample.train, config.block_length, C, config.reset_at_documents)
    return BlockStream(config, tokenizer, sample, head, lanes=lanes, seed=0, accelerator=accelerator)


def epoch_of(found: BlockStream) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Every block of the first epoch with its number, step by step."""
    step = 0
    while True:
        ids_G, _ = found.row(step)
        if found.epoch:
            return
        batch = found.batch(ids_G)
        for lane, block in enumerate(ids_G):
            yield int(block), {name: value[lane].numpy() for name, value in vars(batch).items()}
        step += 1


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("resets", [True, False])
def test_a_stream_has_the_blocks_of_the_stored_text(shards: Path, world: World, tmp_path: Path, resets: bool) -> None:
    config = configure(shards, tmp_path, reset_at_documents=resets)
    found = dict(epoch_of(open_stream(config, world)))
    plain = CorpusConfig(
        **{**config.model_dump(), "streaming": False, "sample_documents": 20_000, "shuffle_buffer": 10_000}
    )
    stored = load_corpus(plain, AutoTokenizer.from_pretrained(world.teacher), progress=False)
    blocks = Blocks(stored.train, T, C, resets)
    assert len(blocks) - LANES < len(found) <= len(blocks)
    assert sorted(found) == list(range(len(found))), "no gap, nothing twice"
    for number, block in found.items():
        batch = blocks.batch([number])
        assert same(block, {name: value[0].numpy() for name, value in vars(batch).items()}), number


def test_the_closing_separator_is_the_last_label(shards: Path, world: World, tmp_path: Path) -> None:
    """With blocks that leave nothing over, one would be lost without it."""
    plain = CorpusConfig(source=str(shards), cache_dir=tmp_path, validation_fraction=0.1)
    targets = len(load_corpus(plain, AutoTokenizer.from_pretrained(world.teacher), progress=False).train.tokens) - 1
    length = next(length for length in range(2, targets) if targets % length == 0)
    found = dict(epoch_of(open_stream(configure(shards, tmp_path, block_length=length), world, lanes=1)))
    assert len(found) == targets // length and found[len(found) - 1]["labels_BT"][-1] == 0


def test_rows_walk_over_windows_and_epochs(shards: Path, world: World, tmp_path: Path) -> None:
    found = open_stream(configure(shards, tmp_path), world)
    before, epochs = None, set()
    for step in range(400):
        ids_G, previous_G = found.row(step)
        assert np.array_equal(np.diff(ids_G), [found.rows] * (LANES - 1)), "lanes lie side by side"
        if previous_G is not None:
            assert np.array_equal(previous_G, before) and np.array_equal(ids_G, previous_G + 1)
        before = ids_G
        epochs.add(found.epoch)
    assert len(epochs) > 1
    first = found.row(0)[0]
    assert found.epoch == 0 and first[0] == 0, "a step before the window takes it back to the start"


@pytest.mark.parametrize("buffer", [0, 50])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_a_saved_position_goes_on_exactly(shards: Path, world: World, tmp_path: Path, buffer: int, suffix: str) -> None:
    source = shards
    if suffix == ".jsonl":
        (source := tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif suffix == ".txt":
        (source := tmp_path / "t.txt").write_text("\n\n".join(text or "" for text in TEXTS))
    config = configure(source, tmp_path, shuffle_buffer=buffer)
    whole = open_stream(config, world)
    steps, states, batches = range(300), [], []
    for step in steps:
        batches.append(whole.batch(whole.row(step)[0]))
        states.append(json.loads(json.dumps(whole.state())))
    assert whole.epoch > 0, "the text was read more than once"
    other = open_stream(config, world)
    for step in (0, 3, 4, 5, 77, 150, 151, 299):
        other.load(states[step])
        for later in steps[step : step + 40]:
            again = other.batch(other.row(later)[0])
            assert all(
                bool((a == b).all()) for a, b in zip(vars(again).values(), vars(batches[later]).values(), strict=True)
            )


def test_shuffling_moves_documents_within_the_buffer_alone(world: World, tmp_path: Path) -> None:
    """Chunks of 20 documents keep their place and their content, and have another order in each epoch."""
    texts = [f"{one} {two}" for one in WORDS for two in WORDS][:200]
    folder = write_parquet(tmp_path / "numbered", texts, shards=3)
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)

    def epochs(buffer: int) -> list[list[str]]:
        config = configure(folder, tmp_path, shuffle_buffer=buffer, validation_fraction=0.05, test_fraction=0)
        found, tokens, step = open_stream(config, world, lanes=1), {}, 0
        while found.epoch < 2:
            ids_G, _ = found.row(step)
            tokens.setdefault(found.epoch, []).extend(found.batch(ids_G).inputs_BT.flatten().tolist())
            step += 1
        parts = [tokenizer.decode(tokens[epoch]).split("<|end|>") for epoch in (0, 1)]
        return [[text.strip() for text in part if text.strip()][:-3] for part in parts]  # the end is cut to blocks

    plain, again = epochs(0)
    assert plain == again and plain == [text for text in texts if text in set(plain)]
    chunk = {text: place // 20 for place, text in enumerate(texts)}
    for shuffled in (first, second) if (first := epochs(20)[0]) != (second := epochs(20)[1]) else ():
        assert [chunk[text] for text in shuffled] == sorted(chunk[text] for text in shuffled)
        assert shuffled != plain and len(set(shuffled)) == len(shuffled) >= len(plain) - 1
    assert first != second
    assert epochs(20)[0] == first


class Together:
    """One of two processes, here threads; what each gives to `gather` comes out for both."""

    num_processes, device = 2, "cpu"

    def __init__(self, rank: int, given: list[Any], barrier: threading.Barrier) -> None:
        self.process_index, self.given, self.barrier = rank, given, barrier

    def pad_across_processes(self, tensor: torch.Tensor, pad_index: int) -> torch.Tensor:
        both = self.exchange(tensor)
        missing = max(map(len, both)) - len(tensor)
        return torch.cat([tensor, torch.full((missing,), pad_index, dtype=tensor.dtype)])

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        both = self.exchange(tensor)
        assert len(both[0]) == len(both[1]), "as a collective needs them"
        return torch.cat(both)

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.given[self.process_index] = tensor
        self.barrier.wait(timeout=60)
        both = list(self.given)
        self.barrier.wait(timeout=60)
        return both


def test_two_processes_tokenise_disjoint_documents_that_are_all(
    shards: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then have the blocks of one process, of which each trains on its lanes."""
    config = configure(shards, tmp_path, shuffle_buffer=30)
    encoded: dict[int, Counter[str]] = {}
    encode = Encoder.encode

    def watched(self: Encoder, texts: list[str]) -> Iterator[np.ndarray]:
        encoded.setdefault(id(self), Counter()).update(texts)
        return encode(self, texts)

    open_stream(config, world)  # so that the sample is stored
    monkeypatch.setattr(Encoder, "encode", watched)
    alone = open_stream(config, world)
    expected = dict(epoch_of(alone))
    given, barrier = [None, None], threading.Barrier(2)

    def read(rank: int) -> tuple[BlockStream, dict[int, dict[str, np.ndarray]], dict[str, Any]]:
        found = open_stream(config, world, accelerator=Together(rank, given, barrier))
        for _ in range(2):  # a second time from a position
            state = found.state()
            blocks = dict(epoch_of(found))
            found.load(state)
        return found, blocks, state

    with ThreadPoolExecutor(2) as pool:
        (one, blocks, state), (other, others, its_state) = pool.map(read, (0, 1))
    assert state == its_state == open_stream(config, world).state(), "a position fits any number of processes"
    for found in (blocks, others):
        assert found.keys() == expected.keys() and all(same(found[block], expected[block]) for block in found)
    ours, theirs, all_texts = (set(encoded[id(found.encoder)]) for found in (one, other, alone))
    assert not ours & theirs and ours | theirs == all_texts
    assert len(ours) > 100 and len(theirs) > 100


def test_a_changed_text_and_wrong_files_are_refused(world: World, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "text")
    config = configure(folder, tmp_path)
    state = open_stream(config, world).state()
    write_parquet(tmp_path / "more", TEXTS[:90])
    (tmp_path / "more" / "part-000.parquet").rename(folder / "part-999.parquet")
    with pytest.raises(UserError, match="has changed since the checkpoint"):
        open_stream(config, world).load(state)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "the river"}] * 300))
    with pytest.raises(UserError, match="read as a whole; use .jsonl or .parquet"):
        TextStream(configure(tmp_path / "a.json", tmp_path))
    with pytest.raises(UserError, match="at least 4000 blocks, one a lane, found"):
        open_stream(config, world, lanes=4000).row(0)


def test_a_run_goes_on_from_the_position_in_its_checkpoint(world: World, tmp_path: Path) -> None:
    stage = json.dumps({"objective": "cross_entropy", "length": {"steps": 3}})
    overrides = ["corpus.streaming=true", "control=false", f"stages=[{stage}]", f"run.output_dir={tmp_path}"]
    recipe = load_recipe(str(world.recipe), overrides)
    result = run(recipe)
    assert result["corpus"]["streaming"]
    file = recipe.folder / "checkpoints" / "student" / "step-00000003" / "state.json"
    state = json.loads(file.read_text())
    assert state["stream"]["corpus"] == result["corpus"]["fingerprint"] and state["stored_steps"] == 0
    state["stream"]["corpus"] = "another text"
    file.write_text(json.dumps(state))
    write_checksums(file.parent)
    (recipe.folder / "result.json").unlink()
    with pytest.raises(UserError, match="has changed since the checkpoint was written"):
        run(recipe)


def test_hub_data_sets_are_streamed(
    shards: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `datasets` reads sharded parquet; its state goes into ours."""
    load_dataset = datasets.load_dataset

    def local(source: str, *arguments: Any, streaming: bool, **options: Any) -> Any:
        assert (source, streaming) == ("some/texts", True)
        return load_dataset("parquet", data_files=sorted(map(str, shards.iterdir())), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    commit = SimpleNamespace(sha="first")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, *a, **k: commit)
    config = configure(Path("some/texts"), tmp_path)
    texts = TextStream(config)
    start = texts.position()
    everything = list(texts.take(10_000))
    assert everything == list(TextStream(configure(shards, tmp_path)).take(10_000))
    for done in (0, 1, 7, 70, 71, 300, len(everything)):
        texts.seek(json.loads(json.dumps(start)))
        assert list(texts.take(done)) == everything[:done]
        position = json.loads(json.dumps(texts.position()))
        other = TextStream(config)
        other.seek(position)
        assert other.position() == position
        assert list(other.take(10_000)) == everything[done:]
    hub, files = (dict(epoch_of(open_stream(c, world))) for c in (config, configure(shards, tmp_path)))
    assert hub.keys() == files.keys() and all(same(hub[block], files[block]) for block in hub)
