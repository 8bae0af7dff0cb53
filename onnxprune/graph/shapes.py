"""Shapes of a node's outputs for the frequent operators: what onnx's inference says, at a fraction of its cost.

onnx infers a single node by way of several protobuf messages. Exported models have thousands of nodes whose shapes only
follow once computed sizes are known, and a second binding of the dynamic sizes changes most activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxprune.graph.evaluate import slice_of
from onnxprune.graph.view import Node

Shape = tuple[int, ...]
Known = Callable[[int], "np.ndarray | None"]
"""Position of an input -> its value where that is known; None for an absent one too."""
Function = Callable[[Node, list[Shape], Known], "Sequence[Shape | None] | None"]


def output_shapes(node: Node, shapes: Sequence[Any], known: Known) -> list[Shape] | None:
    """Shapes of all outputs; None where this table cannot tell, or where the node makes no sense.

    Args:
        node: a node. shapes: of its inputs, None where absent. known: values of its inputs.
    """
    function = None if node.domain else _FUNCTIONS.get(node.op)
    if function is None:
        return None
    for shape, name in zip(shapes, node.inputs, strict=True):
        if (shape is None and name) or (shape is not None and None in shape):
            return None
    try:
        results = function(node, list(shapes), known)
    except (LookupError, TypeError, ValueError, ArithmeticError):  # a form of the operator that is not expected here
        return None
    if results is None or len(results) != len(node.outputs):
        return None
    whole = [s for s in results if s is not None and min(s, default=0) >= 0]
    return whole if len(whole) == len(results) else None


def _same(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    return [shapes[0]] * (len(node.outputs) if node.op == "Dropout" else 1)


def _broadcast(node: Node, shapes: list[Shape], known: Known) -> list[Shape] | None:
    if node.version < 8:  # operators of their own, with an attribute that says how they broadcast
        return None
    return [_join(*shapes)]


def _join(*shapes: Shape) -> Shape:
    """numpy's broadcasting; ValueError where shapes do not fit."""
    first = shapes[0]
    if shapes.count(first) == len(shapes):
        return first
    rank = max(map(len, shapes))
    sizes = zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True)
    result = []
    for column in sizes:
        wide = set(column) - {1}
        if len(wide) > 1:
            raise ValueError(column)
        result.append(wide.pop() if wide else 1)
    return tuple(result)


def _list(node: Node, known: Known, position: int, name: str, since: int) -> list[int] | None:
    """Numbers that are an operand from opset ``since`` on and an attribute before; None where there are none.

    Raises:
        ValueError: the operand is there, its value is not known.
    """
    if node.version < since:
        given = node.attrs.get(name)
        return None if given is None else list(given)
    if len(node.inputs) <= position or not node.inputs[position]:
        return None
    value = known(position)
    if value is None:
        raise ValueError(name)
    return [int(v) for v in value.ravel()]


def _must(value: list[int] | None) -> list[int]:
    if value is None:
        raise ValueError("a needed operand is absent")
    return value


