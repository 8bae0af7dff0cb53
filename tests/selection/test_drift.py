"""Scores along a measured curve: what they add up to, and the order they keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.allocation.selection import along, counts, weakest


@given(st.integers(1, 300))
def test_counts_are_cuts_of_the_group(steps: int) -> None:
    found = counts(steps)
    assert found == sorted(set(found)) and all(0 < n < steps for n in found)
    assert bool(found) == (steps > 1)


@given(st.integers(2, 40), st.integers(0, 99))
def test_scores_add_up_to_a_curve_that_grows_ever_faster(steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random(steps)
    sums = np.cumsum(np.sort(values))
    drifts = {n: 0.25 * float(sums[n - 1]) ** 2 for n in counts(steps)}
    scores = along(values, np.zeros(steps, np.int64), steps, drifts)
    ordered = np.sort(scores)
    for n, drift in drifts.items():
        assert ordered[:n].sum() == pytest.approx(drift, rel=1e-6, abs=1e-7 * max(drifts.values()))


@given(st.integers(2, 20), st.integers(1, 3), st.integers(0, 99))
def test_the_same_units_go_whatever_was_measured(steps: int, classes: int, seed: int) -> None:
    """Even where the measure jumps, falls or is 0, and where scores are 0."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(classes), steps)
    values = rng.random(owner.size) * (rng.random(owner.size) < 0.8)
    drifts = {n: float(rng.choice([0.0, 0.1, rng.random()])) for n in counts(steps)}
    scores = along(values, owner, steps, drifts)
    assert np.isfinite(scores).all() and (scores >= 0).all()
    for n in range(steps):
        old, new = (set(weakest(v, owner, steps, n).tolist()) for v in (values, scores))
        if np.unique(values).size == values.size:
            assert old == new
        assert sorted(values[list(old)]) == sorted(values[list(new)])
