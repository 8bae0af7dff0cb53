"""Laws of operators that normalise or reduce: a barrier over channels, open beside them."""

from __future__ import annotations

import numpy as np
import pytest
from build import Net, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_exact_cut
from sandwich import check, consume, opsets, produce

import onnxprune as op

SUMS = ["ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceMean"]
MIXES = ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp"]


@given(layout=st.sampled_from(["nc", "ncl", "nchw", "ncdhw"]), opset=opsets())
@settings(max_examples=6)
def test_batch_normalization(layout: str, opset: int) -> None:
    net = Net(opset)
    check(net, net.op("Relu", net.norm(produce(net, layout), 6)))


def test_batch_normalization_in_training_mode_keeps_channels() -> None:
    net = Net(15)
    vectors = [net.weight(6, low=0.5) for _ in range(4)]
    y, *_ = net.op("BatchNormalization", produce(net, "nchw"), *vectors, n=3, training_mode=1)
    check(net, y, cut=False)


@given(layout=st.sampled_from(["ncl", "nchw", "ncdhw"]), opset=opsets())
@settings(max_examples=5)
def test_instance_normalization(layout: str, opset: int) -> None:
    net = Net(opset)
    check(net, net.op("InstanceNormalization", produce(net, layout), net.weight(6, low=0.5), net.weight(6)))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("opset", [18, 21])
def test_group_normalization(groups: int, opset: int) -> None:
    """Whole groups go; scale and bias are per group before opset 21, per channel since."""
    net = Net(opset)
    n = groups if opset < 21 else 6
    operands = [net.weight(n, low=0.5), net.weight(n)]
    y = net.op("GroupNormalization", produce(net, "nchw"), *operands, num_groups=groups)
    net.hint(y, ["N", 6, 4, 5])
    # The checker calls the form of opset 18 deprecated.
    model = net.model(consume(net, y), check=opset > 20)
    assert_exact_cut(model, expect_cut=groups > 1, validate=opset > 20)


def test_group_normalization_spelled_out() -> None:
    """Reshape to [N, G, -1], InstanceNormalization, Reshape back, scale: what exporters write."""
    net = Net(13)
    x = produce(net, "nchw", channels=8)
    rows = net.reshape(x, 0, 4, -1)
    y = net.op("InstanceNormalization", rows, net.const(np.ones(4), net.dtype), net.const(np.zeros(4), net.dtype))
    y = net.hint(net.op("Reshape", y, net.op("Shape", x)), ["N", 8, 4, 5])
    y = net.op("Add", net.op("Mul", y, net.weight(8, 1, 1)), net.weight(8, 1, 1))
    check(net, y)


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("shift", [True, False])
def test_layer_normalization_is_cut_through(axis: int, shift: bool) -> None:
    """Removed channels count as 0 in mean and variance: the others are padded for it, and cropped."""
    net = Net(17)
    shape = (4, 6) if axis == 1 else (6,)
    operands = [net.weight(*shape, low=0.5), *([net.weight(*shape)] if shift else [])]
    check(net, net.op("LayerNormalization", produce(net, "nlc"), *operands, axis=axis))


def test_layer_normalization_after_which_nothing_is_read_twice() -> None:
    """The padded result has a name of its own; what reads the tensor of the old name gets its survivors."""
    net = Net(17)
    x = produce(net, "nlc")
    y = net.op("LayerNormalization", x, net.weight(6, low=0.5), net.weight(6))
    check(net, net.op("Add", x, y), net.op("Relu", y))


@pytest.mark.parametrize("kind", ["LayerNormalization", "SkipLayerNormalization"])
def test_a_normalization_of_which_one_channel_is_left(kind: str) -> None:
    """An axis of one channel is padded as well: it is not one that broadcasts."""
    net = Net(17)
    x, parameters = produce(net, "nlc"), [net.weight(6, low=0.5), net.weight(6)]
    skip = [net.linear(x, 6, 6)] if kind.startswith("Skip") else []
    y = net.op(kind, x, *skip, *parameters, domain="com.microsoft" if skip else "")
    check(net, net.hint(y, ["N", 4, 6]), ratio=0.84)


def test_layer_normalization_whose_statistics_are_read_is_a_barrier() -> None:
    net = Net(17)
    y, mean = net.op("LayerNormalization", produce(net, "nlc"), net.weight(6, low=0.5), net.weight(6), n=2)
    check(net, net.op("Add", y, mean), cut=False)


