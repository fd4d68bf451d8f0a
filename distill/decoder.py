"""The student as one ONNX graph a token, in few bits: what `distill/decode.py` runs.

    python -m distill.export MODEL --to decoder

writes `decoder.safetensors` (quantised weights) and `decoder.onnx` (the graph) beside the student's own. A step is
about forty nodes, so nothing of it happens in Python:

    token ─> row of the embedding, input projection multiplied in (int8, V x H)
          ─> L x [x + cell(LayerNorm(x))], W_ih and W_hh side by side in one product (int8)
          ─> u, along r axes and along all d (see quantise.py)
          ─> preview: all V tokens along r axes (int4) ─> the 80 blocks of 16 tokens with the highest one
          ─> exact: those 1,280 tokens along all d axes (int8)

Products are onnxruntime's MatMulNBits with int8 arithmetic, which read weights at memory speed. Blocks of tokens
rather than single ones, because the 80 largest of V / 16 maxima are found much faster than the 1,280
largest of V, and lie together in memory. So that a block's other tokens are worth their refining, those of one block
are alike (`alike_together`): preview and head have the tokens in that order, which is stored as `tokens`.

A GRU's n takes W_n x and U_n h apart, each beside zeros, so that its product is as large as an LSTM's.

Legend: B sequences, V tokens (W: rounded up to whole blocks), L layers, H width, F units of a feed-forward block,
d head's width, r axes of the preview, n blocks of k tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from distill.checkpoint import write_atomically
from distill.config import UserError
from distill.decode import after
from distill.graph import Graph
from distill.quantise import BLOCK, alike_together, own_text, quantise_blocks, quantise_rows, two_step_head
from distill.student import STATE_NAMES, LSTMForCausalLM

TOKENS = 16  # of a block
BLOCKS = 80  # refined at each step
AXES, AXES_BITS = 128, 4  # of the preview


def check_onnx(config: PreTrainedConfig) -> None:
    """UserError for a student of which there are no ONNX files."""
    if reason := why_no_onnx(config):
        raise UserError(reason)


def why_no_onnx(config: PreTrainedConfig) -> str:
    """The fields that stand against ONNX files of a student; empty where there are such files."""
    found = [f"student.cell {config.cell}"] if config.cell not in ("lstm", "gru") else []
    found += [f"student.attention_window {config.attention_window}"] if config.attention_window else []
    if not found:
        return ""
    return (
        f"{' and '.join(found)}: ONNX files and the quantised decoder are for cells lstm and gru without attention; "
        "decode this student with --runtime torch"
    )


def quantised_weights(student: LSTMForCausalLM, hidden_Nd: Tensor) -> dict[str, Tensor]:
    """All tensors of the decoder, by the names that the graph uses."""
    weights: dict[str, Tensor] = {}

    def product(name: str, weight_NK: Tensor, bias_N: Tensor, bits: int = 8) -> None:
        weights[name], weights[f"{name}.scale"] = quantise_blocks(weight_NK, bits)
        weights[f"{name}.bias"] = bias_N.float()

    state = {name: value.detach().double() for name, value in student.state_dict().items()}
    embedded_VH = state["model.embed_tokens.weight"] @ state["model.input_projection.weight"].T
    embedded_VH = embedded_VH + state["model.input_projection.bias"]
    weights["embedding"], weights["embedding.scale"] = quantise_rows(embedded_VH)

    def after_norm(name: str, weight_NH: Tensor, bias_N: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """The same product of what a norm gives before its own weight and bias."""
        return weight_NH * state[f"{name}.weight"], bias_N + weight_NH @ state[f"{name}.bias"]

    for n in range(student.config.num_layers):
        layer, cell = f"model.layers.{n}", student.config.cell
        recurrent_GH, recurrent_G = (state[f"{layer}.{cell}.{kind}_hh_l0"] for kind in ("weight", "bias"))
        input_G = state[f"{layer}.{cell}.bias_ih_l0"]
        input_GH, input_G = after_norm(f"{layer}.norm", state[f"{layer}.{cell}.weight_ih_l0"], input_G)
        if cell == "gru":
            r_z, n_H = torch.arange(len(input_G)).split([2 * student.config.hidden_size, student.config.hidden_size])
            both_GK = torch.cat([input_GH, recurrent_GH], dim=1)[r_z]
            apart_GK = torch.block_diag(input_GH[n_H], recurrent_GH[n_H])
            bias_G = torch.cat([(input_G + recurrent_G)[r_z], input_G[n_H], recurrent_G[n_H]])
            product(f"gru.{n}", torch.cat([both_GK, apart_GK]), bias_G)
        else:
            i, f, g, o = torch.arange(len(input_G)).chunk(4)
            order = torch.cat([i, f, o, g])  # the three sigmoids side by side
            product(f"lstm.{n}", torch.cat([input_GH, recurrent_GH], dim=1)[order], (input_G + recurrent_G)[order])
        if student.config.feed_forward_size:
            gate_FH, up_FH, down_HF = (state[f"{layer}.feed_forward.{part}.weight"] for part in ("gate", "up", "down"))
            product(f"wide.{n}", *after_norm(f"{layer}.feed_forward.norm", torch.cat([gate_FH, up_FH])))
            product(f"narrow.{n}", down_HF, torch.zeros(len(down_HF)))

    head_Vd = state["lm_head.weight"]
    V, d = head_Vd.shape
    preview, exact = two_step_head(head_Vd, hidden_Nd, min(AXES, d))
    turn_Kd, shift_K = torch.cat([preview.turn_rd, exact.turn_rd]), torch.cat([preview.shift_r, exact.shift_r])
    out_KH = turn_Kd @ state["model.output_projection.weight"]
    shift_K = shift_K + turn_Kd @ state["model.output_projection.bias"] + out_KH @ state["model.norm.bias"]
    product("out", out_KH * state["model.norm.weight"], shift_K)
    bias_V = state.get("lm_head.bias", torch.zeros(V, dtype=torch.float64))
    tokens_V = alike_together(exact._replace(bias_V=exact.bias_V + bias_V), hidden_Nd, TOKENS)
    weights["tokens"] = tokens_V.int()
    tokens_W = tokens_V[torch.arange(-(-V // TOKENS) * TOKENS).clamp_max(V - 1)]  # the last fills its block
    product("preview", preview.weight_Vr[tokens_W], (preview.bias_V + bias_V)[tokens_W], AXES_BITS)
    numbers_Wd, scale_W1 = quantise_rows(exact.weight_Vr[tokens_W])
    weights["head"] = numbers_Wd.view(-1, TOKENS, d).mT.flatten(1)  # d x k: onnxruntime pads k as columns least
    weights["head.scale"] = scale_W1.view(-1, TOKENS)
    weights["head.bias"] = (exact.bias_V + bias_V)[tokens_W].float().view(-1, TOKENS)
    return {name: value.contiguous() for name, value in weights.items()}


def step_graph(graph: Graph, config: PreTrainedConfig) -> dict[str, tuple[str, str, tuple[int | str, ...]]]:
    """Fill the graph; returns its outputs. Its inputs are token_1B and the state's parts: h_LBH, and c_LBH if any."""
    V, d, H, L = config.vocab_size, config.embedding_size, config.hidden_size, config.num_layers
    axes, blocks = min(AXES, d), -(-V // TOKENS)
    chosen = min(BLOCKS, blocks)

    def product(name: str, x: str, rows: int, columns: int, bits: int = 8) -> str:
        parts = [graph.weight(part) for part in (name, f"{name}.scale")]
        shape = {"N": rows, "K": columns, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        y = graph.node("MatMulNBits", x, *parts, domain="com.microsoft", **shape)
        return graph.node("Add", y, graph.weight(f"{name}.bias"))

    def normed(x: str) -> str:
        return graph.node("LayerNormalization", x, ones, axis=-1, epsilon=config.layer_norm_eps)

    def gathered(name: str, index: str) -> str:
        return graph.node("Gather", graph.weight(name), index, axis=0)

    def as_float(x: str) -> str:
        return graph.node("Cast", x, to=1)

    def reshaped(x: str, *shape: int) -> str:
        return graph.node("Reshape", x, graph.constant(shape))

    ones = graph.constant([1.0] * H, np.float32)
    x_1BH = graph.node("Mul", as_float(gathered("embedding", "token_1B")), gathered("embedding.scale", "token_1B"))
    names = STATE_NAMES[config.cell]
    state = {name: graph.nodes("Split", name, results=L, axis=0, num_outputs=L) for name in names}
    h_1BH = state["h_LBH"]
    for n in range(L):
        both = graph.node("Concat", normed(x_1BH), h_1BH[n], axis=2)
        gates = product(f"{config.cell}.{n}", both, 4 * H, 2 * H)
        if config.cell == "gru":
            gates, *parts = graph.nodes("Split", gates, graph.constant([2 * H, H, H]), results=3, axis=2)
            r, z = graph.nodes("Split", graph.node("Sigmoid", gates), results=2, axis=2, num_outputs=2)
            new = graph.node("Tanh", graph.node("Add", parts[0], graph.node("Mul", r, parts[1])))
            h_1BH[n] = graph.node("Add", new, graph.node("Mul", z, graph.node("Sub", h_1BH[n], new)))
        else:
            c_1BH = state["c_LBH"]
            gates, g = graph.nodes("Split", gates, graph.constant([3 * H, H]), results=2, axis=2)
            i, f, o = graph.nodes("Split", graph.node("Sigmoid", gates), results=3, axis=2, num_outputs=3)
            c_1BH[n] = graph.node("Add", graph.node("Mul", f, c_1BH[n]), graph.node("Mul", i, graph.node("Tanh", g)))
            h_1BH[n] = graph.node("Mul", o, graph.node("Tanh", c_1BH[n]))
        x_1BH = graph.node("Add", x_1BH, h_1BH[n])
        if F := config.feed_forward_size:
            wide = product(f"wide.{n}", normed(x_1BH), 2 * F, H)
            gate, up = graph.nodes("Split", wide, results=2, axis=2, num_outputs=2)
            gated = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
            x_1BH = graph.node("Add", x_1BH, product(f"narrow.{n}", gated, H, F))

    u_BK = reshaped(product("out", normed(x_1BH), axes + d, H), -1, axes + d)
    u_Br, u_Bd = graph.nodes("Split", u_BK, graph.constant([axes, d]), results=2, axis=1)
    preview_BW = product("preview", u_Br, blocks * TOKENS, axes, AXES_BITS)
    highest_Bn = graph.node("ReduceMax", reshaped(preview_BW, -1, blocks, TOKENS), graph.constant([2]), keepdims=0)
    _, block_Bn = graph.nodes("TopK", highest_Bn, graph.constant([chosen]), results=2, sorted=0)

    whole, scale, zero = graph.nodes("DynamicQuantizeLinear", u_Bd, results=3)
    head_Bndk = reshaped(gathered("head", block_Bn), -1, chosen, d, TOKENS)
    sums = graph.node("MatMulInteger", reshaped(whole, -1, 1, 1, d), head_Bndk, zero)
    sums_Bnk = graph.node("Mul", as_float(reshaped(sums, -1, chosen, TOKENS)), scale)
    exact_Bnk = graph.node(
        "Add", graph.node("Mul", sums_Bnk, gathered("head.scale", block_Bn)), gathered("head.bias", block_Bn)
    )
    return {
        **{after(name): (graph.node("Concat", *state[name], axis=0), "FLOAT", (L, "B", H)) for name in names},
        "preview_BW": (preview_BW, "FLOAT", ("B", blocks * TOKENS)),
        "block_Bn": (block_Bn, "INT64", ("B", chosen)),
        "exact_Bnk": (exact_Bnk, "FLOAT", ("B", chosen, TOKENS)),
        "u_Bd": (u_Bd, "FLOAT", ("B", d)),
    }


def write_decoder(student: LSTMForCausalLM, folder: Path) -> Path:
    """Quantise a student and write both files beside `folder`/model.safetensors; returns the ONNX file."""
    config = student.float().config
    check_onnx(config)
    with torch.inference_mode():
        ids_BT = own_text(student, sequences=64, length=64)
        hidden_Nd = student.model(ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
    weights = quantised_weights(student, hidden_Nd)
    file = folder / "decoder.safetensors"
    write_atomically(file, lambda path: save_file(weights, path), "MODEL")
    graph = Graph(file)
    outputs = step_graph(graph, config)
    state = ("FLOAT", (config.num_layers, "B", config.hidden_size))
    inputs = {"token_1B": ("INT64", (1, "B")), **dict.fromkeys(STATE_NAMES[config.cell], state)}
    graph.save(folder / "decoder.onnx", inputs, outputs, [folder / "model.safetensors"])
    return folder / "decoder.onnx"
