"""Whether a model's names fit together: every output is unique, every input is defined before it is read.

Some tools write nodes in another order than they run in (onnxruntime's converter to half precision appends its casts,
for one); onnxruntime sorts them, and so does :func:`sort_nodes`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from onnxprune.errors import ModelError
from onnxprune.model.weights import TensorWeight

_Scope = tuple[set[str], ...]
Names = list[tuple[list[str], list[str]]]
"""The inputs and outputs of every node of a graph, in order: protobuf takes its time to hand them out."""


class Unsorted(ModelError):
    """A node reads what a later one makes."""


def same_nodes(one: ModelProto, other: ModelProto) -> bool:
    """Whether two models have the same nodes, those of bodies too, in whatever order, and the same inputs and outputs.

    Of initializers names, types and sizes are compared in the main graph, values as well in bodies.
    """
    return _face(one.graph) == _face(other.graph) and _nodes(one.graph) == _nodes(other.graph)


def _face(graph: GraphProto) -> tuple[list[str], list[str], list[tuple[str, int, tuple[int, ...]]]]:
    tensors = sorted((t.name, t.data_type, tuple(t.dims)) for t in graph.initializer)
    return [i.name for i in graph.input], [o.name for o in graph.output], tensors


def _nodes(graph: GraphProto) -> list[bytes]:
    """Every node as bytes that do not depend on the order of nodes or on how tensors are stored."""
    return sorted(_plain(node) for node in graph.node)


def _plain(node: NodeProto) -> bytes:
    if not any(a.HasField("t") or _bodies_of(a) for a in node.attribute):
        return bytes(node.SerializeToString(deterministic=True))
    bare = NodeProto()
    bare.CopyFrom(node)
    parts: list[object] = []
    for attribute in bare.attribute:
        if attribute.HasField("t"):
            parts.append(_tensor(attribute.t))
        parts += [(_face(g), _nodes(g), [_tensor(t) for t in g.initializer]) for g in _bodies_of(attribute)]
        for field in ("t", "g", "graphs"):
            attribute.ClearField(field)
    return bytes(bare.SerializeToString(deterministic=True)) + repr(parts).encode()


def _tensor(tensor: TensorProto) -> tuple[int, tuple[int, ...], object]:
    if tensor.data_type == TensorProto.STRING:
        return tensor.data_type, tuple(tensor.dims), list(tensor.string_data)
    return tensor.data_type, tuple(tensor.dims), bytes(TensorWeight(tensor).stored())


def _bodies_of(attribute: AttributeProto) -> Iterable[GraphProto]:
    return [attribute.g] if attribute.HasField("g") else attribute.graphs


def ordered(proto: ModelProto) -> Names:
    """Checks names as :func:`check_structure` does; where nodes are out of order, sorts them in place first."""
    try:
        return check_structure(proto)
    except Unsorted:
        sort_nodes(proto)
        return check_structure(proto)


def sort_nodes(proto: ModelProto) -> None:
    """Sort the nodes of every graph, body and function in place: each behind what it reads, else in their old order.

    Nodes that read each other in a circle stay where they are, for :func:`check_structure` to refuse.
    """
    _sort(proto.graph)
    for function in proto.functions:
        _sort(function)


def _sort(graph: Any) -> None:
    """Sort the nodes of a GraphProto or FunctionProto, those of bodies first."""
    for node in graph.node:
        for body in _bodies(node):
            _sort(body)
    nodes = list(graph.node)
    maker = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    waiting = [{maker[name] for name in _reads(node) if name in maker} for node in nodes]
    if all(max(before, default=-1) < k for k, before in enumerate(waiting)):
        return
    readers: dict[int, list[int]] = {}
    for k, before in enumerate(waiting):
        for b in before:
            readers.setdefault(b, []).append(k)
    ready = [k for k, before in enumerate(waiting) if not before]  # rising, and so a heap
    order = []
    while ready:
        done = heapq.heappop(ready)
        order.append(done)
        for k in readers.get(done, ()):
            waiting[k].discard(done)
            if not waiting[k]:
                heapq.heappush(ready, k)
    if len(order) == len(nodes):
        copies = [NodeProto() for _ in nodes]
        for copy, k in zip(copies, order, strict=True):
            copy.CopyFrom(nodes[k])
        del graph.node[:]
        graph.node.extend(copies)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, and those in its bodies, whose own names no graph around them has."""
    yield from node.input
    for body in _bodies(node):
        for inner in body.node:
            yield from _reads(inner)
        yield from (output.name for output in body.output)


