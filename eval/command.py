"""What the evaluation commands share: which models on which texts, and where their figures go.

MODEL is anything that `AutoModelForCausalLM` loads, teacher or student: a hub id, a folder, a `.gguf` file,
`package:DISTRIBUTION/PATH`. A run folder stands for its teacher, its student and its control; several runs of one
teacher share it. Figures of a run's models are also kept in `RUN/eval/PROTOCOL.json`, and in its wandb run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.checkpoint import write_json
from distill.command import guarded
from distill.config import CorpusConfig, EvaluationConfig, TeacherConfig, UserError
from distill.corpus import load_corpus, separator_id
from distill.decode import Decoder, find_student, load_decoder
from distill.documents import open_documents
from distill.job import select_documents
from distill.metrics import Documents
from distill.output import machine, print_json
from distill.recipe import load_recipe
from distill.result import versions
from distill.student import LSTMForCausalLM
from distill.teacher import LanguageModel, load_language_model, resolve_dtype
from distill.tracking import log_evaluation
from distill.writing import text_of
from eval.shared import once

logger = logging.getLogger(__name__)
ROLES = ("teacher", "student", "control")
CLASSIFIER = "its accuracy and speed stand in its result.json, and the same recipe again prints them"
OF_PRECISION = ("perplexity", "agreement")  # measured for each arithmetic on its own
Figures = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model to be measured, by the name that tables give it, with the run folders that it belongs to."""

    label: str
    role: str  # teacher, student or control of its runs, else `model`
    config: TeacherConfig
    runs: tuple[Path, ...] = ()

    def load(self, dtype: str = "auto") -> LanguageModel:
        """On this machine's device; a student is read in fp32, as the training validates it, unless told otherwise."""
        wanted = self.config.dtype if dtype == "auto" else dtype
        loaded = self._load(wanted)
        if isinstance(loaded.model, LSTMForCausalLM) and wanted == "auto":
            loaded = self._load("fp32")
        return loaded

    def _load(self, dtype: str) -> LanguageModel:
        device = Accelerator().device
        chosen = {"dtype": resolve_dtype(dtype, device), "device": device, "role": self.role}
        given = self.config.model_dump(exclude={"context", "dtype", "weight"})
        key = ("model", self.config.model_copy(update={"dtype": chosen["dtype"]}))
        return once(key, lambda: load_language_model(**given, **chosen))

    def load_decoder(self) -> Decoder:
        """A student's quantised decoder."""
        return once(("decoder", self.config), lambda: load_decoder(find_student(self.config.model)))


def is_run(name: str) -> bool:
    """Whether a name on the command line is a run folder."""
    return (Path(name) / "recipe.yaml").is_file()


def run_labels(folders: Iterable[Path]) -> dict[Path, str]:
    """What tables call run folders: the last part of their paths, or as many as tell them apart; a folder once."""
    paths: dict[Path, Path] = {}
    for folder in folders:
        paths.setdefault(Path(os.path.abspath(folder)), folder)
    labels = {}
    for path, folder in paths.items():
        alike = (sum(other.parts[-n:] == path.parts[-n:] for other in paths) for n in itertools.count(1))
        labels[folder] = str(Path(*path.parts[-next(n for n, count in enumerate(alike, 1) if count == 1) :]))
    return labels


def make_subjects(
    names: Sequence[str], roles: Sequence[str] = ROLES, trust_remote_code: Sequence[str] = ()
) -> list[Subject]:
    """What the names on the command line stand for, teachers first; UserError for a run without a student."""
    teachers: dict[TeacherConfig, list[Path]] = {}
    others = []
    labels = run_labels(Path(name) for name in names if is_run(name))
    for name in names:
        folder = Path(name)
        if not is_run(name):
            others.append(Subject(name, "model", _named(name, trust_remote_code)))
            continue
        if folder not in labels:  # the same folder by another name
            continue
        if not (folder / "student" / "config.json").is_file():
            raise UserError(f"{name}: expected a finished run, found no student in it; run its recipe to the end first")
        recipe = load_recipe(folder)
        if recipe.classification is not None:
            raise UserError(f"{name}: expected a language model's run, found a classifier's; {CLASSIFIER}")
        teachers.setdefault(recipe.teacher.model_copy(update={"context": 0, "weight": 1.0}), []).append(folder)
        for role in ("student", "control"):
            if role in roles and (folder / role / "config.json").is_file():
                config = TeacherConfig(model=str(folder / role), dtype="fp32")
                others.append(Subject(f"{labels[folder]} {role}", role, config, (folder,)))
    wanted = teachers.items() if "teacher" in roles else ()
    return [
        Subject("teacher" if len(teachers) == 1 else f"teacher {config.model}", "teacher", config, tuple(runs))
        for config, runs in wanted
    ] + others


def _named(name: str, trusted: Sequence[str]) -> TeacherConfig:
    """A model by its name on the command line; `owner/name@revision` for a revision of a hub id."""
    model, found, revision = name.rpartition("@")
    if not found or Path(name).exists() or name.startswith("package:"):
        model, revision = name, ""
    return TeacherConfig(model=model, revision=revision or None, trust_remote_code=name in trusted)


