"""The teacher: a frozen pretrained causal model, and what it says about a block.

The model is loaded from the hub, a folder, a GGUF file or a file inside an installed package. Its logits
are taken apart as head(final hidden state), which holds for nearly every architecture and is verified at
loading time on a few tokens; from then on a teacher hands out d numbers a token, and whoever needs
logits runs the head over as few rows as it likes.

Legend: B sequences, W window (left context + block), T block, V vocabulary, d width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill.checkpoint import write_atomically
from distill.config import OtherTeacherConfig, UserError
from distill.corpus import BlockBatch, cache_root
from distill.packaged import resolve_package
from distill.sealed import damage, write_checksums
from distill.session import sha256
from distill.sharding import (
    Engine,
    Lockstep,
    count,
    each_parameter,
    head_in_place,
    requested_engine,
    whole,
    whole_shape,
)
from distill.signals import Encoding, Head, HiddenSignal, Signal
from distill.student import LSTMForCausalLM  # its import makes the Auto classes know the student's folders

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = "set corpus.reset_at_documents=false or another teacher.attn_implementation"
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_PADDING_ROWS = 1024  # the largest paddings in use: 905 rows (Phi-2), 271 (Qwen2.5)


def hardware_has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass
class LanguageModel:
    """A frozen causal language model, cut at its head, with its tokenizer.

    `vocab_size` is the number of token ids that exist; padding rows of the head are cut off. With a trimmed vocabulary
    `kept_ids_V` are the network's own ids of its tokens, and tokenizer and head are trimmed alike. With its weights in
    shards over several processes it has a `lockstep`, and all processes must read equally often, or `together`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    name: str
    kept_ids_V: Tensor | None = None
    lockstep: Lockstep | None = None

    @property
    def vocab_size(self) -> int:
        return self.head.weight_Vd.shape[0]

    @property
    def width(self) -> int:
        return self.head.weight_Vd.shape[1]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def first(self) -> LanguageModel:
        """Of an `Ensemble` the first one; here the only one."""
        return self

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(count(p) for _, p in each_parameter(self.model))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters as loaded, tied ones once."""
        return sum(count(p) * p.element_size() for _, p in each_parameter(self.model))

    @property
    def longest_window(self) -> float:
        """Tokens that the model can read at once; infinite for a recurrent one."""
        return getattr(self.model.config, "max_position_embeddings", None) or float("inf")

    @property
    def embedding_Vd(self) -> Tensor:
        """Input embeddings of the tokens that exist. Collective where they lie in shards."""
        weight_Vd = whole(cast(Any, self.model.get_input_embeddings()).weight)
        return weight_Vd[: self.vocab_size] if self.kept_ids_V is None else weight_Vd[self.kept_ids_V]

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of all parameters as loaded: names, types and values. Collective where they lie in shards."""
        return hash_weights(self.model)

    def trimmed(self, tokenizer: PreTrainedTokenizerBase, kept_ids: np.ndarray) -> LanguageModel:
        """This model over a part of its vocabulary, with the tokenizer for it."""
        kept_ids_V = torch.from_numpy(kept_ids).to(self.device)
        weight_Vd, bias_V = self.head.weight_Vd[kept_ids_V], self.head.bias_V
        head = replace(self.head, weight_Vd=weight_Vd, bias_V=None if bias_V is None else bias_V[kept_ids_V])
        return replace(self, tokenizer=tokenizer, head=head, kept_ids_V=kept_ids_V)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work in which processes may read differently often, or not at all, and do nothing else that is collective."""
        yield
        if self.lockstep:
            self.lockstep.join()

    def hidden(self, input_ids_BW: Tensor, position_ids_BW: Tensor | None = None) -> Tensor:
        """Final hidden states (B, W, d), after the last norm."""
        return self._read(input_ids_BW, position_ids_BW).last_hidden_state

    def read_on(self, ids_B1: Tensor, positions_B1: Tensor, seen_BS: Tensor, cache: Any) -> Tensor:
        """Final hidden states (B, d) of one token more in each row; `cache`, which takes its keys and values, has those
        of the S tokens before it, of which `seen_BS`, it included, says which ones are the row's own."""
        extra = {"attention_mask": seen_BS.to(self.device), "past_key_values": cache, "use_cache": True}
        return self._read(ids_B1, positions_B1, **extra).last_hidden_state[:, -1]

    def _read(self, input_ids_BW: Tensor, position_ids_BW: Tensor | None, use_cache: bool = False, **extra: Any) -> Any:
        """What the network below the head returns."""
        input_ids_BW = input_ids_BW.to(self.device)
        if self.kept_ids_V is not None:
            input_ids_BW = self.kept_ids_V[input_ids_BW]
        if position_ids_BW is not None:
            position_ids_BW = position_ids_BW.to(self.device)
            # An LSTM counts for itself, but has to be told where it begins anew.
            recurrent = isinstance(self.model, LSTMForCausalLM)
            extra |= {"reset_mask": position_ids_BW == 0} if recurrent else {"position_ids": position_ids_BW}
        with torch.inference_mode():
            return self.model.base_model(input_ids=input_ids_BW, use_cache=use_cache, **extra)

    def signal(self, batch: BlockBatch, encoding: Encoding) -> Signal:
        """What the teacher says about a batch of blocks; N = B * T rows in the order of the labels."""
        block_length = batch.inputs_BT.shape[1]
        extra = {"output_hidden_states": True} if encoding.layers else {}
        output = self._read(batch.window_BW, batch.positions_BW, **extra)
        hidden_Nd = output.last_hidden_state[:, -block_length:].flatten(0, 1)
        if not torch.isfinite(hidden_Nd).all():
            raise UserError(
                f"teacher {self.name}: its output on blocks {batch.block_ids_B.tolist()} is not finite; "
                f"try teacher.dtype=fp32 (found {self.model.dtype})",
                every_process=True,
            )
        hidden_Nd = hidden_Nd.to(self.head.weight_Vd.device)  # a spread-out teacher may have them apart
        with torch.inference_mode():
            signal = encoding.signal(HiddenSignal(hidden_Nd, self.head), batch.block_ids_B.tolist())
        if encoding.layers:
            assert isinstance(signal, HiddenSignal), "the recipe asks for hidden states with layer_mse"
            layers = [output.hidden_states[depth][:, -block_length:].flatten(0, 1) for depth in encoding.layers]
            return replace(signal, layers=tuple(layers))
        return signal

    def check_window(self, window: int, packed: bool, role: str = "teacher") -> None:
        """Raise UserError where windows are longer than the model allows, or packed documents are not kept apart."""
        if window > self.longest_window:
            raise UserError(
                f"{role} {self.name}: windows of {window} tokens (teacher.context + corpus.block_length) exceed its "
                f"limit of {self.longest_window}"
            )
        if packed:
            # What stands in one document must not change the next one by a single bit.
            positions_1W = torch.cat([torch.arange(6), torch.arange(10)])[None]
            ids_1W = torch.arange(16)[None] % self.vocab_size
            other_1W = ids_1W.clone()
            other_1W[:, :6] = ids_1W[:, :6].flip(-1)
            second, same = (self.hidden(ids, positions_1W)[:, 6:] for ids in (ids_1W, other_1W))
            if not torch.equal(second, same):
                raise UserError(f"{role} {self.name}: its attention does not keep packed documents apart; {OPTIONS}")


