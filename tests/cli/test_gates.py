"""Gates on recoveries and factorizations, by a metric and by points: what fails is shown whole and not written."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import onnxprune as op
from onnxprune.cli.main import main
from onnxprune.errors import BudgetError

MODELS = Path(__file__).parents[2] / "models"
MODEL, DATA = MODELS / "residual.onnx", MODELS / "digits_calibration.npz"
SHARED = ("--data", DATA, "--samples", "64")


@pytest.fixture
def score(tmp_path: Path) -> str:
    """A metric that any other model than the original fails: the bytes of the file that stay."""
    script = tmp_path / "score.py"
    script.write_text("import os\ndef size(path):\n    return os.path.getsize(path)\n")
    return f"{script}:size"


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A pruned model, with its plan beside it."""
    op.prune(MODEL, ratio=0.5, latency=False).save(tmp_path / "cut.onnx", plan=tmp_path / "cut.json")
    return tmp_path / "cut.onnx"


def arguments(command: str, cut: Path) -> list[object]:
    if command == "recover":
        return [command, MODEL, cut, "--plan", cut.with_suffix(".json"), *SHARED]
    if command == "prune":
        return [command, MODEL, "--ratio", "0.5", "--criterion", "l2", "--recover", "bias", *SHARED]
    if command == "sparsify":
        return [command, MODEL, "--ratio", "0.8", "--storage", "sparse", "--recover", "bias", *SHARED]
    return [command, MODEL, "--method", "svd", "--ratio", "0.5", *SHARED]


WRITERS = ("prune", "recover", "factorize", "sparsify")


def test_all_that_write_models_take_the_gates() -> None:
    gates = {"metric", "max_drop", "min_fidelity", "outputs"}
    for call in (op.prune, op.recover, op.factorize, op.sparsify, op.finetune, op.compare):
        assert gates <= set(inspect.signature(call).parameters), call.__name__
    for name, command in main.commands.items():
        known = {parameter.name for parameter in command.params}
        if "output" in known and not {"seconds", "ratios"} & known:  # tables and curves are no models
            assert gates | {"report", "markdown"} <= known, name


@pytest.mark.parametrize("command", WRITERS)
def test_a_metric_gates_every_command(run, command: str, cut: Path, score: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    call = [*arguments(command, cut), "-o", out, "--metric", score]
    done = run(*call, "--max-drop", "10", "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == 5 and not out.exists()
    assert "more than --max-drop 10" in record["error"]["message"] and record["exit_status"] == 5
    assert record["metric"]["before"] == MODEL.stat().st_size > record["metric"]["after"]
    assert record["fidelity"]["points"] > 0 and record["verdict"]["word"]
    done = run(*call, "--max-drop", "10")
    assert done.stdout.startswith("verdict") and "\nmetric    " in done.stdout and "Nothing was written" in done.stderr
    done = run(*call, "--max-drop", "1e9")
    assert done.exit_code == 0 and out.exists() and "\nmetric    " in done.stdout


@pytest.mark.parametrize("command", WRITERS)
def test_points_are_the_gate_without_a_metric(run, command: str, cut: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    call = [*arguments(command, cut), "-o", out]
    done = run(*call, "--max-drop", "0")
    assert done.exit_code == 5 and "points of fidelity fell from 100" in done.stderr and not out.exists()
    assert run(*call, "--max-drop", "100").exit_code == 0 and out.exists()


def test_calls_raise_with_the_report(cut: Path, score: str) -> None:
    plan = cut.with_suffix(".json")
    with pytest.raises(BudgetError, match="max_drop 5") as caught:
        op.recover(MODEL, cut, plan=plan, data=DATA, samples=64, metric=score, max_drop=5)
    assert caught.value.report.metric.before > caught.value.report.metric.after
    with pytest.raises(BudgetError, match="max_drop 5") as caught:
        op.finetune(MODEL, cut, plan=plan, data=DATA, samples=64, finetune=1, metric=score, max_drop=5)
    assert caught.value.report.metric.before > caught.value.report.metric.after
    with pytest.raises(BudgetError, match="min_fidelity 100") as caught:
        op.factorize(MODEL, method="svd", ratio=0.5, latency=False, min_fidelity=100)
    assert caught.value.report.fidelity.points < 100
    assert op.factorize(MODEL, method="svd", ratio=0.5, validate=False, metric=score).report.metric is not None


def test_a_gate_needs_what_it_measures(run, score: str, tmp_path: Path) -> None:
    call = ["factorize", MODEL, "--method", "svd", "-o", tmp_path / "out.onnx", "--max-drop", "5"]
    done = run(*call, "--no-validate")
    assert done.exit_code == 2 and "--max-drop needs the models to run" in done.stderr
    done = run(*call, "--metric", score, "--dry-run", "--json")
    assert json.loads(done.stdout)["dry_run"]["skipped"][-2:] == ["--metric", "--max-drop"]


def test_kinds_reach_sensitivities_and_sweeps(run, tmp_path: Path) -> None:
    (name,) = (output.output for output in op.compare(MODEL, MODEL, latency=False).fidelity.outputs)
    given = {"data": DATA, "samples": 64, "cache": tmp_path, "recover": "none"}
    curves = [
        op.sensitivity(MODEL, ratios=(0.75,), outputs=outputs, **given)
        for outputs in (None, {name: "embedding:1"}, {name: "signal"})
    ]
    points = [[curve.points for curve in result.curves] for result in curves]
    assert points[0] != points[1] != points[2]
    facts = [
        op.sweep(MODEL, targets=(0.3,), trials=0, latency=False, outputs=o, **given) for o in (None, {name: "signal"})
    ]
    assert facts[0].points[-1].points != facts[1].points[-1].points
    for command in ("sensitivity", "sweep"):
        assert run(command, MODEL, "--output-kind", f"{name}=classs").exit_code == 2


def test_the_verdict_names_a_ratio_that_was_tried(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIAL_SECONDS", "TRIAL_SHARE"):
        monkeypatch.setattr(f"onnxprune.cli.commands.{name}", 1e9)
    call = [MODEL, "--ratio", "0.4", "--criterion", "l2", *SHARED, "--recover", "bias", "-o", tmp_path / "out.onnx"]
    record = json.loads(run(*call, "--json").stdout)
    assert "error" not in record, record["error"]
    smaller = record["smaller"]
    assert smaller is not None and smaller["ratio"] in (0.2, 0.1) and smaller["points"] >= 97, record["verdict"]
    assert record["verdict"]["next_step"].endswith(f"{smaller['ratio']:g} keeps {smaller['points']:.1f}")
    again = op.prune(
        MODEL, ratio=smaller["ratio"], criterion="l2", data=DATA, samples=64, recover="bias", latency=False
    ).report
    assert again.fidelity is not None and again.fidelity.points == pytest.approx(smaller["points"])


def test_no_ratio_is_tried_where_runs_take_long(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.cli.commands.TRIAL_SECONDS", 0)
    done = run(MODEL, "--ratio", "0.9", *SHARED, "--recover", "bias", "-o", tmp_path / "out.onnx")
    words = " ".join(done.stdout.split())
    assert "a smaller --ratio, or --max-drop 2 to find how much can be removed" in words
