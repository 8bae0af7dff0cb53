"""Evaluate one node on known small values: shape arithmetic, index tables, scalars.

Rules compute the frequent operators with numpy; onnx's reference evaluator computes the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnxprune.graph.shapes import output_shapes
from onnxprune.graph.view import CONTROL, Node
from onnxprune.operators.registry import rule_of

Values = list["np.ndarray | None"]

# Limits on the elements of a result: absolute, and as a multiple of the elements of its inputs.
_MAX_ELEMENTS, _TIMES = 1 << 22, 16
_OPERAND = 1 << 10  # elements of a tensor that may hold a shape


def _elements(node: Node, values: Values) -> int:
    """Estimate the elements of a node's outputs from its operands; 0 where they do not exceed those of its inputs."""
    moves = rule_of(node).moves
    if moves is not None and moves.keeps_all:
        return 0
    shapes = output_shapes(node, [None if v is None else v.shape for v in values], values.__getitem__)
    return _inferred_elements(node, values) if shapes is None else max(map(math.prod, shapes), default=0)


def _inferred_elements(node: Node, values: Values) -> int:
    """Estimate elements by onnx's inference; without it, by the largest number that the node reads as an integer."""
    types, data = {}, {}
    for name, value in zip(node.inputs, values, strict=True):
        if name and value is not None:
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            types[name] = onnx.helper.make_tensor_type_proto(kind, value.shape)
            if value.size <= _OPERAND:
                data[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
    if not onnx.defs.has(node.op, node.domain):
        return _largest(values)
    schema = onnx.defs.get_schema(node.op, node.version, node.domain)
    opset = onnx.helper.make_opsetid(node.domain, node.version)
    inferred = onnx.shape_inference.infer_node_outputs(schema, node.proto, types, data, opset_imports=[opset])
    dims = [kind.tensor_type.shape.dim for kind in inferred.values() if kind.tensor_type.HasField("shape")]
    if len(dims) == len([o for o in node.outputs if o]) and all(d.HasField("dim_value") for s in dims for d in s):
        return max((math.prod(int(d.dim_value) for d in s) for s in dims), default=0)
    return _largest(values)


def _largest(values: Values) -> int:
    """Return the largest integer among known values."""
    return max((int(v.max()) for v in values if v is not None and v.size and v.dtype.kind in "iu"), default=0)


def evaluate(node: Node, values: Values) -> list[np.ndarray] | None:
    """Evaluate ``node`` on known inputs, None for an absent optional one; return None where it cannot be evaluated."""
    rule = rule_of(node)
    # Nothing random is folded: its result is not a function of its inputs.
    if rule.random or rule.training is not None or node.op in CONTROL:
        return None
    try:
        if _elements(node, values) > max(_MAX_ELEMENTS, _TIMES * sum(v.size for v in values if v is not None)):
            return None
        with np.errstate(all="ignore"):
            result = rule.evaluate(node, values)
            if result is None:
                return _reference(node, values)
            return result if isinstance(result, list) else [np.asarray(result)]
    except Exception:  # any failure leaves the value unknown, which costs compression at most
        return None


def _reference(node: Node, values: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
    if node.domain != "":
        return None
    # A model around the node: for a lone node the evaluator takes the newest form, whatever opset it is given.
    feeds = {name: value for name, value in zip(node.inputs, values, strict=True) if name and value is not None}
    inputs, outputs = ([onnx.ValueInfoProto(name=n) for n in names] for names in (feeds, filter(None, node.outputs)))
    graph = onnx.helper.make_graph([node.proto], "node", inputs, outputs)
    opset = onnx.helper.make_opsetid("", node.version)
    results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(None, feeds)
    computed = iter(results)
    return [np.asarray(next(computed)) if name else np.zeros(0) for name in node.outputs]
