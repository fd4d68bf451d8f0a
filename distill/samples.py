"""What a model writes, and how fast it is at batch 1: continuations of prompts, greedy decoding, classifying a text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.teacher import LanguageModel


def continuations(
    model: LanguageModel, prompts: Sequence[str], separator_id: int, new_tokens: int, seed: int
) -> list[dict[str, str]]:
    """Each prompt continued greedily and by sampling (temperature 0.8, top-p 0.95), as rows of a table."""
    rows = []
    for prompt in prompts:
        row = {"prompt": prompt}
        for name, extra in (
            ("greedy", {"do_sample": False}),
            ("sampled", {"do_sample": True, "temperature": 0.8, "top_p": 0.95}),
        ):
            torch.manual_seed(seed)
            row[name] = _generate(model, _prompt(model, prompt, separator_id), new_tokens, **extra)
        rows.append(row)
    return rows


def decode_speed(model: LanguageModel, separator_id: int, seconds: float, new_tokens: int = 32) -> float:
    """Tokens a second of greedy `generate` at batch 1, the median of repetitions that fill `seconds`."""
    prompt_1T = _prompt(model, "The", separator_id)
    rates: list[float] = []
    began = time.perf_counter()
    while len(rates) < 2 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        _generate(model, prompt_1T, new_tokens, do_sample=False, min_new_tokens=new_tokens)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(new_tokens / (time.perf_counter() - started))
    measured = sorted(rates[1:])  # the first one warms up
    return measured[len(measured) // 2]


def _prompt(model: LanguageModel, text: str, separator_id: int) -> torch.Tensor:
    ids = [separator_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    return torch.tensor([ids], device=model.device)


def _generate(model: LanguageModel, prompt_1T: torch.Tensor, new_tokens: int, **extra: object) -> str:
    with torch.inference_mode():
        output = cast(Any, model.model).generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=new_tokens,
            pad_token_id=int(prompt_1T[0, 0]),
            **extra,
        )
    return str(model.tokenizer.decode(output[0, prompt_1T.shape[1] :], skip_special_tokens=True))


@torch.inference_mode()
def latency(network: PreTrainedModel, ids: Sequence[np.ndarray], seconds: float, most: int = 500) -> dict[str, float]:
    """Milliseconds that a classifier takes for one text of these at batch 1, tokens given, over so many seconds."""
    device = network.device
    taken_ms: list[float] = []
    began = time.perf_counter()
    while len(taken_ms) < 8 or (time.perf_counter() - began < seconds and len(taken_ms) < most):
        ids_1T = torch.from_numpy(ids[len(taken_ms) % len(ids)])[None].to(device)
        started = time.perf_counter()
        cast(Any, network)(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken_ms.append(1000 * (time.perf_counter() - started))
    p50, p95 = np.percentile(taken_ms[3:], [50, 95])  # the first ones warm up
    return {"latency_ms_p50": float(p50), "latency_ms_p95": float(p95)}
