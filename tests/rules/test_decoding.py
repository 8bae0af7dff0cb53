"""Operators of models that generate token by token: heads, their channels and channels of convolutions go, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from fused import MS, attributes, cut
from oracle import assert_exact_cut

import onnxprune as op
from onnxprune.labels.label import along as right_along
from onnxprune.operators import attention

IN, H = 6, 4


def decoder(*, bias: bool = False, cross: bool = False, cache: bool = False) -> onnx.ModelProto:
    """com.microsoft.DecoderMaskedMultiHeadAttention, four heads, one query."""
    net = Net(17)
    x = net.input("x", [2, 1, IN])
    parts = [net.op("MatMul", net.op("Tanh", x), net.weight(IN, 16, name=w)) for w in "qkv"]
    if cross:
        other = net.input("other", [2, 3, IN])
        for i in (1, 2):
            parts[i] = net.reshape(net.op("MatMul", other, net.weight(IN, 16)), 0, 0, H, 4)
            parts[i] = net.transpose(parts[i], 0, 2, 1, 3)
    more = [""] * 8
    if cache:
        more[2:4] = [net.input(n, [2, H, 3, 4]) for n in ("pk", "pv")]
        more[4] = net.const(np.asarray([2]), np.int32)
    if bias:
        more[7] = net.weight(48, name="bias")
    kind, attrs = "DecoderMaskedMultiHeadAttention", {"past_present_share_buffer": int(cache)}
    made = net.op(kind, *parts, *more, domain=MS, n=3 if cache else 1, num_heads=H, **attrs)
    y = net.op("MatMul", made[0] if cache else made, net.weight(16, 12, name="o"))
    y = net.op("MatMul", net.op("Relu", y), net.weight(12, 5, name="last"))
    kept = made[1:] if cache else []
    return net.model(y, *kept, check=False, shapes={y: [2, 1, 5], **{o: list("abcd") for o in kept}})


@pytest.mark.parametrize("bias", [False, True])
def test_a_decoder_loses_whole_heads(bias: bool) -> None:
    """Its kernel takes no queries of another size than values have."""
    result = cut(decoder(bias=bias))
    found = widths(result)
    assert [found[n] for n in "qkvo"] == [(6, 8), (6, 8), (6, 8), (8, 6)]
    assert not bias or found["bias"] == (24,)
    assert attributes(result.model, "DecoderMaskedMultiHeadAttention")["num_heads"] == 2


def test_heads_that_read_from_elsewhere_go_too() -> None:
    result = cut(decoder(cross=True))
    assert widths(result)["q"] == (6, 8) and widths(result)["o"] == (8, 6)
    assert attributes(result.model, "DecoderMaskedMultiHeadAttention")["num_heads"] == 2


def test_a_cache_from_outside_keeps_the_heads() -> None:
    found = widths(cut(decoder(cache=True)))
    assert [found[n] for n in "qkvo"] == [(6, 16), (6, 16), (6, 16), (16, 6)]


GATES = {"linear": (), "gated": ("decay",), "delta": ("beta",), "gated_delta": ("decay", "beta")}


def linear(
    rule: str, *, kv: int = H, per_key: bool = False, one: bool = False, past: bool = False, shown: bool = False
) -> onnx.ModelProto:
    """com.microsoft.LinearAttention, four heads of queries of 4 channels; values of 6."""
    net = Net(17)
    x = net.input("x", ["N", "S", IN])
    q, k, v = (net.op("MatMul", x, net.weight(IN, n, name=w)) for n, w in ((16, "q"), (4 * kv, "k"), (6 * kv, "v")))
    k = net.op("Mul", k, net.const(0.3, np.float32))
    state = net.input("state", ["N", kv, 4, 6]) if past else ""
    decay = net.op("MatMul", x, net.weight(IN, 4 * kv if per_key else kv, name="decay"))
    decay = net.op("Neg", net.op("Sigmoid", decay))
    beta = net.op("Sigmoid", net.op("MatMul", x, net.weight(IN, 1 if one else kv, name="beta")))
    gates = [decay if "decay" in GATES[rule] else "", beta if "beta" in GATES[rule] else ""]
    y, after = net.op(
        "LinearAttention", q, k, v, state, *gates, domain=MS, n=2, q_num_heads=H, kv_num_heads=kv, update_rule=rule
    )
    y = net.op("MatMul", y, net.weight(6 * H, 12, name="o"))
    y = net.op("MatMul", net.op("Relu", y), net.weight(12, 5, name="last"))
    kept = [after] if shown else []
    return net.model(y, *kept, check=False, shapes={y: ["N", "S", 5], after: list("abcd")})


def widths(result: op.Result) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in result.model.graph.initializer}


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("rule", GATES)
def test_a_state_of_keys_and_values_loses_both(rule: str, kv: int) -> None:
    found = widths(cut(linear(rule, kv=kv)))
    assert found["k"] == (6, 2 * kv) and found["v"] == (6, 3 * kv)
    assert found["q"] == (6, 8) and found["o"] == (12, 6)


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_a_decay_per_channel_goes_with_the_keys(rule: str) -> None:
    result = cut(linear(rule, per_key=True))
    found = widths(result)
    assert found["decay"] == found["k"] == (6, 8)
    assert attributes(result.model, "LinearAttention")["scale"] == pytest.approx(0.5)


@pytest.mark.parametrize("one", [False, True])
def test_heads_of_a_state_go_with_their_gates(one: bool) -> None:
    result = cut(linear("gated_delta", one=one), reshape_axis="heads")
    found = widths(result)
    assert found["q"] == (6, 8) and found["v"] == (6, 12)
    assert found["decay"] == (6, 2) and found["beta"] == (6, 1 if one else 2)
    attrs = attributes(result.model, "LinearAttention")
    assert (attrs["q_num_heads"], attrs["kv_num_heads"]) == (2, 2) and "scale" not in attrs


@pytest.mark.parametrize("form", [{"past": True}, {"shown": True}])
def test_a_state_that_others_hold_keeps_its_sizes(form: dict[str, bool]) -> None:
    found = widths(cut(linear("gated_delta", **form)))
    assert found["q"] == (6, 16) and found["v"] == (6, 24)


def causal(*, bias: bool = True, past: bool = False, shown: bool = False, last: bool = False, **attrs: Any) -> Any:
    """com.microsoft.CausalConvWithState between two products."""
    net = Net(17)
    x = net.op("MatMul", net.input("x", ["N", "S", IN]), net.weight(IN, 8, name="first"))
    x = x if last else net.transpose(x, 0, 2, 1)
    state = net.input("state", ["N", 2, 8] if last else ["N", 8, 2]) if past else ""
    operands = [x, net.weight(8, 1, 3, name="taps"), net.weight(8, name="bias") if bias else "", state]
    y, after = net.op("CausalConvWithState", *operands, domain=MS, n=2, channels_last=int(last), **attrs)
    y = net.op("MatMul", y if last else net.transpose(y, 0, 2, 1), net.weight(8, 12, name="o"))
    y = net.op("MatMul", net.op("Relu", y), net.weight(12, 5, name="last"))
    return net.model(y, *([after] if shown else []), check=False, shapes={y: ["N", "S", 5], after: list("abc")})


@pytest.mark.parametrize("attrs", [{}, {"activation": "silu"}, {"dilation": 2}, {"last": True}, {"bias": False}])
def test_channels_of_a_causal_convolution_go(attrs: dict[str, Any]) -> None:
    found = widths(cut(causal(**attrs)))
    assert found["first"] == (6, 4) and found["taps"] == (4, 1, 3) and found["o"] == (4, 6)
    assert attrs.get("bias") is False or found["bias"] == (4,)


@pytest.mark.parametrize("form", [{"past": True}, {"shown": True}, {"past": True, "last": True}])
def test_a_state_that_others_hold_keeps_the_channels(form: dict[str, Any]) -> None:
    found = widths(cut(causal(**form)))
    assert found["first"] == (6, 8) and found["taps"] == (8, 1, 3)


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 27, reason="onnx has neither operator")
def test_both_are_operators_of_onnx_too() -> None:
    """Since opset 27. Where onnxruntime has no kernel, onnx's reference evaluator decides."""
    net = Net(27)
    x = net.input("x", ["N", "S", IN])
    q, k, v = (net.op("MatMul", x, net.weight(IN, 16)) for _ in range(3))
    gates = [net.op("Sigmoid", net.op("MatMul", x, net.weight(IN, H))) for _ in range(2)]
    gates[0] = net.op("Neg", gates[0])
    y = net.op("LinearAttention", q, k, v, "", *gates, n=2, q_num_heads=H, kv_num_heads=H)[0]
    y = net.op("MatMul", net.hint(y, ["N", "S", 16]), net.weight(16, 8))
    y = net.op("CausalConvWithState", net.transpose(y, 0, 2, 1), net.weight(8, 1, 3), net.weight(8), n=2)[0]
    y = net.op("MatMul", net.transpose(net.hint(y, ["N", 8, "S"]), 0, 2, 1), net.weight(8, 5))
    result = assert_exact_cut(net.model(y))
    assert result is not None
    sizes = [tuple(t.dims) for t in result.model.graph.initializer]
    assert sizes[:3] == [(6, 8)] * 3 and (4, 1, 3) in sizes


