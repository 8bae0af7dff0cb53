"""Operators that compute on codes: integer convolutions and products, and onnxruntime's pointwise operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape, broadcast, concatenate
from onnxprune.labels.label import Labels, along
from onnxprune.labels.movement import insert_axis
from onnxprune.rules.context import Cut, Step
from onnxprune.rules.contraction import contract, matmul_terms
from onnxprune.rules.convolution import Conv
from onnxprune.rules.elementwise import Elementwise
from onnxprune.rules.normalization import OverAxes
from onnxprune.rules.registry import Rule, register
from onnxprune.rules.sizes import product, window_sizes


class IntegerConv(Conv):
    """A convolution of codes: a removed channel is one of zero points, not of zeros.

    Args:
        data, weight, bias, per_output: as in :class:`Conv`.
        zero: position of the data's zero point, which may be absent.
    """

    def __init__(self, data: int, weight: int, bias: int | None, per_output: tuple[int, ...], zero: int) -> None:
        super().__init__(data, weight, bias, per_output)
        self.zero = zero

    def axis(self, step: Step) -> int:
        """Channels come last in one form of onnxruntime's."""
        return len(step.shape(self.data)) - 1 if step.attr("channels_last", 0) else 1

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[N, O, ...] or [N, ..., O]."""
        x, w = shapes[self.data], shapes[self.weight]
        if x is None or w is None or not node.attrs.get("channels_last", 0):
            return super().infer(node, shapes, values)
        return [(x[0], *window_sizes(x[1:-1], w[2:], node.attrs), w[0])]

    def neutral(self, step: Step, i: int) -> str | None:
        """The data's zero point."""
        return step.node.inputs[self.zero] if step.has(self.zero) else None


