"""The ways to run a model that `eval.latency` measures side by side.

A runtime is one line of `RUNTIMES`: a name and a function that opens a model in it, or raises `Unavailable` with the
reason. What it opens is a `Session`, which reads prompts and then one token of each sequence at a time, greedily; so a
runtime that does something else inside (a graph, a server, another language) is measured with the same clock.

Legend: B sequences, T prompt tokens, L layers, H LSTM width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoConfig

from distill.config import UserError
from distill.decode import Decoder, find_student, load_decoder
from distill.packaged import PREFIX, resolve_package
from distill.sampling import Sampler
from distill.student import LSTMCache, LSTMConfig, State
from distill.teacher import LanguageModel, hardware_has_bf16, resolve_model
from eval.command import Subject
from eval.llama import VARIABLE, Ended, Llama, python_with_llama


class Unavailable(UserError):
    """A runtime cannot run here; the message says why and what would help."""


class Session(Protocol):
    """A loaded model with the state of some sequences."""

    longest_context: float  # tokens of a sequence, infinite for a recurrent model
    largest_batch: float
    vocab_size: int
    weight_bytes: int  # in memory, embedding included
    read_bytes: int  # weights that one step reads: all but the embedding, of which it reads B rows
    disk_bytes: int
    process: tuple[int, int] | None  # that which holds the model, where it is another: its id and its bytes without

    def start(self, ids_BT: np.ndarray) -> np.ndarray:
        """Forget everything, read prompts, and give the next token of each, (B,). Returns when it is known."""
        ...

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        """Read one token of each sequence and give the next, (B,)."""
        ...

    def state_bytes(self) -> int:
        """What the sequences' state takes now."""
        ...


