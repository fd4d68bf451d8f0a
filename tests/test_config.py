"""The recipe: what is accepted, what is refused, and in which words.

python -m pytest tests/test_config.py
"""

from __future__ import annotations

import copy
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.config import Length, Ramp, Recipe, Term, UserError
from distill.recipe import dump_recipe, load_recipe

TERMS = tuple(term for term in typing.get_args(Term) if term not in ("layer_mse", "logit_mse"))
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
SMALLEST: dict[str, Any] = {
    "run": {"name": "tiny"},
    "teacher": {"model": "some/teacher"},
    "corpus": {"source": "text.txt"},
    "stages": [{"objective": "forward_kl", "length": {"steps": 3}}],
}


def merged(base: Any, changes: Any) -> Any:
    """Mappings joined, anything else replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


def load(tmp_path: Path, *overrides: str, raw: Any = None, **sections: Any) -> Recipe:
    """The smallest recipe with some sections changed, through a file."""
    file = tmp_path / "recipe.yaml"
    content = raw if raw is not None else merged(copy.deepcopy(SMALLEST), sections)
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_recipe(file, overrides)


def refusal(tmp_path: Path, *overrides: str, **sections: Any) -> list[str]:
    """The lines of the error: first the file, then one problem a line."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, **sections)
    return [line.strip() for line in str(caught.value).splitlines()]


# What is accepted


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    assert load_recipe(file).run.name == file.stem


def test_there_are_shipped_recipes() -> None:
    assert {"quickstart", "smoke"} <= {file.stem for file in SHIPPED}


def test_the_smallest_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.stages[0].objective == {"forward_kl": 1.0}
    assert recipe.stages[0].length == Length(steps=3)
    assert recipe.folder == Path("runs/tiny")
    assert recipe.control.enabled and recipe.tracking.tracker == "wandb"


def test_shorthands(tmp_path: Path) -> None:
    assert load(tmp_path, control=True).control.enabled
    assert not load(tmp_path, control=False).control.enabled
    for nowhere in ("none", None):
        assert load(tmp_path, tracking=nowhere).tracking.tracker == "none"
    assert load(tmp_path, tracking="wandb").tracking.tracker == "wandb"
    for name in TERMS:
        assert load(tmp_path, f"stages.0.objective={name}").stages[0].objective == {name: 1.0}


def test_labels_and_the_need_of_a_teacher(tmp_path: Path) -> None:
    stage = load(tmp_path, "stages.0.objective={forward_kl: 0.5, cross_entropy: 0.5}").stages[0]
    assert stage.label == "forward_kl+cross_entropy" and stage.needs_teacher
    stage = load(tmp_path, "stages.0.objective=cross_entropy", "stages.0.name=plain").stages[0]
    assert stage.label == "plain" and not stage.needs_teacher


