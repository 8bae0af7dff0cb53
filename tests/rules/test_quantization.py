"""Laws of quantised graphs: codes, scales and zero points go together; a removed channel of codes is its zero point."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from build import Net, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sandwich import consume

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


# -- QuantizeLinear and DequantizeLinear -------------------------------------------------------------------------------


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


# -- operators on codes ------------------------------------------------------------------------------------------------


def qconv(net: Net, x: tuple[str, str, str], ins: int, outs: int, *, data: Any = np.uint8, weight: Any = np.int8,
          per_channel: bool = True, bias: bool = True, domain: str = "",
          **attrs: Any) -> tuple[str, str, str]:  # fmt: skip
    """QLinearConv with a 3x3 kernel; (codes, scale, zero point) in and out."""
    sizes = (outs,) if per_channel else ()
    shape = (outs, ins // attrs.get("group", 1), 3, 3)
    # onnxruntime takes scales per channel only with equal zero points.
    z = net.const(np.zeros(sizes) if weight == np.int8 else np.full(sizes, 128), weight)
    y_scale, y_zero = net.const(0.1, np.float32), zero(net, dtype=data)
    operands = [*x, codes(net, *shape, dtype=weight), scale(net, *sizes), z, y_scale, y_zero]
    if bias:
        operands.append(codes(net, outs, dtype=np.int16))
        net.initializers[-1].CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(net.initializers[-1]).astype(np.int32), operands[-1])
        )
    return net.op("QLinearConv", *operands, domain=domain, **attrs), y_scale, y_zero


@given(
    data=st.sampled_from([np.uint8, np.int8]),
    per_channel=st.booleans(),
    bias=st.booleans(),
    group=st.sampled_from([1, 2, 8]),
    opset=st.sampled_from([10, 13, 21]),
)
@settings(max_examples=7)
def test_convolutions_of_codes(data: Any, per_channel: bool, bias: bool, group: int, opset: int) -> None:
    net, kind = Net(opset), {"data": data, "per_channel": per_channel, "bias": bias}
    x = quantized(net, net.input("x", ["N", 3, 8, 8]), data)
    x = qconv(net, x, 3, 8, **kind)
    x = qconv(net, x, 8, 8, group=group, **kind)
    y = net.op("DequantizeLinear", *qconv(net, x, 8, 6, **kind))
    model = prune(net, consume(net, y))
    first, second, third = (shapes(model, "QLinearConv", i) for i in range(3))
    assert (first[3], third[3]) == ((4, 3, 3, 3), (3, 4, 3, 3))
    assert second[3][0] == 4
    assert (8 in first) == bias
    for found, outs in ((first, 4), (second, 4), (third, 3)):
        assert found[4] == found[5] == ((outs,) if per_channel else ())
        assert found.get(8, (outs,)) == (outs,)


POINTWISE: dict[str, tuple[int, dict[str, Any]]] = {
    "QLinearAdd": (2, {}),
    "QLinearMul": (2, {}),
    "QLinearSigmoid": (1, {}),
    "QLinearLeakyRelu": (1, {"alpha": 0.1}),
    "QLinearConcat": (2, {"axis": 1}),
    "QLinearAveragePool": (1, {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "QLinearGlobalAveragePool": (1, {}),
    "QLinearSoftmax": (1, {"axis": 3, "opset": 13}),
}


@pytest.mark.parametrize("kind", POINTWISE)
def test_between_convolutions_of_codes(kind: str) -> None:
    net = Net(17)
    count, attrs = POINTWISE[kind]
    x = quantized(net, net.input("x", ["N", 3, 12, 12]))
    parts = [qconv(net, x, 3, 6, pads=[1] * 4) for _ in range(count)]
    y_scale, y_zero = net.const(1 / 256 if kind == "QLinearSoftmax" else 0.2, np.float32), zero(net, dtype=np.uint8)
    if kind == "QLinearConcat":
        operands = [y_scale, y_zero, *(name for part in parts for name in part)]
    else:
        operands = [*(name for part in parts for name in part), y_scale, y_zero]
    mixed = net.op(kind, *operands, domain=MS, **attrs)
    channels = 12 if kind == "QLinearConcat" else 6
    last = qconv(net, (mixed, y_scale, y_zero), channels, 4, pads=[1] * 4)
    extent = {"QLinearGlobalAveragePool": 1, "QLinearAveragePool": 6}.get(kind, 12)
    y = net.op("Flatten", net.op("DequantizeLinear", *last), axis=1)
    model = prune(net, net.linear(y, 4 * extent**2, 4, gemm=True))
    assert shapes(model, "QLinearConv")[3] == (3, 3, 3, 3)
    assert shapes(model, "QLinearConv", count)[3] == (2, channels // 2, 3, 3)


def test_softmax_of_codes_over_channels_keeps_them() -> None:
    net = Net(17)
    x = qconv(net, quantized(net, net.input("x", ["N", 3, 8, 8])), 3, 6)
    s, z = net.const(1 / 256, np.float32), net.const(0, np.uint8)
    mixed = net.op("QLinearSoftmax", *x, s, z, domain=MS, axis=1, opset=13)
    y = net.op("Flatten", net.op("DequantizeLinear", *qconv(net, (mixed, s, z), 6, 4)), axis=1)
    model = prune(net, net.linear(y, 64, 4, gemm=True))
    assert shapes(model, "QLinearConv")[3] == (6, 3, 3, 3)
    assert shapes(model, "QLinearConv", 1)[3] == (2, 6, 3, 3)


def test_convolutions_with_channels_last() -> None:
    net = Net(17)
    x = quantized(net, net.input("x", ["N", 8, 8, 3]))
    for ins, outs in ((3, 6), (6, 4)):
        x = qconv(net, x, ins, outs, domain=MS, channels_last=1)
    y = net.op("Flatten", net.op("DequantizeLinear", *x), axis=1)
    model = prune(net, net.linear(y, 64, 4, gemm=True))
    assert [shapes(model, "QLinearConv", i)[3] for i in (0, 1)] == [(3, 3, 3, 3), (2, 3, 3, 3)]


@given(
    left=st.sampled_from([np.uint8, np.int8]),
    right=st.sampled_from([np.uint8, np.int8]),
    per_column=st.booleans(),
    opset=st.sampled_from([10, 17, 21]),
)
@settings(max_examples=8)
def test_products_of_codes(left: Any, right: Any, per_column: bool, opset: int) -> None:
    if left == np.int8 and right == np.uint8:
        return  # onnxruntime has no kernel
    net = Net(opset)
    x = quantized(net, net.input("x", ["N", 4, 3]), left)
    for ins, outs in ((3, 6), (6, 8)):
        sizes = (outs,) if per_column else ()
        own = [codes(net, ins, outs, dtype=right), scale(net, *sizes), zero(net, *sizes, dtype=right)]
        s, z = net.const(0.1, np.float32), zero(net, dtype=left)
        x = net.op("QLinearMatMul", *x, *own, s, z), s, z
    model = prune(net, net.linear(net.op("DequantizeLinear", *x), 8, 4), sizes=["N", 4, 4], reference=True)
    assert shapes(model, "QLinearMatMul")[3] == (3, 3)
    second = shapes(model, "QLinearMatMul", 1)
    assert second[3] == (3, 4)
    assert second[4] == second[5] == ((4,) if per_column else ())


def dynamic(net: Net, x: str) -> tuple[str, str, str]:
    """(codes, scale, zero point) in the range of the moment."""
    y, s, z = net.op("DynamicQuantizeLinear", x, n=3)
    return y, s, z


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_dynamic_quantisation(per_column: bool, zeros: bool) -> None:
    """MatMulInteger between DynamicQuantizeLinear and a Cast, as onnxruntime's quantize_dynamic writes it."""
    net = Net(17)
    x, sizes = net.input("x", ["N", 3]), (lambda n: (n,) if per_column else ())
    for ins, outs in ((3, 6), (6, 8), (8, 4)):
        y, s, z = dynamic(net, x)
        own = [codes(net, ins, outs), z, *([zero(net, *sizes(outs))] if zeros else [])]
        wide = net.op("Cast", net.op("MatMulInteger", y, *own), to=TensorProto.FLOAT)
        factor = net.op("Mul", s, scale(net, *sizes(outs)))
        x = net.op("Relu", net.op("Add", net.op("Mul", wide, factor), net.weight(outs)))
    model = prune(net, x, reference=True)
    assert [shapes(model, "MatMulInteger", i)[1] for i in range(3)] == [(3, 3), (3, 4), (4, 4)]


