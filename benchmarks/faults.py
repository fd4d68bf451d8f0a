"""The fault campaign: what happens to a run that is killed, runs out of disk, or finds its files damaged.

    make faults                                        # 140 trials, and docs/faults.md
    python -m benchmarks.faults --kind "full disk"     # trials of one kind
    python -m benchmarks.faults --number 17            # one trial again; its folder stays

Each trial starts one of five commands on a tiny teacher and text, disturbs it, and starts it again. It must then end
with what an undisturbed run leaves behind, bit by bit, or stop with one clear error. A process that has imported
everything forks the trials, so that a run takes a second or two. What is done is kept in runs/bench/faults, by a
digest of the sources: stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_kinds import KINDS, can_mount, count_file_calls, count_teacher_calls
from benchmarks.fault_trials import COMMANDS, ROOT, Outcome, Reference, Trial, differences, files_below
from benchmarks.report import FOLDER, finish, print_table
from benchmarks.tiny import World, make_world
from distill.checkpoint import write_atomically, write_json
from distill.command import guarded
from distill.config import UserError

DOCS = ROOT / "docs" / "faults.md"
INTRODUCTION = """\
Written by `make faults`. Each trial starts one of five commands ({commands}) on a tiny teacher and text, disturbs it,
and starts the same command again.

- *Recovered*: it then ends with what an undisturbed run leaves behind, every file bit by bit and every figure but
  times. Pictures, data set cards, checkpoints and the tracker's own files are not compared.
- *Clear error*: it stops with exit code 2 and one message that says what to do, or says in a warning which file is not
  what it was.
