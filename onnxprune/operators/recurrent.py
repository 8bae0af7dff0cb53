"""LSTM, GRU and RNN: a hidden unit is a row of every gate, a column of the recurrence, a channel of the output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, known
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Ids, Label, Labels, covering
from onnxprune.operators.codes import numbers
from onnxprune.operators.context import Cut, Step, override, owned
from onnxprune.operators.contractions import Form, Pairwise
from onnxprune.operators.factoring import Recurrence
from onnxprune.operators.registry import Read, Rule, register, with_facts

X, W, R, B, INITIAL_H, INITIAL_C, PEEPHOLES = 0, 1, 2, 3, 5, 6, 7
_UNLABELLED = "the hidden size meets a tensor without removable channels"


class Recurrent(Rule):
    """X [T, N, I], W [dirs, gates*H, I], R [dirs, gates*H, H], B [dirs, 2*gates*H], P [dirs, 3*H], states [dirs, N, H].

    With ``layout`` 1 the batch comes first. Hidden unit j is tied through all gates; the two directions of a
    bidirectional layer lose different units unless another operator ties them.

    Args:
        gates: rows of W per hidden unit (LSTM 4, GRU 3, RNN 1).
    """

    weights = (W, R)
    several_directions = True

    def __init__(self, gates: int) -> None:
        self.gates = gates

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of data, weights and states."""
        data, weight = shapes[0], shapes[1]
        if len(data) != 3:
            return
        batch = 0 if node.attrs.get("layout", 0) else 1
        yield data[2], weight[2]
        for i in (5, 6) if node.op == "LSTM" else (5,):
            state = shapes[i] if i < len(shapes) else None
            if state is not None:
                yield state[2], shapes[2][2]
                yield state[batch], data[batch]
                yield state[1 - batch], weight[0]

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count both matrices once per step of every sequence."""
        return recurrent_macs(shapes)

    def channels(self, node: Node, shapes: Sequence[Any], out: Any, weight: int) -> Any:
        """Return the hidden size, for any choice of outputs."""
        return shapes[R][-1] if shapes[R] else 0

    def propagate(self, step: Step) -> None:
        """Unite X's last axis with W's; use one atom per direction and hidden unit for all other operands."""
        x, w = step.labels(X), step.labels(W)
        step.fix_all_but(x, (2,), Reason.SPATIAL, f"{step.node.op} runs along this axis")
        step.unite(step.axis_ids(x, 2), step.axis_ids(w, 2), "the layer's input")
        directions, _, size = step.shape(R)
        if size == 1:
            for i in range(1, len(step.node.inputs)):
                other_labels = tuple(label for label in step.labels(i) if i != W or label.axes != (2,))
                step.freeze(other_labels, Reason.FIXED_SIZE, "a single hidden unit")
            return
        hidden = step.atoms.new(directions * size, step.node.inputs[W], 1).reshape(directions, size)
        for i, grids in self._operands(step, hidden).items():
            self._tie(step, i, grids)
        self._outputs(step, hidden)

    def _operands(self, step: Step, hidden: Ids) -> dict[int, Labels]:
        """Return the labels of every present operand, by position."""
        gates = np.tile(hidden, (1, self.gates))
        state = self._at(step, hidden, (0, 2) if not step.attr("layout", 0) else (1, 2), 3)
        operands: dict[int, Labels] = {
            W: (self._at(step, gates, (0, 1), 3),),
            R: (self._at(step, gates, (0, 1), 3), self._at(step, hidden, (0, 2), 3)),
            B: (self._at(step, np.tile(gates, (1, 2)), (0, 1), 2),),
            INITIAL_H: (state,),
            INITIAL_C: (state,),
            PEEPHOLES: (self._at(step, np.tile(hidden, (1, 3)), (0, 1), 2),),
        }
        return {i: labels for i, labels in operands.items() if step.has(i)}

    @staticmethod
    def _at(step: Step, ids: Ids, axes: tuple[int, int], rank: int) -> Label:
        """Return a label from [directions, n] with these two axes of a tensor of ``rank``."""
        shape = [1] * rank
        shape[axes[0]], shape[axes[1]] = ids.shape
        return Label(ids.reshape(shape), axes[1])

    def _tie(self, step: Step, i: int, grids: Labels) -> None:
        """Unite operand ``i`` with the hidden units; replace the labels of a weight that only this layer reads."""
        labels, axes = step.labels(i), tuple(sorted({a for g in grids for a in g.axes}))
        if all(any(x is g for x in labels) for g in grids):
            return  # both initial states are one tensor
        packs = [g.pack for g in grids]
        step.fix_all_but(
            labels, [*packs, 2] if i == W else packs, Reason.OPERAND, "directions and batch keep their size"
        )
        chain = owned(step, i, axes) if any(g.is_grid for g in grids) else None
        for grid in grids:
            direction = next((a for a in grid.axes if a != grid.pack), None)
            if direction is not None:
                # Each direction may lose units of its own: units of different directions are not aligned.
                step.atoms.fix_axis(grid, direction, step.reason(Reason.OPERAND, "both directions stay"))
            state_label = covering(labels, grid.pack)
            if state_label is None:
                step.fix((grid,), grid.pack, Reason.UNLABELLED_OPERAND, _UNLABELLED)
            elif chain is None:
                step.merge(labels, grid)
            else:
                # The grid replaces the weight's own atoms on that axis.
                step.atoms.unite(state_label.ids.ravel(), grid.ids.take([0], axis=direction).ravel())
        if chain is not None:
            override(step, chain, grids, axes)

    def _outputs(self, step: Step, hidden: Ids) -> None:
        """Set labels of Y [T, dirs, N, H] or [N, T, dirs, H] and of Y_h and Y_c [dirs, N, H] or [N, dirs, H]."""
        batch_first = bool(step.attr("layout", 0))
        step.set(0, (self._at(step, hidden, (2, 3) if batch_first else (1, 3), 4),))
        for o in (1, 2):
            step.set(o, (self._at(step, hidden, (1, 2) if batch_first else (0, 2), 3),))

    def rewrite(self, cut: Cut) -> None:
        """Set ``hidden_size`` from the recurrence's last axis."""
        size = cut.shape(R)[2]
        if "hidden_size" in cut.node.attrs and size != cut.attr("hidden_size"):
            cut.set_attr("hidden_size", size)

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product of the input and W, or of the state and R, before the gates."""
        w, r = known(shapes[W]), known(shapes[R])
        if data == INITIAL_H and r is not None:
            return Pairwise(("dbh", "dgh", "dbg"), r, data=INITIAL_H, weight=R, plain=False)
        if data != X or w is None:
            return None
        return Pairwise(("sbi", "dgi", "sbdg"), w, plain=False)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the features of X and the units of R, whose columns multiply the state."""
        return [(X, (2,)), (R, (2,))]


