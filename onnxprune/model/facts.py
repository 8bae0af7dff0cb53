"""What is known before anything is cut: the shape of every tensor and the value of every small one, at the probe sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune.model.evaluate import evaluate
from onnxprune.model.graph import Graph, Node

Shape = "tuple[int | None, ...] | None"
# Operands that say what shape a result has, not what it holds.
_TARGETS = {("Reshape", 1), ("Expand", 1), ("Tile", 1), ("ConstantOfShape", 0), ("Resize", 3), ("Split", 1)}
INT_LIMIT, FLOAT_LIMIT = 1 << 20, 1 << 12
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
Infer = Callable[[Node, list[Any], list[Any]], "list[Any] | None"]
"""(node, shapes of its inputs, values of its inputs) -> shapes of its outputs: for operators that onnx does not know."""


class Values:
    """Values of small tensors, filled node by node in graph order; weights are read when first asked for."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[str, np.ndarray | None] = {}

    def get(self, name: str) -> np.ndarray | None:
        """The value of a tensor where it is known and small, else None."""
        if name in self._known:
            return self._known[name]
        weight = self._graph.weights.get(name)
        if weight is None or not small(weight.shape, weight.dtype):
            return None
        return self._known.setdefault(name, weight.read())

    def set(self, name: str, value: np.ndarray | None) -> None:
        """State (or forget, with None) the value of a tensor."""
        self._known[name] = value

    def step(self, node: Node, shapes: Mapping[str, Any]) -> None:
        """Evaluate ``node`` where its inputs are known; ``shapes`` serves Shape and Size."""
        if node.op in ("Shape", "Size") and node.domain == "":
            self._shape(node, shapes.get(node.inputs[0]))
            return
        if node.op == "Constant" and node.domain == "":
            return
        values = []
        for name in node.inputs:
            value = self.get(name) if name else None
            if name and value is None:
                return
            values.append(value)
        if any(not _fits(shapes.get(o)) for o in node.outputs if o):
            return
        results = evaluate(node, values)
        for name, value in zip(node.outputs, results or (), strict=False):
            if name and isinstance(value, np.ndarray) and small(value.shape, value.dtype):
                self._known[name] = value

    def _shape(self, node: Node, shape: Any) -> None:
        if shape is None:
            return
        if node.op == "Size":
            if None not in shape:
                self._known[node.outputs[0]] = np.asarray(int(np.prod(shape)), dtype=np.int64)
            return
        part = shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
        if None not in part:
            self._known[node.outputs[0]] = np.asarray(part, dtype=np.int64)


def small(shape: Sequence[int], dtype: np.dtype[Any]) -> bool:
    """Whether a tensor is small enough to be treated as a known value: integers up to 2^20 elements, floats up to 2^12."""
    size = _size(shape)
    return size <= (INT_LIMIT if dtype.kind in "iub" else FLOAT_LIMIT)


def _fits(shape: Any) -> bool:
    return shape is None or None in shape or _size(shape) <= INT_LIMIT


@dataclass(slots=True)
class Probe:
    """Shapes and values at one binding of the dynamic dimensions; a shape is None where even its rank is unknown."""

    inputs: dict[str, tuple[int, ...]]
    shapes: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    values: Values = None  # type: ignore[assignment]
    sizes: set[str] = field(default_factory=set)
    """Known tensors that were computed from the sizes of others, directly or not."""


@dataclass(slots=True)
class Facts:
    """The probes of a model; the first is the one that labels are pushed through."""

    probes: tuple[Probe, ...]

    def shape(self, name: str) -> Any:
        """Shape at the first probe: a tuple with None for data-dependent sizes, or None."""
        return self.probes[0].shapes.get(name)

    def value(self, name: str) -> np.ndarray | None:
        """Value at the first probe, where known."""
        return self.probes[0].values.get(name)

    def static_value(self, name: str) -> np.ndarray | None:
        """Value where it is known and the same at every probe."""
        value = self.value(name)
        if value is None or len(self.probes) == 1:
            return value
        other = self.probes[1].values.get(name)
        return value if other is not None and np.array_equal(value, other) else None

    def varies(self, name: str, axis: int) -> bool:
        """Whether the size of that axis differs between the probes, i.e. is dynamic."""
        if len(self.probes) == 1:
            return False
        first, second = self.probes[0].shapes.get(name), self.probes[1].shapes.get(name)
        return first is None or second is None or len(first) != len(second) or first[axis] != second[axis]


def study(
    graph: Graph, candidates: Iterable[Sequence[Mapping[str, tuple[int, ...]]]], infer: Infer | None = None
) -> Facts:
    """Shapes and values at the first candidate bindings that make sense for the graph (else at the very first).

    Args:
        candidates: one or two bindings {input: shape} each. A second one that makes no sense is left out.
        infer: asked where onnx has no schema.
    """
    first: Facts | None = None
    for bindings in candidates:
        probes = [_probe(graph, dict(binding), infer) for binding in bindings]
        if _plausible(graph, probes[0]):
            return Facts(tuple(p for p in probes if _plausible(graph, p)))
        first = first or Facts(tuple(probes))
    assert first is not None
    return first


