"""Trainings between the steps of a pruning or a sparsification: weights chosen so far stay at 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.io.write import assemble
from onnxprune.passes.regularize import weight_role
from onnxprune.pipeline import Context, Model, Pass, apply
from onnxprune.report.facts import Finetuning


def train_pruned(
    context: Context, model: Model, analysis: Analysis, removed: NDArray[np.bool_], passes: Sequence[Pass]
) -> tuple[Analysis, list[Finetuning]]:
    """Run passes on a model whose removed channels are 0, at its full size; their weights stay 0.

    Args:
        context: the run.
        model: the model.
        analysis: its analysis.
        removed: mask over atoms [atoms].
        passes: passes to run.

    Returns:
        the analysis of the trained model, and facts of the trainings.
    """
    zeroed = _zeroed(analysis, removed)
    loaded = analysis.loaded
    parts = loaded.proto, {**loaded.weights, **zeroed}
    trained, facts = run_between(context, model.with_parts(parts, locked=model.locked | zeroed.keys()), passes)
    new = Analysis(
        assemble(*trained.parts),
        approximate=analysis.approximate,
        input_shapes=context.input_shapes,
        resizing=context.analysis.resizing,
    )
    return new, facts


def run_between(context: Context, model: Model, passes: Sequence[Pass]) -> tuple[Model, list[Finetuning]]:
    """Run passes, and return the model behind them with the facts of all trainings."""
    facts: list[Finetuning] = []
    for stage in passes:
        if context.stages.interrupted:
            break
        result = apply(stage, context, model)
        model = result.model
        facts += [fact for fact in result.facts if isinstance(fact, Finetuning)]
    return model, facts


def describe_between(facts: Sequence[Finetuning]) -> dict[str, object]:
    """Return the trainings between steps for the settings of a report: steps, and points before and after."""
    points = [(f.steps, f.before.points, f.after.points) for f in facts]
    return {"trained_between": [{"steps": n, "before": a, "after": b} for n, a, b in points]} if facts else {}


def _zeroed(analysis: Analysis, removed: NDArray[np.bool_]) -> dict[str, Weight]:
    """Return the weights in which removed channels are 0: those of layers, scales and addends."""
    graph, stored = analysis.graph, analysis.loaded.weights
    result: dict[str, Weight] = {}
    for name in analysis.table.items():
        source = analysis.copies.get(name, name)
        if name not in graph.weights or source not in stored or graph.weights[name].dtype.kind != "f":
            continue
        shape = graph.weights[name].shape
        values = None
        for label in analysis.table.get(name):
            readers = graph.consumers.get(name, ())
            is_known = all(weight_role(analysis, node, i, shape, label.axes) for node, i in readers)
            mask = label.of(removed)
            if not is_known or not mask.any() or stored[source].shape != shape:
                continue
            before = stored[source].read() if values is None else values
            values = np.where(mask, before.dtype.type(0), before)
        if values is not None:
            result[source] = ArrayWeight(source, values)
    return result
