"""Selection of the units to prune, from their scores: ratios, ranking scopes, savings, rows and cells of grids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.rounding import Rounding, rounded_counts
from onnxprune.allocation.settings import Request
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import FEW, Group
from onnxprune.channels.selection import removed_atoms
from onnxprune.channels.survivors import Survivors
from onnxprune.globs import last_match, reason_to_exclude
from onnxprune.graph import cost
from onnxprune.graph.view import Node
from onnxprune.importance.scores import columns, over_columns
from onnxprune.labels.atoms import Reason, mix
from onnxprune.labels.label import Ids, Label

# Share of a few heads that may go, as a multiple of the ratio: of two heads one goes from a ratio of a third on.
_MOST_OF_FEW = 1.5


def removed_share(ratio: float, schedule: str, progress: float) -> float:
    """Return the share of units removed when ``progress`` of the steps (0 to 1) are; rises from 0 to ``ratio``.

    Args:
        ratio: the share to remove in all, 0 <= ratio < 1.
        schedule: ``linear``; ``exp``: every step removes the same share of the rest; ``cos``: half a cosine wave, slow
            at both ends; ``cube``: ratio (1 - (1 - done)^3), most of it early (Zhu and Gupta, 2017).
        progress: share of the steps that are done, 0 to 1.
    """
    if progress >= 1:
        return ratio
    if schedule == "exp":
        return 1.0 - math.pow(1.0 - ratio, progress)
    if schedule == "cos":
        return ratio * (1.0 - math.cos(math.pi * progress)) / 2.0
    if schedule == "cube":
        return ratio * (1.0 - (1.0 - progress) ** 3)
    return ratio * progress


def ranking_scopes(analysis: Analysis, groups: Sequence[Group]) -> dict[int, Hashable]:
    """Return a key per group; groups with equal keys are isomorphic, {group: key}.

    Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, compare structures that are alike. The key counts
    (operator, input or output, its number, axes) over the nodes that the group's channels run through.
    """
    table, units = analysis.table, analysis.units
    owners = {child: group.id for group in units.groups for child in group.children if units.groups[child].covered}
    roles: dict[int, Counter[tuple[str, bool, int, tuple[int, ...], int]]] = {}
    of_label: dict[int, tuple[object, list[int]]] = {}
    for node in analysis.graph.nodes:
        places = [(n, False, i) for i, n in enumerate(node.inputs)] + [(n, True, i) for i, n in enumerate(node.outputs)]
        for name, is_output, position in places:
            for label in table.get(name) if name else ():
                if id(label) not in of_label:
                    numbers = np.unique(units.group_of[units.component[label.ids]])
                    of_label[id(label)] = label, numbers[numbers >= 0].tolist()
                role = (node.op, is_output, position, label.axes, label.pack)
                for number in {owners.get(n, n) for n in of_label[id(label)][1]}:
                    roles.setdefault(number, Counter())[role] += 1
    return {g.id: (g.kind, frozenset(roles.get(g.id, Counter()).items())) for g in groups}


Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
ShapeOf = Callable[[str], Any]
Cost = Callable[[ShapeOf], float]

# Units of different multiplicity save different amounts; beyond this many kinds the last represents the rest.
_KINDS = 16


def macs_after(analysis: Analysis, removed: Mask) -> int:
    """Return the multiply-accumulates of the model after pruning ``removed`` (mask over atoms), at the first probe.

    The model is not rewritten: sizes follow from the labels.
    """
    shape = Survivors(analysis.table, removed).shape
    return sum(cost.macs(node, shape) for node in _layers(analysis))


def params_after(analysis: Analysis, removed: Mask) -> int:
    """Return the elements of all weights after pruning ``removed`` (mask over atoms), without added constants."""
    after, graph = Survivors(analysis.table, removed), analysis.graph
    removed_params = {
        n: _size(graph.weights[n].shape) - _size(after.shape(n)) for n in graph.weights if after.touched(n)
    }
    return analysis.parameters - sum(removed_params.values())


def savings(
    analysis: Analysis, groups: Sequence[Group], kind: str, seconds: Mapping[str, float] | None = None
) -> dict[int, Array]:
    """Return the cost that the removal of each unit saves, [units] by group id; more than 0.

    The saving is exact for one unit of every kind: its share of each tensor that it lies on, and of both sides of a
    layer whose input and output channels belong to the same group. In a group of several rows a unit represents its
    part of a step, which removes a unit of every row.

    Args:
        analysis: the analysis of the model.
        groups: the groups to compute savings for.
        kind: ``macs``, ``params`` or ``latency``.
        seconds: measured time of every node by its label, for ``latency``.
    """
    tensors = _tensors(analysis)
    nodes: dict[str, list[Node]] = {}
    for node in analysis.graph.nodes:
        for name in {*node.inputs, *node.outputs}:
            nodes.setdefault(name, []).append(node)
    result = {}
    for group in groups:
        names = sorted({n for g in (group.id, *group.children) for n in tensors.get(g, ())})
        if kind == "params":
            weights = [n for n in names if n in analysis.graph.weights and n not in analysis.copies]
            costs: list[Cost | None] = [_elements(n) for n in weights]
        else:
            near = {node.index: node for n in names for node in nodes.get(n, ())}
            costs = [_work(analysis, node, kind, seconds or {}) for node in near.values()]
        result[group.id] = _of_group(analysis, group, [c for c in costs if c is not None], names)
    return result


def spread(analysis: Analysis, measured: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """Return seconds of every node of the model by its label, from the times that a runtime measured.

    A runtime renames fused nodes: such a time goes to the node whose label, or whose output's name, is part of the
    name, or to the nearest node in front of it that is of the measured operator. The rest is distributed over the nodes
    without a time of their own, in proportion to their multiply-accumulates.

    Args:
        analysis: the analysis of the model.
        measured: (name, operator, seconds) of every node that was run.
    """
    nodes = analysis.graph.nodes
    named = {name: node for node in nodes for name in (*node.outputs, node.label) if name}
    longest = sorted(named, key=len, reverse=True)
    result: dict[str, float] = {}
    remainder = 0.0
    for name, op, time in measured:
        node = named.get(name) or next((named[x] for x in longest if x in name), None)
        if node is None:
            remainder += time
        else:
            home = _fused_into(analysis, node, op).label
            result[home] = result.get(home, 0.0) + time
    macs = {n.label: cost.macs(n, analysis.facts.shape) for n in nodes}
    macs_of = {n: m for n, m in macs.items() if m and n not in result} or {n: m for n, m in macs.items() if m}
    total = sum(macs_of.values())
    for name, share in macs_of.items():
        result[name] = result.get(name, 0.0) + remainder * share / total
    return result


def _fused_into(analysis: Analysis, node: Node, op: str) -> Node:
    """Return the node of operator ``op`` that ``node`` was fused into: itself, or a few steps in front of it."""
    fused = node
    for _ in range(8):
        if op.removeprefix("Fused") == fused.op:
            return fused
        before = [analysis.graph.producer.get(n) for n in fused.inputs[:1]]
        if not before or before[0] is None:
            break
        fused = before[0]
    return node


def _layers(analysis: Analysis) -> list[Node]:
    return [node for node in analysis.graph.nodes if cost.is_layer(node, analysis.graph)]


def _size(shape: Any) -> int:
    return int(np.prod(shape if shape is not None else (), dtype=np.int64))


def _elements(name: str) -> Cost:
    return lambda shape: float(_size(shape(name)))


def _work(analysis: Analysis, node: Node, kind: str, seconds: Mapping[str, float]) -> Cost | None:
    """Return the cost of a node as a function of the shapes; None where it has none."""
    if kind == "macs":
        return (lambda shape: float(cost.macs(node, shape))) if cost.is_layer(node, analysis.graph) else None
    if not seconds.get(node.label):
        return None
    shapes = [analysis.facts.shape(n) for n in node.outputs if n]
    if any(s is None or None in s for s in shapes):
        return None

    def work(shape: ShapeOf) -> float:
        return float(cost.macs(node, shape) or sum(_size(shape(n)) for n in node.outputs if n))

    each = seconds[node.label] / max(work(analysis.facts.shape), 1.0)
    return lambda shape: each * work(shape)


def _tensors(analysis: Analysis) -> dict[int, list[str]]:
    """Return the names of the tensors that units of each group lie on."""
    result: dict[int, list[str]] = {}
    atoms_of: dict[int, tuple[Label, Ids]] = {}
    for name, labels in analysis.table.items().items():
        groups_of: set[int] = set()
        for label in labels:
            if id(label) not in atoms_of:
                atoms_of[id(label)] = label, np.unique(analysis.units.group_of[analysis.units.component[label.ids]])
            groups_of.update(atoms_of[id(label)][1].tolist())
        for number in groups_of - {-1}:
            result.setdefault(number, []).append(name)
    return result


def _of_group(analysis: Analysis, group: Group, costs: Sequence[Cost], names: Sequence[str]) -> Array:
    """Return savings [units] of one group, from the costs of its nodes and weights as functions of the shapes."""
    units, kinds = analysis.units, _kinds(analysis, group, names)
    before = [c(analysis.facts.shape) for c in costs]
    result = np.zeros(group.size)
    for kind in range(int(kinds.max()) + 1):
        members = np.flatnonzero(kinds == kind)
        removed = np.zeros(units.frozen.size, dtype=bool)
        step = members[:1] if group.size == group.steps else np.flatnonzero(columns(group.classes, group.steps) == 0)
        removed[group.units[step]] = True
        shape = Survivors(analysis.table, removed_atoms(units, removed)).shape
        result[members] = sum(b - c(shape) for b, c in zip(before, costs, strict=True)) / step.size
    # A unit without a counted saving must still compare: it gets the least saving of any other.
    least = result[result > 0].min() if (result > 0).any() else 1.0
    return np.where(result > 0, result, least)


def _kinds(analysis: Analysis, group: Group, names: Sequence[str]) -> Ids:
    """Return the kind of each unit, [units]: units of a kind appear equally often on the same tensors."""
    if group.size != group.steps:
        return np.zeros(group.size, np.int64)
    component = analysis.units.component
    place = np.full(analysis.units.frozen.size, -1, dtype=np.int64)
    place[group.units] = np.arange(group.size)
    keys = np.zeros(group.size, dtype=np.uint64)
    number = 0
    for name in names:
        for label in analysis.table.get(name):
            places = place[component[label.ids.ravel()]]
            counts = np.bincount(places[places >= 0], minlength=group.size)
            keys += mix(counts * 1_000_003 + number)
            number += 1
    return np.minimum(np.unique(keys, return_inverse=True)[1].astype(np.int64), _KINDS - 1)


def allowed_counts(size: int, steps: int, *, round_to: int = 1, step: int = 1, widest: float = 1.0) -> Ids:
    """Return numbers of steps that may be removed from a group, ascending, at least one; never all of them.

    Args:
        size: number of units.
        steps: number of equal steps in which the group can be pruned.
        round_to: the number of remaining units is a multiple of it where possible.
        step: the number of removed units is always a multiple of it.
        widest: the largest share to remove, 0 to 1.
    """
    counts = np.arange(steps)
    if round_to == step == 1 and widest >= 1:
        return counts
    units = counts * (size // steps)
    allowed = (units % step == 0) & (units <= widest * size + 1e-9)
    even = allowed & ((size - units) % round_to == 0)
    return np.asarray(counts[even if even.any() else allowed])


def nearest_count(counts: Ids, target: float, rounding: str) -> int:
    """Return the allowed count for a requested number of steps, which is rarely whole; ties prune less."""
    if target <= 0:
        return 0
    if rounding == "up":
        above = counts[counts >= target - 1e-9]
        return int(above[0] if above.size else counts[-1])
    if rounding == "down":
        below = counts[counts <= target + 1e-9]
        return int(below[-1] if below.size else counts[0])
    return int(counts[np.argmin(np.abs(counts - target) + counts * 1e-9)])


def in_order(values: Array, classes: Ids) -> tuple[Ids, Ids]:
    """Return units sorted by class and then by score, and the rank of each unit (in its own place) in its class."""
    sizes = np.bincount(classes)
    # Both are stable, and put removed units (NaN) last.
    order = np.argsort(values, kind="stable") if sizes.size == 1 else np.lexsort((values, classes))
    rank = np.empty(values.size, dtype=np.int64)
    rank[order] = np.arange(values.size) - (np.cumsum(sizes) - sizes)[classes[order]]
    return order, rank


def weakest(values: Array, classes: Ids, steps: int, count: int) -> Ids:
    """Return the units (numbers within the group) of ``count`` steps: the lowest of every remaining class."""
    sizes = np.bincount(classes)
    if sizes.size == 1:
        return _least(values, values.size // steps * count)
    _, rank = in_order(values, classes)
    return np.flatnonzero((rank < (sizes // steps * count)[classes]) & ~np.isnan(values))


def _least(values: Array, count: int) -> Ids:
    """Return positions of the ``count`` least numbers, the first among equal ones; NaN is never among them."""
    if not count:
        return np.zeros(0, np.int64)
    # Selecting by a threshold takes linear time, unlike sorting; NaN counts as the largest.
    bound = np.partition(values, count - 1)[count - 1]
    if np.isnan(bound):
        return np.flatnonzero(~np.isnan(values))
    below = values < bound
    ties = np.flatnonzero(values == bound)[: count - np.count_nonzero(below)]
    below[ties] = True
    return np.flatnonzero(below)


def step_scores(ranked_group: RankedGroup, add: bool = False) -> Array:
    """Return scores [steps] of a group's steps, ascending: one unit of every remaining class, averaged or summed."""
    sizes = np.bincount(ranked_group.classes)
    _, rank = in_order(ranked_group.values, ranked_group.classes)
    step = rank // (sizes // ranked_group.steps)[ranked_group.classes]
    alive = ~np.isnan(ranked_group.values)
    total = np.bincount(step[alive], weights=ranked_group.values[alive], minlength=ranked_group.steps).astype(
        np.float64
    )
    if not add:
        total /= np.maximum(np.bincount(step[alive], minlength=ranked_group.steps), 1)
    return np.asarray(np.maximum.accumulate(total))


