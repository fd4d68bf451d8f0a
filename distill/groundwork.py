"""What is computed in closed form before a student's first step, from the teacher's states on the first tokens.

The basis of a narrow head, the metrics of hidden regression, and the fit of the output projection: a random LSTM's
outputs already tell a lot about the last tokens (an echo state network; Jaeger 2001), and the best linear map from
them to the teacher's hidden states is a ridge regression.

Legend: N tokens, H hidden size of the student, d width of the teacher, r width of the student's output, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import StageConfig, StudentConfig
from distill.corpus import BlockBatch
from distill.geometry import Basis, HiddenMetric, HiddenMoments, MetricSums
from distill.student import LSTMCache, LSTMForCausalLM, LSTMModel
from distill.teacher import LanguageModel
from distill.transplant import align_input, transplant_feed_forward, transplant_low_rank

States = tuple[int, BlockBatch, Tensor, Tensor]  # micro-batch, its blocks, resets (B, T), teacher's states (N, d)
BASIS_RIDGE = 0.1  # of the Fisher metric in which a basis loses least


class Groundwork:
    """Works on what `read` yields for this process; sums are added up over all of them. Collective."""

    def __init__(
        self,
        teacher: LanguageModel,
        student: PreTrainedModel,
        accelerator: Accelerator,
        read: Callable[[], Iterable[States]],
    ) -> None:
        self.teacher, self.student, self.accelerator, self.read = teacher, student, accelerator, read

    @cached_property
    def states(self) -> list[States]:
        """Read once, when first needed."""
        return list(self.read())

    @cached_property
    def basis(self) -> Basis | None:
        """Of a student whose head is narrower than the teacher's."""
        rank = cast(Any, self.student.get_output_embeddings()).weight.shape[1]
        if rank == self.teacher.width:
            return None
        moments = HiddenMoments(self.teacher.width, self.accelerator.device)
        for *_, hidden_Nd in self.states:
            moments.add(hidden_Nd)
        mean_d, covariance_dd = moments.solve(self._total)
        linear = self.teacher.head.softcap is None
        return Basis.of(mean_d, covariance_dd, self._matrix("fisher" if linear else "identity", BASIS_RIDGE), rank)

    def initialise(self, student: StudentConfig, transplant: bool, occurrences_V: Tensor) -> None:
        """What an LSTM's random weights are replaced by; with `transplant` by what the teacher knows."""
        if not student.is_fresh_lstm:
            return
        assert isinstance(self.student, LSTMForCausalLM)
        if transplant and self.basis is not None:
            transplant_low_rank(self.student, self.teacher, self.basis)
        if student.align_input:
            align_input(self.student, occurrences_V)
        if transplant and student.feed_forward_from == "teacher":
            transplant_feed_forward(self.student, self.teacher)
        if transplant and student.fit_tokens and not student.has_own_tokenizer:  # else there are no states to fit to
            self._fit_output(self.student.model)

    def metric(self, stage: StageConfig) -> HiddenMetric | None:
        """The metric of a stage's hidden regression; None for the plain mean over dimensions."""
        if "hidden_mse" not in stage.objective or (stage.metric == "identity" and self.basis is None):
            return None
        return HiddenMetric.of(self._matrix(stage.metric, stage.ridge), self.basis)

    def _matrix(self, name: Literal["identity", "gram", "fisher"], ridge: float) -> Tensor:
        """M (d, d) in fp64."""
        if name == "identity":
            width = self.teacher.width
            return torch.eye(width, dtype=torch.float64, device=self.accelerator.device) / width
        sums = MetricSums(self.teacher.head, name)
        if name == "fisher":
            for *_, hidden_Nd in self.states:
                sums.add(hidden_Nd)
        return sums.matrix(ridge, self._total)

    def _fit_output(self, model: LSTMModel) -> None:
        accelerator = self.accelerator
        model.eval()
        fit = OutputFit(model.config.hidden_size, model.config.embedding_size, accelerator.device)
        features: list[Tensor] = []
        hook = model.output_projection.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        carried: dict[int, LSTMCache] = {}
        for number, batch, reset_BT, hidden_Nd in self.states:
            cache = carried.setdefault(number, LSTMCache())
            inputs_BT, reset_BT = batch.inputs_BT.to(accelerator.device), reset_BT.to(accelerator.device)
            with torch.no_grad(), accelerator.autocast():
                model(inputs_BT, past_key_values=cache, reset_mask=reset_BT, use_cache=True)
            fit.add(features.pop().flatten(0, 1), self.basis.coordinates(hidden_Nd) if self.basis else hidden_Nd)
        hook.remove()
        weight_rH, bias_r = fit.solve(self._total)
        with torch.no_grad():
            model.output_projection.weight.copy_(weight_rH)
            model.output_projection.bias.copy_(bias_r)

    def _total(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, "sum")


class OutputFit:
    """Ridge regression of the targets on what the output projection reads, from sums over tokens."""

    RIDGE = 0.1  # of the features' variance, which the last norm holds near 1; the best of 0.001, 0.01 and 0.1

    def __init__(self, hidden_size: int, width: int, device: torch.device) -> None:
        """Sums for features of `hidden_size` numbers and a constant, and targets of `width`."""
        self.moment_HH = torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64, device=device)
        self.moment_Hr = torch.zeros(hidden_size + 1, width, dtype=torch.float64, device=device)

    def add(self, features_NH: Tensor, target_Nr: Tensor) -> None:
        """Count N more tokens."""
        features_NH = torch.nn.functional.pad(features_NH.double(), (0, 1), value=1.0)
        self.moment_HH += features_NH.t() @ features_NH
        self.moment_Hr += features_NH.t() @ target_Nr.double()

    def solve(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> tuple[Tensor, Tensor]:
        """Weight (r, H) and bias (r,), in fp64; the bias is not penalised. `total` adds sums up over processes."""
        moment_HH, moment_Hr = total(self.moment_HH), total(self.moment_Hr)
        penalty_H = torch.full_like(moment_HH[-1], self.RIDGE) * moment_HH[-1, -1]
        penalty_H[-1] = 0
        solution_Hr = torch.linalg.solve(moment_HH + penalty_H.diag(), moment_Hr)
        return solution_Hr[:-1].t(), solution_Hr[-1]
