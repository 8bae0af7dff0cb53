"""Weights that a single operator reads: such a rule may state their labels itself, finer than one label per axis."""

from __future__ import annotations

from onnxprune.graph.view import Node
from onnxprune.labels.label import Label
from onnxprune.operators.context import Step
from onnxprune.operators.registry import Move, rule_of


def owned(step: Step, i: int, axes: tuple[int, ...]) -> list[str] | None:
    """Names from input ``i`` back to its initializer or constant fill, all read by this node alone, else None.

    A dequantisation whose scales vary along one of ``axes`` ties positions of its own and ends the search.
    """
    graph = step.table.graph
    name: str | None = step.node.inputs[i] if step.has(i) else None
    chain = []
    reader: Node | None = step.node
    while name is not None and name not in graph.outputs and all(n is reader for n, _ in graph.consumers.get(name, ())):
        chain.append(name)
        producer = graph.producer.get(name)
        if name in graph.weights or (producer is not None and producer.op == "ConstantOfShape"):
            return None if name in graph.captured else chain
        reader = producer
        name = producer.inputs[0] if producer is not None and _passes(step, producer, axes) else None
    return None


def _passes(step: Step, node: Node, axes: tuple[int, ...]) -> bool:
    rule = rule_of(node)
    if not rule.decodes:
        return rule.moves in (Move.SAME, Move.CAST)
    rank = len(step.table.facts.shape(node.inputs[0]) or ())
    scale = step.table.facts.shape(node.inputs[1])
    if scale is None or len(scale) > 1:
        return False
    return sum(scale) <= 1 or int(node.attrs.get("axis", 1)) % rank not in axes


def override(step: Step, chain: list[str], labels: tuple[Label, ...], axes: tuple[int, ...]) -> None:
    """State ``labels`` for every tensor of a chain in place of what it has on ``axes``."""
    for link in chain:
        rest = tuple(x for x in step.table.get(link) if not set(x.axes) & set(axes))
        step.table.set(link, (*rest, *labels))
