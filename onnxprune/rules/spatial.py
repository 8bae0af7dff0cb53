"""Operators local to a channel: pooling, resizing, sampling."""

from __future__ import annotations

import numpy as np

from onnxprune.labels.label import Labels
from onnxprune.rules.context import Cut, Step
from onnxprune.rules.registry import Rule, register


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


class AcrossChannels(Rule):
    """LRN and the like: neighbouring channels meet."""

    def propagate(self, step: Step) -> None:
        """The channel axis keeps its size and order."""
        labels = step.labels(0)
        step.fix_all_but(labels, (0,), "normalised", f"{step.node.op} mixes neighbouring channels")
        step.set(0, labels)


class Resize(Rule):
    """Resize and Upsample: axes whose size does not change pass."""

    operands = (1, 2, 3)
    targets = (3,)

    def _scaled(self, step: Step) -> list[int]:
        before, after = step.node.inputs[0], step.node.outputs[0]
        return [a for a in range(len(step.shape(0))) if not step.table.facts.same_size(before, a, after, a)]

    def propagate(self, step: Step) -> None:
        """Fix scaled axes; a region of interest is only followed where it is not used."""
        labels: Labels = step.labels(0)
        if step.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
            step.freeze(labels, "unsupported-form", "cropping and resizing at once")
            return
        for axis in self._scaled(step):
            labels = step.drop_axis(labels, axis, "spatial", f"{step.node.op} changes this axis")
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Sizes, when they are the operand, name the new number of channels."""
        sizes = cut.value(3) if cut.before.has(3) else None
        if not cut.before.has(3):
            return
        axes = cut.attr("axes")
        new = cut.out_shape()
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


class DepthToSpace(Rule):
    """Blocks of channels become pixels: the channels of one block go together. Modes DCR and CRD."""

    def propagate(self, step: Step) -> None:
        """Tie the block's channels; the output has one atom per block."""
        labels = step.labels(0)
        step.fix_all_but(labels, (0, 1), "spatial", "blocks of channels become positions of this axis")
        ids = step.axis_ids(labels, 1)
        if ids is None:
            return
        block = int(step.attr("blocksize")) ** 2
        grid = ids.reshape(block, -1).T if step.attr("mode", "DCR") == "DCR" else ids.reshape(-1, block)
        step.atoms.unite(grid, np.broadcast_to(grid[:, :1], grid.shape))
        out = grid[:, 0]
        rank = len(step.out_shape())
        if out.size > 1:
            label = labels[0]
            step.set(0, (type(label)(out.reshape((1, -1) + (1,) * (rank - 2)), 1),))
        else:
            step.freeze(labels, "fixed-size", "a single output channel needs the whole block")


class SpaceToDepth(Rule):
    """Blocks of pixels become channels: every channel appears once per position in the block."""

    def propagate(self, step: Step) -> None:
        """The output repeats the atoms, block after block."""
        labels = step.labels(0)
        step.fix_all_but(labels, (0, 1), "spatial", "positions of this axis become channels")
        ids = step.axis_ids(labels, 1)
        if ids is not None:
            out = np.tile(ids, int(step.attr("blocksize")) ** 2)
            step.set(0, (type(labels[0])(out.reshape((1, -1) + (1,) * (len(step.out_shape()) - 2)), 1),))


_POOLS = "AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool".split()
register("", *_POOLS, rule=Local())
register("", "LRN", "MeanVarianceNormalization", rule=AcrossChannels())
register("", "Resize", "Upsample", rule=Resize())
register("", "GridSample", rule=GridSample())
register("", "RoiAlign", "MaxRoiPool", rule=RoiAlign())
register("", "DepthToSpace", rule=DepthToSpace())
register("", "SpaceToDepth", rule=SpaceToDepth())
