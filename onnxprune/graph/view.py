"""A view of the main graph: nodes, weights, producers and consumers, with attributes as plain Python.

Who reads a view never changes it; changes of a model in place are made by :class:`GraphEditor`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import onnx
from onnx import AttributeProto

from onnxprune.io import markers
from onnxprune.io.constants import placeholder, weight_from_constant
from onnxprune.io.weights import Weight


@dataclass(slots=True)
class Node:
    """One node: operator, names of its tensors ("" where an optional one is absent), attributes decoded on demand."""

    index: int
    op: str
    domain: str
    version: int
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    proto: onnx.NodeProto
    _attrs: dict[str, Any] | None = None
    repeats: int = 1
    """Number of runs per run of the model, where the sizes of a Loop or Scan around it determine that."""

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
    weights: Mapping[str, Weight]
    nodes: Sequence[Node] = field(default_factory=list)
    inputs: Sequence[str] = field(default_factory=list)
    outputs: Sequence[str] = field(default_factory=list)
    producer: Mapping[str, Node] = field(default_factory=dict)
    consumers: Mapping[str, Sequence[tuple[Node, int]]] = field(default_factory=dict)
    captured: frozenset[str] = frozenset()
    opsets: Mapping[str, int] = field(default_factory=dict)

    _enclosed: tuple[Sequence[tuple[markers.Body, ...]], frozenset[str]] | None = None
    steps: Sequence[Node] = field(default_factory=list)
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
        opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import}
        parts = _Parts(dict(weights))
        initializers = weights.keys() | {s.values.name for s in proto.graph.sparse_initializer}
        decoded = {node.outputs[0]: node for node in known if node.outputs}
        for index, node in enumerate(proto.graph.node):
            if names:
                parts.add(_node(opsets, index, node, *names[index]))
                continue
            outputs = node.output
            old = decoded.get(outputs[0]) if decoded and outputs else None
            new = _node(opsets, index, node, list(node.input), list(outputs)) if old is None else old.at(index, node)
            parts.add(new)
        return cls(
            proto=proto,
            weights=parts.weights,
            nodes=parts.nodes,
            inputs=[i.name for i in proto.graph.input if i.name not in initializers],
            outputs=[o.name for o in proto.graph.output],
            producer=parts.producer,
            consumers=parts.consumers,
            captured=frozenset(parts.captured),
            opsets=opsets,
            steps=parts.steps,
        )

    def altered(self, proto: onnx.ModelProto, weights: Mapping[str, Weight], changed: Iterable[int]) -> Graph:
        """Build the view of a copy with the same nodes and places, where ``changed`` ones read other tensors."""
        new = {
            i: _node(self.opsets, i, proto.graph.node[i], list(proto.graph.node[i].input), self.nodes[i].outputs)
            for i in changed
        }
        consumers, producer = dict(self.consumers), dict(self.producer)
        added: dict[str, list[tuple[Node, int]]] = {}
        for node in new.values():
            producer.update({output: node for output in node.outputs if output})
            for k, name in enumerate(node.inputs):
                if name:
                    added.setdefault(name, []).append((node, k))
        for name in {n for i, node in new.items() for n in (*node.inputs, *self.nodes[i].inputs) if n}:
            others = [(node, k) for node, k in consumers.get(name, ()) if node.index not in new]
            consumers[name] = sorted([*others, *added.get(name, ())], key=_place)
        nodes, steps = ([new.get(n.index, n) for n in old_nodes] for old_nodes in (self.nodes, self.steps))
        read = {name: readers for name, readers in consumers.items() if readers}
        return replace(self, proto=proto, weights=weights, nodes=nodes, steps=steps, producer=producer, consumers=read)

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

    def record_repeats(self, counts: Mapping[int, int]) -> None:
        """Record the number of times that nodes run per run of the model.

        Args:
            counts: runs by index of the node; all others run once.
        """
        for node in self.nodes:
            node.repeats = counts.get(node.index, 1)

    def _enclose(self) -> tuple[Sequence[tuple[markers.Body, ...]], frozenset[str]]:
        if self._enclosed is None:
            around = list(markers.enclosures((n.marker, n.kind) for n in self.nodes))
            inner_nodes = (n for n in self.nodes if around[n.index] or n.marker == markers.OPEN)
            self._enclosed = around, frozenset(o for n in inner_nodes for o in n.outputs if o)
        return self._enclosed


def _place(reader: tuple[Node, int]) -> tuple[int, int]:
    return reader[0].index, reader[1]


def _node(
    opsets: Mapping[str, int], index: int, proto: onnx.NodeProto, inputs: Sequence[str], outputs: Sequence[str]
) -> Node:
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    return Node(index, proto.op_type, domain, opsets.get(domain, 1), proto.name, inputs, outputs, proto)


@dataclass(slots=True)
class _Parts:
    """The parts of a view while it is built."""

    weights: dict[str, Weight]
    nodes: list[Node] = field(default_factory=list)
    steps: list[Node] = field(default_factory=list)
    producer: dict[str, Node] = field(default_factory=dict)
    consumers: dict[str, list[tuple[Node, int]]] = field(default_factory=dict)
    captured: set[str] = field(default_factory=set)

    def add(self, node: Node) -> None:
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


# -- changes in place --------------------------------------------------------------------------------------------------


def connect(node: onnx.NodeProto, position: int, name: str) -> None:
    """Let a node that is in no view read another tensor; inputs in front of it that were left out are empty."""
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name


def numbered_name(stem: str, names: set[str]) -> str:
    """Return the stem, with a number where ``names`` has it; the result is added to them."""
    name, number = stem, 1
    while name in names:
        name, number = f"{stem}_{number}", number + 1
    names.add(name)
    return name


def underscored_name(stem: str, names: set[str]) -> str:
    """Return the stem, with underscores while ``names`` has it; the result is added to them."""
    while stem in names:
        stem += "_"
    names.add(stem)
    return stem


class GraphEditor:
    """Changes of a model in place: of its view, skeleton and weights together. Nothing else changes a view.

    Args:
        graph: view of the model.
        weights: its weights by name, as they will be saved; values of the view's own are those it was built with.
    """

    def __init__(self, graph: Graph, weights: MutableMapping[str, Weight]) -> None:
        self.graph, self.weights = graph, weights

    def unused_name(self, stem: str) -> str:
        """Return a name that no tensor has: the stem, or the stem and underscores."""
        while stem in self.weights or stem in self.graph.producer:
            stem += "_"
        return stem

    def add_constant(self, weight: Weight) -> None:
        """Add an initializer."""
        self.weights[weight.name] = weight
        self.graph.proto.graph.initializer.append(placeholder(weight))

    def set_constant(self, weight: Weight) -> None:
        """Give a constant another value of the same shape, which the view has as well."""
        self.weights[weight.name] = cast(dict[str, Weight], self.graph.weights)[weight.name] = weight

    def reshape_constant(self, weight: Weight) -> None:
        """Give a constant another value, whose shape may differ."""
        self.weights[weight.name] = weight
        for tensor in self.graph.proto.graph.initializer:
            if tensor.name == weight.name:
                del tensor.dims[:]
                tensor.dims.extend(weight.shape)

    def connect(self, node: Node, position: int, name: str) -> None:
        """Let a node of the view read another tensor, or none (""), at one of its inputs."""
        old = node.inputs[position] if position < len(node.inputs) else ""
        connect(node.proto, position, name)
        node.inputs = list(node.proto.input)
        consumers = cast(dict[str, Sequence[tuple[Node, int]]], self.graph.consumers)
        if old:
            consumers[old] = [c for c in consumers[old] if c[0] is not node or c[1] != position]
        if name:
            consumers[name] = sorted([*consumers.get(name, ()), (node, position)], key=_place)

    def replace_nodes(self, replacements: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
        """Put other nodes in the place of some; the view does not follow: callers make a new one.

        Args:
            replacements: new nodes, by the first output of the one whose place they take.
        """
        nodes = self.graph.proto.graph.node
        written = onnx.GraphProto()
        for node in nodes:
            written.node.extend(replacements.get(next((o for o in node.output if o), ""), [node]))
        del nodes[:]
        nodes.extend(written.node)

    def drop_unread(self, names: Collection[str]) -> None:
        """Remove those of the constants that nothing reads any more."""
        graph = self.graph.proto.graph
        read = {n for node in graph.node for n in node.input} | {o.name for o in graph.output} | self.graph.captured
        unread = {name for name in names if name not in read}
        for i in reversed(range(len(graph.initializer))):
            if graph.initializer[i].name in unread:
                del graph.initializer[i]
        for i in reversed(range(len(graph.node))):
            if graph.node[i].op_type == "Constant" and graph.node[i].output[0] in unread:
                del graph.node[i]
        for i in reversed(range(len(graph.input))):  # before IR 4 every initializer is an input too
            if graph.input[i].name in unread:
                del graph.input[i]
        for name in unread:
            self.weights.pop(name, None)
