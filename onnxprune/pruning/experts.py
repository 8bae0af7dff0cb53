"""Mixtures of experts: where a graph chooses among experts, and the model without some of them.

A choice is a TopK or ArgMax over a router's scores, or a MoE operator. Experts are positions of the scores' axis: axes
labelled like them (columns of the router, rows of stacked weights) are cut like channels. An expert that is a branch of
its own is a term of a sum that depends on one number of the choice, and is removed as a term.

The reference of the proof is the original whose scores of removed experts are minus infinity, in front of every softmax
and every choice: they are never chosen, and have a share of 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnxprune.graph import cost
from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node
from onnxprune.io import markers
from onnxprune.io.constants import add_constant
from onnxprune.io.weights import Weight
from onnxprune.operators.context import Opened
from onnxprune.operators.registry import Move, lookup, rule_of
from onnxprune.pruning.vocabulary import Kept, ids_of, kinds_of

Parts = tuple[onnx.ModelProto, dict[str, Weight]]
# A chain of scores passes few operators between the router's product and the choice.
_DEEPEST = 12
_FEWEST = 2


@dataclass(frozen=True, slots=True)
class Reader:
    """A node that picks by the numbers of chosen experts along an axis of one of its inputs."""

    output: str
    index: int
    table: int
    name: str
    axis: int


@dataclass(frozen=True, slots=True)
class Term:
    """An addend of a sum that one expert computes: the sum's first output, the addend, and the expert."""

    sum: str
    tensor: str
    expert: int


@dataclass(slots=True)
class Mixture:
    """Experts among which a graph chooses.

    Attributes:
        name: label of the node that chooses.
        choice: its first output.
        scores: tensor with a position per expert along ``axis``; ``chain`` are tensors that it is computed from one by
            one, itself first.
        size: number of experts.
        top_k: number that are chosen.
        ids: tensor with the numbers of the chosen ones; "" where the operator hides them.
        shares: first outputs of softmaxes over the experts, and of their largest.
        readers: nodes that pick by these numbers.
        terms: addends of single experts.
        weights: weights that only nodes of one expert read, by expert.
        layers: labels of layers that belong to the mixture.
    """

    name: str
    choice: str
    scores: str
    chain: tuple[str, ...]
    axis: int
    size: int
    top_k: int
    ids: str
    shares: tuple[str, ...]
    readers: tuple[Reader, ...]
    terms: tuple[Term, ...] = ()
    weights: dict[int, list[str]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)

    @property
    def are_terms(self) -> bool:
        """Whether every expert is a term of a sum."""
        return {term.expert for term in self.terms} == set(range(self.size))

    @property
    def opened(self) -> Opened:
        """The sizes that may change."""
        axes = ((self.scores, self.axis), *((r.name, r.axis) for r in self.readers))
        return Opened(
            lookups=frozenset((r.output, r.table) for r in self.readers),
            choices=frozenset((self.choice, *self.shares)),
            tied=(axes,) if len(axes) > 1 else (),
        )


def find_mixtures(graph: Graph, facts: Facts) -> list[Mixture]:
    """Return the mixtures of a graph in its order; whether their experts can go is another question."""
    mixtures = []
    for node in graph.steps:
        mixture = _mixture(graph, facts, node)
        if mixture is not None:
            _find_terms(graph, facts, mixture)
            mixtures.append(mixture)
    return mixtures


def _mixture(graph: Graph, facts: Facts, node: Node) -> Mixture | None:
    """Return the mixture of a node that chooses among a fixed number of positions; None for any other."""
    routes = rule_of(node).routes
    if routes is not None:
        scores, axis, top_k, ids = node.inputs[routes], 1, int(node.attrs.get("k", 1)), ""
    elif node.op == "TopK" and not node.domain and node.attrs.get("largest", 1):
        k = facts.static_value(node.inputs[1]) if len(node.inputs) > 1 else np.asarray(node.attrs.get("k", 0))
        scores, axis, ids = node.inputs[0], int(node.attrs.get("axis", -1)), node.outputs[1]
        top_k = 0 if k is None else int(np.ravel(k)[0])
    elif node.op == "ArgMax" and not node.domain:  # Switch: one expert per token
        scores, axis, top_k, ids = node.inputs[0], int(node.attrs.get("axis", 0)), 1, node.outputs[0]
    else:
        return None
    shape = facts.shape(scores)
    axis = axis % len(shape) if shape else 0
    size = shape[axis] if shape else None
    if size is None or not 0 < top_k < size or size < _FEWEST or facts.varies(scores, axis) or scores in graph.weights:
        return None
    chain = tuple(_chain(graph, facts, scores, axis, size))
    readers_of_chain = [n for t in chain for n, i in graph.consumers.get(t, ()) if i == 0]
    shares = tuple(
        n.outputs[0]
        for n in readers_of_chain
        if rule_of(n).score_axis(n, len(shape)) == axis or _is_largest(facts, n, shape, axis)
    )
    readers = tuple(_readers(graph, facts, ids, size)) if ids else ()
    return Mixture(node.label, node.outputs[0], scores, chain, axis, size, top_k, ids, shares, readers)


