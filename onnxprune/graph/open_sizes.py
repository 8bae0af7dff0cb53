"""Solve open dimensions from weights and from each other.

Sizes are guessed first. Where two sizes then contradict each other at a node (the channels of an image and those of a
kernel, a mask and the keys that it hides), the open dimension that one of them depends on is changed until they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune.graph.inference import Infer, probe_at, probe_of
from onnxprune.graph.probes import Dimensions, Key, Sizes
from onnxprune.graph.values import Probe, operands_at
from onnxprune.graph.view import Graph, Node
from onnxprune.operators.registry import rule_of

Shapes = Sequence[Any]
Known = Callable[[int], "np.ndarray | None"]


def pairs(node: Node, shapes: Shapes, known: Known) -> list[tuple[int, int]]:
    """Return pairs of sizes that have to be equal at a node, in a fixed order; empty without constraints or facts.

    Args:
        node: a node.
        shapes: shapes of its inputs, None where absent or unknown.
        known: values of its inputs, by position.
    """
    try:
        sizes = rule_of(node).agreements(node, shapes, known)
        return [(0, 0) if None in pair else pair for pair in sizes]
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):  # unknown sizes or forms
        return []


_ROUNDS = 24  # limit on the sizes that are solved for, one after the other
_LARGEST = 1 << 15  # largest size tried for an open dimension, unless a user gives one
_Residual = Callable[[int], "int | None"]
_Find = Callable[[_Residual, int, int], "int | None"]
"""(difference of two sizes as a function of an unknown, the unknown now, the difference now) -> root."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A node that cannot run at some sizes: ``have`` contradicts ``want``; both 0 where the reason is no pair."""

    node: Node
    place: int = -1
    have: int = 0
    want: int = 0

    def __str__(self) -> str:
        """Return the conflict as a readable sentence."""
        where = f"{self.node.kind} {self.node.label!r}"
        return (
            f"At {where} the sizes {self.have} and {self.want} must agree."
            if self.place >= 0
            else f"Sizes do not fit at {where}."
        )


@dataclass(slots=True)
class Settled:
    """Sizes of open dimensions, the probe inferred from them, and the first remaining contradiction."""

    sizes: dict[Key, int]
    probe: Probe
    conflict: Conflict | None = None


