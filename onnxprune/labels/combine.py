"""Labels of tensors that meet position by position: elementwise operators with broadcasting, and all built on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from onnxprune.labels.atoms import Atoms
from onnxprune.labels.label import NONE, Label, Labels, covering, drop

Shape = tuple["int | None", ...]
Reason = Callable[[str, str], int]
"""(code, detail) -> index of the barrier, for the node at hand."""


def known(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape where every size is known, else None."""
    sizes = tuple(n for n in shape or () if n is not None)
    return sizes if shape is not None and len(sizes) == len(shape) else None


def align(labels: Labels, shift: int) -> Labels:
    """The labels after ``shift`` axes of size 1 were put in front."""
    if shift == 0:
        return labels
    return tuple(Label(x.ids.reshape((1,) * shift + x.ids.shape), x.pack + shift, x.start) for x in labels)


def broadcast(
    atoms: Atoms, operands: Sequence[tuple[Labels, Shape]], rank: int, reason: Reason, skip: Sequence[int] = ()
) -> Labels:
    """Labels of the result of operands that broadcast against each other (numpy's rules) into a tensor of ``rank``.

    Atoms that meet are united; an axis that is labelled in one operand and has positions but no label in another keeps
    its size. Axes in ``skip`` are not compared: labels there must already be absent.
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
                met = covering(result, axis)
                if met is not None:
                    atoms.fix_axis(
                        met, axis, reason("unlabelled-operand", f"axis {axis} meets a tensor without labels")
                    )
    return result


def _apart(labels: Labels) -> bool:
    """Whether no axis has two labels, so that there is nothing to unite."""
    if len(labels) == 1:
        return bool(labels[0].axes)
    axes = [a for label in labels for a in label.axes or (-1, -1)]
    return len(set(axes)) == len(axes)


def merge(atoms: Atoms, labels: Labels, label: Label, reason: Reason) -> Labels:
    """``labels`` joined by one more label of the same tensor, with what overlaps united."""
    if not label.axes:
        return labels
    if not labels:
        return (label,)
    overlapping = [x for x in labels if not set(x.axes).isdisjoint(label.axes)]
    if not overlapping:
        return (*labels, label)
    for other in overlapping:
        shared = tuple(a for a in label.axes if a in other.axes)
        if label.axes == other.axes and label.pack != other.pack:
            atoms.couple(label)
            atoms.couple(other)
        atoms.unite(atoms.project(other, shared), atoms.project(label, shared))
    covered = set(label.axes)
    if all(set(x.axes) <= covered for x in overlapping):
        for other in overlapping:
            labels = drop(labels, other)
        return (*labels, label)
    if len(overlapping) == 1 and covered <= set(overlapping[0].axes):
        return labels
    why = reason("unsupported-form", "grids over different axes meet")
    for x in (*overlapping, label):
        atoms.freeze(x.ids, why)
    # Whatever meets these axes later must meet frozen atoms there.
    known = {a for x in labels for a in x.axes}
    return (*labels, *(Label(atoms.project(label, (a,)), a) for a in label.axes if a not in known))


def concatenate(
    atoms: Atoms, operands: Sequence[tuple[Labels, Shape]], axis: int, reason: Reason, tensor: str
) -> Labels:
    """Labels of operands joined along ``axis``."""
    rank = len(operands[0][1])
    operands = [x for x in operands if x[1][axis] != 0] or operands
    others: list[tuple[Labels, Shape]] = []
    for labels, shape in operands:
        rest = tuple(x for x in labels if x.ids.shape[axis] == 1)
        others.append((rest, (*shape[:axis], 1, *shape[axis + 1 :])))
    joined = [covering(labels, axis) for labels, _ in operands]
    spans = {x.axes for x in joined if x is not None}
    extra = sorted({a for axes in spans for a in axes} - {axis})
    # A grid axis is compared through the grid itself, so that its operands need no second label there.
    result = broadcast(atoms, others, rank, reason, skip=extra)
    if not spans:
        return result
    if any(covering(result, a) is not None for a in extra):
        why = reason("unsupported-form", "a grid is concatenated with a tensor that is labelled otherwise")
        for labels, _ in operands:
            for x in labels:
                atoms.freeze(x.ids, why)
        return NONE
    outer = np.broadcast_shapes(*(tuple(1 if a == axis else n for a, n in enumerate(x.ids.shape)) for x in joined if x))
    parts = []
    for found, (_, shape) in zip(joined, operands, strict=True):
        full = tuple(int(shape[axis] or 0) if a == axis else n for a, n in enumerate(outer))
        if found is None:
            filler = atoms.new(int(np.prod(full)), tensor, axis)
            atoms.freeze(filler, reason("unlabelled-operand", "a concatenated part has no removable channels"))
            parts.append(filler.reshape(full))
        else:
            parts.append(np.broadcast_to(found.ids, full))
    packs = {x.pack for x in joined if x is not None and x.is_grid} or {axis}
    if len(packs) > 1:
        for present in joined:
            if present is not None:
                atoms.couple(present)
    return (*result, Label(np.concatenate(parts, axis=axis), max(packs)))


def split_points(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of consecutive parts."""
    return list(pairwise(np.cumsum([0, *sizes]).tolist()))
