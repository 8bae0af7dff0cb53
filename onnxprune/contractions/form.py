"""What every contraction with a constant weight has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Picked = NDArray[np.int64] | None


class Form(ABC):
    """One operator as ``rows(output) = columns(data) @ matrix(weight) + bias``, in independent ``parts``.

    Attributes:
        data, weight, bias: positions of the operator's inputs; ``bias`` is None where it takes none.
        axes: axes of the data that are summed over or that parts lie along, in the order of the channels.
        parts: products side by side (groups of a convolution), each with its own channels and outputs.
        taps: positions of the kernel; a part has ``channels / parts * taps`` columns, taps innermost.
        plain: the operator's output is this product (plus bias) and nothing else is done to it.
        scale: factor between the product and the operator's output (Gemm's alpha).
        bias_scale: factor of the bias (Gemm's beta).
    """

    data: int = 0
    weight: int = 1
    bias: int | None = None
    axes: tuple[int, ...] = (1,)
    parts: int = 1
    taps: int = 1
    plain: bool = True
    scale: float = 1.0
    bias_scale: float = 1.0

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Operators with equal keys cut the same data into the same columns."""

    @abstractmethod
    def columns(self, data: Array, pick: Picked = None) -> Array:
        """The data as [parts, rows, channels / parts * taps]; of the rows only those in ``pick``, where given."""

    @abstractmethod
    def rows(self, output: Array, pick: Picked = None) -> Array:
        """The output as [parts, rows, outputs / parts], rows in the order of ``columns``."""

    @abstractmethod
    def count(self, data: Sequence[int]) -> int:
        """How many rows data of this shape has."""

    @abstractmethod
    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for data and weight of these shapes."""

    @abstractmethod
    def matrix(self, weight: Array) -> Array:
        """The weight as [parts, channels / parts * taps, outputs / parts]."""

    @abstractmethod
    def restore(self, matrix: Array, like: Array) -> Array:
        """A weight of the shape of ``like`` from its matrix: the inverse of ``matrix``."""

    @abstractmethod
    def output_axis(self, rank: int) -> int | None:
        """The axis of an output of this rank that the matrix's last axis (parts outermost) is; None if several."""
