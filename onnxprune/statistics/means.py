"""What the statistics share: weighted means over batches, and the refusal of NaN."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import ModelError
from onnxprune.statistics.registry import Statistic


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
