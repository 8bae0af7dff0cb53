"""Budgets end to end: targets are met as measured, never worse than uniform, or refused with what would work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import BudgetError, UsageError
from onnxprune.search.refine import NAME
from onnxprune.search.spec import BudgetSpec
from onnxprune.targets import parse

MODELS = Path(__file__).parents[2] / "models"
DIGITS = MODELS / "digits_calibration.npz"


def shares(result: op.Result) -> dict[str, float]:
    totals = result.report.totals
    return {
        "macs": totals.macs_after / totals.macs_before,
        "params": totals.params_after / totals.params_before,
        "size": totals.bytes_after / totals.bytes_before,
    }


@pytest.mark.parametrize("name", ["attention", "concat", "depthwise", "recurrent", "residual"])
@pytest.mark.parametrize("kind", ["macs", "params", "size", "peak-memory"])
def test_targets_are_met(name: str, kind: str) -> None:
    result = op.prune(MODELS / f"{name}.onnx", target={kind: 0.6}, latency=False)
    assert result.report.exactness.passed
    assert result.report.budget is not None
    (facts,) = result.report.budget.targets
    share = shares(result).get(kind, facts.after / facts.before)
    assert 0.5 < share <= 0.6 * 1.02
    assert facts.after / facts.before == pytest.approx(share)
    if kind == "macs":  # the smallest units of these models are fine enough to come near
        assert share > 0.6 * 0.98


def test_several_targets_hold_at_once() -> None:
    result = op.prune(MODELS / "residual.onnx", target=["macs=0.6", "size=300kB", "peak-memory=0.8"], latency=False)
    found = shares(result)
    assert found["macs"] <= 0.6 * 1.02 and result.report.totals.bytes_after <= 300e3 * 1.02
    assert [t.kind for t in result.report.budget.targets] == ["macs", "size", "peak-memory"]  # type: ignore[union-attr]


def test_a_repair_is_part_of_the_size() -> None:
    """Layers without a bias get one: the file that is written still fits."""
    result = op.prune(MODELS / "residual.onnx", target="size=100kB", data=DIGITS, samples=128, trials=0, latency=False)
    assert result.report.recovery.mode == "full" and result.report.repairs
    assert result.report.totals.bytes_after <= 100e3 * 1.02
    assert result.report.settings["criterion"] == "ziplm"


def test_the_better_answer_is_kept() -> None:
    result = op.prune(MODELS / "depthwise.onnx", target="macs=0.5", data=DIGITS, samples=128, trials=3, latency=False)
    facts = result.report.budget
    assert facts is not None and len(facts.answers) == 4
    chosen = next(a for a in facts.answers if a.chosen)
    assert chosen.fine == max(a.fine for a in facts.answers)
    assert {a.name for a in facts.answers} == {
        "knapsack over scores",
        "knapsack over output sensitivities",
        "uniform",
        NAME,
    }
    assert facts.gap is None or 0 <= facts.gap <= 1


def test_the_metric_decides_between_answers() -> None:
    """A metric that likes layers to be equally wide is given what it likes."""

    def even(path: str) -> float:
        sizes = [t.dims[0] for t in onnx.load(path).graph.initializer if len(t.dims) == 4]
        return -float(np.std(sizes[1:5]))

    result = op.prune(MODELS / "residual.onnx", target="macs=0.5", metric=even, latency=False)
    facts = result.report.budget
    assert facts is not None and next(a.name for a in facts.answers if a.chosen) == "uniform"
    assert facts.what == "even"


def test_layers_with_a_ratio_of_their_own_and_those_left_out() -> None:
    result = op.prune(
        MODELS / "residual.onnx",
        target="macs=0.6",
        layers={"/stages/stages.4/body/body.0/*": 0.25},
        exclude=["/stages/stages.0/*"],
        round_to=4,
        latency=False,
    )
    layers = {x.name: x for x in result.report.layers}
    assert layers["/stages/stages.4/body/body.0/body.0.0/Conv"].channels_after == 48
    first = layers["/stages/stages.0/body/body.0/body.0.0/Conv"]
    assert first.channels_after == first.channels_before
    assert all(x.channels_after % 4 == 0 for x in layers.values() if x.op == "Conv")
    assert shares(result)["macs"] <= 0.6


def test_a_target_out_of_reach_says_what_works() -> None:
    with pytest.raises(BudgetError, match=r"macs=0.001 cannot be reached: the best is macs=0\.\d+") as caught:
        op.prune(MODELS / "residual.onnx", target="macs=0.001", latency=False)
    assert caught.value.exit_code == 5
    assert "max_ratio" in caught.value.hint and "Most of the remaining cost is in" in caught.value.hint
    (nearest,) = re.findall(r"target='([^']+)'", caught.value.hint)
    result = op.prune(MODELS / "residual.onnx", target=nearest, latency=False)
    assert shares(result)["macs"] <= parse(nearest).value * 1.02


def test_what_limits_memory_and_time(tmp_path: Path) -> None:
    """The node at which most is alive, and those that take most time: by the costs that the search went by."""
    with pytest.raises(BudgetError, match="peak-memory=1kB cannot be reached") as caught:
        op.prune(MODELS / "residual.onnx", target="peak-memory=1kB", latency=False)
    assert re.search(r"\d+ % of the remaining memory are activations, with their peak at /st", caught.value.hint)
    found = op.profile(MODELS / "residual.onnx", threads=1, seconds=0.1, cache=tmp_path)
    found.table.device["processor"] = "another one"
    with pytest.raises(BudgetError, match=r"latency=0\.001 cannot be reached") as caught:
        op.prune(MODELS / "residual.onnx", target="latency=0.001", latency_table=found.table, latency=False)
    assert re.search(r"remaining time is spent in /\S+ \(\d+ %\), ", caught.value.hint)


def test_a_gate_that_fails_says_what_works() -> None:
    with pytest.raises(BudgetError, match="worst cosine") as caught:
        op.prune(MODELS / "residual.onnx", target="macs=0.3", min_fidelity=0.999, latency=False)
    (nearest,) = re.findall(r"target='([^']+)'", caught.value.hint)
    result = op.prune(MODELS / "residual.onnx", target=nearest, min_fidelity=0.999, latency=False)
    assert result.report.fidelity is not None and result.report.fidelity.worst_centred_cosine >= 0.999


def test_the_smallest_model_within_a_drop() -> None:
    loose, tight = (
        op.prune(MODELS / "residual.onnx", max_drop=drop, data=DIGITS, samples=64, recover="bn", latency=False)
        for drop in (30, 3)
    )
    for result, drop in ((loose, 30), (tight, 3)):
        facts = result.report.budget
        assert facts is not None and facts.points_before - facts.points_after <= drop
    assert loose.report.totals.macs_after <= tight.report.totals.macs_after < tight.report.totals.macs_before


def test_a_latency_target_by_a_table_of_another_device(tmp_path: Path) -> None:
    found = op.profile(MODELS / "residual.onnx", threads=1, seconds=0.5, cache=tmp_path)
    found.table.device["processor"] = "another one"
    result = op.prune(MODELS / "residual.onnx", target="latency=0.8", latency_table=found.table, latency=False)
    (facts,) = result.report.budget.targets  # type: ignore[union-attr]
    assert facts.how == "predicted" and facts.after <= facts.limit * 1.05
    with pytest.raises(UsageError, match="another model"):
        op.prune(MODELS / "concat.onnx", target="latency=0.8", latency_table=found.table)


def test_what_makes_no_sense_together() -> None:
    model = MODELS / "residual.onnx"
    for arguments, message in (
        ({"target": "macs=0.5", "ratio": 0.3}, "both given"),
        ({"target": "macs=0.5", "plan": op.Plan()}, "both given"),
        ({"target": "macs=0.5", "steps": 3}, "steps has no meaning"),
        ({"target": "macs=0.5", "trials": -1}, "trials: -1 is not allowed"),
        ({"max_drop": 1.0, "trials": 5}, "no target is given"),
        ({"target": "macs=0.5", "latency_table": "x.json"}, "no latency target is given"),
        ({"max_drop": -1.0}, "max_drop: -1.0 is not allowed"),
        ({"target": "macs=0.5", "recover": "full"}, "needs calibration data"),
    ):
        with pytest.raises(UsageError, match=message):
            op.prune(model, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such file')", "failed: ValueError: no such file"),
        ("return float('nan')", "returned nan"),
        ("return 'good'", "returned a str"),
    ],
)
def test_metrics_that_fail(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(f"def top1(path):\n    {body}\n")
    with pytest.raises(UsageError, match=message) as caught:
        op.prune(MODELS / "residual.onnx", target="macs=0.5", metric=f"{tmp_path}/score.py:top1")
    assert "score.py:top1" in caught.value.message


def test_metrics_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def top1(path):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for text, message in (
        ("score.py", "not script.py:function"),
        (f"{tmp_path}/none.py:top1", "no file"),
        (f"{tmp_path}/score.py:top2", "no function 'top2'"),
        (f"{tmp_path}/broken.py:top1", "does not run: ZeroDivisionError"),
    ):
        with pytest.raises(UsageError, match=message):
            op.prune(MODELS / "residual.onnx", max_drop=1.0, metric=text)


def test_a_fidelity_gate_without_a_budget() -> None:
    with pytest.raises(BudgetError, match="min_fidelity"):
        op.prune(MODELS / "residual.onnx", ratio=0.8, min_fidelity=0.9999, latency=False)


def test_no_answer_is_looked_for_where_nothing_was_lost() -> None:
    """By default; whoever asks for trials has them."""
    given: Any = {"target": "macs=0.4", "data": DIGITS, "samples": 256, "latency": False}
    facts = op.prune(MODELS / "residual.onnx", **given).report.budget
    assert facts is not None and max(a.fine for a in facts.answers) > -1e-4
    assert NAME not in {a.name for a in facts.answers}
    facts = op.prune(MODELS / "residual.onnx", trials=2, **given).report.budget
    assert facts is not None and NAME in {a.name for a in facts.answers}


def test_the_default_criterion_is_magnitude_where_data_score_no_layer() -> None:
    """Channels that only a sum reads have no reconstruction error of a layer."""
    net = Net(17)
    x = net.input("x", ["N", 3, 6, 6])
    model = net.model(net.op("ReduceSum", net.op("Relu", net.conv(x, 3, 16)), net.const([1], np.int64)))
    feeds = [{"x": np.random.default_rng(i).standard_normal((4, 3, 6, 6)).astype(np.float32)} for i in range(8)]
    result = op.prune(model, target="params=0.6", data=feeds, latency=False)
    assert result.report.settings["criterion"] == "l2"
    assert any("scored by l2 instead" in w for w in result.report.warnings)
    with pytest.raises(op.UsageError, match="has scores for no layer"):
        op.prune(model, target="params=0.6", data=feeds, criterion="ziplm", latency=False)


def test_the_former_name_of_the_targets_still_works() -> None:
    """``wishes`` is ``spec`` and warns; without targets there is no pass."""
    spec = BudgetSpec((parse("macs=0.5"),))
    with pytest.warns(DeprecationWarning, match="spec"):
        assert op.Budget(wishes=spec).spec is spec
    with pytest.raises(TypeError, match="spec"):
        op.Budget()


def test_a_model_that_cannot_be_run_has_budgets_without_a_comparison() -> None:
    """No candidate is seen; the allocation by scores stands, and the model is never named by a file of the run."""
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16))
    y = net.hint(net.op("NotThere", net.conv(x, 16, 8), domain="com.acme"), ["N", 8, 8, 8])
    model = net.model(y, check=False, shapes={y: ["N", 8, 8, 8]})
    result = op.prune(model, target="macs=0.6", validate=False)
    assert 0.5 < shares(result)["macs"] <= 0.6
    assert "nothing was compared" in str(result.report)
    with pytest.raises(op.ModelError, match=r"'com.acme:NotThere'.* so the model cannot be run here"):
        op.prune(model, target="macs=0.6")
