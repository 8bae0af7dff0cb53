"""--dry-run: the choice and its report, no file, and a list of what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from build import Net
from click.testing import CliRunner, Result

from onnxprune.cli import main


@pytest.fixture
def small(tmp_path: Path) -> Path:
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16))
    path = tmp_path / "small.onnx"
    path.write_bytes(net.model(net.conv(x, 16, 8)).SerializeToString())
    np.save(tmp_path / "d.npy", np.random.default_rng(0).random((16, 3, 6, 6), np.float32))
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="onnxprune")


def test_nothing_is_written_and_the_choice_is_that_of_the_run(small: Path) -> None:
    data, plan = small.with_name("d.npy"), small.with_name("plan.json")
    arguments = [small, "--ratio", "0.5", "--data", data, "--criterion", "wanda", "--plan", plan, "--json"]
    dry = run(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert sorted(path.name for path in small.parent.iterdir()) == ["d.npy", "small.onnx"]
    told = json.loads(dry.stdout)
    assert told["dry_run"] == {
        "skipped": ["timing", "the proof of exactness", "the comparison of outputs", "recovery"],
        "would_write": [str(small.with_name("small.pruned.onnx")), str(plan)],
    }
    assert told["recovery"]["why"] == ""  # nobody asked for none
    assert (told["output"], told["plan"], told["latency"], told["exactness"]["passed"]) == ("", None, None, None)
    real = json.loads(run(*arguments).stdout)
    assert real["layers"] == told["layers"] and real["groups"] == told["groups"]
    assert "dry_run" not in real and plan.exists()


def test_the_screen_says_what_was_skipped(small: Path) -> None:
    result = run(small, "--ratio", "0.5", "--min-fidelity", "0.99", "--dry-run")
    assert result.exit_code == 0
    last = result.stdout.splitlines()[-2:]
    assert last[0].startswith("dry run   nothing was written; without --dry-run this run writes ")
    assert last[1] == "skipped   timing, the proof of exactness, the comparison of outputs, --min-fidelity"
    assert "params  " in result.stdout


def test_a_budget_is_searched_for_and_only_timing_is_skipped(small: Path) -> None:
    result = run(small, "--target", "macs=0.6", "--trials", "0", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["dry_run"]["skipped"] == ["timing"] and told["exactness"]["passed"]
    assert told["budget"]["targets"][0]["after"] <= told["budget"]["targets"][0]["limit"]
    assert not small.with_name("small.pruned.onnx").exists()


def test_a_factorization(small: Path) -> None:
    result = run("factorize", small, "--method", "svd", "--rank", "4", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "skipped   timing, the comparison of outputs"
    assert not small.with_name("small.factorized.onnx").exists()


def test_errors_are_those_of_the_run(small: Path) -> None:
    for arguments, code in ((["--ratio", "2"], 2), (["--data", "none.npy"], 2), (["-o", small], 2)):
        assert run(small, *arguments, "--dry-run").exit_code == code == run(small, *arguments).exit_code
