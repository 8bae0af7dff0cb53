"""Laws of operators that pick, cut out, pad or write positions: what is known moves with the channels before it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from oracle import assert_exact_cut
from sandwich import check, consume, opsets, produce, shape_of

import onnxprune as op

INT_MAX = np.iinfo(np.int64).max


@given(sizes=st.sampled_from([[3, 3], [2, 2, 2], [1, 5], [2, 4], [1, 2, 3], [6]]), opset=opsets(), unused=st.booleans())
@settings(max_examples=10)
def test_split_of_channels(sizes: list[int], opset: int, unused: bool) -> None:
    """Equal and unequal parts; one that nobody reads; parts that meet go together."""
    net = Net(opset)
    parts = net.split(produce(net, "nchw"), sizes, 1)
    parts = [parts] if isinstance(parts, str) else parts
    read = [net.op("Relu", p) for p in parts[: len(parts) - (unused and len(parts) > 1)]]
    if len(set(sizes)) == 1 and len(read) > 1:
        read = [net.op("Mul", read[0], read[1]), *read[2:]]
    # Parts of one channel stay; so does a part nobody reads, where that is all there is besides.
    check(net, *read, cut=None if sizes == [1, 5] and unused else True)


@pytest.mark.parametrize(("axis", "outputs"), [(1, 2), (1, 3), (1, 4), (2, 2), (-1, 2)])
def test_split_by_number_of_outputs(axis: int, outputs: int) -> None:
    """Since opset 18; the last part may be smaller."""
    net = Net(18)
    parts = net.op("Split", produce(net, "nchw", channels=7), axis=axis, n=outputs, num_outputs=outputs)
    check(net, *parts)


@pytest.mark.parametrize("opset", [9, 13])
def test_split_without_sizes(opset: int) -> None:
    net = Net(opset)
    check(net, *net.op("Split", produce(net, "nchw"), axis=1, n=3))


@pytest.mark.parametrize("axis", [2, 3])
def test_split_of_positions(axis: int) -> None:
    net = Net(13)
    check(net, *net.split(produce(net, "nchw"), [1, 3 + (axis == 3)], axis))


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(0, 4, 1), (2, 6, 1), (1, -1, 1), (-4, INT_MAX, 1), (0, INT_MAX, 1), (3, 4, 1), (0, 6, 2), (1, INT_MAX, 3),
     (-1, -INT_MAX, -1), (4, 0, -1), (4, 1, -2), (0, 99, 1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("axis", [1, -2])
def test_slice_of_a_map(axis: int, start: int, end: int, step: int) -> None:
    """Ranges along channels and along positions; a range over cut channels has new bounds and steps, or is a Gather."""
    net = Net((10, 13, 21)[start % 3])
    x = produce(net, "nchw", extent=6)
    check(net, net.slice(net.op("Relu", x), start, end, axis, step))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bounds", [(0, INT_MAX, 2), (1, -1, 3), (-1, -INT_MAX, -1), (-2, 1, -2), (10, 0, -3)], ids=str)
def test_strides_over_random_cuts(bounds: tuple[int, int, int], seed: int) -> None:
    """What is left of a stride is a stride by chance; all positions are read besides, so that any of them goes."""
    net = Net(13)
    x = net.op("Relu", produce(net, "nchw", channels=18))
    check(net, net.slice(x, *bounds[:2], 1, bounds[2]), x, seed=seed, ratio=0.4)


def test_a_step_that_no_longer_fits_becomes_a_gather() -> None:
    net = Net(13)
    x = net.op("Relu", produce(net, "nchw", channels=18))
    model = net.model(consume(net, net.slice(x, 0, INT_MAX, 1, 3)), consume(net, x))
    result = op.prune(model, criterion="random", ratio=0.5, latency=False)
    assert [n.op_type for n in result.model.graph.node][2] == "Gather"


def test_a_reversal_stays_a_slice() -> None:
    net = Net(13)
    model = check(net, net.slice(produce(net, "nchw"), -1, -INT_MAX, 1, -1))
    result = op.prune(model, ratio=0.5, latency=False)
    assert [n.op_type for n in result.model.graph.node] == ["Conv", "Slice", "Flatten", "Gemm"]


@pytest.mark.parametrize("seed", range(3))
def test_strides_along_several_axes_at_once(seed: int) -> None:
    """Channels of both axes are picked in front, positions by what is left of the node."""
    net = Net(13)
    x = produce(net, "nlc", channels=8)
    wide = net.op("MatMul", net.weight(9, 4), x)
    bounds = [net.const(v, np.int32) for v in ([1, 0, 0], [9, 8, 1], [1, 2, 0], [2, 2, 1])]
    model = check(net, net.op("Slice", wide, *bounds), wide, seed=seed)
    result = op.prune(model, ratio=0.5, criterion="random", latency=False)
    kinds = Counter(n.op_type for n in result.model.graph.node)
    assert kinds["Gather"] and kinds["Slice"], "the first sample is taken by a range"


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_positions_spelled_out(interleaved: bool) -> None:
    """Pairs of channels within every head, neighbours or halves: pairs go with their cosines, in all heads alike."""
    net, heads, size = Net(13), 2, 8
    x = net.reshape(net.linear(net.input("x", ["N", 5, 6]), 6, heads * size), 0, 0, heads, size)
    bounds = [(0, INT_MAX, 2), (1, INT_MAX, 2)] if interleaved else [(0, 4, 1), (4, 8, 1)]
    a, b = (net.slice(x, low, high, 3, step) for low, high, step in bounds)
    cos, sin = net.weight(5, 1, 4), net.weight(5, 1, 4)
    left = net.op("Sub", net.op("Mul", a, cos), net.op("Mul", b, sin))
    right = net.op("Add", net.op("Mul", a, sin), net.op("Mul", b, cos))
    if interleaved:
        pairs = net.op("Concat", net.unsqueeze(left, [4]), net.unsqueeze(right, [4]), axis=4)
        y = net.reshape(pairs, 0, 0, heads, size)
    else:
        y = net.op("Concat", left, right, axis=3)
    check(net, net.reshape(y, 0, 0, heads * size))


@pytest.mark.parametrize("opset", [7, 9])
def test_slice_by_attributes(opset: int) -> None:
    net = Net(opset)
    x = produce(net, "nchw")
    both = net.op("Slice", x, starts=[1, 0], ends=[5, 3], axes=[1, 2])
    check(net, both, net.op("Slice", x, starts=[0, 2], ends=[INT_MAX, INT_MAX]))


def test_slice_with_int32_bounds_over_several_axes() -> None:
    net = Net(13)
    operands = [net.const(v, np.int32) for v in ([1, 0], [-1, 3], [1, -1], [1, 1])]
    check(net, net.op("Slice", produce(net, "nchw"), *operands))


@pytest.mark.parametrize(
    "index", [0, -1, [0], [1, 3], [3, 1, 0], [-1, -2, 2], [2, 2, 4], [0, 1, 2, 3, 4, 5], [[0, 1], [2, 5]]], ids=str
)
@pytest.mark.parametrize("axis", [1, -2])
@given(opset=opsets())
@settings(max_examples=2)
def test_gather(axis: int, index: list[int], opset: int) -> None:
    """Positions picked by number, from either end, repeated or permuted; a table of them keeps the axis."""
    net = Net(max(opset, 11) if np.min(index) < 0 else opset)
    x = produce(net, "nchw", extent=6)
    check(net, net.gather(x, index, axis), cut=np.ndim(index) < 2 or axis != 1)


def test_gather_of_a_batch_of_one_keeps_channels() -> None:
    net = Net(17)
    first = net.gather(produce(net, "nlc"), 0, 1)
    check(net, net.op("Relu", first))


@pytest.mark.parametrize(
    "pads", [(0, 2, 0, 0, 0, 3, 0, 0), (0, 0, 1, 2, 0, 0, 2, 1), (0, 1, 1, 0, 0, 0, 0, 1)], ids=str
)
@given(opset=opsets(), value=st.sampled_from([0.0, 1.5]))
@settings(max_examples=3)
def test_pad_with_a_constant(pads: tuple[int, ...], opset: int, value: float) -> None:
    net = Net(opset)
    check(net, net.op("Relu", net.pad(produce(net, "nchw"), pads, value=value)))


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_pad_with_what_is_there(mode: str) -> None:
    """Positions may be reflected; channels then are read by their neighbours and stay."""
    net = Net(19)
    check(net, net.pad(produce(net, "nchw"), (0, 0, 1, 2, 0, 0, 2, 1), mode))
    net = Net(19)
    check(net, net.pad(produce(net, "nchw"), (0, 1, 0, 0, 0, 2, 0, 0), mode), cut=False)


def test_pad_by_axes() -> None:
    net = Net(18)
    x = produce(net, "nchw")
    operands = [net.const([1, 2, 3, 0]), net.const(0.5, net.dtype), net.const([1, -1])]
    check(net, net.op("Pad", x, *operands))


def test_negative_pads_crop() -> None:
    net = Net(17)
    check(net, net.pad(produce(net, "nchw"), (0, 0, -1, 0, 0, 0, -1, -2)))
    net = Net(17)
    check(net, net.pad(produce(net, "nchw"), (0, -1, 0, 0, 0, -1, 0, 0)), cut=None)


def test_filled_tensors_follow_what_they_meet() -> None:
    net = Net(13)
    x = produce(net, "nchw")
    ones = net.op("ConstantOfShape", net.const([1, 6, 1, 1]), value=_scalar(0.5))
    check(net, net.op("Mul", x, ones))


def test_filled_tensors_of_the_shape_of_another() -> None:
    net = Net(13)
    x = produce(net, "nchw")
    zeros = net.op("ConstantOfShape", net.op("Shape", x), value=_scalar(-1.0))
    check(net, net.op("Max", x, zeros), net.op("Concat", zeros, x, axis=1))


def _scalar(value: float) -> object:
    return numpy_helper.from_array(np.asarray([value], np.float32))


@pytest.mark.parametrize("upper", [0, 1])
def test_triangles_of_positions_and_of_channels(upper: int) -> None:
    net = Net(14)
    check(net, net.op("Trilu", produce(net, "nchw"), upper=upper))
    net = Net(14)
    x = produce(net, "nlc")
    assert shape_of(net, x)[1:] == [4, 6]
    check(net, net.op("Trilu", x, upper=upper), cut=False)


@pytest.mark.parametrize("index", [0, 1, 3, -4, -1])
def test_a_single_position_of_every_row_keeps_its_place(index: int) -> None:
    """Rows lose different channels, but as many in front of the one that is picked; it stays a scalar."""
    net = Net(17)
    x = net.reshape(net.linear(net.input("x", [4, 3]), 3, 24), 4, 6, 4)
    y = net.transpose(net.gather(x, index, 2), 1, 0)
    for seed in range(3):
        assert_exact_cut(net.model(net.linear(y, 4, 2)), seed=seed, expect_cut=None)
