"""Text that a teacher has written: a data set in a folder, whole or to be gone on with.

    written.json                  manifest: teacher, settings (`identity`), number of documents
    data/train-00000.parquet      one row a document, in the order of their numbers
    records/00000.json            documents, tokens, size, checksum and time of a shard that is done
    README.md                     a data set card, so that `datasets.load_dataset` reads the folder or its upload

Shard s holds documents s * S to (s + 1) * S - 1. Each is written whole by one process, from its beginning, under
another name first, and its record last. So a shard is there or not, whenever the machine stops, and what is damaged or
missing is written again, the same as before. The folder is also an ordinary `corpus.source`: the corpus reader takes
the shards' `text`, and nothing before all of them are there.

Columns: `document` its number; `text`; `ids` the tokens that follow the separator, those of the prompt first; `prompt`
how many these are; `ended` whether the teacher ended it, or the limit cut it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.checkpoint import clear_leftovers, write_atomically, write_json
from distill.config import UserError
from distill.sealed import check, differences, read_sealed, seal
from distill.session import sha256
from distill.shards import problem_of

logger = logging.getLogger(__name__)
FORMAT = 1
MOST_SHARDS = 1_000_000  # each is looked at whenever the text is read
MANIFEST = "written.json"
TEXT_FIELD = "text"
SCHEMA = pa.schema(
    {
        "document": pa.int64(),
        TEXT_FIELD: pa.string(),
        "ids": pa.list_(pa.int32()),
        "prompt": pa.int32(),
        "ended": pa.bool_(),
    }
)
Count = Annotated[int, Field(ge=0)]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    teacher: str
    identity: dict[str, str | int | float | bool | None]
    documents: Annotated[int, Field(gt=0, lt=2**63)]
    documents_per_shard: Annotated[int, Field(gt=0)]

    @model_validator(mode="after")
    def _shards_to_look_at(self) -> Self:
        if self.documents > MOST_SHARDS * self.documents_per_shard:
            raise ValueError(f"more than {MOST_SHARDS:,} shards")
        return self


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    documents: Count
    tokens: Count
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class WrittenDocument:
    """A document: its number, the tokens after the separator, how many of them are the prompt, whether it ended."""

    number: int
    ids: list[int]
    prompt: int
    ended: bool


class WrittenText:
    """The data set in a folder that has a manifest."""

    def __init__(self, folder: Path) -> None:
        """UserError where the manifest is damaged, or of another version."""
        self.folder, file = folder, folder / MANIFEST
        try:
            self.manifest = read_sealed(file)
            if self.manifest.get("format") != FORMAT:
                raise ValueError(f"format {self.manifest.get('format')!r} instead of {FORMAT}")
            check(self.manifest, _Manifest)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file}: expected the manifest of written text, found {error}; delete the folder, or choose another "
                "writing.folder"
            ) from None

    @classmethod
    def claim(
        cls, folder: Path, identity: dict[str, Any], teacher: str, documents: int, documents_per_shard: int
    ) -> WrittenText:
        """The folder's data set, begun if there is none; UserError if it is of another teacher or other settings."""
        for place in (folder, folder / "data", folder / "records"):
            clear_leftovers(place)
        if not (folder / MANIFEST).exists():
            sizes = {"documents": documents, "documents_per_shard": documents_per_shard}
            manifest = {"format": FORMAT, "teacher": teacher, "identity": identity, **sizes}
            _write_card(folder, manifest)
            write_json(folder / MANIFEST, seal(manifest), "writing.folder")
        found = cls(folder)
        if others := differences(found.manifest["identity"], identity, "it"):
            raise UserError(
                f"the text written in {folder} belongs to another recipe or teacher; delete it, or choose another "
                "writing.folder:\n  " + "\n  ".join(others)
            )
        return found

    @property
    def shards(self) -> dict[int, range]:
        """The numbers of the documents of each shard."""
        documents, size = self.manifest["documents"], self.manifest["documents_per_shard"]
        starts = range(0, documents, size)
        return {number: range(start, min(start + size, documents)) for number, start in enumerate(starts)}

    def file(self, number: int) -> Path:
        """A shard's file."""
        return self.folder / "data" / f"train-{number:05d}.parquet"

    def record(self, number: int) -> dict[str, Any]:
        """A shard's record. OSError or ValueError where it is missing or damaged."""
        record = read_sealed(self.folder / "records" / f"{number:05d}.json")
        check(record, _Record)
        return record

    def problem(self, number: int) -> str | None:
        """Why a shard has to be written, if it has to be."""
        try:
            record = self.record(number)
            if record["documents"] != len(self.shards[number]):
                return f"{record['documents']} documents instead of {len(self.shards[number])}"
            return problem_of(self.file(number), record)
        except FileNotFoundError:
            return "missing"
        except (OSError, ValueError) as error:
            return str(error)

    def missing(self) -> list[int]:
        """Shards that are to be written; a damaged one is named in the log."""
        problems = {number: self.problem(number) for number in self.shards}
        for number, problem in problems.items():
            if problem not in (None, "missing"):
                logger.warning("%s: damaged (%s); it will be written again", self.file(number), problem)
        return [number for number, problem in problems.items() if problem]

    def save(self, number: int, documents: Sequence[WrittenDocument], texts: Sequence[str], seconds: float) -> None:
        """Write a shard, then its record."""
        columns = {
            "document": [document.number for document in documents],
            TEXT_FIELD: list(texts),
            "ids": [document.ids for document in documents],
            "prompt": [document.prompt for document in documents],
            "ended": [document.ended for document in documents],
        }
        table, file = pa.table(columns, schema=SCHEMA), self.file(number)
        try:
            write_atomically(file, lambda path: parquet.write_table(table, path), "writing.folder")
            record: dict[str, Any] = {"documents": len(documents)}
            record["tokens"] = sum(len(document.ids) - document.prompt for document in documents)
            record |= {"bytes": file.stat().st_size, "sha256": sha256(file), "seconds": round(seconds, 3)}
            write_json(self.folder / "records" / f"{number:05d}.json", seal(record), "writing.folder")
        except UserError as error:
            raise UserError(str(error), every_process=True) from None

    def figures(self) -> dict[str, Any]:
        """Documents, tokens written, and seconds of one process that this took."""
        records = [self.record(number) for number in self.shards]
        totals = {name: sum(record[name] for record in records) for name in ("documents", "tokens", "seconds")}
        return {"teacher": self.manifest["teacher"], **totals}


def text_files(folder: Path) -> list[Path]:
    """The files that hold a written data set's text, in order; UserError unless all of it is there and whole."""
    written = WrittenText(folder)
    problems = {number: problem for number in written.shards if (problem := written.problem(number))}
    if problems:
        number, problem = next(iter(problems.items()))
        raise UserError(
            f"corpus.source: {folder}: {len(problems)} of {len(written.shards)} shards of this written text are "
            f"missing or damaged, the first {written.file(number).name} ({problem}); finish it with "
            "accelerate launch -m distill.write RECIPE"
        )
    return [written.file(number) for number in written.shards]


def _write_card(folder: Path, manifest: dict[str, Any]) -> None:
    lines = [f"| {name} | `{value}` |" for name, value in manifest["identity"].items()]
    head = ["---", "configs:", "- config_name: default", "  data_files: data/*.parquet", "tags: [potstill]", "---"]
    text = "\n".join(
        [
            *head,
            f"# Text written by {manifest['teacher']}",
            "",
            f"{manifest['documents']:,} documents sampled from a language model; made and read by Potstill.",
            "",
            *("| | |", "|---|---|"),
            *lines,
            "",
        ]
    )
    write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"), "writing.folder")
