"""Operators that take or add ranges along an axis: Split, Slice, Pad."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.evaluate import slice_of
from onnxprune.labels.combine import split_points
from onnxprune.labels.label import Label, covering, drop
from onnxprune.rules.context import Cut, Step
from onnxprune.rules.registry import Rule, register

Range = tuple[int, int, int]
"""(start, end, step) along one axis."""
# Either bound fits into 32 bits, which operands may have.
_LAST = (1 << 31) - 1
_WHOLE: Range = (0, _LAST, 1)


class Split(Rule):
    """Consecutive parts along one axis."""

    operands = (1,)

    def propagate(self, step: Step) -> None:
        """Take each part's range."""
        axis, labels = step.axis(), step.labels(0)
        sizes = [step.table.facts.shape(o)[axis] for o in step.node.outputs if o]
        if len(sizes) != len(step.node.outputs) or None in sizes:
            step.freeze(labels, "dynamic-shape", "the sizes of the parts are not known")
            return
        for o, (start, stop) in enumerate(split_points(sizes)):
            step.set(o, step.take(labels, axis, np.arange(start, stop)))

    def rewrite(self, cut: Cut) -> None:
        """State the new sizes of the parts."""
        axis = cut.before.axis()
        if cut.keep(cut.node.inputs[0], axis) is None and not cut.touched():
            return
        sizes = [cut.out_shape(o)[axis] for o in range(len(cut.node.outputs))]
        if cut.before.has(1):
            value = cut.value(1)
            if value is None or value.tolist() != sizes:
                cut.set_target(1, sizes)
        elif "split" in cut.node.attrs:
            cut.set_attr("split", sizes)
        elif len(set(sizes)) > 1:
            if cut.node.version >= 13:
                cut.set_target(1, sizes)
                cut.set_attr("num_outputs", None)
            else:
                cut.set_attr("split", sizes)


