"""What reads files of ours, fed with what they are not: a result or one clear error, never a traceback, never a hang.

Recipes, overrides, manifests of cached targets and of written text, records of shards, results of both kinds.

python -m pytest tests/test_fuzz.py; `make fuzz` tries a hundred times as much.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from distill.config import Recipe, UserError
from distill.recipe import dump_recipe, load_recipe
from distill.result import check_files, print_result, read_result, table_rows
from distill.sealed import read_sealed, seal
from distill.targets import MANIFEST, _collect, read_manifest, shard_file
from distill.written import MANIFEST as WRITTEN
from distill.written import WrittenText, text_files

FUZZ = settings(
    max_examples=60 * int(os.environ.get("FUZZ", "1")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FIGURES = {
    "perplexity": 90.0, "bits_per_byte": 1.4, "nll_nats": 4.5, "tokens": 7905, "parameters": 33_100_000,
    "weight_bytes": 10**8, "decode_tokens_per_second": 124.0, "kl_to_teacher_nats": 2.1, "top1_agreement": 0.4,
}  # fmt: skip
RESULT: dict[str, Any] = {
    "name": "tiny",
    "teacher": {**FIGURES, "model": "some/teacher"},
    "student": FIGURES,
    "control": {**FIGURES, "match": "wall_time"},
    "distillation_gain_nats": 0.58,
    "time_to_control_loss": 0.26,
    "samples": [{"prompt": "In 1969,", "greedy": " the", "sampled": " a"}],
    "curves": {"student": [{"tokens": 10, "seconds": 1.0, "nll_nats": 5.0}]},
    "corpus": {"fingerprint": "0f", "train_tokens": 100, "train_documents": 3},
    "targets": {"kind": "hidden", "cached": False, "served": "big", "teachers": "two"},
    "versions": {"python": "3.11"},
    "files": {
        "student": {"model.safetensors": "0" * 64, "config.json": "0" * 64},
        ".": {"student.log.jsonl": "0" * 64},
    },
}
ACCURACY = {
    "accuracy": 0.7, "accuracy_interval": [0.6, 0.8], "nll_nats": 0.9, "texts": 991, "parameters": 33_100_000,
    "weight_bytes": 10**8, "latency_ms_p50": 1.5, "top1_agreement": 0.8,
}  # fmt: skip
CLASSIFIED: dict[str, Any] = {
    **{key: RESULT[key] for key in ("name", "curves", "versions", "files")},
    "task": "classification",
    "teacher": {**ACCURACY, "model": "some/teacher"},
    "student": ACCURACY,
    "control": {**ACCURACY, "match": "wall_time"},
    "accuracy_gain": 0.05,
    "accuracy_gain_interval": [0.01, 0.09],
    "speedup": 20.0,
    "majority_accuracy": 0.2,
    "classes": ["arts", "sport"],
    "corpus": {"fingerprint": "0f", "train_texts": 100},
    "targets": {"texts": 200},
}
SHARD = {"blocks": 10, "bytes": 1000, "sha256": "0" * 64, "seconds": 0.5}
CACHE: dict[str, Any] = {
    "format": 1,
    "teacher": "some/teacher",
    "identity": {"encoding": "hidden", "hidden_dtype": "int8", "width": 2, "outcomes": None, "temperature": 1.0},
    "dimension_scale": [0.5, 1.5],
    "blocks_per_shard": 10,
    "shards": {"0": SHARD, "1": SHARD},
}
WRITTEN_SHARD = {"documents": 8, "tokens": 90, "bytes": 1000, "sha256": "0" * 64, "seconds": 0.5}
WRITTEN_TEXT: dict[str, Any] = {
    "format": 1,
    "teacher": "some/teacher",
    "identity": {"temperature": 1.0, "seed": 0, "folder": None},
    "documents": 20,
    "documents_per_shard": 8,
}

KEYS = st.sampled_from(
    sorted(
        {*RESULT, *FIGURES, *CLASSIFIED, *ACCURACY, *CACHE, *CACHE["identity"], *SHARD, *WRITTEN_TEXT, *WRITTEN_SHARD}
    )
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(allow_subnormal=False),
    st.text(max_size=8), KEYS,
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "\0", "NaN", "hidden", "0" * 64, "[/x]"]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, st.text(max_size=4)), inner)),
    max_leaves=8,
)


def places(value: Any, place: tuple = ()) -> list[tuple]:
    """Paths to everything inside a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*place, key) for key, _ in items] + [p for key, item in items for p in places(item, (*place, key))]


