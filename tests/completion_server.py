"""An inference server on the loopback interface, with a tiny model behind it and faults on demand.

    with CompletionServer(folder) as server:
        server.faults += [Fault(status=429, retry_after="1"), Fault(cut=True)]
        recipe = {"url": server.address, "model": "big", ...}

It answers as vLLM (`prompt_logprobs`), SGLang (`/generate`) and llama-cpp-python (`echo`, text), the last with its
two manners: special tokens have no text, and without a start token of the server's own, place i of an answer holds
what comes after token i (`shifted`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Fault:
    """What goes wrong with one request: a status, a connection cut in the middle of the answer, or no answer."""

    status: int = 0
    retry_after: str | None = None
    cut: bool = False
    hang: float = 0.0
    body: bytes = b"a fault on demand"


@dataclass
class CompletionServer:
    """The server; `requests` are the times at which completions were asked for."""

    folder: Path
    shifted: bool = True
    key: str | None = None
    limit: int = 4096
    change: int = 0  # added to the ids that SGLang's answer says it has read
    faults: list[Fault] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    stop_after: int | None = None  # requests, after which the server dies
    port: int = 0

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.lock = threading.Lock()
        self.open: set[socket.socket] = set()

    def __enter__(self) -> CompletionServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        bound = type("Bound", (Handler,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), bound)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """As when the process is killed: connections break in whatever state they are."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------ what the model says

    def piece(self, token: int) -> str:
        """The text of a token as llama.cpp shows it."""
        return "" if token in self.tokenizer.all_special_ids else f" {self.tokenizer.decode([token])}"

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """(N, V): row i after token i."""
        with self.lock, torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, :, : len(self.tokenizer)]
            return torch.log_softmax(logits, -1)

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            assert isinstance(prompt, list)
            after, places = self.logprobs(prompt), [None]
            for token, row in zip(prompt[1:], after[:-1], strict=True):
                chosen = [*row.topk(body["prompt_logprobs"]).indices.tolist(), token]
                entries = {
                    str(i): {"logprob": row[i].item(), "decoded_token": self.tokenizer.decode([i])} for i in chosen
                }
                places.append(entries)
            return {"choices": [{"text": "x", "prompt_logprobs": places}]}
        assert isinstance(prompt, str)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        after = self.logprobs(ids)
        generated = int(after[-1].argmax())
        if body["echo"]:
            tokens = [*ids, generated]
            rows = [*after] if self.shifted else [after[0], *after]
        else:
            tokens, rows = [generated], [after[-1]]
        top: list[dict[str, float] | None] = []
        for token, row in zip(tokens, rows, strict=False):
            best = row.topk(body["logprobs"]).indices.tolist()
            top.append({self.piece(i): row[i].item() for i in [*best, token]})
        if body["echo"]:
            top[0] = None
        return {"choices": [{"logprobs": {"tokens": [self.piece(token) for token in tokens], "top_logprobs": top}}]}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, k = body["input_ids"], body["top_logprobs_num"]
        after = self.logprobs(ids)
        tops = [None, *([[row[i].item(), i, None] for i in row.topk(k).indices.tolist()] for row in after[:-1])]
        texts = [self.tokenizer.decode([token]) if body.get("return_text_in_logprobs") else None for token in ids]
        read = [[None, token + self.change, text] for token, text in zip(ids, texts, strict=True)]
        return {"text": "x", "meta_info": {"input_token_logprobs": read, "input_top_logprobs": tops}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: CompletionServer

    def setup(self) -> None:
        super().setup()
        self.owner.open.add(self.connection)

    def finish(self) -> None:
        self.owner.open.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "big", "max_model_len": self.owner.limit}]})

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.requests.append(time.monotonic())
        if owner.key and self.headers.get("Authorization") != f"Bearer {owner.key}":
            return self.answer(401, {"error": f"wrong key {self.headers.get('Authorization')}"})
        if owner.stop_after is not None and len(owner.requests) > owner.stop_after:
            owner.stop_after = None
            threading.Thread(target=self.die).start()
            return time.sleep(1)
        fault = owner.faults.pop(0) if owner.faults else None
        if fault and fault.hang:
            return time.sleep(fault.hang)
        if fault and fault.status:
            return self.answer(fault.status, fault.body, fault.retry_after)
        answer = owner.generate(body) if self.path == "/generate" else owner.completions(body)
        self.answer(200, answer, cut=bool(fault and fault.cut))

    def die(self) -> None:
        """The server is killed, and started again a little later."""
        self.owner.stop()
        time.sleep(1.5)
        self.owner.start()

    def answer(self, status: int, content: object, retry_after: str | None = None, cut: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            if retry_after:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True