def _is_largest(facts: Facts, node: Node, shape: Sequence[int | None], axis: int) -> bool:
    """Return whether a node takes the largest score over the experts, which is the share of the one that is chosen."""
    if node.op != "ReduceMax" or node.domain:
        return False
    others = (*shape[:axis], *shape[axis + 1 :])
    return tuple(facts.shape(node.outputs[0]) or ()) in (others, (*shape[:axis], 1, *shape[axis + 1 :]))


def _chain(graph: Graph, facts: Facts, scores: str, axis: int, size: int) -> Iterator[str]:
    """Yield tensors from the scores backwards, as long as they have a position per expert on the same axis."""
    name = scores
    for _ in range(_DEEPEST):
        yield name
        node = graph.producer.get(name)
        if node is None or cost.is_layer(node, graph) or node.domain == markers.DOMAIN:
            return
        inputs = [n for n in node.inputs if n and n not in graph.weights and facts.static_value(n) is None]
        shape = facts.shape(inputs[0]) if len(inputs) == 1 else None
        if not shape or len(shape) != len(facts.shape(name) or ()) or shape[axis] != size:
            return
        name = inputs[0]


def _readers(graph: Graph, facts: Facts, ids: str, size: int) -> Iterator[Reader]:
    """Yield the nodes that pick by the numbers of experts in a table, or in scores, with a position for each."""
    holds = ids_of(graph, facts, [ids])
    for node in graph.steps:
        shape = facts.shape(node.inputs[0]) if node.inputs else None
        place = rule_of(node).picks(node, len(shape)) if shape else None
        if place is None or shape is None or node.inputs[place[0]] not in holds:
            continue
        index, table, axis = place
        if shape[axis] == size:
            yield Reader(node.outputs[0], index, table, node.inputs[table], axis)


# -- experts that are terms of sums ------------------------------------------------------------------------------------


def _find_terms(graph: Graph, facts: Facts, mixture: Mixture) -> None:
    """Find the terms of single experts: follow which experts every tensor behind the choice depends on, as bits."""
    all_experts = (1 << mixture.size) - 1
    holds = ids_of(graph, facts, [mixture.ids]) if mixture.ids else {}
    hot: dict[str, int] = {}
    bits: dict[str, int] = {}
    at = graph.producer[mixture.choice].index
    # Shares picked by the numbers belong to no single expert, like the values of the choice.
    sources = _sources(graph, mixture.scores)
    picks = {r.output for r in mixture.readers if r.name in sources}
    terms: list[tuple[Node, str, int]] = []
    for node in graph.nodes[at + 1 :]:
        if node.domain == markers.DOMAIN or not node.outputs:
            continue
        selected = _selected(facts, mixture, node, holds, hot)
        mask = 0 if selected is None else 1 << selected
        if selected is None and not rule_of(node).reads_sizes:
            for name in node.inputs:
                mask |= bits.get(name, 0)
            reads = any(name in holds or name in hot for name in node.inputs) and node.outputs[0] not in holds
            reads = reads and node.outputs[0] not in picks
            mask |= all_experts if reads and not _stays_hot(facts, node, hot, holds) else 0
        bits.update(dict.fromkeys(filter(None, node.outputs), mask))
        terms += _terms_of(node, bits, mask)
    mixture.terms = tuple(Term(node.outputs[0], name, expert) for node, name, expert in terms)
    for node in graph.steps:
        experts = bits.get(node.outputs[0], 0) if node.outputs else 0
        if experts and experts & (experts - 1) == 0:
            names = [n for n in node.inputs if n in graph.weights and len(graph.weights[n].shape) > 1]
            mixture.weights.setdefault(experts.bit_length() - 1, []).extend(names)
            if cost.is_layer(node, graph):
                mixture.layers.append(node.label)


def _sources(graph: Graph, name: str) -> set[str]:
    """Return a tensor and all that it is computed from, weights aside."""
    result, queue = {name}, [name]
    while queue:
        node = graph.producer.get(queue.pop())
        new = {n for n in node.inputs if n and n not in graph.weights} - result if node is not None else set()
        result |= new
        queue += new
    return result


def _terms_of(node: Node, bits: Mapping[str, int], mask: int) -> list[tuple[Node, str, int]]:
    """Return the addends of a sum that belong to one expert, where the sum holds others as well or is a scatter."""
    result, addends = [], tuple(rule_of(node).addends(node))
    scatters = addends == (0, 2)  # updates are added where the index is
    for i in addends:
        name = node.inputs[i] if i < len(node.inputs) else ""
        experts = bits.get(name, 0)
        is_single = experts and experts & (experts - 1) == 0
        if is_single and ((scatters and i == 2) or (not scatters and mask != experts)):
            result.append((node, name, experts.bit_length() - 1))
    return result


