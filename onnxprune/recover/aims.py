"""What is repaired in which order: every contraction with weights of its own, and the tensor it is aimed at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from onnxprune.contractions import Form
from onnxprune.graph.view import CONTROL, Graph, Node
from onnxprune.graph.weights_of import weight_of
from onnxprune.operators.registry import lookup
from onnxprune.recover.bodies import Bodies
from onnxprune.recover.stored import Stored
from onnxprune.recover.tails import InvertiblePath, tail_of

Shapes = Callable[[str], Any]


@dataclass(slots=True)
class RecoveryTarget:
    """One contraction to repair.

    Attributes:
        node: in the cut graph. form: the node as a matrix product. tail: from its output to its aim.
        level: aims of one level do not depend on each other; those of lower levels are repaired before.
        weight, bias: where its constants lie; no bias where it has none.
        recurrent: whether it lies in a Loop or Scan, see :class:`onnxprune.recover.bodies.Bodies`. where: what holds in
            the iterations in which it runs there, (tensor, value).
    """

    node: Node
    form: Form
    tail: InvertiblePath
    level: int
    weight: Stored
    bias: Stored | None = None
    recurrent: bool = False
    where: tuple[tuple[str, bool], ...] = ()

    @property
    def data(self) -> str:
        """Name of the contraction's input."""
        return self.node.inputs[self.form.data]

    @property
    def needs(self) -> tuple[str, ...]:
        """What has to be known of the cut model before the contraction can be repaired."""
        return () if self.recurrent else (self.data, *self.tail.addends)


@dataclass(slots=True)
class RecoveryTargets:
    """All aims in levels, and why other contractions are left alone, {node: reason}."""

    levels: list[list[RecoveryTarget]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def leave(self, why: Callable[[RecoveryTarget], str]) -> None:
        """Leave alone what there is a reason for."""
        reasons = {aim.node.label: reason for level in self.levels for aim in level if (reason := why(aim))}
        self.left.update(reasons)
        self.keep(lambda aim: aim.node.label not in reasons)

    def keep(self, wanted: Callable[[RecoveryTarget], bool]) -> None:
        """Forget other aims."""
        levels = [[aim for aim in level if wanted(aim)] for level in self.levels]
        self.levels = [level for level in levels if level]


def find_targets(graph: Graph, known: Collection[str], shape: Shapes, *, joint: bool = True) -> RecoveryTargets:
    """Every contraction of the cut graph that can be repaired.

    Args:
        graph: of the cut graph. known: names of tensors that the original has too, and whose values can be had.
        shape: shapes in the cut model.
        joint: aim at sums; False: every contraction is aimed at its own output.
    """
    found = RecoveryTargets()
    level: dict[str, int] = dict.fromkeys(graph.inputs, 0)
    by_level: dict[int, list[RecoveryTarget]] = defaultdict(list)
    passed: set[int] = set()
    bodies = Bodies(graph, level)
    for node in graph.nodes:
        inputs = [n for n in node.inputs if n and n not in graph.weights]
        reach = max((level.get(n, 0) for n in inputs), default=0)
        if node.op in CONTROL:
            reach = max([reach, *(level.get(n, 0) for n in graph.captured)])
        reach = max(reach, bodies.least(node))
        # A BatchNormalization behind a contraction is undone there: its scale and shift are the contraction's to fit.
        form = _form(graph, node, shape) if node.index not in passed else None
        own = None if form is None else _own(graph, node, form)
        if form is not None:
            own = bodies.refusal(node, form, known, shape) or own
        if isinstance(own, str):
            found.left[node.label] = own
        elif form is not None and own is not None:
            tail = tail_of(graph, node.outputs[0], level.__contains__ if joint else _never, shape)
            if tail.aim not in known or not bodies.may_follow(node, tail):
                tail = InvertiblePath(node.outputs[0])
            if tail.aim in known:
                reach = 1 + max([reach, *(level[n] for n in tail.addends)])
                loop = bodies.encloses(node), bodies.where(node)
                by_level[reach].append(RecoveryTarget(node, form, tail, reach, *own, *loop))
                passed.update(n.index for n in tail.through)
        bodies.note(node, reach)
        for name in node.outputs:
            level[name] = reach
    found.levels = [by_level[k] for k in sorted(by_level)]
    return found


def _never(_name: str) -> bool:
    return False


def _form(graph: Graph, node: Node, shape: Shapes) -> Form | None:
    """The node as a product of data and a constant weight."""
    form: Form | None = None
    candidates = [i for i in (0, 1) if i < len(node.inputs) and not _is_constant(graph, node.inputs[i])]
    rule = lookup(node.domain, node.op, node.version)
    shapes = [shape(n) if n else None for n in node.inputs]
    for position in candidates:
        form = form or rule.form(node, shapes, position)
    return form if form is not None and _is_constant(graph, node.inputs[form.weight]) else None


def outputs(form: Form, weight: Sequence[int]) -> int:
    """Outputs of a layer with a weight of this shape."""
    matrix = form.matrix(np.broadcast_to(np.float32(0), weight))
    return int(matrix.shape[0] * matrix.shape[2])


def _is_constant(graph: Graph, name: str) -> bool:
    return name in graph.weights or weight_of(graph, name) is not None


def _own(graph: Graph, node: Node, form: Form) -> tuple[Stored, Stored | None] | str:
    """Where a layer's weight and bias lie, or why they are left as they are."""
    if not form.plain:
        return "its output is not a plain product of data and weight"
    weight = Stored.of(graph, node.inputs[form.weight])
    if isinstance(weight, str):
        return weight
    if form.bias is None or form.bias >= len(node.inputs) or not node.inputs[form.bias]:
        return weight, None
    bias = Stored.of(graph, node.inputs[form.bias])
    if isinstance(bias, str):
        return bias
    if bias.chain and prod(bias.shape(graph.weights)) != outputs(form, weight.shape(graph.weights)):
        return "one number of its bias is many outputs', and computed from others"
    scales = [s.quantised.inputs[1] for s in (weight, bias) if s.quantised is not None]
    sizes = [prod(graph.weights[n].shape) for n in scales]
    # Runtimes add a quantised bias to the sum of codes as it is: its scale has to follow the weight's.
    if len(scales) == 2 and (sizes[0] not in (1, sizes[1]) or scales[0] == scales[1]):
        return "its weight and bias are quantised with scales that do not go together"
    return weight, bias
