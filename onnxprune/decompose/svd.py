"""SVD: a matrix of rank r as two; for a convolution, r output channels and a mix of them."""

from __future__ import annotations

from onnxprune.decompose.factor import Factor, Real, Stage
from onnxprune.decompose.last import fitted, split
from onnxprune.decompose.method import Fit, Method, Mode, Ranks, Shape, last, placed, pointwise, shape_of
from onnxprune.decompose.metric import Metric


class Svd(Method):
    """K [n, o] = core [n, r] out [r, o], n = channels x positions of the kernel.

    A layer with a kernel keeps it in the first factor (weight SVD of Zhang et al., TPAMI 2016, and of AIMET).
    """

    name = "svd"

    def refusal(self, shape: Shape) -> str:
        """There have to be two sides to go between."""
        return "every part of it has a single channel on one side" if min(self.limits(shape)) < 2 else ""

    def limits(self, shape: Shape) -> Ranks:
        """The shorter side of the matrix."""
        return (min(shape.columns, shape.outputs),)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """The layer with r outputs, then 1x1."""
        everywhere = range(len(shape.kernel))
        return [
            last(shape, shape.inputs, everywhere, "core", ranks[0]),
            pointwise(shape, "out", ranks[0], shape.outputs),
        ]

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """The directions of the output by energy."""
        return _SvdFit(self, kernel, metric)


class _SvdFit(Fit):
    def __init__(self, method: Svd, kernel: Real, metric: Metric) -> None:
        self._method, self._shape = method, shape_of(kernel)
        self._split = split(*fitted(metric, (), kernel))
        size, other = sorted((self._shape.columns, self._shape.outputs))
        self.modes = (Mode("rank", size, self._split.energies, other),)

    def factors(self, ranks: Ranks) -> list[Factor]:
        return placed(self._method.stages(self._shape, ranks), self._split.at(ranks[0]))
