"""Layers that can be factorized: nodes that read one weight, the weight as a kernel, and the factors to replace it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx

from onnxprune.factorization.decompositions import Array, Factor, Geometry, Real, Shape, Stage
from onnxprune.graph.cost import is_layer
from onnxprune.graph.view import Graph, Node
from onnxprune.io.weights import Weight
from onnxprune.operators.contractions import Form, Pairwise, Transposed, Windows
from onnxprune.operators.registry import rule_of

ShapeOf = Callable[[str], Any]
Constant = Callable[[str, Array], str]
"""(stem, values) -> name of a new constant."""


@dataclass(frozen=True, slots=True)
class Use:
    """One node that reads the weight, and the sizes it runs at."""

    node: Node
    geometry: Geometry


class Operator(ABC):
    """The kernel of one operator's weight, and the nodes that can replace the operator."""

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
    def nodes(
        self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: NewNames
    ) -> list[onnx.NodeProto]:
        """Return nodes that replace ``node`` and read these weights, one per factor; the last has its outputs."""

    def bias(self, node: Node) -> int | None:
        """Return the input position of a per-channel bias, of this node and of the last one that replaces it."""
        return None


@dataclass(frozen=True, slots=True)
class Description:
    """The description of one node: the kernel's shape, its geometry, and its form."""

    shape: Shape
    geometry: Geometry
    form: Form | None


@dataclass(frozen=True, slots=True)
class NewNames:
    """Names of new elements: ``tensor`` and ``node`` return one for a role, ``constant`` adds a value."""

    tensor: Callable[[str], str]
    node: Callable[[str], str]
    constant: Constant
    description: Description
    opset: int


@dataclass(slots=True)
class Layer:
    """A weight that can be factorized.

    Attributes:
        name: name of the first node that reads it.
        weight: name of the weight.
        position: position of the weight among the nodes' inputs.
        operator, described: operator and description of the first node.
        uses: every node that reads it.
    """

    name: str
    weight: str
    position: int
    operator: Operator
    description: Description
    uses: list[Use] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """Return the sizes of the kernel."""
        return self.description.shape

    def macs(self, stages: Sequence[Any]) -> int:
        """Return multiply-accumulates of stages in the place of every node that reads the weight."""
        return sum(use.node.repeats * use.geometry.macs(stages) for use in self.uses)

    @property
    def names(self) -> Iterator[str]:
        """Yield the names that patterns are matched against."""
        yield from (use.node.label for use in self.uses)
        yield self.weight


_BIAS = 2


class Convolution(Operator):
    """Conv of any rank, stride, dilation, padding and number of groups, and its transpose."""

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe a convolution that is a plain product of windows."""
        if not isinstance(form, Windows):
            return (
                "its output size is an attribute"
                if node.op == "ConvTranspose"
                else "its data has an unsupported layout"
            )
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

    def nodes(
        self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: NewNames
    ) -> list[onnx.NodeProto]:
        """Return one convolution per factor; the last one has the bias."""
        result, source = [], node.inputs[0]
        for factor, weight in zip(factors, weights, strict=True):
            last = factor is factors[-1]
            inputs = [source, weight]
            if last and len(node.inputs) > _BIAS and node.inputs[_BIAS]:
                inputs.append(node.inputs[_BIAS])
            source = node.outputs[0] if last else made.tensor(factor.stage.role)
            kind = node.op if factor.stage.axes else "Conv"
            attributes = _attributes(node, factor.stage)
            result.append(
                onnx.helper.make_node(kind, inputs, [source], name=made.node(factor.stage.role), **attributes)
            )
        return result

    def bias(self, node: Node) -> int | None:
        """Return the position of the third input."""
        return _BIAS


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


def _copied(node: Node, **changes: Any) -> onnx.NodeProto:
    """Return the node with other attributes; attributes that are None are removed."""
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

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe a product whose weight is one matrix, or one per batch."""
        if not isinstance(form, Pairwise):
            return "its weight broadcasts against its data"
        if not form.plain:
            return "an activation is fused into it" if node.domain else "the operator multiplies its weight internally"
        if len(form.made) != 1 or len(form.summed) != 1:
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
            for replaced in (form.made, form.summed)
        ]
        return [
            form.restore(factor.array, np.broadcast_to(np.zeros(()), size))
            for factor, size in zip(factors, sizes, strict=True)
        ]

    def nodes(
        self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: NewNames
    ) -> list[onnx.NodeProto]:
        """Return two products: the first without bias and scale; the second does not transpose its data."""
        form, between = made.description.form, made.tensor("core")
        assert form is not None
        transposed = "transA" if form.data == 0 else "transB"
        dropped = {"alpha": None, "beta": None} if node.op == "Gemm" else {"alpha": None}
        first = [""] * 2
        first[form.data], first[form.weight] = node.inputs[form.data], weights[0]
        if node.op == "Gemm" and made.opset < 11:
            first.append(made.constant("none", np.zeros(1)))
        second = list(node.inputs)
        second[form.data], second[form.weight] = between, weights[1]
        has = transposed in node.attrs
        return [
            _wired(_copied(node, **dropped), first, between, made.node("core")),
            _wired(_copied(node, **({transposed: None} if has else {})), second, node.outputs[0], made.node("out")),
        ]

    def bias(self, node: Node) -> int | None:
        """Return the position of Gemm's third input."""
        return 2 if node.op == "Gemm" else None


