"""Prune: score, choose, cut."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.criteria import Criterion, get, needs_of
from onnxprune.errors import BudgetError
from onnxprune.garbage import paused
from onnxprune.graph.view import CONTROL
from onnxprune.model.weights import Weight
from onnxprune.passes.describe import fill_report
from onnxprune.passes.freeze import freeze
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.select import Selector
from onnxprune.passes.state import State
from onnxprune.plan import Plan
from onnxprune.planning import atoms_removed, make_plan, read_plan
from onnxprune.rewrite.cut import CannotRewrite
from onnxprune.selection.request import Options, check_patterns, request_of

Mask = NDArray[np.bool_]


class Prune:
    """Remove the units that matter least.

    Args:
        criterion: a name, or a function from a slot (and its maps) to scores [channels].
        ratio: share of units to remove, 0 <= ratio < 1: of every group, or of all together, see ``scope``.
        plan: a plan or its file, replayed instead of scoring.
        approximate: also cut through normalisations, which is not exact.
        options: fields of :class:`onnxprune.selection.request.Request`, such as ``layers``, ``scope`` or ``policy``;
            ``onnxprune.prune`` explains them.

    Raises:
        UsageError: a value out of range, a pattern that matches nothing, a plan that does not fit, data that a
            criterion needs and that are not there.
        BudgetError: nothing could be cut.
    """

    def __init__(
        self,
        criterion: str | Criterion = "l2",
        ratio: float = 0.3,
        *,
        plan: Plan | str | Path | None = None,
        approximate: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self.criterion = get(criterion) if isinstance(criterion, str) else criterion
        self.request = request_of(ratio, options)
        if options.get("normalize", "auto") == "auto":
            method = "none" if getattr(self.criterion, "comparable", False) else "mean"
            self.request = replace(self.request, normalize=method)
        self.name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom")
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        self.approximate = approximate

    def __call__(self, state: State) -> None:
        """Choose units, cut the model, fill plan and report."""
        # Scoring from data runs the model, for long; everything else makes what stays.
        with nullcontext() if self.plan is None and needs_of(self.criterion) else paused():
            analysis = self.prepared(state)
            with state.stage("cut"):
                removed, proto, weights, selector = self._cut(analysis, state)
        state.removed, state.proto, state.weights = removed, proto, weights
        criterion = self.name if self.plan is None else self.plan.criterion
        settings = {"criterion": criterion, **(self.request.settings if self.plan is None else {})}

        def describe() -> None:
            plan = make_plan(analysis, removed, criterion)
            plan.factorized = state.plan.factorized
            state.plan = plan
            state.report.settings = {**state.report.settings, **settings}
            fill_report(analysis, removed, weights, state, selector)

        state.later.append(describe)

    def selector(self, state: State) -> Selector:
        """What chooses the units, for those who want to know before they cut: ``selector(state).at(ratio)``."""
        return Selector(state, self.prepared(state), self.request, self.criterion, self.name)

    def prepared(self, state: State) -> Analysis:
        """The analysis; raises UsageError for a pattern that matches nothing."""
        analysis = state.renewed(self.approximate)
        labels = (n.label for n in analysis.graph.nodes)
        check_patterns(self.request, (*analysis.loaded.weights, *analysis.graph.weights, *labels))
        return analysis

    def _cut(
        self, analysis: Analysis, state: State
    ) -> tuple[Mask, onnx.ModelProto, dict[str, Weight], Selector | None]:
        """Cut; a node that has no form with the new sizes is frozen, and the choice is made again without it."""
        seconds: dict[str, float] = {}
        for _ in range(len(analysis.graph.nodes) + 1):
            selector = None
            if self.plan is not None:
                chosen = read_plan(analysis, self.plan)
            else:
                selector = Selector(state, analysis, self.request, self.criterion, self.name, seconds)
                if not selector.asked:
                    raise BudgetError("No channel of this model can be removed.", hint=reasons(analysis))
            removed = np.zeros(analysis.units.component.size, dtype=bool)
            try:
                if selector is not None:
                    chosen = selector()
                removed = atoms_removed(analysis.units, chosen)
                proto, weights = cut_model(analysis, removed)
                return removed, proto, weights, selector
            except CannotRewrite as stop:
                # Feature maps of a model that is cut in several steps are taken from the cut model.
                freeze(analysis, stop, removed if removed.any() or selector is None else selector.removed)
        raise AssertionError("every node was frozen")  # pragma: no cover


def reasons(analysis: Analysis) -> str:
    """Why nothing can be cut, for a hint."""
    top = analysis.barriers[:3]
    said = "; ".join(f"{b.channels} channels: {b.code}, {b.detail}" for b in top)
    if said:
        return f"Reasons: {said}. 'onnxprune inspect' lists them all."
    closed = next((node for node in analysis.graph.nodes if node.op in CONTROL and not node.domain), None)
    if closed is not None:
        return f"What lies inside the body of {closed.op} {closed.label!r} is left as it is: it has no form known here."
    return "The model has no weights to cut."
