"""onnxruntime's own operators (domain com.microsoft) that its optimisers write: activations, norms, NHWC forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.contractions import Form
from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape, broadcast
from onnxprune.labels.label import Label, Labels, along
from onnxprune.operators import indexing, movement, spatial
from onnxprune.operators.context import Step
from onnxprune.operators.contraction import MatMul, contract, letter_macs, matmul_terms
from onnxprune.operators.convolution import Conv
from onnxprune.operators.elementwise import Elementwise
from onnxprune.operators.normalization import NORMALISED, GroupNorm, LayerNorm, OverAxes
from onnxprune.operators.registry import Rule, register
from onnxprune.operators.sizes import broadcast_shapes, product, window_sizes

DOMAIN = "com.microsoft"


class SkipLayerNorm(LayerNorm):
    """(Simplified) LayerNormalization of input + skip + bias over the last axis; output 3 is the sum itself."""

    def axes(self, step: Step) -> list[int]:
        """The last axis."""
        return [len(step.shape(0)) - 1]

    def propagate(self, step: Step) -> None:
        """The sum's labels pass to both results."""
        OverAxes.propagate(self, step)
        labels = step.table.get(step.node.outputs[0])
        if any(o and step.table.graph.consumers.get(o) for o in step.node.outputs[1:3]):
            step.freeze(labels, "unsupported-form", "the normalisation's statistics are used")
        step.set(3, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape, statistics with size 1 in the end."""
        x = shapes[0]
        stats = None if x is None else (*x[:-1], 1)
        return [x, stats, stats, x]


class EmbedLayerNorm(Rule):
    """Sum of word, position and segment embeddings, normalised: tables share their columns."""

    def propagate(self, step: Step) -> None:
        """Columns unite and are normalised over; the rows of a table are looked up by index."""
        joint: Labels = ()
        for i in (2, 3, 4, 5, 6):
            if not step.has(i):
                continue
            labels, rank = step.labels(i), len(step.shape(i))
            if rank == 2:
                labels = step.drop_axis(labels, 0, "fixed-size", "rows of this table are looked up by index")
            for label in labels:
                joint = step.merge(joint, Label(label.ids.reshape(1, 1, -1), 2))
        if not step.approximate(joint, 2):
            step.fix(joint, 2, NORMALISED, f"{step.node.op} normalises over these channels")
        step.set(0, joint)
        step.set(2, joint)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[batch, sequence, hidden], a mask per batch, the sum before it is normalised."""
        ids, table = shapes[0], shapes[2]
        if ids is None or table is None:
            return [None]
        return [(*ids, table[1]), ids[:1], (*ids, table[1])]


class NhwcFusedConv(Conv):
    """Convolution of [N, ..., C] with a weight [O, C/group, ...], an activation and an addend."""

    def axis(self, step: Step) -> int:
        """Channels come last."""
        return len(step.shape(self.data)) - 1

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """The last."""
        return rank - 1

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[N, ..., O]."""
        x, w = shapes[self.data], shapes[self.weight]
        return [None if x is None or w is None else (x[0], *window_sizes(x[1:-1], w[2:], node.attrs), w[0])]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """None: windows are cut out of data with channels on axis 1."""
        return None


class NhwcConv(NhwcFusedConv):
    """Convolution of [N, ..., C] with a weight [O, ..., C/group], as optimised diffusion models have it."""

    def weight_axis(self, step: Step) -> int:
        """Channels come last here too."""
        return len(step.shape(self.weight)) - 1

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[N, ..., O]."""
        x, w = shapes[self.data], shapes[self.weight]
        return [None if x is None or w is None else (x[0], *window_sizes(x[1:-1], w[1:-1], node.attrs), w[0])]


class NhwcPool(Rule):
    """Pooling of [N, ..., C]."""

    def propagate(self, step: Step) -> None:
        """Channels pass."""
        labels = step.labels(0)
        channel = len(step.shape(0)) - 1
        labels = step.drop_all_but(labels, (0, channel), "spatial", f"{step.node.op} works along this axis")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[N, ..., C] with pooled positions."""
        x = shapes[0]
        if x is None:
            return [None]
        return [(x[0], *window_sizes(x[1:-1], tuple(node.attrs["kernel_shape"]), node.attrs), x[-1])]


class GroupNormFused(GroupNorm):
    """GroupNorm with an activation, channels last by default; SkipGroupNorm adds a skip and a bias first."""

    def group_attribute(self) -> str:
        """Name of the attribute that counts groups."""
        return "groups"

    def channel_axis(self, step: Step) -> int:
        """Last, unless the node says otherwise."""
        return len(step.shape(0)) - 1 if step.attr("channels_last", 1) else 1

    def propagate(self, step: Step) -> None:
        """As the plain form; what is added has the same channels."""
        super().propagate(step)
        labels, axis = step.labels(0), self.channel_axis(step)
        ids = step.axis_ids(labels, axis)
        for i in (3, 4):
            if step.has(i):
                own, rank = step.labels(i), len(step.shape(i))
                at = axis if rank == len(step.shape(0)) else rank - 1
                step.fix_all_but(own, (0, at), NORMALISED, f"{step.node.op} normalises over these positions")
                step.unite(ids, step.axis_ids(own, at), "what is added")
        step.set(1, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape."""
        return [shapes[0]] * len(node.outputs)


class BiasSplitGelu(Rule):
    """left * gelu(right) of the halves of X + bias along the last axis."""

    def propagate(self, step: Step) -> None:
        """The halves meet position by position."""
        shape = step.shape(0)
        rank, half = len(shape), shape[-1] // 2
        joint = broadcast(step.atoms, [(step.labels(i), step.shape(i)) for i in (0, 1)], rank, step.reason)
        left = step.take(joint, rank - 1, np.arange(half))
        right = step.take(joint, rank - 1, np.arange(half, 2 * half))
        step.set(0, broadcast(step.atoms, [(left, step.out_shape()), (right, step.out_shape())], rank, step.reason))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Half of the last axis."""
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
        """The product's shape."""
        a, b = shapes[0], shapes[1]
        return [None if a is None or b is None else product(a, b, matmul_terms(len(a), len(b)))]


class BiasSoftmax(OverAxes):
    """Softmax of data + bias over all axes from ``axis`` on."""

    def axes(self, step: Step) -> list[int]:
        """All axes from ``axis`` on."""
        return list(range(step.axis(1), len(step.shape(0))))

    def propagate(self, step: Step) -> None:
        """As any softmax where the bias broadcasts as numpy would; else all stays."""
        if broadcast_shapes([step.shape(0), step.shape(1)]) == step.shape(0):
            super().propagate(step)


class CDist(Rule):
    """Distances between the rows of [m, k] and [n, k]: a sum over k."""

    weights = (0, 1)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """m * n * k."""
        return letter_macs(("mk", "nk"), shapes)

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """What the weight's rows become."""
        return weight

    def propagate(self, step: Step) -> None:
        """Contract over ``k``."""
        operands = [(step.labels(0), step.shape(0), "mk"), (step.labels(1), step.shape(1), "nk")]
        step.set(0, contract(step, operands, "mn"))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Both operands are summed over ``k``."""
        return [(0, (1,)), (1, (1,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[m, n]."""
        return [product(shapes[0], shapes[1], ("mk", "nk", "mn"))]


class Matrices(Rule):
    """Inverse: the last two axes keep their sizes, the batch passes."""

    def propagate(self, step: Step) -> None:
        """Only batch axes pass."""
        labels, rank = step.labels(0), len(step.shape(0))
        for axis in (rank - 2, rank - 1):
            labels = step.drop_axis(labels, axis, "fixed-size", f"{step.node.op} mixes this axis")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape."""
        return [shapes[0]]


class Trilu(indexing.Trilu):
    """ONNX's Trilu before it was in ONNX."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape."""
        return [shapes[0]]


class ExpandDims(movement.SameData):
    """Unsqueeze of one axis, given as input 1."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """One more axis of size 1."""
        x, axis = shapes[0], values[1]
        if x is None or axis is None:
            return [None]
        at = int(np.ravel(axis)[0])
        at += len(x) + 1 if at < 0 else 0
        return [(*x[:at], 1, *x[at:])]


class GridSample(spatial.GridSample):
    """ONNX's GridSample before it was in ONNX."""

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[N, C] and the positions' own sizes."""
        x, grid = shapes[0], shapes[1]
        return [None if x is None or grid is None else (*x[:2], *grid[1:-1])]


class RelativePositionBias(Rule):
    """[1, heads, query, key] looked up in a table [buckets, heads]."""

    operands = (1, 2)

    def propagate(self, step: Step) -> None:
        """The table's heads become axis 1."""
        labels = step.drop_axis(step.labels(0), 0, "fixed-size", "rows of this table are looked up by index")
        ids = step.axis_ids(labels, 1)
        if ids is not None:
            step.set(0, (along(ids, 1, 4),))

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Sizes from the lengths, where they are known."""
        table = shapes[0]
        sizes = [None if v is None else int(np.ravel(v)[0]) for v in values[1:3]]
        return [None if table is None else (1, table[1], *sizes)]


register(DOMAIN, "Gelu", "QuickGelu", rule=Elementwise([0]))
register(DOMAIN, "BiasGelu", "FastGelu", "BiasAdd", "GatedAdd", "ScaledSiLU", rule=Elementwise())
register(DOMAIN, "BiasDropout", rule=Elementwise([0, 1, 2]))
register(DOMAIN, "SkipLayerNormalization", rule=SkipLayerNorm(approximate=True, inputs=(0, 1, 2, 3, 4)))
register(DOMAIN, "SkipSimplifiedLayerNormalization", rule=SkipLayerNorm(approximate=True, inputs=(0, 1, 2, 3)))
register(DOMAIN, "LayerNormalization", rule=LayerNorm(approximate=True, inputs=(0, 1, 2)))
register(DOMAIN, "SimplifiedLayerNormalization", rule=LayerNorm(approximate=True, inputs=(0, 1)))
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
