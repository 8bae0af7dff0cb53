"""Slots with weights and feature maps, in every layout that criteria meet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.importance import criteria, statistics
from onnxprune.importance.criteria import Maps, Slot

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """weights [channels, taps, outputs], maps [samples, channels, height, width]; the kernel reads shifted columns."""

    weights: Array
    maps: Array
    units: Array
    classes: Array
    parts: int = 1
    pairs: bool = False

    @property
    def columns(self) -> Array:
        """The contraction's input [parts, rows, channels per part * taps], taps innermost."""
        taps = self.weights.shape[1]
        shifted = np.stack([np.roll(self.maps, t, axis=-1) for t in range(taps)], axis=2)
        samples, channels, _, height, width = shifted.shape
        split = shifted.reshape(samples, self.parts, channels // self.parts * taps, height * width)
        return split.transpose(1, 0, 3, 2).reshape(self.parts, samples * height * width, -1)

    @property
    def gradients(self) -> Array:
        """Of every sample, [samples, channels, taps, outputs]: those of a linear layer with given errors of outputs."""
        samples, (channels, taps, outputs) = len(self.maps), self.weights.shape
        columns = self.columns.reshape(self.parts, samples, -1, channels // self.parts, taps)
        errors = np.cos(np.arange(samples * columns.shape[2] * outputs)).reshape(samples, columns.shape[2], outputs)
        return np.einsum("psrct,sro->spcto", columns, errors).reshape(samples, channels, taps, outputs)

    def of_gradients(self) -> dict[str, Array]:
        """Statistics of gradients, a call for every sample."""
        own, shape = self.gradients, self.slot().blocks.shape
        gates = np.einsum("scto,cto->sc", own, self.weights)
        whole = {"gradient": own.mean(0), "gradient_total": abs(own).sum(0), "gradient_square": (own**2).mean(0)}
        blocks = {name: value.reshape(shape) for name, value in whole.items()}
        return {**blocks, "gate_magnitude": abs(gates).mean(0), "gate_square": (gates**2).mean(0)}

    def statistics(self, without: str = "") -> Maps:
        """Everything that can be measured, but for what the statistic ``without`` gives."""
        found = {}
        for name in statistics.names():
            statistic = statistics.get(name)()
            statistic.update(self.columns if statistic.columns else self.maps)
            found[name] = statistic.result()
        found |= {name: {name: value} for name, value in self.of_gradients().items()}
        missing = found.get(without, {})
        return Maps(len(self.maps), {k: v for part in found.values() for k, v in part.items() if k not in missing})

    def slot(self) -> Slot:
        channels, taps, outputs = self.weights.shape
        return Slot(
            tensor="w",
            axis=1,
            blocks=self.weights.reshape(1, channels, taps * outputs),
            role=[("Conv", 1), ("BatchNormalization", 1)],
            units=self.units,
            size=int(self.units.max()) + 1,
            seed=(3, 1),
            taps=taps,
            classes=self.classes,
            pairs=self.pairs,
        )

    def permuted(self, order: Array) -> Case:
        """The same channels in another order."""
        moved = {name: getattr(self, name)[order] for name in ("weights", "units", "classes")}
        return replace(self, maps=self.maps[:, order], **moved)

    def with_scaled(self, weights: float = 1.0, maps: float = 1.0) -> Case:
        return replace(self, weights=self.weights * weights, maps=self.maps * maps)


def scores(name: str, case: Case) -> Array | None:
    """What a criterion gives, whether it reads maps or not; it gets arrays that it cannot write to."""
    criterion, slot, maps = criteria.get(name), case.slot(), case.statistics()
    slot.maps = maps
    for array in (slot.blocks, slot.units, slot.classes, *maps.arrays.values()):
        assert array is not None
        array.flags.writeable = False
    return criterion(slot, maps) if criteria.needs_of(criterion) else criterion(slot)


def draw(layout: str, seed: int = 0) -> Case:
    """Twelve channels with correlated maps that a ReLU has passed, in float64."""
    rng = np.random.default_rng(seed)
    channels = 12
    taps, outputs = {"kernel": (3, 4), "pairs": (1, 1)}.get(layout, (1, 5))
    hidden = rng.normal(size=(6, 7, 5, 4))
    maps = np.maximum(np.einsum("ck,skhw->schw", rng.normal(size=(channels, 7)), hidden), 0.0)
    weights = rng.normal(size=(channels, taps, outputs))
    plain = np.arange(channels)
    if layout == "groups":  # three convolution groups that lose the same place, so a unit has a channel in each
        return Case(weights, maps, units=plain % 4, classes=np.zeros(channels, int), parts=3)
    if layout == "heads":  # three heads that may lose different dimensions
        return Case(weights, maps, units=plain, classes=plain // 4)
    if layout == "rows":  # whole heads of different sizes
        units = np.repeat([0, 1, 2, 3], [2, 3, 4, 3])
        return Case(weights, maps, units=units, classes=np.zeros(channels, int))
    if layout == "pairs":
        return Case(np.abs(weights), maps, units=plain, classes=plain // 4, pairs=True)
    return Case(weights, maps, units=plain, classes=np.zeros(channels, int))


LAYOUTS = ("dense", "kernel", "groups", "heads", "rows", "pairs")
