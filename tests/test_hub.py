"""Publishing over HTTP to a hub on the loopback interface, and what a stranger then finds there.

python -m pytest tests/test_hub.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import World, result_of, run_command, run_stranger
from hub_server import Fault, Hub
from huggingface_hub import ModelCard, constants

from distill.config import UserError
from distill.hub import _retried, _targets, _text_license, main, teacher_license, upload
from distill.recipe import load_recipe
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


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, and this very process as its client. No pauses before trying again."""
    for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "token-of-me")
    monkeypatch.setattr("distill.hub.PAUSES", (0.0, 0.0, 0.0))
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder to upload."""
    path = tmp_path / "student"
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    (path / "README.md").write_text("# x\n", encoding="utf-8")
    return path


STRANGER = """
from transformers import AutoModelForCausalLM, AutoTokenizer

revision = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained("me/tiny", revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/tiny", revision=revision)
ids = tokenizer("the river is", return_tensors="pt")["input_ids"]
print(model(ids).logits.double().flatten().tolist())
print(model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist())
"""


def test_published_and_loaded_by_a_stranger(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    options = (str(run_folder), "me/tiny", "--license", "apache-2.0", "--branch", "dev")
    run = run_command(*options, launcher=("-m", "distill.hub"), **hub.environment(tmp_path / "home"))
    assert run.returncode == 0, run.stderr
    assert "token-of-me" not in run.stdout + run.stderr
    files = hub.files("me/tiny", "dev")
    assert not hub.files("me/tiny"), "the branch, not the main one"
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

    environment = hub.environment(tmp_path / "stranger", token=None)
    found = run_stranger(STRANGER, "dev", cwd=tmp_path, **environment)
    assert found.returncode == 0, found.stderr
    logits, generated = map(json.loads, found.stdout.splitlines()[-2:])
    student = LSTMForCausalLM.from_pretrained(run_folder / "student")
    ids_1T = torch.tensor([generated[:3]])
    torch.set_num_threads(1)
    assert torch.equal(torch.tensor(logits).double(), student(ids_1T).logits.double().flatten()), "bit for bit"
    assert student.generate(ids_1T, max_new_tokens=5, do_sample=False)[0].tolist() == generated


def test_the_card_says_what_was_measured(
    here: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "table.md").write_text("| model | tok/s |\n|---|---|\n| student | 3000 |\n", encoding="utf-8")
    (report / "frontier.png").write_bytes(b"a picture")
    options = [str(run_folder), "me/tiny", "--license", "apache-2.0", "--dry-run", "--report", str(report)]
    assert main(options) == 0
    assert not here.requests, "a dry run asks for nothing"
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder == run_folder / "hub"
    card, result = ModelCard.load(folder / "README.md"), result_of(run_folder)
    assert card.data.license == "apache-2.0" and "potstill" in card.data.tags
    values = {row.metric_type: row.metric_value for row in card.data.eval_results}
    assert values["perplexity"] == result["student"]["perplexity"]
    assert values["kl_to_teacher_nats"] == result["student"]["kl_to_teacher_nats"]
    for model in ("teacher", "student", "control"):
        assert f"| {model} | {result[model]['perplexity']:.1f} |" in card.text
    assert (folder / "frontier.png").read_bytes() == b"a picture"
    for part in ("curves.png", "frontier.png", "| student | 3000 |", "me/tiny", "Limits", "constant memory"):
        assert part in card.text
    assert result["corpus"]["fingerprint"] in card.text
    if (folder / "model.onnx").is_file():
        snippets = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
        without_torch = next(snippet for snippet in snippets if "InferenceSession" in snippet)
        read = run_stranger(without_torch, cwd=folder)
        assert read.returncode == 0 and len(read.stdout) > 30, read.stderr


def test_the_card_says_what_is_known_of_text_and_targets(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"kind": "hidden", "cached": True, "manifest": {"width": 4, "encoding": "hidden"}}
    assert _targets(targets) == "kind hidden, cached True; by the cache's manifest width 4, encoding hidden"
    assert _targets({"kind": "hidden", "cached": False}) == "kind hidden, cached False"
    recipe = load_recipe(world.recipe)
    assert _text_license(recipe).endswith("see there")
    of_hub = load_recipe(world.recipe, ["corpus.source=me/texts"])
    for found, expected in ((["cc-by-sa-3.0", "gfdl"], "cc-by-sa-3.0 and gfdl"), ("mit", "mit"), (None, "see there")):
        info = SimpleNamespace(card_data=SimpleNamespace(license=found))
        monkeypatch.setattr("distill.hub.HfApi.dataset_info", lambda *_, answer=info, **__: answer)
        assert _text_license(of_hub).endswith(expected)


def test_the_same_thing_twice_changes_nothing(here: Hub, folder: Path) -> None:
    upload(folder, "me/tiny", True, None, "teacher")
    assert here.repos["me/tiny"].private
    assert here.files("me/tiny") == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert any(line.startswith("PUT") for line in here.requests)
    commits = len(here.repos["me/tiny"].commits)
    here.requests.clear()
    upload(folder, "me/tiny", True, None, "teacher")
    assert len(here.repos["me/tiny"].commits) == commits
    assert not any(line.startswith("PUT") for line in here.requests)
    (folder / "README.md").write_text("# y\n", encoding="utf-8")
    upload(folder, "me/tiny", True, "dev", "teacher")
    assert here.files("me/tiny", "dev")["README.md"] == b"# y\n" and here.files("me/tiny")["README.md"] == b"# x\n"


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        ("wrong", "me/tiny", "hf auth login"),
        ("token-of-reader", "me/tiny", "a name of your own"),
        ("token-of-me", "somebody/tiny", "a name of your own"),
    ],
)
def test_a_refusal_is_one_message(
    here: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, expected: str
) -> None:
    upload(folder, "me/tiny", True, None, "teacher")  # the name exists
    here.requests.clear()
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"{repo}: the hub refused: .*{expected}") as error:
        upload(folder, repo, False, None, "teacher")
    assert token not in str(error.value) and str(folder) in str(error.value)
    assert len(here.requests) <= 2, "a refusal is not tried again"


def test_nothing_private_is_uploaded_to_a_public_repository(here: Hub, folder: Path) -> None:
    upload(folder, "me/open", False, None, "teacher")
    (folder / "README.md").write_text("# not for all\n", encoding="utf-8")
    with pytest.raises(UserError, match="me/open: expected a private repository, found a public one"):
        upload(folder, "me/open", True, None, "teacher")
    assert here.files("me/open")["README.md"] == b"# x\n"


def test_faults_are_survived(here: Hub, folder: Path) -> None:
    here.faults += [
        Fault("POST /api/repos/create", status=500),
        Fault("POST /api/repos/create", cut_after=0),
        Fault("PUT /_lfs/", cut_after=1000),
        Fault("POST /api/models/me/tiny/commit", status=502),
    ]
    upload(folder, "me/tiny", False, None, "teacher")
    assert not here.faults, "each of them happened"
    assert here.files("me/tiny")["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    here.faults += [Fault("POST /api/models/me/other/commit", status=503)] * 50
    with pytest.raises(UserError, match="not sent twice"):
        upload(folder, "me/other", False, None, "teacher")
    here.faults.clear()
    here.requests.clear()
    upload(folder, "me/other", False, None, "teacher")
    assert not any(line.startswith("PUT") for line in here.requests), "the weights had arrived before"


def test_what_is_missing_is_asked_for(
    here: Hub, world: World, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text(world.recipe.read_text(encoding="utf-8"), encoding="utf-8")
    for words, expected in (
        ([str(run_folder), "me/tiny"], ["its licence is not known", "--license", str(world.teacher)]),
        ([str(run_folder), "tiny"], ["user/name"]),
        ([str(run_folder), "me/tiny", "--license", "mit", "--report", str(tmp_path)], ["table.md"]),
        ([str(tmp_path), "me/tiny"], ["recipe.yaml"]),
        ([str(unfinished), "me/tiny"], ["result.json"]),
    ):
        assert main(words) == 2
        message = capsys.readouterr().err
        assert all(part in message for part in expected), message
    assert not here.repos


def test_where_a_licence_is_found(tmp_path: Path) -> None:
    assert teacher_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# x\n", encoding="utf-8")
    assert teacher_license(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n# x\n", encoding="utf-8")
    assert teacher_license(str(tmp_path)) is None
    assert teacher_license("package:no-such-package/x.gguf") is None
    assert teacher_license("package:pytest/x") == "mit"


def test_only_faults_of_the_server_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    pauses: list[float] = []
    monkeypatch.setattr("distill.hub.time.sleep", pauses.append)
    for status, tries in ((500, 4), (429, 4), (403, 1)):
        calls = 0

        def once(status: int = status) -> str:
            nonlocal calls
            calls += 1
            raise HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))

        with pytest.raises(HfHubHTTPError):
            _retried(once)
        assert calls == tries