def test_it_is_frozen(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    for section, field in ((recipe, "run"), (recipe.run, "seed"), (recipe.stages[0].length, "steps")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 1)


# What is refused


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.sed=1", "run.sed: unknown key; did you mean 'seed'?"),
        ("student.hiden_size=1", "student.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("stages.0.lenght=1", "stages.0.lenght: unknown key; did you mean 'length'?"),
        ("stages.0.length.step=1", "stages.0.length.step: unknown key; did you mean 'steps'?"),
        ("evaluation.every.step=1", "evaluation.every.step: unknown key; did you mean 'steps'?"),
        ("eval.window=1", "eval: unknown key; did you mean 'evaluation'?"),
        ("stages.0.temperature={from: 2, tp: 1}", "stages.0.temperature.tp: unknown key; did you mean 'to'?"),
        ("other_teachers=[{modl: x}]", "other_teachers.0.modl: unknown key; did you mean 'model'?"),
        ("publishing.xyz=1", "publishing.xyz: unknown key; known keys: repo, private, branch, license"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(tmp_path: Path, override: str, problem: str) -> None:
    assert problem in refusal(tmp_path, override)


def test_all_problems_at_once(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path,
        run={"sede": 1, "batch_size": 0},
        teacher={"model": None, "dtype": "fp8"},
        student={"input_dropout": 1.0},
        corpus={"shuffle_buffer": 5},
        stages=[{"objective": {"forward_kl": -1}, "length": {"steps": 1, "tokens": 2}}, {"objective": "jsd"}],
    )
    assert lines[0] == f"{tmp_path}/recipe.yaml: 9 problems in the recipe"
    expected = [
        "run.sede: unknown key; did you mean 'seed'?",
        "run.batch_size: Input should be greater than 0; found 0",
        "teacher.model: Input should be a valid string; found None",
        "teacher.dtype: Input should be 'auto', 'fp32', 'bf16' or 'fp16'; found 'fp8'",
        "student.input_dropout: Input should be less than 1; found 1.0",
        "corpus: shuffle_buffer: only for a stream; set streaming: true",
        "stages.0.objective.forward_kl: Input should be greater than 0; found -1",
        "stages.0.length: give exactly one of steps, tokens, minutes; found steps, tokens",
        "stages.1.length: required, and not given",
    ]
    assert sorted(lines[1:]) == sorted(expected)


def test_all_problems_between_fields_at_once(tmp_path: Path) -> None:
    stage = {"objective": "hidden_mse", "length": {"steps": 1}, "freeze": ["head"]}
    text = "\n".join(
        refusal(
            tmp_path,
            run={"batch_size": 8, "micro_batch_size": 3},
            student={"embedding_size": 4, "tie_embeddings": True, "transplant": False},
            targets={"signal": "dense"},
            stages=[stage],
        )
    )
    for problem in (
        "run.batch_size (8) must be a multiple of run.micro_batch_size (3)",
        "stages.0.freeze: embedding and head are tied; freeze both or neither",
        "stages.0.objective: hidden_mse needs targets.signal hidden, found dense",
        "stages.0.objective: hidden_mse needs the teacher's width or its directions",
    ):
        assert problem in text


STAGE = "stages=[{objective: %s, length: {steps: 3}, %s}]"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["targets.signal=top_k", "stages.0.temperature={from: 4, to: 1}"],
            "stages.0.temperature: a ramp from 4.0 to 1.0, but targets.temperature is 1.0; top_k targets are taken",
        ),
        (
            ["stages.0.candidates=9", "stages.0.temperature={from: 1, to: 2}"],
            "stages.0.candidates: expected temperature 1, found a ramp from 1.0 to 2.0",
        ),
        *(
            (["targets.signal=sampled", f"stages.0.objective={name}"], f"stages.0.objective: {name} would be biased")
            for name in ("skewed_forward_kl", "skewed_reverse_kl")
        ),
        (
            ["targets.signal=sampled", "stages.0.token_weights=teacher_confidence"],
            "stages.0.token_weights: teacher_confidence needs the teacher's largest probability",
        ),
        (
            [STAGE % ("{jsd: 1, hidden_mse: 1}", "token_weights: student_entropy")],
            "stages.0: token_weights: for the terms of the logits, found hidden_mse beside them",
        ),
        (
            [STAGE % ("jsd", "token_weights: teacher_entropy, candidates: 9")],
            "stages.0: token_weights: teacher_entropy is of the whole vocabulary, found candidates 9",
        ),
        (
            ["student.activation_penalty=2", STAGE % ("jsd", "token_weights: teacher_entropy")],
            "stages.0.token_weights: would weigh student.activation_penalty as well",
        ),
        (["other_teachers=[{model: x}]", "targets.signal=dense"], "targets.signal: dense holds the logits of one"),
        (["other_teachers=[{model: x}]", "targets.cache=true"], "targets.signal: hidden states in a cache are of one"),
        (
            [
                *("other_teachers=[{model: x}]", "targets.cache=true", "targets.signal=top_k"),
                "endpoint={url: http://localhost:1, model: m}",
            ],
            "other_teachers: an endpoint answers for one teacher",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, overrides: list[str], problem: str) -> None:
    lines = refusal(tmp_path, *overrides)
    assert len(lines) == 2 and problem in lines[1]


def test_what_goes_together_is_accepted(tmp_path: Path) -> None:
    ramped = load(
        tmp_path,
        "stages.0.temperature={from: 4, to: 1, shape: cosine}",
        "stages.0.objective={forward_kl: {from: 0.9, to: 0}, cross_entropy: 0.1}",
    ).stages[0]
    assert isinstance(ramped.temperature, Ramp) and ramped.temperature.shape == "cosine"
    assert isinstance(ramped.objective["forward_kl"], Ramp) and ramped.objective["cross_entropy"] == 0.1
    again = load(tmp_path, "stages.0.temperature={from: 4, to: 1}", "stages.0.temperature.to=2").stages[0].temperature
    assert again == Ramp.model_validate({"from": 4, "to": 2})
    stage = load(tmp_path, STAGE % ("cross_entropy", "token_weights: teacher_entropy")).stages[0]
    assert stage.needs_teacher, "for the weights"
    for signal in ("top_k", "sampled"):
        load(tmp_path, "other_teachers=[{model: x, weight: 3}]", "targets.cache=true", f"targets.signal={signal}")


@pytest.mark.parametrize(
    "override",
    [
        *("run.name=", "run.name=a/b", "run.name=..", "run.seed=-1", "run.seed=1.5", "run.seed=x", "run=3"),
        *("run.precision=fp16", "run.output_dir=[a]", "run.max_grad_norm=0", "run.threads=0"),
        *("stages=[]", "stages={}", "stages=", "stages.0=3", "stages.0.objective={}", "stages.0.objective=kl"),
        *("stages.0.objective={forward_kl: .inf}", "stages.0.objective={forward_kl: .nan}"),
        *("stages.0.temperature=0", "stages.0.temperature=.nan", "stages.0.temperature=.inf"),
        *("stages.0.temperature={from: 0, to: 1}", "stages.0.temperature=[4, 1]", "stages.0.temperature=falling"),
        *("stages.0.temperature={from: 1, to: .inf}", "stages.0.objective={jsd: {from: 0, to: 0}}"),
        *("stages.0.temperature={from: 2, to: 1, shape: step}", "stages.0.objective={jsd: {from: -1, to: 1}}"),
        *("stages.0.temperature={from: 1}", "stages.0.skew=0", "stages.0.skew=1", "stages.0.token_weights=entropy"),
        *("teacher.weight=0", "other_teachers=[{model: x, weight: -1}]", "other_teachers=[{}]"),
        *("stages.0.jsd_beta=0", "stages.0.jsd_beta=1", "stages.0.warmup=1", "stages.0.warmup=.nan"),
        *("stages.0.learning_rate=0", "stages.0.final_learning_rate=1.1", "stages.0.weight_decay=-1"),
        *("stages.0.betas=[0.9]", "stages.0.betas=[0.9, 1.0]", "stages.0.betas=0.9"),
        *("stages.0.freeze=head", "stages.0.freeze=[all]", "stages.0.freeze=[head, embedding, body]"),
        *("stages.0.schedule=step", "stages.0.optimizer=adam", "stages.0.length=3", "stages.0.length={}"),
        *("stages.0.length.steps=0", "stages.0.length.minutes=.inf", "stages.0.length.steps=1.5"),
        *("corpus.block_length=1", "corpus.validation_fraction=1", "corpus.documents=page"),
        *("corpus={source: a, validation_fraction: 0.5, test_fraction: 0.5}", "teacher.context=-1"),
        *("evaluation.context=512", "evaluation.window=1", "evaluation.prompts=text", "evaluation.patience=0"),
        *("control=maybe", "control.match=steps", "tracking=tensorboard", "publishing.repo=student"),
    ],
)
def test_wrong_values_are_named_with_their_field(tmp_path: Path, override: str) -> None:
    lines = refusal(tmp_path, override)
    field = override.partition("=")[0]
    assert len(lines) == 2 and lines[0].endswith("1 problem in the recipe")
    assert lines[1].startswith(field.rpartition(".")[0])
    assert field.rpartition(".")[2] in lines[1]


def test_infinite_weight_decay_is_refused(tmp_path: Path) -> None:
    assert "stages.0.weight_decay" in refusal(tmp_path, "stages.0.weight_decay=.inf")[1]


@pytest.mark.parametrize(
    ("length", "found"), [({}, "none"), ({"steps": 1, "minutes": 2}, "steps, minutes"), ({"steps": None}, "none")]
)
def test_a_length_has_exactly_one_unit(tmp_path: Path, length: dict[str, Any], found: str) -> None:
    stages = [{"objective": "jsd", "length": length}]
    problem = f"stages.0.length: give exactly one of steps, tokens, minutes; found {found}"
    assert refusal(tmp_path, stages=stages)[1] == problem


# Overrides


def test_overrides_by_dotted_path(tmp_path: Path) -> None:
    two = [*SMALLEST["stages"], {"objective": "jsd", "length": {"tokens": 5}}]
    recipe = load(
        tmp_path,
        "run.seed=3",
        "run.name=a=b".replace("=b", "-b"),
        "stages.1.objective={forward_kl: 0.9, cross_entropy: 0.1}",
        "stages.1.freeze=[head, embedding]",
        "corpus.separator='='",
        "run.micro_batch_size=null",
        "control=false",
        stages=two,
    )
    assert recipe.run.seed == 3 and recipe.run.name == "a-b" and recipe.run.micro_batch_size is None
    assert recipe.stages[1].objective == {"forward_kl": 0.9, "cross_entropy": 0.1}
    assert recipe.stages[1].freeze == {"head", "embedding"}
    assert recipe.stages[0] == load(tmp_path).stages[0], "the other stage stays"
    assert recipe.corpus.separator == "=", "only the first = divides"
    assert not recipe.control.enabled


def test_a_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "run.seed=3", "run.seed=4").run.seed == 4


def test_an_override_replaces_the_unit_of_a_length(tmp_path: Path) -> None:
    recipe = load(tmp_path, "stages.0.length.minutes=2", "evaluation.every.tokens=7", "run.checkpoint_every.steps=1")
    assert recipe.stages[0].length == Length(minutes=2)
    assert recipe.evaluation.every == Length(tokens=7), "also where the default has another"
    assert recipe.run.checkpoint_every == Length(steps=1)
    assert load(tmp_path, "stages.0.length.minutes=2", "stages.0.length.steps=9").stages[0].length == Length(steps=9)


def test_an_override_creates_sections(tmp_path: Path) -> None:
    assert load(tmp_path, "student.num_layers=4").student.num_layers == 4
    assert load(tmp_path, "evaluation.window=600").evaluation.window == 600


def test_a_whole_section_can_be_replaced(tmp_path: Path) -> None:
    recipe = load(tmp_path, "stages=[{objective: jsd, length: {minutes: 1}}]", "teacher={model: other}")
    assert recipe.stages[0].objective == {"jsd": 1.0} and recipe.teacher.model == "other"


def test_an_override_inside_a_shorthand_keeps_what_it_says(tmp_path: Path) -> None:
    """`tracking: none` must not start to upload because somebody asks for more log lines."""
    assert load(tmp_path, "tracking.every=1", tracking="none").tracking.tracker == "none"
    assert not load(tmp_path, "control.match=tokens", control=False).control.enabled
    objective = load(tmp_path, "stages.0.objective.cross_entropy=0.5").stages[0].objective
    assert objective == {"forward_kl": 1.0, "cross_entropy": 0.5}


def test_an_override_does_not_reach_through_an_anchor(tmp_path: Path) -> None:
    """`&often` and `*often` are one object once YAML is read."""
    file = tmp_path / "recipe.yaml"
    shared = "evaluation: {every: &often {steps: 4}}\n"
    file.write_text(shared + yaml.safe_dump(SMALLEST).replace("name: tiny", "name: tiny\n  checkpoint_every: *often"))
    recipe = load_recipe(file, ["evaluation.every.steps=9"])
    assert (recipe.evaluation.every, recipe.run.checkpoint_every) == (Length(steps=9), Length(steps=4))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("run..seed=3", "expected KEY=VALUE"),
        ("stages.1.length.steps=3", "stages is a list of 1; no item '1'"),
        ("stages.-1.length.steps=3", "stages is a list of 1; no item '-1'"),
        ("stages.first.length.steps=3", "stages is a list of 1; no item 'first'"),
        ("stages.\N{SUPERSCRIPT TWO}=3", "stages is a list of 1; no item"),
        ("run.seed=[1", "cannot be read as YAML"),
        ("run.seed=!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("run.name=2026-13-01", "cannot be read as YAML"),
        ("run.seed=!!int x", "cannot be read as YAML"),
        ("run.seed=!!bool perhaps", "cannot be read as YAML"),
        ("run.seed=!!timestamp now", "cannot be read as YAML"),
        ("run.seed=" + "1" * 5000, "run.seed"),
        ("run.seed=" + "[" * 4000, "run.seed"),
    ],
)
def test_overrides_that_cannot_be_applied(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, override)[0]


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping of sections (run, teacher, ...), found NoneType"),
        (b"- run\n- teacher\n", "expected a mapping of sections (run, teacher, ...), found list"),
        (b"run", "expected a mapping of sections (run, teacher, ...), found str"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff", "cannot be read as YAML"),
        (bytes(range(128, 256)), "cannot be read as YAML"),
        (b"run: \0", "cannot be read as YAML"),
        (b"run:\n\tname: x\n", "cannot be read as YAML"),
        (b"run: {name: x", "cannot be read as YAML"),
        (b"run: {}\n---\nrun: {}\n", "cannot be read as YAML"),
        (b"run: {name: 2026-13-01}", "cannot be read as YAML"),
        (b"run: " + b"[" * 4000, "cannot be read as YAML"),
        (b"run: !!python/object/apply:os.mkdir [was_run]", "cannot be read as YAML"),
        (b"run: !!python/name:os.system", "cannot be read as YAML"),
        (b"!!python/object/new:os.system [x]", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)
    assert not (tmp_path / "was_run").exists(), "a tag ran code"


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML would take the last one without a word: here half of a recipe."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(SMALLEST) + "run: {name: again}\n")
    with pytest.raises(UserError, match="run"):
        load_recipe(file)


@pytest.mark.parametrize("path", ["none.yaml", "none/none.yaml", "x" * 5000, "a\0b"])
def test_files_that_are_not_there(path: str) -> None:
    with pytest.raises(UserError, match="recipe|cannot be read"):
        load_recipe(path)


def test_a_run_folder_is_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run folder with a recipe\.yaml, found none"):
        load_recipe(tmp_path)
    recipe = load(tmp_path)
    assert load_recipe(tmp_path) == recipe
    assert load_recipe(tmp_path, ["run.seed=8"]).run.seed == 8


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_survive_a_round_trip(tmp_path: Path, file: Path) -> None:
    recipe = load_recipe(file)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path) == recipe
    assert dump_recipe(load_recipe(tmp_path)) == dump_recipe(recipe)
    stages = yaml.safe_load(dump_recipe(recipe))["stages"]
    assert all(len(stage["length"]) == 1 for stage in stages), "only the unit that counts"


