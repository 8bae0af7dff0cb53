"""What is repaired in which order: every contraction with weights of its own, and the tensor it is aimed at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from onnxprune.contractions import Form
from onnxprune.graph.view import Graph, Node
from onnxprune.graph.weights_of import weight_of
from onnxprune.recover.scales import Scale
from onnxprune.recover.tails import Tail, tail_of
from onnxprune.rules.registry import lookup

Shapes = Callable[[str], Any]


@dataclass(slots=True)
class Aim:
    """One contraction to repair.

    Attributes:
        node: in the cut graph. form: the node as a matrix product. tail: from its output to its aim.
        level: aims of one level do not depend on each other; those of lower levels are repaired before.
    """

    node: Node
    form: Form
    tail: Tail
    level: int

    @property
    def data(self) -> str:
        """Name of the contraction's input."""
        return self.node.inputs[self.form.data]

    @property
    def needs(self) -> tuple[str, ...]:
        """What has to be known of the cut model before the contraction can be repaired."""
        return (self.data, *self.tail.addends)


@dataclass(slots=True)
class Aims:
    """All aims in levels, and why other contractions are left alone, {node: reason}."""

    levels: list[list[Aim]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def find_aims(graph: Graph, known: Collection[str], shape: Shapes, *, joint: bool = True) -> Aims:
    """Every contraction of the cut graph that can be repaired.

    Args:
        graph: of the cut model. known: names of tensors that the original has too. shape: shapes in the cut model.
        joint: aim at sums; False: every contraction is aimed at its own output.
    """
    found = Aims()
    level: dict[str, int] = dict.fromkeys(graph.inputs, 0)
    by_level: dict[int, list[Aim]] = defaultdict(list)
    passed: set[int] = set()
    for node in graph.nodes:
        inputs = [n for n in node.inputs if n and n not in graph.weights]
        reach = max((level.get(n, 0) for n in inputs), default=0)
        if node.op in ("If", "Loop", "Scan"):
            reach = max([reach, *(level.get(n, 0) for n in graph.captured)])
        # A BatchNormalization behind a contraction is undone there: its scale and shift are the contraction's to fit.
        form = _form(graph, node, shape, found) if node.index not in passed else None
        if form is not None:
            tail = tail_of(graph, node.outputs[0], level.__contains__ if joint else _never, shape)
            if tail.aim not in known:  # pragma: no cover - only where names changed
                tail = Tail(node.outputs[0])
            if tail.aim in known:
                reach = 1 + max([reach, *(level[n] for n in tail.addends)])
                by_level[reach].append(Aim(node, form, tail, reach))
                passed.update(n.index for n in tail.through)
        for name in node.outputs:
            level[name] = reach
    found.levels = [by_level[k] for k in sorted(by_level)]
    return found


def _never(_name: str) -> bool:
    return False


def _form(graph: Graph, node: Node, shape: Shapes, found: Aims) -> Form | None:
    """The node as a matrix product whose weight may be changed."""
    if node.op == "BatchNormalization" and node.domain == "":
        form: Form | None = Scale.of(len(node.inputs), shape(node.inputs[0]))
        candidates = [0]
    else:
        form, candidates = None, [i for i in (0, 1) if i < len(node.inputs) and not _is_constant(graph, node.inputs[i])]
    rule = lookup(node.domain, node.op, node.version)
    shapes = [shape(n) if n else None for n in node.inputs]
    for position in candidates:
        form = form or rule.form(node, shapes, position)
    if form is None:
        return None
    if not _is_constant(graph, node.inputs[form.weight]):
        return None
    reason = _why_not(graph, node, form)
    if reason:
        found.left[node.label] = reason
        return None
    return form


def _is_constant(graph: Graph, name: str) -> bool:
    return name in graph.weights or weight_of(graph, name) is not None


def _why_not(graph: Graph, node: Node, form: Form) -> str:
    """Why a contraction's weights are left as they are; empty where they can be repaired."""
    if not form.plain:
        return "its output is not a plain product of data and weight"
    own = [form.weight] if form.bias is None or form.bias >= len(node.inputs) else [form.weight, form.bias]
    for name in (node.inputs[i] for i in own if node.inputs[i]):
        weight = graph.weights.get(name)
        if weight is None:
            return "its weight is computed from others (quantised, transposed)"
        if weight.dtype.kind not in "fV" or weight.dtype.itemsize < 2:
            return f"its weight is stored as {weight.dtype}"
        if len(graph.consumers.get(name, ())) != 1 or name in graph.captured:
            return "its weight is shared with another node"
        if name in graph.outputs:
            return "its weight is an output of the model"
    return ""
