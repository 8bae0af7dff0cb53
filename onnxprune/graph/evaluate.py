"""Evaluate one node on known small values: shape arithmetic, index tables, scalars.

The frequent operators are a table of numpy functions; the others go through onnx's reference evaluator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnxprune.graph.view import CONTROL, Node

# Before opset 13 these ran over all axes from theirs on, which the evaluator does not know.
_COERCING = {"Softmax", "LogSoftmax", "Hardmax"}

Values = list["np.ndarray | None"]
Function = Callable[[Node, Values], Any]

# Nodes that must not be folded although all their inputs are known: their result is not a function of their inputs.
RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
    "Dropout",
}


def _given(values: Values, i: int) -> np.ndarray:
    """An input that the operator always has."""
    value = values[i]
    assert value is not None
    return value


def _axes(node: Node, values: Values, position: int = 1) -> tuple[int, ...] | None:
    given = values[position] if len(values) > position else None
    if given is not None:
        return tuple(_numbers(given))
    axes = node.attrs.get("axes")
    return None if axes is None else tuple(axes)


def _numbers(value: np.ndarray) -> list[int]:
    """A scalar or a vector of integers as Python's numbers, with which a handful is computed faster."""
    return [int(n) for n in value.ravel().tolist()]


def _unsqueeze(node: Node, values: Values) -> np.ndarray:
    axes = _axes(node, values) or ()
    data = values[0]
    assert data is not None
    rank = data.ndim + len(axes)
    new = {a % rank for a in axes}
    sizes = iter(data.shape)
    return data.reshape([1 if i in new else next(sizes) for i in range(rank)])


def _reshape(node: Node, values: Values) -> np.ndarray:
    data, target = values[0], values[1]
    assert data is not None and target is not None
    zero = not node.attrs.get("allowzero", 0)
    return data.reshape([data.shape[i] if (d == 0 and zero) else d for i, d in enumerate(_numbers(target))])


def _slice(node: Node, values: Values) -> np.ndarray:
    data = values[0]
    assert data is not None
    if node.version < 10:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes", range(len(starts))), [1] * len(starts)
    else:
        padded = [*values, None, None, None, None][:5]
        starts, ends = _numbers(_given(values, 1)), _numbers(_given(values, 2))
        axes = range(len(starts)) if padded[3] is None else _numbers(padded[3])
        steps = [1] * len(starts) if padded[4] is None else _numbers(padded[4])
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice_of(start, end, step, data.shape[axis])
    return data[tuple(index)]


def slice_of(start: int, end: int, step: int, size: int) -> slice:
    """ONNX's clamped slice along an axis of ``size`` as a Python slice."""
    if step > 0:
        return slice(*slice(start, end, step).indices(size))
    start = max(0, min(start + size if start < 0 else start, size - 1))
    end = max(end + size if -size <= end < 0 else end, -1) if end >= -size else -1
    return slice(start, None if end < 0 else end, step)


def _gather(node: Node, values: Values) -> np.ndarray:
    data, indices = values[0], values[1]
    assert data is not None and indices is not None
    return data.take(indices.astype(np.int64, copy=False), axis=node.attrs.get("axis", 0))


def _divide(node: Node, values: Values) -> np.ndarray:
    a, b = values[0], values[1]
    assert a is not None and b is not None
    if a.dtype.kind in "iu":
        return np.asarray(np.trunc(a / b) if a.dtype.kind == "i" else a // b).astype(a.dtype)
    return np.asarray(a / b)


def _cast(node: Node, values: Values) -> np.ndarray:
    assert values[0] is not None
    return values[0].astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))


def _constant_of_shape(node: Node, values: Values) -> np.ndarray:
    fill = node.attrs.get("value", np.zeros(1, np.float32))
    assert values[0] is not None
    return np.full([int(d) for d in values[0]], np.ravel(fill)[0], dtype=fill.dtype)


def _reduce(function: Callable[..., Any]) -> Function:
    def run(node: Node, values: Values) -> np.ndarray:
        axes = _axes(node, values)
        if axes is None and node.attrs.get("noop_with_empty_axes", 0):
            return values[0]  # type: ignore[return-value]
        return np.asarray(function(values[0], axis=axes, keepdims=bool(node.attrs.get("keepdims", 1))))

    return run


def _plain(function: Callable[..., Any]) -> Function:
    return lambda node, values: function(*values)


