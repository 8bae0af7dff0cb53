"""Sizes for dynamic dimensions: what a model's inputs declare, what the user says, what names and places suggest."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, nearest

_IMAGE_SIZE = 224  # what classifiers of photographs are exported with
_MAP_SIZE = 64  # for other maps: large enough to survive five halvings
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model: its name, numpy dtype (strings: object) and shape.

    A dimension is a size, the name of a dynamic dimension, or None for an unnamed one. onnxruntime reports an input of
    unknown rank like a scalar, as the empty shape; ``scalar`` says that the model declares it to be one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    scalar: bool = False


def bind_shapes(
    specs: Sequence[InputSpec], *, batch: int, sequence: int, overrides: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """A full shape for every input, the same size wherever the same dynamic dimension is named.

    Sizes come, in this order, from ``overrides`` (whole shapes by input name; they bind the names they meet for the
    other inputs too), from what a dimension's name says (batch, sequence, sums of other names), from its place: a
    leading one is ``batch``, so is the middle one of three where the others are fixed (a state), later ones are
    ``sequence`` in inputs of rank 2 and 3 and a map's extent (224 for images of 1, 3 or 4 channels, else 64) in inputs
    of rank 4 and more.

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
    # The state of a recurrent net: [layers, samples, size], where one layer might as well be one sample.
    state = axis == 1 and rank == 3 and all(isinstance(n, int) and n > 1 for n in (spec.shape[0], spec.shape[2]))
    if axis == 0 or state:
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
