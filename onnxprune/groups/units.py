"""Units: what goes together; groups: units that compete."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnxprune.labels.atoms import Atoms
from onnxprune.labels.label import Ids


@dataclass(slots=True)
class Group:
    """Units that compete with each other.

    ``units`` are component numbers in the order of their first channel. ``classes`` [units] says which units may stand
    in for each other: a cut takes the same share from every class, so a group can be cut in ``steps`` equal steps.
    ``kind`` is "heads" when a unit stands for whole rows of a grid (heads, convolution groups), else "channels";
    a group is ``covered`` where such rows are cut in its place.
    """

    id: int
    units: Ids
    classes: Ids
    steps: int
    kind: str = "channels"
    prunable: bool = True
    covered: bool = False
    barriers: list[int] = field(default_factory=list)
    births: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    children: list[int] = field(default_factory=list)
    exact: bool = True

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.units.size)


@dataclass(slots=True)
class Units:
    """Components of atoms and their groups.

    ``component`` [atoms]; ``frozen`` [components]; ``group_of`` [components], -1 where a component may not be removed.
    """

    component: Ids
    frozen: NDArray[np.bool_]
    barrier_of: Ids
    group_of: Ids
    groups: list[Group]
    atoms: Atoms

    def close(self, removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Components that go when ``removed`` [components] go: cells of removed rows, and rows left without cells."""
        removed = removed.copy()
        before = -1
        while before != (before := int(removed.sum())):
            for rows in reversed(self.atoms.rows):
                above, cells = self.component[rows.rows], self.component[rows.cells]
                removed[cells[removed[above]].ravel()] = True
                removed[above[removed[cells].all(axis=1)]] = True
        return removed
