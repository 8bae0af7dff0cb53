"""Settings of a node (axes, sizes, starts), as inputs or attributes, and their meaning."""

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


def require_value(values: Values, i: int) -> Array:
    """Return the value of an input that the operator always has.

    Raises:
        ValueError: its value is not known.
    """
    value = values[i]
    if value is None:
        raise ValueError(f"input {i} is not known")
    return value


def whole_numbers(value: Array) -> list[int]:
    """Convert a scalar or a vector of integers to Python integers, which are faster for a few numbers."""
    return [int(n) for n in value.ravel().tolist()]


def read_integers(node: Node, values: Values, position: int, name: str, since: int) -> list[int] | None:
    """Return numbers that are an operand from opset ``since`` on and an attribute before; None where there are none.

    Raises:
        ValueError: the operand is present, but its value is not known.
    """
    if node.version < since:
        attribute = node.attrs.get(name)
        return None if attribute is None else list(attribute)
    if len(node.inputs) <= position or not node.inputs[position]:
        return None
    return whole_numbers(require_value(values, position))


def require_integers(value: list[int] | None) -> list[int]:
    """Return the numbers; raises ValueError where there are none."""
    if value is None:
        raise ValueError("a needed operand is absent")
    return value


def axes_of(node: Node, values: Values, position: int = 1) -> tuple[int, ...] | None:
    """Return axes from an operand, else from the attribute, at any opset; None where both are absent."""
    operand = values[position] if len(values) > position else None
    if operand is not None:
        return tuple(whole_numbers(operand))
    axes = node.attrs.get("axes")
    return None if axes is None else tuple(axes)


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from 0; raises ValueError where it is out of range."""
    if not -rank <= axis < rank:
        raise ValueError(axis)
    return axis % rank


def broadcast_sizes(shapes: Iterable[Shape]) -> Shape:
    """Broadcast shapes by numpy's rules; raises ValueError where they do not fit."""
    known = list(shapes)
    first = known[0]
    if known.count(first) == len(known):
        return first
    rank = max(map(len, known))
    result = []
    for column in zip(*((1,) * (rank - len(s)) + s for s in known), strict=True):
        sizes = set(column) - {1}
        if len(sizes) > 1:
            raise ValueError(column)
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def slice_of(start: int, end: int, step: int, size: int) -> slice:
    """Convert ONNX's clamped slice along an axis of ``size`` to a Python slice."""
    if step > 0:
        return slice(*slice(start, end, step).indices(size))
    start = max(0, min(start + size if start < 0 else start, size - 1))
    end = max(end + size if -size <= end < 0 else end, -1) if end >= -size else -1
    return slice(start, None if end < 0 else end, step)


def windows(node: Node, shape: Shape, kernel: Sequence[int]) -> Shape | None:
    """Return the numbers of windows per spatial axis; None for forms whose padding follows from other settings."""
    attrs, n = node.attrs, len(shape) - 2
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or attrs.get("ceil_mode", 0) or len(kernel) != n:
        return None
    pads, strides = attrs.get("pads", [0] * 2 * n), attrs.get("strides", [1] * n)
    steps = attrs.get("dilations", [1] * n)
    extents = [shape[2 + i] + pads[i] + pads[n + i] - steps[i] * (kernel[i] - 1) - 1 for i in range(n)]
    return tuple([extent // stride + 1 for extent, stride in zip(extents, strides, strict=True)])


def resolve_sizes(target: Sequence[int], source: Shape, allowzero: int) -> Shape:
    """Resolve a Reshape target to a shape; raises ValueError where the target does not fit."""
    sizes = [source[i] if d == 0 and not allowzero else d for i, d in enumerate(target)]
    known_product = math.prod(d for d in sizes if d != -1)
    if sizes.count(-1) == 1 and math.prod(source) % known_product == 0:
        sizes[sizes.index(-1)] = math.prod(source) // known_product
    if math.prod(sizes) != math.prod(source):
        raise ValueError(target)
    return tuple(sizes)


def where_known(infer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a rule's ``infer``: call it only where all shapes are fully known, return None for malformed nodes."""

    @wraps(infer)
    def infer_known(self: Any, node: Node, shapes: Sequence[Any], values: Values) -> Any:
        for shape, name in zip(shapes, node.inputs, strict=True):
            if (shape is None and name) or (shape is not None and None in shape):
                return None
        try:
            return infer(self, node, shapes, values)
        except (LookupError, TypeError, ValueError, ArithmeticError):  # a form of the operator that is not expected
            return None

    return infer_known
