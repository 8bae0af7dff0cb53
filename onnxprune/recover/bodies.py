"""Layers inside of bodies: when they can be repaired, and in which order with what lies around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from onnxprune.contractions import Form, Scale
from onnxprune.graph.view import Graph, Node
from onnxprune.model import markers
from onnxprune.recover.tails import InvertiblePath

_UNSEEN = "it lies in an If within a Loop or Scan, and the size of what it gives is not known where that is not taken"
_OUTSIDE = "it lies in a body and reads what lies outside: one value for all iterations"
_ACROSS = "it lies in a body, and the first axis of what it reads or gives does not count samples"


class Bodies:
    """What a layer in a Loop or Scan is fitted to is the original's input as it survives: what the cut model feeds it
    depends, by way of the states, on what the layer itself gave before, and a fit to that drifts away.

    The order of repairs where a Loop or Scan runs as one: behind all that it reads, ahead of all it gives. What lies in
    the branch of an If is like any other layer, fitted to the samples that take the branch.

    Args:
        graph: of the cut graph. level: of every tensor so far, filled meanwhile.
    """

    def __init__(self, graph: Graph, level: Mapping[str, int]) -> None:
        self._graph, self._level = graph, level
        self._around = graph.around if graph.has_bodies else []
        self._given = {*graph.inputs, *graph.weights} if graph.has_bodies else set[str]()
        self._least: dict[int, int] = {}
        self._most: dict[int, int] = {}

    def least(self, node: Node) -> int:
        """The level of everything that the outermost Loop or Scan around ``node`` reads."""
        start = self._start(node)
        if start is None:
            return 0
        if start not in self._least:
            self._least[start] = max((self._level.get(n, 0) for n in self._read(start)), default=0)
        if node.marker in markers.RESULTS and not self.encloses(node):
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
        conditions = (name for name, _ in self.where(node))
        if result not in known or not all(name in known or name in self._given for name in conditions):
            return _UNSEEN
        # What lies around the node's branches has a value for every time that these are asked for.
        home = self._home(data)
        if data not in known or any(body.kind != "If" for body in self._own(node)[len(home) :]) or not home:
            return _OUTSIDE
        rank = len(shape(result) or ())
        across = rank < 2 or isinstance(form, Scale) or 0 in form.axes or form.output_axis(rank) == 0
        return _ACROSS if across else ""

    def encloses(self, node: Node) -> bool:
        """Whether a node lies in a Loop or Scan."""
        return bool(self._around) and markers.repeating(self._around[node.index]) is not None

    def may_follow(self, node: Node, tail: InvertiblePath) -> bool:
        """Whether a layer may be aimed there: not into or out of a Loop or Scan, nor in one at a sum with what the cut
        left there."""
        if not self._around:
            return True
        return self.together(node, [tail.aim]) and not (tail.addends and self.encloses(node))

    def where(self, node: Node) -> tuple[tuple[str, bool], ...]:
        """What has to hold for a node in a Loop or Scan to run in an iteration: (tensor, value)."""
        inner = [body for body in self._own(node) if body.kind == "If"]
        return tuple((self._graph.nodes[body.start].inputs[0], body.side) for body in inner)

    def together(self, node: Node, names: Iterable[str]) -> bool:
        """Whether tensors have one value for every time that ``node`` runs."""
        return not self._around or all(self._home(name) == self._own(node) for name in names)

    def _own(self, node: Node) -> tuple[markers.Body, ...]:
        """The bodies that a node lies in, from the outermost Loop or Scan on."""
        return self._within(self._around[node.index]) if self._around else ()

    def _home(self, name: str) -> tuple[markers.Body, ...]:
        """The bodies that a tensor lies in, from the outermost Loop or Scan on."""
        producer = self._graph.producer.get(name)
        if producer is None:
            return ()
        around = self._around[producer.index]
        own = (markers.Body(producer.index, True, producer.kind),) if producer.marker == markers.OPEN else ()
        return self._within((*around, *own))

    @staticmethod
    def _within(around: tuple[markers.Body, ...]) -> tuple[markers.Body, ...]:
        first = markers.repeating(around)
        return () if first is None else around[first:]

    def _start(self, node: Node) -> int | None:
        """What begins the outermost Loop or Scan around ``node``, or the one that it is a marker of."""
        if not self._around:
            return None
        around = self._around[node.index]
        first = markers.repeating(around)
        if first is not None:
            return around[first].start
        if not node.marker or node.kind == "If":
            return None
        found = node
        while found.marker != markers.OPEN or self.encloses(found):
            found = self._graph.nodes[found.index - 1]
        return found.index

    def _read(self, start: int) -> Iterable[str]:
        outside = len(self._around[start])
        yield from self._graph.nodes[start].inputs
        for node in self._graph.nodes[start + 1 :]:
            yield from node.inputs
            if node.marker == markers.CLOSE and len(self._around[node.index]) == outside:
                return
