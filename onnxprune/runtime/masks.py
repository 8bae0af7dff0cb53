"""Padding: positions of a call that an attention mask among the inputs leaves out, and those of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxprune.runtime.sessions import Array, Feed


class Padding:
    """Positions of a call's samples that are no padding.

    A mask is an input with "mask" in its name that holds 0 and 1, for every position of every sample: [samples,
    positions], or with axes of size 1 between. Samples whose mask is 0 everywhere count in full, so that a mask of
    another meaning leaves no model without data. Of several masks of one size, a position counts where one holds 1.

    Args:
        feed: one call of the model.
    """

    def __init__(self, feed: Feed) -> None:
        self._counted: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        for name, value in feed.items():
            if "mask" not in name.lower() or value.ndim < 2 or value.dtype.kind not in "iubf":
                continue
            if prod(value.shape[1:-1]) != 1 or not np.isin(value, (0, 1)).all():
                continue
            mask = value.reshape(len(value), -1) != 0
            mask = mask | ~mask.any(axis=1, keepdims=True)
            self._counted[mask.shape] = mask | self._counted.get(mask.shape, np.zeros_like(mask))

    def __bool__(self) -> bool:
        """Return whether a position is padding."""
        return any(not mask.all() for mask in self._counted.values())

    def rows(self, shape: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return a mask over rows, True where there is no padding, [rows], bool; None where no mask fits: all are data.

        Args:
            shape: sizes of the rows' axes, in order: (samples, positions, ...), or the product of both alone.
        """
        for sizes, mask in self._counted.items():
            if tuple(shape[:2]) == sizes or (len(shape) == 1 and shape[0] == mask.size):
                return np.repeat(mask.ravel(), prod(shape[2:]))
        return None

    def counted(self, shape: Sequence[int], channels: Sequence[int] = ()) -> NDArray[np.bool_] | None:
        """Return a mask that broadcasts, True at positions that are no padding; None where no mask fits.

        Args:
            shape: shape of an array with samples along its first axis, or samples and positions together.
            channels: axes that are no positions.
        """
        return next((mask for mask in self._each_counted(shape, channels)), None)

    def shares(self, shape: Sequence[int], channels: Sequence[int] = ()) -> NDArray[np.float32] | None:
        """Return the weight of every position in a mean without padding, which broadcasts; None where all are equal.

        Args:
            shape: shape of an array with samples along its first axis, or samples and positions together.
            channels: axes that are no positions.
        """
        masks = (mask for mask in self._each_counted(shape, channels) if not mask.all())
        return next(((mask / np.float32(mask.mean())).astype(np.float32) for mask in masks), None)

    def _each_counted(self, shape: Sequence[int], channels: Sequence[int]) -> Iterator[NDArray[np.bool_]]:
        """Iterate over the masks that fit an array, in the array's rank."""
        for (samples, positions), mask in self._counted.items():
            if shape and 0 not in channels and shape[0] == samples * positions != samples:
                yield mask.reshape(-1, *[1] * (len(shape) - 1))
                continue
            axis = _position_axis(shape, positions, channels)
            if axis is not None and shape[0] == samples:
                yield mask.reshape([n if a in (0, axis) else 1 for a, n in enumerate(shape)])

    def parts(
        self, values: Sequence[Feed], channels: Mapping[str, Sequence[int]] | None = None
    ) -> Iterator[list[Feed]]:
        """Iterate over samples with the same number of positions together, without their padding.

        Args:
            values: arrays by name, several times: inputs, outputs of two models.
            channels: axes that are no positions, by name.

        Returns:
            ``values`` at each of these samples, as if they had never been padded. Arrays without an axis of samples are
            as they were.
        """
        masks = list(self._counted.values())
        samples = {len(mask) for mask in masks}
        if not self or len(samples) > 1:
            yield list(values)
            return
        lengths = np.stack([mask.sum(axis=1) for mask in masks], axis=1)
        for length in np.unique(lengths, axis=0):
            index = np.flatnonzero((lengths == length).all(axis=1))
            yield [
                {name: self.at(value, index, (channels or {}).get(name, ())) for name, value in feed.items()}
                for feed in values
            ]

    def at(self, value: Array, index: NDArray[np.intp], channels: Sequence[int] = ()) -> Array:
        """Return an array at some samples with equally many positions each, without their padding.

        Args:
            value: array with samples along its first axis, or samples and positions together.
            index: numbers of the samples.
            channels: axes that are no positions.
        """
        for (samples, positions), mask in self._counted.items():
            if value.ndim and 0 not in channels and len(value) == samples * positions != samples:
                together = value.reshape(samples, positions, *value.shape[1:])
                return np.concatenate([together[i, mask[i]] for i in index])
        samples = len(next(iter(self._counted.values())))
        if not value.ndim or 0 in channels or len(value) != samples:
            return value
        for (_, positions), mask in self._counted.items():
            axis = _position_axis(value.shape, positions, channels)
            if axis is not None:
                moved = np.moveaxis(value, axis, 1)
                return np.moveaxis(np.stack([moved[i, mask[i]] for i in index]), 1, axis)
        return value[index]


def _position_axis(shape: Sequence[int], positions: int, channels: Sequence[int]) -> int | None:
    """Return the axis of positions: the first one of their number; None where that may be the heads as well."""
    axes = [a for a, size in enumerate(shape) if a and size == positions and a not in channels]
    if len(shape) > 3 and axes[:2] == [1, 2]:
        return None
    return axes[0] if axes else None


def counted_rows(feed: Feed, shape: Sequence[int]) -> NDArray[np.bool_] | None:
    """Return a mask over rows, True where there is no padding, [rows], bool; None where no mask fits: all are data.

    Args:
        feed: one call of the model.
        shape: sizes of the rows' axes, in order: (samples, positions), or their product alone.
    """
    return Padding(feed).rows(shape)


def without_padding(feed: Feed, values: Feed) -> Iterator[Feed]:
    """Iterate over arrays of one call, samples with the same number of positions together, without their padding.

    Args:
        feed: inputs of the call.
        values: arrays with samples along their first axis, such as its outputs.
    """
    for (part,) in Padding(feed).parts([values]):
        yield part
