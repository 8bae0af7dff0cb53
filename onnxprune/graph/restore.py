"""Undo preparations that pruning did not need: the saved model keeps every node that did not have to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.canonical import Fold, Hoist
from onnxprune.graph.view import Graph, Node
from onnxprune.io import markers
from onnxprune.io.constants import constant_node, has_bare_initializers, placeholder, weight_from_constant
from onnxprune.io.weights import ArrayWeight, Weight

T = TypeVar("T")
Target = tuple[NDArray[np.bool_], NDArray[np.int64]]
"""A reshape target: which entries are those of the original one, and the values of the others."""


def restore(
    proto: onnx.ModelProto,
    weights: dict[str, Weight],
    original: Graph,
    folds: Sequence[Fold] = (),
    hoists: Sequence[Hoist] = (),
) -> None:
    """Put original nodes back, in place, where they can express the pruned model.

    Args:
        proto: the pruned model; changed in place.
        weights: its weights by name; changed in place.
        original: the graph before its preparation.
        folds: folds to undo where the folded weights are unchanged.
        hoists: hoisted selections to undo where every part lost the same share.
    """
    if not folds and not hoists:
        return
    model = _Model(proto, weights, original)
    for item in hoists:
        model.suspects.update(name for node in item.nodes for name in node.inputs)
        _unhoist(model, item)
    for fold in folds:
        _unfold(model, fold)
    model.finish()


class _Model:
    """A pruned model under restoration; nodes by their first output."""

    def __init__(self, proto: onnx.ModelProto, weights: dict[str, Weight], original: Graph) -> None:
        self.proto, self.weights, self.original = proto, weights, original
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.initializers = {t.name: t for t in proto.graph.initializer}
        self.infos = {i.name: i for i in proto.graph.value_info}
        self._names: dict[str, tuple[list[str], list[str]]] = {}
        for node in proto.graph.node:
            self.add(node)
        self.suspects = {name for inputs, _ in self._names.values() for name in inputs}
        """The tensors that were read before the change."""

    def value(self, name: str) -> NDArray[Any] | None:
        """Return the value of a constant, None for other tensors."""
        weight = self.weights.get(name)
        if weight is None and name in self.producer:
            weight = weight_from_constant(self.producer[name])
        return None if weight is None else weight.read()

    def changed(self, name: str) -> bool:
        """Return whether a constant of the original still exists with other values."""
        if name in self.original.producer:
            return self.edited(self.original.producer[name])
        return name in self.weights and self.weights[name] is not self.original.weights.get(name)

    def edited(self, node: Node) -> bool:
        """Return whether a node of the original still exists in another form."""
        candidate = self.producer.get(next(filter(None, node.outputs), ""))
        return candidate is not None and candidate != node.proto

    def add(self, node: onnx.NodeProto) -> None:
        """Add a node behind the others, or in the place of one with the same output."""
        outputs: list[str] = list(node.output)
        key = next(filter(None, outputs), "")
        self.nodes[key] = node
        self._names[key] = list(node.input), outputs
        for name in outputs:
            self.producer[name] = node

    def constant(self, stem: str, value: NDArray[Any]) -> str:
        """Add a constant and return its name."""
        name = self.free(stem)
        weight = ArrayWeight(name, value)
        if has_bare_initializers(self.proto):
            self.initializers[name], self.weights[name] = placeholder(weight), weight
        else:
            self.add(constant_node(weight))
        return name

    def free(self, stem: str) -> str:
        """Return a name that neither the model nor the original uses."""
        name, k = stem, 1
        used_names = (self.producer, self.initializers, self.original.producer, self.original.weights)
        while any(name in names for names in used_names):
            name, k = f"{stem}{k}", k + 1
        return name

    def describe(self, names: Iterable[str]) -> None:
        """Restore the original's declared shapes of tensors that are restored."""
        back = set(names) - self.infos.keys()
        self.infos.update({i.name: i for i in self.original.proto.graph.value_info if i.name in back})

    def _place(self, key: str) -> int | None:
        """Return the index of the original's node with the same first output."""
        for name in self._names[key][1]:
            if name in self.original.producer:
                return self.original.producer[name].index
        return None

    def finish(self) -> None:
        """Sort nodes into their original order, and remove those without readers."""
        order, place = [], len(self.original.nodes)
        for key in reversed(self.nodes):
            known = self._place(key)
            place = place if known is None else known  # new nodes stand in front of their reader
            order.append((place, key))
        order.reverse()
        order.sort(key=lambda item: item[0])
        keys = [key for _, key in order]
        uses = Counter(self.original.captured)
        uses.update([o.name for o in self.proto.graph.output])
        uses.update(chain.from_iterable(self._names[key][0] for key in keys))
        live_nodes = []
        # Backwards: the inputs of a node without readers may have none either, and come before it.
        for key in reversed(keys):
            inputs, outputs = self._names[key]
            outputs_made = [o for o in outputs if o]
            marker = self.nodes[key].domain == markers.DOMAIN
            if marker or self.suspects.isdisjoint(outputs_made) or any(uses[o] for o in outputs_made):
                live_nodes.append(self.nodes[key])
            else:
                uses.subtract(inputs)
        unused = {name for name in self.initializers if not uses[name] and name in self.suspects}
        for name in unused:
            self.weights.pop(name, None)
        live_nodes.reverse()
        tensors = (t.name for t in self.original.proto.graph.initializer)
        infos = (i.name for i in self.original.proto.graph.value_info)
        graph = self.proto.graph
        _refill(graph.node, live_nodes)
        _refill(graph.initializer, [t for n, t in _in_order(self.initializers, tensors) if n not in unused])
        _refill(graph.input, [i for i in graph.input if i.name not in unused])
        _refill(graph.value_info, [info for _, info in _in_order(self.infos, infos)])


