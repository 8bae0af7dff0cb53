"""A repair of any graph that can be cut: it runs through, leaves a valid model, and does not harm the outputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import Net
from generate import generate
from onnx import TensorProto, helper
from oracle import make_feed, runnable

import onnxprune as op
from onnxprune.passes.recover import noise


def repaired(model: onnx.ModelProto, ratio: float = 0.5) -> op.Result:
    data = [make_feed(model, 1, seed=i) for i in range(12)]
    stages = [op.passes.Prune("random", ratio), op.passes.Recover(), op.passes.Validate(timed=False)]
    result = op.Pipeline(stages).run(model, data=data)
    report = result.report
    assert report.exactness.passed and report.fidelity is not None and report.recovery.before is not None
    assert noise(report.fidelity) <= 1.02 * noise(report.recovery.before)
    onnx.checker.check_model(result.model)
    return result


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rare", [False, True])
def test_random_graphs(seed: int, rare: bool) -> None:
    model = generate(seed, rare=rare)
    assert runnable(model)
    try:
        repaired(model, (0.3, 0.5, 0.7)[seed % 3])
    except op.BudgetError:
        pytest.skip("nothing to cut")


def test_heads_and_samples_on_one_axis() -> None:
    """Which rows stay depends on the number of samples: a layer is then aimed at something else."""
    net, width, heads, steps = Net(17), 6, 3, 5
    x = net.transpose(net.linear(net.input("x", ["N", steps, 4]), 4, width * heads), 1, 0, 2)

    def part() -> str:
        flat = net.reshape(net.linear(x, width * heads, width * heads), steps, -1, width)
        return net.transpose(flat, 1, 0, 2)

    scores = net.op("MatMul", part(), net.transpose(part(), 0, 2, 1))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), part())
    y = net.linear(net.reshape(net.transpose(y, 1, 0, 2), steps, -1, width * heads), width * heads, 5)
    result = repaired(net.model(net.transpose(y, 1, 0, 2)))
    assert any(r.done for r in result.report.repairs)


def test_a_body_has_tensors_of_its_own() -> None:
    net = Net(17)
    h = net.linear(net.op("Relu", net.linear(net.input("x", [5, 2, 4]), 4, 8)), 8, 6)
    ins, outs = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 6]) for n in names]
        for names in (("s_in", "e"), ("s_out", "y_out"))
    )
    nodes = [helper.make_node("Add", ["s_in", "e"], ["s_out"]), helper.make_node("Tanh", ["s_out"], ["y_out"])]
    body = helper.make_graph(nodes, "body", ins, outs)
    _, y = net.op("Scan", net.const(np.zeros((2, 6)), net.dtype), h, n=2, body=body, num_scan_inputs=1)
    net.hint(y, [5, 2, 6])
    y = net.linear(net.op("Relu", net.linear(y, 6, 10)), 10, 3)
    result = repaired(net.model(y, check=False, shapes={}))
    assert any(r.done for r in result.report.repairs)


@pytest.mark.parametrize("operator", ["Einsum", "MatMul"])
def test_both_factors_of_a_product_may_be_one_tensor(operator: str) -> None:
    """Scores of positions among each other: each of the factors has a mask of its own in the masked original."""
    net = Net(17)
    if operator == "Einsum":
        y = net.op("Einsum", net.input("x", ["N", 6, 8]), net.weight(8, 4, 4), equation="bld,dhk->bhlk")
        y = net.op("Einsum", y, y, equation="bhlk,bhmk->bhlm")
    else:
        y = net.linear(net.linear(net.input("x", ["N", 6, 8]), 8, 6), 6, 6)
        y = net.op("MatMul", y, y)
    result = op.prune(net.model(net.op("Softmax", y, axis=-1)), ratio=0.5, latency=False)
    assert result.report.exactness.passed
