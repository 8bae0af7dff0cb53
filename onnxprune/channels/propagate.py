"""Push labels through a graph, node by node, with one rule per operator."""

from __future__ import annotations

import os
from typing import Any

from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node
from onnxprune.labels.atoms import Atoms, Reason
from onnxprune.operators.context import Step, Table
from onnxprune.operators.registry import NoRule, lookup

# A rule that raises is a bug; users still get a correct model because the node is frozen. Tests set this to
# see the bug.
STRICT = bool(os.environ.get("ONNXPRUNE_STRICT"))


def push_labels(graph: Graph, facts: Facts, *, approximate: bool = False) -> Table:
    """Compute labels of every tensor, and the ledger of united and frozen atoms.

    Args:
        graph: the model's view.
        facts: shapes and values at the probe sizes.
        approximate: let labels through normalisations that stay defined over fewer channels.
    """
    table = Table(graph, facts, Atoms(), approximate)
    for node in graph.steps:
        _push(node, table)
    for name in graph.outputs:
        _freeze(table, name, Reason.GRAPH_OUTPUT, "a graph output keeps its shape")
    for name in sorted(graph.captured):
        if name in graph.producer or name in graph.weights:
            _freeze(table, name, Reason.CAPTURED_BY_SUBGRAPH, f"the body of a control-flow node reads {name!r}")
    return table


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
        table.atoms.freeze(label.ids, why)
