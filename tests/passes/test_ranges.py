"""Data of another scale than the model was trained on are warned of, with both ranges."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.passes.ranges import range_doubts

RNG = np.random.default_rng(0)


def model() -> onnx.ModelProto:
    """A convolution with a BatchNormalization whose statistics are those of inputs from 0 to 1."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[8,3,1,1] w, float[8] g, float[8] b,
        float[8] m, float[8] v, float[4,8,1,1] u> {
        a = Conv(x, w) c = BatchNormalization(a, g, b, m, v) d = Relu(c) y = Conv(d, u) }"""
    proto = onnx.parser.parse_model(text)
    weights = RNG.standard_normal((8, 3, 1, 1)).astype(np.float32)
    x = RNG.uniform(0, 1, (64, 3, 8, 8))
    y = np.einsum("nchw,oc->nohw", x, weights[:, :, 0, 0])
    values = {"w": weights, "g": np.ones(8), "b": np.zeros(8), "m": y.mean((0, 2, 3)), "v": y.var((0, 2, 3))}
    del proto.graph.initializer[:]
    values["u"] = RNG.standard_normal((4, 8, 1, 1))
    tensors = [onnx.numpy_helper.from_array(np.asarray(a, np.float32), name) for name, a in values.items()]
    proto.graph.initializer.extend(tensors)
    return proto


@pytest.mark.parametrize(("scale", "doubted"), [(1.0, ""), (2.5, ""), (255.0, "small"), (1 / 255, "large")])
def test_ranges_are_compared_with_those_of_training(scale: float, doubted: str) -> None:
    feed = {"x": (scale * RNG.uniform(0, 1, (4, 3, 8, 8))).astype(np.float32)}
    found = range_doubts(Analysis(model()), feed)
    assert bool(found) == bool(doubted)
    assert all(f"times as {doubted}" in text and "'x'" in text for text in found)
    if scale == 255:
        assert " to 25" in found[0] and re.search(r"about 0.\d+ to (1|0.9)", found[0]), found


def test_runs_warn_of_it() -> None:
    data = {"x": (255 * RNG.uniform(0, 1, (16, 3, 8, 8))).astype(np.float32)}
    result = op.prune(model(), ratio=0.3, data=data, recover="none", latency=False)
    assert any("BatchNormalization" in text for text in result.report.warnings)
