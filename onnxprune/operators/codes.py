"""Quantised integers as numbers, (code - zero point) * scale, with several codes per byte. Arrays only."""

from __future__ import annotations

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
