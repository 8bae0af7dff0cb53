"""Marker nodes: the beginning and end of If, Loop and Scan bodies in a graph that inlines them.

Everything between ``OPEN`` and ``CLOSE`` belongs to a body. A graph with bodies reads, for a Loop or Scan::

    OPEN [M, cond] -> [mark, iteration, cond in the body]
    CARRY [initial state] -> [state in the body]              one per state
    SLICE [scanned tensor] -> [its part in the body]          one per scanned input
    ... the body's nodes ...
    END [cond that the body gives] -> [mark]
    TIE [state in the body, next state] -> [final state]      one per state
    STACK [value that the body gives, tensor that determines the number of iterations] -> [stacked values]
    CLOSE [] -> [mark]

and for an If::

    OPEN [cond] -> [mark]   ... nodes ...   ELSE [cond] -> [mark]   ... nodes ...   END [] -> [mark]
    JOIN [of the then-branch, of the else-branch, cond] -> [result]
    CLOSE [] -> [mark]

No runtime knows them: :func:`onnxprune.io.subgraphs.outline_bodies` outlines every body before a model is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from onnx import ModelProto, NodeProto

DOMAIN = "onnxprune.bodies"

OPEN, ELSE, END, CLOSE = "BodyOpen", "BodyElse", "BodyEnd", "BodyClose"
CARRY, SLICE, TIE, STACK, JOIN = "BodyCarry", "BodySlice", "BodyTie", "BodyStack", "BodyJoin"
CONSTANT = "BodyConstant"
"""A marker in the place of a large Constant node, whose value became an initializer."""

RESULTS = (TIE, STACK, JOIN)
"""Markers inside OPEN and CLOSE whose results lie outside the body."""


def has_bodies(proto: ModelProto) -> bool:
    """Return whether the graph has inlined bodies."""
    return any(opset.domain == DOMAIN for opset in proto.opset_import)


class Body(NamedTuple):
    """A body around a node: index of the ``OPEN`` marker of its control-flow node, and its ``side`` of that node.

    ``side`` is False in the else-branch of an If, ``kind`` the operator of the control-flow node.
    """

    start: int
    side: bool
    kind: str


def marker_of(node: NodeProto) -> tuple[str, str]:
    """Return the marker type of a node, "" where it is none, and the operator of its control-flow node."""
    if node.domain != DOMAIN:
        return "", ""
    return node.op_type, next((a.s.decode() for a in node.attribute if a.name == "kind"), "")


def repeating(around: Sequence[Body]) -> int | None:
    """Return the index of the body of the outermost Loop or Scan among these, None where there is none."""
    return next((k for k, body in enumerate(around) if body.kind != "If"), None)


def enclosures(nodes: Iterable[tuple[str, str]]) -> Iterator[tuple[Body, ...]]:
    """Yield the bodies around every node, given as :func:`marker_of` does, outermost first.

    Markers that end a body or produce its results lie outside of it, except ``END``; so does the one that begins it.
    """
    around: tuple[Body, ...] = ()
    for index, (op, kind) in enumerate(nodes):
        outer = around[:-1] if op in (ELSE, CLOSE, *RESULTS) else around
        yield outer
        if op == OPEN:
            around = (*outer, Body(index, True, kind))
        elif op == ELSE:
            around = (*outer, around[-1]._replace(side=False))
        elif op == CLOSE:
            around = outer
