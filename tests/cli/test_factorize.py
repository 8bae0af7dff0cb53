"""Factorization on the command line: what is written, shown and said, and what bad input is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from onnxprune.cli import main

Run = Callable[..., Result]
MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes((MODELS / "residual.onnx").read_bytes())
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["factorize", *map(str, arguments)])


def test_a_smaller_model_beside_the_input(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    plan = tmp_path / "p.json"
    done = run(model, "--method", "tucker", "--ratio", "0.4", "--plan", plan)
    assert done.exit_code == 0, done.stderr
    target = tmp_path / "m.factorized.onnx"
    assert "tucker" in done.stdout and "product   yes" in done.stdout and str(target) in done.stdout
    assert model.read_bytes() == before
    assert target.stat().st_size < 0.75 * len(before)
    onnx.checker.check_model(str(target))
    again = run(model, "--apply-plan", plan, "-o", tmp_path / "again.onnx")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again.onnx").read_bytes() == target.read_bytes()


def test_one_object_for_machines(model: Path) -> None:
    data = MODELS / "digits_calibration.npz"
    done = run(model, "--method", "spatial-svd", "--ratio", "0.4", "--data", data, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    taken = [f for f in facts["factorized"] if f["method"]]
    assert taken and all(f["macs_after"] < f["macs_before"] and 0 <= f["error"] < 1 for f in taken)
    assert facts["product"]["passed"] and facts["recovery"]["mode"] == "full" and facts["fidelity"]["outputs"]
    assert facts["totals"]["macs_after"] < facts["totals"]["macs_before"]


def test_explain_names_layers_that_stay(model: Path) -> None:
    done = run(model, "--method", "tucker", "--explain", "--no-validate")
    assert done.exit_code == 0, done.stderr
    assert "Layers that were not factorized" in done.stdout and "its kernel has one position" in done.stdout
    assert "/head/Gemm" in done.stdout and "product   not checked" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--method", "tuckr"], 2, "Did you mean 'tucker'?"),
        (["--ratio", "30"], 2, "For 30 percent give 0.3"),
        (["--ratio", "0"], 2, "0 < R < 1"),
        (["--rank", "x=a"], 2, "is not a rank"),
        (["--rank", "4"], 2, "chooses the ranks"),
        (["--method", "svd", "--rank", "4", "--rank", "5"], 2, "is given twice"),
        (["--method", "svd", "--energy", "1.5"], 2, "Give the share of the energy to keep, 0 < E <= 1"),
        (["--method", "svd", "--calibration", "0.5"], 2, "Give --vbmf"),
        (["--method", "svd", "--vbmf", "--calibration", "2"], 2, "-1 <= C <= 1"),
        (["--method", "svd", "--layer", "nowhere=0.5"], 2, "matches no node"),
        (["--method", "svd", "--rank", "/head/Gemm=99"], 2, "Allowed: 1..10"),
        (["--apply-plan", "p.json", "--ratio", "0.5"], 2, "not found"),
        (["--no-validate", "--min-fidelity", "0.5"], 2, "Drop one of the two"),
        (["--recover", "full"], 2, "needs calibration data"),
        (["--method", "svd", "--include", "/head/Gemm", "--ratio", "0.99"], 5, "no rank would save 99%"),
        (["--method", "svd", "--ratio", "0.8", "--min-fidelity", "0.999"], 5, "is below --min-fidelity"),
        (["--untimed", "--ratio", "0.999"], 5, "at most"),
    ],
)
def test_bad_input(model: Path, tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    done = run(model, *arguments)
    assert done.exit_code == code, (done.stdout, done.stderr)
    assert says in done.stderr and "Traceback" not in done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_plan_and_an_option_that_contradict_it(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p.json"
    assert run(model, "--method", "svd", "--no-validate", "--plan", plan).exit_code == 0
    done = run(model, "--apply-plan", plan, "--ratio", "0.5")
    assert done.exit_code == 2 and "--ratio has no meaning with --apply-plan" in done.stderr


def test_data_of_another_model(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2), np.float32))
    done = run(model, "--method", "svd", "--data", tmp_path / "d.npz")
    assert done.exit_code == 2 and "Traceback" not in done.stderr


def test_the_help_has_its_headings() -> None:
    done = run("--help-all")
    assert done.exit_code == 0
    assert all(f"{h}:" in done.stdout for h in ("Method", "How much", "What to prune", "Recovery"))
