"""The recovery of one layer: a linear fit, then one that takes saturation into account, judged on the hold-out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError

from onnxprune.operators.contractions import Picked, draw_rows, pick, rows_per_sample
from onnxprune.recovery.attention import Mixing
from onnxprune.recovery.regression import (
    HOLD_OUT_PERIOD,
    NOTHING,
    RIDGES,
    WORTH,
    Mask,
    Moments,
    Real,
    RidgeRegression,
    Solution,
    is_validation,
    moments,
    solve,
)
from onnxprune.recovery.targets import RecoveryTarget

Array = NDArray[Any]
Get = Callable[[str, int], Array]
Counted = Callable[[int, Sequence[int]], "NDArray[np.bool_] | None"]
Importance = Callable[[int], "Array | None"]
"""(tensor, number of the batch) -> value."""

# Largest number of rows per unknown to fit a layer to. A layer of few unknowns has the rows of so many unknowns, since
# rows of one sample are alike; half as many where each part has them for itself (a depthwise convolution).
_ROWS, _FEW = 50, 160
# Bytes of rows to keep between passes over them (by default), and to join into one block.
_CACHE_BYTES = 256 << 20
_BLOCK = 16 << 20


@dataclass(slots=True)
class Saturation:
    """Saturation of an activation behind the layer: of a saturated output only the side of the edge matters.

    Attributes:
        mask: whether the target is saturated, [parts, rows, o], bool.
        edge: output at the edge of saturation, [parts, rows, o], or [parts, 1, o] where all rows have the same.
        rises: whether the output grows away from saturation, shaped as ``edge``, bool.
    """

    mask: Array
    edge: Array
    rises: Array

    def reached(self, fitted: Array) -> Array:
        """Return whether outputs are saturated."""
        return np.where(self.rises, fitted <= self.edge, fitted >= self.edge)


@dataclass(slots=True)
class Rows:
    """One batch: data [parts, rows, n], target [parts, rows, o], and saturation."""

    data: Array
    target: Array
    saturations: list[Saturation]

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        saturations = sum(f.mask.nbytes + f.edge.nbytes + f.rises.nbytes for f in self.saturations)
        return self.data.nbytes + self.target.nbytes + saturations

    def part(self, rows: slice) -> Rows:
        """Return some of the rows."""
        saturations = [
            Saturation(f.mask[:, rows], *(a if a.shape[1] == 1 else a[:, rows] for a in (f.edge, f.rises)))
            for f in self.saturations
        ]
        return Rows(self.data[:, rows], self.target[:, rows], saturations)

    @classmethod
    def concatenate(cls, blocks: Sequence[Rows]) -> Rows:
        """Concatenate blocks."""
        if len(blocks) == 1:
            return blocks[0]
        saturations = []
        for pieces in zip(*(b.saturations for b in blocks), strict=True):
            one = pieces[0].edge.shape[1] == 1 and pieces[0].mask.shape[1] != 1
            edge, rises = (
                getattr(pieces[0], name) if one else np.concatenate([getattr(f, name) for f in pieces], axis=1)
                for name in ("edge", "rises")
            )
            saturations.append(Saturation(np.concatenate([f.mask for f in pieces], axis=1), edge, rises))
        data, target = (np.concatenate([getattr(b, name) for b in blocks], axis=1) for name in ("data", "target"))
        return cls(data, target, saturations)

    def expected(self, fitted: Array) -> Array:
        """Return the target; where it is saturated, the fitted output if that is saturated too, else the edge."""
        target = self.target
        for saturation in self.saturations:
            target = np.where(saturation.mask, np.where(saturation.reached(fitted), fitted, saturation.edge), target)
        return target

    def clip(self, output: Array) -> Array:
        """Move saturated outputs to the edge."""
        for saturation in self.saturations:
            output = np.where(
                saturation.rises, np.maximum(output, saturation.edge), np.minimum(output, saturation.edge)
            )
        return output


@dataclass(slots=True)
class Problem:
    """Input and target rows of one layer.

    Args:
        layer: recovery target of the layer.
        weight: shape of its weight.
        channels: number of channels of its input.
        cut: function that returns a value in the pruned model.
        full: function that returns a value in the original.
        steps: gathers of the surviving positions of a tensor of the original: (axis, indices).
        batches: indices of the batches in which the layer runs.
        samples: number of samples in these batches.
        counted: function from a batch and the sizes of rows to which of them are no padding, [rows], bool; None from it
            where all count.
        importance: function from a batch to the importance of the positions of the output, [samples, ..., 1, ...]; None
            from it where all are alike.
        mixing: mixed channels that replace some of the survivors in the target.
        density: largest number of rows per unknown to fit to.
        mask: weights that may change, [parts, n, o]; None: all.
        memory: bytes of rows to keep between passes over them; beyond, they are made again.
    """

    layer: RecoveryTarget
    weight: Sequence[int]
    channels: int
    cut: Get
    full: Get
    steps: Sequence[tuple[int, NDArray[np.int64]]]
    batches: Sequence[int]
    samples: int
    counted: Counted = lambda _batch, _sizes: None
    importance: Importance = lambda _batch: None
    mixing: Mixing | None = None
    density: int = _ROWS
    mask: Mask | None = None
    memory: int = _CACHE_BYTES
    extent: tuple[int, int, int] = (0, 0, 0)
    """Rows to fit to, unknowns per output and rank of the rows; set by ``sums``."""
    _cached: dict[bool, list[Rows]] = field(default_factory=dict)
    _even: bool = False

    def rows(self, held_out: bool | None = None) -> Iterator[Rows]:
        """Iterate over blocks of rows of hold-out batches, of the others, or (None) of all; few rows are cached."""
        if held_out is None:
            yield from self.rows(False)
            yield from self.rows(True)
            return
        cached = self._cached.get(held_out)
        if cached is not None:
            yield from cached
            return
        blocks: list[Rows] | None = []
        size = sum(b.nbytes for rows in self._cached.values() for b in rows)
        for block in self._blocks(held_out):
            yield block
            size += block.nbytes
            if blocks is not None:
                blocks.append(block)
                blocks = blocks if size <= self.memory else None
        if blocks is not None:
            self._cached[held_out] = blocks

    def _blocks(self, held_out: bool) -> Iterator[Rows]:
        """Iterate over joined batches, since products of few rows are slow. Of few batches the last is the hold-out."""
        waiting: list[Rows] = []
        if len(self.batches) == 1:
            rows = self._read(self.batches[0])
            count = rows.data.shape[1]
            edge = max(1, count - max(1, count // HOLD_OUT_PERIOD))
            yield rows.part(slice(edge, None) if held_out else slice(0, edge))
            return
        size = 0
        for number, batch in enumerate(self.batches):
            if held_out == is_validation(number, len(self.batches)):
                waiting.append(self._read(batch))
                size += waiting[-1].nbytes
                if size > _BLOCK:
                    yield Rows.concatenate(waiting)
                    waiting, size = [], 0
        if waiting:
            yield Rows.concatenate(waiting)

    def sums(self, held_out: bool | None = None) -> Moments:
        """Accumulate sums over batches of data and target as they are; few rows of a wide layer stay as they are."""
        result = moments((rows.data, rows.target) for rows in self.rows(held_out))
        if held_out is False:
            self.extent = result.rows, result.x.shape[1], result.directions()
        return result

    def every_row(self, held_out: bool, max_rows: int, limit: int) -> Iterator[tuple[Rows, int]]:
        """Iterate over whole batches and their samples; none beyond ``max_rows`` rows a sample or ``limit`` bytes."""
        for number, batch in enumerate(self.batches if len(self.batches) > 1 else ()):
            if held_out == is_validation(number, len(self.batches)):
                shape = self.cut(self.layer.data, batch).shape
                size = self.layer.form.count(shape) * self.channels * self.layer.form.taps * 4
                if self.layer.form.count(shape) > max_rows * shape[0] or size * len(self.batches) > limit:
                    return
                yield self._read(batch, all_rows=True), int(shape[0])

    def _pick(self, data: Array, batch: int) -> Picked:
        """Select the rows of a batch to fit to."""
        form = self.layer.form
        least = self.density * _FEW // (2 if form.parts > 1 else 1)
        per_sample = rows_per_sample(form, self.channels, self.samples, self.density, least)
        counted, num_rows = self.counted(batch, data.shape[:-1]), per_sample * len(data)
        importance = self._importance_of_rows(batch, data.shape)
        if importance is None or (counted is not None and counted.size != importance.size):
            return pick(form, data, per_sample, counted)
        places = np.arange(importance.size) if counted is None else np.flatnonzero(counted)
        picked = draw_rows(importance[places], num_rows) if places.size else None
        return pick(form, data, per_sample, counted) if picked is None else places[picked]

    def _importance_of_rows(self, batch: int, data: Sequence[int]) -> Array | None:
        """Return the importance of every row of a batch, [rows]; None where it is not known."""
        importance = self.importance(batch)
        if importance is None:
            return None
        shape = self.layer.form.output_shape(data, self.weight)
        sizes = zip(importance.shape, shape, strict=False)
        if len(importance.shape) != len(shape) or any(m not in (1, n) for m, n in sizes):
            return None
        return self.layer.form.rows(np.broadcast_to(importance, shape))[0, :, 0]

    def _read(self, batch: int, all_rows: bool = False) -> Rows:
        form, path = self.layer.form, self.layer.path
        data = _wide(self.cut(self.layer.data, batch))
        original = target = _wide(self.full(path.target, batch))
        for axis, index in self.steps:
            target = target.take(index, axis=axis) if index.ndim == 1 else np.take_along_axis(target, index, axis=axis)
        if self.mixing is not None:
            target = self.mixing.apply(original, target)
        addends = [_wide(self.cut(n, batch)) for n in path.addends]
        shape = form.output_shape(data.shape, self.weight)
        picked = None if all_rows else self._pick(data, batch)

        kind = data.dtype

        def output(value: Array, rows: Picked = picked) -> Array:
            return form.rows(path.back(value, addends, shape), rows).astype(kind, copy=False)

        saturations = []
        for level, below in path.saturations:
            # Rearranged to the layout of the output, without arithmetic.
            there = form.rows(path.moved_back(target <= level if below else target >= level, shape), picked)
            # All rows have the same edge, unless other activations or constants per position lie on the path.
            rows = np.zeros(1, np.int64) if self._even and not all_rows else picked
            edge = output(np.full_like(target, level), rows)
            beyond = output(np.full_like(target, level + (1.0 if below else -1.0)), rows)
            saturations.append(Saturation(there, edge, beyond > edge))
        if saturations and not self._even and not addends and not all_rows:
            self._even = all(bool((a == a[:, :1]).all()) for f in saturations for a in (f.edge, f.rises))
            saturations = (
                [Saturation(f.mask, f.edge[:, :1], f.rises[:, :1]) for f in saturations] if self._even else saturations
            )
        return Rows(np.ascontiguousarray(form.columns(data, picked)), output(target), saturations)


def _wide(value: Array) -> Array:
    """Return the value in float32 at least: sums of products of narrower numbers overflow."""
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype.itemsize < 4 else value


def loss(rows: Iterator[Rows], matrix: Real, bias: Real) -> float:
    """Return the sum of squared residuals between target and fitted outputs."""
    total = 0.0
    for batch in rows:
        fitted = fit(batch.data, matrix, bias)
        total += float(np.square(batch.expected(fitted) - fitted, dtype=np.float64).sum())
    return total


def fit(data: Array, matrix: Real, bias: Real) -> Array:
    """Return X W + b in the data's type."""
    kind = data.dtype
    return np.asarray(np.matmul(data, matrix.astype(kind)) + bias[:, None, :].astype(kind))


