"""The command as a user runs it, on real model files: what is cut, what is written, what bad input is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import Result
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnxprune.api")

Run = Callable[..., Result]


def net(*, batch: int | str = "N", extra: list[onnx.NodeProto] | None = None, seed: int = 0) -> onnx.ModelProto:
    """Two convolutions, a pool and a Gemm: 3 -> 16 -> 32 -> 10 channels on 8x8 positions."""
    draw = np.random.default_rng(seed)
    shapes = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 3, 3), "b2": (32,), "w3": (10, 32), "b3": (10,)}
    weights = {name: draw.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="second", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        [*nodes, *(extra or [])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "net.onnx"
    onnx.save(net(), target)
    return target


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer}


def refused(result: Result, code: int, *words: str) -> None:
    """A clear error: the exit code, an ``error:`` line with these words, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word.lower() in result.stderr.lower()


def test_a_model_is_cut_verified_and_written(path: Path, run: Run) -> None:
    before = path.read_bytes()
    result = run(path, "--ratio", "0.25", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    output = path.with_name("net.pruned.onnx")
    assert shapes(output) == {
        "w1": (12, 3, 3, 3),
        "b1": (12,),
        "w2": (24, 12, 3, 3),
        "b2": (24,),
        "w3": (10, 24),
        "b3": (10,),
    }
    assert path.read_bytes() == before
    assert report["exactness"]["passed"] is True and report["exactness"]["batches"] == [2, 3, 1]
    assert report["totals"]["params_before"] == 5418 and report["totals"]["params_after"] == 3202
    assert report["totals"]["bytes_after"] == output.stat().st_size
    assert report["latency"]["runs"] > 0
    session = onnxruntime.InferenceSession(output)
    assert session.get_inputs()[0].shape == ["N", 3, 8, 8]
    assert session.run(None, {"x": np.zeros((5, 3, 8, 8), np.float32)})[0].shape == (5, 10)


def test_report_for_people(path: Path, run: Run) -> None:
    text = run(path, "--ratio", "0.25", "--explain", "-v").stdout
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert any(row.startswith("first Conv 16 → 12 448 → 336") for row in rows)
    assert any(row.startswith("params 5.42 K → 3.20 K 40.9 % less") for row in rows)
    assert "exact     yes" in text and re.search(r"^speed .*\d ms, \d threads?$", text, re.MULTILINE)
    assert "model output" in text


def test_plan_can_be_written_edited_and_applied(path: Path, run: Run) -> None:
    plan, first, second = (path.with_name(name) for name in ("plan.json", "a.onnx", "b.onnx"))
    assert run(path, "--plan", plan, "-o", first, "--criterion", "l1").exit_code == 0
    record = json.loads(plan.read_text())
    assert record["version"] == 1 and record["criterion"] == "l1"
    assert run(path, "--apply-plan", plan, "-o", second).exit_code == 0
    assert first.read_bytes() == second.read_bytes()


def test_layer_ratios_and_exclusions(path: Path, run: Run) -> None:
    assert run(path, "--layer", "b1=0.5", "--exclude", "b2").exit_code == 0
    found = shapes(path.with_name("net.pruned.onnx"))
    assert (found["w1"], found["w2"]) == ((8, 3, 3, 3), (32, 8, 3, 3))


def test_round_to(path: Path, run: Run) -> None:
    assert run(path, "--ratio", "0.4", "--round-to", "8").exit_code == 0
    found = shapes(path.with_name("net.pruned.onnx"))
    assert all(found[name][0] % 8 == 0 for name in ("w1", "w2"))


def test_inspect(path: Path, run: Run) -> None:
    record = json.loads(run("inspect", path, "--json").stdout)
    assert sorted(group["size"] for group in record["groups"] if group["prunable"]) == [16, 32]
    assert {layer["name"]: layer["macs_before"] for layer in record["layers"]}["first"] % (16 * 27 * 64) == 0
    text = run("inspect", path).stdout
    assert "Prunable groups (2)" in text and "Barriers" in text


def test_as_a_script_with_pipes(path: Path) -> None:
    command = [sys.executable, "-m", "onnxprune", path.name, "--ratio", "0.5"]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "wrote     net.pruned.onnx"


def test_gate_writes_nothing(path: Path, run: Run) -> None:
    result = run(path, "--ratio", "0.9", "--min-fidelity", "0.9999")
    assert result.exit_code == 5
    assert [entry.name for entry in path.parent.iterdir()] == ["net.onnx"]


def test_data_of_the_user(path: Path, run: Run) -> None:
    data = path.with_name("data.npz")
    np.savez(data, x=np.random.default_rng(1).random((6, 3, 8, 8), np.float32))
    report = json.loads(run(path, "--data", data, "--json").stdout)
    assert "data.npz" in report["fidelity"]["source"] and report["fidelity"]["samples"] == 6


CONTENT = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "text": lambda good: b"this is not a model\n" * 50,
    "image": lambda good: b"\x89PNG\r\n\x1a\n" + bytes(200),
    "zeros": lambda good: bytes(1000),
}


