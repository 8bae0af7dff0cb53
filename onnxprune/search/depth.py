"""Remove residual branches within a budget: a knapsack over branches and channels, whose sets of branches compete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, isinf

import numpy as np

from onnxprune.allocation.costs import Sizes, costs_of, total
from onnxprune.allocation.factorization import ReducedCost
from onnxprune.allocation.knapsack import Choices, Limit, allocate
from onnxprune.errors import BudgetError, UsageError
from onnxprune.graph.view import Node
from onnxprune.operators.registry import rule_of
from onnxprune.passes.calibration import TrialSplit
from onnxprune.passes.depth import Shortening, prove_branches
from onnxprune.passes.prune import Prune
from onnxprune.pipeline import Context, Model
from onnxprune.pruning.branches import Branch
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.report.facts import AnswerFacts, Fact, Shortened
from onnxprune.search.evaluation import Quality, evaluate, pruned_model
from onnxprune.search.latency import latency_table, rewritable_sizes
from onnxprune.search.problem import SearchProblem
from onnxprune.search.spec import BudgetSpec

# Factors on the rate of exchange between the loss of channels and that of branches, and models to try at most.
_RATES, _TRIALS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0), 6
# Branches to compare before each removal, and levels of a group while branches are compared.
_COMPARED, _LEVELS = 3, 9


def of_original(context: Context, spec: BudgetSpec) -> tuple[BudgetSpec, dict[str, float]]:
    """Return a budget for a model with fewer branches, timed by the original's nodes, and costs of the original.

    Args:
        context: the run.
        spec: the budget.
    """
    analysis = context.analysis
    kinds = {"macs", "params", *(t.kind for t in spec.targets)} - {"latency"}
    sizes = Sizes(analysis, [])
    known = {kind: float(total(costs_of(analysis, sizes, kind), sizes.full_counts)[0]) for kind in kinds}
    if any(t.kind == "latency" for t in spec.targets):
        table = latency_table(context, rewritable_sizes(analysis), source=spec.latency_table)
        known["latency"], spec = table.seconds, replace(spec, latency_table=table)
    return spec, known


@dataclass(frozen=True, slots=True)
class ChosenDepth:
    """The model without the branches whose absence did best.

    Attributes:
        model: it.
        facts: about its branches.
        answers: the sets of branches that were compared.
    """

    model: Model
    facts: Sequence[Fact]
    answers: Sequence[AnswerFacts]


def choose_depth(
    context: Context, model: Model, problem: SearchProblem, prune: Prune, spec: BudgetSpec, mode: str
) -> ChosenDepth:
    """Compare a few sets of branches: each model is pruned to the targets, recovered and evaluated on trial samples.

    Args:
        context: the run, with data.
        model: the original.
        problem: its groups, and the targets.
        prune: scores units.
        spec: the budget.
        mode: of the recovery.
    """
    work = Shortening(context, prune.request.include, prune.request.exclude)
    knapsack = BranchKnapsack(work, problem) if work.free else None
    sets, start = ([()], 0) if knapsack is None else knapsack.sets()
    trials = _Trials(work, model, problem, prune, spec, mode, sets)
    if knapsack is not None:
        trials.climb(start)
    best = trials.best()
    answers = trials.answers(best)
    if not best:
        return ChosenDepth(model, [Shortened(work.others())], answers)
    assert knapsack is not None
    work.errors.update(knapsack.errors(best))
    short, facts = work.result(best, {"depth": len(best)})
    return ChosenDepth(short, [*facts, prove_branches(context, best, short.parts)], answers)


# -- the knapsack ------------------------------------------------------------------------------------------------------


class BranchKnapsack:
    """Branches and channels within the targets: the sets of branches whose removal lets both lose least together.

    Without a set of branches, the outputs lose what is measured without them, and what a knapsack over the groups of
    the others loses within the room that the set leaves. The two are on different scales, since a recovery makes up for
    them differently: the loss of channels counts a rate of exchange times. At each rate, the branch goes next with
    which the sum is least, as long as it falls; of all branches a few are compared, those of the least loss per saved
    cost.

    Args:
        work: the branches.
        problem: the groups, and the targets.
    """

    def __init__(self, work: Shortening, problem: SearchProblem) -> None:
        self._work, self._problem = work, problem
        self._limits = problem.corrected_limits()
        lead = problem.choices[problem.lead]
        self._choices = _thinned(lead)
        self._measure = work.measure_alone(_COMPARED)
        self._runs = len(work.alone) + int(work.context.effort.seconds / self._measure.seconds)
        self._nodes = {node.label: node for node in problem.analysis.graph.steps}
        self._free = {branch.tensor: branch for branch in work.free if branch.tensor in work.alone}
        self._ratio = {name: self._loss_per_saving(branch) for name, branch in self._free.items()}
        self._errors: dict[frozenset[str], float] = {frozenset(): 0.0}
        self._losses: dict[frozenset[str], float] = {}

    def sets(self) -> tuple[list[tuple[Branch, ...]], int]:
        """Return distinct sets of branches in the order of their removal, by rising rates, and the expected best."""
        middle = self._even_rate()
        sets: list[tuple[Branch, ...]] = [()]
        keys, start = [frozenset[str]()], 0
        for factor in _RATES:
            removed = self._at(factor * middle)
            key = _key(removed)
            if key not in keys:
                sets.append(tuple(removed))
                keys.append(key)
            if factor == 1.0:
                start = keys.index(key)
        return sets, start

    def errors(self, removed: Sequence[Branch]) -> dict[str, float]:
        """Return the loss of the outputs when each branch went behind those before it, by tensor."""
        return {b.tensor: self._error(removed[: k + 1]) for k, b in enumerate(removed)}

    def _even_rate(self) -> float:
        """Return the initial rate: 1 for output sensitivities, which are losses of outputs, too."""
        if self._problem.lead == "output sensitivities":
            return 1.0
        halves = [losses[len(losses) // 2] for losses in self._choices.losses]
        channels, branches = np.median(halves), np.median(list(self._work.alone.values()))
        return float(branches / channels) if channels > 0 and np.isfinite(branches) and branches > 0 else 1.0

    def _at(self, rate: float) -> list[Branch]:
        """Return the branches that go at a rate, in order."""
        removed: list[Branch] = []
        least = self._value(removed, rate)
        while True:
            values = {branch.tensor: self._value([*removed, branch], rate) for branch in self._promising(removed)}
            if not values:
                return removed
            name = min(values, key=lambda n: (values[n], self._ratio[n]))
            if not isinf(least) and values[name] >= least:
                return removed
            removed.append(self._free[name])
            least = values[name]

    def _promising(self, removed: Sequence[Branch]) -> Iterator[Branch]:
        """Yield the branches that may go next, of the least loss per saved cost."""
        number, names = 0, {branch.tensor for branch in removed}
        for name in sorted(self._ratio, key=self._ratio.__getitem__):
            branch = self._free[name]
            if name in names or isinf(self._ratio[name]) or self._work.goes_with(branch, removed):
                continue
            if isinf(self._error([*removed, branch])):
                continue
            yield branch
            number += 1
            if number == _COMPARED:
                return

    def _value(self, removed: Sequence[Branch], rate: float) -> float:
        """Return the loss of the outputs without some branches, and of channels within the room that they leave."""
        loss = self._loss(removed)
        return inf if isinf(loss) else self._error(removed) + rate * loss

    def _error(self, removed: Sequence[Branch]) -> float:
        """Return the loss of the outputs without some branches; the sum of two losses where there is no time to run."""
        key = _key(removed)
        if key not in self._errors:
            *before, last = removed
            if len(removed) == 1:
                self._errors[key] = self._work.alone[last.tensor]
            elif self._runs <= 0:
                self._errors[key] = self._error(before) + self._work.alone[last.tensor]
            else:
                self._runs -= 1
                self._errors[key] = inf
                with suppress(UsageError):  # nothing would be left of a sum, or of the caches
                    self._errors[key] = self._measure.without(removed)
        return self._errors[key]

    def _loss(self, removed: Sequence[Branch]) -> float:
        """Return the least loss of channels within the targets without some branches; infinity out of reach."""
        key = _key(removed)
        if key not in self._losses:
            costs = self._costs(removed)
            allocation = allocate(self._choices, [Limit(costs[kind], limit) for kind, limit in self._limits.items()])
            self._losses[key] = inf if allocation is None else allocation.loss
        return self._losses[key]

    def _costs(self, removed: Sequence[Branch]) -> Mapping[str, ReducedCost]:
        """Return the costs of every kind without some branches."""
        problem = self._problem
        nodes = list({node.index: node for branch in removed for node in self._nodes_of(branch)}.values())
        absent, consumers = {node.index for node in nodes}, problem.analysis.graph.consumers
        read = dict.fromkeys(name for node in nodes for name in node.inputs if name in problem.analysis.graph.weights)
        weights = [name for name in read if all(reader.index in absent for reader, _ in consumers[name])]
        return {k: ReducedCost(cost, k, problem.sizes, nodes, weights) for k, cost in problem.costs.items()}

    def _nodes_of(self, branch: Branch) -> Iterator[Node]:
        """Yield the nodes of the analysed graph that go with a branch, with a sum that has one addend left."""
        graph = self._work.scan.graph
        for index in branch.nodes:
            node = self._nodes.get(graph.nodes[index].label)
            if node is not None:
                yield node
        node = self._nodes.get(branch.sum)
        if node is not None and len(rule_of(node).addends(node)) == 2 and not rule_of(node).weights:
            yield node

    def _loss_per_saving(self, branch: Branch) -> float:
        """Return the loss of a branch alone, per share of what has to be saved; infinity where it saves nothing."""
        full, saved = self._problem.sizes.full_counts, 0.0
        for kind, cost in self._costs([branch]).items():
            before = self._problem.base(kind)
            saved += float(cost.saved(full)[0]) / max(before - self._limits[kind], 1e-9 * before)
        return self._work.alone[branch.tensor] / saved if saved > 0 else inf


def _key(removed: Sequence[Branch]) -> frozenset[str]:
    return frozenset(branch.tensor for branch in removed)


def _thinned(choices: Choices) -> Choices:
    """Return choices with a few levels of every group, the first and the last among them."""
    levels = [np.unique(np.linspace(0, k.size - 1, min(k.size, _LEVELS)).round().astype(int)) for k in choices.options]
    pairs = list(zip(levels, choices.options, choices.losses, strict=True))
    return Choices([k[i] for i, k, _ in pairs], [x[i] for i, _, x in pairs])


# -- trials ------------------------------------------------------------------------------------------------------------


class _Trials:
    """Trials of sets of branches, each evaluated once: the model without them, pruned to the targets by scores.

    Args:
        work, model, problem, prune, spec, mode: as in :func:`choose_depth`.
        sets: the sets, those of few branches first.
    """

    def __init__(
        self,
        work: Shortening,
        model: Model,
        problem: SearchProblem,
        prune: Prune,
        spec: BudgetSpec,
        mode: str,
        sets: Sequence[Sequence[Branch]],
    ) -> None:
        self._work, self._model, self._problem, self._prune = work, model, problem, prune
        self._spec, self._mode, self._sets = spec, mode, sets
        self._quality: dict[int, Quality | None] = {}

    def climb(self, start: int) -> None:
        """Evaluate no removal and the expected best set, then sets of more, and of fewer, branches while that helps."""
        at_most = max(2, min(_TRIALS, self._work.context.effort.candidates))
        self._value(0)
        self._value(start)
        for step in (1, -1):
            k = start
            while len(self._quality) < at_most and 0 <= k + step < len(self._sets):
                before = self._value(k)
                if not (self._value(k + step) > before or isinf(before)):
                    break
                k += step

    def best(self) -> Sequence[Branch]:
        """Return the set of the best quality; the last one, where none is within the targets."""
        if not self._quality:
            return self._sets[0]
        best = max(self._quality, key=self._value)
        return self._sets[-1 if isinf(self._value(best)) else best]

    def answers(self, best: Sequence[Branch]) -> list[AnswerFacts]:
        """Return the sets that were evaluated, for the report."""
        answers, names = [], set[str]()
        for k, quality in sorted(self._quality.items()):
            removed = self._sets[k]
            name = {0: "no branch removed", 1: "1 branch removed"}.get(len(removed), f"{len(removed)} branches removed")
            name = f"{name}, {removed[-1].tensor} the last" if name in names else name
            names.add(name)
            if quality is not None:
                answers.append(AnswerFacts(name, quality.fine, quality.points, chosen=removed is best))
        return answers

    def _value(self, k: int) -> float:
        """Return the quality of a set, -infinity where the targets are out of reach without it."""
        if k not in self._quality:
            self._quality[k] = None
            with suppress(BudgetError, CannotRewrite):
                self._quality[k] = self._evaluated(self._sets[k])
            self._work.context.tell("depth", min(1.0, len(self._quality) / _TRIALS))
        quality = self._quality[k]
        return -inf if quality is None else quality.fine

    def _evaluated(self, removed: Sequence[Branch]) -> Quality | None:
        """Return the quality of the model without some branches, pruned to the targets by scores alone.

        Raises:
            BudgetError: no channel can be removed. CannotRewrite: a node has no form with the new sizes.
        """
        context, short = self._work.context, self._work.model(removed) if removed else self._model
        problem = self._without(short) if removed else replace(self._problem, lead="scores")
        candidate = next(iter(problem.candidates()), None)
        if candidate is None:
            return None
        split = TrialSplit(context.effort.trial_samples)
        pruned = pruned_model(problem.analysis, candidate.removed, short.plan.branches)
        return evaluate(context, pruned, mode=self._mode, metric=self._spec.metric, split=split).quality

    def _without(self, short: Model) -> SearchProblem:
        """Return the problem of a model without some branches, by scores."""
        context, analysis, table = self._work.context, short.analysis, self._problem.table
        if table is not None:
            analysis = rewritable_sizes(analysis).analysis
        selector, spec = self._prune.selector(context, analysis), self._spec
        problem = SearchProblem.of(context, selector, spec.targets, table, quantize=spec.quantize)
        return problem.with_originals(self._problem.originals)
