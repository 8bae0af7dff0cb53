"""What an error at one layer's output does to the model's outputs, measured: the weights of a joint budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from onnxprune.decompose import compose
from onnxprune.factors.candidates import Opened
from onnxprune.factors.rewrite import composed_weight
from onnxprune.model.save import assemble
from onnxprune.model.weights import Weight
from onnxprune.passes.prepared import Prepared
from onnxprune.runtime.parallel import spread
from onnxprune.runtime.sessions import Feed, open_session, run

# Multiply-accumulates that all measurements together may take, and samples that are enough.
_WORK, ENOUGH, _FEWEST = 1.5e12, 64, 4
# Share of a layer's cost at which it is tried.
_TRIED = 0.6
# A loss that is rounding: what comes of it at the outputs tells nothing.
_NOTHING = 1e-9


def output_gains(model: Prepared, layers: Sequence[Opened], names: Sequence[str], feeds: Sequence[Feed]) -> list[float]:
    """Energy of the change at the model's outputs per share of energy lost at the layer's, for every layer.

    Every layer is taken apart on its own and the model run; changes count as shares of their output's variance, mean
    over outputs. NaN where a layer cannot be taken apart or loses nothing.

    Args:
        model: as it is. layers: to be tried. names: of methods to try them with. feeds: a few samples.
    """
    before = _outputs(model, model.weights, feeds)

    def one(opened: Opened) -> float:
        tried = [c for n in names if not opened.refusal(n) and (c := opened.within(n, _TRIED * opened.whole, 1))]
        if not tried:
            return float("nan")
        best = min(tried, key=lambda c: c.loss)
        factors = opened.fit(best.method).factors(best.ranks)
        shape = opened.layer.shape
        kernel = compose(factors, shape.parts, shape.inputs)
        lost = opened.metric.error(opened.kernel, kernel)
        weights = dict(model.weights)
        name = opened.layer.weight
        weights[name] = composed_weight(opened.layer, kernel, weights[name])
        changed = _outputs(model, weights, feeds)
        return _difference(before, changed) / lost if lost > _NOTHING else float("nan")

    return spread(one, layers)


def few(feeds: Sequence[Feed], work: float) -> list[Feed]:
    """As many calls as the measurements may run, ``work`` multiply-accumulates each for one sample."""
    size = len(next(iter(feeds[0].values()))) if feeds else 1
    samples = int(np.clip(_WORK / max(work, 1.0), _FEWEST, ENOUGH))
    return list(islice(feeds, max(1, samples // max(size, 1))))


def _outputs(
    model: Prepared, weights: Mapping[str, Weight], feeds: Sequence[Feed]
) -> list[dict[str, NDArray[np.float64]]]:
    session = open_session(bytes(assemble(model.graph.proto, weights).SerializeToString()), threads=1)
    results = (run(session, feed) for feed in feeds)
    return [{n: np.asarray(v, np.float64) for n, v in r.items() if v.dtype.kind == "f"} for r in results]


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
