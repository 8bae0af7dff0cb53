"""Fold what is computed from weights alone into one: weight standardisation, weight norm, a scale on a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import Graph, Node
from onnxprune.model.constants import has_bare_initializers, placeholder
from onnxprune.model.elements import Array
from onnxprune.model.weights import ArrayWeight, Weight
from onnxprune.operators.registry import Move, rule_of

# Bytes that a folded weight may be larger than what it was computed from: a blur kernel repeated for every channel,
# and its share of all weights where it is an operand (positions), which has to be stored before the rest can shrink.
FREE, SHARE = 1 << 17, 8


@dataclass(frozen=True, slots=True)
class Fold:
    """A node whose outputs became weights.

    ``nodes``: it and all that it was computed by; ``folded``: its outputs, as weights; ``sources``: the weights of the
    original that went into it; ``operand``: whether no layer multiplies with it.
    """

    nodes: tuple[Node, ...]
    folded: dict[str, Weight]
    sources: tuple[str, ...]
    operand: bool = False


def fold(graph: Graph) -> tuple[Graph, list[Fold]]:
    """The graph with computed weights in place of their computations, and what was done; the same graph if nothing was.

    Only floating numbers are folded that a contraction reads, or that others read and no label would come to; only
    where computing takes part, and only where the model does not grow by much. What a body reads, what is an output
    and what a caller may override stays.
    """
    if not has_bare_initializers(graph.proto):
        return graph, []
    folds: dict[int, Fold] = {}
    refused: set[int] = set()
    constant = _constant(graph)
    ends = {n.index: (n, True) for n in _operands(graph, constant)}
    ends |= {n.index: (n, False) for n in _weights(graph, constant)}
    while True:
        for index in sorted(ends.keys() - folds.keys() - refused):
            found = _fold(graph, *ends[index])
            if found is None:
                refused.add(index)
            else:
                folds[index] = found
        gone = _gone(graph, folds)
        growing = _growing(graph, folds, gone)
        if not growing:
            break
        refused |= growing
        folds = {i: f for i, f in folds.items() if i not in growing}
    return (_write(graph, folds, gone), list(folds.values())) if folds else (graph, [])


def _constant(graph: Graph) -> set[str]:
    """Tensors that are computed from weights alone."""
    known: set[str] = set()
    for node in graph.steps:
        if node.domain or not node.inputs or not all(not n or n in known or n in graph.weights for n in node.inputs):
            continue
        if not any(a.type in (a.GRAPH, a.GRAPHS) for a in node.proto.attribute):
            known.update(o for o in node.outputs if o)
    return known


def _operands(graph: Graph, constant: set[str]) -> Iterator[Node]:
    """The last nodes of what is computed from weights alone and read beside data, such as positions that are added,
    where no labels would get there.
    """
    hidden: set[str] = set()
    for node in graph.steps:
        if any(o in constant for o in node.outputs):
            if _hides(graph, node) or not hidden.isdisjoint(node.inputs):
                hidden.update(node.outputs)
            continue
        rule = rule_of(node)
        settings = {*rule.operands, *rule.settings, *((rule.data, *rule.weights) if rule.weights else ())}
        for i, name in enumerate(node.inputs):
            if name in hidden and i not in settings and not _codes(graph.producer[name]):
                yield graph.producer[name]


def _hides(graph: Graph, node: Node) -> bool:
    """Whether what an operator gives has no labels although it was computed from weights: indices that become numbers,
    anything that mixes what it reads.
    """
    rule = rule_of(node)
    if rule.makes_labels and node.op == "ConstantOfShape":
        return bool(np.asarray(node.attrs.get("value", 0.0)).dtype.kind in "iub")
    if not rule.pointwise:
        return rule.moves is None and not rule.makes_labels and not rule.weights
    weights = [graph.weights[n] for n in node.inputs if n in graph.weights]
    return any(w.dtype.kind in "iub" and math.prod(w.shape) > 1 for w in weights)


def _weights(graph: Graph, constant: set[str]) -> Iterator[Node]:
    """The last node before a contraction that does more than move its weight; its data must be no constant too."""
    for node in graph.steps:
        rule = rule_of(node)
        if not rule.weights or node.outputs[0] in constant:
            continue
        for i in (rule.data, *rule.weights):
            name = node.inputs[i] if i < len(node.inputs) else ""
            while name in constant and hands_on(graph.producer[name]) and not _mixes(graph, graph.producer[name]):
                name = graph.producer[name].inputs[0]
            if name in constant and not _codes(graph.producer[name]):
                yield graph.producer[name]


def hands_on(node: Node) -> bool:
    """Whether an operator may stand between a folded weight and what contracts with it: every value arrives there."""
    moves = rule_of(node).moves
    return moves is not None and moves.keeps_all


def _codes(node: Node) -> bool:
    """Whether an operator makes codes of numbers or numbers of codes: dequantised weights must stay in their codes."""
    rule = rule_of(node)
    return rule.encodes or rule.decodes


def _moved(node: Node) -> bool:
    """Whether labels are pushed through an operator as they are, so that there is nothing to fold."""
    rule = rule_of(node)
    return rule.encodes or rule.moves not in (None, Move.REPEAT)


def _mixes(graph: Graph, node: Node) -> bool:
    """Whether a reshape of a stored weight merges axes or splits one: labels of single axes do not survive that."""
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
    """``end`` and everything that it is computed by, in graph order; Constant nodes count as weights."""
    found = {end.index: end}
    queue = [end]
    while queue:
        for name in queue.pop().inputs:
            node = graph.producer.get(name)
            if node is not None and name not in graph.weights and node.index not in found:
                found[node.index] = node
                queue.append(node)
    return tuple(found[i] for i in sorted(found))


def _fold(graph: Graph, end: Node, operand: bool) -> Fold | None:
    nodes = _region(graph, end)
    moved = all(_moved(n) and not _mixes(graph, n) for n in nodes)
    if (moved and not operand) or any(_codes(n) for n in nodes):
        return None
    read = {name for node in nodes for name in node.inputs if name in graph.weights}
    if read & {i.name for i in graph.proto.graph.input}:
        return None
    held = graph.captured.union(graph.outputs)
    wanted = [o for o in end.outputs if o in graph.consumers]
    if any(o in held for o in end.outputs):
        return None
    values = _evaluate(graph, nodes)
    if values is None or any(values[o].dtype.kind not in "fV" for o in wanted):
        return None
    if operand and all(values[o].size < 2 for o in wanted):
        return None  # a single number has no channels
    return Fold(nodes, {o: ArrayWeight(o, values[o]) for o in wanted}, tuple(sorted(read)), operand)


def _evaluate(graph: Graph, nodes: tuple[Node, ...]) -> dict[str, Array] | None:
    """Values of every tensor of a region, or None where a node cannot be evaluated."""
    values: dict[str, Array] = {}
    for node in nodes:
        if node.op in ("Shape", "Size") and node.inputs[0] in graph.weights:
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
        for name, result in zip(node.outputs, results, strict=False):
            # Arithmetic stays in the type of its operands, whatever the evaluator computed in.
            if len(kinds) == 1 and result.dtype.kind in "fV" and node.op not in ("Cast", "CastLike"):
                result = result.astype(next(iter(kinds)), copy=False)
            values[name] = result
        if any(o and o not in values for o in node.outputs):
            return None
    return values


def _gone(graph: Graph, folds: dict[int, Fold]) -> set[int]:
    """Indices of nodes that nothing needs once the folded outputs are weights; Constant nodes included."""
    held = graph.captured.union(graph.outputs)
    gone = set(folds)
    region = {n.index: n for f in folds.values() for n in f.nodes}
    for source in {s for f in folds.values() for s in f.sources}:
        if source in graph.producer:
            region[graph.producer[source].index] = graph.producer[source]
    # Constant nodes may stand anywhere, so they come last.
    for index in sorted(region, key=lambda i: (region[i].op == "Constant", -i)):
        if all(_unread(graph, o, held, gone) for o in region[index].outputs):
            gone.add(index)
    return gone


def _unread(graph: Graph, name: str, held: set[str], gone: set[int]) -> bool:
    return name not in held and all(n.index in gone for n, _ in graph.consumers.get(name, ()))


def _growing(graph: Graph, folds: dict[int, Fold], gone: set[int]) -> set[int]:
    """Folds whose weights need more room than what goes with them."""
    held = graph.captured.union(graph.outputs)
    claimed: set[str] = set()
    growing = set()
    every = sum(w.nbytes for w in graph.weights.values()) // SHARE
    for index, item in folds.items():
        freed = {s for s in item.sources if s not in claimed and _unread(graph, s, held, gone)}
        claimed |= freed
        needed = sum(w.nbytes for w in item.folded.values())
        room = max(FREE, every) if item.operand else FREE
        if needed > room + sum(graph.weights[s].nbytes for s in freed):
            growing.add(index)
    return growing


def _write(graph: Graph, folds: dict[int, Fold], gone: set[int]) -> Graph:
    held = graph.captured.union(graph.outputs)
    dead = {s for f in folds.values() for s in f.sources if _unread(graph, s, held, gone)}
    folded = {name: weight for f in folds.values() for name, weight in f.folded.items()}
    lost = {o for i in gone for o in graph.nodes[i].outputs}
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(n.proto for n in graph.nodes if n.index not in gone)
    model.graph.initializer.extend(t for t in graph.proto.graph.initializer if t.name not in dead)
    model.graph.initializer.extend(placeholder(w) for w in folded.values())
    model.graph.value_info.extend(v for v in graph.proto.graph.value_info if v.name not in lost)
    weights = {n: w for n, w in graph.weights.items() if n not in dead and n not in lost}
    return Graph.of(model, {**weights, **folded}, [n for n in graph.nodes if n.index not in gone])
