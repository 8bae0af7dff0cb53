"""Laws of operators that look up or write elements by an index tensor, known or computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from sandwich import check, consume, opsets, produce

import onnxprune as op

DRAWN = st.integers(0, 99)


def drawn(seed: int, high: int, *shape: int) -> Any:
    """Random positions of an axis of ``high``, from either end."""
    return np.random.default_rng(seed).integers(-high, high, shape)


def last(net: Net, x: str) -> str:
    """Indices [2, 3, 1] that depend on the data [2, L, C]."""
    top = net.op("TopK", net.reduce("ReduceMax", x, [2], keepdims=0), net.const([3]), n=2, axis=1)[1]
    return net.unsqueeze(top, [2])


@given(seed=DRAWN, opset=opsets(11), size=st.sampled_from([(2, 3, 6), (2, 5, 4), (1, 2, 6)]))
@settings(max_examples=5)
def test_gather_elements_of_positions_that_differ_by_channel(seed: int, opset: int, size: tuple[int, int, int]) -> None:
    """A known index loses the entries of channels that go; it may cover the first channels alone."""
    net = Net(opset)
    x = produce(net, "nlc", batch=2)
    check(net, net.op("Relu", net.op("GatherElements", x, net.const(drawn(seed, 4, *size)), axis=1)))


@given(seed=DRAWN, opset=opsets(11))
@settings(max_examples=5)
def test_gather_elements_of_channels(seed: int, opset: int) -> None:
    """The same channels everywhere are picked; other ones at every position keep the axis."""
    net = Net(opset)
    x = produce(net, "nlc", batch=2)
    index = np.broadcast_to(drawn(seed, 6, 5), (2, 4, 5))
    check(net, net.op("GatherElements", x, net.const(index), axis=2), x)
    net = Net(opset)
    x = produce(net, "nlc", batch=2)
    check(net, net.op("GatherElements", x, net.const(drawn(seed, 6, 2, 4, 5)), axis=2), cut=False)


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("repeat", ["Expand", "Tile"])
@given(opset=opsets(13))
@settings(max_examples=2)
def test_an_index_that_is_repeated_over_channels(repeat: str, computed: bool, opset: int) -> None:
    """As query selection has it: the best positions, with all their channels."""
    net = Net(opset)
    x = produce(net, "nlc", batch=2)
    index = last(net, net.linear(x, 6, 2)) if computed else net.const(drawn(0, 4, 2, 3, 1))
    wide = net.op(repeat, index, net.const([1, 1, 6]))
    y = net.op("GatherElements", x, wide, axis=1)
    net.hint(y, [2, 3, 6])
    check(net, net.op("Relu", y))


def test_an_index_repeated_to_the_size_of_the_data() -> None:
    net = Net(17)
    x = produce(net, "nlc")
    top = net.op("TopK", net.op("ReduceMax", net.linear(x, 6, 2), axes=[2], keepdims=0), net.const([3]), n=2, axis=1)
    channels = net.gather(net.op("Shape", x), [2], 0)
    times = net.op("Concat", net.const([1, 1]), channels, axis=0)
    y = net.op("GatherElements", x, net.op("Tile", net.unsqueeze(top[1], [2]), times), axis=1)
    net.hint(y, ["N", 3, 6])
    check(net, net.op("Relu", y))


def test_an_index_of_its_own_for_every_channel_keeps_them() -> None:
    """It is computed, and has no channels itself."""
    net = Net(17)
    x = produce(net, "nlc", batch=2)
    index = net.op("ArgMax", net.reshape(net.linear(x, 6, 12), 2, 4, 6, 2), axis=3, keepdims=0)
    check(net, net.op("GatherElements", x, index, axis=1), cut=None)


def test_heads_looked_up_by_position() -> None:
    """A grid of heads and their channels passes beside the indexed axis; each head loses channels of its own."""
    net = Net(17)
    x = net.reshape(produce(net, "nlc", batch=2, channels=8), 2, 4, 2, 4)
    own = net.const(drawn(1, 4, 2, 3, 2, 4))
    shared = net.op("Expand", net.const(drawn(1, 3, 2, 4, 1, 1)), net.const([1, 1, 2, 4]))
    for index, size in ((own, 3), (shared, 4)):
        x = net.hint(net.op("GatherElements", x, index, axis=1), [2, size, 2, 4])
    check(net, net.reshape(x, 2, 4, 8))


@given(seed=DRAWN, opset=opsets(11), size=st.sampled_from([(2, 3, 6), (2, 5, 4), (1, 2, 6)]))
@settings(max_examples=5)
def test_scatter_elements_at_positions_that_differ_by_channel(
    seed: int, opset: int, size: tuple[int, int, int]
) -> None:
    net = Net(opset)
    x = produce(net, "nlc", batch=2)
    index = np.argsort(np.random.default_rng(seed).random((2, 4, 6)), axis=1)[: size[0], : size[1], : size[2]]
    updates = net.slice(net.linear(x, 6, 6), 0, index.shape[0], 0)
    for axis in (1, 2):
        updates = net.slice(updates, 0, index.shape[axis], axis)
    check(net, net.op("ScatterElements", x, net.const(index), updates, axis=1))


@given(seed=DRAWN, reduction=st.sampled_from(["none", "add", "mul", "max", "min"]))
@settings(max_examples=6)
def test_scatter_elements_into_channels(seed: int, reduction: str) -> None:
    """Channels that are written go with the updates' own; the others by themselves."""
    net = Net(18)
    x = produce(net, "nlc", batch=2, channels=8)
    line = np.random.default_rng(seed).permutation(8)[:4]
    index = net.const(np.broadcast_to(line, (2, 4, 4)))
    check(net, net.op("ScatterElements", x, index, net.linear(x, 8, 4), axis=2, reduction=reduction), x)


