"""Repair on the command line: after a cut, and of a pair that was cut before; what bad input is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import TensorProto, helper, numpy_helper

import onnxprune as op

Run = Callable[..., Result]
MODELS = Path(__file__).resolve().parents[2] / "models"


def net(hidden: int = 16, seed: int = 0) -> onnx.ModelProto:
    """Two convolutions, a pool and a Gemm on 8x8 positions; the second half of the hidden channels says little."""
    draw = np.random.default_rng(seed)
    shapes = {"w1": (hidden, 3, 3, 3), "w2": (24, hidden, 3, 3), "b2": (24,), "w3": (10, 24), "b3": (10,)}
    weights = {name: draw.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    weights["w1"][hidden // 2 :] *= 0.5
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="second", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Bench:
    """A folder with a model, data, and with a cut of it and the plan of that cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.data, self.cut, self.plan = (folder / n for n in ("m.onnx", "d.npz", "c.onnx", "p.json"))
        onnx.save(net(), self.model)
        np.savez(self.data, x=np.random.default_rng(1).random((96, 3, 8, 8), np.float32))
        result = op.prune(self.model, ratio=0.5, latency=False)
        result.save(self.cut)
        result.plan.save(self.plan)
        self.before = self.files()

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}

    @property
    def pair(self) -> list[Any]:
        return ["recover", self.model, self.cut, "--plan", self.plan, "--data", self.data]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Bench(tmp_path_factory.mktemp("bench")).folder


@pytest.fixture
def bench(made: Path, tmp_path: Path) -> Bench:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    bench = Bench.__new__(Bench)
    bench.folder = tmp_path
    bench.model, bench.data, bench.cut, bench.plan = (tmp_path / n for n in ("m.onnx", "d.npz", "c.onnx", "p.json"))
    bench.before = bench.files()
    return bench


