from __future__ import annotations

import hashlib
import io
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

import onnxprune as op
from onnxprune.errors import ModelError, OnnxpruneError, UsageError
from onnxprune.io import read as load_module
from onnxprune.io.read import Loaded, check_structure, load, sort_nodes
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.io.weights import FileWeight
from onnxprune.io.wire import encode_varint, fields, strip
from onnxprune.io.write import assemble


def mlp(*, typed: bool = False) -> ModelProto:
    """Two Gemms with a body and a Constant: bulk and small initializers, of several types."""
    model = parser.parse_model("""
        <ir_version: 9, opset_import: ["": 17], producer_name: "here">
        mlp (float[N, 32] x, bool c) => (float[N, 8] y)
        <float[16] b1 = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}> {
            h = Gemm <transB = 1> (x, w1, b1)
            r = Relu(h)
            k = Constant <value = float[1] {2.0}> ()
            s = Mul(r, k)
            p = MatMul(s, w2)
            y = If (c) <
                then_branch = t () => (float[N, 8] yt) { yt = Add(p, bt) },
                else_branch = e () => (float[N, 8] ye) { ye = Identity(p) }>
        }""")
    rng = np.random.default_rng(1)
    w1 = rng.standard_normal((16, 32)).astype(np.float32)
    w2 = rng.standard_normal((16, 8)).astype(np.float32)
    for name, array in (("w1", w1), ("w2", w2), ("unused", rng.integers(0, 9, 400))):
        proto = numpy_helper.from_array(array, name)
        if typed:
            proto = helper.make_tensor(name, proto.data_type, array.shape, array.ravel().tolist())
        proto.doc_string = f"the {name}"
        model.graph.initializer.append(proto)
    body = next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")
    body.initializer.append(numpy_helper.from_array(rng.standard_normal(8).astype(np.float32), "bt"))
    onnx.checker.check_model(model)
    return model


def same_weights(loaded: Loaded, model: ModelProto) -> None:
    weights = outline_bodies(loaded.proto, loaded.weights)[1]
    assert list(weights) == [tensor.name for tensor in model.graph.initializer]
    for tensor in model.graph.initializer:
        weight, expected = loaded.weights[tensor.name], numpy_helper.to_array(tensor)
        assert (weight.shape, weight.dtype) == (expected.shape, expected.dtype)
        assert np.array_equal(weight.read(), expected)


def is_skeleton_of(loaded: Loaded, model: ModelProto) -> None:
    """All of the model is there but the data of more than 1 KiB."""
    expected = ModelProto()
    expected.CopyFrom(model)
    for tensor in expected.graph.initializer:
        if numpy_helper.to_array(tensor).nbytes > 1024:
            for field, _ in tensor.ListFields():
                if field.name.endswith("_data"):
                    tensor.ClearField(field.name)
    found = ModelProto()
    found.CopyFrom(outline_bodies(loaded.proto, loaded.weights)[0])
    assert found == expected


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("kind", ["path", "str", "bytes", "proto", "large"])
def test_every_source_gives_the_same(typed: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(typed=typed)
    before = model.SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(before)
    if kind == "large":
        monkeypatch.setattr(load_module, "_WHOLE_FILE_LIMIT", 0)
    source = {"str": str(path), "bytes": before, "proto": model}.get(kind, path)
    loaded = load(source)
    is_skeleton_of(loaded, model)
    same_weights(loaded, model)
    assert model.SerializeToString() == before
    if kind in ("path", "str", "large"):
        assert loaded.path == path and loaded.size == len(before)
    if kind != "proto":
        assert loaded.sha256 == hashlib.sha256(before).hexdigest()
    assert isinstance(loaded.weights["w1"], FileWeight) == (kind == "large")


def test_sha_of_a_proto_depends_on_everything() -> None:
    model = mlp()
    first = load(model).sha256
    assert load(mlp()).sha256 == first
    data = bytearray(model.graph.initializer[1].raw_data)
    data[100] ^= 1
    model.graph.initializer[1].raw_data = bytes(data)
    second = load(model).sha256
    model.graph.node[0].name = "renamed"
    assert len({first, second, load(model).sha256}) == 3


def test_external_data_everywhere(tmp_path: Path) -> None:
    model = mlp()
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "m.onnx"
    whole = ModelProto()
    whole.CopyFrom(model)
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0, convert_attribute=True)
    loaded = load(path)
    same_weights(loaded, whole)
    is_skeleton_of(loaded, whole)
    assert isinstance(loaded.weights["w1"], FileWeight)
    assert loaded.external == ((tmp_path / "sub" / "m.data").resolve(),)
    assert loaded.size == path.stat().st_size + (tmp_path / "sub" / "m.data").stat().st_size
    for source in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(ModelError, match="without its path") as caught:
            load(source)
        assert "path" in caught.value.hint


