"""Budget: find the counts that keep most within targets, cut and repair; the smallest model within a drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from onnxprune.budget.sensitivity import Sensitivity
from onnxprune.budget.target import Target
from onnxprune.criteria import Criterion
from onnxprune.errors import BudgetError, UsageError
from onnxprune.passes.attempt import ENOUGH, Attempt, attempt, of_original
from onnxprune.passes.describe import fill_report
from onnxprune.passes.freeze import freeze
from onnxprune.passes.material import no_data
from onnxprune.passes.measure import said
from onnxprune.passes.problem import Answer, Curves, Problem, tolerance
from onnxprune.passes.prune import Prune, reasons
from onnxprune.passes.recover import check_mode
from onnxprune.passes.select import Selector
from onnxprune.passes.sensitivity import measure_sensitivity
from onnxprune.passes.shortfall import Shortfall
from onnxprune.passes.state import State
from onnxprune.passes.table import latency_table, settled
from onnxprune.passes.wishes import Wishes
from onnxprune.planning import make_plan
from onnxprune.report.facts import AnswerFacts, BudgetFacts, TargetFacts
from onnxprune.rewrite.cut import CannotRewrite
from onnxprune.selection.request import WIDEST, Options

WITH_DATA, WITHOUT = "ziplm", "l2"
# How often a budget is halved towards the smallest that works.
_HALVINGS = 6


@dataclass(slots=True)
class _Found:
    """A problem, the answers that were compared, the best of them and its full repair."""

    problem: Problem
    tried: list[tuple[Answer, Attempt]]
    best: Answer
    final: Attempt


class Budget:
    """Cut to targets.

    Counts per group come from a knapsack over scores (or measured sensitivities) and costs, see
    :func:`onnxprune.budget.allocate.allocate`. They are held against the same share for every group: both are cut,
    repaired from 128 samples and measured, and the better one is repaired from all data.

    Args:
        wishes: targets and gates. criterion: what scores units; ``ziplm`` with data, ``l2`` without.
        recover: how to repair; why: who says so, for the report. approximate: also cut through normalisations.
        options: of :class:`onnxprune.selection.request.Request` that say which groups are cut and how their units are
            scored.

    Raises:
        BudgetError: a target cannot be reached or a gate not be met: with the best that was, what limits it, and the
            nearest budget that works.
    """

    def __init__(
        self,
        wishes: Wishes,
        criterion: str | Criterion | None = None,
        *,
        recover: str = "none",
        why: str = "asked for",
        approximate: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self.wishes, self.criterion, self.mode, self.why = wishes, criterion, check_mode(recover), why
        self.approximate, self.options = approximate, options
        if options.get("steps", 1) != 1:
            raise UsageError("--steps has no meaning with a budget", hint="Counts are chosen at once: drop it.")
        if options.get("max_ratio") is None:
            self.options = {**options, "max_ratio": WIDEST}

    def __call__(self, state: State) -> None:
        """Find, cut, repair; fill plan and report."""
        if self.mode != "none" and state.data is None:
            raise no_data(self.mode)
        criterion = self.criterion or default_criterion(state)
        prune = Prune(criterion, 0.5, approximate=self.approximate, **self.options)
        analysis = state.analyzed(self.approximate)
        before = of_original(analysis, self.wishes.metric)
        for _ in range(len(analysis.graph.nodes) + 1):
            try:
                with state.stage("budget"):
                    found = self._search(state, prune, before)
            except CannotRewrite as stop:
                freeze(analysis, stop, np.ones(analysis.units.component.size, dtype=bool))
            else:
                break
        _adopt(state, found.final)
        facts = self._facts(found, before)
        settings = {"criterion": prune.name, **prune.request.settings, "scope": "budget"}
        removed, selector = found.best.removed, found.problem.selector

        def describe() -> None:
            state.plan = make_plan(analysis, removed, prune.name)
            state.report.settings = settings
            fill_report(analysis, removed, state.weights, state, selector)
            own = found.final.state.report
            own.recovery.mode, own.recovery.why = self.mode, self.why
            state.report.recovery, state.report.repairs = own.recovery, own.repairs
            state.report.warnings += own.warnings
            state.report.budget = facts

        state.later.append(describe)

    # -- the search ------------------------------------------------------------------------------------------------

    def _search(self, state: State, prune: Prune, before: float) -> _Found:
        wishes = self.wishes
        problem = self._problem(state, prune, wishes.targets or (Target("macs", 1.0),))
        if wishes.targets:
            found = self._within(state, problem)
            gap = self._missing(found.final, before)
            if gap:
                raise Shortfall(problem).gate(gap, self._nearest(state, problem, before))
            return found
        return self._smallest(state, problem, before)

    def _problem(self, state: State, prune: Prune, targets: Sequence[Target]) -> Problem:
        analysis = prune.prepared(state)
        table = None
        if any(t.kind == "latency" for t in targets):
            table = latency_table(state, analysis, settled(analysis), given=self.wishes.latency_table)
        selector = prune.selector(state)
        if not any(ratio is not None for ratio in selector.asked.values()):
            raise BudgetError("No channel of this model can be removed.", hint=reasons(analysis))
        return Problem(state, selector, targets, table, self._curves(state, selector))

    def _curves(self, state: State, selector: Selector) -> Curves | None:
        """Measured losses by group, where they were asked for."""
        given = self.wishes.sensitivity
        if given is None:
            return None
        if isinstance(given, str) and given == "measure":
            mode, metric, jobs = self.mode, self.wishes.metric, self.wishes.jobs
            return measure_sensitivity(state, selector, mode=mode, metric=metric, jobs=jobs).losses()
        found = given if isinstance(given, Sensitivity) else Sensitivity.load(given)
        where = "" if isinstance(given, Sensitivity) else repr(str(given))
        found.check_model(selector.analysis.loaded.sha256, where)
        return found.losses()

    def _within(self, state: State, problem: Problem) -> _Found:
        """The best answer within the targets, repaired in full; limits are tightened where a repair adds to the size.

        Raises:
            BudgetError: a target is out of reach.
        """
        for last in (False, False, True):
            answers = problem.answers()
            if not answers:
                raise Shortfall(problem).unreachable()
            tried = [(a, self._attempt(state, problem, a, ENOUGH)) for a in answers] if len(answers) > 1 else []
            best, final = max(tried, key=lambda pair: pair[1].quality.fine) if tried else (answers[0], None)
            if final is not None and problem.tighten(problem.over(best, final)) and not last:
                continue  # a repair added to the size: a little less is kept, before the effort of repairing it all
            final = self._attempt(state, problem, best, None)
            over = problem.over(best, final)
            if all(o <= 1 + tolerance(k) for k, o in over.items()):
                return _Found(problem, tried, best, final)
            problem.tighten(over)
        raise Shortfall(problem).missed(best)

    def _attempt(self, state: State, problem: Problem, answer: Answer, samples: int | None) -> Attempt:
        mode = self.mode if answer.removed.any() else "none"
        metric = self.wishes.metric
        return attempt(state, problem.analysis, answer.removed, mode=mode, metric=metric, samples=samples)

    def _missing(self, final: Attempt, before: float) -> str:
        """What a gate has against a model; empty where it passes."""
        wishes, quality = self.wishes, final.quality
        what = said(wishes.metric, quality.fidelity)
        if wishes.max_drop is not None and before - quality.points > wishes.max_drop + 1e-9:
            lost = before - quality.points
            return f"{what} fell from {before:.4g} to {quality.points:.4g}: {lost:.3g} > --max-drop {wishes.max_drop:g}"
        cosine = 1.0 if quality.fidelity is None else quality.fidelity.worst_cosine
        if wishes.min_fidelity is not None and not cosine >= wishes.min_fidelity:
            return f"worst cosine {cosine:.4f} is below --min-fidelity {wishes.min_fidelity:g}"
        return ""

    def _smallest(self, state: State, problem: Problem, before: float) -> _Found:
        """The fewest MACs within the gates, by bisection on the share kept.

        Raises:
            BudgetError: not even the smallest cut keeps within them.
        """
        low, high = problem.reachable("macs") / problem.originals["macs"], 1.0
        found: _Found | None = None
        for _ in range(_HALVINGS):
            share = 0.5 * (low + high)
            answer = problem.aim(Target("macs", share))
            if answer is None:
                low = share
                continue
            final = self._attempt(state, problem, answer, None)
            if self._missing(final, before):
                low = share
            else:
                high, found = share, _Found(problem, [], answer, final)
        if found is None:
            raise Shortfall(problem).gate(self._missing(final, before), None)
        return found

    def _nearest(self, state: State, problem: Problem, before: float) -> tuple[Target, ...] | None:
        """The budget between the one asked for and the whole model that is nearest to it and passes the gates."""
        low, high = 0.0, 1.0
        passing: tuple[Target, ...] | None = None
        for _ in range(_HALVINGS - 1):
            middle = 0.5 * (low + high)
            targets = problem.towards_whole(middle)
            answer = problem.aim(*targets)
            if answer is not None and not self._missing(self._attempt(state, problem, answer, None), before):
                high, passing = middle, targets
            else:
                low = middle
        return passing

    def _facts(self, found: _Found, before: float) -> BudgetFacts:
        problem, best = found.problem, found.best
        limits = problem.limits()
        asked = {t.kind: str(t) for t in self.wishes.targets}
        targets = [TargetFacts(k, asked[k], limits[k], problem.base(k), best.costs[k], problem.how(k)) for k in asked]
        answers = [AnswerFacts(a.name, t.quality.fine, t.quality.points, chosen=a is best) for a, t in found.tried] or [
            AnswerFacts(best.name, found.final.quality.fine, found.final.quality.points, chosen=True)
        ]
        gap = best.allocation.gap if np.isfinite(best.allocation.bound) else None
        quality = found.final.quality
        what = said(self.wishes.metric, quality.fidelity)
        return BudgetFacts(targets, answers, gap, what, before, quality.points, self.wishes.max_drop)


def default_criterion(state: State) -> str:
    """The criterion where nobody says: what others can make up for, or what needs no data."""
    return WITHOUT if state.data is None else WITH_DATA


def _adopt(state: State, final: Attempt) -> None:
    """Make the tried model the run's own."""
    own = final.state
    state.proto, state.weights, state.removed = own.proto, own.weights, own.removed
    state.unrepaired, state.judged_on = own.unrepaired, own.judged_on
