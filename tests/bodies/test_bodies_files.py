"""Bodies laid open and put back, and what lies in them shown: names, order and values stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from enclosing import HEAD, IF, IF_SIZES, LOOP, LOOP_SIZES, SCAN, SCAN_SIZES, build, same
from masks import run
from onnx import helper, numpy_helper, parser

import onnxprune as op
from onnxprune.graph.view import Graph
from onnxprune.io.markers import has_bodies
from onnxprune.io.read import load
from onnxprune.io.subgraphs import Inner, expose_tensors, hidden_tensors, outline_bodies
from onnxprune.io.write import assemble, save
from onnxprune.runtime.capture import select_executed, with_outputs

DEEP = """agraph (float[3,2,4] x, bool c, bool d) => (float[2,4] y, float[3,2,4] z) {
    zero = ConstantOfShape(size)
    y, z = If (c) <
        then_branch = one () => (float[2,4] last, float[3,2,4] all) {
            last, all = Scan <num_scan_inputs = 1,
                body = cell (float[2,4] s, float[2,4] u) => (float[2,4] t, float[2,4] o) {
                    v = Loop (two, , u) <body = deeper (int64 i, bool g, float[2,4] a) => (bool h, float[2,4] b) {
                        h = Identity(g)
                        b = Tanh(a)
                    }>
                    t = Add(s, v)
                    o = Mul(t, half)
                }
            > (zero, x)
        },
        else_branch = two_ () => (float[2,4] last, float[3,2,4] all) {
            last0, all0 = If (d) <
                then_branch = p () => (float[2,4] last, float[3,2,4] all) {
                    t = ReduceSum <keepdims = 0> (x, axis)
                    last = Neg(t)
                    all = Neg(x)
                },
                else_branch = q () => (float[2,4] last, float[3,2,4] all) {
                    t = ReduceSum <keepdims = 0> (x, axis)
                    last = Abs(t)
                    all = Exp(x)
                }
            >
            last = Relu(last0)
            all = Relu(all0)
        }
    >
}"""
DEEP_SIZES = {
    "size": np.asarray([2, 4]),
    "two": np.asarray(2),
    "half": np.float32(0.5),
    "axis": np.asarray([0]),
}


def deep() -> onnx.ModelProto:
    """Names that several bodies use, nodes without names, a Loop in a Scan in an If beside an If in an If."""
    model = parser.parse_model(HEAD % 17 + DEEP)
    for name, value in DEEP_SIZES.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    return model


def draw(seed: int = 0, **more: Any) -> dict[str, Any]:
    x = np.random.default_rng(seed).standard_normal((3, 2, 4)).astype(np.float32)
    return {"x": x, **{name: np.asarray(value) for name, value in more.items()}}


def test_what_was_laid_open_is_put_back_as_it_was() -> None:
    models = [deep(), *(build(t, **g) for t, g in ((IF, IF_SIZES), (SCAN, SCAN_SIZES), (LOOP, LOOP_SIZES)))]
    models.append(build(SCAN, **SCAN_SIZES, inside=("ws",), constant=("wo",)))
    for model in models:
        before = model.SerializeToString()
        loaded = load(model)
        assert has_bodies(loaded.proto) and not any(
            n.op_type in ("If", "Loop", "Scan") for n in loaded.proto.graph.node
        )
        assert same(assemble(loaded.proto, loaded.weights), model)
        assert model.SerializeToString() == before


def test_flat_names_are_unique_and_stay() -> None:
    """Every tensor has one producer; names that nobody else has are what they were, on every reading."""
    flat = load(deep()).proto
    made = [o for node in flat.graph.node for o in node.output]
    assert len(set(made)) == len(made)
    assert {"v", "b", "o", "last0", "y", "z"} <= set(made)
    renamed = [n for n in made if n == "t" or n.endswith("/t")]
    assert renamed == ["t", "last0/then_branch/t", "last0/else_branch/t"]
    assert load(deep()).proto == flat


def test_the_view_knows_what_lies_inside() -> None:
    loaded = load(deep())
    graph = Graph.of(loaded.proto, loaded.weights)
    assert {"t", "o", "b", "last0"} <= graph.inner and not {"y", "z", "zero"} & graph.inner
    nodes = {o: node for node in graph.nodes for o in node.outputs}
    assert graph.around[nodes["zero"].index] == graph.around[nodes["y"].index] == ()
    around = [graph.around[nodes[name].index] for name in ("b", "v", "o")]
    assert around[0][:-1] == around[1] == around[2] != (), "what a Loop gives lies where the Loop does"
    assert Graph.of(outline_bodies(loaded.proto, loaded.weights)[0], {}).inner == frozenset()


@pytest.mark.parametrize("what", ["sparse", "old scan", "sequence map", "too many"])
def test_bodies_without_a_form_stay_closed(what: str) -> None:
    """They are written as they came, and what they read from outside keeps its channels, with a reason."""
    model = build(IF, **IF_SIZES)
    body = model.graph.node[2].attribute[0].g
    if what == "sparse":
        value = helper.make_tensor("unused", onnx.TensorProto.FLOAT, [1], [1.0])
        where = helper.make_tensor("where", onnx.TensorProto.INT64, [1], [0])
        body.sparse_initializer.append(helper.make_sparse_tensor(value, where, [3]))
    elif what == "sequence map":
        inner = helper.make_graph([helper.make_node("Identity", ["e"], ["f"])], "each", *(
            [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None)] for n in "ef"
        ))  # fmt: skip
        body.node.insert(0, helper.make_node("SequenceMap", ["seq"], ["mapped"], body=inner))
        body.node.insert(0, helper.make_node("SequenceConstruct", ["h"], ["seq"]))
    elif what == "too many":
        model.graph.node[2].output.append("none")
    else:
        model.opset_import[0].version = 8
        infos = ([helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)] for name in "ef")
        each = helper.make_graph([helper.make_node("Identity", ["e"], ["f"])], "each", *infos)
        old = helper.make_node("Scan", ["", "h"], ["z"], num_scan_inputs=1, body=each)
        model.graph.node[2].CopyFrom(old)
    loaded = load(model)
    assert not has_bodies(loaded.proto)
    assert same(assemble(loaded.proto, loaded.weights), model)
    if what == "sparse":
        assert "captured-by-subgraph" in {b.code for b in op.analyze(model).barriers}


def test_a_model_with_bodies_is_written_and_read(tmp_path: Any) -> None:
    """Weights of bodies are inside the model, however the others are written."""
    model = build(SCAN, **{**SCAN_SIZES, "w0": (4, 5)}, inside=("ws", "wu"))
    loaded = load(model)
    for external in (False, True):
        path = tmp_path / f"{external}.onnx"
        save(loaded.proto, loaded.weights, path, external=external)
        assert same(onnx.load(path), model)


# -- what lies inside, shown -------------------------------------------------------------------------------------------


def shown(model: onnx.ModelProto, names: list[str], feed: dict[str, Any]) -> dict[str, Any]:
    """Values of inner tensors, by name."""
    loaded = load(model)
    proto, places = expose_tensors(loaded.proto, dict.fromkeys(names, Inner(onnx.TensorProto.FLOAT, 2)))
    assert list(places) == names
    exposed = with_outputs(proto, [p.output for p in places.values()])
    found = run(assemble(exposed, loaded.weights), feed)
    return {name: (found[p.output], p.stacked) for name, p in places.items()}


def test_every_iteration_of_a_scan_is_shown() -> None:
    model = build(SCAN, **SCAN_SIZES)
    feed = {"x": np.random.default_rng(1).standard_normal((5, 2, 4)).astype(np.float32)}
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    state, states, u = np.zeros((2, 6), np.float32), [], feed["x"] @ values["w0"]
    for step in u:
        state = np.tanh(step @ values["wu"] + state @ values["ws"])
        states.append(state)
    found = shown(model, ["t", "u", "s"], feed)
    assert [stacked for _, stacked in found.values()] == [1, 1, 1]
    np.testing.assert_allclose(found["t"][0], states, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["u"][0], u, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["s"][0][1:], states[:-1], rtol=1e-4, atol=1e-5)


def test_what_did_not_run_is_empty() -> None:
    model = deep()
    for c, d in ((True, True), (False, True), (False, False)):
        feed = draw(c=c, d=d)
        found = shown(model, ["v", "b", "last0"], feed)
        (v, one), (b, two), (last, none) = found.values()
        assert (one, two, none) == (1, 2, 0)
        if c:
            np.testing.assert_allclose(v, np.tanh(np.tanh(feed["x"])), rtol=1e-5)
            np.testing.assert_allclose(b[:, 0], np.tanh(feed["x"]), rtol=1e-5)
            assert last.size == 0
        else:
            assert v.size == b.size == 0 and last.shape == (2, 4)


def test_values_of_iterations_are_taken_apart_or_joined() -> None:
    value = np.arange(24).reshape(2, 3, 4)
    assert [v.shape for v in select_executed(value, 1, [], joins=False)] == [(3, 4), (3, 4)]
    (joined,) = select_executed(value, 1, [], joins=True)
    assert np.array_equal(joined, value.reshape(6, 4))
    assert select_executed(value[:0], 1, [], joins=True) == [] == select_executed(np.zeros(0), 0, [], joins=False)


def test_values_count_where_conditions_hold() -> None:
    """Conditions of iterations further out stand for all within; one further in counts once; one not come to never."""
    value, odd = np.arange(24).reshape(2, 3, 4), np.asarray([True, False])
    assert np.array_equal(select_executed(value, 2, [(odd, False, 1)], joins=True)[0], value[1].ravel())
    assert [v[0] for v in select_executed(value, 2, [(odd, True, 1), (value[..., :1] > 0, True, 2)], joins=False)] == [
        4,
        8,
    ]
    assert select_executed(value, 0, [(odd, True, 1)], joins=True)[0] is not None
    assert select_executed(value, 0, [(np.asarray(True), False, 0)], joins=True) == []
    assert select_executed(value, 1, [(np.zeros(0, bool), False, 0)], joins=True) == []


def test_a_branch_within_a_loop_gives_zeros() -> None:
    """Every iteration has to give as much, so that sizes have to be known."""
    model = deep()
    assert not hidden_tensors(load(model).proto, dict.fromkeys(("v", "b", "last0"), Inner(1, 2)))
    text = LOOP.replace(
        "o = Sigmoid(o0)",
        """o = If (flag) <
            then_branch = p () => (float[N,5] o1) { o1 = Sigmoid(o0) },
            else_branch = q () => (float[N,5] o2) { o2 = Tanh(o0) }
        >""",
    )
    text = text.replace("o0 =", "even = Mod(i, two)  flag = Equal(even, none)  o0 =")
    values = {"two": np.asarray(2), "none": np.asarray(0)}
    model = build(text, **{**LOOP_SIZES, **values, "limit": np.float32(99)})
    loaded = load(model)
    assert hidden_tensors(loaded.proto, dict.fromkeys(("o1", "o2", "t"), Inner(1, 2))) == {"o1", "o2"}
    types = dict.fromkeys(("o1", "o2"), Inner(1, 2, (("x", 0, 1), 5)))
    assert not hidden_tensors(loaded.proto, types)
    proto, places = expose_tensors(loaded.proto, types)
    feed = {"x": np.random.default_rng(2).standard_normal((2, 4)).astype(np.float32), "trips": np.asarray(4)}
    found = run(assemble(with_outputs(proto, [p.output for p in places.values()]), loaded.weights), feed)
    one, two = (found[places[name].output] for name in ("o1", "o2"))
    assert one.shape == two.shape == (4, 2, 5)
    assert one[[0, 2]].all() and two[[1, 3]].all() and not one[[1, 3]].any() and not two[[0, 2]].any()
