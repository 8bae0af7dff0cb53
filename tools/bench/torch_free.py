"""A ResNet-50 with random weights, built node by node: something large to time, for those without torch."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCKS = ((3, 64, 256, 1), (4, 128, 512, 2), (6, 256, 1024, 2), (3, 512, 2048, 2))


def resnet50(size: int = 224) -> onnx.ModelProto:
    """He et al., CVPR 2016: bottlenecks of 1x1, 3x3, 1x1; BatchNorm folded in."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(x: str, ins: int, outs: int, kernel: int, stride: int = 1) -> str:
        number = len(weights)
        value = rng.standard_normal((outs, ins, kernel, kernel), np.float32) * np.sqrt(2 / (ins * kernel**2))
        weights.append(numpy_helper.from_array(value.astype(np.float32), f"w{number}"))
        weights.append(numpy_helper.from_array(np.zeros(outs, np.float32), f"b{number}"))
        nodes.append(
            helper.make_node(
                "Conv", [x, f"w{number}", f"b{number}"], [f"c{number}"], name=f"conv{number}",
                pads=[kernel // 2] * 4, strides=[stride] * 2,
            )
        )  # fmt: skip
        return f"c{number}"

    def op(kind: str, *inputs: str, **attrs: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"t{len(nodes)}"], name=f"n{len(nodes)}", **attrs))
        return str(nodes[-1].output[0])

    x = op("MaxPool", op("Relu", conv("x", 3, 64, 7, 2)), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    width = 64
    for count, inner, outer, stride in BLOCKS:
        for i in range(count):
            step = stride if i == 0 else 1
            short = conv(x, width, outer, 1, step) if i == 0 else x
            y = op("Relu", conv(x, width, inner, 1))
            y = op("Relu", conv(y, inner, inner, 3, step))
            x, width = op("Relu", op("Add", conv(y, inner, outer, 1), short)), outer
    x = op("Flatten", op("GlobalAveragePool", x))
    weights.append(numpy_helper.from_array(rng.standard_normal((1000, width)).astype(np.float32) / 45, "head"))
    nodes.append(helper.make_node("Gemm", [x, "head"], ["y"], name="head", transB=1))
    graph = helper.make_graph(
        nodes,
        "resnet50",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
