"""Penalties that bring whole units to 0 while a model trains: proximal steps on groups of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnxprune.runtime.sessions import Array
from onnxprune.training.step import Adam, Coordinates, Parameters, Vector

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
Real = NDArray[np.float64]

RAMP = 0.75
"""Share of a training at which the share of the units that was asked for is 0; the rest heals."""
THRESHOLD = 1e-3
"""Size of a unit, relative to its group's median before the training, below which it becomes 0."""
_FASTER, _SLOWER = 1.05, 0.97
_LEAST, _MOST = 1e-2, 1e3
_NOTHING = 1e-12

MAKES, READS, SCALES, SHIFTS = "makes", "reads", "scales", "shifts"
"""Roles of weights towards units: compute them, sum over them, multiply them, are added to them."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Places of units in one weight.

    Attributes:
        weight: its name.
        units: number of the unit at every position, of the weight's rank with size 1 on axes it does not depend on; -1
            where there is none.
        role: one of the four roles.
    """

    weight: str
    units: Ids
    role: str = MAKES


ROLES: dict[str, tuple[str, ...]] = {
    "unit": (MAKES, READS),
    "filter": (MAKES,),
    "channel": (READS,),
    "shape": (READS,),
}
"""Weights that a group consists of, by the name of the grouping. A vector that scales units counts in all of them."""


@dataclass(slots=True)
class Units:
    """The units that are penalised.

    Attributes:
        slices: where their weights lie.
        group: number of the group of every unit [units].
        max_zeros: largest number of units of every group that may become 0 [groups].
    """

    slices: Sequence[Slice]
    group: Ids
    max_zeros: Ids
    _scales: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of units."""
        return int(self.group.size)

    def norms(self, views: Mapping[str, Array], slices: Sequence[Slice]) -> Real:
        """Return the root mean square over a unit's slices, each relative to its weight at the first call [units]."""
        total, number = np.zeros(self.count), np.zeros(self.count)
        for item in slices:
            squares = _per_unit(np.square(views[item.weight], dtype=np.float64), item.units, np.mean)
            inside = item.units.ravel() >= 0
            where = item.units.ravel()[inside]
            scale = self._scales.setdefault(item.weight, float(np.mean(squares)) or _NOTHING)
            np.add.at(total, where, squares.ravel()[inside] / scale)
            np.add.at(number, where, 1.0)
        return np.asarray(np.sqrt(total / np.maximum(number, 1)))

    def zeros(self, views: Mapping[str, Array]) -> Mask:
        """Return which units are 0 in all of their slices [units]; those without any are not."""
        largest = np.full(self.count, -1.0)
        for item in self.slices:
            sizes = _per_unit(np.abs(views[item.weight]), item.units, np.max)
            inside = item.units.ravel() >= 0
            np.maximum.at(largest, item.units.ravel()[inside], sizes.ravel()[inside])
        return np.asarray(largest == 0)

    def products(self, views: Mapping[str, Array], others: Mapping[str, Array], slices: Sequence[Slice]) -> Real:
        """Return the sum over a unit's slices of products of two sets of values [units]."""
        total = np.zeros(self.count)
        for item in slices:
            parts = _per_unit(views[item.weight].astype(np.float64) * others[item.weight], item.units, np.sum)
            inside = item.units.ravel() >= 0
            np.add.at(total, item.units.ravel()[inside], parts.ravel()[inside])
        return total

    @staticmethod
    def scale(views: Mapping[str, Array], slices: Sequence[Slice], factors: Real) -> None:
        """Multiply the weights of every unit by its factor, in place."""
        extended = np.append(factors, 1.0).astype(np.float32)  # the last is that of no unit
        for item in slices:
            views[item.weight][...] *= extended[item.units]


def _per_unit(values: Real, units: Ids, reduce: Callable[..., Real]) -> Real:
    """Reduce values over the axes that units do not lie along."""
    axes = tuple(a for a, n in enumerate(units.shape) if n == 1)
    return np.asarray(reduce(values, axis=axes, keepdims=True)) if axes else values


