"""The law of repair: what a removed channel said and others say too is not lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from planted import Planted, draw, error, how, outputs, plan, repaired, session, weights

from onnxprune.channels.plan import Plan

Case = tuple[onnx.ModelProto, Plan]


def twin(net: Planted, y: str, source: int = 1, target: int = 4, axis: int = 0) -> None:
    """Channel ``target`` of what a node makes becomes that of ``source``."""
    net.copy(net.operands(y), source, target, axis)


def convolution(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    twin(net, y)
    return net.model(net.conv(net.op("Relu", y), 6, 4)), plan((y, 1, 6, [4]))


def several_channels(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    twin(net, y, 1, 4)
    twin(net, y, 0, 7)
    z = net.conv(net.op("Relu", y), 8, 6, strides=[2, 2])
    twin(net, z, 5, 2)
    return net.model(net.conv(net.op("Relu", z), 6, 4)), plan((y, 1, 8, [4, 7]), (z, 1, 6, [2]))


def dependent(net: Planted) -> Case:
    """A mixture of two others and a constant, in front of a convolution without padding."""
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    kernel, bias = net.operands(y)
    for name, constant in ((kernel, 0.0), (bias, 0.7)):
        value = net.value(name)
        value[4] = 0.5 * value[0] - 2.0 * value[3] + constant
        net.change(name, value)
    return net.model(net.conv(y, 6, 4, pad=False)), plan((y, 1, 6, [4]))


def constant(net: Planted) -> Case:
    """A channel that is 1 everywhere, read by a convolution that has no bias yet."""
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    kernel, bias = net.operands(y)
    value = net.value(kernel)
    value[4] = 0.0
    net.change(kernel, value)
    value = net.value(bias)
    value[4] = 1.0
    net.change(bias, value)
    return net.model(net.conv(net.op("Relu", y), 6, 4, pad=False, bias=False)), plan((y, 1, 6, [4]))


def grouped(net: Planted) -> Case:
    """One channel of every group."""
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    twin(net, y, 1, 2)
    twin(net, y, 7, 4)
    return net.model(net.conv(net.op("Relu", y), 8, 6, group=2)), plan((y, 1, 8, [2, 4]))


def depthwise(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    z = net.conv(net.op("Relu", y), 6, 6, group=6)
    twin(net, y)
    twin(net, z)
    return net.model(net.conv(net.op("Relu", z), 6, 4, 1)), plan((y, 1, 6, [4]))


def transposed(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 6)
    twin(net, y)
    z = net.op(
        "ConvTranspose", net.op("Relu", y), net.weight(6, 4, 3, 3), net.weight(4), strides=[2, 2], output_padding=[1, 0]
    )
    return net.model(z), plan((y, 1, 6, [4]))


def flattened(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 3, 3, 3]), 3, 6)
    twin(net, y)
    return net.model(net.linear(net.op("Flatten", net.op("Relu", y)), 54, 5, gemm=True)), plan((y, 1, 6, [4]))


def scaled_gemm(net: Planted) -> Case:
    y = net.op("Gemm", net.input("x", ["N", 5]), net.weight(6, 5), net.weight(6), transB=1)
    twin(net, y)
    z = net.op("Gemm", net.op("Tanh", y), net.weight(4, 6), net.weight(4), transB=1, alpha=0.5, beta=3.0)
    return net.model(z), plan((y, 1, 6, [4]))


def product_and_sum(net: Planted) -> Case:
    """MatMul and Add apart; the bias of the second is the addition's."""
    x = net.input("x", ["N", 5, 4])
    y = net.op("Add", net.op("MatMul", x, net.weight(4, 6)), net.weight(6))
    for name in (net.nodes[0].input[1], net.nodes[1].input[1]):
        net.copy([name], 1, 4, -1)
    return net.model(net.linear(net.op("Tanh", y), 6, 4)), plan((y, 2, 6, [4]))


def einsum(net: Planted) -> Case:
    y = net.linear(net.input("x", ["N", 5, 4]), 4, 6, bias=False)
    twin(net, y, axis=1)
    return net.model(net.op("Einsum", net.op("Tanh", y), net.weight(3, 6), equation="btc,dc->btd")), plan(
        (y, 2, 6, [4])
    )


def weight_first(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 3, 9]), 3, 6, dims=1)
    twin(net, y)
    return net.model(net.op("MatMul", net.weight(4, 6), net.op("Relu", y))), plan((y, 1, 6, [4]))


def normalised(net: Planted) -> Case:
    """BatchNormalization in front of the activation and behind the convolution that is repaired."""
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6, bias=False)
    n = net.norm(y, 6)
    twin(net, y)
    twin(net, n)
    z = net.norm(net.conv(net.op("Relu", n), 6, 5, bias=False), 5)
    return net.model(net.conv(net.op("Relu", z), 5, 4)), plan((n, 1, 6, [4]))


def residual(net: Planted) -> Case:
    """A channel of the stream, which all of its branches write and read."""
    stream = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    twin(net, stream)
    for _ in range(2):
        inner = net.op("Relu", net.conv(net.op("Relu", stream), 6, 5))
        branch = net.conv(inner, 5, 6)
        twin(net, branch)
        stream = net.op("Add", stream, branch)
    return net.model(net.conv(net.op("Relu", stream), 6, 4)), plan((stream, 1, 6, [4]))


