"""Operators of com.microsoft that models are written with, where others are made by onnxruntime's optimisers."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxprune.contractions import Form
from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape, broadcast
from onnxprune.labels.movement import insert_axis
from onnxprune.operators import indexing, quantized, ranges, scatter, spatial
from onnxprune.operators.context import Step
from onnxprune.operators.convolution import ConvTranspose
from onnxprune.operators.heads import to_heads
from onnxprune.operators.normalization import NORMALISED
from onnxprune.operators.registry import Rule, register
from onnxprune.operators.sizes import window_sizes

DOMAIN = "com.microsoft"


class SwiGLU(Rule):
    """A gated activation of two tensors, or of the halves of one along its last axis."""

    def propagate(self, step: Step) -> None:
        """Gate and value meet position by position."""
        if step.has(1):
            step.set(0, step.broadcast([0, 1]))
            return
        rank, half = len(step.shape(0)), step.shape(0)[-1] // 2
        halves = [step.take(step.labels(0), rank - 1, np.arange(a, a + half)) for a in (0, half)]
        shape = (*step.shape(0)[:-1], half)
        step.set(0, broadcast(step.atoms, [(labels, shape) for labels in halves], rank, step.reason))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The shape of the value."""
        x = shapes[0]
        if x is None or (len(node.inputs) > 1 and node.inputs[1]):
            return [x]
        return [(*x[:-1], None if x[-1] is None else x[-1] // 2)]


class GatedRMSNorm(Rule):
    """X normalised within each head of as many channels as the scale has, times an activation of a gate."""

    def propagate(self, step: Step) -> None:
        """Heads go as a whole, with their gate; the scale is the same for all of them."""
        labels, shape, size = step.broadcast([0, 2]), step.shape(0), step.shape(1)[0]
        why = f"{step.node.op} normalises over these channels"
        step.fix(step.labels(1), 0, NORMALISED, why)
        if shape[-1] == size:
            step.fix(labels, len(shape) - 1, NORMALISED, why)
        elif len(shape) == 3:
            step.fix(to_heads(step, labels, shape, shape[-1] // size)[0], 3, NORMALISED, why)
        else:
            step.freeze(labels, NORMALISED, why)
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape."""
        return [shapes[0]]


class BranchwiseRMSNorm(Rule):
    """Normalises [..., branches, channels] over the channels of each branch."""

    def propagate(self, step: Step) -> None:
        """Channels stay; branches go with their scales, where each has its own."""
        labels, rank = step.labels(0), len(step.shape(0))
        scale = step.labels(1)
        paired = step.has(1) and len(step.shape(1)) == 2 and not step.attr("num_branches", 0)
        step.fix(labels, rank - 1, NORMALISED, f"{step.node.op} normalises over these channels")
        if paired:
            labels = broadcast(step.atoms, [(labels, step.shape(0)), (scale, step.shape(1))], rank, step.reason)
        elif step.has(1):
            step.freeze(scale, NORMALISED, f"{step.node.op} scales these channels")
            if step.shape(1)[0] != step.shape(0)[-1]:
                labels = step.drop_axis(labels, rank - 2, NORMALISED, "scales of all branches in a row")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape."""
        return [shapes[0]]


class Pad(ranges.Pad):
    """ONNX's Pad before its padding was an operand there; the padding may be a row of a matrix."""

    by_operand = True

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data and what is around it."""
        x, pads = shapes[0], values[1]
        if x is None or pads is None:
            return [None]
        low, high = (part.tolist() for part in np.split(np.ravel(pads), 2))
        return [tuple(None if n is None else n + a + b for n, a, b in zip(x, low, high, strict=True))]


class LinearAttentionGate(Rule):
    """A decay of the sum of a projection and a bias per head, and an update rate of the same heads."""

    def propagate(self, step: Step) -> None:
        """All have the same heads."""
        labels = step.broadcast([i for i in range(4) if step.has(i)])
        step.set(0, labels)
        step.set(1, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The shapes of the projections."""
        return [shapes[0]] * len(node.outputs)


class CropAndResize(spatial.RoiAlign):
    """Regions of images, resized."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[regions, C, height, width]."""
        x, regions, size = shapes[0], shapes[1], values[3]
        if x is None or regions is None:
            return [None]
        wanted = (None, None) if size is None else (int(size[0]), int(size[1]))
        return [(regions[0], x[1], *wanted)]


class MaxPoolWithMask(spatial.Local):
    """MaxPool of what a mask leaves."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """As MaxPool."""
        x = shapes[0]
        return [None if x is None else (*x[:2], *window_sizes(x[2:], tuple(node.attrs["kernel_shape"]), node.attrs))]


class UnfoldTensor(Rule):
    """Windows along one axis, whose positions become a new last axis."""

    def propagate(self, step: Step) -> None:
        """The other axes pass."""
        rank = len(step.shape(0))
        axis = int(step.attr("dim", -1)) % rank
        labels = step.drop_axis(step.labels(0), axis, "spatial", "windows slide along this axis")
        step.set(0, insert_axis(labels, rank))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """As many windows as fit, and their size."""
        x, size = shapes[0], int(node.attrs["size"])
        if x is None:
            return [None]
        axis, apart = int(node.attrs.get("dim", -1)) % len(x), int(node.attrs.get("step", 1))
        windows = [None if n is None else (n - size) // apart + 1 if a == axis else n for a, n in enumerate(x)]
        return [(*windows, size)]


class ConvTransposeWithDynamicPads(ConvTranspose):
    """A transposed convolution whose padding is an operand."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[N, O, ...], where the padding is known."""
        x, w, attrs = shapes[0], shapes[1], node.attrs
        if x is None or w is None:
            return [None]
        rank, pads = len(x) - 2, values[2] if len(values) > 2 else None
        if pads is None and len(node.inputs) > 2 and node.inputs[2]:
            return [None]
        flat = [0] * 2 * rank if pads is None else [int(p) for p in pads]
        strides, dilations, more = (attrs.get(n) or [d] * rank for n, d in _WINDOW)
        sizes: list[int | None] = []
        for i, (n, k) in enumerate(zip(x[2:], w[2:], strict=True)):
            whole = None if n is None or k is None else (n - 1) * strides[i] + dilations[i] * (k - 1) + 1 + more[i]
            sizes.append(None if whole is None else whole - flat[i] - flat[i + rank])
        return [(x[0], None if w[1] is None else w[1] * int(attrs.get("group", 1)), *sizes)]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """None: the padding is no setting of the node."""
        return None


_WINDOW = (("strides", 1), ("dilations", 1), ("output_padding", 0))


class TorchEmbedding(Rule):
    """Rows of a table looked up by index."""

    def propagate(self, step: Step) -> None:
        """Columns pass, rows stay."""
        labels = step.drop_axis(step.labels(0), 0, "fixed-size", "rows of this table are looked up by index")
        for _ in range(len(step.shape(1)) - 1):
            labels = insert_axis(labels, 0)
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The index's shape and the width of the table."""
        table, index = shapes[0], shapes[1]
        return [None if table is None or index is None else (*index, table[1])]


class GatherND(scatter.GatherND):
    """ONNX's GatherND before it was in ONNX."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """What is behind the addressed axes, for every position."""
        x, index = shapes[0], shapes[1]
        if x is None or index is None or index[-1] is None:
            return [None]
        return [(*index[:-1], *x[index[-1] :])]


register(DOMAIN, "SwiGLU", rule=SwiGLU())
register(DOMAIN, "GatedRMSNorm", rule=GatedRMSNorm())
register(DOMAIN, "BranchwiseRMSNorm", rule=BranchwiseRMSNorm())
register(DOMAIN, "Pad", rule=Pad())
register(DOMAIN, "LinearAttentionGate", rule=LinearAttentionGate())
register(DOMAIN, "CropAndResize", rule=CropAndResize())
register(DOMAIN, "MaxpoolWithMask", rule=MaxPoolWithMask())
register(DOMAIN, "UnfoldTensor", rule=UnfoldTensor())
register(DOMAIN, "ConvTransposeWithDynamicPads", rule=ConvTransposeWithDynamicPads(bias=3))
register(DOMAIN, "TorchEmbedding", rule=TorchEmbedding())
register(DOMAIN, "GatherND", rule=GatherND())
register(DOMAIN, "MatMulInteger16", rule=quantized.IntegerMatMul(0, 1, {}))
register(DOMAIN, "Range", "Unique", rule=indexing.Unlabelled())
