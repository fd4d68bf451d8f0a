"""What the fields of a recipe cannot be together: each function returns its problems, `FIELD: what to do` each.

A single section checks itself, in `distill/config.py`; here is what concerns several.
"""

from __future__ import annotations

import typing

from distill.config import HIDDEN_TERMS, EndpointConfig, Ramp, Recipe, Section, StageConfig, Term

# What a recipe with `classification` may set; what else there is, is for language models.
CLASSIFIER_TERMS = set(typing.get_args(Term)) - HIDDEN_TERMS
CLASSIFIER_FIELDS: dict[str, set[str] | None] = {
    "teacher": {"model", "revision", "dtype", "attn_implementation", "trust_remote_code"},
    "student": {
        *("cell", "hidden_size", "num_layers", "attention_window", "feed_forward_size"),
        *("embedding_size", "transplant", "align_input"),
        *("embedding_dropout", "input_dropout", "output_dropout", "variational_dropout", "recurrent_dropout"),
    },
    "corpus": {
        *("source", "name", "revision", "split", "text_field", "max_documents"),
        *("validation_fraction", "test_fraction"),
    },
    "stages": {
        *("name", "objective", "length", "temperature", "jsd_beta", "skew", "learning_rate", "schedule", "warmup"),
        *("final_learning_rate", "optimizer", "betas", "weight_decay", "freeze"),
    },
    "control": {"enabled", "match", "learning_rate", "schedule", "warmup", "optimizer"},
    "evaluation": {"every", "batch_tokens", "patience", "decode_seconds"},
    **{name: None for name in ("run", "classification", "fine_tuning", "augmentation", "tracking", "publishing")},
}


def contradictions(recipe: Recipe) -> list[str]:
    """All of them."""
    problems = []
    if not recipe.stages:
        problems.append("stages: at least one stage is needed")
    if recipe.run.micro_batch_size and recipe.run.batch_size % recipe.run.micro_batch_size:
        problems.append(
            f"run.batch_size ({recipe.run.batch_size}) must be a multiple of "
            f"run.micro_batch_size ({recipe.run.micro_batch_size})"
        )
    problems += _not_for_language_models(recipe) if recipe.classification is None else _not_for_classifiers(recipe)
    window = recipe.student.attention_window
    if recipe.classification is None and window is not None and window > recipe.corpus.block_length:
        problems.append(
            f"student.attention_window: expected at most corpus.block_length ({recipe.corpus.block_length}), "
            f"as far as gradients reach, found {window}"
        )
    if recipe.endpoint:
        problems += _against_endpoint(recipe, recipe.endpoint)
    problems += _against_writing(recipe)
    if recipe.augmentation and recipe.classification is None:
        problems += _against_augmentation(recipe)
    if recipe.other_teachers:
        problems += _against_other_teachers(recipe)
    if recipe.student.has_own_tokenizer:
        problems += _against_two_tokenizers(recipe)
    for number, stage in enumerate(recipe.stages):
        problems += _against_stage(recipe, stage, f"stages.{number}")
    return problems


