"""Models made up for measuring: a residual network of any depth, and one with gigabytes of external data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCK = 5  # nodes of one residual block


def residual(nodes: int, channels: int = 16) -> onnx.ModelProto:
    """About ``nodes`` nodes: blocks of Conv, Relu, Conv, Add, Relu over one residual stream of ``channels``."""
    rng = np.random.default_rng(0)
    made: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(source: str, name: str, wide: int) -> str:
        array = (rng.standard_normal((channels, wide, 1, 1)) / channels).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"{name}.weight"))
        made.append(helper.make_node("Conv", [source, f"{name}.weight"], [name], name))
        return name

    stream = conv("input", "stem", 3)
    for i in range(max(1, (nodes - 4) // BLOCK)):
        first = conv(stream, f"b{i}.first", channels)
        made.append(helper.make_node("Relu", [first], [f"b{i}.act"], f"b{i}.act"))
        second = conv(f"b{i}.act", f"b{i}.second", channels)
        made.append(helper.make_node("Add", [second, stream], [f"b{i}.sum"], f"b{i}.sum"))
        made.append(helper.make_node("Relu", [f"b{i}.sum"], [f"b{i}.out"], f"b{i}.out"))
        stream = f"b{i}.out"
    made.append(helper.make_node("GlobalAveragePool", [stream], ["pooled"], "pool"))
    made.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    weights.append(numpy_helper.from_array(rng.standard_normal((channels, 10)).astype(np.float32), "head.weight"))
    made.append(helper.make_node("MatMul", ["flat", "head.weight"], ["output"], "head"))
    return _model(made, weights, ["N", 3, 8, 8], ["N", 10])


def feed_forward(path: Path, gigabytes: float, width: int = 2048, wide: int = 8192) -> int:
    """Write residual feed-forward blocks with their weights in one file beside ``path``, block by block.

    Returns:
        bytes of the weights.
    """
    made: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    block = np.random.default_rng(0).standard_normal((width, wide), dtype=np.float32) / wide
    stream, offset, data = "input", 0, path.with_suffix(".data")
    with data.open("wb") as file:
        for i in range(max(1, round(gigabytes * 2**30 / (2 * block.nbytes)))):
            for name, shape in ((f"b{i}.up", (width, wide)), (f"b{i}.down", (wide, width))):
                file.write(np.roll(block, 13 * i, axis=1).data)
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", offset), ("length", block.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                weights.append(tensor)
                offset += block.nbytes
            made += [
                helper.make_node("MatMul", [stream, f"b{i}.up"], [f"b{i}.h"], f"b{i}.up"),
                helper.make_node("Relu", [f"b{i}.h"], [f"b{i}.a"], f"b{i}.act"),
                helper.make_node("MatMul", [f"b{i}.a", f"b{i}.down"], [f"b{i}.y"], f"b{i}.down"),
                helper.make_node("Add", [f"b{i}.y", stream], [f"b{i}.out"], f"b{i}.sum"),
            ]
            stream = f"b{i}.out"
    made.append(helper.make_node("Identity", [stream], ["output"], "output"))
    path.write_bytes(_model(made, weights, ["N", width], ["N", width]).SerializeToString())
    return offset


def _model(
    nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], source: list[int | str], target: list[int | str]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "generated",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, source)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, target)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