def find_teacher(options: argparse.Namespace) -> Subject:
    """The one teacher of all models: `--teacher`, else that of the runs."""
    if options.teacher:
        return Subject(options.teacher, "teacher", _named(options.teacher, options.trust_remote_code))
    teachers = make_subjects(list(filter(is_run, options.models)), ("teacher",))
    if len(teachers) != 1:
        found = ", ".join(teacher.config.model for teacher in teachers) or "none among the models' runs"
        raise UserError(
            f"--teacher: expected one teacher for all models, found {found}; name it, or give one at a time"
        )
    return teachers[0]


def in_tokens_of(model: LanguageModel, teacher: LanguageModel) -> LanguageModel:
    """The teacher over the model's tokens: a part of its own where the model's vocabulary was trimmed.

    UserError where the model has tokens that the teacher lacks.
    """
    whole, own = teacher.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    if own == whole:
        return teacher
    if own.keys() <= whole.keys() and sorted(own.values()) == list(range(len(own))):
        return teacher.trimmed(model.tokenizer, np.array([whole[token] for token in sorted(own, key=own.__getitem__)]))
    raise UserError(
        f"{model.name}: its vocabulary of {model.vocab_size} tokens is not that of the teacher {teacher.name} "
        f"({teacher.vocab_size}) or a part of it, so their distributions cannot be compared; python -m eval.perplexity "
        "compares them per word and per byte"
    )


