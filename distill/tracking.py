"""Curves, tables and pictures to wandb through accelerate's tracker.

Without an account the run is recorded offline under `RUN/wandb/` and the log says how to sync it. A
tracker that fails or hangs, at the start or later, is reported once and left alone: it never stops a run.

Metrics carry their unit in the name and their own x-axis: `train/student/*` and `train/control/*` over
`tokens`, validation curves of both over `train_seconds`, so student and control share one axis. What is
measured later (`eval/`) goes into the same run, found by the id in the run folder: numbers as `eval/*` of its summary,
lists as tables.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill.checkpoint import write_json
from distill.command import TRACKER_THREAD
from distill.config import Recipe
from distill.recipe import load_recipe

logger = logging.getLogger(__name__)
IDENTITY = "wandb_id.json"
INTERVAL = ("_interval", "_range")  # names of pairs of numbers end so
START_SECONDS, FINISH_SECONDS = 60.0, 300.0  # to reach the tracker, and to hand over what is left at the end
VALIDATION_FIGURES = ("nll_nats", "perplexity", "bits_per_byte", "accuracy", "kl_to_teacher_nats", "top1_agreement")


class Tracker:
    """A wandb run, or nothing. All methods are no-ops off the main process and after a failure."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe, folder: Path | None = None) -> None:
        """`folder`: the run folder, where it is not the recipe's."""
        self._accelerator, self._folder = accelerator, (folder or recipe.folder).resolve()
        self._run: Any = None
        self._alive = recipe.tracking.tracker == "wandb" and accelerator.is_main_process
        self._guarded(lambda: self._start(recipe))

    def _start(self, recipe: Recipe) -> None:
        import wandb

        folder, identity = self._folder, self._folder / IDENTITY
        run_id = _read_identity(identity)
        if run_id is None:
            run_id = secrets.token_hex(4)
            write_json(identity, {"id": run_id})
        mode = os.environ.get("WANDB_MODE") or None
        if mode is None and not wandb.login(prompt=False):
            mode = "offline"
        tracking = recipe.tracking
        self._accelerator.init_trackers(
            tracking.project,
            config=recipe.model_dump(mode="json", by_alias=True),
            init_kwargs={
                "wandb": {
                    "dir": str(folder),
                    "id": run_id,
                    "name": recipe.run.name,
                    "entity": tracking.entity,
                    "group": tracking.group or recipe.run.name,
                    "tags": list(tracking.tags) or None,
                    "resume": "allow",
                    "mode": mode,
                    "settings": wandb.Settings(
                        console="off", silent=True, init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS
                    ),
                }
            },
        )
        self._run = self._accelerator.get_tracker("wandb", unwrap=True)
        self._run.define_metric("train_seconds")
        self._run.define_metric("tokens")
        for model in ("student", "control"):
            self._run.define_metric(f"train/{model}/*", step_metric="tokens")
            for figure in VALIDATION_FIGURES:
                self._run.define_metric(f"validation/{figure}/{model}", step_metric="train_seconds")
        if mode == "offline":
            logger.info("wandb: no account, recording offline; later: wandb sync %s", Path(self._run.dir).parent)

    def log(self, values: dict[str, float]) -> None:
        """One row of scalars, with its own `tokens` or `train_seconds`."""
        self._guarded(lambda: self._accelerator.log(values))

    def log_samples(self, rows: Iterable[dict[str, str]]) -> None:
        """Sample continuations as a table."""
        self._table("samples", list(rows))

    def log_result(self, result: dict[str, Any], rows: list[dict[str, Any]], picture: Path, files: list[Path]) -> None:
        """The final table, the plot of curves, and both as an artifact together with `files`."""

        def send() -> None:
            import wandb

            self._run.summary.update(
                {
                    name: result[name]
                    for name in ("student", "control", "teacher", "distillation_gain_nats", "accuracy_gain", "speedup")
                    if name in result
                }
            )
            curves = result["curves"]
            lines = wandb.plot.line_series(
                xs=[[point["seconds"] for point in points] for points in curves.values()],
                ys=[[point["nll_nats"] for point in points] for points in curves.values()],
                keys=list(curves),
                title="validation loss (nats per token)",
                xname="training seconds",
            )
            self._run.log({"curves": wandb.Image(str(picture)), "validation/student_and_control": lines})
            artifact = wandb.Artifact(f"{self._run.id}-result", type="result")
            for file in [picture, *files]:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

        self._table("result", rows)
        self._guarded(send)

    def log_evaluation(
        self, protocol: str, figures: Mapping[str, Any], pictures: Iterable[Path], scatter: tuple[str, str, str] | None
    ) -> None:
        """Figures into the summary as `eval/PROTOCOL/...`, their lists as tables, pictures as they are; `scatter`: the
        list of named rows that is also plotted, and its columns of x and y.
        """

        def send() -> None:
            import wandb

            self._run.summary.update(dict(_scalars(f"eval/{protocol}", figures)))
            for picture in pictures:
                self._run.log({f"eval/{protocol}/{picture.stem}": wandb.Image(str(picture))})
            if scatter:
                name, x, y = scatter
                points = [[point[x], point[y], point["name"]] for point in figures[name]]
                table = wandb.Table(columns=[x, y, "name"], data=points)
                plot = wandb.plot.scatter(table, x, y, title=f"{y} over {x}")
                self._run.log({f"eval/{protocol}/{y}": plot})

        for name, listed in _tables(figures).items():
            self._table(f"eval/{protocol}/{name}", listed)
        self._guarded(send)

    def finish(self) -> None:
        """Close the run."""
        self._guarded(self._accelerator.end_training)
        self._alive = False

    def _table(self, name: str, rows: list[dict[str, Any]]) -> None:
        def send() -> None:
            import wandb

            columns: list[Any] = list(dict.fromkeys(column for row in rows for column in row))
            self._run.log({name: wandb.Table(columns=columns, data=[[row.get(c) for c in columns] for row in rows])})

        if rows:
            self._guarded(send)

    def _guarded(self, call: Callable[[], Any]) -> None:
        if not self._alive:
            return
        failures: list[BaseException] = []

        def attempt() -> None:
            try:
                call()
            except Exception as error:  # whatever a tracker does wrong, the run goes on
                failures.append(error)

        # In a thread, as a service that has stopped answering is waited for without end.
        thread = threading.Thread(target=attempt, name=TRACKER_THREAD, daemon=True)
        thread.start()
        thread.join(START_SECONDS + FINISH_SECONDS)
        if thread.is_alive():
            failures.append(TimeoutError("it does not answer"))
        if failures:
            self._alive = False
            logger.warning("tracking stops here, the run goes on: %s: %s", type(failures[0]).__name__, failures[0])


