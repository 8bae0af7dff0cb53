"""Sweeps: a model per budget, the frontier, and pages that need nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune as op
from onnxprune.errors import BudgetError, UsageError
from onnxprune.report.facts import SweepPoint
from onnxprune.report.page import Series, chart, page, sweep_page, table, ticks
from onnxprune.search.sweep import mark_pareto

MODELS = Path(__file__).parents[2] / "models"


def test_a_model_for_every_budget(tmp_path: Path) -> None:
    facts = op.sweep(MODELS / "residual.onnx", targets=(0.8, 0.5, 0.0001), folder=tmp_path / "kept")
    whole, *points = facts.points
    assert whole.target == "" and whole.points == 100 and whole.macs > 0
    first, second, none = points
    for point, share in ((first, 0.8), (second, 0.5)):
        assert 0.95 * share * whole.macs < point.macs <= share * whole.macs
        assert point.size == Path(point.file).stat().st_size and point.ms > 0
        cut = op.analyze(point.file)
        assert sum(x.macs_before for x in cut.layers) == point.macs
        onnx.checker.check_model(point.file)
    assert first.cosine >= second.cosine
    assert "cannot be reached" in none.error and not none.best and not none.macs
    shown = sweep_page(facts)
    assert shown.count("<svg") == 3 and "<script" not in shown
    assert shown.count("http") == shown.count("http://www.w3.org/2000/svg")  # a name, which nobody fetches
    assert "cannot be reached" in shown


def test_another_kind_and_no_times() -> None:
    facts = op.sweep(MODELS / "residual.onnx", targets=[0.7], kind="size", latency=False)
    whole, point = facts.points
    assert 0.6 * whole.size < point.size <= 0.7 * whole.size * 1.02 and point.ms == 0
    assert sweep_page(facts).count("<svg") == 2


def test_a_sweep_that_takes_layers_apart(tmp_path: Path) -> None:
    facts = op.sweep(MODELS / "residual.onnx", targets=[0.4], factorize=True, latency=False, folder=tmp_path)
    whole, point = facts.points
    cut = op.analyze(point.file)
    assert sum(x.macs_before for x in cut.layers) == point.macs <= 0.4 * whole.macs
    assert len(cut.graph.nodes) > len(op.analyze(MODELS / "residual.onnx").graph.nodes)


def test_what_cannot_be_swept() -> None:
    with pytest.raises(BudgetError, match="No budget of the sweep"):
        op.sweep(MODELS / "residual.onnx", targets=[0.0001], latency=False)
    with pytest.raises(UsageError, match="kind: unknown value 'speed'"):
        op.sweep(MODELS / "residual.onnx", targets=[0.5], kind="speed")
    with pytest.raises(UsageError, match="no share"):
        op.sweep(MODELS / "residual.onnx", targets=[50])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_frontier(pairs: list[tuple[int, int]]) -> None:
    points = [SweepPoint("x", macs=m, points=float(p)) for m, p in pairs]
    mark_pareto(points)
    for one in points:
        beaten = any(
            (o.macs < one.macs and o.points >= one.points) or (o.macs <= one.macs and o.points > one.points)
            for o in points
        )
        assert one.best is not beaten
    assert any(p.best for p in points)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in found)


def test_charts_escape_what_they_show() -> None:
    svg = chart("a < b", "x", "y & z", [Series("<s>", [(0, 1, "one"), (1, float("nan"), "none"), (2, 3, "<two>")])])
    assert svg.count("<circle") == 2 and "&lt;two&gt;" in svg and "a &lt; b" in svg and "nan" not in svg
    whole = page("t & u", [svg, table(["h"], [["<cell>"]], best=[0])])
    assert "&lt;cell&gt;" in whole and 'class="best"' in whole and "t &amp; u" in whole


def test_an_empty_chart_is_still_a_chart() -> None:
    assert "<svg" in chart("nothing", "x", "y", [])
    assert "<svg" in chart("one", "x", "y", [Series("s", [(np.e, 0.0, "")])])
