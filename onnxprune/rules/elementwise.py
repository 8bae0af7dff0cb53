"""Operators that work position by position, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape
from onnxprune.rules.context import Step
from onnxprune.rules.registry import Move, Rule, register
from onnxprune.rules.sizes import broadcast_shapes


class Elementwise(Rule):
    """Every output has the broadcast labels of the inputs.

    Args:
        inputs: positions of the operands that broadcast; None for all. The others must be scalars or lists of settings
            (Clip's bounds) and are frozen by the engine when they have channels.
    """

    def __init__(self, inputs: Sequence[int] | None = None) -> None:
        self._inputs = inputs

    def propagate(self, step: Step) -> None:
        """Unite what meets, keep what broadcasts."""
        present = [i for i in (self._inputs or range(len(step.node.inputs))) if step.has(i)]
        labels = step.broadcast(present)
        for o in range(len(step.node.outputs)):
            step.set(o, labels)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Every output has the broadcast shape."""
        chosen = [shapes[i] for i in self._inputs or range(len(node.inputs)) if i < len(node.inputs) and node.inputs[i]]
        return [broadcast_shapes(chosen)] * len(node.outputs)


class Same(Elementwise):
    """Identity, and Dropout where nothing is dropped: input 0 as it is."""

    moves = Move.SAME


class Cast(Elementwise):
    """Another type."""

    moves = Move.CAST


class CastLike(Cast):
    """A cast to the type of another tensor, whose channels do not matter."""

    def propagate(self, step: Step) -> None:
        """The labels of input 0."""
        step.labels(1)
        super().propagate(step)


UNARY = (
    "Relu Sigmoid Tanh Erf Sqrt Exp Log Abs Neg Floor Ceil Round Sign Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh "
    "Atanh LeakyRelu Elu Selu Celu Gelu HardSwish HardSigmoid Mish Softplus Softsign ThresholdedRelu Shrink Swish "
    "Not IsNaN IsInf Reciprocal BitwiseNot BitCast"
).split()
BINARY = (
    "Add Sub Mul Div Pow Mod Min Max Sum Mean And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual Where PRelu "
    "BitShift BitwiseAnd BitwiseOr BitwiseXor"
).split()

register("", *UNARY, rule=Elementwise([0]))
register("", "Clip", rule=Elementwise([0]))
register("", "Identity", "Dropout", rule=Same([0]))
register("", "Cast", rule=Cast([0]))
register("", "CastLike", rule=CastLike([0]))
register("", *BINARY, rule=Elementwise())
register("", "SwiGLU", rule=Elementwise())
# Forms of an activation that the oldest models and onnxruntime have, with numbers that hold for all channels.
register("", "Affine", "ParametricSoftplus", "Scale", "ScaledTanh", rule=Elementwise([0]))
