"""Budgets go by what cuts do to the outputs, where scores of single layers do not say it."""

from __future__ import annotations

import numpy as np
import onnx
from build import Net

import onnxprune as op
from onnxprune.allocation.selection import SHARES
from onnxprune.search.budget import measuring_effort, trials_of

WIDE, SEED = 24, 3


def unequal() -> onnx.ModelProto:
    """Two branches that are alike, but for a gain behind the second one which leaves little of it in the sum."""
    net = Net(17, seed=SEED)
    rng = np.random.default_rng(SEED)
    x = net.input("x", ["N", 12])
    ends = []
    for gain in (1.0, 0.02):
        h = net.op("Tanh", net.op("MatMul", x, net.const(rng.standard_normal((12, WIDE)).astype(np.float32))))
        h = net.op("MatMul", h, net.const(rng.standard_normal((WIDE, 6)).astype(np.float32)))
        ends.append(net.op("Mul", net.op("Tanh", h), net.const(np.float32(gain))))
    return net.model(net.op("Add", *ends))


def data(samples: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((samples, 12)).astype(np.float32)}


def test_the_branch_that_hardly_reaches_the_outputs_goes_first() -> None:
    result = op.prune(unequal(), target="macs=0.6", data=data(256), trials=0, latency=False)
    facts = result.report.budget
    assert facts is not None
    found = {a.name: a for a in facts.answers}
    drifts, scores = found["knapsack over output sensitivities"], found["knapsack over scores"]
    assert drifts.chosen and drifts.fine > 0.5 * scores.fine and scores.fine < -1e-3
    kept = sorted(w.dims[1] for w in result.model.graph.initializer if len(w.dims) == 2 and w.dims[0] == 12)
    assert kept[0] < WIDE // 2 < kept[1]


def test_too_few_samples_leave_scores_to_go_by() -> None:
    result = op.prune(unequal(), target="macs=0.6", data=data(2), trials=0, latency=False)
    facts = result.report.budget
    assert facts is not None and not any("sensitivities" in a.name for a in facts.answers)


def test_measured_scores_are_not_measured_again() -> None:
    result = op.prune(unequal(), target="macs=0.6", data=data(64), normalize="measured", trials=0, latency=False)
    facts = result.report.budget
    assert facts is not None and not any("sensitivities" in a.name for a in facts.answers)


def test_measuring_is_cut_short_for_large_models() -> None:
    """Fewer samples, then fewer sizes, then none; never more than so many samples."""
    assert measuring_effort(1e6, [64] * 10) == (SHARES, 64)
    shares, samples = measuring_effort(2e8, [64] * 40) or ((), 0)
    assert shares == SHARES and 16 <= samples < 64
    shares, samples = measuring_effort(4e9, [64] * 60) or ((), 0)
    assert 0 < len(shares) < len(SHARES) and samples >= 16
    assert measuring_effort(1e9, [64] * 5000) is None
    assert trials_of(0) > trials_of(1e8) > trials_of(1e9) == 0
    assert trials_of(1e9, samples=16) > trials_of(1e9, samples=32) > 0


def test_a_budget_says_what_multiples_of_kernels_cost() -> None:
    net = Net(17, seed=SEED)
    x = net.input("x", ["N", 3, 8, 8])
    for before, after in ((3, 16), (16, 32), (32, 16)):
        x = net.op("Relu", net.conv(x, before, after))
    model = net.model(net.linear(net.op("Flatten", net.op("GlobalAveragePool", x)), 16, 8, gemm=True))
    images = {"x": np.random.default_rng(0).standard_normal((128, 3, 8, 8)).astype(np.float32)}
    report = op.prune(model, target="macs=0.5", data=images, trials=1, device="avx512", latency=False).report
    (remark,) = (text for text in report.warnings if "multiples" in text)
    assert "round_to=1" in remark
    assert report.budget is not None and sum(answer.chosen for answer in report.budget.answers) == 1
