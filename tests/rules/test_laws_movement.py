"""Laws of operators that move data: they run themselves on the labels, and their targets follow the sizes."""

from __future__ import annotations

import numpy as np
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from sandwich import check, opsets, produce, shape_of

INT_MAX = np.iinfo(np.int64).max


@given(layout=st.sampled_from(["nc", "ncl", "nchw", "ncdhw", "nhwc"]), data=st.data(), opset=opsets())
@settings(max_examples=10)
def test_transpose(layout: str, data: st.DataObject, opset: int) -> None:
    """Any permutation, the batch included, and back to batch first."""
    net = Net(opset)
    x = produce(net, layout)
    perm = data.draw(st.permutations(range(len(layout))))
    y = net.op("Relu", net.transpose(x, *perm))
    first = perm.index(0)
    check(net, net.transpose(y, first, *(a for a in range(len(perm)) if a != first)))


def test_transpose_reverses_by_default() -> None:
    net = Net(17)
    check(net, net.transpose(net.op("Transpose", produce(net, "nchw")), 3, 0, 1, 2))


@pytest.mark.parametrize(
    "target",
    [
        (0, 2, 3, 4, 5), (0, 3, 2, 4, 5), (-1, 2, 3, 20), (0, -1), (0, 0, -1), (0, 6, -1), (-1, 120), (0, 2, 60),
        (0, 12, 10), (0, 4, 30), (0, 6, 5, 4), (0, 0, 0, 0), (0, 1, 6, 4, 5), (0, 6, 2, 2, 5), (-1, 6, 4, 5),
        (0, 24, 5), (0, 2, 3, 2, 2, 5),
    ],
    ids=str,
)  # fmt: skip
@given(opset=opsets(), back=st.booleans())
@settings(max_examples=2)
def test_reshape_of_a_map(target: tuple[int, ...], opset: int, back: bool) -> None:
    """[N, 6, 4, 5] to targets that split and merge channels, positions and both, with 0 and -1."""
    net = Net(opset)
    y = net.op("Relu", net.reshape(produce(net, "nchw"), *target))
    exact_split = target not in ((0, 12, 10), (0, 4, 30))
    check(net, net.reshape(y, 0, 6, 4, 5) if back else y, cut=True if exact_split else None)


@pytest.mark.parametrize(
    "target", [(0, 0, 2, 3), (0, 0, 3, -1), (0, 2, 2, 6), (-1, 4, 6), (0, -1), (0, 0, 6, 1)], ids=str
)
@given(opset=opsets())
@settings(max_examples=2)
def test_reshape_of_the_last_axis(target: tuple[int, ...], opset: int) -> None:
    net = Net(opset)
    check(net, net.op("Tanh", net.reshape(produce(net, "nlc"), *target)))


@given(opset=opsets(), gemm=st.booleans())
@settings(max_examples=4)
def test_reshape_that_merges_the_batch(opset: int, gemm: bool) -> None:
    """[N, L, C] -> [N L, C] -> Gemm -> [N, L, D]."""
    net = Net(opset)
    flat = net.reshape(produce(net, "nlc"), -1, 6)
    y = net.op("Relu", net.linear(flat, 6, 8, gemm=gemm))
    check(net, net.reshape(y, -1, 4, 8))


def test_reshape_allowzero_means_zero() -> None:
    net = Net(17)
    x = produce(net, "nchw", batch=2)
    check(net, net.op("Reshape", x, net.const([2, 6, 20]), allowzero=1))


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2])
@given(opset=opsets())
@settings(max_examples=2)
def test_flatten_at_every_axis(axis: int, opset: int) -> None:
    """Axes behind the channels merge these with the batch; a Reshape takes them apart again."""
    net = Net(max(opset, 11) if axis < 0 else opset)
    flat = net.op("Flatten", produce(net, "nchw"), axis=axis)
    check(net, net.reshape(net.op("Relu", flat), -1, 6, 4, 5))


@given(axes=st.sampled_from([[2], [2, 3], [-1], [-2, -1], [3]]), opset=opsets())
@settings(max_examples=6)
def test_squeeze(axes: list[int], opset: int) -> None:
    net = Net(max(opset, 11) if min(axes) < 0 else opset)
    check(net, net.squeeze(net.op("GlobalAveragePool", produce(net, "nchw")), axes))


def test_squeeze_of_every_axis_of_one() -> None:
    net = Net(17)
    check(net, net.op("Squeeze", net.op("GlobalMaxPool", produce(net, "nchw", batch=2))))


@given(axes=st.sampled_from([[1], [2], [1, 3], [-1], [-2, 1], [1, 2, 5]]), opset=opsets())
@settings(max_examples=6)
def test_unsqueeze(axes: list[int], opset: int) -> None:
    net = Net(max(opset, 11) if min(axes) < 0 else opset)
    check(net, net.unsqueeze(produce(net, "ncl"), axes))


@given(data=st.data(), opset=opsets())
@settings(max_examples=10)
def test_concat(data: st.DataObject, opset: int) -> None:
    """On and off the channel axis, with constants, a graph input, and the same tensor twice."""
    net = Net(opset)
    x = produce(net, "nchw", name="a")
    axis = data.draw(st.sampled_from([1, 2, 3, -1, -3] if opset >= 11 else [1, 2, 3]))
    part = data.draw(st.sampled_from(["branch", "twice", "input", "pooled", "wider"]))
    if part == "input":
        other = net.input("b", ["N", 6, 4, 5])
    elif part == "wider" and axis in (1, -3):
        other = produce(net, "nchw", channels=9, name="b")
    elif part == "pooled":
        other = net.op("Relu", x)
    else:
        other = x if part == "twice" else produce(net, "nchw", name="b")
    parts = [x, other] if data.draw(st.booleans()) else [other, x, x]
    # Off the channel axis an input without channels of its own keeps those that it meets.
    check(net, net.op("Concat", *parts, axis=axis), cut=part != "input" or axis in (1, -3))


