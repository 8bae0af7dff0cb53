"""Caches of a model: outputs that are an input with more positions, as keys and values of a decoder are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxprune.graph.view import Graph
from onnxprune.operators.registry import Move, rule_of

# Moves that a cache may take on its way from the input to the output.
_MOVES = (Move.SAME, Move.CAST, Move.SHAPE, Move.ORDER, Move.SELECT)


@dataclass(frozen=True, slots=True)
class Cache:
    """An input of the model, and the output that is its next value."""

    past: str
    present: str

    @property
    def names(self) -> tuple[str, str]:
        """Input and output."""
        return self.past, self.present


def find_caches(graph: Graph) -> list[Cache]:
    """Return the caches in the order of the outputs.

    The output comes from a concatenation with the input, a scatter into it, or an operator that appends to a cache;
    both may be moved, cast or coded besides.
    """
    pairs = ((_past_of(graph, name), name) for name in graph.outputs)
    return [Cache(past, present) for past, present in pairs if past is not None]


def _past_of(graph: Graph, name: str) -> str | None:
    """Return the input that an output is the next value of; None where there is none, or several."""
    grows = False
    while True:
        node = graph.producer.get(name)
        if node is None:
            return name if grows and name in graph.inputs else None
        rule, output = rule_of(node), list(node.outputs).index(name)
        pasts = [i for i, o in rule.caches if o == output and i < len(node.inputs) and node.inputs[i]]
        if pasts:
            name, grows = node.inputs[pasts[0]], True
        elif rule.moves is Move.JOIN:
            inputs = {source for source in node.inputs if source for source in _moved_inputs(graph, source)}
            return inputs.pop() if len(inputs) == 1 else None
        elif rule.moves in _MOVES or rule.encodes or rule.decodes:
            name = node.inputs[0]
        else:
            return None


def _moved_inputs(graph: Graph, name: str) -> Iterator[str]:
    """Yield the input of the model that a tensor is, moved, cast or coded at most."""
    node = graph.producer.get(name)
    while node is not None:
        rule = rule_of(node)
        if not (rule.moves in _MOVES or rule.encodes or rule.decodes):
            return
        name = node.inputs[0]
        node = graph.producer.get(name)
    if name in graph.inputs:
        yield name
