"""Fine-tuning as a pass and as a call: what it gains, what it leaves alone, what it refuses."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.graph.probes import InputSpec, sample_axes
from onnxprune.io.read import load
from onnxprune.passes.training import Training
from onnxprune.passes.training_sizes import answers_of_sample, short_steps
from onnxprune.pipeline import Context, Model
from onnxprune.training.samples import TrainingSamples

DATA = {"x": np.random.default_rng(1).standard_normal((192, 3, 8, 8)).astype(np.float32)}


def net(opset: int = 18, *, constant: bool = False) -> onnx.ModelProto:
    """Two blocks and a head; the second half of the hidden channels says little."""
    draw = Net(opset)
    x = draw.input("x", ["N", 3, 8, 8])
    stem = draw.op("Relu", draw.norm(draw.conv(x, 3, 8), 8))
    inner = draw.op("Relu", draw.conv(stem, 8, 16))
    block = draw.op("Relu", draw.op("Add", draw.conv(inner, 16, 8), stem))
    flat = draw.op("Flatten", draw.op("GlobalAveragePool", draw.op("Relu", draw.conv(block, 8, 12))))
    model = draw.model(draw.op("Softmax", draw.linear(flat, 12, 5, gemm=True), axis=1))
    if constant:  # every weight in a node of its own
        nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
        del model.graph.initializer[:]
        for node in nodes:
            model.graph.node.insert(0, node)
    return model


def tuned(model: onnx.ModelProto | None = None, **arguments: Any) -> op.Result:
    given: dict[str, Any] = {
        "ratio": 0.4,
        "criterion": "l2",
        "data": DATA,
        "recover": "bias",
        "finetune": 60,
        "latency": False,
    }
    return op.prune(model or net(), **{**given, **arguments})


def test_it_comes_closer_to_the_original() -> None:
    result = tuned()
    facts = result.report.finetuning
    assert facts is not None and facts.steps == 60 and not facts.undone
    assert facts.after.points > facts.before.points
    assert facts.losses[1] < 0.7 * facts.losses[0]
    assert result.report.exactness.passed
    assert len(facts.curve) == 11 and facts.curve[0][0] == 0
    onnx.checker.check_model(result.model)


def test_the_graph_stays_as_it_is() -> None:
    with_training, without = tuned(), tuned(finetune=None)
    assert without.report.finetuning is None
    bare = []
    for model in (with_training.model, without.model):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for tensor in copy.graph.initializer:
            tensor.ClearField("raw_data")
        bare.append(copy)
    assert bare[0] == bare[1]


@pytest.mark.parametrize("opset", [11, 21])
def test_other_opsets(opset: int) -> None:
    result = tuned(net(opset), finetune=10)
    assert result.report.finetuning.trained > 8
    assert result.model.opset_import[0].version == opset


def test_weights_in_constant_nodes_are_trained() -> None:
    result = tuned(net(constant=True), finetune=30)
    facts = result.report.finetuning
    assert not facts.undone and facts.trained > 8
    assert {n.op_type for n in result.model.graph.node} >= {"Constant"}


def test_the_same_seed_gives_the_same_model() -> None:
    one, other = (tuned(finetune=10, threads=1).model.SerializeToString() for _ in range(2))
    assert one == other


def test_a_training_that_gains_next_to_nothing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pruned model is 0.003 points away: less says nothing of other samples."""
    monkeypatch.setattr("onnxprune.passes.training._LEAST_GAIN", 0.02)
    facts = tuned().report.finetuning
    assert facts.before.points > 99.98 and facts.undone
    assert min(distance for _, distance in facts.curve) < facts.curve[0][1]


def test_a_training_that_helps_nothing_is_undone() -> None:
    """A cut of nothing but dead channels is exact; no step can make it better."""
    model = net()
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [16, 8, 3, 3] or list(tensor.dims) == [16]:
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[8:] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    name = next(t.name for t in model.graph.initializer if list(t.dims) == [16, 8, 3, 3])
    arguments: dict[str, Any] = {"include": [name], "ratio": 0.5, "recover": "none", "finetune": 20}
    result = tuned(model, **arguments)
    facts = result.report.finetuning
    assert facts.undone or facts.after.points >= facts.before.points
    assert facts.after.points > 99.9


