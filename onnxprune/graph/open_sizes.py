"""Solve open dimensions from weights and from each other.

Sizes are guessed first. Where two sizes then contradict each other at a node (the channels of an image and those of a
kernel, a mask and the keys that it hides), the open dimension that one of them depends on is changed until they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np

from onnxprune.graph.inference import Infer, probe_at, probe_of
from onnxprune.graph.probes import Dimensions, Key, Sizes
from onnxprune.graph.values import Probe, size_of
from onnxprune.graph.view import Graph, Node

Pair = tuple[int, int]
"""A size and what it has to be."""
Shapes = Sequence[Any]
Known = Callable[[int], "np.ndarray | None"]
Function = Callable[[Node, Shapes, Known], Iterator[Pair]]


def pairs(node: Node, shapes: Shapes, known: Known) -> list[Pair]:
    """Return pairs of sizes that have to be equal at a node, in a fixed order; empty without constraints or facts.

    Args:
        node: a node.
        shapes: shapes of its inputs, None where absent or unknown.
        known: values of its inputs, by position.
    """
    function = _FUNCTIONS.get((node.domain, node.op))
    if function is None:
        return []
    try:
        return [(0, 0) if None in pair else pair for pair in function(node, shapes, known)]
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):  # unknown sizes or forms
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
    """Return pairs of broadcast sizes, from the last axis on; a size of 1 agrees with all."""
    first = shapes[0]
    for other in shapes[1:]:
        size_pairs = []
        for a, b in zip_longest(reversed(first), reversed(other), fillvalue=1):
            yield (a, b) if 1 not in (a, b) else (a, a)
            size_pairs.append(b if a == 1 else a)
        first = size_pairs[::-1]


def _elementwise(*places: int) -> Function:
    def run(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
        if not node.domain and node.version < 8:
            return iter(())
        operand_shapes = (
            [shapes[i] for i in places] if places else [s for s, n in zip(shapes, node.inputs, strict=True) if n]
        )
        return _broadcast(*operand_shapes)

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
    total, known_product = prod(shapes[0]), prod(n for n in target if n != -1)
    yield total, total - total % known_product if -1 in target else known_product


def _expand(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    yield from _broadcast(shapes[0], [int(n) for n in np.ravel(known(1))])  # type: ignore[arg-type]


def _split(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    axis_size = shapes[0][node.attrs.get("axis", 0)]
    sizes = node.attrs.get("split") if node.version < 13 else known(1)
    if sizes is not None:
        yield axis_size, int(np.sum(sizes))
    elif node.version < 18:
        yield axis_size, axis_size - axis_size % len(node.outputs)


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
    """Return pairs of com.microsoft's MultiHeadAttention: caches are [batch, heads, past, head size]."""
    heads, query = node.attrs["num_heads"], shapes[0]
    for cache in shapes[6:8]:
        if cache is not None and len(cache) == 4 and len(query) == 3:
            yield cache[3], query[-1] // heads
            yield cache[1], heads
            yield cache[0], query[0]


