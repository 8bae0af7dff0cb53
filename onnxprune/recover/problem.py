"""The regression of one layer: rows of its input in the cut model, rows of what its output should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.contractions import pick, rows_per_sample
from onnxprune.recover.aims import Aim
from onnxprune.recover.sums import Real, Sums

Array = NDArray[Any]
Get = Callable[[str, int], Array]
"""(tensor, number of the batch) -> value."""

# Rows per unknown that a layer is fitted to, where there are so many.
_ROWS = 100
# One batch in so many is held out to judge a repair by.
HELD = 5
# Bytes of rows to keep between passes over them.
_KEPT = 256 << 20


@dataclass(slots=True)
class Flat:
    """Where an activation behind the layer is flat, so that only the side of its edge matters.

    Attributes:
        there: whether the wanted output lies on the flat side, [parts, rows, o].
        edge: the output at the edge, of the same shape. rises: whether the output grows away from the flat side.
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

    def wanted(self, fitted: Array) -> Array:
        """The target, where both it and the fitted output lie on one flat side the fitted output, else the edge."""
        target = self.target
        for flat in self.flats:
            target = np.where(flat.there, np.where(flat.reached(fitted), fitted, flat.edge), target)
        return target


@dataclass(slots=True)
class Problem:
    """Where the rows of one layer come from.

    Args:
        aim: the layer. weight: shape of its weight. channels: of its input.
        cut, full: values in the cut model and in the original. steps: gathers that take a tensor of the original to
            its surviving positions. batches, samples: how many.
    """

    aim: Aim
    weight: Sequence[int]
    channels: int
    cut: Get
    full: Get
    steps: Sequence[tuple[int, NDArray[np.int64]]]
    batches: int
    samples: int
    _kept: dict[int, Rows] | None = None
    _bytes: int = 0

    def rows(self, held: bool | None = None) -> Iterator[Rows]:
        """Batch by batch; held out ones, the others, or (None) all."""
        if self._kept is None:
            self._kept = {}
        few = self.batches < HELD
        for batch in range(self.batches):
            if held is not None and not few and held != (batch % HELD == HELD - 1):
                continue
            rows = self._kept.get(batch)
            if rows is None:
                rows = self._read(batch)
                size = rows.data.nbytes + rows.target.nbytes * (1 + 2 * len(rows.flats))
                if self._bytes + size <= _KEPT:
                    self._kept[batch], self._bytes = rows, self._bytes + size
            yield rows

    def sums(self, held: bool | None = None) -> Sums:
        """Sums over batches of data and target as they are."""
        total: Sums | None = None
        for rows in self.rows(held):
            one = Sums.of(rows.data, rows.target)
            if total is None:
                total = one
            else:
                total.add(one)
        assert total is not None
        return total

    def _read(self, batch: int) -> Rows:
        form, tail = self.aim.form, self.aim.tail
        data = np.asarray(self.cut(self.aim.data, batch))
        wanted = np.asarray(self.full(tail.aim, batch))
        for axis, index in self.steps:
            wanted = wanted.take(index, axis=axis) if index.ndim == 1 else np.take_along_axis(wanted, index, axis=axis)
        addends = [np.asarray(self.cut(n, batch)) for n in tail.addends]
        shape = form.output_shape(data.shape, self.weight)
        chosen = pick(form, data, rows_per_sample(form, self.channels, self.samples, _ROWS))

        def output(value: Array) -> Array:
            return form.rows(tail.back(value, addends, shape), chosen)

        flats = []
        for level, below in tail.flats:
            edge = output(np.full_like(wanted, level))
            beyond = output(np.full_like(wanted, level + (1.0 if below else -1.0)))
            there = wanted <= level if below else wanted >= level
            # Laid out as the output is, without its arithmetic.
            mask = form.rows(tail.moved_back(there, shape), chosen)
            flats.append(Flat(mask, edge, beyond > edge))
        return Rows(form.columns(data, chosen), output(wanted), flats)


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
