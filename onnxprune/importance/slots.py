"""Weights and feature maps as criteria read them: one slot per tensor and group."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group, Units
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import ModelError
from onnxprune.graph.canonical import weight_of
from onnxprune.graph.cost import constant_source, multiplies
from onnxprune.graph.view import Graph, Node
from onnxprune.importance.criteria import Slot
from onnxprune.importance.statistics import Maps
from onnxprune.io.elements import align_array, raw
from onnxprune.labels.label import Ids, Label
from onnxprune.operators.context import Step, Table
from onnxprune.operators.contractions import Form
from onnxprune.operators.registry import Read, lookup, rule_of


def is_setting(graph: Graph, name: str) -> bool:
    """Return whether a weight is only read as scale, zero point or order of codes, and has no score of its own."""
    readers = graph.consumers.get(name, ())
    return bool(readers) and all(i in rule_of(node).settings for node, i in readers)


def real_values(graph: Graph, name: str, codes: NDArray[Any]) -> NDArray[Any]:
    """Return the weight ``name`` dequantized to float32, by the first node that reads it as codes.

    Codes whose scale or zero point is not a constant, and weights that no such node reads, are returned as they are.
    """
    for node, position in graph.consumers.get(name, ()):
        numbers = _numbers(graph, node, position, codes)
        if numbers is not None:
            return numbers
    return codes


def numbers_at(graph: Graph, node: Node, position: int) -> NDArray[Any] | None:
    """Return the weight at an input of a node, dequantized; None for activations."""
    value = weight_of(graph, node.inputs[position])
    if value is None:
        return None
    numbers = _numbers(graph, node, position, value)
    return value if numbers is None else numbers


def _numbers(graph: Graph, node: Node, position: int, codes: NDArray[Any]) -> NDArray[Any] | None:
    """Dequantize codes at an input of a node; None where it reads no codes there."""
    try:
        return rule_of(node).numbers(node, position, codes, _constants(graph, node))
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"the scale or zero point of node {node.label!r} ({node.op}) does not fit {node.inputs[position]!r} "
            f"{list(codes.shape)}: {error}",
            hint="The file is damaged; export it again.",
        ) from error


def decoder(graph: Graph, node: Node, position: int) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
    """Return a function that dequantizes an activation that a node reads as codes; None where it is not quantized."""
    read, rule = _constants(graph, node), rule_of(node)
    if rule.numbers(node, position, np.zeros((1,) * 4, np.float32), read) is None:
        return None

    def decode(codes: NDArray[Any]) -> NDArray[Any]:
        numbers = rule.numbers(node, position, codes, read)
        return codes if numbers is None else numbers

    return decode


def _constants(graph: Graph, node: Node) -> Read:
    def read(i: int) -> NDArray[Any] | None:
        name = node.inputs[i] if 0 <= i < len(node.inputs) else ""
        return weight_of(graph, name) if name else None

    return read


class Targets:
    """The scored group and the unit of every component, -1 where there is none: its own, or that of its row."""

    def __init__(self, units: Units, groups: Iterable[Group]) -> None:
        self.group = np.full(units.frozen.size, -1, dtype=np.int64)
        self.unit = np.full(units.frozen.size, -1, dtype=np.int64)
        for group in groups:
            self.group[group.units] = group.id
            self.unit[group.units] = np.arange(group.size)
        for rows in reversed(units.atoms.rows):
            above = units.component[rows.rows]
            in_group = self.group[above] >= 0
            cells = units.component[rows.cells[in_group]]
            fresh = self.group[cells] < 0
            for values in (self.group, self.unit):
                values[cells[fresh]] = np.broadcast_to(values[above[in_group]][:, None], cells.shape)[fresh]


Mask = NDArray[np.bool_]


class SlotView(Protocol):
    """A criterion's view of one weight: a :class:`Slot`, or sums computed beforehand."""

    tensor: str
    blocks: NDArray[Any]
    units: Ids


V = TypeVar("V", bound=SlotView)