@contextmanager
def without_load_report() -> Iterator[None]:
    """transformers' table of missing and unexpected weights is not shown: what it says is checked here."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def hash_weights(network: PreTrainedModel) -> str:
    """sha256 of all parameters: names, types and values. Collective where they lie in shards."""
    digest = hashlib.sha256()
    for name, parameter in sorted(each_parameter(network)):
        values = whole(parameter)
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_teacher(config: OtherTeacherConfig, device: torch.device, role: str = "teacher") -> LanguageModel:
    """A teacher of the recipe, verified and on its device, or in shards over all processes, which is collective."""
    return load_language_model(
        config.model,
        device=device,
        dtype=config.dtype,
        revision=config.revision,
        device_map=config.device_map,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        role=role,
        engine=requested_engine(),
    )


def warn_of_remote_code(role: str, model: str, source: str, revision: str | None, trusted: bool) -> None:
    """Where code of a repository runs that may change."""
    if trusted and not Path(source).exists() and not COMMIT.fullmatch(revision or ""):
        logger.warning(
            "%s %s: runs code of its repository at %s, which may be another tomorrow; pin the revision to a commit",
            *(role, model, revision or "its newest revision"),
        )


def load_language_model(
    model: str,
    *,
    device: torch.device,
    dtype: str = "auto",
    revision: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    role: str = "model",
    engine: Engine | None = None,
) -> LanguageModel:
    """Load any causal model with its tokenizer; UserError names what was not found or does not fit."""
    torch_dtype = DTYPES[resolve_dtype(dtype, device)]
    if engine and device_map:
        raise UserError(
            f"{role}.device_map: {device_map}, but accelerate's configuration shards the {role}; remove one"
        )
    source = resolve_model(model, role)
    loading = {"revision": revision, "trust_remote_code": trust_remote_code}
    warn_of_remote_code(role, model, source, revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **loading)
        sharded: AbstractContextManager[dict[str, Any]] = engine.loading(torch_dtype) if engine else nullcontext({})
        with sharded as shards:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch_dtype,
                device_map=device_map,
                attn_implementation=attn_implementation,
                use_safetensors=True,  # the other formats are pickle
                output_loading_info=True,
                **loading,
                **shards,
            )
        network: PreTrainedModel = loaded[0]
        report: dict[str, Any] = loaded[1]
        if report["missing_keys"]:  # transformers would put random numbers there, with no more than a warning
            raise ValueError(f"weights missing: {', '.join(sorted(report['missing_keys'])[:4])}")
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{role} {model}: cannot be loaded: {reason[0]} (expected a hub id, a folder of a pretrained causal "
            "model with its tokenizer, a .gguf file, or package:DISTRIBUTION/PATH)"
        ) from None
    if device_map is None and engine is None:
        cast(torch.nn.Module, network).to(device)
    network.eval().requires_grad_(False)
    return wrap(network, tokenizer, model, role, engine.engage(network, torch_dtype) if engine else None)


def wrap(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    role: str = "model",
    lockstep: Lockstep | None = None,
) -> LanguageModel:
    """A network in memory as a LanguageModel: vocabulary checked, head found and verified."""
    vocab_size = _shared_vocabulary(network, tokenizer, f"{role} {name}")
    wrapped = LanguageModel(network, tokenizer, head_of(network, vocab_size), name, lockstep=lockstep)
    ids_1W = torch.arange(8, device=wrapped.device)[None] % vocab_size
    with torch.inference_mode(), head_in_place(network):
        expected = network(input_ids=ids_1W).logits[..., :vocab_size].float()
        found = wrapped.head.logits(wrapped.hidden(ids_1W)).float()
    if not torch.isfinite(expected).all():
        raise UserError(f"{role} {name}: its logits are not finite; try dtype fp32 (found {network.dtype})")
    if not _close(found, expected, network.dtype):
        raise UserError(
            f"{role} {name}: its logits are not a linear (scaled, softcapped) map of its final hidden state, "
            "which this architecture would need for its soft targets to be taken"
        )
    return wrapped


def resolve_model(model: str, role: str = "model") -> str:
    """A name that `from_pretrained` takes: packages are located, GGUF files converted once and kept."""
    path = Path(resolve_package(model)) if model.startswith("package:") else Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{role} {model}: expected a GGUF file, found none")
        return str(_convert_gguf(path, role))
    if path.exists():
        if path.is_dir() and (path / "student" / "config.json").is_file():
            path = path / "student"  # a run folder stands for its student
        if not (path / "config.json").is_file():
            raise UserError(f"{role} {model}: expected a model folder with a config.json, found none in it")
        _check_index(path / "model.safetensors.index.json", f"{role} {model}")
        return str(path)
    if model.startswith(("package:", "/", "./", "../", "~")):
        raise UserError(f"{role} {model}: expected a model folder or file, found none")
    return model


def _check_index(file: Path, who: str) -> None:
    """UserError where the list of a model's weight files names one outside its folder."""
    if not file.is_file():
        return
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{who}: {file}: expected the list of its weight files: {error}") from None
    if outside:
        raise UserError(f"{who}: {file}: expected names of files beside it, found {outside[0]!r}")


