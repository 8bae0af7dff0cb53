"""Fused attention: what the spelled-out graph does (reshape to heads, two products, reshape back), inside one node."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from onnxprune.contractions import Form, Pairwise
from onnxprune.graph.view import Node
from onnxprune.labels import movement
from onnxprune.labels.combine import Shape, broadcast, known
from onnxprune.labels.label import Labels
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contraction import contract
from onnxprune.operators.heads import (
    Part,
    as_rank_4,
    attend,
    by_head,
    flattened,
    heads_left,
    repeated,
    to_heads,
    with_past,
)
from onnxprune.operators.registry import Rule, register

MS = "com.microsoft"


class Heads(Rule):
    """What the attention operators share when they are rewritten."""

    def set_scale(self, cut: Cut, before: int, after: int) -> None:
        """The default 1/sqrt(head size) is written out once the size changes."""
        if before != after and not cut.attr("scale", 0.0):
            cut.set_attr("scale", 1.0 / float(np.sqrt(before)))

    def results(self, step: Step, out: Labels, shape: Shape, k: Part, v: Part, scores: Labels) -> None:
        """State the output and, where asked for, the caches (1, 2) and the scores (3)."""
        flat = len(step.out_shape()) == 3
        step.set(0, flattened(step, out, int(shape[0] or 0), int(shape[1] or 0)) if flat else by_head(out))
        step.set(1, by_head(k[0]))
        step.set(2, by_head(v[0]))
        step.set(3, scores)


class Attention(Heads):
    """com.microsoft.Attention: input [B, S, in], weights [in, Q + K + V], bias [Q + K + V]."""

    weights = (1,)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Of the product with the packed weight; attention itself multiplies no weight."""
        return 0 if shapes[0] is None or shapes[1] is None else prod(shapes[0][:-1]) * prod(shapes[1])

    def _parts(self, step: Step) -> list[tuple[int, int]]:
        sizes = step.attr("qkv_hidden_sizes") or [step.shape(1)[1] // 3] * 3
        ends = np.cumsum([0, *sizes]).tolist()
        return list(pairwise(ends))

    def propagate(self, step: Step) -> None:
        """One product, split into queries, keys and values."""
        heads = int(step.attr("num_heads"))
        if step.has(4) or any(step.node.outputs[1:]):
            return  # a cache [2, ...] holds keys and values in one tensor: all sizes stay
        wide = (1, 1, step.shape(1)[1])
        x, axes = step.labels(0), (0, 1)
        for axis in axes:
            x = step.drop_axis(x, axis, "fixed-size", "attention runs along this axis")
        joint = contract(step, [(x, (1, 1, step.shape(0)[2]), "bsi"), (step.labels(1), step.shape(1), "io")], "bso")
        if step.has(2):
            joint = broadcast(step.atoms, [(joint, wide), (step.labels(2), step.shape(2))], 3, step.reason)
        parts = []
        for start, stop in self._parts(step):
            own = step.take(joint, 2, np.arange(start, stop))
            parts.append(to_heads(step, own, (1, 1, stop - start), heads))
        q, k, v = parts
        if step.attr("do_rotary", 0):
            for labels, _ in (q, k):
                step.fix(labels, 3, "rotary", "rotary positions pair these channels")
        bias = as_rank_4(step.labels(5), step.shape(5)) if step.has(5) else None
        _, out = attend(step, q, k, v, bias)
        step.set(0, flattened(step, out, heads, int(v[1][3] or 0)))

    def rewrite(self, cut: Cut) -> None:
        """Heads, sizes of the three parts, and the scale."""
        if not cut.touched(cut.node.inputs[1]):
            return
        heads = int(cut.attr("num_heads"))
        parts = self._parts(cut.before)
        left = [heads_left(cut, 1, heads, *part) for part in parts]
        sizes = [n * size for n, size in left]
        cut.set_attr("num_heads", left[0][0])
        if "qkv_hidden_sizes" in cut.node.attrs or len(set(sizes)) > 1:
            cut.set_attr("qkv_hidden_sizes", sizes)
        self.set_scale(cut, (parts[0][1] - parts[0][0]) // heads, left[0][1])

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """The input times the packed weight, ahead of the heads."""
        w = known(shapes[1])
        return None if data != 0 or w is None else Pairwise(("bsi", "io", "bso"), w, plain=False)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """The input's channels, and queries and keys as they come out of weights and bias."""
        return [(0, (2,)), (1, (1,)), *([(2, (0,))] if step.has(2) else [])]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[B, S, V]; the cache [2, B, heads, past + S, size]."""
        x, w = shapes[0], shapes[1]
        if x is None or w is None or w[1] is None:
            return [None]
        heads, sizes = int(node.attrs["num_heads"]), node.attrs.get("qkv_hidden_sizes") or [w[1] // 3] * 3
        past = shapes[4] if len(shapes) > 4 else None
        length = x[1] if past is None else (None if past[3] is None or x[1] is None else past[3] + x[1])
        return [(x[0], x[1], sizes[2]), (2, x[0], heads, length, sizes[0] // heads)]


class MultiHeadAttention(Heads):
    """com.microsoft.MultiHeadAttention: queries, keys and values apart or packed, a bias, an optional cache.

    ``bias``, ``added`` and ``past`` say which inputs are added to queries, keys and values, which to the scores, and
    which are cached keys and values.
    """

    bias, added, past = 3, 5, (6, 7)

    def propagate(self, step: Step) -> None:
        """Lay all out by heads, add the bias, attend."""
        heads = int(step.attr("num_heads"))
        packed = any(len(step.shape(i)) == 5 for i in (0, 1) if step.has(i))
        if step.has(self.bias) and (packed or len(step.shape(1)) == 4):
            return  # which part of the bias applies differs between kernels
        if packed:
            q, k, v = self._packed(step)
        else:
            q, k, v = (to_heads(step, step.labels(i), step.shape(i), heads) for i in range(3))
        if step.has(self.bias):
            q, k, v = self._biased(step, heads, q, k, v)
        k, v = (with_past(step, part, i) for part, i in zip((k, v), self.past, strict=True))
        bias = as_rank_4(step.labels(self.added), step.shape(self.added)) if step.has(self.added) else None
        scores, out = attend(step, q, k, v, bias)
        self.results(step, out, v[1][2:], k, v, scores)

    @staticmethod
    def _packed(step: Step) -> tuple[Part, Part, Part]:
        """[B, S, heads, 3, size] of all three, or queries apart and [B, S, heads, 2, size] of keys and values."""

        def one(i: int, at: int) -> Part:
            labels = movement.remove_axis(step.take(step.labels(i), 3, np.array([at])), 3)
            shape = step.shape(i)
            return labels, (*shape[:3], shape[4])

        if len(step.shape(0)) == 5:
            return one(0, 0), one(0, 1), one(0, 2)
        return to_heads(step, step.labels(0), step.shape(0), step.shape(1)[2]), one(1, 0), one(1, 1)

    def _biased(self, step: Step, heads: int, *parts: Part) -> tuple[Part, Part, Part]:
        """[Q + K + V] is added to the three."""
        result, start = [], 0
        for labels, shape in parts:
            wide = heads * int(shape[3] or 0)
            own = step.take(step.labels(self.bias), 0, np.arange(start, start + wide))
            start += wide
            grid = to_heads(step, movement.insert_axis(movement.insert_axis(own, 0), 0), (1, 1, wide), heads)
            result.append((broadcast(step.atoms, [(labels, (1, 1, *shape[2:])), grid], 4, step.reason), shape))
        return result[0], result[1], result[2]

    def rewrite(self, cut: Cut) -> None:
        """Heads and the scale; the sizes follow from the operands."""
        heads, shape = int(cut.attr("num_heads")), cut.before.shape(0)
        if not cut.touched():
            return
        left, size = cut.shape(0)[2::2] if len(shape) == 5 else heads_left(cut, 0, heads)
        cut.set_attr("num_heads", left)
        self.set_scale(cut, shape[4] if len(shape) == 5 else shape[-1] // heads, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Queries and keys are summed over the head size, and so is what the bias adds to them."""
        axes = {3: (2,), 4: (1, 3), 5: (2, 4)}
        result: list[tuple[int, tuple[int, ...]]] = [(i, axes[len(step.shape(i))]) for i in (0, 1) if step.has(i)]
        return [*result, (self.bias, (0,))] if step.has(self.bias) else result

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[B, S, V] and the caches [B, heads, past + keys, size]."""
        shapes = [*shapes, *[None] * (8 - len(shapes))]
        q, k, v, past = shapes[0], shapes[1], shapes[2], shapes[self.past[0]]
        if q is None:
            return [None]
        heads = int(node.attrs["num_heads"])
        if len(q) == 5 or (k is not None and len(k) == 5):
            p = q if len(q) == 5 else k
            assert p is not None
            cache: Shape = (p[0], p[2], p[1], p[4])
            return [(q[0], q[1], heads * int(p[4] or 0)), cache, cache]
        if k is None or v is None:
            return [None]
        width = int(q[2] or 0) // heads, int((v[2] if len(v) == 3 else v[3]) or 0) // (heads if len(v) == 3 else 1)
        length = k[2] if len(k) == 4 else k[1]
        if past is not None:
            length = None if length is None or past[2] is None else past[2] + length
        caches: list[Shape | None] = [(q[0], heads, length, n) for n in width]
        return [(q[0], q[1], heads * width[1]), *caches, (q[0], heads, q[1], length)]


class OnnxAttention(Heads):
    """ONNX's Attention (opset 23 on): 3-D or 4-D, fewer heads of keys and values, an optional cache."""

    def _heads(self, step: Step) -> tuple[int, int]:
        if len(step.shape(0)) == 4:
            return step.shape(0)[1], step.shape(1)[1]
        return int(step.attr("q_num_heads")), int(step.attr("kv_num_heads"))

    def propagate(self, step: Step) -> None:
        """Lay all out by heads, repeat keys and values, attend."""
        heads, kv = self._heads(step)
        q, k, v = (to_heads(step, step.labels(i), step.shape(i), n) for i, n in enumerate((heads, kv, kv)))
        k, v = with_past(step, k, 4), with_past(step, v, 5)
        bias = as_rank_4(step.labels(3), step.shape(3)) if step.has(3) else None
        scores, out = attend(step, q, repeated(step, k, heads // kv), repeated(step, v, heads // kv), bias)
        self.results(step, out, (heads, v[1][3]), k, v, scores)

    def rewrite(self, cut: Cut) -> None:
        """Numbers of heads where they are written, and the scale."""
        if not cut.touched():
            return
        heads, kv = self._heads(cut.before)
        left, size = heads_left(cut, 0, heads)
        if len(cut.before.shape(0)) == 3:
            cut.set_attr("q_num_heads", left)
            cut.set_attr("kv_num_heads", heads_left(cut, 1, kv)[0])
        before = cut.before.shape(0)[-1] // (heads if len(cut.before.shape(0)) == 3 else 1)
        self.set_scale(cut, before, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Queries and keys are summed over the head size; cached keys have the same channels."""
        axes = (1, 3) if len(step.shape(0)) == 4 else (2,)
        return [(0, axes), (1, axes), *([(4, (1, 3))] if step.has(4) else [])]


register(MS, "Attention", rule=Attention())
register(MS, "MultiHeadAttention", rule=MultiHeadAttention())
register("", "Attention", rule=OnnxAttention())
