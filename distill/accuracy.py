"""How well a classifier does: accuracy with its interval, loss, and how closely it follows its teacher.

Legend: N texts, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from distill.losses import forward_kl
from distill.metrics import bootstrap_interval


@dataclass(frozen=True)
class Verdicts:
    """A classifier's logits (N, C) on labelled texts, and the teacher's where it is compared with one."""

    logits_NC: Tensor
    labels_N: Tensor
    teacher_NC: Tensor | None = None

    @property
    def right_N(self) -> np.ndarray:
        """1 where the likeliest class is the label, else 0."""
        return (self.logits_NC.argmax(-1) == self.labels_N).double().numpy()

    @property
    def accuracy(self) -> float:
        return float(self.right_N.mean())

    @property
    def nll_nats(self) -> float:
        """Mean cross-entropy of a label."""
        return F.cross_entropy(self.logits_NC.double(), self.labels_N).item()

    @property
    def top1_agreement(self) -> float | None:
        """Share of texts to which classifier and teacher give the same class."""
        if self.teacher_NC is None:
            return None
        return (self.logits_NC.argmax(-1) == self.teacher_NC.argmax(-1)).double().mean().item()

    @property
    def kl_to_teacher_nats(self) -> float | None:
        """Mean KL(teacher || this classifier) of a text."""
        if self.teacher_NC is None:
            return None
        return forward_kl(self.logits_NC, self.teacher_NC).item() / len(self.labels_N)

    @property
    def curve_figures(self) -> dict[str, float | None]:
        """What a point of a validation curve holds."""
        return {
            "nll_nats": self.nll_nats,
            "accuracy": self.accuracy,
            "kl_to_teacher_nats": self.kl_to_teacher_nats,
            "top1_agreement": self.top1_agreement,
        }

    @property
    def in_words(self) -> str:
        """For the log."""
        return f"{self.nll_nats:.4f} nats, accuracy {self.accuracy:.3f}"

    def as_dict(self) -> dict[str, Any]:
        """The figures as they stand in `result.json`."""
        interval = wilson_interval(self.accuracy, len(self.labels_N))
        figures = {**self.curve_figures, "accuracy_interval": interval, "texts": len(self.labels_N)}
        return {name: value for name, value in figures.items() if value is not None}


def wilson_interval(share: float, count: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share that was observed in `count` trials (Wilson 1927, JASA 22)."""
    centre, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    return [max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)]


def gain(student: Verdicts, control: Verdicts) -> dict[str, Any]:
    """By how much the student is right more often on the same texts, with a bootstrap interval over these."""
    difference_N = student.right_N - control.right_N
    interval = bootstrap_interval(difference_N, np.ones_like(difference_N))
    return {
        "accuracy_gain": float(difference_N.mean()),
        "accuracy_gain_interval": None if interval is None else list(interval),
    }


def majority_accuracy(labels_N: np.ndarray, train_N: np.ndarray) -> float:
    """What giving the training text's most frequent class to every text would reach."""
    commonest = np.bincount(train_N[train_N >= 0]).argmax()
    return float((labels_N == commonest).mean())
