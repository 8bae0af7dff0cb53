"""Candidates around the best one: change the loss weight of one group or layer at a time, and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Cost
from onnxprune.allocation.knapsack import Allocation, Choices, Limit, LossWeights, allocate
from onnxprune.search.evaluation import Evaluation
from onnxprune.search.problem import Candidate, Evaluated, SearchProblem, best_of

Array = NDArray[np.float64]

NAME = "knapsack with groups weighed by trial"
# Factors on a group's loss weight in a trial, first and later.
_FACTORS = (3.0, 1.6)
# The least predicted gain of a candidate, as a share of the best one's loss.
_PROMISING = 0.02
# Counts of one candidate to measure at most, until they fit.
_CORRECTIONS = 3
# Loss weights beyond this mean that the slope is unknown.
_EXTREME = 1e3


@dataclass(frozen=True, slots=True)
class Space:
    """The search space: columns of counts with their losses and costs.

    Attributes:
        choices: levels and losses of every column.
        costs: of counts [cuts, columns], by kind.
        limits: the limit of every kind.
        candidate: makes a candidate of an allocation and its loss weights [columns]; None where that is impossible.
        source: weights of 1 lead to candidates of that source, and to those that factorize layers.
    """

    choices: Choices
    costs: Mapping[str, Cost]
    limits: Mapping[str, float]
    candidate: Callable[[Array, Allocation], Candidate | None]
    source: str

    def allocate(self, weights: Array) -> Allocation | None:
        """Return counts [columns] for these loss weights of the columns."""
        limits = [Limit(self.costs[k], maximum) for k, maximum in self.limits.items()]
        return allocate(weighed(self.choices, weights), limits)


def cuts(problem: SearchProblem, corrections: Mapping[str, float] | None = None) -> Space:
    """Return the search space of a problem's groups.

    Args:
        problem: groups, costs and targets.
        corrections: factors on the limits by kind at which a candidate fitted as measured, to start from.
    """
    problem = replace(problem, corrections={**problem.corrections, **(corrections or {})})

    def candidate(weights: Array, _: Allocation) -> Candidate | None:
        def solve(choices: Choices, limits: Sequence[Limit]) -> Allocation | None:
            return allocate(weighed(choices, weights), limits)

        candidate = problem.candidate(NAME, problem.lead, solve, _CORRECTIONS)
        return None if candidate is None else replace(candidate, source="")

    return Space(problem.choices[problem.lead], problem.costs, problem.corrected_limits(), candidate, problem.lead)


def weighed(choices: Choices, weights: Array) -> Choices:
    """Return choices whose losses are multiplied by the weights [columns] of their columns."""
    return Choices(choices.options, [w * x for w, x in zip(weights, choices.losses, strict=True)])


class Refine:
    """A search over the loss weights of groups, by coordinates and by a fit to the evaluations.

    Scores measure a group alone; its interaction with others shows when all are pruned. A knapsack with one group's
    losses multiplied trades units between that group and others within the limits. Such candidates are tried for the
    most expensive groups first, and kept where the outputs come closer to the original's. In between, loss weights
    fitted to all evaluations so far (see :class:`onnxprune.allocation.knapsack.LossWeights`) are tried, as long as they
    improve the result.

    Args:
        space: groups, and layers that may be factorized.
        judge: evaluates a candidate; returns None where it cannot be made.
        trials: number of candidates to try.
        whole: quality of the original.
    """

    def __init__(
        self, space: Space, judge: Callable[[Candidate], Evaluation | None], trials: int, original_fine: float = 0.0
    ) -> None:
        self._space, self._judge, self._remaining_trials = space, judge, trials
        self._choices = space.choices
        self._learned = LossWeights(space.choices, original_fine)
        self._known: set[bytes] = set()

    def around(self, evaluated: Sequence[Evaluated]) -> list[Evaluated]:
        """Return further evaluated candidates.

        Args:
            evaluated: the known candidates; the search starts at the best of them.
        """
        best_candidate, best_evaluation = best_of(evaluated)
        self._known = {a.allocation.counts.tobytes() for a, _ in evaluated}
        best, center = best_evaluation.quality.fine, self._weights(best_candidate)
        start = self._space.allocate(center) if best_candidate.factorize is not None else None
        self._known |= set() if start is None else {start.counts.tobytes()}
        for candidate, evaluation in evaluated:
            counts = candidate.allocation.counts if start is None else start.counts
            self._learned.add(counts, evaluation.quality.fine)
        new_pairs: list[Evaluated] = []

        def better(weights: Array) -> bool:
            nonlocal best, center
            candidate_pair = self._try(weights)
            if candidate_pair is None:
                return False
            new_pairs.append(candidate_pair)
            if candidate_pair[1].quality.fine <= best:
                return False
            best, center = candidate_pair[1].quality.fine, weights
            return True

        def follow() -> None:
            while self._remaining_trials > 0 and (weights := self._learnt()) is not None and better(weights):
                pass

        follow()
        other_weights = [self._weights(a) for a, _ in evaluated if a is not best_candidate]
        for rival in other_weights:  # half the way between two candidates
            better(np.sqrt(center * rival))
        for factor in _FACTORS:
            for group in self._order():
                for step in (factor, 1.0 / factor):
                    improved = False
                    while self._remaining_trials > 0 and better(_scaled(center, group, step)):
                        improved = True
                    if improved:
                        break
                follow()
        return new_pairs

    def _learnt(self) -> Array | None:
        """Return loss weights fitted to all evaluations; None where they predict almost no gain, or nothing new."""
        weights = self._learned.weights()
        allocation = self._space.allocate(weights)
        if allocation is None or allocation.counts.tobytes() in self._known:
            return None
        return weights if self._learned.gain(allocation.counts, weights) > _PROMISING else None

    def _try(self, weights: Array) -> Evaluated | None:
        """Evaluate the candidate at these weights; None where it is known, or no trial is left.

        Its counts may differ from the predicted ones, which measured costs may not bear out.
        """
        if self._remaining_trials <= 0:
            return None
        allocation = self._space.allocate(weights)
        if allocation is None or (predicted := allocation.counts.tobytes()) in self._known:
            return None
        self._known.add(predicted)
        self._remaining_trials -= 1
        candidate = self._space.candidate(weights, allocation)
        if candidate is None:
            return None
        counts = allocation.counts if candidate.factorize is not None else candidate.allocation.counts
        if counts.tobytes() != predicted and counts.tobytes() in self._known:
            return None
        self._known.add(counts.tobytes())
        evaluation = self._judge(candidate)
        if evaluation is None:
            return None
        self._learned.add(counts, evaluation.quality.fine)
        return candidate, evaluation

    def _order(self) -> list[int]:
        """Return columns with a choice, those first whose units cost most in all."""
        saved = self._slopes(np.array([k[-1] for k in self._choices.options]))[0] * [
            k[-1] for k in self._choices.options
        ]
        return [int(g) for g in np.argsort(-saved, kind="stable") if self._choices.options[g].size > 1]

    def _weights(self, candidate: Candidate) -> Array:
        """Return the loss weights of a candidate in the knapsack: cost over loss of the last unit of a group."""
        if candidate.factorize is not None or candidate.source == self._space.source:
            return np.ones(len(self._choices.options))
        cost, loss = self._slopes(candidate.allocation.counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.where((cost > 0) & (loss > 0), cost / loss, np.nan)
        middle = np.exp(np.nanmean(np.log(weights))) if np.isfinite(weights).any() else 1.0
        return np.asarray(np.clip(np.nan_to_num(weights / middle, nan=1.0), 1 / _EXTREME, _EXTREME))

    def _slopes(self, counts: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return (cost, loss) [columns] of one unit of every column at some counts; cost in shares of the limits."""
        low, high, losses = [], [], []
        for group, (levels, loss) in enumerate(zip(self._choices.options, self._choices.losses, strict=True)):
            index = int(np.argmin(np.abs(levels - counts[group])))
            i, j = max(index - 1, 0), min(index + 1, levels.size - 1)
            pair = np.repeat(counts[None], 2, axis=0)
            pair[:, group] = levels[[i, j]]
            low.append(pair[0])
            high.append(pair[1])
            losses.append((loss[i] - loss[j]) / max(levels[j] - levels[i], 1))
        width = np.maximum((np.array(high) - np.array(low)).sum(axis=1), 1)
        costs = np.zeros(width.size)
        for kind, maximum in self._space.limits.items():
            cost = self._space.costs[kind]
            costs += (cost.rows(np.array(high)).max(axis=1) - cost.rows(np.array(low)).max(axis=1)) / maximum / width
        return costs, np.array(losses)


def _scaled(weights: Array, group: int, factor: float) -> Array:
    after = weights.copy()
    after[group] *= factor
    return after
