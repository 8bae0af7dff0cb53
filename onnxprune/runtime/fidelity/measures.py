"""Measures of answers: the share of the original's answers that a model still gives, 0 to 1, batch by batch.

Every measure is 1 for equal outputs and falls with the damage; none keeps outputs, but a few rows of embeddings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from onnxprune.runtime.fidelity.kinds import (
    Level,
    Numbers,
    Part,
    Reading,
    as_corners,
    as_scores,
    intersection_over_union,
    table,
)
from onnxprune.runtime.sessions import Array, Feed

_TINY = 1e-12


class Measure(ABC):
    """A measure of one answer."""

    @abstractmethod
    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch.

        Args:
            inputs: of the models.
            want: outputs of the original.
            have: outputs of the other model.
        """

    @abstractmethod
    def share(self) -> float:
        """Return the share of the original's answers that the other model gives; NaN where nothing was compared."""

    @abstractmethod
    def lost(self) -> str:
        """Describe the loss in a few words."""

    def is_coarse(self) -> bool:
        """Return whether the share counts answers of which a sample has one, so that few samples resolve little."""
        return False


def measure_of(reading: Reading, first: Sequence[Feed]) -> Measure:
    """Return the measure of an answer.

    Args:
        reading: reading of the answer: its kind and axis.
        first: outputs of the original in some batches, to fix centres and scales by.
    """
    if reading.kind in ("detections", "boxes") and reading.levels:
        return Detections(reading.levels, first)
    return Labels(reading.part.name) if reading.kind == "labels" else ByWidth(reading, first)


class ByWidth(Measure):
    """One measure per number of columns, which may follow the sizes of a batch; the mean over the samples.

    Args:
        reading: reading of the answer: its kind and axis.
        first: outputs of the original in some batches, to fix centres and scales by.
    """

    def __init__(self, reading: Reading, first: Sequence[Feed]) -> None:
        self._reading, self._first = reading, first
        self._measures: dict[int, Measure] = {}
        self._samples: dict[int, int] = {}

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        width, samples = self._width(want), len(np.atleast_1d(want[self._reading.part.name]))
        if width not in self._measures:
            alike = [feed for feed in self._first if self._reading.part.name in feed and self._width(feed) == width]
            self._measures[width] = _measure_of(self._reading, alike or [want])
        self._measures[width].add(inputs, want, have)
        self._samples[width] = self._samples.get(width, 0) + samples

    def _width(self, feed: Feed) -> int:
        """Return the number of columns of the table of an output."""
        shape, axis = feed[self._reading.part.name].shape, self._reading.part.axis
        return 1 if axis is None or axis >= len(shape) else shape[axis]

    def share(self) -> float:
        """Return the mean of the shares over the samples; NaN where nothing was compared."""
        shares = {width: share for width, m in self._measures.items() if not math.isnan(share := m.share())}
        if not shares:
            return math.nan
        weights = [self._samples[width] for width in shares]
        return float(np.average(list(shares.values()), weights=weights))

    def is_coarse(self) -> bool:
        """Return whether the measure of any width is."""
        return any(measure.is_coarse() for measure in self._measures.values())

    def lost(self) -> str:
        """Describe the loss of the width that lost most."""
        shares = {width: share for width, m in self._measures.items() if not math.isnan(share := m.share())}
        return self._measures[min(shares, key=shares.__getitem__)].lost() if shares else ""


def _measure_of(reading: Reading, first: Sequence[Feed]) -> Measure:
    """Return the measure of an answer of one number of columns."""
    part = reading.part
    match reading.kind:
        case "classes" | "sequence" if part.form in ("independent", "binary logits"):
            return Independent(part)
        case "sequence":
            return Sequences(part)
        case "classes":
            return Classes(part)
        case "embedding":
            return Embedding(part, first)
        case "signal":
            return Deviation(part, together=True)
        case _:
            return Deviation(part)


def _pair(part: Part, want: Feed, have: Feed) -> tuple[Numbers, Numbers] | None:
    """Return both tables of an output; None where shapes differ, which is a loss."""
    a, b = want[part.name], have.get(part.name)
    return None if b is None or a.shape != b.shape else (table(a, part.axis), table(b, part.axis))


# -- classes -----------------------------------------------------------------------------------------------------------


