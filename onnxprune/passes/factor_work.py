"""A model prepared for factorization: its layers, second moments of their inputs, and factors of choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan
from onnxprune.channels.propagate import infer_by_rule
from onnxprune.errors import UsageError, argument
from onnxprune.factorization.allocation import Candidate, LayerFits
from onnxprune.factorization.codes import Coded, code_factors
from onnxprune.factorization.decompositions import METHODS, Degenerate, Method, Metric, Ranks, compose
from onnxprune.factorization.layers import NUMBERS, Layer, LayerScan, ShapeOf, find_layers
from onnxprune.factorization.ranks import within
from onnxprune.factorization.rewriting import Factorized
from onnxprune.factorization.settings import Request
from onnxprune.globs import check_patterns
from onnxprune.graph.inference import probe_at
from onnxprune.graph.view import Graph
from onnxprune.io.weights import Weight
from onnxprune.labels.atoms import Reason
from onnxprune.operators.kernels import Factor, Real, Shape, elements
from onnxprune.passes.grams import input_grams
from onnxprune.passes.prepared import Prepared
from onnxprune.pipeline import Context, Model
from onnxprune.report.facts import Latency
from onnxprune.runtime.sessions import spread
from onnxprune.sparsification.scores import InputGram


@dataclass(slots=True)
class LayerResult:
    """One factorized layer, its error and its latency.

    Attributes:
        kernel: the product of the factors.
        error: share of the energy at the layer's output that is lost.
        latency: latency of the layer on its own, whole and factorized.
        storage: description of how the factors of a weight of codes are stored; empty for other weights.
    """

    layer_fits: LayerFits
    candidate: Candidate
    item: Factorized
    kernel: Real
    error: float
    note: str = ""
    latency: Latency | None = None
    storage: str = ""

    @property
    def name(self) -> str:
        """The name of the layer."""
        return self.layer_fits.layer.name


@dataclass(slots=True)
class Work:
    """A model prepared for factorization, its layers and the moments of their inputs.

    Attributes:
        replayed: {layer: whether the factors of its codes are numbers}, as a plan says; None without one.
    """

    context: Context
    analysis: Analysis
    request: Request
    model: Prepared
    shape: ShapeOf
    scan: LayerScan
    moments: Mapping[str, InputMoments]
    replayed: Mapping[str, bool] | None = None
    layer_fits: dict[str, LayerFits] = field(default_factory=dict)
    _results: dict[tuple[str, str, Ranks], LayerResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layer_fits = {layer.name: self._load(layer) for layer in self.scan.layers}

    def _load(self, layer: Layer) -> LayerFits:
        kernel = layer.factoring.kernel(self.model.weights[layer.weight].read(), layer.description)
        return LayerFits(layer, kernel, self.moments[layer.name].metric, self.context.seed, self.request.cost)

    def factorize(self, candidates: Mapping[str, Candidate]) -> list[LayerResult]:
        """Factorize by every choice, {name of the layer: candidate}; equal factorizations are computed once.

        Raises:
            UsageError: CP has no best approximation of that rank, and Tucker none of at most that cost.
        """
        keys = {(name, c.method, c.ranks): (name, c) for name, c in candidates.items()}
        missing = [key for key in keys if key not in self._results]
        heavy = any(self.layer_fits[name].kernel.size >= 1 << 20 for name, _, _ in missing)
        for key, result in zip(
            missing, spread(lambda k: self._factorize_layer(*keys[k]), missing, heavy=heavy), strict=True
        ):
            self._results[key] = result
        return [self._results[key] for key in keys]

    def _factorize_layer(self, name: str, candidate: Candidate) -> LayerResult:
        fits, note = self.layer_fits[name], ""
        try:
            factors: Sequence[Factor] = fits.fit(candidate.method).factors(candidate.ranks)
        except Degenerate:
            note = f"cp of rank {candidate.ranks[0]} is degenerate: tucker at no more cost"
            other = fits.within("tucker", candidate.cost, self.request.round_to)
            if other is None:
                raise UsageError(
                    f"CP of rank {candidate.ranks[0]} has no best approximation of layer {name!r}.",
                    hint=f"Give another rank or {argument('method')}, or {argument('exclude')} the layer.",
                ) from None
            candidate = other
            factors = fits.fit("tucker").factors(other.ranks)
        candidate, factors, codes = self._as_codes(fits, candidate, factors)
        code, storage = self.model.codes.get(fits.layer.weight), ""
        if code is not None:
            storage = f"codes of {code.bits} bits" if codes else "numbers, which lose less than codes of as many bytes"
        shape = fits.layer.shape
        kernel = compose(factors, shape.parts, shape.inputs)
        item = Factorized(fits.layer, candidate.method.replace("-", "_"), factors, self._shift(fits, kernel), codes)
        return LayerResult(fits, candidate, item, kernel, fits.metric.error(fits.kernel, kernel), note, storage=storage)

    def _as_codes(
        self, fits: LayerFits, candidate: Candidate, factors: Sequence[Factor]
    ) -> tuple[Candidate, Sequence[Factor], Sequence[Coded | None]]:
        """Store the factors of a weight of codes as codes, unless numbers of no more bytes lose less.

        Ranks that a user set stay as they are; others are then those of the numbers.
        """
        layer = fits.layer
        code, weight = self.model.codes.get(layer.weight), self.model.weights[layer.weight]
        if code is None or (self.replayed or {}).get(fits.layer.name):
            return candidate, factors, ()
        result = code_factors(code, layer.factoring, layer.description, factors, weight.shape)
        if result is None:
            return candidate, factors, ()
        shape, size = layer.shape, weight.dtype.itemsize
        new, codes = result
        if self.replayed is not None:
            return candidate, new, codes
        pairs = zip(new, codes, strict=True)
        num_bytes = sum(f.array.size * size if c is None else c.num_bytes for f, c in pairs)
        error = fits.metric.error(fits.kernel, compose(new, shape.parts, shape.inputs))
        method = METHODS[candidate.method]
        choice = within(method, partial(_elements, shape), fits.fit(candidate.method), num_bytes // size)
        if choice is not None:
            other = fits.fit(candidate.method).factors(choice.ranks)
            if fits.metric.error(fits.kernel, compose(other, shape.parts, shape.inputs)) <= error:
                if self.request.ranks:
                    return candidate, factors, ()
                return replace(candidate, ranks=choice.ranks), other, ()
        return candidate, new, codes

    def _shift(self, fits: LayerFits, kernel: Real) -> Real | None:
        """Return the bias correction: the change of the kernel times the mean input of the layer."""
        mean = self.moments[fits.layer.name].mean
        if mean is None:
            return None
        shape = fits.layer.shape
        difference = (fits.kernel - kernel).reshape(shape.parts, -1, shape.outputs)
        return np.asarray(np.einsum("pn,pno->po", mean, difference).ravel())


def prepare_work(
    context: Context, current: Model, request: Request, methods: Sequence[str], *, replayed: Plan | None
) -> Work:
    """Find the layers of the model that can be factorized, and capture the moments of their inputs.

    Args:
        context: context of the run.
        current: the model.
        request: patterns and limits of the layers to factorize.
        methods: names of the allowed methods.
        replayed: the plan to repeat, for which patterns of the request do not hold; None without one.

    Raises:
        UsageError: a pattern matches nothing, or data that do not fit. ModelError: the model does not run.
    """
    analysis = current.analysis
    model = Prepared(*current.parts, decoded=True)
    shape = probe_at(model.graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
    scan = find_layers(model.graph, shape)
    names = (*(n.removesuffix(NUMBERS) for n in model.weights), *(n.label for n in model.graph.nodes))
    patterns = [(argument(name), getattr(request, name)) for name in ("layers", "include", "exclude")]
    check_patterns([*patterns, (argument("rank"), request.ranks)], names)
    for layer in list(scan.layers):
        why = "" if replayed is not None or not request.is_excluded(list(layer.names)) else _EXCLUDED
        why = why or _refusal(model, layer, methods)
        if why:
            scan.layers.remove(layer)
            scan.reasons[layer.name] = why
    moments = input_moments(context, analysis, model.graph, model.weights, scan.layers)
    numbers = None if replayed is None else {item.layer: item.numbers for item in replayed.factorized}
    return Work(context, analysis, request, model, shape, scan, moments, numbers)


def _elements(shape: Shape, method: Method, ranks: Ranks) -> int:
    return elements(method.stages(shape, ranks))


_EXCLUDED = f"{Reason.EXCLUDED}: by its name"


def _refusal(model: Prepared, layer: Layer, methods: Sequence[str]) -> str:
    """Return the reason why a layer cannot be factorized, so that nothing is captured for it."""
    whys = [METHODS[name].refusal(layer.shape) for name in methods]
    if all(whys):
        return next(iter(whys), "no ratio or rank was given for this layer")
    if not np.isfinite(model.weights[layer.weight].read().astype(np.float32)).all():
        return "its weight holds NaN or infinity"
    return ""


# -- second moments of what layers read --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InputMoments:
    """Moments of a layer's input.

    Attributes:
        metric: metric of the errors of its weights.
        mean: mean of its columns [parts, n], where a bias can absorb the effect of the mean: the metric is then about
            the mean.
    """

    metric: Metric
    mean: NDArray[np.float64] | None = None


def input_moments(
    context: Context, analysis: Analysis, graph: Graph, weights: Mapping[str, Weight], layers: Sequence[Layer]
) -> dict[str, InputMoments]:
    """Capture the second moments of every layer's input, {name of the layer: moments}; without data the identity.

    Raises:
        UsageError: the data do not fit. ModelError: the model does not run, or holds NaN.
    """
    plain = {layer.name: InputMoments(Metric()) for layer in layers}
    if context.calibration is None:
        return plain
    readers = {
        layer.name: [(use.node, layer.description.form, layer.shape.inputs) for use in layer.uses]
        for layer in layers
        if layer.description.form is not None
    }
    grams = input_grams(context, analysis, graph, weights, readers)
    # Taken out one by one: all of them and their copies would be held together.
    return plain | {
        layer.name: _moments_of(layer, grams.pop(layer.name), weights) for layer in layers if layer.name in grams
    }


def _moments_of(layer: Layer, gram: InputGram, weights: Mapping[str, Weight]) -> InputMoments:
    """Return the metric of a layer's errors, about the mean of its input where a bias can absorb that."""
    if gram.full is None:
        return InputMoments(Metric(per_channel=gram.per_channel))
    if not _takes_shift(layer, weights):
        return InputMoments(Metric(full=gram.full))
    return InputMoments(Metric(full=gram.full - gram.mean[:, :, None] * gram.mean[:, None, :]), gram.mean)


def _takes_shift(layer: Layer, weights: Mapping[str, Weight]) -> bool:
    """Return whether every node that reads the weight can take a bias of its own, one constant per output."""
    position, form = layer.factoring.bias(layer.uses[0].node), layer.description.form
    # Gemm's bias lies along its last axis, and so must the outputs.
    if position is None or form is None or form.output_axis(2) != 1:
        return False
    for use in layer.uses:
        bias = use.node.inputs[position] if position < len(use.node.inputs) else ""
        scaled = any(float(use.node.attrs.get(name, 1.0)) != 1.0 for name in ("alpha", "beta"))
        if scaled or (bias and bias not in weights):
            return False
    return True
