"""Text that the teacher writes: what generate would write, from its softmax, whole after any stop, on the right side.

python -m pytest tests/test_writing.py
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import ROOT, World, run_eval
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from distill import write
from distill import written as module
from distill.config import Recipe, UserError, WritingConfig
from distill.corpus import load_corpus, side_of
from distill.documents import open_documents
from distill.job import TeacherAndText, run, start_accelerator
from distill.plan import plan
from distill.recipe import load_recipe
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import LanguageModel, load_language_model, wrap
from distill.writing import TeacherWriter, ends_of, text_of, write_text, written_folder
from distill.written import WrittenDocument, WrittenText

WRITING = "writing={documents: 40, max_tokens: 8, batch_size: 4, prompt_tokens: 2, seed: 5}"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(world: World) -> LanguageModel:
    return load_language_model(str(world.teacher), device=CPU, dtype="fp32")


def other_network(name: str) -> Any:
    """Absolute positions; and attention that does not reach back to the beginning of a document."""
    torch.manual_seed(3)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=1, sliding_window=5, **sizes)).eval()


def prompts_of(count: int, seed: int = 0) -> dict[int, list[int]]:
    """Prompts of 1 to 5 tokens, the separator first."""
    random = np.random.default_rng(seed)
    return {number: [0, *random.integers(2, 40, random.integers(0, 5)).tolist()] for number in range(count)}


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@torch.inference_mode()
def test_at_temperature_0_it_is_what_generate_writes(teacher: LanguageModel, name: str) -> None:
    """Document by document, with rows taken over at different places and a slab that is cut many times."""
    if name != "llama":
        network = other_network(name)
        for parameter in network.parameters():
            parameter.mul_(6)  # or it would say one thing for ever
        teacher = wrap(network, teacher.tokenizer, name)
    prompts = prompts_of(9)
    model: Any = teacher.model
    padding = list(range(teacher.vocab_size, model.config.vocab_size)) or None
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, "suppress_tokens": padding}
    once = [model.generate(torch.tensor([ids]), eos_token_id=0, **options)[0].tolist() for ids in prompts.values()]
    # One that comes up in about half of the documents, so that they end.
    ends = frozenset({0, min(range(2, 40), key=lambda token: abs(sum(token in ids for ids in once) - 4))})
    config = WritingConfig(documents=9, max_tokens=16, temperature=0, batch_size=4)
    found = {document.number: document for document in TeacherWriter(teacher, config, ends).write(prompts)}
    assert sorted(found) == sorted(prompts)
    ended = 0
    for number, ids in prompts.items():
        options["max_new_tokens"] = 17 - len(ids)
        expected = model.generate(torch.tensor([ids]), eos_token_id=sorted(ends), **options)[0].tolist()
        is_end = len(expected) > len(ids) and expected[-1] in ends
        assert found[number].ids == expected[1 : len(expected) - is_end]
        assert found[number].ended == is_end and found[number].prompt == len(ids) - 1
        ended += is_end
    assert ended > 1 and (ended < 9 or name == "gpt2"), "some end by themselves, some are cut"


def chi_square(counts_V: np.ndarray, probs_V: np.ndarray) -> tuple[float, int]:
    """The statistic, outcomes that are expected less than five times as one, and its degrees of freedom."""
    expected_V = probs_V * counts_V.sum()
    often = expected_V >= 5
    found, wanted = (
        np.append(counts_V[often], counts_V[~often].sum()),
        np.append(expected_V[often], expected_V[~often].sum()),
    )
    kept = wanted > 0.5
    return float(((found - wanted) ** 2 / wanted.clip(0.5))[kept].sum()), int(kept.sum()) - 1


@torch.inference_mode()
def test_tokens_come_as_often_as_the_softmax_says(teacher: LanguageModel) -> None:
    """First tokens, and second ones after the most frequent first; top-k and top-p leave tokens out."""
    config = WritingConfig(documents=1500, max_tokens=3, temperature=0.5, batch_size=500, seed=1)
    written = list(TeacherWriter(teacher, config, frozenset({0})).write({n: [0, 5] for n in range(1500)}))
    first = [document.ids[1] if len(document.ids) > 1 else 0 for document in written]
    counts_V = np.bincount(first, minlength=teacher.vocab_size)

    def probs(ids: list[int], temperature: float = 0.5) -> np.ndarray:
        logits_V = teacher.model(torch.tensor([ids])).logits[0, -1, : teacher.vocab_size].double()
        return torch.softmax(logits_V / temperature, -1).numpy()

    value, freedom = chi_square(counts_V, probs([0, 5]))
    assert freedom > 8 and value < freedom + 4 * (2 * freedom) ** 0.5
    assert chi_square(counts_V, probs([0, 5], 0.75))[0] > freedom + 10 * (2 * freedom) ** 0.5, (
        "the test sees a wrong one"
    )
    common = int(counts_V[1:].argmax()) + 1
    second = [document.ids[2] if len(document.ids) > 2 else 0 for document in written if document.ids[1:2] == [common]]
    value, freedom = chi_square(np.bincount(second, minlength=teacher.vocab_size), probs([0, 5, common]))
    assert freedom > 3 and value < freedom + 4 * (2 * freedom) ** 0.5
    config = WritingConfig(documents=300, max_tokens=2, top_p=0.5, top_k=30, batch_size=100)
    written = list(TeacherWriter(teacher, config, frozenset({0})).write({n: [0, 5] for n in range(300)}))
    falling = np.argsort(-probs([0, 5], 1.0))
    nucleus = falling[: int(np.searchsorted(probs([0, 5], 1.0)[falling].cumsum(), 0.5)) + 1]
    found = {document.ids[1] if document.ids[1:] else 0 for document in written}
    assert found <= set(nucleus.tolist()) and len(found) > len(nucleus) - 3


def test_a_document_does_not_depend_on_its_batch(teacher: LanguageModel) -> None:
    """Its random numbers are its own. (In fp32; what rounding does to a draw in bf16 is why shards are the unit.)"""
    prompts = prompts_of(11)
    alone, together = (
        {
            document.number: document
            for document in TeacherWriter(
                teacher, WritingConfig(documents=11, max_tokens=20, batch_size=size, seed=2), frozenset({0})
            ).write(prompts)
        }
        for size in (1, 5)
    )
    assert alone == together
    assert len({tuple(document.ids) for document in alone.values()}) == 11, "each document draws for itself"


def test_teachers_that_cannot_write(teacher: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WritingConfig(documents=1, max_tokens=300)
    with pytest.raises(UserError, match="max_tokens: 300, but .* at most 256"):
        TeacherWriter(teacher, config, frozenset({0}))
    config = WritingConfig(documents=1)
    lstm = LSTMForCausalLM(LSTMConfig(vocab_size=40, embedding_size=8, hidden_size=8, num_layers=1)).eval()
    with pytest.raises(UserError, match="goes on from keys and values"):
        TeacherWriter(wrap(lstm, teacher.tokenizer, "lstm"), config, frozenset({0}))
    # A model that does not keep to its mask would read what stood in the row before.
    read_on = LanguageModel.read_on
    monkeypatch.setattr(
        LanguageModel, "read_on", lambda self, ids, at, seen, cache: read_on(self, ids, at, seen | True, cache)
    )
    with pytest.raises(UserError, match="token by token in a batch"):
        TeacherWriter(teacher, config, frozenset({0}))
    monkeypatch.undo()
    with pytest.raises(UserError, match="found one in shards"):
        TeacherWriter(
            LanguageModel(teacher.model, teacher.tokenizer, teacher.head, "x", lockstep=object()), config, frozenset()
        )  # type: ignore[arg-type]


# ---------------------------------------------------------------- the data set


def make_recipe(world: World, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(str(world.recipe), [WRITING, f"writing.folder={folder}", *overrides])


def written_by(recipe: Recipe) -> WrittenText:
    written = TeacherAndText(recipe, start_accelerator(recipe)).written
    assert written is not None
    return written


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "data").iterdir())}


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> WrittenText:
    """40 documents in shards of 16, written without a stop."""
    return written_by(make_recipe(world, tmp_path_factory.mktemp("written")))


def test_the_data_set(whole: WrittenText, world: World, teacher: LanguageModel) -> None:
    rows = datasets.load_dataset(str(whole.folder), split="train", cache_dir=str(world.folder / "hf"))
    assert rows["document"] == list(range(40)) and len(content(whole.folder)) == 3
    corpus = load_corpus(load_recipe(str(world.recipe)).corpus, teacher.tokenizer, progress=False)
    lengths = set()
    for row in rows:
        assert row["prompt"] == 2 and row["ids"][:2] == corpus.train.document(row["document"])[1:3].tolist()
        assert row["text"] == teacher.tokenizer.decode(row["ids"], skip_special_tokens=True)
        assert row["ended"] or len(row["ids"]) == 8
        lengths.add(len(row["ids"]))
    assert len(lengths) > 1
    figures = whole.figures()
    assert figures["documents"] == 40 and figures["tokens"] == sum(len(row["ids"]) - 2 for row in rows)


def test_killed_and_gone_on_with_it_is_the_same(world: World, whole: WrittenText, tmp_path: Path) -> None:
    """SIGKILL where the second shard lies there without its record; nothing that was finished is written again."""
    recipe = make_recipe(world, tmp_path / "written")
    child = os.fork()
    if child == 0:
        write_json = module.write_json

        def deadly(file: Path, *rest: Any) -> None:
            if file.name == "00001.json":
                os.kill(os.getpid(), signal.SIGKILL)
            write_json(file, *rest)

        module.write_json = deadly
        try:
            written_by(recipe)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    data = tmp_path / "written" / "data"
    assert sorted(file.name for file in data.iterdir()) == ["train-00000.parquet", "train-00001.parquet"]
    first = (data / "train-00000.parquet").stat().st_mtime_ns
    assert written_by(recipe).missing() == []
    assert content(tmp_path / "written") == content(whole.folder)
    assert (data / "train-00000.parquet").stat().st_mtime_ns == first


def test_two_processes_write_what_one_does(
    world: World, whole: WrittenText, teacher: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads here, with the barriers of processes."""
    recipe, barrier = make_recipe(world, tmp_path / "written"), threading.Barrier(2, timeout=60)
    corpus = load_corpus(recipe.corpus, teacher.tokenizer, progress=False)
    saved: list[tuple[int, int]] = []
    save = WrittenText.save

    def noting(self: WrittenText, number: int, *rest: Any) -> None:
        saved.append((int(threading.current_thread().name[-1]), number))
        save(self, number, *rest)

    def process(rank: int) -> WrittenText:
        rank_of = {"process_index": rank, "num_processes": 2, "is_main_process": rank == 0}
        return write_text(recipe, teacher, corpus, SimpleNamespace(**rank_of, wait_for_everyone=barrier.wait))  # type: ignore[arg-type]

    monkeypatch.setattr(WrittenText, "save", noting)
    with ThreadPoolExecutor(2, "rank") as pool:
        assert all(written.missing() == [] for written in pool.map(process, range(2)))
    assert len({rank for rank, _ in saved}) == 2 and sorted(number for _, number in saved) == [0, 1, 2]
    assert content(tmp_path / "written") == content(whole.folder)


