"""eval.report: the frontier by hand, the files against one another, and the page in a real headless Chromium.

    python -m pytest tests/test_report.py

POTSTILL_SCREENSHOTS=FOLDER keeps the screenshots, to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_eval

from distill.checkpoint import write_json
from distill.config import UserError
from distill.sealed import seal
from distill.teacher import hardware_has_bf16
from eval.classifiers import AXES as CLASSIFIER_AXES
from eval.command import make_subjects, read_results
from eval.gather import AXES, ROLES, common_prefix, gather, mark_dominated, sentence
from eval.report import main, model_rows, page, table_rows, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def point(role: str, speed: float, loss: float, **more: Any) -> dict[str, Any]:
    name = f"{role}, at {speed:.0f}"
    size = {"parameters": 24e6, "weight_bytes": 1e8, "perplexity": 50.0, "word_perplexity": 90.0}
    agreement = {"kl_to_teacher_nats": 1.0, "top1_agreement": 0.5, "quality_measured_in": "float32"}
    return {"name": name, "model": role, "role": role, "runtime": "eager", "tokens_per_second": speed,
            "bits_per_byte": loss, "agreement_measured_in": "float32", **size, **agreement, **more}  # fmt: skip


def test_dominated_points() -> None:
    points = [point("a", 10, 1.0), point("b", 20, 1.0), point("c", 20, 2.0), point("d", 30, 3.0), point("e", 30, 3.0)]
    mark_dominated(points, AXES)
    assert [p["dominated"] for p in points] == [True, False, True, False, False]
    accuracies = [{"texts_per_second": speed, "accuracy": found} for speed, found in ((10, 0.8), (20, 0.8), (30, 0.7))]
    mark_dominated(accuracies, CLASSIFIER_AXES)
    assert [p["dominated"] for p in accuracies] == [True, False, False], "more is better"


def test_the_sentence_says_what_the_numbers_say() -> None:
    points = [point("teacher", 20, 0.9), point("teacher", 100, 0.9), point("student", 90, 1.1)]
    points += [point("student", 500, 1.5, overlap=0.42), point("student", 700, 1.51, overlap=0.42)]
    points += [point("student", 900, 1.6, overlap=0.4) | {"model": "small"}]
    said = sentence(points)
    for part in ("24 M student", "at 700", "42% of the teacher's probability mass", "7.0 times", "1.51 bits", "0.90"):
        assert part in said
    assert said.endswith("The fastest, 24 M (student, at 900), reaches 9.0 times the speed at 1.60 bits a byte.")
    assert "mass at" in said and "mass (measured in int8) at" in sentence(
        [p | {"agreement_measured_in": "int8"} for p in points]
    )
    assert "The fastest" not in sentence(points[:5])
    assert "No student is faster" in sentence(points[:3])
    assert "--measure" in sentence(points[2:]) and "--measure" in sentence(points[:2]), "one side has no speed"


def test_common_prefix() -> None:
    assert common_prefix(["frontier-256", "frontier-2048", "frontier-512"]) == "frontier-"
    assert common_prefix(["quickstart"]) == common_prefix(["tiny", "twin"]) == ""


@pytest.fixture(scope="module")
def report_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run measured by the commands themselves, at toy sizes, and its report beside a copy of the run."""
    twin = run_folder.parent / "twin"
    shutil.copytree(run_folder, twin, dirs_exist_ok=True)
    runs = [str(run_folder), str(twin)]
    sizes = {
        "perplexity": (),
        "agreement": (),
        "memory": ("--contexts", "1", "2", "4", "8", "--targets", "64", "--probes", "4"),
        "generate": ("--texts", "4", "--prompt-tokens", "4", "--new-tokens", "8"),
        "harness": ("--tasks", str(Path(__file__).parent / "last_word" / "last_word.yaml"), "--limit", "4"),
        "latency": (
            *("--contexts", "4", "64", "300", "--batches", "1", "2", "--repeats", "1"),
            *(
                "--new-tokens",
                "4",
                "--runtimes",
                "transformers fp32",
                "PyTorch fp32",
                "PyTorch bf16",
                "decoder int8",
                "llama.cpp",
            ),
        ),
    }
    folder = tmp_path_factory.mktemp("report") / "report"
    with pytest.MonkeyPatch.context() as patch:
        probed = {"resident_bytes": 2**20, "load_seconds": 0.5}
        patch.setattr("eval.latency.probe_all", lambda wanted, threads: [probed] * len(wanted))
        for protocol, arguments in sizes.items():
            run = run_eval(protocol, *runs, *arguments)
            assert run.returncode == 0, run.stderr
        run = run_eval("report", *runs, "--output", str(folder), "--measure")
        assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def page_folder(report_folder: Path) -> Path:
    """The same report with recall filled in, for which the toy vocabulary has no words."""
    report = data_of(report_folder)
    assert all(line["name"] == line["number"] == [] for line in report["recall"])
    for line in report["recall"]:
        line["name"] = [{"distance": distance, "accuracy": 1 / (1 + distance)} for distance in (0, 8, 32)]
    folder = report_folder.with_name("page")
    write_report(report, folder, "<Title> & more")
    return folder


