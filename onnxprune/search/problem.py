"""A budget as a problem over counts: groups with scores, targets with costs, candidates, limit correction, errors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log, prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import CodedFile, Cost, Counts, Peak, Sizes, costs_of, total
from onnxprune.allocation.knapsack import (
    Allocation,
    Choices,
    Limit,
    allocate,
    by_curves,
    by_scores,
    least,
    levels_of,
    uniform,
)
from onnxprune.allocation.latency_model import Latency, LatencyTable, NodeKinds
from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.rounding import AUTO
from onnxprune.allocation.selection import close_selection, counts_of, macs_after
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.selection import removed_atoms
from onnxprune.errors import BudgetError, UsageError, argument
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.flush import flush
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.quantize import coded_weights, quickly_quantized
from onnxprune.passes.select import Selector
from onnxprune.passes.workspace import Workspace, timing_feed
from onnxprune.pipeline import Context, Model, ModelParts
from onnxprune.search.evaluation import Evaluation
from onnxprune.search.latency import Bench, block_levels
from onnxprune.targets import Target

Mask = NDArray[np.bool_]
Solve = Callable[[Choices, Sequence[Limit]], Allocation | None]
Curves = Mapping[int, tuple[NDArray[np.float64], NDArray[np.float64]]]

TOLERANCE = {"latency": 0.05}
"""Share by which a cost of a kind may exceed its limit; 0.02 for costs that can be counted."""
_COUNTED = 0.02
_CORRECTIONS = 7
# Measurements of the time of a final model.
_FINAL_TIMES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Counts [groups] for the targets, and their costs by kind (as far as measured).

    Attributes:
        name: origin of the counts.
        allocation: the counts.
        removed: mask over atoms.
        costs: by kind.
        source: the problem's choices that it is optimal for; empty for another origin.
        factorize: the pass after pruning, where that is part of the candidate; costs are then those of pruning alone,
            until the candidate is evaluated.
        corrections: factors on the limits by kind at which the counts were chosen, so that measured costs fit.
    """

    name: str
    allocation: Allocation
    removed: Mask
    costs: Mapping[str, float]
    source: str = ""
    factorize: Factorize | None = None
    corrections: Mapping[str, float] = field(default_factory=dict)


Evaluated = tuple[Candidate, Evaluation]


def best_of(evaluated: Sequence[Evaluated]) -> Evaluated:
    """Return the candidate of the highest quality."""
    return max(evaluated, key=lambda pair: pair[1].quality.fine)