class PlacedSlot(NamedTuple, Generic[V]):
    """A slot of group ``group``. ``rank``: 2 for matrices, 1 for vectors, 0 for maps; ``place``: larger is later."""

    group: int
    slot: V
    rank: int = 0
    place: tuple[int, ...] = (0,)


class Claim(NamedTuple):
    """One label of a weight for one group: ``owner`` has the unit at each position, -1 for those of other groups."""

    label: Label
    group: Group
    owner: Ids
    place: tuple[int, ...]


def weight_slots(
    table: Table,
    units: Units,
    groups: Iterable[Group],
    seed: int = 0,
    removed: Mask | None = None,
    placed: bool = False,
) -> Iterator[PlacedSlot[Slot]]:
    """Yield every weight along the channels of every group in ``groups``; positions of one unit lie side by side.

    Args:
        table: the labels of all tensors.
        units: the units of the model.
        groups: the groups to score.
        seed: seed of criteria that draw.
        removed: mask over atoms that are already removed: the weights are 0 there, and no slot has their units.
        placed: locate the producers of each slot's units in the graph (``Placed.place``).
    """
    for name, weight_claims in claims(table, units, groups, removed, placed):
        array = align_array(weight_values(table, name, removed))
        role = [(node.op, i) for node, i in table.graph.consumers.get(name, ())]
        for claim in weight_claims:
            slot = _slot(name, claim, array, role, seed)
            if slot is not None:
                yield PlacedSlot(claim.group.id, slot, 2 if array.ndim > 1 else 1, claim.place)


def claims(
    table: Table, units: Units, groups: Iterable[Group], removed: Mask | None = None, placed: bool = False
) -> Iterator[tuple[str, list[Claim]]]:
    """Yield weights with the labels of each group on them; the arguments are those of :func:`weight_slots`."""
    by_id = {g.id: g for g in groups}
    targets = Targets(units, by_id.values())
    group_of, unit_of = targets.group[units.component], targets.unit[units.component]
    for name, labels in list(table.items().items()):
        if name not in table.graph.weights or is_setting(table.graph, name):
            continue
        weight_claims: list[Claim] = []
        for label in labels:
            numbers = label.of(group_of)
            only = _only(numbers)
            if only == -1:  # labels of no scored group
                continue
            unit = label.of(unit_of)
            if removed is not None:
                numbers = np.where(label.of(removed), -1, numbers)
                only = _only(numbers)
            place = _place(table, name, label) if placed else (0,)
            present = [only] if only is not None else (np.flatnonzero(np.bincount(numbers.ravel() + 1)) - 1).tolist()
            for number in present:
                if number >= 0:
                    owner = unit if only is not None else np.where(numbers == number, unit, -1)
                    weight_claims.append(Claim(label, by_id[number], owner, place))
        if weight_claims:
            yield name, weight_claims


def _only(numbers: Ids) -> int | None:
    """Return the one number that all positions hold, None where several occur."""
    # Most weights are small and of one group: counting equal elements takes a fraction of the time of min and max.
    first = numbers.item(0)
    return first if np.count_nonzero(numbers == first) == numbers.size else None


def _place(table: Table, name: str, label: Label) -> tuple[int, int]:
    """Return a weight's place in the graph; weights whose channels no layer here produces come first."""
    graph, label_ids = table.graph, np.unique(label.ids)
    queue, produced, read = [name], -1, -1
    while queue:
        for node, _ in graph.consumers.get(queue.pop(), ()):
            read = max(read, node.index)
            for out in node.outputs:
                if out and any(np.isin(x.ids, label_ids).any() for x in table.get(out)):
                    if not multiplies(node) and constant_source(graph, out) is not None:
                        queue.append(out)
                    else:
                        produced = max(produced, node.index)
    return (1, produced) if produced >= 0 else (0, read)


def weight_values(table: Table, name: str, removed: Mask | None) -> NDArray[Any]:
    """Return a weight in a type that numpy multiplies quickly and without overflow, at any alignment in the file."""
    array = real_values(table.graph, name, table.graph.weights[name].read())
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    return array if removed is None else _zeroed(array, table.get(name), removed)


