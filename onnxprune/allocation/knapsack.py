"""Counts of the best quality within a budget: multiple-choice knapsacks over linearised costs, and loss weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls

from onnxprune.allocation.costs import Cost, Costs, Counts
from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.selection import nearest_count, step_scores
from onnxprune.errors import UsageError
from onnxprune.io import files

VERSION = 2


@dataclass(slots=True)
class GroupCurve:
    """One group pruned alone, at rising shares: ``noise`` is the difference of the outputs from the original's.

    Attributes:
        group, name, units: number, name and number of units of the group.
        shares: shares of its units that were removed.
        noise: |a - b|^2 / |a|^2, at most 1, the mean over outputs.
        points: the metric, or per cent of agreement.
    """

    group: int
    name: str
    units: int
    shares: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    points: list[float] = field(default_factory=list)


@dataclass(slots=True, repr=False)
class Sensitivity:
    """Curves of all groups of a model.

    Attributes:
        model_sha256: digest of the model.
        settings: criterion, mode of recovery, data and metric of the measurement.
        what: name of the points.
        original: points of the original.
        metric: whether the points are the user's metric.
    """

    model_sha256: str
    settings: dict[str, Any]
    what: str
    original: float
    metric: bool = False
    curves: list[GroupCurve] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Sensitivity: {len(self.curves)} groups, {self.what}>"

    def losses(self) -> dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Return {group: (shares removed, losses)}: the drop of the metric where there is one, else noise.

        Noise is added as a share of the largest possible drop, to distinguish points of equal metric.
        """
        scale = max((self.original - min(c.points) for c in self.curves if c.points), default=0.0)
        result = {}
        for curve in self.curves:
            noise, drops = np.array(curve.noise), np.maximum(self.original - np.array(curve.points), 0.0)
            loss = drops + 0.1 * max(scale, 1e-12) * noise if self.metric else noise
            result[curve.group] = np.array(curve.shares), loss
        return result

    def save(self, path: str | Path) -> None:
        """Write the curves as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        data = asdict(self)
        lines = ",\n  ".join(json.dumps(curve) for curve in data.pop("curves"))
        head = json.dumps({"version": VERSION, **data})
        files.write_text(Path(path), f'{head[:-1]},\n "curves": [\n  {lines}\n ]}}\n', "the sensitivities")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read curves from JSON.

        Raises:
            UsageError: missing, not JSON, or not sensitivities of this version.
        """
        hint = "Write one with 'onnxprune sensitivity MODEL --data D -o FILE'."
        kind = "file of sensitivities"
        data = files.read_json(Path(path), "the sensitivities", kind, missing=hint, hint=hint)
        if not isinstance(data, Mapping) or not isinstance(data.get("curves"), list):
            raise UsageError(f"{str(path)!r} is not a file of sensitivities: 'curves' is missing.", hint=hint)
        if data.get("version") != VERSION:
            raise UsageError(f"Version {data.get('version')!r} of a file of sensitivities is not supported.", hint=hint)
        result = files.parse(cls, data, repr(str(path)), hint)
        for curve in result.curves:
            if len({len(curve.shares), len(curve.noise), len(curve.points)}) != 1:
                raise UsageError(
                    f"{str(path)!r} is damaged: group {curve.group} has lists of different lengths (one value per "
                    "ratio)."
                )
            rising = all(a < b for a, b in zip([0.0, *curve.shares], curve.shares, strict=False))
            if not rising or max(curve.shares, default=0.0) > 1 or min(curve.noise, default=0.0) < 0:
                raise UsageError(
                    f"{str(path)!r} is damaged: group {curve.group} has negative noise, or ratios that do not "
                    "increase.",
                    hint=hint,
                )
        return result

    def check_model(self, sha256: str, source: str) -> None:
        """Check that the curves are of the model with this digest.

        Raises:
            UsageError: they are another model's.
        """
        files.check_model(
            f"The sensitivities {source} belong to another model",
            self.model_sha256,
            sha256,
            hint="Run 'onnxprune sensitivity' on this model.",
        )


Array = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """A choice [groups] of levels, its loss, and a lower bound on the loss of any choice within the limits."""

    levels: Levels
    loss: float
    bound: float


