"""Operators local to a channel: pooling, resizing, sampling, images."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Graph, Node
from onnxprune.labels.algebra import Shape, broadcast
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Ids, Label, Labels, along, covering
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.normalization import Reduce, ReduceMean
from onnxprune.operators.operands import Values, where_known, windows
from onnxprune.operators.registry import Rule, register, with_facts


class Local(Rule):
    """Batch and channel labels pass, spatial axes keep their size."""

    def propagate(self, step: Step) -> None:
        """Freeze the spatial axes."""
        labels = step.labels(0)
        is_global = step.node.op.startswith("Global")
        for axis in range(2, len(step.shape(0))):
            code = Reason.NORMALISED if is_global else Reason.SPATIAL
            labels = step.drop_axis(labels, axis, code, f"{step.node.op} works along this axis")
        step.set(0, labels)

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the number of windows along every spatial axis, or 1."""
        x = shapes[0]
        if node.op.startswith("Global"):
            return [(*x[:2], *(1,) * (len(x) - 2))]
        sizes = windows(node, x, node.attrs["kernel_shape"]) if node.op != "LpPool" else None
        return None if sizes is None else [(*x[:2], *sizes)] * len(node.outputs)


class Resize(Rule):
    """Resize and Upsample: axes without resampling pass."""

    operands = (1, 2, 3)
    targets = (3,)

    def _moved(self, step: Step) -> list[int]:
        """Return axes whose positions may move: resampled, cropped, or of a size derived from another axis."""
        rank = len(step.shape(0))
        axes = [int(a) % rank for a in step.attr("axes") or range(rank)]
        if step.has(3) and step.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
            return axes  # the largest or smallest of all ratios scales every one of them
        before, after, facts = step.node.inputs[0], step.node.outputs[0], step.table.facts
        resized = {a for a in range(rank) if not facts.same_size(before, a, after, a)}
        if not step.has(3):
            resized.update(self._where(axes, self._scales(step), [1.0] * len(axes)))
        if step.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
            identity = [*[0.0] * len(axes), *[1.0] * len(axes)]
            region = self._where([*axes, *axes], self._always(step, 1), identity)
            resized.update(region)
        return sorted(resized)

    @staticmethod
    def _where(axes: list[int], values: NDArray[Any] | None, identity: list[float]) -> list[int]:
        """Return axes whose value differs from the wanted one; all of them where values are not known."""
        if values is None or values.size != len(identity):
            return axes
        return [a for a, x, y in zip(axes, values.ravel().tolist(), identity, strict=True) if x != y]

    @staticmethod
    def _scales(step: Step) -> NDArray[Any] | None:
        if step.node.version < 9:
            return np.asarray(step.attr("scales", []))
        return Resize._always(step, 1 if step.node.version < 11 else 2)

    @staticmethod
    def _always(step: Step, i: int) -> NDArray[Any] | None:
        return step.table.facts.static_value(step.node.inputs[i]) if step.has(i) else None

    def propagate(self, step: Step) -> None:
        """Freeze the axes whose positions move."""
        labels: Labels = step.labels(0)
        for axis in self._moved(step):
            labels = step.drop_axis(labels, axis, Reason.SPATIAL, f"{step.node.op} changes this axis")
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Write the new number of channels into the sizes, where they are the operand."""
        if not cut.before.has(3) or cut.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
            return
        sizes, axes, new = cut.value(3), cut.attr("axes"), cut.out_shape()
        target = new if axes is None else tuple(new[int(a)] for a in axes)
        if sizes is None or tuple(sizes.tolist()) != target:
            cut.set_target(3, target)


class GridSample(Rule):
    """Sampling at given positions; the grid of positions keeps its size."""

    def propagate(self, step: Step) -> None:
        """Pass the channels of input 0."""
        labels = step.labels(0)
        for axis in (0, *range(2, len(step.shape(0)))):
            labels = step.drop_axis(labels, axis, Reason.SPATIAL, f"{step.node.op} samples this axis")
        step.set(0, labels)


class RoiAlign(GridSample):
    """Crops of regions, which replace the batch; channels pass, the axes that are sampled keep their sizes."""


class Blocks(Rule):
    """Rearrangement between channels and pixels, in blocks."""

    def parts(self, step: Step) -> tuple[Labels, Ids | None]:
        """Return the labels of the batch, which pass, and the atoms of the channels."""
        why = "blocks of channels and positions of this axis change places"
        labels = step.drop_all_but(step.labels(0), (0, 1), Reason.SPATIAL, why)
        if any(x.is_grid for x in labels):
            labels = step.drop_axis(labels, 0, Reason.UNSUPPORTED_FORM, "channels are labelled together with the batch")
        ids = step.axis_ids(labels, 1)
        return tuple(x for x in labels if x.axes == (0,)), ids

    def state(self, step: Step, batch: Labels, out: Ids) -> None:
        """Set the output's labels from those of its channels."""
        step.set(0, (*batch, along(out, 1, len(step.out_shape()))))


