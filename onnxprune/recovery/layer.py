"""The recovery of one layer: a linear fit, then one that takes saturation into account, judged on the hold-out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError

from onnxprune.operators.contractions import Picked, pick, rows_per_sample
from onnxprune.recovery.attention import Mixing
from onnxprune.recovery.regression import (
    HELD,
    NOTHING,
    RIDGES,
    WORTH,
    Real,
    Solution,
    Sums,
    is_held,
    least_squares,
    solve,
)
from onnxprune.recovery.targets import RecoveryTarget

Array = NDArray[Any]
Get = Callable[[str, int], Array]
"""(tensor, number of the batch) -> value."""

# Rows per unknown that a layer is fitted to, where there are so many.
_ROWS = 50
# Bytes of rows to keep between passes over them, and to lay side by side.
_KEPT = 256 << 20
_BLOCK = 16 << 20


@dataclass(slots=True)
class Flat:
    """Where an activation behind the layer is flat, so that only the side of its edge matters.

    Attributes:
        there: whether the wanted output lies on the flat side, [parts, rows, o].
        edge: the output at the edge, and rises: whether the output grows away from the flat side; [parts, rows, o], or
            [parts, 1, o] where all rows have the same.
    """

    there: Array
    edge: Array
    rises: Array

    def reached(self, fitted: Array) -> Array:
        """Whether outputs lie on the flat side."""
        return np.where(self.rises, fitted <= self.edge, fitted >= self.edge)


@dataclass(slots=True)
class Rows:
    """One batch: data [parts, rows, n], target [parts, rows, o], and the flat sides."""

    data: Array
    target: Array
    flats: list[Flat]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        flats = sum(f.there.nbytes + f.edge.nbytes + f.rises.nbytes for f in self.flats)
        return self.data.nbytes + self.target.nbytes + flats

    def part(self, rows: slice) -> Rows:
        """Return some of the rows."""
        flats = [
            Flat(f.there[:, rows], *(a if a.shape[1] == 1 else a[:, rows] for a in (f.edge, f.rises)))
            for f in self.flats
        ]
        return Rows(self.data[:, rows], self.target[:, rows], flats)

    @classmethod
    def joined(cls, blocks: Sequence[Rows]) -> Rows:
        """Blocks one after the other."""
        if len(blocks) == 1:
            return blocks[0]
        flats = []
        for pieces in zip(*(b.flats for b in blocks), strict=True):
            one = pieces[0].edge.shape[1] == 1 and pieces[0].there.shape[1] != 1
            edge, rises = (
                getattr(pieces[0], name) if one else np.concatenate([getattr(f, name) for f in pieces], axis=1)
                for name in ("edge", "rises")
            )
            flats.append(Flat(np.concatenate([f.there for f in pieces], axis=1), edge, rises))
        data, target = (np.concatenate([getattr(b, name) for b in blocks], axis=1) for name in ("data", "target"))
        return cls(data, target, flats)

    def wanted(self, fitted: Array) -> Array:
        """Return the target; where it is saturated, the fitted output if that is saturated too, else the edge."""
        target = self.target
        for flat in self.flats:
            target = np.where(flat.there, np.where(flat.reached(fitted), fitted, flat.edge), target)
        return target

    def clipped(self, output: Array) -> Array:
        """Move saturated outputs to the edge."""
        for flat in self.flats:
            output = np.where(flat.rises, np.maximum(output, flat.edge), np.minimum(output, flat.edge))
        return output


@dataclass(slots=True)
class Problem:
    """Where the rows of one layer come from.

    Args:
        aim: the layer.
        weight: shape of its weight.
        channels: of its input.
        cut, full: values in the cut model and in the original.
        steps: gathers that take a tensor of the original to its surviving positions.
        batches: those that the layer runs in.
        samples: how many they hold.
        mixing: what stands in for some of the survivors.
    """

    aim: RecoveryTarget
    weight: Sequence[int]
    channels: int
    cut: Get
    full: Get
    steps: Sequence[tuple[int, NDArray[np.int64]]]
    batches: Sequence[int]
    samples: int
    mixing: Mixing | None = None
    extent: tuple[int, int, int] = (0, 0, 0)
    """Rows that are not held out, unknowns per output and directions in which the rows vary; known after ``sums``."""
    _kept: dict[bool, list[Rows]] = field(default_factory=dict)
    _even: bool = False

    def rows(self, held: bool | None = None) -> Iterator[Rows]:
        """Blocks of rows: of held out batches, of the others, or (None) of all; kept between calls where few."""
        if held is None:
            yield from self.rows(False)
            yield from self.rows(True)
            return
        kept = self._kept.get(held)
        if kept is not None:
            yield from kept
            return
        blocks: list[Rows] | None = []
        size = sum(b.nbytes for known in self._kept.values() for b in known)
        for block in self._blocks(held):
            yield block
            size += block.nbytes
            if blocks is not None:
                blocks.append(block)
                blocks = blocks if size <= _KEPT else None
        if blocks is not None:
            self._kept[held] = blocks

    def _blocks(self, held: bool) -> Iterator[Rows]:
        """Batches joined: products of few rows take long for what they are. Of few batches the last is held out."""
        waiting: list[Rows] = []
        if len(self.batches) == 1:
            whole = self._read(self.batches[0])
            count = whole.data.shape[1]
            edge = max(1, count - max(1, count // HELD))
            yield whole.part(slice(edge, None) if held else slice(0, edge))
            return
        for number, batch in enumerate(self.batches):
            if held == is_held(number, len(self.batches)):
                waiting.append(self._read(batch))
                if sum(rows.nbytes for rows in waiting) > _BLOCK:
                    yield Rows.joined(waiting)
                    waiting = []
        if waiting:
            yield Rows.joined(waiting)

    def sums(self, held: bool | None = None) -> Sums:
        """Accumulate sums over batches of data and target as they are."""
        total: Sums | None = None
        for rows in self.rows(held):
            one = Sums.of(rows.data, rows.target)
            if total is None:
                total = one
            else:
                total.add(one)
        assert total is not None
        if held is False:
            self.extent = total.rows, total.x.shape[1], total.directions()
        return total

    def every_row(self, held: bool, most: int, limit: int) -> Iterator[tuple[Rows, int]]:
        """Batches with all of their rows, and their samples; none where samples have more rows, or all more bytes."""
        for number, batch in enumerate(self.batches if len(self.batches) > 1 else ()):
            if held == is_held(number, len(self.batches)):
                shape = self.cut(self.aim.data, batch).shape
                size = self.aim.form.count(shape) * self.channels * self.aim.form.taps * 4
                if self.aim.form.count(shape) > most * shape[0] or size * len(self.batches) > limit:
                    return
                yield self._read(batch, every=True), int(shape[0])

    def _read(self, batch: int, every: bool = False) -> Rows:
        form, tail = self.aim.form, self.aim.tail
        data = _wide(self.cut(self.aim.data, batch))
        original = wanted = _wide(self.full(tail.aim, batch))
        for axis, index in self.steps:
            wanted = wanted.take(index, axis=axis) if index.ndim == 1 else np.take_along_axis(wanted, index, axis=axis)
        if self.mixing is not None:
            wanted = self.mixing.apply(original, wanted)
        addends = [_wide(self.cut(n, batch)) for n in tail.addends]
        shape = form.output_shape(data.shape, self.weight)
        chosen = None if every else pick(form, data, rows_per_sample(form, self.channels, self.samples, _ROWS))

        kind = data.dtype

        def output(value: Array, rows: Picked = chosen) -> Array:
            return form.rows(tail.back(value, addends, shape), rows).astype(kind, copy=False)

        flats = []
        for level, below in tail.flats:
            # Laid out as the output is, without its arithmetic.
            there = form.rows(tail.moved_back(wanted <= level if below else wanted >= level, shape), chosen)
            # Unless there are other activations or constants per position on the way, all rows have the same edge.
            rows = np.zeros(1, np.int64) if self._even and not every else chosen
            edge = output(np.full_like(wanted, level), rows)
            beyond = output(np.full_like(wanted, level + (1.0 if below else -1.0)), rows)
            flats.append(Flat(there, edge, beyond > edge))
        if flats and not self._even and not addends and not every:
            self._even = all(bool((a == a[:, :1]).all()) for f in flats for a in (f.edge, f.rises))
            flats = [Flat(f.there, f.edge[:, :1], f.rises[:, :1]) for f in flats] if self._even else flats
        return Rows(np.ascontiguousarray(form.columns(data, chosen)), output(wanted), flats)


def _wide(value: Array) -> Array:
    """In float32 at least: sums of products of narrower numbers overflow."""
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype.itemsize < 4 else value


def loss(rows: Iterator[Rows], matrix: Real, bias: Real) -> float:
    """Sum of squares of what is left of wanted minus fitted outputs."""
    total = 0.0
    for batch in rows:
        fitted = fit(batch.data, matrix, bias)
        total += float(np.square(batch.wanted(fitted) - fitted, dtype=np.float64).sum())
    return total


def fit(data: Array, matrix: Real, bias: Real) -> Array:
    """X W + b in the data's type."""
    kind = data.dtype
    return np.asarray(np.matmul(data, matrix.astype(kind)) + bias[:, None, :].astype(kind))


