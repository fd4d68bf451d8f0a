"""The benchmarks run from end to end on toy sizes, so that they cannot rot; what they measure here means nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import World, run_command
from test_student import make_student

from benchmarks import ablation, decode_stream, methods, quality, runtimes, scaling, train
from benchmarks.runs import RECIPES, run_tool
from distill.config import UserError
from distill.quantise import two_step_head
from distill.recipe import load_recipe

TINY = ("targets.k=8", "targets.samples=4")


def last_line(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


def test_bench_train_times_every_case_and_reports_its_ratios(world: World, tmp_path: Path) -> None:
    arguments = ["--recipe", str(world.recipe), "--repeats", "2", "--turn", "0", "--skip-trl", "--skip-memory", *TINY]
    found = run_command(*arguments, launcher=("-m", "benchmarks.train"), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    result = last_line(found.stdout)
    assert json.loads((tmp_path / "runs/bench/train.json").read_text()) == result
    rows = result["rows"]
    assert list(rows) == [case.name for case in train.cases()]
    for row in rows.values():
        assert row["turns"] == 2 and row["tokens_per_second"] == pytest.approx(64 / row["ms_per_step"] * 1000)
    ms = {name: row["ms_per_step"] for name, row in rows.items()}
    naive = min(
        value for name, value in ms.items() if name.startswith("naive, online: forward_kl") and "frozen" in name
    )
    control = ms["ours, no teacher: cross_entropy, trained head"]
    assert result["hidden_stage_vs_naive_online"] == pytest.approx(
        naive / ms["ours, cached hidden: hidden_mse, frozen head"]
    )
    assert result["online_vs_naive_online"] == pytest.approx(naive / ms["ours, online: forward_kl, frozen head"])
    assert result["cached_kl_step_vs_ce_step_by_kind"] == {
        kind: pytest.approx(ms[f"ours, cached {kind}: forward_kl, trained head"] / control)
        for kind in ("top_k", "sampled")
    }
    assert result["hidden_stage_vs_trl_gkd"] is None, "it was skipped"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_one_case_is_measured_in_a_process_of_its_own(world: World, tmp_path: Path) -> None:
    name = "ours, no teacher: cross_entropy, trained head"
    arguments = ["--recipe", str(world.recipe), "--peak-of", name, *TINY]
    found = run_command(*arguments, launcher=("-m", "benchmarks.train"), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert 100 < last_line(found.stdout)["peak_rss_mib"] < 2000


def test_a_missing_environment_of_trl_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Bench", lambda *_: SimpleNamespace(accelerator=None))
    monkeypatch.setattr(train, "leave", lambda _: None)
    options = SimpleNamespace(recipe="", overrides=[], peak_of=None, skip_trl=False)
    with pytest.raises(UserError, match="make bench-train, or --skip-trl"):
        train.benchmark(options)  # type: ignore[arg-type]


def test_bench_cache_reports_sizes_speed_and_fidelity(world: World, tmp_path: Path) -> None:
    arguments = ["--recipe", str(world.recipe), "--tokens", "640", "--repeats", "1", "--skip-students", *TINY]
    found = run_command(*arguments, launcher=("-m", "benchmarks.cache"), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    result = last_line(found.stdout)
    assert set(result["kinds"]) == {"hidden", "top_k", "sampled"}
    assert 0 < result["int8_kl_nats"] < 0.01
    assert result["build_share"] == min(row["of_bare_and_head"] for row in result["kinds"].values())
    assert result["kinds"]["hidden"]["bytes_per_token"] > 24 + 4


def test_bench_scaling_by_hand(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Medians of what each round says."""
    (tmp_path / "runs" / "bench").mkdir(parents=True)
    (tmp_path / "runs" / "bench" / "streaming.json").write_text('{"rss_growth_2gb": 0.05}', encoding="utf-8")
    speeds = {"one": [100.0, 90.0, 300.0], "two": [180.0, 60.0, 170.0], "apart": [190.0, 190.0, 190.0]}
    found = {"train": speeds, "cache": {**speeds, "two": [1.1 * speed for speed in speeds["two"]]}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "measure", lambda _: found)
    assert scaling.main(["--recipe", str(world.recipe)]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["rss_growth_2gb"] == 0.05
    assert result["train_efficiency_2"] == pytest.approx(60 / 180)
    assert result["cache_efficiency_2"] == pytest.approx(1.1 * 60 / 180)
    assert result["train_efficiency_apart"] == pytest.approx(190 / 200)
    assert result["train_efficiency_of_apart"] == pytest.approx(170 / 190)


def test_a_step_of_those_apart_waits_for_the_slower() -> None:
    """Three steps of ten tokens by each of two processes, one of which is slow once."""
    turns: list[list[str]] = [[], []]
    found = ({"tokens": 10, "seconds": [1.0, 1.0, 1.0]}, {"tokens": 10, "seconds": [0.5, 2.0, 0.5]})
    commands = [
        SimpleNamespace(begin=turn.append, end=lambda said=said: said) for turn, said in zip(turns, found, strict=True)
    ]
    assert scaling.take_turn(commands, "train") == pytest.approx(60 / 4)  # type: ignore[arg-type]
    assert turns == [["train"], ["train"]]


def test_processes_take_turns_for_real(world: World, tmp_path: Path) -> None:
    """Two processes train and build a cache, and do so again when told to; they end when nobody has a turn for them."""
    options = SimpleNamespace(recipe=str(world.recipe), overrides=[], steps=2, tokens=640)
    with scaling.Command(options, tmp_path, 2) as command:  # type: ignore[arg-type]
        for part in ("train", "cache", "train", "cache"):
            command.begin(part)
            found = command.end()
            assert len(found["seconds"]) == (2 if part == "train" else 1) and min(found["seconds"]) > 0
        assert found["tokens"] == 2 * 640
        command.process.stdin.close()  # type: ignore[union-attr]
        assert command.process.wait(60) == 0
    for number in range(2):
        built = json.loads((tmp_path / f"built-2-{number}" / "targets.json").read_text(encoding="utf-8"))["shards"]
        assert sum(shard["blocks"] for shard in built.values()) == 2 * 640 / 8, "as much for each process"


def test_a_process_that_fails_is_quoted(world: World, tmp_path: Path) -> None:
    options = SimpleNamespace(recipe=str(world.recipe), overrides=["no.such=1"], steps=2, tokens=640)
    with (
        pytest.raises(UserError, match=r"(?s)exit code 2.*no: unknown key"),
        scaling.Command(options, tmp_path, 0) as command,  # type: ignore[arg-type]
    ):
        command.begin("train")
        command.end()


def points(*losses: float) -> list[dict]:
    """A curve with a validation every ten seconds and hundred tokens."""
    return [
        {"stage": 0, "seconds": 10.0 * n, "tokens": 100 * n, "nll_nats": loss, "kl_to_teacher_nats": loss - 2}
        for n, loss in enumerate(losses, 1)
    ]


def test_bench_quality_by_hand(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours is at the control's best loss (5 after 40 s) after 15 s, and closes half of its distance to the teacher."""
    curves = {"ours": points(6, 4, 3.5, 3.5), "sampled": points(8, 6, 5, 4.5), "kl": points(8, 7, 6, 5.5)}

    def fake(benchmark: str, name: str, recipe: str, overrides: list[str]) -> dict:
        result = {"curves": {"student": curves[name.split("-")[-1]], "control": points(9, 7, 6, 5)}}
        return {**result, "student": {"train_seconds": 40.0, "teacher_seconds": 4.0}, "teacher": {"nll_nats": 2.0}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "run_recipe", fake)
    assert quality.main(["--recipe", str(world.recipe), "--seeds", "0", "1", "--long", "0"]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["wall_time_ratio_to_control_loss"] == pytest.approx(15 / 40)
    assert result["gap_closed"] == pytest.approx(0.5)
    assert result["short"]["control, sampled"]["wall_time_ratio"] == pytest.approx(30 / 40)
    assert result["short"]["KL, random weights"]["wall_time_ratio"] is None
    assert (tmp_path / "runs/bench/quality.png").is_file()


def test_bench_ablation_by_hand(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal tokens are the fewest of any variant; a loss between two validations is interpolated."""

    def fake(benchmark: str, name: str, recipe: str, overrides: list[str]) -> dict:
        load_recipe(recipe, [f"run.name={name}", *overrides])  # as the run would
        curve = points(6, 5) if name == "variant-0" else points(6, 5, 4, 3)
        student = {"bits_per_byte": curve[-1]["nll_nats"] / 3, "nll_nats": curve[-1]["nll_nats"], "parameters": 1000}
        return {"curves": {"student": curve}, "student": student, "teacher": {"bits_per_byte": 0.9}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "run_recipe", fake)
    assert ablation.main(["--recipe", str(world.recipe)]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["equal_tokens"] == 200 and len(result["rows"]) == len(ablation.VARIANTS)
    assert ablation.main(["--recipe", "no-such.yaml"]) == 2
    assert result["rows"][1]["bits_per_byte"] == pytest.approx(1.0)
    assert result["rows"][1]["bits_per_byte_at_equal_tokens"] == pytest.approx(5 / 3)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_a_recipe(name: str) -> None:
    """Of the length that was asked for; what reads no cache builds none."""
    method = methods.METHODS[name]
    recipe = load_recipe(str(RECIPES / "frontier.yaml"), method.overrides(2.0, cached=True))
    assert sum(stage.length.minutes or 0 for stage in recipe.stages) == pytest.approx(2.0)
    assert recipe.targets.cache == (any(stage.needs_teacher for stage in recipe.stages) and not method.live)


def test_bench_methods_by_hand(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal wall time: half a minute of cache and a quarter of writing. Medians are over seeds, best's figures its
    distance to its own teacher; what has no KL has a dash."""
    lengths: dict[str, float] = {}

    def fake(benchmark: str, name: str, recipe: str, overrides: list[str]) -> dict:
        seed = 0 if name == "best" else int(name[-1])
        student = {"nll_nats": 5.0 + seed**2, "tokens_trained": 600, "train_seconds": 60.0, "teacher_seconds": 15.0}
        made = load_recipe(recipe, overrides)
        lengths[name] = sum(stage.length.minutes or 0 for stage in made.stages)
        teacher = {"nll_nats": 2.5 if name == "best" else 3.0, "bits_per_byte": 1.0}
        wall = {"a": 60.0, "targets": 3.0}  # built before, in 30 s
        return {
            "teacher": teacher, "student": {**student, "parameters": 7}, "wall_seconds": wall,
            "targets": {"seconds": 30.0},
        }  # fmt: skip

    def tool(module: str, recipe: str, overrides: list[str]) -> dict:
        assert load_recipe(recipe, overrides).targets.cache == (module == "distill.cache")
        return {"seconds": {"distill.cache": 30.0, "distill.write": 15.0}[module]}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "run_recipe", fake)
    monkeypatch.setattr(methods, "run_tool", tool)
    monkeypatch.setattr(methods, "BEST", RECIPES / "frontier.yaml")
    chosen = ["--only", "GRU", "KL alone", "live", "written by"]
    assert methods.main(["--seeds", "3", "--minutes", "1", *chosen]) == 0
    output = capsys.readouterr().out
    result = last_line(output)
    assert {"forward KL alone", "GRU", "recipes/best.yaml"} < set(result["medians"])
    assert result["medians"]["GRU"]["nll_nats"] == 6.0 and result["medians"]["GRU"]["tokens_per_second"] == 10
    assert result["best.nll_gap_to_teacher_nats"] == 2.5 and result["best.parameters"] == 7
    assert result["best.wall_minutes"] == 1.5
    assert "25%, 0%" in output and "–" in output and "6.000 ± 2.000" in " ".join(output.split())
    assert lengths["GRU-1-2"] == pytest.approx(1.0) and lengths["forward-KL--live-teacher-1-0"] == pytest.approx(1.5)
    assert lengths["text-written-by-the-teacher-beside--cross-entropy-1-0"] == pytest.approx(1.25)

    assert methods.main(["--total", "8", "--skip-best", *chosen]) == 0
    runs, longer = 5, 3  # two with a live teacher, and one that reads no targets
    names = [name for name in lengths if name.startswith("GRU") and not name.startswith("GRU-1-")]
    assert lengths[names[0]] == pytest.approx((8 - 0.5 * (1 + longer)) / runs - methods.OVERHEAD_MINUTES, abs=0.006)
    assert methods.main(["--total", "68", *chosen]) == 0, "recipes/best.yaml takes an hour of it"
    assert methods.main(["--total", "60", *chosen]) == 2
    assert "--total: expected at least" in capsys.readouterr().err

    assert methods.main(["--only", "best"]) == 0
    assert set(last_line(capsys.readouterr().out)["medians"]) == {"recipes/best.yaml"}
    assert methods.main(["--only", "guesswork"]) == 2
    assert "--only: expected best, or words of random weights, cross-entropy" in capsys.readouterr().err


def test_a_benchmark_reads_what_a_command_prints(world: World, tmp_path: Path) -> None:
    words = ["targets.max_tokens=640", f"targets.cache_dir={tmp_path / 'targets'}"]
    found = run_tool("distill.cache", str(world.recipe), words)
    assert found["tokens"] == 640 and found["seconds"] > 0 and found["folder"] == str(tmp_path / "targets")
    with pytest.raises(UserError, match="distill.write .*: failed"):
        run_tool("distill.write", str(world.recipe), [])


@pytest.mark.parametrize("head", ["whole", "two steps"])
def test_bench_runtimes_compares_the_same_step(head: str) -> None:
    """As it is written out for compilers, against the student. 512 tokens: all of them are refined."""
    student = make_student(vocab_size=512, dtype=torch.float32)
    z_Nd = student.model(torch.arange(512)[None]).last_hidden_state[0].detach()
    two_steps = runtimes.TwoSteps(*two_step_head(student.lm_head.weight.detach(), z_Nd, 3))
    step = runtimes.Step(student, runtimes.WholeHead(student) if head == "whole" else two_steps)
    text, written = runtimes.start(student.config, torch.float32), [0]
    with torch.no_grad():
        for _ in range(40):
            text = step(*text)
            written.append(int(text[0]))
        expected = student(torch.tensor([written[:-1]])).logits[0].argmax(-1).tolist()
    assert written[1:] == expected and len(set(written)) > 5


def test_bench_runtimes(tmp_path: Path) -> None:
    arguments = (
        "--vocab-size",
        "1024",
        "--hidden-size",
        "32",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--only",
        "onnx",
        "eager",
    )
    found = run_command(*arguments, launcher=("-m", "benchmarks.runtimes"), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    rows = last_line(found.stdout)["rows"]
    assert len(rows) == 6 and all(row["us"] > 0 for row in rows.values())


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is read from /proc")
def test_bench_streaming_reads_texts_and_caches(tmp_path: Path) -> None:
    arguments = ("--megabytes", "4", "5", "--shards", "20")
    found = run_command(*arguments, launcher=("-m", "benchmarks.streaming"), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    result = last_line(found.stdout)
    streamed, stored = (result["readings"][way] for way in ("streamed", "stored"))
    for one, other in zip(streamed, stored, strict=True):
        assert 0 <= one["tokens"] - other["tokens"] < 16 * 128 and one["peak_rss_mib"] > one["rss_at_start_mib"]
    assert streamed[1]["tokens"] > 1.2 * streamed[0]["tokens"]
    growth = streamed[1]["peak_rss_mib"] / streamed[0]["peak_rss_mib"] - 1
    assert result["rss_growth"]["streamed"] == pytest.approx(growth)
    assert result["rss_growth_2gb"] is None, "so little text says nothing about so much"
    assert result["caches"][0]["shards"] == 20 and result["caches"][0]["read_seconds"] > 0
    assert (tmp_path / "runs/bench/streaming.png").is_file()


def test_late_tokens_are_timed_beside_early_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder with a planted sleep that is longer from token 20 on."""

    def slow(decoder: object, prompts: object, new_tokens: int, sampler: object) -> Iterator[list[int]]:
        for number in range(new_tokens):
            time.sleep(0.002 if number < 20 else 0.008)
            yield [number]

    for name, value in {"stream": slow, "EARLY": 3, "LATE": 20, "TURN": 5, "TURNS": 2}.items():
        monkeypatch.setattr(decode_stream, name, value)
    unused: Any = None
    found = decode_stream.early_and_late(unused, [0])
    assert 2000 <= found["early_us"] < 5000 and 8000 <= found["late_us"] < 20000
