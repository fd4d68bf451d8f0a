"""Changed copies of texts: how often which rule applies, and that a seed decides all of it.

python -m pytest tests/test_augment.py
"""

from __future__ import annotations

import random
import string

import numpy as np
import pytest
from conftest import World

from distill.augment import Augmenter
from distill.config import AugmentationConfig, UserError
from distill.corpus import load_corpus, side_of
from distill.documents import open_documents
from distill.job import TeacherAndText, start_accelerator
from distill.recipe import load_recipe

RNG = random.Random(0)
STEMS = ["".join(RNG.choices(string.ascii_lowercase, k=5)) for _ in range(300)]
WORDS = [stem + ending for stem in STEMS for ending in ("ed", "ly")]
TEXTS = [" ".join(WORDS[start : start + 40]) for start in range(0, 600, 40)]  # each word once: two kinds of 300
TRIALS = 4000


def within(found: int, trials: int, probability: float) -> bool:
    """Within four standard deviations of the binomial distribution."""
    return abs(found - trials * probability) <= 4 * (trials * probability * (1 - probability)) ** 0.5


def test_words_are_masked_and_replaced_as_often_as_asked() -> None:
    made = Augmenter(AugmentationConfig(mask=0.15, replace=0.25, ngram=0.0), TEXTS, "[M]", 0)
    masked = replaced = kept = 0
    for copy in range(90):
        for number, text in enumerate(TEXTS):
            before, after = text.split(), made.copy(text, number, copy).split()
            assert len(before) == len(after)
            for old, new in zip(before, after, strict=True):
                masked += new == "[M]"
                kept += new == old
                replaced += new not in ("[M]", old)
                assert new == "[M]" or (new in WORDS and new[-2:] == old[-2:]), "of the same kind"
    total = masked + replaced + kept
    assert total == 90 * 600
    assert within(masked, total, 0.15) and within(replaced, total, 0.25)


def test_replacements_follow_frequency() -> None:
    texts = ["red " * 6, "bed " * 4, "led " * 5]  # one kind: four to seven times each, ending in ed
    made = Augmenter(AugmentationConfig(mask=0.0, replace=1.0, ngram=0.0), texts, None, 1)
    drawn = [word for copy in range(TRIALS) for word in made.copy("red", 0, copy).split()]
    assert set(drawn) == {"bed", "led"} and len(drawn) == TRIALS
    assert within(drawn.count("led"), TRIALS, 5 / 9)


@pytest.mark.parametrize(
    ("word", "others"),
    [
        ("walked,", {"talked,"}),  # punctuation stays
        ("(walked)", {"(talked)"}),
        ("Boston", {"London"}),  # capitals among capitals
        ("1969", {"1869"}),  # numbers among numbers
        ("the", {"the"}),  # alone in its kind, by its frequency
        ("--", {"--"}),
        ("unheard", {"unheard"}),  # not in the texts
    ],
)
def test_another_word_of_the_same_kind(word: str, others: set[str]) -> None:
    texts = ["walked talked said Boston London 1969 1869 button bathe", "the " * 20]
    made = Augmenter(AugmentationConfig(mask=0.0, replace=1.0, ngram=0.0), texts, None, 0)
    assert {made.copy(word, 0, copy) for copy in range(30)} == others


def test_stretches_are_kept_as_often_and_as_long_as_asked() -> None:
    made = Augmenter(AugmentationConfig(mask=0.0, replace=0.0, ngram=0.3, longest_ngram=4), TEXTS, None, 0)
    text = TEXTS[0]
    lengths, starts = [], set()
    for copy in range(TRIALS):
        words = made.copy(text, 0, copy).split()
        assert f" {' '.join(words)} " in f" {text} ", "a stretch of the text as it stands"
        lengths.append(len(words))
        starts.add(text.split().index(words[0]))
    short = [length for length in lengths if length < 40]
    assert within(len(short), TRIALS, 0.3)
    assert set(short) == {1, 2, 3, 4} and all(within(short.count(n), len(short), 1 / 4) for n in range(1, 5))
    assert starts == set(range(40)), "from anywhere"


