"""Sizes that have to agree at a node: an operator's contract as pairs of numbers, for models whose inputs are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np

from onnxprune.graph.view import Node

Pair = tuple[int, int]
"""A size and what it has to be."""
Shapes = Sequence[Any]
Known = Callable[[int], "np.ndarray | None"]
Function = Callable[[Node, Shapes, Known], Iterator[Pair]]


def pairs(node: Node, shapes: Shapes, known: Known) -> list[Pair]:
    """What has to be equal at a node, always in the same order; empty where nothing is asked or known.

    Args:
        node: a node. shapes: of its inputs, None where absent or unknown. known: values of its inputs, by position.
    """
    function = _FUNCTIONS.get((node.domain, node.op))
    if function is None:
        return []
    try:
        return [(0, 0) if None in pair else pair for pair in function(node, shapes, known)]
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):  # sizes or forms that are not known
        return []


def _conv(data: int, weight: int, axis: int = 1) -> Function:
    def run(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
        yield shapes[data][axis], shapes[weight][1] * node.attrs.get("group", 1)

    return run


def _conv_transpose(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    yield shapes[0][1], shapes[1][0]


def _matmul(left: int, right: int) -> Function:
    def run(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
        a, b = list(shapes[left]), list(shapes[right])
        if node.domain and node.attrs.get("transA", 0):
            a[-2:] = a[:-3:-1]
        if node.domain and node.attrs.get("transB", 0):
            b[-2:] = b[:-3:-1]
        yield a[-1], b[-2] if len(b) > 1 else b[-1]
        yield from _broadcast(a[:-2], b[:-2])

    return run


def _gemm(left: int, right: int) -> Function:
    def run(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
        a, b = shapes[left], shapes[right]
        yield a[0 if node.attrs.get("transA", 0) else 1], b[1 if node.attrs.get("transB", 0) else 0]

    return run


def _packed_matmul(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    yield shapes[0][-1], node.attrs["K"]


def _recurrent(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    data, weight = shapes[0], shapes[1]
    if len(data) != 3:
        return
    batch = 0 if node.attrs.get("layout", 0) else 1
    yield data[2], weight[2]
    for i in (5, 6) if node.op == "LSTM" else (5,):
        state = shapes[i] if i < len(shapes) else None
        if state is not None:
            yield state[2], shapes[2][2]
            yield state[batch], data[batch]
            yield state[1 - batch], weight[0]


def _normalized(data: int = 0, scale: int = 1) -> Function:
    def run(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
        axis = node.attrs.get("axis", -1)
        axis = axis + len(shapes[data]) if axis < 0 else axis
        yield from _broadcast(shapes[data][axis:], shapes[scale])

    return run


def _skip_normalized(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    yield shapes[0][-1], shapes[2][-1]
    yield from _broadcast(shapes[0], shapes[1])


def _channels(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    if node.op != "GroupNormalization" or node.version >= 21:
        yield shapes[0][1], shapes[1][0]


def _broadcast(*shapes: Any) -> Iterator[Pair]:
    """Pairs of what meets, from the last axis on; a size of 1 agrees with all."""
    first = shapes[0]
    for other in shapes[1:]:
        joined = []
        for a, b in zip_longest(reversed(first), reversed(other), fillvalue=1):
            yield (a, b) if 1 not in (a, b) else (a, a)
            joined.append(b if a == 1 else a)
        first = joined[::-1]


def _elementwise(*places: int) -> Function:
    def run(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
        if not node.domain and node.version < 8:
            return iter(())
        chosen = [shapes[i] for i in places] if places else [s for s, n in zip(shapes, node.inputs, strict=True) if n]
        return _broadcast(*chosen)

    return run


def _concat(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    axis = node.attrs.get("axis", 1) % len(shapes[0])
    for shape in shapes[1:]:
        for a, (one, other) in enumerate(zip(shapes[0], shape, strict=True)):
            if a != axis:
                yield one, other


def _reshape(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    value = known(1)
    target = node.attrs["shape"] if node.version < 5 else [int(n) for n in np.ravel(value)]  # type: ignore[arg-type]
    if not node.attrs.get("allowzero", 0):
        target = [shapes[0][i] if n == 0 else n for i, n in enumerate(target)]
    total, rest = prod(shapes[0]), prod(n for n in target if n != -1)
    yield total, total - total % rest if -1 in target else rest


def _expand(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    yield from _broadcast(shapes[0], [int(n) for n in np.ravel(known(1))])  # type: ignore[arg-type]


def _split(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    whole = shapes[0][node.attrs.get("axis", 0)]
    sizes = node.attrs.get("split") if node.version < 13 else known(1)
    if sizes is not None:
        yield whole, int(np.sum(sizes))
    elif node.version < 18:
        yield whole, whole - whole % len(node.outputs)


def _squeeze(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    axes = node.attrs.get("axes") if node.version < 13 else known(1)
    for axis in () if axes is None else np.ravel(axes):
        yield shapes[0][int(axis)], 1


def _einsum(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    terms = node.attrs["equation"].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if "." in term:
            return
        for letter, n in zip(term, shape, strict=True):
            yield (n, sizes[letter]) if 1 not in (n, sizes.setdefault(letter, n)) else (n, n)


def _grouped_attention(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    heads, shared = node.attrs["num_heads"], node.attrs["kv_num_heads"]
    query, key, past = shapes[0], shapes[1], (*shapes[3:5], None, None)[:2]
    size = query[-1] // heads if key is not None else query[-1] // (heads + 2 * shared)
    for cache in past:
        if cache is not None:
            yield cache[3], size
            yield cache[1], shared
            yield cache[0], query[0]
    if past[0] is not None and past[1] is not None:
        yield past[0][2], past[1][2]
    total = known(6)
    if total is not None and query[0] > 1 and query[1] > 1:
        yield int(total.ravel()[0]), query[1]  # onnxruntime: several samples of several positions have no past
    lengths = shapes[5]
    if lengths is not None:
        yield prod(lengths), query[0]


def _heads_attention(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    """com.microsoft's MultiHeadAttention: caches are [batch, heads, past, head size]."""
    heads, query = node.attrs["num_heads"], shapes[0]
    for cache in shapes[6:8]:
        if cache is not None and len(cache) == 4 and len(query) == 3:
            yield cache[3], query[-1] // heads
            yield cache[1], heads
            yield cache[0], query[0]


