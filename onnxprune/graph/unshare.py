"""Exporters merge equal constants: a vector of ones or of zero points then serves layers that are otherwise unrelated.

A constant that holds one value everywhere may take any size, so every reader gets a copy of its own before labels are
pushed; copies that a cut leaves alone are joined again.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from onnxprune.graph.view import Graph
from onnxprune.model.constants import add_constant, has_bare_initializers
from onnxprune.model.weights import Weight

_LIMIT = 1 << 16


def unshare(graph: Graph) -> tuple[Graph, dict[str, str]]:
    """The graph with uniform constants unshared, and {copy: constant it was copied from}.

    Only initializers with more than one reader and at most 65,536 elements are looked at, and none of 64-bit integers:
    those are shapes and axes.
    """
    initializers = {t.name for t in graph.proto.graph.initializer}
    shared = [name for name in graph.weights if name in initializers and _is_shared(graph, name)]
    uniform = {name: graph.weights[name].read() for name in shared}
    uniform = {name: value for name, value in uniform.items() if (value == value.flat[0]).all()}
    if not uniform:
        return graph, {}
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    weights, copies = dict(graph.weights), dict[str, str]()
    changed = set[int]()
    for name, value in uniform.items():
        for number, (node, i) in enumerate(graph.consumers[name][1:], start=2):
            copy = f"{name}_use{number}"
            if copy in graph.weights or copy in graph.producer:
                continue
            proto.graph.node[node.index].input[i] = copy
            changed.add(node.index)
            add_constant(proto, weights, copy, value)
            copies[copy] = name
    return graph.altered(proto, weights, changed), copies


def _is_shared(graph: Graph, name: str) -> bool:
    weight = graph.weights[name]
    if len(graph.consumers.get(name, ())) < 2 or weight.dtype.kind not in "fViu" or weight.dtype == np.int64:
        return False
    if not 1 < math.prod(weight.shape) <= _LIMIT or name in graph.captured:
        return False
    return name not in graph.outputs and has_bare_initializers(graph.proto)


def rejoin(proto: onnx.ModelProto, weights: dict[str, Weight], copies: dict[str, str]) -> None:
    """Join what has the same size again after a cut; ``proto`` and ``weights`` change."""
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    back: dict[str, str] = {}
    for name in (*dict.fromkeys(copies.values()), *copies):
        if name in weights:
            kept = first.setdefault((copies.get(name, name), weights[name].shape), name)
            if kept != name:
                back[name] = kept
    if not back:
        return
    for node in proto.graph.node:
        if not back.keys().isdisjoint(node.input):
            for i, name in enumerate(node.input):
                if name in back:
                    node.input[i] = back[name]
    for k in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[k].name in back:
            del proto.graph.initializer[k]
    for copy in back:
        weights.pop(copy)
