"""Budget: find the counts that keep most within targets, cut and repair; the smallest model within a drop."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from onnxprune.criteria import Criterion
from onnxprune.errors import UsageError
from onnxprune.passes.describe import fill_report
from onnxprune.passes.freeze import freeze
from onnxprune.passes.material import no_data
from onnxprune.passes.prune import Prune
from onnxprune.passes.recover import check_mode
from onnxprune.passes.state import State
from onnxprune.planning import make_plan
from onnxprune.report.facts import AnswerFacts, BudgetFacts, TargetFacts
from onnxprune.rewrite.cut import CannotRewrite
from onnxprune.search.attempt import Attempt, of_original
from onnxprune.search.measure import said
from onnxprune.search.problem import Answer
from onnxprune.search.search import Found, Search
from onnxprune.search.wishes import Wishes
from onnxprune.selection.request import WIDEST, Options

WITH_DATA, WITHOUT = "ziplm", "l2"


class Budget:
    """Cut to targets.

    Counts per group come from knapsacks over scores, over what cutting each group alone does to the outputs (with data)
    or over measured sensitivities, and costs, see :func:`onnxprune.budget.allocate.allocate`. They are held against the
    same share for every group: all are cut, repaired from 128 samples and measured. Others are tried around the best,
    see :class:`onnxprune.search.refine.Refine`, and the best of all is repaired from all data. Where wished, layers may
    be taken apart as well, see :class:`onnxprune.search.mixture.Mixture`.

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

    def prune(self, state: State) -> Prune:
        """What scores the units."""
        criterion = self.criterion or default_criterion(state)
        return Prune(criterion, 0.5, approximate=self.approximate, **self.options)

    def __call__(self, state: State) -> None:
        """Find, cut, repair; fill plan and report."""
        if self.mode != "none" and state.data is None:
            raise no_data(self.mode)
        prune = self.prune(state)
        analysis = prune.prepared(state)
        search = Search(state, self.wishes, prune, self.mode)
        before = of_original(analysis, self.wishes.metric)
        for _ in range(len(analysis.graph.nodes) + 1):
            try:
                with state.stage("budget"):
                    found = search(before)
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
            if found.best.apart is not None:
                _describe_factors(state, found.final.state)

        state.later.append(describe)

    def _facts(self, found: Found, before: float) -> BudgetFacts:
        problem, best = found.problem, found.best
        limits = problem.limits()
        asked = {t.kind: str(t) for t in self.wishes.targets}
        targets = [TargetFacts(k, asked[k], limits[k], problem.base(k), best.costs[k], problem.how(k)) for k in asked]
        tried = _best(found) or [(best, found.final)]
        answers = [AnswerFacts(a.name, t.quality.fine, t.quality.points, chosen=a is best) for a, t in tried]
        gap = best.allocation.gap if np.isfinite(best.allocation.bound) else None
        quality = found.final.quality
        what = said(self.wishes.metric, quality.fidelity)
        return BudgetFacts(targets, answers, gap, what, before, quality.points, self.wishes.max_drop)


def default_criterion(state: State) -> str:
    """The criterion where nobody says: what others can make up for, or what needs no data."""
    return WITHOUT if state.data is None else WITH_DATA


def _best(found: Found) -> list[tuple[Answer, Attempt]]:
    """The best answer of every name."""
    by_name: dict[str, tuple[Answer, Attempt]] = {}
    for answer, tried in found.tried:
        held = by_name.get(answer.name)
        if answer is found.best or held is None or tried.quality.fine > held[1].quality.fine:
            by_name[answer.name] = answer, tried
    return list(by_name.values())


def _describe_factors(state: State, own: State) -> None:
    """What was taken apart after the cut, from the run that did it."""
    report, theirs = state.report, own.report
    state.plan.factorized = own.plan.factorized
    report.factorized, report.product = theirs.factorized, theirs.product
    report.totals.macs_after, report.totals.params_after = theirs.totals.macs_after, theirs.totals.params_after


def _adopt(state: State, final: Attempt) -> None:
    """Make the tried model the run's own."""
    own = final.state
    state.proto, state.weights, state.removed = own.proto, own.weights, own.removed
    state.unrepaired, state.judged_on = own.unrepaired, own.judged_on
    state.factorized, state.stale = own.factorized, own.stale
