"""Fast streaming decoding of a student on a CPU, for one sequence or a few.

    python -m distill.decode runs/quickstart --prompt "In 1969," --temperature 0.8
    python -m distill.decode runs/quickstart --prompt "In 1969," --json

The first use of a student writes its quantised decoder beside it (`distill/decoder.py`); from then on the process
holds numpy, onnxruntime and tokenizers, no torch. Memory does not grow with the text: the state is 2 * L * H
numbers a sequence (of a GRU, L * H), and the buffers below are all there is.

Why onnxruntime: of what is well kept it alone reads int8 and int4 weights at memory speed for a single token.
Measured on two cores (2.1 million weights of an LSTM's gates; 6.3 million of a preview; µs): its MatMulNBits 20
and 121 (int4: 75), its MatMulInteger 27 and 233, torch's fbgemm 25 and 186, oneDNN 42 and 196, torch's
`_weight_int8pack_mm` 55 and 221, `_weight_int4pack_mm` 50 and 149; a step is forty nodes at 1 to 2 µs each where
torch needs 5 to 10. Whole steps under torch.compile, AOTInductor and torchao take 2.7 times as long or more (`make
bench-runtimes`). Without onnxruntime, `--runtime torch` decodes with the student's own fp32 forward.

Legend: B sequences, V tokens (W: rounded up to whole blocks), n blocks of k tokens, L layers, H width.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.sampling import Sampler
from distill.session import open_session, refuse, release_freed_memory


def stream(
    decoder: Any, prompts: Sequence[Sequence[int]], new_tokens: int, sampler: Sampler, stop: Sequence[int] = ()
) -> Iterator[list[int | None]]:
    """Continue prompts of token ids together: one list a step with the next token of each, None after its end.

    `decoder` is a Decoder or a TorchDecoder. Raises UserError for a prompt without tokens or with one outside the
    vocabulary.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            refuse(f"prompt {number}: expected at least one token, found none; give some text")
        if min(prompt) < 0 or max(prompt) >= decoder.vocab_size:
            refuse(
                f"prompt {number}: expected tokens of 0 to {decoder.vocab_size - 1}, found {min(prompt)} to "
                f"{max(prompt)}; was it written by another tokenizer?"
            )
    lanes = decoder.lanes(len(prompts))
    for number, prompt in enumerate(prompts):  # read alone: prompts differ in length, and the state has no padding
        single = decoder.lanes(1)
        for token in prompt:
            single.read([token])
        lanes.take(number, single)
    running = [True] * len(prompts)
    for step in range(new_tokens):
        tokens = [lanes.choose(b, sampler) for b in range(len(prompts))]
        running = [alive and token not in stop for alive, token in zip(running, tokens, strict=True)]
        yield [token if alive else None for token, alive in zip(tokens, running, strict=True)]
        if not any(running) or step == new_tokens - 1:
            return
        lanes.read(tokens)


def after(name: str) -> str:
    """The output of the graph that is the next step's input of this name: h_next_LBH for h_LBH."""
    return name.replace("_", "_next_", 1)


class Decoder:
    """The quantised student."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.session = open_session(folder / "decoder.onnx", threads)
        release_freed_memory()
        self.tokens_V = _order(folder / "decoder.safetensors")
        self.place_V = self.tokens_V.argsort()
        self.vocab_size = len(self.tokens_V)
        self.state_names = [value.name for value in self.session.get_inputs() if value.name != "token_1B"]
        self.shapes = {value.name: value.shape for value in (*self.session.get_inputs(), *self.session.get_outputs())}

    def lanes(self, sequences: int) -> Lanes:
        """So many sequences side by side, from a zero state."""
        return Lanes(self, sequences)


class Lanes:
    """Buffers of B sequences, bound to the session once. The state goes to and fro between two pairs of them."""

    def __init__(self, decoder: Decoder, sequences: int) -> None:
        shapes = {
            name: [sequences if axis == "B" else axis for axis in shape] for name, shape in decoder.shapes.items()
        }
        self.session, self.tokens_V, self.place_V = decoder.session, decoder.tokens_V, decoder.place_V
        self.token_1B = np.zeros((1, sequences), np.int64)
        names = decoder.state_names
        self.states = [[np.zeros(shapes[name], np.float32) for name in names] for _ in range(2)]
        self.preview_BW = np.zeros(shapes["preview_BW"], np.float32)
        self.block_Bn = np.zeros(shapes["block_Bn"], np.int64)
        self.exact_Bnk = np.zeros(shapes["exact_Bnk"], np.float32)
        self.u_Bd = np.zeros(shapes["u_Bd"], np.float32)
        outputs = {name: getattr(self, name) for name in ("preview_BW", "block_Bn", "exact_Bnk", "u_Bd")}
        self.bindings = []
        for old, new in (self.states, self.states[::-1]):
            binding = self.session.io_binding()
            inputs = {"token_1B": self.token_1B, **dict(zip(names, old, strict=True))}
            for name, array in inputs.items():
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            for name, array in (*outputs.items(), *zip(map(after, names), new, strict=True)):
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self.bindings.append(binding)
        self.turn = 0

    def take(self, number: int, other: Lanes) -> None:
        """Let sequence `number` stand where the only one of `other` stands."""
        for mine, theirs in zip(self.states[self.turn], other.states[other.turn], strict=True):
            mine[:, number] = theirs[:, 0]
        for name in ("preview_BW", "block_Bn", "exact_Bnk", "u_Bd"):
            getattr(self, name)[number] = getattr(other, name)[0]

    def state(self) -> tuple[np.ndarray, ...]:
        """A copy to come back to."""
        return tuple(part.copy() for part in self.states[self.turn])

    def restore(self, state: tuple[np.ndarray, ...]) -> None:
        """Forget what was read since `state` was taken."""
        for mine, kept in zip(self.states[self.turn], state, strict=True):
            mine[:] = kept

    def read(self, tokens: Sequence[int]) -> None:
        """Read one token in each sequence."""
        self.token_1B[0] = tokens
        self.session.run_with_iobinding(self.bindings[self.turn])
        self.turn = 1 - self.turn

    def logits(self, number: int) -> np.ndarray:
        """logits_V of one sequence: exact where refined, else the preview."""
        return self._ordered_logits(number)[self.place_V]

    def _ordered_logits(self, number: int) -> np.ndarray:
        """The same in the order of `tokens_V`: a view that the next step overwrites."""
        preview_W = self.preview_BW[number]
        preview_W.reshape(-1, self.exact_Bnk.shape[2])[self.block_Bn[number]] = self.exact_Bnk[number]
        return preview_W[: len(self.tokens_V)]

    def choose(self, number: int, sampler: Sampler) -> int:
        """The next token of one sequence."""
        if not sampler.greedy:
            return int(self.tokens_V[sampler.choose(self._ordered_logits(number))])
        block, inside = divmod(int(self.exact_Bnk[number].argmax()), self.exact_Bnk.shape[2])
        place = int(self.block_Bn[number, block]) * self.exact_Bnk.shape[2] + inside
        return int(self.tokens_V[min(place, len(self.tokens_V) - 1)])


def _order(weights: Path) -> np.ndarray:
    """Token ids in the order that preview and head have them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), "numpy") as file:
            order: np.ndarray = file.get_tensor("tokens")
    except (OSError, SafetensorError) as error:
        refuse(f"{weights}: expected a decoder's weights: {error}; make them again with python -m distill.export")
    return order


