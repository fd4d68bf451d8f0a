"""One decoding step of a student in every runtime that could carry the fast decoder, at batch 1.

    make bench-runtimes        or, without torchao:  python -m benchmarks.runtimes

The quickstart's shape, 2 x 512 with 49,152 tokens, from random weights: what they say costs nothing. PyTorch reads the
step with its cells written out, which compilers take as one graph, and the LSTM's gates as one product, which is what
the decoder does; once with the whole head, once with the two-step head of `distill/quantise.py`. AOTInductor is run
from its package, torchao's int8 weights under torch.compile, as it is meant to be. Runtimes take turns, medians of the
rounds' means are compared. onnxruntime's session is opened for its round alone: its threads wait busily for work.

Legend: V tokens (n blocks of k), L layers, H width, d head's width, r axes of the preview, 1 the only sequence.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import finish, print_table
from distill.command import guarded
from distill.config import UserError
from distill.decode import Decoder
from distill.decoder import AXES, BLOCKS, TOKENS, write_decoder
from distill.export import write_onnx
from distill.quantise import Head, own_text, two_step_head
from distill.sampling import Sampler
from distill.session import available_cores, open_session
from distill.student import LSTMConfig, LSTMForCausalLM

WARM_UP = 10  # steps
FREEZING = {"freezing": True}  # weights are laid out for the products once, which an eager step cannot do
Round = Callable[[int], float]  # takes so many steps; seconds a step


def linear(weight_NK: Tensor, bias_N: Tensor) -> nn.Linear:
    """A layer at rest."""
    layer = nn.Linear(weight_NK.shape[1], weight_NK.shape[0])
    layer.weight.data, layer.bias.data = weight_NK.detach().float(), bias_N.detach().float()
    return layer


class WholeHead(nn.Module):
    """z_1d to the likeliest token."""

    def __init__(self, student: LSTMForCausalLM) -> None:
        super().__init__()
        self.head = student.lm_head

    def forward(self, z_1d: Tensor) -> Tensor:
        token: Tensor = self.head(z_1d).argmax(-1)
        return token


class TwoSteps(nn.Module):
    """The same by a preview of all tokens and the highest blocks of them exactly."""

    def __init__(self, preview: Head, exact: Head) -> None:
        super().__init__()
        self.turn = linear(torch.cat([preview.turn_rd, exact.turn_rd]), torch.cat([preview.shift_r, exact.shift_r]))
        self.preview = linear(preview.weight_Vr, preview.bias_V)
        self.exact_nkd = nn.Parameter(exact.weight_Vr.float().unflatten(0, (-1, TOKENS)))
        self.bias_nk = nn.Parameter(exact.bias_V.float().view(-1, TOKENS))

    def forward(self, z_1d: Tensor) -> Tensor:
        u_1K = self.turn(z_1d)
        u_1r, u_1d = u_1K.split([self.preview.in_features, z_1d.shape[1]], 1)
        block_n = self.preview(u_1r).view(-1, TOKENS).amax(1).topk(min(BLOCKS, len(self.bias_nk)), sorted=False).indices
        exact_nk = (self.exact_nkd[block_n] * u_1d).sum(-1) + self.bias_nk[block_n]
        best = exact_nk.argmax()
        return (block_n[best // TOKENS] * TOKENS + best % TOKENS).view(1)


class Step(nn.Module):
    """token_1 and state to the next token and state."""

    def __init__(self, student: LSTMForCausalLM, head: nn.Module) -> None:
        super().__init__()
        model: Any = student.model
        self.embedding, self.inputs, self.norm, self.outputs = (
            model.embed_tokens, model.input_projection, model.norm, model.output_projection
        )  # fmt: skip
        self.norms = nn.ModuleList(block.norm for block in model.layers)
        cells = [block.lstm for block in model.layers]
        self.gates = nn.ModuleList(
            linear(torch.cat([cell.weight_ih_l0, cell.weight_hh_l0], 1), cell.bias_ih_l0 + cell.bias_hh_l0)
            for cell in cells
        )
        self.head = head

    def forward(self, token_1: Tensor, h_L1H: Tensor, c_L1H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_1H = self.inputs(self.embedding(token_1))
        outputs, cells = [], []
        for n, (norm, gates) in enumerate(zip(self.norms, self.gates, strict=True)):
            i, f, g, o = gates(torch.cat([norm(x_1H), h_L1H[n]], 1)).chunk(4, 1)
            cells.append(f.sigmoid() * c_L1H[n] + i.sigmoid() * g.tanh())
            outputs.append(o.sigmoid() * cells[-1].tanh())
            x_1H = x_1H + outputs[-1]
        return self.head(self.outputs(self.norm(x_1H))), torch.stack(outputs), torch.stack(cells)


def start(config: LSTMConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Token and state at the beginning of a text."""
    zero_L1H = torch.zeros(config.num_layers, 1, config.hidden_size, dtype=dtype)
    return torch.zeros(1, dtype=torch.long), zero_L1H, zero_L1H.clone()


