"""One decoder in a process of its own, without torch: speed by token, early and late, and resident memory.

    python -m benchmarks.decode_stream STUDENT

Prints one JSON object. `benchmarks/decode.py` runs it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
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
TOKENS, REPEATS, LATE = 1000, 5, 32_000


def microseconds(decoder: Decoder, prompt: Sequence[int], tokens: int, sampler: Sampler) -> np.ndarray:
    """Time between one token and the next, choosing included."""
    marks = [time.perf_counter() for _ in stream(decoder, [prompt], tokens + 1, sampler)]
    return np.diff(marks) * 1e6


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
    long = microseconds(decoder, prompt, LATE + 1000, Sampler(0))
    assert not {"torch", "transformers"} & set(sys.modules)
    print(
        json.dumps(
            {
                "rows": rows,
                "early_us": float(np.median(long[100:1100])),
                "late_us": float(np.median(long[LATE:])),
                "resident_mib": resident_mib(),
            }
        )
    )


if __name__ == "__main__":
    main()
