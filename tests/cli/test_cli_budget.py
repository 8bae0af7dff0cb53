"""Budgets as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
from click.testing import Result

MODELS = Path(__file__).parents[2] / "models"
MODEL = MODELS / "residual.onnx"


def test_targets_on_the_command_line(run: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    done = run(MODEL, "--target", "macs=0.5", "--target", "size=400kB", "-o", out)
    assert done.exit_code == 0, done.stderr
    for words in ("macs=0.5", "met, counted", "knapsack over scores", "size=400kB"):
        assert words in done.stdout
    assert out.stat().st_size <= 400e3
    done = run(MODEL, "--target", "macs=0.5", "-o", out, "--json")
    facts = json.loads(done.stdout)["budget"]
    assert facts["targets"][0]["kind"] == "macs" and facts["targets"][0]["after"] <= facts["targets"][0]["limit"]


def test_a_metric_of_the_users(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(
        "import os\nfrom settings import SCALE\n\ndef smallness(path):\n    return SCALE * os.path.getsize(path)\n"
    )
    (tmp_path / "settings.py").write_text("SCALE = 1e-3\n")
    out = tmp_path / "small.onnx"
    metric = f"{tmp_path}/score.py:smallness"
    done = run(MODEL, "--max-drop", "300", "--metric", metric, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert "score.py:smallness" in done.stdout
    assert MODEL.stat().st_size - 310e3 < out.stat().st_size <= MODEL.stat().st_size - 200e3


def test_a_plan_of_a_budget_replays(run: Callable[..., Result], tmp_path: Path) -> None:
    one, two, plan = tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "plan.json"
    assert run(MODEL, "--target", "params=0.5", "-o", one, "--plan", plan).exit_code == 0
    assert run(MODEL, "--apply-plan", plan, "-o", two).exit_code == 0
    shapes = [[list(t.dims) for t in onnx.load(p).graph.initializer] for p in (one, two)]
    assert shapes[0] == shapes[1]


def test_a_plan_with_layers_apart_replays_to_the_byte(run: Callable[..., Result], tmp_path: Path) -> None:
    one, two, plan = tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "plan.json"
    data = ("--data", MODELS / "digits_calibration.npz", "--samples", "40", "--recover", "bn")
    done = run(MODEL, "--target", "macs=0.4", "--factorize", *data, "-o", one, "--plan", plan, "-v")
    assert done.exit_code == 0, done.stderr
    assert "knapsack over groups and layers" in done.stdout and "ranks" in done.stdout and "product" in done.stdout
    done = run(MODEL, "--apply-plan", plan, *data, "-o", two)
    assert done.exit_code == 0, done.stderr
    assert one.read_bytes() == two.read_bytes()
    done = run("factorize", MODEL, "--apply-plan", plan, *data, "-o", two)
    assert done.exit_code == 2 and "removes channels as well" in done.stderr

    data = data[:-2]
    done = run("recover", MODEL, one, "--plan", plan, *data, "-o", two)
    assert done.exit_code == 0, done.stderr
    assert "layers factorized" in done.stdout and "factorized layers came as a file" in done.stdout
    before, after = (onnx.load(path).graph for path in (one, two))
    assert [(n.op_type, n.output[0]) for n in before.node] == [(n.op_type, n.output[0]) for n in after.node]
    written = json.loads(plan.read_text())
    written["factorized"][0]["ranks"][0] += 1
    plan.write_text(json.dumps(written))
    done = run("recover", MODEL, one, "--plan", plan, *data, "-o", tmp_path / "none.onnx")
    assert done.exit_code == 2 and "does not belong to this pair" in done.stderr
    assert not (tmp_path / "none.onnx").exists()


def test_failures(run: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    for arguments, code, words in (
        (("--target", "macs=0.5", "--ratio", "0.3"), 2, "--ratio and --target were both given"),
        (("--target", "macs=0.5", "--scope", "global"), 2, "--scope and --target were both given"),
        (("--max-drop", "1", "--scope", "global"), 2, "--scope and --max-drop were both given"),
        (("--target", "macs=50%"), 2, "percent sign"),
        (("--target", "speed=2"), 2, "unknown kind 'speed'"),
        (("--target", "latency=0.5", "--latency-table", tmp_path / "none.json"), 2, "not found"),
        (("--metric", "x.py:f"), 2, "no file 'x.py'"),
        (("--max-drop", "all"), 2, "--max-drop: all is not allowed"),
        (("--target", "macs=0.001"), 5, "cannot be reached"),
        (("--target", "macs=0.2", "--min-fidelity", "0.99999"), 5, "The nearest budget that works: --target macs="),
    ):
        done = run(MODEL, *arguments, "-o", out)
        assert (done.exit_code, out.exists()) == (code, False), (arguments, done.stderr)
        assert words in done.stderr and "Traceback" not in done.stderr


def test_a_table_of_another_model(run: Callable[..., Result], tmp_path: Path) -> None:
    table = tmp_path / "device.json"
    assert run("profile", MODELS / "recurrent.onnx", "--threads", "1", "--seconds", "1", "-o", table).exit_code == 0
    done = run(MODEL, "--target", "latency=0.8", "--latency-table", table, "-o", tmp_path / "o.onnx")
    assert done.exit_code == 2 and "belongs to another model" in done.stderr


def test_a_target_that_was_met_before_says_so(run: Callable[..., Result], tmp_path: Path) -> None:
    for target in ("size=3MB", "macs=1G"):
        done = run(MODEL, "--target", target, "-o", tmp_path / "o.onnx")
        assert done.exit_code == 0, done.stderr
        assert "met before pruning" in done.stdout
        assert f"warning: {target} was met before pruning: the original has" in done.stderr


def test_a_gate_of_a_budget_that_fails_keeps_the_report(run: Callable[..., Result], tmp_path: Path) -> None:
    pages = ("--report", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    call = ("--target", "macs=0.3", "--min-fidelity", "0.9999", "-o", tmp_path / "o.onnx", "--json")
    done = run(MODEL, *call, *pages)
    record = json.loads(done.stdout)
    assert all("points" in path.read_text() for path in pages[1::2])
    facts = record["budget"]
    assert sum(c["chosen"] for c in facts["candidates"]) == 1 and facts["cost"] == "macs" and facts["losses_by"]
    assert all(0 < c["cost"] <= 1 and c["points"] <= 100 for c in facts["candidates"]) and len(facts["candidates"]) > 1
    assert all(0 <= loss["shares"][0] < loss["shares"][-1] for loss in facts["losses"])
    assert done.exit_code == record["error"]["exit_code"] == 5 and not (tmp_path / "o.onnx").exists()
    assert record["budget"]["targets"][0]["kind"] == "macs" and record["layers"] and record["fidelity"]["outputs"]
    assert "--min-fidelity 0.9999" in record["error"]["message"] and "--target" in record["error"]["hint"]
