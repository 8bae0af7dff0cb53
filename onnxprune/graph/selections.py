"""Find selections that commute with the reshape before them: consecutive parts of the outermost factor of an axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node
from onnxprune.operators.operands import slice_of

_MOVES = {"Transpose", "Unsqueeze", "Squeeze", "Identity"}


@dataclass(frozen=True, slots=True)
class Pick:
    """Positions ``start:stop`` taken by a node; ``scalar``: their axis is dropped."""

    node: Node
    output: str
    start: int
    stop: int
    scalar: bool


@dataclass(frozen=True, slots=True)
class Selections:
    """A reshape, the movement behind it, and the selections that read the end of it.

    ``places``: where the selected axis lies in the reshape's output and behind every move; ``flat``: the axis of the
    reshape's input of which it is the outermost factor.
    """

    reshape: Node
    moves: list[Node]
    places: list[int]
    picks: list[Pick]
    flat: int


def selections(graph: Graph, facts: Facts) -> Iterator[Selections]:
    """All reshapes whose output is only read by selections, perhaps after movement, on one axis that was split off.

    Interleaved forms, where the selected factor is not the outermost one of its axis, do not commute and are left out.
    """
    held = graph.captured.union(graph.outputs)
    for node in graph.steps:
        source = node.inputs[0] if node.op == "Reshape" and not node.domain else ""
        if source in graph.producer and source not in graph.weights:
            found = _find(graph, facts, node, held)
            if found is not None:
                yield found


def _find(graph: Graph, facts: Facts, node: Node, held: set[str]) -> Selections | None:
    moves: list[Node] = []
    name = node.outputs[0]
    while True:
        readers = graph.consumers.get(name, [])
        if not readers or name in held or any(i != 0 or n.domain for n, i in readers):
            return None
        if len(readers) > 1 or readers[0][0].op not in _MOVES:
            break
        moves.append(readers[0][0])
        name = moves[-1].outputs[0]
    chosen = [_picks(graph, facts, n) for n, _ in readers]
    axis = chosen[0][0] if chosen[0] is not None else -1
    picks = [p for c in chosen if c is not None and c[0] == axis for p in c[1]]
    if axis < 0 or any(c is None or c[0] != axis for c in chosen) or _overlap(picks):
        return None
    if graph.has_bodies and len({graph.around[n.index] for n in (node, *moves, *(p.node for p in picks))}) > 1:
        return None  # what is put in front of one selection would not be there for another
    places = _places(facts, moves, axis)
    flat = None if places is None else _flat_axis(facts, node, places[0])
    return None if places is None or flat is None else Selections(node, moves, places, picks, flat)


def _overlap(picks: Sequence[Pick]) -> bool:
    """Whether ranges overlap without being equal, or are empty."""
    spans = sorted({(p.start, p.stop) for p in picks})
    return any(a >= b for a, b in spans) or any(x[1] > y[0] for x, y in pairwise(spans))


def _picks(graph: Graph, facts: Facts, node: Node) -> tuple[int, list[Pick]] | None:
    """(axis, selections) of a Gather, Slice or Split with constant positions along one axis."""
    shape = facts.shape(node.inputs[0])
    if shape is None or not shape or any(n and n not in graph.weights for n in node.inputs[1:]):
        return None
    axis = node.attrs.get("axis", 0) % len(shape)
    if node.op == "Gather" and shape[axis] is not None:
        index = facts.value(node.inputs[1])
        if index is None or index.size != 1 or index.ndim > 1:
            return None
        start = int(index.ravel()[0]) % shape[axis]
        return axis, [Pick(node, node.outputs[0], start, start + 1, index.ndim == 0)]
    if node.op == "Split":
        sizes = [(facts.shape(o) or [None] * len(shape))[axis] for o in node.outputs]
        if None in sizes or sum(sizes) != shape[axis]:
            return None
        ends = np.cumsum([0, *sizes]).tolist()
        return axis, [Pick(node, o, a, b, False) for o, a, b in zip(node.outputs, ends, ends[1:], strict=False)]
    return _slice(facts, node, shape) if node.op == "Slice" else None


def _slice(facts: Facts, node: Node, shape: Sequence[Any]) -> tuple[int, list[Pick]] | None:
    if node.version < 10:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes", [0]), [1]
    else:
        values = [facts.value(n) if n else None for n in (*node.inputs[1:5], "", "")[:4]]
        if values[0] is None or values[1] is None:
            return None
        starts, ends = values[0].tolist(), values[1].tolist()
        axes = [0] if values[2] is None else values[2].tolist()
        steps = [1] if values[3] is None else values[3].tolist()
    if len(starts) != 1 or len(axes) != 1 or steps != [1] or shape[axes[0]] is None:
        return None
    part = slice_of(starts[0], ends[0], 1, shape[axes[0]])
    return axes[0] % len(shape), [Pick(node, node.outputs[0], part.start, part.stop, False)]


def _places(facts: Facts, moves: Sequence[Node], axis: int) -> list[int] | None:
    """Where ``axis`` of the last tensor lies in the reshape's output and behind every move, in graph order."""
    places = [axis]
    for node in reversed(moves):
        before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
        if before is None or after is None:
            return None
        if node.op == "Transpose":
            axis = node.attrs.get("perm", list(range(len(after)))[::-1])[axis]
        elif node.op != "Identity":
            axes = node.attrs.get("axes")
            if axes is None and len(node.inputs) > 1 and node.inputs[1]:
                value = facts.static_value(node.inputs[1])
                axes = None if value is None else value.ravel().tolist()
            if axes is None:  # a Squeeze of whatever has size 1 would take a part's axis too
                return None
            rank = max(len(before), len(after))
            moved = {a % rank for a in axes}
            rest = [a for a in range(rank) if a not in moved]
            if node.op == "Squeeze":
                axis = rest[axis]
            elif axis in moved:
                return None
            else:
                axis = rest.index(axis)
        places.append(axis)
    return places[::-1]


def _flat_axis(facts: Facts, reshape: Node, axis: int) -> int | None:
    """The input axis whose outermost factor is ``axis`` of the output, at every probe; None where there is none."""
    found: set[int | None] = set()
    for probe in facts.probes:
        before, after = probe.shapes.get(reshape.inputs[0]), probe.shapes.get(reshape.outputs[0])
        if before is None or after is None or None in before or None in after or 0 in before:
            return None
        flat = None
        for b, size in enumerate(before):
            factors = [math.prod(after[axis:e]) for e in range(axis + 2, len(after) + 1)]
            if math.prod(before[:b]) == math.prod(after[:axis]) and 1 < after[axis] < size and size in factors:
                flat = b
        found.add(flat)
    flat = found.pop() if len(found) == 1 else None
    if flat is None or facts.varies(reshape.inputs[0], flat) or facts.varies(reshape.outputs[0], axis):
        return None
    return flat
