"""Gradients of quantisation: straight through, within the range of the codes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from onnxprune.gradients.tape import NoGradient, Reverse
from onnxprune.operators.registry import register_gradient


def _per_axis(r: Reverse, i: int) -> str:
    """Return the scale or zero point at input ``i`` so that it broadcasts to the data."""
    shape, rank = r.shape(i), len(r.shape(0))
    if r.attr("block_size", 0):
        raise NoGradient("has scales per block")
    if len(shape) == 1 and shape[0] > 1:
        axis = r.attr("axis", 1) % rank
        return r.tape.reshape(r.node.inputs[i], [shape[0] if k == axis else 1 for k in range(rank)])
    return r.tape.reshape(r.node.inputs[i], ())


@register_gradient("", "DequantizeLinear")
@register_gradient("com.microsoft", "DequantizeLinear")
def dequantize(r: Reverse) -> None:
    """Return the gradient in units of the codes."""
    r.send(0, r.tape.mul(r.dy, _per_axis(r, 1)))


@register_gradient("", "QuantizeLinear")
@register_gradient("com.microsoft", "QuantizeLinear")
def quantize(r: Reverse) -> None:
    """Pass the gradient as if codes were not rounded, and only where they are not clamped."""
    t, kind = r.tape, r.tape.kinds[r.y]
    if kind.kind not in "iu" and kind not in (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)):
        raise NoGradient(f"gives codes of type {kind}")
    limits: Any = ml_dtypes.iinfo(kind)  # type: ignore[no-untyped-call]
    scale = _per_axis(r, 1)
    code = t.div(r.x, scale)
    if r.has(2):
        code = t.add(code, t.cast(_per_axis(r, 2), t.kinds[r.x]))
    above = t.compare("GreaterOrEqual", code, t.scalar(float(limits.min) - 0.5, code))
    inside = t.either(above, t.compare("LessOrEqual", code, t.scalar(float(limits.max) + 0.5, code)))
    r.send(0, t.mask(t.div(r.dy, scale), inside))
