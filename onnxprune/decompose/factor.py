"""Factors of a kernel: small convolutions that follow each other, and what they amount to together."""

from __future__ import annotations

from collections.abc import Sequence
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
        role: where it stands (``in``, ``core``, ``out``, ...), part of the names of what is made from it.
        kernel: its size along every spatial axis of the layer, 1 along those that it does not slide over.
        axes: the spatial axes that it takes the layer's strides, pads and dilations of; every axis is one factor's.
    """

    role: str
    parts: int
    inputs: int
    kernel: tuple[int, ...]
    outputs: int
    axes: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.parts * self.inputs * prod(self.kernel) * self.outputs


@dataclass(frozen=True, slots=True)
class Factor:
    """A stage with its weights, [parts, inputs, *kernel, outputs] in float64."""

    stage: Stage
    array: Real

    @classmethod
    def of(cls, role: str, array: Array, axes: Sequence[int] = ()) -> Factor:
        """A factor from its weights [parts, inputs, *kernel, outputs]."""
        parts, inputs, *kernel, outputs = array.shape
        return cls(Stage(role, parts, inputs, tuple(kernel), outputs, tuple(axes)), np.asarray(array, np.float64))

    def split(self, parts: int) -> Array:
        """[parts, own parts / parts, inputs, *kernel, outputs]."""
        return self.array.reshape(parts, -1, *self.array.shape[1:])


def compose(factors: Sequence[Factor], parts: int, channels: int) -> Real:
    """What the factors amount to, [parts, channels, *kernel, outputs]: one convolution with the product of kernels.

    Args:
        parts: of the layer. channels: that one part of it reads.
    """
    rank = len(factors[0].stage.kernel)
    whole = np.broadcast_to(np.eye(channels), (parts, channels, channels)).reshape(parts, channels, *[1] * rank, -1)
    for factor in factors:
        own = factor.split(parts)
        inner, before, behind = own.shape[1], whole.shape[2:-1], own.shape[3:-1]
        left = whole.reshape(parts, channels * prod(before), inner, own.shape[2]).transpose(0, 2, 1, 3)
        right = own.reshape(parts, inner, own.shape[2], -1)
        product = (left @ right).reshape(parts, inner, channels, *before, *behind, -1)
        # Axes of both kernels in turn: along each of them one of the two has size 1.
        pairs = [a for i in range(rank) for a in (3 + i, 3 + rank + i)]
        spread = product.transpose(0, 2, *pairs, 1, 3 + 2 * rank)
        sizes = [a * b for a, b in zip(before, behind, strict=True)]
        whole = spread.reshape(parts, channels, *sizes, -1)
    return np.asarray(whole)


def features(prefix: Sequence[Factor], array: Array) -> Real:
    """T^T A for what the prefix makes of the columns: [parts, features, *kernel left, m].

    Args:
        prefix: factors, T together. array: A [parts, channels, *kernel, m]; kernel axes that the prefix slides over are
            used up, the others stay.
    """
    parts, width = array.shape[0], array.shape[-1]
    for factor in prefix:
        own, axes = factor.split(parts), [i for i, k in enumerate(factor.stage.kernel) if k > 1]
        kernel = array.shape[2:-1]
        spread = array.reshape(parts, own.shape[1], own.shape[2], *kernel, width)
        rest = [i for i in range(len(kernel)) if i not in axes]
        spread = spread.transpose(0, 1, 2, *(3 + i for i in axes), *(3 + i for i in rest), 3 + len(kernel))
        taken = own.reshape(parts, own.shape[1], -1, own.shape[-1])
        made = taken.transpose(0, 1, 3, 2) @ spread.reshape(parts, own.shape[1], taken.shape[2], -1)
        left = [1 if i in axes else k for i, k in enumerate(kernel)]
        array = made.reshape(parts, -1, *left, width)
    return np.asarray(array)