def torch_round(step: Any, config: LSTMConfig, dtype: torch.dtype) -> Round:
    """Steps of whatever has the interface of `Step`."""

    def take(steps: int) -> float:
        text = start(config, dtype)
        with torch.no_grad():
            for number in range(WARM_UP + steps):
                if number == WARM_UP:
                    began = time.perf_counter()
                text = step(*text)
                text[0].item()  # a text is shown token by token
        return (time.perf_counter() - began) / steps

    return take


def decoder_round(folder: Path) -> Round:
    """Steps of the quantised decoder."""

    def take(steps: int) -> float:
        lanes, greedy = Decoder(folder).lanes(1), Sampler(0)
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                began = time.perf_counter()
            lanes.read([lanes.choose(0, greedy)])
        return (time.perf_counter() - began) / steps

    return take


def onnx_round(folder: Path, config: LSTMConfig) -> Round:
    """Steps of the exported fp32 graph."""

    def take(steps: int) -> float:
        session = open_session(folder / "model.onnx")
        token_1, h_L1H, c_L1H = (part.numpy() for part in start(config, torch.float32))
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                began = time.perf_counter()
            inputs = {"input_ids": token_1[None], "h": h_L1H, "c": c_L1H}
            logits, h_L1H, c_L1H = session.run(["logits", "h_next", "c_next"], inputs)
            token_1 = np.array([logits[0, -1].argmax()])
        return (time.perf_counter() - began) / steps

    return take


def compiled(step: Step, config: LSTMConfig, dtype: torch.dtype) -> Any:
    """A step under torch.compile."""
    step.compile()
    with torch._inductor.config.patch(FREEZING), torch.no_grad():
        step(*start(config, dtype))
    return step


def aot(step: Step, config: LSTMConfig, dtype: torch.dtype, package: Path) -> Any:
    """A step compiled ahead of time, as it is loaded from its package."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    with torch.no_grad():
        exported = torch.export.export(step, start(config, dtype))
        aoti_compile_and_package(exported, package_path=str(package), inductor_configs=FREEZING)
    return aoti_load_package(str(package))


def weights_in_int8(step: Step) -> Any:
    """By torchao: matrices of linear layers in int8 with a scale for each row, activations as they are."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("torchao is not installed here: make bench-runtimes") from None
    quantize_(step, Int8WeightOnlyConfig())
    return step