@pytest.mark.skipif(newest() < 23, reason="newer than onnxruntime")
@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_rms_normalization_is_cut_through(axis: int, epsilon: float | None) -> None:
    """A channel that is 0 leaves the sum of squares, so the scale and epsilon take up the new number of channels."""
    net = Net(23)
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    scale = net.weight(*((4, 6) if axis == 1 else (6,)), low=0.5)
    model = check(net, net.op("RMSNormalization", produce(net, "nlc"), scale, axis=axis, **attributes))
    result = op.prune(model, ratio=0.5, latency=False)
    assert [n.op_type for n in result.model.graph.node] == [n.op_type for n in model.graph.node]


@pytest.mark.skipif(newest() < 23, reason="newer than onnxruntime")
def test_rms_normalizations_that_share_a_scale() -> None:
    """A constant with several readers is copied, and a computed one multiplied."""
    net = Net(23)
    x, scale = produce(net, "nlc"), net.weight(6, low=0.5)
    computed = net.op("Abs", net.op("Add", scale, net.weight(6)))
    y = net.op("RMSNormalization", net.op("RMSNormalization", x, scale), scale)
    check(net, y, net.op("RMSNormalization", x, computed))


SPELLINGS = {
    "quotient": lambda net, x, root: net.op("Mul", net.op("Div", x, root), net.weight(6)),
    "reciprocal": lambda net, x, root: net.op("Mul", net.weight(6), net.op("Mul", x, net.op("Reciprocal", root))),
    "scaled before": lambda net, x, root: net.op("Div", net.op("Mul", x, net.weight(6)), root),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("square", ["Pow", "Mul"])
@given(opset=opsets())
@settings(max_examples=4)
def test_rms_normalization_spelled_out(spelling: str, square: str, opset: int) -> None:
    """Epsilon and the scale take up the factor of the mean, where they follow it."""
    net = Net(opset)
    x = produce(net, "nlc")
    squares = net.op("Mul", x, x) if square == "Mul" else net.op("Pow", x, net.const(2.0, net.dtype))
    mean = net.op("Add", net.reduce("ReduceMean", squares, [-1] if opset >= 11 else [2]), net.const(0.1, net.dtype))
    model = check(net, SPELLINGS[spelling](net, x, net.op("Sqrt", mean)))
    kinds = [n.op_type for n in op.prune(model, ratio=0.5, latency=False).model.graph.node]
    assert len(kinds) == len(model.graph.node) + (spelling == "scaled before")


def mean_square(net: Net, x: str) -> str:
    return net.reduce("ReduceMean", net.op("Pow", x, net.const(2.0, net.dtype)), [-1])


def rooted(net: Net, x: str, mean: str | None = None) -> str:
    return net.op("Sqrt", net.op("Add", mean or mean_square(net, x), net.const(0.1, net.dtype)))


def in_half(net: Net, x: str) -> str:
    """Statistics in float32 of a stream in another type, and the scale in that type."""
    wide = net.op("Cast", net.op("Cast", x, to=10), to=1)
    narrow = net.op("Cast", net.op("Div", wide, rooted(net, wide)), to=10)
    scale = net.const(np.linspace(0.5, 1.5, 6), np.float16)
    return net.op("Cast", net.op("Mul", scale, narrow), to=1)


def spelled_layer_norm(net: Net, x: str) -> str:
    """Centred in two steps, with scale and shift merged with the statistics, as TensorFlow writes it."""
    mean = net.reduce("ReduceMean", x, [-1])
    gain = net.op("Mul", net.op("Reciprocal", rooted(net, net.op("Sub", x, mean))), net.weight(6))
    return net.op("Add", net.op("Mul", x, gain), net.op("Sub", net.weight(6), net.op("Mul", mean, gain)))


def variance_of_squares(net: Net, x: str) -> str:
    mean = net.reduce("ReduceMean", x, [-1])
    spread = net.op("Sub", net.reduce("ReduceMean", net.op("Mul", x, x), [-1]), net.op("Mul", mean, mean))
    return net.op("Mul", net.op("Div", net.op("Sub", x, mean), rooted(net, x, spread)), net.weight(6))


def pooled_layer_norm(net: Net, x: str) -> str:
    """Means over channels as pooling over all positions behind axis 1, as converters of TensorFlow Lite write them."""
    centred = net.op("Sub", x, net.op("GlobalAveragePool", x))
    spread = net.op("Add", net.op("GlobalAveragePool", net.op("Mul", centred, centred)), net.const(0.1, net.dtype))
    return net.op("Add", net.op("Mul", net.op("Div", centred, net.op("Sqrt", spread)), net.weight(6)), net.weight(6))


EXPORTED = {
    "pooled LayerNorm": pooled_layer_norm,
    "pooled norm": lambda net, x: net.op("Div", x, net.op("GlobalLpPool", x, p=2)),
    "scale of 1 + weight": lambda net, x: net.op(
        "Mul", net.op("Div", x, rooted(net, x)), net.op("Add", net.weight(6), net.const(1.0, net.dtype))
    ),
    "power": lambda net, x: net.op(
        "Mul", net.weight(6), net.op("Mul", x, net.op("Pow", mean_square(net, x), net.const(-0.5, net.dtype)))
    ),
    "one by the root": lambda net, x: net.op(
        "Mul", net.weight(6), net.op("Mul", x, net.op("Div", net.const(1.0, net.dtype), rooted(net, x)))
    ),
    "epsilon outside": lambda net, x: net.op(
        "Div", x, net.op("Add", net.op("Sqrt", mean_square(net, x)), net.const(0.1, net.dtype))
    ),
    "at least epsilon": lambda net, x: net.op(
        "Div", x, net.op("Sqrt", net.op("Max", mean_square(net, x), net.const(0.1, net.dtype)))
    ),
    "sum by the size": lambda net, x: net.op(
        "Div", x, rooted(net, x, net.op("Div", net.reduce("ReduceSumSquare", x, [-1]), net.const(6.0, net.dtype)))
    ),
    "norm": lambda net, x: net.op("Mul", net.op("LpNormalization", x, axis=-1, p=2), net.weight(6)),
    "half": in_half,
    "merged LayerNorm": spelled_layer_norm,
    "variance of squares": variance_of_squares,
}


@pytest.mark.parametrize("spelling", EXPORTED)
def test_normalization_as_exporters_write_it(spelling: str) -> None:
    net = Net(17)
    check(net, EXPORTED[spelling](net, produce(net, "nlc")), tolerance=5e-3 if spelling == "half" else None)


def test_a_uniform_scale_that_an_identity_reads_as_well() -> None:
    """Copies of one constant are joined again only where both norms left them equal, not only equally long."""
    net = Net(17)
    scale = net.const(np.ones(6, net.dtype), net.dtype)
    again, y = net.op("Identity", scale), produce(net, "nlc")
    for gain in (scale, again):
        squares = net.reduce("ReduceMean", net.op("Mul", y, y), [-1])
        y = net.op("Div", y, net.op("Sqrt", net.op("Add", squares, net.const(0.1, net.dtype))))
        y = net.op("MatMul", net.op("Mul", y, gain), net.weight(6, 6))
    check(net, y)


def test_global_response_normalization() -> None:
    """ConvNeXt V2: norms of channels over positions, divided by their mean over channels."""
    net = Net(17)
    x = produce(net, "nhwc")
    norms = net.reduce("ReduceL2", x, [1, 2])
    share = net.op("Div", norms, net.op("Add", net.reduce("ReduceMean", norms, [-1]), net.const(1e-6, net.dtype)))
    y = net.op("Add", net.op("Mul", net.weight(6), net.op("Mul", x, share)), net.weight(6))
    check(net, net.op("Add", y, x))


def test_a_mean_that_several_nodes_read() -> None:
    """Nothing that follows can take up the factor alone, so the mean itself is multiplied; also as an output."""
    net = Net(17)
    x = produce(net, "nlc")
    mean = net.reduce("ReduceMean", x, [-1])
    y = net.op("Add", net.op("Sub", x, mean), net.op("Sigmoid", mean))
    model = net.model(consume(net, y), mean, shapes={mean: ["N", 4, 1]})
    assert_exact_cut(model)


def test_a_mean_of_integers_is_a_barrier() -> None:
    net = Net(17)
    x = net.op("Cast", net.op("Round", produce(net, "nlc")), to=6)
    check(net, net.op("Cast", net.reduce("ReduceMean", x, [-1]), to=1), cut=False)


def test_layer_normalization_over_positions_lets_channels_pass() -> None:
    net = Net(17)
    check(net, net.op("LayerNormalization", produce(net, "ncl"), net.weight(4, low=0.5), net.weight(4)))


def test_layer_normalization_is_cut_when_asked_for() -> None:
    """--approximate: not exact, but the result runs and is smaller."""
    net = Net(17)
    y = net.op("LayerNormalization", produce(net, "nlc"), net.weight(6, low=0.5), net.weight(6))
    model = net.model(consume(net, y))
    import onnxprune as op

    result = op.prune(model, ratio=0.5, approximate=True, latency=False)
    assert result.report.totals.params_after < result.report.totals.params_before
    assert result.report.exactness is not None
    assert result.report.exactness.passed is None or result.report.warnings


def test_layer_normalization_spelled_out() -> None:
    """Means over channels, in a form that has them as nodes of their own: each takes the factor of its own."""
    net = Net(17)
    x = produce(net, "nlc")
    centred = net.op("Sub", x, net.reduce("ReduceMean", x, [-1]))
    spread = net.reduce("ReduceMean", net.op("Mul", centred, centred), [-1])
    y = net.op("Div", centred, net.op("Sqrt", net.op("Add", spread, net.const(1e-5, net.dtype))))
    check(net, net.op("Mul", y, net.weight(6)))


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@given(opset=opsets(), layout=st.sampled_from(["ncl", "nchw", "nlc"]), data=st.data())
@settings(max_examples=6)
def test_softmax_over_any_axis(kind: str, opset: int, layout: str, data: st.DataObject) -> None:
    """Before opset 13 everything from ``axis`` on is normalised at once."""
    net = Net(opset)
    rank = len(layout)
    axis = data.draw(st.sampled_from([1, 2, rank - 1, *([-1, -2] if opset >= 11 else [])]))
    channel = 1 if layout != "nlc" else 2
    over = range(axis % rank, rank) if opset < 13 else [axis % rank]
    x = produce(net, layout)
    if kind == "Hardmax" and opset < 13:
        x = net.op("Relu", x)
    check(net, net.op(kind, x, axis=axis), cut=channel not in over)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("layout", ["nc", "nlc", "nchw"])
def test_lp_normalization_is_a_sum(p: int, layout: str) -> None:
    """A channel that is 0 adds nothing to a norm: cut through, exactly."""
    net = Net(13)
    check(net, net.op("LpNormalization", produce(net, layout), axis=1 if layout == "nchw" else -1, p=p))


@pytest.mark.parametrize("kind", [*SUMS, *MIXES])
@given(data=st.data(), opset=opsets())
@settings(max_examples=6)
def test_reductions(kind: str, data: st.DataObject, opset: int) -> None:
    """Sums and norms over channels are contractions, the others a barrier; over positions channels pass."""
    net = Net(opset)
    x = produce(net, "nchw")
    if kind == "ReduceLogSum":
        x = net.op("Add", net.op("Abs", x), net.const(0.5, net.dtype))
    axes = data.draw(st.sampled_from([[1], [2], [2, 3], [1, 2], [1, 3], [3]]))
    keepdims = data.draw(st.sampled_from([0, 1]))
    if opset >= 11 and data.draw(st.booleans()):
        axes = [a - 4 for a in axes]
    over_channels = 1 in axes or -3 in axes
    check(net, net.reduce(kind, x, axes, keepdims), cut=kind in SUMS or not over_channels)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("opset", [11, 18])
def test_reduction_of_everything(keepdims: int, opset: int) -> None:
    """Without axes even the batch is summed."""
    net = Net(opset)
    total = net.op("ReduceL2", produce(net, "nchw"), keepdims=keepdims)
    model = net.model(net.op("Reshape", total, net.const([1, 1])), shapes={})
    assert_exact_cut(model)


@pytest.mark.newest_runtime
def test_reduction_of_nothing() -> None:
    """noop_with_empty_axes: the tensor itself."""
    net = Net(18)
    check(net, net.op("ReduceSum", produce(net, "nchw"), noop_with_empty_axes=1))


@pytest.mark.parametrize("kind", ["ArgMax", "ArgMin", "TopK", "CumSum"])
@pytest.mark.parametrize("axis", [1, 2, -1])
@given(opset=opsets(11), keepdims=st.sampled_from([0, 1]))
@settings(max_examples=2)
def test_operators_that_depend_on_positions(kind: str, axis: int, opset: int, keepdims: int) -> None:
    net = Net(opset)
    x = produce(net, "nchw")
    if kind == "TopK":
        values, where = net.op(kind, x, net.const([2]), axis=axis, n=2)
        read = [values, net.op("Cast", where, to=1)]
    elif kind == "CumSum":
        read = [net.op(kind, x, net.const(axis), reverse=keepdims)]
    else:
        read = [net.op("Cast", net.op(kind, x, axis=axis, keepdims=keepdims), to=1)]
    check(net, *read, cut=axis != 1)


def test_mean_variance_normalization() -> None:
    net = Net(13)
    check(net, net.op("MeanVarianceNormalization", produce(net, "nchw"), axes=[0, 1, 2, 3]), cut=False)


@pytest.mark.skipif(newest() < 23, reason="newer than onnxruntime")
def test_rms_normalization_over_positions_lets_channels_pass() -> None:
    net = Net(23)
    check(net, net.op("RMSNormalization", produce(net, "ncl"), net.weight(4, low=0.5)))


def heads(net: Net, n: int = 4, size: int = 8) -> str:
    """[N, n, 5, size] from one product: rows of a grid, which lose different channels where nothing ties them."""
    x = net.linear(net.input("x", ["N", 5, 3]), 3, n * size)
    return net.transpose(net.reshape(x, 0, 0, n, size), 0, 2, 1, 3)


MIXING = {
    "Softmax": {"axis": 1},
    "LogSoftmax": {"axis": 1},
    "Hardmax": {"axis": 1},
    "LpNormalization": {"axis": 1, "p": 2},
    "MeanVarianceNormalization": {"axes": [1]},
    "LRN": {"size": 3},
}


@pytest.mark.parametrize("kind", MIXING)
def test_rows_that_are_mixed_lose_the_same_channels(kind: str) -> None:
    """Heads meet position by position: what stands at the same place of all of them goes together."""
    net = Net(17)
    y = net.transpose(net.op(kind, heads(net), **MIXING[kind]), 0, 2, 1, 3)
    y = net.linear(net.reshape(y, 0, 0, 32), 32, 3)
    result = assert_exact_cut(net.model(y))
    assert result is not None
    removed = next(s.removed for g in result.plan.groups for s in g.slots if s.size == 32)
    rows = [sorted(i % 8 for i in removed if i // 8 == row) for row in range(4)]
    assert rows == [rows[0]] * 4 and len(rows[0]) == 4


@pytest.mark.parametrize("axes", [None, [2, 3], [-1, -2]])
def test_mean_variance_normalization_over_positions_lets_channels_pass(axes: list[int] | None) -> None:
    """The default is the batch and the positions: each channel has a mean of its own."""
    net = Net(13)
    y = net.hint(net.op("MeanVarianceNormalization", produce(net, "nchw"), axes=axes), ["N", 6, 4, 5])
    # The oracle would make removed channels constant in front of it, and their variance a number around 0.
    result = op.prune(net.model(consume(net, y), check=False), criterion="random", ratio=0.5, latency=False)
    assert result.report.exactness.passed and result.model.graph.initializer[0].dims[0] == 3


def test_mean_variance_normalization_over_the_labelled_axis_keeps_it() -> None:
    net = Net(13)
    x = net.transpose(net.linear(net.input("x", [3, 2, 5, 4]), 4, 6), 3, 0, 1, 2)
    y = net.transpose(net.hint(net.op("MeanVarianceNormalization", x), [6, 3, 2, 5]), 1, 2, 3, 0)
    assert_exact_cut(net.model(net.linear(y, 6, 3), check=False), expect_cut=False)


def test_channels_of_a_group_lose_the_same_places_of_a_grid() -> None:
    """A grid of channels and samples whose channels close up by themselves: what a group mixes stays in step."""
    net = Net(22)
    x = net.reshape(net.linear(net.input("x", [6, 2, 3]), 3, 16), 6, 2, 4, 4)
    operands = [net.weight(4, low=0.5), net.weight(4)]
    y = net.op("GroupNormalization", net.transpose(x, 3, 2, 0, 1), *operands, num_groups=2)
    y = net.reshape(net.transpose(net.hint(y, [4, 4, 6, 2]), 2, 3, 1, 0), 6, 2, 16)
    y = net.linear(y, 16, 2)
    for seed in range(3):
        assert_exact_cut(net.model(y, check=False, shapes={y: [6, 2, 2]}), seed=seed)
