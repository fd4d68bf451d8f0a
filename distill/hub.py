"""Publishing: a finished student on the hub, with a model card made from the recipe and the result.

    python -m distill.hub runs/quickstart user/name [--private] [--branch dev] [--license apache-2.0]
    python -m distill.hub runs/quickstart user/name --dry-run       writes runs/quickstart/hub/ and stops

What is uploaded is the folder RUN/hub: configuration, weights, tokenizer, the student's code file, ONNX files (where
the extra `onnx` is installed), the curves, and a card that says nothing which the run did not measure. One commit
holds it all, so nobody sees a half of it; what an interrupted upload has brought over is not sent again, and
publishing the same thing twice changes nothing. The token comes from where huggingface_hub keeps it (`hf auth
login` or HF_TOKEN) and is neither printed nor stored.

A student is made of its teacher's weights, so it carries the teacher's licence. Where that is not known it is asked
for, never guessed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_session
from huggingface_hub.errors import HTTPError

from distill.checkpoint import write_atomically
from distill.command import guarded
from distill.config import Recipe, UserError
from distill.packaged import PREFIX
from distill.recipe import dump_recipe, load_recipe
from distill.redact import redact
from distill.result import check_files, classification_in_words, is_classification, read_result, table_rows
from distill.student import LSTMConfig

logger = logging.getLogger(__name__)
TIMEOUT = 300.0  # seconds without a sign of life after which a connection counts as broken
PAUSES = (1.0, 4.0, 15.0)  # seconds before trying again after a server's error or a broken connection


def publish(recipe: Recipe, result: dict[str, Any]) -> str:
    """Publish a run as its recipe says; returns the address of the commit."""
    publishing = recipe.publishing
    assert publishing.repo is not None, "publishing is asked for by naming a repository"
    folder = stage(recipe, result, publishing.repo)
    return upload(folder, publishing.repo, publishing.private, publishing.branch, f"Student of {recipe.teacher.model}")


def stage(
    recipe: Recipe, result: dict[str, Any], repo: str, license_id: str | None = None, report: Path | None = None
) -> Path:
    """Write RUN/hub, the folder that is uploaded; UserError where the teacher's licence is not known.

    `report` is a folder of eval.report, whose table and picture of quality against speed go into the card.
    """
    teachers = (recipe.teacher, *recipe.other_teachers)
    license_id = license_id or recipe.publishing.license
    if license_id is None:
        sources = [(teacher.model, teacher.revision) for teacher in teachers]
        if recipe.student.model:
            sources.append((recipe.student.model, recipe.student.revision))
        if recipe.classification and recipe.classification.start_from:
            sources.append((recipe.classification.start_from, None))
        licenses = {teacher_license(*source) for source in sources}
        license_id = licenses.pop() if len(licenses) == 1 and not recipe.endpoint else None
    if license_id is None:
        names = [*(model for model, _ in sources), *([recipe.endpoint.model] if recipe.endpoint else [])]
        raise UserError(
            f"teacher {' + '.join(names)}: its licence is not known, or that of one is not that of another, and the "
            "student carries it. Look it up, then give publishing.license, or "
            f"python -m distill.hub {recipe.folder} {repo} --license apache-2.0 (or what it is)"
        )
    pictures = [recipe.folder / "curves.png"]
    table = None
    if report is not None:
        if not (report / "table.md").is_file():
            raise UserError(f"--report {report}: expected a folder of eval.report with its table.md, found none")
        table = (report / "table.md").read_text(encoding="utf-8")
        pictures.append(report / "frontier.png")
    check_files(recipe.folder, result)
    source, target = recipe.folder / "student", recipe.folder / "hub"
    if not (source / "config.json").is_file():
        raise UserError(f"{recipe.folder}: expected a finished run with student/config.json, found none")
    if is_classification(result):
        pass  # ONNX files are for what is read token by token
    elif _student_config(recipe)["model_type"] != LSTMConfig.model_type:
        logger.info("no ONNX files are published: they are made of LSTM students only")
    elif importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        from distill.decoder import why_no_onnx, write_decoder
        from distill.export import write_onnx
        from distill.graph import is_current
        from distill.torch_decoder import load_student

        files = ("model.onnx", "model_int8.onnx", "decoder.onnx")
        if reason := why_no_onnx(LSTMConfig.from_pretrained(source)):
            logger.warning("no ONNX files are published. %s", reason)
        elif not all(is_current(source / file) for file in files):
            student = load_student(source)
            for int8 in (False, True):
                write_onnx(student, source, int8)
            write_decoder(student, source)
    else:
        logger.warning("no ONNX files are published: they need an extra: pip install 'potstill[onnx]'")

    def write(path: Path) -> None:
        shutil.copytree(source, path)
        for picture in pictures:
            if picture.is_file():
                shutil.copy(picture, path)
        write_card(recipe, result, path, license_id, repo, table)

    write_atomically(target, write)
    return target


def upload(
    folder: Path, repo: str, private: bool, branch: str | None, message: str, *, repo_type: str = "model",
    ignore: Sequence[str] = (),
) -> str:  # fmt: skip
    """Upload a folder in one commit, without files that a pattern in `ignore` fits; returns the commit's address.

    UserError if the hub refuses or stays unreachable.
    """
    api = HfApi()

    def once() -> str:
        get_session().timeout = TIMEOUT  # the library's own is endless
        api.create_repo(repo, private=private, exist_ok=True, repo_type=repo_type)
        if private and not api.repo_info(repo, repo_type=repo_type).private:
            raise UserError(
                f"{repo}: expected a private repository, found a public one of that name; nothing was uploaded. Choose "
                "another name, make it private on the hub, or publish openly (without --private; publishing.private: "
                "false)"
            )
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True, repo_type=repo_type)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=branch, commit_message=message, repo_type=repo_type,
            ignore_patterns=list(ignore),
        )  # fmt: skip
        return commit.commit_url

    try:
        address = _retried(once)
    except (HTTPError, OSError, ValueError, RuntimeError) as wrapped:
        error = wrapped.__cause__ if isinstance(wrapped, RuntimeError) and wrapped.__cause__ else wrapped
        reason = redact((str(error).strip().splitlines() or [type(error).__name__])[0])
        status = getattr(getattr(error, "response", None), "status_code", None)
        todo = {
            401: "log in with `hf auth login` or set HF_TOKEN",
            403: "the token may not write there: choose a name of your own, or a token with write access",
        }.get(status or 0, "try again later: what has arrived is not sent twice")
        raise UserError(f"{repo}: the hub refused: {reason}. All of it lies in {folder}; {todo}") from None
    logger.info("published: %s", address)
    return address


def _retried(once: Callable[[], str]) -> str:
    """Try again where the server or the connection, not the request, was at fault."""
    for pause in PAUSES:
        try:
            return once()
        except (HTTPError, RuntimeError) as error:
            cause = error if isinstance(error, HTTPError) else error.__cause__  # the library wraps failed uploads
            if not isinstance(cause, HTTPError):
                raise
            response = getattr(cause, "response", None)  # none where the connection broke
            if response is not None and response.status_code < 500 and response.status_code != 429:
                raise
            logger.warning("the hub did not answer as it should (%s); trying again", type(cause).__name__)
            time.sleep(pause)
    return once()


def teacher_license(model: str, revision: str | None = None) -> str | None:
    """The identifier of a teacher's licence: of its hub card, its folder's card, or its package; None if unknown."""
    if model.startswith(PREFIX):
        try:
            package = metadata(model.removeprefix(PREFIX).partition("/")[0])
        except PackageNotFoundError:
            return None
        found = next(iter([*package.get_all("License-Expression", []), *package.get_all("License", [])]), None)
    elif Path(model).expanduser().exists():
        card = Path(model).expanduser() / "README.md"
        found = ModelCard.load(card).data.license if card.is_file() else None
    else:
        try:
            data = HfApi().model_info(model, revision=revision).card_data
        except (HTTPError, OSError, ValueError):
            return None
        found = data.license if data else None
    # A whole licence text, or "other", names no licence.
    return found.lower() if isinstance(found, str) and len(found.split()) == 1 and found.lower() != "other" else None


def _text_license(recipe: Recipe) -> str:
    """What is known of the licence of a run's text, in words."""
    source = recipe.corpus.source
    if source is None:
        return "it is the teacher's output, under the teacher's licence"
    found = None
    if _is_hub_id(source):
        try:
            data = HfApi().dataset_info(source, revision=recipe.corpus.revision).card_data
        except (HTTPError, OSError, ValueError):
            data = None
        found = data.license if data else None
    names = " and ".join(found) if isinstance(found, list) else found
    return f"its licence, by its card: {names}" if names else "its licence is not stated here: see there"


