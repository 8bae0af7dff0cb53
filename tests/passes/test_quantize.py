"""Quantization as a stage: zeros survive, rounding keeps outputs, the rest of the file stays, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from onnx import numpy_helper

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.errors import BudgetError, ModelError, UsageError
from onnxprune.io.write import assemble
from onnxprune.passes.quantize import fold_normalisations
from onnxprune.pipeline import Model
from onnxprune.sparsification.obs import inverse_factor, round_columns

DATA = {"x": np.random.default_rng(1).normal(size=(64, 3, 6, 6)).astype(np.float32) + 0.5}
FAST: dict[str, Any] = {"latency": False, "finetune": None}


def network(opset: int = 17, dtype: Any = np.float32) -> onnx.ModelProto:
    """Convolutions with and without normalisation and groups, a Gemm and a product."""
    net = Net(opset, dtype=dtype)
    y = net.op("Relu", net.norm(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16, bias=False), 16))
    y = net.op("Relu", net.conv(y, 16, 16, group=2))
    y = net.op("Relu", net.norm(net.conv(y, 16, 16), 16))
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    y = net.op("Relu", net.linear(y, 16, 32, gemm=True))
    model = net.model(net.linear(y, 32, 8))
    model.metadata_props.add(key="trained", value="by hand")
    model.producer_name = "a test"
    return model


def tokens(opset: int = 17) -> onnx.ModelProto:
    net = Net(opset)
    y = net.op("Gather", net.weight(80, 16, scale=1.0), net.input("tokens", [5, "N"], np.int64))
    y = net.op("Relu", net.linear(y, 16, 32))
    return net.model(net.linear(y, 32, 8))


def outputs(model: onnx.ModelProto, feed: dict[str, Any]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def codes(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {name: v for name, v in found.items() if v.dtype in (np.int8, np.uint8) and v.ndim > 1}


@pytest.mark.parametrize("mode", ["dynamic", "qdq"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_zeros_of_a_sparse_model_are_zeros_of_the_quantized_one(mode: str, pattern: str) -> None:
    settings = {"pattern": pattern, "ratio": None if ":" in pattern else 0.6, "remove_dead": False, **FAST}
    sparse = op.sparsify(network(), data=DATA, **settings)
    result = op.sparsify(network(), data=DATA, quantize=mode, **settings)
    floats = {t.name: numpy_helper.to_array(t) for t in sparse.model.graph.initializer}
    found = codes(result.model)
    checked = 0
    for record in result.report.sparsified:
        if record.pattern:
            name = next(n for n in found if n.startswith(record.weight))
            expected = floats[record.weight] == 0
            actual = found[name] == 0
            actual = actual.T if actual.shape != expected.shape else actual
            assert expected.mean() >= 0.45
            assert actual[expected].all()
            checked += 1
    assert checked >= 2


@pytest.mark.newest_runtime  # 1.22 gives other outputs from run to run
@pytest.mark.parametrize("mode", ["dynamic", "qdq"])
def test_a_quantized_model_is_smaller_and_answers_alike(mode: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = network()
    result = op.prune(model, ratio=0.25, data=DATA, quantize=mode, **FAST)
    before = op.prune(model, ratio=0.25, data=DATA, **FAST)
    facts = result.report.quantization
    assert facts is not None and facts.mode == mode and facts.folded == 2 and 0 < facts.samples < 64
    assert facts.rounded == facts.layers == facts.corrected == 5
    assert result.report.exactness.passed and result.report.fidelity.points > before.report.fidelity.points - 5
    expected, actual = outputs(before.model, DATA), outputs(result.model, DATA)
    assert np.square(actual - expected).sum() < 1e-3 * np.square(expected).sum()
    assert [i.SerializeToString() for i in result.model.graph.input] == [
        i.SerializeToString() for i in model.graph.input
    ]
    assert result.model.producer_name == "a test" and result.model.metadata_props == model.metadata_props
    assert list((tmp_path / "temporary").iterdir()) == []
    assert "quantized" in str(result.report)


def test_rounding_with_data_keeps_outputs_better_than_without() -> None:
    feed = {"x": DATA["x"][:32]}
    model = network()
    expected = outputs(model, feed)
    nearest = op.passes.Pipeline([op.passes.Quantize("dynamic")]).run(model)
    fitted = op.passes.Pipeline([op.passes.Quantize("dynamic")]).run(model, data=DATA)
    errors = [np.square(outputs(r.model, feed) - expected).sum() for r in (nearest, fitted)]
    assert errors[1] < errors[0]
    assert nearest.report.quantization.rounded == 0


def test_rows_of_a_table_have_scales_of_their_own() -> None:
    model = tokens()
    data = {"tokens": np.random.default_rng(0).integers(0, 80, (5, 40))}
    result = op.passes.Pipeline([op.passes.Quantize()]).run(model)
    table = next(n for n, v in codes(result.model).items() if v.shape == (80, 16))
    scale = next(t for t in result.model.graph.initializer if t.name == table.replace("quantized", "scale"))
    assert list(scale.dims) == [80]
    expected = outputs(model, data)
    assert np.abs(outputs(result.model, data) - expected).max() < 0.05 * np.abs(expected).max()


def test_normalisations_fold_into_the_layer_in_front() -> None:
    model = network()
    parts, count = fold_normalisations(Model.of(Analysis(model)))
    folded = assemble(*parts)
    assert count == 2
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)
    np.testing.assert_allclose(outputs(folded, DATA), outputs(model, DATA), rtol=1e-4, atol=1e-5)
    assert len(folded.graph.initializer) == len(model.graph.initializer) - 8 + 1  # one convolution gets a bias


def test_rounding_makes_up_for_what_it_changes() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 200)) @ draw.normal(size=(200, 200)) / 14
    w = np.where(draw.random((200, 5)) < 0.3, 0.0, draw.normal(size=(200, 5)))
    scale = np.abs(w).max(axis=0) / 7
    codes = round_columns(w, inverse_factor(x.T @ x), scale, 7)
    nearest = np.clip(np.rint(w / scale), -7, 7)
    assert (codes[w == 0] == 0).all() and (np.abs(codes).max(axis=0) == 7).all() and (codes == np.rint(codes)).all()
    assert np.square(x @ (codes * scale - w)).sum() < 0.7 * np.square(x @ (nearest * scale - w)).sum()


def few_weights() -> onnx.ModelProto:
    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16, bias=False))
    return net.model(net.conv(y, 16, 2, 1, bias=False))


@pytest.mark.parametrize(
    ("model", "mode", "error", "text"),
    [
        (network(), "qdq", UsageError, "finds the ranges of activations on data, but data is not given"),
        (network(), "static", UsageError, "unknown value 'static'"),
        (network(10), "dynamic", ModelError, "needs opset 11 or newer, and the model has opset 10"),
        (network(dtype=np.float16), "dynamic", BudgetError, "its matrices hold float16"),
        (few_weights(), "dynamic", BudgetError, "the largest matrix in float32 has 324 values, and below 512 codes"),
    ],
)
def test_what_cannot_be_quantized_is_an_error_of_its_own(model: Any, mode: str, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        op.prune(model, ratio=0.25, quantize=mode, **FAST)


def test_a_quantized_model_is_not_quantized_again() -> None:
    once = op.passes.Pipeline([op.passes.Quantize()]).run(network()).model
    with pytest.raises(ModelError, match="quantized already"):
        op.prune(once, ratio=0.25, quantize="dynamic", **FAST)
    with pytest.raises(UsageError, match=r"storage 'sparse' has no meaning with quantize|has no meaning"):
        op.sparsify(network(), storage="sparse", quantize="dynamic", **FAST)


def test_before_opset_13_one_scale_serves_a_whole_weight() -> None:
    result = op.prune(network(12), ratio=0.25, data=DATA, quantize="qdq", **FAST)
    assert any("opset 12" in text for text in result.report.warnings)
    assert result.report.fidelity.points > 80


def test_the_command_writes_the_quantized_model(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **DATA)
    call = [sys.executable, "-m", "onnxprune", "m.onnx", "--ratio", "0.25", "--quantize"]
    run = subprocess.run([*call, "qdq", "--data", "d.npz", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["quantization"]["mode"] == "qdq"
    assert report["totals"]["bytes_after"] == (tmp_path / "m.pruned.onnx").stat().st_size
    run = subprocess.run([*call, "qdq"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "--quantize dynamic" in run.stderr


BRANCH = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,6,6] x, bool c) => (float[N,24,6,6] y) {
    a = Conv<pads=[1,1,1,1]>(x, w)
    r = Relu(a)
    y = If(c) <
        then_branch = t () => (float[N,24,6,6] p) { p = Relu(r) },
        else_branch = f () => (float[N,24,6,6] q) { q = Neg(r) }
    >
}"""


