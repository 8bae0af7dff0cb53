"""Rules for attention: all heads in one node, grouped queries, packed inputs, caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels import algebra
from onnxprune.labels.algebra import Shape, align, broadcast, known
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Ids, Label, Labels, along, covering
from onnxprune.operators.codes import numbers
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contraction import contract
from onnxprune.operators.contractions import Form, Pairwise, Windows
from onnxprune.operators.registry import Read, Rule, register
from onnxprune.operators.sizes import broadcast_pairs

LabelledTensor = tuple[Labels, Shape]
"""Labels and shape of queries, keys or values, laid out [batch, sequence, heads, head size]."""


def to_heads(step: Step, labels: Labels, shape: Shape, heads: int) -> LabelledTensor:
    """Reshape [..., heads * size] to [..., heads, size]; of [batch, heads, sequence, size] swap the middle axes."""
    if len(shape) == 4:
        return algebra.transpose(labels, (0, 2, 1, 3)), (shape[0], shape[2], shape[1], shape[3])
    width = int(shape[-1] or 0)
    if width % heads:
        raise ValueError(f"{width} channels do not divide into {heads} heads")
    # The survivors of a grid must form a grid: every head keeps the same number of its own channels.
    return _viewed(step, labels, (*shape[:-1], width), (*shape[:-1], heads, width // heads))


def _viewed(step: Step, labels: Labels, before: Shape, after: Shape) -> LabelledTensor:
    """Reshape the trailing axes alone; the leading ones may depend on the data."""
    num_leading = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    for axis in range(num_leading):
        labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, "attention runs along this axis")
    leading = [1] * num_leading
    source, target = (
        [*leading, *(n or 1 for n in before[num_leading:])],
        [*leading, *(n or 1 for n in after[num_leading:])],
    )
    reshaped = algebra.reshape(step.atoms, labels, source, target, step.reason)
    for label in reshaped:
        step.atoms.view(label)
    return reshaped, after


def repeat_heads(step: Step, part: LabelledTensor, times: int) -> LabelledTensor:
    """Repeat keys or values that have fewer heads than the queries: each head serves ``times`` consecutive queries."""
    labels, shape = part
    heads = covering(labels, 2)
    if times == 1:
        return part
    if heads is not None:
        step.atoms.view(heads)
    repeated_labels = tuple(Label(np.repeat(x.ids, times, axis=2), x.pack) if x is heads else x for x in labels)
    return repeated_labels, (*shape[:2], int(shape[2] or 0) * times, shape[3])


def attend(
    step: Step, q: LabelledTensor, k: LabelledTensor, v: LabelledTensor, bias: LabelledTensor | None = None
) -> tuple[Labels, Labels]:
    """Return labels of the scores [batch, heads, query, key] and of the result [batch, query, heads, size].

    Head sizes of queries and keys are united and summed over; a head is pruned with its query, key, value and bias.
    """
    parts = []
    for labels, shape in (q, k, v):
        parts.append((along_heads(step, labels), (1, 1, *shape[2:])))
    (ql, qs), (kl, ks), (vl, vs) = parts
    scores = contract(step, [(ql, qs, "bshd"), (kl, ks, "blhd")], "bhsl")
    if bias is not None:
        heads = (1, int(qs[2] or 0), 1, 1)
        bias_labels = bias[0]
        for axis in (0, 2, 3):
            bias_labels = step.drop_axis(bias_labels, axis, Reason.FIXED_SIZE, "attention runs along this axis")
        shape = tuple(n if a == 1 else 1 for a, n in enumerate(bias[1]))
        scores = broadcast(step.atoms, [(scores, heads), (bias_labels, shape)], 4, step.reason)
    return scores, contract(step, [(scores, (1, qs[2], 1, 1), "bhsl"), (vl, vs, "blhv")], "bshv")


def as_rank_4(labels: Labels, shape: Shape) -> LabelledTensor:
    """Give a bias or mask that broadcasts against the scores all four axes."""
    shift = 4 - len(shape)
    return align(labels, shift), (*(1,) * shift, *shape)


def flatten_heads(step: Step, labels: Labels, heads: int, size: int) -> Labels:
    """Merge [1, 1, heads, size] into [1, 1, heads * size]."""
    return algebra.reshape(step.atoms, labels, (1, 1, heads, size), (1, 1, heads * size), step.reason)


def by_head(labels: Labels) -> Labels:
    """Permute [batch, sequence, heads, size] to [batch, heads, sequence, size]."""
    return algebra.transpose(labels, (0, 2, 1, 3))


def with_past(step: Step, part: LabelledTensor, past: int) -> LabelledTensor:
    """Append keys or values to cached ones [batch, heads, past, size], which share their channels."""
    if not step.has(past):
        return part
    cached, shape = to_heads(step, step.labels(past), step.shape(past), 1)
    unit_shape: Shape = (1, 1, *shape[2:])
    operands = [(along_heads(step, labels), unit_shape) for labels in (part[0], cached)]
    return broadcast(step.atoms, operands, 4, step.reason), part[1]


def along_heads(step: Step, labels: Labels) -> Labels:
    """Reduce labels [batch, sequence, heads, size] to heads and size; freeze the other axes."""
    for axis in (0, 1):
        labels = step.drop_axis(labels, axis, Reason.FIXED_SIZE, "attention runs along this axis")
    return labels


def count_heads(cut: Cut, i: int, heads: int, start: int = 0, stop: int | None = None) -> tuple[int, int]:
    """Return (heads, head size) of ``start:stop`` on the last axis of input ``i`` after pruning."""
    name, shape = cut.node.inputs[i], cut.before.shape(i)
    if len(shape) == 4:
        return cut.shape(i)[1], cut.shape(i)[3]
    stop = shape[-1] if stop is None else stop
    keep = cut.keep(name, len(shape) - 1)
    if keep is None:
        return heads, (stop - start) // heads
    grid = keep[start:stop].reshape(heads, -1)
    num_heads = int(grid.any(axis=1).sum())
    return num_heads, int(grid.sum()) // max(num_heads, 1)


MS = "com.microsoft"


class Heads(Rule):
    """Rewriting shared by the attention operators."""

    def set_scale(self, cut: Cut, before: int, after: int) -> None:
        """Write the default scale 1/sqrt(head size) as an attribute once the head size changes."""
        if before != after and not cut.attr("scale", 0.0):
            cut.set_attr("scale", 1.0 / float(np.sqrt(before)))

    def results(
        self, step: Step, out: Labels, shape: Shape, k: LabelledTensor, v: LabelledTensor, scores: Labels
    ) -> None:
        """Set the labels of the output and, where requested, of the caches (1, 2) and the scores (3)."""
        flat = len(step.out_shape()) == 3
        step.set(0, flatten_heads(step, out, int(shape[0] or 0), int(shape[1] or 0)) if flat else by_head(out))
        step.set(1, by_head(k[0]))
        step.set(2, by_head(v[0]))
        step.set(3, scores)


class Attention(Heads):
    """com.microsoft.Attention: input [B, S, in], weights [in, Q + K + V], bias [Q + K + V]."""

    weights = (1,)
    caches = ((4, 1),)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of the data and of the packed weight."""
        yield shapes[0][-1], shapes[1][0]

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Return the cost of the product with the packed weight; attention itself multiplies no weight."""
        return 0 if shapes[0] is None or shapes[1] is None else prod(shapes[0][:-1]) * prod(shapes[1])

    def _parts(self, step: Step) -> list[tuple[int, int]]:
        sizes = step.attr("qkv_hidden_sizes") or [step.shape(1)[1] // 3] * 3
        ends = np.cumsum([0, *sizes]).tolist()
        return list(pairwise(ends))

    def propagate(self, step: Step) -> None:
        """Contract input and weight, then split the product into queries, keys and values."""
        heads = int(step.attr("num_heads"))
        if step.has(4) or any(step.node.outputs[1:]):
            return  # a cache [2, ...] holds keys and values in one tensor: all sizes are frozen
        bias_shape = (1, 1, step.shape(1)[1])
        x, axes = step.labels(0), (0, 1)
        for axis in axes:
            x = step.drop_axis(x, axis, Reason.FIXED_SIZE, "attention runs along this axis")
        joint = contract(step, [(x, (1, 1, step.shape(0)[2]), "bsi"), (step.labels(1), step.shape(1), "io")], "bso")
        if step.has(2):
            joint = broadcast(step.atoms, [(joint, bias_shape), (step.labels(2), step.shape(2))], 3, step.reason)
        parts = []
        for start, stop in self._parts(step):
            bias_labels = step.take(joint, 2, np.arange(start, stop))
            parts.append(to_heads(step, bias_labels, (1, 1, stop - start), heads))
        q, k, v = parts
        if step.attr("do_rotary", 0):
            for labels, _ in (q, k):
                step.fix(labels, 3, Reason.ROTARY, "rotary positions pair these channels")
        bias = as_rank_4(step.labels(5), step.shape(5)) if step.has(5) else None
        _, out = attend(step, q, k, v, bias)
        step.set(0, flatten_heads(step, out, heads, int(v[1][3] or 0)))

    def rewrite(self, cut: Cut) -> None:
        """Update the number of heads, the sizes of the three parts, and the scale."""
        if not cut.touched(cut.node.inputs[1]):
            return
        heads = int(cut.attr("num_heads"))
        parts = self._parts(cut.before)
        remaining = [count_heads(cut, 1, heads, *part) for part in parts]
        sizes = [n * size for n, size in remaining]
        cut.set_attr("num_heads", remaining[0][0])
        if "qkv_hidden_sizes" in cut.node.attrs or len(set(sizes)) > 1:
            cut.set_attr("qkv_hidden_sizes", sizes)
        self.set_scale(cut, (parts[0][1] - parts[0][0]) // heads, remaining[0][1])

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product of the input and the packed weight, before the split into heads."""
        w = known(shapes[1])
        return None if data != 0 or w is None else Pairwise(("bsi", "io", "bso"), w, plain=False)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the input's channels, and the queries' and keys' channels in weights and bias."""
        return [(0, (2,)), (1, (1,)), *([(2, (0,))] if step.has(2) else [])]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shapes [B, S, V] and, of the cache, [2, B, heads, past + S, size]."""
        x, w = shapes[0], shapes[1]
        if x is None or w is None or w[1] is None:
            return [None]
        heads, sizes = int(node.attrs["num_heads"]), node.attrs.get("qkv_hidden_sizes") or [w[1] // 3] * 3
        past = shapes[4] if len(shapes) > 4 else None
        length = x[1] if past is None else (None if past[3] is None or x[1] is None else past[3] + x[1])
        return [(x[0], x[1], sizes[2]), (2, x[0], heads, length, sizes[0] // heads)]


class MultiHeadAttention(Heads):
    """com.microsoft.MultiHeadAttention: queries, keys and values separate or packed, a bias, an optional cache.

    ``bias``: position of the input added to queries, keys and values; ``added``: position of the input added to the
    scores; ``past``: positions of the cached keys and values.
    """

    bias, added, past = 3, 5, (6, 7)
    caches = (6, 1), (7, 2)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of the query and of caches [batch, heads, past, head size]."""
        heads, query = node.attrs["num_heads"], shapes[0]
        for cache in (shapes[i] for i in self.past if i < len(shapes)):
            if cache is not None and len(cache) == 4 and len(query) == 3:
                yield cache[3], query[-1] // heads
                yield cache[1], heads
                yield cache[0], query[0]

    def propagate(self, step: Step) -> None:
        """Split every operand into heads, add the bias, attend."""
        heads = int(step.attr("num_heads"))
        packed = any(len(step.shape(i)) == 5 for i in (0, 1) if step.has(i))
        if step.has(self.bias) and (packed or len(step.shape(1)) == 4):
            return  # kernels differ in the part of the bias that they apply
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
    def _packed(step: Step) -> tuple[LabelledTensor, LabelledTensor, LabelledTensor]:
        """Split packed [B, S, heads, 3, size], or queries and packed keys and values [B, S, heads, 2, size]."""

        def one(i: int, at: int) -> LabelledTensor:
            labels = algebra.remove_axis(step.take(step.labels(i), 3, np.array([at])), 3)
            shape = step.shape(i)
            return labels, (*shape[:3], shape[4])

        if len(step.shape(0)) == 5:
            return one(0, 0), one(0, 1), one(0, 2)
        return to_heads(step, step.labels(0), step.shape(0), step.shape(1)[2]), one(1, 0), one(1, 1)

    def _biased(
        self, step: Step, heads: int, *parts: LabelledTensor
    ) -> tuple[LabelledTensor, LabelledTensor, LabelledTensor]:
        """Add the bias [Q + K + V] to queries, keys and values."""
        result, start = [], 0
        for labels, shape in parts:
            width = heads * int(shape[3] or 0)
            bias_labels = step.take(step.labels(self.bias), 0, np.arange(start, start + width))
            start += width
            grid = to_heads(step, algebra.insert_axis(algebra.insert_axis(bias_labels, 0), 0), (1, 1, width), heads)
            result.append((broadcast(step.atoms, [(labels, (1, 1, *shape[2:])), grid], 4, step.reason), shape))
        return result[0], result[1], result[2]

    def rewrite(self, cut: Cut) -> None:
        """Update the number of heads and the scale; the sizes follow from the operands."""
        heads, shape = int(cut.attr("num_heads")), cut.before.shape(0)
        if not cut.touched():
            return
        num_heads, size = cut.shape(0)[2::2] if len(shape) == 5 else count_heads(cut, 0, heads)
        cut.set_attr("num_heads", num_heads)
        self.set_scale(cut, shape[4] if len(shape) == 5 else shape[-1] // heads, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the head size of queries and keys, and of their parts of the bias."""
        axes = {3: (2,), 4: (1, 3), 5: (2, 4)}
        result: list[tuple[int, tuple[int, ...]]] = [(i, axes[len(step.shape(i))]) for i in (0, 1) if step.has(i)]
        return [*result, (self.bias, (0,))] if step.has(self.bias) else result

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shapes [B, S, V] and, of the caches, [B, heads, past + keys, size]."""
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
    """ONNX's Attention (opset 23 on): 3-D or 4-D, optionally fewer heads of keys and values, an optional cache."""

    caches = (4, 1), (5, 2)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of operands of rank 3 or 4, of caches [batch, heads, past, head size] and of the mask."""
        query, key, mask, caches = shapes[0], shapes[1], (*shapes, None, None, None)[3], (*shapes[4:6], None, None)[:2]
        heads = key[1] if len(key) == 4 else node.attrs["kv_num_heads"]
        for operand, cache in zip(shapes[1:3], caches, strict=True):
            if cache is not None:
                yield cache[3], operand[3] if len(operand) == 4 else operand[2] // heads
                yield cache[1], heads
                yield cache[0], operand[0]
        if caches[0] is not None and caches[1] is not None:
            yield caches[0][2], caches[1][2]
        if mask is not None:
            past = caches[0][2] if caches[0] is not None else 0
            yield from broadcast_pairs(mask[-1:], [past + key[-2]])
            yield from broadcast_pairs(mask[-2:-1], [query[-2]])

    def _heads(self, step: Step) -> tuple[int, int]:
        if len(step.shape(0)) == 4:
            return step.shape(0)[1], step.shape(1)[1]
        return int(step.attr("q_num_heads")), int(step.attr("kv_num_heads"))

    def propagate(self, step: Step) -> None:
        """Split every operand into heads, repeat keys and values, attend."""
        heads, kv = self._heads(step)
        q, k, v = (to_heads(step, step.labels(i), step.shape(i), n) for i, n in enumerate((heads, kv, kv)))
        k, v = with_past(step, k, 4), with_past(step, v, 5)
        bias = as_rank_4(step.labels(3), step.shape(3)) if step.has(3) else None
        scores, out = attend(step, q, repeat_heads(step, k, heads // kv), repeat_heads(step, v, heads // kv), bias)
        self.results(step, out, (heads, v[1][3]), k, v, scores)

    def rewrite(self, cut: Cut) -> None:
        """Update the numbers of heads where the node has them as attributes, and the scale."""
        if not cut.touched():
            return
        heads, kv = self._heads(cut.before)
        num_heads, size = count_heads(cut, 0, heads)
        if len(cut.before.shape(0)) == 3:
            cut.set_attr("q_num_heads", num_heads)
            cut.set_attr("kv_num_heads", count_heads(cut, 1, kv)[0])
        before = cut.before.shape(0)[-1] // (heads if len(cut.before.shape(0)) == 3 else 1)
        self.set_scale(cut, before, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the head size of queries and keys; cached keys have the same channels."""
        axes = (1, 3) if len(step.shape(0)) == 4 else (2,)
        return [(0, axes), (1, axes), *([(4, (1, 3))] if step.has(4) else [])]


register(MS, "Attention", rule=Attention())
register(MS, "MultiHeadAttention", rule=MultiHeadAttention())
register("", "Attention", rule=OnnxAttention())


class GroupQueryAttention(Rule):
    """com.microsoft.GroupQueryAttention: kernels require one head size, so query heads or whole groups are pruned."""

    caches = (3, 1), (4, 2)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of data and caches."""
        heads, cache_heads = node.attrs["num_heads"], node.attrs["kv_num_heads"]
        query, key, past = shapes[0], shapes[1], (*shapes[3:5], None, None)[:2]
        size = query[-1] // heads if key is not None else query[-1] // (heads + 2 * cache_heads)
        for cache in past:
            if cache is not None:
                yield cache[3], size
                yield cache[1], cache_heads
                yield cache[0], query[0]
        if past[0] is not None and past[1] is not None:
            yield past[0][2], past[1][2]
        total = read(6)
        if total is not None and query[0] > 1 and query[1] > 1:
            yield int(total.ravel()[0]), query[1]  # onnxruntime: several samples of several positions have no past
        lengths = shapes[5]
        if lengths is not None:
            yield prod(lengths), query[0]

    def propagate(self, step: Step) -> None:
        """Tie a group of query heads to its key and value; every group loses the same number of query heads."""
        heads, kv = int(step.attr("num_heads")), int(step.attr("kv_num_heads"))
        if step.has(12) or step.has(13):
            return  # a quantised cache
        size = self._size(step, heads, kv)
        q, k, v = self._parts(step, heads, kv, size)
        for past, part in ((3, k), (4, v)):
            if step.has(past):
                shape = (1, 1, kv, size)
                cache = along_heads(step, by_head(step.labels(past)))
                broadcast(step.atoms, [(part[0], shape), (cache, shape)], 4, step.reason)
        rows = [self._rows(step, labels) for labels, _ in (q, k, v)]
        groups = self._tie(step, rows, heads, kv)
        for i, axis in ((10, 1), (11, 0)):
            if step.has(i):
                self._beside(step, i, axis, groups, heads)
        if groups is not None:
            group_label = Label(groups.reshape(1, 1, heads, 1), 2)
            step.set(0, flatten_heads(step, (group_label,), heads, size))
        step.set(1, by_head(k[0]))
        step.set(2, by_head(v[0]))

    @staticmethod
    def _size(step: Step, heads: int, kv: int) -> int:
        return step.shape(0)[2] // (heads if step.has(1) else heads + 2 * kv)

    @staticmethod
    def _parts(step: Step, heads: int, kv: int, size: int) -> list[LabelledTensor]:
        result, start = [], 0
        for i, n in enumerate((heads, kv, kv)):
            packed = not step.has(1)
            labels = step.labels(0 if packed else i)
            labels = along_heads(step, labels)
            if packed:
                labels = step.take(labels, 2, np.arange(start, start + n * size))
                start += n * size
            part = to_heads(step, labels, (1, 1, n * size), n)
            step.fix(part[0], 3, Reason.HEAD_SIZE, "this kernel requires one head size for queries, keys and values")
            result.append(part)
        return result

    @staticmethod
    def _rows(step: Step, labels: Labels) -> Ids | None:
        """Return one atom per head."""
        label = covering(labels, 2)
        return None if label is None else step.atoms.project(label, (2,)).ravel()

    @staticmethod
    def _tie(step: Step, rows: list[Ids | None], heads: int, kv: int) -> Ids | None:
        """Tie the atoms of the query heads, as a grid [kv, heads per kv], to keys and values by row."""
        q, k, v = rows
        if q is None:
            for other in (k, v):
                step.unite(other, None, "a head")
            return None
        grid = Label(q.reshape(kv, heads // kv), 1)
        step.atoms.view(grid)
        if kv == 1:
            return q
        group = step.atoms.rows_of(grid).ids.ravel() if heads > kv else q
        for other in (k, v):
            step.unite(group, other, "a head")
        return q

    @staticmethod
    def _beside(step: Step, i: int, axis: int, rows: Ids | None, heads: int) -> None:
        """Unite an operand that has one entry per query head with the query heads."""
        labels = step.labels(i)
        for other in range(len(step.shape(i))):
            if other != axis:
                labels = step.drop_axis(labels, other, Reason.FIXED_SIZE, "attention runs along this axis")
        if step.shape(i)[axis] == heads > 1:
            step.unite(rows, step.axis_ids(labels, axis), "a head")

    def rewrite(self, cut: Cut) -> None:
        """Update the numbers of heads; the head size is constant."""
        if not cut.touched():
            return
        heads, kv = int(cut.attr("num_heads")), int(cut.attr("kv_num_heads"))
        size = self._size(cut.before, heads, kv)
        packed = not cut.before.has(1)
        first = cut.before.shape(0)[2] - (2 * kv * size if packed else 0)
        remaining = count_heads(cut, 0, heads, 0, first)
        other = count_heads(cut, 0, kv, first, first + kv * size) if packed else count_heads(cut, 1, kv)
        if remaining[1] != size or other[1] != size:
            cut.fail("a head would lose a part of its channels")
        cut.set_attr("num_heads", remaining[0])
        cut.set_attr("kv_num_heads", other[0])

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shapes [B, S, heads * size] and, of the caches, [B, kv heads, total, size]."""
        q, past = shapes[0], shapes[3] if len(shapes) > 3 else None
        if q is None or q[2] is None:
            return [None]
        heads, kv = int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
        size = q[2] // (heads if node.inputs[1] else heads + 2 * kv)
        total = values[6] if len(values) > 6 else None
        length = None if total is None else int(np.ravel(total)[0])
        if past is not None and past[2] is not None and length is not None:
            length = max(length, past[2])
        cache: Shape = (q[0], kv, length, size)
        return [(q[0], q[1], heads * size), cache, cache]


class RotaryEmbedding(Rule):
    """Rotation of pairs of channels within a head by the position: whole heads may be pruned."""

    def propagate(self, step: Step) -> None:
        """Freeze the head size, pass the other axes."""
        labels, shape = step.labels(0), step.shape(0)
        if len(shape) == 3:
            heads = self._heads(step)
            if not heads:
                return
            grid, _ = to_heads(step, labels, shape, heads)
        else:
            grid = by_head(labels)
        for axis in (0, 1):  # cosines, sines and positions have these axes too
            step.fix(grid, axis, Reason.ROTARY, "rotary positions run along this axis")
        step.fix(grid, 3, Reason.ROTARY, "rotary positions pair these channels")
        step.set(0, labels)

    @staticmethod
    def _heads(step: Step) -> int:
        """Return the number of heads from the attribute or the width of the cosines, input 2; 0 where unknown."""
        num_heads = int(step.attr("num_heads", 0))
        if num_heads or step.node.domain == "":
            return num_heads
        return step.shape(0)[2] // (2 * step.shape(2)[1]) if not step.attr("rotary_embedding_dim", 0) else 0

    def rewrite(self, cut: Cut) -> None:
        """Update the number of heads, where the node has it as an attribute."""
        heads = int(cut.attr("num_heads", 0))
        if heads and cut.touched():
            num_heads, size = count_heads(cut, 0, heads)
            if len(cut.before.shape(0)) == 3 and size != cut.before.shape(0)[2] // heads:
                cut.fail("a head would lose a part of its channels")
            cut.set_attr("num_heads", num_heads)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape."""
        return [shapes[0]]


register(MS, "GroupQueryAttention", rule=GroupQueryAttention())
register("", "RotaryEmbedding", rule=RotaryEmbedding())
register(MS, "RotaryEmbedding", rule=RotaryEmbedding())


ALONG = "attention runs along this axis"


class QAttention(Attention):
    """com.microsoft.QAttention, attention on codes: :class:`Attention` without ``qkv_hidden_sizes``.

    Queries, keys and values therefore have equal sizes. Inputs: codes [B, S, in] and [in, 3 * H], bias [3 * H], both
    scales, a mask, both zero points, a cache.
    """

    quantized = integer = True
    jumps = True
    settings = (3, 4, 6, 7)

    def propagate(self, step: Step) -> None:
        """Contract codes, scales and zero points, split the columns in three and tie equal cells of the three parts."""
        if step.has(8) or any(step.node.outputs[1:]):
            return  # a cache [2, ...] holds keys and values in one tensor: all sizes are frozen
        heads, bias_shape = int(step.attr("num_heads")), (1, 1, step.shape(1)[1])
        x = step.labels(0)
        for axis in (0, 1):
            x = step.drop_axis(x, axis, Reason.FIXED_SIZE, ALONG)
        operands: list[tuple[Labels, Shape]] = [
            (contract(step, [(x, (1, 1, step.shape(0)[2]), "bsi"), self._weight(step)], "bso"), bias_shape)
        ]
        operands += [(step.labels(i), step.shape(i)) for i in (2, 4, 7) if step.has(i)]
        joint = broadcast(step.atoms, operands, 3, step.reason)
        q, k, v = (
            to_heads(step, step.take(joint, 2, np.arange(a, b)), (1, 1, b - a), heads) for a, b in self._parts(step)
        )
        if step.attr("do_rotary", 0):
            for labels, _ in (q, k):
                step.fix(labels, 3, Reason.ROTARY, "rotary positions pair these channels")
        _, out = attend(step, q, k, v)
        keys, values = covering(k[0], 3), covering(out, 3)
        step.unite(
            None if keys is None else keys.ids,
            None if values is None else values.ids,
            "the common size of queries, keys and values",
        )
        step.set(0, flatten_heads(step, out, heads, int(v[1][3] or 0)))

    @staticmethod
    def _weight(step: Step) -> tuple[Labels, Shape, str]:
        return step.labels(1), step.shape(1), "io"

    def neutral(self, step: Step, i: int) -> str | None:
        """Return the zero point of the input or of the weight."""
        zero = {0: 6, 1: 7}.get(i)
        return step.node.inputs[zero] if zero is not None and step.has(zero) else None

    def numbers(self, node: Node, i: int, codes: NDArray[Any], read: Read) -> NDArray[Any] | None:
        """Dequantise the input or the weight."""
        scale = read({0: 3, 1: 4}.get(i, -1))
        return None if scale is None else numbers(codes, scale, read({0: 6, 1: 7}[i]), axis=-1)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shapes of :class:`Attention`; the cache is another input."""
        return super().infer(node, [*shapes[:2], None, None, shapes[8] if len(shapes) > 8 else None], values)


class PackedAttention(Attention):
    """Attention on the concatenated tokens of a batch: input [T, in], weights [in, Q + K + V], bias [Q + K + V]."""

    def propagate(self, step: Step) -> None:
        """Contract input and weight, then split the product into queries, keys and values."""
        heads, width = int(step.attr("num_heads")), step.shape(1)[1]
        x = step.drop_axis(step.labels(0), 0, Reason.FIXED_SIZE, ALONG)
        joint = contract(step, [(x, (1, step.shape(0)[1]), "si"), (step.labels(1), step.shape(1), "io")], "so")
        joint = broadcast(step.atoms, [(joint, (1, width)), (step.labels(2), step.shape(2))], 2, step.reason)
        joint = algebra.insert_axis(joint, 0)
        q, k, v = (
            to_heads(step, step.take(joint, 2, np.arange(a, b)), (1, 1, b - a), heads) for a, b in self._parts(step)
        )
        bias = as_rank_4(step.labels(5), step.shape(5)) if step.has(5) else None
        _, out = attend(step, q, k, v, bias)
        step.set(0, algebra.remove_axis(flatten_heads(step, out, heads, int(v[1][3] or 0)), 0))

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product of the input and the packed weight, before the split into heads."""
        w = known(shapes[1])
        return None if data != 0 or w is None else Pairwise(("si", "io", "so"), w, plain=False)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the input's channels, and the queries' and keys' channels in weights and bias."""
        return [(0, (1,)), (1, (1,)), (2, (0,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [T, V]."""
        x, w = shapes[0], shapes[1]
        if x is None or w is None or w[1] is None:
            return [None]
        return [(x[0], (node.attrs.get("qkv_hidden_sizes") or [w[1] // 3] * 3)[2])]


class PackedMultiHeadAttention(MultiHeadAttention):
    """Packed attention on queries, keys and values, [T, H] each or one tensor [T, heads, 3, size]; bias [Q + K + V]."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return nothing: there are no caches."""
        return ()

    def propagate(self, step: Step) -> None:
        """Split every operand into heads, add the bias, attend."""
        heads = int(step.attr("num_heads"))
        is_packed = len(step.shape(0)) == 4
        if is_packed and step.has(3):
            return  # kernels differ in the part of the bias that they apply
        parts = [self._one(step, i) if is_packed else self._apart(step, i, heads) for i in range(3)]
        q, k, v = self._biased(step, heads, *parts) if step.has(3) else parts
        bias = as_rank_4(step.labels(6), step.shape(6)) if step.has(6) else None
        _, out = attend(step, q, k, v, bias)
        step.set(0, algebra.remove_axis(flatten_heads(step, out, heads, int(v[1][3] or 0)), 0))

    @staticmethod
    def _one(step: Step, at: int) -> LabelledTensor:
        selected = algebra.remove_axis(step.take(step.labels(0), 2, np.array([at])), 2)
        tokens, heads, _, size = step.shape(0)
        return algebra.insert_axis(selected, 0), (1, tokens, heads, size)

    @staticmethod
    def _apart(step: Step, i: int, heads: int) -> LabelledTensor:
        return to_heads(step, algebra.insert_axis(step.labels(i), 0), (1, *step.shape(i)), heads)

    def rewrite(self, cut: Cut) -> None:
        """Update the number of heads and the scale; the sizes follow from the operands."""
        heads, shape = int(cut.attr("num_heads")), cut.before.shape(0)
        if not cut.touched():
            return
        num_heads, size = count_heads(cut, 0, heads)
        cut.set_attr("num_heads", num_heads)
        self.set_scale(cut, shape[-1] if len(shape) == 4 else shape[-1] // heads, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the head size of queries and keys, and of their parts of the bias."""
        axes = (1, 3) if len(step.shape(0)) == 4 else (1,)
        result: list[tuple[int, tuple[int, ...]]] = [(i, axes) for i in (0, 1) if step.has(i)]
        return [*result, (3, (0,))] if step.has(3) else result

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [T, V]."""
        q, v = shapes[0], shapes[2] if len(shapes) > 2 else None
        if q is None:
            return [None]
        if len(q) == 4:
            return [None if q[1] is None or q[3] is None else (q[0], q[1] * q[3])]
        return [None if v is None else (q[0], v[1])]


register(MS, "QAttention", rule=QAttention())
register(MS, "PackedAttention", rule=PackedAttention())
register(MS, "PackedMultiHeadAttention", rule=PackedMultiHeadAttention())


class DecoderMaskedMultiHeadAttention(MultiHeadAttention):
    """com.microsoft.DecoderMaskedMultiHeadAttention: one query per call; kernels want one head size for all."""

    bias, added, past = 10, 4, (5, 6)
    caches = (5, 1), (6, 2)

    def propagate(self, step: Step) -> None:
        """Prune whole heads as MultiHeadAttention does, where keys and values are separate."""
        if not (step.has(1) and step.has(2)):
            return
        heads = int(step.attr("num_heads"))
        for i in range(3):
            part = to_heads(step, step.labels(i), step.shape(i), heads)
            step.fix(part[0], 3, Reason.HEAD_SIZE, "this kernel requires one head size for queries, keys and values")
        super().propagate(step)


class LinearAttention(Heads):
    """LinearAttention: one state of keys times values [dk, dv] per head, which decays and is corrected.

    A state that enters or leaves the model freezes all sizes.
    """

    @staticmethod
    def _heads(step: Step) -> tuple[int, int]:
        return int(step.attr("q_num_heads")), int(step.attr("kv_num_heads"))

    def propagate(self, step: Step) -> None:
        """Sum over the channels that queries, keys and their decay share; pass the values; tie the heads."""
        heads, kv = self._heads(step)
        graph = step.table.graph
        has_state = any(o in graph.consumers or o in graph.outputs for o in step.node.outputs[1:] if o)
        if step.has(3) or has_state or kv > heads:
            return
        q, k, v = (to_heads(step, step.labels(i), step.shape(i), n) for i, n in ((0, heads), (1, kv), (2, kv)))
        gates = [self._gate(step, i, kv) for i in (4, 5) if step.has(i)]
        keys_and_gates = [
            part if part[1][2] == 1 < kv else repeat_heads(step, part, heads // kv) for part in (k, *gates)
        ]
        operands = [(along_heads(step, labels), (1, 1, *shape[2:]), "bthd") for labels, shape in (q, *keys_and_gates)]
        rows: Shape = (1, 1, heads)
        joint = contract(step, operands, "bth")
        labels, shape = repeat_heads(step, v, heads // kv)
        value_operands = [(joint, rows, "bth"), (along_heads(step, labels), (1, 1, *shape[2:]), "bthv")]
        step.set(0, flatten_heads(step, contract(step, value_operands, "bthv"), heads, int(v[1][3] or 0)))

    @staticmethod
    def _gate(step: Step, i: int, heads: int) -> LabelledTensor:
        """Return labels of a decay or rate: one value per key channel, one per head, or a single value for all."""
        labels, shape = step.labels(i), step.shape(i)
        if shape[2] not in (1, heads):
            return to_heads(step, labels, shape, heads)
        return algebra.insert_axis(labels, 3), (*shape, 1)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count a write and a read of every head's state of keys times values per step."""
        q, k, v = shapes[:3]
        if q is None or k is None or v is None:
            return 0
        heads, kv = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
        return prod(q[:2]) * (kv + heads) * (k[2] // kv) * (v[2] // kv)

    def rewrite(self, cut: Cut) -> None:
        """Update the numbers of heads, and the scale, which defaults to a function of the query's channels."""
        if not cut.touched():
            return
        heads, kv = self._heads(cut.before)
        num_heads, size = count_heads(cut, 0, heads)
        cut.set_attr("q_num_heads", num_heads)
        cut.set_attr("kv_num_heads", count_heads(cut, 1, kv)[0])
        self.set_scale(cut, cut.before.shape(0)[2] // heads, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the channels of queries and keys."""
        return [(0, (2,)), (1, (2,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shapes [B, T, heads * dv] and, of the state, [B, kv heads, dk, dv]."""
        q, k, v = shapes[:3]
        if q is None or k is None or v is None or v[2] is None or k[2] is None:
            return [None]
        heads, kv = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
        state = None if node.attrs.get("state_window", 0) else (q[0], kv, k[2] // kv, v[2] // kv)
        return [(q[0], q[1], max(heads, kv) * (v[2] // kv)), state]


class CausalConv(Rule):
    """CausalConvWithState: a depthwise convolution over preceding positions, [N, C, ...] or [N, L, C]."""

    weights = (1,)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count one sum over the kernel per element of the output."""
        return 0 if out is None or shapes[1] is None else prod(out) * prod(shapes[1][1:])

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return axis 1, or the last axis for channels-last data."""
        return rank - 1 if node.attrs.get("channels_last", 0) else 1

    def propagate(self, step: Step) -> None:
        """Tie each channel across data, kernel, bias, state and result."""
        axis, rank = 2 if step.attr("channels_last", 0) else 1, len(step.shape(0))
        if step.attr("state_window", 0) or (axis == 2 and rank != 3):
            return  # several states, or channels along several axes
        candidates = []
        for i, at in ((0, axis), (1, 0), (2, 0), (3, axis)):
            if step.has(i):
                labels = step.labels(i)
                step.fix_all_but(labels, (at,), Reason.SPATIAL, "a convolution slides over this axis")
                candidates.append(step.axis_ids(labels, at))
        for ids in candidates[1:]:
            step.unite(candidates[0], ids, "a channel of a depthwise convolution")
        if candidates[0] is not None:
            for o in (0, 1):
                step.set(o, (along(candidates[0], axis, rank),))

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return windows that end at their own position; None where a state precedes the data."""
        w, attrs = known(shapes[1]), node.attrs
        begins = len(node.inputs) < 4 or not node.inputs[3]
        if data != 0 or w is None or len(w) != 3 or not begins or attrs.get("channels_last", 0):
            return None
        dilation = int(attrs.get("dilation", 1))
        plain = attrs.get("activation", "none") == "none"
        return Windows(w[2:], dilations=(dilation,), pads=((w[2] - 1) * dilation, 0), group=w[0], plain=plain)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape and, of the state, that of (kernel - 1) * dilation positions."""
        x, w = shapes[0], shapes[1]
        if x is None or w is None or len(x) < 3:
            return [x]
        back = None if w[-1] is None else (w[-1] - 1) * int(node.attrs.get("dilation", 1))
        state = (x[0], back, *x[2:]) if node.attrs.get("channels_last", 0) else (*x[:-1], back)
        return [x, None if node.attrs.get("state_window", 0) else state]


register(MS, "DecoderMaskedMultiHeadAttention", rule=DecoderMaskedMultiHeadAttention())
for domain in ("", MS):
    register(domain, "LinearAttention", rule=LinearAttention())
    register(domain, "CausalConvWithState", rule=CausalConv())
