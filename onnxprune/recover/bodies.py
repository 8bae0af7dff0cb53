"""Layers inside of bodies: when they can be repaired, and in which order with what lies around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from onnxprune.contractions import Form
from onnxprune.graph.view import Graph, Node
from onnxprune.model import markers
from onnxprune.recover.scales import Scale
from onnxprune.recover.tails import Tail

_UNSEEN = "it lies in a branch of an If, which need not run for every input"
_OUTSIDE = "it lies in a body and reads what lies outside: one value for all iterations"
_ACROSS = "it lies in a body, and the first axis of what it reads or gives does not count samples"


class Bodies:
    """What a layer in a body is fitted to is the original's input as it survives: what the cut model feeds it depends,
    by way of the states, on what the layer itself gave before, and a fit to that drifts away.

    The order of repairs where a node with bodies runs as one: behind all that it reads, ahead of all it gives.

    Args:
        graph: of the cut model. level: of every tensor so far, filled meanwhile.
    """

    def __init__(self, graph: Graph, level: Mapping[str, int]) -> None:
        self._graph, self._level = graph, level
        self._homes = graph.homes if graph.has_bodies else []
        self._least: dict[int, int] = {}
        self._most: dict[int, int] = {}

    def least(self, node: Node) -> int:
        """The level of everything that the outermost node with bodies around ``node`` reads."""
        start = self._start(node)
        if start is None:
            return 0
        if start not in self._least:
            self._least[start] = max((self._level.get(n, 0) for n in self._read(start)), default=0)
        if self._leaves(node):
            return max(self._least[start], self._most.get(start, 0))
        return self._least[start]

    def note(self, node: Node, reach: int) -> None:
        """The level that ``node`` got."""
        start = self._start(node)
        if start is not None:
            self._most[start] = max(self._most.get(start, 0), reach)

    def refusal(self, node: Node, form: Form, known: Collection[str], shape: Callable[[str], Any]) -> str:
        """Why a layer cannot be repaired where it lies; empty where it can."""
        if not self.encloses(node):
            return ""
        data, result = node.inputs[form.data], node.outputs[0]
        if result not in known:
            return _UNSEEN
        if data not in known or not self.together(node, [data]):
            return _OUTSIDE
        rank = len(shape(result) or ())
        across = rank < 2 or isinstance(form, Scale) or 0 in form.axes or form.output_axis(rank) == 0
        return _ACROSS if across else ""

    def encloses(self, node: Node) -> bool:
        """Whether a node lies in a body."""
        return bool(self._homes) and self._homes[node.index] >= 0

    def may_follow(self, node: Node, tail: Tail) -> bool:
        """Whether a layer may be aimed there: not outside its body, and not at a sum with what the cut left there."""
        return not self.encloses(node) or (not tail.addends and self.together(node, [tail.aim]))

    def together(self, node: Node, names: Iterable[str]) -> bool:
        """Whether tensors have one value for every time that ``node`` runs."""
        return not self._homes or all(self._home(name) == self._homes[node.index] for name in names)

    def _home(self, name: str) -> int:
        producer = self._graph.producer.get(name)
        if producer is None:
            return -1
        if producer.op == markers.OPEN:
            return producer.index
        return self._homes[producer.index]

    def _start(self, node: Node) -> int | None:
        """What begins the outermost node with bodies around ``node``, or the one that it is a marker of."""
        if not self._homes:
            return None
        index = node.index
        while self._homes[index] >= 0:
            index = self._homes[index]
        found = self._graph.nodes[index]
        if found.domain != markers.DOMAIN:
            return None
        while found.op != markers.OPEN or self._homes[found.index] >= 0:
            found = self._graph.nodes[found.index - 1]
        return found.index

    def _leaves(self, node: Node) -> bool:
        return node.op in markers.RESULTS and self._homes[node.index] < 0

    def _read(self, start: int) -> Iterable[str]:
        depth = 0
        for node in self._graph.nodes[start:]:
            yield from node.inputs
            depth += (node.op == markers.OPEN) - (node.op == markers.CLOSE)
            if not depth:
                return
