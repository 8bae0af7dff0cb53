"""Exact preparations before the analysis: fold weights, hoist selections, unshare constants.

A Reshape ``[.., 3*H*D] -> [.., 3, H, D]``, movement, and one Gather per part equal one Split of the flat axis followed,
for every part, by a Reshape to ``[.., 1, H, D]`` and the same movement: positions ``i:j`` of the outermost factor of an
axis are its positions ``i*stride:j*stride``.

A constant of one repeated value may take any size, so every reader gets its own copy before labels are propagated;
copies that pruning did not change are joined again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node, numbered_name
from onnxprune.io.constants import add_constant, has_bare_initializers, placeholder
from onnxprune.io.elements import Array
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.operands import slice_of
from onnxprune.operators.registry import Move, rule_of

# Weights pass through few operators before use; a longer chain leads to an activation.
_DEEPEST = 12


def weight_of(graph: Graph, name: str, depth: int = _DEEPEST) -> NDArray[Any] | None:
    """Return the value of a weight behind a chain of small operators (Transpose, DequantizeLinear); else None."""
    if name in graph.weights:
        return graph.weights[name].read()
    node = graph.producer.get(name)
    if node is None or not depth:
        return None
    values: list[NDArray[Any] | None] = []
    for source in node.inputs:
        value = weight_of(graph, source, depth - 1) if source else None
        if source and value is None:
            return None
        values.append(value)
    results = evaluate(node, values)
    return np.asarray(results[node.outputs.index(name)]) if results else None


# Bytes by which a folded weight may exceed its sources (a blur kernel repeated for every channel), and the divisor of
# all weights' bytes that limits a folded operand (positions), which has to be stored before the rest can shrink.
FREE, SHARE = 1 << 17, 8
_FEW = 1 << 12


@dataclass(frozen=True, slots=True)
class Fold:
    """A node whose outputs became weights.

    ``nodes``: the node and all nodes that it depends on; ``folded``: its outputs, as weights; ``sources``: the weights
    of the original that it was computed from; ``operand``: whether no layer multiplies with it.
    """

    nodes: tuple[Node, ...]
    folded: dict[str, Weight]
    sources: tuple[str, ...]
    operand: bool = False


def fold(graph: Graph) -> tuple[Graph, list[Fold]]:
    """Replace computed weights by their values; return the graph and the folds, the same graph if there are none.

    Folded are floats that a contraction reads, or that other operators read where no label would reach them; only where
    arithmetic takes part, and only where the model does not grow by much. Tensors that bodies read, outputs and
    initializers that a caller may override are not folded.
    """
    if not has_bare_initializers(graph.proto):
        return graph, []
    folds: dict[int, Fold] = {}
    rejected: set[int] = set()
    constant = _constant(graph)
    ends = {n.index: (n, True) for n in _operands(graph, constant)}
    ends |= {n.index: (n, False) for n in _weights(graph, constant)}
    while True:
        for index in sorted(ends.keys() - folds.keys() - rejected):
            candidate = _fold(graph, *ends[index])
            if candidate is None:
                rejected.add(index)
            else:
                folds[index] = candidate
        removed = _removable_nodes(graph, folds)
        too_large = _too_large_folds(graph, folds, removed)
        if not too_large:
            break
        rejected |= too_large
        folds = {i: f for i, f in folds.items() if i not in too_large}
    return (_write(graph, folds, removed), list(folds.values())) if folds else (graph, [])


def _constant(graph: Graph) -> set[str]:
    """Return the tensors that are computed from weights alone."""
    known: set[str] = set()
    for node in graph.steps:
        if node.domain or not node.inputs or not all(not n or n in known or n in graph.weights for n in node.inputs):
            continue
        if not any(a.type in (a.GRAPH, a.GRAPHS) for a in node.proto.attribute):
            known.update(o for o in node.outputs if o)
    return known


def _operands(graph: Graph, constant: set[str]) -> Iterator[Node]:
    """Yield the last nodes of weight-only computations that are read beside data where no labels would reach them.

    An example is positions that are added to data.
    """
    hidden: set[str] = set()
    values: dict[str, Array] = {}
    for node in graph.steps:
        if any(o in constant for o in node.outputs):
            if _hides_labels(graph, node) or not hidden.isdisjoint(node.inputs):
                are_small = all(n in values or _is_small(graph, n) for n in node.inputs if n)
                if are_small or (rule_of(node).reads_sizes and node.inputs[0] in graph.weights):
                    values.update(_results(graph, node, values) or {})
                # A single number, such as a scale from a size, meets channels as any number does.
                hidden.update(o for o in node.outputs if o not in values or values[o].size > 1)
            continue
        rule = rule_of(node)
        settings = {*rule.operands, *rule.settings, *((rule.data, *rule.weights) if rule.weights else ())}
        for i, name in enumerate(node.inputs):
            if name in hidden and i not in settings and not _codes(graph.producer[name]):
                yield graph.producer[name]


def _hides_labels(graph: Graph, node: Node) -> bool:
    """Return whether an operator's output has no labels although weights alone determine it.

    Such operators turn indices into numbers, or mix the elements that they read.
    """
    rule = rule_of(node)
    if rule.makes_labels and node.op == "ConstantOfShape":
        return bool(np.asarray(node.attrs.get("value", 0.0)).dtype.kind in "iub")
    if not rule.pointwise:
        return rule.moves is None and not rule.makes_labels and not rule.weights
    weights = [graph.weights[n] for n in node.inputs if n in graph.weights]
    return any(w.dtype.kind in "iub" and math.prod(w.shape) > 1 for w in weights)


def _weights(graph: Graph, constant: set[str]) -> Iterator[Node]:
    """Yield the last node before a contraction that computes its weight rather than moving it.

    Its data are not constant.
    """
    for node in graph.steps:
        rule = rule_of(node)
        if not rule.weights or node.outputs[0] in constant:
            continue
        for i in (rule.data, *rule.weights):
            name = node.inputs[i] if i < len(node.inputs) else ""
            while (
                name in constant and keeps_values(graph.producer[name]) and not _mixes_axes(graph, graph.producer[name])
            ):
                name = graph.producer[name].inputs[0]
            if name in constant and not _codes(graph.producer[name]):
                yield graph.producer[name]


def keeps_values(node: Node) -> bool:
    """Return whether an operator may stand between a folded weight and its contraction: every value passes through."""
    moves = rule_of(node).moves
    return moves is not None and moves.keeps_all


def _codes(node: Node) -> bool:
    """Return whether an operator converts between codes and numbers: dequantised weights must keep their codes."""
    rule = rule_of(node)
    return rule.encodes or rule.decodes


def _only_moves(node: Node) -> bool:
    """Return whether labels pass through an operator unchanged, so that folding is not needed."""
    rule = rule_of(node)
    return rule.encodes or rule.moves not in (None, Move.REPEAT)


def _mixes_axes(graph: Graph, node: Node) -> bool:
    """Return whether a reshape of a stored weight merges or splits axes: labels of single axes do not survive that."""
    if rule_of(node).moves is not Move.SHAPE or node.inputs[0] not in graph.weights:
        return False
    operands = [graph.weights[n].read() for n in node.inputs[1:] if n in graph.weights]
    if len(operands) != len(node.inputs) - 1:
        return False
    before = graph.weights[node.inputs[0]].shape
    # Only the sizes matter: a broadcast scalar stands for the data, however large.
    shaped = evaluate(node, [np.broadcast_to(np.zeros((), np.int8), before), *operands])
    return shaped is not None and [n for n in before if n > 1] != [n for n in shaped[0].shape if n > 1]


def _region(graph: Graph, end: Node) -> tuple[Node, ...]:
    """Return ``end`` and every node that it depends on, in graph order; Constant nodes count as weights."""
    nodes = {end.index: end}
    queue = [end]
    while queue:
        for name in queue.pop().inputs:
            node = graph.producer.get(name)
            if node is not None and name not in graph.weights and node.index not in nodes:
                nodes[node.index] = node
                queue.append(node)
    return tuple(nodes[i] for i in sorted(nodes))


def _fold(graph: Graph, end: Node, operand: bool) -> Fold | None:
    nodes = _region(graph, end)
    only_moves = all(_only_moves(n) and not _mixes_axes(graph, n) for n in nodes)
    if (only_moves and not operand) or any(_codes(n) for n in nodes):
        return None
    read = {name for node in nodes for name in node.inputs if name in graph.weights}
    if read & {i.name for i in graph.proto.graph.input}:
        return None
    protected = graph.captured.union(graph.outputs)
    outputs = [o for o in end.outputs if o in graph.consumers]
    if any(o in protected for o in end.outputs):
        return None
    values = _evaluate(graph, nodes)
    if values is None or any(values[o].dtype.kind not in "fV" for o in outputs):
        return None
    if operand and all(values[o].size < 2 for o in outputs):
        return None  # a single number has no channels
    if operand and not all(np.isfinite(values[o].astype(np.float64)).all() for o in outputs):
        return None  # a mask
    return Fold(nodes, {o: ArrayWeight(o, values[o]) for o in outputs}, tuple(sorted(read)), operand)


def _evaluate(graph: Graph, nodes: tuple[Node, ...]) -> dict[str, Array] | None:
    """Return values of every tensor of a region, or None where a node cannot be evaluated."""
    values: dict[str, Array] = {}
    for node in nodes:
        results = _results(graph, node, values)
        if results is None:
            return None
        values.update(results)
    return values


def _is_small(graph: Graph, name: str) -> bool:
    """Return whether a weight has few elements."""
    return name in graph.weights and math.prod(graph.weights[name].shape) <= _FEW


def _results(graph: Graph, node: Node, values: dict[str, Array]) -> dict[str, Array] | None:
    """Evaluate a node on values and weights; return its outputs by name, None where it cannot be evaluated."""
    if rule_of(node).reads_sizes and node.inputs[0] in graph.weights:
        # Only the sizes matter, however large it is.
        results = evaluate(node, [np.broadcast_to(np.zeros((), np.int8), graph.weights[node.inputs[0]].shape)])
    else:
        for name in node.inputs:
            if name and name not in values:
                values[name] = graph.weights[name].read()
        results = evaluate(node, [values[n] if n else None for n in node.inputs])
    if results is None:
        return None
    kinds = {values[n].dtype for n in node.inputs if n in values and values[n].dtype.kind in "fV"}
    by_name: dict[str, Array] = {}
    for name, result in zip(node.outputs, results, strict=False):
        # Arithmetic stays in the type of its operands, whatever the evaluator computed in.
        if len(kinds) == 1 and result.dtype.kind in "fV" and node.op not in ("Cast", "CastLike"):
            result = result.astype(next(iter(kinds)), copy=False)
        by_name[name] = result
    return None if any(o and o not in by_name for o in node.outputs) else by_name


def _removable_nodes(graph: Graph, folds: dict[int, Fold]) -> set[int]:
    """Return indices of nodes without readers once the folded outputs are weights; Constant nodes included."""
    protected = graph.captured.union(graph.outputs)
    removed = set(folds)
    region = {n.index: n for f in folds.values() for n in f.nodes}
    for source in {s for f in folds.values() for s in f.sources}:
        if source in graph.producer:
            region[graph.producer[source].index] = graph.producer[source]
    # Constant nodes may stand anywhere, so they come last.
    for index in sorted(region, key=lambda i: (region[i].op == "Constant", -i)):
        if all(_unread(graph, o, protected, removed) for o in region[index].outputs):
            removed.add(index)
    return removed


def _unread(graph: Graph, name: str, protected: AbstractSet[str], removed: set[int]) -> bool:
    return name not in protected and all(n.index in removed for n, _ in graph.consumers.get(name, ()))


def _too_large_folds(graph: Graph, folds: dict[int, Fold], removed: set[int]) -> set[int]:
    """Return the folds whose weights need more room than the weights that they replace."""
    protected = graph.captured.union(graph.outputs)
    counted: set[str] = set()
    too_large = set()
    model_share = sum(w.nbytes for w in graph.weights.values()) // SHARE
    for index, item in folds.items():
        freed_weights = {s for s in item.sources if s not in counted and _unread(graph, s, protected, removed)}
        counted |= freed_weights
        num_bytes = sum(w.nbytes for w in item.folded.values())
        limit = max(FREE, model_share) if item.operand else FREE
        if num_bytes > limit + sum(graph.weights[s].nbytes for s in freed_weights):
            too_large.add(index)
    return too_large


def _write(graph: Graph, folds: dict[int, Fold], removed: set[int]) -> Graph:
    protected = graph.captured.union(graph.outputs)
    unread_weights = {s for f in folds.values() for s in f.sources if _unread(graph, s, protected, removed)}
    folded = {name: weight for f in folds.values() for name, weight in f.folded.items()}
    removed_tensors = {o for i in removed for o in graph.nodes[i].outputs}
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(n.proto for n in graph.nodes if n.index not in removed)
    model.graph.initializer.extend(t for t in graph.proto.graph.initializer if t.name not in unread_weights)
    model.graph.initializer.extend(placeholder(w) for w in folded.values())
    model.graph.value_info.extend(v for v in graph.proto.graph.value_info if v.name not in removed_tensors)
    weights = {n: w for n, w in graph.weights.items() if n not in unread_weights and n not in removed_tensors}
    return Graph.of(model, {**weights, **folded}, [n for n in graph.nodes if n.index not in removed])


_MOVES = {"Transpose", "Unsqueeze", "Squeeze", "Identity"}


@dataclass(frozen=True, slots=True)
class Pick:
    """Positions ``start:stop`` that a node selects; ``scalar``: the node drops their axis."""

    node: Node
    output: str
    start: int
    stop: int
    scalar: bool


@dataclass(frozen=True, slots=True)
class Selections:
    """A reshape, the movement behind it, and the selections that read its end.

    ``places``: position of the selected axis in the reshape's output and behind every move; ``flat``: the axis of the
    reshape's input of which it is the outermost factor.
    """

    reshape: Node
    moves: list[Node]
    places: list[int]
    picks: list[Pick]
    flat: int


def selections(graph: Graph, facts: Facts) -> Iterator[Selections]:
    """Return all reshapes that split off one axis which only selections read, possibly behind movement.

    Interleaved forms, where the selected factor is not the outermost one of its axis, do not commute and are left out.
    """
    protected = graph.captured.union(graph.outputs)
    for node in graph.steps:
        source = node.inputs[0] if node.op == "Reshape" and not node.domain else ""
        if source in graph.producer and source not in graph.weights:
            candidate = _find(graph, facts, node, protected)
            if candidate is not None:
                yield candidate


def _find(graph: Graph, facts: Facts, node: Node, protected: AbstractSet[str]) -> Selections | None:
    moves: list[Node] = []
    name = node.outputs[0]
    while True:
        readers = graph.consumers.get(name, [])
        if not readers or name in protected or any(i != 0 or n.domain for n, i in readers):
            return None
        if len(readers) > 1 or readers[0][0].op not in _MOVES:
            break
        moves.append(readers[0][0])
        name = moves[-1].outputs[0]
    picks_by_reader = [_find_picks(graph, facts, n) for n, _ in readers]
    axis = picks_by_reader[0][0] if picks_by_reader[0] is not None else -1
    picks = [p for c in picks_by_reader if c is not None and c[0] == axis for p in c[1]]
    if axis < 0 or any(c is None or c[0] != axis for c in picks_by_reader) or _overlap(picks):
        return None
    if graph.has_bodies and len({graph.around[n.index] for n in (node, *moves, *(p.node for p in picks))}) > 1:
        return None  # a node inserted in front of one selection is not there for another
    places = _trace_axis(facts, moves, axis)
    flat = None if places is None else _flat_axis(facts, node, places[0])
    return None if places is None or flat is None else Selections(node, moves, places, picks, flat)


def _overlap(picks: Sequence[Pick]) -> bool:
    """Return whether ranges overlap without being equal, or are empty."""
    spans = sorted({(p.start, p.stop) for p in picks})
    return any(a >= b for a, b in spans) or any(x[1] > y[0] for x, y in pairwise(spans))


def _find_picks(graph: Graph, facts: Facts, node: Node) -> tuple[int, list[Pick]] | None:
    """Return (axis, selections) of a Gather, Slice or Split with constant positions along one axis."""
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


def _trace_axis(facts: Facts, moves: Sequence[Node], axis: int) -> list[int] | None:
    """Trace ``axis`` of the last tensor to the reshape's output and behind every move, in graph order."""
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
            if axes is None:  # a Squeeze of all axes of size 1 would drop a part's axis too
                return None
            rank = max(len(before), len(after))
            changed_axes = {a % rank for a in axes}
            other_axes = [a for a in range(rank) if a not in changed_axes]
            if node.op == "Squeeze":
                axis = other_axes[axis]
            elif axis in changed_axes:
                return None
            else:
                axis = other_axes.index(axis)
        places.append(axis)
    return places[::-1]