# Grid of ridges, as shares of the mean square of a sample's mean row; small ridges overfit few samples.
_RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0)
# Gauss-Newton steps.
_STEPS = 2
# Bytes of mean rows, one per sample and output, to hold at a time.
_POOLED_BLOCK = 128 << 20
# Largest number of rows per sample at which all rows are used.
_MAX_ROWS = 1024
_MAX_BYTES = 1 << 28  # of data; not a limit of the user's, so that little memory gives the same weights


@dataclass(frozen=True, slots=True)
class _Means:
    """All rows of some samples: rows of one part, and the number of positions of each sample."""

    rows: Rows
    positions: int

    def residuals(self, weights: Real, bias: Real) -> tuple[Array, Array]:
        """Return the mean residual of the activations, [samples, o], and where they are not saturated, [rows, o]."""
        fitted = fit(self.rows.data, weights, bias)
        residual = self.rows.clip(self.rows.target) - self.rows.clip(fitted)
        passed = np.ones(fitted.shape, bool)
        for saturation in self.rows.saturations:
            passed &= ~saturation.reached(fitted)
        samples = residual.shape[1] // self.positions
        return residual[0].reshape(samples, self.positions, -1).mean(axis=1), passed[0]


def sharpen(problem: Problem, solution: Solution, *, fixed_bias: bool = False) -> Solution:
    """Move the solution so that the spatial means behind the activation come closer to the original's.

    Steps of Gauss-Newton on sum_i |mean_p r(Y_ip) - mean_p r(X_ip W + b)|^2 over samples i, with a ridge towards
    ``solution``, r the activation between the layer and its target. Where only the mean over positions is read,
    errors of single positions matter little, and a small error common to all positions matters much. The new solution
    is returned only if its hold-out error is smaller.

    Args:
        problem: rows of a layer of one part whose target is read by a mean over positions.
        solution: weights [1, n, o], bias [1, o].
        fixed_bias: whether the bias has to stay 0.
    """
    train, hold_out = _AllRows(problem, False), _AllRows(problem, True)
    if train.is_empty or hold_out.is_empty:
        return solution
    first = best = _error(hold_out, solution.matrix, solution.bias)
    best_solution, limit = solution, first * (1.0 - WORTH)
    for ridge in _RIDGES:
        weights, bias = solution.matrix, solution.bias
        for step in range(1, _STEPS + 1):
            weights, bias = _step(train, weights, bias, ridge, fixed_bias, problem.mask)
            error = _error(hold_out, weights, bias)
            if error >= min(best, limit):
                break
            best, how = error, f"{solution.how}, mean {ridge:g} x {step}"
            best_solution = replace(solution, matrix=weights, bias=bias, how=how)
    return best_solution


