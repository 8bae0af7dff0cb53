"""The analysis of one model: which channels can be pruned, in which groups, and the reasons that forbid the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from onnxprune.channels.groups import Group, Units, resolve
from onnxprune.channels.propagate import infer_by_rule, push_labels
from onnxprune.garbage import paused
from onnxprune.graph import cost
from onnxprune.graph.canonical import Fold, Hoist, fold, hoist, unshare
from onnxprune.graph.facts import Facts, study
from onnxprune.graph.probes import open_sizes
from onnxprune.graph.resized import Resizing
from onnxprune.graph.values import check_extents
from onnxprune.graph.view import Graph, Node
from onnxprune.io.interchange import ModelSource
from onnxprune.io.read import Loaded, load
from onnxprune.labels.atoms import Barrier, Reason
from onnxprune.labels.label import Ids, Label, covering
from onnxprune.operators.context import Opened, Table
from onnxprune.operators.registry import rule_of
from onnxprune.report.facts import LayerFacts, Network, NetworkNode

# Kernels and settings of operators are no channels: a user need not read that they stay.
_NOT_CHANNELS = {Reason.KERNEL, Reason.OPERAND}


@dataclass(frozen=True, slots=True)
class SlotView:
    """One axis of one tensor where units of a group appear; ``size`` is the length of the axis.

    ``at`` restricts it to one position of another axis, {axis: position}: the direction of a recurrent layer.
    """

    tensor: str
    axis: int
    size: int
    at: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, repr=False)
class GroupView:
    """One group as users see it. ``steps``: number of equal pruning steps; ``reason``: why it cannot be pruned."""

    id: int
    kind: str
    size: int
    steps: int
    prunable: bool
    reason: str
    name: str
    layers: list[str]
    slots: list[SlotView] = field(default_factory=list)

    def __repr__(self) -> str:
        state = "" if self.prunable else f", not prunable: {self.reason.partition(':')[0]}"
        return f"<Group {self.id}: {self.size} {self.kind} of {self.name}{state}>"


class Analysis:
    """A model with its labels, units and groups. Immutable: other choices and more frozen nodes give another analysis.

    Args:
        source: path, bytes or ModelProto, or a model that was read.
        input_shapes: sizes for dynamic inputs, {name: shape}.
        approximate: let groups run through normalisations that stay defined over fewer channels.
        resizing: inputs and outputs that may lose channels; None: all keep their sizes.
        opened: sizes of the interface that may change; None: none.

    Raises:
        OnnxpruneError: the model cannot be read, or an input shape or a pattern does not fit.
    """

    loaded: Loaded
    approximate: bool
    resizing: Resizing
    graph: Graph
    facts: Facts
    table: Table
    reshape_axis: str
    units: Units
    unshared: Graph
    copies: dict[str, str]
    folds: list[Fold]
    hoists: list[Hoist]
    _unstored: frozenset[int]

    def __init__(
        self,
        source: ModelSource | Loaded,
        *,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        approximate: bool = False,
        resizing: Resizing | None = None,
        opened: Opened | None = None,
    ) -> None:
        with paused():
            loaded = source if isinstance(source, Loaded) else load(source)
            # Preparations, each undone after pruning where it was not needed: see restore and rejoin.
            unshared, copies = unshare(Graph.of(loaded.proto, loaded.weights, names=loaded.names))
            folded, folds = fold(unshared)
            facts = study(folded, open_sizes(folded, input_shapes), infer_by_rule)
            check_extents(folded, facts.probes[0])
            graph, hoists = hoist(folded, facts)
            resizing = (resizing or Resizing()).within(graph)
            resizable = resizing.names or frozenset()
            table = push_labels(graph, facts, approximate=approximate, resizable=resizable, opened=opened)
            units, unstored = _resolve(table, "head_dim")
        vars(self).update(loaded=loaded, approximate=approximate, resizing=resizing, unshared=unshared, copies=copies)
        vars(self).update(folds=folds)
        vars(self).update(facts=facts, graph=graph, hoists=hoists, table=table, reshape_axis="head_dim")
        vars(self).update(units=units, _unstored=unstored)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an analysis is immutable: {name!r} cannot be set")

    def _with(self, **changes: Any) -> Analysis:
        """Return a copy of this analysis with other attributes; its views of the groups are built anew."""
        other = copy(self)
        views = [name for name, value in vars(Analysis).items() if isinstance(value, cached_property)]
        for name in views:
            vars(other).pop(name, None)
        vars(other).update(changes)
        if {"table", "reshape_axis"} & changes.keys():
            units, unstored = _resolve(other.table, other.reshape_axis)
            vars(other).update(units=units, _unstored=unstored)
        return other

    def with_reshape_axis(self, reshape_axis: str) -> Analysis:
        """Return the analysis with another choice of rows (``heads``) or cells (``head_dim``) of grids."""
        return self if reshape_axis == self.reshape_axis else self._with(reshape_axis=reshape_axis)

    def with_frozen(self, freezes: Sequence[tuple[Ids, Barrier]]) -> Analysis:
        """Return the analysis with more frozen atoms.

        Args:
            freezes: pairs of atoms and the barrier that freezes them.
        """
        table = copy(self.table)
        table.atoms = self.table.atoms.with_frozen(freezes)
        return self._with(table=table)

    def with_digest_of(self, other: Analysis) -> Analysis:
        """Return the analysis under the digest of another model, because plans name the input model."""
        return self._with(loaded=replace(self.loaded, digest=lambda: other.loaded.sha256))

    def __repr__(self) -> str:
        free = sum(group.prunable for group in self.units.groups)
        return f"<Analysis: {len(self.graph.steps)} nodes, {self.parameters:,} parameters, {free} prunable groups>"

    # -- for users -------------------------------------------------------------------------------------------------

    def single_units(self, name: str, axis: int, several: str, tied: str) -> tuple[Ids | None, str]:
        """Return the units along an axis of a tensor; None, and the reason, where they cannot go one by one.

        Args:
            name: tensor.
            axis: axis of it, 0 or more.
            several: reason where its positions have no single label.
            tied: reason where two positions are one unit.
        """
        label = covering(self.table.get(name), axis)
        if label is None or label.is_grid:
            return None, several
        components = self.units.component[label.ids.ravel()]
        barriers = self.units.barrier_of[components]
        if (barriers >= 0).any():
            barrier = self.units.atoms.barriers[int(barriers[barriers >= 0][0])]
            return None, f"{barrier.detail}{f' ({barrier.op} {barrier.node})' if barrier.node else ''}"
        if np.unique(components).size < components.size:
            return None, tied
        return components, ""

    @cached_property
    def groups(self) -> list[GroupView]:
        """Every group that can be pruned, or whose constraints forbid it, with its slots."""
        slots = self.slots
        return [self._view(g, slots.get(g.id, [])) for g in self.units.groups]

    @cached_property
    def barriers(self) -> list[Barrier]:
        """Every reason that holds channels, with their number, largest first."""
        counts = Counter(self.units.barrier_of[self._weight_components()].tolist())
        barriers = [replace(self.units.atoms.barriers[i], channels=n) for i, n in counts.items() if i >= 0]
        barriers = [b for b in barriers if b.code not in _NOT_CHANNELS]
        return sorted(barriers, key=lambda b: (-b.channels, b.node, b.code))

    @cached_property
    def unlocks(self) -> list[tuple[str, int]]:
        """(operator, channels) that would become removable if that operator held none of them, largest first."""
        counts: Counter[str] = Counter()
        for barrier in self.barriers:
            if barrier.code not in (Reason.GRAPH_OUTPUT, Reason.CAPTURED_BY_SUBGRAPH, Reason.SPATIAL):
                counts[barrier.op or barrier.code] += barrier.channels
        return counts.most_common()

    @cached_property
    def layers(self) -> list[LayerFacts]:
        """Channels, parameters and MACs of every layer; sizes before and after are equal."""
        return self.layer_facts(self.facts.shape, self._weight_size)

    @cached_property
    def network(self) -> Network:
        """Nodes and the tensors they read from each other, for drawings."""
        at: dict[str, int] = {}
        nodes = []
        for i, node in enumerate(self.graph.steps):
            nodes.append(NetworkNode(node.label, node.kind, tuple(at[name] for name in node.inputs if name in at)))
            at |= dict.fromkeys(filter(None, node.outputs), i)
        return Network(tuple(nodes))

    def layer_facts(self, shape_after: Any, weight_after: Any) -> list[LayerFacts]:
        """Return layers with their sizes before and after pruning.

        Args:
            shape_after: maps a tensor's name to its new shape.
            weight_after: maps a weight's name to its new number of elements.
        """
        result = []
        for node in self.graph.steps:
            if not cost.is_layer(node, self.graph):
                continue
            weights = cost.layer_weights(node, self.graph)
            result.append(
                LayerFacts(
                    name=node.label,
                    op=node.op,
                    channels_before=cost.out_channels(node, self.graph, self.facts.shape),
                    channels_after=cost.out_channels(node, self.graph, shape_after),
                    params_before=sum(self._weight_size(w) for w in weights),
                    params_after=sum(weight_after(w) for w in weights),
                    macs_before=cost.macs(node, self.facts.shape),
                    macs_after=cost.macs(node, shape_after),
                    reason=self._reason(node),
                )
            )
        return result

    @property
    def parameters(self) -> int:
        """Number of elements of all weights."""
        return sum(int(np.prod(weight.shape, dtype=np.int64)) for weight in self.loaded.weights.values())

    # -- for the stages --------------------------------------------------------------------------------------------

    @cached_property
    def producers(self) -> dict[int, list[Node]]:
        """Layers whose output carries units of a group, {group: nodes}; rows count the producers of their cells too."""
        result: dict[int, list[Node]] = {}
        for node in self.graph.steps:
            if cost.is_layer(node, self.graph):
                for number in self._groups_on(node.outputs):
                    result.setdefault(number, []).append(node)
        for group in self.units.groups:
            for child in group.children:
                group_producers = result.setdefault(group.id, [])
                group_producers.extend(n for n in result.get(child, ()) if n not in group_producers)
        return result

    @cached_property
    def _sources(self) -> dict[str, tuple[str, ...]]:
        """Return the weights that each folded weight was computed from, by its name."""
        return {name: item.sources for item in self.folds for name in item.folded}

    def _groups_on(self, names: Sequence[str]) -> set[int]:
        ids: set[int] = set()
        for name in names:
            for label in self.table.get(name) if name else ():
                numbers = self.units.group_of[label.of(self.units.component)]
                low, high = int(numbers.min()), int(numbers.max())
                ids.update((low,) if low == high else np.unique(numbers).tolist())
        return ids - {-1}

    def names_of(self, group: Group) -> list[str]:
        """Return the names that patterns match: layers that produce a group's channels, and their weights."""
        layers = self.producers.get(group.id, [])
        weights = [w for node in layers for w in cost.layer_weights(node, self.graph)]
        sources = [s for w in weights for s in self._sources.get(w, ())]
        return list(dict.fromkeys([node.label for node in layers] + weights + sources))

    def _layers_of(self, group: Group) -> list[str]:
        """Return every layer that a group runs through, producers first."""
        births = self.units.atoms.births
        numbers = [group.id, *group.children]
        weights = {births[int(b)].tensor: None for g in numbers for b in self.units.groups[g].births}
        readers = {n.index: n for w in weights if w for n in self._readers(w)}
        nodes = [*self.producers.get(group.id, ()), *(readers[i] for i in sorted(readers))]
        return list(dict.fromkeys(node.label for node in nodes))

    @cached_property
    def slots(self) -> dict[int, list[SlotView]]:
        """Slots of every group in the input model's own tensors: one per labelled axis, grids excepted.

        The directions of a recurrent layer lose different units, and no tensor need have both on one axis: each gets a
        slot of its own. So do the heads of a cache that may lose channels.
        """
        result: dict[int, list[SlotView]] = {}
        internal = self.copies.keys() | {name for item in self.hoists for name in item.new_names}
        known: dict[int, tuple[Label, Ids]] = {}
        for name, labels in self.table.items().items():
            for label in labels:
                by_row = name in self._directed or (name in self.table.resizable and len(label.axes) == 2)
                if name in internal or (label.is_grid and not by_row):
                    continue
                cached = known.get(id(label))
                if cached is None:
                    numbers = np.unique(self.units.group_of[self.units.component[label.ids]])
                    known[id(label)] = cached = (label, numbers[numbers >= 0])
                views = [SlotView(name, label.pack, label.ids.shape[label.pack], at) for at in _places(label)]
                for number in cached[1]:
                    result.setdefault(int(number), []).extend(views)
        return result

    @cached_property
    def _directed(self) -> set[str]:
        """Return operands and outputs of layers with several directions."""
        layers = [n for n in self.graph.steps if rule_of(n).several_directions]
        return {name for node in layers for name in (*node.inputs, *node.outputs) if name}

    def _view(self, group: Group, slots: list[SlotView]) -> GroupView:
        layers = self._layers_of(group)
        name = layers[0] if layers else (slots[0].tensor if slots else "")
        facts = (group.id, group.kind, group.size, group.steps, group.prunable)
        return GroupView(*facts, self._why(group), name, layers, slots)

    def _why(self, group: Group) -> str:
        if group.prunable:
            return ""
        if group.covered:
            return f"{Reason.COVERED}: whole heads or groups are pruned instead"
        if any(self.units.groups[c].prunable for c in group.children):
            return f"{Reason.COVERED}: the channels within are pruned instead"
        if group.size < 2:
            return f"{Reason.TIED_TOGETHER}: all channels form one unit"
        if group.id in self._unstored:
            return f"{Reason.NOT_STORED}: the file holds no weight of this group"
        return f"{Reason.GRID_UNBALANCED}: no equal share can be removed from every row"

    def _reason(self, node: Node) -> str:
        """Return the reason why channels of a layer's output have to stay; empty when none has to."""
        axis = cost.channel_axis(node, self.graph, self.facts.shape)
        for label in self.table.get(node.outputs[0]) if axis is not None else ():
            if axis in label.axes:
                barrier_ids = self.units.barrier_of[self.units.component[label.ids]].ravel()
                barrier_ids = barrier_ids[barrier_ids >= 0]
                if barrier_ids.size:
                    barrier = self.units.atoms.barriers[int(barrier_ids[0])]
                    return f"{barrier.code}: {barrier.detail} ({barrier.op} {barrier.node})".replace("( ", "(")
                return self._stuck(label)
        return ""

    def _stuck(self, label: Label) -> str:
        """Return the reason why no channel of a label can be removed although each may be; empty where some can."""
        groups = [
            self.units.groups[k] for k in np.unique(self.units.group_of[self.units.component[label.ids]]) if k >= 0
        ]
        if not groups or any(g.prunable or self._why(g).startswith(Reason.COVERED) for g in groups):
            return ""
        return self._why(groups[0])

    def _readers(self, weight: str) -> list[Node]:
        nodes: list[Node] = []
        queue = [weight]
        for _ in range(64):
            if not queue:
                break
            for node, _i in self.graph.consumers.get(queue.pop(), ()):
                if cost.multiplies(node):
                    nodes.append(node)
                elif self._passes_weight_on(node):
                    queue.append(node.outputs[0])
        return nodes

    def _passes_weight_on(self, node: Node) -> bool:
        """Return whether a node is a small operator on constants alone, such as a Transpose of a weight."""
        known = self.graph.weights
        constant = node.inputs[0] in known and all(not n or n in known for n in node.inputs[1:])
        return constant and bool(node.outputs) and len(node.inputs) < 4

    def _weight_size(self, name: str) -> int:
        return int(np.prod(self.graph.weights[name].shape, dtype=np.int64))

    def _weight_components(self) -> Ids:
        """Return the components of channels, once each: of the atoms born on the weights of layers.

        Anchors, grids of positions and entries of a vocabulary are born on constants that only meet channels.
        """
        births = self.units.atoms.births
        unsupported = {barrier.node for barrier in self.units.atoms.barriers if barrier.code == Reason.NO_RULE}

        def holds(name: str) -> bool:
            is_unsupported = any(node.label in unsupported for node, _ in self.graph.consumers.get(name, ()))
            return name in self.graph.weights and (is_unsupported or bool(self._readers(name)))

        channels = {name: holds(name) for name in {b.tensor for b in births}}
        marks = np.repeat([channels[b.tensor] for b in births], [b.stop - b.start for b in births])
        return np.unique(self.units.component[marks]) if len(births) else np.zeros(0, np.int64)


def _places(label: Label) -> list[dict[int, int]]:
    """Return the place of a grid's rows on its other axis, {axis: position} of each; one place for a plain label."""
    outer = label.outer()
    return [{outer[0]: row} for row in range(label.ids.shape[outer[0]])] if len(outer) == 1 else [{}]


def _resolve(table: Table, reshape_axis: str) -> tuple[Units, frozenset[int]]:
    """Resolve units and groups; a group that no weight belongs to (an axis that is only repeated) keeps its size."""
    units = resolve(table.atoms, reshape_axis)
    births, unstored = units.atoms.births, set[int]()
    for group in units.groups:
        numbers = [b for g in (group.id, *group.children) for b in units.groups[g].births]
        if not any(births[int(b)].tensor in table.graph.weights for b in numbers):
            unstored.add(group.id)
            group.prunable = False
    return units, frozenset(unstored)
