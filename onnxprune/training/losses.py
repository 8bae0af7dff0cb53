"""Losses as nodes: distillation from the original, features on the way, labels where there are some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from onnxprune.gradients.backward import Loss
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
        heads: tensors to fit, and the input with the original's value of each.
        features: tensors on the way, and the input with the original's value of each.
        labels: head -> input with the labels: one row of 0 and 1 per row of scores, or values.
        counted: tensor -> input with 1 at its positions and 0 at those that are padding, float32, which broadcasts; all
            positions of other tensors count.
        weight: share of the labels' loss, or of the user's, 0 to 1.
        user_gradients: tensors of a loss that the user computes, each with the input of its gradient; empty without.
    """

    heads: Mapping[Head, str]
    features: Mapping[str, str]
    labels: Mapping[Head, str]
    counted: Mapping[str, str] = field(default_factory=dict)
    weight: float = 0.5
    user_gradients: Mapping[Head, str] = field(default_factory=dict)

    def emit(self, tape: Tape) -> str:
        """Emit the sum of all."""
        total = _mean(tape, [self._distance(tape, head, target) for head, target in self.heads.items()])
        if self.features:
            parts = [deviation(tape, n, target, self.counted.get(n, "")) for n, target in self.features.items()]
            total = tape.add(total, tape.mul(_mean(tape, parts), BALANCE))
        if self.labels:
            heads = self.labels.items()
            known = _mean(tape, [_labelled(tape, h, labels, self.counted.get(h.tensor, "")) for h, labels in heads])
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
        values, counted = value_to_fit(tape, head), self.counted.get(head.tensor, "")
        if head.logits:
            return surprise(tape, values, target, counted)
        if head.axis is None:
            return deviation(tape, values, target, counted)
        return divergence(tape, values, target, head.axis, counted=counted)

    @property
    def loss(self) -> Loss:
        """The function that emits them."""
        return self.emit


def _mean(tape: Tape, parts: Sequence[str]) -> str:
    total = parts[0]
    for part in parts[1:]:
        total = tape.add(total, part)
    return tape.scale(total, 1 / len(parts))


def divergence(
    tape: Tape, scores: str, target: str, axis: int, temperature: float = TEMPERATURE, *, counted: str = ""
) -> str:
    """Return T^2 KL(softmax(wanted / T) || softmax(scores / T)), averaged over rows.

    T^2 keeps the size of gradients. Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    student, original = (tape.scale(x, 1 / temperature) for x in (scores, target))
    shape = tape.shape(scores)
    log_q, log_p = (tape.emit("LogSoftmax", [x], shape, axis=axis) for x in (student, original))
    p = tape.unary("Exp", log_p)
    total = _total(tape, tape.mul(p, tape.sub(log_p, log_q)), counted)
    return _over(tape, total, temperature**2, shape, counted, axis)


def surprise(tape: Tape, logits: str, target: str, counted: str = "") -> str:
    """Return the divergence of probabilities that stand alone, in nats per one that is likely in the original.

    sum KL(p || q) / (1 + sum min(p, 1 - p)), with p of the original. The gradient by a logit is q - p, so that a few
    objects count among thousands of places without any, and saturated values still have one.
    """
    q_gap, p_gap = (
        tape.sub(tape.unary("Softplus", x), tape.mul(tape.unary("Sigmoid", target), x)) for x in (logits, target)
    )
    rare = tape.unary("Sigmoid", tape.scale(tape.unary("Abs", target), -1))
    return tape.div(_total(tape, tape.sub(q_gap, p_gap), counted), tape.shift(_total(tape, rare, counted), 1.0))


def deviation(tape: Tape, values: str, target: str, counted: str = "") -> str:
    """Return |values - wanted|^2 / |wanted|^2."""
    square = _total(tape, tape.square(tape.sub(values, target)), counted)
    return tape.div(square, tape.shift(_total(tape, tape.square(target), counted), 1e-12))


def _labelled(tape: Tape, head: Head, labels: str, counted: str) -> str:
    """Return the cross-entropy of scores, or the mean squared error of values."""
    shape = tape.shape(head.tensor)
    if head.axis is None:
        return _over(tape, _total(tape, tape.square(tape.sub(head.tensor, labels)), counted), 1, shape, counted)
    logs = tape.emit("LogSoftmax", [head.tensor], shape, axis=head.axis)
    return _over(tape, _total(tape, tape.mul(labels, logs), counted), -1, shape, counted, head.axis)


def _total(tape: Tape, values: str, counted: str) -> str:
    """Return the sum of all values at positions that count."""
    return tape.total(tape.mul(values, counted) if counted else values)


def _over(tape: Tape, total: str, factor: float, shape: Sequence[int], counted: str, axis: int | None = None) -> str:
    """Return a sum times a factor, over the number of values that count, or of rows of them along an axis."""
    number = max(1, prod(shape)) / (1 if axis is None else max(1, shape[axis]))
    if not counted:
        return tape.scale(total, factor / number)
    per_position = number / prod(tape.shape(counted))
    return tape.div(tape.scale(total, factor / per_position), tape.total(counted))
