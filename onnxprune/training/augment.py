"""Variants of images that a model answers alike, at the same places or at moved ones: shifted, and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxprune.runtime.sessions import Array, Feed
from onnxprune.training.samples import position_axes

_LEAST, _SHARE = 16, 8  # smallest side of an image, and which part of it a shift may be
_INDIFFERENT = 0.9


class Augmentation:
    """Shifts and reflections of the images in a batch, a random one for each.

    Args:
        axes: input -> its two spatial axes.
        shift: whether to shift.
        mirror: whether to reflect half of the images.
    """

    def __init__(self, axes: dict[str, tuple[int, int]], shift: bool, mirror: bool) -> None:
        self._axes, self._shift, self._mirror = axes, shift, mirror

    @classmethod
    def suited(
        cls, feeds: Sequence[Feed], answers: Callable[[Feed], Sequence[Array]], allowed: str = "auto"
    ) -> Augmentation:
        """Return the variants that change the answers of a model to its inputs little.

        Answers at positions of an image move with what is seen there: they are compared in the order of their size.

        Args:
            feeds: inputs to try it on.
            answers: the model.
            allowed: ``shift``, ``flip``, or ``auto`` for both.
        """
        axes = {name: spatial for name, value in feeds[0].items() if (spatial := image_axes(value)) is not None}

        def indifferent(one: Augmentation) -> bool:
            rng, pairs = np.random.default_rng(0), list[tuple[Array, Array]]()
            for feed in feeds:
                pairs += zip(answers(feed), answers(one(feed, rng)), strict=True)
            return bool(axes) and all(_cosine(_ordered(a), _ordered(b)) >= _INDIFFERENT for a, b in pairs)

        shifts = allowed != "flip" and indifferent(cls(axes, True, False))
        return cls(axes, shifts, allowed != "shift" and indifferent(cls(axes, False, True)))

    @property
    def name(self) -> str:
        """Return the augmentations in words; empty for none."""
        return " and ".join(["shifts"] * self._shift + ["reflections"] * self._mirror)

    def __call__(self, feed: Feed, rng: np.random.Generator) -> Feed:
        """Return other variants of the images in a feed."""
        if not self.name:
            return feed
        result = dict(feed)
        count = len(next(iter(feed.values())))
        moves = rng.uniform(-1, 1, (count, 2)) if self._shift else np.zeros((count, 2))
        mirrored = rng.random(count) < 0.5 if self._mirror else np.zeros(count, bool)
        for name, axes in self._axes.items():
            result[name] = _moved(feed[name], axes, moves, mirrored)
        return result


def image_axes(value: Array) -> tuple[int, int] | None:
    """Return the spatial axes of a batch of images of 1, 3 or 4 channels; None for anything else."""
    if value.ndim != 4 or value.dtype.kind != "f":
        return None
    for channel, axes in ((1, (2, 3)), (3, (1, 2))):
        if value.shape[channel] in (1, 3, 4) and min(value.shape[a] for a in axes) >= _LEAST:
            return axes
    return None


def _moved(images: Array, axes: tuple[int, int], moves: Array, mirrored: Array) -> Array:
    """Shift each image, filling up by reflection, and mirror some left to right."""
    sizes = [images.shape[a] for a in axes]
    reach = [max(1, n // _SHARE) for n in sizes]
    pads = [(0, 0)] * images.ndim
    for axis, margin in zip(axes, reach, strict=True):
        pads[axis] = (margin, margin)
    wide = np.pad(images, pads, "reflect") if moves.any() else images
    result = np.empty_like(images)
    for k in range(len(images)):
        picture = wide[k]
        for axis, size, margin, move in zip(axes, sizes, reach, moves[k], strict=True):
            if wide is not images:
                start = margin + round(float(move) * margin)
                picture = picture.take(range(start, start + size), axis=axis - 1)
        result[k] = np.flip(picture, axis=axes[1] - 1) if mirrored[k] else picture
    return result


def _ordered(answers: Array) -> Array:
    """Return answers in ascending order over positions."""
    axes = position_axes(answers.ndim)
    if not axes:
        return answers
    others = [axis for axis in range(answers.ndim) if axis not in axes]
    moved = answers.transpose(*others, *axes)
    return np.sort(moved.reshape(*moved.shape[: len(others)], -1), axis=-1)


def _cosine(a: Array, b: Array) -> float:
    one, other = (x.astype(np.float64).ravel() for x in (a, b))
    norms = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / norms if norms else 1.0