def find_student(model: str) -> Path:
    """Folder of a student: given itself, as its run folder, or as a hub id that is downloaded."""
    folder = Path(model).expanduser()
    if not folder.exists() and model.count("/") == 1 and not model.startswith((".", "~", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(model))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            refuse(f"{model}: expected a folder or a hub id of a student: {reason}")
    if (folder / "student" / "config.json").is_file():
        folder = folder / "student"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        refuse(f"{model}: expected the folder of a student with its config.json: {error}")
    if kind != "potstill_lstm":
        refuse(f"{model}: expected a student (model_type potstill_lstm), found {kind}")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The student's tokenizer, as the library `tokenizers` has it."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        refuse(f"{folder}/tokenizer.json: expected the student's tokenizer: {error}")
    release_freed_memory()
    return tokenizer


def end_tokens(folder: Path) -> list[int]:
    """Tokens that end a text. The first is also the separator that every document began with in training."""
    eos = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def load_decoder(folder: Path, threads: int | None = None) -> Decoder:
    """A student's decoder, made first where there is none (by another process, so that torch stays out of this one)."""
    if not (folder / "decoder.onnx").is_file():
        print(f"making {folder}/decoder.onnx, once", file=sys.stderr)
        command = [sys.executable, "-m", "distill.export", str(folder), "--to", "decoder"]
        made = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if made.returncode:
            refuse(made.stderr.strip().rpartition("error: ")[2] or "distill.export failed")  # progress bars come first
    return Decoder(folder, threads)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a student's folder, a run folder, or a hub id")
    parser.add_argument("--prompt", action="append", help="text to continue; several make a batch (with --json)")
    parser.add_argument("--new-tokens", type=int, default=100, help="at most so many (100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens (0: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the fewest that reach this probability (1)"
    )
    parser.add_argument("--seed", type=int, help="for the same text again")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--runtime", choices=["onnx", "torch"], default="onnx", help="torch: the fp32 student itself")
    parser.add_argument("--json", action="store_true", help="one object at the end instead of the text")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except Exception as error:
        from distill.config import UserError  # see `refuse`

        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    sampler = Sampler(options.temperature, options.top_k, options.top_p, options.seed)
    folder = find_student(options.model)
    tokenizer, stop = load_tokenizer(folder), end_tokens(folder)
    texts = options.prompt or [sys.stdin.read()]
    if len(texts) > 1 and not options.json:
        refuse(f"--prompt: {len(texts)} prompts stream only into --json; give one of them")
    prompts = [[*stop[:1], *tokenizer.encode(text, add_special_tokens=False).ids] if text else [] for text in texts]
    if options.runtime == "torch":
        from distill.torch_decoder import TorchDecoder

        decoder: Any = TorchDecoder(folder, options.threads)
    else:
        decoder = load_decoder(folder, options.threads)
    began = time.perf_counter()
    steps = _shown(stream(decoder, prompts, options.new_tokens, sampler, stop), tokenizer, texts, options.json)
    seconds = time.perf_counter() - began
    rows = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    if options.json:
        written = [
            {"prompt": text, "text": tokenizer.decode(row), "tokens": row}
            for text, row in zip(texts, rows or [[]] * len(texts), strict=True)
        ]
        print(json.dumps({"completions": written, "seconds": seconds, "runtime": options.runtime}))


def _shown(
    written: Iterator[list[int | None]], tokenizer: Any, texts: Sequence[str], quiet: bool
) -> list[list[int | None]]:
    """Run the stream to its end; unless quiet, print the only sequence's text as it comes."""
    from tokenizers.decoders import DecodeStream

    pieces, steps = DecodeStream(), []
    if not quiet:
        print(texts[0], end="", flush=True)
    for tokens in written:
        steps.append(tokens)
        if not quiet and tokens[0] is not None:
            print(pieces.step(tokenizer, tokens[0]) or "", end="", flush=True)
    if not quiet:
        print()
    return steps


if __name__ == "__main__":
    sys.exit(main())