def data_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_files_agree(report_folder: Path, run_folder: Path) -> None:
    report, rows = data_of(report_folder), table_rows(data_of(report_folder))
    names = [point["name"] for point in report["points"]]
    assert "teacher, transformers fp32" in names and "tiny student, PyTorch fp32" in names
    assert sum(name.startswith("teacher") for name in names) == 1, "runs of one teacher share it"
    assert any(name.startswith("twin control") for name in names)
    tables = (report_folder / "table.md").read_text(encoding="utf-8").split("\n\n")
    for table, expected in zip(tables, (rows, model_rows(report)), strict=True):
        for line, row in zip(table.splitlines()[2:], expected, strict=True):
            assert [cell.strip() for cell in line.strip("|").split("|")] == list(row.values())
    measures = {"perplexity": "float32", "perplexity-int8": "int8"}
    if hardware_has_bf16(torch.device("cpu")):
        measures["perplexity-bf16"] = "bfloat16"
    for file, dtype in measures.items():
        (measured,) = read_results(run_folder, file)["models"]["student"].values()
        (found,) = (p for p in report["points"] if p["model"] == "tiny student" and p["quality_measured_in"] == dtype)
        assert found["bits_per_byte"] == measured["bits_per_byte"], "each precision has a quality of its own"
        followed = read_results(run_folder, file.replace("perplexity", "agreement"))["models"]["student"]
        assert followed["dtype"] == found["agreement_measured_in"] == dtype
        for name in ("overlap", "kl_to_teacher_nats", "top1_agreement"):
            assert found[name] == followed[name], "and follows the teacher in its own way"
    for picture in ("frontier.png", "contexts.png"):
        assert (report_folder / picture).stat().st_size > 10_000
    missing = [note for note in report["notes"] if note.startswith("Not measured: ")]
    assert [note for note in report["notes"] if note not in missing] == [
        "teacher, transformers fp32: no time at 300 tokens, beyond its limit of 256 tokens."
    ]
    unavailable = read_results(run_folder, "latency")["settings"]["not_available"]
    said = {f"Not measured: {name}: {why.rstrip('.')}." for name, why in unavailable.items()}
    assert said and said <= set(missing)
    assert report["latency_by_context"][0]["left_out"] == [300], "beyond the teacher's limit, marked"


