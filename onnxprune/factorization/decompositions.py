"""Decompositions of kernels into smaller ones: SVD, spatial SVD, Tucker, CP. Arrays only."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular
from tensorly.cp_tensor import cp_normalize, cp_to_tensor
from tensorly.decomposition import parafac, partial_tucker

from onnxprune.operators.kernels import Array, Factor, Real, Shape, Stage


def compose(factors: Sequence[Factor], parts: int, channels: int) -> Real:
    """Return the product of factors, [parts, channels, *kernel, outputs]: one convolution with the product of kernels.

    Args:
        factors: the factors in sequence.
        parts: number of parts of the layer.
        channels: number of channels that one part of it reads.
    """
    rank = len(factors[0].stage.kernel)
    composed = np.broadcast_to(np.eye(channels), (parts, channels, channels)).reshape(parts, channels, *[1] * rank, -1)
    for factor in factors:
        array = factor.split(parts)
        inner, before, behind = array.shape[1], composed.shape[2:-1], array.shape[3:-1]
        composed_rows = composed.reshape(parts, channels * prod(before), inner, array.shape[2]).transpose(0, 2, 1, 3)
        factor_rows = array.reshape(parts, inner, array.shape[2], -1)
        product = (composed_rows @ factor_rows).reshape(parts, inner, channels, *before, *behind, -1)
        # Interleave the axes of both kernels: along each of them one of the two has size 1.
        pairs = [a for i in range(rank) for a in (3 + i, 3 + rank + i)]
        spread = product.transpose(0, 2, *pairs, 1, 3 + 2 * rank)
        sizes = [a * b for a, b in zip(before, behind, strict=True)]
        composed = spread.reshape(parts, channels, *sizes, -1)
    return np.asarray(composed)


def features(prefix: Sequence[Factor], array: Array) -> Real:
    """Return T^T A, the prefix T applied to the columns: [parts, features, *kernel left, m].

    Args:
        prefix: factors whose product is T.
        array: A [parts, channels, *kernel, m]; kernel axes that the prefix slides over are contracted.
    """
    parts, width = array.shape[0], array.shape[-1]
    for factor in prefix:
        blocks, axes = factor.split(parts), [i for i, k in enumerate(factor.stage.kernel) if k > 1]
        kernel = array.shape[2:-1]
        spread = array.reshape(parts, blocks.shape[1], blocks.shape[2], *kernel, width)
        others = [i for i in range(len(kernel)) if i not in axes]
        spread = spread.transpose(0, 1, 2, *(3 + i for i in axes), *(3 + i for i in others), 3 + len(kernel))
        matrix = blocks.reshape(parts, blocks.shape[1], -1, blocks.shape[-1])
        contracted = matrix.transpose(0, 1, 3, 2) @ spread.reshape(parts, blocks.shape[1], matrix.shape[2], -1)
        remaining = [1 if i in axes else k for i, k in enumerate(kernel)]
        array = contracted.reshape(parts, -1, *remaining, width)
    return np.asarray(array)


# Rounds of higher-order orthogonal iteration; the first one has nearly all of the gain.
_ITERATIONS = 2
# Rounds of alternating least squares, and the change in error below which they stop.
_ROUNDS, _ENOUGH = 60, 1e-5
# Ratio between the norms of terms and of their sum above which terms cancel each other: such weights diverge.
_CANCELLING = 1000.0
# Ridge on every vector, for a kernel of norm 1: it keeps terms from growing against each other.
_PULL = 1e-6


def orthogonal_iteration(kernel: Real, ranks: Mapping[int, int], seed: int) -> list[Real]:
    """Return orthonormal bases [size, rank] of some modes of a tensor, {mode: rank}.

    Higher-order orthogonal iteration. De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000.
    """
    with np.errstate(all="ignore"):  # a kernel of zeros has no relative error
        (_, bases), _ = partial_tucker(
            kernel, list(ranks.values()), modes=list(ranks), n_iter_max=_ITERATIONS, svd=_leading, random_state=seed
        )
    return list(bases)


def least_squares(kernel: Real, rank: int, seed: int, start: str) -> tuple[list[Real], float]:
    """Return unit vectors [size, rank] of every mode, and the squared error; infinite where terms cancel each other.

    Alternating least squares. Carroll and Chang, Psychometrika 35, 1970; Harshman, 1970.

    Args:
        kernel: of norm 1.
        rank: number of terms.
        seed: seed of the random start.
        start: ``svd`` or ``random``.
    """
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            terms = parafac(
                kernel, rank, n_iter_max=_ROUNDS, init=start, tol=_ENOUGH, random_state=seed, l2_reg=_PULL, svd=_leading
            )
    except np.linalg.LinAlgError:
        return [], np.inf
    normalized = cp_normalize(terms)
    tensor = cp_to_tensor(normalized)
    norm, weight = float(np.vdot(tensor, tensor)), float(np.vdot(normalized.weights, normalized.weights))
    if not np.isfinite(norm) or weight > _CANCELLING * max(norm, 1e-300):
        return [], np.inf
    return list(normalized.factors), float(np.sum(np.square(kernel - tensor)))


def _leading(matrix: Any, n_eigenvecs: int | None = None, **_: Any) -> tuple[Real, Real, Real]:
    """Return leading singular vectors from the eigenvectors of the smaller product: far faster than an SVD."""
    count = n_eigenvecs or min(matrix.shape)
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    directions = vectors[:, ::-1][:, :count]
    values = np.sqrt(np.maximum(values[::-1][:count], 0.0))
    others = directions.T @ matrix
    return directions, values, others / np.where(values > 0, values, 1.0)[:, None]


RIDGE = 1e-3
"""Share of the mean diagonal added to second moments: it bounds the error in directions without data."""


class Metric:
    """Errors D [parts, n, o] count as trace(D^T G D), n = channels x positions of the kernel, positions innermost.

    G is the mean of X^T X over rows of the layer's columns X, given in full; or per channel, shared by the positions of
    the kernel; or the identity, where there are no data. A ridge is added to the given one.

    Args:
        full: [parts, n, n].
        shared: [parts, channels, channels]. Neither: the identity.
    """

    def __init__(self, full: Array | None = None, per_channel: Array | None = None) -> None:
        self.full = None if full is None else ridged(full)
        self.per_channel = None if per_channel is None else ridged(per_channel)

    @property
    def plain(self) -> bool:
        """Return whether the metric is the identity, without data."""
        return self.full is None and self.per_channel is None

    def times(self, kernel: Array) -> Real:
        """Return G A for A [parts, channels, *kernel, m]."""
        if self.full is not None:
            return np.asarray((self.full @ kernel.reshape(*self.full.shape[:2], -1)).reshape(kernel.shape))
        if self.per_channel is not None:
            return np.asarray(
                (self.per_channel @ kernel.reshape(*self.per_channel.shape[:2], -1)).reshape(kernel.shape)
            )
        return np.asarray(kernel, np.float64)

    def energy(self, kernel: Array) -> float:
        """Return trace(A^T G A)."""
        return float(np.vdot(kernel, self.times(kernel)))

    def error(self, kernel: Array, other: Array) -> float:
        """Return the energy of the difference as a share of the energy of ``kernel``; 0 for a kernel of zeros."""
        energy = self.energy(kernel)
        return max(self.energy(kernel - other), 0.0) / energy if energy > 0 else 0.0

    def channels(self, kernel: Sequence[int]) -> Real | None:
        """Return second moments of the channels, mean over the positions of the kernel; None for the identity."""
        return self.along(kernel, ())

    def along(self, kernel: Sequence[int], axes: Sequence[int]) -> Real | None:
        """Return second moments of channels x the kernel's positions along some axes, mean over its other axes.

        Args:
            kernel: sizes of the kernel.
            axes: the axes that are kept.

        Returns:
            [parts, m, m], m = channels x sizes along ``axes``; None for the identity.
        """
        num_positions = prod(kernel[a] for a in axes)
        if self.per_channel is not None:
            return np.asarray(np.kron(self.per_channel, np.eye(num_positions)))
        if self.full is None:
            return None
        rank, parts = len(kernel), len(self.full)
        full = self.full.reshape(parts, -1, *kernel, self.full.shape[1] // prod(kernel), *kernel)
        letters = iter("defghijklmnopqrs")
        first = [next(letters) for _ in range(rank)]
        second = [next(letters) if a in axes else first[a] for a in range(rank)]
        out = [*(first[a] for a in axes)], [*(second[a] for a in axes)]
        terms = f"xa{''.join(first)}b{''.join(second)}->xa{''.join(out[0])}b{''.join(out[1])}"
        mean = np.einsum(terms, full) / (prod(kernel) / num_positions)
        side = mean.shape[1] * num_positions
        return np.asarray(mean.reshape(parts, side, side))

    def projected(self, prefix: Sequence[Factor], kernel: Sequence[int]) -> tuple[Real | None, bool]:
        """Return T^T G T for a prefix T, and whether it holds separately for every remaining position of the kernel.

        Returns:
            [parts, f, f] with f the features (and remaining positions, unless separate); None: the identity.
        """
        if self.full is not None:
            if not prefix:
                return self.full, False
            parts, n, _ = self.full.shape
            half = features(prefix, self.full.reshape(parts, -1, *kernel, n)).reshape(parts, -1, n)
            turned = half.transpose(0, 2, 1).reshape(parts, -1, *kernel, half.shape[1])
            return features(prefix, turned).reshape(parts, half.shape[1], -1), False
        if not prefix:
            return self.per_channel, True
        first = prefix[0].stage
        parts = first.parts if self.per_channel is None else len(self.per_channel)
        composed = compose(prefix, parts, first.parts * first.inputs // parts)
        flat = composed.reshape(parts, -1, composed.shape[-1])
        return flat.transpose(0, 2, 1) @ self.times(composed).reshape(flat.shape), True


def root(moments: Real) -> Real:
    """Return L of G = L L^T [parts, n, n], with a larger ridge where rounding made G indefinite.

    Sums in float32 are off by a few millionths of the largest eigenvalue, which can be more than the ridge there is.

    Raises:
        LinAlgError: not even a ridge of the size of G helps: it is not finite.
    """
    for ridge in (0.0, *(RIDGE * 10.0**power for power in range(3))):
        try:
            return np.asarray(np.linalg.cholesky(ridged(moments, ridge)), np.float64)
        except np.linalg.LinAlgError:
            continue
    return np.asarray(np.linalg.cholesky(ridged(moments, 1.0)), np.float64)


def ridged(gram: Array, ridge: float = RIDGE) -> Real:
    """Add a ridge to the diagonal, parts separately; with the usual one, zero matrices become the identity."""
    n = gram.shape[-1]
    mean = np.einsum("...ii->...", gram) / n
    mean = np.where(mean > 0, mean, 1.0)
    result = np.array(gram, np.float64)
    np.einsum("...ii->...i", result)[...] += (ridge * mean)[..., None]
    return result


@dataclass(frozen=True, slots=True)
class Split:
    """A matrix M [parts, n, o] = core @ out by its directions of most output energy; truncated at any rank.

    Attributes:
        core: [parts, n, r].
        out: [parts, r, o].
        energies: of every direction, summed over parts, falling, [r].
    """

    core: Real
    out: Real
    energies: Real

    def at(self, rank: int) -> tuple[Real, Real]:
        """Return the best factors of that rank."""
        return self.core[..., :rank], self.out[:, :rank]


def fitted(metric: Metric, prefix: Sequence[Factor], kernel: Real) -> tuple[Real, Real | None, bool]:
    """Fit M = argmin |X (K - T M)|^2 = (T^T G T)^-1 T^T G K for a prefix T.

    Args:
        metric: the metric of the error, |X E|^2 = trace(E^T G E).
        prefix: factors whose product is T.
        kernel: K [parts, channels, *kernel, o].

    Returns:
        M [parts, features, *kernel left, o], and T^T G T with whether it holds per position, see ``Metric.projected``.
    """
    sizes = kernel.shape[2:-1]
    gram, per_position = metric.projected(prefix, sizes)
    if not prefix:
        return kernel, gram, per_position
    cross = features(prefix, metric.times(kernel))
    assert gram is not None
    # Columns of a prefix may be linearly dependent: use the minimum-norm solution.
    flat = cross.reshape(len(cross), gram.shape[-1], -1)
    scale = np.einsum("pii->p", gram)[:, None, None] / gram.shape[-1]
    damped = gram + 1e-10 * np.where(scale > 0, scale, 1.0) * np.eye(gram.shape[-1])
    solved: Real = np.asarray(np.linalg.solve(damped, flat), np.float64)
    return solved.reshape(cross.shape), gram, per_position


def split(matrix: Real, gram: Real | None, per_position: bool) -> Split:
    """Return directions of the output Y = X M by energy: eigenvectors of M^T G M.

    For wide outputs those of G^T/2 M M^T G^1/2. This is reduced-rank regression; with G the identity, the singular
    value decomposition of M. Zhang et al., Accelerating Very Deep Convolutional Networks, TPAMI 2016, section 3.1; Wang
    et al., SVD-LLM, ICLR 2025, for the whitened form.

    Args:
        matrix: M [parts, features, *kernel left, o].
        gram: G, see ``Metric.projected``; None for the identity.
        per_position: whether G holds separately per position, see ``Metric.projected``.
    """
    parts, outputs = len(matrix), matrix.shape[-1]
    flat = matrix.reshape(parts, -1, outputs)
    if outputs <= flat.shape[1]:
        energies, vectors = falling(flat.transpose(0, 2, 1) @ _apply(gram, matrix, per_position))
        return Split(flat @ vectors, vectors.transpose(0, 2, 1), energies)
    half: Real | None = None if gram is None else root(gram)
    white = flat if half is None else _apply(half.transpose(0, 2, 1), matrix, per_position)
    energies, vectors = falling(white @ white.transpose(0, 2, 1))
    core = vectors
    if half is not None:
        shaped = vectors.reshape(parts, half.shape[-1], -1)
        solved = [solve_triangular(r, v, trans="T", lower=True) for r, v in zip(half, shaped, strict=True)]
        core = np.stack(solved).reshape(vectors.shape)
    return Split(core, vectors.transpose(0, 2, 1) @ white, energies)


def _apply(gram: Real | None, matrix: Real, per_position: bool) -> Real:
    """Return G M as [parts, n, o], separately per position where G holds per position."""
    parts, outputs = len(matrix), matrix.shape[-1]
    if gram is None:
        return matrix.reshape(parts, -1, outputs)
    rows = matrix.shape[1] if per_position else -1
    return np.asarray(
        (gram @ matrix.reshape(parts, rows if per_position else gram.shape[-1], -1)).reshape(parts, -1, outputs)
    )


def falling(matrix: Real) -> tuple[Real, Real]:
    """Return eigenvalues of symmetric matrices [parts, n, n] from the largest, summed over parts, and their vectors."""
    values, vectors = np.linalg.eigh((matrix + matrix.transpose(0, 2, 1)) / 2)
    return np.maximum(values[:, ::-1], 0.0).sum(axis=0), np.ascontiguousarray(vectors[..., ::-1])


Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mode:
    """One rank of a decomposition.

    Attributes:
        name: name of the ranked axis.
        size: the largest useful rank.
        energies: energy that every step adds, falling; None where there is no such order.
        other: the longer side of the matrix whose singular values squared these are.
    """

    name: str
    size: int
    energies: Real | None = None
    other: int = 0


class Fit(ABC):
    """A decomposed kernel that gives factors of any rank."""

    modes: tuple[Mode, ...]
    note: str = ""

    @abstractmethod
    def factors(self, ranks: Ranks) -> list[Factor]:
        """Return the factors at these ranks, one per mode."""


class Method(ABC):
    """One way to factorize a kernel.

    Attributes:
        name: name on the command line.
        modes: names of its ranks, in their order.
    """

    name: str
    modes: tuple[str, ...] = ("rank",)

    @abstractmethod
    def refusal(self, shape: Shape) -> str:
        """Return the reason why this method cannot factorize kernels of this shape; empty where it can."""

    @abstractmethod
    def limits(self, shape: Shape) -> Ranks:
        """Return the largest rank of every mode, at which the factors equal the kernel."""

    @abstractmethod
    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """Return shapes of the factors at these ranks."""

    @abstractmethod
    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Decompose a kernel [parts, inputs, *kernel, outputs] with small errors under ``metric``."""


