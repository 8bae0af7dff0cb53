"""Budget: find the best counts within targets, prune and recover; or the smallest model within a permitted drop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.knapsack import Sensitivity
from onnxprune.allocation.latency_model import LatencyTable
from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.selection import SHARES, counts
from onnxprune.allocation.settings import WIDEST, Options
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import PlanBranch
from onnxprune.channels.selection import make_plan
from onnxprune.errors import BudgetError, ModelError, Note, UsageError, argument
from onnxprune.factorization.settings import Options as FactorOptions
from onnxprune.importance.criteria import Criterion, needs_of
from onnxprune.passes.calibration import MAX_TRIAL, CalibrationBatches, TrialSplit
from onnxprune.passes.output_sensitivity import MAX_SAMPLES, output_sensitivity
from onnxprune.passes.prune import Prune, describe_removal, frozen_at, reasons, run_by_criterion
from onnxprune.passes.recover import HAS_INPUTS, check_mode
from onnxprune.passes.select import Selector
from onnxprune.pipeline import (
    EFFORTS,
    UNPRUNED,
    Context,
    Effort,
    Model,
    Pass,
    PassResult,
    Result,
    WorkShare,
)
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.report.facts import (
    AnswerFacts,
    BudgetFacts,
    CandidateFacts,
    Fact,
    GroupLosses,
    Recovered,
    Remark,
    Settings,
    TargetFacts,
)
from onnxprune.search.automatic_factorization import better_factorized, is_damaged
from onnxprune.search.depth import ChosenDepth, choose_depth, of_original
from onnxprune.search.evaluation import Evaluation, evaluate, points_name, points_of_original, pruned_model, unseen
from onnxprune.search.latency import latency_table, rewritable_sizes
from onnxprune.search.mixture import ALONE, FACTORIZED_TRIALS, Mixture
from onnxprune.search.problem import (
    BudgetErrors,
    Candidate,
    Curves,
    Evaluated,
    Mask,
    SearchProblem,
    best_of,
    tolerance,
)
from onnxprune.search.refine import Refine, cuts
from onnxprune.search.sensitivity import measure_sensitivity
from onnxprune.search.spec import BudgetSpec
from onnxprune.search.workers import evaluate_together
from onnxprune.settings import named_arguments
from onnxprune.targets import Target

Array = NDArray[np.float64]
T = TypeVar("T")
# Parts of the work of a search, in order.
_PARTS = ("scores", "measure", "candidates", "factorization", "trials", "final")
# Work of a recovery per sample that it is fitted to, in runs of the model on one.
_RUNS_OF_RECOVERY = 10.0
# Number of halvings of a budget towards the smallest that works.
_HALVINGS = 6
# Noise of the outputs below which the search for better candidates stops.
_FAITHFUL = 1e-4
# Loss from which on rounding is looked at, and the share of it that has to be left without rounding to be worth a word.
_MUCH, _CLEARLY = 0.02, 0.8


@named_arguments(wishes="spec")
@dataclass(frozen=True, repr=False, eq=False)
class Budget(Pass, Options):
    """Prune to targets.

    Counts per group come from knapsacks over costs and scores, output sensitivities (with data: the change of the
    outputs when each group is pruned alone) or measured sensitivities, see :mod:`onnxprune.allocation.knapsack`. They
    compete with the same share for every group: each candidate is pruned, recovered from 128 samples and evaluated.
    Further candidates are tried around the best, see :class:`onnxprune.search.refine.Refine`, and the best of all is
    recovered from all data. Layers are factorized as well on request, or where pruning alone damages the model, see
    :class:`onnxprune.search.mixture.Mixture` and :mod:`onnxprune.search.automatic_factorization`.

    Args:
        spec: targets and gates.
        criterion: importance criterion of units; ``ziplm`` with data, ``l2`` without.
        recover: mode of the recovery.
        why: origin of that mode, for the report.
        approximate: also prune through normalisations.

    Further arguments (``layers``, ``scope``, ``policy`` and so on) are those of
    :class:`onnxprune.allocation.settings.Options`; ``steps`` has no meaning here.

    Raises:
        BudgetError: a target cannot be reached or a gate not be met; the error carries the best result, what limits it,
            and the nearest budget that works.
    """

    requires = (UNPRUNED,)

    spec: BudgetSpec
    criterion: str | Criterion | None = None
    _: KW_ONLY
    recover: str = "none"
    why: str = "asked for"
    approximate: bool = False
    shorter: bool = False

    def __post_init__(self) -> None:
        if check_mode(self.recover) != "none" or self.spec.quantize == "qdq":
            object.__setattr__(self, "requires", (UNPRUNED, HAS_INPUTS))
        if self.steps != 1:
            raise UsageError(
                f"{argument('steps')} has no meaning with a budget",
                hint=f"A budget prunes in one step: drop {argument('steps')}.",
            )

    def __repr__(self) -> str:
        return f"<Budget: {', '.join(map(str, self.spec.targets)) or 'the smallest model within a drop'}>"

    @property
    def label(self) -> str:
        """Return the name of the pass with its mode of recovery."""
        return f"recover {self.recover!r}"

    def prune(self, criterion: str | Criterion) -> Prune:
        """Return the pass that scores the units."""
        widest = WIDEST if self.max_ratio is None else self.max_ratio
        return Prune(criterion, 0.5, approximate=self.approximate, **{**self.arguments, "max_ratio": widest})

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Search, prune and recover."""
        return run_by_criterion(context, self.criterion, lambda c: self._run(context, model, self.prune(c)))

    def _run(self, context: Context, model: Model, prune: Prune) -> PassResult:
        analysis = prune.prepared(context, model, shorter=self.shorter)
        before = points_of_original(context.analysis, self.spec.metric)
        if not (self.shorter or model.is_shortened):
            search = Search(context, analysis, self.spec, prune, self.recover, before)
            return self._completed(context, prune, self._result(search), before)
        spec, originals = of_original(context, self.spec)
        search = Search(context, analysis, spec, prune, self.recover, before, model.plan.branches, originals)
        depth = ChosenDepth(model, (), ())
        if self.shorter:
            with context.stage("depth"):
                depth = choose_depth(context, model, search.opened(), prune, spec, self.recover)
            if depth.model is not model:
                search = search.of(depth.model.analysis, depth.model.plan.branches)
        completed = self._completed(context, prune, self._result(search), before)
        completed.model.plan.experts = model.plan.experts
        budget = next(fact for fact in completed.facts if isinstance(fact, BudgetFacts))
        budget.answers = [*depth.answers, *budget.answers]
        return replace(completed, facts=[*depth.facts, *completed.facts])

    def _completed(self, context: Context, prune: Prune, result: SearchResult, before: float) -> PassResult:
        """Return the result of a search; raises BudgetError, with the report, where a gate is not met."""
        pruned, facts = self._outcome(context, prune, result, before)
        if result.failure is not None:
            quality = [result.final.quality.fidelity] if result.final.quality.fidelity is not None else []
            result.failure.report = Result(context, pruned, [*facts, *quality]).report
            raise result.failure
        return PassResult(pruned, facts)

    def _outcome(
        self, context: Context, prune: Prune, result: SearchResult, before: float
    ) -> tuple[Model, Sequence[Fact]]:
        """Return the best model and its facts for the report."""
        analysis, best, final = result.problem.analysis, result.best, result.final
        plan = make_plan(analysis, best.removed, prune.name)
        plan.factorized, plan.branches = final.model.plan.factorized, final.model.plan.branches
        pruned = replace(final.model, plan=plan)
        recovery = replace(final.recovery.recovery, mode=self.recover, why=self.why)
        facts = [
            Settings(
                {"criterion": prune.name, **prune.request.settings, "scope": "budget", "effort": context.effort.name}
            ),
            *describe_removal(context, pruned, result.problem.selector),
            # The user did not choose the settings of trials.
            *(f for f in final.facts if not isinstance(f, (Settings, Recovered))),
            Recovered(recovery, final.recovery.layers),
            self._facts(result, before),
            *(Remark(Note(text)) for text in result.remarks),
        ]
        return pruned, facts

    def _result(self, search: Search) -> SearchResult:
        """Return the best result within targets and gates; freeze a node that cannot be rewritten and search anew."""
        for _ in range(len(search.analysis.graph.nodes) + 1):
            try:
                with search.context.stage("budget"):
                    return search.run()
            except CannotRewrite as stop:
                analysis = search.analysis
                analysis = frozen_at(analysis, stop, np.ones(analysis.units.component.size, dtype=bool))
                search = search.of(analysis, search.branches)
        raise AssertionError("every node was frozen")  # pragma: no cover

    def _facts(self, result: SearchResult, before: float) -> BudgetFacts:
        problem, best = result.problem, result.best
        limits = problem.limits()
        requested = {t.kind: str(t) for t in self.spec.targets}
        targets = [
            TargetFacts(k, requested[k], limits[k], problem.base(k), best.costs[k], problem.origin(k))
            for k in requested
        ]
        compared = _best_by_name(result) or [(best, result.final)]
        answers = [
            AnswerFacts(c.name, e.quality.fine, e.quality.points, chosen=c.removed is best.removed) for c, e in compared
        ]
        gap = best.allocation.gap if np.isfinite(best.allocation.bound) else None
        quality = result.final.quality
        metric_name = points_name(self.spec.metric)
        facts = BudgetFacts(targets, answers, gap, metric_name, before, quality.points, self.spec.max_drop)
        facts.cost = next(iter(problem.costs))
        last = max((i for i, (mask, _) in enumerate(result.tried) if mask is best.removed), default=-1)
        facts.candidates = [replace(c, chosen=i == last) for i, (_, c) in enumerate(result.tried)]
        facts.losses_by = list(problem.choices)[-1]
        facts.losses = _losses(problem, facts.losses_by)
        facts.can_factorize = result.can_factorize
        return facts