def lamp(values: Array) -> Array:
    """Return scores [units] that compare across layers: s_u^2 / sum of s_v^2 over the units v with s_v >= s_u.

    Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, with units in place of weights.
    Scores below 0 are shifted so that the least is 0; scores that are not finite are unchanged.
    """
    result = values.copy()
    alive = np.flatnonzero(np.isfinite(values))
    if not alive.size:
        return result
    scores = values[alive] - min(0.0, float(values[alive].min()))
    order = np.argsort(scores, kind="stable")
    square = np.square(scores[order])
    suffix_sums = np.cumsum(square[::-1])[::-1]
    # Units with equal scores are in each other's sum.
    suffix_sums = suffix_sums[np.searchsorted(scores[order], scores[order], side="left")]
    result[alive[order]] = np.divide(square, suffix_sums, out=np.zeros_like(square), where=suffix_sums > 0)
    return result


def local_counts(ranked: Sequence[RankedGroup], rounding: str) -> list[int]:
    """Return steps that every group loses by its own ratio."""
    return [max(nearest_count(c.counts, c.ratio * c.steps, rounding), c.num_removed) for c in ranked]


def threshold_counts(ranked: Sequence[RankedGroup], rounding: str, add: bool = False) -> list[int]:
    """Return steps that every group loses under one threshold.

    The steps of the lowest scores are removed first, until as many units are removed as the groups' ratios sum to. A
    group moves from one of its allowed counts to the next at once, at the mean score of the steps between.
    """
    owner, scores, units, reach = [], [], [], []
    for number, ranked_group in enumerate(ranked):
        counts = ranked_group.counts if ranked_group.counts[0] == 0 else np.concatenate([[0], ranked_group.counts])
        if counts.size < 2:
            continue
        ahead = np.add.reduceat(step_scores(ranked_group, add)[: counts[-1]], counts[:-1]) / np.diff(counts)
        owner.append(np.full(ahead.size, number))
        scores.append(np.maximum.accumulate(ahead))
        units.append(np.diff(counts) * ranked_group.per_step)
        reach.append(counts[1:])
    result = [0] * len(ranked)
    if not owner:
        return result
    owners, score, size, count = (np.concatenate(x) for x in (owner, scores, units, reach))
    order = np.argsort(score, kind="stable")
    cumulated = np.concatenate([[0], np.cumsum(size[order])])
    target = sum(c.ratio * c.values.size for c in ranked)
    stop = max(_prefix(cumulated, target, rounding), int(np.isneginf(score).sum()))
    for i in order[:stop]:
        result[owners[i]] = int(count[i])
    return result