def _against_stage(recipe: Recipe, stage: StageConfig, where: str) -> list[str]:
    """What a stage needs of the rest of the recipe."""
    problems: list[str] = []
    if recipe.student.tie_embeddings and len(stage.freeze & {"embedding", "head"}) == 1:
        problems.append(f"{where}.freeze: embedding and head are tied; freeze both or neither")
    kind, terms = recipe.targets.kind, set(stage.objective)
    if stage.hidden_terms and kind != "hidden":
        problems.append(f"{where}.objective: {', '.join(stage.hidden_terms)} needs targets.signal hidden, found {kind}")
    if "hidden_mse" in terms and recipe.student.embedding_size is not None and not recipe.student.transplant:
        problems.append(
            f"{where}.objective: hidden_mse needs the teacher's width or its directions; remove "
            "student.embedding_size or set student.transplant=true"
        )
    if "layer_mse" in terms and not recipe.student.is_fresh_lstm:
        problems.append(f"{where}.objective: layer_mse is for the LSTM; remove it, or student.model and config")
    if "layer_mse" in terms and recipe.targets.cache:
        problems.append(f"{where}.objective: layer_mse needs the live teacher; set targets.cache=false")
    if kind == "sampled" and (biased := terms - {"cross_entropy", "forward_kl"} - HIDDEN_TERMS):
        problems.append(
            f"{where}.objective: {', '.join(sorted(biased))} would be biased with "
            "targets.signal sampled, which serves forward_kl and cross_entropy"
        )
    if kind == "sampled" and stage.token_weights == "teacher_confidence":
        problems.append(
            f"{where}.token_weights: teacher_confidence needs the teacher's largest probability, which "
            "targets.signal sampled need not hold; choose teacher_entropy, or another signal"
        )
    if kind in ("top_k", "sampled") and stage.needs_teacher and stage.temperature != recipe.targets.temperature:
        problems.append(
            f"{where}.temperature: {_shown(stage.temperature)}, but targets.temperature is "
            f"{recipe.targets.temperature}; {kind} targets are taken at one temperature"
        )
    if stage.candidates is not None and terms <= HIDDEN_TERMS:
        problems.append(f"{where}.candidates: {', '.join(sorted(terms))} needs no logits; remove it")
    if stage.candidates is not None and stage.temperature != 1:
        problems.append(f"{where}.candidates: expected temperature 1, found {_shown(stage.temperature)}")
    if stage.candidates is not None and kind in ("top_k", "sampled") and stage.needs_teacher:
        problems.append(f"{where}.candidates: expected targets.signal hidden or dense, found {kind}")
    if stage.metric != "identity" and "hidden_mse" not in terms:
        problems.append(f"{where}.metric: {stage.metric} is for hidden_mse, which the objective does not have")
    if stage.student_written:
        problems += _against_student_written(recipe, stage, where)
    if stage.token_weights != "none" and (penalties := recipe.student.penalties):
        problems.append(
            f"{where}.token_weights: would weigh student.{', '.join(penalties)} as well; remove one of the two"
        )
    return problems


def _not_for_language_models(recipe: Recipe) -> list[str]:
    """What needs a `classification` section."""
    wanting = ["fine_tuning"] if recipe.fine_tuning is not None else []
    terms = ((f"stages.{n}.objective", stage.objective) for n, stage in enumerate(recipe.stages))
    wanting += [f"{where}: logit_mse" for where, objective in terms if "logit_mse" in objective]
    return [f"{what} is for classifiers; add a classification section or remove it" for what in wanting]


def _not_for_classifiers(recipe: Recipe) -> list[str]:
    """What a recipe with a `classification` section sets to no effect."""
    problems = []
    for section in Recipe.model_fields:
        allowed = CLASSIFIER_FIELDS.get(section, set())
        value = getattr(recipe, section)
        parts = dict(enumerate(value)) if isinstance(value, tuple) else {None: value}
        for number, part in parts.items():
            if allowed is None or not isinstance(part, Section):
                continue
            where = section if number is None else f"{section}.{number}"
            for name, field in type(part).model_fields.items():
                if name not in allowed and getattr(part, name) != field.default:
                    problems.append(f"{where}.{name}: is for language models, and this is a classifier; remove it")
    for number, stage in enumerate(recipe.stages):
        if others := sorted(set(stage.objective) - CLASSIFIER_TERMS):
            problems.append(
                f"stages.{number}.objective: {', '.join(others)} is for language models; a classifier has "
                + ", ".join(sorted(CLASSIFIER_TERMS))
            )
    for name in ("validation_fraction", "test_fraction"):
        given = name == "test_fraction" and recipe.classification is not None and recipe.classification.test_split
        if getattr(recipe.corpus, name) == 0 and not given:
            problems.append(f"corpus.{name}: expected more than 0, as a classifier is chosen and tested on it")
    return problems


def _against_two_tokenizers(recipe: Recipe) -> list[str]:
    """What cannot be had where the student has another tokenizer than the teacher."""
    problems = []
    if recipe.targets.kind != "top_k" and (recipe.targets.cache or any(stage.needs_teacher for stage in recipe.stages)):
        problems.append(
            f"targets.signal: expected top_k where the student has a tokenizer of its own, found "
            f"{recipe.targets.signal}"
        )
    if recipe.targets.temperature != 1:
        problems.append(
            f"targets.temperature: expected 1 where the student has a tokenizer of its own, found "
            f"{recipe.targets.temperature}"
        )
    if recipe.student.transplant and recipe.student.embedding_size is not None:
        problems.append(
            "student.embedding_size: with a tokenizer of its own, expected the teacher's width or "
            "student.transplant=false; remove one"
        )
    if recipe.corpus.streaming:
        problems.append("corpus.streaming: expected false where the student has a tokenizer of its own")
    if recipe.endpoint:
        problems.append("endpoint: expected none where the student has a tokenizer of its own")
    if recipe.other_teachers:
        problems.append("other_teachers: expected none where the student has a tokenizer of its own")
    if recipe.writing:
        problems.append("writing: expected none where the student has a tokenizer of its own")
    return problems


