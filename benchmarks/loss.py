"""Time and transient memory of the fused head and loss against the eager one: forward KL, gradients included.

    python -m benchmarks.loss --sizes 1024 --repeats 3

*Eager* is what one writes first: all logits of both sides, `distill/losses.py`, autograd; in fp32, and under bf16
autocast with the loss in fp32. *Fused* is `distill/fused.py` in the type that a training run takes: bf16 autocast, or
fp32 where the hardware has no bf16 (there eager bf16 is left out: emulated products take minutes). The weight of a
trained head is fp32; a frozen one, as in training, and the teacher's of a hidden signal have the type of the step. The
*floor* is the matrix products alone, in that type: logits, gradient of the student's output, of a trained head, and the
teacher's logits of a hidden signal.

Every way of a case runs in turn within a repetition; the fastest are compared, as what else happens on a machine only
adds to a time. Freed memory stays with the process, for all alike, as in a training run (`distill/job.py`). Memory is
the peak resident set of a process of its own during one step, above what it held before, less the gradients that
remain; it runs two steps before on 16 tokens, so that the libraries are loaded. Eager is measured where the machine has
room.

Legend: N tokens, V vocabulary, d width, K outcomes of a sparse signal.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import finish, print_table, seconds
from distill import losses
from distill.fused import _ChunkedHeadLoss
from distill.job import _keep_freed_memory
from distill.objective import Objective
from distill.signals import DenseSignal, Head, HiddenSignal, SparseSignal, concatenate, sample, top_k
from distill.teacher import hardware_has_bf16

V, D, K = 49152, 576, 64
SIZES = (256, 1024, 2048, 8192)
SIGNALS = ("dense", "hidden", "top-64", "sampled")
DTYPE = torch.bfloat16 if hardware_has_bf16(torch.device("cpu")) else torch.float32
EAGER = "eager bf16" if torch.bfloat16 == DTYPE else "eager fp32"  # in the type of the fused one
WAYS = tuple(dict.fromkeys(("eager fp32", EAGER, "fused")))
MATRICES = {"dense": 8, "hidden": 10, "top-64": 6, "sampled": 5}  # of (N, V) in fp32 that eager holds, at most
OBJECTIVE = Objective({"forward_kl": 1.0})


class Case:
    """Student output, head, labels and signal of N tokens; logits have a standard deviation of 2."""

    def __init__(self, tokens: int, trained: bool, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.z_Nd = torch.randn(tokens, D, generator=generator).requires_grad_()
        self.weight_Vd = nn.Parameter(torch.randn(V, D, generator=generator) * (2 / D**0.5), requires_grad=trained)
        self.labels_N = torch.randint(V, (tokens,), generator=generator)
        self.weights: dict[torch.dtype, Tensor] = dict.fromkeys((torch.float32, DTYPE), self.weight_Vd)
        if not trained:
            self.weights[DTYPE] = self.weight_Vd.detach().to(DTYPE)  # as the training loop keeps it
        self.kind = kind
        hidden_Nd = torch.randn(tokens, D, generator=generator)
        teacher_Vd = self.weight_Vd.detach() + torch.randn(V, D, generator=generator) / D**0.5
        signal = self._signal(hidden_Nd, Head(teacher_Vd), generator)
        self.signals = dict.fromkeys((torch.float32, DTYPE), signal)
        if kind == "hidden":
            self.signals[DTYPE] = HiddenSignal(hidden_Nd.to(DTYPE), Head(teacher_Vd.to(DTYPE)))

    def _signal(
        self, hidden_Nd: Tensor, head: Head, generator: torch.Generator
    ) -> DenseSignal | HiddenSignal | SparseSignal:
        if self.kind == "hidden":
            return HiddenSignal(hidden_Nd, head)
        if self.kind == "dense":
            logits_NV = torch.empty(len(hidden_Nd), V)
            torch.mm(hidden_Nd, head.weight_Vd.t(), out=logits_NV)
            return DenseSignal(logits_NV)
        parts = []
        for start in range(0, min(len(hidden_Nd), 256), 64):  # drawing takes long; the targets repeat
            logits_NV = head.logits(hidden_Nd[start : start + 64])
            offsets_N = torch.rand(len(logits_NV), generator=generator)
            parts.append(top_k(logits_NV, K, 1.0) if self.kind == "top-64" else sample(logits_NV, K, 1.0, offsets_N))
        made = concatenate(parts)
        copies = -(-len(hidden_Nd) // len(made.ids_NK))
        return concatenate([made] * copies).rows(slice(len(hidden_Nd)), hidden_Nd.device)

    def loss(self, way: str) -> Tensor:
        dtype = torch.float32 if way == "eager fp32" else DTYPE
        signal = self.signals[dtype]
        with torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
            if way == "fused":
                return _ChunkedHeadLoss.apply(self.z_Nd, self.weights[dtype], None, self.labels_N, signal, OBJECTIVE)[0]
            student_NV = nn.functional.linear(self.z_Nd, self.weights[dtype])
        if not isinstance(signal, SparseSignal):
            return losses.forward_kl(student_NV, signal.logits(slice(None)))
        if signal.tail_N is None:
            return losses.sampled_forward_kl(student_NV, signal)
        return losses.forward_kl(*losses.coarsen(student_NV, signal))

    def step(self, way: str) -> None:
        self.z_Nd.grad = self.weight_Vd.grad = None
        (self.loss(way) / len(self.z_Nd)).backward()

    def floor(self) -> None:
        """The matrix products of a step, 512 tokens at a time, which is as fast as any."""
        weight_Vd = self.weight_Vd.detach().to(DTYPE)
        for start in range(0, len(self.z_Nd), 512):
            z_Nd = self.z_Nd.detach()[start : start + 512].to(DTYPE)
            logits_NV = z_Nd @ weight_Vd.t()
            if self.kind == "hidden":
                z_Nd @ weight_Vd.t()
            logits_NV @ weight_Vd
            if self.weight_Vd.requires_grad:
                logits_NV.t() @ z_Nd


def room_for(tokens: int, kind: str, share: float) -> bool:
    """Whether eager's matrices fit into this share of the free memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return tokens <= 2048
    free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return MATRICES[kind] * tokens * V * 4 < share * free_kib * 1024


