"""Speed and memory of models in every runtime at hand, side by side.

    python -m eval.latency runs/quickstart
    python -m eval.latency runs/a runs/b --contexts 16 256 --batches 1 --threads 1

For each runtime (`eval/runtimes.py`), at batch 1 in every context and at every batch in the shortest one (`--all-pairs`
for the product): time to the first token, milliseconds a token (p50, p95, p99) of greedy decoding, tokens a second,
prompt tokens a second, bytes of state. Once each: load time, resident memory (both in a process of its own, files in
the page cache), weights in memory and on disk. Prompts are random tokens: what they say costs nothing.

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
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from distill.config import UserError
from distill.output import print_table
from eval.command import Figures, Subject, execute, finish, make_parser, make_subjects, positive
from eval.runtimes import Opener, Session, Unavailable, runtimes_of

BUFFER_BYTES = 2**29  # read for the bandwidth: far beyond any cache
SLOW_SECONDS = 2.0  # prompts that take longer are read once only
STEP_SECONDS = 1.0  # of decoding in a repetition of a case
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
                if repeat == 0:  # the first reading of a case allocates, compiles and fills caches
                    _run(session, ids_BT[:, : min(pair[1], 256)], 3)
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
    """What `--probe RUNTIME` does: load one model, decode a little, print seconds and memory as JSON."""
    (subject,) = make_subjects(options.models, (options.role,), options.trust_remote_code)
    before = _resident_bytes()
    began = time.perf_counter()
    session = runtimes_of(subject)[options.probe](subject, options.threads, 64)
    seconds = time.perf_counter() - began
    _run(session, np.zeros((1, 16), dtype=np.int64), 8)
    after = _resident_bytes()
    print(json.dumps({"load_seconds": seconds, "resident_bytes": after, "resident_bytes_model": after - before}))


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * 4096


def _probed(subject: Subject, runtime: str, threads: int) -> Figures:
    """The figures of `probe` in a process of its own; its last words where that fails."""
    name = str(subject.runs[0]) if subject.runs else subject.label
    command = [sys.executable, "-m", "eval.latency", name, "--role", subject.role]
    command += ["--probe", runtime, "--threads", str(threads)]
    command += ["--trust-remote-code", name] if subject.config.trust_remote_code else []
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        return {"probe_error": (found.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(found.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the command


def open_sessions(subjects: Sequence[Subject], options: argparse.Namespace) -> tuple[dict, dict[str, str]]:
    """Sessions by (subject, runtime), and reasons of the runtimes that are not to be had by "subject: runtime"."""
    sessions: dict[tuple[Subject, str], Session] = {}
    missing: dict[str, str] = {}
    longest = max(options.contexts) + options.new_tokens + 1
    for subject in subjects:
        openers: dict[str, Opener] = runtimes_of(subject)
        for runtime, opener in openers.items():
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
    known = {name for subject in subjects for name in runtimes_of(subject)}
    if unknown := set(options.runtimes or ()) - known:
        raise UserError(f"--runtimes: {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}")
    pairs = {(1, context) for context in options.contexts} | {(b, min(options.contexts)) for b in options.batches}
    if options.all_pairs:
        pairs = {(batch, context) for batch in options.batches for context in options.contexts}
    sessions, missing = open_sessions(subjects, options)
    names = {f"{subject.label}: {runtime}": (subject, runtime) for subject, runtime in sessions}
    cases, bandwidth = measure_sessions(
        {name: sessions[key] for name, key in names.items()}, sorted(pairs), repeats=options.repeats,
        new_tokens=options.new_tokens, longest=options.longest,
    )  # fmt: skip
    figures: dict[Subject, Figures] = {}
    for name, (subject, runtime) in names.items():
        row = figures_of(sessions[subject, runtime], cases[name], bandwidth)
        row |= _probed(subject, runtime, options.threads)
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
