"""Cut, take apart or leave: one knapsack over groups and layers, whose losses are brought to one scale by trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxprune.budget.allocate import Allocation, Choices, Limit, allocate
from onnxprune.budget.apart import Apart, Part, none_cut, with_parts
from onnxprune.budget.costs import Cost
from onnxprune.factors.candidates import AUTO, Candidate, Opened
from onnxprune.factors.choose import Chosen
from onnxprune.factors.request import Options, request_of
from onnxprune.graph.view import Node
from onnxprune.passes.attempt import ENOUGH, Attempt
from onnxprune.passes.factor_work import lay_open
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.joint_budget import JointBudget
from onnxprune.passes.problem import Answer, Problem
from onnxprune.passes.state import State

Judge = Callable[[Answer], Attempt | None]

ALONE, TOGETHER = "knapsack over layers", "knapsack over groups and layers"
# How far rates of exchange lie apart that are tried, and how many are.
_STEPS, _TRIALS = (4.0, 2.0), 7
# Part of the way to the target at which losses are weighed against each other, and the step that tells a slope.
_HALF, _SLOPE = 0.5, 0.05
# A limit that is none.
_WHOLE = 0.99


class Mixture:
    """Answers that cut some groups and take some layers apart.

    A group's loss is a score and a layer's a share of energy: nobody knows what one is worth in the other. Where both
    would give alike at half the way, the last unit of cost costs them the same: from there rates are tried up and down,
    every answer carried out, repaired and measured, as long as the outputs come closer to the original's. The knapsack
    says how much is cut; ranks are then chosen for the layers as they are after the cut.

    Args:
        state: the run. problem: groups and targets; of ``macs``, ``params`` and ``size``. options: ``include``,
            ``exclude`` and ``round_to`` hold for layers, too.
    """

    def __init__(self, state: State, problem: Problem, options: Options) -> None:
        self.problem, self._options = problem, options
        assert state.proto is not None
        own = state.branch(state.proto, state.weights, problem.nothing, ENOUGH)
        request = request_of("auto", {**options, "ratio": 0.5, "cost": self._kind(), "timed": False})
        work = lay_open(own, request, AUTO, every=False)
        joint = JointBudget(work, AUTO, Chosen())
        self.gains = {o.layer.name: g for o, g in zip(joint.opened, joint.gains, strict=True)}
        known = {node.label: node for node in problem.analysis.graph.steps}
        self._parts = [
            part
            for opened, gain, found in zip(joint.opened, joint.gains, joint.options, strict=True)
            if (part := _part(opened, gain, found, known)) is not None
        ]
        self._costs = {k: Apart(cost, k, problem.sizes, self._parts) for k, cost in problem.costs.items()}
        self.rate = self._even()

    def _kind(self) -> str:
        """What of the targets is furthest away, as a factorization counts it."""
        kinds = {k: most / self.problem.base(k) for k, most in self.problem.limits().items()}
        return "macs" if min(kinds, key=kinds.__getitem__) == "macs" else "params"

    def trials(self, judge: Judge) -> list[tuple[Answer, Attempt]]:
        """Answers within the targets and what came of them, by rising and falling rates around the one that is even.

        Args:
            judge: carries out, repairs and measures; None where an answer cannot be carried out.
        """
        found: list[tuple[Answer, Attempt]] = []
        known: dict[tuple[bytes, float], float] = {}

        def value(rate: float) -> float:
            answer = self.answer(rate)
            if answer is None:
                return -np.inf
            assert answer.apart is not None
            key = answer.removed.tobytes(), answer.apart.request.share
            if key not in known:
                tried = judge(answer)
                known[key] = -np.inf if tried is None else tried.quality.fine
                found.extend([(answer, tried)] if tried is not None else [])
            return known[key]

        value(np.inf)
        best, here = value(self.rate), self.rate
        for step in _STEPS:
            for way in (step, 1.0 / step):
                while len(known) < _TRIALS and (after := value(here * way)) > best:
                    best, here = after, here * way
        self.rate = here
        return found

    def answer(self, rate: float | None = None) -> Answer | None:
        """Counts at a rate of exchange, and the ranks that make up for the rest; None where nothing fits, or cuts alone
        are enough.

        Raises:
            CannotRewrite: a node has no form with the new sizes.
        """
        problem, rate = self.problem, self.rate if rate is None else rate
        choices = problem.choices["scores"]
        wanted = none_cut(choices, self._parts) if np.isinf(rate) else with_parts(choices, self._parts, rate)
        limits = problem.pressed()
        allocation = allocate(wanted, [Limit(self._costs[k], most) for k, most in limits.items()])
        if allocation is None:
            return None
        groups = len(choices.kept)
        kept = allocation.kept[:groups]
        removed = problem.removed(kept)
        costs = problem.measured(kept, removed)
        kind = min(limits, key=lambda k: limits[k] / costs[k])
        saved = 1.0 - limits[kind] / costs[kind]
        if not 0 < saved < 1:
            return None
        options: Options = {**self._options, "ratio": saved, "timed": False, "cost": "params"}
        options["cost"] = "macs" if kind == "macs" else "params"
        apart = Factorize("auto", gains=self.gains, **options)
        name = ALONE if np.isinf(rate) else TOGETHER
        return Answer(name, Allocation(kept, allocation.loss, allocation.bound), removed, costs, apart)

    def _even(self) -> float:
        """The rate at which cuts and factors give alike half the way to the targets."""
        problem = self.problem
        choices = problem.choices["scores"]
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


def _part(opened: Opened, gain: float, found: Sequence[Candidate], known: Mapping[str, Node]) -> Part | None:
    """A layer with its candidates by rising cost, and itself; None where there are none, or its node is another now."""
    nodes = tuple(known[use.node.label] for use in opened.layer.uses if use.node.label in known)
    ordered = sorted((c for c in found if c.cost < opened.whole), key=lambda c: c.cost)
    if not ordered or len(nodes) < len(opened.layer.uses):
        return None
    macs, params = (np.array([*(opened.share(c, k) for c in ordered), 1.0]) for k in ("macs", "params"))
    return Part(nodes, opened.layer.weight, np.array([*(gain * c.loss for c in ordered), 0.0]), macs, params)
