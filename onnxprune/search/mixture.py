"""Prune groups and factorize layers: one knapsack over both, whose losses trials bring to one scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Cost, Counts
from onnxprune.allocation.factorization import FactorizedCost, Part, add_parts, exclude_parts
from onnxprune.allocation.knapsack import Allocation, Choices, Limit, allocate
from onnxprune.errors import BudgetError, UsageError, argument
from onnxprune.factorization.allocation import AUTO, LayerChoices, LayerFits, cost_share
from onnxprune.factorization.allocation import Candidate as LayerCandidate
from onnxprune.factorization.settings import Options, request_of
from onnxprune.graph.view import Node
from onnxprune.passes.calibration import MAX_TRIAL
from onnxprune.passes.factor_work import Work, prepare_work
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.joint_budget import JointBudget
from onnxprune.pipeline import Context, Model, apply
from onnxprune.search.evaluation import Evaluation, pruned_model
from onnxprune.search.problem import Candidate, Evaluated, LimitCorrection, SearchProblem
from onnxprune.search.refine import Space, weighed

Array = NDArray[np.float64]
Judge = Callable[[Candidate], Evaluation | None]

ALONE, TOGETHER = "knapsack over layers", "knapsack over groups and layers"
WEIGHED = f"{TOGETHER}, weighed by trial"
FACTORIZED_TRIALS = 7
"""Largest number of rates of exchange that are tried."""
# Ratio between these rates.
_STEPS = (4.0, 2.0)
# Number of corrections of a limit on time until the measured time fits.
_CORRECTIONS = 4
# Part of the way to the target at which losses are compared, and the step for the slope.
_HALF, _SLOPE = 0.5, 0.05
# A limit without effect.
_NEARLY_ALL = 0.99


class Mixture:
    """Candidates that prune some groups and factorize some layers.

    A group's loss is a score and a layer's loss a share of energy, with an unknown rate of exchange. The search starts
    at the rate at which the last unit of cost has the same loss in both, half the way to the targets. It then tries
    lower and higher rates and evaluates every candidate, as long as the outputs come closer to the original's. The
    knapsack determines how much is pruned; ranks are then chosen for the pruned layers. For a target on MACs, ranks
    are left out whose activations cost more to move than the MACs that they save. For a target on time, each layer's
    gain is measured, and every candidate is timed before it is recovered.

    Args:
        context: the run.
        problem: groups and costs of all kinds but ``peak-memory``.
        options: ``include``, ``exclude`` and ``round_to`` hold for layers, too.
        requested: whether the user asked for factorization: MACs are saved then even where that saves no time.

    Attributes:
        costs: costs of the problems that candidates may be requested for.
        gains: weight of a layer's error, by its name.

    Raises:
        UsageError: the target is a time of another device.
    """

    def __init__(self, context: Context, problem: SearchProblem, options: Options, *, requested: bool = True) -> None:
        self._context, self._options = context, options
        self.costs = problem.costs
        self._timed = "latency" in problem.costs
        if self._timed and not problem.is_measured_here:
            raise UsageError(
                f"{argument('factorize')} with a latency target measures factorized layers here, but "
                f"{argument('latency_table')} is of another device",
                hint="Drop one of the two, or give a target of macs.",
            )
        trial_context, model = context.for_trial(MAX_TRIAL), Model.of(problem.analysis)
        request = request_of("auto", replace(options, ratio=0.5, cost=_furthest(problem), timed=False))
        work = prepare_work(trial_context, model, request, AUTO, replayed=None)
        self._lighter = not self._timed and request.cost == "macs"
        joint = JointBudget(work, AUTO, LayerChoices(), lighter=self._lighter)
        if self._lighter and requested and not any(joint.options):  # layers too small to be worth anything in time
            self._lighter, joint = False, JointBudget(work, AUTO, LayerChoices())
        self.gains = {o.layer.name: g for o, g in zip(joint.layer_fits, joint.gains, strict=True)}
        pairs = zip(joint.layer_fits, joint.options, strict=True)
        options_of = timed_options(work, joint) if self._timed else [_ordered(o, c) for o, c in pairs]
        nodes = {node.label: node for node in problem.analysis.graph.steps}
        self._parts, self._candidates = [], []
        for layer_fits, gain, timed in zip(joint.layer_fits, joint.gains, options_of, strict=True):
            part = _part(layer_fits, gain, timed, nodes)
            if part is not None:
                self._parts.append(part)
                # Not the fits: their matrices would stay in memory during all trials.
                self._candidates.append((layer_fits.layer, [option.candidate for option in timed]))
        self._costs = {k: FactorizedCost(cost, k, problem.sizes, self._parts) for k, cost in problem.costs.items()}
        self.restart()

    def restart(self) -> None:
        """Return to the initial rate, without corrections that earlier targets led to."""
        self._correction: Mapping[str, float] = {"latency": 1.0}
        self._rate: tuple[str, float] | None = None

    def trials(self, problem: SearchProblem, judge: Judge, max_trials: int) -> list[Evaluated]:
        """Return evaluated candidates within the targets, by rising and falling rates around the initial one.

        Args:
            problem: with the costs that this was opened for.
            judge: evaluates a candidate; returns None where it cannot be made.
            max_trials: largest number of candidates to evaluate.
        """
        evaluated: list[Evaluated] = []
        losses: dict[tuple[bytes, str], float] = {}

        def value(rate: float) -> float:
            candidate = self.candidate(problem, rate)
            if candidate is None:
                return -np.inf
            factorize = candidate.factorize
            assert factorize is not None
            key = candidate.removed.tobytes(), repr(factorize.shares or factorize.request.share)
            if key not in losses:
                evaluation = judge(candidate)
                losses[key] = -np.inf if evaluation is None else evaluation.quality.fine
                evaluated.extend([(candidate, evaluation)] if evaluation is not None else [])
            return losses[key]

        value(np.inf)
        current_rate = self.rate(problem)
        best = value(current_rate)
        for step in _STEPS:
            for factor in (step, 1.0 / step):
                while len(losses) < max_trials and (after := value(current_rate * factor)) > best:
                    best, current_rate = after, current_rate * factor
        self._rate = problem.lead, current_rate
        return evaluated

    def rate(self, problem: SearchProblem) -> float:
        """Return the weight of a group's loss against a layer's: the last one tried, else the initial one."""
        if self._rate is None or self._rate[0] != problem.lead:
            self._rate = problem.lead, self._even(problem)
        return self._rate[1]

    def space(self, problem: SearchProblem) -> Space:
        """Return groups and layers at the best rate, for candidates with other loss weights."""
        rate = self.rate(problem)
        weighted = add_parts(problem.choices[problem.lead], self._parts, rate)
        limits = problem.corrected_limits()
        return Space(weighted, self._costs, limits, lambda weights, _: self.candidate(problem, rate, weights), "")

    def candidate(
        self, problem: SearchProblem, rate: float | None = None, weights: Array | None = None
    ) -> Candidate | None:
        """Return counts at a rate of exchange, and the ranks that save the rest.

        None where nothing fits, or pruning alone is enough.

        Args:
            problem: a problem with the costs of this mixture.
            rate: weight of a group's loss against a layer's.
            weights: further loss weights of every group and then of every layer, [groups + layers].

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        rate = self.rate(problem) if rate is None else rate
        if not self._timed:
            return self._candidate(problem, rate, 1.0, weights)
        correction, maximum, best = LimitCorrection(self._correction), problem.limits()["latency"], None
        for _ in range(_CORRECTIONS):
            candidate = self._candidate(problem, rate, correction.now["latency"], weights)
            if candidate is None:
                break
            try:
                seconds = self._seconds(problem, candidate)
            except BudgetError:  # no ranks of the pruned layers save as much as before
                break
            candidate = replace(candidate, costs={**candidate.costs, "latency": seconds})
            over = seconds / maximum
            if over <= 1 and (best is None or candidate.allocation.loss < best.allocation.loss):
                best = candidate
            if not correction.update({"latency": over}):
                break
        self._correction = correction.now
        return best

    def _candidate(self, problem: SearchProblem, rate: float, factor: float, weights: Array | None) -> Candidate | None:
        """Return a candidate as ``candidate`` does, with a limit on time that is multiplied by a factor."""
        choices = problem.choices[problem.lead]
        weighted = exclude_parts(choices, self._parts) if np.isinf(rate) else add_parts(choices, self._parts, rate)
        if weights is not None:
            weighted = weighed(weighted, weights)
        limits = problem.corrected_limits()
        if self._timed:
            limits["latency"] *= factor
        allocation = allocate(weighted, [Limit(self._costs[k], maximum) for k, maximum in limits.items()])
        if allocation is None:
            return None
        groups = len(choices.options)
        counts, levels = allocation.counts[:groups], allocation.counts[groups:]
        removed = problem.removed(counts)
        costs = problem.measured(counts, removed, timed=not self._timed)
        gains = self.gains if weights is None else self._weighed(weights[groups:])
        factorize = self._as_timed(levels) if self._timed else self._as_counted(costs, limits, gains)
        if factorize is None:
            return None
        name = ALONE if np.isinf(rate) else TOGETHER if weights is None else WEIGHED
        return Candidate(
            name, Allocation(counts, allocation.loss, allocation.bound), removed, costs, factorize=factorize
        )

    def _seconds(self, problem: SearchProblem, candidate: Candidate) -> float:
        """Return seconds of a run of a candidate; recovery changes values alone."""
        assert candidate.factorize is not None
        trial_context = self._context.for_trial(MAX_TRIAL)
        pruned = pruned_model(problem.analysis, candidate.removed)
        result = apply(candidate.factorize.unchecked(), trial_context, pruned)
        return problem.measured_model(result.model.parts, {"latency"})["latency"]

    def _weighed(self, weights: Array) -> dict[str, float]:
        """Return the weight of each layer's error, times the weights [layers] of the layers that may be factorized."""
        names = [layer.name for layer, _ in self._candidates]
        return self.gains | {name: self.gains[name] * float(w) for name, w in zip(names, weights, strict=True)}

    def _as_counted(
        self, costs: Mapping[str, float], limits: Mapping[str, float], gains: Mapping[str, float]
    ) -> Factorize | None:
        """Return ranks that save what pruning leaves to save; None where that is nothing, or the whole cost."""
        kind = min(limits, key=lambda k: limits[k] / costs[k])
        saved = 1.0 - limits[kind] / costs[kind]
        if not 0 < saved < 1:
            return None
        options = replace(self._options, ratio=saved, timed=False, cost=_counted_as(kind))
        return Factorize("auto", gains=gains, lighter=self._lighter, **options.arguments)

    def _as_timed(self, levels: Counts) -> Factorize | None:
        """Return the methods and shares of the work that were timed, for the layers after pruning."""
        requested: dict[str, tuple[str, float]] = {}
        for level, (layer, candidates) in zip(levels.tolist(), self._candidates, strict=True):
            if level < len(candidates):
                choice = candidates[level]
                requested[layer.name] = choice.method, cost_share(layer, choice, "macs")
        if not requested:
            return None
        options = replace(self._options, ratio=0.5, timed=False, cost="macs")
        return Factorize("auto", shares=requested, **options.arguments)

    def _even(self, problem: SearchProblem) -> float:
        """Return the rate at which groups and layers have the same marginal loss half the way to the targets."""
        choices = problem.choices[problem.lead]
        cut = _slope(problem, choices, problem.costs)
        factors = _slope(problem, exclude_parts(choices, self._parts), self._costs)
        return factors / cut if factors > 0 and cut > 0 else 1.0


