"""Layers whose operator decodes codes itself are refitted and coded anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from numpy.typing import NDArray
from planted import draw, error, how, repaired

import onnxprune as op
from onnxprune.channels.plan import Plan, PlanGroup, PlanSlot
from onnxprune.operators.codes import pack

Array = NDArray[Any]
MS = "com.microsoft"
FORMS = {
    "4 bits": (4, "", {}),
    "4 bits, zero points": (4, "packed", {}),
    "4 bits, any zero point": (4, "numbers", {}),
    "8 bits": (8, "packed", {}),
    "2 bits": (2, "packed", {}),
    "flat": (4, "packed", {"flat": True}),
    "order": (4, "numbers", {"order": True}),
    "bias": (4, "", {"bias": True}),
}


def packed(net: Net, x: str, weight: Array, form: str, block: int = 16) -> str:
    """A MatMulNBits with codes of ``weight`` [K, N]."""
    bits, zeros, more = FORMS[form]
    k, n = weight.shape
    blocks, most = -(-k // block), (1 << bits) - 1
    rows = np.zeros((n, blocks * block), np.float32)
    rows[:, :k] = weight.T
    rows = rows.reshape(n, blocks, block)
    if zeros:
        low = rows.min(-1)
        scale = (rows.max(-1) - low) / most
        zero = np.rint(-low / scale)
    else:
        scale = np.abs(rows).max(-1) / (1 << (bits - 1))
        zero = np.full_like(scale, 1 << (bits - 1))
    codes = np.clip(np.rint(rows / scale[..., None] + zero[..., None]), 0, most).astype(np.uint8)
    flat = (lambda value: value.ravel()) if more.get("flat") else (lambda value: value)
    operands = [net.const(pack(codes, bits), np.uint8), net.const(flat(scale))]
    operands.append(
        net.const(flat(pack(zero.astype(np.uint8), bits)), np.uint8)
        if zeros == "packed"
        else net.const(zero)
        if zeros
        else ""
    )
    operands.append(net.const(np.arange(k) // block, np.int32) if more.get("order") else "")
    operands.append(net.weight(n) if more.get("bias") else "")
    return net.op("MatMulNBits", x, *operands, domain=MS, K=k, N=n, bits=bits, block_size=block)


@pytest.mark.parametrize("form", FORMS)
def test_packed_codes(form: str) -> None:
    """Blocks go whose inputs are nearly those of others: the layer that reads the rest makes up for them."""
    net = Net(21)
    rng = np.random.default_rng(5)
    x = net.input("x", ["N", 16])
    first = rng.normal(size=(16, 64)).astype(np.float32)
    first[:, 16:32] = 0.7 * first[:, :16]
    hidden = packed(net, x, first, form, block=16)
    y = packed(net, hidden, rng.normal(size=(64, 6)).astype(np.float32), form)
    model = net.model(y, check=False, shapes={y: ["N", 6]})
    codes = model.graph.node[1].input[1]
    removal = Plan(groups=[PlanGroup(0, 0, None, [PlanSlot(codes, 1, 4, [1])])])
    data = draw(model, 256)
    before, result = repaired(model, removal, data)
    feed = draw(model, 64, seed=1)
    share = 0.9 if form == "2 bits" else 0.6
    assert error(model, result.model, feed) < share * error(model, before, feed), how(result)
    kinds = [[(t.data_type, list(t.dims)) for t in m.graph.initializer] for m in (before, result.model)]
    assert kinds[0] == kinds[1]


def quantised(value: Array, axis: int | None, kind: Any = np.int8) -> tuple[Array, Array, Array]:
    """Codes, scale and zero point of a weight; one of each per position of an axis, or (None) for all."""
    others = None if axis is None else tuple(a for a in range(value.ndim) if a != axis)
    wide = np.abs(value).max(axis=others, keepdims=True) / 127
    middle = 128 if kind is np.uint8 else 0
    zero = np.full_like(wide, middle)
    return np.rint(value / wide) + middle, wide.reshape(() if axis is None else -1), zero.reshape(wide.size)


INTEGERS = (
    *("QLinearConv", "QLinearConv, a scale per channel", "ConvInteger", "QLinearMatMul", "QGemm", "QGemm to numbers"),
    *("MatMulInteger", "MatMulInteger, a scale per column", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
)


def integer_layer(net: Net, x: str, weight: Array, form: str, scales: tuple[float, float]) -> str:
    """A layer in integers, with numbers at both ends; ``scales`` of its data and results."""
    op_type, per_channel = form.split(",")[0].split(" ")[0], "," in form
    axis = None if not per_channel else 0 if "Conv" in op_type else 1
    codes, scale, zero = quantised(weight, axis)
    w, s, z = net.const(codes, np.int8), net.const(scale), net.const(zero if per_channel else zero[0], np.int8)
    bias = net.rng.normal(size=weight.shape[0] if "Conv" in op_type else weight.shape[1]).astype(np.float32)
    data_scale, result_scale, middle = net.const(scales[0]), net.const(scales[1]), net.const(128, np.uint8)
    if op_type == "DynamicQuantizeMatMul":
        return net.op(op_type, x, w, s, z, net.const(bias), domain=MS)
    if op_type in ("MatMulInteger", "ConvInteger", "MatMulIntegerToFloat"):
        q, found, low = (f"{x}_{part}" for part in ("q", "scale", "zero"))
        net.nodes.append(onnx.helper.make_node("DynamicQuantizeLinear", [x], [q, found, low]))
        if op_type == "MatMulIntegerToFloat":
            return net.op(op_type, q, w, found, s, low, z, net.const(bias), domain=MS)
        whole = net.op("Cast", net.op(op_type, q, w, low, z), to=1)
        y = net.op("Mul", whole, net.op("Mul", found, s))
        return net.op("Add", y, net.const(bias.reshape((1, -1, 1, 1) if "Conv" in op_type else -1)))
    q = net.op("QuantizeLinear", x, data_scale, middle)
    b = net.const(np.rint(bias / (scales[0] * scale)), np.int32)
    if op_type == "QLinearConv":
        y = net.op(op_type, q, data_scale, middle, w, s, z, result_scale, middle, b)
    elif op_type == "QGemm":
        ends = [] if "numbers" in form else [result_scale, middle]
        y = net.op(op_type, q, data_scale, middle, w, s, z, b, *ends, domain=MS)
        if not ends:
            return y
    else:
        y = net.op(op_type, q, data_scale, middle, w, s, z, result_scale, middle)
    return net.op("DequantizeLinear", y, result_scale, middle)


@pytest.mark.parametrize("form", INTEGERS)
def test_integer_layers(form: str) -> None:
    """A layer in integers makes up for a channel of its data that is nearly a mix of others."""
    net, rng, spatial = Net(17), np.random.default_rng(2), "Conv" in form
    space = (1, 1) if spatial else ()
    x = net.input("x", ["N", 6, *(3 for _ in space)])
    first = rng.normal(size=(6, 8)).astype(np.float32)
    first[:, 7] = 0.6 * first[:, 0] - 0.5 * first[:, 3]
    second = rng.normal(size=(8, 5)).astype(np.float32)
    kernel = net.const(first.T.reshape(8, 6, 1, 1) if spatial else first)
    hidden = net.op("Conv" if spatial else "MatMul", x, kernel)
    data = second.T.reshape(5, 8, 1, 1) if spatial else second
    y = net.op("Tanh", integer_layer(net, hidden, data, form, (0.1, 0.2)))
    model = net.model(y, check=False, shapes={y: ["N", 5, *(3 for _ in space)]})
    removal = Plan(groups=[PlanGroup(0, 0, None, [PlanSlot(kernel, 0 if spatial else 1, 8, [7])])])
    before, result = repaired(model, removal, draw(model, 256))
    feed = draw(model, 64, seed=1)
    assert error(model, result.model, feed) < 0.5 * error(model, before, feed), (how(result), result.report.repairs)
    for m in (before, result.model):
        assert [n.op_type for n in m.graph.node] == [n.op_type for n in model.graph.node]
        assert list(m.opset_import) == list(model.opset_import)
    kinds = [[(t.name, t.data_type, list(t.dims)) for t in m.graph.initializer] for m in (before, result.model)]
    assert kinds[0] == kinds[1]


def test_a_recovered_pair_with_a_coded_bias_belongs_together() -> None:
    """The 32 bits of a bias are codes, which a recovery changes: they are no sizes or indices."""
    net = Net(17)
    rng = np.random.default_rng(6)
    x = net.input("x", ["N", 4, 6, 6])

    def layer(x: str, ins: int, outs: int) -> str:
        weight = rng.normal(size=(outs, ins, 3, 3)).astype(np.float32)
        scale = np.float32(np.abs(weight).max() / 127)
        codes = net.const(np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), np.int8)
        weight = net.op("DequantizeLinear", codes, net.const(scale), net.const(np.int8(0), np.int8))
        codes = net.const(rng.integers(-4000, 4000, outs).astype(np.int32), np.int32)
        bias = net.op("DequantizeLinear", codes, net.const(np.float32(1e-3)))
        return net.op("Conv", x, weight, bias, pads=[1] * 4)

    model = net.model(layer(net.op("Relu", layer(x, 4, 16)), 16, 5))
    data = {"x": rng.normal(size=(80, 4, 6, 6)).astype(np.float32)}
    small = op.prune(model, ratio=0.5, data=data, finetune="none", latency=False)
    biases = [
        {t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer if t.data_type == onnx.TensorProto.INT32}
        for m in (op.prune(model, plan=small.plan, recover="none", latency=False).model, small.model)
    ]
    assert any((biases[0][name] != biases[1][name]).any() for name in biases[0])
    again = op.recover(model, small.model, plan=small.plan, data=data, finetune="none")
    assert again.report.recovery.samples
