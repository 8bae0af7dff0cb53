"""Answers around the best one: a little more for one group or layer at a time, carried out, repaired and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.budget.allocate import Allocation, Choices, Limit, allocate
from onnxprune.budget.costs import Cost
from onnxprune.budget.learn import Learned
from onnxprune.search.attempt import Attempt
from onnxprune.search.problem import Answer, Problem

Array = NDArray[np.float64]
Tried = tuple[Answer, Attempt]

NAME = "knapsack with groups weighed by trial"
# How much more or less a group's loss counts in a trial, first and later.
_FACTORS = (3.0, 1.6)
# The share of what the best answer loses that others have to promise to lose less.
_PROMISING = 0.02
# Weights of single groups beyond this say that a slope could not be read.
_EXTREME = 1e3


@dataclass(frozen=True, slots=True)
class Space:
    """Where answers are looked for: columns of counts with what they lose and cost.

    Attributes:
        choices: what every column may do. costs: of counts [cuts, columns], by kind. limits: the most of every kind.
        answer: what comes of an allocation, given the weights [columns] that led to it; None where nothing does.
        source: weights of 1 lead to answers of that source, and to those that take layers apart.
    """

    choices: Choices
    costs: Mapping[str, Cost]
    limits: Mapping[str, float]
    answer: Callable[[Array, Allocation], Answer | None]
    source: str

    def allocate(self, weights: Array) -> Allocation | None:
        """Counts [columns] where the losses of every column count so much."""
        losses = [w * x for w, x in zip(weights, self.choices.losses, strict=True)]
        limits = [Limit(self.costs[k], most) for k, most in self.limits.items()]
        return allocate(Choices(self.choices.kept, losses), limits)


def cuts(problem: Problem) -> Space:
    """The groups of a problem."""

    def answer(_: Array, found: Allocation) -> Answer | None:
        removed = problem.removed(found.kept)
        one = Answer(NAME, found, removed, problem.measured(found.kept, removed))
        return None if any(one.costs[k] > most for k, most in problem.limits().items()) else one

    return Space(problem.choices[problem.lead], problem.costs, problem.pressed(), answer, problem.lead)


class Refine:
    """A search over what the loss of each group counts, by coordinates and by what the answers on the way tell.

    Scores see a group alone; what it is worth beside the others shows when all are cut. A knapsack with one group's
    losses multiplied takes from it or gives to it what others can best give or take, within the limits; such answers
    are tried for the dearest groups first, and kept where the outputs come closer to the original's. In between,
    weights that would explain all answers so far (see :class:`onnxprune.budget.learn.Learned`) are tried, as long as
    that helps.

    Args:
        space: groups, and layers that may be taken apart. judge: carries out, repairs and measures; None where an
            answer cannot be carried out. trials: how many answers. whole: how good the original is.
    """

    def __init__(
        self, space: Space, judge: Callable[[Answer], Attempt | None], trials: int, whole: float = 0.0
    ) -> None:
        self._space, self._judge, self._left = space, judge, trials
        self._choices = space.choices
        self._learned = Learned(space.choices, whole)
        self._known: set[bytes] = set()

    def around(self, tried: Sequence[Tried]) -> list[Tried]:
        """Answers that were tried besides. ``tried``: the ones there are, of which the best is where it starts."""
        answer, attempt = max(tried, key=lambda pair: pair[1].quality.fine)
        self._known = {a.allocation.kept.tobytes() for a, _ in tried}
        best, here = attempt.quality.fine, self._weights(answer)
        start = self._space.allocate(here) if answer.apart is not None else None
        self._known |= set() if start is None else {start.kept.tobytes()}
        for one, its in tried:
            self._learned.add(one.allocation.kept if start is None else start.kept, its.quality.fine)
        found: list[Tried] = []

        def better(weights: Array) -> bool:
            nonlocal best, here
            one = self._try(weights)
            if one is None:
                return False
            found.append(one)
            if one[1].quality.fine <= best:
                return False
            best, here = one[1].quality.fine, weights
            return True

        def follow() -> None:
            while self._left > 0 and (weights := self._learnt()) is not None and better(weights):
                pass

        follow()
        others = [self._weights(a) for a, _ in tried if a is not answer]
        for other in others:  # half the way between two answers
            better(np.sqrt(here * other))
        for factor in _FACTORS:
            for group in self._order():
                for step in (factor, 1.0 / factor):
                    moved = False
                    while self._left > 0 and better(_scaled(here, group, step)):
                        moved = True
                    if moved:
                        break
                follow()
        return found

    def _learnt(self) -> Array | None:
        """Weights that all answers so far speak for; None where they promise next to nothing, or nothing new."""
        weights = self._learned.weights()
        allocation = self._space.allocate(weights)
        if allocation is None or allocation.kept.tobytes() in self._known:
            return None
        return weights if self._learned.gain(allocation.kept, weights) > _PROMISING else None

    def _try(self, weights: Array) -> Tried | None:
        """The answer at these weights, carried out; None where it is known, or no trial is left."""
        if self._left <= 0:
            return None
        allocation = self._space.allocate(weights)
        if allocation is None or allocation.kept.tobytes() in self._known:
            return None
        self._known.add(allocation.kept.tobytes())
        self._left -= 1
        answer = self._space.answer(weights, allocation)
        attempt = None if answer is None else self._judge(answer)
        if attempt is not None:
            self._learned.add(allocation.kept, attempt.quality.fine)
        return None if answer is None or attempt is None else (answer, attempt)

    def _order(self) -> list[int]:
        """Columns with a choice, those first whose units cost most in all."""
        saved = self._slopes(np.array([k[-1] for k in self._choices.kept]))[0] * [k[-1] for k in self._choices.kept]
        return [int(g) for g in np.argsort(-saved, kind="stable") if self._choices.kept[g].size > 1]

    def _weights(self, answer: Answer) -> Array:
        """What losses have to count for the knapsack to give an answer: cost over loss of the last unit of a group."""
        if answer.apart is not None or answer.source == self._space.source:
            return np.ones(len(self._choices.kept))
        cost, loss = self._slopes(answer.allocation.kept)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.where((cost > 0) & (loss > 0), cost / loss, np.nan)
        middle = np.exp(np.nanmean(np.log(weights))) if np.isfinite(weights).any() else 1.0
        return np.asarray(np.clip(np.nan_to_num(weights / middle, nan=1.0), 1 / _EXTREME, _EXTREME))

    def _slopes(self, kept: NDArray[np.int64]) -> tuple[Array, Array]:
        """(cost, loss) [columns] of one unit of every column at some counts; the cost in shares of the limits."""
        low, high, losses = [], [], []
        for group, (levels, loss) in enumerate(zip(self._choices.kept, self._choices.losses, strict=True)):
            at = int(np.argmin(np.abs(levels - kept[group])))
            i, j = max(at - 1, 0), min(at + 1, levels.size - 1)
            pair = np.repeat(kept[None], 2, axis=0)
            pair[:, group] = levels[[i, j]]
            low.append(pair[0])
            high.append(pair[1])
            losses.append((loss[i] - loss[j]) / max(levels[j] - levels[i], 1))
        width = np.maximum((np.array(high) - np.array(low)).sum(axis=1), 1)
        costs = np.zeros(width.size)
        for kind, most in self._space.limits.items():
            cost = self._space.costs[kind]
            costs += (cost.rows(np.array(high)).max(axis=1) - cost.rows(np.array(low)).max(axis=1)) / most / width
        return costs, np.array(losses)


def _scaled(weights: Array, group: int, factor: float) -> Array:
    after = weights.copy()
    after[group] *= factor
    return after