# Ridges that are tried, as shares of what a sample's mean row measures; small ones follow few samples too closely.
_RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0)
# Gauss-Newton steps.
_STEPS = 2
# Bytes of mean rows, one per sample and output, to hold at a time.
_POOLED_BLOCK = 128 << 20
# Rows per sample up to which all of them are looked at, and bytes of them.
_MOST = 1024
_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Means:
    """All rows of some samples: rows of one part, and how many positions each sample has."""

    rows: Rows
    positions: int

    def apart(self, weights: Real, bias: Real) -> tuple[Array, Array]:
        """Mean over positions of what is left of the activations, [samples, o], and where they let pass, [rows, o]."""
        fitted = fit(self.rows.data, weights, bias)
        left = self.rows.clipped(self.rows.target) - self.rows.clipped(fitted)
        passed = np.ones(fitted.shape, bool)
        for flat in self.rows.flats:
            passed &= ~flat.reached(fitted)
        samples = left.shape[1] // self.positions
        return left[0].reshape(samples, self.positions, -1).mean(axis=1), passed[0]


def sharpen(problem: Problem, solution: Solution, *, fixed_bias: bool = False) -> Solution:
    """Move the solution so that the spatial means behind the activation come closer to the original's.

    Steps of Gauss-Newton on sum_i |mean_p r(Y_ip) - mean_p r(X_ip W + b)|^2 over samples i, with a ridge towards
    ``solution``, r the activation that the layer is aimed through. Errors of single positions matter no more where only
    their mean is read, and a small error that all positions share matters much. A solution is returned only if its
    held-out error falls.

    Args:
        problem: of one part; its tail ends in front of a mean.
        solution: weights [1, n, o], bias [1, o].
        fixed_bias: the bias has to stay 0.
    """
    train, held = list(_means(problem, False)), list(_means(problem, True))
    if not train or not held:
        return solution
    first = best = _error(held, solution.matrix, solution.bias)
    found, limit = solution, first * (1.0 - WORTH)
    for ridge in _RIDGES:
        weights, bias = solution.matrix, solution.bias
        for step in range(1, _STEPS + 1):
            weights, bias = _step(train, weights, bias, ridge, fixed_bias)
            error = _error(held, weights, bias)
            if error >= min(best, limit):
                break
            best, how = error, f"{solution.how}, mean {ridge:g} x {step}"
            found = replace(solution, matrix=weights, bias=bias, how=how)
    return found


