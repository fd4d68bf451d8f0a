"""What stands on the hub, in others' hands: three libraries score it alike, and an independent mirror serves it.

    python -m pytest tests/test_published.py

The mirror is olah; its requirements do not go with ours, so it has an environment of its own: `make check-mirror`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import run_command, run_stranger

OLAH = os.environ.get("POTSTILL_OLAH", shutil.which("olah-cli") or "olah-cli")
TEXTS = ["the old king was in the city and the queen found a book", "a young queen wrote", "a river " * 20]


@pytest.fixture(scope="module")
def published(run_folder: Path) -> Path:
    """The folder that would be uploaded."""
    run = run_command(
        str(run_folder), "me/tiny", "--license", "apache-2.0", "--dry-run", launcher=("-m", "distill.hub")
    )
    assert run.returncode == 0, run.stderr
    return run_folder / "hub"


SCORES = """
import json
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, *texts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
found = []
for text in texts:
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        found.append(-model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
print(json.dumps(found))
"""


def test_transformers_onnxruntime_and_the_harness_score_it_alike(published: Path, tmp_path: Path) -> None:
    """Log-likelihood of each text after the end-of-text token."""
    found = run_stranger(SCORES, str(published), *TEXTS, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    expected = json.loads(found.stdout.splitlines()[-1])

    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(published / "tokenizer.json"))
    session = runtime.InferenceSession(published / "model.onnx")
    layers, _, width = session.get_inputs()[1].shape
    state = np.zeros((layers, 1, width), np.float32)
    start = json.loads((published / "config.json").read_text())["eos_token_id"]
    for text, log_likelihood in zip(TEXTS, expected, strict=True):
        ids = [start, *tokenizer.encode(text).ids]
        logits = session.run(None, {"input_ids": np.array([ids[:-1]]), "h": state, "c": state})[0][0]
        log_q = torch.from_numpy(logits).log_softmax(-1)
        assert log_q[range(len(ids) - 1), ids[1:]].sum().item() == pytest.approx(log_likelihood, rel=1e-4)

    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=str(published), trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(TEXTS)]
    assert peer.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, rel=1e-4)


DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)
print(model(torch.tensor([[1, 2, 3]])).logits.double().flatten().tolist())
print(snapshot_download("me/tiny"))
"""


def test_an_independent_mirror_serves_it(published: Path, tmp_path: Path) -> None:
    if shutil.which(OLAH) is None or shutil.which("git") is None:
        pytest.skip("needs git and olah: make check-mirror")
    repository = tmp_path / "mirrors" / "models" / "me" / "tiny"
    shutil.copytree(published, repository)
    author = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    for words in (("init", "-q", "-b", "main"), ("add", "-A"), (*author, "commit", "-q", "-m", "student")):
        subprocess.run(["git", *words], cwd=repository, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path / "repos"}"\n'
        f'mirrors-path = ["{tmp_path / "mirrors"}"]\n[accessibility]\noffline = true\n'
    )
    server = subprocess.Popen([OLAH, "--config", "olah.toml"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urlopen(f"{address}/api/models/me/tiny/revision/main", timeout=5).read()
                break
            except URLError:
                time.sleep(0.5)
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        found = run_stranger(DOWNLOAD, cwd=tmp_path, HF_HUB_DISABLE_XET="1", **environment)
    finally:
        server.kill()
        server.wait()
    assert found.returncode == 0, found.stderr
    logits, downloaded = found.stdout.splitlines()[-2:]
    script = DOWNLOAD.split("print(snapshot")[0].replace('"me/tiny"', "sys.argv[1]")
    direct = run_stranger(script, str(published), cwd=tmp_path)
    assert direct.returncode == 0, direct.stderr
    assert json.loads(logits) == json.loads(direct.stdout.splitlines()[-1]), "bit for bit"
    files = {path.name for path in Path(downloaded).iterdir()}
    assert {"model.safetensors", "model.onnx", "tokenizer.json", "student.py", "README.md"} <= files
    for name in files:
        assert (Path(downloaded) / name).read_bytes() == (published / name).read_bytes()