class Equation(Product):
    """Einsum: the rank axis gets a letter of its own."""

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Description | str:
        """Describe any product of data and weight."""
        if not isinstance(form, Pairwise):
            return "its equation is not a product of data and one weight"
        return _described(form, shapes)

    def constants(self, factors: Sequence[Factor], described: Description, like: Sequence[int]) -> list[Array]:
        """Return [parts, summed, rank] and [parts, rank, made], letter by letter."""
        form, rank = described.form, factors[0].stage.outputs
        assert isinstance(form, Pairwise)
        parts, summed, made = ([form.size[c] for c in group] for group in (form.part_letters, form.summed, form.made))
        return [factors[0].array.reshape(*parts, *summed, rank), factors[1].array.reshape(*parts, rank, *made)]

    def nodes(
        self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: NewNames
    ) -> list[onnx.NodeProto]:
        """Return a product of data and core over the summed letters, then one of its result with the second factor."""
        form, between = made.description.form, made.tensor("core")
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
        """Return None: Einsum has no bias."""
        return None


class Recurrent(Operator):
    """LSTM, GRU, RNN: the weights of the input; all gates and directions share the first factor.

    The recurrent weights are not factorized: the operator multiplies by them at every step, inside.
    """

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

    def nodes(
        self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: NewNames
    ) -> list[onnx.NodeProto]:
        """Return a product in front of the same operator."""
        between = made.tensor("core")
        first = onnx.helper.make_node("MatMul", [node.inputs[0], weights[0]], [between], name=made.node("core"))
        second = _copied(node)
        second.input[0], second.input[1], second.name = between, weights[1], made.node("out")
        return [first, second]


class Embedding(Operator):
    """Gather of rows of a table: rows of a narrower one, widened by a product."""

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

    def nodes(
        self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: NewNames
    ) -> list[onnx.NodeProto]:
        """Return Gather, then MatMul."""
        between = made.tensor("core")
        return [
            _wired(_copied(node), [weights[0], node.inputs[1]], between, made.node("core")),
            onnx.helper.make_node("MatMul", [between, weights[1]], [node.outputs[0]], name=made.node("out")),
        ]


def _described(form: Pairwise, shapes: Sequence[Any]) -> Description | str:
    data = shapes[form.data]
    if data is None or None in data:
        return "its sizes are not known"
    summed, made = (prod(form.size[c] for c in group) for group in (form.summed, form.made))
    return Description(Shape(form.parts, summed, (), made), Geometry(form.count(data)), form)


OPERATORS: dict[tuple[str, str], Operator] = {
    ("", "Conv"): Convolution(),
    ("", "ConvTranspose"): Convolution(),
    ("", "MatMul"): Product(),
    ("", "Gemm"): Product(),
    ("com.microsoft", "FusedMatMul"): Product(),
    ("", "Einsum"): Equation(),
    ("", "LSTM"): Recurrent(),
    ("", "GRU"): Recurrent(),
    ("", "RNN"): Recurrent(),
    ("", "Gather"): Embedding(),
}


