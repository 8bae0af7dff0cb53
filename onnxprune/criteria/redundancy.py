"""Criteria that look for another channel that carries the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria.registry import register
from onnxprune.criteria.slot import Slot
from onnxprune.statistics.maps import Maps


@register("cosine", needs=("similarity",))
def cosine(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """Novelty of a map: 1 - max_j |cos(x_c, x_j)| over the channels j that are stronger. Shape [channels].

    Stronger means a larger mean square, then a lower index, so that of two equal channels one stays; channels of one
    unit go together and are no stand-in for each other. The strongest has 1, a dead channel 0. A form of redundancy
    pruning as in Ayinde & Zurada, Building Efficient ConvNets using Redundant Feature Pruning, ICLR workshop 2018, on
    feature maps in place of filters.
    """
    if "similarity" not in maps:
        return None
    square = np.diagonal(maps["similarity"])
    place = np.empty(square.size, dtype=np.int64)
    place[np.argsort(-square, kind="stable")] = np.arange(square.size)
    return _novelty(maps["similarity"], (place[None, :] < place[:, None]) & _apart(slot.units))


@register("snp", needs=("similarity", "square"))
def snp(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """How much attention changes without a dimension. Shape [channels]; slots outside attention: None.

    Queries and keys: ||q_i|| ||k_i||, the dimension's part of the attention scores. Values, where there are several
    heads: 1 - max_j |cos(v_i, v_j)| over the dimensions j of other heads, 0 for a dead one.
    Shim et al., SNP: Structured Neuron-level Pruning to Preserve Attention Scores, ECCV 2024.
    """
    if slot.pairs:
        if "square" not in maps:
            return None
        partner = np.abs(slot.blocks).sum(axis=(0, 2), dtype=np.float64)
        return np.asarray(np.sqrt(maps["square"]) * partner)
    if slot.classes is None or np.unique(slot.classes).size < 2 or "similarity" not in maps:
        return None
    return _novelty(maps["similarity"], _apart(slot.classes))


def _apart(owner: NDArray[Any]) -> NDArray[np.bool_]:
    """Which two channels have different owners, [channels, channels]."""
    return np.asarray(owner[:, None] != owner[None, :])


def _novelty(similarity: NDArray[np.float64], rivals: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 - the largest |cosine| of each channel with its rivals, [channels]; 1 without any, 0 for a dead channel."""
    norm = np.sqrt(np.diagonal(similarity))
    scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    alike = np.abs(similarity) * scale[:, None]
    alike *= scale
    alike *= rivals
    return np.where(norm > 0, np.maximum(1.0 - alike.max(axis=1), 0.0), 0.0)
