"""What is computed from weights alone becomes a weight: cut like one, and computed again where nothing was cut."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from masks import run
from onnx import helper
from oracle import assert_exact_cut

import onnxprune as op
from onnxprune.graph.canonical import fold
from onnxprune.graph.view import Graph
from onnxprune.io.read import load
from onnxprune.io.write import assemble

ZOO = Path(__file__).parents[3] / "shared" / "zoo"


def standardised(net: Net, outs: int, ins: int, kernel: int) -> str:
    """A convolution's weight with zero mean and unit variance per output channel, step by step."""
    w = net.weight(outs, ins, kernel, kernel)
    centred = net.op("Sub", w, net.reduce("ReduceMean", w, [1, 2, 3]))
    variance = net.reduce("ReduceMean", net.op("Mul", centred, centred), [1, 2, 3])
    return str(net.op("Div", centred, net.op("Sqrt", net.op("Add", variance, net.const(1e-5)))))


def standardised_at_once(net: Net, outs: int, ins: int, kernel: int) -> str:
    """The same as a batch normalisation in training mode over the output channels."""
    w = net.reshape(net.weight(outs, ins, kernel, kernel), 1, outs, -1)
    # Four constants, not two: onnxruntime writes the running mean and variance over what it read them from.
    vectors = [net.const(np.full(outs, value), np.float32) for value in (1, 0, 0, 1)]
    y = net.op("BatchNormalization", w, *vectors, n=3, training_mode=1, epsilon=1e-5)[0]
    return net.reshape(y, outs, ins, kernel, kernel)


def weight_norm(net: Net, outs: int, ins: int, kernel: int) -> str:
    v = net.weight(outs, ins, kernel, kernel)
    size = net.reduce("ReduceL2", v, [1, 2, 3])
    return str(net.op("Div", net.op("Mul", net.weight(outs, 1, 1, 1), v), size))


def scaled(net: Net, outs: int, ins: int, kernel: int) -> str:
    w = net.op("Mul", net.weight(outs, ins, kernel, kernel), net.const(0.7))
    return str(net.op("Cast", net.op("Identity", w), to=1))


SPELLINGS = [standardised, standardised_at_once, weight_norm, scaled]


def conv_net(spelling: Any, opset: int = 17) -> onnx.ModelProto:
    net = Net(opset)
    x = net.input("x", ["N", 3, 8, 8])
    x = net.op("Conv", x, spelling(net, 8, 3, 3), net.weight(8))
    x = net.op("Relu", net.op("Conv", net.op("Relu", x), spelling(net, 6, 8, 3)))
    return net.model(net.op("Conv", x, net.weight(2, 6, 1, 1)))


