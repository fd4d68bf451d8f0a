"""Either way round: any causal model as the student, and our LSTM as the teacher.

The oracle of packed blocks is each document read alone by the plain model, gradients by autograd.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import World, result_of, run_command, run_eval, save_llama
from safetensors.torch import load_file
from test_teacher import CONFIGS, make_network, make_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny import WORDS, save_tokenizer
from distill.architecture import make_student
from distill.config import UserError
from distill.corpus import BlockBatch, Blocks, Split
from distill.fused import StudentWithLoss
from distill.job import TeacherAndText
from distill.objective import Objective
from distill.recipe import load_recipe
from distill.signals import Encoding, HiddenSignal
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import head_of, load_language_model
from eval.command import make_subjects
from eval.runtimes import RUNTIMES, runtimes_of

V, T, C = 50, 8, 5
CPU = torch.device("cpu")


def make_batch() -> tuple[BlockBatch, list[np.ndarray]]:
    """Four blocks of a stream of short documents, and the documents."""
    rng = np.random.default_rng(0)
    documents = [np.concatenate([[0], rng.integers(1, V, n)]) for n in (3, 9, 1, 14, 2, 6, 11)]
    starts = np.cumsum([0, *map(len, documents)])
    tokens = np.concatenate([*documents, [0]]).astype(np.uint16)
    split = Split(tokens, starts, np.zeros(len(documents), dtype=np.int64), np.zeros(len(documents), dtype=np.int64))
    return Blocks(split, T, C, reset_at_documents=True).batch(np.arange(4)), documents


def loss_of_documents(network: torch.nn.Module, batch: BlockBatch, scale: float) -> torch.Tensor:
    """Cross-entropy of all labels, each document's part of a window read alone."""
    total = torch.zeros(())
    for window_W, positions_W, labels_T in zip(batch.window_BW, batch.positions_BW, batch.labels_BT, strict=True):
        cuts = [*(positions_W == 0).nonzero()[:, 0].tolist(), len(window_W)]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            logits_wV = network(input_ids=window_W[None, begin:end]).logits[0, :, :V]
            kept = max(begin, C)  # the context has no labels
            if end > kept:
                total = total + F.cross_entropy(
                    logits_wV[kept - begin :], labels_T[kept - C : end - C], reduction="sum"
                )
    return total * scale


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "granite", "phi"])
def test_packed_blocks_are_documents_one_by_one(name: str) -> None:
    """Loss and gradients of all weights; heads with a factor and with a bias as well."""
    network = make_network(name).requires_grad_(True)
    network.resize_token_embeddings(V)
    expected_network, (batch, _) = copy.deepcopy(network), make_batch()
    module = StudentWithLoss(network, logit_scale=head_of(network).scale)
    loss, sums, state = module(
        batch.window_BW, batch.labels_BT, batch.positions_BW, None, None, Objective({"cross_entropy": 0.7})
    )
    expected = loss_of_documents(expected_network, batch, 0.7)
    assert state is None
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums["cross_entropy"] * 0.7, expected.detach(), rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    for (parameter, found), (_, wanted) in zip(
        network.named_parameters(), expected_network.named_parameters(), strict=True
    ):
        assert found.grad is not None and wanted.grad is not None, parameter
        torch.testing.assert_close(found.grad, wanted.grad, rtol=2e-4, atol=2e-4, msg=parameter)