def _stays_hot(facts: Facts, node: Node, hot: dict[str, int], holds: Mapping[str, object]) -> bool:
    """Follow a tensor with a position per expert, such as one-hot numbers, through moves; record its axis."""
    name = node.inputs[0] if node.inputs else ""
    if node.op == "OneHot" and name in holds:
        rank = len(facts.shape(node.outputs[0]) or ())
        hot[node.outputs[0]] = int(node.attrs.get("axis", -1)) % max(rank, 1)
        return True
    if name not in hot or node.domain:
        return False
    axis, shape = hot[name], facts.shape(node.outputs[0])
    if rule_of(node).moves in (Move.SAME, Move.CAST):
        hot[node.outputs[0]] = axis
    elif node.op == "Transpose" and "perm" in node.attrs:
        hot[node.outputs[0]] = list(node.attrs["perm"]).index(axis)
    elif node.op == "ReduceSum" and shape is not None and len(shape) == len(facts.shape(name) or ()):
        hot[node.outputs[0]] = axis
    else:
        return False
    return True


def _selected(
    facts: Facts, mixture: Mixture, node: Node, holds: Mapping[str, object], hot: Mapping[str, int]
) -> int | None:
    """Return the expert that a node asks for; None where it asks for none, or several."""
    if node.op == "Equal" and not node.domain:
        for i in (0, 1):
            value = facts.static_value(node.inputs[1 - i])
            if node.inputs[i] in holds and value is not None and value.size == 1:
                return int(value.ravel()[0])
    axis = hot.get(node.inputs[0]) if node.inputs else None
    rank = len(facts.shape(node.inputs[0]) or ()) if axis is not None else 0
    if axis is not None and node.op == "Gather" and int(node.attrs.get("axis", 0)) % rank == axis:
        index = facts.static_value(node.inputs[1])
        return int(index.ravel()[0]) % mixture.size if index is not None and index.size == 1 else None
    if axis is not None and node.op == "Slice" and len(node.inputs) > 3:
        start, end, axes = (facts.static_value(name) for name in node.inputs[1:4])
        if start is not None and end is not None and axes is not None and [int(a) % rank for a in axes] == [axis]:
            return int(start[0]) if int(end[0]) - int(start[0]) == 1 else None
    return None


# -- the reference of the proof, and a router that cannot be cut -------------------------------------------------------


def masked_experts(
    parts: tuple[onnx.ModelProto, Mapping[str, Weight]],
    facts: Facts,
    removed: Sequence[tuple[Mixture, Collection[int]]],
) -> Parts:
    """Return a model whose scores of some experts are minus infinity, in front of every softmax and choice.

    Args:
        parts: the model.
        facts: types of its tensors.
        removed: experts by mixture.
    """
    model, weights = onnx.ModelProto(), dict(parts[1])
    model.CopyFrom(parts[0])
    del model.graph.node[:]
    kinds = kinds_of(parts[0], facts)
    scores_by_output: dict[str, tuple[Mixture, str]] = {}
    by_output = {o: node for node in parts[0].graph.node for o in node.output if o}
    for mixture, _ in removed:
        for output in (mixture.choice, *mixture.shares):
            node = by_output[output]
            scores_by_output[output] = mixture, node.input[lookup(node.domain, node.op_type).routes or 0]
    lost = {id(mixture): sorted(experts) for mixture, experts in removed}
    for source in parts[0].graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        first = next((o for o in node.output if o), "")
        if first in scores_by_output:
            mixture, name = scores_by_output[first]
            masked = f"{name}__left_{first}"
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds.get(name, onnx.TensorProto.FLOAT))
            rank = len(facts.shape(name) or ())
            keep = np.ones(mixture.size, bool)
            keep[lost[id(mixture)]] = False
            shape = [1] * rank
            shape[mixture.axis] = mixture.size
            add_constant(model, weights, f"{masked}_mask", keep.reshape(shape))
            add_constant(model, weights, f"{masked}_least", np.asarray(-np.inf, dtype))
            operands = [f"{masked}_mask", name, f"{masked}_least"]
            model.graph.node.append(onnx.helper.make_node("Where", operands, [masked], name=masked))
            for k, operand in enumerate(node.input):
                if operand == name:
                    node.input[k] = masked
        model.graph.node.append(node)
    return model, weights


def kept_of(mixture: Mixture, removed: Collection[int]) -> Kept:
    """Return the experts that are left, rising."""
    return np.asarray([e for e in range(mixture.size) if e not in removed], np.int64)