@st.composite
def changed_trees(draw: st.DrawFn, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with a few of its parts replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for place in draw(st.lists(st.sampled_from(places(tree)), min_size=1, max_size=3)):
        node: Any = tree
        try:
            for key in place[:-1]:
                node = node[key]
            if draw(st.booleans()):
                node[place[-1]] = draw(TREES)
            elif isinstance(node, dict):
                node.pop(place[-1], None)
                node[draw(st.one_of(KEYS, st.text(max_size=4)))] = draw(TREES)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken it away
    return tree


@st.composite
def changed_bytes(draw: st.DrawFn, text: str) -> bytes:
    """The text with some of its bytes replaced."""
    data = bytearray(text.encode())
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(len(data), begin + draw(st.sampled_from([1, 5, 10**6])))))
        data[begin:end] = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b"[" * 9999, b"*a", b"&a", b"9" * 5000]))
        )
    return bytes(data)


def changes_of(tree: dict[str, Any]) -> st.SearchStrategy[dict[str, Any] | bytes]:
    """As a tree, as bytes, or something else altogether."""
    return st.one_of(
        changed_trees(tree), changed_bytes(json.dumps(tree)), TREES.map(lambda other: json.dumps(other).encode())
    )


def write(file: Path, content: bytes | dict[str, Any], sealed: bool = False) -> None:
    file.parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(seal(content) if sealed else content).encode()
    file.write_bytes(content)


# Recipes

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@FUZZ
@given(content=st.sampled_from([file.read_text(encoding="utf-8") for file in SHIPPED]).flatmap(changed_bytes))
@example(content=BOMB.encode())
@example(content=b"run: &a {name: *a}")
@example(content=b"? " * 5000)
@example(content=b"- " * 5000)
@example(content=b"run: {name: 1" + b"_" * 50_000 + b"}")
@example(content=b"run: {name: " + b"1:" * 20_000 + b"1.}")
@example(content=b"run: {name: !!python/object/apply:os.system ['true']}")
@example(content=b"<<: [" + b"{a: 1}, " * 5000 + b"]")
def test_a_recipe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    try:
        recipe = load_recipe(file)
    except UserError as error:
        assert len(str(error)) < 20_000
    else:
        assert isinstance(recipe, Recipe) and dump_recipe(recipe)


@pytest.mark.parametrize(
    "override", ["run=" + "[" * 9999, "run=&a [*a]", "a." * 5000 + "b=1", "run.seed=" + "9" * 5000]
)
def test_an_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError):
        load_recipe(SHIPPED[0], [override])


# Manifests of cached targets


@FUZZ
@given(content=changes_of(CACHE), sealed=st.booleans())
def test_a_manifest(tmp_path: Path, content: Any, sealed: bool) -> None:
    write(tmp_path / MANIFEST, content, sealed)
    try:
        manifest = read_manifest(tmp_path)
    except UserError as error:
        assert str(error).startswith(str(tmp_path / MANIFEST))
        return
    assert manifest["blocks_per_shard"] > 0
    for number, record in manifest["shards"].items():
        path = (tmp_path / shard_file(int(number))).resolve()
        assert path.is_relative_to(tmp_path.resolve()) and record["blocks"] > 0 and record["bytes"] >= 0


@FUZZ
@given(content=changes_of(SHARD))
def test_a_record_of_a_finished_shard(tmp_path: Path, content: Any) -> None:
    write(tmp_path / MANIFEST, CACHE, sealed=True)
    write(tmp_path / "building" / "00007.json", content)
    shards = _collect(tmp_path, read_manifest(tmp_path))["shards"]
    assert read_manifest(tmp_path)["shards"] == shards and {"0", "1"} <= shards.keys() <= {"0", "1", "7"}
    assert not list((tmp_path / "building").iterdir()), "a record that cannot be read goes as well"


