"""A model laid open for factorization: its layers, what the data show of their inputs, and factors of choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.decompose import METHODS, Degenerate, Ranks, compose
from onnxprune.decompose.factor import Real
from onnxprune.errors import UsageError
from onnxprune.factors.candidates import Candidate, Opened
from onnxprune.factors.find import Found, find_layers
from onnxprune.factors.layer import Layer, ShapeOf
from onnxprune.factors.request import Request
from onnxprune.factors.rewrite import Factorized
from onnxprune.graph.infer import probe_at
from onnxprune.passes.grams import Seen, seen_by
from onnxprune.passes.prepared import Prepared
from onnxprune.pipeline import Context, Model
from onnxprune.propagate import infer_by_rule
from onnxprune.report.facts import Latency
from onnxprune.runtime.parallel import spread
from onnxprune.selection.patterns import check


@dataclass(slots=True)
class Done:
    """One layer taken apart, and what that did.

    Attributes:
        kernel: the product of the factors. error: share of the energy at the layer's output that it does not give back.
        timed: the layer on its own, as it was and taken apart.
    """

    opened: Opened
    candidate: Candidate
    item: Factorized
    kernel: Real
    error: float
    note: str = ""
    timed: Latency | None = None

    @property
    def name(self) -> str:
        """The layer's."""
        return self.opened.layer.name


@dataclass(slots=True)
class Work:
    """A model laid open, and what is known of its layers."""

    context: Context
    analysis: Analysis
    request: Request
    model: Prepared
    shape: ShapeOf
    found: Found
    seen: Mapping[str, Seen]
    opened: dict[str, Opened] = field(default_factory=dict)
    _done: dict[tuple[str, str, Ranks], Done] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.opened = {layer.name: self._open(layer) for layer in self.found.layers}

    def _open(self, layer: Layer) -> Opened:
        kernel = layer.operator.kernel(self.model.weights[layer.weight].read(), layer.described)
        return Opened(layer, kernel, self.seen[layer.name].metric, self.context.seed, self.request.cost)

    def carry_out(self, taken: Mapping[str, Candidate]) -> list[Done]:
        """Factors of every choice, {name of the layer: candidate}; nothing is done twice.

        Raises:
            UsageError: CP has no best approximation of that rank, and Tucker none that is as cheap.
        """
        keys = {(name, c.method, c.ranks): (name, c) for name, c in taken.items()}
        missing = [key for key in keys if key not in self._done]
        heavy = any(self.opened[name].kernel.size >= 1 << 20 for name, _, _ in missing)
        for key, done in zip(missing, spread(lambda k: self._one(*keys[k]), missing, heavy=heavy), strict=True):
            self._done[key] = done
        return [self._done[key] for key in keys]

    def _one(self, name: str, candidate: Candidate) -> Done:
        opened, note = self.opened[name], ""
        try:
            factors = opened.fit(candidate.method).factors(candidate.ranks)
        except Degenerate:
            note = f"cp of rank {candidate.ranks[0]} is degenerate: tucker at no more cost"
            other = opened.within("tucker", candidate.cost, self.request.round_to)
            if other is None:
                raise UsageError(
                    f"CP of rank {candidate.ranks[0]} has no best approximation of layer {name!r}.",
                    hint="Take another rank or --method, or --exclude the layer.",
                ) from None
            candidate = other
            factors = opened.fit("tucker").factors(other.ranks)
        shape = opened.layer.shape
        kernel = compose(factors, shape.parts, shape.inputs)
        item = Factorized(opened.layer, candidate.method.replace("-", "_"), factors, self._shift(opened, kernel))
        return Done(opened, candidate, item, kernel, opened.metric.error(opened.kernel, kernel), note)

    def _shift(self, opened: Opened, kernel: Real) -> Real | None:
        """What a bias has to take up: the difference times the mean of what the layer reads."""
        mean = self.seen[opened.layer.name].mean
        if mean is None:
            return None
        shape = opened.layer.shape
        difference = (opened.kernel - kernel).reshape(shape.parts, -1, shape.outputs)
        return np.asarray(np.einsum("pn,pno->po", mean, difference).ravel())


def lay_open(context: Context, current: Model, request: Request, methods: Sequence[str], *, every: bool) -> Work:
    """Find the layers of the model as it is, and what the data show of their inputs.

    Args:
        context: the run. current: the model. methods: those that may be used. every: go by no pattern.

    Raises:
        UsageError: a pattern matches nothing, or data that do not fit. ModelError: the model does not run.
    """
    analysis = current.analysis
    model = Prepared(*current.parts)
    shape = probe_at(model.graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
    found = find_layers(model.graph, shape)
    names = (*model.weights, *(n.label for n in model.graph.nodes))
    given = (("--layer", request.layers), ("--include", request.include), ("--exclude", request.exclude))
    check((*given, ("--rank", request.ranks)), names)
    for layer in list(found.layers):
        why = "" if every or not request.excluded(list(layer.names)) else _EXCLUDED
        why = why or _refusal(model, layer, methods)
        if why:
            found.layers.remove(layer)
            found.left[layer.name] = why
    moments = seen_by(context, analysis, model.graph, model.weights, found.layers)
    return Work(context, analysis, request, model, shape, found, moments)


_EXCLUDED = "excluded: by --exclude, or not among --include"


def _refusal(model: Prepared, layer: Layer, methods: Sequence[str]) -> str:
    """Why nothing can be done to a layer, so that nothing is captured for it."""
    whys = [METHODS[name].refusal(layer.shape) for name in methods]
    if all(whys):
        return next(iter(whys), "nothing was asked of it")
    if not np.isfinite(model.weights[layer.weight].read().astype(np.float32)).all():
        return "its weight holds NaN or infinity"
    return ""
