"""Slots with feature maps: one per group and contraction that reads its channels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.criteria import Slot
from onnxprune.groups.units import Group
from onnxprune.labels.label import Ids
from onnxprune.model.elements import aligned
from onnxprune.operators.context import Table
from onnxprune.rewrite.after import After
from onnxprune.selection.dequantize import numbers_at
from onnxprune.selection.sites import Site, surviving
from onnxprune.selection.targets import Targets
from onnxprune.statistics import Maps


@dataclass(slots=True)
class CapturedMaps:
    """Statistics by place: ``maps`` by a site's ``maps_key``, ``columns`` by its ``columns_key``."""

    sites: list[Site] = field(default_factory=list)
    samples: int = 0
    maps: dict[Hashable, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    columns: dict[Hashable, dict[str, NDArray[np.float64]]] = field(default_factory=dict)

    def shortage(self) -> tuple[str, int] | None:
        """(contraction, samples) of the place that has the fewest rows for its columns; None where all have enough.

        A Gram matrix of fewer rows than columns is singular: some channels seem to follow from others by chance.
        """
        worst: tuple[str, int] | None = None
        for site in self.sites:
            found = self.columns.get(site.columns_key, {})
            if "rows" in found and "gram" in found:
                rows, columns = float(found["rows"]), found["gram"].shape[-1]
                needed = int(np.ceil(self.samples * columns / max(rows, 1.0)))
                if rows < columns and (worst is None or needed > worst[1]):
                    worst = site.node.label, needed
        return worst


def map_slots(
    analysis: Analysis,
    groups: Iterable[Group],
    captured: CapturedMaps,
    removed: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, Slot]]:
    """(group, slot) for every wanted group at every site, in graph order.

    Args:
        removed: mask over atoms of what is gone already; ``captured`` then comes from the model cut accordingly.
    """
    table, units = analysis.table, analysis.units
    wanted = {g.id: g for g in groups}
    targets = Targets(units, wanted.values())
    after = After(table, np.zeros(units.component.size, bool) if removed is None else removed)
    for site in captured.sites:
        positions = site.channels(surviving(after, site.label))
        component = units.component[site.label.ids.ravel()[positions]]
        numbers = targets.group[component]
        found = np.unique(numbers[numbers >= 0])
        if not found.size:
            continue
        weight = _weight(table, after, site, positions)
        if weight is None and site.form is not None:
            continue
        for number in found:
            chosen = np.flatnonzero(numbers == number)
            slot = _slot(table, site, captured, weight, chosen, wanted[int(number)], targets.unit[component[chosen]])
            slot.seed = (seed, int(number))
            yield int(number), slot


def _slot(
    table: Table,
    site: Site,
    captured: CapturedMaps,
    weight: NDArray[Any] | None,
    chosen: Ids,
    group: Group,
    units: Ids,
) -> Slot:
    arrays = _arrays(site, captured, chosen, 0 if weight is None else len(weight))
    maps = Maps(captured.samples if arrays or not site.where else 0, arrays)
    if weight is None:
        assert site.partner is not None
        square = captured.maps[site.partner_key].get("square")
        rms = np.ones(chosen.size) if square is None else np.sqrt(square[chosen])
        blocks, taps, name = rms[None, :, None], 1, site.tensor
    else:
        assert site.form is not None
        blocks, taps = weight[chosen].reshape(1, chosen.size, -1), site.form.taps
        name = site.node.inputs[site.form.weight]
    return Slot(
        tensor=name,
        axis=site.label.pack,
        blocks=blocks,
        role=[(site.node.op, site.position)],
        units=units,
        size=group.size,
        maps=maps,
        taps=taps,
        classes=group.classes[units],
        pairs=weight is None,
    )


def _arrays(site: Site, captured: CapturedMaps, chosen: Ids, channels: int) -> dict[str, NDArray[np.float64]]:
    """The site's statistics of the chosen channels."""
    every = not channels or chosen.size == channels
    arrays: dict[str, NDArray[np.float64]] = {}
    for name, value in captured.maps.get(site.maps_key, {}).items():
        arrays[name] = value if every else (value[np.ix_(chosen, chosen)] if value.ndim == 2 else value[chosen])
    for name, value in captured.columns.get(site.columns_key, {}).items():
        if every or not value.ndim:
            arrays[name] = value
        elif len(value) == 1:  # one part: the chosen channels' columns are a matrix of their own
            taps = value.shape[-1] // channels
            index = (chosen[:, None] * taps + np.arange(taps)).ravel()
            arrays[name] = value[:, index][..., index] if value.ndim == 3 else value[:, index]
    return arrays


def _weight(table: Table, after: After, site: Site, positions: Ids) -> NDArray[Any] | None:
    """The site's weight as [surviving channels, taps, outputs], outputs that are gone set to 0; None for a pair."""
    if site.form is None:
        return None
    name = site.node.inputs[site.form.weight]
    value = numbers_at(table.graph, site.node, site.form.weight)
    if value is None or value.dtype.kind not in "fV":
        return None
    value = aligned(value) if value.dtype == np.float64 else value.astype(np.float32)
    for label in table.get(name):
        keep = after.mask(label)
        if keep is not None:
            value = np.where(keep, value, np.zeros((), value.dtype))
    matrix = site.form.matrix(value)
    parts, columns, outputs = matrix.shape
    channels = matrix.reshape(parts * columns // site.form.taps, site.form.taps, outputs)
    every = site.channels(np.arange(site.label.ids.size).reshape(site.label.ids.shape))
    place = np.empty(every.size, np.int64)
    place[every] = np.arange(every.size)
    return channels if len(positions) == len(every) else channels[place[positions]]
