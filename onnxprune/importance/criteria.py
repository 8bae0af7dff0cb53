"""Importance criteria: pure functions from arrays to one score per channel of one slot. Arrays only.

In attention, a query slot's weights are the root mean square of the keys that the queries are multiplied with.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lapack
from scipy.linalg.blas import dgemm

from onnxprune.errors import ExtensionError, UsageError, argument, nearest
from onnxprune.importance.statistics import Maps
from onnxprune.plugins import Named, load_function

Criterion = Callable[..., "NDArray[Any] | None"]
"""``f(slot)``, or ``f(slot, maps)`` where it needs feature maps: scores [channels] of one slot, higher matters more;
None where the criterion does not apply to the slot."""

ENTRY_POINT = "onnxprune.importance.criteria"
_named: Named[Criterion] = Named("criterion", ENTRY_POINT)


def register(
    name: str,
    *,
    reads_all: bool = False,
    needs: Sequence[str] = (),
    comparable: bool = False,
    of_squares: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
) -> Callable[[Criterion], Criterion]:
    """Register a criterion under a name, as a decorator.

    Args:
        name: value of ``--criterion``.
        reads_all: the scores depend on every weight, so that NaN in a weight shows in them.
        needs: statistics of feature maps (see :class:`Maps`) that the criterion reads; with any, it takes two arguments
            and is called for contractions only. If empty, the result of :func:`needs_of`.
        comparable: scores of different layers compare as they are, so that nothing is divided out by default.
        of_squares: the same as a function of the sum of each channel's squared weights, [channels], where the criterion
            is one: those sums are computed for all axes of a weight at once, and the criterion itself is not called.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(criterion: Criterion) -> Criterion:
        _named.add(name, criterion)
        criterion.reads_all = reads_all  # type: ignore[attr-defined]
        criterion.comparable = comparable  # type: ignore[attr-defined]
        criterion.of_squares = of_squares  # type: ignore[attr-defined]
        criterion.needs = tuple(needs) or needs_of(criterion)  # type: ignore[attr-defined]
        return criterion

    return decorate


def needs(*statistics: str) -> Callable[[Criterion], Criterion]:
    """Declare the feature-map statistics that a function reads, without registering it, as a decorator."""

    def decorate(criterion: Criterion) -> Criterion:
        criterion.needs = statistics  # type: ignore[attr-defined]
        return criterion

    return decorate


def needs_of(criterion: Criterion) -> tuple[str, ...]:
    """Return the names of the statistics that a criterion reads; empty for one that reads weights alone.

    A function that is neither registered nor marked needs ``moments`` if it takes two arguments, else nothing.
    """
    declared = getattr(criterion, "needs", None)
    if declared is not None:
        return tuple(declared)
    try:
        parameters = list(inspect.signature(criterion).parameters.values())
    except (TypeError, ValueError):  # builtins and compiled functions may have no signature
        return ()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in by_position and p.default is p.empty]
    positional = [p for p in parameters if p.kind in by_position or p.kind is p.VAR_POSITIONAL]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(required) > 2 or not positional or named:
        raise ExtensionError(
            f"The criterion {getattr(criterion, '__name__', criterion)!r} cannot be called with a slot and maps",
            hint="Write it with one argument (a slot) or two (a slot and its feature maps).",
        )
    return ("moments",) if len(required) > 1 else ()


def unregister(name: str) -> None:
    """Remove a criterion from the registry, so that another can take its name."""
    _named.remove(name)


