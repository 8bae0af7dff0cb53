"""Attention in onnxruntime's packed forms: on codes, and on the tokens of a batch without padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.contractions import Form, Pairwise
from onnxprune.graph.view import Node
from onnxprune.labels import movement
from onnxprune.labels.combine import Shape, broadcast, known
from onnxprune.labels.label import Labels, covering
from onnxprune.operators.attention import MS, Attention, MultiHeadAttention
from onnxprune.operators.codes import numbers
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contraction import contract
from onnxprune.operators.heads import Part, as_rank_4, attend, flattened, heads_left, to_heads
from onnxprune.operators.registry import Read, register

ALONG = "attention runs along this axis"


class QAttention(Attention):
    """Attention on codes: all of :class:`Attention` but ``qkv_hidden_sizes``, so queries, keys and values stay alike.

    Inputs: codes [B, S, in] and [in, 3 * H], bias [3 * H], both scales, a mask, both zero points, a cache.
    """

    settings = (3, 4, 6, 7)

    def propagate(self, step: Step) -> None:
        """One product, whose columns have scales and zero points, split into three; a cell of one goes with all."""
        if step.has(8) or any(step.node.outputs[1:]):
            return  # a cache [2, ...] holds keys and values in one tensor: all sizes stay
        heads, wide = int(step.attr("num_heads")), (1, 1, step.shape(1)[1])
        x = step.labels(0)
        for axis in (0, 1):
            x = step.drop_axis(x, axis, "fixed-size", ALONG)
        operands: list[tuple[Labels, Shape]] = [
            (contract(step, [(x, (1, 1, step.shape(0)[2]), "bsi"), self._weight(step)], "bso"), wide)
        ]
        operands += [(step.labels(i), step.shape(i)) for i in (2, 4, 7) if step.has(i)]
        joint = broadcast(step.atoms, operands, 3, step.reason)
        q, k, v = (
            to_heads(step, step.take(joint, 2, np.arange(a, b)), (1, 1, b - a), heads) for a, b in self._parts(step)
        )
        if step.attr("do_rotary", 0):
            for labels, _ in (q, k):
                step.fix(labels, 3, "rotary", "rotary positions pair these channels")
        _, out = attend(step, q, k, v)
        keys, values = covering(k[0], 3), covering(out, 3)
        step.unite(
            None if keys is None else keys.ids, None if values is None else values.ids, "the size that all three have"
        )
        step.set(0, flattened(step, out, heads, int(v[1][3] or 0)))

    @staticmethod
    def _weight(step: Step) -> tuple[Labels, Shape, str]:
        return step.labels(1), step.shape(1), "io"

    def neutral(self, step: Step, i: int) -> str | None:
        """The zero point of the input or of the weight."""
        zero = {0: 6, 1: 7}.get(i)
        return step.node.inputs[zero] if zero is not None and step.has(zero) else None

    def numbers(self, node: Node, i: int, codes: NDArray[Any], read: Read) -> NDArray[Any] | None:
        """Input and weight are codes."""
        scale = read({0: 3, 1: 4}.get(i, -1))
        return None if scale is None else numbers(codes, scale, read({0: 6, 1: 7}[i]), axis=-1)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """As for numbers, but for the place of the cache."""
        return super().infer(node, [*shapes[:2], None, None, shapes[8] if len(shapes) > 8 else None], values)


class PackedAttention(Attention):
    """Attention on the tokens of a batch in a row: input [T, in], weights [in, Q + K + V], bias [Q + K + V]."""

    def propagate(self, step: Step) -> None:
        """One product, split into queries, keys and values."""
        heads, wide = int(step.attr("num_heads")), step.shape(1)[1]
        x = step.drop_axis(step.labels(0), 0, "fixed-size", ALONG)
        joint = contract(step, [(x, (1, step.shape(0)[1]), "si"), (step.labels(1), step.shape(1), "io")], "so")
        joint = broadcast(step.atoms, [(joint, (1, wide)), (step.labels(2), step.shape(2))], 2, step.reason)
        joint = movement.insert_axis(joint, 0)
        q, k, v = (
            to_heads(step, step.take(joint, 2, np.arange(a, b)), (1, 1, b - a), heads) for a, b in self._parts(step)
        )
        bias = as_rank_4(step.labels(5), step.shape(5)) if step.has(5) else None
        _, out = attend(step, q, k, v, bias)
        step.set(0, movement.remove_axis(flattened(step, out, heads, int(v[1][3] or 0)), 0))

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """The input times the packed weight, ahead of the heads."""
        w = known(shapes[1])
        return None if data != 0 or w is None else Pairwise(("si", "io", "so"), w, plain=False)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """The input's channels, and queries and keys as they come out of weights and bias."""
        return [(0, (1,)), (1, (1,)), (2, (0,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[T, V]."""
        x, w = shapes[0], shapes[1]
        if x is None or w is None or w[1] is None:
            return [None]
        return [(x[0], (node.attrs.get("qkv_hidden_sizes") or [w[1] // 3] * 3)[2])]


class PackedMultiHeadAttention(MultiHeadAttention):
    """The same on queries, keys and values: [T, H] each, or together [T, heads, 3, size]; bias [Q + K + V]."""

    def propagate(self, step: Step) -> None:
        """Lay all out by heads, add the bias, attend."""
        heads = int(step.attr("num_heads"))
        together = len(step.shape(0)) == 4
        if together and step.has(3):
            return  # which part of the bias applies differs between kernels
        parts = [self._one(step, i) if together else self._apart(step, i, heads) for i in range(3)]
        q, k, v = self._biased(step, heads, *parts) if step.has(3) else parts
        bias = as_rank_4(step.labels(6), step.shape(6)) if step.has(6) else None
        _, out = attend(step, q, k, v, bias)
        step.set(0, movement.remove_axis(flattened(step, out, heads, int(v[1][3] or 0)), 0))

    @staticmethod
    def _one(step: Step, at: int) -> Part:
        picked = movement.remove_axis(step.take(step.labels(0), 2, np.array([at])), 2)
        tokens, heads, _, size = step.shape(0)
        return movement.insert_axis(picked, 0), (1, tokens, heads, size)

    @staticmethod
    def _apart(step: Step, i: int, heads: int) -> Part:
        return to_heads(step, movement.insert_axis(step.labels(i), 0), (1, *step.shape(i)), heads)

    def rewrite(self, cut: Cut) -> None:
        """Heads and the scale; the sizes follow from the operands."""
        heads, shape = int(cut.attr("num_heads")), cut.before.shape(0)
        if not cut.touched():
            return
        left, size = heads_left(cut, 0, heads)
        cut.set_attr("num_heads", left)
        self.set_scale(cut, shape[-1] if len(shape) == 4 else shape[-1] // heads, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Queries and keys are summed over the head size, and so is what the bias adds to them."""
        axes = (1, 3) if len(step.shape(0)) == 4 else (1,)
        result: list[tuple[int, tuple[int, ...]]] = [(i, axes) for i in (0, 1) if step.has(i)]
        return [*result, (3, (0,))] if step.has(3) else result

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[T, V]."""
        q, v = shapes[0], shapes[2] if len(shapes) > 2 else None
        if q is None:
            return [None]
        if len(q) == 4:
            return [None if q[1] is None or q[3] is None else (q[0], q[1] * q[3])]
        return [None if v is None else (q[0], v[1])]


register(MS, "QAttention", rule=QAttention())
register(MS, "PackedAttention", rule=PackedAttention())
register(MS, "PackedMultiHeadAttention", rule=PackedMultiHeadAttention())
