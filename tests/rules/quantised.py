"""Quantised weights and activations for tests, and what is asked of every cut of a quantised graph."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from build import Net
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxprune as op

MS = "com.microsoft"
INT4 = np.dtype(ml_dtypes.int4)
CHECKED = op.passes.Validate(faithful=False, timed=False)


def codes(net: Net, *shape: int, dtype: Any = np.int8, name: str = "") -> str:
    """A weight of random codes over the whole range."""
    low, high = (-7, 7) if np.dtype(dtype) == INT4 else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    low, high = max(low, -30000), min(high, 30000)
    return net.const(net.rng.integers(low, high, shape, endpoint=True), dtype, name or net.name("codes"))


def scale(net: Net, *shape: int, size: float = 0.01) -> str:
    return net.const(size * net.rng.uniform(0.5, 1.5, shape), np.float32, net.name("scale"))


def zero(net: Net, *shape: int, dtype: Any = np.int8) -> str:
    """Zero points away from 0."""
    low, high = (-3, 3) if np.dtype(dtype).kind in "iV" else (110, 140)
    return net.const(net.rng.integers(low, high, shape, endpoint=True), dtype, net.name("zero"))


def dequantized(net: Net, *shape: int, dtype: Any = np.int8, axis: int | None = None, zeros: bool = True,
                domain: str = "") -> str:  # fmt: skip
    """A weight as codes with DequantizeLinear, one scale for all or per position of an axis."""
    sizes = () if axis is None else (shape[axis],)
    operands = [codes(net, *shape, dtype=dtype), scale(net, *sizes)]
    if zeros:
        operands.append(zero(net, *sizes, dtype=dtype))
    return net.op("DequantizeLinear", *operands, axis=axis, domain=domain)


def quantized(net: Net, x: str, dtype: Any = np.uint8, size: float = 0.05) -> tuple[str, str, str]:
    """(codes, scale, zero point) of an activation, one for all."""
    s, z = net.const(size, np.float32), zero(net, dtype=dtype)
    return net.op("QuantizeLinear", x, s, z), s, z


def through_codes(net: Net, x: str, dtype: Any = np.uint8) -> str:
    """QuantizeLinear, then DequantizeLinear."""
    return net.op("DequantizeLinear", *quantized(net, x, dtype))


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def shapes(model: onnx.ModelProto, kind: str, which: int = 0) -> dict[int, tuple[int, ...]]:
    """Shapes of the initializers that the ``which``-th node of a kind reads, by position."""
    node, known = [n for n in model.graph.node if n.op_type == kind][which], weights(model)
    return {i: known[name].shape for i, name in enumerate(node.input) if name in known}


def prune(
    net: Net, *outputs: str, reference: bool = False, sizes: Any = None, seed: int = 0, **options: Any
) -> onnx.ModelProto:
    """Cut half; onnxprune itself raises where the result is not exact against the masked original."""
    wanted = {o: sizes or ["N", 4] for o in outputs}
    model = net.model(*outputs, check=MS not in net.domains, shapes=wanted)
    stages = [op.passes.Prune(**{"criterion": "random", "ratio": 0.5, **options}), CHECKED]
    result = op.Pipeline(stages).run(model, seed=seed)
    assert result.report.exactness.passed
    assert sum(w.size for w in weights(result.model).values()) < sum(w.size for w in weights(model).values())
    if reference:
        assert_runs_alike(result.model)
    return result.model


def assert_runs_alike(model: onnx.ModelProto) -> None:
    """Onnxruntime without optimisations and onnx's reference evaluator agree, up to one step of the last scale."""
    if model.opset_import[0].version < 19:
        return  # the reference evaluator has no DequantizeLinear of older versions
    rng, feed = np.random.default_rng(3), {}
    for info in model.graph.input:
        dims = [d.dim_value or 3 for d in info.type.tensor_type.shape.dim]
        feed[info.name] = rng.standard_normal(dims).astype(np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for have, want in zip(session.run(None, feed), ReferenceEvaluator(model).run(None, feed), strict=True):
        np.testing.assert_allclose(have, want, atol=0.02 * np.abs(want).max() + 1e-6)
