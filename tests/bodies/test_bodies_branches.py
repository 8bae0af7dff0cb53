"""Layers in the branches of an If are scored and repaired on the samples that take the branch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from enclosing import LOOP, LOOP_SIZES, build
from masks import Array, run

import onnxprune as op
from onnxprune.graph.view import Graph
from onnxprune.io.read import load
from onnxprune.io.subgraphs import Inner
from onnxprune.runtime.capture import branch_assignments
from onnxprune.runtime.segments import Segments, Store

TWO = """agraph (float[N,4,6] x, bool c) => (float[N,3] y, float[N,6] z)
<int64[2] flat = {0, -1}> {
    z = If (c) <
        then_branch = yes () => (float[N,6] zt) {
            a = Conv <kernel_shape = [3], pads = [1, 1]> (x, wa)
            ar = Relu(a)
            a1 = Conv <kernel_shape = [3]> (ar, wa1)
            af = Reshape(a1, flat)
            at = Tanh(af)
            zt = MatMul(at, wt)
        },
        else_branch = no () => (float[N,6] ze) {
            f = Reshape(x, flat)
            g = Gemm(f, wg)
            b = Relu(g)
            ze = MatMul(b, we)
        }
    >
    y = MatMul(z, w1)
}"""


def redundant(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """A weight [rows, 2 columns] whose outputs come in pairs that nearly say the same."""
    one = rng.standard_normal((rows, columns)) / np.sqrt(rows)
    return np.repeat(one, 2, axis=1) + 0.05 * rng.standard_normal((rows, 2 * columns))


def two() -> onnx.ModelProto:
    rng = np.random.default_rng(5)
    wa = redundant(rng, 12, 8).T.reshape(16, 4, 3).astype(np.float32)
    sizes: dict[str, Any] = {"wa1": (5, 16, 3), "wt": (20, 6), "we": (24, 6), "w1": (6, 3)}
    return build(TWO, wa=wa, wg=redundant(rng, 24, 12).astype(np.float32), **sizes, inside=("wa", "we"))


def feeds(seed: int, count: int, sides: Sequence[bool] = (True, False)) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((count, 8, 4, 6)).astype(np.float32)
    return [{"x": x, "c": np.asarray(sides[k % len(sides)])} for k, x in enumerate(drawn)]


def error(model: onnx.ModelProto, other: onnx.ModelProto, given: Sequence[dict[str, Array]]) -> float:
    """What is left of the first output's energy."""
    ones, others = (np.concatenate([run(m, f)["y"] for f in given]) for m in (model, other))
    return float(np.square(ones - others).sum() / np.square(ones).sum())


def pruned(model: onnx.ModelProto, given: Sequence[dict[str, Array]], recover: str) -> op.Result:
    return op.prune(model, criterion="obs", ratio=0.4, data=list(given), recover=recover, batch_size=8, latency=False)


def done(result: op.Result) -> set[str]:
    return {r.layer for r in result.report.repairs if r.done}


def said(result: op.Result) -> dict[str, str]:
    return {r.layer: r.how for r in result.report.repairs if not r.done}


def test_both_branches_are_repaired() -> None:
    """Each on the samples that take it; what they give is nearer to the original on others."""
    model = two()
    plain, mended = (pruned(model, feeds(0, 40), r) for r in ("none", "full"))
    assert mended.report.exactness.passed
    assert {"a1", "ze"} <= done(mended)
    assert not any("lie in branches" in w for w in mended.report.warnings)
    for side in (True, False):
        new = feeds(1, 10, [side])
        assert error(model, mended.model, new) < 0.5 * error(model, plain.model, new)
    onnx.checker.check_model(mended.model)
    assert [n.op_type for n in mended.model.graph.node] == ["If", "MatMul"]


def test_a_branch_that_no_sample_takes_stays_and_is_named() -> None:
    model = two()
    given = feeds(0, 40, [True])
    plain, mended = (pruned(model, given, r) for r in ("none", "full"))
    reasons = said(mended)
    assert all("takes the else-branch of If 'z'" in reasons[name] for name in ("g", "ze"))
    assert "a1" in done(mended) and not {"g", "ze"} & done(mended)
    assert any("2 layers lie in branches that no calibration sample takes" in w for w in mended.report.warnings)
    new = feeds(1, 5, [False])
    ones, others = ([run(r.model, f)["z"] for f in new] for r in (plain, mended))
    assert all(np.array_equal(one, other) for one, other in zip(ones, others, strict=True))


