"""Models around one operator that onnx does not know, and what a cut left of them."""

from __future__ import annotations

from typing import Any

import onnx
from build import Net
from onnx import helper

import onnxprune as op

MS = "com.microsoft"


def finish(net: Net, *outputs: str, rank: int = 3) -> onnx.ModelProto:
    """The model, with as many unknown output sizes as ``rank`` says."""
    return net.model(*outputs, check=False, shapes={o: [f"d{i}" for i in range(rank)] for o in outputs})


def cut(model: onnx.ModelProto, ratio: float = 0.5, **options: Any) -> op.passes.Result:
    """A random cut; it raises where the result differs from the masked original."""
    result = op.prune(model, criterion="random", ratio=ratio, latency=False, **options)
    if options.get("validate", True):
        assert result.report.exactness.passed
    return result


def shapes(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Shapes of all weights with more than one axis, in order."""
    whole = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    return [tuple(t.dims) for t in model.graph.initializer if len(t.dims) > 1 and t.data_type not in whole]


def attributes(model: onnx.ModelProto, kind: str) -> dict[str, Any]:
    """Attributes of the first node of that kind."""
    node = next(n for n in model.graph.node if n.op_type == kind)
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
