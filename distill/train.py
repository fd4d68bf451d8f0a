"""The training loop: stages of batch, teacher's signal, student, loss, backward, clip, step.

Training lanes are contiguous: lane l's blocks follow one another, and the LSTM's state is carried from
block to block, detached (stateful truncated backpropagation through time). The batch of a step is all
lanes over all processes and micro-batches; loss sums are divided once by its tokens, so how a batch is
cut into processes and micro-batches changes nothing but rounding.

A run that is stopped and started again goes on bit by bit as if it had not been: see
`distill/checkpoint.py` for what is kept, and `Progress` for where it stands.

Legend: B lanes of a micro-batch, T block length, G lanes of the whole batch, L layers, H hidden size.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from distill.candidates import Candidates, CandidateSampler
from distill.checkpoint import Checkpoints, load_state, load_tensors, restore_optimizer, write_atomically
from distill.config import Recipe, StageConfig, UserError
from distill.corpus import BlockBatch, Blocks, lane_order
from distill.fused import State, StudentWithLoss
from distill.groundwork import Groundwork, States
from distill.metrics import Score
from distill.objective import Objective
from distill.progress import Clock, Interrupted, Progress, StopFlag
from distill.schedule import learning_rate_factor
from distill.signals import Encoding, HiddenSignal
from distill.stream import BlockStream
from distill.student import LSTMForCausalLM
from distill.targets import Targets
from distill.teacher import LanguageModel, head_of
from distill.torch_decoder import load_student
from distill.tracking import VALIDATION_FIGURES, Tracker

logger = logging.getLogger(__name__)
Step = tuple[dict[str, Tensor], Tensor, float]  # the terms' sums of this process, the gradient norm, teacher's seconds


@dataclass(frozen=True)
class Rehearsal:
    """Seconds that parts of a stage take: a step, the teacher in it, the metric before the first one, a checkpoint."""

    step: float
    teacher: float
    metric: float
    checkpoint: float


class Training:
    """One training of one student: the distilled one, or its control."""

    def __init__(
        self,
        name: str,
        *,
        recipe: Recipe,
        stages: tuple[StageConfig, ...],
        student: PreTrainedModel,
        blocks: Blocks | BlockStream,
        teacher: LanguageModel,
        validate: Callable[[PreTrainedModel], Score],
        accelerator: Accelerator,
        tracker: Tracker,
        targets: Targets | None = None,
        blocks_with_targets: Blocks | BlockStream | None = None,
        validate_at_tokens: int | None = None,
        transplant: bool = False,
    ) -> None:
        self.name, self.recipe, self.stages = name, recipe, stages
        cast(torch.nn.Module, student).to(accelerator.device)
        self.student, self.logit_scale = student, head_of(student).scale
        self.all_blocks = blocks
        self.blocks_with_targets = blocks if blocks_with_targets is None else blocks_with_targets
        self.blocks = self.blocks_with_targets  # of the stage at hand
        self.first_blocks = self.blocks.head if isinstance(self.blocks, BlockStream) else self.blocks
        self.teacher, self.targets = teacher, targets
        self.validate, self.accelerator, self.tracker = validate, accelerator, tracker
        self.validate_at_tokens = validate_at_tokens
        self.transplant = transplant
        self.groundwork = Groundwork(teacher, student, accelerator, self._first_states)
        self.checkpoints = Checkpoints(recipe.folder / "checkpoints" / name, recipe.run.keep_checkpoints)
        self.log_file = recipe.folder / f"{name}.log.jsonl"
        self.lanes = recipe.run.batch_size
        lane_order(len(self.first_blocks), self.lanes, epoch=0, seed=recipe.run.seed)  # UserError if it is too short
        self.micro = micro_batch_size(recipe, accelerator.num_processes)
        self.tokens_per_step = self.lanes * recipe.corpus.block_length
        self.progress = Progress()
        self.states: dict[int, State] = {}  # carried (h, c) of an LSTM by micro-batch
        self.sampler: CandidateSampler | None = None
        self.aids: dict[str, Tensor] = {}  # what a stage trains besides the student: the projections of layer_mse

    # ---------------------------------------------------------------- the whole training

    def run(self) -> Progress:
        """Train through all stages, from the newest checkpoint if there is one; the best weights end up in the student.

        Raises Interrupted after a saved stop, UserError for what the user can mend.
        """
        resumed = self._resume()
        if resumed is None and self.targets is not None:
            self._spend(self.targets.seconds)
            self.progress.teacher_seconds = self.targets.seconds
        if resumed is None:
            with self._spending():
                self.groundwork.initialise(self.recipe.student, self.transplant, self.occurrences_V)
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
                share = now.share(stage.length, progress.stage_start)
                if share >= 1 or self._out_of_patience():
                    break
                factor = learning_rate_factor(share, stage.schedule, stage.warmup, stage.final_learning_rate)
                for group in optimizer.param_groups:
                    group["lr"] = stage.learning_rate * factor
                began = time.perf_counter()
                logging_step = (now.steps + 1) % self.recipe.tracking.every == 0
                sums, grad_norm, teacher_seconds = take_step()
                if logging_step and accelerator.device.type == "cuda":
                    torch.cuda.synchronize()  # so that the clock sees the work, not its queue
                seconds, signum = self._agree(time.perf_counter() - began, stop.signum)
                progress.teacher_seconds += teacher_seconds
                now.steps, now.tokens, now.seconds = (
                    now.steps + 1,
                    now.tokens + self.tokens_per_step,
                    now.seconds + seconds,
                )
                if logging_step:
                    self._log(stage, sums, grad_norm, seconds, teacher_seconds, stage.learning_rate * factor)
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
        if not isinstance(self.blocks, BlockStream):
            progress.stored_steps += progress.now.steps - progress.stage_start.steps
        progress.stage, progress.stale = progress.stage + 1, 0
        progress.stage_start = Clock(**asdict(progress.now))
        progress.done = progress.stage == len(self.stages)
        self._save(None)

    def begin(self, stage: StageConfig, resumed: Path | None = None) -> tuple[Any, Callable[[], Step]]:
        """Set a stage up, from its checkpoint if there is one: its optimizer, and what takes a step of it."""
        self.blocks = self._blocks_of(stage)
        model, optimizer = self._prepare(stage)
        if resumed is not None:
            state = load_state(resumed)
            if state["optimizer_groups"]:
                restore_optimizer(optimizer, resumed, state)
                _put(load_tensors(resumed, "model.safetensors"), self.aids)
        with self._spending() if resumed is None else nullcontext():
            metric = self.groundwork.metric(stage)
        objective = Objective(stage.weights, stage.temperature, stage.jsd_beta, metric)
        self.sampler = self._sampler(stage)
        return optimizer, partial(self._step, model, optimizer, stage, objective)

    def rehearse(self, seconds: float) -> Rehearsal:
        """For a plan: what the stage at hand takes, from steps for so many seconds (two at least) after a warm-up.

        The steps move the place in the text, but no weight.
        """
        spent = self.progress.now.seconds
        optimizer, take_step = self.begin(self.stages[self.progress.stage])
        metric_seconds = self.progress.now.seconds - spent
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        take_step()
        steps, teacher_seconds, began = 0, 0.0, time.perf_counter()
        while steps < 2 or time.perf_counter() - began < seconds:
            self.progress.now.steps += 1
            teacher_seconds += take_step()[2]
            steps += 1
        total, began = time.perf_counter() - began, time.perf_counter()
        self._save(optimizer)
        self._all_saved()
        saving = time.perf_counter() - began
        return Rehearsal(total / steps, teacher_seconds / steps, metric_seconds, saving)

    def _first_states(self) -> Iterator[States]:
        """The teacher's hidden states on this process's first micro-batches of the first epoch or a stream's head."""
        wanted, blocks = self.recipe.student.fit_tokens or 4096, self.first_blocks
        steps = min(len(blocks) // self.lanes, math.ceil(wanted / self.tokens_per_step))
        of_targets = self.targets is not None and self.targets.encoding.kind == "hidden"
        for step in tqdm(range(steps), "first hidden states", disable=not self.accelerator.is_main_process):
            for number, (block_ids, starts_B) in enumerate(self._micro_batches(step, blocks)):
                batch, reset_BT = self._batch(block_ids, starts_B, blocks)
                if of_targets and self.targets is not None:
                    signal = self.targets.signal(batch)
                else:
                    signal = self.teacher.signal(batch, Encoding("hidden"))
                assert isinstance(signal, HiddenSignal)
                yield number, batch, reset_BT, signal.hidden_Nd.to(self.accelerator.device).clone()

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

    # ---------------------------------------------------------------- one step

    def _step(self, model: torch.nn.Module, optimizer: Any, stage: StageConfig, objective: Objective) -> Step:
        """One optimizer step over all lanes."""
        accelerator, steps = self.accelerator, self.progress.now.steps
        # Dropout's random numbers follow from seed, step and process: nothing to save, nothing to restore.
        torch.manual_seed(((self.recipe.run.seed * 1_000_003 + steps) * 4_096 + accelerator.process_index) % 2**63)
        model.train()
        sums: dict[str, Tensor] = {}
        teacher_seconds = 0.0
        micro_batches = list(self._micro_batches(steps, self.blocks))
        candidates = self._candidates(steps)
        for number, (block_ids, starts_B) in enumerate(micro_batches):
            batch, reset_BT = self._batch(block_ids, starts_B, self.blocks)
            signal = None
            if stage.needs_teacher:
                assert self.targets is not None
                began = time.perf_counter()
                signal = self.targets.signal(batch)
                teacher_seconds += time.perf_counter() - began
            last = number == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                recurrent = isinstance(self.student, LSTMForCausalLM)
                inputs, starts = (batch.inputs_BT, reset_BT) if recurrent else (batch.window_BW, batch.positions_BW)
                loss, parts, state = model(
                    inputs.to(accelerator.device),
                    batch.labels_BT.to(accelerator.device),
                    starts.to(accelerator.device),
                    self.states.get(number),
                    signal,
                    objective,
                    candidates,
                )
                if state is not None:
                    self.states[number] = state
                # DDP averages over processes: undo that, then divide once by the tokens of the whole step.
                accelerator.backward(loss * (accelerator.num_processes / self.tokens_per_step))
            for term, value in parts.items():
                sums[term] = sums.get(term, torch.zeros((), device=value.device)) + value
        grad_norm = self._clip(model)
        # One scalar's synchronisation a step is the price of never stepping on a broken gradient.
        if not bool(torch.isfinite(grad_norm)) or not all(bool(torch.isfinite(value)) for value in sums.values()):
            self._refuse(model, sums, grad_norm, micro_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums, grad_norm, teacher_seconds

    def _batch(self, block_ids: Any, starts_B: Tensor, blocks: Blocks | BlockStream) -> tuple[BlockBatch, Tensor]:
        """Blocks and their resets; a lane that does not go on from its block before starts from zero as well."""
        batch = blocks.batch(block_ids)
        reset_BT = batch.reset_BT.clone()
        reset_BT[:, 0] |= starts_B
        return batch, reset_BT

    def _micro_batches(self, step: int, blocks: Blocks | BlockStream) -> Iterator[tuple[Any, Tensor]]:
        """This process's block ids of a step, and which of them do not follow the lane's block before."""
        ids_G, before_G = self._row(step, blocks)
        if before_G is None or (step == self.progress.stage_start.steps and self._text_changes()):
            starts_G = np.ones(self.lanes, dtype=bool)
        else:
            starts_G = ids_G != before_G + 1
        first = self.accelerator.process_index * (self.lanes // self.accelerator.num_processes)
        for start in range(first, first + self.lanes // self.accelerator.num_processes, self.micro):
            chosen = slice(start, start + self.micro)
            yield ids_G[chosen], torch.from_numpy(starts_G[chosen])

    def _row(self, step: int, blocks: Blocks | BlockStream) -> tuple[np.ndarray, np.ndarray | None]:
        """Block numbers of all lanes in a step, and those of the step before, None where all lanes begin anew."""
        if isinstance(blocks, BlockStream):
            return blocks.row(step - self.progress.stored_steps)
        epoch, row = divmod(step, len(blocks) // self.lanes)
        order_SG = lane_order(len(blocks), self.lanes, epoch=epoch, seed=self.recipe.run.seed)
        return order_SG[row], order_SG[row - 1] if row else None

    def _blocks_of(self, stage: StageConfig) -> Blocks | BlockStream:
        return self.blocks_with_targets if stage.needs_teacher else self.all_blocks

    def _text_changes(self) -> bool:
        """Whether the stage at hand reads other blocks than the one before: no lane then goes on where it was."""
        number = self.progress.stage
        return number > 0 and self._blocks_of(self.stages[number - 1]) is not self.blocks

    @cached_property
    def occurrences_V(self) -> Tensor:
        """How often each token stands in the training text."""
        return torch.from_numpy(self.all_blocks.split.occurrences(self.teacher.vocab_size)).to(self.accelerator.device)

    def _sampler(self, stage: StageConfig) -> CandidateSampler | None:
        if stage.candidates is None:
            return None
        return CandidateSampler(self.occurrences_V, stage.candidates)

    def _candidates(self, step: int) -> Candidates | None:
        """Those of a step, the same for all processes and micro-batches."""
        if self.sampler is None:
            return None
        labels_N = self.blocks.labels(self._row(step, self.blocks)[0]).flatten().to(self.accelerator.device)
        return self.sampler.draw(labels_N, self.recipe.run.seed * 1_000_003 + step)

    def _clip(self, model: torch.nn.Module) -> Tensor:
        limit = self.recipe.run.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf") if limit is None else limit)
        return torch.as_tensor(norm)

    def _refuse(self, model: torch.nn.Module, sums: dict[str, Tensor], grad_norm: Tensor, micro_batches: list) -> None:
        """Report where a step went wrong, before it reaches the weights."""
        bad = [
            name.removeprefix("module.").removeprefix("student.")
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        terms = ", ".join(f"{term} {value.item():.4g}" for term, value in sums.items())
        blocks = [int(block) for ids, _ in micro_batches for block in ids]
        shown = ", ".join(bad[:6]) + (f" and {len(bad) - 6} more" if len(bad) > 6 else "")
        raise UserError(
            f"{self.name}: step {self.progress.now.steps + 1} refused before the update: loss sums {terms}; gradient "
            f"norm {grad_norm.item():.4g}; not finite in: {shown or 'the loss alone'}; process "
            f"{self.accelerator.process_index}, blocks {blocks}. The weights are untouched and the last checkpoint is "
            "whole; a lower learning_rate, run.max_grad_norm or run.precision=fp32 may help"
        )

    def _agree(self, seconds: float, signum: int) -> tuple[float, int]:
        """One clock and one decision for all processes: the main one's seconds, the highest signal of any."""
        if self.accelerator.num_processes == 1:
            return seconds, signum
        shared = torch.zeros(self.accelerator.num_processes, 2, dtype=torch.float64, device=self.accelerator.device)
        shared[self.accelerator.process_index] = torch.tensor([seconds, float(signum)], dtype=torch.float64)
        shared = self.accelerator.reduce(shared, "sum")
        return shared[0, 0].item(), int(shared[:, 1].max().item())

    # ---------------------------------------------------------------- set-up of a stage

    def _prepare(self, stage: StageConfig) -> tuple[torch.nn.Module, Any]:
        """The wrapped student and its optimizer, with what the stage freezes frozen."""
        self.accelerator.free_memory()
        torch.manual_seed(self.recipe.run.seed + self.progress.stage)
        student = self.student
        embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
        tied = embedding.weight is head.weight
        if tied and len(stage.freeze & {"embedding", "head"}) == 1:
            raise UserError(
                f"stage {stage.label}: embedding and head are tied (as in the teacher); freeze both or neither"
            )
        parts = {id(p): "embedding" for p in embedding.parameters()}
        parts.update({id(p): "head" for p in head.parameters() if not (tied and p is head.weight)})
        # A head that no term reads would get no gradient, which DDP takes for an error: it rests as well.
        resting = stage.freeze | (set() if Objective(stage.weights).logit_terms else {"head"})
        for parameter in student.parameters():
            parameter.requires_grad_(parts.get(id(parameter), "body") not in resting)
            parameter.grad = None
        layer_width = self.teacher.width if "layer_mse" in stage.objective else None
        with_loss = StudentWithLoss(student, layer_width, self.logit_scale)
        self.aids = {name: p for name, p in with_loss.named_parameters() if not name.startswith("student.")}
        decayed = [
            p for p in with_loss.parameters() if p.requires_grad and p.ndim >= 2 and parts.get(id(p)) != "embedding"
        ]
        chosen = {id(p) for p in decayed}
        others = [p for p in with_loss.parameters() if p.requires_grad and id(p) not in chosen]
        groups = [
            {"params": decayed, "weight_decay": stage.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer: torch.optim.Optimizer
        if stage.optimizer == "sgd":
            for group in groups:
                group["weight_decay"] = 0.0
            optimizer = torch.optim.SGD(groups, lr=stage.learning_rate)
        else:
            optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas)
        model, optimizer = self.accelerator.prepare(with_loss, optimizer)
        return model, optimizer

    # ---------------------------------------------------------------- validation and logs

    def _validate(self, stage: StageConfig) -> None:
        """Validate, keep the point, and keep the weights if they are the best so far."""
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
            "nll_nats": score.nll_nats,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "kl_to_teacher_nats": score.kl_to_teacher_nats,
            "top1_agreement": score.top1_agreement,
        }
        progress.points.append(point)
        progress.last_validation = Clock(**asdict(now))
        values = {f"validation/{key}/{self.name}": point[key] for key in VALIDATION_FIGURES if point[key] is not None}
        self.tracker.log({**values, "train_seconds": now.seconds, "tokens": now.tokens})
        compared = f"{score.bits_per_byte:.4f} bits a byte"
        if score.kl_to_teacher_nats is not None:
            compared = f"KL {score.kl_to_teacher_nats:.4f}, top-1 {score.top1_agreement:.3f}"
        logger.info(
            "%s, step %d, %d tokens, %.0f s: validation loss %.4f nats (perplexity %.1f), %s",
            *(self.name, now.steps, now.tokens, now.seconds, score.nll_nats, score.perplexity, compared),
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
        stage: StageConfig,
        sums: dict[str, Tensor],
        grad_norm: Tensor,
        seconds: float,
        teacher_seconds: float,
        lr: float,
    ) -> None:
        """Losses of this step over all processes, to the tracker and to the run's own log file."""
        total = self.accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum")
        terms = dict(zip(sums, (total / self.tokens_per_step).tolist(), strict=True))
        values = {
            "loss": sum(stage.weights[term] * value for term, value in terms.items()),
            **{f"loss_{term}": value for term, value in terms.items()},
            "learning_rate": lr,
            "grad_norm": grad_norm.item(),
            "tokens_per_second": self.tokens_per_step / seconds,
            "teacher_seconds_per_step": teacher_seconds,
            "student_seconds_per_step": seconds - teacher_seconds,
        }
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
            scale = self.tokens_per_step / self.accelerator.num_processes
            bar.set_postfix_str(
                ", ".join(f"{term} {value.item() / scale:.3f}" for term, value in sums.items())
                + f", {now.tokens / max(now.seconds, 1e-9):,.0f} tok/s",
                refresh=False,
            )
        bar.update(share * bar.total - bar.n)

    # ---------------------------------------------------------------- saving and resuming

    def _save(self, optimizer: Any | None) -> None:
        """Begin to write a checkpoint; `optimizer` is None between two stages. Collective: the lanes' states are
        gathered. Nobody waits for the disk."""
        lanes = self._gather_lanes()
        if isinstance(self.all_blocks, BlockStream):
            self.progress.stream = self.all_blocks.state()
        if self.accelerator.is_main_process:
            weights = {name: p.detach() for name, p in [*self.student.named_parameters(), *self.aids.items()]}
            self.checkpoints.save(self.progress.now.steps, weights, optimizer, lanes, asdict(self.progress))

    def _all_saved(self) -> None:
        """Wait, all processes, until the main one has written what there is to write."""
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()

    def _gather_lanes(self) -> dict[str, Tensor]:
        """The carried states of all lanes of all processes, in lane order: (L, G, H) each."""
        if not self.states:
            return {}
        h, c = (torch.cat([state[i] for _, state in sorted(self.states.items())], 1).float().cpu() for i in (0, 1))
        parts = gather_object([(h, c)]) if self.accelerator.num_processes > 1 else [(h, c)]
        return {"h_LGH": torch.cat([p[0] for p in parts], 1), "c_LGH": torch.cat([p[1] for p in parts], 1)}

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
        _put(load_tensors(folder, "model.safetensors"), dict(self.student.named_parameters()))
        if isinstance(self.all_blocks, BlockStream) and self.progress.stream:
            self.all_blocks.load(self.progress.stream)
        lanes = load_tensors(folder, "lanes.safetensors")
        if lanes:
            share = self.lanes // self.accelerator.num_processes
            first = self.accelerator.process_index * share
            for number, start in enumerate(range(first, first + share, self.micro)):
                h, c = (
                    lanes[key][:, start : start + self.micro].to(self.accelerator.device) for key in ("h_LGH", "c_LGH")
                )
                self.states[number] = (h.contiguous(), c.contiguous())
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
        best = load_student(self.checkpoints.best(self.progress.best_step), type(self.student))
        self.student.load_state_dict(best.state_dict())
        self.student.eval()


def _step_of(line: str) -> int:
    """The step that a line of the log is about; 0 for one that is cut or damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


@torch.no_grad()
def _put(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def micro_batch_size(recipe: Recipe, processes: int) -> int:
    """Lanes per process and forward pass; UserError where the batch cannot be shared out evenly."""
    share, rest = divmod(recipe.run.batch_size, processes)
    micro = recipe.run.micro_batch_size or share
    if rest or share == 0 or share % micro:
        raise UserError(
            f"run.batch_size ({recipe.run.batch_size} lanes) must be a multiple of processes ({processes}) x "
            f"run.micro_batch_size ({micro})"
        )
    return micro
