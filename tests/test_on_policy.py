"""On-policy distillation: what the student writes, what the teacher says about it, and what is learnt from it.

python -m pytest tests/test_on_policy.py
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, World
from torch import Tensor

from distill.candidates import Candidates
from distill.config import Recipe, StageConfig, UserError
from distill.job import TeacherAndText, start_accelerator
from distill.metrics import Score
from distill.objective import Objective
from distill.on_policy import BlockWriter, written_lanes
from distill.progress import Interrupted, Progress
from distill.recipe import load_recipe
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.targets import CachedBesideLive, LiveTargets
from distill.tracking import Tracker
from distill.train import Training
from distill.transplant import build_student

SERVED = {
    "endpoint": "{url: http://x, model: x}", "targets__cache": "true", "targets__signal": "top_k", "targets__k": "4",
}  # fmt: skip
STAGE = {
    "objective": {"forward_kl": 0.8, "cross_entropy": 0.2},
    "length": {"steps": 5},
    "student_written": 0.5,
    "written_prompt": 3,
    "learning_rate": 0.05,
}


def make_recipe(world: World, *stages: dict[str, Any], **overrides: object) -> Recipe:
    words = [f"{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    return load_recipe(str(world.recipe), [f"stages={json.dumps(list(stages))}", "control=false", *words])


@pytest.fixture
def open_training(world: World, tmp_path: Path) -> Any:
    """A training at the beginning of its first stage, its student's states of rest replaced by random weights."""

    def opened(*stages: dict[str, Any], **overrides: object) -> tuple[Training, Any]:
        recipe = make_recipe(world, *stages, run__output_dir=tmp_path, student__fit_tokens=0, **overrides)
        accelerator = start_accelerator(recipe)
        parts = TeacherAndText(recipe, accelerator)
        student = build_student(recipe.student, parts.teacher, parts.corpus.separator_id, seed=1, transplant=True)
        training = Training(
            "student", recipe=recipe, stages=recipe.stages, student=student, blocks=parts.text, teacher=parts.teacher,
            validate=lambda _: Score(1.0, 1, 1, 1, 1.0, 1), accelerator=accelerator,
            tracker=Tracker(accelerator, recipe),
            targets=parts.targets(parts.cached_targets() if recipe.targets.cache else None),
        )  # fmt: skip
        return training, training.begin(recipe.stages[0])[1]

    return opened


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(("lanes", "share", "expected"), [(8, 0.5, 4), (8, 1, 8), (8, 0.3, 2), (7, 0.9, 6), (4, 0, 0)])
def test_lanes_are_spread_evenly(lanes: int, share: float, expected: int) -> None:
    found = written_lanes(lanes, share)
    assert found.sum() == expected and len(found) == lanes
    assert abs(np.diff(np.flatnonzero(found)) - lanes / max(expected, 1)).max(initial=0) < 1