@pytest.mark.parametrize("kind", sorted(CONTENT))
@pytest.mark.parametrize("command", [[], ["inspect"]], ids=["prune", "inspect"])
def test_file_that_is_no_model(path: Path, run: Run, kind: str, command: list[str]) -> None:
    path.write_bytes(CONTENT[kind](path.read_bytes()))
    refused(run(*command, path), 3)
    assert [entry.name for entry in path.parent.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("what", ["ir", "opset"])
def test_version_from_the_future(path: Path, run: Run, what: str) -> None:
    model = net()
    if what == "ir":
        model.ir_version = 999
    else:
        model.opset_import[0].version = 999
    onnx.save(model, path)
    refused(run(path), 3, "999")


@pytest.mark.parametrize("what", ["missing", "short", "leaving"])
def test_external_data(path: Path, run: Run, what: str) -> None:
    onnx.save(net(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    data = path.with_name("net.data")
    if what == "missing":
        data.unlink()
    elif what == "short":
        data.write_bytes(data.read_bytes()[:100])
    else:
        inner = path.parent / "inner"
        inner.mkdir()
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../net.data"
        path = inner / "net.onnx"
        path.write_bytes(model.SerializeToString())
    refused(run(path), 3, "net.data")
    assert not path.with_name("net.pruned.onnx").exists()


def test_external_data_of_the_right_kind(path: Path, run: Run) -> None:
    onnx.save(net(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert run(path, "-o", path.with_name("small.onnx")).exit_code == 0
    assert shapes(path.with_name("small.onnx"))["w1"] == (11, 3, 3, 3)


def test_output_equal_to_input_by_any_name(path: Path, run: Run) -> None:
    link = path.with_name("link.onnx")
    link.symlink_to(path)
    before = path.read_bytes()
    for other in (path, path.parent / "." / path.name, link):
        refused(run(path, "-o", other), 2)
    assert path.read_bytes() == before


def test_output_that_cannot_be_written(path: Path, run: Run) -> None:
    refused(run(path, "-o", path.parent / "nowhere" / "x.onnx"), 2, "nowhere")
    refused(run(path, "-o", path.parent), 2)
    refused(run(path, "-o", path / "x.onnx"), 2)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_output_folder_that_is_read_only(path: Path, run: Run) -> None:
    path.parent.chmod(0o500)
    try:
        refused(run(path), 2)
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize("flag", ["--exclude", "--include", "--layer"])
def test_pattern_that_matches_nothing_names_the_nearest(path: Path, run: Run, flag: str) -> None:
    refused(run(path, flag, "secnd=0.1" if flag == "--layer" else "secnd"), 2, "secnd", "second")


def test_unknown_input_name_is_named(path: Path, run: Run) -> None:
    refused(run(path, "--input-shape", "xx=2,3,8,8"), 2, "xx")
    refused(run(path, "--input-shape", "x=2,4,8,8"), 2, "x")
    refused(run(path, "--input-shape", "x=2,3"), 2, "x")


PLANS = {
    "not json": lambda record: "{",
    "not a plan": lambda record: "[1, 2]",
    "other version": lambda record: json.dumps({**record, "version": 99}),
    "other model": lambda record: json.dumps({**record, "model_sha256": "0" * 64}),
    "out of range": lambda record: _edited(record, removed=[99]),
    "negative": lambda record: _edited(record, removed=[-1]),
    "not a number": lambda record: _edited(record, removed=["a"]),
    "unknown tensor": lambda record: _edited(record, tensor="nowhere"),
}


def _edited(record: dict[str, Any], **change: object) -> str:
    """The plan with one slot of its first group changed, and the group's own list with it."""
    group = record["groups"][0]
    group["slots"][0].update(change)
    if "removed" in change:
        group["removed"] = change["removed"]
    return json.dumps(record)


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_plan_that_does_not_fit(path: Path, run: Run, kind: str) -> None:
    plan, output = path.with_name("plan.json"), path.with_name("net.pruned.onnx")
    assert run(path, "--plan", plan).exit_code == 0
    output.unlink()
    plan.write_text(PLANS[kind](json.loads(plan.read_text())))
    refused(run(path, "--apply-plan", plan), 2)
    assert not output.exists()


DATA = {
    "name": {"z": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(2, np.int64)},
    "shape": {"x": np.zeros((2, 4, 8, 8), np.float32)},
    "rank": {"x": np.zeros((2, 3), np.float32)},
    "type": {"x": np.array(["a", "b"])},
}


@pytest.mark.parametrize("kind", sorted(DATA))
def test_data_that_does_not_fit(path: Path, run: Run, kind: str) -> None:
    data = path.with_name("data.npz")
    np.savez(data, **DATA[kind])
    refused(run(path, "--data", data), 2)


def test_data_that_is_no_data(path: Path, run: Run) -> None:
    data = path.with_name("data.npz")
    data.write_bytes(b"nonsense")
    refused(run(path, "--data", data), 2, "data.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(path: Path, run: Run, value: float) -> None:
    model = net()
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] = value
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    onnx.save(model, path)
    result = run(path)
    assert result.exit_code in (2, 3)
    assert "w1" in result.stderr
    assert not path.with_name("net.pruned.onnx").exists()


def test_nothing_to_cut_is_5_with_the_reasons(path: Path, run: Run) -> None:
    weight = numpy_helper.from_array(np.ones((4, 6), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="only")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    result = run(path)
    refused(result, 5, "output")
    assert not path.with_name("net.pruned.onnx").exists()


def test_operator_without_kernel_needs_no_validate(path: Path, run: Run) -> None:
    odd = helper.make_node("Odd", ["y"], ["z"], name="odd", domain="vendor")
    model = net(extra=[odd])
    model.opset_import.append(helper.make_opsetid("vendor", 1))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 10]))
    onnx.save(model, path)
    strict = run(path)
    assert strict.exit_code in (3, 4) and "--no-validate" in strict.stderr
    assert path.name in strict.stderr  # the user's file is named, not one of ours
    assert not path.with_name("net.pruned.onnx").exists()
    free = run(path, "--no-validate")
    assert free.exit_code == 0, free.stderr
    assert shapes(path.with_name("net.pruned.onnx"))["w1"] == (11, 3, 3, 3)


@pytest.mark.lenient  # a damaged graph may contradict itself, and a rule may stumble over that
@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_never_crash_and_never_cut_wrong(path: Path, run: Run, seed: int) -> None:
    draw = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    # The last third is weights, where a flip is only another model: aim at the structure around them as well.
    spots = [int(draw.integers(len(content))), int(draw.integers(400)), len(content) - 1 - int(draw.integers(200))]
    for spot in spots[: 1 + seed % 3]:
        content[spot] ^= 1 << int(draw.integers(8))
    path.write_bytes(bytes(content))
    result = run(path)
    assert result.exit_code in (0, 2, 3, 4, 5), result.stderr
    assert "not exact" not in result.stderr
    assert "internal error" not in result.stderr and "Traceback" not in result.stderr
    assert path.with_name("net.pruned.onnx").exists() == (result.exit_code == 0)


TRAINED = Path(__file__).parents[2].parent / "shared" / "trained" / "models"


@pytest.mark.skipif(not TRAINED.is_dir(), reason="the trained models are not here")
@pytest.mark.parametrize("name", ["cifar10_resnet20", "mlperf_kws_dscnn", "ezkl_multihead_attention"])
def test_trained_models(tmp_path: Path, run: Run, name: str) -> None:
    path = tmp_path / f"{name}.onnx"
    shutil.copyfile(TRAINED / path.name, path)
    result = run(path)
    assert result.exit_code == 0, result.stderr
    assert "exact     yes" in result.stdout
    assert re.search(r"params +.+ → .+ \d+(\.\d)? % less", result.stdout)


def test_a_pattern_that_is_part_of_a_name_is_told_how_to_match(path: Path, run: Run) -> None:
    result = run(path, "--exclude", "ea")
    assert result.exit_code == 2
    assert "--exclude 'ea' matches no node or weight" in result.stderr
    assert "A pattern matches whole names. Did you mean '*ea*'?" in result.stderr
