"""Operators that take or add ranges along an axis: Split, Slice, Pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.evaluate import slice_of
from onnxprune.labels.combine import split_points
from onnxprune.labels.label import Label, covering, drop
from onnxprune.rules.context import Cut, Step
from onnxprune.rules.registry import Rule, register


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
        """Bounds move with the positions before them; a strided slice of cut channels becomes impossible as a range."""
        bounds = self._bounds(cut.before)
        source = cut.node.inputs[0]
        if bounds is None:
            return
        before = cut.before.shape(0)
        changed = False
        starts, ends = [], []
        for axis, start, end, stride in bounds:
            window = slice_of(start, end, stride, before[axis])
            labelled = covering(cut.before.labels(0), axis) is not None
            if not labelled or not cut.touched(source) or cut.shape(0)[axis] == before[axis]:
                starts.append(start)
                ends.append(end)
                continue
            if stride != 1:
                cut.fail("a strided slice over cut channels")
            low = cut.kept_between(source, axis, 0, window.start)
            starts.append(low)
            high = low + cut.kept_between(source, axis, window.start, window.stop or 0)
            ends.append(end if end >= before[axis] else high)
            changed = True
        values = [cut.value(1), cut.value(2)] if cut.node.version >= 10 else [None, None]
        self._state(cut, starts, ends, values, changed)

    @staticmethod
    def _state(
        cut: Cut, starts: list[int], ends: list[int], values: Sequence[NDArray[Any] | None], changed: bool
    ) -> None:
        if cut.node.version < 10:
            if changed:
                cut.set_attr("starts", starts)
                cut.set_attr("ends", ends)
            return
        for i, (wanted, value) in enumerate(zip((starts, ends), values, strict=True), start=1):
            if value is None or value.ravel().tolist() != wanted:
                cut.set_target(i, wanted)


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
