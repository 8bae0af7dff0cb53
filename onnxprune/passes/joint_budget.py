"""One budget for the ranks of all layers, from the output sensitivity of their errors and from measured speed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import BudgetError, ModelError, argument
from onnxprune.factorization.allocation import (
    Candidate,
    LayerChoices,
    LayerFits,
    allocate,
    fill_gains,
    min_total_cost,
)
from onnxprune.factorization.decompositions import compose
from onnxprune.factorization.layers import Layer, ShapeOf
from onnxprune.factorization.rewriting import Factorized, composed_weight, replace_layers
from onnxprune.graph.cost import is_layer, macs
from onnxprune.graph.view import Graph
from onnxprune.io.weights import Weight
from onnxprune.io.write import assemble
from onnxprune.operators.kernels import Real
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.factor_work import LayerResult, Work
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import Context, ModelParts
from onnxprune.report.facts import Latency
from onnxprune.runtime.fidelity import are_probabilities, roots
from onnxprune.runtime.latency import Device, in_turn, latency
from onnxprune.runtime.segments import part_model
from onnxprune.runtime.sessions import Feed, measures, open_session, run, spread

# A layer that is slower on its own stays whole; the speed of the whole model is checked at the end.
_FASTER = 1.0
# A loss that may be rounding: two such losses cannot be compared.
_ROUNDING = 1e-9
# Rounds of correcting expected losses by the losses of the chosen factorizations.
_CORRECTIONS = 2
# An error is measured at the outputs with one layer changed alone; errors of many layers add up and saturate, which a
# root of the gain models. The fourth root is best on residual networks, the gain itself where few layers matter much.
_POWERS = (0.25, 1.0)
# Share of the output change below which another weighting is better: a few samples resolve no more.
_CLEARLY = 0.5
# Rounds in which layers that turn out slower are chosen again with another method; then they stay whole.
_ROUNDS = 4
# Relevant error of a layer, and the factor over the first choice's error that is too much to pay for speed.
_MATTERS, _MUCH = 0.05, 3.0
_CHEAPER_CHOSEN = (
    "some factorized layers get no faster on their own: without them the largest error of a layer would be "
    "{spared:.0%} in place of {kept:.1%}; a smaller ratio may not need them"
)
_SPARED = (
    "layers that get no faster are not factorized, which raises the largest error of a layer to {spared:.0%} from "
    "{kept:.1%}; give a smaller ratio, or skip timing"
)
# Bytes of weights up to which models are run once per layer to measure the effect of its errors.
_MEASURED = 1 << 30


class JointBudget:
    """Choices for all layers together.

    Args:
        work: layers of the model and the moments of their inputs.
        methods: names of the methods to choose from.
        chosen: mapping that receives the choice.
        gains: weight of a layer's error, {name: gain}, where it is known already.
        lighter: leave out candidates that save multiply-accumulates but cost more in moving activations.

    Attributes:
        layer_fits: the layers.
        options: candidates of each layer.
        gains: weight of the loss of each layer.
        remarks: remarks about the choice, for the user.
    """

    def __init__(
        self,
        work: Work,
        methods: Sequence[str],
        choices: LayerChoices,
        gains: Mapping[str, float] | None = None,
        *,
        lighter: bool = False,
    ) -> None:
        self._work, self._methods, self._choices = work, methods, choices
        self.layer_fits = list(work.layer_fits.values())
        step = work.request.round_to

        def candidates(one: LayerFits) -> list[Candidate]:
            return [c for c in one.choices(methods, step) if not lighter or one.is_lighter(c)]

        self.options = spread(candidates, self.layer_fits)
        self._fresh = list(self.options)
        self._total = _cost_of(work)
        self._outputs: Outputs | None = None
        if gains is None:
            self._weightings = self._measured()
        else:
            self._weightings = [fill_gains([gains.get(o.layer.name, np.nan) for o in self.layer_fits])]
        self.gains = self._weightings[0]
        self._times: dict[Hashable, Latency | None] = {}
        self.remarks: list[str] = []

    def share_out(self, slower: frozenset[tuple[str, str]] = frozenset()) -> None:
        """Choose under the first weighting of the gains, or under one that changes the outputs clearly less.

        Args:
            slower: pairs of layer and method that were not faster.

        Raises:
            BudgetError: no choice is cheap enough.
        """
        least = np.inf
        for gains in self._weightings:
            before = self._choices.candidates, self.gains
            self.gains, self.options = gains, list(self._fresh)
            self._settle(slower)
            change = self._change()
            if change < _CLEARLY * least:
                least = change
            else:
                self._choices.candidates, self.gains = before
        self._explain(slower)

    def _change(self) -> float:
        """Return the change of the outputs caused by the choice, where it is known."""
        if self._outputs is None or len(self._weightings) < 2:
            return 0.0
        return self._outputs.change([(d.layer_fits.layer, d.kernel) for d in self._carried_out()])

    def _settle(self, slower: frozenset[tuple[str, str]]) -> None:
        """Choose, and choose again with the measured losses of the choice."""
        for _ in range(_CORRECTIONS):
            self._allocate(slower)
            self._correct()
        self._allocate(slower)

    def _allocate(self, slower: frozenset[tuple[str, str]]) -> None:
        pairs = list(zip(self.layer_fits, self.options, strict=True))
        options = [[c for c in layer_options if (o.layer.name, c.method) not in slower] for o, layer_options in pairs]
        full_costs, request, choices = [o.full_cost for o in self.layer_fits], self._work.request, self._choices
        fixed = self._total - sum(full_costs)
        candidates = allocate(full_costs, options, self.gains, (1.0 - request.share) * self._total - fixed)
        if candidates is None:
            best = 1.0 - (fixed + min_total_cost(full_costs, options)) / max(self._total, 1)
            without = " without making layers slower" if slower else ""
            raise BudgetError(
                f"No ranks save {request.share:.0%} of the {request.cost}{without}: at most {best:.0%}.",
                hint=f"Give a smaller {argument('ratio')}, or prune as well."
                + (f" {argument('timed', False)} allows slower layers." if slower else ""),
            )
        choices.candidates = {
            o.layer.name: c for o, c in zip(self.layer_fits, candidates, strict=True) if c is not None
        }

    def _explain(self, slower: frozenset[tuple[str, str]]) -> None:
        """Record the reasons why layers stay whole."""
        for one in self.layer_fits:
            name = one.layer.name
            self._choices.reasons.pop(name, None)
            if name not in self._choices.candidates:
                bad = sorted(m for n, m in slower if n == name)
                why = f"no faster by {', '.join(bad)}, as measured" if bad else "other layers lose less per saving"
                self._choices.reasons[name] = why

    def _correct(self) -> None:
        """Scale the estimated losses of a method to the measured loss where a choice was carried out."""
        for result in self._work.factorize(self._choices.candidates):
            scale = (result.error + _ROUNDING) / (result.candidate.loss + _ROUNDING)
            k = next(i for i, o in enumerate(self.layer_fits) if o.layer.name == result.name)
            self.options[k] = [
                replace(c, loss=c.loss * scale) if c.method == result.candidate.method else c for c in self.options[k]
            ]

    def faster(self, quick: Callable[[Sequence[LayerResult]], bool]) -> list[LayerResult]:
        """Factorize, time every layer on its own, and choose again without the candidates that are not faster.

        Where that raises the errors of other layers much, the search ends as soon as the whole model is faster.

        Args:
            quick: function that returns whether the whole model is faster with these factorizations.

        Raises:
            BudgetError: the remaining candidates are not cheap enough.
        """
        slower: frozenset[tuple[str, str]] = frozenset()
        cheap: list[LayerResult] | None = None
        results = self._carried_out()
        bearable = max(_MATTERS, _MUCH * _worst(results))
        rounds = 0
        while slow := self._slow(results):
            methods = self._methods if rounds >= _ROUNDS else ()
            slower |= {(d.name, method) for d in slow for method in (methods or (d.candidate.method,))}
            rounds += 1
            self.share_out(slower)
            before, results = results, self._carried_out()
            if cheap is None and _worst(results) > bearable:
                cheap = before
                if quick(cheap):
                    self.remarks.append(_CHEAPER_CHOSEN.format(spared=_worst(results), kept=_worst(cheap)))
                    self._choices.candidates = {d.name: d.candidate for d in cheap}
                    self._explain(slower)
                    return cheap
        if cheap is not None:
            self.remarks.append(_SPARED.format(spared=_worst(results), kept=_worst(cheap)))
        return results

    def _carried_out(self) -> list[LayerResult]:
        return self._work.factorize(self._choices.candidates)

    def _slow(self, results: Sequence[LayerResult]) -> list[LayerResult]:
        """Return the factorized layers that are slower on their own, as measured."""
        for one in results:
            one.latency = self.latency(one)
        return [d for d in results if d.latency is not None and d.latency.speedup < _FASTER]

    def _measured(self) -> list[list[float]]:
        """Return the output errors per layer error under every weighting: measured with data, else equal."""
        work, context = self._work, self._work.context
        if context.calibration is None or context.analysis.loaded.size > _MEASURED or not self.layer_fits:
            return [[1.0] * len(self.layer_fits)]
        with context.stage("gains"):
            feeds = list(islice(CalibrationBatches(context, work.analysis, ENOUGH).batches(4), ENOUGH))
            batch = max(min(s[0] for s in work.analysis.facts.probes[0].inputs.values() if s), 1)
            runs = _macs_of(work) * len(self.layer_fits) / batch
            self._outputs = Outputs(work.model, limit_feeds(feeds, runs))
            gains = output_gains(self._outputs, self.layer_fits, self._methods)
            return [fill_gains([gain**power for gain in gains]) for power in _POWERS]

    def latency(self, one: LayerResult) -> Latency | None:
        """Return the latency of a layer on its own, whole and factorized; measured once per form and size."""
        layer, candidate, work = one.layer_fits.layer, one.candidate, self._work
        node = layer.uses[0].node
        form = (node.op, str(node.attrs), layer.shape, layer.description.geometry)
        key = (*form, candidate.method, candidate.ranks)
        if key not in self._times:
            self._times[key] = layer_latency(
                work.model.graph, work.model.weights, work.shape, one.item, work.context.seed, work.context.device
            )
        return self._times[key]


def _worst(results: Sequence[LayerResult]) -> float:
    """Return the largest error of a layer."""
    return max((d.error for d in results), default=0.0)


def _macs_of(work: Work) -> int:
    """Return the multiply-accumulates of all layers as in reports, without products of two activations."""
    graph = work.model.graph
    return sum(macs(node, work.shape) for node in graph.steps if is_layer(node, graph))


def _cost_of(work: Work) -> int:
    """Return the cost of the whole model."""
    if work.request.cost == "macs":
        return _macs_of(work)
    return sum(int(np.prod(w.shape)) for w in work.model.weights.values())


# -- what an error at a layer's output does to the model's outputs -----------------------------------------------------


# Multiply-accumulates that all measurements together may take, and the number of samples.
_WORK, ENOUGH, _FEWEST = 1.5e12, 64, 4
# Shares of a layer's cost to try, up to the first with a loss.
_TRIED = (0.6, 0.3, 0.15, 0.08, 0.04, 0.02)
# A loss that is rounding: its effect at the outputs is not significant.
_NOTHING = 1e-9


class Outputs:
    """A model's outputs on a few samples, as a reference for changed weights; square roots of probabilities.

    Args:
        model: the unchanged model.
        feeds: the samples as calls of the model.
    """

    def __init__(self, model: Prepared, feeds: Sequence[Feed]) -> None:
        self._model, self._feeds = model, feeds
        self._probable: set[str] | None = None
        self._before = self._run(model.weights)

    def change(self, kernels: Sequence[tuple[Layer, Real]]) -> float:
        """Return the energy of the output change with these kernels, as a share of variance, mean over the outputs."""
        weights = dict(self._model.weights)
        for layer, kernel in kernels:
            weights[layer.weight] = composed_weight(layer, kernel, weights[layer.weight])
        return _difference(self._before, self._run(weights))

    def _run(self, weights: Mapping[str, Weight]) -> list[dict[str, NDArray[np.float64]]]:
        session = open_session(bytes(assemble(self._model.graph.proto, weights).SerializeToString()), threads=1)
        results = (run(session, feed) for feed in self._feeds)
        outputs = [{n: v for n, v in r.items() if measures(v.dtype) and v.dtype.kind != "c"} for r in results]
        if self._probable is None:  # the original comes first
            self._probable = {n for n, v in outputs[0].items() if are_probabilities(v)} if outputs else set()
        probable = self._probable
        return [{n: roots(v) if n in probable else v.astype(np.float64) for n, v in r.items()} for r in outputs]


def output_gains(outputs: Outputs, layers: Sequence[LayerFits], names: Sequence[str]) -> list[float]:
    """Measure for every layer the energy of the output change of the model per share of energy lost at the layer.

    Every layer is factorized on its own and the model run. NaN where a layer cannot be factorized or loses nothing.

    Args:
        outputs: evaluation of the model's outputs on the data.
        layers: layers to factorize.
        names: names of the methods to try.
    """

    def one(fits: LayerFits) -> float:
        for share in _TRIED:
            tried = [c for n in names if not fits.refusal(n) and (c := fits.within(n, share * fits.full_cost, 1))]
            if not tried:
                break
            best = min(tried, key=lambda c: c.loss)
            factors = fits.fit(best.method).factors(best.ranks)
            kernel = compose(factors, fits.layer.shape.parts, fits.layer.shape.inputs)
            loss = fits.metric.error(fits.kernel, kernel)
            if loss > _NOTHING:
                return outputs.change([(fits.layer, kernel)]) / loss
        return float("nan")

    return spread(one, layers)


def limit_feeds(feeds: Sequence[Feed], work: float) -> list[Feed]:
    """Return as many calls as the measurements may run, ``work`` multiply-accumulates each for one sample."""
    size = len(next(iter(feeds[0].values()))) if feeds else 1
    samples = int(np.clip(_WORK / max(work, 1.0), _FEWEST, ENOUGH))
    return list(islice(feeds, max(1, samples // max(size, 1))))


def _difference(
    before: Sequence[dict[str, NDArray[np.float64]]], after: Sequence[dict[str, NDArray[np.float64]]]
) -> float:
    shares = []
    for name in before[0]:
        one, other = (np.concatenate([r[name].ravel() for r in results]) for results in (before, after))
        variance = float(np.square(one - one.mean()).sum())
        if one.shape == other.shape and variance > 0:
            shares.append(float(np.square(one - other).sum()) / variance)
    return float(np.mean(shares)) if shares else float("nan")


# -- times -------------------------------------------------------------------------------------------------------------


# Runs of either form, and the seconds they may take together.
_RUNS, _SECONDS = 15, 0.4
# Runs of whole models.
_MODEL_RUNS = 30


def model_latency(context: Context, analysis: Analysis, before: ModelParts, after: ModelParts) -> Latency | None:
    """Measure the median milliseconds of two whole models on one input; None where they are too large."""
    with Workspace.of(context.analysis) as trial:
        if trial.large:
            return None
        one, _ = trial.write(*before, "before")
        other, _ = trial.write(*after, "after")
        feeds = synthetic_feeds(context, analysis)[:1]
        return latency(one, other, feeds, runs=_MODEL_RUNS, device=context.device)


def layer_latency(
    graph: Graph, weights: Mapping[str, Weight], shape: ShapeOf, item: Factorized, seed: int, where: Device
) -> Latency | None:
    """Measure the milliseconds of a layer and of its factors, lower quartiles; None where the layer cannot run."""
    layer: Layer = item.layer
    node = layer.uses[0].node
    fed = [n for n in dict.fromkeys(node.inputs) if n and n not in weights]
    sizes = shape(fed[0]) if len(fed) == 1 else None
    if sizes is None or None in sizes or layer.description.geometry.looked_up:
        return None
    kind = weights[layer.weight].dtype
    value = np.asarray(np.random.default_rng(seed).standard_normal(sizes)).astype(kind)
    outputs = [o for o in node.outputs if o]
    before = part_model(graph, weights, [node], {fed[0]: value}, outputs)
    small = onnx.load_from_string(before)
    node_weights = {n: w for n, w in weights.items() if n in node.inputs}
    after = Graph.of(small, node_weights)
    replace_layers(after, node_weights, [item])
    try:
        changed = bytes(assemble(after.proto, node_weights).SerializeToString())
        times = in_turn([before, changed], [{fed[0]: value}], where, runs=_RUNS, budget_s=_SECONDS)
    except ModelError:  # no kernel for this type: no measurement
        return None
    # A layer's run is short: the lower quartile leaves out runs that other programs delayed.
    (one, one_more), (other, other_more) = (np.percentile(t, [25, 75]).tolist() for t in times)
    return Latency(one, other, one_more - one, other_more - other, len(times[0]), where.threads)
