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
        samples: number of samples seen.
        arrays: statistics by name, float64; ``maps["mean"]`` reads one. ``moments`` gives ``mean``, ``square`` (mean of
            squares), ``magnitude`` (mean of absolute values) and ``active`` (share that is not 0), each [channels], and
            each is a statistic of its own too; ``nuclear`` and ``rank`` give themselves, [channels]; ``similarity``
            gives ``similarity`` [channels, channels], the mean of products of two channels; ``gram`` gives ``gram``
            [parts, n, n], the mean of products of two columns of the contraction's input, see ``Slot.taps``, and
            ``column_mean`` [parts, n]. A statistic that could not be computed is not there.
    """

    samples: int = 0
    arrays: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.arrays[name]

    def get(self, name: str) -> NDArray[np.float64] | None:
        """The statistic of that name, None where there is none."""
        return self.arrays.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    @property
    def variance(self) -> NDArray[Any]:
        """Mean of squares less the square of the mean, [channels]; never negative."""
        return np.maximum(self.arrays["square"] - np.square(self.arrays["mean"]), 0.0)


class Statistic(Protocol):
    """Something that is accumulated over batches of feature maps.

    Attributes:
        name: what criteria ask for, set by :func:`register`.
        columns: whether ``update`` gets the columns of the contraction's input instead of its channels' maps.
        additive: batches may be joined before ``update`` gets them, the result stays the same; False where a class does
            not say so, and ``update`` then gets every call's batch as it is.
        state: everything accumulated so far, plain arrays; assigning a saved one goes on from there, to the bit. What
            was read from it stays as it is: ``update`` makes new arrays.
    """

    name: ClassVar[str] = ""
    columns: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    state: dict[str, NDArray[Any]]

    def update(self, maps: NDArray[Any]) -> None:
        """Take in one batch: maps [samples, channels, *space], or columns [parts, rows, n].

        Raises:
            NotFinite: there is NaN or infinity in it.
        """

    def result(self) -> dict[str, NDArray[np.float64]]:
        """The finished arrays by the names that ``Maps`` has for them; empty where nothing could be computed."""


ENTRY_POINT = "onnxprune.importance.statistics"
T = TypeVar("T", bound=type[Statistic])
_named: Named[type[Statistic]] = Named("statistic", ENTRY_POINT)


def register(name: str, *, columns: bool = False) -> Callable[[T], T]:
    """Register a class made without arguments under the name that criteria ask for, as a decorator.

    Args:
        name: what stands in a criterion's ``needs``.
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
    """Forget a statistic, so that another can take its name."""
    _named.remove(name)


def get(name: str) -> type[Statistic]:
    """The class of that name; make one per contraction.

    Raises:
        UsageError: there is none; the nearest name is suggested.
    """
    return _named.get(name)


def names() -> list[str]:
    """All statistics, sorted."""
    return _named.names()


class NotFinite(ModelError):
    """NaN or infinity in a feature map. Whoever knows which tensor it is catches this and names it."""

    def __init__(self, message: str = "A feature map holds NaN or infinity.") -> None:
        super().__init__(message, hint="The model overflows on this data: check its scale, or use other data.")


class Means(Statistic):
    """A statistic that is a mean over batches, result = sum over batches / sum of their weights.

    Subclasses say what one batch adds to the sums; the sums are kept in float64.

    Attributes:
        additive: a batch adds what its samples add one by one, so that batches may be joined.
        tells: NaN and infinity in the maps always show in the sums, so that the maps need not be gone through for them.
    """

    additive: ClassVar[bool] = False
    tells: ClassVar[bool] = False

    def __init__(self) -> None:
        self.state: dict[str, NDArray[Any]] = {}

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """The weight of one batch and its sums by name, in arrays of their own; 0 and none to leave the batch out.

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
            whole = all(math.isfinite(value.sum()) for value in sums.values())
        if self.tells and not whole:  # sums may also overflow over finite values
            check_finite(maps)
        # Into the new arrays, never into the old ones, so that a state that someone holds does not change.
        for name, value in sums.items():
            if name in self.state:
                value += self.state[name]
        self.state = {**sums, "weight": np.asarray(weight + int(self.state.get("weight", 0)))}

    def result(self) -> dict[str, NDArray[np.float64]]:
        """The means by name; empty before the first batch."""
        return {name: value / self.state["weight"] for name, value in self.state.items() if name != "weight"}


def floating(maps: NDArray[Any]) -> NDArray[Any]:
    """Maps as float16, float32 or float64."""
    if maps.dtype in (np.float16, np.float32, np.float64):
        return maps
    # Integers other than the narrow ones would lose digits in float32.
    return maps.astype(np.float64 if maps.dtype.kind in "iu" and maps.dtype.itemsize > 2 else np.float32)


def check_finite(maps: NDArray[Any]) -> None:
    """Refuse NaN and infinity.

    Raises:
        NotFinite: there are some.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = maps.sum(dtype=np.float32 if maps.dtype == np.float16 else maps.dtype)
    # A sum may also overflow over finite values: only then is it worth to look at every one of them.
    if not np.isfinite(total) and not np.isfinite(maps).all():
        raise NotFinite


