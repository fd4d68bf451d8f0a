"""What a model writes, and how fast: continuations of prompts, and greedy decoding speed at batch 1."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch

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
