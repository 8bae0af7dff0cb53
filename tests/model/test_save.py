from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxprune.errors import ModelError, UsageError
from onnxprune.io import write as save_module
from onnxprune.io.read import load
from onnxprune.io.weights import ArrayWeight, GatheredWeight
from onnxprune.io.write import assemble, check_output, data_path, save


def model_of(*arrays: np.ndarray) -> ModelProto:
    """x -> y, with the arrays as initializers that nothing reads."""
    model = parser.parse_model('<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    for number, array in enumerate(arrays):
        tensor = numpy_helper.from_array(array, f"w{number}")
        tensor.doc_string = f"weight {number}"
        model.graph.initializer.append(tensor)
    model.metadata_props.add(key="author", value="someone")
    return model


def gemm(width: int = 64) -> ModelProto:
    model = parser.parse_model(f"""<ir_version: 9, opset_import: ["": 17]>
        g (float[N, {width}] x) => (float[N, {width}] y) <float[1] half = {{0.5}}> {{
            h = MatMul(x, w)
            y = Mul(h, half) }}""")
    array = np.random.default_rng(2).standard_normal((width, width)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(array, "w"))
    return model


def answer(model: str | Path | bytes, width: int = 64) -> np.ndarray:
    session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model))
    return session.run(None, {"x": np.random.default_rng(4).standard_normal((3, width)).astype(np.float32)})[0]


