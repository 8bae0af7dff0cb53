"""Class probabilities as the logits behind them, whose differences say what those of probabilities hide."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.runtime.floats import eps

# How far a row may be from adding up to 1, per class and in machine epsilons.
_ROUNDING = 64.0
# What float32 can tell from 0 beside 1; less probable classes count as no less than that.
_LEAST = 2.0**-23


def are_probabilities(values: NDArray[Any]) -> bool:
    """Whether rows along the last axis are probabilities of two or more classes: none below 0, all adding up to 1.

    Args:
        values: [samples, classes] or [samples, positions, classes], float; of another rank they are no class scores.
    """
    least = eps(values.dtype)
    if values.ndim not in (2, 3) or values.dtype.kind == "c" or not least or values.shape[-1] < 2 or not values.size:
        return False
    with np.errstate(invalid="ignore", over="ignore"):
        low, sums = values.min(), values.sum(axis=-1, dtype=np.float64)
    within = min(0.01, _ROUNDING * least * values.shape[-1])
    return bool(low >= 0 and np.abs(sums - 1.0).max() <= within)


def logits(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """log p less its mean over the last axis, p at least 2^-23: what a Softmax was given, up to a constant per row.

    The error of a probability next to 0 or 1 is small however wrong the class score behind it is.

    Args:
        probabilities: [..., classes]; what is not finite counts as 0.
    """
    known = np.nan_to_num(probabilities.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    found = np.log(np.maximum(known, _LEAST))
    return np.asarray(found - found.mean(axis=-1, keepdims=True))
