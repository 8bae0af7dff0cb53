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
    alive = np.isin(array, kept)
    for axis, (before, after) in enumerate(zip(array.shape, kept.shape, strict=True)):
        if before == after:
            continue
        share = alive.mean(axis=tuple(a for a in range(array.ndim) if a != axis))
        order = np.argsort(share)
        gone, stay = order[: before - after], order[before - after :]
        if share[gone].max() > 0.6 * share[stay].min():
            if array.ndim > 1:
                raise Unclear(f"the values of {name!r} repeat too much")
            return  # a constant bias or scale: what reads its channels is zeroed anyway
        array[(slice(None),) * axis + (gone,)] = 0
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


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
