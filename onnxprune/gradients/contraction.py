"""Gradients of contractions: matrix products and convolutions of any rank, group, stride, dilation and padding."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from onnxprune.gradients.tape import NoGradient, Reverse, Tape
from onnxprune.operators.registry import register_gradient

# -- matrix products ---------------------------------------------------------------------------------------------------


@register_gradient("", "MatMul")
def matmul(r: Reverse) -> None:
    """DA = dY B^T and dB = A^T dY; vectors are matrices with one row or column."""
    t, (a, b), (one, two) = r.tape, r.node.inputs, (r.shape(0), r.shape(1))
    rows, columns = (() if len(one) == 1 else one[-2:-1]), (() if len(two) == 1 else two[-1:])
    lead = t.shape(r.y)[: len(t.shape(r.y)) - len(rows) - len(columns)]
    dy = t.reshape(r.dy, (*lead, *(rows or (1,)), *(columns or (1,))))
    a, b = t.reshape(a, one if rows else (1, *one)), t.reshape(b, two if columns else (*two, 1))
    if r.wants(0):
        r.send(0, _shaped(t, t.matmul(dy, t.swap(b)), a, one))
    if r.wants(1):
        if len(two) == 2:  # one product in place of a sum of many
            a, dy = (t.reshape(x, (prod(t.shape(x)[:-1]), t.shape(x)[-1])) for x in (a, dy))
        r.send(1, _shaped(t, t.matmul(t.swap(a), dy), b, two))


def _shaped(t: Tape, gradient: str, operand: str, shape: Sequence[int]) -> str:
    """Return a gradient in the shape that an operand had before it became a matrix."""
    return t.reshape(t.unbroadcast(gradient, t.shape(operand)), shape)


@register_gradient("", "Gemm")
def gemm(r: Reverse) -> None:
    """Y = alpha A B + beta C, where A and B may be transposed."""
    t, dy, (a, b) = r.tape, r.dy, r.node.inputs[:2]
    alpha, flip_a, flip_b = r.attr("alpha", 1.0), int(r.attr("transA", 0)), int(r.attr("transB", 0))

    def product(i: int, one: str, two: str, left: int, right: int) -> None:
        if r.wants(i):
            r.send(i, t.emit("Gemm", [one, two], r.shape(i), alpha=alpha, transA=left, transB=right))

    product(0, *((b, dy, flip_b, 1) if flip_a else (dy, b, 0, 1 - flip_b)))
    product(1, *((dy, a, 1, flip_a) if flip_b else (a, dy, 1 - flip_a, 0)))
    if r.wants(2):
        r.send(2, t.scale(dy, r.attr("beta", 1.0)))


@register_gradient("", "Einsum")
def einsum(r: Reverse) -> None:
    """Einsum of the gradient with the other operands, for equations without repeated letters in one operand."""
    t = r.tape
    equation = r.attr("equation", "").replace(" ", "")
    if "..." in equation:
        raise NoGradient("has an equation with an ellipsis")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "")
        out = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(term)) < len(term) for term in (*terms, out)):
        raise NoGradient("has an equation with a letter twice in one operand")
    size = {c: n for i, term in enumerate(terms) for c, n in zip(term, r.shape(i), strict=True)}
    for i, term in enumerate(terms):
        if not r.wants(i):
            continue
        others = [k for k in range(len(terms)) if k != i]
        known = set(out).union(*(terms[k] for k in others))
        reached = "".join(c for c in term if c in known)
        sides = ",".join([out, *(terms[k] for k in others)])
        operands = [r.dy, *(r.node.inputs[k] for k in others)]
        value = t.emit("Einsum", operands, [size[c] for c in reached], equation=f"{sides}->{reached}")
        value = t.reshape(value, [size[c] if c in known else 1 for c in term])
        r.send(i, t.broadcast(value, r.shape(i)))


# -- convolutions ------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Geometry of a convolution: sizes along the spatial axes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    group: int

    def reach(self, k: int, outputs: int) -> int:
        """Return the positions along spatial axis ``k`` that so many outputs read, padding included."""
        return (outputs - 1) * self.strides[k] + (self.kernel[k] - 1) * self.dilations[k] + 1

    @property
    def is_pointwise(self) -> bool:
        """Whether every output reads one position, its own."""
        return prod(self.kernel) == 1 and set(self.strides) == {1} and not any((*self.before, *self.after))


def window_of(r: Reverse, narrow: Sequence[int], wide: Sequence[int], kernel: Sequence[int]) -> Window:
    """Return the geometry of Conv or ConvTranspose.

    Args:
        r: the node.
        narrow: spatial shape of the side where the kernel's steps are counted: the output of Conv.
        wide: spatial shape of the other side.
        kernel: spatial shape of the kernel.
    """
    rank = len(kernel)
    strides, dilations = tuple(r.attr("strides", [1] * rank)), tuple(r.attr("dilations", [1] * rank))
    pads = list(r.attr("pads", [0] * 2 * rank))
    auto = r.attr("auto_pad", "NOTSET")
    geometry = Window(tuple(kernel), strides, dilations, (), (), int(r.attr("group", 1)))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, geometry.reach(k, narrow[k]) - wide[k]) for k in range(rank)]
        first = [n // 2 if auto == "SAME_UPPER" else n - n // 2 for n in total]
        pads = [*first, *(n - f for n, f in zip(total, first, strict=True))]
    elif auto == "VALID":
        pads = [0] * 2 * rank
    return geometry._replace(before=tuple(pads[:rank]), after=tuple(pads[rank:]))


@register_gradient("", "Conv")
def convolution(r: Reverse) -> None:
    """ConvTranspose for the input; for the weight one product over all images and positions per kernel offset."""
    t, dy, weight = r.tape, r.dy, r.node.inputs[1]
    shape, kernel, out = r.shape(0), r.shape(1)[2:], t.shape(r.y)
    spatial = range(2, 2 + len(kernel))
    geometry = window_of(r, out[2:], shape[2:], kernel)
    if r.wants(2):
        r.send(2, t.sum(dy, [0, *spatial]))
    if r.wants(0):
        r.send(0, _spread(t, dy, weight, shape, geometry))
    if r.wants(1):
        padded = t.pad(r.x, (0, 0, *geometry.before), (0, 0, *geometry.after))
        per_group = shape[1] // geometry.group, out[1] // geometry.group
        if per_group == (1, 1) and len(kernel) <= 2:
            r.send(1, t.reshape(_depthwise(t, padded, dy, geometry), r.shape(1)))
        else:
            r.send(1, _correlate(t, dy, padded, geometry))


def _spread(t: Tape, dy: str, weight: str, shape: Sequence[int], w: Window) -> str:
    """Return the transposed convolution that takes the gradient of Conv's output to its input of this shape."""
    rows, out = shape[2:], t.shape(dy)
    if w.is_pointwise and w.group == 1:
        flat = t.reshape(dy, (out[0], out[1], prod(out[2:])))
        matrix = t.transpose(t.reshape(weight, t.shape(weight)[:2]), (1, 0))
        return t.reshape(t.matmul(matrix, flat), shape)
    # With output_shape in place of output_padding runtimes derive the pads anew, and shift unequal ones.
    extra = [rows[k] - w.reach(k, out[2 + k]) + w.before[k] + w.after[k] for k in range(len(rows))]
    # Positions that no window reads can be more than a runtime adds.
    short = [max(0, n - max(s, d) + 1) for n, s, d in zip(extra, w.strides, w.dilations, strict=True)]
    extra = [n - s for n, s in zip(extra, short, strict=True)]
    value = t.emit(
        "ConvTranspose",
        [dy, weight],
        (*shape[:2], *(n - s for n, s in zip(rows, short, strict=True))),
        kernel_shape=w.kernel,
        pads=(*w.before, *w.after),
        strides=w.strides,
        dilations=w.dilations,
        group=w.group,
        output_padding=extra,
    )
    return t.pad(value, [0] * len(shape), [0, 0, *short])