def test_bodies_find_the_tensors_that_they_read() -> None:
    model = onnx.parser.parse_model(BRANCH)
    weight = np.random.default_rng(0).normal(size=(24, 3, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    feed = {"x": DATA["x"], "c": np.array(True)}
    calls = [{"x": DATA["x"][i : i + 8], "c": np.array(True)} for i in range(0, 64, 8)]
    result = op.passes.Pipeline([op.passes.Quantize("qdq")]).run(model, data=calls)
    expected = outputs(model, feed)
    assert np.abs(outputs(result.model, feed) - expected).max() < 0.05 * np.abs(expected).max()
    assert len(codes(result.model)) == 1


def test_biases_lie_along_the_outputs_of_a_product_with_the_weight_in_front() -> None:
    net = Net(17)
    x = net.op("Transpose", net.linear(net.input("x", ["N", 6]), 6, 14, bias=False), perm=[1, 0])
    y = net.op("Gemm", net.weight(10, 14), x, net.weight(10, 1))
    model = net.model(y)
    data = {"x": np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)}
    result = op.passes.Pipeline([op.passes.Quantize("qdq")]).run(model, data=data)
    expected = outputs(model, data)
    assert np.abs(outputs(result.model, data) - expected).max() < 0.05 * np.abs(expected).max()
