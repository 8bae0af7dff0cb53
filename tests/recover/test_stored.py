"""Weights that lie as codes, or behind operators that rearrange them, are read and written like any other."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from numpy.typing import NDArray
from planted import Planted, draw, error, how, outputs, plan, repaired

from onnxprune.graph.view import Graph
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.recovery.targets import WeightSource

Array = NDArray[Any]


def found(net: Net, name: str) -> tuple[Graph, WeightSource, dict[str, Weight]]:
    """The graph of a product with the constant ``name``, how it is stored, and the weights."""
    rows = net.input("x", ["N", 6])
    proto = net.model(net.op("MatMul", rows, name), check=False)
    weights = {t.name: ArrayWeight(t.name, onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer}
    graph = Graph.of(proto, dict(weights))
    stored = WeightSource.of(graph, name)
    assert isinstance(stored, WeightSource), stored
    return graph, stored, dict(graph.weights)


CODES = {
    "int8": (np.int8, (), 0, {}),
    "uint8": (np.uint8, (), 7, {}),
    "uint8 from 0": (np.uint8, (), None, {}),
    "int8 off centre": (np.int8, (), -20, {}),
    "per output": (np.int8, (8,), 0, {"axis": 1}),
    "per input": (np.uint8, (6,), 100, {"axis": 0}),
    "negative axis": (np.int8, (8,), 0, {"axis": -1}),
    "int16": (np.int16, (8,), 0, {"axis": 1}),
    "int4": (ml_dtypes.int4, (8,), 0, {"axis": 1}),
    "blocks": (np.int8, (2, 8), 0, {"axis": 0, "block_size": 3}),
    "short last block": (np.int8, (2, 8), 0, {"axis": 0, "block_size": 4}),
}


def coded(net: Net, case: str) -> tuple[str, Array]:
    """A weight [6, 8] in codes, and its scale."""
    kind, shape, zero, attrs = CODES[case]
    rng = np.random.default_rng(3)
    info: Any = ml_dtypes.iinfo(kind)
    codes = rng.integers(int(info.min), int(info.max) + 1, (6, 8))
    scale = rng.uniform(0.01, 0.2, shape).astype(np.float32)
    operands = [net.const(codes, kind), net.const(scale)]
    if zero is not None:
        operands.append(net.const(np.full(shape, zero), kind))
    return net.op("DequantizeLinear", *operands, **attrs), scale


@pytest.mark.parametrize("case", CODES)
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_what_is_written_is_read_to_half_a_step(case: str, spread: float) -> None:
    net = Net(23, ir=11)
    name, old = coded(net, case)
    _, stored, weights = found(net, name)
    wanted = np.random.default_rng(5).normal(size=(6, 8)) * spread
    if case == "uint8 from 0":  # no zero point, no negative numbers
        wanted = np.abs(wanted)
    ratio = stored.write(weights, wanted)
    assert ratio is not None
    assert stored.quantised is not None
    scale = weights[stored.quantised.inputs[1]].read()
    assert scale.shape == old.shape
    assert np.allclose(ratio * old, scale, rtol=1e-6)
    block = CODES[case][3].get("block_size")
    wide = np.repeat(scale, block, axis=0)[:6] if block else scale
    if case == "per input":
        wide = scale[:, None]
    # A zero point is a whole number: both ends of unsigned codes may be cut by half a step.
    assert (np.abs(stored.read(weights) - wanted) <= wide * 1.01).all()
    assert np.abs(stored.read(weights) - wanted).mean() < 0.3 * np.mean(wide)
    info: Any = ml_dtypes.iinfo(CODES[case][0])
    assert np.abs(weights[stored.root].read().astype(int)).max() > 0.9 * int(info.max) / (1 + (info.min == 0))


def test_zeros_stay_zeros() -> None:
    """A scale of nothing would make every code NaN."""
    net = Net(17)
    name, old = coded(net, "per output")
    _, stored, weights = found(net, name)
    stored.write(weights, np.zeros((6, 8)))
    assert not stored.read(weights).any()
    assert stored.quantised is not None
    assert np.array_equal(weights[stored.quantised.inputs[1]].read(), old)


def test_what_only_rearranges_is_undone() -> None:
    net = Net(17)
    start = net.const(np.arange(48).reshape(2, 4, 6) / 8, np.float16)
    name = net.op("Identity", net.transpose(net.reshape(net.op("Cast", start, to=1), 8, 6), 1, 0))
    _, stored, weights = found(net, name)
    before = stored.read(weights)
    assert before.shape == stored.shape(weights) == (6, 8)
    wanted = np.random.default_rng(0).integers(-20, 20, (6, 8)) / 4
    assert stored.write(weights, wanted) is None
    assert np.array_equal(stored.read(weights), wanted)
    assert weights[stored.root].shape == (2, 4, 6)
    assert weights[stored.root].dtype == np.float16


def test_what_cannot_be_undone_has_a_reason() -> None:
    net = Net(17)
    name = net.op("Exp", net.weight(6, 8))
    graph = Graph.of(net.model(net.op("MatMul", net.input("x", ["N", 6]), name)), {})
    assert WeightSource.of(graph, name) == "its weight is computed from other tensors"


# -- whole models ------------------------------------------------------------------------------------------------------


def quantised(net: Planted, y: str, scale: float, dtype: Any = np.uint8, zero: int = 128) -> str:
    """An activation as codes and back, as converters write it."""
    settings = net.const(np.float32(scale)), net.const(zero, dtype)
    return str(net.op("DequantizeLinear", net.op("QuantizeLinear", y, *settings), *settings))


def layer(net: Planted, x: str, ins: int, outs: int, scale: float, *, shared: str = "", kernel: int = 3) -> str:
    """A convolution whose weight and bias are codes; ``scale`` is that of its input."""
    rng = np.random.default_rng(outs)
    codes = rng.integers(-127, 128, (outs, ins, kernel, kernel))
    sizes = rng.uniform(0.7, 1.4, outs) / 127 / np.sqrt(ins * kernel * kernel)
    weight = net.op(
        "DequantizeLinear",
        net.const(codes, np.int8),
        net.const(sizes, np.float32),
        shared or net.const(np.zeros(outs), np.int8),
        axis=0,
    )
    bias = net.op(
        "DequantizeLinear",
        net.const(rng.integers(-4000, 4000, outs), np.int32),
        net.const(sizes * scale, np.float32),
        axis=0,
    )
    pad = kernel // 2
    return str(net.op("Conv", x, weight, bias, kernel_shape=[kernel, kernel], pads=[pad] * 4))


def coded_model(seed: int = 0) -> tuple[onnx.ModelProto, Any]:
    """Two quantised convolutions; channel 4 of the first is what channel 1 is."""
    net = Planted(17, seed=seed)
    x = quantised(net, net.input("x", ["N", 3, 6, 6]), 0.03)
    y = layer(net, x, 3, 6, 0.03)
    convolution = next(n for n in net.nodes if y in n.output)
    for name in convolution.input[1:]:
        source = next(n for n in net.nodes if name in n.output)
        net.copy([n for n in source.input if n in net.operands(name)], 1, 4)
    z = quantised(net, net.op("Relu", y), 0.02, zero=0)
    out = layer(net, z, 6, 4, 0.02)
    return net.model(quantised(net, out, 0.02)), plan((y, 1, 6, [4]))


def test_quantised_layers_are_repaired() -> None:
    model, removal = coded_model()
    before, result = repaired(model, removal, draw(model, 64))
    fresh = draw(model, 32, seed=9)
    assert error(model, before, fresh) > 0.1
    assert error(model, result.model, fresh) < 0.03
    assert [h for h in how(result).values() if h.endswith("rounded")]
    kinds = {t.name: t.data_type for t in result.model.graph.initializer}
    assert sum(k == onnx.TensorProto.INT8 for k in kinds.values()) >= 2


def test_runtimes_may_still_multiply_codes() -> None:
    """onnxruntime turns such layers into products of codes, which take the bias's codes as they are."""
    model, removal = coded_model()
    _, result = repaired(model, removal, draw(model, 64))
    fresh = draw(model, 16, seed=4)
    fused = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (plain,), (quick,) = outputs(result.model, fresh), fused.run(None, fresh)
    assert np.abs(plain - quick).max() <= 0.021  # a step of the output's codes
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    made = {o: n for n in result.model.graph.node for o in n.output}
    last = [n for n in result.model.graph.node if n.op_type == "Conv"][-1]
    data, weight, bias = (weights[made[n].input[1]] for n in last.input)
    assert np.allclose(bias, data * weight, rtol=1e-6)