def inside_a_residual(net: Planted) -> Case:
    """A channel within a branch: the branch is aimed at the sum."""
    stream = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    inner = net.conv(net.op("Relu", stream), 6, 5)
    twin(net, inner)
    stream = net.op("Add", stream, net.conv(net.op("Relu", inner), 5, 6))
    return net.model(net.conv(net.op("Relu", stream), 6, 4)), plan((inner, 1, 5, [4]))


def concatenated(net: Planted) -> Case:
    x = net.input("x", ["N", 3, 5, 5])
    left, right = net.conv(x, 3, 6), net.conv(x, 3, 5)
    twin(net, left)
    return net.model(net.conv(net.op("Relu", net.op("Concat", left, right, axis=1)), 11, 4)), plan((left, 1, 6, [4]))


def three_dimensional(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 2, 4, 4, 4]), 2, 6, dims=3)
    twin(net, y)
    return net.model(net.conv(net.op("Relu", y), 6, 3, dims=3, dilations=[1, 1, 2])), plan((y, 1, 6, [4]))


def channels_last(net: Planted) -> Case:
    """Between two transpositions, as TensorFlow's models have it."""
    y = net.conv(net.input("x", ["N", 3, 5, 5]), 3, 6)
    twin(net, y)
    z = net.linear(net.transpose(net.op("Relu", y), 0, 2, 3, 1), 6, 5)
    return net.model(net.conv(net.op("Relu", net.transpose(z, 0, 3, 1, 2)), 5, 3)), plan((y, 1, 6, [4]))


