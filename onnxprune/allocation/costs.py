"""Costs of a model as functions of the counts that each group keeps: MACs, parameters, bytes, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group, Units
from onnxprune.graph import cost
from onnxprune.graph.cost import known
from onnxprune.graph.view import Graph, Node, reads
from onnxprune.io.elements import DTYPES, PACKED_BITS
from onnxprune.io.weights import Weight
from onnxprune.labels.label import Ids, Label
from onnxprune.operators.registry import Move, rule_of

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]
Term = tuple[int, ...]
ShapeOf = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class AxisSize:
    """The size of one axis: the sum over ``terms`` {columns of counts: positions} of positions times kept shares."""

    axis: int
    terms: dict[Term, int]

    def at(self, shares: Shares) -> NDArray[np.int64]:
        """Return sizes [cuts] for shares [cuts, groups]."""
        total = np.zeros(len(shares))
        for columns, positions in self.terms.items():
            total += positions * reduce(np.multiply, (shares[:, c] for c in columns), np.ones(len(shares)))
        return np.rint(total).astype(np.int64)

    @property
    def columns(self) -> set[int]:
        """Return the groups that the size depends on."""
        return {c for term in self.terms for c in term}


class Sizes:
    """Sizes of all tensors at the first probe, from the steps that groups keep.

    Exact where the units of a group appear equally often on every axis, which is so in all but odd graphs (one channel
    used twice, its neighbour once): there a unit counts as the average of its group.

    Args:
        analysis: of the original.
        groups: the groups that may be pruned, in the order of the columns of counts.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group]) -> None:
        self.analysis, self.groups = analysis, list(groups)
        self.steps = np.array([g.steps for g in groups], dtype=np.int64)
        owners = _Owners(analysis.units, groups)
        self._axes: dict[str, list[AxisSize]] = {}
        sizes_of: dict[int, tuple[Label, list[AxisSize]]] = {}
        for name, labels in analysis.table.items().items():
            axis_sizes: list[AxisSize] = []
            for label in labels:
                if id(label) not in sizes_of:
                    sizes_of[id(label)] = label, _axes_of(owners, analysis.units.component, label)
                axis_sizes += sizes_of[id(label)][1]
            if axis_sizes:
                self._axes[name] = axis_sizes

    @property
    def full_counts(self) -> Counts:
        """Return the counts [1, groups] of the original."""
        return self.steps[None, :]

    def touched(self, name: str) -> bool:
        """Return whether the size of the tensor depends on any count."""
        return name in self._axes

    def axes(self, name: str) -> list[int]:
        """Return the axes of a tensor whose size depends on counts."""
        return [axis.axis for axis in self._axes.get(name, ())]

    def terms(self, name: str, axis: int) -> dict[Term, int]:
        """Return {columns of counts: positions} of one axis of a tensor; empty where no count changes its size."""
        return next((a.terms for a in self._axes.get(name, ()) if a.axis == axis), {})

    def columns(self, name: str) -> set[int]:
        """Return the groups that the size of a tensor depends on."""
        return {c for axis in self._axes.get(name, ()) for c in axis.columns}

    def at(self, counts: Counts) -> ShapeOf:
        """Return shapes for counts [cuts, groups] of kept steps: a size that depends on them is an array [cuts]."""
        shares = counts / self.steps
        shapes: dict[str, Any] = {}
        sizes: dict[int, NDArray[np.int64]] = {}  # tensors with the same labels have the same sizes

        def size_of(axis: AxisSize) -> NDArray[np.int64]:
            if id(axis) not in sizes:
                sizes[id(axis)] = axis.at(shares)
            return sizes[id(axis)]

        def shape(name: str) -> Any:
            if name not in shapes:
                before = self.analysis.facts.shape(name)
                shapes[name] = before if before is None else self._shape(name, before, size_of)
            return shapes[name]

        return shape

    def _shape(
        self, name: str, before: Sequence[Any], size_of: Callable[[AxisSize], NDArray[np.int64]]
    ) -> tuple[Any, ...]:
        result = list(before)
        for size in self._axes.get(name, ()):
            now = size_of(size)
            size_before = result[size.axis]
            # Two labels of a weight may share an axis: positions that survive both remain.
            result[size.axis] = np.minimum(size_before, now) if isinstance(size_before, np.ndarray) else now
        return tuple(result)


