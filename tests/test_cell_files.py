"""What is made of students of other cells: ONNX files, decoders, drafts, time constants, whole runs, penalties.

python -m pytest tests/test_cell_files.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import World, result_of, run_command
from safetensors.torch import load_file
from test_config import refusal
from test_memory import periodic, tokenizer, wrap
from test_student import make_student, packed_rows
from transformers import LlamaForCausalLM

from distill.config import StudentConfig, TeacherConfig, UserError
from distill.decode import load_decoder, stream
from distill.fused import StudentWithLoss
from distill.hub import _architecture, _onnx
from distill.objective import Objective
from distill.sampling import Sampler
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import load_teacher
from distill.torch_decoder import TorchDecoder
from distill.transplant import build_student, transplant_feed_forward
from eval.memory import time_constants
from eval.speculative import speculate, teacher_alone

CPU = torch.device("cpu")

# ---------------------------------------------------------------- ONNX, decoders, drafts


def test_onnx_files_of_a_gru_with_feed_forward_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("distill.export.STEPS", 100)
    from test_decode import spread_student

    from distill.decode import Decoder
    from distill.export import main

    spread_student(cell="gru", feed_forward_size=20).save_pretrained(tmp_path)
    for words in (["--to", "onnx"], ["--to", "onnx", "--int8"], ["--to", "decoder", "--verify"]):
        assert main([str(tmp_path), *words]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() == {"model.onnx", "model_int8.onnx", "decoder.onnx"}
    lanes = Decoder(tmp_path, threads=1).lanes(3)
    assert [part.shape for part in lanes.states[0]] == [(2, 3, 32)]
    text = "\n".join(_onnx(tmp_path, "x", {"cell": "gru"}))
    assert "read `input_ids`, `h` (zeros at first) and give `logits`, `h_next`;" in text


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"cell": "ln_lstm"}, "student.cell ln_lstm: ONNX files"),
        ({"attention_window": 3}, "student.attention_window 3: ONNX files"),
    ],
    ids=["ln_lstm", "attention"],
)
def test_what_has_no_onnx_files_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict, problem: str
) -> None:
    pytest.importorskip("onnxruntime")
    from distill.export import main

    make_student(dtype=torch.float32, **fields).save_pretrained(tmp_path)
    for target in ("onnx", "decoder"):
        assert main([str(tmp_path), "--to", target]) == 2
        said = capsys.readouterr().err
        assert problem in said and "--runtime torch" in said
    assert not list(tmp_path.glob("*.onnx"))


def test_a_decoder_that_there_is_not_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes decoders: its progress bars are not part of the message."""
    said = "Loading weights:   0%|  | 0/26\rLoading weights: 100%|##| 26/26\nerror: student.cell ln_lstm: no\n"
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=2, stderr=said))
    with pytest.raises(UserError, match="^student.cell ln_lstm: no$"):
        load_decoder(tmp_path)


def test_cards_name_the_architecture() -> None:
    shape = {"num_layers": 2, "hidden_size": 64}
    assert _architecture(shape) == "2 LSTM layers of 64 units"
    assert _architecture({**shape, "cell": "gru", "attention_window": 9, "feed_forward_size": 8}) == (
        "2 GRU layers of 64 units, each with a feed-forward block of 8, attention to the last 9 positions"
    )


@pytest.mark.parametrize("fields", [{"cell": "gru", "attention_window": 3}, {"cell": "ln_lstm"}], ids=["gru", "ln"])
def test_the_torch_decoder_streams_and_drafts(world: World, tmp_path: Path, fields: dict) -> None:
    make_student(dtype=torch.float32, vocab_size=64, eos_token_id=0, **fields).save_pretrained(tmp_path)
    decoder = TorchDecoder(tmp_path, threads=1)
    prompts = [[0, 5, 7], [0], [0, 9, 3, 4, 1]]
    steps = list(stream(decoder, prompts, 6, Sampler(0)))
    for row, prompt in enumerate(prompts):
        expected = decoder.student.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert [tokens[row] for tokens in steps] == expected[0, len(prompt) :].tolist()
    teacher = LlamaForCausalLM.from_pretrained(world.teacher).eval()
    written, _ = speculate(teacher, decoder, [0, 7, 9], 12, 5, Sampler(0), 4)
    assert written == teacher_alone(teacher, [0, 7, 9], 12)


