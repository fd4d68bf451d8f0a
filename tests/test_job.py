"""The whole line through the real command: what a run leaves behind, and the same numbers from `eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import World, result_of, run_command
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill.student  # noqa: F401  makes the Auto classes know the student
from distill.hub import write_card
from distill.recipe import load_recipe
from distill.result import compare


def test_result_has_the_promised_fields(run_folder: Path, world: World) -> None:
    result = result_of(run_folder)
    for model in ("teacher", "student", "control"):
        figures = result[model]
        assert {"perplexity", "bits_per_byte", "nll_nats", "tokens", "parameters"} <= set(figures)
        assert figures["perplexity"] == pytest.approx(torch.tensor(figures["nll_nats"]).exp().item(), rel=1e-5)
        assert figures["decode_tokens_per_second"] > 0
        if model != "teacher":
            assert 0 <= figures["top1_agreement"] <= 1
            assert figures["kl_to_teacher_nats"] > 0
    assert result["student"]["parameters"] == result["control"]["parameters"]
    assert result["distillation_gain_nats"] == pytest.approx(
        result["control"]["nll_nats"] - result["student"]["nll_nats"]
    )
    assert result["control"]["tokens_trained"] == result["student"]["tokens_trained"]
    assert {"teacher_and_text", "targets", "student", "control", "evaluation"} <= set(result["wall_seconds"])
    assert {"torch", "transformers", "accelerate", "potstill"} <= set(result["versions"])
    assert result["seed"] == 0
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(run_folder).teacher.model == str(world.teacher)


def test_control_has_nothing_from_the_teacher(run_folder: Path, world: World) -> None:
    """Its embedding differs from the teacher's from the start, and all of it is trained; the student's is a copy."""
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher).get_input_embeddings().weight
    student, control = (
        AutoModelForCausalLM.from_pretrained(run_folder / name).get_input_embeddings().weight
        for name in ("student", "control")
    )
    rows = len(student)
    correlation = torch.nn.functional.cosine_similarity(control.flatten(), teacher[:rows].flatten(), dim=0)
    assert abs(correlation.item()) < 0.2
    assert torch.nn.functional.cosine_similarity(student.flatten(), teacher[:rows].flatten(), dim=0) > 0.9


def test_final_student_is_a_plain_folder(run_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run_folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "student")
    output = model.generate(**tokenizer("the river", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= 5


def test_eval_perplexity_gives_the_same_numbers(run_folder: Path, world: World) -> None:
    run = run_command(
        str(run_folder), str(run_folder / "student"), "--corpus", str(run_folder),
        launcher=("-m", "eval.perplexity"),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout.splitlines()[-1])["models"]
    assert list(printed) == ["teacher", "tiny student", "tiny control", str(run_folder / "student")]
    assert printed["tiny student"] == printed[str(run_folder / "student")]
    kept = json.loads((run_folder / "eval" / "perplexity.json").read_text(encoding="utf-8"))["models"]
    assert list(kept.values()) == list(printed.values())[:3]
    result = result_of(run_folder)
    for role in ("teacher", "student", "control"):
        (row,) = kept[role].values()
        for figure in ("nll_nats", "perplexity", "bits_per_byte", "tokens"):
            assert row[figure] == pytest.approx(result[role][figure], rel=1e-6), (role, figure)


def test_eval_perplexity_of_a_text_file(world: World, tmp_path: Path) -> None:
    """All of a text, two models, one table; a model that does not exist is one clear error."""
    text = tmp_path / "text.txt"
    text.write_text("the river is old\n\na young king found the bridge\n", encoding="utf-8")
    run = run_command(str(world.teacher), "--corpus", str(text), launcher=("-m", "eval.perplexity"))
    assert run.returncode == 0, run.stderr
    row = json.loads(run.stdout.splitlines()[-1])["models"][str(world.teacher)]["text.txt, all"]
    assert row["tokens"] == 10
    missing = run_command("/no/model", "--corpus", str(text), launcher=("-m", "eval.perplexity"))
    assert missing.returncode == 2
    assert "/no/model" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_comparison_of_two_curves() -> None:
    """Losses on straight lines, so that every figure can be worked out by hand."""
    point = lambda seconds, tokens, nll: {"stage": 0, "seconds": seconds, "tokens": tokens, "nll_nats": nll}  # noqa: E731
    student = [point(0.0, 0, 10.0), point(10.0, 100, 6.0), point(20.0, 200, 5.0)]
    control = [point(0.0, 0, 10.0), point(20.0, 400, 8.0)]
    compared = compare(student, control)
    assert compared["distillation_gain_nats"] == pytest.approx(3.0)
    assert compared["time_to_control_loss"] == pytest.approx(5.0 / 20.0)
    assert compared["at_equal_tokens"] == pytest.approx(
        {"tokens": 200, "student_nll_nats": 5.0, "control_nll_nats": 9.0}
    )
    assert compare(control, student)["time_to_control_loss"] is None


def test_early_stopping_ends_a_stage(world: World, tmp_path: Path) -> None:
    """With a learning rate of nothing, validation cannot improve: the stage ends after `patience` validations."""
    run = run_command(
        str(world.recipe), f"run.output_dir={tmp_path}", "control=false", "evaluation.patience=2",
        "evaluation.every.steps=1", "stages.0.learning_rate=1e-30", "stages.1.learning_rate=1e-30",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    steps = [(p["stage"], p["step"]) for p in result_of(tmp_path / "tiny")["curves"]["student"]]
    assert steps == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6)]


def test_the_last_stage_decides_what_is_kept(world: World, tmp_path: Path) -> None:
    """A last stage that makes the loss worse is still what was asked for; of its validations the best one counts."""
    run = run_command(
        str(world.recipe), f"run.output_dir={tmp_path}", "evaluation.every.steps=2", "stages.0.length={steps: 4}",
        "stages.1.length={steps: 4}", "stages.1.learning_rate=1.0",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = result_of(tmp_path / "tiny")
    losses = {stage: [p["nll_nats"] for p in result["curves"]["student"] if p["stage"] == stage] for stage in (0, 1)}
    assert min(losses[0]) < min(losses[1]) < losses[1][-1]
    assert result["student"]["nll_nats"] == pytest.approx(min(losses[1]))
    gain = result["control"]["nll_nats"] - result["student"]["nll_nats"]
    assert result["distillation_gain_nats"] == pytest.approx(gain)


def test_model_card_says_what_was_measured(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_folder.parent.parent)  # what the recipe's output_dir is relative to
    recipe, result = load_recipe(run_folder), result_of(run_folder)
    write_card(recipe, result, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert {"potstill", "lstm"} <= set(card.data.tags or [])
    for model in ("teacher", "student", "control"):
        assert f"| {model} | {result[model]['perplexity']:.1f} |" in card.text
