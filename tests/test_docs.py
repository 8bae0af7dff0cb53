"""README and CONTRIBUTING: every Python block runs, every command exists, every room of the house is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import onnxprune as op
from onnxprune.cli import main
from onnxprune.cli.commands import compare, factorize, inspect, profile, prune, recover, sensitivity, sweep

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")
COMMANDS = (prune, recover, factorize, inspect, compare, profile, sensitivity, sweep)


def sections(page: str) -> dict[str, str]:
    """{heading of the second level: text below it}."""
    parts = re.split(r"^## (.+)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


PYTHON = [(page, title) for page in PAGES for title, text in sections(page).items() if blocks(text, "python")]


def python(folder: Path, *arguments: str, path: tuple[Path, ...] = (ROOT / "tests",)) -> str:
    """What a fresh interpreter prints, with the models at hand; it must not fail or warn."""
    if not (folder / "models").exists():
        shutil.copytree(ROOT / "models", folder / "models")
    paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("page", "title"), PYTHON, ids=[f"{page}: {title}" for page, title in PYTHON])
def test_python_blocks_run(page: str, title: str, tmp_path: Path) -> None:
    """The blocks of a section run one after the other, as a reader would type them."""
    python(tmp_path, "-c", "\n".join(blocks(sections(page)[title], "python")))


def test_the_package_that_contributing_describes_is_found(tmp_path: Path) -> None:
    """Its files and its entry points, put where a wheel would put them."""
    page = sections("CONTRIBUTING.md")
    site = tmp_path / "site"
    info = site / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    named = [block for text in page.values() for block in blocks(text, "python") if block.startswith("# acme_")]
    for block in named:
        (site / block.split()[1]).write_text(block)
    assert len(named) == 3
    (announced,) = blocks(page["Announce them"], "toml")
    points = tomllib.loads(announced)["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    show = "print(op.rules.lookup('com.acme', 'BiasSwish', 1), *op.criteria.names(), *op.passes.names())"
    printed = python(tmp_path, "-c", f"import onnxprune as op; {show}", path=(site,))
    assert "acme_rules.BiasSwish" in printed and "spread" in printed and "zero-small" in printed
    arguments = ["-m", "onnxprune", "models/residual.onnx", "--criterion", "spread", "--no-validate"]
    python(tmp_path, *arguments, path=(site,))
    assert (tmp_path / "models/residual.pruned.onnx").exists()


def _options(*commands: click.Command) -> set[str]:
    return {name for command in commands for param in command.params for name in (*param.opts, *param.secondary_opts)}


@pytest.mark.parametrize("page", PAGES)
def test_options_that_the_pages_name_exist(page: str) -> None:
    known = _options(*COMMANDS, main) | {"--help", "--version"}
    text = (ROOT / page).read_text()
    lines = [line for block in blocks(text, "sh") + blocks(text, "text") for line in block.splitlines()]
    commands = [line for line in lines if "onnxprune " in line]
    spans = re.findall(r"`(--[a-z-]+)", text)
    named = {
        word.split("=")[0] for line in commands for word in line.split("onnxprune ", 1)[1].split() if word[:2] == "--"
    }
    assert named | set(spans) <= known | {"--record"}, (named | set(spans)) - known


def test_every_option_is_explained_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in sorted(_options(*COMMANDS)) if name.startswith("--") and f"`{name}" not in text]
    assert not missing


def test_every_room_is_named() -> None:
    table = sections("CONTRIBUTING.md")["The house"]
    rooms = {path.name for path in (ROOT / "onnxprune").iterdir() if (path / "__init__.py").exists()}
    files = {path.name for path in (ROOT / "onnxprune").glob("*.py")} - {"__init__.py", "__main__.py"}
    named = set(re.findall(r"`([a-z_]+)/`", table)), set(re.findall(r"`([a-z_]+\.py)`", table))
    assert (rooms, files) == named


def test_links_between_files_lead_somewhere() -> None:
    for page in (*PAGES, "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), f"{page}: {target}"
    for page in PAGES:
        for target in re.findall(r"`((?:tests|tools|onnxprune|models|\.ci)/[\w./*-]*)`", (ROOT / page).read_text()):
            assert list(ROOT.glob(target.rstrip("/"))), f"{page}: {target}"


def test_sizes_in_the_readme_are_those_of_today() -> None:
    """Where this fails for a good reason: python tools/measure_cuts.py prints the new table."""
    cost = sections("README.md")["What a cut costs"]
    rows = re.findall(r"^\| `(\w+\.onnx)` \| (.+?) \| (.+?) \| (.+?) \|", cost, re.MULTILINE)
    assert {name for name, *_ in rows} == {
        f"{name}.onnx" for name in json.loads((ROOT / "models/accuracy.json").read_text())
    }
    for name, params, macs, _ in rows:
        sums = op.prune(ROOT / "models" / name, validate=False).report.totals
        wanted = [units(sums.params_before, sums.params_after), units(sums.macs_before, sums.macs_after)]
        assert [params, macs] == wanted, name


@pytest.mark.parametrize("name", ["depthwise", "attention", "recurrent"])
def test_what_a_repair_wins_back_is_what_the_readme_says(name: str, tmp_path: Path) -> None:
    """Where this fails for a good reason: python tools/measure_cuts.py --recover prints the new table."""
    table = sections("README.md")["Use it"].partition("### Recover accuracy")[2]
    (row,) = re.findall(rf"^\| `{name}\.onnx` \| (.+) % \| (.+) % \| (.+) % \|$", table, re.MULTILINE)
    script = f"import measure_cuts; print(*measure_cuts.shares({name!r}, 'l2', 0.5, 'full'))"
    shares = python(tmp_path, "-c", script, path=(ROOT / "tools", ROOT)).split()
    # Another processor rounds otherwise, which moves a few of the 450 digits.
    for share, shown, slack in zip(map(float, shares), map(float, row), (0.1, 1.0, 1.5), strict=True):
        assert 100 * share == pytest.approx(shown, abs=slack)


def units(before: int, after: int) -> str:
    shown = [f"{n / 1e6:.2f} M" if n >= 999_500 else f"{n / 1e3:.1f} K" for n in (before, after)]
    return " → ".join(shown)


def test_plans_on_the_pages_are_plans() -> None:
    plans = [
        op.Plan.from_dict(json.loads(block)) for page in PAGES for block in blocks((ROOT / page).read_text(), "json")
    ]
    assert [slot.removed for slot in plans[0].groups[0].slots] == [[3, 17], [3, 17]]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Anchors are headings of the same page, other links are files."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif "://" not in link:
            assert (ROOT / link.partition("#")[0]).exists(), link
