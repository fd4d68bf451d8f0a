"""Shards of cached targets: few are open, each is compared once, and object storage is read ahead of the training."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World, result_of, run_command
from test_targets import batch_of, make_recipe, open_parts

from distill import cache, shards
from distill.config import TargetsConfig, UserError
from distill.corpus import lane_order
from distill.job import TeacherAndText
from distill.sealed import seal
from distill.session import sha256
from distill.shards import HELD, Remote, Shards, map_shard
from distill.targets import CachedTargets, shard_file


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.targets.SHARD_TOKENS", 160)


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[TeacherAndText, CachedTargets]:
    """A cache of more than thirty shards."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.targets.SHARD_TOKENS", 160)
        parts = open_parts(make_recipe(world, folder))
        return parts, parts.cached_targets()


def numbers(count: int) -> dict[int, dict[str, np.ndarray]]:
    """Shards of ten rows, which say where they come from."""
    return {n: {"a": np.arange(10)[:, None] + 100 * n} for n in range(count)}


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_come_from_their_places_and_few_shards_stay_open(ahead: bool) -> None:
    content, loaded = numbers(3000), []

    def load(number: int) -> dict[str, np.ndarray]:
        loaded.append(number)
        return content[number]

    found = Shards(load, content, ahead=ahead)
    lanes, most = 4, 0
    for step in range(7500):
        places = [divmod(lane * 7500 + step, 10) for lane in range(lanes)]
        rows = found.rows(places)["a"]
        assert rows[:, 0].tolist() == [100 * shard + row for shard, row in places]
        most = max(most, len(found.open))
    again = lanes - 1 if ahead else 0  # at its end a lane looks ahead into the next one's first, closed by then
    assert set(loaded) == set(range(3000)) and len(loaded) <= 3000 + again, "each once"
    assert most <= lanes * (HELD // 10 + 3)


def test_the_next_shard_is_fetched_before_it_is_needed() -> None:
    begun = threading.Semaphore(0)
    content, threads = numbers(3), {}

    def load(number: int) -> dict[str, np.ndarray]:
        threads[number] = threading.current_thread()
        begun.release()
        return content[number]

    Shards(load, content, ahead=True).rows([(0, 1)])
    assert all(begun.acquire(timeout=20) for _ in range(2))
    assert set(threads) == {0, 1} and threading.current_thread() not in threads.values()


def test_a_shard_with_other_columns_is_refused(built: tuple[TeacherAndText, CachedTargets]) -> None:
    _, targets = built
    assert isinstance(targets.folder, Path)
    file, schema = targets.folder / shard_file(0), targets.layout.features.arrow_schema
    assert map_shard(file, schema).keys() == targets.layout.columns.keys()
    with pytest.raises(UserError, match=r"train-00000.arrow: its columns are not those of the manifest; delete it"):
        map_shard(file, schema.remove(schema.get_field_index("scale")))


def test_a_checksum_is_taken_once(
    built: tuple[TeacherAndText, CachedTargets], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of shards found or downloaded; a change of time or size has it taken again, `verify` always does."""
    parts, first = built
    assert isinstance(first.folder, Path)
    taken: list[str] = []
    monkeypatch.setattr(shards, "sha256", lambda file: taken.append(file.name) or sha256(file))
    count = len(first.manifest["shards"])
    assert count > 30
    parts.cached_targets()
    assert taken == [], "written here"
    (first.folder / shards.CHECKED).unlink()
    parts.cached_targets()
    assert len(taken) == count
    file = first.folder / shard_file(2)
    os.utime(file, ns=(0, 0))
    parts.cached_targets()
    assert len(taken) == count + 1 and taken[-1] == file.name
    (first.folder / shards.CHECKED).write_text("[")
    parts.cached_targets()
    parts.cached_targets()
    assert len(taken) == 2 * count + 1

    stamp, content = file.stat(), file.read_bytes()
    changed = bytearray(content)
    changed[-100] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    parts.cached_targets()
    assert file.read_bytes() == changed, "as the rule says: not looked at"
    parts.cached_targets(verify=True)
    assert file.read_bytes() == content and f"{file}: damaged" in "".join(capsys.readouterr())


def test_a_url_and_a_repository_are_two_places() -> None:
    with pytest.raises(ValueError, match="give one place to read from"):
        TargetsConfig(cache=True, cache_dir="s3://bucket/targets", repo="me/targets")


@pytest.fixture
def in_memory(built: tuple[TeacherAndText, CachedTargets], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The cache in fsspec's file system of this process."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.put(f"{built[1].folder}/", "/targets/", recursive=True)
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    yield system
    system.rm("/targets", recursive=True)


def at(parts: TeacherAndText, url: str) -> CachedTargets:
    targets = parts.recipe.targets.model_copy(update={"cache_dir": url})
    recipe = parts.recipe.model_copy(update={"targets": targets})
    moved = object.__new__(TeacherAndText)
    moved.__dict__.update({**parts.__dict__, "recipe": recipe})
    return moved.cached_targets()


def test_a_remote_cache_has_the_targets_of_the_local_one(
    built: tuple[TeacherAndText, CachedTargets], in_memory: Any
) -> None:
    parts, local = built
    remote = at(parts, "memory://targets")
    assert remote.manifest["shards"].keys() == local.manifest["shards"].keys()
    for ids_G in lane_order(len(parts.blocks), 8, epoch=0, seed=0):
        batch = parts.blocks.batch(ids_G)
        one, other = local.signal(batch), remote.signal(batch)
        assert torch.equal(one.hidden_Nd, other.hidden_Nd)  # type: ignore[union-attr]
    assert len(remote.shards.open) < len(local.manifest["shards"])
    assert remote.shards.pool is not None
    remote.shards.pool.shutdown()
    left = list(remote_place(parts).glob("fetching-*"))
    assert left == [], "nothing is left behind"


def remote_place(parts: TeacherAndText) -> Path:
    assert parts.recipe.corpus.cache_dir is not None
    return parts.recipe.corpus.cache_dir / "targets"


def test_what_is_wrong_with_a_remote_cache_is_said(
    built: tuple[TeacherAndText, CachedTargets], in_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, local = built
    batch = parts.blocks.batch([0])
    content = in_memory.cat_file(f"/targets/{shard_file(0)}")
    in_memory.pipe_file(f"/targets/{shard_file(0)}", content[:-9] + b"\1" + content[-8:])
    with pytest.raises(UserError, match=r"memory://targets/data/train-00000.arrow cannot be read: .*checksum differs"):
        at(parts, "memory://targets").signal(batch)
    in_memory.rm(f"/targets/{shard_file(0)}")
    with pytest.raises(UserError, match="train-00000.arrow cannot be read: FileNotFoundError"):
        at(parts, "memory://targets").signal(batch)
    in_memory.pipe_file(f"/targets/{shard_file(0)}", content)

    manifest = json.loads(in_memory.cat_file("/targets/targets.json"))
    del manifest["shards"]["3"]
    in_memory.pipe_file("/targets/targets.json", json.dumps(seal(manifest)).encode())
    with pytest.raises(UserError, match=r"lacks 1 of \d+ shards, the first data/train-00003.arrow; .* read only"):
        at(parts, "memory://targets")
    manifest["identity"]["corpus"] = "other"
    in_memory.pipe_file("/targets/targets.json", json.dumps(seal(manifest)).encode())
    with pytest.raises(UserError, match="memory://targets belong to another run"):
        at(parts, "memory://targets")
    with pytest.raises(UserError, match="memory://nowhere/targets.json cannot be read: FileNotFoundError"):
        at(parts, "memory://nowhere")
    with pytest.raises(UserError, match="nosuch://bucket: Protocol not known"):
        at(parts, "nosuch://bucket")

    failures = iter([ConnectionError("reset"), TimeoutError("late")])
    fetch = type(in_memory).get_file

    def unsteady(self: Any, *arguments: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return fetch(self, *arguments, **options)

    monkeypatch.setattr(type(in_memory), "get_file", unsteady)
    remote = Remote("memory://targets", remote_place(parts))
    columns = remote.shard(shard_file(0), local.manifest["shards"]["0"], local.layout.features.arrow_schema)
    assert len(columns["hidden"]) > 0


def test_a_missing_reader_of_s3_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3://bucket/targets: .*pip install 'potstill\[s3\]'"):
        Remote("s3://bucket/targets", tmp_path)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of a loopback server that speaks S3's protocol, with a bucket `caches`."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    import boto3

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="caches")
        yield environment
    running.stop()


def test_a_cache_is_read_from_s3(
    built: tuple[TeacherAndText, CachedTargets],
    world: World,
    s3: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Uploaded as it is, it gives the same targets, also to a run in two processes; it is not built there."""
    import boto3

    parts, local = built
    assert isinstance(local.folder, Path)
    client = boto3.client("s3")
    for name in ("targets.json", *(shard_file(int(n)) for n in local.manifest["shards"])):
        client.upload_file(str(local.folder / name), "caches", f"mine/{name}")
    remote, batch = at(parts, "s3://caches/mine"), batch_of(parts)
    assert torch.equal(remote.signal(batch).hidden_Nd, local.signal(batch).hidden_Nd)  # type: ignore[union-attr]

    stage = json.dumps({"objective": "forward_kl", "length": {"steps": 6}})
    arguments = [str(world.recipe), "control=false", f"stages=[{stage}]", f"run.output_dir={tmp_path}"]
    arguments += ["targets.cache=true", "targets.cache_dir=s3://caches/mine"]
    run = run_command(*arguments, launcher=("-m", "distill.launch", "--processes", "2"), **s3)
    assert run.returncode == 0, run.stderr
    assert "not-a-secret" not in run.stdout + run.stderr
    result = result_of(tmp_path / "tiny")
    assert result["processes"] == 2 and result["targets"]["cached"]
    assert cache.main(arguments) == 2 and "read only" in capsys.readouterr().err
