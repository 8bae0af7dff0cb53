"""Everything that runs a model or a piece of one, on models with bodies: it works, or says why it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from enclosing import IF, IF_SIZES, SCAN, SCAN_SIZES, build, sizes

import onnxprune as op
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.view import Graph
from onnxprune.io.read import load
from onnxprune.io.subgraphs import Inner
from onnxprune.io.weights import ArrayWeight
from onnxprune.runtime.latency import _own_seconds, profile
from onnxprune.runtime.segments import Segments, Store

DATA = np.random.default_rng(3).standard_normal((40, 5, 2, 4)).astype(np.float32)


def scan() -> onnx.ModelProto:
    """A recurrent net over 5 steps of 2 samples."""
    return build(SCAN, **SCAN_SIZES, inside=("ws",))


def calls() -> list[dict[str, Any]]:
    return [{"x": x} for x in DATA]


@pytest.mark.parametrize("criterion", ["nuclear", "variance", "obs", "cosine", "wanda"])
def test_criteria_that_look_at_what_flows_inside(criterion: str) -> None:
    """Every iteration counts: states, inputs and results of the cell have scores of their own."""
    result = op.prune(scan(), criterion=criterion, ratio=0.5, data=calls(), recover="none", latency=False)
    assert result.report.exactness.passed
    assert sizes(result.model, "ws") == [3, 3] and sizes(result.model, "w0")[1] < 5


def test_scores_are_those_of_all_iterations() -> None:
    """A state that never moves goes first, whatever its weights say."""
    model = scan()
    weights = {t.name: t for t in model.graph.initializer}
    values = onnx.numpy_helper.to_array(weights["wu"]).copy()
    body = model.graph.node[1].attribute[1].g if model.graph.node[1].attribute[1].HasField("g") else None
    body = body or model.graph.node[1].attribute[0].g
    own = onnx.numpy_helper.to_array(body.initializer[0]).copy()
    values[:, 4], own[:, 4], own[4, :] = 0, 0, 9
    weights["wu"].CopyFrom(onnx.numpy_helper.from_array(values, "wu"))
    body.initializer[0].CopyFrom(onnx.numpy_helper.from_array(own, "ws"))
    result = op.prune(model, criterion="variance", ratio=0.2, data=calls(), recover="none", latency=False)
    slots = {(s.tensor, s.axis): s.removed for g in result.plan.groups for s in g.slots}
    assert slots["ws", 0] == [4]


def test_a_criterion_that_sees_nothing_says_so() -> None:
    """Inside a branch that no iteration takes there is nothing to look at."""
    text = SCAN.replace(
        "o = MatMul(t, wo)",
        """b = ReduceMax <keepdims = 0> (t)
        flag = Greater(b, zero0)
        o = If (flag) <
            then_branch = p () => (float[2,7] o1) { m = MatMul(t, wm) n = Relu(m) o1 = MatMul(n, wo) },
            else_branch = q () => (float[2,7] o2) { o2 = MatMul(t, wx) }
        >""",
    )
    model = build(text, **{**SCAN_SIZES, "wo": (8, 7)}, wm=(6, 8), wx=(6, 7), zero0=np.float32(2))
    result = op.prune(model, criterion="nuclear", ratio=0.5, data=calls(), recover="none", latency=False)
    assert result.report.exactness.passed
    assert sizes(result.model, "wm")[1] == 8 and sizes(result.model, "wx")[1] == 4
    said = {layer.name: layer.reason for layer in result.report.layers}
    assert said["m"] == "no-score: no sample of the data takes a branch that reads these channels"


def test_layers_of_a_recurrence_are_repaired() -> None:
    """Fitted step by step to what the original had there: the repaired net is nearer to it, over all its steps."""
    rng = np.random.default_rng(11)
    # A redundant state: units come in pairs that nearly say the same.
    double = np.repeat(rng.standard_normal((6, 12)), 2, axis=1) + 0.05 * rng.standard_normal((6, 24))
    wide = {
        **{"wu": (double[:5] / 2).astype(np.float32), "zero": np.zeros((2, 24), np.float32)},
        **{"ws": (rng.standard_normal((24, 24)) / 8).astype(np.float32), "wo": (24, 7), "w1": (24, 3)},
    }
    model = build(SCAN.replace("float[2,6]", "float[2,24]"), **{**SCAN_SIZES, **wide}, inside=("ws", "wo"))
    plain = op.prune(model, ratio=0.3, criterion="l2", data=calls(), recover="none", latency=False)
    mended = op.prune(model, ratio=0.3, criterion="l2", data=calls(), recover="full", latency=False)
    assert {"us", "ss", "o", "y", "z"} <= {r.layer for r in mended.report.repairs if r.done}
    assert mended.report.exactness.passed
    noise = [[10 ** (-o.snr_db / 10) for o in r.report.fidelity.outputs] for r in (plain, mended)]
    assert all(after < 0.5 * before for before, after in zip(*noise, strict=True))
    onnx.checker.check_model(mended.model)
    assert [n.op_type for n in mended.model.graph.node] == [n.op_type for n in plain.model.graph.node]


def test_a_repair_says_why_it_leaves_layers_of_bodies() -> None:
    """Fed from outside; the values of a body in an order of their own."""
    text = SCAN.replace("us = MatMul(u, wu)", "c = MatMul(e2, wu)  u2 = MatMul(u, wv)  us = Add(c, u2)")
    text = text.replace("e = MatMul(x, w0)", "e = MatMul(x, w0)  e2 = ReduceMax <axes = [0], keepdims = 0> (e)")
    outside = op.prune(build(text, **SCAN_SIZES, wv=(5, 6)), ratio=0.5, data=calls(), recover="full", latency=False)
    said = {r.layer: r.how for r in outside.report.repairs if not r.done}
    assert "reads a tensor from outside" in said["c"]
    across = SCAN.replace("o = MatMul(t, wo)", "back = Transpose(t)  o1 = MatMul(wl, back)  o = Transpose(o1)")
    values = {k: v for k, v in SCAN_SIZES.items() if k != "wo"}
    turned = op.prune(build(across, **values, wl=(7, 6)), ratio=0.5, data=calls(), recover="full", latency=False)
    said = {r.layer: r.how for r in turned.report.repairs if not r.done}
    assert "first axis" in said["o1"]


def test_pieces_of_a_graph_run_with_the_weights_of_now(tmp_path: Path) -> None:
    """Values of all iterations, joined, as they are when the first of them is wanted; what comes later is newer."""
    model = scan()
    loaded = load(model)
    graph = Graph.of(loaded.proto, loaded.weights)
    weights, store = dict(graph.weights), Store(1 << 30, tmp_path)
    run = Segments(graph, weights, [["us"], ["t"], ["y"]], store, {"t": Inner(1, 2), "us": Inner(1, 2)})
    run.feed(calls()[:3])
    found = []
    for piece, name in enumerate(("us", "t", "y")):
        assert list(run.run(piece)) == ([] if name == "t" else [0, 1, 2])
        found.append(np.array(store.get(name, 1)))
        run.drop(piece)
        assert "us" not in store and ("t" in store) == (piece == 0)
        weights["ws"] = ArrayWeight("ws", np.zeros((6, 6), np.float32))
    us, t, y = found
    steps = (DATA[1] @ weights["w0"].read() @ weights["wu"].read()).reshape(10, 6)
    np.testing.assert_allclose(us, steps, rtol=1e-4, atol=1e-5)
    assert t.shape == (10, 6) and np.abs(t - np.tanh(steps)).max() > 0.05
    np.testing.assert_allclose(y, np.tanh(steps[-2:]) @ weights["w1"].read(), rtol=1e-4, atol=1e-5)


def test_layers_in_bodies_can_be_taken_apart() -> None:
    wide = {"wu": (5, 24), "ws": (24, 24), "wo": (24, 7), "w1": (24, 3), "zero": np.zeros((2, 24), np.float32)}
    model = build(SCAN.replace("float[2,6]", "float[2,24]"), **{**SCAN_SIZES, **wide}, inside=("ws",))
    result = op.factorize(model, method="svd", ratio=0.5, layers={"ss": 0.5}, latency=False, timed=False, data=calls())
    facts = {f.name: f for f in result.report.factorized}
    assert facts["ss"].method == "svd" and facts["ss"].macs_before == 5 * 2 * 24 * 24
    body = next(a.g for n in result.model.graph.node for a in n.attribute if a.HasField("g"))
    assert [n.op_type for n in body.node].count("MatMul") > 3
    onnx.checker.check_model(result.model)


def test_a_budget_counts_every_iteration() -> None:
    result = op.prune(scan(), target={"macs": 0.5}, latency=False, validate=True)
    totals = result.report.totals
    assert 0.3 * totals.macs_before < totals.macs_after <= 0.5 * totals.macs_before
    assert totals.macs_before == sum(layer.macs_before for layer in result.report.layers)


def test_parameters_of_bodies_count() -> None:
    inside = op.analyze(build(SCAN, **SCAN_SIZES, inside=("ws", "wo")))
    assert inside.parameters == op.analyze(build(SCAN, **SCAN_SIZES)).parameters


def test_a_number_that_inputs_are_held_against_is_what_they_get() -> None:
    """A sampling rate, say: with any other number the model may have no way to run."""
    text = IF.replace("bool c)", "int64 rate)").replace("h0 =", "c = Equal(rate, known)  h0 =")
    analysis = op.analyze(build(text, **IF_SIZES, known=np.asarray(16000)))
    assert integer_bounds(analysis.graph, analysis.facts) == {"rate": (16000, 16000)}
    other = text.replace("c = Equal", "r = Cast <to = 7> (rate)  c = Equal")
    analysis = op.analyze(build(other, **IF_SIZES, known=np.asarray(16000)))
    assert integer_bounds(analysis.graph, analysis.facts) == {}


def test_sizes_that_a_reflecting_pad_cannot_have_are_no_probes() -> None:
    text = """agraph (float[N,T] x) => (float[N,1,L] y) <int64[4] pads = {0, 0, 0, 40}, int64[1] one = {1}> {
        p = Pad <mode = "reflect"> (x, pads)
        u = Unsqueeze(p, one)
        h = Conv <kernel_shape = [3]> (u, w0)
        y = Conv <kernel_shape = [3]> (h, w1)
    }"""
    model = build(text, w0=(8, 1, 3), w1=(1, 8, 3))
    assert all(p.inputs["x"][1] > 40 for p in op.analyze(model).facts.probes)
    assert op.prune(model, ratio=0.5, latency=False).report.exactness.passed


def test_the_time_of_a_body_is_counted_once(tmp_path: Path) -> None:
    """A Scan takes what its nodes leave of its time; those take theirs for all steps together."""
    path = tmp_path / "scan.onnx"
    onnx.save(scan(), path)
    times = profile(path, [calls()[0]], runs=3)
    assert [t.op for t in times].count("Scan") == 1 and len(times) > 4
    found = dict(
        _own_seconds([(0, 100, ("s", "Scan")), (10, 30, ("a", "Add")), (45, 40, ("i", "If")), (50, 20, ("b", "Mul"))])
    )
    seconds = {name: round(1e6 * own) for (name, _), own in found.items()}
    assert seconds == {"s": 30, "a": 30, "i": 20, "b": 20}


def test_a_latency_table_names_the_node_itself_once(tmp_path: Path) -> None:
    model = scan()
    next(node for node in model.graph.node if node.op_type == "Scan").name = "cell"
    found = op.profile(model, threads=1, seconds=0.1, cache=tmp_path)
    kinds = [node.op for node in found.facts.nodes]
    assert kinds.count("Scan") == 1 and not any(kind.startswith("Body") for kind in kinds)
    assert {"us", "o"} & {node.name for node in found.facts.nodes}


SPEECH = """
speech (float[?, 1, 32] x, float[2, ?, 4] state, int64 rate) => (float[?, 1] y, float[2, ?, 4] after) {
    wide = Constant <value_int = 16000> ()
    is_wide = Equal (rate, wide)
    y, after = If (is_wide) <then_branch = fine () => (y1, after1) {
        u = Conv <strides = [4], pads = [1, 1]> (x, w0)
        v = Relu (u)
        s = Transpose <perm = [2, 0, 1]> (v)
        h0, c0 = Split <axis = 0> (state)
        o, h, c = LSTM <hidden_size = 4> (s, wx, wh, , , h0, c0)
        after1 = Concat <axis = 0> (h, c)
        t = Squeeze (h, zero)
        y1 = Gemm (t, w1)
    }, else_branch = coarse () => (y2, after2) {
        p = Conv <strides = [8]> (x, w2)
        q = Relu (p)
        m = GlobalAveragePool (q)
        k = Flatten (m)
        y2 = Gemm (k, w3)
        after2 = Identity (state)
    }>
}"""


def test_a_recurrent_net_with_states_for_inputs_runs_on_recorded_calls() -> None:
    """The batch is the second axis of the states; the recording joins them, and all arrays, to one number of rows."""
    model = build(
        SPEECH, w0=(16, 1, 3), wx=(1, 16, 16), wh=(1, 16, 4), w1=(4, 1), w2=(32, 1, 8), w3=(32, 1), zero=np.array([0])
    )
    draw = np.random.default_rng(1)
    shapes = {"x": (80, 1, 32), "state": (80, 1, 4)}
    data = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    data["rate"] = np.array(16000)
    result = op.prune(model, ratio=0.5, data=data, latency=False)
    assert result.report.exactness.passed and result.report.recovery.samples + result.report.recovery.aside == 40
    assert sizes(result.model, "w0") == [8, 1, 3] and sizes(result.model, "wx") == [1, 16, 8]
    assert sizes(result.model, "w2") == [32, 1, 8]
    # A budget that needs the other branch, too, prunes it by its weights, and says so.
    result = op.prune(model, target="macs=0.45", data=data, effort="quick", latency=False)
    assert result.report.totals.macs_after <= 0.46 * result.report.totals.macs_before
    assert 4 < sizes(result.model, "w2")[0] < 32
    assert any(w.startswith("1 group lies in branches that no calibration") for w in result.report.warnings)
