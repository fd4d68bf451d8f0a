"""eval.memory on synthetic models that provably remember so many tokens, and against plain loops.

python -m pytest tests/test_memory.py

Legend: B rows, W positions, V vocabulary; the hidden state of the synthetic models is a token's one-hot row.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import World, run_eval
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny import WORDS
from distill.config import EvaluationConfig, UserError
from distill.metrics import Documents
from distill.signals import Head
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import LanguageModel, load_language_model, wrap
from eval.memory import (
    RECALL,
    Stretches,
    by_context,
    by_position,
    choose_stretches,
    context_figures,
    plot_time_constants,
    recall,
    time_constants,
)

PROBE_WORDS = {word for cue, words in RECALL.values() for word in (*cue.split(), *words.split())}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<|end|>", ".", *WORDS, *sorted(PROBE_WORDS - set(WORDS))]
    word_level = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|end|>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<|end|>")


class Parrot(LanguageModel):
    """Expects what `reach` makes of the inputs so far, as surely as the head's scale says; -1 for all tokens alike."""

    limit = math.inf

    def __init__(self, reach) -> None:
        words = tokenizer()
        head = Head(20.0 * torch.eye(len(words)))
        super().__init__(SimpleNamespace(config=SimpleNamespace()), words, head, "parrot")  # type: ignore[arg-type]
        self.reach = reach

    @property
    def longest_window(self) -> float:
        return self.limit

    def hidden(self, input_ids_BW: Tensor, position_ids_BW: Tensor | None = None) -> Tensor:
        expected_BW = torch.tensor(
            [[self.reach(row[: t + 1]) for t in range(len(row))] for row in input_ids_BW.tolist()]
        )
        hidden_BWV = torch.nn.functional.one_hot(expected_BW.clamp_min(0), self.vocab_size).float()
        return hidden_BWV * (expected_BW >= 0)[:, :, None]


def echo(distance: int) -> Parrot:
    """Expects the token that stood `distance` places before: it uses exactly that many tokens of context."""
    return Parrot(lambda ids: ids[-distance] if len(ids) >= distance else -1)


def finder(span: int) -> Parrot:
    """Expects what followed the last time that its last two tokens were read, if that is at most `span` tokens ago."""

    def reach(ids: list[int]) -> int:
        for at in range(len(ids) - 2, max(1, len(ids) - 1 - span) - 1, -1):
            if ids[at - 1 : at + 1] == ids[-2:]:
                return ids[at + 1]
        return -1

    return Parrot(reach)


def periodic(period: int, length: int = 400, count: int = 3) -> Documents:
    rng = np.random.default_rng(period)
    tokens = [np.concatenate(([0], np.resize(rng.permutation(30)[:period] + 2, length))) for _ in range(count)]
    return Documents(tokens, np.full(count, length), np.full(count, length))


@pytest.mark.parametrize("used", [1, 5, 12, 24])
def test_effective_context_is_the_one_that_the_model_uses(used: int) -> None:
    documents, contexts = periodic(max(used, 2) if used > 1 else 1), [1, 4, 5, 6, 11, 12, 13, 23, 24, 25, 48]
    stretches = choose_stretches(documents, contexts, targets=96)
    found = context_figures(echo(used), documents, stretches, batch=2048)
    assert found["effective_context_tokens"] == used
    losses = {row["context"]: row["nll_nats"] for row in found["losses"]}
    assert losses[used] < 1e-3
    if used > 1:
        before = max(N for N in contexts if used > N)
        assert losses[before] > 0.3 * math.log(echo(1).vocab_size), "part of a window may already see enough"
        assert losses[1] == pytest.approx(math.log(echo(1).vocab_size), rel=1e-5)
    assert found["targets"] == 96 and stretches.contexts == contexts


def test_contexts_beyond_a_models_limit_are_left_out_and_marked() -> None:
    model, documents = echo(4), periodic(4)
    model.limit = 20
    found = context_figures(model, documents, choose_stretches(documents, [4, 16, 32, 64], 64), batch=1024)
    assert [row["context"] for row in found["losses"]] == [4, 16]
    assert found["beyond_limit"] == [32, 64]