# Shares of the units of a group at which a page shows its losses.
_SHOWN = (0.25, 0.5, 0.75, 0.9)


def _losses(problem: SearchProblem, by: str) -> list[GroupLosses]:
    """Return the losses of every group at a few shares, from one of the origins of losses."""
    choices, result = problem.choices[by], list[GroupLosses]()
    for number, options, losses in zip(problem.groups, choices.options, choices.losses, strict=True):
        shares = 1 - options / options[-1]
        levels = sorted({int(np.argmin(np.abs(shares - share))) for share in _SHOWN}, reverse=True)
        group = problem.analysis.units.groups[number]
        name = next((v.name for v in problem.analysis.groups if v.id == number), str(number))
        result.append(GroupLosses(name, group.size, shares[levels].tolist(), losses[levels].tolist()))
    return result


def _best_by_name(result: SearchResult) -> list[Evaluated]:
    """Return the best candidate of every name."""
    by_name: dict[str, Evaluated] = {}
    for candidate, evaluation in result.evaluated:
        current = by_name.get(candidate.name)
        is_best = candidate.removed is result.best.removed
        if is_best or current is None or evaluation.quality.fine > current[1].quality.fine:
            by_name[candidate.name] = candidate, evaluation
    return list(by_name.values())


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search.

    Attributes:
        problem: the problem with its corrected limits.
        evaluated: the candidates that were compared.
        best: the best of these, with its costs after recovery from all data.
        final: its evaluation.
        failure: description of the gate that it does not pass, empty for none.
        tried: all candidates that were evaluated: the mask of units each removes, and its facts.
        remarks: remarks on the search for the user.
        can_factorize: whether layers could be factorized as well, and that was not tried.
    """

    problem: SearchProblem
    evaluated: Sequence[Evaluated]
    best: Candidate
    final: Evaluation
    failure: BudgetError | None = None
    tried: Sequence[tuple[Mask, CandidateFacts]] = ()
    remarks: Sequence[str] = ()
    can_factorize: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Measured losses of groups: the part of a search that targets of one kind share, and that workers are given.

    Attributes:
        pool: scored groups by number.
        curves: losses of groups pruned alone, {group: (shares removed, losses)}; None where they were not measured.
        sensitivity: scores [units] by group that sum to its output sensitivity; None where it was not measured.
    """

    pool: Mapping[int, RankedGroup]
    curves: Curves | None
    sensitivity: Mapping[int, Array] | None