def test_forms_that_no_processor_runs_stay() -> None:
    """Several states per call; nothing is proved by a run there."""
    found = widths(cut(causal(state_window=2), validate=False))
    assert found["first"] == (6, 8) and found["o"] == (8, 6)


def test_a_causal_convolution_is_repaired() -> None:
    """It is a product of windows, as any convolution is; also where its taps are apart."""
    model = causal(dilation=2)
    rng = np.random.default_rng(0)
    data = {"x": rng.standard_normal((64, 9, IN)).astype(np.float32)}
    result = op.prune(model, ratio=0.5, data=data, recover="full", latency=False)
    repairs = {r.layer: r for r in result.report.repairs}
    node = next(n for n in model.graph.node if n.op_type == "CausalConvWithState")
    assert repairs[node.name].before < 1e-9, "what is left of it computes what it did"


def forget_the_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention.LinearAttention, "set_scale", lambda *a: None)


def forget_the_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention.LinearAttention, "rewrite", lambda self, cut: None)


def let_channels_of_heads_go(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention.DecoderMaskedMultiHeadAttention, "propagate", attention.MultiHeadAttention.propagate)


def forget_the_rate(patch: pytest.MonkeyPatch) -> None:
    right = attention.LinearAttention._gate
    patch.setattr(
        attention.LinearAttention,
        "_gate",
        staticmethod(lambda step, i, heads: ((), (1, 1, 1, 1)) if i == 4 else right(step, i, heads)),
    )


def forget_what_moves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "along", lambda ids, axis, rank: right_along(np.roll(ids, 1), axis, rank))


BREAKS = {
    forget_the_scale: (lambda: linear("gated"), {}),
    forget_the_heads: (lambda: linear("delta"), {"reshape_axis": "heads"}),
    let_channels_of_heads_go: (decoder, {"layers": {"v": 0.75}}),
    forget_the_rate: (lambda: linear("gated", per_key=True), {}),
    forget_what_moves: (causal, {}),
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda d: d.__name__)
def test_a_broken_rule_shows(damage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof sees it, or onnxruntime refuses the model."""
    model, options = BREAKS[damage]
    built = model()
    damage(monkeypatch)
    with pytest.raises(op.errors.OnnxpruneError):
        cut(built, **options)
