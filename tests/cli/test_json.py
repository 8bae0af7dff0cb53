"""What --json writes is what docs/json.md explains, for every command."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from build import Net
from click.testing import CliRunner

from onnxprune.cli import main
from onnxprune.settings import COMMANDS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from make_json_page import EVERY, page  # noqa: E402


def documented(heading: str) -> set[str]:
    """Fields of one section of the page."""
    text = (ROOT / "docs" / "json.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))


def test_the_page_is_up_to_date() -> None:
    wanted = page()
    assert (ROOT / "docs" / "json.md").read_text() == wanted, "python tools/make_json_page.py > docs/json.md"
    anchors = {line[3:].lower() for line in wanted.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\]\(#(\w+)\)", wanted)) <= anchors
    assert all(f"\n## {command}\n" in wanted for command in COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its pruned form with the plan, and data."""
    path = tmp_path_factory.mktemp("json")
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16))
    (path / "m.onnx").write_bytes(net.model(net.conv(x, 16, 8)).SerializeToString())
    np.save(path / "d.npy", np.random.default_rng(0).random((16, 3, 6, 6), np.float32))
    quick = [str(path / "m.onnx"), "--no-validate", "-q", "--plan", str(path / "p.json"), "-o", str(path / "s.onnx")]
    assert CliRunner().invoke(main, quick).exit_code == 0
    return path


CALLS = {
    "prune": ["m.onnx", "--target", "macs=0.7", "--trials", "1", "--data", "d.npy", "-o", "out.onnx"],
    "recover": ["m.onnx", "s.onnx", "--plan", "p.json", "--data", "d.npy", "-o", "out.onnx"],
    "sparsify": ["m.onnx", "--ratio", "0.5", "--include", "*", "-o", "out.onnx"],
    "train": ["m.onnx", "--data", "d.npy", "--samples", "16", "--finetune", "4", "-o", "out.onnx"],
    "factorize": ["m.onnx", "--method", "svd", "--rank", "4", "-o", "out.onnx"],
    "inspect": ["m.onnx"],
    "compare": ["m.onnx", "s.onnx"],
    "profile": ["m.onnx", "--seconds", "1"],
    "sensitivity": ["m.onnx", "--ratios", "0.5", "--jobs", "1"],
    "sweep": ["m.onnx", "--targets", "0.7", "--trials", "0"],
    "criteria": [],
    "devices": [],
}


@pytest.mark.parametrize("command", CALLS)
def test_every_field_is_explained(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    result = CliRunner().invoke(main, [command, *CALLS[command], "--json"], prog_name="onnxprune")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert set(told) <= set(EVERY) | documented(command), set(told) - set(EVERY) - documented(command)
    assert set(EVERY) - {"error"} <= set(told)
    assert (told["schema_version"], told["command"], told["exit_status"]) == (1, command, 0)
    assert told["command_line"] == [command, *CALLS[command], "--json"]
    assert told["versions"]["onnxruntime"] == ort.__version__ and told["versions"]["onnx"]


def test_failures_have_the_same_frame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    cases = [(["none.onnx"], 2), (["m.onnx", "--ratio", "2"], 2), (["m.onnx", "--odd"], 2), ([], 2)]
    cases += [(["m.onnx", "--min-fidelity", "0.999999", "--ratio", "0.8"], 5)]
    for arguments, code in cases:
        result = CliRunner().invoke(main, [*arguments, "--json"], prog_name="onnxprune")
        told = json.loads(result.stdout)
        assert result.exit_code == code == told["exit_status"] == told["error"]["exit_code"]
        assert set(EVERY) <= set(told) and told["command"] == "prune"
    assert told["fidelity"]["outputs"]
