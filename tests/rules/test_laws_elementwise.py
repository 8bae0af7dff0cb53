"""Laws of operators that work position by position: what broadcasts keeps its labels, what meets goes together."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import BFLOAT16, Net, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandwich import check, opsets, produce

LAYOUTS = st.sampled_from(["nc", "ncl", "nchw", "nlc", "nhwc"])
ANY = [
    "Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Abs", "Neg", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Atan",
    "Sinh", "Cosh", "Asinh", "LeakyRelu", "Elu", "Selu", "Celu", "HardSwish", "HardSigmoid", "Mish", "Softplus",
    "Softsign", "ThresholdedRelu", "Shrink", "Identity", "Gelu", "Swish",
]  # fmt: skip
DOMAIN = {"Sqrt": (0.5, None), "Log": (0.5, None), "Reciprocal": (0.5, None), "Acosh": (1.5, None),
          "Asin": (None, 0.9), "Acos": (None, 0.9), "Atanh": (None, 0.9), "Tan": (None, 0.9)}  # fmt: skip


def since(kind: str) -> int:
    """The first opset that has an operator."""
    return min(s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == kind and s.domain == "")


def within(net: Net, x: str, low: float | None, high: float | None) -> str:
    """|x| + low, or high * tanh(x): values that an operator is defined on."""
    if low is not None:
        return net.op("Add", net.op("Abs", x), net.const(low, net.dtype))
    return net.op("Mul", net.op("Tanh", x), net.const(high, net.dtype))


@pytest.mark.parametrize("kind", [*ANY, *DOMAIN])
def test_unary(kind: str) -> None:
    if since(kind) > newest():
        pytest.skip("newer than onnxruntime")
    net = Net(max(since(kind), (9, 13, newest())[len(kind) % 3]))
    x = produce(net, ("nchw", "nlc")[len(kind) % 2])
    check(net, net.op(kind, within(net, x, *DOMAIN[kind]) if kind in DOMAIN else x))


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu"])
@given(data=st.data(), opset=opsets(9))
@settings(max_examples=3)
def test_binary_with_another_branch(kind: str, data: st.DataObject, opset: int) -> None:
    """Two tensors with channels of their own: these go together."""
    net = Net(opset)
    layout = data.draw(LAYOUTS)
    left, right = produce(net, layout, name="a"), produce(net, layout, name="b")
    if kind in ("Div", "Pow"):
        left, right = within(net, left, 0.5, None), within(net, right, 0.5, None)
    many = kind in ("Min", "Max", "Sum", "Mean") and data.draw(st.booleans())
    check(net, net.op(kind, left, right, *([produce(net, layout, name="c")] if many else [])))


CONSTANTS = {
    "nchw": [(), (1,), (1, 1, 1), (6, 1, 1), (1, 6, 1, 1), (5,), (4, 5), (6, 4, 5), (1, 6, 4, 5), (1, 1, 4, 5)],
    "nlc": [(), (1,), (6,), (4, 6), (4, 1), (1, 4, 6), (1, 1, 6)],
    "nc": [(), (6,), (1, 6), (1, 1)],
}


@pytest.mark.parametrize(("layout", "shape"), [(k, s) for k, v in CONSTANTS.items() for s in v], ids=str)
@given(left=st.booleans(), kind=st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow", "Max"]), opset=opsets(8))
@settings(max_examples=2)
def test_binary_with_a_constant(layout: str, shape: tuple[int, ...], left: bool, kind: str, opset: int) -> None:
    """A constant on either side, of every rank and with every pattern of ones, is cut in step."""
    net = Net(opset)
    x = within(net, produce(net, layout), 0.5, None)
    constant = net.weight(*shape, low=0.5, scale=0.4)
    check(net, net.op(kind, constant, x) if left else net.op(kind, x, constant))


@given(data=st.data(), opset=opsets())
@settings(max_examples=8)
def test_gates_broadcast_over_positions(data: st.DataObject, opset: int) -> None:
    """[N, C, 1, 1] and [N, 1, H, W] and [N, 1, 1, 1] against [N, C, H, W]."""
    net = Net(opset)
    x = produce(net, "nchw")
    over_space, channels = data.draw(st.booleans()), data.draw(st.sampled_from([1, 6]))
    gate = net.conv(x, 6, channels, 1)
    if over_space:
        gate = net.op("GlobalAveragePool", gate)
    gate = net.op("Sigmoid", gate)
    check(net, net.op("Mul", *((gate, x) if data.draw(st.booleans()) else (x, gate))))


def test_outer_product_of_two_branches() -> None:
    """[N, C, 1] * [N, 1, D]: both axes have channels of their own, and both stay cuttable where nothing merges them."""
    net = Net(17)
    x = net.input("x", ["N", 3])
    left = net.unsqueeze(net.linear(x, 3, 6), [2])
    right = net.unsqueeze(net.linear(x, 3, 8), [1])
    product = net.op("Mul", left, right)
    read = net.op("MatMul", product, net.weight(8, 4))
    check(net, net.op("ReduceSum", read, net.const([1]), keepdims=0))


@pytest.mark.parametrize("kind", ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"])
@given(layout=LAYOUTS)
@settings(max_examples=2)
def test_comparisons_and_logic(kind: str, layout: str) -> None:
    net = Net(17)
    left, right = produce(net, layout, name="a"), produce(net, layout, name="b")
    bits = net.op(kind, left, right)
    other = net.op("Not", net.op("Greater", left, net.const(0.1, net.dtype)))
    mixed = net.op({"Equal": "Xor", "Less": "Or"}.get(kind, "And"), bits, other)
    check(net, net.op("Cast", mixed, to=1))


@given(layout=LAYOUTS, arrangement=st.sampled_from(["branches", "constants", "mask", "scalar"]), opset=opsets(9))
@settings(max_examples=8)
def test_where(layout: str, arrangement: str, opset: int) -> None:
    net = Net(opset)
    x = produce(net, layout)
    axis = 1 if layout.startswith("nch") or layout == "ncl" else -1
    shape = (6, *[1] * (len(layout) - 2)) if axis == 1 else (6,)
    condition = net.op("Greater", x, net.const(0.0, net.dtype))
    if arrangement == "mask":
        condition = net.const(net.rng.integers(0, 2, shape).astype(bool))
    other = {
        "branches": lambda: produce(net, layout, name="b"),
        "constants": lambda: net.weight(*shape),
        "mask": lambda: net.weight(*shape),
        "scalar": lambda: net.const(-1.0, net.dtype),
    }[arrangement]()
    # A constant condition is not a weight: what it meets keeps its size.
    check(net, net.op("Where", condition, x, other), cut=None if arrangement == "mask" else True)


@given(opset=opsets(), low=st.booleans(), high=st.booleans())
def test_clip(opset: int, low: bool, high: bool) -> None:
    net = Net(opset)
    x = produce(net, "nchw")
    if opset < 11:
        clipped = net.op("Clip", x, min=-0.5 if low else None, max=0.5 if high else None)
    else:
        bounds = [net.const(-0.5, net.dtype) if low else "", net.const(0.5, net.dtype) if high else ""]
        clipped = net.op("Clip", x, *bounds)
    check(net, clipped)


@given(opset=opsets(), shape=st.sampled_from([(1,), (6, 1, 1), (1, 1, 1), (6, 4, 5)]))
def test_prelu(opset: int, shape: tuple[int, ...]) -> None:
    net = Net(opset)
    check(net, net.op("PRelu", produce(net, "nchw"), net.weight(*shape)))


@given(opset=opsets(), layout=LAYOUTS)
@settings(max_examples=4)
def test_dropout_at_inference(opset: int, layout: str) -> None:
    net = Net(opset)
    x = produce(net, layout)
    y = net.op("Dropout", x, ratio=0.4) if opset < 12 else net.op("Dropout", x, net.const(0.4, net.dtype))
    check(net, net.op("Relu", y))


@pytest.mark.parametrize("kind", [np.float64, np.float16, BFLOAT16, np.int32], ids=lambda k: np.dtype(k).name)
def test_cast_there_and_back(kind: np.dtype) -> None:
    net = Net(17)
    x = produce(net, "nchw")
    there = net.op(
        "Cast",
        net.op("Mul", x, net.const(4.0, net.dtype)),
        to=int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))),
    )
    check(net, net.op("CastLike", there, x), tolerance=1e-2)


@pytest.mark.parametrize("kind", ["Mod", "BitwiseAnd", "BitwiseXor", "BitShift"])
def test_integer_arithmetic(kind: str) -> None:
    net = Net(18)
    x = net.op(
        "Cast", net.op("Abs", net.op("Mul", produce(net, "nchw"), net.const(9.0, net.dtype))), to=onnx.TensorProto.UINT8
    )
    attrs = {"direction": "RIGHT"} if kind == "BitShift" else {}
    check(net, net.op("Cast", net.op(kind, x, net.const(3, np.uint8), **attrs), to=1))


@pytest.mark.parametrize("kind", ["IsNaN", "IsInf"])
def test_tests_of_values(kind: str) -> None:
    net = Net(20)
    x = produce(net, "nchw")
    check(net, net.op("Where", net.op(kind, x), net.const(0.0, net.dtype), x))


@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_meeting_a_graph_input_keeps_the_channels(layout: str) -> None:
    net = Net(17)
    x = produce(net, layout)
    shape = ["N", 6, 4, 5] if layout == "nchw" else ["N", 4, 6]
    check(net, net.op("Add", x, net.input("y", shape)), cut=False)


def test_meeting_an_input_of_one_position_is_no_barrier() -> None:
    net = Net(17)
    check(net, net.op("Mul", produce(net, "nchw"), net.input("y", ["N", 1, 4, 5])))
