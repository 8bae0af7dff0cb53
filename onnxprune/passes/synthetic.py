"""Synthetic calibration: inputs drawn in the range in which the original makes most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import ModelError
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.graph.view import Graph, Node
from onnxprune.operators.contractions import Form, Scale
from onnxprune.passes.recalibrated import normalisations
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import Context
from onnxprune.recovery.plausibility import measure_divergence, measure_response
from onnxprune.recovery.targets import RecoveryTarget, find_targets, outputs
from onnxprune.runtime.capture import count, with_outputs
from onnxprune.runtime.inputs import RANGES, Spread, is_pattern, make_plausible_inputs
from onnxprune.runtime.sessions import Feed, open_session, run

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
Make = Callable[[Spread, Shapes, int], Feed]

# Samples to repair from, fewer where they are large: so many numbers altogether, but no fewer samples than the least.
_SAMPLES, _LEAST, _NUMBERS = 512, 64, 1 << 25
_PLAIN = RANGES["sd 1"]
# Samples of every range to look at, fewer where they are large, with at most so many numbers; and samples of a call.
_LOOKS, _FEWEST, _MAX_VALUES, _BATCH = 128, 32, 1 << 19, 32


class SyntheticCalibration(NamedTuple):
    """Synthetic inputs, and the name of their range (empty where no input has one to choose)."""

    feeds: list[Feed]
    range_name: str


def draw_calibration(context: Context, analysis: Analysis) -> SyntheticCalibration:
    """Draw seeded inputs for a recovery without data.

    The range of a model's inputs is unknown. Several ranges are tried on the original: selected is the one with which
    the inputs of its BatchNormalizations are nearest to the stored means and variances, and without BatchNormalization
    the most plausible one, see :func:`onnxprune.recovery.plausibility.measure_response`.

    Raises:
        ModelError: the original does not run on any.
    """
    specs = input_specs(analysis.graph)
    bounds = integer_bounds(analysis.graph, analysis.facts)

    def make(spread: Spread, shapes: Shapes, number: int) -> Feed:
        return make_plausible_inputs(specs, shapes, spread, bounds=bounds, seed=context.seed + 1009 * (number + 1))

    with Workspace.of(analysis) as trial:
        shapes = _shapes(analysis, trial, make, _BATCH)
        range_name = ""
        patterns = [s for s in specs if is_pattern(s) and s.dtype.kind not in "iu"]
        if patterns:
            range_name = _choose(context, analysis, trial, make, {s.name for s in patterns})
    spread = RANGES.get(range_name, _PLAIN)
    one = make(spread, shapes, 0)
    calls = -(-_num_samples(one, _NUMBERS, _LEAST, _SAMPLES) // count(one))
    return SyntheticCalibration([one, *(make(spread, shapes, n) for n in range(1, calls))], range_name)


def _num_samples(feed: Feed, numbers: int, min_samples: int, max_samples: int) -> int:
    """Return the number of samples like those of ``feed`` that have so many numbers in total, within limits."""
    size = sum(value.size for value in feed.values()) / count(feed)
    return int(np.clip(numbers / max(size, 1.0), min_samples, max_samples))


def _shapes(analysis: Analysis, trial: Workspace, make: Make, batch: int) -> Shapes:
    """Return the shapes of one call with so many samples where the model leaves that open; else the probe's."""
    probes = analysis.facts.probes
    shapes = {name: tuple(shape) for name, shape in probes[0].inputs.items()}
    leads = [tuple(p.inputs[name][0] for p in probes) for name, shape in shapes.items() if len(shape) > 1]
    if len(probes) < 2 or not leads or len(set(leads[0])) < 2:
        return shapes
    # Wherever sizes change from one probe to the other as the first axis does, there are samples.
    batched = {
        name: tuple(
            batch if tuple(p.inputs[name][axis] for p in probes) == leads[0] else size
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }
    try:
        run(open_session(trial.original), make(_PLAIN, batched, 0))
    except ModelError:  # sizes that depend on the number of samples in an undeclared way
        return shapes
    return batched


def _choose(context: Context, analysis: Analysis, trial: Workspace, make: Make, patterns: set[str]) -> str:
    """Choose the input range with the most plausible features of the original; empty where it runs on none."""
    gauge = InputPlausibility.of(analysis)
    if not gauge.names:
        return ""
    shapes = _shapes(analysis, trial, make, gauge.samples_per_call(_LOOKS))
    one = make(_PLAIN, shapes, 0)
    calls = -(-_num_samples(one, _MAX_VALUES, _FEWEST, _LOOKS) // count(one))
    drawn = [one, *(make(_PLAIN, shapes, n) for n in range(1, calls))]
    scores: dict[str, float] = {}
    path, _ = trial.write(with_outputs(analysis.graph.proto, gauge.names), analysis.graph.weights, "looked_at")
    session = open_session(path)
    for number, (name, spread) in enumerate(RANGES.items()):
        context.tell("inputs", number / len(RANGES))
        feeds = ({n: _spread(v, spread) if n in patterns else v for n, v in feed.items()} for feed in drawn)
        try:
            scores[name] = gauge.score((run(session, feed) for feed in feeds), calls)
        except ModelError:
            continue
    return max(scores, key=lambda name: scores[name], default="")


def _spread(value: Array, spread: Spread) -> Array:
    """Map a plain pattern to another range, in its own type."""
    return np.asarray(spread(value.astype(np.float64))).astype(value.dtype)


# -- plausibility of inputs --------------------------------------------------------------------------------------------


# Rows of a layer to take of all calls, bytes of activations to look at in one call, and outputs below which a layer
# cannot tell much.
_ROWS, _HEAVY, _FEW = 4096, 256 << 20, 4


class InputPlausibility:
    """Measure of input plausibility from activations of the original.

    Attributes:
        names: the tensors to look at.
    """

    def __init__(self, analysis: Analysis, layers: Mapping[str, Form], norms: Mapping[str, Node]) -> None:
        self._analysis, self._layers, self._norms = analysis, layers, norms
        self.names = list(norms or layers)

    @classmethod
    def of(cls, analysis: Analysis) -> InputPlausibility:
        """Collect the tensors of a model from which plausibility is measured."""
        graph = analysis.graph
        norms = {node.inputs[0]: node for node in normalisations(graph)}
        activations = {o for node in graph.nodes for o in node.outputs if o} - graph.inner
        survivors = Survivors(analysis.table, np.zeros(analysis.units.component.size, dtype=bool))
        targets = [
            target
            for level in find_targets(graph, activations, survivors.shape, joint=False).levels
            for target in level
        ]
        layers = {target.node.outputs[0]: target.form for target in targets if _outputs(graph, target) >= _FEW}
        return cls(analysis, layers, norms)

    def samples_per_call(self, samples: int) -> int:
        """Return the number of samples per call."""
        shapes = [self._analysis.facts.shape(name) for name in self.names]
        size = 4 * sum(int(np.prod([n or 1 for n in shape[1:]])) for shape in shapes if shape)
        return int(np.clip(_HEAVY // max(size, 1), 1, samples))

    def score(self, calls: Iterator[Feed], number: int) -> float:
        """Return the plausibility of the inputs of these values, from so many calls: higher is better."""
        values: dict[str, list[Array]] = {name: [] for name in self.names}
        for call in calls:
            for name, value in call.items():
                values[name].append(self._rows(name, value, max(1, _ROWS // number)))
        scores = [self._score(name, np.concatenate(rows)) for name, rows in values.items()]
        return float(np.mean(scores)) if np.isfinite(scores).all() else -np.inf

    def _rows(self, name: str, value: Array, max_rows: int) -> Array:
        """Return some rows [rows, channels] of a tensor."""
        if name in self._norms:
            rows = np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])
        else:
            parts = self._layers[name].rows(value)
            rows = parts.transpose(1, 0, 2).reshape(parts.shape[1], -1)
        # A stride that is odd does not fall into step with positions.
        return rows[:: max(1, len(rows) // max_rows) | 1]

    def _score(self, name: str, rows: Array) -> float:
        if not np.isfinite(rows).all():
            return -np.inf
        if name not in self._norms:
            return measure_response(rows)
        weights = self._analysis.graph.weights
        mean, variance = (weights[n].read().astype(np.float64) for n in self._norms[name].inputs[3:5])
        wide = rows.astype(np.float64)
        return -measure_divergence(wide.mean(axis=0), wide.var(axis=0), mean, variance)


def _outputs(graph: Graph, target: RecoveryTarget) -> int:
    """Return the number of outputs of a layer; 0 for a scale per channel, whose outputs depend as its inputs do."""
    if isinstance(target.form, Scale):
        return 0
    return outputs(target.form, target.weight.shape(graph.weights))
