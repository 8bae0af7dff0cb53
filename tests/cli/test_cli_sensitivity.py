"""``onnxprune sensitivity`` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result

from onnxprune.report.page import LINES
from onnxprune.report.page import sensitivity_page as page

MODELS = Path(__file__).parents[2] / "models"
MODEL, DIGITS = MODELS / "recurrent.onnx", MODELS / "digits_calibration.npz"
FAST = ("--data", DIGITS, "--samples", "96", "--recover", "bn", "--ratios", "0.5,0.25", "--jobs", "1")


class Page(HTMLParser):
    """Tags of a page, and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "action")]


def test_curves_a_table_and_a_page(run: Callable[..., Result], tmp_path: Path) -> None:
    curves, page, out = tmp_path / "s.json", tmp_path / "s.html", tmp_path / "o.onnx"
    done = run("sensitivity", MODEL, *FAST, "-o", curves, "--html", page)
    assert done.exit_code == 0, done.stderr
    for words in ("ratio 0.25", "ratio 0.5", "points of fidelity", "recovered (bn)", str(page)):
        assert words in done.stdout
    shown = Page(page.read_text())
    assert "svg" in shown.tags and "circle" in shown.tags and "script" not in shown.tags and not shown.fetched
    assert len(json.loads(curves.read_text())["curves"]) == 2
    done = run(MODEL, "--target", "macs=0.6", "--sensitivity", curves, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    done = run("sensitivity", MODEL, *FAST, "--json")
    assert json.loads(done.stdout)["curves"][0]["shares"]


def test_failures(run: Callable[..., Result], tmp_path: Path) -> None:
    for arguments, code, words in (
        (("--ratios", "0.5,2"), 2, "--ratios: 2 is out of range"),
        (("--ratios", "0"), 2, "0 prunes nothing"),
        (("--metric", "none.py:f"), 2, "no file 'none.py'"),
        (("-o", MODEL), 2, "is the input file"),
        (("-o", tmp_path / "a", "--html", tmp_path / "a"), 2, "two outputs are the same file"),
        (("--recover", "full"), 2, "needs calibration data"),
        (("--exclude", "*"), 5, "No channel"),
    ):
        done = run("sensitivity", MODEL, *arguments)
        assert done.exit_code == code and words in done.stderr, (arguments, done.stderr)
    done = run(MODEL, "--sensitivity", tmp_path / "s.json", "--target", "macs=0.5")
    assert done.exit_code == 2 and "not found" in done.stderr
    done = run(MODEL, "--target", "macs=0.5", "--jobs", "2")
    assert done.exit_code == 2 and "--jobs applies only when" in done.stderr


@pytest.mark.parametrize("groups", [LINES, 40])
def test_many_groups_are_a_heat_map(groups: int) -> None:
    """A line for each of a few groups; a row of coloured cells for each of many, also where names are the same."""
    curve = {"units": 16, "shares": [0.25, 0.5], "points": [99.0, 90.0], "noise": [1e-4, 1e-2]}
    curves = [{**curve, "name": "/same/Conv" if i < 2 else f"/layer{i}/Conv"} for i in range(groups)]
    settings = {"criterion": "l2", "recover": "none", "data": "d", "shares": [0.25, 0.5, 0.9]}
    text = page({"what": "points", "original": 100.0, "settings": settings, "curves": curves}, "m.onnx")
    tags = Page(text).tags
    assert "/same/Conv (2)" in text
    if groups > LINES:
        assert tags.count("rect") == 2 * 2 * groups and "circle" not in tags
        assert text.count("rgb(160,20,40)") == 2 * groups  # the largest is the darkest
    else:
        assert tags.count("circle") == 2 * 3 * groups
