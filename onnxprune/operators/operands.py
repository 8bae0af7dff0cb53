"""Operands that say how a node works (axes, sizes, starts), whether inputs or attributes of it, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxprune.graph.view import Node


Array = NDArray[Any]
Shape = tuple[int, ...]
Values = Sequence["Array | None"]


def given(values: Values, i: int) -> Array:
    """An input that the operator always has.

    Raises:
        ValueError: its value is not known.
    """
    value = values[i]
    if value is None:
        raise ValueError(f"input {i} is not known")
    return value


def whole_numbers(value: Array) -> list[int]:
    """A scalar or a vector of integers as Python's numbers, with which a handful is computed faster."""
    return [int(n) for n in value.ravel().tolist()]


def listed(node: Node, values: Values, position: int, name: str, since: int) -> list[int] | None:
    """Numbers that are an operand from opset ``since`` on and an attribute before; None where there are none.

    Raises:
        ValueError: the operand is there, its value is not known.
    """
    if node.version < since:
        stated = node.attrs.get(name)
        return None if stated is None else list(stated)
    if len(node.inputs) <= position or not node.inputs[position]:
        return None
    return whole_numbers(given(values, position))


def needed(value: list[int] | None) -> list[int]:
    """The numbers; raises ValueError where there are none."""
    if value is None:
        raise ValueError("a needed operand is absent")
    return value


def axes_of(node: Node, values: Values, position: int = 1) -> tuple[int, ...] | None:
    """Axes from an operand, else from the attribute, whatever the opset; None where neither is there."""
    operand = values[position] if len(values) > position else None
    if operand is not None:
        return tuple(whole_numbers(operand))
    axes = node.attrs.get("axes")
    return None if axes is None else tuple(axes)


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from 0; raises ValueError where there is none such."""
    if not -rank <= axis < rank:
        raise ValueError(axis)
    return axis % rank


def joined(shapes: Iterable[Shape]) -> Shape:
    """numpy's broadcasting; ValueError where shapes do not fit."""
    known = list(shapes)
    first = known[0]
    if known.count(first) == len(known):
        return first
    rank = max(map(len, known))
    result = []
    for column in zip(*((1,) * (rank - len(s)) + s for s in known), strict=True):
        wide = set(column) - {1}
        if len(wide) > 1:
            raise ValueError(column)
        result.append(wide.pop() if wide else 1)
    return tuple(result)


def slice_of(start: int, end: int, step: int, size: int) -> slice:
    """ONNX's clamped slice along an axis of ``size`` as a Python slice."""
    if step > 0:
        return slice(*slice(start, end, step).indices(size))
    start = max(0, min(start + size if start < 0 else start, size - 1))
    end = max(end + size if -size <= end < 0 else end, -1) if end >= -size else -1
    return slice(start, None if end < 0 else end, step)


def windows(node: Node, shape: Shape, kernel: Sequence[int]) -> Shape | None:
    """Spatial sizes of what a window slides over; None for forms in which padding follows from other settings."""
    attrs, n = node.attrs, len(shape) - 2
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or attrs.get("ceil_mode", 0) or len(kernel) != n:
        return None
    pads, strides = attrs.get("pads", [0] * 2 * n), attrs.get("strides", [1] * n)
    steps = attrs.get("dilations", [1] * n)
    extents = [shape[2 + i] + pads[i] + pads[n + i] - steps[i] * (kernel[i] - 1) - 1 for i in range(n)]
    return tuple([extent // stride + 1 for extent, stride in zip(extents, strides, strict=True)])


def resolved(target: Sequence[int], source: Shape, allowzero: int) -> Shape:
    """The shape that a Reshape comes out as; ValueError where the target does not fit."""
    sizes = [source[i] if d == 0 and not allowzero else d for i, d in enumerate(target)]
    rest = math.prod(d for d in sizes if d != -1)
    if sizes.count(-1) == 1 and math.prod(source) % rest == 0:
        sizes[sizes.index(-1)] = math.prod(source) // rest
    if math.prod(sizes) != math.prod(source):
        raise ValueError(target)
    return tuple(sizes)


def where_known(infer: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``infer`` of a rule that is asked where all shapes are known in full, and may fail on odd nodes."""

    @wraps(infer)
    def told(self: Any, node: Node, shapes: Sequence[Any], values: Values) -> Any:
        for shape, name in zip(shapes, node.inputs, strict=True):
            if (shape is None and name) or (shape is not None and None in shape):
                return None
        try:
            return infer(self, node, shapes, values)
        except (LookupError, TypeError, ValueError, ArithmeticError):  # a form of the operator that is not expected
            return None

    return told
