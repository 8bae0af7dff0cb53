"""What a removal of channels did to a model, as facts: layers, sums, groups, barriers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from onnxprune.analysis import Analysis, GroupView
from onnxprune.passes.select import Selector
from onnxprune.pipeline import Context, Model
from onnxprune.report.facts import Fact, LayerFacts, Pruned, Remark, Sizes
from onnxprune.rewrite.after import After


def describe_removal(context: Context, model: Model, selector: Selector | None = None) -> Iterable[Fact]:
    """Facts about what was removed.

    Args:
        context: the run. model: pruned, with its plan. selector: chose the units; None where a plan did.
    """
    analysis, original = model.analysis, context.analysis
    num_removed = {g.id: len(g.removed or ()) for g in model.plan.groups}
    layers = _layer_facts(model, selector)
    ratios = {} if selector is None else selector.asked
    whole = {} if selector is None else selector.kept
    groups = [_group_facts(g, num_removed.get(g.id, 0), ratios.get(g.id)) for g in analysis.groups]
    for group in groups:
        group["reason"] = group["reason"] or whole.get(group["id"], "")
    yield Pruned(layers, groups, [asdict(b) for b in analysis.barriers])
    yield Sizes(
        params_before=original.parameters,
        params_after=model.num_parameters,
        macs_before=sum(x.macs_before for x in original.layers),
        macs_after=sum(x.macs_after for x in layers),
    )
    if selector is not None:
        yield from map(Remark, selector.warnings)
    approximate = sum(1 for g in analysis.units.groups if not g.exact and num_removed.get(g.id))
    if approximate:
        what = "1 group was" if approximate == 1 else f"{approximate} groups were"
        yield Remark(f"{what} cut through a normalisation (--approximate): not exact there.")


def _layer_facts(model: Model, selector: Selector | None) -> list[LayerFacts]:
    """Every layer before and after, with the reason why it was not touched."""
    analysis = model.analysis
    after = After(analysis.table, model.removal)

    def size(name: str) -> int:
        return int(np.prod(after.shape(name) or (), dtype=np.int64))

    layers = analysis.layer_facts(after.shape, size)
    if selector is not None:
        reasons = _reasons(analysis, selector)
        for layer in layers:
            if layer.name in reasons and layer.channels_after == layer.channels_before:
                layer.reason = reasons[layer.name]
    return layers


def _reasons(analysis: Analysis, selector: Selector) -> dict[str, str]:
    """Why layers were left out of the choice, by their names."""
    excluded = {n.label for i, ratio in selector.asked.items() if ratio is None for n in analysis.producers.get(i, ())}
    reasons = dict.fromkeys(excluded, "excluded: by --exclude, or not among --include")
    return reasons | {n.label: why for i, why in selector.kept.items() for n in analysis.producers.get(i, ())}


def _group_facts(group: GroupView, removed: int, asked: float | None) -> dict[str, Any]:
    """One group as plain data. Spelled out, since dataclasses.asdict copies deeply and groups have many slots."""
    slots = [{"tensor": s.tensor, "axis": s.axis, "size": s.size} for s in group.slots]
    facts = {f.name: getattr(group, f.name) for f in fields(group)}
    return {**facts, "slots": slots, "removed": removed, "asked": asked}
