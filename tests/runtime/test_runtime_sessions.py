from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from runtime_models import model

import onnxprune as op
from onnxprune.errors import ModelError
from onnxprune.passes import workspace
from onnxprune.runtime import latency
from onnxprune.runtime.sessions import input_specs, open_session, refers, run, shorten


def test_specs_name_types_and_dynamic_dimensions() -> None:
    session = open_session(
        model("agraph (float[N,3,?] x, int64[2] i, string[N] s, bfloat16 b) => (float[N,3,?] y) { y = Identity(x) }")
    )
    x, i, s, b = input_specs(session)
    assert (x.name, x.dtype, x.shape) == ("x", np.dtype(np.float32), ("N", 3, None))
    assert (i.dtype, i.shape) == (np.dtype(np.int64), (2,))
    assert (s.dtype, s.shape) == (np.dtype(object), ("N",))
    assert (b.dtype, b.shape) == (np.dtype(ml_dtypes.bfloat16), ())


def test_initializers_listed_as_inputs_are_no_inputs() -> None:
    text = "agraph (float[N,3] x, float[3] w) => (float[N,3] y) { y = Add(x, w) }"
    session = open_session(model(text, w=np.ones(3, np.float32)))
    assert [spec.name for spec in input_specs(session)] == ["x"]


@pytest.mark.parametrize("outside", [False, True])
def test_large_models_are_held_once(outside: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every session of a check of a large model goes without packed copies and without an arena, and no other. Weights
    stay in the user's file where a runtime can map them, and are copied once, not per session, where it cannot."""
    text = "agraph (float[N,64] x) => (float[N,3] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    draw = np.random.default_rng(0)
    arrays = {"a": draw.normal(size=(64, 128)), "b": draw.normal(size=(128, 3))}
    small = model(text, **{name: array.astype(np.float32) for name, array in arrays.items()})
    path = tmp_path / "m.onnx"
    path.write_bytes(small)
    if outside:
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.iterdir()}
    seen: list[tuple[bool, str]] = []
    folders: list[str] = []
    real = ort.InferenceSession

    def entry(options: ort.SessionOptions, key: str) -> str:
        with suppress(RuntimeError):
            return str(options.get_session_config_entry(key))
        return ""

    def spy(source: object, options: ort.SessionOptions, **rest: object) -> ort.InferenceSession:
        seen.append((options.enable_cpu_mem_arena, entry(options, "session.disable_prepacking")))
        folders.append(entry(options, "session.model_external_initializers_file_folder_path"))
        assert not isinstance(source, bytes) or len(source) < 4096
        return real(source, options, **rest)

    refers()
    monkeypatch.setattr(ort, "InferenceSession", spy)
    monkeypatch.setattr("onnxprune.runtime.sessions.HEAVY", 0)
    monkeypatch.setattr(workspace, "_LIGHT", 0 if not refers() else 2048)
    assert op.prune(path, ratio=0.5, latency=False).report.exactness.passed
    assert seen and set(seen) == {(False, "1")}
    if refers():
        assert (str(tmp_path) in folders) is outside and any(folders)
    assert {f.name: (f.stat().st_mtime_ns, f.stat().st_size) for f in tmp_path.iterdir()} == before
    seen.clear()
    monkeypatch.setattr("onnxprune.runtime.sessions.HEAVY", 1 << 30)
    monkeypatch.setattr(workspace, "_LIGHT", 0)
    assert op.prune(path, ratio=0.5).report.exactness.passed
    assert {arena for arena, _ in seen} == {True}


def test_sequence_input_is_refused_with_its_type() -> None:
    session = open_session(model("agraph (seq(float[2]) x) => (float[N] y) { y = ConcatFromSequence<axis=0>(x) }"))
    with pytest.raises(ModelError, match=r"'x' has type seq\(tensor\(float\)\)"):
        input_specs(session)


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("agraph (float[N] x) => (float[N] y) { y = vendor.Foo(x) }", "vendor:Foo"),
        ("agraph (bfloat16[N] x) => (bfloat16[N] y) { y = Add(x, x) }", "Add"),
    ],
)
def test_operator_without_kernel_is_named_with_the_way_out(text: str, operator: str) -> None:
    with pytest.raises(ModelError, match=f"no kernel for operator '{operator}'") as caught:
        open_session(model(text))
    assert "validate=False" in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\x08"])
def test_unloadable_bytes_are_a_model_error(content: bytes) -> None:
    with pytest.raises(ModelError, match="cannot load the model") as caught:
        open_session(content)
    assert "ONNXRuntimeError" not in caught.value.message


def test_missing_file_is_a_model_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        open_session(tmp_path / "absent.onnx")


def test_failed_run_is_a_short_model_error_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    session = open_session(model("agraph (float[N,3] x, int64[2] s) => (float[A,B] y) { y = Reshape(x, s) }"))
    with pytest.raises(ModelError, match="cannot be reshaped") as caught:
        run(session, {"x": np.zeros((2, 3), np.float32), "s": np.array([5, 5])})
    assert "onnxruntime_src" not in caught.value.message
    assert capfd.readouterr().err == ""


def test_missing_input_and_wrong_dtype_are_model_errors() -> None:
    session = open_session(model("agraph (float[N,3] x) => (float[N,3] y) { y = Identity(x) }"))
    with pytest.raises(ModelError, match="x"):
        run(session, {})
    with pytest.raises(ModelError, match="data type"):
        run(session, {"x": np.zeros((1, 3))})


