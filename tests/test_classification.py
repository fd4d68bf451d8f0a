"""A classifier's whole line through the real command: result, folders, resuming, publishing, and what is refused.

python -m pytest tests/test_classification.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import result_of, run_command, run_stranger
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from benchmarks.tiny import WORDS, save_llama, save_tokenizer
from distill.checkpoint import write_json
from distill.classify import ClassifierTraining
from distill.cli import main
from distill.config import Recipe, UserError
from distill.hub import main as publish
from distill.job import run
from distill.progress import Interrupted
from distill.recipe import dump_recipe, load_recipe
from distill.sealed import seal
from distill.student import LSTMConfig, LSTMForCausalLM, LSTMForSequenceClassification
from eval.perplexity import main as eval_perplexity
from eval.report import collect
from eval.report import main as eval_report

KINDS = {"person": ["king", "queen", "wrote", "book"], "place": ["city", "road", "bridge", "market"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model that becomes the teacher, texts of two kinds, some without a label, and a recipe."""
    folder, rng, rows = tmp_path_factory.mktemp("classes"), random.Random(0), []
    for number in range(120):
        kind = rng.choice(list(KINDS))
        words = rng.choices(WORDS, k=rng.randint(3, 9)) + rng.choices(KINDS[kind], k=4)
        rows.append({"text": " ".join(rng.sample(words, len(words))), "kind": kind if number % 10 else None})
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_tokenizer(folder / "teacher", WORDS)
    save_llama(folder / "teacher", vocab_size=64, initializer_range=0.2)
    content = {
        "run": {"name": "tiny", "output_dir": str(folder / "runs"), "precision": "fp32", "batch_size": 8, "threads": 1},
        "teacher": {"model": str(folder / "teacher"), "dtype": "fp32"},
        "student": {"hidden_size": 8, "num_layers": 1, "output_dropout": 0.1},
        "corpus": {"source": str(folder / "texts.jsonl"), "validation_fraction": 0.2, "test_fraction": 0.2},
        "classification": {"label_field": "kind", "max_length": 10},
        "fine_tuning": {"layers": 1, "length": {"steps": 4}, "batch_size": 8, "learning_rate": 0.01},
        "augmentation": {"copies": 2},
        "stages": [{"objective": {"logit_mse": 1.0, "cross_entropy": 0.5}, "length": {"steps": 6}}],
        "control": {"match": "tokens"},
        "evaluation": {"every": {"steps": 2}, "decode_seconds": 0.05, "batch_tokens": 100},
        "tracking": {"tracker": "none", "every": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """Its run, by the real command."""
    done = run_command(str(recipe))
    assert done.returncode == 0, done.stderr
    assert "2 classes" in done.stdout and "points of accuracy" in done.stdout
    return recipe.parent / "runs" / "tiny"


def weights(folder: Path) -> dict[str, bytes]:
    """What must be the same, bit by bit."""
    names = ("student/model.safetensors", "control/model.safetensors", "teacher/model.safetensors")
    files = (folder / name for name in (*names, "soft_targets/logits.safetensors"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.exists()}


def test_result_has_the_promised_fields(finished: Path) -> None:
    result = result_of(finished)
    for model in ("teacher", "student", "control"):
        figures = result[model]
        low, high = figures["accuracy_interval"]
        assert 0 <= low <= figures["accuracy"] <= high <= 1
        assert figures["texts"] == result["corpus"]["test_texts"]
        assert figures["latency_ms_p50"] > 0 and figures["parameters"] > 0
        assert ("top1_agreement" in figures) == (model != "teacher")
    assert result["student"]["parameters"] == result["control"]["parameters"]
    assert result["accuracy_gain"] == pytest.approx(result["student"]["accuracy"] - result["control"]["accuracy"])
    assert result["speedup"] == result["teacher"]["latency_ms_p50"] / result["student"]["latency_ms_p50"]
    corpus = result["corpus"]
    assert corpus["unlabelled_texts"] == 12
    assert corpus["copies"] == 2 * (corpus["train_texts"] + corpus["unlabelled_texts"])
    assert result["targets"]["texts"] == corpus["copies"] + corpus["train_texts"] + corpus["unlabelled_texts"]
    assert corpus["train_texts"] + corpus["validation_texts"] + corpus["test_texts"] == 108
    assert result["student"]["train_seconds"] > result["student"]["teacher_seconds"] > 0
    assert set(result["curves"]) == {"teacher", "student", "control"}
    assert [point["step"] for point in result["curves"]["student"]] == [2, 4, 6]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (finished / "checkpoints" / "teacher").exists()


def test_the_tuned_teacher_gives_the_soft_targets(finished: Path) -> None:
    """In a fresh process's terms: the folder, read by the library, text by text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    teacher: Any = AutoModelForSequenceClassification.from_pretrained(finished / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(finished / "teacher")
    rows = [json.loads(line) for line in (finished.parent.parent / "texts.jsonl").read_text().splitlines()]
    texts_NC = load_file(finished / "soft_targets" / "logits.safetensors")["texts_NC"]
    assert len(texts_NC) == len(rows)
    said = {tuple(round(x, 3) for x in row) for row in texts_NC.tolist()}
    for row in rows[:20]:
        ids_1T = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=10)["input_ids"]
        assert tuple(round(x, 3) for x in teacher(ids_1T).logits[0].tolist()) in said


STRANGER = """
import json
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder, texts = sys.argv[1], json.loads(sys.argv[2])
classify = pipeline("text-classification", model=folder, trust_remote_code=True, device="cpu")
alone, together = [classify(text)[0] for text in texts], classify(texts, batch_size=len(texts))
assert [row["label"] for row in alone] == [row["label"] for row in together], (alone, together)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
print(json.dumps({"labels": [row["label"] for row in together], "logits": model(**batch).logits.tolist()}))
"""


def test_published_and_loaded_by_a_stranger(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish([str(finished), "me/tiny", "--license", "mit", "--dry-run"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    accuracy = result_of(finished)["student"]["accuracy"]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results or []}["accuracy"] == accuracy
    assert f"| student | {accuracy:.3f} |" in card.text and "person, place" in card.text
    texts = ["the king wrote a book", "a road"]
    found = run_stranger(STRANGER, str(folder), json.dumps(texts), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout.splitlines()[-1])
    student = LSTMForSequenceClassification.from_pretrained(finished / "student").eval()
    words = json.loads((finished / "student" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    for text, label, logits in zip(texts, said["labels"], said["logits"], strict=True):
        expected_C = student(torch.tensor([[words[word] for word in text.split()]])).logits[0]
        torch.testing.assert_close(torch.tensor(logits), expected_C)
        assert label == ["person", "place"][int(expected_C.argmax())]


def test_a_stopped_run_goes_on_bit_by_bit(recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped once in the teacher's fine-tuning, once in the student's, once in the control's training."""
    stops = iter([("teacher", 3), ("student", 5), ("control", 2), ("", 0)])
    waiting, step = next(stops), ClassifierTraining._step

    def interrupted(self: ClassifierTraining, *arguments: Any) -> Any:
        nonlocal waiting
        if (self.name, self.progress.now.steps) == waiting:
            waiting = next(stops)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(ClassifierTraining, "_step", interrupted)
    again = load_recipe(recipe, [f"run.output_dir={recipe.parent / 'again'}"])
    for _ in range(3):
        with pytest.raises(Interrupted):
            run(again)
    result = run(again)
    assert waiting == ("", 0)
    assert weights(recipe.parent / "again" / "tiny") == weights(finished)
    expected = result_of(finished)
    for name in ("teacher", "student", "control"):
        assert result[name]["accuracy"] == expected[name]["accuracy"]
        losses = [[point["nll_nats"] for point in found["curves"][name]] for found in (result, expected)]
        assert losses[0] == losses[1], name


def again_without_result(recipe: Path, finished: Path, name: str, *overrides: str) -> Recipe:
    """A run folder whose teacher has done its part, of a recipe without dropout and control."""
    words = [f"run.name={name}", "control=false", "student.output_dropout=0", *overrides]
    again = load_recipe(recipe, words)
    shutil.copytree(finished, again.folder, ignore=shutil.ignore_patterns("checkpoints", "result.json"))
    (again.folder / "recipe.yaml").write_text(dump_recipe(again), encoding="utf-8")
    return again


def test_how_a_batch_is_cut_changes_nothing_but_rounding_and_damage_is_mended(
    recipe: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = again_without_result(recipe, finished, "cut", "run.micro_batch_size=2")
    run(cut)
    assert "damaged" not in caplog.text
    whole = again_without_result(recipe, finished, "whole")
    logits = whole.folder / "soft_targets" / "logits.safetensors"
    logits.write_bytes(logits.read_bytes()[:-1] + b"x")
    run(whole)
    assert "soft_targets: damaged (soft_targets/logits.safetensors is missing or changed)" in caplog.text
    for name in ("soft_targets/logits.safetensors", "teacher/model.safetensors"):
        assert weights(whole.folder)[name] == weights(finished)[name]
    found, expected = (load_file(each.folder / "student" / "model.safetensors") for each in (cut, whole))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=name, rtol=1e-3, atol=1e-5)


def test_a_student_of_a_tuned_teacher_that_starts_from_another_student(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    """A teacher that is a classifier already, and a body distilled before: no fine-tuning, no copies."""
    save_tokenizer(tmp_path, WORDS)
    sizes = {"vocab_size": 40, "embedding_size": 12, "hidden_size": 16, "num_layers": 1}
    LSTMForCausalLM(LSTMConfig(**sizes)).save_pretrained(tmp_path)
    given = load_recipe(
        recipe,
        ["run.name=second", f"teacher.model={finished / 'teacher'}", "fine_tuning=null", "augmentation=null",
         f"classification.start_from={tmp_path}", "student.hidden_size=16", "stages.0.freeze=[embedding, body]",
         "stages.0.objective=forward_kl", "control=false", "classification.pooling=mean"],
    )  # fmt: skip
    result = run(given)
    assert result["teacher"]["accuracy"] == result_of(finished)["teacher"]["accuracy"]
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, given.folder / "student"))
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    assert len(before.keys() & after.keys()) > 10 and "score.weight" in after
    assert "accuracy_gain" not in result and list(result["curves"]) == ["student"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Language models to start from: without a tokenizer, and with one of another model, which knows a word more."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bare", "larger")}
    for folder in folders.values():
        sizes = {"vocab_size": 40, "embedding_size": 12, "hidden_size": 8, "num_layers": 1}
        LSTMForCausalLM(LSTMConfig(**sizes)).save_pretrained(folder)
    save_tokenizer(folders["larger"], [*WORDS, "elsewhere"])
    return folders


def test_a_run_does_not_go_on_with_another_tokenizer(recipe: Path, finished: Path) -> None:
    """Of the same size, so that nothing else tells."""
    again = again_without_result(recipe, finished, "other-tokens")
    tokenizer = recipe.parent / "teacher" / "tokenizer.json"
    before = tokenizer.read_text(encoding="utf-8")
    try:
        tokenizer.write_text(before.replace('"river"', '"rivet"'), encoding="utf-8")
        with pytest.raises(UserError, match="the student's tokenizer is not the one with which it was begun"):
            run(again)
    finally:
        tokenizer.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["classification.label_field=topic"], ["classification.label_field", "a field 'topic'", "text, kind"]),
        (["classification.labels=[person]"], ["two classes at least", "'person' alone"]),
        (["fine_tuning=null"], ["score.weight", "no classifier yet", "fine_tuning"]),
        (["fine_tuning.layers=9"], ["fine_tuning.layers", "(2)", "found 9"]),
        (["run.batch_size=512"], ["run.batch_size", "512"]),
        (["classification.start_from=/no/model"], ["start_from", "/no/model"]),
        (["classification.start_from={bare}"], ["classification.start_from: ", "its tokenizer cannot be loaded"]),
        (["classification.start_from={larger}"], ["start_from: ", "ids up to 40, but its embedding 40 rows"]),
        (["classification.max_length=257"], ["classification.max_length", "the 256 tokens that teacher", "found 257"]),
        (["corpus.block_length=8"], ["corpus.block_length: is for language models"]),
        (["targets.cache=true"], ["targets.cache: is for language models"]),
        (["student.vocabulary_min_count=2"], ["student.vocabulary_min_count: is for language models"]),
        (["stages.0.candidates=5"], ["stages.0.candidates: is for language models"]),
        (["stages.0.objective=hidden_mse"], ["stages.0.objective: hidden_mse is for language models"]),
        (["corpus.test_fraction=0"], ["corpus.test_fraction: expected more than 0"]),
        (["augmentation.mask=0.8", "augmentation.replace=0.3"], ["mask + replace must be at most 1, found 1.1"]),
        (["classification=null"], ["fine_tuning is for classifiers", "logit_mse is for"]),
    ],
)
def test_refused(
    recipe: Path,
    tmp_path: Path,
    started: dict[str, Path],
    overrides: list[str],
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [override.format_map(started) if "start_from" in override else override for override in overrides]
    assert main([str(recipe), f"run.output_dir={tmp_path}", *given]) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    for part in expected:
        assert part in message
    assert not list(tmp_path.glob("tiny/[cst]*")), "before any work"


def test_a_teacher_with_other_labels_is_refused(recipe: Path, finished: Path) -> None:
    base = [f"teacher.model={finished / 'teacher'}", "fine_tuning=null", "run.name=other"]
    with pytest.raises(UserError, match=r"has 2 labels \(person, place\), expected 3; .*labels: person, place, the"):
        rows = (recipe.parent / "texts.jsonl").read_text(encoding="utf-8")
        (recipe.parent / "three.jsonl").write_text(rows.replace("null", '"the"'), encoding="utf-8")
        run(load_recipe(recipe, [*base, f"corpus.source={recipe.parent / 'three.jsonl'}"]))


def test_what_is_for_language_models_says_so(finished: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distill.plan import main as plan

    for command, words in ((eval_perplexity, [str(finished)]), (plan, [str(recipe)])):
        assert command(words) == 2
        message = capsys.readouterr().err
        assert "classifier" in message and "Traceback" not in message, message


def test_the_report_of_classifiers(finished: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(finished, twin)
    assert eval_report([str(finished), str(twin), "--measure", "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    names = [f"{run} {role}" for run in ("tiny", "twin") for role in ("teacher", "student", "control")]
    assert [point["name"] for point in report["points"]] == names, "a teacher is of its run"
    result = result_of(finished)
    for point, role in zip(report["points"][:3], ("teacher", "student", "control"), strict=True):
        for name in ("accuracy", "accuracy_interval", "latency_ms_p50", "parameters"):
            assert point[name] == result[role][name]
        assert point["top1_agreement"] == result[role].get("top1_agreement")
    table = (tmp_path / "report" / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + len(names) and "agreement with the teacher" in table[0]
    assert f"| {result['student']['accuracy']:.3f} |" in table[3]
    for part in ("agrees with it on", f"{result['student']['texts']} texts", "trained on the labels alone"):
        assert part in report["sentence"]
    assert report["sentence"] in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "report" / "frontier.png").stat().st_size > 10_000


def test_classifiers_that_do_not_compare_are_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    result = result_of(other)
    result["corpus"]["fingerprint"] = "another"
    write_json(other / "result.json", seal(result))
    with pytest.raises(UserError, match="tiny and other were tested on other texts"):
        collect([finished, other])
    monkeypatch.setattr("eval.report.read_result", lambda folder: {} if folder == tmp_path else result)
    with pytest.raises(UserError, match="is a classifier's run, .* a language model's: expected one kind"):
        collect([finished, tmp_path])
