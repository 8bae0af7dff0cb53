"""What factors cost: multiply-accumulates of every stage at the sizes at which it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from onnxprune.decompose.factor import Stage


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a layer runs.

    Attributes:
        rows: samples times whatever else the kernel does not slide over. before, after: positions along every spatial
            axis of its input and of its output.
        spreading: it is a transposed convolution, whose work is per position of its input.
        looked_up: its first stage looks rows up and multiplies nothing.
    """

    rows: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    spreading: bool = False
    looked_up: bool = False

    def macs(self, stages: Sequence[Stage]) -> int:
        """Multiply-accumulates of stages in turn."""
        total, sizes = 0, list(self.before)
        for number, stage in enumerate(stages):
            if self.looked_up and number == 0:
                continue
            entering = prod(sizes)
            for axis in stage.axes:
                sizes[axis] = self.after[axis]
            positions = entering if self.spreading and stage.axes else prod(sizes)
            total += self.rows * positions * stage.elements
        return total


def elements(stages: Sequence[Stage]) -> int:
    """Weights of stages together."""
    return sum(stage.elements for stage in stages)
