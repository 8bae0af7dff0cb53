"""Coordinates of channels in which all errors count alike."""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_triangular

from onnxprune.decompose.factor import Array, Real
from onnxprune.decompose.metric import root


class Whitener:
    """With second moments G = L L^T: ``into`` gives L^T A, ``back`` a basis of what A's columns L^-T A span.

    Args:
        moments: G [parts, n, n], positive definite; None for the identity.
    """

    def __init__(self, moments: Real | None) -> None:
        self._root = None if moments is None else root(moments)

    def into(self, matrix: Array) -> Real:
        """L^T A for A [parts, n, m]."""
        return np.asarray(matrix if self._root is None else self._root.transpose(0, 2, 1) @ matrix, np.float64)

    def back(self, vectors: Array) -> Real:
        """L^-T V for V [parts, n, m], columns of length 1: a prefix may have any scale, the last factor follows."""
        if self._root is None:
            return np.asarray(vectors, np.float64)
        solved = [solve_triangular(r, v, trans="T", lower=True) for r, v in zip(self._root, vectors, strict=True)]
        made = np.stack(solved)
        length = np.linalg.norm(made, axis=1, keepdims=True)
        return np.asarray(made / np.where(length > 0, length, 1.0))