@pytest.mark.parametrize("cell", ["gru", "ln_lstm"])
def test_time_constants_are_those_of_a_loop(cell: str) -> None:
    """Of an LSTM f is what c gains when c' grows by one; of a GRU z is computed."""
    student = make_student(dtype=torch.float32, vocab_size=len(tokenizer()), cell=cell, num_layers=1)
    model, documents = wrap(student, tokenizer(), "student"), periodic(8, length=30)
    (found_H,) = time_constants(model, documents, tokens=30)
    block, logs = student.model.layers[0], []
    state = (torch.zeros(1, 1, 16),) * (1 if cell == "gru" else 2)
    with torch.no_grad():
        ids_1T = torch.from_numpy(documents.tokens[0][:30].astype(np.int64))[None]
        x_1TH = block.norm(student.model.input_projection(student.model.embed_tokens(ids_1T)))
        for x_11H in x_1TH.split(1, 1):
            if cell == "gru":
                parts = (
                    block.gru.get_parameter(f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                w, u, b, e = (part[16:32] for part in parts)
                kept_H = torch.sigmoid(w @ x_11H[0, 0] + b + u @ state[0][0, 0] + e)
                state = (block.gru(x_11H, state[0])[1],)
            else:
                more = block.ln_lstm(x_11H, (state[0], state[1] + 1), None, 0.0)[1]
                state = block.ln_lstm(x_11H, state, None, 0.0)[1]
                kept_H = (more[1] - state[1])[0, 0]
            logs.append(kept_H.double().log())
    assert found_H.numpy() == pytest.approx((-1 / torch.stack(logs).mean(0)).numpy(), rel=1e-3)


# ---------------------------------------------------------------- what the loss adds


@pytest.mark.parametrize("resets", [False, True])
def test_penalties_by_their_definition(resets: bool) -> None:
    """Values and gradients, with dropout."""
    student = make_student(dtype=torch.float32, output_dropout=0.3, cell="gru").train()
    ids_BT, reset_BT, _ = packed_rows()
    reset_BT &= resets
    last, seen = student.model.layers[-1], []
    last.dropout.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    last.gru.register_forward_hook(lambda _, inputs, output: seen.append(output[0]))  # not called where the run resets

    def results(penalties: dict[str, float]) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        student.zero_grad()
        torch.manual_seed(0)
        model = StudentWithLoss(student, penalties=penalties)
        loss, sums, _ = model(ids_BT, ids_BT, reset_BT, None, None, Objective({"cross_entropy": 1.0}))
        loss.backward()
        return loss, sums, [p.grad.clone() for p in student.parameters()]

    plain, _, plain_gradients = results({})
    loss, sums, found = results({"activation_penalty": 2.0, "temporal_activation_penalty": 0.5})
    seen.clear()
    student.zero_grad()
    torch.manual_seed(0)
    student.model(ids_BT, reset_mask=reset_BT)
    output_BTH, dropped_BTH = seen[-1]
    assert 0.5 < (dropped_BTH != 0).float().mean() < 0.9
    assert resets or torch.equal(output_BTH, seen[0])
    pairs = [(b, t) for b in range(2) for t in range(7) if not reset_BT[b, t + 1]]
    assert len(pairs) == (14 - 4 if resets else 14)
    activation = sum(dropped_BTH[b, t].square().sum() / 16 for b in range(2) for t in range(8))
    change = sum((output_BTH[b, t + 1] - output_BTH[b, t]).square().sum() / 16 for b, t in pairs)
    torch.testing.assert_close(sums["activation_penalty"], activation.detach())
    torch.testing.assert_close(sums["temporal_activation_penalty"], change.detach())
    torch.testing.assert_close(loss, plain + 2 * activation + 0.5 * change)
    (2 * activation + 0.5 * change).backward()
    for parameter, both, alone in zip(student.parameters(), found, plain_gradients, strict=True):
        more = torch.zeros_like(both) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(both, alone + more, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the teacher's feed-forward blocks


@pytest.mark.parametrize("width", [24, 16])
def test_feed_forward_blocks_do_what_the_teachers_do(world: World, width: int) -> None:
    """For states without a mean, which LayerNorm takes away and RMSNorm does not: P times what the teacher adds."""
    teacher = load_teacher(TeacherConfig(model=str(world.teacher), dtype="fp32"), CPU)
    config = StudentConfig(hidden_size=width, num_layers=2, feed_forward_size=48, feed_forward_from="teacher")
    student = build_student(config, teacher, 0, seed=0, transplant=True)
    generator = torch.Generator().manual_seed(0)
    turn_Hd = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0][:width]
    with torch.no_grad():
        for layer in teacher.model.model.layers:
            layer.post_attention_layernorm.weight.copy_(torch.rand(24, generator=generator) + 0.5)
        student.model.input_projection.weight.copy_(turn_Hd / 3)
        transplant_feed_forward(student, teacher)
        x_NH = torch.randn(7, width, generator=generator)
        x_NH -= x_NH.mean(1, keepdim=True)
        hidden_Nd = 3 * x_NH @ turn_Hd
        for block, layer in zip(student.model.layers, teacher.model.model.layers, strict=True):
            added_Nd = layer.mlp(layer.post_attention_layernorm(hidden_Nd))
            added_NH = block.feed_forward(x_NH) - x_NH
            torch.testing.assert_close(added_NH, added_Nd @ (turn_Hd / 3).t(), rtol=1e-3, atol=1e-5)


def test_a_narrower_student_takes_the_largest_units(world: World) -> None:
    teacher = load_teacher(TeacherConfig(model=str(world.teacher), dtype="fp32"), CPU)
    config = StudentConfig(hidden_size=16, num_layers=1, feed_forward_size=3, feed_forward_from="teacher")
    student = build_student(config, teacher, 0, seed=0, transplant=True)
    mlp = teacher.model.model.layers[1].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, [5, 9, 40]] *= 100
        transplant_feed_forward(student, teacher)
        expected_HF = student.model.input_projection.weight @ mlp.down_proj.weight[:, [5, 9, 40]]
    torch.testing.assert_close(student.model.layers[0].feed_forward.down.weight, expected_HF)
    for fields, problem in (
        ({"feed_forward_size": 49}, "student.feed_forward_size: expected at most the teacher's 48"),
        ({"feed_forward_size": 3, "embedding_size": 6}, "student.feed_forward_from: teacher needs an embedding"),
    ):
        with pytest.raises(UserError, match=problem):
            wrong = StudentConfig(hidden_size=16, feed_forward_from="teacher", **fields)
            build_student(wrong, teacher, 0, seed=0, transplant=True)
    teacher.model.config.hidden_act = "gelu"
    with pytest.raises(UserError, match="expected a teacher of Llama's kind .* found llama; use random"):
        build_student(config, teacher, 0, seed=0, transplant=True)
    build_student(config, teacher, 0, seed=0, transplant=False)  # the control takes nothing over


# ---------------------------------------------------------------- the recipe and a whole run


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("student.attention_window=9", "corpus.block_length=8"),
            "student.attention_window: expected at most corpus.block_length (8), as far as gradients reach, found 9",
        ),
        (("student.feed_forward_from=teacher",), "feed_forward_from: teacher needs feed_forward_size and transplant"),
        (("student.attention_window=1",), "student.attention_window"),
        (("student.cell=rnn",), "student.cell: Input should be 'lstm', 'gru' or 'ln_lstm'"),
        (("student.activation_penalty=-1",), "student.activation_penalty"),
        (("student.embedding_dropout=1",), "student.embedding_dropout"),
    ],
)
def test_the_recipe_refuses(tmp_path: Path, overrides: tuple[str, ...], problem: str) -> None:
    assert problem in "\n".join(refusal(tmp_path, *overrides))


