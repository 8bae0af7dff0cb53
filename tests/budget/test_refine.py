"""Answers around the best one: better by the judge's word, within the limits, no more than were asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.budget.target import parse
from onnxprune.passes.prune import Prune
from onnxprune.pipeline import Context
from onnxprune.search.attempt import Attempt
from onnxprune.search.measure import Quality
from onnxprune.search.problem import Answer, Problem
from onnxprune.search.refine import NAME, Refine, cuts

MODELS = Path(__file__).parents[2] / "models"


def problem(*targets: str) -> Problem:
    context = Context.of(MODELS / "residual.onnx")
    prune = Prune("l2", 0.5, max_ratio=0.9)
    return Problem(context, prune.selector(context, context.analysis), [parse(t) for t in targets])


class Judge:
    """Likes counts that are near to some, and counts how often it was asked."""

    def __init__(self, wanted: np.ndarray) -> None:
        self.wanted, self.asked = wanted, 0

    def __call__(self, answer: Answer) -> Attempt:
        self.asked += 1
        return self.of(answer)

    def of(self, answer: Answer) -> Attempt:
        far = -float(np.square(np.log(answer.allocation.kept / self.wanted)).sum())
        return Attempt(None, (), Quality(far, far), 0, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [("macs=0.5",), ("macs=0.6", "size=300kB")])
def test_what_groups_are_worth_is_found_by_trial(targets: tuple[str, ...]) -> None:
    """The judge wants the group that scores give least to stay whole: no score knows that."""
    one = problem(*targets)
    answers = one.answers()
    wanted = answers[0].allocation.kept.copy()
    group = int(np.argmin(wanted / one.sizes.steps))
    wanted[group] = one.sizes.steps[group]
    judge = Judge(wanted)
    tried = [(a, judge.of(a)) for a in answers]
    found = Refine(cuts(one), judge, 24).around(tried)
    assert 0 < judge.asked == len(found) <= 24
    assert len({a.allocation.kept.tobytes() for a, _ in [*tried, *found]}) == len(tried) + len(found)
    for answer, _ in found:
        assert answer.name == NAME
        assert all(answer.costs[k] <= most for k, most in one.limits().items())
    before, after = (max(pairs, key=lambda pair: pair[1].quality.fine) for pairs in (tried, found))
    assert after[1].quality.fine > 0.7 * before[1].quality.fine  # both are below 0


def test_it_starts_from_the_best_whatever_that_is() -> None:
    """Weights are found for which the knapsack gives what is nearly the same share everywhere."""
    one = problem("macs=0.5")
    answers = one.answers()
    assert answers[-1].name == "uniform"
    judge = Judge(answers[-1].allocation.kept)
    found = Refine(cuts(one), judge, 16).around([(a, judge.of(a)) for a in answers])
    best = max(found, key=lambda pair: pair[1].quality.fine)
    start = judge.of(answers[0]).quality.fine
    assert best[1].quality.fine > 0.7 * start


def test_no_more_trials_than_asked_for() -> None:
    one = problem("macs=0.5")
    judge = Judge(one.sizes.steps)
    tried = [(a, judge.of(a)) for a in one.answers()]
    assert len(Refine(cuts(one), judge, 2).around(tried)) == 2
    assert Refine(cuts(one), judge, 0).around(tried) == []
