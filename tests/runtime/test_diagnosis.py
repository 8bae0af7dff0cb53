"""Damaged models: whatever stands in them, a run ends in an error of its own that says what is wrong."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import onnx
import pytest
from build import Net
from onnx import TensorProto

import onnxprune as op
from onnxprune.errors import ModelError, OnnxpruneError, ValidationError
from onnxprune.runtime.diagnosis import explain_failures

ODD = [0, 1, -1, 2, 5, -2, 100, 1 << 20, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 62, -(1 << 63), (1 << 63) - 1]
OPS = ["Shape", "Reshape", "DequantizeLinear", "Split", "Concat", "Einsum", "Gather", "Slice", "GRU", "Resize", "If"]


def model() -> onnx.ModelProto:
    """Convolutions, a computed reshape, heads, and codes: what most rules have to do with."""
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    x = net.conv(net.op("Relu", net.op("BatchNormalization", x, *(net.weight(8) for _ in range(4)))), 8, 8)
    batch = net.op("Slice", net.op("Shape", x), net.const([0]), net.const([1]))
    flat = net.op("Reshape", x, net.op("Concat", batch, net.const([-1]), axis=0))
    h = net.op("MatMul", flat, net.weight(8 * 36, 12))
    codes = net.op("QuantizeLinear", h, net.const(0.1, np.float32), net.const(3, np.uint8))
    h = net.op("Softmax", net.op("DequantizeLinear", codes, net.const(0.1, np.float32), net.const(3, np.uint8)))
    h = net.op("Reshape", h, net.const([0, 3, 4]))
    h = net.op("Reshape", net.op("Transpose", h, perm=[0, 2, 1]), net.const([0, 12]))
    return net.model(net.op("Gemm", h, net.weight(12, 5), net.weight(5)))


def damage_node(model: onnx.ModelProto, draw: random.Random) -> None:
    node = draw.choice(model.graph.node)
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    match draw.randrange(6):
        case 0 if node.attribute:
            attribute = draw.choice(node.attribute)
            attribute.i = draw.choice(ODD)
            if attribute.ints:
                attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(ODD)
        case 1 if node.attribute:
            del node.attribute[draw.randrange(len(node.attribute))]
        case 2 if node.input:
            del node.input[draw.randrange(len(node.input))]
        case 3 if node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice([*names, ""])
        case 4:
            node.op_type = draw.choice([*OPS, draw.choice(model.graph.node).op_type])
        case _:
            node.input.append(draw.choice(names))


def damage_tensor(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = draw.choice(model.graph.initializer)
    match draw.randrange(4):
        case 0 if tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(ODD)
        case 1:
            tensor.data_type = draw.randrange(28)
        case 2:
            tensor.dims.append(draw.choice(ODD))
        case _ if tensor.dims:
            del tensor.dims[-1]


def damage_size(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = draw.choice([t for t in model.graph.initializer if t.data_type == TensorProto.INT64 and t.raw_data])
    sizes = np.frombuffer(tensor.raw_data, np.int64).copy()
    sizes[draw.randrange(sizes.size)] = draw.choice(ODD)
    tensor.raw_data = sizes.tobytes()


def damage_value(model: onnx.ModelProto, draw: random.Random) -> None:
    info = draw.choice([*model.graph.input, *model.graph.output])
    kind = info.type.tensor_type
    match draw.randrange(4):
        case 0 if kind.shape.dim:
            draw.choice(kind.shape.dim).dim_value = draw.choice(ODD)
        case 1:
            kind.elem_type = draw.randrange(28)
        case 2:
            info.ClearField("type")
        case _:
            info.name = draw.choice([o for node in model.graph.node for o in node.output])


DAMAGES = [damage_node, damage_node, damage_tensor, damage_size, damage_value]
pytestmark = pytest.mark.lenient  # rules that fail freeze channels, as outside of tests


@pytest.mark.newest_runtime
@pytest.mark.parametrize("seed", range(4))
def test_damaged_models_end_in_errors_of_their_own(seed: int) -> None:
    draw, whole, ends = random.Random(seed), model(), Counter[int]()
    for _ in range(60):
        damaged = onnx.ModelProto()
        damaged.CopyFrom(whole)
        for _ in range(draw.choice([1, 1, 2])):
            draw.choice(DAMAGES)(damaged, draw)
        try:
            op.prune(damaged.SerializeToString(), ratio=0.5, validate=False)
            ends[0] += 1
        except OnnxpruneError as error:
            ends[error.exit_code] += 1
            assert error.message and "\n" not in error.message
    assert ends.keys() <= {0, 2, 3, 5} and ends[0] and ends[3], ends


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda n, m: n["Shape"].ClearField("input"), "Shape"),
        (lambda n, m: n["Gemm"].input.pop(), None),
        (lambda n, m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0), "element type 0"),
        (lambda n, m: setattr(m.graph.initializer[0], "data_type", 0), "element type 0"),
        (lambda n, m: m.graph.initializer[0].dims.append(1 << 62), "impossible shape"),
    ],
)
def test_what_is_said_of_damaged_models(edit, said: str | None) -> None:
    damaged = model()
    edit({node.op_type: node for node in damaged.graph.node}, damaged)
    if said is None:  # an input that may be absent
        op.prune(damaged, ratio=0.5, validate=False)
        return
    with pytest.raises(ModelError, match=said) as caught:
        op.prune(damaged, ratio=0.5, validate=False)
    assert caught.value.exit_code == 3 and caught.value.hint


def test_bugs_stay_bugs() -> None:
    for error in (KeyError("x"), ValidationError("wrong")):
        with pytest.raises(type(error)), explain_failures(model()):
            raise error
    damaged = model()
    next(n for n in damaged.graph.node if n.op_type == "MatMul").op_type = "Relu"
    for error in (KeyError("x"), ValidationError("wrong")):
        with pytest.raises(ModelError, match=r"not valid ONNX: .*Relu"), explain_failures(damaged):
            raise error


def test_weights_of_a_shape_that_no_checker_asks_for() -> None:
    """A model that does not run is not the fault of a cut."""
    net = Net(17)
    x = net.op("MatMul", net.input("x", [2, 5, 6]), net.weight(6, 8))
    x = net.op("GRU", x, net.weight(1, 24, 8), net.weight(1, 24, 8), hidden_size=8)
    damaged = net.model(net.op("MatMul", x, net.weight(8, 3)))
    tensor = damaged.graph.initializer[1]
    tensor.dims[:] = tensor.dims[::-1]
    with pytest.raises(OnnxpruneError) as caught:
        op.prune(damaged, ratio=0.5, latency=False)
    assert caught.value.exit_code in (3, 5)