def refused(bench: Bench, result: Result, code: int, *words: str) -> None:
    """The exit code, an ``error:`` line with these words, and not a file more or less."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == "" and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert bench.files() == bench.before


# -- after a cut ---------------------------------------------------------------------------------------------------


def test_data_repairs_and_the_report_says_so(bench: Bench, run: Run) -> None:
    result = run(bench.model, "--ratio", "0.5", "--data", bench.data, "-v", "--explain")
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("recovered"))
    assert "2 of 2 layers by least squares from 87 samples, --recover full because data was given" in line
    assert "9 samples" in result.stdout and "not used by the recovery" in result.stdout
    assert "hold-out error" in result.stdout and "every layer affected by pruning was recovered" in result.stdout
    assert "recover ..." in result.stderr


def test_the_record_of_a_repair(bench: Bench, run: Run) -> None:
    report = json.loads(run(bench.model, "--ratio", "0.5", "--data", bench.data, "--json").stdout)
    facts = report["recovery"]
    assert (facts["mode"], facts["why"], facts["samples"], facts["aside"]) == ("full", "data was given", 87, 9)
    before, after = (facts[key]["outputs"][0]["cosine"] for key in ("before", "after"))
    assert after > before and after == report["fidelity"]["outputs"][0]["cosine"]
    assert report["exactness"]["passed"] is True
    assert {r["layer"] for r in report["repairs"] if r["how"].startswith("lstsq")} == {"second", "head"}
    assert all(r["after"] <= r["before"] for r in report["repairs"])


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "no data was given; give --data to recover accuracy, or --recover datafree (weaker, needs no data)"),
        (["--data", "d.npz", "--recover", "none"], "--recover none"),
        (["--data", "d.npz", "--no-validate"], "models are not run"),
        (["--recover", "none"], "--recover none"),
    ],
)
def test_no_repair_and_why(bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch, args: list[str], why: str) -> None:
    monkeypatch.chdir(bench.folder)
    result = run(bench.model, "--ratio", "0.5", "--criterion", "l2", *args)
    assert result.exit_code == 0, result.stderr
    assert f"recovered no: {why}\n" in result.stdout
    assert bench.folder.joinpath("m.pruned.onnx").read_bytes() == bench.before["c.onnx"]


@pytest.mark.parametrize(("mode", "words"), [("bias", "by output means"), ("bn", "by scale and shift")])
def test_a_mode_is_used(bench: Bench, run: Run, mode: str, words: str) -> None:
    result = run(bench.model, "--ratio", "0.5", "--data", bench.data, "--recover", mode)
    assert result.exit_code == 0 and words in result.stdout and "since" not in result.stdout


def test_a_repair_without_data_says_that_it_is_the_weaker_form(bench: Bench, run: Run) -> None:
    args = [bench.model, "--ratio", "0.5", "--recover", "datafree"]
    result = run(*args, "--memory-limit", "2GB")
    assert result.exit_code == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("recovered"))
    assert (
        "2 of 2 layers by least squares from 448 synthetic inputs (range" in line and "(--data recovers more)" in line
    )
    assert "synthetic, not used by the recovery" in result.stdout and "--data" in line
    facts = json.loads(run(*args, "--json").stdout)["recovery"]
    assert facts["mode"] == "datafree" and facts["inputs"].startswith("synthetic inputs")
    assert facts["after"]["outputs"][0]["cosine"] > facts["before"]["outputs"][0]["cosine"]


def test_a_repair_without_data_is_compared_on_data(bench: Bench, run: Run) -> None:
    result = run(bench.model, "--ratio", "0.5", "--recover", "datafree", "--data", bench.data, "--json", "-q")
    facts = json.loads(result.stdout)["recovery"]
    assert (facts["samples"], facts["aside"], facts["after"]["samples"]) == (512, 96, 96)
    assert facts["after"]["source"] == str(bench.data)


def test_a_pair_is_repaired_without_data(bench: Bench, run: Run) -> None:
    pair = ["recover", bench.model, bench.cut, "--plan", bench.plan, "--recover", "datafree"]
    result = run(*pair)
    assert result.exit_code == 0, result.stderr
    assert "(--data recovers more)" in result.stdout
    once = bench.folder / "once.onnx"
    assert run(bench.model, "--ratio", "0.5", "--recover", "datafree", "-o", once).exit_code == 0
    assert bench.folder.joinpath("c.recovered.onnx").read_bytes() == once.read_bytes()


def test_criteria_that_need_data_need_them_still(bench: Bench, run: Run) -> None:
    refused(bench, run(bench.model, "--recover", "datafree", "--criterion", "wanda"), 2, "wanda", "--data")


def test_little_memory_gives_the_same(bench: Bench, run: Run) -> None:
    for name, limit in (("a.onnx", "1MB"), ("b.onnx", "1.5 GiB")):
        args = ["--ratio", "0.5", "--data", bench.data, "--memory-limit", limit, "-o", bench.folder / name]
        assert run(bench.model, *args).exit_code == 0
    assert bench.folder.joinpath("a.onnx").read_bytes() == bench.folder.joinpath("b.onnx").read_bytes()


def test_statistics_are_kept_and_used_again(bench: Bench, run: Run) -> None:
    kept = bench.folder / "new" / "kept"
    args = [bench.model, "--criterion", "wanda", "--data", bench.data, "--cache", kept, "--recover", "none"]
    assert run(*args, "-o", bench.folder / "a.onnx").exit_code == 0
    (file,) = kept.iterdir()
    stamp = file.stat().st_mtime_ns
    assert run(*args, "-o", bench.folder / "b.onnx").exit_code == 0
    assert [(f, f.stat().st_mtime_ns) for f in kept.iterdir()] == [(file, stamp)]
    assert bench.folder.joinpath("a.onnx").read_bytes() == bench.folder.joinpath("b.onnx").read_bytes()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--recover", "full"], ["--recover full needs calibration data", "--data", "datafree"]),
        (["--recover", "lstq", "--data", "d.npz"], ["unknown value 'lstq'", "Did you mean 'lstsq'?"]),
        (["--memory-limit", "2", "--data", "d.npz"], ["--memory-limit: '2' is not a size", "2GB"]),
        (["--memory-limit", "2 apples", "--data", "d.npz"], ["is not a size"]),
        (["--memory-limit", "1kB", "--data", "d.npz"], ["too little", "1MB"]),
        (["--memory-limit", "2GB"], ["--data is not given"]),
        (["--cache", "kept"], ["--data is not given"]),
        (["--cache", "p.json", "--data", "d.npz"], ["is not a folder"]),
    ],
)
def test_options_that_make_no_sense(
    bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch, args: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(bench.folder)
    refused(bench, run(bench.model, *args), 2, *words)


def test_few_or_constant_samples_are_warned_of(bench: Bench, run: Run) -> None:
    np.savez(bench.data, x=np.ones((20, 3, 8, 8), np.float32))
    result = run(bench.model, "--ratio", "0.5", "--data", bench.data, "--json")
    assert result.exit_code == 0, result.stderr
    assert "recovery has only 18 samples" in result.stderr and "all calibration samples are the same" in result.stderr
    facts = json.loads(result.stdout)["recovery"]
    assert facts["after"]["outputs"][0]["snr_db"] >= facts["before"]["outputs"][0]["snr_db"]


def test_one_sample_does_no_harm(bench: Bench, run: Run) -> None:
    np.savez(bench.data, x=np.random.default_rng(2).random((1, 3, 8, 8), np.float32))
    result = run(bench.model, "--ratio", "0.5", "--data", bench.data)
    assert result.exit_code == 0, result.stderr
    assert "also used by the recovery" in result.stdout and "recovery has only 1 sample," in result.stderr


# -- a pair that was cut before ------------------------------------------------------------------------------------


def test_a_pair_is_repaired_as_it_would_have_been_at_once(bench: Bench, run: Run) -> None:
    result = run(*bench.pair)
    assert result.exit_code == 0, result.stderr
    assert "not checked: came as a file, its weights are the original's\n" in result.stdout
    assert result.stdout.endswith(f"wrote     {bench.folder / 'c.recovered.onnx'}\n")
    once = bench.folder / "once.onnx"
    once_args = ["--ratio", "0.5", "--criterion", "l2", "--data", bench.data]
    assert run(bench.model, *once_args, "-o", once).exit_code == 0
    assert bench.folder.joinpath("c.recovered.onnx").read_bytes() == once.read_bytes()
    assert {n: c for n, c in bench.files().items() if n in bench.before} == bench.before


def test_the_record_of_a_pair(bench: Bench, run: Run) -> None:
    out = bench.folder / "o.onnx"
    result = run(*bench.pair, "-o", out, "--recover", "lstsq", "--json", "-q")
    record = json.loads(result.stdout)
    assert (record["cut"], record["plan"], record["output"]) == (str(bench.cut), str(bench.plan), str(out))
    assert record["recovery"]["mode"] == "lstsq" and record["exactness"]["passed"] is None
    assert record["totals"]["params_after"] < record["totals"]["params_before"]
    assert result.stderr == ""


def test_weights_that_were_trained_further_are_the_start(bench: Bench, run: Run) -> None:
    """Trained weights of a layer that keeps its input say more than the original's: they are not thrown away."""
    model = onnx.load(bench.cut)
    (bias,) = (t for t in model.graph.initializer if t.name == "b3")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, "b3"))
    onnx.save(model, bench.cut)
    result = run(*bench.pair, "--recover", "bias", "--json")
    record = json.loads(result.stdout)
    assert record["exactness"]["note"] == "came as a file, 1 of its 5 weights were changed"
    head = next(r for r in record["repairs"] if r["layer"] == "head")
    assert head["how"] == "bias" and head["before"] > 100 * head["after"]


