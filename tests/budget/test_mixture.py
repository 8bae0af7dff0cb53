"""Budgets that cut some groups and take some layers apart: what they cost, what they keep, and that plans replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.allocation.costs import Sizes, costs_of
from onnxprune.allocation.factorization import FactorizedCost, Part
from onnxprune.channels.analysis import Analysis
from onnxprune.errors import BudgetError, UsageError
from onnxprune.factorization.rewriting import Factorized
from onnxprune.factorization.settings import Options
from onnxprune.io.weights import Weight
from onnxprune.passes import factorize, joint_budget
from onnxprune.passes.prune import Prune
from onnxprune.pipeline import Context
from onnxprune.report.facts import Latency
from onnxprune.search.latency import Bench
from onnxprune.search.mixture import WEIGHED, Mixture
from onnxprune.search.problem import SearchProblem
from onnxprune.targets import parse

MODELS = Path(__file__).parents[2] / "models"
MODEL, DIGITS = MODELS / "residual.onnx", MODELS / "digits_calibration.npz"
WIDE = 96


def planted() -> onnx.ModelProto:
    """Three layers: one of low rank that needs all of its channels, one of full rank with channels that say nothing."""
    net = Net(17, seed=5)
    rng = np.random.default_rng(5)
    thin = rng.standard_normal((WIDE, 3)) @ rng.standard_normal((3, WIDE))
    wide = rng.standard_normal((WIDE, WIDE))
    wide[WIDE // 4 :] = 0.0
    x = net.input("x", ["N", 8])
    for rows in (rng.standard_normal((8, WIDE)), thin / 4, wide.T / 4, rng.standard_normal((WIDE, 5))):
        x = net.op("MatMul", x, net.const(rows.astype(np.float32)))
        x = x if rows.shape[1] == 5 else net.op("Tanh", x)
    return net.model(x)


def test_a_layer_taken_apart_costs_its_share() -> None:
    """At every count of every group, and in every kind that is counted."""
    analysis = Analysis(MODEL)
    sizes = Sizes(analysis, [g for g in analysis.units.groups if g.prunable])
    node = next(n for n in analysis.graph.steps if n.label == "/stages/stages.4/body/body.1/body.1.0/Conv")
    part = Part((node,), node.inputs[1], np.array([1.0, 0.0]), np.array([0.25, 1.0]), np.array([0.5, 1.0]))
    half = np.stack([sizes.steps, np.maximum(1, sizes.steps // 2)])
    for kind, share in (("macs", 0.25), ("params", 0.5), ("size", 0.5)):
        alone = costs_of(analysis, sizes, kind)
        both = FactorizedCost(alone, kind, sizes, [part])
        left_whole = both.rows(np.hstack([half, np.ones((2, 1), np.int64)]))
        assert np.array_equal(left_whole, alone.rows(half))
        saved = (left_whole - both.rows(np.hstack([half, np.zeros((2, 1), np.int64)])))[:, 0]
        shape = sizes.at(half)
        elements = np.prod(np.stack(shape(node.inputs[1])[:2]), axis=0) * 9
        each = {"macs": 2 * 2 * 2, "params": 1, "size": 4}[kind]
        assert saved == pytest.approx((1 - share) * elements * each)


def test_what_cuts_cannot_do_is_taken_apart_and_the_reverse() -> None:
    """The thin layer by its rank, the empty channels by a cut: together they lose nothing, alone either loses much."""
    model = planted()
    x = {"x": np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)}
    result = op.prune(model, target="macs=0.4", factorize=True, data=x, latency=False)
    facts = result.report.budget
    assert facts is not None
    found = {a.name: a for a in facts.answers}
    both = found["knapsack over groups and layers"]
    assert both.chosen and both.fine > -1e-6
    assert found["knapsack over scores"].fine < -1e-3 and found["uniform"].fine < -1e-3
    assert result.plan.groups and result.plan.factorized
    assert result.report.exactness.passed and result.report.product is not None and result.report.product.passed
    totals = result.report.totals
    assert totals.macs_after / totals.macs_before <= 0.4


@pytest.mark.parametrize("kind", ["macs", "params", "size"])
def test_targets_are_met_with_layers_apart(kind: str) -> None:
    result = op.prune(MODEL, target={kind: 0.5}, factorize=True, latency=False)
    facts, totals = result.report.budget, result.report.totals
    assert facts is not None and result.plan.factorized
    (target,) = facts.targets
    after = {"macs": totals.macs_after, "params": totals.params_after, "size": totals.bytes_after}[kind]
    assert after == target.after and 0.4 < target.after / target.before <= 0.5 * 1.02
    chosen = next(a for a in facts.answers if a.chosen)
    assert chosen.fine == max(a.fine for a in facts.answers)


def thin(layers: int, wide: int, rank: int) -> onnx.ModelProto:
    """Wide layers that any cut harms, and that say all they say at a low rank."""
    net, rng = Net(17), np.random.default_rng(2)
    x = net.input("x", [16, 8])
    x = net.op("Tanh", net.op("MatMul", x, net.const(rng.standard_normal((8, wide)).astype(np.float32))))
    for _ in range(layers):
        rows = rng.standard_normal((wide, rank)) @ rng.standard_normal((rank, wide)) / wide
        x = net.op("Tanh", net.op("MatMul", x, net.const(rows.astype(np.float32))))
    return net.model(net.op("MatMul", x, net.const(rng.standard_normal((wide, 5)).astype(np.float32))))


def elements(path: Path) -> dict[str, int]:
    """Elements of the weights by the node that reads them."""
    graph = onnx.load(path).graph
    sizes = {t.name: int(np.prod(t.dims)) for t in graph.initializer}
    return {n.name or n.output[0]: sum(sizes.get(i, 0) for i in n.input) for n in graph.node}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes by weights: a microsecond for a thousand, and ten for a run."""

    def time_models(_: Bench, paths: Sequence[Path], **__: object) -> np.ndarray:
        return np.array([1e-5 + 1e-9 * sum(elements(p).values()) for p in paths])

    def alone(graph: object, weights: dict[str, Weight], shape: object, item: Factorized, *_: object) -> Latency:
        before, after = (
            1e-6 * n for n in (weights[item.layer.weight].read().size, sum(f.array.size for f in item.factors))
        )
        return Latency(before, after, 0.0, 0.0, 1, 1)

    monkeypatch.setattr(Bench, "time_models", time_models)
    monkeypatch.setattr(Bench, "nodes", lambda _, path: {n: 1e-9 * k for n, k in elements(path).items() if k})
    monkeypatch.setattr(joint_budget, "layer_latency", alone)


