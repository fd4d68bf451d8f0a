"""What drafting by the student gains its teacher: `eval/speculative.py` on the quickstart, reported as a benchmark.

make bench-speculative          or:  python -m benchmarks.speculative --run runs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.report import finish, print_table
from distill.command import guarded
from distill.recipe import load_recipe
from eval.speculative import DRAFTS, compare


def benchmark(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.run)
    settings = argparse.Namespace(
        teacher=recipe.teacher.model, student=options.run, drafts=options.drafts, prompt=None,
        new_tokens=options.new_tokens, dtype=options.dtype, runtime="onnx",
    )  # fmt: skip
    rows = compare(settings)
    drafting = {name: row for name, row in rows.items() if name.startswith("drafts of")}
    best = max(drafting, key=lambda name: drafting[name]["speedup"])
    print_table(
        f"{options.run} drafts for its teacher ({options.dtype}), greedy",
        [{"decoding": name, **{key: f"{value:.3f}" for key, value in row.items()}} for name, row in rows.items()],
        "Speed-up is over the teacher's own generate. Tokens are the same until two logits of the teacher are as near "
        "as its arithmetic is exact: reading several tokens at once rounds otherwise than one by one.",
    )
    finish(
        "speculative",
        {
            "speedup_greedy": rows[best]["speedup"],
            "acceptance_rate": rows[best]["acceptance_rate"],
            "identical": rows[best]["identical_tokens"],
            "best": best,
            "rows": rows,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", default="runs/quickstart", help="a run folder (runs/quickstart: make distill)")
    parser.add_argument("--drafts", type=int, nargs="+", default=list(DRAFTS), help="tokens drafted a round")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"], help="of the teacher")
    options = parser.parse_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
