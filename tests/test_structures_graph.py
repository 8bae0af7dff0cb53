"""What surrounds the layers: dynamic sizes, shape arithmetic, embeddings, control flow, functions, old files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from build import Net, element, newest
from masks import masked, run
from onnx import TensorProto, helper, numpy_helper
from oracle import assert_close, assert_exact_cut, make_feed, plan_slots

import onnxprune as op


def two_layers(net: Net, x: str, ins: int = 4, hidden: int = 8, outs: int = 3) -> str:
    return net.linear(net.op("Relu", net.linear(x, ins, hidden)), hidden, outs)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("sequence", [1, 5, 33])
def test_batch_and_sequence_stay_dynamic(batch: int, sequence: int) -> None:
    """A cut attention runs at sizes that neither the tool nor the oracle has seen."""
    net = Net(17)
    x = net.op("Tanh", net.linear(net.input("x", ["N", "S", 4]), 4, 12))
    q, k, v = (net.transpose(net.reshape(net.linear(x, 12, 12), 0, 0, 3, 4), 0, 2, 1, 3) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = net.reshape(net.transpose(net.op("MatMul", scores, v), 0, 2, 1, 3), 0, 0, -1)
    y = net.hint(net.linear(y, 12, 3), ["N", "S", 3])
    model = net.model(y)
    result = assert_exact_cut(model)
    assert result is not None
    feed = {"x": np.random.default_rng(0).standard_normal((batch, sequence, 4)).astype(np.float32)}
    assert_close(run(masked(model, plan_slots(result), feed), feed), run(result.model, feed), None, "onnxruntime")


def computed_target(net: Net, x: str, *sizes: int) -> str:
    """Shape -> Gather -> Unsqueeze -> Concat: the batch and the sequence of ``x``, then constants."""
    shape = net.op("Shape", x)
    dynamic = [net.unsqueeze(net.gather(shape, i, 0), [0]) for i in (0, 1)]
    return net.op("Concat", *dynamic, *(net.const([s]) for s in sizes), axis=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_with_computed_targets_and_scale(seed: int) -> None:
    """Every Reshape target comes from Shape, and so does the scale of the scores, which must keep its value."""
    net = Net(17, seed=seed)
    x = net.op("Tanh", net.linear(net.input("x", ["N", "S", 4]), 4, 12))
    parts = []
    for _ in range(3):
        y = net.linear(x, 12, 12)
        y = net.op("Reshape", y, computed_target(net, y, 3, 4))
        parts.append(net.transpose(y, 0, 2, 1, 3))
    q, k, v = parts
    width = net.op("Cast", net.gather(net.op("Shape", q), -1, 0), to=1)
    scores = net.op("Div", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), net.op("Sqrt", width))
    y = net.transpose(net.op("MatMul", net.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
    y = net.linear(net.op("Reshape", y, computed_target(net, y, 12)), 12, 3)
    model = net.model(y, check=False, shapes={y: ["N", "S", 3]})
    assert_exact_cut(model, seed=seed)


def test_target_from_the_width_of_the_tensor_itself() -> None:
    """Shape gives the channels too, divided by the number of heads."""
    net = Net(17)
    x = net.linear(net.input("x", ["N", 5, 4]), 4, 12)
    shape = net.op("Shape", x)
    width = net.op("Div", net.unsqueeze(net.gather(shape, 2, 0), [0]), net.const([3]))
    target = net.op("Concat", net.slice(shape, 0, 2, 0), net.const([3]), width, axis=0)
    grid = net.transpose(net.op("Reshape", x, target), 0, 2, 1, 3)
    y = net.op("MatMul", grid, net.weight(4, 5))
    assert_exact_cut(net.model(y, check=False, shapes={y: ["N", 3, 5, 5]}))


def test_shared_shape_constants_are_copied() -> None:
    """One target serves two reshapes, of which only one has channels to lose."""
    net = Net(17)
    target = net.const([0, 2, 3, -1], name="target")
    x = net.input("x", ["N", 6, 5])
    kept = net.op("Relu", net.op("Reshape", x, target))
    wide = net.conv(x, 6, 6, dims=1)
    cut = net.op("Relu", net.op("Reshape", wide, target))
    y = net.conv(net.reshape(cut, 0, 6, 5), 6, 4, dims=1)
    model = net.model(net.op("Identity", kept), y)
    result = assert_exact_cut(model)
    assert result is not None
    kept_target = next(t for t in result.model.graph.initializer if t.name == "target")
    assert numpy_helper.to_array(kept_target).tolist() == [0, 2, 3, -1]


def test_fixed_batch() -> None:
    net = Net(17)
    x = net.reshape(net.conv(net.input("x", [2, 3, 4, 4]), 3, 6), 2, 6, 16)
    y = net.op("MatMul", net.reshape(x, 2, 96), net.weight(96, 4))
    assert_exact_cut(net.model(y))


@pytest.mark.parametrize("how", ["Shape", "Size", "arithmetic"])
def test_sizes_as_outputs(how: str) -> None:
    """A size that a user reads stays what it was."""
    net = Net(17)
    h = net.op("Relu", net.linear(net.input("x", ["N", 4]), 4, 8))
    size = net.op("Size" if how == "Size" else "Shape", h)
    if how == "arithmetic":
        size = net.op("Mul", net.gather(size, 1, 0), net.const(2))
    assert_exact_cut(net.model(net.linear(h, 8, 3), net.op("Identity", size)), expect_cut=None)


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_with_output_weights(tied: bool) -> None:
    """A language model without normalisation: the width of the table is that of the tied output layer."""
    net = Net(17)
    table = net.weight(11, 8, scale=0.5)
    tokens = net.input("tokens", ["N", "S"], np.int64)
    x = net.op("Add", net.op("Gather", table, tokens), net.gather(net.weight(2, 8, scale=0.5), 1, 0))
    x = net.op("Add", x, two_layers(net, x, 8, 12, 8))
    y = net.op("MatMul", x, net.transpose(table, 1, 0) if tied else net.weight(8, 11))
    result = assert_exact_cut(net.model(y))
    assert result is not None
    stored = next(t for t in result.model.graph.initializer if t.name == table)
    assert list(stored.dims) == [11, 4]


# -- control flow ------------------------------------------------------------------------------------------------------


def branch(kind: str, captured: str, name: str) -> onnx.GraphProto:
    """A body that reads a tensor of the outer graph."""
    out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
    out.type.tensor_type.ClearField("shape")
    return helper.make_graph([helper.make_node(kind, [captured], [out.name])], name, [], [out])


def test_if_bodies_capture_tensors() -> None:
    """What a body reads keeps its size; layers around are cut."""
    net = Net(17)
    x = net.input("x", ["N", 4])
    h = net.linear(net.op("Relu", net.linear(x, 4, 8)), 8, 6)
    flag = net.op("Greater", net.op("ReduceMax", x, keepdims=0), net.const(0.5, net.dtype))
    y = net.op("If", flag, then_branch=branch("Relu", h, "then"), else_branch=branch("Tanh", h, "other"))
    net.hint(y, ["N", 6])
    model = net.model(two_layers(net, y, 6, 10, 3), check=False, shapes={})
    result = assert_exact_cut(model)
    assert result is not None
    kept = next(n for n in result.model.graph.node if n.op_type == "If")
    assert kept == next(n for n in model.graph.node if n.op_type == "If")


def test_loop_carries_a_tensor() -> None:
    net = Net(17)
    x = net.input("x", ["N", 4])
    h = net.linear(net.op("Relu", net.linear(x, 4, 8)), 8, 6)
    weight = net.weight(6, 6, scale=0.3)
    info = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
        helper.make_tensor_value_info("s_in", TensorProto.FLOAT, ["N", 6]),
    ]
    outs = [
        helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
        helper.make_tensor_value_info("s_out", TensorProto.FLOAT, ["N", 6]),
    ]
    nodes = [
        helper.make_node("Identity", ["go_in"], ["go_out"]),
        helper.make_node("MatMul", ["s_in", weight], ["s_mul"]),
        helper.make_node("Tanh", ["s_mul"], ["s_out"]),
    ]
    body = helper.make_graph(nodes, "body", info, outs)
    y = net.op("Loop", net.const(3), net.const(True), h, body=body)
    net.hint(y, ["N", 6])
    model = net.model(two_layers(net, y, 6, 10, 3), check=False, shapes={})
    result = assert_exact_cut(model)
    assert result is not None
    stored = next(t for t in result.model.graph.initializer if t.name == weight)
    assert list(stored.dims) == [3, 3]


def test_scan_over_a_sequence() -> None:
    net = Net(17)
    x = net.input("x", [5, 2, 4])
    h = net.linear(net.op("Relu", net.linear(x, 4, 8)), 8, 6)
    first = net.const(np.zeros((2, 6)), net.dtype)
    sizes = [("s_in", [2, 6]), ("e", [2, 6])]
    ins = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in sizes]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 6]) for n in ("s_out", "y_out")]
    nodes = [helper.make_node("Add", ["s_in", "e"], ["s_out"]), helper.make_node("Tanh", ["s_out"], ["y_out"])]
    _, y = net.op("Scan", first, h, n=2, body=helper.make_graph(nodes, "body", ins, outs), num_scan_inputs=1)
    net.hint(y, [5, 2, 6])
    model = net.model(two_layers(net, y, 6, 10, 3), check=False, shapes={})
    assert_exact_cut(model)


# -- files -------------------------------------------------------------------------------------------------------------


def test_local_functions() -> None:
    """A layer as a function of the model, called twice; one function calls another."""
    net = Net(17)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    act = helper.make_function("local", "Act", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], imports)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "bias"], ["s"]),
        helper.make_node("Act", ["s"], ["y"], domain="local"),
    ]
    layer = helper.make_function("local", "Layer", ["x", "w", "bias"], ["y"], nodes, imports)
    net.functions.extend([act, layer])
    x = net.input("x", ["N", 4])
    for ins, outs in ((4, 8), (8, 6)):
        x = net.op("Layer", x, net.weight(ins, outs, scale=0.5), net.weight(outs, scale=0.5), domain="local")
        net.hint(x, ["N", outs])
    assert_exact_cut(net.model(net.linear(x, 6, 3)))


def test_layer_that_reads_and_writes_graph_outputs() -> None:
    """An output in the middle keeps the channels in front of it; those behind are cut."""
    net = Net(17)
    middle = two_layers(net, net.input("x", ["N", 4]), 4, 8, 6)
    result = assert_exact_cut(net.model(middle, two_layers(net, middle, 6, 10, 3)))
    assert result is not None
    assert sorted(g.units for g in result.plan.groups) == [8, 10]


def test_nodes_metadata_and_names_stay() -> None:
    """What did not need to change is as it was."""
    net = Net(17)
    model = net.model(two_layers(net, net.input("x", ["N", 4])))
    model.producer_name, model.doc_string, model.graph.doc_string = "exporter", "a model", "its graph"
    model.metadata_props.add(key="author", value="someone")
    for node in model.graph.node:
        node.doc_string = f"from {node.op_type}"
    result = assert_exact_cut(model)
    assert result is not None
    assert result.model.producer_name == "exporter"
    assert result.model.doc_string == "a model"
    assert result.model.graph.doc_string == "its graph"
    assert list(result.model.graph.node) == list(model.graph.node)


@pytest.mark.parametrize("opset", [7, 9])
def test_old_files_with_every_initializer_an_input(opset: int, tmp_path: Path) -> None:
    net = Net(opset, ir=3)
    x = net.op("Relu", net.norm(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6), 6))
    model = net.model(net.linear(net.reshape(net.op("GlobalAveragePool", x), -1, 6), 6, 3, gemm=True))
    path = tmp_path / "old.onnx"
    onnx.save(model, path)
    result = op.prune(path, ratio=0.5, criterion="random", latency=False)
    result.save(tmp_path / "cut.onnx")
    cut = onnx.load(tmp_path / "cut.onnx")
    declared = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in cut.graph.input}
    assert declared == {"x": [0, 3, 6, 6], **{t.name: list(t.dims) for t in cut.graph.initializer}}
    feed = make_feed(model, 0)
    assert_close(run(masked(model, plan_slots(result), feed), feed), run(cut, feed), None, "onnxruntime")


def test_external_data(tmp_path: Path) -> None:
    """Read lazily, written back as external data, the same numbers."""
    net = Net(17)
    model = net.model(two_layers(net, net.input("x", ["N", 40]), 40, 64, 30))
    path = tmp_path / "big.onnx"
    onnx.save(model, path, save_as_external_data=True, location="big.bin", size_threshold=128)
    model = onnx.load(path)
    result = op.prune(path, ratio=0.5, criterion="random", latency=False)
    result.save(tmp_path / "cut.onnx")
    raw = onnx.load(tmp_path / "cut.onnx", load_external_data=False)
    assert any(t.data_location == TensorProto.EXTERNAL for t in raw.graph.initializer)
    feed = make_feed(model, 1)
    cut = onnx.load(tmp_path / "cut.onnx")
    assert_close(run(masked(model, plan_slots(result), feed), feed), run(cut, feed), None, "onnxruntime")


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 17, 19, 21, newest()])
def test_the_same_net_at_every_opset(opset: int) -> None:
    """Residual, pooling, slicing, squeezing and clipping, in the spelling of the opset."""
    net = Net(opset)
    x = net.op("Relu", net.norm(net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8), 8))
    y = net.op("Add", x, net.conv(net.op("Tanh", net.conv(x, 8, 6)), 6, 8))
    y = net.op("Clip", y, min=-1.0, max=1.0) if opset < 11 else net.op("Clip", y, net.const(-1.0, np.float32))
    y = net.op("Concat", net.slice(y, 0, 4, 1), net.slice(y, 4, 8, 1), axis=1)
    y = net.squeeze(net.reduce("ReduceMean", net.pad(y, [0, 0, 1, 1, 0, 0, 1, 1]), [2, 3]), [2, 3])
    assert_exact_cut(net.model(net.linear(y, 8, 3, gemm=True)))


def test_sequences_and_optionals_around_a_cut() -> None:
    """Values that are no tensors are left alone."""
    net = Net(17)
    x = two_layers(net, net.input("x", ["N", 4]), 4, 8, 6)
    parts = net.op("SplitToSequence", x, net.const([3, 3]), axis=1)
    y = net.hint(net.op("SequenceAt", parts, net.const(1)), ["N", 3])
    model = net.model(net.op("Relu", y), check=False)
    assert element(np.float32) == model.graph.output[0].type.tensor_type.elem_type
    assert_exact_cut(model, validate=False)


def test_weights_that_are_filled_in_at_run_time_are_left_with_a_reason() -> None:
    net = Net(9, ir=3)
    x = net.op("MatMul", net.input("x", ["N", 4]), net.op("ConstantOfShape", net.const([4, 6])))
    y = net.op("MatMul", net.op("Relu", x), net.op("ConstantOfShape", net.const([6, 2])))
    (group,) = [g for g in op.analyze(net.model(y)).groups if g.size == 6]
    assert not group.prunable and group.reason.startswith("not-stored")


def test_channels_that_only_go_all_at_once_say_so() -> None:
    """A sum of channels with the same ones turned round ties each to all others: the layer stays, with its reason."""
    net = Net(13)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16))
    turned = net.op("Concat", net.slice(x, 13, 16, 1), net.slice(x, 0, 13, 1), axis=1)
    y = net.conv(net.op("Relu", net.conv(net.op("Add", x, turned), 16, 12)), 12, 4)
    analysis = op.analyze(net.model(y))
    group = next(g for g in analysis.groups if g.size < 2)
    assert group.reason.startswith("tied-together") and not group.prunable
    result = op.prune(net.model(y), ratio=0.5, latency=False)
    first, second, last = result.report.layers
    assert first.reason == group.reason and first.channels_after == 16
    assert not second.reason and second.channels_after == 6 and last.reason.startswith("graph-output")
