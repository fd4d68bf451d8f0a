"""Cached targets: the same numbers as from the live teacher, validated, resumed, repaired.

python -m pytest tests/test_targets.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, World, result_of, run_command
from hub_server import Hub

from distill.config import Recipe, TargetsConfig, UserError
from distill.corpus import BlockBatch, Blocks
from distill.job import TeacherAndText, run, start_accelerator
from distill.recipe import load_recipe
from distill.sealed import seal
from distill.signals import DenseSignal, HiddenSignal, SparseSignal
from distill.targets import CachedTargets, make_encoding, shard_file

KINDS = {"hidden": {}, "dense": {}, "top_k": {"k": 5}, "sampled": {"samples": 5}}


def make_recipe(world: World, folder: Path, kind: str = "hidden", **fields: object) -> Recipe:
    """The tiny recipe with a cache in `folder`; its stages fit any signal."""
    targets = {"signal": kind, "cache": "true", "cache_dir": folder, **KINDS[kind], **fields}
    stage = {"objective": "forward_kl", "length": {"steps": 4}}
    overrides = [f"targets.{name}={value}" for name, value in targets.items()]
    return load_recipe(str(world.recipe), [*overrides, f"stages=[{json.dumps(stage)}]"])


def open_parts(recipe: Recipe) -> TeacherAndText:
    return TeacherAndText(recipe, start_accelerator(recipe))


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TeacherAndText, CachedTargets]]:
    """A finished cache of each kind."""
    found = {}
    for kind in KINDS:
        parts = open_parts(make_recipe(world, tmp_path_factory.mktemp(kind), kind))
        found[kind] = parts, parts.cached_targets()
    return found


def batch_of(parts: TeacherAndText) -> BlockBatch:
    last = len(parts.blocks) - 1
    return parts.blocks.batch([last, 3, 0, last // 2])


def test_cached_hidden_states_are_those_of_the_teacher(built: dict) -> None:
    parts, targets = built["hidden"]
    live, stored = (source.signal(batch_of(parts)) for source in (live_of(parts), targets))
    assert isinstance(live, HiddenSignal) and isinstance(stored, HiddenSignal)
    error_Nd = (stored.hidden_Nd - live.hidden_Nd).abs()
    scale_d = torch.tensor(targets.manifest["dimension_scale"])
    largest_N1 = (live.hidden_Nd / scale_d).abs().amax(-1, keepdim=True)
    assert (error_Nd <= largest_N1 * scale_d / 127 * 0.51).all(), "half a step of int8"


def live_of(parts: TeacherAndText):
    from distill.targets import LiveTargets

    return LiveTargets(parts.teacher, parts.encoding)


def test_cached_dense_and_sparse_targets_are_those_of_the_teacher(built: dict) -> None:
    parts, targets = built["dense"]
    live, stored = live_of(parts).signal(batch_of(parts)), targets.signal(batch_of(parts))
    assert isinstance(live, DenseSignal) and isinstance(stored, DenseSignal)
    p, q = (torch.softmax(s.logits_NV, -1) for s in (live, stored))
    torch.testing.assert_close(q, p, atol=2e-3, rtol=5e-3)
    for kind in ("top_k", "sampled"):
        parts, targets = built[kind]
        live, stored = live_of(parts).signal(batch_of(parts)), targets.signal(batch_of(parts))
        assert isinstance(live, SparseSignal) and isinstance(stored, SparseSignal)
        assert torch.equal(live.ids_NK, stored.ids_NK)
        torch.testing.assert_close(stored.probs_NK, live.probs_NK, atol=1e-5, rtol=2e-3)
        rest, stored_rest = (s.tail_N if kind == "top_k" else s.entropy_N for s in (live, stored))
        torch.testing.assert_close(stored_rest, rest, atol=2e-3, rtol=2e-3)


def test_sizes_are_those_of_the_columns(built: dict) -> None:
    """Numbers, and 16 tokens' share of the block's own; Arrow's frame is a few hundred bytes a shard."""
    width = built["hidden"][0].teacher.width
    for kind, expected in {"hidden": width + 4, "top_k": 5 * 4 + 2, "sampled": 5 * 4 + 2}.items():
        targets = built[kind][1]
        assert expected < targets.bytes_per_token < expected + 2, kind


def test_datasets_loads_the_folder(built: dict) -> None:
    parts, targets = built["sampled"]
    rows = datasets.load_dataset(str(targets.folder), split="train")
    assert rows["block"] == list(range(len(parts.blocks)))
    assert len(rows[0]["ids"]) == 5 * parts.blocks.block_length