def _convert_gguf(path: Path, role: str) -> Path:
    """Dequantise a GGUF file once into a plain folder (bf16) in the cache; parsing one takes 20 s, a folder 1 s."""
    digest = sha256(path)
    folder = cache_root() / "gguf" / f"{path.stem}-{digest[:16]}"
    if folder.is_dir():
        if not (problem := damage(folder)):
            return folder
        logger.warning("%s is damaged (%s) and converted again", folder, problem)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{role} {path.name}: reading GGUF needs an extra: pip install 'potstill[gguf]'") from None
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        packed = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{role} {path}: cannot be read as GGUF: {error}") from None
    # The loaded class remembers its quantisation and refuses to be saved: rebuild the plain one.
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = type(packed)(config)
    plain = plain.to(torch.bfloat16)
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = packed.generation_config

    def save(target: Path) -> None:
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "source.json").write_text(json.dumps({"file": path.name, "sha256": digest}))
        write_checksums(target)

    write_atomically(folder, save, "POTSTILL_CACHE")
    return folder


def resolve_dtype(dtype: str, device: torch.device) -> str:
    if dtype != "auto":
        return dtype
    return "bf16" if hardware_has_bf16(device) else "fp32"


def _shared_vocabulary(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, who: str) -> int:
    """Number of token ids that tokenizer and model share, or UserError that says why they do not fit.

    Heads are often padded to a round number of rows (151,936 for 151,665 tokens); rows beyond the last
    token are cut off, but only when every id below is a token of its own.
    """
    ids = tokenizer.get_vocab()
    output: Any = network.get_output_embeddings()
    embedding: Any = network.get_input_embeddings()
    if output is None or not ids:
        raise UserError(f"{who}: expected a causal model with an output head and a tokenizer with a vocabulary")
    by_id = {index: token for token, index in ids.items()}
    vocab_size = max(by_id) + 1
    rows, embedded = whole_shape(output.weight)[0], whole_shape(embedding.weight)[0]
    if len(by_id) != len(ids):
        raise UserError(f"{who}: its tokenizer maps {len(ids)} tokens to {len(by_id)} ids; ids must be unique")
    if vocab_size > rows or vocab_size > embedded:
        raise UserError(
            f"{who}: its tokenizer has ids up to {vocab_size - 1}, but the head has {rows} rows and the embedding "
            f"{embedded}; this tokenizer belongs to another model"
        )
    if rows - vocab_size >= MAX_PADDING_ROWS:
        raise UserError(
            f"{who}: the head has {rows} rows for {vocab_size} tokens; {rows - vocab_size} rows are too many for "
            "padding, so this tokenizer belongs to another model"
        )
    return vocab_size


def head_of(network: PreTrainedModel, vocab_size: int | None = None) -> Head:
    """The output layer, or its first rows, with what some architectures put behind it."""
    output, config = network.get_output_embeddings(), network.config
    bias = getattr(output, "bias", None)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    if getattr(config, "logits_scaling", None):  # Granite
        scale = scale / config.logits_scaling
    return Head(
        weight_Vd=whole(output.weight)[:vocab_size],
        bias_V=None if bias is None else whole(bias)[:vocab_size],
        scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of the model's type."""
    error, scale = (found - expected).norm(), expected.norm()
    return bool(error <= 8 * torch.finfo(dtype).eps * scale)
