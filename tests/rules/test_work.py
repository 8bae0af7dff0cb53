"""Every operator with weights is a layer: it counts work, names its channels, and can be scored by what codes mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from quantised import MS, scale, zero

import onnxprune as op
from onnxprune.graph.cost import macs
from onnxprune.importance.slots import numbers_at
from onnxprune.operators.registry import lookup

Make = Callable[[Net], tuple[str, Any]]


def codes(net: Net, *shape: int, dtype: Any = np.int8) -> str:
    return net.const(net.rng.integers(1, 9, shape), dtype)


def vectors(net: Net) -> str:
    return net.input("x", ["N", 6])


def maps(net: Net, *, last: bool = False) -> str:
    return net.input("x", ["N", 5, 5, 8] if last else ["N", 8, 5, 5])


def rows(net: Net) -> str:
    return net.input("x", ["N", 3, 6])


def dynamic(net: Net, x: str) -> list[str]:
    return list(net.op("DynamicQuantizeLinear", x, n=3))


def product(kind: str, *, left: bool = False, **attrs: Any) -> Make:
    def make(net: Net) -> tuple[str, Any]:
        operands = [vectors(net), net.weight(6, 10)]
        if left:
            operands = [net.weight(10, 6), net.op("Transpose", operands[0], perm=[1, 0])]
        domain = "" if kind in ("MatMul", "Gemm", "Einsum") else MS
        return net.op(kind, *operands, domain=domain, **attrs), ([10, "N"] if left else ["N", 10])

    return make


def quantised_product(net: Net) -> tuple[str, Any]:
    return net.op("DynamicQuantizeMatMul", vectors(net), codes(net, 6, 10), scale(net), domain=MS), ["N", 10]


def to_float(net: Net) -> tuple[str, Any]:
    x, x_scale, x_zero = dynamic(net, vectors(net))
    operands = [x, codes(net, 6, 10), x_scale, scale(net, 10), x_zero, zero(net, 10)]
    return net.op("MatMulIntegerToFloat", *operands, domain=MS), ["N", 10]


def integer(net: Net) -> tuple[str, Any]:
    x, _, x_zero = dynamic(net, vectors(net))
    y = net.op("MatMulInteger", x, codes(net, 6, 10), x_zero)
    return net.op("Cast", y, to=1), ["N", 10]


def linear_product(net: Net) -> tuple[str, Any]:
    x = [net.op("QuantizeLinear", vectors(net), s := scale(net), z := zero(net)), s, z]
    y = net.op("QLinearMatMul", *x, codes(net, 6, 10), scale(net), zero(net), s, z)
    return net.op("DequantizeLinear", y, s, z), ["N", 10]


def quantised_gemm(net: Net) -> tuple[str, Any]:
    x = [net.op("QuantizeLinear", vectors(net), s := scale(net), z := zero(net)), s, z]
    return net.op("QGemm", *x, codes(net, 10, 6), scale(net), zero(net), domain=MS, transB=1), ["N", 10]


def packed(net: Net) -> tuple[str, Any]:
    operands = [net.const(net.rng.integers(0, 255, (10, 1, 8)), np.uint8), scale(net, 10, 1)]
    return net.op("MatMulNBits", vectors(net), *operands, domain=MS, K=6, N=10, bits=4, block_size=16), ["N", 10]


def convolution(kind: str, *shape: int, last: bool = False) -> Make:
    def make(net: Net) -> tuple[str, Any]:
        made = ["N", 3, 3, 10] if last else ["N", 10, 3, 3]
        y = net.op(kind, maps(net, last=last), net.weight(*shape), domain="" if kind.startswith("Conv") else MS)
        return y, made

    return make


def linear_convolution(net: Net) -> tuple[str, Any]:
    x = [net.op("QuantizeLinear", maps(net), s := scale(net), z := zero(net)), s, z]
    y = net.op("QLinearConv", *x, codes(net, 10, 8, 3, 3), scale(net, 10), zero(net), s, z)
    return net.op("DequantizeLinear", y, s, z), ["N", 10, 3, 3]


def deformable(net: Net) -> tuple[str, Any]:
    x = maps(net)
    net.opset = 19
    offset = net.op("Conv", x, net.weight(18, 8, 3, 3))
    return net.op("DeformConv", x, net.weight(10, 8, 3, 3), offset, kernel_shape=[3, 3]), ["N", 10, 3, 3]


def recurrent(net: Net) -> tuple[str, Any]:
    return net.op("LSTM", rows(net), net.weight(1, 40, 6), net.weight(1, 40, 10), hidden_size=10), ["N", 1, 3, 10]


def quantised_recurrent(net: Net) -> tuple[str, Any]:
    weights = [codes(net, 1, 6, 40), codes(net, 1, 10, 40)]
    settings = [scale(net, 1), zero(net, 1), scale(net, 1, 40), zero(net, 1, 40)]
    y = net.op("DynamicQuantizeLSTM", rows(net), *weights, *[""] * 5, *settings, domain=MS, hidden_size=10)
    return y, ["N", 1, 3, 10]


def attention(net: Net) -> tuple[str, Any]:
    return net.op("Attention", rows(net), net.weight(6, 30), net.weight(30), domain=MS, num_heads=2), ["N", 3, 10]


def causal(net: Net) -> tuple[str, Any]:
    y = net.op("CausalConvWithState", net.input("x", ["N", 10, 7]), net.weight(10, 1, 3), domain=MS, n=1)
    return y, ["N", 10, 7]


def experts(net: Net) -> tuple[str, Any]:
    x = vectors(net)
    operands = [x, net.op("MatMul", x, net.weight(6, 2)), net.weight(2, 4, 6), "", net.weight(2, 6, 4)]
    return net.op("MoE", *operands, domain=MS, k=2), ["N", 6]


CASES: dict[str, tuple[Make, int, int]] = {
    "MatMul": (product("MatMul"), 60, 10),
    "MatMul, weight on the left": (product("MatMul", left=True), 60, 10),
    "Gemm": (product("Gemm"), 60, 10),
    "Gemm, weight on the left": (product("Gemm", left=True), 60, 10),
    "Einsum": (product("Einsum", equation="bi,io->bo"), 60, 10),
    "FusedMatMul": (product("FusedMatMul"), 60, 10),
    "TransposeMatMul": (product("TransposeMatMul"), 60, 10),
    "FusedGemm": (product("FusedGemm", activation="Relu"), 60, 10),
    "GemmFastGelu": (product("GemmFastGelu"), 60, 10),
    "DynamicQuantizeMatMul": (quantised_product, 60, 10),
    "MatMulIntegerToFloat": (to_float, 60, 10),
    "MatMulInteger": (integer, 60, 10),
    "QLinearMatMul": (linear_product, 60, 10),
    "QGemm": (quantised_gemm, 60, 10),
    "MatMulNBits": (packed, 60, 10),
    "Conv": (convolution("Conv", 10, 8, 3, 3), 6480, 10),
    "FusedConv": (convolution("FusedConv", 10, 8, 3, 3), 6480, 10),
    "NhwcFusedConv": (convolution("NhwcFusedConv", 10, 8, 3, 3, last=True), 6480, 10),
    "NhwcConv": (convolution("NhwcConv", 10, 3, 3, 8, last=True), 6480, 10),
    "QLinearConv": (linear_convolution, 6480, 10),
    "DeformConv": (deformable, 6480, 10),
    "LSTM": (recurrent, 3 * 40 * 16, 10),
    "DynamicQuantizeLSTM": (quantised_recurrent, 3 * 40 * 16, 10),
    "Attention": (attention, 3 * 180, 10),
    "CausalConvWithState": (causal, 210, 10),
    "MoE": (experts, 96, 6),
}
"""Per operator: a model, its multiply-accumulates per sample, its channels."""


@pytest.mark.parametrize("name", CASES)
def test_operators_with_weights_are_layers(name: str) -> None:
    make, work, channels = CASES[name]
    net = Net(17)
    y, shape = make(net)
    model = net.model(y, check=False, shapes={y: shape})
    analysis = op.analyze(model)
    layer = next(x for x in analysis.layers if x.op == name.split(",")[0])
    batch = analysis.facts.probes[0].inputs["x"][0]
    assert (layer.macs_before / batch, layer.channels_before) == (work, channels)


def test_every_rule_with_weights_has_a_case_or_is_of_the_same_class() -> None:
    """An operator that is registered with weights counts work: nothing with weights is forgotten here."""
    from onnxprune.operators import registry

    op.rules.lookup("", "Conv", 17)
    tested = {type(lookup(domain, name.split(",")[0], 19)) for name in CASES for domain in ("", MS)}
    silent = {"CDist", "Blocked", "QMoE", "ConvTranspose", "QAttention", "PackedAttention", "PackedGather"}
    rules = {type(rule) for ranges in registry._table.values() for _, _, rule in ranges if rule.weights}
    alike = tested - {type(registry.NO_RULE)} | {k for k in rules if k.__name__ in silent}
    missing = {k.__name__ for k in rules if not alike & set(k.__mro__) and not k.__module__.startswith("test")}
    assert not missing


@pytest.mark.parametrize("make", [quantised_product, to_float, integer, linear_product, packed, quantised_recurrent])
def test_codes_are_scored_by_what_they_stand_for(make: Make) -> None:
    net = Net(17)
    y, shape = make(net)
    graph = op.analyze(net.model(y, check=False, shapes={y: shape})).graph
    node = next(n for n in graph.nodes if lookup(n.domain, n.op, n.version).weights)
    values = numbers_at(graph, node, 1 if node.op != "QLinearMatMul" else 3)
    assert values is not None and values.dtype == np.float32 and np.unique(values).size > 1


@pytest.mark.parametrize("criterion", ["wanda", "ziplm", "l2"])
def test_layers_on_codes_are_scored_by_data(criterion: str) -> None:
    """Products of codes have a matrix form of the numbers, and their data are looked at as numbers."""
    net = Net(17)
    x = vectors(net)
    x, x_scale, x_zero = dynamic(net, net.linear(x, 6, 12))
    y = net.op("MatMulIntegerToFloat", x, codes(net, 12, 10), x_scale, scale(net, 10), x_zero, domain=MS)
    y = net.op("DynamicQuantizeMatMul", net.op("Relu", y), codes(net, 10, 4), scale(net), domain=MS)
    model = net.model(y, check=False, shapes={y: ["N", 4]})
    data = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    result = op.prune(model, target="macs=0.5", criterion=criterion, data=data, latency=False, trials=0)
    assert result.report.exactness.passed
    assert result.report.totals.macs_after <= 0.5 * result.report.totals.macs_before


def test_a_budget_of_macs_where_there_are_none_is_refused() -> None:
    net = Net(17)
    table = net.op("Gather", net.weight(10, 16), net.input("x", ["N", 5], np.int64))
    y = net.op("ReduceSum", net.op("Mul", table, net.weight(16)), net.const([2]), keepdims=0)
    model = net.model(y)
    with pytest.raises(op.UsageError, match="macs has no effect") as refusal:
        op.prune(model, target="macs=0.5", validate=False)
    assert "params" in str(refusal.value)
    result = op.prune(model, target="params=0.5", validate=False, latency=False)
    assert result.report.totals.params_after < result.report.totals.params_before


def test_work_of_linear_attention_is_of_its_states() -> None:
    node = onnx.helper.make_node("LinearAttention", list("qkv"), ["y"], domain=MS, q_num_heads=4, kv_num_heads=2)
    from onnxprune.graph.view import Node

    shapes = {"q": (1, 3, 8), "k": (1, 3, 4), "v": (1, 3, 6), "y": (1, 3, 12)}
    assert macs(Node(0, node.op_type, MS, 1, "", list("qkv"), ["y"], node), shapes.get) == 3 * 6 * 2 * 3