def test_without_a_mask_token_masked_words_are_left_out() -> None:
    made = Augmenter(AugmentationConfig(mask=0.5, replace=0.0, ngram=0.0), TEXTS, None, 0)
    lengths = [len(made.copy(TEXTS[0], 0, copy).split()) for copy in range(500)]
    assert within(sum(lengths), 500 * 40, 0.5)
    assert {made.copy("word", 0, copy) for copy in range(20)} == {"word"}, "nothing left: the text itself"


def test_a_seed_decides_everything() -> None:
    one, same, other = (
        [Augmenter(AugmentationConfig(), TEXTS, None, seed).copy(TEXTS[0], 0, copy) for copy in range(5)]
        for seed in (3, 3, 4)
    )
    assert one == same and len(set(one)) == 5
    assert one != other
    made = Augmenter(AugmentationConfig(), TEXTS, None, 3)
    assert made.copy(TEXTS[0], 1, 0) != one[0], "each text has its own fate"
    assert [made.copy(TEXTS[0], 0, copy) for copy in reversed(range(5))] == one[::-1], "in any order"
    assert len(made.copy(" ".join(WORDS), 0, 1, most_words=7).split()) <= 7


def test_white_space_stays() -> None:
    made = Augmenter(AugmentationConfig(mask=0.0, replace=1.0, ngram=0.0), ["led red bed"], None, 0)
    text = "red\n\nbed  led\n"
    changed = made.copy(text, 0, 0)
    assert [len(part) for part in changed.split("\n")] == [3, 0, 8] and changed[5:8] != "bed"


# ---------------------------------------------------------------- beside the text of a language model

CHANGED = "augmentation={copies: 2, mask: 0, replace: 0.5, ngram: 0}"


def test_copies_are_trained_on_alone(world: World) -> None:
    """By the student and not by the control; documents as they are come first, and copies that fall to another side
    are left out."""
    recipe = load_recipe(str(world.recipe), [CHANGED])
    parts = TeacherAndText(recipe, start_accelerator(recipe))
    tokenizer, augmentation = parts.teacher.tokenizer, recipe.augmentation
    real = load_corpus(recipe.corpus, tokenizer, progress=False)
    for side in ("validation", "test"):
        assert np.array_equal(getattr(parts.corpus, side).tokens, getattr(real, side).tokens)
    assert np.array_equal(parts.corpus.train.tokens[: len(real.train.tokens)], real.train.tokens)
    assert parts.text_of_source.split.tokens.tolist() == real.train.tokens.tolist()
    assert parts.corpus.fingerprint != real.fingerprint

    texts = [text for text in open_documents(recipe.corpus, progress=False) if side_of(text, recipe.corpus) == "train"]
    assert augmentation is not None
    augmenter = Augmenter(augmentation, texts, None, 0)
    copies = [augmenter.copy(text, number, copy) for copy in range(2) for number, text in enumerate(texts)]
    kept = [copy for copy in copies if side_of(copy, recipe.corpus) == "train"]
    assert 0 < len(kept) < len(copies) and set(kept) - set(texts)
    found = [parts.corpus.train.document(n) for n in range(len(real.train), len(parts.corpus.train))]
    assert [tokenizer.decode(tokens_N[1:]) for tokens_N in found] == kept

    other = load_recipe(str(world.recipe), [CHANGED.replace("0.5", "0.4")])
    corpus = load_corpus(other.corpus, tokenizer, augmentation=other.augmentation, progress=False)
    assert corpus.fingerprint != parts.corpus.fingerprint


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["corpus.streaming=true"], "corpus.streaming: changed copies are not added to a stream"),
        (["corpus.source=", "writing={documents: 20}"], "augmentation: there is no corpus.source to make copies of"),
        (["student.vocabulary_size=300"], "augmentation: expected none where the student has a tokenizer of its own"),
    ],
)
def test_recipes_that_have_no_use_for_copies(world: World, overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(str(world.recipe), [CHANGED, *overrides])
    assert expected in str(caught.value)
