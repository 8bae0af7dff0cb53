"""Data for a repair without data: inputs made up in the range in which the original makes most of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.errors import ModelError
from onnxprune.graph.bounds import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.passes.gauge import Gauge
from onnxprune.passes.trial import Trial
from onnxprune.pipeline import Context
from onnxprune.runtime.capture import count, with_outputs
from onnxprune.runtime.imagined import RANGES, Spread, imagined, is_pattern
from onnxprune.runtime.sessions import Feed, open_session, run

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
Make = Callable[[Spread, Shapes, int], Feed]

# Samples to repair from, fewer where they are large: so many numbers altogether, but no fewer samples than the least.
_SAMPLES, _LEAST, _NUMBERS = 512, 64, 1 << 25
_PLAIN = RANGES["sd 1"]
# Samples of every range to look at, fewer where they are large, with at most so many numbers; and samples of a call.
_LOOKS, _FEWEST, _SEEN, _BATCH = 128, 32, 1 << 19, 32


class Imagined(NamedTuple):
    """Inputs that were made up, and in which range (empty where no input has one to choose)."""

    feeds: list[Feed]
    spread: str


def make_up(context: Context, analysis: Analysis) -> Imagined:
    """Seeded inputs for a repair without data.

    A model does not say what range its inputs have. Several are tried on the original: the one with which the inputs
    of its BatchNormalizations are nearest to the means and variances that these have kept, and where there is none the
    one that its layers make most of, see :func:`onnxprune.recover.plausible.interest`.

    Raises:
        ModelError: the original does not run on any.
    """
    specs = input_specs(analysis.graph)
    bounds = integer_bounds(analysis.graph, analysis.facts)

    def make(spread: Spread, shapes: Shapes, number: int) -> Feed:
        return imagined(specs, shapes, spread, bounds=bounds, seed=context.seed + 1009 * (number + 1))

    with Trial.of(analysis) as trial:
        shapes = _shapes(analysis, trial, make, _BATCH)
        chosen = ""
        patterns = [s for s in specs if is_pattern(s) and s.dtype.kind not in "iu"]
        if patterns:
            chosen = _choose(context, analysis, trial, make, {s.name for s in patterns})
    spread = RANGES.get(chosen, _PLAIN)
    one = make(spread, shapes, 0)
    calls = -(-_afford(one, _NUMBERS, _LEAST, _SAMPLES) // count(one))
    return Imagined([one, *(make(spread, shapes, n) for n in range(1, calls))], chosen)


def _afford(feed: Feed, numbers: int, least: int, most: int) -> int:
    """How many samples like those of ``feed`` have that many numbers altogether, within limits."""
    size = sum(value.size for value in feed.values()) / count(feed)
    return int(np.clip(numbers / max(size, 1.0), least, most))


def _shapes(analysis: Analysis, trial: Trial, make: Make, batch: int) -> Shapes:
    """Shapes of one call with that many samples, where the model leaves their number open; else the probe's."""
    probes = analysis.facts.probes
    shapes = {name: tuple(shape) for name, shape in probes[0].inputs.items()}
    leads = [tuple(p.inputs[name][0] for p in probes) for name, shape in shapes.items() if len(shape) > 1]
    if len(probes) < 2 or not leads or len(set(leads[0])) < 2:
        return shapes
    # Wherever sizes change from one probe to the other as the first axis does, there are samples.
    wanted = {
        name: tuple(
            batch if tuple(p.inputs[name][axis] for p in probes) == leads[0] else size
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }
    try:
        run(open_session(trial.original, spin=False), make(_PLAIN, wanted, 0))
    except ModelError:  # sizes that are tied to the number of samples in a way nobody said
        return shapes
    return wanted


def _choose(context: Context, analysis: Analysis, trial: Trial, make: Make, patterns: set[str]) -> str:
    """The range in which the original makes most of the inputs; empty where it runs on none."""
    gauge = Gauge.of(analysis)
    if not gauge.names:
        return ""
    shapes = _shapes(analysis, trial, make, gauge.at_once(_LOOKS))
    one = make(_PLAIN, shapes, 0)
    calls = -(-_afford(one, _SEEN, _FEWEST, _LOOKS) // count(one))
    drawn = [one, *(make(_PLAIN, shapes, n) for n in range(1, calls))]
    found: dict[str, float] = {}
    path, _ = trial.write(with_outputs(analysis.graph.proto, gauge.names), analysis.graph.weights, "looked_at")
    session = open_session(path, spin=False)
    for number, (name, spread) in enumerate(RANGES.items()):
        context.tell("inputs", number / len(RANGES))
        feeds = ({n: _spread(v, spread) if n in patterns else v for n, v in feed.items()} for feed in drawn)
        try:
            found[name] = gauge.read((run(session, feed) for feed in feeds), calls)
        except ModelError:
            continue
    return max(found, key=lambda name: found[name], default="")


def _spread(value: Array, spread: Spread) -> Array:
    """A plain pattern in another range, of its own type."""
    return np.asarray(spread(value.astype(np.float64))).astype(value.dtype)