def recurrent_macs(shapes: Sequence[Any]) -> Any:
    """Return the positions of [T, N, I] times the elements of both matrices."""
    sizes = [s for s in shapes[W : R + 1] if s is not None]
    return 0 if shapes[X] is None else prod(shapes[X][:2]) * sum(prod(s) for s in sizes)


def _by_direction(setting: NDArray[Any]) -> NDArray[Any]:
    """Reshape a setting [directions] or [directions, columns] to broadcast with [directions, rows, columns]."""
    return setting.reshape(len(setting), 1, -1)


class DynamicQuantizeLSTM(Rule):
    """onnxruntime's LSTM over integer weights W [dirs, I, 4*H]: only its input can be pruned, its state is quantised.

    Scales and zero points [dirs] or [dirs, 4*H] of W are inputs 8 and 9, those of R 10 and 11.
    """

    quantized = integer = True
    jumps = True
    weights = (W, R)
    settings = (8, 9, 10, 11)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of the data and of the weight that reads them."""
        yield shapes[0][2], shapes[1][1]

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count both matrices once per step of every sequence."""
        return recurrent_macs(shapes)

    def channels(self, node: Node, shapes: Sequence[Any], out: Any, weight: int) -> Any:
        """Return the hidden size."""
        return shapes[R][1] if shapes[R] else 0

    def numbers(self, node: Node, i: int, codes: NDArray[Any], read: Read) -> NDArray[Any] | None:
        """Dequantise W or R, with scales per direction or per column."""
        scale_at = {W: 8, R: 10}.get(i)
        if scale_at is None:
            return None
        scale, zero = (None if (v := read(at)) is None else _by_direction(v) for at in (scale_at, scale_at + 1))
        return None if scale is None else numbers(codes, scale, zero)

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product of the input and W, before the gates."""
        w = known(shapes[W])
        return None if data != X or w is None else Pairwise(("sbi", "dig", "sbdg"), w, plain=False)

    def propagate(self, step: Step) -> None:
        """Unite the features of X and W; freeze every other axis."""
        x, w = step.labels(0), step.labels(1)
        step.fix_all_but(x, (2,), Reason.SPATIAL, f"{step.node.op} runs along this axis")
        step.fix_all_but(w, (1,), Reason.NORMALISED, "the hidden state is quantised over all its units at once")
        step.unite(step.axis_ids(x, 2), step.axis_ids(w, 1), "the layer's input")

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Return shapes Y [T, dirs, N, H], Y_h and Y_c [dirs, N, H], from R [dirs, H, 4*H]."""
        x, r = shapes[X], shapes[R]
        if x is None or r is None:
            return None
        return [(x[0], r[0], x[1], r[1]), (r[0], x[1], r[1]), (r[0], x[1], r[1])]

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the features of X; a feature that is 0 does not widen the range of quantisation."""
        return [(0, (2,))]


register("", "LSTM", rule=with_facts(Recurrent(4), factoring=Recurrence()))
register("", "GRU", rule=with_facts(Recurrent(3), factoring=Recurrence()))
register("", "RNN", rule=with_facts(Recurrent(1), factoring=Recurrence()))
register("com.microsoft", "DynamicQuantizeLSTM", rule=DynamicQuantizeLSTM())