def test_models_have_what_no_runtime_changes(report_folder: Path, run_folder: Path) -> None:
    report = data_of(report_folder)
    rows = {row["model"]: row for row in model_rows(report)}
    assert list(rows) == ["teacher", "tiny student", "tiny control", "twin student", "twin control"]
    agreement, memory, text, task = (
        read_results(run_folder, name)["models"]["student"] for name in ("agreement", "memory", "generate", "harness")
    )
    row = rows["tiny student"]
    assert row["calibration error"] == f"{agreement['calibration']['expected_calibration_error']:.3f}"
    assert rows["teacher"]["calibration error"] == (
        f"{agreement['teacher_calibration']['expected_calibration_error']:.3f}"
    )
    assert row["effective context"] == f"{memory['context']['effective_context_tokens']} of 8"
    assert row["distinct-2"] == f"{text['distinct_2']:.3f}"
    assert row["last_word acc"] == f"{task['last_word']['acc']:.3g}"
    (case,) = (
        case
        for case in read_results(run_folder, "latency")["models"]["student"]["runtimes"]["PyTorch fp32"]["cases"]
        if (case["batch"], case["context"]) == (1, 64)
    )
    shown = table_rows(report)[[point["name"] for point in report["points"]].index("tiny student, PyTorch fp32")]
    assert shown["prefill tok/s"] == f"{case['prompt_tokens_per_second']:,.0f}" and shown["context"] == "64"
    assert shown["on disk MiB"] != "–" and shown["at batch 2"] != "–"


def test_what_does_not_compare_is_refused(run_folder: Path, report_folder: Path, tmp_path: Path) -> None:
    """Figures of other texts or settings would stand on one axis."""
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    assert gather([run_folder, other])["points"]

    def changed(protocol: str, change: Callable[[dict[str, Any]], None], message: str) -> None:
        file = other / "eval" / f"{protocol}.json"
        before = file.read_text(encoding="utf-8")
        content = json.loads(before)
        change(content)
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            gather([run_folder, other])
        file.write_text(before, encoding="utf-8")

    label = next(iter(read_results(run_folder, "perplexity")["settings"]["corpora"]))
    changed("perplexity", lambda c: c["settings"]["corpora"][label].update(window=9),
            r"tiny \(agreement\) and other \(perplexity\) do not compare: window 512 and 9. .*in one call: "
            rf"python -m eval.perplexity {run_folder} {other}")  # fmt: skip
    changed("agreement", lambda c: c["models"]["student"].update(documents=3), r"documents \d+ and 3")
    changed("perplexity-int8", lambda c: c["settings"]["corpora"][label].update(split="test"), "int8.* split 'valid")
    changed("memory", lambda c: c["settings"].update(contexts=[1]), "the memories of tiny and other do not compare")
    changed("latency", lambda c: c["settings"].update(threads=99), "the speeds of .*: threads .* and 99.*eval.latency")
    changed("latency", lambda c: c["machine"].update(cpu="abacus"), "machine .* and 'abacus'")
    # Of several texts, that of the others counts.
    file = other / "eval" / "perplexity.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    wrong = {**content["settings"]["corpora"][label], "split": "test"}
    content["settings"]["corpora"] = {"first": wrong, **content["settings"]["corpora"]}
    for rows in content["models"].values():
        rows["first"] = {**rows[label], "bits_per_byte": 99.0}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert all(p["bits_per_byte"] < 99 for p in gather([run_folder, other])["points"])


def test_runs_of_one_name_keep_apart(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "elsewhere" / run_folder.name
    shutil.copytree(run_folder, copy)
    models = {point["model"] for point in gather([run_folder, copy, run_folder])["points"]}
    assert models == {"teacher", *(f"{where}/tiny {role}" for where in ("out", "elsewhere") for role in ROLES[1:])}
    assert {subject.label for subject in make_subjects([str(run_folder), str(copy)])} == models
    monkeypatch.chdir(copy)
    assert [subject.label for subject in make_subjects([".", str(copy)])] == ["teacher", "tiny student", "tiny control"]


def test_a_run_without_results_is_named(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="expected a finished run with its result.json"):
        gather([tmp_path])
    assert main([str(tmp_path), "--output", str(tmp_path / "report")]) == 2
    bare = tmp_path / "bare"
    shutil.copytree(run_folder, bare, ignore=shutil.ignore_patterns("eval"))
    report = gather([bare])
    assert [p["runtime"] for p in report["points"]] == ["generate"] * 3, "what the run itself has measured"
    other = tmp_path / "other"
    shutil.copytree(bare, other)
    result = json.loads((other / "result.json").read_text(encoding="utf-8"))
    result["teacher"]["model"] = "somebody/else"
    write_json(other / "result.json", seal(result))
    with pytest.raises(UserError, match="runs of one teacher, found .*somebody/else"):
        gather([bare, other])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"potstill\[report\]"):
        page(report, "title")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as playwright:
        if CHROMIUM is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs a Chromium: apt-get install chromium, or playwright install chromium")
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


