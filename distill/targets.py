"""Soft targets for training: asked of the live teacher, or kept on disk and read in every epoch.

A cache is a folder:

    targets.json                manifest: what the targets are of (`identity`), shards with sizes and checksums
    data/train-00000.arrow      one row a block: its number and its targets (Arrow stream, as `datasets` writes)
    README.md                   a data set card, so that `datasets.load_dataset` reads the folder or its upload
    building/00000.json         record of a shard that is done, until the manifest has it
    .checked.json               which shards need not be compared with their checksums again

Rows are keyed by block, never by step or process, so order of reading, accumulation and number of processes cannot
misalign targets and text. Shard s holds blocks s * S to (s + 1) * S - 1; each process builds shards of its own, under
another name first, so that a shard is whole or missing whenever the machine stops. Opening a cache compares its
identity with the run's, and every shard with its checksum, once (`distill/shards.py` has the rule); what is damaged
or missing is built again, nothing else. A cache behind a URL is read only, and its shards are compared as they come.

Columns, numbers per token: hidden int8 `hidden` d, `scale` 1 (the state is hidden * scale * the manifest's
`dimension_scale`), or `hidden` d in fp16 or fp32; dense `logits` V; top_k `ids` K, `probs` K, `tail` 1; sampled
`ids` K, `probs` K, `entropy` 1.

Legend: B blocks, T block length, N = B * T tokens, V vocabulary, d width of the teacher, K outcomes, S blocks a shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from distill.checkpoint import clear_leftovers, locked, write_atomically, write_json
from distill.config import EndpointConfig, TargetsConfig, UserError
from distill.corpus import BlockBatch, Blocks, Corpus, cache_root, hash_tokenizer
from distill.ensemble import Ensemble
from distill.redact import redact
from distill.sealed import check, differences, read_sealed, seal, unseal
from distill.served import ServedTeacher
from distill.session import sha256
from distill.shards import Checked, Columns, Remote, Shards, map_shard
from distill.signals import DenseSignal, Encoding, Head, HiddenSignal, Signal, SparseSignal, interleave
from distill.teacher import LanguageModel

FORMAT = 1
MANIFEST = "targets.json"
SHARD_BYTES = 32 * 2**20  # a shard is no larger, but for one block
SHARD_TOKENS = 16_384  # and holds no more, so that little is lost when a build is stopped


class _Shard(BaseModel):
    """What the manifest says of one shard."""

    model_config = ConfigDict(extra="forbid", strict=True)

    blocks: Annotated[int, Field(gt=0)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Manifest(BaseModel):
    """What `targets.json` must hold. It names no files: a shard's number gives its place."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    teacher: str
    identity: dict[str, str | int | float | bool | None]
    dimension_scale: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None
    blocks_per_shard: Annotated[int, Field(gt=0)]
    shards: dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], _Shard]

    @model_validator(mode="after")
    def _a_scale_for_each_dimension(self) -> Self:
        found = None if self.dimension_scale is None else len(self.dimension_scale)
        expected = self.identity.get("width") if self.identity.get("hidden_dtype") == "int8" else None
        if found != expected:
            raise ValueError(f"dimension_scale: expected {expected} numbers, found {found}")
        return self


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache; UserError where it is damaged, or of another version."""
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected the manifest of cached targets, found {error}; delete the folder") from None
    return parse_manifest(text, str(folder))


def parse_manifest(text: str, where: str) -> dict[str, Any]:
    """The manifest that a text is, found in `where`; UserError as `read_manifest`."""
    file = f"{where}/{MANIFEST}"
    try:
        manifest = unseal(text)
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{file}: expected format {FORMAT}, found {manifest.get('format')!r}; it was written by another "
                "version of potstill: update, or choose another targets.cache_dir"
            )
        check(manifest, _Manifest)
    except ValueError as error:
        raise UserError(f"{file}: expected the manifest of cached targets, found {error}; delete the folder") from None
    return manifest


class Targets(Protocol):
    """Where a training gets its signals."""

    @property
    def encoding(self) -> Encoding: ...

    @property
    def seconds(self) -> float:
        """Wall time that was spent on targets before training."""
        ...

    def signal(self, batch: BlockBatch, first_only: bool = False) -> Signal:
        """What the teacher says about a batch of blocks; N = B * T rows in the order of the labels.

        With `first_only` the first of several teachers will do: what is asked for is its hidden states.
        """
        ...


class Source(Protocol):
    """Who is asked when a cache is built."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What of the source the targets depend on."""
        ...

    def signals(self, shards: Sequence[np.ndarray]) -> Iterator[Iterable[Signal]]:
        """The signals of each shard of blocks, one for some of its blocks after another."""
        ...


