"""Quantised codes, scales and zero points, and operators that compute on codes.

Along the packed axis the smallest unit of pruning is a whole block: its codes, its scale and its zero point.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, broadcast, concatenate, insert_axis, known
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Labels, along
from onnxprune.operators.codes import NARROW, PACKED_BITS, numbers, pack, requantise, unpack
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contraction import contract, matmul_terms, output_channel_axis, product_form
from onnxprune.operators.contractions import Blocks, Form, Windows
from onnxprune.operators.convolution import Conv, window_settings
from onnxprune.operators.elementwise import Elementwise
from onnxprune.operators.normalization import OverAxes
from onnxprune.operators.operands import Values
from onnxprune.operators.registry import (
    Code,
    InFloats,
    NewNode,
    NoRule,
    Read,
    Rule,
    Surroundings,
    WithoutAddends,
    register,
    with_facts,
)
from onnxprune.operators.sizes import gemm_pairs, matmul_pairs, product, window_sizes

_PER_CHANNEL = "a scale or zero point"


class Quantize(Rule):
    """Codes and numbers have the same labels; scale and zero point are scalars, per position of an axis, or per block.

    Blocks of ``block_size`` positions share a scale, so they are pruned as a whole.
    """

    settings = (1, 2)

    def propagate(self, step: Step) -> None:
        """Unite the scale's and the zero point's axes with the data's."""
        labels, shape = step.labels(0), step.shape(0)
        for i in (1, 2):
            parameter_labels = step.labels(i)
            if not step.has(i) or int(np.prod(step.shape(i))) == 1:
                continue
            if len(step.shape(i)) == 1:
                axis = step.axis(1)
                step.unite(step.axis_ids(labels, axis), step.axis_ids(parameter_labels, 0), _PER_CHANNEL)
            else:
                self._blocked(step, labels, shape, parameter_labels, step.shape(i))
        step.set(0, labels)

    @staticmethod
    def _blocked(
        step: Step, labels: Labels, shape: tuple[int, ...], parameter_labels: Labels, blocks: tuple[int, ...]
    ) -> None:
        axis = step.axis(1)
        for a, (n, m) in enumerate(zip(shape, blocks, strict=True)):
            if m == 1:
                continue
            ids = step.axis_ids(parameter_labels, a)
            if a == axis and n != m and ids is not None:
                ids = ids[np.arange(n) // int(step.attr("block_size"))]
            step.unite(step.axis_ids(labels, a), ids, _PER_CHANNEL)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shape of the data."""
        return [shapes[0]]


class DynamicQuantize(Rule):
    """Quantisation in the range of the smallest to the largest number, 0 included: a channel of 0 does not widen it."""

    quantized = True
    encodes = True

    def propagate(self, step: Step) -> None:
        """Pass the labels to the codes; scale and zero point are scalars."""
        step.set(0, step.labels(0))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return every axis: the range is taken over all of them, so removed channels become 0 here."""
        return [(0, tuple(range(len(step.shape(0)))))]


class Encode(Quantize):
    """QuantizeLinear."""

    quantized = True
    encodes = True


class Decode(Quantize):
    """DequantizeLinear."""

    quantized = True
    decodes = True

    def numbers(self, node: Node, i: int, codes: NDArray[Any], read: Read) -> NDArray[Any] | None:
        """Dequantise as (codes - zero point) * scale."""
        scale = read(1) if i == 0 else None
        if scale is None:
            return None
        return numbers(codes, scale, read(2), int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0)))

    def code(self, node: Node, read: Read) -> Code | None:
        """Return the code of integers of 8 bits or fewer."""
        codes, scale, zero = read(0), read(1), read(2)
        if codes is None or scale is None or (codes.dtype.itemsize > 1) or (len(node.inputs) > 2 and zero is None):
            return None
        if codes.dtype.kind not in "iu" and codes.dtype.name not in NARROW:
            return None
        bits = int("".join(filter(str.isdigit, codes.dtype.name)))
        middle = 0 if codes.dtype.name.startswith("int") else 1 << (bits - 1)
        moves = zero is not None and bool((zero.astype(np.int16) != middle).any())
        unsigned = bool(middle)
        moves, zeros = moves or (unsigned and zero is None), "codes" if zero is not None or unsigned else ""
        block = int(node.attrs.get("block_size", 0))
        operator: tuple[str, str, Mapping[str, Any]] = (node.op, node.domain, {})
        return Code(operator, codes.dtype, bits, scale.dtype, scale.size > 1, block, zeros, moves)

    def evaluate(self, node: Node, values: Values) -> Any:
        """Dequantise in the scale's type, also at opsets that onnx's reference evaluator does not support."""
        codes, scale = values[0], values[1]
        if codes is None or scale is None or (codes.dtype.kind not in "iu" and codes.dtype.name not in NARROW):
            return None
        real = self.numbers(node, 0, codes, lambda i: values[i] if i < len(values) else None)
        return None if real is None else real.astype(scale.dtype)


for domain in ("", "com.microsoft"):
    register(domain, "QuantizeLinear", rule=Encode())
    register(domain, "DequantizeLinear", rule=Decode())
register("", "DynamicQuantizeLinear", rule=DynamicQuantize())


Array = NDArray[Any]


class Settings(NamedTuple):
    """Positions of the scale and the zero point of one operand; None where it has none."""

    scale: int | None = None
    zero: int | None = None


def all_settings(codes: Mapping[int, Settings]) -> tuple[int, ...]:
    """Return every position of a scale or zero point."""
    return tuple(i for pair in codes.values() for i in pair if i is not None)


