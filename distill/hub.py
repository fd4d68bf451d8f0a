"""Publishing: the finished student, with a model card made from the recipe and the result, on the hub.

The card says nothing that the run did not measure. The token comes from where huggingface_hub keeps it
(`hf auth login` or HF_TOKEN) and is neither printed nor stored.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from distill.checkpoint import write_atomically
from distill.config import Recipe, UserError
from distill.recipe import dump_recipe
from distill.result import table_rows

logger = logging.getLogger(__name__)


def publish(recipe: Recipe, result: dict[str, Any]) -> str:
    """Upload `RUN/student` with its card to `publishing.repo`; returns the address. UserError if the hub refuses."""
    publishing = recipe.publishing
    assert publishing.repo is not None, "publishing is asked for by naming a repository"
    folder = recipe.folder / "student"
    write_card(recipe, result, folder)
    api = HfApi()
    try:
        api.create_repo(publishing.repo, private=publishing.private, exist_ok=True)
        if publishing.branch:
            api.create_branch(publishing.repo, branch=publishing.branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=publishing.repo,
            folder_path=str(folder),
            revision=publishing.branch,
            commit_message=f"Student of {recipe.teacher.model}",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"publishing.repo {publishing.repo}: the hub refused: {reason}. The student lies in {folder}; "
            "log in with `hf auth login` or set HF_TOKEN, then run the same command again"
        ) from None
    logger.info("published: %s", commit.commit_url)
    return commit.commit_url


def write_card(recipe: Recipe, result: dict[str, Any], folder: Path) -> None:
    """Write the model card `README.md` into a student's folder."""
    hub_teacher = (
        "/" in recipe.teacher.model and ":" not in recipe.teacher.model and not Path(recipe.teacher.model).exists()
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["potstill", "lstm", "distillation"],
        base_model=recipe.teacher.model if hub_teacher else None,
    )
    rows, place = table_rows(result), recipe.publishing.repo or "PATH"
    table = [
        " | ".join(rows[0]),
        " | ".join("---" for _ in rows[0]),
        *(" | ".join(row.values()) for row in rows),
    ]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {recipe.run.name}: an LSTM distilled from {recipe.teacher.model}",
        "A causal language model with constant memory per token, made with Potstill. Validation on "
        f"{result['student']['tokens']:,} tokens of {recipe.corpus.source}:",
        "\n".join(f"| {row} |" for row in table),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)\n```',
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe)}```",
    ]
    write_atomically(folder / "README.md", lambda path: path.write_text("\n\n".join(lines) + "\n", encoding="utf-8"))
