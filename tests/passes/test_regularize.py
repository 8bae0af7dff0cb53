"""Training with penalties: units become 0 and go exactly, on a guard of held-out samples; what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op

DATA = {"x": np.random.default_rng(1).standard_normal((96, 3, 8, 8)).astype(np.float32)}


def net(*, norm: bool = True, scaled: bool = False) -> onnx.ModelProto:
    """A block of three convolutions and a head."""
    draw = Net(18)
    y = draw.conv(draw.input("x", ["N", 3, 8, 8]), 3, 8)
    y = draw.op("Relu", draw.norm(y, 8) if norm else y)
    y = draw.conv(y, 8, 12)
    y = draw.op("Mul", y, draw.const(np.linspace(0.5, 2, 12, dtype=np.float32).reshape(12, 1, 1))) if scaled else y
    flat = draw.op("Flatten", draw.op("GlobalAveragePool", draw.op("Relu", draw.norm(y, 12) if norm else y)))
    return draw.model(draw.op("Softmax", draw.linear(flat, 12, 5, gemm=True), axis=1))


def trained(model: onnx.ModelProto | None = None, **arguments: Any) -> op.Result:
    return op.train(model or net(), **{"data": DATA, "ratio": 0.4, "finetune": 50, "latency": False, **arguments})


@pytest.mark.parametrize(
    ("regularize", "arguments"),
    [
        ("group-lasso", {}),
        ("group-lasso", {"groups": "filter"}),
        ("group-lasso", {"groups": "channel"}),
        ("slimming", {}),
        ("l1-mask", {}),
    ],
)
def test_units_become_0_and_are_removed(regularize: str, arguments: dict[str, Any]) -> None:
    result = trained(regularize=regularize, **arguments)
    facts, dead = result.report.regularized, result.report.dead
    assert facts.kind == regularize and not facts.undone and not facts.stopped
    assert (facts.units, facts.zeros, dead.removed) == (20, 8, 8)
    assert facts.steps == 30 and result.report.finetuning.steps == 20
    assert facts.curve[0] == (0, pytest.approx(100)) and facts.curve[-1][1] == pytest.approx(100 - facts.after.points)
    assert facts.density < 1 and facts.before.points > 99.99 > facts.after.points - 1e-2
    assert sum(len(group.removed or ()) for group in result.plan.groups) == 8
    assert result.report.exactness.passed
    onnx.checker.check_model(result.model)


def test_positions_of_kernels_become_0_and_stay_so() -> None:
    result = trained(groups="shape", ratio=0.3)
    facts = result.report.regularized
    assert facts.units == 27 + 72 + 12 and facts.zeros == 33
    kernels = [onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer if len(t.dims) == 4]
    columns = np.concatenate([np.abs(kernel).sum(axis=0).ravel() for kernel in kernels])
    assert 0 < (columns == 0).sum() <= 33


def test_slimming_needs_scales() -> None:
    with pytest.raises(op.UsageError, match=r"slimming.* finds nothing to penalise: no unit has a scale"):
        trained(net(norm=False), regularize="slimming")
    facts = trained(net(norm=False, scaled=True), regularize="slimming", finetune=10).report.regularized
    assert (facts.units, facts.zeros) == (12, 5)  # one value per channel of a Mul is a scale


def test_a_fixed_strength_and_a_threshold_decide_by_themselves() -> None:
    few, many = (trained(ratio=None, strength=s, threshold=t, finetune=20) for s, t in ((0.01, 0.0), (1.0, 0.999)))
    assert few.report.regularized.undone and few.report.regularized.zeros == 0
    assert any("no unit became 0" in text for text in few.report.warnings)
    assert few.report.totals.params_after == few.report.totals.params_before
    assert many.report.regularized.zeros > 0 and many.report.totals.params_after < many.report.totals.params_before


def test_labels_and_units_that_stay() -> None:
    labels = np.arange(96) % 5
    result = trained(labels=labels, remove_dead=False, finetune=20)
    assert result.report.dead is None and result.report.regularized.zeros == 8
    assert len(result.report.regularized.by_labels) == 2
    assert result.report.totals.params_after == result.report.totals.params_before
    shapes = [list(t.dims) for t in result.model.graph.initializer]
    assert shapes == [list(t.dims) for t in net().graph.initializer]


def test_an_interrupt_keeps_the_best_and_a_repeated_run_goes_on(tmp_path: Path) -> None:
    def interrupt(stage: str, share: float) -> None:
        if stage == "regularize" and 0.5 <= share < 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole = trained(finetune=34)
    first = trained(finetune=34, cache=tmp_path, progress=interrupt)
    facts = first.report.regularized
    assert facts.stopped == "interrupted" and facts.steps < 20 and first.report.finetuning is None
    assert first.report.interrupted == f"the training ended after {facts.steps} steps"
    with pytest.raises(op.UsageError, match="interrupted on other data"):
        trained(finetune=34, cache=tmp_path, data={"x": DATA["x"][::-1]})
    second = trained(finetune=34, cache=tmp_path).report.regularized
    assert second.steps == 20 and second.curve == whole.report.regularized.curve
    assert not list(tmp_path.glob("regularize-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regularize": "lasso"}, "regularize: unknown value 'lasso'"),
        ({"groups": "unit", "regularize": "slim"}, "unknown value 'slim'"),
        ({"groups": "filter", "regularize": "slimming"}, "has no meaning with"),
        ({"ratio": 0}, "ratio: 0 is out of range"),
        ({"strength": 1.0}, "ratio and strength were both given"),
        ({"ratio": None, "strength": -1.0}, "strength: -1.0 is not allowed"),
        ({"threshold": 2}, "threshold: 2 is not allowed"),
        ({"finetune": "none"}, "leaves nothing to train"),
        ({"data": None}, "training needs inputs, but data is not given"),
        ({"data": {"x": DATA["x"][:40]}}, "needs 64 samples or more, and there are 40"),
        ({"data": {"x": np.ones((96, 3, 8, 8), np.float32)}}, "are the same"),
        ({"labels": np.zeros(10, np.int64)}, "10 labels for 96 samples"),
        ({"labels": np.full(96, 5)}, "class 5 is out of range"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(op.UsageError, match=message):
        trained(**arguments)


def test_a_model_without_units() -> None:
    draw = Net(18)
    model = draw.model(draw.conv(draw.input("x", ["N", 3, 8, 8]), 3, 8))
    with pytest.raises(op.ModelError, match="belongs to a unit that can be removed"):
        trained(model)
