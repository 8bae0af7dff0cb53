"""The masked original: the uncut graph with removed channels times 0 in front of every operator that sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.facts import Probe
from onnxprune.graph.view import Graph, Node
from onnxprune.labels.label import Label
from onnxprune.model.constants import add_constant
from onnxprune.model.weights import Weight
from onnxprune.operators.context import Step, Table
from onnxprune.operators.registry import lookup
from onnxprune.rewrite.after import After

# Bytes of a weight from which on a copy with masks is too much, beside the weight itself.
_BULKY = 16 << 20
# Types that onnxruntime has a Where kernel for.
_CHOOSES = (np.dtype(np.float32), np.dtype(np.float64))


def masked_original(
    table: Table, removed: NDArray[np.bool_], probe: Probe | None = None
) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """The original with masks, for inputs of a probe's sizes (the first one's). Weights are shared, not copied.

    It is built from labels and ``Rule.contracted_axes`` alone and shares nothing with the rewriting of nodes and
    weights, so that a mistake in either shows as a difference.
    """
    graph: Graph = table.graph
    builder = _Masks(table, After(table, removed), probe or table.facts.probes[0])
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    del model.graph.node[:]
    for node in graph.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node.proto)
        rule = lookup(node.domain, node.op, node.version)
        step = Step(node, table)
        if any(table.get(n) for n in node.inputs if n):
            read = rule.contracted_axes(step)
            for i, axes in read:
                name = node.inputs[i]
                others = [(node.inputs[j], beside) for j, beside in read if j != i]
                if builder.is_spared(name, axes, others):
                    continue
                neutral = rule.neutral(step, i)
                for extra in builder.mask(node, name, axes, neutral):
                    model.graph.node.append(extra)
                    copy.input[i] = extra.output[0]
        model.graph.node.append(copy)
    weights = {t.name: graph.weights[t.name] for t in graph.proto.graph.initializer if t.name in graph.weights}
    for name, value in builder.constants.items():
        add_constant(model, weights, name, value)
    return model, weights


class _Masks:
    """Masks made so far, shared between the operators that read the same tensor along the same axes."""

    def __init__(self, table: Table, after: After, probe: Probe) -> None:
        self.table, self.after, self.probe = table, after, probe
        self.constants: dict[str, NDArray[Any]] = {}

    def _masks(self, label: Label, axes: tuple[int, ...]) -> bool:
        """Whether something is removed along one of these axes."""
        return self.after.mask(label) is not None and bool(set(label.axes) & set(axes))

    def is_spared(self, name: str, axes: tuple[int, ...], others: Sequence[tuple[str, tuple[int, ...]]]) -> bool:
        """Whether a weight is so large that a masked copy would count, and what it is multiplied by has masks anyway.

        0 times what is left of it is 0, where all of it is finite.

        Args:
            name: the weight's. axes: of it that are summed over. others: what is summed over with it, and its axes.
        """
        weight = self.table.graph.weights.get(name)
        if weight is None or weight.nbytes < _BULKY:
            return False
        data = [(n, axes) for n, axes in others if n not in self.table.graph.weights]
        masked = [x for n, a in data for x in self.table.get(n) if self._masks(x, a)]
        if len(masked) != 1 or sum(self._masks(x, axes) for x in self.table.get(name)) > 1:
            return False
        return weight.dtype.kind in "iu" or bool(np.isfinite(weight.read().astype(np.float32, copy=False)).all())

    def mask(self, node: Node, name: str, axes: tuple[int, ...], neutral: str | None) -> list[onnx.NodeProto]:
        """Nodes that multiply a tensor by its masks along ``axes``; none where nothing was removed there."""
        nodes: list[onnx.NodeProto] = []
        current = name
        for k, label in enumerate(self.table.get(name)):
            keep = self.after.mask(label)
            if keep is None or not set(label.axes) & set(axes):
                continue
            keep = self._at_probe(name, label, keep)
            stem = f"{name}__mask_{node.index}_{k}"
            dtype = self._dtype(neutral or name)
            if dtype.kind in "iu":
                nodes += self._mask_codes(current, stem, keep, neutral, dtype)
            elif dtype in _CHOOSES and self.table.graph.opsets.get("", 1) >= 9:
                # A masked channel may have become infinite or NaN (0 / 0 in a normalisation): 0 times that is not 0.
                self.constants[stem], self.constants[f"{stem}_zero"] = keep, np.zeros((), dtype)
                inputs = [stem, current, f"{stem}_zero"]
                nodes.append(onnx.helper.make_node("Where", inputs, [f"{stem}_out"], name=stem))
            else:
                self.constants[stem] = keep.astype(dtype)
                nodes.append(onnx.helper.make_node("Mul", [current, stem], [f"{stem}_out"], name=stem))
            current = f"{stem}_out"
        return nodes

    def _mask_codes(
        self, current: str, stem: str, keep: NDArray[np.bool_], neutral: str | None, dtype: np.dtype[Any]
    ) -> list[onnx.NodeProto]:
        """Removed codes become the zero point; by way of int32, since neither Mul nor Where takes every 8-bit type."""
        self.constants[stem] = keep
        wide, back, zero = f"{stem}_wide", f"{stem}_masked", f"{stem}_zero"
        nodes = [onnx.helper.make_node("Cast", [current], [wide], to=onnx.TensorProto.INT32)]
        if neutral is None:
            self.constants[zero] = np.zeros((), np.int32)
        else:
            nodes.append(onnx.helper.make_node("Cast", [neutral], [zero], to=onnx.TensorProto.INT32))
        nodes.append(onnx.helper.make_node("Where", [stem, wide, zero], [back], name=stem))
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        nodes.append(onnx.helper.make_node("Cast", [back], [f"{stem}_out"], to=kind))
        return nodes

    def _at_probe(self, name: str, label: Label, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask at another probe's sizes: what was merged with a dynamic axis repeats."""
        shape = self.probe.shapes.get(name)
        for axis in label.axes:
            size = shape[axis] if shape is not None else keep.shape[axis]
            if size != keep.shape[axis]:
                period = int(np.gcd(size, keep.shape[axis]))
                keep = np.concatenate([keep.take(np.arange(period), axis=axis)] * (size // period), axis=axis)
        return keep

    def _dtype(self, name: str) -> np.dtype[Any]:
        weight = self.table.graph.weights.get(name)
        if weight is not None:
            return weight.dtype
        kind = self.table.facts.probes[0].dtypes.get(name) or onnx.TensorProto.FLOAT
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