def test_labels_take_part_and_judge() -> None:
    model = net()
    session = ort.InferenceSession(model.SerializeToString())
    (scores,) = session.run(None, DATA)
    facts = tuned(model, labels=scores.argmax(1), finetune=20).report.finetuning
    assert facts.steps == 20
    before, after = facts.by_labels
    assert 0 <= before <= after <= 100
    assert facts.curve[0][1] == pytest.approx((200 - facts.before.points - before) / 2)
    values = tuned(model, labels=scores, finetune=5).report.finetuning  # the labels are the outputs themselves
    assert values.by_labels[1] <= 100


@pytest.mark.parametrize(("blocks", "counts"), [("yes", {4}), ("auto", {0, 4}), ("no", {0})])
def test_blocks_are_trained_one_after_the_other(blocks: str, counts: set[int]) -> None:
    facts = tuned(blocks=blocks, finetune=60).report.finetuning
    assert facts.blocks in counts and not facts.undone
    assert abs(facts.steps - 60) <= 3
    assert facts.after.points > facts.before.points
    assert min(value for _, value in facts.curve) < facts.curve[0][1]


def test_blocks_keep_zeros_and_take_labels() -> None:
    given: dict[str, Any] = {"ratio": 0.6, "include": ["*"], "data": DATA, "recover": "none", "latency": False}
    labels = np.arange(192) % 5
    result = op.sparsify(net(), labels=labels, finetune=24, blocks="yes", criterion="magnitude", **given)
    assert result.report.finetuning.blocks and len(result.report.finetuning.by_labels) == 2
    assert all(x.zeros == round(0.6 * x.elements) for x in result.report.sparsified if x.pattern)
    with pytest.raises(op.UsageError, match="is one of the whole model"):
        op.passes.Finetune(5, blocks="yes", loss=squares)


def squares(outputs: Any, targets: Any, labels: Any) -> Any:
    """Half the squared error of scores, over the number of samples."""
    (name,) = outputs
    error = outputs[name] - targets[name]
    return 0.5 * float((error**2).sum()) / len(error), {name: error / len(error)}


def test_a_loss_of_the_users_own() -> None:
    def run(loss: Any, steps: int = 30) -> Any:
        passes = [op.passes.Prune("l2", 0.4), op.passes.Finetune(steps, features=0, augment=False, loss=loss)]
        return op.Pipeline(passes).run(net(), data=DATA).report.finetuning

    facts = run(squares)
    assert facts.losses[1] < facts.losses[0] and facts.after.points > facts.before.points
    for wrong, message in (
        (lambda o, t, y: (float("nan"), {}), "loss returned nan"),
        (lambda o, t, y: (1.0, {n: v[:1] for n, v in o.items()}), "returned a gradient of shape"),
        (lambda o, t, y: (1.0, dict.fromkeys(o, "a")), "returned a gradient of shape"),
        (lambda o, t, y: (1.0, {"scores": 0.0}), "a gradient for 'scores', which is none of its outputs"),
        (lambda o, t, y: 1.0, "returned float, not its value and its gradients"),
        (3, "3 is no function"),
    ):
        with pytest.raises(op.UsageError, match=message):
            run(wrong, 2)


def test_a_training_that_was_interrupted_goes_on_with_the_same_data_alone(tmp_path: Path) -> None:
    original = net()
    pruned = op.prune(original, ratio=0.4, criterion="l2", recover="none", latency=False)

    def train(data: Any = DATA, **more: Any) -> Any:
        given = {"plan": pruned.plan, "data": data, "finetune": 20, "cache": tmp_path, **more}
        return op.finetune(original, pruned.model, **given).report.finetuning

    def interrupt(stage: str, share: float) -> None:
        if stage == "finetune" and 0.5 <= share < 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(cache=None)
    first = train(progress=interrupt)
    assert first.stopped == "interrupted" and first.steps < 20
    with pytest.raises(op.UsageError, match="interrupted on other data"):
        train({"x": DATA["x"][::-1]})
    second = train()
    assert second.steps == 20 and second.curve == whole.curve and not second.stopped
    assert not list(tmp_path.glob("finetune-*"))


