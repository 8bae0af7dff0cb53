"""Put bodies that were laid open back into their nodes, with the sizes, names and weights that they have by now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxprune.model import markers
from onnxprune.model.skeleton import without_data, without_graph, without_nodes
from onnxprune.model.weights import Weight


def close_bodies(
    proto: ModelProto, weights: Mapping[str, Weight], *, branches: bool = True
) -> tuple[ModelProto, Mapping[str, Weight]]:
    """The model as runtimes know it, and the weights of its main graph; the same objects where no body is open.

    Weights of bodies are put into them, so the model holds their data.

    Args:
        branches: whether to close every If; False: those that lie in no Loop or Scan stay open.
    """
    if not markers.has_bodies(proto):
        return proto, weights
    closing = _Closing(proto, weights, branches)
    return closing.model, closing.weights


@dataclass(slots=True)
class _Body:
    """A body while it is filled. ``flat``: the flat names of what it defines under another name."""

    graph: GraphProto
    initializers: list[str]
    flat: dict[str, str]
    nodes: list[NodeProto] = field(default_factory=list)
    outputs: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Frame:
    """A control-flow node while its bodies are filled."""

    node: NodeProto
    bodies: list[_Body] = field(default_factory=list)


class _Closing:
    """The walk over a flat graph, with the nodes that are open at the moment."""

    def __init__(self, proto: ModelProto, weights: Mapping[str, Weight], branches: bool) -> None:
        self._source, self._all = proto.graph, weights
        self._tensors = {t.name: t for t in proto.graph.initializer}
        self._infos = {i.name: i for i in proto.graph.value_info}
        self._names: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._held: set[str] = set()
        self._inner: set[str] = set()
        kept = set() if branches else _of_branches(proto)
        for index, node in enumerate(proto.graph.node):
            if node.domain == markers.DOMAIN and index not in kept:
                self._learn(node)
        self._top: list[NodeProto] = []
        self._open: list[_Frame] = []
        for index, node in enumerate(proto.graph.node):
            if index in kept:
                self._top.append(node)
            else:
                self._take(node)
        self.model = self._whole(proto)
        self.weights = {name: weight for name, weight in weights.items() if name not in self._held}

    def _learn(self, marker: NodeProto) -> None:
        """What a marker says of names, ahead of everything else."""
        self._names.update(_pairs(_texts(marker, "tensors")))
        self._labels.update(_pairs(_texts(marker, "nodes")))
        self._held.update(_texts(marker, "initializers"))
        if marker.op_type == markers.CONSTANT:
            self._held.update(_texts(marker, "tensor"))

    def _whole(self, proto: ModelProto) -> ModelProto:
        model = without_graph(proto)
        left = any(node.domain == markers.DOMAIN for node in self._top)
        kept = [opset for opset in model.opset_import if left or opset.domain != markers.DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)
        graph = without_nodes(proto.graph)
        del graph.initializer[:], graph.value_info[:]
        graph.initializer.extend(t for t in proto.graph.initializer if t.name not in self._held)
        graph.value_info.extend(i for i in proto.graph.value_info if i.name not in self._inner)
        graph.node.extend(self._top)
        model.graph.CopyFrom(graph)
        return model

    def _read(self, name: str) -> str:
        """A tensor's name in its own body."""
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
            hollow = NodeProto.FromString(_bytes(node, "node"))
            for at, name in enumerate(node.input):
                hollow.input[at] = self._read(name)
            self._open.append(_Frame(hollow))
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
        """A new body."""
        name = _texts(marker, "body")[0]
        frame = self._open[-1]
        graph = next(a.g for a in frame.node.attribute if a.type == AttributeProto.GRAPH and a.name == name)
        flat = {own: flat for flat, own in _pairs(_texts(marker, "tensors"))}
        frame.bodies.append(_Body(graph, _texts(marker, "initializers"), flat))
        self._inner.update(marker.output)

    def _tie(self, node: NodeProto, frame: _Frame) -> None:
        """Where a value enters or leaves a body: the node's inputs and the body's outputs."""
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
        """One more result than the node came with, see :mod:`onnxprune.model.exposing`."""
        if at < len(frame.bodies[0].graph.output):
            return
        numbers = {a.name: int(a.i) for a in node.attribute}
        # Only Scan asks for a rank; the results of an If may differ in theirs.
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
        """A Constant node with the value it has by now; none where nothing reads it any more."""
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
        """An initializer with its data."""
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
        """Nodes, weights, outputs and declared sizes of one body."""
        graph = body.graph
        names = [n for n in body.initializers if n in self._tensors]
        graph.initializer.extend(self._filled(n, self._read(n)) for n in names)
        self._inner.update(names)
        graph.node.extend(body.nodes)
        for at, flat in body.outputs.items():
            self._output(body, at, flat)
        made = {*(o for node in graph.node for o in node.output), *(i.name for i in (*graph.input, *graph.output))}
        kept = [i for i in graph.value_info if i.name in made]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        for info in (*graph.input, *graph.output, *graph.value_info):
            now = self._infos.get(body.flat.get(info.name, info.name))
            if now is not None:
                _resize(info, now)

    def _output(self, body: _Body, at: int, flat: str) -> None:
        """What a body gives under another name than before: a constant of the main graph goes through an Identity."""
        output, name = body.graph.output[at], self._read(flat)
        if name == output.name:
            return
        made = {o for node in body.graph.node for o in node.output}
        if name not in made and name not in {i.name for i in (*body.graph.input, *body.graph.initializer)}:
            through = f"{name}_of_{output.name}"
            body.graph.node.append(helper.make_node("Identity", [name], [through], name=through))
            name = through
        output.name = name


def _of_branches(proto: ModelProto) -> set[int]:
    """Markers of Ifs that lie in no Loop or Scan."""
    found = [markers.marker_of(node) for node in proto.graph.node]
    around = markers.enclosures(found)
    return {
        k
        for k, ((op, kind), bodies) in enumerate(zip(found, around, strict=True))
        if op and kind in ("If", "") and markers.repeating(bodies) is None
    }


def _resize(info: ValueInfoProto, now: ValueInfoProto) -> None:
    """Sizes that the flat graph declares by now."""
    ours, theirs = info.type.tensor_type.shape.dim, now.type.tensor_type.shape.dim
    if len(ours) == len(theirs):
        for dim, new in zip(ours, theirs, strict=True):
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
