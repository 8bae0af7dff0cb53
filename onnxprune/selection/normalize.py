"""Scores of one weight, made comparable with those of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def normalize(scores: NDArray[Any], method: str) -> Array:
    """Scores [channels] of one weight after normalisation; constant scores stay finite.

    Args:
        scores: higher matters more.
        method: ``none``; ``mean``: divided by the mean absolute score; ``root``: divided by the square root of the sum
            of absolute scores, half-way between ``none`` and ``tss``; ``standard``: less the mean, divided by the
            standard deviation; ``tss``: divided by the sum of absolute scores (total-sum scaling); ``linear``: from 0
            to 1 between the least and the largest; ``softmax``: exponentials that sum to 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    return _METHODS[method](values) if values.size else values


def _ratio(values: Array, scale: float) -> Array:
    return values / scale if scale > 0 else values


def _softmax(values: Array) -> Array:
    grown = np.exp(values - values.max())
    return np.asarray(grown / grown.sum())


_METHODS: dict[str, Callable[[Array], Array]] = {
    "none": lambda v: v,
    "mean": lambda v: _ratio(v, float(np.add.reduce(np.abs(v))) / v.size),
    "root": lambda v: _ratio(v, float(np.sqrt(np.abs(v).sum()))),
    "standard": lambda v: _ratio(v - v.mean(), float(v.std())),
    "tss": lambda v: _ratio(v, float(np.abs(v).sum())),
    "linear": lambda v: _ratio(v - v.min(), float(np.ptp(v))),
    "softmax": _softmax,
}