def _zeroed(array: NDArray[Any], labels: Iterable[Label], removed: Mask) -> NDArray[Any]:
    """Return a weight with 0 at every removed position along each of its labelled axes."""
    for label in labels:
        mask = label.of(removed)
        if mask.any():
            # Packed codes have an axis of their own behind the others.
            mask = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
            array = np.where(mask, array.dtype.type(0), array)
    return array


def _slot(name: str, claim: Claim, array: NDArray[Any], role: list[tuple[str, int]], seed: int) -> Slot | None:
    label, size, drawn = claim.label, claim.group.size, (seed, claim.group.id)
    flat = claim.owner.ravel()
    in_order = np.arange(size)
    positions = (flat >= 0).nonzero()[0]
    if not positions.size:
        return None
    runs = None if label.is_grid else runs_of(flat, positions, in_order)
    if runs is not None:
        # No gather: the weight's own memory, or a copy in large pieces where runs lie side by side (queries and keys).
        axis, start = label.pack, positions.item(0)
        merged = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
        blocks = merged[:, start : start + positions.size].reshape(len(merged) * runs, size, -1)
        return Slot(name, axis, blocks, role, in_order, size, drawn)
    axes = label.axes
    rows = np.moveaxis(array, axes, range(len(axes))).reshape(flat.size, -1)
    order = positions[np.argsort(flat[positions], kind="stable")]
    who = flat[order]
    counts = np.bincount(who, minlength=size)
    present = np.flatnonzero(counts)
    if (counts[present] == counts[present[0]]).all():
        # Equally many positions per unit: all of a unit's positions are one row of features.
        matrix = rows[order].reshape(present.size, -1)
        return Slot(name, label.pack, matrix[None], role, present, size, drawn)
    return Slot(name, label.pack, rows[order][None], role, who, size, drawn)


def runs_of(flat: Ids, positions: Ids, in_order: Ids) -> int | None:
    """Return the number of times that all units follow ``in_order`` where ``positions`` is one run; else None."""
    count, remainder = divmod(positions.size, in_order.size)
    start = positions.item(0)
    if remainder or positions.item(-1) - start != positions.size - 1:
        return None
    units = flat[start : start + positions.size].reshape(count, in_order.size)
    return count if np.count_nonzero(units == in_order) == units.size else None


@dataclass(frozen=True, slots=True)
class Gradients:
    """Statistics of gradients, see :data:`onnxprune.importance.statistics.GRADIENTS`.

    Attributes:
        samples: number of samples.
        weights: {statistic: {weight: array of its shape}}.
        gates: {statistic: {index into the claims: array [channels]}}.
    """

    samples: int
    weights: dict[str, dict[str, NDArray[Any]]]
    gates: dict[str, dict[int, NDArray[Any]]]


def gradient_slots(
    table: Table,
    every_claim: Sequence[tuple[str, Claim]],
    gradients: Gradients,
    seed: int = 0,
    removed: Mask | None = None,
) -> Iterator[PlacedSlot[Slot]]:
    """Yield the slots of weights that have gradients, with statistics of these in ``Slot.maps``.

    Args:
        table: the labels of all tensors.
        every_claim: weights and claims, see :func:`claims`.
        gradients: statistics, of the same claims.
        seed: seed of criteria that draw.
        removed: mask over the atoms that are already removed.
    """
    for number, (name, claim) in enumerate(every_claim):
        elementwise = {need: values[name] for need, values in gradients.weights.items() if name in values}
        per_channel = {need: values[number] for need, values in gradients.gates.items() if number in values}
        if not elementwise and not per_channel:
            continue
        array = align_array(weight_values(table, name, removed))
        role = [(node.op, i) for node, i in table.graph.consumers.get(name, ())]
        slot = _slot(name, claim, array, role, seed)
        if slot is None:
            continue
        for need, values in elementwise.items():
            same = _slot(name, claim, np.ascontiguousarray(values).reshape(array.shape), role, seed)
            assert same is not None
            per_channel[need] = same.blocks
        slot.maps = Maps(gradients.samples, per_channel)
        yield PlacedSlot(claim.group.id, slot, 2 if array.ndim > 1 else 1, claim.place)


