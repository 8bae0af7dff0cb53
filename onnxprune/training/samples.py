"""Samples of a training, drawn in random order as calls of one size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from onnxprune.graph.probes import SampleAxes
from onnxprune.runtime.capture import count
from onnxprune.runtime.sessions import Array, Feed

_Sizes = frozenset[tuple[str, tuple[int, ...]]]
"""Sizes of the inputs of a call."""


class TrainingSamples:
    """The samples of a split, drawn in random order, each once before any again.

    Where samples cannot be taken out of their calls, whole calls are drawn. A training graph has one size: of inputs of
    several, those of the commonest are drawn.

    Args:
        feeds: the calls.
        size: samples of a call that is drawn.
        labels: of all samples, in their order; None: without.
        seed: seed of the order.
        axes: see :data:`onnxprune.graph.probes.SampleAxes`.
        like: a call of the size to draw; None: the commonest.

    Attributes:
        size: samples of a call that is drawn.
        count: number of samples, without those of other sizes.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        size: int,
        labels: Array | None,
        seed: int,
        axes: SampleAxes | None = None,
        like: Feed | None = None,
    ) -> None:
        self._feeds, self._labels, self._seed, self._all_axes = feeds, labels, seed, axes
        self._axes = _axes_in(feeds, axes or {})
        calls = [(self._sizes(feed), self._count(feed)) for feed in feeds]
        totals = Counter[_Sizes]()
        for sizes, number in calls:
            totals[sizes] += number
        drawn = totals.most_common(1)[0][0] if like is None else self._sizes(like)
        self.count = totals[drawn]
        self._used = [k for k, (sizes, _) in enumerate(calls) if sizes == drawn]
        counts = [number for _, number in calls]
        self._starts = np.cumsum([0, *counts])  # of calls, among all samples
        self._ends = np.cumsum([counts[k] if self._axes else 1 for k in self._used])  # among those to draw
        self.size = size if self._axes or not self._used else counts[self._used[0]]

    @property
    def num(self) -> int:
        """The number of samples, or of whole calls where samples cannot be taken out of them."""
        return int(self._ends[-1]) if self._used else 0

    def draw(self, number: int) -> tuple[Feed, Array | None]:
        """Return one call and its labels; the same ones for the same number."""
        need = self.size if self._axes else 1
        first, last = number * need // self.num, ((number + 1) * need - 1) // self.num
        rounds = [np.random.default_rng([self._seed, k]).permutation(self.num) for k in range(first, last + 1)]
        start = number * need - first * self.num
        index = np.concatenate(rounds)[start : start + need]
        batches = np.searchsorted(self._ends, index, side="right")
        if not self._axes:
            call = self._used[batches[0]]
            labels = None if self._labels is None else self._labels[self._starts[call] : self._starts[call + 1]]
            return dict(self._feeds[call]), labels
        return self._gathered(index, batches)

    def _gathered(self, index: Array, batches: Array) -> tuple[Feed, Array | None]:
        """Return samples of several batches as one call; only the batches that they lie in are opened."""
        result: Feed = {}
        rows = np.empty(len(index), np.int64)
        for batch in np.unique(batches):
            call, places = self._used[batch], np.flatnonzero(batches == batch)
            inside = index[places] - (self._ends[batch - 1] if batch else 0)
            rows[places] = self._starts[call] + inside
            for name, value in self._feeds[call].items():
                if name not in self._axes:
                    result[name] = value
                    continue
                axis = self._axes[name]
                if name not in result:
                    result[name] = np.empty((*value.shape[:axis], len(index), *value.shape[axis + 1 :]), value.dtype)
                np.moveaxis(result[name], axis, 0)[places] = np.moveaxis(value, axis, 0)[inside]
        return result, None if self._labels is None else self._labels[rows]

    def _count(self, feed: Feed) -> int:
        """Return the number of samples of a call."""
        return next((feed[name].shape[axis] for name, axis in self._axes.items()), 0) or count(feed)

    def _sizes(self, feed: Feed) -> _Sizes:
        """Return the sizes of the inputs of a call, without the number of samples where they can be taken out."""
        axes = self._axes
        return frozenset((n, tuple(m for a, m in enumerate(v.shape) if a != axes.get(n))) for n, v in feed.items())

    def beside(self, feeds: Sequence[Feed], labels: Array | None) -> TrainingSamples:
        """Return the samples of other calls, drawn in the size of these; these themselves where none has it."""
        samples = TrainingSamples(feeds, self.size, labels, self._seed, self._all_axes, self.draw(0)[0])
        return samples if samples.num else self


def _axes_in(feeds: Sequence[Feed], axes: SampleAxes) -> dict[str, int]:
    """Return the axes of the inputs that have samples; none where samples cannot be taken out of their calls.

    They can be where all other inputs have the same values in every call.
    """
    first = feeds[0]
    known = {name: axes.get(name, 0) for name, value in first.items() if value.ndim}
    result = {name: axis for name, axis in known.items() if axis is not None}
    for feed in feeds:
        sizes = {feed[name].shape[axis] for name, axis in result.items() if name in feed}
        others = all(np.array_equal(feed[name], first[name]) for name in first if name in feed and name not in result)
        if feed.keys() != first.keys() or len(sizes) != 1 or not others:
            return {}
    return result


def position_axes(rank: int) -> range:
    """Return the axes of the positions of an output, [sample, position, value] or [sample, value, *positions].

    Args:
        rank: number of its axes.
    """
    return range(1, 2) if rank == 3 else range(2, rank)
