"""What a recipe will take, before it is run: from a minute's measurement on this device and the recipe.

    python -m distill.plan RECIPE [key=value ...]

The parts of a run are measured, each for a few seconds: the teacher (or the endpoint) answering for a small cache of
soft targets, steps of each stage and of the control, a checkpoint, a validation, decoding. `predict` adds them up as
the recipe says, part by part under the names that `wall_seconds` has in `result.json`.

What is assumed: A cache is built from nothing, unless it is read from elsewhere. No stage ends early
(`evaluation.patience`), and every validation is the best so far, so that its weights are saved. With n devices the work
on tokens goes n times as fast as on this one, times `--efficiency`; starting, loading, decoding, and stages that are
given in minutes take what they take here. An endpoint answers as fast as it does here, however many devices train.
Memory is the peak of this process with all lanes of a micro-batch; devices that share the lanes need less.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from distill.architecture import make_student
from distill.command import guarded
from distill.config import Length, Recipe, UserError
from distill.job import TeacherAndText, Validator, leave, select_documents, start_accelerator
from distill.loop import control_stage
from distill.output import machine, print_json, print_table
from distill.progress import Clock, Progress
from distill.recipe import load_recipe
from distill.samples import decode_speed
from distill.targets import open_targets
from distill.teacher import LanguageModel, wrap
from distill.tracking import Tracker
from distill.train import Rehearsal, Training
from distill.writing import is_written

DEVICES = (1, 8, 64)
SAMPLE_TOKENS = 8192  # of the cache and the validation that are measured
CONTINUATION = 32  # tokens that `decode_speed` writes at one time


@dataclass(frozen=True)
class Measured:
    """What predictions are made of: seconds on one device, unless the name says otherwise."""

    start: float  # of Python and its imports
    load: float  # of teacher and text
    reference: float  # the teacher's reading of the validation documents, all of them
    validation: float  # of a student, all of them
    best: float  # writing the student's weights
    groundwork: float  # before the first step
    stages: tuple[Rehearsal, ...]
    control: Rehearsal | None
    teacher_decode_rate: float  # tokens a second
    student_decode_rate: float
    targets_rate: float  # tokens a second that a cache is built at
    bytes_per_token: float  # of a cache
    target_tokens: int  # that the recipe has targets for
    train_tokens: int
    tokens_per_step: int
    teacher_bytes: int
    student_bytes: int  # with gradients and AdamW's moments
    peak_bytes: int
    writing: float = 0.0  # text that the teacher has written, all of it


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, predict; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distill.plan", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML recipe, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field by its dotted path")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the steps of all stages together (40)")
    parser.add_argument("--efficiency", type=float, default=0.9, help="of each device beside others (0.9)")
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of the whole text, where corpus.max_documents takes a part",
    )
    options = parser.parse_intermixed_args(arguments)
    started = time.time() - psutil.Process().create_time()
    return guarded(
        lambda: plan(options.recipe, options.overrides, options.seconds, options.efficiency, options.tokens, started)
    )


def plan(
    recipe_name: str, overrides: Sequence[str], seconds: float, efficiency: float, tokens: int | None, started: float
) -> None:
    """Print the table, and the same as a JSON object in the last line."""
    recipe = load_recipe(recipe_name, [*overrides, "tracking=none"])
    accelerator = start_accelerator(recipe)
    try:
        if accelerator.num_processes > 1:
            raise UserError(
                f"a plan is made by one process, found {accelerator.num_processes}; start it without a launcher"
            )
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(recipe, accelerator, Path(folder), seconds, started, tokens)
    finally:
        leave(accelerator)
    rows = {devices: forecast(recipe, measured, devices, efficiency) for devices in DEVICES}
    labels = [f"{number + 1} {stage.label}" for number, stage in enumerate(recipe.stages)]
    table = [
        {
            "devices": str(devices),
            "cache": _duration(row["cache_seconds"]),
            "GiB": f"{measured.bytes_per_token * measured.target_tokens / 2**30:.2f}",
            **{f"a pass of {label}": _duration(row["pass_seconds"][n]) for n, label in enumerate(labels)},
            "the run": _duration(row["seconds"]),
            "GiB a device": f"{measured.peak_bytes / 2**30:.1f}",
            "limited by": f"{row['limit']}, {row['shares'][row['limit']]:.0%}",
        }
        for devices, row in rows.items()
    ]
    sparse = " and targets.signal top_k" if recipe.other_teachers and recipe.targets.kind == "hidden" else ""
    note = (
        f"A pass: {measured.train_tokens:,} tokens of text. Cache: {measured.target_tokens:,} tokens"
        f"{'' if recipe.targets.cache else f', if targets.cache were true{sparse}'}. Of several devices each is "
        f"{efficiency:.0%} as fast as this one. Of the memory, {measured.teacher_bytes / 2**30:.2f} GiB are the "
        f"teacher's weights, {measured.student_bytes / 2**30:.2f} GiB student, gradients and optimizer."
    )
    if recipe.corpus.streaming and tokens is None:
        note += "\nThe text is a stream, and a pass is that of its sample (corpus.sample_documents): say --tokens N."
    if wrong := [devices for devices in DEVICES if recipe.run.batch_size % devices]:
        note += (
            f"\nrun.batch_size ({recipe.run.batch_size} lanes) must be a multiple of the devices: raise it for "
            f"{' or '.join(map(str, wrong))}."
        )
    print_table(f"{recipe.run.name} on {machine()['cpu']}", table, note)
    parts = ", ".join(f"{name} {_duration(value)}" for name, value in rows[1]["parts"].items())
    print(f"The run as it stands, on this device: {_duration(rows[1]['seconds'])} ({parts})")
    print_json(
        {
            "recipe": recipe.run.name,
            "predicted_seconds": rows[1]["seconds"],
            "cache_bytes": measured.bytes_per_token * measured.target_tokens,
            "teacher_tokens_per_second": measured.targets_rate,
            "stage_tokens_per_second": {
                label: measured.tokens_per_step / times.step
                for label, times in zip(labels, measured.stages, strict=True)
            },
            "efficiency": efficiency,
            "devices": rows,
            "measured": asdict(measured),
            "machine": machine(),
        }
    )


def measure(
    recipe: Recipe,
    accelerator: Accelerator,
    folder: Path,
    seconds: float,
    started: float = 0.0,
    tokens: int | None = None,
) -> Measured:
    """Time the parts of a run; what has to be written goes to `folder`. `seconds`: for all steps together."""
    clock = _Clock()
    if recipe.writing is not None and not is_written(recipe):
        raise UserError(
            "writing: a plan does not write the text; accelerate launch -m distill.write RECIPE does, and says how fast"
        )
    parts = TeacherAndText(recipe, accelerator)
    load = clock.lap()
    teacher, corpus, evaluation = parts.teacher, parts.corpus, recipe.evaluation
    all_targets = select_documents(corpus.validation, evaluation.max_tokens).targets
    fewer = min(SAMPLE_TOKENS, evaluation.max_tokens or SAMPLE_TOKENS)
    recipe = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"output_dir": folder}),
            "evaluation": evaluation.model_copy(update={"max_tokens": fewer}),
        }
    )
    clock.lap()
    validator = Validator(recipe, parts, accelerator)
    share = validator.documents.targets / all_targets
    reference = clock.lap() / share

    lanes, length = recipe.run.batch_size, recipe.corpus.block_length
    sample = parts.cached_blocks.first(max(lanes if recipe.targets.cache else 1, math.ceil(SAMPLE_TOKENS / length)))
    config = recipe.targets.model_copy(update={"cache": True, "cache_dir": str(folder / "cache"), "repo": None})
    if recipe.other_teachers and config.kind == "hidden":
        # What a cache could hold of several teachers.
        config = config.model_copy(update={"signal": "top_k", "k": min(config.k, teacher.vocab_size)})
    cached = open_targets(
        config,
        parts.teachers,
        corpus,
        sample,
        accelerator,
        batch_tokens=evaluation.batch_tokens,
        endpoint=recipe.endpoint,
    )
    targets = parts.targets(cached if recipe.targets.cache else None)
    blocks = sample if recipe.targets.cache else parts.cached_blocks

    shared: dict[str, Any] = {
        "recipe": recipe,
        "blocks": parts.blocks,
        "teacher": teacher,
        "validate": validator,
        "accelerator": accelerator,
        "tracker": Tracker(accelerator, recipe),
    }
    transplant = recipe.student.transplant
    network = make_student(recipe, teacher, corpus.separator_id)
    training = Training(
        "student", stages=recipe.stages, student=network, targets=targets, blocks_with_targets=blocks,
        transplant=transplant, **shared,
    )  # fmt: skip
    clock.lap()
    training.groundwork.initialise(recipe.student, transplant, training.occurrences_V)
    groundwork = clock.lap()
    each = seconds / (len(recipe.stages) + recipe.control.enabled)
    rehearsals = []
    for number in range(len(recipe.stages)):
        training.progress.stage = number
        rehearsals.append(training.rehearse(each))
    control = None
    if recipe.control.enabled:
        stage = control_stage(recipe, Progress(now=Clock(1, 1, 60.0)))
        other = make_student(recipe, teacher, corpus.separator_id, control=True)
        control = Training("control", stages=(stage,), student=other, **shared).rehearse(each)
    clock.lap()
    validator(network)
    validation = clock.lap() / share
    training.checkpoints.save_best(0, network)
    training.checkpoints.wait()
    best = clock.lap()
    student = wrap(network, teacher.tokenizer, "student")
    models = ((parts.whole_teacher, parts.whole_corpus), (student, corpus))
    rates = [decode_speed(model, text.separator_id, 0.0, CONTINUATION) for model, text in models]
    return Measured(
        start=started,
        load=load,
        reference=reference,
        validation=validation,
        best=best,
        groundwork=groundwork,
        stages=tuple(rehearsals),
        control=control,
        teacher_decode_rate=rates[0],
        student_decode_rate=rates[1],
        targets_rate=len(sample) * length / max(cached.seconds, 1e-9),
        bytes_per_token=cached.bytes_per_token,
        target_tokens=_limited(tokens or len(parts.blocks) * length, recipe.targets.max_tokens),
        train_tokens=tokens or len(parts.blocks) * length,
        tokens_per_step=training.tokens_per_step,
        teacher_bytes=parts.teachers.weight_bytes,
        student_bytes=_training_bytes(student),
        peak_bytes=_peak_bytes(),
        writing=parts.written.figures()["seconds"] if parts.written else 0.0,
    )


def forecast(recipe: Recipe, measured: Measured, devices: int = 1, efficiency: float = 1.0) -> dict[str, Any]:
    """Seconds of the whole run, of its parts, of a cache and of a pass over the text by each stage; and what limits.

    `shares`: of the run's time that goes to the teacher, to the student's steps, the control and validation.
    """
    speed = 1.0 if devices == 1 else devices * efficiency
    asking_speed = 1.0 if recipe.endpoint else speed
    cache = measured.target_tokens / measured.targets_rate / asking_speed
    ready = recipe.targets.repo or recipe.targets.is_remote  # it is read from elsewhere
    targets = cache if recipe.targets.cache and not ready else 0.0
    validating = measured.validation / speed + measured.best
    trained, steps, in_teacher = measured.groundwork / speed, 0, 0.0
    saving, validations = 0.0, 0
    for stage, times in zip(recipe.stages, measured.stages, strict=True):
        step = times.step / speed
        count = steps_in(stage.length, step, measured.tokens_per_step)
        trained += times.metric / speed + count * step
        steps += count
        in_teacher += count * times.teacher / speed
        validations += intervals(recipe.evaluation.every, count, step, measured.tokens_per_step)
        saving += checkpoints(recipe, count, step, measured.tokens_per_step) * times.checkpoint
    parts = {
        "start": measured.start,
        "teacher_and_text": measured.load,
        "teacher_validation": measured.reference / speed,
        "targets": targets,
        "student": trained + saving + validations * validating,
    }
    control = control_validation = 0.0
    if measured.control is not None:
        step = measured.control.step / speed
        seconds = targets + trained + measured.writing / speed
        length = Length(steps=steps) if recipe.control.match == "tokens" else Length(minutes=seconds / 60)
        count = steps_in(length, step, measured.tokens_per_step)
        # One more validation where the student's tokens are reached, unless that is the end.
        validated = intervals(recipe.evaluation.every, count, step, measured.tokens_per_step) + (count > steps)
        control_validation = validated * validating
        saved = checkpoints(recipe, count, step, measured.tokens_per_step)
        control = count * step
        parts["control"] = control + saved * measured.control.checkpoint + control_validation
    students = 1 + (measured.control is not None)
    whole_teacher = measured.reference / speed if recipe.student.vocabulary_min_count is not None else 0.0
    decoding = _decoding(recipe, measured.teacher_decode_rate)
    decoding += students * _decoding(recipe, measured.student_decode_rate)
    samples = 2 * len(recipe.evaluation.prompts) * recipe.evaluation.new_tokens / measured.student_decode_rate
    parts["evaluation"] = students * (measured.validation / speed + measured.best) + whole_teacher + decoding + samples
    total = sum(parts.values())
    spent = {
        "teacher": targets + in_teacher + parts["teacher_validation"] + whole_teacher,
        "student": trained - in_teacher,
        "control": control,
        "validation": validations * validating + control_validation,
    }
    return {
        "seconds": total,
        "parts": parts,
        "steps": steps,
        "cache_seconds": cache,
        "pass_seconds": [
            measured.train_tokens / measured.tokens_per_step * times.step / speed for times in measured.stages
        ],
        "shares": {name: value / total for name, value in spent.items()},
        "limit": max(spent, key=lambda name: spent[name]),
    }


def steps_in(length: Length, step_seconds: float, tokens_per_step: int) -> int:
    """Optimizer steps until a length is over."""
    if length.steps is not None:
        return length.steps
    if length.tokens is not None:
        return math.ceil(length.tokens / tokens_per_step)
    assert length.minutes is not None
    return max(1, math.ceil(60 * length.minutes / step_seconds - 1e-6))


def intervals(every: Length, steps: int, step_seconds: float, tokens_per_step: int) -> int:
    """Validations of a stage: after each interval, and at the end."""
    return math.ceil(steps / steps_in(every, step_seconds, tokens_per_step))


def checkpoints(recipe: Recipe, steps: int, step_seconds: float, tokens_per_step: int) -> int:
    """Checkpoints of a stage: after each interval, and one at the end."""
    return steps // steps_in(recipe.run.checkpoint_every, step_seconds, tokens_per_step) + 1


def _decoding(recipe: Recipe, rate: float) -> float:
    """Seconds in which the decoding speed of a model is measured."""
    once = CONTINUATION / rate
    return max(2, math.ceil(recipe.evaluation.decode_seconds / once)) * once


def _limited(tokens: int, limit: int | None) -> int:
    return tokens if limit is None else min(tokens, limit)


def _training_bytes(student: LanguageModel) -> int:
    """Weights in fp32, their gradients and two moments each."""
    return 4 * 4 * student.parameters


def _peak_bytes() -> int:
    """Most memory that this process has had: of its accelerator where it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(seconds: float) -> str:
    """In the unit that a person would take."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


class _Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed


if __name__ == "__main__":
    sys.exit(main())