# Properties

IN_ONE_FOLDER = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Without NEL, the line end of EBCDIC, which PyYAML does not read back as it wrote it.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=12)
SPECIAL = st.sampled_from(["", "null", "1e5", "2026-01-02", "yes", "~", " a ", "'", "a: b", "#", "\n", "\ufeff"])
LENGTHS = st.one_of(
    st.builds(Length, steps=st.integers(1, 10**9)),
    st.builds(Length, tokens=st.integers(1, 10**15)),
    st.builds(Length, minutes=st.floats(1e-9, 1e9)),
)
RAMPS = st.fixed_dictionaries(
    {"from": st.floats(1e-9, 1e9), "to": st.floats(1e-9, 1e9)},
    optional={"shape": st.sampled_from(["linear", "cosine"])},
)
STAGES = st.fixed_dictionaries(
    {
        "objective": st.dictionaries(st.sampled_from(TERMS), st.one_of(st.floats(1e-9, 1e9), RAMPS), min_size=1),
        "length": LENGTHS,
    },
    optional={
        "temperature": st.one_of(st.floats(1e-9, 1e9), RAMPS),
        "name": st.one_of(TEXT, SPECIAL),
        "freeze": st.sets(st.sampled_from(["embedding", "head"])),
        "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        "learning_rate": st.floats(1e-12, 1e3),
    },
)