def test_concat_with_a_constant() -> None:
    """A class token in front of the positions, and constant channels behind the computed ones."""
    net = Net(17)
    x = produce(net, "nlc", batch=2)
    tokens = net.op("Concat", net.weight(2, 1, 6), x, axis=1)
    wider = net.op("Concat", tokens, net.weight(2, 5, 3), axis=2)
    check(net, wider)


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
    """Ranges along channels and along positions; a range over cut channels has new bounds, or the channels stay."""
    net = Net((10, 13, 21)[start % 3])
    x = produce(net, "nchw", extent=6)
    check(net, net.slice(net.op("Relu", x), start, end, axis, step), cut=None if axis == 1 and step != 1 else True)


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
    check(net, net.gather(x, index, axis), cut=None if axis == 1 else True)


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


@pytest.mark.parametrize("target", [(1, 6, 4, 5), (1, 1, 4, 5), (6, 4, 5), (4, 5), (1, 2, 1, 6, 4, 5)], ids=str)
@given(opset=opsets(8))
@settings(max_examples=2)
def test_expand(target: tuple[int, ...], opset: int) -> None:
    net = Net(opset)
    gate = net.op("GlobalAveragePool", produce(net, "nchw"))
    check(
        net,
        net.reshape(
            net.op("Expand", gate, net.const(list(target))), -1, *(target[1:] if len(target) == 6 else (6, 4, 5))
        ),
    )


def test_expand_of_one_channel_to_many() -> None:
    """There may be fewer copies."""
    net = Net(13)
    one = produce(net, "nchw", channels=1)
    check(net, net.op("Expand", one, net.const([1, 6, 4, 5])))


@pytest.mark.parametrize("repeats", [(1, 1, 2, 3), (1, 2, 1, 1), (1, 1, 1, 1), (1, 3, 2, 1)], ids=str)
@given(opset=opsets())
@settings(max_examples=2)
def test_tile(repeats: tuple[int, ...], opset: int) -> None:
    net = Net(opset)
    check(net, net.op("Tile", produce(net, "nchw"), net.const(list(repeats))))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@given(blocks=st.sampled_from([2, 3]), opset=opsets(11))
@settings(max_examples=3)
def test_depth_to_space(mode: str, blocks: int, opset: int) -> None:
    net = Net(opset)
    x = produce(net, "nchw", channels=4 * blocks**2)
    y = net.op("DepthToSpace", x, blocksize=blocks, mode=mode)
    check(net, net.conv(y, 4, 5))


@given(opset=opsets())
@settings(max_examples=3)
def test_space_to_depth_and_back(opset: int) -> None:
    net = Net(opset)
    x = produce(net, "nhwc", extent=4, channels=6)
    pixels = net.slice(net.transpose(x, 0, 3, 1, 2), 0, 4, 3)
    deep = net.op("SpaceToDepth", pixels, blocksize=2)
    check(net, deep, net.op("DepthToSpace", net.op("Relu", deep), blocksize=2))


def test_scatter_nd_of_rows() -> None:
    """Rows [N, L, C] overwritten at given positions: the channels of data and updates go together."""
    net = Net(13)
    data, updates = produce(net, "nlc", batch=2), produce(net, "nlc", batch=2, extent=1, name="u")
    index = net.const([[[0, 2]], [[1, 3]]])
    check(net, net.op("ScatterND", data, index, updates))


@pytest.mark.parametrize("kind", ["ScatterElements", "GatherElements", "GatherND"])
def test_looking_up_single_elements_is_exact_or_refused(kind: str) -> None:
    net = Net(13)
    x = produce(net, "nlc", batch=2)
    if kind == "ScatterElements":
        y = net.op(kind, x, net.const(np.zeros((2, 1, 6))), net.weight(2, 1, 6), axis=1)
    elif kind == "GatherElements":
        y = net.op(kind, x, net.const(np.ones((2, 2, 6))), axis=1)
    else:
        y = net.op(kind, x, net.const([[[1]], [[3]]]), batch_dims=1)
    check(net, y, cut=None if kind != "GatherND" else True)


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
    from onnx import numpy_helper

    return numpy_helper.from_array(np.asarray([value], np.float32))


@pytest.mark.parametrize("upper", [0, 1])
def test_triangles_of_positions_and_of_channels(upper: int) -> None:
    net = Net(14)
    check(net, net.op("Trilu", produce(net, "nchw"), upper=upper))
    net = Net(14)
    x = produce(net, "nlc")
    assert shape_of(net, x)[1:] == [4, 6]
    check(net, net.op("Trilu", x, upper=upper), cut=False)


def test_reshape_by_a_computed_target() -> None:
    """Shape -> Gather -> Concat -> Reshape: the batch stays dynamic, the channels follow."""
    net = Net(13)
    x = produce(net, "nchw")
    batch = net.unsqueeze(net.gather(net.op("Shape", x), 0, 0), [0])
    channels = net.unsqueeze(net.gather(net.op("Shape", x), 1, 0), [0])
    target = net.op("Concat", batch, channels, net.const([20]), axis=0)
    y = net.op("Reshape", x, target)
    check(net, net.op("Relu", net.reshape(y, 0, 6, 20)))
