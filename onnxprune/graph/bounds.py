"""Ranges of integer inputs: an input that indexes a table must stay inside it."""

from __future__ import annotations

import numpy as np

from onnxprune.graph.facts import Facts
from onnxprune.graph.values import size_of
from onnxprune.graph.view import Graph, Node
from onnxprune.operators.registry import Move, rule_of

_TABLES = {("Gather", 1), ("GatherElements", 1), ("GatherND", 1), ("OneHot", 0)}


def integer_bounds(graph: Graph, facts: Facts) -> dict[str, tuple[int, int]]:
    """{input: (lowest, highest)} for graph inputs that reach the index of a table by moves and constant offsets.

    An input of one number that is only compared with a constant, such as a sampling rate, is that constant.
    """
    result: dict[str, tuple[int, int]] = {}
    for name in graph.inputs:
        named = _named(graph, facts, name)
        if named is not None:
            result[name] = named, named
            continue
        high = _highest(graph, facts, name)
        if high is not None:
            result[name] = (0, max(high, 0))
    return result


def _named(graph: Graph, facts: Facts, name: str) -> int | None:
    """The only number that a scalar is held against."""
    shape, readers = facts.shape(name), graph.consumers.get(name, ())
    if shape is None or None in shape or size_of(shape) != 1:
        return None
    values = [facts.static_value(n.inputs[1 - i]) if n.op == "Equal" else None for n, i in readers]
    found = {int(v.ravel()[0]) for v in values if v is not None and v.size == 1 and v.dtype.kind in "iu"}
    return found.pop() if len(found) == 1 and None not in [v if v is None else 0 for v in values] else None


def _highest(graph: Graph, facts: Facts, name: str) -> int | None:
    best: int | None = None
    queue, seen = [(name, 0)], {name}
    while queue:
        tensor, offset = queue.pop()
        for node, i in graph.consumers.get(tensor, ()):
            limit = _limit(node, i, facts)
            if limit is not None:
                best = limit - offset if best is None else min(best, limit - offset)
            step = _offset(node, i, facts)
            if step is None:
                continue
            for out in node.outputs:
                if out and out not in seen:
                    seen.add(out)
                    queue.append((out, offset + step))
    return best


def _limit(node: Node, i: int, facts: Facts) -> int | None:
    if (node.op, i) not in _TABLES:
        return None
    if node.op == "OneHot":
        depths = [p.values.get(node.inputs[1]) for p in facts.probes]
        return min((int(d.ravel()[0]) - 1 for d in depths if d is not None), default=None)
    shapes = [p.shapes.get(node.inputs[0]) for p in facts.probes]
    axis = 0 if node.op == "GatherND" else node.attrs.get("axis", 0)
    # A table that is read up to an open length is as long as the shortest of them.
    return min((int(s[axis]) - 1 for s in shapes if s is not None and s[axis] is not None), default=None)


def _offset(node: Node, i: int, facts: Facts) -> int | None:
    rule = rule_of(node)
    hands_on = rule.chooses or rule.moves is not None
    if hands_on and (i == 0 or rule.moves is Move.JOIN or rule.pointwise):
        return 0
    if node.op in ("Add", "Sub"):
        others = [p.values.get(node.inputs[1 - i]) for p in facts.probes]
        known = [int(np.max(v)) for v in others if v is not None and v.size]
        if known:
            return max(known) if node.op == "Add" else 0
    return None
