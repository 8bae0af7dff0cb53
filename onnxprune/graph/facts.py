"""What is known before a cut: the shape of every tensor and the value of every small one, at the probe sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxprune.graph.binding import Key
from onnxprune.graph.infer import Infer
from onnxprune.graph.probes import OpenSizes, Pair, beyond
from onnxprune.graph.settle import Conflict, Settled, Settler
from onnxprune.graph.values import Probe, Values, small
from onnxprune.graph.view import Graph

__all__ = ["Facts", "Infer", "Probe", "Values", "small", "study"]


@dataclass(slots=True)
class Facts:
    """The probes of a model; the first is the one that labels are pushed through.

    Attributes:
        bound: sizes of the open dimensions at every probe. conflict: where the model contradicts them, if it does.
        refused: numbers of the probes at whose sizes the model turned out not to run, though it declares them open.
    """

    probes: tuple[Probe, ...]
    settler: Settler
    bound: tuple[dict[Key, int], ...]
    conflict: Conflict | None = None
    refused: set[int] = field(default_factory=set)

    @property
    def running(self) -> list[Probe]:
        """The probes at whose sizes the model runs, as far as anybody tried."""
        return [probe for number, probe in enumerate(self.probes) if number not in self.refused]

    def elsewhere(self) -> Iterator[Probe]:
        """Probes at sizes that no other probe has, wherever the model leaves them open; likeliest first."""
        if len(self.bound) < 2:
            return
        for wish in beyond(self.settler.dimensions, *self.bound):
            found = _another(self.settler, self, [wish])
            if found is not None:
                yield found.probe

    def shape(self, name: str) -> Any:
        """Shape at the first probe: a tuple with None for data-dependent sizes, or None."""
        return self.probes[0].shapes.get(name)

    def elements(self, name: str) -> Any:
        """Shapes of the tensors in a sequence at the first probe, None where it is not known how many they are."""
        found = [probe.elements.get(name) for probe in self.probes]
        return found[0] if len({None if e is None else len(e) for e in found}) == 1 else None

    def value(self, name: str) -> np.ndarray | None:
        """Value at the first probe, where known."""
        return self.probes[0].values.get(name)

    def static_value(self, name: str) -> np.ndarray | None:
        """Value where it is known and the same at every probe."""
        value = self.value(name)
        if value is None:
            return None
        for probe in self.probes[1:]:
            other = probe.values.get(name)
            if other is None or (other is not value and not np.array_equal(value, other)):
                return None
        return value

    def entries(self, name: str) -> list[int | None] | None:
        """Integers of a known operand, each None where it differs between the probes; None where it is not known."""
        values = [probe.values.get(name) for probe in self.probes]
        first = values[0]
        if first is None or any(v is None or v.shape != first.shape for v in values):
            return None
        columns = zip(*(v.ravel().tolist() for v in values if v is not None), strict=True)
        return [int(column[0]) if len(set(column)) == 1 else None for column in columns]

    def is_open(self, name: str) -> bool:
        """Whether a tensor's shape differs between the probes."""
        first = self.probes[0].shapes.get(name)
        return any(probe.shapes.get(name) != first for probe in self.probes[1:])

    def same_size(self, name: str, axis: int, other: str, other_axis: int) -> bool:
        """Whether two axes have the same size at every probe."""
        pairs = ((probe.shapes.get(name), probe.shapes.get(other)) for probe in self.probes)
        return all(a is not None and b is not None and a[axis] == b[other_axis] for a, b in pairs)

    def period(self, name: str, axis: int) -> int:
        """The largest number that divides the size of that axis at every probe; 0 where it is not known."""
        shapes = [probe.shapes.get(name) or () for probe in self.probes]
        if any(len(s) != len(shapes[0]) or s[axis] is None for s in shapes):
            return 0
        return math.gcd(*(int(s[axis]) for s in shapes))

    def varies(self, name: str, axis: int) -> bool:
        """Whether the size of that axis differs between the probes, i.e. is dynamic."""
        if len(self.probes) == 1:
            return False
        first, second = self.probes[0].shapes.get(name), self.probes[1].shapes.get(name)
        return first is None or second is None or len(first) != len(second) or first[axis] != second[axis]


def study(graph: Graph, sizes: OpenSizes, infer: Infer | None = None) -> Facts:
    """Shapes and values at the likeliest sizes that make sense for the graph (else at the very first).

    Args:
        sizes: of the open dimensions. infer: asked where onnx has no schema.
    """
    settler = Settler(graph, sizes.dimensions, infer)
    best: tuple[Facts, Pair] | None = None
    for pair in sizes.pairs():
        first = settler.settle(sizes.first(pair), sizes.dimensions.fixed)
        if first.conflict is None or best is None:
            best = Facts((first.probe,), settler, (first.sizes,), first.conflict), pair
        if first.conflict is None:
            break
    assert best is not None
    facts, pair = best
    other = _another(settler, facts, sizes.others(facts.bound[0], pair))
    if other is None:
        return facts
    return replace(facts, probes=(*facts.probes, other.probe), bound=(*facts.bound, other.sizes))


def _another(settler: Settler, facts: Facts, wishes: Iterable[dict[Key, int]]) -> Settled | None:
    """The first of some sizes that make sense and are not those of a probe."""
    for wish in wishes:
        found = settler.settle(wish, {}, facts.probes[0])
        if found.sizes not in facts.bound and (found.conflict is None or facts.conflict is not None):
            return found
    return None