def test_a_scale_that_others_read_stays_as_it_is() -> None:
    """The second layer's zero point is the third's too; each has a scale of its own."""
    net = Planted(17)
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    net.copy(net.operands(y), 1, 4)
    scale, zero = net.const(0.004), net.const(0, np.int8)
    rng = np.random.default_rng(0)
    products = []
    for outs in (4, 5):
        codes = net.const(rng.integers(-127, 128, (outs, 6, 1, 1)), np.int8)
        weight = net.op("DequantizeLinear", codes, scale, zero)
        products.append(net.op("Conv", net.op("Relu", y), weight, net.weight(outs), kernel_shape=[1, 1]))
    model = net.model(*products)
    before, result = repaired(model, plan((y, 1, 6, [4])), draw(model, 64))
    fresh = draw(model, 32, seed=9)
    assert error(model, before, fresh) > 0.1
    assert error(model, result.model, fresh) < 0.03


def test_a_normalisation_whose_shift_is_stored_as_codes_is_left_alone() -> None:
    """Tools for quantization store the shift of a BatchNormalization as codes; reading it as numbers is no option."""
    net = Planted(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    shift = net.op("DequantizeLinear", net.const(np.arange(6), np.int8), net.const(0.01), net.const(0, np.int8))
    rest = [net.const(np.full(6, value)) for value in (0.1, 1.5)]
    y = net.op("BatchNormalization", net.op("Relu", x), net.const(np.linspace(0.5, 1.5, 6)), shift, *rest)
    model = net.model(net.conv(net.op("Relu", y), 6, 4, 1))
    _, result = repaired(model, plan((x, 1, 6, [1, 4])), draw(model, 64))
    assert any("statistics are computed from other tensors" in reason for reason in how(result).values()), (
        result.report.repairs
    )
