"""What removing a unit saves: multiply-accumulates, parameters, or measured seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.graph import cost
from onnxprune.graph.view import Node
from onnxprune.groups.units import Group
from onnxprune.labels.atoms import mix
from onnxprune.labels.label import Ids, Label
from onnxprune.planning import atoms_removed
from onnxprune.rewrite.after import After
from onnxprune.selection.policy import columns

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
ShapeOf = Callable[[str], Any]
Cost = Callable[[ShapeOf], float]

# Units that appear in other numbers elsewhere save other amounts; beyond this many kinds the last stands for the rest.
_KINDS = 16


def macs_after(analysis: Analysis, removed: Mask) -> int:
    """Multiply-accumulates of the model without what ``removed`` (mask over atoms) takes, at the first probe's shapes.

    Nothing is cut: sizes follow from the labels.
    """
    shape = After(analysis.table, removed).shape
    return sum(cost.macs(node, shape) for node in _layers(analysis))


def params_after(analysis: Analysis, removed: Mask) -> int:
    """Elements of all weights without what ``removed`` (mask over atoms) takes; constants that a cut may add aside."""
    after, graph = After(analysis.table, removed), analysis.graph
    lost = {n: _size(graph.weights[n].shape) - _size(after.shape(n)) for n in graph.weights if after.touched(n)}
    return analysis.parameters - sum(lost.values())


def savings(
    analysis: Analysis, groups: Sequence[Group], what: str, seconds: Mapping[str, float] | None = None
) -> dict[int, Array]:
    """What the removal of each unit saves, [units] by group id; more than 0.

    Counted exactly, for one unit of every kind: its share of each tensor that it lies on, and where a layer reads and
    makes channels of the same group, both. In a group of several rows a unit stands for its part of a step, which takes
    a unit of every row.

    Args:
        what: ``macs``, ``params`` or ``latency``. seconds: measured time of every node by its label, for ``latency``.
    """
    tensors = _tensors(analysis)
    nodes: dict[str, list[Node]] = {}
    for node in analysis.graph.nodes:
        for name in {*node.inputs, *node.outputs}:
            nodes.setdefault(name, []).append(node)
    result = {}
    for group in groups:
        names = sorted({n for g in (group.id, *group.children) for n in tensors.get(g, ())})
        if what == "params":
            weights = [n for n in names if n in analysis.graph.weights and n not in analysis.copies]
            costs: list[Cost | None] = [_elements(n) for n in weights]
        else:
            near = {node.index: node for n in names for node in nodes.get(n, ())}
            costs = [_work(analysis, node, what, seconds or {}) for node in near.values()]
        result[group.id] = _of_group(analysis, group, [c for c in costs if c is not None], names)
    return result


def spread(analysis: Analysis, measured: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """Seconds of every node of the model by its label, from what a runtime measured.

    A runtime renames what it fuses: such a time goes to the node whose label, or whose output's name, the name holds,
    or to the nearest node in front of it that is of the measured operator. What is left is shared out over the nodes
    without a time of their own, by their multiply-accumulates.

    Args:
        measured: (name, operator, seconds) of every node that was run.
    """
    nodes = analysis.graph.nodes
    named = {name: node for node in nodes for name in (*node.outputs, node.label) if name}
    longest = sorted(named, key=len, reverse=True)
    result: dict[str, float] = {}
    rest = 0.0
    for name, op, time in measured:
        node = named.get(name) or next((named[x] for x in longest if x in name), None)
        if node is None:
            rest += time
        else:
            home = _fused_into(analysis, node, op).label
            result[home] = result.get(home, 0.0) + time
    macs = {n.label: cost.macs(n, analysis.facts.shape) for n in nodes}
    waiting = {n: m for n, m in macs.items() if m and n not in result} or {n: m for n, m in macs.items() if m}
    total = sum(waiting.values())
    for name, share in waiting.items():
        result[name] = result.get(name, 0.0) + rest * share / total
    return result


def _fused_into(analysis: Analysis, node: Node, op: str) -> Node:
    """The node of operator ``op`` that ``node`` was fused into: itself, or a few steps in front of it."""
    found = node
    for _ in range(8):
        if op.removeprefix("Fused") == found.op:
            return found
        before = [analysis.graph.producer.get(n) for n in found.inputs[:1]]
        if not before or before[0] is None:
            break
        found = before[0]
    return node


def _layers(analysis: Analysis) -> list[Node]:
    return [node for node in analysis.graph.nodes if cost.is_layer(node, analysis.graph)]


def _size(shape: Any) -> int:
    return int(np.prod(shape if shape is not None else (), dtype=np.int64))


def _elements(name: str) -> Cost:
    return lambda shape: float(_size(shape(name)))


def _work(analysis: Analysis, node: Node, what: str, seconds: Mapping[str, float]) -> Cost | None:
    """The cost of a node as a function of the shapes; None where it has none."""
    if what == "macs":
        return (lambda shape: float(cost.macs(node, shape))) if cost.is_layer(node, analysis.graph) else None
    if not seconds.get(node.label):
        return None
    shapes = [analysis.facts.shape(n) for n in node.outputs if n]
    if any(s is None or None in s for s in shapes):
        return None

    def work(shape: ShapeOf) -> float:
        return float(cost.macs(node, shape) or sum(_size(shape(n)) for n in node.outputs if n))

    each = seconds[node.label] / max(work(analysis.facts.shape), 1.0)
    return lambda shape: each * work(shape)


def _tensors(analysis: Analysis) -> dict[int, list[str]]:
    """Names of the tensors that units of each group lie on."""
    result: dict[int, list[str]] = {}
    known: dict[int, tuple[Label, Ids]] = {}
    for name, labels in analysis.table.items().items():
        found: set[int] = set()
        for label in labels:
            if id(label) not in known:
                known[id(label)] = label, np.unique(analysis.units.group_of[analysis.units.component[label.ids]])
            found.update(known[id(label)][1].tolist())
        for number in found - {-1}:
            result.setdefault(number, []).append(name)
    return result


def _of_group(analysis: Analysis, group: Group, costs: Sequence[Cost], names: Sequence[str]) -> Array:
    """Savings [units] of one group, from the costs of what it touches as functions of the shapes."""
    units, kinds = analysis.units, _kinds(analysis, group, names)
    before = [c(analysis.facts.shape) for c in costs]
    result = np.zeros(group.size)
    for kind in range(int(kinds.max()) + 1):
        mine = np.flatnonzero(kinds == kind)
        chosen = np.zeros(units.frozen.size, dtype=bool)
        step = mine[:1] if group.size == group.steps else np.flatnonzero(columns(group.classes, group.steps) == 0)
        chosen[group.units[step]] = True
        shape = After(analysis.table, atoms_removed(units, chosen)).shape
        result[mine] = sum(b - c(shape) for b, c in zip(before, costs, strict=True)) / step.size
    # A unit that saves nothing that was counted still has to compare: it counts as the least that any other saves.
    least = result[result > 0].min() if (result > 0).any() else 1.0
    return np.where(result > 0, result, least)


def _kinds(analysis: Analysis, group: Group, names: Sequence[str]) -> Ids:
    """Units that appear equally often on the same tensors are of one kind, [units]; all, where rows must agree."""
    if group.size != group.steps:
        return np.zeros(group.size, np.int64)
    component = analysis.units.component
    place = np.full(analysis.units.frozen.size, -1, dtype=np.int64)
    place[group.units] = np.arange(group.size)
    keys = np.zeros(group.size, dtype=np.uint64)
    number = 0
    for name in names:
        for label in analysis.table.get(name):
            found = place[component[label.ids.ravel()]]
            counts = np.bincount(found[found >= 0], minlength=group.size)
            keys += mix(counts * 1_000_003 + number)
            number += 1
    return np.minimum(np.unique(keys, return_inverse=True)[1].astype(np.int64), _KINDS - 1)
