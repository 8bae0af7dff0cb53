"""A graph at one size of its inputs: every shape is known, and tensors that depend on sizes alone are constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from onnxprune.errors import ModelError
from onnxprune.gradients.bodies import expand
from onnxprune.gradients.loops import unroll_loop
from onnxprune.gradients.recurrent import unroll
from onnxprune.gradients.tape import Array, Kind, Shape
from onnxprune.graph.resized import fitted, resized_of, text_of
from onnxprune.graph.view import Graph, Node
from onnxprune.io.constants import weight_from_constant
from onnxprune.io.weights import Weight
from onnxprune.io.write import assemble
from onnxprune.operators.registry import gradient_of
from onnxprune.runtime.sessions import Feed, open_session, run

OPSET = 18
"""Opset that gradients are written in; older models are converted, which changes no value."""


@dataclass(frozen=True, slots=True)
class StaticGraph:
    """A graph at one size of its inputs.

    Attributes:
        nodes: nodes that depend on inputs or variables, in order.
        inputs: inputs of the model, by name their value type and shape come from ``shapes``.
        outputs: outputs of the model.
        variables: names of weights that stay inputs of the computation.
        constants: values of all other tensors that nodes read.
        shapes: shape of every tensor; none for sequences.
        kinds: type of every tensor.
        opsets: opset by domain.
        ir_version: version of the file format.
        resized: record of the channels that inputs lost, as the model has it.
    """

    nodes: list[Node]
    inputs: list[str]
    outputs: list[str]
    variables: list[str]
    constants: dict[str, Array]
    shapes: dict[str, Shape]
    kinds: dict[str, Kind]
    opsets: dict[str, int]
    ir_version: int
    resized: str = ""
    producer: dict[str, Node] = field(default_factory=dict)
    readers: dict[str, list[tuple[Node, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.nodes:
            self.producer.update({o: node for o in node.outputs if o})
            for i, name in enumerate(node.inputs):
                if name:
                    self.readers.setdefault(name, []).append((node, i))

    def is_float(self, name: str) -> bool:
        """Return whether a tensor holds numbers that can have a gradient."""
        kind = self.kinds.get(name)
        return kind is not None and kind.kind in "fV"


def static_graph(proto: ModelProto, weights: Mapping[str, Weight], feed: Feed) -> StaticGraph:
    """Run a model once, and return its graph at the sizes of this call.

    Args:
        proto: the model.
        weights: its weights by name.
        feed: one call; gradients are for calls of this very size.

    Raises:
        ModelError: the model does not run, or cannot be converted to opset 18.
    """
    feed = fitted(resized_of(proto), feed)
    arrays = {name: weight.read() for name, weight in weights.items()}
    model = _converted(assemble(proto, weights))
    _lift_constants(model, arrays)
    for tensor in model.graph.initializer:
        arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
    values = _probe(model, arrays, feed)
    while _expand_bodies(model, values, arrays, feed):
        _lift_constants(model, arrays)
        values = _probe(model, arrays, feed)
    return _folded(model, arrays, values, feed, text_of(proto))


def _converted(model: ModelProto) -> ModelProto:
    """Return the model at opset 18 or newer, without intermediate shapes, which a fixed batch makes wrong."""
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=OPSET)
    del model.graph.value_info[:]
    initial = {tensor.name for tensor in model.graph.initializer}
    for value in [i for i in model.graph.input if i.name in initial]:
        model.graph.input.remove(value)
    if version >= OPSET:
        return model
    model.ir_version = max(model.ir_version, 8)
    try:
        converted = onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter's failures have no common base
        raise ModelError(
            f"The model cannot be converted from opset {version} to {OPSET}, which gradients need: {error}",
            hint="Export it again with opset 18 or newer.",
        ) from error
    del converted.graph.value_info[:]
    return converted


def _lift_constants(model: ModelProto, arrays: dict[str, Array]) -> None:
    """Turn Constant nodes into initializers."""
    nodes = list(model.graph.node)
    computed = []
    for node in nodes:
        weight = weight_from_constant(node) if node.op_type == "Constant" and not node.domain else None
        if weight is None:
            computed.append(node)
            continue
        arrays[node.output[0]] = weight.read()
        model.graph.initializer.append(named_tensor(node.output[0], weight.read()))
    if len(computed) < len(nodes):
        del model.graph.node[:]
        model.graph.node.extend(computed)


def named_tensor(name: str, value: Array) -> TensorProto:
    """Return an array as an initializer; a scalar keeps its rank."""
    return onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)


@dataclass(frozen=True, slots=True)
class _Values:
    """The facts of one run: values of tensors that may be constants, shapes and types of all."""

    known: dict[str, Array]
    shapes: dict[str, Shape]
    kinds: dict[str, Kind]


def _probe(model: ModelProto, arrays: Mapping[str, Array], feed: Feed) -> _Values:
    """Run the model once with every tensor as an output."""
    probe = ModelProto()
    probe.CopyFrom(model)
    names = [o for node in model.graph.node for o in node.output if o]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    results = run(open_session(probe.SerializeToString(), optimize=False), {k: np.asarray(v) for k, v in feed.items()})
    constant = _constants(model.graph.node, arrays)
    known = {name: value for name, value in results.items() if name in constant}
    arrays_by_name = {n: np.asarray(v) for n, v in {**results, **feed, **arrays}.items()}
    return _Values(
        known, {n: v.shape for n, v in arrays_by_name.items()}, {n: v.dtype for n, v in arrays_by_name.items()}
    )


def _is_variable(name: str, arrays: Mapping[str, Array]) -> bool:
    """Return whether a tensor is a weight that could be trained: floats, more than one."""
    array = arrays.get(name)
    return array is not None and array.dtype in (np.float32, np.float64, np.float16) and array.size > 1


def _constants(nodes: Iterable[NodeProto], arrays: Mapping[str, Array]) -> set[str]:
    """Return the outputs of nodes that depend on sizes and on constants alone; weights count as variable."""
    constant = {name for name in arrays if not _is_variable(name, arrays)}
    for node in nodes:
        bodies = any(a.HasField("g") or a.graphs for a in node.attribute)
        fixed = node.op_type in ("Shape", "Size") and not node.domain
        fixed = fixed or (all(not i or i in constant for i in node.input) and not node.op_type.startswith("Random"))
        if fixed and not bodies:
            constant.update(o for o in node.output if o)
    return constant


def _expand_bodies(model: ModelProto, values: _Values, arrays: dict[str, Array], feed: Feed) -> bool:
    """Write out operators that have no gradient of their own, but a definition by others; return whether any was."""
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    constant = _constants(model.graph.node, arrays)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        body = None
        if gradient_of("" if node.domain == "ai.onnx" else node.domain, node.op_type, opset) is None:
            kinds = {n: _type(values.kinds[n], values.shapes[n]) for n in node.input if n in values.kinds}
            if any(o not in constant for o in node.output if o):
                body = expand(node, opset, kinds)
                known = {**arrays, **values.known}
                body = unroll(node, values.shapes, known) if body is None else body
                body = unroll_loop(node, values.shapes, known) if body is None else body
        nodes.extend([node] if body is None else body)
    changed = len(nodes) != len(model.graph.node)
    if changed:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)
    return changed


def _type(kind: Kind, shape: Shape) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(kind), shape)


def _folded(model: ModelProto, arrays: Mapping[str, Array], values: _Values, feed: Feed, resized: str) -> StaticGraph:
    """Return the graph without nodes whose outputs are constant."""
    constant = _constants(model.graph.node, arrays)
    graph = Graph.of(model, {})
    nodes = [node for node in graph.nodes if not all(o in constant for o in node.outputs if o)]
    read = {name for node in nodes for name in node.inputs if name} | {o.name for o in model.graph.output}
    for node in nodes:
        for attribute in node.proto.attribute:
            for body in [attribute.g, *attribute.graphs]:
                read.update(_reads(body))
    initial = {**{n: v for n, v in arrays.items() if n in values.shapes}, **values.known}
    variables = sorted(n for n in read if n in arrays and _is_variable(n, arrays))
    return StaticGraph(
        nodes=nodes,
        inputs=[i.name for i in model.graph.input if i.name in feed],
        outputs=[o.name for o in model.graph.output],
        variables=variables,
        constants={n: v for n, v in initial.items() if n in read},
        shapes=values.shapes,
        kinds=values.kinds,
        opsets={("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import},
        ir_version=max(model.ir_version, 8),
        resized=resized,
    )


def _reads(body: onnx.GraphProto) -> Iterable[str]:
    for node in body.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _reads(inner)
    yield from (o.name for o in body.output)
