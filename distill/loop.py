"""The loop that every training runs through: stages of steps, validation, logs, checkpoints, and a stop between steps.

What a step is, and on what, is said by who derives from it: `distill/train.py` for language models,
`distill/classify.py` for classifiers. A training that is stopped and started again goes on bit by bit as if it had
not been: see `distill/checkpoint.py` for what is kept, and `Progress` for where it stands.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from distill.arithmetic import check_gradients
from distill.checkpoint import Checkpoints, load_state, load_tensors, restore_optimizer, write_atomically
from distill.config import Length, Recipe, StageConfig, UserError
from distill.progress import Clock, Interrupted, Progress, Spent, StopFlag
from distill.schedule import learning_rate_factor
from distill.torch_decoder import load_network
from distill.tracking import VALIDATION_FIGURES, Tracker

logger = logging.getLogger(__name__)
# The terms' sums of this process, the gradient norm, seconds, the terms' weights
Step = tuple[dict[str, Tensor], Tensor, Spent, dict[str, float]]


class Loop:
    """One training of one model, stage after stage.

    Those who derive from it say how a stage begins (`begin`), how many tokens a step reads (`tokens_of_step`), what its
    sums are divided by (`divisor`), and what a checkpoint holds besides weights (`extras`, `take_extras`).
    """

    def __init__(
        self,
        name: str,
        *,
        recipe: Recipe,
        stages: tuple[StageConfig, ...],
        student: PreTrainedModel,
        validate: Callable[[Any], Any],
        accelerator: Accelerator,
        tracker: Tracker,
        validate_at_tokens: int | None = None,
    ) -> None:
        """`validate` takes the student and gives a score with `nll_nats` and `curve_figures`."""
        cast(torch.nn.Module, student).to(accelerator.device)
        if accelerator.mixed_precision == "bf16":
            check_gradients(cast(torch.nn.Module, student))
        self.name, self.recipe, self.stages, self.student = name, recipe, stages, student
        self.validate, self.accelerator, self.tracker = validate, accelerator, tracker
        self.validate_at_tokens = validate_at_tokens
        self.checkpoints = Checkpoints(recipe.folder / "checkpoints" / name, recipe.run.keep_checkpoints)
        self.log_file = recipe.folder / f"{name}.log.jsonl"
        self.progress = Progress()
        self.aids: dict[str, Tensor] = {}  # what a stage trains besides the student: the projections of layer_mse

    # ---------------------------------------------------------------- what others say

    def begin(self, stage: StageConfig, resumed: Path | None = None) -> tuple[Any, Callable[[], Step]]:
        """Set a stage up, from its checkpoint if there is one: its optimizer, and what takes a step of it."""
        raise NotImplementedError

    def tokens_of_step(self, step: int) -> int:
        """Tokens that a step reads, over all processes."""
        raise NotImplementedError

    def divisor(self, step: int, term: str) -> float:
        """What a term's sum over all processes is divided by, in a step."""
        raise NotImplementedError

    def extras(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides weights and moments. Collective."""
        return {}

    def take_extras(self, tensors: dict[str, Tensor]) -> None:
        """Go on from them."""

    def initialise(self) -> None:
        """What is done once, before the first step of all, its time counted."""

    def share(self, stage: StageConfig) -> float:
        """How much of the stage at hand is over."""
        return self.progress.now.share(stage.length, self.progress.stage_start)

    def restore(self, optimizer: Any, resumed: Path | None) -> None:
        """Put a checkpoint's moments into a stage's optimizer, and its weights into the aids."""
        if resumed is None:
            return
        state = load_state(resumed)
        if state["optimizer_groups"]:
            restore_optimizer(optimizer, resumed, state)
            put(load_tensors(resumed, "model.safetensors"), self.aids)

    def end_stage(self) -> None:
        """What is noted when a stage is over, before it is saved."""

    # ---------------------------------------------------------------- the whole training

    def run(self) -> Progress:
        """Train through all stages, from the newest checkpoint if there is one; the last one's best weights are kept.

        Raises Interrupted after a saved stop, UserError for what the user can mend.
        """
        resumed = self._resume()
        if resumed is None:
            self.initialise()
        with StopFlag() as stop, logging_redirect_tqdm():
            while not self.progress.done:
                self._run_stage(self.stages[self.progress.stage], resumed, stop)
                resumed = None
                # A signal may also have come during a stage's last validation.
                if signum := self._agree(0.0, stop.signum)[1]:
                    self._all_saved()
                    raise Interrupted(signum)
            self._all_saved()
        self._load_best()
        return self.progress

    def _run_stage(self, stage: StageConfig, resumed: Path | None, stop: StopFlag) -> None:
        progress, accelerator = self.progress, self.accelerator
        optimizer, take_step = self.begin(stage, resumed)
        last_saved = Clock(**asdict(progress.now))
        with self._bar(stage) as bar:
            while True:
                now = progress.now
                share = self.share(stage)
                if share >= 1 or self._out_of_patience():
                    break
                factor = learning_rate_factor(share, stage.schedule, stage.warmup, stage.final_learning_rate)
                for group in optimizer.param_groups:
                    group["lr"] = stage.learning_rate * factor
                began = time.perf_counter()
                logging_step = (now.steps + 1) % self.recipe.tracking.every == 0
                sums, grad_norm, spent, weights = take_step()
                if logging_step and accelerator.device.type == "cuda":
                    torch.cuda.synchronize()  # so that the clock sees the work, not its queue
                seconds, signum = self._agree(time.perf_counter() - began, stop.signum)
                progress.teacher_seconds += spent.teacher
                if spent.writing is not None:
                    progress.writing_seconds += spent.writing
                    progress.on_policy_seconds += seconds
                tokens = self.tokens_of_step(now.steps)
                now.steps, now.tokens, now.seconds = now.steps + 1, now.tokens + tokens, now.seconds + seconds
                if logging_step:
                    self._log(weights, sums, grad_norm, seconds, spent, stage.learning_rate * factor)
                self._advance(bar, stage, sums)
                if (
                    now.share(self.recipe.evaluation.every, progress.last_validation) >= 1
                    or now.tokens == self.validate_at_tokens
                ):
                    self._validate(stage)
                self.checkpoints.check()
                if signum:
                    self._save(optimizer)
                    self._all_saved()
                    raise Interrupted(signum)
                if now.share(self.recipe.run.checkpoint_every, last_saved) >= 1:
                    self._save(optimizer)
                    last_saved = Clock(**asdict(now))
        if progress.last_validation.steps != progress.now.steps or not progress.points:
            self._validate(stage)
        self.end_stage()
        progress.stage, progress.stale = progress.stage + 1, 0
        progress.stage_start = Clock(**asdict(progress.now))
        progress.done = progress.stage == len(self.stages)
        if not progress.done:
            progress.best_nll_nats = None  # what a later stage is for may cost validation loss
        self._save(None)

    @contextmanager
    def _spending(self) -> Iterator[None]:
        """Count the time of what is done before a stage's first step."""
        began = time.perf_counter()
        yield
        self._spend(self._agree(time.perf_counter() - began, 0)[0])

    def _spend(self, seconds: float) -> None:
        """Count time before a stage's first step; the stage itself begins after it."""
        self.progress.now.seconds += seconds
        self.progress.stage_start = Clock(**asdict(self.progress.now))
        self.progress.last_validation = Clock(**asdict(self.progress.now))

    def _agree(self, seconds: float, signum: int) -> tuple[float, int]:
        """One clock and one decision for all processes: the main one's seconds, the highest signal of any."""
        if self.accelerator.num_processes == 1:
            return seconds, signum
        shared = torch.zeros(self.accelerator.num_processes, 2, dtype=torch.float64, device=self.accelerator.device)
        shared[self.accelerator.process_index] = torch.tensor([seconds, float(signum)], dtype=torch.float64)
        shared = self.accelerator.reduce(shared, "sum")
        return shared[0, 0].item(), int(shared[:, 1].max().item())

    def update(
        self, model: torch.nn.Module, optimizer: Any, sums: dict[str, Tensor], read: Callable[[], str]
    ) -> Tensor:
        """Clip and step, once gradients are there; their norm. UserError, with what was `read`, for a broken one."""
        limit = self.recipe.run.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf") if limit is None else limit)
        grad_norm = torch.as_tensor(norm)
        # One scalar's synchronisation a step is the price of never stepping on a broken gradient.
        if not bool(torch.isfinite(grad_norm)) or not all(bool(torch.isfinite(value)) for value in sums.values()):
            self._refuse(model, sums, grad_norm, read())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _refuse(self, model: torch.nn.Module, sums: dict[str, Tensor], grad_norm: Tensor, read: str) -> None:
        """Report where a step went wrong, before it reaches the weights."""
        bad = [
            name.removeprefix("module.").removeprefix("student.")
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        terms = ", ".join(f"{term} {value.item():.4g}" for term, value in sums.items())
        shown = ", ".join(bad[:6]) + (f" and {len(bad) - 6} more" if len(bad) > 6 else "")
        raise UserError(
            f"{self.name}: step {self.progress.now.steps + 1} refused before the update: loss sums {terms}; gradient "
            f"norm {grad_norm.item():.4g}; not finite in: {shown or 'the loss alone'}; process "
            f"{self.accelerator.process_index}, {read}. The weights are untouched and the last checkpoint is "
            "whole; a lower learning_rate, run.max_grad_norm or run.precision=fp32 may help"
        )

    def _validate(self, stage: StageConfig) -> None:
        """Validate, keep the point, and keep the weights if they are the best of the stage so far."""
        progress, now = self.progress, self.progress.now
        self.student.eval()
        score = self.validate(self.student)
        if not math.isfinite(score.nll_nats):
            raise UserError(
                f"{self.name}: its validation loss after step {now.steps} is {score.nll_nats}; the last checkpoint is "
                "whole; a lower learning_rate, run.max_grad_norm or run.precision=fp32 may help"
            )
        point: dict[str, Any] = {
            "stage": progress.stage,
            "stage_name": stage.label,
            "step": now.steps,
            "tokens": now.tokens,
            "seconds": now.seconds,
            **score.curve_figures,
        }
        progress.points.append(point)
        progress.last_validation = Clock(**asdict(now))
        known = [key for key in VALIDATION_FIGURES if point.get(key) is not None]
        values = {f"validation/{key}/{self.name}": point[key] for key in known}
        self.tracker.log({**values, "train_seconds": now.seconds, "tokens": now.tokens})
        logger.info(
            "%s, step %d, %d tokens, %.0f s: validation loss %s",
            *(self.name, now.steps, now.tokens, now.seconds, score.in_words),
        )
        if progress.best_nll_nats is None or score.nll_nats < progress.best_nll_nats:
            progress.best_nll_nats, progress.best_step, progress.stale = score.nll_nats, now.steps, 0
            if self.accelerator.is_main_process:
                self.checkpoints.save_best(now.steps, self.student)
        else:
            progress.stale += 1

    def _out_of_patience(self) -> bool:
        patience = self.recipe.evaluation.patience
        return patience is not None and self.progress.stale >= patience

    def _log(
        self,
        weights: dict[str, float],
        sums: dict[str, Tensor],
        grad_norm: Tensor,
        seconds: float,
        spent: Spent,
        lr: float,
    ) -> None:
        """Losses of this step over all processes, to the tracker and to the run's own log file."""
        total = self.accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum")
        step = self.progress.now.steps - 1
        terms = {term: value / self.divisor(step, term) for term, value in zip(sums, total.tolist(), strict=True)}
        weights = {**weights, **self.recipe.student.penalties}
        values = {
            "loss": sum(weights[term] * value for term, value in terms.items()),
            **{f"loss_{term}": value for term, value in terms.items()},
            "learning_rate": lr,
            "grad_norm": grad_norm.item(),
            "tokens_per_second": self.tokens_of_step(step) / seconds,
            "teacher_seconds_per_step": spent.teacher,
            "student_seconds_per_step": seconds - spent.teacher,
        }
        if spent.writing is not None:
            values |= {"writing_seconds_per_step": spent.writing, "writing_share": spent.writing / seconds}
        now = self.progress.now
        self.tracker.log({**{f"train/{self.name}/{k}": v for k, v in values.items()}, "tokens": now.tokens})
        self.progress.logged += 1
        if self.accelerator.is_main_process:
            row = {
                "step": now.steps,
                "tokens": now.tokens,
                "seconds": now.seconds,
                "stage": self.progress.stage,
                **values,
            }
            try:
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise UserError(f"{self.log_file}: cannot be written: {error}; the last checkpoint is whole") from None

    def _bar(self, stage: StageConfig) -> tqdm:
        """A progress bar in the unit of the stage's length, with the time left."""
        done = self.progress.now.share(stage.length, self.progress.stage_start)
        goal, unit = next(
            (value * scale, unit)
            for value, scale, unit in (
                (stage.length.steps, 1, "step"),
                (stage.length.tokens, 1, "tok"),
                (stage.length.minutes, 60, "s"),
            )
            if value is not None
        )
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]"
        return tqdm(
            total=goal,
            initial=done * goal,
            unit=unit,
            unit_scale=False,
            desc=f"{self.name} {self.progress.stage + 1}/{len(self.stages)} {stage.label}",
            bar_format=layout,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def _advance(self, bar: tqdm, stage: StageConfig, sums: dict[str, Tensor]) -> None:
        if bar.disable:
            return
        now = self.progress.now
        share = min(now.share(stage.length, self.progress.stage_start), 1.0)
        if now.steps % self.recipe.tracking.every == 0:
            processes = self.accelerator.num_processes
            means = {term: v.item() * processes / self.divisor(now.steps - 1, term) for term, v in sums.items()}
            bar.set_postfix_str(
                ", ".join(f"{term} {mean:.3f}" for term, mean in means.items())
                + f", {now.tokens / max(now.seconds, 1e-9):,.0f} tok/s",
                refresh=False,
            )
        bar.update(share * bar.total - bar.n)

    def _save(self, optimizer: Any | None) -> None:
        """Begin to write a checkpoint; `optimizer` is None between two stages. Collective."""
        lanes = self.extras()
        if self.accelerator.is_main_process:
            weights = {name: p.detach() for name, p in [*self.student.named_parameters(), *self.aids.items()]}
            self.checkpoints.save(self.progress.now.steps, weights, optimizer, lanes, asdict(self.progress))

    def _all_saved(self) -> None:
        """Wait, all processes, until the main one has written what there is to write."""
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()

    def _resume(self) -> Path | None:
        """Load the newest checkpoint, if any, into student, states and progress; returns its folder."""
        folder = self.checkpoints.latest() if self.accelerator.is_main_process else None
        shared = broadcast_object_list([folder])
        folder = shared[0]
        if folder is None:
            self._cut_log(0)
            return None
        state = load_state(folder)
        state.pop("optimizer_groups", None)
        self.progress = Progress.from_dict({k: v for k, v in state.items() if k in Progress.__dataclass_fields__})
        put(load_tensors(folder, "model.safetensors"), dict(self.student.named_parameters()))
        self.take_extras(load_tensors(folder, "lanes.safetensors"))
        self._cut_log(self.progress.now.steps)
        logger.info("%s: going on from %s", self.name, folder)
        return folder

    def _cut_log(self, steps: int) -> None:
        """Forget log lines of steps after the checkpoint: they will be taken again."""
        if not self.accelerator.is_main_process or not (self.log_file.exists() or self.progress.logged):
            return
        lines = []
        if self.log_file.exists():
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if 0 < _step_of(line) <= steps]
        if len(kept) < self.progress.logged:
            logger.warning("%s is damaged: %d of %d lines are left", self.log_file, len(kept), self.progress.logged)
        write_atomically(self.log_file, lambda path: path.write_text("".join(f"{line}\n" for line in kept), "utf-8"))

    def _load_best(self) -> None:
        """Put the best weights into the student."""
        best = load_network(self.checkpoints.best(self.progress.best_step), type(self.student))
        self.student.load_state_dict(best.state_dict())
        self.student.eval()


def make_optimizer(stage: StageConfig, model: torch.nn.Module, embeddings: set[int]) -> torch.optim.Optimizer:
    """A stage's optimizer of what is to be trained; matrices decay, but for those whose `id` is in `embeddings`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decayed}
    others = [p for p in trained if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if stage.optimizer == "sgd":
        for group in groups:
            group["weight_decay"] = 0.0
        return torch.optim.SGD(groups, lr=stage.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)


def _step_of(line: str) -> int:
    """The step that a line of the log is about; 0 for one that is cut or damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


@torch.no_grad()
def put(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def control_stage(recipe: Recipe, student: Progress) -> StageConfig:
    """Cross-entropy alone, all parameters trained, for as long as the student took."""
    control = recipe.control
    if control.match == "tokens":
        length = Length(tokens=student.now.tokens)
    else:
        length = Length(minutes=student.now.seconds / 60)
    return StageConfig(
        name="control",
        objective={"cross_entropy": 1.0},
        length=length,
        candidates=control.candidates,
        learning_rate=control.learning_rate,
        schedule=control.schedule,
        warmup=control.warmup,
        optimizer=control.optimizer,
    )
