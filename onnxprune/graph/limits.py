"""How large tensors may be: a few bytes of a file can ask for more than any machine holds.

What a node would make is estimated before it is evaluated, before onnx propagates values, and before a model is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx
from onnx import TensorProto

from onnxprune.errors import ModelError, argument
from onnxprune.graph.values import Probe, size_of
from onnxprune.graph.view import Graph

MOST_ELEMENTS = 1 << 31
"""Elements that a tensor may have at the probe sizes, which are small."""
_COMPUTED, _TIMES = 1 << 26, 16
"""What is computed from constants alone may have so many, or so many times the elements of all weights."""
_RUNS = 1 << 26
# Vectors of this length are no shapes; onnx propagates each entry of one as an object.
_VECTOR = 1 << 20
# Constants from here on may make such vectors.
_SUSPICIOUS, _TO_THE_END = 1 << 12, (1 << 63) - 1


def check_extents(graph: Graph, probe: Probe) -> None:
    """Whether a machine can hold every tensor that the model makes, and run every node as often as it asks.

    Raises:
        ModelError: it cannot; names the node.
    """
    held = sum(size_of(weight.shape) for weight in graph.weights.values())
    constant: set[str] = set()
    for name, shape in probe.inputs.items():
        _check(f"input {name!r} has", shape, MOST_ELEMENTS)
    for node in graph.steps:
        if node.repeats > _RUNS:
            raise ModelError(
                f"node {node.label!r} ({node.kind}) would run {node.repeats:,} times in one run of the model",
                hint="The number of iterations of a Loop or Scan around it is wrong.",
            )
        computed = not node.domain and all(not n or n in constant or n in graph.weights for n in node.inputs)
        most = max(_COMPUTED, _TIMES * held) if computed else MOST_ELEMENTS
        for name in filter(None, node.outputs):
            if computed:
                constant.add(name)
            _check(f"node {node.label!r} ({node.op}) gives a tensor", probe.shapes.get(name), min(most, MOST_ELEMENTS))


def _check(what: str, shape: Sequence[int | None] | None, most: int) -> None:
    if shape is None or None in shape:
        return
    elements = size_of([int(n or 0) for n in shape])
    if elements >= most:
        raise ModelError(
            f"{what} the shape {list(shape)}: {elements:,} elements, where fewer than {most:,} are allowed",
            hint=f"The sizes in the file are wrong, or an {argument('input_shapes')} is too large.",
        )


def propagates(proto: onnx.ModelProto) -> bool:
    """Whether onnx can propagate values through a model for sure without filling the memory: no long vectors."""
    infos = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    shapes = (info.type.tensor_type.shape.dim for info in infos if info.type.HasField("tensor_type"))
    if any(len(dims) == 1 and dims[0].dim_value > _VECTOR for dims in shapes):
        return False
    return all(n <= _SUSPICIOUS or n == _TO_THE_END for n in _integers(proto.graph))


def _integers(graph: onnx.GraphProto) -> Iterator[int]:
    """The largest entry of every small constant of integers."""
    for tensor in _small_tensors(graph):
        if tensor.data_type in (TensorProto.INT64, TensorProto.INT32) and size_of(tensor.dims) <= 1024:
            try:
                value = onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError):  # its data do not fit
                continue
            if value.size:
                yield int(value.max())
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (max([a.i, *a.ints]) for a in node.attribute if a.name in ("value_int", "value_ints"))


def _small_tensors(graph: onnx.GraphProto) -> Iterable[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (a.t for a in node.attribute if a.name == "value")


def has_long_vectors(probe: Probe) -> bool:
    """Whether some vector is so long that onnx must not propagate its entries."""
    return any(s is not None and len(s) == 1 and (s[0] or 0) > _VECTOR for s in probe.shapes.values())
