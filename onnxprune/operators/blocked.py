"""onnxruntime's own layout for one processor (domain com.microsoft.nchwc): channels in blocks of its vector units.

A model that was saved with all optimisations holds weights whose numbers are stored block by block, under a shape that
does not say so, and the file does not name the block. They cannot be cut; what lies outside of these operators can.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from onnxprune.graph.view import Node
from onnxprune.labels.combine import Shape
from onnxprune.operators.context import Step
from onnxprune.operators.registry import Rule, register
from onnxprune.operators.sizes import window_sizes

DOMAIN = "com.microsoft.nchwc"


class Blocked(Rule):
    """Nothing goes; sizes are known, so that the rest of the model can be followed."""

    def __init__(self, weights: tuple[int, ...] = ()) -> None:
        self.weights = weights

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Of a convolution, as elsewhere."""
        return 0 if not self.weights or out is None or shapes[1] is None else prod(out) * prod(shapes[1][1:])

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Axis 1."""
        return 1

    def propagate(self, step: Step) -> None:
        """Freeze every input."""
        for i in range(len(step.node.inputs)):
            why = "channels are stored in blocks for one kind of processor; cut the model as it was before that"
            step.freeze(step.labels(i), "unsupported-form", why)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """As the operators of the same names, on [N, C, ...]."""
        x = shapes[0]
        if x is None:
            return [None]
        if node.op == "ReorderInput":
            return [(x[0], x[-1], *x[1:-1]) if node.attrs.get("channels_last", 0) else x]
        if node.op == "ReorderOutput":
            plain = (x[0], int(node.attrs["channels"]), *x[2:])
            return [(plain[0], *plain[2:], plain[1]) if node.attrs.get("channels_last", 0) else plain]
        if node.op == "Upsample":
            scales = node.attrs["scales"]
            return [tuple(None if n is None else int(n * s) for n, s in zip(x, scales, strict=True))]
        if node.op.startswith("Global"):
            return [(*x[:2], *[1] * (len(x) - 2))]
        if node.op != "Conv":
            return [(*x[:2], *window_sizes(x[2:], tuple(node.attrs["kernel_shape"]), node.attrs))]
        w = shapes[1]
        return [None if w is None else (x[0], w[0], *window_sizes(x[2:], w[2:], node.attrs))]


register(DOMAIN, "Conv", rule=Blocked(weights=(1,)))
register(
    DOMAIN,
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    *("Upsample", "ReorderInput", "ReorderOutput"),
    rule=Blocked(),
)
