"""One decoder in a process of its own, without torch: speed by token, early and late, and resident memory.

    python -m benchmarks.decode_stream STUDENT

Prints one JSON object. `benchmarks/decode.py` runs it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from distill.decode import Decoder, find_student, load_tokenizer, stream
from distill.sampling import Sampler

WAYS = {
    "greedy": Sampler(0),
    "sampling": Sampler(1, seed=0),
    "temperature 0.8, top-k 50": Sampler(0.8, top_k=50, seed=0),
    "temperature 0.8, top-p 0.95": Sampler(0.8, top_p=0.95, seed=0),
}
TOKENS, REPEATS = 1000, 5
EARLY, LATE, TURN, TURNS = 100, 32_000, 250, 4


def microseconds(decoder: Decoder, prompt: Sequence[int], tokens: int, sampler: Sampler) -> np.ndarray:
    """Time between one token and the next, choosing included."""
    marks = [time.perf_counter() for _ in stream(decoder, [prompt], tokens + 1, sampler)]
    return np.diff(marks) * 1e6


def early_and_late(decoder: Decoder, prompt: Sequence[int]) -> dict[str, float]:
    """Median time of a token at the beginning of a text and far into one, in turns, so that noise meets both alike."""

    def begin(before: int) -> Iterator[object]:
        text = stream(decoder, [prompt], before + TURN * TURNS, Sampler(0))
        deque(islice(text, before), maxlen=0)
        return text

    far, found = begin(LATE), defaultdict(list)
    for _ in range(TURNS):
        for name, text in (("early_us", begin(EARLY)), ("late_us", far)):
            began = time.perf_counter()
            for _ in islice(text, TURN):
                now = time.perf_counter()
                found[name].append((now - began) * 1e6)
                began = now
    return {name: float(np.median(times)) for name, times in found.items()}


def resident_mib() -> float:
    """Memory that this process holds now, by /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    folder = find_student(sys.argv[1])
    tokenizer = load_tokenizer(folder)
    decoder = Decoder(folder)
    prompt = tokenizer.encode("The history of the city", add_special_tokens=False).ids or [0]
    rows = {}
    for name, sampler in WAYS.items():
        microseconds(decoder, prompt, 200, sampler)
        runs = [microseconds(decoder, prompt, TOKENS, sampler) for _ in range(REPEATS)]
        rows[name] = {
            "tokens_per_second": float(np.median([1e6 / run.mean() for run in runs])),
            "latency_us_p50": float(np.median([np.percentile(run, 50) for run in runs])),
            "latency_us_p99": float(np.median([np.percentile(run, 99) for run in runs])),
        }
    times = early_and_late(decoder, prompt)
    assert not {"torch", "transformers"} & set(sys.modules)
    print(json.dumps({"rows": rows, **times, "resident_mib": resident_mib()}))


if __name__ == "__main__":
    main()
