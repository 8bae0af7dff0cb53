"""Statistics of feature maps, accumulated batch by batch in float64. Arrays only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import ModelError
from onnxprune.plugins import Named


@dataclass(frozen=True, slots=True)
class Maps:
    """Statistics of the feature maps in front of one contraction, in the order of its slot's channels.

    Attributes:
        samples: number of samples accumulated.
        arrays: statistics by name, float64; ``maps["mean"]`` reads one. ``moments`` gives ``mean``, ``square`` (mean of
            squares), ``magnitude`` (mean of absolute values) and ``active`` (share that is not 0), each [channels], and
            each is a statistic of its own too; ``nuclear`` and ``rank`` give themselves, [channels]; ``similarity``
            gives ``similarity`` [channels, channels], the mean of products of two channels; ``gram`` gives ``gram``
            [parts, n, n], the mean of products of two columns of the contraction's input, see ``Slot.taps``, and
            ``column_mean`` [parts, n]; ``GRADIENTS`` are statistics of gradients. A statistic that could not be
            computed is missing.
    """

    samples: int = 0
    arrays: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.arrays[name]

    def get(self, name: str) -> NDArray[np.float64] | None:
        """Return the statistic of that name, None where it is missing."""
        return self.arrays.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    @property
    def variance(self) -> NDArray[Any]:
        """Return the mean of squares less the square of the mean, [channels]; never negative."""
        return np.maximum(self.arrays["square"] - np.square(self.arrays["mean"]), 0.0)


GRADIENTS = ("gradient", "gradient_total", "gradient_square", "gate_magnitude", "gate_square")
"""Statistics of the gradient g of the loss with respect to the weights w of one slot, for criteria of weights.

``gradient`` is that of the mean loss, ``gradient_total`` the sum of |g| over calls, ``gradient_square`` the mean of g^2
over samples, all of the shape of ``Slot.blocks``; ``gate_magnitude`` is the mean of |sum_f w_cf g_cf| over samples and
``gate_square`` that of its square, [channels]. The loss is that of labels where they are given; else of the class that
the model itself finds likeliest, and for squares of classes drawn from its probabilities."""


class Statistic(Protocol):
    """Something that is accumulated over batches of feature maps.

    Attributes:
        name: the name in a criterion's ``needs``, set by :func:`register`.
        columns: whether ``update`` gets the columns of the contraction's input instead of its channels' maps.
        additive: batches may be joined before ``update`` gets them, with the same result; False where a class does
            not set it, and ``update`` then gets every call's batch unchanged.
        state: everything accumulated so far, plain arrays; assigning a saved state resumes from it, bit for bit.
            ``update`` makes new arrays and does not change those of a state that was read.
    """

    name: ClassVar[str] = ""
    columns: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    state: dict[str, NDArray[Any]]

    def update(self, maps: NDArray[Any]) -> None:
        """Accumulate one batch: maps [samples, channels, *space], or columns [parts, rows, n].

        Raises:
            NotFinite: there is NaN or infinity in it.
        """

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Return the final arrays by their names in ``Maps``; empty where nothing could be computed."""


ENTRY_POINT = "onnxprune.importance.statistics"
T = TypeVar("T", bound=type[Statistic])
_named: Named[type[Statistic]] = Named("statistic", ENTRY_POINT)


def register(name: str, *, columns: bool = False) -> Callable[[T], T]:
    """Register a class that takes no arguments under the name that criteria request, as a decorator.

    Args:
        name: the name in a criterion's ``needs``.
        columns: ``update`` gets columns [parts, rows, n] instead of maps [samples, channels, *space].

    Raises:
        ValueError: the name is taken.
    """

    def decorate(statistic: T) -> T:
        _named.add(name, statistic)
        statistic.name, statistic.columns = name, columns
        return statistic

    return decorate


def unregister(name: str) -> None:
    """Remove a statistic from the registry, so that another can take its name."""
    _named.remove(name)