class Search:
    """The search for the best model within targets and gates.

    Args:
        context: the run.
        analysis: of the model.
        spec: targets and gates.
        prune: scores units.
        mode: of the recovery.
        before: points of the original.
        branches: residual branches of the original that the analysed model lacks.
        originals: costs of that original by kind, where they are not those of the analysed model.

    Attributes:
        scores: measured losses of the groups, once a problem was made.
    """

    def __init__(
        self,
        context: Context,
        analysis: Analysis,
        spec: BudgetSpec,
        prune: Prune,
        mode: str,
        before: float,
        branches: Sequence[PlanBranch] = (),
        originals: Mapping[str, float] | None = None,
    ) -> None:
        self.context, self.analysis, self.spec, self.prune = context, analysis, spec, prune
        self.mode, self.before, self.branches = mode, before, branches
        self._originals = originals or {}
        self._opened: SearchProblem | None = None
        self._mixture_of: Mixture | None = None
        self._answers: list[Evaluated] = []
        self._tried: list[tuple[Mask, CandidateFacts]] = []
        self._unrounded: Callable[[], SearchProblem] | None = None
        self._factorization_remark = ""
        self.scores: Scores | None = None
        self._work = WorkShare(lambda share: context.tell("budget", share), dict.fromkeys(_PARTS, 1.0))
        self._at = "final", 0, 1

    def of(self, analysis: Analysis, branches: Sequence[PlanBranch]) -> Search:
        """Return the same search over another analysis, of a model that lacks these branches."""
        settings = self.spec, self.prune, self.mode, self.before, branches, self._originals
        return Search(self.context, analysis, *settings)

    def opened(self) -> SearchProblem:
        """Return the problem of the targets, made once.

        Raises:
            BudgetError: no channel can be removed.
        """
        if self._opened is None:
            self._opened = self.problem(self.spec.targets or (Target(self._shrinks, 1.0),))
        return self._opened

    def run(self) -> SearchResult:
        """Return the best result within the targets and gates.

        Raises:
            BudgetError: a target is out of reach, or a gate is not met.
            CannotRewrite: a node has no form with the new sizes.
        """
        spec, context = self.spec, self.context
        self.report_to(lambda share: context.tell("budget", share))
        problem = self.opened()
        if not spec.targets:
            return self._with_search(self._smallest(problem))
        result = self.within(problem)
        gap = self._missing(result.final)
        if gap:
            nearest = None if context.stages.interrupted else self._nearest(result.problem)
            result = replace(result, failure=BudgetErrors(problem).gate(gap, nearest))
        return self._with_search(result)

    def _with_search(self, result: SearchResult) -> SearchResult:
        """Return a result with what the search has tried, and what it could have tried."""
        can_factorize = self.spec.can_factorize and self._mixture_of is None
        return replace(result, tried=self._tried, can_factorize=can_factorize)

    def report_to(self, tell: Callable[[float], None]) -> None:
        """Report the share of the work that is done to a function, from now on and from 0."""
        self._work = WorkShare(tell, self._work_ahead())

    def _work_ahead(self) -> dict[str, float]:
        """Return the seconds that the parts of a search take, roughly, as far as they are known ahead."""
        context, analysis = self.context, self.analysis
        if context.calibration is None or self.mode == "none":
            return dict.fromkeys(_PARTS, 1.0)
        samples = CalibrationBatches(context, analysis).samples or 2 * MAX_TRIAL
        trial = _RUNS_OF_RECOVERY * self._trial_samples
        macs = sample_macs(analysis)
        trials = self._default_trials() if self.spec.trials is None else self.spec.trials
        one_run = _RUN * max(macs, 1.0) * 1e-9
        scores = 3.0 * samples * one_run + self._solving_seconds()
        measured = min(measuring_seconds(macs, context.effort), 200.0 * MAX_SAMPLES * one_run)
        each, finals = _EACH + trial * one_run, 1 if self.spec.targets else _HALVINGS
        final = finals * (_EACH + _RUNS_OF_RECOVERY * samples * one_run)
        factorization = each * self._factorized_trials()
        return dict(zip(_PARTS, (scores, measured, 3.0 * each, factorization, trials * each, final), strict=True))

    def _solving_seconds(self) -> float:
        """Return about how long the criterion takes to find dependent channels, the cube of each layer's inputs."""
        if "gram" not in needs_of(self.prune.score):
            return 0.0
        return _SOLVE * sum(min(read, _MOST_READ) ** 3 for read in self._reads())

    def _reads(self) -> list[float]:
        """Return the number of values that an output of each layer reads."""
        return [layer.params_before / max(layer.channels_before, 1) for layer in self.analysis.layers]

    def problem(self, targets: Sequence[Target]) -> SearchProblem:
        """Return the groups with their scores, and the targets with their costs."""
        captured = 0.1 if self._solving_seconds() else 1.0  # the share of the scores that their data take
        parts = {"capture": ("scores", 0.0, captured), "score": ("scores", captured, 1.0)}
        parts |= dict.fromkeys(("measure", "sensitivity"), ("measure", 0.0, 1.0))

        def listener(stage: str, share: float) -> None:
            if stage in parts:
                part, first, last = parts[stage]
                self._work.part(part, first + share * (last - first))

        context = replace(self.context, stages=self.context.stages.watched(listener))
        analysis, table = self.analysis, None
        if any(t.kind == "latency" for t in targets):
            sizes = rewritable_sizes(analysis)
            table, analysis = latency_table(context, sizes, source=self.spec.latency_table), sizes.analysis
        selector = self.prune.selector(context, analysis)
        if not any(ratio is not None for ratio in selector.ratios.values()):
            raise BudgetError("No channel of this model can be removed.", hint=reasons(selector.analysis))
        curves = self._curves(context, selector)
        sensitivity = None if curves else self._output_sensitivity(context, selector)
        problem = self._built(selector, targets, Scores(selector.pool(), curves, sensitivity), table)
        counted = [t for t in targets if t.kind not in ("latency", "peak-memory")]
        if all(problem.reachable(t.kind) <= problem.limits()[t.kind] for t in counted):
            return problem
        shares = selector.include_unreached()
        if not shares:
            return problem
        what = "1 group lies" if len(shares) == 1 else f"{len(shares)} groups lie"
        selector.warnings.append(
            f"{what} in branches that no calibration sample takes, and the target cannot be met without them: their "
            "channels are chosen by their weights alone. Give data that take these branches"
        )
        if sensitivity is not None:
            mean = float(np.mean([scores.sum() for scores in sensitivity.values()]))
            sensitivity = {**sensitivity, **{number: share * mean for number, share in shares.items()}}
        return self._built(selector, targets, Scores(selector.pool(), curves, sensitivity), table)

    def problem_of(self, scores: Scores, targets: Sequence[Target]) -> SearchProblem:
        """Return the problem of measured losses, which another search over the same analysis has made.

        Args:
            scores: the losses.
            targets: limits on costs, none of them a time.

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        selector = self.prune.selector(self.context, self.analysis)
        selector.pool_of = dict(scores.pool)
        return self._built(selector, targets, scores)

    def _built(
        self, selector: Selector, targets: Sequence[Target], scores: Scores, table: LatencyTable | None = None
    ) -> SearchProblem:
        """Return the problem of measured losses; it can be built without the multiples of the device as well."""
        self.scores = scores

        def build(rounded: bool) -> SearchProblem:
            options: dict[str, Any] = {"rounded": rounded, "quantize": self.spec.quantize}
            measured = table, scores.curves, scores.sensitivity
            problem = SearchProblem.of(self.context, selector, targets, *measured, **options)
            return problem.with_originals(self._originals)

        self._unrounded = partial(build, False)
        return build(True)

    def restart(self) -> None:
        """Forget the lessons of earlier targets, so that the result for a target does not depend on them."""
        if self._mixture_of is not None:
            self._mixture_of.restart()

    def _curves(self, context: Context, selector: Selector) -> Curves | None:
        """Return measured losses by group, where they were requested."""
        source = self.spec.sensitivity
        if source is None:
            return None
        if isinstance(source, str) and source == "measure":
            mode, metric, jobs = self.mode, self.spec.metric, self.spec.jobs
            return measure_sensitivity(context, selector, mode=mode, metric=metric, jobs=jobs).losses()
        curves = source if isinstance(source, Sensitivity) else Sensitivity.load(source)
        file = "" if isinstance(source, Sensitivity) else repr(str(source))
        curves.check_model(selector.analysis.loaded.sha256, file)
        losses = curves.losses()
        if not self.branches:
            return losses
        numbers = {group.name: group.id for group in selector.analysis.groups}
        return {numbers[c.name]: losses[c.group] for c in curves.curves if c.name in numbers}

    def _output_sensitivity(self, context: Context, selector: Selector) -> dict[int, Array] | None:
        """Return scores that sum to each group's output sensitivity, where data and time permit measuring it."""
        analysis = selector.analysis
        if context.calibration is None or selector.request.normalize == "measured":
            return None
        scores = {number: group.values for number, group in selector.pool().items()}
        groups = [analysis.units.groups[number] for number in scores]
        bounds = measuring_effort(sample_macs(analysis), [g.steps for g in groups], context.effort)
        if bounds is None:
            context.stages.leave_out("output sensitivities: there are too many groups for the work of a run")
            return None
        if bounds[0] != SHARES:
            shares = ", ".join(f"{share:g}" for share in bounds[0])
            context.stages.leave_out(f"output sensitivities of groups at shares other than {shares}")
        with suppress(UsageError):  # too few samples, or constant outputs
            return output_sensitivity(context, analysis, groups, scores, *bounds)
        return None

    def within(self, problem: SearchProblem, *, explained: bool = True) -> SearchResult:
        """Return the best candidate within the targets, recovered from all data; tighten limits that recovery exceeds.

        Args:
            problem: the groups and targets.
            explained: whether to evaluate further candidates for remarks on the result.

        Raises:
            BudgetError: a target is out of reach.
        """
        with self.context.stages.until_interrupted(lambda: self._so_far(problem)):
            return self._within(problem, explained=explained)
        return self._best_so_far(problem)

    def _so_far(self, problem: SearchProblem) -> str:
        """Describe a search that ends early; empty where no candidate has met the targets yet."""
        if not self._fitting(problem):
            return ""
        what = "1 candidate" if len(self._answers) == 1 else f"{len(self._answers)} candidates"
        return f"the search ended after {what}; the best was recovered from the samples of a trial"

    def _best_so_far(self, problem: SearchProblem) -> SearchResult:
        """Return the best of the candidates evaluated so far that meet the targets."""
        best, final = best_of(self._fitting(problem))
        if best.factorize is not None:  # products of trials are not checked
            final = self._evaluate(problem, best, trial=False)
        return SearchResult(problem, self._answers, best, final)

    def _fitting(self, problem: SearchProblem) -> list[Evaluated]:
        """Return the candidates evaluated so far that meet the targets, with their costs after recovery."""
        measured = [(problem.with_costs_of(*pair), pair[1]) for pair in self._answers]
        return [
            (candidate, evaluation)
            for candidate, evaluation in measured
            if all(share <= 1 + tolerance(kind) for kind, share in problem.over(candidate).items())
        ]

    def _within(self, problem: SearchProblem, *, explained: bool) -> SearchResult:
        """Return the result of a search that is not interrupted."""
        self._answers = []
        for last in (False, False, True):
            candidates = self._candidates(problem)
            evaluated, problem = self._evaluated(problem, candidates)
            if not candidates and not evaluated:
                raise BudgetErrors(problem).unreachable()
            best = candidates[0] if not evaluated else best_of(evaluated)[0]
            if evaluated:
                over = problem.over(problem.with_costs_of(*best_of(evaluated)))
                problem = problem.tightened(over)
                if max(over.values()) > 1 and not last:
                    continue  # recovery added to the size: keep a little less, before the effort of all data
            evaluated += self._refined(problem, evaluated, best)
            best = best_of(evaluated)[0] if evaluated else best
            remarks = self._rounding_costs(problem, best, evaluated) if explained else []
            if best.factorize is not None and self._factorization_remark:
                remarks.append(self._factorization_remark)
            self._at = "final", 0, 1
            final = self._evaluate(problem, best, trial=False)
            best = problem.with_final_time(problem.with_costs_of(best, final), final)
            over = problem.over(best)
            if all(share <= 1 + tolerance(kind) for kind, share in over.items()):
                return SearchResult(problem, evaluated, best, final, remarks=remarks)
            problem = problem.tightened(over)
        raise BudgetErrors(problem).missed(best)

    def _rounding_costs(self, problem: SearchProblem, best: Candidate, evaluated: Sequence[Evaluated]) -> list[str]:
        """Return a remark where multiples that the device likes cost much quality, by one candidate without them."""
        of_device = problem.selector.rounding is not None and problem.table is None and best.factorize is None
        if not of_device or self.spec.trials == 0 or self.spec.metric is not None or self._unrounded is None:
            return []
        if self.mode == "none" or self.context.effort.candidates < 2:
            return []
        answers, tried = list(self._answers), list(self._tried)
        self._at = "trials", 0, 1
        try:
            rounded = best_of(evaluated)[1] if evaluated else self._evaluate(problem, best)
            candidates = replace(self._unrounded(), lead=problem.lead, targets=problem.targets).candidates()
            if rounded.quality.fine > -_MUCH or not candidates:
                return []
            free = self._evaluate(problem, candidates[0])
        finally:
            self._answers, self._tried = answers, tried  # nobody asked for that one
        if free.quality.fine < _CLEARLY * rounded.quality.fine:
            return []
        return [
            f"multiples of channels that kernels here like cost accuracy: without them ({argument('round_to', 1)}) a "
            f"trial kept {free.quality.points:.1f} in place of {rounded.quality.points:.1f} points at the same target; "
            "it may be slower"
        ]

    def _candidates(self, problem: SearchProblem) -> list[Candidate]:
        """Return the candidates to compare, as many as the effort allows."""
        candidates, max_candidates = problem.candidates(), self.context.effort.candidates
        if len(candidates) > max_candidates:
            names = ", ".join(candidate.name for candidate in candidates[max_candidates:])
            self.context.stages.leave_out(f"comparison with other candidates ({names})")
        return candidates[:max_candidates]

    def _evaluated(
        self, problem: SearchProblem, candidates: Sequence[Candidate]
    ) -> tuple[list[Evaluated], SearchProblem]:
        """Recover candidates from a few samples, also with factorized layers; return none where there is no choice.

        Returns:
            the candidates, and the problem led by the best choices.
        """
        if len(candidates) < 2 and not self._factorized_trials():
            return [], problem
        with self.context.stage("candidates"):
            evaluated = self._evaluated_apart(problem, candidates)
            for number, candidate in enumerate(candidates[len(evaluated) :]):
                self._at = "candidates", number, len(candidates)
                evaluated.append((candidate, self._evaluate(problem, candidate)))
        with_source = [pair for pair in evaluated if pair[0].source]
        if with_source:
            problem = replace(problem, lead=best_of(with_source)[0].source)
        if self.spec.factorize:
            evaluated += self._factorized(problem)
        elif evaluated and self._factorized_trials():
            evaluated += self._automatically_factorized(problem, best_of(evaluated))
        return evaluated, problem

    def _factorized(self, problem: SearchProblem) -> list[Evaluated]:
        """Return candidates with factorized layers, recovered from a few samples."""
        trials = self._factorized_trials()
        return self._mixture(problem).trials(problem, self._judge(problem, "factorization", trials), trials)

    def _factorized_trials(self) -> int:
        """Return the number of candidates with factorized layers; without a request, as many as the effort allows.

        There are none without a request where no recovery tells whether they are better.
        """
        spec = self.spec
        if spec.factorize:
            return FACTORIZED_TRIALS
        can_judge = self.mode != "none" and self.context.calibration is not None and spec.trials != 0
        if not (spec.can_factorize and can_judge):
            return 0
        seconds = _FACTORIZING * self.context.effort.seconds - _DECOMPOSE * sum(read**3 for read in self._reads())
        trials = min(
            FACTORIZED_TRIALS, int(seconds / _candidate_seconds(sample_macs(self.analysis), self._trial_samples))
        )
        return trials if trials >= _LEAST_FACTORIZED else 0

    def _automatically_factorized(self, problem: SearchProblem, pruned: Evaluated) -> list[Evaluated]:
        """Return candidates with factorized layers that are clearly better than a damaged one of pruning alone."""
        original_points = None if self.spec.metric is None else self.before
        self._factorization_remark = ""
        if not is_damaged(pruned, original_points):
            return []
        if self.context.effort.name == "quick":
            self.context.stages.leave_out("factorization of layers")
            return []
        answers = list(self._answers)
        try:
            factorized = self._factorized(problem)
        except (BudgetError, ModelError, UsageError) as error:  # nobody asked for what failed
            self.context.stages.leave_out(f"factorization of layers: {error.message}")
            factorized = []
        better, self._factorization_remark = better_factorized(pruned, factorized, original_points)
        if not better:
            self._answers = answers  # an interrupted search ends with what it was asked for
        return better

    def _evaluated_apart(self, problem: SearchProblem, candidates: Sequence[Candidate]) -> list[Evaluated]:
        """Recover candidates from a few samples in workers; none where joblib has one worker only."""
        if self.branches:  # workers have the original
            return []
        settings: dict[str, Any] = {"mode": self.mode, "metric": self.spec.metric, "jobs": self.spec.jobs}
        removals = [candidate.removed for candidate in candidates]
        evaluations = evaluate_together(self.context, problem.analysis, removals, **settings) or ()
        evaluated: list[Evaluated] = []
        for pair in zip(candidates, evaluations, strict=False):
            evaluated.append(pair)
            self._answers.append(pair)
            self._work.part("candidates", len(evaluated) / len(candidates))
        return evaluated

    def _refined(self, problem: SearchProblem, evaluated: Sequence[Evaluated], best: Candidate) -> list[Evaluated]:
        """Return candidates around the best one; by default only with recovery and where quality was lost."""
        trials = self.spec.trials
        if trials is None:
            faithful = self.spec.metric is None and any(e.quality.fine > -_FAITHFUL for _, e in evaluated)
            trials = 0 if self.mode == "none" or faithful else self._default_trials()
        if not trials or not evaluated or best.name == ALONE:
            return []
        judge = self._judge(problem, "trials", trials)
        original_fine = 0.0 if self.spec.metric is None else self.before
        if best.factorize is None:
            pruned_only = [pair for pair in evaluated if pair[0].factorize is None]
            return Refine(cuts(problem, best.corrections), judge, trials, original_fine).around(pruned_only)
        space = self._mixture(problem).space(problem)
        return Refine(space, judge, trials, original_fine).around([pair for pair in evaluated if pair[0] is best])

    def _default_trials(self) -> int:
        """Return the number of candidates to try around the best one where the user sets none."""
        return trials_of(sample_macs(self.analysis), self.context.effort, self._trial_samples)

    @cached_property
    def _trial_samples(self) -> int:
        """The number of samples that a candidate is recovered from."""
        return TrialSplit(self.context.effort.trial_samples).num_fit(self.context, self.analysis)

    def _judge(self, problem: SearchProblem, part: str, trials: int) -> Callable[[Candidate], Evaluation | None]:
        """Return a function that evaluates candidates from a few samples; its result is None without suitable ranks.

        Args:
            problem: the groups and targets.
            part: the part of the search's work.
            trials: number of candidates that it is expected to be called for.
        """
        numbers = iter(range(trials))

        def judge(candidate: Candidate) -> Evaluation | None:
            self._at = part, next(numbers, trials - 1), trials
            with suppress(BudgetError):
                return self._evaluate(problem, candidate)
            return None

        return judge

    def _mixture(self, problem: SearchProblem) -> Mixture:
        """Return the mixture that factorizes layers as well; reused for problems of the same costs."""
        if self._mixture_of is None or self._mixture_of.costs is not problem.costs:
            request = self.prune.request
            options = FactorOptions(include=request.include, exclude=request.exclude, round_to=request.least_multiple)
            self._mixture_of = Mixture(self.context, problem, options, requested=bool(self.spec.factorize))
        return self._mixture_of

    def _evaluate(self, problem: SearchProblem, candidate: Candidate, *, trial: bool = True) -> Evaluation:
        changed = candidate.removed.any() or candidate.factorize is not None or self.branches
        mode = self.mode if changed else "none"
        options: dict[str, Any] = {"mode": mode, "metric": self.spec.metric, "factorize": candidate.factorize}
        part, number, count = self._at

        def progress(stage: str, share: float) -> None:
            if stage == "recover":
                self._work.part(part, (number + share) / count)

        split = TrialSplit(self.context.effort.trial_samples) if trial else None
        options |= {"split": split, "progress": progress}
        pruned = pruned_model(problem.analysis, candidate.removed, self.branches)
        try:
            evaluation = evaluate(self.context, pruned, **options)
        except ModelError:
            if self.spec.must_run:
                raise
            evaluation = unseen(self.context, pruned, candidate.factorize)
        self._answers.append((candidate, evaluation))
        self._tried.append((candidate.removed, self._facts_of(problem, candidate, evaluation, trial)))
        return evaluation

    def _facts_of(
        self, problem: SearchProblem, candidate: Candidate, evaluation: Evaluation, trial: bool
    ) -> CandidateFacts:
        """Return the facts of a candidate that was evaluated, at its cost of the first kind."""
        kind = next(iter(problem.costs))
        counted = {"params": evaluation.params}
        counted |= {"size": evaluation.size} if problem.quantize is None else {}
        cost = evaluation.macs if kind == "macs" and candidate.factorize is not None else counted.get(kind)
        share = (candidate.costs[kind] if cost is None else cost) / problem.base(kind)
        return CandidateFacts(candidate.name, share, evaluation.quality.points, trial)

    @property
    def _shrinks(self) -> str:
        """Return the kind of cost to minimise where no target names one: MACs, or parameters without MACs."""
        return "macs" if sample_macs(self.analysis) else "params"

    def _missing(self, final: Evaluation) -> str:
        """Return a description of the gate that a model does not pass; empty where it passes."""
        spec, quality, before = self.spec, final.quality, self.before
        metric_name = points_name(spec.metric)
        # A comparison with NaN is false: a model without a comparable output passes no gate.
        if spec.max_drop is not None and not before - quality.points <= spec.max_drop + 1e-9:
            drop = before - quality.points
            limit = f"{argument('max_drop')} {spec.max_drop:g}"
            return f"{metric_name} fell from {before:.4g} to {quality.points:.4g}: {drop:.3g} > {limit}"
        if spec.min_fidelity is None or quality.fidelity is None:
            return ""
        short = quality.fidelity.shortfall(spec.min_fidelity)
        return f"{short} is below {argument('min_fidelity')} {spec.min_fidelity:g}" if short else ""

    def _smallest(self, problem: SearchProblem) -> SearchResult:
        """Return the fewest MACs (or parameters, without MACs) within the gates, by bisection on the share kept.

        Raises:
            BudgetError: the smallest change already exceeds them.
        """
        kind = self._shrinks
        low, high = problem.reachable(kind) / problem.originals[kind], 1.0
        result, failure = None, "no model was found that passes"
        if self.spec.factorize or len(problem.choices) > 1:  # determine the losses and the rate of exchange
            halfway = problem.with_targets(Target(kind, 0.5 * (low + high)))
            problem = replace(problem, lead=self._evaluated(halfway, halfway.candidates())[1].lead)
        with self.context.stages.until_interrupted(lambda: f"the search ended at {high:.3g} of {kind}" * bool(result)):
            for number in range(_HALVINGS):
                share = 0.5 * (low + high)
                self._at = "final", number, _HALVINGS
                subproblem = problem.with_targets(Target(kind, share))
                evaluated = self._most_promising(subproblem)
                if evaluated is None:
                    low = share
                    continue
                candidate, final = evaluated
                failure = self._missing(final)
                if failure:
                    low = share
                else:
                    high, result = share, SearchResult(problem, [], candidate, final)
        if result is None:
            raise BudgetErrors(problem).gate(failure, None)
        return result

    def _most_promising(self, problem: SearchProblem) -> Evaluated | None:
        """Recover the most promising candidate from all data; None where there is no candidate."""
        factorizes = self.spec.factorize or self._factorization_remark
        with suppress(BudgetError):
            candidate = self._mixture(problem).candidate(problem) if factorizes else None
            candidate = candidate or next(iter(problem.candidates()), None)
            if candidate is not None:
                final = self._evaluate(problem, candidate, trial=False)
                return problem.with_costs_of(candidate, final), final
        return None

    def _nearest(self, problem: SearchProblem) -> tuple[Target, ...] | None:
        """Return the budget nearest to the requested one, towards the whole model, that passes the gates."""
        low, high = 0.0, 1.0
        passing: tuple[Target, ...] | None = None
        for _ in range(_HALVINGS - 1):
            middle = 0.5 * (low + high)
            targets = problem.towards_whole(middle)
            evaluated = self._most_promising(problem.with_targets(*targets))
            if evaluated is not None and not self._missing(evaluated[1]):
                high, passing = middle, targets
            else:
                low = middle
        return passing


