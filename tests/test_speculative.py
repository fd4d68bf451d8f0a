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
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from benchmarks.tiny import WORDS, save_tokenizer
from distill.sampling import Sampler
from distill.torch_decoder import TorchDecoder
from eval.repeats import TRUST, Repeats
from eval.speculative import Draft, PackedLinear, packed, speculate, teacher_alone

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


@pytest.mark.parametrize(("size", "width"), [(0, 1), (1, 1), (5, 1), (3, 4), (12, 8)])
def test_the_text_is_the_teachers(teacher, folder, size, width):
    drafter = TorchDecoder(folder, threads=1)
    for prompt in ([5], [0, 7, 9], list(range(1, 20))):
        expected = teacher_alone(teacher, prompt, 40)
        for reader in (teacher, packed(teacher)):
            written, count = speculate(reader, drafter, prompt, 40, size, Sampler(0), width)
            assert written == expected
            assert count.rounds + count.accepted == 40


def test_packing_changes_the_layout_alone(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    reader, ids_BT = packed(teacher), torch.arange(24).view(2, 12)
    linear = [module for module in teacher.modules() if type(module) is torch.nn.Linear]
    assert sum(isinstance(module, PackedLinear) for module in reader.modules()) == len(linear) > 4
    assert not any(isinstance(module, PackedLinear) for module in teacher.modules())
    assert reader.get_input_embeddings().weight is teacher.get_input_embeddings().weight, "what is not packed is shared"
    with torch.inference_mode():
        for keep in (0, 1, 3):
            expected, found = (model(ids_BT, logits_to_keep=keep).logits for model in (teacher, reader))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    biased = torch.nn.Linear(8, 4)
    x_BTd = torch.randn(3, 2, 8)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(biased)(x_BTd), biased(x_BTd))
    half = LlamaForCausalLM(teacher.config).to(torch.float16)
    assert packed(half) is half


class Reader:
    """A student whose distribution is told: after text t, token (7 * sum(t) + j) % V has weight 2 ** -j."""

    vocab_size = V

    def __init__(self) -> None:
        self.text: tuple[int, ...] = ()

    def lanes(self, sequences: int) -> Reader:
        return Reader()

    def state(self) -> tuple[int, ...]:
        return self.text

    def restore(self, state: tuple[int, ...]) -> None:
        self.text = state

    def read(self, tokens: list[int]) -> None:
        self.text += tuple(tokens)

    def logits(self, number: int) -> np.ndarray:
        return reader_logits(self.text)


def reader_logits(text: tuple[int, ...]) -> np.ndarray:
    return -np.log(2) * np.roll(np.arange(V), 7 * sum(text) % V).astype(np.float32)


@pytest.mark.parametrize(("size", "width"), [(4, 1), (6, 3), (14, 8)])
def test_a_draft_is_the_likeliest_subtree(size, width):
    """Against all continuations of up to `size` tokens, sorted by probability: the tree has the first ones."""
    lanes = Reader()
    lanes.read([3])
    draft = Draft(lanes, 9, size, width, Repeats())
    costs = {}
    for node in range(1, size + 1):
        path, cost = draft.path_to(node), 0.0
        for parent, child in zip(path, path[1:], strict=False):
            text = (3, *(draft.tokens[step] for step in draft.path_to(parent)))
            logits_V = reader_logits(text).astype(np.float64)
            cost -= logits_V[draft.tokens[child]] - np.log(np.exp(logits_V).sum())
        costs[node] = cost
        draft.go_to(node)
        assert lanes.text == (3, *(draft.tokens[step] for step in path))
    # token j of width has cost (j + 1) log 2 whatever came before, so costs of all continuations can be counted
    every, layer = [], [0.0]
    for _ in range(size):
        layer = sorted(cost + (j + 1) * np.log(2) for cost in layer for j in range(width))[: size * width]
        every += layer
    np.testing.assert_allclose(sorted(costs.values()), sorted(every)[:size], rtol=1e-5)


def test_repeats_are_what_followed_the_longest_end_seen_before():
    text = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    repeats = Repeats(text[:10])
    repeats.read(text[10:])
    lengths = set()
    for drafted in ([], [0], [1, 2], [2, 2, 2, 2, 2], [7]):
        end, expected = [*text, *drafted], {}
        for length in (4, 3, 2, 1):
            places = [i for i in range(len(text) - length) if text[i : i + length] == end[-length:]]
            if places:
                followers = [text[i + length] for i in places]
                expected = {t: TRUST[length - 1] * followers.count(t) / len(followers) for t in followers}
                lengths.add(length)
                break
        assert repeats.after(drafted) == pytest.approx(expected)
    assert len(lengths) > 1 and repeats.after([7]) == {} == Repeats().after()


