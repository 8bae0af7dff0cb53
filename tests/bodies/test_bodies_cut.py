"""Cuts inside the bodies of If, Loop and Scan, against an oracle of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from enclosing import IF, IF_SIZES, LOOP, LOOP_SIZES, SCAN, SCAN_SIZES, build, check, same, sizes
from oracle import assert_exact_cut

import onnxprune as op

RATIOS = (0.2, 0.5, 0.8)


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reasons(model: onnx.ModelProto) -> set[str]:
    return {b.code for b in op.analyze(model).barriers}


# -- If ----------------------------------------------------------------------------------------------------------------


def choices(*extra: str) -> list[dict[str, Any]]:
    """Inputs for which either branch is taken."""
    return [
        {"x": draw(n, 4, seed=n), **dict.fromkeys(("c", *extra), np.asarray(c))} for n in (2, 5) for c in (0 > 1, 1 > 0)
    ]


@pytest.mark.parametrize("ratio", RATIOS)
def test_both_branches_of_an_if(ratio: float) -> None:
    """What both read, what they give, and what lies within one of them."""
    model = build(IF, **IF_SIZES)
    result = assert_exact_cut(model, ratio=ratio)
    assert result is not None
    check(model, result, choices())
    for name, axis in (("wt1", 0), ("wt1", 1), ("we", 0), ("we", 1), ("w1", 0)):
        assert sizes(result.model, name)[axis] < IF_SIZES[name][axis]
    assert sizes(result.model, "wt2")[1] == sizes(result.model, "we")[1] == sizes(result.model, "w1")[0]


@pytest.mark.parametrize("where", ["inside", "constant"])
def test_weights_that_lie_in_a_body(where: str) -> None:
    large = {**IF_SIZES, "w0": (4, 40), "wt1": (40, 10), "we": (40, 6)}
    model = build(IF, **large, **{where: ("wt1", "wt2", "we")})
    result = assert_exact_cut(model)
    assert result is not None
    check(model, result, choices())
    assert sizes(result.model, "wt1") == [20, 5]
    kinds = [[n.op_type for n in a.g.node] for a in result.model.graph.node[2].attribute]
    assert kinds == [[n.op_type for n in a.g.node] for a in model.graph.node[2].attribute]


def test_a_weight_that_both_branches_read() -> None:
    """It is cut once, for both."""
    text = IF.replace("MatMul(h, we)", "MatMul(a2, wt2)").replace("{ b =", "{ a1 = MatMul(h, wt1)  a2 = Tanh(a1)  b =")
    model = build(text, **{k: v for k, v in IF_SIZES.items() if k != "we"})
    result = assert_exact_cut(model)
    assert result is not None
    check(model, result, choices())
    assert sizes(result.model, "wt1") == [4, 5]


def test_a_weight_that_is_read_inside_and_outside() -> None:
    text = IF.replace("h = Relu(h0)", "h1 = Relu(h0)  h2 = MatMul(h1, we)  h3 = Tanh(h2)  h = MatMul(h3, back)")
    model = build(text, **IF_SIZES, back=(6, 8))
    result = assert_exact_cut(model)
    assert result is not None
    check(model, result, choices())
    assert sizes(result.model, "we") == [4, 3]


NESTED = IF.replace(
    "b = MatMul(h, we)  ze = Tanh(b)",
    """ze = If (d) <
        then_branch = inner () => (float[N,6] p) { p0 = MatMul(h, wp)  p = Relu(p0) },
        else_branch = other () => (float[N,6] q) { q = MatMul(h, we) }
    >""",
).replace("bool c)", "bool c, bool d)")


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_if_within_an_if(ratio: float) -> None:
    model = build(NESTED, **IF_SIZES, wp=(8, 6), inside=("wp", "wt2"))
    result = assert_exact_cut(model, ratio=ratio)
    assert result is not None
    feeds = [{**feed, "d": np.asarray(d)} for feed in choices() for d in (True, False)]
    check(model, result, feeds)
    assert sizes(result.model, "wp")[1] == sizes(result.model, "we")[1] < 6


def test_names_that_both_branches_use() -> None:
    """Tensors and nodes of the same name in either branch keep it."""
    text = (
        IF.replace("a0 =", "[part] b =")
        .replace("Relu(a0)", "Relu(b)")
        .replace(" b = MatMul(h, we)", " [part] b = MatMul(h, we)")
    )
    model = build(text, **IF_SIZES)
    result = assert_exact_cut(model)
    assert result is not None
    check(model, result, choices())
    for before, after in zip(model.graph.node[2].attribute, result.model.graph.node[2].attribute, strict=True):
        assert [(n.name, n.input, n.output) for n in before.g.node] == [
            (n.name, n.input, n.output) for n in after.g.node
        ]
    labels = [layer.name for layer in op.analyze(model).layers]
    assert len(set(labels)) == len(labels) and "part" in labels


def test_branches_that_give_other_shapes_hold_their_channels() -> None:
    text = IF.replace("float[N,6] ze", "float[N,7] ze").replace("y = MatMul(z, w1)", "y = ReduceSum <keepdims = 1> (z)")
    text = text.replace("float[N,3] y", "float[1,1] y").replace("float[N,6] zt", "float[N,6] zt")
    given = {**IF_SIZES, "we": (8, 7)}
    del given["w1"]
    model = build(text, **given)
    result = assert_exact_cut(model)
    assert result is not None
    assert sizes(result.model, "wt2") == [5, 6] and sizes(result.model, "we") == [4, 7]
    assert "dynamic-shape" in reasons(model)


def test_a_size_that_leaves_a_body_stays_what_it_was() -> None:
    """The model multiplies by the number of channels that it had."""
    text = IF.replace("z = If", "z, n = If").replace("float[N,6] zt)", "float[N,6] zt, int64[1] nt)")
    text = text.replace("float[N,6] ze)", "float[N,6] ze, int64[1] ne)")
    text = text.replace("zt = MatMul(a, wt2)", "zt = MatMul(a, wt2)  nt0 = Shape <start = 1> (a)  nt = Identity(nt0)")
    text = text.replace("ze = Tanh(b)", "ze = Tanh(b)  ne = Shape <start = 1> (h)")
    text = text.replace("y = MatMul(z, w1)", "nf = Cast <to = 1> (n)  v = Mul(z, nf)  y = MatMul(v, w1)")
    model = build(text, **IF_SIZES)
    result = assert_exact_cut(model)
    assert result is not None
    check(model, result, choices())


def test_a_branch_that_is_never_taken_is_cut_along() -> None:
    """The condition is a size: here the branch that removes an axis is taken, the other gives another rank."""
    text = """agraph (float[2,4,1] x) => (float[2,3] y) <int64 one = {1}, int64[1] axis = {2}> {
        h = Conv <kernel_shape = [1]> (x, w0)
        n = Shape <start = 2> (h)
        c = Equal(n, one)
        z = If (c) <
            then_branch = yes () => (float[2,8] zt) { zt = Squeeze(h, axis) },
            else_branch = no () => (float[2,8,T] ze) { ze = Identity(h) }
        >
        y = MatMul(z, w1)
    }"""
    model = build(text, w0=(8, 4, 1), w1=(8, 3))
    result = assert_exact_cut(model, ratio=0.5)
    assert result is not None
    assert sizes(result.model, "w1") == [4, 3]


# -- Scan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("where", ["outside", "inside", "constant"])
def test_a_recurrent_net_in_a_scan(ratio: float, where: str) -> None:
    """State, input and output channels of the cell all go."""
    held = {} if where == "outside" else {where: ("wu", "ws", "wo")}
    model = build(SCAN, **SCAN_SIZES, **held)
    result = assert_exact_cut(model, ratio=ratio)
    assert result is not None
    state = sizes(result.model, "ws")
    assert state[0] == state[1] == sizes(result.model, "zero")[1] == sizes(result.model, "w1")[0] < 6
    assert sizes(result.model, "wu")[0] == sizes(result.model, "w0")[1] < 5
    assert sizes(result.model, "wo")[1] == sizes(result.model, "w2")[0] < 7


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axes_and_directions_of_a_scan(axis: int) -> None:
    """The scanned axis lies elsewhere, time runs backwards, results are stacked along another axis."""
    perm = {0: "[0,1,2]", 1: "[1,0,2]", -1: "[1,2,0]"}[axis]
    text = SCAN.replace("e = MatMul(x, w0)", f"e0 = MatMul(x, w0)  e = Transpose <perm = {perm}> (e0)")
    more = f"scan_input_axes = [{axis}], scan_input_directions = [1], scan_output_axes = [{axis}], "
    text = text.replace("num_scan_inputs = 1,", f"num_scan_inputs = 1, {more} scan_output_directions = [1],")
    back = {0: "[0,1,2]", 1: "[1,0,2]", -1: "[2,0,1]"}[axis]
    text = text.replace("z = MatMul(every, w2)", f"f = Transpose <perm = {back}> (every)  z = MatMul(f, w2)")
    model = build(text, **SCAN_SIZES)
    result = assert_exact_cut(model)
    assert result is not None
    assert sizes(result.model, "wu") == [2, 3] or sizes(result.model, "wu") == [3, 3]
    assert sizes(result.model, "w2")[0] < 7


def test_a_state_that_comes_from_an_input_stays() -> None:
    text = SCAN.replace("x) =>", "x, float[2,6] zero) =>")
    model = build(text, **{k: v for k, v in SCAN_SIZES.items() if k != "zero"})
    result = assert_exact_cut(model)
    assert result is not None
    assert sizes(result.model, "ws") == [6, 6] and sizes(result.model, "wo")[1] < 7
    assert "unlabelled-operand" in reasons(model)


def test_what_a_scan_costs() -> None:
    """A layer of the body counts once per step."""
    layers = {layer.name: layer.macs_before for layer in op.analyze(build(SCAN, **SCAN_SIZES)).layers}
    assert layers["ss"] == 5 * 2 * 6 * 6 and layers["us"] == 5 * 2 * 5 * 6 and layers["e"] == 5 * 2 * 4 * 5


# -- Loop --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_loop_with_a_state_and_results(ratio: float) -> None:
    """Whatever the number of trips, none included, and where a condition ends it early."""
    model = build(LOOP, **LOOP_SIZES)
    result = assert_exact_cut(model, ratio=ratio)
    assert result is not None
    feeds = [{"x": draw(3, 4, seed=s) * f, "trips": np.asarray(n)} for s in (1, 2) for f in (0.1, 9) for n in (0, 1, 4)]
    check(model, result, feeds)
    assert sizes(result.model, "ws")[0] == sizes(result.model, "ws")[1] == sizes(result.model, "w0")[1] < 6
    assert sizes(result.model, "wo")[1] == sizes(result.model, "w2")[0] < 5


def test_how_often_a_loop_runs_counts_where_it_is_known() -> None:
    fixed = LOOP.replace(", int64 trips)", ")").replace("after = Less(size, limit)", "after = Identity(before)")
    given = {**LOOP_SIZES, "trips": np.asarray(4)}

    def macs(text: str, **values: Any) -> int:
        model = build(text, **values)
        return {layer.name: layer.macs_before for layer in op.analyze(model).layers}["m"]

    once = 2 * 6 * 6  # at the first probe's batch
    assert macs(fixed, **given) == 4 * once
    assert macs(LOOP, **LOOP_SIZES) == once, "who feeds the model says how often"
    assert macs(LOOP.replace(", int64 trips)", ")"), **given) == once, "a condition may end it"


def test_a_state_that_grows_stays() -> None:
    """It is longer after every iteration: nothing about its first size holds later. What else there is goes."""
    text = LOOP.replace("float[N,6] t,", "float[N,6] t, float[N,M] g2,").replace(
        "float[N,6] s)", "float[N,6] s, float[N,L] g)"
    )
    text = text.replace("last, every = Loop (trips, go, first)", "last, long, every = Loop (trips, go, first, first)")
    text = text.replace("m = MatMul(s, ws)", "m = MatMul(s, ws)  g2 = Concat <axis = 1> (g, s)")
    text = text.replace(
        "y = MatMul(last, w1)", "r = ReduceSum <keepdims = 1> (long)  y0 = MatMul(last, w1)  y = Add(y0, r)"
    )
    model = build(text, **LOOP_SIZES)
    result = assert_exact_cut(model)
    assert result is not None
    feeds = [{"x": draw(3, 4), "trips": np.asarray(n)} for n in (0, 1, 4)]
    check(model, result, feeds)
    assert sizes(result.model, "ws") == [6, 6] and sizes(result.model, "wo")[1] < 5


def test_reshapes_inside_follow() -> None:
    """Targets that are computed from sizes, and stated ones."""
    text = SCAN.replace(
        "t = Tanh(sum)",
        """n = Shape(s)  flat = Reshape(sum, all)  again = Reshape(flat, n)  twice = Reshape(again, stated)
        t = Tanh(twice)""",
    )
    model = build(text, **SCAN_SIZES, all=np.asarray([-1]), stated=np.asarray([2, 6]))
    result = assert_exact_cut(model, expect_cut=None)
    assert result is not None


def test_a_loop_within_a_scan() -> None:
    inner = """m = Loop (three, , us) <body = deep (int64 i, bool before, float[2,6] v) => (bool after, float[2,6] w) {
            after = Identity(before)
            v2 = MatMul(v, wv)
            w = Sigmoid(v2)
        }>
        sum = Add(m, ss)"""
    model = build(
        SCAN.replace("sum = Add(us, ss)", inner), **SCAN_SIZES, wv=(6, 6), three=np.asarray(3), inside=("wv",)
    )
    result = assert_exact_cut(model)
    assert result is not None
    assert sizes(result.model, "wv") == [3, 3]
    layers = {layer.name: layer.macs_before for layer in op.analyze(model).layers}
    assert layers["v2"] == 3 * 5 * 2 * 6 * 6


# -- as users see it ---------------------------------------------------------------------------------------------------


def test_layers_of_bodies_have_names_that_options_take() -> None:
    model = build(SCAN, **SCAN_SIZES)
    kept = assert_exact_cut(model, layers={"ss": 0.0}, expect_cut=True)
    assert kept is not None
    assert sizes(kept.model, "ws") == [6, 6] and sizes(kept.model, "w0")[1] < 5
    again = op.prune(model, plan=kept.plan, latency=False)
    assert again.model == kept.model


def test_what_is_not_cut_is_as_it_was() -> None:
    for text, given in ((IF, IF_SIZES), (SCAN, SCAN_SIZES), (LOOP, LOOP_SIZES)):
        model = build(text, **given, inside=tuple(n for n in ("wt1", "ws") if n in given))
        assert same(op.prune(model, ratio=0, latency=False).model, model)
