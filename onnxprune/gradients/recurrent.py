"""Recurrent layers, written out step by step where their length is known: gradients follow from those of the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from onnxprune.gradients.tape import Array, Shape

MAX_STEPS = 128
"""Longer sequences are not written out: the graph would grow too large."""

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def unroll(node: NodeProto, shapes: Mapping[str, Shape], values: Mapping[str, Array]) -> list[NodeProto] | None:
    """Return the nodes of a recurrent layer, one step after the other; None where it is none, or of another form.

    Args:
        node: the node, at opset 14 or newer.
        shapes: shapes of tensors.
        values: values of those that are constant.
    """
    if node.domain or node.op_type not in _GATES or node.input[0] not in shapes:
        return None
    layer = _Layer(node, shapes)
    lengths = node.input[4] if len(node.input) > 4 else ""
    known = values.get(lengths)
    plain = layer.activations == _ACTIVATIONS[node.op_type] * layer.directions
    plain = plain and not (layer.attrs.get("clip") or layer.attrs.get("input_forget"))
    plain = plain and not (len(node.input) > 7 and node.input[7])
    is_full_length = not lengths or (known is not None and bool((known == layer.length).all()))
    if not plain or not is_full_length or not 0 < layer.length <= MAX_STEPS:
        return None
    return layer.write()


class _Layer:
    """One recurrent layer under construction."""

    def __init__(self, node: NodeProto, shapes: Mapping[str, Shape]) -> None:
        self.node = node
        self.attrs: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self.batch_first = bool(self.attrs.get("layout", 0))
        size = shapes[node.input[0]]
        self.length, self.batch = (size[1], size[0]) if self.batch_first else size[:2]
        self.directions, gates, _ = shapes[node.input[1]]
        self.hidden = gates // _GATES[node.op_type]
        names = [a.decode() if isinstance(a, bytes) else str(a) for a in self.attrs.get("activations", [])]
        self.activations = names or _ACTIVATIONS[node.op_type] * self.directions
        self.nodes: list[NodeProto] = []
        self._stem = node.name or next(o for o in node.output if o)

    def op(self, kind: str, *inputs: str, count: int = 1, **attrs: Any) -> Any:
        """Add a node; return its output, a list where there are several."""
        names = [f"{self._stem}/{kind}.{len(self.nodes)}.{k}" for k in range(count)]
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), names, names[0], **attrs))
        return names[0] if count == 1 else names

    def constant(self, value: Any) -> str:
        """Add a constant."""
        return str(self.op("Constant", value=onnx.numpy_helper.from_array(np.asarray(value))))

    def at(self, x: str, index: int, axis: int = 0) -> str:
        """Return one slice of a tensor, without its axis."""
        return str(self.op("Gather", x, self.constant(np.int64(index)), axis=axis))

    def operand(self, i: int) -> str:
        """Return an input, empty where it is absent."""
        return self.node.input[i] if i < len(self.node.input) else ""

    def state(self, i: int, direction: int) -> str:
        """Return an initial state [batch, hidden]; zeros where none is given."""
        name = self.operand(i)
        if not name:
            return self.constant(np.zeros((self.batch, self.hidden), np.float32))
        return self.at(name, direction, 1 if self.batch_first else 0)

    def write(self) -> list[NodeProto]:
        """Return all nodes."""
        x = self.node.input[0]
        if self.batch_first:
            x = self.op("Transpose", x, perm=[1, 0, 2])
        runs = [self._direction(x, d) for d in range(self.directions)]
        axis = 2 if self.batch_first else 1
        results = [
            self._joined([self._stacked(outputs) for outputs, *_ in runs], axis),
            *(self._joined([run[k] for run in runs], axis - 1) for k in (1, 2) if len(runs[0]) > k),
        ]
        for name, value in zip(self.node.output, results, strict=False):
            if name:
                self.nodes.append(onnx.helper.make_node("Identity", [value], [name], f"{name}/out"))
        return self.nodes

    def _stacked(self, outputs: Sequence[str]) -> str:
        """Return the outputs of all steps as one tensor."""
        time = self.constant(np.asarray([1 if self.batch_first else 0], np.int64))
        parts = [self.op("Unsqueeze", h, time) for h in outputs]
        return str(self.op("Concat", *parts, axis=1 if self.batch_first else 0))

    def _joined(self, parts: Sequence[str], axis: int) -> str:
        """Return the results of all directions as one tensor."""
        where = self.constant(np.asarray([axis], np.int64))
        return str(self.op("Concat", *(self.op("Unsqueeze", p, where) for p in parts), axis=axis))

    def _direction(self, x: str, d: int) -> tuple[Any, ...]:
        """Return the outputs of all steps, in order of time, and the last states."""
        turn = self.attrs.get("direction", b"forward") in (b"reverse", "reverse") or d == 1
        weights = self.op("Transpose", self.at(self.node.input[1], d), perm=[1, 0])
        recurrent = self.op("Transpose", self.at(self.node.input[2], d), perm=[1, 0])
        gates = self.op("MatMul", x, weights)
        inner = ""
        if self.operand(3):
            split = self.constant(np.asarray([_GATES[self.node.op_type] * self.hidden] * 2, np.int64))
            outer, inner = self.op("Split", self.at(self.operand(3), d), split, axis=0, count=2)
            gates = self.op("Add", gates, outer)
        states = [self.state(5, d)] + ([self.state(6, d)] if self.node.op_type == "LSTM" else [])
        step = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[self.node.op_type]
        outputs = []
        for t in range(self.length)[:: -1 if turn else 1]:
            states = step(self.at(gates, t), recurrent, inner, states)
            outputs.append(states[0])
        return (outputs[::-1] if turn else outputs), *states

    def _parts(self, x: str, sizes: Sequence[int]) -> list[str]:
        split = self.constant(np.asarray([n * self.hidden for n in sizes], np.int64))
        return list(self.op("Split", x, split, axis=-1, count=len(sizes)))

    def _sum(self, gates: str, state: str, recurrent: str, inner: str) -> str:
        total = self.op("Add", gates, self.op("MatMul", state, recurrent))
        return str(self.op("Add", total, inner) if inner else total)

    def _lstm(self, gates: str, recurrent: str, inner: str, states: list[str]) -> list[str]:
        """C' = f c + i tanh(g), h' = o tanh(c'), with gates in the order i, o, f, g."""
        i, o, f, g = self._parts(self._sum(gates, states[0], recurrent, inner), [1, 1, 1, 1])
        i, o, f = (self.op("Sigmoid", n) for n in (i, o, f))
        cell = self.op("Add", self.op("Mul", f, states[1]), self.op("Mul", i, self.op("Tanh", g)))
        return [self.op("Mul", o, self.op("Tanh", cell)), cell]

    def _gru(self, gates: str, recurrent: str, inner: str, states: list[str]) -> list[str]:
        """H' = (1 - z) n + z h, where the reset gate comes before or behind the recurrent product of n."""
        (state,) = states
        outer, new = self._parts(gates, [2, 1])
        both, last = self._parts(recurrent, [2, 1])
        bias, shift = self._parts(inner, [2, 1]) if inner else ("", "")
        z, r = self._parts(self.op("Sigmoid", self._sum(outer, state, both, bias)), [1, 1])
        if self.attrs.get("linear_before_reset", 0):
            product = self.op("MatMul", state, last)
            product = self.op("Mul", r, self.op("Add", product, shift) if shift else product)
        else:
            product = self.op("MatMul", self.op("Mul", r, state), last)
            product = self.op("Add", product, shift) if shift else product
        candidate = self.op("Tanh", self.op("Add", new, product))
        return [self.op("Add", candidate, self.op("Mul", z, self.op("Sub", state, candidate)))]

    def _rnn(self, gates: str, recurrent: str, inner: str, states: list[str]) -> list[str]:
        """H' = tanh(x W + h R + b)."""
        return [self.op("Tanh", self._sum(gates, states[0], recurrent, inner))]
