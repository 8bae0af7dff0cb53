"""Gradients of normalisations, softmax and reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxprune.gradients.tape import NoGradient, Reverse, Tape
from onnxprune.operators.registry import register_gradient

MS = "com.microsoft"

# -- normalisations ----------------------------------------------------------------------------------------------------


def _along(t: Tape, vector: str, rank: int, axis: int = 1) -> str:
    """Return a vector that lies along one axis of a tensor of this rank."""
    return t.reshape(vector, [t.shape(vector)[0] if k == axis else 1 for k in range(rank)])


def _inverse_root(t: Tape, x: str, epsilon: float) -> str:
    return t.unary("Reciprocal", t.unary("Sqrt", t.shift(x, epsilon)))


@register_gradient("", "BatchNormalization")
def batch_normalization(r: Reverse) -> None:
    """Of inference: an affine function of the input; by statistics of the batch: a normalisation."""
    t, rank = r.tape, len(r.shape(0))
    scale, _, mean, variance = r.node.inputs[1:5]
    others = [k for k in range(rank) if k != 1]
    if r.attr("training_mode", 0):
        unit = _normalized(r, others, _along(t, scale, rank))
        if r.wants(1):
            r.send(1, t.sum(t.mul(r.dy, unit), others))
        if r.wants(2):
            r.send(2, t.sum(r.dy, others))
        return
    inverse = _inverse_root(t, variance, r.attr("epsilon", 1e-5))
    if r.wants(0):
        r.send(0, t.mul(r.dy, _along(t, t.mul(scale, inverse), rank)))
    if r.wants(1) or r.wants(4):
        centred = t.sub(r.x, _along(t, mean, rank))
        along = t.mul(t.sum(t.mul(r.dy, centred), others), inverse)
        r.send(1, along)
        r.send(4, t.scale(t.mul(t.mul(along, scale), t.square(inverse)), -0.5))
    if r.wants(2) or r.wants(3):
        total = t.sum(r.dy, others)
        r.send(2, total)
        r.send(3, t.neg(t.mul(total, t.mul(scale, inverse))))


def _normalized(r: Reverse, axes: Sequence[int], scale: str, centre: bool = True) -> str:
    """Send the gradient of (x - mean) / deviation times ``scale``; return the normalised input.

    Args:
        r: the node.
        axes: axes that are normalised over.
        scale: tensor that broadcasts to the input, "" for none.
        centre: whether the mean is taken off.
    """
    t, x = r.tape, r.x
    if centre:
        x = t.sub(x, t.mean(x, axes, keep=True))
    inverse = _inverse_root(t, t.mean(t.square(x), axes, keep=True), r.attr("epsilon", 1e-5))
    unit = t.mul(x, inverse)
    if r.wants(0):
        gradient = t.mul(r.dy, scale) if scale else r.dy
        residual = t.sub(gradient, t.mul(unit, t.mean(t.mul(gradient, unit), axes, keep=True)))
        if centre:
            residual = t.sub(residual, t.mean(gradient, axes, keep=True))
        r.send(0, t.mul(residual, inverse))
    return unit


@register_gradient("", "LayerNormalization")
@register_gradient(MS, "LayerNormalization")
def layer_normalization(r: Reverse) -> None:
    """Over the last axes; statistics are computed again."""
    _over_last(r, True)


@register_gradient("", "RMSNormalization", "SimplifiedLayerNormalization")
@register_gradient(MS, "SimplifiedLayerNormalization")
def rms_normalization(r: Reverse) -> None:
    """Over the last axes, without a mean."""
    _over_last(r, False)


def _over_last(r: Reverse, centre: bool) -> None:
    rank = len(r.shape(0))
    axes = list(range(r.attr("axis", -1) % rank, rank))
    unit = _normalized(r, axes, r.node.inputs[1], centre)
    if r.wants(1):
        r.send(1, r.tape.mul(r.dy, unit))
    r.send(2, r.dy)


@register_gradient("", "InstanceNormalization")
def instance_normalization(r: Reverse) -> None:
    """Over the spatial axes of every channel."""
    t, rank = r.tape, len(r.shape(0))
    others = [k for k in range(rank) if k != 1]
    unit = _normalized(r, range(2, rank), _along(t, r.node.inputs[1], rank))
    if r.wants(1):
        r.send(1, t.sum(t.mul(r.dy, unit), others))
    if r.wants(2):
        r.send(2, t.sum(r.dy, others))


@register_gradient("", "LpNormalization")
def lp_normalization(r: Reverse) -> None:
    """X / |x| along an axis, for the norms 1 and 2."""
    t, p = r.tape, r.attr("p", 2)
    axes = [r.attr("axis", -1) % len(r.shape(0))]
    norm = t.sum(t.unary("Abs", r.x) if p == 1 else t.square(r.x), axes, keep=True)
    norm = norm if p == 1 else t.unary("Sqrt", norm)
    along = t.sum(t.mul(r.dy, r.y), axes, keep=True)
    slope = t.unary("Sign", r.x) if p == 1 else r.y
    r.send(0, t.div(t.sub(r.dy, t.mul(slope, along)), norm))


@register_gradient("", "LRN")
def local_response(r: Reverse) -> None:
    """X / (bias + alpha / size * sum of squares of neighbouring channels)^beta."""
    t, shape, size = r.tape, r.shape(0), r.attr("size")
    alpha, beta, bias = r.attr("alpha", 1e-4) / size, r.attr("beta", 0.75), r.attr("bias", 1.0)
    flat = (shape[0], shape[1], int(np.prod(shape[2:])))
    distance = np.arange(shape[1])[None, :] - np.arange(shape[1])[:, None]
    band = (distance >= -((size - 1) // 2)) & (distance <= size // 2)
    near = band.astype(t.kinds[r.x])
    x, y, dy = (t.reshape(n, flat) for n in (r.x, r.y, r.dy))
    base = t.shift(t.scale(t.matmul(t.constant(near), t.square(x)), alpha), bias)
    share = t.matmul(t.constant(near.T), t.div(t.mul(dy, y), base))
    first = t.mul(dy, t.emit("Pow", [base, t.scalar(-beta, base)], flat))
    r.send(0, t.reshape(t.sub(first, t.scale(t.mul(x, share), 2 * alpha * beta)), shape))


@register_gradient("", "Softmax")
def softmax(r: Reverse) -> None:
    """Y * (dy - sum of y dy)."""
    t, axes = r.tape, [r.attr("axis", -1) % len(r.shape(0))]
    weighted = t.mul(r.dy, r.y)
    r.send(0, t.sub(weighted, t.mul(r.y, t.sum(weighted, axes, keep=True))))


@register_gradient("", "LogSoftmax")
def log_softmax(r: Reverse) -> None:
    """Dy - softmax(x) * sum of dy."""
    t, axes = r.tape, [r.attr("axis", -1) % len(r.shape(0))]
    r.send(0, t.sub(r.dy, t.mul(t.unary("Exp", r.y), t.sum(r.dy, axes, keep=True))))


# -- reductions --------------------------------------------------------------------------------------------------------


def _reduced(r: Reverse) -> list[int] | None:
    """Return the axes that a reduction sums over; None where it is the identity."""
    rank = len(r.shape(0))
    axes = r.node.attrs.get("axes")
    if r.has(1):
        axes = r.constant_value(1, "axes").ravel().tolist()
    if axes is None or len(axes) == 0:
        return None if r.attr("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({int(k) % rank for k in axes})


def _with_reduced_axes(r: Reverse, x: str, axes: Sequence[int]) -> str:
    """Return a reduced tensor with its reduced axes of size 1."""
    return r.tape.reshape(x, [1 if k in axes else n for k, n in enumerate(r.shape(0))])


Slope = Callable[[Tape, str, str, Sequence[int]], str]
"""(tape, input, output with axes of size 1, axes) -> derivative of the reduction at every position."""


def _reduction(slope: Slope | None, *, average: bool = False) -> Callable[[Reverse], None]:
    """Return the gradient of a reduction; None: the sum, with ``average`` the mean."""

    def gradient(r: Reverse) -> None:
        t, axes = r.tape, _reduced(r)
        if axes is None:
            if slope is not None:
                raise NoGradient("reduces over no axis")
            r.send(0, r.dy)
            return
        dy = _with_reduced_axes(r, r.dy, axes)
        if slope is not None:
            r.send(0, t.mul(dy, slope(t, r.x, _with_reduced_axes(r, r.y, axes), axes)))
            return
        share = 1 / int(np.prod([r.shape(0)[k] for k in axes])) if average else 1
        r.send(0, t.broadcast(t.scale(dy, share), r.shape(0)))

    return gradient


def _shares_of_extreme(t: Tape, x: str, y: str, axes: Sequence[int]) -> str:
    """Return equal shares of all positions that hold the extreme."""
    hit = t.cast(t.compare("Equal", x, y), t.kinds[x])
    return t.div(hit, t.sum(hit, axes, keep=True))


def _safe(t: Tape, y: str) -> str:
    return t.emit("Max", [y, t.scalar(1e-30, y)], t.shape(y))


register_gradient("", "ReduceSum")(_reduction(None))
register_gradient("", "ReduceMean")(_reduction(None, average=True))
register_gradient("", "ReduceMax", "ReduceMin")(_reduction(_shares_of_extreme))
register_gradient("", "ReduceSumSquare")(_reduction(lambda t, x, y, axes: t.scale(x, 2)))
register_gradient("", "ReduceL1")(_reduction(lambda t, x, y, axes: t.unary("Sign", x)))
register_gradient("", "ReduceL2")(_reduction(lambda t, x, y, axes: t.div(x, _safe(t, y))))
register_gradient("", "ReduceProd")(_reduction(lambda t, x, y, axes: t.div(y, x)))
register_gradient("", "ReduceLogSumExp")(_reduction(lambda t, x, y, axes: t.unary("Exp", t.sub(x, y))))
register_gradient("", "ReduceLogSum")(
    _reduction(lambda t, x, y, axes: t.broadcast(t.unary("Exp", t.neg(y)), t.shape(x)))
)


@register_gradient("", "CumSum")
def cumulative_sum(r: Reverse) -> None:
    """Add up from the other end."""
    t = r.tape
    direction = 1 - int(r.attr("reverse", 0))
    value = t.emit(
        "CumSum", [r.dy, r.node.inputs[1]], r.shape(0), reverse=direction, exclusive=int(r.attr("exclusive", 0))
    )
    r.send(0, value)


@register_gradient("", "TopK")
def top_k(r: Reverse) -> None:
    """Give the gradient to the chosen positions."""
    t, axis = r.tape, r.attr("axis", -1) % len(r.shape(0))
    indices = t.output_of(r.node, 1, t.shape(r.y), np.int64)
    zeros = t.zeros(r.shape(0), t.kinds[r.x])
    r.send(0, t.emit("ScatterElements", [zeros, indices, r.dy], r.shape(0), axis=axis, reduction="add"))
