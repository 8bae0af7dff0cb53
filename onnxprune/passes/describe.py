"""What a cut did to a model, for the report: layers, sums, groups, barriers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis, GroupView
from onnxprune.model.weights import Weight
from onnxprune.passes.select import Selector
from onnxprune.passes.state import State
from onnxprune.rewrite.after import After


def fill_report(
    analysis: Analysis,
    removed: NDArray[np.bool_],
    weights: Mapping[str, Weight],
    state: State,
    selector: Selector | None = None,
) -> None:
    """Fill the report of a cut; ``selector`` chose the units, None where a plan did."""
    after = After(analysis.table, removed)
    report = state.report
    asked = {} if selector is None else selector.asked
    kept = {} if selector is None else selector.kept

    def size(name: str) -> int:
        return int(np.prod(after.shape(name) or (), dtype=np.int64))

    report.layers = analysis.layer_facts(after.shape, size)
    report.barriers = [asdict(b) for b in analysis.barriers]
    taken = {g.id: len(g.removed or ()) for g in state.plan.groups}
    report.groups = [_group_facts(g, taken.get(g.id, 0), asked.get(g.id)) for g in analysis.groups]
    for facts in report.groups:
        facts["reason"] = facts["reason"] or kept.get(facts["id"], "")
    excluded = {n.label for i, ratio in asked.items() if ratio is None for n in analysis.producers.get(i, ())}
    reasons = dict.fromkeys(excluded, "excluded: by --exclude, or not among --include")
    reasons |= {n.label: why for i, why in kept.items() for n in analysis.producers.get(i, ())}
    for layer in report.layers:
        if layer.name in reasons and layer.channels_after == layer.channels_before:
            layer.reason = reasons[layer.name]
    if selector is not None:
        report.warnings += selector.warnings
    totals = report.totals
    totals.params_before = state.original.parameters
    totals.params_after = sum(int(np.prod(w.shape)) for w in weights.values())
    totals.macs_before = sum(x.macs_before for x in state.original.layers)
    totals.macs_after = sum(x.macs_after for x in report.layers)
    approximate = sum(1 for g in analysis.units.groups if not g.exact and taken.get(g.id))
    if approximate:
        what = "1 group was" if approximate == 1 else f"{approximate} groups were"
        report.warnings.append(f"{what} cut through a normalisation (--approximate): not exact there.")


def _group_facts(group: GroupView, removed: int, asked: float | None) -> dict[str, Any]:
    """One group as plain data. Spelled out, since dataclasses.asdict copies deeply and groups have many slots."""
    slots = [{"tensor": s.tensor, "axis": s.axis, "size": s.size} for s in group.slots]
    facts = {f.name: getattr(group, f.name) for f in fields(group)}
    return {**facts, "slots": slots, "removed": removed, "asked": asked}
