"""--normalize measured: groups lose what the outputs can spare, whatever their own scores say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import ModelError, UsageError
from onnxprune.importance.criteria import corrected
from onnxprune.importance.statistics import Maps
from onnxprune.passes import output_sensitivity

MODELS = Path(__file__).resolve().parents[2] / "models"


def two_branches(scale: float, *, coded: bool = False) -> onnx.ModelProto:
    """The second branch counts ``scale`` as much; its own channels look no different. ``coded``: gives 8-bit codes."""
    net = Net(17, seed=4)
    x = net.input("x", ["N", 6])
    first = net.linear(net.op("Relu", net.linear(x, 6, 16)), 16, 5)
    second = net.linear(net.op("Relu", net.linear(x, 6, 16)), 16, 5)
    y = net.op("Add", first, net.op("Mul", second, net.const(scale)))
    return net.model(net.op("QuantizeLinear", y, net.const(0.05), net.const(128, np.uint8)) if coded else y)


def data(samples: int = 80, width: int = 6) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((samples, width)).astype(np.float32)}


def lost(model: onnx.ModelProto, **options: Any) -> list[int]:
    settings = {"criterion": "wanda", "ratio": 0.4, "scope": "global", "data": data(), **options}
    result = op.prune(model, validate=False, **settings)
    found = {g.id: len(g.removed) for g in result.plan.groups}
    return [found.get(i, 0) for i in range(2)]


@pytest.mark.parametrize("criterion", ["wanda", "ziplm", "l2"])
def test_a_branch_that_hardly_counts_loses_most(criterion: str) -> None:
    first, second = lost(two_branches(0.05), criterion=criterion, normalize="measured")
    assert first + second >= 12 and second >= 3 * first
    assert lost(two_branches(20.0), criterion=criterion, normalize="measured")[0] > second // 2


def test_outputs_may_be_codes() -> None:
    first, second = lost(two_branches(0.05, coded=True), normalize="measured")
    assert first + second >= 12 and second >= 3 * first


@pytest.mark.parametrize("name", ["attention", "concat", "depthwise", "recurrent", "residual"])
@pytest.mark.parametrize("options", [{}, {"cost": "macs", "round_to": 2}])
def test_it_runs_on_every_kind_of_graph(name: str, options: dict[str, Any]) -> None:
    """Same data, same choice; the cut is exact."""
    given = {"normalize": "measured", "scope": "global", "data": MODELS / "digits_calibration.npz", "samples": 40}
    plans = []
    for _ in range(2):
        result = op.prune(MODELS / f"{name}.onnx", ratio=0.4, latency=False, recover="none", **given, **options)
        assert result.report.exactness.passed
        plans.append([g.removed for g in result.plan.groups])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": None}, "normalize='measured' needs data"),
        ({"steps": 2}, "normalize='measured' measures the original once"),
        ({"data": {"x": np.zeros((2, 6), np.float32)}}, "the data has too few"),
        ({"data": {"x": np.zeros((40, 6), np.float32)}}, "the outputs of this model do not vary"),
    ],
)
def test_what_cannot_be_measured_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lost(two_branches(1.0), criterion="l2", normalize="measured", **options)


def test_corrections_are_least_squares() -> None:
    """With many rows and a column that follows from others, nothing is lost; else it is numpy's solution."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((100_000, 4)) + 1.0
    rows = np.concatenate([rows, rows[:, :1] - 2.0 * rows[:, 1:2] + 3.0], axis=1)
    weights = rng.standard_normal((1, 5, 3))
    mean = rows.mean(axis=0)
    maps = Maps(
        100_000, {"gram": (rows.T @ rows / len(rows))[None], "column_mean": mean[None], "rows": np.asarray(1e5)}
    )
    gone = np.array([[False, False, False, False, True]])
    fitted, shift = corrected(maps, weights, gone, biased=True)
    assert (fitted[0, 4] == 0).all()
    wanted, found = rows @ weights[0], rows @ fitted[0] + shift[0]
    assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted - wanted.mean(axis=0))
    plain, _ = corrected(maps, weights, gone, biased=False)
    best = np.linalg.lstsq(rows[:, :4], wanted, rcond=None)[0]
    np.testing.assert_allclose(plain[0, :4], best, atol=0.02)


def test_cuts_that_do_not_run_leave_the_others_to_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original has to run; of a group of which no cut does, nothing is known but the mean of the others."""
    opened, real = [0], output_sensitivity.open_session

    def sessions(path: Any, **options: Any) -> Any:
        opened[0] += 1
        if 1 < opened[0] <= 5:  # the cuts of the first group
            raise ModelError("onnxruntime cannot run this")
        return real(path, **options)

    monkeypatch.setattr(output_sensitivity, "open_session", sessions)
    first, second = lost(two_branches(0.05), normalize="measured")
    assert opened[0] == 9 and first + second >= 12
    opened[0] = 1  # now the original comes among those that do not run
    with pytest.raises(ModelError):
        lost(two_branches(0.05), normalize="measured")