class _AllRows:
    """All rows of hold-out samples or of the others, batch by batch; none where there are too many.

    They take more memory than data and targets (edges of saturation for each row): beyond a limit they are made again.
    """

    def __init__(self, problem: Problem, held_out: bool) -> None:
        self._problem, self._held_out = problem, held_out
        self._cached: list[_Means] | None = None
        self.is_empty = next(iter(self), None) is None

    def __iter__(self) -> Iterator[_Means]:
        if self._cached is not None:
            yield from self._cached
            return
        blocks: list[_Means] | None = []
        size = 0
        for rows, samples in self._problem.every_row(self._held_out, _MAX_ROWS, _MAX_BYTES):
            means = _Means(rows, rows.data.shape[1] // samples)
            yield means
            size += rows.nbytes
            if blocks is not None:
                blocks.append(means)
                blocks = blocks if size <= self._problem.memory // 2 else None
        self._cached = blocks


def _error(parts: _AllRows, weights: Real, bias: Real) -> float:
    return float(sum(np.square(p.residuals(weights, bias)[0], dtype=np.float64).sum() for p in parts))


def _step(
    parts: _AllRows, weights: Real, bias: Real, ridge: float, fixed_bias: bool, mask: Mask | None
) -> tuple[Real, Real]:
    """Return W + D, D_o = J_o^T (J_o J_o^T + r m I)^-1 e_o for every output o.

    J_o is the mean over positions of the rows at which its activation is not saturated, [samples, n], e_o the residual
    of the means, m the mean square of J_o's rows; columns outside of the mask are 0."""
    n, outputs = weights.shape[1:]
    blocks, residuals = [], []
    for part in parts:
        residual, passed = part.residuals(weights, bias)
        blocks.append((part.rows.data[0].reshape(-1, part.positions, n), passed))
        residuals.append(residual)
    errors = np.concatenate(residuals).astype(np.float64)
    samples = len(errors)
    new, shifted = weights.copy(), bias.copy()
    step = max(1, _POOLED_BLOCK // (8 * samples * (n + samples)))
    for start in range(0, outputs, step):
        at = slice(start, start + step)
        rows = np.concatenate([_rows(data, passed[:, at], fixed_bias) for data, passed in blocks], axis=1)
        if mask is not None:
            rows[:, :, :n] *= mask[0, :, at].T[:, None, :]
        products = rows @ rows.transpose(0, 2, 1)
        power = np.einsum("oii->o", products) / samples
        products += (ridge * power + (power <= 0))[:, None, None] * np.eye(samples)
        change = np.einsum("osn,os->no", rows, np.linalg.solve(products, errors[:, at].T[:, :, None])[:, :, 0])
        new[0, :, at] += change[:n]
        if not fixed_bias:
            shifted[0, at] += change[n]
    return new, shifted


def _rows(data: Array, passed: Array, fixed_bias: bool) -> Real:
    """Return J of data [samples, positions, n], [o, samples, n], and a last column of means of ones for the bias."""
    count = data.shape[1]
    mask = passed.reshape(len(data), count, -1).astype(data.dtype)
    means: Real = (np.matmul(mask.transpose(0, 2, 1), data) / count).transpose(1, 0, 2).astype(np.float64)
    if fixed_bias:
        return means
    return np.concatenate([means, mask.mean(axis=1, dtype=np.float64).T[:, :, None]], axis=2)


Stores = Callable[[Real, Real], tuple[Real, Real]]
"""(matrix, bias) -> the values that the layer has once they are written."""
# Rounds of refitting with saturation; each lowers the error, the first most.
_ROUNDS = 3
# Further ridges where the smallest of the grid is the best.
_FINER = (1e-8, 1e-10)


def recover_layer(
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
    solution = _pointwise(problem, matrix, bias, mode, fixed_bias)
    if mode == "full" and problem.layer.path.pooled and matrix.shape[0] == 1 and solution.before > NOTHING:
        solution = sharpen(problem, solution, fixed_bias=fixed_bias)
    return solution if as_stored is None else _rounded(problem, matrix, bias, solution, as_stored)


def _rounded(problem: Problem, matrix: Real, bias: Real, solution: Solution, as_stored: Stores) -> Solution:
    """Return the solution as it is stored, where its error stays below that of the present weights."""
    fitted, shifted = as_stored(solution.matrix, solution.bias)
    if fitted is solution.matrix or solution.how == "kept":
        return solution
    before = loss(problem.rows(True), matrix, bias)
    after = loss(problem.rows(True), fitted, shifted)
    if after >= before * (1.0 - WORTH):
        return Solution(matrix, bias, solution.before, solution.before, "kept")
    # The rounding error is a share of the hold-out scale of the fit, which may differ from these rows' sum of squares.
    unrounded = loss(problem.rows(True), solution.matrix, solution.bias)
    worse = solution.after * after / unrounded if unrounded > 0 else solution.after
    return Solution(fitted, shifted, solution.before, worse, f"{solution.how}, rounded", solution.ridge)


def _pointwise(problem: Problem, matrix: Real, bias: Real, mode: str, fixed_bias: bool) -> Solution:
    """Recover the layer from its rows, each on its own."""
    train, hold_out = problem.sums(False), problem.sums(True)
    regression = RidgeRegression(train, matrix, bias, fixed_bias, problem.mask) if mode in ("lstsq", "full") else None
    linear = solve(train, hold_out, matrix, bias, mode=mode, fixed_bias=fixed_bias, regression=regression)
    if regression is None or linear.ridge is None:
        return linear
    linear = _finer(regression, hold_out, linear)
    if mode != "full" or not problem.layer.path.saturations or linear.ridge is None:
        return linear
    best = _rounds(problem, regression, linear, matrix, bias)
    if not best.number:
        return linear
    how = f"{linear.how}, {best.number} rounds"
    return Solution(
        best.matrix, best.bias, best.before / hold_out.scale, best.after / hold_out.scale, how, linear.ridge
    )


def _finer(regression: RidgeRegression, hold_out: Moments, solution: Solution) -> Solution:
    """Return the solution, or one with a smaller ridge where the smallest ridge of the grid is the best so far.

    Where the survivors determine the removed channels exactly, the ridge is the only source of error.
    """
    if solution.ridge != RIDGES[0]:
        return solution
    for ridge in _FINER:
        try:
            fitted, shifted = regression.fit(ridge)
            error = float(hold_out.error(fitted, shifted).sum()) / hold_out.scale
            if error >= solution.after * (1.0 - WORTH):
                break
        except LinAlgError:
            break
        solution = Solution(fitted, shifted, solution.before, error, f"lstsq {ridge:g}", ridge)
    return solution


@dataclass(frozen=True, slots=True)
class _BestRound:
    """Weights of the round with the least error, its number, and the hold-out errors before and after it."""

    matrix: Real
    bias: Real
    number: int
    before: float
    after: float


def _rounds(problem: Problem, regression: RidgeRegression, linear: Solution, matrix: Real, bias: Real) -> _BestRound:
    """Refit on the training rows, round by round, as long as the hold-out error falls."""
    assert linear.ridge is not None
    before = loss(problem.rows(True), matrix, bias)
    w, b = linear.matrix, linear.bias
    best = _BestRound(w, b, 0, before, min(before, loss(problem.rows(True), w, b)) * (1.0 - WORTH))
    for number in range(1, _ROUNDS + 1):
        w, b = _round(problem.rows(False), regression, w, b, linear.ridge)
        error = loss(problem.rows(True), w, b)
        if error >= best.after:
            break
        best = _BestRound(w, b, number, before, error)
    return best


def _round(rows: Iterator[Rows], regression: RidgeRegression, w: Real, b: Real, ridge: float) -> tuple[Real, Real]:
    """Refit to targets that follow the last fit where the activation is saturated."""
    xy, y = np.zeros_like(w), np.zeros_like(b)
    for batch in rows:
        target = batch.expected(fit(batch.data, w, b))
        xy += np.matmul(batch.data.transpose(0, 2, 1), target.astype(batch.data.dtype))
        y += target.sum(axis=1, dtype=np.float64)
    return regression.fit(ridge, xy, y)
