"""Weights of a layer as a matrix and biases, and back into the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from masks import all_values
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.io.weights import ArrayWeight
from onnxprune.io.write import assemble
from onnxprune.recovery.targets import Layer, find_targets

Array = NDArray[Any]


def conv(net: Net, **settings: Any) -> str:
    return net.conv(net.input("x", ["N", 4, 6, 6]), 4, 6, group=2, **settings)


LAYERS = {
    "convolution": conv,
    "convolution without bias": lambda net: conv(net, bias=False),
    "transposed": lambda net: net.op("ConvTranspose", net.input("x", ["N", 4, 5, 5]), net.weight(4, 3, 3, 3), group=2),
    "gemm": lambda net: net.op(
        "Gemm", net.input("x", ["N", 4]), net.weight(6, 4), net.weight(6), transB=1, alpha=0.5, beta=-2.0
    ),
    "gemm with one bias for all": lambda net: net.op(
        "Gemm", net.input("x", ["N", 4]), net.weight(4, 6), net.weight(1), beta=3.0
    ),
    "gemm without bias": lambda net: net.op("Gemm", net.input("x", ["N", 4]), net.weight(4, 6), alpha=2.0),
    "product and sum": lambda net: net.linear(net.input("x", ["N", 5, 4]), 4, 6),
    "product and sum of one": lambda net: net.op(
        "Add", net.linear(net.input("x", ["N", 5, 4]), 4, 6, bias=False), net.const(0.5)
    ),
    "product alone": lambda net: net.linear(net.input("x", ["N", 5, 4]), 4, 6, bias=False),
    "einsum": lambda net: net.op("Einsum", net.input("x", ["N", 5, 4]), net.weight(6, 4), equation="bti,oi->bto"),
    "normalisation": lambda net: net.norm(net.input("x", ["N", 4, 5]), 4),
}


def layer_of(model: onnx.ModelProto) -> tuple[Layer, Any, dict[str, Any]]:
    analysis = Analysis(model)
    graph = analysis.graph
    known = {o: None for node in graph.nodes for o in node.outputs}
    (aim,) = [a for level in find_targets(graph, known, analysis.facts.shape).levels for a in level]
    weights = dict(graph.weights)
    return Layer(graph, weights, aim), graph, weights


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_written_is_what_the_layer_does(name: str, dtype: type) -> None:
    """Outputs are the columns times the new matrix, plus what the new bias adds to the old one."""
    if dtype == np.float64 and name in ("convolution", "convolution without bias", "transposed"):
        pytest.skip("onnxruntime has no convolution in double precision")
    net = Net(17, dtype=dtype)
    y = LAYERS[name](net)
    model = net.model(y)
    layer, graph, weights = layer_of(model)
    matrix, bias = layer.read()
    rng = np.random.default_rng(0)
    new = rng.standard_normal(matrix.shape)
    more = np.zeros(bias.shape) if layer.fixed_bias else rng.standard_normal(bias.shape)
    assert layer.fixed_bias == (name in ("product alone", "einsum"))
    layer.write(new, bias + more if name not in ("product and sum", "product and sum of one") else more)
    after = assemble(graph.proto, {t.name: weights[t.name] for t in graph.proto.graph.initializer})
    onnx.checker.check_model(after, full_check=True)
    assert {t.data_type for t in after.graph.initializer} == {t.data_type for t in model.graph.initializer}
    shape = [d.dim_value or 3 for d in model.graph.input[0].type.tensor_type.shape.dim]
    feed = {"x": rng.standard_normal(shape).astype(dtype)}
    old, now = all_values(model, feed), all_values(after, feed)
    columns = layer.form.columns(feed["x"].astype(np.float64))
    change = layer.form.rows(now[y].astype(np.float64)) - layer.form.rows(old[y].astype(np.float64))
    wanted = columns @ (new - matrix) + more[:, None]
    tolerance = 3e-2 if dtype == np.float16 else 1e-4
    np.testing.assert_allclose(change, wanted, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_read_may_be_written_back(name: str) -> None:
    net = Net(17)
    model = net.model(LAYERS[name](net))
    layer, _, weights = layer_of(model)
    before = {n: w.read().copy() for n, w in weights.items()}
    matrix, bias = layer.read()
    layer.write(matrix, np.zeros_like(bias) if name.startswith("product") else bias)
    assert before.keys() == weights.keys(), "a bias of 0 need not be added"
    for n, old in before.items():
        new = weights[n].read()
        assert new.dtype == old.dtype
        np.testing.assert_allclose(new, np.broadcast_to(old, new.shape), rtol=1e-5, atol=1e-6)
    assert isinstance(weights[layer.node.inputs[layer.form.weight]], ArrayWeight)


def test_a_bias_that_others_read_is_not_touched() -> None:
    """Added behind two layers: neither has a place of its own."""
    net = Net(17)
    x, shared = net.input("x", ["N", 4]), net.weight(6)
    ends = [net.op("Add", net.op("MatMul", x, net.weight(4, 6)), shared) for _ in range(2)]
    analysis = Analysis(net.model(*ends))
    known = {o: None for node in analysis.graph.nodes for o in node.outputs}
    found = find_targets(analysis.graph, known, analysis.facts.shape)
    layers = [Layer(analysis.graph, dict(analysis.graph.weights), a) for level in found.levels for a in level]
    assert [layer.fixed_bias for layer in layers] == [True, True]


@pytest.mark.parametrize("behind", [(), (1,), (1, 5)])
def test_a_bias_has_no_home_where_outputs_lie_on_another_axis(behind: tuple[int, ...]) -> None:
    """W X makes rows: a constant that is added behind it lies along the columns."""
    net = Net(17)
    made = net.op("MatMul", net.weight(6, 4), net.input("x", ["N", 4, 5]))
    layer, _, _ = layer_of(net.model(net.op("Add", made, net.const(np.full(behind, 0.5, np.float32)))))
    assert layer.fixed_bias
