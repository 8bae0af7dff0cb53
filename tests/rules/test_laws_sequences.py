"""Laws of sequences of tensors: what is put in comes out with its own channels, where positions are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from sandwich import check, consume, opsets, produce

import onnxprune as op


def at(net: Net, sequence: str, position: int, shape: list[Any]) -> str:
    return net.hint(net.op("SequenceAt", sequence, net.const(np.asarray(position))), shape)


def joined(net: Net, sequence: str, shape: list[Any], axis: int = 1, **attrs: Any) -> str:
    return net.hint(net.op("ConcatFromSequence", sequence, axis=axis, **attrs), shape)


@given(opset=opsets(11), split=st.sampled_from([[4, 4], [2, 6], [2, 3, 3], 4, 3]), seed=st.integers(0, 9))
@settings(max_examples=6)
def test_parts_of_channels(opset: int, split: list[int] | int, seed: int) -> None:
    """Stated one by one, or all of one size with a smaller last; each is read by itself."""
    net = Net(opset)
    x = net.op("Relu", produce(net, "nchw", channels=8))
    parts = net.op("SplitToSequence", x, net.const(split), axis=1)
    sizes = split if isinstance(split, list) else [min(split, 8 - k) for k in range(0, 8, split)]
    ends = [at(net, parts, 0, ["N", sizes[0], 4, 5]), at(net, parts, -1, ["N", sizes[-1], 4, 5])]
    check(net, *ends, seed=seed, ratio=0.4)


def test_parts_of_positions_and_back() -> None:
    """Every row by itself, as an unrolled recurrence reads them, and all stacked again."""
    net = Net(13)
    x = net.linear(net.input("x", [2, 3, 3]), 3, 6)
    rows = net.op("SplitToSequence", x, axis=1, keepdims=0)
    made = [net.linear(at(net, rows, k, [2, 6]), 6, 6) for k in range(3)]
    back = joined(net, net.op("SequenceConstruct", *made), [2, 3, 6], new_axis=1)
    check(net, net.op("Relu", back))


def test_channels_one_by_one_stay() -> None:
    net = Net(13)
    parts = net.op("SplitToSequence", produce(net, "nchw"), axis=1)
    check(net, at(net, parts, 2, ["N", 1, 4, 5]), cut=False)


@pytest.mark.parametrize("axis", [1, 2])
def test_parts_of_heads(axis: int) -> None:
    net = Net(13)
    x = net.reshape(produce(net, "nlc", channels=16), 0, 0, 4, 4)
    parts = net.op("SplitToSequence", x, net.const([2, 2]), axis=axis + 1)
    shape = ["N", 4, 2, 4] if axis == 1 else ["N", 4, 4, 2]
    a, b = (at(net, parts, k, shape) for k in range(2))
    check(net, net.op("Mul", net.op("Relu", a), b), cut=None)


def test_tensors_put_in_and_taken_out() -> None:
    """Inserted in front, in the middle and behind, erased, counted; what was taken out no longer matters."""
    net = Net(13)
    a, b, c = (net.op("Relu", produce(net, "nchw", channels=n, name=f"x{n}")) for n in (4, 6, 8))
    things = net.op("SequenceInsert", net.op("SequenceEmpty"), a)
    things = net.op("SequenceInsert", things, b, net.const(np.asarray(0)))
    things = net.op("SequenceInsert", things, c, net.const(np.asarray(-1)))
    things = net.op("SequenceErase", things, net.const(np.asarray(2)))
    count = net.op("Cast", net.op("SequenceLength", things), to=TensorProto.FLOAT)
    y = joined(net, things, ["N", 14, 4, 5])
    model = check(net, net.hint(net.op("Mul", y, net.hint(count, [])), ["N", 14, 4, 5]))
    result = op.prune(model, ratio=0.5, latency=False)
    sizes = [tuple(t.dims) for t in result.model.graph.initializer if len(t.dims) == 4]
    assert [s[0] for s in sizes] == [2, 3, 4]


def test_a_tensor_at_a_computed_position_ties_them_all() -> None:
    net = Net(13)
    x = produce(net, "nlc")
    both = net.op("SequenceConstruct", net.linear(x, 6, 8), net.linear(x, 6, 8))
    where = net.op("Squeeze", net.input("at", [1], np.int64))
    check(net, net.hint(net.op("SequenceAt", both, where), ["N", 4, 8]))


def test_tensors_of_several_sizes_at_a_computed_position_stay() -> None:
    net = Net(13)
    x = net.op("Relu", produce(net, "nlc"))
    parts = net.op("SplitToSequence", x, net.const([2, 4]), axis=2)
    where = net.op("Squeeze", net.input("at", [1], np.int64))
    y = net.op("ReduceSum", net.hint(net.op("SequenceAt", parts, where), ["N", 4, "C"]), net.const([2]))
    check(net, net.hint(y, ["N", 4, 1]), cut=False)


def test_stacked_along_a_new_axis_they_meet() -> None:
    net = Net(13)
    x = produce(net, "nlc")
    things = net.op("SequenceConstruct", net.op("Relu", x), net.linear(x, 6, 6), net.op("Tanh", x))
    for axis, shape in ((-1, ["N", 4, 6, 3]), (2, ["N", 4, 3, 6])):
        y = joined(net, things, shape, axis, new_axis=1)
    check(net, net.op("Relu", y))


def test_a_sequence_that_leaves_the_graph_keeps_its_channels() -> None:
    net = Net(13)
    x = net.op("Relu", produce(net, "nchw", channels=8))
    parts = net.op("SplitToSequence", x, net.const([4, 4]), axis=1)
    y = consume(net, at(net, parts, 0, ["N", 4, 4, 5]))
    model = net.model(y)
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    model.graph.output.append(helper.make_value_info(parts, helper.make_sequence_type_proto(kind)))
    with pytest.raises(op.BudgetError, match="a graph output keeps its shape"):
        op.prune(model, ratio=0.5, validate=False)


def test_a_sequence_that_a_loop_carries_keeps_its_channels() -> None:
    """Its tensors are not followed from one iteration to the next."""
    net = Net(13)
    x = net.op("Relu", produce(net, "nlc", channels=6))
    things = net.op("SequenceConstruct", x)
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes"]),
            helper.make_node("SequenceInsert", ["held", x], ["longer"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_value_info("held", kind),
        ],
        [helper.make_tensor_value_info("goes", TensorProto.BOOL, []), helper.make_value_info("longer", kind)],
    )
    more = net.op("Loop", net.const(np.asarray(2)), "", things, body=body)
    y = joined(net, more, ["N", 12, 6])
    model = net.model(consume(net, y))
    with pytest.raises(op.BudgetError):
        op.prune(model, ratio=0.5, latency=False)
    onnx.checker.check_model(model)
