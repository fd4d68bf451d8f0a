"""What the student starts from, against what it should be by definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import World, result_of, run_command

from distill.config import StudentConfig, TeacherConfig
from distill.geometry import Basis, HiddenMoments
from distill.groundwork import OutputFit
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import load_teacher
from distill.transplant import align_input, build_student, transplant_low_rank

CPU = torch.device("cpu")


def test_output_fit_is_ridge_regression() -> None:
    """Sums over pieces give what one least-squares problem with the penalty as extra rows gives."""
    generator = torch.Generator().manual_seed(0)
    features_NH = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    hidden_Nd = features_NH @ torch.randn(7, 3, generator=generator, dtype=torch.float64) + 5
    hidden_Nd += torch.randn(200, 3, generator=generator, dtype=torch.float64)
    fit = OutputFit(7, 3, CPU)
    for part in (slice(0, 50), slice(50, 200)):
        fit.add(features_NH[part], hidden_Nd[part])
    weight_dH, bias_d = fit.solve()

    penalty_HH = torch.eye(8, dtype=torch.float64)[:7] * (OutputFit.RIDGE * 200) ** 0.5
    rows = torch.cat([torch.cat([features_NH, torch.ones(200, 1, dtype=torch.float64)], 1), penalty_HH])
    targets = torch.cat([hidden_Nd, torch.zeros(7, 3, dtype=torch.float64)])
    expected_Hd = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(weight_dH, expected_Hd[:7].t())
    torch.testing.assert_close(bias_d, expected_Hd[7])


@pytest.mark.parametrize("tied", [None, True])
def test_embedding_and_head_are_the_teachers(world: World, tied: bool | None) -> None:
    teacher = load_teacher(TeacherConfig(model=str(world.teacher), dtype="fp32"), CPU)
    student = build_student(StudentConfig(tie_embeddings=tied), teacher, 0, seed=0, transplant=True)
    rows = teacher.vocab_size
    assert student.config.tie_word_embeddings == bool(tied)
    torch.testing.assert_close(student.model.embed_tokens.weight, teacher.model.get_input_embeddings().weight[:rows])
    if not tied:  # the tiny teacher's own are not tied: a tied student takes its embedding for both
        torch.testing.assert_close(student.lm_head.weight, teacher.head.weight_Vd)


def test_random_parts_follow_from_the_seed_and_not_from_the_transplant(world: World) -> None:
    """The control has the student's body to the bit, and nothing of the teacher."""
    teacher = load_teacher(TeacherConfig(model=str(world.teacher), dtype="fp32"), CPU)
    student, control, other = (
        build_student(StudentConfig(), teacher, 0, seed=seed, transplant=transplant)
        for seed, transplant in ((0, True), (0, False), (1, False))
    )
    body, same, different = (m.model.layers[0].lstm.weight_hh_l0 for m in (student, control, other))
    assert torch.equal(body, same)
    assert not torch.equal(body, different)
    assert not torch.allclose(student.model.embed_tokens.weight, control.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_rank_transplant_is_the_teachers_head(world: World, tied: bool) -> None:
    """With as many coordinates as the teacher is wide, its head says of coordinates what it said of states."""
    teacher = load_teacher(TeacherConfig(model=str(world.teacher), dtype="fp32"), CPU)
    hidden_Nd = teacher.hidden(torch.arange(40)[None] % teacher.vocab_size)[0].clone()
    moments = HiddenMoments(teacher.width, CPU)
    moments.add(hidden_Nd)
    basis = Basis.of(*moments.solve(), torch.eye(teacher.width), teacher.width)
    config = LSTMConfig(
        vocab_size=teacher.vocab_size, embedding_size=teacher.width, hidden_size=8, head_bias=True,
        tie_word_embeddings=tied,
    )  # fmt: skip
    student = LSTMForCausalLM(config)
    transplant_low_rank(student, teacher, basis)
    found_NV = student.lm_head(basis.coordinates(hidden_Nd))
    torch.testing.assert_close(found_NV, teacher.head.logits(hidden_Nd), atol=1e-3, rtol=1e-3)
    embedding_Vd = student.model.embed_tokens.weight
    if tied:
        assert embedding_Vd is student.lm_head.weight
    else:  # a rotation: all distances between tokens stay
        expected_VV = torch.cdist(teacher.embedding_Vd, teacher.embedding_Vd)
        torch.testing.assert_close(torch.cdist(embedding_Vd, embedding_Vd), expected_VV, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("metric", ["identity", "fisher"])
def test_a_run_with_a_narrow_head(world: World, tmp_path: Path, metric: str) -> None:
    done = run_command(
        str(world.recipe), f"run.output_dir={tmp_path}", "control=false", "student.embedding_size=6",
        f"stages.0.metric={metric}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "tiny" / "student" / "config.json").read_text())
    assert config["embedding_size"] == 6 and config["head_bias"]
    points = result_of(tmp_path / "tiny")["curves"]["student"]
    assert points[-1]["kl_to_teacher_nats"] < points[0]["kl_to_teacher_nats"]


def test_a_head_wider_than_the_teachers_is_refused(world: World) -> None:
    done = run_command(str(world.recipe), "run.name=wide", "student.embedding_size=25")
    assert done.returncode == 2
    assert "expected at most the teacher's width of 24 with student.transplant, found 25" in done.stderr


def test_ranks_command_shows_what_each_rank_loses(world: World) -> None:
    done = run_command(str(world.recipe), "--ranks", "4", "12", "24", launcher=("-m", "distill.ranks"))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["rank"] for row in rows] == [4, 12, 24]
    for method in ("plain", "identity", "gram", "fisher"):
        losses = [row["kl_nats"][method] for row in rows]
        assert losses[0] > losses[1] > losses[2]
        assert losses[2] == pytest.approx(0, abs=1e-4)
    assert rows[0]["kl_nats"]["fisher"] < rows[0]["kl_nats"]["plain"]
    refused = run_command(str(world.recipe), "--ranks", "25", launcher=("-m", "distill.ranks"))
    assert refused.returncode == 2 and "expected 1 to the teacher's width of 24, found [25]" in refused.stderr


@pytest.mark.parametrize("hidden_size", [4, 6, 9])
def test_the_aligned_input_is_centred_and_of_unit_variance(hidden_size: int) -> None:
    """Over the text's tokens the projected embeddings are uncorrelated, of mean 0 and of variance 1 on average."""
    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=30, embedding_size=6, hidden_size=hidden_size, num_layers=1)
    student = LSTMForCausalLM(config)
    with torch.no_grad():
        student.model.embed_tokens.weight.copy_(torch.randn(30, 6) @ torch.randn(6, 6) + 3)
    occurrences_V = torch.randint(0, 50, (30,))
    align_input(student, occurrences_V)
    tokens_N = torch.arange(30).repeat_interleave(occurrences_V)
    x_NH = student.model.input_projection(student.model.embed_tokens(tokens_N)).detach().double()
    torch.testing.assert_close(x_NH.mean(0), torch.zeros_like(x_NH[0]), atol=1e-4, rtol=0)
    kept = min(hidden_size, 6)
    covariance = torch.cov(x_NH[:, :kept].t(), correction=0)
    assert covariance.diagonal().mean().item() == pytest.approx(1, rel=1e-4)
    assert covariance.diagonal().diff().max() < 1e-6, "the leading axis comes first"
    torch.testing.assert_close(covariance, covariance.diagonal().diag(), atol=1e-4, rtol=0)
