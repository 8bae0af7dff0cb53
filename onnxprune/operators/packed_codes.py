"""Weights of a few bits: several codes lie in a byte, blocks of ``block_size`` of them share a scale.

Along the packed axis a whole block is the least that can go: its codes, its scale and its zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.contractions import Blocks, Form
from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape, known
from onnxprune.labels.label import Labels, along
from onnxprune.operators.codes import PACKED_BITS, numbers, pack, unpack
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contraction import contract
from onnxprune.operators.registry import Read, Rule, register

Array = NDArray[Any]
MS = "com.microsoft"
A, B, SCALES, ZEROS, ORDER, BIAS = range(6)
_SETTING = "a scale or zero point"
_STAYS = "codes are packed along this axis"


class PackedMatMul(Rule):
    """MatMulNBits: A [..., K] times codes B [N, blocks, bytes], scales [N, blocks] and zero points, either maybe flat.

    Zero points are packed as the codes are, or numbers like the scales. ``g_idx`` [K] says which scale a position has.
    """

    weights = (B,)
    settings = (SCALES, ZEROS, ORDER)

    def propagate(self, step: Step) -> None:
        """Contract over K, block by block; unite N through all operands."""
        b, size = step.labels(B), step.shape(B)[0]
        step.fix_all_but(b, (0, 1), "operand", _STAYS)
        columns, blocks = step.axis_ids(b, 0), step.axis_ids(b, 1)
        for i in (i for i in (SCALES, ZEROS, BIAS) if step.has(i)):
            own, shape = step.labels(i), step.shape(i)
            if own or shape[0] > 1:
                every = None if columns is None else np.repeat(columns, shape[0] // size)
                step.unite(every, step.axis_ids(own, 0), _SETTING)
            if self._per_block(step, i):
                step.unite(blocks, step.axis_ids(own, 1), _SETTING)
            else:
                step.fix_all_but(own, (0,), "operand", "one value per block of codes")
        step.labels(ORDER)
        why = self._held(step)
        if why and blocks is not None:
            step.fix(b, 1, "fixed-size", why)
        k = step.shape(A)[-1]
        weight: Labels = () if columns is None else (along(columns, 0, 2),)
        if blocks is not None:
            weight = (*weight, along(blocks[np.arange(k) // int(step.attr("block_size"))], 1, 2))
        outer = "abcdefgh"[: len(step.shape(A)) - 1]
        operands = [(step.labels(A), step.shape(A), outer + "k"), (weight, (size, k), "nk")]
        step.set(0, contract(step, operands, outer + "n"))

    @staticmethod
    def _per_block(step: Step, i: int) -> bool:
        """Whether an operand is [N, blocks], neither flat nor packed: its labels say what goes."""
        return len(step.shape(i)) == 2 and (i == SCALES or (i == ZEROS and _plain_zeros(step)))

    def _held(self, step: Step) -> str:
        """Why blocks have to stay; "" where they may go."""
        bits = int(step.attr("bits", 4))
        if bits not in PACKED_BITS:
            return f"codes of {bits} bits are packed along this axis"
        flat = [
            i for i in (SCALES, ZEROS) if step.has(i) and not (len(step.shape(i)) == 2 and self._per_block(step, i))
        ]
        if not all(step.alone(i) for i in flat):
            return "several operators read the scales or zero points of these codes"
        if not step.has(ORDER):
            return ""
        order, k = step.weight(ORDER), step.shape(A)[-1]
        if order is None or not np.array_equal(order, np.arange(k) // int(step.attr("block_size"))):
            return "scales are in another order than the codes of this axis"
        return ""

    def rewrite(self, cut: Cut) -> None:
        """``N`` and ``K`` follow the codes; what is flat or packed is laid out anew where blocks are gone."""
        if cut.shape(B)[0] != cut.attr("N"):
            cut.set_attr("N", cut.shape(B)[0])
        keep, rows = cut.keep(cut.node.inputs[B], 1), cut.keep(cut.node.inputs[B], 0)
        if keep is None:
            return
        size, block, bits = cut.shape(A)[-1], int(cut.attr("block_size")), int(cut.attr("bits", 4))
        cut.set_attr("K", size)
        n, blocks = cut.shape(B)[:2]
        if rows is None:
            rows = np.ones(cut.before.shape(B)[0], bool)
        for i in (SCALES, ZEROS):
            if cut.before.has(i) and not self._per_block(cut.before, i):
                packed = bits if i == ZEROS and not _plain_zeros(cut.before) else 0
                width = -(-blocks * packed // 8) if packed else blocks
                shape = (n, width) if len(cut.before.shape(i)) == 2 else (n * width,)
                cut.derive(i, shape, partial(_chosen, rows=rows, blocks=keep, bits=packed))
        if cut.before.has(ORDER):
            cut.derive(ORDER, (size,), lambda value: (np.arange(size) // block).astype(value.dtype))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """A is summed over its last axis."""
        return [(A, (len(step.shape(A)) - 1,))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """A's last axis becomes N."""
        a = shapes[A]
        return None if a is None else [(*a[:-1], int(node.attrs["N"]))]

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """The product's size times K."""
        return 0 if shapes[A] is None or out is None else prod(out) * shapes[A][-1]

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """[N, blocks, block_size]; positions behind K are 0."""
        bits, size = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
        scale, given = read(SCALES), [len(node.inputs) > at and bool(node.inputs[at]) for at in (ZEROS, ORDER)]
        zero = read(ZEROS) if given[0] else None
        if i != B or scale is None or bits not in PACKED_BITS or (given[0] and zero is None):
            return None
        n, blocks = codes.shape[:2]
        values = unpack(codes, bits, size).astype(np.float32)
        if zero is None:
            offset = np.full((n, blocks), 1 << (bits - 1), np.float32)
        elif zero.dtype == np.uint8:
            offset = unpack(zero.reshape(n, -1), bits, blocks).astype(np.float32)
        else:
            offset = zero.reshape(n, blocks).astype(np.float32)
        scale = scale.reshape(n, blocks).astype(np.float32)
        if not given[1]:
            values = (values - offset[:, :, None]) * scale[:, :, None]
        elif (order := read(ORDER)) is None:
            return None
        else:
            by_position = np.resize(order, blocks * size).reshape(blocks, size)
            values = (values - offset[:, by_position]) * scale[:, by_position]
        values.reshape(n, -1)[:, int(node.attrs["K"]) :] = 0
        return np.asarray(values)

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """A times what the codes stand for."""
        a, b = shapes[A], known(shapes[B])
        if data != A or a is None or b is None or a[-1] is None:
            return None
        return Blocks("abcdefgh"[: len(a) - 1], a[-1], b[0])


