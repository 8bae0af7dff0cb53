"""Attention in packed forms: cut exactly where onnxruntime has a kernel here, else against the formula in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from fused import MS, attributes, cut, finish, shapes
from onnx import numpy_helper
from quantised import codes, quantized, scale, zero

import onnxprune as op

IN, H, SIZE = 6, 4, 4
WIDE = H * SIZE
T = 7


def on_codes(*, per_column: bool = False, zeros: bool = True, dtype: Any = np.int8, **attrs: Any) -> onnx.ModelProto:
    """Linear, QAttention, linear."""
    net = Net(17)
    x = net.op("MatMul", net.input("x", ["N", "S", IN]), net.weight(IN, 10, name="first"))
    q, s, z = quantized(net, x)
    own = (3 * WIDE,) if per_column else ()
    operands = [q, codes(net, 10, 3 * WIDE, dtype=dtype, name="qkv"), net.weight(3 * WIDE, name="bias"), s]
    operands += [scale(net, *own), "", z if zeros else ""]
    if zeros:
        operands.append(zero(net, *own, dtype=dtype))
    y = net.op("QAttention", *operands, domain=MS, num_heads=H, **attrs)
    return finish(net, net.op("MatMul", y, net.weight(WIDE, 5, name="last")))


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_attention_on_codes_shrinks_all_three_alike(per_column: bool, zeros: bool) -> None:
    result = cut(on_codes(per_column=per_column, zeros=zeros))
    sizes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert sizes["qkv"] == (5, 3 * WIDE // 2) and sizes["bias"] == (3 * WIDE // 2,)
    assert sizes["first"] == (IN, 5) and sizes["last"] == (WIDE // 2, 5)
    attrs = attributes(result.model, "QAttention")
    assert attrs["num_heads"] == H and attrs["scale"] == pytest.approx(SIZE**-0.5)
    assert "qkv_hidden_sizes" not in attrs


def test_attention_on_codes_loses_the_same_channels_of_queries_keys_and_values() -> None:
    result = cut(on_codes(unidirectional=1), 0.25)
    removed = np.array(
        sorted({i for g in result.plan.groups for s in g.slots if s.tensor == "bias" for i in s.removed})
    )
    assert len(removed) == 3 * H
    thirds = removed.reshape(3, -1) - WIDE * np.arange(3)[:, None]
    assert (thirds == thirds[0]).all()
    assert [int(((thirds[0] // SIZE) == h).sum()) for h in range(H)] == [1] * H


def test_attention_on_codes_is_scored_by_what_the_codes_stand_for() -> None:
    """A column of large codes with a tiny scale is small."""
    net = Net(17)
    q, s, z = quantized(net, net.input("x", ["N", "S", IN]))
    table = np.full((IN, 3 * WIDE), 100, np.int8)
    scales = np.tile(np.where(np.arange(WIDE) % SIZE == 2, 1e-4, 1.0), 3)
    y = net.op(
        "QAttention", q, net.const(table, np.int8, "qkv"), net.weight(3 * WIDE), s, net.const(scales), "", z,
        net.const(np.zeros(3 * WIDE), np.int8), domain=MS, num_heads=H,
    )  # fmt: skip
    model = finish(net, net.op("MatMul", y, net.const(np.ones((WIDE, 5)))))
    result = op.prune(model, ratio=0.25, latency=False)
    gone = {i for g in result.plan.groups for slot in g.slots if slot.tensor == "qkv" for i in slot.removed}
    assert gone == set(range(2, 3 * WIDE, SIZE))


def test_attention_on_codes_with_a_cache_keeps_its_sizes() -> None:
    net = Net(17)
    q, s, z = quantized(net, net.op("MatMul", net.input("x", ["N", "S", IN]), net.weight(IN, 10)))
    operands = [q, codes(net, 10, 3 * WIDE), net.weight(3 * WIDE), s, scale(net), "", z, zero(net)]
    y, present = net.op("QAttention", *operands, n=2, domain=MS, num_heads=H)
    y = net.op("MatMul", net.op("Relu", net.op("MatMul", y, net.weight(WIDE, 8))), net.weight(8, 5))
    model = net.model(y, present, check=False, shapes={y: ["N", "S", 5], present: [2, "N", H, "T", SIZE]})
    assert shapes(cut(model).model) == [(IN, 10), (10, 3 * WIDE), (WIDE, 4), (4, 5)]


# -- forms that onnxruntime has no kernel for here: the formula -----------------------------------------------------


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, factor: float | None) -> np.ndarray:
    """One sequence [T, H] of queries, keys and values, literally."""
    parts = []
    for h in range(heads):
        a, b, c = (x[:, h * (n := x.shape[1] // heads) : (h + 1) * n] for x in (q, k, v))
        scores = a @ b.T * (factor or a.shape[1] ** -0.5)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        parts.append(shares / shares.sum(axis=1, keepdims=True) @ c)
    return np.concatenate(parts, axis=1)


def packed(sizes: tuple[int, int, int] = (WIDE, WIDE, WIDE)) -> onnx.ModelProto:
    """First product, PackedAttention, last product, on T tokens."""
    net = Net(17)
    x = net.op("MatMul", net.input("x", [T, IN]), net.weight(IN, 10, name="first"))
    attrs = {"qkv_hidden_sizes": list(sizes)} if len(set(sizes)) > 1 else {}
    offset, ends = net.input("offset", [1, T], np.int32), net.input("ends", [2], np.int32)
    weights = [net.weight(10, sum(sizes), name="qkv"), net.weight(sum(sizes), name="bias")]
    y = net.op("PackedAttention", x, *weights, offset, ends, domain=MS, num_heads=H, **attrs)
    return finish(net, net.op("MatMul", y, net.weight(sizes[2], 5, name="last")), rank=2)


def separate(bias: bool, together: bool = False) -> onnx.ModelProto:
    """PackedMultiHeadAttention between products."""
    net = Net(17)
    x = net.input("x", [T, IN])
    offset, ends = net.input("offset", [1, T], np.int32), net.input("ends", [2], np.int32)
    if together:
        names = [net.reshape(net.op("MatMul", x, net.weight(IN, 3 * WIDE, name="qkv")), T, H, 3, SIZE), "", ""]
    else:
        names = [net.op("MatMul", x, net.weight(IN, WIDE, name=n)) for n in "qkv"]
    own = net.weight(3 * WIDE, name="bias") if bias else ""
    y = net.op("PackedMultiHeadAttention", *names, own, offset, ends, domain=MS, num_heads=H)
    return finish(net, net.op("MatMul", y, net.weight(WIDE, 5, name="last")), rank=2)


def run(model: onnx.ModelProto, x: np.ndarray, gone: dict[str, dict[int, list[int]]]) -> np.ndarray:
    """The whole model in numpy; ``gone``: positions of weights, by axis, that count as 0."""
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    for name, axes in gone.items():
        for axis, positions in axes.items():
            w[name] = w[name].copy()
            w[name][(slice(None),) * axis + (positions,)] = 0
    node = next(n for n in model.graph.node if n.domain == MS)
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    heads, factor = attrs["num_heads"], attrs.get("scale")
    if node.op_type == "PackedAttention":
        joint = x @ w["first"] @ w["qkv"] + w["bias"]
        sizes = attrs.get("qkv_hidden_sizes") or [joint.shape[1] // 3] * 3
        parts = np.split(joint, np.cumsum(sizes)[:-1], axis=1)
    elif "qkv" in w:
        joint = (x @ w["qkv"]).reshape(len(x), heads, 3, -1)
        parts = [joint[:, :, i].reshape(len(x), -1) for i in range(3)]
    else:
        parts = [x @ w[n] for n in "qkv"]
        if "bias" in w:
            cuts = np.cumsum([p.shape[1] for p in parts])[:-1]
            parts = [p + b for p, b in zip(parts, np.split(w["bias"], cuts), strict=True)]
    return attended(*parts, heads, factor) @ w["last"]


@pytest.mark.parametrize(
    "model",
    [packed(), packed((WIDE, WIDE, 8)), separate(False), separate(True), separate(False, together=True)],
    ids=["packed", "own sizes", "apart", "apart with bias", "together"],
)
@pytest.mark.parametrize("axis", ["head_dim", "heads"])
def test_what_is_left_is_the_masked_original(model: onnx.ModelProto, axis: str) -> None:
    options = {"criterion": "random", "ratio": 0.5, "reshape_axis": axis, "validate": False, "latency": False}
    result = op.prune(model, **options)
    gone: dict[str, dict[int, list[int]]] = {}
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for slot in (s for g in result.plan.groups for s in g.slots if s.tensor in weights):
        gone.setdefault(slot.tensor, {}).setdefault(slot.axis, []).extend(slot.removed)
    assert "last" in gone
    x = np.random.default_rng(0).standard_normal((T, IN))
    np.testing.assert_allclose(run(result.model, x, {}), run(model, x, gone), rtol=1e-5, atol=1e-6)
    sizes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert sizes["last"][0] == weights["last"][0] // 2
    heads = attributes(result.model, next(n.op_type for n in model.graph.node if n.domain == MS))["num_heads"]
    assert heads == (H if axis == "head_dim" else H // 2)