def _shifted(t: Tape, x: str, offset: Sequence[int], count: Sequence[int], w: Window) -> str:
    """Return the positions that a kernel offset reads, for this many outputs along every spatial axis."""
    starts = [o * d for o, d in zip(offset, w.dilations, strict=True)]
    ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, count, w.strides, strict=True)]
    return t.slice(x, starts, ends, range(2, 2 + len(count)), w.strides)


def _correlate(t: Tape, one: str, wide: str, w: Window) -> str:
    """Return sum over images and positions of one[n, a, p] * wide[n, b, p * stride + k * dilation], as [a, b, k].

    Args:
        t: the tape.
        one: tensor [images, group * a, *positions].
        wide: tensor [images, group * b, *positions], padded.
        w: the geometry.
    """
    images, rows, *count = t.shape(one)
    columns, group = t.shape(wide)[1], w.group
    size = prod(count)

    def matrices(x: str, channels: int) -> str:
        lead = (images, group, channels // group) if group > 1 else (images, channels)
        return t.reshape(x, (*lead, size))

    one_rows, parts = matrices(one, rows), []
    for offset in np.ndindex(*w.kernel):
        right = matrices(_shifted(t, wide, offset, count, w), columns)
        parts.append(t.reshape(t.sum(t.matmul(one_rows, t.swap(right)), [0]), (rows, columns // group, 1)))
    return t.reshape(t.concat(parts, 2), (rows, columns // group, *w.kernel))


_BLOCK = 16  # columns of the output per product of a depthwise convolution


def _depthwise(t: Tape, padded: str, dy: str, w: Window) -> str:
    """Return the weight gradient of a convolution with one channel per group, [channels, 1, rows, columns].

    Per channel and kernel row, one product over images and rows gives all pairs of output and input columns in a
    block; the kernel's columns are diagonals of it, picked by a constant matrix of 0 and 1.
    """
    if len(w.kernel) == 1:
        one = Window((1, *w.kernel), (1, *w.strides), (1, *w.dilations), (), (), w.group)
        images, channels, size = t.shape(padded)
        rows = t.reshape(padded, (images, channels, 1, size)), t.reshape(dy, (*t.shape(dy)[:2], 1, t.shape(dy)[2]))
        return _depthwise(t, *rows, one)
    images, channels, height, width = t.shape(dy)
    step, gap = w.strides[1], w.dilations[1]
    blocks = -(-width // _BLOCK) if width > 2 * _BLOCK else 1
    wide = -(-width // blocks)
    span = (wide - 1) * step + (w.kernel[1] - 1) * gap + 1
    dy = t.pad(dy, [0] * 4, [0, 0, 0, blocks * wide - width])
    missing = max(0, (blocks - 1) * wide * step + span - t.shape(padded)[3])
    data, grads = (t.transpose(x, (1, 0, 2, 3)) for x in (t.pad(padded, [0] * 4, [0, 0, 0, missing]), dy))
    total = ""
    for b in range(blocks):
        columns = t.slice(grads, [b * wide], [(b + 1) * wide], [3])
        columns = t.swap(t.reshape(columns, (channels, images * height, wide)))
        parts = []
        for row in range(w.kernel[0]):
            first, start = row * w.dilations[0], b * wide * step
            ends = [first + (height - 1) * w.strides[0] + 1, start + span]
            right = t.slice(data, [first, start], ends, [2, 3], [w.strides[0], 1])
            product = t.matmul(columns, t.reshape(right, (channels, images * height, span)))
            parts.append(t.reshape(product, (channels, 1, wide * span)))
        block = t.concat(parts, 1)
        total = t.add(total, block) if total else block
    pick = np.zeros((wide, span, w.kernel[1]), t.kinds[dy])
    for k in range(w.kernel[1]):
        pick[np.arange(wide), np.arange(wide) * step + k * gap, k] = 1
    value = t.matmul(total, t.constant(pick.reshape(wide * span, w.kernel[1])))
    return t.reshape(value, (channels, 1, *w.kernel))


@register_gradient("", "ConvTranspose")
def transposed_convolution(r: Reverse) -> None:
    """Conv for the input; the weight as for Conv, with input and output exchanged."""
    t, weight = r.tape, r.node.inputs[1]
    shape, out, kernel = r.shape(0), t.shape(r.y), r.shape(1)[2:]
    spatial = range(2, 2 + len(kernel))
    w = _transposed_window(r, shape[2:], out[2:], kernel)
    if r.wants(2):
        r.send(2, t.sum(r.dy, [0, *spatial]))
    padded = t.pad(r.dy, (0, 0, *w.before), (0, 0, *w.after))
    # Positions that output_padding added lie behind the last window; missing ones are 0.
    extra = [w.reach(k, shape[2 + k]) - t.shape(padded)[2 + k] for k in range(len(kernel))]
    padded = t.pad(padded, (0, 0, *[0] * len(kernel)), (0, 0, *extra))
    if r.wants(0):
        settings = {"strides": w.strides, "dilations": w.dilations, "group": w.group}
        r.send(0, t.emit("Conv", [padded, weight], shape, None, "", **settings))
    if r.wants(1):
        r.send(1, _correlate(t, r.x, padded, w))


def _transposed_window(r: Reverse, narrow: Sequence[int], wide: Sequence[int], kernel: Sequence[int]) -> Window:
    """Return the geometry of ConvTranspose, with the pads that its output shape implies."""
    w = window_of(r, narrow, wide, kernel)
    extra = r.attr("output_padding", [0] * len(kernel))
    auto = r.attr("auto_pad", "NOTSET")
    if "output_shape" in r.node.attrs or auto.startswith("SAME"):
        total = [w.reach(k, narrow[k]) + extra[k] - wide[k] for k in range(len(kernel))]
        if min(total) < 0:
            raise NoGradient("has an output shape beyond its windows")
        first = [n // 2 if auto == "SAME_UPPER" else n - n // 2 for n in total]
        w = w._replace(before=tuple(first), after=tuple(n - f for n, f in zip(total, first, strict=True)))
    return w
