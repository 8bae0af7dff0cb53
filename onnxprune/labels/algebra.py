"""The algebra of labels: combine position by position, permute, pick, reshape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from onnxprune.labels.atoms import Atoms, Reason
from onnxprune.labels.label import NONE, Ids, Label, Labels, covering, drop

Shape = tuple["int | None", ...]
NewBarrier = Callable[[str, str], int]
"""(code, detail) -> index of the barrier, for the node at hand."""


def known(shape: Shape | None) -> tuple[int, ...] | None:
    """Return the shape where every size is known, else None."""
    sizes = tuple(n for n in shape or () if n is not None)
    return sizes if shape is not None and len(sizes) == len(shape) else None


def align(labels: Labels, shift: int) -> Labels:
    """Return the labels after ``shift`` axes of size 1 were inserted in front."""
    if shift == 0:
        return labels
    return tuple(Label(x.ids.reshape((1,) * shift + x.ids.shape), x.pack + shift, x.start) for x in labels)


def broadcast(
    atoms: Atoms, operands: Sequence[tuple[Labels, Shape]], rank: int, reason: NewBarrier, skip: Sequence[int] = ()
) -> Labels:
    """Return labels of the result of operands that broadcast (numpy's rules) into a tensor of ``rank``.

    Atoms at the same position are united; an axis that is labelled in one operand and has positions but no label in
    another keeps its size. Axes in ``skip`` are not compared: labels there must already be absent.
    """
    if len(operands) == 1 and len(operands[0][1]) == rank and _apart(operands[0][0]):
        return operands[0][0]
    if not any(labels for labels, _ in operands):
        return NONE
    aligned = [
        (align(labels, rank - len(shape)), (1,) * (rank - len(shape)) + tuple(shape)) for labels, shape in operands
    ]
    result: Labels = NONE
    for labels, _ in aligned:
        for label in labels:
            result = merge(atoms, result, label, reason)
    for axis in range(rank):
        if axis in skip:
            continue
        for labels, shape in aligned:
            if shape[axis] != 1 and covering(labels, axis) is None:
                present = covering(result, axis)
                if present is not None:
                    atoms.fix_axis(
                        present, axis, reason(Reason.UNLABELLED_OPERAND, f"axis {axis} meets a tensor without labels")
                    )
    return result


def _apart(labels: Labels) -> bool:
    """Return whether no axis has two labels, so that there is nothing to unite."""
    if len(labels) == 1:
        return bool(labels[0].axes)
    axes = [a for label in labels for a in label.axes or (-1, -1)]
    return len(set(axes)) == len(axes)


def merge(atoms: Atoms, labels: Labels, label: Label, reason: NewBarrier) -> Labels:
    """Return ``labels`` with one more label of the same tensor, uniting the atoms of overlapping labels."""
    if not label.axes:
        return labels
    if not labels:
        return (label,)
    overlapping = [x for x in labels if not set(x.axes).isdisjoint(label.axes)]
    if not overlapping:
        return (*labels, label)
    for other in overlapping:
        common_axes = tuple(a for a in label.axes if a in other.axes)
        if label.axes == other.axes and label.pack != other.pack:
            atoms.couple(label)
            atoms.couple(other)
        atoms.unite(atoms.on_axes(other, common_axes), atoms.on_axes(label, common_axes))
    label_axes = set(label.axes)
    if all(set(x.axes) <= label_axes for x in overlapping):
        for other in overlapping:
            labels = drop(labels, other)
        return (*labels, label)
    if len(overlapping) == 1 and label_axes <= set(overlapping[0].axes):
        return labels
    why = reason(Reason.UNSUPPORTED_FORM, "grids over different axes meet")
    for x in (*overlapping, label):
        atoms.freeze(x.ids, why)
    # Labels that meet these axes later must meet frozen atoms there.
    known = {a for x in labels for a in x.axes}
    return (*labels, *(Label(atoms.project(label, (a,)), a) for a in label.axes if a not in known))


def concatenate(
    atoms: Atoms, operands: Sequence[tuple[Labels, Shape]], axis: int, reason: NewBarrier, tensor: str
) -> Labels:
    """Return labels of operands joined along ``axis``."""
    rank = len(operands[0][1])
    # Operands without positions along the axis give none, but their other sizes have to fit.
    all_operands, operands = operands, [x for x in operands if x[1][axis] != 0] or operands
    others: list[tuple[Labels, Shape]] = []
    for labels, shape in all_operands:
        other_labels = tuple(x for x in labels if x.ids.shape[axis] == 1)
        others.append((other_labels, (*shape[:axis], 1, *shape[axis + 1 :])))
    axis_labels = [covering(labels, axis) for labels, _ in operands]
    spans = {x.axes for x in axis_labels if x is not None}
    other_axes = sorted({a for axes in spans for a in axes} - {axis})
    # A grid axis is compared through the grid itself, so that its operands need no second label there.
    result = broadcast(atoms, others, rank, reason, skip=other_axes)
    if not spans:
        return result
    if any(covering(result, a) is not None for a in other_axes) or (other_axes and len(all_operands) > len(operands)):
        why = reason(Reason.UNSUPPORTED_FORM, "a grid is concatenated with a tensor of another labelling")
        for labels, _ in all_operands:
            for x in labels:
                atoms.freeze(x.ids, why)
        return NONE
    outer = np.broadcast_shapes(
        *(tuple(1 if a == axis else n for a, n in enumerate(x.ids.shape)) for x in axis_labels if x)
    )
    parts = []
    for axis_label, (_, shape) in zip(axis_labels, operands, strict=True):
        full = tuple(int(shape[axis] or 0) if a == axis else n for a, n in enumerate(outer))
        if axis_label is None:
            filler = atoms.new(int(np.prod(full)), tensor, axis)
            atoms.freeze(filler, reason(Reason.UNLABELLED_OPERAND, "a concatenated part has no removable channels"))
            parts.append(filler.reshape(full))
        else:
            parts.append(np.broadcast_to(axis_label.ids, full))
    packs = {x.pack for x in axis_labels if x is not None and x.is_grid} or {axis}
    if len(packs) > 1:
        for present in axis_labels:
            if present is not None:
                atoms.couple(present)
    return (*result, Label(np.concatenate(parts, axis=axis), max(packs)))


def split_points(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, stop) of consecutive parts of the given sizes."""
    return list(pairwise(np.cumsum([0, *sizes]).tolist()))


# A merged grid that would need more entries than this is fixed instead: it only arises where spatial axes mix in.
LARGEST = 1 << 23


def transpose(labels: Labels, perm: Sequence[int]) -> Labels:
    """Return labels after a permutation of the axes."""
    where = {int(p): i for i, p in enumerate(perm)}
    return tuple([Label(x.ids.transpose(perm), where[x.pack], -1 if x.is_grid else x.start) for x in labels])


def remove_axis(labels: Labels, axis: int) -> Labels:
    """Return labels after removal of an axis that none of them depends on."""
    return tuple(Label(x.ids.reshape(_without(x.ids.shape, axis)), x.pack - (x.pack > axis), x.start) for x in labels)


def insert_axis(labels: Labels, axis: int) -> Labels:
    """Return labels after insertion of an axis of size 1 at ``axis``."""
    return tuple(Label(np.expand_dims(x.ids, axis), x.pack + (x.pack >= axis), x.start) for x in labels)


def take(atoms: Atoms, labels: Labels, axis: int, index: Ids, reason: NewBarrier) -> Labels:
    """Return labels of the positions ``index`` (1-D) along ``axis``.

    The axis stays, with size 1 for a single position.
    """
    label = covering(labels, axis)
    if label is None:
        return labels
    other_labels = drop(labels, label)
    part = label.ids.take(index, axis=axis)
    if index.size == 0:
        return other_labels
    if index.size == 1:
        if label.is_grid and axis == label.pack:
            _view_parts(atoms, label, axis, int(index[0]), int(index[0]) + 1)
        return (*other_labels, *_pick_one(atoms, label, axis, part, reason))
    if label.is_grid and axis == label.pack:
        if (np.diff(index) != 1).any():
            atoms.couple(label)
        else:
            _view_parts(atoms, label, axis, int(index[0]), int(index[-1]) + 1)
    return (*other_labels, Label(part, label.pack))


def _pick_one(atoms: Atoms, label: Label, axis: int, part: Ids, reason: NewBarrier) -> Labels:
    if not label.is_grid:
        atoms.freeze(part, reason(Reason.FIXED_SIZE, "a single channel is picked out by its position"))
        return ()
    if axis != label.pack:
        return (Label(part, label.pack),)
    rows = atoms.rows_of(label)
    atoms.unite(part, rows.ids)
    return (rows,)


def _view_parts(atoms: Atoms, label: Label, axis: int, start: int, stop: int) -> None:
    """Balance the parts of a grid's pack axis: a range has the same bounds in every row, so earlier parts count."""
    size = label.ids.shape[axis]
    for low, high in ((0, start), (start, stop), (stop, size)):
        if high - low > 1:
            atoms.view(Label(label.ids.take(np.arange(low, high), axis=axis), label.pack))
        elif high - low == 1 and (low, high) != (start, stop):
            rows = atoms.rows_of(label)
            atoms.unite(label.ids.take([low], axis=axis), rows.ids)


def runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into runs of equal product: pairs of (axes before, axes after), leading and inner 1s included."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs, p, q = [], [], 1, 1
        if i < len(before):
            ins, p, i = [i], before[i], i + 1
        if j < len(after):
            outs, q, j = [j], after[j], j + 1
        while p != q:
            if p < q and i < len(before):
                p, ins, i = p * before[i], [*ins, i], i + 1
            elif j < len(after):
                q, outs, j = q * after[j], [*outs, j], j + 1
            else:
                break
        if result and p == 1 and (not ins or not outs):
            result[-1][0].extend(ins)
            result[-1][1].extend(outs)
        else:
            result.append((ins, outs))
    return result


def reshape(atoms: Atoms, labels: Labels, before: Sequence[int], after: Sequence[int], reason: NewBarrier) -> Labels:
    """Return labels after a reshape between known sizes. Only runs that a label depends on are materialised."""
    if not labels:
        return labels
    parts = runs(before, after)
    result: Labels = ()
    for label in _one_per_run(atoms, labels, parts, reason):
        reshaped = _reshape_one(atoms, label, parts, before, after, reason)
        if reshaped is not None:
            result = (*result, reshaped)
    return result


def _one_per_run(atoms: Atoms, labels: Labels, parts: list[tuple[list[int], list[int]]], reason: NewBarrier) -> Labels:
    """Fix the smaller of two labels that a reshape would multiply into one axis: only one of them can remain."""
    result: Labels = labels
    for ins, outs in parts:
        if len(ins) < 2 and len(outs) < 2:
            continue
        run_labels = [x for x in result if any(x.ids.shape[a] > 1 for a in ins)]
        if len(run_labels) > 1:  # repetitions of the channels, such as once per sample, do not count
            run_labels.sort(key=lambda x: np.unique(x.ids).size)
        for label in run_labels[:-1]:
            why = reason(Reason.UNSUPPORTED_FORM, "two independently removable axes are merged into one")
            atoms.freeze(label.ids, why)
            result = drop(result, label)
    return result


def _reshape_one(
    atoms: Atoms,
    label: Label,
    parts: list[tuple[list[int], list[int]]],
    before: Sequence[int],
    after: Sequence[int],
    reason: NewBarrier,
) -> Label | None:
    unchanged = _moved_whole(label, parts, before, after)
    if unchanged is not None:
        return unchanged
    source, target, pack = list(label.ids.shape), [1] * len(after), label.pack
    new_pack = -1
    for ins, outs in parts:
        labelled_axes = [a for a in ins if label.ids.shape[a] > 1]
        if not labelled_axes:
            continue
        for a in ins:
            source[a] = before[a]
        for b in outs:
            target[b] = after[b]
        if pack in labelled_axes:
            # The rest of the label keeps its order through a merge only where the pack axis is the
            # innermost labelled one.
            if pack != labelled_axes[-1]:
                atoms.couple(label)
            new_pack = -2 - parts.index((ins, outs))
    if int(np.prod(source, dtype=np.int64)) > LARGEST:
        atoms.freeze(label.ids, reason(Reason.SPATIAL, "channels are merged with many spatial positions"))
        return None
    ids = np.broadcast_to(label.ids, source).reshape(target)
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1 and (ids == ids.take([0], axis=axis)).all():
            ids = ids.take([0], axis=axis)
    outs = parts[-2 - new_pack][1]
    inner = [b for b in outs if ids.shape[b] > 1] or [b for b in range(ids.ndim) if ids.shape[b] > 1]
    if not inner:
        atoms.freeze(ids, reason(Reason.UNSUPPORTED_FORM, "a reshape leaves no axis with removable channels"))
        return None
    return Label(ids, inner[-1])


def _moved_whole(
    label: Label, parts: list[tuple[list[int], list[int]]], before: Sequence[int], after: Sequence[int]
) -> Label | None:
    """Return a one-axis label that the reshape neither splits nor merges: the common case, and a quick one."""
    if len(label.axes) != 1:
        return None
    axis = label.axes[0]
    outs = next(outs for ins, outs in parts if axis in ins)
    where = [b for b in outs if after[b] > 1]
    if len(where) != 1 or after[where[0]] != before[axis]:
        return None
    target = [1] * len(after)
    target[where[0]] = before[axis]
    return Label(label.ids.reshape(target), where[0], label.start)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
