"""Treatment of channels that an orthogonal matrix turns, by operators that may read a turned stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.operators.operands import Array


class Treatment(Enum):
    """Treatment of turned channels by an operator."""

    CONTRACT = "sums over them, or gives them, by a product with weights"
    ADD = "adds tensors that are all turned"
    CHOOSE = "chooses between tensors that are all turned, by a condition"
    MULTIPLY = "multiplies all of them by a number per position, or each by its own"
    DIVIDE = "divides all of them by a number per position, or each by its own"
    POWER = "raises each to a power"
    MEAN = "averages over axes"
    SUM = "sums over axes"
    NORM = "takes the root of the sum of squares over axes, or that sum"
    UNIT = "divides by the norm over an axis"
    ROOT_MEAN_SQUARE = "divides by the root mean square, and scales each"
    LAYER_NORM = "subtracts the mean, divides by the root mean square, scales and shifts each"
    SCALE_AND_SHIFT = "scales and shifts each, by statistics"
    FILL = "gives all of them one number"


class Turning(NamedTuple):
    """The treatment of turned channels by an operator.

    Attributes:
        treatment: its treatment of the channels.
        addends: number of leading inputs whose sum is normalised.
        sign: sign of every addend but the first, 1 or -1.
        bias: input that is added per channel of the result; None: there is none.
        summed: function from a node and the ranks of its inputs to the summed axes of each; None from it where the
            form is not known.
    """

    treatment: Treatment
    addends: int = 1
    sign: int = 1
    bias: int | None = None
    summed: Callable[[Node, Sequence[int]], list[set[int]] | None] | None = None


def _matrix_product(node: Node, ranks: Sequence[int]) -> list[set[int]] | None:
    if any(node.attrs.get(f"transBatch{side}", 0) for side in "AB"):
        return None
    flipped = [bool(node.attrs.get(name, 0)) for name in ("transA", "transB")]
    left = ranks[0] - (2 if flipped[0] and ranks[0] > 1 else 1)
    right = ranks[1] - (1 if flipped[1] or ranks[1] == 1 else 2)
    return [{left}, {right}]


def _gemm(node: Node, ranks: Sequence[int]) -> list[set[int]] | None:
    first, second = 0 if node.attrs.get("transA", 0) else 1, 1 if node.attrs.get("transB", 0) else 0
    return [{first}, {second}, *(set[int]() for _ in ranks[2:])]


def _convolution(node: Node, ranks: Sequence[int]) -> list[set[int]] | None:
    return None if node.attrs.get("group", 1) != 1 else [{1}, {1}, *(set[int]() for _ in ranks[2:])]


def _equation(node: Node, ranks: Sequence[int]) -> list[set[int]] | None:
    terms, _, result = str(node.attrs["equation"]).replace(" ", "").partition("->")
    if "." in terms or not result:
        return None
    return [{a for a, c in enumerate(term) if c not in result} for term in terms.split(",")]


def _projections(node: Node, ranks: Sequence[int]) -> list[set[int]] | None:
    return [{2}, {0}, *(set[int]() for _ in ranks[2:])]


_STANDARD = {
    "MatMul": Turning(Treatment.CONTRACT, summed=_matrix_product),
    "Gemm": Turning(Treatment.CONTRACT, bias=2, summed=_gemm),
    "Conv": Turning(Treatment.CONTRACT, bias=2, summed=_convolution),
    "Einsum": Turning(Treatment.CONTRACT, summed=_equation),
    "Add": Turning(Treatment.ADD),
    "Sum": Turning(Treatment.ADD),
    "Neg": Turning(Treatment.ADD),
    "Sub": Turning(Treatment.ADD, sign=-1),
    "Where": Turning(Treatment.CHOOSE),
    "Mul": Turning(Treatment.MULTIPLY),
    "Div": Turning(Treatment.DIVIDE),
    "Pow": Turning(Treatment.POWER),
    "ReduceMean": Turning(Treatment.MEAN),
    "GlobalAveragePool": Turning(Treatment.MEAN),
    "ReduceSum": Turning(Treatment.SUM),
    "ReduceL2": Turning(Treatment.NORM),
    "ReduceSumSquare": Turning(Treatment.NORM),
    "LpNormalization": Turning(Treatment.UNIT),
    "RMSNormalization": Turning(Treatment.ROOT_MEAN_SQUARE),
    "SimplifiedLayerNormalization": Turning(Treatment.ROOT_MEAN_SQUARE),
    "LayerNormalization": Turning(Treatment.LAYER_NORM),
    "BatchNormalization": Turning(Treatment.SCALE_AND_SHIFT),
    "ConstantOfShape": Turning(Treatment.FILL),
    "Pad": Turning(Treatment.FILL),
}
_MICROSOFT = {
    "FusedMatMul": Turning(Treatment.CONTRACT, summed=_matrix_product),
    "Attention": Turning(Treatment.CONTRACT, bias=2, summed=_projections),
    "SimplifiedLayerNormalization": Turning(Treatment.ROOT_MEAN_SQUARE),
    "SkipSimplifiedLayerNormalization": Turning(Treatment.ROOT_MEAN_SQUARE, addends=2),
    "LayerNormalization": Turning(Treatment.LAYER_NORM),
    "SkipLayerNormalization": Turning(Treatment.LAYER_NORM, addends=2),
}


def turning_of(node: Node) -> Turning | None:
    """Return the treatment of turned channels by a node; None for an operator that takes them singly or moves them."""
    table = {"": _STANDARD, "com.microsoft": _MICROSOFT}.get(node.domain, {})
    return table.get(node.op)


def is_square(node: Node, read: Callable[[int], Array | None]) -> bool:
    """Return whether a node squares its first input.

    Args:
        node: the node.
        read: function from the position of an input to its value, None where it is not constant.
    """
    turning = turning_of(node)
    if turning is None or turning.treatment not in (Treatment.MULTIPLY, Treatment.POWER):
        return False
    if turning.treatment is Treatment.MULTIPLY:
        return node.inputs[0] == node.inputs[1]
    exponent = read(1)
    return exponent is not None and bool((np.asarray(exponent, np.float64) == 2).all())


def reduced_axes(node: Node, rank: int, read: Callable[[int], Array | None]) -> list[int] | None:
    """Return the axes that a reduction works on; None where they are not known.

    Args:
        node: the node.
        rank: rank of its data.
        read: function from the position of an input to its value, None where it is not constant.
    """
    if node.op == "GlobalAveragePool":
        return list(range(2, rank))
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1 and node.inputs[1]:
        value = read(1)
        if value is None:
            return None
        axes = value.ravel().tolist()
    if not axes:
        return [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))
    return [int(a) % rank for a in axes]
