"""Operators on images beside convolutions: pooled positions and the way back, columns, crops, grids of positions."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from onnxprune.graph.view import Graph, Node
from onnxprune.labels.combine import Shape, broadcast
from onnxprune.labels.label import Label, covering
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.registry import Rule, register
from onnxprune.operators.spatial import Local

# What a MaxPool's positions pass through as they are; spatial axes may be sliced.
_PASSING = ("Identity", "Slice")


def pooled_from(graph: Graph, name: str) -> Node | None:
    """The MaxPool that positions come from, where nothing but slices lies between."""
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
    """Pooling that may say where the largest values were: positions in the whole tensor, all channels counted."""

    chooses = True

    def propagate(self, step: Step) -> None:
        """Positions have the channels of the data where they only serve to put values back, or as differences."""
        labels = step.labels(0)
        for axis in range(2, len(step.shape(0))):
            labels = step.drop_axis(labels, axis, "spatial", f"{step.node.op} works along this axis")
        name = step.node.outputs[1] if len(step.node.outputs) > 1 else ""
        if name and not self._serves(step.table.graph, name, step.node.inputs[0]):
            step.freeze(labels, "unsupported-form", "the positions that MaxPool reports depend on all channels")
        step.set(0, labels)
        step.set(1, labels)

    def _serves(self, graph: Graph, name: str, data: str) -> bool:
        """Whether nobody sees the positions themselves: as numbers they count channels that may go."""
        if name in graph.outputs or name in graph.captured:
            return False
        return all(self._reads(graph, node, i, data) for node, i in graph.consumers.get(name, ()))

    def _reads(self, graph: Graph, node: Node, i: int, data: str) -> bool:
        if node.domain:
            return False
        if node.op == "MaxUnpool":
            return i == 1
        if node.op == "Sub":  # of positions in the same tensor channels cancel
            sources = [pooled_from(graph, n) for n in node.inputs]
            return all(s is not None and s.inputs[0] == data for s in sources)
        return node.op in _PASSING and i == 0 and self._serves(graph, node.outputs[0], data)


class MaxUnpool(Rule):
    """Values put back to where a MaxPool found them."""

    operands = targets = (2,)

    def propagate(self, step: Step) -> None:
        """Values and positions share their channels, where the result has those that the pooled tensor had."""
        values, positions = step.labels(0), step.labels(1)
        pool = pooled_from(step.table.graph, step.node.inputs[1])
        source = None if pool is None or step.table.graph.producer[step.node.inputs[1]] is not pool else pool.inputs[0]
        if source is None or tuple(step.table.facts.shape(source) or ()) != step.out_shape():
            for labels in (values, positions):
                step.freeze(
                    labels, "unsupported-form", "positions in a tensor of another size than that of the MaxPool"
                )
            return
        parts = []
        for labels in (values, positions):
            for axis in range(2, len(step.shape(0))):
                labels = step.drop_axis(labels, axis, "spatial", "MaxUnpool works along this axis")
            parts.append(labels)
        shape = (*step.shape(0)[:2], *(1,) * (len(step.shape(0)) - 2))
        step.set(0, broadcast(step.atoms, [(labels, shape) for labels in parts], len(shape), step.reason))

    def rewrite(self, cut: Cut) -> None:
        """The shape of the result, where it is an operand."""
        target = cut.value(2) if cut.before.has(2) else None
        if cut.before.has(2) and (target is None or tuple(target.tolist()) != cut.out_shape()):
            cut.set_target(2, cut.out_shape())

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """As stated, else the smallest shape that the windows cover."""
        x, attrs = shapes[0], node.attrs
        if len(node.inputs) > 2 and node.inputs[2]:
            return [None if values[2] is None else tuple(int(n) for n in values[2])]
        if x is None:
            return [None]
        kernel = attrs["kernel_shape"]
        strides, pads = attrs.get("strides") or [1] * len(kernel), attrs.get("pads") or [0] * 2 * len(kernel)
        around = [low + high for low, high in zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
        rest = zip(x[2:], strides, kernel, around, strict=True)
        return [(*x[:2], *(None if n is None else (n - 1) * s + k - p for n, s, k, p in rest))]


class Col2Im(Rule):
    """Columns [N, C * block, L] added up into an image [N, C, ...]: a channel goes with its whole block."""

    operands = (1, 2)

    def propagate(self, step: Step) -> None:
        """The block of a channel is a row, whose cells go together."""
        labels, block = step.labels(0), step.value(2)
        labels = step.drop_axis(labels, 2, "spatial", "Col2Im adds up along this axis")
        label = covering(labels, 1)
        if label is None or block is None or label.is_grid or prod(block.tolist()) > label.ids.size:
            step.freeze(labels, "unsupported-form", "the columns of a block are not known")
            return
        grid = label.ids.reshape(-1, prod(block.tolist()))
        step.atoms.unite(grid, np.broadcast_to(grid[:, :1], grid.shape))
        rank = len(step.out_shape())
        if len(grid) == 1:
            step.freeze((label,), "fixed-size", "a single channel")
            return
        step.set(0, (Label(grid[:, 0].reshape(1, -1, *(1,) * (rank - 2)), 1),))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[N, C, ...], where the image and the block are known."""
        x, image, block = shapes[0], values[1], values[2]
        if x is None or x[1] is None or image is None or block is None:
            return [None]
        return [(x[0], x[1] // prod(block.tolist()), *(int(n) for n in image))]


class AffineGrid(Rule):
    """A grid of positions of an image [N, C, ...], of whose sizes it reads all but the channels."""

    operands = (1,)

    def propagate(self, step: Step) -> None:
        """Matrices keep their numbers; the result has no channels."""
        step.freeze(step.labels(0), "fixed-size", "AffineGrid takes every number of its matrices")

    def rewrite(self, cut: Cut) -> None:
        """Sizes other than that of channels stay what they were."""
        old, new = cut.before.table.facts.value(cut.node.inputs[1]), cut.value(1)
        if old is None or new is None:
            cut.fail("the size of the image is not known")
        elif np.delete(old, 1).tolist() != np.delete(new, 1).tolist():
            cut.set_target(1, old.tolist())


class CenterCropPad(Rule):
    """The middle of some axes, or zeros around them."""

    operands = targets = (1,)

    @staticmethod
    def _axes(step: Step) -> list[int]:
        rank = len(step.shape(0))
        return [int(a) % rank for a in step.attr("axes", range(rank))]

    def propagate(self, step: Step) -> None:
        """Axes that keep their size pass."""
        labels, after = step.labels(0), step.out_shape()
        for axis in self._axes(step):
            if after[axis] != step.shape(0)[axis] or step.table.facts.varies(step.node.outputs[0], axis):
                labels = step.drop_axis(labels, axis, "spatial", "this axis is cropped or padded")
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """The sizes that are stated follow."""
        target, sizes = [cut.out_shape()[a] for a in self._axes(cut.before)], cut.value(1)
        if None not in target and (sizes is None or sizes.ravel().tolist() != target):
            cut.set_target(1, target)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The sizes stated, the data's on the other axes."""
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
