"""Inputs for a model: sizes for its dynamic dimensions, and seeded synthetic arrays."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, nearest
from onnxprune.graph.probes import InputSpec, bind_shapes, format_shape
from onnxprune.runtime.data import load_data
from onnxprune.runtime.sessions import Array, Feed

__all__ = ["bind_shapes", "format_shape", "load_data", "synthetic", "variations"]

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
    """Return the default range of an integer input: pixels or samples for 8-bit maps, else that of an index."""
    if spec.dtype.itemsize == 1 and rank >= 3:
        info = np.iinfo(spec.dtype)
        return int(info.min), int(info.max)
    return 0, 1


Spread = Callable[[Array], Array]
"""A pattern of mean about 0 and standard deviation about 1 -> values of an input."""

RANGES: dict[str, Spread] = {
    "sd 0.1": lambda x: x * 0.1,
    "-1..1": lambda x: np.clip(x * 0.5, -1, 1),
    "0..1": lambda x: np.clip(0.5 + x * 0.25, 0, 1),
    "sd 1": lambda x: x,
    "sd 3": lambda x: x * 3,
    "sd 10": lambda x: x * 10,
    "sd 30": lambda x: x * 30,
    "-128..127": lambda x: np.clip(x * 64, -128, 127),
    "0..255": lambda x: np.clip(127.5 + x * 64, 0, 255),
}
"""Ranges of inputs of trained models: raw, centred and standardised pixels, waves, spectra."""

# Axes shorter than this are colours or the like, along which values go together.
_SHORT = 5
# Share of samples that are white noise; without any, classes that differ in fine detail alone would be left to chance.
_NOISE = 1 / 8
# Steps that a field is cut into where it becomes flat patches.
_LEVELS = 8
# Exponents of the power spectrum, per axis: of texture, and of fields that become patches.
_TEXTURE, _PATCHES = (0.5, 2.5), (2.0, 3.5)


def make_plausible_inputs(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]],
    spread: Spread,
    *,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    seed: int = 0,
) -> Feed:
    """Make one call of a model: patterns for float inputs and 8-bit maps, else as :func:`synthetic` draws them.

    A pattern mixes texture with a power spectrum 1/f^a and flat patches with sharp edges, under a light and contrast
    of its own; the two things that fields of nature and of artefacts have in common. Ruderman, Origins of scaling in
    natural images, Vision Research 1997; Baradad et al., Learning to See by Looking at Noise, NeurIPS 2021.

    Args:
        specs: inputs of the model.
        shapes: {input: shape}, samples along the first axis of inputs of rank 2 and more.
        spread: function that maps the patterns of float inputs to their range.
        bounds: see :func:`synthetic`.
        seed: seed of the random numbers, 0 or more.
    """
    feed = synthetic(specs, shapes, bounds=bounds, seed=seed)
    for spec in specs:
        if not is_pattern(spec):
            continue
        rng = np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(spec.name.encode()), 1])
        values = pattern(tuple(shapes[spec.name]), rng)
        if spec.dtype.kind in "iu":
            info = np.iinfo(spec.dtype)
            values = np.clip((info.min + info.max + 1) / 2 + 64 * values, info.min, info.max).round()
        else:
            values = spread(values)
        feed[spec.name] = np.asarray(values).astype(spec.dtype)
    return feed


def is_pattern(spec: InputSpec) -> bool:
    """Return whether an input holds measurements, not indices or masks."""
    if "mask" in spec.name.lower():
        return False
    return spec.dtype.kind in "fV" or (spec.dtype.kind in "iu" and spec.dtype.itemsize == 1 and len(spec.shape) >= 3)


def pattern(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Draw samples along the first axis, each with a mean of about 0 and a standard deviation of about 1."""
    if len(shape) < 2:
        return pattern((1, *shape), rng)[0] if shape else rng.standard_normal(shape)
    channel_axes = tuple(a for a in range(1, len(shape)) if shape[a] < _SHORT)
    texture = _coloured(shape, _TEXTURE, rng)
    foreground, background = (_patches(_coloured(shape, _PATCHES, rng), channel_axes, rng) for _ in range(2))
    is_foreground = _coloured(shape, _PATCHES, rng).mean(axis=channel_axes, keepdims=True) > 0
    share = rng.random(_single(shape)) ** 2
    values = _standard((1.0 - share) * np.where(is_foreground, foreground, background) + 0.7 * share * texture)
    values = np.where(rng.random(_single(shape)) < _NOISE, rng.standard_normal(shape), values)
    contrast, light = rng.uniform(0.4, 1.3, _single(shape)), 0.7 * rng.standard_normal(_single(shape))
    return values * contrast + light


def _coloured(shape: tuple[int, ...], exponents: tuple[float, float], rng: np.random.Generator) -> Array:
    """Noise whose power falls with frequency along long axes; along short ones values go together."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    spatial_axes = [a for a in range(1, len(shape)) if shape[a] >= _SHORT]
    for axis in range(1, len(shape)):
        if 1 < shape[axis] < _SHORT:
            noise = 0.35 * noise + noise.take([0], axis=axis)
    if not spatial_axes:
        return _standard(noise)
    squares: Any = 0.0
    for axis in spatial_axes:
        # The transform of real values keeps half of the frequencies along the last axis.
        steps = np.fft.rfftfreq(shape[axis]) if axis == spatial_axes[-1] else np.fft.fftfreq(shape[axis])
        squares = squares + np.square(steps).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    frequency = np.maximum(np.sqrt(squares), 1.0 / max(shape[a] for a in spatial_axes))
    exponent = rng.uniform(*exponents, _single(shape)) * len(spatial_axes) / 2
    waves = np.fft.rfftn(noise, axes=spatial_axes) * (frequency**-exponent).astype(np.float32)
    return _standard(np.fft.irfftn(waves, s=[shape[a] for a in spatial_axes], axes=spatial_axes))


def _patches(field: Array, channel_axes: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Quantize the field to a few steps, each with a value (and along short axes a tint) of its own."""
    grey = _standard(field.mean(axis=channel_axes, keepdims=True)) if channel_axes else field
    step = np.clip((grey + 2.0) / 4.0 * _LEVELS, 0, _LEVELS - 1).astype(np.int64)
    tints = [n if a == 0 or a in channel_axes else 1 for a, n in enumerate(field.shape)]
    table = rng.standard_normal((*_single(field.shape), _LEVELS)) + 0.4 * rng.standard_normal((*tints, _LEVELS))
    table = np.broadcast_to(table, (*field.shape, _LEVELS))
    index = np.broadcast_to(step, field.shape)[..., None]
    return _standard(np.take_along_axis(table, index, axis=-1)[..., 0])


def _single(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with one value per sample."""
    return (shape[0], *(1,) * (len(shape) - 1))


def _standard(values: Array) -> Array:
    axes = tuple(range(1, values.ndim))
    centred: Array = values - values.mean(axis=axes, keepdims=True)
    centred /= centred.std(axis=axes, keepdims=True) + 1e-6
    return centred
