"""Two models compared, as typed: figures, verdict, gates, and errors for different interfaces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnxprune as op
from onnxprune.errors import BudgetError, UsageError

MODEL = Path(__file__).parents[2] / "models" / "residual.onnx"


def noisy(path: Path, size: float) -> Path:
    """The model with noise on its weights, as something else might have changed it."""
    model, rng = onnx.load(MODEL), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim > 1:
            changed = array * (1 + size * rng.standard_normal(array.shape))
            tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), tensor.name))
    onnx.save(model, path)
    return path


def test_equal_models_are_faithful(run) -> None:
    done = run("compare", MODEL, MODEL, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "plan  " not in run("compare", MODEL, MODEL).stdout
    assert facts["fidelity"]["points"] == 100 and facts["verdict"]["word"] == "faithful"
    assert facts["verdict"]["synthetic"] and "--data" not in facts["verdict"]["reason"]
    totals = facts["totals"]
    assert totals["bytes_before"] == totals["bytes_after"] > 0 and totals["macs_before"] == totals["macs_after"] > 0
    assert facts["latency"]["runs"] > 0


def test_points_fall_with_damage_and_gates_keep_the_report(run, tmp_path: Path) -> None:
    points = []
    for number, size in enumerate((0.02, 0.2, 2.0)):
        report = op.compare(MODEL, noisy(tmp_path / f"{number}.onnx", size), latency=False)
        assert report.fidelity is not None and report.fidelity.points is not None
        points.append(report.fidelity.points)
    assert points == sorted(points, reverse=True) and points[0] > 90 and points[-1] < 60
    done = run("compare", MODEL, tmp_path / "2.onnx", "--min-fidelity", "90", "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == 5 and "--min-fidelity 90" in record["error"]["message"]
    assert record["verdict"]["word"] == "damaged" and record["fidelity"]["points"] == pytest.approx(points[-1])
    done = run("compare", MODEL, tmp_path / "2.onnx", "--min-fidelity", "0.98")
    assert done.exit_code == 5 and "worst cosine" in done.stderr and done.stdout.startswith("verdict   damaged")
    done = run("compare", MODEL, tmp_path / "2.onnx", "--max-drop", "5")
    assert done.exit_code == 5 and "points of fidelity fell from 100" in done.stderr
    done = run("compare", MODEL, tmp_path / "2.onnx")
    assert done.exit_code == 0 and "warning: the model is damaged" in done.stderr


def test_a_metric_is_measured_on_both(run, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text("import os\ndef size(path):\n    return -os.path.getsize(path)\n")
    small = tmp_path / "small.onnx"
    op.prune(MODEL, ratio=0.5, latency=False).save(small)
    done = run("compare", MODEL, small, "--metric", f"{script}:size", "--max-drop", "0", "--json")
    metric = json.loads(done.stdout)["metric"]
    assert done.exit_code == 0 and metric["after"] > metric["before"] and metric["name"].endswith("score.py:size")
    done = run("compare", small, MODEL, "--metric", f"{script}:size", "--max-drop", "10")
    assert done.exit_code == 5 and "fell from" in done.stderr


TEXT = '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N,%s] %s) => (%s[N,%s] %s) { %s = Cast<to=%s>(%s) }'


def cast(size: str = "4", name: str = "x", element: str = "float", output: str = "y") -> onnx.ModelProto:
    number = {"float": "1", "int64": "7", "float16": "10"}[element]
    return onnx.parser.parse_model(TEXT % (size, name, element, size, output, output, number, name))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (cast(name="z"), "only the first has the input 'x'"),
        (cast(output="z"), "only the first has the output 'y'"),
        (cast("5"), "input 'x' has the shape [N, 4] in the first, [N, 5] in the second"),
        (cast(element="int64"), "output 'y' is float in the first, int64 in the second"),
    ],
)
def test_other_interfaces_are_refused(other: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        op.compare(cast(), other)
    assert "different interfaces" in caught.value.message and message in caught.value.message


def test_floats_may_be_shorter_and_free_sizes_fixed() -> None:
    report = op.compare(cast(), cast(element="float16"), latency=False)
    assert report.fidelity is not None and report.fidelity.points == pytest.approx(100, abs=0.1)
    assert op.compare(cast("M"), cast("4"), latency=False).fidelity is not None


def test_kinds_are_set_by_the_user(run) -> None:
    whole = json.loads(run("compare", MODEL, MODEL, "--json").stdout)
    (name,) = (output["output"] for output in whole["fidelity"]["outputs"])
    done = run("compare", MODEL, MODEL, "--output-kind", f"{name}=embedding:1", "--json")
    (output,) = json.loads(done.stdout)["fidelity"]["outputs"]
    assert (output["kind"], output["axis"]) == ("embedding", 1)
    done = run("compare", MODEL, MODEL, "--output-kind", f"{name}=classs")
    assert done.exit_code == 2 and "unknown kind 'classs'" in done.stderr
    for form in (["--output", f"{name}=classs"], [f"--output={name}=classs"]):  # a file is -o FILE or ends in .onnx
        done = run("compare", MODEL, MODEL, *form)
        assert done.exit_code == 2 and "unknown kind 'classs'" in done.stderr
    with pytest.raises(UsageError, match="not an axis"):
        op.compare(MODEL, MODEL, outputs={name: "classes:last"})


def test_an_error_of_a_gate_has_the_report(tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        op.compare(MODEL, noisy(tmp_path / "n.onnx", 2.0), min_fidelity=99, latency=False)
    assert caught.value.report.fidelity.points < 99
