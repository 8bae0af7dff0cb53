"""Criteria that read weights alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria.registry import register
from onnxprune.criteria.slot import Slot


@register("l1", reads_all=True)
def l1(slot: Slot) -> NDArray[Any]:
    """Sum of absolute weights, sum_f |W_cf|. Shape [channels].

    Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    """
    return np.asarray(np.abs(slot.blocks).sum(axis=(0, 2)))


@register("l2", reads_all=True, of_squares=np.sqrt)
def l2(slot: Slot) -> NDArray[Any]:
    """Euclidean norm, sqrt(sum_f W_cf^2). Shape [channels]."""
    return np.asarray(np.sqrt(np.einsum("pcf,pcf->c", slot.blocks, slot.blocks)))


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
