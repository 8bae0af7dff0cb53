"""Interfaces of a rule: Step while labels are propagated, Cut while nodes are rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node
from onnxprune.labels import algebra
from onnxprune.labels.algebra import broadcast, merge
from onnxprune.labels.atoms import Atoms, Reason
from onnxprune.labels.label import NONE, Ids, Label, Labels, covering, drop
from onnxprune.operators.registry import Move, rule_of

# Element types of constants that are weights: floats, and the integers of quantised weights.
_WEIGHT_KINDS = "fV"
_QUANTISED = {"int8", "uint8", "int16", "uint16", "int32", "int4", "uint4", "int2", "uint2"}


@cache
def _holds_weights(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in _WEIGHT_KINDS or dtype.name in _QUANTISED


def without_axis(atoms: Atoms, labels: Labels, axis: int, barrier: int) -> Labels:
    """Return ``labels`` without ``axis``, whose size is frozen."""
    label = covering(labels, axis)
    if label is None:
        return labels
    atoms.fix_axis(label, axis, barrier)
    other_labels = tuple(x for x in labels if x is not label)
    other_axes = tuple(a for a in label.axes if a != axis)
    if not other_axes:
        return other_labels
    pack = label.pack if label.pack in other_axes else other_axes[-1]
    return (*other_labels, Label(atoms.project(label, other_axes), pack))


def _repeats(label: Label, axis: int, period: int) -> bool:
    """Return whether the atoms along an axis repeat with ``period``."""
    if period < 1 or label.ids.shape[axis] % period:
        return False
    ids = np.moveaxis(label.ids, axis, -1)
    parts = ids.reshape(*ids.shape[:-1], -1, period)
    return bool((parts == parts[..., :1, :]).all())


@dataclass(frozen=True, slots=True)
class Opened:
    """Sizes that may change although the interface of the model depends on them, because the caller changes it as well.

    Attributes:
        lookups: (first output of an operator, input) of tables that lose rows: their index is renumbered.
        outputs: outputs of the model whose last axis may lose positions.
        choices: first outputs of operators that choose, or take shares, among positions that may go as if they had the
            least score.
        tied: axes with the same positions, (tensor, axis) of each.
    """

    lookups: frozenset[tuple[str, int]] = frozenset()
    outputs: frozenset[str] = frozenset()
    choices: frozenset[str] = frozenset()
    tied: tuple[tuple[tuple[str, int], ...], ...] = ()


class Table:
    """Labels of every tensor visited so far; the labels of a constant are created at first access."""

    def __init__(
        self,
        graph: Graph,
        facts: Facts,
        atoms: Atoms,
        approximate: bool = False,
        resizable: Mapping[str, Sequence[tuple[tuple[int, ...], int]]] | None = None,
        opened: Opened | None = None,
    ) -> None:
        self.graph, self.facts, self.atoms, self.approximate = graph, facts, atoms, approximate
        self.opened = opened or Opened()
        self.resizable = resizable or {}
        """Inputs and outputs that may lose channels: (axes, pack axis) of each label that an input is born with."""
        self._labels: dict[str, Labels] = {}
        self._sequences: dict[str, tuple[Labels, ...]] = {}

    def get(self, name: str) -> Labels:
        """Return the labels of a tensor, or of all tensors in a sequence; every axis of a weight gets its own atoms."""
        known = self._labels.get(name)
        if known is not None:
            return known
        if name in self._sequences:
            return tuple([label for labels in self._sequences[name] for label in labels])
        weight = self.graph.weights.get(name)
        labels: Labels = NONE
        if weight is not None and _holds_weights(weight.dtype) and not self._sizes_alone(name):
            shape = weight.shape
            labels = tuple([self._born(n, name, axis, len(shape)) for axis, n in enumerate(shape) if n > 1])
        elif name in self.resizable and name in self.graph.inputs:
            labels = tuple([self._born_on_axes(name, *spans) for spans in self.resizable[name]])
        self._labels[name] = labels
        return labels

    def _born_on_axes(self, name: str, axes: tuple[int, ...], pack: int) -> Label:
        """Return a label over some axes of an input, each position with an atom of its own."""
        shape = tuple(n if axis in axes else 1 for axis, n in enumerate(self.facts.shape(name)))
        label = Label(self.atoms.new(int(np.prod(shape)), name, pack).reshape(shape), pack)
        self.atoms.view(label)
        return label

    def _sizes_alone(self, name: str) -> bool:
        """Return whether only the sizes of a tensor, perhaps moved, are read: pruning it gains nothing."""
        readers = self.graph.consumers.get(name)
        if not readers or name in self.graph.captured or name in self.graph.outputs:
            return False
        for node, i in readers:
            if node.op in ("Shape", "Size") and not node.domain:
                continue
            if i or rule_of(node).moves is None or not all(self._sizes_alone(o) for o in node.outputs):
                return False
        return True

    def _born(self, n: int, name: str, axis: int, rank: int) -> Label:
        ids = self.atoms.new(n, name, axis)
        return Label(ids.reshape((1,) * axis + (n,) + (1,) * (rank - axis - 1)), axis, self.atoms.count - n)

    def set(self, name: str, labels: Labels) -> None:
        """Set the labels of a tensor and remember its grids."""
        labels = tuple([x for x in labels if x.axes])
        if not labels:
            self._labels[name] = labels
            return
        if self.facts.is_open(name):
            labels = self._without_open_axes(name, labels)
        shape = self.facts.shape(name)
        for label in labels:
            for n, m in zip(label.ids.shape, shape, strict=True):
                if n not in (1, m) and m is not None:
                    raise ValueError(f"label of shape {label.ids.shape} on {name!r} of shape {shape}")
            if label.is_grid:
                self.atoms.view(label)
        self._labels[name] = labels

    def _without_open_axes(self, name: str, labels: Labels) -> Labels:
        """Drop labels of axes whose channels differ between probes; freeze these axes and those of their weights.

        An axis whose size follows the size of an input can only be labelled where atoms repeat (heads merged with the
        batch): the positions of a table that is read up to a dynamic length differ from call to call.
        """
        for axis in {a for label in labels for a in label.axes}:
            label = covering(labels, axis)
            if (
                label is None
                or not self.facts.varies(name, axis)
                or _repeats(label, axis, self.facts.period(name, axis))
            ):
                continue
            node = self.graph.producer.get(name)
            label_of, kind = ("", "") if node is None else (node.label, node.kind)
            why = self.atoms.barrier(
                Reason.DYNAMIC_SHAPE, label_of, kind, "the size of this axis follows that of an input"
            )
            labels = without_axis(self.atoms, labels, axis, why)
        return labels

    def set_sequence(self, name: str, elements: Sequence[Labels]) -> None:
        """Set the labels of the tensors in a sequence."""
        self._sequences[name] = tuple(elements)

    def sequence(self, name: str) -> list[tuple[Labels, Any]] | None:
        """Return (labels, shape) of every tensor in a sequence; None where they are not known."""
        shapes = self.facts.elements(name)
        labels = self._sequences.get(name)
        if shapes is None or (labels is not None and len(labels) != len(shapes)):
            return None
        return list(zip(labels or [NONE] * len(shapes), shapes, strict=True))

    def items(self) -> Mapping[str, Labels]:
        """Return all labels set or created so far."""
        return self._labels


class Step:
    """Interface to one node during label propagation."""

    def __init__(self, node: Node, table: Table) -> None:
        self.node, self.table, self.atoms = node, table, table.atoms
        self._read: set[int] = set()

    # -- inputs and attributes -------------------------------------------------------------------------------------

    def has(self, i: int) -> bool:
        """Return whether optional input ``i`` is present."""
        return i < len(self.node.inputs) and bool(self.node.inputs[i])

    def labels(self, i: int) -> Labels:
        """Return the labels of input ``i``; from then on the rule is responsible for them."""
        self._read.add(i)
        return self.table.get(self.node.inputs[i]) if self.has(i) else NONE

    def shape(self, i: int) -> tuple[int, ...]:
        """Return the shape of input ``i`` at the probe; () where unknown (the engine does not call rules then)."""
        return self.table.facts.shape(self.node.inputs[i]) or ()

    def out_shape(self, o: int = 0) -> tuple[int, ...]:
        """Return the shape of output ``o`` at the probe."""
        return tuple(self.table.facts.shape(self.node.outputs[o]) or ())

    def value(self, i: int) -> NDArray[Any] | None:
        """Return the value of input ``i`` where it is known and equal at every size of the inputs, else None."""
        return self.table.facts.static_value(self.node.inputs[i]) if self.has(i) else None

    def entries(self, i: int) -> list[int | None] | None:
        """Return integers of input ``i``, each None where it follows the size of an input; None where unknown."""
        return self.table.facts.entries(self.node.inputs[i]) if self.has(i) else None

    def weight(self, i: int) -> NDArray[Any] | None:
        """Return the value of input ``i`` where it is a weight of the model, of any size; it is read at this call."""
        weight = self.table.graph.weights.get(self.node.inputs[i]) if self.has(i) else None
        return None if weight is None else weight.read()

    def alone(self, i: int) -> bool:
        """Return whether input ``i`` is a weight whose only consumer is this input of this node."""
        graph, name = self.table.graph, self.node.inputs[i]
        readers = graph.consumers.get(name, ())
        return name in graph.weights and len(readers) == 1 and name not in graph.captured and name not in graph.outputs

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute or its default."""
        return self.node.attrs.get(name, default)

    # -- statements about labels -----------------------------------------------------------------------------------

    def set(self, o: int, labels: Labels) -> None:
        """Set the labels of output ``o``."""
        if o < len(self.node.outputs) and self.node.outputs[o]:
            self.table.set(self.node.outputs[o], labels)

    def reason(self, code: str, detail: str) -> int:
        """Return the index of a barrier at this node."""
        return self.atoms.barrier(code, self.node.label, self.node.kind, detail)

    def freeze(self, labels: Labels, code: str, detail: str) -> None:
        """Freeze these channels: none of them may be removed."""
        for label in labels:
            self.atoms.freeze(label.ids, self.reason(code, detail))

    def fix(self, labels: Labels, axis: int, code: str, detail: str) -> None:
        """Keep the size and order of ``axis`` so that positions along it align: rows of a grid lose the same cells."""
        label = covering(labels, axis)
        if label is not None:
            self.atoms.fix_axis(label, axis, self.reason(code, detail))
            self.tie(labels, axis)

    def tie(self, labels: Labels, axis: int) -> None:
        """Tie equal positions of the rows along ``axis`` of a grid.

        For operators that mix along ``axis``: if rows lost different cells, positions would meet other neighbours.
        Along the pack axis every row is compacted by itself and only mixes with itself.
        """
        label = covering(labels, axis)
        if label is not None and label.is_grid and axis != label.pack:
            self.atoms.project(label, tuple(a for a in label.axes if a != axis))

    def drop_axis(self, labels: Labels, axis: int, code: str, detail: str) -> Labels:
        """Return ``labels`` without ``axis``, whose size is frozen: its positions change meaning in the operator."""
        if covering(labels, axis) is None:
            return labels
        return without_axis(self.atoms, labels, axis, self.reason(code, detail))

    def fix_all_but(self, labels: Labels, keep: Sequence[int], code: str, detail: str) -> None:
        """Freeze the size of every labelled axis outside ``keep``."""
        others = {a for x in labels for a in x.axes if a not in keep}
        for axis in sorted(others) if others else ():
            self.fix(labels, axis, code, detail)

    def drop_all_but(self, labels: Labels, keep: Sequence[int], code: str, detail: str) -> Labels:
        """Return ``labels`` of the axes in ``keep`` alone; freeze the size of every other labelled axis."""
        for axis in sorted({a for x in labels for a in x.axes if a not in keep}):
            labels = self.drop_axis(labels, axis, code, detail)
        return labels

    def may_lose_rows(self, i: int) -> bool:
        """Return whether input ``i`` is a table whose index is renumbered with its rows."""
        return (self.node.outputs[0], i) in self.table.opened.lookups

    @property
    def may_lose_choices(self) -> bool:
        """Whether the operator chooses among positions that may go, or takes shares of them."""
        return self.node.outputs[0] in self.table.opened.choices

    def without_rows(self, labels: Labels, axis: int = 0) -> Labels:
        """Return the labels of a tensor that may lose positions along an axis without those, which are looked up."""
        rows = covering(labels, axis)
        if rows is None or not rows.is_grid:
            return labels if rows is None else drop(labels, rows)
        return self.drop_axis(labels, axis, Reason.FIXED_SIZE, "rows of this table are looked up by index")

    def approximate(self, labels: Labels, axis: int) -> bool:
        """Return whether normalising over a pruned ``axis`` is enabled; its groups are then marked as not exact."""
        label = covering(labels, axis)
        if self.table.approximate and label is not None:
            self.atoms.approximate.append(
                (label.ids.ravel(), self.reason(Reason.NORMALISED, "cut through a normalisation"))
            )
        return self.table.approximate

    def unite(self, a: Ids | None, b: Ids | None, what: str = "this axis") -> None:
        """Unite atoms at equal positions; where only one side is labelled, freeze its size."""
        if a is not None and b is not None:
            self.atoms.unite(a, b)
            return
        for ids in (a, b):
            if ids is not None:
                self.atoms.freeze(
                    ids, self.reason(Reason.UNLABELLED_OPERAND, f"{what} meets a tensor without removable channels")
                )

    # -- shorthands ------------------------------------------------------------------------------------------------

    def axis_ids(self, labels: Labels, axis: int) -> Ids | None:
        """Return 1-D atoms of an axis; other axes of a grid are tied or projected, see ``Atoms.project``."""
        label = covering(labels, axis)
        return None if label is None else self.atoms.project(label, (axis,)).ravel()

    def broadcast(self, inputs: Sequence[int]) -> Labels:
        """Return the labels of inputs that broadcast against each other into output 0."""
        return broadcast(
            self.atoms, [(self.labels(i), self.shape(i)) for i in inputs], len(self.out_shape()), self.reason
        )

    def merge(self, labels: Labels, label: Label) -> Labels:
        """Return ``labels`` joined by one more label of the same tensor."""
        return merge(self.atoms, labels, label, self.reason)

    def take(self, labels: Labels, axis: int, index: Ids) -> Labels:
        """Return labels of selected positions along an axis, which remains."""
        return algebra.take(self.atoms, labels, axis, index, self.reason)

    def axis(self, default: int = 0, rank: int | None = None) -> int:
        """Return the node's ``axis`` attribute as a non-negative number."""
        return int(self.attr("axis", default)) % (len(self.shape(0)) if rank is None else rank)

    def finish(self, operands: Sequence[int] = ()) -> None:
        """Freeze the labels of inputs that the rule did not read, and of operands that hold sizes or settings."""
        if not operands and self._read.issuperset(range(len(self.node.inputs))):
            return
        for i, name in enumerate(self.node.inputs):
            if not name or (i in self._read and i not in operands) or not self._matters(name):
                continue
            code = Reason.OPERAND if i in operands else Reason.UNSUPPORTED_FORM
            self.freeze(self.table.get(name), code, f"input {i} of {self.node.op} must keep its size")

    def _matters(self, name: str) -> bool:
        weight = self.table.graph.weights.get(name)
        return weight is None or bool(weight.shape)


