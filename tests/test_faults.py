"""The fault campaign sees what is wrong; that nothing is, is what `make faults` shows.

python -m pytest tests/test_faults.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_command

from benchmarks import faults
from benchmarks.fault_kinds import KINDS
from benchmarks.fault_trials import COMMANDS, Attempt, Outcome, differences, without_times
from benchmarks.faults import assigned, page

SABOTAGE = """
import sys
import distill.loop as loop

def spoiled(folder, name, load=loop.load_tensors):
    return {key: value * 1.0001 for key, value in load(folder, name).items()}

loop.load_tensors = spoiled
from benchmarks.faults import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_resume_that_goes_on_with_other_numbers_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole campaign, on a training whose checkpoints lie by a ten-thousandth."""
    options = ("--kind", "SIGKILL while saving", "--trials", "1", "--docs", str(tmp_path / "faults.md"))
    run = run_command(*options, launcher=("-c", SABOTAGE), cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert "1 trials are silently wrong or unclear: 0" in run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["trials"], result["silently_wrong"], result["recovered"]) == (1, 1, 0)
    (file,) = (tmp_path / "runs" / "bench" / "faults").rglob("*.json")
    outcome = json.loads(file.read_text(encoding="utf-8"))
    assert "tiny/control/model.safetensors differs" in outcome["message"]
    assert outcome["attempts"] == ["signal 9", "done"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "prepare", lambda *_: pytest.fail("what is done is done again"))
    assert faults.main(options) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["silently_wrong"] == 1
    assert not (tmp_path / "faults.md").exists(), "some kinds alone are not the table"


KILLED_IN_A_BAR = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from benchmarks import fault_trials


def die():
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


list(tqdm(range(2)))  # the parent has shown a bar
sys.modules["bar"] = SimpleNamespace(main=lambda _: len(list(tqdm(range(3)))) - 3)
fault_trials.COMMANDS["train"], fault_trials.LIMIT = ("bar", ()), 20.0
world = SimpleNamespace(recipe="", folder=Path(sys.argv[1]))
trial = fault_trials.Trial(world, "train", "none", 0, 0, Path(sys.argv[1]) / "trial")
print(trial.run(prepare=die).code, trial.run().code)
"""


def test_an_attempt_that_is_killed_holds_nobody_up(tmp_path: Path) -> None:
    """Not even with the lock of the progress bars in its hands."""
    run = run_command(str(tmp_path), launcher=("-c", KILLED_IN_A_BAR), cwd=tmp_path)
    assert run.stdout.split() == ["-9", "0"], run.stderr


@pytest.mark.parametrize(
    ("code", "text", "problem"),
    [
        (0, "fine", ""),
        (2, "x\nerror: disk full\n", ""),
        (2, "error: a\nerror: b\n", "exit code 2 with 2 messages"),
        (2, "", "exit code 2 with 0 messages"),
        (1, "Traceback (most recent call last):\n  File\nValueError: x\n", "traceback: ValueError: x"),
        (1, "", "exit code 1"),
        (None, "", "hangs for 300 s"),
        (-9, "", ""),
        (143, "stopped", ""),
        (-11, "", "exit code -11"),
    ],
)
def test_which_ends_are_clear(code: int | None, text: str, problem: str) -> None:
    assert Attempt(code, text).problem == problem


def test_what_is_compared() -> None:
    first = b'{"nll_nats": 4.5, "seconds": 1.0, "place": "/a/x", "curves": [{"seconds": 2, "tokens": 3}]}'
    second = first.replace(b"1.0", b"7.0").replace(b"/a/", b"/b/")
    one, other = without_times("result.json", first, "/a"), without_times("result.json", second, "/b")
    assert one == other == {"nll_nats": 4.5, "place": "DISK/x", "curves": [{"tokens": 3}]}
    changed = without_times("result.json", first.replace(b"4.5", b"4.6"), "/a")
    assert differences({"a": one, "b": 1}, {"a": changed, "c": 1}) == {
        "a": "differs",
        "b": "is missing",
        "c": "is surplus",
    }
    assert without_times("x.safetensors", b"\0\1", "/a") != without_times("x.safetensors", b"\0\2", "/a")
    assert without_times("a.log.jsonl", b'{"step": 1, "seconds": 2}\n', "/a") == [{"step": 1}]
    assert without_times("result.json", b"{cut", "/a") != without_times("result.json", b"{cu", "/a")


def test_every_kind_meets_every_command_that_it_fits() -> None:
    kinds = list(KINDS)
    plan = {assigned(number, kinds) for number in range(140)}
    assert {kind for _, kind in plan} == set(kinds) and {command for command, _ in plan} == set(COMMANDS)
    for kind, (_, commands) in KINDS.items():
        assert {command for command, found in plan if found == kind} == set(commands)


def test_the_page_lists_all_trials() -> None:
    outcomes = [Outcome(n, "train", "SIGKILL", f"detail {n} a|b", ["signal 9", "done"], "recovered") for n in range(3)]
    text = page([{"kind": "SIGKILL", "trials": "3"}], outcomes, "skipped: full disk, because\n")
    assert text.count("| SIGKILL | train | detail") == 3 and "a\\|b" in text
    assert "skipped: full disk, because" in text and "*Silently wrong*" in text