def check_structure(proto: ModelProto) -> Names:
    """Checks names and order of a model's graphs; needs no weights, takes time linear in the nodes.

    Returns:
        the names that the nodes of the main graph read and make.

    Raises:
        ModelError: a name that is not text, a tensor defined twice, read before it is made, or never made.
    """
    return _check_graph(proto.graph, ())


def _check_graph(graph: GraphProto, outer: _Scope) -> Names:
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    initializers += [sparse.values.name for sparse in graph.sparse_initializer]
    _check_text("the graph", [*inputs, *initializers, *(value.name for value in graph.value_info)])
    _check_once("graph input", inputs)
    _check_once("initializer", initializers)
    # An initializer may bear an input's name: it is that input's default value.
    known = {*inputs, *initializers}
    scope = (*outer, known)
    names: Names = []
    for node in graph.node:
        inputs, outputs = list(node.input), list(node.output)
        names.append((inputs, outputs))
        _check_node(node, inputs, outputs, graph, scope)
        for output in outputs:
            if output and output in known:
                raise _twice(f"{_label(node)} gives", output)
            known.add(output)
    outputs = [value.name for value in graph.output]
    _check_text("the graph", outputs)
    for output in outputs:
        if not _defined(output, scope):
            raise ModelError(
                f"the graph output {output!r} is made by no node of graph {graph.name!r}",
                hint="Export the model again.",
            )
    return names


def _check_node(node: NodeProto, inputs: list[str], outputs: list[str], graph: GraphProto, scope: _Scope) -> None:
    kind = node.op_type
    try:
        "".join([node.name, kind, node.domain, *inputs, *outputs])  # all of it text, at the speed of C
    except TypeError:
        _check_text(_label(node), [node.name, kind, node.domain, *inputs, *outputs])
    if not kind:
        raise ModelError(f"{_label(node)} has no operator type", hint="The file is damaged, or was written by hand.")
    known = scope[-1]
    for name in inputs:
        if name and name not in known and not _defined(name, scope):
            raise _undefined(node, name, graph)
    for attribute in node.attribute:
        if not isinstance(attribute.name, str):
            raise _not_text(_label(node), attribute.name)
    for body in _bodies(node):
        _check_graph(body, scope)


def _defined(name: str, scope: _Scope) -> bool:
    return any(name in names for names in scope)


def _check_once(kind: str, names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _twice(f"an {kind}" if kind[0] == "i" else f"a {kind}", name)
        seen.add(name)


def _check_text(where: str, names: Iterable[object]) -> None:
    # protobuf hands out bytes for a name that is not UTF-8, whatever its type says.
    for name in names:
        if not isinstance(name, str):
            raise _not_text(where, name)


def _not_text(where: str, name: object) -> ModelError:
    return ModelError(f"{where} has a name that is not UTF-8 text: {name!r}", hint="The file is damaged.")


def _twice(what: str, name: str) -> ModelError:
    return ModelError(
        f"{what} {name!r}, a name that is in use already; every tensor of a graph needs one definition",
        hint="Rename one of the two, or export the model again.",
    )


def _undefined(node: NodeProto, name: str, graph: GraphProto) -> ModelError:
    maker = next((other for other in graph.node if name in other.output), None)
    if maker is None:
        return ModelError(
            f"{_label(node)} reads {name!r}, which no input, initializer or node defines",
            hint="The file is damaged, or a tool that edited it left a name behind.",
        )
    return Unsorted(
        f"{_label(node)} reads {name!r} before {_label(maker)} makes it: the two wait for each other",
        hint="Every node must read what earlier ones make. The file is damaged; export the model again.",
    )


def _label(node: NodeProto) -> str:
    return f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"
