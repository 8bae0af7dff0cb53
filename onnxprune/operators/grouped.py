"""Attention whose heads may only go as a whole: onnxruntime's grouped queries, and rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape, broadcast
from onnxprune.labels.label import Ids, Label, Labels, covering
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.heads import Part, along_heads, by_head, flattened, heads_left, to_heads
from onnxprune.operators.registry import Rule, register

MS = "com.microsoft"


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
                shape = (1, 1, kv, size)
                cache = along_heads(step, by_head(step.labels(past)))
                broadcast(step.atoms, [(part[0], shape), (cache, shape)], 4, step.reason)
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
            labels = along_heads(step, labels)
            if packed:
                labels = step.take(labels, 2, np.arange(start, start + n * size))
                start += n * size
            part = to_heads(step, labels, (1, 1, n * size), n)
            step.fix(part[0], 3, "head-size", "this kernel wants one head size for queries, keys and values")
            result.append(part)
        return result

    @staticmethod
    def _rows(step: Step, labels: Labels) -> Ids | None:
        """One atom per head."""
        label = covering(labels, 2)
        return None if label is None else step.atoms.project(label, (2,)).ravel()

    @staticmethod
    def _tie(step: Step, rows: list[Ids | None], heads: int, kv: int) -> Ids | None:
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
    def _beside(step: Step, i: int, axis: int, rows: Ids | None, heads: int) -> None:
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
        for axis in (0, 1):  # cosines, sines and positions have these axes too
            step.fix(grid, axis, "rotary", "rotary positions run along this axis")
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


register(MS, "GroupQueryAttention", rule=GroupQueryAttention())
register("", "RotaryEmbedding", rule=RotaryEmbedding())
register(MS, "RotaryEmbedding", rule=RotaryEmbedding())
