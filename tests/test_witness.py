"""Where a model's outputs do not vary, tensors inside it do: the cut is compared there, and a wrong one is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import ValidationError
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.io.weights import ArrayWeight
from onnxprune.io.write import save
from onnxprune.passes import Prune, Validate
from onnxprune.pipeline import Context, Model, PassResult
from onnxprune.pruning.masked import Witnesses, masked_original
from onnxprune.runtime.compare import exactness
from onnxprune.runtime.inputs import synthetic

MODELS = Path(__file__).resolve().parents[1] / "models"

EXACT = Validate(faithful=False, timed=False)


def silent(last: Callable[[Net, str], str]) -> onnx.ModelProto:
    """Two convolutions whose result ``last`` makes the same for every input."""
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8))
    y = net.op("Tanh", net.conv(x, 8, 6))
    return net.model(last(net, net.conv(y, 6, 4)))


def zero(net: Net, y: str) -> str:
    return net.op("Relu", net.op("Sub", y, net.const(1e6)))


def multiplied(net: Net, y: str) -> str:
    return net.op("Mul", y, net.const(0.0))


def heads(net: Net, y: str) -> str:
    """Channels as a grid of heads on the way."""
    split = net.op("Reshape", y, net.const([0, 2, 2, -1]))
    return zero(net, net.op("Softmax", net.op("Transpose", split, perm=[0, 1, 3, 2]), axis=-1))


def chaotic(net: Net, y: str) -> str:
    """An output that the last bits of ``y`` decide, as those of a sigmoid far from 0 are decided by its rounding."""
    return net.op("Sin", net.op("Mul", y, net.const(3e5)))


@pytest.mark.parametrize("last", [zero, multiplied, heads])
def test_an_idle_output_is_replaced_by_what_varies_in_front_of_it(last: Callable[[Net, str], str]) -> None:
    report = op.Pipeline([Prune(ratio=0.5), EXACT]).run(silent(last)).report
    assert report.exactness.passed
    assert "did not vary on any synthetic sample; compared instead, before it" in report.exactness.note
    assert "proves nothing" not in report.exactness.note
    assert report.exactness.batches == [2, 3, 1]


def test_an_output_of_rounding_alone_is_replaced_by_what_is_in_front_of_it() -> None:
    net = Net(17)
    x = net.op("Tanh", net.linear(net.input("x", ["N", 300]), 300, 300))
    report = op.Pipeline([Prune(ratio=0.3), EXACT]).run(net.model(chaotic(net, net.linear(x, 300, 4)))).report
    assert report.exactness.passed and report.exactness.error < 1e-4
    assert "differed by no more than its own rounding" in report.exactness.note


@pytest.mark.parametrize("last", [zero, multiplied, heads, chaotic])
def test_a_wrong_cut_of_an_idle_model_is_found(last: Callable[[Net, str], str]) -> None:
    def spoil(context: Context, model: Model) -> PassResult:
        name, weight = next((n, w) for n, w in model.weights.items() if len(w.shape) == 4)
        return PassResult(model.with_weights({name: ArrayWeight(name, weight.read()[::-1].copy())}))

    with pytest.raises(ValidationError, match="not exact"):
        op.Pipeline([Prune(ratio=0.5), spoil, EXACT]).run(silent(last))


@pytest.mark.parametrize("threshold", [0.0, 8.0])
def test_other_inputs_are_tried_first(threshold: float) -> None:
    """An output of one element, and one that only loud inputs change: both are woken, nothing else is needed."""
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", [1, 3, 6, 6]), 3, 8))
    y = net.op("ReduceMax", net.conv(x, 8, 4), axes=[0, 1, 2, 3], keepdims=0)
    model = net.model(net.op("Relu", net.op("Sub", y, net.const(threshold))))
    report = op.Pipeline([Prune(ratio=0.5), EXACT]).run(model).report
    assert report.exactness.passed and not report.exactness.note


def test_a_lively_model_is_run_once_per_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxprune.runtime import compare

    monkeypatch.setattr(compare, "find_varying_feeds", None)
    monkeypatch.setattr(compare, "varying_outputs", None)
    report = op.Pipeline([Prune(ratio=0.5), EXACT]).run(silent(lambda net, y: y)).report
    assert report.exactness.passed and not report.exactness.note


def test_a_grid_loses_other_positions_in_every_row() -> None:
    """Survivors of heads are gathered row by row."""
    rng = np.random.default_rng(0)
    net = Net(17)
    x = net.input("x", ["N", 5, 16])
    q, k, v = (net.op("MatMul", x, net.const(rng.standard_normal((16, 16)))) for _ in range(3))
    rows = [net.op("Reshape", t, net.const([0, 0, 4, 4])) for t in (q, k, v)]
    q, k, v = (net.op("Transpose", t, perm=[0, 2, 1, 3]) for t in rows)
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    joined = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = net.op("MatMul", net.op("Reshape", joined, net.const([0, 0, 16])), net.const(rng.standard_normal((16, 8))))
    report = op.Pipeline([Prune(ratio=0.5), EXACT]).run(net.model(zero(net, y))).report
    assert report.exactness.passed and "compared instead, before it" in report.exactness.note


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_every_tensor_in_common_agrees_where_it_survives(path: Path, tmp_path: Path) -> None:
    """A stricter law than the one for outputs: no mistake can hide behind later layers."""
    context = Context.of(path)
    pruned = Prune(ratio=0.5)(context, Model.of(context.analysis)).model
    analysis, removed = pruned.analysis, pruned.removed
    assert removed is not None
    for known in analysis.facts.probes:
        masked = masked_original(analysis.table, removed, known)
        witnesses = Witnesses(analysis.table, removed, known, masked, pruned.parts)
        names = witnesses.upstream(analysis.graph.outputs)
        assert len(names) > 5
        reference, shrunk, _ = witnesses.pair(names)
        for model, file in ((reference, "masked.onnx"), (shrunk, "cut.onnx")):
            save(*model, tmp_path / file)
        feed = synthetic(
            input_specs(analysis.graph), known.inputs, bounds=integer_bounds(analysis.graph, analysis.facts)
        )
        facts = exactness(tmp_path / "masked.onnx", tmp_path / "cut.onnx", [feed])
        assert facts.passed, facts
