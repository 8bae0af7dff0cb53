"""Whole convolutional structures: residual, dense, grouped and shuffled, gated, transposed to NHWC and back."""

from __future__ import annotations

import numpy as np
import pytest
from build import Net
from oracle import assert_exact_cut

SEEDS = pytest.mark.parametrize("seed", [0, 1])


def head(net: Net, x: str, channels: int, classes: int = 4) -> str:
    """Global pool and a classifier."""
    return net.linear(net.op("Flatten", net.op("GlobalAveragePool", x), axis=1), channels, classes, gemm=True)


def block(net: Net, x: str, ins: int, outs: int, **attrs: object) -> str:
    return net.op("Relu", net.norm(net.conv(x, ins, outs, bias=False, **attrs), outs))


@SEEDS
def test_residual_with_projection(seed: int) -> None:
    """A stage of identity blocks after one whose shortcut is a convolution: the trunk is one group."""
    net = Net(17, seed=seed)
    x = block(net, net.input("x", ["N", 3, 8, 8]), 3, 8)
    for ins, outs in ((8, 12), (12, 12), (12, 12)):
        y = net.norm(net.conv(block(net, x, ins, 6), 6, outs, bias=False), outs)
        short = x if ins == outs else net.norm(net.conv(x, ins, outs, 1, bias=False), outs)
        x = net.op("Relu", net.op("Add", y, short))
    result = assert_exact_cut(net.model(head(net, x, 12)), seed=seed)
    assert result is not None
    widths = {t.dims[0] for t in result.model.graph.initializer if len(t.dims) == 4}
    assert widths == {4, 6, 3}


@SEEDS
def test_dense_block(seed: int) -> None:
    """Every layer reads all before it, through a BatchNormalization of the concatenation."""
    net = Net(17, seed=seed)
    parts, width = [net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)], 8
    for _ in range(3):
        joined = parts[0] if len(parts) == 1 else net.op("Concat", *parts, axis=1)
        y = net.conv(net.op("Relu", net.norm(joined, width)), width, 8, 1, bias=False)
        parts.append(net.conv(net.op("Relu", net.norm(y, 8)), 8, 4, bias=False))
        width += 4
    joined = net.op("Relu", net.norm(net.op("Concat", *parts, axis=1), width))
    pooled = net.op("AveragePool", net.conv(joined, width, 10, 1), kernel_shape=[2, 2], strides=[2, 2])
    assert_exact_cut(net.model(head(net, pooled, 10)), seed=seed)


@SEEDS
def test_inception_block(seed: int) -> None:
    """Branches of different kernels side by side, one of them a pool."""
    net = Net(13, seed=seed)
    x = block(net, net.input("x", ["N", 3, 8, 8]), 3, 8)
    pooled = net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    branches = [net.conv(x, 8, 4, 1), net.conv(net.conv(x, 8, 6, 1), 6, 6), net.conv(pooled, 8, 4, 1), x]
    y = net.op("Relu", net.op("Concat", *branches, axis=1))
    assert_exact_cut(net.model(head(net, y, 22)), seed=seed)


@SEEDS
def test_inverted_residual_with_squeeze_excite(seed: int) -> None:
    """Expand, depthwise, gate, project: the mobile networks' block."""
    net = Net(14, seed=seed)
    x = net.conv(net.input("x", ["N", 3, 8, 8]), 3, 6)
    for _ in range(2):
        wide = net.op("HardSwish", net.norm(net.conv(x, 6, 12, 1, bias=False), 12))
        wide = net.op("HardSwish", net.norm(net.conv(wide, 12, 12, group=12, bias=False), 12))
        gate = net.op("Relu", net.conv(net.op("GlobalAveragePool", wide), 12, 4, 1))
        gate = net.op("HardSigmoid", net.conv(gate, 4, 12, 1))
        x = net.op("Add", x, net.norm(net.conv(net.op("Mul", wide, gate), 12, 6, 1, bias=False), 6))
    result = assert_exact_cut(net.model(head(net, x, 6)), seed=seed)
    assert result is not None
    depthwise = [n for n in result.model.graph.node for a in n.attribute if a.name == "group" and a.i == 6]
    assert len(depthwise) == 2


