"""Convert Constant nodes to weights, and weights to Constant nodes."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.io.elements import Array
from onnxprune.io.read import INLINE_LIMIT
from onnxprune.io.weights import ArrayWeight, SparseWeight, TensorWeight, Weight, to_proto

_MOST_UNFOLDED = 1 << 26


def weight_from_constant(node: NodeProto) -> Weight | None:
    """Return the value of a Constant node as a weight named after its output; None for other nodes.

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
    """Replace the value of a Constant node by that of a weight."""
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(weight.read())))


def has_bare_initializers(proto: ModelProto) -> bool:
    """Return whether initializers may exist without an input: before IR 4 every initializer is an input as well."""
    return bool(proto.ir_version >= 4)


def placeholder(weight: Weight) -> TensorProto:
    """Return the skeleton's entry for a weight: small data are included."""
    if weight.nbytes <= INLINE_LIMIT:
        return to_proto(weight)
    return TensorProto(name=weight.name, data_type=weight.onnx_type, dims=weight.shape)


def constant_node(weight: Weight) -> NodeProto:
    """Return a weight as a Constant node."""
    return helper.make_node("Constant", [], [weight.name], value=to_proto(weight))


def add_constant(
    model: ModelProto, weights: dict[str, Weight], name: str, value: Array, *, behind: bool = False
) -> None:
    """Write a constant into a skeleton: an initializer and its weight, or a Constant node where IR 4 is not available.

    Args:
        model: the skeleton; changed in place.
        weights: weights by name; changed in place.
        name: name of the tensor.
        value: its elements.
        behind: append a Constant node behind the existing nodes; False: insert it in front of them.
    """
    weight = ArrayWeight(name, value)
    if has_bare_initializers(model):
        model.graph.initializer.append(placeholder(weight))
        weights[name] = weight
    elif behind:
        model.graph.node.append(constant_node(weight))
    else:
        model.graph.node.insert(0, constant_node(weight))