class Classes(Measure):
    """Classes that exclude each other: half by the answer, half by the distribution.

    The answer is the largest score. Another answer than the original's counts as much as the original believed in it:
    p[other] / p[own], so that the share is the accuracy to expect if the original's probabilities are right. The
    distribution counts by its affinity sum_c sqrt(p_c q_c), 1 minus the squared Hellinger distance. Where there are
    many positions (segmentation, tokens), classes weigh by the root of their frequency and answers count by
    intersection over union, so that a background does not hide objects on it.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.counts = self.others = self.credit = self.affinity = np.zeros(0)
        self.agree, self.rows, self.broken, self.dense = 0, 0, 0, False

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        pair = _pair(self.part, want, have)
        if pair is None:
            self.broken += 1
            return
        self.add_tables(*pair)

    def add_tables(self, a: Numbers, b: Numbers) -> None:
        """Add scores [samples, positions, classes] of both models."""
        known = np.isfinite(a).any(-1)
        self.dense |= a.shape[1] > 1
        p, q = as_scores(a[known], self.part.form), as_scores(b[known], self.part.form)
        if p.shape[-1] == 1:
            p, q = np.concatenate([p, 1 - p], -1), np.concatenate([q, 1 - q], -1)
        if not len(p):
            return
        number, rows = p.shape[-1], np.arange(len(p))
        if not len(self.counts):
            self.counts, self.others, self.credit, self.affinity = np.zeros((4, number))
        order = np.where(np.isnan(b[known]), -np.inf, b[known]) if b.shape[-1] == number else q
        original, other = p.argmax(-1), order.argmax(-1)
        same = original == other
        credit = np.where(same, 1.0, p[rows, other] / np.maximum(p[rows, original], _TINY))
        sums = np.sqrt(p.sum(-1) * np.maximum(q.sum(-1), _TINY))
        affinity = np.clip(np.sqrt(p * q).sum(-1) / np.maximum(sums, _TINY), 0, 1)
        self.counts += np.bincount(original, minlength=number)
        self.others += np.bincount(other[~same], weights=1 - credit[~same], minlength=number)
        self.credit += np.bincount(original, weights=credit, minlength=number)
        self.affinity += np.bincount(original, weights=affinity, minlength=number)
        self.agree += int(same.sum())
        self.rows += len(p)

    def answers(self) -> float:
        """Return the share of answers that stay."""
        return self._mean(self.credit, self.counts + self.others if self.dense else self.counts)

    def distributions(self) -> float:
        """Return the mean affinity."""
        return self._mean(self.affinity, self.counts)

    def _mean(self, sums: Numbers, of: Numbers) -> float:
        there = self.counts > 0
        weights = np.sqrt(self.counts[there]) if self.dense else self.counts[there]
        return float((weights * sums[there] / of[there]).sum() / weights.sum())

    def share(self) -> float:
        """Return the mean of answers and distributions."""
        if self.broken:
            return 0.0
        return (self.answers() + self.distributions()) / 2 if self.rows else math.nan

    def is_coarse(self) -> bool:
        """Return whether there is one position per sample."""
        return not self.dense and not self.broken

    def lost(self) -> str:
        """Return the number of times that the class is another one, as text."""
        what = "positions" if self.dense else "samples"
        if self.agree == self.rows:
            return f"same class for all {self.rows} {what}, other probabilities"
        return f"another class for {self.rows - self.agree} of {self.rows} {what}"


class Independent(Measure):
    """Scores that do not exclude each other (tags, masks, heat maps, pitch): overlap 2 sum(st) / sum(s^2 + t^2).

    Squares let high scores count. A single score per sample is a class and its opposite, and half counts by the
    correlation of its logits, because data of one class alone would hide that the other one is no longer found.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.classes = Classes(Part(part.name, part.axis, form="independent"))
        self.single, self.broken = False, 0
        self.logits = np.zeros(6)
        self.inner = self.outer = 0.0
        self.hits = self.there = 0

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        pair = _pair(self.part, want, have)
        if pair is None:
            self.broken += 1
            return
        known = np.isfinite(pair[0])
        s, t = (as_scores(np.where(known, x, 0), self.part.form) for x in pair)
        self.single |= s.shape[1:] == (1, 1)
        if self.single:
            self.classes.add_tables(s, t)
            x, y = (np.log(np.clip(p, 1e-7, 1 - 1e-7) / (1 - np.clip(p, 1e-7, 1 - 1e-7))) for p in (s, t))
            self.logits += [x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        self.inner += 2 * float((s * t).sum())
        self.outer += float((s * s).sum() + (t * t).sum())
        self.hits += int(((s > 0.5) & (t > 0.5)).sum())
        self.there += int((s > 0.5).sum())

    def share(self) -> float:
        """Return the overlap; of a single score the measure of two classes."""
        if self.broken:
            return 0.0
        if self.single:
            share, (n, x, y, xx, yy, xy) = self.classes.share(), self.logits
            original, other, both = xx - x * x / max(n, 1), yy - y * y / max(n, 1), xy - x * y / max(n, 1)
            if n < 8 or original < 1e-6 * n:
                return share
            return (share + max(0.0, both / math.sqrt(original * max(other, _TINY)))) / 2
        return self.inner / self.outer if self.outer > _TINY else 1.0

    def lost(self) -> str:
        """Return as text how many scores fell below one half."""
        if self.single:
            return self.classes.lost()
        return f"{self.there - self.hits} of {self.there} scores above 0.5 fell below 0.5"


class Sequences(Measure):
    """A class at each position of a sequence.

    With a blank (CTC) half counts by the characters that are still read: 1 minus the edit distance of the decoded
    sequences over their length; half by the distributions. Without one, positions are classes.
    """

    def __init__(self, part: Part) -> None:
        self.part, self.classes = part, Classes(part)
        self.distance: dict[int | None, int] = {}
        self.length: dict[int | None, int] = {}
        self.same: dict[int | None, int] = {}
        self.samples = 0

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        pair = _pair(self.part, want, have)
        if pair is None:
            self.classes.broken += 1
            return
        a, b = pair
        self.classes.add_tables(a, b)
        order = np.where(np.isfinite(b), b, -np.inf).argmax(-1)
        # The blank is the first or the last class; all batches together show which.
        for blank in (0, a.shape[-1] - 1):
            for one, other in zip(np.nan_to_num(a, nan=-np.inf).argmax(-1), order, strict=True):
                x, y = decoded(one, blank), decoded(other, blank)
                self.distance[blank] = self.distance.get(blank, 0) + edit_distance(x, y)
                self.length[blank] = self.length.get(blank, 0) + max(len(x), len(y))
                self.same[blank] = self.same.get(blank, 0) + (x == y)
        self.samples += len(a)

    def blank(self) -> int | None:
        """Return the blank of CTC: the most frequent class, if it is the first or the last; None without one."""
        counts = self.classes.counts
        top = int(counts.argmax()) if len(counts) else -1
        often = top in (0, len(counts) - 1) and counts[top] >= 0.2 * counts.sum() and (counts > 0).sum() > 2
        return top if often else None

    def share(self) -> float:
        """Return the share of characters that stay, with the distributions."""
        blank = self.blank()
        if self.classes.broken or blank is None:
            return self.classes.share()
        characters = 1 - self.distance[blank] / self.length[blank] if self.length[blank] else 1.0
        return (characters + self.classes.distributions()) / 2

    def lost(self) -> str:
        """Return as text how many sequences decode differently."""
        blank = self.blank()
        if blank is None:
            return self.classes.lost()
        return f"{self.samples - self.same[blank]} of {self.samples} sequences decode differently"


def decoded(classes: Array, blank: int) -> list[int]:
    """Return a sequence of CTC: runs become one, blanks go."""
    runs = classes[np.append(True, classes[1:] != classes[:-1])] if len(classes) else classes
    return [int(c) for c in runs if c != blank]


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the smallest number of insertions, deletions and substitutions between two sequences."""
    if one == other:
        return 0
    x, y = np.asarray(one[:512]), np.asarray(other[:512])
    row = np.arange(len(y) + 1)
    steps = np.arange(len(y) + 1)
    for item in x:
        best = np.append(row[0] + 1, np.minimum(row[:-1] + (y != item), row[1:] + 1))
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


# -- detections --------------------------------------------------------------------------------------------------------


class Detections(Measure):
    """Boxes with scores: overlap 2 sum(st m) / sum(s^2 + t^2) per class over matched pairs, m how well they match.

    A score t below half the original's s counts less by 2 t / s: at most thresholds such a detection is gone.

    Boxes that can be read as rectangles are matched by class and intersection over union of at least 0.5, in the order
    of their scores, after suppression of duplicates; m is then the mean of 1 and the overlap. Boxes relative to anchors
    are compared anchor by anchor; m falls with the difference of their numbers. Classes weigh by the root of their
    squared scores.

    Where rows are anchors, which both models have in the same order, the result is the geometric mean of that overlap
    and of r^2, the share of the variance of scores over all anchors that those of the other model explain (0 for
    r < 0): the order of detections follows their scores, and the few pairs that match in a few images are luck.
    """

    def __init__(self, levels: Sequence[Level], first: Sequence[Feed]) -> None:
        self.levels = levels
        self.scales = [_scales(level, first) if level.form == "raw" else [] for level in levels]
        self.inner: dict[int, float] = {}
        self.original_counts: dict[int, float] = {}
        self.other_counts: dict[int, float] = {}
        self.hits = self.there = self.broken = 0
        self.fields: dict[int, Numbers] = {}
        self.top = max(
            [float(_scores(level, feed).max(initial=0.0)) for feed in first for level in levels], default=1.0
        )

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        for level, scales in zip(self.levels, self.scales, strict=True):
            parts = [level.boxes, *level.scores, *level.labels]
            if any(part.name not in have for part in parts):
                self.broken += 1
                continue
            if not level.listed:
                self._add_fields(level, want, have)
            if level.form == "raw":
                self._add_anchors(level, scales, want, have)
            else:
                self._add_boxes(level, want, have)

    def _add_fields(self, level: Level, want: Feed, have: Feed) -> None:
        """Add the products of the scores of all anchors, [samples, anchors, classes]."""
        if all(want[part.name].shape == have[part.name].shape for part in level.scores):
            s, t = (x.reshape(-1, x.shape[-1]) for x in (_scores(level, want), _scores(level, have)))
            sums = np.stack([np.full(s.shape[-1], len(s)), *(x.sum(0) for x in (s, t, s * t, s * s, t * t))])
            known = self.fields.get(s.shape[-1])
            self.fields[s.shape[-1]] = sums if known is None else known + sums

    def _add_anchors(self, level: Level, scales: Sequence[Numbers], want: Feed, have: Feed) -> None:
        """Compare anchor by anchor."""
        if any(want[part.name].shape != have[part.name].shape for part in (level.boxes, *level.scores)):
            self.broken += 1
            return
        s, t = _scores(level, want), _scores(level, have)
        apart = [
            np.abs(part.of(want) - part.of(have))
            for part in (level.boxes, *level.extras)
            if part.name in have and want[part.name].shape == have[part.name].shape
        ]
        match = np.ones(s.shape[:2])
        for difference, scale in zip(apart, scales, strict=False):
            far = np.nan_to_num(np.square(difference / scale), nan=1e3, posinf=1e3).mean(-1)
            match *= np.exp(-far / len(apart))
        axes = (0, 1)
        inner = (2 * s * t * match[..., None] * np.minimum(1.0, 2 * t / np.maximum(s, _TINY))).sum(axes)
        for c, values in enumerate(zip(inner, (s * s).sum(axes), (t * t).sum(axes), strict=True)):
            self._count(c, *values)
        sure = s > self.sure
        self.there += int(sure.sum())
        self.hits += int((sure & (t > s / 2)).sum())

    @property
    def sure(self) -> float:
        """Score from which on a detection is counted in words."""
        return min(0.3, self.top / 2)

    def _count(self, c: int, inner: float, original: float, other: float) -> None:
        self.inner[c] = self.inner.get(c, 0.0) + float(inner)
        self.original_counts[c] = self.original_counts.get(c, 0.0) + float(original)
        self.other_counts[c] = self.other_counts.get(c, 0.0) + float(other)

    def _add_boxes(self, level: Level, want: Feed, have: Feed) -> None:
        """Match boxes sample by sample."""
        sides = [_strongest(level, feed) for feed in (want, have)]
        for index in range(max(len(side) for side in sides)):
            a, b = (side[index] if index < len(side) else _NONE for side in sides)
            partner, overlap = match_boxes(a[0], a[2], b[0], b[2])
            for c, score in zip(a[2], a[1], strict=True):
                self._count(int(c), 0.0, score * score, 0.0)
            for number, (c, score) in enumerate(zip(b[2], b[1], strict=True)):
                inner = 0.0
                if partner[number] >= 0:
                    original = float(a[1][partner[number]])
                    inner = score * original * (1 + overlap[number]) * min(1.0, 2 * score / max(original, _TINY))
                self._count(int(c), inner, 0.0, score * score)
            sure = a[1] > self.sure
            matched = np.zeros(len(a[1]), bool)
            of = partner[partner >= 0]
            matched[of] = b[1][partner >= 0] > a[1][of] / 2
            self.there += int(sure.sum())
            self.hits += int((sure & matched).sum())

    def share(self) -> float:
        """Return the overlap, over classes."""
        if self.broken:
            return 0.0
        total = weights = 0.0
        for c, inner in self.inner.items():
            both = self.original_counts[c] + self.other_counts[c]
            if both > _TINY:
                total += math.sqrt(both) * min(1.0, inner / both)
                weights += math.sqrt(both)
        overlap = total / weights if weights else 1.0
        inner = original_power = other_power = 0.0
        for n, s, t, st, ss, tt in self.fields.values():
            inner += float((st - s * t / n).sum())
            original_power, other_power = (
                original_power + float((ss - s * s / n).sum()),
                other_power + float((tt - t * t / n).sum()),
            )
        if original_power <= _TINY:
            return overlap
        return max(0.0, inner) * math.sqrt(overlap / (original_power * max(other_power, _TINY)))

    def lost(self) -> str:
        """Return as text how many detections were lost."""
        return f"{self.there - self.hits} of {self.there} detections of score {self.sure:.2g} or more lost"


_Boxes = tuple[Numbers, Numbers, Array]
_NONE: _Boxes = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
_MAX_DETECTIONS, _BEFORE = 100, 300


def _scores(level: Level, outputs: Feed) -> Numbers:
    """Return the scores [samples, rows, classes] of a level: the products of its parts."""
    result = np.ones((1, 1, 1))
    for part in level.scores:
        result = result * part.scores(outputs)
    return result if level.scores else np.ones((*level.boxes.of(outputs).shape[:2], 1))


def _scales(level: Level, first: Sequence[Feed]) -> list[Numbers]:
    """Return the spread of every number of boxes and extras over anchors, by their squared scores."""
    result = []
    weights = [np.square(_scores(level, feed).max(-1)) for feed in first]
    for part in (level.boxes, *level.extras):
        values = np.concatenate([part.of(feed).reshape(-1, part.of(feed).shape[-1]) for feed in first])
        flat = np.concatenate([w.ravel() for w in weights])[: len(values), None] + _TINY
        values = np.nan_to_num(values)
        mean = (flat * values).sum(0) / flat.sum()
        spread = np.sqrt((flat * np.square(values - mean)).sum(0) / flat.sum())
        result.append(np.maximum(spread, 1e-3 * max(1e-6, float(np.abs(values).max(initial=0.0)))))
    return result


def _strongest(level: Level, outputs: Feed) -> list[_Boxes]:
    """Return per sample the boxes with the largest scores, their scores and classes, without duplicates."""
    boxes, scores = as_corners(np.nan_to_num(level.boxes.of(outputs)), level.form), _scores(level, outputs)
    named = [part.of(outputs)[..., 0] for part in level.labels]
    labels = named[0] if named and scores.shape[-1] == 1 else scores.argmax(-1)
    best = scores.max(-1, initial=0.0)
    result = []
    for b, s, c in zip(boxes, best, labels, strict=True):
        order = np.argsort(-s, kind="stable")[:_BEFORE]
        order = order[s[order] > 1e-3]
        b, s, c = b[order], s[order], np.nan_to_num(c[order]).astype(np.int64)
        if not level.listed:
            keep = suppress(b, c)
            b, s, c = b[keep], s[keep], c[keep]
        result.append((b[:_MAX_DETECTIONS], s[:_MAX_DETECTIONS], c[:_MAX_DETECTIONS]))
    return result


def suppress(boxes: Numbers, labels: Array, least: float = 0.6) -> list[int]:
    """Return the indices of boxes, strongest first, that overlap with no stronger one of their class."""
    overlap = intersection_over_union(boxes[:, None], boxes[None])
    alive, result = np.ones(len(boxes), bool), []
    for i in range(len(boxes)):
        if alive[i]:
            result.append(i)
            alive &= (overlap[i] <= least) | (labels != labels[i])
    return result


def match_boxes(
    one: Numbers, labels: Array, other: Numbers, other_labels: Array, least: float = 0.5
) -> tuple[Array, Numbers]:
    """Match boxes, strongest first, to those of the original with the same class that they overlap with most.

    Returns:
        the index in ``one`` of each box of ``other``, -1 for none, and their intersection over union.
    """
    partner, overlap = np.full(len(other), -1), np.zeros(len(other))
    if not len(one) or not len(other):
        return partner, overlap
    table = intersection_over_union(other[:, None], one[None])
    table[other_labels[:, None] != labels[None]] = -1.0
    for i in range(len(other)):
        j = int(table[i].argmax())
        if table[i, j] >= least:
            partner[i], overlap[i] = j, table[i, j]
            table[:, j] = -1.0
    return partner, overlap


# -- numbers -----------------------------------------------------------------------------------------------------------


class Deviation(Measure):
    """Numbers: 1 minus the size of the difference, relative to the difference of the original from a trivial answer.

    The trivial answer is the mean of a channel, or the input itself where output and input are pictures or sounds of
    the same kind (enlarged where the output is larger).

    Args:
        part: the output.
        together: all channels have one scale (signals, images); otherwise each has its own.
    """

    def __init__(self, part: Part, *, together: bool = False) -> None:
        self.part, self.together = part, together
        self.centre: Numbers | None = None
        self.count = self.sum = self.square = self.apart = self.through = np.zeros(0)
        self.broken = 0

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        pair = _pair(self.part, want, have)
        if pair is None:
            self.broken += 1
            return
        a, b = pair
        known = np.isfinite(a)
        a, b = np.where(known, a, 0.0), np.where(known, np.nan_to_num(b, nan=0.0, posinf=0.0, neginf=0.0), 0.0)
        if self.centre is None:
            alone = a.shape[0] * a.shape[1] == 1
            number = a.shape[-1]
            self.centre = np.full(number, a.mean()) if alone else a.mean((0, 1))
            self.count, self.sum, self.square, self.apart, self.through = np.zeros((5, number))
        d = np.where(known, a - self.centre, 0.0)
        self.count += known.sum((0, 1))
        self.sum += d.sum((0, 1))
        self.square += (d * d).sum((0, 1))
        self.apart += np.square(a - b).sum((0, 1))
        same = self._input(inputs, want[self.part.name]) if self.together else None
        self.through += np.inf if same is None else np.square(a - same).sum((0, 1))

    def _input(self, inputs: Feed, array: Array) -> Numbers | None:
        """Return the input in the shape of the output, if it is a picture or sound of that kind."""
        for value in inputs.values():
            if value.ndim != array.ndim or value.dtype != array.dtype or not all(value.shape):
                continue
            times = [n // m for n, m in zip(array.shape, value.shape, strict=True)]
            if all(k * m == n for k, m, n in zip(times, value.shape, array.shape, strict=True)):
                for axis, k in enumerate(times):
                    value = np.repeat(value, k, axis) if k > 1 else value
                return np.nan_to_num(table(value, self.part.axis))
        return None

    def share(self) -> float:
        """Return 1 minus the relative difference."""
        if self.broken:
            return 0.0
        if self.centre is None or not self.count.sum():
            return math.nan
        spread = np.maximum(self.square - self.sum * self.sum / np.maximum(self.count, 1), 0.0)
        if self.together:
            trivial = min(float(spread.sum()), float(self.through.sum()))
            return 1.0 - min(1.0, math.sqrt(self._over(float(self.apart.sum()), trivial)))
        # Channels that hardly change have no scale of their own.
        scales = np.maximum(spread, 1e-6 * self.count * np.square(self.centre) + 1e-10 * float(spread.max()))
        parts = [min(1.0, math.sqrt(self._over(d, v))) for d, v in zip(self.apart, scales, strict=True)]
        return 1.0 - float(np.mean(parts))

    def _over(self, apart: float, trivial: float) -> float:
        least = 1e-12 * float((self.count * np.square(self.centre)).sum()) if self.centre is not None else 0.0
        return apart / max(trivial, least, 1e-300) if apart else 0.0

    def lost(self) -> str:
        """Return as text how large the difference is."""
        return f"values differ by {100 * (1 - self.share()):.3g} % of the original's variation"


class Embedding(Measure):
    """Embeddings: half by the cosine of centred vectors, half by the neighbours that a vector keeps in the batch.

    A few hundred vectors are kept; of long sequences some positions of every sample.
    """

    def __init__(self, part: Part, first: Sequence[Feed]) -> None:
        self.part = part
        self.rows: list[tuple[Numbers, Numbers]] = []
        self.number = self.broken = 0

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        pair = _pair(self.part, want, have)
        if pair is None:
            self.broken += 1
            return
        if self.number >= _VECTORS:
            return
        places = np.unique(np.linspace(0, pair[0].shape[1] - 1, 8).astype(int))
        a, b = (x[:, places].reshape(-1, x.shape[-1]) for x in pair)
        known = np.isfinite(a).all(-1)
        a, b = a[known][: _VECTORS - self.number], np.nan_to_num(b[known])[: _VECTORS - self.number]
        self.rows.append((a.astype(np.float32), b.astype(np.float32)))
        self.number += len(a)

    def share(self) -> float:
        """Return the mean of cosines and neighbours."""
        if self.broken:
            return 0.0
        if not self.number:
            return math.nan
        a, b = (np.concatenate([pair[i] for pair in self.rows]).astype(np.float64) for i in (0, 1))
        if (a == b).all():
            return 1.0
        a, b = (x - (x.mean(0) if len(x) > 2 else x.mean()) for x in (a, b))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = float(np.clip((a * b).sum(1) / np.maximum(lengths, _TINY), 0, 1).mean())
        if len(a) < 8:
            return cosine
        return (cosine + _common_neighbours(a, b)) / 2

    def lost(self) -> str:
        """Return as text how far vectors moved."""
        return f"embeddings and their nearest neighbours agree to {100 * self.share():.3g} %"


_VECTORS = 256


def _common_neighbours(a: Numbers, b: Numbers) -> float:
    """Return the share of each vector's nearest tenth, by cosine, that it keeps."""
    number = max(3, len(a) // 10)
    near = []
    for x in (a, b):
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _TINY)
        likeness = unit @ unit.T
        np.fill_diagonal(likeness, -2.0)
        ranks = np.argsort(-likeness, axis=1, kind="stable")[:, :number]
        marks = np.zeros_like(likeness, dtype=bool)
        np.put_along_axis(marks, ranks, True, 1)
        near.append(marks)
    return float((near[0] & near[1]).sum() / near[0].sum())


class Labels(Measure):
    """Classes, indices, texts: the share of equal ones; for lists of another length, the share that alignment keeps."""

    def __init__(self, name: str) -> None:
        self.name, self.same, self.all = name, 0.0, 0

    def add(self, inputs: Feed, want: Feed, have: Feed) -> None:
        """Add one batch."""
        a, b = want[self.name], have.get(self.name)
        self.all += max(a.size, 0 if b is None else b.size)
        if b is None or a.ndim != b.ndim:
            return
        if a.shape == b.shape:
            self.same += int((a == b).sum())
        elif a.ndim and a.shape[1:] == b.shape[1:]:
            rows = [[tuple(np.ravel(row).tolist()) for row in x] for x in (a, b)]
            codes = {row: i for i, row in enumerate(dict.fromkeys([*rows[0], *rows[1]]))}
            x, y = ([codes[row] for row in side] for side in rows)
            longest = max(len(x), len(y), 1)
            self.same += (1 - edit_distance(x, y) / longest) * max(a.size, b.size)

    def share(self) -> float:
        """Return the share of equal elements."""
        return self.same / self.all if self.all else math.nan

    def lost(self) -> str:
        """Return as text how many differ."""
        return f"{round(self.all - self.same)} of {self.all} values differ"
