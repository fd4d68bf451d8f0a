"""What the student starts from: a fresh LSTM that takes over the teacher's embedding and output head.

The head fixes what "similar next words" means and is most of a small model's parameters; copied, the LSTM
only has to learn to point into the teacher's space. Its output projection need not even learn that from
nothing: a random LSTM's outputs already tell a lot about the last tokens (an echo state network; Jaeger
2001), and the best linear map from them to the teacher's hidden states has a closed form.

Legend: N tokens, H hidden size of the student, d width of the teacher.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from distill.config import StudentConfig, UserError
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import LanguageModel


def build_student(
    config: StudentConfig, teacher: LanguageModel, separator_id: int, *, seed: int, transplant: bool
) -> LSTMForCausalLM:
    """A student of the teacher's vocabulary, its random parts drawn from `seed`, in fp32 on the CPU.

    With `transplant`, embedding, head and head bias are the teacher's.
    """
    embedding: Tensor = cast(Any, teacher.model.get_input_embeddings()).weight
    if transplant and embedding.shape[1] != teacher.width:
        raise UserError(
            f"student.transplant: the teacher's embedding is {embedding.shape[1]} wide and its head {teacher.width}; "
            "set student.transplant=false"
        )
    tied = config.tie_embeddings
    if tied is None:
        tied = teacher.model.config.get_text_config().tie_word_embeddings
    shape = LSTMConfig(
        vocab_size=teacher.vocab_size,
        embedding_size=config.embedding_size or teacher.width,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        input_dropout=config.input_dropout,
        output_dropout=config.output_dropout,
        recurrent_dropout=config.recurrent_dropout,
        head_bias=teacher.head.bias_V is not None,
        tie_word_embeddings=tied,
        bos_token_id=separator_id,
        eos_token_id=separator_id,
        pad_token_id=separator_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = LSTMForCausalLM(shape)
    if transplant:
        with torch.no_grad():
            student.model.embed_tokens.weight.copy_(embedding[: teacher.vocab_size])
            if not tied:
                # A softcap is left out and a scale folded in: the student's head is plain.
                student.lm_head.weight.copy_(teacher.head.weight_Vd.float() * teacher.head.scale)
            if teacher.head.bias_V is not None:
                student.lm_head.bias.copy_(teacher.head.bias_V)
    return student


class OutputFit:
    """Ridge regression of the teacher's hidden states on what the output projection reads, from sums over tokens."""

    RIDGE = 0.1  # of the features' variance, which the last norm holds near 1; the best of 0.001, 0.01 and 0.1

    def __init__(self, hidden_size: int, width: int, device: torch.device) -> None:
        """Sums for features of `hidden_size` numbers and a constant, and targets of `width`."""
        self.moment_HH = torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64, device=device)
        self.moment_Hd = torch.zeros(hidden_size + 1, width, dtype=torch.float64, device=device)

    def add(self, features_NH: Tensor, hidden_Nd: Tensor) -> None:
        """Count N more tokens."""
        constant_N1 = features_NH.new_ones(len(features_NH), 1, dtype=torch.float64)
        features_NH = torch.cat([features_NH.double(), constant_N1], dim=1)
        self.moment_HH += features_NH.t() @ features_NH
        self.moment_Hd += features_NH.t() @ hidden_Nd.double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight (d, H) and bias (d,), in fp64; the bias is not penalised."""
        tokens = self.moment_HH[-1, -1]
        penalty_H = torch.full_like(self.moment_HH[-1], self.RIDGE) * tokens
        penalty_H[-1] = 0
        solution_Hd = torch.linalg.solve(self.moment_HH + penalty_H.diag(), self.moment_Hd)
        return solution_Hd[:-1].t(), solution_Hd[-1]