__all__ = ["Maps", "Means", "NotFinite", "Statistic", "get", "names", "register", "unregister"]


PIECE = 1 << 18
"""Elements looked at at a time: few enough to stay in a processor's cache."""

# Positions of a map below which they are too few to be summed for themselves.
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
        """Sums over all positions of all samples; weighs as many."""
        channels = maps.shape[1]
        sums = np.zeros((len(self.parts), channels))
        with np.errstate(over="ignore", invalid="ignore"):
            for values, some in _laid_out(maps):
                found = _sums(values, self.parts)
                for row, part in zip(sums[:, some], self.parts, strict=True):
                    row += found[part].reshape(row.size, -1).sum(axis=1)
        return maps.size // channels, dict(zip(self.parts, sums, strict=True))


@register("mean")
class Mean(Moments):
    """``mean`` [channels] alone, as ``moments`` has it."""

    parts = ("mean",)


@register("square")
class Square(Moments):
    """``square`` [channels] alone, as ``moments`` has it."""

    parts = ("square",)


@register("magnitude")
class Magnitude(Moments):
    """``magnitude`` [channels] alone, as ``moments`` has it."""

    parts = ("magnitude",)


@register("active")
class Active(Moments):
    """``active`` [channels] alone, as ``moments`` has it."""

    parts = ("active",)
    tells = False  # NaN counts as active


