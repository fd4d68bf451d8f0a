"""Every shipped recipe at toy scale, through the real command: tiny teachers and texts in place of its own.

    python -m pytest tests/test_recipes.py

What a recipe says of stages, losses, cells, tokenizers and targets stays; sizes, lengths and places are overridden.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT, result_of, run_command
from test_alignment import DOCUMENTS, END, byte_level
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.tiny import save_llama
from distill.recipe import load_recipe
from distill.student import LSTMConfig, LSTMForCausalLM

RECIPES = {file.stem: file for file in sorted((ROOT / "recipes").glob("*.yaml"))}
# Instead of the teacher of most recipes, a language model.
TEACHERS = {"lstm-teacher": "lstm", "bert-sst2": "classifier"}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, an LSTM and a classifier with byte-level tokens, and a text of two kinds."""
    folder, rng = tmp_path_factory.mktemp("toys"), random.Random(0)
    rows = [{"text": text, "kind": rng.choice(["even", "odd"])} for text in DOCUMENTS]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = byte_level(300, DOCUMENTS, pad_token="<|pad|>")
    for name in ("llama", "lstm", "classifier"):
        tokenizer.save_pretrained(folder / name)
    save_llama(folder / "llama", vocab_size=300, initializer_range=0.2)
    torch.manual_seed(0)
    LSTMForCausalLM(LSTMConfig(vocab_size=300, embedding_size=12, hidden_size=12, num_layers=1)).save_pretrained(
        folder / "lstm"
    )
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
    BertForSequenceClassification(BertConfig(vocab_size=300, **sizes, **labels)).save_pretrained(folder / "classifier")
    return folder


def toy_words(name: str, toys: Path, output: Path) -> list[str]:
    """Overrides that make a recipe small, from what it says itself."""
    recipe = load_recipe(str(RECIPES[name]), [])
    words = [
        *(f"run.output_dir={output}", "run.threads=1", "run.precision=fp32", "run.batch_size=4"),
        *(
            "run.micro_batch_size=null",
            "tracking=none",
            "evaluation.every={steps: 2}",
            "evaluation.decode_seconds=0.02",
        ),
        *(f"teacher.model={toys / TEACHERS.get(name, 'llama')}", "teacher.dtype=fp32"),
        *("corpus.validation_fraction=0.2", "corpus.text_field=text", "corpus.name=null"),
        *(f"stages.{number}.length={{steps: 2}}" for number in range(len(recipe.stages))),
    ]
    if recipe.corpus.source:
        words.append(f"corpus.source={toys / 'text.jsonl'}")
    if recipe.control.enabled:
        words.append("control.match=tokens")
    if recipe.student.is_fresh_lstm:
        words += ["student.hidden_size=8", "student.num_layers=1"]
    else:
        words += [f"student.config={toys / 'llama'}", "student.overrides={num_hidden_layers: 1}"]
    if recipe.fine_tuning:
        words += ["fine_tuning={layers: 1, length: {steps: 2}, batch_size: 4}"]
    if recipe.augmentation:
        words += ["augmentation.copies=1"]
    if recipe.classification:
        words += ["classification.label_field=kind", "classification.labels=null", "corpus.test_fraction=0.2"]
        return [*words, "classification.test_split=null"]
    words += [
        *(f"corpus.separator={END}", "corpus.block_length=12", f"corpus.cache_dir={output / 'cache'}"),
        *("teacher.context=4", "evaluation.new_tokens=2", "evaluation.window=16", "evaluation.context=8"),
        *("evaluation.prompts=[the]", "evaluation.max_tokens=400"),
    ]
    if recipe.corpus.streaming:
        words += ["corpus.sample_documents=120", "corpus.max_documents=200"]
    if recipe.student.is_fresh_lstm:
        words += ["student.fit_tokens=128"]
    if recipe.student.embedding_size:
        words += ["student.embedding_size=4"]
    if recipe.endpoint:
        words += ["endpoint=null"]  # tests/test_served.py has servers
    if recipe.student.vocabulary_size:
        words += ["student.vocabulary_size=280"]
    if recipe.writing:
        words += ["writing.documents=24", "writing.max_tokens=16", "writing.batch_size=8"]
        words += ["writing.prompt_tokens=2"] if recipe.writing.prompt_tokens else []
    if recipe.targets.k > 8:
        words += ["targets.k=8"]
    if recipe.targets.max_tokens:
        words += ["targets.max_tokens=600"]
    words += [f"stages.{n}.candidates=16" for n, stage in enumerate(recipe.stages) if stage.candidates]
    words += [f"stages.{n}.written_prompt=4" for n, stage in enumerate(recipe.stages) if stage.student_written]
    return [*words, "control.candidates=16"] if recipe.control.candidates else words


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs(name: str, toys: Path, tmp_path: Path) -> None:
    words = toy_words(name, toys, tmp_path)
    made = run_command(str(RECIPES[name]), *words)
    assert made.returncode == 0, made.stderr
    recipe = load_recipe(str(RECIPES[name]), words)
    result = result_of(recipe.folder)
    assert ("control" in result) == recipe.control.enabled
    assert result["student"]["tokens_trained"] > 0
    assert [stage.objective for stage in recipe.stages] == [
        stage.objective for stage in load_recipe(str(RECIPES[name]), []).stages
    ]
    if recipe.classification:
        assert 0 <= result["student"]["accuracy"] <= 1
    else:
        assert result["student"]["tokens_trained"] == 2 * len(recipe.stages) * 4 * 12
        assert result["student"]["nll_nats"] > 0 and result["targets"]["cached"] == recipe.targets.cache
