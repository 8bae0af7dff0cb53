"""Models to take apart, and what comes out of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

import onnxprune as op

Array = NDArray[Any]


def draw(model: onnx.ModelProto, samples: int, seed: int = 0) -> dict[str, Array]:
    """Samples for every input."""
    rng = np.random.default_rng([seed, 77])
    feed = {}
    for declared in model.graph.input:
        kind = declared.type.tensor_type
        shape = [d.dim_value or samples for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        value = rng.integers(0, 5, shape) if dtype.kind in "iu" else rng.standard_normal(shape)
        feed[declared.name] = np.asarray(value).astype(dtype)
    return feed


def outputs(model: onnx.ModelProto, feed: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, feed)]


def run(model: Any, method: str = "auto", *, data: Any = None, **options: Any) -> op.Result:
    """Factorized, nothing else asked."""
    return op.Pipeline([op.passes.Factorize(method, **options)]).run(model, data=data)


def factorized(model: Any, method: str, *, data: Any = None, **options: Any) -> onnx.ModelProto:
    """The model that comes out, with its products checked."""
    result = run(model, method, data=data, **options)
    assert result.report.product is not None and result.report.product.passed is not False
    onnx.checker.check_model(result.model, full_check=result.model.ir_version > 3)
    return result.model


def names_of(model: onnx.ModelProto) -> set[str]:
    return {t.name for t in model.graph.initializer}


def left(result: op.Result) -> dict[str, str]:
    """{layer: why it stays}."""
    return {f.name: f.reason for f in result.report.factorized if not f.method}