@pytest.mark.parametrize("N", [1, 3, 8, 17])
def test_loss_by_context_is_that_of_a_loop(world: World, N: int) -> None:
    """Each target read on its own from N to 9/8 N tokens before it."""
    model = load_language_model(str(world.teacher), device=torch.device("cpu"), dtype="fp32")
    rng = np.random.default_rng(N)
    tokens_n = [np.concatenate(([0], rng.integers(2, 40, size))) for size in (60, 45)]
    documents = Documents(tokens_n, np.ones(2), np.ones(2))
    stretches = Stretches([N], [(0, 20), (0, 44), (1, 32)], length=6)
    found_M = by_context(model, documents, stretches, N, batch=64)
    expected = []
    width = max(1, N // 8 + 1)
    for document, first in stretches.places:
        for place in range(6):
            start, target = first + place - place % width - N, first + place
            ids_1T = torch.tensor(tokens_n[document][None, start:target])
            logits_V = model.model.double()(ids_1T, use_cache=False).logits[0, -1, : model.vocab_size]
            expected.append(-logits_V.log_softmax(-1)[tokens_n[document][target]].item())
            assert N <= target - start <= N + N // 8
    assert found_M.tolist() == pytest.approx(expected, rel=1e-4)


def test_loss_by_position() -> None:
    """A model that needs 4 tokens knows nothing before position 5 and all from there on."""
    rows = by_position(echo(4), periodic(4, length=20), EvaluationConfig())
    unknown = math.log(echo(1).vocab_size)
    assert [(row["from"], row["to"], row["tokens"]) for row in rows] == [
        *((1, 1, 3), (2, 2, 3), (3, 4, 6), (5, 8, 12), (9, 16, 24), (17, 32, 12))
    ]
    assert [row["nll_nats"] for row in rows[:2]] == pytest.approx([unknown] * 2, rel=1e-5)
    assert rows[2]["nll_nats"] > unknown  # the third expects something, the fourth the separator
    assert [row["nll_nats"] for row in rows[3:]] == pytest.approx([0] * 3, abs=1e-5)


@pytest.mark.parametrize("kind", RECALL)
def test_recall_ends_where_the_memory_ends(kind: str) -> None:
    model, (cue, words) = finder(span=60), RECALL[kind]
    filler = np.array(model.tokenizer(" ".join(word for word in WORDS if word not in PROBE_WORDS) * 5)["input_ids"])
    near, far = (recall(model, cue, words.split(), filler, d, probes=20, batch=4096) for d in (10, 80))
    assert near and far
    assert (near["accuracy"], near["chance"]) == (1.0, 1 / len(words.split()))
    assert near["gain_nats"] == pytest.approx(20.0, rel=1e-3)
    assert far["accuracy"] == pytest.approx(far["chance"]), "who knows nothing is at chance"
    assert far["gain_nats"] == pytest.approx(0.0, abs=1e-6)
    model.limit = 50
    assert recall(model, cue, words.split(), filler, 80, probes=20, batch=4096) is None


def lstm(layers: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    config = LSTMConfig(
        vocab_size=len(tokenizer()), embedding_size=12, hidden_size=16, num_layers=layers, initializer_range=0.5
    )
    return wrap(LSTMForCausalLM(config).eval(), tokenizer(), "lstm")


def test_time_constants_that_were_put_in(tmp_path: Path) -> None:
    """Without weights a forget gate is sigmoid(bias): the bias of a time constant t is logit(exp(-1 / t))."""
    model, wanted_H = lstm(1), torch.logspace(0, 3, 16, base=10, dtype=torch.float64)
    block = model.model.model.layers[0].lstm
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.bias_ih_l0[16:32] = torch.logit(torch.exp(-1 / wanted_H)).float()
    (found_H,) = time_constants(model, periodic(8), tokens=500)
    assert found_H.numpy() == pytest.approx(wanted_H.numpy(), rel=1e-4)
    plot_time_constants([found_H], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_time_constants_are_those_of_a_loop() -> None:
    model, documents = lstm(), periodic(8, length=30, count=2)
    found = time_constants(model, documents, tokens=50)
    network = model.model.model
    with torch.no_grad():
        x_TH = [
            network.input_projection(network.embed_tokens(torch.tensor(ids[:n])))
            for ids, n in zip(documents.tokens, (31, 19), strict=True)
        ]
        for layer, block in enumerate(network.layers):
            weights, logs = block.lstm, []
            for number, rows_TH in enumerate(x_TH):
                h_H, c_H, outputs = torch.zeros(16), torch.zeros(16), []
                for x_H in rows_TH:
                    gates = weights.weight_ih_l0 @ block.norm(x_H) + weights.bias_ih_l0
                    i, f, g, o = (gates + weights.weight_hh_l0 @ h_H + weights.bias_hh_l0).chunk(4)
                    logs.append(torch.sigmoid(f).double().log())
                    c_H = f.sigmoid() * c_H + i.sigmoid() * g.tanh()
                    h_H = o.sigmoid() * c_H.tanh()
                    outputs.append(x_H + h_H)
                x_TH[number] = torch.stack(outputs)
            assert found[layer].numpy() == pytest.approx((-1 / torch.stack(logs).mean(0)).numpy(), rel=1e-4)


def test_short_documents_shorten_the_contexts_or_are_refused() -> None:
    documents = periodic(4, length=100, count=40)
    stretches = choose_stretches(documents, [1, 8, 64, 512], targets=512)
    assert stretches.contexts == [1, 8, 64] and 256 <= stretches.targets <= 512
    assert all(64 <= first <= 101 - stretches.length for _, first in stretches.places)
    assert len({document for document, _ in stretches.places}) > 30, "spread over the documents"
    with pytest.raises(UserError, match="the longest with 1 tokens"):
        choose_stretches(periodic(1, length=1, count=1), [1, 8], targets=512)


def test_the_command_on_a_run(run_folder: Path) -> None:
    run = run_eval("memory", str(run_folder), "--contexts", "1", "4", "16", "999", "--targets", "64")
    assert run.returncode == 0, run.stderr
    result = json.loads((run_folder / "eval" / "memory.json").read_text(encoding="utf-8"))
    assert result["settings"]["contexts"] == [1, 4, 16] and result["settings"]["left_out"] == [999]
    assert {*result["models"]} == {"teacher", "student", "control"}
    student = result["models"]["student"]
    assert len(student["context"]["losses"]) == 3 and student["time_constants"][0]["quantiles"]["0.5"] > 0
    assert "time_constants" not in result["models"]["teacher"]
    assert (run_folder / "eval" / "memory_time_constants_student.png").is_file()
