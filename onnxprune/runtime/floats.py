"""Epsilon and range of every float type, bfloat16 and float8 included, of which numpy alone knows nothing."""

from __future__ import annotations

from typing import Any, cast

import ml_dtypes
import numpy as np


def eps(dtype: np.dtype[Any]) -> float:
    """Machine epsilon of a float or complex type; 0 for anything else, so that it also tells floats from the rest."""
    return _limits(dtype)[0]


def measures(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type have sizes to compare: floats, and codes of 8 bits, as quantised models give.

    Longer integers are mostly labels, indices and counts.
    """
    return eps(dtype) > 0 or (dtype.kind in "iu" and dtype.itemsize == 1)


def largest(dtype: np.dtype[Any]) -> float:
    """The largest finite value of a float or complex type; 0 for anything else."""
    return _limits(dtype)[1]


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    try:
        info = cast(Any, ml_dtypes.finfo)(dtype)
    except (ValueError, TypeError, KeyError):
        return 0.0, 0.0
    return float(info.eps), float(info.max)
