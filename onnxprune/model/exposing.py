"""Show what is inside of bodies: a tensor in there becomes one more result of every node around it.

What the iterations of a Loop or Scan give is stacked in front, once per node that repeats; where an If takes the other
branch, its result is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any

from onnx import ModelProto, NodeProto, helper

from onnxprune.model import markers


@dataclass(frozen=True, slots=True)
class Shown:
    """An inner tensor as a result: the ``output`` it comes out as, and how many axes were ``stacked`` in front."""

    output: str
    stacked: int


@dataclass(slots=True)
class _Frame:
    """A node with bodies: where its markers stand, and how many results it has."""

    kind: str
    label: str
    condition: str
    results: int
    otherwise: int = 0
    end: int = 0
    close: int = 0


@dataclass(slots=True)
class _Places:
    """All nodes with bodies, and around every inner tensor the nodes with the side it lies on, outermost first."""

    around: dict[str, tuple[tuple[_Frame, bool], ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, proto: ModelProto) -> _Places:
        """Those of a flat model."""
        found, stack = cls(), list[tuple[_Frame, bool]]()
        for index, node in enumerate(proto.graph.node):
            marker = node.op_type if node.domain == markers.DOMAIN else ""
            if marker == markers.OPEN:
                texts = {a.name: a.s for a in node.attribute}
                hollow = NodeProto.FromString(texts["node"])
                results = next(len(a.g.output) for a in hollow.attribute if a.HasField("g"))
                stack.append(
                    (_Frame(texts["kind"].decode(), node.name, node.input[0] if node.input else "", results), True)
                )
            elif marker == markers.ELSE:
                stack[-1][0].otherwise, stack[-1] = index, (stack[-1][0], False)
            elif marker == markers.END:
                stack[-1][0].end = index
            elif marker == markers.CLOSE:
                stack.pop()[0].close = index
            around = tuple(stack[: len(stack) - (marker in markers.RESULTS)])
            if around:
                found.around.update(dict.fromkeys(filter(None, node.output), around))
        return found


def hidden(proto: ModelProto) -> frozenset[str]:
    """Tensors that cannot be shown: in an If within a Loop or Scan, which may give nothing in some iterations."""
    if not markers.has_bodies(proto):
        return frozenset()
    found = set()
    for name, around in _Places.of(proto).around.items():
        kinds = [frame.kind for frame, _ in around]
        if "If" in kinds and any(kind != "If" for kind in kinds[: len(kinds) - kinds[::-1].index("If")]):
            found.add(name)
    return frozenset(found)


def show(
    proto: ModelProto, types: Mapping[str, tuple[int, int]], *, branches: bool = True
) -> tuple[ModelProto, dict[str, Shown]]:
    """The model with inner tensors as results of the nodes around them, and what they come out as.

    Args:
        types: of the tensors to show, {name: (element type, rank)}; those that lie in no body are left out.
        branches: whether to show them outside of every If; False: where the outermost Loop or Scan around them runs.
    """
    around = _Places.of(proto).around if markers.has_bodies(proto) else {}
    shown: dict[str, Shown] = {}
    before: dict[int, list[NodeProto]] = {}
    for name, (kind, rank) in types.items():
        now, stacked = name, 0
        frames = around.get(name, ())
        if not branches:
            frames = tuple(dropwhile(lambda placed: placed[0].kind == "If", frames))
        for number, (frame, side) in enumerate(reversed(frames)):
            output = f"{name}__shown{number}"
            # A copy: runtimes may let a state that is a result as well be overwritten.
            own = frame.otherwise if frame.kind == "If" and side else frame.end
            before.setdefault(own, []).append(helper.make_node("Identity", [now], [f"{output}_copy"], name=output))
            now = f"{output}_copy"
            at = {"kind": frame.kind, "at": frame.results, "type": kind, "rank": rank + stacked}
            frame.results += 1
            if frame.kind == "If":
                nothing = f"{output}_nothing"
                value = helper.make_tensor(nothing, kind, [0], [])
                place = frame.end if side else frame.otherwise
                before.setdefault(place, []).append(helper.make_node("Constant", [], [nothing], value=value))
                sides = [now, nothing] if side else [nothing, now]
                marker = _marker(markers.JOIN, [*sides, frame.condition], output, frame.label, **at)
            else:
                marker = _marker(markers.STACK, [now], output, frame.label, axis=0, **at)
                stacked += 1
            before.setdefault(frame.close, []).append(marker)
            now = output
            shown[name] = Shown(output, stacked)
    if not shown:
        return proto, shown
    model = ModelProto()
    model.CopyFrom(proto)
    del model.graph.node[:]
    for index, node in enumerate(proto.graph.node):
        model.graph.node.extend(before.get(index, ()))
        model.graph.node.append(node)
    return model, shown


def _marker(op: str, inputs: list[str], output: str, label: str, **more: Any) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=label, domain=markers.DOMAIN, **more)