class DepthToSpace(Blocks):
    """Blocks of channels become pixels: the channels of one block are tied. Modes DCR and CRD."""

    chooses = True

    def propagate(self, step: Step) -> None:
        """Tie the channels of a block; the output has one atom per block."""
        batch, ids = self.parts(step)
        if ids is None:
            step.set(0, batch)
            return
        block = int(step.attr("blocksize")) ** 2
        grid = ids.reshape(block, -1).T if step.attr("mode", "DCR") == "DCR" else ids.reshape(-1, block)
        step.atoms.unite(grid, np.broadcast_to(grid[:, :1], grid.shape))
        out = grid[:, 0]
        if out.size == 1:
            step.atoms.freeze(ids, step.reason(Reason.FIXED_SIZE, "a single output channel needs the whole block"))
        self.state(step, batch, out)


class SpaceToDepth(Blocks):
    """Blocks of pixels become channels: every channel occurs once per position in the block. Modes DCR and CRD."""

    chooses = True

    def propagate(self, step: Step) -> None:
        """Repeat the atoms in the output, block after block or channel after channel."""
        batch, ids = self.parts(step)
        if ids is None:
            step.set(0, batch)
            return
        block = int(step.attr("blocksize")) ** 2
        self.state(step, batch, np.repeat(ids, block) if step.attr("mode", "DCR") == "CRD" else np.tile(ids, block))


class Largest(Local):
    """Maximum over all positions."""

    chooses = True


class Average(Local):
    """Means over windows, or over all positions."""

    averages = True


