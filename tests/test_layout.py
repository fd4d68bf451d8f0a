"""The architecture, read from the source: who imports whom, and what nobody does.

python -m pytest tests/test_layout.py
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("distill", "eval")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_of(path: Path) -> str:
    """distill/train.py -> distill.train; distill/__init__.py -> distill."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports(tree: ast.AST, module: str, package: bool) -> list[tuple[str, int]]:
    """Everything imported anywhere in a file, also inside functions, with its line: modules and names in them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from .x import y
                parents = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found.append((base, node.lineno))
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def our_imports(module: str) -> set[str]:
    """Those of our modules that one imports."""
    path = MODULES[module]
    names = {name for name, _ in imports(parse(path), module, path.name == "__init__.py")}
    return {name for name in names if name in MODULES and name not in PACKAGES and name != module}


def test_the_sources_are_found() -> None:
    assert {"distill.train", "distill.student", "distill.config", "eval.perplexity"} <= MODULES.keys()
    assert our_imports("distill.fused") == {
        "distill.candidates",
        "distill.losses",
        "distill.objective",
        "distill.signals",
        "distill.student",
    }


def test_imports_run_without_a_circle() -> None:
    graph = {module: our_imports(module) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("distill")])
def test_distill_does_not_know_eval(module: str) -> None:
    names = {name.split(".")[0] for name, _ in imports(parse(MODULES[module]), module, package=False)}
    assert "eval" not in names


def test_the_packages_themselves_import_nothing() -> None:
    """`import distill` costs nothing, and no module can be part of a circle through its package."""
    for package in PACKAGES:
        assert not imports(parse(MODULES[package]), package, package=True)


def test_the_student_needs_torch_and_transformers_only() -> None:
    """The file is published beside the weights and runs without this package."""
    for name, line in imports(parse(MODULES["distill.student"]), "distill.student", package=False):
        top = name.split(".")[0]
        assert top in {"torch", "transformers"} or top in sys.stdlib_module_names, f"line {line}: {name}"


@pytest.mark.parametrize("module", ["distill.losses", "distill.signals", "distill.schedule"])
def test_the_mathematics_is_pure(module: str) -> None:
    """Nothing that reads or writes; of ours, only the types of signals."""
    assert our_imports(module) <= {"distill.signals"}
    tops = {name.split(".")[0] for name, _ in imports(parse(MODULES[module]), module, package=False)}
    assert tops <= {"distill", "__future__", "collections", "dataclasses", "math", "torch"}


FORBIDDEN = {
    "torch.load": "runs pickle; use safetensors",
    "torch.save": "writes pickle; use safetensors",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.unsafe_load": "runs code; use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "eval": "runs code",
    "exec": "runs code",
    "os.system": "use subprocess with a list",
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def offences(source: str) -> list[str]:
    """Every use of something that can run code out of data."""
    tree = ast.parse(source)
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader"}
    safe_loaders |= {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & safe_loaders
    }
    found = [f"{line}: {name}" for name, line in imports(tree, "x", False) if name.split(".")[0] in PICKLES]
    found += [f"{line}: {name}" for name, line in imports(tree, "x", False) if name in FORBIDDEN]
    found += [f"{line}: import eval hides the builtin" for name, line in imports(tree, "x", False) if name == "eval"]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN:
            found.append(f"{node.lineno}: {name}: {FORBIDDEN[name]}")
        if name == "yaml.load":
            loader = arguments.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "none")
            if loader not in safe_loaders:
                found.append(f"{node.lineno}: yaml.load with loader {loader}")
        if arguments.get("allow_pickle", "False") != "False" or arguments.get("shell", "False") != "False":
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_runs_code_out_of_data(path: Path) -> None:
    assert not offences(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "def f():\n    import dill", "import torch\ntorch.load('x')"),
        *(
            "torch.save(x, 'x')",
            "from torch import load",
            "yaml.load(x)",
            "yaml.load(x, yaml.Loader)",
            "yaml.full_load(x)",
        ),
        *("yaml.full_load(x)", "yaml.load(x, Loader=yaml.UnsafeLoader)", "class L(yaml.Loader): pass\nyaml.load(x, L)"),
        *("np.load(x, allow_pickle=True)", "eval(x)", "exec(x)", "import eval", "run(x, shell=True)"),
    ],
)
def test_offences_are_seen(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        *("yaml.safe_load(x)", "yaml.load(x, Loader=yaml.SafeLoader)", "np.load(x, allow_pickle=False)"),
        *("class L(yaml.SafeLoader): pass\nyaml.load(x, L)", "model.eval()", "from eval.perplexity import main"),
    ],
)
def test_innocents_are_left_alone(source: str) -> None:
    assert not offences(source)
