"""What cutting each group alone does: measured end to end, cached, the same in parallel, and used by budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib.parallel import ThreadingBackend

import onnxprune as op
from onnxprune.allocation.knapsack import GroupCurve, Sensitivity, by_curves, by_scores
from onnxprune.allocation.ranked import RankedGroup
from onnxprune.errors import UsageError
from onnxprune.search import budget
from onnxprune.search.evaluation import evaluate

MODELS = Path(__file__).parents[2] / "models"
DIGITS = MODELS / "digits_calibration.npz"


def measured(name: str = "recurrent", **options: Any) -> Sensitivity:
    options = {"data": DIGITS, "samples": 128, "ratios": (0.25, 0.75), "recover": "bn", **options}
    return op.sensitivity(MODELS / f"{name}.onnx", **options)


def test_every_group_is_cut_alone(tmp_path: Path) -> None:
    found = measured(cache=tmp_path)
    analysis = op.analyze(MODELS / "recurrent.onnx")
    groups = {g.id: g for g in analysis.groups if g.prunable}
    assert {c.group for c in found.curves} == groups.keys()
    for curve in found.curves:
        assert curve.units == groups[curve.group].size and curve.name == groups[curve.group].name
        assert curve.shares == pytest.approx([0.25, 0.75], abs=0.02)
        assert all(0 <= n <= 1 for n in curve.noise) and curve.noise[0] < curve.noise[1]
        assert all(0 <= p <= 100 for p in curve.points)
    assert found.original == 100 and found.what == "points of fidelity"


def test_a_point_is_what_a_cut_of_that_group_alone_does(tmp_path: Path) -> None:
    found = measured(cache=tmp_path, recover="none", criterion="l2", ratios=(0.5,))
    curve = found.curves[0]
    analysis = op.analyze(MODELS / "recurrent.onnx")
    names = analysis.names_of(analysis.units.groups[curve.group])
    others = [n for g in analysis.units.groups if g.id != curve.group for n in analysis.names_of(g)]
    alone = [n for n in names if n not in others]
    report = op.prune(
        MODELS / "recurrent.onnx", ratio=0.5, include=alone, data=DIGITS, recover="none", latency=False
    ).report
    (group,) = [g for g in report.groups if g["removed"]]
    assert group["id"] == curve.group and group["removed"] == round(curve.shares[0] * curve.units)
    # Other samples are judged by: what is measured is nearly the same.
    assert report.fidelity is not None
    assert curve.noise[0] == pytest.approx(10 ** (-report.fidelity.outputs[0].snr_db / 10), rel=0.35)


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(cache=tmp_path)
    monkeypatch.setattr("onnxprune.search.sensitivity.run_job", None)
    assert measured(cache=tmp_path) == first
    with pytest.raises(TypeError):  # other options are another question
        measured(cache=tmp_path, ratios=(0.5,))


class AllAtOnce(ThreadingBackend):
    """Threads whose results come together at the end, as those of the backend of Ray."""

    supports_return_generator = False


joblib.register_parallel_backend("all-at-once", AllAtOnce)


@pytest.mark.parametrize("backend", ["all-at-once", "loky"])
def test_backends_of_joblib_agree(backend: str, tmp_path: Path) -> None:
    alone = measured(cache=tmp_path / "one")
    with joblib.parallel_config(backend=backend, n_jobs=2):
        together = measured(cache=tmp_path / "two")
    for one, other in zip(alone.curves, together.curves, strict=True):
        assert one.group == other.group
        assert one.noise == pytest.approx(other.noise, rel=1e-3, abs=1e-7)


def budgeted() -> tuple[dict[str, float], int]:
    """Losses by candidate, and how many were evaluated in this process."""
    here: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        here.append(options["split"])
        return evaluate(*args, **options)

    given: dict[str, Any] = {"data": DIGITS, "samples": 96, "recover": "bn", "trials": 0, "latency": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "evaluate", counted)
        facts = op.prune(MODELS / "recurrent.onnx", target="macs=0.6", **given).report.budget
    assert facts is not None
    return {a.name: a.fine for a in facts.answers}, sum(split is not None for split in here)


@pytest.mark.parametrize("backend", ["all-at-once", "loky"])
def test_candidates_of_a_budget_are_spread_as_well(backend: str) -> None:
    (alone, here) = budgeted()
    assert here == len(alone) > 1
    with joblib.parallel_config(backend=backend, n_jobs=2):
        spread, here = budgeted()
    assert here == 0 and spread == pytest.approx(alone, rel=1e-3, abs=1e-7)


def swept() -> list[tuple[int, float]]:
    """MACs and points of the rows of a sweep."""
    given: dict[str, Any] = {"data": DIGITS, "samples": 48, "recover": "bn", "effort": "quick", "latency": False}
    facts = op.sweep(MODELS / "recurrent.onnx", targets=(0.8, 0.6), **given)
    return [(p.macs, p.points) for p in facts.points]


def test_a_cluster_of_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    alone, losses, rows = measured(cache=tmp_path / "one"), budgeted()[0], swept()
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        spread = measured(cache=tmp_path / "two")
        assert budgeted() == (pytest.approx(losses, rel=1e-3, abs=1e-7), 0)
        monkeypatch.setattr(budget, "evaluate", None)  # no row is left to this process
        for row, here in zip(swept(), rows, strict=True):
            assert row == pytest.approx(here, rel=1e-3)
    for one, other in zip(alone.curves, spread.curves, strict=True):
        assert one.noise == pytest.approx(other.noise, rel=1e-3, abs=1e-7)


def test_a_cluster_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ray is installed: it is too large to be among the tools that tests need."""
    ray = pytest.importorskip("ray")
    register_ray = pytest.importorskip("ray.util.joblib").register_ray
    alone, rows = measured(cache=tmp_path / "one"), swept()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray", n_jobs=2):
            spread = measured(cache=tmp_path / "two")
            monkeypatch.setattr(budget, "evaluate", None)  # no row is left to this process
            for row, here in zip(swept(), rows, strict=True):
                assert row == pytest.approx(here, rel=1e-3)
    finally:
        ray.shutdown()
    for one, other in zip(alone.curves, spread.curves, strict=True):
        assert one.group == other.group and one.noise == pytest.approx(other.noise, rel=1e-3, abs=1e-7)


