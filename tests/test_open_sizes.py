"""Sizes that a model leaves open: nothing that follows them is a constant, and a cut holds at every one of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from oracle import assert_exact_cut

import onnxprune as op
from onnxprune.channels.analysis import Analysis

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


# -- sizes that weights and other sizes determine --------------------------------------------------------------------


def bound(model: onnx.ModelProto, **overrides: list[int]) -> list[dict[str, tuple[int, ...]]]:
    """The inputs' shapes at every probe."""
    facts = Analysis(model, input_shapes=overrides).facts
    assert facts.conflict is None, str(facts.conflict)
    return [probe.inputs for probe in facts.probes]


def vision(net: Net, x: str, *, patch: int = 4, channels: int = 3, tokens: int = 25) -> str:
    """Patches of an image, positions for a fixed number of them, a layer and a head."""
    y = net.op("Conv", x, net.weight(WIDTH, channels, patch, patch), strides=[patch, patch])
    target = net.op(
        "Concat", net.op("Slice", net.op("Shape", y), net.const([0]), net.const([2])), net.const([-1]), axis=0
    )
    y = net.transpose(net.op("Reshape", y, target), 0, 2, 1)
    y = net.op("Add", y, net.weight(1, tokens, WIDTH))
    y = net.linear(net.op("Relu", net.linear(y, WIDTH, 24)), 24, WIDTH)
    return net.linear(net.reduce("ReduceMean", y, [1], keepdims=0), WIDTH, 5)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_all_sizes_of_an_image_follow_from_the_weights(layout: str) -> None:
    net = Net()
    dims = ["batch_size", "num_channels", "height", "width"]
    x = net.input("pixels", dims if layout == "nchw" else [dims[i] for i in (0, 2, 3, 1)])
    y = vision(net, x if layout == "nchw" else net.transpose(x, 0, 3, 1, 2))
    model = net.model(y)
    image = (3, 20, 20) if layout == "nchw" else (20, 20, 3)
    assert bound(model) == [{"pixels": (2, *image)}, {"pixels": (3, *image)}]
    report = op.prune(model, ratio=0.5, latency=False).report
    assert report.exactness.passed and report.exactness.batches == [2, 3, 1]


def test_channels_in_front_of_a_normalisation_and_convolutions_at_any_size() -> None:
    net = Net()
    x = net.op("Sub", net.input("x", ["a", "b", "c", "d"]), net.const(np.ones((1, 5, 1, 1)) / 2))
    y = net.conv(net.op("Relu", net.conv(x, 5, 8)), 8, 4)
    shapes = bound(net.model(y))
    assert [s["x"][1] for s in shapes] == [5, 5]
    # Height and width stay open: nothing may be baked in.
    assert all(shapes[0]["x"][axis] != shapes[1]["x"][axis] for axis in (0, 2, 3))
    assert_exact_cut_at(net.model(y), [(1, 5, 9, 13), (4, 5, 21, 6)])


def test_a_classifier_of_flat_maps_fixes_the_size_of_the_image() -> None:
    net = Net()
    x = net.input("x", ["N", "C", "H", "W"])
    y = net.op("MaxPool", net.op("Relu", net.conv(x, 3, 8)), kernel_shape=[2, 2], strides=[2, 2])
    y = net.linear(net.op("Flatten", y), 8 * 6 * 6, 10, gemm=True)
    assert [s["x"][1:] for s in bound(net.model(y))] == [(3, 12, 12)] * 2


def test_widths_of_embeddings_and_of_states_follow_from_the_weights() -> None:
    net = Net()
    x, state = net.input("embeds", ["B", "S", "width"]), net.input("state", ["layers", "B2", "hidden"])
    w, r = net.weight(1, 32, 6), net.weight(1, 32, 8)
    y = net.op("LSTM", net.transpose(x, 1, 0, 2), w, r, "", "", state, state, n=3, hidden_size=8)[0]
    model = net.model(net.linear(y, 8, 3))
    shapes = bound(model)
    assert [s["embeds"][2] for s in shapes] == [6, 6]
    assert [s["state"] for s in shapes] == [(1, 2, 8), (1, 3, 8)]


