"""Publishing over HTTP to a hub on the loopback interface, and what a stranger then finds there.

python -m pytest tests/test_hub.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import World, result_of, run_command
from hub_server import Fault, Hub
from huggingface_hub import ModelCard
from test_bad_input import refused

from distill.hub import _retried, main, teacher_license
from distill.student import LSTMForCausalLM


@pytest.fixture(scope="module")
def run_folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    run = run_command(str(world.recipe), f"run.output_dir={folder}")
    assert run.returncode == 0, run.stderr
    return folder / "tiny"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def publish(hub: Hub, run: Path, home: Path, *words: str, repo: str = "me/tiny", token: str | None = "token-of-me"):
    options = (str(run), repo, "--license", "apache-2.0", *words)
    return run_command(*options, launcher=("-m", "distill.hub"), **hub.environment(home, token))


STRANGER = """
import sys, torch


class NoPotstill:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "distill":
            raise ImportError("the stranger has not installed potstill")


sys.meta_path.insert(0, NoPotstill())
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
revision = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained("me/tiny", revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/tiny", revision=revision)
ids = tokenizer("the river is", return_tensors="pt")["input_ids"]
print(model(ids).logits.double().flatten().tolist())
print(model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist())
"""


def test_published_and_loaded_by_a_stranger(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    first = publish(hub, run_folder, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert "token-of-me" not in first.stdout + first.stderr
    files = hub.files("me/tiny")
    assert {
        "config.json",
        "model.safetensors",
        "student.py",
        "tokenizer.json",
        "generation_config.json",
    } <= files.keys()
    assert {"README.md", "curves.png"} <= files.keys()
    assert files["model.safetensors"] == (run_folder / "student" / "model.safetensors").read_bytes()
    assert not any(b"token-of-me" in data for data in files.values())
    assert hub.repos["me/tiny"].private is False

    commits, puts = len(hub.repos["me/tiny"].commits), sum(line.startswith("PUT") for line in hub.requests)
    again = publish(hub, run_folder, tmp_path / "home")
    assert again.returncode == 0, again.stderr
    assert len(hub.repos["me/tiny"].commits) == commits, "nothing had changed"
    assert sum(line.startswith("PUT") for line in hub.requests) == puts

    branched = publish(hub, run_folder, tmp_path / "home", "--branch", "dev")
    assert branched.returncode == 0, branched.stderr
    assert hub.files("me/tiny", "dev") == files

    student = LSTMForCausalLM.from_pretrained(run_folder / "student")
    for revision in ("main", "dev"):
        environment = {**os.environ, **hub.environment(tmp_path / f"stranger-{revision}", token=None)}
        environment.pop("PYTHONPATH", None)
        found = subprocess.run(
            [sys.executable, "-c", STRANGER, revision],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        logits, generated = map(json.loads, found.stdout.splitlines()[-2:])
        ids_1T = torch.tensor([generated[:3]])
        torch.set_num_threads(1)
        assert torch.equal(torch.tensor(logits).double(), student(ids_1T).logits.double().flatten()), "bit for bit"
        assert student.generate(ids_1T, max_new_tokens=5, do_sample=False)[0].tolist() == generated


def test_the_card_says_what_was_measured(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    dry = publish(hub, run_folder, tmp_path, "--dry-run")
    assert dry.returncode == 0 and not hub.requests, dry.stderr
    folder = Path(dry.stdout.strip())
    assert folder == run_folder / "hub"
    card, result = ModelCard.load(folder / "README.md"), result_of(run_folder)
    assert card.data.license == "apache-2.0" and "potstill" in card.data.tags
    values = {row.metric_type: row.metric_value for row in card.data.eval_results}
    assert values["perplexity"] == result["student"]["perplexity"]
    assert values["kl_to_teacher_nats"] == result["student"]["kl_to_teacher_nats"]
    for model in ("teacher", "student", "control"):
        assert f"| {model} | {result[model]['perplexity']:.1f} |" in card.text
    for part in ("curves.png", "me/tiny", "Limits", result["corpus"]["fingerprint"], "constant memory"):
        assert part in card.text


def test_private_and_refused(hub: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(hub, run_folder, tmp_path, "--private").returncode == 0
    assert hub.repos["me/tiny"].private
    assert "hf auth login" in refused(publish(hub, run_folder, tmp_path, token="wrong"))
    message = refused(publish(hub, run_folder, tmp_path, token="token-of-reader"))
    assert "a name of your own" in message and "token-of-reader" not in message
    message = refused(publish(hub, run_folder, tmp_path, repo="somebody/tiny"))
    assert "somebody/tiny: the hub refused" in message and "a name of your own" in message
    assert main([str(run_folder), "tiny"]) == 2
    assert "user/name" in capsys.readouterr().err


def test_faults_are_survived(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    hub.faults += [
        Fault("POST /api/repos/create", status=500),
        Fault("PUT /_lfs/", cut_after=1000),
        Fault("POST /api/models/me/tiny/commit", status=502),
    ]
    run = publish(hub, run_folder, tmp_path)
    assert run.returncode == 0, run.stderr
    assert not hub.faults, "each of them happened"
    assert hub.files("me/tiny")["model.safetensors"] == (run_folder / "student" / "model.safetensors").read_bytes()


def test_an_unknown_licence_is_asked_for(hub: Hub, world: World, run_folder: Path, tmp_path: Path) -> None:
    options = (str(run_folder), "me/tiny")
    message = refused(run_command(*options, launcher=("-m", "distill.hub"), **hub.environment(tmp_path)))
    assert str(world.teacher) in message and "--license" in message
    assert not hub.repos


def test_where_a_licence_is_found(tmp_path: Path) -> None:
    assert teacher_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# x\n", encoding="utf-8")
    assert teacher_license(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n# x\n", encoding="utf-8")
    assert teacher_license(str(tmp_path)) is None
    assert teacher_license("package:no-such-package/x.gguf") is None
    assert teacher_license("package:pytest/x") == "mit"


def test_only_faults_of_the_server_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    pauses: list[float] = []
    monkeypatch.setattr("distill.hub.time.sleep", pauses.append)
    for status, tries in ((500, 4), (429, 4), (403, 1)):
        calls = 0

        def once(status: int = status) -> str:
            nonlocal calls
            calls += 1
            raise HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "http://x")))

        with pytest.raises(HfHubHTTPError):
            _retried(once)
        assert calls == tries


def test_a_finished_run_is_needed(hub: Hub, world: World, tmp_path: Path) -> None:
    assert "recipe.yaml" in refused(publish(hub, tmp_path, tmp_path))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text(world.recipe.read_text(encoding="utf-8"), encoding="utf-8")
    assert "result.json" in refused(publish(hub, unfinished, tmp_path))
