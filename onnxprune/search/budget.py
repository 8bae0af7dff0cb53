"""Budget: find the counts that keep most within targets, cut and repair; the smallest model within a drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.criteria import Criterion
from onnxprune.errors import UsageError
from onnxprune.passes.describe import describe_removal
from onnxprune.passes.freeze import frozen_at
from onnxprune.passes.prune import Prune
from onnxprune.passes.recover import HAS_INPUTS, check_mode
from onnxprune.pipeline import UNPRUNED, Context, Model, Pass, PassResult, Requirement
from onnxprune.planning import make_plan
from onnxprune.report.facts import AnswerFacts, BudgetFacts, Recovered, Settings, TargetFacts
from onnxprune.rewrite.cut import CannotRewrite
from onnxprune.search.attempt import Attempt, of_original
from onnxprune.search.measure import said
from onnxprune.search.problem import Answer
from onnxprune.search.search import Found, Search
from onnxprune.search.wishes import Wishes
from onnxprune.selection.request import WIDEST, Options

WITH_DATA, WITHOUT = "ziplm", "l2"


class Budget(Pass):
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

    requires: Sequence[Requirement] = (UNPRUNED,)

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
        if self.mode != "none":
            self.requires = (UNPRUNED, HAS_INPUTS)
        if options.get("steps", 1) != 1:
            raise UsageError("--steps has no meaning with a budget", hint="Counts are chosen at once: drop it.")
        if options.get("max_ratio") is None:
            self.options = {**options, "max_ratio": WIDEST}

    @property
    def label(self) -> str:
        """The pass with its mode of recovery."""
        return f"recover {self.mode!r}"

    def prune(self, context: Context) -> Prune:
        """What scores the units."""
        criterion = self.criterion or default_criterion(context)
        return Prune(criterion, 0.5, approximate=self.approximate, **self.options)

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Find, cut, repair."""
        prune = self.prune(context)
        analysis = prune.prepared(context, model)
        before = of_original(analysis, self.wishes.metric)
        found = self._search(context, analysis, prune, before)
        analysis, best, final = found.problem.analysis, found.best, found.final
        plan = make_plan(analysis, best.removed, prune.name)
        plan.factorized = final.model.plan.factorized
        pruned = replace(final.model, plan=plan)
        recovery = replace(final.recovery.whole, mode=self.mode, why=self.why)
        facts = [
            Settings({"criterion": prune.name, **prune.request.settings, "scope": "budget"}),
            *describe_removal(context, pruned, found.problem.selector),
            # Settings of trials are none that anyone asked for.
            *(f for f in final.facts if not isinstance(f, (Settings, Recovered))),
            Recovered(recovery, final.recovery.layers),
            self._facts(found, before),
        ]
        return PassResult(pruned, facts)

    def _search(self, context: Context, analysis: Analysis, prune: Prune, before: float) -> Found:
        """The best within targets and gates; a node that cannot be rewritten is frozen, and all is searched anew."""
        for _ in range(len(analysis.graph.nodes) + 1):
            try:
                with context.stage("budget"):
                    return Search(context, analysis, self.wishes, prune, self.mode)(before)
            except CannotRewrite as stop:
                analysis = frozen_at(analysis, stop, np.ones(analysis.units.component.size, dtype=bool))
        raise AssertionError("every node was frozen")  # pragma: no cover

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


def default_criterion(context: Context) -> str:
    """The criterion where nobody says: what others can make up for, or what needs no data."""
    return WITHOUT if context.calibration is None else WITH_DATA


def _best(found: Found) -> list[tuple[Answer, Attempt]]:
    """The best answer of every name."""
    by_name: dict[str, tuple[Answer, Attempt]] = {}
    for answer, tried in found.tried:
        held = by_name.get(answer.name)
        if answer is found.best or held is None or tried.quality.fine > held[1].quality.fine:
            by_name[answer.name] = answer, tried
    return list(by_name.values())
