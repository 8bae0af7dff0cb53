"""Changes of a graph view in place: view, skeleton and weights stay those of one model."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.graph.view import Graph, GraphEditor
from onnxprune.io.weights import ArrayWeight, Weight

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] y)
<float[3] shared = {1.0, 2.0, 3.0}, float[3, 3, 1, 1] kernel = {1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0}>
{
  one = Conv(x, kernel, shared)
  two = Conv(one, kernel)
  y = PRelu(two, shared)
}"""


def edited() -> tuple[Graph, GraphEditor]:
    model = onnx.parser.parse_model(TEXT)
    weights: dict[str, Weight] = {
        t.name: ArrayWeight(t.name, numpy_helper.to_array(t)) for t in model.graph.initializer
    }
    graph = Graph.of(model, weights)
    return graph, GraphEditor(graph, weights)


def assert_in_step(editor: GraphEditor) -> None:
    """The view equals one that is built anew of the skeleton."""
    graph, again = editor.graph, Graph.of(editor.graph.proto, editor.weights)
    assert [list(n.inputs) for n in graph.nodes] == [list(n.inputs) for n in again.nodes]
    readers = {name: [(n.index, k) for n, k in found] for name, found in graph.consumers.items() if found}
    assert readers == {name: [(n.index, k) for n, k in found] for name, found in again.consumers.items()}


def test_a_node_reads_a_copy_and_a_new_bias() -> None:
    graph, editor = edited()
    first, second, last = graph.nodes
    copy = ArrayWeight(editor.unused_name("shared"), editor.weights["shared"].read())
    assert copy.name == "shared_"
    editor.add_constant(copy)
    editor.connect(first, 2, copy.name)
    assert_in_step(editor)
    assert list(first.inputs) == ["x", "kernel", "shared_"] and [n is last for n, _ in graph.consumers["shared"]] == [
        True
    ]
    editor.add_constant(ArrayWeight("bias", np.ones(3, np.float32)))
    editor.connect(second, 2, "bias")
    assert_in_step(editor)
    onnx.checker.check_model(graph.proto)


def test_other_values_and_other_shapes() -> None:
    graph, editor = edited()
    editor.set_constant(ArrayWeight("kernel", np.zeros((3, 3, 1, 1), np.float32)))
    assert not editor.weights["kernel"].read().any() and not graph.weights["kernel"].read().any()
    editor.reshape_constant(ArrayWeight("shared", np.zeros((3, 1, 1), np.float32)))
    assert next(list(t.dims) for t in graph.proto.graph.initializer if t.name == "shared") == [3, 1, 1]


def test_nodes_are_replaced_and_unread_constants_dropped() -> None:
    graph, editor = edited()
    editor.connect(graph.nodes[0], 2, "")
    assert_in_step(editor)
    editor.replace_nodes({"y": [helper.make_node("Relu", ["two"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]})
    assert [n.op_type for n in graph.proto.graph.node] == ["Conv", "Conv", "Relu", "Relu"]
    editor.drop_unread({"shared", "kernel"})
    assert set(editor.weights) == {"kernel"} == {t.name for t in graph.proto.graph.initializer}
