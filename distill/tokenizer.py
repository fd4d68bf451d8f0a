"""The student's tokenizer, where it is not the teacher's: one that is named, or one trained on the recipe's text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.checkpoint import write_atomically
from distill.config import CorpusConfig, StudentConfig, UserError
from distill.corpus import cache_root, separator_id, side_of
from distill.documents import Source, open_documents
from distill.sealed import damage, write_checksums
from distill.teacher import resolve_model
from distill.vocabulary import is_byte_level


def student_tokenizer(
    student: StudentConfig, corpus: CorpusConfig, teacher: PreTrainedTokenizerBase, *, progress: bool
) -> PreTrainedTokenizerBase:
    """As the recipe says, loaded or trained; UserError for one that cannot be."""
    if student.vocabulary_size is not None:
        return _trained(student.vocabulary_size, corpus, teacher, progress)
    assert student.tokenizer is not None
    source, revision = student.tokenizer, None
    if source == student.model:  # a folder, a file or a package of weights, with its tokenizer
        source, revision = resolve_model(source, "student.tokenizer"), student.revision
    try:
        found: Any = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"student.tokenizer: {student.tokenizer} cannot be loaded: {reason} (expected a hub id or the folder of a "
            "tokenizer)"
        ) from None
    tokenizer: PreTrainedTokenizerBase = found
    return tokenizer


def _trained(
    size: int, corpus: CorpusConfig, teacher: PreTrainedTokenizerBase, progress: bool
) -> PreTrainedTokenizerBase:
    """Byte-level BPE of so many tokens, from the documents on the training side; kept, and taken from there again.

    It cuts text into words as the teacher's does if that is byte-level too, so that most boundaries are common ones.
    """
    separator = str(teacher.convert_ids_to_tokens(separator_id(teacher, corpus.separator)))
    whole = json.loads(teacher.backend_tokenizer.to_str()) if teacher.is_fast else {}
    words = whole["pre_tokenizer"] if is_byte_level(whole) else None
    source = open_documents(corpus, progress=False)
    division = {"text_field", "documents", "max_documents", "validation_fraction", "test_fraction"}
    ingredients = [1, size, separator, words, source.digest, corpus.model_dump(include=division)]
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_root(corpus.cache_dir) / "tokenizer" / digest
    if not folder.is_dir() or damage(folder):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = (
            teacher.backend_tokenizer.pre_tokenizer if words else pre_tokenizers.ByteLevel(add_prefix_space=False)
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[separator], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )  # fmt: skip
        tokenizer.train_from_iterator(_training_texts(source, corpus), trainer)

        def save(target: Path) -> None:
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, eos_token=separator, bos_token=separator, pad_token=separator,
                clean_up_tokenization_spaces=False,
            ).save_pretrained(target)  # fmt: skip
            write_checksums(target)

        write_atomically(folder, save, "corpus.cache_dir")
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def _training_texts(source: Source, corpus: CorpusConfig) -> Iterator[list[str]]:
    for texts in source.batches(progress=False):
        yield [text for text in texts if side_of(text, corpus) == "train"]