@pytest.mark.parametrize(
    ("blocks", "draws"),
    [("yes", (4, 13)), ("auto", (3, 10, 19))],  # within a block and in front of one; in either trial and behind them
)
def test_an_interrupted_training_of_blocks_goes_on(
    blocks: str, draws: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Net(18)
    x = layers.op("Relu", layers.linear(layers.input("x", ["N", 6]), 6, 4))
    for _ in range(2):
        x = layers.op("Add", layers.linear(layers.op("Relu", layers.linear(x, 4, 8)), 8, 4), x)
    original, calls, stops = layers.model(layers.linear(x, 4, 3)), 0, list[int]()
    ends: list[int] = []
    data = {"x": np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)}
    pruned = op.prune(original, ratio=0.4, criterion="l2", recover="none", latency=False)
    draw = Training.draw

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, *arguments)

    def train(**more: Any) -> Any:
        nonlocal calls
        calls = 0
        given = {"plan": pruned.plan, "data": data, "finetune": 24, "blocks": blocks, **more}
        return op.finetune(original, pruned.model, **given)

    monkeypatch.setattr(Training, "draw", counted)
    once = train()
    steps = once.report.finetuning.steps
    for stop in draws:
        stops[:] = [stop]
        part = train(cache=tmp_path).report.finetuning
        assert part.stopped == "interrupted" and part.steps < steps
        with np.load(next(tmp_path.glob("finetune-*"))) as state:
            ends.append(int(state["blocks"]) if "blocks" in state else sum(n.endswith(".weights") for n in state) - 1)
    assert ends == ([0, 2] if blocks == "yes" else [0, 1, 2])
    stops.clear()
    again = train(cache=tmp_path)
    one, other = once.report.finetuning, again.report.finetuning
    assert other.steps == steps and not other.stopped and calls < steps
    assert other.curve == one.curve and other.losses == one.losses and other.blocks == one.blocks
    assert again.model.SerializeToString() == once.model.SerializeToString()
    assert not list(tmp_path.glob("finetune-*"))


def test_the_effort_of_the_run_bounds_it() -> None:
    result = tuned(finetune=True, effort="quick", samples=64)
    assert result.report.finetuning.steps == 267
    assert any("fine-tuning for more than 27%" in text for text in result.report.left_out)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(10, np.int64), "10 labels for 192 samples"),
        (np.full(192, 5), "class 5 is out of range"),
        (np.full(192, -1), "class -1 is out of range"),
        (np.zeros((192, 7), np.float32), "fits no output"),
        (np.array(["a"] * 192), "is not allowed"),
        ([[0, 1], [2]], "several lengths"),
        (np.zeros(192), "fits no output"),
    ],
)
def test_labels_that_do_not_fit(labels: Any, message: str) -> None:
    with pytest.raises(op.UsageError, match=message):
        tuned(labels=labels)


def test_few_samples_are_refused_unless_asked_for() -> None:
    few = {"x": DATA["x"][:40]}
    with pytest.raises(op.UsageError, match="needs 64 samples or more, and there are 40"):
        tuned(data=few)
    assert tuned(data=few, samples=40, finetune=5).report.finetuning.steps == 5


def test_models_without_a_weight_to_train_are_refused() -> None:
    model = net()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del model.graph.value_info[:]
    with pytest.raises(op.ModelError, match="holds float16, and float32 alone is trained"):
        tuned(model, data={"x": DATA["x"].astype(np.float16)}, recover="none", finetune=2)


def test_inputs_that_overflow_undo_it() -> None:
    facts = tuned(data={"x": DATA["x"] * np.float32(1e30)}, recover="none", finetune=3).report.finetuning
    assert facts.undone and facts.stopped == "the loss was no number"


@pytest.mark.parametrize("arguments", [{"rate": 0.0}, {"batch_size": 0}, {"features": -1}, {"loss": 3}])
def test_settings_of_the_pass_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(op.UsageError, match=f"{next(iter(arguments))}: "):
        op.passes.Finetune(2, **arguments)


