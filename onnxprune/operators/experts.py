"""Mixtures of experts: a router selects two-layer networks for every token."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Ids, Label, along, covering
from onnxprune.operators.codes import PACKED_BITS, numbers, unpack
from onnxprune.operators.context import Step, override, owned
from onnxprune.operators.registry import Array, Read, Rule, register

MS = "com.microsoft"


FIRST, SECOND, THIRD = 2, 4, 6
"""Positions of the layers' weights; a bias follows each."""
INNER = {2: 1, 3: 1, 4: 2, 6: 1, 7: 1}
"""Axis of the inner channels by input."""


SECOND_CODES = 5
"""Position of the second layer's codes."""
_FIRST_OPERANDS = (2, 3, 4, 11)


class MoE(Rule):
    """com.microsoft.MoE: tokens [..., H] in and out, scores [tokens, E], weights and biases of up to three layers.

    The first and third weights are [E, I, H] (the first of twice the width with a fused gate), the second [E, H, I].
    Every expert loses inner channels of its own, the same number each; whole experts go only where the choice is opened
    (:mod:`onnxprune.pruning.experts`), since the router chooses differently among fewer.
    """

    weights = (FIRST, SECOND, THIRD)
    routes = 1

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count the layers of ``k`` experts per token, whose weights are [experts, ...]."""
        sizes = [s for s in shapes[2::2] if s is not None]
        if shapes[0] is None:
            return 0
        return prod(shapes[0][:-1]) * int(node.attrs.get("k", 1)) * sum(prod(s[1:]) for s in sizes)

    def propagate(self, step: Step) -> None:
        """Propagate hidden channels as in two products, with a grid of (expert, inner channel) over the weights."""
        if step.may_lose_choices:
            _whole_experts(step)
            return
        last = len(step.shape(0)) - 1
        x = step.labels(0)
        for axis in range(last):
            x = step.drop_axis(x, axis, Reason.FIXED_SIZE, "tokens are routed one by one")
        step.freeze(step.labels(1), Reason.FIXED_SIZE, "experts are chosen by their scores")
        for i in (i for i in range(2, 8) if step.has(i)):
            step.fix(step.labels(i), 0, Reason.FIXED_SIZE, "experts are chosen by their scores")
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
                step.fix(step.labels(i), INNER[i], Reason.UNSUPPORTED_FORM, why)
            return
        ids = step.atoms.new(experts * size, step.node.inputs[FIRST], 1).reshape(experts, size)
        grid = Label(ids, 1)
        step.atoms.view(grid)
        step.atoms.fix_axis(grid, 0, step.reason(Reason.FIXED_SIZE, "experts are chosen by their scores"))
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
                    step.atoms.freeze(old.ids, step.reason(Reason.OPERAND, "replaced by the grid over experts"))
            override(step, chains[i] or [], (Label(cells.reshape(shape), axis),), (axis,))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the tokens' channels, and the inner channels of the second layer's weights."""
        return [(0, (len(step.shape(0)) - 1,)), (SECOND, (2,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the tokens' shape, with the second layer's number of channels."""
        x, w = shapes[0], shapes[SECOND]
        return [None if x is None or w is None else (*x[:-1], w[1])]


def _whole_experts(step: Step) -> None:
    """Tie the scores of experts to the experts of every operand, and keep everything else."""
    scores, why = step.labels(1), "whole experts go"
    experts = step.axis_ids(scores, len(step.shape(1)) - 1)
    step.fix_all_but(scores, (len(step.shape(1)) - 1,), Reason.FIXED_SIZE, why)
    step.freeze(step.labels(0), Reason.FIXED_SIZE, why)
    for i in (i for i in range(2, len(step.node.inputs)) if step.has(i)):
        step.unite(experts, step.axis_ids(step.labels(i), 0), "the experts")
        step.fix_all_but(step.labels(i), (0,), Reason.FIXED_SIZE, why)


class QMoE(Rule):
    """com.microsoft.QMoE, MoE on codes: weights at 2, 5 and 8, scales [E, rows] or [E, rows, blocks] behind each.

    A bias follows each scale; zero points, packed like the codes, are inputs 11, 12 and 13. The unit of pruning is a
    whole byte of inner channels, or a whole block where scales belong to blocks of the second layer's inner channels.
    """

    quantized = True
    routes = 1
    weights = (2, 5, 8)
    settings = (3, 6, 9, 11, 12, 13)

    def propagate(self, step: Step) -> None:
        """Lay a grid of (expert, unit) over every operand with inner channels; freeze every other axis."""
        if step.may_lose_choices:
            _whole_experts(step)
            return
        inner = self._inner(step)
        for i in range(len(step.node.inputs)):
            labels = step.labels(i)
            other_labels = tuple(x for x in labels if i not in inner or not set(x.axes) <= {inner[i]})
            step.freeze(other_labels, Reason.UNSUPPORTED_FORM, "codes of experts are packed along this axis")
        units = gcd(*(step.shape(i)[axis] for i, axis in inner.items()))
        experts, size = step.shape(SECOND_CODES)[0], self._size(step)
        times = step.shape(FIRST)[1] // size
        chains = {i: owned(step, i, (0, axis)) for i, axis in inner.items()}
        if None in chains.values() or times not in (1, 2) or size % units or min(experts, units) < 2:
            for i, axis in inner.items():
                step.fix(
                    step.labels(i), axis, Reason.UNSUPPORTED_FORM, "inner channels of experts lie in one block of codes"
                )
            return
        ids = step.atoms.new(experts * units, step.node.inputs[FIRST], 1).reshape(experts, units)
        grid = Label(ids, 1)
        step.atoms.view(grid)
        step.atoms.fix_axis(grid, 0, step.reason(Reason.FIXED_SIZE, "experts are chosen by their scores"))
        for i, axis in inner.items():
            n = step.shape(i)[axis]
            is_split = times == 2 and i in _FIRST_OPERANDS and step.attr("swiglu_fusion", 0) != 1
            cells = np.repeat(ids, n // units // (2 if is_split else 1), axis=1)
            self._lay(step, i, axis, np.tile(cells, (1, 2)) if is_split else cells, chains[i] or [])

    @staticmethod
    def _lay(step: Step, i: int, axis: int, cells: Ids, chain: list[str]) -> None:
        """Set the grid as labels of an operand that only this node reads."""
        shape = [1] * len(step.shape(i))
        shape[0], shape[axis] = cells.shape
        for link in chain:
            old = covering(step.table.get(link), axis)
            if old is not None:
                step.atoms.freeze(old.ids, step.reason(Reason.OPERAND, "replaced by the grid over experts"))
        override(step, chain, (Label(cells.reshape(shape), axis),), (axis,))

    @staticmethod
    def _size(step: Step) -> int:
        """Return the number of inner channels of an expert."""
        return step.shape(SECOND_CODES)[2] * 8 // int(step.attr("expert_weight_bits", 4))

    @staticmethod
    def _inner(step: Step) -> dict[int, int]:
        """Return the axis of inner channels by input: rows of the first and third layer, columns of the second."""
        rows = {i: 1 for i in (*_FIRST_OPERANDS, 8, 9, 10, 13) if step.has(i)}
        return rows | {i: 2 for i in (SECOND_CODES, 6, 12) if step.has(i) and len(step.shape(i)) == 3}

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return scales and biases of the first layer: where they are 0, an inner channel and its activation are 0."""
        return [(i, (1,)) for i in (3, 4) if step.has(i)]

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count as MoE; every byte holds several codes."""
        if shapes[0] is None:
            return 0
        per_byte = 8 // int(node.attrs.get("expert_weight_bits", 4))
        sizes = [shapes[i] for i in self.weights if i < len(shapes) and shapes[i] is not None]
        return prod(shapes[0][:-1]) * int(node.attrs.get("k", 1)) * sum(prod(s[1:]) for s in sizes) * per_byte

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """Dequantise to [E, rows, bytes, codes per byte]."""
        bits, zero_at = int(node.attrs.get("expert_weight_bits", 4)), {2: 11, 5: 12, 8: 13}.get(i)
        scale = None if zero_at is None else read(i + 1)
        if zero_at is None or scale is None or bits not in PACKED_BITS:
            return None
        values, zero = unpack(codes, bits), read(zero_at)
        rows, spread = codes.shape[1], scale.reshape(*codes.shape[:2], -1)
        middle = np.full(spread.shape, 1 << (bits - 1), np.float32)
        if zero is not None:
            count = spread.shape[2] if scale.ndim == 3 else rows
            middle = unpack(zero, bits, count).reshape(spread.shape).astype(np.float32)
        return numbers(values, spread, middle, -1).reshape(*codes.shape, -1)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the tokens' shape."""
        return [shapes[0]]


register(MS, "MoE", rule=MoE())
register(MS, "QMoE", rule=QMoE())
