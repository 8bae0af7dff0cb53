"""Conv and ConvTranspose: every factor is a convolution of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from onnxprune.contractions import Form, Transposed, Windows
from onnxprune.decompose import Factor, Shape, Stage
from onnxprune.decompose.cost import Geometry
from onnxprune.decompose.factor import Array
from onnxprune.factors.layer import Described, Made, Operator
from onnxprune.graph.view import Node

_BIAS = 2


class Convolution(Operator):
    """Conv of any rank, stride, dilation, padding and number of groups, and its transpose."""

    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Described | str:
        """Windows with a plain product."""
        if not isinstance(form, Windows):
            return (
                "its output size is an attribute" if node.op == "ConvTranspose" else "its data come in another layout"
            )
        if position != form.weight or not form.plain:
            return "an activation is fused into it"
        weight, data, out = shapes[form.weight], shapes[form.data], shapes[len(node.inputs)]
        if data is None or out is None or None in (*data, *out):
            return "its sizes are not known"
        spreading = isinstance(form, Transposed)
        inputs = (weight[0] if spreading else weight[1] * form.parts) // form.parts
        outputs = (weight[1] * form.parts if spreading else weight[0]) // form.parts
        shape = Shape(form.parts, inputs, tuple(weight[2:]), outputs)
        return Described(shape, Geometry(data[0], tuple(data[2:]), tuple(out[2:]), spreading), form)

    def constants(self, factors: Sequence[Factor], described: Described, like: Sequence[int]) -> list[Array]:
        """[O, C / group, *kernel] each; of a transposed one that slides [C, O / group, *kernel], flipped."""
        spreading = described.geometry.spreading
        return [_transposed(f) if spreading and f.stage.axes else _plain(f) for f in factors]

    def nodes(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: Made) -> list[onnx.NodeProto]:
        """One convolution per factor; the last one has the bias."""
        result, source = [], node.inputs[0]
        for factor, weight in zip(factors, weights, strict=True):
            last = factor is factors[-1]
            inputs = [source, weight]
            if last and len(node.inputs) > _BIAS and node.inputs[_BIAS]:
                inputs.append(node.inputs[_BIAS])
            source = node.outputs[0] if last else made.tensor(factor.stage.role)
            kind = node.op if factor.stage.axes else "Conv"
            attributes = _attributes(node, factor.stage)
            result.append(
                onnx.helper.make_node(kind, inputs, [source], name=made.node(factor.stage.role), **attributes)
            )
        return result

    def bias(self, node: Node) -> int | None:
        """The third input."""
        return _BIAS


def _plain(factor: Factor) -> Array:
    stage = factor.stage
    moved = np.moveaxis(factor.array, -1, 1)
    return moved.reshape(stage.parts * stage.outputs, stage.inputs, *stage.kernel)


def _transposed(factor: Factor) -> Array:
    stage = factor.stage
    moved = np.flip(np.moveaxis(factor.array, -1, 2), axis=tuple(range(3, factor.array.ndim)))
    return moved.reshape(stage.parts * stage.inputs, stage.outputs, *stage.kernel)


def _attributes(node: Node, stage: Stage) -> dict[str, Any]:
    """The layer's attributes along the stage's axes, nothing along the others."""
    rank = len(stage.kernel)
    result: dict[str, Any] = {"kernel_shape": list(stage.kernel), "group": stage.parts}
    if not stage.axes:
        return result
    for name, usual in (("strides", 1), ("dilations", 1), ("output_padding", 0)):
        values = node.attrs.get(name)
        if values:
            result[name] = [v if i in stage.axes else usual for i, v in enumerate(values)]
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        result["auto_pad"] = node.attrs["auto_pad"]
    elif node.attrs.get("pads"):
        result["pads"] = [p if i % rank in stage.axes else 0 for i, p in enumerate(node.attrs["pads"])]
    return result