@dataclass(frozen=True, slots=True, eq=False)
class SearchProblem:
    """Groups, scores, costs and targets of one model; other targets make another problem.

    Attributes:
        context: the run.
        selector: the scored units.
        groups: the scored groups, by their number.
        sizes: of all tensors as functions of counts.
        costs: of counts, by kind.
        originals: costs of the original, by kind.
        choices: levels and losses of every group, by origin of the losses: ``scores``, and measurements.
        targets: limits on costs.
        lead: the choices whose candidates are expected, or known, to have the best quality.
        table: of times, where one is asked for.
        corrections: factors on the limits of those kinds of which a recovered model has exceeded its limit.
        quantize: mode of the quantization that follows; sizes and times are then those of quantized models.
    """

    context: Context
    selector: Selector
    groups: Mapping[int, RankedGroup]
    sizes: Sizes
    costs: Mapping[str, Cost]
    originals: Mapping[str, float]
    choices: Mapping[str, Choices]
    targets: tuple[Target, ...]
    lead: str
    table: LatencyTable | None = None
    corrections: Mapping[str, float] = field(default_factory=dict)
    quantize: str | None = None

    @classmethod
    def of(
        cls,
        context: Context,
        selector: Selector,
        targets: Sequence[Target],
        table: LatencyTable | None = None,
        curves: Curves | None = None,
        sensitivity: Mapping[int, NDArray[np.float64]] | None = None,
        *,
        rounded: bool = True,
        quantize: str | None = None,
    ) -> SearchProblem:
        """Build the problem of one model.

        Args:
            context: the run.
            selector: scores the units.
            targets: limits on costs.
            table: of times.
            curves: measured losses {group: (shares removed, losses)}, where there are any.
            sensitivity: scores [units] by group that sum to the group's output sensitivity, if measured.
            rounded: whether groups keep multiples that the device likes.
            quantize: mode of the quantization that follows.

        Raises:
            UsageError: the model has no cost of a target's kind. ModelError: it cannot be quantized.
        """
        scored = selector.pool()
        groups = [selector.analysis.units.groups[n] for n in scored]
        free = table is not None and _is_free(context, selector, table)
        if free or not rounded:
            scored = {g.id: replace(scored[g.id], counts=counts_of(g, selector.request)) for g in groups}
        sizes = Sizes(selector.analysis, groups)
        costs = {t.kind: _cost(sizes, t.kind, table) for t in targets}
        originals = {kind: float(total(cost, sizes.full_counts)[0]) for kind, cost in costs.items()}
        for kind, original in originals.items():
            if original <= 0 and kind != "latency":
                raise _costs_nothing(kind)
        ranked = list(scored.values())
        blocks = [block_levels(g.steps) for g in groups] if free else None
        levels = levels_of(ranked, blocks)
        choices = {"scores": by_scores(ranked, levels)}
        if sensitivity:
            choices["output sensitivities"] = by_scores(
                [replace(c, values=sensitivity[n]) for n, c in scored.items()], levels
            )
        if curves:
            choices["sensitivities"] = by_curves(ranked, levels, curves, list(scored))
        lead = list(choices)[-1]
        problem = cls(context, selector, scored, sizes, costs, originals, choices, tuple(targets), lead, table)
        return problem if quantize is None else problem._in_eight_bits(quantize)

    def with_originals(self, originals: Mapping[str, float]) -> SearchProblem:
        """Return the problem with costs of another original by kind, of which the analysed model lacks branches."""
        return replace(self, originals={kind: originals.get(kind, cost) for kind, cost in self.originals.items()})

    def _in_eight_bits(self, mode: str) -> SearchProblem:
        """Return the problem with sizes and times of quantized models, in proportion to those of the original."""
        costs, timed = dict(self.costs), "latency" in self.costs and self.is_measured_here
        if "size" in costs or timed:
            analysis = self.analysis
            with Workspace.of(analysis) as trial:
                parts = quickly_quantized(self.context, Model.of(analysis), mode)
                path, size = trial.write(*parts, "quantized")
                if "size" in costs:
                    coded = CodedFile(size, coded_weights(parts))
                    costs["size"] = costs_of(analysis, self.sizes, "size", coded)
                if timed:
                    assert self.table is not None
                    costs["latency"] = Latency(NodeKinds(self.sizes), self.table, self._share_of_time(trial, path))
        return replace(self, costs=costs, quantize=mode)

    @property
    def analysis(self) -> Analysis:
        """Return the analysis of the model."""
        return self.selector.analysis

    @property
    def is_measured_here(self) -> bool:
        """Return whether times can be measured on this machine."""
        return self.table is not None and self.table.device == self.context.device.facts()

    def limits(self) -> dict[str, float]:
        """Return the limit of every kind."""
        return {t.kind: t.limit(self.base(t.kind)) for t in self.targets}

    def corrected_limits(self) -> dict[str, float]:
        """Return the limits times their corrections from recovered models."""
        return {k: maximum * self.corrections.get(k, 1.0) for k, maximum in self.limits().items()}

    def base(self, kind: str) -> float:
        """Return the cost that shares refer to: the measured time of the original, else its counted cost."""
        return self.table.seconds if kind == "latency" and self.table is not None else self.originals[kind]

    def candidates(self) -> list[Candidate]:
        """Return distinct counts within the targets, the most promising first, the same share for all groups last.

        The list is empty where no counts fit.
        """
        first = sorted(self.choices, key=lambda name: name != self.lead)
        candidates = [self.candidate(f"knapsack over {name}", name, allocate) for name in first]
        candidates.append(self.candidate("uniform", "", uniform))
        unique: dict[bytes, Candidate] = {}
        for candidate in candidates:
            if candidate is not None:
                unique.setdefault(candidate.allocation.counts.tobytes(), candidate)
        return list(unique.values())

    def candidate(self, name: str, source: str, solve: Solve, rounds: int = _CORRECTIONS) -> Candidate | None:
        """Return counts that fit as measured: where a cost differs from its prediction, its limit is corrected.

        Args:
            name: origin of the counts.
            source: the choices that they are chosen from; empty for the scores.
            solve: chooses counts within limits; None where none fit.
            rounds: number of counts to measure at most.
        """
        choices = self.choices[source or "scores"]
        limits, best = self.limits(), None
        correction = LimitCorrection({kind: self.corrections.get(kind, 1.0) for kind in self.costs})
        for number in range(rounds):
            constraints = [Limit(self.costs[k], maximum * correction.now[k]) for k, maximum in limits.items()]
            is_last = number == rounds - 1 and best is None and "latency" in limits
            allocation = None if is_last else solve(choices, constraints)
            if allocation is None:
                # A time is predicted to be out of reach: the fastest counts may be within it all the same.
                allocation = self._least(choices) if best is None and "latency" in limits else None
                correction.end()
                if allocation is None:
                    break
            removed = self.removed(allocation.counts)
            costs, corrections = self.measured(allocation.counts, removed), dict(correction.now)
            candidate = Candidate(name, allocation, removed, costs, source, corrections=corrections)
            over = {k: candidate.costs[k] / maximum for k, maximum in limits.items()}
            if max(over.values()) <= 1 and (best is None or allocation.loss < best.allocation.loss):
                best = candidate
            if not correction.update(over):
                break
        return best

    def _least(self, choices: Choices) -> Allocation:
        """Return the counts of the least predicted time."""
        counts = least(choices, self.costs["latency"])
        levels = [int(np.searchsorted(k, n)) for k, n in zip(choices.options, counts, strict=True)]
        return Allocation(counts, choices.loss(levels), -np.inf)

    def with_costs_of(self, candidate: Candidate, evaluation: Evaluation) -> Candidate:
        """Return a candidate with its costs after recovery."""
        costs = {"size": float(evaluation.size), "params": float(evaluation.params)}
        if candidate.factorize is not None:
            costs["macs"] = float(evaluation.macs)
            if "latency" in self.costs:
                costs |= self.measured_model(evaluation.model.parts, {"latency"})
        if self.quantize is not None and "size" in self.costs:
            costs |= self.measured_model(evaluation.model.parts, {"size"})
        return replace(candidate, costs={**candidate.costs, **{k: v for k, v in costs.items() if k in self.costs}})

    def with_final_time(self, candidate: Candidate, evaluation: Evaluation) -> Candidate:
        """Return a candidate with the time of its final model, where times are measured here.

        Of many candidates, those that were measured too short seem to fit, so that the last one is timed anew: the
        first of three measurements that fits, else the shortest, since a disturbance may hold up the one as well.
        """
        if "latency" not in self.costs or not self.is_measured_here:
            return candidate
        limit, seconds = self.limits()["latency"] * (1 + tolerance("latency")), list[float]()
        while len(seconds) < _FINAL_TIMES and min(seconds, default=np.inf) > limit:
            seconds.append(self.measured_model(evaluation.model.parts, {"latency"})["latency"])
        return replace(candidate, costs={**candidate.costs, "latency": min(seconds)})

    def over(self, candidate: Candidate) -> dict[str, float]:
        """Return costs as shares of their limits."""
        return {k: candidate.costs[k] / maximum for k, maximum in self.limits().items()}

    def tightened(self, over: Mapping[str, float]) -> SearchProblem:
        """Return the problem with lower limits for the kinds that were exceeded, {kind: share of its limit}."""
        wrong = {k: self.corrections.get(k, 1.0) * SAFE / share for k, share in over.items() if share > 1}
        return replace(self, corrections={**self.corrections, **wrong})

    def with_targets(self, *targets: Target) -> SearchProblem:
        """Return the problem with other targets of the same kinds."""
        return replace(self, targets=targets)

    def towards_whole(self, share: float) -> tuple[Target, ...]:
        """Return targets part of the way from the present ones (0) to the cost of the original (1)."""
        bases, limits = {t.kind: self.base(t.kind) for t in self.targets}, self.limits()
        return tuple(
            t.with_limit(limits[t.kind] + share * (bases[t.kind] - limits[t.kind]), bases[t.kind]) for t in self.targets
        )

    def origin(self, kind: str) -> str:
        """Return the origin of the costs of that kind."""
        if kind != "latency":
            return "counted"
        return "measured" if self.is_measured_here else "predicted"

    def removed(self, counts: Counts) -> Mask:
        """Return the mask over atoms for counts [groups]: the units with the lowest scores are removed."""
        num_removed = [int(s - k) for s, k in zip(self.sizes.steps, counts, strict=True)]
        return removed_atoms(self.analysis.units, close_selection(self.analysis, self.groups, num_removed))

    def measured(self, counts: Counts, removed: Mask, *, timed: bool = True) -> dict[str, float]:
        """Return costs before any recovery: counted on the pruned model, timed if this is the target machine.

        Args:
            counts: counts [groups].
            removed: mask over atoms for these counts.
            timed: measure time, too, in place of predicting it.

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        costs = {kind: float(total(cost, counts[None])[0]) for kind, cost in self.costs.items()}
        if "macs" in costs:
            costs["macs"] = float(macs_after(self.analysis, removed))
        kinds = costs.keys() & {"params", "size", "latency"} - (set() if timed else {"latency"})
        if kinds:
            costs |= self.measured_model(cut_model(self.analysis, removed), kinds)
        return costs

    def measured_model(self, model: ModelParts, kinds: Collection[str]) -> dict[str, float]:
        """Return costs of a model, of the kinds that a file determines: counted, and timed beside the original.

        The original of the run is meant, with its branches where the analysed model lacks some.
        """
        parts = flush(model)[0]
        costs = {"params": float(sum(int(np.prod(w.shape)) for w in parts[1].values()))}
        timed = "latency" in kinds and self.is_measured_here
        if self.quantize is not None and (timed or "size" in kinds):
            parts = quickly_quantized(self.context, Model.of(self.analysis).with_parts(parts), self.quantize)
        with Workspace.of(self.context.analysis) as trial:
            path, size = trial.write(*parts, "measured")
            costs["size"] = float(size)
            if timed:
                costs["latency"] = self._share_of_time(trial, path) * self.base("latency")
        return {kind: cost for kind, cost in costs.items() if kind in kinds}

    def _share_of_time(self, trial: Workspace, path: Path) -> float:
        """Return the time of a model in proportion to that of the original, both measured in turn."""
        feed = timing_feed(self.context, trial)
        bench = Bench(self.analysis, self.sizes, self.context.device, feed, trial)
        before, after = bench.time_models([trial.original, path])
        return float(after / before)

    def reachable(self, kind: str) -> float:
        """Return the least cost of a kind, with other limits ignored; a measured time where possible.

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        counts = least(self.choices["scores"], self.costs[kind])
        return self.measured(counts, self.removed(counts))[kind]