def test_squeeze_excite_by_linear_layers() -> None:
    """Pool, Flatten, two Gemms, and the gate unsqueezed back to a map by a Reshape."""
    net = Net(17)
    x = block(net, net.input("x", ["N", 3, 8, 8]), 3, 8)
    flat = net.reshape(net.reduce("ReduceMean", x, [2, 3]), 0, 8)
    gate = net.op("Sigmoid", net.linear(net.op("Relu", net.linear(flat, 8, 4, gemm=True)), 4, 8, gemm=True))
    assert_exact_cut(net.model(head(net, net.op("Mul", x, net.reshape(gate, -1, 8, 1, 1)), 8)))


@SEEDS
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_with_channel_shuffle(seed: int, groups: int) -> None:
    """Reshape, Transpose, Reshape between grouped convolutions; groups may lose different channels."""
    net = Net(13, seed=seed)
    x = block(net, net.input("x", ["N", 3, 6, 6]), 3, 16)
    y = net.op("Relu", net.conv(x, 16, 16, 1, group=groups))
    y = net.transpose(net.reshape(y, 0, groups, 16 // groups, 6, 6), 0, 2, 1, 3, 4)
    y = net.conv(net.reshape(y, 0, 16, 6, 6), 16, 16, group=16)
    y = net.conv(y, 16, 16, 1, group=groups)
    assert_exact_cut(net.model(head(net, net.op("Add", x, y), 16)), seed=seed)


@SEEDS
def test_shuffle_unit_that_splits_the_trunk(seed: int) -> None:
    """Half of the channels pass untouched, then both halves are shuffled together."""
    net = Net(13, seed=seed)
    x = block(net, net.input("x", ["N", 3, 6, 6]), 3, 16)
    for _ in range(2):
        left, right = net.split(x, [8, 8], 1)
        right = net.op("Relu", net.conv(net.conv(right, 8, 8, group=8), 8, 8, 1))
        x = net.op("Concat", left, right, axis=1)
        x = net.reshape(net.transpose(net.reshape(x, 0, 2, 8, 6, 6), 0, 2, 1, 3, 4), 0, 16, 6, 6)
    assert_exact_cut(net.model(head(net, x, 16)), seed=seed)


def test_flatten_into_a_classifier_with_real_extent() -> None:
    """Every channel is 4 x 5 rows of the matrix behind."""
    net = Net(13)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 4, 5]), 3, 8))
    y = net.op("Relu", net.linear(net.op("Flatten", x, axis=1), 160, 16, gemm=True))
    result = assert_exact_cut(net.model(net.linear(y, 16, 5, gemm=True)))
    assert result is not None
    assert [80, 8] in [list(t.dims) for t in result.model.graph.initializer]


def test_flatten_by_reshape_before_a_wide_matrix() -> None:
    net = Net(13)
    x = net.op("MaxPool", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8), kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Relu", net.linear(net.reshape(x, -1, 72), 72, 16))
    assert_exact_cut(net.model(net.linear(y, 16, 5)))


@SEEDS
def test_maps_with_channels_last(seed: int) -> None:
    """A Transpose in front of and behind every convolution, what is between works on [N, H, W, C]."""
    net = Net(13, seed=seed)
    x = net.input("x", ["N", 8, 8, 3])
    ins = 3
    for outs in (8, 8):
        y = net.transpose(net.conv(net.transpose(x, 0, 3, 1, 2), ins, outs), 0, 2, 3, 1)
        y = net.op("Relu", net.op("Add", net.op("Mul", y, net.weight(outs)), net.weight(outs)))
        x = y if ins == 3 else net.op("Add", x, y)
        ins = outs
    gate = net.op("Sigmoid", net.linear(net.reduce("ReduceMean", x, [1, 2], 0), 8, 8, gemm=True))
    x = net.op("Mul", x, net.reshape(gate, -1, 1, 1, 8))
    flat = net.reshape(x, 0, -1)
    assert_exact_cut(net.model(net.linear(flat, 512, 4, gemm=True)), seed=seed)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_super_resolution_by_pixel_shuffle(mode: str) -> None:
    net = Net(13)
    x = net.op("Relu", net.conv(net.input("x", ["N", 1, 6, 6]), 1, 8))
    up = net.op("DepthToSpace", net.conv(x, 8, 16), blocksize=2, mode=mode)
    assert_exact_cut(net.model(net.conv(net.op("Tanh", up), 4, 1)))


