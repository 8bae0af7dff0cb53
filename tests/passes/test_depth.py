"""Residual branches as a whole: found in any graph, removed exactly, chosen by what the outputs lose."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net, newest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

import onnxprune as op
from onnxprune.allocation.latency_model import LatencyTable, NodeKinds, Sample
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanBranch
from onnxprune.cli.main import main
from onnxprune.errors import BudgetError, UsageError
from onnxprune.graph.cost import is_layer, macs
from onnxprune.graph.view import Graph
from onnxprune.passes import Depth, Pipeline
from onnxprune.passes.depth import residual_branches
from onnxprune.pruning.branches import Branch, Branches
from onnxprune.runtime.latency import device
from onnxprune.search.latency import Bench, rewritable_sizes


def conv_blocks(net: Net) -> str:
    """y = relu(x + f(x)), a block with another shortcut, a block within a block, and a sum of three."""
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4))
    for _ in range(2):
        x = net.op("Relu", net.op("Add", net.conv(net.op("Relu", net.conv(x, 4, 4)), 4, 4), x))
    x = net.op("Relu", net.op("Add", net.conv(x, 4, 6, 1), net.conv(net.op("Relu", net.conv(x, 4, 6)), 6, 6)))
    inner = net.conv(x, 6, 6)
    inner = net.op("Add", inner, net.conv(net.op("Tanh", inner), 6, 6))
    x = net.op("Add", x, net.conv(inner, 6, 6, 1))
    x = net.op("Sum", x, net.conv(x, 6, 6), net.op("Tanh", net.conv(x, 6, 6, 1)))
    return net.conv(net.op("Sub", x, net.conv(x, 6, 6)), 6, 2)


def attention(net: Net, x: str, d: int = 8) -> str:
    """Two heads; the sizes of a batch come from shape arithmetic."""
    q, k, v = (net.reshape(net.linear(x, d, d), 0, 0, 2, d // 2) for _ in range(3))
    q, v = (net.transpose(t, 0, 2, 1, 3) for t in (q, v))
    weights = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 2, 3, 1)), axis=-1)
    context = net.transpose(net.op("MatMul", weights, v), 0, 2, 1, 3)
    return net.linear(net.reshape(context, 0, 0, d), d, d)


def mlp(net: Net, x: str, d: int = 8) -> str:
    return net.linear(net.op("Tanh", net.linear(x, d, 12)), 12, d)


def layer_norm(net: Net, x: str, d: int = 8) -> str:
    scales = net.weight(d, scale=0.3, low=0.5), net.weight(d, scale=0.3)
    return net.op("LayerNormalization", x, *scales, axis=-1)


def pre_norm(net: Net) -> str:
    x = net.linear(net.input("x", ["N", "T", 5]), 5, 8)
    for _ in range(2):
        x = net.op("Add", x, attention(net, layer_norm(net, x)))
        x = net.op("Add", x, mlp(net, layer_norm(net, x)))
    return net.linear(layer_norm(net, x), 8, 3)


def post_norm(net: Net) -> str:
    x = net.linear(net.input("x", ["N", "T", 5]), 5, 8)
    for _ in range(2):
        x = layer_norm(net, net.op("Add", x, attention(net, x)))
        x = layer_norm(net, net.op("Add", mlp(net, x), x))
    return net.linear(x, 8, 3)


def parallel(net: Net) -> str:
    """Attention and network side by side read one normalised tensor, which a later sum adds once more."""
    x = net.linear(net.input("x", ["N", "T", 5]), 5, 8)
    first = x
    for _ in range(2):
        normed = layer_norm(net, x)
        x = net.op("Add", x, net.op("Add", attention(net, normed), mlp(net, normed)))
    return net.linear(net.op("Add", x, first), 8, 3)


def fused(net: Net, *, kind: str = "SkipLayerNormalization", bias: bool = True) -> str:
    """Sums inside a normalisation that gives the sum as well."""
    x = net.linear(net.input("x", ["N", "T", 5]), 5, 8)
    branch = mlp(net, layer_norm(net, x))
    for _ in range(2):
        settings = [net.weight(8, scale=0.3, low=0.5)]
        if kind == "SkipLayerNormalization":
            settings.append(net.weight(8, scale=0.3) if bias else "")
        settings += [net.weight(8, scale=0.3)] if bias else []
        while not settings[-1]:
            settings.pop()
        y, *_, x = net.op(kind, x, branch, *settings, n=4, domain="com.microsoft", epsilon=1e-3)
        net.nodes[-1].output[1] = net.nodes[-1].output[2] = ""
        branch = mlp(net, y)
    return net.linear(net.op("Add", x, branch), 8, 3)


MODELS: dict[str, tuple[Callable[[Net], str], int, int]] = {
    "convolutions": (conv_blocks, 17, 9),
    "pre-norm": (pre_norm, 17, 4),
    "post-norm": (post_norm, 17, 4),
    "parallel": (parallel, 17, 7),
    "old sums": (conv_blocks, 8, 9),
    "newest": (pre_norm, newest(), 4),
    "fused": (fused, 17, 3),
    "fused, old": (lambda net: fused(net, bias=False), 16, 3),
    "fused RMS": (lambda net: fused(net, kind="SkipSimplifiedLayerNormalization"), 17, 3),
}


def made(name: str) -> onnx.ModelProto:
    build, opset, _ = MODELS[name]
    net = Net(opset)
    last = build(net)
    return net.model(last, check="fused" not in name, shapes={last: ["N", "T", 3]})


def branches(model: onnx.ModelProto) -> list[Branch]:
    analysis = Analysis(model)
    return Branches(Graph.of(analysis.loaded.proto, analysis.loaded.weights), analysis.facts).find()


def without(model: onnx.ModelProto, *tensors: str) -> op.Result:
    plan = Plan(branches=[PlanBranch(tensor) for tensor in tensors])
    return Pipeline([Depth(plan=plan)]).run(model)


def masked(model: onnx.ModelProto, tensors: list[str]) -> onnx.ModelProto:
    """The original with these tensors multiplied with 0 wherever they are read."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    for node in model.graph.node:
        copy.graph.node.add().CopyFrom(node)
        for i, name in enumerate(copy.graph.node[-1].output):
            if name in tensors:
                copy.graph.node[-1].output[i] = f"{name}_full"
                copy.graph.node.append(onnx.helper.make_node("Mul", [f"{name}_full", "zero"], [name]))
    return copy


