"""Whether a model's names fit together: every output is unique, every input is defined before it is read."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from onnxprune.errors import ModelError

_Scope = tuple[set[str], ...]
Names = list[tuple[list[str], list[str]]]
"""The inputs and outputs of every node of a graph, in order: protobuf takes its time to hand them out."""


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
        if attribute.type == AttributeProto.GRAPH:
            _check_graph(attribute.g, scope)
        elif attribute.type == AttributeProto.GRAPHS:
            for body in attribute.graphs:
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
    return ModelError(
        f"{_label(node)} reads {name!r} before {_label(maker)} makes it; nodes must be in topological order",
        hint="Sort the graph first, for example with onnx_graphsurgeon: import_onnx(model).toposort().",
    )


def _label(node: NodeProto) -> str:
    return f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"