def test_scatter_elements_of_a_constant_into_channels() -> None:
    """What is written has channels of its own, as any constant has; a single number keeps the channel it goes to."""
    net = Net(16)
    x = produce(net, "nlc", batch=2, channels=8)
    check(net, net.op("ScatterElements", x, net.const(np.full((2, 4, 1), 5)), net.weight(2, 4, 1), axis=2), x)


@pytest.mark.parametrize("kind", ["ScatterElements", "ScatterND"])
def test_messages_are_added_up(kind: str) -> None:
    """A graph's edges name their ends; the ends are an input, repeated over channels as exporters do."""
    net = Net(16)
    x = net.op("Relu", net.linear(net.input("x", [5, 3]), 3, 6))
    ends = net.op("Clip", net.input("ends", [2, 7], np.int64), net.const(0), net.const(1))
    source, target = (net.gather(ends, i, 0) for i in (0, 1))
    message = net.linear(net.op("Gather", x, source, axis=0), 6, 6)
    shape = [net.gather(net.op("Shape", n), [a], 0) for n, a in ((x, 0), (message, 1))]
    zeros = net.op("ConstantOfShape", net.op("Concat", *shape, axis=0))
    if kind == "ScatterElements":
        wide = net.op("Expand", net.unsqueeze(target, [1]), net.op("Shape", message))
        y = net.op(kind, zeros, wide, message, axis=0, reduction="add")
    else:
        y = net.op(kind, zeros, net.unsqueeze(target, [1]), message, reduction="add")
    net.hint(y, [5, 6])
    check(net, net.op("Relu", y))


def test_scatter_nd_of_rows() -> None:
    """Rows [N, L, C] overwritten at given positions: the channels of data and updates go together."""
    net = Net(13)
    data, updates = produce(net, "nlc", batch=2), produce(net, "nlc", batch=2, extent=1, name="u")
    index = net.const([[[0, 2]], [[1, 3]]])
    check(net, net.op("ScatterND", data, index, updates))


def grid(*lines: Any) -> Any:
    """An index over the product of positions along each addressed axis, [..., depth]."""
    return np.stack(np.meshgrid(*map(np.asarray, lines), indexing="ij"), axis=-1)


@given(seed=DRAWN, reduction=st.sampled_from(["none", "add", "max"]), depth=st.sampled_from([2, 3, 4]))
@settings(max_examples=6)
def test_scatter_nd_into_channels(seed: int, reduction: str, depth: int) -> None:
    """``x[:, picked, ...] = y``: channels that are written go with the updates' own, the others by themselves."""
    net = Net(18)
    x = produce(net, "nchw", batch=1, channels=8)
    line = np.random.default_rng(seed).permutation(8)[:4]
    lines = [[0], line, range(4), range(5)][:depth]
    index = net.const(grid(*lines))
    check(net, net.op("ScatterND", x, index, net.conv(x, 8, 4), reduction=reduction), x)


def test_scatter_nd_at_a_single_channel() -> None:
    """It stays; all others may go, and the index is renumbered."""
    net = Net(16)
    x = produce(net, "nchw", batch=1, channels=8)
    update = net.squeeze(produce(net, "nchw", batch=1, channels=1, name="u"), [1])
    check(net, net.op("ScatterND", x, net.const([[0, 5]]), update), x)


def test_scatter_nd_along_a_diagonal() -> None:
    """Positions of two axes that go hand in hand: the channels named stay."""
    net = Net(16)
    x = produce(net, "nlc", batch=2, channels=8)
    index = net.const([[[0, 1, 7], [1, 2, 5]]])
    check(net, net.op("ScatterND", x, index, net.const([[0.5, -1.0]], np.float32)), x)


def test_scatter_nd_of_a_computed_index_keeps_what_it_addresses() -> None:
    net = Net(16)
    x = produce(net, "nlc", batch=2)
    at = net.op("Clip", net.input("at", [3, 1], np.int64), net.const(0), net.const(3))
    where = net.op("Concat", net.const(np.zeros((3, 1), np.int64)), at, axis=1)
    check(net, net.op("ScatterND", x, where, net.linear(net.input("u", [3, 3]), 3, 6)))


