"""Which layers of branches the data come to, and in which iterations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxprune.graph.view import Graph
from onnxprune.model.weights import Weight
from onnxprune.passes.outcome import UNREACHED
from onnxprune.recover.aims import Aim
from onnxprune.runtime.sessions import Array
from onnxprune.runtime.ways import Way, reaches, takes

Get = Callable[[str, int], Array]
NEVER = f"{UNREACHED} the branch that it lies in"


def untaken(graph: Graph, taken: Sequence[Way], aim: Aim) -> str:
    """Why a layer is left that no batch comes to; empty for others."""
    if any(takes(graph, aim.node.index, way) for way in taken):
        return ""
    around = graph.around[aim.node.index]
    branch = next(k for k in range(len(around)) if not any(reaches(graph, around[: k + 1], way) for way in taken))
    node, side = graph.nodes[around[branch].start], around[branch].side
    which = "then" if side else "else"
    return f"{UNREACHED} the {which}-branch of If {node.label!r}, which it lies in"


def of_iterations(get: Get, where: Sequence[tuple[str, bool]], weights: Mapping[str, Weight]) -> Get:
    """Values of all iterations, joined, without those in which a condition is not what it has to be.

    Args:
        where: (condition, value). weights: those that are constants.
    """

    def chosen(name: str, batch: int) -> Array:
        value = get(name, batch)
        counts = np.ones(len(value), bool)
        for condition, wanted in where:
            found = weights[condition].read() if condition in weights else get(condition, batch)
            # Iterations follow one another: each condition stands for as many rows.
            counts &= np.repeat(found.ravel() == wanted, len(value) // max(found.size, 1))
        return value[counts]

    return chosen
