"""Subgraphs of If, Loop and Scan: labels at their inputs and outputs, and from one iteration to the next.

A state is one tensor throughout: the initial value, the subgraph's input, its output and the final value lose the
same channels, as the operands of a sum do. The branches of an If are tied in the same way.
"""

from __future__ import annotations

from onnxprune.io import markers
from onnxprune.labels import algebra
from onnxprune.labels.algebra import broadcast
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Labels, covering
from onnxprune.operators.context import Step
from onnxprune.operators.registry import Rule, register


class Marker(Rule):
    """Marker of the start or end of a subgraph: its operands (trip counts, conditions) have no channels."""

    shapeless = True


class Carry(Marker):
    """The initial value of a state, as an input of the subgraph."""

    def propagate(self, step: Step) -> None:
        """Pass the labels, where the state keeps its size from one iteration to the next."""
        labels, shape = step.labels(0), step.table.facts.shape(step.node.outputs[0])
        if shape is None:
            step.freeze(labels, Reason.DYNAMIC_SHAPE, _CHANGES)
            return
        for axis, size in enumerate(shape):
            if size is None:
                labels = step.drop_axis(labels, axis, Reason.DYNAMIC_SHAPE, _CHANGES)
        step.set(0, labels)


_CHANGES = "the shape of this state is not known to stay the same from one iteration to the next"


class Slice(Marker):
    """One position of a scanned axis per iteration."""

    def propagate(self, step: Step) -> None:
        """Freeze the scanned axis, which the subgraph does not have."""
        labels, shape = step.labels(0), step.table.facts.shape(step.node.inputs[0])
        if shape is None:
            step.freeze(labels, Reason.DYNAMIC_SHAPE, "the shape of a scanned tensor is not known")
            return
        axis = step.axis(0, len(shape))
        labels = step.drop_axis(labels, axis, Reason.SPATIAL, f"{step.node.kind} runs along this axis")
        step.set(0, algebra.remove_axis(labels, axis))


class Stack(Marker):
    """Concatenation of an output of all iterations along a new axis."""

    def propagate(self, step: Step) -> None:
        """Add a new axis without labels."""
        labels, shape = step.labels(0), step.table.facts.shape(step.node.inputs[0])
        for i in range(1, len(step.node.inputs)):
            step.labels(i)  # it only holds the number of iterations
        if shape is None:
            step.freeze(labels, Reason.DYNAMIC_SHAPE, "the shape of an iteration's result is not known")
            return
        step.set(0, algebra.insert_axis(labels, step.axis(0, len(shape) + 1)))


class Tie(Marker):
    """A state at the start and at the end of an iteration."""

    def propagate(self, step: Step) -> None:
        """Unite the labels of both."""
        step.set(0, _united(step, _CHANGES))


class Join(Marker):
    """An output of an If, from either branch."""

    def propagate(self, step: Step) -> None:
        """Unite the labels of both branches; of branches with different shapes, use the one taken at every probe."""
        facts = step.table.facts
        condition = facts.static_value(step.node.inputs[2])
        shapes = [facts.shape(n) for n in step.node.inputs[:2]]
        if condition is not None and shapes[0] != shapes[1]:
            step.labels(0), step.labels(1)
            step.set(0, step.labels(0 if condition.ravel()[0] else 1))
        else:
            step.set(0, _united(step, "the branches give different shapes"))


def _united(step: Step, why: str) -> Labels:
    """Unite labels of two tensors of one shape, position by position; freeze sizes that differ or are not known."""
    facts, operands = step.table.facts, [step.labels(0), step.labels(1)]
    a, b = (facts.shape(n) for n in step.node.inputs[:2])
    if a is None or b is None or len(a) != len(b):
        for labels in operands:
            step.freeze(labels, Reason.DYNAMIC_SHAPE, why)
        return ()
    for axis, (n, m) in enumerate(zip(a, b, strict=True)):
        if n != m or n is None:
            for k, labels in enumerate(operands):
                if covering(labels, axis) is not None:
                    operands[k] = step.drop_axis(labels, axis, Reason.DYNAMIC_SHAPE, why)
    return broadcast(step.atoms, [(operands[0], a), (operands[1], b)], len(a), step.reason)


register(markers.DOMAIN, markers.OPEN, markers.ELSE, markers.END, markers.CLOSE, markers.CONSTANT, rule=Marker())
register(markers.DOMAIN, markers.CARRY, rule=Carry())
register(markers.DOMAIN, markers.SLICE, rule=Slice())
register(markers.DOMAIN, markers.TIE, rule=Tie())
register(markers.DOMAIN, markers.STACK, rule=Stack())
register(markers.DOMAIN, markers.JOIN, rule=Join())
