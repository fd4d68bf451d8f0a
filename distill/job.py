"""One run from left to right: teacher, text, student, its control, evaluation, result, publishing.

Every part can be stopped and taken up again by the same command: the tokenised text and a converted
teacher lie in the cache, both trainings have checkpoints, and a run that is complete is only shown.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from transformers import PreTrainedModel

from distill.alignment import AlignedTeacher
from distill.architecture import make_student
from distill.classification import ClassificationJob
from distill.config import CorpusConfig, Recipe, UserError
from distill.corpus import Blocks, Corpus, Split, hash_tokenizer, lane_order, load_corpus, separator_id
from distill.ensemble import load_teachers
from distill.loop import control_stage
from distill.metrics import Documents, Reference, Score, build_reference, reading_window, score, score_reference
from distill.progress import timed
from distill.result import check_files, compare, print_result, read_result, versions
from distill.run_folder import claim_folder, claim_inputs, publish_once, write_result
from distill.samples import continuations, decode_speed
from distill.sharding import requested_engine
from distill.stages import check_stages
from distill.stream import BlockStream
from distill.student import LSTMForCausalLM
from distill.targets import (
    CachedBesideLive,
    CachedTargets,
    LiveTargets,
    Targets,
    cached_blocks,
    make_encoding,
    open_targets,
)
from distill.teacher import LanguageModel, hardware_has_bf16, resolve_model, wrap
from distill.tokenizer import student_tokenizer
from distill.tracking import Tracker
from distill.train import Training, micro_batch_size
from distill.vocabulary import trim_tokenizer
from distill.writing import text_of, write_text
from distill.written import TEXT_FIELD, WrittenText

logger = logging.getLogger(__name__)
PATIENCE = timedelta(hours=6)  # with a process that tokenises a long text, or waits for another job's cache


def run(recipe: Recipe) -> dict[str, Any]:
    """Carry out a recipe; returns what stands in `result.json`."""
    accelerator = start_accelerator(recipe)
    try:
        claim_folder(recipe, accelerator)
        if (recipe.folder / "result.json").is_file():
            result = read_result(recipe.folder)
            if accelerator.is_main_process:
                logger.info("%s is complete already; choose another run.name to run it anew", recipe.folder)
                check_files(recipe.folder, result)
                print_result(result, recipe.folder)
                publish_once(recipe, result)
            return result
        tracker = Tracker(accelerator, recipe)
        try:
            job = _Job if recipe.classification is None else ClassificationJob
            return job(recipe, accelerator, tracker).run()
        finally:
            tracker.finish()
    finally:
        leave(accelerator)


class _Job:
    def __init__(self, recipe: Recipe, accelerator: Accelerator, tracker: Tracker) -> None:
        self.recipe, self.accelerator, self.tracker = recipe, accelerator, tracker
        self.wall_seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        recipe = self.recipe
        with timed(self.wall_seconds, "teacher_and_text"):
            parts = TeacherAndText(recipe, self.accelerator)
            teacher, corpus = parts.teacher, parts.corpus  # over the student's vocabulary
            weights = parts.whole_teachers.weights_hash  # by all processes, where a teacher is spread over them
            if self.accelerator.is_main_process:
                claim_inputs(
                    recipe.folder,
                    text=parts.whole_corpus.fingerprint,
                    tokenizer=hash_tokenizer(teacher.tokenizer),
                    dtype=str(parts.whole_teacher.model.dtype),
                    weights=weights,
                )
            lanes, seed = recipe.run.batch_size, recipe.run.seed
            lane_order(len(parts.cached_blocks), lanes, epoch=0, seed=seed)  # UserError, before targets, if too short
            if parts.has_more_text and recipe.control.enabled and isinstance(parts.text_of_source, Blocks):
                # UserError where the control would have too little text
                lane_order(len(parts.text_of_source), lanes, epoch=0, seed=seed)
            network = make_student(recipe, teacher, corpus.separator_id)
        with timed(self.wall_seconds, "teacher_validation"):
            validator = Validator(recipe, parts, self.accelerator)
        with timed(self.wall_seconds, "targets"):
            cached = parts.cached_targets() if recipe.targets.cache else None
            targets = parts.targets(cached)
        written = parts.written.figures() if parts.written else None
        shared: dict[str, Any] = {
            "recipe": recipe,
            "teacher": teacher,
            "validate": validator,
            "accelerator": self.accelerator,
            "tracker": self.tracker,
        }

        with timed(self.wall_seconds, "student"):
            training = Training(
                "student", stages=recipe.stages, student=network, blocks=parts.text, targets=targets, **shared,
                blocks_with_targets=parts.cached_blocks if recipe.targets.cache else None,
                transplant=recipe.student.transplant,
                seconds_before=written["seconds"] / self.accelerator.num_processes if written else 0.0,
            )  # fmt: skip
            progress = training.run()
        curves = {"student": progress.points}
        students = {"student": network}
        if recipe.control.enabled:
            with timed(self.wall_seconds, "control"):
                network = make_student(recipe, teacher, corpus.separator_id, control=True)
                control = Training(
                    "control", stages=(control_stage(recipe, progress),), student=network,
                    blocks=parts.text_of_source,
                    validate_at_tokens=progress.now.tokens, **shared,
                )  # fmt: skip
                control_progress = control.run()
            curves["control"] = control_progress.points
            students["control"] = network

        result: dict[str, Any] = {"name": recipe.run.name, "seed": recipe.run.seed, "versions": versions()}
        with timed(self.wall_seconds, "evaluation"):
            models = {"teacher": teacher}
            scores = {"teacher": validator.teacher_score}
            for name, network in students.items():
                models[name] = wrap(network, teacher.tokenizer, name)
                scores[name] = validator(network)
            # The network behind a trimmed teacher speaks in its own tokens.
            models["teacher"], separators = parts.whole_teacher, {"teacher": parts.whole_corpus.separator_id}
            for name, model in models.items():
                separator = separators.get(name, corpus.separator_id)
                result[name] = {**scores[name].as_dict(), **self._size_and_speed(model, separator)}
            if parts.vocabulary:
                whole = validator.score_teacher(parts.whole_teacher, parts.whole_corpus.validation)
                result["vocabulary"] = {**parts.vocabulary, "whole_teacher": whole.as_dict()}
            if isinstance(teacher, AlignedTeacher):
                result["tokenizer"] = teacher.figures()
            result["teacher"]["model"] = recipe.teacher.model
            result["samples"] = self._samples(models["student"], corpus.separator_id)
        result["student"]["tokens_trained"] = progress.now.tokens
        result["student"]["train_seconds"] = progress.now.seconds
        result["student"]["teacher_seconds"] = progress.teacher_seconds
        if progress.on_policy_seconds:
            result["student"]["writing_seconds"] = progress.writing_seconds
            result["student"]["writing_share"] = progress.writing_seconds / progress.on_policy_seconds
        if written:
            result["written"] = written
        result["targets"] = {"kind": targets.encoding.kind, "cached": cached is not None}
        if cached is not None:
            result["targets"] |= {"seconds": cached.seconds, "bytes_per_token": cached.bytes_per_token}
            result["targets"]["manifest"] = cached.manifest["identity"]
        if recipe.endpoint:
            result["targets"]["served"] = recipe.endpoint.model
        if recipe.other_teachers:
            result["targets"]["teachers"] = parts.teachers.name
        if recipe.control.enabled:
            result["control"]["tokens_trained"] = control_progress.now.tokens
            result["control"]["train_seconds"] = control_progress.now.seconds
            result["control"]["match"] = recipe.control.match
            result.update(compare(curves["student"], curves["control"]))
        result["wall_seconds"] = self.wall_seconds
        result["processes"] = self.accelerator.num_processes
        result["corpus"] = {
            "fingerprint": corpus.fingerprint,
            "streaming": recipe.corpus.streaming,  # then the figures are those of the sample
            "train_tokens": len(corpus.train.tokens),
            "train_documents": len(corpus.train),
            "validation_documents": len(validator.documents.tokens),
        }
        result["curves"] = curves
        # The others have nothing left to do: none waits until everything is written, and perhaps published.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_result(recipe, result, students, teacher.tokenizer, self.tracker)
        return result

    def _size_and_speed(self, model: LanguageModel, separator_id: int) -> dict[str, float | int | None]:
        """Shards decode as fast as the network between them: no speed of the model."""
        seconds = self.recipe.evaluation.decode_seconds
        return {
            "parameters": model.parameters,
            "weight_bytes": model.weight_bytes,
            "decode_tokens_per_second": None if model.lockstep else decode_speed(model, separator_id, seconds),
        }

    def _samples(self, model: LanguageModel, separator_id: int) -> list[dict[str, str]]:
        evaluation = self.recipe.evaluation
        return continuations(model, evaluation.prompts, separator_id, evaluation.new_tokens, self.recipe.run.seed)


class TeacherAndText:
    """What every job begins with: the teacher, the text in its tokens, and blocks of it. Collective."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        if recipe.classification is not None:
            raise UserError(f"{recipe.run.name}: this command is for language models, and the recipe is a classifier's")
        self.recipe, self.accelerator = recipe, accelerator
        sharded = requested_engine() is not None  # then loading is collective, and only converting a file is not
        if sharded:
            with accelerator.main_process_first():
                resolve_model(recipe.teacher.model, "teacher")
        with nullcontext() if sharded else accelerator.main_process_first():
            self.teachers = load_teachers(recipe, accelerator.device)
            # How many of its tokens a block in another tokenizer's are, its text decides: see `_align`.
            block = 1 if recipe.student.has_own_tokenizer else recipe.corpus.block_length
            self.teachers.check_window(recipe.teacher.context + block, packed=recipe.corpus.reset_at_documents)
        self.written: WrittenText | None = None
        if recipe.writing is not None:
            # What would be refused after hours of writing is refused now.
            check_stages(recipe, self.teacher)
            make_encoding(recipe.targets, self.teacher.vocab_size)
            make_student(recipe, self.teacher, separator_id(self.teacher.tokenizer, recipe.corpus.separator))
            prompts = self._load(recipe.corpus) if recipe.corpus.source else None
            self.written = write_text(recipe, self.teacher, prompts, accelerator)
        self.corpus = self._corpus()
        self.whole_teachers, self.whole_teacher, self.whole_corpus = self.teachers, self.teacher, self.corpus
        self.vocabulary: dict[str, int] = {}  # what was kept and cut, if anything
        if recipe.student.vocabulary_min_count is not None:
            self._trim_vocabulary(recipe.student.vocabulary_min_count)
        if recipe.student.has_own_tokenizer:
            self._align()
        check_stages(recipe, self.teacher)
        self.encoding = make_encoding(recipe.targets, self.teacher.vocab_size)
        if any("layer_mse" in stage.objective for stage in recipe.stages):
            if isinstance(self.teacher.model, LSTMForCausalLM):
                raise UserError("stages.objective: layer_mse needs a Transformer's layers, found an LSTM as teacher")
            blocks, depth = recipe.student.num_layers, self.teacher.model.config.get_text_config().num_hidden_layers
            layers = tuple(round((block + 1) * depth / blocks) for block in range(blocks))
            self.encoding = replace(self.encoding, layers=layers)
        self.blocks = Blocks(
            self.corpus.train, recipe.corpus.block_length, recipe.teacher.context, recipe.corpus.reset_at_documents
        )
        self.cached_blocks = cached_blocks(self.blocks, recipe.targets.max_tokens)

    @property
    def teacher(self) -> LanguageModel:
        """The first teacher, or the only one."""
        return self.teachers.first

    @cached_property
    def text(self) -> Blocks | BlockStream:
        """What is trained on: the blocks, or the stream that begins with them."""
        recipe = self.recipe
        if not recipe.corpus.streaming:
            return self.blocks
        return BlockStream(
            recipe.corpus,
            self.teacher.tokenizer,
            self.corpus,
            self.blocks,
            lanes=recipe.run.batch_size,
            seed=recipe.run.seed,
            accelerator=self.accelerator,
        )

    @property
    def has_more_text(self) -> bool:
        """Whether what the teacher wrote, or changed copies, stand beside the corpus."""
        recipe = self.recipe
        return bool(recipe.corpus.source) and (recipe.writing is not None or recipe.augmentation is not None)

    @cached_property
    def text_of_source(self) -> Blocks | BlockStream:
        """What a training without a teacher may read: what the corpus has, unless there is nothing but written text."""
        recipe = self.recipe
        if not self.has_more_text:
            return self.text
        corpus = recipe.corpus
        split = self._load(corpus).train
        return Blocks(split, corpus.block_length, recipe.teacher.context, corpus.reset_at_documents)

    def _corpus(self) -> Corpus:
        """The text of the recipe, with what the teacher wrote and with changed copies."""
        recipe, written = self.recipe, None
        if self.written is not None and recipe.corpus.source:
            written = CorpusConfig(source=str(self.written.folder), text_field=TEXT_FIELD)
        return self._load(text_of(recipe), written=written, augmentation=recipe.augmentation)

    def _load(self, config: CorpusConfig, **more: Any) -> Corpus:
        main = self.accelerator.is_main_process
        with self.accelerator.main_process_first():
            return load_corpus(config, self.teacher.tokenizer, **more, progress=main)

    def _trim_vocabulary(self, min_count: int) -> None:
        """Go on with a part of the vocabulary, in teacher and text; the whole ones are kept to be compared with."""
        whole = self.whole_corpus
        occurrences = whole.train.occurrences(self.teacher.vocab_size)
        trimmed = trim_tokenizer(self.teacher.tokenizer, occurrences, min_count)
        self.teachers = self.teachers.trimmed(trimmed.tokenizer, trimmed.teacher_ids_V)
        self.corpus = self._corpus()
        self.vocabulary = {"min_count": min_count, **trimmed.counts}
        for side in ("train", "validation", "test"):
            self.vocabulary[f"{side}_tokens_before"] = len(getattr(whole, side).tokens)
            self.vocabulary[f"{side}_tokens"] = len(getattr(self.corpus, side).tokens)

    def _align(self) -> None:
        """Go on in the student's own tokens, in teacher and text; the whole ones are kept to be compared with."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        with self.accelerator.main_process_first():
            tokenizer = student_tokenizer(recipe.student, recipe.corpus, self.teacher.tokenizer, progress=main)
            config = recipe.corpus
            if config.separator not in tokenizer.get_vocab():  # it then starts documents with its own
                config = config.model_copy(update={"separator": None})
            self.corpus = load_corpus(config, tokenizer, progress=main)
        self.teachers = AlignedTeacher.of(self.teacher, tokenizer, self.corpus, self.whole_corpus, recipe)

    def targets(self, cached: CachedTargets | None) -> Targets:
        """From the cache, where there is one, or the live teacher; from both where the student writes some text."""
        live = LiveTargets(self.teachers, self.encoding)
        if cached is None:
            return live
        return CachedBesideLive(cached, live) if any(stage.student_written for stage in self.recipe.stages) else cached

    def cached_targets(self, verify: bool = False) -> CachedTargets:
        """The recipe's cache, built as far as it is missing."""
        return open_targets(
            self.recipe.targets,
            self.teachers,
            self.corpus,
            self.cached_blocks,
            self.accelerator,
            batch_tokens=self.recipe.evaluation.batch_tokens,
            cache_dir=self.recipe.corpus.cache_dir,
            endpoint=self.recipe.endpoint,
            verify=verify,
        )


