"""Laws of operators on images and sequences beside convolutions: pooled positions, offsets, columns, transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandwich import check, consume, opsets, produce

import onnxprune as op


def pooled(net: Net, x: str, **attrs: Any) -> Any:
    return net.op("MaxPool", x, n=2, kernel_shape=[2, 2], strides=[2, 2], **attrs)


def unpool(net: Net, x: str, where: str, shape: str = "") -> str:
    y = net.op("MaxUnpool", x, where, *([shape] if shape else []), kernel_shape=[2, 2], strides=[2, 2])
    return net.hint(y, ["N", 6, 4, 4])


@pytest.mark.parametrize("given_shape", ["", "constant", "computed"])
@given(opset=opsets(11))
@settings(max_examples=2)
def test_values_go_back_to_where_they_were(given_shape: str, opset: int) -> None:
    """Positions count all channels: those of what is left are made anew by the cut model's own pooling."""
    net = Net(opset)
    batch = 2 if given_shape == "constant" else "N"
    x = net.conv(net.input("x", [batch, 3, 4, 4]), 3, 6)
    small, where = pooled(net, x)
    shape = {"constant": lambda: net.const([2, 6, 4, 4]), "computed": lambda: net.op("Shape", x)}
    target = shape[given_shape]() if given_shape else ""
    y = net.op("MaxUnpool", net.conv(small, 6, 6), where, *filter(None, [target]), kernel_shape=[2, 2], strides=[2, 2])
    check(net, net.hint(y, [batch, 6, 4, 4]))


def test_unpooling_twice_with_branches() -> None:
    net = Net(13)
    x = net.conv(net.input("x", ["N", 3, 8, 8]), 3, 6)
    a, first = pooled(net, x)
    b, second = pooled(net, net.conv(a, 6, 8))
    up = net.op("MaxUnpool", net.op("Relu", b), second, kernel_shape=[2, 2], strides=[2, 2])
    up = net.op("MaxUnpool", net.conv(net.hint(up, ["N", 8, 4, 4]), 8, 6), first, kernel_shape=[2, 2], strides=[2, 2])
    check(net, net.op("Add", net.hint(up, ["N", 6, 8, 8]), x))


def test_positions_in_a_map_of_another_size_keep_the_channels() -> None:
    """What was pooled had five columns: positions of one channel lie in another of four."""
    net = Net(13)
    x = net.conv(net.input("x", ["N", 3, 4, 5]), 3, 6)
    small, where = pooled(net, x)
    check(net, unpool(net, net.op("Relu", small), where), cut=None)


@pytest.mark.parametrize("shown", ["output", "sum", "flat"])
def test_positions_that_are_seen_keep_the_channels(shown: str) -> None:
    net = Net(13)
    x = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 6)
    small, where = pooled(net, x)
    y = where
    if shown != "output":
        y = net.op("Cast", where, to=onnx.TensorProto.FLOAT)
        y = net.reduce("ReduceMax", y, [1, 2, 3]) if shown == "sum" else net.op("Flatten", y)
    model = net.model(consume(net, net.op("Relu", small)), y, shapes={y: None})
    with pytest.raises(op.BudgetError, match="depend on all channels"):
        op.prune(model, ratio=0.5, latency=False)


@pytest.mark.parametrize("axis", [2, 3])
def test_positions_within_a_channel(axis: int) -> None:
    """As exporters count them: less the position of the first pixel of every channel."""
    net = Net(13)
    x = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 6)
    small, where = pooled(net, x)
    first = net.op("MaxPool", x, n=2, kernel_shape=[1, 1])[1]
    first = net.op("Slice", first, net.const([0, 0]), net.const([1, 1]), net.const([2, 3]))
    within = net.op("Sub", where, first)
    flat, values = (net.reshape(n, 0, 6, 4) for n in (within, net.conv(small, 6, 6)))
    zeros = net.op("Mul", net.reshape(x, 0, 6, 16), net.const(0.0, np.float32))
    y = net.op("ScatterElements", zeros, flat, values, axis=2)
    check(net, net.op("Relu", net.hint(y, ["N", 6, 16])) if axis == 2 else y)