def test_a_draft_says_again_what_the_text_said():
    """The text's own probability is mixed with the student's, token by token."""
    text = [30, 31, 32, 33, 34, 30, 31, 32]
    lanes = Reader()
    for token in text[:-1]:
        lanes.read([token])
    chain = Draft(lanes, text[-1], 3, 1, Repeats(text))
    assert chain.tokens == [32, 33, 34, 30]
    lanes = Reader()
    for token in text[:-1]:
        lanes.read([token])
    tree = Draft(lanes, text[-1], 24, 4, Repeats(text))
    own = 7 * sum(text) % V
    assert tree.tokens[1] == 33 and own in tree.children[0], "half of the 0.2 that are left"
    nodes = {tuple(tree.tokens[step] for step in tree.path_to(node)[1:]) for node in range(1, 25)}
    assert {(33,), (33, 34), (33, 34, 30)} <= nodes


def test_a_tree_is_read_as_its_branches_are(teacher):
    lanes = Reader()
    before = [5, 6, 7]
    draft = Draft(lanes, 9, 10, 4, Repeats())
    assert max(len(children) for children in draft.children) > 1
    cache = DynamicCache(config=teacher.config)
    teacher(torch.tensor([before]), past_key_values=cache)
    logits_TV = teacher(**draft.inputs(3, next(teacher.parameters())), past_key_values=cache).logits[0]
    for node in range(11):
        path = draft.path_to(node)
        alone_TV = teacher(torch.tensor([[*before, *(draft.tokens[step] for step in path)]])).logits[0]
        torch.testing.assert_close(logits_TV[node], alone_TV[-1], rtol=1e-4, atol=1e-5)


def test_sampling_keeps_the_teachers_distribution(teacher):
    """Pairs of tokens, 1,500 times, against their exact probabilities (chi-square)."""
    prompt, temperature, draws = [5, 6], 0.35, 1500
    with torch.no_grad():
        first_V = (teacher(torch.tensor([prompt])).logits[0, -1] / temperature).double().softmax(-1)
        nexts = torch.tensor([[*prompt, token] for token in range(V)])
        joint_VV = first_V[:, None] * (teacher(nexts).logits[:, -1] / temperature).double().softmax(-1)
    sampler, counts_VV, accepted = Sampler(temperature, seed=0), torch.zeros(V, V, dtype=torch.float64), 0
    for _ in range(draws):
        written, count = speculate(teacher, Reader(), prompt, 2, 12, sampler, 8)
        counts_VV[written[0], written[1]] += 1
        accepted += count.accepted
    frequent = joint_VV * draws >= 5
    expected = torch.cat([joint_VV[frequent], joint_VV[~frequent].sum()[None]]) * draws
    found = torch.cat([counts_VV[frequent], counts_VV[~frequent].sum()[None]])
    freedom = len(expected) - 1
    assert freedom >= 5 and 0 < accepted < draws
    assert ((found - expected).square() / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_the_command(world, folder, tmp_path):
    run = run_command(
        *(
            str(world.teacher),
            str(folder),
            "--chains",
            "1",
            "3",
            "--trees",
            "5",
            "--new-tokens",
            "8",
            "--prompt",
            "the river",
        ),
        *("--dtype", "fp32", "--runtime", "torch"),
        launcher=("-m", "eval.speculative"),
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])
    assert {"teacher alone", "chains of 1", "chains of 3", "trees of 5", "generate(assistant_model)"} <= rows.keys()
    assert all(row["identical_tokens"] == 1 for row in rows.values())
    assert rows["teacher alone"]["speedup"] == 1

    other = tmp_path / "other"
    make_student(dtype=torch.float32, vocab_size=V + 1).save_pretrained(other)
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(other)
    options = (str(world.teacher), str(other), "--runtime", "torch")
    message = refused(run_command(*options, launcher=("-m", "eval.speculative")))
    assert "65 tokens" in message and "same tokenizer" in message

    save_tokenizer(folder := tmp_path / "renamed", ["brook" if word == "river" else word for word in WORDS])
    make_student(dtype=torch.float32, vocab_size=V, eos_token_id=0).save_pretrained(folder)
    message = refused(run_command(options[0], str(folder), *options[2:], launcher=("-m", "eval.speculative")))
    assert "token 'brook' is 4 of" in message and "and None of" in message and "1 more differ" in message
