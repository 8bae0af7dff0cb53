"""What the lists of barriers count: channels, not positions, entries of a vocabulary or settings of operators."""

from __future__ import annotations

import numpy as np
import onnx
from build import Net

import onnxprune as op


def detector() -> onnx.ModelProto:
    """Boxes of 16 x 16 cells: distances beside constant anchors and strides, as a YOLO's head has them."""
    net = Net(17)
    features = net.conv(net.input("x", ["N", 3, 16, 16]), 3, 8)
    distances = net.op("Reshape", net.conv(features, 8, 4), net.const([0, 4, 256]))
    left, right = net.split(distances, [2, 2], 1)
    anchors = net.const(np.arange(512, dtype=np.float32).reshape(1, 2, 256))
    corners = net.op("Concat", net.op("Sub", anchors, left), net.op("Add", anchors, right), axis=1)
    return net.model(net.op("Mul", corners, net.const(np.full((1, 256), 8, np.float32))))


def words() -> onnx.ModelProto:
    """An embedding of 100 words."""
    net = Net(17)
    x = net.op("Gather", net.weight(100, 8), net.input("ids", ["N", 5], dtype=np.int64))
    return net.model(net.linear(x, 8, 4))


def vendor() -> onnx.ModelProto:
    """An operator that nobody knows holds 24 channels of a weight of its own, and the 8 that come to it."""
    net = Net(17)
    h = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 8)
    y = net.op("Odd", h, net.weight(24, 8), domain="vendor")
    return net.model(y, shapes={y: ["N", 24, 4, 4]})


def test_anchors_are_no_channels() -> None:
    analysis = op.analyze(detector())
    assert all(barrier.channels <= 8 for barrier in analysis.barriers), analysis.barriers
    assert all(channels <= 8 for _, channels in analysis.unlocks)
    assert sum(group.size for group in analysis.groups if group.prunable) == 8


def test_a_vocabulary_is_no_channels() -> None:
    analysis = op.analyze(words())
    assert all(barrier.channels <= 8 for barrier in analysis.barriers), analysis.barriers


def test_weights_of_unknown_operators_count() -> None:
    analysis = op.analyze(vendor())
    assert analysis.unlocks[0] == ("Odd", 8 + 24 + 8)