def _flat_axis(facts: Facts, reshape: Node, axis: int) -> int | None:
    """Return the input axis whose outermost factor is ``axis`` of the output, at every probe.

    None where there is none.
    """
    candidates: set[int | None] = set()
    for probe in facts.probes:
        before, after = probe.shapes.get(reshape.inputs[0]), probe.shapes.get(reshape.outputs[0])
        if before is None or after is None or None in before or None in after or 0 in before:
            return None
        flat = None
        for b, size in enumerate(before):
            factors = [math.prod(after[axis:e]) for e in range(axis + 2, len(after) + 1)]
            if math.prod(before[:b]) == math.prod(after[:axis]) and 1 < after[axis] < size and size in factors:
                flat = b
        candidates.add(flat)
    flat = candidates.pop() if len(candidates) == 1 else None
    if flat is None or facts.varies(reshape.inputs[0], flat) or facts.varies(reshape.outputs[0], axis):
        return None
    return flat


@dataclass(frozen=True, slots=True)
class HoistedPart:
    """Replacement of a selection: ``view`` is the output of its own reshape, ``size`` its share of the axis."""

    view: str
    size: int


@dataclass(frozen=True, slots=True)
class Hoist:
    """A hoisted selection: the original nodes and their replacements.

    Attributes:
        nodes: the original reshape, movement and selections, in graph order.
        split: first output of the new split.
        new_names: every tensor that the replacement added.
        axis, rank: the parts' axis in the reshape's output, and the rank of that output.
        sizes: sizes of the split's parts, in steps of ``stride`` positions of the flat axis.
        literal: whether the original target states the size of the parts' axis as a constant.
    """

    nodes: list[Node]
    split: str
    axis: int
    rank: int
    sizes: list[int]
    stride: int
    literal: bool
    parts: list[HoistedPart] = field(default_factory=list)
    new_names: set[str] = field(default_factory=set)

    @property
    def reshape(self) -> Node:
        """The original reshape."""
        return self.nodes[0]


