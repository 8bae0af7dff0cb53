"""Tucker: fewer channels into the kernel and out of it, and where kernels are large, fewer positions too."""

from __future__ import annotations

import numpy as np

from onnxprune.decompose.factor import Factor, Real, Stage
from onnxprune.decompose.last import falling, fitted, split
from onnxprune.decompose.method import Fit, Method, Mode, Ranks, Shape, last, placed, pointwise, shape_of
from onnxprune.decompose.metric import Metric
from onnxprune.decompose.whiten import Whitener

LARGE = 5
"""Positions along an axis from which on its own rank is looked for."""


class Tucker(Method):
    """K = core x_in U_in x_out U_out: 1x1, the core, 1x1. Kim et al., ICLR 2016.

    Ranks are those of the input and output channels; further ones, of spatial axes, make the core smaller there:
    every channel is then first filtered along that axis. A rank of 0 leaves a mode as it is.
    """

    name = "tucker"
    modes = ("in", "out")

    def refusal(self, shape: Shape) -> str:
        """A matrix has no more than two modes, and SVD is best there."""
        if not shape.wide:
            return "its kernel is one position: svd says all there is to say"
        return "every part of it has a single channel" if max(shape.inputs, shape.outputs) < 2 else ""

    def limits(self, shape: Shape) -> Ranks:
        """All channels."""
        return shape.inputs, min(shape.columns, shape.outputs)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """1x1, filters along the axes with a rank of their own, the core with what is left of the kernel, 1x1."""
        into, out, *spatial = ranks
        made, width = list[Stage](), shape.inputs
        if into:
            made, width = [pointwise(shape, "in", width, into)], into
        axes = [i for i, r in enumerate(spatial) if r]
        for i in axes:
            kernel = tuple(k if j == i else 1 for j, k in enumerate(shape.kernel))
            made.append(Stage(f"axis{i}", shape.parts * width, 1, kernel, spatial[i], (i,)))
            width *= spatial[i]
        rest = [i for i in range(len(shape.kernel)) if i not in axes]
        made.append(last(shape, width, rest, "core", out or shape.outputs))
        return [*made, pointwise(shape, "out", out, shape.outputs)] if out else made

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Directions of every mode by energy."""
        return _TuckerFit(self, kernel, metric, seed)


class _TuckerFit(Fit):
    def __init__(self, method: Tucker, kernel: Real, metric: Metric, seed: int) -> None:
        self._method, self._kernel, self._metric, self._seed = method, kernel, metric, seed
        self._shape = shape = shape_of(kernel)
        self._white = Whitener(metric.channels(shape.kernel))
        flat = kernel.reshape(shape.parts, shape.inputs, -1)
        seen = self._white.into(flat)
        # The kernel in channels that all count alike: [parts, inputs, *kernel, outputs].
        self._seen = seen.reshape(kernel.shape)
        energies, _ = falling(seen @ seen.transpose(0, 2, 1))
        out = split(*fitted(metric, (), kernel)).energies
        into, most = method.limits(shape)
        large = max(shape.kernel, default=0) >= LARGE
        spatial = [self._axis(i) for i in range(len(shape.kernel))] if large else []
        self.modes = (
            Mode("in", into, energies, flat.shape[2]),
            Mode("out", most, out[:most], shape.columns),
            *spatial,
        )

    def _axis(self, i: int) -> Mode:
        """A spatial axis; of a short one no rank is looked for."""
        size = self._shape.kernel[i]
        moved = np.moveaxis(self._seen, 2 + i, 1).reshape(self._shape.parts, size, -1)
        energies = falling(moved @ moved.transpose(0, 2, 1))[0]
        return Mode(f"axis{i}", size if size >= LARGE else 1, energies, moved.shape[2])

    def factors(self, ranks: Ranks) -> list[Factor]:
        into, out, *spatial = ranks
        stages = self._method.stages(self._shape, ranks)
        bases = self._iterated(into, out, spatial)
        arrays, width = list[Real](), self._shape.inputs
        if into:
            arrays, width = [self._white.back(bases[0])], into
        for i, rank in enumerate(spatial):
            if rank:
                arrays.append(np.repeat(bases[1 + i], width, axis=0))
                width *= rank
        prefix = placed(stages[: len(arrays)], arrays)
        matrix, seen, alone = fitted(self._metric, prefix, self._kernel)
        if not out:
            return [*prefix, *placed(stages[len(arrays) :], [matrix])]
        return [*prefix, *placed(stages[len(arrays) :], split(matrix, seen, alone).at(out))]

    def _iterated(self, into: int, out: int, spatial: list[int]) -> dict[int, Real]:
        """Bases of the modes, {0: [parts, inputs, r], 1 + axis: [parts, k, r]}, by HOOI (De Lathauwer et al., 2000)."""
        # Imported where it is needed: tensorly takes a while to load.
        from onnxprune.decompose.alternating import orthogonal_iteration

        modes = {0: into, **{1 + i: r for i, r in enumerate(spatial)}, self._seen.ndim - 2: out}
        wanted = {mode: rank for mode, rank in modes.items() if rank}
        bases: dict[int, list[Real]] = {mode: [] for mode in wanted}
        for part in self._seen:
            if len(wanted) == 1 and out:
                break
            for mode, basis in zip(wanted, orthogonal_iteration(part, wanted, self._seed), strict=True):
                bases[mode].append(basis)
        return {mode: np.stack(found) for mode, found in bases.items() if found}
