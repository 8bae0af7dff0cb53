"""Factorization of layers: the weight of an operator as a kernel, and the nodes that take its place.

A rule names one of these as ``factoring``. A vendor's operator that is a plain product of its data with one matrix can
use :class:`Product`; others derive from :class:`Factoring`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.operators.contractions import Form, Pairwise, Transposed, Windows
from onnxprune.operators.kernels import Array, Factor, Geometry, Real, Shape, Stage


class Factoring(ABC):
    """The weight of an operator as a kernel, and the nodes that take the operator's place when it is factorized.

    Attributes:
        looks_up: whether the operator looks up rows of its weight, input 0, so that it is no layer.
        layout: attributes that say how the weight is read: nodes that differ in one cannot share factors.
    """

    looks_up: bool = False
    layout: tuple[str, ...] = ()

    @abstractmethod
    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Return the kernel's shape and geometry, or the reason why the node cannot be factorized.

        Args:
            node: the node.
            position: position of the weight among the inputs.
            form: the node as a product, None where it is none.
            shapes: shapes of inputs and then outputs.
        """

    def kernel(self, weight: Array, described: Description) -> Real:
        """Return the weight as [parts, inputs, *kernel, outputs] in float64."""
        shape, form = described.shape, described.form
        matrix = np.asarray(weight, np.float64) if form is None else form.matrix(np.asarray(weight, np.float64))
        return np.ascontiguousarray(matrix).reshape(shape.parts, shape.inputs, *shape.kernel, shape.outputs)

    def weight(self, kernel: Real, described: Description, like: Array) -> Array:
        """Return the inverse of ``kernel``: a weight of the shape of ``like``."""
        shape, form = described.shape, described.form
        matrix = kernel.reshape(shape.parts, shape.columns, shape.outputs)
        return matrix.reshape(like.shape) if form is None else form.restore(matrix, like)

    @abstractmethod
    def constants(self, factors: Sequence[Factor], described: Description, like: Sequence[int]) -> list[Array]:
        """Return weights of the new nodes, one per factor; ``like``: shape of the old weight."""

    @abstractmethod
    def replace(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], replacement: Replacement) -> None:
        """Add the nodes that replace ``node`` and read these weights, one per factor; the last has its outputs."""

    def bias(self, node: Node) -> int | None:
        """Return the input position of a per-channel bias, of this node and of the last one that replaces it."""
        return None


@dataclass(frozen=True, slots=True)
class Description:
    """The description of one node: the kernel's shape, its geometry, and its form."""

    shape: Shape
    geometry: Geometry
    form: Form | None


