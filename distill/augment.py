"""More text for a teacher to judge, made from texts by three rules (Tang et al. 2019, arXiv 1903.12136, section 3.3).

Each word of a copy is masked with probability `mask`, else replaced with probability `replace`; then, with probability
`ngram`, all but a stretch of one to `longest_ngram` words is dropped. Such copies are hardly sentences; what matters is
what the teacher makes of them: the class of a text, or in a language model's copies each next token. Words that change
in the text of an LSTM language model make it better even without a teacher (Xie et al. 2017, arXiv 1703.02573).

Where Tang et al. replace a word by one of the same part of speech, here it is one of the same kind: its last two
letters, its capitalisation, and the power of two of its frequency. That needs no tagger, keeps "-ed" with "-ed" and
names with names, and leaves the most frequent words, which are alone in their kind, as they are.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

import numpy as np

from distill.config import AugmentationConfig

Kind = tuple[str, str, int]


class Augmenter:
    """Makes copies of texts, the same ones for the same seed."""

    def __init__(self, config: AugmentationConfig, texts: Iterable[str], mask: str | None, seed: int) -> None:
        """`texts` give the words to replace others by; without a `mask` token, masked words are left out."""
        self.config, self.mask, self.seed = config, mask, seed
        counts = Counter(core for text in texts for word in text.split() if (core := word.strip(string.punctuation)))
        self.kinds = {word: _kind(word, count) for word, count in counts.items()}
        kinds: dict[Kind, list[str]] = {}
        for word, kind in self.kinds.items():
            kinds.setdefault(kind, []).append(word)
        self.words = kinds
        self.cumulated = {kind: np.cumsum([counts[word] for word in words]) for kind, words in kinds.items()}

    def copy(self, text: str, number: int, copy: int, most_words: int | None = None) -> str:
        """Copy `copy` of the text with this number, of its first words; the text itself where nothing would be left."""
        rng = np.random.default_rng([self.seed, number, copy])
        words = re.findall(r"\S+\s*", text)[:most_words]  # each with the white space behind it
        fates = rng.random(len(words))
        changed: list[str] = []
        for word, fate in zip(words, fates, strict=True):
            bare = word.rstrip()
            if fate < self.config.mask:
                changed += [self.mask + word[len(bare) :]] if self.mask is not None else []
            elif fate < self.config.mask + self.config.replace:
                changed.append(self._another(bare, rng) + word[len(bare) :])
            else:
                changed.append(word)
        if changed and rng.random() < self.config.ngram:
            length = min(int(rng.integers(1, self.config.longest_ngram + 1)), len(changed))
            start = int(rng.integers(len(changed) - length + 1))
            changed = changed[start : start + length]
        return "".join(changed or words).rstrip()

    def _another(self, word: str, rng: np.random.Generator) -> str:
        """Another word of the same kind, drawn by frequency, in the same punctuation; itself if it is alone."""
        core = word.strip(string.punctuation)
        words = self.words.get(self.kinds.get(core, ("", "", -1)), [core])
        if len(words) == 1:
            return word
        cumulated = self.cumulated[self.kinds[core]]
        while (other := words[int(np.searchsorted(cumulated, rng.integers(cumulated[-1]), side="right"))]) == core:
            pass
        before, _, after = word.partition(core)
        return before + other + after


def _kind(word: str, count: int) -> Kind:
    shape = "number" if any(map(str.isdigit, word)) else "capital" if word[0].isupper() else "small"
    return shape, word[-2:].lower(), count.bit_length()
