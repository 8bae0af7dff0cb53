"""Choices and random numbers are held equal where a cut is proved: sound models pass, mistakes are found still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from onnx import helper

import onnxprune as op
from onnxprune.errors import ValidationError
from onnxprune.io.weights import ArrayWeight
from onnxprune.passes import prepared

Patch = pytest.MonkeyPatch


def trunk(net: Net, outs: int = 64) -> tuple[str, str]:
    """Two layers whose 96 hidden units are cut: sums over them come in another order then. Gives these units, too."""
    x = net.op("Relu", net.linear(net.input("x", ["N", 32]), 32, 96))
    total = net.op("Mul", net.reduce("ReduceSum", net.op("Sin", x), [1]), net.const(0.1))
    return x, net.op("Add", net.linear(x, 96, outs), total)


def small_steps(net: Net, x: str) -> str:
    """So large that rounding reaches the digit before the point."""
    return str(net.op("Mul", x, net.const(3e6)))


def alike(net: Net, x: str, ins: int, outs: int) -> str:
    """``outs`` sums over the channels of [N, ins] that are the same but for rounding."""
    rows = net.rng.standard_normal((1, 1, ins)) * (1 + 3e-7 * net.rng.standard_normal((1, outs, 1)))
    return net.reduce("ReduceSum", net.op("Mul", net.unsqueeze(x, [1]), net.const(rows)), [2], keepdims=0)


def chosen(kind: str) -> onnx.ModelProto:
    """A choice by values that are next to each other, and a layer behind it."""
    net = Net(17, seed=1)
    hidden, y = trunk(net)
    if kind in ("Round", "Floor", "Ceil"):
        z = net.op("Mod", net.op(kind, small_steps(net, y)), net.const(17.0), fmod=1)
    elif kind == "Cast":
        z = net.op("Mod", net.op("Cast", small_steps(net, y), to=6), net.const(17, np.int32))
        z = net.op("Cast", z, to=1)
    elif kind == "Greater":
        wide = alike(net, hidden, 96, 64)
        z = net.op("Where", net.op("Greater", wide, net.gather(wide, [0], 1)), y, net.op("Neg", y))
    elif kind in ("ArgMax", "TopK"):
        wide = alike(net, hidden, 96, 64)
        if kind == "ArgMax":
            picked = net.op("ArgMax", wide, axis=1, keepdims=1)
        else:
            _, picked = net.op("TopK", wide, net.const([5]), axis=1, n=2)
        return net.model(net.op("GatherElements", y, picked, axis=1), picked)
    return net.model(net.linear(net.op("Tanh", z), 64, 5))


CHOICES = ["Round", "Floor", "Ceil", "Cast", "Greater", "ArgMax", "TopK"]


def detector() -> onnx.ModelProto:
    """Boxes and scores from a trunk, the best of them by NonMaxSuppression, and their features through a last layer."""
    net = Net(17, seed=2)
    hidden, y = trunk(net, 160)
    boxes = net.reshape(y, 0, 40, 4)
    scores = net.unsqueeze(net.op("Sigmoid", alike(net, hidden, 96, 40)), [1])
    found = net.op("NonMaxSuppression", boxes, scores, net.const([20]), net.const(0.5), net.const(0.0))
    rows = net.op("GatherND", boxes, net.gather(found, [0, 2], 1))
    last = net.linear(net.op("Relu", net.linear(rows, 4, 16)), 16, 3)
    return net.model(last, found, check=False, shapes={found: ["M", 3], last: ["M", 3]})


def dropping(**extra: Any) -> onnx.ModelProto:
    net = Net(17, seed=3)
    hidden = net.op("Relu", net.linear(net.input("x", ["N", 32]), 32, 64))
    hidden = net.op("Dropout", hidden, net.const(0.3), net.const(True), **extra)
    return net.model(net.linear(hidden, 64, 8))


def noisy(kind: str) -> onnx.ModelProto:
    """Noise as large as what is cut, and noise of a fixed size."""
    net = Net(17, seed=4)
    hidden = net.op("Relu", net.linear(net.input("x", ["N", 32]), 32, 64))
    if kind.endswith("Like"):
        hidden = net.op("Add", hidden, net.op(kind, hidden))
    elif kind == "Bernoulli":
        hidden = net.op("Mul", hidden, net.op(kind, net.op("Sigmoid", hidden)))
    y = net.linear(hidden, 64, 8)
    if kind in ("RandomNormal", "RandomUniform"):
        y = net.op("Add", y, net.op(kind, shape=[8]))
    elif kind == "Multinomial":
        y = net.op("GatherElements", y, net.op(kind, y, sample_size=3, dtype=7), axis=1)
    return net.model(y)


DRAWS = ["RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"]


def held(result: op.Result) -> str:
    """What was said of the proof, which has passed."""
    facts = result.report.exactness
    assert facts.passed is True and facts.batches[:2] == [2, 3]
    return facts.note


@pytest.mark.parametrize("kind", CHOICES)
def test_choices_that_rounding_flips(kind: str) -> None:
    note = held(op.prune(chosen(kind), ratio=0.5, latency=False))
    assert "compared before operators that choose or draw" in note and kind in note


def test_a_detector_with_its_post_processing() -> None:
    assert "NonMaxSuppression" in held(op.prune(detector(), ratio=0.5, latency=False))


@pytest.mark.parametrize("kind", DRAWS)
def test_random_numbers_without_a_seed(kind: str) -> None:
    note = held(op.prune(noisy(kind), ratio=0.5, latency=False))
    assert f"random numbers of {kind} are the same in both models" in note


def test_dropout_in_training_mode() -> None:
    result = op.prune(dropping(), ratio=0.5, latency=False)
    assert "random numbers of Dropout" in held(result)
    assert not next(n for n in result.model.graph.node if n.op_type == "Dropout").attribute


def spoil(patch: Patch, change: Callable[[onnx.ModelProto, dict[str, Any]], None]) -> None:
    """Change what is cut behind everybody's back."""
    right = prepared.cut

    def wrong(table: Any, removed: Any) -> Any:
        proto, weights = right(table, removed)
        change(proto, weights)
        return proto, weights

    patch.setattr(prepared, "cut", wrong)


