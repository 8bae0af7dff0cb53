"""Where a model's time goes, told from its latency table: nodes as they are and with fewer channels, and the steps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune.budget.latency import Latency, Places, surfaces
from onnxprune.budget.sizes import Counts, Sizes
from onnxprune.budget.table import LatencyTable
from onnxprune.graph.view import Node
from onnxprune.report.facts import SHARES, KindSteps, NodeTime, Profile
from onnxprune.search.timing import block_levels

# Kinds of nodes whose steps are shown, and levels of each.
_KINDS, _LEVELS = 4, 16


@dataclass(frozen=True, slots=True)
class Profiled:
    """What a profile found: ``facts`` to read, ``table`` to reckon with."""

    facts: Profile
    table: LatencyTable

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, for ``--latency-table``.

        Raises:
            UsageError: the file cannot be written.
        """
        self.table.save(path)


def profiled(sizes: Sizes, table: LatencyTable, model: str) -> Profile:
    """The facts of a table, in milliseconds."""
    places = Places(sizes)
    latency = Latency(places, table)
    whole = latency.of_nodes(sizes.steps)
    parts = [latency.of_nodes(_alike(sizes, share)) for share in SHARES]
    nodes = [
        NodeTime(n.label, n.kind, 1e3 * whole[n.label], [1e3 * part[n.label] for part in parts])
        for n in places.nodes
        if whole.get(n.label)
    ]
    nodes.sort(key=lambda node: -node.ms)
    checks = [(1e3 * p, 1e3 * m) for p, m in table.checks]
    steps = _steps(places, table, whole)
    return Profile(model, table.device, table.inputs, 1e3 * table.seconds, table.error, checks, nodes, steps)


def _alike(sizes: Sizes, share: float) -> Counts:
    """Counts [groups]: of every group the measured level nearest to the share."""
    levels = [block_levels(int(s)) for s in sizes.steps]
    return np.array([x[np.argmin(np.abs(x - share * s))] for x, s in zip(levels, sizes.steps, strict=True)])


def _steps(places: Places, table: LatencyTable, whole: dict[str, float]) -> list[KindSteps]:
    """The kinds that take most time in all, by the channels that they read and make."""
    kinds: dict[str, list[Node]] = defaultdict(list)
    for node in places.moving:
        kinds[places.kinds[node.label]].append(node)
    dearest = sorted(kinds, key=lambda k: -sum(whole.get(n.label, 0.0) for n in kinds[k]))[:_KINDS]
    found, shape = [], places.sizes.analysis.facts.shape
    for kind in dearest:
        surface = surfaces(places, [s for s in table.samples if places.kinds.get(s.node) == kind]).get(kind)
        if surface is None:
            continue
        reads, makes = (int(n) for n in places.channels(kinds[kind][0], shape))
        for by, held in (("reads", surface.reads), ("makes", surface.makes)):
            levels = _some(np.rint(np.exp(held)).astype(np.int64))
            same = np.full(levels.size, makes if by == "reads" else reads)
            ms = 1e3 * (surface.at(levels, same) if by == "reads" else surface.at(same, levels))
            if levels.size > 1:
                found.append(KindSteps(kinds[kind][0].op, len(kinds[kind]), by, levels.tolist(), ms.tolist()))
    return found


def _some(levels: Counts) -> Counts:
    """So many of the levels, evenly."""
    return np.asarray(levels[np.unique(np.linspace(0, levels.size - 1, _LEVELS).round().astype(int))])
