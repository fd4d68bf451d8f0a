"""Commands in processes of their own, forked from one that has imported the libraries: those take most of a start.

What a command sees is what `python FILE ...`, `python -m MODULE ...` and `python -c CODE ...` give it: `sys.argv`,
`sys.path`, working directory, environment, standard streams, exit code; only the libraries' imports are behind it.
Each process that runs tests has one such parent, started when first needed.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

LIBRARIES = [
    "accelerate", "datasets", "pydantic", "pyarrow.parquet", "rich.console", "safetensors.torch", "scipy.optimize",
    "tokenizers", "torch._dynamo", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "wandb",
]  # fmt: skip
READ_AT_IMPORT = ("HF_", "OMP_", "MKL_", "PYTHON", "TORCH_", "TRANSFORMERS_", "LD_")  # in the environment
_at_start: dict[str, str] = {}


def can_run(environment: dict[str, str]) -> bool:
    """Whether the libraries would have been imported alike in this environment."""
    _start()
    names = {name for name in environment.keys() | _at_start.keys() if name.startswith(READ_AT_IMPORT)}
    return all(environment.get(name) == _at_start.get(name) for name in names)


def run(
    arguments: Sequence[str], cwd: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments], ...)` with captured text."""
    _start()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        call = (list(arguments), str(cwd), environment, str(out), str(err))
        process = multiprocessing.get_context("forkserver").Process(target=_child, args=call)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read_text(), err.read_text())


def _start() -> None:
    if _at_start:
        return
    _at_start.update(os.environ)
    multiprocessing.set_forkserver_preload(["warm"])
    # Python 3.11 does not tell that process where the tests' own modules are.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(_at_start)


def _child(arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    first, *rest = arguments
    try:
        if first == "-m":
            sys.argv, sys.path[:1] = rest, [cwd]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv, sys.path[:1] = ["-c", *rest[1:]], [cwd]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[:1] = arguments, [str(Path(first).resolve().parent)]
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


if __name__ == "warm" and multiprocessing.parent_process() is None and "pytest" not in sys.modules:
    for name in LIBRARIES:  # in the process that is forked
        with contextlib.suppress(ImportError):
            __import__(name)