def test_data_without_variety_are_refused() -> None:
    with pytest.raises(op.UsageError, match="are the same"):
        tuned(data={"x": np.ones((96, 3, 8, 8), np.float32)})


@pytest.mark.parametrize("effort", ["soon", "0s", 0, -3, "3 days", 1.5])
def test_efforts_that_are_none(effort: Any) -> None:
    with pytest.raises(op.UsageError, match="finetune"):
        tuned(finetune=effort)


def test_a_model_without_trainable_weights() -> None:
    model = net()
    for tensor in model.graph.initializer:
        assert tensor.data_type == onnx.TensorProto.FLOAT
    draw = Net(18)
    x = draw.input("x", ["N", 3, 8, 8])
    y = draw.conv(draw.op("Relu", draw.conv(x, 3, 8)), 8, 4)
    hard = draw.op("Hardmax", draw.op("Flatten", y), axis=1)
    kind = draw.op("Gather", hard, draw.const([0, 1]), axis=1)
    blocked = draw.model(kind)
    result = tuned(blocked, finetune=5)
    assert result.report.finetuning.trained > 0


def test_a_pair_is_trained_as_it_is() -> None:
    original = net()
    pruned = op.prune(original, ratio=0.4, recover="none", latency=False)
    result = op.finetune(original, pruned.model, plan=pruned.plan, data=DATA, finetune=20)
    facts = result.report.finetuning
    assert facts.steps == 20 and facts.after.points >= facts.before.points
    assert result.report.recovery.mode == "none"
    both = op.recover(original, pruned.model, plan=pruned.plan, data=DATA, finetune=10)
    assert both.report.finetuning.steps == 10 and both.report.recovery.mode == "full"


def test_zeros_of_a_pair_stay_or_are_asked_about() -> None:
    sparse = op.sparsify(net(), pattern="unstructured", ratio=0.6, include=["*"], latency=False)

    def train(**more: Any) -> onnx.ModelProto:
        result = op.finetune(net(), sparse.model, plan=sparse.plan, data=DATA, finetune=16, **more)
        assert not result.report.finetuning.undone
        return result.model

    with pytest.raises(op.UsageError, match="zeros"):
        train()
    zeros = [
        [int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in m.graph.initializer if len(t.dims) == 4]
        for m in (sparse.model, train(pattern_lock=True, blocks="yes"), train(pattern_lock=False, augment="none"))
    ]
    assert zeros[0] == zeros[1] and sum(zeros[2]) < sum(zeros[0])


def test_factorized_models() -> None:
    result = op.factorize(net(), ratio=0.4, data=DATA, method="svd", finetune=20, latency=False)
    assert result.report.finetuning.steps == 20


def test_a_model_with_a_fixed_batch() -> None:
    model = net()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 4
    facts = tuned(model, finetune=10).report.finetuning
    assert facts.steps == 10 and not facts.undone


def test_little_memory_means_small_calls() -> None:
    facts = tuned(finetune=10, memory_limit=1_000_000).report.finetuning
    assert facts.steps == 10 and facts.batch == 32


def test_in_a_pipeline() -> None:
    pipe = op.Pipeline([op.passes.Prune("l2", 0.4), op.passes.Finetune(10), op.passes.Exact(), op.passes.Validate()])
    result = pipe.run(net(), data=DATA)
    assert result.report.exactness.passed
    alone = op.Pipeline([op.passes.Finetune(5)]).run(net(), data=DATA)
    assert "nothing to fine-tune" in alone.report.warnings[0]


