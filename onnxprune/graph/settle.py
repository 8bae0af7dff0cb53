"""Sizes for open dimensions that a model runs at: what its weights and its other sizes determine is solved for.

A size is guessed first. Where two sizes then contradict each other at a node (the channels of an image and those of a
kernel, a mask and the keys that it hides), the open dimension that one of them follows is changed until they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from onnxprune.graph.agreement import pairs
from onnxprune.graph.binding import Dimensions, Key, Sizes
from onnxprune.graph.infer import Infer, probe_at, probe_of
from onnxprune.graph.values import Probe, size_of
from onnxprune.graph.view import Graph, Node

_ROUNDS = 24  # sizes that are solved for, one after the other
_LARGEST = 1 << 15  # no open dimension is taken to be larger than this, unless a user says so
_Residual = Callable[[int], "int | None"]
_Find = Callable[[_Residual, int, int], "int | None"]
"""(what is between two sizes as a function of an unknown, the unknown now, what is between them now) -> its root."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A node that cannot run at some sizes: ``have`` contradicts ``want`` there; both 0 where it is no such pair."""

    node: Node
    place: int = -1
    have: int = 0
    want: int = 0

    def __str__(self) -> str:
        """A sentence for people."""
        where = f"{self.node.kind} {self.node.label!r}"
        return (
            f"At {where} a size of {self.have} meets one of {self.want}."
            if self.place >= 0
            else f"Sizes do not fit at {where}."
        )


@dataclass(slots=True)
class Settled:
    """Sizes of open dimensions, what follows from them, and the first contradiction that is left."""

    sizes: dict[Key, int]
    probe: Probe
    conflict: Conflict | None = None


@dataclass(slots=True)
class Settler:
    """Finds sizes that a graph runs at.

    Args:
        graph: the model. dimensions: of its inputs. infer: asked where onnx has no schema.
    """

    graph: Graph
    dimensions: Dimensions
    infer: Infer | None = None
    _ancestors: dict[int, list[Node]] = field(default_factory=dict)

    def settle(self, sizes: Sizes, fixed: Sizes, first: Probe | None = None) -> Settled:
        """Sizes near the given ones without contradictions, if there are any.

        Args:
            sizes: of every open dimension. fixed: those that stay. first: another binding's probe, to save work.
        """
        sizes = self.dimensions.completed(sizes, fixed)
        tried, solved = set(), set[Key]()
        for _ in range(_ROUNDS):
            probe = probe_at(self.graph, self.dimensions.shapes(sizes), self.infer, first)
            conflict = self._conflict(probe)
            better = None if conflict is None else self._resolved(conflict, sizes, fixed, solved, probe)
            if better is None or tuple(better.values()) in tried:
                break
            tried.add(tuple(better.values()))
            sizes = better
        return Settled(dict(sizes), probe, conflict)

    def _conflict(self, probe: Probe) -> Conflict | None:
        """The first node at which sizes contradict each other."""
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
            if min(shape, default=0) < 0 or (node.op == "Pad" and not node.domain and _reflects_too_much(node, probe)):
                return Conflict(node)
            if node.op == "Reshape" and not node.domain:
                source = shapes.get(node.inputs[0])
                if source is not None and None not in source and size_of(source) != size_of(shape):
                    return Conflict(node)
        return None

    def _runs(self, node: Node, probe: Probe) -> bool:
        """Whether a node certainly runs: sizes in a branch that nobody knows to be taken need not fit."""
        if not self.graph.has_bodies:
            return True
        return all(probe.values.get(name) is not None for name, _ in self.graph.conditions(node.index))

    @staticmethod
    def _pairs(node: Node, probe: Probe) -> Sequence[tuple[int, int]]:
        shapes, values, names = probe.shapes, probe.values, node.inputs
        return pairs(
            node,
            [shapes.get(n) if n else None for n in names],
            lambda i: values.get(names[i]) if i < len(names) and names[i] else None,
        )

    def _resolved(
        self, conflict: Conflict, sizes: Sizes, fixed: Sizes, solved: set[Key], probe: Probe
    ) -> dict[Key, int] | None:
        """Sizes at which that contradiction is none."""
        if conflict.place < 0:
            return None
        here = conflict.have - conflict.want
        for keys, find in self._unknowns(sizes, fixed, solved):

            def residual(size: int, keys: Sequence[Key] = keys) -> int | None:
                changed = self.dimensions.completed({**sizes, **dict.fromkeys(keys, size)}, fixed)
                return self._residual(conflict, changed, probe)

            found = find(residual, sizes[keys[0]], here)
            if found is not None:
                solved.update(keys)
                return self.dimensions.completed({**sizes, **dict.fromkeys(keys, found)}, fixed)
        return None

    def _unknowns(self, sizes: Sizes, fixed: Sizes, solved: set[Key]) -> Iterator[tuple[list[Key], _Find]]:
        """What may be changed, and how its size is found: a dimension that is itself one of the two sizes (of those in
        the fewest inputs first), extents of a map together, any dimension that has to do with it.
        """
        dimensions = self.dimensions
        free = [k for k in dimensions.places if k not in fixed and not dimensions.is_sum(k, sizes)]
        order = {key: (key in solved, len(dimensions.places[key]), -k) for k, key in enumerate(free)}
        single = sorted(free, key=order.__getitem__)
        yield from (([key], _direct) for key in single)
        for keys in dimensions.extents():
            both = [key for key in keys if key in free and key not in solved]
            if len(both) > 1:
                yield both, _root
        yield from (([key], _root) for key in single)

    def _residual(self, conflict: Conflict, sizes: Sizes, near: Probe) -> int | None:
        """What is between the two sizes of a contradiction at other sizes of the inputs; None where nobody knows."""
        bound, node = self.dimensions.shapes(sizes), conflict.node
        probe = None
        if not self.graph.has_bodies:
            probe = probe_of(self.graph, self._before(node), bound, near, self.infer)
        found = [] if probe is None else self._pairs(node, probe)
        if not found:
            found = self._pairs(node, probe_at(self.graph, bound, self.infer))
        if len(found) <= conflict.place:
            return None
        have, want = found[conflict.place]
        return None if have is None or want is None else have - want

    def _before(self, node: Node) -> list[Node]:
        """What a node is computed by, in graph order."""
        known = self._ancestors.get(node.index)
        if known is None:
            found: dict[int, Node] = {}
            queue = [node]
            while queue:
                for name in queue.pop().inputs:
                    maker = self.graph.producer.get(name)
                    if maker is not None and name not in self.graph.weights and maker.index not in found:
                        found[maker.index] = maker
                        queue.append(maker)
            known = self._ancestors[node.index] = [found[k] for k in sorted(found)]
        return known


