"""Shared by the tests: the tiny world of `benchmarks/tiny.py`, other teachers, and the real commands."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

from benchmarks.tiny import World, make_world, save_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # sizes are tiny: threads would only wait for each other
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)  # tests record offline, whatever the machine's owner does
ROOT = Path(__file__).resolve().parent.parent

NO_POTSTILL = """
import sys, torch


class NoPotstill:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "distill":
            raise ImportError("the stranger has not installed potstill")


sys.meta_path.insert(0, NoPotstill())
torch.set_num_threads(1)
"""


def run_stranger(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python script in a process that cannot import this package."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", NO_POTSTILL + script, *arguments],
        env={**inherited, **environment}, cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# Modules that take the longest, in the order in which to begin them: a process that comes to one at the end would have
# the others wait for it.
LONG = ("invariance", "targets", "processes", "report", "benchmarks", "tracking", "examples", "harness", "hub")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Bring them back after a run in this process, which flushes them: hypothesis refuses to make numbers without."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture
def other_weights(world: World, tmp_path: Path) -> Path:
    """The tiny teacher with other weights: the same vocabulary, another opinion."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "other_weights"
    network = AutoModelForCausalLM.from_pretrained(world.teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(folder)
    return folder


@pytest.fixture
def other_teacher(tmp_path: Path) -> Path:
    """A model whose tokens are characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "other_teacher"
    letters = ["<|stop|>", "<|unk|>", " ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, "<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|stop|>", unk_token="<|unk|>", pad_token="<|stop|>"
    ).save_pretrained(folder)
    save_llama(
        folder, seed=2, vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        max_position_embeddings=512,
    )  # fmt: skip
    return folder


def needs_distribution(name: str) -> None:
    """Skip a test where a package of data is not installed; such a package need not be one that can be imported."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {name}, which make install-dev installs")


def run_command(
    *arguments: str,
    launcher: tuple[str, ...] = ("distill/run.py",),
    cwd: Path = ROOT,
    timeout: float = 240,
    cold: bool = False,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own; `cold`: one that imports the libraries itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    command = [*launcher, *arguments]
    if not cold and warm.can_run(environment):
        return warm.run(command, cwd, environment, timeout)
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="session")
def run_folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made as `accelerate launch -m distill.run`, from another working directory."""
    folder, cpu = tmp_path_factory.mktemp("job"), ROOT / "recipes/accelerate/cpu.yaml"
    run = run_command(
        str(world.recipe),
        "run.output_dir=out",
        launcher=("-m", "accelerate.commands.launch", "--config_file", str(cpu), "-m", "distill.run"),
        cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Run folder: out/tiny" in run.stdout
    return folder / "out" / "tiny"


def run_eval(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An evaluation command in this process, as its `main` is called from the command line."""
    main = importlib.import_module(f"eval.{name}").main
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
