"""Class probabilities, and the square roots by which distributions are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.runtime.floats import eps

# How far a row may be from adding up to 1, per class and in machine epsilons.
_ROUNDING = 64.0


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


def roots(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Square roots of probabilities, in float64: their squared distance, halved, is the squared Hellinger distance.

    H^2(p, q) = 1/2 sum_c (p_c^1/2 - q_c^1/2)^2, from 0 to 1. Unlike a difference of probabilities it does not go by the
    most probable class alone. What is not finite, or below 0, counts as 0. Le Cam and Yang, Asymptotics in Statistics,
    2nd edition, 2000.
    """
    known = np.nan_to_num(probabilities.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    return np.sqrt(np.maximum(known, 0.0))
