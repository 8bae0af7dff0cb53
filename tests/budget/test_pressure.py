"""Limits are corrected until what is measured fits, whatever the prediction was off by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.search.problem import LimitCorrection


def search(measure: Callable[[float], float], rounds: int = 7) -> list[float]:
    """What is measured, as shares of the limit, at each of the factors that are tried."""
    press, seen = LimitCorrection({"latency": 1.0}), []
    for _ in range(rounds):
        seen.append(measure(press.now["latency"]))
        if not press.update({"latency": seen[-1]}):
            break
    return seen


@given(st.floats(0.5, 1.6), st.floats(0.0, 0.3))
def test_a_prediction_that_is_off_is_made_up_for(scale: float, fixed: float) -> None:
    seen = search(lambda press: fixed + scale * press)
    fitting = [share for share in seen if share <= 1]
    assert fitting and max(fitting) > 0.93


def test_a_staircase_ends_on_the_last_step_that_fits() -> None:
    seen = search(lambda press: 0.8 if press < 0.93 else 1.1)
    assert 0.8 in seen and len(seen) <= 7


def test_what_fits_is_left_alone() -> None:
    assert search(lambda press: 0.97) == [0.97]
    press = LimitCorrection({"macs": 1.0})
    assert not press.update({"macs": 0.5})  # counted costs are as predicted: less is what the steps allow


def test_only_what_is_over_is_tightened() -> None:
    press = LimitCorrection({"macs": 1.0, "latency": 1.0})
    assert press.update({"macs": 0.9, "latency": 1.2})
    assert press.now["macs"] == 1.0 and press.now["latency"] == pytest.approx(0.995 / 1.2)
    press.end()
    assert not press.update({"macs": 0.9, "latency": 1.2})


def test_a_little_too_much_is_too_much() -> None:
    press = LimitCorrection({"size": 1.0})
    assert press.update({"size": 1.002})
    assert not press.update({"size": 0.999})
