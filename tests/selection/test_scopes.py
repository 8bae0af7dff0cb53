"""Allocation: every scope removes what was asked, keeps to the limits, and is the sort that it claims to be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.selection import allocate, allowed_counts, lamp, step_scores, weakest


@st.composite
def groups(draw: st.DrawFn) -> list[RankedGroup]:
    """Groups of one or several rows with seeded scores, some of them equal."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ratio = draw(st.sampled_from([0.1, 0.3, 0.5, 0.8]))
    limits = {
        "round_to": draw(st.sampled_from([1, 1, 4])),
        "step": draw(st.sampled_from([1, 1, 2])),
        "widest": draw(st.sampled_from([1.0, 0.9, 0.6])),
    }
    found = []
    for _ in range(draw(st.integers(1, 5))):
        rows, width = int(rng.integers(1, 4)), int(rng.integers(2, 17))
        classes = rng.permutation(np.repeat(np.arange(rows), width))
        values = np.round(rng.gamma(1.0, size=rows * width), 1)
        counts = allowed_counts(values.size, width, **limits)
        found.append(RankedGroup(values, classes, width, counts, ratio, ranking_scope=int(rng.integers(0, 2))))
    return found


def reach(ranked_group: RankedGroup) -> int:
    """Units that can go at most."""
    return int(ranked_group.counts[-1]) * ranked_group.per_step


@given(groups(), st.sampled_from(["local", "global"]), st.sampled_from(["nearest", "up", "down"]), st.booleans())
def test_what_was_asked_goes_up_to_rounding(ranked: list[RankedGroup], scope: str, rounding: str, add: bool) -> None:
    pooled = [RankedGroup(c.values, c.classes, c.steps, c.counts, c.ratio) for c in ranked]
    counts = allocate(pooled, scope, rounding, add)
    assert all(n == 0 or n in c.counts for n, c in zip(counts, pooled, strict=True))
    assert all(n < c.steps for n, c in zip(counts, pooled, strict=True))
    for pool in [range(len(pooled))] if scope == "global" else [[i] for i in range(len(pooled))]:
        taken = sum(counts[i] * pooled[i].per_step for i in pool)
        target = sum(pooled[i].ratio * pooled[i].values.size for i in pool)
        # A group whose counts do not begin at 0 jumps to the first of them.
        widest = max(int(np.diff([0, *pooled[i].counts]).max()) * pooled[i].per_step for i in pool)
        most = sum(reach(pooled[i]) for i in pool)
        low = min(target, most) - (widest if rounding != "up" else 1e-9)
        high = target + (widest if rounding != "down" else 0)
        if scope == "local" and rounding == "down":
            high = max(high, pooled[pool[0]].counts[0] * pooled[pool[0]].per_step)
        assert low - 1e-6 <= taken <= max(high, 0) + 1e-6


@given(groups())
def test_limits_hold(ranked: list[RankedGroup]) -> None:
    for ranked_group in ranked:
        removed = ranked_group.counts * ranked_group.per_step
        assert removed[0] >= 0 and removed[-1] < ranked_group.values.size
        assert (np.diff(removed) > 0).all()


def test_limits_one_by_one() -> None:
    assert allowed_counts(30, 30, round_to=8).tolist() == [6, 14, 22]
    assert allowed_counts(30, 30, step=8).tolist() == [0, 8, 16, 24]
    assert allowed_counts(10, 10, widest=0.35).tolist() == [0, 1, 2, 3]
    assert allowed_counts(12, 4, step=2).tolist() == [0, 2]
    assert allowed_counts(4, 2).tolist() == [0, 1]
    assert allowed_counts(5, 5, round_to=8).tolist() == [0, 1, 2, 3, 4]


def ranked_group(values: Sequence[float], ratio: float = 0.5, **more: object) -> RankedGroup:
    array = np.asarray(values, dtype=np.float64)
    return RankedGroup(array, np.zeros(array.size, np.int64), array.size, np.arange(array.size), ratio, **more)  # type: ignore[arg-type]


@given(st.integers(0, 1000), st.sampled_from([0.2, 0.5, 0.7]))
def test_global_is_a_sort(seed: int, ratio: float) -> None:
    """The lowest scores of all go, but the largest of each group stays."""
    rng = np.random.default_rng(seed)
    pools = [rng.random(int(rng.integers(2, 9))) for _ in range(4)]
    counts = allocate([ranked_group(p, ratio) for p in pools], "global", "nearest")
    everything = sorted(x for p in pools for x in np.sort(p)[:-1])
    target = ratio * sum(p.size for p in pools)
    wanted = min(len(everything), int(np.ceil(target - 0.5)))
    gone = [x for p, n in zip(pools, counts, strict=True) for x in np.sort(p)[:n]]
    assert sorted(gone) == everything[:wanted]


