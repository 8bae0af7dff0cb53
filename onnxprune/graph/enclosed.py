"""Shapes across the markers of bodies, and how often a body runs.

What is true of a state on entry need not be true in the second iteration: a state keeps those sizes that the body gives
back as it got them, which then hold in every iteration; the others are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx

from onnxprune.graph.values import Probe
from onnxprune.graph.view import Graph, Node
from onnxprune.model import markers
from onnxprune.operators.registry import Move, rule_of

Walk = Callable[[Sequence[Node]], None]
"""Infers shapes and values of nodes in order."""


def infer_marker(graph: Graph, node: Node, probe: Probe, walk: Walk) -> None:
    """Shapes and types of what a marker gives."""
    op = node.op
    if op == markers.OPEN:
        kinds = (onnx.TensorProto.BOOL, onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
        for name, kind in zip(node.outputs, kinds, strict=False):
            probe.shapes[name], probe.dtypes[name] = (), kind
    if op in (markers.OPEN, markers.ELSE) and node.kind == "If":
        _note_idle(graph, node, probe)
    elif op == markers.END and node.kind != "If":
        _settle(graph, node, probe, walk)
    elif op in (markers.CARRY, markers.SLICE, *markers.RESULTS):
        name, source = node.outputs[0], node.inputs[0]
        probe.shapes[name] = _result(graph, node, probe)
        known = probe.dtypes.get(source) or _weight_type(graph, source)
        if known:
            probe.dtypes[name] = known


def _weight_type(graph: Graph, name: str) -> int:
    weight = graph.weights.get(name)
    return 0 if weight is None else weight.onnx_type


def _result(graph: Graph, node: Node, probe: Probe) -> Any:
    shape = probe.shapes.get(node.inputs[0])
    if node.op == markers.TIE:
        return _common(shape, probe.shapes.get(node.inputs[1]))
    if node.op == markers.JOIN:
        taken = probe.values.get(node.inputs[2])
        other = probe.shapes.get(node.inputs[1])
        return _common(shape, other) if taken is None else shape if taken.ravel()[0] else other
    if shape is None or node.op == markers.CARRY:
        return shape
    axis = int(node.attrs["axis"])
    if node.op == markers.SLICE:
        axis %= len(shape)
        return (*shape[:axis], *shape[axis + 1 :])
    axis %= len(shape) + 1
    return (*shape[:axis], _stacked(graph, node, probe), *shape[axis:])


def _common(a: Any, b: Any) -> Any:
    """What two shapes have in common: None for a size that differs, None for the whole where the rank does."""
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(n if n == m else None for n, m in zip(a, b, strict=True))


def _note_idle(graph: Graph, node: Node, probe: Probe) -> None:
    """Remember the nodes of a branch that is not taken."""
    chosen = probe.values.get(node.inputs[0])
    if chosen is not None and bool(chosen.ravel()[0]) != (node.op == markers.OPEN):
        outside = len(graph.around[node.index])
        for inner in graph.nodes[node.index + 1 :]:
            if len(graph.around[inner.index]) <= outside:
                return
            probe.idle.add(inner.index)


def _settle(graph: Graph, end: Node, probe: Probe, walk: Walk) -> None:
    """Forget sizes of states that the body changes, and what followed from them, until nothing changes any more."""
    ties = []
    for node in graph.nodes[end.index + 1 :]:
        if node.op == markers.CLOSE:
            break
        if node.op == markers.TIE:
            ties.append(node)
    body = [n for n in _body(graph, end) if n.op != "Constant"]
    while True:
        changed = False
        for tie in ties:
            state, following = tie.inputs
            before = probe.shapes.get(state)
            after = _common(before, probe.shapes.get(following))
            if before is not None and after != before:
                probe.shapes[state], changed = after, True
        if not changed:
            return
        for node in body:
            for name in node.outputs:
                probe.shapes.pop(name, None)
                probe.values.set(name, None)
                probe.sizes.discard(name)
        walk(body)


def _body(graph: Graph, end: Node) -> list[Node]:
    """The nodes of the body that ends here, without the markers through which values enter it."""
    own, entries = graph.around[end.index], (markers.CARRY, markers.SLICE)
    nodes = graph.nodes[own[-1].start + 1 : end.index]
    return [n for n in nodes if n.marker not in entries or graph.around[n.index] != own]


def _stacked(graph: Graph, node: Node, probe: Probe) -> int | None:
    """How many values a scan output holds; None where it is not known."""
    if node.kind == "Scan":
        scanned = probe.shapes.get(node.inputs[1])
        return None if scanned is None else scanned[int(node.attrs["along"])]
    end = next(n for n in reversed(graph.nodes[: node.index]) if n.op == markers.END and n.name == node.name)
    return _trips(graph, end, node.inputs[1], node.inputs[2], probe)


def _trips(graph: Graph, end: Node, count: str, condition: str, probe: Probe) -> int | None:
    """How often a Loop runs, where its condition is known to stay true."""
    most = probe.values.get(count) if count else None
    if most is None or not _stays_true(graph, end, condition, probe):
        return None
    return max(int(most.ravel()[0]), 0)


def _stays_true(graph: Graph, end: Node, condition: str, probe: Probe) -> bool:
    """Whether the body hands its condition on, or gives a constant that is true."""
    name = end.inputs[0]
    while not _is_true(name, probe):
        producer = graph.producer.get(name)
        if producer is None:
            return False
        if producer.op == markers.OPEN and producer.name == end.name:
            return not condition or _is_true(condition, probe)
        if rule_of(producer).moves not in (Move.SAME, Move.CAST):
            return False
        name = producer.inputs[0]
    return not condition or _is_true(condition, probe)


def _is_true(name: str, probe: Probe) -> bool:
    value = probe.values.get(name)
    return value is not None and bool(value.ravel()[0])


def count_repeats(graph: Graph, probe: Probe) -> None:
    """State how often every node runs: as often as the Loops and Scans around it, where their sizes say so."""
    times: dict[int, int] = {}
    for node in graph.nodes:
        around = graph.around[node.index]
        node.repeats = times[around[-1].start] if around else 1
        if node.marker == markers.OPEN:
            times[node.index] = node.repeats * (_runs(graph, node, probe) or 1)


def _runs(graph: Graph, node: Node, probe: Probe) -> int | None:
    """How often the body that begins here runs."""
    for other in graph.nodes[node.index + 1 :]:
        if other.name != node.name or other.domain != markers.DOMAIN:
            continue
        if other.op == markers.SLICE:
            scanned = probe.shapes.get(other.inputs[0])
            return None if scanned is None else scanned[int(other.attrs["axis"])]
        if other.op == markers.END:
            return _trips(graph, other, node.inputs[0], node.inputs[1], probe) if node.kind == "Loop" else None
    return None
