"""An independent check of a cut: the original with the removed slices of its weights set to zero must compute the same.

It knows the two files only: no plan, no labels. For every weight that shrank it finds which slices are left by
looking the values up (trained and random weights hardly repeat), zeroes the others in the original, producers, biases
and consumers alike, and compares both models in onnxruntime: a channel that no consumer reads is exactly removed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from bench.files import FLOATS, constants

SHORTEST = 8  # values that tell one row from another


class Unclear(Exception):
    """The values do not tell which slices are left."""


def masked(original: onnx.ModelProto, cut: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``original`` with every removed slice zeroed.

    Raises:
        Unclear: a weight of two or more axes shrank, and its values do not tell where, or a shrunk weight was renamed.
    """
    model = onnx.ModelProto()
    model.CopyFrom(original)
    left = dict(constants(cut))
    for name, tensor in constants(model):
        if tensor.data_type not in FLOATS or not tensor.dims:
            continue
        if name not in left:
            if len(tensor.dims) > 1:
                raise Unclear(f"{name!r} has another name in the cut model")
            continue
        if list(left[name].dims) == list(tensor.dims):
            continue
        _zero(name, tensor, numpy_helper.to_array(left[name]))
    return model


def _zero(name: str, tensor: onnx.TensorProto, kept: NDArray[Any]) -> None:
    array = numpy_helper.to_array(tensor).copy()
    if kept.ndim != array.ndim or any(k > a for k, a in zip(kept.shape, array.shape, strict=True)):
        raise Unclear(f"{name!r} went from {array.shape} to {kept.shape}")
    zeroed = _by_slices(array, kept)
    if zeroed is None:
        zeroed = _by_rows(array, kept)
    if zeroed is None and not _per_channel(array, kept):
        raise Unclear(f"the values of {name!r} repeat too much")
    if zeroed is not None:  # else what reads its channels is zeroed
        tensor.CopyFrom(numpy_helper.from_array(zeroed, tensor.name))


def _per_channel(array: NDArray[Any], kept: NDArray[Any]) -> bool:
    """Whether this is a bias, a scale or a depthwise kernel, which sums over no channel."""
    long = sum(n > 1 for n in array.shape)
    depthwise = array.ndim > 2 and array.shape[1] == 1 and array.shape[1:] == kept.shape[1:]
    return array.ndim == 1 or (array.ndim > 2 and long == 1) or depthwise


def _by_slices(array: NDArray[Any], kept: NDArray[Any]) -> NDArray[Any] | None:
    """``array`` with the slices zeroed whose values are not in ``kept``; None where it is not a matter of slices."""
    alive, result = np.isin(array, kept), array.copy()
    for axis, (before, after) in enumerate(zip(array.shape, kept.shape, strict=True)):
        if before == after:
            continue
        share = alive.mean(axis=tuple(a for a in range(array.ndim) if a != axis))
        order = np.argsort(share)
        gone, stay = order[: before - after], order[before - after :]
        if share[gone].max() > 0.3 * share[stay].min():  # equal values elsewhere make a few percent
            return None
        result[(slice(None),) * axis + (gone,)] = 0
    return result


def _by_rows(array: NDArray[Any], kept: NDArray[Any]) -> NDArray[Any] | None:
    """The same for grids, whose rows lose different positions: row by row along the first axis that has any length."""
    axis = next((a for a, n in enumerate(array.shape) if n > 1), 0)
    if array.ndim < 2 or kept.shape[axis] == 0 or array.size < SHORTEST * array.shape[axis]:
        return None
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    left = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
    order = np.argsort(rows, axis=None)
    found = np.searchsorted(rows.ravel(), left, sorter=order)
    home = order[np.minimum(found, order.size - 1)] // rows.shape[1]  # [kept rows, positions]: the row a value is from
    own = np.array([np.bincount(line, minlength=len(rows)).argmax() for line in home])
    alive = np.zeros(rows.shape, bool)
    for row, values in zip(own, left, strict=True):
        alive[row] |= np.isin(rows[row], values)
    if np.unique(own).size != own.size or (alive[own].sum(axis=1) != left.shape[1]).any():
        return None
    moved = [array.shape[axis], *(n for a, n in enumerate(array.shape) if a != axis)]
    return np.moveaxis(np.where(alive, rows, 0).astype(array.dtype).reshape(moved), 0, axis)


def worst_difference(first: list[Any], second: list[Any]) -> float:
    """Largest absolute difference over all outputs, each relative to its largest value; infinite for other shapes."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if isinstance(a, list):
            worst = max(worst, worst_difference(a, b))
            continue
        x, y = np.asarray(a), np.asarray(b)
        if x.shape != y.shape:
            return float("inf")
        if x.dtype.kind not in "fiub" or not x.size:
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        gap = np.where(same, 0.0, np.abs(x - y))
        scale = float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max()) / scale)
    return worst
