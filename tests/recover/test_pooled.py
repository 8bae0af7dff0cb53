"""A layer that only a mean over positions reads: the mean has to be right, not every position."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from planted import Planted, draw, error, how, plan, repaired

import onnxprune as op
from onnxprune.channels.plan import Plan
from onnxprune.recovery.layer import Problem


def classifier(net: Planted, ending: str, activation: str = "Relu") -> tuple[onnx.ModelProto, Plan]:
    """Convolutions, and a last one whose activation is averaged over positions."""
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12))
    last = net.conv(y, 12, 8, 1)
    z = net.op(activation, last) if activation else last
    if ending == "GlobalAveragePool":
        z = net.op(ending, z)
    elif ending == "AveragePool":
        z = net.op(ending, z, kernel_shape=[6, 6])
    else:
        z = net.op("ReduceMean", z, axes=[2, 3], keepdims=0)
    source = net.nodes[0].output[0]
    return net.model(net.op("Flatten", z) if ending != "ReduceMean" else z), plan((source, 1, 12, [0, 3, 5, 8]))


@pytest.mark.parametrize("activation", ["Relu", ""])
@pytest.mark.parametrize("ending", ["GlobalAveragePool", "AveragePool", "ReduceMean"])
def test_means_come_closer(ending: str, activation: str) -> None:
    """On unseen samples, against the same model in which every position is read as well."""
    model, gone = classifier(Planted(17, seed=3), ending, activation)
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    conv = [n for n in seen.graph.node if n.op_type == "Conv"][-1]
    behind = next((n.output[0] for n in seen.graph.node if n.op_type == "Relu" and conv.output[0] in n.input), None)
    read = seen.graph.output.add()
    read.CopyFrom(onnx.helper.make_tensor_value_info(behind or conv.output[0], onnx.TensorProto.FLOAT, ["N", 8, 6, 6]))
    fresh, given = draw(model, 200, 5), draw(model, 200)
    _, result = repaired(model, gone, given)
    assert any("mean" in text for text in how(result).values())
    weights = {t.name: t for t in repaired(seen, gone, given)[1].model.graph.initializer}
    pointwise = onnx.ModelProto()
    pointwise.CopyFrom(result.model)
    for tensor in pointwise.graph.initializer:
        tensor.CopyFrom(weights[tensor.name])
    assert error(model, result.model, fresh) < 0.9 * error(model, pointwise, fresh)


def test_rows_beyond_the_limit_of_memory_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same end: edges of saturation take several times the bytes of data and targets."""
    model, gone = classifier(Planted(17, seed=3), "GlobalAveragePool", "Clip")
    reads: list[int] = []
    read = Problem._read

    def counted(self: Problem, batch: int, all_rows: bool = False) -> Any:
        reads.append(batch)
        return read(self, batch, all_rows)

    def run(memory: int | None) -> tuple[op.Result, int]:
        reads.clear()
        return repaired(model, gone, draw(model, 200), memory=memory)[1], len(reads)

    monkeypatch.setattr(Problem, "_read", counted)
    (one, num_cached), (other, num_all) = run(None), run(1_000_000)
    assert num_all > 2 * num_cached
    assert how(one) == how(other) and any("mean" in text for text in how(one).values())
    for a, b in zip(one.model.graph.initializer, other.model.graph.initializer, strict=True):
        np.testing.assert_allclose(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b), rtol=1e-5, atol=1e-6)


def test_what_follows_from_other_channels_is_not_lost() -> None:
    net = Planted(17, seed=2)
    model, _ = classifier(net, "GlobalAveragePool")
    for name in net.operands(net.nodes[0].output[0]):
        net.copy([name], 1, 4)
    model = net.model(model.graph.output[0].name)
    _, result = repaired(model, plan((net.nodes[0].output[0], 1, 12, [4])), draw(model, 60))
    assert error(model, result.model, draw(model, 50, 9)) < 1e-5, how(result)
    assert np.isfinite(error(model, result.model, draw(model, 1, 9)))
