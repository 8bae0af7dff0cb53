"""Operators of onnxruntime (com.microsoft and its blocked layout) that its optimisers write.

A model saved with all optimisations contains weights in a blocked layout, under a shape that hides it, and the file
does not record the block size. These weights cannot be pruned; the remaining operators can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, broadcast, insert_axis
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Label, Labels, along
from onnxprune.operators import indexing, movement, quantization, spatial
from onnxprune.operators.attention import to_heads
from onnxprune.operators.context import Step
from onnxprune.operators.contraction import MatMul, contract, letter_macs, matmul_terms
from onnxprune.operators.contractions import Form
from onnxprune.operators.convolution import Conv, ConvTranspose
from onnxprune.operators.elementwise import Elementwise
from onnxprune.operators.normalization import GroupNorm, LayerNorm, OverAxes, RMSNorm
from onnxprune.operators.registry import NewNode, NoRule, Read, Rule, WithoutAddends, register, with_facts
from onnxprune.operators.sizes import broadcast_pairs, broadcast_shapes, product, window_sizes

DOMAIN = "com.microsoft"


class SkipLayerNorm(LayerNorm):
    """(Simplified) LayerNormalization of input + skip + bias over the last axis; output 3 is the sum itself."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of data, skip and scale."""
        yield shapes[0][-1], shapes[2][-1]
        yield from broadcast_pairs(shapes[0], shapes[1])

    def axes(self, step: Step) -> list[int]:
        """Return the last axis."""
        return [len(step.shape(0)) - 1]

    def propagate(self, step: Step) -> None:
        """Pass the sum's labels to both results."""
        super().propagate(step)
        step.set(3, step.table.get(step.node.outputs[0]))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape; statistics have size 1 on the last axis."""
        x = shapes[0]
        stats = None if x is None else (*x[:-1], 1)
        return [x, stats, stats, x]

    standard_op, standard_since, bias_at = "LayerNormalization", 17, 4
    """ONNX's own operator for one tensor, the opset that brought it, and the position of the bias."""

    def addends(self, node: Node) -> Sequence[int]:
        """Return input and skip."""
        return (0, 1)

    def total(self, node: Node) -> str:
        """Return output 3 where there is one."""
        return (len(node.outputs) > 3 and node.outputs[3]) or node.outputs[0]

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return the normalisation of the other addend; output 3 is that addend, plus the bias where there is one."""
        other = next(name for i, name in enumerate(node.inputs[:2]) if i not in positions)
        outputs = [*node.outputs, "", "", ""][:4]
        if any(outputs[1:3]):
            return None
        bias = node.inputs[self.bias_at] if len(node.inputs) > self.bias_at else ""
        nodes: list[NewNode] = []
        same = {outputs[3]: other} if outputs[3] and not bias else {}
        if bias:
            total = outputs[3] or f"{outputs[0]}_sum"
            nodes.append(NewNode("Add", [other, bias], [total], node.name and f"{node.name}_sum"))
            other = total
        return WithoutAddends([*nodes, self._of_one(node, other, opset)], same)

    def _of_one(self, node: Node, x: str, opset: int) -> NewNode:
        """Return a node that normalises one tensor: ONNX's own, or before that x + x with 4 epsilon, which is equal."""
        settings = [n for n in node.inputs[2 : self.bias_at] if n]
        epsilon, output = float(node.attrs.get("epsilon", 1e-12)), [node.outputs[0]]
        if opset >= self.standard_since:
            return NewNode(self.standard_op, [x, *settings], output, node.name, "", {"axis": -1, "epsilon": epsilon})
        return NewNode(node.op, [x, x, *settings], output, node.name, DOMAIN, {"epsilon": 4 * epsilon})


class SkipRMSNorm(RMSNorm, SkipLayerNorm):
    """Root mean square normalisation of input + skip + bias over the last axis; output 3 is the sum itself."""

    standard_op, standard_since, bias_at = "RMSNormalization", 23, 3