def _targets(targets: dict[str, Any]) -> str:
    """In words: of what kind, and of a cache what its manifest says."""
    manifest = targets.get("manifest")
    text = _sentence({name: value for name, value in targets.items() if name != "manifest"})
    return f"{text}; by the cache's manifest {_sentence(manifest)}" if manifest else text


def _is_hub_id(name: str) -> bool:
    return "/" in name and ":" not in name and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _text_name(recipe: Recipe) -> str:
    """The text that a run was trained and validated on."""
    return recipe.corpus.source or "text that the teacher wrote"


def card_data(recipe: Recipe, result: dict[str, Any], license_id: str | None) -> ModelCardData:
    """The card's metadata, with the results in the form that the hub shows beside a model."""
    corpus, student = _text_name(recipe), result["student"]
    teachers = [teacher.model for teacher in (recipe.teacher, *recipe.other_teachers)]
    teachers += [recipe.student.model] if recipe.student.model else []
    if recipe.classification and recipe.classification.start_from:
        teachers.append(recipe.classification.start_from)
    task, side = "text-generation", "validation documents"
    if is_classification(result):
        task, side = "text-classification", "test texts"
    special = ["distillation", "knowledge-distillation"]
    if _student_config(recipe)["model_type"] == LSTMConfig.model_type:
        special = ["lstm", *special, "custom_code"]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=corpus if _is_hub_id(corpus) else corpus.rsplit("/", 1)[-1],
            dataset_name=f"{corpus}, {side} of the run",
            metric_type=figure,
            metric_value=student[figure],
            metric_name=name,
        )
        for figure, name in (
            ("accuracy", "accuracy"),
            ("perplexity", "perplexity per token"),
            ("bits_per_byte", "bits per byte"),
            ("kl_to_teacher_nats", f"KL(teacher || student), nats per {'text' if 'accuracy' in student else 'token'}"),
            ("top1_agreement", "top-1 agreement with the teacher"),
        )
        if figure in student
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["potstill", *special],
        license=license_id,
        base_model=[name for name in teachers if _is_hub_id(name)] or None,
        datasets=[corpus] if _is_hub_id(corpus) else None,
        model_name=recipe.run.name,
        eval_results=results,
    )


