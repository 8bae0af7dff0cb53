"""Inputs for a model: sizes for its dynamic dimensions, seeded synthetic arrays, and (see ``data``) the user's own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, nearest
from onnxprune.graph.binding import InputSpec, bind_shapes, show
from onnxprune.runtime.data import load_data
from onnxprune.runtime.sessions import Array, Feed

__all__ = ["bind_shapes", "load_data", "show", "synthetic", "variations"]

# Other values of float inputs, made from standard normal ones: another draw, what photographs hold, other scales, and
# neighbours that are alike. Detectors, counters and saturated networks answer the same to most noise.
_CHANGES: tuple[Callable[[Array], Array], ...] = (
    lambda x: x,
    lambda x: np.clip(0.5 + x / 4, 0, 1),
    lambda x: np.clip(127.5 + x * 64, 0, 255),
    lambda x: x * 0.1,
    lambda x: x * 10,
    lambda x: np.cumsum(x, axis=-1) if x.ndim else x,
)

_WORDS = ("the", "small", "graph", "keeps", "its", "words", "in", "order")


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


def variations(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]],
    *,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    seed: int = 0,
) -> Iterator[Feed]:
    """Other seeded inputs than those of ``synthetic``, for models whose outputs do not vary on these.

    Integers, booleans and strings are drawn anew as there; floats also from other ranges. Masks stay ones.
    """
    for number, change in enumerate(_CHANGES, start=1):
        feed = synthetic(specs, shapes, bounds=bounds, seed=seed + number)
        for spec in specs:
            if spec.dtype.kind in "fV" and "mask" not in spec.name.lower():
                with np.errstate(over="ignore"):
                    feed[spec.name] = change(feed[spec.name].astype(np.float64)).astype(spec.dtype)
        yield feed


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
