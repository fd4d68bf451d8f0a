"""The training of a classifier: steps of texts, teacher's logits, student, loss, backward; the loop is in
`distill/loop.py`. The same trains a student, its control, and, on the labels alone, a teacher.

Loss sums are divided once by the texts of the whole step, cross-entropy by those of them that have a label, so how a
batch is cut into processes and micro-batches changes nothing but rounding.

Legend: B texts of a micro-batch, T tokens of the longest of them, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import losses
from distill.classifier import Recall
from distill.config import StageConfig
from distill.labelled import NO_LABEL, Tokens, epoch_batches
from distill.loop import Loop, Step, make_optimizer
from distill.objective import Objective
from distill.progress import Spent


def objective_sums(
    objective: Objective, logits_BC: Tensor, labels_B: Tensor, teacher_BC: Tensor | None
) -> dict[str, Tensor]:
    """Each term of an objective, summed over the texts; cross-entropy over those with a label."""
    sums: dict[str, Tensor] = {}
    for term in objective.weights:
        if term == "cross_entropy":
            known_B = labels_B != NO_LABEL
            sums[term] = losses.cross_entropy(logits_BC[known_B], labels_B[known_B])
            continue
        assert teacher_BC is not None, "a stage that needs the teacher is given its logits"
        if term == "logit_mse":
            sums[term] = losses.logit_mse(logits_BC, teacher_BC)
        else:
            sums[term] = losses.DIVERGENCES[term](logits_BC, teacher_BC, objective.temperature, **objective.extra(term))
    return sums


class ClassifierWithLoss(nn.Module):
    """A classifier and its loss as one module, which is what accelerate wraps."""

    def __init__(self, student: PreTrainedModel, recall: Recall | None) -> None:
        super().__init__()
        self.student, self.recall = student, recall

    def forward(
        self, ids_BT: Tensor, mask_BT: Tensor, labels_B: Tensor, teacher_BC: Tensor | None, rows_B: np.ndarray,
        objective: Objective, divisors: dict[str, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The loss of these texts, as a share of the whole step's, and the terms' sums."""
        with self.recall.spoken(self.recall.batch(rows_B)) if self.recall else nullcontext():
            logits_BC = cast(Any, self.student)(input_ids=ids_BT, attention_mask=mask_BT).logits.float()
        sums = objective_sums(objective, logits_BC, labels_B, teacher_BC)
        loss = torch.stack([objective.weights[term] * value / divisors[term] for term, value in sums.items()]).sum()
        return loss, {term: value.detach() for term, value in sums.items()}


