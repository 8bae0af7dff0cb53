"""Dead units: their removal changes no output for any input; constants that they add are folded into biases.

A removal equals a multiplication by 0 in front of every operator that sums over removed channels. It changes nothing
where the channels are 0 there already, or where nothing reads them: all weights that multiply them, towards units that
are read themselves, are 0. Which units are read follows backwards from the outputs: of units that only read each other
(a recurrence, a residual stream) none is. A channel that is the same number everywhere adds that number times its
weights to all outputs of a layer: that is a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.constants import Array, Constants, Known, Mask, Product
from onnxprune.channels.groups import Group, Units
from onnxprune.graph.view import Node
from onnxprune.labels.label import Ids, Label
from onnxprune.operators.context import Step
from onnxprune.operators.contractions import Form
from onnxprune.operators.registry import rule_of

Folding = Callable[[Node, Form], str]
"""Return the reason why a constant cannot be added to the outputs of a layer; empty where it can."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Channels of a layer's data that are constant, to be replaced by a bias.

    Attributes:
        node: the layer.
        channels: their positions among the channels of the data, in the order of the layer's matrix.
        values: their values.
    """

    node: Node
    channels: Ids
    values: NDArray[np.float64]


@dataclass(slots=True)
class DeadUnits:
    """The dead units of a model.

    Attributes:
        components: mask over components that may be removed together.
        selected: mask over components that are removed: groups keep their form, and a unit each.
        folds: constants that have to become biases before.
        num_dead, num_selected: number of such units in groups that can be pruned.
        reasons: {node: why its constant channels stay}, with the number of channels.
    """

    components: Mask
    selected: Mask
    folds: list[Fold] = field(default_factory=list)
    num_dead: int = 0
    num_selected: int = 0
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)


def find_dead(analysis: Analysis, foldable: Folding) -> DeadUnits:
    """Find the dead units of a model.

    Args:
        analysis: analysis of the model.
        foldable: function that returns why a layer takes no bias; empty where it does.
    """
    constants = Constants(analysis.graph, analysis.facts)
    readers = [r for node in analysis.graph.steps for r in _readers(analysis, constants, node, foldable)]
    is_read = _spread(analysis.units, readers)
    dead = DeadUnits(~is_read, select(analysis.units, ~is_read))
    for group in analysis.units.groups:
        if group.prunable:
            dead.num_dead += int(dead.components[group.units].sum())
            dead.num_selected += int(dead.selected[group.units].sum())
    closed = analysis.units.close(dead.selected)
    for reader in readers:
        fold, stuck = reader.fold(closed), reader.stuck(is_read)
        dead.folds += [] if fold is None else [fold]
        if stuck:
            dead.reasons[reader.node.label] = stuck, reader.refusal
    return dead


def _spread(units: Units, readers: Sequence[_Layer | _Sum]) -> Mask:
    """Return a mask over the components that are read, the smallest set that follows from those that have to stay."""
    is_read = units.frozen | (units.group_of < 0)
    for row in units.atoms.rows:  # rows without a group of their own follow their cells
        is_read[units.component[row.rows]] &= units.frozen[units.component[row.rows]]
    before = -1
    while before != (before := int(is_read.sum())):
        for reader in reversed(readers):
            reader.mark(is_read)
        for row in units.atoms.rows:
            above, cells = units.component[row.rows], units.component[row.cells]
            is_read[above] |= is_read[cells].any(axis=1)
    return np.asarray(is_read)


def select(units: Units, dead: Mask) -> Mask:
    """Return the dead components to remove: whole rows first, then the same share of every class of a group.

    Args:
        units: units and groups of the model.
        dead: mask over components.
    """
    selected = np.zeros_like(dead)
    for group in sorted(units.groups, key=lambda g: g.kind != "heads"):
        if not group.prunable or not group.exact:
            continue
        closed = units.close(selected)
        is_dead = dead[group.units] & ~closed[group.units]
        classes = [np.flatnonzero(group.classes == c) for c in range(int(group.classes.max(initial=0)) + 1)]
        if group.kind == "heads":
            is_dead = _without_last(classes, is_dead)
        else:
            is_dead = _even(group, [c for c in classes if not closed[group.units[c]].all()], is_dead)
        selected[group.units[is_dead]] = True
    return selected


def _without_last(classes: Sequence[Ids], is_dead: Mask) -> Mask:
    """Let the first unit of a class stay where all are dead."""
    result = is_dead.copy()
    for members in classes:
        if result[members].all():
            result[members[0]] = False
    return result


def _even(group: Group, classes: Sequence[Ids], is_dead: Mask) -> Mask:
    """Keep the same share of every class, and never the whole of it."""
    result = np.zeros_like(is_dead)
    if not classes:
        return result
    share = min(int(is_dead[c].sum()) * group.steps // c.size for c in classes)
    share = min(share, group.steps - 1)
    for members in classes:
        dead = members[is_dead[members]]
        result[dead[dead.size - share * members.size // group.steps :] if share else dead[:0]] = True
    return result


# -- who reads what ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Layer:
    """A product of data with constants.

    Attributes:
        node, form: the layer.
        rows: components of the data's channels, an array [..., channels] for every label along them.
        is_weighted: whether a channel has a weight towards an output, [parts, channels / parts, outputs / parts].
        output_ids: components along the outputs, arrays [parts, outputs / parts].
        data: values of the channels that are constant.
        usable: channels that are 0, or a constant that the layer's bias can take.
        refusal: why constants cannot become a bias.
    """

    node: Node
    form: Form
    rows: list[Ids]
    is_weighted: Mask
    output_ids: list[Ids]
    data: Known | None
    usable: Mask
    refusal: str

    def _weighted(self, is_read: Mask) -> Mask:
        """Return a mask over the channels that have a weight towards outputs that are read."""
        towards = self.is_weighted
        for ids in self.output_ids:
            towards = towards & is_read[ids][:, None, :]
        return np.asarray(towards.any(axis=2).reshape(-1))

    def mark(self, is_read: Mask) -> None:
        """Mark the units that the layer reads."""
        channels = self._weighted(is_read) & ~self.usable
        for ids in self.rows:
            is_read[ids[..., channels]] = True

    def fold(self, removed: Mask) -> Fold | None:
        """Return the removed channels whose constants have to become a bias."""
        if self.data is None:
            return None
        channels = self._weighted(~removed) & self.usable & (self.data.value != 0) & self._removed(removed)
        where = np.flatnonzero(channels)
        return Fold(self.node, where, self.data.value[where].astype(np.float64)) if where.size else None

    def _removed(self, removed: Mask) -> Mask:
        result = np.zeros(self.usable.size, bool)
        for ids in self.rows:
            result |= removed[ids].reshape(-1, ids.shape[-1]).all(axis=0)
        return result

    def stuck(self, is_read: Mask) -> int:
        """Return the number of channels that are constant, are read, and cannot become a bias."""
        if self.data is None or not self.refusal:
            return 0
        return int((self.data.known & ~self.usable & self._weighted(is_read)).sum())


@dataclass(slots=True)
class _Sum:
    """Any other sum over channels: it reads the channels of its operands that are not 0.

    Attributes:
        node: the operator.
        operands: for every operand pairs of components and whether they are not 0 there, of one shape, and components
            that have to be read for that to matter, which broadcast to it.
        is_product: whether one operand that is 0 suffices.
        constants: components of the data that are constant, but not 0.
        refusal: why these cannot become a bias.
    """

    node: Node
    operands: list[list[tuple[Ids, Mask, list[Ids]]]]
    is_product: bool
    constants: Ids
    refusal: str = "the operator sums over it and has no bias"

    def fold(self, removed: Mask) -> Fold | None:
        """Return None: there is no bias."""
        return None

    def stuck(self, is_read: Mask) -> int:
        """Return the number of units that are constant and read."""
        return int(is_read[self.constants].sum())

    def mark(self, is_read: Mask) -> None:
        """Mark the units that the operator reads."""
        marks = [self._marked(operand, is_read) for operand in self.operands]
        if not self.is_product:
            for _, marked in marks:
                is_read |= marked
            return
        present = np.logical_or.reduce([here for here, _ in marks])
        for here, marked in marks:
            present &= marked | ~here
        is_read |= present

    @staticmethod
    def _marked(operand: list[tuple[Ids, Mask, list[Ids]]], is_read: Mask) -> tuple[Mask, Mask]:
        """Return a mask over the components of an operand, and one over those that are not 0 there."""
        here, marked = np.zeros_like(is_read), np.zeros_like(is_read)
        for ids, nonzero, towards in operand:
            here[ids] = True
            matters = nonzero
            for other in towards:
                matters = matters & is_read[other]
            marked[np.broadcast_to(ids, matters.shape)[matters]] = True
        return here, marked


def _readers(analysis: Analysis, constants: Constants, node: Node, foldable: Folding) -> list[_Layer | _Sum]:
    """Return the sum that a node computes."""
    table, component = analysis.table, analysis.units.component
    if not any(table.get(n) for n in node.inputs if n):
        return []
    rule, step = rule_of(node), Step(node, table)
    entries = rule.contracted_axes(step)
    if not entries:
        return []
    readers: list[_Layer | _Sum] = []
    product = constants.product(node)
    if product is not None:
        summed = product.form.summed_axes(step.shape(product.form.weight))
        layer = _layer(analysis, constants, step, product, summed, foldable)
        if layer is not None:
            readers.append(layer)
            covered = {product.form.data: set(product.form.axes), product.form.weight: summed}
            entries = [(i, axes) for i, axes in entries if not set(axes) <= covered.get(i, set())]
    operands, stuck = [], []
    for i, axes in entries:
        labels = [x for x in table.get(node.inputs[i]) if set(x.axes) & set(axes)]
        # The rows of a recurrence's weights are outputs; axes of other weights may all be summed over, in one product.
        towards = table.get(node.inputs[i]) if rule.several_directions else ()
        towards = tuple(x for x in towards if not set(x.axes) & set(axes))
        neutral = rule.neutral(step, i)
        operands.append([_operand(constants, component, node.inputs[i], x, neutral, towards) for x in labels])
        stuck += [_nonzero_constants(constants, component, node.inputs[i], x) for x in labels]
    if any(operands):
        readers.append(_Sum(node, operands, rule.multiplies, np.unique(np.concatenate(stuck))))
    return readers


def _nonzero_constants(constants: Constants, component: Ids, name: str, label: Label) -> Ids:
    """Return the components of a label that are constant in a tensor that depends on the inputs, but not 0."""
    known = None if name in constants.graph.weights else constants.get(name)
    if known is None or known.known.all():
        return np.zeros(0, np.int64)
    here = known.known & (known.value != 0)
    shape = np.broadcast_shapes(label.ids.shape, here.shape)
    return np.asarray(np.broadcast_to(component[label.ids], shape)[np.broadcast_to(here, shape)])


def _layer(
    analysis: Analysis, constants: Constants, step: Step, product: Product, summed: set[int], foldable: Folding
) -> _Layer | None:
    """Return a product as a reader; None where its data have no channels, or its weight is stored in another form."""
    form, component, table, node = product.form, analysis.units.component, analysis.table, step.node
    name, shape = node.inputs[form.data], analysis.facts.shape(node.inputs[form.data])
    parts, channels, taps, _ = product.matrix.shape
    if shape is None or any(shape[a] is None for a in form.axes):
        return None
    if int(np.prod([shape[a] for a in form.axes])) != parts * channels:
        return None
    rows = [_along(component[x.ids], form.axes, shape) for x in table.get(name) if set(x.axes) & set(form.axes)]
    weight_shape, output_ids = step.shape(form.weight), []
    for label in table.get(node.inputs[form.weight]):
        # By axes, not by units: channels that are all summed over may be one unit, and are no outputs for that.
        if summed.isdisjoint(label.axes) and all(m in (1, n) for m, n in zip(label.ids.shape, weight_shape)):  # noqa: B905
            ids = np.broadcast_to(component[label.ids].astype(np.int32), weight_shape)
            output_ids.append(form.matrix(ids).reshape(parts, channels, taps, -1)[:, 0, 0].astype(np.int64))
    data = constants.channels(name, form.axes)
    usable, refusal = np.zeros(parts * channels, bool), ""
    if data is not None:
        zero = data.known & (data.value == 0)
        refusal = _refusal(node, form, foldable) if (data.known & ~zero).any() else ""
        usable = data.known if not refusal else zero
    is_weighted = np.asarray((product.matrix != 0).any(axis=2))
    return _Layer(node, form, rows, is_weighted, output_ids, data, np.asarray(usable), refusal)


def _refusal(node: Node, form: Form, foldable: Folding) -> str:
    """Return the reason why a constant of a layer's data cannot become a bias."""
    if not form.is_uniform:
        return "its windows reach beyond the data, where zeros take the place of the constant"
    return foldable(node, form)