def _packed_attention(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    yield shapes[0][-1], shapes[1][0]


def _attention(node: Node, shapes: Shapes, known: Known) -> Iterator[Pair]:
    """Return pairs of ONNX's Attention: caches are [batch, heads, past, head size], keys and values of rank 3 or 4."""
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


_ROUNDS = 24  # limit on the sizes that are solved for, one after the other
_LARGEST = 1 << 15  # largest size tried for an open dimension, unless a user gives one
_Residual = Callable[[int], "int | None"]
_Find = Callable[[_Residual, int, int], "int | None"]
"""(what is between two sizes as a function of an unknown, the unknown now, what is between them now) -> its root."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A node that cannot run at some sizes: ``have`` contradicts ``want``; both 0 where the reason is no pair."""

    node: Node
    place: int = -1
    have: int = 0
    want: int = 0

    def __str__(self) -> str:
        """Return the conflict as a readable sentence."""
        where = f"{self.node.kind} {self.node.label!r}"
        return (
            f"At {where} the sizes {self.have} and {self.want} must agree."
            if self.place >= 0
            else f"Sizes do not fit at {where}."
        )


@dataclass(slots=True)
class Settled:
    """Sizes of open dimensions, the probe inferred from them, and the first remaining contradiction."""

    sizes: dict[Key, int]
    probe: Probe
    conflict: Conflict | None = None


@dataclass(slots=True)
class Settler:
    """Find sizes at which a graph runs.

    Args:
        graph: the model's view.
        dimensions: open dimensions of its inputs.
        infer: callback that returns shapes of operators without an onnx schema.
    """

    graph: Graph
    dimensions: Dimensions
    infer: Infer | None = None
    _ancestors: dict[int, list[Node]] = field(default_factory=dict)

    def settle(self, sizes: Sizes, fixed: Sizes, first: Probe | None = None) -> Settled:
        """Find sizes near the given ones without contradictions, if there are any.

        Args:
            sizes: size of every open dimension.
            fixed: sizes that must not change.
            first: another binding's probe, to save work.
        """
        sizes = self.dimensions.completed(sizes, fixed)
        tried_sizes, solved = set(), set[Key]()
        for _ in range(_ROUNDS):
            probe = probe_at(self.graph, self.dimensions.shapes(sizes), self.infer, first)
            conflict = self._conflict(probe)
            new_sizes = None if conflict is None else self._resolved(conflict, sizes, fixed, solved, probe)
            if new_sizes is None or tuple(new_sizes.values()) in tried_sizes:
                break
            tried_sizes.add(tuple(new_sizes.values()))
            sizes = new_sizes
        return Settled(dict(sizes), probe, conflict)

    def _conflict(self, probe: Probe) -> Conflict | None:
        """Return the first node at which sizes contradict each other."""
        shapes = probe.shapes
        for node in self.graph.steps:
            if node.index in probe.idle:
                continue
            for place, (have, want) in enumerate(self._pairs(node, probe) if self._runs(node, probe) else ()):
                if have != want:
                    return Conflict(node, place, have, want)
            shape = shapes.get(node.outputs[0]) if node.outputs else None
            if shape is None or None in shape:
                continue
            if min(shape, default=0) < 0 or (node.op == "Pad" and not node.domain and _reflects_too_much(node, probe)):
                return Conflict(node)
            if node.op == "Reshape" and not node.domain:
                source = shapes.get(node.inputs[0])
                if source is not None and None not in source and size_of(source) != size_of(shape):
                    return Conflict(node)
        return None

    def _runs(self, node: Node, probe: Probe) -> bool:
        """Return whether a node certainly runs: sizes in a branch that may not run need not fit."""
        if not self.graph.has_bodies:
            return True
        return all(probe.values.get(name) is not None for name, _ in self.graph.conditions(node.index))

    @staticmethod
    def _pairs(node: Node, probe: Probe) -> Sequence[tuple[int, int]]:
        shapes, values, names = probe.shapes, probe.values, node.inputs
        return pairs(
            node,
            [shapes.get(n) if n else None for n in names],
            lambda i: values.get(names[i]) if i < len(names) and names[i] else None,
        )

    def _resolved(
        self, conflict: Conflict, sizes: Sizes, fixed: Sizes, solved: set[Key], probe: Probe
    ) -> dict[Key, int] | None:
        """Return sizes without that contradiction."""
        if conflict.place < 0:
            return None
        difference = conflict.have - conflict.want
        for keys, find in self._unknowns(sizes, fixed, solved):

            def residual(size: int, keys: Sequence[Key] = keys) -> int | None:
                new_sizes = self.dimensions.completed({**sizes, **dict.fromkeys(keys, size)}, fixed)
                return self._residual(conflict, new_sizes, probe)

            new_size = find(residual, sizes[keys[0]], difference)
            if new_size is not None:
                solved.update(keys)
                return self.dimensions.completed({**sizes, **dict.fromkeys(keys, new_size)}, fixed)
        return None

    def _unknowns(self, sizes: Sizes, fixed: Sizes, solved: set[Key]) -> Iterator[tuple[list[Key], _Find]]:
        """Yield dimensions that may be changed, each with a method to find its size.

        The order is: a dimension that is itself one of the two sizes (those in the fewest inputs first), extents of a
        map together, any dimension that the contradiction depends on.
        """
        dimensions = self.dimensions
        free = [k for k in dimensions.places if k not in fixed and not dimensions.is_sum(k, sizes)]
        order = {key: (key in solved, len(dimensions.places[key]), -k) for k, key in enumerate(free)}
        single = sorted(free, key=order.__getitem__)
        yield from (([key], _solve_directly) for key in single)
        for keys in dimensions.extents():
            extents = [key for key in keys if key in free and key not in solved]
            if len(extents) > 1:
                yield extents, _find_root
        yield from (([key], _find_root) for key in single)

    def _residual(self, conflict: Conflict, sizes: Sizes, base: Probe) -> int | None:
        """Return the difference of the two contradicting sizes at other sizes of the inputs; None where unknown."""
        bound, node = self.dimensions.shapes(sizes), conflict.node
        probe = None
        if not self.graph.has_bodies:
            probe = probe_of(self.graph, self._before(node), bound, base, self.infer)
        size_pairs = [] if probe is None else self._pairs(node, probe)
        if not size_pairs:
            size_pairs = self._pairs(node, probe_at(self.graph, bound, self.infer))
        if len(size_pairs) <= conflict.place:
            return None
        have, want = size_pairs[conflict.place]
        return None if have is None or want is None else have - want

    def _before(self, node: Node) -> list[Node]:
        """Return the nodes that a node depends on, in graph order."""
        known = self._ancestors.get(node.index)
        if known is None:
            nodes: dict[int, Node] = {}
            queue = [node]
            while queue:
                for name in queue.pop().inputs:
                    maker = self.graph.producer.get(name)
                    if maker is not None and name not in self.graph.weights and maker.index not in nodes:
                        nodes[maker.index] = maker
                        queue.append(maker)
            known = self._ancestors[node.index] = [nodes[k] for k in sorted(nodes)]
        return known


def _solve_directly(residual: _Residual, current_size: int, difference: int) -> int | None:
    """Return the required size, where the unknown is itself one of the two sizes that have to agree."""
    next_difference = residual(current_size + 1)
    if next_difference is None or abs(next_difference - difference) != 1:
        return None
    size = current_size - difference * (next_difference - difference)
    return size if 1 <= size <= _LARGEST and residual(size) == 0 else None


def _find_root(residual: _Residual, current_size: int, difference: int) -> int | None:
    """Return the smallest size near which a residual vanishes, None where it does not depend on the size or never does.

    Residuals are mostly linear (two numbers of channels) or rise with steps (positions of a map of patches).
    """
    other = 2 * current_size
    other_difference = residual(other)
    if other_difference is None or other_difference == difference:
        return None
    estimate = current_size - difference * (other - current_size) / (other_difference - difference)
    for size in (int(estimate), int(estimate) + 1):
        if 1 <= size <= _LARGEST and residual(size) == 0:
            return size
    increasing = other_difference > difference
    low, high = (0, current_size) if (difference > 0) == increasing else (current_size, other)
    while high < _LARGEST and low == current_size and _is_too_small(residual(high), increasing):
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if _is_too_small(residual(middle), increasing):
            low = middle
        else:
            high = middle
    return high if 1 <= high <= _LARGEST and residual(high) == 0 else None


def _is_too_small(value: int | None, increasing: bool) -> bool:
    """Return whether a size is too small for a residual to vanish, or too small to run at all."""
    return value is None or (value < 0 if increasing else value > 0)


def _reflects_too_much(node: Node, probe: Probe) -> bool:
    shape = probe.shapes.get(node.inputs[0])
    if node.attrs.get("mode", "constant") != "reflect" or shape is None or len(node.inputs) > 3:
        return False
    value = probe.values.get(node.inputs[1]) if len(node.inputs) > 1 else None
    pads = node.attrs.get("pads", []) if value is None else value.ravel().tolist()
    return len(pads) == 2 * len(shape) and any(
        n is not None and p >= n for p, n in zip(pads, (*shape, *shape), strict=True)
    )