VIEWS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1200, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "is_mobile": True},
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_in_a_browser(browser: Any, page_folder: Path, view: str) -> None:
    report = data_of(page_folder)
    context = browser.new_context(**VIEWS[view], offline=True)
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    tab.goto((page_folder / "index.html").as_uri())
    tab.wait_for_selector("#recall .plot-container", timeout=10_000)
    assert tab.title() == tab.inner_text("h1") == "<Title> & more"
    assert tab.inner_text("#sentence") == report["sentence"]
    # Points as the chart has them, and rows as the table has them, against the JSON.
    drawn = tab.evaluate(
        "document.getElementById('frontier').data.filter(t => t.marker && t.x[0] !== null)"
        ".flatMap(t => t.x.map((x, n) => [x, t.y[n], t.marker.opacity[n]]))"
    )
    expected = [[p["tokens_per_second"], p["bits_per_byte"], 0.3 if p["dominated"] else 1] for p in report["points"]]
    assert sorted(drawn) == sorted(expected)
    assert tab.locator("#frontier .point").count() == len(expected)
    cells = tab.evaluate("[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert cells == [list(row.values()) for row in (*table_rows(report), *model_rows(report))]
    for chart in ("curves", "latency", "context", "recall"):
        assert tab.locator(f"#{chart} .scatterlayer .trace").count() > 0, chart
    # No text outside, nothing wider than the window.
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    ink, paper = (tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = {name: sum(map(int, value[4:-1].split(","))) for name, value in (("ink", ink), ("paper", paper))}
    assert (brightness["ink"] > brightness["paper"]) == (view == "dark")
    if view == "light":
        tab.locator("#frontier .point").first.scroll_into_view_if_needed()
        tab.locator("#frontier .point").first.hover(force=True)
        tab.wait_for_selector("#frontier .hovertext")
        assert "bits a byte" in tab.locator("#frontier .hovertext").first.text_content()
        tab.mouse.move(0, 0)
    _keep(tab, view)
    if view == "dark":
        tab.emulate_media(media="print", color_scheme="dark")
        tab.wait_for_timeout(300)
        assert tab.evaluate("document.getElementById('frontier').layout.font.color") == "#000000", "paper is white"
        _keep(tab, "print")
        _check_print(tab, page_folder)
    assert not problems
    context.close()


def _check_print(tab: Any, folder: Path) -> None:
    """As PDF, which lays the page out on paper: nothing is cut off at the side of a sheet."""
    pdf = folder / "page.pdf"
    tab.pdf(path=pdf, prefer_css_page_size=True, print_background=True)
    pages = pdf.read_bytes().count(b"/Type /Page\n")
    assert 2 <= pages <= 6, pages
    tab.set_viewport_size({"width": 1016, "height": 700})  # the inside of a sheet of A4, lying
    tab.wait_for_timeout(300)
    # The sheet may be narrower than the window that a chart was drawn for: it is scaled, as it says how large it is.
    assert tab.evaluate("[...document.querySelectorAll('.main-svg')].every(svg => svg.hasAttribute('viewBox'))")
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert tab.evaluate(wide) == 0, "paper does not scroll"
    if kept := os.environ.get("POTSTILL_SCREENSHOTS"):
        shutil.copy(pdf, kept)


def _keep(tab: Any, name: str) -> None:
    if folder := os.environ.get("POTSTILL_SCREENSHOTS"):
        tab.screenshot(path=f"{folder}/{name}.png", full_page=True)
