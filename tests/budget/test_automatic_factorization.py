"""Layers are factorized without a request where pruning alone damages a model, and only there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from click.testing import CliRunner

import onnxprune as op
from onnxprune.cli import main
from onnxprune.factorization.allocation import AUTO
from onnxprune.factorization.settings import Options, request_of
from onnxprune.operators.kernels import Geometry, Stage
from onnxprune.passes.factor_work import prepare_work
from onnxprune.pipeline import Context, Model, Result
from onnxprune.search.automatic_factorization import better_factorized, is_damaged
from onnxprune.search.evaluation import Evaluation, Quality
from onnxprune.search.mixture import Mixture
from onnxprune.search.problem import Evaluated

WIDE, RANK, TARGET = 768, 8, 0.08


@pytest.fixture(scope="module")
def thin() -> onnx.ModelProto:
    """Return a model whose layers have a low rank and need all of their channels."""
    net, rng = Net(17), np.random.default_rng(2)
    x = net.input("x", ["N", 8])
    x = net.op("Tanh", net.op("MatMul", x, net.const(rng.standard_normal((8, WIDE)).astype(np.float32))))
    for _ in range(2):
        rows = rng.standard_normal((WIDE, RANK)) @ rng.standard_normal((RANK, WIDE)) / np.sqrt(WIDE)
        x = net.op("Tanh", net.op("MatMul", x, net.const(rows.astype(np.float32))))
    return net.model(net.op("MatMul", x, net.const(rng.standard_normal((WIDE, 5)).astype(np.float32))))


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    """Return samples of that model."""
    return {"x": np.random.default_rng(0).standard_normal((192, 8)).astype(np.float32)}


def prune(model: onnx.ModelProto, **arguments: Any) -> Result:
    """Prune by a budget that pruning alone cannot meet unharmed."""
    return op.prune(model, **{"target": f"macs={TARGET}", "criterion": "l2", "latency": False, **arguments})


def points(result: Result) -> float:
    """Return the points of fidelity of a result."""
    assert result.report.fidelity is not None and result.report.fidelity.points is not None
    return result.report.fidelity.points


def test_a_damaged_model_is_factorized_by_default(thin: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> None:
    result, alone = prune(thin, data=inputs), prune(thin, data=inputs, factorize=False)
    assert result.plan.factorized and not alone.plan.factorized
    report, facts = result.report, result.report.budget
    assert facts is not None and not facts.can_factorize
    assert report.totals.macs_after <= TARGET * report.totals.macs_before
    assert report.exactness.passed and report.product is not None and report.product.passed
    (remark,) = [text for text in report.warnings if "layers are factorized" in text]
    assert "factorize=False" in remark
    assert points(alone) < 97 < points(result)

    again = op.prune(thin, plan=result.plan, data=inputs, latency=False)
    assert again.plan.factorized == result.plan.factorized
    assert again.report.totals.macs_after == report.totals.macs_after


@pytest.mark.parametrize("given", [{"recover": "none"}, {"effort": "quick"}, {"trials": 0}, {"data": None}])
def test_nothing_is_factorized_without_recovery_or_time(
    thin: onnx.ModelProto, inputs: dict[str, np.ndarray], given: dict[str, Any]
) -> None:
    result = prune(thin, **{"data": inputs, **given})
    facts = result.report.budget
    assert not result.plan.factorized and facts is not None and facts.can_factorize
    assert ("factorization of layers" in result.report.left_out) == ("effort" in given)


@pytest.mark.parametrize(("seconds", "trials"), [(45.0, 4), (60.0, 0)])
def test_costly_candidates_are_few_or_none(
    thin: onnx.ModelProto, inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, seconds: float, trials: int
) -> None:
    monkeypatch.setattr("onnxprune.search.budget._EACH", seconds)
    result = prune(thin, data=inputs)
    facts = result.report.budget
    assert facts is not None and bool(result.plan.factorized) == bool(trials) != facts.can_factorize
    names = [c.name for c in facts.candidates if c.trial and "layers" in c.name]
    assert bool(names) == bool(trials) and len(names) <= trials


def test_a_target_that_forbids_it_prunes_alone(thin: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> None:
    result = prune(thin, data=inputs, target=["macs=0.1", "peak-memory=0.9"])
    assert not result.plan.factorized


def test_what_fails_unasked_is_left_out(
    thin: onnx.ModelProto, inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[Evaluated]:
        raise op.errors.ModelError("no kernel for it")

    monkeypatch.setattr(Mixture, "trials", fail)
    result = prune(thin, data=inputs)
    assert not result.plan.factorized
    assert "factorization of layers: no kernel for it" in result.report.left_out
    with pytest.raises(op.errors.ModelError, match="no kernel"):
        prune(thin, data=inputs, factorize=True)


def test_the_command_can_forbid_it(thin: onnx.ModelProto, inputs: dict[str, np.ndarray], tmp_path: Path) -> None:
    onnx.save(thin, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **inputs)
    given = ["prune", str(tmp_path / "m.onnx"), "--target", f"macs={TARGET}", "--data", str(tmp_path / "x.npz")]
    given += ["--criterion", "l2", "-o", str(tmp_path / "s.onnx")]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0 and "--no-factorize" in done.stdout + done.stderr
    ops = [node.op_type for node in onnx.load(tmp_path / "s.onnx").graph.node]
    assert ops.count("MatMul") > 4
    done = CliRunner().invoke(main, [*given, "--no-factorize"])
    assert done.exit_code == 0
    assert [node.op_type for node in onnx.load(tmp_path / "s.onnx").graph.node].count("MatMul") == 4


def evaluated(fine: float, kept: float) -> Evaluated:
    """Return a candidate of that quality."""
    return None, Evaluation(None, (), Quality(kept, fine), 0, 0, 0)  # type: ignore[return-value,arg-type]


def test_a_choice_needs_a_twentieth_of_the_distance() -> None:
    pruned = evaluated(-0.10, 90.0)
    slightly, clearly = evaluated(-0.096, 91.0), evaluated(-0.094, 92.0)
    assert better_factorized(pruned, [slightly], None) == ([], "")
    assert better_factorized(pruned, [slightly, clearly], None)[0] == [clearly]
    metric = evaluated(0.6, 0.6)
    assert better_factorized(metric, [evaluated(0.61, 0.61)], 0.9) == ([], "")
    assert "0.67" in better_factorized(metric, [evaluated(0.67, 0.67)], 0.9)[1]


def test_damage_is_seen_by_points_by_the_metric_or_by_distance() -> None:
    assert is_damaged(evaluated(-0.1, 96.9), None) and not is_damaged(evaluated(-0.1, 97.0), None)
    assert is_damaged(evaluated(-0.1, math.nan), None) and not is_damaged(evaluated(-0.01, math.nan), None)
    assert is_damaged(evaluated(0.6, 0.6), 0.61) and not is_damaged(evaluated(0.6, 0.6), 0.6)


def test_work_counts_what_is_read_and_written() -> None:
    """A convolution with a stride from 4 to 8 channels, and its factors with 2 channels in between."""
    geometry = Geometry(3, before=(10, 10), after=(5, 5))
    whole = [Stage("whole", 1, 4, (3, 3), 8, (0, 1))]
    factors = [Stage("in", 1, 4, (3, 3), 2, (0, 1)), Stage("out", 1, 2, (1, 1), 8)]
    assert geometry.moved(whole) == 3 * (100 * 4 + 25 * 8)
    assert geometry.moved(factors) == 3 * (100 * 4 + 25 * 2 + 25 * 2 + 25 * 8)
    assert geometry.macs(factors) == 3 * 25 * (4 * 9 * 2 + 2 * 8)


def test_ranks_with_more_work_than_the_layer_are_told(thin: onnx.ModelProto) -> None:
    context = Context.of(thin)
    request = request_of("auto", Options(ratio=0.5, timed=False))
    work = prepare_work(context, Model.of(context.analysis), request, AUTO, replayed=None)
    (fits,) = [f for name, f in work.layer_fits.items() if name == "/MatMul_8"]
    lighter = {c.ranks[0]: fits.is_lighter(c) for c in fits.choices(("svd",), 1)}
    # Of 2 samples: 2 (WIDE^2 + 100 * 2 WIDE) + 100,000 against 2 (2 rank WIDE + 100 * 2 (WIDE + rank)) + 200,000
    assert lighter == {rank: 2 * (2 * rank * WIDE + 200 * rank) + 100_000 < 2 * WIDE * WIDE for rank in lighter}
    assert set(lighter.values()) == {True, False}