def get(name: str) -> Criterion:
    """Return the criterion of that name, or the function that ``script.py:function`` names.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    if ".py:" in name:
        hint = "Give script.py:function, from a slot to one score per channel."
        return load_function(name, argument("criterion"), hint)
    if name not in _named.names():
        raise UsageError(f"{argument('criterion')}: unknown criterion {name!r}", hint=nearest(name, names()))
    return _named.get(name)


def names() -> list[str]:
    """Return the names of all criteria, sorted."""
    return _named.names()


@dataclass(frozen=True, slots=True)
class Description:
    """The description of a criterion for lists, from its docstring.

    Attributes:
        name: value of ``--criterion``.
        measures: meaning of its scores, in a few words.
        needs: statistics of feature maps that it reads, so that it needs data; empty: weights alone.
        paper: authors, title, venue and year of its source; empty where the docstring names none.
    """

    name: str
    measures: str
    needs: tuple[str, ...]
    paper: str


_PAPER = re.compile(r"[A-Z]\w+ (?:et al\.|& [A-Z]\w+), [^.;]+? \d{4}\b")


def describe(name: str) -> Description:
    """Describe the criterion of that name.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    criterion = get(name)
    text = " ".join((inspect.getdoc(criterion) or "").split())
    first = re.split(r"[.,:;] | \[|\.$", text, maxsplit=1)[0]
    paper = _PAPER.search(text)
    measures = re.sub(r"^(?:Return|Draw|Compute) (?:the |a )?", "", first)
    return Description(name, measures, needs_of(criterion), paper[0] if paper else "")


@dataclass(slots=True, repr=False)
class Slot:
    """One weight along the channels of one group of units.

    Attributes:
        tensor: name of the weight.
        axis: the axis (of a grid: its pack axis) along which channels lie.
        blocks: the weight as [before, channels, after], a view where possible.
        role: (operator, input position) pairs of the nodes that read the weight.
        units: unit of every channel, [channels], numbers from 0.
        size: number of units in the group.
        seed: the run's seed and the group's number, for criteria that draw; see ``rng``.
        maps: statistics of the feature maps that the weight is multiplied with, for criteria that need them; else None.
            ``blocks`` is then the weight of one contraction as [1, channels, taps * outputs], taps (the positions of a
            kernel) outermost, and ``maps["gram"]`` has ``parts`` (convolution groups) blocks of ``channels / parts *
            taps`` columns, taps innermost; or, where that would be too large, of ``channels / parts`` columns.
        taps: positions of the contraction's kernel, 1 for a matrix product.
        classes: units that may stand in for each other (a head, a convolution group) have the same class, [channels].
        pairs: the other operand is no weight but an activation (queries with keys): ``blocks`` [1, channels, 1] then
            holds the root mean square of its channels.
    """

    tensor: str
    axis: int
    blocks: NDArray[Any]
    role: Sequence[tuple[str, int]]
    units: NDArray[np.int64]
    size: int
    seed: Sequence[int] = (0,)
    maps: Maps | None = None
    taps: int = 1
    classes: NDArray[np.int64] | None = None
    pairs: bool = False

    def __repr__(self) -> str:
        return f"<Slot: {self.blocks.shape[1]} channels on axis {self.axis} of {self.tensor}>"

    @property
    def rng(self) -> np.random.Generator:
        """Return a generator that is the same for every slot of a group: a unit draws the same number everywhere."""
        return np.random.default_rng(list(self.seed))

    @property
    def matrix(self) -> NDArray[Any]:
        """Return the weight as [channels, features], one row per channel; a copy unless channels come first."""
        before, channels, after = self.blocks.shape
        if before == 1:
            return self.blocks.reshape(channels, after)
        return self.blocks.transpose(1, 0, 2).reshape(channels, before * after)

    def reads(self, op: str, position: int) -> bool:
        """Return whether some ``op`` node reads the weight as input ``position``."""
        return (op, position) in self.role


__all__ = [
    "Criterion",
    "Description",
    "Maps",
    "Slot",
    "describe",
    "get",
    "names",
    "needs",
    "needs_of",
    "register",
    "unregister",
]


@register("l1", reads_all=True)
def l1(slot: Slot) -> NDArray[Any]:
    """Return the sum of absolute weights, sum_f |W_cf|. Shape [channels].

    Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    """
    return np.asarray(np.abs(slot.blocks).sum(axis=(0, 2)))


@register("l2", reads_all=True, of_squares=np.sqrt)
def l2(slot: Slot) -> NDArray[Any]:
    """Return the Euclidean norm, sqrt(sum_f W_cf^2). Shape [channels]."""
    return np.asarray(np.sqrt(np.einsum("pcf,pcf->c", slot.blocks, slot.blocks)))


