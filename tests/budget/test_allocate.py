"""Which counts keep most within a budget: against every choice there is and the same share for all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.allocation.knapsack import Choices, Limit, allocate, least, pack, uniform


class Products:
    """Neighbouring groups multiply, as layers in a row do; one row per pair if ``peak``, else their sum."""

    def __init__(self, weights: np.ndarray, peak: bool = False) -> None:
        self.weights, self.peak = weights, peak

    def rows(self, kept: np.ndarray) -> np.ndarray:
        pairs = self.weights * kept[:, :-1] * kept[:, 1:]
        return pairs.astype(float) if self.peak else pairs.sum(axis=1, keepdims=True).astype(float)


def drawn(seed: int, groups: int = 4, steps: int = 6) -> tuple[Choices, np.ndarray]:
    draw = np.random.default_rng(seed)
    kept = [np.arange(1, steps + 1) for _ in range(groups)]
    scores = [np.sort(draw.random(steps - 1) * draw.lognormal(0, 1)) for _ in range(groups)]
    losses = [np.concatenate([[0], np.cumsum(s)])[::-1].copy() for s in scores]
    return Choices(kept, losses), draw.integers(1, 9, size=groups - 1)


def best_of_all(choices: Choices, limits: list[Limit]) -> float:
    levels = np.array(list(product(*(range(k.size) for k in choices.options))))
    kept = np.stack([k[levels[:, g]] for g, k in enumerate(choices.options)], axis=1)
    fits = np.all([x.cost.rows(kept).max(axis=1) <= x.maximum for x in limits], axis=0)
    losses = sum(x[levels[:, g]] for g, x in enumerate(choices.losses))
    return float(np.asarray(losses)[fits].min())


@given(st.integers(0, 500))
def test_packing_is_between_the_bound_and_the_best(seed: int) -> None:
    draw = np.random.default_rng(seed)
    losses = [draw.random(5) for _ in range(4)]
    costs = [draw.random((5, 2)) for _ in range(4)]
    limits = np.array([2.0, 2.0])
    found = pack(losses, costs, limits)
    levels = np.array(list(product(range(5), repeat=4)))
    total = sum(c[levels[:, g]] for g, c in enumerate(costs))
    fits = (np.asarray(total) <= limits).all(axis=1)
    if not fits.any():
        return
    best = np.asarray(sum(x[levels[:, g]] for g, x in enumerate(losses)))[fits].min()
    assert found is not None
    assert found.bound <= best + 1e-9
    assert found.bound <= found.loss


def test_nothing_fits() -> None:
    assert pack([np.zeros(2)], [np.array([[2.0], [3.0]])], np.array([1.0])) is None
    choices, weights = drawn(0)
    assert allocate(choices, [Limit(Products(weights), 0.5)]) is None
    assert uniform(choices, [Limit(Products(weights), 0.5)]) is None


@pytest.mark.parametrize("peak", [False, True])
@given(st.integers(0, 500), st.sampled_from([0.8, 0.5, 0.3]))
def test_an_allocation_is_next_to_the_best_of_all(peak: bool, seed: int, share: float) -> None:
    choices, weights = drawn(seed)
    cost = Products(weights, peak)
    whole = float(cost.rows(np.full((1, 4), 6)).max())
    limits = [Limit(cost, share * whole)]
    found, alike = allocate(choices, limits), uniform(choices, limits)
    assert found is not None and alike is not None
    assert cost.rows(found.counts[None]).max() <= share * whole
    best = best_of_all(choices, limits)
    assert best - 1e-9 <= found.loss <= alike.loss + 1e-9
    assert found.loss <= 1.35 * best + 1e-9
    assert 0 <= found.gap <= 1


def test_several_limits_hold_at_once() -> None:
    choices, weights = drawn(3, groups=6, steps=20)
    macs, peak = Products(weights), Products(weights, peak=True)
    whole = np.full((1, 6), 20)
    limits = [Limit(macs, 0.5 * float(macs.rows(whole).max())), Limit(peak, 0.4 * float(peak.rows(whole).max()))]
    found = allocate(choices, limits)
    assert found is not None
    for limit in limits:
        assert limit.cost.rows(found.counts[None]).max() <= limit.maximum
    # Some limit is used up: another step of any group would not fit.
    more = found.counts + np.eye(6, dtype=np.int64)
    more = more[(more <= 20).all(axis=1)]
    over = [x.cost.rows(more).max(axis=1) > x.maximum for x in limits]
    assert np.any(over, axis=0).all()


def test_a_cost_with_steps() -> None:
    """Kernels that take channels in fours: between two multiples nothing is won, so nothing is cut."""

    class Fours:
        def rows(self, kept: np.ndarray) -> np.ndarray:
            return np.asarray(-(-kept // 4), dtype=float).sum(axis=1, keepdims=True)

    kept = [np.arange(1, 17)] * 3
    losses = [np.arange(15, -1, -1.0) * k for k in (1.0, 1.1, 5.0)]
    found = allocate(Choices(list(kept), losses), [Limit(Fours(), 9)])
    assert found is not None
    assert found.counts.tolist() == [4, 16, 16]
    assert Fours().rows(least(Choices(list(kept), losses), Fours())[None])[0, 0] == 3
