"""Subnormal weights of layers become 0 and nothing else does; the outputs stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper, parser
from oracle import make_feed, run

import onnxprune as op
from onnxprune.cli import main
from onnxprune.graph.view import Graph
from onnxprune.io.weights import TensorWeight
from onnxprune.pruning.subnormals import flushed

TINY = float(np.finfo(np.float32).tiny)

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[2, 8] x) => (float[2, 4] y) {
    h = MatMul (x, first)
    r = Relu (h)
    turned = Transpose <perm = [1, 0]> (second)
    z = Gemm (r, turned, bias)
    y = Div (z, divisor)
}
"""


def weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    first, second = (draw.normal(size=s).astype(np.float32) for s in ((8, 16), (4, 16)))
    first[:2, 3] = (1e-39, -1e-45)
    first[2:4, 3] = (TINY, 0.0)
    second[1, ::2] = 5e-40
    return {"first": first, "second": second, "bias": np.ones(4, np.float32), "divisor": np.full(4, 1e-30, np.float32)}


def network(changes: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    model = parser.parse_model(TEXT)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in (weights() | (changes or {})).items())
    return model


def found_in(model: onnx.ModelProto) -> dict[str, int]:
    graph = Graph.of(model, {t.name: TensorWeight(t) for t in model.graph.initializer})
    return {name: many for name, (_, many) in flushed(graph).items()}


def test_values_below_the_smallest_normal_number_become_zero() -> None:
    model = network()
    assert found_in(model) == {"first": 2, "second": 8}
    result = op.prune(model, ratio=0.0, latency=False)
    assert result.report.flushed == 10 and result.report.exactness.passed
    after = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    for name, array in weights().items():
        np.testing.assert_array_equal(after[name], np.where(np.abs(array) < TINY, 0, array))
    feed = make_feed(model, 2, seed=1)
    np.testing.assert_array_equal(run(result.model, feed)["y"], run(model, feed)["y"])
    assert found_in(result.model) == {}
    assert "first" in {t.name for t in model.graph.initializer} and found_in(model)["first"] == 2


@pytest.mark.parametrize("dtype", [np.float16, np.int32])
def test_other_types_stay(dtype: type) -> None:
    """Half precision is made for small numbers."""
    tiny = np.full((8, 16), 6e-8 if dtype is np.float16 else 1).astype(dtype)
    model = parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> net (float[2, 8] x) => (float[2, 16] y) { '
                               "w = Cast <to = 1> (first) y = MatMul (x, w) }")  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(tiny, "first"))
    assert found_in(model) == {}


def test_double_has_a_limit_of_its_own() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> net (double[2, 8] x) => (double[2, 16] y) { y = MatMul (x, first) }'
    )
    model = parser.parse_model(text)
    array = np.full((8, 16), 1e-40)
    array[0, 0] = 1e-310
    model.graph.initializer.append(numpy_helper.from_array(array, "first"))
    assert found_in(model) == {"first": 1}


def test_what_is_read_elsewhere_or_scaled_first_stays() -> None:
    """A divisor of 1e-40 is not one of 0; nor is a weight that is multiplied by 1e38 before use."""
    assert "divisor" not in found_in(network({"divisor": np.full(4, 1e-40, np.float32)}))
    shared = network()
    shared.graph.node.add(op_type="Reciprocal", input=["first"], output=["more"])
    shared.graph.output.append(onnx.helper.make_tensor_value_info("more", TensorProto.FLOAT, [8, 16]))
    assert found_in(shared) == {"second": 8}
    scaled = network({"scale": np.full(1, 1e38, np.float32)})
    scaled.graph.node[2].input[0] = "scaled"
    scaled.graph.node.insert(0, onnx.helper.make_node("Mul", ["second", "scale"], ["scaled"]))
    assert found_in(scaled) == {"first": 2}


def test_constants_in_nodes_are_changed_in_a_copy() -> None:
    model = network()
    value = next(t for t in model.graph.initializer if t.name == "first")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["first"], value=value))
    model.graph.initializer.remove(value)
    before = model.SerializeToString()
    result = op.prune(model, ratio=0.25, latency=False)
    assert result.report.flushed > 0 and result.report.exactness.passed
    again = op.prune(result.model, ratio=0.0, latency=False)
    assert again.report.flushed == 0 and model.SerializeToString() == before


def test_factors_and_repairs_start_from_flushed_weights() -> None:
    data = [make_feed(network(), 2, seed=i) for i in range(8)]
    found = op.factorize(network(), method="svd", rank=2, data=data, latency=False)
    assert found.report.flushed == 10
    small = op.prune(network(), ratio=0.25, recover="none", latency=False)
    repaired = op.recover(network(), small.model, plan=small.plan, data=data)
    assert small.report.flushed > 0 and repaired.report.flushed == 0


def test_every_command_says_how_many_there_were(tmp_path: Path) -> None:
    model, small = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(network(), model)
    quick = ["--seed", "1", "-o"]
    said = CliRunner().invoke(main, [str(model), "--ratio", "0", *quick, str(small)]).output
    assert "flushed   10 weights set to 0, too small for fast arithmetic (subnormal)" in said
    taken = ["factorize", str(model), "--method", "svd", "--rank", "2", *quick, str(tmp_path / "factors.onnx")]
    assert "flushed   10 weights" in CliRunner().invoke(main, taken).output
    assert "flushed" not in CliRunner().invoke(main, [str(small), "--ratio", "0.25", *quick, str(model)]).output
