"""Speed and memory of models in every runtime at hand, side by side.

    python -m eval.latency runs/quickstart
    python -m eval.latency runs/a runs/b --contexts 16 256 --batches 1 --threads 1

For each runtime (`eval/runtimes.py`), at batch 1 in every context and at every batch in the shortest one (`--all-pairs`
for the product): time to the first token, milliseconds a token (p50, p95, p99) of greedy decoding, tokens a second,
prompt tokens a second, bytes of state. Once each: load time, resident memory (both in a process of its own, files in
the page cache; llama.cpp's time includes the start of its process), weights in memory and on disk. Prompts are random
tokens: what they say costs nothing.

Machines are noisy. Threads are pinned, every case is warmed up, repetitions of all cases take turns, medians are
reported with the lowest and highest of the repetitions' medians, and speeds are compared within one run only: `x` is
the speed over the first runtime's in the same case. The bandwidth at which the machine reads memory is measured
between the repetitions; `roofline` is the share of it that a runtime reaches in a step at batch 1, which cannot be
faster than its weights can be read (above 1: they stay in the processor's cache).

Contexts longer than a model allows, and prompts that would take longer than `--longest` seconds, are left out and
marked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import torch
from tqdm.auto import tqdm

from distill.config import UserError
from distill.output import print_table
from distill.session import available_cores
from eval.command import Figures, Subject, execute, finish, make_parser, make_subjects, positive
from eval.llama import resident_bytes
from eval.runtimes import Opener, Session, Unavailable, runtimes_of

BUFFER_BYTES = 2**29  # read for the bandwidth: far beyond any cache
SLOW_SECONDS = 1.0  # prompts that take longer are read once only
WARMING_TOKENS = 256  # of a prompt, read before the first repetition
STEP_SECONDS = 0.3  # of decoding in a repetition of a case
PROBES_TOGETHER = 4  # each has some 300 MiB of libraries
READY = "ready"
Pair = tuple[int, int]  # batch, context


@dataclass
class Case:
    """What was measured of a runtime at one batch and context: seconds, by repetition."""

    starts: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    state_bytes: int = 0
    left_out: str = ""


def measure_sessions(
    sessions: Mapping[str, Session], pairs: Sequence[Pair], *, repeats: int, new_tokens: int, longest: float
) -> tuple[dict[str, dict[Pair, Case]], float]:
    """All cases of all sessions, repetitions taking turns; and the machine's bandwidth in bytes a second."""
    cases = {name: {pair: Case() for pair in pairs} for name in sessions}
    warm: set[tuple[str, tuple[int, ...]]] = set()
    rng = np.random.default_rng(0)
    bandwidth = 0.0
    for repeat in tqdm(range(repeats), desc="repetitions"):
        bandwidth = max(bandwidth, read_bandwidth())
        for pair in sorted(pairs):
            for name, session in sessions.items():
                case = cases[name][pair]
                if repeat == 0:
                    case.left_out = _reason(session, pair, new_tokens, cases[name], longest)
                if case.left_out or (case.starts and case.starts[0] > SLOW_SECONDS):
                    continue
                ids_BT = rng.integers(0, session.vocab_size, pair)
                few_BT = ids_BT[:, :WARMING_TOKENS]
                if (name, few_BT.shape) not in warm:  # a first reading allocates, compiles and fills caches
                    _run(session, few_BT, 3)
                    warm.add((name, few_BT.shape))
                start, steps, case.state_bytes = _run(session, ids_BT, new_tokens)
                case.starts.append(start)
                case.steps.append(steps)
    return cases, bandwidth


