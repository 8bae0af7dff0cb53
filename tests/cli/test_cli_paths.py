"""Paths that are not what one expects: names that are no text or very long, pipes where files should be, links."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.errors import UsageError, nearest
from onnxprune.io.read import load
from onnxprune.io.write import save
from onnxprune.runtime.arrays import array_files
from onnxprune.runtime.images import image_files

MODEL = Path(__file__).parents[2] / "models" / "residual.onnx"


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "onnxprune", *arguments], cwd=folder, capture_output=True, timeout=120, check=False
    )


@pytest.mark.parametrize("external", [False, True])
def test_a_model_under_names_that_are_no_text(external: bool, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    name, plan = os.fsdecode(b"m\xfe.onnx"), os.fsdecode(b"p\xfe.json")
    whole = load(MODEL)
    save(whole.proto, whole.weights, tmp_path / "m.onnx", external=external)
    shutil.move(tmp_path / "m.onnx", folder / name)
    if external:
        shutil.move(tmp_path / "m.onnx.data", folder)
    done = command(tmp_path, f"{folder.name}/{name}", "--json", "--plan", f"{folder.name}/{plan}")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["exactness"]["passed"] and os.fsencode(record["model"]).endswith(b"f\xff/m\xfe.onnx")
    again = command(folder, name, "--apply-plan", plan, "-o", "again.onnx", "--no-validate")
    assert again.returncode == 0, again.stderr
    assert b"again.onnx" in again.stdout
    assert load(folder / "again.onnx").weights.keys() == load(folder / name).weights.keys()


def test_the_longest_name_of_a_model(tmp_path: Path) -> None:
    name = "n" * 235 + ".onnx"
    shutil.copy(MODEL, tmp_path / name)
    done = command(tmp_path, name, "-q", "--no-validate", "--plan", "p" * 250 + ".json")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 3
    shutil.move(tmp_path / name, tmp_path / ("n" * 250 + ".onnx"))
    done = command(tmp_path, "n" * 250 + ".onnx", "--no-validate")
    assert done.returncode == 2 and b"too long" in done.stderr and b"Traceback" not in done.stderr


def test_an_output_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out.onnx").symlink_to("there/real.onnx")
    done = command(tmp_path, str(MODEL), "-q", "--no-validate", "-o", "out.onnx")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.onnx").is_symlink() and not (tmp_path / "there" / "real.onnx").is_symlink()
    onnx.checker.check_model(tmp_path / "there" / "real.onnx")


def test_pipes_are_no_models_and_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(UsageError, match="no ordinary file"):
        load(tmp_path / "m.onnx")
    for arguments in (["m.onnx"], [str(MODEL), "--data", "x.npz", "-o", "out.onnx"]):
        done = command(tmp_path, *arguments)
        assert done.returncode == 2 and b"no ordinary file" in done.stderr


def test_what_is_no_file_is_no_image_and_no_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    np.save(tmp_path / "a.npy", np.zeros(3))
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "b.npy")
    (tmp_path / "c.png").mkdir()
    (tmp_path / "c.npy").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        server.bind("d.png")
        assert [path.name for path in image_files(tmp_path)] == ["a.png"]
        assert [path.name for path in array_files(tmp_path)] == ["a.npy"]


def test_nobody_is_asked_whether_they_meant_what_they_said() -> None:
    assert nearest("conv", ["conv"]) == ""
    assert nearest("conv", ["conv", "conv1"]) == "Did you mean 'conv1'?"
    assert nearest("x", ["x", "other"]) == "Allowed: other."