class EmbedLayerNorm(Rule):
    """Normalised sum of word, position and segment embeddings: the tables share their columns."""

    def propagate(self, step: Step) -> None:
        """Unite the columns, which are normalised over; freeze the rows of the tables, which are indexed."""
        joint: Labels = ()
        for i in (2, 3, 4, 5, 6):
            if not step.has(i):
                continue
            labels, rank = step.labels(i), len(step.shape(i))
            if rank == 2 and step.may_lose_rows(i):
                labels = step.without_rows(labels)
            elif rank == 2:
                labels = step.drop_axis(labels, 0, Reason.FIXED_SIZE, "rows of this table are looked up by index")
            for label in labels:
                joint = step.merge(joint, Label(label.ids.reshape(1, 1, -1), 2))
        if not step.approximate(joint, 2):
            step.fix(joint, 2, Reason.NORMALISED, f"{step.node.op} normalises over these channels")
        step.set(0, joint)
        step.set(2, joint)

    def lookups(self, node: Node) -> Sequence[tuple[int, int]]:
        """Return words and segments with their tables."""
        return ((0, 2), (1, 4))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shapes [batch, sequence, hidden], [batch] of the mask, and that of the sum before normalisation."""
        ids, table = shapes[0], shapes[2]
        if ids is None or table is None:
            return [None]
        return [(*ids, table[1]), ids[:1], (*ids, table[1])]


class NhwcFusedConv(Conv):
    """Convolution of [N, ..., C] with a weight [O, C/group, ...], an activation and an addend."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of the data, on the last axis, and those that the kernel reads."""
        yield shapes[0][-1], shapes[1][1] * node.attrs.get("group", 1)

    def axis(self, step: Step) -> int:
        """Return the last axis, that of the channels."""
        return len(step.shape(self.data)) - 1

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return the last axis."""
        return rank - 1

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, ..., O]."""
        x, w = shapes[self.data], shapes[self.weight]
        return [None if x is None or w is None else (x[0], *window_sizes(x[1:-1], w[2:], node.attrs), w[0])]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return None: the matrix form requires data with channels on axis 1."""
        return None


class NhwcConv(NhwcFusedConv):
    """Convolution of [N, ..., C] with a weight [O, ..., C/group], as in optimised diffusion models."""

    def weight_axis(self, step: Step) -> int:
        """Return the last axis, that of the input channels."""
        return len(step.shape(self.weight)) - 1

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, ..., O]."""
        x, w = shapes[self.data], shapes[self.weight]
        return [None if x is None or w is None else (x[0], *window_sizes(x[1:-1], w[1:-1], node.attrs), w[0])]