def pack(losses: Sequence[Array], costs: Sequence[Array], limits: Array) -> Packed | None:
    """Return levels of nearly least loss, and a lower bound on the loss; None where nothing fits.

    min sum_g losses[g][l_g] such that sum_g costs[g][l_g, r] <= limits[r], where a group may first be split over
    levels: a linear program, solved by HiGHS (Huangfu and Hall, 2018). Its optimum is the bound. No more groups than
    there are rows come out split (Sinha and Zoltners, 1979, for one row); of their levels the cheapest is taken.

    A mixed-integer program in place of rounding lowers the loss by 0.3 % on average (2.7 % at most, over 24 budgets of
    eight models) in twice the time, and models that are pruned and recovered by it are no better: losses are estimates.

    Args:
        losses: [levels] per group, finite.
        costs: [levels, rows] per group, may be below 0.
        limits: [rows].
    """
    owner = np.repeat(np.arange(len(losses)), [len(x) for x in losses])
    loss, cost = np.concatenate(losses), np.concatenate(costs)
    each = (np.arange(len(losses))[:, None] == owner).astype(np.float64)
    # Rows of very different sizes (bytes, seconds) are scaled to 1: tolerances are absolute.
    scale = np.maximum(np.abs(cost).max(axis=0), np.abs(limits))
    scale = np.where(scale > 0, scale, 1.0)
    unit = float(np.abs(loss).max()) or 1.0
    solution = linprog(
        loss / unit,
        A_ub=(cost / scale).T,
        b_ub=limits / scale,
        A_eq=each,
        b_eq=np.ones(len(losses)),
        bounds=(0, 1),
        method="highs",
    )
    if solution.x is None or not solution.success:
        return None
    dearness = (cost / scale) @ np.maximum(-np.asarray(solution.ineqlin.marginals), 0.0)
    first = np.searchsorted(owner, np.arange(len(losses)))
    order = np.lexsort((loss, dearness, solution.x < 1e-6, owner))
    levels = order[first] - first
    total = float(loss[order[first]].sum())
    return Packed(levels, total, min(float(solution.fun or 0.0) * unit, total))


_ROUNDS = 12
# Number of rows of a peak that are kept: the largest ones.
_MOST_ROWS = 64
_HALVINGS = 30


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of every group: keep ``options`` [levels] of its steps, ascending, at a loss [levels].

    A step may be anything: a layer that may be factorized is another column of counts, whose levels are its ranks,
    with a cost that depends on them.
    """

    options: list[Counts]
    losses: list[Array]

    def counts(self, levels: Sequence[int] | NDArray[np.int64]) -> Counts:
        """Return counts [groups] of levels [groups]."""
        return np.array([k[i] for k, i in zip(self.options, levels, strict=True)], dtype=np.int64)

    def loss(self, levels: Sequence[int] | NDArray[np.int64]) -> float:
        """Return the loss of levels [groups]."""
        return float(sum(x[i] for x, i in zip(self.losses, levels, strict=True)))

    def nearest(self, share: float) -> NDArray[np.int64]:
        """Return levels [groups] nearest to the same share kept of every group."""
        return np.array([int(np.argmin(np.abs(k - share * k[-1]))) for k in self.options], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Limit:
    """A cost and its largest permitted value."""

    cost: Cost
    maximum: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Counts [groups] with their loss; ``bound``: lower bound on the loss with the costs linearised there."""

    counts: Counts
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """Return the difference of the loss and its bound, as a share of the loss."""
        return max(0.0, 1.0 - self.bound / self.loss) if self.loss > 0 else 0.0


