"""Choosing the next token from logits, in numpy and microseconds.

    Sampler(temperature=0.8, top_p=0.95, seed=0).choose(logits_V)

Legend: V tokens, P those that top-k and top-p leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.session import refuse

CHUNK = 256  # tokens whose probabilities are summed before the cumulative sum, which is slow


class Sampler:
    """Draws from softmax(logits / temperature), cut to the `top_k` likeliest tokens, then to the fewest whose
    probabilities reach `top_p`. Temperature 0 takes the likeliest token, the first of equal ones."""

    def __init__(
        self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | Sequence[int] | None = None
    ) -> None:
        problems = []
        if not 0 <= temperature < float("inf"):
            problems.append(f"temperature must be 0 (greedy) or more, found {temperature}")
        if top_k < 0:
            problems.append(f"top_k must be 0 (all tokens) or more, found {top_k}")
        if not 0 < top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], found {top_p}")
        if problems:
            refuse("; ".join(problems))
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.random = np.random.default_rng(seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits_V: np.ndarray) -> int:
        """One token id."""
        if self.greedy:
            return int(logits_V.argmax())
        tokens_P, weights_P = self.kept(logits_V)
        place = _draw(weights_P, self.random.random())
        return place if tokens_P is None else int(tokens_P[place])

    def kept(self, logits_V: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Tokens that may be drawn (None: all, in order) and their probabilities up to a common factor."""
        tokens_P = None
        if 0 < self.top_k < len(logits_V):
            tokens_P = np.argpartition(logits_V, -self.top_k)[-self.top_k :]
            logits_V = logits_V[tokens_P]
        weights_P = logits_V - logits_V.max()
        if self.temperature != 1:
            weights_P *= np.float32(1 / self.temperature)
        np.exp(weights_P, out=weights_P)
        if self.top_p < 1:
            nucleus = _nucleus(weights_P, self.top_p)
            tokens_P = nucleus if tokens_P is None else tokens_P[nucleus]
            weights_P = weights_P[nucleus]
        return tokens_P, weights_P


def _nucleus(weights: np.ndarray, share: float) -> np.ndarray:
    """Places of the fewest weights that together reach `share` of the sum; of equal ones the first."""
    total = float(weights.sum(dtype=np.float64))
    # Weights below this sum to less than what may be left out, so all of the nucleus lies above: sort that alone.
    places = np.flatnonzero(weights >= (1 - share) * total / len(weights))
    candidates = weights[places]
    falling = np.sort(candidates)[::-1]
    size = min(int(np.searchsorted(falling.cumsum(dtype=np.float64), share * total)) + 1, len(falling))
    above = candidates > falling[size - 1]
    ties = np.flatnonzero(candidates == falling[size - 1])[: size - int(above.sum())]
    above[ties] = True
    return places[above]


def _draw(weights: np.ndarray, uniform: float) -> int:
    """A place with probability in proportion to its weight, by inverting the cumulative sum in two steps."""
    whole = len(weights) // CHUNK * CHUNK
    sums = weights[:whole].reshape(-1, CHUNK).sum(1, dtype=np.float32)
    cumulative = np.append(sums, weights[whole:].sum()).cumsum(dtype=np.float64)
    target = uniform * cumulative[-1]
    chunk = min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)
    begin = chunk * CHUNK
    inside = weights[begin : begin + CHUNK].cumsum(dtype=np.float64)
    place = int(np.searchsorted(inside, target - (cumulative[chunk - 1] if chunk else 0.0), side="right"))
    return begin + min(place, len(inside) - 1)
