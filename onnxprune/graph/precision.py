"""Precision of the arithmetic on the way to a tensor, and the operators that jump or draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from onnxprune.graph.view import Graph, Node
from onnxprune.operators.registry import Move, Rule, lookup, rule_of


def epsilons(graph: Graph, kinds: Mapping[str, int]) -> dict[str, float]:
    """Return the epsilon of the coarsest float type in the computation of every tensor.

    Tensors that are only stored in half precision (an embedding, a weight that is cast) count as exact, and so do
    weights. Types of 8 bits and fewer do not count: their rounding would make a comparison meaningless. Rounding to
    them is a choice (:func:`jumps`).

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
    return rule.unrounded or rule.chooses or rule.moves not in (None, Move.CAST)


def _epsilon(kind: int) -> float:
    """Return the epsilon of an element type; 0 for all but floats of 16 bits or more."""
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    except (KeyError, ValueError):
        return 0.0
    return _EPSILONS.get(dtype.name, 0.0)


_EPSILONS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


def jumps(rule: Rule, reads: set[int], makes: set[int]) -> bool:
    """Return whether an operator is discontinuous: it selects, compares, or rounds to integers or 8-bit floats.

    Args:
        rule: rule of the operator.
        reads: element types of its data.
        makes: element types of its outputs.
    """
    # Integer results of products and elementwise operators on codes are sums over integers, which are exact.
    sums = rule.quantized and not (rule.encodes or rule.jumps)
    if rule.reads_sizes or sums or not any(_epsilon(kind) for kind in reads):
        return False
    return rule.jumps or any(kind and not _epsilon(kind) and kind != onnx.TensorProto.STRING for kind in makes)


def draws(node: onnx.NodeProto, value: Mapping[str, Any] = {}) -> bool:
    """Return whether a node may draw random numbers; a Dropout in training mode does.

    Args:
        node: the node.
        value: arrays of constants, by name; a tensor without entry may have any value.
    """
    rule = lookup(node.domain, node.op_type)
    if rule.random:
        return True
    flag = "" if rule.training is None or rule.training >= len(node.input) else node.input[rule.training]
    if not flag:
        return False
    known = value.get(flag)
    return known is None or bool(np.any(known))
