"""Which unit of which wanted group a channel counts for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxprune.groups.units import Group, Units


class Targets:
    """The wanted group and the unit that every component counts for, -1 where none: its own, or the row it lies in."""

    def __init__(self, units: Units, groups: Iterable[Group]) -> None:
        self.group = np.full(units.frozen.size, -1, dtype=np.int64)
        self.unit = np.full(units.frozen.size, -1, dtype=np.int64)
        for group in groups:
            self.group[group.units] = group.id
            self.unit[group.units] = np.arange(group.size)
        for rows in reversed(units.atoms.rows):
            above = units.component[rows.rows]
            mine = self.group[above] >= 0
            cells = units.component[rows.cells[mine]]
            fresh = self.group[cells] < 0
            for values in (self.group, self.unit):
                values[cells[fresh]] = np.broadcast_to(values[above[mine]][:, None], cells.shape)[fresh]
