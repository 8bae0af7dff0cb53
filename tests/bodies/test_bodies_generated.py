"""Random graphs put into bodies as they are: what can be cut outside can be cut inside, and is as exact there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from generate import generate
from masks import masked, run
from onnx import TensorProto, helper
from oracle import assert_close, constants, make_feed, plan_slots

import onnxprune as op


def typed(model: onnx.ModelProto, suffix: str) -> list[onnx.ValueInfoProto]:
    """The outputs of a body: types alone."""
    infos = [
        helper.make_tensor_value_info(o.name + suffix, o.type.tensor_type.elem_type, None) for o in model.graph.output
    ]
    for info in infos:
        info.type.tensor_type.ClearField("shape")
    return infos


def renamed(model: onnx.ModelProto, suffix: str, shared: bool) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes (and own weights, where they are not shared) of a model under other names."""
    keep = {i.name for i in model.graph.input} | ({t.name for t in model.graph.initializer} if shared else set())

    def new(name: str) -> str:
        return name if not name or name in keep else name + suffix

    nodes, tensors = [], []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:], copy.output[:] = map(new, node.input), map(new, node.output)
        nodes.append(copy)
    for tensor in model.graph.initializer if not shared else ():
        copy_of = onnx.TensorProto()
        copy_of.CopyFrom(tensor)
        copy_of.name = new(tensor.name)
        tensors.append(copy_of)
    return nodes, tensors


def whole(model: onnx.ModelProto, nodes: list[onnx.NodeProto], inputs: Any, tensors: Any) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "whole", [*model.graph.input, *inputs], list(model.graph.output), tensors)
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def in_an_if(model: onnx.ModelProto, shared: bool) -> onnx.ModelProto:
    """The model in either branch, with weights of its own or those that the other has too."""
    bodies = {}
    for key, suffix in (("then_branch", "__t"), ("else_branch", "__e")):
        nodes, tensors = renamed(model, suffix, shared)
        bodies[key] = helper.make_graph(nodes, key, [], typed(model, suffix), tensors)
    node = helper.make_node("If", ["flag"], [o.name for o in model.graph.output], name="choice", **bodies)
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    return whole(model, [node], [flag], list(model.graph.initializer) if shared else [])


def in_a_loop(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as the body of a Loop that runs once, with its outputs as what is stacked."""
    nodes, tensors = renamed(model, "__t", False)
    nodes += [helper.make_node("Identity", [a], [b]) for a, b in (("before", "after"), ("state", "following"))]
    kinds = {"i": TensorProto.INT64, "before": TensorProto.BOOL, "state": TensorProto.INT64}
    ins = [helper.make_tensor_value_info(n, kind, []) for n, kind in kinds.items()]
    outs = [helper.make_tensor_value_info("after", TensorProto.BOOL, [])]
    outs.append(helper.make_tensor_value_info("following", TensorProto.INT64, []))
    body = helper.make_graph(nodes, "body", ins, [*outs, *typed(model, "__t")], tensors)
    names = [o.name for o in model.graph.output]
    stacked = [f"{n}__all" for n in names]
    loop = helper.make_node("Loop", ["once", "", "first"], ["last", *stacked], name="again", body=body)
    picks = [helper.make_node("Gather", [f"{n}__all", "first"], [n], axis=0) for n in names]
    extra = [helper.make_tensor(n, TensorProto.INT64, [], [k]) for n, k in (("once", 1), ("first", 0))]
    return whole(model, [loop, *picks], [], extra)


def floats(model: onnx.ModelProto) -> int:
    """Elements of all weights; what states a shape may be needed once more."""
    return sum(array.size for array in constants(model.graph).values() if array.dtype.kind == "f")


def check(model: onnx.ModelProto, enclosed: onnx.ModelProto, ratio: float, copies: int) -> None:
    """The enclosed model loses as much as the plain one would, and computes what that does with the same removed."""

    def prune(which: onnx.ModelProto) -> op.Result | None:
        try:
            return op.prune(which, ratio=ratio, latency=False)
        except op.BudgetError:
            return None

    plain, result = prune(model), prune(enclosed)
    if result is None or plain is None:
        assert result is None and plain is None
        return
    lost = [floats(a) - floats(b.model) for a, b in ((model, plain), (enclosed, result))]
    assert lost[1] >= copies * lost[0]
    slots = plan_slots(result)
    branches = [("__t", "__e", {"flag": np.asarray(True)}), ("__e", "__t", {"flag": np.asarray(False)})]
    if enclosed.graph.node[0].op_type == "Loop":
        branches = [("__t", "__e", {})]
    for feed in (make_feed(model, 0), make_feed(model, 1)):
        for suffix, other, more in branches:
            mine = [{**s, "tensor": s["tensor"].removesuffix(suffix)} for s in slots if not s["tensor"].endswith(other)]
            expected = run(masked(model, mine, feed), feed)
            assert_close(expected, run(result.model, {**feed, **more}), 5e-5, suffix)


@pytest.mark.parametrize("seed", range(10))
def test_random_graphs_in_both_branches_of_an_if(seed: int) -> None:
    model = generate(seed)
    shared = seed % 2 == 0
    check(model, in_an_if(model, shared), 0.5, 1 if shared else 2)


@pytest.mark.parametrize("seed", range(10, 18))
def test_random_graphs_in_a_loop(seed: int) -> None:
    model = generate(seed)
    check(model, in_a_loop(model), 0.5, 1)


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs_of_rarer_blocks_in_bodies(seed: int) -> None:
    model = generate(seed, rare=True)
    check(model, in_an_if(model, False), 0.5, 2)
    check(model, in_a_loop(model), 0.5, 1)
