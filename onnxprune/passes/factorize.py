"""Factorize: take layers apart into smaller ones, by SVD, Tucker, CP or spatial SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from onnxprune.decompose import METHODS, Degenerate, Factor, compose
from onnxprune.decompose.factor import Real
from onnxprune.errors import BudgetError, UsageError
from onnxprune.factorize.allocate import allocate, reach, usual
from onnxprune.factorize.candidates import AUTO, Candidate, Opened
from onnxprune.factorize.choose import Chosen, choose_local, read_choices
from onnxprune.factorize.find import Found, find_layers
from onnxprune.factorize.layer import Layer, ShapeOf
from onnxprune.factorize.request import Options, Request, request_of
from onnxprune.factorize.rewrite import Factorized, replace_layers
from onnxprune.graph.infer import probe_at
from onnxprune.passes.factors_report import describe
from onnxprune.passes.gains import few, output_gains
from onnxprune.passes.grams import Seen, seen_by
from onnxprune.passes.layer_times import layer_latency
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.products import check_products
from onnxprune.passes.state import State
from onnxprune.plan import Plan, PlanFactors
from onnxprune.propagate import infer_by_rule
from onnxprune.report.facts import Latency
from onnxprune.runtime.parallel import spread
from onnxprune.selection.patterns import check

# What is not at least this much faster is not worth a second layer.
_FASTER = 1.03
# How often layers that turn out slower are left alone and the others chosen again.
_ROUNDS = 4
# Bytes of weights up to which models are run once per layer to learn what its errors do.
_MEASURED = 1 << 30


@dataclass(slots=True)
class Done:
    """One layer taken apart, and what that did."""

    opened: Opened
    candidate: Candidate
    item: Factorized
    kernel: Real
    error: float
    note: str = ""
    timed: Latency | None = None


@dataclass(slots=True)
class Work:
    """A model laid open and what is known of its layers."""

    model: Prepared
    shape: ShapeOf
    found: Found
    seen: Mapping[str, Seen]
    opened: dict[str, Opened] = field(default_factory=dict)
    gains: Sequence[float] = ()


class Factorize:
    """Replace layers by chains of smaller ones that say nearly the same.

    With data, errors count at the layer's output (second moments of what it reads); without, all weights count alike.

    Args:
        method: ``svd``, ``tucker``, ``cp``, ``spatial-svd``, or ``auto``: per layer whichever errs least.
        plan: a plan or its file, whose ``factorized`` is replayed instead of choosing.
        options: ``ratio`` (0.3), ``rank``, ``energy`` or ``vbmf`` say how far to go; ``layers``, ``include``,
            ``exclude``, ``round_to``, ``scope``, ``cost`` and ``timed`` are explained at
            :class:`onnxprune.factorize.request.Request`.

    Raises:
        UsageError: a value out of range, options that contradict each other, a pattern that matches nothing, a plan
            that does not fit.
        BudgetError: nothing can be taken apart like this, the ratio cannot be reached, or nothing gets faster.
        ValidationError: the new layers do not compute what the product of their weights does.
    """

    def __init__(
        self, method: str = "auto", *, plan: Plan | str | Path | None = None, **options: Unpack[Options]
    ) -> None:
        self.request: Request = request_of(method, options)
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan

    def __call__(self, state: State) -> None:
        """Choose layers and ranks, take them apart, check the products."""
        state.analyzed()
        assert state.proto is not None
        before = state.proto, state.weights
        with state.stage("factorize"):
            work = self._opened(state)
            chosen = self._chosen(state, work)
            done = self._carried_out(state, work, chosen)
            if not done:
                raise BudgetError("No layer of this model can be factorized like this.", hint=_reasons(work, chosen))
            timed = self.request.timed and self.request.method == "auto" and self.plan is None
            done = self._timed(state, work, chosen, done) if timed else done
            target = Prepared(*before)
            replace_layers(target.graph, target.weights, [d.item for d in done])
            after = target.model()
        with state.stage("products"):
            product = check_products(state, before, after, [(d.item, d.kernel) for d in done])
        state.unrepaired = state.unrepaired or before
        state.proto, state.weights = after
        state.factorized = True

        def report() -> None:
            state.plan.factorized = [
                PlanFactors(d.opened.layer.name, d.candidate.method, list(d.candidate.ranks), d.error) for d in done
            ]
            state.plan.model_sha256 = state.plan.model_sha256 or state.original.loaded.sha256
            state.report.settings = {**state.report.settings, **self.request.settings}
            state.report.exactness.product = product
            describe(state, work, done, chosen.left)

        state.later.append(report)

    def _opened(self, state: State) -> Work:
        """Find the layers and what the data show of their inputs."""
        analysis = state.analyzed()
        model = Prepared(*before_of(state))
        shape = probe_at(model.graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
        found = find_layers(model.graph, shape)
        request = self.request
        names = (*model.weights, *(n.label for n in model.graph.nodes))
        given = (("--layer", request.layers), ("--include", request.include), ("--exclude", request.exclude))
        check((*given, ("--rank", request.ranks)), names)
        for layer in [x for x in found.layers if request.excluded(list(x.names)) and self.plan is None]:
            found.layers.remove(layer)
            found.left[layer.name] = "excluded: by --exclude, or not among --include"
        self._refuse(model, found)
        seen = seen_by(state, analysis, model.graph, model.weights, found.layers)
        return Work(model, shape, found, seen)

    def _refuse(self, model: Prepared, found: Found) -> None:
        """Layers that no method of this run can take apart, so that nothing is captured for them."""
        names = AUTO if self.request.method == "auto" else (self.request.method,)
        if self.plan is not None:
            names = tuple({f.method for f in self.plan.factorized} & METHODS.keys())
        for layer in list(found.layers):
            whys = [METHODS[name].refusal(layer.shape) for name in names]
            if all(whys) and whys:
                found.left[layer.name] = whys[0]
            elif not np.isfinite(model.weights[layer.weight].read().astype(np.float32).sum()):
                found.left[layer.name] = "its weight holds NaN or infinity"
            else:
                continue
            found.layers.remove(layer)

    def _open(self, state: State, work: Work, layer: Layer) -> Opened:
        kernel = layer.operator.kernel(work.model.weights[layer.weight].read(), layer.described)
        return Opened(layer, kernel, work.seen[layer.name].metric, state.seed, self.request.cost)

    def _chosen(self, state: State, work: Work) -> Chosen:
        """A candidate for every layer that is taken apart."""
        opened = [self._open(state, work, layer) for layer in work.found.layers]
        work.opened = {o.layer.name: o for o in opened}
        chosen = Chosen(left=dict(work.found.left))
        if self.plan is not None:
            entries = [(f.layer, f.method, tuple(f.ranks)) for f in self.plan.factorized]
            chosen.taken = read_choices(work.opened, entries)
        elif self.request.scope == "local" and self.request.method != "auto":
            spread(lambda one: choose_local(one, self.request, chosen), opened)
        else:
            self._share_out(state, work, chosen, frozenset())
        return chosen

    def _share_out(self, state: State, work: Work, chosen: Chosen, slower: frozenset[tuple[str, str]]) -> None:
        """One budget for all layers. ``slower``: pairs of layer and method that brought no speed."""
        opened = list(work.opened.values())
        names = self._methods()
        step = self.request.round_to
        options = spread(lambda one: list(one.choices(names, step)), opened)
        options = [
            [c for c in own if (o.layer.name, c.method) not in slower] for o, own in zip(opened, options, strict=True)
        ]
        wholes = [o.whole for o in opened]
        total = self._total(work)
        budget = (1.0 - self.request.share) * total - (total - sum(wholes))
        gains = self._gains(state, work, opened, names, total)
        taken = allocate(wholes, options, gains, budget)
        if taken is None:
            best = 1.0 - (total - sum(wholes) + reach(wholes, options)) / total
            because = " without layers that get slower" if slower else ""
            raise BudgetError(
                f"No ranks save {self.request.share:.0%} of the {self.request.cost}{because}: at most {best:.0%}.",
                hint="Take a smaller --ratio, or prune as well.",
            )
        chosen.taken = {o.layer.name: c for o, c in zip(opened, taken, strict=True) if c is not None}
        for one in opened:
            if one.layer.name not in chosen.taken:
                bad = [m for n, m in slower if n == one.layer.name]
                why = f"no faster by {', '.join(bad)}, as measured" if bad else "others lose less for what they save"
                chosen.left[one.layer.name] = why

    def _methods(self) -> Sequence[str]:
        return AUTO if self.request.method == "auto" else (self.request.method,)

    def _total(self, work: Work) -> int:
        """Cost of the whole model."""
        from onnxprune.graph.cost import macs

        if self.request.cost == "macs":
            return sum(macs(node, work.shape) for node in work.model.graph.steps)
        return sum(int(np.prod(w.shape)) for w in work.model.weights.values())

    def _gains(
        self, state: State, work: Work, opened: Sequence[Opened], names: Sequence[str], total: int
    ) -> Sequence[float]:
        """What a layer's error does at the outputs: measured with data, else all alike."""
        if state.data is None or state.original.loaded.size > _MEASURED:
            return [1.0] * len(opened)
        if not work.gains:
            with state.stage("gains"):
                feeds = list(state.calibration().batches(4))
                batch = max(len(next(iter(feeds[0].values()))), 1)
                work.gains = usual(output_gains(work.model, opened, names, few(feeds, total * len(opened) / batch)))
        return work.gains

    def _carried_out(self, state: State, work: Work, chosen: Chosen) -> list[Done]:
        """Factors of every choice; where CP has none, Tucker's at the same cost."""

        def one(name: str) -> Done:
            opened, candidate, note = work.opened[name], chosen.taken[name], ""
            try:
                factors = opened.fit(candidate.method).factors(candidate.ranks)
            except Degenerate:
                other = opened.within("tucker", candidate.cost, self.request.round_to)
                if other is None:
                    raise UsageError(
                        f"CP of rank {candidate.ranks[0]} has no best approximation of layer {name!r}.",
                        hint="Take another rank or --method, or --exclude the layer.",
                    ) from None
                note = f"cp of rank {candidate.ranks[0]} is degenerate: tucker at no more work"
                candidate = other
                factors = opened.fit("tucker").factors(other.ranks)
            return self._done(work, opened, candidate, factors, note)

        return spread(one, list(chosen.taken), heavy=True)

    def _done(self, work: Work, opened: Opened, candidate: Candidate, factors: list[Factor], note: str) -> Done:
        layer = opened.layer
        kernel = compose(factors, layer.shape.parts, layer.shape.inputs)
        mean = work.seen[layer.name].mean
        shift = None
        if mean is not None:
            flat = (opened.kernel - kernel).reshape(layer.shape.parts, -1, layer.shape.outputs)
            shift = np.einsum("pn,pno->po", mean, flat).ravel()
        item = Factorized(layer, candidate.method.replace("-", "_"), factors, shift)
        return Done(opened, candidate, item, kernel, opened.metric.error(opened.kernel, kernel), note)

    def _timed(self, state: State, work: Work, chosen: Chosen, done: list[Done]) -> list[Done]:
        """Leave alone what brings no speed, and choose again without it."""
        times: dict[tuple[Any, ...], Latency | None] = {}
        slower: frozenset[tuple[str, str]] = frozenset()
        for _ in range(_ROUNDS):
            for one in done:
                one.timed = self._time(state, work, one, times)
            bad = {
                (d.opened.layer.name, d.candidate.method)
                for d in done
                if d.timed is not None and d.timed.speedup < _FASTER
            }
            if not bad:
                return done
            slower |= bad
            self._share_out(state, work, chosen, slower)
            done = self._carried_out(state, work, chosen)
        return [d for d in done if (d.opened.layer.name, d.candidate.method) not in slower]

    def _time(
        self, state: State, work: Work, one: Done, times: dict[tuple[Any, ...], Latency | None]
    ) -> Latency | None:
        """Measured once for layers of one form and size."""
        layer = one.opened.layer
        node = layer.uses[0].node
        key = (node.op, str(node.attrs), layer.shape, layer.described.geometry, one.candidate.method, one.candidate.ranks)
        if key not in times:
            times[key] = layer_latency(work.model.graph, work.model.weights, work.shape, one.item, state.seed)
        return times[key]


def before_of(state: State) -> tuple[Any, Any]:
    """The model as it is now."""
    assert state.proto is not None
    return state.proto, state.weights


def _reasons(work: Work, chosen: Chosen) -> str:
    """The commonest reasons."""
    counts: dict[str, int] = {}
    for why in chosen.left.values():
        counts[why] = counts.get(why, 0) + 1
    top = sorted(counts, key=lambda w: -counts[w])[:3]
    said = "; ".join(f"{counts[w]} layer{'s' if counts[w] > 1 else ''}: {w}" for w in top)
    return f"Reasons: {said}." if said else "It has no layers with weights of their own."
