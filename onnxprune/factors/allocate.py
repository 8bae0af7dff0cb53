"""Which layer gives how much, so that together they cost no more than asked and lose least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.factors.candidates import Candidate

# Steps of the budget that costs are rounded up to.
_STEPS = 10_000


def allocate(
    wholes: Sequence[int], options: Sequence[Sequence[Candidate]], gains: Sequence[float], budget: float
) -> list[Candidate | None] | None:
    """One candidate per layer, or None to leave it; None for all where even the cheapest cost too much.

    The multiple-choice knapsack by dynamic programming over the budget in 10,000 steps (Dudzinski and Walukiewicz,
    European Journal of Operational Research 28, 1987), then what rounding left over is spent where it brings most.

    Args:
        wholes: cost of every layer as it is. options: what could stand in its place.
        gains: what a layer's loss counts, per layer. budget: what all layers may cost together.
    """
    if reach(wholes, options) > budget:
        return None
    if sum(wholes) <= budget:
        return [None] * len(wholes)
    chosen = _knapsack(wholes, options, gains, budget)
    if chosen is None:  # only rounding is in the way
        chosen = [min((None, *own), key=lambda c: _cost(c, w)) for w, own in zip(wholes, options, strict=True)]
    spent = sum(_cost(c, w) for c, w in zip(chosen, wholes, strict=True))
    return _spent(chosen, wholes, options, gains, budget - spent)


def _cost(candidate: Candidate | None, whole: int) -> int:
    return whole if candidate is None else candidate.cost


def _knapsack(
    wholes: Sequence[int], options: Sequence[Sequence[Candidate]], gains: Sequence[float], budget: float
) -> list[Candidate | None] | None:
    """Least loss for every number of steps spent, layer by layer; then back from the whole budget."""
    loss = np.zeros(_STEPS + 1)
    picked = []
    ways: list[list[Candidate | None]] = [[None, *own] for own in options]
    costs = [[int(np.ceil(_cost(c, w) * _STEPS / budget)) for c in own] for w, own in zip(wholes, ways, strict=True)]
    for own, steps, gain in zip(ways, costs, gains, strict=True):
        best, pick = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, np.int32)
        for k, (candidate, step) in enumerate(zip(own, steps, strict=True)):
            if step > _STEPS:
                continue
            lost = loss[: _STEPS + 1 - step] + (0.0 if candidate is None else gain * candidate.loss)
            better = lost < best[step:]
            best[step:][better], pick[step:][better] = lost[better], k
        loss = best
        picked.append(pick)
    if not np.isfinite(loss[-1]):
        return None
    left, chosen = _STEPS, list[Candidate | None]()
    for own, steps, pick in zip(reversed(ways), reversed(costs), reversed(picked), strict=True):
        k = int(pick[left])
        chosen.append(own[k])
        left -= steps[k]
    return chosen[::-1]


def _spent(
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