def outputs(model: onnx.ModelProto, feed: dict[str, np.ndarray], *, reference: bool) -> list[np.ndarray]:
    if reference:
        return list(ReferenceEvaluator(model).run(None, feed))
    return list(ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed))


def assert_same(model: onnx.ModelProto, small: onnx.ModelProto, tensors: list[str], *, reference: bool) -> None:
    """At sizes that the tool has no probe of."""
    shape = [d.dim_value or (5 if i == 0 else 7) for i, d in enumerate(model.graph.input[0].type.tensor_type.shape.dim)]
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    for runtime in (False, True) if reference else (False,):
        want, have = (outputs(m, feed, reference=runtime) for m in (masked(model, tensors), small))
        for a, b in zip(want, have, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("name", MODELS)
def test_every_branch_goes_exactly(name: str) -> None:
    model = made(name)
    found = branches(model)
    assert len(found) == MODELS[name][2]
    for branch in found:
        result = without(model, branch.tensor)
        report = result.report
        assert report.exactness.passed
        assert report.totals.macs_before - report.totals.macs_after == branch.macs
        assert report.totals.params_before - report.totals.params_after >= branch.params
        assert_same(model, result.model, [branch.tensor], reference="fused" not in name)


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "fused", "fused, old", "fused RMS"])
def test_all_branches_go_together(name: str) -> None:
    model = made(name)
    tensors = [branch.tensor for branch in branches(model)]
    result = without(model, *tensors)
    layers = [layer for layer in result.report.layers if layer.macs_after]
    assert len(layers) == 2  # the first and the last
    assert_same(model, result.model, tensors, reference="fused" not in name)


def test_the_second_of_two_activations_does_the_work_of_both() -> None:
    model = made("convolutions")
    first = branches(model)[0]
    before = [node.op_type for node in model.graph.node]
    after = [node.op_type for node in without(model, first.tensor).model.graph.node]
    assert before.count("Relu") - after.count("Relu") == 2  # of the branch, and in front of it
    assert before.count("Identity") == after.count("Identity") == 0