def _is_free(context: Context, selector: Selector, table: LatencyTable) -> bool:
    """Return whether a table of times knows better than the multiples of channels of the device here."""
    request = selector.request
    is_elsewhere = selector.rounding is None or table.device != context.device.facts()
    return request.round_to == 1 or (request.round_to == AUTO and is_elsewhere)


def _cost(sizes: Sizes, kind: str, table: LatencyTable | None) -> Cost:
    if kind != "latency":
        return costs_of(sizes.analysis, sizes, kind)
    assert table is not None
    return Latency(NodeKinds(sizes), table)


def _costs_nothing(kind: str) -> UsageError:
    """Return the error for a target of a kind that the model has no cost of."""
    reason = "no operator multiplies data with its weights" if kind == "macs" else "the file stores no weights"
    return UsageError(
        f"A target of {kind} has no effect on this model: {reason}, so its {kind} is 0.",
        hint="Choose another kind: params, size, latency or peak-memory.",
    )


def tolerance(kind: str) -> float:
    """Return the share by which a measured cost of that kind may exceed its limit."""
    return TOLERANCE.get(kind, _COUNTED)


# -- limits that measurements correct ----------------------------------------------------------------------------------

# A measured time below this share of its limit leaves room for less pruning; corrections stop a little short of the
# limit, and end where a candidate fits and the next correction would change less than this.
_SLACK, SAFE, _SMALL = 0.95, 0.995, 0.01
_MAX_RISE, _MAX_STEEPNESS = 1.5, 4.0


