"""MatMul, Gemm, Einsum: two products in the place of one; what a recurrent layer reads; tables of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx

from onnxprune.contractions import Form, Pairwise
from onnxprune.decompose import Factor, Shape
from onnxprune.decompose.cost import Geometry
from onnxprune.decompose.factor import Array
from onnxprune.factors.layer import Described, Made, Operator
from onnxprune.graph.view import Node


def _copied(node: Node, **changes: Any) -> onnx.NodeProto:
    """The node with other attributes; those that are None go."""
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    for name, value in changes.items():
        for attribute in [a for a in proto.attribute if a.name == name]:
            proto.attribute.remove(attribute)
        if value is not None:
            proto.attribute.append(onnx.helper.make_attribute(name, value))
    return proto


def _wired(proto: onnx.NodeProto, inputs: Sequence[str], output: str, name: str) -> onnx.NodeProto:
    del proto.input[:], proto.output[:]
    proto.input.extend(inputs)
    proto.output.append(output)
    proto.name = name
    return proto


class Product(Operator):
    """MatMul, Gemm and onnxruntime's FusedMatMul: the same operator twice."""

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Described | str:
        """A product whose weight is one matrix, or one per batch."""
        if not isinstance(form, Pairwise):
            return "its weight is broadcast against its data"
        if not form.plain:
            return "an activation is fused into it" if node.domain else "the operator multiplies by it inside"
        if len(form.made) != 1 or len(form.summed) != 1:
            return "its weight is no matrix"
        if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
            return "its batch axes are transposed"
        return _described(form, shapes)

    def constants(self, factors: Sequence[Factor], described: Described, like: Sequence[int]) -> list[Array]:
        """Laid out as the weight was."""
        form = described.form
        assert isinstance(form, Pairwise)
        letters, rank = form.terms[1], factors[0].stage.outputs
        sizes = [
            tuple(rank if c == gone else n for c, n in zip(letters, like, strict=True))
            for gone in (form.made, form.summed)
        ]
        return [
            form.restore(factor.array, np.broadcast_to(np.zeros(()), size))
            for factor, size in zip(factors, sizes, strict=True)
        ]

    def nodes(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: Made) -> list[onnx.NodeProto]:
        """First without bias and scale; the second reads what the first made, which is transposed no more."""
        form, between = made.described.form, made.tensor("core")
        assert form is not None
        transposed = "transA" if form.data == 0 else "transB"
        gone = {"alpha": None, "beta": None} if node.op == "Gemm" else {"alpha": None}
        first = [""] * 2
        first[form.data], first[form.weight] = node.inputs[form.data], weights[0]
        if node.op == "Gemm" and made.opset < 11:
            first.append(made.constant("none", np.zeros(1)))
        second = list(node.inputs)
        second[form.data], second[form.weight] = between, weights[1]
        has = transposed in node.attrs
        return [
            _wired(_copied(node, **gone), first, between, made.node("core")),
            _wired(_copied(node, **({transposed: None} if has else {})), second, node.outputs[0], made.node("out")),
        ]

    def bias(self, node: Node) -> int | None:
        """Gemm's third input."""
        return 2 if node.op == "Gemm" else None


class Equation(Product):
    """Einsum: the matrix between gets a letter of its own."""

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Described | str:
        """Any product of data and weight."""
        if not isinstance(form, Pairwise):
            return "its equation is no product of data and one weight"
        return _described(form, shapes)

    def constants(self, factors: Sequence[Factor], described: Described, like: Sequence[int]) -> list[Array]:
        """[parts, summed, rank] and [parts, rank, made], letter by letter."""
        form, rank = described.form, factors[0].stage.outputs
        assert isinstance(form, Pairwise)
        parts, summed, made = ([form.size[c] for c in group] for group in (form.part_letters, form.summed, form.made))
        return [factors[0].array.reshape(*parts, *summed, rank), factors[1].array.reshape(*parts, rank, *made)]

    def nodes(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: Made) -> list[onnx.NodeProto]:
        """Data and core to everything but what is summed, then on to the output."""
        form, between = made.described.form, made.tensor("core")
        assert isinstance(form, Pairwise)
        left, _, out = form.terms
        fresh = next(c for c in "zyxwvutsrqponmlkjihgfedcba" if c not in "".join(form.terms))
        middle = form.part_letters + form.free + fresh
        first = f"{left},{form.part_letters}{form.summed}{fresh}->{middle}"
        second = f"{middle},{form.part_letters}{fresh}{form.made}->{out}"
        return [
            _wired(_copied(node, equation=first), [node.inputs[form.data], weights[0]], between, made.node("core")),
            _wired(_copied(node, equation=second), [between, weights[1]], node.outputs[0], made.node("out")),
        ]

    def bias(self, node: Node) -> int | None:
        """There is none."""
        return None


class Recurrent(Operator):
    """LSTM, GRU, RNN: the weights of what is read; all gates and directions share the first factor.

    The weights of the state stay: the operator multiplies by them at every step, inside.
    """

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Described | str:
        """W alone, with the sequence or the batch first."""
        if position == 2:
            return "the operator multiplies its state by it inside, at every step"
        return _described(form, shapes) if isinstance(form, Pairwise) else "its sizes are not known"

    def constants(self, factors: Sequence[Factor], described: Described, like: Sequence[int]) -> list[Array]:
        """[I, r], and W [directions, gates, r]."""
        form = described.form
        assert form is not None
        rank = factors[0].stage.outputs
        shorter = np.broadcast_to(np.zeros(()), (*like[:-1], rank))
        return [factors[0].array[0], form.restore(factors[1].array, shorter)]

    def nodes(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: Made) -> list[onnx.NodeProto]:
        """A product in front of the same operator."""
        between = made.tensor("core")
        first = onnx.helper.make_node("MatMul", [node.inputs[0], weights[0]], [between], name=made.node("core"))
        second = _copied(node)
        second.input[0], second.input[1], second.name = between, weights[1], made.node("out")
        return [first, second]


class Embedding(Operator):
    """Gather of rows of a table: rows of a narrower one, widened by a product."""

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Described | str:
        """Rows of a matrix."""
        table, out = shapes[0], shapes[len(node.inputs)]
        if position != 0 or len(table) != 2 or node.attrs.get("axis", 0) not in (0, -2):
            return "it is no table of rows"
        if out is None or None in out:
            return "its sizes are not known"
        return Described(Shape(1, table[0], (), table[1]), Geometry(prod(out[:-1]), looked_up=True), None)

    def constants(self, factors: Sequence[Factor], described: Described, like: Sequence[int]) -> list[Array]:
        """[rows, r] and [r, width]."""
        return [factor.array[0] for factor in factors]

    def nodes(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: Made) -> list[onnx.NodeProto]:
        """Gather, then MatMul."""
        between = made.tensor("core")
        return [
            _wired(_copied(node), [weights[0], node.inputs[1]], between, made.node("core")),
            onnx.helper.make_node("MatMul", [between, weights[1]], [node.outputs[0]], name=made.node("out")),
        ]


def _described(form: Pairwise, shapes: Sequence[Any]) -> Described | str:
    data = shapes[form.data]
    if data is None or None in data:
        return "its sizes are not known"
    summed, made = (prod(form.size[c] for c in group) for group in (form.summed, form.made))
    return Described(Shape(form.parts, summed, (), made), Geometry(form.count(data)), form)
