"""Targets with a quantization: sizes and times count the file in 8 bits, or exit code 5 says why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import BudgetError, ModelError
from onnxprune.search.latency import Bench

DATA = {"x": np.random.default_rng(1).normal(size=(48, 3, 6, 6)).astype(np.float32) + 0.5}
FAST: dict[str, Any] = {"latency": False, "finetune": "none", "trials": 0, "round_to": 1, "rotate": "no"}


def network() -> onnx.ModelProto:
    """Convolutions with normalisations and without biases, and a product."""
    net = Net(17)
    y = net.op("Relu", net.norm(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 32, bias=False), 32))
    y = net.op("Relu", net.norm(net.conv(y, 32, 48, bias=False), 48))
    y = net.op("Relu", net.conv(y, 48, 48, bias=False))
    return net.model(net.linear(net.op("Flatten", net.op("GlobalAveragePool", y)), 48, 8))


@pytest.mark.parametrize("given", [{}, {"data": DATA, "quantize": "qdq"}, {"factorize": True}])
def test_a_size_is_that_of_the_quantized_file(given: dict[str, Any], tmp_path: Path) -> None:
    """More units stay than in a float file of that size; biases that the quantization adds count."""
    result = op.prune(network(), target="size=30kB", **{"quantize": "dynamic", **FAST, **given})
    result.save(tmp_path / "small.onnx")
    size = (tmp_path / "small.onnx").stat().st_size
    assert result.report.budget is not None and result.report.quantization is not None
    (facts,) = result.report.budget.targets
    assert 0.85 * 30e3 < size <= 1.02 * 30e3 and facts.after == size
    assert facts.before == result.report.totals.bytes_before > 140e3  # of the float original
    assert not any("float model" in text for text in result.report.warnings)
    assert 4 * result.report.totals.params_after > 2 * size


def test_a_size_that_quantization_alone_meets_prunes_nothing() -> None:
    result = op.prune(network(), target="size=0.4", quantize="dynamic", **FAST)
    assert not any(group.removed for group in result.plan.groups)
    assert result.report.totals.bytes_after < 0.4 * result.report.totals.bytes_before


def test_a_size_out_of_reach_names_the_best_quantized_one() -> None:
    with pytest.raises(BudgetError, match=r"size=1kB cannot be reached: the best is size=\d+(\.\d+)?kB") as caught:
        op.prune(network(), target="size=1kB", quantize="dynamic", **FAST)
    assert caught.value.exit_code == 5
    half = network()
    for tensor in half.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), tensor.name))
    for info in (*half.graph.input, *half.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(BudgetError, match="No weight of this model can be quantized: its matrices hold float16"):
        op.prune(half, target="size=30kB", quantize="dynamic", **FAST)
    old = network()
    old.opset_import[0].version = 9
    with pytest.raises(ModelError, match="needs opset 11"):
        op.prune(old, target="size=30kB", quantize="dynamic", **FAST)


def elements(path: Path) -> dict[str, float]:
    """Size of every weight of a model, {node that reads it: elements}, codes as 0.3 of an element."""
    graph = onnx.load(path).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    sizes = {n: v.size * (0.3 if v.dtype == np.int8 else 1.0) for n, v in arrays.items() if v.ndim > 1}
    return {node.name: sum(sizes.get(name, 0.0) for name in node.input) for node in graph.node}


def seconds(self: Bench, paths: Sequence[Path], runs: int = 0, budget_s: float = 0.0) -> np.ndarray:
    """A clock that counts: an element costs 1, a run 2,000."""
    return np.array([2000 + sum(elements(path).values()) for path in paths]) * 1e-6


def seconds_of_nodes(self: Bench, path: Path) -> dict[str, float]:
    return {name: 1e-6 * (1 + count) for name, count in elements(path).items()}


def test_a_latency_is_that_of_quantized_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the test counts, and every candidate is measured by it in 8 bits."""
    monkeypatch.setattr(Bench, "time_models", seconds)
    monkeypatch.setattr(Bench, "nodes", seconds_of_nodes)
    table = op.profile(network(), seconds=0.01).table
    given = {"latency_table": table, **FAST}
    small = op.prune(network(), target="latency=0.3", quantize="dynamic", **given)
    assert small.report.budget is not None
    (facts,) = small.report.budget.targets
    assert facts.how == "measured" and 0.8 * facts.limit < facts.after <= 1.05 * facts.limit
    assert small.report.totals.params_after > 0.5 * small.report.totals.params_before
    assert not any("float model" in text for text in small.report.warnings)
    with pytest.raises(BudgetError, match=r"latency=0\.01 cannot be reached") as caught:
        op.prune(network(), target="latency=0.01", quantize="dynamic", **given)
    assert caught.value.exit_code == 5
    table.device["processor"] = "another one"
    result = op.prune(network(), target="latency=0.8", quantize="dynamic", **given)
    assert any("latency: met by the float model" in text for text in result.report.warnings)