class GlobalNorm(Reduce):
    """The norm over all positions, which may be channels: positions that are 0 leave it as it is."""

    def axes(self, step: Step) -> list[int] | None:
        """Return all axes behind the channels."""
        return list(range(2, len(step.shape(0))))

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return size 1 along all axes behind the channels."""
        return [(*shapes[0][:2], *(1,) * (len(shapes[0]) - 2))]


class GlobalAverage(GlobalNorm, ReduceMean):
    """The mean over all positions: of tokens, each a channel of [N, tokens, channels], it is that over channels."""


register("", "LpPool", rule=Local())
register("", "GlobalLpPool", rule=GlobalNorm(contraction=True))
register("", "GlobalMaxPool", rule=Largest())
register("", "AveragePool", rule=Average())
register("", "GlobalAveragePool", rule=GlobalAverage(contraction=True))
register("", "Resize", "Upsample", rule=Resize())
register("", "GridSample", rule=GridSample())
register("", "RoiAlign", rule=RoiAlign())
register("", "MaxRoiPool", rule=with_facts(RoiAlign(), jumps=True))
register("", "DepthToSpace", rule=DepthToSpace())
register("", "SpaceToDepth", rule=SpaceToDepth())


# Operators that pass a MaxPool's positions unchanged; spatial axes may be sliced.
_PASSING = ("Identity", "Slice")


def pooled_from(graph: Graph, name: str) -> Node | None:
    """Return the MaxPool that produces positions, through slices alone."""
    for _ in range(16):
        node = graph.producer.get(name)
        if node is None or node.domain:
            return None
        if node.op == "MaxPool":
            return node if name in node.outputs[1:] else None
        if node.op not in _PASSING:
            return None
        name = node.inputs[0]
    return None


class MaxPool(Local):
    """Max pooling with optional positions of the maxima, flat indices into the whole tensor including channels."""

    chooses = True

    def propagate(self, step: Step) -> None:
        """Pass the labels; the positions have the data's channels if they only feed MaxUnpool or differences."""
        labels = step.labels(0)
        for axis in range(2, len(step.shape(0))):
            labels = step.drop_axis(labels, axis, Reason.SPATIAL, f"{step.node.op} works along this axis")
        name = step.node.outputs[1] if len(step.node.outputs) > 1 else ""
        if name and not self._serves(step.table.graph, name, step.node.inputs[0]):
            step.freeze(labels, Reason.UNSUPPORTED_FORM, "the positions that MaxPool reports depend on all channels")
        step.set(0, labels)
        step.set(1, labels)

    def _serves(self, graph: Graph, name: str, data: str) -> bool:
        """Return whether no consumer reads the positions as numbers, which depend on the number of channels."""
        if name in graph.outputs or name in graph.captured:
            return False
        return all(self._reads(graph, node, i, data) for node, i in graph.consumers.get(name, ()))

    def _reads(self, graph: Graph, node: Node, i: int, data: str) -> bool:
        if node.domain:
            return False
        if node.op == "MaxUnpool":
            return i == 1
        if node.op == "Sub":  # in a difference of positions in the same tensor channels cancel
            pools = [pooled_from(graph, n) for n in node.inputs]
            return all(s is not None and s.inputs[0] == data for s in pools)
        return node.op in _PASSING and i == 0 and self._serves(graph, node.outputs[0], data)