def time_case(tokens: int, trained: bool, kind: str, repeats: int) -> dict[str, Any]:
    """Milliseconds, the fastest of a few in turns, and the speedup over the faster eager."""
    case = Case(tokens, trained, kind)
    ways = WAYS if room_for(tokens, kind, 0.5) else ("fused",)  # what is freed here is kept, and in pieces
    calls: dict[str, Callable[[], None]] = {way: lambda way=way: case.step(way) for way in ways}  # type: ignore[misc]
    calls["floor"] = case.floor
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            elapsed = seconds(call)
            if number:  # the first round fills caches and pages
                found[name].append(elapsed)
    row: dict[str, Any] = {"tokens": tokens, "head": "trained" if trained else "frozen", "signal": kind}
    row |= {f"{name.replace(' ', '_')}_ms": 1e3 * min(values) for name, values in found.items()}
    if ways == WAYS:
        row["speedup"] = min(row[f"{way.replace(' ', '_')}_ms"] for way in WAYS[:-1]) / row["fused_ms"]
    return row


def transient_mib(tokens: int, trained: bool, kind: str, way: str) -> float:
    """MiB of a step beyond inputs and remaining gradients; measured by `measure_memory` in a process of its own."""
    arguments = [str(tokens), str(int(trained)), kind, way]
    command = [sys.executable, "-m", "benchmarks.loss", "--memory", *arguments]
    # What is freed goes back to the system (glibc): a step that found memory of the setup would seem to need less.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(found.stdout.split()[-1])


def measure_memory(tokens: int, trained: bool, kind: str, way: str) -> float:
    Case(16, trained, kind).step(way)
    case = Case(tokens, trained, kind)
    gradients = case.z_Nd.numel() * 4 + (case.weight_Vd.numel() * 4 if trained else 0)
    status = Path("/proc/self/status")
    if not status.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        case.step(way)
        unit = 1 if sys.platform == "darwin" else 1024
        return ((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit - gradients) / 2**20

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    case.step(way)
    return ((kib("VmHWM") - before) * 1024 - gradients) / 2**20


def least(rows: Sequence[dict[str, Any]], **fields: Sequence[Any]) -> float | None:
    """The smallest speedup of the rows with these fields."""
    found = [row["speedup"] for row in rows if "speedup" in row and all(row[k] in v for k, v in fields.items())]
    return min(found, default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="repetitions; at 8,192 tokens one")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        tokens, trained, kind, way = options.memory
        print(measure_memory(int(tokens), bool(int(trained)), kind, way))
        return
    _keep_freed_memory()
    rows = []
    for tokens in options.sizes:
        for trained in (True, False):
            for kind in SIGNALS:
                row = time_case(tokens, trained, kind, options.repeats if tokens < 8192 else 1)
                if tokens == max(options.sizes):
                    for way, name in (("fused", "fused"), (EAGER, "eager"))[: 2 if room_for(tokens, kind, 0.8) else 1]:
                        row[f"{name}_transient_mib"] = transient_mib(tokens, trained, kind, way)
                rows.append(row)
                print(f"{tokens} tokens, {row['head']} head, {kind}: {row['fused_ms']:.0f} ms", file=sys.stderr)
    print_table(
        f"Head and forward KL, V = {V:,}, d = {D}: milliseconds a step",
        [shown(row) for row in rows],
        "speedup: over the faster eager. MiB: peak beyond inputs and gradients. –: eager does not fit this machine.",
    )
    largest = [row for row in rows if row["tokens"] == 8192]
    both = [row for row in largest if "eager_transient_mib" in row]
    big = [tokens for tokens in options.sizes if tokens >= 1024]
    finish(
        "loss",
        {
            "transient_mib_at_8192": max((row["fused_transient_mib"] for row in largest), default=None),
            "memory_ratio_at_8192": min(
                (row["eager_transient_mib"] / row["fused_transient_mib"] for row in both), default=None
            ),
            "min_speedup": least(rows),
            "speedup_trained_head": least(rows, tokens=big, head=["trained"], signal=["dense", "hidden"]),
            "speedup_frozen_head": least(rows, tokens=big, head=["frozen"], signal=["dense", "hidden"]),
            "speedup_sparse": least(rows, tokens=big, signal=["top-64", "sampled"]),
            "vocabulary": V,
            "width": D,
            "keeps_freed_memory": True,
            "precision": "bf16" if torch.bfloat16 == DTYPE else "fp32",
            "rows": rows,
        },
    )


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table; what was not measured is a dash."""
    cells = {"tokens": f"{row['tokens']:,}", "head": row["head"], "signal": row["signal"]}
    for name in (*WAYS, "floor"):
        value = row.get(f"{name.replace(' ', '_')}_ms")
        cells[name] = "–" if value is None else f"{value:,.0f}"
    cells["speedup"] = f"{row['speedup']:.2f}" if "speedup" in row else "–"
    for way in ("eager", "fused"):
        value = row.get(f"{way}_transient_mib")
        cells[f"{way} MiB"] = "–" if value is None else f"{value:,.0f}"
    return cells


if __name__ == "__main__":
    main()
