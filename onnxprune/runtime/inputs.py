"""Inputs for a model: sizes for its dynamic dimensions, seeded synthetic arrays, and (see ``data``) the user's own."""

from __future__ import annotations

import ast
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, nearest
from onnxprune.runtime.data import load_data
from onnxprune.runtime.sessions import Array, Feed, InputSpec

__all__ = ["bind_shapes", "load_data", "synthetic"]

_IMAGE_SIZE = 224  # what classifiers of photographs are exported with
_MAP_SIZE = 64  # for other maps: large enough to survive five halvings
_WORDS = ("the", "small", "graph", "keeps", "its", "words", "in", "order")
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def bind_shapes(
    specs: Sequence[InputSpec], *, batch: int, sequence: int, overrides: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """A full shape for every input, the same size wherever the same dynamic dimension is named.

    Sizes come, in this order, from ``overrides`` (whole shapes by input name; they bind the names they meet for the
    other inputs too), from what a dimension's name says (batch, sequence, sums of other names), from its place: a
    leading one is ``batch``, later ones are ``sequence`` in inputs of rank 2 and 3 and a map's extent (224 for images
    of 1, 3 or 4 channels, else 64) in inputs of rank 4 and more.

    Raises:
        UsageError: an override for an unknown input, of a wrong rank, with a size below 1, against a static dimension,
            or two overrides that give one dimension two sizes.
    """
    by_name = {spec.name: spec for spec in specs}
    bound: dict[str, int] = {}
    for name, sizes in overrides.items():
        if name not in by_name:
            raise UsageError(f"input shape for {name!r}: the model has no such input", hint=nearest(name, by_name))
        _bind_override(by_name[name], [int(size) for size in sizes], bound)
    free = [spec for spec in specs if spec.name not in overrides]
    # sums such as ``past + length`` come last, when the names in them have sizes
    for formulas in (False, True):
        for spec in free:
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, str) and dim not in bound and (_formula(dim) is not None) == formulas:
                    value = _evaluate(_formula(dim), bound)
                    bound[dim] = value if value is not None and value > 0 else _guess(spec, axis, batch, sequence)
    shapes = {name: tuple(int(size) for size in sizes) for name, sizes in overrides.items()}
    for spec in free:
        known = [bound[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        guesses = (_guess(spec, axis, batch, sequence) for axis in range(len(known)))
        shapes[spec.name] = tuple(guess if size is None else size for size, guess in zip(known, guesses, strict=True))
    return {spec.name: shapes[spec.name] for spec in specs}


def _bind_override(spec: InputSpec, sizes: list[int], bound: dict[str, int]) -> None:
    """Check one override against the input's own shape and bind the dimension names it meets."""
    given, declared = ",".join(map(str, sizes)), show(spec.shape)
    # the empty shape may be an unknown rank, which allows everything
    if spec.shape and len(sizes) != len(spec.shape):
        raise UsageError(
            f"input shape {spec.name}={given} has {len(sizes)} sizes; the input has {len(spec.shape)}: {declared}"
        )
    for axis, size in enumerate(sizes):
        dim = spec.shape[axis] if spec.shape else None
        if size < 1:
            raise UsageError(f"input shape {spec.name}={given}: sizes must be 1 or more, axis {axis} is {size}")
        if isinstance(dim, int) and dim != size:
            raise UsageError(
                f"input shape {spec.name}={given}: axis {axis} is fixed to {dim} in the model, not {size}",
                hint=f"The input is {declared}; only its named or '?' dimensions can be chosen.",
            )
        if isinstance(dim, str) and bound.setdefault(dim, size) != size:
            raise UsageError(f"input shape {spec.name}={given}: {dim!r} is {size} here, {bound[dim]} in another shape")


def _formula(dim: str) -> ast.expr | None:
    """The arithmetic in a dimension's name, such as ``past_length + length``; None when it is a plain name."""
    try:
        tree = ast.parse(dim, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if isinstance(tree, ast.BinOp) else None


def _evaluate(tree: ast.expr | None, bound: Mapping[str, int]) -> int | None:
    """The value of a dimension's arithmetic, None when a name is unbound or an operator is not one of + - * //."""
    if isinstance(tree, ast.Name):
        return bound.get(tree.id)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.BinOp) and (apply := _ARITHMETIC.get(type(tree.op))):
        left, right = _evaluate(tree.left, bound), _evaluate(tree.right, bound)
        if left is None or right is None or (isinstance(tree.op, ast.FloorDiv) and right == 0):
            return None
        return apply(left, right)
    return None


def _guess(spec: InputSpec, axis: int, batch: int, sequence: int) -> int:
    """A size for a dynamic dimension from its name and its place."""
    dim, rank = spec.shape[axis], len(spec.shape)
    name = dim.lower() if isinstance(dim, str) else ""
    if "batch" in name:
        return batch
    if "seq" in name or "token" in name:
        return sequence
    if axis == 0:
        return batch
    return sequence if rank <= 3 else _extent(spec)


def _extent(spec: InputSpec) -> int:
    """The extent of a map: a fixed one of the same input, an image's when the channels are, else a small one."""
    rank = len(spec.shape)
    channel_axis = next((a for a in (1, rank - 1) if spec.shape[a] in (1, 3, 4)), None)
    extents = [d for a, d in enumerate(spec.shape) if a not in (0, 1, channel_axis) and isinstance(d, int) and d > 1]
    if extents:
        return extents[0]
    return _IMAGE_SIZE if rank == 4 and channel_axis is not None else _MAP_SIZE


def show(shape: Sequence[int | str | None]) -> str:
    """A shape as people write it: ``[N, 3, ?, ?]``."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def synthetic(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]],
    *,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    seed: int = 0,
) -> Feed:
    """Seeded inputs of the given shapes, each drawn from its own stream, so that adding an input changes no other.

    Floats are standard normal. Integers are uniform within ``bounds`` (lowest and highest value, both included) where
    given, over the whole type for 8-bit maps (rank 3 and more), else 0 or 1. Booleans are even coin flips, strings a
    few words. Integer and boolean masks, and float attention masks, are ones: a random one can hide every position.

    Raises:
        UsageError: bounds for an unknown input, reversed, or outside the input's type.
    """
    limits = dict(bounds or {})
    names = [spec.name for spec in specs]
    for name in sorted(limits.keys() - set(names)):
        raise UsageError(f"bounds for {name!r}: the model has no such input", hint=nearest(name, names))
    feed: Feed = {}
    for spec in specs:
        rng = np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(spec.name.encode())])
        feed[spec.name] = _draw(spec, tuple(shapes[spec.name]), limits.get(spec.name), rng)
    return feed


def _draw(spec: InputSpec, shape: tuple[int, ...], limit: tuple[int, int] | None, rng: np.random.Generator) -> Array:
    """One synthetic array of the input's dtype."""
    kind, name = spec.dtype.kind, spec.name.lower()
    result: Any
    if kind == "O":
        result = rng.choice(np.asarray(_WORDS, dtype=object), size=shape)
    elif kind in "iu":
        if "mask" in name and limit is None:
            return np.ones(shape, spec.dtype)
        low, high = limit if limit is not None else _integer_range(spec, len(shape))
        info = np.iinfo(spec.dtype)
        if low > high or low < info.min or high > info.max:
            allowed = f"{info.min}..{info.max} ({spec.dtype})"
            raise UsageError(f"bounds {low}..{high} for input {spec.name!r}: must rise and lie in {allowed}")
        result = rng.integers(low, high, size=shape, dtype=spec.dtype, endpoint=True)
    elif kind == "b":
        result = np.ones(shape, bool) if "mask" in name else rng.integers(0, 2, size=shape).astype(bool)
    elif "attention_mask" in name or "attn_mask" in name:
        result = np.ones(shape)
    else:
        result = rng.standard_normal(shape)
        if kind == "c":
            result = result + 1j * rng.standard_normal(shape)
    array: Array = np.asarray(result).astype(spec.dtype)
    return array


def _integer_range(spec: InputSpec, rank: int) -> tuple[int, int]:
    """The default range of an integer input: 8-bit maps are pixels or samples, anything else may be an index."""
    if spec.dtype.itemsize == 1 and rank >= 3:
        info = np.iinfo(spec.dtype)
        return int(info.min), int(info.max)
    return 0, 1
