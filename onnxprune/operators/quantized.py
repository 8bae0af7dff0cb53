"""Operators that compute on codes: integer convolutions and products, and onnxruntime's pointwise operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxprune.contractions import Form, Windows
from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape, broadcast, concatenate, known
from onnxprune.labels.label import Labels
from onnxprune.labels.movement import insert_axis
from onnxprune.operators.codes import numbers
from onnxprune.operators.context import Step
from onnxprune.operators.contraction import contract, made_axis, matmul_terms, product_form
from onnxprune.operators.convolution import Conv, window_settings
from onnxprune.operators.elementwise import Elementwise
from onnxprune.operators.normalization import OverAxes
from onnxprune.operators.registry import Read, Rule, register
from onnxprune.operators.sizes import product, window_sizes

Array = NDArray[Any]


class Settings(NamedTuple):
    """Positions of the scale and the zero point of one operand; None where it has none."""

    scale: int | None = None
    zero: int | None = None


def all_settings(codes: Mapping[int, Settings]) -> tuple[int, ...]:
    """Every position of a scale or zero point."""
    return tuple(i for pair in codes.values() for i in pair if i is not None)


def real_numbers(codes: Mapping[int, Settings], i: int, value: Array, read: Read, axis: int) -> Array | None:
    """What the codes of operand ``i`` stand for; None where a scale is not a constant, or the operand holds numbers."""
    pair = codes.get(i)
    if pair is None:
        return None
    scale = None if pair.scale is None else read(pair.scale)
    if scale is None and pair.scale is not None:
        return None
    return numbers(value, scale, None if pair.zero is None else read(pair.zero), axis)


class IntegerConv(Conv):
    """A convolution of codes: a removed channel is one of zero points, not of zeros.

    Args:
        data, weight, bias, per_output: as in :class:`Conv`.
        codes: positions of scale and zero point by that of what they are of.
    """

    def __init__(
        self, data: int, weight: int, bias: int | None, per_output: tuple[int, ...], codes: Mapping[int, Settings]
    ) -> None:
        super().__init__(data, weight, bias, per_output)
        self.codes, self.zero = codes, codes[data].zero
        self.settings = all_settings(codes)

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """By scale and zero point: of the weight one for all or one per output channel."""
        return real_numbers(self.codes, i, codes, read, axis=0)

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """The last in one form of onnxruntime's."""
        return rank - 1 if node.attrs.get("channels_last", 0) else 1

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
        return step.node.inputs[self.zero] if self.zero is not None and step.has(self.zero) else None

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Windows of the numbers that the data stand for, where channels come first."""
        w = known(shapes[self.weight])
        if data != self.data or w is None or node.attrs.get("channels_last", 0):
            return None
        return Windows(w[2:], **window_settings(node), data=data, weight=self.weight, bias=None, plain=False)


class IntegerMatMul(Rule):
    """A product of matrices of codes.

    Args:
        a, b: positions of the matrices.
        codes: positions of scale and zero point of either matrix; ``a`` is not in it where it is given as numbers.
        rows: positions of operands with one value for all or one per row of ``a``.
        columns: positions of operands that broadcast against the result: one per column of ``b``, or an addend.
    """

    def __init__(
        self,
        a: int,
        b: int,
        codes: Mapping[int, Settings],
        rows: Sequence[int] = (),
        columns: Sequence[int] = (),
    ) -> None:
        self.a, self.b, self.codes, self.rows, self.columns = a, b, codes, rows, columns
        self.zero = codes[a].zero if a in codes else None
        self.data, self.weights, self.settings = a, (a, b), all_settings(codes)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """The product's size times that of ``k``."""
        a, b = shapes[self.a], shapes[self.b]
        if a is None or b is None or out is None:
            return 0
        return prod(out) * a[self.terms(node, len(a), len(b))[0].index("k")]

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """The axis that the weight makes, on whichever side it stands."""
        a, b = shapes[self.a], shapes[self.b]
        if a is None or b is None:
            return rank - 1
        left, right, out = self.terms(node, len(a), len(b))
        return made_axis((left, right), out, 0 if weight == self.a else 1)

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """By scale and zero point: one for all, of ``a`` one per row, of ``b`` one per column."""
        transposed = node.op == "QGemm" and bool(node.attrs.get("transA" if i == self.a else "transB"))
        return real_numbers(self.codes, i, codes, read, axis=-2 if (i == self.a) != transposed else -1)

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Of the numbers that both matrices stand for; either may be the weight."""
        a, b = shapes[self.a], shapes[self.b]
        if a is None or b is None or data not in (self.a, self.b):
            return None
        form = product_form(self.terms(node, len(a), len(b)), (a, b), 0 if data == self.a else 1, plain=False)
        if form is not None:
            form.data, form.weight = data, self.b if data == self.a else self.a
        return form

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
            operands.append((labels, shape))
        step.set(0, broadcast(step.atoms, operands, len(out), step.reason))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """``a`` over ``k``: zeros in one factor are enough. A range that is found anew is taken over all of it."""
        if self.zero is None:
            return [(self.a, tuple(range(len(step.shape(self.a)))))]
        x, _, _ = self.terms(step.node, len(step.shape(self.a)), len(step.shape(self.b)))
        return [(self.a, (x.index("k"),))]

    def neutral(self, step: Step, i: int) -> str | None:
        """The zero point of ``a``."""
        return step.node.inputs[self.zero] if self.zero is not None and step.has(self.zero) else None

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """As numpy's matmul."""
        a, b = shapes[self.a], shapes[self.b]
        return None if a is None or b is None else [product(a, b, self.terms(node, len(a), len(b)))]


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
        labels = step.drop_all_but(labels, (0, channel), "spatial", f"{step.node.op} works along this axis")
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


