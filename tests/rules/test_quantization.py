"""Laws of QuantizeLinear and DequantizeLinear: codes, scales and zero points are cut in step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from build import Net, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import (
    CHECKED,
    INT4,
    MS,
    assert_runs_alike,
    codes,
    dequantized,
    prune,
    scale,
    shapes,
    through_codes,
    weights,
    zero,
)
from sandwich import consume

import onnxprune as op


@given(
    opset=st.sampled_from([10, 13, 17, 21, newest()]),
    dtype=st.sampled_from([np.int8, np.uint8]),
    data=st.data(),
    seed=st.integers(0, 9),
)
@settings(max_examples=7)
def test_quantise_dequantise_network(opset: int, dtype: Any, data: st.DataObject, seed: int) -> None:
    net = Net(opset, seed=seed)
    axes = [None, 0] if opset >= 13 else [None]
    zeros = data.draw(st.booleans()) or dtype == np.uint8
    x = through_codes(net, net.input("x", ["N", 3, 6, 6]), dtype)
    for ins, outs in ((3, 4), (4, 6)):
        w = dequantized(net, outs, ins, 3, 3, dtype=dtype, axis=data.draw(st.sampled_from(axes)), zeros=zeros)
        bias = dequantized(net, outs, dtype=np.int32, axis=None if opset < 13 else 0, zeros=False)
        x = through_codes(net, net.op("Relu", net.op("Conv", x, w, bias)), dtype)
    y = net.op("MatMul", net.op("Flatten", x, axis=1), dequantized(net, 24, 4, dtype=dtype, zeros=zeros))
    model = prune(net, through_codes(net, y, dtype), reference=True, seed=seed)
    assert shapes(model, "DequantizeLinear", 1)[0] == (2, 3, 3, 3)
    assert sorted(w.shape[0] for w in weights(model).values() if w.ndim == 4) == [2, 3]
    assert [w.shape for w in weights(model).values() if w.ndim == 2] == [(12, 4)]
    assert {w.size for w in weights(model).values() if w.dtype == np.int32} == {2, 3}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [np.int8, INT4, np.int16])
def test_blocks_go_as_a_whole(axis: int, dtype: Any) -> None:
    """Six rows in blocks of two lose one block or more; the columns, or the other way round, are free."""
    net = Net(21)
    h = net.linear(net.input("x", ["N", 3]), 3, 6)
    blocks = (3, 8) if axis == 0 else (6, 4)
    operands = [codes(net, 6, 8, dtype=dtype), scale(net, *blocks), zero(net, *blocks, dtype=dtype)]
    w = net.op("DequantizeLinear", *operands, axis=axis, block_size=2)
    model = prune(net, net.linear(net.op("MatMul", h, w), 8, 4), ratio=0.34 if axis == 0 else 0.5)
    given_shapes = shapes(model, "DequantizeLinear")
    if axis == 0:
        assert given_shapes == {0: (4, 5), 1: (2, 5), 2: (2, 5)}
    else:
        assert given_shapes == {0: (3, 4), 1: (3, 2), 2: (3, 2)}


def test_a_last_block_may_be_short() -> None:
    net = Net(21)
    h = net.linear(net.input("x", ["N", 3]), 3, 7)
    w = net.op("DequantizeLinear", codes(net, 7, 4), scale(net, 3, 4), axis=0, block_size=3)
    for seed in range(4):
        found = shapes(prune(net, net.op("MatMul", h, w), seed=seed, ratio=0.34), "DequantizeLinear")
        assert found in ({0: (4, 4), 1: (2, 4)}, {0: (6, 4), 1: (2, 4)})


@pytest.mark.parametrize("axis", [1, -1])
def test_activation_with_a_scale_per_channel(axis: int) -> None:
    net = Net(21)
    shape = ["N", 3, 5, 5] if axis == 1 else ["N", 5, 3]
    x = (net.conv if axis == 1 else net.linear)(net.input("x", shape), 3, 6)
    s, z = scale(net, 6), zero(net, 6, dtype=np.uint8)
    y = net.op("QuantizeLinear", x, s, z, axis=axis)
    model = prune(net, consume(net, net.op("DequantizeLinear", y, s, z, axis=axis)), reference=True)
    assert shapes(model, "QuantizeLinear") == {1: (3,), 2: (3,)}


def test_a_scale_per_channel_of_an_input_stays() -> None:
    net = Net(13)
    s = scale(net, 6)
    y = net.op("QuantizeLinear", net.input("x", ["N", 6]), s, zero(net, 6, dtype=np.uint8), axis=1)
    h = net.linear(net.op("DequantizeLinear", y, s, zero(net, 6, dtype=np.uint8), axis=1), 6, 4)
    model = prune(net, net.linear(net.op("Relu", h), 4, 4))
    assert shapes(model, "QuantizeLinear") == {1: (6,), 2: (6,)}


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("group", [2, 4])
def test_grouped_convolution_of_codes(axis: int | None, group: int) -> None:
    """A scale per position within the groups ties the groups; else each loses channels of its own."""
    net = Net(21)
    x = net.conv(net.input("x", ["N", 3, 5, 5]), 3, 8)
    w = dequantized(net, 8, 8 // group, 3, 3, axis=axis)
    y = net.op("Conv", through_codes(net, x), w, group=group)
    model = prune(net, consume(net, y), reference=True)
    assert shapes(model, "DequantizeLinear")[0][0] == 4


def test_weight_is_transposed_after_its_scale_per_channel() -> None:
    net = Net(21)
    h = through_codes(net, net.linear(net.input("x", ["N", 3]), 3, 6))
    y = net.op("MatMul", h, net.transpose(dequantized(net, 8, 6, axis=0), 1, 0))
    model = prune(net, net.linear(y, 8, 4), reference=True)
    assert shapes(model, "DequantizeLinear", 1) == {0: (4, 3), 1: (4,), 2: (4,)}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_microsoft_forms(dtype: Any) -> None:
    net = Net(17)
    x = net.linear(net.input("x", ["N", 3]), 3, 6)
    s, z = net.const(0.05, np.float32), zero(net, dtype=dtype)
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", x, s, z, domain=MS), s, z, domain=MS)
    w = dequantized(net, 6, 8, dtype=dtype, axis=1, domain=MS)
    model = prune(net, net.linear(net.op("MatMul", y, w), 8, 4))
    assert shapes(model, "DequantizeLinear", 1) == {0: (3, 4), 1: (4,), 2: (4,)}


# -- what tools write --------------------------------------------------------------------------------------------------


class _Calibration:
    """Three random batches, as onnxruntime's quantiser asks for them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.left = [{"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(3)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None

    def __iter__(self) -> Any:
        return iter(self.left)

    def set_range(self, start_index: int, end_index: int) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("form", ["QDQ", "QOperator", "dynamic"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_onnxruntime_quantises(form: str, per_channel: bool, tmp_path: Any) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8))
    x = net.op("Add", x, net.conv(x, 8, 8, group=2))
    x = net.op("Concat", x, net.op("Sigmoid", net.conv(x, 8, 4, kernel=1)), axis=1)
    x = net.op("GlobalAveragePool", net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    model = net.model(net.linear(net.op("Relu", net.linear(net.op("Flatten", x, axis=1), 12, 8, gemm=True)), 8, 4))
    source, target = tmp_path / "float.onnx", tmp_path / "codes.onnx"
    onnx.save(model, source)
    if form == "dynamic":
        quantization.quantize_dynamic(source, target, per_channel=per_channel)
    else:
        kind = quantization.QuantFormat[form]
        quantization.quantize_static(source, target, _Calibration(), quant_format=kind, per_channel=per_channel)
    before = onnx.load(target)
    assert any(n.op_type in ("DequantizeLinear", "MatMulInteger", "ConvInteger") for n in before.graph.node)
    result = op.Pipeline([op.passes.Prune(ratio=0.5), CHECKED]).run(before)
    assert result.report.exactness.passed
    totals = result.report.totals
    assert totals.params_after < 0.6 * totals.params_before


TEXT = """
<ir_version: 10, opset_import: ["": 21]>
codes (float[N, 3] x) => (float[N, 2] y)
<int8[3, 4] w = {100, 1, 90, 2, -100, 1, 90, 2, 100, -1, 90, 2}, float[4] ws = {0.001, 1.0, 0.001, 1.0},
 int8[4] wz = {0, 0, 0, 0}, int8[4, 2] v = {1, 2, 3, 4, 5, 6, 7, 8},
 float vs = {0.1}, float hs = {0.05}, uint8 hz = {128}>
{
    a = DequantizeLinear <axis: int = 1> (w, ws, wz)
    h = MatMul (x, a)
    q = QuantizeLinear (h, hs, hz)
    d = DequantizeLinear (q, hs, hz)
    b = DequantizeLinear (v, vs)
    y = MatMul (d, b)
}
"""


def test_scores_are_of_numbers_not_of_codes() -> None:
    """The columns with the largest codes have the smallest scales: these go."""
    model = onnx.parser.parse_model(TEXT)
    onnx.checker.check_model(model, full_check=True)
    result = op.prune(model, ratio=0.5, latency=False, include=["w"])
    found = weights(result.model)
    assert found["w"].tolist() == [[1, 2], [1, 2], [-1, 2]]
    assert (found["ws"].tolist(), found["v"].tolist()) == ([1.0, 1.0], [[3, 4], [7, 8]])
    assert_runs_alike(result.model)


def test_scores_of_blocks() -> None:
    """Scales of blocks multiply the codes beneath them; scales and zero points themselves are not scored."""
    net = Net(21)
    h = net.linear(net.input("x", ["N", 3]), 3, 4)
    w = np.array([[9, 9, 1, 1], [9, 9, 1, 1], [9, 9, 1, 1], [9, 9, 1, 1]])
    s = np.array([[0.01, 0.01, 1.0, 1.0], [0.01, 0.01, 1.0, 1.0]])
    code = net.const(w, np.int8, "w")
    y = net.op("DequantizeLinear", code, net.const(s, np.float32), net.const(np.zeros((2, 4)), np.int8), axis=0,
               block_size=2)  # fmt: skip
    model = net.model(net.linear(net.op("Relu", net.op("MatMul", h, y)), 4, 4))
    result = op.prune(model, ratio=0.5, latency=False)
    assert weights(result.model)["w"].tolist() == [[1, 1], [1, 1]]
