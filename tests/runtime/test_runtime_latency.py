from __future__ import annotations

import math

import numpy as np
import pytest
from runtime_models import mlp

from onnxprune.api import _warn_of_no_gain
from onnxprune.errors import ModelError
from onnxprune.report.facts import Latency, Report, Settings, Sizes, report_of
from onnxprune.runtime.latency import Device, latency, paired_speedup

FEEDS = [{"x": np.ones((2, 4), np.float32)}]


def test_both_models_are_measured_in_turn() -> None:
    rng = np.random.default_rng(0)
    facts = latency(mlp(rng, 64), mlp(rng, 4), FEEDS, runs=8, device=Device(threads=1))
    assert facts.runs == 8 and facts.threads == 1
    assert facts.before_ms > 0 and facts.after_ms > 0
    assert facts.before_spread_ms >= 0 and facts.after_spread_ms >= 0
    assert math.isfinite(facts.speedup)


def test_spent_budget_stops_after_five_runs() -> None:
    same = mlp(np.random.default_rng(0))
    assert latency(same, same, FEEDS, runs=50, device=Device(threads=1), budget_s=0.0).runs == 5
    assert latency(same, same, FEEDS, runs=1, device=Device(threads=1)).runs == 5


def test_threads_default_to_what_the_process_may_use() -> None:
    same = mlp(np.random.default_rng(0))
    assert latency(same, same, FEEDS, runs=5).threads >= 1


def test_failures_are_typed() -> None:
    same = mlp(np.random.default_rng(0))
    with pytest.raises(ModelError, match="at least one input"):
        latency(same, same, [])
    with pytest.raises(ModelError):
        latency(same, b"broken", FEEDS)
    with pytest.raises(ModelError):
        latency(same, same, [{"x": np.ones((2, 5), np.float32)}])


def test_pairs_tell_what_medians_cannot() -> None:
    """The machine's speed changes tenfold in the middle; every pair says 2."""
    load = np.repeat([1.0, 10.0], 10)
    draw = np.random.default_rng(0)
    after = load * draw.uniform(0.95, 1.05, 20)
    speedup, (low, high) = paired_speedup((2 * load).tolist(), after.tolist())
    assert low <= speedup <= high and 1.9 < low < 2 < high < 2.1
    facts = Latency(2.0, 1.0, 9.0, 9.0, 20, 1, speedup, (low, high))
    assert facts.speed_verdict == "faster" and facts.speedup == speedup


@pytest.mark.parametrize("pairs", [5, 8, 20, 100, 400])
def test_the_interval_holds_the_median_as_often_as_it_says(pairs: int) -> None:
    draw = np.random.default_rng(pairs)
    held = 0
    for _ in range(400):
        _, (low, high) = paired_speedup(np.exp(0.3 * draw.standard_normal(pairs)).tolist(), [1.0] * pairs)
        held += low <= 1.0 <= high
    assert 0.9 < held / 400 <= 1.0


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((1.2, 1.3), "faster"), ((0.7, 0.8), "slower"), ((0.9, 1.3), "no difference"), ((1.001, 1.005), "no difference")],
)
def test_only_what_the_interval_says_is_said(interval: tuple[float, float], verdict: str) -> None:
    assert Latency(1.0, 1.0, 0.1, 0.1, 20, 1, 1.0, interval).speed_verdict == verdict
    assert Latency(1.0, 1.0, 0.1, 0.1, 20, 1).speed_verdict == "no difference"


def test_short_runs_go_on_for_a_while() -> None:
    same = mlp(np.random.default_rng(0))
    assert 5 < latency(same, same, FEEDS, runs=5, device=Device(threads=1), least_s=0.05).runs <= 400


@pytest.mark.parametrize(
    ("interval", "round_to", "words"),
    [
        ((0.6, 0.7), 4, ["less work but slower: 0.65 times as fast (0.60 to 0.70)", "round_to='auto'"]),
        ((0.6, 0.7), "auto", ["less work but slower", "target='latency=0.8'"]),
        ((0.5, 1.5), "auto", ["no gain in speed was measured", "target='latency=0.8'"]),
        ((1.2, 1.5), "auto", []),
    ],
)
def test_a_result_that_is_not_faster_says_what_would_be(
    interval: tuple[float, float], round_to: int | str, words: list[str]
) -> None:
    times = Latency(1.0, 1.0, 0.1, 0.1, 20, 1, sum(interval) / 2, interval)
    work = Sizes(macs_before=100, macs_after=50)
    report = report_of([Settings({"round_to": round_to}), work, times])
    _warn_of_no_gain(report)
    assert len(report.warnings) == bool(words)
    assert all(word in report.warnings[0] for word in words)
    same: Report = report_of([Settings({"round_to": round_to}), Sizes(macs_before=100, macs_after=100), times])
    _warn_of_no_gain(same)
    assert not same.warnings