def test_a_repaired_model_can_be_repaired_again(bench: Bench, run: Run) -> None:
    first, second = bench.folder / "1.onnx", bench.folder / "2.onnx"
    assert run(*bench.pair, "-o", first).exit_code == 0
    result = run("recover", bench.model, first, "--plan", bench.plan, "--data", bench.data, "-o", second, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    before, now = (record[key] for key in ("recovery", "fidelity"))
    assert now["outputs"][0]["snr_db"] >= before["before"]["outputs"][0]["snr_db"] - 0.1


def test_a_gate_on_a_repair_writes_nothing(bench: Bench, run: Run) -> None:
    result = run(*bench.pair, "--min-fidelity", "1")
    assert result.exit_code == 5 and "below --min-fidelity 1" in result.stderr
    assert bench.files() == bench.before


def other_plan(bench: Bench, change: Callable[[dict[str, Any]], None]) -> None:
    plan = json.loads(bench.plan.read_text())
    change(plan)
    bench.plan.write_text(json.dumps(plan))
    bench.before = bench.files()


def test_a_plan_of_another_model(bench: Bench, run: Run) -> None:
    other_plan(bench, lambda plan: plan.update(model_sha256="0" * 64))
    refused(bench, run(*bench.pair), 2, "belongs to another model")


def test_a_plan_of_another_cut_names_the_tensor(bench: Bench, run: Run) -> None:
    def less(plan: dict[str, Any]) -> None:
        plan["groups"] = plan["groups"][:1]

    other_plan(bench, less)
    result = run(*bench.pair)
    refused(bench, result, 2, "does not belong to this pair", "by the plan it has")
    assert "'w2'" in result.stderr or "'w3'" in result.stderr


def test_the_pair_in_the_wrong_order(bench: Bench, run: Run) -> None:
    args = ["recover", bench.cut, bench.model, "--plan", bench.plan, "--data", bench.data]
    refused(bench, run(*args), 2, "belongs to another model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.graph.node[1].output.__setitem__(0, "zz"), "has no tensor 'r1'"),
        (lambda model: setattr(model.graph.node[1], "op_type", "Sigmoid"), "tensor 'r1' comes from Sigmoid"),
        (
            lambda model: model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "more")),
            "has an additional tensor 'more'",
        ),
    ],
)
def test_a_cut_of_something_else(bench: Bench, run: Run, change: Callable[[onnx.ModelProto], None], words: str) -> None:
    model = onnx.load(bench.cut)
    change(model)
    if "'r1'" in words and "no tensor" in words:
        model.graph.node[2].input[0] = "zz"
    bench.cut.write_bytes(model.SerializeToString())
    bench.before = bench.files()
    refused(bench, run(*bench.pair), 2, "does not belong to this pair", words)


