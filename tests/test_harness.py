"""eval.harness: its task from a text, and the peer's numbers against ours.

python -m pytest tests/test_harness.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_eval

from distill.config import CorpusConfig, EvaluationConfig, UserError
from distill.metrics import Documents, score
from distill.teacher import load_language_model
from eval.command import Text
from eval.harness import as_harness_model, passages, run_tasks, write_task

PROSE = [
    "the old king was in the city and the queen found a book near the river. a young queen wrote",
    "one two three four five six 1912. seven eight nine.",
    "short. text.",
]


def text_of(folder: Path, documents: list[str]) -> Text:
    file = folder / "prose.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return Text("prose", CorpusConfig(source=str(file)), "all", EvaluationConfig())


def test_passages_end_with_a_word_and_a_full_stop(tmp_path: Path) -> None:
    text = text_of(tmp_path, PROSE)
    assert list(passages(text, words=5)) == [
        {"passage": "the old king was in the city and the queen found a book near the", "word": "river"}
    ], "a number is no word, and two words are no passage"
    assert [found["word"] for found in passages(text, words=7)] == ["river", "nine"]


def test_rolling_log_likelihood_is_ours(other_teacher: Path) -> None:
    """The harness sums a text's log-likelihood after the end-of-text token, in windows; ours must be within 0.5 %.

    The teacher's head has no padding rows, which the harness would count as tokens.
    """
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from lm_eval.api.instance import Instance

    model = load_language_model(str(other_teacher), device=torch.device("cpu"), dtype="fp32")
    texts = ["the old king was in the city and the queen found a book", "a young queen wrote", "peace " * 30]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    peers = as_harness_model(model).loglikelihood_rolling(requests, disable_tqdm=True)
    tokens = [np.array([0, *model.tokenizer(text)["input_ids"]]) for text in texts]
    ours = score(model, Documents(tokens, np.ones(3), np.ones(3)), window=512)
    assert ours.tokens == sum(map(len, texts))
    assert -np.array(peers) == pytest.approx(np.array(ours.document_nll_nats), rel=0.005)


def test_last_word_task_gives_the_loss_of_the_last_words(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    words = PROSE[0].split(".")[0].split()
    text = text_of(tmp_path, [" ".join([*words[n:], *words[:n]]) + "." for n in range(12)])
    examples = list(passages(text, words=5))[:10]
    assert write_task(text, tmp_path, words=5, limit=10) == len(examples) > 5
    model = load_language_model(str(run_folder / "student"), device=torch.device("cpu"), dtype="fp32")
    found = run_tasks(model, ["last_word"], tmp_path, limit=10)["last_word"]
    logs, hits = [], []
    for example in examples:
        ids = model.tokenizer(f"{example['passage']} {example['word']}", return_tensors="pt")["input_ids"]
        log_q_V = model.model(ids).logits[0, -2].log_softmax(-1)
        logs.append(log_q_V[ids[0, -1]].item())
        hits.append(log_q_V.argmax() == ids[0, -1])
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(logs)), rel=1e-4)
    assert found["acc"] == pytest.approx(np.mean(hits))


def test_what_the_harness_does_not_know_is_named(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    run = run_eval("harness", str(run_folder / "student"), "--tasks", "no_such_task")
    assert run.returncode == 2 and "knows no no_such_task" in run.stderr
    with pytest.raises(UserError, match="more than 500 words"):
        write_task(text_of(tmp_path, PROSE), tmp_path, words=500, limit=3)


def test_a_missing_harness_is_named(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    model = load_language_model(str(run_folder / "student"), device=torch.device("cpu"), dtype="fp32")
    with pytest.raises(UserError, match=r"potstill\[harness\]"):
        as_harness_model(model)