class Replacement(Protocol):
    """The nodes in the place of a layer, and their names.

    Attributes:
        description: description of the layer.
        opset: version of onnx's own operators in the model.
    """

    description: Description
    opset: int

    def tensor(self, role: str) -> str:
        """Return a new name of a tensor for a role, such as ``core``."""

    def constant(self, role: str, values: Array) -> str:
        """Add a constant, and return its name."""

    def add(self, role: str, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        """Add a node of one of onnx's own operators."""

    def copy(self, role: str, inputs: Sequence[str], outputs: Sequence[str], **changes: Any) -> None:
        """Add the layer's node again with other inputs and outputs, and other attributes; None removes one."""


_BIAS = 2


class Convolution(Factoring):
    """Conv of any rank, stride, dilation, padding and number of groups.

    Attributes:
        unsupported: reason where the node is no product of windows.
    """

    layout = ("group",)
    unsupported = "its data has an unsupported layout"

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe a convolution that is a plain product of windows."""
        if not isinstance(form, Windows):
            return self.unsupported
        if position != form.weight or not form.plain:
            return "an activation is fused into it"
        weight, data, out = shapes[form.weight], shapes[form.data], shapes[len(node.inputs)]
        if data is None or out is None or None in (*data, *out):
            return "its sizes are not known"
        spreading = isinstance(form, Transposed)
        inputs = (weight[0] if spreading else weight[1] * form.parts) // form.parts
        outputs = (weight[1] * form.parts if spreading else weight[0]) // form.parts
        shape = Shape(form.parts, inputs, tuple(weight[2:]), outputs)
        return Description(shape, Geometry(data[0], tuple(data[2:]), tuple(out[2:]), spreading), form)

    def constants(self, factors: Sequence[Factor], described: Description, like: Sequence[int]) -> list[Array]:
        """Return [O, C / group, *kernel] each; flipped [C, O / group, *kernel] for a transposed one that slides."""
        spreading = described.geometry.spreading
        return [_transposed(f) if spreading and f.stage.axes else _plain(f) for f in factors]

    def replace(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], replacement: Replacement) -> None:
        """Add one convolution per factor; the last one has the bias."""
        source = node.inputs[0]
        for factor, weight in zip(factors, weights, strict=True):
            last = factor is factors[-1]
            inputs = [source, weight]
            if last and len(node.inputs) > _BIAS and node.inputs[_BIAS]:
                inputs.append(node.inputs[_BIAS])
            source = node.outputs[0] if last else replacement.tensor(factor.stage.role)
            op = node.op if factor.stage.axes else "Conv"
            replacement.add(factor.stage.role, op, inputs, source, **_attributes(node, factor.stage))

    def bias(self, node: Node) -> int | None:
        """Return the position of the third input."""
        return _BIAS


class TransposedConvolution(Convolution):
    """ConvTranspose; factors that do not slide are convolutions."""

    unsupported = "its output size is an attribute"


def _plain(factor: Factor) -> Array:
    stage = factor.stage
    moved = np.moveaxis(factor.array, -1, 1)
    return moved.reshape(stage.parts * stage.outputs, stage.inputs, *stage.kernel)


def _transposed(factor: Factor) -> Array:
    stage = factor.stage
    moved = np.flip(np.moveaxis(factor.array, -1, 2), axis=tuple(range(3, factor.array.ndim)))
    return moved.reshape(stage.parts * stage.inputs, stage.outputs, *stage.kernel)


def _attributes(node: Node, stage: Stage) -> dict[str, Any]:
    """Return the layer's attributes along the stage's axes, and defaults along the others."""
    rank = len(stage.kernel)
    result: dict[str, Any] = {"kernel_shape": list(stage.kernel), "group": stage.parts}
    if not stage.axes:
        return result
    for name, usual in (("strides", 1), ("dilations", 1), ("output_padding", 0)):
        values = node.attrs.get(name)
        if values:
            result[name] = [v if i in stage.axes else usual for i, v in enumerate(values)]
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        result["auto_pad"] = node.attrs["auto_pad"]
    elif node.attrs.get("pads"):
        result["pads"] = [p if i % rank in stage.axes else 0 for i, p in enumerate(node.attrs["pads"])]
    return result


class Product(Factoring):
    """MatMul and onnxruntime's FusedMatMul: the same operator twice."""

    layout = ("transA", "transB")
    dropped: tuple[str, ...] = ("alpha",)
    """Attributes that the first product does not have: they count once."""

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe a product whose weight is one matrix, or one per batch."""
        if not isinstance(form, Pairwise):
            return "its weight broadcasts against its data"
        if not form.plain:
            return "an activation is fused into it" if node.domain else "the operator multiplies its weight internally"
        if len(form.output_letters) != 1 or len(form.summed) != 1:
            return "its weight is not a matrix"
        if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
            return "its batch axes are transposed"
        return _described(form, shapes)

    def constants(self, factors: Sequence[Factor], described: Description, like: Sequence[int]) -> list[Array]:
        """Return the factors in the layout of the weight."""
        form = described.form
        assert isinstance(form, Pairwise)
        letters, rank = form.terms[1], factors[0].stage.outputs
        sizes = [
            tuple(rank if c == replaced else n for c, n in zip(letters, like, strict=True))
            for replaced in (form.output_letters, form.summed)
        ]
        return [
            form.restore(factor.array, np.broadcast_to(np.zeros(()), size))
            for factor, size in zip(factors, sizes, strict=True)
        ]

    def replace(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], replacement: Replacement) -> None:
        """Add two products: the first without bias and scale; the second does not transpose its data."""
        form, between = replacement.description.form, replacement.tensor("core")
        assert form is not None
        transposed = "transA" if form.data == 0 else "transB"
        first = [""] * 2
        first[form.data], first[form.weight] = node.inputs[form.data], weights[0]
        second = list(node.inputs)
        second[form.data], second[form.weight] = between, weights[1]
        has = transposed in node.attrs
        dropped: dict[str, Any] = dict.fromkeys(self.dropped)
        replacement.copy("core", [*first, *self.addends(replacement)], [between], **dropped)
        replacement.copy("out", second, node.outputs, **({transposed: None} if has else {}))

    def addends(self, replacement: Replacement) -> list[str]:
        """Return the addend of the first product: none, unless the operator needs one."""
        return []


class MatrixProduct(Product):
    """Gemm: the bias is that of the second product."""

    dropped = ("alpha", "beta")

    def addends(self, replacement: Replacement) -> list[str]:
        """Return a bias of 0 before opset 11, which requires one."""
        return [replacement.constant("none", np.zeros(1))] if replacement.opset < 11 else []

    def bias(self, node: Node) -> int | None:
        """Return the position of the third input."""
        return _BIAS


class Equation(Factoring):
    """Einsum: the rank axis gets a letter of its own."""

    layout = ("equation",)

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe any product of data and weight."""
        if not isinstance(form, Pairwise):
            return "its equation is not a product of data and one weight"
        return _described(form, shapes)

    def constants(self, factors: Sequence[Factor], described: Description, like: Sequence[int]) -> list[Array]:
        """Return [parts, summed, rank] and [parts, rank, made], letter by letter."""
        form, rank = described.form, factors[0].stage.outputs
        assert isinstance(form, Pairwise)
        parts, summed, columns = (
            [form.size[c] for c in group] for group in (form.part_letters, form.summed, form.output_letters)
        )
        return [factors[0].array.reshape(*parts, *summed, rank), factors[1].array.reshape(*parts, rank, *columns)]

    def replace(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], replacement: Replacement) -> None:
        """Add a product of data and core over the summed letters, then one of its result with the second factor."""
        form, between = replacement.description.form, replacement.tensor("core")
        assert isinstance(form, Pairwise)
        left, _, out = form.terms
        fresh = next(c for c in "zyxwvutsrqponmlkjihgfedcba" if c not in "".join(form.terms))
        middle = form.part_letters + form.free + fresh
        first = f"{left},{form.part_letters}{form.summed}{fresh}->{middle}"
        second = f"{middle},{form.part_letters}{fresh}{form.output_letters}->{out}"
        replacement.copy("core", [node.inputs[form.data], weights[0]], [between], equation=first)
        replacement.copy("out", [between, weights[1]], node.outputs, equation=second)