class Cut:
    """Interface to one node during rewriting: sizes and values before (from the analysis) and after (from labels)."""

    def __init__(self, node: Node, step: Step, state: Any) -> None:
        self.node, self.before, self._state = node, step, state

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute or its default."""
        return self.node.attrs.get(name, default)

    def shape(self, i: int) -> tuple[int, ...]:
        """Return the new shape of input ``i``."""
        return tuple(self._state.shape(self.node.inputs[i]) or ())

    def out_shape(self, o: int = 0) -> tuple[int, ...]:
        """Return the new shape of output ``o``."""
        return tuple(self._state.shape(self.node.outputs[o]) or ())

    def touched(self, *names: str) -> bool:
        """Return whether a tensor loses channels; without names, whether any tensor of this node does."""
        return any(self._state.touched(n) for n in (names or (*self.node.inputs, *self.node.outputs)) if n)

    def keep(self, name: str, axis: int) -> NDArray[np.bool_] | None:
        """Return the mask of surviving positions along one axis, equal in every row; None where the axis is whole."""
        result: NDArray[np.bool_] | None = self._state.keep(name, axis)
        return result

    def survivors(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Slice an array with one entry per position of a tensor to the survivors."""
        result: NDArray[Any] = self._state.survivors(name, array)
        return result

    def kept_between(self, name: str, axis: int, start: int, stop: int) -> int:
        """Return the number of survivors among ``start:stop`` along an axis (per row, on a grid)."""
        return int(self._state.kept_between(name, axis, start, stop))

    def value(self, i: int) -> NDArray[Any] | None:
        """Return the value of operand ``i`` in the pruned model if the rule does not change it."""
        result: NDArray[Any] | None = self._state.value(self.node.inputs[i]) if self.before.has(i) else None
        return result

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute of the node."""
        self._state.set_attr(self.node, name, value)

    def set_input(self, i: int, value: NDArray[Any]) -> None:
        """Replace operand ``i`` by a constant of its own; a shared constant is unchanged."""
        self._state.set_input(self.node, i, value)

    def derive(self, i: int, shape: Sequence[int], function: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Replace input ``i``, a weight that only this node reads, by a function of it, computed at writing."""
        self._state.derive(self.node, i, tuple(int(n) for n in shape), function)

    def set_target(self, i: int, target: Sequence[int]) -> None:
        """Rewrite shape operand ``i`` to evaluate to ``target``; dynamic dimensions, 0 and -1 are preserved."""
        self._state.set_target(self.node, i, tuple(int(t) for t in target))

    def pick(self, i: int, axis: int, positions: Ids) -> None:
        """Select positions of operand ``i`` along an axis, by a Gather in front of the node."""
        self._state.pick(self.node, i, axis, positions)

    def add(self, i: int, value: NDArray[Any]) -> None:
        """Add a constant to operand ``i``, by an Add in front of the node."""
        self._state.add(self.node, i, value)

    def scale_input(self, i: int, factor: float) -> None:
        """Multiply operand ``i`` by a number: its constant where it is one, else by a Mul in front of the node."""
        self._state.scale_input(self.node, i, factor)

    def scale_output(self, o: int, factor: float) -> None:
        """Multiply output ``o`` by a number: within a constant that follows where one can take it, else by a Mul."""
        self._state.scale_output(self.node, o, factor)

    def pad_input(self, i: int, axis: int, size: int) -> None:
        """Pad operand ``i`` with zeros at the end of an axis up to ``size``."""
        self._state.pad_input(self.node, i, axis, size)

    def crop_output(self, o: int, sizes: Mapping[int, int]) -> None:
        """Leave the first positions of output ``o`` along some axes: {axis: number of positions}."""
        self._state.crop_output(self.node, o, sizes)

    def replace(self, op: str, inputs: int, **attributes: Any) -> None:
        """Replace the node by another operator of the same domain on its first ``inputs`` inputs."""
        self._state.replace(self.node, op, inputs, attributes)

    def fail(self, detail: str) -> None:
        """Reject the rewriting of this node: the groups that touch it are kept, with this reason."""
        self._state.fail(self.node, detail)


