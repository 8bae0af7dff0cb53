"""Criteria that read one number per channel of the feature maps, alone or together with the weights that read them.

Where queries meet keys the weights are the partner's root mean square: what is multiplied with a query is a key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.criteria.registry import register
from onnxprune.criteria.slot import Slot
from onnxprune.statistics.maps import Maps

Scores = NDArray[Any] | None


@register("nuclear", needs=("nuclear",))
def nuclear(slot: Slot, maps: Maps) -> Scores:
    """Nuclear norm ||X_c||_* of a channel's maps, a matrix [samples, positions]: its energy. Shape [channels].

    Yeom et al., Toward Compact Deep Neural Networks via Energy-Aware Pruning, 2021.
    """
    return maps.get("nuclear")


@register("hrank", needs=("rank",))
def hrank(slot: Slot, maps: Maps) -> Scores:
    """Mean rank of a channel's map [height, width]. Shape [channels]; maps without two axes of space: None.

    Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020.
    """
    return maps.get("rank")


@register("apoz", needs=("active",))
def apoz(slot: Slot, maps: Maps) -> Scores:
    """1 - average percentage of zeros, the share of activations that are not 0. Shape [channels].

    Hu et al., Network Trimming: A Data-Driven Neuron Pruning Approach, 2016.
    """
    return maps.get("active")


@register("activation", needs=("magnitude",))
def activation(slot: Slot, maps: Maps) -> Scores:
    """Mean magnitude E|x_c| of a channel's activations. Shape [channels].

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017.
    """
    return maps.get("magnitude")


@register("variance", needs=("mean", "square"), reads_all=True)
def variance(slot: Slot, maps: Maps) -> Scores:
    """Fluctuation Var(x_c) * sum_f W_cf^2: what is left when a bias replaces the channel. Shape [channels].

    An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (FLAP), AAAI 2024.
    """
    if "mean" not in maps or "square" not in maps:
        return None
    return np.asarray(maps.variance * np.square(slot.blocks, dtype=np.float64).sum(axis=(0, 2)))


@register("wanda", needs=("square",), reads_all=True)
def wanda(slot: Slot, maps: Maps) -> Scores:
    """Weights times the norm of what they are multiplied with, sum_f |W_cf| * sqrt(E x_c^2). Shape [channels].

    Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), ICLR 2024, summed
    over a channel's weights.
    """
    if "square" not in maps:
        return None
    return np.asarray(np.sqrt(maps["square"]) * np.abs(slot.blocks).sum(axis=(0, 2), dtype=np.float64))