class Recurrence(Factoring):
    """LSTM, GRU, RNN: the weights of the input; all gates and directions share the first factor.

    The recurrent weights are not factorized: the operator multiplies by them at every step, inside.
    """

    layout = ("hidden_size", "direction")

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe W alone, with the sequence or the batch first."""
        if position == 2:
            return "the operator multiplies its state by this weight internally, at every step"
        return _described(form, shapes) if isinstance(form, Pairwise) else "its sizes are not known"

    def constants(self, factors: Sequence[Factor], described: Description, like: Sequence[int]) -> list[Array]:
        """Return [I, r], and W [directions, gates, r]."""
        form = described.form
        assert form is not None
        rank = factors[0].stage.outputs
        shorter = np.broadcast_to(np.zeros(()), (*like[:-1], rank))
        return [factors[0].array[0], form.restore(factors[1].array, shorter)]

    def replace(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], replacement: Replacement) -> None:
        """Add a product in front of the same operator."""
        between = replacement.tensor("core")
        replacement.add("core", "MatMul", [node.inputs[0], weights[0]], between)
        replacement.copy("out", [between, weights[1], *node.inputs[2:]], node.outputs)


class Embedding(Factoring):
    """Gather of rows of a table: rows of a narrower one, widened by a product."""

    looks_up = True

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe rows of a matrix."""
        table, out = shapes[0], shapes[len(node.inputs)]
        if position != 0 or len(table) != 2 or node.attrs.get("axis", 0) not in (0, -2):
            return "its weight is not a table of rows"
        if out is None or None in out:
            return "its sizes are not known"
        return Description(Shape(1, table[0], (), table[1]), Geometry(prod(out[:-1]), looked_up=True), None)

    def constants(self, factors: Sequence[Factor], described: Description, like: Sequence[int]) -> list[Array]:
        """Return [rows, r] and [r, width]."""
        return [factor.array[0] for factor in factors]

    def replace(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], replacement: Replacement) -> None:
        """Add Gather, then MatMul."""
        between = replacement.tensor("core")
        replacement.copy("core", [weights[0], node.inputs[1]], [between])
        replacement.add("out", "MatMul", [between, weights[1]], node.outputs[0])


def _described(form: Pairwise, shapes: Sequence[Any]) -> Description | str:
    data = shapes[form.data]
    if data is None or None in data:
        return "its sizes are not known"
    summed, columns = (prod(form.size[c] for c in group) for group in (form.summed, form.output_letters))
    return Description(Shape(form.parts, summed, (), columns), Geometry(form.count(data)), form)
