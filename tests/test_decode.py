"""The quantised decoder, the sampler and the ONNX files, each against PyTorch.

python -m pytest tests/test_decode.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, World, run_command
from safetensors.torch import load_file
from test_bad_input import refused
from test_student import make_student
from transformers import AutoTokenizer

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from distill import decoder as decoder_file
from distill.config import UserError
from distill.decode import Decoder, stream
from distill.decoder import TOKENS, quantised_weights
from distill.export import main, verify
from distill.quantise import alike_together, own_text, quantise_blocks, quantise_rows, restore_blocks, two_step_head
from distill.sampling import Sampler
from distill.student import LSTMForCausalLM
from distill.torch_decoder import TorchDecoder, load_student

V = 2500  # more than one step refines, and no multiple of a block


def spread_student(**fields) -> LSTMForCausalLM:
    """A student of moderate logits whose head has falling singular values, as trained ones do."""
    sizes = {"vocab_size": V, "embedding_size": 24, "hidden_size": 32, "num_layers": 2, "eos_token_id": 0}
    student = make_student(dtype=torch.float32, **(sizes | fields))
    with torch.no_grad():
        student.lm_head.weight *= 0.3 * torch.arange(24).neg().div(8).exp()
        student.lm_head.weight += 1.0  # adds the same to all logits, which no probability sees
    return student


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student saved with the tiny world's tokenizer and all its ONNX files."""
    path = tmp_path_factory.mktemp("decoder") / "student"
    spread_student().save_pretrained(path)
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(path)
    for words in (["--to", "decoder"], ["--to", "onnx"], ["--to", "onnx", "--int8"]):
        assert main([str(path), *words]) == 0
    return path