def _split(node: Node, values: Values) -> list[np.ndarray]:
    data = values[0]
    assert data is not None
    axis = node.attrs.get("axis", 0)
    sizes = np.asarray(values[1]) if len(values) > 1 and values[1] is not None else node.attrs.get("split")
    if sizes is None:
        count = len(node.outputs)
        chunk = -(-data.shape[axis] // count)
        sizes = [chunk] * (count - 1) + [data.shape[axis] - chunk * (count - 1)]
    return list(np.split(data, np.cumsum(sizes)[:-1], axis=axis))


def _power(node: Node, values: Values) -> np.ndarray:
    base = _given(values, 0)
    return np.asarray(np.power(base, _given(values, 1))).astype(base.dtype)


def _scatter(node: Node, values: Values) -> Any:
    """ScatterND: slices of a copy replaced; forms that combine old and new are left to onnx's evaluator."""
    result, where = np.array(_given(values, 0)), _given(values, 1)
    if node.attrs.get("reduction", "none") != "none" or where.shape[-1] == 0:
        return _reference(node, values)
    result[tuple(np.moveaxis(where, -1, 0))] = _given(values, 2)
    return result


FUNCTIONS: dict[str, Function] = {
    "Identity": _plain(lambda x: x),
    "Cast": _cast,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda n, v: np.squeeze(_given(v, 0), axis=_axes(n, v)),
    "Concat": lambda n, v: np.concatenate([_given(v, i) for i in range(len(v))], axis=n.attrs["axis"]),
    "Slice": _slice,
    "Reshape": _reshape,
    "Transpose": lambda n, v: np.transpose(_given(v, 0), n.attrs.get("perm")),
    "Add": _plain(np.add),
    "Sub": _plain(np.subtract),
    "Mul": _plain(np.multiply),
    "Div": _divide,
    "Pow": _power,
    "ScatterND": _scatter,
    "Mod": lambda n, v: (np.fmod if n.attrs.get("fmod", 0) else np.mod)(_given(v, 0), _given(v, 1)),
    "Neg": _plain(np.negative),
    "Sqrt": _plain(np.sqrt),
    "Floor": _plain(np.floor),
    "Ceil": _plain(np.ceil),
    "Reciprocal": _plain(lambda x: np.asarray(1 / x, dtype=x.dtype)),
    "Equal": _plain(np.equal),
    "Less": _plain(np.less),
    "Greater": _plain(np.greater),
    "GreaterOrEqual": _plain(np.greater_equal),
    "LessOrEqual": _plain(np.less_equal),
    "And": _plain(np.logical_and),
    "Or": _plain(np.logical_or),
    "Not": _plain(np.logical_not),
    "Where": _plain(np.where),
    "Range": _plain(lambda a, b, c: np.arange(a.item(), b.item(), c.item(), dtype=a.dtype)),
    "ConstantOfShape": _constant_of_shape,
    "Expand": _plain(lambda x, s: np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(d) for d in s)))),
    "Tile": _plain(lambda x, r: np.tile(x, [int(d) for d in r])),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Split": _split,
}


# What is computed may have so many elements, or so many times those that it is computed from.
_MOST, _TIMES = 1 << 22, 16
_JOINING = frozenset("Add Sub Mul Div Pow Mod Equal Less Greater GreaterOrEqual LessOrEqual And Or Where".split())


def _elements(node: Node, values: Values) -> int:
    """How many elements a node would give, by what it is told; 0 where it gives no more than it gets."""
    shapes: list[tuple[int, ...]] = [v.shape for v in values if v is not None]
    if node.op not in FUNCTIONS or node.domain:
        return _inferred_elements(node, values)
    if node.op in _JOINING:
        return math.prod(np.broadcast_shapes(*shapes))
    if node.op == "Range":
        start, end, step = (float(_given(values, i).item()) for i in range(3))
        return math.ceil(max((end - start) / step, 0)) if step else 0
    if node.op == "ConstantOfShape":
        return math.prod(_numbers(_given(values, 0)))
    if node.op == "Expand":
        return math.prod(np.broadcast_shapes(shapes[0], tuple(_numbers(_given(values, 1)))))
    if node.op == "Tile":
        return math.prod(shapes[0]) * math.prod(_numbers(_given(values, 1)))
    if node.op == "Gather":
        axis = int(node.attrs.get("axis", 0))
        return math.prod(shapes[0]) // max(shapes[0][axis], 1) * math.prod(shapes[1])
    return 0


def _inferred_elements(node: Node, values: Values) -> int:
    """What onnx infers of a node; where that is nothing, the largest number that the node reads as an integer."""
    types, data = {}, {}
    for name, value in zip(node.inputs, values, strict=True):
        if name and value is not None:
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            types[name] = onnx.helper.make_tensor_type_proto(kind, value.shape)
            if value.size <= _OPERAND:
                data[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
    schema = onnx.defs.get_schema(node.op, node.version, node.domain)
    opset = onnx.helper.make_opsetid(node.domain, node.version)
    found = onnx.shape_inference.infer_node_outputs(schema, node.proto, types, data, opset_imports=[opset])
    dims = [kind.tensor_type.shape.dim for kind in found.values() if kind.tensor_type.HasField("shape")]
    if len(dims) == len([o for o in node.outputs if o]) and all(d.HasField("dim_value") for s in dims for d in s):
        return max((math.prod(int(d.dim_value) for d in s) for s in dims), default=0)
    integers = [int(v.max()) for v in values if v is not None and v.size and v.dtype.kind in "iu"]
    return max(integers, default=0)


_OPERAND = 1 << 10  # elements of what may say a shape


def evaluate(node: Node, values: Values) -> list[np.ndarray] | None:
    """Outputs of ``node`` on known inputs, None for an absent optional one; None where it cannot be evaluated."""
    # An empty sequence is no array.
    if node.op in RANDOM or node.op in CONTROL or node.op == "SequenceEmpty":
        return None
    function = FUNCTIONS.get(node.op) if node.domain == "" else None
    try:
        if _elements(node, values) > max(_MOST, _TIMES * sum(v.size for v in values if v is not None)):
            return None
        with np.errstate(all="ignore"):
            if function is not None:
                result = function(node, values)
                return result if isinstance(result, list) else [np.asarray(result)]
            return _reference(node, values)
    except Exception:  # any failure only means that the value stays unknown, which costs compression at most
        return None


def _reference(node: Node, values: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
    if node.domain != "" or (node.op in _COERCING and node.version < 13):
        return None
    # A model around the node: for a lone node the evaluator takes the newest form, whatever opset it is told.
    feeds = {name: value for name, value in zip(node.inputs, values, strict=True) if name and value is not None}
    inputs, outputs = ([onnx.ValueInfoProto(name=n) for n in names] for names in (feeds, filter(None, node.outputs)))
    graph = onnx.helper.make_graph([node.proto], "node", inputs, outputs)
    opset = onnx.helper.make_opsetid("", node.version)
    results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(None, feeds)
    found = iter(results)
    return [np.asarray(next(found)) if name else np.zeros(0) for name in node.outputs]
