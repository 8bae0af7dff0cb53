from __future__ import annotations

import math

import numpy as np
import pytest
from runtime_models import mlp

from onnxprune.errors import ModelError
from onnxprune.runtime.latency import latency

FEEDS = [{"x": np.ones((2, 4), np.float32)}]


def test_both_models_are_measured_in_turn() -> None:
    rng = np.random.default_rng(0)
    seen: list[float] = []
    facts = latency(mlp(rng, 64), mlp(rng, 4), FEEDS, runs=8, threads=1, progress=lambda _, share: seen.append(share))
    assert facts.runs == 8 and facts.threads == 1
    assert facts.before_ms > 0 and facts.after_ms > 0
    assert facts.before_spread_ms >= 0 and facts.after_spread_ms >= 0
    assert math.isfinite(facts.speedup)
    assert seen == [n / 8 for n in range(1, 9)]


def test_spent_budget_stops_after_five_runs() -> None:
    same = mlp(np.random.default_rng(0))
    assert latency(same, same, FEEDS, runs=50, threads=1, budget_s=0.0).runs == 5
    assert latency(same, same, FEEDS, runs=1, threads=1).runs == 5


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