def shape_of(kernel: Real) -> Shape:
    """Return the sizes of a kernel [parts, inputs, *kernel, outputs]."""
    return Shape(kernel.shape[0], kernel.shape[1], tuple(kernel.shape[2:-1]), kernel.shape[-1])


def last(shape: Shape, inputs: int, axes: Sequence[int], role: str, outputs: int) -> Stage:
    """Return the stage that applies the kernel along ``axes``, from ``inputs`` channels of every part."""
    kernel = tuple(k if i in axes else 1 for i, k in enumerate(shape.kernel))
    return Stage(role, shape.parts, inputs, kernel, outputs, tuple(axes))


def pointwise(shape: Shape, role: str, inputs: int, outputs: int) -> Stage:
    """Return a stage that mixes channels at every position on its own."""
    return Stage(role, shape.parts, inputs, (1,) * len(shape.kernel), outputs)


def placed(stages: Sequence[Stage], arrays: Sequence[Real]) -> list[Factor]:
    """Return factors of these stages from their weights in any shape of the same order."""
    factors = []
    for stage, array in zip(stages, arrays, strict=True):
        factors.append(Factor(stage, array.reshape(stage.parts, stage.inputs, *stage.kernel, stage.outputs)))
    return factors


class Whitener:
    """Map by second moments G = L L^T: ``into`` returns L^T A, ``back`` a basis of the span of L^-T V.

    Args:
        moments: G [parts, n, n], positive definite; None for the identity.
    """

    def __init__(self, moments: Real | None) -> None:
        self._root = None if moments is None else root(moments)

    def into(self, matrix: Array) -> Real:
        """Return L^T A for A [parts, n, m]."""
        return np.asarray(matrix if self._root is None else self._root.transpose(0, 2, 1) @ matrix, np.float64)

    def back(self, vectors: Array) -> Real:
        """Return L^-T V for V [parts, n, m], columns of length 1: the last factor compensates the scale of a prefix."""
        if self._root is None:
            return np.asarray(vectors, np.float64)
        solved = [solve_triangular(r, v, trans="T", lower=True) for r, v in zip(self._root, vectors, strict=True)]
        basis = np.stack(solved)
        length = np.linalg.norm(basis, axis=1, keepdims=True)
        return np.asarray(basis / np.where(length > 0, length, 1.0))


