"""ONNX files of a student, and their verification.

    python -m distill.export MODEL --to onnx [--int8]     whole sequences and steps, in standard operators
    python -m distill.export MODEL --to decoder           one token a step, the fastest (distill/decoder.py)
    python -m distill.export MODEL --verify               every ONNX file there is, against PyTorch

`model.onnx` (opset 21) reads T tokens of B sequences from a given state:

    input_ids (B, T) int64, h (L, B, H), c (L, B, H)  ─>  logits (B, T, V), h_next, c_next

(of a GRU without c and c_next). A zero state starts a sequence. The file holds the structure alone, 10 KB: its
weights are those in `model.safetensors`, which therefore must lie beside it. With `--int8` they are
`model_int8.safetensors`: whole numbers and a scale for each row, a quarter of the size; any runtime multiplies them
out as it loads.

Legend: B sequences, T positions, V tokens, L layers, H width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from distill.checkpoint import write_atomically
from distill.command import guarded
from distill.config import UserError
from distill.decode import Decoder, find_student
from distill.decoder import check_onnx, write_decoder
from distill.graph import Graph
from distill.quantise import own_text, quantise_rows
from distill.session import open_session
from distill.student import LSTMForCausalLM
from distill.torch_decoder import load_student

STEPS = 1000  # carried steps of a verification
LOSS_TOLERANCE = {"model.onnx": 1e-4, "model_int8.onnx": 5e-3, "decoder.onnx": 5e-3}  # as a share of the loss
DIFFERENCE = 1e-4  # of any logit of model.onnx


def write_onnx(student: LSTMForCausalLM, folder: Path, int8: bool) -> Path:
    """Write `model.onnx`, or `model_int8.onnx` and its weights, beside `folder`/model.safetensors."""
    check_onnx(student.config)
    plain = folder / "model.safetensors"
    file = folder / "model_int8.safetensors" if int8 else plain
    if int8:
        write_atomically(file, lambda path: save_file(int8_weights(student), path), "MODEL")
    graph, config = Graph(file), student.config
    state = ("FLOAT", (config.num_layers, "B", config.hidden_size))
    logits, after = _whole_graph(graph, student)
    outputs = {"logits": (logits, "FLOAT", ("B", "T", config.vocab_size))}
    outputs |= {f"{name}_next": (value, *state) for name, value in after.items()}
    target = file.with_suffix(".onnx")
    graph.save(target, {"input_ids": ("INT64", ("B", "T")), **dict.fromkeys(after, state)}, outputs, [plain])
    return target


def int8_weights(student: LSTMForCausalLM) -> dict[str, torch.Tensor]:
    """Matrices as int8 with a scale for each row under NAME.scale, vectors in fp32; tied matrices once."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in student.named_parameters():
        if value.ndim == 2:
            numbers_NK, scale_N1 = quantise_rows(value.detach())
            weights[name], weights[f"{name}.scale"] = numbers_NK, scale_N1[:, 0].contiguous()
        else:
            weights[name] = value.detach().float()
    return weights


def _whole_graph(graph: Graph, student: LSTMForCausalLM) -> tuple[str, dict[str, str]]:
    """Logits, and the state after them by name. Time comes first inside (T, B, ...), as the operator LSTM has it."""
    config = student.config

    def weight(name: str) -> str:
        if f"{name}.scale" in graph:
            return graph.node("DequantizeLinear", graph.weight(name), graph.weight(f"{name}.scale"), axis=0)
        return graph.node("Cast", graph.weight(name), to=1)

    def linear(x: str, name: str, bias: bool = True) -> str:
        y = graph.node("MatMul", x, graph.node("Transpose", weight(f"{name}.weight"), perm=[1, 0]))
        return graph.node("Add", y, weight(f"{name}.bias")) if bias else y

    def normed(x: str, name: str) -> str:
        parts = weight(f"{name}.weight"), weight(f"{name}.bias")
        return graph.node("LayerNormalization", x, *parts, axis=-1, epsilon=config.layer_norm_eps)

    def gates(name: str) -> str:
        """Of torch's order i, f, g, o (r, z, n) in ONNX's: i, o, f, g (z, r, n); with an axis for the one direction."""
        order = (1, 0, 2) if config.cell == "gru" else (0, 3, 1, 2)
        parts = graph.nodes("Split", weight(name), results=len(order), axis=0, num_outputs=len(order))
        return graph.node("Unsqueeze", graph.node("Concat", *(parts[n] for n in order), axis=0), first)

    first = graph.constant([0])
    ids_TB = graph.node("Transpose", "input_ids", perm=[1, 0])
    embedding = "model.embed_tokens.weight"
    x = graph.node("Cast", graph.node("Gather", graph.weight(embedding), ids_TB), to=1)
    if f"{embedding}.scale" in graph:
        scale = graph.node("Gather", graph.weight(f"{embedding}.scale"), ids_TB)
        x = graph.node("Mul", x, graph.node("Unsqueeze", scale, graph.constant([2])))
    x = linear(x, "model.input_projection")
    L, names = config.num_layers, [name[0] for name in student.model.state_names]
    state = {name: graph.nodes("Split", name, results=L, axis=0, num_outputs=L) for name in names}
    options: dict[str, Any] = {"linear_before_reset": 1} if config.cell == "gru" else {}
    for n in range(L):
        name = f"model.layers.{n}.{config.cell}"
        bias = graph.node("Concat", gates(f"{name}.bias_ih_l0"), gates(f"{name}.bias_hh_l0"), axis=1)
        matrices = gates(f"{name}.weight_ih_l0"), gates(f"{name}.weight_hh_l0")
        before = [parts[n] for parts in state.values()]
        y, *after = graph.nodes(
            *(config.cell.upper(), normed(x, f"model.layers.{n}.norm"), *matrices, bias, "", *before),
            results=1 + len(state),
            hidden_size=config.hidden_size,
            **options,
        )
        for parts, part in zip(state.values(), after, strict=True):
            parts[n] = part
        x = graph.node("Add", x, graph.node("Squeeze", y, graph.constant([1])))
        if config.feed_forward_size:
            block = f"model.layers.{n}.feed_forward"
            wide = normed(x, f"{block}.norm")
            gate, up = (linear(wide, f"{block}.{part}", bias=False) for part in ("gate", "up"))
            gated = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
            x = graph.node("Add", x, linear(gated, f"{block}.down", bias=False))
    x = linear(normed(x, "model.norm"), "model.output_projection")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    x = graph.node("MatMul", x, graph.node("Transpose", weight(f"{head}.weight"), perm=[1, 0]))
    if config.head_bias:
        x = graph.node("Add", x, weight("lm_head.bias"))
    logits = graph.node("Transpose", x, perm=[1, 0, 2])
    return logits, {name: graph.node("Concat", *parts, axis=0) for name, parts in state.items()}