# Written text


@FUZZ
@given(content=changes_of(WRITTEN_TEXT), sealed=st.booleans())
@example(content={**WRITTEN_TEXT, "documents": 10**12}, sealed=True)
def test_a_manifest_of_written_text(tmp_path: Path, content: Any, sealed: bool) -> None:
    write(tmp_path / WRITTEN, content, sealed)
    try:
        written = WrittenText(tmp_path)
    except UserError as error:
        assert str(error).startswith(str(tmp_path / WRITTEN))
        return
    assert sum(map(len, written.shards.values())) == written.manifest["documents"]
    assert all(written.file(number).resolve().is_relative_to(tmp_path.resolve()) for number in written.shards)
    assert len(written.missing()) == len(written.shards)
    with pytest.raises(UserError, match="finish it with"):
        text_files(tmp_path)


@FUZZ
@given(content=changes_of(WRITTEN_SHARD), sealed=st.booleans())
def test_a_record_of_written_text(tmp_path: Path, content: Any, sealed: bool) -> None:
    write(tmp_path / WRITTEN, WRITTEN_TEXT, sealed=True)
    write(tmp_path / "records" / "00000.json", content, sealed)
    assert WrittenText(tmp_path).missing() == [0, 1, 2], "its file is not there"


# Results


@FUZZ
@given(content=st.one_of(changes_of(RESULT), changes_of(CLASSIFIED)), sealed=st.booleans())
@example(content={**RESULT, "targets": {"served": "[/x]", "teachers": "[/x]"}}, sealed=True)
@example(content={**RESULT, "name": "[/x]", "control": {**FIGURES, "match": "[/x]"}}, sealed=True)
@example(content={**CLASSIFIED, "name": "[/x]"}, sealed=True)
@example(
    content={**RESULT, "samples": [{"prompt": "[/dim]", "greedy": "[/b] [red", "sampled": "[@click=x]"}]}, sealed=True
)
@example(content={key: value for key, value in RESULT.items() if key != "time_to_control_loss"}, sealed=True)
def test_a_result(tmp_path: Path, content: Any, sealed: bool) -> None:
    write(tmp_path / "result.json", content, sealed)
    try:
        result = read_result(tmp_path)
    except UserError as error:
        assert str(error).startswith(str(tmp_path))
        return
    assert table_rows(result)
    print_result(result, tmp_path, Console(file=io.StringIO()))
    try:
        check_files(tmp_path, result)
    except UserError as error:
        assert str(tmp_path) in str(error)


def test_the_seeds_of_the_fuzzing_are_good(tmp_path: Path) -> None:
    """Else every change of them would be refused, and nothing tried."""
    write(tmp_path / "result.json", RESULT, sealed=True)
    write(tmp_path / MANIFEST, CACHE, sealed=True)
    write(tmp_path / WRITTEN, WRITTEN_TEXT, sealed=True)
    assert read_result(tmp_path) == RESULT and read_manifest(tmp_path) == CACHE
    assert WrittenText(tmp_path).manifest == WRITTEN_TEXT
    write(tmp_path / "result.json", CLASSIFIED, sealed=True)
    write(tmp_path / "records" / "00000.json", WRITTEN_SHARD, sealed=True)
    assert read_result(tmp_path) == CLASSIFIED and WrittenText(tmp_path).record(0) == WRITTEN_SHARD


@FUZZ
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(tmp_path: Path, position: int, bit: int) -> None:
    """In a sealed file: another content is refused. White space may change."""
    data = bytearray(json.dumps(seal(CACHE), indent=1).encode())
    data[position % len(data)] ^= 1 << bit
    (tmp_path / "x.json").write_bytes(data)
    try:
        found = read_sealed(tmp_path / "x.json")
    except (OSError, ValueError):
        return
    assert found == CACHE or "checksum" not in json.loads(data), "the name of the checksum itself was hit"
    assert {key: found.get(key) for key in CACHE} == CACHE
