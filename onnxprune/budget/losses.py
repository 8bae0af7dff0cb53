"""What every group may keep, and what it loses by it: from scores, or from what cutting each group alone did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.budget.allocate import Choices
from onnxprune.budget.sizes import Counts
from onnxprune.selection.scopes import RankedGroup, nearest_count, step_scores

Array = NDArray[np.float64]

# Levels of a group beyond which single ones hardly matter, and what all groups together may have.
_LEVELS, _ALL_LEVELS = 64, 3000


def levels_of(ranked: Sequence[RankedGroup], only: Sequence[Counts] | None = None) -> list[Counts]:
    """Steps that every group may keep, ascending: a group with a ratio of its own has no choice.

    Args:
        only: per group, the counts to take where there are any among the allowed ones.
    """
    most = max(8, min(_LEVELS, _ALL_LEVELS // max(1, len(ranked))))
    found = []
    for number, group in enumerate(ranked):
        if group.alone:
            kept = np.array([group.steps - nearest_count(group.counts, group.ratio * group.steps, "nearest")])
        else:
            kept = group.steps - group.counts[::-1]
            wanted = kept if only is None else kept[np.isin(kept, only[number])]
            kept = wanted if wanted.size > 1 else kept
            kept = kept[np.unique(np.linspace(0, kept.size - 1, most).round().astype(np.int64))]
        found.append(kept.astype(np.int64))
    return found


def by_scores(ranked: Sequence[RankedGroup], kept: Sequence[Counts]) -> Choices:
    """Losses that are sums of the scores of what goes."""
    losses = []
    for group, levels in zip(ranked, kept, strict=True):
        scores = step_scores(group, add=True)
        scores = scores - min(0.0, float(scores.min(initial=0.0)))
        total = np.concatenate([[0.0], np.cumsum(scores)])
        losses.append(total[group.steps - levels])
    return Choices(list(kept), losses)


def by_curves(
    ranked: Sequence[RankedGroup], kept: Sequence[Counts], curves: Mapping[int, tuple[Array, Array]], ids: Sequence[int]
) -> Choices:
    """Losses read off measured curves {group: (shares removed, losses)}; groups without one lose by their scores.

    Between measured shares the loss rises as the scores do, scaled to what was measured at both ends: what goes first
    matters least, which a straight line would not know.
    """
    scored = by_scores(ranked, kept)
    losses = []
    unit = _unit(ranked, curves, ids)
    for number, group, levels, loss in zip(ids, ranked, kept, scored.losses, strict=True):
        if number not in curves:
            losses.append(loss * unit)
            continue
        shares, measured = curves[number]
        losses.append(_along(group, levels, shares, measured))
    return Choices(list(kept), losses)


def _along(group: RankedGroup, levels: Counts, shares: Array, measured: Array) -> Array:
    """The measured curve at the levels, monotone, with the scores' shape between its points."""
    scores = step_scores(group, add=True)
    scores = scores - min(0.0, float(scores.min(initial=0.0)))
    total = np.concatenate([[0.0], np.cumsum(scores)])
    # The whole group has no measured loss: beyond the last point the curve goes on as the scores do.
    gone = np.concatenate([[0.0], shares]) * group.steps
    height = np.concatenate([[0.0], np.maximum.accumulate(np.maximum(measured, 0.0))])
    at = np.interp(gone, np.arange(total.size), total)
    wanted = total[group.steps - levels]
    if at[-1] <= 0:
        return np.asarray(np.interp(group.steps - levels, gone, height))
    last = height[-1] / at[-1]
    inside = np.interp(wanted, at, height)
    return np.asarray(np.where(wanted > at[-1], height[-1] + last * (wanted - at[-1]), inside))


def _unit(ranked: Sequence[RankedGroup], curves: Mapping[int, tuple[Array, Array]], ids: Sequence[int]) -> float:
    """Measured loss per score, over the groups that were measured."""
    ratios = []
    for number, group in zip(ids, ranked, strict=True):
        if number in curves:
            shares, measured = curves[number]
            total = np.cumsum(step_scores(group, add=True))
            at = float(total[min(total.size, max(1, round(shares[-1] * group.steps))) - 1])
            if at > 0:
                ratios.append(float(measured[-1]) / at)
    return float(np.median(ratios)) if ratios else 1.0
