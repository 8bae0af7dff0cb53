"""Factorize: take layers apart into smaller ones, by SVD, Tucker, CP or spatial SVD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Unpack

from onnxprune.decompose import METHODS
from onnxprune.errors import BudgetError
from onnxprune.factors.candidates import AUTO
from onnxprune.factors.choose import Chosen, choose_local, choose_wanted, read_choices
from onnxprune.factors.request import Options, Request, request_of
from onnxprune.factors.rewrite import replace_layers
from onnxprune.passes.factor_work import Done, Work, lay_open
from onnxprune.passes.factors_report import describe
from onnxprune.passes.joint_budget import JointBudget
from onnxprune.passes.layer_times import model_latency
from onnxprune.passes.prepared import Model, Prepared
from onnxprune.passes.products import check_products
from onnxprune.passes.state import State
from onnxprune.plan import Plan, PlanFactors
from onnxprune.report.facts import Exactness, Latency
from onnxprune.runtime.parallel import spread


class Factorize:
    """Replace layers by chains of smaller ones that say nearly the same.

    With data, errors count at the layer's output (second moments of what it reads); without, all weights count alike.

    Args:
        method: ``svd``, ``tucker``, ``cp``, ``spatial-svd``, or ``auto``: per layer whichever errs least.
        plan: a plan or its file, whose ``factorized`` is replayed instead of choosing.
        check: run the result against the product of its new weights.
        gains: what the error of each layer counts, {name: gain}, where ``auto`` need not measure that.
        wanted: {name: (method, share of the layer's cost)} in place of choosing: the ranks that lose least within it.
        options: ``ratio`` (0.3), ``rank``, ``energy`` or ``vbmf`` say how far to go; ``layers``, ``include``,
            ``exclude``, ``round_to``, ``scope``, ``cost`` and ``timed`` are explained at
            :class:`onnxprune.factors.request.Request`.

    Raises:
        UsageError: a value out of range, options that contradict each other, a pattern that matches nothing, a plan
            that does not fit.
        BudgetError: nothing can be taken apart like this, the ratio cannot be reached, or nothing gets faster.
        ValidationError: the new layers do not compute what the product of their weights does.
    """

    def __init__(
        self,
        method: str = "auto",
        *,
        plan: Plan | str | Path | None = None,
        check: bool = True,
        gains: Mapping[str, float] | None = None,
        wanted: Mapping[str, tuple[str, float]] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.request: Request = request_of(method, options)
        self.check, self.gains, self.wanted = check, gains, wanted
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan

    def __call__(self, state: State) -> None:
        """Choose layers and ranks, take them apart, check the products."""
        state.analyzed()
        assert state.proto is not None
        before = state.proto, state.weights
        with state.stage("factorize"):
            work = lay_open(state, self.request, self._methods(), every=self.plan is not None)
            chosen = Chosen(left=dict(work.found.left))
            done = self._choose(state, before, work, chosen)
            if not done:
                raise BudgetError("No layer of this model can be factorized like this.", hint=_reasons(chosen))
            after = _replaced(before, done)
            if self._timed:
                _require_speed(state, before, after)
        product = Exactness(note="not asked: models were not run")
        if self.check:
            with state.stage("products"):
                product = check_products(state, before, after, [(d.item, d.kernel) for d in done])
        state.unrepaired = state.unrepaired or before
        state.proto, state.weights = after
        state.factorized = state.stale = True

        def report() -> None:
            plan = state.plan
            plan.factorized = [PlanFactors(d.name, d.candidate.method, list(d.candidate.ranks), d.error) for d in done]
            plan.model_sha256 = plan.model_sha256 or state.original.loaded.sha256
            settings = {"method": "a plan"} if self.plan is not None else self.request.settings
            state.report.settings = {**state.report.settings, **settings}
            state.report.product = product
            describe(state, work, done, chosen.left)

        state.later.append(report)

    def unchecked(self) -> Factorize:
        """The same without the check of products, for trials."""
        other = copy(self)
        other.check = False
        return other

    @property
    def _timed(self) -> bool:
        """Whether what brings no speed is left alone."""
        return self.request.timed and self.request.method == "auto" and self.plan is None

    def _methods(self) -> Sequence[str]:
        if self.plan is not None:
            return sorted({f.method for f in self.plan.factorized} & METHODS.keys())
        return AUTO if self.request.method == "auto" else (self.request.method,)

    def _choose(self, state: State, before: Model, work: Work, chosen: Chosen) -> list[Done]:
        """What is taken apart, and how."""
        if self.plan is not None:
            entries = [(f.layer, f.method, tuple(f.ranks)) for f in self.plan.factorized]
            chosen.taken = read_choices(work.opened, entries)
        elif self.wanted is not None:
            choose_wanted(work.opened, self.wanted, self.request.round_to, chosen)
        elif self.request.scope == "local" and self.request.method != "auto":
            spread(lambda one: choose_local(one, self.request, chosen), list(work.opened.values()))
            chosen.taken = {name: chosen.taken[name] for name in work.opened if name in chosen.taken}
        elif work.opened:
            joint = JointBudget(work, self._methods(), chosen, self.gains)
            joint.share_out()
            if self._timed:

                def quick(done: Sequence[Done]) -> bool:
                    return not _slower(model_latency(state, before, _replaced(before, done)))

                return joint.faster(quick)
        return work.carry_out(chosen.taken)


def _replaced(before: Model, done: Sequence[Done]) -> Model:
    target = Prepared(*before)
    replace_layers(target.graph, target.weights, [d.item for d in done])
    return target.model()


def _slower(timed: Latency | None) -> bool:
    """Whether the whole model lost speed, where that could be measured."""
    return timed is not None and timed.speedup < 1.0


def _require_speed(state: State, before: Model, after: Model) -> None:
    """Layers that are faster on their own may not be so together: what stands between them was fused before.

    Raises:
        BudgetError: the whole is no faster.
    """
    timed = model_latency(state, before, after)
    if timed is not None and _slower(timed):
        raise BudgetError(
            f"The factorized model is no faster here: {timed.before_ms:.3g} ms before, {timed.after_ms:.3g} ms after.",
            hint="Nothing was changed. Take another --ratio, prune instead, or go by work alone with --untimed.",
        )


def _reasons(chosen: Chosen) -> str:
    """The commonest reasons."""
    counts = Counter(chosen.left.values())
    said = "; ".join(f"{n} layer{'s' if n > 1 else ''}: {why}" for why, n in counts.most_common(3))
    return f"Reasons: {said}." if said else "It has no layers with weights of their own."