def _slope(problem: SearchProblem, choices: Choices, costs: Mapping[str, Cost]) -> float:
    """Return the loss of one more step half the way to the targets; 0 where that is out of reach."""
    losses = []
    for factor in (_HALF - _SLOPE, _HALF + _SLOPE):
        limits = {}
        for kind, maximum in problem.corrected_limits().items():
            base = problem.base(kind)
            limits[kind] = base * (1 - factor) + factor * (maximum if maximum < _NEARLY_ALL * base else _HALF * base)
        allocation = allocate(choices, [Limit(costs[k], maximum) for k, maximum in limits.items()])
        losses.append(np.nan if allocation is None else allocation.loss)
    return float(np.nan_to_num(losses[1] - losses[0]))


def _furthest(problem: SearchProblem) -> str:
    """Return the kind of the target that is furthest away, as a factorization counts it."""
    kinds = {k: maximum / problem.base(k) for k, maximum in problem.limits().items()}
    return _counted_as(min(kinds, key=kinds.__getitem__))


def _counted_as(kind: str) -> str:
    """Return the kind of a layer's cost that a target of that kind depends on."""
    return "macs" if kind in ("macs", "latency") else "params"


def _ordered(layer_fits: LayerFits, options: Sequence[LayerCandidate]) -> list[TimedOption]:
    """Return candidates that reduce the cost, by rising cost; their times are not known."""
    return [TimedOption(c, np.nan) for c in sorted(options, key=lambda c: c.cost) if c.cost < layer_fits.full_cost]