@register("gm", reads_all=True)
def gm(slot: Slot) -> NDArray[Any]:
    """Return the distance to all other channels, sum_j ||W_c - W_j||. Shape [channels].

    A channel near the geometric median is replaceable by the others.
    He et al., Filter Pruning via Geometric Median, CVPR 2019, section 3.2. Distances come from one matrix product:
    ||a - b||^2 = ||a||^2 + ||b||^2 - 2ab.
    """
    matrix = np.asarray(slot.matrix, dtype=np.float64)
    matrix = matrix - matrix.mean(axis=0)
    square = np.einsum("cf,cf->c", matrix, matrix)
    distance = square[:, None] + square[None, :] - 2.0 * (matrix @ matrix.T)
    np.fill_diagonal(distance, 0.0)
    return np.asarray(np.sqrt(np.maximum(distance, 0.0)).sum(axis=1))


@register("lamp", reads_all=True)
def lamp(slot: Slot) -> NDArray[Any]:
    """Return squared weights over the sum of all that are not smaller. Shape [channels].

    sum_f W_cf^2 / sum_{|v| >= |W_cf|} v^2.

    The largest weight of a tensor gets 1, so scores compare between layers.
    Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021.
    """
    square = np.square(slot.blocks, dtype=np.float64).ravel()
    order = np.argsort(square)
    ascending = square[order]
    # The sum runs from the largest weight down; the first of several equal weights has them all in its sum.
    above = np.cumsum(ascending[::-1])[::-1]
    starts = np.flatnonzero(np.diff(ascending, prepend=-1.0))
    above = np.repeat(above[starts], np.diff(starts, append=ascending.size))
    square[order] = np.divide(ascending, above, out=np.zeros_like(above), where=above != 0)
    return np.asarray(square.reshape(slot.blocks.shape).sum(axis=(0, 2)))


@register("bn")
def bn(slot: Slot) -> NDArray[Any] | None:
    """Return the absolute BatchNorm scale |gamma_c|, shape [channels]; None for other slots.

    Liu et al., Network Slimming, ICCV 2017.
    """
    return np.abs(slot.blocks).sum(axis=(0, 2)) if slot.reads("BatchNormalization", 1) else None


@register("random")
def random(slot: Slot) -> NDArray[Any]:
    """Draw a seeded uniform number per unit: the baseline that every other criterion must beat. Shape [channels]."""
    return slot.rng.random(slot.size)[slot.units]


Scores = NDArray[Any] | None


@register("nuclear", needs=("nuclear",))
def nuclear(slot: Slot, maps: Maps) -> Scores:
    """Return the nuclear norm ||X_c||_* of a channel's maps, a matrix [samples, positions]. Shape [channels].

    The norm measures the channel's energy.
    Yeom et al., Toward Compact Deep Neural Networks via Energy-Aware Pruning, 2021.
    """
    return maps.get("nuclear")


@register("hrank", needs=("rank",))
def hrank(slot: Slot, maps: Maps) -> Scores:
    """Return the mean rank of a channel's map [height, width], shape [channels]; None without two spatial axes.

    Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020.
    """
    return maps.get("rank")


@register("apoz", needs=("active",))
def apoz(slot: Slot, maps: Maps) -> Scores:
    """Return 1 - average percentage of zeros, the share of activations that are not 0. Shape [channels].

    Hu et al., Network Trimming: A Data-Driven Neuron Pruning Approach, 2016.
    """
    return maps.get("active")


@register("activation", needs=("magnitude",))
def activation(slot: Slot, maps: Maps) -> Scores:
    """Return the mean magnitude E|x_c| of a channel's activations. Shape [channels].

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017.
    """
    return maps.get("magnitude")


@register("variance", needs=("mean", "square"), reads_all=True)
def variance(slot: Slot, maps: Maps) -> Scores:
    """Return the fluctuation Var(x_c) * sum_f W_cf^2, the error after a bias replaces the channel. Shape [channels].

    An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (FLAP), AAAI 2024.
    """
    if "mean" not in maps or "square" not in maps:
        return None
    return np.asarray(maps.variance * np.square(slot.blocks, dtype=np.float64).sum(axis=(0, 2)))


@register("wanda", needs=("square",), reads_all=True)
def wanda(slot: Slot, maps: Maps) -> Scores:
    """Return weights times the norm of the activations they multiply, sum_f |W_cf| * sqrt(E x_c^2). Shape [channels].

    Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), ICLR 2024, summed
    over a channel's weights.
    """
    if "square" not in maps:
        return None
    return np.asarray(np.sqrt(maps["square"]) * np.abs(slot.blocks).sum(axis=(0, 2), dtype=np.float64))


