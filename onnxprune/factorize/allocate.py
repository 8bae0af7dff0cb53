"""Which layer gives how much, so that together they cost no more than asked and lose least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.factorize.candidates import Candidate


def allocate(
    wholes: Sequence[int], options: Sequence[Sequence[Candidate]], gains: Sequence[float], budget: float
) -> list[Candidate | None] | None:
    """One candidate per layer, or None to leave it; None for all where even the cheapest cost too much.

    Greedy along the lower convex hulls of loss over cost, the linear relaxation of the multiple-choice knapsack (Sinha
    and Zoltners, Operations Research 1979), then the cheapest single change that makes the last step smaller.

    Args:
        wholes: cost of every layer as it is. options: what could stand in its place.
        gains: what a layer's loss counts, per layer. budget: what all layers may cost together.
    """
    chosen: list[Candidate | None] = [None] * len(wholes)
    total = float(sum(wholes))
    steps = []
    for k, (whole, own) in enumerate(zip(wholes, options, strict=True)):
        previous, lost = whole, 0.0
        for candidate in _hull(whole, own):
            saved, more = previous - candidate.cost, candidate.loss - lost
            steps.append((gains[k] * more / saved, k, candidate))
            previous, lost = candidate.cost, candidate.loss
    for _, k, candidate in sorted(steps, key=lambda s: (s[0], s[1])):
        if total <= budget:
            break
        total -= _cost(chosen[k], wholes[k]) - candidate.cost
        chosen[k] = candidate
    if total > budget:
        return None
    return _relaxed(chosen, wholes, options, gains, budget - total)


def _cost(candidate: Candidate | None, whole: int) -> int:
    return whole if candidate is None else candidate.cost


def _hull(whole: int, options: Sequence[Candidate]) -> list[Candidate]:
    """Candidates on the lower convex hull of loss over cost, from dear to cheap, starting at (whole, 0)."""
    hull: list[tuple[int, float, Candidate | None]] = [(whole, 0.0, None)]
    best: dict[int, Candidate] = {}
    for item in options:
        if item.cost < whole and (item.cost not in best or item.loss < best[item.cost].loss):
            best[item.cost] = item
    for cost in sorted(best, reverse=True):
        loss = best[cost].loss
        while len(hull) > 1 and _slope(hull[-2], (cost, loss)) <= _slope(hull[-2], hull[-1][:2]):
            hull.pop()
        hull.append((cost, loss, best[cost]))
    return [candidate for _, _, candidate in hull if candidate is not None]


def _slope(start: tuple[int, float, Candidate | None], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (start[0] - end[0])


def _relaxed(
    chosen: list[Candidate | None],
    wholes: Sequence[int],
    options: Sequence[Sequence[Candidate]],
    gains: Sequence[float],
    room: float,
) -> list[Candidate | None]:
    """Spend what is left of the budget where it brings most, one layer after the other."""
    while room > 0:
        best: tuple[float, int, Candidate | None] = (0.0, -1, None)
        for k, now in enumerate(chosen):
            if now is None:
                continue
            for other in (None, *options[k]):
                more = _cost(other, wholes[k]) - now.cost
                brings = gains[k] * (now.loss - (0.0 if other is None else other.loss))
                if 0 < more <= room and brings > best[0]:
                    best = (brings, k, other)
        if best[1] < 0:
            break
        _, k, other = best
        room -= _cost(other, wholes[k]) - _cost(chosen[k], wholes[k])
        chosen[k] = other
    return chosen


def reach(wholes: Sequence[int], options: Sequence[Sequence[Candidate]]) -> int:
    """The least that all layers can cost together."""
    return sum(min([w, *(c.cost for c in own)]) for w, own in zip(wholes, options, strict=True))


def usual(gains: Sequence[float]) -> list[float]:
    """Gains with those that could not be measured set to the median of the others."""
    known = [g for g in gains if np.isfinite(g)]
    middle = float(np.median(known)) if known else 1.0
    return [g if np.isfinite(g) else middle for g in gains]
