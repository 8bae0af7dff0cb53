"""BatchNormalization as a product: one weight per channel, so that scale and shift can be fitted like any others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from onnxprune.contractions.form import Array, Form, Picked


class Scale(Form):
    """``scale * normalised + shift`` with statistics folded in; every channel is a part with one column.

    The weight is the scale that the data is multiplied with, gamma / sqrt(variance + epsilon).
    """

    weight, bias = 1, 2

    def __init__(self, channels: int) -> None:
        self.parts, self.axes = channels, (1,)

    @classmethod
    def of(cls, inputs: int, shape: Any) -> Scale | None:
        """The form for data of this shape; None where the channels are not known."""
        return cls(int(shape[1])) if inputs == 5 and shape is not None and len(shape) > 1 and shape[1] else None

    @property
    def key(self) -> Hashable:
        """How columns lie."""
        return "scale", self.parts

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """[channels, samples * positions, 1]."""
        flat = np.moveaxis(data, 1, 0).reshape(data.shape[1], -1, 1)
        return flat if pick is None else flat[:, pick]

    def rows(self, output: Array, pick: Picked = None) -> Array:
        """As the data's columns."""
        return self.columns(output, pick)

    def count(self, data: Sequence[int]) -> int:
        """Samples times positions."""
        return int(np.prod(data)) // int(data[1])

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """The data's."""
        return tuple(data)

    def matrix(self, weight: Array) -> Array:
        """[channels, 1, 1]."""
        return weight.reshape(-1, 1, 1)

    def restore(self, matrix: Array, like: Array) -> Array:
        """[channels]."""
        return matrix.reshape(like.shape)

    def output_axis(self, rank: int) -> int | None:
        """Channels are on axis 1."""
        return 1
