"""Files that can tell whether they are still what was written: a disk may cut, empty or change them.

A JSON object carries a checksum of its own content; a folder has a `checksums.json` of its files. Where there is no
checksum, as in what older versions wrote, nothing is compared. Damage is found so, not malice: see SECURITY.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from distill.session import sha256

KEY = "checksum"
CHECKSUMS = "checksums.json"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its checksum, to be written as JSON."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != KEY}))
    return {**plain, KEY: _digest(plain)}


def read_sealed(file: Path) -> dict[str, Any]:
    """The content of a JSON file without its checksum. OSError or ValueError where it cannot be read or has changed."""
    return unseal(file.read_text(encoding="utf-8"))


def unseal(text: str) -> dict[str, Any]:
    """As `read_sealed`, of a file's text. ValueError where it is no JSON object or has changed."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")
    expected = content.pop(KEY, None)
    if expected not in (None, _digest(content)):
        raise ValueError("its checksum differs")
    return content


def check(content: Mapping[str, Any], model: type[BaseModel]) -> None:
    """ValueError that names the first few fields in which content is not what a model describes."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:3])
        raise ValueError("; ".join(wrong)) from None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], whose: str) -> list[str]:
    """Where what is `found` in a manifest is not what a run expects, one line a field."""
    return [
        f"{name}: {whose} has {found.get(name)!r}, the run {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of the files in a folder, by name; not of those below it."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != CHECKSUMS}


def write_checksums(folder: Path) -> None:
    """Put the checksums of a folder's files beside them."""
    text = json.dumps(seal(checksums(folder)), indent=1) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def damage(folder: Path) -> str:
    """What is wrong with a folder that has checksums, in words; empty if nothing is, or it has none."""
    if not folder.is_dir():
        return f"{folder.name} is missing"
    if not (folder / CHECKSUMS).is_file():
        return ""
    try:
        expected = read_sealed(folder / CHECKSUMS)
    except (OSError, ValueError) as error:
        return f"{folder.name}/{CHECKSUMS}: {error}"
    found = changed(folder, expected)
    return f"{folder.name}/{found[0]} is missing or changed" if found else ""


def changed(folder: Path, expected: Mapping[str, Any]) -> list[str]:
    """Which of the files with these checksums are missing from a folder, or others. Names stay inside the folder."""
    found = []
    for name, digest in expected.items():
        try:
            whole = Path(name).name == name and sha256(folder / name) == digest
        except (OSError, ValueError):
            whole = False
        if not whole:
            found.append(name)
    return found
