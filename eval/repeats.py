"""What a text has said before, as a guess at what it says next.

A student's state is too small to hold a name or a phrase to the letter; the text is at hand. Where its last tokens
stand in it earlier, what followed them there is likely to follow again (a cache model, Kuhn and De Mori, IEEE PAMI
1990; prompt lookup decoding, Saxena 2023). The longest end of the text that was seen before counts alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

# Probability that what followed so many tokens before follows them again; the more tokens, the surer.
TRUST = (0.25, 0.6, 0.8, 0.9)


class Repeats:
    """The tokens that followed each stretch of up to four tokens of a text."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.end: list[int] = []
        self.followers: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self.read(tokens)

    def read(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            for length in range(1, len(self.end) + 1):
                self.followers[tuple(self.end[-length:])][token] += 1
            self.end = [*self.end, token][-len(TRUST) :]

    def after(self, drafted: Sequence[int] = ()) -> dict[int, float]:
        """Probabilities of some tokens after the text and a draft that goes on from it; the rest is unknown."""
        end = [*self.end, *drafted][-len(TRUST) :]
        for length in range(len(end), 0, -1):
            if counts := self.followers.get(tuple(end[-length:])):
                share = TRUST[length - 1] / counts.total()
                return {token: share * count for token, count in counts.items()}
        return {}