def channel_sums(claim: Claim, array: NDArray[Any]) -> NDArray[Any]:
    """Return the sum over the elements of every channel of a claim's slot, [channels]."""
    return _of_units(claim, _sum(array, claim.label.axes).ravel())[1]


Axes = tuple[int, ...]
# Bytes that are squared at a time: they fit into the cache of one core beside other data.
_PIECE = 1 << 20
# Bytes up to which an array is squared in one piece.
_SMALL = 1 << 16


@dataclass(slots=True)
class Squares:
    """One weight for one group: ``sums`` [channels] of the squared elements of each channel.

    ``tensor``, ``units`` are those of a :class:`Slot`; ``blocks`` is the weight as it is stored.
    """

    tensor: str
    blocks: NDArray[Any]
    units: Ids
    sums: NDArray[Any]


def weight_squares(
    table: Table, units: Units, groups: Iterable[Group], removed: Mask | None = None, placed: bool = False
) -> Iterator[PlacedSlot[Squares]]:
    """Yield the sums of squares of every slot of :func:`~onnxprune.importance.slots.weight_slots`."""
    marginals = Marginals()
    for name, weight_claims in claims(table, units, groups, removed, placed):
        array = weight_values(table, name, removed)
        sums = marginals(array, {claim.label.axes for claim in weight_claims})
        for claim in weight_claims:
            numbers, units_of_numbers = _of_units(claim, sums[claim.label.axes].ravel())
            if numbers.size:
                yield PlacedSlot(
                    claim.group.id,
                    Squares(name, array, numbers, units_of_numbers),
                    2 if array.ndim > 1 else 1,
                    claim.place,
                )


def _of_units(claim: Claim, sums: NDArray[Any]) -> tuple[Ids, NDArray[Any]]:
    """Return units and their sums; one entry per position where units differ in their number of positions."""
    flat, in_order = claim.owner.ravel(), np.arange(claim.group.size)
    if flat.size == in_order.size and np.count_nonzero(flat == in_order) == flat.size:  # as nearly everywhere
        return in_order, sums
    positions = (flat >= 0).nonzero()[0]
    if not positions.size:
        return positions, sums[positions]
    runs = runs_of(flat, positions, in_order)
    if runs is not None:
        start = positions.item(0)
        return in_order, sums[start : start + positions.size].reshape(runs, in_order.size).sum(axis=0)
    order = positions[np.argsort(flat[positions], kind="stable")]
    who = flat[order]
    counts = np.bincount(who)
    present = np.flatnonzero(counts)
    if (counts[present] == counts[present[0]]).all():
        return present, sums[order].reshape(present.size, -1).sum(axis=1)
    return who, sums[order]


