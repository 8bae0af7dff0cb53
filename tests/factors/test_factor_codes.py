"""Weights that are stored as codes are factorized, to the same code or to numbers, whichever takes fewer bytes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from numpy.typing import NDArray
from onnx import helper

import onnxprune as op
from onnxprune.operators.codes import pack

Array = NDArray[Any]
MS = "com.microsoft"
IN, OUT, RANK = 64, 48, 8
FORMS = (
    *("QDQ", "QDQ, one scale", "QDQ, uint8", "QDQ, transposed", "QDQ, int4 blocks", "QDQ Conv", "QDQ table"),
    *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("MatMulNBits", "MatMulNBits, 8 bits", "MatMulNBits, bias", "GatherBlockQuantized"),
)


def low_rank(rng: np.random.Generator, *shape: int) -> Array:
    """A matrix near one of rank 8."""
    rows, columns = shape
    value = rng.normal(size=(rows, RANK)) @ rng.normal(size=(RANK, columns)) / 3
    return (value + 0.01 * rng.normal(size=shape)).astype(np.float32)


def quantised(value: Array, axis: int | None, bits: int = 8) -> tuple[Array, Array]:
    """Codes and scales of a weight, for all or per position of an axis."""
    others = None if axis is None else tuple(a for a in range(value.ndim) if a != axis)
    wide = np.abs(value).max(axis=others, keepdims=True) / ((1 << (bits - 1)) - 1)
    return np.rint(value / wide), wide.reshape(() if axis is None else -1)


def layer(net: Net, x: str, form: str) -> str:
    """A layer of a form that reads a matrix of low rank as codes."""
    op_type, rng = form.split(",")[0].split(" ")[-1], net.rng
    weight = low_rank(rng, IN, OUT)
    if form.startswith("MatMulNBits"):
        bits, block = (8 if "8" in form else 4), 16
        rows = weight.T.reshape(OUT, -1, block)
        scale = np.abs(rows).max(-1) / (1 << (bits - 1))
        codes = np.clip(np.rint(rows / scale[..., None]) + (1 << (bits - 1)), 0, (1 << bits) - 1).astype(np.uint8)
        operands = [net.const(pack(codes, bits), np.uint8), net.const(scale)]
        operands += ["", "", net.weight(OUT)] if "bias" in form else []
        return net.op("MatMulNBits", x, *operands, domain=MS, K=IN, N=OUT, bits=bits, block_size=block)
    if form == "QDQ, int4 blocks":
        codes, scale = quantised(weight.reshape(IN // 16, 16, OUT).transpose(0, 2, 1).reshape(-1, 16), 0, 4)
        codes = codes.reshape(IN // 16, OUT, 16).transpose(0, 2, 1).reshape(IN, OUT)
        w = net.const(codes, np.dtype(ml_dtypes.int4))
        decoded = net.op("DequantizeLinear", w, net.const(scale.reshape(-1, OUT)), axis=0, block_size=16)
        return net.op("MatMul", x, decoded)
    spatial = op_type in ("Conv", "QLinearConv")
    kernel = weight.T.reshape(OUT, IN, 1, 1) if spatial else weight
    axis = None if "one" in form or "Integer" in form or "Quantize" in form else 0 if spatial else 1
    codes, scale = quantised(kernel, axis)
    middle = 128 if "uint8" in form else 0
    kind = np.uint8 if middle else np.int8
    if "transposed" in form:
        codes, axis = codes.T, 0
    w, s = net.const(codes + middle, kind), net.const(scale)
    z = net.const(np.full_like(scale, middle), kind)
    if op_type.startswith("QDQ") or form.startswith("QDQ"):
        decoded = net.op("DequantizeLinear", w, s, z, axis=axis)
        if spatial:
            return net.op("Conv", x, decoded)
        return net.op("MatMul", x, net.op("Transpose", decoded, perm=[1, 0]) if "transposed" in form else decoded)
    data_scale, result_scale, mid = net.const(0.04), net.const(0.4), net.const(128, np.uint8)
    if op_type == "DynamicQuantizeMatMul":
        return net.op(op_type, x, w, s, z, domain=MS)
    if op_type in ("MatMulInteger", "MatMulIntegerToFloat"):
        q, found, low = (f"{x}_{part}" for part in ("q", "scale", "zero"))
        net.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], [q, found, low]))
        if op_type == "MatMulIntegerToFloat":
            return net.op(op_type, q, w, found, s, low, z, domain=MS)
        return net.op("Mul", net.op("Cast", net.op(op_type, q, w, low, z), to=1), net.op("Mul", found, s))
    q = net.op("QuantizeLinear", x, data_scale, mid)
    if op_type == "QGemm":
        y = net.op(op_type, q, data_scale, mid, w, s, z, "", result_scale, mid, domain=MS)
    else:
        y = net.op(op_type, q, data_scale, mid, w, s, z, result_scale, mid)
    return net.op("DequantizeLinear", y, result_scale, mid)


def table(net: Net, form: str) -> tuple[str, str]:
    """Rows of a table of codes that are looked up."""
    ids, weight = net.input("ids", ["N", 4], np.int64), low_rank(net.rng, 96, OUT)
    if form == "QDQ table":
        codes, scale = quantised(weight, 1)
        return ids, net.op(
            "Gather", net.op("DequantizeLinear", net.const(codes, np.int8), net.const(scale), axis=1), ids
        )
    codes, scale = quantised(weight.reshape(-1, 16), 0, 4)
    packed = pack((codes + 8).astype(np.uint8).reshape(96, OUT), 4)
    operands = net.const(packed, np.uint8), ids, net.const(scale.reshape(96, -1))
    return ids, net.op("GatherBlockQuantized", *operands, domain=MS, block_size=16, quantize_axis=1, bits=4)


def network(form: str) -> onnx.ModelProto:
    """A layer of codes in front of a small one."""
    net = Net(21)
    if form in ("GatherBlockQuantized", "QDQ table"):
        _, y = table(net, form)
        y = net.op("Tanh", y)
        return net.model(y, check=False, shapes={y: ["N", 4, OUT]})
    space = (2, 2) if "Conv" in form else ()
    y = net.op("Tanh", layer(net, net.input("x", ["N", IN, *space]), form))
    return net.model(y, check=False, shapes={y: ["N", OUT, *space]})


def outputs(model: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_codes(form: str) -> None:
    model = network(form)
    draw = np.random.default_rng(3)
    shape = [64, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])]
    ids = model.graph.input[0].name == "ids"
    feed = {
        model.graph.input[0].name: draw.integers(0, 96, shape) if ids else draw.normal(size=shape).astype(np.float32)
    }
    options = {"method": "svd", "rank": RANK, "timed": False, "recover": "none", "latency": False}
    result = op.factorize(model, data=None if ids else feed, **options)
    (fact,) = [f for f in result.report.factorized if f.method]
    assert fact.ranks == [RANK] and fact.error < 0.03
    assert result.report.product.passed
    sizes = [
        sum(len(t.raw_data) or len(t.SerializeToString()) for t in m.graph.initializer) for m in (model, result.model)
    ]
    assert sizes[1] < (0.7 if form == "GatherBlockQuantized" else 0.6) * sizes[0], sizes
    one, other = (outputs(m, feed) for m in (model, result.model))
    assert np.square(one - other).mean() < 0.08 * one.var()


@pytest.mark.parametrize("form", ["QDQ, transposed", "QLinearMatMul", "MatMulNBits, bias"])
def test_other_layers_keep_their_codes(form: str) -> None:
    """One of two layers is factorized and recovered; the other stays as it is, and a plan does the same again."""
    net = Net(21)
    middle = layer(net, net.input("x", ["N", IN]), form)
    y = layer(net, net.op("Tanh", net.op("MatMul", middle, net.weight(OUT, IN))), form)
    model = net.model(y, check=False, shapes={y: ["N", OUT]})
    names = [node.name for node in model.graph.node]
    feed = {"x": np.random.default_rng(4).normal(size=(256, IN)).astype(np.float32)}
    target = next(n.name for n in model.graph.node if n.op_type == form.split(",")[0].replace("QDQ", "MatMul"))
    options: dict[str, Any] = {"data": feed, "latency": False, "recover": "none"}
    result = op.factorize(model, method="auto", ratio=0.2, include=[target], timed=False, **options)
    (fact,) = [f for f in result.report.factorized if f.method]
    assert fact.name == target and fact.params_after < 0.8 * fact.params_before
    after = result.model.graph
    others = [n for n in model.graph.node if names.index(n.name) > names.index(target) and n.op_type != "Cast"]
    others = [n for n in others if n.op_type not in ("Cast", "Mul", "QuantizeLinear")][-2:]
    read = {name for node in others for name in node.input}
    assert len(others) == 2 and all(n in after.node for n in others)
    assert all(t in after.initializer for t in model.graph.initializer if t.name in read)
    again = op.factorize(model, plan=result.plan, **options)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert op.factorize(model, plan=result.plan, **{**options, "recover": "full"}).report.product.passed


def test_numbers_where_codes_lose_too_much() -> None:
    """Codes of 4 bits in one scale lose more than numbers of as many bytes, so that the factors are numbers."""
    net = Net(21)
    rng = net.rng
    weight = rng.normal(size=(IN, OUT)).astype(np.float32)
    weight[:, 0] *= 400
    scale = np.abs(weight).max() / 7
    codes = net.const(np.rint(weight / scale), np.dtype(ml_dtypes.int4))
    y = net.op("MatMul", net.input("x", ["N", IN]), net.op("DequantizeLinear", codes, net.const(scale)))
    model = net.model(y, check=False, shapes={y: ["N", OUT]})
    result = op.factorize(model, method="svd", ratio=0.5, timed=False, recover="none", latency=False)
    (fact,) = [f for f in result.report.factorized if f.method]
    assert "DequantizeLinear" not in {n.op_type for n in result.model.graph.node} and fact.note
    again = op.factorize(model, plan=result.plan, recover="none", latency=False)
    assert again.model.SerializeToString() == result.model.SerializeToString()