def test_a_branch_counts_the_samples_that_take_it() -> None:
    """A channel that is silent where one branch runs, and not read where the other does, goes first."""
    text = """agraph (float[N,4] x, bool c) => (float[N,3] y) {
        h = MatMul(x, w0)
        y = If (c) <
            then_branch = yes () => (float[N,3] a) { a = MatMul(h, wa) },
            else_branch = no () => (float[N,3] b) { b = MatMul(h, wb) }
        >
    }"""
    weights = {"w0": np.eye(4, dtype=np.float32), "wa": np.ones((4, 3), np.float32), "wb": np.ones((4, 3), np.float32)}
    weights["wa"][2], weights["wb"][2] = 9, 0
    given = [{"x": f["x"][:, :, 0], "c": f["c"]} for f in feeds(4, 20)]
    for feed in given:
        feed["x"][:, 2] *= 0 if feed["c"] else 9
    result = op.prune(build(text, **weights), criterion="wanda", ratio=0.25, data=given, recover="none", latency=False)
    assert {tuple(s.removed) for g in result.plan.groups for s in g.slots} == {(2,)}


INNER = """agraph (float[N,4] x) => (float[N,3] y) {
    h0 = MatMul(x, w0)
    h = Relu(h0)
    m0 = MatMul(h, wm)
    m = ReduceMean <keepdims = 0> (m0)
    c = Greater(m, limit)
    z = If (c) <
        then_branch = yes () => (float[N,6] zt) {
            a = MatMul(h, wa)
            ar = Relu(a)
            d = Less(m, more)
            zt = If (d) <
                then_branch = less () => (float[N,6] z1) { b = MatMul(ar, wb) z1 = Tanh(b) },
                else_branch = more () => (float[N,6] z2) { e = MatMul(ar, we) z2 = Sigmoid(e) }
            >
        },
        else_branch = no () => (float[N,6] ze) {
            last = Loop (trips, , h) <
                body = step (int64 i, bool before, float[N,16] s) => (bool after, float[N,16] t) {
                    q = MatMul(s, ws)
                    t = Tanh(q)
                    after = Identity(before)
                }
            >
            ze = MatMul(last, wz)
        }
    >
    y = MatMul(z, w1)
}"""


def inner() -> onnx.ModelProto:
    rng = np.random.default_rng(6)
    w0 = redundant(rng, 4, 8).astype(np.float32)
    sizes: dict[str, Any] = {"wb": (12, 6), "we": (12, 6), "ws": (16, 16), "wz": (16, 6), "w1": (6, 3), "wm": (16, 1)}
    numbers = {"limit": np.float32(0), "more": np.float32(0.12), "trips": np.asarray(3)}
    return build(INNER, w0=w0, wa=redundant(rng, 16, 6).astype(np.float32), **sizes, **numbers, inside=("ws", "we"))


def drawn(seed: int, count: int = 120) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": x} for x in rng.standard_normal((count, 8, 4)).astype(np.float32)]


def test_values_decide_the_way() -> None:
    """Branches within branches and a Loop in one; the cut model is led the way that the original takes."""
    model = inner()
    loaded = load(model)
    graph = Graph.of(loaded.proto, loaded.weights)
    found = branch_assignments(graph, graph.weights, drawn(0))
    kinds = [tuple(sorted(way.items())) for way in found]
    assert {len(k) for k in kinds} == {1, 2}, "what is not reached has no value"
    assert len(set(kinds)) == 3
    plain, mended = (pruned(model, drawn(0), r) for r in ("none", "full"))
    assert mended.report.exactness.passed
    assert done(mended) >= {"b", "e", "q", "ze"}
    assert error(model, mended.model, drawn(1)) < 0.7 * error(model, plain.model, drawn(1))


