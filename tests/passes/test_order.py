"""Passes in several orders: exactness is asked of the cut, fidelity of the result."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune as op
from onnxprune.io.weights import ArrayWeight
from onnxprune.passes.calibration import CalibrationSplit
from onnxprune.passes.exact import check_exactness
from onnxprune.recovery import MODES
from onnxprune.recovery.regression import modes

MODEL = Path(__file__).resolve().parents[2] / "models" / "attention.onnx"
DATA = MODEL.with_name("digits_calibration.npz")
P = op.passes


def run(*stages: Any, model: Any = MODEL, data: Any = DATA, samples: int | None = 96) -> op.Result:
    return op.Pipeline(stages).run(model, data=data, samples=samples if data is not None else None)


def prune() -> P.Prune:
    return P.Prune(ratio=0.5)


@pytest.mark.parametrize("front", [True, False])
def test_exactness_is_the_cuts_and_fidelity_the_results(front: bool) -> None:
    stages = [P.Exact()] if front else []
    result = run(prune(), *stages, P.Recover("bias"), P.Validate(timed=False))
    report = result.report
    assert report.exactness.passed and report.exactness.error < 1e-6
    facts = report.recovery
    assert facts.before is not None and facts.after is not None and report.fidelity is not None
    assert report.fidelity == facts.after
    assert facts.after.outputs[0].snr_db > facts.before.outputs[0].snr_db
    assert (facts.samples, facts.aside, facts.mode, facts.why) == (87, 9, "bias", "asked for")


def test_validation_in_front_is_the_cuts_own() -> None:
    result = run(prune(), P.Validate(timed=False), P.Recover("bias"))
    report = result.report
    assert report.exactness.passed and report.fidelity is not None and report.fidelity.samples == 96
    assert report.recovery.after is not None and report.recovery.after.samples == 9


def test_every_cut_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return check_exactness(*args)

    monkeypatch.setattr("onnxprune.passes.exact.check_exactness", counted)
    run(prune(), P.Exact(), P.Exact(), P.Recover("bias"), P.Validate(timed=False), P.Exact())
    assert len(calls) == 1


TABLE_OF_THREE = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 8] x) => (float[batch, 4] y) <float[3] table = {1.0, 1.0, 1.0}>
{
  hidden = MatMul(x, first)
  shown = Relu(hidden)
  size = Shape<start = 0, end = 1>(x)
  factor = Gather(table, size)
  scaled = Mul(shown, factor)
  y = MatMul(scaled, second)
}"""


def test_refused_sizes_belong_to_the_proof_not_to_the_analysis() -> None:
    """It declares a free batch and runs with two samples at most; inputs drawn after the proof have no other sizes."""
    model, rng = onnx.parser.parse_model(TABLE_OF_THREE), np.random.default_rng(0)
    for name, shape in (("first", (8, 16)), ("second", (16, 4))):
        value = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    proved: list[P.Model] = []

    def record(context: P.Context, model: P.Model) -> P.PassResult:
        proved.append(model)
        return P.PassResult(model, changed=False)

    result = run(record, prune(), record, P.Exact(), record, P.Validate(timed=False), record, model=model, data=None)
    assert [p.inputs["x"] for p in proved[0].analysis.facts.probes] == [(2, 8), (3, 8)]
    assert [sorted(m.refused) for m in proved] == [[], [], [1], [1]]
    assert result.report.exactness.passed and result.report.exactness.batches == [2, 1]
    assert result.report.fidelity is not None and result.report.fidelity.samples == 2
    with pytest.raises(FrozenInstanceError):
        proved[0].analysis.facts.probes = ()  # type: ignore[misc]


def test_a_repair_goes_on_from_what_passes_in_front_left() -> None:
    """Weights that another pass has changed are repaired, not forgotten."""
    seen: dict[str, Any] = {}

    def double(context: P.Context, model: P.Model) -> P.PassResult:
        name = next(n for n, w in model.weights.items() if len(w.shape) == 4)
        seen[name] = model.weights[name].read() * 2
        return P.PassResult(model.with_weights({name: ArrayWeight(name, seen[name])}))

    result = run(prune(), P.Exact(), double, P.Recover("bias"), P.Validate(timed=False))
    ((name, doubled),) = seen.items()
    kept = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    np.testing.assert_array_equal(kept[name], doubled)
    assert result.report.exactness.passed


def test_passes_by_name() -> None:
    report = run("prune", "exact", "recover", "validate", model=MODEL.with_name("recurrent.onnx")).report
    assert report.exactness.passed and report.recovery.mode == "full" and report.latency is not None