def get(name: str) -> type[Statistic]:
    """Return the class of that name; make one instance per contraction.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    return _named.get(name)


def names() -> list[str]:
    """Return the names of all statistics, sorted."""
    return _named.names()


class NotFinite(ModelError):
    """NaN or infinity in a feature map. A caller that knows the tensor catches this and names it."""

    def __init__(self, message: str = "A feature map holds NaN or infinity.") -> None:
        super().__init__(
            message, hint="The model overflows on this data: check the scale of the data, or use other data."
        )


class Means(Statistic):
    """A statistic that is a mean over batches, result = sum over batches / sum of their weights.

    Subclasses compute what one batch adds to the sums; the sums are kept in float64.

    Attributes:
        additive: a batch adds the same as its samples one by one, so that batches may be joined.
        tells: NaN and infinity in the maps always show in the sums, so that the maps need not be scanned for them.
    """

    additive: ClassVar[bool] = False
    tells: ClassVar[bool] = False

    def __init__(self) -> None:
        self.state: dict[str, NDArray[Any]] = {}

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Return the weight of one batch and its sums by name, in new arrays; 0 and none to skip the batch.

        Maps are not empty, float16, float32 or float64, and finite unless ``tells``.
        """
        raise NotImplementedError

    def update(self, maps: NDArray[Any]) -> None:
        """Add one batch.

        Raises:
            NotFinite: there is NaN or infinity in it.
        """
        maps = floating(maps)
        if not maps.size:
            return
        if not self.tells:
            check_finite(maps)
        weight, sums = self.measure(maps)
        if not weight:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            finite = all(math.isfinite(value.sum()) for value in sums.values())
        if self.tells and not finite:  # sums may also overflow over finite values
            check_finite(maps)
        # Add into the new arrays, never into the old ones, so that a state that a caller holds does not change.
        for name, value in sums.items():
            if name in self.state:
                value += self.state[name]
        self.state = {**sums, "weight": np.asarray(weight + int(self.state.get("weight", 0)))}

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Return the means by name; empty before the first batch."""
        return {name: value / self.state["weight"] for name, value in self.state.items() if name != "weight"}


def floating(maps: NDArray[Any]) -> NDArray[Any]:
    """Convert maps to float16, float32 or float64."""
    if maps.dtype in (np.float16, np.float32, np.float64):
        return maps
    # Integers other than the narrow ones would lose digits in float32.
    return maps.astype(np.float64 if maps.dtype.kind in "iu" and maps.dtype.itemsize > 2 else np.float32)


def check_finite(maps: NDArray[Any]) -> None:
    """Reject NaN and infinity.

    Raises:
        NotFinite: there are some.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = maps.sum(dtype=np.float32 if maps.dtype == np.float16 else maps.dtype)
    # A sum of finite values may overflow too: check every element only where the sum is not finite.
    if not np.isfinite(total) and not np.isfinite(maps).all():
        raise NotFinite


__all__ = ["Maps", "Means", "NotFinite", "Statistic", "get", "names", "register", "unregister"]


PIECE = 1 << 18
"""Elements that are processed at a time: few enough to stay in a processor's cache."""

# Positions of a map below which they are too few to be summed map by map.
_FEW = 16
# Values that are summed in float32 at a time.
_RUN = 128
# Samples whose flags can be counted in a byte.
_BYTE = 255
# Sums of squares below this may have lost digits in float32.
_TINY = 1e-30

Array = NDArray[Any]
Real = NDArray[np.float64]


@register("moments")
class Moments(Means):
    """``mean``, ``square`` (of squares), ``magnitude`` (of |x|), ``active`` (share that is not 0), each [channels].

    Means over samples and positions, E[x], E[x^2], E[|x|], E[x != 0]. Float32 is summed in float32 over at most 128
    values, and those sums in float64: ``square`` and ``magnitude`` are right to some 1e-7 of themselves, ``mean`` to
    as much of ``magnitude``, and closer where there are many values, whose rounding evens out.
    """

    parts: ClassVar[Sequence[str]] = ("mean", "square", "magnitude", "active")
    additive = True
    tells = True

    def measure(self, maps: Array) -> tuple[int, dict[str, Real]]:
        """Sum over all positions of all samples; the weight is their number."""
        channels = maps.shape[1]
        sums = np.zeros((len(self.parts), channels))
        with np.errstate(over="ignore", invalid="ignore"):
            for values, channel_range in _laid_out(maps):
                totals = _sums(values, self.parts)
                for row, part in zip(sums[:, channel_range], self.parts, strict=True):
                    row += totals[part].reshape(row.size, -1).sum(axis=1)
        return maps.size // channels, dict(zip(self.parts, sums, strict=True))


@register("mean")
class Mean(Moments):
    """``mean`` [channels] alone, as in ``moments``."""

    parts = ("mean",)


@register("square")
class Square(Moments):
    """``square`` [channels] alone, as in ``moments``."""

    parts = ("square",)


@register("magnitude")
class Magnitude(Moments):
    """``magnitude`` [channels] alone, as in ``moments``."""

    parts = ("magnitude",)


@register("active")
class Active(Moments):
    """``active`` [channels] alone, as in ``moments``."""

    parts = ("active",)
    tells = False  # NaN counts as active