def test_terms_of_a_transformer_student() -> None:
    """KL and hidden regression to a teacher of its own width, against the plain formulas."""
    teacher, network = make_teacher("llama"), make_network("gpt2").requires_grad_(True)
    network.resize_token_embeddings(V)
    batch, _ = make_batch()
    signal = teacher.signal(batch, Encoding("hidden"))
    assert isinstance(signal, HiddenSignal)
    module = StudentWithLoss(network)
    objective = Objective({"forward_kl": 1.0, "hidden_mse": 1.0})
    _, sums, _ = module(batch.window_BW, batch.labels_BT, batch.positions_BW, None, signal, objective)
    z_BTd = network.base_model(batch.window_BW, position_ids=batch.positions_BW, use_cache=False).last_hidden_state
    z_Nd = z_BTd[:, -T:].flatten(0, 1)
    logits_NV = network.get_output_embeddings()(z_Nd)
    kl = F.kl_div(
        logits_NV.log_softmax(-1), signal.logits(slice(None)).log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(sums["forward_kl"], kl.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums["hidden_mse"], (z_Nd - signal.hidden_Nd).square().mean(-1).sum().detach())


# An LSTM as the teacher


def test_signal_of_an_lstm_is_what_it_says_of_each_document() -> None:
    teacher, (batch, _) = make_teacher("lstm"), make_batch()
    teacher.check_window(10_000, packed=True)
    logits_NV = teacher.signal(batch, Encoding("dense")).logits(slice(None)).view(4, T, V)
    for b in range(4):
        for t in range(T):
            at = C + t
            begin = at - int(batch.positions_BW[b, at])
            with torch.no_grad():
                alone_V = teacher.model(input_ids=batch.window_BW[b : b + 1, begin : at + 1]).logits[0, -1, :V]
            torch.testing.assert_close(logits_NV[b, t], alone_V, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def lstm(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder over the tiny world's vocabulary, with opinions."""
    folder = tmp_path_factory.mktemp("lstm")
    torch.manual_seed(4)
    size = len(AutoTokenizer.from_pretrained(world.teacher))
    LSTMForCausalLM(
        LSTMConfig(vocab_size=size, embedding_size=24, hidden_size=20, initializer_range=0.1, eos_token_id=0)
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(folder)
    return folder


def run(world: World, *overrides: str) -> Path:
    """A run's folder."""
    made = run_command(str(world.recipe), *overrides)
    assert made.returncode == 0, made.stderr
    return load_recipe(str(world.recipe), list(overrides)).folder


def test_an_lstm_teaches_a_transformer(world: World, lstm: Path) -> None:
    """Fresh weights of the tiny teacher's architecture, smaller; the evaluation commands on what comes out."""
    folder = run(
        world, "run.name=lstm-to-llama", f"teacher.model={lstm}", f"student.config={world.teacher}",
        "student.overrides={num_hidden_layers: 1, intermediate_size: 32}", "student.hidden_size=512",
        "student.num_layers=2", "student.fit_tokens=8192", "stages.0.length.steps=4", "stages.1.length.steps=4",
    )  # fmt: skip
    result, student = result_of(folder), AutoModelForCausalLM.from_pretrained(folder / "student")
    assert student.config.model_type == "llama" and student.config.num_hidden_layers == 1
    assert student.config.vocab_size == len(WORDS) + 2
    assert result["student"]["kl_to_teacher_nats"] < result["curves"]["student"][0]["kl_to_teacher_nats"]
    for protocol in ("perplexity", "agreement"):
        measured = run_eval(protocol, str(folder))
        assert measured.returncode == 0, measured.stderr
    teacher, student, _ = make_subjects([str(folder)])
    assert (runtimes_of(teacher), runtimes_of(student)) == (RUNTIMES["student"], RUNTIMES["transformer"])
    refused = run_command(str(folder), "--to", "onnx", launcher=("-m", "distill.export"))
    assert refused.returncode == 2 and "expected a student (model_type potstill_lstm), found llama" in refused.stderr


def test_an_lstm_teaches_a_smaller_lstm(world: World, lstm: Path) -> None:
    folder = run(world, "run.name=lstm-to-lstm", f"teacher.model={lstm}", "control=false", "student.hidden_size=8")
    found, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "student", lstm))
    assert found.config.hidden_size == 8 and found.config.embedding_size == theirs.config.embedding_size


def test_a_run_goes_on_from_weights(world: World, other_weights: Path) -> None:
    """With a learning rate of nothing the student stays what it was given, in place of the teacher's embedding."""
    folder = run(
        world, "run.name=onward", f"student.model={other_weights}", "control=false", "student.hidden_size=512",
        "student.num_layers=2", "student.fit_tokens=8192", "stages.0.learning_rate=1e-30",
        "stages.1.learning_rate=1e-30",
    )  # fmt: skip
    found, given = (load_file(path / "model.safetensors") for path in (folder / "student", other_weights))
    for name, value in given.items():
        torch.testing.assert_close(found[name], value[: len(found[name])], rtol=0, atol=1e-7, msg=name)


def test_a_stopped_run_of_a_transformer_goes_on_bit_by_bit(world: World) -> None:
    overrides = (
        "run.name=resumed", f"student.config={world.teacher}", "control=false", "student.hidden_size=512",
        "student.num_layers=2", "student.fit_tokens=8192", "run.checkpoint_every={steps: 3}", "run.keep_checkpoints=9",
    )  # fmt: skip
    folder = run(world, *overrides)
    before = load_file(folder / "student" / "model.safetensors")
    (folder / "result.json").unlink()
    checkpoints = sorted((folder / "checkpoints" / "student").glob("step-*"))
    for late in checkpoints[-2:]:
        shutil.rmtree(late)
    assert len(checkpoints) > 3 and run(world, *overrides) == folder
    after = load_file(folder / "student" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def strangers(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that do not fit the tiny world: other words, another width, a softcap, no documents apart."""
    folder = tmp_path_factory.mktemp("strangers")
    save_tokenizer(folder / "words", [*WORDS[:-1], "elsewhere"])
    save_llama(folder / "words", vocab_size=64)
    save_llama(folder / "wide", vocab_size=64, hidden_size=32)
    for name in ("gemma2", "bloom"):
        CONFIGS[name]().save_pretrained(folder / name)
    return folder


FRESH = ["student.hidden_size=512", "student.num_layers=2", "student.fit_tokens=8192"]
REFUSED = [
    (["student.model={strangers}/words"], "another vocabulary .* set student.tokenizer="),
    (["student.model={teacher}"], "is the teacher itself"),
    (["student.model=/no/model"], "student /no/model: expected a model folder"),
    (["student.config={strangers}/wide", "stages.0.objective=forward_kl"], "32 wide, the teacher's 24; set"),
    (
        ["student.config={strangers}/wide", "student.transplant=false"],
        "stages.0.objective: hidden_mse .*found 32 .* 24",
    ),
    (["student.config={strangers}/gemma2", "student.transplant=false"], "softcap of 2.0"),
    (["student.config={strangers}/bloom", "student.transplant=false"], "does not keep packed documents apart"),
    (
        ["student.config={teacher}", "student.overrides={{layers: 2}}"],
        "student.overrides: .* has no layers; found .*num_",
    ),
    (["student.config={teacher}", "student.overrides={{num_attention_heads: 7}}"], "no causal model can be made of it"),
    (["student.config={teacher}", "corpus.block_length=300"], "windows of 304 tokens"),
    (["student.config={teacher}", "student.hidden_size=8"], "hidden_size: only for a fresh LSTM"),
    (["student.config={teacher}", "student.model={teacher}"], "model, config: give one of them"),
    (["student.overrides={{num_hidden_layers: 2}}"], "overrides: only beside config"),
    (["student.config={teacher}", "stages.0.objective=layer_mse"], "layer_mse is for the LSTM"),
    (["teacher.model={lstm}", "stages.0.objective=layer_mse"], "layer_mse needs a Transformer"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=range(len(REFUSED)))
def test_students_that_cannot_work_are_refused_before_any_work(
    world: World, strangers: Path, lstm: Path, overrides: list[str], message: str
) -> None:
    given = [o.format(strangers=strangers, teacher=world.teacher, lstm=lstm) for o in overrides]
    defaults = [] if any("overrides={num" in o or "lstm" in o for o in given) and "config" not in given[0] else FRESH
    with pytest.raises(UserError, match=message):
        recipe = load_recipe(str(world.recipe), [*defaults, *given])
        parts = TeacherAndText(recipe, Accelerator(cpu=True))
        make_student(recipe, parts.teacher, parts.corpus.separator_id)


def test_a_loaded_model_is_as_wide_as_its_tokenizer(world: World, other_weights: Path) -> None:
    recipe = load_recipe(str(world.recipe), [*FRESH, f"student.model={other_weights}"])
    parts = TeacherAndText(recipe, Accelerator(cpu=True))
    student = make_student(recipe, parts.teacher, parts.corpus.separator_id)
    padded = load_language_model(str(other_weights), device=CPU, dtype="fp32")
    assert student.get_output_embeddings().weight.shape[0] == parts.teacher.vocab_size < 64
    ids_1W = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(student(ids_1W).logits, padded.head.logits(padded.hidden(ids_1W)))