def external_model(location: str, **keys: int) -> bytes:
    model = mlp()
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **keys}.items():
        tensor.external_data.add(key=key, value=str(value))
    return model.SerializeToString()


@pytest.mark.parametrize("location", ["../data", "sub/../../data", "{tmp}/data", "link", "", ".", "a\0b", "loop"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(2048))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path / "data")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "m.onnx").write_bytes(external_model(location.format(tmp=tmp_path)))
    with pytest.raises(ModelError, match="w1"):
        load(folder / "m.onnx")


@pytest.mark.parametrize(
    ("present", "keys", "message"),
    [
        (None, {}, "cannot read .*2048 bytes are needed"),
        (2047, {}, "2048 bytes are needed, 2047 are present"),
        (2050, {"offset": 3}, "2051 bytes are needed, 2050 are present"),
        (2048, {"length": 2044}, "needs 2048 bytes of data, its data have 2044"),
        (2048, {"offset": -1}, "offset '-1'"),
        (2048, {"length": 10**20}, "length '100"),
    ],
)
def test_missing_or_short_external_data(present: int | None, keys: dict, message: str, tmp_path: Path) -> None:
    if present is not None:
        (tmp_path / "data").write_bytes(bytes(present))
    (tmp_path / "m.onnx").write_bytes(external_model("data", **keys))
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path / "m.onnx")
    assert "w1" in caught.value.message and caught.value.exit_code == 3


def test_functions_are_inlined_without_the_data() -> None:
    model = parser.parse_model("""
        <ir_version: 9, opset_import: ["": 17, "own": 1]>
        g (float[N, 32] x) => (float[N, 16] y) { y = own.lin(x, w) }
        <domain: "own", opset_import: ["": 17]> lin (a, w) => (c) { t = MatMul(a, w)
          c = Relu(t) }""")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((32, 16), np.float32), "w"))
    before = model.SerializeToString()
    loaded = load(model)
    assert [node.op_type for node in loaded.proto.graph.node] == ["MatMul", "Relu"]
    assert not loaded.proto.functions and not loaded.proto.graph.initializer[0].raw_data
    assert loaded.weights["w"].read().sum() == 512 and model.SerializeToString() == before


@pytest.mark.parametrize("kind", ["recursive", "twice"])
def test_functions_that_cannot_be_inlined(kind: str) -> None:
    model = parser.parse_model("""<ir_version: 9, opset_import: ["": 17, "own": 1]>
        g (float[2] x) => (float[2] y) { y = own.f(x) }
        <domain: "own", opset_import: ["": 17, "own": 1]> f (a) => (c) { c = own.h(a) }
        <domain: "own", opset_import: ["": 17, "own": 1]> h (a) => (c) { c = Relu(a) }""")
    if kind == "recursive":
        model.functions[1].node[0].CopyFrom(helper.make_node("f", ["a"], ["c"], domain="own"))
    else:
        model.functions[1].name = "f"
    with pytest.raises(ModelError, match="local functions cannot be inlined"):
        load(model)


def sparse(array: np.ndarray, name: str, *, wide: bool) -> onnx.SparseTensorProto:
    """An array as ONNX stores a sparse tensor, its places counted through or axis by axis."""
    places = np.flatnonzero(array)
    values = numpy_helper.from_array(array.ravel()[places], name)
    indices = np.stack(np.unravel_index(places, array.shape), axis=1) if wide else places
    return helper.make_sparse_tensor(values, numpy_helper.from_array(indices), array.shape)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", [8, 64])
