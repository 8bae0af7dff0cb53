"""Every operator by every method: at full rank the model says the same, in onnxruntime and in onnx itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import BFLOAT16, Net
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from planted_factors import draw, factorized, names_of, outputs

import onnxprune as op
from onnxprune.errors import ValidationError
from onnxprune.factorization.decompositions import METHODS, Ranks
from onnxprune.operators.kernels import Shape
from onnxprune.passes import products

Build = Callable[[Net], str]
Case = tuple[str, Build, Shape, dict[str, Any]]


def conv(shape: Shape, opset: int = 17, transposed: bool = False, bias: bool = True, **attrs: Any) -> Case:
    """A convolution between two others, so that nothing is at the border of the model."""
    rank = len(shape.kernel)
    ins, outs = shape.parts * shape.inputs, shape.parts * shape.outputs

    def build(net: Net) -> str:
        x = net.conv(net.input("x", ["N", 3, *[9, 7, 5][:rank]]), 3, ins, 1, dims=rank, pad=False)
        dims = (ins, shape.outputs) if transposed else (outs, shape.inputs)
        operands = [x, net.weight(*dims, *shape.kernel, name="weight")]
        if bias:
            operands.append(net.weight(outs, scale=0.5))
        kind = "ConvTranspose" if transposed else "Conv"
        return str(net.op("Relu", net.op(kind, *operands, group=shape.parts, **attrs)))

    what = f"{'transposed' if transposed else 'conv'}{rank}d-{shape.parts}-{shape.kernel}-{sorted(attrs)}-{opset}"
    return what, build, shape, {"opset": opset}


def product(kind: str, build: Build, shape: Shape, opset: int = 17) -> Case:
    return kind, build, shape, {"opset": opset}


def gemm(net: Net, *, left: bool = False, opset: int = 17, **attrs: Any) -> str:
    x = net.input("x", [6, 5] if attrs.get("transA") and not left else [5, 6] if not left else [7, 4])
    flip = attrs.get("transA") if left else attrs.get("transB")
    weight = net.weight(*([6, 9] if not flip else [9, 6]), name="weight") if not left else net.weight(
        *([9, 7] if not flip else [7, 9]), name="weight")  # fmt: skip
    operands = [weight, x] if left else [x, weight]
    return str(net.op("Gemm", *operands, net.weight(9 if not left else 4, scale=0.5), **attrs))


def einsum(net: Net) -> str:
    x = net.input("x", ["N", 5, 3, 4])
    return str(net.op("Einsum", x, net.weight(3, 4, 8, name="weight"), equation="nshd,hdm->nsm"))


def batched(net: Net) -> str:
    x = net.op("Transpose", net.input("x", ["N", 5, 3, 4]), perm=[0, 2, 1, 3])
    return str(net.op("MatMul", x, net.weight(3, 4, 8, name="weight")))


def left(net: Net) -> str:
    return str(net.op("MatMul", net.weight(8, 6, name="weight"), net.input("x", ["N", 6, 4])))


def recurrent(kind: str, gates: int, direction: str) -> Build:
    def build(net: Net) -> str:
        dirs = 2 if direction == "bidirectional" else 1
        x = net.input("x", [4, "N", 6])
        operands = [x, net.weight(dirs, gates * 5, 6, name="weight"), net.weight(dirs, gates * 5, 5, name="state")]
        operands.append(net.weight(dirs, 2 * gates * 5, scale=0.3))
        return str(net.op(kind, *operands, n=2, hidden_size=5, direction=direction)[0])

    return build


def table(net: Net) -> str:
    return str(net.op("Gather", net.weight(11, 6, name="weight"), net.input("x", ["N", 4], np.int64)))


CASES: list[Case] = [
    conv(Shape(1, 4, (3,), 6), pads=[1, 1], strides=[2]),
    conv(Shape(1, 4, (3, 3), 6), pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]),
    conv(Shape(1, 4, (3, 3), 6), auto_pad="SAME_UPPER", strides=[2, 2]),
    conv(Shape(1, 4, (2, 3), 6), auto_pad="SAME_LOWER", opset=11),
    conv(Shape(1, 4, (3, 3), 6), auto_pad="VALID"),
    conv(Shape(2, 3, (3, 3), 4), pads=[1] * 4),
    conv(Shape(4, 1, (5, 5), 1), pads=[2] * 4, strides=[1, 2]),
    conv(Shape(1, 3, (5, 5), 4), pads=[2] * 4, bias=False),
    conv(Shape(1, 3, (2, 3, 2), 4), pads=[1] * 6, strides=[2, 1, 1]),
    conv(Shape(1, 6, (1, 1), 5), strides=[2, 2]),
    conv(Shape(1, 4, (1, 3), 5), strides=[2, 1], pads=[0, 1, 0, 1]),
    conv(Shape(1, 4, (3,), 6), transposed=True, strides=[2], pads=[1, 0]),
    conv(Shape(1, 4, (3, 2), 6), transposed=True, strides=[2, 3], pads=[1, 0, 1, 1], output_padding=[1, 0]),
    conv(Shape(2, 3, (3, 3), 4), transposed=True, strides=[1, 2], dilations=[2, 1]),
    product("matmul", lambda net: str(net.op("MatMul", net.input("x", ["N", 4, 6]), net.weight(6, 9, name="weight"))),
            Shape(1, 6, (), 9)),
    product("matmul-left", left, Shape(1, 6, (), 8)),
    product("matmul-batched", batched, Shape(3, 4, (), 8)),
    product("gemm", lambda net: gemm(net, alpha=0.7, beta=0.4), Shape(1, 6, (), 9)),
    product("gemm-transposed", lambda net: gemm(net, transA=1, transB=1), Shape(1, 6, (), 9)),
    product("gemm-old", lambda net: gemm(net, transB=1), Shape(1, 6, (), 9), opset=9),
    product("gemm-left", lambda net: gemm(net, left=True, transA=1), Shape(1, 7, (), 9)),
    product("einsum", einsum, Shape(1, 12, (), 8)),
    product("lstm", recurrent("LSTM", 4, "bidirectional"), Shape(1, 6, (), 40)),
    product("gru", recurrent("GRU", 3, "forward"), Shape(1, 6, (), 15)),
    product("rnn", recurrent("RNN", 1, "reverse"), Shape(1, 6, (), 5)),
    product("table", table, Shape(1, 11, (), 6)),
]  # fmt: skip


def full(name: str, shape: Shape) -> list[Ranks]:
    limits = METHODS[name].limits(shape)
    if name != "tucker":
        return [limits]
    spatial = [(*limits, *shape.kernel)] if max(shape.kernel) >= 5 else []
    return [limits, (limits[0], 0), (0, limits[1]), *spatial]


def laws() -> list[Any]:
    found = []
    for what, build, shape, settings in CASES:
        for name, method in METHODS.items():
            if not method.refusal(shape):
                found += [
                    pytest.param(build, name, ranks, settings, id=f"{what}-{name}-{','.join(map(str, ranks))}")
                    for ranks in full(name, shape)
                ]
    return found


@pytest.mark.parametrize(("build", "name", "ranks", "settings"), laws())
@pytest.mark.parametrize("data", [False, True], ids=["plain", "data"])
def test_full_rank_says_the_same(build: Build, name: str, ranks: Ranks, settings: dict[str, Any], data: bool) -> None:
    net = Net(**settings)
    model = net.model(build(net))
    feed = draw(model, 6)
    made = factorized(model, name, rank={"weight": ranks}, data=feed if data else None)
    names = names_of(made)
    assert any(f"{name.replace('-', '_')}_" in n for n in names) and "weight" not in names
    for a, b in zip(outputs(model, feed), outputs(made, feed), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    if not data and not any(n.op_type in ("LSTM", "GRU", "RNN", "ConvTranspose") for n in model.graph.node):
        if is_mispadded(model):
            return
        for a, b in zip(outputs(model, feed), ReferenceEvaluator(made).run(None, feed), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def is_mispadded(model: onnx.ModelProto) -> bool:
    """Whether onnx's reference evaluator pads the model in another way than ONNX states: auto_pad before onnx 1.22."""
    old = tuple(int(part) for part in onnx.__version__.split(".")[:2]) < (1, 22)
    return old and any(a.name == "auto_pad" for node in model.graph.node for a in node.attribute)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, BFLOAT16])
