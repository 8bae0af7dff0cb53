"""Which rows of a tensor count: those that no attention mask among the inputs leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxprune.runtime.sessions import Feed


def counted_rows(feed: Feed, shape: Sequence[int]) -> NDArray[np.bool_] | None:
    """Return which rows are no padding, [rows], bool; None where no mask among the inputs fits, so that all are.

    A mask is an input with "mask" in its name that holds 0 and 1, for every position of every sample. Samples whose
    mask is 0 everywhere count in full, so that a mask of another meaning leaves no model without data.

    Args:
        feed: one call of the model.
        shape: sizes of the rows' axes, in order: (samples, positions), or their product alone.
    """
    for name, value in feed.items():
        if "mask" not in name.lower() or value.ndim != 2 or value.dtype.kind not in "iubf":
            continue
        leading = tuple(shape[:2])
        fits = leading == value.shape or (len(shape) == 1 and shape[0] == value.size)
        if not fits or not np.isin(value, (0, 1)).all():
            continue
        mask = value != 0
        mask = mask | ~mask.any(axis=1, keepdims=True)
        inner = prod(shape[2:]) if len(shape) > 2 else 1
        return np.repeat(mask.ravel(), inner)
    return None