class _Owners:
    """The selected groups that a component belongs to, and the units of theirs that it is pruned with.

    Attributes:
        column, unit: [components, depth]: its own group first, then those of its rows; -1 for none.
    """

    def __init__(self, units: Units, groups: Sequence[Group]) -> None:
        count = units.frozen.size
        layers = [(np.full(count, -1, np.int64), np.full(count, -1, np.int64))]
        for number, group in enumerate(groups):
            layers[0][0][group.units], layers[0][1][group.units] = number, np.arange(group.size)
        for rows in reversed(units.atoms.rows):
            above, cells = units.component[rows.rows], units.component[rows.cells]
            for column, unit in tuple(layers):
                own_column = np.broadcast_to(column[above][:, None], cells.shape)
                own_unit = np.broadcast_to(unit[above][:, None], cells.shape)
                _put(layers, cells, own_column, own_unit)
        self.column = np.stack([c for c, _ in layers], axis=1)
        self.unit = np.stack([u for _, u in layers], axis=1)


def _put(layers: list[tuple[Ids, Ids]], cells: Ids, columns: Ids, units: Ids) -> None:
    """Record an owner of cells in the first layer that is free there, unless it is recorded already."""
    mask = columns >= 0
    for column, unit in layers:
        mask &= column[cells] != columns
        free = mask & (column[cells] < 0)
        column[cells[free]], unit[cells[free]] = columns[free], units[free]
        mask &= ~free
    if mask.any():
        layers.append((np.full_like(layers[0][0], -1), np.full_like(layers[0][1], -1)))
        _put(layers, np.where(mask, cells, cells[mask][0]), np.where(mask, columns, -1), units)


def _axes_of(owners: _Owners, component: Ids, label: Label) -> list[AxisSize]:
    """Return the axes of a label whose size depends on counts.

    Cells are pruned along the pack axis, whole rows along an outer axis: a group determines the first axis, from the
    pack axis outwards, along which its units differ.
    """
    components = component[label.ids]
    column, unit = owners.column[components], owners.unit[components]
    other_axes = [a for a in reversed(label.axes) if a != label.pack]
    order = [label.pack, *other_axes] if label.pack in label.axes else other_axes
    assigned: set[int] = set()
    result = []
    for axis in order:
        line = tuple(slice(None) if a == axis else 0 for a in range(label.ids.ndim))
        columns, units = column[line], unit[line]
        decides = {
            int(c)
            for c in np.unique(columns[columns >= 0])
            if c not in assigned and (len(order) == 1 or np.unique(units[columns == c]).size > 1)
        }
        if decides:
            assigned |= decides
            deciding = np.sort(np.where(np.isin(columns, list(decides)), columns, -1), axis=1)
            kinds, positions = np.unique(deciding, axis=0, return_counts=True)
            terms = {tuple(c for c in k if c >= 0): n for k, n in zip(kinds.tolist(), positions.tolist(), strict=True)}
            result.append(AxisSize(axis, terms))
    return result


# Operators whose output shares the memory of the input.
_VIEWS = (Move.SAME, Move.SHAPE)
_FLOAT = 1


