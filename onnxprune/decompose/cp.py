"""CP: every rank-one term filters along one axis at a time; four small convolutions for a k x k kernel."""

from __future__ import annotations

import numpy as np

from onnxprune.decompose.factor import Factor, Real, Stage
from onnxprune.decompose.last import falling, fitted
from onnxprune.decompose.method import Fit, Method, Mode, Ranks, Shape, placed, pointwise, shape_of
from onnxprune.decompose.metric import Metric
from onnxprune.decompose.whiten import Whitener

# Random starts besides the one from singular vectors.
_STARTS = 2


class Degenerate(Exception):
    """Every start ended in terms that cancel each other; there is no best approximation of that rank."""


class Cp(Method):
    """K = sum over r of outer products: 1x1 to r channels, each filtered along every axis in turn, 1x1.

    Lebedev et al., Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition, ICLR 2015.
    """

    name = "cp"

    def refusal(self, shape: Shape) -> str:
        """A kernel with positions, and channels to mix."""
        if not shape.wide:
            return "its kernel is one position: svd says all there is to say"
        return "every part of it has a single channel on one side" if min(shape.inputs, shape.outputs) < 2 else ""

    def limits(self, shape: Shape) -> Ranks:
        """Where any kernel can be written so: all pairs of all modes but the longest."""
        modes = [shape.inputs, *shape.kernel, shape.outputs]
        return (int(np.prod(modes, dtype=np.int64)) // max(modes),)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """1x1, one filter per channel along every axis, 1x1."""
        rank, axes = ranks[0], shape.wide
        made = [pointwise(shape, "in", shape.inputs, rank)]
        for i in axes:
            kernel = tuple(k if j == i else 1 for j, k in enumerate(shape.kernel))
            # Axes along which nothing slides go with the first filter, so that their strides come early.
            own = [j for j in range(len(shape.kernel)) if j == i or (i == axes[0] and j not in axes)]
            made.append(Stage(f"axis{i}", shape.parts * rank, 1, kernel, 1, tuple(own)))
        return [*made, pointwise(shape, "out", rank, shape.outputs)]

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Nothing is known before the rank is."""
        return _CpFit(self, kernel, metric, seed)


class _CpFit(Fit):
    def __init__(self, method: Cp, kernel: Real, metric: Metric, seed: int) -> None:
        self._method, self._kernel, self._metric, self._seed = method, kernel, metric, seed
        self._shape = shape_of(kernel)
        self._white = Whitener(metric.channels(self._shape.kernel))
        self._seen = self._white.into(kernel.reshape(*kernel.shape[:2], -1)).reshape(kernel.shape)
        self.modes = (Mode("rank", method.limits(self._shape)[0]),)

    def factors(self, ranks: Ranks) -> list[Factor]:
        """The factors.

        Raises:
            Degenerate: see there.
        """
        shape, stages = self._shape, self._method.stages(self._shape, ranks)
        terms = [_terms(part, ranks[0], self._seed) for part in self._seen]
        arrays = [self._white.back(np.stack([t[0] for t in terms]))]
        arrays += [np.concatenate([t[1 + i].T for t in terms]) for i in shape.wide]
        prefix = placed(stages[:-1], arrays)
        matrix, _, _ = fitted(self._metric, prefix, self._kernel)
        return [*prefix, *placed(stages[-1:], [matrix])]


def _terms(kernel: Real, rank: int, seed: int) -> list[Real]:
    """Unit vectors of every mode but the outputs', [size, rank] each, of the start that errs least.

    Long modes are first cut to the rank by their leading directions, in which the rest then happens.
    """
    if rank * max(kernel.shape) >= kernel.size:
        return _unit_terms(kernel, rank)
    norm = np.linalg.norm(kernel)
    kernel = kernel / (norm if norm > 0 else 1.0)
    bases = {}
    for mode in (0, kernel.ndim - 1):
        if kernel.shape[mode] > rank:
            flat = np.moveaxis(kernel, mode, 0).reshape(1, kernel.shape[mode], -1)
            basis = falling(flat @ flat.transpose(0, 2, 1))[1][0, :, :rank]
            kernel = np.moveaxis(np.tensordot(kernel, basis, (mode, 0)), -1, mode)
            bases[mode] = basis
    # Imported where it is needed: tensorly takes a while to load.
    from onnxprune.decompose.alternating import least_squares

    best, error = None, np.inf
    for start in range(1 + _STARTS):
        vectors, off = least_squares(kernel, rank, seed + start, "svd" if start == 0 else "random")
        if off < error:
            best, error = vectors, off
    if best is None:
        raise Degenerate
    return [bases[mode] @ v if mode in bases else v for mode, v in enumerate(best[:-1])]


def _unit_terms(kernel: Real, rank: int) -> list[Real]:
    """One term for every place of all modes but the longest, which holds the values: any kernel is their sum."""
    longest = int(np.argmax(kernel.shape))
    others = [n if mode != longest else 1 for mode, n in enumerate(kernel.shape)]
    places = np.indices(others).reshape(kernel.ndim, -1)
    vectors = []
    for mode, size in enumerate(kernel.shape[:-1]):
        chosen = np.eye(size)[:, places[mode]]
        if mode == longest:
            chosen = np.moveaxis(kernel, mode, 0).reshape(size, -1)
        vectors.append(np.pad(chosen, ((0, 0), (0, rank - chosen.shape[1]))))
    return vectors
