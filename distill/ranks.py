"""What a narrow head loses: KL from the teacher to the teacher with a head of rank r, for a recipe's choice of rank.

    python -m distill.ranks RECIPE [key=value ...] --ranks 64 128 256

The basis of each rank comes from the teacher's states on the first training tokens (`student.fit_tokens`), in several
metrics of `distill/geometry.py`; a student's is the one named fisher. The loss is measured on validation text. *plain*
is the truncated singular value decomposition of the head alone, which knows nothing of the hidden states.

Legend: N tokens, V vocabulary, d width of the teacher, r rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.command import guarded
from distill.config import UserError
from distill.geometry import Basis, HiddenMoments, MetricSums
from distill.groundwork import BASIS_RIDGE
from distill.job import TeacherAndText, Validator, leave, start_accelerator
from distill.losses import mean_forward_kl
from distill.output import print_json, print_table
from distill.recipe import load_recipe
from distill.signals import Encoding, Head, HiddenSignal


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, show; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distill.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML recipe, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field by its dotted path")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128, 192, 256, 384], metavar="R")
    options = parser.parse_intermixed_args(arguments)
    return guarded(lambda: measure(options.recipe, options.overrides, options.ranks))


def measure(recipe_name: str, overrides: Sequence[str], ranks: Sequence[int]) -> None:
    """Print a row for each rank, and the same as a JSON object in the last line."""
    recipe = load_recipe(recipe_name, [*overrides, "targets.cache=false"])
    accelerator = start_accelerator(recipe)
    try:
        parts = TeacherAndText(recipe, accelerator)
        teacher = parts.teacher
        if wrong := [rank for rank in ranks if not 1 <= rank <= teacher.width]:
            raise UserError(f"--ranks: expected 1 to the teacher's width of {teacher.width}, found {wrong}")
        reference = Validator(recipe, parts, accelerator).reference
        if reference is None:
            raise UserError("student.tokenizer: ranks are those of the teacher's own head; remove it for this command")
        moments = HiddenMoments(teacher.width, teacher.head.weight_Vd.device)
        fisher = MetricSums(teacher.head, "fisher")
        lanes = recipe.run.batch_size
        wanted = max(1, (recipe.student.fit_tokens or 4096) // (lanes * recipe.corpus.block_length))
        for step in tqdm(range(min(wanted, len(parts.blocks) // lanes)), "first hidden states"):
            batch = parts.blocks.batch(torch.arange(step * lanes, (step + 1) * lanes).numpy())
            signal = teacher.signal(batch, Encoding("hidden"))
            assert isinstance(signal, HiddenSignal)
            moments.add(signal.hidden_Nd)
            fisher.add(signal.hidden_Nd)
        device = teacher.head.weight_Vd.device
        rows = compare(teacher.head, reference.hidden_Md.to(device), moments, fisher, ranks)
    finally:
        leave(accelerator)
    table = [
        {
            "rank": str(row["rank"]),
            "head, M parameters": f"{row['parameters'] / 1e6:.1f}",
            **{f"KL {name}": f"{row['kl_nats'][name]:.3f}" for name in METHODS},
        }
        for row in rows
    ]
    print_table(f"Low rank of {teacher.name}", table)
    print_json({"teacher": teacher.name, "tokens": len(reference.hidden_Md), "rows": rows})


METHODS = ("plain", "identity", "gram", "fisher")


def compare(
    head: Head, hidden_Md: Tensor, moments: HiddenMoments, fisher: MetricSums, ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """KL(teacher || low-rank teacher) in nats a token by rank and method, on hidden states of validation text."""
    mean_d, covariance_dd = moments.solve()
    metrics = {
        "identity": torch.eye(len(mean_d), dtype=torch.float64),
        "gram": MetricSums(head, "gram").matrix(BASIS_RIDGE),
        "fisher": fisher.matrix(BASIS_RIDGE),
    }
    _, _, axes_dd = torch.linalg.svd(head.weight_Vd.float(), full_matrices=False)
    exact, rows = HiddenSignal(hidden_Md, head), []
    for rank in ranks:
        plain_Md = hidden_Md.float() @ axes_dd[:rank].t() @ axes_dd[:rank]
        found = {"plain": mean_forward_kl(HiddenSignal(plain_Md, head), exact)}
        for name, metric_dd in metrics.items():
            basis = Basis.of(mean_d, covariance_dd, metric_dd.to(covariance_dd.device), rank)
            low = HiddenSignal(basis.coordinates(hidden_Md), basis.head(head))
            found[name] = mean_forward_kl(low, exact)
        rows.append({"rank": rank, "parameters": len(head.weight_Vd) * rank, "kl_nats": found})
    return rows


if __name__ == "__main__":
    sys.exit(main())
