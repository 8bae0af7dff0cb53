"""Whole experts: the router's scores and whatever belongs to an expert go in step, in every spelling of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from onnx import numpy_helper

import onnxprune as op
from onnxprune.runtime.sessions import open_session, run

D, F, E, K = 6, 10, 5, 2
MS = "com.microsoft"


def start(*, sigmoid: bool = False) -> tuple[Net, str, str]:
    """Return a net, tokens [N, D], and routing scores [N, E] with a bias."""
    net = Net(18)
    x = net.op("Tanh", net.op("MatMul", net.input("x", ["N", D]), net.weight(D, D, scale=1.0, name="before")))
    scores = net.op("MatMul", x, net.weight(D, E, scale=1.0, name="router"))
    scores = net.op("Add", scores, net.weight(E, scale=0.1, name="router_bias"))
    return net, x, net.op("Sigmoid", scores) if sigmoid else scores


def chosen(net: Net, scores: str, sigmoid: bool = False) -> tuple[str, str]:
    """Return shares of the chosen experts [N, K] that sum to 1, and their numbers."""
    shares = scores if sigmoid else net.op("Softmax", scores, axis=-1)
    values, ids = net.op("TopK", shares, net.const(np.array([K])), n=2, axis=-1)
    return net.op("Div", values, net.reduce("ReduceSum", values, [-1])), ids


def expert(net: Net, x: str, e: int) -> str:
    y = net.op("Relu", net.op("MatMul", x, net.weight(D, F, scale=0.5, name=f"up{e}")))
    return net.op("MatMul", y, net.weight(F, D, scale=0.5, name=f"down{e}"))


def end(net: Net, y: str) -> onnx.ModelProto:
    y = net.op("MatMul", y, net.weight(D, 4, name="after"))
    return net.model(y, shapes={y: ["N", 4]})


def scattered(sigmoid: bool = False) -> onnx.ModelProto:
    """Every expert gets its own tokens, and its outputs are added where these were."""
    net, x, scores = start(sigmoid=sigmoid)
    values, ids = chosen(net, scores, sigmoid)
    y = net.op("Mul", x, net.const(np.array(0, np.float32), np.float32))
    for e in range(E):
        mask = net.op("Cast", net.op("Equal", ids, net.const(np.array(e))), to=1)
        share = net.reduce("ReduceSum", net.op("Mul", values, mask), [-1], 0)
        rows = net.squeeze(net.op("NonZero", share), [0])
        out = expert(net, net.op("Gather", x, rows), e)
        out = net.op("Mul", out, net.unsqueeze(net.op("Gather", share, rows), [1]))
        y = net.op("ScatterND", y, net.unsqueeze(rows, [1]), out, reduction="add")
    return end(net, y)


def summed() -> onnx.ModelProto:
    """One-hot numbers; every expert sees all tokens, and its share is 0 for most."""
    net, x, scores = start()
    values, ids = chosen(net, scores)
    values01 = net.const(np.array([0, 1], np.float32), np.float32)
    hot = net.transpose(net.op("OneHot", ids, net.const(np.array(E)), values01), 2, 0, 1)
    total = ""
    for e in range(E):
        share = net.reduce("ReduceSum", net.op("Mul", net.gather(hot, np.array(e), 0), values), [-1])
        out = net.op("Mul", expert(net, x, e), share)
        total = net.op("Add", total, out) if total else out
    return end(net, total)


def stacked() -> onnx.ModelProto:
    """All experts of all tokens by products of stacks, times shares that are scattered to their places."""
    net, x, scores = start()
    values, ids = chosen(net, scores)
    zeros = net.op("ConstantOfShape", net.op("Shape", scores))
    dense = net.op("ScatterElements", zeros, ids, values, axis=1)
    up, down = net.weight(E, D, F, scale=0.5, name="up"), net.weight(E, F, D, scale=0.5, name="down")
    y = net.op("MatMul", net.op("Relu", net.op("MatMul", net.unsqueeze(x, [0]), up)), down)
    y = net.op("Mul", y, net.unsqueeze(net.transpose(dense, 1, 0), [2]))
    return end(net, net.reduce("ReduceSum", y, [0], 0))


def looked_up() -> onnx.ModelProto:
    """The weights of the chosen experts are picked for every token."""
    net, x, scores = start()
    values, ids = chosen(net, scores)
    up, down = net.weight(E, D, F, scale=0.5, name="up"), net.weight(E, F, D, scale=0.5, name="down")
    y = net.op("MatMul", net.unsqueeze(net.unsqueeze(x, [1]), [1]), net.op("Gather", up, ids))
    y = net.op("MatMul", net.op("Relu", y), net.op("Gather", down, ids))
    y = net.op("Mul", net.squeeze(y, [2]), net.unsqueeze(values, [2]))
    return end(net, net.reduce("ReduceSum", y, [1], 0))


def fused() -> onnx.ModelProto:
    net, x, scores = start()
    layers = [net.weight(E, F, D, scale=0.5, name="up"), net.weight(E, F), net.weight(E, D, F, scale=0.5, name="down")]
    y = net.op("MoE", x, scores, *layers, net.weight(E, D), domain=MS, k=K, activation_type="relu")
    return end(net, y)


def coded() -> onnx.ModelProto:
    net, x, scores = start()
    draw, layers = np.random.default_rng(0), []
    for name, shape in (("up", (E, F, D)), ("down", (E, D, F))):
        layers.append(net.const(draw.integers(0, 256, shape).astype(np.uint8), np.uint8, name))
        layers += [net.const(draw.uniform(0.002, 0.004, shape[:2]).astype(np.float32), np.float32), ""]
    attributes = {"k": K, "activation_type": "silu", "expert_weight_bits": 8}
    return end(net, net.op("QMoE", x, scores, *layers, domain=MS, **attributes))


FORMS: list[Callable[[], onnx.ModelProto]] = [scattered, summed, stacked, looked_up, fused, coded]


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return next(iter(run(open_session(model.SerializeToString()), {"x": x}).values()))


def without(model: onnx.ModelProto, experts: list[int], least: float = -1e9) -> onnx.ModelProto:
    """Return the original whose router never chooses some experts."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name == "router_bias":
            bias = numpy_helper.to_array(tensor).copy()
            bias[experts] = least
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    return copy


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