def test_the_users_metric_in_workers(tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text("import os\n\ndef smallness(path):\n    return -os.path.getsize(path) / 1000\n")
    found = measured(cache=tmp_path, metric=f"{script}:smallness", jobs=2, recover="none", ratios=(0.5,))
    assert found.metric and found.original == pytest.approx(-(MODELS / "recurrent.onnx").stat().st_size / 1000)
    assert all(p > found.original for c in found.curves for p in c.points)
    losses = found.losses()
    # The metric likes every cut: only noise is left to tell groups apart.
    assert all(((x >= 0) & (x < 1)).all() for _, x in losses.values())


def test_curves_as_a_file(tmp_path: Path) -> None:
    found = measured(cache=tmp_path)
    found.save(tmp_path / "curves.json")
    assert Sensitivity.load(tmp_path / "curves.json") == found
    with pytest.raises(UsageError, match="another model"):
        op.prune(MODELS / "residual.onnx", target="macs=0.5", sensitivity=tmp_path / "curves.json")
    for text, message in (
        ("{", "not JSON"),
        ("{}", "'curves' is missing"),
        ('{"curves": [], "version": 9}', "Version 9"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            Sensitivity.load(tmp_path / "bad.json")
    data = json.loads((tmp_path / "curves.json").read_text())
    data["curves"][0]["noise"] = [1.0]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="damaged"):
        Sensitivity.load(tmp_path / "bad.json")


def test_a_budget_may_go_by_what_was_measured(tmp_path: Path) -> None:
    result = op.prune(
        MODELS / "recurrent.onnx",
        target="macs=0.6",
        data=DIGITS,
        samples=96,
        recover="bn",
        sensitivity="measure",
        cache=tmp_path,
        latency=False,
    )
    facts = result.report.budget
    assert facts is not None and facts.targets[0].after <= facts.targets[0].limit
    assert list(tmp_path.glob("sensitivity-*.json"))
    with pytest.raises(UsageError, match="no budget is given"):
        op.prune(MODELS / "recurrent.onnx", sensitivity="measure")


def ranked_group(seed: int, steps: int = 20) -> RankedGroup:
    scores = np.sort(np.random.default_rng(seed).random(steps))
    return RankedGroup(scores, np.zeros(steps, np.int64), steps, np.arange(steps), 0.5)


def test_losses_pass_through_what_was_measured() -> None:
    pool, levels = [ranked_group(0), ranked_group(1)], [np.arange(1, 21)] * 2
    curves = {7: (np.array([0.25, 0.5, 0.9]), np.array([0.01, 0.05, 0.6]))}
    found = by_curves(pool, levels, curves, [7, 8])
    at = {20 - k: loss for k, loss in zip(levels[0], found.losses[0], strict=True)}
    assert [at[0], at[5], at[10], at[18]] == pytest.approx([0, 0.01, 0.05, 0.6])
    assert (np.diff(found.losses[0]) <= 0).all()  # ascending in what is kept
    # A group that was not measured loses as its scores say, on the scale of the others.
    plain = by_scores(pool, levels).losses[1]
    assert found.losses[1] / plain.max() == pytest.approx(plain * found.losses[1].max() / plain.max() ** 2)


def test_a_dip_in_a_curve_is_noise() -> None:
    curves = {0: (np.array([0.25, 0.5, 0.75]), np.array([0.05, 0.02, 0.3]))}
    losses = by_curves([ranked_group(0)], [np.arange(1, 21)], curves, [0]).losses[0]
    assert (np.diff(losses) <= 1e-12).all()


def test_a_metric_counts_before_noise() -> None:
    curves = [GroupCurve(0, "a", 8, [0.5], [0.9], [99.0]), GroupCurve(1, "b", 8, [0.5], [0.01], [90.0])]
    losses = Sensitivity("", {}, "top1", 100.0, metric=True, curves=curves).losses()
    assert losses[0][1][0] < losses[1][1][0]