class LocalTeacher:
    """The teacher in this process reads a few blocks at a time."""

    def __init__(
        self, teacher: LanguageModel | Ensemble, blocks: Blocks, encoding: Encoding, batch_tokens: int
    ) -> None:
        """`batch_tokens`: what is read at once."""
        self.teacher, self.blocks, self.encoding, self.batch_tokens = teacher, blocks, encoding, batch_tokens
        self.window = blocks.context + blocks.block_length

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def identity(self) -> dict[str, Any]:
        return {"teacher_weights": self.teacher.weights_hash, "window": self.window}

    def signals(self, shards: Sequence[np.ndarray]) -> Iterator[Iterable[Signal]]:
        step = max(1, self.batch_tokens // self.window)
        for ids in shards:
            parts = (ids[start : start + step] for start in range(0, len(ids), step))
            yield (self.teacher.signal(self.blocks.batch(part), self.encoding) for part in parts)


class LiveTargets:
    """The teacher reads every batch anew."""

    seconds = 0.0

    def __init__(self, teacher: LanguageModel | Ensemble, encoding: Encoding) -> None:
        self.teacher, self.encoding = teacher, encoding

    def signal(self, batch: BlockBatch, first_only: bool = False) -> Signal:
        return (self.teacher.first if first_only else self.teacher).signal(batch, self.encoding)


class CachedTargets:
    """Targets read from a folder, memory-mapped, or from behind a URL."""

    def __init__(self, folder: Path | str, manifest: dict[str, Any], head: Head, seconds: float, place: Path) -> None:
        """`folder`: a URL if it is a string. `seconds`: wall time that building took. `place`: for fetched files."""
        self.folder, self.manifest, self.head, self.seconds = folder, manifest, head, seconds
        identity = manifest["identity"]
        self.encoding = Encoding(identity["encoding"], identity["outcomes"], identity["temperature"])
        self.layout = Layout(identity, manifest["dimension_scale"])
        schema = self.layout.features.arrow_schema
        if isinstance(folder, Path):

            def load(number: int) -> Columns:
                return map_shard(folder / shard_file(number), schema)
        else:
            remote = Remote(folder, place)

            def load(number: int) -> Columns:
                return remote.shard(shard_file(number), manifest["shards"][str(number)], schema)

        self.shards = Shards(load, map(int, manifest["shards"]), ahead=isinstance(folder, str))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the shards a token."""
        shards = self.manifest["shards"].values()
        tokens = sum(shard["blocks"] for shard in shards) * self.layout.block_length
        return sum(shard["bytes"] for shard in shards) / tokens

    def signal(self, batch: BlockBatch, first_only: bool = False) -> Signal:
        size = self.manifest["blocks_per_shard"]
        rows = self.shards.rows(divmod(int(block), size) for block in batch.block_ids_B)
        device = self.head.weight_Vd.device
        columns = {
            name: torch.from_numpy(rows[name].reshape(-1, n)).to(device) for name, (_, n) in self.layout.columns.items()
        }
        return self.layout.unpack(columns, self.head)


class CachedBesideLive:
    """Cached targets of the text, and the live teacher's of blocks that the student wrote, which no cache can have."""

    def __init__(self, cached: CachedTargets, live: Targets) -> None:
        self.cached, self.live = cached, live
        self.encoding, self.seconds = cached.encoding, cached.seconds

    def signal(self, batch: BlockBatch, first_only: bool = False) -> Signal:
        written_B = batch.written_B
        if not written_B.any():
            return self.cached.signal(batch, first_only)
        if written_B.all():
            return self.live.signal(batch, first_only)
        sides = (self.cached, ~written_B), (self.live, written_B)
        text, written = (side.signal(batch.rows(chosen_B), first_only) for side, chosen_B in sides)
        return interleave(text, written, written_B.repeat_interleave(batch.inputs_BT.shape[1]))


class Layout:
    """How a signal of some blocks becomes columns of numbers, and back."""

    def __init__(self, identity: dict[str, Any], dimension_scale: Sequence[float] | None) -> None:
        self.identity, self.block_length = identity, identity["block_length"]
        kind, K, d, V = (identity[name] for name in ("encoding", "outcomes", "width", "vocab_size"))
        self.dimension_scale_d = None if dimension_scale is None else torch.tensor(dimension_scale)
        ids = np.uint16 if V <= 2**16 else np.uint32
        floats = {"int8": np.int8, "fp16": np.float16, "fp32": np.float32}
        columns: dict[str, tuple[type, int]]  # type and numbers per token
        if kind == "hidden":
            columns = {"hidden": (floats[identity["hidden_dtype"]], d)}
            if identity["hidden_dtype"] == "int8":
                columns["scale"] = (np.float32, 1)
        elif kind == "dense":
            columns = {"logits": (np.float16, V)}
        else:
            rest = "tail" if kind == "top_k" else "entropy"
            columns = {"ids": (ids, K), "probs": (np.float16, K), rest: (np.float16, 1)}
        self.columns = columns

    @property
    def token_bytes(self) -> int:
        """Bytes a token, without the block's number."""
        return sum(np.dtype(dtype).itemsize * n for dtype, n in self.columns.values())

    @property
    def features(self) -> datasets.Features:
        """The columns as `datasets` knows them."""
        fields = {
            name: datasets.List(datasets.Value(np.dtype(dtype).name), length=self.block_length * n)
            for name, (dtype, n) in self.columns.items()
        }
        return datasets.Features({"block": datasets.Value("int64"), **fields})

    def pack(self, signal: Signal) -> dict[str, np.ndarray]:
        """Columns of a signal, (N, numbers per token) each."""
        numbers: dict[str, Tensor]
        if isinstance(signal, HiddenSignal):
            hidden_Nd = signal.hidden_Nd.float()
            numbers = {"hidden": hidden_Nd}
            if self.dimension_scale_d is not None:
                scaled_Nd = hidden_Nd / self.dimension_scale_d.to(hidden_Nd.device)
                scale_N1 = scaled_Nd.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
                numbers = {"hidden": (scaled_Nd / scale_N1).round(), "scale": scale_N1}
        elif isinstance(signal, DenseSignal):
            # A softmax sees no constant, and fp16 keeps the most digits where the logits are near 0.
            numbers = {"logits": signal.logits_NV - signal.logits_NV.amax(-1, keepdim=True)}
        else:
            assert isinstance(signal, SparseSignal), "the recipe asks for no hidden states of several teachers"
            rest = {"tail": signal.tail_N} if signal.tail_N is not None else {"entropy": signal.entropy_N}
            numbers = {"ids": signal.ids_NK, "probs": signal.probs_NK, **{k: v[:, None] for k, v in rest.items()}}  # type: ignore[index]
        return {name: numbers[name].cpu().numpy().astype(dtype) for name, (dtype, _) in self.columns.items()}

    def unpack(self, columns: dict[str, Tensor], head: Head) -> Signal:
        """The signal that columns of N rows stand for. Probabilities are scaled to sum to 1 again."""
        if "hidden" in columns:
            hidden_Nd = columns["hidden"].float()
            if self.dimension_scale_d is not None:
                hidden_Nd = hidden_Nd * columns["scale"] * self.dimension_scale_d.to(hidden_Nd.device)
            return HiddenSignal(hidden_Nd, head)
        if "logits" in columns:
            return DenseSignal(columns["logits"].float())
        probs_NK, tail_N = columns["probs"].float(), columns["tail"].float()[:, 0] if "tail" in columns else None
        total_N = probs_NK.sum(-1) if tail_N is None else probs_NK.sum(-1) + tail_N
        return SparseSignal(
            columns["ids"].long(),
            probs_NK / total_N[:, None],
            self.identity["temperature"],
            tail_N=None if tail_N is None else tail_N / total_N,
            entropy_N=columns["entropy"].float()[:, 0] if "entropy" in columns else None,
        )


def make_encoding(config: TargetsConfig, vocab_size: int) -> Encoding:
    """The recipe's encoding; UserError where more outcomes are asked for than there are tokens."""
    if config.kind not in ("top_k", "sampled"):
        return Encoding(config.kind)
    field, outcomes = ("k", config.k) if config.kind == "top_k" else ("samples", config.samples)
    if outcomes > vocab_size:
        raise UserError(
            f"targets.{field}: expected at most the {vocab_size} tokens of the vocabulary, found {outcomes}"
        )
    return Encoding(config.kind, outcomes, config.temperature)


def open_targets(
    config: TargetsConfig,
    teachers: LanguageModel | Ensemble,
    corpus: Corpus,
    blocks: Blocks,
    accelerator: Accelerator,
    *,
    batch_tokens: int,
    cache_dir: Path | None = None,
    endpoint: EndpointConfig | None = None,
    verify: bool = False,
) -> CachedTargets:
    """The recipe's cache, complete: validated, and built by all processes as far as it is missing or damaged.

    Collective. `batch_tokens`: tokens that the teacher reads at once. `cache_dir`: root of caches without a
    `targets.cache_dir`. `endpoint`: the server that is asked in the teacher's place. `verify`: compare shards with
    their checksums that have been compared before. UserError names what does not match, with both values, or what
    cannot be read or written.
    """
    teacher = teachers.first
    encoding = make_encoding(config, teacher.vocab_size)
    world = accelerator.num_processes
    source: Source = LocalTeacher(teachers, blocks, encoding, batch_tokens)
    if endpoint is not None:
        source = ServedTeacher(endpoint, teacher.tokenizer, teacher.vocab_size, blocks, encoding.outcomes, world)
    identity = {
        **source.identity,
        "tokenizer": hash_tokenizer(teacher.tokenizer),
        "corpus": corpus.fingerprint,
        "vocab_size": teacher.vocab_size,
        "width": teacher.width,
        "block_length": blocks.block_length,
        "reset_at_documents": blocks.reset_at_documents,
        **_encoding_fields(config, teacher),
    }
    digest = hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()[:32]
    root = cache_root(cache_dir) / "targets"
    main, rank = accelerator.is_main_process, accelerator.process_index
    if config.is_remote:
        assert config.cache_dir is not None
        manifest = _read_remote(config.cache_dir, identity, len(blocks), root) if main else None
        manifest = broadcast_object_list([manifest])[0]
        assert manifest is not None
        return CachedTargets(config.cache_dir, manifest, teacher.head, _seconds(manifest, len(blocks), world), root)
    folder = Path(config.cache_dir) if config.cache_dir else root / digest
    with locked(folder, "targets.cache_dir") if main else contextlib.nullcontext():
        if main:
            for place in (folder, folder / "data", folder / "building"):
                clear_leftovers(place)
        if main and config.repo:
            _download(config.repo, folder)
        with teachers.together():
            manifest = _claim(folder, identity, source.name, teacher, blocks, config) if main else None
        manifest = broadcast_object_list([manifest])[0]
        assert manifest is not None
        size = manifest["blocks_per_shard"]
        wanted = _wanted(manifest, len(blocks))
        layout = Layout(identity, manifest["dimension_scale"])
        known = {int(number): record for number, record in manifest["shards"].items()}
        mine = list(wanted)[rank::world]
        checked = Checked(folder, anew=verify)
        bad = _damaged(folder, {number: known.get(number) for number in mine}, wanted, checked, progress=main)
        parts = gather_object([(bad, checked.added)]) if world > 1 else [(bad, checked.added)]
        missing = sorted(number for part, _ in parts for number in part)
        if missing and config.repo:
            raise UserError(
                f"targets.repo: {config.repo} lacks or has damaged {len(missing)} of {len(wanted)} shards, the first "
                f"{shard_file(missing[0])}; complete it where it was built, or remove targets.repo to build it here"
            )
        progress = tqdm(
            total=sum(wanted[number] for number in missing) * blocks.block_length,
            desc=f"{encoding.kind} targets",
            unit="tok",
            unit_scale=True,
            disable=not main or not missing,
        )
        with progress, teachers.together():
            share = {
                number: np.arange(number * size, number * size + wanted[number]) for number in missing[rank::world]
            }
            signals = source.signals(list(share.values()))
            for number, ids in share.items():
                _build_shard(folder, number, ids, signals, layout)
                progress.update(min(wanted[number] * blocks.block_length * world, progress.total - progress.n))
        accelerator.wait_for_everyone()
        if main:
            manifest = _collect(folder, manifest)
            checked.merge(added for _, added in parts)
            for number in missing:  # just written, and read again for the checksum
                checked.add(folder / shard_file(number), manifest["shards"][str(number)])
            checked.save()
        manifest = broadcast_object_list([manifest])[0]
        assert manifest is not None
    return CachedTargets(folder, manifest, teacher.head, _seconds(manifest, len(blocks), world), root)


def _wanted(manifest: dict[str, Any], blocks: int) -> dict[int, int]:
    """How many blocks each shard needs to have, by its number."""
    size = manifest["blocks_per_shard"]
    return {first // size: min(size, blocks - first) for first in range(0, blocks, size)}


def _seconds(manifest: dict[str, Any], blocks: int, world: int) -> float:
    """Wall time that building took, or would have taken with so many processes."""
    return sum(manifest["shards"][str(number)]["seconds"] for number in _wanted(manifest, blocks)) / world


def shard_file(number: int) -> str:
    """A shard's path in the folder."""
    return f"data/train-{number:05d}.arrow"


def _encoding_fields(config: TargetsConfig, teacher: LanguageModel) -> dict[str, Any]:
    encoding = make_encoding(config, teacher.vocab_size)
    dtype = config.hidden_dtype if encoding.kind == "hidden" else None
    return {
        "encoding": encoding.kind,
        "outcomes": encoding.outcomes,
        "temperature": encoding.temperature,
        "hidden_dtype": dtype,
    }


def _download(repo: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        hf_hub_download(repo, MANIFEST, repo_type="dataset", local_dir=folder)
        names = [shard_file(int(number)) for number in read_manifest(folder)["shards"]]  # and nothing else
        snapshot_download(repo, repo_type="dataset", local_dir=folder, allow_patterns=names)
    except (HTTPError, OSError, ValueError) as error:
        reason = redact((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise UserError(f"targets.repo: {repo} cannot be downloaded to {folder}: {reason}") from None


def _read_remote(url: str, identity: dict[str, Any], blocks: int, place: Path) -> dict[str, Any]:
    """The manifest behind a URL, if it is complete."""
    manifest = parse_manifest(Remote(url, place).text(MANIFEST), url)
    _check_identity(manifest, identity, url)
    wanted, known = _wanted(manifest, blocks), manifest["shards"]
    missing = [number for number, size in wanted.items() if known.get(str(number), {"blocks": 0})["blocks"] < size]
    if missing:
        raise UserError(
            f"targets.cache_dir: {url} lacks {len(missing)} of {len(wanted)} shards, the first "
            f"{shard_file(missing[0])}; a cache behind a URL is read only: complete it where it was built"
        )
    return manifest


def _check_identity(manifest: dict[str, Any], identity: dict[str, Any], where: str) -> None:
    """UserError if a manifest is that of other targets."""
    if others := differences(manifest["identity"], identity, "the cache"):
        raise UserError(
            f"cached targets in {where} belong to another run; choose another targets.cache_dir:\n  "
            + "\n  ".join(others)
        )


def _claim(
    folder: Path, identity: dict[str, Any], name: str, teacher: LanguageModel, blocks: Blocks, config: TargetsConfig
) -> dict[str, Any]:
    """The folder's manifest with all shards that are recorded; a new one where there is none."""
    file = folder / MANIFEST
    if file.exists():
        manifest = read_manifest(folder)
        _check_identity(manifest, identity, str(folder))
    elif config.repo:
        raise UserError(f"targets.repo: {config.repo} holds no {MANIFEST}; expected a data set made by distill.cache")
    else:
        scale = None
        if identity["hidden_dtype"] == "int8":
            first = teacher.signal(blocks.batch(np.arange(min(8, len(blocks)))), Encoding("hidden"))
            assert isinstance(first, HiddenSignal)
            scale = first.hidden_Nd.float().std(0).clamp_min(1e-6).tolist()
        block_bytes = Layout(identity, scale).token_bytes * blocks.block_length
        manifest = {
            "format": FORMAT,
            "teacher": name,
            "identity": identity,
            "dimension_scale": scale,
            "blocks_per_shard": max(1, min(SHARD_BYTES // block_bytes, SHARD_TOKENS // blocks.block_length)),
            "shards": {},
        }
        _write_card(folder, manifest)
        write_json(file, seal(manifest), "targets.cache_dir")
    return _collect(folder, manifest)


def _collect(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Take the records of finished shards into the manifest."""
    records = sorted((folder / "building").glob("[0-9]*.json"))
    if records:
        shards = dict(manifest["shards"])
        for record in records:
            with contextlib.suppress(OSError, ValueError):  # a damaged one: its shard is built again
                found = read_sealed(record)
                _Shard.model_validate(found)
                shards[str(int(record.stem))] = found
        manifest = {**manifest, "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}
        write_json(folder / MANIFEST, seal(manifest), "targets.cache_dir")
        for record in records:
            record.unlink()
    return manifest


def _damaged(
    folder: Path,
    records: dict[int, dict[str, Any] | None],
    wanted: dict[int, int],
    checked: Checked,
    *,
    progress: bool,
) -> list[int]:
    """Numbers of the shards that are not there, too short or not what their checksum says."""
    bad = []
    bar: Iterable[int] = tqdm(records, "checking targets", unit="shard", disable=not progress, leave=False)
    for number in bar:
        record, file = records[number], folder / shard_file(number)
        if record is None or record["blocks"] < wanted[number]:
            bad.append(number)
            continue
        try:
            problem = checked.problem_of(file, record)
        except OSError as error:
            problem = str(error)
        if problem:
            tqdm.write(f"{file}: damaged ({problem}); it will be built again")
            bad.append(number)
    return bad


def _build_shard(
    folder: Path, number: int, block_ids: np.ndarray, signals: Iterator[Iterable[Signal]], layout: Layout
) -> None:
    """Take the next shard's signals, write the shard, then its record."""
    began = time.perf_counter()
    with torch.inference_mode():
        parts = [layout.pack(signal) for signal in next(signals)]
    schema = layout.features.arrow_schema
    arrays = [pa.array(block_ids)]
    for name, (_, n) in layout.columns.items():
        values = pa.array(np.concatenate([part[name] for part in parts]).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(values, layout.block_length * n))
    table = pa.Table.from_arrays([a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            stream.write_batch(table.to_batches()[0])

    file = folder / shard_file(number)
    try:
        write_atomically(file, write, "targets.cache_dir")
        record = {"blocks": len(block_ids), "bytes": file.stat().st_size, "sha256": sha256(file)}
        record["seconds"] = round(time.perf_counter() - began, 3)
        write_json(folder / "building" / f"{number:05d}.json", seal(record), "targets.cache_dir")
    except UserError as error:
        raise UserError(str(error), every_process=True) from None


def _write_card(folder: Path, manifest: dict[str, Any]) -> None:
    lines = [f"| {name} | `{value}` |" for name, value in manifest["identity"].items()]
    text = "\n".join(
        [
            "---",
            "configs:",
            "- config_name: default",
            "  data_files: data/*.arrow",
            "tags: [knowledge-distillation, potstill]",
            "---",
            f"# Soft targets of {manifest['teacher']}",
            "",
            "One row a block of training text, in the order of the text; made and read by Potstill.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
        ]
    )
    write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"), "targets.cache_dir")


def cached_blocks(blocks: Blocks, max_tokens: int | None) -> Blocks:
    """The first blocks that hold `max_tokens` tokens, rounded up to whole blocks."""
    if max_tokens is None:
        return blocks
    return blocks.first(math.ceil(max_tokens / blocks.block_length))