def real_numbers(codes: Mapping[int, Settings], i: int, value: Array, read: Read, axis: int) -> Array | None:
    """Dequantise operand ``i``; None where a scale is not a constant, or the operand is not quantised."""
    pair = codes.get(i)
    if pair is None:
        return None
    scale = None if pair.scale is None else read(pair.scale)
    if scale is None and pair.scale is not None:
        return None
    return numbers(value, scale, None if pair.zero is None else read(pair.zero), axis)


class _Floats:
    """The nodes of an operator on codes with numbers, one after the other; new tensors are named after its output."""

    def __init__(self, node: Node, replaced: Sequence[Node] = ()) -> None:
        self.node, self.replaced = node, sorted([node, *replaced], key=lambda n: n.index)
        self._stem = f"{self.replaced[-1].outputs[0]}__"
        self.nodes: list[NewNode] = []
        self.constants: dict[str, Array] = {}
        self.same: dict[str, str] = {}
        self.operands: list[tuple[str, int, str, int]] = []

    def decode(self, suffix: str, operands: Sequence[str], axis: int, positions: Sequence[int | None] = ()) -> str:
        """Add a decoder of codes, scale and zero point; ``positions`` are theirs in the node, None where elsewhere."""
        name = self._stem + suffix
        self.nodes.append(NewNode("DequantizeLinear", operands, [name], name, MS, {"axis": axis}))
        where = ((i, at) for at, i in enumerate(positions) if i is not None and operands[at : at + 1] != [""])
        self.operands += [(self.node.outputs[0], i, name, at) for i, at in where if at < len(operands)]
        return name

    def constant(self, suffix: str, value: Array) -> str:
        """Add a constant."""
        self.constants[self._stem + suffix] = value
        return self._stem + suffix

    def add(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add an operator of ONNX; its output is a new tensor like the result, or ``output``."""
        name = output or f"{self._stem}{op.lower()}"
        if not output:
            self.same[name] = self.replaced[-1].outputs[0]
        title = f"{self._stem}sum" if op == "Add" else self.node.label
        self.nodes.append(NewNode(op, inputs, [name], title, "", attributes))
        return name

    def replacement(self) -> InFloats:
        """Return all of it."""
        return InFloats(self.nodes, self.replaced, self.constants, self.same, self.operands)

    def encoded(self, value: str, scale: str, zero: str) -> InFloats:
        """Return all of it, with an encoder of the result at the end."""
        output = self.replaced[-1].outputs[0]
        self.nodes.append(NewNode("QuantizeLinear", [value, scale, zero], [output], output, MS))
        return self.replacement()


def _names(node: Node, *positions: int) -> list[str]:
    """Return inputs of a node by position, without absent ones at the end."""
    names = [node.inputs[i] if i < len(node.inputs) else "" for i in positions]
    while names and not names[-1]:
        names.pop()
    return names


def _sizes(around: Surroundings, *names: str) -> list[int] | None:
    """Return the number of elements of constants; None where one is no constant, or is a matrix."""
    if not all(n in around.weights and len(around.weights[n].shape) <= 1 for n in names):
        return None
    return [prod(around.weights[n].shape) for n in names]


def _scaled(node: Node, around: Surroundings) -> tuple[list[Node], str, str, int] | None:
    """Return the nodes behind a product in integers that turn it into numbers, and how.

    Returns:
        the nodes, the data's scale, the weight's scale, and the position of that in the first of the nodes; None for
        another pattern.
    """
    cast = around.only_reader(node.outputs[0])
    scaled = None if cast is None or cast.op != "Cast" else around.only_reader(cast.outputs[0])
    if cast is None or scaled is None or scaled.op != "Mul":
        return None
    factor = around.producer.get(next((n for n in scaled.inputs if n != cast.outputs[0]), ""))
    if factor is None or factor.op != "Mul" or around.only_reader(factor.outputs[0]) is None:
        return None
    at = next((i for i in (0, 1) if factor.inputs[i] in around.weights), None)
    if at is None or factor.inputs[1 - at] in around.weights or cast.attrs.get("to") != 1:
        return None
    return [factor, cast, scaled], factor.inputs[1 - at], factor.inputs[at], at


class IntegerConv(Conv):
    """A convolution of codes: a removed channel equals the zero point, not 0.

    Args:
        data: as in :class:`Conv`.
        weight: as in :class:`Conv`.
        bias: as in :class:`Conv`.
        per_output: as in :class:`Conv`.
        codes: positions of scale and zero point, by position of the quantised operand.
    """

    quantized = integer = True

    def __init__(
        self, data: int, weight: int, bias: int | None, per_output: tuple[int, ...], codes: Mapping[int, Settings]
    ) -> None:
        super().__init__(data, weight, bias, per_output)
        self.codes, self.zero = codes, codes[data].zero
        self.settings = all_settings(codes)

    def gives_codes(self, node: Node) -> bool:
        """Return whether the operator has a scale of its results."""
        return node.op == "QLinearConv"

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of the data and those that the kernel reads."""
        channels = shapes[self.data][-1 if node.attrs.get("channels_last", 0) else 1]
        yield channels, shapes[self.weight][1] * node.attrs.get("group", 1)

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """Dequantise; the weight has one scale and zero point, or one per output channel."""
        return real_numbers(self.codes, i, codes, read, axis=0)

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return axis 1, or the last axis in one form of onnxruntime's."""
        return rank - 1 if node.attrs.get("channels_last", 0) else 1

    def axis(self, step: Step) -> int:
        """Return axis 1, or the last axis in one form of onnxruntime's."""
        return len(step.shape(self.data)) - 1 if step.attr("channels_last", 0) else 1

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, O, ...] or [N, ..., O]."""
        x, w = shapes[self.data], shapes[self.weight]
        if x is None or w is None or not node.attrs.get("channels_last", 0):
            return super().infer(node, shapes, values)
        return [(x[0], *window_sizes(x[1:-1], w[2:], node.attrs), w[0])]

    def neutral(self, step: Step, i: int) -> str | None:
        """Return the data's zero point."""
        return step.node.inputs[self.zero] if self.zero is not None and step.has(self.zero) else None

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return windows of the dequantised data, for data with channels on axis 1."""
        w = known(shapes[self.weight])
        if data != self.data or w is None or node.attrs.get("channels_last", 0):
            return None
        return Windows(w[2:], **window_settings(node), data=data, weight=self.weight, bias=None, plain=False)

    def in_floats(self, node: Node, surroundings: Surroundings) -> InFloats | None:
        """Return a convolution of decoded data with a decoded kernel; one in integers with its scales behind it."""
        attributes = {k: v for k, v in node.attrs.items() if k != "channels_last"}
        if node.attrs.get("channels_last", 0) or node.inputs[self.weight] not in surroundings.weights:
            return None
        if self.codes[self.data].scale is None:
            return _in_floats_scaled(self, node, surroundings, "Conv", attributes, 0)
        sizes = _sizes(surroundings, node.inputs[1], node.inputs[4])
        if sizes is None or sizes[0] != 1:
            return None
        new = _Floats(node)
        operands = [
            new.decode("data", _names(node, 0, 1, 2), 0),
            new.decode("weight", _names(node, 3, 4, 5), 0, (3, 4, 5)),
        ]
        if len(node.inputs) > 8 and node.inputs[8]:
            scales = [surroundings.weights[node.inputs[i]].read() for i in (1, 4)]
            scale = new.constant("bias_scale", np.asarray(scales[0].reshape(()) * scales[1], np.float32))
            operands.append(new.decode("bias", [node.inputs[8], scale], 0, (8,)))
        return new.encoded(new.add("Conv", operands, **attributes), node.inputs[6], node.inputs[7])


class IntegerMatMul(Rule):
    """A product of matrices of codes.

    Args:
        a: position of the left matrix.
        b: position of the right matrix.
        codes: positions of scale and zero point of either matrix; without ``a`` where it is not quantised.
        rows: positions of operands with one value for all or one per row of ``a``.
        columns: positions of operands that broadcast against the result: one per column of ``b``, or an addend.
    """

    quantized = integer = True

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

    def gives_codes(self, node: Node) -> bool:
        """Return whether the operator has a scale of its results."""
        return node.op == "QLinearMatMul" or (node.op == "QGemm" and len(node.inputs) > 7 and bool(node.inputs[7]))

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of both matrices."""
        a, b = shapes[self.a], shapes[self.b]
        return gemm_pairs(node, a, b) if node.op == "QGemm" else matmul_pairs(a, b)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Return the size of the product times the size of ``k``."""
        a, b = shapes[self.a], shapes[self.b]
        if a is None or b is None or out is None:
            return 0
        return prod(out) * a[self.terms(node, len(a), len(b))[0].index("k")]

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return the axis that the weight contributes, on either side."""
        a, b = shapes[self.a], shapes[self.b]
        if a is None or b is None:
            return rank - 1
        left, right, out = self.terms(node, len(a), len(b))
        return output_channel_axis((left, right), out, 0 if weight == self.a else 1)

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """Dequantise; scale and zero point are scalars, or one per row of ``a``, or one per column of ``b``."""
        transposed = node.op == "QGemm" and bool(node.attrs.get("transA" if i == self.a else "transB"))
        return real_numbers(self.codes, i, codes, read, axis=-2 if (i == self.a) != transposed else -1)

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product of both dequantised matrices as a form; either may be the weight."""
        a, b = shapes[self.a], shapes[self.b]
        if a is None or b is None or data not in (self.a, self.b):
            return None
        form = product_form(self.terms(node, len(a), len(b)), (a, b), 0 if data == self.a else 1, plain=False)
        if form is not None:
            form.data, form.weight = data, self.b if data == self.a else self.a
        return form

    def terms(self, node: Node, a: int, b: int) -> tuple[str, str, str]:
        """Return subscripts of operands of rank ``a`` and ``b`` and of the result."""
        if node.op == "QGemm":
            return ("km" if node.attrs.get("transA") else "mk"), ("nk" if node.attrs.get("transB") else "kn"), "mn"
        return matmul_terms(a, b)

    def propagate(self, step: Step) -> None:
        """Contract over ``k``, then unite the operands of rows and columns."""
        left, right = step.shape(self.a), step.shape(self.b)
        x, y, out = self.terms(step.node, len(left), len(right))
        if self.zero is not None and step.has(self.zero) and int(np.prod(step.shape(self.zero))) > 1:
            step.fix(
                step.labels(self.a), x.index("k"), Reason.UNSUPPORTED_FORM, "every row has a zero point of its own"
            )
        result = contract(step, [(step.labels(self.a), left, x), (step.labels(self.b), right, y)], out)
        operands: list[tuple[Labels, Shape]] = [(result, step.out_shape())]
        for i in (i for i in (*self.rows, *self.columns) if step.has(i)):
            labels, shape = step.labels(i), step.shape(i)
            if i in self.rows and len(shape) == 1 and shape[0] > 1:
                labels, shape = insert_axis(labels, 1), (*shape, 1)
            operands.append((labels, shape))
        step.set(0, broadcast(step.atoms, operands, len(out), step.reason))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return ``k`` of ``a``, since zeros in one factor suffice, and all axes of an ``a`` quantised at run time."""
        if self.zero is None:
            return [(self.a, tuple(range(len(step.shape(self.a)))))]
        x, _, _ = self.terms(step.node, len(step.shape(self.a)), len(step.shape(self.b)))
        return [(self.a, (x.index("k"),))]

    def in_floats(self, node: Node, surroundings: Surroundings) -> InFloats | None:
        """Return a product of decoded matrices; one in integers with its scales behind it."""
        if node.inputs[self.b] not in surroundings.weights or node.inputs[self.a] in surroundings.weights:
            return None
        if node.op == "MatMulInteger":
            return _in_floats_scaled(self, node, surroundings, "MatMul", {}, -1)
        if self.codes[self.b].scale is None:
            return None
        to_codes, transposed = self.gives_codes(node), bool(node.attrs.get("transB"))
        scale, zero = self.codes[self.b]
        assert scale is not None and zero is not None
        if _sizes(surroundings, *_names(node, scale, zero)) is None:
            return None
        new = _Floats(node)
        if self.a in self.codes:
            pair = self.codes[self.a]
            assert pair.scale is not None and pair.zero is not None
            if node.inputs[pair.scale] in surroundings.weights and _sizes(surroundings, node.inputs[pair.scale]) != [1]:
                return None
            data = new.decode("data", _names(node, self.a, pair.scale, pair.zero), 0)
        else:
            data = node.inputs[self.a]
        rank = len(surroundings.weights[node.inputs[self.b]].shape)
        matrix = new.decode(
            "weight", _names(node, self.b, scale, zero), 0 if transposed else rank - 1, (self.b, scale, zero)
        )
        if node.op == "QGemm":
            return self._gemm(node, surroundings, new, data, matrix)
        if to_codes:
            return new.encoded(new.add("MatMul", [data, matrix]), node.inputs[6], node.inputs[7])
        bias = next(iter(_names(node, self.columns[-1])), "")
        if bias:
            new.add("Add", [new.add("MatMul", [data, matrix]), bias], node.outputs[0])
        else:
            new.add("MatMul", [data, matrix], node.outputs[0])
        return new.replacement()

    @staticmethod
    def _gemm(node: Node, around: Surroundings, new: _Floats, data: str, matrix: str) -> InFloats | None:
        alpha, bias = float(node.attrs.get("alpha", 1.0)), next(iter(_names(node, 6)), "")
        attributes = {name: int(node.attrs.get(name, 0)) for name in ("transA", "transB")}
        operands = [data, matrix]
        if bias:
            scales = [
                around.weights[node.inputs[i]].read() if node.inputs[i] in around.weights else None for i in (1, 4)
            ]
            if bias not in around.weights or len(around.weights[bias].shape) != 1 or scales[0] is None:
                return None
            value = np.asarray(scales[0].reshape(()) * scales[1] * alpha, np.float32)
            operands.append(new.decode("bias", [bias, new.constant("bias_scale", value)], 0, (6,)))
        to_codes = len(node.inputs) > 7 and bool(node.inputs[7])
        result = new.add("Gemm", operands, "" if to_codes else node.outputs[0], alpha=alpha, **attributes)
        return new.encoded(result, node.inputs[7], node.inputs[8]) if to_codes else new.replacement()

    def neutral(self, step: Step, i: int) -> str | None:
        """Return the zero point of ``a``."""
        return step.node.inputs[self.zero] if self.zero is not None and step.has(self.zero) else None

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Infer as numpy's matmul."""
        a, b = shapes[self.a], shapes[self.b]
        return None if a is None or b is None else [product(a, b, self.terms(node, len(a), len(b)))]