def _prefix(cumulated: Ids, target: float, rounding: str) -> int:
    """Return the number of steps to remove, given the units removed after each number of them, [steps + 1]."""
    return int(np.searchsorted(cumulated, nearest_count(cumulated, target, rounding)))


def allocate(ranked: Sequence[RankedGroup], scope: str, rounding: str, add: bool = False) -> list[int]:
    """Return steps that every group loses.

    Args:
        ranked: the groups.
        scope: ``local``, else one threshold per ranking scope.
        rounding: ``nearest``, ``up`` or ``down``.
        add: a step's score is the sum of its units' scores, not the mean.
    """
    result = [0] * len(ranked)
    pools: dict[Hashable, list[int]] = {}
    for number, ranked_group in enumerate(ranked):
        if scope == "local" or ranked_group.is_local:
            result[number] = local_counts([ranked_group], rounding)[0]
        else:
            pools.setdefault(ranked_group.ranking_scope, []).append(number)
    for members in pools.values():
        for number, count in zip(members, threshold_counts([ranked[m] for m in members], rounding, add), strict=True):
            result[number] = count
    return result


SHARES = (0.125, 0.25, 0.5, 0.75)
"""Shares of a group to prune alone and measure."""


def counts(steps: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Return numbers of steps to measure of a group that can lose up to ``steps - 1``; at least one if possible."""
    result = {min(max(round(share * steps), 1), steps - 1) for share in shares}
    return sorted(n for n in result if n > 0)


def along(values: Array, classes: Ids, steps: int, sensitivities: Mapping[int, float]) -> Array:
    """Return scores [units] in the order of ``values`` whose sums equal the measured output sensitivity.

    Between measured counts, the sensitivity rises as the sum of ``values`` does; beyond the last at the rate before it.
    A step never scores less than one removed before it.

    Args:
        values: scores that rank the units [units], none below 0.
        classes: units that may replace each other have the same class, [units].
        steps: number of equal steps in which the group can be pruned.
        sensitivities: {steps removed: output sensitivity}, not empty.
    """
    _, rank = in_order(values, classes)
    step = rank // (np.bincount(classes) // steps)[classes]
    # Where all scores are 0, every step counts the same.
    summed = np.bincount(step, weights=values, minlength=steps)
    summed = np.maximum(summed, 1e-9 * summed.max() if summed.max() > 0 else 1.0)
    sums = np.concatenate([[0.0], np.cumsum(summed)])
    measured = sorted(sensitivities)
    x = sums[[0, *measured]]
    y = np.maximum.accumulate([0.0, *(max(sensitivities[n], 0.0) for n in measured)])
    interpolated = np.interp(sums, x, y)
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    interpolated += slope * np.maximum(sums - x[-1], 0.0)
    each = np.maximum.accumulate(np.diff(interpolated)) / np.bincount(step, minlength=steps)
    # Steps of equal sensitivity are still removed in the order of their scores.
    each = each + 1e-9 * (each[-1] + 1e-30) * np.arange(steps)
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return np.asarray(each[step] * (1.0 + 1e-12 * order))


@dataclass(slots=True)
class Candidates:
    """The groups that may be pruned.

    Attributes:
        ratios: the ratio of every group that can be pruned, None where it is excluded.
        local: groups with a ratio of their own.
        two_way: groups whose rows and cells are both pruned, so that each loses 1 - sqrt(1 - ratio).
        excluded: groups that an option excludes from pruning, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    ratios: dict[int, float | None] = field(default_factory=dict)
    local: set[int] = field(default_factory=set)
    two_way: set[int] = field(default_factory=set)
    excluded: dict[int, str] = field(default_factory=dict)


def candidates(analysis: Analysis, request: Request) -> Candidates:
    """Return the groups to prune, and their ratios."""
    result = Candidates()
    groups = analysis.units.groups
    for group in groups:
        if not group.prunable:
            continue
        for child in group.children:
            if groups[child].prunable:
                result.two_way |= {group.id, child}
        names = analysis.names_of(group) if request.patterned else []
        if reason_to_exclude(names, request.include, request.exclude):
            result.ratios[group.id] = None
            continue
        match = last_match(names, request.layers)
        result.ratios[group.id] = request.ratio if match is None else match[1]
        if match is not None:
            result.local.add(group.id)
        if request.group_policy == "none" and group.size != group.steps:
            result.excluded[group.id] = f"{Reason.KEPT_WHOLE}: group_policy none prunes no channels in several rows"
        else:
            result.groups.append(group)
    return result


def batches(groups: Sequence[Group]) -> list[list[Group]]:
    """Split groups into batches without rows and their cells in the same one: each cell counts for both."""
    ids = {g.id for g in groups}
    above = [g for g in groups if ids & set(g.children)]
    disjoint = [[g for g in groups if g not in above]]
    for group in above:
        batch = next((x for x in disjoint[1:] if not any(_related(group, g) for g in x)), None)
        if batch is None:
            disjoint.append(batch := [])
        batch.append(group)
    return [batch for batch in disjoint if batch]


def _related(a: Group, b: Group) -> bool:
    return a.id in b.children or b.id in a.children or bool(set(a.children) & set(b.children))


def rank_groups(
    analysis: Analysis,
    request: Request,
    pool: Candidates,
    scores: Mapping[int, Array],
    *,
    savings: Mapping[int, Array] | None = None,
    removed: Mask | None = None,
    progress: float = 1.0,
    multiples: Mapping[int, int] | None = None,
) -> dict[int, RankedGroup]:
    """Return the groups that have scores with the inputs of the allocation, by group id.

    Args:
        analysis: the analysis of the model.
        request: the settings.
        pool: the groups to prune.
        scores: scores [units] by group.
        savings: saving of each unit's removal, [units] by group.
        removed: mask over components that earlier steps removed.
        progress: share of the steps after this one, 0 to 1.
        multiples: of the remaining steps of each group, where the device decides them.
    """
    groups = [g for g in pool.groups if g.id in scores]
    alike = ranking_scopes(analysis, groups) if request.scope == "isomorphic" else {}
    # Division by the saving would invert the order of scores below 0.
    low = min((float(scores[g.id].min()) for g in groups), default=0.0) if savings else 0.0
    result = {}
    for group in groups:
        removed_units, dead = _removed_in(group, removed)
        values = scores[group.id] - min(0.0, low)
        if removed is not None:
            values[removed_units | dead] = np.nan
        values = _over_columns(group, values, request.group_policy)
        if request.scope == "slamp" and group.id not in pool.local:
            values = lamp(values)
        if savings:
            values = values / savings[group.id]
        if removed is not None:
            values[removed_units], values[dead] = -np.inf, np.nan
        ratio = pool.ratios[group.id] or 0.0
        ratio = removed_share(ratio, request.schedule, progress)
        if group.id in pool.two_way:
            ratio = 1.0 - math.sqrt(1.0 - ratio)
        counts = counts_of(group, request, None if multiples is None else multiples[group.id])
        if request.scope == "local" and group.steps < FEW and _is_cached(analysis, group):
            counts = counts[counts <= _MOST_OF_FEW * ratio * group.steps]
        is_local, before = (
            group.id in pool.local,
            0 if removed is None else _num_removed_steps(group, removed_units, dead),
        )
        result[group.id] = RankedGroup(
            values, group.classes, group.steps, counts, ratio, is_local, alike.get(group.id), before
        )
    return result


def _is_cached(analysis: Analysis, group: Group) -> bool:
    """Return whether a group is of heads whose keys and values come in as inputs."""
    births = analysis.units.atoms.births
    numbers = [int(b) for g in (group.id, *group.children) for b in analysis.units.groups[g].births]
    return group.kind == "heads" and any(births[b].tensor in analysis.table.resizable for b in numbers)


def counts_of(group: Group, request: Request, multiple: int | None = None) -> Ids:
    """Return numbers of steps that may be removed from a group; ``multiple``: of the remaining ones, if not asked."""
    step, widest = request.step, request.widest
    if multiple is not None:
        return rounded_counts(group.size, group.steps, multiple, step=step, widest=widest)
    return allowed_counts(group.size, group.steps, round_to=request.least_multiple, step=step, widest=widest)


def _over_columns(group: Group, values: Array, policy: str) -> Array:
    """Apply the grid policy to the remaining units; columns are removed as a whole, the same ones of each row."""
    if policy not in ("sum", "average"):
        return values
    is_present = ~np.isnan(values)
    finite_values = np.where(is_present, values, 0.0)
    total = over_columns(finite_values, group.classes, group.steps, "sum")
    if policy == "average":
        total = total / np.maximum(over_columns(is_present.astype(np.float64), group.classes, group.steps, "sum"), 1.0)
    return np.where(is_present, total, np.nan) if group.size != group.steps else values


def _removed_in(group: Group, removed: Mask | None) -> tuple[Mask, Mask]:
    """Return masks over the units: removed by themselves, and removed with their whole class."""
    if removed is None:
        return np.zeros(group.size, bool), np.zeros(group.size, bool)
    removed_units = removed[group.units]
    removed_columns = np.bincount(group.classes, weights=removed_units) == np.bincount(group.classes)
    dead = removed_columns[group.classes]
    return removed_units & ~dead, dead


def _num_removed_steps(group: Group, removed_units: Mask, dead: Mask) -> int:
    alive = np.flatnonzero(~dead)
    if not alive.size:
        return 0
    first = group.classes == group.classes[alive[0]]
    return int(removed_units[first].sum() * group.steps // first.sum())


def choose(
    analysis: Analysis, request: Request, ranked: Mapping[int, RankedGroup], rounding: Rounding | None = None
) -> Mask:
    """Return the mask over components to remove; ``rounding`` compensates the rounding to its multiples."""
    counts = allocate(list(ranked.values()), request.scope, request.rounding, request.group_policy == "sum")
    if rounding is not None and request.scope == "local" and request.rounding == "nearest" and ranked:
        free = [replace(c, counts=counts_of(analysis.units.groups[n], request)) for n, c in ranked.items()]
        counts = rounding.balanced(ranked, counts, local_counts(free, request.rounding))
    return close_selection(analysis, ranked, counts)


def close_selection(analysis: Analysis, ranked: Mapping[int, RankedGroup], counts: Sequence[int]) -> Mask:
    """Return the mask over components to remove when every group, in the order of ``ranked``, loses so many steps."""
    units = analysis.units
    numbers = list(ranked)
    removed = np.zeros(units.frozen.size, dtype=bool)
    # Rows before the cells beneath them: cells of removed rows do not compete.
    order = sorted(range(len(numbers)), key=lambda i: (not units.groups[numbers[i]].children, i))
    closed = False
    for i in order:
        group, ranked_group = units.groups[numbers[i]], ranked[numbers[i]]
        if not counts[i]:
            continue
        if not closed and not group.children and removed.any():
            removed, closed = units.close(removed), True
        values = ranked_group.values.copy()
        if closed:
            values[_removed_in(group, removed)[1]] = np.nan
        removed[group.units[weakest(values, ranked_group.classes, ranked_group.steps, counts[i])]] = True
    return removed


def split_rows(analysis: Analysis, pool: Candidates) -> list[int]:
    """Return groups of rows to prune with their cells, of which a row shares only a part of some class."""
    units = analysis.units
    bad = []
    for group in pool.groups:
        below = [units.groups[c] for c in group.children if c in pool.two_way]
        if group.id not in pool.two_way or not below:
            continue
        for unit in group.units:
            removed = np.zeros(units.frozen.size, dtype=bool)
            removed[unit] = True
            closed = units.close(removed)
            if any(_removed_in(child, closed)[0].any() for child in below):
                bad.append(group.id)
                break
    return bad


def scaled(ranked: Mapping[int, RankedGroup], ratios: Mapping[int, float]) -> dict[int, RankedGroup]:
    """Return the same groups with other ratios, without new scores."""
    return {number: replace(ranked_group, ratio=ratios[number]) for number, ranked_group in ranked.items()}
