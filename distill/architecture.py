"""Which network a student is: our LSTM, or any causal model that the library knows.

`student.model` starts from weights, `student.config` from fresh ones of an architecture. Either trains in the same
loop, with the same losses, as the LSTM; what of it cannot work is refused here, before any work starts. The control of
both is the same architecture from fresh weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill.config import Recipe, StudentConfig, UserError
from distill.sharding import each_parameter
from distill.teacher import LanguageModel, load_language_model, resolve_model, wrap
from distill.transplant import build_student, take_over


def make_student(
    recipe: Recipe, teacher: LanguageModel, separator_id: int, *, control: bool = False
) -> PreTrainedModel:
    """The recipe's student, or its control, in fp32 on the CPU; its random parts are drawn from the run's seed.

    `teacher` is over the student's vocabulary. UserError for what cannot be trained as the recipe says.
    """
    config = recipe.student
    if config.is_fresh_lstm:
        transplant = config.transplant and not control
        return build_student(config, teacher, separator_id, seed=recipe.run.seed, transplant=transplant)
    if config.model and not control:
        network = _pretrained(config, teacher)
    else:
        network = _fresh(config, teacher.vocab_size, separator_id, recipe.run.seed)
    _check(wrap(network, teacher.tokenizer, str(config.model or config.config), "student"), recipe, teacher)
    if config.config and config.transplant and not control:
        take_over(network, teacher)
    return network


def _pretrained(config: StudentConfig, teacher: LanguageModel) -> PreTrainedModel:
    """A model's network without padding in its vocabulary, which must be that of the student's text."""
    assert config.model is not None
    loaded = load_language_model(
        config.model, device=torch.device("cpu"), dtype="fp32", revision=config.revision, role="student"
    )
    if loaded.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        whose, remedy = ("teacher's", f"set student.tokenizer={config.model} to align the two")
        if config.has_own_tokenizer:
            whose, remedy = (f"student.tokenizer {config.tokenizer}'s", "name the one that belongs to student.model")
        raise UserError(
            f"student.model: {config.model} has another vocabulary ({loaded.vocab_size} tokens) than the {whose} "
            f"({teacher.vocab_size}); {remedy}"
        )
    if not config.has_own_tokenizer and _is_same(loaded.model, teacher):
        raise UserError(
            f"student.model: {config.model} is the teacher itself, which has nothing to learn from it; name another "
            "model, or student.config for fresh weights"
        )
    cast(Any, loaded.model).resize_token_embeddings(teacher.vocab_size)
    return loaded.model


def _is_same(network: PreTrainedModel, teacher: LanguageModel) -> bool:
    """Whether all weights are the teacher's, up to its data type."""
    if teacher.lockstep:  # in shards
        return False
    ours, theirs = dict(each_parameter(network)), dict(each_parameter(teacher.model))
    if {name: p.shape for name, p in ours.items()} != {name: p.shape for name, p in theirs.items()}:
        return False
    return all(torch.equal(ours[name].to(p.device, p.dtype), p) for name, p in theirs.items())


def _fresh(config: StudentConfig, vocab_size: int, separator_id: int, seed: int) -> PreTrainedModel:
    """A network of an architecture, with random weights."""
    field = "model" if config.model else "config"
    name = str(config.model or config.config)
    source = resolve_model(name, f"student.{field}")
    try:
        known = AutoConfig.from_pretrained(source, revision=config.revision).to_dict()
        if strange := sorted(set(config.overrides) - set(known)):
            fields = ", ".join(sorted(n for n, v in known.items() if type(v) in (bool, int, float, str)))
            raise UserError(f"student.overrides: {name} has no {', '.join(strange)}; found {fields}")
        shape = AutoConfig.from_pretrained(source, revision=config.revision, **config.overrides)
        text = shape.get_text_config()
        text.vocab_size = vocab_size
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, token, separator_id)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        with torch.inference_mode():  # sizes that do not fit each other show here at the latest
            network.eval()(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"student.{field}: {name} {config.overrides or ''}: no causal model can be made of it: {reason} (expected "
            "a hub id or a folder with the config.json of one)"
        ) from None
    made: PreTrainedModel = network
    return made


def _check(student: LanguageModel, recipe: Recipe, teacher: LanguageModel) -> None:
    """UserError for a network that the losses or the blocks of this recipe do not fit."""
    if student.head.softcap is not None:
        raise UserError(
            f"student {student.name}: its logits have a softcap of {student.head.softcap}, through which the losses "
            "cannot go; choose another architecture"
        )
    window = recipe.teacher.context + recipe.corpus.block_length
    student.check_window(window, recipe.corpus.reset_at_documents, "student")
    tied = student.model.get_input_embeddings().weight is student.model.get_output_embeddings().weight
    for number, stage in enumerate(recipe.stages):
        if "hidden_mse" in stage.objective and student.width != teacher.width:
            raise UserError(
                f"stages.{number}.objective: hidden_mse compares outputs of one width, found {student.width} in the "
                f"student {student.name} and {teacher.width} in the teacher; use a divergence"
            )
        if tied and len(stage.freeze & {"embedding", "head"}) == 1:
            raise UserError(f"stages.{number}.freeze: embedding and head of {student.name} are tied; name both or none")
