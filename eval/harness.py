"""The EleutherAI lm-evaluation-harness on a student or a teacher, through its Hugging Face interface.

    python -m eval.harness runs/quickstart                     a last-word task from the run's own validation text
    python -m eval.harness MODEL ... --corpus articles.txt
    python -m eval.harness MODEL ... --tasks lambada_openai hellaswag      tasks of the harness (need a network)

The task `last_word` is made here from any text, as LAMBADA is made from novels (Paperno et al. 2016, arXiv
1606.06031): given all of a passage but its last word, is that word the greedy continuation, and what perplexity has it?
The passages are the documents' beginnings up to the end of the sentence after `--words` words. The harness needs an
extra: pip install 'potstill[harness]'.
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
from distill.corpus import side_of
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
    data = folder / "last_word.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    task = {
        "task": "last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
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


def as_harness_model(model: LanguageModel, batch_size: int = 8) -> Any:
    """The harness's own wrapper around a loaded model; UserError where the harness is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError("eval.harness needs an extra: pip install 'potstill[harness]'") from None
    limit = None if model.longest_window == float("inf") else int(model.longest_window)
    return HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, backend="causal", batch_size=batch_size,
        max_length=limit or 2048,
    )  # fmt: skip


def run_tasks(model: LanguageModel, tasks: Sequence[str], folder: Path, limit: int | None) -> Figures:
    """The harness's results, by task and metric."""
    harness = as_harness_model(model)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder))
    if unknown := set(tasks) - set(manager.all_tasks):
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "last_word" in options.tasks:
            text = make_texts(options)[0]
            settings |= {"corpus": text.label, "examples": write_task(text, folder, options.words, options.limit)}
        for subject in subjects:
            figures[subject] = run_tasks(subject.load(options.dtype), options.tasks, folder, options.limit)
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
    parser.add_argument("--tasks", nargs="+", default=["last_word"], metavar="TASK")
    parser.add_argument(
        "--words", type=int, default=30, help="words of a last_word passage before its last sentence ends"
    )
    parser.add_argument("--limit", type=int, default=200, help="examples of each task")
    return execute(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
