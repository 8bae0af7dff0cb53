"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear: codes, scales and zero points are cut in step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape
from onnxprune.labels.label import Labels
from onnxprune.operators.codes import NARROW, numbers
from onnxprune.operators.context import Step
from onnxprune.operators.operands import Values
from onnxprune.operators.registry import Read, Rule, register

_PER_CHANNEL = "a scale or zero point"


class Quantize(Rule):
    """Codes and numbers have the same labels. Scale and zero point: one for all, per position of an axis, or per block.

    Blocks of ``block_size`` positions share a scale, so they only go as a whole.
    """

    settings = (1, 2)

    def propagate(self, step: Step) -> None:
        """Unite the scale's and the zero point's axes with the data's."""
        labels, shape = step.labels(0), step.shape(0)
        for i in (1, 2):
            own = step.labels(i)
            if not step.has(i) or int(np.prod(step.shape(i))) == 1:
                continue
            if len(step.shape(i)) == 1:
                axis = step.axis(1)
                step.unite(step.axis_ids(labels, axis), step.axis_ids(own, 0), _PER_CHANNEL)
            else:
                self._blocked(step, labels, shape, own, step.shape(i))
        step.set(0, labels)

    @staticmethod
    def _blocked(step: Step, labels: Labels, shape: tuple[int, ...], own: Labels, blocks: tuple[int, ...]) -> None:
        axis = step.axis(1)
        for a, (n, m) in enumerate(zip(shape, blocks, strict=True)):
            if m == 1:
                continue
            ids = step.axis_ids(own, a)
            if a == axis and n != m and ids is not None:
                ids = ids[np.arange(n) // int(step.attr("block_size"))]
            step.unite(step.axis_ids(labels, a), ids, _PER_CHANNEL)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """The shape stays."""
        return [shapes[0]]


class DynamicQuantize(Rule):
    """Quantises in the range from the smallest to the largest number, 0 included: a channel of 0 does not widen it."""

    encodes = True

    def propagate(self, step: Step) -> None:
        """Labels pass to the codes; scale and zero point are single numbers."""
        step.set(0, step.labels(0))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """The range is taken over every axis, so this is where removed channels become 0."""
        return [(0, tuple(range(len(step.shape(0)))))]


class Encode(Quantize):
    """QuantizeLinear."""

    encodes = True


class Decode(Quantize):
    """DequantizeLinear."""

    decodes = True

    def numbers(self, node: Node, i: int, codes: NDArray[Any], read: Read) -> NDArray[Any] | None:
        """(codes - zero point) * scale."""
        scale = read(1) if i == 0 else None
        if scale is None:
            return None
        return numbers(codes, scale, read(2), int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0)))

    def evaluate(self, node: Node, values: Values) -> Any:
        """What the codes stand for, in the scale's type, at opsets too that onnx's evaluator does not know."""
        codes, scale = values[0], values[1]
        if codes is None or scale is None or (codes.dtype.kind not in "iu" and codes.dtype.name not in NARROW):
            return None
        real = self.numbers(node, 0, codes, lambda i: values[i] if i < len(values) else None)
        return None if real is None else real.astype(scale.dtype)


for domain in ("", "com.microsoft"):
    register(domain, "QuantizeLinear", rule=Encode())
    register(domain, "DequantizeLinear", rule=Decode())
register("", "DynamicQuantizeLinear", rule=DynamicQuantize())