def _plain_zeros(step: Step) -> bool:
    """Whether zero points are numbers like the scales, not packed like the codes."""
    weight = step.table.graph.weights.get(step.node.inputs[ZEROS])
    return weight is not None and weight.dtype != np.uint8


def _chosen(value: Array, rows: NDArray[np.bool_], blocks: NDArray[np.bool_], bits: int) -> Array:
    """Settings of the codes that stay, as [N, blocks] or in bytes of packed ones (``bits`` of each, 0: not packed)."""
    each = value.reshape(rows.size, -1)
    if not bits:
        return np.asarray(each[np.ix_(rows, blocks)])
    return pack(unpack(each, bits, blocks.size)[np.ix_(rows, blocks)], bits)


class PackedGather(Rule):
    """GatherBlockQuantized: rows of a table of codes [rows, columns], looked up by index, as numbers.

    Inputs: codes, indices, scales [rows, blocks], zero points. Codes of bytes lie several in one, with zero points that
    do as well; of other types every code is an element. Columns go by whole blocks.
    """

    settings = (2, 3)

    def propagate(self, step: Step) -> None:
        """Columns become the last axis of the output; rows stay."""
        codes, scales = step.labels(0), step.labels(2)
        shape, wide = step.shape(0), step.out_shape()[-1]
        axis, packed = int(step.attr("gather_axis", 0)), int(step.attr("quantize_axis", 1))
        if len(shape) != 2 or axis % 2 != 0 or packed % 2 != 1 or wide % shape[1]:
            return
        for labels in (codes, scales):
            step.fix(labels, 0, "fixed-size", "rows of this table are looked up by index")
        ids, own = step.axis_ids(codes, 1), step.axis_ids(scales, 1)
        block = int(step.attr("block_size", 128))
        if own is None or (self._packed_zeros(step) and not step.alone(3)):
            step.fix(codes, 1, "fixed-size", _STAYS)
        else:
            step.unite(ids, own[np.arange(shape[1]) * (wide // shape[1]) // block], _SETTING)
        if step.has(3):
            zeros = step.labels(3)
            if self._packed_zeros(step):
                step.fix_all_but(zeros, (), "operand", "zero points are packed along this axis")
            else:
                step.fix(zeros, 0, "fixed-size", "rows of this table are looked up by index")
                step.unite(step.axis_ids(zeros, 1), own, _SETTING)
        if ids is not None:
            rank = len(step.out_shape())
            step.set(0, (along(np.repeat(ids, wide // shape[1]), rank - 1, rank),))

    @staticmethod
    def _packed_zeros(step: Step) -> bool:
        """Whether several zero points lie in a byte."""
        return step.has(3) and step.shape(3) != step.shape(2)

    def rewrite(self, cut: Cut) -> None:
        """Zero points that lie in bytes are packed anew."""
        keep = cut.keep(cut.node.inputs[2], 1)
        if keep is None or not self._packed_zeros(cut.before):
            return
        rows, bits = cut.before.shape(3)[0], int(cut.attr("bits", 4))
        shape = (rows, -(-int(keep.sum()) * bits // 8))
        cut.derive(3, shape, partial(_chosen, rows=np.ones(rows, bool), blocks=keep, bits=bits))

    def numbers(self, node: Node, i: int, codes: Array, read: Read) -> Array | None:
        """[rows, columns]; of codes in bytes [rows, bytes, codes in each]."""
        scale, bits = read(2), int(node.attrs.get("bits", 4))
        if i != 0 or codes.ndim != 2 or scale is None or bits not in PACKED_BITS:
            return None
        packed = codes.dtype == np.uint8
        values, zero = unpack(codes, bits) if packed else codes, read(3)
        if packed:
            middle = np.full(scale.shape, 1 << (bits - 1), np.uint8)
            zero = middle if zero is None else unpack(zero, bits, scale.shape[1])
        real = numbers(values, scale, zero, 1, int(node.attrs.get("block_size", 128)))
        return real.reshape(*codes.shape, -1) if packed else real

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None] | None:
        """[*indices, columns], where the number of blocks tells how many codes lie in a byte."""
        codes, indices, scales = shapes[:3]
        size = None if codes is None else codes[-1]
        if codes is None or size is None or indices is None or scales is None:
            return None
        block, each = int(node.attrs.get("block_size", 128)), 8 // int(node.attrs.get("bits", 4))
        fitting = [n for n in (size, size * each) if -(-n // block) == scales[-1]]
        return [(*indices, fitting[0])] if len(fitting) == 1 and len(codes) == 2 else None


register(MS, "MatMulNBits", rule=PackedMatMul())
register(MS, "GatherBlockQuantized", rule=PackedGather())
