"""``onnxprune profile`` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

MODEL = Path(__file__).parents[2] / "models" / "recurrent.onnx"


def test_a_profile(run: Callable[..., Result], tmp_path: Path) -> None:
    table = tmp_path / "device.json"
    done = run("profile", MODEL, "--threads", "1", "--seconds", "1", "-o", table)
    assert done.exit_code == 0, done.stderr
    for words in ("1 thread", "at 0.5", "LSTM", "predicted / measured", str(table)):
        assert words in done.stdout
    assert json.loads(table.read_text())["device"]["threads"] == 1
    done = run("profile", MODEL, "--threads", "1", "--seconds", "1", "--json")
    facts = json.loads(done.stdout)
    assert facts["table"] is None and facts["ms"] > 0 and facts["nodes"] and facts["checks"]


def test_what_cannot_be_profiled(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("profile", MODEL, "--providers", "abacus")
    assert done.exit_code == 2 and "no provider 'abacus'" in done.stderr
    done = run("profile", tmp_path / "none.onnx")
    assert done.exit_code == 2 and "not found" in done.stderr
    done = run("profile", MODEL, "-o", MODEL)
    assert done.exit_code == 2 and "the model itself" in done.stderr
    done = run("profile", MODEL, "--threads", "0")
    assert done.exit_code == 2 and "--threads" in done.stderr
