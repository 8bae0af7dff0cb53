"""Which layers are taken apart at which ranks, why others stay, and what bad input is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from onnx import numpy_helper
from planted_factors import draw, factorized, left, names_of, outputs, run

import onnxprune as op
from onnxprune.factorization.allocation import Candidate, allocate, min_total_cost


def net() -> onnx.ModelProto:
    """A stem, two 3x3 convolutions, a 1x1 and a head."""
    made = Net(17)
    x = made.op("Relu", made.conv(made.input("x", ["N", 3, 8, 8]), 3, 16))
    x = made.op("Relu", made.conv(x, 16, 24))
    x = made.op("Relu", made.conv(x, 24, 24))
    x = made.op("Relu", made.conv(x, 24, 32, 1))
    x = made.op("Flatten", made.op("GlobalAveragePool", x))
    return made.model(made.linear(x, 32, 10, gemm=True))


def shares(result: op.Result) -> dict[str, float]:
    """{layer: share of its MACs that is left}."""
    return {f.name: f.macs_after / f.macs_before for f in result.report.factorized if f.method}


def test_a_local_ratio_holds_in_every_layer() -> None:
    for method in ("svd", "tucker", "spatial-svd", "cp"):
        result = run(net(), method, ratio=0.4)
        assert shares(result) and all(share <= 0.6 for share in shares(result).values())
        assert all(f.error < 1 for f in result.report.factorized)


def test_a_global_ratio_holds_for_the_model() -> None:
    for method in ("auto", "tucker"):
        result = run(net(), method, ratio=0.4, scope="global", timed=False)
        totals = result.report.totals
        assert 0.5 * totals.macs_before < totals.macs_after <= 0.6 * totals.macs_before


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_a_ratio_counts_what_the_report_counts(ratio: float) -> None:
    """Products of queries and keys are no layers: they neither have to be saved, nor made up for by others."""
    model = Path(__file__).parents[2] / "models" / "attention.onnx"
    totals = op.factorize(model, ratio=ratio, timed=False, latency=False, validate=False).report.totals
    assert 1 - ratio - 0.01 < totals.macs_after / totals.macs_before <= 1 - ratio


def test_a_ratio_of_the_parameters() -> None:
    result = run(net(), "auto", ratio=0.4, cost="params", timed=False)
    totals = result.report.totals
    assert totals.params_after <= 0.62 * totals.params_before  # biases stay


def test_a_table_of_embeddings_is_taken_apart_for_its_size_alone() -> None:
    made = Net(17)
    rows = made.op("Gather", made.weight(64, 24, name="table"), made.input("x", ["N", 5], np.int64))
    model = made.model(made.linear(rows, 24, 24))
    assert "table/svd_core" in names_of(factorized(model, "svd", ratio=0.4, cost="params"))
    assert "table" in names_of(factorized(model, "svd", ratio=0.4))


def test_auto_loses_no_more_than_any_method_by_itself() -> None:
    feed = draw(net(), 64)
    lost = {}
    for method in ("auto", "svd", "tucker", "spatial-svd"):
        made = factorized(net(), method, ratio=0.4, scope="global", timed=False, data=feed)
        a, b = outputs(net(), feed)[0], outputs(made, feed)[0]
        lost[method] = float(np.square(a - b).sum())
    assert lost["auto"] <= 1.1 * min(lost.values())


def test_data_make_the_result_more_faithful() -> None:
    feed, other = draw(net(), 128), draw(net(), 64, seed=1)
    feed["x"][:, 1] *= 0.02
    other["x"][:, 1] *= 0.02
    for method in ("svd", "tucker", "spatial-svd"):
        plain, aware = (factorized(net(), method, ratio=0.5, data=d) for d in (None, feed))
        want = outputs(net(), other)[0]
        errors = [float(np.square(outputs(m, other)[0] - want).sum()) for m in (plain, aware)]
        assert errors[1] < errors[0]


def test_energy_and_vbmf() -> None:
    high, low = (run(net(), "tucker", energy=e).report.totals.macs_after for e in (0.9, 0.6))
    assert low < high
    made = net()
    for tensor in made.graph.initializer:  # three directions and a little noise
        value = numpy_helper.to_array(tensor)
        if value.ndim == 4 and value.shape[:2] == (24, 24):
            rng = np.random.default_rng(0)
            planted = np.einsum("or,rsab,is->oiab", rng.standard_normal((24, 3)), rng.standard_normal((3, 4, 3, 3)),
                                rng.standard_normal((24, 4)))  # fmt: skip
            planted += 0.1 * rng.standard_normal(planted.shape)
            tensor.CopyFrom(numpy_helper.from_array(planted.astype(np.float32), tensor.name))
    ranks = {f.name: f.ranks for f in run(made, "tucker", vbmf=0.0).report.factorized if f.method}
    assert [4, 3] in ranks.values()


def test_ranks_by_pattern_and_rounding() -> None:
    names = [n.name for n in net().graph.node if n.op_type == "Conv"]
    result = run(net(), "tucker", rank={names[1]: 8, names[2]: (6, 12)})
    assert {f.name: f.ranks for f in result.report.factorized if f.method} == {names[1]: [8, 8], names[2]: [6, 12]}
    assert left(result)[names[0]] == "no rank was given for this layer"
    rounded = run(net(), "tucker", ratio=0.3, round_to=4)
    assert all(not r % 4 for f in rounded.report.factorized for r in f.ranks)


def test_patterns_choose_layers() -> None:
    names = [n.name for n in net().graph.node if n.op_type == "Conv"]
    result = run(net(), "svd", include=[names[1], names[2]], exclude=[names[2]])
    assert list(shares(result)) == [names[1]]
    assert left(result)[names[2]].startswith("excluded")
    result = run(net(), "svd", ratio=0.2, layers={names[2]: 0.6})
    assert shares(result)[names[2]] <= 0.4 < shares(result)[names[1]] <= 0.8


def test_a_shared_weight_is_taken_apart_once() -> None:
    made = Net(17)
    weight = made.weight(12, 12, 3, 3, name="shared")
    x = made.conv(made.input("x", ["N", 3, 8, 8]), 3, 12)
    for _ in range(2):
        x = made.op("Relu", made.op("Conv", x, weight, pads=[1] * 4))
    model = made.model(x)
    result = factorized(model, "tucker", rank={"shared": [6, 6]})
    assert sum(n.startswith("shared/") for n in names_of(result)) == 3
    assert sum("shared/tucker_core" in n.input for n in result.graph.node) == 2
    assert len({n.name for n in result.graph.node}) == len(result.graph.node)


def test_what_stays_says_why() -> None:
    made = Net(17)
    x = made.input("x", ["N", 8])
    tied = made.weight(8, 8, name="tied")
    x = made.op("Relu", made.op("MatMul", x, tied))
    x = made.op("Relu", made.op("Gemm", x, tied, transB=1))
    x = made.op("MatMul", x, made.input("w", [8, 8]))
    codes = made.op("DequantizeLinear", made.const(np.arange(64).reshape(8, 8) % 7, np.int8), made.const(0.1))
    x = made.op("Relu", made.op("MatMul", x, made.op("Mul", codes, made.const(np.linspace(1, 2, 8)))))
    made.nodes[-1].name = "relu"
    model = made.model(made.op("MatMul", x, made.weight(8, 8, name="plain")))
    result = run(model, "svd", ratio=0.2)
    reasons = left(result)
    by_kind = {n.name: reasons.get(n.name, "") for n in model.graph.node if n.op_type in ("MatMul", "Gemm")}
    shared, other, dynamic, quantised, plain = by_kind.values()
    assert "read" in shared and "differently" in shared and other == shared
    assert not dynamic  # it has no weights
    assert "computed from other tensors" in quantised
    assert not plain and "plain/svd_core" in names_of(result.model)


def test_recurrent_states_stay_and_say_why() -> None:
    made = Net(17)
    x = made.input("x", [6, "N", 12])
    y = made.op("LSTM", x, made.weight(1, 64, 12), made.weight(1, 64, 16), n=2, hidden_size=16)[0]
    result = run(made.model(y), "svd", ratio=0.2)
    assert any(name.endswith("(state)") and "at every step" in why for name, why in left(result).items())


def test_weights_that_are_not_numbers() -> None:
    made = net()
    tensor = next(t for t in made.graph.initializer if list(t.dims) == [24, 24, 3, 3])
    value = numpy_helper.to_array(tensor).copy()
    value[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    result = run(made, "tucker", ratio=0.3)
    assert "its weight holds NaN or infinity" in left(result).values()
    assert any("NaN" in warning for warning in result.report.warnings)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "tuker"}, "Did you mean 'tucker'"),
    ({"method": "svd", "ratio": 1.5}, "out of range"),
    ({"method": "svd", "ratio": 0.3, "energy": 0.5}, "both set the ranks"),
    ({"method": "svd", "energy": 0}, "energy: 0 is not allowed"),
    ({"method": "svd", "vbmf": 2.0}, "vbmf: 2.0 is not allowed"),
    ({"method": "auto", "rank": 4}, "chooses the ranks"),
    ({"method": "svd", "rank": 4, "scope": "global"}, "chooses the ranks"),
    ({"method": "cp", "energy": 0.5}, "not order its components by energy"),
    ({"method": "svd", "rank": [4, 4]}, "one rank"),
    ({"method": "tucker", "rank": {"*": [0, 0]}}, "is not allowed"),
    ({"method": "svd", "rank": {"head*": 4}}, "matches no node"),
    ({"method": "svd", "rank": 4, "layers": {"*": 0.3}}, "layers gives ratios"),
    ({"method": "svd", "round_to": 0}, "round_to: 0 is not allowed"),
    ({"method": "svd", "scope": "glob"}, "scope: unknown value 'glob'"),
    ({"method": "svd", "cost": "flops"}, "cost: unknown value 'flops'"),
]


@pytest.mark.parametrize(("options", "says"), BAD)
def test_bad_options_say_what_is_allowed(options: dict[str, Any], says: str) -> None:
    with pytest.raises(op.UsageError) as caught:
        run(net(), **options)
    assert says in str(caught.value) and caught.value.hint


def test_a_rank_out_of_range_names_the_layer_and_what_is_allowed() -> None:
    name = next(n.name for n in net().graph.node if n.op_type == "Gemm")
    with pytest.raises(op.UsageError, match=r"rank 64 .*out of range") as caught:
        run(net(), "svd", rank={name: 64})
    assert "1..10" in caught.value.hint
    assert "larger than the largest" in left(run(net(), "svd", rank=12))[name]


def test_nothing_to_do_is_a_budget_that_is_not_met() -> None:
    made = Net(17)
    model = made.model(made.linear(made.input("x", ["N", 4]), 4, 4))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("tucker", {}, "one position"), ("svd", {"ratio": 0.9}, "no rank would save 90%"),
    ]  # fmt: skip
    for method, options, why in cases:
        with pytest.raises(op.BudgetError) as caught:
            run(model, method, **options)
        assert why in caught.value.hint
    with pytest.raises(op.BudgetError, match="at most"):
        run(model, "auto", ratio=0.9, timed=False)


def test_plans_replay_to_the_byte(tmp_path: Path) -> None:
    first = run(net(), "auto", ratio=0.3, timed=False)
    first.plan.save(tmp_path / "plan.json")
    again = run(net(), plan=tmp_path / "plan.json")
    assert again.model.SerializeToString() == first.model.SerializeToString()
    data = json.loads((tmp_path / "plan.json").read_text())
    entry = data["factorized"][0]
    assert set(entry) == {"layer", "method", "ranks", "error", "numbers"} and 0 < entry["error"] < 1


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda e: e.update(layer="nowhere"), "nowhere"),
        (lambda e: e.update(method="qr"), "no method 'qr'"),
        (lambda e: e.update(ranks=[900, 900]), "Allowed: 1"),
        (lambda e: e.update(ranks="4"), "a list was expected"),
    ],
)
def test_plans_that_do_not_fit(tmp_path: Path, edit: Callable[[dict[str, Any]], None], says: str) -> None:
    plan = tmp_path / "plan.json"
    run(net(), "tucker", ratio=0.3).plan.save(plan)
    data = json.loads(plan.read_text())
    edit(data["factorized"][0])
    plan.write_text(json.dumps(data))
    with pytest.raises(op.UsageError) as caught:
        run(net(), plan=plan)
    assert says in str(caught.value)


def test_the_allocation_is_near_the_best_of_all() -> None:
    """Against going through every combination."""
    from itertools import product

    rng = np.random.default_rng(0)
    for trial in range(20):
        wholes = [int(n) for n in rng.integers(50, 200, 4)]
        options = [
            [Candidate("svd", (k,), int(w * s), float(rng.uniform(0.5, 1.5) * (1 - s) ** 2))
             for k, s in enumerate(rng.uniform(0.1, 0.9, 5))] for w in wholes
        ]  # fmt: skip
        gains = [float(g) for g in rng.uniform(0.2, 3, 4)]
        budget = float(rng.uniform(0.3, 0.9)) * sum(wholes)
        best = None
        for combination in product(*([None, *own] for own in options)):
            cost = sum(w if c is None else c.cost for c, w in zip(combination, wholes, strict=True))
            loss = sum(0 if c is None else c.loss * g for c, g in zip(combination, gains, strict=True))
            if cost <= budget:
                best = loss if best is None else min(best, loss)
        taken = allocate(wholes, options, gains, budget)
        if taken is None:
            assert best is None and min_total_cost(wholes, options) > budget
            continue
        assert best is not None, trial
        cost = sum(w if c is None else c.cost for c, w in zip(taken, wholes, strict=True))
        loss = sum(0 if c is None else c.loss * g for c, g in zip(taken, gains, strict=True))
        assert cost <= budget and loss <= 1.02 * best + 1e-9


def test_a_model_that_runs_at_one_batch_size_only() -> None:
    """It declares a free batch and reshapes to one sample: every call then has one."""
    made = Net(17)
    x = made.op("Reshape", made.input("x", ["N", 3, 8, 8]), made.const([1, 3, 8, 8]))
    x = made.op("Relu", made.conv(x, 3, 16))
    model = made.model(made.op("Relu", made.conv(x, 16, 16)))
    stages = [op.passes.Factorize("auto", ratio=0.3, timed=False), op.passes.Validate(exact=False, timed=False)]
    result = op.Pipeline(stages).run(model, data={"x": draw(net(), 12)["x"]})
    assert result.report.fidelity is not None and result.report.fidelity.samples == 12


def test_cp_that_runs_away_becomes_tucker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every start ends in terms that cancel each other; the report says so, and the work stays what it was."""
    from onnxprune.factorization import decompositions

    expected = shares(run(net(), "cp", ratio=0.4))
    monkeypatch.setattr(decompositions, "least_squares", lambda *_: ([], float("inf")))
    result = run(net(), "cp", ratio=0.4)
    assert {f.method for f in result.report.factorized if f.method} == {"tucker"}
    assert all(share <= expected[name] + 1e-9 for name, share in shares(result).items())
    assert any("degenerate" in warning for warning in result.report.warnings)
    assert {f.method for f in result.plan.factorized} == {"tucker"}