class Marginals:
    """Sums of squares over the axes of one array after another; holds the buffer that pieces are squared in."""

    def __init__(self) -> None:
        self._piece, self._ones = np.empty(0, np.uint8), np.empty(0)

    def __call__(self, array: NDArray[Any], axis_sets: Collection[Axes]) -> dict[Axes, NDArray[Any]]:
        """Return sum W^2 over all axes but some, for each of these sets of axes, in their order.

        The array is read once, piece by piece, and squared and summed in the processor's cache.
        """
        with np.errstate(over="ignore"):  # the caller checks for infinity
            if array.nbytes <= _SMALL or array.ndim == 1 or any(len(axes) != 1 for axes in axis_sets):
                squares = np.square(align_array(array))
                return {axes: _sum(squares, axes) for axes in axis_sets}
            first = next((a for a, n in enumerate(array.shape) if n > 1), 0)
            rows, columns = self._by_pieces(array.reshape(array.shape[first], -1))
            columns = columns.reshape((1,) * (first + 1) + array.shape[first + 1 :])
            return {axes: rows if axes == (first,) else _sum(columns, axes) for axes in axis_sets}

    def _by_pieces(self, matrix: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return sums of squares along the rows, and along the columns, of a matrix."""
        height, width = matrix.shape
        step = min(height, max(1, _PIECE // max(1, width * matrix.itemsize)))
        piece, ones = self._room(step, width, matrix.dtype)
        rows, columns = np.empty(height, matrix.dtype), np.zeros(width, matrix.dtype)
        for start in range(0, height, step):
            part = matrix[start : start + step]
            squares = piece[: len(part)]
            if not part.flags.aligned:  # a copy of plain bytes is as fast from unaligned addresses
                plain = raw(part)
                squares.view(plain.dtype)[...] = plain
                part = squares
            np.square(part, out=squares)
            np.matmul(squares, ones[:width], out=rows[start : start + len(part)])
            columns += ones[: len(part)] @ squares
        return rows, columns

    def _room(self, height: int, width: int, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return a buffer for a matrix, and a vector of ones at least as long as either side."""
        num_bytes = height * width * dtype.itemsize
        if self._piece.size < num_bytes:
            self._piece = np.empty(max(num_bytes, _PIECE), np.uint8)
        if self._ones.size < max(height, width) or self._ones.dtype != dtype:
            self._ones = np.ones(max(height, width), dtype)
        return self._piece[:num_bytes].view(dtype).reshape(height, width), self._ones


def _sum(array: NDArray[Any], axes: Axes) -> NDArray[Any]:
    """Sum an array over all axes but these."""
    others = tuple([a for a, n in enumerate(array.shape) if n > 1 and a not in axes])
    return np.asarray(np.add.reduce(array, axis=others)) if others else array


@dataclass(frozen=True, slots=True)
class ContractionInput:
    """One activation in front of one contraction.

    Attributes:
        node: the contraction.
        position: position of the activation among its inputs.
        tensor: name of the activation.
        axes: its axes that channels lie along, in the channels' order.
        label: the label that covers the summed axis.
        form: the contraction as a matrix product; None where the other operand is an activation too.
        partner: (tensor, axes) of that other activation.
        conditions: conditions under which the contraction runs, (tensor, value); other samples do not reach it.
        decode: dequantizes the activation, where it holds codes.
    """

    node: Node
    position: int
    tensor: str
    axes: tuple[int, ...]
    label: Label
    form: Form | None = None
    partner: tuple[str, tuple[int, ...]] | None = None
    conditions: tuple[tuple[str, bool], ...] = ()
    decode: Callable[[NDArray[Any]], NDArray[Any]] | None = None

    @property
    def maps_key(self) -> Hashable:
        """Return a key that is equal for sites with the same feature maps."""
        return self.tensor, self.axes, self.conditions

    @property
    def partner_key(self) -> Hashable:
        """Return the same key for the feature maps of the other activation."""
        assert self.partner is not None
        return *self.partner, self.conditions

    @property
    def columns_key(self) -> Hashable:
        """Return a key that is equal for sites with the same columns."""
        return self.tensor, None if self.form is None else self.form.key, self.conditions

    def channels(self, ids: Ids) -> Ids:
        """Return an array of the label's shape as [channels]."""
        return in_order(ids, self.axes)


def contraction_inputs(table: Table, component: Ids) -> Iterator[ContractionInput]:
    """Yield all sites of a graph, in graph order.

    Args:
        table: the labels of all tensors.
        component: the unit that every atom belongs to.
    """
    for node in table.graph.nodes:
        if not any(table.get(n) for n in node.inputs if n):
            continue
        rule = lookup(node.domain, node.op, node.version)
        for position, axes in rule.contracted_axes(Step(node, table)):
            name = node.inputs[position]
            if constant_source(table.graph, name) is not None:
                continue
            for label in table.get(name):
                if set(axes) & set(label.axes):
                    site = _with_weight(table, node, position, label) or _pair(table, component, node, position, label)
                    if site is not None:
                        yield replace(site, conditions=where) if (where := table.graph.conditions(node.index)) else site


def _with_weight(table: Table, node: Node, position: int, label: Label) -> ContractionInput | None:
    """Return the site in front of a product with a weight, where the label distinguishes all of its channels."""
    shapes = [table.facts.shape(n) if n else None for n in node.inputs]
    form = lookup(node.domain, node.op, node.version).form(node, shapes, position)
    if form is None or constant_source(table.graph, node.inputs[form.weight]) is None:
        return None
    shape = shapes[position] or ()
    if {a for a in form.axes if shape[a] != 1} != set(label.axes):
        return None
    name = node.inputs[position]
    encoder = table.graph.producer.get(name)
    if encoder is not None and rule_of(encoder).encodes and any(x is label for x in table.get(encoder.inputs[0])):
        return ContractionInput(node, position, encoder.inputs[0], form.axes, label, form)
    return ContractionInput(node, position, name, form.axes, label, form, decode=decoder(table.graph, node, position))


def _pair(table: Table, component: Ids, node: Node, position: int, label: Label) -> ContractionInput | None:
    """Return the site in front of a product of two activations with the same units in both (queries and keys)."""
    if len(node.inputs) != 2 or label.pack != label.axes[-1]:
        return None
    other = node.inputs[1 - position]
    units = component[in_order(label.ids, label.axes)]
    for candidate in table.get(other):
        order = (*candidate.outer(), candidate.pack)
        if candidate.ids.size == units.size and np.array_equal(component[in_order(candidate.ids, order)], units):
            return ContractionInput(node, position, node.inputs[position], label.axes, label, None, (other, order))
    return None


def in_order(array: Ids, axes: tuple[int, ...]) -> Ids:
    """Flatten an array of size 1 outside ``axes``, in their order."""
    return np.transpose(array, [*axes, *(a for a in range(array.ndim) if a not in axes)]).reshape(-1)


def surviving(after: Survivors, label: Label) -> Ids:
    """Return the positions of the label (flat, of its shape) that survive, in the order of the pruned tensor."""
    keep = after.mask(label)
    ids = np.arange(label.ids.size).reshape(label.ids.shape)
    if keep is None:
        return ids
    mask = keep
    for axis in label.outer():
        alive = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        ids, mask = ids.take(alive, axis=axis), mask.take(alive, axis=axis)
    width = int(mask.sum(axis=label.pack).max())
    order = np.argsort(~mask, axis=label.pack, kind="stable").take(np.arange(width), axis=label.pack)
    return np.take_along_axis(ids, order, axis=label.pack)


@dataclass(slots=True)
class CapturedMaps:
    """Statistics by site: ``maps`` by ``maps_key``, ``columns`` by ``columns_key``."""

    sites: list[ContractionInput] = field(default_factory=list)
    samples: int = 0
    maps: dict[Hashable, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    columns: dict[Hashable, dict[str, NDArray[np.float64]]] = field(default_factory=dict)

    def shortage(self) -> tuple[str, int] | None:
        """Return (contraction, samples) of the site with the fewest rows for its columns; None where all have enough.

        A Gram matrix of fewer rows than columns is singular: some channels are linear combinations of others by chance.
        """
        worst: tuple[str, int] | None = None
        for site in self.sites:
            statistics = self.columns.get(site.columns_key, {})
            if "rows" in statistics and "gram" in statistics:
                rows, columns = float(statistics["rows"]), statistics["gram"].shape[-1]
                min_samples = int(np.ceil(self.samples * columns / max(rows, 1.0)))
                if rows < columns and (worst is None or min_samples > worst[1]):
                    worst = site.node.label, min_samples
        return worst


def map_slots(
    analysis: Analysis,
    groups: Iterable[Group],
    captured: CapturedMaps,
    removed: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, Slot]]:
    """Yield (group, slot) for every scored group at every site, in graph order.

    Args:
        analysis: the analysis of the model.
        groups: the groups to score.
        captured: statistics of feature maps.
        removed: mask over atoms that are already removed; ``captured`` then comes from the model pruned accordingly.
        seed: seed of criteria that draw.
    """
    table, units = analysis.table, analysis.units
    by_id = {g.id: g for g in groups}
    targets = Targets(units, by_id.values())
    after = Survivors(table, np.zeros(units.component.size, bool) if removed is None else removed)
    for site in captured.sites:
        positions = site.channels(surviving(after, site.label))
        component = units.component[site.label.ids.ravel()[positions]]
        numbers = targets.group[component]
        group_ids = np.unique(numbers[numbers >= 0])
        if not group_ids.size:
            continue
        weight = _weight(table, after, site, positions)
        if weight is None and site.form is not None:
            continue
        for number in group_ids:
            indices = np.flatnonzero(numbers == number)
            slot = _map_slot(
                table, site, captured, weight, indices, by_id[int(number)], targets.unit[component[indices]]
            )
            slot.seed = (seed, int(number))
            yield int(number), slot


def _map_slot(
    table: Table,
    site: ContractionInput,
    captured: CapturedMaps,
    weight: NDArray[Any] | None,
    indices: Ids,
    group: Group,
    units: Ids,
) -> Slot:
    arrays = _arrays(site, captured, indices, 0 if weight is None else len(weight))
    maps = Maps(captured.samples if arrays or not site.conditions else 0, arrays)
    if weight is None:
        assert site.partner is not None
        square = captured.maps[site.partner_key].get("square")
        rms = np.ones(indices.size) if square is None else np.sqrt(square[indices])
        blocks, taps, name = rms[None, :, None], 1, site.tensor
    else:
        assert site.form is not None
        blocks, taps = weight[indices].reshape(1, indices.size, -1), site.form.taps
        name = site.node.inputs[site.form.weight]
    return Slot(
        tensor=name,
        axis=site.label.pack,
        blocks=blocks,
        role=[(site.node.op, site.position)],
        units=units,
        size=group.size,
        maps=maps,
        taps=taps,
        classes=group.classes[units],
        pairs=weight is None,
    )


def _arrays(
    site: ContractionInput, captured: CapturedMaps, indices: Ids, channels: int
) -> dict[str, NDArray[np.float64]]:
    """Return the site's statistics of the chosen channels."""
    takes_all = not channels or indices.size == channels
    arrays: dict[str, NDArray[np.float64]] = {}
    for name, value in captured.maps.get(site.maps_key, {}).items():
        arrays[name] = value if takes_all else (value[np.ix_(indices, indices)] if value.ndim == 2 else value[indices])
    for name, value in captured.columns.get(site.columns_key, {}).items():
        if takes_all or not value.ndim:
            arrays[name] = value
        elif len(value) == 1:  # one part: the chosen channels' columns are a matrix of their own
            taps = value.shape[-1] // channels
            index = (indices[:, None] * taps + np.arange(taps)).ravel()
            arrays[name] = value[:, index][..., index] if value.ndim == 3 else value[:, index]
    return arrays


def _weight(table: Table, after: Survivors, site: ContractionInput, positions: Ids) -> NDArray[Any] | None:
    """Return the site's weight as [surviving channels, taps, outputs] with 0 for removed outputs; None for a pair."""
    if site.form is None:
        return None
    name = site.node.inputs[site.form.weight]
    value = numbers_at(table.graph, site.node, site.form.weight)
    if value is None or value.dtype.kind not in "fV":
        return None
    value = align_array(value) if value.dtype == np.float64 else value.astype(np.float32)
    for label in table.get(name):
        keep = after.mask(label)
        if keep is not None:
            value = np.where(keep, value, np.zeros((), value.dtype))
    matrix = site.form.matrix(value)
    parts, columns, outputs = matrix.shape
    channels = matrix.reshape(parts * columns // site.form.taps, site.form.taps, outputs)
    all_positions = site.channels(np.arange(site.label.ids.size).reshape(site.label.ids.shape))
    place = np.empty(all_positions.size, np.int64)
    place[all_positions] = np.arange(all_positions.size)
    return channels if len(positions) == len(all_positions) else channels[place[positions]]