def _refill(container: Any, messages: list[Any]) -> None:
    """Replace the messages of a repeated field; the new ones may be among the old ones, whose memory they share."""
    del container[:]
    container.extend(messages)


def _in_order(items: dict[str, T], order: Iterable[str]) -> list[tuple[str, T]]:
    """Sort items by the order of their names, those without a place last."""
    place = {name: k for k, name in enumerate(order)}
    return sorted(items.items(), key=lambda item: place.get(item[0], len(place)))


def _unfold(model: _Model, item: Fold) -> None:
    """Restore a folded computation where its result equals the folded weight."""
    if any(model.weights.get(name) is not weight for name, weight in item.folded.items()):
        return
    others = model.initializers.keys() - item.folded.keys()
    if any(o in others for node in item.nodes for o in node.outputs):
        return  # it passes through another folded weight, which was pruned
    graph = model.original
    if any(model.changed(name) for name in item.sources) or any(model.edited(node) for node in item.nodes):
        return  # its source also serves other nodes, and has changed
    for name in item.folded:
        del model.initializers[name], model.weights[name]
    for source in item.sources:
        if source in graph.producer:
            model.add(graph.producer[source].proto)
    for tensor in graph.proto.graph.initializer:
        if tensor.name in item.sources and tensor.name not in model.initializers:
            model.initializers[tensor.name] = tensor
            model.weights[tensor.name] = graph.weights[tensor.name]
    for node in item.nodes:
        model.add(node.proto)
    model.describe(o for node in item.nodes for o in node.outputs)


def _unhoist(model: _Model, item: Hoist) -> None:
    """Restore the reshape and its selections, where all parts have the same share of their sizes."""
    sizes = _split_sizes(model, item)
    targets = [_target(model, item, part.view) for part in item.parts]
    first = targets[0]
    if (
        sizes is None
        or first is None
        or any(s * item.sizes[0] != sizes[0] * n for s, n in zip(sizes, item.sizes, strict=True))
    ):
        return
    other_axes = np.arange(first[0].size) != item.axis
    if not all(t is not None and _same(t, first, other_axes) for t in targets):
        return
    removed = item.new_names.union(o for node in item.nodes for o in node.outputs)
    for key in [k for k in model.nodes if k in removed]:
        del model.nodes[key]
    reshape = onnx.NodeProto()
    reshape.CopyFrom(item.reshape.proto)
    is_whole = sizes == [s * item.stride for s in item.sizes]
    reshape.input[1] = _whole_target(model, item, first, other_axes, is_whole)
    model.add(reshape)
    for node in item.nodes[1:]:
        model.add(node.proto)
    if is_whole and reshape.input[1] == item.reshape.inputs[1]:
        model.describe(o for node in item.nodes for o in node.outputs)


def _split_sizes(model: _Model, item: Hoist) -> list[int] | None:
    """Return sizes of the parts after pruning."""
    node = model.producer.get(item.split)
    if node is None:
        return None
    for attribute in node.attribute:
        if attribute.name == "split":
            return list(attribute.ints)
    value = model.value(node.input[1]) if len(node.input) > 1 else None
    return None if value is None else [int(v) for v in value]


def _target(model: _Model, item: Hoist, view: str) -> Target | None:
    """Express the target of a part's reshape in terms of the original one."""
    node = model.producer.get(view)
    return None if node is None else _resolve(model, item, node.input[1])


def _resolve(model: _Model, item: Hoist, name: str) -> Target | None:
    """Express a target in terms of the original one, through the Where nodes that hoisting and pruning added."""
    value = model.value(name)
    if value is not None:
        return np.zeros(value.shape, bool), value
    if name == item.reshape.inputs[1]:
        return np.ones(item.rank, bool), np.zeros(item.rank, np.int64)
    node = model.producer.get(name)
    if node is None or node.op_type != "Where":
        return None
    mask, base, fixed = model.value(node.input[0]), _resolve(model, item, node.input[1]), model.value(node.input[2])
    if mask is None or fixed is None or base is None:
        return None
    return mask & base[0], np.where(mask, base[1], fixed)


def _same(first: Target, second: Target, other_axes: NDArray[np.bool_]) -> bool:
    fixed = other_axes & ~first[0]
    return bool((first[0] == second[0])[other_axes].all() and (first[1] == second[1])[fixed].all())


def _whole_target(model: _Model, item: Hoist, target: Target, other_axes: NDArray[np.bool_], is_whole: bool) -> str:
    """Return the name of a target like a part's except for the entry of the parts' axis, which is the original's."""
    other_mask, fixed = target
    name = item.reshape.inputs[1]
    weight = model.original.weights.get(name)
    if weight is not None:
        value = np.where(other_axes, fixed, weight.read())
        return name if np.array_equal(value, weight.read()) else model.constant(f"{name}_cut", value)
    if other_mask[other_axes].all() and (item.literal or is_whole):
        return name
    value = np.where(other_axes, fixed, sum(item.sizes))
    if not other_mask[other_axes].any():
        return model.constant(f"{name}_cut", value)
    mask, sizes = model.constant(f"{name}_dynamic", other_mask & other_axes), model.constant(f"{name}_sizes", value)
    result = model.free(f"{name}_for_{item.reshape.outputs[0]}")
    model.add(onnx.helper.make_node("Where", [mask, name, sizes], [result], name=f"{item.reshape.label}_target"))
    return result
