"""A budget as a problem over counts: the groups with their scores, the targets with their costs, answers to both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.budget.allocate import Allocation, Choices, Limit, allocate, least, uniform
from onnxprune.budget.costs import Cost, costs_of, total
from onnxprune.budget.latency import Latency, Places
from onnxprune.budget.losses import by_curves, by_scores, levels_of
from onnxprune.budget.sizes import Counts, Sizes
from onnxprune.budget.table import LatencyTable
from onnxprune.budget.target import Target
from onnxprune.errors import UsageError
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.flush import flush
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.select import Selector
from onnxprune.passes.trial import Trial, timing_feed
from onnxprune.pipeline import Context, ModelParts
from onnxprune.planning import atoms_removed
from onnxprune.search.attempt import Attempt
from onnxprune.search.pressure import SAFE, Pressure
from onnxprune.search.timing import Bench, block_levels
from onnxprune.selection.choose import take
from onnxprune.selection.costs import macs_after

Mask = NDArray[np.bool_]
Solve = Callable[[Choices, Sequence[Limit]], Allocation | None]
Curves = Mapping[int, tuple[NDArray[np.float64], NDArray[np.float64]]]

TOLERANCE = {"latency": 0.05}
"""How far above its limit a measured cost may be, as a share; 0.02 for what can be counted."""
_COUNTED = 0.02
_CORRECTIONS = 7


@dataclass(frozen=True, slots=True)
class Answer:
    """Counts [groups] for the targets: where they come from, and what of each kind they cost (as far as measured).

    Attributes:
        source: which of the problem's choices it is optimal for; none, where it follows from something else.
        apart: what takes layers apart after the cut, where that is part of the answer; costs are then of the cut alone,
            until it was carried out.
    """

    name: str
    allocation: Allocation
    removed: Mask
    costs: dict[str, float]
    source: str = ""
    apart: Factorize | None = None


class Problem:
    """Groups, scores, costs and targets of one model.

    Args:
        selector: scores the units. targets: what the model may cost. table: of times, where one is asked for.
        curves: measured losses {group id: (shares removed, losses)}, where there are any. drifts: scores [units] by
            group id that add up to what a group alone does to the outputs, where they were measured.

    Raises:
        UsageError: the model costs nothing of a kind that a target is of.

    Attributes:
        choices: what every group may do, by where the losses come from: ``scores``, and what was measured.
        lead: of which of them answers are expected, or known, to keep most.
        originals: what the original costs of every kind. here: whether times can be measured on this machine.
    """

    def __init__(
        self,
        context: Context,
        selector: Selector,
        targets: Sequence[Target],
        table: LatencyTable | None = None,
        curves: Curves | None = None,
        drifts: Mapping[int, NDArray[np.float64]] | None = None,
    ) -> None:
        self.context, self.selector, self.targets = context, selector, tuple(targets)
        self.analysis: Analysis = selector.analysis
        self.contests = selector.pool()
        groups = [self.analysis.units.groups[n] for n in self.contests]
        self.sizes = Sizes(self.analysis, groups)
        self._table = table
        self.here = table is not None and table.device == context.device.facts()
        self.costs = {t.kind: self._cost(t.kind) for t in targets}
        self.originals = {kind: self._original(kind) for kind in self.costs}
        for kind, whole in self.originals.items():
            if whole <= 0 and kind != "latency":
                raise _costs_nothing(kind)
        self._press = dict.fromkeys(self.costs, 1.0)
        contests = list(self.contests.values())
        blocks = [block_levels(g.steps) for g in groups] if table and selector.request.round_to == 1 else None
        kept = levels_of(contests, blocks)
        self.choices: dict[str, Choices] = {"scores": by_scores(contests, kept)}
        if drifts:
            drifting = [replace(c, values=drifts[n]) for n, c in self.contests.items()]
            self.choices["drifts"] = by_scores(drifting, kept)
        if curves:
            self.choices["sensitivities"] = by_curves(contests, kept, curves, list(self.contests))
        self.lead = list(self.choices)[-1]

    def _cost(self, kind: str) -> Cost:
        if kind == "latency":
            assert self._table is not None
            return Latency(Places(self.sizes), self._table)
        return costs_of(self.analysis, self.sizes, kind)

    def _original(self, kind: str) -> float:
        return float(total(self.costs[kind], self.sizes.whole)[0])

    def limits(self) -> dict[str, float]:
        """The most that is allowed of every kind."""
        return {t.kind: t.limit(self.base(t.kind)) for t in self.targets}

    def pressed(self) -> dict[str, float]:
        """The limits, tightened by what was learnt of repairs."""
        return {k: most * self._press[k] for k, most in self.limits().items()}

    @property
    def nothing(self) -> Mask:
        """The mask over atoms of a cut that removes none."""
        return np.zeros(self.analysis.units.component.size, dtype=bool)

    def base(self, kind: str) -> float:
        """What shares are of: the measured time of the original, else what it is counted to cost."""
        return self._table.seconds if kind == "latency" and self._table is not None else self.originals[kind]

    def answers(self) -> list[Answer]:
        """Counts within the targets, the most promising first, the same share for all groups last; none that are equal.

        Empty where none were found.
        """
        first = sorted(self.choices, key=lambda name: name != self.lead)
        found = [self._answer(f"knapsack over {name}", name, allocate) for name in first]
        found.append(self._answer("uniform", "", uniform))
        kept: dict[bytes, Answer] = {}
        for answer in found:
            if answer is not None:
                kept.setdefault(answer.allocation.kept.tobytes(), answer)
        return list(kept.values())

    def _answer(self, name: str, source: str, solve: Solve) -> Answer | None:
        """An answer that holds as measured: where a cost turns out otherwise than predicted, its limit is corrected."""
        choices = self.choices[source or "scores"]
        limits, best = self.limits(), None
        press = Pressure(self._press)
        for _ in range(_CORRECTIONS):
            wanted = [Limit(self.costs[k], most * press.now[k]) for k, most in limits.items()]
            allocation = solve(choices, wanted)
            if allocation is None:
                # A time is predicted to be out of reach: what takes least may be within it all the same.
                allocation = self._least(choices) if best is None and "latency" in limits else None
                press.end()
                if allocation is None:
                    break
            removed = self.removed(allocation.kept)
            answer = Answer(name, allocation, removed, self.measured(allocation.kept, removed), source)
            over = {k: answer.costs[k] / most for k, most in limits.items()}
            if max(over.values()) <= 1 and (best is None or allocation.loss < best.allocation.loss):
                best = answer
            if not press.learn(over):
                break
        return best

    def _least(self, choices: Choices) -> Allocation:
        """The counts that are predicted to take least time."""
        kept = least(choices, self.costs["latency"])
        levels = [int(np.searchsorted(k, n)) for k, n in zip(choices.kept, kept, strict=True)]
        return Allocation(kept, choices.loss(levels), -np.inf)

    def over(self, answer: Answer, tried: Attempt) -> dict[str, float]:
        """Costs of an answer as it was repaired, as shares of their limits; notes them in the answer."""
        limits, saved = self.limits(), {"size": float(tried.size), "params": float(tried.params)}
        if answer.apart is not None:
            saved["macs"] = float(tried.macs)
            if "latency" in limits:
                saved |= self.weighed(tried.model.parts, {"latency"})
        answer.costs.update({k: v for k, v in saved.items() if k in limits})
        return {k: answer.costs[k] / most for k, most in limits.items()}

    def tighten(self, over: Mapping[str, float]) -> bool:
        """Allow less of what turned out to cost more than it may, {kind: share of its limit}; whether there is any."""
        wrong = {k: o for k, o in over.items() if o > 1}
        self._press |= {k: self._press[k] * SAFE / o for k, o in wrong.items()}
        return bool(wrong)

    @contextmanager
    def aiming(self, *targets: Target) -> Iterator[None]:
        """Other targets of the same kinds, for a while."""
        before, self.targets = self.targets, targets
        try:
            yield
        finally:
            self.targets = before

    def retarget(self, *targets: Target) -> None:
        """Take other targets of the same kinds, and forget what was learnt of the limits of the last ones."""
        self.targets, self._press = targets, dict.fromkeys(self.costs, 1.0)

    def towards_whole(self, way: float) -> tuple[Target, ...]:
        """The targets, so far of the way from what they are (0) to what the original costs (1)."""
        bases, limits = {t.kind: self.base(t.kind) for t in self.targets}, self.limits()
        return tuple(
            t.with_limit(limits[t.kind] + way * (bases[t.kind] - limits[t.kind]), bases[t.kind]) for t in self.targets
        )

    def how(self, kind: str) -> str:
        """Where the cost of that kind comes from."""
        if kind != "latency":
            return "counted"
        return "measured" if self.here else "predicted"

    def removed(self, kept: Counts) -> Mask:
        """Mask over atoms of what goes for counts [groups]: the units with the lowest scores."""
        gone = [int(s - k) for s, k in zip(self.sizes.steps, kept, strict=True)]
        return atoms_removed(self.analysis.units, take(self.analysis, self.contests, gone))

    def measured(self, kept: Counts, removed: Mask, *, timed: bool = True) -> dict[str, float]:
        """Costs of the cut before any repair: counted on the cut model, timed where this machine is the one meant.

        Args:
            timed: measure time, too, in place of predicting it.

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        found = {kind: float(total(cost, kept[None])[0]) for kind, cost in self.costs.items()}
        if "macs" in found:
            found["macs"] = float(macs_after(self.analysis, removed))
        kinds = found.keys() & {"params", "size", "latency"} - (set() if timed else {"latency"})
        if kinds:
            found |= self.weighed(cut_model(self.analysis, removed), kinds)
        return found

    def weighed(self, model: ModelParts, kinds: Collection[str]) -> dict[str, float]:
        """Costs of a model, of those kinds that are known of a file: counted, and timed beside the original."""
        with Trial.of(self.analysis) as trial:
            proto, weights = flush(model)[0]
            path, size = trial.write(proto, weights, "measured")
            found = {"size": float(size), "params": float(sum(int(np.prod(w.shape)) for w in weights.values()))}
            if "latency" in kinds and self.here:
                feed = timing_feed(self.context, trial)
                bench = Bench(self.analysis, self.sizes, self.context.device, feed, trial)
                before, after = bench.whole([trial.original, path])
                found["latency"] = float(after / before) * self.base("latency")
        return {kind: cost for kind, cost in found.items() if kind in kinds}

    def reachable(self, kind: str) -> float:
        """The least that the model can cost of a kind, all else aside; a time as measured where it can be.

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        kept = least(self.choices["scores"], self.costs[kind])
        return self.measured(kept, self.removed(kept))[kind]


def _costs_nothing(kind: str) -> UsageError:
    """The error for a target of a kind that the model has nothing of."""
    what = "no operator multiplies data with its weights" if kind == "macs" else "nothing of it is stored"
    return UsageError(
        f"A target of {kind} has no meaning for this model: {what}, so it counts 0.",
        hint="Aim at another kind: params, size, latency or peak-memory.",
    )


def tolerance(kind: str) -> float:
    """How far above its limit a measured cost of that kind may be, as a share."""
    return TOLERANCE.get(kind, _COUNTED)
