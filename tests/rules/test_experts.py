"""Mixtures of experts: hidden channels and each expert's own inner channels go, exactly; experts stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from fused import MS, cut, finish
from onnx import numpy_helper

import onnxprune as op

IN, HIDDEN, INNER, E = 6, 8, 12, 4


def mixture(
    *, activation: str = "relu", fusion: int = 0, biases: bool = True, rank: int = 2, third: bool = False, **attrs: Any
) -> onnx.ModelProto:
    """Linear, the mixture with a router of its own, linear."""
    net = Net(17)
    x = net.input("x", ["N", IN] if rank == 2 else ["N", 5, IN])
    tokens = x if rank == 2 else net.reshape(x, -1, IN)
    scores = net.op("MatMul", tokens, net.weight(IN, E, scale=1.0, name="router"))
    y = net.op("Relu", net.op("MatMul", x, net.weight(IN, HIDDEN, name="first")))
    wide = INNER * (2 if fusion else 1)
    layers = [net.weight(E, wide, HIDDEN, scale=0.5, name="w1"), net.weight(E, wide, name="b1") if biases else ""]
    layers += [net.weight(E, HIDDEN, INNER, scale=0.5, name="w2"), net.weight(E, HIDDEN, name="b2") if biases else ""]
    if third:
        layers += [net.weight(E, INNER, HIDDEN, scale=0.5, name="w3"), net.weight(E, INNER, name="b3")]
    if fusion:
        attrs["swiglu_fusion"] = fusion
    y = net.op("MoE", y, scores, *layers, domain=MS, k=2, activation_type=activation, **attrs)
    return finish(net, net.op("MatMul", y, net.weight(HIDDEN, 5, name="last")), rank=rank)


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
def test_inner_and_hidden_channels_go(activation: str, rank: int, biases: bool) -> None:
    found = sizes(cut(mixture(activation=activation, biases=biases, rank=rank)).model)
    assert found["w1"] == (E, INNER // 2, HIDDEN // 2) and found["w2"] == (E, HIDDEN // 2, INNER // 2)
    assert found["first"] == (IN, HIDDEN // 2) and found["last"] == (HIDDEN // 2, 5)
    assert found["router"] == (IN, E)
    assert not biases or (found["b1"], found["b2"]) == ((E, INNER // 2), (E, HIDDEN // 2))


@pytest.mark.newest_runtime
@pytest.mark.parametrize("fusion", [1, 2])
def test_a_fused_gate_goes_with_its_channel(fusion: int) -> None:
    # onnxruntime's kernel for processors knows the interleaved form alone; the other one is cut without being run.
    model = mixture(activation="swiglu", fusion=fusion)
    result = cut(model, validate=fusion == 1)
    assert sizes(result.model)["w1"] == (E, INNER, HIDDEN // 2)
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer}["b1"] for m in (model, result.model)
    )
    for old, new in zip(before, after, strict=True):
        pairs = (lambda v: v.reshape(-1, 2)) if fusion == 1 else (lambda v: v.reshape(2, -1).T)
        whole = {tuple(p) for p in pairs(old).tolist()}
        assert len(new) == INNER and {tuple(p) for p in pairs(new).tolist()} <= whole


def test_a_third_layer_goes_along() -> None:
    # A gate of its own: onnxruntime's kernel for processors takes only the fused form.
    found = sizes(cut(mixture(activation="silu", third=True), validate=False).model)
    assert found["w3"] == (E, INNER // 2, HIDDEN // 2) and found["b3"] == (E, INNER // 2)
    assert found["w2"] == (E, HIDDEN // 2, INNER // 2)


def test_every_expert_loses_channels_of_its_own() -> None:
    model = mixture()
    result = cut(model, 0.25)
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer}["b1"] for m in (model, result.model)
    )
    gone = [tuple(np.flatnonzero(~np.isin(old, new))) for old, new in zip(before, after, strict=True)]
    assert {len(g) for g in gone} == {INNER // 4}
    assert len(set(gone)) > 1


def test_the_weakest_inner_channels_go() -> None:
    model = mixture(biases=False)
    weak = {e: sorted(np.random.default_rng(e).permutation(INNER)[:3].tolist()) for e in range(E)}
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "w2"):
            array = numpy_helper.to_array(tensor).copy()
            for e, channels in weak.items():
                array[(e, channels) if tensor.name == "w1" else (e, slice(None), channels)] *= 1e-3
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    result = op.prune(model, ratio=0.25, layers={"first": 0.0}, latency=False)
    old, new = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer}["w1"] for m in (model, result.model))
    for e in range(E):
        kept = [i for i in range(INNER) if i not in weak[e]]
        np.testing.assert_array_equal(new[e], old[e][kept])


def test_shared_or_computed_weights_keep_their_inner_size() -> None:
    model = mixture(biases=False)
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["w1"], ["sum"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, []))
    found = sizes(cut(model).model)
    assert found["w1"][1] == INNER and found["w2"][2] == INNER


def test_macs_count_the_experts_that_a_token_visits() -> None:
    layer = next(x for x in op.analyze(mixture()).layers if x.op == "MoE")
    assert layer.macs_before == 2 * 2 * 2 * HIDDEN * INNER  # two tokens, two experts, two layers


@pytest.mark.newest_runtime
@pytest.mark.parametrize(("block", "fusion", "zeros"), [(0, 0, False), (0, 1, False), (16, 0, False), (16, 1, True)])
def test_inner_channels_of_packed_experts_go_by_bytes_or_blocks(block: int, fusion: int, zeros: bool) -> None:
    """QMoE: every expert loses the same number of bytes, or of blocks that share scales; hidden channels stay."""
    net, hidden, inner = Net(17), 32, 64
    wide = inner * (2 if fusion else 1)
    x = net.input("x", ["N", IN])
    y = net.op("Relu", net.op("MatMul", x, net.weight(IN, hidden, name="first")))
    scores = net.op("MatMul", x, net.weight(IN, E, scale=1.0))
    shapes = ((E, wide, hidden), (E, hidden, inner))
    packed = [net.const(net.rng.integers(0, 255, (*s[:2], s[2] // 2)), np.uint8, f"w{i}") for i, s in enumerate(shapes)]
    scales = [(*s[:2], s[2] // block) if block else s[:2] for s in shapes]
    given = [net.const(net.rng.uniform(0.02, 0.05, s), np.float32, f"s{i}") for i, s in enumerate(scales)]
    operands = [y, scores, packed[0], given[0], net.weight(E, wide, name="b0"), packed[1], given[1]]
    if zeros:
        points = [
            net.const(net.rng.integers(0, 255, (*s[:2], s[2] // 2)), np.uint8, f"z{i}") for i, s in enumerate(scales)
        ]
        operands += ["", "", "", "", *points]
    attrs = {"activation_type": "swiglu", "swiglu_fusion": 1} if fusion else {"activation_type": "relu"}
    attrs |= {"block_size": block} if block else {}
    y = net.op("QMoE", *operands, domain=MS, k=2, expert_weight_bits=4, normalize_routing_weights=1, **attrs)
    model = finish(net, net.op("MatMul", y, net.weight(hidden, 5)), rank=2)
    layer = next(x for x in op.analyze(model).layers if x.op == "QMoE")
    assert layer.macs_before == 2 * 2 * hidden * (wide + inner)  # two tokens, two experts
    found = sizes(op.prune(model, criterion="l2", ratio=0.5, latency=False).model)
    assert found["first"] == (IN, hidden) and found["w0"] == (E, wide // 2, hidden // 2)
    assert found["w1"] == (E, hidden, inner // 4) and found["b0"] == (E, wide // 2)
    assert found["s1"] == ((E, hidden, inner // block // 2) if block else (E, hidden))