class Penalty:
    """Shrinks units step by step, until a share of them is 0.

    The sum of the norms of units, times a strength, is added to the loss by its proximal operator: behind every step, a
    norm loses strength * step size, and a unit whose norm falls below a threshold is 0 from then on. Norms are relative
    to the median of their group before the training, so that groups of any scale compete.

    A given strength is on all units. With a share in its place, the sum is that of the share's smallest norms (trimmed
    lasso), which are others from step to step, and the units that are to stay keep their sizes. The strength then grows
    while fewer units are 0 than a cubic schedule asks for, and falls while more are; units missing at three quarters
    of the training are taken from the smallest.

    Which units are 0 is read off the weights, so that earlier weights can be restored at any time.

    Args:
        units: the units.
        penalized: the slices that the norms are taken of.
        parameters: the weights.
        share: share of the units to bring to 0, 0 < share < 1; None: as many as the strength brings to 0.
        strength: strength of the penalty, above 0; None: adapted to ``share``.
        threshold: relative norm below which a unit becomes 0, 0 <= threshold < 1.
        masked: whether the penalty is on a mask in front of every unit, which is trained, in place of the norms.

    Sources: Wen et al., Learning Structured Sparsity in Deep Neural Networks, 2016 (group lasso over filters, channels
    and shapes); Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017 (scales);
    Ramakrishnan et al., Differentiable Mask for Pruning Convolutional and Recurrent Networks, 2019 (masks with an L1
    penalty and a threshold); Yun et al., Trimming the L1 Regularizer, ICML 2019 (the smallest norms alone).
    """

    def __init__(
        self,
        units: Units,
        penalized: Sequence[Slice],
        parameters: Parameters,
        share: float | None = None,
        strength: float | None = None,
        threshold: float = THRESHOLD,
        *,
        masked: bool = False,
    ) -> None:
        self.units, self._slices, self._parameters, self._masked = units, penalized, parameters, masked
        self.share, self.strength, self._threshold = share, strength or 1.0, max(threshold, _NOTHING)
        self.penalized = np.zeros(units.count, bool)
        for item in penalized:
            self.penalized[item.units[item.units >= 0]] = True
        views = parameters.views(parameters.vector)
        first = units.norms(views, penalized)
        num_groups = int(units.group.max(initial=-1)) + 1
        members = [first[(units.group == g) & self.penalized & (first > 0)] for g in range(num_groups)]
        medians = np.asarray([float(np.median(m)) if m.size else 1.0 for m in members])
        self._usual = np.maximum(medians[units.group], _NOTHING)
        self._first = np.maximum(first, _NOTHING)
        self.reset()

    def reset(self) -> None:
        """Forget the gradients of masks."""
        self.mean, self.square, self.count = np.zeros(self.units.count), np.zeros(self.units.count), 0

    def zeros(self) -> Mask:
        """Return which of the penalised units are 0 now [units]."""
        return np.asarray(self.penalized & self.units.zeros(self._parameters.views(self._parameters.vector)))

    @property
    def num_zeros(self) -> int:
        """The number of penalised units that are 0 now."""
        return int(self.zeros().sum())

    @property
    def missing(self) -> float:
        """Share of the units that should become 0 and are not, 0 to 1; without such a share, of all."""
        return max(0.0, 1.0 - self.num_zeros / max(self._goal(), 1))

    def step(self, zeros: Mask, gradient: Vector, rate: float, progress: float) -> None:
        """Shrink the units after a step of the optimiser.

        Args:
            zeros: units that were 0 before that step, and stay so.
            gradient: gradient of the loss that the step was made by.
            rate: size of the step.
            progress: share of the training that is done, 0 to 1.
        """
        views = self._parameters.views(self._parameters.vector)
        active = self.penalized & ~zeros
        if progress < RAMP:
            shrunk = active
            if self.share is not None:
                # Masks are all 1 in the beginning: the sizes of the units decide between them.
                norms = self.units.norms(views, self._slices) / self._usual
                shrunk = self._spared(norms, active, self._goal() - int(zeros.sum()), zeros)
            if self._masked:
                factors = self._by_masks(views, gradient, rate, shrunk)
                Units.scale(views, self._slices, np.where(active, factors, 1.0))
            else:
                Units.scale(views, self._slices, np.where(shrunk, self._by_norms(views, rate), 1.0))
        sizes = self._sizes(views)
        small = active & (sizes < self._threshold)
        if self.share is not None:
            small = self._adapted(zeros, sizes, active, small, progress)
        zeros = zeros | self._spared(sizes, small, int(small.sum()), zeros)
        Units.scale(views, self.units.slices, np.where(zeros, 0.0, 1.0))

    def _sizes(self, views: Mapping[str, Array]) -> Real:
        """Return the norms, relative to those before the training: for masks to a unit's own, else its group's."""
        return np.asarray(self.units.norms(views, self._slices) / (self._first if self._masked else self._usual))

    def _adapted(self, zeros: Mask, sizes: Real, active: Mask, small: Mask, progress: float) -> Mask:
        """Adapt the strength; return the units to set to 0, at the end of the ramp as many as were asked for."""
        assert self.share is not None
        ramp = min(progress / RAMP, 1.0)
        goal = self._goal() * (1 - (1 - ramp) ** 3)
        count = int(zeros.sum())
        missing = round(goal) - count - int(small.sum())
        if progress >= RAMP and missing > 0:
            small = small | self._spared(sizes, active & ~small, missing, zeros | small)
        self.strength = float(np.clip(self.strength * (_FASTER if count < goal else _SLOWER), _LEAST, _MOST))
        return small

    def _goal(self) -> int:
        """Return the number of units that are to become 0."""
        return round((1.0 if self.share is None else self.share) * float(self.penalized.sum()))

    def _by_norms(self, views: Mapping[str, Array], rate: float) -> Real:
        """Return the factors of the proximal operator of the norms."""
        return np.asarray(np.maximum(0.0, 1.0 - self.strength * rate / np.maximum(self._sizes(views), _NOTHING)))

    def _by_masks(self, views: Mapping[str, Array], gradient: Vector, rate: float, shrunk: Mask) -> Real:
        """Return the factors by which masks change, and with them the weights: a step of Adam, then one of L1.

        A mask is the size of a unit relative to its own before the training: it multiplies all of its weights. L1 is on
        the masks of the units that ``shrunk`` marks.
        """
        masks = np.maximum(self._sizes(views), self._threshold)
        slopes = self.units.products(views, self._parameters.views(gradient), self._slices) / masks
        self.count += 1
        self.mean += 0.1 * (slopes - self.mean)
        self.square += 1e-3 * (np.square(slopes) - self.square)
        correction = np.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count)
        move = correction * self.mean / (np.sqrt(self.square) + _NOTHING)
        return np.asarray(np.maximum(0.0, masks - rate * move - self.strength * rate * shrunk) / masks)

    def _spared(self, sizes: Real, among: Mask, number: int, zeros: Mask) -> Mask:
        """Return the smallest units, as far as groups can spare them."""
        selected = np.zeros(self.units.count, bool)
        room = self.units.max_zeros - np.bincount(self.units.group[zeros & ~among], minlength=self.units.max_zeros.size)
        for unit in np.flatnonzero(among)[np.argsort(sizes[among], kind="stable")]:
            if number > 0 and room[self.units.group[unit]] > 0:
                selected[unit] = True
                room[self.units.group[unit]] -= 1
                number -= 1
        return selected