def random_student(seed: int = 0) -> LSTMForCausalLM:
    torch.manual_seed(seed)
    student = LSTMForCausalLM(LSTMConfig(vocab_size=11, embedding_size=6, hidden_size=8, num_layers=2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(3)  # or it would hardly prefer anything
        student.model.embed_tokens.weight.mul_(30)
    return student.train()


def writer_of(student: LSTMForCausalLM, lanes: range, of: int, **fields: Any) -> BlockWriter:
    reset, dtype, separator = (
        fields.pop(*pair) for pair in (("reset", True), ("dtype", torch.float32), ("separator", 0))
    )
    stage = StageConfig.model_validate({**STAGE, **fields})
    return BlockWriter(
        student, stage, lanes=lanes, of=of, separator_id=separator, reset_at_documents=reset, seed=4, dtype=dtype
    )  # fmt: skip


@pytest.mark.parametrize("reset", [True, False])
@torch.no_grad()
def test_greedy_writing_is_what_the_student_finds_likeliest(reset: bool) -> None:
    """Read whole, with its resets: an oracle for the steps, the states and the separators that the student writes."""
    student, options = random_student(), {"written_temperature": 0, "student_written": 1, "objective": "jsd"}
    writer = writer_of(student, range(30), 30, reset=reset, separator=7, **options)
    text_bT = torch.randint(0, 11, (30, 20))
    before_bT = text_bT
    for _ in range(2):
        tokens_bT = writer.write(text_bT, [(n,) for n in range(30)])
        assert not torch.equal(tokens_bT, before_bT)
        before_bT = tokens_bT
        assert torch.equal(tokens_bT[:, :3], text_bT[:, :3])
        assert 5 < (tokens_bT[:, 3:] == 7).sum() < 400, "separators are written, and other tokens"
        student.eval()
        logits_bTV = student(tokens_bT, reset_mask=(tokens_bT == 7) if reset else None).logits
        assert torch.equal(tokens_bT[:, 3:], logits_bTV[:, 2:-1].argmax(-1))
        other = student(tokens_bT, reset_mask=None if reset else (tokens_bT == 7)).logits
        assert not torch.equal(tokens_bT[:, 3:], other[:, 2:-1].argmax(-1)), "resets matter"
        for parameter in student.parameters():  # the second time round, as after a step of the optimizer
            parameter.add_(0.03 * torch.randn_like(parameter))
        student.train()


@torch.no_grad()
def test_sampling_follows_the_softmax_and_the_seed() -> None:
    student = random_student(1)
    writer = writer_of(student, range(1500), 1500, written_temperature=1.5, student_written=1, objective="jsd")
    text_bT = torch.tensor([[3, 1, 4, 0]]).expand(1500, -1)
    found = [writer.write(text_bT, [(seed, n) for n in range(1500)])[:, 3] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    student.eval()
    expected_V = 1500 * torch.softmax(student(text_bT[:1, :3]).logits[0, -1] / 1.5, -1)
    often = expected_V > 5
    value = ((found[0].bincount(minlength=11) - expected_V) ** 2 / expected_V)[often].sum()
    assert often.sum() > 4 and value < 30, "chi-square of about as much as outcomes"


def test_how_the_batch_is_cut_changes_nothing(open_training: Any) -> None:
    """Micro-batches; and processes, each with lanes of its own."""
    written = []
    for micro in (8, 4, 2):
        training, _ = open_training(STAGE, run__micro_batch_size=micro)
        batches, spent = training._batches(7)
        assert spent.writing > 0
        written.append(torch.cat([batch.window_BW for batch, _ in batches]))
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])
    plain = [training._batch(*parts, training.blocks) for parts in training._micro_batches(7, training.blocks)]
    writers = [
        BlockWriter(
            training.student, training.stages[0], lanes=range(first, first + 4), of=8, separator_id=0,
            reset_at_documents=True, seed=0, dtype=torch.float32,
        )
        for first in (0, 4)
    ]  # fmt: skip
    shares = [writers[0].rewrite(plain[:2], 7), writers[1].rewrite(plain[2:], 7)]
    assert torch.equal(torch.cat([batch.window_BW for share in shares for batch, _ in share]), written[0])
    different = torch.cat([batch.window_BW for batch, _ in training.writer.rewrite(plain, 8)])
    assert not torch.equal(different, written[0]), "another step draws other tokens"


def test_it_writes_in_bf16_as_well() -> None:
    """The copy it writes with; the student stays as it is."""
    text_bT, seeds = torch.randint(1, 11, (30, 6)), [(n,) for n in range(30)]
    student, options = random_student(), {"written_temperature": 0, "student_written": 1, "objective": "jsd"}
    full, half = (writer_of(student, range(30), 30, dtype=t, **options) for t in (torch.float32, torch.bfloat16))
    assert half.scribe.dtype == torch.bfloat16 and student.dtype == torch.float32
    same = (full.write(text_bT, seeds) == half.write(text_bT, seeds)).float().mean()
    assert 0.9 < same < 1, "rounding moves a token now and then"


# ---------------------------------------------------------------- what is learnt


def documents_of(tokens: Tensor) -> list[Tensor]:
    """A block cut before each of its separators."""
    cuts = [0, *(place for place in range(1, len(tokens)) if tokens[place] == 0), len(tokens)]
    return [tokens[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]


@pytest.mark.parametrize(
    ("objective", "fields", "two_teachers"),
    [
        ({"forward_kl": 0.8, "cross_entropy": 0.2}, {}, False),
        ({"reverse_kl": 0.5, "hidden_mse": 1.0}, {}, False),
        ({"forward_kl": 0.8, "cross_entropy": 0.2}, {"token_weights": "teacher_entropy"}, False),
        ({"reverse_kl": {"from": 0.8, "to": 0.1}, "cross_entropy": 0.2}, {"temperature": {"from": 2, "to": 1}}, False),
        ({"reverse_kl": 0.8, "cross_entropy": 0.2}, {}, True),
    ],
    ids=["mixture", "hidden states", "weighted tokens", "ramps", "two teachers"],
)
def test_the_gradient_is_that_of_the_written_tokens(
    open_training: Any, other_weights: Path, objective: dict[str, Any], fields: dict[str, Any], two_teachers: bool
) -> None:
    """By hand, piece by piece: student and teachers read each document of a written block alone, from nothing."""
    stage = {**STAGE, "objective": objective, "written_prompt": 14, **fields}  # so long that documents begin in it
    others = [{"model": str(other_weights), "dtype": "fp32", "weight": 3}] if two_teachers else []
    training, take_step = open_training(
        stage, run__micro_batch_size=4, corpus__block_length=24, other_teachers=json.dumps(others)
    )
    student, teachers, found = training.student, training.targets.teacher, {}
    members = teachers.members if two_teachers else (teachers,)
    at_start = lambda value: value["from"] if isinstance(value, dict) else value  # noqa: E731
    temperature = at_start(fields.get("temperature", 1))
    batches, _ = training._batches(0)
    gradients = lambda: {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}  # noqa: E731
    training.update = lambda *_: (found.update(gradients()), torch.ones(()))[1]  # in place of the optimizer
    sums, _, spent, _ = take_step()
    assert spent.writing > 0 and spent.teacher > 0
    student.zero_grad()
    student.train()
    is_written, pieces = torch.from_numpy(written_lanes(8, 0.5)), 0
    loss, weights = torch.zeros(()), torch.zeros(())
    inputs, labels = (torch.cat([getattr(b, name) for b, _ in batches]) for name in ("inputs_BT", "labels_BT"))
    assert bool((labels[is_written] == -1).all()) and bool((labels[~is_written] >= 0).all())
    signals = [training.targets.signal(batch) for batch, _ in batches]
    of_text = [
        torch.cat([(s.parts[number] if two_teachers else s).hidden_Nd for s in signals]).unflatten(0, (8, 24))
        for number in range(len(members))
    ]
    for lane in range(8):
        documents = documents_of(inputs[lane]) if is_written[lane] else [inputs[lane]]
        reset = None if is_written[lane] else torch.cat([b.reset_BT for b, _ in batches])[lane : lane + 1]
        z_Td = torch.cat([student.model(one[None], reset_mask=reset).last_hidden_state[0] for one in documents])
        pieces += len(documents) if is_written[lane] else 0
        p_TV = torch.zeros(())
        for member, share, text_LTd in zip(members, (0.25, 0.75) if two_teachers else (1.0,), of_text, strict=True):
            read = [member.hidden(one[None])[0].clone() for one in documents] if is_written[lane] else [text_LTd[lane]]
            hidden_Td = torch.cat(read).clone()
            p_TV = p_TV + share * torch.softmax(member.head.logits(hidden_Td) / temperature, -1)
        logits_TV = student.lm_head(z_Td)
        log_p_TV, log_q_TV = p_TV.log(), F.log_softmax(logits_TV / temperature, -1)
        weight_T = torch.special.entr(p_TV).sum(-1) if "token_weights" in fields else torch.ones(24)
        terms = {
            "forward_kl": temperature**2 * (p_TV * (log_p_TV - log_q_TV)).sum(-1),
            "reverse_kl": temperature**2 * (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1),
            "hidden_mse": ((z_Td - hidden_Td) ** 2).mean(-1),
            "cross_entropy": F.cross_entropy(logits_TV, labels[lane], ignore_index=-1, reduction="none"),
        }
        loss = loss + sum(at_start(share) * (weight_T * terms[name]).sum() for name, share in objective.items())
        weights = weights + weight_T.sum()
    assert pieces > 4, "documents begin inside written blocks"
    mean = loss / weights
    mean.backward()
    logged = sum(at_start(share) * float(sums[name]) for name, share in objective.items()) / (8 * 24)
    assert logged == pytest.approx(mean.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("share", [0.5, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"targets__hidden_dtype": "fp32"},
        {"targets__signal": "dense"},
        {"targets__signal": "top_k", "targets__k": 4},
        {"targets__signal": "sampled"},
    ],
    ids=["hidden", "dense", "top_k", "sampled"],
)
def test_a_cache_serves_the_text_and_the_teacher_the_rest(
    open_training: Any, tmp_path: Path, options: dict[str, Any], share: float
) -> None:
    """As the live teacher alone would, to the digits that a cache keeps; and each is asked for its own blocks only."""
    stage = {**STAGE, "objective": "forward_kl", "student_written": share}
    live, _ = open_training(stage, **options, run__micro_batch_size=4)
    both, _ = open_training(
        stage, **options, run__micro_batch_size=4, targets__cache="true", targets__cache_dir=tmp_path / "targets"
    )
    assert isinstance(live.targets, LiveTargets) and isinstance(both.targets, CachedBesideLive)
    asked: dict[str, list[int]] = {"cached": [], "live": []}
    for name, blocks in asked.items():
        side = getattr(both.targets, name)
        signal_of = side.signal

        def watched(batch: Any, first_only: bool = False, signal_of: Any = signal_of, blocks: Any = blocks) -> Any:
            blocks += batch.block_ids_B.tolist()
            return signal_of(batch, first_only)

        side.signal = watched
    is_written, lane = written_lanes(8, share), 0
    for batch, _ in live._batches(0)[0]:
        expected, found = vars(live.targets.signal(batch)), vars(both.targets.signal(batch))
        for name in expected:
            if isinstance(expected[name], Tensor):
                if name == "logits_NV":  # a softmax sees no constant
                    expected[name], found[name] = (part[name].log_softmax(-1) for part in (expected, found))
                torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-3)
        lane += len(batch.block_ids_B)
    blocks = np.concatenate([batch.block_ids_B for batch, _ in live._batches(0)[0]])
    assert lane == 8 and sorted(asked["live"]) == sorted(blocks[is_written])
    assert sorted(asked["cached"]) == sorted(blocks[~is_written])


def test_cross_entropy_leaves_out_what_has_no_label() -> None:
    torch.manual_seed(0)
    logits_NV = torch.randn(6, 9, requires_grad=True)
    labels_N = torch.tensor([3, -1, 0, -1, -1, 8])
    sums, grad_NV = Objective({"cross_entropy": 2.0}, unlabelled=True).gradient(logits_NV.detach(), labels_N, None)
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=-1, reduction="sum")
    (2 * loss).backward()
    torch.testing.assert_close(sums["cross_entropy"], loss.detach())
    torch.testing.assert_close(grad_NV, logits_NV.grad)
    candidates = Candidates(torch.tensor([0, 3, 8, 5]), torch.zeros(4), 3)
    assert candidates.places(labels_N).tolist() == [1, -1, 0, -1, -1, 2]


