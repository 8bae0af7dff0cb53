"""Queries and keys: channels of one that follow from others are not lost, whichever side they are on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from planted import Planted, draw, error, how, outputs, plan, repaired, weights

from onnxprune.channels.plan import Plan, PlanGroup, PlanSlot
from onnxprune.recovery.attention import best_subspace, logit_error

HEADS, WIDTH, STEPS = 2, 5, 6
LOST = ((1,), (3,))
"""Channels to remove of every head."""

Case = tuple[onnx.ModelProto, Plan]


def heads(net: Planted, y: str) -> str:
    return net.transpose(net.reshape(y, 0, 0, HEADS, WIDTH), 0, 2, 1, 3)


def attention(net: Planted, q: str, k: str, v: str) -> str:
    logits = net.op("Mul", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), net.const(WIDTH**-0.5))
    mixed = net.op("MatMul", net.op("Softmax", logits, axis=-1), v)
    return net.reshape(net.transpose(mixed, 0, 2, 1, 3), 0, 0, HEADS * WIDTH)


def depend(net: Planted, name: str, shift: int = 0) -> None:
    """The channels to be removed become mixtures of two others, columns of a weight or entries of a bias."""
    value = net.value(name)
    for head, lost in enumerate(LOST):
        for i in lost:
            at = shift + head * WIDTH
            value[..., at + i] = 1.5 * value[..., at] - 0.5 * value[..., at + 2]
    net.change(name, value)


def apart(net: Planted, side: str, bias: bool = True) -> Case:
    """Three projections, the redundancy in the queries (q) or in the keys (k)."""
    x = net.input("x", ["N", STEPS, 8])
    made = [net.linear(x, 8, HEADS * WIDTH, bias=bias) for _ in range(3)]
    for name in known(net, "qk".index(side), bias):
        depend(net, name)
    q, k, v = (heads(net, y) for y in made)
    model = net.model(net.linear(attention(net, q, k, v), HEADS * WIDTH, 4))
    return model, removal(*made[:2])


def without_bias(net: Planted, side: str) -> Case:
    return apart(net, side, bias=False)


def known(net: Planted, number: int, bias: bool) -> list[str]:
    """Weight and bias of the projection with that number."""
    each = 2 if bias else 1
    return [t.name for t in net.initializers][number * each : (number + 1) * each]


def removal(*tensors: str, shifts: Sequence[int] = (0, 0), size: int = HEADS * WIDTH) -> Plan:
    gone = [head * WIDTH + i for head, lost in enumerate(LOST) for i in lost]
    slots = [PlanSlot(t, 2, size, sorted(s + i for i in gone)) for t, s in zip(tensors, shifts, strict=True)]
    return Plan(groups=[PlanGroup(0, 0, None, slots)])


def fused(net: Planted, side: str) -> Case:
    """One projection that makes all three."""
    x = net.input("x", ["N", STEPS, 8])
    size = HEADS * WIDTH
    y = net.linear(x, 8, 3 * size)
    shift = size * "qk".index(side)
    for tensor in list(net.initializers):
        depend(net, tensor.name, shift)
    parts = net.split(y, [size] * 3, 2)
    q, k, v = (heads(net, p) for p in parts)
    model = net.model(net.linear(attention(net, q, k, v), size, 4))
    gone = [head * WIDTH + i for head, lost in enumerate(LOST) for i in lost]
    every = sorted([*gone, *(size + i for i in gone)])
    return model, plan((y, 2, 3 * size, every))


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("build", [apart, without_bias, fused])
def test_what_others_say_too_is_not_lost(build: Callable[[Planted, str], Case], side: str) -> None:
    model, gone = build(Planted(17, seed=3), side)
    fresh = draw(model, 50, 5)
    before, result = repaired(model, gone, draw(model, 200))
    assert error(model, before, fresh) > 0.01
    assert error(model, result.model, fresh) < 1e-5, how(result)


def test_less_is_lost_where_channels_do_matter() -> None:
    """On unseen samples, against a repair that leaves logits alone."""
    net = Planted(17, seed=1)
    model, gone = apart(net, "q")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    rng = np.random.default_rng(0)
    for tensor in changed.graph.initializer[:2]:  # no exact redundancy
        value = weights(changed)[tensor.name]
        noisy = (value + 0.2 * rng.standard_normal(value.shape)).astype(value.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(noisy, tensor.name))
    fresh = draw(changed, 100, 5)
    given = draw(changed, 300)
    plain, full = (error(changed, repaired(changed, gone, given, m)[1].model, fresh) for m in ("lstsq", "full"))
    assert full < 0.8 * plain


def test_nothing_removed_from_queries_changes_nothing() -> None:
    """The cut is elsewhere: projections keep their weights, to the bit."""
    net = Planted(17, seed=2)
    x = net.input("x", ["N", STEPS, 8])
    made = [net.linear(x, 8, HEADS * WIDTH) for _ in range(3)]
    kept = [t.name for t in net.initializers]
    q, k, v = (heads(net, y) for y in made)
    inner = net.linear(attention(net, q, k, v), HEADS * WIDTH, 6)
    model = net.model(net.linear(net.op("Relu", inner), 6, 4))
    _, result = repaired(model, plan((inner, 2, 6, [1])), draw(model, 60))
    old, new = weights(model), weights(result.model)
    assert all(np.array_equal(old[n], new[n]) for n in kept)
    assert outputs(result.model, draw(model, 2))


@drawn(st.integers(2, 7), st.data())
@settings(max_examples=20, deadline=None)
def test_best_subspace_is_no_worse_than_any_choice(width: int, data: st.DataObject) -> None:
    """Neither than the survivors themselves, nor than other projections of their rank."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    queries, keys = (m.T @ m for m in rng.standard_normal((2, 3 * width, width)))
    kept = np.sort(rng.permutation(width)[: data.draw(st.integers(1, width))])
    first, second = best_subspace(queries, keys, kept)
    assert first.shape == second.shape == (width, kept.size)
    best = logit_error(queries, keys, first @ second.T)
    assert (
        best <= logit_error(queries, keys, np.diag(np.isin(np.arange(width), kept).astype(float))) * (1 + 1e-9) + 1e-9
    )
    for _ in range(5):
        other = rng.standard_normal((width, kept.size)) @ rng.standard_normal((kept.size, width))
        assert best <= logit_error(queries, keys, other) + 1e-9