class Proximal(Adam):
    """Adam with a proximal step of a penalty behind every step.

    Args:
        parameters: the weights.
        sizes: size of each element's steps at a rate of 1.
        penalty: the penalty.
        coordinates: coordinates in which moments are taken; None: those of the weights themselves.
    """

    def __init__(
        self, parameters: Parameters, sizes: Vector, penalty: Penalty, coordinates: Coordinates | None = None
    ) -> None:
        self.penalty = penalty
        super().__init__(parameters, sizes, coordinates=coordinates)

    def reset(self) -> None:
        """Forget all gradients."""
        super().reset()
        self.penalty.reset()

    def update(self, gradient: Vector, rate: float, progress: float = 0.0) -> None:
        """Change the weights."""
        zeros = self.penalty.zeros()
        super().update(gradient, rate, progress)
        self.penalty.step(zeros, gradient, rate, progress)

    def state(self) -> dict[str, Array]:
        """Return everything that later steps depend on."""
        penalty = self.penalty
        numbers = np.asarray([penalty.strength, penalty.count], np.float64)
        return {**super().state(), "penalty": numbers, "mask_mean": penalty.mean, "mask_square": penalty.square}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a state."""
        super().restore(state)
        penalty = self.penalty
        penalty.strength, penalty.count = float(state["penalty"][0]), int(state["penalty"][1])
        penalty.mean, penalty.square = np.array(state["mask_mean"]), np.array(state["mask_square"])
