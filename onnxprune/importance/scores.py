"""Scores: run a criterion over slots, normalise its scores between layers, and aggregate them per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import ExtensionError, ModelError, OnnxpruneError, UsageError, argument
from onnxprune.importance.criteria import Criterion, Slot
from onnxprune.importance.slots import PlacedSlot, SlotView, Squares
from onnxprune.labels.label import Ids

Array = NDArray[np.float64]


def normalize(scores: NDArray[Any], method: str) -> Array:
    """Return scores [channels] of one weight after normalisation; constant scores stay finite.

    Args:
        scores: raw scores [channels], higher matters more.
        method: ``none``; ``mean``: divided by the mean absolute score; ``root``: divided by the square root of the sum
            of absolute scores, half-way between ``none`` and ``tss``; ``standard``: less the mean, divided by the
            standard deviation; ``tss``: divided by the sum of absolute scores (total-sum scaling); ``linear``: from 0
            to 1 between the least and the largest; ``softmax``: exponentials that sum to 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    return _METHODS[method](values) if values.size else values


def _ratio(values: Array, scale: float) -> Array:
    return values / scale if scale > 0 else values


def _softmax(values: Array) -> Array:
    grown = np.exp(values - values.max())
    return np.asarray(grown / grown.sum())


_METHODS: dict[str, Callable[[Array], Array]] = {
    "none": lambda v: v,
    "mean": lambda v: _ratio(v, float(np.add.reduce(np.abs(v))) / v.size),
    "root": lambda v: _ratio(v, float(np.sqrt(np.abs(v).sum()))),
    "standard": lambda v: _ratio(v - v.mean(), float(v.std())),
    "tss": lambda v: _ratio(v, float(np.abs(v).sum())),
    "linear": lambda v: _ratio(v - v.min(), float(np.ptp(v))),
    "softmax": _softmax,
}


class Part(NamedTuple):
    """Scores [channels] of one weight, the unit of every channel, and the weight's place in the graph."""

    units: Ids
    scores: Array
    place: tuple[int, ...] = (0,)


def combine(parts: Sequence[Part], size: int, policy: str) -> Array:
    """Return one score per unit, [size]; units that no part scores get the mean of the others.

    Args:
        parts: scores of one weight each, at least one.
        size: units of the group.
        policy: ``sum``, ``average`` or ``max`` of all scores that a unit has; ``backward``: the sum of those it has in
            the last part that knows the unit.
    """
    units = np.concatenate([p.units for p in parts])
    scores = np.concatenate([p.scores for p in parts])
    count = np.bincount(units, minlength=size)
    if policy == "backward":
        result = np.zeros(size)
        for part in sorted(parts, key=lambda p: p.place):
            sums = np.bincount(part.units, weights=part.scores, minlength=size)
            present = np.unique(part.units)
            result[present] = sums[present]
    elif policy == "max":
        result = np.full(size, -np.inf)
        np.maximum.at(result, units, scores)
    else:
        result = np.bincount(units, weights=scores, minlength=size).astype(np.float64, copy=False)
        if policy == "average":
            result = result / np.maximum(count, 1)
    if units.size and np.count_nonzero(count) < size:
        result[count == 0] = result[count > 0].mean()
    return result