CASES = {
    f.__name__: f
    for f in (
        convolution, several_channels, dependent, constant, grouped, depthwise, transposed, flattened, scaled_gemm,
        product_and_sum, einsum, weight_first, normalised, residual, inside_a_residual, concatenated, three_dimensional,
        channels_last,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_others_say_too_is_not_lost(name: str) -> None:
    model, removal = CASES[name](Planted(17, seed=3))
    fresh = draw(model, 7, seed=1)
    before, result = repaired(model, removal, draw(model, 120))
    assert error(model, before, fresh) > 1e-2, "the cut alone has to hurt"
    assert error(model, result.model, fresh) < 1e-5, how(result)
    assert_only_weights_change(before, result.model)


@pytest.mark.parametrize("mode", ["bias", "bn", "lstsq", "full"])
def test_every_mode_mends_what_it_can(mode: str) -> None:
    """Means suffice for a constant; a twin takes weights."""
    model, removal = constant(Planted(17, seed=3))
    _, result = repaired(model, removal, draw(model, 60), mode)
    assert error(model, result.model, draw(model, 5, 1)) < 1e-5
    model, removal = convolution(Planted(17, seed=3))
    before, result = repaired(model, removal, draw(model, 60), mode)
    fresh = draw(model, 5, 1)
    left = error(model, result.model, fresh)
    assert (left < 1e-5) if mode in ("lstsq", "full") else (1e-3 < left < error(model, before, fresh))


def assert_only_weights_change(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Nodes, names, interface and metadata stay; a contraction may get a bias; every weight keeps shape and type."""
    onnx.checker.check_model(after, full_check=True)
    session(after)
    old, new = weights(before), weights(after)
    added = new.keys() - old.keys()
    assert old.keys() <= new.keys()
    assert all(old[n].shape == new[n].shape and old[n].dtype == new[n].dtype for n in old)
    assert len(before.graph.node) == len(after.graph.node)
    for left, right in zip(before.graph.node, after.graph.node, strict=True):
        extra = [n for n in right.input if n in added]
        copy = onnx.NodeProto()
        copy.CopyFrom(right)
        copy.input[:] = [n for n in right.input if n not in added]
        assert copy == left and len(extra) <= 1 and (not extra or right.op_type in ("Conv", "ConvTranspose", "Gemm"))
    for a, b in ((before, after),):
        left, right = onnx.ModelProto(), onnx.ModelProto()
        left.CopyFrom(a)
        right.CopyFrom(b)
        for m in (left, right):
            del m.graph.node[:]
            del m.graph.initializer[:]
        assert left == right


# -- what is left alone ------------------------------------------------------------------------------------------------


def test_layers_ahead_of_the_cut_are_left_as_they_are() -> None:
    net = Planted(17, seed=3)
    first = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    second = net.conv(net.op("Relu", first), 6, 6)
    model = net.model(net.conv(net.op("Relu", second), 6, 4))
    before, result = repaired(model, plan((second, 1, 6, [2])), draw(model, 40))
    done = [n.name for n in model.graph.node if n.op_type == "Conv"]
    assert [how(result)[n] == "kept" for n in done] == [True, True, False]
    old, new = weights(before), weights(result.model)
    for name in [*net.operands(first), *net.operands(second)]:
        assert old[name].tobytes() == new[name].tobytes()


@pytest.mark.parametrize("mode", ["none", "bias", "bn", "lstsq", "full"])
def test_a_model_that_lost_nothing_stays_as_it_is(mode: str) -> None:
    model, _ = residual(Planted(17, seed=3))
    before, result = repaired(model, plan(), draw(model, 20), mode)
    assert result.model.SerializeToString() == before.SerializeToString() == model.SerializeToString()


def test_an_output_that_a_dead_channel_fed_stays_as_it_is() -> None:
    """Removing a channel of zeros changes nothing, so that there is nothing to repair."""
    net = Planted(17, seed=3)
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 6)
    for name in net.operands(y):
        value = net.value(name)
        value[4] = 0.0
        net.change(name, value)
    model = net.model(net.conv(net.op("Relu", y), 6, 4))
    before, result = repaired(model, plan((y, 1, 6, [4])), draw(model, 20))
    assert set(how(result).values()) == {"kept"}
    assert result.model.SerializeToString() == before.SerializeToString()


# -- types and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance", "build"),
    [
        *((np.float64, 1e-6, build) for build in (product_and_sum, scaled_gemm)),
        *((np.float16, 2e-2, build) for build in (convolution, product_and_sum, normalised, flattened)),
    ],
)
def test_other_element_types_stay(dtype: type, tolerance: float, build: Callable[[Planted], Case]) -> None:
    model, removal = build(Planted(17, seed=3, dtype=dtype))
    before, result = repaired(model, removal, draw(model, 120))
    assert {w.dtype for w in weights(result.model).values()} == {np.dtype(dtype)}
    assert error(model, result.model, draw(model, 7, 1)) < min(tolerance, error(model, before, draw(model, 7, 1)) / 4)


def test_many_rows_of_half_precision_do_not_overflow() -> None:
    """Sums over 100,000 positions are far beyond what float16 can say."""
    net = Planted(17, seed=3, dtype=np.float16)
    y = net.conv(net.input("x", ["N", 3, 40, 40]), 3, 6)
    twin(net, y)
    model = net.model(net.op("Relu", net.conv(net.op("Relu", y), 6, 4)))
    data = draw(model, 64)
    with np.errstate(over="raise", invalid="raise"):
        _, result = repaired(model, plan((y, 1, 6, [4])), data)
    assert all(done != "kept" for layer, done in how(result).items() if layer == model.graph.node[2].name)
    assert error(model, result.model, draw(model, 3, 1)) < 2e-2


def test_half_precision_wins_as_much_as_single() -> None:
    """Rounds of refitting in front of a Relu, on values whose products do not fit into float16."""
    left = {}
    for dtype in (np.float32, np.float16):
        net = Planted(17, seed=3, dtype=dtype)
        y = net.conv(net.input("x", ["N", 3, 16, 16]), 3, 12)
        model = net.model(net.op("Relu", net.conv(net.op("Relu", y), 12, 4)))
        data, fresh = ({"x": 60 * draw(model, n, n)["x"]} for n in (64, 5))
        before, result = repaired(model, plan((y, 1, 12, [4, 5, 6])), data)
        left[dtype] = error(model, result.model, fresh) / error(model, before, fresh)
    assert left[np.float16] < 1.05 * left[np.float32] < 0.8, left


def test_free_sizes_stay_free() -> None:
    net = Planted(17, seed=3)
    y = net.conv(net.input("x", ["N", 3, "H", "W"]), 3, 6)
    twin(net, y)
    model = net.model(net.conv(net.op("Relu", y), 6, 4))
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((2, 3, h, h + 1)).astype(np.float32)} for h in (5, 5, 7, 7, 9, 9, 6, 6) * 4]
    _, result = repaired(model, plan((y, 1, 6, [4])), data)
    assert list(result.model.graph.input) == list(model.graph.input)
    for shape in ((1, 3, 4, 8), (6, 3, 11, 5)):
        assert error(model, result.model, {"x": rng.standard_normal(shape).astype(np.float32)}) < 1e-5


def test_the_original_is_never_changed() -> None:
    model, removal = normalised(Planted(17, seed=3))
    content = model.SerializeToString()
    repaired(model, removal, draw(model, 30))
    assert model.SerializeToString() == content


def test_the_same_run_gives_the_same_weights() -> None:
    model, removal = residual(Planted(17, seed=3))
    one, two = (repaired(model, removal, draw(model, 50))[1].model for _ in range(2))
    assert one.SerializeToString() == two.SerializeToString()


def test_activations_in_files_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models' activations far beyond the limit, which is below what users may give."""
    monkeypatch.setattr("onnxprune.settings.Bytes.least", 4096)
    model, removal = several_channels(Planted(17, seed=3))
    data = draw(model, 640)
    kept = repaired(model, removal, data)[1].model
    spilled = repaired(model, removal, data, memory=4096)[1].model
    assert kept.SerializeToString() == spilled.SerializeToString()


def test_outputs_are_those_of_the_original_in_name_and_shape() -> None:
    model, removal = concatenated(Planted(17, seed=3))
    _, result = repaired(model, removal, draw(model, 30))
    feed = draw(model, 3, 1)
    assert [y.shape for y in outputs(model, feed)] == [y.shape for y in outputs(result.model, feed)]
