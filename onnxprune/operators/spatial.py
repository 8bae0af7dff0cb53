"""Operators local to a channel: pooling, resizing, sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels.label import Ids, Labels, along
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.operands import Values, where_known, windows
from onnxprune.operators.registry import Rule, register


class Local(Rule):
    """Batch and channel labels pass, spatial axes keep their size."""

    def propagate(self, step: Step) -> None:
        """Fix what is spatial."""
        labels = step.labels(0)
        whole = step.node.op.startswith("Global")
        for axis in range(2, len(step.shape(0))):
            code = "normalised" if whole else "spatial"
            labels = step.drop_axis(labels, axis, code, f"{step.node.op} works along this axis")
        step.set(0, labels)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """As many positions as windows fit, or one."""
        x = shapes[0]
        if node.op.startswith("Global"):
            return [(*x[:2], *(1,) * (len(x) - 2))]
        sizes = windows(node, x, node.attrs["kernel_shape"]) if node.op != "LpPool" else None
        return None if sizes is None else [(*x[:2], *sizes)] * len(node.outputs)


class Resize(Rule):
    """Resize and Upsample: axes whose positions all stay where they are pass."""

    operands = (1, 2, 3)
    targets = (3,)

    def _moved(self, step: Step) -> list[int]:
        """Axes along which positions may move: sampled anew, cropped, or of a size that follows from another's."""
        rank = len(step.shape(0))
        chosen = [int(a) % rank for a in step.attr("axes") or range(rank)]
        if step.has(3) and step.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
            return chosen  # the largest or smallest of all ratios scales every one of them
        before, after, facts = step.node.inputs[0], step.node.outputs[0], step.table.facts
        moved = {a for a in range(rank) if not facts.same_size(before, a, after, a)}
        if not step.has(3):
            moved.update(self._where(chosen, self._scales(step), [1.0] * len(chosen)))
        if step.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
            whole = [*[0.0] * len(chosen), *[1.0] * len(chosen)]
            region = self._where([*chosen, *chosen], self._always(step, 1), whole)
            moved.update(region)
        return sorted(moved)

    @staticmethod
    def _where(axes: list[int], values: NDArray[Any] | None, wanted: list[float]) -> list[int]:
        """Axes whose value is another than the wanted one; all of them where values are not known."""
        if values is None or values.size != len(wanted):
            return axes
        return [a for a, x, y in zip(axes, values.ravel().tolist(), wanted, strict=True) if x != y]

    @staticmethod
    def _scales(step: Step) -> NDArray[Any] | None:
        if step.node.version < 9:
            return np.asarray(step.attr("scales", []))
        return Resize._always(step, 1 if step.node.version < 11 else 2)

    @staticmethod
    def _always(step: Step, i: int) -> NDArray[Any] | None:
        return step.table.facts.static_value(step.node.inputs[i]) if step.has(i) else None

    def propagate(self, step: Step) -> None:
        """Fix the axes along which positions move."""
        labels: Labels = step.labels(0)
        for axis in self._moved(step):
            labels = step.drop_axis(labels, axis, "spatial", f"{step.node.op} changes this axis")
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Sizes, when they are the operand, name the new number of channels."""
        if not cut.before.has(3) or cut.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
            return
        sizes, axes, new = cut.value(3), cut.attr("axes"), cut.out_shape()
        target = new if axes is None else tuple(new[int(a)] for a in axes)
        if sizes is None or tuple(sizes.tolist()) != target:
            cut.set_target(3, target)


class GridSample(Rule):
    """Samples positions; the grid of positions keeps its size."""

    def propagate(self, step: Step) -> None:
        """Channels of input 0 pass."""
        labels = step.labels(0)
        for axis in (0, *range(2, len(step.shape(0)))):
            labels = step.drop_axis(labels, axis, "spatial", f"{step.node.op} samples this axis")
        step.set(0, labels)


class RoiAlign(Rule):
    """Regions replace the batch; channels pass."""

    def propagate(self, step: Step) -> None:
        """Only channels pass."""
        labels = step.labels(0)
        for axis in (0, *range(2, len(step.shape(0)))):
            labels = step.drop_axis(labels, axis, "spatial", f"{step.node.op} samples this axis")
        step.set(0, labels)


class Blocks(Rule):
    """Channels and pixels are laid out anew, in blocks."""

    def parts(self, step: Step) -> tuple[Labels, Ids | None]:
        """Labels of the batch, which pass, and the atoms of the channels."""
        why = "blocks of channels and positions of this axis change places"
        labels = step.drop_all_but(step.labels(0), (0, 1), "spatial", why)
        if any(x.is_grid for x in labels):
            labels = step.drop_axis(labels, 0, "unsupported-form", "channels are labelled together with the batch")
        ids = step.axis_ids(labels, 1)
        return tuple(x for x in labels if x.axes == (0,)), ids

    def state(self, step: Step, batch: Labels, out: Ids) -> None:
        """The output's labels from those of its channels."""
        step.set(0, (*batch, along(out, 1, len(step.out_shape()))))


class DepthToSpace(Blocks):
    """Blocks of channels become pixels: the channels of one block go together. Modes DCR and CRD."""

    chooses = True

    def propagate(self, step: Step) -> None:
        """Tie the block's channels; the output has one atom per block."""
        batch, ids = self.parts(step)
        if ids is None:
            step.set(0, batch)
            return
        block = int(step.attr("blocksize")) ** 2
        grid = ids.reshape(block, -1).T if step.attr("mode", "DCR") == "DCR" else ids.reshape(-1, block)
        step.atoms.unite(grid, np.broadcast_to(grid[:, :1], grid.shape))
        out = grid[:, 0]
        if out.size == 1:
            step.atoms.freeze(ids, step.reason("fixed-size", "a single output channel needs the whole block"))
        self.state(step, batch, out)


class SpaceToDepth(Blocks):
    """Blocks of pixels become channels: every channel appears once per position in the block."""

    chooses = True

    def propagate(self, step: Step) -> None:
        """The output repeats the atoms, block after block."""
        batch, ids = self.parts(step)
        if ids is None:
            step.set(0, batch)
            return
        self.state(step, batch, np.tile(ids, int(step.attr("blocksize")) ** 2))


class Largest(Local):
    """The largest value of all positions."""

    chooses = True


class Average(Local):
    """Means over windows, or over all positions."""

    averages = True


register("", "LpPool", "GlobalLpPool", rule=Local())
register("", "GlobalMaxPool", rule=Largest())
register("", "AveragePool", "GlobalAveragePool", rule=Average())
register("", "Resize", "Upsample", rule=Resize())
register("", "GridSample", rule=GridSample())
register("", "RoiAlign", "MaxRoiPool", rule=RoiAlign())
register("", "DepthToSpace", rule=DepthToSpace())
register("", "SpaceToDepth", rule=SpaceToDepth())
