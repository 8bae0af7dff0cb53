"""Models that onnxruntime saved in one processor's own layout: what lies outside is cut, the rest says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net

import onnxprune as op
from onnxprune.operators.microsoft import BLOCKED_DOMAIN as DOMAIN

MODELS = Path(__file__).parents[2] / "models"


def saved(source: Path | bytes, folder: Path) -> onnx.ModelProto:
    """With all optimisations; skips where this processor has no layout of its own."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / "all.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "all.onnx")
    if not any(n.domain == DOMAIN for n in model.graph.node):
        pytest.skip("onnxruntime has no blocked layout on this processor")
    return model


def test_layers_behind_blocked_ones_are_cut(tmp_path: Path) -> None:
    model = saved(MODELS / "attention.onnx", tmp_path)
    result = op.prune(model, ratio=0.5, criterion="random", latency=False)
    assert result.report.exactness.passed
    assert result.report.totals.params_after < 0.6 * result.report.totals.params_before


def test_a_blocked_network_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = saved(MODELS / "residual.onnx", tmp_path)
    with pytest.raises(op.BudgetError) as caught:
        op.prune(model, ratio=0.5)
    assert "in blocks for one kind of processor" in caught.value.hint


def test_sizes_are_those_that_onnxruntime_sees(tmp_path: Path) -> None:
    """Strides, pads, pooling, resizing and both ends of the layout; every tensor becomes an output to be compared."""
    net = Net(17)
    x = net.conv(net.input("x", [2, 3, 17, 19]), 3, 32, 3, strides=[2, 1])
    x = net.op("MaxPool", x, kernel_shape=[3, 2], strides=[1, 2], pads=[1, 0, 1, 0])
    x = net.op("AveragePool", net.conv(x, 32, 32, 5, group=32), kernel_shape=[2, 2])
    x = net.op("Resize", x, "", net.const([1.0, 1.0, 2.0, 3.0]), mode="nearest",
               coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    x = net.conv(x, 32, 48, 1)
    y = net.op("Flatten", net.op("GlobalAveragePool", x))
    z = net.op("Flatten", net.op("GlobalMaxPool", x))
    y = net.op("Concat", y, z, axis=1)
    model = saved(net.model(net.linear(y, 96, 5)).SerializeToString(), tmp_path)
    assert {n.op_type for n in model.graph.node if n.domain == DOMAIN} >= {
        "Conv",
        "MaxPool",
        "ReorderOutput",
        "Upsample",
    }
    del model.graph.value_info[:]
    facts = op.analyze(model).facts
    names = [o for n in model.graph.node for o in n.output if o]
    model.graph.output.extend(onnx.ValueInfoProto(name=o) for o in names if o != model.graph.output[0].name)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for info, value in zip(session.get_outputs(), session.run(None, {"x": np.zeros((2, 3, 17, 19), "f")}), strict=True):
        assert facts.shape(info.name) == value.shape, info.name
