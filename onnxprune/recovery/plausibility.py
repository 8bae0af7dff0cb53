"""Plausibility of synthetic inputs: inputs like the training data make most channels of a layer vary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Largest number of outputs of a layer to use, spread over all.
_MAX_COLUMNS = 512


def measure_response(outputs: Array) -> float:
    """Measure how strongly a trained layer responds to its inputs, 0 to 1: the rank of its outputs, and their mean.

    Variety is the participation ratio (tr C)^2 / (o tr C^2) of the outputs' correlation matrix C: 1/o where they all
    move together. Balance is 4 p (1 - p), p the share of values above 0, averaged over outputs: a layer that was
    trained uses both sides of the activation behind it. On inputs that are too small the biases dominate, on inputs
    that are too large a few directions; the measure is low for both.

    Args:
        outputs: outputs of the layer, [rows, o].
    """
    if outputs.shape[1] > _MAX_COLUMNS:
        outputs = outputs[:, :: -(-outputs.shape[1] // _MAX_COLUMNS)]
    rows, count = outputs.shape
    values = outputs.astype(np.float64)
    above = (values > 0).mean(axis=0)
    values -= values.mean(axis=0)
    spread = values.std(axis=0)
    alive = spread > 1e-6 * max(float(spread.max(initial=0.0)), 1e-30)
    if not alive.any():
        return 0.0
    values = values[:, alive] / spread[alive]
    # tr (Z^T Z)^2 = tr (Z Z^T)^2: the smaller of the two.
    gram = values @ values.T if rows < values.shape[1] else values.T @ values
    trace = float(alive.sum()) * rows
    variety = trace**2 / float(np.square(gram).sum()) / count
    return float(variety * (4.0 * above * (1.0 - above)).mean())


def measure_divergence(mean: Array, variance: Array, wanted_mean: Array, wanted_variance: Array) -> float:
    """Return the Kullback-Leibler divergence of normal distributions, averaged over channels, at most 10 each.

    BatchNormalization stores the mean and variance of its training data; Cai et al., ZeroQ, CVPR 2020, section 3.1.
    """
    wanted_variance = np.maximum(wanted_variance, 1e-12)
    ratio = np.maximum(variance / wanted_variance, 1e-12)
    distance = 0.5 * (ratio + np.square(mean - wanted_mean) / wanted_variance - 1.0 - np.log(ratio))
    return float(np.minimum(distance, 10.0).mean())
