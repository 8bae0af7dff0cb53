"""auto goes by measured time: what brings none stays, and what that costs is said. Times are made up here."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from planted_factors import left, run

from onnxprune.errors import BudgetError
from onnxprune.passes import factorize, joint_budget
from onnxprune.report.facts import Latency


def net() -> onnx.ModelProto:
    """Of two convolutions of the same size the first has rank 4."""
    made = Net(17)
    x = made.conv(made.input("x", ["N", 16, 8, 8]), 16, 16)
    low = np.random.default_rng(0).standard_normal
    kernel = (low((16, 4)) @ low((4, 16 * 9))).reshape(16, 16, 3, 3) / 8
    made.initializers[0].CopyFrom(onnx.numpy_helper.from_array(kernel.astype(np.float32), made.initializers[0].name))
    return made.model(made.conv(made.op("Relu", x), 16, 16))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """{layer: speed of its factors}, 2 where nothing is said; "" is the whole model."""
    speeds: dict[str, float] = {}

    def one(_graph: Any, _weights: Any, _shape: Any, item: Any, *_: Any) -> Latency:
        return Latency(1.0, 1.0 / speeds.get(item.layer.name, 2.0), 0.0, 0.0, 15, 2)

    monkeypatch.setattr(joint_budget, "layer_latency", one)
    whole = lambda *_: Latency(1.0, 1.0 / speeds.get("", 2.0), 0.0, 0.0, 15, 2)  # noqa: E731
    monkeypatch.setattr(factorize, "model_latency", whole)
    # Layers of one form are timed once: here every one is asked about.
    monkeypatch.setattr(joint_budget.JointBudget, "_time", lambda self, d: one(0, 0, 0, d.item))
    return speeds


def test_what_brings_no_speed_stays_and_its_price_is_said(times: dict[str, float]) -> None:
    quick = run(net(), "auto", ratio=0.3)
    (first,) = [f.name for f in quick.report.factorized if f.method]
    assert not quick.report.warnings
    times[first] = 1.01
    slow = run(net(), "auto", ratio=0.3)
    assert "no faster by" in left(slow)[first] and "as measured" in left(slow)[first]
    (other,) = [f for f in slow.report.factorized if f.method]
    assert other.name != first and other.error > 0.05
    (said,) = [w for w in slow.report.warnings if "get no faster" in w]
    assert f"{other.error:.0%} in place of" in said and "--untimed" in said


def test_a_whole_that_gets_no_faster_is_refused(times: dict[str, float]) -> None:
    times[""] = 0.9
    with pytest.raises(BudgetError, match=r"no faster here: 1 ms before, 1\.11 ms after"):
        run(net(), "auto", ratio=0.3)


def test_a_ratio_out_of_reach_without_slow_layers_is_refused(times: dict[str, float]) -> None:
    names = [f.name for f in run(net(), "auto", ratio=0.3).report.factorized]
    times.update(dict.fromkeys(names, 0.5))
    with pytest.raises(BudgetError, match="without making layers slower: at most 0%"):
        run(net(), "auto", ratio=0.3)
