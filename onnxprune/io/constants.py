"""Constant nodes as weights, and weights as Constant nodes."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.io.elements import Array
from onnxprune.io.read import INLINE_LIMIT
from onnxprune.io.weights import ArrayWeight, SparseWeight, TensorWeight, Weight, to_proto

_MOST_UNFOLDED = 1 << 26


def weight_from_constant(node: NodeProto) -> Weight | None:
    """The value of a Constant node under the name of its output; None for other nodes.

    Raises:
        ModelError: when the value's data do not fit its type and dims.
    """
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
        return None
    name = node.output[0]
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                return TensorWeight(attribute.t, name)
            case "sparse_value":
                return SparseWeight(attribute.sparse_tensor, name, _MOST_UNFOLDED)
            case "value_float":
                return ArrayWeight(name, np.array(attribute.f, np.float32))
            case "value_floats":
                return ArrayWeight(name, np.array(attribute.floats, np.float32))
            case "value_int":
                return ArrayWeight(name, np.array(attribute.i, np.int64))
            case "value_ints":
                return ArrayWeight(name, np.array(attribute.ints, np.int64))
            case "value_string":
                return ArrayWeight(name, np.array(attribute.s.decode("utf-8", "replace"), object))
            case "value_strings":
                return ArrayWeight(name, np.array([s.decode("utf-8", "replace") for s in attribute.strings], object))
    return None


def set_constant(node: NodeProto, weight: Weight) -> None:
    """Let a Constant node hold the values of a weight in place of its own."""
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(weight.read())))


def has_bare_initializers(proto: ModelProto) -> bool:
    """Whether initializers may be constants of their own: before IR 4 every one is an input of the model, too."""
    return bool(proto.ir_version >= 4)


def placeholder(weight: Weight) -> TensorProto:
    """The skeleton's entry for a weight: with its data where they are few."""
    if weight.nbytes <= INLINE_LIMIT:
        return to_proto(weight)
    return TensorProto(name=weight.name, data_type=weight.onnx_type, dims=weight.shape)


def constant_node(weight: Weight) -> NodeProto:
    """A weight as a Constant node."""
    return helper.make_node("Constant", [], [weight.name], value=to_proto(weight))


def add_constant(
    model: ModelProto, weights: dict[str, Weight], name: str, value: Array, *, behind: bool = False
) -> None:
    """Write a constant into a skeleton: an initializer with its weight, or where there is none alone, a Constant node.

    Args:
        model, weights: both change.
        behind: put a node behind those that there are, else in front of them.
    """
    weight = ArrayWeight(name, value)
    if has_bare_initializers(model):
        model.graph.initializer.append(placeholder(weight))
        weights[name] = weight
    elif behind:
        model.graph.node.append(constant_node(weight))
    else:
        model.graph.node.insert(0, constant_node(weight))
