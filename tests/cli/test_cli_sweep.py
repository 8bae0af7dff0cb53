"""``onnxprune sweep`` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

MODEL = Path(__file__).parents[2] / "models" / "residual.onnx"


def test_a_sweep(run: Callable[..., Result], tmp_path: Path) -> None:
    page, kept = tmp_path / "sweep.html", tmp_path / "kept"
    done = run("sweep", MODEL, "--targets", "0.5,0.8", "--html", page, "--models", kept, "--threads", "1")
    assert done.exit_code == 0, done.stderr
    for words in ("original", "macs=0.8", "macs=0.5", "on the frontier", "1 thread", str(page)):
        assert words in done.stdout
    assert sorted(p.name for p in kept.iterdir()) == ["residual.0.5.onnx", "residual.0.8.onnx"]
    assert page.read_text().startswith("<!doctype html>")
    done = run("sweep", MODEL, "--targets", "0.7", "--kind", "params", "--json")
    points = json.loads(done.stdout)["points"]
    assert [p["target"] for p in points] == ["", "params=0.7"] and points[1]["params"] <= 0.7 * points[0][
        "params"
    ] * 1.02


def test_failures(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, code, words in (
        (("--targets", "0.5,90%"), 2, "percent sign"),
        (("--targets", "0.5,2M"), 2, "no share"),
        (("--targets", "0.0001"), 5, "None of the budgets"),
        (("--kind", "speed"), 2, "'speed'"),
        (("--metric", "x.py"), 2, "script.py:function"),
        (("--models", tmp_path / "file"), 2, "is not a folder"),
        (("--html", MODEL), 2, "is the input file"),
    ):
        done = run("sweep", MODEL, *arguments)
        assert done.exit_code == code and words in done.stderr, (arguments, done.stderr)
