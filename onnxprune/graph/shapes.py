"""Compute shapes of a node's outputs by its rule: the results of onnx's inference, at a fraction of its cost.

onnx infers a single node by way of several protobuf messages. Exported models have thousands of nodes whose shapes only
follow once computed sizes are known, and a second binding of the dynamic sizes changes most activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.operators.registry import Elements, rule_of

Shape = tuple[int, ...]
Known = Callable[[int], "np.ndarray | None"]
"""Position of an input -> its value where that is known; None for an absent one too."""


class RequestedShapes(Sequence[Any]):
    """Values of a node's inputs, each looked up on first access."""

    __slots__ = ("_count", "_known")

    def __init__(self, known: Known, count: int) -> None:
        self._known, self._count = known, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        indices = range(self._count)[i]
        return [self._known(k) for k in indices] if isinstance(indices, range) else self._known(indices)


def known_sizes(shape: Any) -> Shape | None:
    """Return the shape, where every size is known."""
    return None if shape is None or None in shape else tuple(shape)


def output_shapes(node: Node, shapes: Sequence[Any], known: Known) -> list[Shape] | None:
    """Compute shapes of all outputs; None where the rule cannot, or where the node is invalid.

    Args:
        node: a node.
        shapes: shapes of its inputs, None where absent.
        known: values of its inputs.
    """
    for shape, name in zip(shapes, node.inputs, strict=True):
        if (shape is None and name) or (shape is not None and None in shape) or isinstance(shape, Elements):
            return None
    try:
        results = rule_of(node).infer(node, list(shapes), RequestedShapes(known, len(node.inputs)))
    except (LookupError, TypeError, ValueError, ArithmeticError):  # an unexpected form of the operator
        return None
    if results is None or len(results) != len(node.outputs) or any(isinstance(s, Elements) for s in results):
        return None
    known_shapes = [sizes for s in results if (sizes := known_sizes(s)) is not None and min(sizes, default=0) >= 0]
    return known_shapes if len(known_shapes) == len(results) else None
