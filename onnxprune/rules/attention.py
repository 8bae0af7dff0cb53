"""Fused attention: what the spelled-out graph does (reshape to heads, two products, reshape back), inside one node."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxprune.labels import movement
from onnxprune.labels.combine import Shape, broadcast
from onnxprune.labels.label import Label, Labels, covering
from onnxprune.model.graph import Node
from onnxprune.rules.context import Cut, Step
from onnxprune.rules.contraction import contract
from onnxprune.rules.registry import Rule, register

MS = "com.microsoft"
Part = tuple[Labels, Shape]
"""Labels and shape of queries, keys or values, laid out [batch, sequence, heads, head size]."""


def to_heads(step: Step, labels: Labels, shape: Shape, heads: int) -> Part:
    """[..., heads * size] as [..., heads, size]; [batch, heads, sequence, size] with the middle axes swapped."""
    if len(shape) == 4:
        return movement.transpose(labels, (0, 2, 1, 3)), (shape[0], shape[2], shape[1], shape[3])
    wide = int(shape[-1] or 0)
    if wide % heads:
        raise ValueError(f"{wide} channels do not divide into {heads} heads")
    # What is left of a grid must be one: every head keeps the same number of its own channels.
    return _viewed(step, labels, (*shape[:-1], wide), (*shape[:-1], heads, wide // heads))


def _viewed(step: Step, labels: Labels, before: Shape, after: Shape) -> Part:
    """A reshape of the last axes alone; the leading ones may depend on the data."""
    ahead = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    for axis in range(ahead):
        step.fix(labels, axis, "fixed-size", "attention runs along this axis")
    labels = tuple(x for x in labels if max(x.axes) >= ahead)
    stand_in = [n if i >= ahead else 1 for i, n in enumerate(before)], [n if i >= ahead else 1 for i, n in enumerate(after)]
    moved = movement.reshape(step.atoms, labels, *stand_in, step.reason)  # type: ignore[arg-type]
    for label in moved:
        step.atoms.view(label)
    return moved, after


def repeated(step: Step, part: Part, times: int) -> Part:
    """Keys or values of fewer heads than the queries: each serves ``times`` of them in a row."""
    labels, shape = part
    heads = covering(labels, 2)
    if times == 1:
        return part
    if heads is not None:
        step.atoms.view(heads)
    grown = tuple(Label(np.repeat(x.ids, times, axis=2), x.pack) if x is heads else x for x in labels)
    return grown, (*shape[:2], int(shape[2] or 0) * times, shape[3])


def attend(step: Step, q: Part, k: Part, v: Part, bias: Part | None = None) -> tuple[Labels, Labels]:
    """Labels of the scores [batch, heads, query, key] and of the result [batch, query, heads, size].

    Head sizes of queries and keys unite and leave; a head goes with its query, key, value and bias.
    """
    parts = []
    for labels, shape in (q, k, v):
        for axis in (0, 1):
            step.fix(labels, axis, "fixed-size", "attention runs along this axis")
        kept = tuple(x for x in labels if not {0, 1} & set(x.axes))
        parts.append((kept, (1, 1, *shape[2:])))
    (ql, qs), (kl, ks), (vl, vs) = parts
    scores = contract(step, [(ql, qs, "bshd"), (kl, ks, "blhd")], "bhsl")
    if bias is not None:
        heads = (1, int(qs[2] or 0), 1, 1)
        own = bias[0]
        for axis in (0, 2, 3):
            own = step.drop_axis(own, axis, "fixed-size", "attention runs along this axis")
        shape = tuple(n if a == 1 else 1 for a, n in enumerate(bias[1]))
        scores = broadcast(step.atoms, [(scores, heads), (own, shape)], 4, step.reason)
    return scores, contract(step, [(scores, (1, qs[2], 1, 1), "bhsl"), (vl, vs, "blhv")], "bshv")


def as_rank_4(labels: Labels, shape: Shape) -> Part:
    """A bias or mask that broadcasts against the scores, with all four axes."""
    shift = 4 - len(shape)
    return tuple(Label(x.ids.reshape((1,) * shift + x.ids.shape), x.pack + shift) for x in labels), (*(1,) * shift, *shape)


def flattened(step: Step, labels: Labels, heads: int, size: int) -> Labels:
    """[1, 1, heads, size] as [1, 1, heads * size]."""
    return movement.reshape(step.atoms, labels, (1, 1, heads, size), (1, 1, heads * size), step.reason)


def by_head(labels: Labels) -> Labels:
    """[batch, sequence, heads, size] as [batch, heads, sequence, size]."""
    return movement.transpose(labels, (0, 2, 1, 3))


def with_past(step: Step, part: Part, past: int) -> Part:
    """Keys or values behind cached ones [batch, heads, past, size]: where the cache has no channels to remove, all stay."""
    if not step.has(past):
        return part
    labels, shape = to_heads(step, step.labels(past), step.shape(past), 1)
    one: Shape = (1, 1, *shape[2:])
    return broadcast(step.atoms, [(part[0], one), (labels, one)], 4, step.reason), part[1]


def heads_left(cut: Cut, i: int, heads: int, start: int = 0, stop: int | None = None) -> tuple[int, int]:
    """(heads, their size) of ``start:stop`` of the last axis of input ``i`` after the cut."""
    name, shape = cut.node.inputs[i], cut.before.shape(i)
    if len(shape) == 4:
        return cut.shape(i)[1], cut.shape(i)[3]
    stop = shape[-1] if stop is None else stop
    keep = cut.keep(name, len(shape) - 1)
    if keep is None:
        return heads, (stop - start) // heads
    grid = keep[start:stop].reshape(heads, -1)
    left = int(grid.any(axis=1).sum())
    return left, int(grid.sum()) // max(left, 1)


class Heads(Rule):
    """What the attention operators share when they are rewritten."""

    def set_scale(self, cut: Cut, before: int, after: int) -> None:
        """The default 1/sqrt(head size) is written out once the size changes."""
        if before != after and not cut.attr("scale", 0.0):
            cut.set_attr("scale", 1.0 / float(np.sqrt(before)))

    def results(self, step: Step, out: Labels, shape: Shape, k: Part, v: Part, scores: Labels) -> None:
        """State the output and, where asked for, the caches (1, 2) and the scores (3)."""
        step.set(0, flattened(step, out, int(shape[0] or 0), int(shape[1] or 0)) if len(step.out_shape()) == 3 else by_head(out))
        step.set(1, by_head(k[0]))
        step.set(2, by_head(v[0]))
        step.set(3, scores)


class Attention(Heads):
    """com.microsoft.Attention: input [B, S, in], weights [in, Q + K + V], bias [Q + K + V]."""

    def _parts(self, step: Step) -> list[tuple[int, int]]:
        sizes = step.attr("qkv_hidden_sizes") or [step.shape(1)[1] // 3] * 3
        ends = np.cumsum([0, *sizes]).tolist()
        return list(zip(ends[:-1], ends[1:], strict=True))

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

    def reads(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
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
    """com.microsoft.MultiHeadAttention: queries, keys and values apart or packed, a bias, an optional cache."""

    def propagate(self, step: Step) -> None:
        """Lay all out by heads, add the bias, attend."""
        heads = int(step.attr("num_heads"))
        packed = any(len(step.shape(i)) == 5 for i in (0, 1) if step.has(i))
        if step.has(3) and (packed or len(step.shape(1)) == 4):
            return  # which part of the bias applies differs between kernels
        q, k, v = self._packed(step) if packed else tuple(to_heads(step, step.labels(i), step.shape(i), heads) for i in range(3))
        if step.has(3):
            q, k, v = self._biased(step, heads, q, k, v)
        k, v = with_past(step, k, 6), with_past(step, v, 7)
        bias = as_rank_4(step.labels(5), step.shape(5)) if step.has(5) else None
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

    @staticmethod
    def _biased(step: Step, heads: int, *parts: Part) -> tuple[Part, Part, Part]:
        """[Q + K + V] is added to the three."""
        result, start = [], 0
        for labels, shape in parts:
            wide = heads * int(shape[3] or 0)
            own = step.take(step.labels(3), 0, np.arange(start, start + wide))
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

    def reads(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Queries and keys are summed over the head size, and so is what the bias adds to them."""
        axes = {3: (2,), 4: (1, 3), 5: (2, 4)}
        result: list[tuple[int, tuple[int, ...]]] = [(i, axes[len(step.shape(i))]) for i in (0, 1) if step.has(i)]
        return [*result, (3, (0,))] if step.has(3) else result

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[B, S, V] and the caches [B, heads, past + keys, size]."""
        shapes = [*shapes, *[None] * (8 - len(shapes))]
        q, k, v, past = shapes[0], shapes[1], shapes[2], shapes[6]
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

    def reads(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Queries and keys are summed over the head size; cached keys have the same channels."""
        axes = (1, 3) if len(step.shape(0)) == 4 else (2,)
        return [(0, axes), (1, axes), *([(4, (1, 3))] if step.has(4) else [])]