def test_pixel_shuffle_spelled_out() -> None:
    """Reshape to 6-D, Transpose, Reshape, as older exporters write it."""
    net = Net(11)
    x = net.conv(net.op("Relu", net.conv(net.input("x", ["N", 1, 6, 6]), 1, 8)), 8, 16)
    grid = net.transpose(net.reshape(x, -1, 4, 2, 2, 6, 6), 0, 1, 4, 2, 5, 3)
    assert_exact_cut(net.model(net.conv(net.reshape(grid, -1, 4, 12, 12), 4, 1)))


@SEEDS
def test_encoder_and_decoder_with_skips(seed: int) -> None:
    """Down by strides, up by Resize and by ConvTranspose, skips by concatenation."""
    net = Net(13, seed=seed)
    first = block(net, net.input("x", ["N", 3, 8, 8]), 3, 6)
    second = block(net, first, 6, 10, strides=[2, 2])
    third = block(net, second, 10, 12, strides=[2, 2])
    up = net.op("Resize", third, "", net.const([1, 1, 2, 2], np.float32), mode="nearest")
    merged = block(net, net.op("Concat", up, second, axis=1), 22, 10)
    up = net.op("ConvTranspose", merged, net.weight(10, 6, 2, 2), net.weight(6), strides=[2, 2])
    merged = block(net, net.op("Concat", first, up, axis=1), 12, 6)
    assert_exact_cut(net.model(net.conv(merged, 6, 2, 1)), seed=seed)


def test_ghost_module() -> None:
    """Half of the output is a cheap depthwise function of the other half, cut to the wanted width by a Slice."""
    net = Net(13)
    x = net.input("x", ["N", 3, 6, 6])
    primary = block(net, x, 3, 8)
    cheap = block(net, primary, 8, 8, group=8)
    y = net.slice(net.op("Concat", primary, cheap, axis=1), 0, 14, 1)
    assert_exact_cut(net.model(head(net, y, 14)))


def test_selective_kernels() -> None:
    """Branches stacked on a new axis, weighted by a softmax over that axis, summed."""
    net = Net(13)
    x = block(net, net.input("x", ["N", 3, 6, 6]), 3, 8)
    branches = [net.unsqueeze(block(net, x, 8, 8), [1]) for _ in range(2)]
    stacked = net.op("Concat", *branches, axis=1)
    summed = net.op("ReduceSum", stacked, net.const([1]), keepdims=0)
    code = net.op("Relu", net.conv(net.op("GlobalAveragePool", summed), 8, 4, 1))
    scores = net.reshape(net.conv(code, 4, 16, 1), 0, 2, 8, 1, 1)
    weighed = net.op("Mul", stacked, net.op("Softmax", scores, axis=1))
    assert_exact_cut(net.model(head(net, net.op("ReduceSum", weighed, net.const([1]), keepdims=0), 8)))


def test_normalisation_in_groups_between_convolutions() -> None:
    """GroupNormalization in its own spelling: whole groups go in the layer before and the layer behind."""
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12)
    rows = net.reshape(x, 0, 4, -1)
    y = net.op("InstanceNormalization", rows, net.const(np.ones(4), np.float32), net.const(np.zeros(4), np.float32))
    y = net.op("Add", net.op("Mul", net.reshape(y, 0, 12, 6, 6), net.weight(12, 1, 1)), net.weight(12, 1, 1))
    result = assert_exact_cut(net.model(head(net, net.op("Relu", y), 12)))
    assert result is not None
    assert {6, 12} >= {t.dims[0] for t in result.model.graph.initializer if len(t.dims) == 4}


@pytest.mark.parametrize("groups", [(2, 6), (2, 5), (3, 6), (2, 3), (5, 10)], ids=str)
def test_two_groupings_of_one_trunk(groups: tuple[int, int]) -> None:
    """Grouped convolutions whose groups cross: what is taken must leave both of them whole."""
    for seed in range(2):
        net = Net(13)
        width = int(np.lcm(*groups)) * (2 if np.lcm(*groups) < 8 else 1)
        x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, width)
        outs = (2 * groups[0], groups[1])
        read = [net.conv(net.conv(x, width, o, group=g), o, 2) for g, o in zip(groups, outs, strict=True)]
        assert_exact_cut(net.model(*read), seed=seed)
