"""Precision of the arithmetic on the way to a tensor, and the operators that choose or draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from onnxprune.graph.view import Graph, Node
from onnxprune.operators.registry import Move, rule_of

_QUANTISED = ("Quantize", "QLinear", "QGemm", "QAttention", "QMoE", "MatMulInteger", "ConvInteger", "MatMulNBits")


def epsilons(graph: Graph, kinds: Mapping[str, int]) -> dict[str, float]:
    """Return the epsilon of the coarsest float type in the computation of every tensor.

    Tensors that are only stored in half precision (an embedding, a weight that is cast) count as exact, and so do
    weights. Types of 8 bits and fewer do not count: their rounding would make a comparison meaningless. Rounding to
    them is a choice (:func:`chooses`).

    Args:
        graph: the model's view.
        kinds: element types by tensor name.
    """
    result: dict[str, float] = {}
    data = set(graph.inputs)
    for node in graph.nodes:
        reads = [name for name in node.inputs if name in data]
        if not reads:
            continue
        before = max((result.get(name, 0.0) for name in reads), default=0.0)
        rounds = not (node.marker or _hands_on(node))
        for name in node.outputs:
            node_epsilon = _epsilon(kinds.get(name, 0)) if rounds else 0.0
            result[name] = max(before, node_epsilon)
            data.add(name)
    return result


def _hands_on(node: Node) -> bool:
    """Return whether values pass through a node unchanged: the type that stores them rounds nothing."""
    rule = rule_of(node)
    return rule.chooses or rule.moves not in (None, Move.CAST) or (node.op == "Neg" and not node.domain)


def _epsilon(kind: int) -> float:
    """Return the epsilon of an element type; 0 for all but floats of 16 bits or more."""
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    except (KeyError, ValueError):
        return 0.0
    return _EPSILONS.get(dtype.name, 0.0)


_EPSILONS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


def quantises(op: str) -> bool:
    """Return whether an operator computes in integers of 8 bits or fewer, or converts to or from them."""
    return any(part in op for part in _QUANTISED)


# Small differences in front of these are large ones behind them; :func:`chooses` finds others by their types.
_CHOICES = {
    "NonMaxSuppression", "TopK", "ArgMax", "ArgMin", "Round", "Floor", "Ceil", "Sign", "Hardmax", "Unique", "NonZero",
    "Mod", "ThresholdedRelu", "Shrink", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "MaxRoiPool",
}  # fmt: skip
_SIZES = {"Shape", "Size"}
# Integer results of these are sums over integers, which are exact.
_SUMS = ("QLinear", "QGemm")


def chooses(op: str, reads: set[int], makes: set[int]) -> bool:
    """Return whether an operator is discontinuous: it selects, compares, or rounds to integers or 8-bit floats.

    Args:
        op: operator type.
        reads: element types of its data.
        makes: element types of its outputs.
    """
    if op in _SIZES or op.startswith(_SUMS) or not any(_epsilon(kind) for kind in reads):
        return False
    return op in _CHOICES or any(kind and not _epsilon(kind) and kind != onnx.TensorProto.STRING for kind in makes)


_DRAWS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
_DROPS = {"Dropout", "BiasDropout", "BitmaskDropout", "BitmaskBiasDropout"}


def draws(node: onnx.NodeProto, value: Mapping[str, Any] = {}) -> bool:
    """Return whether a node may draw random numbers; a Dropout in training mode does.

    Args:
        node: the node.
        value: arrays of constants, by name; a tensor without entry may have any value.
    """
    if node.op_type in _DRAWS:
        return True
    mode = node.input[2 if node.op_type == "Dropout" else -1] if len(node.input) > 2 else ""
    if node.op_type not in _DROPS or not mode:
        return False
    known = value.get(mode)
    return known is None or bool(np.any(known))