EVERYTHING = (
    "student.cell=gru",
    "student.num_layers=2",
    "student.attention_window=4",
    "student.feed_forward_size=12",
    "student.feed_forward_from=teacher",
    "student.embedding_dropout=0.1",
    "student.output_dropout=0.1",
    "student.variational_dropout=true",
    "student.activation_penalty=2",
    "student.temporal_activation_penalty=1",
    "control=false",
    "run.keep_checkpoints=9",
    "evaluation.prompts=[]",
)


def test_a_run_with_everything_learns_and_goes_on_bit_by_bit(world: World, tmp_path: Path) -> None:
    command = (str(world.recipe), f"run.output_dir={tmp_path}", *EVERYTHING)
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny"
    points = result_of(run)["curves"]["student"]
    assert points[-1]["nll_nats"] < points[0]["nll_nats"]
    log = [json.loads(line) for line in (run / "student.log.jsonl").read_text().splitlines()]
    for row in log:
        penalty = 2 * row["loss_activation_penalty"] + row["loss_temporal_activation_penalty"]
        terms = {"hidden_mse": 1.0} if row["stage"] == 0 else {"forward_kl": 0.8, "cross_entropy": 0.2}
        assert penalty > 0
        assert row["loss"] == pytest.approx(penalty + sum(w * row[f"loss_{term}"] for term, w in terms.items()))
    checkpoints = run / "checkpoints" / "student"
    lanes = load_file(checkpoints / "step-00000006" / "lanes.safetensors")
    assert {name: tuple(part.shape) for name, part in lanes.items()} == {
        "h_LGH": (2, 8, 16), "memory_MGH": (3, 8, 16), "valid_MG": (3, 8),
    }  # fmt: skip
    config = LSTMConfig.from_pretrained(run / "student")
    assert (config.cell, config.attention_window, config.feed_forward_size) == ("gru", 4, 12)
    assert config.variational_dropout and config.embedding_dropout == 0.1
    expected = LSTMForCausalLM.from_pretrained(run / "student").state_dict()
    for path in (run / "student", checkpoints / "step-00000014"):
        shutil.rmtree(path)
    (run / "result.json").unlink()
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    found = LSTMForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
