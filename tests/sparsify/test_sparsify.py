"""Sparse models end to end: zeros in the written file, through runtimes and quantisers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

import onnxprune as op
from onnxprune.passes.sparsity import measure_sparsity
from onnxprune.pipeline import PassResult
from onnxprune.sparsification.devices import advice
from onnxprune.sparsification.patterns import Pattern

MODELS = Path(__file__).resolve().parents[2] / "models"
DATA = MODELS / "digits_calibration.npz"
QUICK: dict[str, Any] = {"latency": False}
ALIVE: dict[str, Any] = {"latency": False, "remove_dead": False}


def images(net: Net, channels: int = 3) -> str:
    return net.input("x", ["N", channels, 6, 6])


def plain() -> onnx.ModelProto:
    """Conv, grouped Conv, depthwise, ConvTranspose, pooled into Gemm."""
    net = Net(17)
    y = net.op("Relu", net.conv(images(net), 3, 16))
    y = net.op("Relu", net.conv(y, 16, 16))
    y = net.op("Relu", net.conv(y, 16, 16, group=2))
    y = net.op("Relu", net.conv(y, 16, 16, group=16))
    y = net.op("Relu", net.op("ConvTranspose", y, net.weight(16, 8, 2, 2), strides=[2, 2]))
    y = net.conv(y, 8, 16)
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    return net.model(net.linear(y, 16, 4, gemm=True))


def sequence() -> onnx.ModelProto:
    """Embedding, LSTM, Einsum, MatMul."""
    net = Net(17)
    tokens = net.input("tokens", [5, "N"], np.int64)
    y = net.op("Gather", net.weight(20, 8), tokens)
    y, _, _ = net.op("LSTM", y, net.weight(1, 64, 8), net.weight(1, 64, 16), n=3, hidden_size=16)
    y = net.squeeze(y, [1])
    y = net.op("Einsum", y, net.weight(16, 24), equation="tnh,ho->tno")
    y = net.linear(net.op("Relu", y), 24, 16)
    return net.model(net.linear(net.op("Relu", y), 16, 3))


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def samples(shape: tuple[int, ...] = (64, 3, 6, 6)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def by_name(result: op.Result) -> dict[str, Any]:
    return {f"{layer.op}{k}": layer for k, layer in enumerate(result.report.sparsified)}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4x1"])
def test_every_operator_has_exactly_the_zeros_asked_for(criterion: str, pattern: str, tmp_path: Path) -> None:
    data = None if criterion == "magnitude" else samples()
    result = op.sparsify(plain(), pattern=pattern, criterion=criterion, data=data, **ALIVE)
    done = [layer for layer in result.report.sparsified if layer.pattern]
    assert [layer.op for layer in done] == ["Conv", "Conv", "ConvTranspose", "Conv"]
    assert all(layer.zeros == layer.elements // 2 for layer in done)
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in done)
    result.save(tmp_path / "m.onnx")
    written = measure_sparsity(op.analyze(tmp_path / "m.onnx"))
    assert [f.zeros for f in written if f.zeros] == [layer.zeros for layer in done]
    if pattern != "unstructured":
        assert {f.pattern for f in written if f.zeros} == {pattern}
    if pattern == "2:4":
        assert all(f.holds for f in written if f.expected) and sum(bool(f.expected) for f in written) == 4
        # The convolution's groups of four lie along the input channels, at every position of the kernel.
        zeros = arrays(onnx.load(tmp_path / "m.onnx"))[done[0].weight] == 0
        assert (zeros.reshape(16, 4, 4, 3, 3).sum(axis=2) == 2).all()
    ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])


def test_what_is_left_out_and_why() -> None:
    result = op.sparsify(plain(), **ALIVE)
    reasons = [layer.reason.split(":")[0].split(",")[0] for layer in result.report.sparsified if not layer.pattern]
    assert reasons == ["the first layer", "depthwise", "the last layer"]
    named = op.sparsify(plain(), include=["*"], **ALIVE).report.sparsified
    assert all(layer.zeros == round(layer.elements / 2) for layer in named)
    first = next(layer for layer in named if layer.op == "Conv")
    own = op.sparsify(plain(), layers={first.name: 0.25}, ratio=0.75, exclude=["*ConvTranspose*"], **ALIVE)
    assert [round(layer.zeros / layer.elements, 2) for layer in own.report.sparsified] == [
        0.25,
        0.75,
        0.75,
        0,
        0,
        0.75,
        0,
    ]


def test_recurrent_weights_embeddings_and_products() -> None:
    data = [{"tokens": np.random.default_rng(k).integers(0, 20, (5, 8))} for k in range(8)]
    result = op.sparsify(sequence(), pattern="2:4", data=data, **ALIVE)
    listed = [(layer.op, layer.pattern, layer.note != "") for layer in result.report.sparsified]
    expected = [("Gather", "", False), ("LSTM", "2:4", False), ("LSTM", "2:4", True), ("Einsum", "2:4", False)]
    assert listed[:4] == expected and listed[4][:2] == ("MatMul", "2:4") and listed[5][1] == ""
    recurrent = next(layer for layer in result.report.sparsified if "(state)" in layer.name)
    zeros = arrays(result.model)[recurrent.weight] == 0
    assert (zeros.reshape(1, 64, 4, 4).sum(axis=3) == 2).all()


def test_codes_become_their_zero_point() -> None:
    net = Net(17)
    operands = [
        net.const(net.rng.integers(0, 255, (16, 16, 3, 3)), np.uint8, "codes"),
        net.const(net.rng.uniform(0.01, 0.02, 16), np.float32, "scale"),
        net.const(net.rng.integers(110, 140, 16), np.uint8, "zero"),
    ]
    y = net.op("Relu", net.conv(images(net), 3, 16))
    y = net.op("Relu", net.op("Conv", y, net.op("DequantizeLinear", *operands, axis=0)))
    model = net.model(net.conv(y, 16, 4))
    result = op.sparsify(model, pattern="2:4", **ALIVE)
    (done,) = [layer for layer in result.report.sparsified if layer.pattern]
    before, after = arrays(model), arrays(result.model)
    zero = after["zero"].reshape(-1, 1, 1, 1)
    made = (after[done.weight] == zero) & (before[done.weight] != zero)
    assert done.zeros == done.elements // 2 == int((after[done.weight] == zero).sum())
    assert (after[done.weight] == before[done.weight])[~made].all()
    assert all((before[n] == after[n]).all() for n in before if n != done.weight)


def test_zeros_survive_the_optimiser_and_the_quantiser(tmp_path: Path) -> None:
    path = tmp_path / "sparse.onnx"
    result = op.sparsify(MODELS / "residual.onnx", pattern="2:4", latency=False)
    result.save(path)
    want = {layer.shape[1] * layer.shape[2]: layer.zeros for layer in result.report.sparsified if layer.pattern}
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    quantize_dynamic(path, tmp_path / "quantised.onnx", weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    for name in ("optimised.onnx", "quantised.onnx"):
        written = arrays(onnx.load(tmp_path / name)).values()
        sizes = {value.size: int((value == 0).sum()) for value in written if value.ndim > 1}
        assert all(sizes[size] == zeros for size, zeros in want.items())
    layers = measure_sparsity(op.analyze(tmp_path / "optimised.onnx"))
    assert all(f.holds for f in layers if f.expected) and any(f.expected for f in layers)


def test_codes_of_a_quantised_sparse_model_hold_the_pattern(tmp_path: Path) -> None:
    result = op.sparsify(sequence(), pattern="2:4", **ALIVE)
    result.save(tmp_path / "sparse.onnx")
    quantize_dynamic(tmp_path / "sparse.onnx", tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
    codes = [
        v for n, v in arrays(onnx.load(tmp_path / "int8.onnx")).items() if n.endswith("_quantized") and v.ndim == 2
    ]
    sparse = [v for v in codes if v.shape == (24, 16)]
    assert sparse and all((v.reshape(6, 4, 16) == 0).sum(axis=1).min() >= 2 for v in sparse)


@pytest.mark.parametrize("steps", [{"steps": 1}, {"steps": 3, "schedule": "cube"}])
def test_recovery_and_training_keep_zeros(steps: dict[str, Any]) -> None:
    before = op.sparsify(plain(), ratio=0.8, data=samples(), recover="none", **steps, **ALIVE).report
    result = op.sparsify(plain(), ratio=0.8, data=samples(), finetune=2, **steps, **ALIVE)
    assert result.report.fidelity.outputs[0].snr_db > before.fidelity.outputs[0].snr_db + 1
    assert sum(r.done for r in result.report.repairs) > 2
    assert result.report.finetuning.steps == (2 if steps["steps"] == 1 else 1)  # half of them are between the steps
    for one, other in zip(before.sparsified, result.report.sparsified, strict=True):
        assert one.zeros == other.zeros and (not one.pattern or one.zeros == round(0.8 * one.elements))


def test_global_scope_and_energy_differ_by_layer() -> None:
    for options in ({"scope": "global", "ratio": 0.6}, {"energy": 0.9}):
        layers = [x for x in op.sparsify(MODELS / "residual.onnx", **options, **ALIVE).report.sparsified if x.pattern]
        shares = [layer.zeros / layer.elements for layer in layers]
        assert max(shares) - min(shares) > 0.02
        if "ratio" in options:
            assert sum(x.zeros for x in layers) == round(0.6 * sum(x.elements for x in layers))
        else:
            assert all(layer.error <= 0.1 + 1e-9 for layer in layers)


@pytest.mark.parametrize("criterion", ["gradient", "snip", "snip-momentum", "taylor"])
def test_gradients_score_weights(criterion: str) -> None:
    result = op.sparsify(plain(), criterion=criterion, data=samples(), recover="none", **ALIVE)
    done = [layer for layer in result.report.sparsified if layer.pattern]
    assert len(done) == 4 and all(layer.zeros == layer.elements // 2 for layer in done)


def test_sparse_initializers(tmp_path: Path) -> None:
    dense = op.sparsify(MODELS / "residual.onnx", ratio=0.9, latency=False)
    sparse = op.sparsify(MODELS / "residual.onnx", ratio=0.9, storage="sparse", latency=False)
    sizes = [result.save(tmp_path / f"{k}.onnx") for k, result in enumerate((dense, sparse))]
    assert sizes[1] < 0.6 * sizes[0] and sparse.report.zeros.sparse_tensors > 8
    assert len(onnx.load(tmp_path / "1.onnx").graph.sparse_initializer) == sparse.report.zeros.sparse_tensors
    onnx.checker.check_model(tmp_path / "1.onnx")
    x = np.load(MODELS / "digits_test.npz")
    feed = {"input": x["input"] if "input" in x.files else x[x.files[0]]}
    sessions = [ort.InferenceSession(str(tmp_path / f"{k}.onnx"), providers=["CPUExecutionProvider"]) for k in (0, 1)]
    feed = {sessions[0].get_inputs()[0].name: next(iter(feed.values()))[:8].astype(np.float32)}
    one, other = (session.run(None, feed)[0] for session in sessions)
    assert (one == other).all()
    assert dense.report.zeros.deflated_bytes < 0.5 * dense.report.zeros.weight_bytes
    few = op.sparsify(MODELS / "residual.onnx", ratio=0.3, storage="sparse", **ALIVE)
    assert not few.report.zeros.sparse_tensors and any("stored dense" in w for w in few.report.warnings)


def test_a_pass_that_fills_zeros_is_found_out() -> None:
    def fill(context: op.passes.Context, model: op.passes.Model) -> PassResult:
        name = next(iter(model.locked))
        value = model.weights[name].read().copy()
        value[value == 0] = 1
        return PassResult(model.with_weights({name: op.ArrayWeight(name, value)}))

    stages = [op.passes.Sparsify("2:4"), fill, op.passes.StoreZeros()]
    with pytest.raises(op.ValidationError, match="set to 0 in pattern 2:4"):
        op.Pipeline(stages).run(plain())


def test_a_pipeline_of_a_cut_and_zeros() -> None:
    stages = [
        op.passes.Prune(ratio=0.5),
        op.passes.Sparsify("2:4"),
        op.passes.StoreZeros(),
        op.passes.Validate(timed=False),
    ]
    report = op.Pipeline(stages).run(MODELS / "residual.onnx").report
    assert report.exactness.passed and report.totals.params_after < 0.7 * report.totals.params_before
    assert [x.zeros * 2 for x in report.sparsified if x.pattern] == [x.elements for x in report.sparsified if x.pattern]


@pytest.mark.parametrize("data", [None, samples()])
def test_neurons_that_lose_all_of_their_weights_are_removed(data: Any) -> None:
    net = Net(17)
    y = net.op("Relu", net.linear(net.input("x", ["N", 16]), 16, 32))
    value = net.rng.normal(size=(32, 24))
    value[:, :4] *= 1e-3
    y = net.op("Relu", net.op("Add", net.op("MatMul", y, net.const(value)), net.weight(24)))
    y = net.op("Relu", net.linear(y, 24, 16))
    model = net.model(net.linear(y, 16, 4))
    data = None if data is None else data.reshape(64, -1)[:, :16]
    result = op.sparsify(model, ratio=0.5, criterion="magnitude", data=data, **QUICK)
    shapes = {name: value.shape for name, value in arrays(result.model).items()}
    first = next(layer for layer in result.report.sparsified if layer.pattern)
    assert shapes[first.weight] == (32, 20) and first.elements == 32 * 20
    assert result.report.totals.params_after < result.report.totals.params_before
    whole = op.sparsify(model, ratio=0.5, criterion="magnitude", **ALIVE).model
    feed = {"x": np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)}
    outputs = [ort.InferenceSession(m.SerializeToString()).run(None, feed)[0] for m in (whole, result.model)]
    if data is None:
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
    else:
        assert any(r.done for r in result.report.repairs) and not (outputs[0] == outputs[1]).all()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pattern": "4:2"}, "keeps more than there are"),
        ({"pattern": "4:4"}, "keeps everything"),
        ({"pattern": "0:4"}, "has a 0 in it"),
        ({"pattern": "channel"}, "which is pruning"),
        ({"pattern": "2;4"}, "Did you mean '2:4'"),
        ({"pattern": 4}, "unknown pattern 4"),
        ({"pattern": "2:5"}, "There are .input channels x outputs.: 16 x 16, 8 x 8, 16 x 8, 8 x 16"),
        ({"pattern": "5x1"}, "outputs in multiples of 5"),
        ({"pattern": "2:4", "ratio": 0.6}, "contradicts the pattern"),
        ({"pattern": "2:4", "layers": {"*": 0.3}}, "contradicts the pattern"),
        ({"pattern": "2:4", "energy": 0.9}, "has no meaning"),
        ({"pattern": "2:4", "scope": "global"}, "has no meaning"),
        ({"ratio": 0.5, "energy": 0.5}, "both set the number of zeros"),
        ({"layers": {"*": 0.5}, "energy": 0.5}, "sets the number of zeros"),
        ({"ratio": 1.0}, "out of range"),
        ({"criterion": "wanda"}, "needs inputs"),
        ({"criterion": "fisher"}, "unknown value"),
        ({"include": ["nothing"]}, "matches no node or weight"),
        ({"storage": "zip"}, "unknown value"),
        ({"labels": [1]}, "neither is given"),
        ({"data": "samples", "labels": [1], "criterion": "wanda"}, "labels"),
        ({"pattern_lock": False, "data": "samples"}, "fill the zeros"),
        ({"patern": "2:4"}, "Did you mean 'pattern'"),
    ],
)
def test_bad_input(options: dict[str, Any], told: str) -> None:
    options = {k: samples() if v == "samples" else v for k, v in options.items()}
    with pytest.raises(op.UsageError, match=told):
        op.sparsify(plain(), **options, **ALIVE)


def test_nothing_to_take() -> None:
    with pytest.raises(op.BudgetError, match="the first layer") as caught:
        net = Net(17)
        op.sparsify(net.model(net.conv(images(net), 3, 4)), **ALIVE)
    assert caught.value.exit_code == 5


def test_shared_and_packed_weights_are_left_out() -> None:
    net = Net(17)
    y = net.op("Relu", net.linear(net.input("x", ["N", 16]), 16, 16))
    shared = net.weight(16, 16)
    for _ in range(2):
        y = net.op("Relu", net.op("MatMul", y, shared))
    codes = net.const(net.rng.integers(-99, 99, (16, 16)), np.int8)
    c, s, z = net.op("DynamicQuantizeLinear", y, n=3)
    y = net.op("Mul", net.op("Cast", net.op("MatMulInteger", c, codes, z), to=TensorProto.FLOAT), s)
    y = net.op("Relu", net.linear(y, 16, 16))
    result = op.sparsify(net.model(net.linear(y, 16, 4)), **ALIVE)
    reasons = [layer.reason for layer in result.report.sparsified]
    assert sum("shared with another node" in reason for reason in reasons) == 2
    assert any("sparsify before quantising" in reason for reason in reasons)
    assert sum(bool(layer.pattern) for layer in result.report.sparsified) == 1


def test_training_or_recovery_that_would_break_a_pattern() -> None:
    sparse = op.sparsify(plain(), pattern="2:4", **ALIVE).model
    data: Any = {"data": samples(), "latency": False, "scope": "global"}
    with pytest.raises(op.UsageError, match=r"hold zeros \(2:4\), which finetune would fill"):
        op.prune(sparse, ratio=0.2, finetune=1, **data)
    with pytest.raises(op.UsageError, match="would fill"):
        op.factorize(sparse, ratio=0.2, finetune=1, **data)
    stages = [op.passes.Prune(ratio=0.2), op.passes.Recover()]
    free = op.Pipeline([op.passes.LockZeros(None), *stages]).run(sparse, data=data["data"])
    assert any("pattern_lock" in warning for warning in free.report.warnings)
    kept = op.prune(sparse, ratio=0.2, pattern_lock=True, finetune=1, include=["*"], **data)
    assert not any("pattern_lock" in warning for warning in kept.report.warnings)

    def zeros(result: op.Result) -> int:
        return sum(int((value == 0).sum()) for value in arrays(result.model).values() if value.ndim > 2)

    assert any(r.done for r in kept.report.repairs)
    cut = op.prune(sparse, ratio=0.2, recover="none", include=["*"], **data)
    assert zeros(kept) == zeros(cut) > 1000


@pytest.mark.parametrize(
    ("device", "pattern", "channels", "told"),
    [
        ("avx512", "2:4", 512, "no speed on avx512"),
        ("tensorrt", "2:4", 512, ""),
        ("tensorrt", "1:4", 512, ""),
        ("tensorrt", "2:4", 64, "from 256 input channels"),
        ("tensorrt", "unstructured", 512, "whose kernels take 2:4"),
        ("openvino", "unstructured", 64, ""),
        ("xnnpack", "4x1", 64, ""),
        ("coreml", "2:4", 64, ""),
        ("ethos-u", "2:4", 64, "lossless compression"),
        ("mine", "2:4", 64, "not known"),
    ],
)
def test_what_a_device_does_with_zeros(device: str, pattern: str, channels: int, told: str) -> None:
    why = advice(device, Pattern.of(pattern), channels)
    assert (told in why) if told else not why


def test_a_device_warns(tmp_path: Path) -> None:
    report = op.sparsify(plain(), pattern="2:4", device="hexagon", **ALIVE).report
    assert any("hexagon" in warning for warning in report.warnings) and report.zeros.device == "hexagon"
    assert "zeros     4 of 7 layers 2:4 by magnitude" in str(report) and "no speed on hexagon" in str(report)
    assert "bit mask" in str(op.sparsify(plain(), pattern="2:4", device="coreml", **ALIVE).report)
    with pytest.raises(op.UsageError, match="avx512"):
        op.sparsify(plain(), device="avx51", **ALIVE)


def test_a_few_sparse_layers_keep_their_zeros_in_a_training() -> None:
    """As the filters of a spectrogram in front of a network do."""
    net = Net(17)
    bands = np.kron(np.eye(4), np.ones((9, 1)))
    y = net.op("MatMul", net.input("x", ["N", 36]), net.const(bands, np.float32))
    y = net.op("Relu", net.linear(y, 4, 32))
    model = net.model(net.linear(net.op("Relu", net.linear(y, 32, 32)), 32, 4))
    result = op.prune(model, ratio=0.2, finetune=1, data=samples((64, 36)), latency=False)
    assert any("which stay 0" in warning for warning in result.report.warnings)
    front = next(value for value in arrays(result.model).values() if value.shape == bands.shape)
    assert not front[bands == 0].any()
