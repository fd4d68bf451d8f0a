"""What Potstill reads is data: nothing in it is run, nothing leads out of its folder; and secrets stay secret.

python -m pytest tests/test_safety.py
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, World, run_command
from hub_server import Hub, Repo
from safetensors import SafetensorError
from safetensors.torch import load_file

from distill import cli, corpus, export
from distill.checkpoint import Checkpoints, load_state, load_tensors
from distill.command import guarded
from distill.config import CorpusConfig, UserError
from distill.decode import end_tokens, find_student, load_tokenizer
from distill.documents import open_documents
from distill.recipe import load_recipe
from distill.redact import STARS, redact
from distill.result import read_result
from distill.sealed import damage, read_sealed, seal, write_checksums
from distill.session import open_session, sha256
from distill.shards import Checked
from distill.targets import MANIFEST, CachedTargets, _collect, _download, read_manifest, shard_file
from distill.teacher import load_language_model
from distill.torch_decoder import load_student
from distill.tracking import _read_identity
from distill.tuition import SoftTargets, Tuition
from distill.written import WrittenDocument, WrittenText, text_files
from eval.command import make_subjects, read_results

# Pickles

CPU = torch.device("cpu")


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def payloads(marker: Path) -> dict[str, bytes]:
    evil, zipped, array = Evil(marker), io.BytesIO(), io.BytesIO()
    torch.save({"model.embed_tokens.weight": evil}, zipped)
    np.save(array, np.array([evil], dtype=object), allow_pickle=True)
    return {"pickle": pickle.dumps(evil), "torch": zipped.getvalue(), "npy": array.getvalue()}


@pytest.fixture(scope="module")
def places(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything that is read: a finished run, its text, its cache, a decoder."""
    folder = tmp_path_factory.mktemp("places")
    arguments = [
        *(str(world.recipe), "run.name=run", f"run.output_dir={folder}", "control=false", "targets.cache=true"),
        *(f"corpus.cache_dir={folder / 'texts'}", f"targets.cache_dir={folder / 'targets'}"),
    ]
    assert cli.main(arguments) == 0
    assert export.main([str(folder / "run"), "--to", "decoder"]) == 0
    shutil.copytree(world.teacher, folder / "teacher")
    written = WrittenText.claim(folder / "written", {}, "teacher", documents=1, documents_per_shard=1)
    written.save(0, [WrittenDocument(0, [3, 4], 1, True)], ["river city"], 0.5)
    shutil.copytree(world.teacher, folder / "tuned")
    write_checksums(folder / "tuned")
    SoftTargets(torch.zeros(2, 3), torch.zeros(0, 3), 1.0, []).write(folder / "soft_targets")
    assert SoftTargets.read(folder / "soft_targets") and written_text(folder) == ["river city"] and tuned(folder)
    return folder


def language_model(folder: Path) -> Any:
    return load_language_model(str(folder / "teacher"), device=CPU)


def pickled_weights(folder: Path) -> Any:
    """Weights in the old format alone, as many repositories have them."""
    (folder / "teacher" / "model.safetensors").unlink()
    return language_model(folder)


def pickled_student(folder: Path) -> Any:
    (folder / "run" / "student" / "model.safetensors").unlink()
    return load_student(folder / "run" / "student")


def checkpoint(folder: Path) -> Path:
    return sorted((folder / "run" / "checkpoints" / "student").glob("step-*"))[-1]


def shard(folder: Path) -> Any:
    manifest = read_manifest(folder / "targets")
    head = load_language_model(str(folder / "teacher"), device=CPU).head
    return CachedTargets(folder / "targets", manifest, head, 0.0, folder).shards.rows([(0, 0)])


def texts(folder: Path, suffix: str) -> list[str]:
    return list(open_documents(CorpusConfig(source=str(folder / f"text{suffix}")), progress=False))


def stored_corpus(folder: Path) -> Any:
    (stored,) = (folder / "texts" / "corpus").iterdir()
    return corpus._read(stored)