def _part(
    layer_fits: LayerFits, gain: float, options: Sequence[TimedOption], node_of: Mapping[str, Node]
) -> Part | None:
    """Return a layer with its candidates, and itself; None without candidates, or where its node has changed."""
    nodes = tuple(node_of[use.node.label] for use in layer_fits.layer.uses if use.node.label in node_of)
    if not options or len(nodes) < len(layer_fits.layer.uses):
        return None
    macs, params = (
        np.array([*(cost_share(layer_fits.layer, c, k) for c, _ in options), 1.0]) for k in ("macs", "params")
    )
    losses, times = [gain * c.loss for c, _ in options], [share for _, share in options]
    return Part(nodes, layer_fits.layer.weight, np.array([*losses, 0.0]), macs, params, np.array([*times, 1.0]))


# -- candidates of a layer that make it faster -------------------------------------------------------------------------

# Shares of a layer's cost at which candidates are timed.
_SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
# Smaller savings are within noise.
_FASTER = 0.97


class TimedOption(NamedTuple):
    """A candidate and its time as a share of the layer's."""

    candidate: LayerCandidate
    share: float


def timed_options(work: Work, joint: JointBudget) -> list[list[TimedOption]]:
    """Return per layer the candidates that are faster than it, by rising time; slower ones lose less."""
    options_of_layers = []
    total = max(len(joint.layer_fits), 1)
    for number, (layer_fits, options) in enumerate(zip(joint.layer_fits, joint.options, strict=True)):
        layer_options = []
        for candidate in _nearest_candidates(layer_fits, options):
            (result,) = work.factorize({layer_fits.layer.name: candidate})
            latency = joint.latency(result)
            if latency is not None and result.candidate is candidate:
                layer_options.append(TimedOption(candidate, latency.after_ms / latency.before_ms))
        options_of_layers.append(_worth(layer_options))
        work.context.tell("layers apart", (number + 1) / total)
    return options_of_layers


def _nearest_candidates(layer_fits: LayerFits, selected: Sequence[LayerCandidate]) -> list[LayerCandidate]:
    """Return, of every method, the candidates nearest to the shares, each once."""
    candidates: dict[tuple[str, tuple[int, ...]], LayerCandidate] = {}
    for method in dict.fromkeys(c.method for c in selected):
        affordable = [c for c in selected if c.method == method and c.cost < layer_fits.full_cost]
        for share in _SHARES if affordable else ():
            nearest = min(affordable, key=lambda c: abs(c.cost - share * layer_fits.full_cost))
            candidates[method, tuple(nearest.ranks)] = nearest
    return list(candidates.values())


def _worth(options: Sequence[TimedOption]) -> list[TimedOption]:
    """Return the faster candidates, without any that loses more than a faster one."""
    pareto: list[TimedOption] = []
    for option in sorted((t for t in options if t.share < _FASTER), key=lambda t: (t.share, t.candidate.loss)):
        if not pareto or option.candidate.loss < pareto[-1].candidate.loss:
            pareto.append(option)
    return pareto
