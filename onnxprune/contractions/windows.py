"""Convolutions: columns are the windows that the kernel slides over (im2col), for any rank, stride and dilation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from onnxprune.contractions.form import Array, Form, Picked


class Windows(Form):
    """Conv: data [N, C, *space], weight [O, C / parts, *kernel], output [N, O, *space'].

    Args:
        kernel: sizes of the kernel. strides, dilations: one per spatial axis, default 1.
        pads: [begin..., end...] in ONNX's order, or "SAME_UPPER", "SAME_LOWER", "VALID".
        group: convolution groups.
    """

    def __init__(
        self,
        kernel: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | str | None = None,
        group: int = 1,
        data: int = 0,
        weight: int = 1,
        bias: int | None = 2,
        plain: bool = True,
    ) -> None:
        rank = len(kernel)
        self.kernel, self.parts, self.taps = tuple(kernel), group, prod(kernel)
        self.strides = tuple(strides or (1,) * rank)
        self.dilations = tuple(dilations or (1,) * rank)
        self.pads = pads if isinstance(pads, str) else tuple(pads or (0,) * (2 * rank))
        self.data, self.weight, self.bias, self.plain = data, weight, bias, plain

    @property
    def key(self) -> Hashable:
        """How windows lie."""
        return "windows", self.kernel, self.strides, self.dilations, self.pads, self.parts

    def _pairs(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Padding before and after every spatial axis."""
        rank = len(self.kernel)
        if not isinstance(self.pads, str):
            return [(self.pads[i], self.pads[i + rank]) for i in range(rank)]
        if self.pads == "VALID":
            return [(0, 0)] * rank
        pairs = []
        for n, k, s, d in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            small = total // 2
            pairs.append((small, total - small) if self.pads == "SAME_UPPER" else (total - small, small))
        return pairs

    def _slide(self, data: Array, pairs: Sequence[tuple[int, int]], strides: Sequence[int], pick: Picked) -> Array:
        """[parts, N * positions, C / parts * taps] of data with these paddings; negative ones crop."""
        crop = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pairs, data.shape[2:], strict=True))
        border = [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in pairs)]
        data = np.pad(data[(slice(None), slice(None), *crop)], border)
        rank = len(self.kernel)
        reach = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        windows = sliding_window_view(data, reach, axis=tuple(range(2, 2 + rank)))
        index = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
        index = (*index, *(slice(None, None, d) for d in self.dilations))
        windows = windows[index]
        n, channels = windows.shape[:2]
        space = windows.shape[2 : 2 + rank]
        if pick is None:
            rows = np.moveaxis(windows, 1, 1 + rank).reshape(n * prod(space), channels, self.taps)
        else:
            where = np.unravel_index(pick, (n, *space))
            # The slice between the indices sends what they pick to the front: [picked, channels, *kernel].
            chosen: Any = (where[0], slice(None), *where[1:])
            rows = windows[chosen].reshape(pick.size, channels, self.taps)
        rows = rows.reshape(len(rows), self.parts, -1)
        return rows.transpose(1, 0, 2)

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """One row per position of the output."""
        return self._slide(data, self._pairs(data.shape[2:]), self.strides, pick)

    def rows(self, output: Array, pick: Picked = None) -> Array:
        """[parts, N * positions, O / parts]."""
        n, made = output.shape[:2]
        if pick is None:
            rows = np.moveaxis(output.reshape(n, made, -1), 1, 2).reshape(-1, self.parts, made // self.parts)
        else:
            where = np.unravel_index(pick, (n, prod(output.shape[2:])))
            rows = output.reshape(n, made, -1)[where[0], :, where[1]].reshape(-1, self.parts, made // self.parts)
        return rows.transpose(1, 0, 2)

    def count(self, data: Sequence[int]) -> int:
        """Samples times positions of the output."""
        return int(data[0]) * prod(self._positions(data[2:]))

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """[N, O, *positions]."""
        return (int(data[0]), self._made(weight), *self._positions(data[2:]))

    def _made(self, weight: Sequence[int]) -> int:
        """Channels of the output."""
        return int(weight[0])

    def _positions(self, sizes: Sequence[int]) -> list[int]:
        """Positions of the output along every spatial axis."""
        return [
            (n + a + b - (k - 1) * d - 1) // s + 1
            for n, (a, b), k, s, d in zip(
                sizes, self._pairs(sizes), self.kernel, self.strides, self.dilations, strict=True
            )
        ]

    def matrix(self, weight: Array) -> Array:
        """[parts, C / parts * taps, O / parts]."""
        made, per_part = weight.shape[:2]
        return weight.reshape(self.parts, made // self.parts, per_part * self.taps).transpose(0, 2, 1)

    def restore(self, matrix: Array, like: Array) -> Array:
        """[O, C / parts, *kernel]."""
        return matrix.transpose(0, 2, 1).reshape(like.shape)

    def output_axis(self, rank: int) -> int | None:
        """Channels are on axis 1."""
        return 1


class Transposed(Windows):
    """ConvTranspose: data [N, C, *space], weight [C, O / parts, *kernel].

    As the convolution of the data spread out by the strides with the flipped kernel; ``output_padding`` adds rows at
    the end. ``output_shape`` and SAME padding are for the caller to turn into pads.
    """

    def __init__(self, kernel: Sequence[int], *, output_padding: Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__(kernel, **settings)
        self.output_padding = tuple(output_padding or (0,) * len(self.kernel))

    @property
    def key(self) -> Hashable:
        """How windows lie."""
        return "transposed", super().key, self.output_padding

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """One row per position of the output."""
        sizes = [(n - 1) * s + 1 for n, s in zip(data.shape[2:], self.strides, strict=True)]
        spread = np.zeros((*data.shape[:2], *sizes), data.dtype)
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in self.strides))] = data
        return self._slide(spread, self._border(), (1,) * len(self.kernel), pick)

    def _made(self, weight: Sequence[int]) -> int:
        """Channels of the output."""
        return int(weight[1]) * self.parts

    def _border(self) -> list[tuple[int, int]]:
        """Padding around the spread-out data."""
        assert not isinstance(self.pads, str)
        rank, pairs = len(self.kernel), []
        for i, (k, d, extra) in enumerate(zip(self.kernel, self.dilations, self.output_padding, strict=True)):
            reach = (k - 1) * d
            pairs.append((reach - self.pads[i], reach - self.pads[i + rank] + extra))
        return pairs

    def _positions(self, sizes: Sequence[int]) -> list[int]:
        """Positions of the output along every spatial axis."""
        return [
            (n - 1) * s + 1 + a + b - (k - 1) * d
            for n, (a, b), k, s, d in zip(sizes, self._border(), self.kernel, self.strides, self.dilations, strict=True)
        ]

    def matrix(self, weight: Array) -> Array:
        """[parts, C / parts * taps, O / parts], taps flipped."""
        flipped = np.flip(weight, axis=tuple(range(2, weight.ndim)))
        channels, per_part = flipped.shape[:2]
        spread = flipped.reshape(self.parts, channels // self.parts, per_part, self.taps)
        return spread.transpose(0, 1, 3, 2).reshape(self.parts, channels // self.parts * self.taps, per_part)

    def restore(self, matrix: Array, like: Array) -> Array:
        """[C, O / parts, *kernel]."""
        channels, per_part = like.shape[:2]
        spread = matrix.reshape(self.parts, channels // self.parts, self.taps, per_part).transpose(0, 1, 3, 2)
        return np.flip(spread.reshape(like.shape), axis=tuple(range(2, like.ndim)))
