"""A tiny world for tests and the fault campaign: a two-layer Llama teacher with its own tokenizer, 400 documents."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WORDS = [
    "the",
    "a",
    "river",
    "city",
    "mountain",
    "king",
    "queen",
    "old",
    "young",
    "small",
    "great",
    "was",
    "is",
    "in",
    "on",
    "of",
    "and",
    "near",
    "built",
    "found",
    "wrote",
    "north",
    "south",
    "water",
    "stone",
    "house",
    "book",
    "ship",
    "song",
    "year",
    "war",
    "peace",
    "road",
    "bridge",
    "tower",
    "garden",
    "market",
    "school",
]


@dataclass(frozen=True)
class World:
    """Paths of the tiny teacher, its text, and a recipe that joins them."""

    folder: Path
    teacher: Path
    text: Path
    recipe: Path


def save_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """A token for the end of a document, one for unknown words, and one for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<|end|>", "<|unk|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<|end|>", "unk_token": "<|unk|>", "pad_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_llama(folder: Path, seed: int = 0, **sizes: Any) -> None:
    """A tiny random Llama, for a tokenizer whose first token ends documents."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    default = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = LlamaConfig(**{**default, **ids, "max_position_embeddings": 256, "tie_word_embeddings": False, **sizes})
    LlamaForCausalLM(config).save_pretrained(folder)


def make_world(folder: Path) -> World:
    """Write teacher, text and recipe into a folder that exists."""
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for _ in range(400)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")

    teacher = folder / "teacher"
    save_tokenizer(teacher, WORDS)
    save_llama(teacher, vocab_size=64, initializer_range=0.2)  # padded: the tokenizer has fewer

    recipe = folder / "tiny.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "run": {
                    "name": "tiny",
                    "output_dir": str(folder / "runs"),
                    "precision": "fp32",
                    "batch_size": 8,
                    "threads": 1,
                },
                "teacher": {"model": str(teacher), "context": 4, "dtype": "fp32"},
                "student": {"hidden_size": 16, "num_layers": 1, "fit_tokens": 128},
                "corpus": {
                    "source": str(text),
                    "block_length": 8,
                    "validation_fraction": 0.1,
                    "cache_dir": str(folder / "cache"),
                },
                "stages": [
                    {"objective": "hidden_mse", "freeze": ["embedding", "head"], "length": {"steps": 6}},
                    {"objective": {"forward_kl": 0.8, "cross_entropy": 0.2}, "length": {"steps": 8}},
                ],
                "control": {"match": "tokens"},
                "evaluation": {
                    "every": {"steps": 4},
                    "new_tokens": 4,
                    "decode_seconds": 0.1,
                    "prompts": ["the river"],
                },
                "tracking": {"tracker": "none", "every": 1},
            }
        ),
        encoding="utf-8",
    )
    return World(folder, teacher, text, recipe)