class Validator:
    """Scores a student on the validation documents, each process its share, against the teacher's stored states.

    A teacher with another tokenizer reads the same documents, and says nothing about the student's tokens.
    """

    def __init__(self, recipe: Recipe, parts: TeacherAndText, accelerator: Accelerator) -> None:
        corpus, teacher = parts.corpus, parts.teacher
        self.evaluation, self.accelerator, self.tokenizer = recipe.evaluation, accelerator, teacher.tokenizer
        self.documents = select_documents(corpus.validation, recipe.evaluation.max_tokens)
        if len(self.documents.tokens) < accelerator.num_processes:
            raise UserError(
                f"evaluation.max_tokens: {recipe.evaluation.max_tokens} leave {len(self.documents.tokens)} validation "
                f"documents for {accelerator.num_processes} processes; expected one for each"
            )
        self.share = self._share_of(self.documents)
        self.reference: Reference | None = None
        if isinstance(teacher, AlignedTeacher):
            teacher = teacher.own
            self.teacher_score = self.score_teacher(teacher, parts.whole_corpus.validation)
        else:
            self.reference = self._read(teacher, self.share)
            self.teacher_score = self._over_all(score_reference(self.reference, self.share))
        uniform = torch.tensor(float(teacher.vocab_size)).log().item()
        if not self.teacher_score.nll_nats <= uniform + 1:
            raise UserError(
                f"teacher {teacher.name}: its validation loss is {self.teacher_score.nll_nats:.2f} nats a token, far "
                f"worse than a guess among {teacher.vocab_size} tokens ({uniform:.2f}); its tokenizer and head do not "
                "belong together, or the text is none of its kind"
            )

    def __call__(self, student: PreTrainedModel) -> Score:
        student.eval()
        model = wrap(student, self.tokenizer, "student")
        window, context = reading_window(model, self.evaluation)
        local = score(
            model,
            self.share,
            window=window,
            context=context,
            batch_tokens=self.evaluation.batch_tokens,
            reference=self.reference,
        )
        return self._over_all(local)

    def score_teacher(self, teacher: LanguageModel, split: Split) -> Score:
        """The score of another teacher on the same documents, `split` being the same text in its tokens."""
        share = self._share_of(_documents(split, range(len(self.documents.tokens))))
        return self._over_all(score_reference(self._read(teacher, share), share))

    def _share_of(self, documents: Documents) -> Documents:
        return _share(documents, self.accelerator.process_index, self.accelerator.num_processes)

    def _read(self, teacher: LanguageModel, share: Documents) -> Reference:
        window, context = reading_window(teacher, self.evaluation)
        batch_tokens = self.evaluation.batch_tokens
        with teacher.together():
            return build_reference(teacher, share, window=window, context=context, batch_tokens=batch_tokens)

    def _over_all(self, local: Score) -> Score:
        """Sums over processes."""
        if self.accelerator.num_processes == 1:
            return local
        sums = [local.nll_sum_nats, local.tokens, local.utf8_bytes, local.words]
        sums += [local.kl_sum_nats or 0.0, local.top1_matches or 0]
        total = self.accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=self.accelerator.device), "sum")
        nll, tokens, utf8_bytes, words, kl, matches = total.tolist()
        compared = local.kl_sum_nats is not None
        return Score(
            nll_sum_nats=nll,
            tokens=int(tokens),
            utf8_bytes=int(utf8_bytes),
            words=int(words),
            kl_sum_nats=kl if compared else None,
            top1_matches=int(matches) if compared else None,
        )