@pytest.mark.usefixtures("counted")
def test_layers_are_taken_apart_for_time() -> None:
    """Two products with a few columns each take a fraction of the time of one with 96: that is measured, then used."""
    x, model = {"x": np.random.default_rng(0).standard_normal((128, 8)).astype(np.float32)}, thin(2, 96, 3)
    given = {"target": "latency=0.6", "latency_table": op.profile(model, seconds=0.1).table, "criterion": "l2"}
    result = op.prune(model, factorize=True, data=x, latency=False, recover="none", **given)
    facts = result.report.budget
    assert facts is not None and result.plan.factorized
    (target,) = facts.targets
    assert target.how == "measured" and target.after <= target.limit
    assert result.report.product is not None and result.report.product.passed
    chosen = next(a for a in facts.answers if a.chosen)
    assert chosen.fine > -1e-3 > max(a.fine for a in facts.answers if a.name in ("uniform", "knapsack over scores"))


@pytest.mark.usefixtures("counted")
def test_ranks_that_a_cut_leaves_no_room_for_end_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that cannot be taken apart behind a cut as they could before it: cuts alone are the answer then."""
    model = thin(2, 96, 3)
    table = op.profile(model, seconds=0.1).table
    monkeypatch.setattr(factorize, "choose_by_share", lambda *_: None)
    result = op.prune(model, target="latency=0.6", factorize=True, latency_table=table, criterion="l2", latency=False)
    assert result.plan.groups and not result.plan.factorized


@pytest.mark.usefixtures("counted")
def test_time_of_another_device_is_no_measure_of_new_layers(tmp_path: Path) -> None:
    found = op.profile(MODEL, seconds=0.1)
    found.table.device["processor"] = "another"
    found.save(tmp_path / "device.json")
    with pytest.raises(UsageError, match="of another device"):
        op.prune(MODEL, target="latency=0.6", factorize=True, latency_table=tmp_path / "device.json", latency=False)


def test_the_smallest_model_with_layers_apart() -> None:
    result = op.prune(MODEL, max_drop=10, factorize=True, data=DIGITS, samples=48, recover="bn", latency=False)
    facts = result.report.budget
    assert facts is not None and facts.points_before - facts.points_after <= 10
    assert result.report.totals.macs_after < 0.5 * result.report.totals.macs_before


def test_layers_that_are_left_out() -> None:
    left = ["/stages/stages.4/*"]
    result = op.prune(MODEL, target="macs=0.5", factorize=True, exclude=left, round_to=4, latency=False)
    assert result.plan.factorized
    assert not any(f.layer.startswith("/stages/stages.4/") for f in result.plan.factorized)
    assert all(rank % 4 == 0 for f in result.plan.factorized for rank in f.ranks)


def test_what_makes_no_sense_with_layers_apart() -> None:
    for arguments, message in (
        ({}, "no budget is given"),
        ({"target": ["macs=0.5", "peak-memory=0.5"]}, "does not support a target of peak-memory=0.5"),
    ):
        with pytest.raises(UsageError, match=message):
            op.prune(MODEL, factorize=True, **arguments)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="cannot be reached"):
        op.prune(MODEL, target="macs=0.001", factorize=True, latency=False)


def test_what_groups_and_layers_count_together_is_found_by_trial() -> None:
    """Weights of layers change what is taken apart, those of groups what is cut; targets hold, the best is chosen."""
    result = op.prune(
        MODEL, target="macs=0.4", factorize=True, data=DIGITS, samples=96, trials=6, criterion="l2", latency=False
    )
    facts, totals = result.report.budget, result.report.totals
    assert facts is not None
    found = {a.name: a for a in facts.answers}
    assert any("weighed by trial" in name for name in found)
    chosen = next(a for a in facts.answers if a.chosen)
    assert chosen.fine == max(a.fine for a in facts.answers)
    assert totals.macs_after / totals.macs_before <= 0.4 * 1.02
    assert result.report.exactness.passed
    product = result.report.product
    assert (product is not None and product.passed) == bool(result.plan.factorized)


def test_weights_decide_which_layers_are_taken_apart() -> None:
    """A layer whose errors count a thousandfold is left alone; one whose errors count for nothing is not."""
    context = Context.of(MODEL)
    problem = SearchProblem.of(context, Prune("l2", 0.5).selector(context, context.analysis), [parse("macs=0.5")])
    mixture = Mixture(context, problem, Options())
    space = mixture.space(problem)
    ones = np.ones(len(space.choices.options))
    plain = mixture.candidate(problem, mixture.rate(problem), ones)
    assert plain is not None and plain.factorize is not None and plain.factorize.gains == mixture.gains
    dear = ones.copy()
    dear[-1] = 1e3
    changed = mixture.candidate(problem, mixture.rate(problem), dear)
    assert changed is not None and changed.factorize is not None and changed.name == WEIGHED
    grown = {name for name, gain in (changed.factorize.gains or {}).items() if gain > 2 * mixture.gains[name]}
    assert len(grown) == 1