def test_sparse_initializers_are_weights_and_stay_sparse(wide: bool, size: int) -> None:
    draw = np.random.default_rng(0)
    array = (draw.normal(size=(size, size)) * (draw.random((size, size)) < 0.2)).astype(np.float32)
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", [a, b], [c])
                for a, b, c in (("x", "v", "h"), ("h", "w", "i"), ("i", "u", "y"))
            ],
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
            [
                numpy_helper.from_array(draw.normal(size=shape).astype(np.float32), name)
                for name, shape in (("v", (3, size)), ("u", (size, 3)))
            ],
            sparse_initializer=[sparse(array, "w", wide=wide)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    loaded = load(model)
    assert np.array_equal(loaded.weights["w"].read(), array)
    again = assemble(loaded.proto, loaded.weights)
    assert again.graph.sparse_initializer == model.graph.sparse_initializer
    result = op.prune(model, ratio=0.5, latency=False)
    assert result.report.exactness.passed
    assert [list(t.dims) for t in result.model.graph.sparse_initializer] == [[size // 2, size // 2]]
    assert not any(t.name == "w" for t in result.model.graph.initializer)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.sparse_initializer[0].CopyFrom(sparse(array * 2, "w", wide=wide))
    assert load(other).sha256 != loaded.sha256 == load(model).sha256


@pytest.mark.parametrize("edit", ["place", "negative", "count", "rank", "dims", "giant"])
def test_damaged_sparse_initializers(edit: str) -> None:
    model = mlp()
    tensor = sparse(np.eye(4, dtype=np.float32), "sparse", wide=edit == "rank")
    places = {"place": [0, 5, 10, 16], "negative": [-1, 5, 10, 15], "count": [0, 5, 10], "rank": [[0], [1], [2], [3]]}
    if edit in places:
        tensor.indices.CopyFrom(numpy_helper.from_array(np.array(places[edit])))
    else:
        tensor.dims[:] = [2, 2] if edit == "dims" else [1 << 20, 1 << 20]
    model.graph.sparse_initializer.append(tensor)
    with pytest.raises(ModelError, match="sparse tensor 'sparse'"):
        load(model)


def test_text_initializers_stay() -> None:
    model = mlp()
    model.graph.initializer.append(numpy_helper.from_array(np.array(["long text " * 300]), "text"))
    loaded = load(model)
    assert model.graph.initializer[-1] in loaded.proto.graph.initializer
    assert loaded.weights["text"].read()[0].startswith("long text")


def test_documentation_in_another_encoding_is_kept() -> None:
    model = mlp()
    model.doc_string = model.graph.doc_string = model.graph.initializer[1].doc_string = "caf\u00e9"
    data = model.SerializeToString().replace(b"caf\xc3\xa9", b"caf\xe9?")
    loaded = load(ModelProto.FromString(data))
    built = assemble(loaded.proto, loaded.weights).SerializeToString()
    assert built.count(b"caf\xe9?") == 3
    assert ModelProto.FromString(built).graph.node == model.graph.node
    with pytest.raises(ModelError, match=r"not UTF-8.*caf"):
        load(data.replace(b"\x0a\x01h", b"\x0a\x01\xe9").replace(b"unused", b"caf\xe9su"))


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "resnet.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no file .*resnat") as caught:
        load(tmp_path / "resnat.onnx")
    assert caught.value.exit_code == 2 and "'resnet.onnx'" in caught.value.hint
    with pytest.raises(UsageError, match="is a folder") as caught:
        load(tmp_path)
    assert "resnet.onnx" in caught.value.hint
    for wrong in (tmp_path / "no" / "m.onnx", "a\0b", "x" * 5000, 7):
        with pytest.raises(UsageError):
            load(wrong)  # type: ignore[arg-type]


def archive(*names: str) -> bytes:
    """A zip archive with files of these names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name in names:
            target.writestr(name, "x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (mlp().SerializeToString()[:-40], "breaks off or is damaged"),
        (b"\x08\x09" * 3, "has no graph"),
        (b"\xff" * 100, "breaks off"),
        (mlp().SerializeToString() + b"\x0b", "breaks off"),
        (ModelProto(ir_version=8, graph=onnx.GraphProto(name="g")).SerializeToString(), "no outputs"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (onnx.printer.to_text(mlp()).encode(), "written as text"),
        (b"ir_version: 8\ngraph {}", "written as text"),
        (b'\x10\0\0\0\0\0\0\0{"a": 1}', "safetensors"),
        (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
        (b"\x1c\0\0\0ORTM", "ORT format"),
        (pickle.dumps({"weight": 1}, protocol=4), "pickle"),
        (archive("net/data.pkl"), "PyTorch"),
        (archive("config.json", "model.weights.h5"), "Keras"),
        (archive("x.npy"), "numpy data"),
        (archive("inner/net.onnx"), "zip archive"),
        (b"\x93NUMPY\x01\x00", "numpy data"),
        (b'<?xml version="1.0"?><net name="a"/>', "OpenVINO"),
        (b"ftrt" + bytes(40), "TensorRT"),
        (b"\x89HDF\r\n", "HDF5"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_not_a_model(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert caught.value.hint and str(path) in caught.value.message


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("m.tflite", "TensorFlow Lite", "tf2onnx"),
        ("m.pb", "TensorFlow graph", "tf2onnx"),
        ("m.pt", "PyTorch", "torch.onnx.export"),
        ("m.h5", "Keras", "model.export"),
        ("m.mlmodel", "Core ML", "ONNX"),
        ("m.pdmodel", "PaddlePaddle", "paddle2onnx"),
    ],
)
def test_what_is_not_a_model_may_say_so_by_its_name(name: str, message: str, hint: str, tmp_path: Path) -> None:
    """Other protobufs and files without a mark; a model keeps being one whatever its name."""
    for data in (b"\xff" * 100, b"\x0a\x04\x0a\x02ab", b"\x08\x01\x12\x04\x0a\x02\x0a\x00"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match=message) as caught:
            load(tmp_path / name)
        assert hint in caught.value.hint
    (tmp_path / name).write_bytes(mlp().SerializeToString())
    assert load(tmp_path / name).weights


def test_a_saved_model_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(UsageError, match=r"SavedModel.*tf2onnx"):
        load(tmp_path)


def test_models_of_the_future() -> None:
    model = mlp()
    model.ir_version = onnx.IR_VERSION + 1
    with pytest.raises(ModelError, match=f"IR version {onnx.IR_VERSION + 1}.*up to {onnx.IR_VERSION}") as caught:
        load(model.SerializeToString())
    assert "pip install -U onnx" in caught.value.hint
    model.ir_version = 8
    model.opset_import[0].version = 1000
    with pytest.raises(ModelError, match="opset 1000"):
        load(model)
    del model.opset_import[:]
    with pytest.raises(ModelError, match="opset_import"):
        load(model)


GOOD = '<ir_version: 9, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { a = Relu(x)  y = Neg(a) }'


def broken(kind: str) -> ModelProto:
    model = parser.parse_model(GOOD)
    first, second = model.graph.node
    match kind:
        case "order":
            del model.graph.node[:]
            model.graph.node.extend([second, first])
        case "undefined":
            first.input[0] = "nowhere"
        case "twice":
            second.output[0] = "a"
            model.graph.output[0].name = "a"
        case "input again":
            first.output[0] = "x"
        case "own input":
            first.input[0] = "a"
        case "output":
            model.graph.output[0].name = "z"
        case "same input":
            model.graph.input.append(model.graph.input[0])
        case "same initializer":
            model.graph.initializer.extend([numpy_helper.from_array(np.ones(1), "w")] * 2)
        case "no operator":
            first.op_type = ""
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("order", r"'y' \(Neg\) reads 'a' before node 'a' \(Relu\) makes it"),
        ("undefined", "reads 'nowhere', which no input"),
        ("twice", r"gives 'a', a name that is in use"),
        ("input again", "gives 'x', a name that is in use"),
        ("own input", "reads 'a' before"),
        ("output", "the graph output 'z' is made by no node"),
        ("same input", "graph input 'x'"),
        ("same initializer", "initializer.* 'w'"),
        ("no operator", "has no operator type"),
    ],
)
def test_names_that_do_not_fit_together(kind: str, message: str) -> None:
    check_structure(parser.parse_model(GOOD))
    with pytest.raises(ModelError, match=message):
        check_structure(broken(kind))
    if kind == "order":
        return  # sorted on loading
    with pytest.raises(ModelError, match="initializers have the name 'w'" if "initial" in kind else message):
        load(broken(kind))


def test_nodes_out_of_order_are_sorted_and_keep_their_order_otherwise(tmp_path: Path) -> None:
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17, "local": 1]> g (float[N, 2] x, bool c) => (float[N, 2] y) {
            y = Add(e, d)
            e = If(c) <then_branch = t () => (float[N, 2] u) { u = Neg(v)  v = Abs(b) },
                       else_branch = f () => (float[N, 2] w) { w = Identity(a) }>
            d = local.twice(b)
            b = Exp(a)
            a = Relu(x)
            z = Neg(a)
        }
        <domain: "local", opset_import: ["": 17]> twice (p) => (r) { r = Add(q, q)  q = Neg(p) }"""
    )
    sorted_model = onnx.ModelProto()
    sorted_model.CopyFrom(model)
    sort_nodes(sorted_model)
    assert [n.output[0] for n in sorted_model.graph.node] == ["a", "b", "e", "d", "y", "z"]
    feeds = {"x": np.array([[-1.0, 2.0]], np.float32), "c": np.array(True)}
    expected = ReferenceEvaluator(sorted_model).run(None, feeds)[0]
    for source in (model, model.SerializeToString()):
        loaded = load(source)
        check_structure(loaded.proto)
        written = assemble(loaded.proto, loaded.weights)
        onnx.checker.check_model(written)
        assert np.array_equal(ReferenceEvaluator(written).run(None, feeds)[0], expected)
    assert [n.output[0] for n in model.graph.node] == ["y", "e", "d", "b", "a", "z"]


def test_nodes_that_wait_for_each_other_are_refused() -> None:
    model = parser.parse_model(GOOD.replace("Relu(x)", "Add(x, b)").replace("y = Neg(a)", "b = Neg(a)  y = Neg(b)"))
    with pytest.raises(ModelError, match="wait for each other"):
        load(model)


def test_names_that_are_allowed() -> None:
    check_structure(mlp())  # a body reads from outside
    check_structure(
        parser.parse_model("""<ir_version: 9, opset_import: ["": 17]>
        g (float[2,3] x) => (float[2,3] y) <float[1] d = {1}, float r = {0.5}> {
            a, = Dropout(x, r, )
            y = Clip(a, , ) }""")
    )
    overridable = mlp()
    overridable.graph.input.append(helper.make_tensor_value_info("w1", 1, [16, 32]))
    check_structure(overridable)


def test_structure_of_a_very_deep_graph_is_checked() -> None:
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(20_000)]
    ends = [helper.make_tensor_value_info(name, 1, [2]) for name in ("t0", "t20000")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    check_structure(model)
    model.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(ModelError, match="nowhere"):
        check_structure(model)


def test_data_in_two_pieces_and_a_graph_in_two() -> None:
    """Legal protobuf that no exporter writes: repeated occurrences are merged, and so must the weights be."""
    model = mlp()
    graph = model.graph.SerializeToString()
    rest = ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    extra = helper.make_tensor("extra", TensorProto.FLOAT, [600], [1.0] * 300 + [2.0] * 300)
    half = TensorProto(float_data=extra.float_data[:300]).SerializeToString()
    extra.float_data[:] = extra.float_data[300:]
    tensor = half + extra.SerializeToString()
    pieces = [(7, graph), (7, b"\x2a" + encode_varint(len(tensor)) + tensor)]
    data = rest.SerializeToString() + b"".join(bytes([n << 3 | 2]) + encode_varint(len(p)) + p for n, p in pieces)
    loaded = load(data)
    same_weights(loaded, ModelProto.FromString(data))
    assert loaded.weights["extra"].read().tolist() == [1.0] * 300 + [2.0] * 300


def test_stripping_leaves_little() -> None:
    data = mlp().SerializeToString()
    small, spans = strip(data, 1024)
    assert len(spans) == 2 and len(small) < len(data) - 16 * 32 * 4
    assert sum(1 for _ in fields(data, 0, len(data))) == len(list(fields(small, 0, len(small))))


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
def test_flipped_bytes_never_give_a_traceback(typed: bool, tmp_path: Path) -> None:
    data = mlp(typed=typed).SerializeToString()
    rng = random.Random(7)
    outcomes = {"read": 0, "refused": 0}
    bulk = list(strip(data, 256)[1].values())
    places = [i for i in range(len(data)) if not any(s.start <= i < s.end for s in bulk)]
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.choice(places)] = rng.randrange(256)
        try:
            loaded = load(bytes(damaged[: rng.choice([len(data)] * 9 + [rng.randrange(len(data))])]))
            for weight in loaded.weights.values():
                assert weight.read().shape == weight.shape
            assemble(loaded.proto, loaded.weights)
            outcomes["read"] += 1
        except OnnxpruneError as error:
            assert error.message
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50
