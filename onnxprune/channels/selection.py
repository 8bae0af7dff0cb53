"""Convert units to a plan and a plan to units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis, SlotView
from onnxprune.channels.groups import Units
from onnxprune.channels.plan import Plan, PlanGroup, PlanSlot, check_model
from onnxprune.errors import UsageError, nearest
from onnxprune.labels.label import Ids, covering

Mask = NDArray[np.bool_]


def removed_atoms(units: Units, components: Mask) -> Mask:
    """Return a mask over atoms of all that the chosen components remove."""
    return np.asarray(units.close(components)[units.component])


def make_plan(analysis: Analysis, removed: Mask, criterion: str) -> Plan:
    """Build the plan of a removal: every group that loses units, with one slot per labelled axis.

    Where several groups share an axis (a concatenation), each lists its own positions there.
    """
    units = analysis.units
    mask = np.zeros(units.frozen.size, dtype=bool)
    mask[units.component[removed]] = True
    cut = [g for g in units.groups if g.prunable and mask[g.units].any()]
    owner = np.full(len(units.groups) + 1, -1, dtype=np.int64)
    for group in cut:
        owner[group.children] = group.id
    for group in cut:  # rows and the cells beneath them may both be pruned: each then lists its own
        owner[group.id] = group.id
    for group in units.groups:  # rows without remaining cells are removed with their cells
        if owner[group.id] < 0 and mask[group.units].any():
            related = [c.id for c in cut if c.id in group.children or set(c.children) & set(group.children)]
            owner[group.id] = min(related, key=lambda c: c not in group.children, default=-1)
    by_atom = np.where(removed, owner[units.group_of[units.component]], -1)
    slots = analysis.slots
    groups = []
    for group in cut:
        group_slots = [s for g in np.flatnonzero(owner == group.id) for s in slots.get(int(g), ())]
        unique_slots = {(s.tensor, s.axis, *s.at.items()): s for s in group_slots}
        plan_slots = [_slot(analysis, slot, by_atom, group.id) for slot in unique_slots.values()]
        groups.append(PlanGroup(group.id, group.size, np.flatnonzero(mask[group.units]).tolist(), plan_slots))
    names = analysis.resizing.names or ()
    resize_io = [n for n in dict.fromkeys([*analysis.graph.inputs, *analysis.graph.outputs]) if n in names]
    barriers = [asdict(b) for b in analysis.barriers]
    axis = analysis.reshape_axis if analysis.reshape_axis == "heads" and analysis.table.atoms.columns else ""
    return Plan(analysis.loaded.sha256, criterion, groups, barriers, resize_io=resize_io, reshape_axis=axis)


def _slot(analysis: Analysis, slot: SlotView, by_atom: NDArray[np.int64], group: int) -> PlanSlot:
    label = covering(analysis.table.get(slot.tensor), slot.axis)
    assert label is not None
    ids = _at(label.ids, slot.at).ravel()
    return PlanSlot(slot.tensor, slot.axis, ids.size, np.flatnonzero(by_atom[ids] == group).tolist(), slot.at)


def _at(ids: Ids, place: Mapping[int, int]) -> Ids:
    """Return the atoms at positions of some axes, {axis: position}."""
    for axis, position in place.items():
        ids = ids.take([position], axis=axis)
    return ids


def read_plan(analysis: Analysis, plan: Plan) -> tuple[Analysis, Mask]:
    """Return the analysis with the grids that a plan needs resolved, and the mask over components that it removes.

    ``removed`` of a group decides where given, else its slots.

    Args:
        analysis: analysis of the model.
        plan: plan made for that model.

    Raises:
        UsageError: another model's plan, an unknown group or tensor, a position out of range or not removable, a share
            that the group's constraints do not allow.
    """
    check_model(plan.model_sha256, analysis.loaded.sha256, "A plan lists positions, which differ between models. ")
    known = analysis.units.groups
    rows = [known[i.id] for i in plan.groups if 0 <= i.id < len(known) and known[i.id].kind == "heads"]
    if plan.reshape_axis == "heads":
        analysis = analysis.with_reshape_axis(plan.reshape_axis)
    elif any(not g.prunable for g in rows):  # made where whole rows of grids were pruned
        analysis = analysis.with_reshape_axis("both")
    units = analysis.units
    mask = np.zeros(units.frozen.size, dtype=bool)
    for item in plan.groups:
        by_slots = _from_slots(analysis, item)
        if item.removed is None:
            mask |= by_slots
            continue
        units_removed = _from_units(units, item)
        group_mask = np.zeros_like(mask)
        group_mask[units_removed] = True
        closed = units.close(group_mask)
        if item.slots and (by_slots & ~closed).any():
            raise UsageError(
                f"Group {item.id} of the plan contradicts itself: its slots remove more channels than its 'removed' "
                "lists.",
                hint="Edit 'removed', or delete it to use the slots.",
            )
        mask |= group_mask
    _check_balance(units, mask)
    return analysis, mask


def _from_units(units: Units, item: PlanGroup) -> NDArray[np.int64]:
    if not 0 <= item.id < len(units.groups) or not units.groups[item.id].prunable:
        raise UsageError(f"The plan names group {item.id}, which is not a prunable group of this model.")
    group = units.groups[item.id]
    if item.units and item.units != group.size:
        raise UsageError(f"Group {item.id} of the plan has {item.units} units, the model's has {group.size}.")
    invalid = [r for r in item.removed or () if not 0 <= r < group.size]
    if invalid:
        raise UsageError(
            f"Group {item.id} of the plan removes unit {invalid[0]}.", hint=f"Allowed: 0 to {group.size - 1}."
        )
    return group.units[np.asarray(item.removed, dtype=np.int64)]


def _from_slots(analysis: Analysis, item: PlanGroup) -> Mask:
    units = analysis.units
    mask = np.zeros(units.frozen.size, dtype=bool)
    for slot in item.slots:
        labels = analysis.table.items().get(slot.tensor)
        if labels is None:
            raise UsageError(
                f"The plan names tensor {slot.tensor!r}, which has no removable channels in this model.",
                hint=nearest(slot.tensor, analysis.table.items()),
            )
        rank = labels[0].ids.ndim if labels else 0
        label = covering(labels, slot.axis) if 0 <= slot.axis < rank else None
        if label is None:
            raise UsageError(
                f"The plan removes from axis {slot.axis} of {slot.tensor!r}, which has no removable channels.",
                hint=f"It has {rank} axes, counted from 0." if rank else "",
            )
        size = label.ids.shape[slot.axis]
        if slot.size not in (0, size):
            raise UsageError(
                f"The plan expects axis {slot.axis} of {slot.tensor!r} to have {slot.size} channels, it has {size}.",
                hint="Give the plan that was written for this model.",
            )
        invalid = [p for p in slot.removed if not 0 <= p < size]
        if invalid:
            raise UsageError(
                f"The plan removes position {invalid[0]} of axis {slot.axis} of {slot.tensor!r}.",
                hint=f"Allowed: 0 to {size - 1}.",
            )
        shape = label.ids.shape
        if any(not 0 <= a < len(shape) or a == slot.axis or not 0 <= p < shape[a] for a, p in slot.at.items()):
            raise UsageError(
                f"The plan names place {slot.at} of {slot.tensor!r}, where there are no removable channels.",
                hint="'at' is {axis: position} of another axis of the tensor.",
            )
        ids = _at(label.ids, slot.at).take(np.asarray(slot.removed, dtype=np.int64), axis=slot.axis)
        components = np.unique(units.component[ids])
        frozen = components[units.frozen[components]]
        if frozen.size:
            barrier = analysis.units.atoms.barriers[int(units.barrier_of[frozen[0]])]
            raise UsageError(
                f"The plan removes channels of {slot.tensor!r} that cannot be removed: {barrier.code}, "
                f"{barrier.detail}.",
                hint="List all barriers with 'onnxprune inspect', and remove these channels from the plan.",
            )
        mask[components] = True
    return mask


def _check_balance(units: Units, mask: Mask) -> None:
    """Check that every class of a group loses the same share and keeps a unit, except classes removed with a row."""
    with_rows = _with_rows(units, mask)
    for group in units.groups:
        removed = mask[group.units]
        if not removed.any():
            continue
        counts = np.bincount(group.classes, weights=removed)
        sizes = np.bincount(group.classes)
        is_kept = np.bincount(group.classes, weights=with_rows[group.units]) < sizes
        if (counts == sizes)[is_kept].any() or removed.all():
            raise UsageError(
                f"The plan removes every unit of group {group.id} (or of one of its rows), but at least one must "
                "remain."
            )
        if group.kind == "channels" and _is_uneven(counts[is_kept], sizes[is_kept]):
            raise UsageError(
                f"The plan removes unequal numbers from the rows of group {group.id}: {counts.astype(int).tolist()}.",
                hint=f"Remove the same number from each of its {len(sizes)} rows.",
            )


def _with_rows(units: Units, mask: Mask) -> Mask:
    """Return a mask over components that are removed with their rows, where rows may be pruned."""
    closed, rows = units.close(mask), np.zeros_like(mask)
    for group in units.groups:
        if group.prunable and group.kind == "heads":
            rows[group.units] = closed[group.units]
    return units.close(rows)


def _is_uneven(counts: NDArray[Any], sizes: NDArray[np.int64]) -> bool:
    return bool((counts * sizes[:1] != counts[:1] * sizes).any())
