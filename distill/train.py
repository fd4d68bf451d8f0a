"""The training of a language model: steps of batch, teacher's signal, student, loss, backward, clip.

The loop around them is in `distill/loop.py`.

Training lanes are contiguous: lane l's blocks follow one another, and the LSTM's state is carried from
block to block, detached (stateful truncated backpropagation through time). The batch of a step is all
lanes over all processes and micro-batches; loss sums are divided once by its tokens, so how a batch is
cut into processes and micro-batches changes nothing but rounding.

Legend: B lanes of a micro-batch, T block length, G lanes of the whole batch, L layers, H hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from distill.candidates import Candidates, CandidateSampler
from distill.config import HIDDEN_TERMS, Recipe, StageConfig, UserError
from distill.corpus import BlockBatch, Blocks, lane_order
from distill.fused import StudentWithLoss
from distill.geometry import HiddenMetric
from distill.groundwork import Groundwork, States
from distill.loop import Loop, Step, make_optimizer
from distill.losses import TINY
from distill.metrics import Score
from distill.objective import WEIGHT_SUM, Objective
from distill.on_policy import Batch, BlockWriter, written_lanes
from distill.progress import Spent
from distill.signals import Encoding, HiddenSignal
from distill.stream import BlockStream
from distill.student import LSTMForCausalLM, State
from distill.targets import Targets
from distill.teacher import LanguageModel, head_of
from distill.tracking import Tracker


@dataclass(frozen=True)
class Rehearsal:
    """Seconds that parts of a stage take: a step, the teacher in it, the metric before the first one, a checkpoint."""

    step: float
    teacher: float
    metric: float
    checkpoint: float


class Training(Loop):
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
        seconds_before: float = 0.0,
    ) -> None:
        """`seconds_before`: spent on this training already, on text that the teacher has written."""
        super().__init__(
            name,
            recipe=recipe,
            stages=stages,
            student=student,
            validate=validate,
            accelerator=accelerator,
            tracker=tracker,
            validate_at_tokens=validate_at_tokens,
        )
        self.logit_scale = head_of(student).scale
        self.all_blocks = blocks
        self.blocks_with_targets = blocks if blocks_with_targets is None else blocks_with_targets
        self.blocks = self.blocks_with_targets  # of the stage at hand
        self.first_blocks = self.blocks.head if isinstance(self.blocks, BlockStream) else self.blocks
        self.teacher, self.targets, self.transplant = teacher, targets, transplant
        self.seconds_before = seconds_before
        self.groundwork = Groundwork(teacher, student, accelerator, self._first_states)
        self.lanes = recipe.run.batch_size
        lane_order(len(self.first_blocks), self.lanes, epoch=0, seed=recipe.run.seed)  # UserError if it is too short
        self.micro = micro_batch_size(recipe, accelerator.num_processes)
        share = self.lanes // accelerator.num_processes
        self.own_lanes = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        self.separator_id = int(self.first_blocks.tokens[0])  # which starts every document, and so the text
        self.tokens_per_step = self.lanes * recipe.corpus.block_length
        self.states: dict[int, State] = {}  # carried, by micro-batch; a Transformer has none
        self.sampler: CandidateSampler | None = None
        self.writer: BlockWriter | None = None
        self.metric: HiddenMetric | None = None  # of hidden_mse in the stage at hand

    # ---------------------------------------------------------------- the whole training

    def begin(self, stage: StageConfig, resumed: Path | None = None) -> tuple[Any, Callable[[], Step]]:
        """Set a stage up, from its checkpoint if there is one: its optimizer, and what takes a step of it."""
        self.blocks = self._blocks_of(stage)
        model, optimizer = self._prepare(stage)
        self.restore(optimizer, resumed)
        with self._spending() if resumed is None else nullcontext():
            self.metric = self.groundwork.metric(stage)
        self.sampler, self.writer = self._sampler(stage), self._writer(stage)
        return optimizer, partial(self._step, model, optimizer, stage)

    def initialise(self) -> None:
        if self.targets is not None:
            self.progress.teacher_seconds = self.targets.seconds + self.seconds_before
            self._spend(self.progress.teacher_seconds)
        with self._spending():
            self.groundwork.initialise(self.recipe.student, self.transplant, self.occurrences_V)

    def tokens_of_step(self, step: int) -> int:
        return self.tokens_per_step

    def divisor(self, step: int, term: str) -> float:
        return self.tokens_per_step

    def end_stage(self) -> None:
        if not isinstance(self.blocks, BlockStream):
            self.progress.stored_steps += self.progress.now.steps - self.progress.stage_start.steps

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
            teacher_seconds += take_step()[2].teacher
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
                    signal = self.targets.signal(batch, first_only=True)
                else:
                    signal = self.teacher.signal(batch, Encoding("hidden"))
                assert isinstance(signal, HiddenSignal)
                yield number, batch, reset_BT, signal.hidden_Nd.to(self.accelerator.device).clone()

    # ---------------------------------------------------------------- one step

    def _step(self, model: torch.nn.Module, optimizer: Any, stage: StageConfig) -> Step:
        """One optimizer step over all lanes."""
        accelerator, steps = self.accelerator, self.progress.now.steps
        objective = Objective.of(stage, self.share(stage), self.metric)
        # Dropout's random numbers follow from seed, step and process: nothing to save, nothing to restore.
        torch.manual_seed(((self.recipe.run.seed * 1_000_003 + steps) * 4_096 + accelerator.process_index) % 2**63)
        model.train()
        sums: dict[str, Tensor] = {}
        batches, spent = self._batches(steps)
        candidates = self._candidates(steps)
        for number, (batch, reset_BT) in enumerate(batches):
            signal = None
            if stage.needs_teacher:
                assert self.targets is not None
                began = time.perf_counter()
                signal = self.targets.signal(batch, first_only=not objective.needs_teacher_logits)
                spent.teacher += time.perf_counter() - began
            last = number == len(batches) - 1
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
        if (weight_sum := sums.pop(WEIGHT_SUM, None)) is not None:
            self._divide_by_mean_weight(model, sums, weight_sum)
        read = lambda: f"blocks {[block for batch, _ in batches for block in batch.block_ids_B.tolist()]}"  # noqa: E731
        grad_norm = self.update(model, optimizer, sums, read)
        return sums, grad_norm, spent, objective.weights

    def _batches(self, step: int) -> tuple[list[Batch], Spent]:
        """This process's micro-batches of a step, some lanes written by the student where the stage says so."""
        batches = [self._batch(ids, starts_B, self.blocks) for ids, starts_B in self._micro_batches(step, self.blocks)]
        if self.writer is None:
            return batches, Spent()
        began = time.perf_counter()
        batches = self.writer.rewrite(batches, step)
        return batches, Spent(writing=time.perf_counter() - began)

    @torch.no_grad()
    def _divide_by_mean_weight(self, model: torch.nn.Module, sums: dict[str, Tensor], weight_sum: Tensor) -> None:
        """Give the tokens of the step, over all processes, weights of mean 1: known only when all have been read."""
        mean = self.accelerator.reduce(weight_sum, "sum") / self.tokens_per_step
        mean = mean.clamp_min(TINY)  # where all weights are 0, so is what they are divided into
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(mean)
        for value in sums.values():
            value.div_(mean)

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
            if step == self.progress.stage_start.steps and self.progress.stage > 0:
                # The states of these lanes are those after text that the student wrote.
                starts_G |= written_lanes(self.lanes, self.stages[self.progress.stage - 1].student_written)
        for start in range(self.own_lanes.start, self.own_lanes.stop, self.micro):
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

    def _writer(self, stage: StageConfig) -> BlockWriter | None:
        if not stage.student_written:
            return None
        assert isinstance(self.student, LSTMForCausalLM), "the recipe was checked"
        return BlockWriter(
            self.student,
            stage,
            lanes=self.own_lanes,
            of=self.lanes,
            separator_id=self.separator_id,
            reset_at_documents=self.recipe.corpus.reset_at_documents,
            seed=self.recipe.run.seed,
            dtype=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32,
        )

    def _candidates(self, step: int) -> Candidates | None:
        """Those of a step, the same for all processes and micro-batches."""
        if self.sampler is None:
            return None
        labels_N = self.blocks.labels(self._row(step, self.blocks)[0]).flatten().to(self.accelerator.device)
        return self.sampler.draw(labels_N, self.recipe.run.seed * 1_000_003 + step)

    # ---------------------------------------------------------------- set-up of a stage

    def _prepare(self, stage: StageConfig) -> tuple[torch.nn.Module, Any]:
        """The wrapped student and its optimizer, with what the stage freezes frozen."""
        self.accelerator.free_memory()
        torch.manual_seed(self.recipe.run.seed + self.progress.stage)
        student = self.student
        embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
        tied = embedding.weight is head.weight
        parts = {id(p): "embedding" for p in embedding.parameters()}
        parts.update({id(p): "head" for p in head.parameters() if not (tied and p is head.weight)})
        # A head that no term reads would get no gradient, which DDP takes for an error: it rests as well.
        resting = stage.freeze | (set() if set(stage.objective) - HIDDEN_TERMS else {"head"})
        for parameter in student.parameters():
            parameter.requires_grad_(parts.get(id(parameter), "body") not in resting)
            parameter.grad = None
        layer_width = self.teacher.width if "layer_mse" in stage.objective else None
        with_loss = StudentWithLoss(student, layer_width, self.recipe.student.penalties, self.logit_scale)
        self.aids = {name: p for name, p in with_loss.named_parameters() if not name.startswith("student.")}
        embeddings = {key for key, part in parts.items() if part == "embedding"}
        optimizer = make_optimizer(stage, with_loss, embeddings)
        model, optimizer = self.accelerator.prepare(with_loss, optimizer)
        return model, optimizer

    # ---------------------------------------------------------------- saving and resuming

    def extras(self) -> dict[str, Tensor]:
        """The carried states of all lanes of all processes, in lane order: their parts by name, lanes on axis 1."""
        if isinstance(self.all_blocks, BlockStream):
            self.progress.stream = self.all_blocks.state()
        if not self.states:
            return {}
        micro_batches = zip(*(state for _, state in sorted(self.states.items())), strict=True)
        own = [torch.cat(parts, 1).float().cpu() for parts in micro_batches]
        processes = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        lanes = (torch.cat(parts, 1) for parts in zip(*processes, strict=True))
        return dict(zip(self._lane_names(), lanes, strict=True))

    def _lane_names(self) -> list[str]:
        return [name.replace("B", "G") for name in self.student.model.state_names]

    def take_extras(self, tensors: dict[str, Tensor]) -> None:
        if isinstance(self.all_blocks, BlockStream) and self.progress.stream:
            self.all_blocks.load(self.progress.stream)
        if not tensors:
            return
        for number, start in enumerate(range(self.own_lanes.start, self.own_lanes.stop, self.micro)):
            parts = (tensors[name][:, start : start + self.micro] for name in self._lane_names())
            self.states[number] = tuple(part.to(self.accelerator.device).contiguous() for part in parts)


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