- *Silently wrong*: it ends with something else and does not say so.
- *Unclear*: a traceback, a hang, or an exit without a message, in any of its attempts."""
OUTCOMES = ("recovered", "clear error", "silently wrong", "unclear")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=140)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="trials at one time (2)")
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="only such trials; may be repeated")
    parser.add_argument("--number", type=int, action="append", help="only this trial, anew; may be repeated")
    parser.add_argument("--docs", type=Path, default=DOCS, help=f"where the table goes ({DOCS.relative_to(ROOT)})")
    options = parser.parse_args(arguments)
    return guarded(lambda: campaign(options))


def campaign(options: argparse.Namespace) -> None:
    """Do what is missing of the trials, then report all; UserError where one is silently wrong or unclear."""
    skipped = {"full disk": reason} if (reason := can_mount()) else {}
    kinds = [kind for kind in options.kind or KINDS if kind not in skipped]
    kept = FOLDER.resolve() / "faults" / f"{sources_digest()}-{options.seed}"
    kept.mkdir(parents=True, exist_ok=True)
    plan = {number: assigned(number, kinds) for number in range(options.trials)}
    if options.number:
        plan = {number: assigned(number, kinds) for number in options.number}
    work = Path(tempfile.mkdtemp(prefix="potstill-faults-"))
    began = time.monotonic()
    try:
        files = {number: kept / f"{number:04d}-{command}-{kind}.json" for number, (command, kind) in plan.items()}
        missing = [number for number, file in files.items() if options.number or not file.is_file()]
        if missing:
            world, references = prepare(work, {plan[number][0] for number in missing})
            running: dict[int, int] = {}
            for number in [*missing, *[-1] * options.workers]:
                while len(running) >= (options.workers if number >= 0 else 1):
                    done = running.pop(os.wait()[0])
                    _say(files[done])
                if number >= 0:
                    running[_start(world, references, work, options, *plan[number], number, files[number])] = number
        outcomes = [Outcome(**json.loads(file.read_text(encoding="utf-8"))) for file in files.values()]
    finally:
        if not options.number:
            shutil.rmtree(work, ignore_errors=True)
        else:
            print(f"folders of the trials: {work}", file=sys.stderr)
    report(outcomes, skipped, options, time.monotonic() - began)


def assigned(number: int, kinds: Sequence[str]) -> tuple[str, str]:
    """Command and kind of a trial."""
    turn, place = divmod(number, len(kinds))
    commands = KINDS[kinds[place]][1]
    return commands[(turn + place) % len(commands)], kinds[place]


def sources_digest() -> str:
    """Of all that decides what a trial does."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "distill").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def prepare(work: Path, commands: set[str]) -> tuple[World, dict[str, Reference]]:
    """Import everything, make the tiny world, and let each command run undisturbed, twice."""
    torch.set_num_threads(1)  # no threads in the process that is forked
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN"):
        os.environ.pop(name, None)
    ours = ("job", "cache", "cli", "hub", "tracking", "export", "torch_decoder")
    theirs = ("wandb", "matplotlib.figure", "matplotlib.backends.backend_agg", "transformers.models.llama")
    for module in (*(f"distill.{name}" for name in ours), *theirs):
        importlib.import_module(module)
    with contextlib.suppress(ImportError):
        importlib.import_module("onnxruntime")
    import distill.targets

    distill.targets.SHARD_TOKENS = 1280  # several shards of a tiny text
    (work / "world").mkdir()
    world = make_world(work / "world")
    (world.teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    gc.freeze()
    return world, {command: _reference(world, command, work) for command in sorted(commands)}


def _reference(world: World, command: str, work: Path) -> Reference:
    first, second = (Trial(world, command, "none", -1, 0, work / f"{command}-{turn}") for turn in (1, 2))
    calls = work / f"{command}.calls.json"

    def count() -> Any:
        counts = count_file_calls(), count_teacher_calls()
        return lambda: calls.write_text(json.dumps({**counts[0], **counts[1]}), encoding="utf-8")

    try:
        contents = []
        for trial, prepare in ((first, count), (second, lambda: None)):
            began = time.monotonic()
            attempt = trial.run(prepare)
            if attempt.code != 0:
                raise UserError(f"{command}: an undisturbed run ends with {attempt.code}:\n{attempt.text[-2000:]}")
            seconds = time.monotonic() - began
            contents.append(trial.contents())
        if found := differences(*contents):
            raise UserError(f"{command}: two undisturbed runs differ: {'; '.join(found)}")
    finally:
        first.close()
        second.close()
    size = sum(path.stat().st_size + 4096 for path in files_below(first.disk))
    return Reference(contents[0], seconds, size, json.loads(calls.read_text(encoding="utf-8")))


def _start(
    world: World, references: dict[str, Reference], work: Path, options: Any, command: str, kind: str, number: int,
    file: Path,
) -> int:  # fmt: skip
    """Fork one trial; returns its process."""
    child = os.fork()
    if child:
        return child
    try:
        trial = Trial(world, command, kind, number, options.seed, work / f"{number:04d}")
        trial.reference = references[command]
        try:
            KINDS[kind][0](trial)
            outcome = trial.settle()
        finally:
            trial.close()
        write_json(file, asdict(outcome))
        if not options.number:
            shutil.rmtree(trial.folder, ignore_errors=True)
        code = 0
    except BaseException as error:
        write_json(file, asdict(Outcome(number, command, kind, outcome="unclear", message=f"the trial: {error!r}")))
        code = 1
    os._exit(code)


def _say(file: Path) -> None:
    row = json.loads(file.read_text(encoding="utf-8"))
    print("{number:4d} {outcome:15s} {kind}, {command}: {detail} {attempts} {message}".format(**row), flush=True)


def report(outcomes: Sequence[Outcome], skipped: dict[str, str], options: argparse.Namespace, seconds: float) -> None:
    """The table, docs/faults.md, and the JSON line."""
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    rows = [{"kind": kind, **_counts([o for o in outcomes if o.kind == kind])} for kind in kinds]
    rows.append({"kind": "all", **_counts(outcomes)})
    note = "".join(f"skipped: {kind}, {reason}\n" for kind, reason in skipped.items())
    print_table("Faults", rows, note)
    figures = {name.replace(" ", "_"): sum(o.outcome == name for o in outcomes) for name in OUTCOMES}
    figures["clear_errors"] = figures.pop("clear_error")
    whole = not (options.kind or options.number)
    if whole:
        text = page(rows, outcomes, note)
        write_atomically(options.docs, lambda path: path.write_text(text, encoding="utf-8"), "--docs")
    finish("faults", {"trials": len(outcomes), **figures, "skipped": skipped, "seed": options.seed, "seconds": seconds})
    bad = [o for o in outcomes if o.outcome not in OUTCOMES[:2]]
    if bad:
        raise UserError(f"{len(bad)} trials are silently wrong or unclear: {', '.join(str(o.number) for o in bad)}")


def _counts(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {"trials": str(len(outcomes)), **{name: str(sum(o.outcome == name for o in outcomes)) for name in OUTCOMES}}


def page(rows: Sequence[dict[str, str]], outcomes: Sequence[Outcome], note: str) -> str:
    """docs/faults.md."""

    def table(rows: Sequence[dict[str, str]]) -> str:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    each = [
        {
            "": str(o.number), "kind": o.kind, "command": o.command, "detail": o.detail,
            "attempts": ", ".join(o.attempts), "outcome": o.outcome, "message": o.message,
        }
        for o in outcomes
    ]  # fmt: skip
    parts = [
        "# Faults",
        INTRODUCTION.format(commands=", ".join(COMMANDS)),
        table(rows),
        *([note.strip()] if note else []),
        "## All trials",
        table(each),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