def _laid_out(maps: Array) -> Iterator[tuple[Array, slice]]:
    """Pieces of maps, and their channels: [samples, channels, positions] where the positions lie side by side and are
    many, else [rows, ...] to be summed over rows, the channels' values (one or more each) behind them.
    """
    samples, channels = maps.shape[:2]
    flat = maps.reshape(samples, channels, -1)
    positions = flat.shape[2]
    if positions >= _FEW and flat.strides[2] == flat.itemsize:
        for few, some in _pieces(flat.shape):
            yield flat[few, some], some
        return
    if positions >= _FEW or flat.strides[1] == flat.itemsize:  # channels lie side by side
        turned = np.moveaxis(flat, 1, 2)
        rows, columns = turned.reshape(samples * positions, channels), 1
    else:
        rows, columns = flat.reshape(samples, channels * positions), positions
    step = max(1, PIECE // max(1, min(len(rows), _BYTE)) // columns)
    for left in range(0, channels, step):
        some = slice(left, min(left + step, channels))
        high = max(1, PIECE // ((some.stop - left) * columns))
        for top in range(0, len(rows), high):
            yield rows[top : top + high, left * columns : some.stop * columns], some


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Blocks of samples and channels with about ``PIECE`` elements, whole maps each."""
    samples, channels, positions = shape
    high = min(samples, _BYTE)
    wide = max(1, PIECE // max(1, high * positions))
    for top in range(0, samples, high):
        for left in range(0, channels, wide):
            yield slice(top, top + high), slice(left, left + wide)


def _sums(values: Array, parts: Sequence[str]) -> dict[str, Real]:
    """What is asked for, summed over samples and positions [s, channels, p], or over rows [rows, columns]."""
    found: dict[str, Real] = {}
    if "active" in parts:
        found["active"] = _count(values != 0)
    if "mean" in parts:
        found["mean"] = _total(values)
    if "magnitude" in parts:
        # Behind a ReLU values are their own magnitudes.
        plain = "mean" in found and values.min() >= 0
        found["magnitude"] = found["mean"] if plain else _total(np.abs(values))
    if "square" in parts:
        found["square"] = _squares(values)
    if values.dtype != np.float64 and not _kept(found, values):
        return _sums(values.astype(np.float64), parts)
    return found


def _kept(found: dict[str, Real], values: Array) -> bool:
    """Whether sums in float32 kept their digits: those of finite values may leave its range, squares at either end."""
    if not all(math.isfinite(sums.sum()) for sums in found.values()):
        return False
    low = found["square"] <= _TINY if "square" in found else np.zeros(0, bool)
    # A channel that is 0 throughout is none of them.
    return not low.any() or not values[:, low].any()


def _total(values: Array) -> Real:
    """Sums of values; a product with ones takes half the time of a sum."""
    if values.ndim == 2:
        return _added([np.ones(r.shape[1], r.dtype) @ r for r in _runs(values, 0)], 2)
    return _added([_dots(r) for r in _runs(values, 2)], 3)


def _dots(runs: Array) -> Array:
    """Sums of runs [s, channels, runs, p], [s, channels, runs], by one product per sample where they lie so."""
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
    """How many flags are set: up to 255 of them are counted in a byte, samples or rows first."""
    bits = busy.view(np.uint8)
    total = np.zeros(bits.shape[1])
    for first in range(0, len(bits), _BYTE):
        some = bits[first : first + _BYTE]
        counted = np.add.reduce(some, axis=0, dtype=np.uint8)
        if counted.ndim == 2:
            length = counted.shape[1]
            most = min(_BYTE // len(some), length // _RUN)
            folds = next((k for k in range(most, 1, -1) if length % k == 0), 1)
            counted = np.add.reduce(counted.reshape(-1, folds, length // folds), axis=1, dtype=np.uint8)
            total += _total(counted.astype(np.float32)[None])
        else:
            total += counted
    return total


def _runs(values: Array, axis: int) -> list[Array]:
    """Values in runs along ``axis`` that are short enough to be summed in their own type, and what is left over.

    [rows, columns] as [runs, rows of a run, columns]; [s, channels, p] as [s, channels, runs, p of a run].
    """
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    length = values.shape[axis]
    fewest = 1 if values.dtype == np.float64 else -(-length // _RUN)
    count = next((k for k in range(fewest, 2 * fewest) if length % k == 0), fewest)
    run = length // count
    if axis == 0:
        whole = count * run
        spread = values[:whole].reshape(count, run, values.shape[1])
        return [spread] if whole == length else [spread, values[None, whole:]]
    if count * run == length:
        return [values.reshape(*values.shape[:2], count, run)]
    spread = values[..., : count * run].reshape(*values.shape[:2], count, run)
    return [spread, values[:, :, None, count * run :]]


def _added(runs: Sequence[Array], rank: int) -> Real:
    """Sums of runs, [runs, columns] or [s, channels, runs], as those of [columns] or [channels]."""
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
        """Products summed over all positions of all samples; weighs as many."""
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

    ``update`` takes the contraction's input as columns [parts, rows, n]: gram = X^T X / rows. Rows wait until they are
    worth a product: adding one to the sums takes as long as multiplying a few rows. What waits is no larger than a sum.
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
        """The means, and from how many ``rows`` they are: with few, the Gram matrix promises more than holds."""
        if not self.state:
            return {}
        state, weight = self.state, float(self.state["weight"])
        gram = np.asarray(state.get("gram", 0.0), np.float64)
        if "waiting" in state:
            gram = gram + products(state["waiting"])
        return {"gram": gram / weight, "column_mean": state["column_mean"] / weight, "rows": np.asarray(weight)}


def products(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """X^T X of matrices [..., rows, n], in float64, [..., n, n]: float32 within short runs of rows.

    Every entry is right to about 3e-7 of the root of its diagonal entries' product.
    """
    rows, n = matrices.shape[-2:]
    total = np.zeros((*matrices.shape[:-2], n, n))
    for start in range(0, rows, ROWS):
        some = matrices[..., start : start + ROWS, :]
        if some.dtype == np.float16:
            some = some.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            product = some.swapaxes(-1, -2) @ some
            # No product of two columns is larger than those of each with itself.
            if not np.isfinite(np.einsum("...ii->...i", product)).all():
                some = some.astype(np.float64)
                product = some.swapaxes(-1, -2) @ some
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
    batch, so compare only what was measured in batches of one size.
    Yeom et al., Toward Compact Deep Neural Networks via Energy-Aware Pruning, 2021.
    """

    def measure(self, maps: NDArray[Any]) -> tuple[int, dict[str, NDArray[np.float64]]]:
        """Nuclear norms times samples; weighs the samples."""
        samples, channels = maps.shape[:2]
        norms = np.empty(channels)
        step = max(1, SPECTRUM_PIECE * channels // maps.size)
        for start in range(0, channels, step):
            some = np.moveaxis(maps[:, start : start + step], 1, 0).astype(np.float64, order="C")
            norms[start : start + step] = nuclear_norms(some.reshape(*some.shape[:2], -1))
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
        """Ranks summed over samples; weighs the samples."""
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
    """Sums of singular values of float64 matrices [count, rows, columns], [count], to a relative error below 1e-6."""
    squares = np.maximum(_squared_singular_values(matrices), 0.0)
    values = np.sqrt(squares)
    norms: NDArray[np.float64] = values.sum(axis=1)
    # A root magnifies what rounding left of the small eigenvalues; only matrices of very low rank suffer from it.
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
    """Eigenvalues, ascending, of the Gram matrix of the smaller side: many times faster than a decomposition."""
    turned = matrices.swapaxes(1, 2)
    small = matrices @ turned if matrices.shape[1] <= matrices.shape[2] else turned @ matrices
    return np.asarray(np.linalg.eigvalsh(small))