def test_what_a_pair_needs(bench: Bench, run: Run) -> None:
    pair = ["recover", bench.model, bench.cut]
    refused(bench, run(*pair, "--data", bench.data), 2, "--plan is missing")
    refused(bench, run(*pair, "--plan", bench.plan), 2, "--data is missing", "--recover datafree")
    refused(bench, run(*pair, "--plan", bench.folder / "q.json", "--data", bench.data), 2, "not found", "p.json")
    refused(bench, run("recover", bench.model, "--plan", bench.plan, "--data", bench.data), 2, "CUT.onnx")
    refused(bench, run(*bench.pair, "--recover", "none"), 2, "unknown value 'none'")


def test_data_that_do_not_fit(bench: Bench, run: Run) -> None:
    np.savez(bench.data, x=np.zeros((20, 3, 8), np.float32))
    bench.before = bench.files()
    refused(bench, run(*bench.pair), 2, "x")
    refused(bench, run(bench.model, "--data", bench.data), 2, "x")


@pytest.mark.parametrize("name", ["m.onnx", "c.onnx", "p.json", "d.npz"])
def test_a_repair_overwrites_nothing_that_it_reads(bench: Bench, run: Run, name: str) -> None:
    refused(bench, run(*bench.pair, "-o", bench.folder / name), 2, "never changed")


def test_a_repair_that_fails_leaves_an_earlier_output(bench: Bench, run: Run) -> None:
    out = bench.folder / "o.onnx"
    out.write_bytes(b"earlier")
    bench.cut.write_bytes(b"no model")
    bench.before = bench.files()
    refused(bench, run(*bench.pair, "-o", out), 3)
