"""How much limits are tightened or eased so that what is measured fits, where predictions are off."""

from __future__ import annotations

from collections.abc import Mapping

# A time that turns out below this share of its limit leaves something on the table; corrections stop a little short,
# and end where something fits and the next one would change less than this.
_SLACK, SAFE, _SMALL = 0.95, 0.995, 0.01
_MOST = 1.5


class Pressure:
    """Factors on limits by kind, moved between what fitted and what did not.

    Attributes:
        now: the factors to try next.
    """

    def __init__(self, start: Mapping[str, float]) -> None:
        self.now = dict(start)
        self._fitted: dict[str, float] = {}
        self._failed: dict[str, float] = {}
        self._ended = False

    def learn(self, over: Mapping[str, float]) -> bool:
        """Take in costs as shares of their limits; whether there is something else worth trying.

        A cost above its limit is allowed less. A time far below it, where all else fits, is allowed more.
        """
        fits = all(o <= 1 for o in over.values())
        moved = False
        for kind, share in over.items():
            if share > 1:
                self._failed[kind] = min(self.now[kind], self._failed.get(kind, self.now[kind]))
            elif fits and kind == "latency":
                self._fitted[kind] = max(self.now[kind], self._fitted.get(kind, 0.0))
            if share > 1 or (fits and kind == "latency" and share < _SLACK):
                moved |= self._move(kind, share)
        return moved and not self._ended

    def end(self) -> None:
        """What is tried now is the last."""
        self._ended = True

    def _move(self, kind: str, share: float) -> bool:
        """Aim at what would fit if cost and limit moved alike, but within what is known."""
        before = self.now[kind]
        after = min(before * SAFE / share, before * _MOST)
        low, high = self._fitted.get(kind), self._failed.get(kind)
        if (low is not None and after <= low) or (high is not None and after >= high):
            after = 0.5 * ((before if low is None else low) + (before if high is None else high))
        self.now[kind] = after
        return share > 1 or abs(after / before - 1) > _SMALL
