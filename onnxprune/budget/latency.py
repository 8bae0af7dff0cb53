"""Time of a model as a function of how many steps every group keeps, from times of its nodes at some counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.budget.costs import Costs
from onnxprune.budget.sizes import Counts, Sizes
from onnxprune.budget.surface import Surface, fit
from onnxprune.budget.table import LatencyTable, Sample
from onnxprune.graph.cost import known
from onnxprune.graph.view import Node
from onnxprune.model import markers
from onnxprune.operators.registry import rule_of

Array = NDArray[np.float64]
ShapeOf = Callable[[str], Any]


# A run takes no less than this share of what its nodes take under the profiler.
_LEAST = 0.2


class Places:
    """The nodes of a model by what their time depends on.

    Nodes of one kind (operator, attributes, sizes other than channels, what reads the result) share their samples: a
    network has few different layers, which makes few runs tell much.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        graph, shape = sizes.analysis.graph, sizes.analysis.facts.shape
        # What a control-flow node takes besides its bodies is told of one of its markers.
        timed = (n for n in graph.steps if n.domain != markers.DOMAIN or n.op == markers.OPEN)
        self.nodes = [n for n in timed if all(known(shape(o)) for o in n.outputs if o)]
        self.kinds = {n.label: self._kind(n) for n in self.nodes}
        self.moving = [n for n in self.nodes if any(sizes.touched(x) for x in (*n.inputs, *n.outputs))]

    def channels(self, node: Node, shape: ShapeOf) -> tuple[Any, Any]:
        """What of a node's data and of its result a cut changes: elements on axes that may shrink, and such alone."""
        rule = rule_of(node)
        data = node.inputs[rule.data] if rule.weights and node.inputs else ""
        data = data or next((n for n in node.inputs if self.sizes.touched(n)), "")
        return self._moving(data, shape), self._moving(next((o for o in node.outputs if o), ""), shape)

    def _moving(self, name: str, shape: ShapeOf) -> Any:
        axes = self.sizes.axes(name)
        found = shape(name) if axes else None
        return prod(found[a] for a in axes) if found is not None else 1

    def _kind(self, node: Node) -> str:
        def still(name: str) -> Any:
            shape, axes = self.sizes.analysis.facts.shape(name) if name else None, self.sizes.axes(name)
            return shape and ["*" if a in axes else n for a, n in enumerate(shape)]

        readers = sorted(c.op for o in node.outputs for c, _ in self.sizes.analysis.graph.consumers.get(o, ()))
        attributes = sorted((a.name, a.SerializeToString()) for a in node.proto.attribute if a.name != "group")
        return repr((node.op, node.domain, [still(n) for n in node.inputs], attributes, readers))


class Latency:
    """Seconds per run, one row; a sum of the nodes' times and what a run costs besides.

    Args:
        places: the nodes. table: what was measured.
    """

    def __init__(self, places: Places, table: LatencyTable) -> None:
        self.places, self.table = places, table
        self._surfaces = surfaces(places, table.samples)
        shape = places.sizes.analysis.facts.shape
        moving = {n.index for n in places.moving}
        fixed = [n for n in places.nodes if n.index not in moving]
        self._fixed = sum(float(self._time(n, shape, 1)[0]) for n in fixed)

    def rows(self, kept: Counts) -> Costs:
        """Seconds [cuts, 1] for counts [cuts, groups] of kept steps."""
        shape = self.places.sizes.at(kept)
        total = np.full(len(kept), float(self._fixed))
        for node in self.places.moving:
            total += self._time(node, shape, len(kept))
        whole = self.table.overhead + self.table.slope * total
        return np.asarray(np.maximum(whole, _LEAST * total))[:, None]

    def of(self, nodes: Iterable[Node], shape: ShapeOf, cuts: int) -> Array:
        """What some nodes add to the seconds of a run [cuts], for shapes of so many cuts."""
        return np.asarray(self.table.slope * sum(self._time(node, shape, cuts) for node in nodes))

    def of_nodes(self, kept: Counts) -> dict[str, float]:
        """Seconds of every node for counts [groups]."""
        shape = self.places.sizes.at(kept[None])
        return {n.label: float(self._time(n, shape, 1)[0]) for n in self.places.nodes}

    def _time(self, node: Node, shape: ShapeOf, cuts: int) -> Array:
        surface = self._surfaces.get(self.places.kinds.get(node.label, ""))
        if surface is None:
            return np.zeros(cuts)
        reads, makes = self.places.channels(node, shape)
        return surface.at(np.broadcast_to(reads, cuts), np.broadcast_to(makes, cuts))


def surfaces(places: Places, samples: Iterable[Sample]) -> dict[str, Surface]:
    """A surface over (channels read, channels made) for every kind of node that was measured."""
    by_kind: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.node in places.kinds:
            by_kind[places.kinds[sample.node]].append(sample)
    return {
        kind: fit(*(np.array([getattr(s, f) for s in found], dtype=np.float64) for f in ("reads", "makes", "seconds")))
        for kind, found in by_kind.items()
    }


def samples_of(places: Places, kept: Counts, seconds: Mapping[str, float]) -> list[Sample]:
    """What one run tells: a sample per node that has a time, for counts [groups] of kept steps."""
    shape = places.sizes.at(kept[None])
    found = []
    for node in places.nodes:
        if node.label in seconds:
            reads, makes = (int(np.broadcast_to(n, 1)[0]) for n in places.channels(node, shape))
            found.append(Sample(node.label, reads, makes, seconds[node.label]))
    return found