def test_shorten_cuts_long_lines_and_keeps_the_first() -> None:
    assert shorten("[ONNXRuntimeError] : 1 : FAIL : a\nb") == "a"
    assert len(shorten("x" * 1000)) == 300
    assert shorten("") == "no message"


def test_sequence_outputs_are_flattened() -> None:
    session = open_session(model("agraph (float[2,3] x) => (seq(float[1,3]) y) { y = SplitToSequence(x) }"))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = run(session, {"x": x})
    assert list(outputs) == ["y#0", "y#1"]
    assert np.array_equal(outputs["y#1"], x[1:])


def test_maps_become_values_in_key_order() -> None:
    from onnx import TensorProto, helper

    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[7, 3])
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_value_info("y", kind)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    proto: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    outputs = run(open_session(proto.SerializeToString()), {"x": np.array([[0.25, 0.75]], np.float32)})
    assert outputs["y#0"].tolist() == [0.75, 0.25]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_narrow_floats_go_in_and_out_whole(dtype: type) -> None:
    name = {"bfloat16": "bfloat16", "float8_e4m3fn": "float8e4m3fn", "float8_e5m2": "float8e5m2"}[np.dtype(dtype).name]
    text = f"agraph ({name}[N,3] x, bool[2] m) => ({name}[N,3] y, bool[2] z, float[N,3] f)"
    session = open_session(model(text + " { y = Identity(x) z = Not(m) f = Cast<to=1>(x) }"))
    x = np.arange(-3, 3).reshape(2, 3).astype(dtype)
    outputs = run(session, {"x": x, "m": np.array([True, False])})
    assert outputs["y"].dtype == dtype
    assert np.array_equal(outputs["y"].astype(np.float32), x.astype(np.float32))
    assert np.array_equal(outputs["f"], x.astype(np.float32))
    assert outputs["z"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "number", "values"), [("int4", 22, [-8, -1, 0, 7, 3]), ("uint4", 21, [0, 15, 8, 7, 1])]
)
def test_packed_integers_come_back_unpacked(name: str, number: int, values: list[int]) -> None:
    session = open_session(model(f"agraph (float[N] x) => ({name}[N] y) {{ y = Cast<to={number}>(x) }}"))
    assert run(session, {"x": np.array(values, np.float32)})["y"].tolist() == values
    assert run(session, {"x": np.zeros(0, np.float32)})["y"].shape == (0,)


def test_strings_beside_narrow_floats_are_refused_with_the_reason() -> None:
    text = "agraph (bfloat16[N] x, string[N] s) => (bfloat16[N] y, string[N] t) { y = Identity(x) t = Identity(s) }"
    session = open_session(model(text))
    with pytest.raises(ModelError, match="'s'"):
        run(session, {"x": np.zeros(1, ml_dtypes.bfloat16), "s": np.array(["a"], object)})
    with pytest.raises(ModelError, match="float32"):
        run(session, {"x": np.zeros(1, np.float32), "s": np.array(["a"], object)})


def test_scalars_stay_scalars() -> None:
    session = open_session(
        model("agraph (float x, bfloat16 b) => (float y, bfloat16 c) { y = Neg(x) c = Identity(b) }")
    )
    outputs = run(session, {"x": np.float32(2), "b": np.asarray(3, ml_dtypes.bfloat16)})
    assert outputs["y"].shape == () and float(outputs["y"]) == -2
    assert outputs["c"].shape == () and float(outputs["c"]) == 3


def test_optimisation_can_be_turned_off(tmp_path: Path) -> None:
    import onnxruntime as ort

    content = model("agraph (float[N] x) => (float[N] y) { a = Identity(x) y = Relu(a) }")
    off, on = open_session(content, optimize=False), open_session(content, threads=1)
    assert off.get_session_options().graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert on.get_session_options().graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert on.get_session_options().intra_op_num_threads == 1


def test_an_input_that_is_an_output_is_a_copy() -> None:
    """Older releases of onnxruntime return the caller's own memory, which is gone with the next call's inputs."""
    session = open_session(model("agraph (float[N,4] x) => (float[N,4] x, float[N,4] y) { y = Relu(x) }"))
    fed = np.ones((3, 4), np.float32)
    values = run(session, {"x": fed})
    fed[:] = np.nan
    assert (values["x"] == 1).all()


def test_threads_keep_cores_busy_only_where_times_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there within a run only: models that run in turn would slow down one another."""
    settings: list[tuple[str, str]] = []

    def opened(*args: Any, **options: Any) -> ort.InferenceSession:
        session = open_session(*args, **options)
        entry = session.get_session_options().get_session_config_entry
        values = []
        for name in ("session.intra_op.allow_spinning", "session.force_spinning_stop"):
            try:
                values.append(entry(name))
            except RuntimeError:  # onnxruntime's own setting
                values.append("")
        settings.append((values[0], values[1]))
        return session

    content = model("agraph (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    opened(content)
    monkeypatch.setattr(latency, "open_session", opened)
    latency.in_turn([content], [{"x": np.ones((1, 3), np.float32)}], latency.Device(), runs=1)
    assert settings == [("0", ""), ("", "1")]