def test_a_damaged_shard_is_named_and_rebuilt_alone(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.targets.SHARD_TOKENS", 640)
    parts = open_parts(make_recipe(world, tmp_path))
    first = parts.cached_targets()
    names = [shard_file(n) for n in range(len(first.manifest["shards"]))]
    assert len(names) >= 4
    contents = {name: (tmp_path / name).read_bytes() for name in names}
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / names[1]).write_bytes(contents[names[1]][:-7])
    changed = bytearray(contents[names[2]])
    changed[len(changed) // 2] ^= 1
    (tmp_path / names[2]).write_bytes(changed)
    capsys.readouterr()
    again = parts.cached_targets()
    told = "".join(capsys.readouterr())
    for name in names:
        assert (tmp_path / name).read_bytes() == contents[name]
        repaired = name in names[1:3]
        assert (name in told) == repaired
        assert ((tmp_path / name).stat().st_mtime_ns != times[name]) == repaired
    assert again.manifest["shards"].keys() == first.manifest["shards"].keys()


def test_more_tokens_are_added_to_what_is_there(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.targets.SHARD_TOKENS", 640)
    few = open_parts(make_recipe(world, tmp_path, max_tokens=1000))
    targets = few.cached_targets()
    assert len(few.cached_blocks) * few.blocks.block_length - 1000 < few.blocks.block_length
    time_of_first = (tmp_path / shard_file(0)).stat().st_mtime_ns
    count = len(targets.manifest["shards"])
    parts = open_parts(make_recipe(world, tmp_path))
    assert len(parts.cached_targets().manifest["shards"]) > count
    assert (tmp_path / shard_file(0)).stat().st_mtime_ns == time_of_first


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (["corpus.block_length=16"], ["block_length: the cache has 8, the run 16", "window"]),
        (["teacher.context=2"], ["window"]),
        (["corpus.max_documents=200"], ["corpus: the cache has"]),
        (["targets.hidden_dtype=fp16"], ["hidden_dtype: the cache has 'int8', the run 'fp16'"]),
        (["targets.signal=top_k", "targets.k=5"], ["encoding: the cache has 'hidden', the run 'top_k'"]),
    ],
)
def test_a_cache_of_something_else_is_refused(world: World, built: dict, changes: list[str], names: list[str]) -> None:
    folder = built["hidden"][1].folder
    recipe = make_recipe(world, folder)
    stage = json.dumps({"objective": "forward_kl", "length": {"steps": 4}})
    overrides = [f"targets.cache_dir={folder}", "targets.cache=true", f"stages=[{stage}]", *changes]
    recipe = load_recipe(str(world.recipe), overrides)
    with pytest.raises(UserError, match="belong to another run") as caught:
        open_parts(recipe).cached_targets()
    for name in names:
        assert name in str(caught.value)


def test_a_cache_of_another_teacher_is_refused(built: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, targets = built["hidden"]
    monkeypatch.setattr(parts, "teachers", replace(parts.teacher))  # as newly loaded: its hash is not known yet
    weight = next(parts.teacher.model.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        with pytest.raises(UserError, match="teacher_weights: the cache has"):
            parts.cached_targets()
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_newer_format_and_a_broken_manifest_are_refused(world: World, tmp_path: Path) -> None:
    parts = open_parts(make_recipe(world, tmp_path, max_tokens=100))
    parts.cached_targets()
    file = tmp_path / "targets.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(seal({**manifest, "format": 99})))
    with pytest.raises(UserError, match="expected format 1, found 99"):
        parts.cached_targets()
    file.write_text("{")
    with pytest.raises(UserError, match="expected the manifest"):
        parts.cached_targets()


def test_more_outcomes_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"targets.k: expected at most the 10 tokens .* found 11"):
        make_encoding(TargetsConfig(signal="top_k", k=11), 10)
    with pytest.raises(UserError, match=r"targets.samples: expected at most the 4 tokens"):
        make_encoding(TargetsConfig(signal="sampled"), 4)


def test_a_full_disk_loses_nothing(world: World, tmp_path: Path) -> None:
    """Files may grow to 4,000 bytes: one message, and afterwards the same command finishes."""
    arguments = [str(world.recipe), f"targets.cache_dir={tmp_path}", "targets.max_tokens=2000"]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); "
        "from distill.cache import main; sys.exit(main(sys.argv[1:]))"
    )
    run = run_command(*arguments, launcher=("-c", code))
    assert run.returncode == 2, run.stderr
    assert "targets.cache_dir" in run.stderr and "Traceback" not in run.stderr
    run = run_command(*arguments, launcher=("-m", "distill.cache"))
    assert run.returncode == 0, run.stderr