def _laid_out(maps: Array) -> Iterator[tuple[Array, slice]]:
    """Yield pieces of maps, and their channels.

    A piece is [samples, channels, positions] where the positions are contiguous and many, else [rows, ...] to be summed
    over rows, with the channels' values (one or more each) behind them.
    """
    samples, channels = maps.shape[:2]
    flat = maps.reshape(samples, channels, -1)
    positions = flat.shape[2]
    if positions >= _FEW and flat.strides[2] == flat.itemsize:
        for sample_slice, channel_slice in _pieces(flat.shape):
            yield flat[sample_slice, channel_slice], channel_slice
        return
    if positions >= _FEW or flat.strides[1] == flat.itemsize:  # channels are contiguous
        turned = np.moveaxis(flat, 1, 2)
        rows, columns = turned.reshape(samples * positions, channels), 1
    else:
        rows, columns = flat.reshape(samples, channels * positions), positions
    step = max(1, PIECE // max(1, min(len(rows), _BYTE)) // columns)
    for start in range(0, channels, step):
        channel_slice = slice(start, min(start + step, channels))
        high = max(1, PIECE // ((channel_slice.stop - start) * columns))
        for top in range(0, len(rows), high):
            yield rows[top : top + high, start * columns : channel_slice.stop * columns], channel_slice


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of samples and channels with about ``PIECE`` elements, whole maps each."""
    samples, channels, positions = shape
    high = min(samples, _BYTE)
    wide = max(1, PIECE // max(1, high * positions))
    for top in range(0, samples, high):
        for first in range(0, channels, wide):
            yield slice(top, top + high), slice(first, first + wide)


def _sums(values: Array, parts: Sequence[str]) -> dict[str, Real]:
    """Return the requested sums over samples and positions [s, channels, p], or over rows [rows, columns]."""
    totals: dict[str, Real] = {}
    if "active" in parts:
        totals["active"] = _count(values != 0)
    if "mean" in parts:
        totals["mean"] = _total(values)
    if "magnitude" in parts:
        # Behind a ReLU values are their own magnitudes.
        plain = "mean" in totals and values.min() >= 0
        totals["magnitude"] = totals["mean"] if plain else _total(np.abs(values))
    if "square" in parts:
        totals["square"] = _squares(values)
    if values.dtype != np.float64 and not _is_precise(totals, values):
        return _sums(values.astype(np.float64), parts)
    return totals


def _is_precise(totals: dict[str, Real], values: Array) -> bool:
    """Return whether float32 sums kept their digits: finite values may leave its range, squares at either end."""
    if not all(math.isfinite(sums.sum()) for sums in totals.values()):
        return False
    low = totals["square"] <= _TINY if "square" in totals else np.zeros(0, bool)
    # A channel that is 0 throughout is exact.
    return not low.any() or not values[:, low].any()


def _total(values: Array) -> Real:
    """Sum values; a product with ones takes half the time of a sum."""
    if values.ndim == 2:
        return _added([np.ones(r.shape[1], r.dtype) @ r for r in _runs(values, 0)], 2)
    return _added([_dots(r) for r in _runs(values, 2)], 3)


def _dots(runs: Array) -> Array:
    """Return sums of runs [s, channels, runs, p] as [s, channels, runs], by one product per sample where contiguous."""
    s, channels, count, length = runs.shape
    ones = np.ones(length, runs.dtype)
    if runs.strides[1] == count * runs.strides[2]:
        return np.asarray(runs.reshape(s, channels * count, length) @ ones).reshape(s, channels, count)
    return np.asarray(runs @ ones if length >= _FEW else runs.sum(axis=3))


def _squares(values: Array) -> Real:
    if values.ndim == 2:
        return _added([np.einsum("krc,krc->kc", r, r) for r in _runs(values, 0)], 2)
    return _added([np.einsum("ncrp,ncrp->ncr", r, r) for r in _runs(values, 2)], 3)


def _count(busy: NDArray[np.bool_]) -> Real:
    """Count the flags that are set: up to 255 of them are counted in a byte, samples or rows first."""
    bits = busy.view(np.uint8)
    total = np.zeros(bits.shape[1])
    for first in range(0, len(bits), _BYTE):
        chunk = bits[first : first + _BYTE]
        counted = np.add.reduce(chunk, axis=0, dtype=np.uint8)
        if counted.ndim == 2:
            length = counted.shape[1]
            max_folds = min(_BYTE // len(chunk), length // _RUN)
            folds = next((k for k in range(max_folds, 1, -1) if length % k == 0), 1)
            counted = np.add.reduce(counted.reshape(-1, folds, length // folds), axis=1, dtype=np.uint8)
            total += _total(counted.astype(np.float32)[None])
        else:
            total += counted
    return total


def _runs(values: Array, axis: int) -> list[Array]:
    """Split values along ``axis`` into runs short enough to be summed in their own type, and a remainder.

    [rows, columns] as [runs, rows of a run, columns]; [s, channels, p] as [s, channels, runs, p of a run].
    """
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    length = values.shape[axis]
    fewest = 1 if values.dtype == np.float64 else -(-length // _RUN)
    count = next((k for k in range(fewest, 2 * fewest) if length % k == 0), fewest)
    run = length // count
    if axis == 0:
        num_in_runs = count * run
        spread = values[:num_in_runs].reshape(count, run, values.shape[1])
        return [spread] if num_in_runs == length else [spread, values[None, num_in_runs:]]
    if count * run == length:
        return [values.reshape(*values.shape[:2], count, run)]
    spread = values[..., : count * run].reshape(*values.shape[:2], count, run)
    return [spread, values[:, :, None, count * run :]]


def _added(runs: Sequence[Array], rank: int) -> Real:
    """Add sums of runs, [runs, columns] or [s, channels, runs], to those of [columns] or [channels]."""
    total: Real = runs[0].sum(axis=0 if rank == 2 else (0, 2), dtype=np.float64)
    for run in runs[1:]:
        total += run.sum(axis=0 if rank == 2 else (0, 2), dtype=np.float64)
    return total


ROWS = 1024
"""Rows multiplied in float32 at a time; longer sums would cost digits, shorter ones time."""

PRODUCT_PIECE = 1 << 20
"""Elements of which products are made at a time, where every sample has its own."""


@register("similarity")
class Similarity(Means):
    """``similarity`` [channels, channels]: E[x_i x_j] over samples and positions."""

    additive = True
    tells = True

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Sum products over all positions of all samples; the weight is their number."""
        samples, channels = maps.shape[:2]
        flat = maps.reshape(samples, channels, -1)
        positions = flat.shape[2]
        if channels <= positions <= ROWS:
            # One product per sample needs no copy; its result is no larger than the sample.
            total = np.zeros((channels, channels))
            step = max(1, PRODUCT_PIECE // flat[0].size)
            for start in range(0, samples, step):
                total += products(flat[start : start + step].swapaxes(1, 2)).sum(axis=0)
            return samples * positions, {"similarity": total}
        return samples * positions, {"similarity": products(np.moveaxis(flat, 1, 0).reshape(channels, -1).T)}


@register("gram", columns=True)
class Gram(Means):
    """``gram`` [parts, n, n]: mean over rows of products of two columns; ``column_mean`` [parts, n]; ``rows`` [].

    ``update`` takes the contraction's input as columns [parts, rows, n]: gram = X^T X / rows. Rows are buffered, since
    adding one product to the sums takes as long as multiplying a few rows. The buffer is no larger than a sum.
    """

    additive = True

    def update(self, maps: NDArray[Any]) -> None:
        """Add one batch of columns.

        Raises:
            NotFinite: there is NaN or infinity in it.
        """
        rows = floating(maps)
        if not rows.size:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            total = rows.sum(axis=1, dtype=np.float64)
        if not np.isfinite(total).all():
            check_finite(rows)
        state = dict(self.state)
        state["weight"] = np.asarray(rows.shape[1] + int(state.get("weight", 0)))
        state["column_mean"] = total + state.get("column_mean", 0.0)
        waiting = np.concatenate([state.pop("waiting"), rows], axis=1) if "waiting" in state else rows
        if waiting.shape[1] >= min(ROWS, 2 * waiting.shape[2]):
            state["gram"] = products(waiting) + state.get("gram", 0.0)
        else:
            state["waiting"] = waiting.copy() if waiting is maps else waiting
        self.state = state

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Return the means and the number of ``rows`` behind them: with few rows the Gram matrix overfits."""
        if not self.state:
            return {}
        state, weight = self.state, float(self.state["weight"])
        gram = np.asarray(state.get("gram", 0.0), np.float64)
        if "waiting" in state:
            gram = gram + products(state["waiting"])
        return {"gram": gram / weight, "column_mean": state["column_mean"] / weight, "rows": np.asarray(weight)}


def products(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """Return X^T X of matrices [..., rows, n], in float64, [..., n, n]: float32 within short runs of rows.

    Every entry is right to about 3e-7 of the root of its diagonal entries' product.
    """
    rows, n = matrices.shape[-2:]
    total = np.zeros((*matrices.shape[:-2], n, n))
    for start in range(0, rows, ROWS):
        chunk = matrices[..., start : start + ROWS, :]
        if chunk.dtype == np.float16:
            chunk = chunk.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            product = chunk.swapaxes(-1, -2) @ chunk
            # No product of two columns is larger than those of each with itself.
            if not np.isfinite(np.einsum("...ii->...i", product)).all():
                chunk = chunk.astype(np.float64)
                product = chunk.swapaxes(-1, -2) @ chunk
            total += product
    return total


SPECTRUM_PIECE = 1 << 22
"""Elements in float64 at a time."""

CLOSE = 5e-7
"""Relative error of a nuclear norm from which the slower decomposition is worth its time."""


@register("nuclear")
class Nuclear(Means):
    """``nuclear`` [channels]: sum of singular values of a channel's maps in a batch, a matrix [samples, positions].

    Mean over batches, weighted by their samples: sum_b n_b ||X_cb||_* / sum_b n_b. The value grows with the size of a
    batch, so compare only results from batches of one size.
    Yeom et al., Toward Compact Deep Neural Networks via Energy-Aware Pruning, 2021.
    """

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Return nuclear norms times samples; the weight is the number of samples."""
        samples, channels = maps.shape[:2]
        norms = np.empty(channels)
        step = max(1, SPECTRUM_PIECE * channels // maps.size)
        for start in range(0, channels, step):
            chunk = np.moveaxis(maps[:, start : start + step], 1, 0).astype(np.float64, order="C")
            norms[start : start + step] = nuclear_norms(chunk.reshape(*chunk.shape[:2], -1))
        return samples, {"nuclear": norms * samples}


@register("rank")
class Rank(Means):
    """``rank`` [channels]: mean over samples of the rank of a channel's map [height, width].

    Maps of volumes are matrices [depth, height * width]; maps with fewer than two axes of space have no rank, and no
    result. A singular value counts above ``max(shape) * eps * largest``, eps of the maps' own type: what rounding to
    float32 left does not count. Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020.
    """

    additive = True

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Sum ranks over samples; the weight is the number of samples."""
        samples, channels, *space = maps.shape
        if len(space) < 2:
            return 0, {}
        matrices = maps.reshape(samples * channels, space[0], -1)
        ranks = np.zeros(samples * channels)
        step = max(1, SPECTRUM_PIECE * ranks.size // maps.size)
        for start in range(0, ranks.size, step):
            piece = matrices[start : start + step]
            # After a ReLU many maps are 0 throughout.
            alive = piece.any(axis=(1, 2))
            ranks[start : start + step][alive] = _ranks(piece[alive])
        return samples, {"rank": ranks.reshape(samples, channels).sum(axis=0)}


def nuclear_norms(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of singular values of float64 matrices [count, rows, columns], [count], within 1e-6 relative."""
    squares = np.maximum(_squared_singular_values(matrices), 0.0)
    values = np.sqrt(squares)
    norms: NDArray[np.float64] = values.sum(axis=1)
    # A root magnifies the rounding of small eigenvalues; only matrices of very low rank are affected.
    noise = np.finfo(np.float64).eps * squares[:, -1:]
    error = (noise / np.maximum(np.maximum(values, np.sqrt(noise)), np.finfo(np.float64).tiny)).sum(axis=1)
    doubtful = error > CLOSE * norms
    if doubtful.any():
        norms[doubtful] = np.linalg.svd(matrices[doubtful], compute_uv=False).sum(axis=1)
    return norms


def _ranks(matrices: NDArray[Any]) -> NDArray[np.int64]:
    limit = max(matrices.shape[1:]) * np.finfo(matrices.dtype).eps
    if matrices.dtype == np.float64:
        values = np.linalg.svd(matrices, compute_uv=False)
        return np.asarray((values > limit * values[:, :1]).sum(axis=1))
    # The limit of float32, squared, is well above the rounding of float64: eigenvalues of the smaller Gram will do.
    squares = _squared_singular_values(matrices.astype(np.float64))
    return np.asarray((squares > limit**2 * squares[:, -1:]).sum(axis=1))


def _squared_singular_values(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the eigenvalues, ascending, of the Gram matrix of the smaller side: many times faster than an SVD."""
    turned = matrices.swapaxes(1, 2)
    small = matrices @ turned if matrices.shape[1] <= matrices.shape[2] else turned @ matrices
    return np.asarray(np.linalg.eigvalsh(small))
