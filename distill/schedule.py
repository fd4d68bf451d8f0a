"""Learning rate, and whatever else changes over a stage, as a function of the stage's progress.

Progress is the share of the stage that is done, in [0, 1), whatever unit its length has; so the same
schedule serves stages in steps, tokens and minutes.
"""

from __future__ import annotations

import math


def learning_rate_factor(progress: float, schedule: str, warmup: float, final: float) -> float:
    """Factor on the peak learning rate: linear warm-up from near 0, then the schedule down to `final`.

    `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at 1 until the last fifth. A stage
    that is over (progress above 1) stays where it ended.
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    progress = min(progress, 1.0)
    rest = (progress - warmup) / (1 - warmup)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            down = rest
        case "cosine":
            down = 0.5 * (1 - math.cos(math.pi * rest))
        case "wsd":
            decay = max(0.8, warmup)
            down = max(0.0, (progress - decay) / (1 - decay))
        case _:
            raise ValueError(f"unknown schedule {schedule!r}")
    return 1 - (1 - final) * down


def ramp(start: float, end: float, progress: float, shape: str) -> float:
    """From `start` to `end`: in a straight line, or along half a cosine, which is level at both ends."""
    progress = min(progress, 1.0)
    match shape:
        case "linear":
            passed = progress
        case "cosine":
            passed = 0.5 * (1 - math.cos(math.pi * progress))
        case _:
            raise ValueError(f"unknown shape {shape!r}")
    return start + (end - start) * passed
