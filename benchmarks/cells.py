"""What other cells and options cost: a training step and a decoding step of the student's body, beside the plain LSTM.

    make bench-cells          or:  python -m benchmarks.cells --repeats 7

The body is everything between embedding and head. A training step reads 16 lanes of 128 tokens, with a document's start
in every lane, and goes back; a decoding step reads one token in one sequence. Ways take turns within a repetition,
medians are compared. `state` is what a sequence leaves behind.

Of recurrences that are not offered, as bare layers beside a bare nn.LSTM: one with `proj_size`, which has no fast
kernel on a CPU, and one with a narrower residual stream around it (`proj after`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import finish, print_table, seconds
from distill.command import guarded
from distill.student import LSTMCache, LSTMConfig, LSTMModel

LANES, BLOCK, STEPS = 16, 128, 50
WAYS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "gru": {"cell": "gru"},
    "ln_lstm": {"cell": "ln_lstm"},
    "lstm, attention to 64": {"attention_window": 64},
    "lstm, feed-forward of 1024": {"feed_forward_size": 1024},
    "lstm, variational dropout": {"input_dropout": 0.1, "output_dropout": 0.1, "variational_dropout": True},
    "lstm, weight drop": {"recurrent_dropout": 0.3},
}


class Bare(nn.Module):
    """A recurrent layer alone, and what is said to come after it."""

    def __init__(self, layer: nn.LSTM, after: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.after = layer, after or nn.Identity()

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.after(self.layer(x_BTH[..., : self.layer.input_size])[0])


def bare_layers(H: int) -> dict[str, Bare]:
    """Each as wide inside as the plain one."""
    return {
        "bare lstm": Bare(nn.LSTM(H, H, batch_first=True)),
        "bare lstm, proj_size H/2": Bare(nn.LSTM(H, H, batch_first=True, proj_size=H // 2)),
        "bare lstm, proj after to H/2": Bare(nn.LSTM(H // 2, H, batch_first=True), nn.Linear(H, H // 2)),
    }


def body(H: int, fields: dict[str, Any]) -> LSTMModel:
    """A body of two layers behind a vocabulary that does not matter."""
    return LSTMModel(LSTMConfig(vocab_size=512, embedding_size=576, hidden_size=H, num_layers=2, **fields))


def step_of(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
    """One forward and backward pass of a training step."""

    def step() -> None:
        model.zero_grad()
        output = model(*inputs)
        (output if isinstance(output, Tensor) else output.last_hidden_state).square().sum().backward()

    return step


def decode(model: LSTMModel) -> Callable[[], LSTMCache]:
    """STEPS tokens, one after the other."""

    def steps() -> LSTMCache:
        cache = LSTMCache()
        with torch.inference_mode():
            for token in range(STEPS):
                model(torch.tensor([[token]]), past_key_values=cache)
        return cache

    return steps


def benchmark(options: argparse.Namespace) -> None:
    H = options.hidden_size
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    models = {name: body(H, fields) for name, fields in WAYS.items()}
    ids_BT, reset_BT = torch.randint(512, (LANES, BLOCK)), torch.zeros(LANES, BLOCK, dtype=torch.bool)
    reset_BT.scatter_(1, torch.randint(1, BLOCK, (LANES, 1)), True)
    x_BTH = torch.randn(LANES, BLOCK, H)
    training = {name: step_of(model, (ids_BT, None, None, None, reset_BT)) for name, model in models.items()}
    training |= {name: step_of(layer, (x_BTH,)) for name, layer in bare_layers(H).items()}
    decoding = {name: decode(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in training}
    token_times: dict[str, list[float]] = {name: [] for name in decoding}
    states: dict[str, int] = {}
    for repeat in range(options.repeats + 1):  # the first warms up
        for name, step in training.items():
            if name in models:
                models[name].train()
            taken = seconds(step)
            times[name] += [taken] if repeat else []
        for name, steps in decoding.items():
            models[name].eval()
            taken = seconds(steps) / STEPS
            token_times[name] += [taken] if repeat else []
            states[name] = states.get(name) or steps().state_bytes
    rows = {}
    for name in training:
        base = "bare lstm" if name.startswith("bare") else "lstm"
        taken = median(times[name])
        rows[name] = {"step_ms": 1000 * taken, "tokens_per_second": LANES * BLOCK / taken}
        rows[name]["ratio"] = taken / median(times[base])
        if name in models:
            rows[name] |= {
                "token_ms": 1000 * median(token_times[name]),
                "token_ratio": median(token_times[name]) / median(token_times["lstm"]),
                "parameters": sum(p.numel() for n, p in models[name].named_parameters() if "embed" not in n),
                "state_bytes": states[name],
            }
    title = f"2 layers of {H}, {LANES} x {BLOCK} tokens a step, {torch.get_num_threads()} threads, fp32"
    print_table(title, [_shown(name, row) for name, row in rows.items()])
    finish("cells", {"hidden_size": H, "rows": rows})


def _shown(name: str, row: dict[str, float]) -> dict[str, str]:
    shown = {"body": name, "step ms": f"{row['step_ms']:.0f}", "tokens/s": f"{row['tokens_per_second']:,.0f}"}
    shown |= {"of lstm": f"{row['ratio']:.2f}"}
    if "token_ms" not in row:
        return shown | dict.fromkeys(("token ms", "of lstm ", "M weights", "state KiB"), "–")
    shown |= {"token ms": f"{row['token_ms']:.2f}", "of lstm ": f"{row['token_ratio']:.2f}"}
    return shown | {"M weights": f"{row['parameters'] / 1e6:.2f}", "state KiB": f"{row['state_bytes'] / 1024:.1f}"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cells", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=512, help="H (512)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions after a warm-up (7)")
    options = parser.parse_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
