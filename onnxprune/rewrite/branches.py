"""Every branch of a model made to run: conditions in place of those that inputs decide.

Inputs that are drawn take one branch of an If and may run a Loop no time at all; a cut has to be exact wherever other
inputs lead. In both models, the masked original and the cut one, the same conditions are constants then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node
from onnxprune.model import markers
from onnxprune.model.constants import add_constant
from onnxprune.model.weights import Weight

Model = tuple[onnx.ModelProto, Mapping[str, Weight]]
Way = Mapping[str, bool]
"""What holds at every node whose condition is open, by the mark that begins it: which branch, or that a Loop runs."""

# Trips of a Loop that nobody knows the number of, and ways through a model, at most.
_TRIPS, _MOST = 3, 16


@dataclass(frozen=True, slots=True)
class Undecided:
    """A node whose condition depends on the inputs. ``within``: the branches around it, {mark: taken}."""

    node: Node
    within: Way

    @property
    def mark(self) -> str:
        """What begins it."""
        return self.node.outputs[0]


def ways(found: Sequence[Undecided]) -> list[dict[str, bool]]:
    """Choices that together run every branch of these nodes, and every Loop."""
    left = {(o.mark, side) for o in found for side in ((True, False) if o.node.kind == "If" else (True,))}
    result: list[dict[str, bool]] = []
    while left and len(result) < _MOST:
        way: dict[str, bool] = {}
        for item in sorted(found, key=lambda o: -len(o.within)):  # what lies deepest says how to get there
            mark = item.mark
            sides = [s for s in (way.get(mark), True, False) if s is not None and (s is True or item.node.kind == "If")]
            wanted = [s for s in sides if (mark, s) in left and way.get(mark, s) == s]
            reachable = all(way.get(m, side) == side for m, side in item.within.items())
            if wanted and reachable:
                way.update(item.within)
                way[mark] = wanted[0]
            else:
                way.setdefault(mark, True)
        fresh = {(m, s) for m, s in way.items() if (m, s) in left and _reached(found, m, way)}
        if not fresh:
            break
        left -= fresh
        result.append(way)
    return result


def _reached(found: Sequence[Undecided], mark: str, way: Way) -> bool:
    within = next(o.within for o in found if o.mark == mark)
    return all(way.get(m) == side for m, side in within.items())


def undecided(graph: Graph, facts: Facts) -> list[Undecided]:
    """If and Loop nodes whose conditions (trip counts) are not the same at every probe, or not known."""
    found: dict[int, Undecided] = {}
    for node in graph.nodes:
        if node.marker == markers.OPEN and not all(not n or facts.static_value(n) is not None for n in node.inputs):
            within = {found[b.start].mark: b.side for b in graph.around[node.index] if b.start in found}
            found[node.index] = Undecided(node, within)
    return list(found.values())


def force(model: Model, way: Way) -> Model:
    """A model in which the conditions of a way are constants."""
    proto, weights = onnx.ModelProto(), dict(model[1])
    proto.CopyFrom(model[0])
    constants: dict[str, np.ndarray] = {}
    marks: dict[str, str] = {}  # by name: of two nodes of one name, the second begins when the first has ended
    for node in proto.graph.node:
        marker = markers.marker_of(node)[0]
        if marker == markers.OPEN:
            marks[node.name] = node.output[0]
        if marker in (markers.OPEN, markers.ELSE, markers.JOIN) and (mark := marks[node.name]) in way:
            condition = len(node.input) - 1
            constants[f"{mark}__holds"] = np.asarray(way[mark])
            if condition == 1:
                constants[f"{mark}__trips"] = np.asarray(_TRIPS)
                node.input[0] = f"{mark}__trips"
            node.input[condition] = f"{mark}__holds"
    for name, value in constants.items():
        add_constant(proto, weights, name, value)
    return proto, weights


def force_closed(model: Model, side: bool) -> Model:
    """A model whose bodies are in their nodes, in which every If takes the same side, and every Loop runs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model[0])
    _force_nodes(proto.graph.node, side)
    for name, value in (("__holds", True), ("__fails", False), ("__trips", _TRIPS)):
        tensor = onnx.numpy_helper.from_array(np.asarray(value), name)
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=tensor))
    return proto, model[1]


def _force_nodes(nodes: Iterable[onnx.NodeProto], side: bool) -> None:
    for node in nodes:
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            node.input[0] = "__holds" if side else "__fails"
        elif node.op_type == "Loop" and node.domain in ("", "ai.onnx"):
            node.input[0], node.input[1] = "__trips", "__holds"
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _force_nodes(body.node, side)


def names_of(found: Sequence[Undecided], branches: Collection[tuple[str, bool]]) -> list[str]:
    """Branches as a person would call them, without those that lie within others of them."""
    names = []
    for item in found:
        for side in (True, False):
            if (item.mark, side) in branches and not any(around in branches for around in item.within.items()):
                which = ("then-branch" if side else "else-branch") if item.node.kind == "If" else "body"
                names.append(f"the {which} of {item.node.kind} {item.node.label!r}")
    return names