X = np.random.default_rng(3).normal(size=(48, D)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_rest_is_the_original_that_never_chooses_them(form: Callable[[], onnx.ModelProto]) -> None:
    model = form()
    result = op.prune(model, experts=2, data={"x": X}, recover="none", latency=False)
    (facts,) = result.report.experts
    assert (facts.experts, facts.top_k, len(facts.removed), len(facts.scores)) == (E, K, 2, E)
    assert facts.removed == sorted(np.argsort(facts.scores, kind="stable")[:2].tolist())
    expected = outputs(without(model, facts.removed), X)
    np.testing.assert_allclose(outputs(result.model, X), expected, atol=1e-5)
    assert not np.allclose(expected, outputs(model, X), atol=1e-3)
    small = sizes(result.model)
    assert small["router"] == (D, E - 2) and small["router_bias"] == (E - 2,)
    left = [n for n in small if n.startswith(("up", "down"))]
    assert len(left) == 2 * (E - 2) or {small[n][0] for n in left} == {E - 2}
    assert result.report.exactness.passed and len(result.report.exactness.batches) == 3


@pytest.mark.parametrize("removed", [[0, 1], [3, 4], [0, 2, 4]], ids=str)
@pytest.mark.parametrize("form", [summed, scattered], ids=lambda form: form.__name__)
def test_a_plan_names_experts(form: Callable[[], onnx.ModelProto], removed: list[int]) -> None:
    model = form()
    choice = next(node.output[0] for node in model.graph.node if node.op_type == "TopK")
    plan = {"groups": [], "experts": [{"choice": choice, "removed": removed}]}
    result = op.prune(model, plan=op.Plan.from_dict(plan), latency=False)
    np.testing.assert_allclose(outputs(result.model, X), outputs(without(model, removed), X), atol=1e-5)
    assert result.plan.to_dict()["experts"] == plan["experts"]


@pytest.mark.parametrize("form", [scattered, coded], ids=lambda form: form.__name__)
def test_who_gives_least_goes(form: Callable[[], onnx.ModelProto]) -> None:
    model = form()
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == "down3":
            array *= 1e-4
        elif tensor.name == "down":
            array[3] = 128
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for data in (None, {"x": X}):
        facts = op.prune(model, experts=1, data=data, recover="none", latency=False).report.experts[0]
        assert facts.removed == [3] and facts.scores[3] < np.median(facts.scores)


def test_scores_are_routing_weight_times_norm() -> None:
    model = scattered()
    scores = op.prune(model, experts=1, data={"x": X}, recover="none", latency=False).report.experts[0].scores
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    tokens = np.tanh(X @ weights["before"])
    logits = tokens @ weights["router"] + weights["router_bias"]
    order = np.argsort(-logits, axis=1)[:, :K]
    for e in range(E):
        out = np.maximum(tokens @ weights[f"up{e}"], 0) @ weights[f"down{e}"]
        mine = (order == e).any(axis=1)
        share = np.exp(logits[:, e]) / np.take_along_axis(np.exp(logits), order, 1).sum(axis=1)
        expected = (share * np.linalg.norm(out, axis=1))[mine].mean()
        assert scores[e] == pytest.approx(expected, rel=1e-3)


def test_as_many_stay_as_are_chosen() -> None:
    result = op.prune(stacked(), experts=E - 1, latency=False)
    (facts,) = result.report.experts
    assert len(facts.removed) == E - K and "2 of 5 are chosen for every token" in facts.reason
    assert any("loses 3" in warning for warning in result.report.warnings)
    assert "experts   3 of 5 removed in 1 mixture" in str(result)


def test_sigmoid_scores_and_channels_besides() -> None:
    model = scattered(sigmoid=True)
    result = op.prune(model, experts=0.4, ratio=0.5, data={"x": X}, latency=False)
    assert len(result.report.experts[0].removed) == 2 and result.plan.experts and result.plan.groups
    shapes = sizes(result.model)
    kept = next(e for e in range(E) if e not in result.report.experts[0].removed)
    assert shapes["router"][1] == E - 2 and shapes[f"up{kept}"][1] < F
    assert result.report.exactness.passed


def switched(capacity: int, one_hot: bool = False) -> onnx.ModelProto:
    """One expert per token, by the largest share; an expert takes the first ``capacity`` of its tokens."""
    net, x, scores = start()
    shares = net.op("Softmax", scores, axis=-1)
    ids = net.op("ArgMax", shares, axis=-1, keepdims=0 if one_hot else 1)
    share = net.reduce("ReduceMax", shares, [-1])
    if one_hot:
        hot = net.op("OneHot", ids, net.const(np.array(E)), net.const(np.array([0, 1], np.float32)), axis=-1)
    y = net.op("Mul", x, net.const(np.array(0, np.float32), np.float32))
    for e in range(E):
        if one_hot:
            mask = net.op("Gather", hot, net.const(np.array([e])), axis=1)
        else:
            mask = net.op("Cast", net.op("Equal", ids, net.const(np.array(e))), to=1)
        places = net.op("CumSum", mask, net.const(np.array(0)))
        fits = net.op(
            "Cast", net.op("LessOrEqual", places, net.const(np.array(capacity, np.float32), np.float32)), to=1
        )
        y = net.op("Add", y, net.op("Mul", expert(net, x, e), net.op("Mul", mask, fits)))
    return end(net, net.op("Mul", y, share))


@pytest.mark.parametrize("one_hot", [False, True])
def test_switch_routers(one_hot: bool) -> None:
    model = switched(8, one_hot)
    result = op.prune(model, experts=2, data={"x": X}, recover="none", latency=False)
    (facts,) = result.report.experts
    assert (facts.experts, facts.top_k, len(facts.removed)) == (E, 1, 2) and result.report.exactness.passed
    expected = outputs(without(model, facts.removed), X)
    np.testing.assert_allclose(outputs(result.model, X), expected, atol=1e-5)
    assert sizes(result.model)["router"] == (D, E - 2) and not np.allclose(expected, outputs(model, X), atol=1e-3)


def grouped() -> onnx.ModelProto:
    """Two of the experts in the best two of four groups, by scores with a correction; shares are without it."""
    net = Net(18)
    x = net.op("Tanh", net.op("MatMul", net.input("x", ["N", D]), net.weight(D, D, scale=1.0, name="before")))
    shares = net.op("Sigmoid", net.op("MatMul", x, net.weight(D, 8, scale=1.0, name="router")))
    scores = net.op("Add", shares, net.weight(8, scale=0.1, name="correction"))
    by_group = net.op("Reshape", scores, net.const(np.array([-1, 4, 2])))
    best = net.reduce("ReduceMax", by_group, [-1], 0)
    _, groups = net.op("TopK", best, net.const(np.array([2])), n=2, axis=-1)
    hot = net.op("OneHot", groups, net.const(np.array(4)), net.const(np.array([0, 1], np.float32)), axis=-1)
    inside = net.unsqueeze(net.reduce("ReduceSum", hot, [1], 0), [-1])
    inside = net.op("Reshape", net.op("Expand", inside, net.const(np.array([1, 4, 2]))), net.const(np.array([-1, 8])))
    limited = net.op("Where", net.op("Cast", inside, to=9), scores, net.const(np.array(-9, np.float32), np.float32))
    _, ids = net.op("TopK", limited, net.const(np.array([K])), n=2, axis=-1)
    values = net.op("GatherElements", shares, ids, axis=1)
    y = net.op("Mul", x, net.const(np.array(0, np.float32), np.float32))
    for e in range(8):
        mask = net.op("Cast", net.op("Equal", ids, net.const(np.array(e))), to=1)
        share = net.reduce("ReduceSum", net.op("Mul", values, mask), [-1])
        y = net.op("Add", y, net.op("Mul", expert(net, x, e), share))
    return end(net, y)


def test_experts_of_groups_are_never_chosen_and_go() -> None:
    result = op.prune(grouped(), experts=2, data={"x": X}, recover="none", latency=False)
    facts = next(f for f in result.report.experts if f.experts == 8)
    assert len(facts.removed) == 2 and result.report.exactness.passed
    names = set(sizes(result.model))
    assert all((f"up{e}" in names) == (e not in facts.removed) for e in range(8)) and "router" in names


def plain() -> onnx.ModelProto:
    net = Net(18)
    scores = net.op("MatMul", net.input("x", ["N", D]), net.weight(D, E))
    values, _ = net.op("TopK", scores, net.const(np.array([K])), n=2)
    return net.model(values)


def handed_on() -> onnx.ModelProto:
    """The numbers of the chosen experts are an output."""
    model = looked_up()
    top = next(node for node in model.graph.node if node.op_type == "TopK")
    model.graph.output.append(onnx.helper.make_tensor_value_info(top.output[1], onnx.TensorProto.INT64, ["N", K]))
    return model


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (plain, {"experts": 1}, "No expert was found"),
        (scattered, {"experts": 0}, "experts: 0 is not allowed"),
        (scattered, {"experts": 0.05}, "removes no expert"),
        (scattered, {"experts": 1, "exclude": ["router"]}, "No expert was found .*excluded"),
        (scattered, {"experts": 1, "include": ["nothing"]}, "nothing"),
        (scattered, {"experts": 1, "target": "macs=0.5"}, "sets how much to remove"),
        (handed_on, {"experts": 1}, "holds numbers of tokens or experts"),
    ],
)
def test_refused(model: Callable[[], onnx.ModelProto], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(op.OnnxpruneError, match=r"(?s)" + message) as caught:
        op.prune(model(), **settings)
    assert caught.value.exit_code in (2, 5)


def test_the_proof_sees_a_wrong_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "onnxprune.passes.experts.kept_of", lambda mixture, removed: np.arange(mixture.size - len(removed))
    )
    model = summed()
    choice = next(node.output[0] for node in model.graph.node if node.op_type == "TopK")
    plan = op.Plan.from_dict({"groups": [], "experts": [{"choice": choice, "removed": [0, 2]}]})
    with pytest.raises(op.ValidationError, match="without experts is not exact"):
        op.prune(model, plan=plan)


def test_a_model_without_experts_is_not_recovered_afterwards() -> None:
    result = op.prune(fused(), experts=1, latency=False)
    with pytest.raises(op.UsageError, match="removes experts as well"):
        op.recover(fused(), result.model, plan=result.plan, data={"x": X})