def _against_augmentation(recipe: Recipe) -> list[str]:
    """What changed copies of a language model's text cannot be made of, or would not be read by."""
    problems = []
    if not recipe.corpus.source:
        problems.append("augmentation: there is no corpus.source to make copies of; name one, or remove it")
    if recipe.corpus.streaming:
        problems.append("corpus.streaming: changed copies are not added to a stream; set streaming: false")
    if recipe.student.has_own_tokenizer:
        problems.append("augmentation: expected none where the student has a tokenizer of its own")
    return problems


def _against_endpoint(recipe: Recipe, endpoint: EndpointConfig) -> list[str]:
    """What a server's answers cannot serve."""
    targets, problems = recipe.targets, []
    if targets.kind != "top_k":
        problems.append(f"targets.signal: expected top_k with an endpoint, found {targets.signal}")
    if targets.temperature != 1:
        problems.append(f"targets.temperature: expected 1 with an endpoint, found {targets.temperature}")
    if not targets.cache:
        problems.append("targets.cache: expected true with an endpoint, whose answers are kept on disk")
    if recipe.student.vocabulary_min_count is not None:
        problems.append("student.vocabulary_min_count: an endpoint knows the whole vocabulary only; remove it")
    if recipe.teacher.context + 2 > endpoint.window:
        problems.append(
            f"endpoint.window: expected more than teacher.context ({recipe.teacher.context}) + 1, "
            f"found {endpoint.window}"
        )
    return problems


def _against_writing(recipe: Recipe) -> list[str]:
    """What stands in the way of text that the teacher writes, or is missing without it."""
    if recipe.writing is None:
        needed = "corpus.source: required, unless the teacher writes the text (writing)"
        return [] if recipe.corpus.source else [needed]
    problems = []
    if not recipe.corpus.source and recipe.corpus.validation_fraction == 0:
        problems.append("corpus.validation_fraction: expected more than 0 where the teacher writes all of the text")
    if recipe.writing.prompt_tokens and not recipe.corpus.source:
        problems.append(
            f"writing.prompt_tokens: {recipe.writing.prompt_tokens}, but there is no corpus.source to take prompts "
            "from; name one, or set 0"
        )
    if recipe.corpus.streaming:
        problems.append("corpus.streaming: written text is not added to a stream; set streaming: false")
    if recipe.endpoint:
        problems.append("writing: text is written by teacher.model, not by the endpoint; remove one of the two")
    return problems


def _against_student_written(recipe: Recipe, stage: StageConfig, where: str) -> list[str]:
    """What a stage in which the student writes needs of the rest of the recipe."""
    problems, lanes, length = [], recipe.run.batch_size, recipe.corpus.block_length
    if not recipe.student.is_fresh_lstm or recipe.student.has_own_tokenizer:
        problems.append(f"{where}.student_written: the student must be a fresh LSTM with the teacher's tokens; set 0")
    if recipe.endpoint:
        problems.append(
            f"{where}.student_written: the teacher behind an endpoint is not asked during training, and no cache has "
            "targets of text that is written then; set 0, or remove endpoint"
        )
    if not round(stage.student_written * lanes):
        problems.append(
            f"{where}.student_written: {stage.student_written} of {lanes} lanes (run.batch_size) is no whole lane"
        )
    if 0 < stage.student_written < 1 and round(stage.student_written * lanes) == lanes:
        problems.append(
            f"{where}.student_written: {stage.student_written} of {lanes} lanes (run.batch_size) is all of them; "
            "say 1, or less"
        )
    if stage.written_prompt >= length:
        problems.append(
            f"{where}.written_prompt: expected fewer than corpus.block_length ({length}) tokens, found "
            f"{stage.written_prompt}"
        )
    return problems


def _against_other_teachers(recipe: Recipe) -> list[str]:
    """What several teachers cannot serve."""
    targets, problems = recipe.targets, []
    if recipe.endpoint:
        problems.append("other_teachers: an endpoint answers for one teacher; remove one of the two")
    if targets.kind == "dense":
        problems.append("targets.signal: dense holds the logits of one teacher; with other_teachers take another")
    if targets.kind == "hidden" and targets.cache:
        problems.append(
            "targets.signal: hidden states in a cache are of one teacher; with other_teachers and targets.cache "
            "take top_k or sampled"
        )
    return problems


def _shown(value: float | Ramp) -> str:
    return f"a ramp from {value.start} to {value.end}" if isinstance(value, Ramp) else str(value)
