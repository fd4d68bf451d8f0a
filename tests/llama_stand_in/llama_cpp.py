"""Stands in for llama-cpp-python: says the sum of all it has read, modulo 10, and in its metadata how it was opened."""

import json
import os
from typing import Any

__version__ = "0"


class Llama:
    def __init__(self, path: str, **given: Any) -> None:
        print("what llama.cpp says of itself")
        self.given, self.read, self.weights = given, [7], b"x" * 2**23
        self.metadata = {
            "general.architecture": "gpt2",
            "gpt2.block_count": "3",
            "gpt2.attention.head_count": "4",
            "gpt2.embedding_length": "32",
            "gpt2.context_length": "128",
            **json.loads(os.environ.get("STAND_IN_METADATA", "{}")),
            "opened": json.dumps({"path": path, **given}),
        }

    @property
    def n_tokens(self) -> int:
        return len(self.read)

    def n_ctx(self) -> int:
        return int(self.given["n_ctx"]) or 128

    def n_vocab(self) -> int:
        return 10

    def reset(self) -> None:
        self.read = []

    def eval(self, tokens: list[int]) -> None:
        if 9 in tokens:
            raise SystemExit("illegal instruction")
        self.read += tokens

    def sample(self, temp: float) -> int:
        assert temp == 0
        return sum(self.read) % 10
