"""Gradients of operators that work position by position, with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from onnxprune.gradients.tape import Reverse, Tape
from onnxprune.operators.registry import register_gradient

MS = "com.microsoft"

# -- functions of one input --------------------------------------------------------------------------------------------

Derivative = Callable[[Tape, str, str], str]
"""(tape, input, output) -> derivative at every position."""

_TINY = 1e-30


def _sqrt(t: Tape, x: str, y: str) -> str:
    # At 0 the slope is infinite: a large number keeps 0 * slope at 0, which norms of zero vectors need.
    return t.scale(t.unary("Reciprocal", t.emit("Max", [y, t.scalar(_TINY, y)], t.shape(y))), 0.5)


def _gauss(t: Tape, x: str, factor: float, width: float) -> str:
    """Return factor * exp(-width * x^2)."""
    return t.scale(t.unary("Exp", t.scale(t.square(x), -width)), factor)


_DERIVATIVES: dict[str, Derivative] = {
    "Sigmoid": lambda t, x, y: t.mul(y, t.sub(t.scalar(1, y), y)),
    "Tanh": lambda t, x, y: t.sub(t.scalar(1, y), t.square(y)),
    "Exp": lambda t, x, y: y,
    "Log": lambda t, x, y: t.unary("Reciprocal", x),
    "Sqrt": _sqrt,
    "Reciprocal": lambda t, x, y: t.neg(t.square(y)),
    "Abs": lambda t, x, y: t.unary("Sign", x),
    "Sin": lambda t, x, y: t.unary("Cos", x),
    "Cos": lambda t, x, y: t.neg(t.unary("Sin", x)),
    "Tan": lambda t, x, y: t.shift(t.square(y), 1),
    "Sinh": lambda t, x, y: t.unary("Cosh", x),
    "Cosh": lambda t, x, y: t.unary("Sinh", x),
    "Atan": lambda t, x, y: t.unary("Reciprocal", t.shift(t.square(x), 1)),
    "Asin": lambda t, x, y: t.unary("Reciprocal", t.unary("Cos", y)),
    "Acos": lambda t, x, y: t.neg(t.unary("Reciprocal", t.unary("Sin", y))),
    "Asinh": lambda t, x, y: t.unary("Reciprocal", t.unary("Cosh", y)),
    "Acosh": lambda t, x, y: t.unary("Reciprocal", t.unary("Sinh", y)),
    "Atanh": lambda t, x, y: t.unary("Reciprocal", t.sub(t.scalar(1, x), t.square(x))),
    "Erf": lambda t, x, y: _gauss(t, x, 2 / math.sqrt(math.pi), 1.0),
    "Softplus": lambda t, x, y: t.unary("Sigmoid", x),
}


def _by_derivative(derivative: Derivative, r: Reverse) -> None:
    r.send(0, r.tape.mul(r.dy, derivative(r.tape, r.x, r.y)))


for _name, _function in _DERIVATIVES.items():
    register_gradient("", _name)(partial(_by_derivative, _function))


@register_gradient("", "Relu")
def relu(r: Reverse) -> None:
    """Pass the gradient where the output is above 0: its sign is the mask."""
    r.send(0, r.tape.mul(r.dy, r.tape.step(r.y)))


@register_gradient("", "Neg")
def negative(r: Reverse) -> None:
    """Negate the gradient."""
    r.send(0, r.tape.neg(r.dy))


@register_gradient("", "Identity", "Dropout")
def identity(r: Reverse) -> None:
    """Pass the gradient on: Dropout is the identity in inference."""
    r.send(0, r.dy)


@register_gradient("", "Cast", "CastLike")
def cast(r: Reverse) -> None:
    """Return the gradient in the type of the input."""
    r.send(0, r.tape.cast(r.dy, r.tape.kinds[r.x]))


def _slopes(t: Tape, condition: str, below: float, like: str) -> str:
    """Return 1 where a condition holds, ``below`` elsewhere."""
    return t.shift(t.scale(t.cast(condition, t.kinds[like]), 1 - below), below)


@register_gradient("", "LeakyRelu")
def leaky_relu(r: Reverse) -> None:
    """Scale the gradient by alpha below 0."""
    t = r.tape
    r.send(0, t.mul(r.dy, _slopes(t, t.positive(r.x), r.attr("alpha", 0.01), r.x)))


@register_gradient("", "PRelu")
def prelu(r: Reverse) -> None:
    """Scale the gradient by the slope below 0; the slope gets the part there."""
    t, x, slope = r.tape, r.x, r.node.inputs[1]
    above = t.cast(t.positive(x), t.kinds[x])
    below = t.sub(t.scalar(1, x), above)
    r.send(0, t.mul(r.dy, t.add(above, t.mul(below, slope))))
    if r.wants(1):
        r.send(1, t.mul(r.dy, t.mul(below, x)))


def _exponential(r: Reverse, alpha: float, gamma: float) -> None:
    """Gradient of gamma * x above 0, and of gamma * alpha * (exp(x) - 1) below."""
    t = r.tape
    above = t.cast(t.positive(r.x), t.kinds[r.x])
    low = t.shift(r.y, gamma * alpha)
    r.send(0, t.mul(r.dy, t.add(t.scale(above, gamma), t.mul(t.sub(t.scalar(1, r.x), above), low))))


@register_gradient("", "Elu")
def elu(r: Reverse) -> None:
    """1 above 0, alpha * exp(x) below."""
    _exponential(r, r.attr("alpha", 1.0), 1.0)


@register_gradient("", "Selu")
def selu(r: Reverse) -> None:
    """Gamma above 0, gamma * alpha * exp(x) below."""
    _exponential(r, r.attr("alpha", 1.67326319217681884765625), r.attr("gamma", 1.05070102214813232421875))


@register_gradient("", "HardSigmoid")
def hard_sigmoid(r: Reverse) -> None:
    """Pass alpha times the gradient between 0 and 1."""
    t = r.tape
    inside = t.either(t.positive(r.y), t.compare("Less", r.y, t.scalar(1, r.y)))
    r.send(0, t.mask(t.scale(r.dy, r.attr("alpha", 0.2)), inside))


@register_gradient("", "HardSwish")
def hard_swish(r: Reverse) -> None:
    """0 below -3, 1 above 3, x / 3 + 1 / 2 between."""
    t, x = r.tape, r.x
    above = t.compare("Greater", x, t.scalar(-3, x))
    within = t.either(above, t.compare("Less", x, t.scalar(3, x)))
    slope = t.mask(t.shift(t.scale(x, 1 / 3), 0.5), within)
    beyond = t.cast(t.compare("GreaterOrEqual", x, t.scalar(3, x)), t.kinds[x])
    r.send(0, t.mul(r.dy, t.add(slope, beyond)))


def _gelu(t: Tape, x: str) -> str:
    """Return the derivative of x * Phi(x)."""
    cdf = t.scale(t.shift(t.unary("Erf", t.scale(x, math.sqrt(0.5))), 1), 0.5)
    return t.add(cdf, t.mul(x, _gauss(t, x, 1 / math.sqrt(2 * math.pi), 0.5)))


def _gelu_tanh(t: Tape, x: str) -> str:
    """Return the derivative of x / 2 * (1 + tanh(c * (x + 0.044715 x^3)))."""
    c, square = math.sqrt(2 / math.pi), t.square(x)
    curve = t.unary("Tanh", t.scale(t.mul(x, t.shift(t.scale(square, 0.044715), 1)), c))
    slope = t.scale(t.shift(t.scale(square, 3 * 0.044715), 1), 0.5 * c)
    bend = t.mul(t.mul(x, slope), t.sub(t.scalar(1, x), t.square(curve)))
    return t.add(t.scale(t.shift(curve, 1), 0.5), bend)


def _swish(t: Tape, x: str, alpha: float) -> str:
    """Return the derivative of x * sigmoid(alpha * x)."""
    s = t.unary("Sigmoid", t.scale(x, alpha))
    return t.add(s, t.scale(t.mul(x, t.mul(s, t.sub(t.scalar(1, s), s))), alpha))


@register_gradient("", "Gelu")
def gelu(r: Reverse) -> None:
    """Exact, or approximated by tanh."""
    derivative = _gelu_tanh if r.attr("approximate", "none") == "tanh" else _gelu
    r.send(0, r.tape.mul(r.dy, derivative(r.tape, r.x)))


@register_gradient(MS, "Gelu", "BiasGelu")
def bias_gelu(r: Reverse) -> None:
    """Exact, of the sum of input and bias."""
    _of_sum(r, _gelu)


@register_gradient(MS, "FastGelu")
def fast_gelu(r: Reverse) -> None:
    """Approximated by tanh, of the sum of input and bias."""
    _of_sum(r, _gelu_tanh)


def _of_sum(r: Reverse, derivative: Callable[[Tape, str], str]) -> None:
    t = r.tape
    total = t.add(r.x, r.node.inputs[1]) if r.has(1) else r.x
    gradient = t.mul(r.dy, derivative(t, total))
    for i in range(len(r.node.inputs)):
        r.send(i, gradient)


@register_gradient("", "Swish")
def swish(r: Reverse) -> None:
    """X * sigmoid(alpha * x)."""
    r.send(0, r.tape.mul(r.dy, _swish(r.tape, r.x, r.attr("alpha", 1.0))))


@register_gradient(MS, "QuickGelu")
def quick_gelu(r: Reverse) -> None:
    """X * sigmoid(1.702 * x)."""
    r.send(0, r.tape.mul(r.dy, _swish(r.tape, r.x, r.attr("alpha", 1.702))))


@register_gradient("", "Clip")
def clip(r: Reverse) -> None:
    """Pass the gradient between the bounds; a bound gets the part at it."""
    t, dy = r.tape, r.dy
    inside = ""
    for i, name, op in ((1, "min", "Greater"), (2, "max", "Less")):
        bound = r.node.inputs[i] if r.has(i) else ""
        if not bound and name in r.node.attrs:
            bound = t.scalar(r.attr(name), r.x)
        if bound:
            within = t.compare(op, r.x, bound)
            inside = t.either(inside, within) if inside else within
            if r.wants(i):
                r.send(i, t.mask(dy, t.emit("Not", [within], t.shape(within), bool)))
    r.send(0, t.mask(dy, inside) if inside else dy)


# -- functions of several inputs ---------------------------------------------------------------------------------------


@register_gradient("", "Add", "Sum")
def add(r: Reverse) -> None:
    """Give the gradient to every summand."""
    for i in range(len(r.node.inputs)):
        r.send(i, r.dy)


@register_gradient("", "Mean")
def mean(r: Reverse) -> None:
    """Give every input its share of the gradient."""
    for i in range(len(r.node.inputs)):
        r.send(i, r.tape.scale(r.dy, 1 / len(r.node.inputs)))


@register_gradient("", "Sub")
def subtract(r: Reverse) -> None:
    """Give the second input the negative."""
    r.send(0, r.dy)
    if r.wants(1):
        r.send(1, r.tape.neg(r.dy))


@register_gradient("", "Mul")
def multiply(r: Reverse) -> None:
    """Give each factor the gradient times the other."""
    for i in (0, 1):
        if r.wants(i):
            r.send(i, r.tape.mul(r.dy, r.node.inputs[1 - i]))


@register_gradient("", "Div")
def divide(r: Reverse) -> None:
    """D(a / b) = (da - y db) / b."""
    t = r.tape
    share = t.div(r.dy, r.node.inputs[1])
    r.send(0, share)
    if r.wants(1):
        r.send(1, t.neg(t.mul(share, r.y)))


@register_gradient("", "Pow")
def power(r: Reverse) -> None:
    """D(x^e) = e x^(e - 1) dx + y log(x) de, where the second counts for positive x alone."""
    t, (x, e) = r.tape, r.node.inputs
    exponent = t.cast(e, t.kinds[x])
    if r.wants(0):
        value = r.constant(1)
        if value is not None and value.size == 1 and float(value.ravel()[0]) == 2:
            slope = t.scale(x, 2)
        else:
            less = t.shift(exponent, -1)
            slope = t.mul(exponent, t.emit("Pow", [x, less], np.broadcast_shapes(t.shape(x), t.shape(e))))
        r.send(0, t.mul(r.dy, slope))
    if r.wants(1):
        above = t.positive(x)
        safe = t.emit("Where", [above, x, t.scalar(1, x)], t.shape(x), t.kinds[x])
        r.send(1, t.cast(t.mul(t.mul(r.dy, r.y), t.unary("Log", safe)), t.kinds[e]))


@register_gradient("", "Max", "Min")
def extreme(r: Reverse) -> None:
    """Give the gradient to the first input that equals the result."""
    t, free = r.tape, ""
    for i, name in enumerate(r.node.inputs):
        mask = t.cast(t.compare("Equal", r.y, name), t.kinds[r.y])
        if free:
            mask = t.mul(mask, free)
        if r.wants(i):
            r.send(i, t.mul(r.dy, mask))
        if i + 1 < len(r.node.inputs):
            others = t.sub(t.scalar(1, mask), mask)
            free = t.mul(free, others) if free else others


@register_gradient("", "Where")
def where(r: Reverse) -> None:
    """Give each input the gradient where it was chosen."""
    t, condition = r.tape, r.node.inputs[0]
    if r.wants(1):
        r.send(1, t.mask(r.dy, condition))
    if r.wants(2):
        r.send(2, t.mask(r.dy, t.emit("Not", [condition], t.shape(condition), bool)))


@register_gradient("", "Mod")
def modulo(r: Reverse) -> None:
    """Almost everywhere a shifted copy of the first input."""
    r.send(0, r.dy)
    if r.wants(1):
        t, (a, b) = r.tape, r.node.inputs
        r.send(1, t.neg(t.mul(r.dy, t.div(t.sub(a, r.y), b))))


@register_gradient("", "Floor", "Ceil", "Round", "Sign", "OneHot", "RandomNormalLike", "RandomUniformLike", "Bernoulli")
def steps(r: Reverse) -> None:
    """Nothing: the result does not depend on the values, or only in steps."""
