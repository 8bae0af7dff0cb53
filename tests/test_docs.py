"""Pages: every Python block runs, every command exists, links lead somewhere, every room of the house is named."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import onnxprune as op
from onnxprune.cli import main
from onnxprune.cli.commands import (
    compare,
    factorize,
    inspect,
    profile,
    prune,
    recover,
    sensitivity,
    sparsify,
    sweep,
    train,
)

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("docs/json.md", "docs/settings.md")
"""Pages that other tests hold to the code."""
SITE = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *(page for page in SITE if page not in GENERATED))
COMMANDS = (prune, recover, factorize, sparsify, inspect, compare, profile, sensitivity, sweep, train)


def sections(page: str) -> dict[str, str]:
    """{heading of the second level: text below it}."""
    parts = re.split(r"^## (.+)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def scripts() -> dict[str, str]:
    """{name: blocks to run one after the other}: by section of README and CONTRIBUTING, of other pages by folder.

    Pages of a folder share an interpreter, which takes longer to start than most of them to run, but no names.
    """
    found = {f"{page}: {title}": text for page in PAGES[:2] for title, text in sections(page).items()}
    found = {name: "\n".join(blocks(text, "python")) for name, text in found.items() if blocks(text, "python")}
    for page in PAGES[2:]:
        text = "\n".join(blocks((ROOT / page).read_text(), "python"))
        if text:
            folder = Path(page).parent.as_posix()
            found[folder] = found.get(folder, "") + f"exec(compile({text!r}, {page!r}, 'exec'), {{}})\n"
    return found


SCRIPTS = scripts()


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


@pytest.mark.parametrize("name", SCRIPTS)
def test_python_blocks_run(name: str, tmp_path: Path) -> None:
    """The blocks run one after the other, as a reader would type them."""
    python(tmp_path, "-c", SCRIPTS[name])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_run(path: Path, tmp_path: Path) -> None:
    printed = python(tmp_path, str(path))
    assert path.name in (ROOT / "docs" / "recipes.md").read_text()
    if path.stem == "prune_and_quantize":
        table = dict(re.findall(r"^(\w[\w, ]+?)  +\d+ kB +([\d.]+) %$", printed, re.MULTILINE))
        assert float(table["pruned, then quantized"]) > 95 and float(table["quantized, then pruned"]) > 95


def test_pages_are_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150 and len(readme.split()) <= 1200
    for page in PAGES[2:]:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert len(text.split()) < 800 or page.startswith("docs/benchmarks/"), page


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in listed) == SITE


def typed() -> list[str]:
    """Commands on the pages that are run on a model of the repository."""
    lines = [line for page in PAGES for block in blocks((ROOT / page).read_text(), "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("onnxprune ") and "models/" in line})


@pytest.mark.parametrize("line", typed())
def test_commands_on_the_pages_are_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option with its value is accepted; nothing is run."""
    words = shlex.split(line)[1:]
    name = words.pop(0) if words[0] in main.commands else "prune"
    for word in words:
        if word.endswith((".onnx", ".npz", ".json")):
            (tmp_path / word).parent.mkdir(exist_ok=True)
            (tmp_path / word).touch()
    monkeypatch.chdir(tmp_path)
    with main.commands[name].make_context(name, words):
        pass


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


def test_every_option_is_explained_on_a_page() -> None:
    """Beside the list of settings, which is made from the code."""
    text = "".join((ROOT / page).read_text() for page in PAGES)
    missing = [name for name in sorted(_options(*COMMANDS)) if name.startswith("--") and f"`{name}" not in text]
    assert not missing


def test_every_room_is_named() -> None:
    table = sections("CONTRIBUTING.md")["The house"]
    rooms = {path.name for path in (ROOT / "onnxprune").iterdir() if (path / "__init__.py").exists()}
    files = {path.name for path in (ROOT / "onnxprune").glob("*.py")} - {"__init__.py", "__main__.py"}
    named = set(re.findall(r"`([a-z_]+)/`", table)), set(re.findall(r"`([a-z_]+\.py)`", table))
    assert (rooms, files) == named


def test_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"`((?:tests|tools|onnxprune|models|examples|\.ci)/[\w./*-]*)`", text):
            made = target.endswith((".pruned.onnx", ".recovered.onnx"))
            assert made or list(ROOT.glob(target.rstrip("/"))), f"{page}: {target}"


def test_sizes_on_the_page_are_those_of_today() -> None:
    """Where this fails for a good reason: python tools/measure_cuts.py prints the new table."""
    cost = sections("docs/benchmarks/small.md")["What pruning costs"]
    rows = re.findall(r"^\| `(\w+\.onnx)` \| (.+?) \| (.+?) \| (.+?) \|", cost, re.MULTILINE)
    assert {name for name, *_ in rows} == {
        f"{name}.onnx" for name in json.loads((ROOT / "models/accuracy.json").read_text())
    }
    for name, params, macs, _ in rows:
        sums = op.prune(ROOT / "models" / name, validate=False).report.totals
        wanted = [units(sums.params_before, sums.params_after), units(sums.macs_before, sums.macs_after)]
        assert [params, macs] == wanted, name


@pytest.mark.parametrize("name", ["depthwise", "attention", "recurrent"])
def test_what_recovery_gains_is_what_the_page_has(name: str, tmp_path: Path) -> None:
    """Where this fails for a good reason: python tools/measure_cuts.py --recover prints the new table."""
    table = sections("docs/benchmarks/small.md")["What recovery gains"]
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


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *GENERATED, "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Links are files, seen from the page; anchors are headings."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