def _in_floats_scaled(
    rule: IntegerConv | IntegerMatMul, node: Node, around: Surroundings, op: str, attributes: Any, axis: int
) -> InFloats | None:
    """Return a product in integers, the cast behind it and the multiplication with both scales, as one of numbers."""
    behind = _scaled(node, around)
    if behind is None:
        return None
    (factor, cast, scaled), data_scale, weight_scale, at = behind
    zero = _names(node, rule.codes[1].zero or 0)
    if _sizes(around, weight_scale, *zero) is None or (
        op == "Conv" and around.weights[weight_scale].shape not in ((), (1,))
    ):
        return None
    new = _Floats(node, [factor, cast, scaled])
    data = new.decode("data", [node.inputs[0], data_scale, *_names(node, rule.codes[0].zero or 0)], 0)
    rank = len(around.weights[node.inputs[1]].shape)
    weight = new.decode("weight", [node.inputs[1], weight_scale, *zero], axis % rank, (1, None, rule.codes[1].zero))
    new.operands.append((factor.outputs[0], at, weight, 1))
    new.add(op, [data, weight], scaled.outputs[0], **attributes)
    return new.replacement()


class QuantizedElementwise(Elementwise):
    """An elementwise operator on codes, with scales and zero points of operands and results."""

    quantized = integer = True

    def gives_codes(self, node: Node) -> bool:
        """Return True."""
        return True


