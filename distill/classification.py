"""One run of a classifier from left to right: teacher, labelled text, soft targets, student, control, result.

    accelerate launch distill/run.py recipes/topics.yaml

After Tang et al. (2019, arXiv 1903.12136): the student learns the logits that a fine-tuned teacher gives to texts with
labels, to texts without, and to changed copies of both.

Legend: N texts, B texts of a batch, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.accuracy import Verdicts, gain, majority_accuracy
from distill.augment import Augmenter
from distill.classifier import check_ids, load_classifier, load_tokenizer, logits_of
from distill.classify import ClassifierTraining
from distill.config import Recipe, StageConfig, UserError
from distill.corpus import hash_tokenizer
from distill.labelled import NO_LABEL, Texts, Tokens, encode, load_labelled
from distill.loop import control_stage
from distill.progress import Progress, timed
from distill.result import versions
from distill.run_folder import claim_inputs, write_result
from distill.samples import latency
from distill.student import LSTMConfig, LSTMForSequenceClassification
from distill.teacher import hash_weights, resolve_model
from distill.tracking import Tracker
from distill.transplant import align_input, build_classifier
from distill.tuition import Tuition


class ClassificationJob:
    """A recipe with a `classification` section."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, tracker: Tracker) -> None:
        assert recipe.classification is not None
        self.recipe, self.config, self.accelerator, self.tracker = recipe, recipe.classification, accelerator, tracker
        self.wall_seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Carry it out; returns what stands in `result.json`."""
        recipe = self.recipe
        with timed(self.wall_seconds, "teacher_and_text"):
            self.text = load_labelled(recipe.corpus, self.config)
            with self.accelerator.main_process_first():
                self.teacher = load_classifier(
                    recipe.teacher, self.text.classes, recipe.fine_tuning, self.accelerator.device, recipe.run.seed
                )
            self._check_sizes()
            student = self._student()  # first: it may be refused
            if self.accelerator.is_main_process:
                network = self.teacher.network
                claim_inputs(
                    recipe.folder,
                    text=self.text.fingerprint,
                    tokenizer=hash_tokenizer(self.tokenizer),
                    dtype=str(network.dtype),
                    weights=hash_weights(network),
                )
        with timed(self.wall_seconds, "soft_targets"):
            tuition = Tuition(recipe, self.teacher, self.text, self.accelerator, self.tracker)
            self.soft = tuition.soft_targets(self.copies)
        with timed(self.wall_seconds, "student"):
            progress = self._train("student", student, recipe.stages)
        models = {"student": student}
        curves = {**({"teacher": self.soft.curve} if self.soft.curve else {}), "student": progress.points}
        if recipe.control.enabled:
            with timed(self.wall_seconds, "control"):
                models["control"] = self._control()
                control = self._train("control", models["control"], (control_stage(recipe, progress),))
            curves["control"] = control.points

        result: dict[str, Any] = {"name": recipe.run.name, "task": "classification", "seed": recipe.run.seed}
        with timed(self.wall_seconds, "evaluation"):
            result |= {"versions": versions(), **self._figures(models)}
        result["student"] |= {"tokens_trained": progress.now.tokens, "train_seconds": progress.now.seconds}
        result["student"]["teacher_seconds"] = progress.teacher_seconds
        if recipe.control.enabled:
            result["control"] |= {"tokens_trained": control.now.tokens, "train_seconds": control.now.seconds}
            result["control"]["match"] = recipe.control.match
        result["targets"] = {"kind": "logits", "texts": len(self.transfer), "seconds": self.soft.seconds}
        result |= {"wall_seconds": self.wall_seconds, "processes": self.accelerator.num_processes}
        result |= {"corpus": self._about_text(), "samples": [], "curves": curves}
        # The others have nothing left to do: none waits until everything is written, and perhaps published.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_result(recipe, result, models, self.tokenizer, self.tracker)
        return result

    def _check_sizes(self) -> None:
        """UserError where texts are longer than the teacher can read, or a batch larger than what it is drawn from."""
        recipe, labelled, limit = self.recipe, self.labelled_texts, self.teacher.longest_text
        if self.config.max_length > limit:
            raise UserError(
                f"classification.max_length: expected at most the {limit:.0f} tokens that teacher {self.teacher.name} "
                f"can read, found {self.config.max_length}"
            )
        every = len(self.text.train) * (1 + (recipe.augmentation.copies if recipe.augmentation else 0))
        on_labels = recipe.control.enabled or not all(stage.needs_teacher for stage in recipe.stages)
        batches = [("run", recipe.run.batch_size, labelled if on_labels else every)]
        if recipe.fine_tuning:
            batches.append(("fine_tuning", recipe.fine_tuning.batch_size, labelled))
        for section, size, texts in batches:
            if not self.accelerator.num_processes <= size <= texts:
                raise UserError(
                    f"{section}.batch_size: expected at least the processes ({self.accelerator.num_processes}) and at "
                    f"most the texts that it is drawn from ({texts:,}), found {size}"
                )

    @property
    def labelled_texts(self) -> int:
        return int((self.text.train.labels_N != NO_LABEL).sum())

    # ---------------------------------------------------------------- what the student learns from

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's: the teacher's, unless it starts from a model that has its own."""
        if self.config.start_from is None:
            return self.teacher.tokenizer
        where = "classification.start_from"
        return load_tokenizer(resolve_model(self.config.start_from, where), f"{where}: {self.config.start_from}")

    @cached_property
    def copies(self) -> list[str]:
        """Changed copies of the training texts, of those without a label too."""
        config, texts = self.recipe.augmentation, self.text.train.texts
        if config is None:
            return []
        shared = hash_tokenizer(self.tokenizer) == hash_tokenizer(self.teacher.tokenizer)
        mask = self.teacher.tokenizer.mask_token if shared else None  # another tokenizer would spell it out
        augmenter = Augmenter(config, texts, mask, self.recipe.run.seed)
        return [
            augmenter.copy(text, number, copy, self.config.max_length)
            for copy in range(config.copies)
            for number, text in enumerate(texts)
        ]

    @cached_property
    def transfer(self) -> Tokens:
        """What the student trains on, in its tokens: the training texts, then the copies."""
        return encode(self.tokenizer, [*self.text.train.texts, *self.copies], self.config.max_length)

    @cached_property
    def tokens(self) -> dict[str, Tokens]:
        """What it is measured on."""
        sides = {"validation": self.text.validation, "test": self.text.test}
        return {side: encode(self.tokenizer, texts.texts, self.config.max_length) for side, texts in sides.items()}

    # ---------------------------------------------------------------- student and control

    def _student(self) -> LSTMForSequenceClassification:
        return self._build(self.recipe.student.transplant, self.config.start_from)

    def _control(self) -> LSTMForSequenceClassification:
        """The same from random weights."""
        if self.config.start_from is None:
            return self._build(False, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.run.seed)
            return LSTMForSequenceClassification(cast(LSTMConfig, copy.deepcopy(self._student().config)))

    def _build(self, transplant: bool, start_from: str | None) -> LSTMForSequenceClassification:
        student = build_classifier(
            self.recipe.student,
            self.teacher.network,
            self.tokenizer,
            self.text.classes,
            pooling=self.config.pooling,
            seed=self.recipe.run.seed,
            transplant=transplant,
            start_from=start_from,
        )
        if start_from is not None:
            check_ids(self.tokenizer, student.config.vocab_size, f"classification.start_from: {start_from}")
        return student

    def _train(self, name: str, student: LSTMForSequenceClassification, stages: tuple[StageConfig, ...]) -> Progress:
        """Train the student on the transfer set, or its control on the labels."""
        recipe, tokens, is_control = self.recipe, self.transfer, name == "control"
        labels_N = np.full(len(tokens), NO_LABEL)
        labels_N[: len(self.text.train)] = self.text.train.labels_N
        teacher_NC = torch.cat([self.soft.texts_NC[self.text.places["train"]], self.soft.copies_NC])
        begin_with: Callable[[], object] = lambda: None  # noqa: E731
        if recipe.student.align_input and (is_control or self.config.start_from is None):
            counts_V = np.bincount(np.concatenate(tokens.ids), minlength=student.config.vocab_size)
            begin_with = partial(align_input, student, torch.from_numpy(counts_V).to(self.accelerator.device))
        training = ClassifierTraining(
            name, recipe=recipe, stages=stages, student=student, validate=partial(self._verdicts, "validation"),
            accelerator=self.accelerator, tracker=self.tracker, tokens=tokens, labels_N=labels_N,
            teacher_NC=None if is_control else teacher_NC,
            teacher_seconds=0.0 if is_control else self.soft.seconds, begin_with=begin_with,
        )  # fmt: skip
        return training.run()

    def _verdicts(self, side: str, network: PreTrainedModel) -> Verdicts:
        """What a student says of a side, beside the labels and the teacher's word."""
        tokens, device = self.tokens[side], self.accelerator.device
        network.eval()

        def ask(rows_B: np.ndarray) -> Tensor:
            ids_BT, mask_BT = (part.to(device) for part in tokens.batch(rows_B))
            return cast(Tensor, cast(Any, network)(input_ids=ids_BT, attention_mask=mask_BT).logits)

        batch_tokens = self.recipe.evaluation.batch_tokens
        said_NC = logits_of(ask, tokens, len(self.text.classes), self.accelerator, batch_tokens)
        return Verdicts(said_NC, self._labels(side), self.soft.texts_NC[self.text.places[side]])

    def _labels(self, side: str) -> Tensor:
        texts: Texts = getattr(self.text, side)
        return torch.from_numpy(texts.labels_N)

    # ---------------------------------------------------------------- the result

    def _figures(self, models: dict[str, LSTMForSequenceClassification]) -> dict[str, Any]:
        """Teacher, student and control on the test texts, and the time that one of these takes them."""
        verdicts = {"teacher": Verdicts(self.soft.texts_NC[self.text.places["test"]], self._labels("test"))}
        verdicts |= {name: self._verdicts("test", network) for name, network in models.items()}
        networks = {"teacher": self.teacher.network, **models}
        ids = {name: self.tokens["test"].ids for name in models}
        ids["teacher"] = encode(self.teacher.tokenizer, self.text.test.texts, self.config.max_length).ids
        found: dict[str, Any] = {"classes": list(self.text.classes)}
        for name, said in verdicts.items():
            sizes = [(p.numel(), p.element_size()) for p in networks[name].parameters()]
            found[name] = {
                **said.as_dict(),
                "parameters": sum(count for count, _ in sizes),
                "weight_bytes": sum(count * size for count, size in sizes),
                **latency(networks[name], ids[name], self.recipe.evaluation.decode_seconds),
            }
        found["teacher"]["model"] = self.recipe.teacher.model
        found["speedup"] = found["teacher"]["latency_ms_p50"] / found["student"]["latency_ms_p50"]
        found["majority_accuracy"] = majority_accuracy(self.text.test.labels_N, self.text.train.labels_N)
        if "control" in verdicts:
            found |= gain(verdicts["student"], verdicts["control"])
        return found

    def _about_text(self) -> dict[str, Any]:
        return {
            "fingerprint": self.text.fingerprint,
            "train_texts": self.labelled_texts,
            "unlabelled_texts": len(self.text.train) - self.labelled_texts,
            "copies": len(self.copies),
            "validation_texts": len(self.text.validation),
            "test_texts": len(self.text.test),
        }
