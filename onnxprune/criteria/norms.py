"""Criteria that read weights alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria.registry import register
from onnxprune.criteria.slot import Slot

# Bytes to copy at a time from odd addresses: what the cache of one core holds beside other things.
_PIECE = 1 << 19
# From so many numbers side by side on, a row is summed as fast as memory is; shorter ones are summed by columns.
_LONG = 64


@register("l1", reads_all=True)
def l1(slot: Slot) -> NDArray[Any]:
    """Sum of absolute weights, sum_f |W_cf|. Shape [channels].

    Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    """
    return np.asarray(np.abs(slot.blocks).sum(axis=(0, 2)))


@register("l2", reads_all=True, any_address=True)
def l2(slot: Slot) -> NDArray[Any]:
    """Euclidean norm, sqrt(sum_f W_cf^2). Shape [channels]."""
    return np.asarray(np.sqrt(_squares(slot.blocks)))


def _squares(blocks: NDArray[Any]) -> NDArray[Any]:
    """sum_pf W_pcf^2 of [p, c, f], [c]: in the order in which the numbers lie in memory, which is what takes time."""
    before, channels, after = blocks.shape
    if not blocks.flags.aligned:
        return _by_pieces(blocks)
    if before == 1 and after >= _LONG:
        rows = blocks[0]
        return np.asarray(np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0])
    if 1 < after < _LONG:
        columns = blocks.reshape(before, channels * after)
        return np.asarray(np.einsum("pf,pf->f", columns, columns).reshape(channels, after).sum(axis=1))
    return np.asarray(np.einsum("pcf,pcf->c", blocks, blocks))


def _by_pieces(blocks: NDArray[Any]) -> NDArray[Any]:
    """The same of numbers at odd addresses, piece by piece where they are quick to read."""
    before, channels, after = blocks.shape
    lines, width = (blocks[0], after) if before == 1 else (blocks, channels * after)
    step = min(len(lines), max(1, _PIECE // max(1, width * blocks.itemsize)))
    piece = np.empty((step, *lines.shape[1:]), blocks.dtype)  # one for all: it stays in the cache
    # Seen as plain bytes, numbers are copied from odd addresses as fast as from others.
    source, target = (a.view(f"V{blocks.itemsize}") for a in (lines, piece))
    sums = []
    for start in range(0, len(lines), step):
        count = min(step, len(lines) - start)
        target[:count] = source[start : start + count]
        sums.append(_squares(piece[None, :count] if before == 1 else piece[:count]))
    if before == 1:
        return np.concatenate(sums)
    return np.asarray(sum(sums, np.zeros(channels, blocks.dtype)))


@register("gm", reads_all=True)
def gm(slot: Slot) -> NDArray[Any]:
    """Distance to all other channels, sum_j ||W_c - W_j||: near the geometric median means replaceable.

    He et al., Filter Pruning via Geometric Median, CVPR 2019, section 3.2. Distances come from one matrix product:
    ||a - b||^2 = ||a||^2 + ||b||^2 - 2ab. Shape [channels].
    """
    matrix = np.asarray(slot.matrix, dtype=np.float64)
    matrix = matrix - matrix.mean(axis=0)
    square = np.einsum("cf,cf->c", matrix, matrix)
    distance = square[:, None] + square[None, :] - 2.0 * (matrix @ matrix.T)
    np.fill_diagonal(distance, 0.0)
    return np.asarray(np.sqrt(np.maximum(distance, 0.0)).sum(axis=1))


@register("lamp", reads_all=True)
def lamp(slot: Slot) -> NDArray[Any]:
    """Squared weights over all that are not smaller, sum_f W_cf^2 / sum_{|v| >= |W_cf|} v^2. Shape [channels].

    The largest weight of a tensor gets 1, so scores compare between layers.
    Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
    """
    square = np.square(slot.blocks, dtype=np.float64).ravel()
    order = np.argsort(square)
    ascending = square[order]
    # Summed from the largest down; of equal weights the first has them all in its sum.
    above = np.cumsum(ascending[::-1])[::-1]
    starts = np.flatnonzero(np.diff(ascending, prepend=-1.0))
    above = np.repeat(above[starts], np.diff(starts, append=ascending.size))
    square[order] = np.divide(ascending, above, out=np.zeros_like(above), where=above != 0)
    return np.asarray(square.reshape(slot.blocks.shape).sum(axis=(0, 2)))


@register("bn")
def bn(slot: Slot) -> NDArray[Any] | None:
    """Absolute BatchNorm scale |gamma_c|. Shape [channels]; other slots: None.

    Liu et al., Network Slimming, ICCV 2017.
    """
    return np.abs(slot.blocks).sum(axis=(0, 2)) if slot.reads("BatchNormalization", 1) else None


@register("random")
def random(slot: Slot) -> NDArray[Any]:
    """A seeded uniform number per unit: the baseline that every other criterion must beat. Shape [channels]."""
    return slot.rng.random(slot.size)[slot.units]