class IntegerMatMul(Rule):
    """A product of matrices of codes.

    Args:
        a, b: positions of the matrices.
        zero: position of the zero point of ``a``; None where it is given as numbers.
        rows: positions of operands with one value for all or one per row of ``a``.
        columns: positions of operands that broadcast against the result: one per column of ``b``, or an addend.
    """

    def __init__(self, a: int, b: int, zero: int | None, rows: Sequence[int] = (), columns: Sequence[int] = ()) -> None:
        self.a, self.b, self.zero, self.rows, self.columns = a, b, zero, rows, columns

    def terms(self, node: Node, a: int, b: int) -> tuple[str, str, str]:
        """Subscripts of operands of rank ``a`` and ``b`` and of the result."""
        if node.op == "QGemm":
            return ("km" if node.attrs.get("transA") else "mk"), ("nk" if node.attrs.get("transB") else "kn"), "mn"
        return matmul_terms(a, b)

    def propagate(self, step: Step) -> None:
        """Contract over ``k``, then meet what belongs to rows and columns."""
        left, right = step.shape(self.a), step.shape(self.b)
        x, y, out = self.terms(step.node, len(left), len(right))
        if self.zero is not None and step.has(self.zero) and int(np.prod(step.shape(self.zero))) > 1:
            step.fix(step.labels(self.a), x.index("k"), "unsupported-form", "every row has a zero point of its own")
        result = contract(step, [(step.labels(self.a), left, x), (step.labels(self.b), right, y)], out)
        operands: list[tuple[Labels, Shape]] = [(result, step.out_shape())]
        for i in (i for i in (*self.rows, *self.columns) if step.has(i)):
            labels, shape = step.labels(i), step.shape(i)
            if i in self.rows and len(shape) == 1 and shape[0] > 1:
                labels, shape = insert_axis(labels, 1), (*shape, 1)
            if labels:
                operands.append((labels, shape))
        step.set(0, broadcast(step.atoms, operands, len(out), step.reason))

    def reads(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """``a`` over ``k``: zeros in one factor are enough."""
        x, _, _ = self.terms(step.node, len(step.shape(self.a)), len(step.shape(self.b)))
        return [(self.a, (x.index("k"),))]

    def neutral(self, step: Step, i: int) -> str | None:
        """The zero point of ``a``."""
        return step.node.inputs[self.zero] if self.zero is not None and step.has(self.zero) else None

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """As numpy's matmul."""
        a, b = shapes[self.a], shapes[self.b]
        return None if a is None or b is None else [product(a, b, self.terms(node, len(a), len(b)))]


class PackedMatMul(Rule):
    """MatMulNBits: B [N, blocks, bytes] is packed along K, which stays; N is cut with its scales and zero points."""

    def propagate(self, step: Step) -> None:
        """Unite N through all operands; the scales may be flat, N times the blocks."""
        a, b = step.labels(0), step.labels(1)
        step.fix_all_but(b, (0,), "operand", "codes are packed along this axis")
        columns, size = step.axis_ids(b, 0), step.shape(1)[0]
        for i in (i for i in (2, 3, 5) if step.has(i)):
            own, shape = step.labels(i), step.shape(i)
            step.fix_all_but(own, (0,), "operand", "one value per block of codes")
            if own:
                every = None if columns is None else np.repeat(columns, shape[0] // size)
                step.unite(every, step.axis_ids(own, 0), "a scale or zero point")
        rank = len(step.shape(0))
        result = step.drop_axis(a, rank - 1, "fixed-size", "codes are packed along this axis")
        step.set(0, result if columns is None else (*result, along(columns, rank - 1, rank)))

    def rewrite(self, cut: Cut) -> None:
        """``N`` follows the codes."""
        if cut.shape(1)[0] != cut.attr("N"):
            cut.set_attr("N", cut.shape(1)[0])

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """A's last axis becomes N."""
        return None if shapes[0] is None else [(*shapes[0][:-1], int(node.attrs["N"]))]


class QuantizedConcat(Rule):
    """Parts one after the other, each with its scale and zero point: y_scale, y_zero, then (data, scale, zero)..."""

    def propagate(self, step: Step) -> None:
        """Concatenate the labels."""
        operands = [(step.labels(i), step.shape(i)) for i in range(2, len(step.node.inputs), 3)]
        axis = int(step.attr("axis")) % len(step.out_shape())
        step.set(0, concatenate(step.atoms, operands, axis, step.reason, step.node.outputs[0]))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Sizes add up along the axis."""
        parts = [shape for shape in shapes[2::3] if shape is not None]
        if len(parts) < len(shapes[2::3]):
            return None
        axis, result = int(node.attrs["axis"]) % len(parts[0]), list(parts[0])
        sizes = [p[axis] for p in parts]
        result[axis] = None if None in sizes else sum(n or 0 for n in sizes)
        return [tuple(result)]


class QuantizedPool(Rule):
    """Average pooling of codes, channels first or last."""

    def propagate(self, step: Step) -> None:
        """Batch and channels pass."""
        labels = step.labels(0)
        channel = len(step.shape(0)) - 1 if step.attr("channels_last", 0) else 1
        step.fix_all_but(labels, (0, channel), "spatial", f"{step.node.op} works along this axis")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Global pooling leaves 1, windows as many positions as fit."""
        shape = shapes[0]
        if shape is None:
            return None
        first = 1 if node.attrs.get("channels_last", 0) else 2
        last = len(shape) - 2 + first
        sizes: Shape = tuple(shape[first:last])
        if node.op == "QLinearGlobalAveragePool":
            sizes = (1,) * len(sizes)
        else:
            sizes = window_sizes(sizes, tuple(node.attrs["kernel_shape"]), node.attrs)
        return [(*shape[:first], *sizes, *shape[last:])]


class QuantizedSoftmax(OverAxes):
    """Softmax on codes; before opset 13, which an attribute tells, everything from ``axis`` on is one axis."""

    def axes(self, step: Step) -> list[int]:
        """One axis, or all from it on."""
        if int(step.attr("opset", 13)) >= 13:
            return [step.axis(-1)]
        return list(range(step.axis(1), len(step.shape(0))))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The shape stays."""
        return [shapes[0]]


register("", "QLinearConv", rule=IntegerConv(0, 3, 8, (4, 5), zero=2))
register("com.microsoft", "QLinearConv", rule=IntegerConv(0, 3, 8, (4, 5), zero=2))
register("", "ConvInteger", rule=IntegerConv(0, 1, None, (3,), zero=2))
register("", "QLinearMatMul", rule=IntegerMatMul(0, 3, 2, rows=(1, 2, 6, 7), columns=(4, 5)))
register("", "MatMulInteger", rule=IntegerMatMul(0, 1, 2, rows=(2,), columns=(3,)))
register("com.microsoft", "QGemm", rule=IntegerMatMul(0, 3, 2, columns=(4, 5, 6)))
register("com.microsoft", "DynamicQuantizeMatMul", rule=IntegerMatMul(0, 1, None, columns=(2, 3, 4)))
register("com.microsoft", "MatMulIntegerToFloat", rule=IntegerMatMul(0, 1, 4, rows=(2, 4), columns=(3, 5, 6)))
register("com.microsoft", "MatMulNBits", rule=PackedMatMul())
register("com.microsoft", "QLinearAdd", "QLinearMul", rule=Elementwise([0, 3]))
register("com.microsoft", "QLinearSigmoid", "QLinearLeakyRelu", rule=Elementwise([0]))
register("com.microsoft", "QLinearWhere", rule=Elementwise([0, 1, 4]))
register("com.microsoft", "QLinearConcat", rule=QuantizedConcat())
register("com.microsoft", "QLinearGlobalAveragePool", "QLinearAveragePool", rule=QuantizedPool())
register("com.microsoft", "QLinearSoftmax", rule=QuantizedSoftmax())
