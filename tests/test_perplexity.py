"""eval.perplexity against transformers' own loss, and its intervals and corpora against what is known of them.

python -m pytest tests/test_perplexity.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World, run_eval
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import EvaluationConfig, UserError
from distill.metrics import Documents, bootstrap_interval
from distill.teacher import load_language_model
from distill.torch_decoder import TorchDecoder
from eval.command import make_subjects, read_results
from eval.perplexity import evaluate, evaluate_decoder, figures_of

CPU = torch.device("cpu")
TEXTS = ["the river is old", "a young king found the bridge near the city", "war and peace"]


def printed(run) -> dict:
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def refused(run) -> str:
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    return run.stderr


def test_perplexity_is_that_of_transformers(world: World) -> None:
    """Its loss with labels is the mean over a document's tokens; weighted by tokens it must give ours."""
    network, tokenizer = (cls.from_pretrained(world.teacher) for cls in (AutoModelForCausalLM, AutoTokenizer))
    nats, tokens = 0.0, 0
    ids_n = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in TEXTS]
    for ids in ids_n:
        ids_1T = torch.tensor([ids])
        with torch.no_grad():
            logits = network(ids_1T).logits[0, :-1, : len(tokenizer)]  # the head's padding rows are no tokens
        nats += torch.nn.functional.cross_entropy(logits, ids_1T[0, 1:], reduction="sum").item()
        tokens += len(ids) - 1
    model = load_language_model(str(world.teacher), device=CPU, dtype="fp32")
    words, sizes = (np.array([measure(text) for text in TEXTS]) for measure in (lambda t: len(t.split()), len))
    documents = Documents([np.array(ids) for ids in ids_n], utf8_bytes=sizes, words=words)
    row = figures_of(model, documents, EvaluationConfig(window=64, context=8))
    assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / words.sum()), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes.sum(), rel=1e-5)
    assert (row["window"], row["stride"], row["documents"]) == (64, 56, 3)
    low, high = row["perplexity_interval"]
    assert low < row["perplexity"] < high


def test_a_student_in_its_decoder(run_folder: Path) -> None:
    """Token by token in fp32 it gives what the training's validation gives; the int8 one is near it."""
    student = run_folder / "student"
    model = load_language_model(str(student), device=CPU, dtype="fp32")
    ids_n = [np.array([model.tokenizer.eos_token_id, *model.tokenizer(text)["input_ids"]]) for text in TEXTS]
    documents = Documents(ids_n, utf8_bytes=np.ones(3), words=np.ones(3))
    whole, steps = evaluate(model, documents, EvaluationConfig()), evaluate_decoder(TorchDecoder(student), documents)
    assert steps.document_nll_nats == pytest.approx(whole.document_nll_nats, rel=1e-5)
    assert steps.tokens == whole.tokens == 16

    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    rows = printed(run_eval("perplexity", str(run_folder), "--decoder"))["models"]
    assert set(rows) == {"tiny student", "tiny control"}
    (found,) = rows["tiny student"].values()
    expected = json.loads((run_folder / "result.json").read_text())["student"]["nll_nats"]
    assert found["dtype"] == "int8" and 0 < abs(found["nll_nats"] - expected) < 0.02 * expected
    assert read_results(run_folder, "perplexity-int8")["models"]["student"] == rows["tiny student"]


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Documents of known mean loss 3: of 300 samples, the 90 % interval holds it about 270 times."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(300):
        tokens_n = rng.integers(5, 50, size=60)
        sums_n = tokens_n * (3 + rng.normal(0, 0.5, size=60))
        low, high = bootstrap_interval(sums_n, tokens_n, level=0.9, resamples=200, seed=trial) or (0.0, 0.0)
        hits += low < 3 < high
    assert 250 <= hits <= 288
    assert bootstrap_interval(np.array([7.0]), np.array([3])) is None


def test_several_corpora_in_one_call_and_one_of_one_token(world: World, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("river\n", encoding="utf-8")
    two.write_text("\n\n".join(TEXTS), encoding="utf-8")
    run = run_eval("perplexity", str(world.teacher), "--corpus", str(one), str(two))
    rows = printed(run)["models"][str(world.teacher)]
    assert rows["one.txt, all"]["tokens"] == 1
    assert rows["one.txt, all"]["perplexity_interval"] is None
    assert rows["two.txt, all"]["tokens"] == 16


def test_other_vocabularies_read_the_same_bytes(world: World, other_teacher: Path) -> None:
    """Within a limit that means something else to each tokenizer."""
    models = (str(world.teacher), str(other_teacher))
    run = run_eval("perplexity", *models, "--corpus", str(world.recipe), "--max-tokens", "60")
    ours, theirs = (next(iter(rows.values())) for rows in printed(run)["models"].values())
    assert theirs["tokens"] > 2 * ours["tokens"]
    assert [theirs[key] for key in ("documents", "utf8_bytes", "words")] == [
        ours[key] for key in ("documents", "utf8_bytes", "words")
    ]


def test_what_cannot_be_measured_is_named(world: World, tmp_path: Path, other_teacher: Path) -> None:
    run = tmp_path / "unfinished"
    run.mkdir()
    (run / "recipe.yaml").write_text(world.recipe.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match="finished run, found no student"):
        make_subjects([str(run)])
    assert read_results(run, "perplexity") is None
    (run / "eval").mkdir()
    (run / "eval" / "perplexity.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="perplexity.json: cannot be read"):
        read_results(run, "perplexity")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other_teacher / file).unlink()
    message = refused(run_eval("perplexity", str(other_teacher), "--corpus", str(world.recipe)))
    assert str(other_teacher) in message and "tokenizer" in message
    assert "--corpus" in refused(run_eval("perplexity", str(world.teacher)))
