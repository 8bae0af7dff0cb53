"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.io.elements import DTYPES
from onnxprune.labels.algebra import Shape
from onnxprune.operators.context import Step
from onnxprune.operators.operands import Values, require_value
from onnxprune.operators.registry import (
    Array,
    Inverse,
    Move,
    NewNode,
    NoRule,
    Read,
    Rule,
    Scaling,
    WithoutAddends,
    register,
    with_facts,
)
from onnxprune.operators.sizes import broadcast_pairs, broadcast_shapes


class Elementwise(Rule):
    """Every output has the broadcast labels of the inputs.

    Args:
        inputs: positions of the operands that broadcast; None for all. The others must be scalars or lists of settings
            (Clip's bounds) and are frozen by the engine when they have channels.
        function: the operator on arrays; None to use onnx's reference evaluator.
    """

    pointwise = True

    def __init__(self, inputs: Sequence[int] | None = None, function: Callable[..., Any] | None = None) -> None:
        self._inputs, self._function = inputs, function

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of the operands that broadcast."""
        if self._inputs is None and node.domain == "" and node.version < 8:
            return ()
        places = self._inputs or range(len(node.inputs))
        return broadcast_pairs(*(shapes[i] for i in places if i < len(node.inputs) and node.inputs[i]))

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply the function, where there is one."""
        return None if self._function is None else self._function(*values)

    def propagate(self, step: Step) -> None:
        """Unite the labels of aligned positions and broadcast the others."""
        present = [i for i in (self._inputs or range(len(step.node.inputs))) if step.has(i)]
        labels = step.broadcast(present)
        for o in range(len(step.node.outputs)):
            step.set(o, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the broadcast shape for every output."""
        if self._inputs is None and node.domain == "" and node.version < 8:
            return [None]  # operators of their own, with an attribute for the broadcasting
        operand_shapes = [
            shapes[i] for i in self._inputs or range(len(node.inputs)) if i < len(node.inputs) and node.inputs[i]
        ]
        return [broadcast_shapes(operand_shapes)] * len(node.outputs)


class Sum(Elementwise):
    """Add, Sub and Sum: a known addend can be subtracted again."""

    def inverse(self, node: Node, i: int, constant: Read) -> Inverse | None:
        """Subtract the other operand, which may be an activation."""
        if len(node.inputs) != 2:
            return None
        other, is_subtrahend = constant(1 - i), node.op == "Sub" and i == 1
        sign = -1.0 if node.op == "Sub" else 1.0

        def undo(value: Array, addends: Sequence[Array], _shape: Sequence[int]) -> Array:
            added = other if other is not None else addends[0]
            return added - value if is_subtrahend else (value - added if sign > 0 else value + added)

        return Inverse(undo, None if other is not None else 1 - i)

    def addends(self, node: Node) -> Sequence[int]:
        """Return all inputs: those of a difference are added with a sign."""
        return range(len(node.inputs))

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return the one other input, or a smaller sum; nothing for a minuend."""
        others = [name for i, name in enumerate(node.inputs) if i not in positions]
        if node.op == "Sub" and 0 in positions:
            return None
        if len(others) == 1:
            return WithoutAddends([], {node.outputs[0]: others[0]})
        return WithoutAddends([NewNode(node.op, others, [node.outputs[0]], node.name)], {})

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Divide a constant addend by the factor: c x + b = c (x + b / c)."""
        if len(node.inputs) != 2 or constant(1 - i) is None:
            return None
        return Scaling(factor, {1 - i: lambda value: value / factor})

    def index_shift(self, node: Node, i: int, read: Read) -> int | None:
        """Return the largest addend; 0 for a difference, whose subtrahend is taken not to be negative."""
        other = read(1 - i) if len(node.inputs) == 2 and node.op in ("Add", "Sub") else None
        if other is None or not other.size:
            return None
        return int(np.max(other)) if node.op == "Add" else 0


class Scaled(Elementwise):
    """Mul and Div: a constant factor can be divided out; a factor of 0 makes the input irrelevant."""

    def inverse(self, node: Node, i: int, constant: Read) -> Inverse | None:
        """Divide by a factor, multiply with a divisor."""
        other = constant(1 - i) if len(node.inputs) == 2 else None
        if other is None or (node.op == "Div" and i == 1):
            return None
        if node.op == "Div":
            return Inverse(lambda value, _addends, _shape: value * other)
        return Inverse(lambda value, _addends, _shape: divided(value, other))

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Let a constant operand take up the factor; pass it on beside an activation, inverted from a divisor."""
        if len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
            return None
        through = 1.0 / factor if node.op == "Div" and i == 1 else factor
        if constant(1 - i) is None:
            return Scaling(through)
        # A constant divisor has to shrink where the quotient grows.
        change = 1.0 / factor if node.op == "Div" and i == 0 else through
        return Scaling(1.0, {1 - i: lambda value: value * change})


def divided(value: Array, gain: Array) -> Array:
    """Return value / gain, 0 where the gain is 0."""
    is_zero = np.abs(gain) < 1e-12
    return np.where(is_zero, 0.0, value / np.where(is_zero, 1.0, gain))


def quotient(a: Array, b: Array) -> Array:
    """Divide as ONNX's Div, which truncates integers."""
    if a.dtype.kind in "iu":
        return np.asarray(np.trunc(a / b) if a.dtype.kind == "i" else a // b).astype(a.dtype)
    return np.asarray(a / b)


def power(base: Array, exponent: Array) -> Array:
    """Raise to a power as ONNX's Pow, in the base's type."""
    return np.asarray(np.power(base, exponent)).astype(base.dtype)


class Homogeneous(Elementwise):
    """An operator on one tensor with f(c x) = c ** degree * f(x) for c > 0."""

    def __init__(self, degree: float, function: Callable[..., Any] | None = None) -> None:
        super().__init__([0], function)
        self._degree = degree

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Raise the factor to the degree."""
        return Scaling(factor**self._degree)


class Power(Elementwise):
    """x ** y; a constant scalar y is the degree of a homogeneous function."""

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Raise the factor to a constant power."""
        exponent = constant(1) if i == 0 else None
        if exponent is None or exponent.size != 1:
            return None
        return Scaling(factor ** float(exponent.reshape(())))


class Mod(Elementwise):
    """The remainder, with the sign of the divisor, or with ``fmod`` of the dividend."""

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's mod or fmod."""
        return (np.fmod if node.attrs.get("fmod", 0) else np.mod)(require_value(values, 0), require_value(values, 1))


class Relu(Elementwise):
    """max(x, 0)."""

    chooses = True

    clamps = True

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Pass the factor on."""
        return Scaling(factor)

    def saturation(self, node: Node, constant: Read) -> list[tuple[float, bool]]:
        """Return level 0, below which the result is flat."""
        return [(0.0, True)]


class HardSwish(Elementwise):
    """x * hardsigmoid(x)."""

    def saturation(self, node: Node, constant: Read) -> list[tuple[float, bool]]:
        """Return level -3, below which the result is flat."""
        return [(-3.0, True)]


class HardSigmoid(Elementwise):
    """max(0, min(1, alpha * x + beta))."""

    def saturation(self, node: Node, constant: Read) -> list[tuple[float, bool]]:
        """Return the levels on both sides."""
        slope, shift = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
        return [(-shift / slope, True), ((1.0 - shift) / slope, False)] if slope > 0 else []


class Clip(Elementwise):
    """min(max(x, lowest), highest); the bounds are attributes before opset 11."""

    chooses = True

    clamps = True

    def saturation(self, node: Node, constant: Read) -> list[tuple[float, bool]]:
        """Return the levels of both bounds, where both are known."""
        bounds = []
        for position, name in enumerate(("min", "max"), start=1):
            value = node.attrs.get(name)
            if value is None and position < len(node.inputs) and node.inputs[position]:
                bound = constant(position)
                if bound is None or bound.size != 1:
                    return []
                value = bound.reshape(())
            if value is not None and np.isfinite(float(value)) and abs(float(value)) < 1e30:
                bounds.append((float(value), position == 1))
        return bounds


class Choice(Elementwise):
    """Max, Min and Where: every result is the value of one of the operands."""

    chooses = True


class Same(Elementwise):
    """Identity, and Dropout at inference: input 0 unchanged."""

    moves = Move.SAME


class Cast(Elementwise):
    """Conversion to another element type."""

    moves = Move.CAST

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Pass the factor on to floats."""
        return Scaling(factor) if i == 0 and DTYPES[node.attrs["to"]].kind in "fV" else None

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's cast."""
        return require_value(values, 0).astype(DTYPES[node.attrs["to"]])


class CastLike(Cast):
    """A cast to the type of another tensor, whose channels are irrelevant."""

    def scaling(self, node: Node, i: int, factor: float, constant: Read) -> Scaling | None:
        """Return None: the type is that of another tensor."""
        return None

    def evaluate(self, node: Node, values: Values) -> Any:
        """Return None: onnx's reference evaluator is used."""
        return None

    def propagate(self, step: Step) -> None:
        """Pass the labels of input 0."""
        step.labels(1)
        super().propagate(step)


UNARY = (
    "Tanh Erf Exp Log Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Elu Selu "
    "Celu Gelu Mish Softplus Softsign Swish IsNaN IsInf BitwiseNot BitCast"
).split()
BINARY = "Mean Xor PRelu BitShift BitwiseAnd BitwiseOr BitwiseXor".split()
ROUNDED: dict[str, Callable[..., Any] | None] = {
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": None,
    "Sign": None,
    "ThresholdedRelu": None,
    "Shrink": None,
}
"""Operators on one tensor that jump, and their functions for small values, None for those of onnx's evaluator."""
COMPARED: dict[str, Callable[..., Any]] = {
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
}
"""The same on tensors that broadcast."""
HOMOGENEOUS: dict[str, tuple[float, Callable[..., Any] | None]] = {
    "Neg": (1.0, np.negative),
    "Abs": (1.0, np.abs),
    "LeakyRelu": (1.0, None),
    "Sqrt": (0.5, np.sqrt),
    "Reciprocal": (-1.0, lambda x: np.asarray(1 / x, dtype=x.dtype)),
}
"""Operators on one tensor that pass a positive factor on: degree and function."""

register("", *UNARY, rule=Elementwise([0]))
register("", *BINARY, rule=Elementwise())
register("", "Sigmoid", rule=with_facts(Elementwise([0]), bounded=True, logistic=True))
register("", "Not", rule=Elementwise([0], np.logical_not))
for name, rounded in ROUNDED.items():
    register("", name, rule=with_facts(Elementwise([0], rounded), jumps=True))
for name, function in COMPARED.items():
    register("", name, rule=Elementwise(None, function))
for name, (degree, homogeneous) in HOMOGENEOUS.items():
    register("", name, rule=with_facts(Homogeneous(degree, homogeneous), unrounded=name in ("Neg", "Abs")))
register("", "Pow", rule=Power(None, power))
register("", "Max", "Min", rule=Choice())
register("", "Where", rule=Choice(None, np.where))
register("", "Mod", rule=with_facts(Mod(), jumps=True))
register("", "Relu", rule=Relu([0]))
register("", "HardSwish", rule=HardSwish([0]))
register("", "HardSigmoid", rule=with_facts(HardSigmoid([0]), bounded=True))
register("", "Clip", rule=Clip([0]))
register("", "Add", rule=Sum(None, np.add))
register("", "Sub", rule=Sum(None, np.subtract))
register("", "Sum", rule=Sum())
register("", "Mul", rule=Scaled(None, np.multiply))
register("", "Div", rule=Scaled(None, quotient))
register("", "Identity", rule=Same([0], lambda x: x))
register("", "Dropout", rule=with_facts(Same([0]), training=2))
register("", "Cast", rule=Cast([0]))
register("", "CastLike", rule=CastLike([0]))
# Noise of a tensor's sizes (its values, if any, are probabilities per position): pruned with the channels.
register("", "RandomNormalLike", "RandomUniformLike", rule=with_facts(Elementwise([0]), random=True))
register("", "Bernoulli", rule=with_facts(Elementwise([0]), random=True, draws_by=0))
register("", "RandomNormal", "RandomUniform", rule=with_facts(NoRule(), random=True))
register("", "Multinomial", rule=with_facts(NoRule(), random=True, draws_by=0))
register("", "SwiGLU", rule=Elementwise())
# Activations of the oldest opsets and of onnxruntime, with parameters shared by all channels.
register("", "Affine", "ParametricSoftplus", "Scale", "ScaledTanh", rule=Elementwise([0]))
