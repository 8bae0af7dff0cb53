"""Kernels of layers and the factors that replace them, as sizes and arrays. Arrays only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Real = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stage:
    """The shape of a factor: ``parts`` convolutions side by side, each from ``inputs`` to ``outputs`` channels.

    Attributes:
        role: its place (``in``, ``core``, ``out``, ...), part of the names of its node and weight.
        kernel: its size along every spatial axis of the layer, 1 along those that it does not slide over.
        axes: the spatial axes whose strides, pads and dilations it applies; every axis belongs to one factor.
    """

    role: str
    parts: int
    inputs: int
    kernel: tuple[int, ...]
    outputs: int
    axes: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Return the number of weights."""
        return self.parts * self.inputs * prod(self.kernel) * self.outputs


@dataclass(frozen=True, slots=True)
class Factor:
    """A stage with its weights, [parts, inputs, *kernel, outputs] in float64."""

    stage: Stage
    array: Real

    @classmethod
    def of(cls, role: str, array: Array, axes: Sequence[int] = ()) -> Factor:
        """Build a factor from its weights [parts, inputs, *kernel, outputs]."""
        parts, inputs, *kernel, outputs = array.shape
        return cls(Stage(role, parts, inputs, tuple(kernel), outputs, tuple(axes)), np.asarray(array, np.float64))

    def split(self, parts: int) -> Array:
        """Return the weights as [parts, own parts / parts, inputs, *kernel, outputs]."""
        return self.array.reshape(parts, -1, *self.array.shape[1:])


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer's kernel: ``parts`` convolutions of ``inputs`` to ``outputs`` channels; no axes for a matrix."""

    parts: int
    inputs: int
    kernel: tuple[int, ...]
    outputs: int

    @property
    def columns(self) -> int:
        """Return the number of rows of the kernel as a matrix."""
        return self.inputs * prod(self.kernel)

    @property
    def wide(self) -> list[int]:
        """Return the spatial axes along which the kernel has more than one position."""
        return [i for i, k in enumerate(self.kernel) if k > 1]

    def as_stage(self) -> Stage:
        """Return the layer as one stage."""
        return Stage("whole", self.parts, self.inputs, self.kernel, self.outputs, tuple(range(len(self.kernel))))


@dataclass(frozen=True, slots=True)
class Geometry:
    """The geometry of a layer.

    Attributes:
        rows: samples times the sizes of all axes that the kernel does not slide over.
        before, after: positions along every spatial axis of its input and of its output.
        spreading: whether it is a transposed convolution, whose work is per position of its input.
        looked_up: whether its first stage looks rows up without multiplication.
    """

    rows: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    spreading: bool = False
    looked_up: bool = False

    def macs(self, stages: Sequence[Stage]) -> int:
        """Return the multiply-accumulates of stages in sequence."""
        total = 0
        for number, (stage, entering, leaving) in enumerate(self._positions(stages)):
            if not (self.looked_up and number == 0):
                total += self.rows * (entering if self.spreading and stage.axes else leaving) * stage.elements
        return total

    def moved(self, stages: Sequence[Stage]) -> int:
        """Return the number of elements that stages in sequence read and write."""
        positions = self._positions(stages)
        return self.rows * sum(s.parts * (s.inputs * before + s.outputs * after) for s, before, after in positions)

    def _positions(self, stages: Sequence[Stage]) -> Iterator[tuple[Stage, int, int]]:
        """Yield every stage with the number of positions of its input and of its output."""
        sizes = list(self.before)
        for stage in stages:
            entering = prod(sizes)
            for axis in stage.axes:
                sizes[axis] = self.after[axis]
            yield stage, entering, prod(sizes)


def elements(stages: Sequence[Stage]) -> int:
    """Return the number of weights of all stages."""
    return sum(stage.elements for stage in stages)