def test_outputs_of_the_model_keep_their_names() -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4)
    y = net.op("Add", x, net.conv(x, 4, 4))
    z = net.op("Add", y, net.conv(y, 4, 4))
    model = net.model(x, y, z)
    tensors = [branch.tensor for branch in branches(model)]
    result = without(model, *tensors)
    assert [o.name for o in result.model.graph.output] == [x, y, z]
    assert_same(model, result.model, tensors, reference=True)


def test_sums_that_are_no_branches_are_left() -> None:
    net = Net()
    x, y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4), net.conv(net.input("y", ["N", 3, 6, 6]), 3, 4)
    z = net.op("Add", x, y)  # of two inputs, which have nothing in common
    z = net.op("Add", z, net.op("Tanh", z))  # without a layer
    shared = net.conv(z, 4, 4)
    z = net.op("Add", z, shared)  # which is an output as well
    narrow = net.reduce("ReduceMean", z, [2, 3])
    z = net.op("Add", narrow, net.op("Mul", net.conv(z, 4, 4), narrow))  # which is wider than what it is added to
    assert not branches(net.model(net.op("Relu", z), shared))


def test_an_addend_that_looks_like_a_branch_has_a_reason() -> None:
    """As the first attention, whose position biases all others read."""
    net = Net()
    x = net.linear(net.input("x", ["N", "T", 5]), 5, 8)
    bias = net.linear(x, 8, 8)
    x = net.op("Add", x, first := net.op("Mul", bias, net.linear(net.op("Tanh", bias), 8, 8)))
    x = net.op("Add", x, second := net.op("Mul", bias, net.linear(x, 8, 8)))
    x = net.op("Add", net.linear(x, 8, 8), third := net.op("Identity", net.linear(inner := net.linear(x, 8, 8), 8, 8)))
    model = net.model(net.op("Relu", x), inner)
    facts = {branch.name: branch for branch in residual_branches(Analysis(model))}
    assert facts[second].reason == "" and facts[third].reason == f"{inner!r} in it is an output of the model"
    assert facts[first].reason.startswith("Mul '/Mul_") and facts[first].reason.endswith(f" reads {bias!r} in it too")
    assert len(facts[first].layers) == 2 and 0 < facts[first].macs_share < 1 and 0 < facts[first].params_share < 1
    with pytest.raises(UsageError, match=r"reads .* in it too"):
        without(model, first)
    report = without(model, second).report
    assert [branch.name for branch in report.branches if "in it" in branch.reason] == [first, third]


def test_inspect_lists_branches(tmp_path: Path) -> None:
    model = made("convolutions")
    onnx.save(model, tmp_path / "m.onnx")
    run = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.onnx"), "--json"])
    listed = json.loads(run.stdout)["branches"]
    assert [b["name"] for b in listed if not b["reason"]] == [branch.tensor for branch in branches(model)]
    whole = sum(layer.macs_before for layer in op.analyze(model).layers)
    assert all(b["macs_share"] == b["macs"] / whole and b["layers"] and not b["removed"] for b in listed)
    run = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.onnx")])
    assert "Residual branches (9 of 9 can be removed)" in run.stdout


FUSED_CONV = pytest.param(
    "FusedConv", marks=pytest.mark.newest_runtime
)  # older kernels refuse its addend at some sizes


@pytest.mark.parametrize("kind", ["Gemm", "FusedGemm", FUSED_CONV])
def test_a_branch_that_a_layer_adds_to_its_product_goes(kind: str) -> None:
    net, own = Net(17), {} if kind == "Gemm" else {"domain": "com.microsoft", "activation": "Relu"}
    if kind == "FusedConv":
        x = net.op("Relu", net.input("x", ["N", 4, 6, 6]))
        branch = net.conv(net.op("Tanh", net.conv(x, 4, 6)), 6, 4)
        y = net.op(kind, x, net.weight(4, 4, 3, 3), net.weight(4), branch, pads=[1] * 4, **own)
    else:
        x = net.op("Relu", net.input("x", ["N", 8]))
        branch = mlp(net, x)
        y = net.op(kind, x, net.weight(8, 8), branch, beta=0.5, alpha=2.0, **own)
    z = net.op("Tanh", y)
    model = net.model(z, check=False, shapes={z: ["N", 4, 6, 6] if kind == "FusedConv" else ["N", 8]})
    assert [found.tensor for found in branches(model)] == [branch]
    result = without(model, branch)
    assert result.report.exactness.passed
    assert [node.op_type for node in result.model.graph.node] == ["Relu", kind, "Tanh"]
    assert_same(model, result.model, [branch], reference=kind == "Gemm")