def columns(classes: Ids, steps: int) -> Ids:
    """Return the column of every unit: its index among the units of its row, [units], in ``steps`` columns.

    Where rows differ in length, several neighbouring units of a longer row share a column.
    """
    order = np.argsort(classes, kind="stable")
    sizes = np.bincount(classes)
    rank = np.empty(classes.size, dtype=np.int64)
    rank[order] = np.arange(classes.size) - (np.cumsum(sizes) - sizes)[classes[order]]
    return np.asarray(rank // (sizes // steps)[classes])


def over_columns(scores: Array, classes: Ids, steps: int, policy: str) -> Array:
    """Return scores [units] of a group with several rows under a grid policy: units of a column share their score.

    Args:
        scores: one per unit, [units].
        classes: row of every unit, [units].
        steps: number of columns.
        policy: ``sum`` or ``average`` over the column; ``count``: every row by itself, with unchanged scores.
    """
    if policy not in ("sum", "average") or not (classes != classes[0]).any():
        return scores
    column = columns(classes, steps)
    total = np.bincount(column, weights=scores).astype(np.float64)
    if policy == "average":
        total /= np.bincount(column)
    return np.asarray(total[column])


V = TypeVar("V", bound=SlotView)

NEEDS: dict[str, str] = {
    "bn": "'bn' needs BatchNormalization nodes after the channels; choose 'l2' or 'gm'.",
    "hrank": "'hrank' needs feature maps with two spatial axes, as convolutions have; choose 'l2' or 'wanda'.",
    "nuclear": "'nuclear' needs feature maps with more than one value per channel; choose 'l2' or 'wanda'.",
    "snp": "'snp' needs attention heads (a product of queries and keys); choose 'l2' or 'wanda'.",
    "cosine": "'cosine' needs feature maps of at least two channels before a contraction; choose 'l2' or 'gm'.",
    **{
        name: f"{name!r} needs channels that a floating-point weight multiplies; choose 'l2', 'gm' or 'activation'."
        for name in ("wanda", "obs", "variance")
    },
    **{
        name: f"{name!r} needs weights in float32 from which operators with gradients lead to the outputs; choose "
        "'ziplm' or 'l2'."
        for name in ("gradient", "snip", "snip-momentum", "taylor", "fisher", "obd")
    },
}
"""The layers that each selective criterion applies to, for error messages."""


class ScoredSlot(NamedTuple):
    """The result of a criterion for one slot: raw scores [channels] of group ``group``."""

    group: int
    tensor: str
    units: Ids
    scores: Array
    rank: int = 0
    place: tuple[int, ...] = (0,)


def scored(slots: Iterable[PlacedSlot[V]], criterion: Callable[[V], NDArray[Any] | None]) -> list[ScoredSlot]:
    """Return the raw scores of every slot that the criterion applies to.

    Matrices count where there are any; vectors (biases, BatchNorm) only where there are none, unless the criterion
    itself picks its slots.

    Raises:
        ModelError: a weight holds NaN or infinity.
        UsageError: the criterion gives scores of another shape, or that are not finite.
    """
    items: list[ScoredSlot] = []
    ranks: dict[int, int] = {}
    for placed in slots:
        slot = placed.slot
        raw = _call_criterion(criterion, slot)
        if raw is None:
            continue
        if raw.shape != slot.units.shape:
            raise UsageError(
                f"The criterion returned shape {raw.shape} for {slot.tensor!r}, expected {slot.units.shape}.",
                hint="A criterion returns one score per channel of the slot.",
            )
        _refuse_nan(criterion, slot, raw)
        ranks[placed.group] = max(ranks.get(placed.group, 0), placed.rank)
        if placed.rank == ranks[placed.group]:
            scores = np.asarray(raw, dtype=np.float64)
            items.append(ScoredSlot(placed.group, slot.tensor, slot.units, scores, placed.rank, placed.place))
    return [item for item in items if item.rank == ranks[item.group]]


def _call_criterion(criterion: Callable[[V], NDArray[Any] | None], slot: V) -> NDArray[Any] | None:
    """Call a criterion on a slot and return its scores.

    Raises:
        ExtensionError: the criterion raises, or its result is not numeric.
    """
    try:
        raw = criterion(slot)
        if raw is None:
            return None
        scores = np.asarray(raw)
        if scores.dtype.kind in "OSUM":
            raise TypeError(f"it returned {scores.dtype}, expected numbers")
        return scores
    except (OnnxpruneError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        raise ExtensionError(
            f"The criterion {getattr(criterion, '__name__', 'of the caller')} failed for {slot.tensor!r}: "
            f"{type(error).__name__}: {reason}",
            hint="It is called with a slot (and maps, where it takes two arguments) and returns a number per channel.",
        ) from error


def without(items: Iterable[ScoredSlot], masks: Mapping[int, NDArray[np.bool_]]) -> list[ScoredSlot]:
    """Remove the scores of pruned units, {group: mask over its units}."""
    result = []
    for item in items:
        mask = masks.get(item.group)
        if mask is not None and mask[item.units].any():
            alive = ~mask[item.units]
            item = ScoredSlot(item.group, item.tensor, item.units[alive], item.scores[alive], item.rank, item.place)
        if item.units.size:
            result.append(item)
    return result


def unit_scores(items: Sequence[ScoredSlot], sizes: Mapping[int, int], method: str, policy: str) -> dict[int, Array]:
    """Return scores [units] of every group that some slot scores, by group id.

    Args:
        items: raw scores of slots.
        sizes: number of units by group id.
        method: see ``normalize``.
        policy: see ``combine``.
    """
    parts: dict[int, list[Part]] = {}
    for item in items:
        parts.setdefault(item.group, []).append(Part(item.units, normalize(item.scores, method), item.place))
    return {number: combine(group_parts, sizes[number], policy) for number, group_parts in parts.items()}


def all_constant(items: Sequence[ScoredSlot]) -> bool:
    """Return whether every slot has the same score for all of its channels."""
    telling = [x for x in items if x.scores.size > 1]
    return bool(telling) and all(np.ptp(x.scores) == 0 for x in telling)


class NoScore(UsageError):
    """A criterion that applies to none of the groups (exit code 2)."""


def uninformative(name: str) -> NoScore:
    """Return the error for a criterion that applies to none of the groups."""
    return NoScore(
        f"The criterion {name!r} has scores for no layer of the model.",
        hint=NEEDS.get(name, "Choose another criterion: 'l2' and 'gm' score every weight."),
    )


def needs_data(name: str) -> UsageError:
    """Return the error for a criterion that reads feature maps where there are no inputs to run the model on."""
    return UsageError(
        f"{argument('criterion')} {name} needs data: it scores channels by their activations.",
        hint=f"Give inputs with {argument('data')}, or choose a criterion of weights, such as l2.",
    )


def _refuse_nan(criterion: Callable[..., Any], slot: SlotView, scores: NDArray[Any]) -> None:
    """Raise an error for NaN or infinity in a weight, which its scores show unless the criterion reads a part alone."""
    finite = np.count_nonzero(np.isfinite(scores)) == scores.size
    if finite and not getattr(criterion, "reads_all", False):
        finite = bool(np.isfinite(slot.blocks).all())
    if not finite and not np.isfinite(slot.blocks).all():
        raise ModelError(
            f"Weight {slot.tensor!r} holds NaN or infinity.",
            hint="It cannot be scored; export the model again.",
        )
    if not finite:
        raise UsageError(
            f"The criterion gave NaN or infinity for {slot.tensor!r}.", hint="Return finite scores, one per channel."
        )


def by_maps(criterion: Criterion) -> Callable[[Slot], NDArray[Any] | None]:
    """Wrap a criterion of two arguments as a function of a slot that carries its maps."""

    def of_slot(slot: Slot) -> NDArray[Any] | None:
        return criterion(slot, slot.maps)

    of_slot.reads_all = getattr(criterion, "reads_all", False)  # type: ignore[attr-defined]
    return of_slot


def by_squares(criterion: Criterion) -> Callable[[Squares], NDArray[Any]] | None:
    """Wrap a criterion as a function of sums of squares; None where it is not one."""
    of_squares: Callable[[NDArray[Any]], NDArray[Any]] | None = getattr(criterion, "of_squares", None)
    if of_squares is None:
        return None

    def of_slot(slot: Squares) -> NDArray[Any]:
        return of_squares(slot.sums)

    of_slot.reads_all = True  # type: ignore[attr-defined]
    return of_slot