class QuantizedSum(QuantizedElementwise):
    """QLinearAdd: a, its scale and zero point, b, its scale and zero point, then those of the sum."""

    def addends(self, node: Node) -> Sequence[int]:
        """Return both operands."""
        return (0, 3)

    def addend_zero(self, node: Node, i: int) -> str:
        """Return the zero point of an operand."""
        return node.inputs[i + 2]

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return the other operand, in the codes of the sum."""
        at, names = next(i for i in (0, 3) if i not in positions), [*node.inputs, "", ""][:8]
        other, coding, result = names[at], names[at + 1 : at + 3], names[6:8]
        if coding == result:
            return WithoutAddends([], {node.outputs[0]: other})
        if opset < 10 or not result[1]:
            return None
        decoded = f"{node.outputs[0]}_decoded"
        return WithoutAddends(
            [
                NewNode("DequantizeLinear", [n for n in (other, *coding) if n], [decoded], f"{node.label}_decoded"),
                NewNode("QuantizeLinear", [decoded, *result], [node.outputs[0]], node.name),
            ],
            {},
        )


class QuantizedConcat(Rule):
    """Concatenation of parts with their scales and zero points: y_scale, y_zero, then (data, scale, zero)..."""

    quantized = integer = True

    def gives_codes(self, node: Node) -> bool:
        """Return True."""
        return True

    def propagate(self, step: Step) -> None:
        """Concatenate the labels."""
        operands = [(step.labels(i), step.shape(i)) for i in range(2, len(step.node.inputs), 3)]
        axis = int(step.attr("axis")) % len(step.out_shape())
        step.set(0, concatenate(step.atoms, operands, axis, step.reason, step.node.outputs[0]))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Add up the sizes along the axis."""
        parts = [shape for shape in shapes[2::3] if shape is not None]
        if len(parts) < len(shapes[2::3]):
            return None
        axis, result = int(node.attrs["axis"]) % len(parts[0]), list(parts[0])
        sizes = [p[axis] for p in parts]
        result[axis] = None if None in sizes else sum(n or 0 for n in sizes)
        return [tuple(result)]


