"""Caches that shrink: past and present lose the same heads and channels, and a loop that feeds them back goes on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from click.testing import CliRunner
from onnx import TensorProto

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanBranch
from onnxprune.cli.main import main
from onnxprune.errors import UsageError
from onnxprune.graph.resized import KEY, Resizing, fitted, resized_of
from onnxprune.graph.view import Graph
from onnxprune.io.write import assemble
from onnxprune.passes import Pipeline, Prune
from onnxprune.pruning.branches import Branches
from onnxprune.pruning.masked import masked_original

MS = "com.microsoft"
WORDS, WIDTH, KV, SIZE = 11, 16, 4, 8


def normed(net: Net, x: str, heads: int) -> str:
    """Root mean square of every head, with one scale for all heads."""
    square = net.reduce("ReduceMean", net.op("Mul", x, x), [-1])
    root = net.op("Sqrt", net.op("Add", square, net.const(np.float32(1e-5))))
    return net.op("Mul", net.op("Div", x, root), net.weight(SIZE, scale=0.3, low=0.5))


def with_concat(net: Net, x: str, layer: int, *, norm: bool = False) -> str:
    """As many heads of keys and values as of queries; past and present joined by Concat."""
    q, k, v = (net.reshape(net.linear(x, WIDTH, KV * SIZE), 0, 0, KV, SIZE) for _ in range(3))
    if norm:
        q, k = (normed(net, part, KV) for part in (q, k))
    q, k, v = (net.transpose(part, 0, 2, 1, 3) for part in (q, k, v))
    for kind, new in (("key", k), ("value", v)):
        past = net.input(f"past.{layer}.{kind}", ["N", KV, "P", SIZE])
        net.nodes.append(onnx.helper.make_node("Concat", [past, new], [f"present.{layer}.{kind}"], axis=2))
    scores = net.op("Softmax", net.op("MatMul", q, net.transpose(f"present.{layer}.key", 0, 1, 3, 2)), axis=-1)
    joint = net.transpose(net.op("MatMul", scores, f"present.{layer}.value"), 0, 2, 1, 3)
    return net.linear(net.reshape(joint, 0, 0, KV * SIZE), KV * SIZE, WIDTH)


def with_groups(net: Net, x: str, layer: int, *lengths: str, norm: bool = False) -> str:
    """Two heads of queries for each one of keys and values, in GroupQueryAttention."""
    q, k, v = (net.linear(x, WIDTH, n * SIZE) for n in (2 * KV, KV, KV))
    if norm:
        parts = [normed(net, net.reshape(part, 0, 0, n, SIZE), n) for part, n in ((q, 2 * KV), (k, KV))]
        q, k = (net.reshape(part, 0, 0, n * SIZE) for part, n in zip(parts, (2 * KV, KV), strict=True))
    pasts = [net.input(f"past.{layer}.{kind}", ["N", KV, "P", SIZE]) for kind in ("key", "value")]
    inputs = [q, k, v, *pasts, *lengths]
    joint, *_ = net.op("GroupQueryAttention", *inputs, n=3, domain=MS, num_heads=2 * KV, kv_num_heads=KV)
    for o, kind in enumerate(("key", "value"), 1):
        net.nodes[-1].output[o] = f"present.{layer}.{kind}"
    return net.linear(joint, 2 * KV * SIZE, WIDTH)


@cache
def decoder(kind: str, norm: bool = False) -> onnx.ModelProto:
    """Two layers, each with a cache, and logits."""
    net = Net(18)
    x = net.op("Gather", net.weight(WORDS, WIDTH), net.input("ids", ["N", "S"], np.int64))
    if kind == "groups":
        mask = net.input("mask", ["N", "T"], np.int64)
        total = net.op("Cast", net.op("Gather", net.op("Shape", mask), net.const(1)), to=TensorProto.INT32)
        last = net.op("Sub", net.reduce("ReduceSum", mask, [1], 0), net.const(1))
        lengths = net.op("Cast", last, to=TensorProto.INT32), total
    else:
        lengths = ()
    for layer in range(2):
        x = net.op("Add", x, (with_groups if kind == "groups" else with_concat)(net, x, layer, *lengths, norm=norm))
        x = net.op("Add", x, net.linear(net.op("Relu", net.linear(x, WIDTH, 24)), 24, WIDTH))
    presents = [f"present.{layer}.{half}" for layer in range(2) for half in ("key", "value")]
    logits = net.linear(x, WIDTH, WORDS)
    shapes = {logits: ["N", "S", WORDS], **{name: ["N", KV, "T", SIZE] for name in presents}}
    return net.model(logits, *presents, check=kind != "groups", shapes=shapes)


def pasts_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [value for value in model.graph.input if value.name.startswith("past")]


def loop(model: onnx.ModelProto, steps: int = 4) -> list[np.ndarray]:
    """Logits of a greedy loop of two samples that starts from three words and an empty cache."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {p.name: [d.dim_value for d in p.type.tensor_type.shape.dim] for p in pasts_of(model)}
    feed: dict[str, Any] = {n: np.zeros((2, s[1], 0, s[3]), np.float32) for n, s in sizes.items()}
    feed["ids"] = np.array([[1, 5, 2], [3, 0, 7]])
    names, results, length = [o.name for o in session.get_outputs()], [], 0
    accepted = {i.name for i in session.get_inputs()}
    for _ in range(steps):
        length += feed["ids"].shape[1]
        feed["mask"] = np.ones((2, length), np.int64)
        values = dict(zip(names, session.run(None, {n: v for n, v in feed.items() if n in accepted}), strict=True))
        results.append(values[names[0]])
        feed |= {name: values[name.replace("past", "present")] for name in sizes}
        feed["ids"] = results[-1][:, -1:].argmax(-1)
    return results