def _plausible(graph: Graph, probe: Probe) -> bool:
    """Whether no reshape contradicts its input's size and no size is negative: else the graph cannot run like this."""
    for node in graph.nodes:
        shape = probe.shapes.get(node.outputs[0]) if node.outputs else None
        if shape is None or None in shape:
            continue
        if any(n < 0 for n in shape):
            return False
        if node.op == "Reshape" and node.domain == "":
            source = probe.shapes.get(node.inputs[0])
            if source is not None and None not in source and _size(source) != _size(shape):
                return False
    return True


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _probe(graph: Graph, inputs: dict[str, tuple[int, ...]], infer: Infer | None) -> Probe:
    probe = Probe(inputs=inputs, values=Values(graph))
    probe.shapes.update({name: weight.shape for name, weight in graph.weights.items()})
    _infer_whole(graph, probe)
    probe.shapes.update(inputs)
    for node in graph.nodes:
        probe.values.step(node, probe.shapes)
        if node.op in ("Shape", "Size") or any(
            name in probe.sizes and (node.op, i) not in _TARGETS for i, name in enumerate(node.inputs)
        ):
            probe.sizes.update(o for o in node.outputs if o and probe.values.get(o) is not None)
        for name in node.outputs:
            if not name:
                continue
            value = probe.values.get(name)
            if value is not None:
                probe.shapes[name] = value.shape
            elif probe.shapes.get(name) is None or None in probe.shapes[name]:
                _infer_node(graph, node, probe, infer)
                break
    return probe


def _infer_whole(graph: Graph, probe: Probe) -> None:
    """onnx's shape inference over the skeleton with the dynamic input dimensions bound."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    for declared in model.graph.input:
        if declared.name in probe.inputs:
            shape = declared.type.tensor_type.shape
            del shape.dim[:]
            for size in probe.inputs[declared.name]:
                shape.dim.add().dim_value = size
    stated = {i.name: i.type for i in [*model.graph.value_info, *model.graph.output]}
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # inference errors on odd graphs leave the node-by-node way
        return
    for info in [*model.graph.value_info, *model.graph.output]:
        _note(info.name, info.type, probe)
    for name, kind in stated.items():
        if probe.shapes.get(name) is None:
            _note(name, kind, probe)


def _note(name: str, kind: onnx.TypeProto, probe: Probe) -> None:
    tensor = kind.tensor_type
    if kind.WhichOneof("value") != "tensor_type":
        return
    probe.dtypes[name] = tensor.elem_type
    if tensor.HasField("shape"):
        probe.shapes[name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


def _infer_foreign(graph: Graph, node: Node, probe: Probe, infer: Infer) -> None:
    """Shapes of an operator that onnx does not know; its results have the type of its first input of floats."""
    shapes = [probe.shapes.get(name) if name else None for name in node.inputs]
    results = infer(node, shapes, [probe.values.get(name) if name else None for name in node.inputs])
    kinds = [probe.dtypes.get(name) or _dtype_of(graph, name) for name in node.inputs if name]
    kind = next((k for k in kinds if k in _FLOATS), kinds[0] if kinds else onnx.TensorProto.FLOAT)
    for name, shape in zip(node.outputs, results or (), strict=False):
        if name:
            probe.dtypes.setdefault(name, kind)
            if shape is not None:
                probe.shapes[name] = tuple(shape)


def _infer_node(graph: Graph, node: Node, probe: Probe, infer: Infer | None) -> None:
    """Inference of a single node from what is known by now: computed targets of Reshape, Expand, Slice and so on."""
    try:
        schema = onnx.defs.get_schema(node.op, node.version, node.domain)
    except onnx.defs.SchemaError:
        if infer is not None:
            _infer_foreign(graph, node, probe, infer)
        return
    types, data = {}, {}
    for name in node.inputs:
        if not name:
            continue
        kind = onnx.TypeProto()
        kind.tensor_type.elem_type = probe.dtypes.get(name) or _dtype_of(graph, name)
        shape = probe.shapes.get(name)
        if shape is not None:
            kind.tensor_type.shape.SetInParent()
            for size in shape:
                dim = kind.tensor_type.shape.dim.add()
                if size is not None:
                    dim.dim_value = size
        types[name] = kind
        value = probe.values.get(name)
        if value is not None:
            kind.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            data[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
    try:
        results = onnx.shape_inference.infer_node_outputs(
            schema, node.proto, types, data, opset_imports=list(graph.proto.opset_import), ir_version=graph.proto.ir_version
        )
    except Exception:  # a node that inference refuses keeps an unknown shape, and is frozen later with that reason
        return
    for name, kind in results.items():
        _note(name, kind, probe)


def _dtype_of(graph: Graph, name: str) -> int:
    weight = graph.weights.get(name)
    if weight is not None:
        return weight.onnx_type
    declared = next((i for i in graph.proto.graph.input if i.name == name), None)
    return declared.type.tensor_type.elem_type if declared is not None else onnx.TensorProto.FLOAT
