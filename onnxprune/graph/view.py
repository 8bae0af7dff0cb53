"""A read-only view of the main graph: nodes, weights, producers and consumers, with attributes as plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
from onnx import AttributeProto

from onnxprune.io import markers
from onnxprune.io.constants import weight_from_constant
from onnxprune.io.weights import Weight


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
    repeats: int = 1
    """How often it runs per run of the model, where a Loop or Scan around it says so by its sizes."""

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes by name: int, float, str, lists of these, numpy arrays for tensors, GraphProto for bodies."""
        if self._attrs is None:
            self._attrs = {a.name: _decode(a) for a in self.proto.attribute}
        return self._attrs

    def at(self, index: int, proto: onnx.NodeProto) -> Node:
        """Return the same node at another place, where ``proto`` is its copy."""
        args = (self.op, self.domain, self.version, self.name, self.inputs, self.outputs)
        return Node(index, *args, proto, self._attrs, self.repeats)

    @property
    def kind(self) -> str:
        """The operator that a person would look for: of a marker that of its control-flow node."""
        return str(self.attrs.get("kind", self.op)) if self.domain == markers.DOMAIN else self.op

    @property
    def marker(self) -> str:
        """The type of the marker, "" where the node is none."""
        return self.op if self.domain == markers.DOMAIN else ""

    @property
    def label(self) -> str:
        """The name that a person would look for: the node's own, else that of its first output."""
        return self.name or next((o for o in self.outputs if o), f"#{self.index}")


# Operators of ONNX's own domain that hold bodies; in other domains every node is searched.
CONTROL = {"If", "Loop", "Scan", "SequenceMap"}


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
    data; ``captured`` holds the names that closed bodies of control-flow nodes read from outside. Nodes of inlined
    bodies are nodes of the graph, between markers (:mod:`onnxprune.io.markers`).
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

    _enclosed: tuple[Sequence[tuple[markers.Body, ...]], frozenset[str]] | None = None
    steps: list[Node] = field(default_factory=list)
    """The nodes that compute something: all but Constant nodes, whose values are weights."""

    @classmethod
    def of(
        cls,
        proto: onnx.ModelProto,
        weights: Mapping[str, Weight],
        known: Iterable[Node] = (),
        names: Sequence[tuple[list[str], list[str]]] = (),
    ) -> Graph:
        """Build the view of ``proto``; Constant nodes join the weights.

        ``known`` are nodes of another view of which ``proto`` may hold copies, in the same order: they are recognised
        by their outputs and not decoded again, so none of them may have been changed. ``names`` are the inputs and
        outputs of all nodes, where the caller has them.
        """
        graph = cls(proto=proto, weights=dict(weights))
        graph.opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import}
        initializers = graph.weights.keys() | {s.values.name for s in proto.graph.sparse_initializer}
        graph.inputs = [i.name for i in proto.graph.input if i.name not in initializers]
        graph.outputs = [o.name for o in proto.graph.output]
        decoded = {node.outputs[0]: node for node in known if node.outputs}
        for index, node in enumerate(proto.graph.node):
            if names:
                graph._add(graph._decode(index, node, *names[index]))
                continue
            outputs = node.output
            old = decoded.get(outputs[0]) if decoded and outputs else None
            new = graph._decode(index, node, list(node.input), list(outputs)) if old is None else old.at(index, node)
            graph._add(new)
        return graph

    def altered(self, proto: onnx.ModelProto, weights: dict[str, Weight], changed: Iterable[int]) -> Graph:
        """Build the view of a copy with the same nodes and places, where ``changed`` ones read other tensors."""
        new = {
            i: self._decode(i, proto.graph.node[i], list(proto.graph.node[i].input), self.nodes[i].outputs)
            for i in changed
        }
        consumers, producer = dict(self.consumers), dict(self.producer)
        for name in {n for i, node in new.items() for n in (*node.inputs, *self.nodes[i].inputs) if n}:
            consumers[name] = [(node, k) for node, k in consumers.get(name, ()) if node.index not in new]
        for node in new.values():
            producer.update({output: node for output in node.outputs if output})
            for k, name in enumerate(node.inputs):
                if name:
                    consumers[name].append((node, k))
        for name in {n for node in new.values() for n in node.inputs if n}:
            consumers[name].sort(key=lambda reader: (reader[0].index, reader[1]))
        nodes, steps = ([new.get(n.index, n) for n in old_nodes] for old_nodes in (self.nodes, self.steps))
        read = {name: readers for name, readers in consumers.items() if readers}
        return replace(self, proto=proto, weights=weights, nodes=nodes, steps=steps, producer=producer, consumers=read)

    def _decode(self, index: int, proto: onnx.NodeProto, inputs: list[str], outputs: list[str]) -> Node:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        version = self.opsets.get(domain, 1)
        return Node(index, proto.op_type, domain, version, proto.name, inputs, outputs, proto)

    def _add(self, node: Node) -> None:
        self.nodes.append(node)
        constant = node.op == "Constant" and node.domain == ""
        if not constant:
            self.steps.append(node)
        for output in node.outputs:
            if output:
                self.producer[output] = node
        if node.inputs:
            consumers = self.consumers
            for position, name in enumerate(node.inputs):
                if name:
                    consumers.setdefault(name, []).append((node, position))
        if node.domain or node.op in CONTROL:
            for attribute in node.proto.attribute:
                for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                    self.captured.update(body_reads(body))
        if constant and node.outputs[0] not in self.weights:
            weight = weight_from_constant(node.proto)
            if weight is not None:
                self.weights[node.outputs[0]] = weight

    @property
    def has_bodies(self) -> bool:
        """Whether nodes of the graph belong to the body of an If, Loop or Scan."""
        return markers.DOMAIN in self.opsets

    @property
    def around(self) -> Sequence[tuple[markers.Body, ...]]:
        """Bodies around each node, outermost first, by node."""
        return self._enclose()[0]

    @property
    def inner(self) -> frozenset[str]:
        """Tensors inside bodies: nothing outside can read them, so they cannot be outputs of a model."""
        return self._enclose()[1] if self.has_bodies else frozenset()

    def conditions(self, index: int) -> tuple[tuple[str, bool], ...]:
        """Return conditions of the Ifs around a node for it to run: (tensor, value), outermost first."""
        return tuple((self.nodes[b.start].inputs[0], b.side) for b in self.around[index] if b.kind == "If")

    def _enclose(self) -> tuple[Sequence[tuple[markers.Body, ...]], frozenset[str]]:
        if self._enclosed is None:
            around = list(markers.enclosures((n.marker, n.kind) for n in self.nodes))
            inner_nodes = (n for n in self.nodes if around[n.index] or n.marker == markers.OPEN)
            self._enclosed = around, frozenset(o for n in inner_nodes for o in n.outputs if o)
        return self._enclosed


def body_reads(body: onnx.GraphProto) -> Iterator[str]:
    """Return names that a body reads, its own included: that costs compression at worst, since names rarely repeat."""
    for node in body.node:
        yield from (name for name in node.input if name)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from body_reads(inner)
    yield from (output.name for output in body.output)


def reads(node: Node) -> list[str]:
    """Return names that a node reads, including those that its bodies read from outside."""
    names = list(node.inputs)
    for attribute in node.proto.attribute if node.domain or node.op in CONTROL else ():
        for body in [attribute.g, *attribute.graphs]:
            names.extend(body_reads(body))
    return names
