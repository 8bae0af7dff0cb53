"""Where a layer's constants lie: as they are, behind operators that only rearrange them, or as quantised codes."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.fold import hands_on
from onnxprune.graph.view import Graph, Node
from onnxprune.graph.weights_of import weight_of
from onnxprune.model.weights import ArrayWeight, Weight
from onnxprune.operators.codes import spread
from onnxprune.operators.registry import Move, rule_of

Array = NDArray[Any]
Real = NDArray[np.float64]

_SETTINGS = {1: "scale", 2: "zero_point"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One constant that a node reads, which can be read and given new values.

    Attributes:
        root: name of the constant that holds the numbers or codes.
        chain: the operators between it and its reader, in the order in which it passes them.
    """

    root: str
    chain: tuple[Node, ...] = ()

    @staticmethod
    def of(graph: Graph, name: str) -> Stored | str:
        """The constant ``name``, or why it cannot be given new values."""
        chain: list[Node] = []
        if weight_of(graph, name) is None:
            return "its weight is computed from others"
        while True:
            if len(graph.consumers.get(name, ())) != 1 or name in graph.captured:
                return "its weight is shared with another node"
            if name in graph.outputs:
                return "its weight is an output of the model"
            if name in graph.weights:
                return _checked(graph, Stored(name, tuple(reversed(chain))))
            node = graph.producer.get(name)
            if node is None or not _can_undo(graph, node):
                return "its weight is computed from others"
            chain.append(node)
            name = node.inputs[0]

    @property
    def quantised(self) -> Node | None:
        """The operator that turns codes into numbers, if there is one."""
        return next((node for node in self.chain if rule_of(node).decodes), None)

    def read(self, weights: Mapping[str, Weight]) -> Real:
        """The numbers as the reader gets them."""
        return self._values(weights)[-1].astype(np.float64)

    def shape(self, weights: Mapping[str, Weight]) -> tuple[int, ...]:
        """Their shape."""
        return self._values(weights)[-1].shape if self.chain else weights[self.root].shape

    def detach(self, graph: Graph, weights: MutableMapping[str, Weight]) -> None:
        """Give codes a scale and zero point of their own where others read them too, and would get the new ones."""
        node = self.quantised
        if node is None:
            return
        for at in _SETTINGS:
            name = node.inputs[at] if at < len(node.inputs) else ""
            if name and len(graph.consumers.get(name, ())) > 1:
                node.inputs[at] = node.proto.input[at] = _copied(graph, weights, name, f"{self.root}.{_SETTINGS[at]}")
                graph.consumers[name] = [c for c in graph.consumers[name] if c[0] is not node]

    def write(self, weights: MutableMapping[str, Weight], value: Real, ratio: Array | None = None) -> Array | None:
        """Put in other numbers of the same shape.

        Codes get the scale, and unsigned ones the zero point, that uses all of their range; or, with ``ratio``, the
        old scale times it, as biases have whose scale has to be that of the product they are added to.

        Returns:
            new scales / old ones, where there are codes.
        """
        values = self._values(weights)
        found = None
        for node, inner in zip(reversed(self.chain), reversed(values[:-1]), strict=True):
            if rule_of(node).decodes:
                value, found = _requantise(node, weights, inner, value, ratio)
            else:
                value = _undo(node, inner, value)
        _set(weights, self.root, value)
        return found

    def _values(self, weights: Mapping[str, Weight]) -> list[Array]:
        """The root's value, and that behind every operator of the chain."""
        values: list[Array] = [weights[self.root].read()]
        for node in self.chain:
            result = _applied(node, [values[-1], *(weights[n].read() if n else None for n in node.inputs[1:])])
            assert result is not None  # it could be computed when the constant was found
            values.append(result)
        return values


def _applied(node: Node, operands: list[Array | None]) -> Array | None:
    made = evaluate(node, operands)
    return np.asarray(made[0]) if made else None