@pytest.mark.parametrize("alike", [False, True])
def test_sums_of_codes_lose_branches(alike: bool) -> None:
    """What is left is encoded anew, or is the sum itself where both have the same scale and zero point."""
    net = Net(17)
    zero = net.const(np.uint8(128), np.uint8)
    scale, other = net.const(np.float32(0.05)), net.const(np.float32(0.05 if alike else 0.07))
    x = net.op("QuantizeLinear", net.input("x", ["N", 4, 6, 6]), scale, zero)
    kernel = net.const(net.rng.integers(-90, 90, (4, 4, 3, 3)), np.int8, "kernel")
    small, signed = net.const(np.float32(0.01)), net.const(np.int8(0), np.int8)
    f = net.op("QLinearConv", x, scale, zero, kernel, small, signed, scale, zero, pads=[1] * 4)
    sums = [scale if alike else other, zero]
    y = net.op("QLinearAdd", x, scale, zero, f, scale, zero, *sums, domain="com.microsoft")
    y = net.op("DequantizeLinear", y, *sums)
    model = net.model(y, check=False, shapes={y: ["N", 4, 6, 6]})
    (branch,) = branches(model)
    assert branch.tensor == f and branch.macs
    result = without(model, f)
    assert result.report.exactness.passed
    kinds = [node.op_type for node in result.model.graph.node]
    assert len(kinds) == (2 if alike else 4) and "QLinearConv" not in kinds
    values = np.random.default_rng(0).standard_normal((3, 4, 6, 6)).astype(np.float32)
    (have,) = outputs(result.model, {"x": values}, reference=False)
    np.testing.assert_allclose(have, values.clip(-6.4, 6.35), atol=0.061)


@cache
def trained() -> onnx.ModelProto:
    """Four blocks, of which the third adds next to nothing."""
    net = Net(17, seed=3)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6))
    for k in range(4):
        w = net.weight(6, 6, 3, 3, scale=1e-3 if k == 2 else 0.1)
        y = net.op("Conv", net.op("Relu", net.conv(x, 6, 6)), w, pads=[1] * 4)
        x = net.op("Relu", net.op("Add", x, y))
    return net.model(net.linear(net.op("Flatten", net.op("GlobalAveragePool", x)), 6, 5))


SAMPLES = np.random.default_rng(0).standard_normal((96, 3, 6, 6)).astype(np.float32)


def test_the_branch_that_outputs_need_least_goes_and_the_rest_is_recovered() -> None:
    found = branches(trained())
    result = op.prune(trained(), depth=1, data=SAMPLES, recover="none", latency=False)
    removed, *rest = result.report.branches
    assert removed.name == found[2].tensor and removed.removed and removed.error < 0.01
    assert not any(branch.removed for branch in rest) and len(rest) == 3
    two = op.prune(trained(), depth=0.5, data=SAMPLES, recover="none", latency=False)
    assert two.report.branches[0].name == removed.name
    assert len(two.plan.branches) == 2
    fitted = op.prune(trained(), plan=two.plan, data=SAMPLES, latency=False)
    was, now = fitted.report.recovery.before.outputs[0].noise, fitted.report.recovery.after.outputs[0].noise
    assert now < 0.2 * was
    assert json.loads(two.plan.text())["branches"][0]["tensor"] == removed.name


def test_branches_and_channels_go_together_and_come_back_from_a_plan() -> None:
    result = op.prune(trained(), depth=1, ratio=0.3, data=SAMPLES, recover="none", latency=False)
    assert result.plan.branches and result.plan.groups and result.report.exactness.passed
    again = op.prune(trained(), plan=Plan.from_dict(result.plan.to_dict()), latency=False)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    before = [(layer.name, layer.params_before) for layer in op.analyze(trained()).layers]
    assert [(layer.name, layer.params_before) for layer in again.report.layers] == before
    later = op.recover(trained(), result.model, plan=result.plan, data=SAMPLES, recover="bias")
    assert later.report.branches[0].removed and later.report.recovery.after is not None


