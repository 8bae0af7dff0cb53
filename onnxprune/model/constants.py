"""Constant nodes as weights, and weights as Constant nodes."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from onnxprune.model.weights import ArrayWeight, SparseWeight, TensorWeight, Weight

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
