"""A long run that is interrupted finishes with its best answer so far; a second interrupt ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

# The command line, with a function that announces one of its calls and then waits for a signal.
PROGRAM = """
import signal, sys, time, importlib
signal.signal(signal.SIGINT, signal.default_int_handler)
def hold(place, at):
    module, name = place.split(":")
    owner = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []
    def held(*args, **options):
        calls.append(name)
        if len(calls) == at:
            print("ready", file=sys.stderr, flush=True)
            time.sleep(60)
        return original(*args, **options)
    setattr(owner, name, held)
for place, at in {holds}:
    hold(place, at)
from onnxprune.cli import main
main(prog_name="onnxprune")
"""
CANDIDATE = "onnxprune.search.budget:evaluate"
LEVEL = "onnxprune.passes.recover:_fitted_level"
FLUSH = "onnxprune.passes.flush:Flush.__call__"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = Net(17)
    h = net.input("x", ["N", 3, 8, 8])
    for inputs, outputs in ((3, 16), (16, 16), (16, 16)):
        h = net.op("Relu", net.conv(h, inputs, outputs))
    y = net.linear(net.op("Flatten", net.op("GlobalAveragePool", h)), 16, 5)
    onnx.save(net.model(y), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32))
    return tmp_path


def interrupt(folder: Path, holds: list[tuple[str, int]], *args: str) -> tuple[int, dict[str, Any], str]:
    """Run a command and send SIGINT at every call that is held; the exit code, the JSON and stderr."""
    command = [sys.executable, "-c", PROGRAM.format(holds=holds), *args, "--data", "x.npy", "--json"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        assert process.stderr is not None
        told = []
        for _ in holds:
            while (line := process.stderr.readline()) != "ready\n":
                assert line, "".join(told)
                told.append(line)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert not list(folder.glob("onnxprune-*")), "temporary files are cleaned up"
    return process.returncode, json.loads(out) if out else {}, "".join(told) + err


def test_a_budget_finishes_with_the_best_candidate(folder: Path) -> None:
    args = ("m.onnx", "-o", "small.onnx", "--target", "macs=0.6", "--round-to", "1")
    code, report, err = interrupt(folder, [(CANDIDATE, 3)], *args)
    assert code == 0, err
    assert report["interrupted"].startswith("the search ended after 2 candidates")
    assert any("interrupted" in text for text in report["warnings"])
    assert report["exactness"]["passed"] and report["totals"]["macs_after"] <= 0.6 * report["totals"]["macs_before"]
    assert report["recovery"]["samples"] and (folder / "small.onnx").is_file()


def test_without_an_answer_the_run_ends(folder: Path) -> None:
    args = ("m.onnx", "-o", "small.onnx", "--target", "macs=0.6", "--round-to", "1")
    code, report, _ = interrupt(folder, [(CANDIDATE, 1)], *args)
    assert code == 130 and report["error"]["type"] == "Interrupted"
    assert not (folder / "small.onnx").exists()


def test_a_second_interrupt_ends_the_run(folder: Path) -> None:
    args = ("m.onnx", "-o", "small.onnx", "--target", "macs=0.6", "--round-to", "1")
    code, _, _ = interrupt(folder, [(CANDIDATE, 2), (FLUSH, 1)], *args)
    assert code == 130 and not (folder / "small.onnx").exists()


def test_a_recovery_keeps_the_layers_it_has_fitted(folder: Path) -> None:
    args = ("m.onnx", "-o", "small.onnx", "--ratio", "0.5", "--round-to", "1", "--scope", "global")
    code, report, err = interrupt(folder, [(LEVEL, 4)], *args)
    assert code == 0, err
    assert report["interrupted"] == "the recovery ended after 3 of 4 layers"
    (late,) = [r for r in report["repairs"] if r["how"].startswith("left")]
    assert late["how"] == "left: the recovery was interrupted before it came to it"
    assert any(r["how"] not in ("kept", late["how"]) for r in report["repairs"])


def test_a_scope_that_was_not_tried_leaves_the_other(folder: Path) -> None:
    code, report, err = interrupt(
        folder, [(LEVEL, 2)], "m.onnx", "-o", "small.onnx", "--ratio", "0.5", "--round-to", "1"
    )
    assert code == 0, err
    assert report["interrupted"] == "one scope of the ranking was tried" and report["settings"]["scope"] == "global"
    assert not any(r["how"].startswith("left") for r in report["repairs"])


def test_a_sweep_keeps_the_models_it_has(folder: Path) -> None:
    args = ("sweep", "m.onnx", "--targets", "0.8,0.6,0.4", "--round-to", "1")
    code, facts, err = interrupt(folder, [(CANDIDATE, 5)], *args)
    assert code == 0, err
    assert facts["interrupted"]
    errors = [point["error"] for point in facts["points"]]
    assert len(errors) == 4 and errors[:2] == ["", ""] and errors[-1] == "interrupted"
