"""Nodes under construction, with static shapes, and the context in which the gradient of one node is emitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.view import Node

Array = NDArray[Any]
Shape = tuple[int, ...]
Kind = np.dtype[Any]


class NoGradient(Exception):
    """A node has no gradient in this form; the message completes "<operator> ..."."""


class Tape:
    """Nodes and constants under construction.

    Every tensor has a static shape and a type: gradients are written with constant axes, sizes and pads.

    Args:
        shapes: shapes of the tensors that exist already.
        kinds: types of the tensors that exist already.
        prefix: prefix of new names.
    """

    def __init__(self, shapes: Mapping[str, Shape], kinds: Mapping[str, Kind], prefix: str = "grad") -> None:
        self.shapes, self.kinds = dict(shapes), dict(kinds)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.added_outputs: dict[int, dict[int, str]] = {}
        self._known: dict[tuple[str, Shape, bytes], str] = {}
        self._prefix, self._count = prefix, 0

    # -- tensors -------------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor.

        Raises:
            NoGradient: it is unknown, as for sequences.
        """
        if name not in self.shapes:
            raise NoGradient(f"reads or writes {name!r}, whose shape is unknown")
        return self.shapes[name]

    def declare(self, name: str, shape: Sequence[int], kind: Any) -> str:
        """Enter a tensor that is an input of the graph."""
        self.shapes[name], self.kinds[name] = tuple(int(n) for n in shape), np.dtype(kind)
        return name

    def constant(self, value: Any) -> str:
        """Return a constant; equal ones are one tensor."""
        array = np.array(value, order="C")
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._known:
            name = self._name()
            self._known[key], self.constants[name] = name, array
            self.declare(name, array.shape, array.dtype)
        return self._known[key]

    def scalar(self, value: float, like: str) -> str:
        """Return a number in the type of a tensor."""
        return self.constant(np.asarray(value, self.kinds[like]))

    def integers(self, values: Sequence[int]) -> str:
        """Return a vector of int64."""
        return self.constant(np.asarray(values, np.int64).reshape(-1))

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}.{self._count}"

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def emit(
        self, op: str, inputs: Sequence[str], shape: Sequence[int], kind: Any = None, domain: str = "", **attrs: Any
    ) -> str:
        """Add a node with one output.

        Args:
            op: the operator.
            inputs: its inputs.
            shape: shape of its output.
            kind: type of its output; None: that of the first input.
            domain: the operator's domain.
            attrs: attributes.

        Returns:
            the output.
        """
        name = self._name()
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [name], name, domain=domain, **attrs))
        return self.declare(name, shape, self.kinds[inputs[0]] if kind is None else kind)

    def output_of(self, node: Node, position: int, shape: Sequence[int], kind: Any) -> str:
        """Return an optional output of a node of the forward pass, asked for where the node does not give it."""
        if position < len(node.outputs) and node.outputs[position]:
            return node.outputs[position]
        outputs = self.added_outputs.setdefault(node.index, {})
        if position not in outputs:
            outputs[position] = self.declare(self._name(), shape, kind)
        return outputs[position]

    def unary(self, op: str, x: str) -> str:
        """Apply an operator that keeps shape and type."""
        return self.emit(op, [x], self.shape(x))

    def _pair(self, op: str, a: str, b: str) -> str:
        return self.emit(op, [a, b], np.broadcast_shapes(self.shape(a), self.shape(b)))

    def add(self, a: str, b: str) -> str:
        """Return a + b."""
        return self._pair("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        """Return a - b."""
        return self._pair("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        """Return a * b."""
        return self._pair("Mul", a, b)

    def div(self, a: str, b: str) -> str:
        """Return a / b."""
        return self._pair("Div", a, b)

    def neg(self, x: str) -> str:
        """Return -x."""
        return self.unary("Neg", x)

    def shift(self, x: str, by: float) -> str:
        """Return x + by."""
        return self.add(x, self.scalar(by, x))

    def scale(self, x: str, factor: float) -> str:
        """Return factor * x."""
        return x if factor == 1 else self.mul(x, self.scalar(factor, x))

    def square(self, x: str) -> str:
        """Return x * x."""
        return self.mul(x, x)

    def compare(self, op: str, a: str, b: str) -> str:
        """Return a comparison, bool."""
        return self.emit(op, [a, b], np.broadcast_shapes(self.shape(a), self.shape(b)), bool)

    def positive(self, x: str) -> str:
        """Return x > 0, bool."""
        return self.compare("Greater", x, self.scalar(0, x))

    def step(self, x: str) -> str:
        """Return 1 where x > 0 and 0 where x is 0, for x that is never negative."""
        if self.kinds[x] == np.float32:  # six times as fast as Sign in onnxruntime, which has it for float32 alone
            return self.emit("HardSigmoid", [x], self.shape(x), alpha=1e38, beta=0.0)
        return self.unary("Sign", x)

    def cast(self, x: str, kind: Any) -> str:
        """Return x in another type."""
        if self.kinds[x] == kind:
            return x
        number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        return self.emit("Cast", [x], self.shape(x), kind, to=number)

    def mask(self, x: str, condition: str) -> str:
        """Return x where a condition holds, else 0: a product, which onnxruntime computes far faster than Where."""
        return self.mul(x, self.cast(condition, self.kinds[x]))

    def either(self, one: str, other: str) -> str:
        """Return the conjunction of two conditions."""
        return self.compare("And", one, other)

    # -- shapes --------------------------------------------------------------------------------------------------------

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Return x under another shape."""
        shape = tuple(int(n) for n in shape)
        if self.shape(x) == shape:
            return x
        return self.emit("Reshape", [x, self.integers(shape)], shape, allowzero=1)

    def transpose(self, x: str, order: Sequence[int]) -> str:
        """Return x with its axes in another order."""
        if list(order) == list(range(len(order))):
            return x
        return self.emit("Transpose", [x], [self.shape(x)[k] for k in order], perm=list(order))

    def swap(self, x: str) -> str:
        """Return x with its last two axes exchanged."""
        rank = len(self.shape(x))
        return self.transpose(x, [*range(rank - 2), rank - 1, rank - 2])

    def sum(self, x: str, axes: Sequence[int], keep: bool = False) -> str:
        """Sum over axes."""
        if not axes:
            return x
        shape = self.shape(x)
        axes = sorted(k % len(shape) for k in axes)
        sizes = [1 if k in axes else n for k, n in enumerate(shape) if keep or k not in axes]
        return self.emit("ReduceSum", [x, self.integers(axes)], sizes, keepdims=int(keep))

    def mean(self, x: str, axes: Sequence[int], keep: bool = False) -> str:
        """Average over axes."""
        shape = self.shape(x)
        return self.scale(self.sum(x, axes, keep), 1 / max(1, int(np.prod([shape[k] for k in axes]))))

    def total(self, x: str) -> str:
        """Sum all elements, to a scalar."""
        return self.sum(x, range(len(self.shape(x))))

    def broadcast(self, x: str, shape: Sequence[int]) -> str:
        """Expand x to a shape."""
        if self.shape(x) == tuple(shape):
            return x
        return self.emit("Expand", [x, self.integers(shape)], shape)

    def unbroadcast(self, x: str, shape: Sequence[int]) -> str:
        """Sum x over the axes along which ``shape`` was broadcast to its own."""
        have, lead = self.shape(x), len(self.shape(x)) - len(shape)
        if have == tuple(shape):
            return x
        axes = [*range(lead), *(lead + k for k, n in enumerate(shape) if n == 1 and have[lead + k] != 1)]
        return self.reshape(self.sum(x, axes, keep=True), shape)

    def matmul(self, a: str, b: str) -> str:
        """Return products of matrices, batched by all axes but the last two."""
        one, two = self.shape(a), self.shape(b)
        lead = np.broadcast_shapes(one[:-2], two[:-2])
        return self.emit("MatMul", [a, b], (*lead, one[-2], two[-1]))

    def slice(
        self,
        x: str,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> str:
        """Cut ranges out of axes, with ends and steps of 1 or more."""
        shape, steps = list(self.shape(x)), list(steps or [1] * len(axes))
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            shape[axis] = len(range(start, min(end, shape[axis]), step))
        if tuple(shape) == self.shape(x) and set(steps) <= {1}:
            return x
        return self.emit("Slice", [x, *map(self.integers, (starts, ends, axes, steps))], shape)

    def pad(self, x: str, before: Sequence[int], after: Sequence[int]) -> str:
        """Add zeros along every axis; negative numbers cut."""
        size = self.shape(x)
        cut = [k for k in range(len(size)) if before[k] < 0 or after[k] < 0]
        if cut:  # not every runtime pads by negative numbers
            starts, ends = ([max(0, -before[k]) for k in cut], [size[k] + min(0, after[k]) for k in cut])
            x = self.slice(x, starts, ends, cut)
            before, after = ([max(0, n) for n in pads] for pads in (before, after))
        if not any(before) and not any(after):
            return x
        shape = [n + a + b for n, a, b in zip(self.shape(x), before, after, strict=True)]
        return self.emit("Pad", [x, self.integers([*before, *after])], shape)

    def concat(self, parts: Sequence[str], axis: int) -> str:
        """Join parts along an axis."""
        if len(parts) == 1:
            return parts[0]
        shape = list(self.shape(parts[0]))
        shape[axis] = sum(self.shape(p)[axis] for p in parts)
        return self.emit("Concat", parts, shape, axis=axis)

    def zeros(self, shape: Sequence[int], kind: Any) -> str:
        """Return zeros, made when they are needed."""
        value = onnx.numpy_helper.from_array(np.zeros(1, kind))
        return self.emit("ConstantOfShape", [self.integers(shape)], shape, kind, value=value)


class Reverse:
    """One node in the backward pass: the gradients of its outputs are known, those of its inputs are sent.

    Args:
        tape: tape that takes new nodes.
        node: the node.
        gradients: gradient of every output; None where the loss does not depend on it.
        wanted: whether the gradient of each input is needed.
        constants: values of tensors that are constant.
    """

    def __init__(
        self,
        tape: Tape,
        node: Node,
        gradients: Sequence[str | None],
        requested: Sequence[bool],
        constants: Mapping[str, Array],
    ) -> None:
        self.tape, self.node, self.gradients, self._requested, self._constants = (
            tape,
            node,
            gradients,
            requested,
            constants,
        )
        self.sent: dict[int, str] = {}

    @property
    def x(self) -> str:
        """The first input."""
        return self.node.inputs[0]

    @property
    def y(self) -> str:
        """The first output."""
        return self.node.outputs[0]

    @property
    def dy(self) -> str:
        """The gradient of the first output; zeros where the loss does not depend on it."""
        gradient = self.gradients[0]
        return gradient if gradient is not None else self.tape.zeros(self.tape.shape(self.y), self.tape.kinds[self.y])

    def has(self, i: int) -> bool:
        """Return whether the node has an input at this position."""
        return i < len(self.node.inputs) and bool(self.node.inputs[i])

    def wants(self, i: int) -> bool:
        """Return whether the gradient of an input is needed."""
        return self.has(i) and self._requested[i]

    def shape(self, i: int) -> Shape:
        """Return the shape of an input."""
        return self.tape.shape(self.node.inputs[i])

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.node.attrs.get(name, default)

    def constant(self, i: int) -> Array | None:
        """Return the value of an input that is constant; None where it is absent or not."""
        return self._constants.get(self.node.inputs[i]) if self.has(i) else None

    def constant_value(self, i: int, what: str) -> Array:
        """Return the value of an input.

        Raises:
            NoGradient: it is not constant.
        """
        value = self.constant(i)
        if value is None:
            raise NoGradient(f"has {what} that depend on data")
        return value

    def send(self, i: int, gradient: str) -> None:
        """Give the gradient of an input; axes along which the input was broadcast are summed over."""
        if not self.wants(i):
            return
        shape = self.shape(i)
        value = self.tape.unbroadcast(gradient, shape)
        if self.tape.shape(value) != shape:
            raise NoGradient(f"got a gradient of shape {self.tape.shape(value)} for an input of {shape}")
        self.sent[i] = self.tape.add(self.sent[i], value) if i in self.sent else value