def written_text(folder: Path) -> list[str]:
    """With a record that goes with the shard, whatever that is."""
    shard, record = (folder / "written" / name for name in ("data/train-00000.parquet", "records/00000.json"))
    content = {**read_sealed(record), "bytes": shard.stat().st_size, "sha256": sha256(shard)}
    record.write_text(json.dumps(seal(content)), encoding="utf-8")
    return list(open_documents(CorpusConfig(source=str(folder / "written")), progress=False))


def soft_targets(folder: Path) -> Any:
    write_checksums(folder / "soft_targets")  # an attacker's own
    return SoftTargets.read(folder / "soft_targets")


def tuned(folder: Path) -> Any:
    """The fine-tuned teacher of a classifier's run that goes on; the class of its network does not matter."""
    network = language_model(folder).model
    Tuition._take_tuned(SimpleNamespace(teacher=SimpleNamespace(network=network), tuned=folder / "tuned"))  # type: ignore[arg-type]
    return network


def damaged_tuned(folder: Path) -> None:
    """A run compares its checksums first, and fine-tunes again."""
    with pytest.raises(SafetensorError):
        tuned(folder)


def pickled_tuned(folder: Path) -> None:
    (folder / "tuned" / "model.safetensors").unlink()
    with pytest.raises(OSError):
        tuned(folder)


def in_corpus(name: str) -> Callable[[Path], Path]:
    return lambda folder: next((folder / "texts" / "corpus").iterdir()) / name


READERS: dict[str, tuple[str | Callable[[Path], Path], Callable[[Path], Any]]] = {
    "recipe": ("run/recipe.yaml", lambda folder: load_recipe(folder / "run")),
    "result": ("run/result.json", lambda folder: read_result(folder / "run")),
    "inputs": ("run/inputs.json", lambda folder: read_sealed(folder / "run" / "inputs.json")),
    "tracker's id": ("run/wandb_id.json", lambda folder: _read_identity(folder / "run" / "wandb_id.json")),
    "evaluation": ("run/eval/perplexity.json", lambda folder: read_results(folder / "run", "perplexity")),
    "checkpoint's state": (lambda f: checkpoint(f) / "state.json", lambda f: load_state(checkpoint(f))),
    "checkpoint's weights": (
        lambda f: checkpoint(f) / "model.safetensors",
        lambda f: load_tensors(checkpoint(f), "model.safetensors"),
    ),
    "checkpoint's checksums": (lambda f: checkpoint(f) / "checksums.json", lambda f: damage(checkpoint(f))),
    "checkpoint": (
        lambda f: checkpoint(f) / "optimizer.safetensors",
        lambda f: Checkpoints(checkpoint(f).parent, 2).latest(),
    ),
    "manifest": (f"targets/{MANIFEST}", lambda folder: read_manifest(folder / "targets")),
    "stamps": ("targets/.checked.json", lambda folder: Checked(folder / "targets")),
    "record": ("targets/building/00000.json", lambda f: _collect(f / "targets", read_manifest(f / "targets"))),
    "shard": (f"targets/{shard_file(0)}", shard),
    "corpus": (in_corpus("corpus.json"), stored_corpus),
    "tokens": (in_corpus("train.npy"), stored_corpus),
    "documents": (in_corpus("train.documents.npy"), stored_corpus),
    **{f"text{s}": (f"text{s}", lambda f, s=s: texts(f, s)) for s in (".txt", ".json", ".jsonl", ".parquet")},  # type: ignore[misc]
    "written text": ("written/data/train-00000.parquet", written_text),
    "written text's manifest": ("written/written.json", lambda f: text_files(f / "written")),
    "written text's record": ("written/records/00000.json", lambda f: text_files(f / "written")),
    "soft targets": ("soft_targets/logits.safetensors", soft_targets),
    "soft targets' time": ("soft_targets/about.json", soft_targets),
    "fine-tuned teacher": ("tuned/model.safetensors", damaged_tuned),
    "fine-tuned teacher in the old format": ("tuned/pytorch_model.bin", pickled_tuned),
    "teacher": ("teacher/model.safetensors", language_model),
    "teacher in the old format": ("teacher/pytorch_model.bin", pickled_weights),
    "teacher's configuration": ("teacher/config.json", language_model),
    "teacher's tokenizer": ("teacher/tokenizer.json", language_model),
    "GGUF": ("teacher.gguf", lambda folder: load_language_model(str(folder / "teacher.gguf"), device=CPU)),
    "student": ("run/student/model.safetensors", lambda folder: load_student(folder / "run" / "student")),
    "student in the old format": ("run/student/pytorch_model.bin", pickled_student),
    "student's configuration": (
        "run/student/config.json",
        lambda folder: end_tokens(find_student(str(folder / "run"))),
    ),
    "student's tokenizer": ("run/student/tokenizer.json", lambda folder: load_tokenizer(folder / "run" / "student")),
    "decoder": ("run/student/decoder.onnx", lambda folder: open_session(folder / "run" / "student" / "decoder.onnx")),
}