def test_patterns_hold() -> None:
    found = branches(trained())
    for patterns in ({"exclude": [found[2].layers[0]]}, {"include": [found[1].tensor, found[1].sum]}):
        result = op.prune(trained(), depth=1, data=SAMPLES, recover="none", latency=False, **patterns)
        assert result.report.branches[0].name != found[2].tensor
    with pytest.raises(BudgetError, match="has 1 branch"):
        op.prune(trained(), depth=2, data=SAMPLES, include=[found[1].sum])


@pytest.mark.parametrize("amount", [0, -1, 1.0, 1.5, True, "many", float("nan")])
def test_amounts_that_are_none(amount: object) -> None:
    with pytest.raises(UsageError, match="depth"):
        op.prune(trained(), depth=amount, data=SAMPLES)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(UsageError, match="no data"):
        op.prune(trained(), depth=1)
    net = Net()
    plain = net.model(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4))
    with pytest.raises(BudgetError, match="no residual branch"):
        op.prune(plain, depth=1, data=SAMPLES)
    with pytest.raises(UsageError, match="'nothing', which is no branch"):
        without(trained(), "nothing")
    model = made("convolutions")
    both = [b.tensor for b in branches(model) if b.sum == branches(model)[2].sum]
    with pytest.raises(UsageError, match="Nothing would be left of the sum"):
        without(model, *both)