def _packed_attention(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    yield shapes[0][-1], shapes[1][0]


def _attention(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    """ONNX's Attention: caches are [batch, heads, past, head size], keys and values of rank 3 or 4."""
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
        yield from _broadcast(mask[-1:], [past + key[-2]])
        yield from _broadcast(mask[-2:-1], [query[-2]])


_JOINED = """Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
Mul Or Pow PRelu Sub Sum Where Xor""".split()
_MICROSOFT: dict[str, Function] = {
    "FusedConv": _conv(0, 1),
    "NhwcConv": _conv(0, 1, -1),
    "NhwcFusedConv": _conv(0, 1, -1),
    "QLinearConv": _conv(0, 3),
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul", "FusedMatMulActivation"), _matmul(0, 1)),
    **dict.fromkeys(
        ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger16", "GemmFastGelu"), _matmul(0, 1)
    ),
    **dict.fromkeys(("MatMulNBits", "MatMulBnb4", "MatMulFpQ4"), _packed_matmul),
    "FusedGemm": _gemm(0, 1),
    "QGemm": _gemm(0, 3),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _elementwise(0, 3)),
    **dict.fromkeys(("BiasGelu", "FastGelu", "BiasAdd"), _elementwise(0, 1)),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_normalized),
    "GroupQueryAttention": _grouped_attention,
    "MultiHeadAttention": _heads_attention,
    **dict.fromkeys(("Attention", "QAttention"), _packed_attention),
    "DynamicQuantizeLSTM": lambda node, shapes, known: iter([(shapes[0][2], shapes[1][1])]),
}
_STANDARD: dict[str, Function] = {
    **dict.fromkeys(("Conv", "ConvInteger", "DeformConv"), _conv(0, 1)),
    "QLinearConv": _conv(0, 3),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("MatMul", "MatMulInteger"), _matmul(0, 1)),
    "QLinearMatMul": _matmul(0, 3),
    "Gemm": _gemm(0, 1),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"), _normalized()),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "GroupNormalization"), _channels),
    **dict.fromkeys(_JOINED, _elementwise()),
    "Concat": _concat,
    "Reshape": _reshape,
    "Expand": _expand,
    "Split": _split,
    "Squeeze": _squeeze,
    "Einsum": _einsum,
    "Attention": _attention,
}
_FUNCTIONS: dict[tuple[str, str], Function] = {
    **{("", op): function for op, function in _STANDARD.items()},
    **{("com.microsoft", op): function for op, function in (*_STANDARD.items(), *_MICROSOFT.items())},
}