@given(
    group=st.sampled_from([1, 2, 8]),
    offsets=st.sampled_from([1, 2, 4]),
    mask=st.booleans(),
    bias=st.booleans(),
    constant=st.booleans(),
)
@settings(max_examples=12)
def test_deformable_convolution(group: int, offsets: int, mask: bool, bias: bool, constant: bool) -> None:
    """Channels go as a convolution's do; those that share offsets keep equally many, or go with them."""
    net = Net(19)
    x = produce(net, "nchw", channels=8, batch=2)
    moved = net.weight(2, offsets * 8, 3, 4) if constant else net.conv(x, 8, offsets * 8, 2, pad=False)
    operands = [x, net.weight(8, 8 // group, 2, 2), moved, net.weight(8) if bias else ""]
    if mask:
        operands.append(net.op("Sigmoid", net.conv(x, 8, offsets * 4, 2, pad=False)))
    y = net.op("DeformConv", *operands, group=group, offset_group=offsets, kernel_shape=[2, 2])
    check(net, net.op("Relu", y), reshape_axis="heads" if constant and offsets == 4 else "head_dim", tolerance=2e-5)


def test_a_deformable_convolution_is_a_layer() -> None:
    net = Net(19)
    x = produce(net, "nchw", channels=8)
    y = net.op("DeformConv", x, net.weight(6, 8, 1, 1), net.conv(x, 8, 2, 1), kernel_shape=[1, 1])
    result = op.prune(net.model(consume(net, y)), ratio=0.5, latency=False)
    layer = next(x for x in result.report.layers if x.op == "DeformConv")
    assert (layer.channels_before, layer.channels_after, layer.macs_before) == (6, 3, 2 * 6 * 8 * 20)


@given(seed=st.integers(0, 9), computed=st.booleans())
@settings(max_examples=3)
def test_columns_become_an_image(seed: int, computed: bool) -> None:
    """Torch's fold: a channel goes with its block of columns."""
    net = Net(18)
    x = net.conv(net.input("x", ["N", 3, 2, 3]), 3, 24)
    columns = net.reshape(x, 0, 24, -1)
    image = net.const([4, 6])
    if computed:
        image = net.op("Mul", net.op("Slice", net.op("Shape", x), net.const([2]), net.const([4])), net.const([2, 2]))
    y = net.op("Col2Im", columns, image, net.const([2, 2]), strides=[2, 2])
    check(net, net.op("Relu", net.hint(y, ["N", 6, 4, 6])), seed=seed)


def test_a_grid_of_positions_reads_no_channels() -> None:
    net = Net(20)
    x = produce(net, "nchw", channels=8)
    theta = net.reshape(net.linear(net.op("Flatten", net.op("GlobalAveragePool", x)), 8, 6, gemm=True), 0, 2, 3)
    where = net.op("AffineGrid", theta, net.op("Shape", x))
    y = net.op("GridSample", x, where, mode="linear")
    check(net, net.op("Relu", net.hint(y, ["N", 8, 4, 5])))


@pytest.mark.parametrize("axes", [None, [2, 3], [-1], [1, 2]])
def test_the_middle_of_a_map(axes: list[int] | None) -> None:
    """Axes that keep their size pass, channels among them."""
    net = Net(18)
    x = produce(net, "nchw", batch=2)
    sizes = {0: 2, 1: 6, 2: 3, 3: 7, -1: 2}
    target = net.const([sizes[a] for a in (axes or range(4))])
    y = net.op("CenterCropPad", x, target, axes=axes)
    shape = [2, 6, *([3, 7] if axes in (None, [2, 3]) else [4, 2] if axes == [-1] else [3, 5])]
    check(net, net.op("Relu", net.hint(y, shape)))


def test_the_middle_of_channels_keeps_them() -> None:
    net = Net(18)
    y = net.op("CenterCropPad", produce(net, "nchw", batch=2), net.const([4]), axes=[1])
    check(net, net.hint(y, [2, 4, 4, 5]), cut=False)


@given(opset=opsets(10))
@settings(max_examples=2)
def test_reversed_sequences(opset: int) -> None:
    net = Net(opset)
    x = net.transpose(produce(net, "nlc", batch=2), 1, 0, 2)
    y = net.op("ReverseSequence", x, net.const([2, 3]))
    check(net, net.op("Relu", net.transpose(y, 1, 0, 2)))
    net = Net(opset)
    y = net.op("ReverseSequence", produce(net, "nlc", batch=2), net.const([2, 3]), batch_axis=0, time_axis=1)
    check(net, y)


@pytest.mark.parametrize(("opset", "onesided"), [(17, 0), (17, 1), (20, 0), (20, 1)])
def test_fourier_transforms_of_positions(opset: int, onesided: int) -> None:
    net = Net(opset)
    x = net.unsqueeze(produce(net, "nchw", batch=2), [4])
    if opset < 20:
        y = net.op("DFT", x, axis=3, onesided=onesided)
    else:
        y = net.op("DFT", x, "", net.const(-2), onesided=onesided)
    check(net, net.hint(y, [2, 6, 4, 3 if onesided else 5, 2]))


def test_a_fourier_transform_of_channels_keeps_them() -> None:
    net = Net(17)
    y = net.op("DFT", net.unsqueeze(produce(net, "nlc", batch=2), [3]), axis=2)
    check(net, net.hint(y, [2, 4, 6, 2]), cut=False)


def test_determinants_and_running_products() -> None:
    net = Net(13)
    x = net.conv(net.input("x", ["N", 3, 3, 3]), 3, 6)
    check(net, net.hint(net.op("Det", x), ["N", 6]))
    if newest() >= 26 and _runs("CumProd"):
        net = Net(26)
        check(net, net.op("CumProd", produce(net, "nchw"), net.const(2)))


def _runs(kind: str) -> bool:
    return any(s.name == kind for s in onnx.defs.get_all_schemas_with_history())


def test_gated_activations_of_the_newest_opset() -> None:
    """onnxruntime may lack the kernel: then onnx's reference evaluator decides."""
    if onnx.defs.onnx_opset_version() < 28:
        pytest.skip("onnx has no SwiGLU")
    net = Net(28)
    x = net.input("x", ["N", 3])
    y = net.op("SwiGLU", net.linear(x, 3, 8), net.linear(x, 3, 8))
    check(net, y)