def _reshape(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    source, target = shapes[0], _must(_list(node, known, 1, "shape", 5))
    if not node.attrs.get("allowzero", 0):
        target = [source[i] if d == 0 else d for i, d in enumerate(target)]
    rest = math.prod(d for d in target if d != -1)
    if target.count(-1) == 1 and math.prod(source) % rest == 0:
        target[target.index(-1)] = math.prod(source) // rest
    if math.prod(target) != math.prod(source):
        raise ValueError(target)
    return [tuple(target)]


def _transpose(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    perm = node.attrs.get("perm")
    return [shapes[0][::-1] if perm is None else tuple(shapes[0][p] for p in perm)]


def _matmul(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    a, b = shapes
    left, right = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    if left[-1] != right[-2]:
        raise ValueError(shapes)
    outer = _join(left[:-2], right[:-2])
    return [(*outer, *left[-2:-1][: len(a) - 1], *right[-1:][: len(b) - 1])]


def _gemm(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    a, b = shapes[0], shapes[1]
    return [(a[1 if node.attrs.get("transA", 0) else 0], b[0 if node.attrs.get("transB", 0) else 1])]


def _unsqueeze(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    axes = _must(_list(node, known, 1, "axes", 13))
    rank = len(shapes[0]) + len(axes)
    new, sizes = {_axis(a, rank) for a in axes}, iter(shapes[0])
    if len(new) != len(axes):
        raise ValueError(axes)
    return [tuple(1 if i in new else next(sizes) for i in range(rank))]


def _squeeze(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    axes, shape = _list(node, known, 1, "axes", 13), shapes[0]
    gone = {i for i, n in enumerate(shape) if n == 1} if axes is None else {_axis(a, len(shape)) for a in axes}
    if any(shape[a] != 1 for a in gone):
        raise ValueError(axes)
    return [tuple(n for i, n in enumerate(shape) if i not in gone)]


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(axis)
    return axis % rank


def _concat(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    first = shapes[0]
    axis = _axis(node.attrs["axis"] if node.version >= 4 else node.attrs.get("axis", 1), len(first))
    if any((*s[:axis], *s[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]) for s in shapes):
        raise ValueError(shapes)
    return [(*first[:axis], sum(s[axis] for s in shapes), *first[axis + 1 :])]


def _slice(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    starts, ends = (_must(_list(node, known, i, n, 10)) for i, n in ((1, "starts"), (2, "ends")))
    axes = _list(node, known, 3, "axes", 10) or list(range(len(starts)))
    steps = (None if node.version < 10 else _list(node, known, 4, "steps", 10)) or [1] * len(starts)
    result = list(shapes[0])
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        a = _axis(axis, len(result))
        result[a] = len(range(*slice_of(start, end, step, shapes[0][a]).indices(shapes[0][a])))
    return [tuple(result)]


def _gather(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    axis = _axis(node.attrs.get("axis", 0), len(shapes[0]))
    return [(*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1 :])]


def _shape(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    return [(len(shapes[0][node.attrs.get("start", 0) : node.attrs.get("end", len(shapes[0]))]),)]


def _expand(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    return [_join(shapes[0], tuple(_must(_list(node, known, 1, "", 1))))]


def _tile(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    repeats = _must(_list(node, known, 1, "", 6))
    return [tuple(n * r for n, r in zip(shapes[0], repeats, strict=True))]


def _constant_of_shape(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    return [tuple(_must(_list(node, known, 0, "", 1)))]


def _split(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    axis, count = _axis(node.attrs.get("axis", 0), len(shapes[0])), len(node.outputs)
    whole = shapes[0][axis]
    sizes = _list(node, known, 1, "split", 13)
    if sizes is None:
        if whole % count and node.version < 18:
            raise ValueError(whole)
        part = -(-whole // count)
        sizes = [part] * (count - 1) + [whole - part * (count - 1)]
    if sum(sizes) != whole:
        raise ValueError(sizes)
    return [(*shapes[0][:axis], n, *shapes[0][axis + 1 :]) for n in sizes]


def _flatten(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    axis, rank = node.attrs.get("axis", 1), len(shapes[0])
    axis = axis + rank if axis < 0 else axis
    if not 0 <= axis <= rank:
        raise ValueError(axis)
    return [(math.prod(shapes[0][:axis]), math.prod(shapes[0][axis:]))]


def _reduce(since: int) -> Function:
    """A reduction whose axes are an operand from an opset on."""

    def run(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
        shape = shapes[0]
        axes = _list(node, known, 1, "axes", since)
        if not axes:
            if node.version >= since and node.attrs.get("noop_with_empty_axes", 0):
                return [shape]
            axes = list(range(len(shape)))
        gone = {_axis(a, len(shape)) for a in axes}
        if node.attrs.get("keepdims", 1):
            return [tuple(1 if i in gone else n for i, n in enumerate(shape))]
        return [tuple(n for i, n in enumerate(shape) if i not in gone)]

    return run


def _global_pool(node: Node, shapes: list[Shape], known: Known) -> list[Shape]:
    return [(*shapes[0][:2], *(1,) * (len(shapes[0]) - 2))]


def _windows(node: Node, shape: Shape, kernel: Sequence[int]) -> Shape | None:
    """Spatial sizes of what a window slides over; None for forms in which padding follows from other settings."""
    attrs, n = node.attrs, len(shape) - 2
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or attrs.get("ceil_mode", 0) or len(kernel) != n:
        return None
    pads, strides = attrs.get("pads", [0] * 2 * n), attrs.get("strides", [1] * n)
    steps = attrs.get("dilations", [1] * n)
    extents = [shape[2 + i] + pads[i] + pads[n + i] - steps[i] * (kernel[i] - 1) - 1 for i in range(n)]
    return tuple([extent // stride + 1 for extent, stride in zip(extents, strides, strict=True)])


def _conv(node: Node, shapes: list[Shape], known: Known) -> list[Shape] | None:
    x, w = shapes[0], shapes[1]
    spatial = _windows(node, x, node.attrs.get("kernel_shape", w[2:]))
    if spatial is None or len(w) != len(x) or w[1] * node.attrs.get("group", 1) != x[1]:
        return None
    return [(x[0], w[0], *spatial)]


def _pool(node: Node, shapes: list[Shape], known: Known) -> list[Shape] | None:
    spatial = _windows(node, shapes[0], node.attrs["kernel_shape"])
    return None if spatial is None else [(*shapes[0][:2], *spatial)] * len(node.outputs)


def _pad(node: Node, shapes: list[Shape], known: Known) -> list[Shape] | None:
    pads = _must(_list(node, known, 1, "pads", 11))
    rank = len(shapes[0])
    axes = (_list(node, known, 3, "", 1) if node.version >= 18 else None) or list(range(rank))
    result = list(shapes[0])
    for k, axis in enumerate(axes):
        result[_axis(axis, rank)] += pads[k] + pads[k + len(axes)]
    return [tuple(result)] if len(pads) == 2 * len(axes) else None


_SAME = """Abs Acos Asin Atan BatchNormalization Cast Ceil Celu Clip Cos CumSum Dropout Elu Erf Exp Floor Gelu
GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization
LeakyRelu Log LogSoftmax MeanVarianceNormalization Mish Neg Not PRelu QuantizeLinear DequantizeLinear
RMSNormalization Reciprocal Relu Round ScatterElements ScatterND Selu Sigmoid Sign Sin Softmax Softplus Softsign Sqrt
Swish Tan Tanh ThresholdedRelu Trilu""".split()
_JOINED = """Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
Mul Or Pow Sub Sum Where Xor""".split()
_LATE = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"

_FUNCTIONS: dict[str, Function] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_JOINED, _broadcast),
    **dict.fromkeys(_LATE.split(), _reduce(18)),
    "ReduceSum": _reduce(13),
    "Reshape": _reshape,
    "Transpose": _transpose,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Shape": _shape,
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _constant_of_shape,
    "Split": _split,
    "Flatten": _flatten,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Conv": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Pad": _pad,
}
