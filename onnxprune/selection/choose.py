"""From scores to the units that go: policies, costs, allocation, and the rows and cells of grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.groups.units import Group
from onnxprune.selection.cohorts import ranking_scopes
from onnxprune.selection.policy import over_columns
from onnxprune.selection.request import Request, is_excluded, own_ratio
from onnxprune.selection.schedule import removed_share
from onnxprune.selection.scopes import RankedGroup, allocate, allowed_counts, lamp, weakest

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(slots=True)
class Candidates:
    """The groups that may lose units.

    Attributes:
        asked: the ratio of every group that can be cut, None where it is excluded.
        alone: groups with a ratio of their own.
        halved: groups whose rows and cells are both cut, so that each takes 1 - sqrt(1 - ratio).
        kept: groups that an option leaves whole, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    asked: dict[int, float | None] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    halved: set[int] = field(default_factory=set)
    kept: dict[int, str] = field(default_factory=dict)


def candidates(analysis: Analysis, request: Request) -> Candidates:
    """Which groups take part, and with which ratio."""
    found = Candidates()
    groups = analysis.units.groups
    for group in groups:
        if not group.prunable:
            continue
        for child in group.children:
            if groups[child].prunable:
                found.halved |= {group.id, child}
        names = analysis.names_of(group) if request.patterned else []
        own = own_ratio(names, request)
        found.asked[group.id] = None if is_excluded(names, request) else request.ratio if own is None else own
        if own is not None:
            found.alone.add(group.id)
        if found.asked[group.id] is None:
            continue
        if request.group_policy == "none" and group.size != group.steps:
            found.kept[group.id] = "kept-whole: group_policy none leaves channels in several rows alone"
        else:
            found.groups.append(group)
    return found


def batches(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in lots, so that rows and the cells beneath them are never in one: each cell counts for both."""
    own = {g.id for g in groups}
    above = [g for g in groups if own & set(g.children)]
    lots = [[g for g in groups if g not in above]]
    for group in above:
        lot = next((x for x in lots[1:] if not any(_related(group, g) for g in x)), None)
        if lot is None:
            lots.append(lot := [])
        lot.append(group)
    return [lot for lot in lots if lot]


def _related(a: Group, b: Group) -> bool:
    return a.id in b.children or b.id in a.children or bool(set(a.children) & set(b.children))


def rank_groups(
    analysis: Analysis,
    request: Request,
    found: Candidates,
    scores: Mapping[int, Array],
    *,
    savings: Mapping[int, Array] | None = None,
    gone: Mask | None = None,
    done: float = 1.0,
) -> dict[int, RankedGroup]:
    """The groups that have scores, as the allocation sees them, by group id.

    Args:
        scores: [units] by group. savings: what a unit's removal saves, [units] by group.
        gone: mask over components of what earlier steps removed. done: share of the steps after this one.
    """
    groups = [g for g in found.groups if g.id in scores]
    alike = ranking_scopes(analysis, groups) if request.scope == "isomorphic" else {}
    # Scores below 0 would turn the division by what is saved around.
    low = min((float(scores[g.id].min()) for g in groups), default=0.0) if savings else 0.0
    result = {}
    for group in groups:
        own, dead = _gone(group, gone)
        values = scores[group.id] - min(0.0, low)
        if gone is not None:
            values[own | dead] = np.nan
        values = _over_columns(group, values, request.group_policy)
        if request.scope == "slamp" and group.id not in found.alone:
            values = lamp(values)
        if savings:
            values = values / savings[group.id]
        if gone is not None:
            values[own], values[dead] = -np.inf, np.nan
        ratio = found.asked[group.id] or 0.0
        ratio = removed_share(ratio, request.schedule, done)
        if group.id in found.halved:
            ratio = 1.0 - math.sqrt(1.0 - ratio)
        counts = allowed_counts(
            group.size, group.steps, round_to=request.round_to, step=request.step, widest=request.widest
        )
        alone, before = group.id in found.alone, 0 if gone is None else _steps_gone(group, own, dead)
        result[group.id] = RankedGroup(
            values, group.classes, group.steps, counts, ratio, alone, alike.get(group.id), before
        )
    return result


def _over_columns(group: Group, values: Array, policy: str) -> Array:
    """The grid's policy over the units that are left; columns go as a whole, so that each row misses the same ones."""
    if policy not in ("sum", "average"):
        return values
    left = ~np.isnan(values)
    known = np.where(left, values, 0.0)
    total = over_columns(known, group.classes, group.steps, "sum")
    if policy == "average":
        total = total / np.maximum(over_columns(left.astype(np.float64), group.classes, group.steps, "sum"), 1.0)
    return np.where(left, total, np.nan) if group.size != group.steps else values


def _gone(group: Group, gone: Mask | None) -> tuple[Mask, Mask]:
    """Masks over the units: gone by themselves, and gone because their whole class is."""
    if gone is None:
        return np.zeros(group.size, bool), np.zeros(group.size, bool)
    own = gone[group.units]
    whole = np.bincount(group.classes, weights=own) == np.bincount(group.classes)
    dead = whole[group.classes]
    return own & ~dead, dead


def _steps_gone(group: Group, own: Mask, dead: Mask) -> int:
    alive = np.flatnonzero(~dead)
    if not alive.size:
        return 0
    first = group.classes == group.classes[alive[0]]
    return int(own[first].sum() * group.steps // first.sum())


def choose(analysis: Analysis, request: Request, ranked: Mapping[int, RankedGroup]) -> Mask:
    """Mask over components of what goes."""
    counts = allocate(list(ranked.values()), request.scope, request.rounding, request.group_policy == "sum")
    return take(analysis, ranked, counts)


def take(analysis: Analysis, ranked: Mapping[int, RankedGroup], counts: Sequence[int]) -> Mask:
    """Mask over components of what goes when every group, in the order of ``ranked``, loses so many steps."""
    units = analysis.units
    numbers = list(ranked)
    chosen = np.zeros(units.frozen.size, dtype=bool)
    # Rows before the cells beneath them: cells of rows that go do not compete.
    order = sorted(range(len(numbers)), key=lambda i: (not units.groups[numbers[i]].children, i))
    closed = False
    for i in order:
        group, ranked_group = units.groups[numbers[i]], ranked[numbers[i]]
        if not counts[i]:
            continue
        if not closed and not group.children and chosen.any():
            chosen, closed = units.close(chosen), True
        values = ranked_group.values.copy()
        if closed:
            values[_gone(group, chosen)[1]] = np.nan
        chosen[group.units[weakest(values, ranked_group.classes, ranked_group.steps, counts[i])]] = True
    return chosen


def split_rows(analysis: Analysis, found: Candidates) -> list[int]:
    """Groups of rows to be cut together with their cells, of which a row takes only a part of some class along."""
    units = analysis.units
    bad = []
    for group in found.groups:
        below = [units.groups[c] for c in group.children if c in found.halved]
        if group.id not in found.halved or not below:
            continue
        for unit in group.units:
            chosen = np.zeros(units.frozen.size, dtype=bool)
            chosen[unit] = True
            closed = units.close(chosen)
            if any(_gone(child, closed)[0].any() for child in below):
                bad.append(group.id)
                break
    return bad


def scaled(ranked: Mapping[int, RankedGroup], ratios: Mapping[int, float]) -> dict[int, RankedGroup]:
    """The same groups with other ratios: scores need not be made again."""
    return {number: replace(ranked_group, ratio=ratios[number]) for number, ranked_group in ranked.items()}