def test_other_lanes_carry_their_states_on(open_training: Any) -> None:
    """Those of the plain stage; and after a stage in which the student wrote, its lanes begin anew."""
    plain = {name: value for name, value in STAGE.items() if not name.startswith(("student_w", "written"))}
    states = []
    for stage in (plain, STAGE):
        training, take_step = open_training({**stage, "learning_rate": 1e-30, "warmup": 0}, plain)
        for _ in range(3):
            take_step()
            training.progress.now.steps += 1
        states.append(training.states[0][0])
    is_written = torch.from_numpy(written_lanes(8, 0.5))
    torch.testing.assert_close(states[0][:, ~is_written], states[1][:, ~is_written])
    assert not torch.isclose(states[0][:, is_written], states[1][:, is_written]).all(-1).any()

    training.progress.stage, training.progress.stage_start.steps = 1, 3
    training.begin(training.stages[1])
    for step, expected in ((3, is_written), (4, torch.zeros(8).bool())):
        ((_, starts_B),) = training._micro_batches(step, training.blocks)
        assert torch.equal(starts_B, expected), step


def test_a_stopped_training_goes_on_bit_by_bit(
    open_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an on-policy stage, with candidates and a stage after it."""
    stages = ({**STAGE, "candidates": 12}, {"objective": "jsd", "length": {"steps": 2}})
    options = {"evaluation__every__steps": 50, "run__micro_batch_size": 4}

    def trained(name: str) -> tuple[dict[str, Tensor], list[dict[str, Any]], Progress]:
        training, _ = open_training(*stages, run__name=name, **options)
        training.log_file.parent.mkdir(exist_ok=True)
        progress = training.run()
        lines = training.log_file.read_text(encoding="utf-8").splitlines()
        return training.student.state_dict(), [json.loads(line) for line in lines], progress

    whole, log, _ = trained("whole")
    rewrite = BlockWriter.rewrite

    def stopping(self: BlockWriter, batches: Any, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rewrite(self, batches, step)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(BlockWriter, "rewrite", stopping)
        trained("stopped")
    weights, log_again, progress = trained("stopped")
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.items())
    assert [row["loss"] for row in log] == [row["loss"] for row in log_again] and len(log) == 7
    shares = [row.get("writing_share") for row in log_again]
    assert all(0 < share < 1 for share in shares[:5]) and shares[5:] == [None, None]
    spent = sum(row.get("writing_seconds_per_step", 0) for row in log_again)
    assert progress.writing_seconds == pytest.approx(spent) and progress.on_policy_seconds > spent > 0


def test_the_shipped_recipe_is_on_policy() -> None:
    recipe = load_recipe(ROOT / "recipes" / "on-policy.yaml")
    assert [stage.student_written for stage in recipe.stages] == [0, 0.5]


# ---------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        ({}, SERVED, "stages.0.student_written: the teacher behind an endpoint is not asked during training"),
        ({"objective": "cross_entropy"}, {}, "for the teacher to judge"),
        ({"student_written": 1}, {}, "no text is left for cross_entropy"),
        ({"student_written": 0.01}, {}, "0.01 of 8 lanes (run.batch_size) is no whole lane"),
        ({"student_written": 1.5}, {}, "less than or equal to 1"),
        ({"written_prompt": 8}, {}, "fewer than corpus.block_length (8) tokens, found 8"),
        ({"student_written": 0}, {}, "written_prompt: only with student_written"),
        *(
            ({}, {"student": student}, "stages.0.student_written: the student must be a fresh LSTM with the teacher's")
            for student in ("{model: x}", "{config: x}")
        ),
        ({}, {"student": "{tokenizer: x}", "targets__signal": "top_k"}, "a fresh LSTM with the teacher's tokens"),
        ({}, {"run__precision": "fp16"}, "run.precision: Input should be 'auto', 'fp32' or 'bf16'"),
    ],
)
def test_refused(world: World, stage: dict[str, Any], overrides: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        make_recipe(world, {**STAGE, **stage}, **overrides)
    assert expected in str(caught.value) and "1 problem" in str(caught.value)
