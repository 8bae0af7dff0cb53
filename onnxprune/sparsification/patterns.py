"""Patterns of zeros in a matrix [parts, contracted, outputs]: single weights, N of M, blocks. Arrays only.

The contracted axis runs over the positions of a kernel, and within each over the input channels: groups of M and the
columns of a block are neighbouring input channels, as runtimes with kernels for such patterns want it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]
Mask = NDArray[np.bool_]

UNSTRUCTURED = "unstructured"
LOCKED = -1.0
"""Score of elements that are 0 already, below all others: they stay 0."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Blocks of weights that become 0 together, and the blocks they are chosen among.

    Attributes:
        nonzero: elements that stay of every ``group`` contracted neighbours; 0: any number, as a ratio says.
        group: size of such a group.
        outputs, inputs: size of a block of zeros along the outputs and along the contracted axis.
    """

    nonzero: int = 0
    group: int = 1
    outputs: int = 1
    inputs: int = 1

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Return the pattern of a checked text: ``unstructured``, ``2:4``, ``4x1``.

        Raises:
            ValueError: it is none.
        """
        if text == UNSTRUCTURED:
            return cls()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            return cls(nonzero=int(match[1]), group=int(match[2]))
        if match := re.fullmatch(r"(\d+)x(\d+)", text):
            return cls(outputs=int(match[1]), inputs=int(match[2]))
        raise ValueError(text)

    def __str__(self) -> str:
        if self.nonzero:
            return f"{self.nonzero}:{self.group}"
        return UNSTRUCTURED if self.block == 1 else f"{self.outputs}x{self.inputs}"

    @property
    def ratio(self) -> float | None:
        """The share of zeros that the pattern sets; None where a ratio does."""
        return 1 - self.nonzero / self.group if self.nonzero else None

    @property
    def is_plain(self) -> bool:
        """Whether zeros may lie anywhere."""
        return not self.nonzero and self.block == 1

    @property
    def block(self) -> int:
        """The number of elements that become 0 together."""
        return self.outputs * self.inputs

    @property
    def half_size(self) -> Pattern:
        """Blocks of about half the size, which divide those of this pattern along their longer side."""
        outputs, inputs = (
            (_largest_divisor(self.outputs), self.inputs)
            if self.outputs >= self.inputs
            else (self.outputs, _largest_divisor(self.inputs))
        )
        return Pattern(outputs=outputs, inputs=inputs)

    @property
    def width(self) -> int:
        """The number of contracted neighbours among which zeros are chosen together."""
        return self.group if self.nonzero else self.inputs

    def misfit(self, channels: int, outputs: int) -> str:
        """Return the reason why the pattern does not fit so many input channels and outputs per part; else empty."""
        if channels % self.width:
            return f"its {channels} input channels are no multiple of {self.width}"
        return f"its {outputs} outputs are no multiple of {self.outputs}" if outputs % self.outputs else ""

    def at(self, share: float) -> Pattern:
        """Return the pattern on the way to this one, when this share of its zeros is there."""
        if not self.nonzero:
            return self
        zeros = max(1, round(share * (self.group - self.nonzero)))
        return Pattern(nonzero=self.group - zeros, group=self.group)

    def blocks(self, scores: Real) -> Real:
        """Sum scores [parts, n, o] over blocks: [parts, n / inputs, o / outputs]; blocks of zeros stay LOCKED."""
        if self.block == 1:
            return scores
        parts, n, o = scores.shape
        tiles = scores.reshape(parts, n // self.inputs, self.inputs, o // self.outputs, self.outputs)
        sums = np.maximum(tiles, 0).sum(axis=(2, 4))
        return np.where((tiles == LOCKED).all(axis=(2, 4)), LOCKED, sums)

    def expand(self, blocks: Mask) -> Mask:
        """Return the mask of elements of a mask of blocks."""
        if self.block == 1:
            return blocks
        return np.repeat(np.repeat(blocks, self.inputs, axis=1), self.outputs, axis=2)

    def zeros(self, scores: Real, count: int, *, per_output: bool = False) -> Mask:
        """Return a mask over the zeros: the ``count`` blocks of the lowest scores, or the lowest of every N:M group.

        Args:
            scores: [parts, n, o].
            count: number of blocks; without a meaning for N:M.
            per_output: whether every output gets the same number of zeros, up to one.
        """
        if self.nonzero:
            return self._of_groups(scores)
        blocks = self.blocks(scores)
        return self.expand(_lowest_per_output(blocks, count) if per_output else lowest(blocks, count))

    def _of_groups(self, scores: Real) -> Mask:
        parts, n, o = scores.shape
        groups = scores.reshape(parts, n // self.group, self.group, o)
        order = np.argsort(groups, axis=2, kind="stable")[:, :, : self.group - self.nonzero]
        mask = np.zeros(groups.shape, bool)
        np.put_along_axis(mask, order, True, axis=2)
        return mask.reshape(scores.shape)

    def holds(self, zeros: Mask) -> bool:
        """Return whether zeros [parts, n, o] are such a pattern: at least as many in every group, or whole blocks."""
        parts, n, o = zeros.shape
        if self.nonzero:
            if n % self.group:
                return False
            groups = zeros.reshape(parts, n // self.group, self.group, o)
            return bool((groups.sum(axis=2) >= self.group - self.nonzero).all())
        if n % self.inputs or o % self.outputs:
            return False
        tiles = zeros.reshape(parts, n // self.inputs, self.inputs, o // self.outputs, self.outputs)
        counts = tiles.sum(axis=(2, 4))
        return bool(((counts == 0) | (counts == self.block)).all())


def _largest_divisor(size: int) -> int:
    """Return the largest divisor of a size below it; 1 of 1."""
    return next((d for d in range(size // 2, 0, -1) if size % d == 0), 1)


def part_of_blocks(blocks: Mask, complete: Mask, scores: Real, finer_pattern: Pattern) -> Mask:
    """Return the zeros on the way to a mask of blocks: blocks chosen before, and half of the new ones.

    Args:
        blocks: the blocks chosen so far [parts, n, o].
        complete: those of them that become 0 as a whole [parts, n, o].
        scores: of single weights [parts, n, o].
        finer_pattern: pattern of the half of the others, which divides the blocks.
    """
    new = blocks & ~complete
    half = finer_pattern.zeros(np.where(new, scores, np.inf), int(new.sum()) // finer_pattern.block // 2)
    return np.asarray(complete | half)


def lowest(scores: Real, count: int) -> Mask:
    """Return a mask of the ``count`` lowest scores, of equal ones the first."""
    mask = np.zeros(scores.size, bool)
    if count > 0:
        flat = scores.ravel()
        limit = np.partition(flat, min(count, flat.size) - 1)[min(count, flat.size) - 1]
        mask[:] = flat < limit
        ties = np.flatnonzero(flat == limit)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def _lowest_per_output(scores: Real, count: int) -> Mask:
    """Return a mask of ``count`` low scores [parts, n, o]: the same number per output, and the rest the lowest left."""
    parts, n, o = scores.shape
    each, remainder = divmod(count, parts * o)
    order = np.argsort(scores, axis=1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[:, :each], True, axis=1)
    if remainder and each < n:
        following = np.take_along_axis(scores, order[:, each : each + 1], axis=1)
        more = lowest(following, remainder)
        np.put_along_axis(mask, order[:, each : each + 1], more, axis=1)
    return mask


def by_taps(taps: int, columns: int) -> NDArray[np.int64]:
    """Return the order of a form's columns with the positions of the kernel outermost, the channels innermost."""
    return np.arange(columns).reshape(columns // taps, taps).T.ravel()


KNOWN = ("2:4", "1:4", "4:8", "2:8", "1:8", "8:16")
"""N:M patterns to look for in a model, those with kernels first."""


def named(zeros: Mask, channels: int) -> str:
    """Return the name of the pattern that zeros [parts, n, o] show: N:M, blocks, ``unstructured``; empty without zeros.

    Args:
        zeros: mask, the channels innermost on axis 1.
        channels: number of input channels.
    """
    if not zeros.any():
        return ""
    share = zeros.mean()
    candidates = [Pattern.of(text) for text in KNOWN]
    matching = [p for p in candidates if not channels % p.group and (p.ratio or 0) <= share + 1e-9 and p.holds(zeros)]
    if matching:
        return str(max(matching, key=lambda p: (p.ratio or 0, -p.group)))
    for size in (16, 8, 4, 2):
        for pattern in (Pattern(outputs=size), Pattern(inputs=size)):
            if not channels % pattern.inputs and pattern.holds(zeros):
                return str(pattern)
    return UNSTRUCTURED