class TorchSession:
    """Any causal model through its Hugging Face interface, eager; a student's step optionally compiled."""

    largest_batch: float = math.inf
    process: tuple[int, int] | None = None

    def __init__(self, subject: Subject, dtype: str, compiled: bool = False) -> None:
        if dtype == "bf16" and not hardware_has_bf16(Accelerator().device):
            raise Unavailable("this hardware has no bf16")
        self.model: LanguageModel = subject.load(dtype)
        self.network = cast(Any, self.model.model)
        self.longest_context, self.vocab_size = self.model.longest_window, self.model.vocab_size
        self.weight_bytes = self.model.weight_bytes
        embedding, output = self.network.get_input_embeddings().weight, self.network.get_output_embeddings().weight
        tied = embedding is output
        self.read_bytes = self.weight_bytes - (0 if tied else embedding.numel() * embedding.element_size())
        self.disk_bytes = disk_bytes(subject)
        self.state: Any = None
        self.advance: Callable[..., Any] = torch.compile(self._student_step) if compiled else self._any_step
        self.compiled = compiled

    def start(self, ids_BT: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            ids = torch.from_numpy(ids_BT).to(self.model.device)
            output = self.network(input_ids=ids, use_cache=True, logits_to_keep=1)
            self.state = output.past_key_values
            return self._chosen(output.logits[:, -1])

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tokens_B1 = torch.from_numpy(tokens_B).to(self.model.device)[:, None]
            if not self.compiled:
                return self._any_step(tokens_B1)
            logits_BV, state = self.advance(tokens_B1, *self.state.state)
            self.state = LSTMCache(*state)
            return self._chosen(logits_BV)

    def _any_step(self, tokens_B1: Tensor) -> np.ndarray:
        output = self.network(input_ids=tokens_B1, past_key_values=self.state, use_cache=True, logits_to_keep=1)
        self.state = output.past_key_values
        return self._chosen(output.logits[:, -1])

    def _student_step(self, tokens_B1: Tensor, *state: Tensor) -> tuple[Tensor, State]:
        """A pure function of tensors, which is what compiles."""
        cache = LSTMCache(*state)
        logits_BV = self.network(input_ids=tokens_B1, past_key_values=cache).logits[:, -1]
        return logits_BV, cache.state

    def _chosen(self, logits_BV: Tensor) -> np.ndarray:
        return logits_BV[:, : self.vocab_size].argmax(-1).cpu().numpy()  # .cpu() waits for the device

    def state_bytes(self) -> int:
        if isinstance(self.state, LSTMCache):
            return self.state.state_bytes
        tensors = [part for layer in self.state.layers for part in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class LlamaCppSession:
    """A GGUF file in llama.cpp, through llama-cpp-python in a process of its own; one sequence at a time."""

    largest_batch: float = 1

    def __init__(self, subject: Subject, threads: int, context: int) -> None:
        python = python_with_llama()
        if python is None:
            raise Unavailable(
                f"needs an extra: pip install 'potstill[llamacpp]' (builds from source), or in {VARIABLE} a Python "
                "that has it"
            )
        name = subject.config.model
        path = Path(resolve_package(name)) if name.startswith(PREFIX) else Path(name).expanduser()
        if path.suffix != ".gguf":
            raise Unavailable("the model is no GGUF file")
        try:
            # 0: as much room as the model was trained for
            self.llama = Llama(python, path, threads, context if context <= 4096 else 0)
        except Ended as end:
            raise Unavailable(str(end)) from None
        self.process: tuple[int, int] | None = (self.llama.pid, self.llama.bare_bytes)
        about = self.llama.metadata
        kind = about["general.architecture"]
        layers, heads, width = (
            int(about[f"{kind}.{key}"]) for key in ("block_count", "attention.head_count", "embedding_length")
        )
        kv_heads = int(about.get(f"{kind}.attention.head_count_kv", heads))  # left out where each head has its own
        self.token_bytes = 2 * 2 * layers * kv_heads * (width // heads)  # keys and values in fp16
        self.longest_context: float = min(self.llama.room, int(about[f"{kind}.context_length"]))
        self.vocab_size = self.llama.vocab_size
        self.disk_bytes = self.weight_bytes = self.read_bytes = path.stat().st_size

    def start(self, ids_BT: np.ndarray) -> np.ndarray:
        return self._read(ids_BT[0], afresh=True)

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        return self._read(tokens_B)

    def _read(self, tokens_T: np.ndarray, afresh: bool = False) -> np.ndarray:
        try:
            return np.array([self.llama.read(tokens_T.tolist(), afresh=afresh)])
        except Ended as end:
            raise Unavailable(str(end)) from None

    def state_bytes(self) -> int:
        return self.token_bytes * self.llama.tokens_read


class DecoderSession:
    """The student's quantised graph in onnxruntime (`distill/decode.py`), made beside it where it is missing."""

    largest_batch: float = math.inf
    longest_context: float = math.inf
    process: tuple[int, int] | None = None

    def __init__(self, subject: Subject, threads: int, context: int) -> None:
        try:
            folder = find_student(subject.config.model)
            self.decoder = load_decoder(folder, threads)
        except UserError as error:  # onnxruntime is an extra
            raise Unavailable(str(error)) from None
        self.vocab_size = self.decoder.vocab_size
        weights = load_file(folder / "decoder.safetensors")
        self.disk_bytes = self.weight_bytes = sum(value.nbytes for value in weights.values())
        self.read_bytes = decoder_step_bytes(self.decoder, weights)
        self.greedy = Sampler(temperature=0)

    def start(self, ids_BT: np.ndarray) -> np.ndarray:
        self.lanes = self.decoder.lanes(len(ids_BT))
        for tokens_B in ids_BT[:, :-1].T:
            self.lanes.read(tokens_B.tolist())
        return self.step(ids_BT[:, -1])

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        self.lanes.read(tokens_B.tolist())
        return np.array([self.lanes.choose(b, self.greedy) for b in range(len(tokens_B))])

    def state_bytes(self) -> int:
        return sum(part.nbytes for part in self.lanes.states[0])


def decoder_step_bytes(decoder: Decoder, weights: Mapping[str, Any]) -> int:
    """Bytes of weights that a step reads: body and preview whole, of embedding and head the rows in question."""
    blocks = decoder.shapes["block_Bn"][1]
    rows = {
        "embedding": 1, "embedding.scale": 1, "tokens": 1, "head": blocks, "head.scale": blocks, "head.bias": blocks
    }  # fmt: skip
    return sum(value[: rows.get(name, len(value))].nbytes for name, value in weights.items())


def disk_bytes(subject: Subject) -> int:
    """Bytes of the weights' files, 0 where they are not a local folder."""
    folder = Path(resolve_model(subject.config.model))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


# Opens a model with so many threads, for contexts up to so many tokens.
Opener = Callable[[Subject, int, int], Session]

RUNTIMES: dict[str, dict[str, Opener]] = {
    "transformer": {
        "transformers fp32": lambda subject, threads, context: TorchSession(subject, "fp32"),
        "transformers bf16": lambda subject, threads, context: TorchSession(subject, "bf16"),
        "llama.cpp": LlamaCppSession,
    },
    "student": {
        "PyTorch fp32": lambda subject, threads, context: TorchSession(subject, "fp32"),
        "PyTorch bf16": lambda subject, threads, context: TorchSession(subject, "bf16"),
        "compiled fp32": lambda subject, threads, context: TorchSession(subject, "fp32", compiled=True),
        "decoder int8": DecoderSession,
    },
}


def runtimes_of(subject: Subject) -> dict[str, Opener]:
    """The runtimes that a model may run in."""
    config = subject.config
    source = resolve_model(config.model, subject.role)
    try:
        found = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        ).model_type
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{subject.role} {config.model}: cannot be loaded: {reason}") from None
    return RUNTIMES["student" if found == LSTMConfig.model_type else "transformer"]