# Random starts besides the one from singular vectors.
_STARTS = 2


class Degenerate(Exception):
    """Every start led to terms that cancel each other; there is no best approximation of that rank."""


class Cp(Method):
    """K = sum over r of outer products: 1x1 to r channels, each filtered along every axis in turn, 1x1.

    Lebedev et al., Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition, ICLR 2015.
    """

    name = "cp"

    def refusal(self, shape: Shape) -> str:
        """Return the reason why CP does not apply: it needs a kernel with positions, and channels to mix."""
        if not shape.wide:
            return "its kernel has one position: use svd"
        return "every factor would have a single channel on one side" if min(shape.inputs, shape.outputs) < 2 else ""

    def limits(self, shape: Shape) -> Ranks:
        """Return the rank at which any kernel is exact: the product of the sizes of all modes but the longest."""
        modes = [shape.inputs, *shape.kernel, shape.outputs]
        return (int(np.prod(modes, dtype=np.int64)) // max(modes),)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """Return 1x1, one filter per channel along every axis, 1x1."""
        rank, axes = ranks[0], shape.wide
        stages = [pointwise(shape, "in", shape.inputs, rank)]
        for i in axes:
            kernel = tuple(k if j == i else 1 for j, k in enumerate(shape.kernel))
            # The first filter also has the axes of kernel size 1, so that their strides apply early.
            covered = [j for j in range(len(shape.kernel)) if j == i or (i == axes[0] and j not in axes)]
            stages.append(Stage(f"axis{i}", shape.parts * rank, 1, kernel, 1, tuple(covered)))
        return [*stages, pointwise(shape, "out", rank, shape.outputs)]

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Return a fit that computes nothing until the rank is known."""
        return _CpFit(self, kernel, metric, seed)


class _CpFit(Fit):
    def __init__(self, method: Cp, kernel: Real, metric: Metric, seed: int) -> None:
        self._method, self._kernel, self._metric, self._seed = method, kernel, metric, seed
        self._shape = shape_of(kernel)
        self._white = Whitener(metric.channels(self._shape.kernel))
        self._whitened = self._white.into(kernel.reshape(*kernel.shape[:2], -1)).reshape(kernel.shape)
        self.modes = (Mode("rank", method.limits(self._shape)[0]),)

    def factors(self, ranks: Ranks) -> list[Factor]:
        """Return the factors.

        Raises:
            Degenerate: the terms of every start cancel each other.
        """
        shape, stages = self._shape, self._method.stages(self._shape, ranks)
        terms = [_terms(part, ranks[0], self._seed) for part in self._whitened]
        arrays = [self._white.back(np.stack([t[0] for t in terms]))]
        arrays += [np.concatenate([t[1 + i].T for t in terms]) for i in shape.wide]
        prefix = placed(stages[:-1], arrays)
        matrix, _, _ = fitted(self._metric, prefix, self._kernel)
        return [*prefix, *placed(stages[-1:], [matrix])]


def _terms(kernel: Real, rank: int, seed: int) -> list[Real]:
    """Return unit vectors of every mode but the outputs', [size, rank] each, of the start with least error.

    Long modes are first projected to their leading directions, as many as the rank, in which the terms are computed.
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
    # Imported on use: tensorly takes a while to load.

    best, error = None, np.inf
    for start in range(1 + _STARTS):
        vectors, off = least_squares(kernel, rank, seed + start, "svd" if start == 0 else "random")
        if off < error:
            best, error = vectors, off
    if best is None:
        raise Degenerate
    return [bases[mode] @ v if mode in bases else v for mode, v in enumerate(best[:-1])]


def _unit_terms(kernel: Real, rank: int) -> list[Real]:
    """Return one term for every position of all modes but the longest, which has the values: exact for any kernel."""
    longest = int(np.argmax(kernel.shape))
    others = [n if mode != longest else 1 for mode, n in enumerate(kernel.shape)]
    places = np.indices(others).reshape(kernel.ndim, -1)
    vectors = []
    for mode, size in enumerate(kernel.shape[:-1]):
        basis = np.eye(size)[:, places[mode]]
        if mode == longest:
            basis = np.moveaxis(kernel, mode, 0).reshape(size, -1)
        vectors.append(np.pad(basis, ((0, 0), (0, rank - basis.shape[1]))))
    return vectors


class SpatialSvd(Method):
    """K [channels x k1, k2 x o] of rank r: first along the first spatial axis, then along the others.

    Jaderberg et al., Speeding up Convolutional Neural Networks with Low Rank Expansions, BMVC 2014, scheme 2.
    """

    name = "spatial-svd"

    def refusal(self, shape: Shape) -> str:
        """Return the reason why spatial SVD does not apply: it needs two spatial axes."""
        return "" if len(shape.wide) > 1 else "its kernel extends along fewer than two axes"

    def limits(self, shape: Shape) -> Ranks:
        """Return the shorter side of the matrix."""
        first = shape.inputs * shape.kernel[shape.wide[0]]
        return (min(first, shape.columns // first * shape.inputs * shape.outputs),)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """Return a stage along one axis to r channels, and one along the others to the outputs."""
        first, others = _axes(shape)
        return [
            last(shape, shape.inputs, first, "first", ranks[0]),
            last(shape, ranks[0], others, "second", shape.outputs),
        ]

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Decompose into directions of channels x k1 by energy."""
        return _SpatialFit(self, kernel, metric)


def _axes(shape: Shape) -> tuple[list[int], list[int]]:
    """Return axes of the first factor (with those of kernel size 1: their strides apply early), and the others."""
    others = shape.wide[1:]
    return [i for i in range(len(shape.kernel)) if i not in others], others


class _SpatialFit(Fit):
    def __init__(self, method: SpatialSvd, kernel: Real, metric: Metric) -> None:
        self._method, self._kernel, self._metric = method, kernel, metric
        self._shape = shape = shape_of(kernel)
        axis = shape.wide[0]
        moved = np.moveaxis(kernel, 2 + axis, 2)
        matrix = moved.reshape(shape.parts, shape.inputs * shape.kernel[axis], -1)
        white = Whitener(metric.along(shape.kernel, [axis]))
        whitened = white.into(matrix)
        energies, vectors = falling(whitened @ whitened.transpose(0, 2, 1))
        self._basis = white.back(vectors)
        size, other = sorted(matrix.shape[1:])
        self.modes = (Mode("rank", size, energies[:size], other),)

    def factors(self, ranks: Ranks) -> list[Factor]:
        stages = self._method.stages(self._shape, ranks)
        first = placed(stages[:1], [self._basis[..., : ranks[0]]])
        matrix, _, _ = fitted(self._metric, first, self._kernel)
        return [*first, *placed(stages[1:], [matrix])]


class Svd(Method):
    """K [n, o] = core [n, r] out [r, o], n = channels x positions of the kernel.

    A layer with a kernel keeps it in the first factor (weight SVD of Zhang et al., TPAMI 2016, and of AIMET).
    """

    name = "svd"

    def refusal(self, shape: Shape) -> str:
        """Return the reason why SVD does not apply: it needs a matrix of two sides."""
        return "every factor would have a single channel on one side" if min(self.limits(shape)) < 2 else ""

    def limits(self, shape: Shape) -> Ranks:
        """Return the shorter side of the matrix."""
        return (min(shape.columns, shape.outputs),)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """Return the layer with r outputs, then 1x1."""
        everywhere = range(len(shape.kernel))
        return [
            last(shape, shape.inputs, everywhere, "core", ranks[0]),
            pointwise(shape, "out", ranks[0], shape.outputs),
        ]

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Decompose into the directions of the output by energy."""
        return _SvdFit(self, kernel, metric)


class _SvdFit(Fit):
    def __init__(self, method: Svd, kernel: Real, metric: Metric) -> None:
        self._method, self._shape = method, shape_of(kernel)
        self._split = split(*fitted(metric, (), kernel))
        size, other = sorted((self._shape.columns, self._shape.outputs))
        self.modes = (Mode("rank", size, self._split.energies, other),)

    def factors(self, ranks: Ranks) -> list[Factor]:
        return placed(self._method.stages(self._shape, ranks), self._split.at(ranks[0]))


LARGE = 5
"""Least number of positions along an axis that gets a rank of its own."""


class Tucker(Method):
    """K = core x_in U_in x_out U_out: 1x1, the core, 1x1. Kim et al., ICLR 2016.

    Ranks are those of the input and output channels; further ones, of spatial axes, make the core smaller there:
    every channel is then first filtered along that axis. A rank of 0 keeps a mode whole.
    """

    name = "tucker"
    modes = ("in", "out")

    def refusal(self, shape: Shape) -> str:
        """Return the reason why Tucker does not apply: a matrix has two modes at most, for which SVD is optimal."""
        if not shape.wide:
            return "its kernel has one position: use svd"
        return "every part of it has a single channel" if max(shape.inputs, shape.outputs) < 2 else ""

    def limits(self, shape: Shape) -> Ranks:
        """Return all channels."""
        return shape.inputs, min(shape.columns, shape.outputs)

    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """Return 1x1, filters along the axes with a rank of their own, the core with the rest of the kernel, 1x1."""
        into, out, *spatial = ranks
        stages, width = list[Stage](), shape.inputs
        if into:
            stages, width = [pointwise(shape, "in", width, into)], into
        axes = [i for i, r in enumerate(spatial) if r]
        for i in axes:
            kernel = tuple(k if j == i else 1 for j, k in enumerate(shape.kernel))
            stages.append(Stage(f"axis{i}", shape.parts * width, 1, kernel, spatial[i], (i,)))
            width *= spatial[i]
        others = [i for i in range(len(shape.kernel)) if i not in axes]
        stages.append(last(shape, width, others, "core", out or shape.outputs))
        return [*stages, pointwise(shape, "out", out, shape.outputs)] if out else stages

    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Decompose into directions of every mode by energy."""
        return _TuckerFit(self, kernel, metric, seed)


class _TuckerFit(Fit):
    def __init__(self, method: Tucker, kernel: Real, metric: Metric, seed: int) -> None:
        self._method, self._kernel, self._metric, self._seed = method, kernel, metric, seed
        self._shape = shape = shape_of(kernel)
        self._white = Whitener(metric.channels(shape.kernel))
        flat = kernel.reshape(shape.parts, shape.inputs, -1)
        whitened = self._white.into(flat)
        # The kernel in whitened channels: [parts, inputs, *kernel, outputs].
        self._whitened = whitened.reshape(kernel.shape)
        energies, _ = falling(whitened @ whitened.transpose(0, 2, 1))
        out = split(*fitted(metric, (), kernel)).energies
        into, max_out = method.limits(shape)
        large = max(shape.kernel, default=0) >= LARGE
        spatial = [self._axis(i) for i in range(len(shape.kernel))] if large else []
        self.modes = (
            Mode("in", into, energies, flat.shape[2]),
            Mode("out", max_out, out[:max_out], shape.columns),
            *spatial,
        )

    def _axis(self, i: int) -> Mode:
        """Return the mode of a spatial axis; a short one gets no rank of its own."""
        size = self._shape.kernel[i]
        moved = np.moveaxis(self._whitened, 2 + i, 1).reshape(self._shape.parts, size, -1)
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
        matrix, gram, per_position = fitted(self._metric, prefix, self._kernel)
        if not out:
            return [*prefix, *placed(stages[len(arrays) :], [matrix])]
        return [*prefix, *placed(stages[len(arrays) :], split(matrix, gram, per_position).at(out))]

    def _iterated(self, into: int, out: int, spatial: list[int]) -> dict[int, Real]:
        """Return mode bases {0: [parts, inputs, r], 1 + axis: [parts, k, r]}, by HOOI (De Lathauwer et al., 2000)."""
        # Imported on use: tensorly takes a while to load.

        modes = {0: into, **{1 + i: r for i, r in enumerate(spatial)}, self._whitened.ndim - 2: out}
        ranks = {mode: rank for mode, rank in modes.items() if rank}
        bases: dict[int, list[Real]] = {mode: [] for mode in ranks}
        for part in self._whitened:
            if len(ranks) == 1 and out:
                break
            for mode, basis in zip(ranks, orthogonal_iteration(part, ranks, self._seed), strict=True):
                bases[mode].append(basis)
        return {mode: np.stack(parts) for mode, parts in bases.items() if parts}


METHODS: dict[str, Method] = {m.name: m for m in (Svd(), Tucker(), Cp(), SpatialSvd())}
"""Every method by its name on the command line."""

__all__ = [
    "METHODS",
    "Cp",
    "Degenerate",
    "Fit",
    "Method",
    "Metric",
    "Mode",
    "Ranks",
    "SpatialSvd",
    "Svd",
    "Tucker",
    "compose",
    "shape_of",
]