def write_card(
    recipe: Recipe,
    result: dict[str, Any],
    folder: Path,
    license_id: str | None = None,
    repo: str | None = None,
    trade_off: str | None = None,
) -> None:
    """Write the model card `README.md` into a student's folder. `trade_off` is a table of quality against speed."""
    place = repo or recipe.publishing.repo or "PATH"
    paragraphs = _classifier_card if is_classification(result) else _language_model_card
    text = redact("\n\n".join(paragraphs(recipe, result, folder, license_id, place, trade_off)) + "\n")
    write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def _markdown(rows: list[dict[str, str]]) -> str:
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _classifier_card(
    recipe: Recipe, result: dict[str, Any], folder: Path, license_id: str | None, place: str, _: str | None
) -> list[str]:
    """The paragraphs of a classifier's card."""
    student, corpus = result["student"], result["corpus"]
    config = _student_config(recipe)
    load = (
        "```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", model="{place}", trust_remote_code=True)\n'
        f'classify("...", truncation=True, max_length={recipe.classification.max_length})\n```'  # type: ignore[union-attr]
    )
    return [
        f"---\n{card_data(recipe, result, license_id).to_yaml()}\n---",
        f"# {recipe.run.name}: an LSTM classifier distilled from {recipe.teacher.model}",
        f"A text classifier of {student['parameters'] / 1e6:.1f} M parameters ({_architecture(config)}, read from "
        "left to right), made with Potstill. Classes: "
        f"{', '.join(result['classes'])}. On {student['texts']:,} test texts of {recipe.corpus.source}:",
        _markdown(table_rows(result)),
        "`95 %` is the interval of the accuracy, `agreement` the share of texts that get the teacher's class, `ms` the "
        f"time for a text at batch 1. {classification_in_words(result)}",
        *_picture(folder, "curves.png", "Validation accuracy over training"),
        "## Use",
        load,
        "## Where it comes from",
        f"- Teacher: {recipe.teacher.model}, licence {license_id or 'not stated'}, which this student carries"
        f"{', fine-tuned on the labels' if recipe.fine_tuning else ''}.\n"
        f"- Text: {recipe.corpus.source}; {corpus['train_texts']:,} texts with labels, {corpus['unlabelled_texts']:,} "
        f"without, {corpus['copies']:,} changed copies (fingerprint {corpus['fingerprint']}); "
        f"{_text_license(recipe)}.\n"
        f"- Software: {_sentence(result['versions'])}.",
        "## Limits",
        "It knows what teacher and labels taught it, on texts of the same kind, and repeats what they get wrong.",
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe)}```",
    ]


def _language_model_card(
    recipe: Recipe,
    result: dict[str, Any],
    folder: Path,
    license_id: str | None,
    place: str,
    trade_off: str | None,
) -> list[str]:
    """The paragraphs of a language model's card."""
    config, student, own_tokens = _student_config(recipe), result["student"], recipe.student.has_own_tokenizer
    kind, shape, trust = f"a {config['model_type']}", "", ""
    if config["model_type"] == LSTMConfig.model_type:
        kind, shape = "an LSTM", f" ({_architecture(config)}) with constant memory per token"
        trust = ", trust_remote_code=True"
    load = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{place}"{trust})\n```'
    )
    draft = (
        "```python\n"
        f'teacher = AutoModelForCausalLM.from_pretrained("{recipe.teacher.model}")\n'
        "teacher.generate(**inputs, assistant_model=model)  # the teacher's own text, sooner\n```"
    )
    streamed = " of its beginning, the rest being streamed" if recipe.corpus.streaming else ""
    return [
        f"---\n{card_data(recipe, result, license_id).to_yaml()}\n---",
        f"# {recipe.run.name}: {kind} distilled from {recipe.teacher.model}",
        f"A causal language model of {student['parameters'] / 1e6:.1f} M parameters{shape}, made with Potstill. "
        f"Validation on {student['tokens']:,} tokens of {_text_name(recipe)}:",
        _markdown(table_rows(result)),
        "`ppl` is perplexity per token, `KL` is KL(teacher ‖ model) in nats, `top-1` how often both find the same "
        "token likeliest, `tok/s` greedy decoding at batch 1."
        + (" Teacher and student have tokenizers of their own: compare them by bits/byte." if own_tokens else ""),
        *_control(result),
        *_picture(folder, "curves.png", "Validation loss over training"),
        *(["## Quality against speed", trade_off.strip()] if trade_off else []),
        *_picture(folder, "frontier.png", "Quality against speed"),
        "## Use",
        load,
        *(["To draft for its teacher:", draft] if _is_hub_id(recipe.teacher.model) and not own_tokens else []),
        *_onnx(folder, place, config),
        "## Where it comes from",
        f"- Teacher: {recipe.teacher.model}, licence {license_id or 'not stated'}, which this student carries.\n"
        f"- Text: {_text_name(recipe)}, {result['corpus']['train_tokens']:,} tokens in "
        f"{result['corpus']['train_documents']:,} training documents{streamed} "
        f"(fingerprint {result['corpus']['fingerprint']}); {_text_license(recipe)}.\n"
        f"- Soft targets: {_targets(result['targets'])}.\n"
        f"- Software: {_sentence(result['versions'])}.",
        "## Limits",
        "It is small and knows less than its teacher by the table above; it repeats what the teacher gets wrong and "
        "what the text holds. It was not tuned to follow instructions or to refuse anything; do not rely on it for "
        "facts.",
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe)}```",
    ]


def _student_config(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recipe.folder / "student" / "config.json").read_text(encoding="utf-8"))
    return found


def _picture(folder: Path, name: str, title: str) -> list[str]:
    return [f"![{title}]({name})"] if (folder / name).is_file() else []


def _control(result: dict[str, Any]) -> list[str]:
    if "control" not in result:
        return []
    match = result["control"]["match"].replace("_", " ")
    return [
        f"The control is the same architecture from random weights, trained by cross-entropy alone at equal {match}; "
        f"distillation gained {result['distillation_gain_nats']:+.3f} nats over it."
    ]


def _architecture(config: dict[str, Any]) -> str:
    """In words; a student made before a field existed has its default."""
    cell = {"lstm": "LSTM", "gru": "GRU", "ln_lstm": "layer-normalised LSTM"}[config.get("cell", "lstm")]
    text = f"{config['num_layers']} {cell} layers of {config['hidden_size']} units"
    if size := config.get("feed_forward_size"):
        text += f", each with a feed-forward block of {size}"
    if window := config.get("attention_window"):
        text += f", attention to the last {window} positions"
    return text


def _onnx(folder: Path, place: str, config: dict[str, Any]) -> list[str]:
    if not (folder / "decoder.onnx").is_file():
        return []
    state = ["h"] if config.get("cell") == "gru" else ["h", "c"]
    read, given = (
        ", ".join(f"`{name}`" for name in names)
        for names in (["input_ids", *state], ["logits", *(f"{name}_next" for name in state)])
    )
    return [
        "Without torch, fast on a CPU (`pip install 'potstill[onnx]'`):",
        f'```sh\npython -m distill.decode {place} --prompt "Once"\n```',
        f"`model.onnx` and `model_int8.onnx` read {read} (zeros at first) and give {given}; keep them beside their "
        "`.safetensors`. With onnxruntime and tokenizers alone, in a folder that the repository was downloaded to:",
        _WITHOUT_TORCH,
    ]


_WITHOUT_TORCH = """```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer, session = Tokenizer.from_file("tokenizer.json"), onnxruntime.InferenceSession("model.onnx")
_, *parts = session.get_inputs()
state = {part.name: np.zeros((part.shape[0], 1, part.shape[2]), np.float32) for part in parts}
new = written = tokenizer.encode("Once").ids
for _ in range(30):
    logits, *after = session.run(None, {"input_ids": np.array([new]), **state})
    state, new = dict(zip(state, after)), [int(logits[0, -1].argmax())]
    written = written + new
print(tokenizer.decode(written))
```"""


def _sentence(values: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("repo", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--branch", help="push to this branch, made if it is not there (default: the main one)")
    parser.add_argument("--license", metavar="ID", help="the teacher's licence, where it cannot be found")
    parser.add_argument("--report", type=Path, help="a folder of eval.report: its table and picture go into the card")
    parser.add_argument("--dry-run", action="store_true", help="write the folder that would be uploaded, and stop")
    options = parser.parse_args(arguments)
    return guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.repo.count("/") != 1 or not all(options.repo.split("/")):
        raise UserError(f"expected a repository as user/name, found {options.repo!r}")
    recipe, result = load_recipe(options.run), read_result(Path(options.run))
    # A run folder may have been moved since; what stands in it counts.
    place = Path(options.run).resolve()
    run = recipe.run.model_copy(update={"output_dir": place.parent, "name": place.name})
    recipe = recipe.model_copy(update={"run": run})
    folder = stage(recipe, result, options.repo, options.license, options.report)
    if options.dry_run:
        print(folder)
        return
    print(upload(folder, options.repo, options.private, options.branch, recipe.teacher.model))


if __name__ == "__main__":
    sys.exit(main())
