"""Quantised integers as numbers, (code - zero point) * scale, with several codes per byte. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NARROW = {"int4", "uint4", "int2", "uint2"}
"""Integers that numpy itself does not have."""
PACKED_BITS = (2, 4, 8)
"""Widths of codes of which a whole number fits into a byte."""


def numbers(
    codes: Array, scale: Array | None, zero: Array | None, axis: int = 0, block: int = 0
) -> NDArray[np.float32]:
    """Dequantise codes as (codes - zero) * scale, float32.

    Args:
        codes: integer codes of any shape.
        scale: scale, None for 1; a scalar, one per position of ``axis``, one per block of ``axis``, or of a shape that
            broadcasts against the codes.
        zero: zero point, None for 0; of a shape as ``scale``.
        axis: axis of the codes along which scales and zero points vary.
        block: number of positions that share a scale; 0 derives it from the number of blocks.

    Returns:
        float32 array of the shape of ``codes``.
    """
    result = codes.astype(np.float32)
    if zero is not None:
        result = result - spread(zero.astype(np.float32), codes.shape, axis, block)
    return result if scale is None else result * spread(scale.astype(np.float32), codes.shape, axis, block)


def spread(setting: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """Expand a scale or zero point so that it broadcasts against codes of ``shape``."""
    if setting.size == 1:
        return setting.reshape(())
    axis %= len(shape)
    if setting.ndim == 1 and len(shape) > 1:
        return setting.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    size, blocks = shape[axis], setting.shape[axis]
    if blocks in (1, size):
        return setting
    return setting.take(np.arange(size) // (block or -(-size // blocks)), axis=axis)


def unpack(packed: Array, bits: int, count: int | None = None) -> NDArray[np.uint8]:
    """Unpack bytes [..., n] into codes [..., count], the lowest bits first.

    Args:
        packed: unsigned bytes [..., n].
        bits: bits per code, one of ``PACKED_BITS``.
        count: number of codes to return along the last axis; None for all.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed.view(np.uint8)[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    result: NDArray[np.uint8] = codes.reshape(*packed.shape[:-1], -1)[..., :count]
    return result


def pack(codes: Array, bits: int) -> NDArray[np.uint8]:
    """Pack codes [..., count] into bytes [..., ceil(count * bits / 8)]: the inverse of ``unpack``, padded with 0."""
    per_byte = 8 // bits
    width = -(-codes.shape[-1] // per_byte) * per_byte
    padded = np.zeros((*codes.shape[:-1], width), np.uint8)
    padded[..., : codes.shape[-1]] = codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    each_byte = padded.reshape(*codes.shape[:-1], -1, per_byte) << shifts
    return np.asarray(np.bitwise_or.reduce(each_byte, axis=-1), np.uint8)


def requantise(
    values: Array,
    bits: int,
    scale: Array,
    zero: Array,
    *,
    moves_zero: bool,
    kind: np.dtype[Any],
    is_integer: bool = True,
) -> tuple[NDArray[np.uint8], Array, Array]:
    """Quantise blocks of numbers as unsigned codes, (code - zero) * scale, each with the setting of the least error.

    Candidates are the present setting, the one that spans the numbers, and spans somewhat smaller, where the largest
    numbers are clipped and all others rounded less.

    Args:
        values: numbers [..., block].
        bits: bits per code.
        scale: present scales [..., 1], tried first.
        zero: present zero points [..., 1].
        moves_zero: whether zero points may change; else the scales alone.
        kind: type in which scales are stored.
        is_integer: whether zero points are codes too, and not any number.

    Returns:
        codes [..., block], scales and zero points [..., 1].
    """
    max_code = (1 << bits) - 1
    low, high = (np.minimum(values.min(-1, keepdims=True), 0.0), np.maximum(values.max(-1, keepdims=True), 0.0))
    settings = [(scale, zero)]
    for share in (1.0, 0.9, 0.8, 0.7):
        if moves_zero:
            step = _stored(share * (high - low) / max_code, scale, kind)
            middle = -share * low / step
            settings.append((step, np.clip(np.rint(middle), 0, max_code) if is_integer else middle))
            continue
        # The codes below the middle are one more than those above it: either sign of the scale makes use of that.
        below, above = np.maximum(zero, 1.0), np.maximum(max_code - zero, 1.0)
        settings.append((_stored(share * np.maximum(-low / below, high / above), scale, kind), zero))
        settings.append((_stored(-share * np.maximum(high / below, -low / above), scale, kind), zero))
    return _closest(values, max_code, settings)


def _stored(scale: Array, old: Array, kind: np.dtype[Any]) -> Array:
    """Return scales as they are stored; those that would become 0 stay as they were."""
    rounded = scale.astype(kind).astype(np.float64)
    return np.where((rounded == 0) | ~np.isfinite(rounded), np.where(old == 0, 1.0, old), rounded)


def _closest(
    values: Array, max_code: int, settings: Sequence[tuple[Array, Array]]
) -> tuple[NDArray[np.uint8], Array, Array]:
    """Return the codes, scale and zero point, block by block of those settings, with the least squared error."""
    best: tuple[Array, Array, Array] | None = None
    least = np.asarray(np.inf)
    for scale, zero in settings:
        codes = np.clip(np.rint(values / np.where(scale == 0, 1.0, scale) + zero), 0, max_code)
        error = np.square((codes - zero) * scale - values).sum(axis=-1, keepdims=True)
        new = (codes, *np.broadcast_arrays(scale, zero))
        closer = error < least
        best = new if best is None else tuple(np.where(closer, a, b) for a, b in zip(new, best, strict=True))  # type: ignore[assignment]
        least = np.minimum(error, least)
    assert best is not None
    return best[0].astype(np.uint8), best[1], best[2]
