"""llama.cpp in a process and, where wanted, an environment of its own; one sequence at a time.

    python -m eval.latency runs/quickstart                       where pip install 'potstill[llamacpp]' has built it
    POTSTILL_LLAMA_PYTHON=.venv-llama/bin/python python -m eval.latency runs/quickstart

What llama-cpp-python needs must not decide what Potstill runs with, and a llama.cpp that crashes, as some builds do in
some virtual machines, must not take the others' measurements along. So this file is both sides of a pipe: imported, it
starts itself in the Python that has llama_cpp and asks it; started, it imports nothing but that. A question and its
answer, a line of JSON each, take some 0.1 ms, where a step of a small model takes 10.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

VARIABLE = "POTSTILL_LLAMA_PYTHON"


class Ended(Exception):
    """The other process has ended; the message holds its last words."""


def python_with_llama() -> str | None:
    """The Python that has llama_cpp: as the environment says, else this one; None where it has none either."""
    return os.environ.get(VARIABLE) or (sys.executable if importlib.util.find_spec("llama_cpp") else None)


class Llama:
    """A GGUF file in llama.cpp in another process, which ends with this object."""

    def __init__(self, python: str, file: Path, threads: int, context: int) -> None:
        """`context`: the room in tokens, 0 for as much as the model was trained for. Raises Ended where it fails."""
        self.errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [python, __file__, str(file), str(threads), str(context)]
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # what lies beside this file is not for that Python
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
            )
        except OSError as error:
            raise Ended(f"{python} cannot be run: {error}") from None
        weakref.finalize(self, _end, self.process, self.errors)
        self.pid = self.process.pid
        self.bare_bytes: int = self._answer()  # resident memory before the model was loaded
        about = self._answer()
        self.room, self.vocab_size = about["room"], about["vocab_size"]
        self.metadata: dict[str, str] = about["metadata"]
        self.version: str = about["version"]
        self.tokens_read = 0

    def read(self, tokens: list[int], *, afresh: bool = False) -> int:
        """Read tokens, forgetting all before them if `afresh`, and give the likeliest next one."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write(json.dumps([afresh, tokens]) + "\n")
            self.process.stdin.flush()
        token, self.tokens_read = self._answer()
        return int(token)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        raise Ended(f"it ended with exit code {code}: {said[-1] if said else 'no message'}")


def _end(process: subprocess.Popen[str], errors: IO[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()
    process.stdout.close()
    errors.close()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """The other side: FILE THREADS CONTEXT, then questions until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    import llama_cpp

    file, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say(resident_bytes(os.getpid()))
    model = llama_cpp.Llama(file, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    about = {"room": model.n_ctx(), "vocab_size": model.n_vocab(), "version": llama_cpp.__version__}
    say({**about, "metadata": model.metadata})
    for line in sys.stdin:
        afresh, tokens = json.loads(line)
        if afresh:
            model.reset()
        model.eval(tokens)
        say([model.sample(temp=0.0), model.n_tokens])


if __name__ == "__main__":
    main()
