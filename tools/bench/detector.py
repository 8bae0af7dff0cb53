"""A detector as people deploy them, with random weights: 3.2 M parameters, 640 px, three scales, decoupled heads."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CLASSES, BINS = 80, 16
WIDTHS = (16, 32, 64, 128, 256)


class _Builder:
    """Nodes and weights of a graph in the making.

    Attributes:
        nodes: so far, in order.
        weights: of their convolutions, and constants.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._draw = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: object) -> list[str]:
        name = f"{kind.lower()}{len(self.nodes)}"
        names = [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def constant(self, values: NDArray[np.generic]) -> str:
        self.weights.append(numpy_helper.from_array(values, f"constant{len(self.weights)}"))
        return self.weights[-1].name

    def conv(self, x: str, ins: int, outs: int, kernel: int = 1, stride: int = 1, bias: float = 0.0) -> str:
        """A convolution whose singular values fall off as those of trained ones do: with one over the square root."""
        columns = ins * kernel**2
        left, _, right = np.linalg.svd(self._draw.standard_normal((outs, columns)), full_matrices=False)
        spread = 1 / np.sqrt(1 + np.arange(min(outs, columns)))
        weight = (left * spread) @ right
        weight = weight.reshape(outs, ins, kernel, kernel).astype(np.float32)
        inputs = [x, self.constant(weight), self.constant(np.full(outs, bias, np.float32))]
        return self.op("Conv", *inputs, kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, strides=[stride] * 2)[0]

    def act(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x)[0])[0]

    def layer(self, x: str, ins: int, outs: int, kernel: int = 1, stride: int = 1) -> str:
        return self.act(self.conv(x, ins, outs, kernel, stride))

    def split_block(self, x: str, ins: int, outs: int, depth: int, shortcut: bool) -> str:
        """Split in halves, one through pairs of 3x3 convolutions; everything on the way is joined."""
        half = outs // 2
        sizes = self.constant(np.array([half, half]))
        parts = self.op("Split", self.layer(x, ins, outs), sizes, outputs=2, axis=1)
        for _ in range(depth):
            y = self.layer(self.layer(parts[-1], half, half, 3), half, half, 3)
            parts.append(self.op("Add", parts[-1], y)[0] if shortcut else y)
        return self.layer(self.op("Concat", *parts, axis=1)[0], half * (2 + depth), outs)

    def pooled(self, x: str, width: int) -> str:
        """Join three poolings of growing extent."""
        parts = [self.layer(x, width, width // 2)]
        for _ in range(3):
            parts += self.op("MaxPool", parts[-1], kernel_shape=[5, 5], pads=[2] * 4, strides=[1, 1])
        return self.layer(self.op("Concat", *parts, axis=1)[0], width * 2, width)

    def head(self, x: str, width: int) -> str:
        """Box distances in bins and class scores of one scale: [1, 4 * BINS + CLASSES, cells]."""
        box = self.layer(self.layer(x, width, 64, 3), 64, 64, 3)
        label = self.layer(self.layer(x, width, CLASSES, 3), CLASSES, CLASSES, 3)
        parts = [self.conv(box, 64, 4 * BINS), self.conv(label, CLASSES, CLASSES, bias=-4.0)]
        both = self.op("Concat", *parts, axis=1)[0]
        return self.op("Reshape", both, self.constant(np.array([1, 4 * BINS + CLASSES, -1])))[0]


def detector(side: int = 640) -> onnx.ModelProto:
    """Build the graph of a detector as exporters write it: one input [1, 3, side, side], one output [1, 84, cells].

    Args:
        side: of the input in pixels, a multiple of 32.
    """
    b = _Builder()
    scales: list[str] = []
    x, width = b.layer("images", 3, WIDTHS[0], 3, 2), WIDTHS[0]
    for wide, depth in zip(WIDTHS[1:], (1, 2, 2, 1), strict=True):
        x = b.split_block(b.layer(x, width, wide, 3, 2), wide, wide, depth, shortcut=True)
        scales.append(x)
        width = wide
    fine, middle, coarse = scales[1], scales[2], b.pooled(x, width)
    up_middle = b.split_block(_joined_up(b, coarse, middle), 256 + 128, 128, 1, shortcut=False)
    up_fine = b.split_block(_joined_up(b, up_middle, fine), 128 + 64, 64, 1, shortcut=False)
    down = b.op("Concat", b.layer(up_fine, 64, 64, 3, 2), up_middle, axis=1)[0]
    down_middle = b.split_block(down, 64 + 128, 128, 1, shortcut=False)
    down = b.op("Concat", b.layer(down_middle, 128, 128, 3, 2), coarse, axis=1)[0]
    down_coarse = b.split_block(down, 128 + 256, 256, 1, shortcut=False)
    heads = [b.head(y, wide) for y, wide in ((up_fine, 64), (down_middle, 128), (down_coarse, 256))]
    output = _decoded(b, b.op("Concat", *heads, axis=2)[0], side)
    cells = sum((side // stride) ** 2 for stride in (8, 16, 32))
    graph = helper.make_graph(
        b.nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 4 + CLASSES, cells])],
        b.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _joined_up(b: _Builder, coarse: str, fine: str) -> str:
    """Double the sides of the coarser map and join it with the finer one."""
    sizes = b.constant(np.array([1, 1, 2, 2], np.float32))
    larger = b.op("Resize", coarse, "", sizes, mode="nearest", coordinate_transformation_mode="asymmetric")[0]
    return b.op("Concat", larger, fine, axis=1)[0]


def _decoded(b: _Builder, joined: str, side: int) -> str:
    """Turn bins into boxes (centre and size in pixels) and logits into scores."""
    grids = [_centres(side // stride) for stride in (8, 16, 32)]
    strides = np.concatenate([np.full(len(g), s) for g, s in zip(grids, (8, 16, 32), strict=True)]).astype(np.float32)
    sizes = b.constant(np.array([4 * BINS, CLASSES]))
    box, label = b.op("Split", joined, sizes, outputs=2, axis=1)
    bins = b.op("Reshape", box, b.constant(np.array([1, 4, BINS, -1])))[0]
    weights = b.op("Softmax", b.op("Transpose", bins, perm=[0, 2, 1, 3])[0], axis=1)[0]
    mean = b.constant(np.arange(BINS, dtype=np.float32).reshape(1, BINS, 1, 1))
    distance = b.op("Reshape", b.op("Conv", weights, mean)[0], b.constant(np.array([1, 4, -1])))[0]
    first, second = b.op("Split", distance, b.constant(np.array([2, 2])), outputs=2, axis=1)
    centre = b.constant(np.concatenate(grids).T[None].astype(np.float32))
    low, high = b.op("Sub", centre, first)[0], b.op("Add", centre, second)[0]
    middle = b.op("Div", b.op("Add", low, high)[0], b.constant(np.array(2, np.float32)))[0]
    boxes = b.op("Concat", middle, b.op("Sub", high, low)[0], axis=1)[0]
    scaled = b.op("Mul", boxes, b.constant(strides[None, None]))[0]
    return b.op("Concat", scaled, b.op("Sigmoid", label)[0], axis=1)[0]


def _centres(cells: int) -> NDArray[np.float64]:
    """Centres (x, y) of a square of cells."""
    rows, columns = np.mgrid[:cells, :cells] + 0.5
    return np.stack([columns.ravel(), rows.ravel()], 1)


def scenes(number: int, side: int, seed: int = 0) -> NDArray[np.float32]:
    """Draw pictures [number, 3, side, side] in 0..1: coloured ellipses and boxes of many sizes in front of a slope."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side].astype(np.float32) / side
    pictures = np.empty((number, 3, side, side), np.float32)
    for picture in pictures:
        slope = draw.uniform(-0.3, 0.3, (3, 2, 1, 1))
        picture[:] = draw.uniform(0.3, 0.7, (3, 1, 1)) + slope[:, 0] * rows + slope[:, 1] * columns
        for _ in range(draw.integers(3, 20)):
            picture[:, _shape(draw, rows, columns)] = draw.uniform(0, 1, (3, 1))
        picture += draw.normal(0, 0.03, picture.shape)
    return np.clip(pictures, 0, 1)


def _shape(draw: np.random.Generator, rows: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The pixels of one object."""
    centre, size = draw.uniform(0, 1, 2), np.exp(draw.uniform(np.log(0.02), np.log(0.4), 2))
    across, down = np.abs(columns - centre[0]) / size[0], np.abs(rows - centre[1]) / size[1]
    inside: NDArray[np.bool_] = across**2 + down**2 < 1 if draw.random() < 0.5 else np.maximum(across, down) < 1
    return inside


def normalise(model: onnx.ModelProto, images: NDArray[np.float32]) -> None:
    """Scale every convolution in turn so that its outputs have a standard deviation of 1.

    Args:
        model: of ``detector``; its weights are replaced.
        images: one input [1, 3, side, side].
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    for node in convolutions:
        probed = onnx.ModelProto()
        probed.CopyFrom(model)
        del probed.graph.output[:]
        probed.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
        session = ort.InferenceSession(probed.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs = session.run(None, {"images": images})[0]
        weight = tensors[node.input[1]]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) / outputs.std(), weight.name))
