"""Scan and Loop of a known length, written out step by step: gradients follow from those of the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto

from onnxprune.gradients.recurrent import MAX_STEPS
from onnxprune.gradients.tape import Array, Shape

MAX_NODES = 10_000
"""Larger results are not written out: a session of them would take minutes to open."""


def unroll_loop(node: NodeProto, shapes: Mapping[str, Shape], values: Mapping[str, Array]) -> list[NodeProto] | None:
    """Return the nodes of a Scan or Loop, one step after the other; None where it is none, or may end otherwise.

    Bodies with weights or bodies of their own stay as they are: names of weights are those of the whole model.

    Args:
        node: the node, at opset 14 or newer.
        shapes: shapes of tensors.
        values: values of those that are constant.
    """
    if node.domain or node.op_type not in ("Scan", "Loop"):
        return None
    steps = _Steps(node)
    if not steps.is_plain:
        return None
    return _scan(steps, shapes) if node.op_type == "Scan" else _loop(steps, values)


def _scan(steps: _Steps, shapes: Mapping[str, Shape]) -> list[NodeProto] | None:
    """Write out a Scan, whose inputs behind the states are read slice by slice."""
    number = int(steps.attrs["num_scan_inputs"])
    names = list(steps.node.input)
    states, scanned = names[: len(names) - number], names[len(names) - number :]
    axes, backwards = (list(steps.attrs.get(f"scan_input_{key}", [0] * number)) for key in ("axes", "directions"))
    if not number or scanned[0] not in shapes:
        return None
    length = shapes[scanned[0]][axes[0]]
    if not steps.fit(length):
        return None
    rows: list[Sequence[str]] = []
    for t in range(length):
        slices = [
            steps.op("Gather", x, steps.constant(np.int64(length - 1 - t if turn else t)), axis=axis)
            for x, axis, turn in zip(scanned, axes, backwards, strict=True)
        ]
        results = steps.run(t, [*states, *slices])
        states, row = results[: len(states)], results[len(states) :]
        rows.append(row)
    return steps.end(states, rows)


def _loop(steps: _Steps, values: Mapping[str, Array]) -> list[NodeProto] | None:
    """Write out a Loop that runs a known number of times."""
    count, condition, *states = steps.node.input
    if count not in values or not steps.goes_on or (condition and not np.all(values.get(condition, False))):
        return None
    length = int(np.ravel(values[count])[0])
    if not steps.fit(length):
        return None
    rows: list[Sequence[str]] = []
    true = steps.constant(np.asarray(True))
    for t in range(length):
        results = steps.run(t, [steps.constant(np.int64(t)), true, *states])[1:]
        states, row = results[: len(states)], results[len(states) :]
        rows.append(row)
    return steps.end(states, rows)


class _Steps:
    """The steps of one Scan or Loop under construction.

    Attributes:
        node: the node.
        attrs: its attributes.
        body: the graph of one step.
        nodes: the nodes so far.
    """

    def __init__(self, node: NodeProto) -> None:
        self.node = node
        self.attrs: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self.body: GraphProto = self.attrs["body"]
        self.nodes: list[NodeProto] = []
        self._stem = node.name or next(o for o in node.output if o)
        self._constants = {t.name: onnx.numpy_helper.to_array(t) for t in self.body.initializer}

    @property
    def is_plain(self) -> bool:
        """Whether the body has neither weights nor bodies of its own."""
        attributes = [a for inner in self.body.node for a in inner.attribute]
        tensors = [onnx.numpy_helper.to_array(a.t) for a in attributes if a.type == AttributeProto.TENSOR]
        is_flat = all(a.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in attributes)
        return is_flat and all(v.size <= 1 or v.dtype.kind != "f" for v in [*tensors, *self._constants.values()])

    def fit(self, length: int) -> bool:
        """Return whether so many steps are few enough to write out."""
        return 0 < length <= MAX_STEPS and length * len(self.body.node) <= MAX_NODES

    @property
    def goes_on(self) -> bool:
        """Whether the condition that the body of a Loop gives is the one that it gets, or always true."""
        producer = {o: inner for inner in self.body.node for o in inner.output}
        name = self.body.output[0].name
        while name in producer and producer[name].op_type in ("Identity", "Cast"):
            name = producer[name].input[0]
        if name == self.body.input[1].name:
            return True
        value = self._constants.get(name)
        if name in producer and producer[name].op_type == "Constant":
            value = onnx.numpy_helper.to_array(producer[name].attribute[0].t)
        return value is not None and bool(value.all())

    def op(self, kind: str, *inputs: str, output: str = "", **attrs: Any) -> str:
        """Add a node; return its output."""
        name = f"{self._stem}/{kind}.{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [output or name], name, **attrs))
        return output or name

    def constant(self, value: Any) -> str:
        """Add a constant."""
        return self.op("Constant", value=onnx.numpy_helper.from_array(np.asarray(value)))

    def run(self, number: int, inputs: Sequence[str]) -> list[str]:
        """Add the nodes of one step; return its outputs.

        Args:
            number: number of the step.
            inputs: what the inputs of the body stand for; other names are tensors around the node.
        """
        names = {i.name: outer for i, outer in zip(self.body.input, inputs, strict=True)}
        names |= {name: self.constant(value) for name, value in self._constants.items() if name not in names}
        for inner in self.body.node:
            copy = NodeProto()
            copy.CopyFrom(inner)
            copy.name = f"{self._stem}/{number}/{inner.name or inner.output[0]}"
            del copy.input[:], copy.output[:]
            copy.input.extend(names.get(i, i) for i in inner.input)
            names |= {o: f"{self._stem}/{number}/{o}" for o in inner.output if o}
            copy.output.extend(names[o] if o else "" for o in inner.output)
            self.nodes.append(copy)
        return [names.get(o.name, o.name) for o in self.body.output]

    def end(self, states: Sequence[str], rows: Sequence[Sequence[str]]) -> list[NodeProto]:
        """Add the nodes that compute the outputs of the node; return all nodes.

        Args:
            states: the last states.
            rows: the other outputs of each step, in the order of the steps.
        """
        outputs = list(self.node.output)
        for state, name in zip(states, outputs, strict=False):
            if name:
                self.op("Identity", state, output=name)
        stacked = outputs[len(states) :]
        axes, backwards = (self.attrs.get(f"scan_output_{key}", [0] * len(rows[0])) for key in ("axes", "directions"))
        for k, name in enumerate(stacked):
            if name:
                where = self.constant(np.asarray([axes[k]], np.int64))
                parts = [self.op("Unsqueeze", row[k], where) for row in rows]
                self.op("Concat", *(parts[::-1] if backwards[k] else parts), output=name, axis=axes[k])
        return self.nodes
