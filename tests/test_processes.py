"""Many processes and machines: accelerate's configurations, shards, two hosts, restarts, and what is sent and awaited.

python -m pytest tests/test_processes.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT, World, result_of, run_command, save_llama
from safetensors.torch import load_file
from test_invariance import LENGTHS, OPTIMIZERS, assert_same_trajectory, log_of, train

from distill import launch
from distill.config import UserError
from distill.job import TeacherAndText, _share, start_accelerator
from distill.metrics import Documents
from distill.recipe import load_recipe
from distill.run_folder import claim_folder
from distill.sharding import Engine, requested_engine
from distill.targets import shard_file
from distill.train import micro_batch_size

FOLDER = ROOT / "recipes" / "accelerate"
SETTINGS = (*LENGTHS, *OPTIMIZERS["adamw"])

# ---------------------------------------------------------------- accelerate's configurations

EXPECTED: dict[str, dict[str, Any]] = {
    "cpu": {"distributed_type": "NO", "num_processes": 1, "num_machines": 1},
    "cpu2": {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1},
    "gpu": {"distributed_type": "NO", "num_processes": 1, "num_machines": 1},
    "gpu8": {"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 1},
    "machines2": {"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2},
    "fsdp2": {"distributed_type": "FSDP", "num_processes": 8, "num_machines": 1},
    "zero3": {"distributed_type": "DEEPSPEED", "num_processes": 8, "num_machines": 1},
}


def launch_arguments(name: str) -> Any:
    """What accelerate makes of the call that stands in the file's own comment."""
    path = FOLDER / f"{name}.yaml"
    calls = [line for line in path.read_text(encoding="utf-8").splitlines() if "accelerate launch" in line]
    words = calls[0].split("accelerate launch ")[1].split() if calls else ["--config_file", str(path), "run.py"]
    words = [str(ROOT / word) if word.startswith("recipes/accelerate/") else word for word in words]
    assert str(path) in words, "the comment names another file"
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def environment_of(name: str, **changes: object) -> dict[str, str]:
    """What accelerate's launcher tells its processes."""
    arguments = launch_arguments(name)
    for field, value in changes.items():
        setattr(arguments, field, value)
    arguments.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(arguments)[1] if name == "zero3" else prepare_multi_gpu_env(arguments)


def test_every_configuration_is_looked_at() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_configuration(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    for field, value in EXPECTED[name].items():
        assert getattr(config, field) == value, field
    assert config.mixed_precision == "no", "the recipe decides"
    arguments = launch_arguments(name)
    kinds = {"multi_gpu": "MULTI_GPU", "use_fsdp": "FSDP", "use_deepspeed": "DEEPSPEED"}
    for flag, kind in kinds.items():
        assert bool(getattr(arguments, flag)) == (config.distributed_type == kind)


def test_two_machines_meet_at_the_first() -> None:
    arguments = launch_arguments("machines2")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 0)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the environment that a launcher gives to its processes."""

    def set_up(environment: dict[str, str]) -> None:
        for name, value in {**environment, "WORLD_SIZE": "8"}.items():
            monkeypatch.setenv(name, value)
        requested_engine.cache_clear()

    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield set_up
    requested_engine.cache_clear()


@pytest.mark.parametrize(("name", "engine"), [("fsdp2", Engine("fsdp")), ("zero3", Engine("zero3")), ("gpu8", None)])
def test_what_the_launcher_asks_for_is_the_teachers(launched: Any, name: str, engine: Engine | None) -> None:
    """Through accelerate's own translation; afterwards its Accelerator sees neither FSDP nor DeepSpeed."""
    launched(environment_of(name))
    assert requested_engine() == engine
    assert "ACCELERATE_USE_FSDP" not in os.environ and "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert requested_engine() == engine, "asked again, the answer is the same"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("fsdp2", "fsdp_version", 1),
        ("fsdp2", "fsdp_offload_params", True),
        ("zero3", "zero_stage", 2),
        ("zero3", "offload_param_device", "cpu"),
    ],
)
def test_what_no_engine_does_is_refused(launched: Any, name: str, field: str, value: object) -> None:
    launched(environment_of(name, **{field: value}))
    with pytest.raises(UserError, match=f"{field}: expected .* found {value}".lower()) as caught:
        requested_engine()
    assert "gpu8.yaml" in str(caught.value)


