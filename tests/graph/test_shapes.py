"""The table of shape functions says what onnx's own inference says, on random nodes of every operator in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.graph.shapes import output_shapes
from onnxprune.graph.view import Node

DRAWS = 40
Draw = np.random.Generator
Case = tuple[list[Any], dict[str, Any], int]
"""Inputs (a shape, or an array where the value is known), attributes, number of outputs."""


def shape(draw: Draw, low: int = 1, high: int = 4) -> list[int]:
    return draw.integers(1, 6, draw.integers(low, high + 1)).tolist()


def ints(values: Any) -> np.ndarray:
    return np.asarray(values, np.int64)


def same(draw: Draw, version: int) -> Case:
    return [shape(draw, 3)], {}, 1


def joined(draw: Draw, version: int) -> Case:
    full = shape(draw)
    other = [1 if draw.random() < 0.4 else n for n in full][draw.integers(0, len(full) + 1) :]
    pair = [full, other]
    return (pair if draw.random() < 0.5 else pair[::-1]), {}, 1


def where(draw: Draw, version: int) -> Case:
    (a, b), _, _ = joined(draw, version)
    return [a, b, []], {}, 1


def reshape(draw: Draw, version: int) -> Case:
    source = shape(draw)
    target = draw.permutation([*source, 1]).tolist()
    if draw.random() < 0.5:
        target[draw.integers(len(target))] = -1
    if draw.random() < 0.3:
        return [source, ints([0, -1])], {}, 1
    return [source, ints(target)], {}, 1


def transpose(draw: Draw, version: int) -> Case:
    source = shape(draw)
    return [source], {"perm": draw.permutation(len(source)).tolist()} if draw.random() < 0.7 else {}, 1


def matmul(draw: Draw, version: int) -> Case:
    m, k, n = draw.integers(1, 6, 3).tolist()
    outer = shape(draw, 0, 2)
    left, right = [*outer, m, k], [*outer[draw.integers(0, len(outer) + 1) :], k, n]
    if draw.random() < 0.2:
        left = [k]
    elif draw.random() < 0.2:
        right = [k]
    return [left, right], {}, 1


def gemm(draw: Draw, version: int) -> Case:
    m, k, n = draw.integers(1, 6, 3).tolist()
    a, b = draw.integers(0, 2, 2).tolist()
    return [[k, m] if a else [m, k], [n, k] if b else [k, n]], {"transA": a, "transB": b}, 1


def with_axes(axes: list[int], since: int, version: int, **attrs: Any) -> tuple[list[Any], dict[str, Any]]:
    return ([ints(axes)], attrs) if version >= since else ([], {"axes": axes, **attrs})


def unsqueeze(draw: Draw, version: int) -> Case:
    source = shape(draw, 0, 3)
    rank = len(source) + 2
    axes = draw.choice(rank, 2, replace=False) - (rank if version >= 11 and draw.random() < 0.5 else 0)
    more, attrs = with_axes(axes.tolist(), 13, version)
    return [source, *more], attrs, 1


def squeeze(draw: Draw, version: int) -> Case:
    source = [1, *shape(draw, 1, 3), 1]
    if draw.random() < 0.3:
        return [source], {}, 1
    more, attrs = with_axes([0, len(source) - 1], 13, version)
    return [source, *more], attrs, 1


def concat(draw: Draw, version: int) -> Case:
    source = shape(draw)
    axis = int(draw.integers(len(source)))
    other = [*source[:axis], 7, *source[axis + 1 :]]
    return [source, other], {"axis": axis - (len(source) if version >= 11 and draw.random() < 0.5 else 0)}, 1


def slices(draw: Draw, version: int) -> Case:
    source = shape(draw)
    n = int(draw.integers(1, len(source) + 1))
    axes = draw.permutation(len(source))[:n].tolist()
    starts, ends = draw.integers(-8, 9, (2, n)).tolist()
    if draw.random() < 0.3:
        ends = [2**31 - 1] * n
    if version < 10:  # before the first position onnx's own inference goes astray there
        starts = [max(s, -source[a]) for s, a in zip(starts, axes, strict=True)]
        return [source], {"starts": starts, "ends": ends, "axes": axes}, 1
    steps = draw.choice([-2, -1, 1, 2, 3], n).tolist()
    return [source, ints(starts), ints(ends), ints(axes), ints(steps)], {}, 1


def gather(draw: Draw, version: int) -> Case:
    source = shape(draw)
    return [source, ints(np.zeros(shape(draw, 0, 2)))], {"axis": int(draw.integers(len(source)))}, 1


def shape_of(draw: Draw, version: int) -> Case:
    return [shape(draw)], {"start": 1, "end": -1} if version >= 15 and draw.random() < 0.5 else {}, 1


def expand(draw: Draw, version: int) -> Case:
    (a, b), _, _ = joined(draw, version)
    return [a, ints(b)], {}, 1


def tile(draw: Draw, version: int) -> Case:
    source = shape(draw)
    return [source, ints(draw.integers(1, 4, len(source)))], {}, 1


def fill(draw: Draw, version: int) -> Case:
    return [ints(shape(draw))], {}, 1


def split(draw: Draw, version: int) -> Case:
    source = shape(draw)
    axis = int(draw.integers(len(source)))
    source[axis] = 6
    if draw.random() < 0.5:
        return [source], {"axis": axis, **({"num_outputs": 3} if version >= 18 else {})}, 3
    sizes = [1, 3, 2]
    return (
        ([source, ints(sizes)], {"axis": axis}, 3) if version >= 13 else ([source], {"axis": axis, "split": sizes}, 3)
    )


def flatten(draw: Draw, version: int) -> Case:
    source = shape(draw)
    low = -len(source) if version >= 11 else 0
    return [source], {"axis": int(draw.integers(low, len(source) + 1))}, 1


def reduce(since: int) -> Callable[[Draw, int], Case]:
    def run(draw: Draw, version: int) -> Case:
        source = shape(draw)
        keep = {"keepdims": int(draw.integers(2))}
        if draw.random() < 0.2:
            return [source], keep, 1
        axes = draw.permutation(len(source))[: draw.integers(1, len(source) + 1)].tolist()
        more, attrs = with_axes(axes, since, version, **keep)
        return [source, *more], attrs, 1

    return run


def window(draw: Draw) -> tuple[list[int], dict[str, Any]]:
    """Spatial sizes of an input and the attributes of a window over it."""
    n = int(draw.integers(1, 3))
    attrs = {"kernel_shape": draw.integers(1, 4, n).tolist(), "strides": draw.integers(1, 3, n).tolist()}
    pads = np.minimum(draw.integers(0, 3, 2 * n), np.tile(attrs["kernel_shape"], 2) - 1)
    return draw.integers(7, 12, n).tolist(), {**attrs, "pads": pads.tolist()}


def conv(draw: Draw, version: int) -> Case:
    spatial, attrs = window(draw)
    group = int(draw.integers(1, 3))
    weight = [4 * group, 3, *attrs["kernel_shape"]]
    if draw.random() < 0.5:
        attrs["dilations"] = [2] * len(spatial)
    if draw.random() < 0.2:
        attrs = {"auto_pad": "SAME_UPPER"}
    return [[2, 3 * group, *spatial], weight], {**attrs, "group": group}, 1


def pool(draw: Draw, version: int) -> Case:
    spatial, attrs = window(draw)
    if version >= 10 and draw.random() < 0.3:
        attrs["ceil_mode"] = 1
    return [[2, 3, *spatial]], attrs, 1


def pad(draw: Draw, version: int) -> Case:
    source = shape(draw)
    pads = draw.integers(0, 4, 2 * len(source)).tolist()
    return ([source, ints(pads)], {}, 1) if version >= 11 else ([source], {"pads": pads}, 1)


CASES: dict[str, tuple[tuple[int, ...], Callable[[Draw, int], Case]]] = {
    **dict.fromkeys("Relu Sqrt Softmax Identity Erf Clip Sigmoid Dropout Neg".split(), ((9, 13, 18), same)),
    **dict.fromkeys("Add Sub Mul Div Pow Less Max Min".split(), ((8, 13, 18), joined)),
    **dict.fromkeys("GlobalAveragePool GlobalMaxPool".split(), ((8, 18), same)),
    **dict.fromkeys("ReduceMean ReduceMax ReduceProd".split(), ((11, 13, 18), reduce(18))),
    "ReduceSum": ((11, 13, 18), reduce(13)),
    "Where": ((9, 16), where),
    "Reshape": ((5, 13, 18), reshape),
    "Transpose": ((7, 13), transpose),
    "MatMul": ((9, 13), matmul),
    "Gemm": ((11, 13), gemm),
    "Unsqueeze": ((8, 11, 13), unsqueeze),
    "Squeeze": ((8, 11, 13), squeeze),
    "Concat": ((8, 11, 13), concat),
    "Slice": ((9, 10, 13), slices),
    "Gather": ((8, 11, 13), gather),
    "Shape": ((13, 15), shape_of),
    "Expand": ((8, 13), expand),
    "Tile": ((6, 13), tile),
    "ConstantOfShape": ((9,), fill),
    "Split": ((11, 13, 18), split),
    "Flatten": ((9, 11, 13), flatten),
    "Conv": ((11,), conv),
    "MaxPool": ((8, 12), pool),
    "AveragePool": ((10, 11), pool),
    "Pad": ((10, 11, 18), pad),
}


def by_onnx(node: onnx.NodeProto, inputs: list[Any], version: int) -> list[tuple[int, ...]] | None:
    types, data = {}, {}
    for name, given in zip(node.input, inputs, strict=True):
        value = given if isinstance(given, np.ndarray) else None
        chooses = node.op_type == "Where" and name == node.input[0]
        kind = TensorProto.INT64 if value is not None else TensorProto.BOOL if chooses else TensorProto.FLOAT
        types[name] = helper.make_tensor_type_proto(kind, given if value is None else value.shape)
        if value is not None:
            data[name] = onnx.numpy_helper.from_array(value, name)
    schema = onnx.defs.get_schema(node.op_type, version, "")
    opset = [helper.make_opsetid("", version)]
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=opset, ir_version=8)
    except Exception:
        return None
    if not all(found[o].tensor_type.HasField("shape") for o in node.output):
        return None
    return [tuple(d.dim_value for d in found[o].tensor_type.shape.dim) for o in node.output]


def drawn(op: str) -> Iterator[tuple[Node, list[Any], int]]:
    versions, make = CASES[op]
    for version in versions:
        draw = np.random.default_rng([version, *op.encode()])
        for _ in range(DRAWS):
            inputs, attrs, outputs = make(draw, version)
            names = [f"x{i}" for i in range(len(inputs))]
            proto = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attrs)
            yield Node(0, op, "", version, "", names, list(proto.output), proto), inputs, version


@pytest.mark.parametrize("op", CASES)
def test_shapes_are_those_of_onnx(op: str) -> None:
    told = 0
    for node, inputs, version in drawn(op):
        sizes = [given.shape if isinstance(given, np.ndarray) else tuple(given) for given in inputs]
        known = [given if isinstance(given, np.ndarray) else None for given in inputs]
        mine, theirs = output_shapes(node, sizes, known.__getitem__), by_onnx(node.proto, inputs, version)
        if mine is not None and theirs is not None:  # where this table is silent, onnx is asked
            assert mine == theirs, (version, node.proto, sizes, known)
            told += 1
    assert told > DRAWS / 4


def test_what_is_not_known_is_left_to_onnx() -> None:
    proto = helper.make_node("Reshape", ["x", "target"], ["y"])
    node = Node(0, "Reshape", "", 13, "", ["x", "target"], ["y"], proto)
    target = ints([-1, 2])
    assert output_shapes(node, [(2, 6), (2,)], [None, target].__getitem__) == [(6, 2)]
    assert output_shapes(node, [(2, 6), (2,)], [None, None].__getitem__) is None
    assert output_shapes(node, [(2, None), (2,)], [None, target].__getitem__) is None
    assert output_shapes(node, [None, (2,)], [None, target].__getitem__) is None
    assert output_shapes(node, [(5, 5), (2,)], [None, target].__getitem__) is None
