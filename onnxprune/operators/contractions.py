"""Contractions as matrix products: columns of the data times a matrix of the weight. Arrays only."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import prod
from typing import Any
from warnings import warn

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]
Picked = NDArray[np.int64] | None


class Form(ABC):
    """An operator as ``rows(output) = columns(data) @ matrix(weight) + bias``, in independent ``parts``.

    Attributes:
        data: position of the data among the operator's inputs.
        weight: position of the weight among the operator's inputs.
        bias: position of the bias among the operator's inputs; None for an operator without one.
        axes: axes of the data that are summed over or that parts lie along, in the order of the channels.
        parts: number of independent products (groups of a convolution), each with its own channels and outputs.
        taps: positions of the kernel; a part has ``channels / parts * taps`` columns, taps innermost.
        plain: whether the operator's output is exactly this product (plus bias).
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
        """Return a key: operators with equal keys unfold the same data into the same columns."""

    @property
    def is_uniform(self) -> bool:
        """Return whether a channel that is the same everywhere has the same columns everywhere, borders included."""
        return True

    @abstractmethod
    def columns(self, data: Array, pick: Picked = None) -> Array:
        """Unfold the data into [parts, rows, channels / parts * taps], only the rows in ``pick`` where given."""

    @abstractmethod
    def rows(self, output: Array, pick: Picked = None) -> Array:
        """Arrange the output as [parts, rows, outputs / parts], rows in the order of ``columns``."""

    @abstractmethod
    def count(self, data: Sequence[int]) -> int:
        """Return the number of rows for data of this shape."""

    @abstractmethod
    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the output for data and weight of these shapes."""

    @abstractmethod
    def matrix(self, weight: Array) -> Array:
        """Arrange the weight as [parts, channels / parts * taps, outputs / parts]."""

    def summed_axes(self, weight: Sequence[int]) -> set[int]:
        """Return the axes of a weight of this shape that are summed over."""
        axes = set()
        for axis, size in enumerate(weight):
            positions = np.arange(size, dtype=np.int32).reshape([-1 if a == axis else 1 for a in range(len(weight))])
            matrix = self.matrix(np.broadcast_to(positions, weight))
            if (matrix != matrix[:, :1]).any():
                axes.add(axis)
        return axes

    @abstractmethod
    def restore(self, matrix: Array, like: Array) -> Array:
        """Convert a matrix to a weight of the shape of ``like``: the inverse of ``matrix``."""

    @abstractmethod
    def output_axis(self, rank: int) -> int | None:
        """Return the axis, of an output of this rank, of the matrix's last axis (parts outermost); None if several."""


class Pairwise(Form):
    """``einsum(data, weight -> output)``; letters that data and weight share are summed over, or are parts.

    Args:
        terms: subscripts of data, weight and output.
        sizes: sizes of the weight, along its subscripts.
        data: see :class:`Form`.
        weight: see :class:`Form`.
        bias: see :class:`Form`.
        plain: see :class:`Form`.
        scale: see :class:`Form`.
        bias_scale: see :class:`Form`.

    Raises:
        ValueError: a letter repeats in one operand, or a letter of the weight is in neither data nor output.
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
        self.output_letters = "".join(c for c in out if c in right and c not in left)
        self.free = "".join(c for c in left if c not in right)
        self.axes = tuple(left.index(c) for c in self.part_letters + self.summed)
        self.parts = prod(self.size[c] for c in self.part_letters)

    @property
    def key(self) -> Hashable:
        """Return the data's axes by role."""
        left = self.terms[0]
        return "pairwise", tuple(left.index(c) for c in self.part_letters), self.axes, self.parts

    def __getattr__(self, name: str) -> Any:
        """Return an attribute by its former name, which warns."""
        if name == "made":
            warn("Pairwise.made is called output_letters now.", DeprecationWarning, stacklevel=2)
            return self.output_letters
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _arrange(self, array: Array, term: str, groups: tuple[str, str, str]) -> Array:
        """Merge the axes of the operand into three."""
        order = [term.index(c) for group in groups for c in group]
        transposed = np.transpose(array, order)
        sizes = dict(zip("".join(groups), transposed.shape, strict=True))
        return transposed.reshape([prod(sizes[c] for c in group) for group in groups])

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """Unfold the data; its own letters are the rows."""
        arranged = self._arrange(data, self.terms[0], (self.part_letters, self.free, self.summed))
        return arranged if pick is None else arranged[:, pick]

    def rows(self, output: Array, pick: Picked = None) -> Array:
        """Arrange the output; the letters shared with the data alone are the rows."""
        arranged = self._arrange(output, self.terms[2], (self.part_letters, self.free, self.output_letters))
        return arranged if pick is None else arranged[:, pick]

    def count(self, data: Sequence[int]) -> int:
        """Return the product of the sizes of the free letters."""
        return prod(data[self.terms[0].index(c)] for c in self.free)

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of the output's letters."""
        sizes = dict(zip(self.terms[0] + self.terms[1], (*data, *weight), strict=True))
        return tuple(sizes[c] for c in self.terms[2])

    def matrix(self, weight: Array) -> Array:
        """Arrange the weight as [parts, summed, made]."""
        return self._arrange(weight, self.terms[1], (self.part_letters, self.summed, self.output_letters))

    def restore(self, matrix: Array, like: Array) -> Array:
        """Invert the merge and the transposition of ``matrix``."""
        letters = self.part_letters + self.summed + self.output_letters
        sizes = dict(zip(self.terms[1], like.shape, strict=True))
        spread = matrix.reshape([sizes[c] for c in letters])
        return np.transpose(spread, [letters.index(c) for c in self.terms[1]])

    def output_axis(self, rank: int) -> int | None:
        """Return the axis of the only letter that the weight contributes, where there are no parts."""
        return (
            self.terms[2].index(self.output_letters)
            if len(self.output_letters) == 1 and not self.part_letters
            else None
        )