def test_what_is_damaged_is_written_again(
    world: World, whole: WrittenText, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(world, tmp_path / "written")
    written = written_by(recipe)
    file = written.file(1)
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-100]), file.unlink):
        damage()
        with pytest.raises(UserError, match="1 of 3 shards .* train-00001.parquet .* distill.write"):
            list(open_documents(recipe.corpus.model_copy(update={"source": str(written.folder)}), progress=False))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert written_by(recipe).missing() == []
        assert ["train-00001" in message for message in caplog.messages] == [True] * len(caplog.messages)
        assert content(written.folder) == content(whole.folder)


def test_text_of_another_teacher_or_other_settings_is_refused(
    world: World, whole: WrittenText, other_weights: Path, tmp_path: Path
) -> None:
    before = content(whole.folder)
    for override, named in (
        ("writing.temperature=0.5", "temperature: it has 1.0, the run 0.5"),
        ("writing.documents=41", "documents: it has 40, the run 41"),
        (f"teacher.model={other_weights}", "teacher_weights: it has "),
        ("corpus.max_documents=200", "prompts: it has "),
    ):
        with pytest.raises(UserError, match="another recipe or teacher") as caught:
            written_by(make_recipe(world, whole.folder, override))
        assert named in str(caught.value) and str(caught.value).count("\n") == 1
    assert content(whole.folder) == before
    broken = tmp_path / "broken"
    written_by(make_recipe(world, broken, "writing.documents=3"))
    (broken / "written.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="expected the manifest of written text"):
        written_by(make_recipe(world, broken, "writing.documents=3"))


# ---------------------------------------------------------------- the text of a run


def test_beside_the_text_it_is_trained_on_alone(
    world: World, whole: WrittenText, teacher: LanguageModel, tmp_path: Path
) -> None:
    recipe = make_recipe(world, whole.folder)
    parts = TeacherAndText(recipe, start_accelerator(recipe))
    real = load_corpus(recipe.corpus, teacher.tokenizer, progress=False)
    for side in ("validation", "test"):
        assert np.array_equal(getattr(parts.corpus, side).tokens, getattr(real, side).tokens)
    texts = [text for number in range(3) for text in parquet.read_table(whole.file(number))["text"].to_pylist()]
    kept = [text for text in texts if side_of(text, recipe.corpus) == "train"]
    assert 0 < len(kept) < len(texts)
    found = [parts.corpus.train.document(n) for n in range(len(real.train), len(parts.corpus.train))]
    assert [teacher.tokenizer.decode(tokens_N[1:]) for tokens_N in found] == kept
    assert np.array_equal(parts.corpus.train.tokens[: len(real.train.tokens)], real.train.tokens)
    assert parts.text_of_source.split.tokens.tolist() == real.train.tokens.tolist()
    assert parts.corpus.fingerprint != real.fingerprint

    # What the teacher knows by heart stays out: a document of validation, written word by word.
    heart = tmp_path / "heart"
    copied = WrittenText.claim(heart, {}, "x", 1, 1)
    ids = real.validation.document(0)[1:].tolist()
    copied.save(0, [WrittenDocument(0, ids, 0, True)], [teacher.tokenizer.decode(ids)], 1.0)
    more = recipe.corpus.model_copy(update={"source": str(heart)})
    assert len(load_corpus(recipe.corpus, teacher.tokenizer, written=more, progress=False).train) == len(real.train)


def test_a_run_without_any_text(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped recipe on the tiny teacher: the command writes, from nothing but the separator; then a run trains and
    is validated on that, with a stage in which the student writes as well."""
    recipe_file = str(ROOT / "recipes" / "written.yaml")
    stages = [
        {"objective": "cross_entropy", "length": {"steps": 2}},
        {"objective": "jsd", "length": {"steps": 2}, "student_written": 0.5},
    ]
    overrides = (
        *(f"teacher.model={world.teacher}", "corpus.separator=<|end|>", "student.hidden_size=8", "run.precision=fp32"),
        *(f"corpus.cache_dir={tmp_path / 'cache'}", f"run.output_dir={tmp_path}", "tracking=none", "run.batch_size=4"),
        *("writing.documents=150", "writing.max_tokens=12", "corpus.block_length=24", f"stages={json.dumps(stages)}"),
        *("evaluation.decode_seconds=0.01", "evaluation.new_tokens=4", "run.threads=1"),
    )
    recipe = load_recipe(recipe_file, overrides)
    with pytest.raises(UserError, match="distill.write"):
        plan(recipe_file, overrides, 1.0, 1.0, None, 0.0)
    assert write.main([recipe_file, *overrides]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["folder"] == str(written_folder(recipe)) and printed["documents"] == 150
    monkeypatch.setattr(TeacherWriter, "write", None)  # all of it is there
    result = run(recipe)
    assert result["written"]["tokens"] == printed["tokens"] > 300
    student, seconds = result["student"], result["written"]["seconds"]
    assert student["train_seconds"] > student["teacher_seconds"] > seconds > 0, "writing counts as training"
    assert 0 < student["writing_share"] < 1 and student["writing_seconds"] < student["train_seconds"] - seconds
    documents = len(list(open_documents(text_of(recipe), progress=False)))
    assert result["corpus"]["train_documents"] < documents == 150 - blanks(recipe)
    assert result["corpus"]["validation_documents"] > 3
    assert run_eval("perplexity", str(recipe.folder)).returncode == 0, "an evaluation finds the same text"


def blanks(recipe: Recipe) -> int:
    """Documents that the teacher ended at once."""
    tables = [parquet.read_table(file) for file in sorted((written_folder(recipe) / "data").iterdir())]
    return sum(not text.strip() for table in tables for text in table["text"].to_pylist())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["corpus.source="], "corpus.source: required"),
        ([WRITING, "corpus.source="], "writing.prompt_tokens: 2, but there is no corpus.source"),
        ([WRITING, "corpus.streaming=true"], "corpus.streaming: written text is not added to a stream"),
        ([WRITING, "writing.prompt_tokens=8"], "prompt_tokens (8) must be below max_tokens (8)"),
        ([WRITING, "writing.top_p=0"], "writing.top_p"),
        (["writing.max_tokens=5"], "writing.documents: required"),
    ],
)
def test_recipes_that_cannot_work(world: World, overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(str(world.recipe), overrides)
    assert expected in str(caught.value) and "1 problem" in str(caught.value)


def test_neither_prompt_nor_separator(world: World, tmp_path: Path) -> None:
    """A tokenizer that ends no text cannot begin one either."""
    folder = tmp_path / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    load_language_model(str(world.teacher), device=CPU).model.save_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    recipe = load_recipe(
        str(world.recipe), [WRITING, "corpus.source=", "writing.prompt_tokens=0", f"teacher.model={folder}"]
    )
    with pytest.raises(UserError, match="corpus.separator: expected a token"):
        TeacherAndText(recipe, start_accelerator(recipe))


def test_what_ends_a_document(teacher: LanguageModel) -> None:
    assert ends_of(teacher, 7) == {0, 7}
    generation = teacher.model.generation_config
    before, generation.eos_token_id = generation.eos_token_id, [0, 9]  # type: ignore[union-attr]
    try:
        assert ends_of(teacher, 7) == {0, 7, 9}
    finally:
        generation.eos_token_id = before  # type: ignore[union-attr]
