"""A classifying teacher's part of a run: it is fine-tuned where it must be, and says what it makes of every text.

The fine-tuned teacher lies in `RUN/teacher`, its logits in `RUN/soft_targets`; a run that goes on takes them there.

Legend: N texts, B texts of a batch, C classes.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.accuracy import Verdicts
from distill.checkpoint import write_atomically
from distill.classifier import Ask, Classifier, Recall, logits_of, train_upper
from distill.classify import ClassifierTraining
from distill.config import FineTuningConfig, Recipe, StageConfig
from distill.labelled import NO_LABEL, LabelledText, Tokens, encode
from distill.progress import Progress
from distill.sealed import damage, write_checksums
from distill.tracking import Tracker

logger = logging.getLogger(__name__)
LOGITS, ABOUT, TUNED = "logits.safetensors", "about.json", "fine_tuning.json"


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's logits of all texts as they are, and of copies, and what it took to get them."""

    texts_NC: Tensor
    copies_NC: Tensor
    seconds: float  # fine-tuning included
    curve: list[dict[str, Any]]  # of the fine-tuning

    @classmethod
    def read(cls, folder: Path) -> SoftTargets | None:
        """From a folder; None where there are none, or they are damaged."""
        if not folder.is_dir():
            return None
        try:
            if problem := damage(folder):
                raise ValueError(problem)
            tensors = load_file(folder / LOGITS)
            return cls(tensors["texts_NC"], tensors["copies_NC"], **json.loads((folder / ABOUT).read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("%s: damaged (%s) and asked for again", folder, error)
            return None

    def write(self, folder: Path) -> None:
        """Into a folder, atomically."""

        def save(path: Path) -> None:
            path.mkdir()
            save_file({"texts_NC": self.texts_NC, "copies_NC": self.copies_NC}, path / LOGITS)
            about = {"seconds": self.seconds, "curve": self.curve}
            (path / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
            write_checksums(path)

        write_atomically(folder, save)


class Tuition:
    """What a teacher goes through in a run, over the texts of `text` and changed copies of some. Collective."""

    def __init__(
        self, recipe: Recipe, teacher: Classifier, text: LabelledText, accelerator: Accelerator, tracker: Tracker
    ) -> None:
        assert recipe.classification is not None
        self.recipe, self.teacher, self.text = recipe, teacher, text
        self.accelerator, self.tracker = accelerator, tracker
        self.max_length = recipe.classification.max_length
        self.tuned, self.stored = recipe.folder / "teacher", recipe.folder / "soft_targets"
        self.tokens = encode(teacher.tokenizer, text.all, self.max_length)

    def soft_targets(self, copies: Sequence[str]) -> SoftTargets:
        """Those that lie in the run folder, else asked of the teacher, which is fine-tuned afterwards in any case."""
        fine_tuning = self.recipe.fine_tuning
        self.accelerator.wait_for_everyone()
        if (soft := SoftTargets.read(self.stored)) and not (fine_tuning and damage(self.tuned)):
            if fine_tuning:
                self._take_tuned()
            return soft
        seconds, curve, recall = 0.0, [], None
        if fine_tuning:
            recall = self._recall(fine_tuning)
            about = self._fine_tune(fine_tuning, recall)
            seconds, curve = about["seconds"], about["curve"]
        began = time.perf_counter()
        texts_NC = self._logits(self.tokens, self._ask(self.tokens, recall), "teacher, texts")
        changed = encode(self.teacher.tokenizer, copies, self.max_length)
        copies_NC = self._logits(changed, self._ask(changed), "teacher, copies")
        soft = SoftTargets(texts_NC, copies_NC, seconds + time.perf_counter() - began, curve)
        if self.accelerator.is_main_process:
            soft.write(self.stored)
        return soft

    def _logits(self, tokens: Tokens, ask: Ask, title: str | None = None) -> Tensor:
        return logits_of(
            ask, tokens, len(self.text.classes), self.accelerator, self.recipe.evaluation.batch_tokens, title
        )

    def _ask(self, tokens: Tokens, recall: Recall | None = None) -> Ask:
        """The teacher's word on rows of some texts; with `recall`, whose texts they are, without its lower layers."""

        def ask(rows_B: np.ndarray) -> Tensor:
            if recall is None:
                return self.teacher.logits(*tokens.batch(rows_B))
            with recall.spoken(recall.batch(rows_B)):
                return self.teacher.logits(*tokens.batch(rows_B))

        return ask

    def _recall(self, config: FineTuningConfig) -> Recall | None:
        """What the layers that are not trained make of all texts; None where all of them are trained."""
        lower = train_upper(self.teacher.network, config.layers)
        return None if lower is None else Recall(self.teacher, lower, self.tokens)

    def _fine_tune(self, config: FineTuningConfig, recall: Recall | None) -> dict[str, Any]:
        """Train the teacher on the labels and keep it in `RUN/teacher`; its `curve` and the `seconds` it took.

        It is trained in fp32 and used in its own type, to which its lower layers go back unchanged.
        """
        network: Any = self.teacher.network
        dtype, began = network.dtype, time.perf_counter()
        if recall:
            recall.ask(self.accelerator, self.recipe.evaluation.batch_tokens)
        if not damage(self.tuned):  # an earlier process came so far
            self._take_tuned()
            return cast(dict[str, Any], json.loads((self.tuned / TUNED).read_text(encoding="utf-8")))
        network.float()
        training = self._training(config, recall, time.perf_counter() - began)
        progress = training.run()
        for parameter in network.parameters():  # not the buffers: a rotary teacher's frequencies are in fp32
            parameter.data = parameter.data.to(dtype)
        network.eval().requires_grad_(False)
        self.accelerator.wait_for_everyone()  # all have read the best weights
        if self.accelerator.is_main_process:
            write_atomically(self.tuned, lambda path: self._save_tuned(path, progress))
            shutil.rmtree(training.checkpoints.folder, ignore_errors=True)  # large, and no longer needed
        self.accelerator.wait_for_everyone()
        return {"curve": progress.points, "seconds": progress.now.seconds}

    def _training(self, config: FineTuningConfig, recall: Recall | None, seconds: float) -> ClassifierTraining:
        """A training of the teacher, on which so many seconds have been spent."""
        stage = StageConfig(
            name="fine-tuning",
            objective={"cross_entropy": 1.0},
            length=config.length,
            learning_rate=config.learning_rate,
            schedule=config.schedule,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.999),
        )
        labels_N = np.full(len(self.tokens), NO_LABEL)
        labels_N[self.text.places["train"]] = self.text.train.labels_N
        rows_V = np.arange(len(self.tokens))[self.text.places["validation"]]
        held_out = Tokens([self.tokens.ids[row] for row in rows_V], self.tokens.padding)
        ask = self._ask(self.tokens, recall)

        def validate(_: PreTrainedModel) -> Verdicts:
            with self.accelerator.autocast():
                said_VC = self._logits(held_out, lambda chosen_B: ask(rows_V[chosen_B]))
            return Verdicts(said_VC, torch.from_numpy(self.text.validation.labels_N))

        return ClassifierTraining(
            "teacher", recipe=self.recipe, stages=(stage,), student=self.teacher.network, validate=validate,
            accelerator=self.accelerator, tracker=self.tracker, tokens=self.tokens, labels_N=labels_N,
            teacher_seconds=seconds, batch_size=config.batch_size, recall=recall,
        )  # fmt: skip

    def _save_tuned(self, path: Path, progress: Progress) -> None:
        self.teacher.network.save_pretrained(path)
        self.teacher.tokenizer.save_pretrained(path)
        about = {"curve": progress.points, "seconds": progress.now.seconds}
        (path / TUNED).write_text(json.dumps(about, indent=1), encoding="utf-8")
        write_checksums(path)

    def _take_tuned(self) -> None:
        """Put the fine-tuned weights into the teacher."""
        network: Any = self.teacher.network
        tuned = type(network).from_pretrained(self.tuned, dtype=network.dtype, use_safetensors=True)
        network.load_state_dict(tuned.state_dict())
        cast(nn.Module, network).eval().requires_grad_(False)