class Blocks(Pairwise):
    """Data [..., size] times a weight [made, blocks, block] whose last two axes are the data's last, padded at the end.

    Args:
        outer: one letter per other axis of the data.
        size: size of the data's last axis.
        outputs: number of outputs.
        bias: position of the bias; None where there is none.
    """

    def __init__(self, outer: str, size: int, outputs: int, bias: int | None = None) -> None:
        super().__init__((outer + "k", "nk", outer + "n"), (outputs, size), bias=bias)

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Return the data's shape with another last axis."""
        return (*data[:-1], weight[0])

    def matrix(self, weight: Array) -> Array:
        """Arrange the weight as [1, size, made]."""
        return super().matrix(weight.reshape(len(weight), -1)[:, : self.size["k"]])

    def restore(self, matrix: Array, like: Array) -> Array:
        """Convert to [made, blocks, block], 0 beyond the data's size."""
        result = np.zeros(like.shape, matrix.dtype)
        flat = result.reshape(len(like), -1)
        flat[:, : self.size["k"]] = super().restore(matrix, flat[:, : self.size["k"]])
        return result


def rows_per_sample(
    form: Form, channels: int, samples: int | None, per_column: int = 30, min_rows: int = 1 << 14
) -> int:
    """Return the rows to sample per example, so that all ``samples`` (512 where unknown) together give enough rows.

    Args:
        form: matrix form of the operator.
        channels: number of channels of the data.
        samples: number of examples; unknown counts as 512.
        per_column: rows per column; estimates from them have a relative error of about 1 / sqrt(per_column).
        min_rows: lower bound of the rows over all examples, for few columns.
    """
    columns = channels // form.parts * form.taps
    return -(-max(per_column * columns, min_rows) // (samples or 512))


def pick(form: Form, data: Array, per_sample: int, counted: NDArray[np.bool_] | None = None) -> Picked:
    """Select ``per_sample`` rows per sample, deterministic per data; None where that is (nearly) all of them.

    Args:
        form: the layer as a matrix product.
        data: the data.
        per_sample: number of rows per sample, padding included.
        counted: which positions are no padding, [positions of all samples]; rows of the others are left out where
            every position is a row. None: all count.
    """
    total = form.count(data.shape)
    picked = _spread(data, total, per_sample * len(data))
    if counted is None or form.axes != (data.ndim - 1,) or form.parts > 1 or counted.size != total:
        return picked
    rows = np.flatnonzero(counted) if picked is None else picked[counted[picked]]
    return rows if rows.size else picked


def _spread(data: Array, total: int, num_rows: int) -> Picked:
    """Return rows spread over samples and positions; None where they are (nearly) all."""
    if num_rows * 4 >= total * 3:
        return None
    seed = zlib.crc32(np.ascontiguousarray(data.ravel()[:4096]).tobytes())
    # One random row out of each of equally long runs.
    starts, lengths = _runs(total, num_rows)
    offsets = np.random.default_rng(seed).random(num_rows)
    return np.minimum((starts + offsets * lengths).astype(np.int64), total - 1)


# Importances that vary less, as their standard deviation over their mean, are what a random estimate happens to show.
_ALIKE = 0.5


def draw_rows(importance: Array, num_rows: int) -> Picked:
    """Draw rows with probabilities of which half is even and half follows their importance; None where that is alike.

    A least-squares fit to rows that are drawn weighs each by its probability. Draws are spread evenly: rows that are
    alike are drawn equally often.

    Args:
        importance: importance of every row, [rows], 0 or more.
        num_rows: number of rows to draw, some of them several times; never more than there are.
    """
    total = importance.size
    mean = float(importance.mean(dtype=np.float64))
    if not 0 < mean < np.inf or importance.std(dtype=np.float64) < _ALIKE * mean:
        return None
    edges = np.cumsum(0.5 / total + 0.5 / (mean * total) * importance.astype(np.float64))
    count = min(num_rows, total)
    seed = zlib.crc32(np.ascontiguousarray(importance).tobytes())
    draws = (np.arange(count) + np.random.default_rng(seed).random(count)) / count
    return np.minimum(np.searchsorted(edges, draws), total - 1)


@lru_cache(maxsize=64)
def _runs(total: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the starts and the lengths of ``count`` equally long runs of ``total`` rows."""
    edges = np.linspace(0, total, count + 1)
    return edges[:-1], np.diff(edges)


class Scale(Form):
    """``scale * normalised + shift`` with folded statistics; every channel is a part with one column.

    The weight is the factor of the data, gamma / sqrt(variance + epsilon).
    """

    weight, bias = 1, 2

    def __init__(self, channels: int) -> None:
        self.parts, self.axes = channels, (1,)

    @classmethod
    def of(cls, inputs: int, shape: Any) -> Scale | None:
        """Return the form for data of this shape; None where the channels are not known."""
        return cls(int(shape[1])) if inputs == 5 and shape is not None and len(shape) > 1 and shape[1] else None

    @property
    def key(self) -> Hashable:
        """Return a key of the layout of the columns."""
        return "scale", self.parts

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """Arrange the data as [channels, samples * positions, 1]."""
        flat = np.moveaxis(data, 1, 0).reshape(data.shape[1], -1, 1)
        return flat if pick is None else flat[:, pick]

    def rows(self, output: Array, pick: Picked = None) -> Array:
        """Arrange the output like the data."""
        return self.columns(output, pick)

    def count(self, data: Sequence[int]) -> int:
        """Return samples times positions."""
        return int(np.prod(data)) // int(data[1])

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the data."""
        return tuple(data)

    def matrix(self, weight: Array) -> Array:
        """Arrange the weight as [channels, 1, 1]."""
        return weight.reshape(-1, 1, 1)

    def restore(self, matrix: Array, like: Array) -> Array:
        """Convert to a weight [channels]."""
        return matrix.reshape(like.shape)

    def output_axis(self, rank: int) -> int | None:
        """Return axis 1, the channels."""
        return 1


class Windows(Form):
    """Conv: data [N, C, *space], weight [O, C / parts, *kernel], output [N, O, *space'].

    Args:
        kernel: sizes of the kernel, one per spatial axis.
        strides: one per spatial axis, default 1.
        dilations: one per spatial axis, default 1.
        pads: [begin..., end...] in ONNX's order, or "SAME_UPPER", "SAME_LOWER", "VALID".
        group: number of convolution groups.
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
        """Return a key of the layout of the windows."""
        return "windows", self.kernel, self.strides, self.dilations, self.pads, self.parts

    @property
    def is_uniform(self) -> bool:
        """Return whether no window reaches beyond the data, at any size."""
        if isinstance(self.pads, str):
            return self.pads == "VALID" or self.taps == 1
        return not any(self.pads)

    def _pairs(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Return the padding before and after every spatial axis."""
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
        """Unfold padded data into [parts, N * positions, C / parts * taps]; negative padding crops."""
        if pick is not None:
            return self._gather(data, pairs, strides, pick)
        crop = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pairs, data.shape[2:], strict=True))
        data = _bordered(data[(slice(None), slice(None), *crop)], [(max(a, 0), max(b, 0)) for a, b in pairs])
        rank = len(self.kernel)
        reach = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        windows = sliding_window_view(data, reach, axis=tuple(range(2, 2 + rank)))
        index = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
        index = (*index, *(slice(None, None, d) for d in self.dilations))
        windows = windows[index]
        n, channels = windows.shape[:2]
        space = windows.shape[2 : 2 + rank]
        rows = np.moveaxis(windows, 1, 1 + rank).reshape(n * prod(space), channels, self.taps)
        rows = rows.reshape(len(rows), self.parts, -1)
        return rows.transpose(1, 0, 2)

    def _gather(
        self, data: Array, pairs: Sequence[tuple[int, int]], strides: Sequence[int], pick: NDArray[np.int64]
    ) -> Array:
        """Unfold a few windows as ``_slide`` does, without a copy of all data."""
        sizes = data.shape[2:]
        axes = list(zip(sizes, pairs, strides, self.kernel, self.dilations, strict=True))
        space = [(n + a + b - (k - 1) * d - 1) // s + 1 for n, (a, b), s, k, d in axes]
        sample, *where = np.unravel_index(pick, (data.shape[0], *space))
        flat, inside = np.zeros((pick.size, 1), np.int64), np.ones((pick.size, 1), bool)
        for first, (n, (before, _), s, k, d) in zip(where, axes, strict=True):
            at = first[:, None] * s - before + d * np.arange(k)
            flat = (flat[:, :, None] * n + np.clip(at, 0, n - 1)[:, None, :]).reshape(pick.size, -1)
            inside = (inside[:, :, None] & ((at >= 0) & (at < n))[:, None, :]).reshape(pick.size, -1)
        rows = np.empty((data.shape[1], pick.size, self.taps), data.dtype)
        maps = data.reshape(*data.shape[:2], -1)
        # One sample after the other: taking from a map is many times faster than indices of samples and positions.
        for number in np.unique(sample):
            picked = slice(None) if len(data) == 1 else np.flatnonzero(sample == number)
            places = flat[picked]
            rows[:, picked] = maps[number].take(places.ravel(), axis=1).reshape(-1, *places.shape)
        rows[:, ~inside] = 0
        return rows.reshape(self.parts, -1, pick.size, self.taps).swapaxes(1, 2).reshape(self.parts, pick.size, -1)

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """Unfold the data, one row per position of the output."""
        return self._slide(data, self._pairs(data.shape[2:]), self.strides, pick)

    def rows(self, output: Array, pick: Picked = None) -> Array:
        """Arrange the output as [parts, N * positions, O / parts]."""
        n, num_outputs = output.shape[:2]
        if pick is None:
            rows = np.moveaxis(output.reshape(n, num_outputs, -1), 1, 2).reshape(
                -1, self.parts, num_outputs // self.parts
            )
        else:
            where = np.unravel_index(pick, (n, prod(output.shape[2:])))
            rows = output.reshape(n, num_outputs, -1)[where[0], :, where[1]].reshape(
                -1, self.parts, num_outputs // self.parts
            )
        return rows.transpose(1, 0, 2)

    def count(self, data: Sequence[int]) -> int:
        """Return samples times positions of the output."""
        return int(data[0]) * prod(self._positions(data[2:]))

    def output_shape(self, data: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Return shape [N, O, *positions]."""
        return (int(data[0]), self._num_outputs(weight), *self._positions(data[2:]))

    def _num_outputs(self, weight: Sequence[int]) -> int:
        """Return the number of output channels."""
        return int(weight[0])

    def _positions(self, sizes: Sequence[int]) -> list[int]:
        """Return the positions of the output along every spatial axis."""
        return [
            (n + a + b - (k - 1) * d - 1) // s + 1
            for n, (a, b), k, s, d in zip(
                sizes, self._pairs(sizes), self.kernel, self.strides, self.dilations, strict=True
            )
        ]

    def matrix(self, weight: Array) -> Array:
        """Arrange the weight as [parts, C / parts * taps, O / parts]."""
        num_outputs, per_part = weight.shape[:2]
        return weight.reshape(self.parts, num_outputs // self.parts, per_part * self.taps).transpose(0, 2, 1)

    def restore(self, matrix: Array, like: Array) -> Array:
        """Convert to a weight [O, C / parts, *kernel]."""
        return matrix.transpose(0, 2, 1).reshape(like.shape)

    def output_axis(self, rank: int) -> int | None:
        """Return axis 1, the channels."""
        return 1


def _bordered(data: Array, border: Sequence[tuple[int, int]]) -> Array:
    """Return the data [N, C, *space] with zeros around every spatial axis; the data themselves where there are none."""
    if not any(a or b for a, b in border):
        return data
    sizes = [n + a + b for n, (a, b) in zip(data.shape[2:], border, strict=True)]
    padded = np.zeros((*data.shape[:2], *sizes), data.dtype)
    inner = tuple(slice(a, a + n) for n, (a, _) in zip(data.shape[2:], border, strict=True))
    padded[(slice(None), slice(None), *inner)] = data
    return padded


class Transposed(Windows):
    """ConvTranspose: data [N, C, *space], weight [C, O / parts, *kernel].

    Computed as the convolution of the data, dilated by the strides, with the flipped kernel; ``output_padding`` adds
    rows at the end. The caller converts ``output_shape`` and SAME padding to pads.
    """

    def __init__(self, kernel: Sequence[int], *, output_padding: Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__(kernel, **settings)
        self.output_padding = tuple(output_padding or (0,) * len(self.kernel))

    @property
    def key(self) -> Hashable:
        """Return a key of the layout of the windows."""
        return "transposed", super().key, self.output_padding

    @property
    def is_uniform(self) -> bool:
        """Return whether every output reads one position: others read more of them inside than at the border."""
        return self.taps == 1 and set(self.strides) == {1} and not any((*self.pads, *self.output_padding))

    def columns(self, data: Array, pick: Picked = None) -> Array:
        """Unfold the data, one row per position of the output."""
        sizes = [(n - 1) * s + 1 for n, s in zip(data.shape[2:], self.strides, strict=True)]
        spread = np.zeros((*data.shape[:2], *sizes), data.dtype)
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in self.strides))] = data
        return self._slide(spread, self._border(), (1,) * len(self.kernel), pick)

    def _num_outputs(self, weight: Sequence[int]) -> int:
        """Return the number of output channels."""
        return int(weight[1]) * self.parts

    def _border(self) -> list[tuple[int, int]]:
        """Return the padding around the dilated data."""
        assert not isinstance(self.pads, str)
        rank, pairs = len(self.kernel), []
        for i, (k, d, extra) in enumerate(zip(self.kernel, self.dilations, self.output_padding, strict=True)):
            reach = (k - 1) * d
            pairs.append((reach - self.pads[i], reach - self.pads[i + rank] + extra))
        return pairs

    def _positions(self, sizes: Sequence[int]) -> list[int]:
        """Return the positions of the output along every spatial axis."""
        return [
            (n - 1) * s + 1 + a + b - (k - 1) * d
            for n, (a, b), k, s, d in zip(sizes, self._border(), self.kernel, self.strides, self.dilations, strict=True)
        ]

    def matrix(self, weight: Array) -> Array:
        """Arrange the weight as [parts, C / parts * taps, O / parts], taps flipped."""
        flipped = np.flip(weight, axis=tuple(range(2, weight.ndim)))
        channels, per_part = flipped.shape[:2]
        spread = flipped.reshape(self.parts, channels // self.parts, per_part, self.taps)
        return spread.transpose(0, 1, 3, 2).reshape(self.parts, channels // self.parts * self.taps, per_part)

    def restore(self, matrix: Array, like: Array) -> Array:
        """Convert to a weight [C, O / parts, *kernel]."""
        channels, per_part = like.shape[:2]
        spread = matrix.reshape(self.parts, channels // self.parts, self.taps, per_part).transpose(0, 1, 3, 2)
        return np.flip(spread.reshape(like.shape), axis=tuple(range(2, like.ndim)))


__all__ = ["Blocks", "Form", "Pairwise", "Picked", "Scale", "Transposed", "Windows", "pick", "rows_per_sample"]
