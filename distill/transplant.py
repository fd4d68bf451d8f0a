"""What the student takes over from the teacher: embedding and output head, whole or of low rank.

The head fixes what "similar next words" means and is most of a small model's parameters; copied, the LSTM only has to
learn to point into the teacher's space.

Legend: V vocabulary, d width of the teacher, r width of the student's embedding and head, H hidden size, F units of a
feed-forward block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill.config import StudentConfig, UserError
from distill.geometry import Basis
from distill.sharding import whole
from distill.student import LSTMConfig, LSTMForCausalLM, LSTMForSequenceClassification
from distill.teacher import LanguageModel, head_of, resolve_model, without_load_report

ARCHITECTURE = ("hidden_size", "num_layers", "cell", "attention_window", "feed_forward_size")
DROPOUTS = ("embedding_dropout", "input_dropout", "output_dropout", "variational_dropout", "recurrent_dropout")


def _body(config: StudentConfig) -> dict[str, Any]:
    """The fields that student and recipe share."""
    return {name: getattr(config, name) for name in (*ARCHITECTURE, *DROPOUTS)}


def is_tied(config: StudentConfig, teacher: LanguageModel) -> bool:
    """Whether the student's embedding and head are one matrix."""
    if config.tie_embeddings is not None:
        return config.tie_embeddings
    return bool(teacher.model.config.get_text_config().tie_word_embeddings)


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
    if transplant and config.feed_forward_from == "teacher":
        if narrow:
            raise UserError(
                f"student.feed_forward_from: teacher needs an embedding of the teacher's width of {teacher.width}, "
                f"whose axes its feed-forward blocks know; found student.embedding_size {width}"
            )
        teacher_feed_forwards(teacher, config.num_layers, config.feed_forward_size or 0)
    tied = is_tied(config, teacher)
    shape = LSTMConfig(
        vocab_size=teacher.vocab_size,
        embedding_size=width,
        **_body(config),
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


def build_classifier(
    config: StudentConfig,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    *,
    pooling: str,
    seed: int,
    transplant: bool,
    start_from: str | None = None,
) -> LSTMForSequenceClassification:
    """A student that classifies, its random parts drawn from `seed`, in fp32 on the CPU.

    With `transplant` its embedding is the teacher's, or that in its leading principal axes where it is narrower. With
    `start_from` all but the classifier is a distilled language model's; UserError where that is another kind of model
    or its sizes are not those of `config`.
    """
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: n for n, name in enumerate(classes)}}
    shape = {
        **_body(config),
        "pooling": pooling,
        "pad_token_id": tokenizer.pad_token_id,
        **labels,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if start_from is not None:
            return _started_from(start_from, config, shape)
        embedding: Any = teacher.get_input_embeddings()
        embedding_Vd = embedding.weight.detach()[: max(tokenizer.get_vocab().values()) + 1].float().cpu()
        width = config.embedding_size or embedding_Vd.shape[1]
        if transplant and width > embedding_Vd.shape[1]:
            raise UserError(
                f"student.embedding_size: expected at most the width of the teacher's embedding, "
                f"{embedding_Vd.shape[1]}, with student.transplant, found {width}"
            )
        student = LSTMForSequenceClassification(LSTMConfig(vocab_size=len(embedding_Vd), embedding_size=width, **shape))
    if transplant:
        if width < embedding_Vd.shape[1]:
            _, axes_dd = torch.linalg.eigh(embedding_Vd.t() @ embedding_Vd)
            embedding_Vd = embedding_Vd @ axes_dd.flip(-1)[:, :width]
        with torch.no_grad():
            student.model.embed_tokens.weight.copy_(embedding_Vd)
    return student


def _started_from(model: str, config: StudentConfig, shape: dict[str, Any]) -> LSTMForSequenceClassification:
    source = resolve_model(model, "classification.start_from")
    try:
        own: Any = AutoConfig.from_pretrained(source)
        if not isinstance(own, LSTMConfig):
            raise ValueError(f"it is a {own.model_type}, expected an LSTM language model of Potstill's")
        for name in (*ARCHITECTURE, "embedding_size"):
            wanted = getattr(config, name)
            if wanted != getattr(own, name) and not (name == "embedding_size" and wanted is None):
                raise ValueError(f"its {name} is {getattr(own, name)}, but student.{name} {wanted}")
        with without_load_report():
            loaded: Any = LSTMForSequenceClassification.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **shape
            )
        student, report = loaded
        if lost := sorted(name for name in report["missing_keys"] if not name.startswith("score.")):
            raise ValueError(f"weights missing: {', '.join(lost[:4])}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"classification.start_from: {model}: {reason}") from None
    return cast(LSTMForSequenceClassification, student)


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


class TeacherFeedForward(NamedTuple):
    """D (silu(G n) * U n), the gain of the norm before it multiplied into G and U."""

    gate_Fd: Tensor
    up_Fd: Tensor
    down_dF: Tensor


def teacher_feed_forwards(teacher: LanguageModel, blocks: int, size: int) -> list[TeacherFeedForward]:
    """For block i of N that of the teacher's layer i L / N, cut to its `size` units of the largest weights; in fp32.

    UserError for a teacher of another kind, or of fewer units. Collective where the teacher lies in shards.
    """
    config = teacher.model.config.get_text_config()
    try:
        layers: Any = teacher.model.base_model.get_submodule("layers")
        chosen = [layers[round((block + 1) * len(layers) / blocks) - 1] for block in range(blocks)]
        parts = [
            (layer.post_attention_layernorm.weight, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
            for layer in chosen
        ]
        if config.hidden_act != "silu" or any(part.bias is not None for _, *matrices in parts for part in matrices):
            raise AttributeError("silu without biases")
    except AttributeError:
        raise UserError(
            f"student.feed_forward_from: expected a teacher of Llama's kind (gate_proj, up_proj and down_proj without "
            f"biases, silu, an RMSNorm before), found {config.model_type}; use random"
        ) from None
    found = []
    for gain_d, *matrices in parts:
        gate_Fd, up_Fd, down_dF = (whole(part.weight).float() for part in matrices)
        gate_Fd, up_Fd = gate_Fd * whole(gain_d).float(), up_Fd * whole(gain_d).float()
        if size > len(gate_Fd):
            raise UserError(
                f"student.feed_forward_size: expected at most the teacher's {len(gate_Fd)} with feed_forward_from: "
                f"teacher, found {size}"
            )
        weight_F = gate_Fd.norm(dim=1) * up_Fd.norm(dim=1) * down_dF.norm(dim=0)
        kept_f = weight_F.topk(size).indices.sort().values
        found.append(TeacherFeedForward(gate_Fd[kept_f], up_Fd[kept_f], down_dF[:, kept_f]))
    return found


@torch.no_grad()
def transplant_feed_forward(student: LSTMForCausalLM, teacher: LanguageModel) -> None:
    """The teacher's feed-forward blocks in the coordinates of the student's residual stream.

    That is P times the teacher's, for the input projection P: what is added is multiplied by P, and what is read is
    turned back by the orthogonal matrix nearest to P's transpose, for a norm has taken the size away.
    """
    config, projection_Hd = student.config, student.model.input_projection.weight.float()
    left_Hr, _, right_rd = torch.linalg.svd(projection_Hd, full_matrices=False)
    turn_dH = (left_Hr @ right_rd).t() * (teacher.width / config.hidden_size) ** 0.5  # norms: sqrt(d), not sqrt(H)
    theirs = teacher_feed_forwards(teacher, config.num_layers, config.feed_forward_size or 0)
    for block, (gate_Fd, up_Fd, down_dF) in zip(student.model.layers, theirs, strict=True):
        mine: Any = block.get_submodule("feed_forward")
        mine.gate.weight.copy_(gate_Fd.to(turn_dH.device) @ turn_dH)
        mine.up.weight.copy_(up_Fd.to(turn_dH.device) @ turn_dH)
        mine.down.weight.copy_(projection_Hd @ down_dF.to(turn_dH.device))


@torch.no_grad()
def align_input(student: LSTMForCausalLM | LSTMForSequenceClassification, occurrences_V: Tensor) -> None:
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
