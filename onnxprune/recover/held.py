"""Which batches a repair is judged on instead of being fitted to."""

from __future__ import annotations

HELD = 5
"""One batch in so many is held out."""


def is_held(batch: int, batches: int) -> bool:
    """Whether a batch is held out; of few batches the last is, of one none."""
    every = min(HELD, batches)
    return every > 1 and batch % every == every - 1
