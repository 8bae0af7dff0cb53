"""Laws of operators that move data: they run themselves on the labels, and their targets follow the sizes."""

from __future__ import annotations

import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_exact_cut
from sandwich import check, opsets, produce


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
    exact_split = target != (0, 4, 30)
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


def test_reshape_by_a_computed_target() -> None:
    """Shape -> Gather -> Concat -> Reshape: the batch stays dynamic, the channels follow."""
    net = Net(13)
    x = produce(net, "nchw")
    batch = net.unsqueeze(net.gather(net.op("Shape", x), 0, 0), [0])
    channels = net.unsqueeze(net.gather(net.op("Shape", x), 1, 0), [0])
    target = net.op("Concat", batch, channels, net.const([20]), axis=0)
    y = net.op("Reshape", x, target)
    check(net, net.op("Relu", net.reshape(y, 0, 6, 20)))


@pytest.mark.parametrize("target", [(2, 12), (4, 6), (6, 4), (24,)])
def test_columns_of_a_grid_that_are_laid_out_anew_go_together(target: tuple[int, ...]) -> None:
    """Rows [8, 3] turned round: rows that close up by themselves change the order of the others."""
    net = Net(17)
    x = net.linear(net.input("x", [3]), 3, 24)
    y = net.reshape(net.transpose(net.reshape(x, 8, 3), 1, 0), *target)
    for seed in range(4):
        assert_exact_cut(net.model(net.linear(y, target[-1], 2)), seed=seed, ratio=0.34, expect_cut=None)


@pytest.mark.parametrize("filled", [True, False])
def test_parts_without_positions_still_have_to_fit(filled: bool) -> None:
    """An empty state in front of a layer's output: filled in, it shrinks too, from outside it holds the channels."""
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 8]), 3, 6, dims=1)
    if filled:
        sizes = net.op("Concat", net.slice(net.op("Shape", x), 0, 2, 0), net.const([0]), axis=0)
        empty = net.op("ConstantOfShape", sizes)
    else:
        empty = net.op("Slice", net.input("z", ["N", 6, 4]), net.const([0]), net.const([0]), net.const([2]))
    y = net.op("Concat", net.hint(empty, ["N", 6, 0]), x, axis=2)
    y = net.conv(net.hint(y, ["N", 6, 8]), 6, 4, dims=1)
    assert_exact_cut(net.model(y, check=False, shapes={y: ["N", 4, 8]}), expect_cut=filled)
