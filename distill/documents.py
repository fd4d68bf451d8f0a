"""Documents: what a recipe's `corpus.source` names, one text after the other.

    notes.txt            lines, paragraphs or the whole file (`corpus.documents`)
    notes.jsonl          one record a line, the text in `corpus.text_field`
    notes.json           a list of records, or a mapping from titles to records
    notes.parquet        one record a row
    notes/               all such files below a folder, in the order of their paths; or what `distill.write` has written
    package:D/PATH       such a file or folder inside the installed distribution D
    user/name            a data set on the hub

`open_documents` reads them once from the start; with `corpus.streaming` only the first `corpus.sample_documents`.
`TextStream` reads on from any position, which is plain JSON: file and row, or the state of a hub data set as
`datasets` writes it down.

Local files are read by hand rather than through `datasets`: its JSON reader refuses records whose fields
vary, takes a `[` in a file's name for a pattern, and leaves a second copy of the text in a cache of its own.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from distill.config import CorpusConfig, UserError
from distill.packaged import PREFIX, resolve_package
from distill.session import sha256
from distill.written import MANIFEST, text_files

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 4_000_000  # tokenised at once, whichever is reached first
END_BYTES = 2**16  # of each end of a file, which stand for all of it in a stream's digest

Raw = Iterator[tuple[object, float]]
"""(value of a text field, share of the source read so far, 0 where unknown)"""


@dataclass
class Source:
    """Iterate over it, once, for the texts: strings with more than white space, at most `max_documents`."""

    digest: str  # changes with the content
    raw: Raw
    max_documents: int | None
    found: int = 0  # texts so far
    skipped: int = 0  # documents so far without text: blank, null, no string
    share: float = 0.0  # of the whole, done so far

    def __iter__(self) -> Iterator[str]:
        for value, share in self.raw:
            self.share = share
            if not isinstance(value, str) or not value.strip():
                self.skipped += 1
                continue
            self.found += 1
            if self.max_documents:
                self.share = max(share, self.found / self.max_documents)
            # JSON can spell lone surrogates, which are no text: "?" takes their place.
            yield value.encode("utf-8", "replace").decode("utf-8")
            if self.found == self.max_documents:
                break

    def batches(self, *, progress: bool = True) -> Iterator[list[str]]:
        """The texts in lists, bounded in number and in length, under a progress bar."""
        speed = TextColumn("{task.fields[found]:,} documents, {task.fields[speed]:,.0f}/s")
        columns = (*Progress.get_default_columns(), speed)
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("tokenising", total=1.0, found=0, speed=0.0)
            for batch in in_batches(self):
                yield batch
                per_second = self.found / max(bar.tasks[task].elapsed or 0.0, 1e-3)
                bar.update(task, completed=self.share, found=self.found, speed=per_second)
            bar.update(task, completed=1.0, found=self.found)


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists, bounded in number and in length."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def open_documents(config: CorpusConfig, *, progress: bool = True) -> Source:
    """Find what `corpus.source` names. Texts of local files are read only as they are asked for.

    Raises UserError where the source does not exist or cannot be read, here or during the iteration.
    """
    limit = config.max_documents
    if config.streaming:
        limit = min(config.sample_documents, limit or config.sample_documents)
    files = _local_files(config)
    if files is None:
        rows, digest = _hub_rows(config, progress)
        return Source(digest, _hub_documents(rows, config), limit)
    return Source(_digest(files, config.streaming), _local_documents(files, config), limit)


@dataclass(frozen=True)
class LabelledSource:
    """Texts and labels, as they come: anything may stand in either field. `classes` are those of a hub data set."""

    digest: str  # changes with the content
    rows: Iterator[tuple[object, object]]
    classes: tuple[str, ...] | None = None
    from_hub: bool = False


def open_labelled(config: CorpusConfig, label_field: str) -> LabelledSource:
    """Find what `corpus.source` names, with a second field beside the text.

    Raises UserError as `open_documents` does, and where there is no such field.
    """
    of_labels = config.model_copy(update={"text_field": label_field})
    if (files := _local_files(config)) is None:
        import datasets

        rows, digest = _hub_rows(config, progress=False)
        labels, _ = _hub_rows(of_labels, progress=False)
        feature = labels.features.get(label_field)
        classes = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        columns = (_hub_documents(rows, config), _hub_documents(labels, of_labels, option="classification.label_field"))
    else:
        if plain := [str(file) for file in files if file.suffix == ".txt"]:
            raise UserError(f"corpus.source: {plain[0]}: expected records with text and label, found plain text")
        digest, classes = _digest(files, ends_alone=False), None
        columns = (
            _local_documents(files, config),
            _local_documents(files, of_labels, option="classification.label_field"),
        )
    rows_of_both = ((text, label) for (text, _), (label, _) in zip(*columns, strict=True))
    return LabelledSource(digest, rows_of_both, classes, from_hub=files is None)


class TextStream:
    """The texts of `corpus.source` from the start or any other position, at most `max_documents`."""

    def __init__(self, config: CorpusConfig) -> None:
        """Raises UserError as `open_documents` does."""
        self.config = config
        files = _local_files(config)
        self.rows = _HubRows(config) if files is None else _FileRows(files, config)
        self.start = {"found": 0, **self.rows.position()}
        self.seek(self.start)

    def seek(self, position: dict[str, Any]) -> None:
        """Go to where `position()` was taken."""
        self.rows.seek({name: value for name, value in position.items() if name != "found"})
        raw = ((value, 0.0) for value in self.rows)
        self.source = Source("", raw, self.config.max_documents, found=position["found"])
        self.texts = iter(self.source)

    def position(self) -> dict[str, Any]:
        """Where the next text is read from; plain JSON."""
        return {"found": self.source.found, **self.rows.position()}

    def take(self, count: int) -> Iterator[str]:
        """The next texts, fewer at the end."""
        if self.source.found == self.config.max_documents:
            return iter(())
        return itertools.islice(self.texts, count)


class _FileRows:
    """Rows of local files."""

    def __init__(self, files: list[Path], config: CorpusConfig) -> None:
        for file in files:
            if file.suffix == ".json":
                raise UserError(f"corpus.streaming: {file}: a .json file is read as a whole; use .jsonl or .parquet")
        self.files, self.config = files, config
        self.file, self.row = 0, 0

    def position(self) -> dict[str, int]:
        return {"file": self.file, "row": self.row}

    def seek(self, position: dict[str, int]) -> None:
        self.file, self.row = position["file"], position["row"]

    def __iter__(self) -> Iterator[object]:
        while self.file < len(self.files):
            for value, _ in _readable(self.files[self.file], self.config, self.row):
                self.row += 1
                yield value
            self.file, self.row = self.file + 1, 0


class _HubRows:
    """Rows of a data set that `datasets` streams."""

    def __init__(self, config: CorpusConfig) -> None:
        self.rows, _ = _hub_rows(config, progress=False)
        self.config = config
        self.state = self.start = self.rows.state_dict()

    def position(self) -> dict[str, Any]:
        return {"state": self.state if self.state is not None else self.rows.state_dict()}

    def seek(self, position: dict[str, Any]) -> None:
        self.state = position["state"]
        self.rows.load_state_dict(self.state)

    def __iter__(self) -> Iterator[object]:
        for value, _ in _hub_documents(self.rows, self.config, first=self.state == self.start):
            self.state = None  # the data set counts only once it is read
            yield value


def _local_files(config: CorpusConfig) -> list[Path] | None:
    """The files that `corpus.source` names; None for a data set on the hub."""
    is_package = config.source.startswith(PREFIX)
    path = resolve_package(config.source) if is_package else Path(config.source).expanduser()
    if path.exists():
        return _files(path)
    looks_local = path.is_absolute() or path.suffix in SUFFIXES or len(path.parts) > 2
    if looks_local or config.source.startswith((".", "~")):
        raise UserError(f"corpus.source: {config.source}: no such file or folder (working in {Path.cwd()})")
    return None


def _files(path: Path) -> list[Path]:
    """The file itself, or the files of known formats below a folder, hidden ones left out."""
    if (path / MANIFEST).is_file():
        return text_files(path)
    below = {file: file.relative_to(path).parts for file in path.rglob("*")} if path.is_dir() else {path: ()}
    files = [file for file, parts in sorted(below.items()) if not any(part.startswith(".") for part in parts)]
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise UserError(f"corpus.source: {path}: expected text in {', '.join(SUFFIXES)}, found no such file")
    return files


def _digest(files: list[Path], ends_alone: bool) -> str:
    """Of contents and formats, not of names: a text that was moved is the same text.

    `ends_alone`: of size, first and last `END_BYTES` of each file, where reading all of them would take hours.
    """
    parts: list[tuple[object, ...]] = []
    for file in files:
        try:
            if not ends_alone:
                parts.append((file.suffix, sha256(file)))
                continue
            with file.open("rb") as stream:
                ends = hashlib.sha256(stream.read(END_BYTES))
                size = stream.seek(0, io.SEEK_END)
                stream.seek(max(size - END_BYTES, 0))
                ends.update(stream.read())
                parts.append((file.suffix, size, ends.hexdigest()))
        except OSError as error:
            raise UserError(f"corpus.source: {file}: cannot be read: {error}") from error
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _local_documents(files: list[Path], config: CorpusConfig, option: str = "corpus.text_field") -> Raw:
    """`option`: the recipe's field that names the field of the records."""
    sizes = [max(file.stat().st_size, 1) for file in files]
    for file, size, end in zip(files, sizes, itertools.accumulate(sizes), strict=True):
        for text, share in _readable(file, config, option=option):
            yield text, (end - size + share * size) / sum(sizes)