def larger(place: int) -> Callable[[onnx.ModelProto, dict[str, Any]], None]:
    """One of the matrices is a little larger."""

    def change(proto: onnx.ModelProto, weights: dict[str, Any]) -> None:
        names = [n.input[1] for n in proto.graph.node if n.op_type == "MatMul"]
        array = np.array(weights[names[place]].read())
        weights[names[place]] = ArrayWeight(names[place], array * np.float32(1.01))

    return change


def another_choice(proto: onnx.ModelProto, weights: dict[str, Any]) -> None:
    """The operator that chooses does so in another way."""
    node = next(n for n in proto.graph.node if n.op_type in {*CHOICES, "NonMaxSuppression"})
    if node.op_type == "NonMaxSuppression":
        weights[node.input[2]] = ArrayWeight(node.input[2], np.array([2]))
    elif node.op_type == "TopK":
        node.attribute.append(helper.make_attribute("largest", 0))
    elif node.op_type == "ArgMax":
        node.op_type = "ArgMin"
    elif node.op_type == "Greater":
        node.op_type = "Less"
    else:
        node.op_type = {"Round": "Floor", "Floor": "Ceil", "Ceil": "Floor"}[node.op_type]


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("kind", [*CHOICES, "NonMaxSuppression"])
def test_mistakes_in_front_and_behind_are_found(kind: str, place: int, monkeypatch: Patch) -> None:
    model = detector() if kind == "NonMaxSuppression" else chosen(kind)
    spoil(monkeypatch, larger(place))
    with pytest.raises(ValidationError, match="The pruned model is not exact"):
        op.prune(model, ratio=0.5, latency=False)


@pytest.mark.parametrize("kind", ["Round", "Floor", "Ceil", "Greater", "ArgMax", "TopK", "NonMaxSuppression"])
def test_mistakes_in_the_choice_are_found(kind: str, monkeypatch: Patch) -> None:
    model = detector() if kind == "NonMaxSuppression" else chosen(kind)
    spoil(monkeypatch, another_choice)
    with pytest.raises(ValidationError, match="The pruned model is not exact"):
        op.prune(model, ratio=0.5, latency=False)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", [*DRAWS, "Dropout"])
def test_mistakes_among_random_numbers_are_found(kind: str, place: int, monkeypatch: Patch) -> None:
    model = dropping() if kind == "Dropout" else noisy(kind)
    spoil(monkeypatch, larger(place))
    with pytest.raises(ValidationError, match="The pruned model is not exact"):
        op.prune(model, ratio=0.5, latency=False)