def allocate(choices: Choices, limits: Sequence[Limit]) -> Allocation | None:
    """Return counts of least loss within the limits; None where none were found.

    A layer's cost depends on the groups of its inputs and of its outputs, so costs do not add up over groups. Each
    round linearises costs as sums of the savings of single groups at the last counts, solves that knapsack, and
    compares the solution with the true costs; the limits of the next knapsack compensate for the difference. The best
    solution within the true limits is then improved by single steps, as long as one fits.

    A mixed-integer program in place of the last round lowers the loss by 0.2 % in the mean (1.3 % at most) on 20 random
    instances of 60 groups with 16 levels, in 0.3 s each on an idle machine (``tools/bench_allocation.py``); with little
    time it is worse, so that it is not used.
    """
    levels = _start(choices, limits)
    if levels is None:
        return None
    best, bound = levels, -np.inf
    tightening = np.ones(len(limits))
    for _ in range(_ROUNDS):
        packed = _round(choices, limits, levels, tightening)
        if packed is None:
            tightening = 0.5 * (1 + tightening)
            continue
        before, levels = levels, packed.levels
        overrun = _overrun(choices, limits, levels)
        if overrun.max() <= 1 and choices.loss(levels) <= choices.loss(best):
            best, bound = levels, packed.bound
        if (levels == before).all() and overrun.max() <= 1:
            break
        tightening = np.clip(tightening / overrun, 0.5, 1.5)
    best = _polished(choices, limits, best)
    last = _round(choices, limits, best, np.ones(len(limits)))
    bound = last.bound if last is not None else bound
    return Allocation(choices.counts(best), choices.loss(best), min(bound, choices.loss(best)))


def uniform(choices: Choices, limits: Sequence[Limit]) -> Allocation | None:
    """Return the largest share that every group can keep alike within the limits; None where none was found.

    The room that rounding to whole steps leaves is given to single groups, as long as a step fits.
    """
    levels = _start(choices, limits)
    if levels is None:
        return None
    levels = _polished(choices, limits, levels)
    return Allocation(choices.counts(levels), choices.loss(levels), -np.inf)


def least(choices: Choices, cost: Cost) -> Counts:
    """Return counts [groups] at which the cost is near its least: no single change lowers it."""
    levels = np.zeros(len(choices.options), dtype=np.int64)
    for _ in range(_ROUNDS):
        before = levels.copy()
        for group, counts in enumerate(choices.options):
            trials = np.repeat(choices.counts(levels)[None], counts.size, axis=0)
            trials[:, group] = counts
            levels[group] = int(np.argmin(cost.rows(trials).max(axis=1)))
        if (levels == before).all():
            break
    return choices.counts(levels)


def _start(choices: Choices, limits: Sequence[Limit]) -> NDArray[np.int64] | None:
    """Return the largest share kept alike that fits, by bisection; else the counts at which costs are least."""
    high, low = 1.0, 0.0
    fits: NDArray[np.int64] | None = None
    for _ in range(_HALVINGS):
        share = 1.0 if fits is None and high == 1.0 and low == 0.0 else 0.5 * (high + low)
        levels = choices.nearest(share)
        if _overrun(choices, limits, levels).max(initial=0.0) <= 1:
            fits, low = levels, share
            if share == 1.0:
                return fits
        elif share == 1.0:
            high = 1.0 - 1e-9
        else:
            high = share
    if fits is not None:
        return fits
    for limit in limits:
        counts = least(choices, limit.cost)
        levels = np.array([int(np.searchsorted(k, n)) for k, n in zip(choices.options, counts, strict=True)])
        if _overrun(choices, limits, levels).max() <= 1:
            return levels
    return None


def _overrun(choices: Choices, limits: Sequence[Limit], levels: NDArray[np.int64]) -> Array:
    """Return costs over limits [limits]."""
    counts = choices.counts(levels)[None]
    return np.array([float(x.cost.rows(counts).max()) / x.maximum for x in limits])


def _round(choices: Choices, limits: Sequence[Limit], levels: NDArray[np.int64], tightening: Array) -> Packed | None:
    """Solve the knapsack with costs linearised at some levels; ``pressure`` scales the limits."""
    current = choices.counts(levels)
    owner = np.repeat(np.arange(len(choices.options)), [k.size for k in choices.options])
    trials = np.repeat(current[None], owner.size, axis=0)
    trials[np.arange(owner.size), owner] = np.concatenate(choices.options)
    columns, maxima = [], []
    for limit, press in zip(limits, tightening, strict=True):
        base, rows = limit.cost.rows(current[None])[0], limit.cost.rows(trials)
        binding = _binding(rows, base, limit.maximum)
        columns.append((rows - base)[:, binding])
        maxima.append(limit.maximum * press - base[binding])
    change = np.concatenate(columns, axis=1)
    splits = np.cumsum([k.size for k in choices.options])[:-1]
    return pack(choices.losses, np.split(change, splits), np.concatenate(maxima))


