"""Tensors that a recovery can compare between the original and the pruned model, and branch coverage of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.survivors import Survivors
from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph
from onnxprune.io import markers
from onnxprune.io.subgraphs import Inner, Size, hidden_tensors
from onnxprune.io.weights import Weight
from onnxprune.pipeline import Context, Model
from onnxprune.recovery.targets import RecoveryTarget
from onnxprune.runtime.capture import BranchAssignment, runs_bodies, runs_node
from onnxprune.runtime.sessions import Array

Get = Callable[[str, int], Array]


def comparable_tensors(context: Context, model: Model) -> Iterator[str]:
    """Activations of the original whose values can be had, and which the model that was pruned has too."""
    full, graph = context.analysis.graph, model.analysis.graph
    unseen = hidden_tensors(full.proto, inside(model.analysis))
    for node in full.nodes:
        # Shapes of factorized layers in Loops are unknown.
        if not (model.is_factorized and markers.repeating(full.around[node.index]) is not None):
            outputs = (o for o in node.outputs if o in graph.producer and o not in unseen)
            yield from (o for o in outputs if not model.plan.experts or _has_its_size(context, model, o))


def _has_its_size(context: Context, model: Model, name: str) -> bool:
    """Return whether a tensor has the original's size: fewer experts have fewer scores, and get other tokens."""
    pairs = zip(context.analysis.facts.probes, model.analysis.facts.probes, strict=False)
    shapes = [(one.shapes.get(name), other.shapes.get(name)) for one, other in pairs]
    return all(one is not None and None not in one and one == other for one, other in shapes)


def inside(analysis: Analysis, now: Callable[[str], Any] | None = None) -> dict[str, Inner]:
    """Return types, ranks and sizes of the tensors inside of bodies.

    Args:
        analysis: analysis of the model.
        now: function that returns the shape of a tensor at the first probe in the model that is run; None: that model
            is the analysed one.
    """
    probe = analysis.facts.probes[0]
    return {
        n: Inner(probe.dtypes.get(n, 1), len(probe.shapes.get(n) or ()), _sizes(analysis.facts, n, now))
        for n in analysis.graph.inner
    }


def _sizes(facts: Facts, name: str, now: Callable[[str], Any] | None) -> tuple[Size, ...] | None:
    """Return every size of a tensor as a number or as a multiple of an input's; None where one is neither."""
    shapes = [p.shapes.get(name) for p in facts.probes]
    current = shapes[0] if now is None else now(name)
    if current is None or any(s is None or None in s or len(s) != len(current) for s in shapes):
        return None
    sizes: list[Size] = []
    for axis, size in enumerate(current):
        axis_sizes = [0 if s is None else s[axis] for s in shapes]
        one = size if len(set(axis_sizes)) == 1 else _of_input(facts, axis_sizes) if size == axis_sizes[0] else None
        if one is None:
            return None
        sizes.append(one)
    return tuple(sizes)


def _of_input(facts: Facts, sizes: list[int]) -> Size | None:
    """Return the size of an input of which these sizes, one per probe, are a multiple."""
    for source, shape in facts.probes[0].inputs.items():
        for axis, size in enumerate(shape):
            factor = sizes[0] // size if size else 0
            if all(n == factor * p.inputs[source][axis] for n, p in zip(sizes, facts.probes, strict=True)):
                return source, axis, factor
    return None


def can_follow(analysis: Analysis, after: Survivors, name: str) -> bool:
    """Return whether survivors have the same positions at any batch size: not where heads and samples share an axis."""
    for axis, index in after.steps(name):
        axes = {axis} if index.ndim == 1 else {axis, *(a for a, n in enumerate(index.shape) if n > 1)}
        if any(analysis.facts.varies(name, a) for a in axes):
            return False
    return True


def survivors(full: Get, after: Survivors, name: str, batch: int) -> Array:
    """Return the surviving channels of a tensor of the original."""
    value = full(name, batch)
    for axis, index in after.steps(name):
        value = value.take(index, axis=axis) if index.ndim == 1 else np.take_along_axis(value, index, axis=axis)
    return value


# -- branches that the data come to ------------------------------------------------------------------------------------


UNREACHED = "no calibration sample takes"
"""Prefix of the reason of every layer in a branch that no sample takes."""
NEVER = f"{UNREACHED} the branch around it"


def untaken(graph: Graph, branches: Sequence[BranchAssignment], target: RecoveryTarget) -> str:
    """Return the reason of a layer that runs on no batch; empty for others."""
    if any(runs_node(graph, target.node.index, way) for way in branches):
        return ""
    around = graph.around[target.node.index]
    branch = next(
        k for k in range(len(around)) if not any(runs_bodies(graph, around[: k + 1], way) for way in branches)
    )
    node, side = graph.nodes[around[branch].start], around[branch].side
    which = "then" if side else "else"
    return f"{UNREACHED} the {which}-branch of If {node.label!r}, which it lies in"


def of_iterations(get: Get, where: Sequence[tuple[str, bool]], weights: Mapping[str, Weight]) -> Get:
    """Return a function that joins the values of all iterations in which the conditions hold.

    Args:
        get: function that returns the value of a tensor for a batch, iterations along the first axis.
        where: pairs of a condition and its required value.
        weights: constants of the model, by name.
    """

    def selected(name: str, batch: int) -> Array:
        value = get(name, batch)
        counts = np.ones(len(value), bool)
        for condition, required in where:
            values = weights[condition].read() if condition in weights else get(condition, batch)
            # Iterations follow one another: each condition stands for as many rows.
            counts &= np.repeat(values.ravel() == required, len(value) // max(values.size, 1))
        return value[counts]

    return selected
