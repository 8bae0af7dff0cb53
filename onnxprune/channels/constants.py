"""Values that no input changes: known values of every tensor, position by position, from the weights alone.

A tensor is known in a compact form, like a label: of the tensor's rank, with size 1 on axes along which its values do
not differ. A channel whose weights are all 0 has its bias there for all inputs; the form is carried forward
through everything that works position by position, moves values, or multiplies them with weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node
from onnxprune.operators.contractions import Form, Scale
from onnxprune.operators.registry import Move, Rule, rule_of

Array = NDArray[Any]
Mask = NDArray[np.bool_]

# Elements of a tensor from which it is not laid out to be moved.
_MAX_ELEMENTS = 1 << 24
# Operators whose result is a mean, or the largest, of values of one channel: a value that is the same everywhere stays.
_LOCAL = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool")
_SAMPLED = ("nearest", "linear")


class Known(NamedTuple):
    """Known values of a tensor, and where they are known; both of one compact shape."""

    value: Array
    known: Mask


class Product(NamedTuple):
    """A node as a product of data with constants.

    Attributes:
        form: the node as a matrix product.
        matrix: the constants, [parts, channels / parts, taps, outputs / parts].
    """

    form: Form
    matrix: Array


class Constants:
    """The values in a graph that do not depend on its inputs.

    Args:
        graph: the view of a model.
        facts: its shapes and small values.
    """

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self.graph, self.facts = graph, facts
        self._known: dict[str, Known] = {}
        for node in graph.steps:
            if not node.domain or rule_of(node).weights:
                self._known.update(zip(node.outputs, self._through(node), strict=False))
        self._known = {name: known for name, known in self._known.items() if name and known.known.any()}

    def get(self, name: str) -> Known | None:
        """Return the known values of a tensor; None where none is known."""
        known = self._known.get(name)
        if known is not None or not name:
            return known
        weight = self.graph.weights.get(name)
        value = self.facts.static_value(name) if weight is None else weight.read()
        return None if value is None else Known(value, np.broadcast_to(np.True_, value.shape))

    def full_value(self, name: str) -> Array | None:
        """Return a tensor of which every value is known, at its full size; None where any is not."""
        known = self.get(name)
        if known is None or not known.known.all():
            return None
        shape = self.facts.shape(name)
        return None if shape is None or None in shape else np.broadcast_to(known.value, shape)

    def is_constant(self, name: str) -> bool:
        """Return whether every value of a tensor is known; weights are not read for that."""
        if name in self.graph.weights:
            return True
        return bool(name) and self.full_value(name) is not None

    def _operand(self, node: Node, i: int) -> Array | None:
        """Return the value of an input; None where it is unknown, or left out at the end."""
        return self.full_value(node.inputs[i]) if i < len(node.inputs) and node.inputs[i] else None

    def product(self, node: Node) -> Product | None:
        """Return a node as a product of an unknown operand with a known one; None where it is none."""
        rule, form = rule_of(node), None
        shapes = [self.facts.shape(n) if n else None for n in node.inputs]
        for position in (0, 1):
            if position < len(node.inputs) and not self.is_constant(node.inputs[position]):
                form = form or rule.form(node, shapes, position)
        if form is None or isinstance(form, Scale) or not self.is_constant(node.inputs[form.weight]):
            return None
        weight = self.full_value(node.inputs[form.weight])
        if weight is not None and weight.dtype.kind not in "fV":
            weight = rule.numbers(node, form.weight, weight, lambda i: self._operand(node, i))
        if weight is None:
            return None
        matrix = form.matrix(weight)
        parts, columns, outputs = matrix.shape
        return Product(form, matrix.reshape(parts, columns // form.taps, form.taps, outputs))

    def channels(self, name: str, axes: Sequence[int]) -> Known | None:
        """Return the known values of channels along some axes, in their order, where all other positions agree.

        Args:
            name: name of the tensor.
            axes: axes along which the channels lie.

        Returns:
            values and mask [channels]; None where nothing is known.
        """
        known, shape = self.get(name), self.facts.shape(name)
        if known is None or shape is None or any(shape[a] is None for a in axes):
            return None
        target = [shape[a] if a in axes else n for a, n in enumerate(known.value.shape)]
        value, mask = (np.broadcast_to(part, target) for part in known)
        others = [a for a in range(len(target)) if a not in axes]
        count = prod(target[a] for a in axes)
        value, mask = (np.transpose(part, [*axes, *others]).reshape(count, -1) for part in (value, mask))
        same = mask.all(axis=1) & (value == value[:, :1]).all(axis=1)
        return Known(value[:, 0], np.asarray(same))

    # -- from node to node -----------------------------------------------------------------------------------------

    def _through(self, node: Node) -> list[Known]:
        """Return the known values of a node's outputs."""
        rule = rule_of(node)
        if rule.weights and (product := self.product(node)) is not None:
            return self._multiplied(node, product)
        inputs = [self.get(n) if n else None for n in node.inputs]
        if not any(k is not None and n not in self.graph.weights for n, k in zip(node.inputs, inputs, strict=True)):
            # Nothing is known of the data; a product with 0, or a scale of 0, makes it known nevertheless.
            decoded = rule.decodes or rule.encodes
            if not (node.op in ("Mul", "BatchNormalization") or (decoded and inputs and inputs[0] is not None)):
                return []
        try:
            with np.errstate(all="ignore"):
                return [self._checked(n, k) for n, k in zip(node.outputs, self._results(node, rule, inputs))]  # noqa: B905
        except (ValueError, IndexError, TypeError):  # a shape or type that no rule says how to read
            return []

    def _results(self, node: Node, rule: Rule, inputs: list[Known | None]) -> list[Known]:
        if node.op == "BatchNormalization":
            return self._normalized(node, inputs)
        if rule.moves is Move.SAME:
            return [k for k in inputs[:1] if k is not None and (node.op != "Dropout" or len(inputs) < 3)]
        if rule.moves is not None and rule.moves is not Move.CAST:
            return self._moved(node, rule.moves, inputs)
        if rule.pointwise or rule.encodes or rule.decodes:
            return self._pointwise(node, rule, inputs)
        if node.op in _LOCAL or node.op in ("Resize", "Upsample"):
            return self._local(node, inputs[0])
        if node.op in ("ReduceMean", "ReduceMax") and inputs[0] is not None:
            return self._run(node, [inputs[0].value, *self._operands(node)], inputs[0].known, [0])
        return []

    def _checked(self, name: str, known: Known) -> Known:
        """Return the compact form; nothing is known along an axis whose size follows that of an input."""
        value, mask = np.broadcast_arrays(known.value, known.known)
        for axis, size in enumerate(value.shape):
            if size == 1:
                continue
            first_value, first_mask = value.take([0], axis=axis), mask.take([0], axis=axis)
            if (mask == first_mask).all() and ((value == first_value) | ~mask).all():
                value, mask = first_value, first_mask
            elif self.facts.varies(name, axis):
                return Known(value, np.zeros_like(mask))
        return Known(value, mask)

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self.facts.probes[0].dtypes.get(name) or onnx.TensorProto.FLOAT
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def _nothing(self, name: str) -> Known:
        rank = len(self.facts.shape(name) or ())
        return Known(np.zeros((1,) * rank, self._dtype(name)), np.zeros((1,) * rank, bool))

    def _operands(self, node: Node) -> list[Array | None]:
        """Return the values of all inputs but the first, at the first probe."""
        known = [(self.facts.value(n), self.get(n)) if n else (None, None) for n in node.inputs[1:]]
        return [value if value is not None or k is None else k.value for value, k in known]

    def _run(self, node: Node, values: list[Array | None], known: Mask, data: Sequence[int]) -> list[Known]:
        """Run a node on values, and on where they are unknown."""
        masks = [~known if i in data else v for i, v in enumerate(values)]
        floats = [None if m is None else m.astype(np.float32) if i in data else m for i, m in enumerate(masks)]
        results, unknown = evaluate(node, values), evaluate(node, floats)
        if results is None or unknown is None:
            return []
        return [Known(r, np.asarray(u == 0)) for r, u in zip(results, unknown, strict=True)]

    def _pointwise(self, node: Node, rule: Rule, inputs: list[Known | None]) -> list[Known]:
        filled = [k if k is not None or not n else self._nothing(n) for n, k in zip(node.inputs, inputs, strict=True)]
        if rule.encodes or rule.decodes:
            first = filled[0]
            scale = filled[1]
            assert first is not None and scale is not None
            if scale.value.size > 1 and scale.value.ndim == 1:
                axis = int(node.attrs.get("axis", 1)) % first.value.ndim
                shape = [scale.value.size if a == axis else n for a, n in enumerate(first.value.shape)]
                filled[0] = Known(*(np.broadcast_to(part, shape) for part in first))
        results = evaluate(node, [None if k is None else np.ascontiguousarray(k.value) for k in filled])
        if results is None:
            return []
        present = [k for k in filled if k is not None]
        if rule.encodes or rule.decodes:  # scales and zero points lie along one axis, and have to be known whole
            known = present[0].known & all(bool(k.known.all()) for k in present[1:])
        else:
            known = np.asarray(np.logical_and.reduce(np.broadcast_arrays(*(k.known for k in present))))
        if node.op == "Mul" and not node.domain:
            zeros = np.broadcast_arrays(*(k.known & (k.value == 0) for k in present))
            known, is_zero = known | zeros[0] | zeros[1], zeros[0] | zeros[1]
            results = [np.where(is_zero, results[0].dtype.type(0), results[0])]
        return [Known(r, np.broadcast_to(known, r.shape)) for r in results]

    def _moved(self, node: Node, move: Move, inputs: list[Known | None]) -> list[Known]:
        """Run an operator that moves values on values laid out at their full size."""
        positions = range(len(inputs)) if move is Move.JOIN else (0,)
        data = [inputs[i] or self._nothing(node.inputs[i]) for i in positions]
        if move is not Move.ORDER:
            shapes = [self.facts.shape(node.inputs[i]) for i in positions]
            if any(s is None or None in s or prod(s) > _MAX_ELEMENTS for s in shapes):
                return []
            data = [Known(*(np.broadcast_to(part, s) for part in k)) for k, s in zip(data, shapes, strict=True)]
        operands = [] if move is Move.JOIN else self._operands(node)
        results = evaluate(node, [*(k.value for k in data), *operands])
        unknown = evaluate(node, [*((~k.known).astype(np.float32) for k in data), *operands])
        if results is None or unknown is None:
            return []
        return [Known(r, np.asarray(u == 0)) for r, u in zip(results, unknown, strict=True)]

    def _normalized(self, node: Node, inputs: list[Known | None]) -> list[Known]:
        """Return a BatchNormalization's channels: those with known data, and those with a scale of 0."""
        shape = self.facts.shape(node.inputs[0])
        vectors = [self.full_value(n) for n in node.inputs[1:5]]
        if node.attrs.get("training_mode", 0) or any(node.outputs[1:]) or shape is None or len(shape) < 2:
            return []
        if any(v is None for v in vectors):
            return []
        along = (1, -1, *(1,) * (len(shape) - 2))
        scale, shift, mean, variance = (np.asarray(v, np.float64).reshape(along) for v in vectors)
        data = inputs[0] or self._nothing(node.inputs[0])
        gain = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
        value = np.where(gain == 0, shift, (data.value.astype(np.float64) - mean) * gain + shift)
        known = np.broadcast_to(data.known | (gain == 0), value.shape)
        return [Known(value.astype(self._dtype(node.outputs[0])), known)]

    def _local(self, node: Node, data: Known | None) -> list[Known]:
        """Return the channels of a pooling or resizing that are the same everywhere: they keep their values."""
        if data is None or any(n > 1 for n in data.value.shape[2:]) or any(node.outputs[1:]):
            return []
        keeps, attrs = True, node.attrs
        if node.op == "AveragePool":  # zeros around the data enter the means
            bare = not any(attrs.get("pads", ())) and attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
            skips_zeros = node.version >= 7 and not attrs.get("count_include_pad", 0)
            keeps = skips_zeros or (bare and not attrs.get("ceil_mode", 0))
        elif node.op in ("Resize", "Upsample"):
            outside = attrs.get("coordinate_transformation_mode", "") == "tf_crop_and_resize"
            keeps = attrs.get("mode", "nearest") in _SAMPLED and not outside
            if outside:
                return []
        return [Known(data.value, data.known & (keeps | (data.value == 0)))]

    def _multiplied(self, node: Node, product: Product) -> list[Known]:
        """Return the outputs of a product that are known: those whose every factor is known or 0."""
        form = product.form
        shape = self.facts.shape(node.outputs[0])
        axis = None if shape is None else form.output_axis(len(shape))
        if not form.plain or shape is None or axis is None:
            return []
        parts, channels, _, outputs = product.matrix.shape
        data = self.channels(node.inputs[form.data], form.axes)
        value, usable = np.zeros(parts * channels), np.zeros(parts * channels, bool)
        if data is not None and data.known.size == usable.size:
            usable = data.known & ((data.value == 0) | form.is_uniform)
            value = np.where(usable, data.value, 0).astype(np.float64)
        is_read = (product.matrix != 0).any(axis=2)
        known = ~(is_read & ~usable.reshape(parts, channels, 1)).any(axis=1)
        if not known.any():
            return []
        total = np.zeros((parts, outputs))
        if value.any():
            total = np.einsum("pcto,pc->po", product.matrix.astype(np.float64), value.reshape(parts, channels))
            total *= form.scale
        sums, known = total.ravel(), known.ravel()
        if form.bias is not None and form.bias < len(node.inputs) and node.inputs[form.bias]:
            bias = self.channels(node.inputs[form.bias], (len(self.facts.shape(node.inputs[form.bias]) or (1,)) - 1,))
            if bias is None or bias.value.size not in (1, sums.size):
                return []
            sums, known = sums + bias.value * form.bias_scale, known & bias.known
        target = [1] * len(shape)
        target[axis] = sums.size
        return [Known(sums.reshape(target).astype(self._dtype(node.outputs[0])), known.reshape(target))]
