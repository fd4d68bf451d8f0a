"""The examples run, from beginning to end, on toy sizes.

python -m pytest tests/test_examples.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, World
from hub_server import Hub
from transformers import AutoTokenizer

from distill.student import LSTMForCausalLM

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


@pytest.mark.slow
def test_the_tour(world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    text = world.recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace(str(world.folder / "runs"), str(tmp_path)), encoding="utf-8")
    run = tmp_path / "tiny"
    with Hub() as hub:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment(tmp_path / "home"), "LICENSE": "mit"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        command = [str(ROOT / "examples" / "tour.sh"), str(recipe), str(run), str(world.teacher), "me/tiny"]
        tour = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert tour.returncode == 0, tour.stderr
        assert {"model.onnx", "decoder.onnx", "decoder.safetensors", "student.py"} <= hub.files("me/tiny").keys()
    assert "the river" in tour.stdout and "acceptance" in tour.stdout

    # What the example without torch wrote is what the student writes.
    student = LSTMForCausalLM.from_pretrained(run / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    ids_1T = tokenizer("the river", return_tensors="pt")["input_ids"]
    expected = student.generate(ids_1T, max_new_tokens=30, do_sample=False, eos_token_id=None)
    lines = [" ".join(line.split()) for line in tour.stdout.splitlines()]
    assert " ".join(tokenizer.decode(expected[0], skip_special_tokens=True).split()) in lines