def test_the_command_writes_a_model_and_a_plan(tmp_path: Path) -> None:
    onnx.save(trained(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=SAMPLES)
    arguments = [str(tmp_path / "m.onnx"), "--depth", "1", "--data", str(tmp_path / "x.npz")]
    more = ["--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "small.onnx")]
    run = CliRunner().invoke(main, [*arguments, *more])
    assert run.exit_code == 0, run.output
    assert "1 of 4 removed" in run.output and "exact     yes" in run.output
    small = onnx.load(tmp_path / "small.onnx")
    assert sum(node.op_type == "Conv" for node in small.graph.node) == 7
    assert json.loads((tmp_path / "plan.json").read_text())["branches"]


def decoder(net: Net, *, layers: int = 2) -> onnx.ModelProto:
    """Keys and values are appended to caches; positions begin at the length of the first cache."""
    x, outputs, d = net.linear(net.input("x", ["N", "S", 5]), 5, 8), [], 8
    caches = [[net.input(f"past.{k}.{part}", ["N", 2, "P", 4]) for part in ("key", "value")] for k in range(layers)]
    start = net.gather(net.op("Shape", caches[0][0]), [2], 0)
    stop = net.op("Add", start, net.gather(net.op("Shape", x), [1], 0))
    x = net.op("Add", x, net.op("Slice", net.weight(64, d), start, stop, net.const([0])))
    for pasts in caches:
        normed, parts = layer_norm(net, x), []
        for past in ("", *pasts):
            heads = net.transpose(net.reshape(net.linear(normed, d, d), 0, 0, 2, 4), 0, 2, 1, 3)
            parts.append(net.op("Concat", past, heads, axis=2) if past else heads)
        weights = net.op("Softmax", net.op("MatMul", parts[0], net.transpose(parts[1], 0, 1, 3, 2)), axis=-1)
        context = net.transpose(net.op("MatMul", weights, parts[2]), 0, 2, 1, 3)
        x = net.op("Add", x, net.linear(net.reshape(context, 0, 0, d), d, d))
        x = net.op("Add", x, mlp(net, layer_norm(net, x)))
        outputs += [net.op("Identity", part) for part in parts[1:]]  # nothing else reads what leaves the model
    logits = net.linear(layer_norm(net, x), d, 6)
    return net.model(logits, *outputs)


def generated(model: onnx.ModelProto, steps: int = 3) -> list[np.ndarray]:
    """Logits of a few steps, every time with the caches that came out."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pasts = [value.name for value in session.get_inputs()][1:]
    feed = {name: np.zeros((3, 2, 0, 4), np.float32) for name in pasts}
    draw, logits = np.random.default_rng(0), []
    for size in [4, *[1] * (steps - 1)]:
        x = draw.standard_normal((3, size, 5)).astype(np.float32)
        first, *presents = session.run(None, {"x": x, **feed})
        feed = dict(zip(pasts, presents, strict=True))
        logits.append(first)
    return logits


@pytest.mark.parametrize("keep", [False, True])
def test_a_decoder_without_a_layer_generates_as_the_masked_one_does(keep: bool) -> None:
    model = decoder(Net())
    found = branches(model)
    assert [len(branch.caches) for branch in found] == [2, 0, 2, 0]
    plan = Plan(branches=[PlanBranch(branch.tensor, keep_cache=keep) for branch in found[:2]])
    result = Pipeline([Depth(plan=plan)]).run(model)
    assert result.report.exactness.passed
    names = [value.name for value in result.model.graph.input]
    assert len(result.model.graph.output) == len(names) == (5 if keep else 3)
    assert sum(node.op_type == "Concat" for node in result.model.graph.node) == 2
    assert result.report.branches[0].cache == ([] if keep else [*found[0].caches[0].names, *found[0].caches[1].names])
    want = generated(masked(model, [branch.tensor for branch in found[:2]]))
    for a, b in zip(want, generated(result.model), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_a_layer_of_a_decoder_is_chosen_and_compared_without_its_cache() -> None:
    model, draw = decoder(Net(seed=2)), np.random.default_rng(0)
    data = {"x": draw.standard_normal((24, 3, 5)).astype(np.float32)}
    data |= {v.name: draw.standard_normal((24, 2, 2, 4)).astype(np.float32) for v in model.graph.input[1:]}
    named = [branch.tensor for branch in branches(model) if branch.caches][:1]
    result = op.prune(model, depth=1, include=named, data=data, recover="lstsq", latency=False)
    assert result.report.branches[0].cache[0] == "past.0.key" and len(result.model.graph.output) == 3
    assert not any("only the original" in note for note in (result.report.fidelity.note,))
    with pytest.raises(UsageError, match="would be left"):  # no cache is left that has the length
        without(model, *(branch.tensor for branch in branches(model)))
    with pytest.raises(UsageError, match="keep_cache"):
        op.prune(model, data=data, keep_cache=True)


def test_branches_compete_within_a_budget() -> None:
    whole = sum(layer.macs_before for layer in op.analyze(trained()).layers)
    result = op.prune(trained(), target="macs=0.7", depth="auto", data=SAMPLES, trials=0, latency=False)
    report = result.report
    names = {answer.name: answer.chosen for answer in report.budget.answers if "branch" in answer.name}
    assert len(names) >= 2 and names["1 branch removed"]  # the third adds next to nothing
    assert [branch.tensor for branch in result.plan.branches] == [branches(trained())[2].tensor]
    (target,) = report.budget.targets
    assert target.before == report.totals.macs_before == whole
    assert report.totals.macs_after <= 0.7 * whole * 1.02 and report.exactness.passed
    again = op.prune(trained(), plan=result.plan, latency=False)
    assert again.report.totals.macs_after == report.totals.macs_after
    with pytest.raises(UsageError, match="needs a target"):
        op.prune(trained(), depth="auto", data=SAMPLES)


def test_a_target_beside_a_number_of_branches_is_a_share_of_the_original() -> None:
    result = op.prune(trained(), target="macs=0.75", depth=1, data=SAMPLES, recover="none", trials=0, latency=False)
    totals = result.report.totals
    assert len(result.plan.branches) == 1
    assert 0.6 * totals.macs_before < totals.macs_after <= 0.75 * totals.macs_before * 1.02


def work(model: op.ModelSource) -> int:
    return sum(layer.macs_before for layer in op.analyze(model).layers)


def table_of(model: onnx.ModelProto, of: dict[str, Any], slow: float = 1.0) -> LatencyTable:
    """A nanosecond per multiply-accumulate of a layer, a microsecond times ``slow`` for any other node."""
    sizes = rewritable_sizes(op.analyze(model))
    nodes, full = NodeKinds(sizes), sizes.full_counts
    table = LatencyTable(op.analyze(model).loaded.sha256, of, {"x": [1, 3, 6, 6]}, 0.0)
    for share in (1.0, 0.5):
        shape = sizes.at(np.maximum(1, (share * full).astype(np.int64)))
        for node in nodes.nodes:
            is_of_layers = is_layer(node, sizes.analysis.graph)
            seconds = 1e-9 * float(np.squeeze(macs(node, shape))) if is_of_layers else 1e-6 * slow
            read, made = (int(np.squeeze(n)) for n in nodes.channels(node, shape))
            table.samples.append(Sample(node.label, read, made, seconds))
            table.seconds += seconds if share == 1.0 else 0.0
    return table


def test_a_latency_is_a_share_of_the_originals_without_branches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a result is that of the original times the share of it that a run beside the original takes."""
    monkeypatch.setattr(Bench, "time_models", lambda _, paths: 1e-9 * np.array([work(path) for path in paths]))
    here = device().facts()
    table = table_of(trained(), here)
    options = {"data": SAMPLES, "recover": "none", "trials": 0, "latency": False, "latency_table": table}
    result = op.prune(trained(), target="latency=0.7", depth=1, **options)
    (target,) = result.report.budget.targets
    assert target.how == "measured" and target.before == table.seconds
    assert target.after / target.before == pytest.approx(work(result.model) / work(trained()))
    assert 0.6 < target.after / target.before <= 0.7 * 1.05


def blocks(scales: list[float], *, redundant: bool = False) -> onnx.ModelProto:
    """Residual blocks whose branches have this scale; a redundant one has an inner channel that counts, and five 0."""
    net = Net(17, seed=3)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6))
    for scale in scales:
        inner = net.op("Relu", net.conv(x, 6, 6))
        rows = scale * np.random.default_rng(len(net.nodes)).standard_normal((6, 6, 3, 3)).astype(np.float32)
        if redundant:
            rows[:, 1:] = 0.0
        x = net.op("Add", net.op("Conv", inner, net.const(rows), pads=[1] * 4), x)
    return net.model(net.linear(net.op("Flatten", net.op("GlobalAveragePool", x)), 6, 5))


