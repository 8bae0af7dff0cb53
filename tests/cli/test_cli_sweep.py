"""``onnxprune sweep`` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from onnxprune.report.facts import SweepFacts, SweepPoint
from onnxprune.report.page import sweep_page as page
from onnxprune.search.sweep import mark_pareto

MODEL = Path(__file__).parents[2] / "models" / "residual.onnx"


def test_a_sweep(run: Callable[..., Result], tmp_path: Path) -> None:
    page, kept = tmp_path / "sweep.html", tmp_path / "kept"
    done = run("sweep", MODEL, "--targets", "0.5,0.8", "--html", page, "--models", kept, "--threads", "1")
    assert done.exit_code == 0, done.stderr
    for words in ("original", "macs=0.8", "macs=0.5", "Pareto-optimal", "1 thread", str(page)):
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
        (("--targets", "0.0001"), 5, "No budget of the sweep"),
        (("--kind", "speed"), 2, "'speed'"),
        (("--metric", "x.py"), 2, "script.py:function"),
        (("--models", tmp_path / "file"), 2, "is not a folder"),
        (("--html", MODEL), 2, "is the input file"),
        (("--jobs", "0"), 2, "--jobs: 0 is not allowed"),
        (("--jobs", "many"), 2, "--jobs: many is not allowed"),
    ):
        done = run("sweep", MODEL, *arguments)
        assert done.exit_code == code and words in done.stderr, (arguments, done.stderr)


def test_the_number_of_processes_reaches_the_api(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("onnxprune.sweep", lambda model, **options: given.append(options["jobs"]) or facts())
    for arguments in ((), ("--jobs", "3")):
        done = run("sweep", MODEL, *arguments, "--json")
        assert done.exit_code == 0, done.stderr
    assert given == [None, 3]


def facts(*points: tuple[str, int, float]) -> SweepFacts:
    """A sweep of (target, MACs, points)."""
    found = [SweepPoint(target, macs, macs, macs, 1.0, value, 0.9) for target, macs, value in points]
    mark_pareto(found)
    return SweepFacts("m.onnx", "points", 1, {}, found)


def test_the_page_sets_off_what_no_other_beats() -> None:
    """The original is what models are compared with: it is not called beaten, also where a smaller one is as good."""
    text = page(facts(("", 100, 90.0), ("macs=0.5", 50, 91.0), ("macs=0.4", 40, 80.0), ("macs=0.3", 45, 70.0)))
    assert text.count('<tr class="best">') == 2 and "Bold: Pareto-optimal" in text
    assert "original: original" in text and "dominated: macs=0.3" in text
    assert "dominated: original" not in text