class Memory:
    """Bytes of activations alive while each node runs, at the first probe's shapes, nodes in the order of the graph.

    A tensor is alive from the node that makes it to the last that reads it, an input from the start, an output to the
    end; a node that only changes a shape shares its input's memory. In-place execution and scratch space of a runtime
    are not counted. Tensors of unknown size count as 0 bytes.

    Attributes:
        moments: the nodes in order.
        rows: the moments of the rows of ``alive``.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        graph = sizes.analysis.graph
        self.moments = graph.steps
        spans = _spans(graph)
        shape = sizes.analysis.facts.shape
        names = [n for n in spans if known(shape(n))]
        moving = [n for n in names if sizes.touched(n)]
        unchanged = [n for n in names if not sizes.touched(n)]
        self._each = {name: self._element(name) for name in names}
        constant_bytes = _during(spans, unchanged, len(self.moments)) @ np.array(
            [self._bytes(shape(n), n) for n in unchanged]
        )
        during = _during(spans, moving, len(self.moments))
        # Moments with the same tensors alive, and no further memory, are one row.
        rows = _distinct(during, constant_bytes)
        self._still, self._during, self._moving = constant_bytes[rows], during[rows], moving
        self.rows = [self.moments[i] for i in rows]

    def alive(self, counts: Counts) -> np.ndarray:
        """Return bytes [cuts, distinct moments] for counts [cuts, groups] of kept steps."""
        shape = self._sizes.at(counts)
        each = [np.broadcast_to(self._bytes(shape(n), n), len(counts)) for n in self._moving]
        moving = np.stack(each, axis=0) if each else np.zeros((0, len(counts)))
        return np.asarray((self._during @ moving).T + self._still)

    def _bytes(self, shape: tuple[int, ...], name: str) -> float:
        return prod(shape) * self._each[name]

    def _element(self, name: str) -> float:
        number = self._sizes.analysis.facts.probes[0].dtypes.get(name, _FLOAT)
        return float(DTYPES.get(number, DTYPES[_FLOAT]).itemsize)


def _spans(graph: Graph) -> dict[str, tuple[int, int]]:
    """Return the first and last moment of every tensor that holds memory of its own."""
    home = {name: name for name in graph.inputs}
    spans = {name: [0, 0] for name in graph.inputs}
    for moment, node in enumerate(graph.steps):
        for name in reads(node):
            if name in home:
                spans[home[name]][1] = moment
        for position, name in enumerate(node.outputs):
            if not name or name in graph.weights:
                continue
            view = position == 0 and rule_of(node).moves in _VIEWS and node.inputs[0] in home
            home[name] = home[node.inputs[0]] if view else name
            if not view:
                spans[name] = [moment, moment]
    for name in graph.outputs:
        if name in home:
            spans[home[name]][1] = len(graph.steps) - 1
    return {name: (first, last) for name, (first, last) in spans.items()}


def _during(spans: dict[str, tuple[int, int]], names: list[str], moments: int) -> csr_matrix:
    """Return the incidence matrix [moments, names]: 1 while the tensor is alive."""
    rows = [np.arange(spans[n][0], spans[n][1] + 1) for n in names]
    columns = np.repeat(np.arange(len(names)), [r.size for r in rows])
    indices = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return csr_matrix((np.ones(indices.size), (indices, columns)), shape=(moments, len(names)))


def _distinct(during: csr_matrix, constant_bytes: np.ndarray) -> np.ndarray:
    """Return one moment for every set of tensors of variable size: the one with most fixed memory."""
    keys = [row.indices.tobytes() for row in during]
    order = np.argsort(-constant_bytes, kind="stable")
    best: dict[bytes, int] = {}
    for i in order.tolist():
        best.setdefault(keys[i], i)
    return np.array(sorted(best.values()), dtype=np.int64)


Costs = NDArray[np.float64]


class Cost(Protocol):
    """A cost of the model: the largest of its rows. A peak has one row per moment, a sum one row."""

    def rows(self, counts: Counts) -> Costs:
        """Return costs [cuts, rows] for counts [cuts, groups] of kept steps."""
        ...


class Macs:
    """Multiply-accumulates at the first probe's shapes, one row."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        graph = sizes.analysis.graph
        layers = [node for node in graph.nodes if cost.is_layer(node, graph)]
        names = {n.index: (*n.inputs, *n.outputs) for n in layers}
        self._moving = [n for n in layers if any(sizes.touched(name) for name in names[n.index])]
        moving = {n.index for n in self._moving}
        self._fixed = sum(cost.macs(n, sizes.analysis.facts.shape) for n in layers if n.index not in moving)

    def rows(self, counts: Counts) -> Costs:
        """Return multiply-accumulates [cuts, 1]."""
        shape = self._sizes.at(counts)
        total = sum((cost.macs(node, shape) for node in self._moving), start=np.full(len(counts), self._fixed))
        return np.asarray(total, dtype=np.float64)[:, None]


