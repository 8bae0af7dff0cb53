"""Packed projections part early: Q/K and V shrink by different amounts, and what shrank alike keeps its nodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from build import Net
from oracle import assert_exact_cut

import onnxprune as op
from onnxprune.channels.plan import Plan, PlanGroup

H, D, S, IN = 3, 4, 5, 6
C = H * D
Parts = tuple[str, str, str]


def shape_target(net: Net, x: str, *rest: int) -> str:
    """[batch of x, *rest], computed."""
    batch = net.op("Gather", net.op("Shape", x), net.const(0), axis=0)
    pieces = [net.unsqueeze(batch, [0]), *(net.const([n]) for n in rest)]
    return net.op("Concat", *pieces, axis=0)


def packed(net: Net, x: str, computed: bool, *target: int) -> str:
    """The packed projection as [batch, sequence, *target]."""
    y = net.linear(x, IN, 3 * C)
    if computed:
        return net.op("Reshape", y, shape_target(net, y, S, *target))
    return net.reshape(y, 0, -1, *target)


def gather(net: Net, x: str, computed: bool) -> Parts:
    y = net.transpose(packed(net, x, computed, 3, H, D), 2, 0, 3, 1, 4)
    q, k, v = (net.gather(y, i, 0) for i in (0, 1, -1))
    return q, k, v


def gather_kept_axis(net: Net, x: str, computed: bool) -> Parts:
    y = net.transpose(packed(net, x, computed, 3, H, D), 2, 0, 3, 1, 4)
    q, k, v = (net.squeeze(net.gather(y, [i], 0), [0]) for i in range(3))
    return q, k, v


def gather_before(net: Net, x: str, computed: bool) -> Parts:
    y = packed(net, x, computed, 3, H, D)
    q, k, v = (net.transpose(net.gather(y, i, 2), 0, 2, 1, 3) for i in range(3))
    return q, k, v


def split(net: Net, x: str, computed: bool) -> Parts:
    y = net.transpose(packed(net, x, computed, 3, H, D), 2, 0, 3, 1, 4)
    q, k, v = (net.squeeze(part, [0]) for part in net.split(y, [1, 1, 1], 0))
    return q, k, v


def sliced(net: Net, x: str, computed: bool) -> Parts:
    y = net.transpose(packed(net, x, computed, 3, H, D), 2, 0, 3, 1, 4)
    q, k, v = (net.squeeze(net.slice(y, i, i + 1, 0), [0]) for i in range(3))
    return q, k, v


def unsqueezed(net: Net, x: str, computed: bool) -> Parts:
    """[batch, sequence, 3, C], a new axis in front, the parts' axis moved there: how in-projections are exported."""
    y = net.unsqueeze(packed(net, x, computed, 3, C), [0])
    y = net.squeeze(net.transpose(y, 3, 1, 2, 0, 4), [-2])
    parts = (net.reshape(net.gather(y, i, 0), 0, 0, H, D) for i in range(3))
    q, k, v = (net.transpose(part, 0, 2, 1, 3) for part in parts)
    return q, k, v


def heads_in_front(net: Net, x: str, computed: bool) -> Parts:
    """Parts of all heads as one axis of 3*H heads: uneven ranges of the outermost factor."""
    y = net.transpose(packed(net, x, computed, 3 * H, D), 0, 2, 1, 3)
    q, k, v = net.split(y, [H, H, H], 1)
    return q, k, v


SPELLINGS = [gather, gather_kept_axis, gather_before, split, sliced, unsqueezed, heads_in_front]


def attend(net: Net, parts: Parts) -> onnx.ModelProto:
    q, k, v = parts
    weights = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = net.transpose(net.op("MatMul", weights, v), 0, 2, 1, 3)
    return net.model(net.linear(net.reshape(y, 0, -1, C), C, 2))


def build(
    spelling: Callable[[Net, str, bool], Parts], opset: int = 17, computed: bool = False, ir: int = 8
) -> onnx.ModelProto:
    net = Net(opset, ir=ir)
    return attend(net, spelling(net, net.input("x", ["N", S, IN]), computed))


def nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes without the names of operands that a cut may replace."""
    result = []
    for node in model.graph.node:
        if node.op_type not in ("Where", "Constant"):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            if copy.op_type == "Reshape":
                del copy.input[1]
            result.append(copy)
    return result


def value_group(model: onnx.ModelProto) -> tuple[int, int]:
    """(id, size) of the group of V: the one that meets the last projection."""
    groups = [g for g in op.analyze(model).groups if g.prunable and g.size == C]
    assert len(groups) == 2, "queries with keys, and values"
    last = [g for g in groups if any(s.axis == 0 and s.size == C for s in g.slots if s.tensor.startswith("w_"))]
    assert len(last) == 1
    return last[0].id, last[0].size


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_values_shrink_alone(spelling: Callable[[Net, str, bool], Parts], opset: int, computed: bool) -> None:
    model = build(spelling, opset, computed)
    number, units = value_group(model)
    # the first position of every head, then the last: another one per head would do too
    removed = [D * h + (0 if h % 2 else D - 1) for h in range(H)]
    result = assert_exact_cut(model, plan=Plan(groups=[PlanGroup(number, units, removed, [])]))
    assert result is not None
    shapes = [tuple(t.dims) for t in result.model.graph.initializer if len(t.dims) == 2]
    assert shapes == [(IN, 3 * C - H), (C - H, 2)]
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    assert all(slot["tensor"] in names for group in result.plan.to_dict()["groups"] for slot in group["slots"])


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_parts_that_shrink_alike_keep_their_nodes(
    spelling: Callable[[Net, str, bool], Parts], opset: int, computed: bool
) -> None:
    model = build(spelling, opset, computed)
    result = assert_exact_cut(model, ratio=0.5)
    assert result is not None
    assert nodes(result.model) == nodes(model)
    assert len([n for n in result.model.graph.node if n.op_type == "Where"]) <= 1 + computed


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_without_a_cut_the_model_is_as_it_was(spelling: Callable[[Net, str, bool], Parts], computed: bool) -> None:
    model = onnx.shape_inference.infer_shapes(build(spelling, computed=computed))
    assert len(model.graph.value_info) > 5
    assert op.prune(model, ratio=0.0, validate=False).model == model


def test_old_models_whose_initializers_are_inputs() -> None:
    model = build(split, opset=8, ir=3)
    number, units = value_group(model)
    assert_exact_cut(model, plan=Plan(groups=[PlanGroup(number, units, [0, 5, 10], [])]))
    assert op.prune(model, ratio=0.0, validate=False).model == model


def test_parts_that_shrink_differently_need_no_more_nodes_than_a_split_and_theirs() -> None:
    model = build(gather)
    number, units = value_group(model)
    result = op.prune(model, plan=Plan(groups=[PlanGroup(number, units, [0, 4, 8], [])]), latency=False)
    kinds = [n.op_type for n in result.model.graph.node]
    assert kinds.count("Split") == 1
    assert kinds.count("Reshape") == 4
    assert "Gather" not in kinds
    used = {name for node in result.model.graph.node for name in node.input}
    assert used >= {t.name for t in result.model.graph.initializer}


def interleaved(net: Net, x: str, computed: bool) -> Parts:
    """[H, 3, D]: every head has its own queries, keys and values side by side."""
    y = net.transpose(packed(net, x, computed, H, 3, D), 3, 0, 2, 1, 4)
    q, k, v = (net.gather(y, i, 0) for i in range(3))
    return q, k, v


def test_interleaved_parts_stay_where_they_are() -> None:
    model = build(interleaved)
    assert op.analyze(model).hoists == []
    result = assert_exact_cut(model, ratio=0.5, expect_cut=None)
    assert result is None or nodes(result.model) == nodes(model)


@pytest.mark.parametrize("keep", ["middle", "view"])
def test_a_tensor_that_something_else_reads_keeps_its_reshape(keep: str) -> None:
    net = Net(17)
    view = packed(net, net.input("x", ["N", S, IN]), False, 3, H, D)
    moved = net.transpose(view, 2, 0, 3, 1, 4)
    q, k, v = (net.gather(moved, i, 0) for i in range(3))
    other = net.op("ReduceSum", {"middle": moved, "view": view}[keep], keepdims=0)
    weights = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=-1)
    model = net.model(net.op("Add", net.op("MatMul", weights, v), other))
    assert op.analyze(model).hoists == []


def test_some_parts_that_nobody_reads() -> None:
    net = Net(17)
    y = net.transpose(packed(net, net.input("x", ["N", S, IN]), False, 4 * H // 4 * 3, D), 0, 2, 1, 3)
    q, v = net.slice(y, 0, H, 1), net.slice(y, 2 * H, 3 * H, 1)
    model = attend(net, (q, q, v))
    assert len(op.analyze(model).hoists) == 1
    assert_exact_cut(model, ratio=0.5)
    assert op.prune(model, ratio=0.0, validate=False).model == model


@pytest.mark.parametrize("bounds", [[(0, 2), (1, 3)], [(0, 3), (1, 2)]])
def test_overlapping_ranges_stay(bounds: list[tuple[int, int]]) -> None:
    net = Net(17)
    y = packed(net, net.input("x", ["N", S, IN]), False, 3, C)
    parts = [net.reduce("ReduceSum", net.slice(y, a, b, 2), [2]) for a, b in bounds]
    assert op.analyze(net.model(net.op("Add", *parts))).hoists == []


def test_the_head_axis_of_a_convolution_is_split_too() -> None:
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 3 * C, 1)
    y = net.op("Reshape", x, net.const([0, 3, H, D, 16]))
    q, k, v = (net.gather(y, i, 1) for i in range(3))
    weights = net.op("Softmax", net.op("MatMul", net.transpose(q, 0, 1, 3, 2), k), axis=-1)
    y = net.reshape(net.op("MatMul", v, net.transpose(weights, 0, 1, 3, 2)), 0, C, 4, 4)
    model = net.model(net.conv(y, C, 2, 1))
    assert sorted(g.size for g in op.analyze(model).groups if g.prunable) == [C, C]
    assert_exact_cut(model, ratio=0.5)


def test_what_the_parts_compute_is_what_the_whole_computed() -> None:
    """The prepared graph in onnxruntime, before anything is cut."""
    from masks import run

    from onnxprune.io.write import assemble

    for spelling in SPELLINGS:
        model = build(spelling, computed=True)
        analysis = op.analyze(model)
        assert len(analysis.hoists) == 1
        feed = {"x": np.random.default_rng(0).standard_normal((7, S, IN)).astype(np.float32)}
        prepared = run(assemble(analysis.graph.proto, analysis.graph.weights), feed)
        for name, value in run(model, feed).items():
            assert np.array_equal(value, prepared[name])
