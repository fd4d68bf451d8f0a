"""A trimmed vocabulary: what stays the same, what is cut, and a whole run with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World, result_of, run_command, run_eval, save_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.tiny import WORDS
from distill.config import TeacherConfig, UserError
from distill.teacher import load_teacher
from distill.vocabulary import trim_tokenizer

TEXT = [" ".join(WORDS[start : start + 9]) for start in range(0, 18, 3)]
END = "<|end|>"


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """A tokenizer with merges for more words than a text of ours will have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=[END, "<|start|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + " elephant microscope nevertheless"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.token_to_id("<|start|>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token="<|start|>")


WHOLE = byte_level_bpe()


def occurrences(texts: list[str]) -> np.ndarray:
    ids = [index for text in texts for index in WHOLE(text, add_special_tokens=False)["input_ids"]]
    return np.bincount(ids, minlength=len(WHOLE))


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_training_text_keeps_its_tokens() -> None:
    trimmed = trim_tokenizer(WHOLE, occurrences(TEXT), 1)
    assert trimmed.counts["cut_tokens"] > 20
    assert len(trimmed.tokenizer) == trimmed.counts["kept_tokens"] == len(trimmed.teacher_ids_V)
    for text in TEXT:
        assert pieces(trimmed.tokenizer, text) == pieces(WHOLE, text)
        ids = trimmed.tokenizer(text)["input_ids"]
        assert trimmed.teacher_ids_V[ids].tolist() == WHOLE(text)["input_ids"]


def test_the_same_token_has_the_teachers_id() -> None:
    trimmed = trim_tokenizer(WHOLE, occurrences(TEXT), 1)
    whole = WHOLE.get_vocab()
    for token, index in trimmed.tokenizer.get_vocab().items():
        assert trimmed.teacher_ids_V[index] == whole[token]
    assert trimmed.tokenizer.eos_token == END


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.text(alphabet="abcdeghinrsty ", max_size=30), max_size=4), other=st.text(max_size=30))
def test_any_text_comes_back(texts: list[str], other: str) -> None:
    """Whatever the tokens are chosen from, their own text is cut as before, and any other is spelled."""
    trimmed = trim_tokenizer(WHOLE, occurrences(texts), 1)
    for text in texts:
        assert pieces(trimmed.tokenizer, text) == pieces(WHOLE, text)
    ids = trimmed.tokenizer(other, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert trimmed.tokenizer.decode(ids) == other


def test_rare_tokens_fall_apart() -> None:
    """A token that occurs less often than asked for is cut into its pieces, and spells the same."""
    counts = occurrences([*TEXT, *TEXT, "young bridge"])
    assert "Ġbridge" in pieces(WHOLE, "young bridge")
    for min_count, kept in ((1, True), (3, False)):
        smaller = trim_tokenizer(WHOLE, counts, min_count).tokenizer
        assert ("Ġbridge" in pieces(smaller, "young bridge")) == kept
        assert smaller.decode(smaller("young bridge", add_special_tokens=False)["input_ids"]) == "young bridge"


def test_a_tokenizer_without_bytes_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="expected a byte-level BPE tokenizer.*found WordLevel"):
        trim_tokenizer(AutoTokenizer.from_pretrained(world.teacher), np.ones(50), 1)


@pytest.fixture(scope="module")
def bpe_world(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny world with a teacher that speaks bytes."""
    folder = tmp_path_factory.mktemp("bpe")
    WHOLE.save_pretrained(folder)
    save_llama(folder, vocab_size=len(WHOLE), initializer_range=0.2)
    return replace(world, teacher=folder)


def test_trimmed_teacher_says_what_the_whole_one_says(bpe_world: World) -> None:
    """Its logits are the whole one's at the kept tokens."""
    teacher = load_teacher(TeacherConfig(model=str(bpe_world.teacher), dtype="fp32"), torch.device("cpu"))
    trimmed = trim_tokenizer(teacher.tokenizer, occurrences(TEXT), 1)
    smaller = teacher.trimmed(trimmed.tokenizer, trimmed.teacher_ids_V)
    whole_1T, kept_1T = (torch.tensor([tokenizer(TEXT[0])["input_ids"]]) for tokenizer in (WHOLE, smaller.tokenizer))
    expected = teacher.head.logits(teacher.hidden(whole_1T))[..., torch.from_numpy(trimmed.teacher_ids_V)]
    torch.testing.assert_close(smaller.head.logits(smaller.hidden(kept_1T)), expected)
    embedding_Vd = teacher.model.get_input_embeddings().weight
    torch.testing.assert_close(smaller.embedding_Vd, embedding_Vd[torch.from_numpy(trimmed.teacher_ids_V)])


def test_a_run_with_a_trimmed_vocabulary(bpe_world: World, tmp_path: Path) -> None:
    done = run_command(
        str(bpe_world.recipe), f"teacher.model={bpe_world.teacher}", f"run.output_dir={tmp_path}", "control=false",
        "student.vocabulary_min_count=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "tiny")
    counts = result["vocabulary"]
    assert counts["train_tokens"] == counts["train_tokens_before"]
    assert counts["kept_tokens"] + counts["cut_tokens"] == counts["teacher_tokens"] == len(WHOLE)
    config = json.loads((tmp_path / "tiny" / "student" / "config.json").read_text())
    assert config["vocab_size"] == counts["kept_tokens"] < len(WHOLE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny" / "student")
    assert len(tokenizer) == counts["kept_tokens"]
    # The same documents: as many bytes, and here as many tokens, for no validation word is new to the text.
    whole = counts["whole_teacher"]
    assert whole["tokens"] == result["teacher"]["tokens"]
    assert whole["nll_nats"] > result["teacher"]["nll_nats"]  # a smaller choice of tokens is easier

    # The evaluation reads the teacher in the student's tokens, as the training did.
    agreement = run_eval("agreement", str(tmp_path / "tiny"))
    assert agreement.returncode == 0, agreement.stderr
    (row,) = json.loads(agreement.stdout.splitlines()[-1])["models"].values()
    for name in ("kl_to_teacher_nats", "top1_agreement", "tokens"):
        assert row[name] == pytest.approx(result["student"][name], rel=1e-5), name
    written = run_eval("generate", str(tmp_path / "tiny"), "--texts", "3", "--new-tokens", "4", "--prompt-tokens", "2")
    assert written.returncode == 0, written.stderr
    rows = json.loads(written.stdout.splitlines()[-1])["models"]
    assert rows["tiny student"]["teacher_nll_nats"] > 0 and rows["teacher"]["texts"] == 3
