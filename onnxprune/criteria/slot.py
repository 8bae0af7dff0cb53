"""The arrays a criterion sees: one weight, from the channels of one group, and the feature maps in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.statistics.maps import Maps


@dataclass(slots=True)
class Slot:
    """One weight seen from one group of units.

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

    @property
    def rng(self) -> np.random.Generator:
        """A generator that is the same for every slot of a group, so that a unit draws the same number everywhere."""
        return np.random.default_rng(list(self.seed))

    @property
    def matrix(self) -> NDArray[Any]:
        """The weight as [channels, features]: a row per channel. A copy unless channels come first."""
        before, channels, after = self.blocks.shape
        if before == 1:
            return self.blocks.reshape(channels, after)
        return self.blocks.transpose(1, 0, 2).reshape(channels, before * after)

    def reads(self, op: str, position: int) -> bool:
        """Whether some ``op`` node takes the weight as input ``position``."""
        return (op, position) in self.role