def ways(student: LSTMForCausalLM, folder: Path) -> dict[str, Callable[[], Round]]:
    """What opens each runtime, by its name."""
    config = cast(LSTMConfig, student.config)
    with torch.inference_mode():
        hidden_Nd = student.model(own_text(student, 16, 16), use_cache=False).last_hidden_state.flatten(0, 1)
    heads = {
        "whole": WholeHead(student),
        "two steps": TwoSteps(*two_step_head(student.lm_head.weight, hidden_Nd, min(AXES, config.embedding_size))),
    }
    found: dict[str, Callable[[], Round]] = {
        "onnxruntime, int8 and int4 (distill/decode.py) | two steps": lambda: decoder_round(folder),
        "onnxruntime, fp32 (model.onnx) | whole": lambda: onnx_round(folder, config),
    }

    def opener(head: nn.Module, way: str, dtype: torch.dtype, package: Path) -> Callable[[], Round]:
        def open_way() -> Round:
            step: Any = copy.deepcopy(Step(student, head)).to(dtype).eval().requires_grad_(False)
            match way:
                case "torch.compile":
                    step = compiled(step, config, dtype)
                case "AOTInductor":
                    step = aot(step, config, dtype, package)
                case "torchao int8, torch.compile":
                    step = compiled(weights_in_int8(step), config, dtype)
            return torch_round(step, config, dtype)

        return open_way

    kinds = [(way, d) for way in ("eager", "torch.compile", "AOTInductor") for d in (torch.float32, torch.bfloat16)]
    for way, dtype in [*kinds, ("torchao int8, torch.compile", torch.bfloat16)]:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        for name, head in heads.items():
            package = folder / f"{len(found)}.pt2"
            found[f"PyTorch, {way}, {short} | {name}"] = opener(head, way, dtype, package)
    return found


def benchmark(options: argparse.Namespace) -> None:
    torch.set_num_threads(available_cores())
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # all ways compile one method
    size = {"vocab_size": options.vocab_size, "hidden_size": options.hidden_size, "num_layers": 2, "eos_token_id": 0}
    student = LSTMForCausalLM(LSTMConfig(**size)).eval().requires_grad_(False)
    rounds: dict[str, Round] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="potstill-runtimes-") as name:
        folder = Path(name)
        student.save_pretrained(folder)
        write_decoder(student, folder)
        write_onnx(student, folder, int8=False)
        for way, open_way in ways(student, folder).items():
            if options.only and not any(word in way for word in options.only):
                continue
            began = time.perf_counter()
            try:
                rounds[way] = open_way()
                rounds[way](1)  # compiles
            except Exception as error:  # a compiler's are of any kind, and the others are still worth measuring
                rounds.pop(way, None)
                missing[way] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"{way}: ready after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        times: dict[str, list[float]] = {way: [] for way in rounds}
        for _ in range(options.rounds):
            for way, take in rounds.items():
                times[way].append(take(options.steps))
    base = median(times.get(next(iter(rounds)), [0.0]))
    rows = {way: {"us": 1e6 * median(found), "of_the_first": median(found) / base} for way, found in times.items()}
    table = [
        {"runtime": way.split(" | ")[0], "head": way.split(" | ")[1], "µs": f"{row['us']:,.0f}",
         "tok/s": f"{1e6 / row['us']:,.0f}", "× the first": f"{row['of_the_first']:.1f}"}
        for way, row in rows.items()
    ]  # fmt: skip
    table += [{"runtime": way.split(" | ")[0], "head": way.split(" | ")[1]} for way in missing]
    title = f"A step of a 2 x {options.hidden_size} student, {options.vocab_size:,} tokens, {available_cores()} threads"
    print_table(title, table, "\n".join(f"{way}: {reason}" for way, reason in missing.items()))
    finish("runtimes", {"rows": rows, "missing": missing})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runtimes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=512, help="H (512)")
    parser.add_argument("--vocab-size", type=int, default=49152, help="V, a multiple of 16 (49152)")
    parser.add_argument("--steps", type=int, default=50, help="of a round (50)")
    parser.add_argument("--rounds", type=int, default=7, help="in which the runtimes take turns (7)")
    parser.add_argument("--only", nargs="*", help="runtimes whose names contain one of these words")
    options = parser.parse_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