DTYPES = ["float32", "float16", "int64", "bool", "complex64", "bfloat16", "float8_e4m3fn", "int4", "uint4"]
arrays = st.builds(
    lambda name, shape: np.arange(np.prod(shape)).reshape(shape).astype(getattr(ml_dtypes, name, None) or name),
    st.sampled_from(DTYPES),
    st.sampled_from([(), (0,), (7,), (3, 5), (40, 40), (1, 2049)]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.lists(arrays, max_size=5), st.booleans())
def test_what_is_saved_is_what_was_loaded(tmp_path: Path, values: list[np.ndarray], external: bool) -> None:
    model = model_of(*values)
    loaded = load(model)
    path = tmp_path / "out.onnx"
    size = save(loaded.proto, loaded.weights, path, external=external)
    again = onnx.load(path)
    for tensor in again.graph.initializer:
        tensor.ClearField("data_location")
    assert again == model and assemble(loaded.proto, loaded.weights) == model
    data = data_path(path)
    outside = external and any(len(t.raw_data) >= 1024 for t in model.graph.initializer)
    assert size == path.stat().st_size + (data.stat().st_size if outside else 0)
    back = load(path)
    assert all(back.weights[n].stored() == w.stored() for n, w in loaded.weights.items())
    assert [p.name for p in back.external] == (["out.onnx.data"] if outside else [])
    assert not list(tmp_path.glob(".*"))
    for file in (path, data):
        file.unlink(missing_ok=True)


def test_inline_bytes_are_read_by_others(tmp_path: Path) -> None:
    model = gemm()
    loaded = load(model)
    for external in (True, False, None):
        save(loaded.proto, loaded.weights, tmp_path / "m.onnx", external=external)
        onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
        assert np.array_equal(answer(tmp_path / "m.onnx"), answer(model.SerializeToString()))


def test_shape_and_type_come_from_the_weight(tmp_path: Path) -> None:
    loaded = load(model_of(np.arange(600.0).reshape(2, 300), np.array(["a", "b"], object)))
    weights = {
        "w0": GatheredWeight(loaded.weights["w0"], [(1, np.array([5, 2]))]),
        "w1": ArrayWeight("another name", np.array(["z"])),
    }
    before = loaded.proto.SerializeToString()
    save(loaded.proto, weights, tmp_path / "m.onnx")
    for result in (onnx.load(tmp_path / "m.onnx"), assemble(loaded.proto, weights)):
        first, second = result.graph.initializer
        assert first.doc_string == "weight 0" and second.name == "w1" and second.string_data == [b"z"]
        assert numpy_helper.to_array(first).tolist() == [[5, 2], [305, 302]]
    assert loaded.proto.SerializeToString() == before


def test_an_initializer_without_data_is_an_error(tmp_path: Path) -> None:
    loaded = load(gemm())
    own = {name: weight for name, weight in loaded.weights.items() if name != "half"}
    assert assemble(loaded.proto, own) == gemm()  # small ones have their data in the skeleton
    for attempt in (lambda: assemble(loaded.proto, {}), lambda: save(loaded.proto, {}, tmp_path / "m.onnx")):
        with pytest.raises(ModelError, match="'w' has no data"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_external_when_asked_or_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(gemm())
    path = tmp_path / "m.onnx"
    save(loaded.proto, loaded.weights, path)
    assert not data_path(path).exists()
    save(loaded.proto, loaded.weights, path, prefer_external=True)
    assert data_path(path).exists()
    half, w = onnx.load(path, load_external_data=False).graph.initializer
    assert half.data_location == TensorProto.DEFAULT and w.data_location == TensorProto.EXTERNAL
    data_path(path).unlink()
    save(loaded.proto, loaded.weights, path, prefer_external=True, external=False)
    assert not data_path(path).exists()
    monkeypatch.setattr(save_module, "_INLINE_TOTAL", 1000)
    save(loaded.proto, loaded.weights, path)
    assert data_path(path).exists()
    with pytest.raises(UsageError, match="too many for one file"):
        save(loaded.proto, loaded.weights, path, external=False)


def test_external_offsets_are_aligned(tmp_path: Path) -> None:
    values = [
        np.ones(1025, np.uint8),
        np.ones(2000, np.uint8),
        np.ones((1 << 20) + 1, np.uint8),
        np.ones(1100, np.uint8),
    ]
    loaded = load(model_of(*values))
    save(loaded.proto, loaded.weights, tmp_path / "m.onnx", external=True)
    tensors = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    offsets = [int({e.key: e.value for e in t.external_data}["offset"]) for t in tensors]
    assert offsets == [0, 1088, 4096, 4096 + (1 << 20) + 64]
    assert all({e.key: e.value for e in t.external_data}["location"] == "m.onnx.data" for t in tensors)


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("room", [0, 100, 17_000])
def test_a_full_disk_leaves_the_earlier_output(
    external: bool, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    first = load(gemm(32))
    save(first.proto, first.weights, path, external=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model_writer = save_module._write_model
    mover = save_module._move_out
    monkeypatch.setattr(
        save_module, "_write_model", lambda file, *rest: model_writer(FullDisk(file, room % 16_384), *rest)
    )
    monkeypatch.setattr(save_module, "_move_out", lambda e, file: mover(e, FullDisk(file, room)))
    loaded = load(gemm())
    if room == 17_000 and external:
        monkeypatch.setattr(save_module, "_write_model", lambda file, *rest: model_writer(FullDisk(file, 5), *rest))
    with pytest.raises(UsageError, match=r"m\.onnx.*No space left") as caught:
        save(loaded.proto, loaded.weights, path, external=external)
    assert caught.value.exit_code == 2
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert answer(path, 32).shape == (3, 32)


@pytest.mark.parametrize("failing", ["m.onnx", "plan.json"])
def test_a_rename_that_fails_is_undone(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plan = tmp_path / "m.onnx", tmp_path / "plan.json"
    first, second = load(gemm(32)), load(gemm(64))
    save(first.proto, first.weights, path, external=True, companions={plan: b"1"})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def failing_at(original):
        def call(self: Path, target: Path) -> Path:
            # The plan is moved away first, the model is put in place.
            if failing in (self.name, target.name) and not (failing == "plan.json" and target.name == failing):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return original(self, target)

        return call

    for name in ("replace", "rename"):
        monkeypatch.setattr(Path, name, failing_at(getattr(Path, name)))
    with pytest.raises(UsageError, match="Permission denied"):
        save(second.proto, second.weights, path, external=True, companions={plan: b"2"})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_over_an_earlier_output(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for width in (32, 64, 32):
        loaded = load(gemm(width))
        save(loaded.proto, loaded.weights, path, external=True)
        names = sorted(file.name for file in tmp_path.iterdir())
        assert (
            len(names) == 2 and names[0] == "m.onnx" and names[1].startswith("m.onnx.") and names[1].endswith(".data")
        )
        assert np.array_equal(answer(path, width), answer(gemm(width).SerializeToString(), width))


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    loaded = load(gemm())
    monkeypatch.setattr(save_module, "_write_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(loaded.proto, loaded.weights, tmp_path / "m.onnx", external=True)
    assert not list(tmp_path.iterdir())


def test_source_that_changes_while_saving(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(gemm(), source, save_as_external_data=True, location="in.data", size_threshold=0)
    loaded = load(source)
    (tmp_path / "in.data").write_bytes(b"short")
    with pytest.raises(ModelError, match="too short"):
        save(loaded.proto, loaded.weights, tmp_path / "out.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.data", "in.onnx"]


def test_permissions_are_the_usual(tmp_path: Path) -> None:
    loaded = load(gemm())
    save(loaded.proto, loaded.weights, tmp_path / "m.onnx")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "m.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_output_must_not_be_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(b"model")
    data = tmp_path / "weights.onnx.data"
    data.write_bytes(b"data")
    (tmp_path / "link.onnx").symlink_to(source)
    (tmp_path / "hard.onnx").hardlink_to(source)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    same = ["in.onnx", "./sub/../in.onnx", source, "link.onnx", "hard.onnx", "weights.onnx", data]
    for output in same:
        with pytest.raises(UsageError, match="is the input file") as caught:
            check_output(output, source, [data])
        assert caught.value.exit_code == 2 and caught.value.hint
    with pytest.raises(UsageError, match="is the input file"):
        check_output("in.onnx", tmp_path / "link.onnx")
    with pytest.raises(UsageError, match="is the input file"):
        check_output("w.onnx", source, [tmp_path / "w.onnx.0123abcd.data"])
    check_output("out.onnx", source, [data])
    check_output("in.onnx", None)
    check_output("weights.onnx", source)


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.onnx")
    for output, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "m.onnx", "does not exist"),
        (tmp_path / "file" / "m.onnx", "is not a folder"),
        (tmp_path / "pipe.onnx", "not an ordinary file"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(output, None)
    loaded = load(gemm())
    with pytest.raises(UsageError, match=r"cannot write .*No such file"):
        save(loaded.proto, loaded.weights, tmp_path / "no" / "m.onnx")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="not writable"):
        check_output(tmp_path / "m.onnx", None)


def test_constant_helper_names_are_kept() -> None:
    """A weight's own name does not matter: the skeleton's initializer names the tensor."""
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["w"], ["y"])],
            "g",
            [],
            [helper.make_tensor_value_info("y", 1, [2])],
            [TensorProto(name="w", data_type=1, dims=[3])],
        )
    )
    built = assemble(proto, {"w": ArrayWeight("v", np.ones(2, np.float32))})
    assert built.graph.initializer[0].name == "w" and list(built.graph.initializer[0].dims) == [2]