def test_random_numbers_in_a_body_are_not_provable_where_their_sizes_change() -> None:
    """One output has such numbers, the other has none: nothing is said to be exact, and a mistake is still one."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 32] x, bool c) => (float[N, 8] y, float[N, 8] z) {
        a = MatMul (x, w1)  h = Relu (a)
        n = If (c) <then_branch = t () => (float[N, 64] p) { r = RandomNormalLike (h)  p = Add (h, r) },
                    else_branch = e () => (float[N, 64] q) { q = Identity (h) }>
        y = MatMul (n, w2)  z = MatMul (h, w3) }"""
    model = onnx.parser.parse_model(text)
    draw = np.random.default_rng(0)
    for name, shape in (("w1", (32, 64)), ("w2", (64, 8)), ("w3", (64, 8))):
        array = draw.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    facts = op.prune(model, ratio=0.5, latency=False).report.exactness
    assert facts.passed is None and "not provable: y" in facts.note


def enclosed() -> onnx.ModelProto:
    """The choice is made in a branch, as exported detectors do it, from what both branches read."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N, 32] x) => (float[N, 5] y, int64[N, 1] k) {
        a = MatMul (x, w1)  h = Relu (a)  axis = Constant <value_ints = [1]> ()  deep = Constant <value_ints = [2]> ()
        row = Unsqueeze (h, axis)  each = Mul (row, rows)  wide = ReduceSum <keepdims = 0> (each, deep)
        low = ReduceMin <keepdims = 0> (x)  none = Constant <value_float = -99.0> ()  c = Greater (low, none)
        k = If (c) <then_branch = t () => (int64[N, 1] p) { p = ArgMax <axis = 1> (wide) },
                    else_branch = e () => (int64[N, 1] q) { q = ArgMin <axis = 1> (wide) }>
        z = MatMul (h, w2)  b = GatherElements <axis = 1> (z, k)  f = Sigmoid (b)  y = MatMul (f, w3) }"""
    model = onnx.parser.parse_model(text)
    draw = np.random.default_rng(1)
    rows = draw.standard_normal((1, 1, 96)) * (1 + 3e-7 * draw.standard_normal((1, 64, 1)))
    shapes = {"w1": (32, 96), "w2": (96, 64), "w3": (1, 5)}
    arrays = {"rows": rows, **{n: draw.standard_normal(s) / np.sqrt(s[0]) for n, s in shapes.items()}}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    return model


def test_choices_in_bodies() -> None:
    note = held(op.prune(enclosed(), ratio=0.5, latency=False))
    assert "compared before operators that choose or draw, and after them with equal choices: Greater, If" in note


@pytest.mark.parametrize("place", range(3))
def test_mistakes_around_bodies_are_found(place: int, monkeypatch: Patch) -> None:
    spoil(monkeypatch, larger(place))
    with pytest.raises(ValidationError, match="The pruned model is not exact"):
        op.prune(enclosed(), ratio=0.5, latency=False)


def test_mistakes_in_bodies_are_found(monkeypatch: Patch) -> None:
    def other(proto: onnx.ModelProto, weights: dict[str, Any]) -> None:
        next(n for n in proto.graph.node if n.op_type == "ArgMax").op_type = "ArgMin"

    spoil(monkeypatch, other)
    with pytest.raises(ValidationError, match="The pruned model is not exact"):
        op.prune(enclosed(), ratio=0.5, latency=False)


def test_half_precision_between_float32_ends() -> None:
    """The tolerance follows the coarsest arithmetic, not what is kept in half precision and computed in single."""
    tolerances = {}
    for half in (np.float16, np.float32):
        net = Net(17, seed=5)
        x = net.op("Cast", net.input("x", ["N", 3, 8, 8]), to=10 if half is np.float16 else 1)
        for ins, outs in ((3, 16), (16, 16), (16, 4)):
            weight = net.const(net.rng.standard_normal((outs, ins, 3, 3)) / np.sqrt(9 * ins), half)
            x = net.op("Relu", net.op("Conv", x, weight, pads=[1] * 4))
        model = net.model(net.op("Cast", x, to=1))
        report = op.factorize(model, ratio=0.4, latency=False, timed=False).report
        assert report.product.passed
        tolerances[half] = report.product.tolerance
        assert op.prune(model, ratio=0.5, latency=False).report.exactness.tolerance == tolerances[half]
    assert tolerances == {np.float16: 4 * 2.0**-10, np.float32: 1e-4}


def test_what_is_only_kept_in_half_precision_is_held_to_single() -> None:
    net = Net(17, seed=6)
    weight = net.op("Cast", net.const(net.rng.standard_normal((8, 64)), np.float16), to=1)
    x = net.op("Relu", net.op("MatMul", net.input("x", ["N", 8]), weight))
    assert op.prune(net.model(net.linear(x, 64, 4)), ratio=0.5, latency=False).report.exactness.tolerance == 1e-4