# ---------------------------------------------------------------- numbers in few bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [24, 128, 300])
def test_blocks_restore_to_half_a_step(bits, columns):
    weight_NK = torch.randn(7, columns)
    numbers, scale_Nb = quantise_blocks(weight_NK, bits)
    assert numbers.shape == (7, -(-columns // 128), 16 * bits) and numbers.dtype == torch.uint8
    steps_NK = scale_Nb.repeat_interleave(128, dim=1)[:, :columns]
    assert ((restore_blocks(numbers, scale_Nb, columns) - weight_NK).abs() <= 0.5001 * steps_NK).all()


def test_two_step_head_is_the_head():
    weight_Vd, z_Nd = torch.randn(50, 12).double() + 3, torch.randn(400, 12).double() * torch.arange(1, 13) + 2
    preview, exact = two_step_head(weight_Vd, z_Nd, axes=5)
    logits_NV = z_Nd @ weight_Vd.T
    found_NV = (z_Nd @ exact.turn_rd.T + exact.shift_r) @ exact.weight_Vr.T + exact.bias_V
    torch.testing.assert_close(found_NV.log_softmax(-1), logits_NV.log_softmax(-1), rtol=0, atol=1e-9)

    # The preview is the best of its rank: a plain truncated SVD of the same (centred) logits is the oracle.
    centred_NV = logits_NV - logits_NV.mean(1, keepdim=True)
    centred_NV = centred_NV - centred_NV.mean(0)
    _, s, _ = torch.linalg.svd(centred_NV, full_matrices=False)
    left_out = s[5:].square().sum() / len(z_Nd)
    preview_NV = (z_Nd @ preview.turn_rd.T + preview.shift_r) @ preview.weight_Vr.T
    error = (preview_NV - centred_NV).square().sum() / len(z_Nd)
    torch.testing.assert_close(error, left_out, rtol=1e-2, atol=0)  # but for the ridge of 1e-4


def test_tokens_of_a_block_are_alike():
    """Families of tokens with nearly one row are found again, whatever order they came in."""
    family_V = torch.arange(64).repeat_interleave(4)[torch.randperm(256)][:254]
    weight_Vd = torch.randn(64, 12)[family_V] + 0.01 * torch.randn(254, 12)
    z_Nd = torch.randn(400, 12) * torch.arange(1, 13)
    _, exact = two_step_head(weight_Vd, z_Nd, axes=5)
    order_V = alike_together(exact, z_Nd, size=4)
    assert torch.equal(order_V.sort().values, torch.arange(254))
    blocks = family_V[order_V][:252].view(-1, 4)
    assert (blocks == blocks[:, :1]).all(1).float().mean() > 0.5  # a cut may go through a family
    by_chance = family_V[:252].view(-1, 4)
    assert (by_chance == by_chance[:, :1]).all(1).float().mean() < 0.1


# ---------------------------------------------------------------- the graph


def oracle_step(student, weights, tokens_B, h_LBH, c_LBH):
    """The same numbers in plain PyTorch, weights multiplied out, no arithmetic in int8."""
    H, axes = student.config.hidden_size, min(decoder_file.AXES, student.config.embedding_size)

    def product(name, x, columns):
        return x @ restore_blocks(weights[name], weights[f"{name}.scale"], columns).T + weights[f"{name}.bias"]

    def normed(x):
        return torch.nn.functional.layer_norm(x, (H,), eps=student.config.layer_norm_eps)

    x_BH = weights["embedding"][tokens_B].float() * weights["embedding.scale"][tokens_B]
    h_next, c_next = [], []
    for n in range(student.config.num_layers):
        gates = product(f"lstm.{n}", torch.cat([normed(x_BH), h_LBH[n]], dim=1), 2 * H)
        i, f, o, g = gates.chunk(4, dim=1)
        c = f.sigmoid() * c_LBH[n] + i.sigmoid() * g.tanh()
        h_next.append(o.sigmoid() * c.tanh())
        c_next.append(c)
        x_BH = x_BH + h_next[-1]
    u_BK = product("out", normed(x_BH), H)
    preview_BW = product("preview", u_BK[:, :axes], axes)
    scale_W, bias_W = weights["head.scale"].flatten(), weights["head.bias"].flatten()
    head_Wd = weights["head"].unflatten(1, (-1, TOKENS)).mT.flatten(0, 1).float() * scale_W[:, None]
    return torch.stack(h_next), torch.stack(c_next), preview_BW, u_BK[:, axes:] @ head_Wd.T + bias_W


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_step_is_its_definition(folder, sequences):
    student, decoder = load_student(folder), Decoder(folder, threads=1)
    weights = load_file(folder / "decoder.safetensors")
    lanes = decoder.lanes(sequences)
    h_LBH = c_LBH = torch.zeros(2, sequences, 32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        tokens_B = torch.randint(0, V, (sequences,), generator=generator)
        lanes.read(tokens_B.numpy())
        h_LBH, c_LBH, preview_BW, exact_BW = oracle_step(student, weights, tokens_B, h_LBH, c_LBH)
        # Activations are rounded to 8 bits, block by block: half of 1/127 of the largest, many times over.
        for found, expected in (
            (lanes.states[lanes.turn][0], h_LBH),
            (lanes.states[lanes.turn][1], c_LBH),
            (lanes.preview_BW, preview_BW),
        ):
            assert (torch.from_numpy(found) - expected).abs().max() < 0.08 * expected.abs().max()
        highest_Bn = preview_BW.unflatten(1, (-1, TOKENS)).amax(2)
        for b in range(sequences):
            blocks = torch.from_numpy(lanes.block_Bn[b])
            assert len(blocks.unique()) == decoder_file.BLOCKS
            others = torch.ones(highest_Bn.shape[1], dtype=torch.bool).index_fill(0, blocks, False)
            slack = 0.05 * preview_BW.abs().max()
            assert highest_Bn[b, blocks].min() >= highest_Bn[b, others].max() - slack
            refined_nk = exact_BW[b].unflatten(0, (-1, TOKENS))[blocks]
            assert (torch.from_numpy(lanes.exact_Bnk[b]) - refined_nk).abs().max() < 0.05 * exact_BW.abs().max()
            places_nk = blocks[:, None] * TOKENS + torch.arange(TOKENS)
            ids_nk = weights["tokens"][places_nk.clamp_max(V - 1)].numpy()
            assert lanes.choose(b, Sampler(0)) == ids_nk.flatten()[lanes.exact_Bnk[b].argmax()]
            logits_V = lanes.logits(b)
            assert np.array_equal(logits_V[ids_nk], lanes.exact_Bnk[b])
            sampler = Sampler(1, top_k=1)  # draws, but has no choice
            assert lanes.choose(b, sampler) == logits_V.argmax()
        h_LBH, c_LBH = (torch.from_numpy(part.copy()) for part in lanes.states[lanes.turn])


def test_files_agree_with_pytorch_for_a_thousand_steps(folder, capsys):
    assert main([str(folder), "--verify"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"model.onnx", "model_int8.onnx", "decoder.onnx"}
    assert figures["model.onnx"]["difference"] < 1e-4
    student = load_student(folder)
    with torch.no_grad():
        student.lm_head.weight *= 2
    assert verify(student, folder, "model.onnx")["difference"] > 1e-4
    assert verify(student, folder, "decoder.onnx")["loss_increase"] > 5e-3


@pytest.mark.parametrize("fields", [{"head_bias": True}, {"tie_word_embeddings": True}, {"num_layers": 1}], ids=str)
def test_every_kind_of_student_is_exported(tmp_path, fields):
    student = spread_student(**fields)
    student.tie_weights()
    student.to(torch.bfloat16 if "num_layers" in fields else torch.float32).save_pretrained(tmp_path)
    for words in (["--to", "decoder"], ["--to", "onnx"], ["--to", "onnx", "--int8"]):
        assert main([str(tmp_path), *words, "--verify"]) == 0


def test_quantised_weights_load_back_bit_for_bit(folder):
    student = load_student(folder)
    with torch.inference_mode():
        hidden_Nd = student.model(own_text(student, 64, 64), use_cache=False).last_hidden_state.flatten(0, 1)
    stored, made = load_file(folder / "decoder.safetensors"), quantised_weights(student, hidden_Nd)
    assert stored.keys() == made.keys()
    assert all(torch.equal(stored[name], made[name]) for name in made)
    numbers_NK, scale_N1 = quantise_rows(student.lm_head.weight)
    int8 = load_file(folder / "model_int8.safetensors")
    assert torch.equal(int8["lm_head.weight"], numbers_NK)
    assert torch.equal(int8["lm_head.weight.scale"], scale_N1[:, 0])


# ---------------------------------------------------------------- streams

PROMPTS = [[0, 5, 7], [0], [0, 9, 3, 4, 1]]


def test_the_fallback_writes_what_generate_writes(folder):
    decoder = TorchDecoder(folder, threads=1)
    steps = list(stream(decoder, PROMPTS, 12, Sampler(0)))
    for row, prompt in enumerate(PROMPTS):
        expected = decoder.student.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert [tokens[row] for tokens in steps] == expected[0, len(prompt) :].tolist()
    ends = [tokens[1] for tokens in steps]
    stop = ends[4]
    steps = list(stream(decoder, PROMPTS, 12, Sampler(0), stop=[stop]))
    first = ends.index(stop)
    assert [tokens[1] for tokens in steps[: first + 1]] == [*ends[:first], None]
    assert all(tokens[1] is None for tokens in steps[first:])


def test_a_batch_reads_as_each_alone(folder):
    decoder = Decoder(folder, threads=1)
    together = decoder.lanes(3)
    alone = [decoder.lanes(1) for _ in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        for token in prompt:
            alone[row].read([token])
        together.take(row, alone[row])
        assert together.choose(row, Sampler(0)) == alone[row].choose(0, Sampler(0))
    for tokens in ([1, 2, 3], [4, 5, 6]):
        together.read(tokens)
        for row, token in enumerate(tokens):
            alone[row].read([token])
            # one scale for the whole batch rounds u a little otherwise
            np.testing.assert_allclose(
                together.states[together.turn][1][:, row], alone[row].states[alone[row].turn][1][:, 0], atol=1e-5
            )
            scale = np.abs(alone[row].preview_BW).max()
            assert np.abs(together.preview_BW[row] - alone[row].preview_BW[0]).max() < 0.01 * scale
    tokens = [tokens[0] for tokens in stream(decoder, PROMPTS[:1], 20, Sampler(0.7, seed=3))]
    assert tokens == [tokens[0] for tokens in stream(decoder, PROMPTS[:1], 20, Sampler(0.7, seed=3))]
    assert tokens != [tokens[0] for tokens in stream(decoder, PROMPTS[:1], 20, Sampler(0.7, seed=4))]


# ---------------------------------------------------------------- the sampler


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 300, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_kept_tokens_are_the_librarys(options, scale):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_V = (scale * torch.randn(V, generator=torch.Generator().manual_seed(0))).numpy()
    warped_1V = torch.from_numpy(logits_V)[None].double()
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in options:
            warped_1V = warper(options[name])(None, warped_1V)
    tokens_P, weights_P = Sampler(**options).kept(logits_V)
    found_V = np.zeros(V)
    found_V[slice(None) if tokens_P is None else tokens_P] = weights_P
    np.testing.assert_allclose(found_V / found_V.sum(), warped_1V[0].softmax(-1).numpy(), atol=1e-6)


def test_draws_invert_the_cumulative_sum():
    from distill.sampling import _draw

    for size in (1, 5, 256, 1000):
        weights = np.random.default_rng(size).random(size).astype(np.float32)
        weights[::3] = 0
        weights[-1] = 0.5
        cumulative = weights.astype(np.float64).cumsum() / weights.sum(dtype=np.float64)
        for uniform in np.linspace(0, 0.999999, 400):
            place = _draw(weights, uniform)
            assert weights[place] > 0
            assert (
                cumulative[place] >= uniform - 1e-6
                and cumulative[place] - weights[place] / weights.sum() <= uniform + 1e-6
            )
    assert Sampler(0).choose(np.array([1.0, 3.0, 3.0], np.float32)) == 1


# ---------------------------------------------------------------- the command, and bad input


def decode(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, launcher=("-m", "distill.decode"), **env)


def test_the_command_streams_and_answers_programs(folder, tmp_path):
    fresh = tmp_path / "student"
    shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("decoder.*", "model_int8*"))
    options = (str(fresh), "--prompt", "the river", "--new-tokens", "5")
    shown = decode(*options)  # makes the decoder first
    assert shown.returncode == 0, shown.stderr
    assert "decoder.onnx" in shown.stderr and (fresh / "decoder.onnx").is_file()
    answer = decode(*options, "--prompt", "a", "--json")
    assert answer.returncode == 0 and not answer.stderr
    completions = json.loads(answer.stdout)["completions"]
    assert [row["prompt"] for row in completions] == ["the river", "a"]
    assert shown.stdout.split() == ["the", "river", *completions[0]["text"].split()]
    plain = json.loads(decode(*options, "--json", "--runtime", "torch").stdout)
    assert plain["runtime"] == "torch" and len(plain["completions"][0]["tokens"]) <= 5


def test_the_fast_process_holds_no_torch(folder):
    code = (
        "import sys; from distill.decode import main; main(sys.argv[1:]); print({*sys.modules} & {'torch', 'pydantic'})"
    )
    run = run_command(str(folder), "--prompt", "a", "--json", launcher=("-c", code), cold=True)
    assert run.stdout.splitlines()[-1] == "set()", run.stderr


def test_bad_input_is_refused(folder, world, tmp_path):
    message = refused(decode(str(world.teacher), "--prompt", "a"))
    assert "expected a student" in message and "llama" in message
    assert "config.json" in refused(decode(str(tmp_path), "--prompt", "a"))
    assert "prompt 0: expected at least one token" in refused(decode(str(folder), "--prompt", ""))
    message = refused(decode(str(folder), "--prompt", "a", "--temperature", "-1", "--top-p", "0"))
    assert "temperature" in message and "top_p" in message
    hidden = tmp_path / "onnxruntime.py"
    hidden.write_text("raise ImportError")
    message = refused(decode(str(folder), "--prompt", "a", PYTHONPATH=f"{tmp_path}:{ROOT}"))
    assert "potstill[onnx]" in message
    with pytest.raises(UserError, match=f"0 to {V - 1}, found 0 to {V}; .* another tokenizer"):
        next(stream(Decoder(folder, 1), [[0, V]], 1, Sampler(0)))


@pytest.mark.parametrize("file", ["decoder.safetensors", "decoder.onnx", "model.safetensors"])
def test_damaged_and_foreign_files_are_named(folder, tmp_path, file):
    student = tmp_path / "student"
    shutil.copytree(folder, student)
    (student / file).write_bytes((folder / file).read_bytes()[:-1000])
    message = refused(decode(str(student), "--prompt", "a"))
    assert "decoder.onnx" in message and "distill.export" in message
    if file == "model.safetensors":
        run = run_command(str(student), "--to", "decoder", launcher=("-m", "distill.export"))
        assert "expected a student's folder with whole weights" in refused(run)


def test_an_onnx_file_of_another_student_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    spread_student(seed=5).save_pretrained(other)
    for name in ("decoder.onnx", "decoder.safetensors", "model.onnx", "tokenizer.json"):
        shutil.copy(folder / name, other)
    assert "was made for other weights" in refused(decode(str(other), "--prompt", "a"))
    run = run_command(str(other), "--verify", launcher=("-m", "distill.export"))
    assert "was made for other weights" in refused(run)
