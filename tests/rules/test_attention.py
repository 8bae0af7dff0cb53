"""Fused attention: value sizes, query-key sizes and whole heads go, exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from build import Net
from fused import MS, attributes, cut, finish, shapes

import onnxprune as op

B, S, IN, H = "N", "S", 6, 4


def groups_of(model: Any, **options: Any) -> list[tuple[str, int, bool]]:
    return sorted((g.kind, g.size, g.prunable) for g in op.analyze(model, **options).groups)


def packed(*, sizes: tuple[int, int, int] = (16, 16, 16), bias: bool = True, extra: Any = None, **attrs: Any) -> Any:
    """com.microsoft.Attention between two products."""
    net = Net(17)
    x = net.op("MatMul", net.input("x", [B, S, IN]), net.weight(IN, 10, name="first"))
    operands = [x, net.weight(10, sum(sizes), name="qkv"), net.weight(sum(sizes), name="bias") if bias else ""]
    operands += extra(net) if extra else []
    if len(set(sizes)) > 1:
        attrs["qkv_hidden_sizes"] = list(sizes)
    y = net.op("Attention", *operands, domain=MS, num_heads=H, **attrs)
    return finish(net, net.op("MatMul", y, net.weight(sizes[2], 5, name="last")))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_packed_attention_shrinks_queries_keys_and_values(bias: bool, unidirectional: int) -> None:
    # onnxruntime's kernel for processors needs the bias, although it is optional.
    result = cut(packed(bias=bias, unidirectional=unidirectional), validate=bias)
    assert shapes(result.model) == [(6, 5), (5, 24), (8, 5)]
    attrs = attributes(result.model, "Attention")
    assert attrs["num_heads"] == H
    assert attrs["scale"] == pytest.approx(0.5)
    assert "qkv_hidden_sizes" not in attrs


def test_packed_attention_lets_values_shrink_alone() -> None:
    model = packed()
    sizes = [g for g in op.analyze(model).groups if g.prunable and g.size == 16]
    assert len(sizes) == 2
    assert {g.steps for g in sizes} == {4}
    little, much = cut(model, 0.25).plan, cut(model, 0.75).plan
    values = {g.id for g in much.groups for slot in g.slots if slot.tensor == "last"}
    plan = replace(
        little,
        groups=[replace(g, slots=[]) for p in (little, much) for g in p.groups if (g.id in values) == (p is much)],
    )
    result = cut(model, plan=plan)
    assert shapes(result.model)[1:] == [(8, 12 + 12 + 4), (4, 5)]
    assert attributes(result.model, "Attention")["qkv_hidden_sizes"] == [12, 12, 4]


def test_packed_attention_with_its_own_sizes_and_scale() -> None:
    result = cut(packed(sizes=(16, 16, 8), scale=0.3))
    assert shapes(result.model) == [(6, 5), (5, 8 + 8 + 4), (4, 5)]
    attrs = attributes(result.model, "Attention")
    assert attrs["qkv_hidden_sizes"] == [8, 8, 4]
    assert attrs["scale"] == pytest.approx(0.3)


def test_every_head_loses_its_own_channels() -> None:
    result = cut(packed())
    slots = [s for g in result.plan.groups for s in g.slots if s.tensor == "bias"]
    removed = np.array(sorted({i for s in slots for i in s.removed}))
    assert len(removed) == 24
    by_head = [tuple(removed[(removed >= a) & (removed < a + 4)] - a) for a in range(0, 48, 4)]
    assert {len(x) for x in by_head} == {2}
    assert len(set(by_head)) > 1


def test_packed_attention_with_a_relative_bias_and_a_mask() -> None:
    """The bias has a value per head, so all heads stay; within the heads nothing forbids a cut."""

    def extra(net: Net) -> list[str]:
        return [net.input("mask", [B, S], np.int32), "", net.input("relative", [1, H, S, S])]

    result = cut(packed(extra=extra))
    assert shapes(result.model) == [(6, 5), (5, 24), (8, 5)]


def test_packed_attention_with_a_cache_keeps_its_sizes() -> None:
    net = Net(17)
    x = net.op("MatMul", net.input("x", [B, S, IN]), net.weight(IN, 10))
    past = net.input("past", [2, B, H, 3, 4])
    y, present = net.op("Attention", x, net.weight(10, 48), net.weight(48), "", past, n=2, domain=MS, num_heads=H)
    y = net.op("Relu", net.op("MatMul", y, net.weight(16, 8)))
    y = net.op("MatMul", y, net.weight(8, 5))
    model = net.model(y, present, check=False, shapes={y: [B, S, 5], present: [2, B, H, "T", 4]})
    assert shapes(cut(model).model) == [(6, 10), (10, 48), (16, 4), (4, 5)]


def separate(
    kind: str,
    *,
    domain: str = MS,
    sizes: tuple[int, int, int] = (16, 16, 16),
    bias: bool = False,
    extra: Any = None,
    four: bool = False,
    outputs: int = 1,
    shown: bool = True,
    **attrs: Any,
) -> Any:
    """Queries, keys and values from products of their own."""
    net = Net(24 if domain == "" else 17, ir=10)
    x = net.input("x", [2, 5, IN])
    heads = [
        attrs.get("q_num_heads", attrs.get("num_heads", H)),
        *[attrs.get("kv_num_heads", attrs.get("num_heads", H))] * 2,
    ]
    parts = [net.op("MatMul", x, net.weight(IN, n, name=w)) for n, w in zip(sizes, "qkv", strict=True)]
    if four:
        parts = [
            net.transpose(net.reshape(p, 0, 0, h, n // h), 0, 2, 1, 3)
            for p, n, h in zip(parts, sizes, heads, strict=True)
        ]
        attrs = {k: v for k, v in attrs.items() if not k.endswith("num_heads")}
    if bias:
        parts.append(net.weight(sum(sizes), name="bias"))
    parts += [net.op("Identity", e) if e else "" for e in (extra(net) if extra else [])]
    y = net.op(kind, *parts, domain=domain, n=outputs, **attrs)
    first = y if outputs == 1 else y[0]
    wide = heads[0] * sizes[2] // heads[2]
    if four:
        first = net.reshape(net.transpose(first, 0, 2, 1, 3), 0, 0, wide)
    net.op("MatMul", first, net.weight(wide, 5, name="o"))
    last = net.nodes[-1].output[0]
    others = [] if outputs == 1 or not shown else list(y[1:])
    return net.model(last, *others, check=False, shapes={last: [2, 5, 5], **{o: list("abcd") for o in others}})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("values", [16, 8])
def test_multi_head_attention(bias: bool, values: int) -> None:
    result = cut(separate("MultiHeadAttention", sizes=(16, 16, values), bias=bias, num_heads=H))
    assert shapes(result.model) == [(6, 8), (6, 8), (6, values // 2), (values // 2, 5)]
    assert attributes(result.model, "MultiHeadAttention")["scale"] == pytest.approx(0.5)


def test_multi_head_attention_with_a_learned_bias_per_head() -> None:
    def extra(net: Net) -> list[str]:
        return ["", "", net.weight(1, H, 5, 5)]

    model = separate("MultiHeadAttention", num_heads=H, extra=extra)
    assert groups_of(model) == [("channels", 16, True), ("channels", 16, True), ("heads", 4, False)]
    cut(model)


def test_multi_head_attention_from_computed_keys_by_head() -> None:
    """Keys and values as [batch, heads, length, size], as decoders pass those of the encoder."""
    net = Net(17)
    x = net.input("x", [2, 5, IN])
    q = net.op("MatMul", x, net.weight(IN, 16))
    k, v = (net.transpose(net.reshape(net.op("MatMul", x, net.weight(IN, 16)), 0, 0, H, 4), 0, 2, 1, 3) for _ in "kv")
    y = net.op("MatMul", net.op("MultiHeadAttention", q, k, v, domain=MS, num_heads=H), net.weight(16, 5))
    assert shapes(cut(finish(net, y)).model) == [(6, 8), (6, 8), (6, 8), (8, 5)]


@pytest.mark.parametrize("form", ["qkv", "kv"])
def test_multi_head_attention_from_packed_operands(form: str) -> None:
    """No kernel on a processor: cut and checked, not run."""
    net = Net(17)
    x = net.input("x", [2, 5, IN])
    n = len(form)
    parts = [net.reshape(net.op("MatMul", x, net.weight(IN, 16 * n)), 0, 0, H, n, 4)]
    if form == "kv":
        parts.insert(0, net.op("MatMul", x, net.weight(IN, 16)))
    y = net.op("MatMul", net.op("MultiHeadAttention", *parts, domain=MS, num_heads=H), net.weight(16, 5))
    result = cut(finish(net, y), validate=False)
    assert sorted(shapes(result.model)) == sorted([(6, 8 * n), (8, 5)] + [(6, 8)] * (form == "kv"))
    assert attributes(result.model, "MultiHeadAttention")["scale"] == pytest.approx(0.5)


def test_multi_head_attention_with_a_cache_is_whole() -> None:
    def extra(net: Net) -> list[str]:
        return ["", "", "", net.input("pk", [2, H, 3, 4]), net.input("pv", [2, H, 3, 4])]

    model = separate("MultiHeadAttention", num_heads=H, extra=extra, outputs=3)
    assert not any(prunable for _, _, prunable in groups_of(model))
    with pytest.raises(op.OnnxpruneError, match="No channel"):
        cut(model)


def test_rotary_positions_leave_whole_heads() -> None:
    net = Net(17)
    x = net.input("x", [2, 5, IN])
    place = net.const(np.tile(np.arange(5), (2, 1)))
    tables = [net.weight(9, 2), net.weight(9, 2)]
    q, k = (net.op("RotaryEmbedding", net.op("MatMul", x, net.weight(IN, 16)), place, *tables, domain=MS) for _ in "qk")
    v = net.op("MatMul", x, net.weight(IN, 16))
    y = net.op("MatMul", net.op("MultiHeadAttention", q, k, v, domain=MS, num_heads=H), net.weight(16, 5))
    result = cut(finish(net, y))
    assert shapes(result.model) == [(9, 2), (9, 2), (6, 8), (6, 8), (6, 8), (8, 5)]
    attrs = attributes(result.model, "MultiHeadAttention")
    assert attrs["num_heads"] == 2
    assert "scale" not in attrs


@pytest.mark.parametrize("domain", ["", MS])
@pytest.mark.parametrize("partial", [0, 2])
def test_rotary_positions_with_stated_heads(domain: str, partial: int) -> None:
    net = Net(23, ir=10)
    x = net.input("x", [2, 5, IN])
    place = net.const(np.tile(np.arange(5), (2, 1)))
    half = (partial or 4) // 2
    tables = [net.weight(9, half), net.weight(9, half)]
    attrs = {"num_heads": H, "rotary_embedding_dim": partial}
    q, k, v = (net.op("MatMul", x, net.weight(IN, 16)) for _ in "qkv")
    order = (lambda t: [t, *tables, place]) if domain == "" else (lambda t: [t, place, *tables])
    q, k = (net.op("RotaryEmbedding", *order(t), domain=domain, **attrs) for t in (q, k))
    y = net.op("Attention", q, k, v, q_num_heads=H, kv_num_heads=H)
    result = cut(finish(net, net.op("MatMul", y, net.weight(16, 5))))
    assert shapes(result.model)[2:] == [(6, 8), (6, 8), (6, 8), (8, 5)]
    assert attributes(result.model, "RotaryEmbedding")["num_heads"] == 2
    assert attributes(result.model, "Attention")["q_num_heads"] == 2


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("values", [4, 6])
def test_onnx_attention(four: bool, kv: int, values: int) -> None:
    sizes = (16, 4 * kv, values * kv)
    result = cut(separate("Attention", domain="", sizes=sizes, four=four, q_num_heads=4, kv_num_heads=kv, is_causal=1))
    assert shapes(result.model) == [(6, 8), (6, 2 * kv), (6, values * kv // 2), (2 * values, 5)]
    assert attributes(result.model, "Attention")["scale"] == pytest.approx(0.5)


def test_onnx_attention_with_a_mask_and_a_cache() -> None:
    def extra(net: Net) -> list[str]:
        return [net.input("mask", [5, 8]), net.input("pk", [2, H, 3, 4]), net.input("pv", [2, H, 3, 4])]

    model = separate("Attention", domain="", q_num_heads=H, kv_num_heads=H, extra=extra, outputs=3)
    assert not any(prunable for _, _, prunable in groups_of(model))


def test_onnx_attention_whose_cache_is_computed() -> None:
    """Cached keys and values from weights: they are cut with the new ones."""

    def extra(net: Net) -> list[str]:
        return ["", net.weight(2, H, 3, 4), net.weight(2, H, 3, 4)]

    model = separate("Attention", domain="", q_num_heads=H, kv_num_heads=H, extra=extra, outputs=3, shown=False)
    result = cut(model)
    assert shapes(result.model) == [(6, 8), (6, 8), (6, 8), (2, 4, 3, 2), (2, 4, 3, 2), (8, 5)]


def grouped(kv: int = 2, *, packed: bool = False, cache: bool = False, size: int = 16, **attrs: Any) -> Any:
    """com.microsoft.GroupQueryAttention, four heads of queries."""
    net = Net(17)
    x = net.input("x", [1, 5, IN])
    widths = [H * size, kv * size, kv * size]
    if packed:
        operands = [net.op("MatMul", x, net.weight(IN, sum(widths))), "", ""]
    else:
        operands = [net.op("MatMul", x, net.weight(IN, n)) for n in widths]
    operands += [net.input(n, [1, kv, 3, size]) for n in ("pk", "pv")] if cache else ["", ""]
    total = 8 if cache else 5
    lengths = [net.const(np.array([total - 1]), np.int32), net.const(np.array(total), np.int32)]
    tables = [net.weight(9, size // 2), net.weight(9, size // 2)] if attrs.get("do_rotary") else []
    outputs = net.op(
        "GroupQueryAttention", *operands, *lengths, *tables, domain=MS, n=3, num_heads=H, kv_num_heads=kv, **attrs
    )
    y = net.op("MatMul", outputs[0], net.weight(H * size, 5))
    kept = outputs[1:] if cache else []
    return net.model(y, *kept, check=False, shapes={y: [1, 5, 5], **{o: [1, kv, "T", size] for o in kept}})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", [0, 1])
def test_grouped_queries_go_with_their_keys_and_values(packed: bool, rotary: int) -> None:
    result = cut(grouped(packed=packed, do_rotary=rotary))
    widths = [(6, 32), (6, 16), (6, 16)] if not packed else [(6, 64)]
    assert [s for s in shapes(result.model) if s[0] != 9] == [*widths, (32, 5)]
    attrs = attributes(result.model, "GroupQueryAttention")
    assert (attrs["num_heads"], attrs["kv_num_heads"]) == (2, 1)


def test_grouped_queries_of_one_head_each_lose_whole_heads() -> None:
    result = cut(grouped(kv=4))
    assert shapes(result.model) == [(6, 32), (6, 32), (6, 32), (32, 5)]
    attrs = attributes(result.model, "GroupQueryAttention")
    assert (attrs["num_heads"], attrs["kv_num_heads"]) == (2, 2)


@pytest.mark.parametrize("kv", [2, 1])
def test_a_cache_holds_keys_and_values_but_not_queries(kv: int) -> None:
    model = grouped(kv, cache=True)
    result = cut(model)
    assert shapes(result.model) == [(6, 32), (6, 16 * kv), (6, 16 * kv), (32, 5)]
    attrs = attributes(result.model, "GroupQueryAttention")
    assert (attrs["num_heads"], attrs["kv_num_heads"]) == (2, kv)


@pytest.mark.parametrize("axis", [0, 2])
def test_rotary_positions_keep_what_their_tables_have_too(axis: int) -> None:
    """Cosines [batch, length, size / 2] have the data's batch and length: neither shrinks alone."""
    net = Net(23)
    size, heads, last = [3, 4, 5, 8], 4, 8
    rest = [n for a, n in enumerate(size) if a != axis]
    x = net.op("MatMul", net.input("x", [*rest, IN]), net.weight(IN, size[axis], name="first"))
    order = [a for a in range(4) if a != axis]
    x = net.transpose(x, *((*order, axis).index(a) for a in range(4)))
    y = net.op("RotaryEmbedding", x, net.weight(3, 5, last // 2), net.weight(3, 5, last // 2))
    y = net.reshape(net.transpose(y, 0, 2, 1, 3), 15, heads * last)
    y = net.op("Relu", net.op("MatMul", y, net.weight(heads * last, 12, name="o")))
    result = cut(finish(net, net.op("MatMul", y, net.weight(12, 5, name="last")), rank=2))
    assert (IN, size[axis]) in shapes(result.model) and (6, 5) in shapes(result.model)
