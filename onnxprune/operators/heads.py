"""Tensors laid out by attention heads, and the labels of attention over them."""

from __future__ import annotations

import numpy as np

from onnxprune.labels import movement
from onnxprune.labels.combine import Shape, align, broadcast
from onnxprune.labels.label import Label, Labels, covering
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contraction import contract

Part = tuple[Labels, Shape]
"""Labels and shape of queries, keys or values, laid out [batch, sequence, heads, head size]."""


def to_heads(step: Step, labels: Labels, shape: Shape, heads: int) -> Part:
    """[..., heads * size] as [..., heads, size]; [batch, heads, sequence, size] with the middle axes swapped."""
    if len(shape) == 4:
        return movement.transpose(labels, (0, 2, 1, 3)), (shape[0], shape[2], shape[1], shape[3])
    wide = int(shape[-1] or 0)
    if wide % heads:
        raise ValueError(f"{wide} channels do not divide into {heads} heads")
    # What is left of a grid must be one: every head keeps the same number of its own channels.
    return _viewed(step, labels, (*shape[:-1], wide), (*shape[:-1], heads, wide // heads))


def _viewed(step: Step, labels: Labels, before: Shape, after: Shape) -> Part:
    """A reshape of the last axes alone; the leading ones may depend on the data."""
    ahead = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    for axis in range(ahead):
        labels = step.drop_axis(labels, axis, "fixed-size", "attention runs along this axis")
    ones = [1] * ahead
    source, target = [*ones, *(n or 1 for n in before[ahead:])], [*ones, *(n or 1 for n in after[ahead:])]
    moved = movement.reshape(step.atoms, labels, source, target, step.reason)
    for label in moved:
        step.atoms.view(label)
    return moved, after


def repeated(step: Step, part: Part, times: int) -> Part:
    """Keys or values of fewer heads than the queries: each serves ``times`` of them in a row."""
    labels, shape = part
    heads = covering(labels, 2)
    if times == 1:
        return part
    if heads is not None:
        step.atoms.view(heads)
    grown = tuple(Label(np.repeat(x.ids, times, axis=2), x.pack) if x is heads else x for x in labels)
    return grown, (*shape[:2], int(shape[2] or 0) * times, shape[3])


def attend(step: Step, q: Part, k: Part, v: Part, bias: Part | None = None) -> tuple[Labels, Labels]:
    """Labels of the scores [batch, heads, query, key] and of the result [batch, query, heads, size].

    Head sizes of queries and keys unite and leave; a head goes with its query, key, value and bias.
    """
    parts = []
    for labels, shape in (q, k, v):
        parts.append((along_heads(step, labels), (1, 1, *shape[2:])))
    (ql, qs), (kl, ks), (vl, vs) = parts
    scores = contract(step, [(ql, qs, "bshd"), (kl, ks, "blhd")], "bhsl")
    if bias is not None:
        heads = (1, int(qs[2] or 0), 1, 1)
        own = bias[0]
        for axis in (0, 2, 3):
            own = step.drop_axis(own, axis, "fixed-size", "attention runs along this axis")
        shape = tuple(n if a == 1 else 1 for a, n in enumerate(bias[1]))
        scores = broadcast(step.atoms, [(scores, heads), (own, shape)], 4, step.reason)
    return scores, contract(step, [(scores, (1, qs[2], 1, 1), "bhsl"), (vl, vs, "blhv")], "bshv")


def as_rank_4(labels: Labels, shape: Shape) -> Part:
    """A bias or mask that broadcasts against the scores, with all four axes."""
    shift = 4 - len(shape)
    return align(labels, shift), (*(1,) * shift, *shape)


def flattened(step: Step, labels: Labels, heads: int, size: int) -> Labels:
    """[1, 1, heads, size] as [1, 1, heads * size]."""
    return movement.reshape(step.atoms, labels, (1, 1, heads, size), (1, 1, heads * size), step.reason)


def by_head(labels: Labels) -> Labels:
    """[batch, sequence, heads, size] as [batch, heads, sequence, size]."""
    return movement.transpose(labels, (0, 2, 1, 3))


def with_past(step: Step, part: Part, past: int) -> Part:
    """Keys or values behind cached ones [batch, heads, past, size], which share their channels."""
    if not step.has(past):
        return part
    cached, shape = to_heads(step, step.labels(past), step.shape(past), 1)
    one: Shape = (1, 1, *shape[2:])
    operands = [(along_heads(step, labels), one) for labels in (part[0], cached)]
    return broadcast(step.atoms, operands, 4, step.reason), part[1]


def along_heads(step: Step, labels: Labels) -> Labels:
    """Labels [batch, sequence, heads, size] of heads and size alone; the other axes keep their sizes."""
    for axis in (0, 1):
        labels = step.drop_axis(labels, axis, "fixed-size", "attention runs along this axis")
    return labels


def heads_left(cut: Cut, i: int, heads: int, start: int = 0, stop: int | None = None) -> tuple[int, int]:
    """(heads, their size) of ``start:stop`` of the last axis of input ``i`` after the cut."""
    name, shape = cut.node.inputs[i], cut.before.shape(i)
    if len(shape) == 4:
        return cut.shape(i)[1], cut.shape(i)[3]
    stop = shape[-1] if stop is None else stop
    keep = cut.keep(name, len(shape) - 1)
    if keep is None:
        return heads, (stop - start) // heads
    grid = keep[start:stop].reshape(heads, -1)
    left = int(grid.any(axis=1).sum())
    return left, int(grid.sum()) // max(left, 1)