@pytest.mark.parametrize("place", READERS)
def test_no_pickle_is_run(places: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    marker = tmp_path / "marker"
    where, read = READERS[place]
    for kind, payload in payloads(marker).items():
        folder = tmp_path / kind
        shutil.copytree(places, folder)
        file = where(folder) if callable(where) else folder / where
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(payload)
        with contextlib.suppress(UserError, ValueError):
            read(folder)
        assert not marker.exists(), f"{place} was unpickled"
        shutil.rmtree(folder)


def test_the_pickles_would_do_harm(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    found = payloads(marker)
    for load in (
        lambda: pickle.loads(found["pickle"]),
        lambda: torch.load(io.BytesIO(found["torch"]), weights_only=False),
        lambda: np.load(io.BytesIO(found["npy"]), allow_pickle=True),
    ):
        load()
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize(("folder", "read"), [("teacher", language_model), ("run/student", load_student)])
def test_weights_in_a_pickle_are_refused(
    places: Path, tmp_path: Path, folder: str, read: Callable[[Path], Any]
) -> None:
    """Sound ones too: no reader of pickles is started at all."""
    shutil.copytree(places / folder, tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError):
        read(tmp_path if folder == "teacher" else tmp_path / "teacher")


# Paths


DOWNLOAD = "import sys, distill.targets as t; from pathlib import Path; t._download('me/targets', Path(sys.argv[1]))"


def test_a_hub_cannot_write_outside_of_the_cache(places: Path, tmp_path: Path) -> None:
    """Only the manifest and the shards that it counts are downloaded."""
    source = places / "targets"
    files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*.arrow")}
    files[MANIFEST] = (source / MANIFEST).read_bytes()
    evil = dict.fromkeys(["../outside.json", "data/../../outside.arrow", "/tmp/outside", "setup.py", ".lock"], b"{}")
    hostile = json.loads(files[MANIFEST])
    hostile["shards"]["../../outside"] = hostile["shards"]["0"]
    del hostile["checksum"]
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        hub.repos["me/targets"] = Repo(private=True)
        hub.repos["me/targets"].add("main", {**files, **evil})
        run = run_command(str(tmp_path / "cache" / "targets"), launcher=("-c", DOWNLOAD), **environment)
        assert run.returncode == 0, run.stderr
        hub.repos["me/targets"].add("main", {**evil, MANIFEST: json.dumps(hostile).encode()})
        run = run_command(str(tmp_path / "cache" / "hostile"), launcher=("-c", DOWNLOAD), **environment)
        assert "UserError" in run.stderr and "expected the manifest of cached targets" in run.stderr
    found = {str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    found = {name for name in found if "/.cache/" not in name}
    assert found == {*(f"targets/{name}" for name in files), f"hostile/{MANIFEST}"}
    assert not list(tmp_path.rglob("outside*")) and not Path("/tmp/outside").exists()


def test_weights_outside_of_the_folder_are_refused(places: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(places / "teacher", teacher)
    shutil.move(teacher / "model.safetensors", tmp_path / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../other.safetensors"}}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"expected names of files beside it, found '\.\./other\.safetensors'"):
        load_language_model(str(teacher), device=CPU)


def test_an_onnx_file_points_nowhere_else(places: Path, tmp_path: Path) -> None:
    """Neither by the digests that it carries nor by the places of its weights."""
    student = tmp_path / "inside" / "student"
    shutil.copytree(places / "run" / "student", student)
    model = onnx.load(str(student / "decoder.onnx"), load_external_data=False)
    model.metadata_props.add(key="../../x/y.safetensors", value="0")
    onnx.save(model, str(student / "decoder.onnx"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.safetensors").write_bytes(b"would be compared, and refused")
    open_session(student / "decoder.onnx")
    shutil.move(student / "decoder.safetensors", tmp_path / "decoder.safetensors")
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = "../../decoder.safetensors"
    onnx.save(model, str(student / "decoder.onnx"))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_session(student / "decoder.onnx")


@pytest.mark.parametrize("repo", ["../..", "a/..", "./x"])
def test_a_repository_is_no_path(tmp_path: Path, repo: str) -> None:
    with pytest.raises(UserError):
        _download(repo, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.arrow"))


# Remote code

MODELING = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class EvilConfig(LlamaConfig):
    model_type = "evil"


class EvilForCausalLM(LlamaForCausalLM):
    config_class = EvilConfig
"""


@pytest.fixture
def model_with_code(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model folder whose code makes a file when it is imported."""
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(places / "teacher", model)
    (model / "modeling_evil.py").write_text(MODELING.format(marker=str(marker)), encoding="utf-8")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"},
    }
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model, marker


def test_remote_code_runs_on_request_alone(
    model_with_code: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, marker = model_with_code
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks for a key press"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_language_model(str(model), device=CPU)
    assert not marker.exists()
    load_language_model(str(model), device=CPU, trust_remote_code=True)
    assert marker.exists() and "pin the revision" not in caplog.text, "a folder is what it is"


@pytest.mark.parametrize(("revision", "warned"), [(None, True), ("main", True), ("0" * 40, False)])
def test_remote_code_without_a_pinned_revision_is_warned_of(
    caplog: pytest.LogCaptureFixture, revision: str | None, warned: bool
) -> None:
    with pytest.raises(UserError):
        load_language_model("nobody/nothing", device=CPU, revision=revision, trust_remote_code=True)
    assert ("pin the revision to a commit" in caplog.text) == warned


def test_evaluations_trust_one_model_at_a_time() -> None:
    names = ["some/one", "an/other@" + "0" * 40]
    one, other = (subject.config for subject in make_subjects(names, trust_remote_code=names[1:]))
    assert not one.trust_remote_code and other.trust_remote_code
    assert (other.model, other.revision) == ("an/other", "0" * 40)


# Secrets

SECRETS = {
    "HF_TOKEN": "token-of-me",
    "WANDB_API_KEY": "5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e70000",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/5ec2e7",
    "SERVER_API_KEY": "sk-5ec2e75ec2e75ec2e75ec2e7",
    "GIT_PASSWORD": "5ec2e7-of-the-remote",
}


def test_secrets_reach_nothing_that_is_written(world: World, tmp_path: Path) -> None:
    """Of the environment and of the repository's address; in run folder, checkpoints, cards, wandb, hub, logs, home."""
    for command in (
        ["git", "init", "-q"],
        ["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"],
        ["git", "remote", "add", "origin", f"https://me:{SECRETS['GIT_PASSWORD']}@example.org/x.git"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / ".git").rename(tmp_path / "git")
    (tmp_path / "work").mkdir()
    (tmp_path / "git").rename(tmp_path / "work" / ".git")
    teacher = tmp_path / "teacher"
    shutil.copytree(world.teacher, teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    with Hub() as hub:
        environment = {**SECRETS, **hub.environment(tmp_path / "home"), "HOME": str(tmp_path / "home")}
        run = run_command(
            str(world.recipe), f"teacher.model={teacher}", "run.output_dir=out", "tracking.tracker=wandb",
            "control=false", "publishing.repo=me/tiny", "targets.cache=true",
            f"targets.cache_dir={tmp_path / 'targets'}", f"corpus.cache_dir={tmp_path / 'texts'}",
            launcher=(str(ROOT / "distill" / "run.py"),), cwd=tmp_path / "work", WANDB_MODE="offline", **environment,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        written = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and ".git" not in p.parts}
        written |= {"output": run.stdout.encode(), "errors": run.stderr.encode()}
        written |= {f"hub {name}": data for name, data in hub.files("me/tiny").items()}
    assert any(name.endswith(".wandb") for name in written) and any("optimizer.safetensors" in n for n in written)
    for name, secret in SECRETS.items():
        found = [file for file, data in written.items() if secret.encode() in data]
        assert not found, f"{name} stands in {found}"


@pytest.mark.parametrize(
    "override",
    [
        "corpus.source=https://me:5ec2e7@example.org/text.jsonl",
        "teacher.model=hf_5ec2e75ec2e75ec2e75ec2e75ec2e7",
        "tracking.tags=[a, wJalrXUtnFEMI/K7MDENG/5ec2e7]",
        "corpus.source=https://example.org/text.jsonl?X-Amz-Signature=5ec2e75ec2e7",
        "run.name={a: https://me:5ec2e7@example.org}",
        "run.sed=https://me:5ec2e7@example.org",
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_telling_it(
    world: World, override: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS_SECRET_ACCESS_KEY"])
    assert guarded(lambda: load_recipe(world.recipe, [override])) == 2
    said = capsys.readouterr().err
    assert "expected no secrets in a recipe" in said and override.partition("=")[0] in said
    assert "5ec2e7" not in said


def test_messages_are_redacted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of libraries, also in a traceback."""
    monkeypatch.setenv("SERVER_API_KEY", "5ec2e7-of-mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/5ec2e7/with+slashes")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/me/no/such/key")
    assert redact("/5ec2e7/with+slashes, /home/me/no/such/key") == "***, /home/me/no/such/key"
    secret = (
        "PUT https://s3.example.org/a?x=1&X-Amz-Signature=5ec2e7&y=2 and https://me:5ec2e7@host/, "
        "Authorization: Bearer 5ec2e7.5ec2e7.5ec2e7.5ec2e7, 5ec2e7-of-mine, hf_5ec2e75ec2e75ec2e75ec2e7"
    )
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    monkeypatch.setattr(root, "handlers", [])

    def fail(error: Exception) -> None:
        logging.getLogger("httpx").warning("%s", secret)
        raise error

    assert guarded(lambda: fail(UserError(secret))) == 2
    assert guarded(lambda: fail(RuntimeError(secret))) == 1
    said = capsys.readouterr().err
    assert said.count("x=1&X-Amz-Signature=***&y=2") == 4 and "Traceback" in said
    assert "5ec2e7" not in said
    root.handlers = handlers


@pytest.mark.parametrize(
    "text",
    ["runs/quickstart at https://example.org/a?b=c#d", "a@b.org wrote", "step 3, basic vocabulary", "s3://bucket/x@y"],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text and STARS not in text


def test_what_is_sealed_is_not_changed_by_sealing() -> None:
    content = {"a": [1, 2.5, None, True], "b": {"c": "ä"}}
    assert {key: value for key, value in seal(content).items() if key != "checksum"} == content
    assert seal(seal(content)) == seal(content)
