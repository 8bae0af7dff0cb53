"""What an error at one layer's output does to the model's outputs, measured: the weights of a joint budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from onnxprune.decompose import compose
from onnxprune.decompose.factor import Real
from onnxprune.factors.candidates import Opened
from onnxprune.factors.layer import Layer
from onnxprune.factors.rewrite import composed_weight
from onnxprune.model.save import assemble
from onnxprune.model.weights import Weight
from onnxprune.passes.prepared import Prepared
from onnxprune.runtime.floats import measures
from onnxprune.runtime.parallel import spread
from onnxprune.runtime.probabilities import are_probabilities, roots
from onnxprune.runtime.sessions import Feed, open_session, run

# Multiply-accumulates that all measurements together may take, and samples that are enough.
_WORK, ENOUGH, _FEWEST = 1.5e12, 64, 4
# Shares of a layer's cost at which it is tried, the first at which it loses something.
_TRIED = (0.6, 0.3, 0.15, 0.08, 0.04, 0.02)
# A loss that is rounding: what comes of it at the outputs tells nothing.
_NOTHING = 1e-9


class Outputs:
    """A model's outputs on a few samples, to hold those of changed weights against; of probabilities the square roots.

    Args:
        model: as it is. feeds: the samples.
    """

    def __init__(self, model: Prepared, feeds: Sequence[Feed]) -> None:
        self._model, self._feeds = model, feeds
        self._probable: set[str] | None = None
        self._before = self._run(model.weights)

    def change(self, kernels: Sequence[tuple[Layer, Real]]) -> float:
        """Energy of the change with these kernels in the layers' place, as a share of an output's variance, mean over
        outputs.
        """
        weights = dict(self._model.weights)
        for layer, kernel in kernels:
            weights[layer.weight] = composed_weight(layer, kernel, weights[layer.weight])
        return _difference(self._before, self._run(weights))

    def _run(self, weights: Mapping[str, Weight]) -> list[dict[str, NDArray[np.float64]]]:
        session = open_session(bytes(assemble(self._model.graph.proto, weights).SerializeToString()), threads=1)
        results = (run(session, feed) for feed in self._feeds)
        found = [{n: v for n, v in r.items() if measures(v.dtype) and v.dtype.kind != "c"} for r in results]
        if self._probable is None:  # the original comes first
            self._probable = {n for n, v in found[0].items() if are_probabilities(v)} if found else set()
        probable = self._probable
        return [{n: roots(v) if n in probable else v.astype(np.float64) for n, v in r.items()} for r in found]


def output_gains(outputs: Outputs, layers: Sequence[Opened], names: Sequence[str]) -> list[float]:
    """Energy of the change at the model's outputs per share of energy lost at the layer's, for every layer.

    Every layer is taken apart on its own and the model run. NaN where a layer cannot be taken apart or loses nothing.

    Args:
        layers: to be tried. names: of methods to try them with.
    """

    def one(opened: Opened) -> float:
        for share in _TRIED:
            tried = [c for n in names if not opened.refusal(n) and (c := opened.within(n, share * opened.whole, 1))]
            if not tried:
                break
            best = min(tried, key=lambda c: c.loss)
            factors = opened.fit(best.method).factors(best.ranks)
            kernel = compose(factors, opened.layer.shape.parts, opened.layer.shape.inputs)
            lost = opened.metric.error(opened.kernel, kernel)
            if lost > _NOTHING:
                return outputs.change([(opened.layer, kernel)]) / lost
        return float("nan")

    return spread(one, layers)


def few(feeds: Sequence[Feed], work: float) -> list[Feed]:
    """As many calls as the measurements may run, ``work`` multiply-accumulates each for one sample."""
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