@pytest.mark.parametrize(
    ("kind", "axis", "norm"),
    [("concat", "head_dim", False), ("groups", "heads", False), ("concat", "heads", True), ("groups", "heads", True)],
)
def test_a_loop_with_presents_fed_back_equals_that_of_the_masked_original(kind: str, axis: str, norm: bool) -> None:
    settings = {"ratio": 0.5, "criterion": "l2", "reshape_axis": axis, "latency": False}
    result = op.prune(decoder(kind, norm), cache_heads=True, **settings)
    assert result.report.exactness.passed and len(result.report.resized) == 8
    masked = assemble(*masked_original(result.final.analysis.table, result.final.removed))
    for step, (expected, actual) in enumerate(zip(loop(masked), loop(result.model), strict=True)):
        np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=f"step {step}")
    changed = {r.name: (r.before, r.after) for r in result.report.resized}
    after = ["N", KV // 2, "P", SIZE] if axis == "heads" else ["N", KV, "P", SIZE // 2]
    assert changed["past.0.key"] == (["N", KV, "P", SIZE], after)
    again = op.prune(decoder(kind, norm), plan=result.plan, latency=False, validate=False)
    assert again.model == result.model
    # By default, a cache keeps its size.
    frozen = op.prune(decoder(kind, norm), **{**settings, "validate": False})
    assert not frozen.report.resized and KEY not in {p.key for p in frozen.model.metadata_props}
    assert pasts_of(frozen.model) == pasts_of(decoder(kind, norm))


@cache
def pruned(path: Path | None = None) -> op.Result:
    data = [loop_call(seed) for seed in range(4)]
    model = decoder("concat") if path is None else path
    return op.prune(model, ratio=0.4, cache_heads=True, data=data, criterion="l2", latency=False)


def loop_call(seed: int) -> dict[str, np.ndarray]:
    """A call with a past of full size."""
    draw = np.random.default_rng(seed)
    pasts = {p.name: draw.normal(size=(16, KV, 3, SIZE)).astype(np.float32) for p in pasts_of(decoder("concat"))}
    return {"ids": draw.integers(0, WORDS, (16, 2)), **pasts}


def test_data_of_full_size_is_gathered_for_recovery_fidelity_and_comparison(tmp_path: Path) -> None:
    onnx.save(decoder("concat"), tmp_path / "model.onnx")
    result = pruned(tmp_path / "model.onnx")
    assert result.report.exactness.passed and result.report.recovery.mode == "full"
    assert result.report.fidelity is not None and {o.output for o in result.report.fidelity.outputs} >= {
        "present.0.key"
    }
    result.save(tmp_path / "small.onnx", plan=tmp_path / "plan.json")
    compared = op.compare(tmp_path / "model.onnx", tmp_path / "small.onnx", data=[loop_call(9)], latency=False)
    assert compared.fidelity is not None and min(o.cosine for o in compared.fidelity.outputs) > 0.5
    plan = Plan.load(tmp_path / "plan.json")
    for group in plan.groups:
        group.removed = None  # the slots decide
    again = op.prune(tmp_path / "model.onnx", plan=plan, latency=False)
    assert again.plan.groups == Plan.load(tmp_path / "plan.json").groups
    assert [tuple(r.after) for r in again.report.resized] == [tuple(r.after) for r in result.report.resized]
    report = json.loads(json.dumps(result.report.to_dict()))
    assert {r["name"] for r in report["resized"]} == {n for k in (0, 1) for h in ("key", "value") for n in (
        f"past.{k}.{h}", f"present.{k}.{h}")}  # fmt: skip
    assert "resized" in str(result)


def test_a_model_that_is_pruned_twice_takes_what_either_of_the_originals_took() -> None:
    twice = op.prune(pruned().model, ratio=0.3, cache_heads=True, criterion="l2", latency=False)
    assert twice.report.exactness.passed
    for original in (decoder("concat"), pruned().model):
        sizes = {p.name: [d.dim_value or 2 for d in p.type.tensor_type.shape.dim] for p in pasts_of(original)}
        feed = fitted(resized_of(twice.model), {n: np.zeros(s, np.float32) for n, s in sizes.items()})
        for p in pasts_of(twice.model):
            assert list(feed[p.name].shape) == [d.dim_value or 2 for d in p.type.tensor_type.shape.dim]


def test_inputs_and_outputs_that_are_named_lose_channels() -> None:
    net = Net(17)
    x = net.conv(net.input("x", ["N", 6, 4, 4]), 6, 8)
    y = net.conv(net.op("Relu", x), 8, 5, 1)
    model = net.model(y, shapes={y: ["N", 5, 4, 4]})
    result = op.prune(model, ratio=0.4, resize_io=["x", y], criterion="l2", latency=False)
    assert result.report.exactness.passed
    assert {r.name: r.after[1] for r in result.report.resized} == {"x": 4, y: 3}
    listed = {slot.tensor: slot.removed for group in result.plan.groups for slot in group.slots}
    feed = {"x": np.random.default_rng(0).random((2, 6, 4, 4), np.float32)}
    session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    kept = fitted(resized_of(result.model), feed)
    np.testing.assert_array_equal(kept["x"], np.delete(feed["x"], listed["x"], axis=1))
    assert session.run(None, kept)[0].shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize_io": ["past.0.kez"]}, "matches no input or output"),
        ({"resize_io": ["past.*"]}, "the other half of its cache"),
        ({"resize_io": "present.1.value"}, "'past.1.value', the other half"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        op.prune(decoder("concat"), **options)
    assert error.value.exit_code == 2


def test_a_model_without_a_cache_is_refused(tmp_path: Path) -> None:
    net = Net(17)
    last = net.conv(net.conv(net.input("x", ["N", 3, 4, 4]), 3, 8), 8, 4)
    onnx.save(net.model(last), tmp_path / "model.onnx")
    command = [str(tmp_path / "model.onnx"), "-o", str(tmp_path / "small.onnx"), "--cache-heads"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2 and "--cache-heads: the model has no cache" in done.output
    assert not (tmp_path / "small.onnx").exists()


def test_halves_that_differ_keep_their_sizes() -> None:
    """Present is not what was appended to past: the labels do not correspond, so nothing goes."""
    net = Net(18)
    x = net.linear(net.input("x", ["N", "S", 6]), 6, 8)
    past = net.input("past", ["N", "P", 8])
    joined = net.op("Concat", net.gather(past, list(range(7, -1, -1)), 2), x, axis=1)
    net.nodes.append(onnx.helper.make_node("Identity", [joined], ["present"]))
    y = net.linear(joined, 8, 3)
    model = net.model(y, "present", shapes={"present": ["N", "T", 8], y: ["N", "T", 3]})
    analysis = Analysis(model, resizing=Resizing(caches=True))
    removable = [g for g in analysis.units.groups if g.prunable]
    assert all(g.size == 4 for g in removable)  # a channel goes with its mirror image
    result = Pipeline([Prune("l2", 0.5)]).run(model, cache_heads=True)
    record = resized_of(result.model)
    past_kept, present_kept = (record[name][0].steps[0][1] for name in ("past", "present"))
    np.testing.assert_array_equal(past_kept, present_kept)
    assert model.graph.output[1].type.tensor_type.elem_type == TensorProto.FLOAT


CONFIG = {
    "hidden_size": WIDTH, "num_attention_heads": 2 * KV, "num_key_value_heads": KV, "head_dim": SIZE,
    "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": WORDS,
}  # fmt: skip


def test_a_configuration_gets_the_new_sizes_beside_the_output(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    onnx.save(decoder("groups"), tmp_path / "model.onnx")
    command = ["model.onnx", "-o", "small.onnx", "--cache-heads", "--reshape-axis", "heads", "--ratio", "0.5"]
    command += ["--criterion", "l2", "--no-validate", "--model-config", "config.json"]
    done = CliRunner().invoke(main, [str(tmp_path / word) if "." in word[1:-3] else word for word in command])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "small.config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    model = onnx.load(tmp_path / "small.onnx")
    heads = [a.i for n in model.graph.node for a in n.attribute if a.name in ("num_heads", "kv_num_heads")]
    assert heads == [KV, KV // 2] * 2
    expected = {"num_attention_heads": KV, "num_key_value_heads": KV // 2, "hidden_size": 8, "intermediate_size": 12}
    assert written == {**CONFIG, **expected}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["concat", "groups"])
def test_a_removed_layer_does_not_count_any_more(tmp_path: Path, kind: str, keep: bool) -> None:
    """A whole layer goes; where its cache stays, a program still has to make one for it, and counts it."""
    heads = 2 * KV if kind == "groups" else KV
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_attention_heads": heads}))
    model = decoder(kind)
    onnx.save(model, tmp_path / "m.onnx")
    analysis = Analysis(model)
    found = Branches(Graph.of(analysis.loaded.proto, analysis.loaded.weights), analysis.facts).find()
    plan = Plan(branches=[PlanBranch(branch.tensor, keep_cache=keep) for branch in found[2:]])
    (tmp_path / "plan.json").write_text(plan.text())
    command = ["m.onnx", "--apply-plan", "plan.json", "--no-validate", "--model-config", "config.json", "-o", "s.onnx"]
    done = CliRunner().invoke(main, [str(tmp_path / word) if "." in word[1:] else word for word in command])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "s.config.json").read_text())
    assert written == {**CONFIG, "num_attention_heads": heads, "num_hidden_layers": 2 if keep else 1}
    assert len(pasts_of(onnx.load(tmp_path / "s.onnx"))) == 2 * written["num_hidden_layers"]


def test_sizes_that_differ_between_layers_are_lists(tmp_path: Path) -> None:
    path = tmp_path / "genai_config.json"
    path.write_text(json.dumps({"model": {"decoder": {**CONFIG, "head_size": SIZE}}, "search": {"top_k": 1}}))
    settings = {"cache_heads": True, "reshape_axis": "heads", "criterion": "l2", "validate": False}
    groups = op.analyze(decoder("groups"), cache_heads=True).with_reshape_axis("heads").groups
    group = next(g for g in groups if any(s.tensor == "past.1.key" for s in g.slots) and g.prunable)
    result = op.prune(
        decoder("groups"), ratio=0.5, exclude=group.layers[:1], model_config=path, latency=False, **settings
    )
    assert result.model_config is not None
    sizes = result.model_config["model"]["decoder"]
    assert sizes["num_key_value_heads"] == [KV // 2, KV] and sizes["num_attention_heads"] == [KV, 2 * KV]
    assert result.model_config["search"] == {"top_k": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({**CONFIG, "num_key_value_heads": 3}), "is of another model: num_key_value_heads is 3"),
        (json.dumps({**CONFIG, "num_hidden_layers": 12}), "is of another model: num_hidden_layers is 12"),
        (json.dumps({**CONFIG, "hidden_size": 768}), "is of another model: hidden_size is 768"),
        ("{}", "states no number of heads"),
        ("{", "is not JSON"),
        (None, "No such configuration"),
    ],
)
def test_configurations_of_other_models_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        op.prune(decoder("groups"), cache_heads=True, model_config=path)


def test_few_heads_are_spared_at_small_ratios() -> None:
    """Of two heads of keys and values none goes at 0.3; heads of queries go in their place."""
    net = Net(18)
    x = net.input("x", ["N", "S", WIDTH])
    parts = [net.linear(x, WIDTH, n * SIZE) for n in (8, 2, 2)]
    pasts = [net.input(f"past.{kind}", ["N", 2, "P", SIZE]) for kind in ("key", "value")]
    mask = net.input("mask", ["N", "T"], np.int64)
    total = net.op("Cast", net.op("Gather", net.op("Shape", mask), net.const(1)), to=TensorProto.INT32)
    last = net.op("Cast", net.op("Sub", net.reduce("ReduceSum", mask, [1], 0), net.const(1)), to=TensorProto.INT32)
    inputs = [*parts, *pasts, last, total]
    joint, *presents = net.op("GroupQueryAttention", *inputs, n=3, domain=MS, num_heads=8, kv_num_heads=2)
    y = net.linear(joint, 8 * SIZE, 3)
    shapes = {y: ["N", "S", 3], **{name: ["N", 2, "T", SIZE] for name in presents}}
    model = net.model(y, *presents, check=False, shapes=shapes)
    heads = {}
    for axis, ratio in (("head_dim", 0.3), ("heads", 0.3), ("heads", 0.5)):
        settings = {"criterion": "l2", "latency": False, "validate": False, "round_to": 1}
        result = op.prune(model, ratio=ratio, reshape_axis=axis, cache_heads=True, **settings)
        (node,) = (n for n in result.model.graph.node if n.op_type == "GroupQueryAttention")
        attributes = {a.name: a.i for a in node.attribute}
        heads[axis, ratio] = [attributes["num_heads"], attributes["kv_num_heads"]]
    assert heads == {("head_dim", 0.3): [6, 2], ("heads", 0.3): [8, 2], ("heads", 0.5): [4, 1]}