@IN_ONE_FOLDER
@given(
    stages=st.lists(STAGES, min_size=1, max_size=3),
    every=LENGTHS,
    text=st.one_of(TEXT, SPECIAL),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
    nothing=st.sampled_from([None, 3]),
)
def test_a_dumped_recipe_loads_as_an_equal_one(
    tmp_path: Path, stages: list[dict[str, Any]], every: Length, text: str, name: str, nothing: int | None
) -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"name": name, "micro_batch_size": None, "checkpoint_every": every, "threads": nothing},
            "teacher": {"model": text, "revision": text},
            "other_teachers": [{"model": text, "weight": 2}, {"model": name}][: len(stages) - 1],
            "corpus": {"source": text or "-", "separator": text},
            "stages": stages,
            "evaluation": {"every": every, "prompts": (text, name)},
            "tracking": {"tags": (text,)},
        }
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path) == recipe


SECTIONS = {name: list(section) for name, section in Recipe.model_validate(SMALLEST).model_dump().items() if section}
WORDS = st.one_of(
    st.sampled_from(["stages", "0", "1", "length", "steps", "objective", "forward_kl", "freeze", *SECTIONS]),
    st.sampled_from([str(field) for fields in SECTIONS.values() for field in fields]),
    TEXT,
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, SPECIAL, st.dates(), st.binary(max_size=4), WORDS
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(WORDS, SCALARS), inner, max_size=4)),
    max_leaves=12,
)
VALUES = st.one_of(TEXT, SPECIAL, TREES.map(lambda tree: yaml.safe_dump(tree, default_flow_style=True)))
OVERRIDES = st.one_of(
    TEXT, st.builds(lambda words, value: ".".join(words) + "=" + value, st.lists(WORDS, max_size=5), VALUES)
)