def test_a_killed_build_goes_on(world: World, tmp_path: Path) -> None:
    """What it left is kept, and the whole equals a cache built in one go, byte by byte."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import sys, distill.targets as t; t.SHARD_TOKENS = 320; import time; build = t._build_shard\n"
        "def slow(*a): build(*a); time.sleep(float(sys.argv[1]))\n"
        "t._build_shard = slow\n"
        "from distill.cache import main\nsys.exit(main(sys.argv[2:]))"
    )
    script = tmp_path / "build.py"
    script.write_text(code)

    def command(folder: str, pause: float) -> list[str]:
        arguments = [str(world.recipe), f"targets.cache_dir={tmp_path / folder}", "targets.max_tokens=4000"]
        return [sys.executable, str(script), str(pause), *arguments]

    process = subprocess.Popen(command("killed", 0.3), env=environment, start_new_session=True)
    building = tmp_path / "killed" / "building"
    deadline = time.monotonic() + 120
    while len(list(building.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.stem for path in building.glob("[0-9]*.json")}
    times = {stem: (tmp_path / "killed" / shard_file(int(stem))).stat().st_mtime_ns for stem in done}
    for folder in ("killed", "whole"):
        run = subprocess.run(command(folder, 0), env=environment, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
    shards = sorted(path.name for path in (tmp_path / "whole" / "data").iterdir())
    assert len(shards) > 3 and shards == sorted(path.name for path in (tmp_path / "killed" / "data").iterdir())
    for name in shards:
        killed, whole = (tmp_path / folder / "data" / name for folder in ("killed", "whole"))
        assert killed.read_bytes() == whole.read_bytes()
    for stem, written in times.items():
        assert (tmp_path / "killed" / shard_file(int(stem))).stat().st_mtime_ns == written, "kept, not built again"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_from_the_cache(world: World, tmp_path: Path, kind: str) -> None:
    """It ends at the loss of a run with the live teacher; one kind is built and read by two processes."""
    stage = {"objective": "forward_kl", "length": {"steps": 6}}
    common = [
        str(world.recipe), f"targets.signal={kind}", "targets.k=5", "targets.samples=5", "control=false",
        f"stages=[{json.dumps(stage)}]", f"run.output_dir={tmp_path}",
    ]  # fmt: skip
    cached = ["targets.cache=true", f"targets.cache_dir={tmp_path / 'cache'}", "run.name=cached"]
    launcher = ("-m", "distill.launch", "--processes", "2") if kind == "sampled" else ("distill/run.py",)
    for arguments in (["run.name=live"], cached):
        done = run_command(*common, *arguments, launcher=launcher)
        assert done.returncode == 0, done.stderr
    live, stored = (result_of(tmp_path / name) for name in ("live", "cached"))
    assert stored["student"]["nll_nats"] == pytest.approx(live["student"]["nll_nats"], abs=0.01)
    assert stored["targets"]["cached"] and stored["targets"]["bytes_per_token"] > 0
    assert stored["student"]["train_seconds"] >= stored["targets"]["seconds"] > 0


def test_a_stage_without_teacher_reads_all_of_the_text(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cache of some tokens, the stages before and after it read no more than these."""
    seen: list[int] = []
    batch = Blocks.batch

    def watched(blocks: Blocks, block_ids: np.ndarray) -> BlockBatch:
        seen.append(int(block_ids.max()))
        return batch(blocks, block_ids)

    monkeypatch.setattr(Blocks, "batch", watched)
    stages = [{"objective": name, "length": {"steps": 9}} for name in ("forward_kl", "cross_entropy", "forward_kl")]
    recipe = load_recipe(
        str(world.recipe),
        [
            "control=false", f"run.output_dir={tmp_path}", "targets.cache=true", "targets.max_tokens=640",
            f"targets.cache_dir={tmp_path / 'cache'}", f"stages={json.dumps(stages)}", "student.fit_tokens=0",
        ],
    )  # fmt: skip
    run(recipe)
    first, middle, last = (seen[-27:][start : start + 9] for start in (0, 9, 18))
    assert max(first) < 80 and max(last) < 80 and max(middle) > 200


def test_a_cache_goes_to_the_hub_and_comes_back(world: World, tmp_path: Path) -> None:
    """Pushed as a data set, downloaded by another run that builds nothing; a cache of other text is refused."""
    common = [str(world.recipe), "control=false", "targets.cache=true", f"run.output_dir={tmp_path}"]
    cache = ("-m", "distill.cache")
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        built = f"targets.cache_dir={tmp_path / 'built'}"
        pushed = run_command(*common, built, "--push", "me/targets", launcher=cache, **environment)
        assert pushed.returncode == 0, pushed.stderr
        assert "token-of-me" not in pushed.stdout + pushed.stderr
        assert "POST /api/datasets/me/targets/commit/main" in hub.requests, "as a data set, not as a model"
        files = hub.files("me/targets")
        assert hub.repos["me/targets"].private and ".lock" not in files
        assert files["targets.json"] == (tmp_path / "built" / "targets.json").read_bytes()

        fetched = [*common, "targets.repo=me/targets", f"targets.cache_dir={tmp_path / 'fetched'}"]
        done = run_command(*fetched, **environment)
        assert done.returncode == 0, done.stderr
        assert "hidden targets" not in done.stderr, "nothing is built"
        shard = Path(shard_file(0))
        assert (tmp_path / "fetched" / shard).read_bytes() == (tmp_path / "built" / shard).read_bytes()

        other = run_command(*fetched, "corpus.max_documents=300", "run.name=other", **environment)
        assert other.returncode == 2 and "corpus: the cache has" in other.stderr
        refused = run_command(*common, built, "--push", "others/targets", launcher=cache, **environment)
        assert refused.returncode == 2 and "others/targets: the hub refused" in refused.stderr