def _means(problem: Problem, held: bool) -> Iterator[_Means]:
    """All rows, batch by batch; none where there are too many."""
    for rows, samples in problem.every_row(held, _MOST, _BYTES):
        yield _Means(rows, rows.data.shape[1] // samples)


def _error(parts: list[_Means], weights: Real, bias: Real) -> float:
    return float(sum(np.square(p.apart(weights, bias)[0], dtype=np.float64).sum() for p in parts))


def _step(parts: list[_Means], weights: Real, bias: Real, ridge: float, fixed_bias: bool) -> tuple[Real, Real]:
    """W + D, D_o = J_o^T (J_o J_o^T + r m I)^-1 e_o, for every output o: J_o the mean over positions of the rows that
    its activation lets pass, [samples, n], e_o what is left of the means, m the mean square of J_o's rows."""
    samples = sum(p.rows.data.shape[1] // p.positions for p in parts)
    n, outputs = weights.shape[1:]
    left, passed = zip(*(p.apart(weights, bias) for p in parts), strict=True)
    errors = np.concatenate(left).astype(np.float64)
    new, shifted = weights.copy(), bias.copy()
    some = max(1, _POOLED_BLOCK // (8 * samples * (n + samples)))
    for start in range(0, outputs, some):
        at = slice(start, start + some)
        rows = np.concatenate(
            [_rows(p, mask[:, at], fixed_bias) for p, mask in zip(parts, passed, strict=True)], axis=1
        )
        products = rows @ rows.transpose(0, 2, 1)
        power = np.einsum("oii->o", products) / samples
        products += (ridge * power + (power <= 0))[:, None, None] * np.eye(samples)
        change = np.einsum("osn,os->no", rows, np.linalg.solve(products, errors[:, at].T[:, :, None])[:, :, 0])
        new[0, :, at] += change[:n]
        if not fixed_bias:
            shifted[0, at] += change[n]
    return new, shifted


def _rows(part: _Means, passed: Array, fixed_bias: bool) -> Real:
    """J of one batch, [o, samples, n], and a last column of means of ones for the bias."""
    count = part.positions
    data = part.rows.data[0].reshape(-1, count, part.rows.data.shape[2])
    mask = passed.reshape(len(data), count, -1).astype(data.dtype)
    means: Real = (np.matmul(mask.transpose(0, 2, 1), data) / count).transpose(1, 0, 2).astype(np.float64)
    if fixed_bias:
        return means
    return np.concatenate([means, mask.mean(axis=1, dtype=np.float64).T[:, :, None]], axis=2)


Stores = Callable[[Real, Real], tuple[Real, Real]]
"""(matrix, bias) -> what the layer has once they are written."""
# Rounds of refitting where an activation is flat; each lowers the error, the first most.
_ROUNDS = 3
# Ridges that are tried below the smallest where that one is the best.
_FINER = (1e-8, 1e-10)


def repair(
    problem: Problem,
    matrix: Real,
    bias: Real,
    *,
    mode: str = "full",
    fixed_bias: bool = False,
    as_stored: Stores | None = None,
) -> Solution:
    """Fit new weights for the layer of ``problem``; keep the present ones where no candidate is better on the hold-out.

    Args:
        problem: input and target rows of the layer.
        matrix: present weights, [parts, n, o].
        bias: present biases, [parts, o].
        mode: see :func:`solve`; ``full`` also counts errors only where they pass the activation behind the layer: |r(Y)
            - r(X W + b)|^2, by refitting to targets that follow the fit where the activation is saturated. Zhang et
            al., Efficient and Accurate Approximations of Nonlinear Convolutional Networks, CVPR 2015, section 3.2.
        fixed_bias: whether the bias has to stay 0.
        as_stored: function that rounds weights as writing them as codes does; None: no rounding.
    """
    found = _pointwise(problem, matrix, bias, mode, fixed_bias)
    if mode == "full" and problem.aim.tail.pooled and matrix.shape[0] == 1 and found.before > NOTHING:
        found = sharpen(problem, found, fixed_bias=fixed_bias)
    return found if as_stored is None else _rounded(problem, matrix, bias, found, as_stored)


def _rounded(problem: Problem, matrix: Real, bias: Real, found: Solution, as_stored: Stores) -> Solution:
    """Return the solution as it is stored, where its error stays below that of the present weights."""
    fitted, shifted = as_stored(found.matrix, found.bias)
    if fitted is found.matrix or found.how == "kept":
        return found
    before = loss(problem.rows(True), matrix, bias)
    after = loss(problem.rows(True), fitted, shifted)
    if after >= before * (1.0 - WORTH):
        return Solution(matrix, bias, found.before, found.before, "kept")
    # Rounding is told as a share of what the fit was judged by, which need not be these rows' sum of squares.
    unrounded = loss(problem.rows(True), found.matrix, found.bias)
    worse = found.after * after / unrounded if unrounded > 0 else found.after
    return Solution(fitted, shifted, found.before, worse, f"{found.how}, rounded", found.ridge)


def _pointwise(problem: Problem, matrix: Real, bias: Real, mode: str, fixed_bias: bool) -> Solution:
    """Recover the layer from its rows, each on its own."""
    train, held = problem.sums(False), problem.sums(True)
    linear = solve(train, held, matrix, bias, mode=mode, fixed_bias=fixed_bias)
    linear = _finer(train, held, matrix, bias, linear, fixed_bias)
    if mode != "full" or not problem.aim.tail.flats or linear.ridge is None:
        return linear
    found = _rounds(problem, train, matrix, bias, linear.ridge, fixed_bias)
    if not found.number:
        return linear
    how = f"{linear.how}, {found.number} rounds"
    return Solution(found.matrix, found.bias, found.before / held.scale, found.after / held.scale, how, linear.ridge)


def _finer(train: Sums, held: Sums, matrix: Real, bias: Real, found: Solution, fixed_bias: bool) -> Solution:
    """Return the solution, or one with a smaller ridge where the smallest ridge of the grid is the best so far.

    Where others say exactly what was removed, the ridge is all that is left of the error.
    """
    if found.ridge != RIDGES[0]:
        return found
    for ridge in _FINER:
        try:
            fitted, shifted = least_squares(train, matrix, bias, ridge, fixed_bias)
            error = float(held.error(fitted, shifted).sum()) / held.scale
            if error >= found.after * (1.0 - WORTH):
                break
        except LinAlgError:
            break
        found = Solution(fitted, shifted, found.before, error, f"lstsq {ridge:g}", ridge)
    return found


@dataclass(frozen=True, slots=True)
class _Found:
    """Weights of the round that errs least, its number, and the held-out errors without any repair and with it."""

    matrix: Real
    bias: Real
    number: int
    before: float
    after: float


def _rounds(problem: Problem, train: Sums, matrix: Real, bias: Real, ridge: float, fixed_bias: bool) -> _Found:
    """Round after round on the rows that are not held out, as long as the error on those that are falls."""
    before = loss(problem.rows(True), matrix, bias)
    w, b = least_squares(train, matrix, bias, ridge, fixed_bias)
    found = _Found(w, b, 0, before, min(before, loss(problem.rows(True), w, b)) * (1.0 - WORTH))
    for number in range(1, _ROUNDS + 1):
        w, b = _round(problem.rows(False), train, w, b, matrix, bias, ridge, fixed_bias)
        error = loss(problem.rows(True), w, b)
        if error >= found.after:
            break
        found = _Found(w, b, number, before, error)
    return found


def _round(
    rows: Iterator[Rows], sums: Sums, w: Real, b: Real, matrix: Real, bias: Real, ridge: float, fixed_bias: bool
) -> tuple[Real, Real]:
    """Fit again to targets that follow the last fit where the activation is flat."""
    xy, y = np.zeros_like(sums.xy), np.zeros_like(sums.y)
    for batch in rows:
        wanted = batch.wanted(fit(batch.data, w, b))
        xy += np.matmul(batch.data.transpose(0, 2, 1), wanted.astype(batch.data.dtype))
        y += wanted.sum(axis=1, dtype=np.float64)
    return least_squares(Sums(sums.rows, sums.x, y, sums.xx, xy, sums.yy), matrix, bias, ridge, fixed_bias)
