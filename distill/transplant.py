"""What the student starts from: a fresh LSTM that takes over the teacher's embedding and output head.

The head fixes what "similar next words" means and is most of a small model's parameters; copied, the LSTM
only has to learn to point into the teacher's space.
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
