"""The reference of the recipe, made from `distill/config.py`, is complete and up to date.

python -m pytest tests/test_reference.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from distill import reference
from distill.config import Length, Ramp, Recipe

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("file", "content"),
    [("docs/recipe.md", reference.fields_as_markdown), ("recipes/schema.json", reference.schema)],
)
def test_files_are_up_to_date(file: str, content: Any) -> None:
    assert (ROOT / file).read_text(encoding="utf-8") == content(), "run: python -m distill.reference --write"


def test_write_and_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reference, "ROOT", tmp_path)

    def run(option: str) -> int:
        monkeypatch.setattr(sys, "argv", ["reference", option])
        return reference.main()

    assert run("--check") == 1, "nothing is there yet"
    assert run("--write") == 0 and run("--check") == 0
    (tmp_path / "docs/recipe.md").write_text("old")
    capsys.readouterr()
    assert run("--check") == 1
    assert "docs/recipe.md" in (printed := capsys.readouterr().err) and "schema.json" not in printed
    assert (tmp_path / "docs/recipe.md").read_text() == "old", "a check changes nothing"


def test_every_field_of_every_section_has_a_description() -> None:
    found = dict(reference.sections())
    assert {path.removesuffix(".N") for path in found} == set(Recipe.model_fields)
    for path, model in [*found.items(), ("length", Length), ("ramp", Ramp)]:
        assert (model.__doc__ or "").strip(), path
        for name, field in model.model_fields.items():
            assert len((field.description or "").split()) >= 2, f"{path}.{name}"


def test_help_and_page_name_every_field() -> None:
    text, page = reference.fields_as_text(), reference.fields_as_markdown()
    for path, model in reference.sections():
        section = page.split(f"## `{path}`\n")[1].split("\n## ")[0]
        for name in model.model_fields:
            assert f"\n  {path}.{name}  (" in text
            assert f"\n| `{name}` | " in section
    assert all(f"\n| `{name}` | " in page.split("## lengths")[1] for name in Length.model_fields)
    assert all(f"\n| `{name}` | " in page.split("## ramps")[1] for name in ("from", "to", "shape"))


def test_tables_are_whole() -> None:
    """A | inside a cell, as in KL(teacher || student), would begin another one."""
    tables = [block for block in reference.fields_as_markdown().split("\n\n") if block.startswith("|")]
    assert len(tables) == len(Recipe.model_fields) + 2
    for table in tables:
        columns = {len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, table


def problem(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "recipe") -> str | None:
    """Why a value does not fit a JSON schema, or None: as much of the standard as our schema uses."""
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    for key, wanted in sorted(schema.items(), key=lambda pair: pair[0] != "type"):  # the others rely on it
        match key:
            case "$ref":
                fits = not (inner := problem(value, root["$defs"][wanted.rpartition("/")[2]], root, where)) or inner
            case "anyOf" | "oneOf":
                fits = None in [problem(value, one, root, where) for one in wanted]
            case "type" if wanted == "number":
                fits = isinstance(value, int | float) and not isinstance(value, bool)
            case "type":
                fits = isinstance(value, types[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
            case "enum":
                fits = value in wanted
            case "const":
                fits = value == wanted
            case "required":
                fits = all(name in value for name in wanted)
            case "additionalProperties" if wanted is False:
                fits = set(value) <= set(schema["properties"])
            case "additionalProperties":
                fits = not any(problem(item, wanted, root) for item in value.values())
            case "properties":
                inners = (problem(value[n], s, root, f"{where}.{n}") for n, s in wanted.items() if n in value)
                fits = next(filter(None, inners), True)
            case "propertyNames":
                fits = not any(problem(name, wanted, root) for name in value)
            case "items":
                inners = (problem(item, wanted, root, f"{where}.{n}") for n, item in enumerate(value))
                fits = next(filter(None, inners), True)
            case "pattern":
                fits = re.search(wanted, value) is not None
            case "minLength":
                fits = len(value) >= wanted
            case "minimum" | "exclusiveMinimum":
                fits = value > wanted or (value == wanted and key == "minimum")
            case "maximum" | "exclusiveMaximum":
                fits = value < wanted or (value == wanted and key == "maximum")
            case "title" | "description" | "default" | "$defs" | "format" | "uniqueItems":
                fits = True
            case _:
                raise NotImplementedError(key)
        if isinstance(fits, str):
            return fits
        if not fits:
            return f"{where}: {value!r} does not fit {key}: {wanted}"
    return None


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_fit_the_schema_that_they_name(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    root = json.loads((ROOT / "recipes/schema.json").read_text(encoding="utf-8"))
    assert problem(yaml.safe_load(text), root, root) is None


@pytest.mark.parametrize(
    ("field", "value", "fits"),
    [
        *(("control", value, True) for value in (True, False, {"match": "tokens"})),
        *(("tracking", value, True) for value in ("none", "wandb", None, {"every": 3})),
        *(("tracking", value, False) for value in ("tensorboard", True, {"every": 0})),
        *(("control", value, False) for value in ("no", 3, {"matches": "tokens"})),
        *(("student", value, False) for value in ({"hidden_sizes": 3}, {"hidden_size": "big"}, 3)),
        *(("run", value, False) for value in ({}, {"name": ""}, {"name": "x", "seed": -1})),
    ],
)
def test_the_schema_takes_what_the_recipe_takes(field: str, value: Any, fits: bool) -> None:
    root = json.loads(reference.schema())
    recipe = {
        "run": {"name": "x"},
        "teacher": {"model": "m"},
        "corpus": {"source": "s"},
        "stages": [{"objective": "jsd", "length": {"steps": 1}}],
        field: value,
    }
    assert (problem(recipe, root, root) is None) == fits
    stage = root["$defs"]["StageConfig"]["properties"]["objective"]
    assert problem({"forward_kl": 0.5, "cross_entropy": 0.5}, stage, root) is None
    assert problem("kl", stage, root) and problem({"kl": 1}, stage, root) and problem({"jsd": 0}, stage, root)
    assert problem({"jsd": {"from": 1, "to": 0}}, stage, root) is None
    assert problem({"jsd": {"start": 1, "end": 0}}, stage, root) and problem({"jsd": {"from": 1}}, stage, root)
