"""Laws of weights that pass through operators on their way, of their element types, and of how they are stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from build import BFLOAT16, Net, element, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from oracle import assert_exact_cut, count_parameters
from sandwich import check, consume, opsets, produce

Passage = Callable[[Net, np.ndarray], str]


def through_constant(net: Net, array: np.ndarray) -> str:
    return net.op("Constant", value=numpy_helper.from_array(array))


def through_identity(net: Net, array: np.ndarray) -> str:
    return net.op("Identity", net.op("Identity", net.const(array)))


def through_cast(net: Net, array: np.ndarray) -> str:
    """Stored in half precision."""
    return net.op("Cast", net.const(array, np.float16), to=element(net.dtype))


def through_transpose(net: Net, array: np.ndarray) -> str:
    perm = list(range(array.ndim))[::-1]
    return net.transpose(net.const(np.transpose(array, perm)), *perm)


def through_reshape(net: Net, array: np.ndarray) -> str:
    """Stored with its first two axes in one."""
    flat = array.reshape(-1, *array.shape[2:])
    return net.reshape(net.const(flat), *array.shape)


def through_flat_reshape(net: Net, array: np.ndarray) -> str:
    return net.reshape(net.const(array.ravel()), *array.shape)


def through_unsqueeze(net: Net, array: np.ndarray) -> str:
    return net.squeeze(net.unsqueeze(net.const(array), [0, 1]), [0, 1])


def through_scale(net: Net, array: np.ndarray) -> str:
    """Weight normalisation: a direction times a length per output channel."""
    length = net.weight(array.shape[0], *[1] * (array.ndim - 1), low=0.5)
    return net.op("Mul", net.const(array), length)


def through_dequantize(net: Net, array: np.ndarray) -> str:
    """One scale for the whole weight."""
    codes = np.clip(np.round(array * 50), -127, 127).astype(np.int8)
    return net.op("DequantizeLinear", net.const(codes, np.int8), net.const(0.02, np.float32), net.const(0, np.int8))


def through_dequantize_per_channel(net: Net, array: np.ndarray) -> str:
    codes = np.clip(np.round(array * 50), -127, 127).astype(np.int8)
    scales = 0.01 + 0.02 * net.rng.random(array.shape[0])
    points = net.rng.integers(-3, 3, array.shape[0])
    return net.op(
        "DequantizeLinear", net.const(codes, np.int8), net.const(scales, np.float32), net.const(points, np.int8), axis=0
    )


PASSAGES: list[Passage] = [
    through_constant, through_identity, through_cast, through_transpose, through_unsqueeze, through_scale,
    through_dequantize, through_dequantize_per_channel,
]  # fmt: skip
RESHAPED: list[Passage] = [through_reshape, through_flat_reshape]
EVERY = [*PASSAGES, *RESHAPED]


def label(passage: object) -> str:
    return getattr(passage, "__name__", "")[8:]


def random(net: Net, *shape: int) -> np.ndarray:
    return (net.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(net.dtype)


@pytest.mark.parametrize("passage", EVERY, ids=label)
@pytest.mark.parametrize("where", ["producer", "both"])
@given(opset=opsets(13))
@settings(max_examples=2)
def test_convolution_weights_on_their_way(passage: Passage, where: str, opset: int) -> None:
    net = Net(opset)
    x = net.input("x", ["N", 4, 5, 5])
    first, second = random(net, 6, 4, 3, 3), random(net, 4, 6, 1, 1)
    w1 = passage(net, first)
    w2 = passage(net, second) if where != "producer" else net.const(second)
    y = net.op("Relu", net.op("Conv", x, w1, net.weight(6)))
    assert_exact_cut(net.model(net.op("Conv", y, w2)), tolerance=2e-5)


@pytest.mark.parametrize("passage", [*PASSAGES, *RESHAPED], ids=label)
def test_weights_of_a_consumer_on_their_way(passage: Passage) -> None:
    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 4, 5, 5]), 4, 6))
    assert_exact_cut(net.model(net.op("Conv", y, passage(net, random(net, 4, 6, 1, 1)))), tolerance=2e-5)


@pytest.mark.parametrize("passage", EVERY, ids=label)
@given(opset=opsets(13), gemm=st.booleans())
@settings(max_examples=2)
def test_matrices_on_their_way(passage: Passage, opset: int, gemm: bool) -> None:
    net = Net(opset)
    x = net.input("x", ["N", 4])
    attrs = {"transB": 1} if gemm else {}
    kind = "Gemm" if gemm else "MatMul"
    first, second = (random(net, 8, 4), random(net, 5, 8)) if gemm else (random(net, 4, 8), random(net, 8, 5))
    y = net.op("Relu", net.op(kind, x, passage(net, first), **attrs))
    assert_exact_cut(net.model(net.op(kind, y, passage(net, second), **attrs)), tolerance=2e-5)


@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("passage", [through_identity, through_cast, through_dequantize, through_constant], ids=label)
def test_grouped_weights_on_their_way(passage: Passage, group: int) -> None:
    net = Net(17)
    x = produce(net, "nchw", channels=8)
    y = net.op("Conv", x, passage(net, random(net, 8, 8 // group, 3, 3)), net.weight(8), group=group)
    check(net, y, tolerance=2e-5)


def test_grouped_weight_transposed_on_its_way() -> None:
    net = Net(17)
    x = produce(net, "nchw", channels=8)
    y = net.op("Conv", x, through_transpose(net, random(net, 8, 4, 3, 3)), group=2)
    check(net, y)


def test_biases_and_vectors_on_their_way() -> None:
    net = Net(17)
    x = net.input("x", ["N", 4, 5, 5])
    y = net.op("Conv", x, net.weight(6, 4, 3, 3), net.reshape(net.weight(6, 1, 1), -1))
    vectors = [through_constant(net, (0.5 + net.rng.random(6)).astype(np.float32)) for _ in range(4)]
    y = net.op("BatchNormalization", y, *vectors)
    y = net.op("Add", y, net.unsqueeze(net.weight(6), [1, 2]))
    assert_exact_cut(net.model(consume(net, y)))


def test_blocks_of_a_dequantized_weight() -> None:
    """One scale per block of input channels: whole blocks go, or nothing."""
    net = Net(21)
    x = produce(net, "nc", channels=8)
    codes = net.const(net.rng.integers(-100, 100, (8, 5)), np.int8)
    w = net.op("DequantizeLinear", codes, net.weight(4, 5, low=0.01, scale=0.01), axis=0, block_size=2)
    check(net, net.op("MatMul", x, w), tolerance=2e-5)


def test_a_weight_of_several_readers_couples_them() -> None:
    """Tied layers lose the same channels; a transposed second use is the other axis."""
    net = Net(17)
    w = net.weight(6, 6, scale=0.4)
    x = net.op("Relu", net.op("MatMul", produce(net, "nc"), w))
    y = net.op("Tanh", net.op("MatMul", x, w))
    check(net, y, net.op("MatMul", y, net.transpose(w, 1, 0)))


def test_a_weight_that_is_a_graph_output_stays() -> None:
    net = Net(17)
    x = net.input("x", ["N", 4])
    w = net.weight(4, 6, scale=0.5)
    y = net.op("MatMul", net.op("MatMul", x, w), net.weight(6, 3, scale=0.4))
    assert_exact_cut(net.model(y, net.op("Identity", w)), expect_cut=False)


@pytest.mark.newest_runtime
@pytest.mark.parametrize("dtype", [np.float64, np.float16, BFLOAT16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_element_types(dtype: np.dtype, layout: str) -> None:
    """Where onnxruntime has no kernel (bfloat16 convolutions), the reference evaluator decides."""
    net = Net(22, dtype=dtype)
    x = produce(net, layout)
    y = net.norm(x, 6) if layout == "nchw" else net.op("Mul", x, net.weight(6, low=0.5))
    check(net, net.op("Relu", y))


@pytest.mark.parametrize("opset", [7, 9, 13, newest()])
def test_initializers_that_are_inputs(opset: int) -> None:
    """Before IR 4 every initializer is a graph input too; their declared shapes follow."""
    net = Net(opset, ir=3)
    y = net.norm(produce(net, "nchw"), 6)
    y = net.reshape(net.op("GlobalAveragePool", net.op("Relu", y)), -1, 6)
    model = net.model(net.linear(y, 6, 3, gemm=True))
    result = assert_exact_cut(model)
    assert result is not None
    stored = {t.name: list(t.dims) for t in result.model.graph.initializer}
    for declared in result.model.graph.input:
        if declared.name in stored:
            assert [d.dim_value for d in declared.type.tensor_type.shape.dim] == stored[declared.name]


def test_weights_kept_as_lists_of_numbers() -> None:
    """float_data instead of raw_data."""
    net = Net(17)
    model = net.model(net.linear(net.op("Relu", net.linear(net.input("x", ["N", 4]), 4, 8)), 8, 3))
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.ravel().tolist()))
    assert_exact_cut(model)


def test_sparse_initializers_are_left_alone() -> None:
    net = Net(17)
    x = net.linear(net.input("x", ["N", 4]), 4, 8)
    values = helper.make_tensor("sparse", 1, [3], [0.5, -1.0, 2.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("sparse_indices", 7, [3], [1, 9, 20]), [8, 3])
    y = net.op("MatMul", net.op("Relu", net.op("MatMul", x, net.weight(8, 8))), "sparse")
    model = net.model(y, check=False, shapes={y: ["N", 3]})
    model.graph.sparse_initializer.append(sparse)
    onnx.checker.check_model(model)
    assert_exact_cut(model, validate=False)


def test_nothing_is_left_over() -> None:
    """Constants that a cut replaced are gone, and parameters fall by what the plan says."""
    net = Net(17)
    x = produce(net, "nchw")
    y = net.reshape(net.op("Relu", x), 0, 6, 20)
    model = net.model(consume(net, y))
    result = assert_exact_cut(model)
    assert result is not None
    used = {i for n in result.model.graph.node for i in n.input}
    assert {t.name for t in result.model.graph.initializer} <= used
    assert count_parameters(result.model) < count_parameters(model)