def test_without_a_cut_nothing_is_repaired() -> None:
    result = run(P.Prune(ratio=0.0), P.Recover(), P.Validate(timed=False))
    assert result.report.repairs == [] and result.report.recovery.samples == 0
    for one, other in zip(result.model.graph.initializer, onnx.load(MODEL).graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


def test_a_repair_needs_data_and_a_known_mode() -> None:
    with pytest.raises(op.UsageError, match="needs calibration data"):
        run(prune(), P.Recover(), data=None)
    with pytest.raises(op.UsageError, match="needs calibration data"):
        op.prune(MODEL, recover="bias")
    with pytest.raises(op.UsageError, match="'lstsq'"):
        P.Recover("lstq")
    with pytest.raises(op.UsageError, match="memory_limit: 10 is too little"):
        op.prune(MODEL, memory_limit=10)
    assert set(MODES) == {"none", "datafree", *modes()}


def test_a_repair_that_does_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.passes.recover.is_worse", lambda after, before: True)
    result = run(prune(), P.Recover("bias"), P.Validate(timed=False))
    plain = run(prune(), P.Validate(timed=False))
    assert result.model.SerializeToString() == plain.model.SerializeToString()
    assert result.report.recovery.undone and "undone" in result.report.warnings[0]
    assert result.report.fidelity == result.report.recovery.before


def test_batches_set_aside_are_not_fitted_to() -> None:
    feeds = [{"x": np.full((4, 2), i)} for i in range(20)]
    split = CalibrationSplit.of(feeds, "d.npz")
    assert [f["x"][0, 0] for f in split.validation.inputs] == [7, 15] and len(split.fit) == 18
    assert "not used by the recovery" in split.validation.name and (split.num_fit, split.num_held_out) == (72, 8)
    split = CalibrationSplit.of(feeds[:5], "d.npz")
    assert split.validation.inputs is split.fit and "also used by the recovery" in split.validation.name
    assert split.num_held_out == 0
    many = [{"x": np.zeros((64, 2))} for _ in range(100)]
    assert sum(len(f["x"]) for f in CalibrationSplit.of(many, "d").validation.inputs) == 256


# -- models whose weights lie elsewhere than in initializers of their own ----------------------------------------------


def chain(*, ir: int = 8, constants: bool = False, shared: bool = False) -> onnx.ModelProto:
    """Three convolutions without biases; weights as Constant nodes, or biases of zeros in one initializer."""
    draw = np.random.default_rng(0)
    weights = {f"w{i}": draw.standard_normal((12, n, 3, 3)).astype(np.float32) / 6 for i, n in enumerate((3, 12, 12))}
    bias = ["zeros"] if shared else []
    if shared:
        weights["zeros"] = np.zeros(12, np.float32)
    nodes, x = [], "x"
    for i in range(3):
        nodes.append(helper.make_node("Conv", [x, f"w{i}", *bias], [f"c{i}"], name=f"conv{i}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        x = f"r{i}"
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])]
    if constants:
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors] + nodes
        tensors = []
    elif ir < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph(
        nodes, "chain", inputs, [helper.make_tensor_value_info("r2", TensorProto.FLOAT, ["N", 12, 6, 6])], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8 if ir < 4 else 17)], ir_version=ir)


@pytest.mark.parametrize(
    "form", [{}, {"constants": True}, {"shared": True}, {"ir": 3}, {"ir": 3, "constants": True}], ids=json.dumps
)
def test_weights_wherever_they_lie(form: dict[str, Any], tmp_path: Path) -> None:
    model = chain(**form)
    data = np.random.default_rng(1).random((80, 3, 6, 6), np.float32)
    result = op.prune(model, ratio=0.5, criterion="l2", data=data, latency=False)
    assert {r.layer for r in result.report.repairs if r.done} == {"conv1", "conv2"}
    facts = result.report.recovery
    assert facts.before is not None and facts.after is not None
    assert facts.after.outputs[0].snr_db > facts.before.outputs[0].snr_db + 3
    plain = op.prune(chain(), ratio=0.5, criterion="l2", data=data, latency=False).report.recovery.after
    assert plain is not None and facts.after.outputs[0].snr_db == pytest.approx(plain.outputs[0].snr_db, abs=0.01)
    result.save(tmp_path / "o.onnx")
    onnx.checker.check_model(str(tmp_path / "o.onnx"))
    # A second go at the pair finds its way through the added biases.
    again = op.recover(model, tmp_path / "o.onnx", plan=result.plan, data=data).report.recovery
    assert again.before is not None and again.before.outputs[0].snr_db == pytest.approx(facts.after.outputs[0].snr_db)
