"""The nodes that mark where bodies of If, Loop and Scan begin and end in a graph that lays them open.

Everything between ``OPEN`` and ``CLOSE`` belongs to a body. A graph with bodies reads, for a Loop or Scan::

    OPEN [M, cond] -> [mark, iteration, cond in the body]
    CARRY [initial state] -> [state in the body]              one per state
    SLICE [scanned tensor] -> [its part in the body]          one per scanned input
    ... the body's nodes ...
    END [cond that the body gives] -> [mark]
    TIE [state in the body, next state] -> [final state]      one per state
    STACK [what the body gives, what tells how often] -> [all of them]
    CLOSE [] -> [mark]

and for an If::

    OPEN [cond] -> [mark]   ... nodes ...   ELSE [cond] -> [mark]   ... nodes ...   END [] -> [mark]
    JOIN [of the then-branch, of the else-branch, cond] -> [result]
    CLOSE [] -> [mark]

No runtime knows them: :func:`onnxprune.model.closing.close_bodies` puts every body back before a model is written.
"""

from __future__ import annotations

from onnx import ModelProto

DOMAIN = "onnxprune.bodies"

OPEN, ELSE, END, CLOSE = "BodyOpen", "BodyElse", "BodyEnd", "BodyClose"
CARRY, SLICE, TIE, STACK, JOIN = "BodyCarry", "BodySlice", "BodyTie", "BodyStack", "BodyJoin"
CONSTANT = "BodyConstant"
"""Stands where a large Constant node was, whose value became an initializer."""

RESULTS = (TIE, STACK, JOIN)
"""Markers inside OPEN and CLOSE whose results lie outside the body."""


def has_bodies(proto: ModelProto) -> bool:
    """Whether the graph has bodies laid open in it."""
    return any(opset.domain == DOMAIN for opset in proto.opset_import)
