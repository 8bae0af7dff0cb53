"""Whole graphs: several ways to a weight, what has no gradient, and what is constant."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from differences import check, static, weighted

import onnxprune as op
from onnxprune.gradients.backward import training_graph
from onnxprune.gradients.static import StaticGraph
from onnxprune.operators.registry import gradient_of, unregister
from onnxprune.runtime.sessions import open_session, run
from onnxprune.training.parameters import heads, trainable

FEED = {"x": np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)}


def residual(opset: int = 18) -> onnx.ModelProto:
    """Convolutions of all kinds around a sum, a product and a head, with a weight that is read twice."""
    net = Net(opset)
    x = net.input("x", ["N", 3, 8, 8])
    stem = net.op("Relu", net.norm(net.conv(x, 3, 4), 4))
    shared = net.weight(4, 4, 3, 3)
    one = net.op("Relu", net.op("Conv", stem, shared, pads=[1] * 4))
    two = net.op("Conv", one, shared, pads=[1] * 4)
    both = net.op("Sigmoid", net.op("Add", two, stem))
    down = net.conv(net.conv(both, 4, 4, group=4, strides=[2, 2]), 4, 6, kernel=1, pad=False)
    pooled = net.op("MaxPool", down, kernel_shape=[2, 2], strides=[2, 2])
    flat = net.op("Flatten", net.op("GlobalAveragePool", pooled))
    return net.model(net.op("Softmax", net.linear(flat, 6, 5, gemm=True), axis=1))


@pytest.mark.parametrize(("opset", "size"), [(9, 1), (18, 2)])
def test_a_network(opset: int, size: int) -> None:
    training = check(residual(opset), {"x": FEED["x"][:size]})
    assert len(training.gradients) > 10


def nets(op_type: str, **attrs: Any) -> tuple[onnx.ModelProto, list[str]]:
    """Two ways to the output: one through an operator, the other around it."""
    net = Net(18)
    x = net.input("x", ["N", 4])
    before, around, behind = net.weight(4, 4), net.weight(4, 4), net.weight(4, 4)
    inner = net.op(op_type, net.op("MatMul", x, before), **attrs)
    both = net.op("Add", net.op("MatMul", inner, behind), net.op("MatMul", x, around))
    return net.model(both, check=False, shapes={both: ["N", 4]}), [before, around, behind]


def test_an_operator_without_a_gradient_freezes_what_lies_behind_it() -> None:
    model, (before, around, behind) = nets("Hardmax")
    graph = static(model, {"x": FEED["x"][:, 0, 0, :4]})
    training = training_graph(graph, weighted(graph), [before, around, behind])
    assert set(training.gradients) == {around, behind}
    assert "Hardmax" in training.frozen[before]


def test_a_form_without_a_gradient_freezes_as_well() -> None:
    net = Net(18)
    x = net.input("x", ["N", 3, 4, 4])
    weight = net.weight(3, 3, 1, 1)
    y = net.op("MaxPool", net.op("Conv", x, weight), kernel_shape=[2, 2], storage_order=1, n=2)[0]
    behind = net.weight(2, 3, 1, 1)
    graph = static(net.model(net.op("Conv", y, behind)), {"x": FEED["x"][..., :4, :4]})
    training = training_graph(graph, weighted(graph), [weight, behind])
    assert set(training.gradients) == {behind}
    assert "by column" in training.frozen[weight]


def test_steps_send_nothing_and_freeze_nothing() -> None:
    model, (before, around, behind) = nets("Floor")
    graph = static(model, {"x": FEED["x"][:, 0, 0, :4]})
    training = training_graph(graph, weighted(graph), [before, around, behind])
    assert set(training.gradients) == {around, behind}
    assert "does not depend" in training.frozen[before]


def test_shape_arithmetic_is_constant() -> None:
    net = Net(18)
    x = net.input("x", ["N", 3, 8, 8])
    y = net.conv(x, 3, 4)
    batch = net.op("Slice", net.op("Shape", y), net.const([0]), net.const([1]))
    flat = net.op("Reshape", y, net.op("Concat", batch, net.const([-1]), axis=0))
    graph = static(net.model(net.op("MatMul", flat, net.weight(256, 3))), FEED)
    assert [n.op for n in graph.nodes] == ["Conv", "Reshape", "MatMul"]
    training = training_graph(graph, weighted(graph), graph.variables)
    assert not training.frozen


def test_weights_are_found_through_what_reads_them() -> None:
    net = Net(18)
    x = net.input("x", ["N", 4])
    weight = net.weight(3, 4)
    y = net.op("MatMul", x, net.op("Transpose", net.op("Identity", weight), perm=[1, 0]))
    check(net.model(y), {"x": FEED["x"][:, 0, 0, :4]}, [weight])


def test_a_rule_of_another_package_brings_its_own_gradient() -> None:
    class Doubled(op.rules.Rule):
        """2 x."""

        def gradient(self, reverse: Any) -> None:
            reverse.send(0, reverse.tape.scale(reverse.dy, 2.0))

    op.rules.register("test.gradients", "Doubled", rule=Doubled())
    try:
        assert gradient_of("test.gradients", "Doubled", 1) is not None
        assert gradient_of("test.gradients", "Other", 1) is None
    finally:
        unregister("test.gradients", "Doubled")


def test_double_registration_is_an_error() -> None:
    from onnxprune.gradients import built_in
    from onnxprune.operators.registry import register_gradient

    assert built_in.BUILT_IN
    with pytest.raises(ValueError, match="Relu has a gradient already"):
        register_gradient("", "Relu")(lambda reverse: None)


@pytest.mark.parametrize("selection", ["NonMaxSuppression", "NonZero", "Compress"])
def test_what_changes_its_size_with_the_values_is_fitted_in_front_of_it(selection: str) -> None:
    """The training graph is built for the sizes of one call, and the next call has other detections."""
    net = Net(17)
    y = net.linear(net.input("x", [1, 8, 6]), 6, 16)
    boxes, scores = net.linear(net.op("Relu", y), 16, 4), net.op("Sigmoid", net.linear(y, 16, 1))
    if selection == "NonMaxSuppression":
        numbers = [net.const([8]), net.const(0.5), net.const(0.5)]
        index = net.op("NonMaxSuppression", boxes, net.transpose(scores, 0, 2, 1), *numbers)
        chosen = net.op("Gather", net.squeeze(boxes, [0]), net.squeeze(net.slice(index, 2, 3, 1), [1]))
    elif selection == "NonZero":
        index = net.op("NonZero", net.op("Greater", net.reshape(scores, 8), net.const(0.5)))
        chosen = net.op("Gather", net.squeeze(boxes, [0]), net.squeeze(index, [0]))
    else:
        condition = net.op("Greater", net.reshape(scores, 8), net.const(0.5))
        chosen = net.op("Compress", net.squeeze(boxes, [0]), condition, axis=0)
    last = net.linear(chosen, 4, 3)
    model = net.model(last, check=False, shapes={last: [None, 3]})
    graph = static(model, {"x": np.random.default_rng(0).standard_normal((1, 8, 6)).astype(np.float32)})
    tensors = {head.tensor for head in heads(graph, trainable(graph)[0])}
    assert tensors and tensors.isdisjoint({last, chosen, *graph.producer[chosen].outputs})
    assert {np.prod(graph.shapes[name]) for name in tensors} <= {8 * 4, 8}


def test_squares_of_gradients_of_tensors_on_the_way() -> None:
    """The gradient of a tensor is that of an addend behind it; two nodes read the tensor."""
    rng = np.random.default_rng(5)
    x, z = rng.standard_normal((2, 3, 5, 5)).astype(np.float32), rng.standard_normal((2, 4, 5, 5)).astype(np.float32)

    def graph_of(shifted: bool) -> StaticGraph:
        net = Net(18, seed=4)
        first = net.conv(net.input("x", ["N", 3, 5, 5]), 3, 6)
        layers = [net.weight(4, 6, 3, 3) for _ in range(2)]
        read = net.op("Add", first, net.weight(2, 6, 5, 5, scale=0.0)) if shifted else first
        both = [
            net.op("Conv", net.op(op, read), w, pads=[1] * 4) for op, w in zip(("Relu", "Tanh"), layers, strict=True)
        ]
        return static(net.model(net.op("Add", *both)), {"x": x})

    def values_of(graph: StaticGraph, weights: list[str], squares: dict[str, int]) -> list[np.ndarray]:
        (output,) = graph.outputs
        inputs = {"z": (z.shape, np.dtype(np.float32))}
        made = training_graph(
            graph, lambda tape: tape.total(tape.mul(output, "z")), weights, inputs=inputs, squares=squares
        )
        assert list(made.gradients) == weights and list(made.squares) == list(squares)
        feed = {"x": x, "z": z, **{name: graph.constants[name] for name in weights}}
        values = run(open_session(made.model.SerializeToString()), feed)
        return [values[name] for name in (*made.gradients.values(), *made.squares.values())]

    graph = graph_of(True)
    (gradient,) = values_of(graph, [n for n, value in graph.constants.items() if value.shape == (2, 6, 5, 5)], {})
    graph = graph_of(False)
    first = next(node for node in graph.nodes if node.op == "Conv").outputs[0]
    (square,) = values_of(graph, [], {first: 1})
    np.testing.assert_allclose(square, np.square(gradient).sum(axis=1, keepdims=True), rtol=1e-5)
