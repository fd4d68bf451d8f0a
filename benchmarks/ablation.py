"""What each part of the initialisation is worth, at equal tokens and at equal seconds.

    make bench-ablation          or, quicker:  python -m benchmarks.ablation --minutes 0.5

Every variant is trained by cross-entropy over candidates, with the quickstart's text and LSTM, as long as every other;
computing its initialisation counts. Tokens are compared at the fewest that any variant has seen. Bits per byte compare
where a trimmed vocabulary cuts the validation text into other tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.report import finish, print_table
from benchmarks.runs import candidates_of, recipe_parser, run_recipe
from distill.command import guarded

FROZEN = ("embedding", "head")
PLAIN = ("student.fit_tokens=0", "student.align_input=false")
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # overrides, what is frozen
    "random": (("student.transplant=false", "student.align_input=false"), ()),
    "random, input aligned": (("student.transplant=false",), ()),
    "embedding and head of the teacher, trained": (PLAIN, ()),
    "the same, frozen": (PLAIN, FROZEN),
    "frozen, input aligned": (PLAIN[:1], FROZEN),
    "frozen, input aligned, output fitted": ((), FROZEN),
    "all that, not tied": (("student.tie_embeddings=false",), FROZEN),
    "all that, rank 256": (("student.embedding_size=256",), FROZEN),
    "all that, rank 256, not tied": (("student.embedding_size=256", "student.tie_embeddings=false"), FROZEN),
    "all that, vocabulary trimmed": (("student.vocabulary_min_count=1",), FROZEN),
}


def benchmark(options: argparse.Namespace) -> None:
    """Run what is missing, then the table."""
    candidates = options.candidates
    if candidates is None:
        candidates = candidates_of(options.recipe, options.overrides)
    results = {}
    for number, (name, (overrides, frozen)) in enumerate(VARIANTS.items()):
        stage = {
            "objective": "cross_entropy", "candidates": candidates, "freeze": frozen, "schedule": "constant",
            "length": {"minutes": options.minutes},
        }  # fmt: skip
        common = ["control=false", f"stages=[{json.dumps(stage)}]", f"evaluation.every.minutes={options.minutes / 4}"]
        words = [*common, *overrides, *options.overrides]
        results[name] = run_recipe("ablation", f"variant-{number}", options.recipe, words)
    curves = {name: result["curves"]["student"] for name, result in results.items()}
    tokens = min(points[-1]["tokens"] for points in curves.values())
    rows: list[dict[str, Any]] = []
    for name, result in results.items():
        points, student = curves[name], result["student"]
        per_byte = student["bits_per_byte"] / student["nll_nats"]  # of the best point, and so of each
        at_tokens = float(np.interp(tokens, [p["tokens"] for p in points], [p["nll_nats"] for p in points]))
        rows.append(
            {
                "variant": name,
                "parameters": student["parameters"],
                "tokens": points[-1]["tokens"],
                "seconds": points[-1]["seconds"],
                "bits_per_byte": points[-1]["nll_nats"] * per_byte,
                "bits_per_byte_at_equal_tokens": at_tokens * per_byte,
                "kl_to_teacher_nats": points[-1]["kl_to_teacher_nats"],
                "vocabulary": result.get("vocabulary"),
            }
        )
    table = [
        {
            "initialisation": row["variant"],
            "parameters": f"{row['parameters'] / 1e6:.1f} M",
            "tokens": f"{row['tokens']:,}",
            f"bits/byte at {options.minutes * 60:.0f} s": f"{row['bits_per_byte']:.3f}",
            f"bits/byte at {tokens:,} tokens": f"{row['bits_per_byte_at_equal_tokens']:.3f}",
            "KL to teacher": f"{row['kl_to_teacher_nats']:.3f}",
        }
        for row in rows
    ]
    teacher = results["random"]["teacher"]["bits_per_byte"]
    print_table("What the student starts from", table, f"teacher: {teacher:.3f} bits/byte")
    finish(
        "ablation", {"minutes": options.minutes, "equal_tokens": tokens, "teacher_bits_per_byte": teacher, "rows": rows}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe_parser("ablation", __doc__, "quickstart")
    parser.add_argument("--minutes", type=float, default=1.0, help="training time of each variant")
    parser.add_argument(
        "--candidates", type=int, help="of the stage (default: those of the recipe's first that has some)"
    )
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