def test_codes_without_zero_points() -> None:
    net = Net(17)
    h = net.op("Relu", net.linear(net.input("x", ["N", 3]), 3, 6))
    wide = net.op("MatMulInteger", net.op("QuantizeLinear", h, net.const(0.05)), codes(net, 6, 8, dtype=np.int8))
    model = prune(net, net.linear(net.op("Cast", wide, to=TensorProto.FLOAT), 8, 4))
    assert shapes(model, "MatMulInteger")[1] == (3, 4)


def test_a_zero_point_per_row_keeps_what_is_summed() -> None:
    """A form that onnxruntime has no kernel for: columns may go, the summed axis stays."""
    net = Net(17)
    h = net.linear(net.input("x", [2, 3]), 3, 6)
    z = zero(net, 2, dtype=np.uint8)
    y = net.op("QuantizeLinear", h, net.const([0.05, 0.04]), z, axis=0)
    wide = net.op("MatMulInteger", y, codes(net, 6, 8, dtype=np.int8), z)
    model = net.model(net.linear(net.op("Cast", wide, to=TensorProto.FLOAT), 8, 4))
    result = op.Pipeline([op.passes.Prune("random", 0.5)]).run(model)
    assert shapes(result.model, "MatMulInteger")[1] == (6, 4)


@pytest.mark.parametrize("group", [1, 2])
def test_dynamic_convolution(group: int) -> None:
    net, x = Net(17), ""
    x = net.input("x", ["N", 3, 8, 8])
    for ins, outs in ((3, 8), (8, 6)):
        y, s, z = dynamic(net, x)
        shape = (outs, ins // (group if ins == 8 else 1), 3, 3)
        wide = net.op("ConvInteger", y, codes(net, *shape, dtype=np.uint8), z, net.const(128, np.uint8),
                      group=group if ins == 8 else 1)  # fmt: skip
        x = net.op("Mul", net.op("Cast", wide, to=TensorProto.FLOAT), net.op("Mul", s, net.const(0.01)))
    model = prune(net, consume(net, x))
    assert shapes(model, "ConvInteger")[1] == (4, 3, 3, 3)
    assert shapes(model, "ConvInteger", 1)[1] == ((3, 4, 3, 3) if group == 1 else (2, 2, 3, 3)) or group == 2


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("last", [False, True])
def test_qgemm(transposed: int, last: bool) -> None:
    """With an output scale it gives codes, without one numbers."""
    net = Net(17)
    x = quantized(net, net.input("x", ["N", 3]))
    for ins, outs in ((3, 6), (6, 8)):
        own = [
            codes(net, *((outs, ins) if transposed else (ins, outs))),
            scale(net, outs),
            net.const(np.zeros(outs), np.int8),
        ]
        bias = net.const(net.rng.integers(-500, 500, outs), np.int32)
        s, z = net.const(0.1, np.float32), zero(net, dtype=np.uint8)
        ends = [] if last and outs == 8 else [s, z]
        x = net.op("QGemm", *x, *own, bias, *ends, domain=MS, transB=transposed, alpha=1.0), s, z
    model = prune(net, net.linear(x[0] if last else net.op("DequantizeLinear", *x), 8, 4))
    found = shapes(model, "QGemm", 1)
    assert found[3] == ((4, 3) if transposed else (3, 4))
    assert found[4] == found[5] == found[6] == (4,)


@pytest.mark.parametrize("kind", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_products_to_numbers(kind: str) -> None:
    net, x = Net(17), ""
    x = net.input("x", ["N", 3])
    for ins, outs in ((3, 6), (6, 8), (8, 4)):
        w, s, z, b = codes(net, ins, outs), scale(net, outs), zero(net, outs), net.weight(outs)
        if kind == "DynamicQuantizeMatMul":
            x = net.op(kind, x, w, s, z, b, domain=MS)
        else:
            y, ys, yz = dynamic(net, x)
            x = net.op(kind, y, w, ys, s, yz, z, b, domain=MS)
        x = net.op("Relu", x)
    model = prune(net, x)
    assert [shapes(model, kind, i)[1] for i in range(3)] == [(3, 3), (3, 4), (4, 4)]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_products_of_packed_codes(flat: bool, zeros: bool) -> None:
    """MatMulNBits: the axis along which codes are packed stays, the other is cut with scales, zero points and bias."""
    net = Net(17)
    h = net.linear(net.input("x", ["N", 3]), 3, 32)
    b = net.const(net.rng.integers(0, 255, (8, 2, 8)), np.uint8)
    operands = [b, scale(net, *((16,) if flat else (8, 2)))]
    operands.append(net.const(net.rng.integers(0, 255, (8,) if flat else (8, 1)), np.uint8) if zeros else "")
    y = net.op("MatMulNBits", h, *operands, "", net.weight(8), domain=MS, K=32, N=8, bits=4, block_size=16)
    model = prune(net, net.linear(net.op("Relu", y), 8, 4))
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    assert (helper.get_node_attr_value(node, "N"), helper.get_node_attr_value(node, "K")) == (4, 32)
    found = shapes(model, "MatMulNBits")
    assert (found[1], found[2], found[5]) == ((4, 2, 8), (8,) if flat else (4, 2), (4,))
    assert not zeros or found[3] == ((4,) if flat else (4, 1))


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
