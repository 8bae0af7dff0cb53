"""Cut, take apart or leave: one knapsack over groups and layers, whose losses are brought to one scale by trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.budget.allocate import Allocation, Choices, Limit, allocate
from onnxprune.budget.apart import Apart, Part, none_cut, with_parts
from onnxprune.budget.costs import Cost
from onnxprune.budget.sizes import Counts
from onnxprune.errors import BudgetError, UsageError
from onnxprune.factors.candidates import AUTO, Candidate, Opened
from onnxprune.factors.choose import Chosen
from onnxprune.factors.request import Options, request_of
from onnxprune.graph.view import Node
from onnxprune.passes.factor_work import lay_open
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.joint_budget import JointBudget
from onnxprune.pipeline import Context, Model
from onnxprune.search.attempt import ENOUGH, Attempt, carried_out
from onnxprune.search.part_times import Timed, timed_options
from onnxprune.search.pressure import Pressure
from onnxprune.search.problem import Answer, Problem
from onnxprune.search.refine import Space

Array = NDArray[np.float64]
Judge = Callable[[Answer], Attempt | None]

ALONE, TOGETHER = "knapsack over layers", "knapsack over groups and layers"
WEIGHED = f"{TOGETHER}, weighed by trial"
# How far rates of exchange lie apart that are tried, and how many are.
_STEPS, _TRIALS = (4.0, 2.0), 7
# How often a limit on time is moved until what is measured fits.
_CORRECTIONS = 4
# Part of the way to the target at which losses are weighed against each other, and the step that tells a slope.
_HALF, _SLOPE = 0.5, 0.05
# A limit that is none.
_WHOLE = 0.99


class Mixture:
    """Answers that cut some groups and take some layers apart.

    A group's loss is a score and a layer's a share of energy: nobody knows what one is worth in the other. Where both
    would give alike at half the way, the last unit of cost costs them the same: from there rates are tried up and down,
    every answer carried out, repaired and measured, as long as the outputs come closer to the original's. The knapsack
    says how much is cut; ranks are then chosen for the layers as they are after the cut. Where time is the target, what
    layers gain is measured layer by layer, and every answer is timed before it is repaired.

    Args:
        context: the run. problem: groups and targets, all but ``peak-memory``. options: ``include``, ``exclude`` and
            ``round_to`` hold for layers, too.

    Raises:
        UsageError: time is a target, and another device's.
    """

    def __init__(self, context: Context, problem: Problem, options: Options) -> None:
        self._context, self.problem, self._options = context, problem, options
        self._timed = "latency" in problem.costs
        if self._timed and not problem.here:
            raise UsageError(
                "--factorize with a latency target times new layers, and --latency-table is of another device",
                hint="Drop one of the two, or aim at macs.",
            )
        own, whole = context.for_trial(ENOUGH), Model.of(problem.analysis)
        request = request_of("auto", {**options, "ratio": 0.5, "cost": self._kind(), "timed": False})
        work = lay_open(own, whole, request, AUTO, every=False)
        joint = JointBudget(work, AUTO, Chosen())
        self.gains = {o.layer.name: g for o, g in zip(joint.opened, joint.gains, strict=True)}
        pairs = zip(joint.opened, joint.options, strict=True)
        found = timed_options(work, joint) if self._timed else [_ordered(o, c) for o, c in pairs]
        known = {node.label: node for node in problem.analysis.graph.steps}
        self._parts, self._candidates = [], []
        for opened, gain, candidates in zip(joint.opened, joint.gains, found, strict=True):
            part = _part(opened, gain, candidates, known)
            if part is not None:
                self._parts.append(part)
                self._candidates.append((opened, [c.candidate for c in candidates]))
        self._costs = {k: Apart(cost, k, problem.sizes, self._parts) for k, cost in problem.costs.items()}
        self._press = {"latency": 1.0}
        self._rate: tuple[str, float] | None = None

    def _kind(self) -> str:
        """What of the targets is furthest away, as a factorization counts it."""
        kinds = {k: most / self.problem.base(k) for k, most in self.problem.limits().items()}
        return _counted_as(min(kinds, key=kinds.__getitem__))

    def trials(self, judge: Judge) -> list[tuple[Answer, Attempt]]:
        """Answers within the targets and what came of them, by rising and falling rates around the one that is even.

        Args:
            judge: carries out, repairs and measures; None where an answer cannot be carried out.
        """
        found: list[tuple[Answer, Attempt]] = []
        known: dict[tuple[bytes, str], float] = {}

        def value(rate: float) -> float:
            answer = self.answer(rate)
            if answer is None:
                return -np.inf
            assert answer.apart is not None
            key = answer.removed.tobytes(), repr(answer.apart.wanted or answer.apart.request.share)
            if key not in known:
                tried = judge(answer)
                known[key] = -np.inf if tried is None else tried.quality.fine
                found.extend([(answer, tried)] if tried is not None else [])
            return known[key]

        value(np.inf)
        here = self.rate
        best = value(here)
        for step in _STEPS:
            for way in (step, 1.0 / step):
                while len(known) < _TRIALS and (after := value(here * way)) > best:
                    best, here = after, here * way
        self._rate = self.problem.lead, here
        return found

    @property
    def rate(self) -> float:
        """What a group's loss counts against a layer's: as it was tried last, else where both give alike."""
        if self._rate is None or self._rate[0] != self.problem.lead:
            self._rate = self.problem.lead, self._even()
        return self._rate[1]

    def space(self) -> Space:
        """Groups and layers at the rate that did best, for answers in which some count for more or less."""
        problem, rate = self.problem, self.rate
        wanted = with_parts(problem.choices[problem.lead], self._parts, rate)
        return Space(wanted, self._costs, problem.pressed(), lambda weights, _: self.answer(rate, weights), "")

    def answer(self, rate: float | None = None, weights: Array | None = None) -> Answer | None:
        """Counts at a rate of exchange, and the ranks that make up for the rest; None where nothing fits, or cuts alone
        are enough.

        Args:
            rate: what a group's loss counts against a layer's. weights: what the losses of every group and then of
                every layer count besides [groups + layers].

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        rate = self.rate if rate is None else rate
        if not self._timed:
            return self._answer(rate, 1.0, weights)
        press, most, best = Pressure(self._press), self.problem.limits()["latency"], None
        for _ in range(_CORRECTIONS):
            found = self._answer(rate, press.now["latency"], weights)
            if found is None:
                break
            try:
                found.costs["latency"] = self._measured(found)
            except BudgetError:  # after the cut no ranks save what they did before
                break
            over = found.costs["latency"] / most
            if over <= 1 and (best is None or found.allocation.loss < best.allocation.loss):
                best = found
            if not press.learn({"latency": over}):
                break
        self._press = press.now
        return best

    def _answer(self, rate: float, press: float, weights: Array | None) -> Answer | None:
        """As ``answer``, with a limit on time that is tightened or eased by a factor."""
        problem = self.problem
        choices = problem.choices[problem.lead]
        wanted = none_cut(choices, self._parts) if np.isinf(rate) else with_parts(choices, self._parts, rate)
        if weights is not None:
            wanted = Choices(wanted.kept, [w * x for w, x in zip(weights, wanted.losses, strict=True)])
        limits = problem.pressed()
        if self._timed:
            limits["latency"] *= press
        allocation = allocate(wanted, [Limit(self._costs[k], most) for k, most in limits.items()])
        if allocation is None:
            return None
        groups = len(choices.kept)
        kept, levels = allocation.kept[:groups], allocation.kept[groups:]
        removed = problem.removed(kept)
        costs = problem.measured(kept, removed, timed=not self._timed)
        gains = self.gains if weights is None else self._weighed(weights[groups:])
        apart = self._as_timed(levels) if self._timed else self._as_counted(costs, limits, gains)
        if apart is None:
            return None
        name = ALONE if np.isinf(rate) else TOGETHER if weights is None else WEIGHED
        return Answer(name, Allocation(kept, allocation.loss, allocation.bound), removed, costs, apart=apart)

    def _measured(self, answer: Answer) -> float:
        """Seconds of a run of an answer carried out; a repair changes values alone."""
        problem, own = self.problem, self._context.for_trial(ENOUGH)
        assert answer.apart is not None
        result = carried_out(own, problem.analysis, answer.removed, answer.apart.unchecked())
        return problem.weighed(result.model.parts, {"latency"})["latency"]

    def _weighed(self, weights: Array) -> dict[str, float]:
        """What a layer's error counts, times the weights [layers] of those that may be taken apart."""
        names = [opened.layer.name for opened, _ in self._candidates]
        return self.gains | {name: self.gains[name] * float(w) for name, w in zip(names, weights, strict=True)}

    def _as_counted(
        self, costs: Mapping[str, float], limits: Mapping[str, float], gains: Mapping[str, float]
    ) -> Factorize | None:
        """Ranks that save what a cut leaves to save; None where that is nothing, or all there is."""
        kind = min(limits, key=lambda k: limits[k] / costs[k])
        saved = 1.0 - limits[kind] / costs[kind]
        if not 0 < saved < 1:
            return None
        options: Options = {**self._options, "ratio": saved, "timed": False, "cost": _counted_as(kind)}
        return Factorize("auto", gains=gains, **options)

    def _as_timed(self, levels: Counts) -> Factorize | None:
        """The methods and shares of the work that were timed, for layers as they are after the cut."""
        wanted: dict[str, tuple[str, float]] = {}
        for level, (opened, candidates) in zip(levels.tolist(), self._candidates, strict=True):
            if level < len(candidates):
                chosen = candidates[level]
                wanted[opened.layer.name] = chosen.method, opened.share(chosen, "macs")
        if not wanted:
            return None
        options: Options = {**self._options, "ratio": 0.5, "timed": False, "cost": "macs"}
        return Factorize("auto", wanted=wanted, **options)

    def _even(self) -> float:
        """The rate at which cuts and factors give alike half the way to the targets."""
        problem = self.problem
        choices = problem.choices[problem.lead]
        cut = self._slope(choices, problem.costs)
        apart = self._slope(none_cut(choices, self._parts), self._costs)
        return apart / cut if apart > 0 and cut > 0 else 1.0

    def _slope(self, choices: Choices, costs: Mapping[str, Cost]) -> float:
        """What a step further costs half the way to the targets; 0 where that is out of reach."""
        losses = []
        for way in (_HALF - _SLOPE, _HALF + _SLOPE):
            limits = {}
            for kind, most in self.problem.pressed().items():
                base = self.problem.base(kind)
                limits[kind] = base * (1 - way) + way * (most if most < _WHOLE * base else _HALF * base)
            found = allocate(choices, [Limit(costs[k], most) for k, most in limits.items()])
            losses.append(np.nan if found is None else found.loss)
        return float(np.nan_to_num(losses[1] - losses[0]))


def _counted_as(kind: str) -> str:
    """What of a layer a target of that kind goes by."""
    return "macs" if kind in ("macs", "latency") else "params"


def _ordered(opened: Opened, found: Sequence[Candidate]) -> list[Timed]:
    """Candidates that save anything, by rising cost; their times are not known."""
    return [Timed(c, np.nan) for c in sorted(found, key=lambda c: c.cost) if c.cost < opened.whole]


def _part(opened: Opened, gain: float, found: Sequence[Timed], known: Mapping[str, Node]) -> Part | None:
    """A layer with its candidates, and itself; None where there are none, or its node is another now."""
    nodes = tuple(known[use.node.label] for use in opened.layer.uses if use.node.label in known)
    if not found or len(nodes) < len(opened.layer.uses):
        return None
    macs, params = (np.array([*(opened.share(c, k) for c, _ in found), 1.0]) for k in ("macs", "params"))
    losses, times = [gain * c.loss for c, _ in found], [share for _, share in found]
    return Part(nodes, opened.layer.weight, np.array([*losses, 0.0]), macs, params, np.array([*times, 1.0]))
