"""Reading and writing recipes: YAML, `KEY=VALUE` overrides, and every problem at once.

YAML is read as data only: no tag makes an object, no key stands twice, and an anchor's uses do not hang together.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ValidationError

from distill.config import NUMBER_TAG, RAMP_TAG, Length, Ramp, Recipe, UserError, section_of
from distill.contradictions import contradictions
from distill.redact import redact

MOST_VALUES, MOST_LEVELS = 100_000, 50  # of a recipe: a few lines of nested anchors can stand for billions
# What a short form of a section stands for, so that an override inside it does not forget what it said.
SHORT_FORMS = {"tracking": "tracker", "control": "enabled"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `KEY=VALUE` overrides and validate the whole.

    `path` is a YAML file, or a run folder, whose resolved `recipe.yaml` is then taken. Raises UserError
    that lists every problem with field, value and constraint.
    """
    file = path = Path(path)
    try:
        is_folder = path.is_dir()
        file = path / "recipe.yaml" if is_folder else path
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        what = "a run folder with a recipe.yaml" if is_folder else "a recipe (YAML file) or a run folder"
        raise UserError(f"{path}: expected {what}, found none") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)[:200]}: the recipe cannot be read as YAML: {error}") from None
    raw = _parse(text, str(file))
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected a mapping of sections (run, teacher, ...), found {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    if found := sorted(_secrets(raw)):
        raise UserError(
            f"{file}: {', '.join(found)}: expected no secrets in a recipe, which is copied into run folders, model "
            "cards and wandb; found a token, a password in an address, or the value of a secret environment variable. "
            "Leave it in the environment, where the libraries look for it"
        )
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _problems(file, _explain(error)) from None
    if found := contradictions(recipe):
        raise _problems(file, found)
    return recipe


def _problems(file: Path, lines: Sequence[str]) -> UserError:
    plural = "problem" if len(lines) == 1 else "problems"
    return UserError("\n  ".join([f"{file}: {len(lines)} {plural} in the recipe", *lines]))


def _secrets(value: Any, place: str = "") -> Iterator[str]:
    """Places of strings that hold a secret."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _secrets(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, str) and redact(value) != value:
        yield redact(place)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error: silently, the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Any:
    try:
        return _unshared(yaml.load(text, Loader=_Loader))
    except Exception as error:  # PyYAML lets through whatever its constructors raise, down to RecursionError
        reason = str(error) or type(error).__name__
        raise UserError(f"{where}: {text[:80]!r}{'...' * (len(text) > 80)} cannot be read as YAML: {reason}") from None


def _unshared(value: Any, left: Iterator[int] | None = None, depth: int = 0) -> Any:
    """A copy in which an anchor's uses are objects of their own; ValueError where they unfold to too much."""
    left = left or iter(range(MOST_VALUES))
    if next(left, None) is None or depth > MOST_LEVELS:
        raise ValueError(f"more than {MOST_VALUES} values or {MOST_LEVELS} levels, anchors unfolded")
    if isinstance(value, dict):
        return {key: _unshared(item, left, depth + 1) for key, item in value.items()}
    return [_unshared(item, left, depth + 1) for item in value] if isinstance(value, list) else value


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted path, creating sections on the way."""
    key, found, text = override.partition("=")
    parts = key.split(".")
    if not found or not all(parts) or len(parts) > MOST_LEVELS:
        raise UserError(f"expected KEY=VALUE with a dotted key such as run.seed=3, found {override[:200]!r}")
    value = _parse(text, key)
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        index: Any = part
        if isinstance(node, list):
            if not (part.isascii() and part.isdigit() and int(part) < len(node)):
                raise UserError(f"{key}: {'.'.join(parts[:depth])} is a list of {len(node)}; no item {part!r}")
            index = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"{key}: {'.'.join(parts[:depth])} is {node!r}, which has no fields")
        elif last and part in Length.model_fields and set(node) <= set(Length.model_fields):
            node.clear()  # a length has one unit: stages.0.length.steps=5 wins over minutes
        if last:
            node[index] = value
        elif isinstance(node, dict) and not isinstance(node.get(index), dict | list):
            node[index] = _long_form(part, node[index]) if index in node else {}
        node = node[index]


def _long_form(name: str, short: Any) -> dict[str, Any]:
    """The section that a short form stands for."""
    if name == "objective" and isinstance(short, str):
        return {short: 1.0}
    if name == "tracking" and short is None:
        return {"tracker": "none"}
    return {SHORT_FORMS[name]: short} if name in SHORT_FORMS and short is not None else {}


def _explain(error: ValidationError) -> list[str]:
    """All problems of a recipe, each with field, value and constraint."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if part not in (NUMBER_TAG, RAMP_TAG))
        if problem["type"] == "extra_forbidden":
            known = _fields_at(problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{where}: unknown key; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: required, and not given")
        elif problem["type"] == "value_error":
            found = "" if isinstance(problem["input"], dict) else f"; found {_shown(problem['input'])}"
            lines.append(f"{where + ': ' if where else ''}{problem['ctx']['error']}{found}")
        else:
            lines.append(f"{where}: {problem['msg']}; found {_shown(problem['input'])}")
    return lines


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields a section at this place of the recipe has."""
    if RAMP_TAG in loc:
        return [field.alias or name for name, field in Ramp.model_fields.items()]
    model: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if section_of(model) else None
        if field is None:
            return []
        model = next((m for m in _flatten(field.annotation) if section_of(m)), None)
    return list(model.model_fields) if section_of(model) else []


def _flatten(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, tuple, list, Annotated):
        return [leaf for part in typing.get_args(annotation) for leaf in _flatten(part)]
    return [annotation]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
    data = recipe.model_dump(mode="json", by_alias=True)
    for stage in data["stages"]:
        stage["freeze"] = sorted(stage["freeze"])
    for holder in filter(None, (data["run"], data["evaluation"], data["fine_tuning"], *data["stages"])):
        for name in ("length", "every", "checkpoint_every"):
            if isinstance(holder.get(name), dict):
                holder[name] = {unit: value for unit, value in holder[name].items() if value is not None}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
