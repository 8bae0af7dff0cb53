"""Pieces of a model give what the whole gives, and no node runs twice."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from build import Net
from masks import all_values
from numpy.typing import NDArray

from onnxprune.graph.view import Graph
from onnxprune.io.read import load
from onnxprune.runtime import segments as module
from onnxprune.runtime import sessions
from onnxprune.runtime.data import StoredFeeds
from onnxprune.runtime.segments import Segments, Store
from onnxprune.training.samples import TrainingSamples

Array = NDArray[Any]
Feed = dict[str, Array]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """First outputs of the nodes of every piece that was run."""
    pieces: list[list[str]] = []
    part = module.part_model

    def spy(graph: Graph, weights: Any, nodes: Sequence[Any], *rest: Any) -> bytes:
        pieces.append([n.outputs[0] for n in nodes])
        return part(graph, weights, nodes, *rest)

    monkeypatch.setattr(module, "part_model", spy)
    return pieces


def pieces(
    model: onnx.ModelProto,
    wanted: Sequence[Sequence[str]],
    feeds: Sequence[Feed],
    folder: Path,
    limit: int = 1 << 30,
    **settings: Any,
) -> list[dict[str, list[Array]]]:
    """Values of the wanted tensors, piece by piece and batch by batch, read as soon as they are there."""
    loaded = load(model)
    graph = Graph.of(loaded.proto, loaded.weights)
    store = Store(limit, folder)
    run = Segments(graph, graph.weights, wanted, store, **settings)
    run.feed(feeds)
    assert run.batches == len(feeds)
    found = []
    for number, names in enumerate(wanted):
        assert list(run.run(number)) in ([], list(range(len(feeds))))
        found.append({n: [np.array(store.get(n, b)) for b in range(len(feeds))] for n in names})
        run.drop(number)
    assert not any(n in store for names in wanted for n in names), "everything is let go of at the end"
    assert not list(folder.iterdir())
    return found


def check(
    model: onnx.ModelProto, wanted: Sequence[Sequence[str]], feeds: Sequence[Feed], folder: Path, **settings: Any
) -> None:
    found = pieces(model, wanted, feeds, folder, **settings)
    for batch, feed in enumerate(feeds):
        values = all_values(model, feed)
        for piece in found:
            for name, mine in piece.items():
                np.testing.assert_allclose(mine[batch], values[name], rtol=1e-5, atol=1e-5, err_msg=name)
                assert mine[batch].dtype == values[name].dtype


def draw(batches: int, *shape: int, name: str = "x") -> list[Feed]:
    rng = np.random.default_rng(batches)
    return [{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(batches)]


def residual() -> tuple[onnx.ModelProto, list[str]]:
    net = Net(17)
    a = net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16)
    b = net.conv(net.op("Relu", a), 16, 16)
    c = net.op("Add", a, b)
    d = net.conv(net.op("Relu", c), 16, 4)
    return net.model(d), [a, b, c, d]


def test_every_node_runs_once(tmp_path: Path, ran: list[list[str]]) -> None:
    """The sum needs a tensor from two pieces before."""
    model, (a, b, c, d) = residual()
    check(model, [[a], [b], [c], [d]], draw(3, 2, 3, 8, 8), tmp_path)
    every = [name for part in ran for name in part]
    assert sorted(every) == sorted(n.output[0] for n in model.graph.node)
    assert len(ran) == 4


@pytest.mark.parametrize(("starts", "calls"), [((0, 0, 2, 2), 2), ((0, 0, 0, 0), 1), ((0, 1, 1, 3), 3)])
def test_pieces_that_run_ahead_hold_the_same(
    tmp_path: Path, ran: list[list[str]], starts: Sequence[int], calls: int
) -> None:
    """Values stay until the piece that wants them, although they are made with an earlier one."""
    model, (a, b, c, d) = residual()
    check(model, [[a], [b], [c, a], [d]], draw(3, 2, 3, 8, 8), tmp_path, starts=starts)
    assert len(ran) == calls
    every = [name for part in ran for name in part]
    assert sorted(every) == sorted(n.output[0] for n in model.graph.node)


def test_what_nobody_wants_does_not_run(tmp_path: Path, ran: list[list[str]]) -> None:
    model, (a, b, _, d) = residual()
    check(model, [["x"], [a], [a, b]], draw(2, 2, 3, 8, 8), tmp_path)
    assert d not in [name for part in ran for name in part] and len(ran) == 2


def test_what_a_later_piece_reads_is_carried_although_nobody_wants_it(tmp_path: Path, ran: list[list[str]]) -> None:
    net = Net(17)
    early = net.op("Tanh", net.conv(net.input("x", ["N", 3, 5, 5]), 3, 4))
    first = net.op("Relu", early)
    second = net.op("Mul", early, net.const(2.0))
    check(net.model(first, second), [[first], [second]], draw(2, 2, 3, 5, 5), tmp_path)
    assert [len(part) for part in ran] == [3, 1]


@pytest.mark.parametrize("limit", [0, 20_000, 100_000])
def test_values_in_files_are_the_same(tmp_path: Path, limit: int) -> None:
    model, (a, b, c, d) = residual()
    feeds = draw(3, 17, 3, 8, 8)  # 70 kB a tensor: large enough for files
    check(model, [[a], [b], [c], [d]], feeds, tmp_path, limit=limit)
    loaded = load(model)
    graph = Graph.of(loaded.proto, loaded.weights)
    run = Segments(graph, graph.weights, [[a], [b]], Store(limit, tmp_path))
    run.feed(feeds)
    list(run.run(0))
    assert list(tmp_path.iterdir()), "something has to be in files for this to be a test"


def test_inputs_in_a_file_are_in_memory_one_call_at_a_time(tmp_path: Path) -> None:
    """Whatever asks for calls again and again: the pieces of a model, parts of the calls, samples drawn from them."""
    model, (a, *_) = residual()
    size = 8 * 17 * 3 * 8 * 8 * 4
    rng = np.random.default_rng
    make = lambda: ({"x": rng(k).random((8 * 17, 3, 8, 8), np.float32)} for k in range(40))  # noqa: E731
    tracemalloc.start()
    stored = StoredFeeds(make(), size)
    graph = Graph.of(load(model).proto, load(model).weights)
    run = Segments(graph, graph.weights, [[a]], Store(0, tmp_path))
    run.feed(stored)
    list(run.run(0))
    samples = TrainingSamples(stored.part(range(1, 40)), 16, None, 0)
    drawn = [samples.draw(k)[0] for k in range(3)]
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 8 * size < 40 * size / 4
    for one, other in zip(stored, make(), strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in other)
    rows = np.concatenate([feed["x"] for feed in make()][1:])
    order = np.random.default_rng([0, 0]).permutation(len(rows))[:48]
    assert np.array_equal(np.concatenate([feed["x"] for feed in drawn]), rows[order])
    assert len(stored[1:3]) == 2 and np.array_equal(stored.part([5, 7])[1]["x"], stored[7]["x"])


def test_heavy_weights_are_mapped_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of them as bytes of a model, none of a kernel's own."""
    model, (a, b, c, d) = residual()
    feeds, opened = draw(2, 3, 3, 8, 8), []

    def spied(source: Any, **settings: Any) -> Any:
        if isinstance(source, Path):
            opened.append((source.with_name(f"{source.name}.data").stat().st_size, sessions._frugal.get()))
        return sessions.open_session(source, **settings)

    monkeypatch.setattr(sessions, "HEAVY", 600)
    monkeypatch.setattr(module, "open_session", spied)
    monkeypatch.setattr("onnxprune.io.write._EXTERNAL_FROM", 1)
    check(model, [[a], [b], [c], [d]], feeds, tmp_path)
    assert len(opened) == 3 and all(size >= 600 and is_frugal for size, is_frugal in opened)


