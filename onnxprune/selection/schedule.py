"""How the removed share grows when a model is cut in several steps."""

from __future__ import annotations

import math


def removed_share(ratio: float, schedule: str, done: float) -> float:
    """Share of units that is gone when ``done`` of the steps (0 to 1) are; rises from 0 to ``ratio``.

    Args:
        schedule: ``linear``; ``exp``: every step takes the same share of what is left; ``cos``: half a cosine wave,
            slow at both ends; ``cube``: ratio (1 - (1 - done)^3), most of it early (Zhu and Gupta, 2017).
    """
    if done >= 1:
        return ratio
    if schedule == "exp":
        return 1.0 - math.pow(1.0 - ratio, done)
    if schedule == "cos":
        return ratio * (1.0 - math.cos(math.pi * done)) / 2.0
    if schedule == "cube":
        return ratio * (1.0 - (1.0 - done) ** 3)
    return ratio * done