# -- the effort spent on a model: counted and not timed, so that a run can be repeated ---------------------------------

# Seconds per cube of the columns that a layer reads to find dependent channels among them, and columns beyond which
# that is done for groups of them.
_SOLVE, _MOST_READ = 7.5e-9, 2048
# Seconds per cube of the columns that a layer reads to decompose it; where nobody asked for factorized candidates: what
# they may take all together, relative to the seconds of all trials, and the fewest that are worth the decompositions.
_DECOMPOSE = 4e-10
_FACTORIZING, _LEAST_FACTORIZED = 7.0, 4
# Samples that the seconds of a candidate below are for.
_SAMPLES = 128
# Seconds to prune, recover and evaluate a candidate: at least, and per billion multiply-accumulates.
_EACH, _PER_BILLION = 1.0, 40.0
# Seconds to prune a group alone: to load it, and to run it on a sample per billion multiply-accumulates.
_OPENED, _RUN = 0.05, 0.03
# The shares to prune groups to, best first.
_SHARES = (SHARES, (0.25, 0.5), (0.5,))


def sample_macs(analysis: Analysis) -> float:
    """Return the multiply-accumulates of the model for one sample."""
    batch = max(min((shape[0] for shape in analysis.facts.probes[0].inputs.values() if shape), default=1), 1)
    return sum(layer.macs_before for layer in analysis.layers) / batch