@pytest.mark.parametrize(
    ("samples", "arguments", "steps"),
    [
        (512, {}, 80),
        (512, {"augment": "none"}, 80),
        (512, {"finetune": False}, 0),
        (512, {"finetune": "none"}, 0),
        (512, {"effort": "quick"}, 0),
        (511, {}, 0),
        (512, {"recover": "full"}, 0),  # somebody who chooses a recovery gets that one
    ],
)
def test_with_many_samples_it_runs_by_itself(
    samples: int, arguments: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.passes.training_sizes._MOST_STEPS", 80)
    monkeypatch.setattr("onnxprune.passes.finetune._CLOSE", 0.0)
    monkeypatch.setattr("onnxprune.passes.finetune._PATIENCE", 1.0)
    data = {"x": np.random.default_rng(1).standard_normal((samples, 3, 8, 8)).astype(np.float32)}
    result = op.prune(net(), ratio=0.6, criterion="l2", data=data, latency=False, **arguments)
    facts = result.report.finetuning
    assert (0 if facts is None else facts.steps) == steps
    assert facts is None or arguments.get("augment") != "none" or not facts.augmentation
    left_out = "training towards the original" in result.report.left_out
    assert left_out == (arguments.get("effort") == "quick")
    if facts is not None:
        assert facts.after.points >= facts.before.points


def detector() -> onnx.ModelProto:
    """Boxes and scores at 64 places of an image, joined to one output."""
    build = Net(17, seed=3)
    h = build.op("Relu", build.conv(build.input("x", ["N", 3, 8, 8]), 3, 16))
    h = build.op("Relu", build.conv(h, 16, 16))
    maps = [build.conv(h, 16, 4), build.op("Sigmoid", build.conv(h, 16, 2))]
    flat = build.reshape(build.op("Concat", *maps, axis=1), 0, 6, 64)
    return build.model(build.transpose(flat, 0, 2, 1))


@pytest.mark.dense
@pytest.mark.parametrize(("samples", "steps"), [(16, 80), (15, 0)])
def test_samples_with_many_positions_count_for_more(samples: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors come with tens of images, of thousands of places each."""
    monkeypatch.setattr("onnxprune.passes.training_sizes._MOST_STEPS", 80)
    monkeypatch.setattr("onnxprune.passes.finetune._CLOSE", 0.0)
    data = {"x": np.random.default_rng(1).standard_normal((samples, 3, 8, 8)).astype(np.float32)}
    options: dict[str, Any] = {"criterion": "l2", "data": data, "batch_size": 2, "latency": False}
    facts = op.prune(detector(), ratio=0.6, **options).report.finetuning
    assert (facts is None and steps == 0) or (facts.steps == steps and facts.batch == 4)
    if not steps:
        with pytest.raises(op.UsageError, match="needs 16 samples or more, and there are 15"):
            op.prune(detector(), ratio=0.6, finetune=5, **options)


def coded(model: onnx.ModelProto, kind: Any = np.int8) -> onnx.ModelProto:
    """The same model with its kernels as codes, a scale per output, and DequantizeLinear."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in [t for t in result.graph.initializer if len(t.dims) == 4]:
        values, name = onnx.numpy_helper.to_array(tensor), tensor.name
        scale = (np.abs(values).max(axis=(1, 2, 3)) / 127).astype(np.float32)
        zero = np.full(len(scale), 128 if kind is np.uint8 else 0, kind)
        codes = (np.rint(values / scale[:, None, None, None]) + zero[:, None, None, None]).astype(kind)
        result.graph.initializer.remove(tensor)
        named = {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.zero": zero}
        result.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in named.items())
        operands = list(named)[: 3 if kind is np.uint8 else 2]
        result.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", operands, [name], axis=0))
    return result


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_weights_of_codes_are_trained_and_encoded_again(kind: Any) -> None:
    pipe = op.Pipeline([op.passes.Prune("l2", 0.75), op.passes.Finetune(60, augment=False, rate=2e-3)])
    result = pipe.run(coded(net(), kind), data=DATA)
    facts = result.report.finetuning
    assert not facts.undone and facts.after.points > facts.before.points, (facts.losses, facts.curve)
    assert facts.trained == 12 and not facts.frozen
    before = op.Pipeline([op.passes.Prune("l2", 0.75)]).run(coded(net(), kind)).model
    kernels = [
        {t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer if t.name.endswith(".codes")}
        for m in (before, result.model)
    ]
    assert all(v.dtype == kind for v in kernels[1].values()) and kernels[0].keys() == kernels[1].keys()
    assert all((kernels[0][n] != kernels[1][n]).any() for n in kernels[0])
    assert [n.op_type for n in result.model.graph.node] == [n.op_type for n in before.graph.node]


def test_an_automatic_training_says_that_the_data_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.passes.training_sizes._MOST_STEPS", 80)
    monkeypatch.setattr("onnxprune.passes.finetune._CLOSE", 0.0)
    data = np.random.default_rng(1).standard_normal((512, 3, 8, 8)).astype(np.float32)

    def interrupt(stage: str, share: float) -> None:
        if stage == "finetune" and 0.2 <= share < 1:
            os.kill(os.getpid(), signal.SIGINT)

    given: dict[str, Any] = {"ratio": 0.6, "criterion": "l2", "latency": False, "cache": tmp_path, "plan": None}
    first = op.prune(net(), data={"x": data}, progress=interrupt, **given)
    assert first.report.finetuning.stopped == "interrupted"
    path = next(tmp_path.glob("finetune-*"))
    kept = dict(np.load(path))
    np.savez(path, **{**kept, "data": np.asarray("others")})
    again = op.prune(net(), data={"x": data}, **given)
    assert again.report.finetuning is None
    assert any("interrupted on other data" in text for text in again.report.warnings)


@pytest.mark.parametrize(
    ("augment", "names"), [("auto", "shifts and reflections"), ("flip", "reflections"), ("none", "")]
)
def test_augmentation_is_a_choice(augment: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.training.augment._INDIFFERENT", -1.0)
    monkeypatch.setattr("onnxprune.training.augment._LEAST", 8)
    assert tuned(augment=augment, finetune=2).report.finetuning.augmentation == names
    with pytest.raises(op.UsageError, match="augment: unknown value 'rotate'"):
        tuned(augment="rotate", finetune=2)


def numbered(layers: int, calls: int, each: int = 2) -> list[dict[str, Any]]:
    """Calls in which every number says which sample it belongs to; states have their samples along the second axis."""
    feeds = []
    for call in range(calls):
        numbers = np.arange(call * each, call * each + each, dtype=np.float32)
        state = np.stack([numbers + 1000 * layer for layer in range(layers)])[:, :, None].repeat(4, 2)
        feeds.append({"x": numbers[:, None].repeat(3, 1), "h": state, "rate": np.array(16000)})
    return feeds


RATE = InputSpec("rate", np.dtype(np.int64), (), scalar=True)


@pytest.mark.parametrize(("lead", "batch"), [(2, "N"), (2, None), (2, 2)])
def test_states_go_with_their_samples(lead: int, batch: Any) -> None:
    kind, feeds = np.dtype(np.float32), numbered(2, 12)
    axes = sample_axes([InputSpec("x", kind, (batch, 3)), InputSpec("h", kind, (lead, batch, 4)), RATE])
    assert axes["h"] == (None if batch == 2 else 1) and axes["x"] == 0 and axes["rate"] is None
    samples = TrainingSamples(feeds, 4, np.arange(24), 0, axes)
    every = []
    for number in range(6 if batch != 2 else 12):  # with a fixed batch, calls are drawn as they are
        feed, labels = samples.draw(number)
        assert (feed["x"] == labels[:, None]).all() and feed["rate"] == 16000
        assert (feed["h"][0] == labels[:, None]).all() and (feed["h"][1] == labels[:, None] + 1000).all()
        every += labels.tolist()
    assert sorted(every) == list(range(24)) != every
    for feed in feeds:
        feed["h"] = feeds[0]["h"]  # the same in all: samples are drawn one by one beside it
    one, two = (TrainingSamples(feeds, 2, None, 0, axes).draw(k)[0] for k in range(2))
    assert batch != 2 or ((one["h"] == feeds[0]["h"]).all() and one["x"][0, 0] // 2 != one["x"][1, 0] // 2)
    assert one["h"].shape == two["h"].shape == (2, 2, 4)


def test_samples_of_the_commonest_size_are_drawn() -> None:
    short = [{"x": np.full((4, 5), k, np.float32), "y": np.full((4, 2), k)} for k in range(3)]
    long = [{"x": np.full((4, 7), 10 + k, np.float32), "y": np.full((4, 2), 10 + k)} for k in range(4)]
    samples = TrainingSamples(
        [*short, *long, {n: v[:2] for n, v in long[0].items()}], 6, np.repeat(np.arange(8), 4)[:30], 0
    )
    assert samples.count == 18 and samples.size == 6
    drawn = [samples.draw(k) for k in range(3)]
    assert all(feed["x"].shape == (6, 7) and (feed["x"][:, 0] == feed["y"][:, 1]).all() for feed, _ in drawn)
    assert sorted(np.concatenate([labels for _, labels in drawn])) == [3] * 4 + [4] * 4 + [5] * 4 + [6] * 4 + [7] * 2
    beside = samples.beside([*short, long[1]], None)
    assert beside.count == 4 and (beside.draw(0)[0]["x"] == 11).all()
    assert samples.beside(short, None) is samples


def test_a_recurrent_net_with_as_many_layers_as_samples_in_a_call() -> None:
    draw, size = Net(18), 4
    x, h = draw.input("x", ["N", 5, 3]), draw.input("h", [2, "N", size])
    y = draw.transpose(draw.op("Relu", draw.linear(x, 3, 8)), 1, 0, 2)
    for k, width in enumerate((8, size)):
        state = draw.slice(h, k, k + 1, 0)
        weights = [draw.weight(1, 3 * size, width), draw.weight(1, 3 * size, size), draw.weight(1, 6 * size)]
        y = draw.op(
            "Squeeze", draw.op("GRU", y, *weights, "", state, n=2, hidden_size=size)[0], draw.const(np.array([1]))
        )
    model = draw.model(draw.linear(draw.op("ReduceMean", y, draw.const(np.array([0])), keepdims=0), size, 3))
    rng = np.random.default_rng(0)
    data = {"x": rng.standard_normal((64, 5, 3)), "h": rng.standard_normal((2, 64, size))}
    data = {name: value.astype(np.float32) for name, value in data.items()}
    analysis = Analysis(load(model))
    assert answers_of_sample(analysis, data) == answers_of_sample(analysis, {"x": data["x"][:1], "h": data["h"][:, :1]})
    facts = tuned(model, data=data, batch_size=2, recover="none", finetune=4).report.finetuning
    assert facts.steps == 4 and facts.samples == 56 and np.isfinite(facts.losses).all()


def test_inputs_of_many_sizes() -> None:
    draw = Net(18)
    y = draw.op("Relu", draw.linear(draw.input("x", ["N", "S", 6]), 6, 8))
    model = draw.model(draw.linear(y, 8, 3))
    rng = np.random.default_rng(0)
    sizes = [3] * 40 + [4] * 12 + [5] * 12

    def run(sizes: list[int]) -> Any:
        data = [{"x": rng.standard_normal((2, n, 6)).astype(np.float32)} for n in sizes]
        return tuned(model, data=data, batch_size=2, recover="none", finetune=3).report

    report = run(sizes)
    assert report.finetuning.samples < 112 and report.finetuning.samples >= 56
    assert any("samples have other sizes than most, and were not trained on" in text for text in report.warnings)
    with pytest.raises(op.UsageError, match="trains on inputs of one size"):
        run([3, 4, 5, 6, 7, 8, 9, 10] * 8)


def test_a_net_of_large_tensors_gets_fewer_steps() -> None:
    """Twenty activations of a layer of few multiply-accumulates take longer than it does."""

    def steps(activations: int, channels: int) -> int:
        one = Net(17)
        y = one.conv(one.input("x", ["N", 2, 256, 256]), 2, channels)
        for _ in range(activations):
            y = one.op("Relu", y)
        context = Context.of(one.model(one.op("GlobalAveragePool", one.conv(y, channels, 2))))
        context = replace(context, effort=replace(context.effort, training=2e11))
        return short_steps(context, Model.of(context.analysis))

    assert steps(0, 16) == steps(1, 16) == int(2e11 / (3 * 32 * 256 * 256 * 2 * 9 * 2 * 16))
    elements = 256 * 256 * (16 * 21 + 2) + 2
    assert steps(20, 16) == int(2e11 / (3 * 32 * 12 * elements)) > 1
