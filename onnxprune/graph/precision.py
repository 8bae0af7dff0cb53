"""How coarse the arithmetic on the way to a tensor is, and which operators choose or draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from onnxprune.graph.view import Graph, Node
from onnxprune.operators.registry import Move, rule_of

_QUANTISED = ("Quantize", "QLinear", "QGemm", "QAttention", "QMoE", "MatMulInteger", "ConvInteger", "MatMulNBits")


def epsilons(graph: Graph, kinds: Mapping[str, int]) -> dict[str, float]:
    """The epsilon of the coarsest float type that values were computed in on the way to every tensor.

    What is only kept in half precision (an embedding, a weight that is cast) counts as exact, and so do weights. Types
    of 8 bits and fewer do not count: they round so much that a comparison would be none. What they round to is a choice
    (:func:`chooses`).

    Args:
        kinds: element types, by name.
    """
    found: dict[str, float] = {}
    data = set(graph.inputs)
    for node in graph.nodes:
        reads = [name for name in node.inputs if name in data]
        if not reads:
            continue
        before = max((found.get(name, 0.0) for name in reads), default=0.0)
        rounds = not (node.marker or _hands_on(node))
        for name in node.outputs:
            own = _epsilon(kinds.get(name, 0)) if rounds else 0.0
            found[name] = max(before, own)
            data.add(name)
    return found


def _hands_on(node: Node) -> bool:
    """Whether values go through a node as they are: the type they are kept in rounds nothing."""
    rule = rule_of(node)
    return rule.chooses or rule.moves not in (None, Move.CAST) or (node.op == "Neg" and not node.domain)


def _epsilon(kind: int) -> float:
    """Of an element type; 0 for what is no float of 16 bits or more."""
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    except (KeyError, ValueError):
        return 0.0
    return _EPSILONS.get(dtype.name, 0.0)


_EPSILONS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


def quantises(op: str) -> bool:
    """Whether an operator computes in integers of 8 bits or fewer, or changes to or from them."""
    return any(part in op for part in _QUANTISED)


# Small differences in front of these are large ones behind them; others are known by types, see :func:`chooses`.
_CHOICES = {
    "NonMaxSuppression", "TopK", "ArgMax", "ArgMin", "Round", "Floor", "Ceil", "Sign", "Hardmax", "Unique", "NonZero",
    "Mod", "ThresholdedRelu", "Shrink", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "MaxRoiPool",
}  # fmt: skip
_SIZES = {"Shape", "Size"}
# Integers of these are sums over integers, which are exact.
_SUMS = ("QLinear", "QGemm")


def chooses(op: str, reads: set[int], makes: set[int]) -> bool:
    """Whether an operator jumps: chooses by values, compares, or rounds to integers or to floats of 8 bits or fewer.

    Args:
        op: its type.
        reads: element types of its data.
        makes: of its outputs.
    """
    if op in _SIZES or op.startswith(_SUMS) or not any(_epsilon(kind) for kind in reads):
        return False
    return op in _CHOICES or any(kind and not _epsilon(kind) and kind != onnx.TensorProto.STRING for kind in makes)


_DRAWS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
_DROPS = {"Dropout", "BiasDropout", "BitmaskDropout", "BitmaskBiasDropout"}


def draws(node: onnx.NodeProto, value: Mapping[str, Any] = {}) -> bool:
    """Whether a node may draw random numbers: so does a Dropout that is left in training mode.

    Args:
        value: arrays of constants, by name; what is not known may be anything.
    """
    if node.op_type in _DRAWS:
        return True
    mode = node.input[2 if node.op_type == "Dropout" else -1] if len(node.input) > 2 else ""
    if node.op_type not in _DROPS or not mode:
        return False
    known = value.get(mode)
    return known is None or bool(np.any(known))