def spread(net: Net, x: str, lines: list[str | list[int]]) -> str:
    """An index as exporters compute it: a line per axis, all expanded to the shape of their product, joined."""
    columns = []
    for k, line in enumerate(lines):
        one = net.const(line) if isinstance(line, list) else line
        columns.append(net.reshape(one, *(-1 if a == k else 1 for a in range(len(lines)))))
    total = columns[0]
    for column in columns[1:]:
        total = net.op("Add", total, column)
    shape = net.op("Shape", total)
    return net.op("Concat", *(net.unsqueeze(net.op("Expand", c, shape), [-1]) for c in columns), axis=-1)


def count(net: Net, x: str, axis: int) -> str:
    """The positions of an axis."""
    size = net.squeeze(net.gather(net.op("Shape", x), [axis], 0), [0])
    return net.op("Range", net.const(np.asarray(0)), size, net.const(np.asarray(1)))


@pytest.mark.parametrize("line", [[4, 5, 6, 7], [1, 6, 3], [-1, 0], [5]], ids=str)
@pytest.mark.parametrize("depth", [2, 4])
def test_scatter_nd_into_channels_of_any_number_of_samples(depth: int, line: list[int]) -> None:
    """The index is computed from the number of samples; entries go and positions are shifted by nodes in front."""
    net = Net(16)
    x = net.op("Relu", produce(net, "nchw", channels=8))
    index = spread(net, x, [count(net, x, 0), line, count(net, x, 2), [0, 1, 2, 3, 4]][:depth])
    updates = net.conv(x, 8, len(line))
    y = net.op("ScatterND", x, index, updates)
    check(net, net.hint(y, ["N", 8, 4, 5]), x)


def test_gather_nd_of_channels_of_any_number_of_samples() -> None:
    net = Net(16)
    x = net.op("Relu", produce(net, "nchw", channels=8))
    y = net.op("GatherND", x, spread(net, x, [count(net, x, 0), [1, 6, 3, 4]]))
    check(net, net.hint(y, ["N", 4, 4, 5]), x)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_gather_nd_of_positions(batch_dims: int) -> None:
    net = Net(13)
    x = produce(net, "nlc", batch=2)
    index = [[[1]], [[3]]] if batch_dims else [[[0, 1]], [[1, 3]]]
    check(net, net.op("GatherND", x, net.const(index), batch_dims=batch_dims))


@given(seed=DRAWN, depth=st.sampled_from([2, 3]))
@settings(max_examples=4)
def test_gather_nd_of_channels(seed: int, depth: int) -> None:
    """Positions along each axis on their own: channels that are picked pass, the others go by themselves."""
    net = Net(13)
    x = produce(net, "nchw", batch=2, channels=8)
    index = net.const(grid(*([0, 1], drawn(seed, 8, 5), [2, 0, 1])[:depth]))
    check(net, net.op("GatherND", x, index), x)


def test_gather_nd_of_scattered_channels() -> None:
    """The channels named stay, all others may go."""
    net = Net(13)
    x = produce(net, "nchw", batch=2, channels=8)
    check(net, net.op("GatherND", x, net.const([[0, 1], [1, 6]])), x)


def test_gather_nd_within_samples_picks_channels() -> None:
    net = Net(13)
    x = net.transpose(produce(net, "nchw", batch=2, channels=8), 0, 1, 3, 2)
    y = net.op("GatherND", x, net.const([[[1], [6], [4]], [[1], [6], [4]]]), batch_dims=1)
    check(net, y, x)


@given(seed=DRAWN, opset=opsets(9))
@settings(max_examples=4)
def test_compress_of_channels(seed: int, opset: int) -> None:
    net = Net(opset)
    x = produce(net, "nchw", channels=8)
    chosen = net.op("Compress", x, net.const(np.random.default_rng(seed).permutation(7) < 4), axis=1)
    rows = net.op("Compress", x, net.const([True, False, True]), axis=2)
    check(net, net.hint(chosen, ["N", 4, 4, 5]), net.hint(rows, ["N", 8, 2, 5]), x)


def test_compress_by_what_is_computed() -> None:
    net = Net(11)
    x = produce(net, "nlc", batch=2)
    y = net.op("Compress", x, net.const([True, False, True]))
    check(net, net.hint(net.unsqueeze(y, [0]), [1, 2]), x, cut=False)


def test_a_cache_that_is_written_in_place() -> None:
    net = Net(24)
    cache = net.op("Relu", produce(net, "nlc", batch=2))
    update = produce(net, "nlc", batch=2, extent=1, name="u")
    y = net.op("TensorScatter", cache, update, net.const([1, 3]), axis=1)
    check(net, net.hint(y, [2, 4, 6]))


def test_indices_that_others_read_stay_as_they_are() -> None:
    net = Net(13)
    x = produce(net, "nlc", batch=2)
    index = net.const(drawn(3, 4, 2, 3, 6))
    model = net.model(consume(net, net.op("GatherElements", x, index, axis=1)), net.op("Identity", index))
    result = op.prune(model, ratio=0.5, latency=False)
    assert result.report.exactness.passed
    sizes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert sizes[index] == (2, 3, 6)
    assert (2, 3, 3) in sizes.values()