def test_types_stay(dtype: Any) -> None:
    net = Net(17, dtype=dtype)
    x = net.op("Relu", net.linear(net.input("x", ["N", 12]), 12, 16, gemm=True))
    model = net.model(net.linear(x, 16, 10, gemm=True))
    made = factorized(model, "svd", ratio=0.2, check=np.dtype(dtype) != BFLOAT16)
    kinds = {t.data_type for t in made.graph.initializer if "svd" in t.name}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}


def test_before_ir_4_new_weights_are_constants() -> None:
    """There every initializer is an input of the model as well, and users would have to feed the new ones."""
    net = Net(8, ir=3)
    model = net.model(net.conv(net.input("x", [2, 3, 8, 8]), 3, 6))
    made = factorized(model, "tucker", rank=[3, 6])
    known = {t.name for t in made.graph.initializer}
    assert known <= {i.name for i in made.graph.input}
    feed: dict[str, NDArray[Any]] = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    for a, b in zip(outputs(model, feed), outputs(made, feed), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize("spoiled", [False, True])
def test_scores_next_to_zero_are_checked_in_front_of_the_sigmoid(
    spoiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of 1e-7 are decided by the last place of 1; what they are computed from is not."""
    net = Net(17, seed=3)
    y = net.linear(net.op("Tanh", net.linear(net.input("x", ["N", 64]), 64, 64)), 64, 64)
    model = net.model(net.op("Reshape", net.op("Sigmoid", net.op("Sub", y, net.const(14.0))), net.const([-1, 8, 8])))
    compose = products.compose_layers

    def composed(graph: Any, weights: Any, layers: Any, kernels: Any) -> None:
        compose(graph, weights, layers, [1.01 * kernel if spoiled else kernel for kernel in kernels])

    monkeypatch.setattr(products, "compose_layers", composed)
    if spoiled:
        with pytest.raises(ValidationError, match="do not compute the product"):
            op.factorize(model, ratio=0.4, timed=False, latency=False)
        return
    result = op.factorize(model, ratio=0.4, timed=False, latency=False)
    assert any(layer.method for layer in result.report.factorized)
