"""The gradient of every operator against central differences, over the grid of its settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from differences import check, gradients, static

from onnxprune.gradients.backward import inference_graph
from onnxprune.gradients.lowering import lowered
from onnxprune.gradients.tape import Tape

POINTWISE = {
    "Relu": {}, "LeakyRelu": {"alpha": 0.2}, "Sigmoid": {}, "Tanh": {}, "Exp": {}, "Neg": {}, "Abs": {}, "Sin": {},
    "Cos": {}, "Tan": {}, "Sinh": {}, "Cosh": {}, "Atan": {}, "Asinh": {}, "Erf": {}, "Softplus": {}, "Softsign": {},
    "Elu": {"alpha": 1.3}, "Selu": {}, "Celu": {"alpha": 0.7}, "Mish": {}, "HardSigmoid": {"alpha": 0.3},
    "HardSwish": {}, "ThresholdedRelu": {"alpha": 0.4}, "Shrink": {"lambd": 0.3, "bias": 0.1}, "Identity": {},
    "Reciprocal": {}, "Softmax": {"axis": 1}, "LogSoftmax": {"axis": -1}, "Dropout": {},
    "LpNormalization": {"axis": 1, "p": 2}, "MeanVarianceNormalization": {"axes": [0, 2]},
}  # fmt: skip
POSITIVE = {"Log": {}, "Sqrt": {}, "Acosh": {}}


def one(op: str, *operands: Any, n: int = 1, opset: int = 18, low: float | None = None, scale: float = 1.0,
        engine: str = "reference", **attrs: Any) -> None:  # fmt: skip
    """Check one operator. Tuples are shapes of float operands, arrays constants, "" what is absent."""
    net = Net(opset)
    names: list[str] = []
    for operand in operands:
        if isinstance(operand, tuple):
            names.append(net.weight(*operand, scale=scale, low=low))
        else:
            names.append(operand if isinstance(operand, str) else net.const(operand))
    variables = [name for name, operand in zip(names, operands, strict=True) if isinstance(operand, tuple)]
    outputs = net.op(op, *names, n=n, **attrs)
    results = outputs if n > 1 else [outputs]
    shapes = dict.fromkeys(results)
    check(net.model(*results, shapes=shapes, check=False), {}, variables, engine=engine)


@pytest.mark.parametrize("op", POINTWISE)
def test_pointwise(op: str) -> None:
    one(op, (2, 3, 4), opset=22 if op == "Swish" else 18, **POINTWISE[op])


@pytest.mark.parametrize("op", POSITIVE)
def test_pointwise_of_positive_values(op: str) -> None:
    one(op, (2, 3, 4), low=1.2, **POSITIVE[op])


@pytest.mark.parametrize("op", ["Asin", "Acos", "Atanh"])
def test_pointwise_within_one(op: str) -> None:
    one(op, (2, 3, 4), scale=0.2)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    one("Gelu", (2, 3, 4), opset=20, approximate=approximate)


@pytest.mark.parametrize("other", [(2, 3, 4), (4,), (3, 1), (1, 1, 4), (5, 1, 3, 4)])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Mod"])
def test_broadcasting(op: str, other: tuple[int, ...]) -> None:
    engine = "linear" if op == "Mean" else "reference"
    one(op, (2, 3, 4), other, low=0.4, engine=engine, **({"fmod": 1} if op == "Mod" else {}))


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
def test_three_operands(op: str) -> None:
    one(op, (2, 3), (3,), (2, 1))


def test_max_with_itself_counts_once() -> None:
    net = Net(18)
    x = net.weight(2, 3)
    check(net.model(net.op("Max", x, x)), {}, [x])


def test_pow() -> None:
    one("Pow", (2, 3), (3,), low=0.3)
    one("Pow", (2, 3), np.float32(2))
    one("Pow", (2, 3), np.float32(3))
    one("Pow", (2, 3), np.int64(3))


def test_where_and_clip() -> None:
    one("Where", np.array([[True, False, True]]), (2, 3), (2, 1))
    one("Clip", (3, 5), np.float32(-0.5), np.float32(0.6))
    one("Clip", (3, 5), "", np.float32(0.3))
    one("Clip", (3, 5))
    one("PRelu", (2, 3, 4), (3, 1))


MATRICES = [((3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)),
            ((2, 1, 3, 4), (5, 4, 2)), ((4,), (2, 4, 5)), ((2, 3, 4), (4,)), ((1, 3, 4), (6, 4, 2))]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), MATRICES)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    one("MatMul", a, b)


@pytest.mark.parametrize("flip_a", [0, 1])
@pytest.mark.parametrize("flip_b", [0, 1])
@pytest.mark.parametrize("bias", [(5,), (3, 1), (1,), None])
def test_gemm(flip_a: int, flip_b: int, bias: tuple[int, ...] | None) -> None:
    operands = [(4, 3) if flip_a else (3, 4), (5, 4) if flip_b else (4, 5), *([bias] if bias else [])]
    one("Gemm", *operands, transA=flip_a, transB=flip_b, alpha=0.5, beta=1.5)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("ij,jk", [(3, 4), (4, 5)]),
        ("bhid,bhjd->bhij", [(2, 2, 3, 4), (2, 2, 5, 4)]),
        ("ij->i", [(3, 4)]),
        ("i,j->ij", [(3,), (4,)]),
        ("ij,ik->i", [(3, 4), (3, 5)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    one("Einsum", *shapes, equation=equation)


CONVOLUTIONS = [
    {"kernel": (3,), "pads": [1, 0]},
    {"kernel": (3,), "pads": [2, 1], "strides": [2], "dilations": [2]},
    {"kernel": (3, 3)},
    {"kernel": (3, 3), "pads": [0, 0, 1, 1], "strides": [2, 2]},
    {"kernel": (3, 2), "pads": [1, 0, 2, 1], "strides": [2, 3], "dilations": [1, 2]},
    {"kernel": (1, 1)},
    {"kernel": (1, 1), "strides": [2, 2]},
    {"kernel": (1, 1), "pads": [1, 0, 0, 1]},
    {"kernel": (2, 3), "strides": [3, 3], "sizes": (8, 9)},
    {"kernel": (1, 1), "strides": [4, 3], "sizes": (8, 9)},
    {"kernel": (3, 3), "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"kernel": (2, 3), "auto_pad": "SAME_LOWER", "strides": [1, 2]},
    {"kernel": (3, 3), "auto_pad": "VALID"},
    {"kernel": (2, 3, 2), "pads": [1, 0, 1, 0, 2, 0], "strides": [1, 2, 1]},
    {"kernel": (2, 2, 2), "dilations": [2, 1, 1], "sizes": (4, 4, 3)},
]
SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 3)}


@pytest.mark.newest_runtime  # the evaluator of older releases of onnx pads some of these wrongly
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("group", [1, 2, "depthwise", "multiplier"])
def test_conv(case: dict[str, Any], group: int | str) -> None:
    attrs = dict(case)
    kernel, sizes = attrs.pop("kernel"), attrs.pop("sizes", SIZES[len(case["kernel"])])
    ins, outs, groups = {1: (3, 2, 1), 2: (4, 6, 2), "depthwise": (3, 3, 3), "multiplier": (2, 4, 2)}[group]
    bias = () if group == 2 else ((outs,),)
    attrs["engine"] = "reference" if group == 1 else "linear"  # the evaluator has no grouped ConvTranspose
    one("Conv", (2, ins, *sizes), (outs, ins // groups, *kernel), *bias, group=groups, **attrs)


def test_wide_depthwise_convolutions_go_block_by_block() -> None:
    for attrs in ({"pads": [1, 1, 1, 1]}, {"strides": [1, 2], "pads": [1, 0, 1, 2]}, {"dilations": [2, 2]}):
        one("Conv", (1, 2, 5, 75), (2, 1, 3, 3), group=2, engine="linear", **attrs)


@pytest.mark.parametrize("size", [(5, 6), (7, 30)])  # one product for all positions, and one per row
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "attrs",
    [
        {"pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "pads": [0, 1, 2, 1]},
        {"dilations": [2, 1]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [1, 2], "auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_depthwise_convolutions_as_products(attrs: dict[str, Any], bias: bool, size: tuple[int, int]) -> None:
    """The forward pass of training gives what the convolution gives."""
    net, rng = Net(18), np.random.default_rng(1)
    inputs = [net.input("x", ["N", 3, *size]), net.weight(3, 1, 3, 2), *([net.weight(3)] if bias else [])]
    y = net.op("Conv", *inputs, group=3, **attrs)
    model = net.model(y)
    feed = {"x": rng.standard_normal((2, 3, *size)).astype(np.float32)}
    graph = lowered(static(model, feed))
    assert graph.producer[y].op in ("Transpose", "Reshape")
    session = ort.InferenceSession(inference_graph(graph, Tape(graph.shapes, graph.kinds), [y]).SerializeToString())
    (wanted,) = ort.InferenceSession(model.SerializeToString()).run([y], feed)
    np.testing.assert_allclose(session.run([y], feed)[0], wanted, rtol=1e-5, atol=1e-5)


TRANSPOSED = [
    {"kernel": (3,), "strides": [2], "pads": [1, 0]},
    {"kernel": (3, 3)},
    {"kernel": (3, 2), "strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2]},
    {"kernel": (2, 2), "strides": [2, 2]},
    {"kernel": (1, 1), "strides": [2, 2]},
    {"kernel": (3, 3), "dilations": [2, 1], "pads": [2, 1, 1, 0]},
    {"kernel": (3, 3), "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel": (3, 3), "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"kernel": (2, 3, 2), "strides": [1, 2, 1]},
]


@pytest.mark.parametrize("case", TRANSPOSED)
@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose(case: dict[str, Any], group: int) -> None:
    attrs = dict(case)
    kernel = attrs.pop("kernel")
    sizes = {1: (4,), 2: (3, 4), 3: (2, 3, 2)}[len(kernel)]
    attrs["engine"] = "reference" if group == 1 else "linear"
    one("ConvTranspose", (2, 4, *sizes), (4, 3, *kernel), (3 * group,), group=group, **attrs)


POOLS = [
    {"kernel_shape": [3], "strides": [2], "pads": [1, 0]},
    {"kernel_shape": [3, 2], "strides": [2, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 0]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [2, 2, 2], "pads": [1, 0, 0, 0, 1, 1]},
]


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pool(case: dict[str, Any], op: str) -> None:
    sizes = SIZES[len(case["kernel_shape"])]
    one(op, (2, 3, *sizes), engine="double" if op == "MaxPool" else "linear", **case)
    if op == "AveragePool":
        one(op, (2, 3, *sizes), count_include_pad=1, engine="linear", **case)


def test_dilated_pools() -> None:
    one("MaxPool", (1, 2, 7, 7), kernel_shape=[2, 3], dilations=[2, 2], pads=[1, 1, 0, 1], engine="double")
    one(
        "AveragePool", (1, 2, 7, 7), opset=19, kernel_shape=[2, 3], dilations=[2, 1], pads=[1, 1, 0, 1], engine="linear"
    )


def test_global_pools() -> None:
    one("GlobalAveragePool", (2, 3, 4, 5))
    one("GlobalMaxPool", (2, 3, 4, 5))


def test_equal_maxima_share_the_gradient() -> None:
    for op in ("GlobalMaxPool", "ReduceMax"):
        net = Net(18)
        x = net.const(np.ones((1, 2, 3, 3), np.float32), name="x")
        y = net.op(op, x) if op == "GlobalMaxPool" else net.reduce(op, x, [2, 3])
        gradient = gradients(net.model(y), {}, [x])[x]
        np.testing.assert_allclose(gradient, np.broadcast_to(gradient[:, :, :1, :1], gradient.shape))


RESIZES = [
    {"mode": "nearest"},
    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    {"mode": "linear"},
    {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.5},
]


@pytest.mark.parametrize("case", RESIZES)
@pytest.mark.parametrize("how", ["scales", "sizes", "down"])
def test_resize(case: dict[str, Any], how: str) -> None:
    given = {
        "scales": ["", np.array([1, 1, 2, 1.5], np.float32)],
        "down": ["", np.array([1, 1, 0.6, 0.5], np.float32)],
        "sizes": ["", "", np.array([2, 3, 7, 6])],
    }[how]
    one("Resize", (2, 3, 4, 5), *given, engine="linear", **case)


def test_upsample_of_old_models() -> None:
    net = Net(9)
    x = net.weight(1, 2, 3, 4)
    check(net.model(net.op("Upsample", x, net.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest")), {}, [x])


def test_normalisations() -> None:
    one("LayerNormalization", (2, 3, 4), (4,), (4,))
    one("LayerNormalization", (2, 3, 4), (3, 4), axis=1, epsilon=1e-3)
    one("RMSNormalization", (2, 3, 4), (4,), opset=23)
    one("InstanceNormalization", (2, 3, 4, 5), (3,), (3,), epsilon=0.1)
    one("GroupNormalization", (2, 4, 3, 3), (4,), (4,), opset=21, num_groups=2)
    one("LRN", (2, 7, 3, 2), size=3, alpha=0.5, beta=0.6, bias=1.5)
    one("LRN", (2, 7, 2, 3), size=5, alpha=0.5)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_batch_normalization(shape: tuple[int, ...]) -> None:
    net = Net(18)
    names = [net.weight(*shape), *(net.weight(3, low=0.5) for _ in range(4))]
    check(net.model(net.op("BatchNormalization", *names)), {}, names[:3])


def test_batch_normalization_by_statistics_of_the_batch() -> None:
    net = Net(18)
    names = [net.weight(4, 3, 5), *(net.weight(3, low=0.5) for _ in range(4))]
    check(net.model(net.op("BatchNormalization", *names, n=3, training_mode=1)[0]), {}, names[:3])


REDUCTIONS = "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp"


@pytest.mark.parametrize("op", REDUCTIONS.split())
@pytest.mark.parametrize("axes", [[1], [-1, 0], None])
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions(op: str, axes: list[int] | None, keep: int) -> None:
    one(op, (2, 3, 4), *([] if axes is None else [np.array(axes)]), keepdims=keep)


def test_old_reductions_have_axes_as_an_attribute() -> None:
    net = Net(11)
    x = net.weight(2, 3, 4)
    check(net.model(net.op("ReduceMean", x, axes=[1], keepdims=0)), {}, [x])


def test_log_sum_and_sums_in_order() -> None:
    one("ReduceLogSum", (2, 3), np.array([1]), low=0.5)
    one("CumSum", (2, 3, 4), np.int64(1))
    one("CumSum", (2, 3, 4), np.int64(2), reverse=1, exclusive=1)


def test_norms_of_zero_have_no_gradient_in_place_of_nan() -> None:
    for op in ("ReduceL2", "ReduceSumSquare"):
        net = Net(18)
        x = net.const(np.zeros((2, 3), np.float32), name="x")
        y = net.reduce(op, x, [1])
        y = net.op("Sqrt", y) if op == "ReduceSumSquare" else y
        assert np.isfinite(gradients(net.model(y), {}, [x])[x]).all()


MOVES = [
    ("Reshape", [(2, 3, 4), np.array([4, -1])], {}),
    ("Flatten", [(2, 3, 4)], {"axis": 2}),
    ("Squeeze", [(2, 1, 4), np.array([1])], {}),
    ("Unsqueeze", [(2, 4), np.array([0, 2])], {}),
    ("Transpose", [(2, 3, 4)], {"perm": [2, 0, 1]}),
    ("Transpose", [(2, 3, 4)], {}),
    ("Expand", [(3, 1), np.array([2, 3, 4])], {}),
    ("Tile", [(2, 3), np.array([2, 2])], {}),
    ("Slice", [(4, 5), np.array([1, 1]), np.array([3, 100])], {}),
    ("Slice", [(4, 5), np.array([-3]), np.array([-1]), np.array([-1])], {}),
    ("Slice", [(4, 5), np.array([0, 1]), np.array([4, 5]), np.array([0, 1]), np.array([2, 3])], {}),
    ("Slice", [(4, 5), np.array([-1]), np.array([-100]), np.array([1]), np.array([-2])], {}),
    ("Pad", [(2, 3), np.array([1, 0, 2, 1])], {}),
    ("Pad", [(2, 3), np.array([-1, 0, 0, 1])], {}),
    ("Pad", [(2, 3), np.array([2, 1]), "", np.array([-1])], {}),
    ("Pad", [(3, 4), np.array([1, 2, 0, 1])], {"mode": "reflect"}),
    ("Pad", [(3, 4), np.array([1, 2, 0, 1])], {"mode": "edge"}),
    ("DepthToSpace", [(2, 8, 2, 3)], {"blocksize": 2}),
    ("DepthToSpace", [(2, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [(2, 2, 4, 6)], {"blocksize": 2}),
    ("Trilu", [(3, 4)], {"upper": 0}),
    ("Gather", [(4, 3), np.array([0, 2, 2])], {}),
    ("Gather", [(4, 3), np.array([[0, -1], [1, 1]])], {"axis": 1}),
    ("Gather", [(4, 3), np.int64(1)], {"axis": 0}),
    ("GatherElements", [(3, 4), np.array([[0, 1, 1], [3, 3, 0]])], {"axis": 1}),
    ("GatherND", [(3, 4, 2), np.array([[0, 1], [2, 3], [0, 1]])], {}),
    ("ScatterND", [(4, 3), np.array([[0], [2]]), (2, 3)], {}),
    ("ScatterND", [(4, 3), np.array([[0], [0]]), (2, 3)], {"reduction": "add"}),
    ("ScatterElements", [(3, 4), np.array([[1, 0], [2, 2]]), (2, 2)], {"axis": 1, "reduction": "add"}),
    ("ScatterElements", [(3, 4), np.array([[1, 0], [2, 3]]), (2, 2)], {"axis": 1}),
    ("Concat", [(2, 3), (2, 1), (2, 2)], {"axis": 1}),
    ("Compress", [(2, 4), np.array([True, False, True])], {"axis": 1}),
    ("ReverseSequence", [(4, 3), np.array([1, 2, 4])], {"time_axis": 0, "batch_axis": 1}),
    ("CenterCropPad", [(4, 5), np.array([3, 6])], {}),
]


@pytest.mark.parametrize(("op", "operands", "attrs"), MOVES)
def test_movement(op: str, operands: list[Any], attrs: dict[str, Any]) -> None:
    engine = "linear" if "Elements" in op or (op == "Pad" and min(operands[1]) < 0) else "reference"
    one(op, *operands, engine=engine, **attrs)


def test_split_and_top_k() -> None:
    one("Split", (2, 6), np.array([1, 3, 2]), n=3, axis=1)
    one("Split", (5, 2), n=2, num_outputs=2)
    one("TopK", (3, 6), np.array([2]), n=2, axis=1)


def test_a_part_of_a_split_that_nothing_reads() -> None:
    net = Net(18)
    x = net.weight(2, 6)
    first, _ = net.split(x, [2, 4], 1)
    check(net.model(first), {}, [x])


def test_quantisation_is_straight_through() -> None:
    net = Net(18)
    x = net.const(np.linspace(-3, 3, 12).astype(np.float32).reshape(3, 4), name="x")
    scale, zero = net.const(np.float32(0.02)), net.const(np.array(3, np.int8), np.int8)
    codes = net.op("QuantizeLinear", x, scale, zero)
    y = net.op("DequantizeLinear", codes, scale, zero)
    gradient = gradients(net.model(y), {}, [x], seeded=False)[x]
    inside = np.abs(np.linspace(-3, 3, 12) / 0.02 + 3) < 128
    np.testing.assert_allclose(gradient.ravel(), inside.astype(np.float32), atol=1e-6)
    assert isinstance(net.model(y), onnx.ModelProto)
