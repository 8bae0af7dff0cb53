"""Fine-tuning on the command line: its report, and what bad input is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from click.testing import Result
from test_recover import net

Run = Callable[..., Result]
DATA = {"x": np.random.default_rng(1).random((96, 3, 8, 8), np.float32)}


def test_on_the_command_line(run: Run, tmp_path: Path) -> None:
    model, data, labels = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "l.npy"
    onnx.save(net(), model)
    np.savez(data, **DATA)
    np.save(labels, np.zeros(96, np.int64))
    given = [model, "--ratio", "0.4", "--data", data, "--recover", "bias", "-o", tmp_path / "o.onnx"]
    result = run(*given, "--finetune", "20", "--labels", labels)
    assert result.exit_code == 0, result.output
    assert "finetuned" in result.stdout and "20 steps of 32" in result.stdout
    facts = json.loads(run(*given, "--finetune", "20", "--json").stdout)["finetuning"]
    assert facts["steps"] == 20 and len(facts["curve"]) == 11
    for wrong, message in (
        (["--finetune", "soon"], "--finetune: 'soon' is not allowed"),
        (["--labels", labels], "neither is given"),
        (["--finetune", "5", "--labels", tmp_path / "none.npy"], "none.npy"),
    ):
        failed = run(*given, *wrong)
        assert failed.exit_code == 2 and message in failed.output, failed.output
    failed = run(model, "--finetune", "5")
    assert failed.exit_code == 2 and "--data" in failed.output


def test_train_writes_a_smaller_model_and_refuses_what_it_cannot_learn_from(run: Run, tmp_path: Path) -> None:
    model, data, target = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx"
    onnx.save(net(), model)
    np.savez(data, **DATA)
    given = ["train", model, "--data", data, "--finetune", "10"]
    done = run(*given, "--json", "-o", target)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["regularized"]["zeros"] == report["dead"]["removed"] > 0
    assert target.stat().st_size < model.stat().st_size
    for wrong, message in (
        (["train", model], "--data is not given"),
        ([*given, "--ratio", "0.3", "--strength", "2"], "--ratio and --strength were both given"),
        ([*given, "--strength", "-1"], "--strength: -1 is not allowed"),
        ([*given, "--regularize", "slimmimg"], "Did you mean 'slimming'?"),
    ):
        failed = run(*wrong)
        assert failed.exit_code == 2 and message in failed.output, failed.output
