"""A teacher too large for one device: its weights lie in shards over all processes, beside a student each has whole.

The FSDP and DeepSpeed plugins of accelerate shard the model that is trained. Here the large model is frozen and the one
that is trained is small: it needs no sharding, and DDP sends its gradients at the least cost. So an FSDP2 or ZeRO-3
configuration (`recipes/accelerate/`) is taken as the teacher's. accelerate itself is left to see DDP, for the student;
the teacher is loaded by transformers with FSDP2, where each process reads its own shards from disk, or by DeepSpeed's
ZeRO-3 (`zero.Init`, as in ZeRO inference).

Every forward pass of such a teacher gathers one layer after the other from all processes, so all of them must call it
equally often. Training does; where the work is shared out unevenly, `Lockstep` has those who are done help the others.

The output head, and for a moment the embedding, are gathered whole: losses read the head at every step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.config import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """What keeps the shards."""

    name: Literal["fsdp", "zero3"]

    @contextlib.contextmanager
    def loading(self, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """What `from_pretrained` needs to load shards: arguments, and for DeepSpeed a global configuration."""
        if self.name == "fsdp":
            from transformers.distributed import DistributedConfig

            yield {"distributed_config": DistributedConfig(fsdp_size=torch.distributed.get_world_size())}
            return
        deepspeed = _deepspeed()
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
        config = HfDeepSpeedConfig(self._zero3(dtype))  # transformers asks for it as long as it is alive
        try:
            yield {}
        finally:
            unset_hf_deepspeed_config()
            del config

    def engage(self, network: Any, dtype: torch.dtype) -> Lockstep:
        """Have the shards gathered in every forward pass below the head. Collective."""
        here = sum(_local(parameter) for _, parameter in each_parameter(network))
        everywhere = sum(count(p) * p.element_size() for _, p in each_parameter(network))
        if self.name == "zero3":
            _deepspeed().initialize(model=network.base_model, config_params=self._zero3(dtype))
        logger.info(
            "teacher in %d shards (%s): %.2f of %.2f MiB in this process",
            *(torch.distributed.get_world_size(), self.name, here / 2**20, everywhere / 2**20),
        )
        return Lockstep(network)

    def _zero3(self, dtype: torch.dtype) -> dict[str, Any]:
        types = {name: {"enabled": dtype == kind} for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16))}
        return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **types}


@functools.cache
def requested_engine() -> Engine | None:
    """What accelerate's launcher asks for, None for none; the environment then says DDP. UserError if it cannot be."""

    def take(name: str) -> bool:
        return os.environ.pop(name, "false").lower() == "true"

    fsdp, deepspeed = take("ACCELERATE_USE_FSDP"), take("ACCELERATE_USE_DEEPSPEED")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    if fsdp:
        _expect("fsdp_version", "2", os.environ.get("FSDP_VERSION", "1"))
        _expect("fsdp_offload_params", "false", os.environ.get("FSDP_OFFLOAD_PARAMS", "false"))
        return Engine("fsdp")
    if deepspeed:
        _expect("zero_stage", "3", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        _expect("offload_param_device", "none", os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"))
        return Engine("zero3")
    return None


def _expect(field: str, expected: str, found: str) -> None:
    if found.lower() != expected:
        raise UserError(
            f"{field}: expected {expected} in accelerate's configuration, which is here about the teacher's shards, "
            f"found {found}; see recipes/accelerate/fsdp2.yaml, zero3.yaml and, for whole teachers, gpu8.yaml"
        )


class Lockstep:
    """Before each forward pass of a sharded network the processes count who reads; who has nothing to read helps.

    A pass gathers layers from all processes whatever each of them reads, so a single token is help enough.
    """

    def __init__(self, network: Any) -> None:
        self.network: Any = network.base_model
        self.device, self.helping = network.device, False
        self.network.register_forward_pre_hook(self._announce, prepend=True)

    def join(self) -> None:
        """Help until no process reads any more. Collective: all must come here, and do nothing else together before."""
        while self._readers(0):
            self.helping = True
            with torch.inference_mode():
                self.network(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)
            self.helping = False

    def _announce(self, *_: object) -> None:
        if not self.helping:
            self._readers(1)

    def _readers(self, reading: int) -> int:
        count_1 = torch.tensor([reading], device=self.device)
        torch.distributed.all_reduce(count_1)
        return int(count_1.item())


def each_parameter(network: Any) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters, tied ones once: shards of FSDP hold an object for each of a tied pair."""
    named = dict(network.named_parameters())
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    return [(name, parameter) for name, parameter in named.items() if tied.get(name) not in named]


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """A parameter's values, gathered where they lie in shards. Collective then."""
    sharded: Any = parameter
    if hasattr(sharded, "ds_tensor"):
        with _deepspeed().zero.GatheredParameters([sharded]):
            return sharded.detach().clone()
    if hasattr(sharded, "full_tensor"):
        return sharded.full_tensor().detach()
    return parameter.detach()


def count(parameter: Tensor) -> int:
    """Numbers in a parameter, over all its shards."""
    return whole_shape(parameter).numel()


def whole_shape(parameter: Tensor) -> torch.Size:
    """Its shape when gathered."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextlib.contextmanager
def head_in_place(network: Any) -> Iterator[None]:
    """For a pass of the whole network: its head gathered, where the engine, which works below it, does not."""
    output = network.get_output_embeddings()
    sharded = dict(output.named_parameters())
    if not any(hasattr(parameter, "ds_tensor") for parameter in sharded.values()):
        yield
        return
    for name, parameter in sharded.items():
        setattr(output, name, nn.Parameter(whole(parameter), requires_grad=False))
    yield
    for name, parameter in sharded.items():
        setattr(output, name, parameter)


def _local(parameter: Any) -> int:
    """Bytes of a parameter in this process."""
    if hasattr(parameter, "ds_tensor"):
        parameter = parameter.ds_tensor
    elif hasattr(parameter, "to_local"):
        parameter = parameter.to_local()
    return parameter.numel() * parameter.element_size()


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError:
        raise UserError("ZeRO-3 needs an extra: pip install 'potstill[deepspeed]'") from None
    return deepspeed