class ClassifierTraining(Loop):
    """One training of one classifier."""

    def __init__(
        self,
        name: str,
        *,
        tokens: Tokens,
        labels_N: np.ndarray,
        teacher_NC: Tensor | None = None,
        teacher_seconds: float = 0.0,
        batch_size: int | None = None,
        recall: Recall | None = None,
        begin_with: Callable[[], object] = lambda: None,
        **shared: Any,
    ) -> None:
        """`teacher_seconds` were spent on the teacher's logits, and count; `begin_with` is done once, before all.

        With `recall`, whose rows are those of `tokens`, the student is a teacher whose lower layers rest.
        """
        super().__init__(name, **shared)
        self.tokens, self.labels_N, self.teacher_NC = tokens, labels_N, teacher_NC
        self.recall, self.begin_with, self.teacher_seconds = recall, begin_with, teacher_seconds
        self.batch_size = batch_size or self.recipe.run.batch_size
        self.rows_N = np.arange(len(tokens))
        processes = self.accelerator.num_processes
        self.micro = self.recipe.run.micro_batch_size or self.batch_size
        self.micro = min(self.micro, -(-self.batch_size // processes))
        self._epoch = lru_cache(2)(self._batches_of_epoch)

    # ---------------------------------------------------------------- what the loop asks

    def initialise(self) -> None:
        self.progress.teacher_seconds, _ = self._agree(self.teacher_seconds, 0)
        self._spend(self.progress.teacher_seconds)
        with self._spending():
            self.begin_with()

    def begin(self, stage: StageConfig, resumed: Path | None = None) -> tuple[Any, Callable[[], Step]]:
        labelled_N = np.flatnonzero(self.labels_N != NO_LABEL)
        self.rows_N = np.arange(len(self.tokens)) if stage.needs_teacher else labelled_N
        assert len(self.rows_N) >= self.batch_size, "the job has compared them"
        self._epoch.cache_clear()
        self.accelerator.free_memory()
        torch.manual_seed(self.recipe.run.seed + self.progress.stage)
        embeddings = {id(p) for p in self.student.get_input_embeddings().parameters()}
        if any(each.freeze for each in self.stages):
            self._freeze(stage, embeddings)
        with_loss = ClassifierWithLoss(self.student, self.recall)
        optimizer = make_optimizer(stage, with_loss, embeddings)
        self.restore(optimizer, resumed)
        model, optimizer = self.accelerator.prepare(with_loss, optimizer)
        return optimizer, partial(self._step, model, optimizer, stage)

    def tokens_of_step(self, step: int) -> int:
        return int(self.tokens.lengths_N[self._rows(step)].sum())

    def divisor(self, step: int, term: str) -> float:
        rows_G = self._rows(step)
        return float(max(1, (self.labels_N[rows_G] != NO_LABEL).sum()) if term == "cross_entropy" else len(rows_G))

    # ---------------------------------------------------------------- one step

    def _freeze(self, stage: StageConfig, embeddings: set[int]) -> None:
        head = {id(p) for p in cast(Any, self.student).score.parameters()}
        for parameter in self.student.parameters():
            key = id(parameter)
            part = "embedding" if key in embeddings else "head" if key in head else "body"
            parameter.requires_grad_(part not in stage.freeze)
            parameter.grad = None

    def _step(self, model: nn.Module, optimizer: Any, stage: StageConfig) -> Step:
        """One optimizer step over a batch of texts."""
        accelerator, step = self.accelerator, self.progress.now.steps
        # Dropout's random numbers follow from seed, step and process: nothing to save, nothing to restore.
        torch.manual_seed(((self.recipe.run.seed * 1_000_003 + step) * 4_096 + accelerator.process_index) % 2**63)
        model.train()
        objective = Objective.of(stage, self.share(stage))
        divisors = {term: self.divisor(step, term) for term in objective.weights}
        sums: dict[str, Tensor] = {}
        micro_batches = list(self._micro_batches(step))
        for number, rows_B in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss, parts = model(*self._inputs(rows_B), rows_B, objective, divisors)
                accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes: undo that
            for term, value in parts.items():
                sums[term] = sums.get(term, torch.zeros((), device=value.device)) + value
        read = lambda: f"texts {[int(row) for rows_B in micro_batches for row in rows_B]}"  # noqa: E731
        return sums, self.update(model, optimizer, sums, read), Spent(), objective.weights

    def _inputs(self, rows_B: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Ids, mask, labels and teacher's logits of some texts."""
        device = self.accelerator.device
        ids_BT, mask_BT = self.tokens.batch(rows_B)
        teacher_BC = None if self.teacher_NC is None else self.teacher_NC[torch.from_numpy(rows_B)].to(device)
        return ids_BT.to(device), mask_BT.to(device), torch.from_numpy(self.labels_N[rows_B]).to(device), teacher_BC

    def _micro_batches(self, step: int) -> Iterator[np.ndarray]:
        """This process's texts of a step."""
        share_n = np.array_split(self._rows(step), self.accelerator.num_processes)[self.accelerator.process_index]
        yield from np.split(share_n, range(self.micro, len(share_n), self.micro))

    def _rows(self, step: int) -> np.ndarray:
        """The texts of a step, over all processes."""
        epoch, number = divmod(step, len(self.rows_N) // self.batch_size)
        return cast(np.ndarray, self._epoch(epoch)[number])

    def _batches_of_epoch(self, epoch: int) -> np.ndarray:
        lengths_N = self.tokens.lengths_N[self.rows_N]
        return self.rows_N[epoch_batches(lengths_N, self.batch_size, epoch, self.recipe.run.seed)]