def test_a_configuration_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.main(["--config", "nowhere.yaml", "recipe.yaml"])
    assert caught.value.code == 2 and "nowhere.yaml is missing" in capsys.readouterr().err


# ---------------------------------------------------------------- one process, two, and a restart

# Runs the real command with things planted. `watch`: bytes of gradients that DDP sends are counted by stage, and so are
# the tokens that each process scores in a validation; the first checkpoint is not written before four more steps are
# taken, nor the result before the second process has ended. `kill`: in its first life, the second process dies in the
# middle of the epoch.
PLANTED = """
import json, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import distill.job as job
from distill.checkpoint import Checkpoints
from distill.cli import main
from distill.train import Training

what, notes = sys.argv[1], Path(sys.argv[2])
rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
sent, scored = {{}}, []


class Counting(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, self.count)

    def count(self, state, bucket):
        sent[stage] = sent.get(stage, 0) + bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(None, bucket)


step = Training._step


def planted_step(self, *arguments):
    global stage
    stage = self.progress.stage
    if what == "kill" and (rank, life, self.progress.now.steps) == (1, 0, 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)


put, score, write_result = Checkpoints._put, job.score, job.write_result


def wait_until(name, happened):
    deadline = time.monotonic() + 60
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    (notes / name).write_text(json.dumps(time.monotonic() < deadline))


def patient_put(self, number, write):
    log = self.folder.parent.parent / "student.log.jsonl"
    if number == 6:
        wait_until("waited.json", lambda: len(log.read_text().splitlines()) >= 10)
    put(self, number, write)


def counted_score(model, share, **options):
    scored.append(sum(len(tokens) - 1 for tokens in share.tokens))
    return score(model, share, **options)


def late_result(*arguments):
    wait_until("left.json", (notes / "sent-1.json").exists)
    write_result(*arguments)


Training._step = planted_step
if what == "watch":
    torch.nn.parallel.DistributedDataParallel = Counting
    Checkpoints._put, job.score, job.write_result = patient_put, counted_score, late_result
code = main(sys.argv[3:])
(notes / f"scored-{{rank}}.json").write_text(json.dumps(scored))
(notes / f"sent-{{rank}}.json").write_text(json.dumps(sent))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run in one process."""
    return train(world, tmp_path_factory.mktemp("alone"), *SETTINGS)


