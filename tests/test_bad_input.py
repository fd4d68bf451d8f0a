"""Bad input through the real command: exit code 2, one message without a traceback, nothing lost."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, World, run_command


def refused(run: subprocess.CompletedProcess[str]) -> str:
    """The message of a refused run."""
    assert run.returncode == 2, (run.returncode, run.stderr)
    assert "Traceback" not in run.stderr
    assert len(re.findall("^error: ", run.stderr, re.MULTILINE)) == 1, run.stderr
    return run.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.sed=3", ["run.sed", "unknown key", "'seed'"]),
        ("run.seed=many", ["run.seed", "integer", "'many'"]),
        ("stages.0.length.steps=0", ["stages.0.length.steps", "greater than 0", "found 0"]),
        ("stages.0.length={steps: 1, tokens: 2}", ["stages.0.length", "exactly one", "steps, tokens"]),
        ("teacher.model=/no/such/teacher", ["/no/such/teacher", "expected a model folder"]),
        ("teacher.model=nobody/no-such-teacher", ["nobody/no-such-teacher", "cannot be loaded"]),
        ("corpus.source=/no/such/text.jsonl", ["/no/such/text.jsonl", "no such file"]),
        ("corpus.text_field=body", ["body", "text"]),
        ("corpus.separator=<|nothing|>", ["<|nothing|>"]),
        ("run.micro_batch_size=3", ["run.batch_size (8)", "run.micro_batch_size (3)"]),
        ("corpus.block_length=300", ["304 tokens", "limit of 256"]),
        ("stages.1.freeze=[embedding, head, body]", ["stages.1", "nothing to train"]),
        ("run.output_dir=/dev/null", ["/dev/null/tiny", "run.output_dir"]),
    ],
)
def test_refused(world: World, tmp_path: Path, override: str, expected: list[str]) -> None:
    message = refused(run_command(str(world.recipe), f"run.output_dir={tmp_path}", override))
    for part in expected:
        assert part in message


def test_missing_recipe_and_several_problems_at_once(world: World, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(run_command("nowhere.yaml"))
    message = refused(
        run_command(str(world.recipe), "run.sed=1", "corpus.block_length=one", "stages.0.length.steps=-1")
    )
    assert "3 problems" in message
    assert all(field in message for field in ("run.sed", "corpus.block_length", "stages.0.length.steps"))


def test_accelerate_launch_shows_the_message(world: World) -> None:
    """accelerate turns any failure into exit code 1; with --quiet there is our message, once, and no traceback."""
    run = run_command(
        str(world.recipe),
        "run.sed=1",
        launcher=("-m", "accelerate.commands.launch", "--quiet", "--cpu", "-m", "distill.run"),
    )
    assert run.returncode == 1
    assert run.stderr.count("error: ") == 1
    assert "unknown key" in run.stderr
    assert "Traceback" not in run.stderr


def test_tokenizer_and_head_that_do_not_match(world: World, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world.teacher, teacher)
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {**content["model"]["vocab"], **{f"more{i}": 40 + i for i in range(60)}}
    file.write_text(json.dumps(content), encoding="utf-8")
    message = refused(run_command(str(world.recipe), f"teacher.model={teacher}", f"run.output_dir={tmp_path}"))
    assert "ids up to 99" in message
    assert "64 rows" in message


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], "no text, only 0 blank"),
        (["", "   "], "only 2 blank documents"),
        (["the river", "a city", "the old king is in the city"], "block"),
    ],
)
def test_empty_and_short_corpora(world: World, tmp_path: Path, texts: list[str], expected: str) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    message = refused(run_command(str(world.recipe), f"corpus.source={file}", f"run.output_dir={tmp_path}"))
    assert expected in message


def test_checkpoint_of_another_recipe(world: World, tmp_path: Path) -> None:
    assert run_command(str(world.recipe), f"run.output_dir={tmp_path}", "control=false").returncode == 0
    message = refused(
        run_command(str(world.recipe), f"run.output_dir={tmp_path}", "control=false", "student.hidden_size=20")
    )
    assert "student.hidden_size: the run has 16, the recipe 20" in message
    again = run_command(str(tmp_path / "tiny"))
    assert again.returncode == 0, again.stderr
    assert "complete already" in again.stderr


def test_damaged_checkpoints_are_named(world: World, tmp_path: Path) -> None:
    arguments = (str(world.recipe), f"run.output_dir={tmp_path}", "control=false")
    assert run_command(*arguments).returncode == 0
    (tmp_path / "tiny" / "result.json").unlink()
    folder = tmp_path / "tiny" / "checkpoints" / "student"
    for saved in folder.glob("step-*"):
        whole = (saved / "model.safetensors").read_bytes()
        (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    message = refused(run_command(*arguments))
    assert f"{folder}: all checkpoints are damaged" in message
    assert f"{max(folder.glob('step-*'))}: the checkpoint is damaged (" in message and "model.safetensors" in message


def test_not_finite_is_refused_before_the_update(world: World, tmp_path: Path) -> None:
    message = refused(
        run_command(
            str(world.recipe),
            f"run.output_dir={tmp_path}",
            "stages.1.learning_rate=1e30",
            "stages.1.warmup=0",
        )
    )
    assert "refused before the update" in message
    assert "not finite in" in message


def test_full_disk_while_saving(world: World, tmp_path: Path) -> None:
    """On a disk of 700 KiB the run stops with one message, what was saved stays whole, and with room it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = ["-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(["mount", *size], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    arguments = (
        *(str(world.recipe), f"run.output_dir={disk}", "control=false", "stages.0.length.steps=30"),
        *("run.keep_checkpoints=50", "run.checkpoint_every.steps=1"),
    )
    try:
        message = refused(run_command(*arguments))
        assert "cannot be written" in message
        saved = sorted((disk / "tiny" / "checkpoints" / "student").glob("step-*"))
        assert saved
        assert not list(disk.rglob("*.tmp"))
        assert all((folder / "state.json").stat().st_size for folder in saved)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = run_command(*arguments)
        assert again.returncode == 0, again.stderr
        assert f"going on from {saved[-1]}" in again.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit_while_saving(world: World, tmp_path: Path) -> None:
    """The same through a limit on file size, which needs no root."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    run = subprocess.run(
        [sys.executable, "distill/run.py", str(world.recipe), f"run.output_dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=120,
    )  # fmt: skip
    assert "cannot be written" in refused(run)
    assert yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text(encoding="utf-8"))["run"]["name"] == "tiny"