def _readable(file: Path, config: CorpusConfig, skip: int = 0, option: str = "corpus.text_field") -> Raw:
    try:
        yield from _file_documents(file, config, skip, option)
    except (OSError, ValueError) as error:  # wrong UTF-8, wrong JSON and wrong Parquet are ValueErrors
        raise UserError(f"corpus.source: {file}: cannot be read as {file.suffix}: {error}") from error


def _file_documents(file: Path, config: CorpusConfig, skip: int, option: str) -> Raw:
    """As `Raw`, the share being that of this file, without the first `skip` values."""
    if file.suffix == ".json":
        records = json.loads(file.read_text(encoding="utf-8-sig"))
        records = list(records.values()) if isinstance(records, dict) else records
        if not isinstance(records, list):
            found = type(records).__name__
            raise UserError(f"corpus.source: {file}: expected a list or mapping of records, found {found}")
        values = _column(records, config.text_field, file, option=option)
        for done, text in enumerate(itertools.islice(values, skip, None), start=skip + 1):
            yield text, done / len(records)
    elif file.suffix == ".parquet":
        import pyarrow.parquet  # slow to import; comes with `datasets`

        with pyarrow.parquet.ParquetFile(file) as table:
            _require(config.text_field, table.schema_arrow.names, file, option)
            ends = itertools.accumulate(table.metadata.row_group(n).num_rows for n in range(table.num_row_groups))
            groups = [(n, end) for n, end in enumerate(ends) if end > skip]
            passed = groups[0][1] - table.metadata.row_group(groups[0][0]).num_rows if groups else skip
            batches = table.iter_batches(1000, row_groups=[n for n, _ in groups], columns=[config.text_field])
            rows = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for done, text in enumerate(itertools.islice(rows, skip - passed, None), start=skip + 1):
                yield text, done / table.metadata.num_rows
    else:
        size = max(file.stat().st_size, 1)
        with file.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as lines:
            for text in itertools.islice(_texts(lines, config, file, option), skip, None):
                yield text, raw.tell() / size