def verify(student: LSTMForCausalLM, folder: Path, name: str) -> dict[str, float]:
    """One file against the fp32 student, over two sequences of 1,000 tokens that the student draws itself.

    `loss_increase` is a share of the student's loss; `difference`, of any logit, is given of the fp32 file alone.
    Sequences are read whole (where the file can) and token by token with the state carried; the worse counts.
    """
    ids_BT = own_text(student, sequences=2, length=STEPS)
    inputs_BT, labels_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    with torch.inference_mode():
        expected_BTV = student(inputs_BT, use_cache=False).logits
    if name == "decoder.onnx":
        readings = [_steps_of_decoder(Decoder(folder), inputs_BT)]
    else:
        session = open_session(folder / name)
        readings = [_read(session, inputs_BT, inputs_BT.shape[1]), _read(session, inputs_BT, 1)]
    loss = F.cross_entropy(expected_BTV.flatten(0, 1), labels_BT.flatten())
    losses = [F.cross_entropy(found_BTV.flatten(0, 1), labels_BT.flatten()) for found_BTV in readings]
    figures = {"loss_increase": float(torch.stack(losses).max() / loss - 1)}
    if name == "model.onnx":
        figures["difference"] = float(torch.stack([(found - expected_BTV).abs().max() for found in readings]).max())
    return figures


def _read(session: Any, ids_BT: torch.Tensor, size: int) -> torch.Tensor:
    """logits_BTV, `size` positions at a time."""
    shapes = {value.name: value.shape for value in session.get_inputs()}
    shapes.pop("input_ids")
    state = {name: np.zeros((layers, len(ids_BT), width), np.float32) for name, (layers, _, width) in shapes.items()}
    logits = []
    for ids_Bt in ids_BT.split(size, dim=1):
        found_BtV, *after = session.run(None, {"input_ids": ids_Bt.numpy(), **state})
        state = dict(zip(state, after, strict=True))
        logits.append(torch.from_numpy(found_BtV))
    return torch.cat(logits, dim=1)


def _steps_of_decoder(decoder: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    lanes, logits = decoder.lanes(len(ids_BT)), []
    for ids_B in ids_BT.T:
        lanes.read(ids_B.numpy())
        logits.append(torch.stack([torch.from_numpy(lanes.logits(b).copy()) for b in range(len(ids_BT))]))
    return torch.stack(logits, dim=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a student's folder, a run folder, or a hub id")
    parser.add_argument("--to", choices=["onnx", "decoder"], help="what to write into the student's folder")
    parser.add_argument("--int8", action="store_true", help="with --to onnx: int8 weights")
    parser.add_argument("--verify", action="store_true", help="compare the ONNX files in the folder with PyTorch")
    options = parser.parse_args(arguments)
    if not options.to and not options.verify:
        parser.error("give --to, --verify, or both")
    if options.int8 and options.to != "onnx":
        parser.error("--int8 goes with --to onnx; the decoder has few bits anyway")
    return guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    folder = find_student(options.model)
    student = load_student(folder)
    if options.to == "decoder":
        print(write_decoder(student, folder))
    elif options.to == "onnx":
        print(write_onnx(student, folder, options.int8))
    if not options.verify:
        return
    found = {name: verify(student, folder, name) for name in LOSS_TOLERANCE if (folder / name).is_file()}
    if not found:
        raise UserError(f"{folder}: expected an ONNX file to verify, found none; give --to onnx or --to decoder")
    for name, figures in found.items():
        text = ", ".join(f"{key.replace('_', ' ')} {value:.2g}" for key, value in figures.items())
        print(f"{folder / name}: {text}", file=sys.stderr)
    print(json.dumps(found))
    wrong = [
        name
        for name, figures in found.items()
        if not figures["loss_increase"] <= LOSS_TOLERANCE[name] or figures.get("difference", 0.0) > DIFFERENCE
    ]
    if wrong:
        raise UserError(
            f"{folder}: {', '.join(wrong)} differ from PyTorch by more than allowed (loss increase "
            f"{LOSS_TOLERANCE}, logits of model.onnx {DIFFERENCE}); make them again with --to"
        )


if __name__ == "__main__":
    sys.exit(main())
