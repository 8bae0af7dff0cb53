"""What is known before a cut: the shape of every tensor and the value of every small one, at the probe sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.graph.infer import Infer, probe_at
from onnxprune.graph.values import Probe, Values, size_of, small
from onnxprune.graph.view import Graph, Node

__all__ = ["Facts", "Infer", "Probe", "Values", "small", "study"]


@dataclass(slots=True)
class Facts:
    """The probes of a model; the first is the one that labels are pushed through."""

    probes: tuple[Probe, ...]

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


def study(
    graph: Graph, candidates: Iterable[Sequence[Mapping[str, tuple[int, ...]]]], infer: Infer | None = None
) -> Facts:
    """Shapes and values at the first candidate bindings that make sense for the graph (else at the very first).

    Args:
        candidates: one or two bindings {input: shape} each. A second one that makes no sense is left out.
        infer: asked where onnx has no schema.
    """
    first: Facts | None = None
    for bindings in candidates:
        probes = [probe_at(graph, dict(bindings[0]), infer)]
        probes += [probe_at(graph, dict(binding), infer, probes[0]) for binding in bindings[1:]]
        if _plausible(graph, probes[0]):
            return Facts((probes[0], *(p for p in probes[1:] if _plausible(graph, p))))
        first = first or Facts(tuple(probes))
    assert first is not None
    return first


def _plausible(graph: Graph, probe: Probe) -> bool:
    """Whether the graph can run like this: no reshape contradicts its input's size, no size is negative, and no Pad
    reflects more than there is.
    """
    for node in graph.steps:
        shape = probe.shapes.get(node.outputs[0]) if node.outputs else None
        if shape is None or None in shape:
            continue
        if node.index in probe.idle:
            continue
        if min(shape, default=0) < 0:
            return False
        if node.op == "Pad" and not node.domain and _reflects_too_much(node, probe):
            return False
        if node.op == "Reshape" and node.domain == "":
            source = probe.shapes.get(node.inputs[0])
            if source is not None and None not in source and size_of(source) != size_of(shape):
                return False
    return True


def _reflects_too_much(node: Node, probe: Probe) -> bool:
    shape = probe.shapes.get(node.inputs[0])
    if node.attrs.get("mode", "constant") != "reflect" or shape is None or len(node.inputs) > 3:
        return False
    value = probe.values.get(node.inputs[1]) if len(node.inputs) > 1 else None
    pads = node.attrs.get("pads", []) if value is None else value.ravel().tolist()
    return len(pads) == 2 * len(shape) and any(
        n is not None and p >= n for p, n in zip(pads, (*shape, *shape), strict=True)
    )