SELECTION = (  # the fields that say which documents there are
    "source", "name", "revision", "split", "text_field", "documents", "streaming", "sample_documents", "max_documents",
    "validation_fraction", "test_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A corpus to be read: the documents of one split, or all of a text, and how a Transformer's windows go over it.

    That of a run is as many documents as the run was validated on, which were counted out in its student's tokens.
    """

    label: str
    corpus: CorpusConfig
    split: str  # as the training sees it (`train`, `validation`, `test`), or `all` of the text
    evaluation: EvaluationConfig
    run: Path | None = None

    @property
    def settings(self) -> Figures:
        """What numbers on this text depend on."""
        text = self.corpus.model_dump(mode="json", include=set(SELECTION), exclude_defaults=True)
        chosen = self.evaluation.model_dump(include={"window", "context", "max_tokens"})
        return {"text": text, "split": self.split, **chosen}

    def documents(self, model: LanguageModel, count: int | None = None) -> Documents:
        """The first `count` documents in the model's own tokens; else as many as the run has, or fit `max_tokens`."""
        count = self._documents_of_run if count is None else count
        make = partial(self._documents, model.tokenizer, model.name, count)
        return once(("documents", self, model.tokenizer, count), make)

    def separator_id(self, tokenizer: PreTrainedTokenizerBase, name: str) -> int:
        """The token before each document; the tokenizer's own where it lacks the recipe's."""
        return separator_id(tokenizer, self._with_separator_of(tokenizer, name).separator)

    @property
    def _documents_of_run(self) -> int | None:
        """None for a text of no run, and where all are read."""
        run = self.run
        if run is None or self.evaluation.max_tokens is None:
            return None

        def count() -> int:
            return len(self._documents(AutoTokenizer.from_pretrained(run / "student"), str(run), None).tokens)

        return once(("documents of the run", self), count)

    def _documents(self, tokenizer: Any, name: str, count: int | None) -> Documents:
        """The first `count` documents, or those within `max_tokens`, in a tokenizer's tokens."""
        max_tokens = self.evaluation.max_tokens if count is None else None
        if self.split != "all":
            corpus = load_corpus(self._with_separator_of(tokenizer, name), tokenizer, progress=False)
            return select_documents(getattr(corpus, self.split), max_tokens).first(count)
        separator = self.separator_id(tokenizer, name)
        tokens: list[np.ndarray] = []
        utf8_bytes: list[int] = []
        words: list[int] = []
        total = 0
        for text in itertools.islice(open_documents(self.corpus, progress=False), count):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            if tokens and max_tokens is not None and total + len(ids) > max_tokens:
                break
            total += len(ids)
            tokens.append(np.array([separator, *ids], dtype=np.int64))
            utf8_bytes.append(len(text.encode()))
            words.append(len(text.split()))
        if total == 0:
            raise UserError(f"corpus {self.corpus.source}: expected text, found none")
        return Documents(tokens, np.array(utf8_bytes), np.array(words))

    def _with_separator_of(self, tokenizer: Any, name: str) -> CorpusConfig:
        """The recipe's corpus; a tokenizer that lacks its separator starts documents with its own."""
        if self.corpus.separator is None or self.corpus.separator in tokenizer.get_vocab():
            return self.corpus
        logger.warning("%s: no token %s, documents start with its own", name, self.corpus.separator)
        return self.corpus.model_copy(update={"separator": None})


def make_parser(protocol: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of `eval.PROTOCOL`, with the models."""
    parser = argparse.ArgumentParser(
        prog=f"python -m eval.{protocol}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(protocol=protocol)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a run folder, or any causal language model")
    # What the report has no use for is not measured.
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument(
        "--trust-remote-code", action="append", default=[], metavar="MODEL",
        help="run the code that this model brings along; name it as owner/name@COMMIT",
    )  # fmt: skip
    return parser


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """The options that `make_texts` reads."""
    parser.add_argument(
        "--corpus", nargs="+", metavar="TEXT",
        help="recipes, run folders or text sources (default: what the first run folder was validated on)",
    )  # fmt: skip
    parser.add_argument(
        "--split",
        choices=["validation", "test", "train", "all"],
        help="default: validation of a recipe, all of a text",
    )
    parser.add_argument("--text-field", default="text", help="field of a text source's records")
    parser.add_argument("--unit", default="paragraph", choices=["line", "paragraph", "file"], help="a .txt document")
    parser.add_argument(
        "--separator", help="token that starts a text's documents (default: the first run's, else the tokenizer's end)"
    )
    parser.add_argument("--window", type=int, help="longest stretch that a Transformer reads, in tokens")
    parser.add_argument("--context", type=int, help="minimum left context in later windows, in tokens")
    parser.add_argument("--max-tokens", type=int, help="read the first whole documents within this many tokens")


def add_decoder_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decoder", action="store_true", help="students in their quantised decoder, without teachers")


def precision_of(options: argparse.Namespace) -> str:
    """The arithmetic that was asked for; `auto`: that in which the models were trained."""
    return "int8" if getattr(options, "decoder", False) else str(options.dtype)


def make_texts(options: argparse.Namespace) -> list[Text]:
    """The corpora that the options name; UserError where one is missing or an option is out of bounds."""
    runs = list(filter(is_run, options.models))
    names = dict.fromkeys(options.corpus or runs[:1])
    if not has_text(options):
        raise UserError("--corpus: expected a text, a recipe or a run folder, as no run folder is among the models")
    given = {name: getattr(options, name) for name in ("window", "context", "max_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    separator = options.separator or (load_recipe(runs[0]).corpus.separator if runs else None)
    texts: dict[str, Text] = {}
    for name in names:
        recipe = load_recipe(name) if is_run(name) or Path(name).suffix in (".yaml", ".yml") else None
        try:
            if recipe is None:
                corpus = CorpusConfig(
                    source=name, text_field=options.text_field, separator=separator, documents=options.unit
                )
                base: Figures = {"max_tokens": None}
            else:
                corpus, base = text_of(recipe), recipe.evaluation.model_dump()
            evaluation = EvaluationConfig.model_validate({**base, **given})
        except ValidationError as error:
            raise UserError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
        split = options.split or ("validation" if recipe else "all")
        label = f"{Path(corpus.source).name}, {split}"
        label = f"{name}, {split}" if label in texts else label
        texts[label] = Text(label, corpus, split, evaluation, Path(name) if is_run(name) else None)
    return list(texts.values())


def has_text(options: argparse.Namespace) -> bool:
    """Whether the options name a corpus, or a run folder with one."""
    return bool(options.corpus or any(map(is_run, options.models)))


def execute(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, work: Callable[[argparse.Namespace], object]
) -> int:
    """Parse the command line and do the work; errors become one message and exit code 2."""
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    transformers.utils.logging.disable_progress_bar()
    return guarded(lambda: work(options))


def finish(options: argparse.Namespace, figures: Mapping[Subject, Figures], settings: Figures) -> None:
    """Keep what was measured in the run folders and their wandb runs, and print it as the last line.

    A run's file holds its models by role; the printed line holds all of them by label.
    """
    protocol = options.protocol
    if protocol in OF_PRECISION and (precision := precision_of(options)) != "auto":
        protocol += f"-{precision}"  # beside the figures of the models as they were trained, not in their place
    about = {
        "protocol": protocol,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "machine": machine(),
        "versions": versions(),
    }
    for run in sorted({run for subject in figures for run in subject.runs}):
        models = {subject.role: row for subject, row in figures.items() if run in subject.runs}
        write_json(run / "eval" / f"{protocol}.json", {**about, "models": models}, field="run folder")
        pictures = sorted((run / "eval").glob(f"{protocol}_*.png"))
        log_evaluation(run, protocol, models, pictures)
    print_json({**about, "models": {subject.label: row for subject, row in figures.items()}})


def positive(text: str) -> int:
    """A whole number of the command line above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value


def positive_number(text: str) -> float:
    """A number of the command line above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value


def read_results(run: Path, protocol: str) -> Figures | None:
    """What `eval.PROTOCOL` has found out about a run, or None."""
    file = run / "eval" / f"{protocol}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("models"), dict):
            raise ValueError("it holds no models")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: cannot be read: {error}; measure it again with python -m eval.{protocol.partition('-')[0]} {run}"
        ) from None