@dataclass(frozen=True, slots=True)
class CodedFile:
    """The file of a model whose weights are stored in 8 bits.

    Attributes:
        size: its bytes.
        weights: names of the weights that are codes.
    """

    size: int
    weights: frozenset[str]


class WeightCost:
    """Elements or bytes of all weights, one row.

    Constants that pruning adds, and the few bytes by which names and shapes in the file change, are not counted.

    Args:
        sizes: sizes of all tensors as functions of counts.
        kind: ``params``, ``size`` (the file's bytes) or ``weights`` (bytes of the weights alone).
        coded: the file that counts for ``size``, where it is not the model's own.
    """

    def __init__(self, sizes: Sizes, kind: str, coded: CodedFile | None = None) -> None:
        self._sizes, self._what = sizes, kind
        self._coded = frozenset[str]() if coded is None else coded.weights
        analysis = sizes.analysis
        temporary = analysis.copies.keys() | {name for item in analysis.hoists for name in item.new_names}
        weights = {n: w for n, w in analysis.graph.weights.items() if n not in temporary}
        self._moving = {n: w for n, w in weights.items() if sizes.touched(n)}
        unchanged = {
            "params": analysis.parameters,
            "size": analysis.loaded.size if coded is None else coded.size,
            "weights": sum(_bytes(w, prod(w.shape)) for w in weights.values()),
        }
        self._fixed = unchanged[kind] - sum(self.of(n, prod(w.shape)) for n, w in self._moving.items())

    def rows(self, counts: Counts) -> Costs:
        """Return elements or bytes [cuts, 1]."""
        shape = self._sizes.at(counts)
        parts = (self.of(name, prod(shape(name))) for name in self._moving)
        return np.asarray(sum(parts, start=np.full(len(counts), float(self._fixed))))[:, None]

    def of(self, name: str, elements: Any) -> Any:
        """Return the cost of a number of elements of a weight, given its name: their number, or their bytes."""
        if self._what == "params" or name in self._coded:
            return elements
        return _bytes(self._sizes.analysis.graph.weights[name], elements)


def _bytes(weight: Weight, elements: Any) -> Any:
    """Return the bytes of a number of elements; 0 for text."""
    if weight.dtype.kind == "O":
        return 0
    return elements * PACKED_BITS.get(weight.onnx_type, 8 * weight.dtype.itemsize) / 8


class Peak:
    """Bytes of the weights and of the activations alive at once, one row per moment; see :class:`Memory`."""

    def __init__(self, sizes: Sizes) -> None:
        self._weights, self._memory = WeightCost(sizes, "weights"), Memory(sizes)

    def rows(self, counts: Counts) -> Costs:
        """Return bytes [cuts, moments]."""
        return np.asarray(self._weights.rows(counts) + self._memory.alive(counts))

    def of(self, name: str, elements: Any) -> Any:
        """Return the bytes of so many elements of a weight, by its name."""
        return self._weights.of(name, elements)

    @property
    def moments(self) -> Sequence[Node]:
        """Return the node that runs at every row."""
        return self._memory.rows

    def dearest(self, counts: Counts) -> tuple[str, float]:
        """Return the node of the peak for counts [groups], and the share of activations in the peak."""
        alive = self._memory.alive(counts[None])[0]
        moment = int(np.argmax(alive))
        peak = alive[moment] + float(self._weights.rows(counts[None])[0, 0])
        return self._memory.rows[moment].label, float(alive[moment]) / max(peak, 1.0)


def costs_of(analysis: Analysis, sizes: Sizes, kind: str, coded: CodedFile | None = None) -> Cost:
    """Return the countable cost of that kind: ``macs``, ``params``, ``size`` or ``peak-memory``.

    Args:
        analysis: of the model.
        sizes: sizes of all tensors as functions of counts.
        kind: of the cost.
        coded: the file that counts for ``size``, where it is not the model's own.
    """
    if kind == "macs":
        return Macs(sizes)
    return Peak(sizes) if kind == "peak-memory" else WeightCost(sizes, kind, coded)


def total(cost_of: Cost, counts: Counts) -> Costs:
    """Return the cost [cuts] of the model: its largest row."""
    return np.asarray(cost_of.rows(counts).max(axis=1))
