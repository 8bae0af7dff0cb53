"""Where feature maps matter: every place where a contraction sums over removable channels of an activation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.contractions import Form
from onnxprune.graph.cost import constant_source
from onnxprune.graph.view import Node
from onnxprune.labels.label import Ids, Label
from onnxprune.operators.context import Step, Table
from onnxprune.operators.registry import lookup, rule_of
from onnxprune.rewrite.after import After
from onnxprune.selection.dequantize import decoder


@dataclass(frozen=True, slots=True)
class Site:
    """One activation in front of one contraction.

    Attributes:
        node: the contraction. position: which of its inputs the activation is.
        tensor: name of the activation. axes: its axes that channels lie along, in the channels' order.
        label: the label that covers the summed axis.
        form: the contraction as a matrix product; None where the other operand is an activation too.
        partner: (tensor, axes) of that other activation.
        where: conditions under which the contraction runs, (tensor, value); it sees nothing of other samples.
        decode: turns values of the activation into numbers, where it holds codes.
    """

    node: Node
    position: int
    tensor: str
    axes: tuple[int, ...]
    label: Label
    form: Form | None = None
    partner: tuple[str, tuple[int, ...]] | None = None
    where: tuple[tuple[str, bool], ...] = ()
    decode: Callable[[NDArray[Any]], NDArray[Any]] | None = None

    @property
    def maps_key(self) -> Hashable:
        """Sites with equal keys see the same feature maps."""
        return self.tensor, self.axes, self.where

    @property
    def partner_key(self) -> Hashable:
        """The same for the feature maps of the other activation."""
        assert self.partner is not None
        return *self.partner, self.where

    @property
    def columns_key(self) -> Hashable:
        """Sites with equal keys see the same columns."""
        return self.tensor, None if self.form is None else self.form.key, self.where

    def channels(self, ids: Ids) -> Ids:
        """An array of the label's shape as [channels]."""
        return in_order(ids, self.axes)


def sites(table: Table, component: Ids) -> Iterator[Site]:
    """All sites of a graph, in graph order.

    Args:
        table: the labels. component: the unit that every atom belongs to.
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
                        yield replace(site, where=where) if (where := table.graph.conditions(node.index)) else site


def _with_weight(table: Table, node: Node, position: int, label: Label) -> Site | None:
    """The site in front of a product with a weight, where the label tells all of its channels apart."""
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
        return Site(node, position, encoder.inputs[0], form.axes, label, form)
    return Site(node, position, name, form.axes, label, form, decode=decoder(table.graph, node, position))


def _pair(table: Table, component: Ids, node: Node, position: int, label: Label) -> Site | None:
    """The site in front of a product of two activations: the same units lie in both (queries and keys)."""
    if len(node.inputs) != 2 or label.pack != label.axes[-1]:
        return None
    other = node.inputs[1 - position]
    mine = component[in_order(label.ids, label.axes)]
    for candidate in table.get(other):
        order = (*candidate.outer(), candidate.pack)
        if candidate.ids.size == mine.size and np.array_equal(component[in_order(candidate.ids, order)], mine):
            return Site(node, position, node.inputs[position], label.axes, label, None, (other, order))
    return None


def in_order(array: Ids, axes: tuple[int, ...]) -> Ids:
    """An array of size 1 outside ``axes`` as a flat one, in their order."""
    return np.transpose(array, [*axes, *(a for a in range(array.ndim) if a not in axes)]).reshape(-1)


def surviving(after: After, label: Label) -> Ids:
    """Positions of the label (flat, of its shape) that survive, as they lie in the cut tensor."""
    keep = after.mask(label)
    ids = np.arange(label.ids.size).reshape(label.ids.shape)
    if keep is None:
        return ids
    kept = keep
    for axis in label.outer():
        alive = np.flatnonzero(kept.any(axis=tuple(a for a in range(kept.ndim) if a != axis)))
        ids, kept = ids.take(alive, axis=axis), kept.take(alive, axis=axis)
    width = int(kept.sum(axis=label.pack).max())
    order = np.argsort(~kept, axis=label.pack, kind="stable").take(np.arange(width), axis=label.pack)
    return np.take_along_axis(ids, order, axis=label.pack)