def trials_of(macs: float, effort: Effort = EFFORTS["normal"], samples: int | None = None) -> int:
    """Return the number of candidates to try around the best one.

    Args:
        macs: multiply-accumulates of a sample.
        effort: bounds on the work.
        samples: number that a candidate is recovered from; None for the most that the effort takes.
    """
    return int(effort.seconds / _candidate_seconds(macs, effort.trial_samples if samples is None else samples))


def _candidate_seconds(macs: float, samples: int) -> float:
    """Return the seconds that the evaluation of a candidate takes, recovered from a number of samples."""
    return _EACH + _PER_BILLION * macs * 1e-9 * samples / _SAMPLES


def measuring_seconds(macs: float, effort: Effort) -> float:
    """Return the seconds that groups may be measured for: those of all trials, or of one where that is longer."""
    return max(effort.seconds, _candidate_seconds(macs, effort.trial_samples))


def measuring_effort(
    macs: float, steps: Sequence[int], effort: Effort = EFFORTS["normal"]
) -> tuple[Sequence[float], int] | None:
    """Return shares of every group to prune alone, and samples to run each on; None where that takes too long.

    Args:
        macs: multiply-accumulates of a sample.
        steps: number of steps in which each group can be pruned, one per group.
        effort: bounds on the work.
    """
    max_seconds = measuring_seconds(macs, effort)
    for shares in _SHARES:
        cuts = max(1, sum(len(counts(n, shares)) for n in steps))
        samples = int((max_seconds / cuts - _OPENED) / (_RUN * max(macs, 1.0) * 1e-9))
        if samples >= effort.least_samples:
            return shares, min(samples, MAX_SAMPLES)
    return None
