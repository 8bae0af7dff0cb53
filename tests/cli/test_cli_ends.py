"""How a run ends: by signals, with streams that take nothing, with a metric that does what it should not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.channels.analysis import Analysis
from onnxprune.search.evaluation import load_metric, points_of_original

MODEL = Path(__file__).parents[2] / "models" / "residual.onnx"
WAITING = """
import signal, sys, time, onnxprune
from onnxprune.io.files import workspace
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
if {ignored}: signal.signal(signal.SIGHUP, signal.SIG_IGN)
def prune(*args, **options):
    with workspace():
        print("ready", file=sys.stderr, flush=True)
        time.sleep({seconds})
    raise onnxprune.errors.BudgetError("over")
onnxprune.prune = prune
from onnxprune.cli import main
main(prog_name="onnxprune")
"""


def run_and_signal(folder: Path, name: str, *, ignored: bool = False, seconds: float = 60) -> tuple[int, str]:
    model = folder / "m.onnx"
    model.write_bytes(b"model bytes")
    command = [sys.executable, "-c", WAITING.format(ignored=ignored, seconds=seconds), str(model)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    assert not list(folder.glob("onnxprune-*"))
    return process.returncode, err


@pytest.mark.parametrize(
    ("name", "words"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "the terminal was closed")]
)
def test_signals_clean_up(name: str, words: str, tmp_path: Path) -> None:
    code, err = run_and_signal(tmp_path, name)
    assert (code, err) == (128 + getattr(signal, name), f"error: {words}\n")


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    code, err = run_and_signal(tmp_path, "SIGHUP", ignored=True, seconds=0.3)
    assert (code, err) == (5, "error: over\n")


def in_shell(text: str, folder: Path) -> tuple[int, str]:
    """Run ``{command}`` in a shell line; the exit code of the command itself, and stderr without stages."""
    text = text.replace("{command}", f"{sys.executable} -m onnxprune")
    done = subprocess.run(
        ["bash", "-c", f"{text}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd=folder
    )
    return done.returncode, "".join(line for line in done.stderr.splitlines(True) if not line.endswith(" ...\n"))


@pytest.mark.parametrize(
    ("end", "words"), [("> /dev/full", "no space left"), (">&-", "it is closed"), ("| head -0", "its reader closed it")]
)
@pytest.mark.parametrize("form", ["", "--json"])
def test_a_model_that_was_written_is_a_success_whatever_stdout_takes(
    end: str, words: str, form: str, tmp_path: Path
) -> None:
    shutil.copy(MODEL, tmp_path / "m.onnx")
    code, err = in_shell(f"{{command}} m.onnx --no-validate {form} {end}", tmp_path)
    assert code == 0
    assert err.startswith("warning: wrote m.pruned.onnx, but could not write the whole report to stdout: ")
    assert words in err and len(err.splitlines()) == 1
    onnx.checker.check_model(tmp_path / "m.pruned.onnx")


def test_a_report_that_nobody_gets_is_no_success(tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path / "m.onnx")
    for end, code in (("> /dev/full", 2), (">&-", 2), ("| head -0", 0)):
        found, err = in_shell(f"{{command}} inspect m.onnx {end}", tmp_path)
        assert (found, "Traceback" in err) == (code, False)
        assert err.startswith("error: cannot write the report to stdout" if code else "")
    assert in_shell("{command} --help > /dev/full", tmp_path)[0] == 2


METRICS = """
import os, sys, numpy as np, onnx
from onnx import numpy_helper
def size(path):
    return -float(sum(numpy_helper.to_array(t).size for t in onnx.load(path).graph.initializer))
def removing(path):
    value = size(path); os.remove(path); return value
def truncating(path):
    value = size(path); open(path, "wb").close(); return value
def wandering(path):
    os.chdir("/"); return size(path)
def leaving(path):
    sys.exit(0)
def interrupting(path):
    raise KeyboardInterrupt
def odd(path):
    raise GeneratorExit
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(MODEL, tmp_path / "m.onnx")
    (tmp_path / "metrics.py").write_text(METRICS)
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit()\n")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((8, 1, 8, 8), np.float32))
    return tmp_path


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", ["removing", "truncating", "wandering"])
def test_a_metric_has_files_of_its_own(name: str, external: bool, folder: Path) -> None:
    model = onnx.load(folder / "m.onnx")
    if external:
        (folder / "data").mkdir()
        onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="data/w.bin", size_threshold=0)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    here = Path.cwd()
    points = points_of_original(Analysis(folder / "m.onnx"), load_metric(f"{folder / 'metrics.py'}:{name}"))
    assert points == -sum(np.prod(t.dims) for t in model.graph.initializer)
    assert Path.cwd() == here
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["metrics.py:leaving", "metrics.py:interrupting", "metrics.py:odd", "leaves.py:x"])
def test_a_metric_that_ends_the_run_is_an_error(name: str, folder: Path) -> None:
    code, err = in_shell(f"{{command}} m.onnx --target params=0.8 --max-drop 5 --metric {name} --data x.npy", folder)
    assert code == 2
    assert "metric" in err.splitlines()[0] and len(err.splitlines()) == 2
    assert not (folder / "m.pruned.onnx").exists()


def test_no_folder_stays_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    code, _ = in_shell("{command} m.onnx --json > out.json", folder)
    assert code == 0 and json.loads((folder / "out.json").read_text())["exactness"]["passed"]
    assert not list((folder / "tmp").glob("onnxprune-*"))
