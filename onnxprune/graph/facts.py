"""Facts of a model at the probe sizes: shapes, small values, and the range of every integer input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxprune.graph.inference import Infer
from onnxprune.graph.open_sizes import Conflict, Settled, Settler
from onnxprune.graph.probes import Key, OpenSizes, Pair, beyond
from onnxprune.graph.values import Probe, Values, is_small, operands_at, size_of
from onnxprune.graph.view import Graph, Node
from onnxprune.operators.registry import rule_of

__all__ = ["Facts", "Infer", "Probe", "Values", "is_small", "study"]


@dataclass(frozen=True, slots=True)
class Facts:
    """The probes of a model; labels are propagated at the first. Nothing that reads them may change them.

    Attributes:
        bound: sizes of the open dimensions at every probe.
        conflict: the node at which these sizes contradict each other, if any.
    """

    probes: tuple[Probe, ...]
    settler: Settler
    bound: tuple[dict[Key, int], ...]
    conflict: Conflict | None = None

    def elsewhere(self) -> Iterator[Probe]:
        """Yield probes at sizes that no other probe has, wherever the model leaves them open; likeliest first."""
        if len(self.bound) < 2:
            return
        for sizes in beyond(self.settler.dimensions, *self.bound):
            settled = _settle_another(self.settler, self, [sizes])
            if settled is not None:
                yield settled.probe

    def shape(self, name: str) -> Any:
        """Return the shape at the first probe: a tuple with None for data-dependent sizes, or None."""
        return self.probes[0].shapes.get(name)

    def elements(self, name: str) -> Any:
        """Return shapes of the tensors in a sequence at the first probe, None where their number is not known."""
        shapes = [probe.elements.get(name) for probe in self.probes]
        return shapes[0] if len({None if e is None else len(e) for e in shapes}) == 1 else None

    def value(self, name: str) -> np.ndarray | None:
        """Return the value at the first probe, where known."""
        return self.probes[0].values.get(name)

    def static_value(self, name: str) -> np.ndarray | None:
        """Return the value where it is known and the same at every probe."""
        value = self.value(name)
        if value is None:
            return None
        for probe in self.probes[1:]:
            other = probe.values.get(name)
            if other is None or (other is not value and not np.array_equal(value, other)):
                return None
        return value

    def entries(self, name: str) -> list[int | None] | None:
        """Return integers of a known operand, each None where it differs between the probes.

        None where it is not known.
        """
        values = [probe.values.get(name) for probe in self.probes]
        first = values[0]
        if first is None or any(v is None or v.shape != first.shape for v in values):
            return None
        columns = zip(*(v.ravel().tolist() for v in values if v is not None), strict=True)
        return [int(column[0]) if len(set(column)) == 1 else None for column in columns]

    def is_open(self, name: str) -> bool:
        """Return whether a tensor's shape differs between the probes."""
        first = self.probes[0].shapes.get(name)
        return any(probe.shapes.get(name) != first for probe in self.probes[1:])

    def same_size(self, name: str, axis: int, other: str, other_axis: int) -> bool:
        """Return whether two axes have the same size at every probe."""
        pairs = ((probe.shapes.get(name), probe.shapes.get(other)) for probe in self.probes)
        return all(a is not None and b is not None and a[axis] == b[other_axis] for a, b in pairs)

    def period(self, name: str, axis: int) -> int:
        """Return the largest number that divides the size of that axis at every probe; 0 where it is not known."""
        shapes = [probe.shapes.get(name) or () for probe in self.probes]
        if any(len(s) != len(shapes[0]) or s[axis] is None for s in shapes):
            return 0
        return math.gcd(*(int(s[axis]) for s in shapes))

    def varies(self, name: str, axis: int) -> bool:
        """Return whether the size of that axis differs between the probes, i.e. is dynamic."""
        if len(self.probes) == 1:
            return False
        first, second = self.probes[0].shapes.get(name), self.probes[1].shapes.get(name)
        return first is None or second is None or len(first) != len(second) or first[axis] != second[axis]


def study(graph: Graph, sizes: OpenSizes, infer: Infer | None = None) -> Facts:
    """Infer shapes and values at the likeliest sizes without contradictions in the graph (else at the very first).

    Args:
        graph: the model's view.
        sizes: sizes to try for the open dimensions.
        infer: callback that returns shapes of operators without an onnx schema.
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
    other = _settle_another(settler, facts, sizes.others(facts.bound[0], pair))
    if other is None:
        return facts
    return replace(facts, probes=(*facts.probes, other.probe), bound=(*facts.bound, other.sizes))


def _settle_another(settler: Settler, facts: Facts, candidates: Iterable[dict[Key, int]]) -> Settled | None:
    """Return the first of some sizes that has no contradiction and differs from the probes."""
    for sizes in candidates:
        settled = settler.settle(sizes, {}, facts.probes[0])
        if settled.sizes not in facts.bound and (settled.conflict is None or facts.conflict is not None):
            return settled
    return None


def integer_bounds(graph: Graph, facts: Facts) -> dict[str, tuple[int, int]]:
    """Return {input: (lowest, highest)} for graph inputs that reach the index of a table by moves and constant offsets.

    An input of one number that is only compared with a constant, such as a sampling rate, has that constant as its
    range.
    """
    result: dict[str, tuple[int, int]] = {}
    for name in graph.inputs:
        compared = _compared_number(graph, facts, name)
        if compared is not None:
            result[name] = compared, compared
            continue
        high = _max_index(graph, facts, name)
        if high is not None:
            result[name] = (0, max(high, 0))
    return result


def _compared_number(graph: Graph, facts: Facts, name: str) -> int | None:
    """Return the only number that a scalar is compared with."""
    shape, readers = facts.shape(name), graph.consumers.get(name, ())
    if shape is None or None in shape or size_of(shape) != 1:
        return None
    values = [facts.static_value(n.inputs[1 - i]) if n.op == "Equal" else None for n, i in readers]
    numbers = {int(v.ravel()[0]) for v in values if v is not None and v.size == 1 and v.dtype.kind in "iu"}
    return numbers.pop() if len(numbers) == 1 and None not in [v if v is None else 0 for v in values] else None


def _max_index(graph: Graph, facts: Facts, name: str) -> int | None:
    best: int | None = None
    queue, visited = [(name, 0)], {name}
    while queue:
        tensor, offset = queue.pop()
        for node, i in graph.consumers.get(tensor, ()):
            limit = _limit(node, i, facts)
            if limit is not None:
                best = limit - offset if best is None else min(best, limit - offset)
            step = _offset(node, i, facts)
            if step is None:
                continue
            for out in node.outputs:
                if out and out not in visited:
                    visited.add(out)
                    queue.append((out, offset + step))
    return best


def _limit(node: Node, i: int, facts: Facts) -> int | None:
    """Return the largest index that input ``i`` may hold; a table of an open length is as long as the shortest."""
    limits = (rule_of(node).index_limit(node, i, *operands_at(node, probe)) for probe in facts.probes)
    return min((limit - 1 for limit in limits if limit is not None), default=None)


def _offset(node: Node, i: int, facts: Facts) -> int | None:
    """Return the most that results exceed the integers of input ``i`` by; None where that is not known."""
    shifts = (rule_of(node).index_shift(node, i, operands_at(node, probe)[1]) for probe in facts.probes)
    return max((shift for shift in shifts if shift is not None), default=None)
