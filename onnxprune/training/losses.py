"""Losses as nodes: distillation from the original, features on the way, labels where there are some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxprune.gradients.backward import Loss
from onnxprune.gradients.static import StaticGraph
from onnxprune.gradients.tape import Tape
from onnxprune.training.parameters import Head, value_to_fit

BALANCE = "balance"
"""The input with the factor of the features' loss, a scalar of float32."""
OFFSET = "offset"
"""The input with the user's loss less its linear part, a scalar of float32."""
TEMPERATURE = 4.0
"""Softness of the distributions that are compared: small probabilities of the original then count as well."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Terms of the loss of a training step.

    Attributes:
        graph: the graph that is trained.
        heads: tensors to fit, and the input with the original's value of each.
        features: tensors on the way, and the input with the original's value of each.
        labels: head -> input with the labels: one row of 0 and 1 per row of scores, or values.
        weight: share of the labels' loss, or of the user's, 0 to 1.
        user_gradients: tensors of a loss that the user computes, each with the input of its gradient; empty without.
    """

    graph: StaticGraph
    heads: Mapping[Head, str]
    features: Mapping[str, str]
    labels: Mapping[Head, str]
    weight: float = 0.5
    user_gradients: Mapping[Head, str] = field(default_factory=dict)

    def emit(self, tape: Tape) -> str:
        """Emit the sum of all."""
        total = _mean(tape, [self._distance(tape, head, target) for head, target in self.heads.items()])
        if self.features:
            parts = [deviation(tape, name, target) for name, target in self.features.items()]
            total = tape.add(total, tape.mul(_mean(tape, parts), BALANCE))
        if self.labels:
            known = _mean(tape, [_labelled(tape, head, labels) for head, labels in self.labels.items()])
            total = tape.add(tape.scale(total, 1 - self.weight), tape.scale(known, self.weight))
        if self.user_gradients:
            # Linear in the tensors, with the gradient of the user's loss, and its value with the offset.
            known = OFFSET
            for head, gradient in self.user_gradients.items():
                known = tape.add(known, tape.total(tape.mul(head.tensor, gradient)))
            total = tape.add(tape.scale(total, 1 - self.weight), tape.scale(known, self.weight))
        return total

    def _distance(self, tape: Tape, head: Head, target: str) -> str:
        """Return how far a head is from the original's."""
        values = value_to_fit(tape, self.graph, head)
        if head.logits:
            return surprise(tape, values, target)
        return deviation(tape, values, target) if head.axis is None else divergence(tape, values, target, head.axis)

    @property
    def loss(self) -> Loss:
        """The function that emits them."""
        return self.emit


def _mean(tape: Tape, parts: Sequence[str]) -> str:
    total = parts[0]
    for part in parts[1:]:
        total = tape.add(total, part)
    return tape.scale(total, 1 / len(parts))


def divergence(tape: Tape, scores: str, target: str, axis: int, temperature: float = TEMPERATURE) -> str:
    """Return T^2 KL(softmax(wanted / T) || softmax(scores / T)), averaged over rows.

    T^2 keeps the size of gradients. Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    student, original = (tape.scale(x, 1 / temperature) for x in (scores, target))
    shape = tape.shape(scores)
    log_q, log_p = (tape.emit("LogSoftmax", [x], shape, axis=axis) for x in (student, original))
    p = tape.unary("Exp", log_p)
    rows = max(1, _size(shape) // shape[axis])
    return tape.scale(tape.total(tape.mul(p, tape.sub(log_p, log_q))), temperature**2 / rows)


def surprise(tape: Tape, logits: str, target: str) -> str:
    """Return the divergence of probabilities that stand alone, in nats per one that is likely in the original.

    sum KL(p || q) / (1 + sum min(p, 1 - p)), with p of the original. The gradient by a logit is q - p, so that a few
    objects count among thousands of places without any, and saturated values still have one.
    """
    q_gap, p_gap = (
        tape.sub(tape.unary("Softplus", x), tape.mul(tape.unary("Sigmoid", target), x)) for x in (logits, target)
    )
    rare = tape.unary("Sigmoid", tape.scale(tape.unary("Abs", target), -1))
    return tape.div(tape.total(tape.sub(q_gap, p_gap)), tape.shift(tape.total(rare), 1.0))


def deviation(tape: Tape, values: str, target: str) -> str:
    """Return |values - wanted|^2 / |wanted|^2."""
    square = tape.total(tape.square(tape.sub(values, target)))
    return tape.div(square, tape.shift(tape.total(tape.square(target)), 1e-12))


def _labelled(tape: Tape, head: Head, labels: str) -> str:
    """Return the cross-entropy of scores, or the mean squared error of values."""
    shape = tape.shape(head.tensor)
    if head.axis is None:
        return tape.scale(tape.total(tape.square(tape.sub(head.tensor, labels))), 1 / max(1, _size(shape)))
    logs = tape.emit("LogSoftmax", [head.tensor], shape, axis=head.axis)
    return tape.scale(tape.total(tape.mul(labels, logs)), -shape[head.axis] / max(1, _size(shape)))


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