def test_a_cohort_has_its_own_threshold() -> None:
    cheap, dear = ranked_group([1, 2, 3, 4], ranking_scope="a"), ranked_group([10, 20, 30, 40], ranking_scope="b")
    assert allocate([cheap, dear], "isomorphic", "nearest") == [2, 2]
    same = [ranked_group([1, 2, 3, 4], ranking_scope="a"), ranked_group([10, 20, 30, 40], ranking_scope="a")]
    assert allocate(same, "isomorphic", "nearest") == [3, 1]


def test_a_ratio_of_its_own_is_kept_in_every_scope() -> None:
    own = ranked_group([1, 2, 3, 4], 0.25, is_local=True)
    assert allocate([own, ranked_group([10, 20, 30, 40])], "global", "nearest") == [1, 2]


def test_slamp_is_lamp_and_one_threshold() -> None:
    pools = [np.array([1.0, 1.0, 1.0, 4.0]), np.array([5.0, 6.0, 7.0])]
    scores = [lamp(p) for p in pools]
    counts = allocate([ranked_group(s, 0.5) for s in scores], "slamp", "down")
    ranked = sorted((s, i) for i, pool in enumerate(scores) for s in np.sort(pool)[:-1])
    assert counts == [sum(i == k for _, i in ranked[:3]) for k in (0, 1)]


def test_rows_lose_the_same_number_and_steps_rise() -> None:
    values = np.array([5.0, 1.0, 3.0, 2.0, 9.0, 8.0])
    classes = np.array([0, 0, 0, 1, 1, 1])
    one = RankedGroup(values, classes, 3, np.arange(3), 0.5)
    assert weakest(values, classes, 3, 1).tolist() == [1, 3]
    assert step_scores(one).tolist() == [1.5, 5.5, 7.0]
    assert step_scores(one, add=True).tolist() == [3.0, 11.0, 14.0]


def test_what_is_gone_stays_gone() -> None:
    values = np.array([np.nan, np.nan, -np.inf, 2.0, 1.0, 3.0])
    half = RankedGroup(values, np.array([0, 0, 1, 1, 2, 2]), 2, np.arange(2), 0.1)
    assert weakest(values, half.classes, 2, 1).tolist() == [2, 4]
    again = ranked_group([-np.inf, -np.inf, 5.0, 6.0], 0.25, num_removed=2)
    assert allocate([again], "local", "nearest") == [2]
    assert allocate([again], "global", "nearest") == [2]


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_nothing_asked_nothing_taken(rounding: str) -> None:
    assert allocate([ranked_group([1, 2, 3], 0.0)], "local", rounding) == [0]
    assert allocate([ranked_group([1, 2, 3], 0.0)], "global", rounding) == [0]


@pytest.mark.parametrize("rows", [1, 2])
def test_of_equal_units_the_first_go(rows: int) -> None:
    """As many as asked, whichever way they are found: by a threshold in one row, by rank in several."""
    values = np.tile([2.0, 1.0, 1.0, 1.0, 0.0], rows)
    classes = np.repeat(np.arange(rows), 5)
    for count, places in enumerate([[], [4], [1, 4], [1, 2, 4], [1, 2, 3, 4]]):
        expected = np.concatenate([np.add(places, 5 * row, dtype=float) for row in range(rows)])
        assert np.array_equal(np.sort(weakest(values, classes, 5, count)), expected.astype(int))


def test_equal_scores_are_in_each_others_sum() -> None:
    assert np.allclose(lamp(np.array([1.0, 1.0])), [0.5, 0.5])
    assert np.allclose(lamp(np.array([3.0, 1.0, 1.0, 2.0])), [1.0, 1 / 15, 1 / 15, 4 / 13])


def test_groups_with_equal_scores_give_in_order() -> None:
    """One threshold over two groups of equal scores: the first group is asked first, and the sum is what was asked."""
    ranked = [RankedGroup(np.ones(4), np.zeros(4, int), 4, np.arange(4), 0.25) for _ in range(2)]
    assert allocate(ranked, "global", "nearest") == [2, 0]
