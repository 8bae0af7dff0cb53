"""The arrays a criterion sees: one tensor axis where the units of one group appear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
    """

    tensor: str
    axis: int
    blocks: NDArray[Any]
    role: Sequence[tuple[str, int]]
    units: NDArray[np.int64]
    size: int
    seed: Sequence[int] = (0,)

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
