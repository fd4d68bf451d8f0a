"""Shards of cached targets: opened while they are in use, checked once, and fetched ahead from object storage.

A shard on this machine is memory-mapped. One behind a URL (`s3://bucket/folder`, or whatever else `fsspec` reads) is
fetched as a whole by a few threads, compared with its checksum and mapped; its file has no name any more by then, so
that it goes with the last use of it, and a process that is killed leaves no more than the few it was fetching. While a
lane reads one shard the next is fetched. Memory and disk hold the shards in use and those that follow them, however
many there are.

A checksum takes time, hours for terabytes. So those of a folder are taken once: `.checked.json` has size and time of
last change of each shard that was found to be what the manifest says, or was written here; while both are the same
the shard is not read again. `python -m distill.cache RECIPE --verify` takes all of them anew.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.checkpoint import write_json
from distill.config import UserError
from distill.session import sha256

HELD = 64  # batches for which a shard stays open after its last use: more than a step has micro-batches
FETCHERS = 4  # threads
ATTEMPTS = 4  # to fetch a shard, a second before the next, then two, then four
CHECKED = ".checked.json"

Columns = dict[str, np.ndarray]  # (blocks of the shard, numbers of a block) each
Record = dict[str, Any]  # `blocks`, `bytes` and `sha256` of a shard, as in the manifest


class Shards:
    """The columns of shards by number."""

    def __init__(self, load: Callable[[int], Columns], numbers: Iterable[int], *, ahead: bool) -> None:
        """`load` opens one of the shards with these `numbers`; `ahead`: in threads, and also the one after it."""
        self.load, self.numbers = load, frozenset(numbers)
        self.pool = ThreadPoolExecutor(FETCHERS, "shards") if ahead else None
        self.open: dict[int, Future[Columns]] = {}
        self.used: dict[int, int] = {}  # the last batch that wanted a shard
        self.batch = 0

    def rows(self, places: Iterable[tuple[int, int]]) -> Columns:
        """Rows (B, numbers of a block) at `places`: a shard's number and a row in it."""
        places = list(places)
        self.batch += 1
        wanted = {number for number, _ in places}
        for number in [*wanted, *((number + 1 for number in wanted) if self.pool else ())]:
            if number in self.numbers:
                self._want(number)
        shards = {number: self.open[number].result() for number in wanted}
        for number in [number for number, batch in self.used.items() if batch < self.batch - HELD]:
            del self.used[number]
            self.open.pop(number).cancel()
        names = next(iter(shards.values()))
        return {name: np.stack([shards[number][name][row] for number, row in places]) for name in names}

    def _want(self, number: int) -> None:
        self.used[number] = self.batch
        if number in self.open:
            return
        if self.pool:
            self.open[number] = self.pool.submit(self.load, number)
        else:
            self.open[number] = Future()
            self.open[number].set_result(self.load(number))


def map_shard(file: Path, schema: pa.Schema) -> Columns:
    """The columns of a shard's file but the blocks' numbers, memory-mapped. UserError where they are others."""
    try:
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise UserError(f"{file}: expected a shard of cached targets: {error}; delete it", every_process=True) from None
    if not table.schema.equals(schema) or table.column("block").null_count:
        raise UserError(f"{file}: its columns are not those of the manifest; delete it", every_process=True)
    arrays = {}
    for name in schema.names:
        if name != "block":
            column: Any = table.column(name).combine_chunks()
            values = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            arrays[name] = values.flatten().to_numpy(zero_copy_only=True).reshape(table.num_rows, -1)
    return arrays


class Remote:
    """A folder behind a URL that is only read. Keys and endpoints come from the environment, as fsspec takes them."""

    def __init__(self, url: str, place: Path) -> None:
        """`place`: where files lie while they are fetched. UserError where nothing here reads such a URL."""
        from fsspec.core import url_to_fs

        self.url, self.place = url, place
        try:
            self.system, self.path = url_to_fs(url)
        except (ImportError, ValueError) as error:
            extra = "; pip install 'potstill[s3]'" if url.startswith("s3:") else ""
            raise UserError(f"targets.cache_dir: {url}: {error}{extra}") from None

    def text(self, name: str) -> str:
        """A small file."""
        return self._patiently(name, lambda path: self.system.cat_file(path).decode("utf-8"))

    def shard(self, name: str, record: Record, schema: pa.Schema) -> Columns:
        """A shard whose content is what its record says, mapped."""

        def fetch(path: str) -> Columns:
            self.place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.place, prefix="fetching-") as folder:
                file = Path(folder) / "shard"
                self.system.get_file(path, str(file))
                if problem := problem_of(file, record):
                    raise OSError(problem)
                return map_shard(file, schema)

        return self._patiently(name, fetch)

    def _patiently(self, name: str, act: Callable[[str], Any]) -> Any:
        failure: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                return act(f"{self.path}/{name}")
            except Exception as error:  # each storage has errors of its own
                failure = error
                if isinstance(error, FileNotFoundError):
                    break
                if attempt < ATTEMPTS - 1:
                    time.sleep(2**attempt)
        reason = (str(failure).strip().splitlines() or [""])[0]
        raise UserError(
            f"targets.cache_dir: {self.url}/{name} cannot be read: {type(failure).__name__} {reason}",
            every_process=True,
        ) from None


def problem_of(file: Path, record: Record) -> str | None:
    """What is wrong with a shard's file, if anything."""
    size = file.stat().st_size
    if size != record["bytes"]:
        return f"{size} bytes instead of {record['bytes']}"
    return "its checksum differs" if sha256(file) != record["sha256"] else None


class Checked:
    """Which shards of a folder have been compared with their checksums, as they are now."""

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        """`anew`: as if none had."""
        self.file = folder / CHECKED
        try:
            found = {} if anew else json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = {}
        self.stamps: dict[str, list[Any]] = found if isinstance(found, dict) else {}
        self.added: dict[str, list[Any]] = {}  # by this process

    def problem_of(self, file: Path, record: Record) -> str | None:
        """What is wrong with a shard's file, if anything; its content is read only where no stamp fits."""
        if self.stamps.get(file.name) == _stamp(file, record):
            return None
        problem = problem_of(file, record)
        if problem is None:
            self.add(file, record)
        return problem

    def add(self, file: Path, record: Record) -> None:
        """Count a shard's file as compared."""
        self.added[file.name] = self.stamps[file.name] = _stamp(file, record)

    def merge(self, others: Iterable[dict[str, list[Any]]]) -> None:
        """Take in what all processes have added."""
        for added in others:
            self.stamps.update(added)

    def save(self) -> None:
        """Write the stamps."""
        write_json(self.file, self.stamps, "targets.cache_dir")


def _stamp(file: Path, record: Record) -> list[Any]:
    """Size and time of last change of a file, and the checksum that it should have."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, record["sha256"]]
