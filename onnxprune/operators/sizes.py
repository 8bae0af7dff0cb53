"""Output shapes for operators that onnx has no inference for: broadcasting, products, sliding windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from onnxprune.labels.algebra import Shape

if TYPE_CHECKING:
    from onnxprune.graph.view import Node


def broadcast_shapes(shapes: Sequence[Shape | None]) -> Shape | None:
    """Broadcast shapes by numpy's rules; a known size other than 1 takes precedence over one that depends on data.

    Returns:
        The shape; None where a shape is unknown, or where shapes do not fit.
    """
    if not shapes or any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    rank = max(len(s) for s in known)
    result: list[int | None] = []
    for axis in range(rank):
        sizes = [s[axis - rank + len(s)] for s in known if axis - rank + len(s) >= 0]
        fixed = [n for n in sizes if n is not None and n != 1]
        if len(set(fixed)) > 1:
            return None
        result.append(fixed[0] if fixed else (None if None in sizes else 1))
    return tuple(result)


def broadcast_pairs(*shapes: Any) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of sizes that broadcast, from the last axis on; a size of 1 agrees with all."""
    first = shapes[0]
    for other in shapes[1:]:
        size_pairs = []
        for a, b in zip_longest(reversed(first), reversed(other), fillvalue=1):
            yield (a, b) if 1 not in (a, b) else (a, a)
            size_pairs.append(b if a == 1 else a)
        first = size_pairs[::-1]


def matmul_pairs(a: Sequence[Any], b: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of sizes of two operands of a MatMul: the summed axes, then those of the batch."""
    yield a[-1], b[-2] if len(b) > 1 else b[-1]
    yield from broadcast_pairs(a[:-2], b[:-2])


def gemm_pairs(node: Node, a: Sequence[Any], b: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the summed sizes of two matrices, of which a Gemm may transpose either."""
    yield a[0 if node.attrs.get("transA", 0) else 1], b[1 if node.attrs.get("transB", 0) else 0]


def window_sizes(sizes: Shape, kernel: Shape, attrs: Mapping[str, Any]) -> Shape:
    """Return the spatial sizes after a convolution or pooling window slides over ``sizes``, by ONNX's attributes."""
    rank = len(sizes)
    strides, dilations = attrs.get("strides") or [1] * rank, attrs.get("dilations") or [1] * rank
    pads, mode = attrs.get("pads") or [0] * (2 * rank), attrs.get("auto_pad", "NOTSET")
    result: list[int | None] = []
    for i, (n, k, stride) in enumerate(zip(sizes, kernel, strides, strict=True)):
        if n is None or k is None:
            result.append(None)
        elif mode.startswith("SAME"):
            result.append(-(-n // stride))
        else:
            padding = pads[i] + pads[i + rank] if mode == "NOTSET" else 0
            span = n + padding - dilations[i] * (k - 1) - 1
            result.append((-(-span // stride) if attrs.get("ceil_mode", 0) else span // stride) + 1)
    return tuple(result)


def product(a: Shape | None, b: Shape | None, terms: tuple[str, str, str]) -> Shape | None:
    """Return the shape of ``einsum`` over two operands with subscripts (left, right, output); batch letters broadcast.

    None where a shape is not known, or where they do not fit.
    """
    if a is None or b is None:
        return None
    sizes: dict[str, int | None] = {}
    for letters, shape in zip(terms, (a, b), strict=False):
        for letter, n in zip(letters, shape, strict=True):
            before = sizes.get(letter, 1)
            spreads = letter in terms[2] and 1 in (before, n)
            if letter in sizes and None not in (before, n) and before != n and not spreads:
                return None
            if before == 1:
                sizes[letter] = n
    return tuple(sizes[c] for c in terms[2])