class QuantizedPool(Rule):
    """Average pooling of codes, channels first or last."""

    quantized = integer = True

    def gives_codes(self, node: Node) -> bool:
        """Return True."""
        return True

    def propagate(self, step: Step) -> None:
        """Pass batch and channels."""
        labels = step.labels(0)
        channel = len(step.shape(0)) - 1 if step.attr("channels_last", 0) else 1
        labels = step.drop_all_but(labels, (0, channel), Reason.SPATIAL, f"{step.node.op} works along this axis")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Return size 1 for global pooling, else the number of windows."""
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
    """Softmax on codes; before opset 13, given by an attribute, all axes from ``axis`` on are one axis."""

    quantized = integer = True

    def gives_codes(self, node: Node) -> bool:
        """Return True."""
        return True

    def axes(self, step: Step) -> list[int]:
        """Return one axis, or all from it on."""
        if int(step.attr("opset", 13)) >= 13:
            return [step.axis(-1)]
        return list(range(step.axis(1), len(step.shape(0))))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shape of the data."""
        return [shapes[0]]


# Positions of both operands' scales and zero points, in the input orders of the operators.
_LINEAR = {0: Settings(1, 2), 3: Settings(4, 5)}
_INTEGER = {0: Settings(zero=2), 1: Settings(zero=3)}
_TO_FLOAT = {0: Settings(2, 4), 1: Settings(3, 5)}

register("", "QLinearConv", rule=IntegerConv(0, 3, 8, (4, 5), _LINEAR))
register("com.microsoft", "QLinearConv", rule=IntegerConv(0, 3, 8, (4, 5), _LINEAR))
register("", "ConvInteger", rule=IntegerConv(0, 1, None, (3,), _INTEGER))
register("", "QLinearMatMul", rule=IntegerMatMul(0, 3, _LINEAR, rows=(1, 2, 6, 7), columns=(4, 5)))
register("", "MatMulInteger", rule=IntegerMatMul(0, 1, _INTEGER, rows=(2,), columns=(3,)))
register("com.microsoft", "QGemm", rule=IntegerMatMul(0, 3, _LINEAR, columns=(4, 5, 6)))
register(
    "com.microsoft",
    "DynamicQuantizeMatMul",
    rule=with_facts(IntegerMatMul(0, 1, {1: Settings(2, 3)}, columns=(2, 3, 4)), jumps=True),
)
register("com.microsoft", "MatMulIntegerToFloat", rule=IntegerMatMul(0, 1, _TO_FLOAT, rows=(2, 4), columns=(3, 5, 6)))
register("com.microsoft", "QLinearAdd", rule=QuantizedSum([0, 3]))
register("com.microsoft", "QLinearMul", rule=QuantizedElementwise([0, 3]))
register("com.microsoft", "QLinearSigmoid", "QLinearLeakyRelu", rule=QuantizedElementwise([0]))
register("com.microsoft", "QLinearWhere", rule=QuantizedElementwise([0, 1, 4]))
register("com.microsoft", "QLinearConcat", rule=QuantizedConcat())
register("com.microsoft", "QLinearGlobalAveragePool", "QLinearAveragePool", rule=QuantizedPool())
register("com.microsoft", "QLinearSoftmax", rule=QuantizedSoftmax())


MS = "com.microsoft"
A, B, SCALES, ZEROS, ORDER, BIAS = range(6)
_SETTING = "a scale or zero point"
_STAYS = "codes are packed along this axis"


