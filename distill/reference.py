"""The recipe's reference, made from the models: `docs/recipe.md`, `recipes/schema.json`, and `--help`.

python -m distill.reference --write     # rewrite both files
python -m distill.reference --check     # exit code 1 if they are out of date
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill.config import Length, Ramp, Recipe, Section, section_of

ROOT = Path(__file__).resolve().parent.parent


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Each section of the recipe with its dotted path."""
    for name, field in Recipe.model_fields.items():
        for leaf in _leaves(field.annotation):
            if section_of(leaf):
                yield (f"{name}.N" if typing.get_origin(field.annotation) is tuple else name), leaf


def fields_as_text() -> str:
    """All fields with default and description, for `--help`."""
    lines = ["fields of a recipe:"]
    for path, model in sections():
        for name, field in model.model_fields.items():
            lines.append(f"\n  {path}.{name}  ({_type(field.annotation, field)}; {_default(field)})")
            lines.append(textwrap.indent(textwrap.fill(_text(field.description), 96), "      "))
    return "\n".join(lines)


def fields_as_markdown() -> str:
    """The reference page."""
    parts = [
        "# The recipe, field by field\n",
        "Made from `distill/config.py` by `make docs`; do not edit by hand. A recipe is a YAML file with the sections"
        " below; `KEY=VALUE` words on the command line override fields by dotted path. A *length* is exactly one of"
        f" {', '.join(f'`{name}`' for name in Length.model_fields)}, for example `{{steps: 100}}`; a *ramp* is a number"
        " that changes over a stage, for example `{from: 4, to: 1}`.\n",
        "For completion and checks in an editor, begin a recipe with"
        " `# yaml-language-server: $schema=schema.json` (the path from the recipe to `recipes/schema.json`).\n",
    ]
    for path, model in sections():
        parts.append(f"## `{path}`\n\n{_text(model.__doc__)}\n")
        parts.append("| field | type | default | meaning |\n|---|---|---|---|")
        for name, field in model.model_fields.items():
            kind, default = _type(field.annotation, field), _default(field, code=True)
            parts.append(_row(f"`{name}`", kind, default, _text(field.description)))
        parts.append("")
    parts.append(f"## lengths\n\n{_text(Length.__doc__)}\n\n| field | meaning |\n|---|---|")
    parts += [_row(f"`{name}`", _text(field.description)) for name, field in Length.model_fields.items()]
    parts.append(f"\n## ramps\n\n{_text(Ramp.__doc__)}\n\n| field | type | default | meaning |\n|---|---|---|---|")
    for name, field in Ramp.model_fields.items():
        kind, default = _type(field.annotation, field), _default(field, code=True)
        parts.append(_row(f"`{field.alias or name}`", kind, default, _text(field.description)))
    return "\n".join(parts) + "\n"


def schema() -> str:
    """JSON schema of the recipe, for editors."""
    made = {**Recipe.model_json_schema(), "title": "Potstill recipe"}
    fields, stage = made["properties"], made["$defs"]["StageConfig"]["properties"]
    # The shorthands, which validators spell out before pydantic's own checks.
    fields["control"] = _or(fields["control"], {"type": "boolean"})
    fields["tracking"] = _or(fields["tracking"], {"enum": ["wandb", "none", None]})
    stage["objective"] = _or(stage["objective"], stage["objective"]["propertyNames"])
    return json.dumps(made, indent=1) + "\n"


def _or(field: dict[str, Any], shorthand: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that takes a shorthand besides."""
    said: dict[str, Any] = {key: field[key] for key in ("title", "description", "default") if key in field}
    return {**said, "anyOf": [{key: value for key, value in field.items() if key not in said}, shorthand]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m distill.reference", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="rewrite docs/recipe.md and recipes/schema.json")
    action.add_argument("--check", action="store_true", help="exit code 1 if they are out of date")
    options = parser.parse_args()
    stale = []
    for file, content in (
        (ROOT / "docs/recipe.md", fields_as_markdown()),
        (ROOT / "recipes/schema.json", schema()),
    ):
        if options.write:
            file.parent.mkdir(exist_ok=True)
            file.write_text(content, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != content:
            stale.append(str(file.relative_to(ROOT)))
    if stale:
        print(f"out of date: {', '.join(stale)}; run make docs", file=sys.stderr)
    return 1 if stale else 0


def _row(*cells: str) -> str:
    """One row of a Markdown table, where a bare | would begin another cell, even inside code."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def _default(field: FieldInfo, code: bool = False) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, Length):
        value = value.model_dump(exclude_none=True)
    elif isinstance(value, (tuple, frozenset)):
        value = sorted(value) if isinstance(value, frozenset) else list(value)
    elif isinstance(value, Path):
        value = str(value)
    text = json.dumps(value)
    return f"`{text}`" if code else f"default {text}"


def _leaves(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, frozenset, Annotated):
        return [leaf for part in typing.get_args(annotation) for leaf in _leaves(part)]
    return [annotation]


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type in a reader's words, with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0]) + "".join(_bound(item) for item in arguments[1:])
    if origin is Literal:
        text = " | ".join(str(value) for value in arguments)
    elif origin in (typing.Union, types.UnionType):
        text = " | ".join("null" if part is type(None) else _type(part) for part in arguments)
    elif origin in (tuple, frozenset):
        text = f"list of {_type(arguments[0])}"
    elif origin is dict:
        text = f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    elif annotation in (Length, Ramp):
        text = annotation.__name__.lower()
    else:
        text = {str: "text", int: "integer", float: "number", bool: "true | false", Path: "path"}.get(
            annotation, getattr(annotation, "__name__", str(annotation))
        )
    return text + "".join(_bound(item) for item in (field.metadata if field else ()))


def _bound(item: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [f" {sign} {getattr(item, name)}" for name, sign in signs.items() if getattr(item, name, None) is not None]
    metadata = getattr(item, "metadata", ())
    return ",".join(found) + "".join(_bound(part) for part in metadata)


if __name__ == "__main__":
    sys.exit(main())
