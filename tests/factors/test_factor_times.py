"""auto goes by what is measured: time that is not won is not paid for, and losses that are rounding say nothing.

Times are made up here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from planted_factors import draw, left, run

from onnxprune.errors import BudgetError
from onnxprune.factorization.allocation import Candidate
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
    monkeypatch.setattr(joint_budget.JointBudget, "latency", lambda self, d: one(0, 0, 0, d.item))
    return speeds


def test_what_brings_no_speed_stays_where_others_can_pay(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = run(net(), "auto", ratio=0.3)
    (first,) = [f.name for f in quick.report.factorized if f.method]
    assert not quick.report.warnings
    times[first] = 0.99
    monkeypatch.setattr(joint_budget, "_MATTERS", 1.0)
    slow = run(net(), "auto", ratio=0.3)
    assert "no faster by" in left(slow)[first] and "as measured" in left(slow)[first]
    assert [f.name for f in slow.report.factorized if f.method] != [first]
    assert not slow.report.warnings


def test_what_others_would_pay_too_much_for_is_taken_apart_and_said(times: dict[str, float]) -> None:
    """One layer has low rank and gives what is asked for nothing; the other would lose much."""
    (first,) = [f.name for f in run(net(), "auto", ratio=0.3).report.factorized if f.method]
    times[first] = 0.99
    slow = run(net(), "auto", ratio=0.3)
    assert [f.name for f in slow.report.factorized if f.method] == [first]
    assert first not in left(slow)
    (said,) = slow.report.warnings
    assert "get no faster on their own" in said and "in place of 0.0%" in said


def test_sparing_goes_on_while_the_whole_is_slower(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then others pay, and the price is said."""
    (first,) = [f.name for f in run(net(), "auto", ratio=0.3).report.factorized if f.method]
    times[first] = 0.99
    whole = iter([0.9, 2.0])
    monkeypatch.setattr(factorize, "model_latency", lambda *_: Latency(1.0, 1.0 / next(whole), 0.0, 0.0, 15, 2))
    slow = run(net(), "auto", ratio=0.3)
    (other,) = [f for f in slow.report.factorized if f.method]
    assert other.name != first and "no faster by" in left(slow)[first]
    (said,) = slow.report.warnings
    assert f"to {other.error:.0%} from 0.0%" in said and "raises the largest error" in said


def test_a_whole_that_gets_no_faster_is_refused(times: dict[str, float]) -> None:
    times[""] = 0.9
    with pytest.raises(BudgetError, match=r"no faster here: 1 ms before, 1\.11 ms after"):
        run(net(), "auto", ratio=0.3)


def test_a_ratio_out_of_reach_without_slow_layers_is_refused(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint_budget, "_MATTERS", 1.0)
    names = [f.name for f in run(net(), "auto", ratio=0.3).report.factorized]
    times.update(dict.fromkeys(names, 0.5))
    with pytest.raises(BudgetError, match="without making layers slower: at most 0%"):
        run(net(), "auto", ratio=0.3)


@pytest.mark.parametrize(("expected", "real", "scale"), [(0.02, 0.01, 0.5), (1e-16, 3e-30, 1.0), (1e-28, 0.3, 3e8)])
def test_losses_are_set_right_by_what_was_lost(expected: float, real: float, scale: float) -> None:
    """Rounding in place of rounding is no reason to believe that other ranks of the layer lose nothing."""
    taken = Candidate("svd", (8,), 100, expected)
    others = [Candidate("svd", (2,), 10, 0.4), Candidate("tucker", (3, 3), 30, 0.2)]
    opened = SimpleNamespace(layer=SimpleNamespace(name="a"))
    done = SimpleNamespace(name="a", error=real, candidate=taken)
    budget = SimpleNamespace(
        layer_fits=[opened],
        options=[others],
        _choices=SimpleNamespace(candidates={"a": taken}),
        _work=SimpleNamespace(factorize=lambda _: [done]),
    )
    joint_budget.JointBudget._correct(budget)  # type: ignore[arg-type]
    (svd, tucker) = budget.options[0]
    assert svd.loss == pytest.approx(0.4 * scale, rel=1e-6)
    assert tucker.loss == 0.2


def test_gains_count_in_the_way_that_changes_outputs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first way of weighing gains is not kept where another does less to the outputs."""
    tried: list[list[float]] = []
    settle = joint_budget.JointBudget._settle

    def spy(self: Any, slower: Any) -> None:
        tried.append(list(self.gains))
        settle(self, slower)

    monkeypatch.setattr(joint_budget.JointBudget, "_settle", spy)
    changes = iter([0.5, 0.1])
    monkeypatch.setattr(joint_budget.JointBudget, "_change", lambda self: next(changes))
    chosen: list[list[float]] = []
    explain = joint_budget.JointBudget._explain

    def kept(self: Any, slower: Any) -> None:
        chosen.append(list(self.gains))
        explain(self, slower)

    monkeypatch.setattr(joint_budget.JointBudget, "_explain", kept)
    model = net()
    run(model, "auto", ratio=0.3, timed=False, data=draw(model, 32))
    assert len(tried) == 2 and tried[0] != tried[1]
    assert chosen == [tried[1]]
