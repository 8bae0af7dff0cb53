"""onnxruntime's fused operators: channels go through them, and the cut model equals the masked original."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from build import Net
from fused import MS, attributes, cut, finish, shapes

import onnxprune as op


def between(
    middle: Callable[[Net, str], str], *, wide: int = 12, after: int | None = None, dtype: type = np.float32
) -> op.Result:
    """Linear, the operator, linear: the cut and the shapes of both matrices."""
    net = Net(17, dtype=dtype)
    x = net.op("MatMul", net.input("x", ["N", 4, 6]), net.weight(6, wide, name="first"))
    y = net.op("MatMul", middle(net, x), net.weight(after or wide, 5, name="last"))
    return cut(finish(net, y))


UNARY = {
    "Gelu": lambda n, x: n.op("Gelu", x, domain=MS),
    "QuickGelu": lambda n, x: n.op("QuickGelu", x, domain=MS, alpha=1.7),
    "FastGelu": lambda n, x: n.op("FastGelu", x, domain=MS),
    "FastGelu with bias": lambda n, x: n.op("FastGelu", x, n.weight(12), domain=MS),
    "BiasGelu": lambda n, x: n.op("BiasGelu", x, n.weight(12), domain=MS),
    "a chain": lambda n, x: n.op("BiasGelu", n.op("QuickGelu", x, domain=MS), n.weight(12), domain=MS),
}


@pytest.mark.parametrize("middle", UNARY.values(), ids=UNARY.keys())
def test_activations_let_channels_through(middle: Callable[[Net, str], str]) -> None:
    result = between(middle)
    sizes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert sizes["first"] == (6, 6)
    assert sizes["last"] == (6, 5)
    assert all(t.dims[0] == 6 for t in result.model.graph.initializer if len(t.dims) == 1)


def test_half_precision_keeps_its_type() -> None:
    net = Net(17, dtype=np.float16)
    x = net.op("MatMul", net.input("x", ["N", 4, 6]), net.weight(6, 12))
    x = net.op("Cast", x, to=1)
    x = net.op("BiasGelu", x, net.const(net.rng.standard_normal(12), np.float32), domain=MS)
    x = net.op("MatMul", net.op("Cast", x, to=10), net.weight(12, 5))
    assert shapes(cut(finish(net, x)).model) == [(6, 6), (6, 5)]


@pytest.mark.parametrize("trans", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_fused_gemm(trans: tuple[int, int]) -> None:
    net = Net(17)
    a, b = trans
    x = net.input("x", ["N", 6])
    x = net.op("Relu", net.op("MatMul", x, net.weight(6, 12)))
    if a:
        x = net.transpose(x, 1, 0)
    w = net.weight(*((8, 12) if b else (12, 8)))
    x = net.op(
        "FusedGemm", x, w, net.weight(8), domain=MS, transA=a, transB=b, activation="LeakyRelu", activation_alpha=0.1
    )
    result = cut(finish(net, net.op("MatMul", x, net.weight(8, 5)), rank=2))
    assert shapes(result.model) == [(6, 6), (4, 6) if b else (6, 4), (4, 5)]


@pytest.mark.parametrize("batch", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("trans", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_fused_matmul_with_batch_transposes(trans: tuple[int, int], batch: tuple[int, int]) -> None:
    """Two products of computed operands, so that each summed axis comes from a weight; sizes all differ."""
    net = Net(17)
    terms = []
    for side, own in (("a", "mk"), ("b", "kn")):
        at = 0 if side == "a" else 1
        sizes = {"b": 2, "c": 3, "m": 4, "k": 8, "n": 10}
        axes = "bc" + (own[::-1] if trans[at] else own)
        if batch[at]:
            axes = axes[2] + axes[:2] + axes[3]
        # The weight's rows are the last axis; the operand is transposed from [b, c, other, k] into place.
        plain = "bc" + ("mk" if side == "a" else "nk")
        x = net.input(side, [sizes[c] if c != "k" else 6 for c in plain])
        x = net.op("MatMul", x, net.weight(6, 8, name=f"w{side}"))
        terms.append(net.transpose(x, *[plain.index(c) for c in axes]))
    y = net.op(
        "FusedMatMul", *terms, domain=MS, transA=trans[0], transB=trans[1], transBatchA=batch[0], transBatchB=batch[1]
    )
    result = cut(finish(net, y, rank=4))
    assert shapes(result.model) == [(6, 4), (6, 4)]


@pytest.mark.newest_runtime
def test_fused_conv_with_an_addend() -> None:
    net = Net(17)
    x = net.input("x", ["N", 3, 9, 8])
    a = net.conv(x, 3, 8)
    b = net.op("FusedConv", a, net.weight(8, 8, 3, 3), net.weight(8), a, domain=MS, pads=[1] * 4, activation="Relu")
    c = net.op("FusedConv", b, net.weight(4, 8, 3, 3), domain=MS, strides=[2, 2], auto_pad="SAME_UPPER")
    y = net.conv(c, 4, 2)
    result = cut(finish(net, y, rank=4))
    assert shapes(result.model) == [(4, 3, 3, 3), (4, 4, 3, 3), (2, 4, 3, 3), (2, 2, 3, 3)]


NORMS = {
    "SkipLayerNormalization": (4, lambda n: [n.weight(12, low=0.5), n.weight(12), n.weight(12)]),
    "SkipSimplifiedLayerNormalization": (3, lambda n: [n.weight(12, low=0.5), n.weight(12)]),
}


def block(net: Net, kind: str, *, opset_domain: str = MS) -> str:
    """Two feed-forward layers around a stream that is normalised, and whose sum goes on."""
    x = net.op("MatMul", net.input("x", ["N", 4, 6]), net.weight(6, 12, name="into"))
    f = net.op(
        "MatMul", net.op("Relu", net.op("MatMul", x, net.weight(12, 8, name="up"))), net.weight(8, 12, name="down")
    )
    outputs = net.op(kind, x, f, *NORMS[kind][1](net), n=4, domain=opset_domain, epsilon=1e-5)
    g = net.op("MatMul", net.op("Add", outputs[0], outputs[3]), net.weight(12, 5, name="out"))
    last = net.nodes[[n.op_type for n in net.nodes].index(kind)]
    last.output[1] = last.output[2] = ""
    return g


@pytest.mark.parametrize("kind", NORMS)
def test_skip_norms_are_cut_through(kind: str) -> None:
    net = Net(17)
    result = cut(finish(net, block(net, kind)))
    assert shapes(result.model) == [(6, 6), (6, 4), (4, 6), (6, 5)]


@pytest.mark.parametrize("kind", NORMS)
def test_skip_norms_are_cut_through_on_demand(kind: str) -> None:
    net = Net(17)
    result = cut(finish(net, block(net, kind)), approximate=True, validate=False)
    assert shapes(result.model) == [(6, 6), (6, 4), (4, 6), (6, 5)]


@pytest.mark.parametrize(
    ("domain", "kind", "operands"), [("", "LayerNormalization", 2), ("", "SimplifiedLayerNormalization", 1)]
)
def test_norms_that_onnx_does_not_know_at_this_opset(domain: str, kind: str, operands: int) -> None:
    net = Net(13)
    x = net.op("MatMul", net.input("x", ["N", 4, 6]), net.weight(6, 12))
    x = net.op(kind, x, *[net.weight(12) for _ in range(operands)], domain=domain, axis=-1)
    x = net.op("Relu", net.op("MatMul", x, net.weight(12, 8)))
    result = cut(finish(net, net.op("MatMul", x, net.weight(8, 5))))
    assert shapes(result.model) == [(6, 6), (6, 4), (4, 5)]


def embeddings(**options: bool) -> op.Result:
    net = Net(17)
    ids, kinds = net.input("ids", ["N", 7], np.int32), net.input("kinds", ["N", 7], np.int32)
    tables = [net.weight(20, 12), net.weight(9, 12), net.weight(2, 12), net.weight(12, low=0.5), net.weight(12)]
    x, _ = net.op("EmbedLayerNormalization", ids, kinds, *tables, n=2, domain=MS)
    x = net.op("BiasGelu", net.op("MatMul", x, net.weight(12, 8)), net.weight(8), domain=MS)
    return cut(finish(net, net.op("MatMul", x, net.weight(8, 5))), **options)


def test_embeddings_keep_their_width_and_let_shapes_through() -> None:
    assert shapes(embeddings().model) == [(20, 12), (9, 12), (2, 12), (12, 4), (4, 5)]


def test_embeddings_are_cut_on_demand() -> None:
    result = embeddings(approximate=True, validate=False)
    assert shapes(result.model) == [(20, 6), (9, 6), (2, 6), (6, 4), (4, 5)]


def structural(net: Net, y: str, rank: int = 3) -> op.Result:
    """Operators without a kernel on this machine: cut, checked, not run."""
    return cut(finish(net, y, rank=rank), validate=False)


def test_bias_add_and_bias_split_gelu() -> None:
    net = Net(17)
    skip = net.op("MatMul", net.input("x", ["N", 4, 6]), net.weight(6, 16))
    x = net.op("BiasAdd", net.op("MatMul", net.op("Relu", skip), net.weight(16, 16)), net.weight(16), skip, domain=MS)
    x = net.op("BiasSplitGelu", x, net.weight(16), domain=MS)
    result = structural(net, net.op("MatMul", x, net.weight(8, 5)))
    assert shapes(result.model) == [(6, 8), (8, 8), (4, 5)]
    removed = next(s.removed for g in result.plan.groups for s in g.slots if s.size == 16)
    assert sorted(i + 8 for i in removed if i < 8) == sorted(i for i in removed if i >= 8)


@pytest.mark.parametrize("last", [0, 1])
def test_group_norm_loses_whole_groups(last: int) -> None:
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16)
    if last:
        x = net.transpose(x, 0, 2, 3, 1)
    attrs = {"groups": 4, "activation": 1, "channels_last": last}
    x = net.op("GroupNorm", x, net.weight(16), net.weight(16), domain=MS, **attrs)
    if last:
        x, _ = net.op("SkipGroupNorm", x, net.weight(16), net.weight(16), x, net.weight(16), n=2, domain=MS, **attrs)
        x = net.transpose(x, 0, 3, 1, 2)
    result = structural(net, net.conv(x, 16, 4), rank=4)
    assert shapes(result.model) == [(8, 3, 3, 3), (4, 8, 3, 3)]
    assert attributes(result.model, "GroupNorm")["groups"] == 2
    removed = next(s.removed for g in result.plan.groups for s in g.slots if s.size == 16)
    assert len({i // 4 for i in removed}) == 2


@pytest.mark.parametrize("group", [1, 2, 8])
def test_nhwc_convolutions_and_pools(group: int) -> None:
    net = Net(17)
    x = net.input("x", ["N", 9, 9, 3])
    x = net.op("NhwcConv", x, net.weight(8, 3, 3, 3), net.weight(8), domain=MS, pads=[1, 1, 1, 1])
    x = net.op("NhwcMaxPool", x, domain=MS, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    x = net.op(
        "NhwcFusedConv", x, net.weight(8, 8 // group, 3, 3), net.weight(8), domain=MS, group=group, activation="Relu"
    )
    x = net.op("NhwcConv", x, net.weight(2, 1, 1, 8), domain=MS)
    x = net.op("GlobalAveragePool", net.transpose(x, 0, 3, 1, 2))
    result = structural(net, net.op("Flatten", x), rank=2)
    middle = {1: (4, 4, 3, 3), 2: (4, 2, 3, 3), 8: (4, 1, 3, 3)}[group]
    assert shapes(result.model) == [(4, 3, 3, 3), middle, (2, 1, 1, 4)]
    assert attributes(result.model, "NhwcFusedConv")["group"] == {1: 1, 2: 2, 8: 4}[group]


def test_distances_are_a_contraction() -> None:
    net = Net(17)
    x = net.op("MatMul", net.input("x", ["N", 6]), net.weight(6, 12))
    y = net.op("CDist", x, net.weight(7, 12), domain=MS, metric="sqeuclidean")
    assert shapes(cut(finish(net, y, rank=2)).model) == [(6, 6), (7, 6)]


def test_triangles_and_inverses_hold_their_axes() -> None:
    net = Net(17)
    x = net.op("MatMul", net.input("x", ["N", 8, 6]), net.weight(6, 8))
    x = net.op("Inverse", net.op("Trilu", x, domain=MS), domain=MS)
    x = net.op("Relu", net.op("MatMul", x, net.weight(8, 10)))
    result = cut(finish(net, net.op("MatMul", x, net.weight(10, 5))))
    assert shapes(result.model) == [(6, 8), (8, 5), (5, 5)]


@pytest.mark.newest_runtime
def test_a_new_axis_moves_labels() -> None:
    net = Net(17)
    x = net.op("MatMul", net.input("x", ["N", 6]), net.weight(6, 12))
    x = net.op("ExpandDims", x, net.const(np.array(-2), np.int32), domain=MS)
    result = cut(finish(net, net.op("MatMul", x, net.weight(12, 5))))
    assert shapes(result.model) == [(6, 6), (6, 5)]


def test_a_bias_before_a_softmax_holds_what_is_normalised() -> None:
    net = Net(17)
    x = net.op("MatMul", net.input("x", ["N", 4, 6]), net.weight(6, 12))
    x = net.op("BiasSoftmax", x, net.weight(1, 1, 12), domain=MS, axis=2, is_inner_broadcast=1)
    x = net.op("GemmFastGelu", x, net.weight(12, 8), net.weight(8), domain=MS)
    result = structural(net, net.op("MatMul", x, net.weight(8, 5)))
    assert shapes(result.model) == [(6, 12), (1, 1, 12), (12, 4), (4, 5)]
