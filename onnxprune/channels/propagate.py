"""Push labels through a graph, node by node, with one rule per operator."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from onnxprune.graph.caches import Cache, find_caches
from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node
from onnxprune.labels.algebra import broadcast
from onnxprune.labels.atoms import Atoms, Reason
from onnxprune.labels.label import covering
from onnxprune.operators.context import Opened, Step, Table, without_axis
from onnxprune.operators.registry import NoRule, lookup

# A rule that raises is a bug; users still get a correct model because the node is frozen. Tests set this to
# see the bug.
STRICT = bool(os.environ.get("ONNXPRUNE_STRICT"))


def push_labels(
    graph: Graph,
    facts: Facts,
    *,
    approximate: bool = False,
    resizable: Collection[str] = frozenset(),
    opened: Opened | None = None,
) -> Table:
    """Compute labels of every tensor, and the ledger of united and frozen atoms.

    Args:
        graph: the model's view.
        facts: shapes and values at the probe sizes.
        approximate: let labels through normalisations that stay defined over fewer channels.
        resizable: names of inputs and outputs that may lose channels.
        opened: tables and outputs that may lose tokens; None: none.
    """
    caches = [c for c in find_caches(graph) if c.past in resizable and c.present in resizable] if resizable else []
    spans = _spans_of_inputs(graph, facts, approximate, resizable, caches) if resizable else {}
    table = _pushed(Table(graph, facts, Atoms(), approximate, spans, opened))
    for axes in table.opened.tied:
        _tie_axes(table, axes)
    for name in graph.outputs:
        if name not in resizable:
            _freeze(table, name, Reason.GRAPH_OUTPUT, "a graph output keeps its shape")
    for cache in caches:
        _tie(table, cache)
    for name in sorted(graph.captured):
        if name in graph.producer or name in graph.weights:
            _freeze(table, name, Reason.CAPTURED_BY_SUBGRAPH, f"the body of a control-flow node reads {name!r}")
    return table


def _tie_axes(table: Table, axes: Sequence[tuple[str, int]]) -> None:
    """Unite the positions of some axes; where one of them has none, the others keep their size."""
    labels = [covering(table.get(name), axis) for name, axis in axes]
    plain = [label for label in labels if label is not None and not label.is_grid]
    why = table.atoms.barrier(Reason.UNLABELLED_OPERAND, axes[0][0], "", "positions of another tensor are the same")
    for label in plain:
        if len(plain) < len(axes) or label.ids.size != plain[0].ids.size:
            table.atoms.freeze(label.ids, why)
        else:
            table.atoms.unite(plain[0].ids.ravel(), label.ids.ravel())


def _pushed(table: Table) -> Table:
    for node in table.graph.steps:
        _push(node, table)
    return table


_Spans = dict[str, list[tuple[tuple[int, ...], int]]]


def _spans_of_inputs(
    graph: Graph, facts: Facts, approximate: bool, resizable: Collection[str], caches: Sequence[Cache]
) -> _Spans:
    """Return axes and pack axis of each label that inputs are born with, by input.

    An axis of a size that is known is labelled by itself. A cache is labelled like the tensor that is appended to it: a
    head may lose channels of its own. The labels of a model whose inputs have none show how.
    """
    declared = {spec.name: spec.shape for spec in facts.settler.dimensions.specs}
    by_axis = {
        name: [axis for axis in _known_axes(facts, name) if isinstance(declared.get(name, ())[axis], int)]
        for name in graph.inputs
        if name in resizable
    }
    spans: _Spans = {name: [((axis,), axis) for axis in axes] for name, axes in by_axis.items()}
    if caches:
        plain = _pushed(Table(graph, facts, Atoms(), approximate))
        for cache in caches:
            labels = plain.get(cache.present)
            axes = set(by_axis[cache.past]) & set(_known_axes(facts, cache.present))
            if labels and all(axes.issuperset(label.axes) for label in labels):
                spans[cache.past] = [(label.axes, label.pack) for label in labels]
    return {**{name: [] for name in resizable}, **spans}


def _known_axes(facts: Facts, name: str) -> list[int]:
    """Return the axes of more than one position whose size is the same at every probe."""
    shape = facts.shape(name) or ()
    return [axis for axis, n in enumerate(shape) if n is not None and n > 1 and not facts.varies(name, axis)]


def _tie(table: Table, cache: Cache) -> None:
    """Tie the channels of both halves of a cache, position by position: the output is fed back as the input."""
    shapes = [table.facts.shape(name) for name in cache.names]
    why = table.atoms.barrier(
        Reason.CACHE, cache.present, "", f"the cache {cache.past!r} and {cache.present!r} differ here"
    )
    if None in shapes or len(shapes[0]) != len(shapes[1]):
        for name in cache.names:
            for label in table.get(name):
                table.atoms.freeze(label.ids, why)
        return
    shape = tuple(n if n == m else 1 for n, m in zip(*shapes, strict=True))
    operands = []
    for name in cache.names:
        labels = table.get(name)
        for axis in (a for a, (n, m) in enumerate(zip(*shapes, strict=True)) if n != m):
            labels = without_axis(table.atoms, labels, axis, why)
        operands.append((labels, shape))
    broadcast(table.atoms, operands, len(shape), lambda code, detail: why)


def infer_by_rule(node: Node, shapes: list[Any], values: list[Any]) -> list[Any] | None:
    """Return shapes of a node's outputs by its rule: a callback for :func:`onnxprune.graph.facts.study`."""
    try:
        return lookup(node.domain, node.op, node.version).infer(node, shapes, values)
    except Exception:
        if STRICT:
            raise
        return None


def _push(node: Node, table: Table) -> None:
    rule = lookup(node.domain, node.op, node.version)
    for name in node.inputs:
        if name and table.get(name):
            break
    else:
        if not rule.makes_labels:
            return
    step = Step(node, table)
    if isinstance(rule, NoRule):
        domain = node.domain or "ai.onnx"
        _freeze_inputs(step, Reason.NO_RULE, f"no rule for {domain}.{node.op} (opset {node.version})")
        return
    shapes = table.facts.probes[0].shapes
    for name in () if rule.shapeless else (*node.inputs, *node.outputs):
        if name and shapes.get(name) is None:
            _freeze_inputs(step, Reason.DYNAMIC_SHAPE, f"the shape of a tensor at {node.op} is not known")
            return
    try:
        rule.propagate(step)
    except Exception as error:
        if STRICT:
            raise
        _freeze_inputs(step, Reason.UNSUPPORTED_FORM, f"{type(error).__name__}: {error}")
        for name in node.outputs:
            if name:
                table.set(name, ())
    step.finish(rule.operands)


def _freeze_inputs(step: Step, code: str, detail: str) -> None:
    for i in range(len(step.node.inputs)):
        step.freeze(step.labels(i), code, detail)


def _freeze(table: Table, name: str, code: str, detail: str) -> None:
    producer = table.graph.producer.get(name)
    op = producer.op if producer is not None else ""
    why = table.atoms.barrier(code, name, op, detail)
    for label in table.get(name):
        if code == Reason.GRAPH_OUTPUT and name in table.opened.outputs and label.axes == (label.ids.ndim - 1,):
            continue
        table.atoms.freeze(label.ids, why)
