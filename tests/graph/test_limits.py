"""A few bytes of a file can ask for more than a machine holds: that is refused, or left alone, before it is there."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune as op
from onnxprune.errors import ModelError, OnnxpruneError

ROOM = 3 << 30
GIANTS = {
    "ConstantOfShape": "z = ConstantOfShape (n)",
    "Expand": "z = Expand (one, n)",
    "Tile": "z = Tile (ones, n)",
    "Range": "z = Range (zero, m, step)",
    "Pad": "p = Concat <axis = 0> (none, n) z = Pad (ones, p)",
    "OneHot": "z = OneHot (ones64, n, on_off)",
    "Resize": "z = Resize (ones, , , n)",
    "Upsample": "f = Cast <to = 1> (n) z = Resize (ones, , f)",
    "EyeLike": "q = Concat <axis = 0> (n, n) e = ConstantOfShape (q) i = EyeLike (e) z = ReduceMax <axes = [0]> (i)",
    "HannWindow": "z = HannWindow (m)",
    "outer": "a = Reshape (r, col) b = Reshape (r, row) z0 = Add (a, b) z = ReduceMax <axes = [0]> (z0)",
    "MatMul": "a = Reshape (r, col) b = Reshape (r, row) z0 = MatMul (a, b) z = ReduceMax <axes = [0]> (z0)",
    "product": "n2 = Mul (n, n) z = ConstantOfShape (n2)",
    "many": "k = Concat <axis = 0> (small, small, small, small) c = ConstantOfShape (k) z = Reshape (c, col1)",
    "loop": """z = Loop (m, yes, ones) <body = body (int64 i, bool c, float[1] s) => (bool d, float[1] t)
               { d = Identity (c) t = Add (s, s) }>""",
}  # fmt: skip


def giant(body: str, size: int) -> onnx.ModelProto:
    """x w -> + (the largest of a giant vector, computed from constants) -> v."""
    text = f"""
    <ir_version: 8, opset_import: ["": 17]>
    net (float[N, 8] x) => (float[N, 4] y) <float[8, 8] w, float[8, 4] v> {{
        h = MatMul (x, w)
        one = Constant <value: tensor = float {{1.0}}> ()
        zero = Constant <value_int = 0> ()
        step = Constant <value_int = 1> ()
        yes = Constant <value: tensor = bool {{1}}> ()
        none = Constant <value_ints = [0]> ()
        small = Constant <value_ints = [4000]> ()
        ones = Constant <value_floats = [1.0]> ()
        ones64 = Constant <value_ints = [1]> ()
        on_off = Constant <value_floats = [0.0, 1.0]> ()
        col = Constant <value_ints = [-1, 1]> ()
        row = Constant <value_ints = [1, -1]> ()
        col1 = Constant <value_ints = [-1]> ()
        r0 = Constant <value_ints = [1048576]> ()
        r = ConstantOfShape (r0)
        n = Constant <value_ints = [{size}]> ()
        m = Constant <value_int = {size}> ()
        {body}
        zf = Cast <to = 1> (z)
        s = Mul (zf, zf)
        zm = ReduceMax <keepdims = 0> (s)
        g = Add (h, zm)
        y = MatMul (g, v)
    }}"""
    model = onnx.parser.parse_model(text)
    draw = np.random.default_rng(0)
    for name, shape in (("w", (8, 8)), ("v", (8, 4))):
        model.graph.initializer.append(numpy_helper.from_array(draw.normal(size=shape).astype(np.float32), name))
    return model


@pytest.fixture(autouse=True)
def little_room() -> Iterator[None]:
    """What takes more memory than that ends in a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("size", [1 << 31, 1 << 40, 1 << 62])
@pytest.mark.parametrize("body", GIANTS.values(), ids=GIANTS)
def test_giants_are_refused_or_left_alone(body: str, size: int) -> None:
    try:
        op.prune(giant(body, size), ratio=0.5, validate=False)
    except OnnxpruneError as error:
        assert error.exit_code in (3, 5), error
        assert len(error.message) < 400


def test_what_is_refused_names_the_node_and_the_limit() -> None:
    with pytest.raises(
        ModelError, match=r"'z' \(ConstantOfShape\) gives a tensor the shape \[2147483648\]: 2,147,483,648"
    ):
        op.prune(giant(GIANTS["ConstantOfShape"], 1 << 31), ratio=0.5)


@pytest.mark.parametrize("where", ["value_info", "output", "input"])
def test_declared_giants(where: str) -> None:
    model = giant("z = Relu (ones)", 1)
    info = helper.make_tensor_value_info("h", TensorProto.FLOAT, [1 << 62])
    if where != "input":
        model.graph.value_info.append(info)
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1 << 62 if where == "output" else 2
        assert op.prune(model, ratio=0.5, latency=False).report.exactness.passed
        return
    dims = getattr(model.graph, where)[0].type.tensor_type.shape.dim
    dims[0].dim_value = 1 << 62
    with pytest.raises(OnnxpruneError) as caught:
        op.prune(model, ratio=0.5)
    assert caught.value.exit_code == 3


def doubling(levels: int, *, attribute: bool = False) -> onnx.ModelProto:
    """Functions, each of which calls the next twice."""
    model = onnx.ModelProto(ir_version=8)
    model.CopyFrom(giant("z = Relu (ones)", 1))
    model.opset_import.add(domain="loc", version=1)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("loc", 1)]
    for k in range(levels):
        name, inner, domain = f"f{k}", f"f{k + 1}" if k + 1 < levels else "Relu", "loc" if k + 1 < levels else ""
        nodes = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        if attribute and domain:
            for number, node in enumerate(nodes):
                node.attribute.append(helper.make_attribute("alpha", k * 2.0 + number))
        names = ["alpha"] if attribute and k else []
        model.functions.append(helper.make_function("loc", name, ["a"], ["c"], nodes, opsets, names))
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    node.op_type, node.domain = "f0", "loc"
    return model


@pytest.mark.parametrize("attribute", [False, True])
def test_functions_that_double(attribute: bool) -> None:
    assert op.prune(doubling(4, attribute=attribute), ratio=0.5, latency=False).report.exactness.passed
    for levels in (20, 60, 200):
        with pytest.raises(ModelError, match="local functions make"):
            op.prune(doubling(levels, attribute=attribute), ratio=0.5)


def test_large_constants_of_real_models_are_no_giants() -> None:
    """Slices to the end, large vocabularies and long tables are what exports have."""
    body = "e = Constant <value_ints = [9223372036854775807]> () z = Slice (ones, none, e)"
    assert op.prune(giant(body, 1), ratio=0.5, latency=False).report.exactness.passed
    body = "q = Range (zero, m, step) z = Cast <to = 1> (q)"
    assert op.prune(giant(body, 50_000), ratio=0.5, latency=False).report.exactness.passed


@pytest.mark.parametrize("op_type", ["Size", "Shape", "Flatten"])
def test_sizes_of_more_than_64_bits(op_type: str) -> None:
    body = f"q = Concat <axis = 0> (n, n) e = ConstantOfShape (q) z = {op_type} (e)"
    with pytest.raises(ModelError, match=r"'e' \(ConstantOfShape\)"):
        op.prune(giant(body, 1 << 62), ratio=0.5)
