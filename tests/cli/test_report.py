"""The report of a run: a page in a real browser, Markdown, and what Python shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from click.testing import Result

import onnxprune as op
from onnxprune.errors import UsageError
from onnxprune.report import network, numbers
from onnxprune.report.facts import (
    AnswerFidelity,
    BudgetFacts,
    CandidateFacts,
    Fidelity,
    GroupLosses,
    LayerFacts,
    LayerTimes,
    Network,
    NetworkNode,
    Report,
)

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "residual.onnx"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRAME = """<!doctype html><title>frames</title><pre id="out"></pre>{frames}<script>
addEventListener('load', () => setTimeout(() => {{
  const out = [...document.querySelectorAll('iframe')].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement, find = page.getElementById('find');
    const first = () => page.querySelector('.sorts td').textContent;
    const before = first(); page.querySelector('.sorts th').click(); page.querySelector('.sorts th').click();
    const colour = page.getElementById('colour'), fill = () => frame.contentWindow.getComputedStyle(
      page.querySelector('.layer')).fill, kept = fill(); colour.value = 'time'; colour.onchange({{ target: colour }});
    const heat = [...page.querySelectorAll('.heat td[style]')].map(
      cell => frame.contentWindow.getComputedStyle(cell).backgroundColor);
    const box = () => page.querySelector('#network').getAttribute('viewBox'), place = box();
    find.value = 'head'; find.dispatchEvent(new Event('input'));
    return {{ wide: root.scrollWidth, view: root.clientWidth, sorted: first(), moved: box() !== place,
      timed: fill() !== kept, heats: new Set(heat).size, dots: page.querySelectorAll('.plot circle').length,
      hits: page.getElementById('hits').textContent, errors: frame.contentWindow.failures,
      paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor, boxes: page.querySelectorAll('g').length,
      outside: performance.getEntriesByType('resource').filter(e => /^https?:/.test(e.name)).length }};
  }});
  document.getElementById('out').textContent = JSON.stringify(out);
}}, 300));
</script>"""
WATCH = "<script>window.failures = []; onerror = text => failures.push(String(text));</script>"


@pytest.fixture(scope="module")
def result() -> op.Result:
    return op.prune(MODEL, ratio=0.3, latency=False)


def in_browser(page: str, folder: Path, *, dark: bool) -> list[dict[str, object]]:
    """What a browser makes of a page at 400 and 1280 pixels."""
    watched = escape(page.replace("<head>", f"<head>{WATCH}"))
    frames = "".join(
        f'<iframe width="{w}" height="900" style="border:0" srcdoc="{watched}"></iframe>' for w in (400, 1280)
    )
    outer = folder / "frames.html"
    outer.write_text(FRAME.format(frames=frames), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", scheme]
    flags += ["--virtual-time-budget=5000", "--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *flags, outer.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout)
    assert found and found[1], done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    shown: list[dict[str, object]] = json.loads(found[1])
    return shown


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_page(result: op.Result, tmp_path: Path, dark: bool) -> None:
    names = [layer.name for layer in result.report.layers]
    times = LayerTimes(dict.fromkeys(names, 2.0), {name: number / 8 for number, name in enumerate(names)})
    tried = [("a", 0.5, 98.0), ("b", 0.6, 97.0), ("c", 0.8, 99.0)]
    budget = BudgetFacts(
        cost="macs",
        what="points of fidelity",
        points_before=100.0,
        candidates=[CandidateFacts(*place, chosen=place[0] == "a") for place in tried],
        losses=[GroupLosses("g", 8, [0.25, 0.5], [1e-4, 1e-2]), GroupLosses("h", 8, [0.5], [1.0])],
    )
    page = replace(result.report, layer_times=times, budget=budget).to_html()
    for shown, wide in zip(in_browser(page, tmp_path, dark=dark), (400, 1280), strict=True):
        assert shown["wide"] <= shown["view"] == wide and shown["errors"] == []
        assert shown["paper"] == ("rgb(15, 19, 24)" if dark else "rgb(255, 255, 255)")
        assert shown["hits"] == "1 found" and shown["moved"] and shown["boxes"] > 14 and shown["outside"] == 0
        assert shown["sorted"] == "/head/Gemm"
        assert shown["timed"] and shown["heats"] == 3 and shown["dots"] == 5


def test_a_page_needs_nothing_else_and_escapes_names(result: op.Result) -> None:
    report = Report(
        "<b>.onnx",
        layers=[
            LayerFacts("<script>alert(1)</script>", "Conv", 8, 4, 8, 4, 8, 4),
            LayerFacts('"|`', "A&B", 4, 4, 1, 1, 1, 1),
        ],
        network=Network((NetworkNode("<script>alert(1)</script>", "Conv"), NetworkNode('"|`', "A&B", (0,)))),
        warnings=["<i>odd</i>"],
        settings={"<u>": "<s>"},
    )
    for page in (report.to_html(), result.report.to_html({"command line": ["onnxprune", "<x>"]})):
        assert not re.search(r"(src|href)=|@import|url\(", page) and "http" not in page.replace(
            "http://www.w3.org/2000/svg", ""
        )
        assert page.count("<script>") == 1 and page.startswith("<!doctype html>")
        assert not re.search(r"<(b|i|u|s|x)>(\.onnx|odd|</)", page)
    assert "`<script>alert(1)</script>`" in report.to_markdown()


@pytest.mark.parametrize("command", ["prune", "factorize", "compare"])
def test_commands_write_pages(command: str, run: Callable[..., Result], tmp_path: Path) -> None:
    page, note, out = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "o.onnx"
    more = [MODEL] if command == "compare" else ["-o", out]
    more += ["--untimed"] if command == "factorize" else []
    done = run(command, MODEL, *more, "--report", page, "--markdown", note)
    assert done.exit_code == 0, done.stderr
    assert f"report    {page}" in done.stdout and f"report    {note}" in done.stdout
    html, text = page.read_text(), note.read_text()
    assert "command line" in html and "numpy" in html and "--markdown" in html
    assert text.startswith("### ") and "| MACs |" in text and "points" in text
    assert ('id="network"' in html) == ('value="time"' in html) == (command != "compare")


def test_a_gate_that_fails_keeps_the_page(run: Callable[..., Result], tmp_path: Path) -> None:
    page, out = tmp_path / "r.html", tmp_path / "o.onnx"
    done = run(MODEL, "--ratio", "0.8", "-o", out, "--min-fidelity", "99.9", "--report", page)
    assert done.exit_code == 5 and not out.exists() and "damaged" in page.read_text()


def test_markdown_may_go_to_stdout(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run(MODEL, "-o", tmp_path / "o.onnx", "--markdown", "-")
    assert done.exit_code == 0 and done.stdout.startswith("### o.onnx: ") and "wrote" not in done.stdout
    assert "Layers that changed most (10 of 14)" in done.stdout
    done = run(MODEL, "-o", tmp_path / "o.onnx", "--markdown", "-", "--json")
    assert done.exit_code == 2 and "both write to stdout" in done.stderr


@pytest.mark.parametrize("option", ["--report", "--markdown"])
def test_a_page_never_replaces_a_model(option: str, run: Callable[..., Result], tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    shutil.copy(MODEL, model)
    for path in (model, tmp_path / "m.pruned.onnx"):
        done = run(model, option, path)
        assert done.exit_code == 2 and option in done.stderr, done.stderr
    assert model.read_bytes() == MODEL.read_bytes()


def test_python_shows_the_summary_the_page_and_a_table(result: op.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = str(result).splitlines()
    assert str(result) == str(result.report) and len(lines) <= 12
    assert lines[0].startswith("verdict ") and any(line.startswith("exact     yes") for line in lines)
    assert result._repr_html_().startswith("<iframe srcdoc=") and "network" not in result.report.to_dict()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="needs pandas"):
        result.report.to_dataframe()


def test_a_table_of_layers(result: op.Result) -> None:
    pytest.importorskip("pandas")
    table = result.report.to_dataframe()
    assert len(table) == 14 and table["channels_after"].sum() < table["channels_before"].sum()


def test_a_chain_of_thousands_of_nodes_is_drawn_and_movement_is_left_out() -> None:
    nodes = [NetworkNode(f"n{i}", "Conv" if i % 2 else "Relu", (i - 1,) if i else ()) for i in range(4000)]
    layers = [network.Box(f"n{i}", "8", "", 1.0, 1.0) for i in range(1, 4000, 2)]
    svg = network.drawing(Network(tuple(nodes)), layers)
    assert svg.count("<g ") == 2000 and svg.count('class="edge"') == 1999 and "Relu" not in svg


def test_the_verdict_in_markdown_is_two_sentences() -> None:
    answer = AnswerFidelity(["y"], "classes", 50.0, "4 of 8 lost", 0.5)
    text = Report("m.onnx", fidelity=Fidelity([], 8, "data", points=50.0, answers=[answer])).to_markdown()
    assert "y (classes): 4 of 8 lost. Recover it, or train it further." in text


def test_a_report_without_a_network_draws_none() -> None:
    assert "<h2>Network</h2>" not in Report("m.onnx").to_html() and "not judged" in Report("m.onnx").to_markdown()


@pytest.mark.parametrize("width", [18, 24, 40])
def test_names_stay_different_at_any_width(width: int) -> None:
    names = [f"/model/stage{i}/{'block' * 9}{j}/{'x' * 30}/conv/Conv" for i in range(5) for j in range(5)]
    short = numbers.fitted(numbers.readable(names), width)
    assert len(set(short)) == len(names) and max(map(len, short)) <= width


def test_scopes_that_all_names_share_are_left_out() -> None:
    assert numbers.readable(["/m/a/x", "/m/a/y", "/m/b/x"]) == ["a/x", "a/y", "b/x"]
    assert numbers.readable(["m.a", "m.a", "m.b"]) == ["a (1)", "a (2)", "b"]
    assert numbers.readable(["/m/a"]) == ["/m/a"] and numbers.readable(["a/", "a/b"]) == ["a/", "a/b"]
