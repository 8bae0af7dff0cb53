"""Sweeps: a model per budget, the frontier, and pages that need nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import onnx
import pytest
from build import Net
from hypothesis import given
from hypothesis import strategies as st

import onnxprune as op
from onnxprune.errors import BudgetError, UsageError
from onnxprune.report.facts import SweepFacts, SweepPoint
from onnxprune.report.page import Series, chart, page, sweep_page, table, ticks
from onnxprune.search import sweep as rows
from onnxprune.search.budget import Search
from onnxprune.search.problem import SearchProblem
from onnxprune.search.sweep import mark_pareto
from onnxprune.targets import Target

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


def tiny() -> onnx.ModelProto:
    net = Net(17)
    h = net.input("x", ["N", 3, 8, 8])
    for inputs, outputs in ((3, 16), (16, 16)):
        h = net.op("Relu", net.conv(h, inputs, outputs))
    return net.model(net.linear(net.op("Flatten", net.op("GlobalAveragePool", h)), 16, 5))


def calls() -> Iterator[np.ndarray]:
    """Data of which the number of samples is not known before they are read."""
    draw = np.random.default_rng(0)
    return (draw.standard_normal((6, 3, 8, 8)).astype(np.float32) for _ in range(12))


def swept(jobs: int | None, targets: tuple[float, ...] = (0.8, 1e-4, 0.5), **options: Any) -> SweepFacts:
    return op.sweep(tiny(), targets=targets, jobs=jobs, latency=False, round_to=1, **options)


def test_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    """Also from data that can be read once, and with a criterion that no other process can be sent."""
    lock = threading.Lock()

    def weights(slot: op.criteria.Slot) -> np.ndarray:
        with lock:
            return np.abs(slot.matrix).sum(1)

    options: dict[str, Any] = {"batch_size": 5, "trials": 0, "recover": "lstsq", "criterion": weights}
    here, told = swept(1, data=calls(), **options), list[float]()
    listen: Any = lambda stage, share: told.append(share) if stage == "sweep" else None  # noqa: E731
    spread = swept(2, data=calls(), folder=tmp_path, progress=listen, **options)
    for one, other in zip(here.points, spread.points, strict=True):
        assert (one.target, one.macs, one.size, one.answer) == (other.target, other.macs, other.size, other.answer)
        assert (one.points, one.cosine) == pytest.approx((other.points, other.cosine), rel=1e-6)
        assert one.error == other.error and bool(other.file) == (other.macs > 0 and other.target != "")
    assert [bool(point.error) for point in spread.points] == [False, False, False, True]
    assert told == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    assert sum(x.macs_before for x in op.analyze(spread.points[2].file).layers) == spread.points[2].macs


class Lessons:
    """A mixture that an earlier row has taught something."""

    def __init__(self) -> None:
        self.learned = True

    def restart(self) -> None:
        self.learned = False


def test_a_row_does_not_depend_on_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def within(self: Search, problem: SearchProblem, *, explained: bool) -> None:
        assert not explained
        told.append((problem.lead, dict(problem.corrections), getattr(self._mixture_of, "learned", False)))
        monkeypatch.setattr(self, "_mixture_of", Lessons())
        raise BudgetError("none")

    monkeypatch.setattr(Search, "within", within)
    with pytest.raises(BudgetError, match="No budget"):
        swept(1)
    assert told == [("scores", {}, False)] * 3


@pytest.mark.parametrize("backend", ["sequential", "threading"])
def test_an_interrupt_ends_with_the_rows_so_far(backend: str) -> None:
    reached = list[float]()

    def interrupt(stage: str, share: float) -> None:
        if stage == "sweep" and share >= 0.5 and not reached:
            reached.append(share)
            raise KeyboardInterrupt

    with joblib.parallel_config(backend=backend, n_jobs=2):
        facts = swept(None, (0.8, 0.7, 0.6, 0.5), progress=interrupt)
    assert facts.interrupted == "the sweep ended after 2 of 4 budgets"
    assert [p.error for p in facts.points[1:]].count("interrupted") == 2 and facts.points[0].error == ""
    assert all(p.macs for p in facts.points if not p.error)


@pytest.mark.parametrize("backend", ["sequential", "threading"])
def test_a_metric_fails_alike_in_workers(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    whole = len(tiny().SerializeToString())

    def fails(path: str) -> float:
        share = Path(path).stat().st_size / whole
        if share < 0.9:
            raise ValueError("too small" if share > 0.65 else "far too small")
        return 1.0

    with (
        joblib.parallel_config(backend=backend, n_jobs=2),
        pytest.raises(UsageError, match="metric fails failed: ValueError: too small"),
    ):
        swept(None, (0.8, 0.4), metric=fails)
    assert not [w for w in recwarn if "cancelled" in str(w.message)]


def test_work_that_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(UsageError, match="cannot be sent to other processes") as caught:
        swept(2, metric=lambda path: float(lock.locked()))
    assert "script.py:function" in caught.value.hint


def test_times_are_measured_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_row", lambda search, problem, target: target)
    monkeypatch.setattr(rows, "_rows_in_workers", lambda search, problem, targets: iter("w"))
    search: Any = SimpleNamespace(
        context=SimpleNamespace(tell=print), report_to=lambda _: None, spec=SimpleNamespace(jobs=2)
    )
    for kind, expected in (("latency", [0, 1]), ("size", ["w"])):
        targets = [Target(kind, 0.5), Target(kind, 0.4)]
        assert [row if row == "w" else row[0] for row in rows._rows(search, search, targets)] == expected


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
