"""The EleutherAI lm-evaluation-harness on a student or a teacher, through its Hugging Face interface.

    python -m eval.harness runs/quickstart                     a last-word task from the run's own validation text
    python -m eval.harness MODEL ... --corpus articles.txt
    python -m eval.harness MODEL ... --tasks tests/last_word/last_word.yaml      a task of your own, without a network
    python -m eval.harness MODEL ... --tasks lambada_openai hellaswag      tasks of the harness (need a network)

The task `last_word` is made here from any text, as LAMBADA is made from novels (Paperno et al. 2016, arXiv
1606.06031): given all of a passage but its last word, is that word the greedy continuation, and what perplexity has it?
The passages are the documents' beginnings up to the end of the sentence after `--words` words. A task of your own is a
YAML file as the harness wants it; data files that it names are looked for beside it. Where a task reads a text from
nothing, it begins after the token that starts documents, as in training. The harness needs an extra:
pip install 'potstill[harness]'.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.config import UserError
from distill.corpus import separator_id, side_of
from distill.documents import open_documents
from distill.output import print_table
from distill.teacher import LanguageModel
from eval.command import (
    Figures,
    Subject,
    Text,
    add_corpus_options,
    execute,
    finish,
    has_text,
    make_parser,
    make_subjects,
    make_texts,
)

LAST_WORD = re.compile(r"^(.*\S)\s+([^\W\d_]{3,})[.!?]$", re.DOTALL)


def passages(text: Text, words: int) -> Iterator[dict[str, str]]:
    """A passage and its last word from each document of the split that has one: `words` words, then to a full stop."""
    for document in open_documents(text.corpus, progress=False):
        if text.split != "all" and side_of(document, text.corpus) != text.split:
            continue
        taken = document.split()
        ends = (n for n in range(words, len(taken)) if taken[n].endswith((".", "!", "?")))
        if found := LAST_WORD.match(" ".join(taken[: next(ends, -1) + 1])):
            yield {"passage": found[1], "word": found[2]}


def write_task(text: Text, folder: Path, words: int, limit: int) -> int:
    """Write the task's YAML and its examples into a folder; their number. UserError where the text has none."""
    examples = list(itertools.islice(passages(text, words), limit))
    if not examples:
        raise UserError(f"corpus {text.label}: expected documents of more than {words} words in sentences, found none")
    lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    (folder / "last_word.jsonl").write_text(lines, encoding="utf-8")
    task = {
        "task": "last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "last_word.jsonl"}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{passage}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1},
    }
    (folder / "last_word.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return len(examples)


def read_task(file: Path) -> dict[str, Any]:
    """A task of the harness from its YAML file, its data files looked for beside that."""
    try:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(task, dict) or not isinstance(task.get("task"), str):
            raise ValueError("it names no task")
        files = (task.get("dataset_kwargs") or {}).get("data_files") or {}
        for side, name in files.items():
            files[side] = str(file.parent.resolve() / name)
            if not Path(files[side]).is_file():
                raise ValueError(f"{files[side]} does not exist")
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--tasks: {file}: expected a task of the harness as YAML: {reason}") from None
    return task


def as_harness_model(model: LanguageModel, separator: int, batch_size: int = 8) -> Any:
    """The harness's own wrapper around a loaded model, in which texts begin after the separator.

    UserError where the harness is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError("eval.harness needs an extra: pip install 'potstill[harness]'") from None
    limit = None if model.longest_window == float("inf") else int(model.longest_window)
    return HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, backend="causal", batch_size=batch_size,
        max_length=limit or 2048, prefix_token_id=separator,
    )  # fmt: skip


def run_tasks(
    model: LanguageModel, tasks: Sequence[str | dict[str, Any]], separator: int, limit: int | None
) -> Figures:
    """The harness's results, by task and metric."""
    harness = as_harness_model(model, separator)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if unknown := {task for task in tasks if isinstance(task, str)} - set(manager.all_tasks):
        raise UserError(f"--tasks: the harness knows no {', '.join(sorted(unknown))}")
    found = lm_eval.simple_evaluate(
        harness, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
    )
    return {
        task: {name.removesuffix(",none"): value for name, value in row.items() if isinstance(value, int | float)}
        for task, row in found["results"].items()
    }


def measure(options: argparse.Namespace) -> None:
    subjects = make_subjects(options.models, trust_remote_code=options.trust_remote_code)
    settings: Figures = {"tasks": options.tasks, "words": options.words}
    figures: dict[Subject, Figures] = {}
    tasks: list[str | dict[str, Any]] = [
        read_task(Path(task)) if task.endswith((".yaml", ".yml")) else task
        for task in options.tasks
        if task != "last_word"
    ]
    text = make_texts(options)[0] if "last_word" in options.tasks or has_text(options) else None
    with tempfile.TemporaryDirectory() as folder:
        if "last_word" in options.tasks:
            assert text is not None
            count = write_task(text, Path(folder), options.words, options.limit)
            tasks.append(read_task(Path(folder) / "last_word.yaml"))
            settings |= {"corpus": text.label, "examples": count}
        for subject in subjects:
            model = subject.load(options.dtype)
            separator = (
                text.separator_id(model.tokenizer, model.name)
                if text
                else separator_id(model.tokenizer, options.separator)
            )
            figures[subject] = run_tasks(model, tasks, separator, options.limit)
    rows = [
        {"model": subject.label, "task": task, **{name: f"{value:.4g}" for name, value in row.items()}}
        for subject, found in figures.items()
        for task, row in found.items()
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        print_table(f"lm-evaluation-harness, {task}", [row for row in rows if row["task"] == task])
    finish(options, figures, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("harness", __doc__)
    add_corpus_options(parser)
    parser.add_argument(
        "--tasks", nargs="+", default=["last_word"], metavar="TASK", help="last_word, a YAML file, or the harness's own"
    )
    parser.add_argument(
        "--words", type=int, default=30, help="words of a last_word passage before its last sentence ends"
    )
    parser.add_argument("--limit", type=int, default=200, help="examples of each task")
    return execute(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