def test_pieces_hold_what_runs(tmp_path: Path) -> None:
    """Every tensor has values for the batches that come to it and no others, and they are those of the whole."""
    model = inner()
    loaded = load(model)
    graph = Graph.of(loaded.proto, loaded.weights)
    given = drawn(0, 30)
    taken = branch_assignments(graph, graph.weights, given)
    store = Store(1 << 30, tmp_path)
    run_ = Segments(graph, graph.weights, [["a"], ["b", "q"], ["z"], ["y"]], store, {"q": Inner(1, 2)}, taken)
    run_.feed(given)
    for piece in range(4):
        assert list(run_.run(piece)) == list(range(30))
    for batch, way in enumerate(taken):
        assert [batch in store.batches([name]) for name in ("a", "q", "b")] == [
            way["c"],
            not way["c"],
            way["c"] and way["d"],
        ]
        whole = run(model, given[batch])["y"]
        np.testing.assert_allclose(store.get("y", batch), whole, rtol=1e-5, atol=1e-6)
    batch = next(b for b, way in enumerate(taken) if not way["c"])
    h = np.maximum(given[batch]["x"] @ graph.weights["w0"].read(), 0)
    first = h @ graph.weights["ws"].read()
    assert store.get("q", batch).shape == (24, 16)
    np.testing.assert_allclose(store.get("q", batch)[:8], first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_layers_in_branches_are_scored(criterion: str) -> None:
    result = op.prune(two(), criterion=criterion, ratio=0.4, data=feeds(0, 40), recover="full", latency=False)
    assert result.report.exactness.passed and {"a1", "ze"} <= done(result)


STEPS = """agraph (float[5,2,4] x) => (float[2,3] y) {
    e = MatMul(x, w0)
    last = Scan <num_scan_inputs = 1, body = step (float[2,24] s, float[2,12] u) => (float[2,24] t) {
        us = MatMul(u, wu)
        ss = MatMul(s, ws)
        sum = Add(us, ss)
        p = Relu(sum)
        m = ReduceMean <keepdims = 0> (u)
        flag = Greater(m, limit)
        t = If (flag) <
            then_branch = yes () => (float[2,24] t1) {
                a0 = MatMul(p, wa0)
                ar = Relu(a0)
                a = MatMul(ar, wa)
                t1 = Tanh(a)
            },
            else_branch = no () => (float[2,24] t2) {
                deep = Greater(m, never)
                t2 = If (deep) <
                    then_branch = more () => (float[2,24] t3) { b = MatMul(p, wb) t3 = Tanh(b) },
                    else_branch = less () => (float[2,24] t4) { c = MatMul(p, wc) t4 = Sigmoid(c) }
                >
            }
        >
    }> (zero, e)
    y = MatMul(last, w1)
}"""


def steps(never: float = -0.15, **more: Any) -> onnx.ModelProto:
    rng = np.random.default_rng(8)
    names = {"wu": redundant(rng, 12, 12).astype(np.float32), "zero": np.zeros((2, 24), np.float32)}
    sizes: dict[str, Any] = {
        "w0": (4, 12),
        "ws": (24, 24),
        "wa0": (24, 16),
        "wa": (16, 24),
        "wb": (24, 24),
        "wc": (24, 24),
        "w1": (24, 3),
    }
    numbers = {"limit": np.float32(0.15), "never": np.float32(never)}
    return build(STEPS, **names, **sizes, **numbers, **more, inside=("ws", "wa", "wb"))


def sequences(seed: int, count: int = 60) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": x} for x in rng.standard_normal((count, 5, 2, 4)).astype(np.float32)]


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_branches_within_a_recurrence_are_seen(criterion: str) -> None:
    """Each of them on the iterations that take it."""
    model = steps()
    plain, mended = (
        op.prune(model, criterion=criterion, ratio=0.3, exclude=["e"], data=sequences(0), recover=r, latency=False)
        for r in ("none", "full")  # the conditions depend on the mean of what e computes
    )
    assert mended.report.exactness.passed
    assert not any("no-score" in (layer.reason or "") for layer in mended.report.layers)
    assert {"a", "b", "c"} <= done(mended)
    assert error(model, mended.model, sequences(1)) < 0.6 * error(model, plain.model, sequences(1))
    onnx.checker.check_model(mended.model)


def test_a_branch_that_no_iteration_takes_stays_and_is_named() -> None:
    model = steps(never=9.0)
    mended = op.prune(model, criterion="wanda", ratio=0.3, data=sequences(0), recover="full", latency=False)
    assert "no calibration sample takes" in said(mended)["b"] and {"a", "c"} <= done(mended)


def test_sizes_of_inputs_tell_what_a_branch_would_have_given() -> None:
    """Every second iteration of a Loop over a batch of any size takes one branch."""
    text = LOOP.replace("float[N,6]", "float[N,24]").replace(
        "o = Sigmoid(o0)",
        """p = Relu(o0)
        even = Mod(i, two)
        flag = Equal(even, none)
        o = If (flag) <
            then_branch = yes () => (float[N,5] o1) { a = MatMul(p, wa) o1 = Sigmoid(a) },
            else_branch = no () => (float[N,5] o2) { b = MatMul(p, wb) o2 = Tanh(b) }
        >""",
    )
    rng = np.random.default_rng(9)
    wide = {"w0": (4, 24), "ws": (24, 24), "w1": (24, 3), "wa": (12, 5), "wb": (12, 5)}
    values = {"two": np.asarray(2), "none": np.asarray(0), "limit": np.float32(99)}
    wo = redundant(rng, 24, 6).astype(np.float32)
    model = build(text, **{**LOOP_SIZES, **wide, **values, "wo": wo})
    drawn_ = rng.standard_normal((50, 6, 4)).astype(np.float32)
    given = [{"x": x, "trips": np.asarray(4)} for x in drawn_]
    result = op.prune(model, criterion="wanda", ratio=0.3, data=given, recover="full", latency=False)
    assert result.report.exactness.passed and {"a", "b"} <= done(result)


def test_what_a_cut_left_is_seen_in_its_own_sizes() -> None:
    """Scores of a second round are of the model that the first one left: what is not taken has its sizes."""
    options: dict[str, Any] = {"criterion": "wanda", "ratio": 0.4, "recover": "none", "latency": False}
    result = op.prune(steps(), steps=2, data=sequences(0, 20), **options)
    assert result.report.exactness.passed
    assert not any("no-score" in (layer.reason or "") for layer in result.report.layers)