class PackedMatMul(Rule):
    """MatMulNBits: A [..., K] times codes B [N, blocks, bytes], scales [N, blocks] and zero points, both possibly flat.

    Zero points are packed like the codes, or numbers like the scales. ``g_idx`` [K] maps a position to its scale.
    """

    quantized = True
    weights = (B,)
    settings = (SCALES, ZEROS, ORDER)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the size of a row of the data and that of the packed matrix."""
        yield shapes[0][-1], node.attrs["K"]

    def propagate(self, step: Step) -> None:
        """Contract over K, block by block; unite N through all operands."""
        b, size = step.labels(B), step.shape(B)[0]
        step.fix_all_but(b, (0, 1), Reason.OPERAND, _STAYS)
        columns, blocks = step.axis_ids(b, 0), step.axis_ids(b, 1)
        for i in (i for i in (SCALES, ZEROS, BIAS) if step.has(i)):
            parameter_labels, shape = step.labels(i), step.shape(i)
            if parameter_labels or shape[0] > 1:
                row_ids = None if columns is None else np.repeat(columns, shape[0] // size)
                step.unite(row_ids, step.axis_ids(parameter_labels, 0), _SETTING)
            if self._per_block(step, i):
                step.unite(blocks, step.axis_ids(parameter_labels, 1), _SETTING)
            else:
                step.fix_all_but(parameter_labels, (0,), Reason.OPERAND, "one value per block of codes")
        step.labels(ORDER)
        why = self._blocks_refusal(step)
        if why and blocks is not None:
            step.fix(b, 1, Reason.FIXED_SIZE, why)
        k = step.shape(A)[-1]
        weight: Labels = () if columns is None else (along(columns, 0, 2),)
        if blocks is not None:
            weight = (*weight, along(blocks[np.arange(k) // int(step.attr("block_size"))], 1, 2))
        outer = "abcdefgh"[: len(step.shape(A)) - 1]
        operands = [(step.labels(A), step.shape(A), outer + "k"), (weight, (size, k), "nk")]
        step.set(0, contract(step, operands, outer + "n"))

    @staticmethod
    def _per_block(step: Step, i: int) -> bool:
        """Return whether an operand is [N, blocks], neither flat nor packed, and is sliced by its labels."""
        return len(step.shape(i)) == 2 and (i == SCALES or (i == ZEROS and _plain_zeros(step)))

    def _blocks_refusal(self, step: Step) -> str:
        """Return the reason why blocks cannot be pruned; "" where they can."""
        bits = int(step.attr("bits", 4))
        if bits not in PACKED_BITS:
            return f"codes of {bits} bits are packed along this axis"
        flat = [
            i for i in (SCALES, ZEROS) if step.has(i) and not (len(step.shape(i)) == 2 and self._per_block(step, i))
        ]
        if not all(step.alone(i) for i in flat):
            return "several operators read the scales or zero points of these codes"
        if not step.has(ORDER):
            return ""
        order, k = step.weight(ORDER), step.shape(A)[-1]
        if order is None or not np.array_equal(order, np.arange(k) // int(step.attr("block_size"))):
            return "scales are in another order than the codes of this axis"
        return ""

    def rewrite(self, cut: Cut) -> None:
        """Set ``N`` and ``K`` from the codes; slice and repack flat or packed operands where blocks were removed."""
        if cut.shape(B)[0] != cut.attr("N"):
            cut.set_attr("N", cut.shape(B)[0])
        keep, rows = cut.keep(cut.node.inputs[B], 1), cut.keep(cut.node.inputs[B], 0)
        if keep is None:
            return
        size, block, bits = cut.shape(A)[-1], int(cut.attr("block_size")), int(cut.attr("bits", 4))
        cut.set_attr("K", size)
        n, blocks = cut.shape(B)[:2]
        if rows is None:
            rows = np.ones(cut.before.shape(B)[0], bool)
        for i in (SCALES, ZEROS):
            if cut.before.has(i) and not self._per_block(cut.before, i):
                packed = bits if i == ZEROS and not _plain_zeros(cut.before) else 0
                width = -(-blocks * packed // 8) if packed else blocks
                shape = (n, width) if len(cut.before.shape(i)) == 2 else (n * width,)
                cut.derive(i, shape, partial(_surviving_settings, rows=rows, blocks=keep, bits=packed))
        if cut.before.has(ORDER):
            cut.derive(ORDER, (size,), lambda value: (np.arange(size) // block).astype(value.dtype))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the last axis of A."""
        return [(A, (len(step.shape(A)) - 1,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Return A's shape with N as the last axis."""
        a = shapes[A]
        return None if a is None else [(*a[:-1], int(node.attrs["N"]))]

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Return the size of the product times K."""
        return 0 if shapes[A] is None or out is None else prod(out) * shapes[A][-1]

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """Dequantise to [N, blocks, block_size]; positions beyond K are 0."""
        bits, size = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
        scale, has_input = read(SCALES), [len(node.inputs) > at and bool(node.inputs[at]) for at in (ZEROS, ORDER)]
        zero = read(ZEROS) if has_input[0] else None
        if i != B or scale is None or bits not in PACKED_BITS or (has_input[0] and zero is None):
            return None
        n, blocks = codes.shape[:2]
        values = unpack(codes, bits, size).astype(np.float32)
        if zero is None:
            offset = np.full((n, blocks), 1 << (bits - 1), np.float32)
        elif zero.dtype == np.uint8:
            offset = unpack(zero.reshape(n, -1), bits, blocks).astype(np.float32)
        else:
            offset = zero.reshape(n, blocks).astype(np.float32)
        scale = scale.reshape(n, blocks).astype(np.float32)
        if not has_input[1]:
            values = (values - offset[:, :, None]) * scale[:, :, None]
        elif (order := read(ORDER)) is None:
            return None
        else:
            by_position = np.resize(order, blocks * size).reshape(blocks, size)
            values = (values - offset[:, by_position]) * scale[:, by_position]
        values.reshape(n, -1)[:, int(node.attrs["K"]) :] = 0
        return np.asarray(values)

    def encode(self, node: Node, i: int, numbers: Array, read: Read) -> Mapping[int, Array] | None:
        """Quantise [N, blocks, block_size] with new scales; with the present ones where ``g_idx`` has its own order."""
        codes, scales, bits = read(B), read(SCALES), int(node.attrs.get("bits", 4))
        if i != B or codes is None or scales is None or bits not in PACKED_BITS:
            return None
        n, blocks, size = numbers.shape
        has_zeros, order = len(node.inputs) > ZEROS and bool(node.inputs[ZEROS]), self._order(node, read)
        zeros = read(ZEROS) if has_zeros else None
        packed = zeros is not None and zeros.dtype == np.uint8
        if zeros is None:
            zero = np.full((n, blocks), 1 << (bits - 1), np.float64)
        else:
            zero = (unpack(zeros.reshape(n, -1), bits, blocks) if packed else zeros.reshape(n, blocks)).astype(float)
        scale = scales.reshape(n, blocks).astype(np.float64)
        if order is not None:
            by_position = np.resize(order, blocks * size).reshape(blocks, size)
            scale, zero = scale[:, by_position], zero[:, by_position]
            values = np.clip(np.rint(numbers / np.where(scale == 0, 1.0, scale) + zero), 0, (1 << bits) - 1)
            return {B: pack(values.astype(np.uint8), bits).reshape(codes.shape)}
        values, scale, zero = requantise(
            numbers,
            bits,
            scale[:, :, None],
            zero[:, :, None],
            moves_zero=has_zeros,
            kind=scales.dtype,
            is_integer=packed,
        )
        result: dict[int, Array] = {B: pack(values, bits).reshape(codes.shape), SCALES: scale.reshape(scales.shape)}
        if zeros is not None:
            flat = zero.reshape(n, blocks)
            result[ZEROS] = (pack(flat.astype(np.uint8), bits) if packed else flat).reshape(zeros.shape)
        return result

    def code(self, node: Node, read: Read) -> Code | None:
        """Return the code of packed blocks."""
        bits, scales, zeros = int(node.attrs.get("bits", 4)), read(SCALES), read(ZEROS)
        if (
            scales is None
            or bits not in PACKED_BITS
            or (len(node.inputs) > ZEROS and node.inputs[ZEROS] and zeros is None)
        ):
            return None
        attributes = {name: value for name, value in node.attrs.items() if name not in ("K", "N")}
        form = "" if zeros is None else "codes" if zeros.dtype == np.uint8 else "numbers"
        block, flat = int(node.attrs["block_size"]), scales.ndim == 1
        operator = (node.op, node.domain, attributes)
        bias = BIAS if len(node.inputs) > BIAS and node.inputs[BIAS] else None
        kind, moves = np.dtype(np.uint8), zeros is not None
        return Code(operator, kind, bits, scales.dtype, True, block, form, moves, flat, "MatMul", B, bias=bias)

    @staticmethod
    def _order(node: Node, read: Read) -> Array | None:
        """Return the scale of every position, where it is not that of its block."""
        order = read(ORDER) if len(node.inputs) > ORDER and node.inputs[ORDER] else None
        in_blocks = order is None or np.array_equal(order, np.arange(len(order)) // int(node.attrs["block_size"]))
        return None if in_blocks else order

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product of A and the dequantised codes."""
        a, b = shapes[A], known(shapes[B])
        if data != A or a is None or b is None or a[-1] is None:
            return None
        bias = BIAS if len(node.inputs) > BIAS and node.inputs[BIAS] else None
        return Blocks("abcdefgh"[: len(a) - 1], a[-1], b[0], bias)


def _plain_zeros(step: Step) -> bool:
    """Return whether zero points are numbers like the scales, not packed like the codes."""
    weight = step.table.graph.weights.get(step.node.inputs[ZEROS])
    return weight is not None and weight.dtype != np.uint8


def _surviving_settings(value: Array, rows: NDArray[np.bool_], blocks: NDArray[np.bool_], bits: int) -> Array:
    """Slice settings to the surviving codes, as [N, blocks] or repacked to bytes (``bits`` each, 0: not packed)."""
    rows_of_values = value.reshape(rows.size, -1)
    if not bits:
        return np.asarray(rows_of_values[np.ix_(rows, blocks)])
    return pack(unpack(rows_of_values, bits, blocks.size)[np.ix_(rows, blocks)], bits)


class PackedGather(Rule):
    """GatherBlockQuantized: rows of a table of codes [rows, columns], looked up by index and dequantised.

    Inputs: codes, indices, scales [rows, blocks], zeros. Codes of type uint8 are packed, several per byte, and so
    are their zero points; of other types every element is a code. The unit of pruning is a whole block of columns.
    """

    quantized = True
    settings = (2, 3)

    def propagate(self, step: Step) -> None:
        """Map the columns to the last axis of the output; freeze the rows."""
        codes, scales = step.labels(0), step.labels(2)
        shape, width = step.shape(0), step.out_shape()[-1]
        axis, packed = int(step.attr("gather_axis", 0)), int(step.attr("quantize_axis", 1))
        if len(shape) != 2 or axis % 2 != 0 or packed % 2 != 1 or width % shape[1]:
            return
        if step.may_lose_rows(0):
            step.unite(step.axis_ids(codes, 0), step.axis_ids(scales, 0), "the scales of its rows")
        else:
            for labels in (codes, scales):
                step.fix(labels, 0, Reason.FIXED_SIZE, "rows of this table are looked up by index")
        ids, scale_ids = step.axis_ids(codes, 1), step.axis_ids(scales, 1)
        block = int(step.attr("block_size", 128))
        if scale_ids is None or (self._packed_zeros(step) and not step.alone(3)):
            step.fix(codes, 1, Reason.FIXED_SIZE, _STAYS)
        else:
            step.unite(ids, scale_ids[np.arange(shape[1]) * (width // shape[1]) // block], _SETTING)
        if step.has(3):
            zeros = step.labels(3)
            if step.may_lose_rows(0):
                step.unite(step.axis_ids(codes, 0), step.axis_ids(zeros, 0), "the zero points of its rows")
            if self._packed_zeros(step):
                rows = (0,) if step.may_lose_rows(0) else ()
                step.fix_all_but(zeros, rows, Reason.OPERAND, "zero points are packed along this axis")
            else:
                if not step.may_lose_rows(0):
                    step.fix(zeros, 0, Reason.FIXED_SIZE, "rows of this table are looked up by index")
                step.unite(step.axis_ids(zeros, 1), scale_ids, _SETTING)
        if ids is not None:
            rank = len(step.out_shape())
            step.set(0, (along(np.repeat(ids, width // shape[1]), rank - 1, rank),))

    @staticmethod
    def _packed_zeros(step: Step) -> bool:
        """Return whether a byte holds several zero points."""
        return step.has(3) and step.shape(3) != step.shape(2)

    def rewrite(self, cut: Cut) -> None:
        """Repack zero points that are stored in bytes."""
        keep, rows = (cut.keep(cut.node.inputs[2], axis) for axis in (1, 0))
        if keep is None or not self._packed_zeros(cut.before):
            return
        bits = int(cut.attr("bits", 4))
        rows = np.ones(cut.before.shape(3)[0], bool) if rows is None else rows
        shape = (int(rows.sum()), -(-int(keep.sum()) * bits // 8))
        cut.derive(3, shape, partial(_surviving_settings, rows=rows, blocks=keep, bits=bits))

    def lookups(self, node: Node) -> Sequence[tuple[int, int]]:
        """Return the index and the codes, where rows are picked."""
        return ((1, 0),) if node.attrs.get("gather_axis", 0) == 0 else ()

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """Dequantise to [rows, columns]; codes in bytes to [rows, bytes, codes per byte]."""
        scale, bits = read(2), int(node.attrs.get("bits", 4))
        if i != 0 or codes.ndim != 2 or scale is None or bits not in PACKED_BITS:
            return None
        packed = codes.dtype == np.uint8
        values, zero = unpack(codes, bits) if packed else codes, read(3)
        if packed:
            middle = np.full(scale.shape, 1 << (bits - 1), np.uint8)
            zero = middle if zero is None else unpack(zero, bits, scale.shape[1])
        real = numbers(values, scale, zero, 1, int(node.attrs.get("block_size", 128)))
        return real.reshape(*codes.shape, -1) if packed else real

    def code(self, node: Node, read: Read) -> Code | None:
        """Return the code of packed rows that are looked up."""
        codes, scales, bits = read(0), read(2), int(node.attrs.get("bits", 4))
        rows = node.attrs.get("gather_axis", 0) == 0 and node.attrs.get("quantize_axis", 1) in (1, -1)
        if codes is None or scales is None or codes.dtype != np.uint8 or bits not in PACKED_BITS or not rows:
            return None
        has_zeros = len(node.inputs) > 3 and bool(node.inputs[3])
        kind, block = np.dtype(np.uint8), int(node.attrs.get("block_size", 128))
        operator = (node.op, node.domain, dict(node.attrs))
        form = "codes" if has_zeros else ""
        return Code(operator, kind, bits, scales.dtype, True, block, form, has_zeros, numeric="Gather", looks_up=True)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """Return shape [*indices, columns]; the number of blocks determines the codes per byte."""
        codes, indices, scales = shapes[:3]
        size = None if codes is None else codes[-1]
        if codes is None or size is None or indices is None or scales is None:
            return None
        block, per_byte = int(node.attrs.get("block_size", 128)), 8 // int(node.attrs.get("bits", 4))
        fitting = [n for n in (size, size * per_byte) if -(-n // block) == scales[-1]]
        return [(*indices, fitting[0])] if len(fitting) == 1 and len(codes) == 2 else None


register(MS, "MatMulNBits", rule=PackedMatMul())
register(MS, "GatherBlockQuantized", rule=PackedGather())
register(
    MS,
    *("QLinearReduceMean", "QEmbedLayerNormalization", "QOrderedMatMul", "QOrderedGelu", "QOrderedAttention"),
    *("QOrderedLayerNormalization", "QOrderedLongformerAttention", "QuantizeWithOrder", "DequantizeWithOrder"),
    *("QuantizeBFP", "DequantizeBFP"),
    rule=with_facts(NoRule(), quantized=True),
)


class PackedRows(NoRule):
    """Products with packed weights; the size of a row is an attribute."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the last size of the data and that of a row."""
        yield shapes[0][-1], node.attrs["K"]


register(MS, "MatMulBnb4", "MatMulFpQ4", rule=PackedRows())
