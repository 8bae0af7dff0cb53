"""Models with bodies: text with weights left out, which are drawn and put where they are wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from masks import Array, bodies, masked, run
from onnx import numpy_helper, parser
from oracle import assert_close, plan_slots

from onnxprune import Result

HEAD = """<ir_version: 8, opset_import: ["" : %d]>
"""


def build(
    text: str, opset: int = 17, *, inside: tuple[str, ...] = (), constant: tuple[str, ...] = (), **sizes: Any
) -> Any:
    """The model of a text.

    Args:
        sizes: shapes (or values) of the initializers that it leaves out.
        inside: those that belong into the first body that reads them. constant: as Constant nodes there.
    """
    model = parser.parse_model(HEAD % opset + text)
    rng = np.random.default_rng(7)
    for name, given in sizes.items():
        value = given
        if isinstance(given, (tuple, list)):
            value = (rng.standard_normal(given) / np.sqrt(given[0] if len(given) > 1 else 4)).astype(np.float32)
        tensor = numpy_helper.from_array(np.asarray(value), name)
        home = _reader(model.graph, name) if name in (*inside, *constant) else model.graph
        assert home is not None, name
        if name in constant:
            home.node.insert(0, onnx.helper.make_node("Constant", [], [name], name=f"{name}_node", value=tensor))
        else:
            home.initializer.append(tensor)
    onnx.checker.check_model(model)
    return model


def _reader(graph: onnx.GraphProto, name: str) -> onnx.GraphProto | None:
    """The first body that reads a name."""
    for node in graph.node:
        for body in bodies(node):
            if any(name in inner.input for inner in body.node):
                return body
            found = _reader(body, name)
            if found is not None:
                return found
    return None


def check(model: onnx.ModelProto, result: Result, feeds: list[dict[str, Array]]) -> None:
    """The result equals the masked original on all of these inputs."""
    slots = plan_slots(result)
    for feed in feeds:
        assert_close(run(masked(model, slots, feed), feed), run(result.model, feed), 1e-5, "onnxruntime")


def same(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """Whether two models say the same, in whatever form their constants are stored."""
    return _plain(one) == _plain(other)


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    queue = [copy.graph]
    while queue:
        graph = queue.pop()
        tensors = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
        for tensor in tensors:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        queue += [body for node in graph.node for body in bodies(node)]
    return copy


def sizes(model: onnx.ModelProto, name: str) -> list[int]:
    """The shape of a constant, wherever it lies."""
    found = _find(model.graph, name)
    assert found is not None, name
    return list(found.dims)


def _find(graph: onnx.GraphProto, name: str) -> onnx.TensorProto | None:
    for tensor in graph.initializer:
        if tensor.name == name:
            return tensor
    for node in graph.node:
        if node.op_type == "Constant" and name in node.output:
            return node.attribute[0].t
        for body in bodies(node):
            found = _find(body, name)
            if found is not None:
                return found
    return None


IF = """agraph (float[N,4] x, bool c) => (float[N,3] y) {
    h0 = MatMul(x, w0)
    h = Relu(h0)
    z = If (c) <
        then_branch = yes () => (float[N,6] zt) { a0 = MatMul(h, wt1)  a = Relu(a0)  zt = MatMul(a, wt2) },
        else_branch = no () => (float[N,6] ze) { b = MatMul(h, we)  ze = Tanh(b) }
    >
    y = MatMul(z, w1)
}"""
IF_SIZES = {"w0": (4, 8), "wt1": (8, 10), "wt2": (10, 6), "we": (8, 6), "w1": (6, 3)}

SCAN = """agraph (float[5,2,4] x) => (float[2,3] y, float[5,2,3] z) {
    e = MatMul(x, w0)
    last, every = Scan <num_scan_inputs = 1, body = step (float[2,6] s, float[2,5] u) => (float[2,6] t, float[2,7] o) {
        us = MatMul(u, wu)
        ss = MatMul(s, ws)
        sum = Add(us, ss)
        t = Tanh(sum)
        o = MatMul(t, wo)
    }> (zero, e)
    y = MatMul(last, w1)
    z = MatMul(every, w2)
}"""
SCAN_SIZES = {
    **{"w0": (4, 5), "wu": (5, 6), "ws": (6, 6), "wo": (6, 7), "w1": (6, 3), "w2": (7, 3)},
    "zero": np.zeros((2, 6), np.float32),
}

LOOP = """agraph (float[N,4] x, int64 trips) => (float[N,3] y, float[T,N,3] z)
<bool go = {1}> {
    first = MatMul(x, w0)
    last, every = Loop (trips, go, first) <
        body = step (int64 i, bool before, float[N,6] s) => (bool after, float[N,6] t, float[N,5] o) {
            m = MatMul(s, ws)
            t = Tanh(m)
            size = ReduceMax <keepdims = 0> (x)
            after = Less(size, limit)
            o0 = MatMul(t, wo)
            o = Sigmoid(o0)
        }
    >
    y = MatMul(last, w1)
    z = MatMul(every, w2)
}"""
LOOP_SIZES = {
    **{"w0": (4, 6), "ws": (6, 6), "wo": (6, 5), "w1": (6, 3), "w2": (5, 3)},
    "limit": np.float32(1.5),
}