def _reason(session: Session, pair: Pair, new_tokens: int, done: Mapping[Pair, Case], longest: float) -> str:
    """Why a case cannot be measured; empty if it can."""
    batch, context = pair
    if batch > session.largest_batch:
        return f"reads at most {session.largest_batch:.0f} at once"
    if context + new_tokens > session.longest_context:
        return f"beyond its limit of {session.longest_context:,.0f} tokens"
    rates = [case.starts[0] / (b * t) for (b, t), case in done.items() if case.starts]
    expected = batch * context * min(rates) if rates else 0.0
    return f"reading the prompt would take about {expected:.0f} s" if expected > longest else ""


def _run(session: Session, ids_BT: np.ndarray, new_tokens: int) -> tuple[float, list[float], int]:
    """Seconds to the first token, and of each token after it: at least three, at most about STEP_SECONDS in all.

    And the bytes of state after the prompt.
    """
    began = time.perf_counter()
    tokens_B = session.start(ids_BT)
    start, state_bytes = time.perf_counter() - began, session.state_bytes()
    steps: list[float] = []
    while len(steps) < new_tokens and (len(steps) < 3 or sum(steps) < STEP_SECONDS):
        began = time.perf_counter()
        tokens_B = session.step(tokens_B)
        steps.append(time.perf_counter() - began)
    return start, steps, state_bytes