class MaxUnpool(Rule):
    """Values scattered to the positions that a MaxPool reported."""

    operands = targets = (2,)

    def propagate(self, step: Step) -> None:
        """Unite the channels of values and positions, where the result has the shape of the pooled tensor."""
        values, positions = step.labels(0), step.labels(1)
        pool = pooled_from(step.table.graph, step.node.inputs[1])
        source = None if pool is None or step.table.graph.producer[step.node.inputs[1]] is not pool else pool.inputs[0]
        if source is None or tuple(step.table.facts.shape(source) or ()) != step.out_shape():
            for labels in (values, positions):
                step.freeze(
                    labels, Reason.UNSUPPORTED_FORM, "positions in a tensor of another size than that of the MaxPool"
                )
            return
        parts = []
        for labels in (values, positions):
            for axis in range(2, len(step.shape(0))):
                labels = step.drop_axis(labels, axis, Reason.SPATIAL, "MaxUnpool works along this axis")
            parts.append(labels)
        shape = (*step.shape(0)[:2], *(1,) * (len(step.shape(0)) - 2))
        step.set(0, broadcast(step.atoms, [(labels, shape) for labels in parts], len(shape), step.reason))

    def rewrite(self, cut: Cut) -> None:
        """Write the new shape of the result, where it is an operand."""
        target = cut.value(2) if cut.before.has(2) else None
        if cut.before.has(2) and (target is None or tuple(target.tolist()) != cut.out_shape()):
            cut.set_target(2, cut.out_shape())

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the given shape, else the smallest shape that the windows cover."""
        x, attrs = shapes[0], node.attrs
        if len(node.inputs) > 2 and node.inputs[2]:
            return [None if values[2] is None else tuple(int(n) for n in values[2])]
        if x is None:
            return [None]
        kernel = attrs["kernel_shape"]
        strides, pads = attrs.get("strides") or [1] * len(kernel), attrs.get("pads") or [0] * 2 * len(kernel)
        padding = [low + high for low, high in zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
        per_axis = zip(x[2:], strides, kernel, padding, strict=True)
        return [(*x[:2], *(None if n is None else (n - 1) * s + k - p for n, s, k, p in per_axis))]


class Col2Im(Rule):
    """Columns [N, C * block, L] summed into an image [N, C, ...]: a channel is pruned with its whole block."""

    operands = (1, 2)

    def propagate(self, step: Step) -> None:
        """Tie the cells of a channel's block, a row of the grid."""
        labels, block = step.labels(0), step.value(2)
        labels = step.drop_axis(labels, 2, Reason.SPATIAL, "Col2Im adds up along this axis")
        label = covering(labels, 1)
        if label is None or block is None or label.is_grid or prod(block.tolist()) > label.ids.size:
            step.freeze(labels, Reason.UNSUPPORTED_FORM, "the columns of a block are not known")
            return
        grid = label.ids.reshape(-1, prod(block.tolist()))
        step.atoms.unite(grid, np.broadcast_to(grid[:, :1], grid.shape))
        rank = len(step.out_shape())
        if len(grid) == 1:
            step.freeze((label,), Reason.FIXED_SIZE, "a single channel")
            return
        step.set(0, (Label(grid[:, 0].reshape(1, -1, *(1,) * (rank - 2)), 1),))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, C, ...], where the image and the block are known."""
        x, image, block = shapes[0], values[1], values[2]
        if x is None or x[1] is None or image is None or block is None:
            return [None]
        return [(x[0], x[1] // prod(block.tolist()), *(int(n) for n in image))]


class AffineGrid(Rule):
    """A grid of positions of an image [N, C, ...]; it reads the image's sizes except that of the channels."""

    operands = (1,)

    def propagate(self, step: Step) -> None:
        """Freeze the matrices; the result has no channels."""
        step.freeze(step.labels(0), Reason.FIXED_SIZE, "AffineGrid reads every number of its matrices")

    def rewrite(self, cut: Cut) -> None:
        """Keep the sizes other than that of the channels."""
        old, new = cut.before.table.facts.value(cut.node.inputs[1]), cut.value(1)
        if old is None or new is None:
            cut.fail("the size of the image is not known")
        elif np.delete(old, 1).tolist() != np.delete(new, 1).tolist():
            cut.set_target(1, old.tolist())


class CenterCropPad(Rule):
    """The centre of some axes, or zeros around them."""

    operands = targets = (1,)

    @staticmethod
    def _axes(step: Step) -> list[int]:
        rank = len(step.shape(0))
        return [int(a) % rank for a in step.attr("axes", range(rank))]

    def propagate(self, step: Step) -> None:
        """Pass the axes that keep their size."""
        labels, after = step.labels(0), step.out_shape()
        for axis in self._axes(step):
            if after[axis] != step.shape(0)[axis] or step.table.facts.varies(step.node.outputs[0], axis):
                labels = step.drop_axis(labels, axis, Reason.SPATIAL, "this axis is cropped or padded")
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Update the size operand."""
        target, sizes = [cut.out_shape()[a] for a in self._axes(cut.before)], cut.value(1)
        if None not in target and (sizes is None or sizes.ravel().tolist() != target):
            cut.set_target(1, target)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the given sizes, and the data's on the other axes."""
        x, sizes = shapes[0], values[1]
        if x is None or sizes is None:
            return [None]
        result = list(x)
        for axis, n in zip(node.attrs.get("axes", range(len(x))), sizes.ravel().tolist(), strict=True):
            result[axis] = int(n)
        return [tuple(result)]


register("", "MaxPool", rule=MaxPool())
register("", "MaxUnpool", rule=MaxUnpool())
register("", "Col2Im", rule=Col2Im())
register("", "AffineGrid", rule=AffineGrid())
register("", "CenterCropPad", rule=CenterCropPad())