class Slice(Rule):
    """Ranges along axes, with constant bounds."""

    operands = (1, 2, 3, 4)

    def _bounds(self, step: Step) -> list[tuple[int, int, int, int]] | None:
        """(axis, start, end, step) of every sliced axis; None where a bound is not known."""
        rank = len(step.shape(0))
        if step.node.version < 10:
            starts, ends = step.attr("starts"), step.attr("ends")
            axes, steps = step.attr("axes", list(range(len(starts)))), [1] * len(starts)
        else:
            values = [step.value(i) for i in range(1, 5)]
            if (
                any(step.has(i + 1) and v is None for i, v in enumerate(values))
                or values[0] is None
                or values[1] is None
            ):
                return None
            starts, ends = values[0].ravel(), values[1].ravel()
            axes = list(range(len(starts))) if values[2] is None else values[2].ravel().tolist()
            steps = [1] * len(starts) if values[3] is None else values[3].ravel().tolist()
        return [(int(a) % rank, int(s), int(e), int(t)) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)]

    def propagate(self, step: Step) -> None:
        """Take the positions; an axis sliced at unknown bounds keeps its size."""
        labels, shape = step.labels(0), step.shape(0)
        bounds = self._bounds(step)
        if bounds is None:
            known = step.value(3) if step.has(3) else None
            axes = range(len(shape)) if known is None else [int(a) % len(shape) for a in known.ravel()]
            for axis in axes:
                labels = step.drop_axis(labels, axis, "missing-constant", "this axis is sliced at computed bounds")
            step.set(0, labels)
            return
        for axis, start, end, stride in bounds:
            if covering(labels, axis) is not None:
                index = np.arange(shape[axis])[slice_of(start, end, stride, shape[axis])]
                if index.size == shape[axis] and stride == 1:
                    continue
                labels = step.take(labels, axis, index)
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Bounds and steps that pick what is left of the positions; a Gather where no range does."""
        bounds = self._bounds(cut.before)
        if bounds is None:
            return
        before, source = cut.before.shape(0), cut.node.inputs[0]
        ranges: list[Range] = []
        picks: list[tuple[int, NDArray[np.int64]]] = []
        for k, (axis, *bound) in enumerate(bounds):
            old: Range = (bound[0], bound[1], bound[2])
            keep = cut.keep(source, axis)
            if keep is None:
                ranges.append(old)
                continue
            index = np.arange(before[axis])[slice_of(*old, before[axis])]
            positions = (np.cumsum(keep) - 1)[index[keep[index]]]
            fit = _as_range(positions, int(keep.sum()), old, self._stated(cut, k) or old)
            if fit is None:
                picks.append((axis, positions))
            ranges.append(fit or _WHOLE)
        last = picks.pop() if len(picks) == len(ranges) > 0 else None
        for axis, positions in picks:
            cut.pick(0, axis, positions)
        if last is not None:
            cut.replace("Gather", 2, axis=last[0])
            cut.set_input(1, last[1])
        elif cut.node.version >= 10:
            self._state(cut, ranges)
        elif ranges != [tuple(bound) for _, *bound in bounds]:
            cut.set_attr("starts", [r[0] for r in ranges])
            cut.set_attr("ends", [r[1] for r in ranges])

    @staticmethod
    def _stated(cut: Cut, k: int) -> Range | None:
        """Entry ``k`` of the bounds and steps as the cut model has them; None where one is not known."""
        if cut.node.version < 10:
            return None
        values = [cut.value(i) for i in (1, 2)] + ([cut.value(4)] if cut.before.has(4) else [np.ones(k + 1, int)])
        start, end, step = (None if v is None or v.size <= k else int(v.ravel()[k]) for v in values)
        return None if start is None or end is None or step is None else (start, end, step)

    @staticmethod
    def _state(cut: Cut, ranges: list[Range]) -> None:
        operands = (1, 2, 4) if cut.before.has(4) else (1, 2)
        for i, wanted in zip(operands, (list(column) for column in zip(*ranges, strict=True)), strict=False):
            value = cut.value(i)
            if value is None or value.ravel().tolist() != wanted:
                cut.set_target(i, wanted)


def _as_range(positions: NDArray[np.int64], size: int, *known: Range) -> Range | None:
    """A range that picks these positions of an axis of ``size``, one that is known before others; None if none does."""
    apart = set(np.diff(positions).tolist()) or {known[0][2]}
    if not positions.size:
        return (0, 0, known[0][2])
    if len(apart) > 1:
        return None
    step, first, last = apart.pop(), int(positions[0]), int(positions[-1])
    stop = last + (1 if step > 0 else -1)
    tries = [*known[::-1], (first, known[0][1], step), (first, stop if stop >= 0 else -_LAST, step)]
    return next((t for t in tries if t[2] and _picks(t, size, positions)), None)


def _picks(bound: Range, size: int, positions: NDArray[np.int64]) -> bool:
    return np.array_equal(np.arange(size)[slice_of(*bound, size)], positions)


class Pad(Rule):
    """Constant padding of a labelled axis adds channels that may be removed like any other."""

    operands = (1, 3)

    def pads(self, step: Step) -> list[tuple[int, int]] | None:
        """(before, after) of every axis; None where not known."""
        rank = len(step.shape(0))
        if step.node.version < 11:
            flat = step.attr("pads", step.attr("paddings"))
            axes = list(range(rank))
        else:
            value = step.value(1)
            if value is None:
                return None
            flat = value.tolist()
            chosen = step.value(3)
            if step.has(3) and chosen is None:
                return None
            axes = list(range(rank)) if chosen is None else [int(a) % rank for a in chosen.ravel()]
        result = [(0, 0)] * rank
        for i, axis in enumerate(axes):
            result[axis] = (int(flat[i]), int(flat[i + len(axes)]))
        return result

    def propagate(self, step: Step) -> None:
        """Born atoms stand for constant fill; any other padding of a labelled axis fixes it."""
        labels = step.labels(0)
        pads = self.pads(step)
        if pads is None:
            step.freeze(labels, "missing-constant", "the padding is not known")
            return
        for axis, (low, high) in enumerate(pads):
            label = covering(labels, axis)
            if label is None or (low, high) == (0, 0):
                continue
            if label.is_grid or step.attr("mode", "constant") != "constant" or low < 0 or high < 0:
                labels = step.drop_axis(labels, axis, "fixed-size", "this axis is padded")
                continue
            born = step.atoms.new(low + high, step.node.outputs[0], axis)
            ids = np.concatenate([born[:low], label.ids.ravel(), born[low:]])
            shape = [1] * label.ids.ndim
            shape[axis] = ids.size
            labels = (*drop(labels, label), Label(ids.reshape(shape), axis))
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Padding shrinks by the filled channels that were removed."""
        pads = self.pads(cut.before)
        if pads is None:
            return
        new = []
        for axis, (low, high) in enumerate(pads):
            size = cut.before.out_shape()[axis]
            keep = cut.keep(cut.node.outputs[0], axis) if low or high else None
            new.append((low, high) if keep is None else (int(keep[:low].sum()), int(keep[size - high :].sum())))
        if cut.node.version < 11:
            if new != pads:
                cut.set_attr("pads", [p[0] for p in new] + [p[1] for p in new])
        else:
            axes = cut.before.value(3)
            order = range(len(new)) if axes is None else [int(a) % len(new) for a in axes.ravel()]
            wanted = [new[a][0] for a in order] + [new[a][1] for a in order]
            value = cut.value(1)
            if value is None or value.ravel().tolist() != wanted:
                cut.set_target(1, wanted)


register("", "Split", rule=Split())
register("", "Slice", rule=Slice())
register("", "Pad", rule=Pad())
