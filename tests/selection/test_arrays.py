"""Normalisations, policies, schedules and LAMP against their formulas, written out."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.allocation.selection import lamp, removed_share
from onnxprune.importance.scores import Part, columns, combine, normalize, over_columns
from onnxprune.settings import words

METHODS = [m for m in words("normalize") if m not in ("auto", "measured")]
RAW = np.array([3.0, -1.0, 0.5, 7.0, 0.5])


def test_normalisations_are_their_formulas() -> None:
    size, mean = len(RAW), sum(RAW) / len(RAW)
    spread = math.sqrt(sum((x - mean) ** 2 for x in RAW) / size)
    grown = [math.exp(x) for x in RAW]
    wanted = {
        "none": list(RAW),
        "mean": [x / (sum(abs(y) for y in RAW) / size) for x in RAW],
        "root": [x / math.sqrt(sum(abs(y) for y in RAW)) for x in RAW],
        "standard": [(x - mean) / spread for x in RAW],
        "tss": [x / sum(abs(y) for y in RAW) for x in RAW],
        "linear": [(x + 1.0) / 8.0 for x in RAW],
        "softmax": [g / sum(grown) for g in grown],
    }
    assert set(wanted) == set(METHODS)
    for method, values in wanted.items():
        np.testing.assert_allclose(normalize(RAW, method), values, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e30])
def test_constant_scores_stay_constant_and_finite(method: str, value: float) -> None:
    result = normalize(np.full(4, value), method)
    assert np.isfinite(result).all() and np.ptp(result) == 0
    assert normalize(np.zeros(0), method).size == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.sampled_from(METHODS))
def test_normalisations_keep_the_order(values: list[float], method: str) -> None:
    raw = np.asarray(values)
    result = normalize(raw, method)
    assert (np.diff(result[np.argsort(raw)]) >= 0).all()


def part(units: list[int], scores: list[float], *place: int) -> Part:
    return Part(np.asarray(units), np.asarray(scores), place or (0,))


def test_policies_over_slots() -> None:
    """Unit 1 lies twice in the first slot, unit 2 only in the second, unit 3 in none."""
    parts = [part([0, 1, 1], [1.0, 2.0, 4.0], 9), part([0, 1, 2], [10.0, -20.0, 30.0], 3)]
    known = {"sum": [11, -14, 30], "average": [5.5, -14 / 3, 30], "max": [10, 4, 30], "backward": [1, 6, 30]}
    for policy, wanted in known.items():
        found = combine(parts, 4, policy)
        np.testing.assert_allclose(found[:3], wanted)
        assert found[3] == pytest.approx(np.mean(wanted))


def test_columns_of_a_grid() -> None:
    rows = np.array([0, 1, 0, 1, 0, 1])
    assert columns(rows, 3).tolist() == [0, 0, 1, 1, 2, 2]
    scores = np.array([1.0, 10.0, 2.0, 0.0, 4.0, 0.0])
    assert over_columns(scores, rows, 3, "sum").tolist() == [11, 11, 2, 2, 4, 4]
    assert over_columns(scores, rows, 3, "average").tolist() == [5.5, 5.5, 1, 1, 2, 2]
    assert over_columns(scores, rows, 3, "count").tolist() == scores.tolist()
    uneven = np.array([0, 0, 0, 0, 1, 1])
    assert columns(uneven, 2).tolist() == [0, 0, 1, 1, 0, 1]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, 7.0]), min_size=1, max_size=12))
def test_lamp_is_its_formula(values: list[float]) -> None:
    found = lamp(np.asarray(values))
    for score, u in zip(found, values, strict=True):
        below = sum(v * v for v in values if v >= u)
        assert score == pytest.approx(u * u / below if below else 0.0)


def test_lamp_of_units_that_are_gone_or_below_zero() -> None:
    found = lamp(np.array([np.nan, 2.0, -np.inf, 1.0]))
    assert np.isnan(found[0]) and np.isneginf(found[2])
    assert found[[1, 3]].tolist() == [1.0, 0.2]
    np.testing.assert_allclose(lamp(np.array([-1.0, 0.0, 1.0])), [0, 0.2, 1])


@given(st.sampled_from(words("schedule")), st.floats(0, 0.99), st.integers(1, 12))
def test_schedules_rise_to_the_ratio(schedule: str, ratio: float, steps: int) -> None:
    shares = [removed_share(ratio, schedule, i / steps) for i in range(steps + 1)]
    assert shares[0] == pytest.approx(0) and shares[-1] == ratio
    assert all(a <= b + 1e-12 for a, b in pairwise(shares))


def test_schedules_are_their_formulas() -> None:
    assert removed_share(0.6, "linear", 0.25) == pytest.approx(0.15)
    assert removed_share(0.6, "exp", 0.25) == pytest.approx(1 - 0.4**0.25)
    assert removed_share(0.6, "cos", 0.25) == pytest.approx(0.6 * (1 - math.cos(math.pi / 4)) / 2)
    assert removed_share(0.6, "cube", 0.25) == pytest.approx(0.6 * (1 - 0.75**3))
