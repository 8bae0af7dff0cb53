"""Integers that stand for numbers: (code - zero point) * scale, several codes to a byte. Arrays only."""

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
    """(codes - zero) * scale, float32.

    Args:
        codes: of any shape.
        scale, zero: None for 1 and 0; one for all, one per position of ``axis``, one per block of ``axis``, or of a
            shape that broadcasts.
        axis: of the codes.
        block: positions that share a scale; 0: as many as there are blocks for.
    """
    result = codes.astype(np.float32)
    if zero is not None:
        result = result - spread(zero.astype(np.float32), codes.shape, axis, block)
    return result if scale is None else result * spread(scale.astype(np.float32), codes.shape, axis, block)


def spread(setting: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """A scale or zero point so that it broadcasts against codes of ``shape``."""
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
    """Codes [..., count] of bytes [..., n], the lowest bits first.

    Args:
        packed: unsigned bytes.
        bits: of a code, one of ``PACKED_BITS``.
        count: codes wanted; None for all.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed.view(np.uint8)[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    result: NDArray[np.uint8] = codes.reshape(*packed.shape[:-1], -1)[..., :count]
    return result


def pack(codes: Array, bits: int) -> NDArray[np.uint8]:
    """Bytes [..., ceil(count * bits / 8)] of codes [..., count]: the inverse of ``unpack``, padded with 0."""
    each = 8 // bits
    width = -(-codes.shape[-1] // each) * each
    padded = np.zeros((*codes.shape[:-1], width), np.uint8)
    padded[..., : codes.shape[-1]] = codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    each_byte = padded.reshape(*codes.shape[:-1], -1, each) << shifts
    return np.asarray(np.bitwise_or.reduce(each_byte, axis=-1), np.uint8)