def read_bandwidth() -> float:
    """Bytes a second at which this process reads memory: the best of a few sums and matrix-vector products."""
    buffer = torch.ones(BUFFER_BYTES // 4 // 4096, 4096)
    vector = torch.ones(4096)
    best = 0.0
    for read in (lambda: buffer.sum(), lambda: buffer @ vector):
        for _ in range(3):
            began = time.perf_counter()
            read()
            best = max(best, BUFFER_BYTES / (time.perf_counter() - began))
    return best


def figures_of(session: Session, cases: Mapping[Pair, Case], bandwidth: float) -> Figures:
    """A runtime's figures: one entry a case, and what was left out."""
    measured = []
    for (batch, context), case in sorted(cases.items()):
        if case.left_out:
            continue
        steps = np.concatenate(case.steps) * 1000
        medians = [float(np.median(part)) * 1000 for part in case.steps]
        p50, p95, p99 = (float(value) for value in np.percentile(steps, [50, 95, 99]))
        start = float(np.median(case.starts))
        measured.append(
            {
                "batch": batch,
                "context": context,
                "first_token_ms": start * 1000,
                "token_ms_p50": p50,
                "token_ms_p95": p95,
                "token_ms_p99": p99,
                "token_ms_p50_range": [min(medians), max(medians)],
                "tokens_per_second": 1000 * batch / p50,
                "prompt_tokens_per_second": batch * context / start,
                "state_bytes": case.state_bytes,
                "repetitions": len(case.starts),
                "steps": len(steps),
            }
        )
        if batch == 1:
            read = session.read_bytes + case.state_bytes
            measured[-1]["roofline"] = read / bandwidth / (p50 / 1000)
    left_out = [
        {"batch": batch, "context": context, "reason": case.left_out}
        for (batch, context), case in sorted(cases.items())
        if case.left_out
    ]
    sizes = {name: getattr(session, name) for name in ("weight_bytes", "read_bytes", "disk_bytes")}
    return {"cases": measured, "left_out": left_out, **sizes}


# ---------------------------------------------------------------- load time and resident memory, in a fresh process


def probe(options: argparse.Namespace) -> None:
    """What `--probe RUNTIME` does: when its turn comes, load one model, decode a little, print seconds and memory."""
    (subject,) = make_subjects(options.models, (options.role,), options.trust_remote_code)
    opener = runtimes_of(subject)[options.probe]
    print(READY, flush=True)
    sys.stdin.readline()
    before = resident_bytes(os.getpid())
    began = time.perf_counter()
    session = opener(subject, options.threads, 64)
    seconds = time.perf_counter() - began
    _run(session, np.zeros((1, 16), dtype=np.int64), 8)
    process, before = session.process or (os.getpid(), before)
    after = resident_bytes(process)
    print(json.dumps({"load_seconds": seconds, "resident_bytes": after, "resident_bytes_model": after - before}))


def probe_all(wanted: Sequence[tuple[Subject, str]], threads: int) -> list[Figures]:
    """The figures of `probe` for each model and runtime, each in a process of its own.

    They start side by side, as many as there are cores: imports take most of a process's time, and one core each. Then
    they take turns, while the others wait for theirs.
    """
    found: list[Figures] = []
    together = min(available_cores(), PROBES_TOGETHER)
    for first in range(0, len(wanted), together):
        with ExitStack() as stack:
            probes = [stack.enter_context(_Probe(*one, threads)) for one in wanted[first : first + together]]
            for started in probes:
                started.wait()
            found += [started.figures() for started in probes]
    return found


class _Probe:
    """A process that does what `probe` says."""

    def __init__(self, subject: Subject, runtime: str, threads: int) -> None:
        name = str(subject.runs[0]) if subject.runs else subject.label
        command = [sys.executable, "-m", "eval.latency", name, "--role", subject.role]
        command += ["--probe", runtime, "--threads", str(threads)]
        command += ["--trust-remote-code", name] if subject.config.trust_remote_code else []
        self.errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process, self.errors:
            self.process.kill()  # where it has not ended by itself

    def wait(self) -> None:
        """Until it is ready for its turn, or has ended."""
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and line.strip() != READY:
            pass

    def figures(self) -> Figures:
        """Its turn; its last words where it fails."""
        said, _ = self.process.communicate("\n")
        if self.process.returncode:
            self.errors.seek(0)
            return {"probe_error": (self.errors.read().strip().splitlines() or ["no message"])[-1]}
        return json.loads(said.splitlines()[-1])


# ---------------------------------------------------------------- the command


def open_sessions(
    openers: Mapping[Subject, Mapping[str, Opener]], options: argparse.Namespace
) -> tuple[dict, dict[str, str]]:
    """Sessions by (subject, runtime), and reasons of the runtimes that are not to be had by "subject: runtime"."""
    sessions: dict[tuple[Subject, str], Session] = {}
    missing: dict[str, str] = {}
    longest = max(options.contexts) + options.new_tokens + 1
    for subject, runtimes in openers.items():
        for runtime, opener in runtimes.items():
            if options.runtimes and runtime not in options.runtimes:
                continue
            try:
                session = opener(subject, options.threads, longest)
                # Also runs a compiler where there is one to run: it fails here or not at all.
                _run(session, np.zeros((1, 2), dtype=np.int64), 3)
            except Unavailable as error:
                missing[f"{subject.label}: {runtime}"] = str(error)
                continue
            except torch._dynamo.exc.TorchDynamoException as error:
                missing[f"{subject.label}: {runtime}"] = f"torch.compile fails here: {str(error).splitlines()[0]}"
                continue
            sessions[subject, runtime] = session
    if not sessions:
        raise UserError("no runtime to measure: " + "; ".join(f"{name}: {why}" for name, why in missing.items()))
    return sessions, missing


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    if options.probe:
        return probe(options)
    subjects = make_subjects(options.models, ("teacher", "student"), options.trust_remote_code)
    openers = {subject: runtimes_of(subject) for subject in subjects}
    known = {name for runtimes in openers.values() for name in runtimes}
    if unknown := set(options.runtimes or ()) - known:
        raise UserError(f"--runtimes: {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}")
    pairs = {(1, context) for context in options.contexts} | {(b, min(options.contexts)) for b in options.batches}
    if options.all_pairs:
        pairs = {(batch, context) for batch in options.batches for context in options.contexts}
    sessions, missing = open_sessions(openers, options)
    names = {f"{subject.label}: {runtime}": (subject, runtime) for subject, runtime in sessions}
    cases, bandwidth = measure_sessions(
        {name: sessions[key] for name, key in names.items()}, sorted(pairs), repeats=options.repeats,
        new_tokens=options.new_tokens, longest=options.longest,
    )  # fmt: skip
    figures: dict[Subject, Figures] = {}
    probed = probe_all(list(names.values()), options.threads)
    for (name, (subject, runtime)), alone in zip(names.items(), probed, strict=True):
        row = figures_of(sessions[subject, runtime], cases[name], bandwidth) | alone
        figures.setdefault(subject, {"runtimes": {}})["runtimes"][runtime] = row
    _print(figures, missing, bandwidth, options.threads)
    settings: Figures = {"threads": options.threads, "bandwidth_bytes_per_second": bandwidth, "not_available": missing}
    finish(options, figures, settings)


def _print(figures: Mapping[Subject, Figures], missing: Mapping[str, str], bandwidth: float, threads: int) -> None:
    first: dict[Pair, float] = {}
    rows = []
    for subject, found in figures.items():
        for runtime, row in found["runtimes"].items():
            for case in row["cases"]:
                speed = first.setdefault((case["batch"], case["context"]), case["tokens_per_second"])
                rows.append(
                    {
                        "model": f"{subject.label}: {runtime}",
                        "batch": str(case["batch"]),
                        "context": f"{case['context']:,}",
                        "first token ms": f"{case['first_token_ms']:,.1f}",
                        "token ms p50": f"{case['token_ms_p50']:.2f}",
                        "p95": f"{case['token_ms_p95']:.2f}",
                        "p99": f"{case['token_ms_p99']:.2f}",
                        "tok/s": f"{case['tokens_per_second']:,.0f}",
                        "x": f"{case['tokens_per_second'] / speed:.1f}",
                        "state KiB": f"{case['state_bytes'] / 1024:,.0f}",
                        "roofline": f"{case['roofline']:.0%}" if "roofline" in case else "",
                    }
                )
            for case in row["left_out"]:
                cells = dict.fromkeys(rows[0], "") if rows else {}
                marks = {"batch": str(case["batch"]), "context": f"{case['context']:,}", "first token ms": "left out"}
                rows.append({**cells, "model": f"{subject.label}: {runtime}", **marks})
    notes = [f"{name}: {why}" for name, why in missing.items()]
    notes += [
        f"{subject.label}: {runtime}, batch {case['batch']}, context {case['context']:,}: {case['reason']}"
        for subject, found in figures.items()
        for runtime, row in found["runtimes"].items()
        for case in row["left_out"]
    ]
    print_table(f"{threads} threads; memory is read at {bandwidth / 1e9:.1f} GB/s", rows, "\n".join(notes))
    memory = [
        {
            "model": f"{subject.label}: {runtime}",
            "load s": _shown(row, "load_seconds", 1, ".2f"),
            "resident MiB": _shown(row, "resident_bytes", 2**20, ",.0f"),
            "of it the model's": _shown(row, "resident_bytes_model", 2**20, ",.0f"),
            "weights MiB": _shown(row, "weight_bytes", 2**20, ",.1f"),
            "on disk MiB": _shown(row, "disk_bytes", 2**20, ",.1f"),
        }
        for subject, found in figures.items()
        for runtime, row in found["runtimes"].items()
    ]
    print_table("load time and memory", memory)


def _shown(row: Figures, name: str, unit: float, form: str) -> str:
    return format(row[name] / unit, form) if row.get(name) else "–"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("latency", __doc__)
    parser.add_argument("--batches", type=positive, nargs="+", default=(1, 8, 32), metavar="B", help="sequences")
    parser.add_argument("--contexts", type=positive, nargs="+", default=(16, 256, 2048, 32768), metavar="T")
    parser.add_argument("--all-pairs", action="store_true", help="every batch in every context")
    parser.add_argument("--new-tokens", type=positive, default=64, help="tokens decoded in each repetition")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--longest", type=float, default=20.0, help="seconds that reading a prompt may take")
    parser.add_argument("--runtimes", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--role", default="student", help=argparse.SUPPRESS)
    return execute(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
