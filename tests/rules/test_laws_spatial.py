"""Laws of operators that work along positions: channels pass, positions keep their size."""

from __future__ import annotations

import numpy as np
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_exact_cut
from sandwich import check, opsets, produce

MAPS = ("ncl", "nchw", "ncdhw")


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("layout", MAPS)
@given(data=st.data(), opset=opsets(10))
@settings(max_examples=3)
def test_pools_of_every_rank(kind: str, layout: str, data: st.DataObject, opset: int) -> None:
    net = Net(opset)
    dims = len(layout) - 2
    attrs = {"kernel_shape": [data.draw(st.sampled_from([2, 3])) for _ in range(dims)]}
    attrs["strides"] = [data.draw(st.sampled_from([1, 2])) for _ in range(dims)]
    if data.draw(st.booleans()):
        attrs["pads"] = [1] * (2 * dims)
    elif kind != "LpPool" and data.draw(st.booleans()):
        attrs["ceil_mode"] = 1
    if kind == "AveragePool":
        attrs["count_include_pad"] = data.draw(st.sampled_from([0, 1]))
    check(net, net.op(kind, produce(net, layout), **attrs))


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
@given(layout=st.sampled_from(MAPS), opset=opsets())
@settings(max_examples=3)
def test_global_pools(kind: str, layout: str, opset: int) -> None:
    net = Net(opset)
    check(net, net.op(kind, produce(net, layout)))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_pools_that_pad_by_themselves(mode: str) -> None:
    net = Net(13)
    check(net, net.op("MaxPool", produce(net, "nchw", extent=5), kernel_shape=[2, 3], strides=[2, 2], auto_pad=mode))


def test_dilated_pool() -> None:
    net = Net(13)
    check(net, net.op("MaxPool", produce(net, "nchw", extent=6), kernel_shape=[2, 2], dilations=[2, 2]))


def test_pool_over_channels_keeps_them() -> None:
    """A map transposed so that channels are positions."""
    net = Net(13)
    x = net.transpose(produce(net, "ncl"), 0, 2, 1)
    check(net, net.op("MaxPool", x, kernel_shape=[2], strides=[2]), cut=False)


def test_positions_of_a_pool_depend_on_all_channels() -> None:
    net = Net(13)
    pooled, where = net.op("MaxPool", produce(net, "nchw"), kernel_shape=[2, 2], strides=[2, 2], n=2)
    check(net, pooled, net.op("Cast", where, to=1), cut=False)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@given(data=st.data(), opset=opsets(11))
@settings(max_examples=4)
def test_resize(mode: str, data: st.DataObject, opset: int) -> None:
    """By scales and by sizes; positions may grow or shrink."""
    net = Net(opset)
    x = produce(net, "nchw", extent=6)
    factors = data.draw(st.sampled_from([(2.0, 2.0), (0.5, 2.0), (1.0, 3.0)]))
    # Before opset 13 the region of interest may not be left out.
    region = "" if opset >= 13 else net.const(np.zeros(0), np.float32)
    attrs = {"mode": mode, "coordinate_transformation_mode": data.draw(st.sampled_from(["half_pixel", "asymmetric"]))}
    if data.draw(st.booleans()):
        operands = [region, net.const([1.0, 1.0, *factors], np.float32)]
    else:
        scales = "" if opset >= 13 else net.const(np.zeros(0), np.float32)
        space = net.const([int(6 * factors[0]), int(7 * factors[1])])
        operands = [region, scales, net.op("Concat", net.slice(net.op("Shape", x), 0, 2, 0), space, axis=0)]
    y = net.op("Resize", x, *operands, **attrs)
    check(net, net.hint(y, ["N", 6, int(6 * factors[0]), int(7 * factors[1])]))


def test_resize_to_constant_sizes() -> None:
    """The operand names the channels too, and follows them."""
    net = Net(13)
    check(net, net.op("Resize", produce(net, "nchw", batch=2), "", "", net.const([2, 6, 8, 9]), mode="linear"))


@pytest.mark.newest_runtime
@pytest.mark.parametrize("scales", [True, False])
def test_resize_of_chosen_axes(scales: bool) -> None:
    net = Net(18)
    x = produce(net, "nchw")
    operands = ["", net.const([2.0, 3.0], np.float32)] if scales else ["", "", net.const([7, 9])]
    check(net, net.op("Resize", x, *operands, axes=[2, -1], antialias=0))


def test_resize_of_channels_keeps_them() -> None:
    net = Net(13)
    check(net, net.op("Resize", produce(net, "nchw"), "", net.const([1, 2, 1, 1], np.float32)), cut=False)


