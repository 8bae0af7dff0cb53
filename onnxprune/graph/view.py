"""A read-only view of the main graph: nodes, weights, producers and consumers, with attributes as plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import AttributeProto

from onnxprune.model.weights import Weight, weight_from_constant


@dataclass(slots=True)
class Node:
    """One node: operator, names of its tensors ("" where an optional one is absent), attributes decoded on demand."""

    index: int
    op: str
    domain: str
    version: int
    name: str
    inputs: list[str]
    outputs: list[str]
    proto: onnx.NodeProto
    _attrs: dict[str, Any] | None = None

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes by name: int, float, str, lists of these, numpy arrays for tensors, GraphProto for bodies."""
        if self._attrs is None:
            self._attrs = {a.name: _decode(a) for a in self.proto.attribute}
        return self._attrs

    @property
    def label(self) -> str:
        """The name a person would look for: the node's own, else that of its first output."""
        return self.name or next((o for o in self.outputs if o), f"#{self.index}")


# Operators of ONNX's own domain that hold bodies; in other domains every node is searched.
_WITH_BODIES = {"If", "Loop", "Scan", "SequenceMap"}


def _decode(attribute: onnx.AttributeProto) -> Any:
    kind = attribute.type
    if kind == AttributeProto.INT:
        return attribute.i
    if kind == AttributeProto.INTS:
        return list(attribute.ints)
    if kind == AttributeProto.TENSOR:
        return onnx.numpy_helper.to_array(attribute.t)
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if kind == AttributeProto.STRINGS:
        return [v.decode("utf-8", "replace") for v in value]
    return list(value) if kind == AttributeProto.FLOATS else value


@dataclass(slots=True)
class Graph:
    """The main graph of a model.

    ``proto`` is the skeleton (no bulk data); ``weights`` maps every initializer and Constant output to its lazily read
    data; ``captured`` holds the names that the bodies of If, Loop and Scan read from outside.
    """

    proto: onnx.ModelProto
    weights: dict[str, Weight]
    nodes: list[Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    producer: dict[str, Node] = field(default_factory=dict)
    consumers: dict[str, list[tuple[Node, int]]] = field(default_factory=dict)
    captured: set[str] = field(default_factory=set)
    opsets: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, proto: onnx.ModelProto, weights: Mapping[str, Weight]) -> Graph:
        """The view of ``proto``; Constant nodes join the weights."""
        graph = cls(proto=proto, weights=dict(weights))
        graph.opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import}
        initializers = graph.weights.keys() | {s.values.name for s in proto.graph.sparse_initializer}
        graph.inputs = [i.name for i in proto.graph.input if i.name not in initializers]
        graph.outputs = [o.name for o in proto.graph.output]
        for index, node in enumerate(proto.graph.node):
            graph._add(index, node)
        return graph

    def _add(self, index: int, proto: onnx.NodeProto) -> None:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        node = Node(
            index=index,
            op=proto.op_type,
            domain=domain,
            version=self.opsets.get(domain, 1),
            name=proto.name,
            inputs=list(proto.input),
            outputs=list(proto.output),
            proto=proto,
        )
        self.nodes.append(node)
        for output in node.outputs:
            if output:
                self.producer[output] = node
        for position, name in enumerate(node.inputs):
            if name:
                self.consumers.setdefault(name, []).append((node, position))
        for attribute in () if domain == "" and node.op not in _WITH_BODIES else proto.attribute:
            for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                self.captured.update(_reads(body))
        if node.op == "Constant" and domain == "" and node.outputs[0] not in self.weights:
            weight = weight_from_constant(proto)
            if weight is not None:
                self.weights[node.outputs[0]] = weight


def _reads(body: onnx.GraphProto) -> Iterator[str]:
    """Names a body reads, its own included: that costs compression at worst, since bodies rarely reuse outer names."""
    for node in body.node:
        yield from (name for name in node.input if name)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from _reads(inner)
    yield from (output.name for output in body.output)
