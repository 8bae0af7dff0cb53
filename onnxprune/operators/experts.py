"""Mixtures of experts: a router picks, for every token, the experts whose two-layer networks answer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape
from onnxprune.labels.label import Label, along, covering
from onnxprune.operators.context import Step
from onnxprune.operators.ownership import override, owned
from onnxprune.operators.registry import Rule, register

MS = "com.microsoft"


FIRST, SECOND, THIRD = 2, 4, 6
"""Where the layers' weights are; a bias follows each."""
INNER = {2: 1, 3: 1, 4: 2, 6: 1, 7: 1}
"""Axis of the inner channels by input."""


class MoE(Rule):
    """com.microsoft.MoE: tokens [..., H] in and out, scores [tokens, E], weights and biases of up to three layers.

    The first and third are [E, I, H] (the first twice as wide where a gate is fused into it), the second [E, H, I].
    Every expert loses inner channels of its own, the same number each; experts stay, for the router's choice among
    fewer would be another one.
    """

    weights = (FIRST, SECOND, THIRD)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Every token goes through the layers of ``k`` experts, whose weights are [experts, ...]."""
        sizes = [s for s in shapes[2::2] if s is not None]
        if shapes[0] is None:
            return 0
        return prod(shapes[0][:-1]) * int(node.attrs.get("k", 1)) * sum(prod(s[1:]) for s in sizes)

    def propagate(self, step: Step) -> None:
        """Hidden channels as in two products; a grid of (expert, inner channel) over the weights."""
        last = len(step.shape(0)) - 1
        x = step.labels(0)
        for axis in range(last):
            x = step.drop_axis(x, axis, "fixed-size", "tokens are routed one by one")
        step.freeze(step.labels(1), "fixed-size", "experts are chosen by their scores")
        for i in (i for i in range(2, 8) if step.has(i)):
            step.fix(step.labels(i), 0, "fixed-size", "experts are chosen by their scores")
        hidden = step.axis_ids(x, last)
        for i in (i for i in (FIRST, THIRD) if step.has(i)):
            step.unite(hidden, step.axis_ids(step.labels(i), 2), "the experts' input")
        out = step.axis_ids(step.labels(SECOND), 1)
        if step.has(SECOND + 1):
            step.unite(out, step.axis_ids(step.labels(SECOND + 1), 1), "the experts' bias")
        step.unite(hidden, out, "the experts' output, which has the input's size,")
        self._inner(step)
        step.set(0, () if out is None else (along(out, last, last + 1),))

    def _inner(self, step: Step) -> None:
        present = [i for i in INNER if step.has(i)]
        chains = {i: owned(step, i, (0, INNER[i])) for i in present}
        experts, _, size = step.shape(SECOND)
        times = step.shape(FIRST)[1] // size
        if None in chains.values() or times not in (1, 2) or min(experts, size) < 2:
            for i in present:
                why = "weights of experts that are computed or shared"
                step.fix(step.labels(i), INNER[i], "unsupported-form", why)
            return
        ids = step.atoms.new(experts * size, step.node.inputs[FIRST], 1).reshape(experts, size)
        grid = Label(ids, 1)
        step.atoms.view(grid)
        step.atoms.fix_axis(grid, 0, step.reason("fixed-size", "experts are chosen by their scores"))
        if times == 2:
            fused = np.repeat(ids, 2, axis=1) if step.attr("swiglu_fusion", 0) == 1 else np.tile(ids, (1, 2))
        else:
            fused = ids
        for i in present:
            cells, axis = fused if i in (FIRST, FIRST + 1) else ids, INNER[i]
            shape = [1] * len(step.shape(i))
            shape[0], shape[axis] = cells.shape
            for link in chains[i] or ():
                old = covering(step.table.get(link), axis)
                if old is not None:
                    step.atoms.freeze(old.ids, step.reason("operand", "replaced by the grid over experts"))
            override(step, chains[i] or [], (Label(cells.reshape(shape), axis),), (axis,))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """The tokens' channels, and the inner ones as the second layer's weights meet them."""
        return [(0, (len(step.shape(0)) - 1,)), (SECOND, (2,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The tokens' shape, with as many channels as the second layer gives."""
        x, w = shapes[0], shapes[SECOND]
        return [None if x is None or w is None else (*x[:-1], w[1])]


class QMoE(Rule):
    """The same on codes: several of them lie in a byte, and scales belong to blocks of them, so all sizes stay."""

    def propagate(self, step: Step) -> None:
        """Nothing can go."""
        for i in range(len(step.node.inputs)):
            step.freeze(step.labels(i), "unsupported-form", "weights of experts are packed codes")

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The tokens' shape."""
        return [shapes[0]]


register(MS, "MoE", rule=MoE())
register(MS, "QMoE", rule=QMoE())
