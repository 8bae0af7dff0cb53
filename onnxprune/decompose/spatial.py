"""Spatial SVD: a kernel of k x k as k x 1 and 1 x k with r channels in between."""

from __future__ import annotations

import numpy as np

from onnxprune.decompose.factor import Factor, Real, Stage
from onnxprune.decompose.last import falling, fitted
from onnxprune.decompose.method import Fit, Method, Mode, Ranks, Shape, last, placed, shape_of
from onnxprune.decompose.metric import Metric
from onnxprune.decompose.whiten import Whitener


class SpatialSvd(Method):
    """K [channels x k1, k2 x o] of rank r: first along the first spatial axis, then along the others.

    Jaderberg et al., Speeding up Convolutional Neural Networks with Low Rank Expansions, BMVC 2014, scheme 2.
    """

    name = "spatial-svd"

    def refusal(self, shape: Shape) -> str:
        """Two axes to tell apart."""
        return "" if len(shape.wide) > 1 else "its kernel lies along fewer than two axes"

    def limits(self, shape: Shape) -> Ranks:
        """The shorter side of the matrix."""
        first = shape.inputs * shape.kernel[shape.wide[0]]
        return (min(first, shape.columns // first * shape.inputs * shape.outputs),)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """Along one axis to r channels, along the others to the outputs."""
        first, rest = _axes(shape)
        return [
            last(shape, shape.inputs, first, "first", ranks[0]),
            last(shape, ranks[0], rest, "second", shape.outputs),
        ]

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Directions of channels x k1 by energy."""
        return _SpatialFit(self, kernel, metric)


def _axes(shape: Shape) -> tuple[list[int], list[int]]:
    """Axes of the first factor (and those along which nothing slides: their strides come early), and the others."""
    rest = shape.wide[1:]
    return [i for i in range(len(shape.kernel)) if i not in rest], rest


class _SpatialFit(Fit):
    def __init__(self, method: SpatialSvd, kernel: Real, metric: Metric) -> None:
        self._method, self._kernel, self._metric = method, kernel, metric
        self._shape = shape = shape_of(kernel)
        axis = shape.wide[0]
        moved = np.moveaxis(kernel, 2 + axis, 2)
        matrix = moved.reshape(shape.parts, shape.inputs * shape.kernel[axis], -1)
        white = Whitener(metric.along(shape.kernel, [axis]))
        seen = white.into(matrix)
        energies, vectors = falling(seen @ seen.transpose(0, 2, 1))
        self._basis = white.back(vectors)
        size, other = sorted(matrix.shape[1:])
        self.modes = (Mode("rank", size, energies[:size], other),)

    def factors(self, ranks: Ranks) -> list[Factor]:
        stages = self._method.stages(self._shape, ranks)
        first = placed(stages[:1], [self._basis[..., : ranks[0]]])
        matrix, _, _ = fitted(self._metric, first, self._kernel)
        return [*first, *placed(stages[1:], [matrix])]
