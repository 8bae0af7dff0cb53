"""What a decomposition has to say for itself: where it applies, what it costs, how much it keeps at which ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from onnxprune.decompose.factor import Factor, Real, Stage
from onnxprune.decompose.metric import Metric

Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer's kernel: ``parts`` convolutions of ``inputs`` to ``outputs`` channels; no axes for a matrix."""

    parts: int
    inputs: int
    kernel: tuple[int, ...]
    outputs: int

    @property
    def columns(self) -> int:
        """Rows of the kernel as a matrix."""
        return self.inputs * prod(self.kernel)

    @property
    def wide(self) -> list[int]:
        """The spatial axes along which the kernel has more than one position."""
        return [i for i, k in enumerate(self.kernel) if k > 1]

    def whole(self) -> Stage:
        """The layer as one stage."""
        return Stage("whole", self.parts, self.inputs, self.kernel, self.outputs, tuple(range(len(self.kernel))))


@dataclass(frozen=True, slots=True)
class Mode:
    """One rank of a decomposition.

    Attributes:
        name: what it is the rank of. size: the largest that makes sense.
        energies: what every step adds to the energy kept, falling; None where there is no such order.
        other: the longer side of the matrix whose singular values squared these are.
    """

    name: str
    size: int
    energies: Real | None = None
    other: int = 0


class Fit(ABC):
    """A kernel laid open so that factors of any rank can be read off."""

    modes: tuple[Mode, ...]
    note: str = ""

    @abstractmethod
    def factors(self, ranks: Ranks) -> list[Factor]:
        """The factors at these ranks, one per mode."""


class Method(ABC):
    """One way to take a kernel apart.

    Attributes:
        name: of the command line. modes: what its ranks count, in their order.
    """

    name: str
    modes: tuple[str, ...] = ("rank",)

    @abstractmethod
    def refusal(self, shape: Shape) -> str:
        """Why kernels of this shape cannot be taken apart like this; empty where they can."""

    @abstractmethod
    def limits(self, shape: Shape) -> Ranks:
        """The largest rank of every mode: there the factors say what the kernel says."""

    @abstractmethod
    def stages(self, shape: Shape, ranks: Ranks) -> list[Stage]:
        """Shapes of the factors at these ranks."""

    @abstractmethod
    def fit(self, kernel: Real, metric: Metric, seed: int) -> Fit:
        """Lay a kernel [parts, inputs, *kernel, outputs] open, so that errors under ``metric`` are small."""


def shape_of(kernel: Real) -> Shape:
    """Sizes of a kernel [parts, inputs, *kernel, outputs]."""
    return Shape(kernel.shape[0], kernel.shape[1], tuple(kernel.shape[2:-1]), kernel.shape[-1])


def last(shape: Shape, inputs: int, axes: Sequence[int], role: str, outputs: int) -> Stage:
    """The stage that slides over ``axes`` with what the kernel has there, from ``inputs`` channels of every part."""
    kernel = tuple(k if i in axes else 1 for i, k in enumerate(shape.kernel))
    return Stage(role, shape.parts, inputs, kernel, outputs, tuple(axes))


def pointwise(shape: Shape, role: str, inputs: int, outputs: int) -> Stage:
    """A stage that mixes channels at every position on its own."""
    return Stage(role, shape.parts, inputs, (1,) * len(shape.kernel), outputs)


def placed(stages: Sequence[Stage], arrays: Sequence[Real]) -> list[Factor]:
    """Factors of these stages from their weights in any shape of the same order."""
    made = []
    for stage, array in zip(stages, arrays, strict=True):
        made.append(Factor(stage, array.reshape(stage.parts, stage.inputs, *stage.kernel, stage.outputs)))
    return made