def _binding(rows: Costs, base: Array, maximum: float) -> NDArray[np.int64]:
    """Return rows that may exceed the limit: the largest ones."""
    dearest = np.maximum(rows.max(axis=0), base)
    order = np.argsort(-dearest, kind="stable")[:_MOST_ROWS]
    over = order[dearest[order] > maximum]
    return np.asarray(over if over.size else order[:1])


def _polished(choices: Choices, limits: Sequence[Limit], levels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return levels after the single changes that lower the loss most, as long as one fits."""
    levels = levels.copy()
    owner = np.repeat(np.arange(len(choices.options)), [k.size for k in choices.options])
    level = np.concatenate([np.arange(k.size) for k in choices.options])
    loss, counts = np.concatenate(choices.losses), np.concatenate(choices.options)
    for _ in range(4 * len(choices.options)):
        gain = np.array([x[i] for x, i in zip(choices.losses, levels, strict=True)])[owner] - loss
        better = np.flatnonzero(gain > 1e-12 * max(1.0, float(np.abs(loss).max())))
        if not better.size:
            break
        trials = np.repeat(choices.counts(levels)[None], better.size, axis=0)
        trials[np.arange(better.size), owner[better]] = counts[better]
        fits = np.all([x.cost.rows(trials).max(axis=1) <= x.maximum for x in limits], axis=0)
        if not fits.any():
            break
        best = better[fits][np.argmax(gain[better][fits])]
        levels[owner[best]] = level[best]
    return levels


# Largest number of levels of a group, and of all groups together.
_LEVELS, _ALL_LEVELS = 64, 3000


def levels_of(ranked: Sequence[RankedGroup], only: Sequence[Counts] | None = None) -> list[Counts]:
    """Return steps that every group may keep, ascending: a group with a ratio of its own has no choice.

    Args:
        ranked: the groups.
        only: per group, the counts to use where any of them are allowed.
    """
    max_levels = max(8, min(_LEVELS, _ALL_LEVELS // max(1, len(ranked))))
    result = []
    for number, group in enumerate(ranked):
        if group.is_local:
            counts = np.array([group.steps - nearest_count(group.counts, group.ratio * group.steps, "nearest")])
        else:
            counts = group.steps - group.counts[::-1]
            restricted = counts if only is None else counts[np.isin(counts, only[number])]
            counts = restricted if restricted.size > 1 else counts
            counts = counts[np.unique(np.linspace(0, counts.size - 1, max_levels).round().astype(np.int64))]
        result.append(counts.astype(np.int64))
    return result


def by_scores(ranked: Sequence[RankedGroup], counts: Sequence[Counts]) -> Choices:
    """Return losses that are sums of the scores of the removed units."""
    losses = []
    for group, levels in zip(ranked, counts, strict=True):
        scores = step_scores(group, add=True)
        scores = scores - min(0.0, float(scores.min(initial=0.0)))
        total = np.concatenate([[0.0], np.cumsum(scores)])
        losses.append(total[group.steps - levels])
    return Choices(list(counts), losses)


def by_curves(
    ranked: Sequence[RankedGroup],
    counts: Sequence[Counts],
    curves: Mapping[int, tuple[Array, Array]],
    ids: Sequence[int],
) -> Choices:
    """Return losses from measured curves {group: (shares removed, losses)}; groups without a curve use scores.

    Between measured shares the loss rises as the scores do, scaled to the measurements at both ends: the units removed
    first matter least, which a straight line would ignore.
    """
    scored = by_scores(ranked, counts)
    losses = []
    unit = _unit(ranked, curves, ids)
    for number, group, levels, loss in zip(ids, ranked, counts, scored.losses, strict=True):
        if number not in curves:
            losses.append(loss * unit)
            continue
        shares, measured = curves[number]
        losses.append(_along(group, levels, shares, measured))
    return Choices(list(counts), losses)


def _along(group: RankedGroup, levels: Counts, shares: Array, measured: Array) -> Array:
    """Return the measured curve at the levels, monotone, with the scores' shape between its points."""
    scores = step_scores(group, add=True)
    scores = scores - min(0.0, float(scores.min(initial=0.0)))
    total = np.concatenate([[0.0], np.cumsum(scores)])
    # The whole group has no measured loss: beyond the last point the curve rises as the scores do.
    num_removed = np.concatenate([[0.0], shares]) * group.steps
    height = np.concatenate([[0.0], np.maximum.accumulate(np.maximum(measured, 0.0))])
    measured_at = np.interp(num_removed, np.arange(total.size), total)
    losses = total[group.steps - levels]
    if measured_at[-1] <= 0:
        return np.asarray(np.interp(group.steps - levels, num_removed, height))
    last = height[-1] / measured_at[-1]
    inside = np.interp(losses, measured_at, height)
    return np.asarray(np.where(losses > measured_at[-1], height[-1] + last * (losses - measured_at[-1]), inside))


def _unit(ranked: Sequence[RankedGroup], curves: Mapping[int, tuple[Array, Array]], ids: Sequence[int]) -> float:
    """Return the measured loss per score, over the groups that were measured."""
    ratios = []
    for number, group in zip(ids, ranked, strict=True):
        if number in curves:
            shares, measured = curves[number]
            total = np.cumsum(step_scores(group, add=True))
            score = float(total[min(total.size, max(1, round(shares[-1] * group.steps))) - 1])
            if score > 0:
                ratios.append(float(measured[-1]) / score)
    return float(np.median(ratios)) if ratios else 1.0


# Strength of the prior that all loss weights are equal, and the range of the weights.
_BELIEF, _WIDEST = 0.05, 30.0
# The least loss of a candidate, as a share of the largest: it bounds the influence of a single candidate.
_LEAST = 0.01


class LossWeights:
    """Per-column loss weights, fitted to the measured losses of evaluated candidates.

    A knapsack adds up the losses of columns pruned alone. The joint loss is modelled by the same sum with loss weights
    m >= 0, fitted to all candidates i with column losses L_ic and measured losses n_i:
    min sum_i ((sum_c m_c L_ic - n_i) / n_i)^2 + 0.05 sum_c (m_c / s - 1)^2, with s the best common weight.

    Args:
        choices: levels and losses of every column.
        whole: quality of the original; 0 where quality is noise, which is below 0.
    """

    def __init__(self, choices: Choices, original_fine: float = 0.0) -> None:
        self._choices, self._original_fine = choices, original_fine
        self._losses: list[Array] = []
        self._fine: list[float] = []

    def add(self, counts: Counts, fine: float) -> None:
        """Record a candidate: counts [columns], and its quality; higher is better."""
        self._losses.append(self._of(counts))
        self._fine.append(fine)

    def weights(self) -> Array:
        """Fit the loss weights [columns], as multiples of their common value."""
        losses, drops = np.array(self._losses), self._lost()
        informative = losses.sum(axis=1) > 0
        if not informative.any():
            return np.ones(losses.shape[1])
        losses, drops = losses[informative], drops[informative]
        alike = float(np.median(drops / losses.sum(axis=1)))
        columns = losses.shape[1]
        belief = np.sqrt(_BELIEF)
        rows = np.vstack([alike * losses / drops[:, None], belief * np.eye(columns)])
        target = np.concatenate([np.ones(len(drops)), np.full(columns, belief)])
        return np.asarray(np.clip(nnls(rows, target)[0], 1 / _WIDEST, _WIDEST))

    def gain(self, counts: Counts, weights: Array) -> float:
        """Return the loss that a candidate is predicted to save against the best so far, as a share of its loss."""
        best = float(self._losses[int(np.argmax(self._fine))] @ weights)
        return 1.0 - float(self._of(counts) @ weights) / best if best > 0 else 0.0

    def _of(self, counts: Counts) -> Array:
        """Return losses [columns] at counts; linear between levels."""
        pairs = zip(counts, self._choices.options, self._choices.losses, strict=True)
        return np.array([np.interp(n, levels, losses) for n, levels, losses in pairs], dtype=np.float64)

    def _lost(self) -> Array:
        """Return the measured loss of every candidate, above 0 even for one as good as the original."""
        drops = self._original_fine - np.array(self._fine)
        return np.asarray(np.maximum(drops, max(_LEAST * drops.max(), 1e-12)))
