"""Libraries of custom operators: registered in every session, named where they are missing or do not load."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from click.testing import CliRunner
from onnx import TensorProto, helper

import onnxprune as op
from onnxprune.cli import main
from onnxprune.runtime import sessions

MODEL = Path(__file__).parents[2] / "models" / "residual.onnx"
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

# It registers no operator, and writes a letter to a file whenever a session asks it to.
SOURCE = """
#include <stdio.h>
void *RegisterCustomOps(void *options, const void *api) {
    FILE *file = fopen("%s", "a");
    if (file) { fputc('x', file); fclose(file); }
    return NULL;
}
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    source, target = tmp_path / "ops.c", tmp_path / "libops.so"
    source.write_text(SOURCE % (tmp_path / "calls"))
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", target, source], check=True)
    return target


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every session that is opened."""
    numbers: list[int] = []
    plain = ort.InferenceSession

    def session(*args, **kwargs):
        numbers.append(len(numbers))
        return plain(*args, **kwargs)

    monkeypatch.setattr(sessions.ort, "InferenceSession", session)
    return numbers


def calls(library: Path) -> int:
    return len(library.with_name("calls").read_text())


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    """Two convolutions, quick to prune."""
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16))
    return net.model(net.conv(x, 16, 8))


DATA = np.random.default_rng(0).random((16, 3, 6, 6), np.float32)


@needs_compiler
@pytest.mark.parametrize(
    ("call", "given"),
    [
        (op.prune, {"ratio": 0.3, "latency": False}),
        (op.prune, {"ratio": 0.3, "criterion": "wanda", "data": DATA, "latency": False}),
        (op.prune, {"target": "macs=0.8", "trials": 1, "data": DATA, "latency": False}),
        (op.factorize, {"method": "svd", "rank": 4, "latency": False}),
        (op.profile, {"seconds": 0.1}),
        (op.sensitivity, {"ratios": [0.5]}),
        (op.sweep, {"targets": [0.8], "trials": 0, "latency": False}),
    ],
    ids=["prune", "recover", "budget", "factorize", "profile", "sensitivity", "sweep"],
)
def test_every_session_knows_the_library(
    library: Path, opened: list[int], small: onnx.ModelProto, call: Callable[..., object], given: dict[str, Any]
) -> None:
    sessions.refers()  # asked once per process
    before = len(opened)
    if call in (op.profile, op.sensitivity):
        given = {**given, "cache": library.parent / "kept"}
    call(small, **given, custom_op_libraries=[library])
    made = len(opened) - before
    assert made > 0
    assert made < calls(library) <= made + 4  # the library is tried before the work starts
    assert sessions.libraries() == ()


@needs_compiler
def test_threads_and_workers_know_the_library(library: Path, small: onnx.ModelProto) -> None:
    with sessions.custom_ops([library]):
        assert set(sessions.spread(lambda _: sessions.libraries(), [1, 2, 3])) == {(str(library.resolve()),)}
    op.sensitivity(small, ratios=[0.5, 0.25], jobs=2, cache=library.parent, custom_op_libraries=[library])
    assert calls(library) > 4
    assert sessions.libraries() == ()


@needs_compiler
def test_the_command_registers_libraries(library: Path, tmp_path: Path) -> None:
    arguments = [str(MODEL), "--ratio", "0.3", "-o", str(tmp_path / "small.onnx"), "-q"]
    result = CliRunner().invoke(main, [*arguments, "--custom-op-library", str(library)])
    assert result.exit_code == 0, result.stderr
    assert calls(library) > 3


def test_a_library_that_is_missing_or_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    cases = [("none.so", "is not there"), ("text.so", "cannot be loaded"), (".", "is a folder")]
    for name, message in cases:
        with pytest.raises(op.UsageError, match=message) as caught:
            op.prune(MODEL, custom_op_libraries=[tmp_path / name])
        assert caught.value.argument == "custom_op_libraries"
    with pytest.raises(op.UsageError, match="is not allowed"):
        op.prune(MODEL, custom_op_libraries=5)  # type: ignore[arg-type]
    for name in ("text.so", "none.so"):
        out = tmp_path / "small.onnx"
        result = CliRunner().invoke(main, [str(MODEL), "-o", str(out), "--custom-op-library", str(tmp_path / name)])
        assert result.exit_code == 2 and name in result.stderr and "Traceback" not in result.stderr
        assert not out.exists()


def test_an_operator_without_a_kernel_names_the_setting() -> None:
    graph = helper.make_graph(
        [helper.make_node("Odd", ["x"], ["y"], domain="com.acme")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.acme", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    with pytest.raises(op.ModelError, match="Odd") as caught:
        sessions.open_session(model.SerializeToString())
    assert "custom_op_libraries" in caught.value.hint
