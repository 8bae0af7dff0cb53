"""Sizes that a model leaves open: nothing that follows them is a constant, and a cut holds at every one of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import Net
from oracle import assert_exact_cut

ROWS, WIDTH = 48, 16


def length_of(net: Net, x: str, axis: int = 1) -> str:
    """The size of one axis as a vector of one number."""
    return net.op("Gather", net.op("Shape", x), net.const([axis]), axis=0)


def head(net: Net, name: str = "x") -> tuple[str, str]:
    """An input of open batch and length, and a layer that reads it."""
    x = net.input(name, ["B", "S", WIDTH])
    return x, net.linear(x, WIDTH, WIDTH)


def rows_of(model: onnx.ModelProto, name: str) -> int:
    return next(t.dims[0] for t in model.graph.initializer if t.name == name)


def test_tables_read_up_to_an_open_length_keep_their_rows() -> None:
    net = Net()
    x, y = head(net)
    table = net.weight(ROWS, WIDTH, name="table")
    part = net.op("Slice", table, net.const([0]), length_of(net, x), net.const([0]))
    y = net.linear(net.op("Relu", net.op("Add", y, part)), WIDTH, 8)
    result = assert_exact_cut(net.model(y))
    assert result is not None
    assert rows_of(result.model, "table") == ROWS


@pytest.mark.parametrize("many", [False, True])
def test_rotary_tables_read_up_to_an_open_length_keep_their_rows(many: bool) -> None:
    net = Net()
    x, y = head(net)
    tables = [net.weight(ROWS, WIDTH // 2, name=n) for n in ("cos", "sin")]
    end = length_of(net, x)
    # Both axes at once: one bound is open, the other is a constant.
    ends = net.op("Concat", end, net.const([WIDTH // 2]), axis=0) if many else end
    starts, axes = (net.const([0, 0]), net.const([0, 1])) if many else (net.const([0]), net.const([0]))
    cos, sin = (net.op("Slice", t, starts, ends, axes) for t in tables)
    left, right = net.split(y, [WIDTH // 2] * 2, axis=2)
    turned = [net.op("Sub", net.op("Mul", left, cos), net.op("Mul", right, sin)),
              net.op("Add", net.op("Mul", right, cos), net.op("Mul", left, sin))]  # fmt: skip
    y = net.linear(net.op("Relu", net.op("Concat", *turned, axis=2)), WIDTH, 8)
    result = assert_exact_cut(net.model(y))
    assert result is not None
    assert rows_of(result.model, "cos") == ROWS


def test_causal_masks_read_at_open_offsets_stay() -> None:
    net = Net()
    x = net.input("x", ["B", "S", WIDTH])
    q, k, v = (net.linear(x, WIDTH, WIDTH) for _ in range(3))
    scores = net.op("MatMul", q, net.transpose(k, 0, 2, 1))
    mask = net.const(np.tril(np.ones((1, ROWS, ROWS), bool)), name="mask")
    end = length_of(net, x)
    part = net.op(
        "Slice", net.op("Slice", mask, net.const([0]), end, net.const([1])), net.const([0]), end, net.const([2])
    )
    scores = net.op("Where", part, scores, net.const(-1e4))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    result = assert_exact_cut(net.model(net.linear(y, WIDTH, 8)))
    assert result is not None
    assert rows_of(result.model, "mask") == 1


def test_a_table_of_positions_read_from_its_end() -> None:
    net = Net()
    x, y = head(net)
    table = net.weight(ROWS, WIDTH, name="table")
    start = net.op("Neg", length_of(net, x))
    part = net.op("Slice", table, start, net.const([np.iinfo(np.int64).max]), net.const([0]))
    y = net.linear(net.op("Relu", net.op("Add", y, part)), WIDTH, 8)
    result = assert_exact_cut(net.model(y))
    assert result is not None
    assert rows_of(result.model, "table") == ROWS


def test_channels_go_beside_an_axis_that_is_sliced_at_open_bounds() -> None:
    net = Net()
    x, y = head(net)
    end = net.op("Sub", length_of(net, x), net.const([1]))
    channels = net.const([WIDTH - 4])
    y = net.op(
        "Slice", net.op("Relu", y), net.const([0, 0]), net.op("Concat", end, channels, axis=0), net.const([1, 2])
    )
    assert_exact_cut(net.model(net.linear(y, WIDTH - 4, 8)))


def test_channels_go_beside_an_axis_that_is_padded_by_an_open_size() -> None:
    net = Net()
    x, y = head(net)
    zero, more = net.const([0, 0, 0, 0]), net.const([2])
    pads = net.op("Concat", zero, length_of(net, x), more, axis=0)
    y = net.op("Pad", net.op("Relu", y), pads)
    assert_exact_cut(net.model(net.linear(y, WIDTH + 2, 8)))


def test_a_length_that_happens_to_equal_the_channels() -> None:
    """At the first probe's 16 positions, 16 channels look as though they changed places with nothing."""
    net = Net()
    x, y = head(net)
    end = length_of(net, x)
    target = net.op("Concat", net.const([-1, WIDTH]), end, axis=0)
    y = net.op("Reshape", net.op("Relu", y), target)
    y = net.op("MatMul", net.weight(8, WIDTH), y)
    assert_exact_cut(net.model(y), expect_cut=None)