def folded(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The prepared model and how many nodes became weights."""
    loaded = load(model)
    graph, folds = fold(Graph.of(loaded.proto, loaded.weights))
    return assemble(graph.proto, graph.weights), len(folds)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node if n.op_type not in ("Identity", "Cast", "Reshape")]


@pytest.mark.parametrize("opset", [15, 18])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_computed_weight_is_folded_and_computes_the_same(spelling: Any, opset: int) -> None:
    model = conv_net(spelling, opset)
    prepared, count = folded(model)
    assert count == 2
    assert kinds(prepared) == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    assert {t.name for t in prepared.graph.initializer} <= {name for n in prepared.graph.node for name in n.input}
    onnx.checker.check_model(prepared, full_check=True)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    for name, value in run(model, feed).items():
        assert np.abs(run(prepared, feed)[name] - value).max() <= 2e-6 * np.abs(value).max()


@pytest.mark.parametrize("opset", [15, 18])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_is_cut_and_named_as_in_the_input(spelling: Any, opset: int) -> None:
    model = conv_net(spelling, opset)
    result = assert_exact_cut(model, ratio=0.5, tolerance=2e-5)
    assert result is not None
    assert kinds(result.model) == ["Conv", "Relu", "Conv", "Relu", "Conv"]
    names = {name for n in model.graph.node for name in (*n.input, *n.output)}
    assert all(slot["tensor"] in names for group in result.plan.to_dict()["groups"] for slot in group["slots"])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_without_a_cut_it_is_computed_as_before(spelling: Any) -> None:
    model = onnx.shape_inference.infer_shapes(conv_net(spelling))
    assert op.prune(model, ratio=0.0, validate=False).model == model


def test_what_is_not_cut_is_computed_as_before() -> None:
    model = conv_net(standardised)
    first, second = (n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1].startswith("div"))
    result = op.prune(model, ratio=0.5, exclude=[first], latency=False)
    # the second layer lost outputs and the first kept all: only the second is folded
    assert kinds(result.model).count("Div") == 1
    assert {n.op_type for n in result.model.graph.node if n.name == second} == {"Conv"}


def test_patterns_know_a_folded_weight_by_what_it_was_computed_from() -> None:
    model = conv_net(weight_norm)
    source = next(n.input[0] for n in model.graph.node if n.op_type == "ReduceL2")
    result = op.prune(model, include=[source], ratio=0.5, latency=False)
    assert [layer.channels_after for layer in result.report.layers] == [4, 6, 2]


W = np.random.default_rng(0).standard_normal((4, 3, 1, 1))


def test_plain_movement_is_left_to_labels() -> None:
    net = Net(17)
    w = net.transpose(net.op("Concat", net.weight(3, 2, 1, 1), net.weight(3, 2, 1, 1), axis=1), 1, 0, 2, 3)
    model = net.model(net.op("Conv", net.input("x", ["N", 3, 4, 4]), w))
    assert folded(model) == (model, 0)


def test_quantised_weights_stay_in_their_codes() -> None:
    net = Net(17)
    codes, scale = net.const(np.ones((4, 3, 1, 1)), np.int8), net.const(0.1)
    w = net.op("Mul", net.op("DequantizeLinear", codes, scale), net.const(0.5))
    model = net.model(net.op("Conv", net.input("x", ["N", 3, 4, 4]), w))
    assert folded(model)[1] == 0


@pytest.mark.parametrize("how", ["output", "override", "random"])
def test_what_others_can_see_or_change_stays(how: str) -> None:
    net = Net(17)
    w = net.const(W, name="w")
    if how == "random":
        w = net.op("RandomNormalLike", w)
    y = net.op("Conv", net.input("x", ["N", 3, 4, 4]), product := net.op("Mul", w, net.const(2.0)))
    model = net.model(y, *([product] if how == "output" else []), external_inputs=how == "override")
    assert folded(model)[1] == 0


def test_a_body_keeps_what_it_reads() -> None:
    net = Net(17)
    product = net.op("Mul", net.const(W), net.const(2.0))
    y = net.op("Conv", net.input("x", ["N", 3, 4, 4]), product)
    made = helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)
    bodies = [helper.make_graph([helper.make_node(k, [product], ["inner"])], k, [], [made]) for k in ("Neg", "Abs")]
    z = net.op("If", net.input("c", [], bool), then_branch=bodies[0], else_branch=bodies[1])
    model = net.model(y, z, shapes={z: [4, 3, 1, 1]}, check=False)
    assert folded(model)[1] == 1, "a body that lies open reads the folded weight as others do"
    # A body that stays closed, here for its sparse constant, names what it reads: that has to be there.
    values = helper.make_tensor("sparse", onnx.TensorProto.FLOAT, [1], [1.0])
    where = helper.make_tensor("where", onnx.TensorProto.INT64, [1], [0])
    model.graph.node[-1].attribute[0].g.sparse_initializer.append(helper.make_sparse_tensor(values, where, [3]))
    assert folded(model)[1] == 0


def test_a_table_that_layers_compute_from_weights_is_no_weight() -> None:
    """A bias table from a small perceptron over constant positions: its layers can be cut themselves."""
    net = Net(17)
    hidden = net.op("Relu", net.op("MatMul", net.const(np.ones((50, 2)), np.float32), net.weight(2, 64)))
    table = net.op("MatMul", hidden, net.weight(64, 4))
    model = net.model(net.op("Add", net.linear(net.input("x", ["N", 50, 4]), 4, 4), table))
    assert folded(model)[1] == 0


def test_a_weight_that_stays_for_others_is_not_kept_twice() -> None:
    """A large tied weight, scaled for one of its readers, would be in the model twice."""
    net = Net(17)
    table = net.weight(300, 200, name="table")
    x = net.op("Gather", table, net.input("x", ["N", 5], np.int64))
    model = net.model(net.op("MatMul", x, net.op("Mul", net.transpose(table, 1, 0), net.const(2.0))))
    assert folded(model)[1] == 0


@pytest.mark.parametrize("name", ["hf_bit__ts", "hf_wav2vec2_cls__ts"])
def test_exported_models(name: str, tmp_path: Path) -> None:
    """Weight standardisation and weight normalisation as exporters write them."""
    path = ZOO / f"{name}.onnx.gz"
    if not path.is_file():
        pytest.skip("the folder of exported models is not here")
    spec = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model = zoo.fill(path)
    assert folded(model)[1] >= 1
    result = op.prune(model, ratio=0.3, latency=False)
    assert result.report.exactness.passed
    assert result.report.totals.params_after < 0.9 * result.report.totals.params_before


def ranged(net: Net) -> str:
    steps = net.op("Range", net.const(0), net.const(12), net.const(1))
    return str(net.op("Mul", net.op("Cast", steps, to=1), net.const(0.1)))


def counted(net: Net) -> str:
    """From whole numbers that are stored."""
    return str(net.op("Cast", net.const(np.arange(12)), to=1))


def sinusoidal(net: Net) -> str:
    """Positions of a transformer: sin and cos of 10000^(-2i/d) for each of five places."""
    place = net.unsqueeze(net.op("Cast", net.op("Range", net.const(0), net.const(5), net.const(1)), to=1), [1])
    steps = net.op("Cast", net.op("Range", net.const(0), net.const(12), net.const(2)), to=1)
    angles = net.op("Mul", place, net.op("Pow", net.const(1e4), net.op("Mul", steps, net.const(-1 / 12))))
    return str(net.op("Concat", net.op("Sin", angles), net.op("Cos", angles), axis=1))


def summed(net: Net) -> str:
    return str(net.op("Softmax", net.weight(12), axis=0))


def of_sizes(net: Net) -> str:
    """As long as another table, of which only the size is asked."""
    size = net.op("Gather", net.op("Shape", net.weight(12, 3)), net.const(0))
    return str(net.op("Cast", net.op("Range", net.const(0), size, net.const(1)), to=1))


OPERANDS = [ranged, counted, sinusoidal, summed, of_sizes]


def beside(made: Any, opset: int = 17, times: int = 1) -> onnx.ModelProto:
    net = Net(opset)
    y, table = net.input("x", ["N", 5, 6]), ""
    for k in range(times):
        table = table or made(net)
        y = net.op("Tanh", net.op("Add", net.linear(y, 12 if k else 6, 12), table))
    last = net.linear(y, 12, 4)
    return net.model(last, check=False, shapes={last: ["N", 5, 4]})  # onnx's own values of sizes get Unsqueeze wrong


@pytest.mark.parametrize("made", OPERANDS)
@pytest.mark.parametrize("opset", [13, 17])
def test_operands_that_are_computed_from_constants_are_cut(made: Any, opset: int) -> None:
    """They freeze nothing, and are stored for the channels that are left."""
    result = assert_exact_cut(beside(made, opset))
    assert result is not None
    assert {t.dims[-1] for t in result.model.graph.initializer if t.dims and t.data_type == 1} <= {6, 4, 3}


@pytest.mark.parametrize("made", OPERANDS)
def test_operands_are_computed_as_before_where_nothing_was_cut(made: Any) -> None:
    model = beside(made)
    result = op.Pipeline([op.passes.Prune("l2", 0.0)]).run(model)
    assert [n.op_type for n in result.model.graph.node] == [n.op_type for n in model.graph.node]


def test_what_would_outgrow_the_model_is_not_stored() -> None:
    """A table of 2 MB beside weights of a few kilobytes is computed anew in every run."""
    net = Net(17)
    long = net.op("Cast", net.op("Range", net.const(0), net.const(40_000 * 12), net.const(1)), to=1)
    table = net.reshape(net.op("Mul", long, net.const(1e-6)), 40_000, 12)
    y = net.op("Add", net.linear(net.input("x", ["N", 6]), 6, 12), net.slice(table, 0, 1, 0))
    model = net.model(net.linear(y, 12, 4))
    result = op.Pipeline([op.passes.Prune("l2", 0.0)]).run(model)
    assert result.model.ByteSize() < 10_000


def test_a_source_that_is_read_for_its_sizes_alone_stays() -> None:
    """A cut of it would save nothing, and what is computed from it elsewhere would be another model's."""
    net = Net(17)
    table = net.weight(4, 8, name="table")
    y = net.op("MatMul", net.op("Mul", table, net.const(0.5)), net.input("x", ["N", 8, 5]))
    moved = net.transpose(net.reshape(table, 4, 2, 4), 1, 0, 2)
    rows = net.op(
        "Concat", net.const([-1]), net.op("Gather", net.op("Shape", moved), net.const([1])), net.const([5]), axis=0
    )
    y = net.hint(net.op("Reshape", y, rows), ["N", 4, 5])
    y = net.linear(net.linear(y, 5, 6), 6, 3)
    result = assert_exact_cut(net.model(y, check=False, shapes={y: ["N", 4, 3]}))
    assert result is not None and not any(s.tensor == "table" for g in result.plan.groups for s in g.slots)


def test_a_source_that_is_cut_for_others_is_not_computed_with_again() -> None:
    """What was computed from the whole of it stays whole beside an input."""
    net = Net(17)
    table = net.weight(12, name="table")
    one = net.linear(net.op("Tanh", net.op("Add", net.linear(net.input("x", ["N", 6]), 6, 12), table)), 12, 3)
    other = net.op("Add", net.input("z", ["N", 12]), net.op("Softmax", table, axis=0))
    result = op.prune(net.model(one, net.linear(other, 12, 3)), ratio=0.5, latency=False)
    assert result.report.exactness.passed
    sizes = {t.name: list(t.dims) for t in result.model.graph.initializer}
    assert sizes["table"] == [6] and sum(s == [12] for s in sizes.values()) == 1


def test_a_computed_mask_is_no_weight() -> None:
    """Minus infinity above the diagonal has no score: queries that are stored keep their number beside it."""
    net = Net(17)
    steps = net.op("Range", net.const(0), net.const(6), net.const(1))
    hidden = net.op("Less", net.unsqueeze(steps, [1]), net.unsqueeze(steps, [0]))
    mask = net.op("Where", hidden, net.const(-np.inf), net.const(0.0))
    x = net.linear(net.input("x", ["N", 6, 5]), 5, 8)
    scores = net.op("Add", net.op("MatMul", net.weight(6, 8), net.transpose(x, 0, 2, 1)), mask)
    y = net.op("MatMul", net.op("Softmax", scores), x)
    y = net.op("MatMul", net.weight(3, 6), y)
    assert_exact_cut(net.model(y, check=False, shapes={y: ["N", 3, 8]}), expect_cut=None)
