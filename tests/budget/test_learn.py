"""Weights of losses that answers speak for."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.allocation.knapsack import Choices, LossWeights

LEVELS = np.arange(1, 9)


def choices(columns: int) -> Choices:
    """The same falling losses for every column."""
    return Choices([LEVELS] * columns, [(8.0 - LEVELS) ** 2] * columns)


def lost(kept: np.ndarray, true: np.ndarray) -> float:
    return float(((8.0 - kept) ** 2) @ true)


@pytest.mark.parametrize("top", [0.0, 90.0])
def test_weights_that_made_the_answers_are_found(top: float) -> None:
    """From noise, which is 0 at best, and from a metric."""
    rng, true = np.random.default_rng(0), np.array([4.0, 1.0, 1.0, 0.25]) * 1e-3
    learned = LossWeights(choices(4), top)
    for _ in range(24):
        kept = rng.integers(1, 8, 4)
        learned.add(kept, top - lost(kept, true))
    found = learned.weights()
    assert found[0] > 2 * found[1:3].max() and found[1:3].min() > 1.5 * found[3]


def test_without_evidence_all_count_alike() -> None:
    learned = LossWeights(choices(3))
    learned.add(np.array([8, 8, 8]), 0.0)
    assert np.array_equal(learned.weights(), np.ones(3))
    learned = LossWeights(choices(3))
    learned.add(np.array([4, 4, 4]), -0.5)
    assert learned.weights() == pytest.approx(np.ones(3))


def test_gain_is_beside_the_best_so_far() -> None:
    learned = LossWeights(choices(2))
    learned.add(np.array([4, 8]), -0.4)
    learned.add(np.array([2, 8]), -0.9)
    ones = np.ones(2)
    assert learned.gain(np.array([4, 8]), ones) == 0.0
    assert learned.gain(np.array([6, 8]), ones) == pytest.approx(0.75)
    assert learned.gain(np.array([2, 8]), ones) < 0


def test_counts_between_levels_and_useless_columns() -> None:
    """A column that never loses anything keeps its weight; counts that are no level are interpolated."""
    some = Choices([LEVELS[::2], np.array([5])], [((8.0 - LEVELS) ** 2)[::2], np.array([0.0])])
    learned = LossWeights(some)
    learned.add(np.array([2, 5]), -1.0)
    assert learned.weights()[1] == pytest.approx(1.0)
    assert learned.gain(np.array([3, 5]), np.ones(2)) > 0