@pytest.mark.parametrize("case", ["depth", "width", "latency", "two targets"])
def test_one_knapsack_removes_branches_where_they_lose_least(case: str) -> None:
    """Empty branches go, full ones with empty channels stay, unless every node takes its time at any width."""
    model = blocks([0.3, 1e-4, 1e-4, 0.3] if "depth" in case else [0.1, 0.2, 0.1, 0.2], redundant="depth" not in case)
    options = {"data": SAMPLES, "recover": "none", "trials": 0, "latency": False}
    target: Any = {"macs": 0.55}
    if case != "depth" and case != "width":
        target = {"latency": 0.7} if case == "latency" else {"latency": 0.7, "peak-memory": 0.95}
        options["latency_table"] = table_of(model, {"name": "another device"}, slow=100.0)
    result = op.prune(model, target=target, depth="auto", **options)
    removed = [branch for branch in result.report.branches if branch.removed]
    if case == "depth":
        found = branches(model)
        assert {branch.name for branch in removed} == {found[1].tensor, found[2].tensor}
        assert all(branch.error > 0.01 for branch in result.report.branches if not branch.removed)
    else:
        assert bool(removed) == (case != "width")
    assert [branch.tensor for branch in result.plan.branches] == [branch.name for branch in removed]
    for facts in result.report.budget.targets:
        assert facts.after <= facts.limit * 1.05 and facts.limit == pytest.approx(target[facts.kind] * facts.before)
    chosen = next(answer for answer in result.report.budget.answers if answer.chosen)
    assert chosen.fine == max(a.fine for a in result.report.budget.answers if "removed" in a.name)


def test_branches_within_a_budget_follow_patterns_and_its_end_is_typed() -> None:
    model = blocks([0.3, 1e-4, 1e-4, 0.3])
    options = {"data": SAMPLES, "recover": "none", "trials": 0, "latency": False, "depth": "auto"}
    found = branches(model)
    result = op.prune(model, target="macs=0.55", exclude=[found[1].tensor], **options)
    assert [branch.tensor for branch in result.plan.branches] == [found[2].tensor]
    assert next(branch.reason for branch in result.report.branches if branch.name == found[1].tensor) == "excluded"
    with pytest.raises(BudgetError, match="cannot be reached: the best is macs="):
        op.prune(model, target="macs=0.001", **options)