# Positions of both operands' scales and zero points, in the orders in which operators have them.
_LINEAR = {0: Settings(1, 2), 3: Settings(4, 5)}
_INTEGER = {0: Settings(zero=2), 1: Settings(zero=3)}
_TO_FLOAT = {0: Settings(2, 4), 1: Settings(3, 5)}

register("", "QLinearConv", rule=IntegerConv(0, 3, 8, (4, 5), _LINEAR))
register("com.microsoft", "QLinearConv", rule=IntegerConv(0, 3, 8, (4, 5), _LINEAR))
register("", "ConvInteger", rule=IntegerConv(0, 1, None, (3,), _INTEGER))
register("", "QLinearMatMul", rule=IntegerMatMul(0, 3, _LINEAR, rows=(1, 2, 6, 7), columns=(4, 5)))
register("", "MatMulInteger", rule=IntegerMatMul(0, 1, _INTEGER, rows=(2,), columns=(3,)))
register("com.microsoft", "QGemm", rule=IntegerMatMul(0, 3, _LINEAR, columns=(4, 5, 6)))
register("com.microsoft", "DynamicQuantizeMatMul", rule=IntegerMatMul(0, 1, {1: Settings(2, 3)}, columns=(2, 3, 4)))
register("com.microsoft", "MatMulIntegerToFloat", rule=IntegerMatMul(0, 1, _TO_FLOAT, rows=(2, 4), columns=(3, 5, 6)))
register("com.microsoft", "QLinearAdd", "QLinearMul", rule=Elementwise([0, 3]))
register("com.microsoft", "QLinearSigmoid", "QLinearLeakyRelu", rule=Elementwise([0]))
register("com.microsoft", "QLinearWhere", rule=Elementwise([0, 1, 4]))
register("com.microsoft", "QLinearConcat", rule=QuantizedConcat())
register("com.microsoft", "QLinearGlobalAveragePool", "QLinearAveragePool", rule=QuantizedPool())
register("com.microsoft", "QLinearSoftmax", rule=QuantizedSoftmax())
