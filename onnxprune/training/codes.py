"""Weights that are stored as codes, trained as numbers: quantised in every pass, with a gradient straight through.

Jacob et al., Quantization and Training of Neural Networks, 2018; Bengio et al., 2013, for the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune.graph.view import Graph, Node
from onnxprune.io.constants import add_constant
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.registry import rule_of
from onnxprune.runtime.sessions import Array

ModelParts = tuple[onnx.ModelProto, Mapping[str, Weight]]
_KINDS = (np.dtype(np.int8), np.dtype(np.uint8))


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight of codes.

    Attributes:
        codes: its name.
        numbers: name of the numbers that are trained in its place.
        scale, zero: scale and zero point, of a shape that broadcasts to the codes.
        kind: type of the codes.
        settings: names of the scale and the zero point, which stay as they are.
    """

    codes: str
    numbers: str
    scale: Array
    zero: Array
    kind: np.dtype[np.integer[Any]]
    settings: tuple[str, ...]

    def encode(self, numbers: Array) -> Array:
        """Return the codes of numbers, as QuantizeLinear gives them."""
        limits = np.iinfo(self.kind)
        rounded = np.rint(numbers.astype(np.float32) / self.scale) + self.zero
        return np.asarray(np.clip(rounded, limits.min, limits.max), self.kind)


def with_numbers(proto: onnx.ModelProto, weights: Mapping[str, Weight]) -> tuple[ModelParts, list[CodedWeight]]:
    """Return a model in which codes of 8 bits that one operator decodes are computed from numbers.

    Args:
        proto: the model.
        weights: its weights by name.
    """
    graph = Graph.of(proto, weights)
    coded_inputs: list[tuple[Node, CodedWeight]] = []
    for node in graph.nodes:
        coded = _coded(graph, node, weights) if rule_of(node).decodes else None
        if coded is not None:
            coded_inputs.append((node, coded))
    if not coded_inputs:
        return (proto, weights), []
    model, known = onnx.ModelProto(), dict(weights)
    model.CopyFrom(proto)
    replaced = {coded.codes for _, coded in coded_inputs}
    keep = [t for t in model.graph.initializer if t.name not in replaced]
    del model.graph.initializer[:]
    model.graph.initializer.extend(keep)
    inputs = [i for i in model.graph.input if i.name not in replaced]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    new = []
    for node, coded in coded_inputs:
        codes = known.pop(coded.codes).read()
        numbers = ((codes.astype(np.float32) - coded.zero) * coded.scale).astype(np.float32)
        add_constant(model, known, coded.numbers, numbers)
        operands = [coded.numbers, *node.inputs[1:3]]
        if len(operands) < 3 or not operands[2]:
            operands = [*operands[:2], f"{coded.numbers}.zero"]
            add_constant(model, known, operands[2], np.zeros(known[operands[1]].shape, coded.kind))
        attributes = {k: v for k, v in node.attrs.items() if k == "axis"}
        new.append(onnx.helper.make_node("QuantizeLinear", operands, [coded.codes], domain=node.domain, **attributes))
    nodes = list(model.graph.node)
    # Constant nodes come first, whatever reads them.
    constants = [n for n in nodes if not n.input]
    del model.graph.node[:]
    model.graph.node.extend([*constants, *new, *(n for n in nodes if n.input)])
    return (model, known), [coded for _, coded in coded_inputs]


def _coded(graph: Graph, node: Node, weights: Mapping[str, Weight]) -> CodedWeight | None:
    """Return the codes that a node decodes; None where they are not trained."""
    names = [*node.inputs, "", ""][:3]
    codes, scale, zero = names
    if codes not in weights or scale not in weights or (zero and zero not in weights):
        return None
    if weights[codes].dtype not in _KINDS or weights[scale].dtype != np.float32 or node.attrs.get("block_size"):
        return None
    if len(graph.consumers.get(codes, ())) != 1 or len(weights[codes].shape) < 2 or codes in graph.outputs:
        return None
    kind, rank = weights[codes].dtype, len(weights[codes].shape)

    def spread(values: Array) -> Array:
        axis = int(node.attrs.get("axis", 1)) % rank
        sizes: Sequence[int] = [-1 if a == axis else 1 for a in range(rank)]
        return values.reshape(sizes) if values.size > 1 else values.reshape(())

    zeros = weights[zero].read().astype(np.float32) if zero else np.zeros((), np.float32)
    return CodedWeight(codes, f"{codes}.numbers", spread(weights[scale].read()), spread(zeros), kind, (scale, zero))


def encoded(views: Mapping[str, Array], coded: Sequence[CodedWeight]) -> dict[str, Weight]:
    """Return the codes of trained numbers, by the names of the codes."""
    return {c.codes: ArrayWeight(c.codes, c.encode(views[c.numbers])) for c in coded if c.numbers in views}