class LimitCorrection:
    """Limit correction: factors on limits by kind, moved between those that fitted and those that did not.

    Attributes:
        now: the factors to try next, by kind.
    """

    def __init__(self, start: Mapping[str, float]) -> None:
        self.now = dict(start)
        self._fitted: dict[str, float] = {}
        self._failed: dict[str, float] = {}
        self._exceeded: dict[str, tuple[float, float]] = {}
        self._ended = False

    def update(self, over: Mapping[str, float]) -> bool:
        """Record costs as shares of their limits; return whether another correction is worth trying.

        The limit of an exceeded cost is lowered. The limit of a time far below it, where all else fits, is raised.
        """
        fits = all(o <= 1 for o in over.values())
        changed = False
        for kind, share in over.items():
            if share > 1:
                self._failed[kind] = min(self.now[kind], self._failed.get(kind, self.now[kind]))
            elif fits and kind == "latency":
                self._fitted[kind] = max(self.now[kind], self._fitted.get(kind, 0.0))
            if share > 1 or (fits and kind == "latency" and share < _SLACK):
                changed |= self._move(kind, share)
        return changed and not self._ended

    def end(self) -> None:
        """Mark the present factors as the last ones to try."""
        self._ended = True

    def _move(self, kind: str, share: float) -> bool:
        """Move a factor to where the cost would fit if it moved with its limit, within the known bounds."""
        before = self.now[kind]
        after = min(before * (SAFE / share) ** self._steepness(kind, share), before * _MAX_RISE)
        low, high = self._fitted.get(kind), self._failed.get(kind)
        if (low is not None and after <= low) or (high is not None and after >= high):
            after = 0.5 * ((before if low is None else low) + (before if high is None else high))
        self.now[kind] = after
        return share > 1 or abs(after / before - 1) > _SMALL

    def _steepness(self, kind: str, share: float) -> float:
        """Return how much faster the limit has to fall than the cost, by the last two of those that exceeded it."""
        if share <= 1:
            return 1.0
        now, last = (self.now[kind], share), self._exceeded.get(kind)
        self._exceeded[kind] = now
        if last is None or now[0] >= last[0]:
            return 1.0
        limits, costs = log(last[0] / now[0]), log(last[1] / now[1])
        return _MAX_STEEPNESS if costs * _MAX_STEEPNESS <= limits else max(1.0, limits / costs)


