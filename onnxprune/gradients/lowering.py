"""Depthwise convolutions as matrix products: with weights that change, onnxruntime computes them far faster so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from onnxprune.gradients.static import StaticGraph
from onnxprune.gradients.tape import Tape
from onnxprune.graph.view import Node

_WIDEST = 64
"""Columns of the data up to which a product with a banded matrix per kernel row costs less than a convolution."""
_SMALL = 160
"""Positions of the data up to which one product with a banded matrix over all of them costs less still."""


def lowered(graph: StaticGraph) -> StaticGraph:
    """Return the graph with depthwise convolutions over two axes written as products with banded matrices.

    Output row i of a channel is the sum over kernel rows of input row i * stride + row * dilation, times a matrix
    [columns, output columns] that has the kernel's weights along its diagonals. Values are the same up to rounding.
    """
    if not any(_is_depthwise(graph, node) for node in graph.nodes):
        return graph
    tape = Tape(graph.shapes, graph.kinds, "depthwise")
    start = 1 + max(node.index for node in graph.nodes)
    nodes: list[Node] = []
    for node in graph.nodes:
        if not _is_depthwise(graph, node):
            nodes.append(node)
            continue
        first = len(tape.nodes)
        _emit(tape, node, graph.shapes[node.inputs[1]][2:])
        opset = graph.opsets.get("", 1)
        for k, proto in enumerate(tape.nodes[first:], first):
            names = list(proto.input), list(proto.output)
            nodes.append(Node(start + k, proto.op_type, "", opset, proto.name, *names, proto))
    return replace(
        graph,
        nodes=nodes,
        constants={**graph.constants, **tape.constants},
        shapes=tape.shapes,
        kinds=tape.kinds,
        producer={},
        readers={},
    )


def _is_depthwise(graph: StaticGraph, node: Node) -> bool:
    """Return whether a node convolves every channel by itself, narrow enough for banded matrices."""
    if node.op != "Conv" or node.domain:
        return False
    data, weight = graph.shapes[node.inputs[0]], graph.shapes[node.inputs[1]]
    group = int(node.attrs.get("group", 1))
    alone = len(data) == 4 and data[1] == weight[0] == group > 1 and weight[1] == 1
    return alone and data[3] <= _WIDEST and weight[3] > 1 and graph.kinds[node.inputs[0]] in (np.float32, np.float64)


def _emit(t: Tape, node: Node, kernel: Sequence[int]) -> None:
    """Emit the nodes in place of one convolution; the last one gives its output."""
    shape, out = t.shape(node.inputs[0]), t.shape(node.outputs[0])
    (_emit_whole if max(shape[2] * shape[3], out[2] * out[3]) <= _SMALL else _emit_by_rows)(t, node, kernel)


def _emit_whole(t: Tape, node: Node, kernel: Sequence[int]) -> None:
    """Emit one product per channel: [images, positions] times a banded matrix [positions, output positions]."""
    (images, channels, *size), out = t.shape(node.inputs[0]), t.shape(node.outputs[0])
    bands = [_band(node, kernel, size, out[2:], axis) for axis in (0, 1)]
    band = np.einsum("kab,lcd->klacbd", *bands).reshape(kernel[0] * kernel[1], -1).astype(t.kinds[node.inputs[1]])
    weight = t.reshape(node.inputs[1], (channels, kernel[0] * kernel[1]))
    matrix = t.reshape(t.matmul(weight, t.constant(band)), (channels, size[0] * size[1], out[2] * out[3]))
    data = t.transpose(t.reshape(node.inputs[0], (images, channels, size[0] * size[1])), (1, 0, 2))
    value = _shifted(t, node, t.matmul(data, matrix), channels)
    value = t.transpose(value, (1, 0, 2))
    t.nodes.append(onnx.helper.make_node("Reshape", [value, t.integers(out)], [node.outputs[0]], f"{value}.shape"))


def _shifted(t: Tape, node: Node, value: str, channels: int) -> str:
    """Return a value [channels, rows, columns] with the bias, where there is one."""
    if len(node.inputs) < 3 or not node.inputs[2]:
        return value
    return t.add(value, t.reshape(node.inputs[2], (channels, 1, 1)))


def _band(node: Node, kernel: Sequence[int], size: Sequence[int], out: Sequence[int], axis: int) -> np.ndarray:
    """Return the position that each output position reads at each kernel position, [kernel, positions, outputs]."""
    before = _pads_before(node, kernel, size, out)[axis]
    stride, dilation = (node.attrs.get(name, [1, 1])[axis] for name in ("strides", "dilations"))
    band = np.zeros((kernel[axis], size[axis], out[axis]), np.float32)
    for k in range(kernel[axis]):
        at = np.arange(out[axis]) * stride + k * dilation - before
        inside = (at >= 0) & (at < size[axis])
        band[k, at[inside], np.flatnonzero(inside)] = 1
    return band


def _emit_by_rows(t: Tape, node: Node, kernel: Sequence[int]) -> None:
    """Emit one product per channel and kernel row: [output rows, columns] times a banded matrix."""
    x, weight, y = node.inputs[0], node.inputs[1], node.outputs[0]
    (images, channels, rows, columns), out = t.shape(x), t.shape(y)
    strides, dilations = node.attrs.get("strides", [1, 1]), node.attrs.get("dilations", [1, 1])
    before = _pads_before(node, kernel, (rows, columns), out[2:])
    lines = t.reshape(t.transpose(x, (1, 2, 0, 3)), (channels, rows, images * columns))
    reach = (out[2] - 1) * strides[0] + (kernel[0] - 1) * dilations[0] + 1
    lines = t.pad(lines, [0, before[0], 0], [0, reach - rows - before[0], 0])
    band = _band(node, kernel, (rows, columns), out[2:], 1).astype(t.kinds[weight])
    flat = t.constant(band.reshape(kernel[1], columns * out[3]))
    bands = t.matmul(t.reshape(weight, (channels, *kernel)), flat)
    parts = []
    for row in range(kernel[0]):
        first = row * dilations[0]
        read = t.slice(lines, [first], [first + (out[2] - 1) * strides[0] + 1], [1], [strides[0]])
        matrix = t.reshape(t.slice(bands, [row], [row + 1], [1]), (channels, columns, out[3]))
        parts.append(t.matmul(t.reshape(read, (channels, out[2] * images, columns)), matrix))
    value = parts[0] if len(parts) == 1 else t.emit("Sum", parts, t.shape(parts[0]))
    value = t.reshape(_shifted(t, node, value, channels), (channels, out[2], images, out[3]))
    t.nodes.append(onnx.helper.make_node("Transpose", [value], [y], f"{y}.transpose", perm=(2, 0, 1, 3)))


def _pads_before(node: Node, kernel: Sequence[int], rows: Sequence[int], out: Sequence[int]) -> list[int]:
    """Return the padding in front of both axes."""
    strides, dilations = node.attrs.get("strides", [1, 1]), node.attrs.get("dilations", [1, 1])
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (n - 1) * s + (k - 1) * d + 1 - size)
            for n, s, k, d, size in zip(out, strides, kernel, dilations, rows, strict=True)
        ]
        return [n // 2 if auto == "SAME_UPPER" else n - n // 2 for n in total]
    return [0, 0] if auto == "VALID" else list(node.attrs.get("pads", [0] * 4))[:2]
