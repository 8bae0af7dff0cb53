"""Laws of operators on codes: a removed channel is one of zero points, and everything per channel goes with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from quantised import (
    MS,
    codes,
    prune,
    quantized,
    scale,
    shapes,
    zero,
)
from sandwich import consume

import onnxprune as op


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


@pytest.mark.newest_runtime
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
    assert shapes(model, "ConvInteger", 1)[1] == ((3, 4, 3, 3) if group == 1 else (4, 2, 3, 3))


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
    """MatMulNBits: outputs are cut with scales, zero points and bias, inputs by whole blocks."""
    net = Net(17)
    h = net.linear(net.input("x", ["N", 3]), 3, 32)
    b = net.const(net.rng.integers(0, 255, (8, 2, 8)), np.uint8)
    operands = [b, scale(net, *((16,) if flat else (8, 2)))]
    operands.append(net.const(net.rng.integers(0, 255, (8,) if flat else (8, 1)), np.uint8) if zeros else "")
    y = net.op("MatMulNBits", h, *operands, "", net.weight(8), domain=MS, K=32, N=8, bits=4, block_size=16)
    model = prune(net, net.linear(net.op("Relu", y), 8, 4))
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    assert (helper.get_node_attr_value(node, "N"), helper.get_node_attr_value(node, "K")) == (4, 16)
    found = shapes(model, "MatMulNBits")
    assert (found[1], found[2], found[5]) == ((4, 1, 8), (4,) if flat else (4, 1), (4,))
    assert not zeros or found[3] == ((4,) if flat else (4, 1))