def run_planted(world: World, folder: Path, what: str, *overrides: str, restarts: int = 0) -> str:
    """Two processes; returns what they said."""
    script = folder / "planted.py"
    script.write_text(PLANTED.format(root=str(ROOT)), encoding="utf-8")
    arguments = [what, str(folder), str(world.recipe), f"run.output_dir={folder}", *SETTINGS, *overrides]
    done = subprocess.run(
        launch.command(2, arguments, max_restarts=restarts, script=script),
        env=launch.environment(2, os.environ), cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def watched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run in two processes, watched."""
    folder = tmp_path_factory.mktemp("watched")
    run_planted(world, folder, "watch", "run.checkpoint_every.steps=6")
    return folder


def test_two_watched_processes_equal_one(alone: Path, watched: Path) -> None:
    assert result_of(watched / "tiny")["processes"] == 2
    assert_same_trajectory(alone, watched / "tiny")


def test_frozen_parts_send_no_gradients(watched: Path) -> None:
    """Exactly the trained parameters, once a step: all but embedding and head in the first stage, then all."""
    weights = load_file(watched / "tiny" / "student" / "model.safetensors")
    frozen = sum(w.numel() for name, w in weights.items() if name.startswith(("model.embed_tokens", "lm_head")))
    everything = sum(w.numel() for w in weights.values())
    assert frozen > everything / 3
    for rank in (0, 1):
        sent = json.loads((watched / f"sent-{rank}.json").read_text(encoding="utf-8"))
        assert sent == {"0": 12 * 4 * (everything - frozen), "1": 16 * 4 * everything, "2": 8 * 4 * everything}


def test_nobody_waits_for_the_disk(watched: Path) -> None:
    """The checkpoint of step 6 was not written before step 10, and the run went on meanwhile. And who has nothing left
    to do has left before the result was written."""
    assert json.loads((watched / "waited.json").read_text(encoding="utf-8")) is True
    assert json.loads((watched / "left.json").read_text(encoding="utf-8")) is True


def test_nobody_waits_for_anothers_evaluation(watched: Path) -> None:
    """Each scores its half of every validation."""
    one, other = (json.loads((watched / f"scored-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert len(one) == len(other) >= 5
    whole = result_of(watched / "tiny")["student"]["tokens"]
    assert all(a + b == whole and abs(a - b) <= 40 for a, b in zip(one, other, strict=True))  # a document has up to 40


def test_a_killed_process_is_restarted_and_nothing_is_lost(watched: Path, world: World, tmp_path: Path) -> None:
    """SIGKILL in mid-epoch: torchrun starts both anew from the last checkpoint; bit-equal to an undisturbed run."""
    said = run_planted(world, tmp_path, "kill", "run.checkpoint_every.steps=3", restarts=1)
    assert said.count("going on from") == 1
    assert [row["step"] for row in log_of(tmp_path / "tiny")] == list(range(1, 37))
    assert_same_trajectory(watched / "tiny", tmp_path / "tiny", bitwise=True)


# ---------------------------------------------------------------- work shared out


def documents(*lengths: int) -> Documents:
    sizes = np.asarray(lengths)
    return Documents([np.full(n, n) for n in lengths], sizes * 4, sizes)


def test_shares_of_the_validation_are_about_equal() -> None:
    """Every document once, in order, and no process has more than another by more than one document."""
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(2, 400, size=100)]
    for processes in (1, 2, 3, 8):
        shares = [_share(documents(*lengths), process, processes) for process in range(processes)]
        assert sorted(len(t) for share in shares for t in share.tokens) == sorted(lengths)
        assert [len(t) for t in _share(documents(*lengths), 0, 1).tokens] == lengths
        loads = [sum(len(t) for t in share.tokens) for share in shares]
        assert max(loads) - min(loads) <= min(lengths) + 20
        for share in shares:
            assert [int(b) for b in share.utf8_bytes] == [4 * len(t) for t in share.tokens]


def test_a_run_folder_that_another_machine_does_not_see(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.run_folder.SHARED_FOLDER_SECONDS", 0.0)
    recipe = load_recipe(str(world.recipe), [f"run.output_dir={tmp_path}"])
    elsewhere: Any = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    with pytest.raises(UserError, match="common file system") as caught:
        claim_folder(recipe, elsewhere)
    assert caught.value.every_process


# ---------------------------------------------------------------- a teacher in shards


def shards(world: World, folder: Path, config: str, **environment: str) -> tuple[Path, str]:
    """A run of two processes under one of accelerate's configurations, and what it said."""
    run = run_command(
        str(world.recipe), f"run.output_dir={folder}", *SETTINGS, **environment,
        launcher=("-m", "distill.launch", "--processes", "2", "--config", str(FOLDER / f"{config}.yaml")),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert result_of(folder / "tiny")["processes"] == 2
    return folder / "tiny", run.stderr


def said_bytes(said: str, engine: str) -> tuple[float, float]:
    """MiB of the teacher's weights in the main process, and of all of them."""
    (line,) = (line for line in said.splitlines() if f"teacher in 2 shards ({engine})" in line)
    words = line.split(": ")[-1].split()
    return float(words[0]), float(words[2])


def test_a_teacher_in_shards_of_fsdp(alone: Path, world: World, tmp_path: Path) -> None:
    """The same losses as one process with a whole teacher; half of its weights lie here, and the student is whole."""
    folder, said = shards(world, tmp_path, "fsdp2")
    assert_same_trajectory(alone, folder)
    here, everywhere = said_bytes(said, "fsdp")
    assert here == pytest.approx(everywhere / 2, abs=0.006)
    result = result_of(folder)
    assert result["teacher"]["parameters"] == result_of(alone)["teacher"]["parameters"]
    assert result["teacher"]["decode_tokens_per_second"] is None


def test_a_cache_built_from_shards_is_that_of_a_whole_teacher(world: World, tmp_path: Path) -> None:
    """Its only shard is built by one of the processes, while the other helps; a whole teacher goes on from it.

    The teacher's embedding is tied to its head, which in shards are two objects.
    """
    tied = tmp_path / "tied"
    shutil.copytree(world.teacher, tied)
    save_llama(tied, vocab_size=64, initializer_range=0.2, tie_word_embeddings=True)
    cache = [str(world.recipe), f"teacher.model={tied}", "targets.cache=true", f"targets.cache_dir={tmp_path}"]
    built = subprocess.run(
        launch.command(2, cache, FOLDER / "fsdp2.yaml", script=ROOT / "distill" / "cache.py"),
        env=launch.environment(2, {**os.environ, "PYTHONPATH": str(ROOT)}), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert built.returncode == 0 and "teacher in 2 shards" in built.stderr, built.stderr
    file = tmp_path / shard_file(0)
    found, at = file.read_bytes(), file.stat().st_mtime_ns
    recipe = load_recipe(cache[0], cache[1:])
    whole = TeacherAndText(recipe, start_accelerator(recipe))
    whole.cached_targets()
    assert file.stat().st_mtime_ns == at, "another teacher's would have been refused, and a damaged one built again"
    file.unlink()
    whole.cached_targets()
    assert file.read_bytes() == found


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs potstill[deepspeed]")
def test_a_teacher_in_shards_of_zero3(alone: Path, world: World, tmp_path: Path) -> None:
    folder, said = shards(world, tmp_path, "zero3", DS_ACCELERATOR="cpu")
    assert_same_trajectory(alone, folder)
    here, everywhere = said_bytes(said, "zero3")
    assert here == pytest.approx(everywhere / 2, abs=0.006)


# ---------------------------------------------------------------- two hosts

# Two network namespaces joined by a cable, in a namespace of this test's own, which takes all of it along when it ends.
HOSTS = """
set -euo pipefail
mount -t tmpfs tmpfs /run
ip netns add one
ip netns add two
ip link add cable-one netns one type veth peer name cable-two netns two
for host in one two; do
    ip -n $host link set lo up
    ip -n $host link set cable-$host up
done
ip -n one addr add 10.77.0.1/24 dev cable-one
ip -n two addr add 10.77.0.2/24 dev cable-two
"""
ON_EACH = """
GLOO_SOCKET_IFNAME=cable-two ip netns exec two "$@" --machine_rank 1 $TAIL &
GLOO_SOCKET_IFNAME=cable-one ip netns exec one "$@" --machine_rank 0 $TAIL
wait $!
ip -n one -json -stats link show cable-one > "$NOTES"
"""


def on_two_hosts(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = ["unshare", "--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    return subprocess.run(
        [*own, "bash", "-c", HOSTS + script, "bash", *arguments],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_two_machines_equal_one_process(alone: Path, world: World, tmp_path: Path) -> None:
    """The call of recipes/accelerate/machines2.yaml on both, one process each, with gloo over their cable."""
    if missing := [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]:
        pytest.skip(f"no {', '.join(missing)} on this machine")
    trial = on_two_hosts("true")
    if trial.returncode:
        pytest.skip(f"no network namespaces may be made here: {trial.stderr.strip().splitlines()[-1]}")
    call = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "machines2.yaml"),
        "--num_processes", "2", "--main_process_ip", "10.77.0.1",
    ]  # fmt: skip
    words = ["distill/run.py", str(world.recipe), f"run.output_dir={tmp_path}", *SETTINGS]
    done = on_two_hosts(
        ON_EACH, *call, TAIL=" ".join(words), NOTES=str(tmp_path / "cable.json"), ACCELERATE_USE_CPU="true",
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "tiny")["processes"] == 2
    assert_same_trajectory(alone, tmp_path / "tiny")
    (cable,) = json.loads((tmp_path / "cable.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "tiny" / "student" / "model.safetensors")
    gradients = 16 * 4 * sum(weight.numel() for weight in weights.values())  # of the second stage
    assert cable["stats64"]["tx"]["bytes"] > gradients / 2


def test_the_recipe_for_eight_gpus_goes_on_two_machines() -> None:
    """As docs/scaling.md says: with fewer lanes in a forward pass."""
    name = str(ROOT / "recipes" / "gpt2-openwebtext.yaml")
    assert micro_batch_size(load_recipe(name, []), 8) == 32
    assert micro_batch_size(load_recipe(name, ["run.micro_batch_size=16"]), 16) == 16
    with pytest.raises(UserError, match="must be a multiple of processes"):
        micro_batch_size(load_recipe(name, []), 16)