@IN_ONE_FOLDER
@given(changes=st.dictionaries(st.one_of(st.sampled_from(list(SMALLEST)), WORDS), TREES, max_size=4))
def test_any_tree_is_a_recipe_or_a_user_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    try:
        assert isinstance(load(tmp_path, raw={**SMALLEST, **changes}), Recipe)
    except UserError as error:
        assert str(error).startswith(str(tmp_path))


@IN_ONE_FOLDER
@given(overrides=st.lists(OVERRIDES, max_size=3))
@example(["stages.\N{SUPERSCRIPT TWO}.length=1"])
@example(["run.name=2026-13-01"])
@example(["run.seed=0x_"])
@example(["run.name=\udcff"])
def test_any_override_gives_a_recipe_or_a_user_error(tmp_path: Path, overrides: list[str]) -> None:
    try:
        assert isinstance(load(tmp_path, *overrides), Recipe)
    except UserError as error:
        assert str(error)


@IN_ONE_FOLDER
@given(content=st.one_of(st.binary(max_size=40), TEXT.map(str.encode)))
@example(b"run: {name: 2026-13-01}")
@example(b"run: !!timestamp x")
def test_any_file_is_a_recipe_or_a_user_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError):  # 40 bytes hold no recipe
        load_recipe(file)