@dataclass(slots=True)
class LayerScan:
    """Layers that can be factorized, and why others cannot, {name of the node: reason}."""

    layers: list[Layer] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def find_layers(graph: Graph, shape: ShapeOf) -> LayerScan:
    """Find every weight that nodes of one kind read in one way.

    Args:
        graph: the graph, with weights computed from constants folded.
        shape: shape of every tensor at the probe sizes.
    """
    scan = LayerScan()
    by_weight: dict[str, Layer] = {}
    for node in graph.steps:
        if not _reads_weight(graph, node):
            continue
        operator = OPERATORS.get((node.domain, node.op))
        if operator is None:
            scan.reasons[node.label] = f"{node.op} stores its weights in an unsupported form"
            continue
        # A lookup table is not a layer, but a weight.
        for position in rule_of(node).weights[:2] or (0,):
            name = node.inputs[position] if position < len(node.inputs) else ""
            if name and _matrix(graph, name):
                _add_weight(graph, node, position, operator, shape, scan, by_weight)
    for name, layer in list(by_weight.items()):
        why = _shared(graph, layer)
        if why:
            scan.reasons.update({use.node.label: why for use in layer.uses})
            del by_weight[name]
    scan.layers = list(by_weight.values())
    return scan


def _reads_weight(graph: Graph, node: Node) -> bool:
    if node.op == "Gather" and not node.domain:
        weight = graph.weights.get(node.inputs[0])
        return weight is not None and weight.dtype.kind in "fV" and len(weight.shape) == 2
    return is_layer(node, graph)


def _matrix(graph: Graph, name: str) -> bool:
    """Return whether a tensor is a weight with two sides, stored or computed from stored ones."""
    if name in graph.weights:
        return len(graph.weights[name].shape) > 1
    producer = graph.producer.get(name)
    return producer is not None and all(not n or n in graph.weights for n in producer.inputs)


def _add_weight(
    graph: Graph,
    node: Node,
    position: int,
    operator: Operator,
    shape: ShapeOf,
    scan: LayerScan,
    by_weight: dict[str, Layer],
) -> None:
    """Add one weight of one node to the layers, or record why it cannot be factorized."""
    name = node.inputs[position]
    label = node.label if position < 2 else f"{node.label} (state)"
    weight = graph.weights.get(name)
    why = _weight_reason(weight)
    shapes = [shape(n) if n else None for n in (*node.inputs, *node.outputs)]
    described: Description | str = why
    if not why:
        # One operand is the weight, the other one is the data.
        rule = rule_of(node)
        data = rule.data if rule.data not in rule.weights else 1 - position
        form = rule.form(node, shapes[: len(node.inputs)], data)
        described = operator.describe(node, position, form, shapes)
    if isinstance(described, str):
        scan.reasons[label] = described
        return
    layer = by_weight.get(name)
    if layer is None:
        layer = by_weight[name] = Layer(node.label, name, position, operator, described)
    layer.uses.append(Use(node, described.geometry))


def _weight_reason(weight: Weight | None) -> str:
    if weight is None:
        return "its weight is computed from other tensors (quantised, transposed)"
    if weight.dtype.kind not in "fV" or weight.dtype.itemsize < 2:
        return f"its weight is stored as {weight.dtype}"
    return "" if min(weight.shape, default=0) > 0 else "its weight is empty"


def _shared(graph: Graph, layer: Layer) -> str:
    """Return why a weight cannot be replaced although each of its recorded nodes could be; empty where it can."""
    readers = [(n.index, i) for n, i in graph.consumers.get(layer.weight, ())]
    own = {use.node.index for use in layer.uses}
    if any(index not in own or i != layer.position for index, i in readers):
        return "its weight is shared with a node that reads it differently"
    if layer.weight in graph.captured or layer.weight in graph.outputs:
        return "its weight is also read by a body, or is an output"
    kinds = {(use.node.op, use.node.domain, _layout(use.node)) for use in layer.uses}
    if len(kinds) > 1:
        return "its weight is shared with a node that reads it differently"
    return ""


def _layout(node: Node) -> tuple[Any, ...]:
    """Return a key of how a weight is read: nodes with equal keys can read the same factors."""
    names = ("group", "transA", "transB", "equation", "hidden_size", "direction")
    return tuple(node.attrs.get(name) for name in names)
