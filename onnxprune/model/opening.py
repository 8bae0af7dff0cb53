"""Lay open the bodies of If, Loop and Scan: their nodes and weights become part of one flat graph, between markers."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxprune.model import markers
from onnxprune.model.skeleton import outline, without_data, without_graph, without_nodes

_BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}
# Constant nodes whose value has more elements are weights; smaller ones are settings and stay nodes.
_LARGEST_SETTING = 256
Scope = ChainMap[str, str]


def open_bodies(proto: ModelProto) -> ModelProto:
    """The model with its bodies laid open; the same object where it has none that can be.

    Names stay what they are where no other tensor (node) of the model has them; else they are put behind the name of
    the control-flow node and its branch: ``If_0/else_branch/conv``. New initializers come behind the model's own.

    A body stays closed where it holds nodes with bodies that have no form here (SequenceMap, Scan before opset 9,
    foreign operators), sparse constants, or does not have the inputs and outputs that the operator asks for.
    """
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    if not any(_is_open(node, opset) for node in proto.graph.node):
        return proto
    return _Opening(proto, opset).model


def _is_open(node: NodeProto, opset: int) -> bool:
    """Whether a node holds bodies and all of them can be laid open."""
    names = _BODIES.get(node.op_type)
    if names is None or node.domain not in ("", "ai.onnx"):
        return False
    bodies = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    if bodies.keys() != set(names) or not _fits(node, list(bodies.values()), opset):
        return False
    return all(_plain(body, opset) for body in bodies.values())


def _fits(node: NodeProto, bodies: list[GraphProto], opset: int) -> bool:
    """Whether the bodies have the inputs and outputs that their node gives and takes."""
    given, made = len(node.input), len(node.output)
    if node.op_type == "If":
        return given == 1 and all(not b.input and len(b.output) == made for b in bodies)
    body = bodies[0]
    if node.op_type == "Loop":
        return given >= 2 and len(body.input) == given and given - 2 <= made <= len(body.output) - 1
    scanned = _int(node, "num_scan_inputs", 0)
    states = given - scanned
    return opset >= 9 and 0 < scanned <= given == len(body.input) and states <= made <= len(body.output)


def _plain(body: GraphProto, opset: int) -> bool:
    """Whether every node of a body is free of bodies itself, or its bodies can be laid open as well."""
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
    found = next((list(a.ints) for a in node.attribute if a.name == name), [])
    return found if len(found) == count else [0] * count


class _Opening:
    """The flat model while it is written."""

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
    def _free(taken: set[str], name: str, path: str) -> str:
        result = name if name and name not in taken else f"{path}/{name}"
        number = 1
        while result in taken:
            result, number = f"{path}/{name}_{number}", number + 1
        taken.add(result)
        return result

    def _define(self, name: str, scope: Scope, path: str) -> str:
        """The flat name of a tensor that a body defines."""
        if not name:
            return ""
        scope.maps[0][name] = flat = self._free(self._tensors, name, path)
        return flat

    def _mark(self, op: str, inputs: Iterable[str], outputs: Iterable[str], label: str, **more: Any) -> NodeProto:
        """A marker; one without outputs of its own gets one that nobody reads."""
        made = [o or self._free(self._tensors, "", f"{label}/{op}") for o in outputs]
        node: NodeProto = self.model.graph.node.add()
        node.CopyFrom(helper.make_node(op, list(inputs), made, name=label, domain=markers.DOMAIN, **more))
        return node

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _add(self, node: NodeProto, scope: Scope, path: str) -> None:
        """One node of the model or, where ``path`` names one, of a body."""
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
        """The flat name of a node of a body."""
        flat = self._free(self._nodes, name, path)
        if flat != name:
            self._renamed += [flat, name]
        return flat

    def _constant(self, node: NodeProto, value: TensorProto, scope: Scope, path: str) -> None:
        """A Constant node whose value becomes an initializer."""
        hollow, flat = NodeProto(), self._define(node.output[0], scope, path)
        hollow.CopyFrom(node)
        for attribute in hollow.attribute:
            if attribute.name == "value":
                attribute.t.CopyFrom(without_data(value))
        self._mark(markers.CONSTANT, [], [""], path, node=hollow.SerializeToString(), tensor=flat)
        self._weight(value, flat)

    def _weight(self, tensor: TensorProto, flat: str) -> None:
        copy = self.model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = flat

    def _open(self, node: NodeProto, scope: Scope, path: str) -> None:
        """A control-flow node as markers, with its bodies between them."""
        label = node.name or next((o for o in node.output if o), node.op_type)
        whole = _Whole(node, self._name(label, path) if path else label, [scope.get(n, n) for n in node.input])
        if node.op_type == "If":
            self._choose(whole, scope, path)
        else:
            self._repeat(whole, scope, path)
        self._mark(markers.CLOSE, [], [""], whole.label, kind=node.op_type)

    def _outer(self, whole: _Whole, scope: Scope, path: str) -> list[str]:
        """The flat names of what a control-flow node gives: also of what nobody wants."""
        names = []
        for name in whole.node.output:
            if not name:
                names.append(self._free(self._tensors, "unused", whole.label))
            else:
                names.append(self._define(name, scope, path) if path else name)
        return names

    def _choose(self, whole: _Whole, scope: Scope, path: str) -> None:
        """An If: one branch after the other, and what one of them gives."""
        results = []
        for kind, name in ((markers.OPEN, "then_branch"), (markers.ELSE, "else_branch")):
            inner = scope.new_child()
            self._enclose(kind, whole, name, inner, whole.inputs, [])
            results.append([inner.get(o.name, o.name) for o in whole.bodies[name].output])
        self._mark(markers.END, [], [""], whole.label, kind="If")
        for at, output in enumerate(self._outer(whole, scope, path)):
            read = [results[0][at], results[1][at], whole.inputs[0]]
            self._mark(markers.JOIN, read, [output], whole.label, kind="If", at=at)

    def _repeat(self, whole: _Whole, scope: Scope, path: str) -> None:
        """A Loop or Scan: states, what is scanned, the body and its results."""
        node, body, inputs, inner = whole.node, whole.bodies["body"], whole.inputs, scope.new_child()
        loop, label = node.op_type == "Loop", whole.label
        first, kind = 2 if loop else 0, node.op_type
        scanned = 0 if loop else _int(node, "num_scan_inputs", 0)
        states, axes = len(inputs) - first - scanned, _ints(node, "scan_input_axes", scanned)
        names = [self._define(i.name, inner, f"{label}/body") for i in body.input]

        def enter() -> None:
            for at in range(first, len(inputs)):
                k = at - first - states
                if k < 0:
                    self._mark(markers.CARRY, [inputs[at]], [names[at]], label, kind=kind, at=at)
                else:
                    self._mark(markers.SLICE, [inputs[at]], [names[at]], label, kind=kind, at=at, axis=axes[k])

        self._enclose(markers.OPEN, whole, "body", inner, inputs[:first], names[:first], enter)
        given = [inner.get(o.name, o.name) for o in body.output]
        self._mark(markers.END, given[: first // 2], [""], label, kind=kind)
        beside, along = (inputs[:2], 0) if loop else (inputs[-1:], axes[-1])
        stacked = _ints(node, "scan_output_axes", len(body.output) - first // 2 - states)
        for k, output in enumerate(self._outer(whole, scope, path)):
            at = k + first // 2
            if k < states:
                self._mark(markers.TIE, [names[first + k], given[at]], [output], label, kind=kind, at=at)
            else:
                places = {"axis": stacked[k - states], "along": along}
                self._mark(markers.STACK, [given[at], *beside], [output], label, kind=kind, at=at, **places)

    def _enclose(
        self,
        kind: str,
        whole: _Whole,
        name: str,
        scope: Scope,
        inputs: list[str],
        outputs: list[str],
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        """A marker with all that is needed to close the body again, and the body's weights and nodes."""
        body, path, before = whole.bodies[name], f"{whole.label}/{name}", len(self._renamed)
        held = [self._define(t.name, scope, path) for t in body.initializer]
        marker = self._mark(kind, inputs, ["", *outputs], whole.label, kind=whole.node.op_type, body=name)
        for tensor, flat in zip(body.initializer, held, strict=True):
            self._weight(tensor, flat)
        enter()
        for node in body.node:
            self._add(node, scope, path)
        own = scope.maps[0]
        for info in (*body.input, *body.output, *body.value_info):
            flat = own.get(info.name, "")
            if flat and flat not in self._infos:
                self._infos.add(flat)
                self.model.graph.value_info.add().CopyFrom(info)
                self.model.graph.value_info[-1].name = flat
        texts: dict[str, list[str] | bytes] = {
            "initializers": held,
            "tensors": [n for name, flat in own.items() if name != flat for n in (flat, name)],
            "nodes": self._renamed[before:],
        }
        if kind == markers.OPEN:
            texts["node"] = whole.hollow()
        for key, value in texts.items():
            if value:
                marker.attribute.append(helper.make_attribute(key, value))


@dataclass(slots=True)
class _Whole:
    """A control-flow node that is being laid open: its flat name, and those of its inputs."""

    node: NodeProto
    label: str
    inputs: list[str]

    @property
    def bodies(self) -> dict[str, GraphProto]:
        """Its bodies by the name of their attribute."""
        return {a.name: a.g for a in self.node.attribute if a.type == AttributeProto.GRAPH}

    def hollow(self) -> bytes:
        """The node with bodies that hold declared values and texts alone."""
        hollow = NodeProto()
        hollow.CopyFrom(self.node)
        for attribute in hollow.attribute:
            if attribute.type == AttributeProto.GRAPH:
                attribute.g.CopyFrom(outline(attribute.g))
        return bytes(hollow.SerializeToString())