def _direct(residual: _Residual, now: int, here: int) -> int | None:
    """The size that is asked for, where the unknown is itself one of the two sizes that have to agree."""
    there = residual(now + 1)
    if there is None or abs(there - here) != 1:
        return None
    size = now - here * (there - here)
    return size if 1 <= size <= _LARGEST and residual(size) == 0 else None


def _root(residual: _Residual, now: int, here: int) -> int | None:
    """The smallest size near which a residual vanishes, None where it does not depend on the size or never does.

    Residuals are mostly linear (two numbers of channels) or rise with steps (positions of a map of patches).
    """
    other = 2 * now
    there = residual(other)
    if there is None or there == here:
        return None
    direct = now - here * (other - now) / (there - here)
    for size in (int(direct), int(direct) + 1):
        if 1 <= size <= _LARGEST and residual(size) == 0:
            return size
    rising = there > here
    low, high = (0, now) if (here > 0) == rising else (now, other)
    while high < _LARGEST and low == now and _short(residual(high), rising):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if _short(residual(middle), rising):
            low = middle
        else:
            high = middle
    return high if 1 <= high <= _LARGEST and residual(high) == 0 else None


def _short(value: int | None, rising: bool) -> bool:
    """Whether a size is too small for a residual to vanish; at sizes too small to run at all, too."""
    return value is None or (value < 0 if rising else value > 0)


def _reflects_too_much(node: Node, probe: Probe) -> bool:
    shape = probe.shapes.get(node.inputs[0])
    if node.attrs.get("mode", "constant") != "reflect" or shape is None or len(node.inputs) > 3:
        return False
    value = probe.values.get(node.inputs[1]) if len(node.inputs) > 1 else None
    pads = node.attrs.get("pads", []) if value is None else value.ravel().tolist()
    return len(pads) == 2 * len(shape) and any(
        n is not None and p >= n for p, n in zip(pads, (*shape, *shape), strict=True)
    )
