"""The regression of one layer: rows of its input in the cut model, rows of what its output should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.contractions import Picked, pick, rows_per_sample
from onnxprune.recover.aims import RecoveryTarget
from onnxprune.recover.held import HELD, is_held
from onnxprune.recover.logits import Mixing
from onnxprune.recover.sums import Real, Sums

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
        """Some of the rows."""
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
        """The target, where both it and the fitted output lie on one flat side the fitted output, else the edge."""
        target = self.target
        for flat in self.flats:
            target = np.where(flat.there, np.where(flat.reached(fitted), fitted, flat.edge), target)
        return target

    def clipped(self, output: Array) -> Array:
        """Outputs on a flat side moved to its edge."""
        for flat in self.flats:
            output = np.where(flat.rises, np.maximum(output, flat.edge), np.minimum(output, flat.edge))
        return output


@dataclass(slots=True)
class Problem:
    """Where the rows of one layer come from.

    Args:
        aim: the layer. weight: shape of its weight. channels: of its input.
        cut, full: values in the cut model and in the original. steps: gathers that take a tensor of the original to
            its surviving positions. batches: those that the layer runs in. samples: how many they hold.
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
        """Sums over batches of data and target as they are."""
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
