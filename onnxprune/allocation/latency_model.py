"""Latency model: time of a model as a function of the counts that each group keeps, from a table of measured times."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Costs, Counts, Sizes
from onnxprune.errors import UsageError
from onnxprune.graph.cost import known
from onnxprune.graph.view import Node
from onnxprune.io import files, markers
from onnxprune.operators.registry import rule_of

Array = NDArray[np.float64]

# Shorter times are below the clock's resolution.
_LEAST = 2e-7
# Weight of the straight line in the logarithm against the offsets of single levels, in samples.
_RIDGE = 0.3


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """log t = line + own_reads[level] + own_makes[level] + rest[pair].

    Attributes:
        reads, makes: levels, ascending.
        own_reads, own_makes: offset of each level from the line.
        offsets: [reads, makes], residuals of the measured pairs, 0 elsewhere.
        line: constant and slopes over the logarithms.
    """

    reads: Array
    makes: Array
    own_reads: Array
    own_makes: Array
    offsets: Array
    line: Array

    def at(self, reads: NDArray[np.int64], makes: NDArray[np.int64]) -> Array:
        """Return seconds [points]; logarithms are interpolated linearly between levels."""
        x, y = np.log(np.maximum(reads, 1)), np.log(np.maximum(makes, 1))
        value = self.line[0] + self.line[1] * x + self.line[2] * y
        value = value + np.interp(x, self.reads, self.own_reads) + np.interp(y, self.makes, self.own_makes)
        i, j = _level(self.reads, x), _level(self.makes, y)
        measured = (i >= 0) & (j >= 0)
        return np.asarray(np.exp(value + np.where(measured, self.offsets[i, j], 0.0)))


def fit_model(reads: Array, makes: Array, seconds: Array) -> LatencyModel:
    """Fit a surface to samples [samples]: ridge regression of the logarithm on the two levels and a line.

    Kernels that process channels in blocks have steps, which the offsets of levels model. Measured pairs keep the mean
    of the residuals.
    """
    x, y, t = np.log(np.maximum(reads, 1)), np.log(np.maximum(makes, 1)), np.log(np.maximum(seconds, _LEAST))
    levels_x, i = np.unique(x, return_inverse=True)
    levels_y, j = np.unique(y, return_inverse=True)
    ones = np.ones((x.size, 1))
    levels = [np.eye(levels_x.size)[i], np.eye(levels_y.size)[j]]
    design = np.hstack([ones, x[:, None], y[:, None], *levels])
    penalty = np.concatenate([[1e-9, 1e-3, 1e-3], np.full(levels_x.size + levels_y.size, _RIDGE)])
    weights = np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ t)
    residual = t - design @ weights
    total = np.zeros((levels_x.size, levels_y.size))
    count = np.zeros_like(total)
    np.add.at(total, (i, j), residual)
    np.add.at(count, (i, j), 1.0)
    offsets = total / (count + 0.5)
    cut = 3 + levels_x.size
    return LatencyModel(levels_x, levels_y, weights[3:cut], weights[cut:], offsets, weights[:3])


def _level(levels: Array, values: Array) -> NDArray[np.int64]:
    """Return the number of the level that each value is, -1 for none."""
    place = np.minimum(np.searchsorted(levels, values - 1e-12), levels.size - 1)
    return np.asarray(np.where(np.abs(levels[place] - values) < 1e-9, place, -1))


VERSION = 3


class Sample(NamedTuple):
    """Seconds of one run of a node, with the numbers of channels that it read and wrote."""

    node: str
    reads: int
    makes: int
    seconds: float


@dataclass(slots=True, repr=False)
class LatencyTable:
    """Measurements of one model on one device.

    Attributes:
        model_sha256: digest of the model.
        device: description of the device.
        inputs: shapes of the inputs.
        seconds: time of one run of the whole original.
        overhead, slope: a run takes overhead + slope * (sum of its nodes' times).
        error: largest relative error of the model at the counts where whole runs were measured.
        checks: (predicted, measured) seconds at those counts.
    """

    model_sha256: str
    device: dict[str, Any]
    inputs: dict[str, list[int]]
    seconds: float
    overhead: float = 0.0
    slope: float = 1.0
    samples: list[Sample] = field(default_factory=list)
    checks: list[tuple[float, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<LatencyTable: {len(self.samples)} nodes, {1000 * self.seconds:.3g} ms for the whole original>"

    @property
    def error(self) -> float:
        """Return the largest difference between predicted and measured, as a share of the measured."""
        return max((abs(p - m) / m for p, m in self.checks), default=0.0)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, one node per line.

        Raises:
            UsageError: the file cannot be written.
        """
        data = asdict(self) | {"samples": None}
        nodes: dict[str, list[list[float]]] = {}
        for node, reads, makes, seconds in self.samples:
            nodes.setdefault(node, []).append([reads, makes, float(f"{seconds:.4g}")])
        head = json.dumps({"version": VERSION, **{k: v for k, v in data.items() if v is not None}})
        body = ",\n ".join(f"{json.dumps(node)}: {json.dumps(values)}" for node, values in nodes.items())
        files.write_text(Path(path), f'{head[:-1]},\n"nodes": {{{body}}}}}\n', "the latency table")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table from JSON.

        Raises:
            UsageError: missing, not JSON, or not a table of this version.
        """
        hint = "Write one with 'onnxprune profile MODEL -o FILE'."
        data = files.read_json(Path(path), "the latency table", "latency table", missing=hint, hint=hint)
        if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), Mapping):
            raise UsageError(f"{str(path)!r} is not a latency table: 'nodes' is missing.", hint=hint)
        if data.get("version") != VERSION:
            raise UsageError(f"Version {data.get('version')!r} of a latency table is not supported.", hint=hint)
        nodes = files.parse(dict[str, list[tuple[int, int, float]]], data["nodes"], f"'nodes' of {str(path)!r}", hint)
        table = files.parse(cls, {**data, "samples": []}, repr(str(path)), hint)
        table.samples = [Sample(node, *sample) for node, samples in nodes.items() for sample in samples]
        times = [table.seconds, table.slope, *(measured for _, measured in table.checks)]
        if min(times) <= 0 or any(min(sample[1:]) < 0 for sample in table.samples):
            raise UsageError(f"{str(path)!r} is a damaged latency table: times must be more than 0.", hint=hint)
        return table

    def check_model(self, sha256: str, source: str) -> None:
        """Check that the table is of the model with this digest.

        Raises:
            UsageError: it is another model's.
        """
        files.check_model(
            f"The latency table {source} belongs to another model",
            self.model_sha256,
            sha256,
            hint="Run 'onnxprune profile' on this model on the other device.",
        )


ShapeOf = Callable[[str], Any]


# The least time of a run, as a share of the sum of its nodes under the profiler.
_MIN_SECONDS = 0.2


class NodeKinds:
    """The nodes of a model, grouped by the properties that their time depends on.

    Nodes of one kind (operator, attributes, sizes other than channels, consumers of the result) share their samples: a
    network has few distinct layers, so that few runs suffice.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        graph, shape = sizes.analysis.graph, sizes.analysis.facts.shape
        # The time of a control-flow node besides its bodies belongs to one of its markers.
        nodes = (n for n in graph.steps if n.domain != markers.DOMAIN or n.op == markers.OPEN)
        self.nodes = [n for n in nodes if all(known(shape(o)) for o in n.outputs if o)]
        self.kinds = {n.label: self._kind(n) for n in self.nodes}
        self.moving = [n for n in self.nodes if any(sizes.touched(x) for x in (*n.inputs, *n.outputs))]

    def channels(self, node: Node, shape: ShapeOf) -> tuple[Any, Any]:
        """Return elements on the axes of a node's data and of its result that pruning may shrink."""
        rule = rule_of(node)
        data = node.inputs[rule.data] if rule.weights and node.inputs else ""
        data = data or next((n for n in node.inputs if self.sizes.touched(n)), "")
        return self._moving(data, shape), self._moving(next((o for o in node.outputs if o), ""), shape)

    def _moving(self, name: str, shape: ShapeOf) -> Any:
        axes = self.sizes.axes(name)
        dims = shape(name) if axes else None
        return prod(dims[a] for a in axes) if dims is not None else 1

    def _kind(self, node: Node) -> str:
        def still(name: str) -> Any:
            shape, axes = self.sizes.analysis.facts.shape(name) if name else None, self.sizes.axes(name)
            return shape and ["*" if a in axes else n for a, n in enumerate(shape)]

        readers = sorted(c.op for o in node.outputs for c, _ in self.sizes.analysis.graph.consumers.get(o, ()))
        attributes = sorted((a.name, a.SerializeToString()) for a in node.proto.attribute if a.name != "group")
        return repr((node.op, node.domain, [still(n) for n in node.inputs], attributes, readers))


class Latency:
    """Seconds per run, one row; the sum of the nodes' times and the overhead of a run.

    Args:
        places: the nodes.
        table: the measurements.
        factor: on all times, where the models to predict are faster than those that were measured.
    """

    def __init__(self, places: NodeKinds, table: LatencyTable, factor: float = 1.0) -> None:
        self.places, self.table, self.factor = places, table, factor
        self._surfaces = fit_models(places, table.samples)
        shape = places.sizes.analysis.facts.shape
        moving = {n.index for n in places.moving}
        unchanged = [n for n in places.nodes if n.index not in moving]
        self._fixed = sum(float(self._time(n, shape, 1)[0]) for n in unchanged)

    def rows(self, counts: Counts) -> Costs:
        """Return seconds [cuts, 1] for counts [cuts, groups] of kept steps."""
        shape = self.places.sizes.at(counts)
        total = np.full(len(counts), float(self._fixed))
        for node in self.places.moving:
            total += self._time(node, shape, len(counts))
        seconds = self.table.overhead + self.table.slope * total
        return self.factor * np.asarray(np.maximum(seconds, _MIN_SECONDS * total))[:, None]

    def of(self, nodes: Iterable[Node], shape: ShapeOf, cuts: int) -> Array:
        """Return the time [cuts] in seconds that some nodes add to a run, for shapes of so many pruned models."""
        slope = self.factor * self.table.slope
        return np.asarray(slope * sum(self._time(node, shape, cuts) for node in nodes))

    def of_nodes(self, counts: Counts) -> dict[str, float]:
        """Return seconds of every node for counts [groups]."""
        shape = self.places.sizes.at(counts[None])
        return {n.label: float(self._time(n, shape, 1)[0]) for n in self.places.nodes}

    def _time(self, node: Node, shape: ShapeOf, cuts: int) -> Array:
        surface = self._surfaces.get(self.places.kinds.get(node.label, ""))
        if surface is None:
            return np.zeros(cuts)
        reads, makes = self.places.channels(node, shape)
        return surface.at(np.broadcast_to(reads, cuts), np.broadcast_to(makes, cuts))


def fit_models(places: NodeKinds, samples: Iterable[Sample]) -> dict[str, LatencyModel]:
    """Fit a surface over (channels read, channels written) for every kind of node that was measured."""
    by_kind: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.node in places.kinds:
            by_kind[places.kinds[sample.node]].append(sample)
    return {
        kind: fit_model(
            *(np.array([getattr(s, f) for s in kind_samples], dtype=np.float64) for f in ("reads", "makes", "seconds"))
        )
        for kind, kind_samples in by_kind.items()
    }


def samples_of(places: NodeKinds, counts: Counts, seconds: Mapping[str, float]) -> list[Sample]:
    """Return one sample per timed node of a run, for counts [groups] of kept steps."""
    shape = places.sizes.at(counts[None])
    samples = []
    for node in places.nodes:
        if node.label in seconds:
            reads, makes = (int(np.broadcast_to(n, 1)[0]) for n in places.channels(node, shape))
            samples.append(Sample(node.label, reads, makes, seconds[node.label]))
    return samples
