"""Factorize: replace layers by products of smaller ones, by SVD, Tucker, CP or spatial SVD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanFactors
from onnxprune.channels.propagate import infer_by_rule
from onnxprune.errors import BudgetError, argument
from onnxprune.factorization.allocation import AUTO, LayerChoices, choose_by_share, choose_local, read_choices
from onnxprune.factorization.codes import Coded
from onnxprune.factorization.decompositions import METHODS
from onnxprune.factorization.rewriting import replace_layers
from onnxprune.factorization.settings import Options, Request, request_of
from onnxprune.graph.cost import is_layer, layer_weights, macs
from onnxprune.graph.inference import probe_at
from onnxprune.graph.view import Graph
from onnxprune.operators.kernels import elements
from onnxprune.passes.factor_work import LayerResult, Work, prepare_work
from onnxprune.passes.joint_budget import JointBudget, model_latency
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.products import check_codes, check_products
from onnxprune.pipeline import Context, Model, ModelParts, Pass, PassResult
from onnxprune.report.facts import Exactness, Fact, Factorization, FactorizedLayer, Latency, Remark, Settings, Sizes
from onnxprune.runtime.sessions import spread
from onnxprune.settings import named_arguments


@named_arguments(wanted="shares")
@dataclass(frozen=True, repr=False, eq=False)
class Factorize(Pass, Options):
    """Replace layers by chains of smaller ones with nearly the same outputs.

    With data, errors are measured at the layer's output (second moments of its input); without, in the weights.

    Args:
        method: ``svd``, ``tucker``, ``cp``, ``spatial-svd``, or ``auto``: per layer the method with the least error.
        plan: a plan or its file, whose ``factorized`` is replayed instead of choosing.
        check: compare the result with the product of its new weights.
        gains: weight of each layer's error, {name: gain}, where ``auto`` need not measure it.
        shares: {name: (method, share of the layer's cost)} in place of choosing: the ranks of least loss within it.
        lighter: whether ``auto`` leaves out ranks that save multiply-accumulates but cost more in moving activations.

    ``ratio`` (0.3), ``rank``, ``energy`` or ``vbmf`` set the ranks; these and ``layers``, ``include``, ``exclude``,
    ``round_to``, ``scope``, ``cost`` and ``timed`` are explained at
    :class:`onnxprune.factorization.settings.Options`.

    Raises:
        UsageError: a value out of range, options that contradict each other, a pattern that matches nothing, a plan
            that does not fit.
        BudgetError: no layer can be factorized like this, the ratio cannot be reached, or nothing gets faster.
        ValidationError: the outputs of the new layers differ from those of the product of their weights.
    """

    method: str = "auto"
    _: KW_ONLY
    plan: Plan | str | Path | None = None
    check: bool = True
    gains: Mapping[str, float] | None = None
    shares: Mapping[str, tuple[str, float]] | None = None
    lighter: bool = False

    def __post_init__(self) -> None:
        self.request, self.replayed  # noqa: B018  # wrong values are errors of the construction

    @cached_property
    def request(self) -> Request:
        """The settings, checked."""
        return request_of(self.method, self)

    @cached_property
    def replayed(self) -> Plan | None:
        """The plan, read from its file."""
        return Plan.load(self.plan) if isinstance(self.plan, (str, Path)) else self.plan

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Choose layers and ranks, factorize, check the products."""
        before = model.parts
        with context.stage("factorize"):
            work = prepare_work(context, model, self.request, self._methods(), replayed=self.replayed)
            choices = LayerChoices(reasons=dict(work.scan.reasons))
            results, remarks = self._choose(context, before, work, choices)
            if not results:
                raise BudgetError(
                    "No layer of this model can be factorized with these settings.", hint=_reasons(choices)
                )
            after, coded = _replaced(before, results)
            if self._timed:
                _require_speed(context, model.analysis, before, after)
        product = Exactness(note="models were not run")
        if self.check:
            with context.stage("products"):
                numbers = _replaced(before, results, as_codes=False)[0] if coded else after
                product = check_products(context, model, numbers, [(d.item, d.kernel) for d in results])
                check_codes(after, coded)
        factorized = model.with_parts(after, as_pruned=model.as_pruned or before, plan=_plan(context, model, results))
        settings = Settings({"method": "a plan"} if self.replayed is not None else self.request.settings)
        facts = describe_factors(context, factorized, work, results, choices.reasons, product)
        return PassResult(factorized, [settings, *map(Remark, remarks), *facts])

    def unchecked(self) -> Factorize:
        """Return the same pass without the check of products, for trials."""
        return replace(self, check=False)

    @property
    def _timed(self) -> bool:
        """Whether layers stay whole that do not get faster."""
        return self.request.timed and self.request.method == "auto" and self.replayed is None

    def _methods(self) -> Sequence[str]:
        if self.replayed is not None:
            return sorted({f.method for f in self.replayed.factorized} & METHODS.keys())
        return AUTO if self.request.method == "auto" else (self.request.method,)

    def _choose(
        self, context: Context, before: ModelParts, work: Work, choices: LayerChoices
    ) -> tuple[list[LayerResult], Sequence[str]]:
        """Choose the layers to factorize with their methods and ranks, and the remarks about the choice."""
        if self.replayed is not None:
            entries = [(f.layer, f.method, tuple(f.ranks)) for f in self.replayed.factorized]
            choices.candidates = read_choices(work.layer_fits, entries)
        elif self.shares is not None:
            choose_by_share(work.layer_fits, self.shares, self.request.round_to, choices)
        elif self.request.scope == "local" and self.request.method != "auto":
            spread(lambda one: choose_local(one, self.request, choices), list(work.layer_fits.values()))
            choices.candidates = {
                name: choices.candidates[name] for name in work.layer_fits if name in choices.candidates
            }
        elif work.layer_fits:
            joint = JointBudget(work, self._methods(), choices, self.gains, lighter=self.lighter)
            joint.share_out()
            if self._timed:

                def quick(results: Sequence[LayerResult]) -> bool:
                    return not _slower(model_latency(context, work.analysis, before, _replaced(before, results)[0]))

                return joint.faster(quick), joint.remarks
        return work.factorize(choices.candidates), ()


def _plan(context: Context, model: Model, results: Sequence[LayerResult]) -> Plan:
    """Return the plan so far with the ranks of every layer."""
    factors = [
        PlanFactors(d.name, d.candidate.method, list(d.candidate.ranks), d.error, bool(d.storage) and not d.item.codes)
        for d in results
    ]
    digest = model.plan.model_sha256 or context.analysis.loaded.sha256
    return replace(model.plan, factorized=factors, model_sha256=digest)


def _replaced(
    before: ModelParts, results: Sequence[LayerResult], *, as_codes: bool = True
) -> tuple[ModelParts, Mapping[str, Coded]]:
    """Return the model with factorized layers, and the codes of their weights, which are numbers on request."""
    target = Prepared(*before, decoded=True)
    coded = replace_layers(target.graph, target.weights, [d.item for d in results])
    return target.model(coded if as_codes else {}), coded


def _slower(timed: Latency | None) -> bool:
    """Return whether the whole model became slower, where that could be measured."""
    return timed is not None and timed.speedup < 1.0


def _require_speed(context: Context, analysis: Analysis, before: ModelParts, after: ModelParts) -> None:
    """Check the speed of the whole model: layers that are faster alone may lose fusions with their neighbours.

    Raises:
        BudgetError: the whole model is not faster.
    """
    timed = model_latency(context, analysis, before, after)
    if timed is not None and _slower(timed):
        raise BudgetError(
            f"The factorized model is no faster here: {timed.before_ms:.3g} ms before, {timed.after_ms:.3g} ms after.",
            hint=f"Nothing was changed. Give another {argument('ratio')}, prune instead, or skip timing with "
            f"{argument('timed', False)}.",
        )


def _reasons(choices: LayerChoices) -> str:
    """Return the most frequent reasons."""
    counts = Counter(choices.reasons.values())
    text = "; ".join(f"{n} layer{'s' if n > 1 else ''}: {why}" for why, n in counts.most_common(3))
    return f"Reasons: {text}." if text else "The model has no layers with weights of their own."


# -- facts about a factorization ---------------------------------------------------------------------------------------


def describe_factors(
    context: Context,
    model: Model,
    work: Work,
    results: Sequence[LayerResult],
    reasons: Mapping[str, str],
    product: Exactness,
) -> Iterator[Fact]:
    """Describe a factorization as facts.

    Args:
        context: context of the run.
        model: the factorized model.
        work: layers of the model before, with the moments of their inputs.
        results: factorized layers.
        reasons: {layer: reason} of the layers that were not factorized.
        product: result of the check of the products.
    """
    layers = list(_layers(work, results, reasons))
    listed = {layer.name for layer in layers}
    layers += [FactorizedLayer(name, "", reason=why) for name, why in reasons.items() if name not in listed]
    yield Factorization(layers, product)
    yield from (Remark(f"{d.layer_fits.layer.name}: {d.note}") for d in results if d.note)
    bad = [name for name, why in reasons.items() if "NaN" in why]
    if bad:
        yield Remark(f"not factorized because weights hold NaN or infinity: {', '.join(bad[:4])}")
    graph = Graph.of(*model.parts)
    shape = probe_at(graph, model.analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
    yield Sizes(
        params_before=context.analysis.parameters,
        params_after=model.num_parameters,
        macs_before=sum(x.macs_before for x in context.analysis.layers),
        macs_after=sum(macs(node, shape) for node in graph.steps if is_layer(node, graph)),
    )


def _layers(work: Work, results: Sequence[LayerResult], reasons: Mapping[str, str]) -> Iterator[FactorizedLayer]:
    """Iterate over layers in the order of the graph, then those without a node of their own."""
    by_name = {d.layer_fits.layer.name: _layer(d) for d in results}
    graph = work.model.graph
    for node in graph.steps:
        name = node.label
        if name in by_name:
            yield by_name.pop(name)
        elif name in reasons and is_layer(node, graph):
            params = sum(int(np.prod(graph.weights[w].shape)) for w in layer_weights(node, graph))
            cost = macs(node, work.shape)
            sizes = {"params_before": params, "params_after": params, "macs_before": cost, "macs_after": cost}
            yield FactorizedLayer(name, node.op, reason=reasons[name], **sizes)
    yield from by_name.values()


def _layer(result: LayerResult) -> FactorizedLayer:
    layer, candidate = result.layer_fits.layer, result.candidate
    stages = [f.stage for f in result.item.factors]
    full_stages = [layer.shape.as_stage()]
    return FactorizedLayer(
        name=layer.name,
        op=layer.uses[0].node.op,
        method=candidate.method,
        ranks=list(candidate.ranks),
        error=result.error,
        params_before=elements(full_stages),
        params_after=elements(stages),
        macs_before=layer.macs(full_stages),
        macs_after=layer.macs(stages),
        before_ms=None if result.latency is None else result.latency.before_ms,
        after_ms=None if result.latency is None else result.latency.after_ms,
        note="; ".join(filter(None, (result.note, result.storage))),
    )