@dataclass(slots=True)
class Settler:
    """Find sizes at which a graph runs.

    Args:
        graph: the model's view.
        dimensions: open dimensions of its inputs.
        infer: callback that returns shapes of operators without an onnx schema.
    """

    graph: Graph
    dimensions: Dimensions
    infer: Infer | None = None
    _ancestors: dict[int, list[Node]] = field(default_factory=dict)

    def settle(self, sizes: Sizes, fixed: Sizes, first: Probe | None = None) -> Settled:
        """Find sizes near the given ones without contradictions, if there are any.

        Args:
            sizes: size of every open dimension.
            fixed: sizes that must not change.
            first: another binding's probe, to save work.
        """
        sizes = self.dimensions.completed(sizes, fixed)
        tried_sizes, solved = set(), set[Key]()
        for _ in range(_ROUNDS):
            probe = probe_at(self.graph, self.dimensions.shapes(sizes), self.infer, first)
            conflict = self._conflict(probe)
            new_sizes = None if conflict is None else self._resolved(conflict, sizes, fixed, solved, probe)
            if new_sizes is None or tuple(new_sizes.values()) in tried_sizes:
                break
            tried_sizes.add(tuple(new_sizes.values()))
            sizes = new_sizes
        return Settled(dict(sizes), probe, conflict)

    def _conflict(self, probe: Probe) -> Conflict | None:
        """Return the first node at which sizes contradict each other."""
        shapes = probe.shapes
        for node in self.graph.steps:
            if node.index in probe.idle:
                continue
            for place, (have, want) in enumerate(self._pairs(node, probe) if self._runs(node, probe) else ()):
                if have != want:
                    return Conflict(node, place, have, want)
            shape = shapes.get(node.outputs[0]) if node.outputs else None
            if shape is None or None in shape:
                continue
            if min(shape, default=0) < 0 or not _fits(node, probe, shape):
                return Conflict(node)
        return None

    def _runs(self, node: Node, probe: Probe) -> bool:
        """Return whether a node certainly runs: sizes in a branch that may not run need not fit."""
        if not self.graph.has_bodies:
            return True
        return all(probe.values.get(name) is not None for name, _ in self.graph.conditions(node.index))

    @staticmethod
    def _pairs(node: Node, probe: Probe) -> Sequence[tuple[int, int]]:
        return pairs(node, *operands_at(node, probe))

    def _resolved(
        self, conflict: Conflict, sizes: Sizes, fixed: Sizes, solved: set[Key], probe: Probe
    ) -> dict[Key, int] | None:
        """Return sizes without that contradiction."""
        if conflict.place < 0:
            return None
        difference = conflict.have - conflict.want
        for keys, find in self._unknowns(sizes, fixed, solved):

            def residual(size: int, keys: Sequence[Key] = keys) -> int | None:
                new_sizes = self.dimensions.completed({**sizes, **dict.fromkeys(keys, size)}, fixed)
                return self._residual(conflict, new_sizes, probe)

            new_size = find(residual, sizes[keys[0]], difference)
            if new_size is not None:
                solved.update(keys)
                return self.dimensions.completed({**sizes, **dict.fromkeys(keys, new_size)}, fixed)
        return None

    def _unknowns(self, sizes: Sizes, fixed: Sizes, solved: set[Key]) -> Iterator[tuple[list[Key], _Find]]:
        """Yield dimensions that may be changed, each with a method to find its size.

        The order is: a dimension that is itself one of the two sizes (those in the fewest inputs first), extents of a
        map together, any dimension that the contradiction depends on.
        """
        dimensions = self.dimensions
        free = [k for k in dimensions.places if k not in fixed and not dimensions.is_sum(k, sizes)]
        order = {key: (key in solved, len(dimensions.places[key]), -k) for k, key in enumerate(free)}
        single = sorted(free, key=order.__getitem__)
        yield from (([key], _solve_directly) for key in single)
        for keys in dimensions.extents():
            extents = [key for key in keys if key in free and key not in solved]
            if len(extents) > 1:
                yield extents, _find_root
        yield from (([key], _find_root) for key in single)

    def _residual(self, conflict: Conflict, sizes: Sizes, base: Probe) -> int | None:
        """Return the difference of the two contradicting sizes at other sizes of the inputs; None where unknown."""
        bound, node = self.dimensions.shapes(sizes), conflict.node
        probe = None
        if not self.graph.has_bodies:
            probe = probe_of(self.graph, self._before(node), bound, base, self.infer)
        size_pairs = [] if probe is None else self._pairs(node, probe)
        if not size_pairs:
            size_pairs = self._pairs(node, probe_at(self.graph, bound, self.infer))
        if len(size_pairs) <= conflict.place:
            return None
        have, want = size_pairs[conflict.place]
        return None if have is None or want is None else have - want

    def _before(self, node: Node) -> list[Node]:
        """Return the nodes that a node depends on, in graph order."""
        known = self._ancestors.get(node.index)
        if known is None:
            nodes: dict[int, Node] = {}
            queue = [node]
            while queue:
                for name in queue.pop().inputs:
                    maker = self.graph.producer.get(name)
                    if maker is not None and name not in self.graph.weights and maker.index not in nodes:
                        nodes[maker.index] = maker
                        queue.append(maker)
            known = self._ancestors[node.index] = [nodes[k] for k in sorted(nodes)]
        return known


def _solve_directly(residual: _Residual, current_size: int, difference: int) -> int | None:
    """Return the required size, where the unknown is itself one of the two sizes that have to agree."""
    next_difference = residual(current_size + 1)
    if next_difference is None or abs(next_difference - difference) != 1:
        return None
    size = current_size - difference * (next_difference - difference)
    return size if 1 <= size <= _LARGEST and residual(size) == 0 else None


def _find_root(residual: _Residual, current_size: int, difference: int) -> int | None:
    """Return the smallest size near which a residual vanishes, None where it does not depend on the size or never does.

    Residuals are mostly linear (two numbers of channels) or rise with steps (positions of a map of patches).
    """
    other = 2 * current_size
    other_difference = residual(other)
    if other_difference is None or other_difference == difference:
        return None
    estimate = current_size - difference * (other - current_size) / (other_difference - difference)
    for size in (int(estimate), int(estimate) + 1):
        if 1 <= size <= _LARGEST and residual(size) == 0:
            return size
    increasing = other_difference > difference
    low, high = (0, current_size) if (difference > 0) == increasing else (current_size, other)
    while high < _LARGEST and low == current_size and _is_too_small(residual(high), increasing):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if _is_too_small(residual(middle), increasing):
            low = middle
        else:
            high = middle
    return high if 1 <= high <= _LARGEST and residual(high) == 0 else None


def _is_too_small(value: int | None, increasing: bool) -> bool:
    """Return whether a size is too small for a residual to vanish, or too small to run at all."""
    return value is None or (value < 0 if increasing else value > 0)


def _fits(node: Node, probe: Probe, out: Sequence[int]) -> bool:
    """Return whether a node runs at a probe, as far as its rule says."""
    shapes, read = operands_at(node, probe)
    return rule_of(node).fits(node, shapes, out, read)
