"""Which groups are alike: they run through the same operators in the same roles, sizes aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.groups.units import Group


def ranking_scopes(analysis: Analysis, groups: Sequence[Group]) -> dict[int, Hashable]:
    """A key per group; groups with equal keys are isomorphic, {group: key}.

    Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, compare structures that are alike. The key counts
    (operator, input or output, its number, axes) over the nodes that the group's channels run through.
    """
    table, units = analysis.table, analysis.units
    owners = {child: group.id for group in units.groups for child in group.children if units.groups[child].covered}
    roles: dict[int, Counter[tuple[str, bool, int, tuple[int, ...], int]]] = {}
    of_label: dict[int, tuple[object, list[int]]] = {}
    for node in analysis.graph.nodes:
        places = [(n, False, i) for i, n in enumerate(node.inputs)] + [(n, True, i) for i, n in enumerate(node.outputs)]
        for name, is_output, position in places:
            for label in table.get(name) if name else ():
                if id(label) not in of_label:
                    numbers = np.unique(units.group_of[units.component[label.ids]])
                    of_label[id(label)] = label, numbers[numbers >= 0].tolist()
                role = (node.op, is_output, position, label.axes, label.pack)
                for number in {owners.get(n, n) for n in of_label[id(label)][1]}:
                    roles.setdefault(number, Counter())[role] += 1
    return {g.id: (g.kind, frozenset(roles.get(g.id, Counter()).items())) for g in groups}
