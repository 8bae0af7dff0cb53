"""The search for the best model within targets and gates: answers of a problem, cut, repaired and compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.budget.sensitivity import Sensitivity
from onnxprune.budget.target import Target
from onnxprune.errors import BudgetError, UsageError
from onnxprune.factors.request import Options as FactorOptions
from onnxprune.passes.measured import measured
from onnxprune.passes.prune import Prune, reasons
from onnxprune.passes.select import Selector
from onnxprune.pipeline import Context
from onnxprune.search.attempt import ENOUGH, Attempt, attempt, of_original
from onnxprune.search.effort import measuring, sample_macs, trials_of
from onnxprune.search.measure import said
from onnxprune.search.mixture import ALONE, Mixture
from onnxprune.search.problem import Answer, Curves, Problem, tolerance
from onnxprune.search.refine import Refine, Tried, cuts
from onnxprune.search.sensitivity import measure_sensitivity
from onnxprune.search.shortfall import Shortfall
from onnxprune.search.table import latency_table, settled
from onnxprune.search.wishes import Wishes

Array = NDArray[np.float64]
# How often a budget is halved towards the smallest that works.
_HALVINGS = 6
# Noise of the outputs below which no answer is worth looking for that has less.
_FAITHFUL = 1e-4


@dataclass(slots=True)
class Found:
    """A problem, the answers that were compared, the best of them and its full repair."""

    problem: Problem
    tried: list[Tried]
    best: Answer
    final: Attempt


class Search:
    """A search in one run.

    Args:
        context: the run. analysis: of the model. wishes: targets and gates. prune: what scores units.
        mode: how to repair.
    """

    def __init__(self, context: Context, analysis: Analysis, wishes: Wishes, prune: Prune, mode: str) -> None:
        self.context, self.analysis, self.wishes, self.prune, self.mode = context, analysis, wishes, prune, mode
        self._mixed: Mixture | None = None
        self._before: float | None = None

    def __call__(self, before: float) -> Found:
        """The best within the targets and gates; ``before``: the original's points.

        Raises:
            BudgetError: a target is out of reach, or a gate is not met.
            CannotRewrite: a node has no form with the new sizes.
        """
        wishes, self._before = self.wishes, before
        problem = self.problem(wishes.targets or (Target(self._shrinks, 1.0),))
        if wishes.targets:
            found = self.within(problem)
            gap = self._missing(found.final, before)
            if gap:
                raise Shortfall(problem).gate(gap, self._nearest(problem, before))
            return found
        return self._smallest(problem, before)

    def problem(self, targets: Sequence[Target]) -> Problem:
        """The groups with their scores, and the targets with their costs."""
        context, analysis, table = self.context, self.analysis, None
        if any(t.kind == "latency" for t in targets):
            sizes = settled(analysis)
            table, analysis = latency_table(context, sizes, given=self.wishes.latency_table), sizes.analysis
        selector = self.prune.selector(context, analysis)
        if not any(ratio is not None for ratio in selector.asked.values()):
            raise BudgetError("No channel of this model can be removed.", hint=reasons(selector.analysis))
        curves = self._curves(selector)
        return Problem(context, selector, targets, table, curves, None if curves else self._drifts(selector))

    def _curves(self, selector: Selector) -> Curves | None:
        """Measured losses by group, where they were asked for."""
        given = self.wishes.sensitivity
        if given is None:
            return None
        if isinstance(given, str) and given == "measure":
            mode, metric, jobs = self.mode, self.wishes.metric, self.wishes.jobs
            return measure_sensitivity(self.context, selector, mode=mode, metric=metric, jobs=jobs).losses()
        found = given if isinstance(given, Sensitivity) else Sensitivity.load(given)
        where = "" if isinstance(given, Sensitivity) else repr(str(given))
        found.check_model(selector.analysis.loaded.sha256, where)
        return found.losses()

    def _drifts(self, selector: Selector) -> dict[int, Array] | None:
        """Scores that add up to what cuts do to the outputs, where there are data to measure it on in time."""
        context, analysis = self.context, selector.analysis
        if context.calibration is None or selector.request.normalize == "measured":
            return None
        scores = {number: contest.values for number, contest in selector.pool().items()}
        groups = [analysis.units.groups[number] for number in scores]
        worth = measuring(sample_macs(analysis), [g.steps for g in groups])
        if worth is None:
            return None
        with suppress(UsageError):  # too few samples, or outputs that say nothing
            return measured(context, analysis, groups, scores, *worth)
        return None

    def within(self, problem: Problem) -> Found:
        """The best answer within the targets, repaired in full; limits are tightened where a repair adds to the size.

        Raises:
            BudgetError: a target is out of reach.
        """
        for last in (False, False, True):
            answers = problem.answers()
            tried = self._tried(problem, answers)
            if not answers and not tried:
                raise Shortfall(problem).unreachable()
            best, final = max(tried, key=lambda pair: pair[1].quality.fine) if tried else (answers[0], None)
            if final is not None and problem.tighten(problem.over(best, final)) and not last:
                continue  # a repair added to the size: a little less is kept, before the effort of repairing it all
            tried += self._refined(problem, tried, best)
            best = max(tried, key=lambda pair: pair[1].quality.fine)[0] if tried else best
            final = self._attempt(problem, best, None)
            over = problem.over(best, final)
            if all(o <= 1 + tolerance(k) for k, o in over.items()):
                return Found(problem, tried, best, final)
            problem.tighten(over)
        raise Shortfall(problem).missed(best)

    def _tried(self, problem: Problem, answers: Sequence[Answer]) -> list[Tried]:
        """Answers repaired from a few samples, with those that take layers apart; none where there is no choice."""
        if len(answers) < 2 and not self.wishes.factorize:
            return []
        tried = [(a, self._attempt(problem, a, ENOUGH)) for a in answers]
        led = [pair for pair in tried if pair[0].source]
        if led:
            problem.lead = max(led, key=lambda pair: pair[1].quality.fine)[0].source
        mixture = self._mixture(problem)
        return tried if mixture is None else tried + mixture.trials(lambda a: self._carried_out(problem, a))

    def _refined(self, problem: Problem, tried: Sequence[Tried], best: Answer) -> list[Tried]:
        """Answers around the best one; by default where a repair says what a cut is worth, and something was lost."""
        trials = self.wishes.trials
        if trials is None:
            faithful = self.wishes.metric is None and any(t.quality.fine > -_FAITHFUL for _, t in tried)
            trials = 0 if self.mode == "none" or faithful else trials_of(sample_macs(problem.analysis))
        mixture = self._mixture(problem)
        if not trials or not tried or best.name == ALONE:
            return []
        judge = partial(self._carried_out, problem)
        if best.apart is None or mixture is None:
            around = [pair for pair in tried if pair[0].apart is None]
            return Refine(cuts(problem), judge, trials, self._whole()).around(around)
        return Refine(mixture.space(), judge, trials, self._whole()).around([p for p in tried if p[0] is best])

    def _whole(self) -> float:
        """How good the original is: the metric, or no noise."""
        if self._before is None:
            self._before = of_original(self.analysis, self.wishes.metric)
        return 0.0 if self.wishes.metric is None else self._before

    def _carried_out(self, problem: Problem, answer: Answer) -> Attempt | None:
        """An answer with layers taken apart, repaired from a few samples; None where no ranks save enough."""
        with suppress(BudgetError):
            return self._attempt(problem, answer, ENOUGH)
        return None

    def _mixture(self, problem: Problem) -> Mixture | None:
        """What takes layers apart as well, where that was asked for; opened once per problem."""
        if not self.wishes.factorize:
            return None
        if self._mixed is None or self._mixed.problem is not problem:
            options = self.prune.request
            own: FactorOptions = {"include": options.include, "exclude": options.exclude, "round_to": options.round_to}
            self._mixed = Mixture(self.context, problem, own)
        return self._mixed

    def _attempt(self, problem: Problem, answer: Answer, samples: int | None) -> Attempt:
        mode = self.mode if answer.removed.any() or answer.apart is not None else "none"
        how: dict[str, Any] = {"mode": mode, "metric": self.wishes.metric, "apart": answer.apart}
        return attempt(self.context, problem.analysis, answer.removed, samples=samples, **how)

    @property
    def _shrinks(self) -> str:
        """What is made as little as gates allow where no target says what: MACs, or parameters of a model without."""
        return "macs" if sample_macs(self.analysis) else "params"

    def _missing(self, final: Attempt, before: float) -> str:
        """What a gate has against a model; empty where it passes."""
        wishes, quality = self.wishes, final.quality
        what = said(wishes.metric, quality.fidelity)
        # A comparison with NaN is false: where nothing could be compared, no gate is passed.
        if wishes.max_drop is not None and not before - quality.points <= wishes.max_drop + 1e-9:
            lost = before - quality.points
            return f"{what} fell from {before:.4g} to {quality.points:.4g}: {lost:.3g} > --max-drop {wishes.max_drop:g}"
        cosine = 1.0 if quality.fidelity is None else quality.fidelity.worst_cosine
        if wishes.min_fidelity is not None and not cosine >= wishes.min_fidelity:
            return f"worst cosine {cosine:.4f} is below --min-fidelity {wishes.min_fidelity:g}"
        return ""

    def _smallest(self, problem: Problem, before: float) -> Found:
        """The fewest MACs (parameters, where there are none) within the gates, by bisection on the share kept.

        Raises:
            BudgetError: not even the smallest cut keeps within them.
        """
        kind = self._shrinks
        low, high = problem.reachable(kind) / problem.originals[kind], 1.0
        found, why = None, "No cut was found"
        if self.wishes.factorize or len(problem.choices) > 1:
            with problem.aiming(Target(kind, 0.5 * (low + high))):  # what losses to go by, and at what rate
                self._tried(problem, problem.answers())
        for _ in range(_HALVINGS):
            share = 0.5 * (low + high)
            tried = self._aimed(problem, Target(kind, share))
            if tried is None:
                low = share
                continue
            answer, final = tried
            why = self._missing(final, before)
            if why:
                low = share
            else:
                high, found = share, Found(problem, [], answer, final)
        if found is None:
            raise Shortfall(problem).gate(why, None)
        return found

    def _aimed(self, problem: Problem, *targets: Target) -> tuple[Answer, Attempt] | None:
        """The most promising answer to other targets of the same kinds, repaired in full; None where none was found."""
        mixture = self._mixture(problem)
        with problem.aiming(*targets), suppress(BudgetError):
            answer = None if mixture is None else mixture.answer()
            answer = answer or next(iter(problem.answers()), None)
            if answer is not None:
                final = self._attempt(problem, answer, None)
                problem.over(answer, final)
                return answer, final
        return None

    def _nearest(self, problem: Problem, before: float) -> tuple[Target, ...] | None:
        """The budget between the one asked for and the whole model that is nearest to it and passes the gates."""
        low, high = 0.0, 1.0
        passing: tuple[Target, ...] | None = None
        for _ in range(_HALVINGS - 1):
            middle = 0.5 * (low + high)
            targets = problem.towards_whole(middle)
            tried = self._aimed(problem, *targets)
            if tried is not None and not self._missing(tried[1], before):
                high, passing = middle, targets
            else:
                low = middle
        return passing
