"""Replace layers by their factors: nodes, weights and names."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx

from onnxprune.factorization.codes import Coded
from onnxprune.factorization.layers import NUMBERS, Layer
from onnxprune.graph.view import Graph, GraphEditor, connect, numbered_name
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.factoring import Description
from onnxprune.operators.kernels import Array, Factor, Real


@dataclass(frozen=True, slots=True)
class Factorized:
    """A layer and its replacement.

    Attributes:
        method: name of the method, for the names of nodes and weights.
        factors: the factors in the order in which they run.
        shift: correction of the layer's bias, [outputs]; None for none.
        codes: the codes of the factors, None for factors that are stored as numbers; empty where all are.
    """

    layer: Layer
    method: str
    factors: Sequence[Factor]
    shift: Real | None = None
    codes: Sequence[Coded | None] = ()


def replace_layers(
    graph: Graph, weights: MutableMapping[str, Weight], factorized: Sequence[Factorized]
) -> dict[str, Coded]:
    """Replace layers in ``graph.proto`` and ``weights``, in place; unused weights are removed.

    Returns:
        {new constant: its codes} of factors to store as codes.
    """
    writer = _Writer(graph, weights)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for item in factorized:
        replaced.update(writer.nodes(item))
    writer.editor.replace_nodes(replaced)
    writer.drop({item.layer.weight for item in factorized})
    return writer.coded


@dataclass(slots=True)
class _Nodes:
    """The nodes in the place of one layer, as :class:`onnxprune.operators.factoring.Replacement` asks for."""

    proto: onnx.NodeProto
    description: Description
    opset: int
    tensor_name: Callable[[str], str]
    node_name: Callable[[str], str]
    constant_name: Callable[[str, Array], str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def tensor(self, role: str) -> str:
        return self.tensor_name(role)

    def constant(self, role: str, values: Array) -> str:
        return self.constant_name(role, values)

    def add(self, role: str, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        node = onnx.helper.make_node(op, inputs, [output], name=self.node_name(role), **attributes)
        self.nodes.append(node)

    def copy(self, role: str, inputs: Sequence[str], outputs: Sequence[str], **changes: Any) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(self.proto)
        for name, value in changes.items():
            for attribute in [a for a in node.attribute if a.name == name]:
                node.attribute.remove(attribute)
            if value is not None:
                node.attribute.append(onnx.helper.make_attribute(name, value))
        del node.input[:], node.output[:]
        node.input.extend(inputs)
        node.output.extend(outputs)
        node.name = self.node_name(role)
        self.nodes.append(node)


class _Writer:
    """New names and constants of one rewriting."""

    def __init__(self, graph: Graph, weights: MutableMapping[str, Weight]) -> None:
        self.editor = GraphEditor(graph, weights)
        self._graph, self._weights = graph, weights
        inner = (t.name for t in graph.proto.graph.value_info)
        self._used_names = {*weights, *graph.producer, *graph.inputs, *graph.outputs, *inner}
        self._consumed = set(graph.consumers)
        self._labels = {node.name for node in graph.nodes}
        self.coded: dict[str, Coded] = {}

    def nodes(self, item: Factorized) -> dict[str, list[onnx.NodeProto]]:
        """Return nodes in the place of every node that reads the layer's weight, by the first output of that node."""
        layer = item.layer
        old = self._weights[layer.weight]
        arrays = layer.factoring.constants(item.factors, layer.description, old.shape)
        roles = [f.stage.role for f in item.factors]
        stem = layer.weight.removesuffix(NUMBERS)
        names = [
            self._constant(f"{stem}/{item.method}_", role, array, old.dtype)
            for role, array in zip(roles, arrays, strict=True)
        ]
        self.coded.update({n: c for n, c in zip(names, item.codes, strict=False) if c is not None})
        result = {}
        for use in layer.uses:
            label, out = use.node.label, next(o for o in use.node.outputs if o)
            replacement = _Nodes(
                use.node.proto,
                layer.description,
                self._graph.opsets.get("", 1),
                tensor_name=partial(self._unused, self._used_names, f"{out}/{item.method}_"),
                node_name=partial(self._unused, self._labels, f"{label}/{item.method}_"),
                constant_name=partial(self._constant, f"{layer.weight}/", dtype=old.dtype),
            )
            layer.factoring.replace(use.node, item.factors, names, replacement)
            if item.shift is not None:
                connect(replacement.nodes[-1], *self.shifted(replacement.nodes[-1].input, layer, item.shift, old.dtype))
            result[out] = replacement.nodes
        return result

    def shifted(self, inputs: Sequence[str], layer: Layer, shift: Real, dtype: Any) -> tuple[int, str]:
        """Return the position of the bias of a node that has one, and the name of the bias with the shift."""
        position = layer.factoring.bias(layer.uses[0].node)
        assert position is not None
        bias_name = inputs[position] if position < len(inputs) else ""
        value = shift
        if bias_name:
            value = self._weights[bias_name].read().astype(np.float64) + shift
        stem, role = (bias_name, "") if bias_name else (f"{layer.weight}/", "bias")
        return position, self._constant(stem, role, value, dtype)

    def _constant(self, stem: str, role: str, value: Array, dtype: Any) -> str:
        name = self._unused(self._used_names, stem, role)
        self.editor.add_constant(ArrayWeight(name, np.ascontiguousarray(value.astype(dtype))))
        return name

    @staticmethod
    def _unused(used_names: set[str], stem: str, role: str) -> str:
        return numbered_name(f"{stem}{role}", used_names)

    def drop(self, names: set[str]) -> None:
        """Remove unused constants: weights that were replaced, biases that were shifted."""
        self.editor.drop_unread({n for n in self._consumed if n in self._weights} | names)


def compose_layers(
    graph: Graph, weights: MutableMapping[str, Weight], factorized: Sequence[Factorized], kernels: Sequence[Real]
) -> None:
    """Replace weights by the products of their factors, in place and without new layers.

    Args:
        graph: the graph of the layers.
        weights: weights by name, changed in place.
        factorized: the layers and their factors.
        kernels: the products of the factors, [parts, inputs, *kernel, outputs] each.
    """
    writer = _Writer(graph, weights)
    for item, kernel in zip(factorized, kernels, strict=True):
        layer, old = item.layer, weights[item.layer.weight]
        weights[layer.weight] = composed_weight(layer, kernel, old)
        for use in layer.uses if item.shift is not None else ():
            assert item.shift is not None
            node = graph.producer[next(o for o in use.node.outputs if o)]
            writer.editor.connect(node, *writer.shifted(node.inputs, layer, item.shift, old.dtype))
    writer.drop(set())


def composed_weight(layer: Layer, kernel: Real, old: Weight) -> Weight:
    """Return a kernel [parts, inputs, *kernel, outputs] in the layout of the layer's own weight."""
    value = layer.factoring.weight(kernel, layer.description, old.read())
    return ArrayWeight(old.name, np.ascontiguousarray(value.astype(old.dtype)))