def _texts(lines: io.TextIOWrapper, config: CorpusConfig, file: Path, option: str) -> Iterator[object]:
    """Documents of a `.txt` or `.jsonl` file."""
    if file.suffix == ".jsonl":
        records = (json.loads(line) for line in lines if line.strip())
        yield from _column(records, config.text_field, file, option=option)
    elif config.documents == "file":
        yield lines.read()
    elif config.documents == "line":
        yield from (line.rstrip("\n") for line in lines)
    else:
        for blank, paragraph in itertools.groupby(lines, key=str.isspace):
            if not blank:
                yield "".join(paragraph).rstrip("\n")


def _hub_rows(config: CorpusConfig, progress: bool) -> tuple[Any, str]:
    """A data set on the hub and its digest."""
    import datasets  # slow to import
    import huggingface_hub

    silence = not progress and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(
            config.source,
            config.name,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
        )
        if config.streaming:  # a stream has no fingerprint of its own: take the commit that it is read from
            commit = huggingface_hub.HfApi().dataset_info(config.source, revision=config.revision).sha
            digest = json.dumps([config.source, config.name, config.split, commit])
        else:
            digest = rows._fingerprint
    except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"corpus.source: {config.source}: no such file, and no data set that could be loaded: {reason}"
        ) from error
    finally:
        if silence:
            datasets.enable_progress_bars()
    if config.text_field in (rows.column_names or ()):
        rows = rows.select_columns([config.text_field])  # the others may be images, costly to decode
    return rows, digest


def _hub_documents(rows: Any, config: CorpusConfig, first: bool = True, option: str = "corpus.text_field") -> Raw:
    total = None if config.streaming else len(rows)
    try:
        for done, text in enumerate(_column(rows, config.text_field, config.source, first, option), start=1):
            yield text, done / total if total else 0.0
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"corpus.source: {config.source}: reading failed: {error}") from error


def _column(
    records: Iterable[Any], field: str, where: object, first: bool = True, option: str = "corpus.text_field"
) -> Iterator[object]:
    """One field of each record. The `first` of all must have it; None where a later one has not."""
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f"corpus.source: {where}: expected records with named fields, found {record!r:.30}")
        if number == 1 and first:
            _require(field, list(record), where, option)
        yield record.get(field)


def _require(field: str, columns: list[str], where: object, option: str) -> None:
    if field not in columns:
        found = ", ".join(columns) or "none"
        raise UserError(f"{option}: {where}: expected a field {field!r}, found {found}")
