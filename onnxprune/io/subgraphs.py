"""Subgraphs of If, Loop and Scan: inline them into the main graph, outline them again, expose their tensors.

Results of the iterations of a Loop or Scan are stacked in front, one axis per repeating node. Where an If takes the
other branch, the result is empty; within a Loop or Scan, whose iterations need equal sizes, it is zeros of the same
shape.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile, pairwise
from typing import Any, NamedTuple

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxprune.io import markers
from onnxprune.io.skeleton import outline, without_data, without_graph, without_nodes
from onnxprune.io.weights import Weight

_BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}
# Constant nodes whose value has more elements are weights; smaller ones are settings and stay nodes.
_LARGEST_SETTING = 256
Scope = ChainMap[str, str]


def inline_bodies(proto: ModelProto) -> ModelProto:
    """Inline the bodies of a model; return the same object where no body can be inlined.

    Names stay unchanged where no other tensor (node) of the model has them; else they are prefixed with the name of the
    control-flow node and its branch: ``If_0/else_branch/conv``. New initializers follow the model's own.

    A body stays closed where its nodes have bodies that cannot be inlined (SequenceMap, Scan before opset 9,
    operators of other domains), where it has sparse constants, or where its inputs and outputs do not fit the operator.
    """
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    if not any(_is_open(node, opset) for node in proto.graph.node):
        return proto
    return _Inliner(proto, opset).model


def _is_open(node: NodeProto, opset: int) -> bool:
    """Return whether a node has bodies and all of them can be inlined."""
    names = _BODIES.get(node.op_type)
    if names is None or node.domain not in ("", "ai.onnx"):
        return False
    bodies = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    if bodies.keys() != set(names) or not _fits(node, list(bodies.values()), opset):
        return False
    return all(_plain(body, opset) for body in bodies.values())


def _fits(node: NodeProto, bodies: list[GraphProto], opset: int) -> bool:
    """Return whether the inputs and outputs of the bodies fit those of their node."""
    num_inputs, num_outputs = len(node.input), len(node.output)
    if node.op_type == "If":
        return num_inputs == 1 and all(not b.input and len(b.output) == num_outputs for b in bodies)
    body = bodies[0]
    if node.op_type == "Loop":
        return (
            num_inputs >= 2 and len(body.input) == num_inputs and num_inputs - 2 <= num_outputs <= len(body.output) - 1
        )
    num_scanned = _int(node, "num_scan_inputs", 0)
    states = num_inputs - num_scanned
    return opset >= 9 and 0 < num_scanned <= num_inputs == len(body.input) and states <= num_outputs <= len(body.output)


def _plain(body: GraphProto, opset: int) -> bool:
    """Return whether every node of a body has no bodies itself, or bodies that can be inlined as well."""
    if body.sparse_initializer or {t.name for t in body.initializer} & {i.name for i in body.input}:
        return False
    for node in body.node:
        holds = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
        if holds and not _is_open(node, opset):
            return False
    return True


def _int(node: NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _ints(node: NodeProto, name: str, count: int) -> list[int]:
    values = next((list(a.ints) for a in node.attribute if a.name == name), [])
    return values if len(values) == count else [0] * count


class _Inliner:
    """The flat model under construction."""

    def __init__(self, proto: ModelProto, opset: int) -> None:
        graph = proto.graph
        self.model = without_graph(proto)
        self.model.opset_import.append(helper.make_opsetid(markers.DOMAIN, 1))
        self.model.graph.MergeFrom(without_nodes(graph))
        self._opset = opset
        self._tensors = {i.name for i in graph.input} | {t.name for t in graph.initializer}
        self._tensors |= {t.values.name for t in graph.sparse_initializer}
        self._tensors.update(o for node in graph.node for o in node.output)
        self._nodes = {node.name for node in graph.node}
        self._renamed: list[str] = []
        self._infos = {i.name for i in (*graph.input, *graph.output, *graph.value_info)}
        for node in graph.node:
            self._add(node, ChainMap(), "")

    # -- names -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _free(names: set[str], name: str, path: str) -> str:
        result = name if name and name not in names else f"{path}/{name}"
        number = 1
        while result in names:
            result, number = f"{path}/{name}_{number}", number + 1
        names.add(result)
        return result

    def _define(self, name: str, scope: Scope, path: str) -> str:
        """Return the flat name of a tensor that a body defines."""
        if not name:
            return ""
        scope.maps[0][name] = flat = self._free(self._tensors, name, path)
        return flat

    def _mark(self, op: str, inputs: Iterable[str], outputs: Iterable[str], label: str, **more: Any) -> NodeProto:
        """Add a marker; one without outputs is given an output without readers."""
        names = [o or self._free(self._tensors, "", f"{label}/{op}") for o in outputs]
        node: NodeProto = self.model.graph.node.add()
        node.CopyFrom(helper.make_node(op, list(inputs), names, name=label, domain=markers.DOMAIN, **more))
        return node

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _add(self, node: NodeProto, scope: Scope, path: str) -> None:
        """Add one node of the model or, where ``path`` names one, of a body."""
        if _is_open(node, self._opset):
            self._open(node, scope, path)
            return
        value = next((a.t for a in node.attribute if a.name == "value"), None) if path else None
        if node.op_type == "Constant" and value is not None and math.prod(value.dims) > _LARGEST_SETTING:
            self._constant(node, value, scope, path)
            return
        copy = self.model.graph.node.add()
        copy.CopyFrom(node)
        if path:
            copy.input[:] = [scope.get(n, n) for n in node.input]
            copy.output[:] = [self._define(n, scope, path) for n in node.output]
            if node.name:
                copy.name = self._name(node.name, path)

    def _name(self, name: str, path: str) -> str:
        """Return the flat name of a node of a body."""
        flat = self._free(self._nodes, name, path)
        if flat != name:
            self._renamed += [flat, name]
        return flat

    def _constant(self, node: NodeProto, value: TensorProto, scope: Scope, path: str) -> None:
        """Add the value of a Constant node as an initializer."""
        stub, flat = NodeProto(), self._define(node.output[0], scope, path)
        stub.CopyFrom(node)
        for attribute in stub.attribute:
            if attribute.name == "value":
                attribute.t.CopyFrom(without_data(value))
        self._mark(markers.CONSTANT, [], [""], path, node=stub.SerializeToString(), tensor=flat)
        self._weight(value, flat)

    def _weight(self, tensor: TensorProto, flat: str) -> None:
        copy = self.model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = flat

    def _open(self, node: NodeProto, scope: Scope, path: str) -> None:
        """Inline a control-flow node: its bodies between markers."""
        label = node.name or next((o for o in node.output if o), node.op_type)
        control = _ControlNode(node, self._name(label, path) if path else label, [scope.get(n, n) for n in node.input])
        if node.op_type == "If":
            self._choose(control, scope, path)
        else:
            self._repeat(control, scope, path)
        self._mark(markers.CLOSE, [], [""], control.label, kind=node.op_type)

    def _outer(self, control: _ControlNode, scope: Scope, path: str) -> list[str]:
        """Return the flat names of a control-flow node's outputs, those without readers included."""
        names = []
        for name in control.node.output:
            if not name:
                names.append(self._free(self._tensors, "unused", control.label))
            else:
                names.append(self._define(name, scope, path) if path else name)
        return names

    def _choose(self, control: _ControlNode, scope: Scope, path: str) -> None:
        """Inline an If: one branch after the other, and the result of one of them."""
        results = []
        for kind, name in ((markers.OPEN, "then_branch"), (markers.ELSE, "else_branch")):
            inner = scope.new_child()
            self._enclose(kind, control, name, inner, control.inputs, [])
            results.append([inner.get(o.name, o.name) for o in control.bodies[name].output])
        self._mark(markers.END, [], [""], control.label, kind="If")
        for at, output in enumerate(self._outer(control, scope, path)):
            read = [results[0][at], results[1][at], control.inputs[0]]
            self._mark(markers.JOIN, read, [output], control.label, kind="If", at=at)

    def _repeat(self, control: _ControlNode, scope: Scope, path: str) -> None:
        """Inline a Loop or Scan: states, scanned inputs, the body and its results."""
        node, body, inputs, inner = control.node, control.bodies["body"], control.inputs, scope.new_child()
        loop, label = node.op_type == "Loop", control.label
        first, kind = 2 if loop else 0, node.op_type
        num_scanned = 0 if loop else _int(node, "num_scan_inputs", 0)
        states, axes = len(inputs) - first - num_scanned, _ints(node, "scan_input_axes", num_scanned)
        names = [self._define(i.name, inner, f"{label}/body") for i in body.input]

        def enter() -> None:
            for at in range(first, len(inputs)):
                k = at - first - states
                if k < 0:
                    self._mark(markers.CARRY, [inputs[at]], [names[at]], label, kind=kind, at=at)
                else:
                    self._mark(markers.SLICE, [inputs[at]], [names[at]], label, kind=kind, at=at, axis=axes[k])

        self._enclose(markers.OPEN, control, "body", inner, inputs[:first], names[:first], enter)
        results = [inner.get(o.name, o.name) for o in body.output]
        self._mark(markers.END, results[: first // 2], [""], label, kind=kind)
        scan_inputs, along = (inputs[:2], 0) if loop else (inputs[-1:], axes[-1])
        stacked = _ints(node, "scan_output_axes", len(body.output) - first // 2 - states)
        for k, output in enumerate(self._outer(control, scope, path)):
            at = k + first // 2
            if k < states:
                self._mark(markers.TIE, [names[first + k], results[at]], [output], label, kind=kind, at=at)
            else:
                places = {"axis": stacked[k - states], "along": along}
                self._mark(markers.STACK, [results[at], *scan_inputs], [output], label, kind=kind, at=at, **places)

    def _enclose(
        self,
        kind: str,
        control: _ControlNode,
        name: str,
        scope: Scope,
        inputs: list[str],
        outputs: list[str],
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        """Add an ``OPEN`` marker with all data that outlining the body needs, and the body's weights and nodes."""
        body, path, before = control.bodies[name], f"{control.label}/{name}", len(self._renamed)
        initializers = [self._define(t.name, scope, path) for t in body.initializer]
        marker = self._mark(kind, inputs, ["", *outputs], control.label, kind=control.node.op_type, body=name)
        for tensor, flat in zip(body.initializer, initializers, strict=True):
            self._weight(tensor, flat)
        enter()
        for node in body.node:
            self._add(node, scope, path)
        inner_names = scope.maps[0]
        for info in (*body.input, *body.output, *body.value_info):
            flat = inner_names.get(info.name, "")
            if flat and flat not in self._infos:
                self._infos.add(flat)
                self.model.graph.value_info.add().CopyFrom(info)
                self.model.graph.value_info[-1].name = flat
        texts: dict[str, list[str] | bytes] = {
            "initializers": initializers,
            "tensors": [n for name, flat in inner_names.items() if name != flat for n in (flat, name)],
            "nodes": self._renamed[before:],
        }
        if kind == markers.OPEN:
            texts["node"] = control.hollow()
        for key, value in texts.items():
            if value:
                marker.attribute.append(helper.make_attribute(key, value))


@dataclass(slots=True)
class _ControlNode:
    """A control-flow node that is being inlined: its flat name, and those of its inputs."""

    node: NodeProto
    label: str
    inputs: list[str]

    @property
    def bodies(self) -> dict[str, GraphProto]:
        """Return its bodies by the name of their attribute."""
        return {a.name: a.g for a in self.node.attribute if a.type == AttributeProto.GRAPH}

    def hollow(self) -> bytes:
        """Return the node, serialized, with bodies reduced to declared values and texts."""
        stub = NodeProto()
        stub.CopyFrom(self.node)
        for attribute in stub.attribute:
            if attribute.type == AttributeProto.GRAPH:
                attribute.g.CopyFrom(outline(attribute.g))
        return bytes(stub.SerializeToString())


def outline_bodies(
    proto: ModelProto, weights: Mapping[str, Weight], *, branches: bool = True
) -> tuple[ModelProto, Mapping[str, Weight]]:
    """Outline all bodies; return the model and the weights of its main graph, the same objects without inlined bodies.

    Weights of bodies are put into them, so the model holds their data.

    Args:
        proto: the flat model.
        weights: its weights by name.
        branches: whether to outline every If; False: those that lie in no Loop or Scan stay inlined.
    """
    if not markers.has_bodies(proto):
        return proto, weights
    closing = _Outliner(proto, weights, branches)
    return closing.model, closing.weights


@dataclass(slots=True)
class _Body:
    """A body under construction. ``flat``: flat names of the tensors that it defines under another name."""

    graph: GraphProto
    initializers: list[str]
    flat: dict[str, str]
    nodes: list[NodeProto] = field(default_factory=list)
    outputs: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Frame:
    """A control-flow node whose bodies are under construction."""

    node: NodeProto
    bodies: list[_Body] = field(default_factory=list)


class _Outliner:
    """The walk over a flat graph, with the control-flow nodes that are open at the current position."""

    def __init__(self, proto: ModelProto, weights: Mapping[str, Weight], branches: bool) -> None:
        self._source, self._all = proto.graph, weights
        self._tensors = {t.name: t for t in proto.graph.initializer}
        self._infos = {i.name: i for i in proto.graph.value_info}
        self._names: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._body_weights: set[str] = set()
        self._inner: set[str] = set()
        branch_markers = set() if branches else _of_branches(proto)
        for index, node in enumerate(proto.graph.node):
            if node.domain == markers.DOMAIN and index not in branch_markers:
                self._learn(node)
        self._top: list[NodeProto] = []
        self._open: list[_Frame] = []
        for index, node in enumerate(proto.graph.node):
            if index in branch_markers:
                self._top.append(node)
            else:
                self._take(node)
        self.model = self._outer_model(proto)
        self.weights = {name: weight for name, weight in weights.items() if name not in self._body_weights}

    def _learn(self, marker: NodeProto) -> None:
        """Record the names that a marker holds, before the walk begins."""
        self._names.update(_pairs(_texts(marker, "tensors")))
        self._labels.update(_pairs(_texts(marker, "nodes")))
        self._body_weights.update(_texts(marker, "initializers"))
        if marker.op_type == markers.CONSTANT:
            self._body_weights.update(_texts(marker, "tensor"))

    def _outer_model(self, proto: ModelProto) -> ModelProto:
        model = without_graph(proto)
        has_markers = any(node.domain == markers.DOMAIN for node in self._top)
        opsets = [opset for opset in model.opset_import if has_markers or opset.domain != markers.DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(opsets)
        graph = without_nodes(proto.graph)
        del graph.initializer[:], graph.value_info[:]
        graph.initializer.extend(t for t in proto.graph.initializer if t.name not in self._body_weights)
        graph.value_info.extend(i for i in proto.graph.value_info if i.name not in self._inner)
        graph.node.extend(self._top)
        model.graph.CopyFrom(graph)
        return model

    def _read(self, name: str) -> str:
        """Return a tensor's name in its own body."""
        return self._names.get(name, name)

    def _put(self, node: NodeProto) -> None:
        (self._open[-1].bodies[-1].nodes if self._open else self._top).append(node)

    # -- the walk --------------------------------------------------------------------------------------------------

    def _take(self, node: NodeProto) -> None:
        if node.domain != markers.DOMAIN:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = map(self._read, node.input)
            if self._open:
                self._inner.update(node.output)
                copy.output[:] = map(self._read, node.output)
                if node.name in self._labels:
                    copy.name = self._labels[node.name]
            self._put(copy)
        elif node.op_type == markers.OPEN:
            stub = NodeProto.FromString(_bytes(node, "node"))
            for at, name in enumerate(node.input):
                stub.input[at] = self._read(name)
            self._open.append(_Frame(stub))
            self._begin(node)
        elif node.op_type == markers.ELSE:
            self._begin(node)
        elif node.op_type == markers.CONSTANT:
            self._constant(node)
        elif node.op_type == markers.CLOSE:
            frame = self._open.pop()
            for body in frame.bodies:
                self._finish(body)
            self._put(frame.node)
        else:
            self._tie(node, self._open[-1])

    def _begin(self, marker: NodeProto) -> None:
        """Begin a body."""
        name = _texts(marker, "body")[0]
        frame = self._open[-1]
        graph = next(a.g for a in frame.node.attribute if a.type == AttributeProto.GRAPH and a.name == name)
        flat = {inner_name: flat for flat, inner_name in _pairs(_texts(marker, "tensors"))}
        frame.bodies.append(_Body(graph, _texts(marker, "initializers"), flat))
        self._inner.update(marker.output)

    def _tie(self, node: NodeProto, frame: _Frame) -> None:
        """Connect a value that enters or leaves a body: the node's inputs and the body's outputs."""
        at = next((int(a.i) for a in node.attribute if a.name == "at"), 0)
        body = frame.bodies[-1]
        if node.op_type in (markers.CARRY, markers.SLICE):
            frame.node.input[at] = self._read(node.input[0])
            self._inner.update(node.output)
        elif node.op_type == markers.END:
            body.outputs.update(enumerate(node.input))
        elif node.op_type == markers.JOIN:
            for branch, name in zip(frame.bodies, node.input, strict=False):
                branch.outputs[at] = name
        else:
            body.outputs[at] = node.input[node.op_type == markers.TIE]
        if node.op_type in markers.RESULTS:
            if len(self._open) > 1:
                self._inner.update(node.output)
            self._grow(node, frame, at)

    def _grow(self, node: NodeProto, frame: _Frame, at: int) -> None:
        """Add a result that the node did not have before, see :mod:`onnxprune.io.subgraphs`."""
        if at < len(frame.bodies[0].graph.output):
            return
        numbers = {a.name: int(a.i) for a in node.attribute}
        # Only Scan needs a rank; the results of an If may differ in theirs.
        sizes = [None] * numbers["rank"] if frame.node.op_type == "Scan" else None
        for body in frame.bodies:
            body.graph.output.append(helper.make_tensor_value_info("", numbers["type"], sizes))
        place = at - (frame.node.op_type == "Loop")
        while len(frame.node.output) < place:
            frame.node.output.append(f"{node.output[0]}_{len(frame.node.output)}")
        frame.node.output.append(self._read(node.output[0]))
        for attribute in frame.node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)

    def _constant(self, marker: NodeProto) -> None:
        """Return a Constant node with its current value; none where it has no reader any more."""
        name = _texts(marker, "tensor")[0]
        if name not in self._tensors:
            return
        node = NodeProto.FromString(_bytes(marker, "node"))
        for attribute in node.attribute:
            if attribute.name == "value":
                attribute.t.CopyFrom(self._filled(name, attribute.t.name))
        self._inner.add(name)
        self._put(node)

    def _filled(self, flat: str, name: str) -> TensorProto:
        """Return an initializer with its data."""
        tensor, weight = TensorProto(), self._all.get(flat)
        tensor.CopyFrom(self._tensors[flat])
        if weight is not None and weight.onnx_type != TensorProto.STRING:
            tensor = without_data(tensor)
            tensor.data_type = weight.onnx_type
            tensor.dims[:] = weight.shape
            tensor.raw_data = bytes(weight.stored())
        tensor.name = name
        return tensor

    # -- bodies ----------------------------------------------------------------------------------------------------

    def _finish(self, body: _Body) -> None:
        """Fill the nodes, weights, outputs and declared sizes of one body."""
        graph = body.graph
        names = [n for n in body.initializers if n in self._tensors]
        graph.initializer.extend(self._filled(n, self._read(n)) for n in names)
        self._inner.update(names)
        graph.node.extend(body.nodes)
        for at, flat in body.outputs.items():
            self._output(body, at, flat)
        produced = {*(o for node in graph.node for o in node.output), *(i.name for i in (*graph.input, *graph.output))}
        infos = [i for i in graph.value_info if i.name in produced]
        del graph.value_info[:]
        graph.value_info.extend(infos)
        for info in (*graph.input, *graph.output, *graph.value_info):
            current = self._infos.get(body.flat.get(info.name, info.name))
            if current is not None:
                _resize(info, current)

    def _output(self, body: _Body, at: int, flat: str) -> None:
        """Connect an output whose name changed: a constant of the main graph passes through an Identity."""
        output, name = body.graph.output[at], self._read(flat)
        if name == output.name:
            return
        names = {o for node in body.graph.node for o in node.output}
        if name not in names and name not in {i.name for i in (*body.graph.input, *body.graph.initializer)}:
            alias = f"{name}_of_{output.name}"
            body.graph.node.append(helper.make_node("Identity", [name], [alias], name=alias))
            name = alias
        output.name = name


def _of_branches(proto: ModelProto) -> set[int]:
    """Return the markers of Ifs that lie in no Loop or Scan."""
    node_markers = [markers.marker_of(node) for node in proto.graph.node]
    around = markers.enclosures(node_markers)
    return {
        k
        for k, ((op, kind), bodies) in enumerate(zip(node_markers, around, strict=True))
        if op and kind in ("If", "") and markers.repeating(bodies) is None
    }


def _resize(info: ValueInfoProto, current: ValueInfoProto) -> None:
    """Set the sizes that the flat graph declares."""
    dims, current_dims = info.type.tensor_type.shape.dim, current.type.tensor_type.shape.dim
    if len(dims) == len(current_dims):
        for dim, new in zip(dims, current_dims, strict=True):
            if dim.HasField("dim_value") and new.HasField("dim_value"):
                dim.dim_value = new.dim_value


def _pairs(texts: Sequence[str]) -> Iterable[tuple[str, str]]:
    return [pair for k, pair in enumerate(pairwise(texts)) if k % 2 == 0]


def _texts(node: NodeProto, name: str) -> list[str]:
    for attribute in node.attribute:
        if attribute.name == name:
            return [v.decode() for v in attribute.strings] or [attribute.s.decode()]
    return []


def _bytes(node: NodeProto, name: str) -> bytes:
    return next(bytes(a.s) for a in node.attribute if a.name == name)


Size = int | tuple[str, int, int]
"""A number, or (graph input, axis, factor): that input's size times the factor."""


class Inner(NamedTuple):
    """Facts for exposing a tensor: element type, rank and, where it may lie in an If within a Loop or Scan, sizes."""

    kind: int
    rank: int
    sizes: tuple[Size, ...] | None = None


@dataclass(frozen=True, slots=True)
class ExposedTensor:
    """An exposed inner tensor: its ``output``, and how many axes were ``stacked`` in front."""

    output: str
    stacked: int


@dataclass(slots=True)
class _ExposedFrame:
    """A node with bodies: the indices of its markers, and its number of results."""

    kind: str
    label: str
    condition: str
    results: int
    otherwise: int = 0
    end: int = 0
    close: int = 0


@dataclass(slots=True)
class _EnclosingFrames:
    """All nodes with bodies, and around every inner tensor the nodes with its side of each, outermost first."""

    around: dict[str, tuple[tuple[_ExposedFrame, bool], ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, proto: ModelProto) -> _EnclosingFrames:
        """Return the places of a flat model."""
        result, stack = cls(), list[tuple[_ExposedFrame, bool]]()
        for index, node in enumerate(proto.graph.node):
            marker = node.op_type if node.domain == markers.DOMAIN else ""
            if marker == markers.OPEN:
                texts = {a.name: a.s for a in node.attribute}
                stub = NodeProto.FromString(texts["node"])
                results = next(len(a.g.output) for a in stub.attribute if a.HasField("g"))
                stack.append(
                    (
                        _ExposedFrame(texts["kind"].decode(), node.name, node.input[0] if node.input else "", results),
                        True,
                    )
                )
            elif marker == markers.ELSE:
                stack[-1][0].otherwise, stack[-1] = index, (stack[-1][0], False)
            elif marker == markers.END:
                stack[-1][0].end = index
            elif marker == markers.CLOSE:
                stack.pop()[0].close = index
            around = tuple(stack[: len(stack) - (marker in markers.RESULTS)])
            if around:
                result.around.update(dict.fromkeys(filter(None, node.output), around))
        return result


def hidden_tensors(proto: ModelProto, types: Mapping[str, Inner]) -> frozenset[str]:
    """Return the tensors that cannot be exposed: in an If within a Loop or Scan, and of unknown sizes."""
    if not markers.has_bodies(proto):
        return frozenset()
    around = _EnclosingFrames.of(proto).around
    return frozenset(
        n for n, inner in types.items() if not _can_be_exposed([f.kind for f, _ in around.get(n, ())], inner)
    )


def _can_be_exposed(kinds: list[str], inner: Inner) -> bool:
    """Return whether a tensor can be exposed: every If within a repetition can give zeros of known size instead."""
    first = next((k for k, kind in enumerate(kinds) if kind != "If"), len(kinds))
    if "If" not in kinds[first:]:
        return True
    last = max(k for k, kind in enumerate(kinds) if kind != "If")
    return inner.sizes is not None and "If" not in kinds[first:last]


def expose_tensors(
    proto: ModelProto, types: Mapping[str, Inner], *, branches: bool = True
) -> tuple[ModelProto, dict[str, ExposedTensor]]:
    """Expose inner tensors as results of the nodes around them; return the model and their outputs.

    Args:
        proto: the flat model.
        types: facts of the tensors to expose, none of them ``hidden_tensors``; tensors outside of bodies are left out.
        branches: whether to expose them outside of every If; False: where the outermost Loop or Scan around them runs.
    """
    around = _EnclosingFrames.of(proto).around if markers.has_bodies(proto) else {}
    shown: dict[str, ExposedTensor] = {}
    before: dict[int, list[NodeProto]] = {}
    for name, (kind, rank, sizes) in types.items():
        current, stacked = name, 0
        frames = around.get(name, ())
        if not branches:
            frames = tuple(dropwhile(lambda placed: placed[0].kind == "If", frames))
        for number, (frame, side) in enumerate(reversed(frames)):
            output = f"{name}__shown{number}"
            # A copy: runtimes may overwrite a state that is a result as well.
            last_marker = frame.otherwise if frame.kind == "If" and side else frame.end
            before.setdefault(last_marker, []).append(
                helper.make_node("Identity", [current], [f"{output}_copy"], name=output)
            )
            current = f"{output}_copy"
            at = {"kind": frame.kind, "at": frame.results, "type": kind, "rank": rank + stacked}
            frame.results += 1
            if frame.kind == "If":
                placeholder = f"{output}_nothing"
                place = frame.end if side else frame.otherwise
                is_repeated = any(outer.kind != "If" for outer, _ in frames[: len(frames) - 1 - number])
                before.setdefault(place, []).extend(_zeros(placeholder, kind, (sizes or ()) if is_repeated else (0,)))
                sides = [current, placeholder] if side else [placeholder, current]
                marker = _marker(markers.JOIN, [*sides, frame.condition], output, frame.label, **at)
            else:
                marker = _marker(markers.STACK, [current], output, frame.label, axis=0, **at)
                stacked += 1
            before.setdefault(frame.close, []).append(marker)
            current = output
            shown[name] = ExposedTensor(output, stacked)
    if not shown:
        return proto, shown
    model = ModelProto()
    model.CopyFrom(proto)
    del model.graph.node[:]
    for index, node in enumerate(proto.graph.node):
        model.graph.node.extend(before.get(index, ()))
        model.graph.node.append(node)
    return model, shown


def _marker(op: str, inputs: list[str], output: str, label: str, **more: Any) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=label, domain=markers.DOMAIN, **more)


def _zeros(name: str, kind: int, sizes: tuple[Size, ...]) -> list[NodeProto]:
    """Return nodes that produce a tensor of zeros."""
    nodes, parts = [], []
    for axis, size in enumerate(sizes):
        parts.append(part := f"{name}_{axis}")
        if isinstance(size, int):
            nodes.append(_constant(part, TensorProto.INT64, [1], [size]))
            continue
        source, place, factor = size
        nodes += [
            helper.make_node("Shape", [source], [f"{part}_shape"]),
            _constant(f"{part}_place", TensorProto.INT64, [1], [place]),
            helper.make_node("Gather", [f"{part}_shape", f"{part}_place"], [f"{part}_size"]),
            _constant(f"{part}_factor", TensorProto.INT64, [1], [factor]),
            helper.make_node("Mul", [f"{part}_size", f"{part}_factor"], [part]),
        ]
    if not parts:
        return [_constant(name, kind, [], [0])]
    shape_node = helper.make_node("Concat", parts, [f"{name}_sizes"], axis=0)
    zero = helper.make_tensor(name, kind, [1], [0])
    return [*nodes, shape_node, helper.make_node("ConstantOfShape", [f"{name}_sizes"], [name], value=zero)]


def _constant(name: str, kind: int, dims: list[int], values: list[int]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, values))