def owned(step: Step, i: int, axes: tuple[int, ...]) -> list[str] | None:
    """Return the names from input ``i`` back to its initializer or fill, if only this node reads them, else None.

    A dequantisation whose scales vary along one of ``axes`` ties positions of its own and ends the search.
    """
    graph = step.table.graph
    name: str | None = step.node.inputs[i] if step.has(i) else None
    chain = []
    reader: Node | None = step.node
    while name is not None and name not in graph.outputs and all(n is reader for n, _ in graph.consumers.get(name, ())):
        chain.append(name)
        producer = graph.producer.get(name)
        if name in graph.weights or (producer is not None and producer.op == "ConstantOfShape"):
            return None if name in graph.captured else chain
        reader = producer
        name = producer.inputs[0] if producer is not None and _passes(step, producer, axes) else None
    return None


def _passes(step: Step, node: Node, axes: tuple[int, ...]) -> bool:
    rule = rule_of(node)
    if not rule.decodes:
        return rule.moves in (Move.SAME, Move.CAST)
    rank = len(step.table.facts.shape(node.inputs[0]) or ())
    scale = step.table.facts.shape(node.inputs[1])
    if scale is None or len(scale) > 1:
        return False
    return sum(scale) <= 1 or int(node.attrs.get("axis", 1)) % rank not in axes


def override(step: Step, chain: list[str], labels: tuple[Label, ...], axes: tuple[int, ...]) -> None:
    """Set ``labels`` for every tensor of a chain, in place of its labels on ``axes``."""
    for link in chain:
        other_labels = tuple(x for x in step.table.get(link) if not set(x.axes) & set(axes))
        step.table.set(link, (*other_labels, *labels))