def _along(ids: Ids, axes: Sequence[int], shape: Sequence[int]) -> Ids:
    """Return components [..., channels] of the channels along some axes, in their order."""
    full = np.broadcast_to(ids, [shape[a] if a in axes else n for a, n in enumerate(ids.shape)])
    others = [a for a in range(full.ndim) if a not in axes]
    return np.transpose(full, [*others, *axes]).reshape(*(full.shape[a] for a in others), -1)


def _operand(
    constants: Constants, component: Ids, name: str, label: Label, neutral: str | None, towards: Sequence[Label]
) -> tuple[Ids, Mask, list[Ids]]:
    """Return the components of a label, where they are not 0, and those that have to be read for that to matter."""
    ids, known = component[label.ids], constants.get(name)
    zero: Array | int | None = 0 if neutral is None else constants.full_value(neutral)
    if known is None or zero is None or np.size(zero) != 1:
        return ids, np.ones(ids.shape, bool), []
    shape = np.broadcast_shapes(ids.shape, known.value.shape)
    nonzero = np.broadcast_to(~(known.known & (known.value == np.reshape(zero, ()))), shape)
    others = [component[x.ids] for x in towards] if name in constants.graph.weights else []
    return ids, np.asarray(nonzero), others


__all__ = ["DeadUnits", "Fold", "find_dead", "select"]
