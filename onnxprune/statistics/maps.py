"""What a criterion sees of the feature maps: finished statistics, one entry per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Maps:
    """Statistics of the feature maps in front of one contraction, in the order of its slot's channels.

    Attributes:
        samples: number of samples seen.
        arrays: statistics by name, float64; ``maps["mean"]`` reads one. ``moments`` gives ``mean``, ``square`` (mean of
            squares), ``magnitude`` (mean of absolute values) and ``active`` (share that is not 0), each [channels], and
            each is a statistic of its own too;
            ``nuclear`` and ``rank`` give themselves, [channels]; ``similarity`` gives ``similarity`` [channels,
            channels], the mean of products of two channels; ``gram`` gives ``gram`` [parts, n, n], the mean of products
            of two columns of the contraction's input, see ``Slot.taps``, and ``column_mean`` [parts, n]. A statistic
            that could not be computed is not there.
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
