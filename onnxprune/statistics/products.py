"""Mean products of two channels, or of two columns of a contraction's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.statistics.means import Means, check_finite, floating
from onnxprune.statistics.registry import register

ROWS = 1024
"""Rows multiplied in float32 at a time; longer sums would cost digits, shorter ones time."""

PIECE = 1 << 20
"""Elements of which products are made at a time, where every sample has its own."""


@register("similarity")
class Similarity(Means):
    """``similarity`` [channels, channels]: E[x_i x_j] over samples and positions."""

    additive = True
    tells = True

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Products summed over all positions of all samples; weighs as many."""
        samples, channels = maps.shape[:2]
        flat = maps.reshape(samples, channels, -1)
        positions = flat.shape[2]
        if channels <= positions <= ROWS:
            # One product per sample needs no copy; its result is no larger than the sample.
            total = np.zeros((channels, channels))
            step = max(1, PIECE // flat[0].size)
            for start in range(0, samples, step):
                total += products(flat[start : start + step].swapaxes(1, 2)).sum(axis=0)
            return samples * positions, {"similarity": total}
        return samples * positions, {"similarity": products(np.moveaxis(flat, 1, 0).reshape(channels, -1).T)}


@register("gram", columns=True)
class Gram(Means):
    """``gram`` [parts, n, n]: mean over rows of products of two columns; ``column_mean`` [parts, n]; ``rows`` [].

    ``update`` takes the contraction's input as columns [parts, rows, n]: gram = X^T X / rows. Rows wait until they are
    worth a product: adding one to the sums takes as long as multiplying a few rows. What waits is no larger than a sum.
    """

    additive = True

    def update(self, maps: NDArray[Any]) -> None:
        """Add one batch of columns.

        Raises:
            NotFinite: there is NaN or infinity in it.
        """
        rows = floating(maps)
        if not rows.size:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            total = rows.sum(axis=1, dtype=np.float64)
        if not np.isfinite(total).all():
            check_finite(rows)
        state = dict(self.state)
        state["weight"] = np.asarray(rows.shape[1] + int(state.get("weight", 0)))
        state["column_mean"] = total + state.get("column_mean", 0.0)
        waiting = np.concatenate([state.pop("waiting"), rows], axis=1) if "waiting" in state else rows
        if waiting.shape[1] >= min(ROWS, 2 * waiting.shape[2]):
            state["gram"] = products(waiting) + state.get("gram", 0.0)
        else:
            state["waiting"] = waiting.copy() if waiting is maps else waiting
        self.state = state

    def result(self) -> dict[str, NDArray[np.float64]]:
        """The means, and from how many ``rows`` they are: with few, the Gram matrix promises more than holds."""
        if not self.state:
            return {}
        state, weight = self.state, float(self.state["weight"])
        gram = np.asarray(state.get("gram", 0.0), np.float64)
        if "waiting" in state:
            gram = gram + products(state["waiting"])
        return {"gram": gram / weight, "column_mean": state["column_mean"] / weight, "rows": np.asarray(weight)}


def products(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """X^T X of matrices [..., rows, n], in float64, [..., n, n]: float32 within short runs of rows.

    Every entry is right to about 3e-7 of the root of its diagonal entries' product.
    """
    rows, n = matrices.shape[-2:]
    total = np.zeros((*matrices.shape[:-2], n, n))
    for start in range(0, rows, ROWS):
        some = matrices[..., start : start + ROWS, :]
        if some.dtype == np.float16:
            some = some.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            product = some.swapaxes(-1, -2) @ some
            # No product of two columns is larger than those of each with itself.
            if not np.isfinite(np.einsum("...ii->...i", product)).all():
                some = some.astype(np.float64)
                product = some.swapaxes(-1, -2) @ some
            total += product
    return total