def log_evaluation(
    folder: Path,
    protocol: str,
    figures: Mapping[str, Any],
    pictures: Iterable[Path] = (),
    scatter: tuple[str, str, str] | None = None,
) -> None:
    """Log what was measured after a run into its own wandb run, online or offline; nothing where it has none."""
    if not (folder / IDENTITY).is_file():
        return
    tracker = Tracker(Accelerator(log_with="wandb"), load_recipe(folder), folder)
    tracker.log_evaluation(protocol, figures, pictures, scatter)
    tracker.finish()


def _read_identity(file: Path) -> str | None:
    """The id of a folder's wandb run; None where there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and found.isalnum() else None


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float | str | bool]]:
    """The leaves of nested mappings by path, and both ends of intervals; other lists are left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(f"{name}/{key}" if name else str(key), item)
    elif isinstance(value, int | float | str | bool):
        yield name, value
    elif name.endswith(INTERVAL) and value is not None:
        yield from zip((f"{name}/low", f"{name}/high"), value, strict=True)


def _tables(figures: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The lists of mappings among nested figures, as tables: lists of one name are one, with whose they are as `of`."""
    tables: dict[str, list[dict[str, Any]]] = {}

    def add(path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add((*path, str(key)), item)
        elif isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
            for number, row in enumerate(value):
                tables.setdefault(path[-1], []).append({"of": "/".join(path[:-1]), **dict(_scalars("", row))})
                add((*path, str(number + 1)), {key: item for key, item in row.items() if isinstance(item, list)})

    add((), figures)
    return tables
