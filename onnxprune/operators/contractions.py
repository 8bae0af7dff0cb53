"""Contractions as matrix products: columns of the data times a matrix of the weight. Arrays only."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
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


class Pairwise(Form):
    """``einsum(data, weight -> output)``; letters of the weight that the data shares are summed over, or are parts.

    Args:
        terms: subscripts of data, weight and output.
        sizes: of the weight, along its subscripts.
        data, weight, bias, plain, scale, bias_scale: see :class:`Form`.

    Raises:
        ValueError: a letter stands twice in one operand, or a letter of the weight is in neither data nor output.
    """

    def __init__(
        self,
        terms: tuple[str, str, str],
        sizes: Sequence[int],
        *,
        data: int = 0,
        weight: int = 1,
        bias: int | None = None,
        plain: bool = True,
        scale: float = 1.0,
        bias_scale: float = 1.0,
    ) -> None:
        left, right, out = terms
        if any(len(set(t)) != len(t) for t in terms) or any(c not in left + out for c in right):
            raise ValueError(f"no product of two operands: {terms}")
        self.data, self.weight, self.bias, self.plain = data, weight, bias, plain
        self.scale, self.bias_scale = scale, bias_scale
        self.terms, self.size = terms, dict(zip(right, sizes, strict=True))
        self.part_letters = "".join(c for c in right if c in left and c in out)
        self.summed = "".join(c for c in right if c in left and c not in out)
        self.made = "".join(c for c in out if c in right and c not in left)
        self.free = "".join(c for c in left if c not in right)
        self.axes = tuple(left.index(c) for c in self.part_letters + self.summed)
        self.parts = prod(self.size[c] for c in self.part_letters)

    @property
    def key(self) -> Hashable:
        """The data's axes by role."""
        left = self.terms[0]
        return "pairwise", tuple(left.index(c) for c in self.part_letters), self.axes, self.parts

    def _arrange(self, array: Array, term: str, groups: tuple[str, str, str]) -> Array:
        """The operand with its axes merged into three."""
        order = [term.index(c) for group in groups for c in group]
        moved = np.transpose(array, order)
        sizes = dict(zip("".join(groups), moved.shape, strict=True))
        return moved.reshape([prod(sizes[c] for c in group) for group in groups])

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """Letters that only the data has are the rows."""
        every = self._arrange(data, self.terms[0], (self.part_letters, self.free, self.summed))
        return every if pick is None else every[:, pick]

    def rows(self, output: Array, pick: Picked = None) -> Array:
        """Letters that the output shares with the data alone are the rows."""
        every = self._arrange(output, self.terms[2], (self.part_letters, self.free, self.made))
        return every if pick is None else every[:, pick]

    def count(self, data: Sequence[int]) -> int:
        """Product of the sizes of the free letters."""
        return prod(data[self.terms[0].index(c)] for c in self.free)

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the output's letters."""
        sizes = dict(zip(self.terms[0] + self.terms[1], (*data, *weight), strict=True))
        return tuple(sizes[c] for c in self.terms[2])

    def matrix(self, weight: Array) -> Array:
        """[parts, summed, made]."""
        return self._arrange(weight, self.terms[1], (self.part_letters, self.summed, self.made))

    def restore(self, matrix: Array, like: Array) -> Array:
        """Undo the merging and the transposition."""
        letters = self.part_letters + self.summed + self.made
        sizes = dict(zip(self.terms[1], like.shape, strict=True))
        spread = matrix.reshape([sizes[c] for c in letters])
        return np.transpose(spread, [letters.index(c) for c in self.terms[1]])

    def output_axis(self, rank: int) -> int | None:
        """The axis of the only letter that the weight makes, where there are no parts."""
        return self.terms[2].index(self.made) if len(self.made) == 1 and not self.part_letters else None


class Blocks(Pairwise):
    """Data [..., size] times a weight [made, blocks, block] whose last two axes are the data's last, padded in the end.

    Args:
        outer: a letter for each of the data's other axes.
        size: of the data's last axis.
        made: outputs.
    """

    def __init__(self, outer: str, size: int, made: int) -> None:
        super().__init__((outer + "k", "nk", outer + "n"), (made, size), plain=False)

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """The data's with another last axis."""
        return (*data[:-1], weight[0])

    def matrix(self, weight: Array) -> Array:
        """[1, size, made]."""
        return super().matrix(weight.reshape(len(weight), -1)[:, : self.size["k"]])

    def restore(self, matrix: Array, like: Array) -> Array:
        """[made, blocks, block], 0 behind the data's size."""
        result = np.zeros(like.shape, matrix.dtype)
        flat = result.reshape(len(like), -1)
        flat[:, : self.size["k"]] = super().restore(matrix, flat[:, : self.size["k"]])
        return result


def rows_per_sample(form: Form, channels: int, samples: int | None, per_column: int = 30, least: int = 1 << 14) -> int:
    """Rows to take of every sample, so that all ``samples`` (512 where unknown) give enough of them together.

    Args:
        per_column: how many; what is estimated from them errs by about 1 / sqrt(per_column).
        least: rows to take however few columns there are.
    """
    columns = channels // form.parts * form.taps
    return -(-max(per_column * columns, least) // (samples or 512))


def pick(form: Form, data: Array, per_sample: int) -> Picked:
    """That many rows of every sample, the same for the same data; None where that is (nearly) all of them."""
    total = form.count(data.shape)
    wanted = per_sample * len(data)
    if wanted * 4 >= total * 3:
        return None
    seed = zlib.crc32(np.ascontiguousarray(data.ravel()[:4096]).tobytes())
    # One random row out of each of equally long runs: spread over samples and positions.
    edges = np.linspace(0, total, wanted + 1)
    offsets = np.random.default_rng(seed).random(wanted)
    return np.minimum((edges[:-1] + offsets * np.diff(edges)).astype(np.int64), total - 1)


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


class Windows(Form):
    """Conv: data [N, C, *space], weight [O, C / parts, *kernel], output [N, O, *space'].

    Args:
        kernel: sizes of the kernel.
        strides, dilations: one per spatial axis, default 1.
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


__all__ = ["Blocks", "Form", "Pairwise", "Picked", "Scale", "Transposed", "Windows", "pick", "rows_per_sample"]
