"""eval/shared.py: what several protocols need is made once, and what they find is what each alone finds.

python -m pytest tests/test_shared.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_eval

import eval.agreement
import eval.command
import eval.perplexity
from distill.config import EvaluationConfig
from distill.metrics import Documents
from eval.command import make_subjects
from eval.perplexity import nats
from eval.shared import keep, once, shared

PROTOCOLS: tuple[tuple[str, ...], ...] = (
    ("agreement",),
    ("agreement", "--decoder", "--roles", "student"),
    ("perplexity",),
    ("perplexity", "--decoder", "--roles", "student"),
    ("memory", "--contexts", "1", "2", "4", "8", "--targets", "64", "--probes", "4"),
    ("generate", "--texts", "4", "--prompt-tokens", "4", "--new-tokens", "8"),
)


def test_only_inside_shared_is_anything_kept() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    keep("b", 5)
    assert [once("a", make), once("a", make), once("b", make)] == [1, 2, 3]
    with shared():
        assert [once("a", make), once("a", make), once("b", make)] == [4, 4, 5]
        keep("c", 9)
        with shared():  # the outer one's
            assert [once("a", make), once("c", make)] == [4, 9]
    with pytest.raises(ZeroDivisionError), shared():
        raise ZeroDivisionError
    assert once("a", make) == 6, "let go"


def measured(folder: Path) -> dict[str, Any]:
    """The models' figures of each protocol."""
    files = sorted((folder / "eval").glob("*.json"))
    return {file.name: json.loads(file.read_text(encoding="utf-8"))["models"] for file in files}


def test_protocols_share_what_they_read_and_find_the_same(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    run = tmp_path / "run"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("eval", "checkpoints"))
    counts: dict[str, int] = {}

    def counted(module: Any, name: str, what: str = "") -> None:
        plain = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[what or name] = counts.get(what or name, 0) + 1
            return plain(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(eval.command, "load_language_model")
    counted(eval.command, "load_decoder")
    counted(eval.agreement, "build_reference")
    counted(eval.perplexity, "scored")
    counted(eval.agreement, "scored", "compared")
    counted(eval.agreement, "scored_by_decoder", "compared by decoder")
    counted(eval.perplexity, "scored_by_decoder")

    def all_protocols() -> dict[str, int]:
        counts.clear()
        for protocol, *arguments in PROTOCOLS:
            result = run_eval(protocol, str(run), *arguments)
            assert result.returncode == 0, result.stderr
        return dict(counts)

    alone, apart = all_protocols(), measured(run)
    with shared():
        together, found = all_protocols(), measured(run)
    assert alone["load_language_model"] > 10 and alone["scored"] == 3 + 3 and alone["build_reference"] == 2
    assert together == {
        "load_language_model": 3, "load_decoder": 1, "build_reference": 1, "compared": 2, "compared by decoder": 1,
    }, "perplexity and memory find the losses that agreement has seen"  # fmt: skip
    assert numbers(found) == pytest.approx(numbers(apart), rel=1e-5, abs=1e-7)


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """All numbers below a value, by their place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for place, part in items for key, number in numbers(part, f"{name}/{place}").items()}
    return {name: float(value)} if isinstance(value, int | float) else {}


def test_another_arithmetic_or_window_is_read_anew(run_folder: Path) -> None:
    teacher, student = make_subjects([str(run_folder)], ("teacher", "student"))
    documents = Documents([np.array([0, 5, 6, 7, 8, 9])], np.array([20]), np.array([5]))
    with shared():
        model = teacher.load("fp32")
        assert teacher.load("fp32") is model and teacher.load("bf16") is not model
        assert student.load().model is not model.model
        windows = [EvaluationConfig(window=window, context=1) for window in (4, 64, 4)]
        narrow, wide, again = (nats(model, documents, evaluation) for evaluation in windows)
        assert again is narrow and not torch.equal(narrow, wide)
        assert torch.equal(narrow[:4], wide[:4]), "as far as the first window reaches"
        other = Documents([np.array([0, 5, 6, 7, 8, 10])], np.array([20]), np.array([5]))
        assert not torch.equal(nats(model, other, windows[1]), wide)
    assert teacher.load("fp32") is not model