def hoist(graph: Graph, facts: Facts) -> tuple[Graph, list[Hoist]]:
    """Hoist selections in front of reshapes; return the graph and the replacements, the same graph if there are none.

    Outputs of the selections keep their names; ``facts`` are extended by the new tensors.
    """
    if graph.opsets.get("", 1) < 7:
        return graph, []
    build = _Build(graph, facts)
    hoists = [h for selection in selections(graph, facts) if (h := build.replace(selection)) is not None]
    return (build.graph(hoists), hoists) if hoists else (graph, [])


class _Build:
    """New nodes and constants, with their known shapes and values."""

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self._graph, self._facts = graph, facts
        self._used_names = {*graph.producer, *graph.weights, *graph.inputs}
        self._constants: dict[str, np.ndarray] = {}
        self._targets: dict[str, str] = {}
        self._nodes: dict[int, list[onnx.NodeProto]] = {}

    def replace(self, selection: Selections) -> Hoist | None:
        """Build the parts of one reshape; None where its target cannot be stated for a part."""
        reshape, axis = selection.reshape, selection.places[0]
        source, target = reshape.inputs[:2]
        axis_size = self._facts.shape(reshape.outputs[0])[axis]
        stride = self._facts.shape(source)[selection.flat] // axis_size
        boundaries = sorted({0, axis_size, *(p.start for p in selection.picks), *(p.stop for p in selection.picks)})
        sizes = np.diff(boundaries).tolist()
        if not self._can_state(reshape, axis):
            return None
        nodes: list[onnx.NodeProto] = []
        stem = reshape.outputs[0]
        names = [self._name(f"{stem}_part{k}") for k in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            self._learn(name, source, selection.flat, size * stride)
        nodes.append(self._split(source, names, [s * stride for s in sizes], selection.flat, reshape.label))
        picking = list({p.node.index: p.node for p in selection.picks}.values())
        rank, literal = len(self._facts.shape(stem)), self._is_literal(target, axis)
        hoisted = Hoist(
            [reshape, *selection.moves, *picking], names[0], axis, rank, sizes, stride, literal, new_names={*names}
        )
        for pick in selection.picks:
            hoisted.parts.append(
                self._part(selection, pick, names[boundaries.index(pick.start)], nodes, hoisted.new_names)
            )
        self._nodes[min(n.index for n in picking)] = nodes
        return hoisted

    def _part(
        self, selection: Selections, pick: Pick, name: str, nodes: list[onnx.NodeProto], added: set[str]
    ) -> HoistedPart:
        """Build one part's own reshape, movement and, for a scalar selection, the squeeze of its axis."""
        size = pick.stop - pick.start
        steps = [selection.reshape, *selection.moves]
        target = self._target(selection.reshape, selection.places[0], size, nodes, added)
        view = ""
        for k, (step, axis) in enumerate(zip(steps, selection.places, strict=True)):
            last = k == len(steps) - 1 and not pick.scalar
            output = pick.output if last else self._name(f"{pick.output}_from_{step.outputs[0]}")
            node = onnx.NodeProto()
            node.CopyFrom(step.proto)
            node.name = f"{step.label}_for_{pick.output}"
            node.input[0], node.output[0] = name, output
            if k == 0:
                node.input[1], view = target, output
            if not last:
                added.add(output)
                self._learn(output, step.outputs[0], axis, size)
            nodes.append(node)
            name = output
        if pick.scalar:
            nodes.append(self._squeeze(name, pick.output, selection.places[-1], pick.node.label))
        return HoistedPart(view, size)

    def _can_state(self, reshape: Node, axis: int) -> bool:
        """Return whether replacing one entry of the target gives every part's shape: no 0 copies the flat axis."""
        name = reshape.inputs[1]
        for probe in self._facts.probes:
            value = probe.values.get(name)
            before, after = probe.shapes[reshape.inputs[0]], probe.shapes[reshape.outputs[0]]
            if value is None or value.shape != (len(after),):
                return False
            if not reshape.attrs.get("allowzero", 0) and any(
                v == 0 and (a == axis or before[a] != after[a]) for a, v in enumerate(value.tolist())
            ):
                return False
        return name in self._graph.weights or self._graph.opsets[""] >= 9

    def _target(self, reshape: Node, axis: int, size: int, nodes: list[onnx.NodeProto], added: set[str]) -> str:
        name = reshape.inputs[1]
        if name in self._graph.weights:
            stated_target = np.array(self._facts.value(name))
            stated_target[axis] = stated_target[axis] if stated_target[axis] == -1 else size
            return self._constant(f"{name}_{size}_of_{reshape.outputs[0]}", stated_target)
        is_other_axis = np.arange(len(self._facts.shape(reshape.outputs[0]))) != axis
        entry = np.full(len(is_other_axis), size, np.int64)
        mask = self._constant(f"{name}_kept_for_{reshape.outputs[0]}", is_other_axis)
        fixed = self._constant(f"{name}_{size}_of_{reshape.outputs[0]}", entry)
        known = self._targets.get(fixed)
        if known is not None:
            return known
        result = self._targets[fixed] = self._name(f"{fixed}_target")
        nodes.append(onnx.helper.make_node("Where", [mask, name, fixed], [result], name=result))
        added.add(result)
        for probe in self._facts.probes:
            value = probe.values.get(name)
            probe.values.set(result, None if value is None else np.where(is_other_axis, value, entry))
            probe.shapes[result], probe.dtypes[result] = is_other_axis.shape, onnx.TensorProto.INT64
            if name in probe.sizes:
                probe.sizes.add(result)
        return result

    def _is_literal(self, target: str, axis: int) -> bool:
        """Return whether that entry of a target is a constant: one of the weights, or a constant piece of a Concat."""
        if target in self._graph.weights:
            return True
        node = self._graph.producer.get(target)
        if node is None or node.op != "Concat" or any(self._facts.shape(n) != (1,) for n in node.inputs):
            return False
        name = node.inputs[axis]
        while name not in self._graph.weights:
            made_by = self._graph.producer.get(name)
            if made_by is None or rule_of(made_by).moves not in (Move.SAME, Move.CAST, Move.SHAPE):
                return False
            name = made_by.inputs[0]
        return True

    def _split(self, source: str, names: Sequence[str], sizes: Sequence[int], axis: int, label: str) -> onnx.NodeProto:
        name = f"{label}_split"
        if self._graph.opsets[""] < 13:
            return onnx.helper.make_node("Split", [source], names, name=name, axis=axis, split=sizes)
        operand = self._constant(f"{names[0]}_sizes", np.asarray(sizes, np.int64))
        return onnx.helper.make_node("Split", [source, operand], names, name=name, axis=axis)

    def _squeeze(self, source: str, output: str, axis: int, label: str) -> onnx.NodeProto:
        if self._graph.opsets[""] < 13:
            return onnx.helper.make_node("Squeeze", [source], [output], name=f"{label}_squeeze", axes=[axis])
        axes = self._constant(f"{output}_axes", np.asarray([axis], np.int64))
        return onnx.helper.make_node("Squeeze", [source, axes], [output], name=f"{label}_squeeze")

    def _learn(self, name: str, template: str, axis: int, size: int) -> None:
        """Record the facts of ``name``: those of another tensor but for one size."""
        for probe in self._facts.probes:
            shape = probe.shapes[template]
            probe.shapes[name] = (*shape[:axis], size, *shape[axis + 1 :])
            if template in probe.dtypes:
                probe.dtypes[name] = probe.dtypes[template]

    def _constant(self, stem: str, value: np.ndarray) -> str:
        if np.array_equal(self._constants.get(stem, ()), value):
            return stem
        name = self._name(stem)
        self._constants[name] = value
        for probe in self._facts.probes:
            probe.values.set(name, value)
            probe.shapes[name] = value.shape
        return name

    def _name(self, stem: str) -> str:
        return numbered_name(stem, self._used_names)

    def graph(self, hoists: Sequence[Hoist]) -> Graph:
        """Return the new graph; constants that only the replaced nodes read stay, since restoring may need them."""
        graph = self._graph
        removed = {n.index for h in hoists for n in h.nodes}
        model = onnx.ModelProto()
        model.CopyFrom(graph.proto)
        del model.graph.node[:]
        weights: dict[str, Weight] = dict(graph.weights)
        for name, value in self._constants.items():
            add_constant(model, weights, name, value, behind=True)
        nodes: list[onnx.NodeProto] = []
        for node in graph.nodes:
            nodes.extend(self._nodes.get(node.index, ()))
            if node.index not in removed:
                nodes.append(node.proto)
        model.graph.node.extend(nodes)
        new_tensors = {o for nodes in self._nodes.values() for n in nodes for o in n.output}
        removed_tensors = {o for h in hoists for n in h.nodes for o in n.outputs} - new_tensors
        for k in reversed(range(len(model.graph.value_info))):
            if model.graph.value_info[k].name in removed_tensors:
                del model.graph.value_info[k]
        return Graph.of(model, weights, [n for n in graph.nodes if n.index not in removed])


_LIMIT = 1 << 16


def unshare(graph: Graph) -> tuple[Graph, dict[str, str]]:
    """Copy uniform constants for each reader; return the graph and {copy: constant that it was copied from}.

    Candidates are initializers with more than one reader and at most 65,536 elements, except 64-bit integers, which are
    shapes and axes.
    """
    initializers = {t.name for t in graph.proto.graph.initializer}
    candidates = [name for name in graph.weights if name in initializers and _is_shared(graph, name)]
    uniform = {name: graph.weights[name].read() for name in candidates}
    uniform = {name: value for name, value in uniform.items() if (value == value.flat[0]).all()}
    if not uniform:
        return graph, {}
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    weights, copies = dict(graph.weights), dict[str, str]()
    changed = set[int]()
    for name, value in uniform.items():
        for number, (node, i) in enumerate(graph.consumers[name][1:], start=2):
            copy = f"{name}_use{number}"
            if copy in graph.weights or copy in graph.producer:
                continue
            proto.graph.node[node.index].input[i] = copy
            changed.add(node.index)
            add_constant(proto, weights, copy, value)
            copies[copy] = name
    return graph.altered(proto, weights, changed), copies


def _is_shared(graph: Graph, name: str) -> bool:
    weight = graph.weights[name]
    if len(graph.consumers.get(name, ())) < 2 or weight.dtype.kind not in "fViu" or weight.dtype == np.int64:
        return False
    if not 1 < math.prod(weight.shape) <= _LIMIT or name in graph.captured:
        return False
    return name not in graph.outputs and has_bare_initializers(graph.proto)


def join_copies(proto: onnx.ModelProto, weights: dict[str, Weight], copies: dict[str, str]) -> None:
    """Join copies that still hold equal values after pruning; ``proto`` and ``weights`` are changed in place."""
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    back: dict[str, str] = {}
    for name in (*dict.fromkeys(copies.values()), *copies):
        if name in weights:
            weight = weights[name]
            key = copies.get(name, name), tuple(weight.shape), weight.read().tobytes()
            representative = first.setdefault(key, name)
            if representative != name:
                back[name] = representative
    if not back:
        return
    for node in proto.graph.node:
        if not back.keys().isdisjoint(node.input):
            for i, name in enumerate(node.input):
                if name in back:
                    node.input[i] = back[name]
    for k in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[k].name in back:
            del proto.graph.initializer[k]
    for copy in back:
        weights.pop(copy)
