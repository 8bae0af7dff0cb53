"""Operators of models that generate token by token: keys, values or states stay from one call to the next."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from onnxprune.contractions import Form, Windows
from onnxprune.graph.view import Node
from onnxprune.labels import movement
from onnxprune.labels.combine import Shape, known
from onnxprune.labels.label import along
from onnxprune.operators.attention import Heads, MultiHeadAttention
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contraction import contract
from onnxprune.operators.heads import Part, along_heads, flattened, heads_left, repeated, to_heads
from onnxprune.operators.registry import Rule, register

MS = "com.microsoft"


class DecoderMaskedMultiHeadAttention(MultiHeadAttention):
    """com.microsoft.DecoderMaskedMultiHeadAttention: one query per call; kernels want one head size for all."""

    bias, added, past = 10, 4, (5, 6)

    def propagate(self, step: Step) -> None:
        """As MultiHeadAttention by whole heads, where keys and values come apart."""
        if not (step.has(1) and step.has(2)):
            return
        heads = int(step.attr("num_heads"))
        for i in range(3):
            part = to_heads(step, step.labels(i), step.shape(i), heads)
            step.fix(part[0], 3, "head-size", "this kernel wants one head size for queries, keys and values")
        super().propagate(step)


class LinearAttention(Heads):
    """LinearAttention: one state of keys times values [dk, dv] per head, which decays and is corrected.

    A state that comes from outside or goes there keeps all sizes.
    """

    @staticmethod
    def _heads(step: Step) -> tuple[int, int]:
        return int(step.attr("q_num_heads")), int(step.attr("kv_num_heads"))

    def propagate(self, step: Step) -> None:
        """Queries, keys and their decay share channels, which are summed over; values pass; heads go together."""
        heads, kv = self._heads(step)
        graph = step.table.graph
        kept = any(o in graph.consumers or o in graph.outputs for o in step.node.outputs[1:] if o)
        if step.has(3) or kept or kv > heads:
            return
        q, k, v = (to_heads(step, step.labels(i), step.shape(i), n) for i, n in ((0, heads), (1, kv), (2, kv)))
        gates = [self._gate(step, i, kv) for i in (4, 5) if step.has(i)]
        every = [part if part[1][2] == 1 < kv else repeated(step, part, heads // kv) for part in (k, *gates)]
        operands = [(along_heads(step, labels), (1, 1, *shape[2:]), "bthd") for labels, shape in (q, *every)]
        rows: Shape = (1, 1, heads)
        together = contract(step, operands, "bth")
        labels, shape = repeated(step, v, heads // kv)
        passed = [(together, rows, "bth"), (along_heads(step, labels), (1, 1, *shape[2:]), "bthv")]
        step.set(0, flattened(step, contract(step, passed, "bthv"), heads, int(v[1][3] or 0)))

    @staticmethod
    def _gate(step: Step, i: int, heads: int) -> Part:
        """A decay or rate: one per key channel, per head or (of one value) for all."""
        labels, shape = step.labels(i), step.shape(i)
        if shape[2] not in (1, heads):
            return to_heads(step, labels, shape, heads)
        return movement.insert_axis(labels, 3), (*shape, 1)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Every head writes its state of keys times values once a step, and reads it."""
        q, k, v = shapes[:3]
        if q is None or k is None or v is None:
            return 0
        heads, kv = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
        return prod(q[:2]) * (kv + heads) * (k[2] // kv) * (v[2] // kv)

    def rewrite(self, cut: Cut) -> None:
        """Numbers of heads, and the scale, which follows from the channels of a query."""
        if not cut.touched():
            return
        heads, kv = self._heads(cut.before)
        left, size = heads_left(cut, 0, heads)
        cut.set_attr("q_num_heads", left)
        cut.set_attr("kv_num_heads", heads_left(cut, 1, kv)[0])
        self.set_scale(cut, cut.before.shape(0)[2] // heads, size)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Queries and keys are summed over their channels."""
        return [(0, (2,)), (1, (2,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """[B, T, heads * dv], and the state [B, kv heads, dk, dv]."""
        q, k, v = shapes[:3]
        if q is None or k is None or v is None or v[2] is None or k[2] is None:
            return [None]
        heads, kv = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
        state = None if node.attrs.get("state_window", 0) else (q[0], kv, k[2] // kv, v[2] // kv)
        return [(q[0], q[1], max(heads, kv) * (v[2] // kv)), state]


class CausalConv(Rule):
    """CausalConvWithState: a depthwise convolution over what came before, [N, C, ...] or [N, L, C]."""

    weights = (1,)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Every number of the output is a sum over the kernel."""
        return 0 if out is None or shapes[1] is None else prod(out) * prod(shapes[1][1:])

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Axis 1 unless channels come last."""
        return rank - 1 if node.attrs.get("channels_last", 0) else 1

    def propagate(self, step: Step) -> None:
        """A channel is one of everything: data, kernel, bias, state and result."""
        axis, rank = 2 if step.attr("channels_last", 0) else 1, len(step.shape(0))
        if step.attr("state_window", 0) or (axis == 2 and rank != 3):
            return  # several states, or channels along several axes
        found = []
        for i, at in ((0, axis), (1, 0), (2, 0), (3, axis)):
            if step.has(i):
                labels = step.labels(i)
                step.fix_all_but(labels, (at,), "spatial", "a convolution slides over this axis")
                found.append(step.axis_ids(labels, at))
        for ids in found[1:]:
            step.unite(found[0], ids, "a channel of a depthwise convolution")
        if found[0] is not None:
            for o in (0, 1):
                step.set(o, (along(found[0], axis, rank),))

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Windows that end where they stand, where nothing came before."""
        w, attrs = known(shapes[1]), node.attrs
        begins = len(node.inputs) < 4 or not node.inputs[3]
        if data != 0 or w is None or len(w) != 3 or not begins or attrs.get("channels_last", 0):
            return None
        apart = int(attrs.get("dilation", 1))
        plain = attrs.get("activation", "none") == "none"
        return Windows(w[2:], dilations=(apart,), pads=((w[2] - 1) * apart, 0), group=w[0], plain=plain)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The data's shape, and as many positions of it as the kernel looks back."""
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