def cached_attention(names: dict[str, str], *, rank: int = 2) -> tuple[Net, str]:
    """Attention over cached keys and values whose head size is open, with a mask as long as past and present."""
    net = Net()
    b, s, p, t, d = (names.get(n, n) for n in ("B", "S", "P", "T", "D"))
    x = net.input("x", [b, s, WIDTH])
    past = [net.input(f"past_{n}", [b, 2, p, d]) for n in ("k", "v")]
    mask = net.input("mask", [b, t] if rank == 2 else [b, 1, s, t])
    heads = [net.transpose(net.reshape(net.linear(x, WIDTH, WIDTH), 0, -1, 2, WIDTH // 2), 0, 2, 1, 3) for _ in "qkv"]
    k, v = (net.op("Concat", c, y, axis=2) for c, y in zip(past, heads[1:], strict=True))
    scores = net.op("MatMul", heads[0], net.transpose(k, 0, 1, 3, 2))
    scores = net.op("Add", scores, net.unsqueeze(mask, [1, 2]) if rank == 2 else mask)
    y = net.transpose(net.op("MatMul", net.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
    y = net.linear(net.reshape(y, 0, -1, WIDTH), WIDTH, WIDTH)
    return net, net.linear(net.op("Relu", net.linear(y, WIDTH, 32)), 32, WIDTH)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize(
    "names",
    [
        {"B": "batch_size", "S": "sequence_length", "P": "past_sequence_length", "T": "total_sequence_length"},
        {"T": "P + S"},
        {"B": "batch", "S": "q", "P": "m", "T": "k"},
    ],
    ids=["named", "sum", "letters"],
)
def test_caches_and_masks_of_open_sizes(names: dict[str, str], rank: int) -> None:
    net, y = cached_attention(names, rank=rank)
    model = net.model(y)
    for shapes in bound(model):
        past = shapes["past_k"]
        assert past[3] == WIDTH // 2
        assert shapes["mask"][-1] == past[2] + shapes["x"][1]
    report = op.prune(model, ratio=0.5, latency=False).report
    assert report.exactness.passed and report.exactness.batches == [2, 3, 1]
    assert report.totals.params_after < report.totals.params_before


def test_a_size_that_the_user_gives_stays_and_others_follow() -> None:
    net, y = cached_attention({})
    first, second = bound(net.model(y), x=[1, 5, WIDTH])
    assert first["x"] == (1, 5, WIDTH) and first["mask"][1] == 5 + first["past_k"][2]
    assert second["x"][0] != 1 and second["x"][1] != 5


def assert_exact_cut_at(model: onnx.ModelProto, sizes: list[tuple[int, ...]], **shapes: list[int]) -> None:
    """A cut with ``shapes`` given equals the same cut without them, at sizes that the tool did not see."""
    cuts = [
        op.prune(model, ratio=0.5, latency=False, validate=False, input_shapes=given).model for given in (shapes, None)
    ]
    full = onnx.ModelProto()
    full.CopyFrom(model)
    sessions = [ort.InferenceSession(m.SerializeToString()) for m in (*cuts, full)]
    for size in sizes:
        feed = {model.graph.input[0].name: np.random.default_rng(0).standard_normal(size).astype(np.float32)}
        one, other, before = (s.run(None, feed)[0] for s in sessions)
        assert one.shape == before.shape
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_given_shape_is_no_shape_for_ever() -> None:
    """One probe has the sizes that were given; batch and length stay open in the file."""
    net = Net()
    x, y = head(net)
    table = net.weight(ROWS, WIDTH)
    y = net.op("Add", y, net.op("Slice", table, net.const([0]), length_of(net, x), net.const([0])))
    batch = length_of(net, x, 0)
    target = net.op("Concat", batch, net.const([-1, 4, WIDTH // 4]), axis=0)
    y = net.transpose(net.op("Reshape", net.op("Relu", y), target), 0, 2, 1, 3)
    y = net.op(
        "Reshape", net.transpose(y, 0, 2, 1, 3), net.op("Concat", batch, length_of(net, x), net.const([WIDTH]), axis=0)
    )
    model = net.model(net.linear(y, WIDTH, 8))
    given = {"x": [1, 12, WIDTH]}
    first, second = bound(model, **given)
    assert first["x"] == (1, 12, WIDTH)
    assert second["x"][0] != 1 and second["x"][1] != 12
    assert_exact_cut_at(model, [(5, 7, WIDTH), (1, 40, WIDTH)], **given)
    report = op.prune(model, ratio=0.5, latency=False, input_shapes=given).report
    assert report.exactness.passed and len(set(report.exactness.batches)) == 3


def test_a_batch_that_is_baked_in_though_it_is_declared_open() -> None:
    net = Net()
    x = net.input("x", ["N", "S", WIDTH])
    y = net.op("Reshape", net.linear(x, WIDTH, WIDTH), net.const([1, -1, 4, 4]))
    y = net.linear(net.op("Relu", net.op("Reshape", y, net.const([1, -1, WIDTH]))), WIDTH, 8)
    shapes = bound(net.model(y))
    assert len(shapes) == 2 and shapes[0]["x"][1] != shapes[1]["x"][1]


def test_what_cannot_be_solved_is_told_with_its_dimensions() -> None:
    """The number of positions is data, so that no shape tells which lengths fit."""
    net = Net()
    x = net.input("x", ["batch", "length", WIDTH])
    index = net.op("Range", net.const(0), net.op("Squeeze", length_of(net, x)), net.const(1))
    table = net.op("Gather", net.weight(4, WIDTH), index, axis=0)
    model = net.model(net.linear(net.op("Relu", net.op("Add", net.linear(x, WIDTH, WIDTH), table)), WIDTH, 4))
    with pytest.raises(op.ModelError) as caught:
        op.prune(model, ratio=0.5, latency=False)
    assert caught.value.exit_code == 3
    assert "input 'x' [batch = 2, length = 16, 16]" in caught.value.message
    assert "input_shapes x=2,16,16" in caught.value.hint
    result = op.prune(model, ratio=0.5, latency=False, input_shapes={"x": [2, 4, WIDTH]})
    assert result.report.exactness.passed


def test_an_input_without_a_shape_is_named() -> None:
    net = Net()
    model = net.model(net.conv(net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8)), 8, 4))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(op.BudgetError) as caught:
        op.prune(model, ratio=0.5)
    assert "Input 'x' declares no shape" in caught.value.hint and "input_shapes x=" in caught.value.hint
    shapes = bound(model, x=[1, 3, 8, 8])
    assert shapes[0]["x"] == (1, 3, 8, 8) and shapes[1]["x"][1] == 3
    small = op.prune(model, ratio=0.5, latency=False, input_shapes={"x": [1, 3, 8, 8]})
    assert small.report.exactness.batches == [1, 2, 4]


def test_sizes_in_a_branch_that_may_not_be_taken_need_not_fit() -> None:
    """One branch fits images of 8 pixels, the other those of 12: neither decides what the input is."""
    text = """<ir_version: 9, opset_import: ["": 17]> g (float[N, 3, H, W] x, bool small) => (float[N, 4] y)
        <float[64, 4] a = {ONES8}, float[144, 4] b = {ONES12}, float[1, 3, 1, 1] k = {1.0, 1.0, 1.0}> {
        c = Conv(x, k)  f = Flatten(c)
        y = If(small) <then_branch = t () => (float[N, 4] u) { u = MatMul(f, a) },
                       else_branch = e () => (float[N, 4] v) { v = MatMul(f, b) }> }"""
    for name, count in (("ONES8", 256), ("ONES12", 576)):
        text = text.replace(name, ", ".join(["1.0"] * count))
    shapes = bound(onnx.parser.parse_model(text))
    assert [s["x"] for s in shapes] == [(2, 3, 224, 224), (3, 3, 256, 256)]


def test_sizes_that_depend_on_data_contradict_nothing() -> None:
    net = Net()
    x = net.input("x", ["N", WIDTH])
    y = net.linear(net.op("Relu", net.linear(x, WIDTH, 8)), 8, 4)
    found = net.op("Cast", net.op("NonZero", x), to=onnx.TensorProto.FLOAT)
    both = net.op("Concat", found, net.op("Add", found, net.const(1.0)), axis=0)
    model = net.model(y, both, shapes={both: [4, None]})
    assert [s["x"] for s in bound(model)] == [(2, WIDTH), (3, WIDTH)]