class NhwcPool(Rule):
    """Pooling of [N, ..., C]."""

    def propagate(self, step: Step) -> None:
        """Pass the channels."""
        labels = step.labels(0)
        channel = len(step.shape(0)) - 1
        labels = step.drop_all_but(labels, (0, channel), Reason.SPATIAL, f"{step.node.op} works along this axis")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, ..., C] with pooled positions."""
        x = shapes[0]
        if x is None:
            return [None]
        return [(x[0], *window_sizes(x[1:-1], tuple(node.attrs["kernel_shape"]), node.attrs), x[-1])]


class GroupNormFused(GroupNorm):
    """GroupNorm with an activation, channels last by default; SkipGroupNorm first adds a skip and a bias."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of the data, on the last axis by default, and those of the scale."""
        yield shapes[0][-1 if node.attrs.get("channels_last", 1) else 1], shapes[1][0]

    def group_attribute(self) -> str:
        """Return the name of the attribute with the number of groups."""
        return "groups"

    def channel_axis(self, step: Step) -> int:
        """Return the last axis, or axis 1 where the node requests it."""
        return len(step.shape(0)) - 1 if step.attr("channels_last", 1) else 1

    def propagate(self, step: Step) -> None:
        """Propagate as GroupNorm; the addends share the channels."""
        super().propagate(step)
        labels, axis = step.labels(0), self.channel_axis(step)
        ids = step.axis_ids(labels, axis)
        for i in (3, 4):
            if step.has(i):
                parameter, rank = step.labels(i), len(step.shape(i))
                at = axis if rank == len(step.shape(0)) else rank - 1
                step.fix_all_but(
                    parameter, (0, at), Reason.NORMALISED, f"{step.node.op} normalises over these positions"
                )
                step.unite(ids, step.axis_ids(parameter, at), "the addend")
        step.set(1, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape."""
        return [shapes[0]] * len(node.outputs)


class BiasSplitGelu(Rule):
    """left * gelu(right) of the halves of X + bias along the last axis."""

    def propagate(self, step: Step) -> None:
        """Unite the halves position by position."""
        shape = step.shape(0)
        rank, half = len(shape), shape[-1] // 2
        joint = broadcast(step.atoms, [(step.labels(i), step.shape(i)) for i in (0, 1)], rank, step.reason)
        first = step.take(joint, rank - 1, np.arange(half))
        second = step.take(joint, rank - 1, np.arange(half, 2 * half))
        step.set(0, broadcast(step.atoms, [(first, step.out_shape()), (second, step.out_shape())], rank, step.reason))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape with half of the last axis."""
        x = shapes[0]
        return [None if x is None or x[-1] is None else (*x[:-1], x[-1] // 2)]


class GemmFastGelu(MatMul):
    """gelu(X W + bias)."""

    def propagate(self, step: Step) -> None:
        """Contract, then add the bias."""
        left, right, out = self.terms(step)
        labels = contract(step, [(step.labels(0), step.shape(0), left), (step.labels(1), step.shape(1), right)], out)
        if step.has(2):
            shape = step.out_shape()
            labels = broadcast(step.atoms, [(labels, shape), (step.labels(2), step.shape(2))], len(shape), step.reason)
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the product's shape."""
        a, b = shapes[0], shapes[1]
        return [None if a is None or b is None else product(a, b, matmul_terms(len(a), len(b)))]


class BiasSoftmax(OverAxes):
    """Softmax of data + bias over all axes from ``axis`` on."""

    def axes(self, step: Step) -> list[int]:
        """Return all axes from ``axis`` on."""
        return list(range(step.axis(1), len(step.shape(0))))

    def propagate(self, step: Step) -> None:
        """Propagate as softmax where the bias broadcasts by numpy's rules; otherwise freeze every input."""
        if broadcast_shapes([step.shape(0), step.shape(1)]) == step.shape(0):
            super().propagate(step)


class CDist(Rule):
    """Distances between the rows of [m, k] and [n, k]: a sum over k."""

    weights = (0, 1)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Return m * n * k."""
        return letter_macs(("mk", "nk"), shapes)

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return the output axis of the weight's rows."""
        return weight

    def propagate(self, step: Step) -> None:
        """Contract over ``k``."""
        operands = [(step.labels(0), step.shape(0), "mk"), (step.labels(1), step.shape(1), "nk")]
        step.set(0, contract(step, operands, "mn"))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the axis ``k`` of both operands."""
        return [(0, (1,)), (1, (1,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [m, n]."""
        return [product(shapes[0], shapes[1], ("mk", "nk", "mn"))]


class Matrices(Rule):
    """Inverse: the last two axes keep their sizes, the batch passes."""

    def propagate(self, step: Step) -> None:
        """Pass the batch axes."""
        labels, rank = step.labels(0), len(step.shape(0))
        for axis in (rank - 2, rank - 1):
            labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, f"{step.node.op} mixes this axis")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape."""
        return [shapes[0]]


class Trilu(indexing.Trilu):
    """ONNX's Trilu before ONNX defined it."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape."""
        return [shapes[0]]


class ExpandDims(movement.SameData):
    """Unsqueeze of one axis, given as input 1."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape with one more axis of size 1."""
        x, axis = shapes[0], values[1]
        if x is None or axis is None:
            return [None]
        at = int(np.ravel(axis)[0])
        at += len(x) + 1 if at < 0 else 0
        return [(*x[:at], 1, *x[at:])]


class GridSample(spatial.GridSample):
    """ONNX's GridSample before ONNX defined it."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return [N, C] and the sizes of the grid of positions."""
        x, grid = shapes[0], shapes[1]
        return [None if x is None or grid is None else (*x[:2], *grid[1:-1])]


class RelativePositionBias(Rule):
    """[1, heads, query, key] looked up in a table [buckets, heads]."""

    operands = (1, 2)

    def propagate(self, step: Step) -> None:
        """Map the table's heads to axis 1."""
        labels = step.drop_axis(step.labels(0), 0, Reason.FIXED_SIZE, "rows of this table are looked up by index")
        ids = step.axis_ids(labels, 1)
        if ids is not None:
            step.set(0, (along(ids, 1, 4),))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return sizes from the lengths, where they are known."""
        table = shapes[0]
        sizes = [None if v is None else int(np.ravel(v)[0]) for v in values[1:3]]
        return [None if table is None else (1, table[1], *sizes)]


register(DOMAIN, "Gelu", "QuickGelu", rule=Elementwise([0]))
register(DOMAIN, "BiasGelu", "FastGelu", "BiasAdd", "GatedAdd", "ScaledSiLU", rule=Elementwise())
register(DOMAIN, "BiasDropout", rule=with_facts(Elementwise([0, 1, 2]), training=4))
register(DOMAIN, "BitmaskBiasDropout", rule=with_facts(NoRule(), training=4))
register(DOMAIN, "BitmaskDropout", rule=with_facts(NoRule(), training=2))
register(DOMAIN, "SkipLayerNormalization", rule=SkipLayerNorm((2, 3), (0, 1, 2, 3, 4)))
register(DOMAIN, "SkipSimplifiedLayerNormalization", rule=SkipRMSNorm(2, (0, 1, 2, 3), 1e-12))
register(DOMAIN, "LayerNormalization", rule=LayerNorm())
register(DOMAIN, "SimplifiedLayerNormalization", rule=RMSNorm())
register(DOMAIN, "EmbedLayerNormalization", rule=EmbedLayerNorm())
register(DOMAIN, "NhwcConv", rule=NhwcConv())
register(DOMAIN, "NhwcFusedConv", rule=NhwcFusedConv(addend=3))
register(DOMAIN, "NhwcMaxPool", rule=NhwcPool())
register(DOMAIN, "GroupNorm", "SkipGroupNorm", rule=GroupNormFused())
register(DOMAIN, "BiasSplitGelu", rule=BiasSplitGelu())
register(DOMAIN, "GemmFastGelu", rule=GemmFastGelu())
register(DOMAIN, "BiasSoftmax", rule=BiasSoftmax(inputs=(0, 1)))
register(DOMAIN, "CDist", rule=CDist())
register(DOMAIN, "Inverse", rule=Matrices())
register(DOMAIN, "Trilu", rule=Trilu())
register(DOMAIN, "ExpandDims", rule=ExpandDims())
register(DOMAIN, "GridSample", rule=GridSample())
register(DOMAIN, "RelativePositionBias", rule=RelativePositionBias())


class SwiGLU(Rule):
    """Gated activation of two tensors, or of the halves of one along its last axis."""

    def propagate(self, step: Step) -> None:
        """Unite gate and value position by position."""
        if step.has(1):
            step.set(0, step.broadcast([0, 1]))
            return
        rank, half = len(step.shape(0)), step.shape(0)[-1] // 2
        halves = [step.take(step.labels(0), rank - 1, np.arange(a, a + half)) for a in (0, half)]
        shape = (*step.shape(0)[:-1], half)
        step.set(0, broadcast(step.atoms, [(labels, shape) for labels in halves], rank, step.reason))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shape of the value."""
        x = shapes[0]
        if x is None or (len(node.inputs) > 1 and node.inputs[1]):
            return [x]
        return [(*x[:-1], None if x[-1] is None else x[-1] // 2)]


class GatedRMSNorm(Rule):
    """RMSNorm of X within each head, of as many channels as the scale, times an activation of a gate."""

    def propagate(self, step: Step) -> None:
        """Prune whole heads with their gate; all heads share the scale."""
        labels, shape, size = step.broadcast([0, 2]), step.shape(0), step.shape(1)[0]
        why = f"{step.node.op} normalises over these channels"
        step.fix(step.labels(1), 0, Reason.NORMALISED, why)
        if shape[-1] == size:
            step.fix(labels, len(shape) - 1, Reason.NORMALISED, why)
        elif len(shape) == 3:
            step.fix(to_heads(step, labels, shape, shape[-1] // size)[0], 3, Reason.NORMALISED, why)
        else:
            step.freeze(labels, Reason.NORMALISED, why)
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape."""
        return [shapes[0]]


class BranchwiseRMSNorm(Rule):
    """Normalisation of [..., branches, channels] over the channels of each branch."""

    def propagate(self, step: Step) -> None:
        """Freeze the channels; tie branches to their scales, where each has its own."""
        labels, rank = step.labels(0), len(step.shape(0))
        scale = step.labels(1)
        has_branches = step.has(1) and len(step.shape(1)) == 2 and not step.attr("num_branches", 0)
        step.fix(labels, rank - 1, Reason.NORMALISED, f"{step.node.op} normalises over these channels")
        if has_branches:
            labels = broadcast(step.atoms, [(labels, step.shape(0)), (scale, step.shape(1))], rank, step.reason)
        elif step.has(1):
            step.freeze(scale, Reason.NORMALISED, f"{step.node.op} scales these channels")
            if step.shape(1)[0] != step.shape(0)[-1]:
                labels = step.drop_axis(labels, rank - 2, Reason.NORMALISED, "scales of all branches in a row")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape."""
        return [shapes[0]]


class Pad(movement.Pad):
    """ONNX's Pad before padding was an operand in ONNX; the padding may be a row of a matrix."""

    by_operand = True

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's sizes plus the padding."""
        x, pads = shapes[0], values[1]
        if x is None or pads is None:
            return [None]
        low, high = (part.tolist() for part in np.split(np.ravel(pads), 2))
        return [tuple(None if n is None else n + a + b for n, a, b in zip(x, low, high, strict=True))]


class LinearAttentionGate(Rule):
    """A decay from the sum of a projection and a bias per head, and an update rate of the same heads."""

    def propagate(self, step: Step) -> None:
        """Unite the heads of all operands."""
        labels = step.broadcast([i for i in range(4) if step.has(i)])
        step.set(0, labels)
        step.set(1, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shapes of the projections."""
        return [shapes[0]] * len(node.outputs)


class CropAndResize(spatial.RoiAlign):
    """Regions of images, resized."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [regions, C, height, width]."""
        x, regions, size = shapes[0], shapes[1], values[3]
        if x is None or regions is None:
            return [None]
        crop_size = (None, None) if size is None else (int(size[0]), int(size[1]))
        return [(regions[0], x[1], *crop_size)]


class MaxPoolWithMask(spatial.Local):
    """MaxPool over the positions that a mask selects."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Infer as MaxPool."""
        x = shapes[0]
        return [None if x is None else (*x[:2], *window_sizes(x[2:], tuple(node.attrs["kernel_shape"]), node.attrs))]


class UnfoldTensor(Rule):
    """Windows along one axis, whose positions become a new last axis."""

    def propagate(self, step: Step) -> None:
        """Pass the other axes."""
        rank = len(step.shape(0))
        axis = int(step.attr("dim", -1)) % rank
        labels = step.drop_axis(step.labels(0), axis, Reason.SPATIAL, "windows slide along this axis")
        step.set(0, insert_axis(labels, rank))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the number of windows and their size."""
        x, size = shapes[0], int(node.attrs["size"])
        if x is None:
            return [None]
        axis, stride = int(node.attrs.get("dim", -1)) % len(x), int(node.attrs.get("step", 1))
        windows = [None if n is None else (n - size) // stride + 1 if a == axis else n for a, n in enumerate(x)]
        return [(*windows, size)]


class ConvTransposeWithDynamicPads(ConvTranspose):
    """A transposed convolution whose padding is an operand."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, O, ...], where the padding is known."""
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
            full_size = None if n is None or k is None else (n - 1) * strides[i] + dilations[i] * (k - 1) + 1 + more[i]
            sizes.append(None if full_size is None else full_size - flat[i] - flat[i + rank])
        return [(x[0], None if w[1] is None else w[1] * int(attrs.get("group", 1)), *sizes)]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return None: the padding is not an attribute of the node."""
        return None


_WINDOW = (("strides", 1), ("dilations", 1), ("output_padding", 0))


class TorchEmbedding(Rule):
    """Rows of a table looked up by index."""

    def propagate(self, step: Step) -> None:
        """Pass the columns, freeze the rows."""
        labels = step.drop_axis(step.labels(0), 0, Reason.FIXED_SIZE, "rows of this table are looked up by index")
        for _ in range(len(step.shape(1)) - 1):
            labels = insert_axis(labels, 0)
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the index's shape and the width of the table."""
        table, index = shapes[0], shapes[1]
        return [None if table is None or index is None else (*index, table[1])]


class GatherND(indexing.GatherND):
    """ONNX's GatherND before ONNX defined it."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the index's leading axes and the data's axes behind the addressed ones."""
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
register(DOMAIN, "MatMulInteger16", rule=quantization.IntegerMatMul(0, 1, {}))
register(DOMAIN, "Range", rule=indexing.Unlabelled())
register(DOMAIN, "Unique", rule=with_facts(indexing.Unlabelled(), jumps=True, sized_by_values=True))


BLOCKED_DOMAIN = "com.microsoft.nchwc"


class Blocked(Rule):
    """Operators in the blocked layout: all inputs are frozen; sizes are inferred to analyse the rest of the model."""

    slides = True

    def __init__(self, weights: tuple[int, ...] = ()) -> None:
        self.weights = weights

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count as the plain operators."""
        return 0 if not self.weights or out is None or shapes[1] is None else prod(out) * prod(shapes[1][1:])

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return axis 1."""
        return 1

    def propagate(self, step: Step) -> None:
        """Freeze every input."""
        for i in range(len(step.node.inputs)):
            why = "channels are stored in blocks for one kind of processor; cut the model as it was before that"
            step.freeze(step.labels(i), Reason.UNSUPPORTED_FORM, why)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Infer as the operators of the same names, on [N, C, ...]."""
        x = shapes[0]
        if x is None:
            return [None]
        if node.op == "ReorderInput":
            return [(x[0], x[-1], *x[1:-1]) if node.attrs.get("channels_last", 0) else x]
        if node.op == "ReorderOutput":
            plain = (x[0], int(node.attrs["channels"]), *x[2:])
            return [(plain[0], *plain[2:], plain[1]) if node.attrs.get("channels_last", 0) else plain]
        if node.op == "Upsample":
            scales = node.attrs["scales"]
            return [tuple(None if n is None else int(n * s) for n, s in zip(x, scales, strict=True))]
        if node.op.startswith("Global"):
            return [(*x[:2], *[1] * (len(x) - 2))]
        if node.op != "Conv":
            return [(*x[:2], *window_sizes(x[2:], tuple(node.attrs["kernel_shape"]), node.attrs))]
        w = shapes[1]
        return [None if w is None else (x[0], w[0], *window_sizes(x[2:], w[2:], node.attrs))]


register(BLOCKED_DOMAIN, "Conv", rule=Blocked(weights=(1,)))
register(
    BLOCKED_DOMAIN,
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    *("Upsample", "ReorderInput", "ReorderOutput"),
    rule=Blocked(),
)
