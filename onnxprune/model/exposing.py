"""Show what is inside of bodies: a tensor in there becomes one more result of every node around it.

What the iterations of a Loop or Scan give is stacked in front, once per node that repeats. Where an If takes the other
branch, its result is empty; within a Loop or Scan, where every iteration has to give as much, zeros of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any, NamedTuple

from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxprune.model import markers

Size = int | tuple[str, int, int]
"""A number, or (graph input, axis, factor): that input's size times the factor."""


class Inner(NamedTuple):
    """What has to be known of a tensor to show it: its element type, rank and, where it may lie in an If within a Loop
    or Scan, its sizes."""

    kind: int
    rank: int
    sizes: tuple[Size, ...] | None = None


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


def hidden(proto: ModelProto, types: Mapping[str, Inner]) -> frozenset[str]:
    """Those tensors that cannot be shown: in an If within a Loop or Scan, and their sizes are not known."""
    if not markers.has_bodies(proto):
        return frozenset()
    around = _Places.of(proto).around
    return frozenset(
        n for n, inner in types.items() if not _can_be_shown([f.kind for f, _ in around.get(n, ())], inner)
    )


def _can_be_shown(kinds: list[str], inner: Inner) -> bool:
    """Whether every If outside of which something repeats can say how large what it does not give would be."""
    first = next((k for k, kind in enumerate(kinds) if kind != "If"), len(kinds))
    if "If" not in kinds[first:]:
        return True
    last = max(k for k, kind in enumerate(kinds) if kind != "If")
    return inner.sizes is not None and "If" not in kinds[first:last]


def show(
    proto: ModelProto, types: Mapping[str, Inner], *, branches: bool = True
) -> tuple[ModelProto, dict[str, Shown]]:
    """The model with inner tensors as results of the nodes around them, and what they come out as.

    Args:
        types: of the tensors to show; those that lie in no body are left out. None of them is ``hidden``.
        branches: whether to show them outside of every If; False: where the outermost Loop or Scan around them runs.
    """
    around = _Places.of(proto).around if markers.has_bodies(proto) else {}
    shown: dict[str, Shown] = {}
    before: dict[int, list[NodeProto]] = {}
    for name, (kind, rank, sizes) in types.items():
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
                place = frame.end if side else frame.otherwise
                inside = any(outer.kind != "If" for outer, _ in frames[: len(frames) - 1 - number])
                before.setdefault(place, []).extend(_zeros(nothing, kind, (sizes or ()) if inside else (0,)))
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


def _zeros(name: str, kind: int, sizes: tuple[Size, ...]) -> list[NodeProto]:
    """Nodes that make a tensor of zeros."""
    nodes, parts = [], []
    for axis, size in enumerate(sizes):
        parts.append(part := f"{name}_{axis}")
        if isinstance(size, int):
            nodes.append(_constant(part, TensorProto.INT64, [1], [size]))
            continue
        source, place, factor = size
        nodes += [
            helper.make_node("Shape", [source], [f"{part}_shape"]),
            _constant(f"{part}_place", TensorProto.INT64, [1], [place]),
            helper.make_node("Gather", [f"{part}_shape", f"{part}_place"], [f"{part}_size"]),
            _constant(f"{part}_factor", TensorProto.INT64, [1], [factor]),
            helper.make_node("Mul", [f"{part}_size", f"{part}_factor"], [part]),
        ]
    if not parts:
        return [_constant(name, kind, [], [0])]
    joined = helper.make_node("Concat", parts, [f"{name}_sizes"], axis=0)
    zero = helper.make_tensor(name, kind, [1], [0])
    return [*nodes, joined, helper.make_node("ConstantOfShape", [f"{name}_sizes"], [name], value=zero)]


def _constant(name: str, kind: int, dims: list[int], values: list[int]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, values))