# -- errors of a budget that is not met --------------------------------------------------------------------------------

# Room above the least reachable cost, so that the suggested budget can be met.
_ROOM = 1.03
_MAX_NAMED = 3


class BudgetErrors:
    """Errors about one problem."""

    def __init__(self, problem: SearchProblem) -> None:
        self._problem = problem

    def unreachable(self) -> BudgetError:
        """Return the error for targets that no counts are within."""
        problem, limits = self._problem, self._problem.limits()
        minima = {t: problem.reachable(t.kind) for t in problem.targets}
        bad = {t: r for t, r in minima.items() if r > limits[t.kind]}
        if not bad:
            requested = " and ".join(map(str, problem.targets))
            return BudgetError(
                f"{requested} cannot be reached together, but each can be reached alone.",
                hint=f"Nothing was written. Loosen one of them. {self._limits(problem.targets[0].kind)}",
            )
        first = next(iter(bad))
        least_share = bad[first] / problem.base(first.kind)
        nearest = " ".join(argument("target", str(self._roomy(t, r))) for t, r in bad.items())
        best = first.with_limit(bad[first], problem.base(first.kind))
        share = f" ({100 * least_share:.1f} % of the original)" if first.absolute else ""
        return BudgetError(
            f"{first} cannot be reached: the best is {best}{share}.",
            hint=f"Nothing was written. {self._limits(first.kind)} The nearest budget that works: {nearest}",
        )

    def missed(self, best: Candidate) -> BudgetError:
        """Return the error for a final model that exceeds a limit after all corrections."""
        limits, problem = self._problem.limits(), self._problem
        bad = [t for t in problem.targets if best.costs[t.kind] > limits[t.kind]]
        costs = ", ".join(str(t.with_limit(best.costs[t.kind], problem.base(t.kind))) for t in bad)
        nearest = " ".join(argument("target", str(self._roomy(t, best.costs[t.kind]))) for t in bad)
        return BudgetError(
            f"{', '.join(map(str, bad))} was not met: the best model reaches {costs}.",
            hint=f"Nothing was written. {self._limits(bad[0].kind)} The nearest budget that works: {nearest}",
        )

    def gate(self, failure: str, nearest: tuple[Target, ...] | None) -> BudgetError:
        """Return the error for a model within the targets that does not pass a gate on quality."""
        works = " ".join(argument("target", str(t)) for t in nearest) if nearest else ""
        hint = f"The nearest budget that works: {works}" if works else "No smaller reduction passes either."
        return BudgetError(f"{failure}.", hint=f"Nothing was written. {hint}")

    def _roomy(self, target: Target, cost: float) -> Target:
        return target.with_limit(cost * _ROOM, self._problem.base(target.kind))

    def _limits(self, kind: str) -> str:
        """Return a sentence that names the largest remaining parts of a cost."""
        problem = self._problem
        analysis = problem.analysis
        cost = problem.costs[kind]
        counts = least(problem.choices["scores"], cost)
        widest = problem.selector.request.widest
        more = f" No group loses more than {widest:g} of its units ({argument('max_ratio')})." if widest < 1 else ""
        if isinstance(cost, Peak):
            name, share = cost.dearest(counts)
            return f"{100 * share:.0f} % of the remaining memory are activations, with their peak at {name}.{more}"
        if isinstance(cost, Latency):
            return f"Most of the remaining time is spent in {_largest(cost.of_nodes(counts))}.{more}"
        shape = problem.sizes.at(counts[None])

        def elements(name: str) -> int:
            dims = shape(name) or ()
            return int(prod(int(n[0]) if hasattr(n, "shape") else n for n in dims))

        def sizes_of(name: str) -> object:
            dims = shape(name)
            return dims and tuple(int(n[0]) if hasattr(n, "shape") else n for n in dims)

        layers = analysis.layer_facts(sizes_of, elements)
        after = {x.name: x.macs_after if kind == "macs" else x.params_after for x in layers}
        reasons = {x.name: x.reason.partition(":")[0] for x in layers}
        return f"Most of the remaining cost is in {_largest(after, reasons)}.{more}"


def _largest(parts: Mapping[str, float], reasons: Mapping[str, str] | None = None) -> str:
    """Return the largest parts by name with their shares, and why they stay."""
    total, notes = sum(parts.values()) or 1, reasons or {}
    top = sorted(parts, key=parts.__getitem__, reverse=True)[:_MAX_NAMED]
    shares = (
        f"{name} ({100 * parts[name] / total:.0f} %{', ' + notes[name] if notes.get(name) else ''})" for name in top
    )
    return ", ".join(shares)