@pytest.mark.parametrize("opset", [7, 9])
def test_upsample(opset: int) -> None:
    net = Net(opset)
    x = produce(net, "nchw")
    scales = [1.0, 1.0, 2.0, 3.0]
    y = net.op("Upsample", x, scales=scales) if opset < 9 else net.op("Upsample", x, net.const(scales, np.float32))
    check(net, y)


@given(opset=opsets())
@settings(max_examples=2)
def test_local_response_normalization_mixes_neighbours(opset: int) -> None:
    net = Net(opset)
    check(net, net.op("LRN", produce(net, "nchw"), size=3), cut=False)


def test_grid_sample() -> None:
    net = Net(16)
    grid = net.op("Tanh", net.input("grid", ["N", 3, 3, 2]))
    check(net, net.op("GridSample", produce(net, "nchw"), grid))


def test_regions_of_interest() -> None:
    """Regions replace the batch: their number is that of the boxes."""
    net = Net(16)
    x = produce(net, "nchw", batch=1, extent=8)
    boxes = net.const([[0, 0, 4, 4], [1, 2, 6, 7]], np.float32)
    check(net, net.op("RoiAlign", x, boxes, net.const([0, 0]), output_height=2, output_width=2))


POLICIES = {"not_smaller": (6, 8), "not_larger": (3, 4), "stretch": (6, 4)}
"""What [6, 8] becomes where [6, 4] is asked for."""


@pytest.mark.parametrize("policy", POLICIES)
def test_resize_that_keeps_the_aspect_ratio_keeps_its_axes(policy: str) -> None:
    """The size of one axis follows from those of the others then, even where it comes out the same."""
    net, (high, wide) = Net(19), POLICIES[policy]
    x = net.transpose(net.linear(net.input("x", [2, 3, 8, 4]), 4, 6), 0, 1, 3, 2)
    y = net.op("Resize", x, "", "", net.const([6, 4]), axes=[2, 3], mode="nearest", keep_aspect_ratio_policy=policy)
    y = net.transpose(net.hint(y, [2, 3, high, wide]), 0, 1, 3, 2)
    assert_exact_cut(net.model(net.linear(y, high, 4)), expect_cut=policy == "stretch")


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_cropping_lets_channels_pass_that_it_leaves_alone(start: float) -> None:
    net = Net(13)
    region = net.const([0, start, 0.1, 0, 1, 1, 0.9, 1], np.float32)
    sizes = net.const([2, 6, 3, 7])
    y = net.op("Resize", produce(net, "nchw", batch=2), region, "", sizes, mode="linear",
               coordinate_transformation_mode="tf_crop_and_resize")  # fmt: skip
    check(net, y, cut=start == 0)


def test_upsampling_that_moves_positions_of_channels_keeps_them() -> None:
    """A scale of 1.1 leaves six channels six, of which one comes from its neighbour."""
    net = Net(13)
    y = net.op("Resize", produce(net, "nchw"), "", net.const([1, 1.1, 2, 2], np.float32), mode="nearest",
               coordinate_transformation_mode="asymmetric", nearest_mode="ceil")  # fmt: skip
    check(net, y, cut=False)


@pytest.mark.parametrize("kind", ["DepthToSpace", "SpaceToDepth"])
def test_blocks_let_the_batch_pass(kind: str) -> None:
    """A layer whose channels come to stand on the batch axis."""
    net = Net(13)
    x = net.transpose(net.linear(net.input("x", [8, 4, 6, 3]), 3, 6), 3, 0, 1, 2)
    y = net.op(kind, x, blocksize=2)
    y = net.transpose(y, 1, 2, 3, 0)
    assert_exact_cut(net.model(net.linear(y, 6, 4)))


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Conv with positions"])
def test_channels_that_are_folded_into_the_batch_are_cut(kind: str) -> None:
    """[N, C, L] as [N * C, 1, L], one small convolution for every channel, and back: rows go in blocks."""
    net = Net(13)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 10]), 3, 12, dims=1))
    x = net.reshape(x, -1, 1, 10)
    if kind == "ConvTranspose":
        x = net.op("ConvTranspose", x, net.weight(1, 4, 3), net.weight(4), pads=[1, 1])
    else:
        x = net.conv(x, 1, 4, 5, dims=1)
    x = net.op("Relu", x)
    if kind.endswith("positions"):
        x = net.op("Add", x, net.weight(4, 10))
    y = net.conv(net.reshape(x, -1, 48, 10), 48, 5, dims=1)
    result = assert_exact_cut(net.model(net.conv(y, 5, 2, dims=1)))
    assert result is not None and result.model.graph.initializer[0].dims[0] == 6