def test_weights_are_read_anew_for_every_piece(tmp_path: Path) -> None:
    model, (a, b, _, _) = residual()
    loaded = load(model)
    graph = Graph.of(loaded.proto, loaded.weights)
    weights = dict(graph.weights)
    store = Store(1 << 30, tmp_path)
    run = Segments(graph, weights, [[a], [b]], store)
    (feed,) = draw(1, 2, 3, 8, 8)
    run.feed([feed])
    list(run.run(0))
    name = graph.producer[b].inputs[1]
    weights[name] = _scaled(weights[name], 2.0)
    name = graph.producer[b].inputs[2]
    weights[name] = _scaled(weights[name], 2.0)
    list(run.run(1))
    np.testing.assert_allclose(store.get(b, 0), 2.0 * all_values(model, feed)[b], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(store.get(a, 0), all_values(model, feed)[a], rtol=1e-5, atol=1e-5)


def _scaled(weight: Any, factor: float) -> Any:
    from onnxprune.io.weights import ArrayWeight

    return ArrayWeight(weight.name, weight.read() * np.float32(factor))


def test_several_inputs_and_integers(tmp_path: Path) -> None:
    """Codes that a table is asked for, a scalar, and a mask of truth values beside floats."""
    net = Net(17)
    codes, x = net.input("codes", ["N", 5], np.int64), net.input("x", ["N", 5, 8])
    scale, mask = net.input("scale", []), net.input("mask", ["N", 5, 1], np.bool_)
    table = net.op("Gather", net.weight(9, 8), codes)
    y = net.op("Where", mask, net.op("Mul", net.op("Add", table, x), scale), net.const(0.0))
    z = net.linear(y, 8, 4)
    top = net.op("ArgMax", z, axis=-1)
    model = net.model(z, top)
    rng = np.random.default_rng(0)
    feeds = [
        {
            "codes": rng.integers(0, 9, (n, 5)),
            "x": rng.standard_normal((n, 5, 8)).astype(np.float32),
            "scale": np.float32(n) + np.zeros((), np.float32),
            "mask": rng.random((n, 5, 1)) > 0.3,
        }
        for n in (3, 1, 4)
    ]
    check(model, [[table], [y], [z], [top]], feeds, tmp_path)


def test_constant_nodes_and_shape_arithmetic(tmp_path: Path) -> None:
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, "H", "W"]), 3, 8)
    shape = net.op("Shape", x)
    target = net.op("Concat", net.gather(shape, [0], 0), net.const([8, -1]), axis=0)
    flat = net.op("Reshape", x, target)
    y = net.op("MatMul", net.weight(4, 8), flat)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((2, 3, h, 5)).astype(np.float32)} for h in (4, 6)]
    check(net.model(y), [[x], [flat], [y]], feeds, tmp_path)


