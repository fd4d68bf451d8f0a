"""What the student starts from, against what it should be by definition."""

from __future__ import annotations

import pytest
import torch
from conftest import World

from distill.config import StudentConfig, TeacherConfig
from distill.teacher import load_teacher
from distill.transplant import OutputFit, build_student

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
