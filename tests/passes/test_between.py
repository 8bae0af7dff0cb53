"""Trainings between steps: iterative pruning and sparsification, and what they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from test_regularize import DATA, net

import onnxprune as op


def zeros_of(model: onnx.ModelProto) -> int:
    weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) > 1]
    return sum(int((w == 0).sum()) for w in weights)


@pytest.mark.parametrize("criterion", ["gm", None])
def test_pruning_trains_between_its_steps(criterion: str | None) -> None:
    given: dict[str, Any] = {"data": DATA, "ratio": 0.5, "recover": "none", "latency": False, "criterion": criterion}
    result = op.prune(net(), steps=3, schedule="cube", finetune=20, **given)
    between = result.report.settings["trained_between"]
    assert [entry["steps"] for entry in between] == [5, 5] and result.report.finetuning.steps == 10
    assert result.report.exactness.passed
    once = op.prune(net(), **given)
    assert "trained_between" not in once.report.settings
    removed, expected = (sum(len(g.removed or ()) for g in r.plan.groups) for r in (result, once))
    assert abs(removed - expected) <= 2
    replayed = op.prune(net(), plan=result.plan, validate=False)
    shapes = [[list(t.dims) for t in r.model.graph.initializer] for r in (result, replayed)]
    assert shapes[0] == shapes[1]


def test_weights_then_dead_neurons_then_training() -> None:
    """Han et al., 2015, as one call: small weights go, then units that lost all of theirs, then the others learn."""
    result = op.sparsify(
        net(), criterion="magnitude", ratio=0.9, scope="global", include=["*"], steps=3, schedule="cube", data=DATA,
        finetune=20, recover="none", latency=False
    )  # fmt: skip
    assert [entry["steps"] for entry in result.report.settings["trained_between"]] == [5, 5]
    assert result.report.dead.removed > 0 and result.report.finetuning.steps == 10
    shares = [layer.zeros / layer.elements for layer in result.report.sparsified if layer.pattern]
    assert sum(shares) / len(shares) > 0.7
    assert result.report.totals.params_after < result.report.totals.params_before


@pytest.mark.parametrize("criterion", ["magnitude", "obs"])
@pytest.mark.parametrize(("progressive", "finer"), [("weights", (1, 1)), ("blocks", (2, 1))])
def test_progressive_masks_begin_blocks_and_complete_them(
    progressive: str, finer: tuple[int, int], criterion: str
) -> None:
    """Of three steps, two choose blocks and set half of each choice to 0; every step completes those before."""
    weights: list[dict[str, np.ndarray]] = []

    class Look(op.passes.Pass):
        def __call__(self, context: Any, model: Any) -> op.passes.PassResult:
            weights.append({n: w.read() for n, w in model.weights.items() if len(w.shape) == 4})
            return op.passes.PassResult(model, changed=False)

    given: dict[str, Any] = {"ratio": 0.5, "include": ["*"], "criterion": criterion, "steps": 3}
    sparse = op.passes.Sparsify("4x1", progressive=progressive, between=[Look(), op.passes.Finetune(2)], **given)
    result = op.Pipeline([sparse]).run(net(), data=DATA)
    assert result.report.settings["progressive"] == progressive
    weights.append({t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer})
    layers = [x for x in result.report.sparsified if x.pattern and x.weight in weights[0]]
    assert layers
    for layer in layers:
        one, two, last = (w[layer.weight] == 0 for w in weights)
        assert (one <= two).all() and (two <= last).all()
        assert last.sum() == round(layer.elements / 4 / 2) * 4
        assert abs(int(one.sum()) - layer.elements / 8) <= 4 and one.sum() < two.sum() < last.sum()
        blocks, parts = (z.reshape(-1, size, *z.shape[1:]).sum(axis=1) for z, size in ((last, 4), (one, finer[0])))
        assert set(np.unique(blocks)) == {0, 4} and set(np.unique(parts)) == {0, finer[0]}
        assert (one.reshape(-1, 4, *one.shape[1:]).sum(axis=1) % 4).any()  # blocks that are begun


@pytest.mark.parametrize(
    ("pattern", "steps", "message"),
    [("unstructured", 2, "needs blocks"), ("2:4", 2, "needs blocks"), ("4x1", 1, "needs 2 steps or more")],
)
def test_progressive_masks_need_blocks_and_steps(pattern: str, steps: int, message: str) -> None:
    with pytest.raises(op.UsageError, match=message):
        op.sparsify(net(), pattern=pattern, steps=steps, progressive="weights")


def test_zeros_of_early_steps_stay() -> None:
    kept: list[int] = []

    class Count(op.passes.Pass):
        def __call__(self, context: Any, model: Any) -> op.passes.PassResult:
            kept.append(sum(int((w.read() == 0).sum()) for w in model.weights.values() if len(w.shape) > 1))
            return op.passes.PassResult(model, changed=False)

    stages = [op.passes.Finetune(3), Count()]
    sparse = op.passes.Sparsify("4x1", ratio=0.6, include=["*"], criterion="magnitude", steps=3, between=stages)
    result = op.Pipeline([sparse, op.passes.Finetune(3)]).run(net(), data=DATA)
    assert 0 < kept[0] < kept[1] < zeros_of(result.model)
    assert np.isfinite(result.report.finetuning.losses).all()