def select_documents(split: Split, max_tokens: int | None) -> Documents:
    """The first whole documents of a split that fit into `max_tokens` targets, at least one."""
    chosen: list[int] = []
    total = 0
    for number in range(len(split)):
        size = len(split.document(number)) - 1
        if chosen and max_tokens is not None and total + size > max_tokens:
            break
        chosen.append(number)
        total += size
    return _documents(split, chosen)


def _documents(split: Split, chosen: Sequence[int]) -> Documents:
    numbers = list(chosen)
    return Documents([split.document(n) for n in numbers], split.utf8_bytes[numbers], split.words[numbers])


def _share(documents: Documents, process: int, processes: int) -> Documents:
    """About as many tokens for each process, so that none waits for another: the longest first, to who has least."""
    sizes = [len(tokens) for tokens in documents.tokens]
    load, mine = [0] * processes, []
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        least = load.index(min(load))
        load[least] += sizes[number]
        if least == process:
            mine.append(number)
    mine.sort()
    return Documents([documents.tokens[n] for n in mine], documents.utf8_bytes[mine], documents.words[mine])


def start_accelerator(recipe: Recipe) -> Accelerator:
    torch.set_flush_denormal(True)  # saturated LSTM gates make denormals, which are slow on CPUs
    _keep_freed_memory()
    requested_engine()  # first: what accelerate's launcher asks for is the teacher's, not the student's
    _meet_after_restart()
    log_with = "wandb" if recipe.tracking.tracker == "wandb" else None
    precision = recipe.run.precision
    if precision == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = "bf16" if hardware_has_bf16(device) else "fp32"
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=log_with,
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise UserError(
            f"launched as one of {world} processes, but accelerate sees {accelerator.num_processes}; several on "
            "a CPU are started by python -m distill.launch --processes N RECIPE"
        )
    # A launcher that sets one thread for one process (accelerate does) would leave the other cores idle.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(recipe.run.threads or max(1, cores // local))
    set_seed(recipe.run.seed)
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.getLogger("distill").setLevel(level)
    transformers.utils.logging.disable_progress_bar()  # it would draw one for every checkpoint; downloads keep theirs
    micro_batch_size(recipe, accelerator.num_processes)
    return accelerator


def _meet_after_restart() -> None:
    """Where torchrun has started this process anew, form the process group under keys of this attempt.

    With a static rendezvous, accelerate's default, torchrun keeps one store for all attempts (torch 2.13): processes
    would find the addresses of those that died, and wait for them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return
    store, rank, world_size = next(torch.distributed.rendezvous("env://"))
    own = torch.distributed.PrefixStore(f"attempt-{attempt}", store)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # accelerate takes it over
    torch.distributed.init_process_group(store=own, rank=rank, world_size=world_size, timeout=PATIENCE)


def _keep_freed_memory() -> None:
    """Have glibc keep the memory it has freed instead of giving it back to the system at every large tensor.

    A step frees and takes again hundreds of megabytes of logits, and fresh pages are zeroed one by one: without
    this, subtracting two (512, 49152) matrices takes ten times as long, and a step with a trained head 1.6 times.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4  # names of malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def leave(accelerator: Accelerator) -> None:
    """Take the process group down in order; gloo otherwise often aborts at exit although all work is done."""
    accelerator.free_memory()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