def parsed(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>\n' + text)
    onnx.checker.check_model(model)
    return model


def test_bodies_that_read_tensors_from_outside(tmp_path: Path) -> None:
    """Branches read an activation of an earlier piece and a weight, by name only."""
    model = parsed(
        """agraph (float[N,4] x) => (float[N,4] y)
        <float[4] w = {1, 2, 3, 4}, float zero = {0}> {
            early = Mul(x, w)
            late = Tanh(early)
            total = ReduceSum <keepdims = 0> (x)
            positive = Greater(total, zero)
            chosen = If (positive) <
                then_branch = yes () => (float[N,4] a) { a = Add(early, w) },
                else_branch = no () => (float[N,4] b) { b = Sub(late, early) }
            >
            y = Neg(chosen)
        }"""
    )
    feeds = draw(4, 3, 4)
    check(model, [["early"], ["late"], ["chosen"], ["y"]], feeds, tmp_path)


def test_bodies_within_bodies(tmp_path: Path) -> None:
    """What only the innermost body reads has to be there too."""
    model = parsed(
        """agraph (float[N,4] x) => (float[N,4] y)
        <float[4] w = {1, 2, 3, 4}, float zero = {0}> {
            early = Mul(x, w)
            total = ReduceSum <keepdims = 0> (x)
            positive = Greater(total, zero)
            y = If (positive) <
                then_branch = yes () => (float[N,4] a) {
                    a = If (positive) <
                        then_branch = inner () => (float[N,4] c) { c = Add(early, w) },
                        else_branch = other () => (float[N,4] d) { d = Neg(early) }
                    >
                },
                else_branch = no () => (float[N,4] b) { b = Identity(x) }
            >
        }"""
    )
    check(model, [["early"], ["y"]], draw(4, 3, 4), tmp_path)


def test_loops_carry_values_and_read_others(tmp_path: Path) -> None:
    model = parsed(
        """agraph (float[N,4] x) => (float[N,4] y)
        <int64 trips = {3}, bool go = {1}, float[4] w = {1, 2, 3, 4}> {
            early = Tanh(x)
            y = Loop (trips, go, x) <
                body = step (int64 i, bool before, float[N,4] state) => (bool after, float[N,4] next) {
                    after = Identity(before)
                    scaled = Mul(state, w)
                    next = Add(scaled, early)
                }
            >
        }"""
    )
    check(model, [["early"], ["y"]], draw(3, 2, 4), tmp_path)


def test_a_store_lets_go_of_files(tmp_path: Path) -> None:
    store = Store(0, tmp_path)
    large, small = np.arange(20_000, dtype=np.float64), np.arange(3)
    for batch, value in enumerate((large, small, large + 1)):
        store.add("a", value, batch)
    store.add("b", np.array(["some", "words"], object), 0)
    assert store.batches(["a", "b"]) == [0] and store.batches(["a"]) == [0, 1, 2] and not store.batches(["c"])
    assert [len(store.get("a", i)) for i in range(3)] == [20_000, 3, 20_000]
    assert np.array_equal(store.get("a", 2), large + 1) and store.get("b", 0)[1] == "words"
    assert len(list(tmp_path.iterdir())) == 2
    store.drop(["a", "unknown"])
    assert "a" not in store and "b" in store and not list(tmp_path.iterdir())
