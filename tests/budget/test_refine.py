"""Candidates around the best one: better by the judge's word, within the limits, no more than were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.passes.prune import Prune
from onnxprune.pipeline import Context
from onnxprune.search.evaluation import Evaluation, Quality
from onnxprune.search.problem import Candidate, SearchProblem
from onnxprune.search.refine import NAME, Refine, cuts
from onnxprune.targets import parse

MODELS = Path(__file__).parents[2] / "models"


def problem(*targets: str) -> SearchProblem:
    context = Context.of(MODELS / "residual.onnx")
    prune = Prune("l2", 0.5, max_ratio=0.9)
    return SearchProblem.of(context, prune.selector(context, context.analysis), [parse(t) for t in targets])


class Judge:
    """Likes counts that are near to some, and counts how often it was asked."""

    def __init__(self, wanted: np.ndarray) -> None:
        self.wanted, self.asked = wanted, 0

    def __call__(self, candidate: Candidate) -> Evaluation:
        self.asked += 1
        return self.of(candidate)

    def of(self, candidate: Candidate) -> Evaluation:
        far = -float(np.square(np.log(candidate.allocation.counts / self.wanted)).sum())
        return Evaluation(None, (), Quality(far, far), 0, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [("macs=0.5",), ("macs=0.6", "size=300kB")])
def test_what_groups_are_worth_is_found_by_trial(targets: tuple[str, ...]) -> None:
    """The judge wants the group that scores give least to stay whole: no score knows that."""
    one = problem(*targets)
    candidates = one.candidates()
    wanted = candidates[0].allocation.counts.copy()
    group = int(np.argmin(wanted / one.sizes.steps))
    wanted[group] = one.sizes.steps[group]
    judge = Judge(wanted)
    tried = [(a, judge.of(a)) for a in candidates]
    found = Refine(cuts(one), judge, 24).around(tried)
    assert 0 < judge.asked == len(found) <= 24
    assert len({a.allocation.counts.tobytes() for a, _ in [*tried, *found]}) == len(tried) + len(found)
    for candidate, _ in found:
        assert candidate.name == NAME
        assert all(candidate.costs[k] <= most for k, most in one.limits().items())
    before, after = (max(pairs, key=lambda pair: pair[1].quality.fine) for pairs in (tried, found))
    assert after[1].quality.fine > 0.7 * before[1].quality.fine  # both are below 0


def test_it_starts_from_the_best_whatever_that_is() -> None:
    """Weights are found for which the knapsack gives what is nearly the same share everywhere."""
    one = problem("macs=0.5")
    candidates = one.candidates()
    assert candidates[-1].name == "uniform"
    judge = Judge(candidates[-1].allocation.counts)
    found = Refine(cuts(one), judge, 16).around([(a, judge.of(a)) for a in candidates])
    best = max(found, key=lambda pair: pair[1].quality.fine)
    start = judge.of(candidates[0]).quality.fine
    assert best[1].quality.fine > 0.7 * start


def test_no_more_trials_than_asked_for() -> None:
    one = problem("macs=0.5")
    judge = Judge(one.sizes.steps)
    tried = [(a, judge.of(a)) for a in one.candidates()]
    assert len(Refine(cuts(one), judge, 2).around(tried)) == 2
    assert Refine(cuts(one), judge, 0).around(tried) == []


def test_candidates_are_corrected_until_they_fit_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate costs an eighth more than was predicted, as times do; none is lost to that."""
    measured = SearchProblem.measured

    def dearer(self: SearchProblem, *args: Any, **options: Any) -> dict[str, float]:
        return {kind: 1.125 * cost for kind, cost in measured(self, *args, **options).items()}

    monkeypatch.setattr(SearchProblem, "measured", dearer)
    one = problem("macs=0.5")
    candidates = one.candidates()
    judge = Judge(one.sizes.steps)
    tried = [(a, judge.of(a)) for a in candidates]
    start = candidates[0].corrections
    assert start["macs"] < 1
    found = Refine(cuts(one, start), judge, 12).around(tried)
    assert len(found) >= 6
    for candidate, _ in found:
        assert 0.4 * one.base("macs") < candidate.costs["macs"] <= one.limits()["macs"]
    assert len({a.allocation.counts.tobytes() for a, _ in [*tried, *found]}) == len(tried) + len(found)
