"""Drafting and verifying with our own loop: the teacher's text, token by token, and its distribution.

python -m pytest tests/test_speculative.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World, run_command
from test_bad_input import refused
from test_student import make_student
from transformers import AutoTokenizer, LlamaForCausalLM

from distill.sampling import Sampler
from distill.torch_decoder import TorchDecoder
from eval.speculative import speculate, teacher_alone, verify

V = 64


@pytest.fixture(scope="module")
def teacher(world: World) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(world.teacher).eval()


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speculative") / "student"
    make_student(dtype=torch.float32, vocab_size=V, eos_token_id=0).save_pretrained(path)
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(path)
    return path


class Parrot:
    """A drafter that knows what will be written, but for every third token: some drafts are kept, some are not."""

    vocab_size = V

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def lanes(self, sequences: int) -> Parrot:
        self.place = 0
        return self

    def state(self) -> int:
        return self.place

    def restore(self, state: int) -> None:
        self.place = state

    def read(self, tokens: list[int]) -> None:
        assert tokens == [self.text[self.place]], "it reads what was written, each token once"
        self.place += 1

    def choose(self, number: int, sampler: Sampler) -> int:
        # what follows a wrong draft is never read from here: it would fail the assertion above
        wrong = self.place % 3 == 0
        return (self.text[self.place] + wrong) % V


@pytest.mark.parametrize("drafts", [0, 1, 2, 5])
def test_the_text_is_the_teachers(teacher, folder, drafts):
    drafter = TorchDecoder(folder, threads=1)
    for prompt in ([5], [0, 7, 9], list(range(1, 20))):
        expected = teacher_alone(teacher, prompt, 40)
        written, count = speculate(teacher, drafter, prompt, 40, drafts, Sampler(0))
        assert written == expected
        assert count.rounds + count.accepted == 40


def test_kept_and_refused_drafts_are_read_once(teacher):
    expected = teacher_alone(teacher, [5, 6], 40)
    parrot = Parrot([5, 6, *expected, 0])
    written, count = speculate(teacher, parrot, [5, 6], 40, 1, Sampler(0))
    assert written == expected
    assert 0 < count.accepted < count.drafted and count.rounds + count.accepted == 40
    assert count.acceptance_rate == count.accepted / count.drafted


def test_sampling_keeps_the_teachers_distribution():
    """The first token written after drafts from q, against p: chi-square over 16 tokens, 4,000 times."""
    random = np.random.default_rng(0)
    teacher_TV = random.standard_normal((2, 16)).astype(np.float32) * 1.5
    student_V = random.standard_normal(16).astype(np.float32) * 1.5
    for options in ({}, {"temperature": 0.7, "top_k": 9}):
        sampler = Sampler(seed=1, **options)
        tokens_P, weights_P = sampler.kept(teacher_TV[0])
        p_V = np.zeros(16)
        p_V[slice(None) if tokens_P is None else tokens_P] = weights_P
        p_V /= p_V.sum()
        counts_V, kept = np.zeros(16), 0
        for _ in range(4000):
            draft = sampler.choose(student_V)
            accepted, bonus = verify(teacher_TV, [student_V], [draft], sampler)
            counts_V[draft if accepted else bonus] += 1
            kept += accepted
        seen = p_V > 0
        assert not counts_V[~seen].any()
        statistic = ((counts_V - 4000 * p_V)[seen] ** 2 / (4000 * p_V[seen])).sum()
        freedom = seen.sum() - 1
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5
        assert 400 < kept < 3600


def test_the_command(world, folder, tmp_path):
    run = run_command(
        *(str(world.teacher), str(folder), "--drafts", "1", "3", "--new-tokens", "8", "--prompt", "the river"),
        *("--dtype", "fp32", "--runtime", "torch"),
        launcher=("-m", "eval.speculative"),
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])
    assert {"teacher alone", "drafts of 1", "drafts of 3", "generate(assistant_model)"} <= rows.keys()
    assert all(row["identical_tokens"] == 1 for row in rows.values())
    assert rows["teacher alone"]["speedup"] == 1

    other = tmp_path / "other"
    make_student(dtype=torch.float32, vocab_size=V + 1).save_pretrained(other)
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(other)
    options = (str(world.teacher), str(other), "--runtime", "torch")
    message = refused(run_command(*options, launcher=("-m", "eval.speculative")))
    assert "65 tokens" in message and "same tokenizer" in message
