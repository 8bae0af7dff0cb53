"""Hoist selections in front of the reshape that made their axis, so that Q, K and V of a packed projection part early.

``Reshape [.., 3*H*D] -> [.., 3, H, D]``, movement, then one Gather per part equals one Split of the flat axis, then
for every part a Reshape to ``[.., 1, H, D]`` and the same movement: positions ``i:j`` of the outermost factor of an
axis are its positions ``i*stride:j*stride``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnxprune.graph.facts import Facts
from onnxprune.graph.selections import Pick, Selections, selections
from onnxprune.graph.view import Graph, Node
from onnxprune.model.constants import add_constant
from onnxprune.model.weights import Weight
from onnxprune.operators.registry import Move, rule_of


@dataclass(frozen=True, slots=True)
class Part:
    """What took the place of a selection: ``view`` is the output of its own reshape, ``size`` its share of the axis."""

    view: str
    size: int


@dataclass(frozen=True, slots=True)
class Hoist:
    """What was replaced by what.

    Attributes:
        nodes: the original reshape, movement and selections, in graph order.
        split: first output of the new split. made: every tensor that only exists since.
        axis, rank: the parts' axis in the reshape's output, and that one's rank.
        sizes: of the split's parts, in steps of ``stride`` positions of the flat axis.
        literal: whether the original target states the size of the parts' axis as a constant.
    """

    nodes: list[Node]
    split: str
    axis: int
    rank: int
    sizes: list[int]
    stride: int
    literal: bool
    parts: list[Part] = field(default_factory=list)
    made: set[str] = field(default_factory=set)

    @property
    def reshape(self) -> Node:
        """The original reshape."""
        return self.nodes[0]


def hoist(graph: Graph, facts: Facts) -> tuple[Graph, list[Hoist]]:
    """The graph with selections hoisted and what was done; the same graph if nothing was.

    Outputs of the selections keep their names; ``facts`` learn the tensors that are new.
    """
    if graph.opsets.get("", 1) < 7:
        return graph, []
    build = _Build(graph, facts)
    done = [h for found in selections(graph, facts) if (h := build.replace(found)) is not None]
    return (build.graph(done), done) if done else (graph, [])


class _Build:
    """New nodes and constants, and what is known of them."""

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self._graph, self._facts = graph, facts
        self._taken = {*graph.producer, *graph.weights, *graph.inputs}
        self._constants: dict[str, np.ndarray] = {}
        self._targets: dict[str, str] = {}
        self._nodes: dict[int, list[onnx.NodeProto]] = {}

    def replace(self, found: Selections) -> Hoist | None:
        """Make the parts of one reshape; None where its target cannot be stated for a part."""
        reshape, axis = found.reshape, found.places[0]
        source, target = reshape.inputs[:2]
        whole = self._facts.shape(reshape.outputs[0])[axis]
        stride = self._facts.shape(source)[found.flat] // whole
        cuts = sorted({0, whole, *(p.start for p in found.picks), *(p.stop for p in found.picks)})
        sizes = np.diff(cuts).tolist()
        if not self._can_state(reshape, axis):
            return None
        nodes: list[onnx.NodeProto] = []
        stem = reshape.outputs[0]
        names = [self._name(f"{stem}_part{k}") for k in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            self._learn(name, source, found.flat, size * stride)
        nodes.append(self._split(source, names, [s * stride for s in sizes], found.flat, reshape.label))
        picking = list({p.node.index: p.node for p in found.picks}.values())
        rank, literal = len(self._facts.shape(stem)), self._is_literal(target, axis)
        done = Hoist([reshape, *found.moves, *picking], names[0], axis, rank, sizes, stride, literal, made={*names})
        for pick in found.picks:
            done.parts.append(self._part(found, pick, names[cuts.index(pick.start)], nodes, done.made))
        self._nodes[min(n.index for n in picking)] = nodes
        return done

    def _part(self, found: Selections, pick: Pick, name: str, nodes: list[onnx.NodeProto], made: set[str]) -> Part:
        """One part's own reshape, movement and, for a scalar selection, the squeeze of its axis."""
        size = pick.stop - pick.start
        steps = [found.reshape, *found.moves]
        target = self._target(found.reshape, found.places[0], size, nodes, made)
        view = ""
        for k, (step, axis) in enumerate(zip(steps, found.places, strict=True)):
            last = k == len(steps) - 1 and not pick.scalar
            output = pick.output if last else self._name(f"{pick.output}_from_{step.outputs[0]}")
            node = onnx.NodeProto()
            node.CopyFrom(step.proto)
            node.name = f"{step.label}_for_{pick.output}"
            node.input[0], node.output[0] = name, output
            if k == 0:
                node.input[1], view = target, output
            if not last:
                made.add(output)
                self._learn(output, step.outputs[0], axis, size)
            nodes.append(node)
            name = output
        if pick.scalar:
            nodes.append(self._squeeze(name, pick.output, found.places[-1], pick.node.label))
        return Part(view, size)

    def _can_state(self, reshape: Node, axis: int) -> bool:
        """Whether replacing one entry of the target gives every part's shape: no 0 in it copies the flat axis."""
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

    def _target(self, reshape: Node, axis: int, size: int, nodes: list[onnx.NodeProto], made: set[str]) -> str:
        name = reshape.inputs[1]
        if name in self._graph.weights:
            stated = np.array(self._facts.value(name))
            stated[axis] = stated[axis] if stated[axis] == -1 else size
            return self._constant(f"{name}_{size}_of_{reshape.outputs[0]}", stated)
        keep = np.arange(len(self._facts.shape(reshape.outputs[0]))) != axis
        entry = np.full(len(keep), size, np.int64)
        mask = self._constant(f"{name}_kept_for_{reshape.outputs[0]}", keep)
        fixed = self._constant(f"{name}_{size}_of_{reshape.outputs[0]}", entry)
        known = self._targets.get(fixed)
        if known is not None:
            return known
        result = self._targets[fixed] = self._name(f"{fixed}_target")
        nodes.append(onnx.helper.make_node("Where", [mask, name, fixed], [result], name=result))
        made.add(result)
        for probe in self._facts.probes:
            value = probe.values.get(name)
            probe.values.set(result, None if value is None else np.where(keep, value, entry))
            probe.shapes[result], probe.dtypes[result] = keep.shape, onnx.TensorProto.INT64
            if name in probe.sizes:
                probe.sizes.add(result)
        return result

    def _is_literal(self, target: str, axis: int) -> bool:
        """Whether that entry of a target is a constant: one of the weights, or a constant piece of a Concat."""
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

    def _learn(self, name: str, like: str, axis: int, size: int) -> None:
        """``name`` is like another tensor but for one size."""
        for probe in self._facts.probes:
            shape = probe.shapes[like]
            probe.shapes[name] = (*shape[:axis], size, *shape[axis + 1 :])
            if like in probe.dtypes:
                probe.dtypes[name] = probe.dtypes[like]

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
        name, k = stem, 1
        while name in self._taken:
            name, k = f"{stem}_{k}", k + 1
        self._taken.add(name)
        return name

    def graph(self, done: Sequence[Hoist]) -> Graph:
        """The new graph; constants that only the replaced nodes read stay, for they may come back."""
        graph = self._graph
        gone = {n.index for h in done for n in h.nodes}
        model = onnx.ModelProto()
        model.CopyFrom(graph.proto)
        del model.graph.node[:]
        weights: dict[str, Weight] = dict(graph.weights)
        for name, value in self._constants.items():
            add_constant(model, weights, name, value, behind=True)
        nodes: list[onnx.NodeProto] = []
        for node in graph.nodes:
            nodes.extend(self._nodes.get(node.index, ()))
            if node.index not in gone:
                nodes.append(node.proto)
        model.graph.node.extend(nodes)
        after = {o for nodes in self._nodes.values() for n in nodes for o in n.output}
        lost = {o for h in done for n in h.nodes for o in n.outputs} - after
        for k in reversed(range(len(model.graph.value_info))):
            if model.graph.value_info[k].name in lost:
                del model.graph.value_info[k]
        return Graph.of(model, weights, [n for n in graph.nodes if n.index not in gone])