@register("cosine", needs=("similarity",))
def cosine(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """Return the novelty of a map: 1 - max_j |cos(x_c, x_j)| over the channels j that are stronger. Shape [channels].

    Stronger means a larger mean square, then a lower index, so that one of two equal channels remains. Channels of one
    unit are pruned together and do not replace each other. The strongest channel has 1, a dead channel 0. A form of
    redundancy pruning as in Ayinde & Zurada, Building Efficient ConvNets using Redundant Feature Pruning, ICLR workshop
    2018, on feature maps in place of filters.
    """
    if "similarity" not in maps:
        return None
    square = np.diagonal(maps["similarity"])
    place = np.empty(square.size, dtype=np.int64)
    place[np.argsort(-square, kind="stable")] = np.arange(square.size)
    return _novelty(maps["similarity"], (place[None, :] < place[:, None]) & _distances(slot.units))


@register("snp", needs=("similarity", "square"))
def snp(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """Return the change of attention without a dimension, shape [channels]; None for slots outside attention.

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
    return _novelty(maps["similarity"], _distances(slot.classes))


def _distances(owner: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask over pairs of channels with different owners, [channels, channels]."""
    return np.asarray(owner[:, None] != owner[None, :])


def _novelty(similarity: NDArray[np.float64], rivals: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return 1 - the largest |cosine| of each channel with its rivals, [channels]; 1 without any, 0 for a dead one."""
    norm = np.sqrt(np.diagonal(similarity))
    scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    alike = np.abs(similarity) * scale[:, None]
    alike *= scale
    alike *= rivals
    return np.where(norm > 0, np.maximum(1.0 - alike.max(axis=1), 0.0), 0.0)


DAMPING = 1e-3
"""As a share of the mean diagonal: far above the rounding of a Gram matrix, far below the energy of a channel in use.
"""

PIECE = 1 << 22
"""Elements of stacked blocks that are processed at a time."""


@register("obs", needs=("gram", "square"), reads_all=True)
def obs(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """Return the error of pruning a unit S after the best correction, shared by its channels. Shape [channels].

    tr(W_S^T ([H^-1]_SS)^-1 W_S), with H = E[x x^T] + 1e-3 mean(diag) I over the columns of the contraction's input
    and S the columns of a unit; columns that are 0 on all data add nothing. Where the Gram matrix has no taps, every
    tap is a further output. Queries and keys have no weights to correct: their score is E[q_i^2] E[k_i^2], the energy
    of their product. Hassibi & Stork, Second Order Derivatives for Network Pruning, NeurIPS 1992; by units: Kurtic et
    al., ZipLM, NeurIPS 2023.
    """
    if slot.pairs:
        if "square" not in maps:
            return None
        return np.asarray(maps["square"] * np.square(slot.blocks, dtype=np.float64).sum(axis=(0, 2)))
    if "gram" not in maps:
        return None
    gram = maps["gram"]
    parts, n, _ = gram.shape
    per_channel = parts * n // slot.units.size
    weights = slot.blocks.reshape(parts, n, -1)
    damping = DAMPING * float(np.mean(np.einsum("pii->pi", gram)))
    owner = np.repeat(slot.units.reshape(parts, -1), per_channel, axis=1)
    total = np.zeros(slot.size)
    if damping > 0:
        for part in range(parts):
            _add_part(total, gram[part], weights[part], owner[part], damping)
    return np.asarray((total / np.maximum(np.bincount(slot.units, minlength=slot.size), 1))[slot.units])


def _add_part(
    total: NDArray[np.float64],
    gram: NDArray[np.float64],
    weights: NDArray[Any],
    owner: NDArray[np.int64],
    damping: float,
) -> None:
    """Add the errors of the units of one part, gram [n, n], weights [n, outputs], owner [n]."""
    inverse = _inverse(gram, damping)
    used = np.diagonal(gram) > 0
    for units, columns in units_by_columns(owner):
        for chunk in _runs(units.size, columns.shape[1] * max(columns.shape[1], weights.shape[1])):
            at = columns[chunk]
            # The inverse holds its lower triangle alone, and columns ascend.
            lower = np.tril(inverse[at[:, :, None], at[:, None, :]])
            block = lower + np.tril(lower, -1).swapaxes(1, 2)
            unit_weights = weights[at] * used[at][:, :, None]
            total[units[chunk]] += np.einsum(
                "kco,kco->k", unit_weights, np.linalg.solve(block, unit_weights.astype(np.float64))
            )


def _inverse(gram: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """Return the lower triangle of (gram + damping * I)^-1, by Cholesky: a third of the work of a general inverse."""
    square = np.array(gram, dtype=np.float64, order="F")
    square.flat[:: square.shape[0] + 1] += damping
    factor, failed = lapack.dpotrf(square, lower=1, overwrite_a=1)
    if not failed:
        factor, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed:  # rounding made it indefinite: a Gram matrix that was not accumulated here, or a damping far too small
        return np.asarray(np.linalg.pinv(gram + damping * np.eye(gram.shape[0]), hermitian=True))
    return np.asarray(factor)


def units_by_columns(owner: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (units, their columns [units, count]) for every number of columns that units have."""
    order = np.argsort(owner, kind="stable")
    present, first, counts = np.unique(owner[order], return_index=True, return_counts=True)
    for count in np.unique(counts):
        these = counts == count
        yield present[these], order[first[these][:, None] + np.arange(count)]


def _runs(size: int, each: int) -> Iterator[slice]:
    """Yield slices of ``size`` items of ``each`` elements that keep within ``PIECE``."""
    step = max(1, PIECE // max(1, each))
    for start in range(0, size, step):
        yield slice(start, start + step)


Real = NDArray[np.float64]

# Groups of up to so many units lose one unit at a time; larger groups lose this share at once.
_ROUNDS = 128
# Share of the columns below which those that were removed are left out of the matrices.
_DENSE = 0.8


@register("ziplm", needs=("gram", "square"), reads_all=True, comparable=True)
def ziplm(slot: Slot, maps: Maps) -> NDArray[Any] | None:
    """Return the error that each unit adds when units are pruned weakest first, with correction in between. [channels].

    tr(W_S^T ([H^-1]_SS)^-1 W_S) of the next unit S, then W -= H^-1_:S ([H^-1]_SS)^-1 W_S and likewise H^-1. H is the
    covariance of the columns (biases are corrected too) plus 1e-3 of its mean diagonal. Products of different columns
    are shrunk by rows / (rows + columns), since estimates from few rows may not generalize. A unit never scores less
    than one pruned before it. One of two redundant units remains, whereas ``obs`` prunes both. Scores are relative to
    the square root of the contraction's output energy, so that they compare between layers.
    Kurtic et al., ZipLM, NeurIPS 2023, section 3.1.
    """
    if slot.pairs:
        product = obs(slot, maps)
        return None if product is None else product / np.sqrt(max(float(product.sum()), 1e-300))
    if "gram" not in maps:
        return None
    gram, mean = maps["gram"], maps["column_mean"]
    parts, n, _ = gram.shape
    weights = slot.blocks.reshape(parts, n, -1).astype(np.float64)
    owner = np.repeat(slot.units.reshape(parts, -1), parts * n // slot.units.size, axis=1)
    covariance = gram - mean[:, :, None] * mean[:, None, :]
    # With few rows, columns are correlated by chance and seem to replace each other: shrink their common part.
    believed = _belief(maps, n)
    covariance = believed * covariance + (1.0 - believed) * covariance * np.eye(n)
    energy = float(np.einsum("pno,pno->", weights, covariance @ weights))
    power = np.einsum("pii->pi", covariance)
    weights[power <= 1e-12 * power.max(initial=0.0)] = 0.0  # the bias corrects constant columns
    damping, total = DAMPING * float(power.mean()), np.zeros(slot.size)
    for part in range(parts if damping > 0 else 0):
        total += eliminate(covariance[part], weights[part], owner[part], slot.size, damping)
    total /= np.sqrt(energy) if energy > 0 else 1.0
    return np.asarray((total / np.maximum(np.bincount(slot.units, minlength=slot.size), 1))[slot.units])


def _belief(maps: Maps, columns: int) -> float:
    """Return the shrinkage of products of different columns: rows / (rows + columns).

    Rows of one sample are neighbouring positions and highly correlated: n rows of a sample count as sqrt(n).
    """
    rows = float(maps["rows"]) if "rows" in maps else 0.0
    if not rows:
        return 1.0
    counted = np.sqrt(rows * min(max(maps.samples, 1), rows))
    return float(counted / (counted + columns))


def corrected(maps: Maps, weights: Real, mask: NDArray[np.bool_], *, biased: bool) -> tuple[Real, Real]:
    """Return weights that correct for removed columns, W_K + (H_KK)^-1 H_KR W_R and 0, and the biases to add.

    H is that of :func:`ziplm`; it is not centred where the contraction has no bias.

    Args:
        maps: ``gram``, ``column_mean`` and ``rows`` of the contraction.
        weights: [parts, n, outputs].
        mask: mask over the removed columns, [parts, n].
        biased: whether the contraction has biases.
    """
    gram, mean = maps["gram"], maps["column_mean"]
    parts, n, outputs = weights.shape
    result, shift = np.where(mask[:, :, None], 0.0, weights), np.zeros((parts, outputs))
    believed = _belief(maps, n)
    for part in np.flatnonzero(mask.any(axis=1)):
        removed, survivors = np.flatnonzero(mask[part]), np.flatnonzero(~mask[part])
        products = gram[part] - np.outer(mean[part], mean[part]) if biased else gram[part]
        power = float(np.trace(products)) / n
        if survivors.size and power > 0:
            block = believed * products[np.ix_(survivors, survivors)]
            block.flat[:: survivors.size + 1] = np.diagonal(products)[survivors] + DAMPING * power
            across = believed * products[np.ix_(survivors, removed)] @ weights[part, removed]
            result[part, survivors] += _solve_symmetric(block, across)
        if biased:
            shift[part] = mean[part] @ (weights[part] - result[part])
    return result, shift


def _solve_symmetric(matrix: Real, right: Real) -> Real:
    """Solve M X = R for a symmetric M that is positive definite, but for rounding."""
    try:
        return np.asarray(cho_solve(cho_factor(matrix, check_finite=False), right, check_finite=False))
    except LinAlgError:
        return np.asarray(np.linalg.solve(matrix, right))


def eliminate(covariance: Real, weights: Real, owner: NDArray[np.int64], size: int, damping: float) -> Real:
    """Return the errors [size] that units add in the order in which they are pruned.

    Args:
        covariance: [n, n].
        weights: [n, outputs].
        owner: unit of every column, [n].
        size: number of units.
        damping: value added to the diagonal.
    """
    scores, remaining = np.zeros(size), list(units_by_columns(owner))
    inverse = np.ascontiguousarray(np.linalg.inv(covariance + damping * np.eye(len(covariance))), np.float64)
    weights, highest = weights.copy(), 0.0
    while remaining:
        errors = [_errors(inverse, weights, columns) for _, columns in remaining]
        count = max(1, sum(u.size for u, _ in remaining) // _ROUNDS)
        limit = np.partition(np.concatenate(errors), count - 1)[count - 1]
        weakest = [np.flatnonzero(e <= limit)[:count] for e in errors]
        columns = np.concatenate([c[g].ravel() for (_, c), g in zip(remaining, weakest, strict=True)])
        for (units, _), unit_errors, indices in zip(remaining, errors, weakest, strict=True):
            scores[units[indices]] = np.maximum(unit_errors[indices], highest)
        highest = max(highest, float(limit))
        _remove(inverse, weights, columns)
        reduced = [(np.delete(u, g), np.delete(c, g, axis=0)) for (u, c), g in zip(remaining, weakest, strict=True)]
        remaining = [(u, c) for u, c in reduced if u.size]
        active = np.sort(np.concatenate([c.ravel() for _, c in remaining] or [columns[:0]]))
        if active.size < _DENSE * len(inverse):  # rows of removed columns are 0 and cost as much as others
            inverse, weights = inverse[np.ix_(active, active)], weights[active]
            remaining = [(u, np.searchsorted(active, c)) for u, c in remaining]
    return scores


def _errors(inverse: Real, weights: Real, columns: NDArray[np.int64]) -> Real:
    """Return the error that pruning each unit [k] with columns [k, c] would add now."""
    unit_weights = weights[columns]
    solved = np.linalg.solve(inverse[columns[:, :, None], columns[:, None, :]], unit_weights)
    return np.asarray(np.einsum("kco,kco->k", unit_weights, solved))


def _remove(inverse: Real, weights: Real, columns: NDArray[np.int64]) -> None:
    """Correct the other weights for removed columns, and remove these from the inverse, in place."""
    across = inverse[:, columns]
    block = inverse[np.ix_(columns, columns)]
    solved = np.linalg.solve(block, np.concatenate([weights[columns], across.T], axis=1))
    weights -= across @ solved[:, : weights.shape[1]]
    # In place; of the transposes, since Fortran's order is the other.
    change = np.ascontiguousarray(solved[:, weights.shape[1] :])
    dgemm(-1.0, change.T, np.ascontiguousarray(across).T, 1.0, inverse.T, overwrite_c=True)
    weights[columns] = 0.0
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0


# -- gradients of the loss -------------------------------------------------------------------------------------------


@register("gradient", needs=("gradient",), reads_all=True)
def gradient(slot: Slot, maps: Maps) -> Scores:
    """Return the sum of absolute gradients of the loss, sum_f |g_cf|. Shape [channels].

    g is the gradient of the mean loss over the data.
    """
    return np.abs(maps["gradient"]).sum(axis=(0, 2)) if "gradient" in maps else None


@register("snip", needs=("gradient",), reads_all=True, comparable=True)
def snip(slot: Slot, maps: Maps) -> Scores:
    """Return the connection sensitivity of weights, sum_f |W_cf g_cf|. Shape [channels].

    g is the gradient of the mean loss over the data.
    Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019, summed over a channel's
    weights.
    """
    return _products(slot, maps["gradient"]) if "gradient" in maps else None


@register("snip-momentum", needs=("gradient_total",), reads_all=True, comparable=True)
def snip_momentum(slot: Slot, maps: Maps) -> Scores:
    """Return the connection sensitivity, added up over calls: score_n = score_(n-1) + 0.9 |W g_n|. Shape [channels].

    g_n is the gradient of the mean loss over the n-th call; scores of weights are summed over a channel. As in Intel's
    Neural Compressor, for weights that stay as they are.
    """
    return 0.9 * _products(slot, maps["gradient_total"]) if "gradient_total" in maps else None


@register("taylor", needs=("gate_magnitude",), reads_all=True, comparable=True)
def taylor(slot: Slot, maps: Maps) -> Scores:
    """Return the first-order change of the loss without a channel, E_n |sum_f W_cf g_ncf|. Shape [channels].

    g_n is the gradient of the loss of the n-th sample.
    Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, with magnitudes in place of squares.
    """
    return maps.get("gate_magnitude")


@register("fisher", needs=("gate_square",), reads_all=True, comparable=True)
def fisher(slot: Slot, maps: Maps) -> Scores:
    """Return the second-order change of the loss without a channel, E_n (sum_f W_cf g_ncf)^2 / 2. Shape [channels].

    The mean of squares of gradients of single samples, their classes drawn from the model's own probabilities, is the
    Fisher information of the channel's gate.
    Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018.
    """
    return 0.5 * maps["gate_square"] if "gate_square" in maps else None


@register("obd", needs=("gradient_square",), reads_all=True, comparable=True)
def obd(slot: Slot, maps: Maps) -> Scores:
    """Return the second-order change of the loss without each weight, sum_f h_cf W_cf^2 / 2. Shape [channels].

    h is the diagonal of the Gauss-Newton matrix of the loss, the mean of g_n^2 over samples whose classes are drawn
    from the model's own probabilities.
    LeCun et al., Optimal Brain Damage, NeurIPS 1989.
    """
    if "gradient_square" not in maps:
        return None
    square = np.square(slot.blocks, dtype=np.float64)
    return np.asarray(0.5 * np.einsum("pcf,pcf->c", square, maps["gradient_square"]))


def _products(slot: Slot, gradients: NDArray[Any]) -> NDArray[np.float64]:
    """Return the sum of |weights times gradients| of every channel."""
    return np.asarray(np.abs(slot.blocks.astype(np.float64) * gradients).sum(axis=(0, 2)))