class GroupQueryAttention(Rule):
    """com.microsoft.GroupQueryAttention: kernels want one head size for all, so queries or whole groups of heads go."""

    def propagate(self, step: Step) -> None:
        """A group of queries goes with its key and value; within groups all lose equally many queries."""
        heads, kv = int(step.attr("num_heads")), int(step.attr("kv_num_heads"))
        if step.has(12) or step.has(13):
            return  # a quantised cache
        size = self._size(step, heads, kv)
        q, k, v = self._parts(step, heads, kv, size)
        for past, part in ((3, k), (4, v)):
            if step.has(past):
                cache = by_head(step.labels(past))
                part = (broadcast(step.atoms, [(part[0], (1, 1, kv, size)), (cache, (1, 1, kv, size))], 4, step.reason), part[1])
        rows = [self._rows(step, labels) for labels, _ in (q, k, v)]
        groups = self._tie(step, rows, heads, kv)
        for i, axis in ((10, 1), (11, 0)):
            if step.has(i):
                self._beside(step, i, axis, groups, heads)
        if groups is not None:
            wide = Label(groups.reshape(1, 1, heads, 1), 2)
            step.set(0, flattened(step, (wide,), heads, size))
        step.set(1, by_head(k[0]))
        step.set(2, by_head(v[0]))

    @staticmethod
    def _size(step: Step, heads: int, kv: int) -> int:
        return step.shape(0)[2] // (heads if step.has(1) else heads + 2 * kv)

    @staticmethod
    def _parts(step: Step, heads: int, kv: int, size: int) -> list[Part]:
        result, start = [], 0
        for i, n in enumerate((heads, kv, kv)):
            packed = not step.has(1)
            labels = step.labels(0 if packed else i)
            for axis in (0, 1):
                labels = step.drop_axis(labels, axis, "fixed-size", "attention runs along this axis")
            if packed:
                labels = step.take(labels, 2, np.arange(start, start + n * size))
                start += n * size
            part = to_heads(step, labels, (1, 1, n * size), n)
            step.fix(part[0], 3, "head-size", "this kernel wants one head size for queries, keys and values")
            result.append(part)
        return result

    @staticmethod
    def _rows(step: Step, labels: Labels) -> np.ndarray | None:
        """One atom per head."""
        label = covering(labels, 2)
        return None if label is None else step.atoms.project(label, (2,)).ravel()

    @staticmethod
    def _tie(step: Step, rows: list[np.ndarray | None], heads: int, kv: int) -> np.ndarray | None:
        """Atoms of the query heads, as [kv, heads per kv] a grid whose rows go with keys and values."""
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
    def _beside(step: Step, i: int, axis: int, rows: np.ndarray | None, heads: int) -> None:
        """An operand with one entry per query head."""
        labels = step.labels(i)
        for other in range(len(step.shape(i))):
            if other != axis:
                labels = step.drop_axis(labels, other, "fixed-size", "attention runs along this axis")
        if step.shape(i)[axis] == heads > 1:
            step.unite(rows, step.axis_ids(labels, axis), "a head")

    def rewrite(self, cut: Cut) -> None:
        """Numbers of heads; their size stays."""
        if not cut.touched():
            return
        heads, kv = int(cut.attr("num_heads")), int(cut.attr("kv_num_heads"))
        size = self._size(cut.before, heads, kv)
        packed = not cut.before.has(1)
        first = cut.before.shape(0)[2] - (2 * kv * size if packed else 0)
        left = heads_left(cut, 0, heads, 0, first)
        other = heads_left(cut, 0, kv, first, first + kv * size) if packed else heads_left(cut, 1, kv)
        if left[1] != size or other[1] != size:
            cut.fail("a head would lose a part of its channels")
        cut.set_attr("num_heads", left[0])
        cut.set_attr("kv_num_heads", other[0])

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[B, S, heads * size] and the caches [B, kv heads, total, size]."""
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
    """Rotates pairs of channels within a head by the position: whole heads may go."""

    def propagate(self, step: Step) -> None:
        """Fix the head size, pass everything else."""
        labels, shape = step.labels(0), step.shape(0)
        if len(shape) == 3:
            heads = self._heads(step)
            if not heads:
                return
            grid, _ = to_heads(step, labels, shape, heads)
        else:
            grid = by_head(labels)
        step.fix(grid, 3, "rotary", "rotary positions pair these channels")
        step.set(0, labels)

    @staticmethod
    def _heads(step: Step) -> int:
        """As stated; com.microsoft's form may leave it to the width of its cosines, input 2."""
        stated = int(step.attr("num_heads", 0))
        if stated or step.node.domain == "":
            return stated
        return step.shape(0)[2] // (2 * step.shape(2)[1]) if not step.attr("rotary_embedding_dim", 0) else 0

    def rewrite(self, cut: Cut) -> None:
        """The number of heads, where it is stated."""
        heads = int(cut.attr("num_heads", 0))
        if heads and cut.touched():
            left, size = heads_left(cut, 0, heads)
            if len(cut.before.shape(0)) == 3 and size != cut.before.shape(0)[2] // heads:
                cut.fail("a head would lose a part of its channels")
            cut.set_attr("num_heads", left)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape."""
        return [shapes[0]]


register(MS, "Attention", rule=Attention())
register(MS, "MultiHeadAttention", rule=MultiHeadAttention())
register(MS, "GroupQueryAttention", rule=GroupQueryAttention())
register(MS, "RotaryEmbedding", rule=RotaryEmbedding())
register("", "Attention", rule=OnnxAttention())
register("", "RotaryEmbedding", rule=RotaryEmbedding())
