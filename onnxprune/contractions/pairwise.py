"""Products of two operands over letters: MatMul, Gemm, Einsum, the input of a recurrent layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod

import numpy as np

from onnxprune.contractions.form import Array, Form, Picked


class Pairwise(Form):
    """``einsum(data, weight -> output)``; letters of the weight that the data shares are summed over, or are parts.

    Args:
        terms: subscripts of data, weight and output. sizes: of the weight, along its subscripts.
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
        outer: a letter for each of the data's other axes. size: of the data's last axis. made: outputs.
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
