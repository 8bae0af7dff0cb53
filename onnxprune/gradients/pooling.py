"""Gradients of pooling and of resizing: linear operators are matrices per axis, which the operator itself gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx

from onnxprune.gradients.tape import Array, NoGradient, Reverse, Tape
from onnxprune.operators.registry import register_gradient
from onnxprune.runtime.sessions import open_session, run


@register_gradient("", "GlobalAveragePool")
def global_average(r: Reverse) -> None:
    """Every position gets its share."""
    r.send(0, r.tape.broadcast(r.tape.scale(r.dy, 1 / prod(r.shape(0)[2:])), r.shape(0)))


@register_gradient("", "GlobalMaxPool")
def global_maximum(r: Reverse) -> None:
    """Positions that hold the maximum share the gradient."""
    t = r.tape
    hit = t.cast(t.compare("Equal", r.x, r.y), t.kinds[r.x])
    count = t.sum(hit, range(2, len(r.shape(0))), keep=True)
    r.send(0, t.mul(hit, t.div(r.dy, count)))


@register_gradient("", "MaxPool")
def maximum(r: Reverse) -> None:
    """Gradients are added up at the positions that the operator itself names."""
    t, shape = r.tape, r.shape(0)
    if r.attr("storage_order", 0):
        raise NoGradient("numbers positions by column")
    indices = t.output_of(r.node, 1, t.shape(r.y), np.int64)
    flat = (prod(t.shape(r.y)),)
    operands = [t.zeros((prod(shape),), t.kinds[r.x]), t.reshape(indices, flat), t.reshape(r.dy, flat)]
    r.send(0, t.reshape(t.emit("ScatterElements", operands, (prod(shape),), axis=0, reduction="add"), shape))


@register_gradient("", "AveragePool")
def average(r: Reverse) -> None:
    """Multiply by a matrix per axis, of shares with padding, dilations and ceil_mode as the operator gives them."""
    t, shape, out = r.tape, r.shape(0), r.tape.shape(r.y)
    attrs, value = r.node.attrs, r.dy
    rank = len(shape) - 2
    for k in range(rank):
        attributes: dict[str, Any] = {
            name: [attrs[name][k]] for name in ("kernel_shape", "strides", "dilations") if name in attrs
        }
        attributes |= {name: attrs[name] for name in ("auto_pad", "ceil_mode", "count_include_pad") if name in attrs}
        if "pads" in attrs:
            attributes["pads"] = [attrs["pads"][k], attrs["pads"][rank + k]]
        size = shape[2 + k]
        node = onnx.helper.make_node("AveragePool", ["x"], ["y"], **attributes)
        matrix = _response(node, np.eye(size, dtype=np.float32)[:, None], {}, r.node.version)[:, 0]
        if matrix.shape != (size, out[2 + k]):
            raise NoGradient("has windows that depend on each other")
        value = _apply(t, value, 2 + k, matrix)
    r.send(0, value)


def _response(node: onnx.NodeProto, x: Array, constants: Mapping[str, Array], opset: int) -> Array:
    """Return the output of a node on an input, by onnxruntime."""
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for name, v in (("x", x), *constants.items())}
    graph = onnx.helper.make_graph(
        [node],
        "response",
        [onnx.helper.make_tensor_value_info("x", kinds["x"], x.shape)],
        [onnx.ValueInfoProto(name="y")],
        [onnx.numpy_helper.from_array(v, name) for name, v in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid(node.domain, opset)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return run(open_session(model.SerializeToString(), threads=1), {"x": x})["y"]


def _apply(t: Tape, x: str, axis: int, matrix: Array) -> str:
    """Multiply x along an axis by a matrix [size of the result, size of x]."""
    shape = t.shape(x)
    weights = np.asarray(matrix, t.kinds[x])
    new = (*shape[:axis], matrix.shape[0], *shape[axis + 1 :])
    if axis == len(shape) - 1:
        return t.matmul(x, t.constant(weights.T))
    flat = t.reshape(x, (*shape[: axis + 1], prod(shape[axis + 1 :])))
    return t.reshape(t.matmul(t.constant(weights), flat), new)


@register_gradient("", "Resize", "Upsample")
def resize(r: Reverse) -> None:
    """Linear and separable in every mode: a matrix per axis, found by resizing unit vectors."""
    t, shape, out = r.tape, r.shape(0), r.tape.shape(r.y)
    if r.attr("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise NoGradient("crops by a region of interest")
    if shape[0] != out[0]:
        raise NoGradient("resizes the first axis")
    scales = _scales(r)
    value = r.dy
    for axis in range(1, len(shape)):
        if scales[axis] == 1 and shape[axis] == out[axis]:
            continue
        unit = np.eye(shape[axis], dtype=np.float32)
        x = unit.reshape([shape[axis] if k in (0, axis) else 1 for k in range(len(shape))])
        response = _resized(r, x, axis, scales[axis], out[axis])
        value = _apply(t, value, axis, response.reshape(shape[axis], out[axis]))
    r.send(0, value)


def _scales(r: Reverse) -> Sequence[float | None]:
    """Return the factor of every axis, None where its size was given."""
    rank = len(r.shape(0))
    axes = [k % rank for k in r.attr("axes", range(rank))]
    position = 1 if r.node.op == "Upsample" else 2
    scales: list[float | None] = [1.0] * rank
    values = r.constant(position)
    if values is not None and values.size:
        for axis, scale in zip(axes, values.tolist(), strict=True):
            scales[axis] = float(scale)
    elif r.has(3):
        for axis in axes:
            scales[axis] = None
    else:
        raise NoGradient("has sizes that depend on data")
    return scales


def _resized(r: Reverse, x: Array, axis: int, scale: float | None, size: int) -> Array:
    """Resize an input along one axis as the node does."""
    attrs = {k: v for k, v in r.node.attrs.items() if k not in ("axes", "keep_aspect_ratio_policy")}
    rank = x.ndim
    if scale is not None:
        constants: dict[str, Array] = {
            "scales": np.asarray([scale if k == axis else 1 for k in range(rank)], np.float32)
        }
        names = ["x", "", "scales"] if r.node.op == "Resize" else ["x", "scales"]
    else:
        constants = {"sizes": np.asarray([size if k == axis else n for k, n in enumerate(x.shape)], np.int64)}
        names = ["x", "", "", "sizes"]
    node = onnx.helper.make_node(r.node.op, names, ["y"], **attrs)
    value = _response(node, x, constants, r.node.version)
    if attrs.get("extrapolation_value"):
        value = value - _response(node, np.zeros_like(x), constants, r.node.version)
    return value