def _copied(graph: Graph, weights: MutableMapping[str, Weight], name: str, wanted: str) -> str:
    """Another constant with the values of ``name``, under the wanted name or one like it."""
    while wanted in weights or wanted in graph.producer:
        wanted += "_"
    value = weights[name]
    weights[wanted] = ArrayWeight(wanted, value.read())
    initializer = onnx.TensorProto(name=wanted, data_type=value.onnx_type, dims=value.shape)
    graph.proto.graph.initializer.append(initializer)
    return wanted


def _checked(graph: Graph, stored: Stored) -> Stored | str:
    weight = graph.weights[stored.root]
    code = stored.quantised
    if code is None and (weight.dtype.kind not in "fV" or weight.dtype.itemsize < 2):
        return f"its weight is stored as {weight.dtype}"
    return stored


def _can_undo(graph: Graph, node: Node) -> bool:
    constants = all(n in graph.weights for n in node.inputs[1:] if n)
    return constants and (rule_of(node).decodes or hands_on(node))


def _undo(node: Node, inner: Array, value: Real) -> Real:
    """The value in front of an operator that only rearranges."""
    if rule_of(node).moves is not Move.ORDER:
        return value.reshape(inner.shape)
    places = evaluate(node, [np.arange(inner.size).reshape(inner.shape)])
    assert places is not None  # what stands behind it could be computed
    result = np.empty(inner.size)
    result[places[0].ravel()] = value.ravel()
    return result.reshape(inner.shape)


def _requantise(
    node: Node, weights: MutableMapping[str, Weight], codes: Array, value: Real, ratio: Array | None
) -> tuple[Real, Array]:
    """Codes of a value, with new scales and zero points in ``weights``, and new scales / old ones."""
    scale_name, zero_name = (*node.inputs, "")[1:3]
    old = weights[scale_name].read().astype(np.float64)
    zero = weights[zero_name].read().astype(np.float64) if zero_name else np.zeros_like(old)
    low, high = _range(codes.dtype)
    if ratio is not None:
        scale = old * ratio
    else:
        least, most = (_extremes(node, value, old, f) for f in (np.minimum, np.maximum))
        if low == 0 and zero_name:
            scale = (most - least) / (high - low)
            zero = np.clip(np.round(-least / np.where(scale > 0, scale, 1.0)), low, high)
        else:
            down = np.where(zero > low, -least / np.maximum(zero - low, 1.0), 0.0)
            # The lowest code has no opposite: symmetric codes do without it.
            down = np.where(zero == 0, -least / high, down)
            scale = np.maximum(most / np.maximum(high - zero, 1.0), down)
        scale = np.where(scale > 0, scale, old)
    _set(weights, scale_name, scale)
    if zero_name:
        _set(weights, zero_name, zero)
    scale = weights[scale_name].read().astype(np.float64)  # as it was rounded
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    wide, offset = (spread(setting, value.shape, axis, block) for setting in (scale, zero))
    return np.clip(np.rint(value / wide) + offset, low, high), scale / np.where(old == 0, 1.0, old)


def _range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The lowest and the highest code."""
    info: Any = np.iinfo(dtype) if dtype.kind in "iu" else ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(info.min), int(info.max)


def _extremes(node: Node, value: Real, like: Real, least_or_most: np.ufunc) -> Real:
    """The least or most of 0 and the values that share a scale, in the scales' shape."""
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    if like.size == 1:
        found = np.asarray(least_or_most.reduce(value, axis=None)).reshape(like.shape)
    elif block:
        found = least_or_most.reduceat(value, np.arange(0, value.shape[axis], block), axis=axis)
    else:
        axis %= value.ndim
        found = least_or_most.reduce(value, axis=tuple(a for a in range(value.ndim) if a != axis))
    return np.asarray(least_or_most(found, 0.0), np.float64)


def _set(weights: MutableMapping[str, Weight], name: str, value: Real) -> None:
    """A constant's new value in its own type."""
    weights[name] = ArrayWeight(name, np.asarray(value, order="C").astype(weights[name].dtype))
