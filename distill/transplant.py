"""What the student takes over from the teacher: embedding and output head, whole or of low rank.

The head fixes what "similar next words" means and is most of a small model's parameters; copied, the LSTM only has to
learn to point into the teacher's space.

Legend: V vocabulary, d width of the teacher, r width of the student's embedding and head, H hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import StudentConfig, UserError
from distill.geometry import Basis
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import LanguageModel, head_of


def build_student(
    config: StudentConfig, teacher: LanguageModel, separator_id: int, *, seed: int, transplant: bool
) -> LSTMForCausalLM:
    """A student of the teacher's vocabulary, its random parts drawn from `seed`, in fp32 on the CPU.

    With `transplant`, embedding, head and head bias are the teacher's; where they are narrower than the teacher's they
    are still random, until its hidden states are known (`transplant_low_rank`).
    """
    embedding_Vd = teacher.embedding_Vd
    if transplant and embedding_Vd.shape[1] != teacher.width:
        raise UserError(
            f"student.transplant: the teacher's embedding is {embedding_Vd.shape[1]} wide, its head {teacher.width}; "
            "set student.transplant=false"
        )
    width = config.embedding_size or teacher.width
    if transplant and width > teacher.width:
        raise UserError(
            f"student.embedding_size: expected at most the teacher's width of {teacher.width} with "
            f"student.transplant, found {width}"
        )
    narrow = width != teacher.width
    tied = config.tie_embeddings
    if tied is None:
        tied = teacher.model.config.get_text_config().tie_word_embeddings
    shape = LSTMConfig(
        vocab_size=teacher.vocab_size,
        embedding_size=width,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        input_dropout=config.input_dropout,
        output_dropout=config.output_dropout,
        recurrent_dropout=config.recurrent_dropout,
        head_bias=teacher.head.bias_V is not None or (transplant and narrow),
        tie_word_embeddings=tied,
        bos_token_id=separator_id,
        eos_token_id=separator_id,
        pad_token_id=separator_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = LSTMForCausalLM(shape)
    if transplant and not narrow:
        take_over(student, teacher)
    return student


@torch.no_grad()
def take_over(student: PreTrainedModel, teacher: LanguageModel) -> None:
    """Copy the teacher's embedding, head and head's bias, which must be as wide; UserError where they are not."""
    embedding, head = cast(Any, student.get_input_embeddings()), cast(Any, student.get_output_embeddings())
    embedding_Vd, weight_Vd, bias_V = teacher.embedding_Vd, teacher.head.weight_Vd, teacher.head.bias_V
    for ours_Vd, theirs_Vd in ((embedding.weight, embedding_Vd), (head.weight, weight_Vd)):
        if ours_Vd.shape != theirs_Vd.shape:
            raise UserError(
                f"student.transplant: the student's embedding or head is {ours_Vd.shape[1]} wide, the teacher's "
                f"{theirs_Vd.shape[1]}; set student.transplant=false"
            )
    if bias_V is not None and head.bias is None:
        raise UserError("student.transplant: the teacher's head has a bias, the student's none; set it to false")
    embedding.weight.copy_(embedding_Vd)
    # A softcap is left out and a scale folded in: an LSTM's head is plain.
    scale = teacher.head.scale / head_of(student).scale
    if head.weight is not embedding.weight:
        head.weight.copy_(weight_Vd.float() * scale)
    if bias_V is not None:
        head.bias.copy_(bias_V * scale)


@torch.no_grad()
def transplant_low_rank(student: LSTMForCausalLM, teacher: LanguageModel, basis: Basis) -> None:
    """The teacher's head in the coordinates of a basis, and its embedding in its own principal axes.

    With tied matrices the embedding is the head's: the teacher's vectors seen from the basis.
    """
    head = basis.head(teacher.head)
    student.lm_head.weight.copy_(head.weight_Vd)
    student.lm_head.bias.copy_(head.bias_V)
    if not student.config.tie_word_embeddings:
        embedding_Vd = teacher.embedding_Vd.float()
        _, axes_dd = torch.linalg.eigh(embedding_Vd.t() @ embedding_Vd)
        student.model.embed_tokens.weight.copy_(embedding_Vd @ axes_dd.flip(-1)[:, : student.config.embedding_size])


@torch.no_grad()
def align_input(student: LSTMForCausalLM, occurrences_V: Tensor) -> None:
    """Start the input projection as the embedding's leading principal axes over the text's tokens, of mean variance 1.

    A fresh projection of small numbers leaves the residual stream nearly empty, and the embedding's mean, which all
    tokens share, takes most of what is left. Where H exceeds r, the other rows are random directions of the same size.
    """
    embedding_Vr = student.model.embed_tokens.weight.double()
    share_V = occurrences_V.double() / occurrences_V.sum()
    mean_r = share_V @ embedding_Vr
    centred_Vr = embedding_Vr - mean_r
    variances_r, axes_rr = torch.linalg.eigh(centred_Vr.t() @ (share_V[:, None] * centred_Vr))
    projection = student.model.input_projection
    rows_Hr = projection.weight.double()
    rows_Hr /= rows_Hr.norm(dim=1, keepdim=True)
    kept = min(rows_Hr.shape)
    rows_Hr[:kept] = axes_rr.flip(-1)[:, :kept].t()
    rows_Hr /= variances_r.flip(-1)[:kept].mean().clamp_min(1e-12).sqrt()
    projection.weight.copy_(rows_Hr)
    projection.bias.copy_(-rows_Hr @ mean_r)
