"""What layers are aimed at, in which order, and the way back from there to their own outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from masks import all_values
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.graph.view import Graph
from onnxprune.recovery.layer import Problem
from onnxprune.recovery.targets import RecoveryTarget, RecoveryTargets, find_targets

Array = NDArray[Any]


def aims(model: onnx.ModelProto, joint: bool = True) -> tuple[Graph, RecoveryTargets]:
    analysis = Analysis(model)
    graph = analysis.graph
    known = {o for node in graph.nodes for o in node.outputs}
    return graph, find_targets(graph, dict.fromkeys(known), analysis.facts.shape, joint=joint)


def by_output(found: RecoveryTargets) -> dict[str, RecoveryTarget]:
    return {aim.node.outputs[0]: aim for level in found.levels for aim in level}


def start(net: Net) -> str:
    return net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8))


# -- where to ----------------------------------------------------------------------------------------------------------


def test_sums_are_aimed_at_by_the_last_branch() -> None:
    """The first has to be known before the last can make up for it."""
    net = Net(17)
    x = start(net)
    first, last = net.conv(x, 8, 8), net.conv(net.op("Relu", net.conv(x, 8, 6)), 6, 8)
    total = net.op("Add", first, last)
    _, found = aims(net.model(net.conv(net.op("Relu", total), 8, 4)))
    mine = by_output(found)
    assert mine[first].path.target == first and mine[last].path.target == total
    assert mine[last].path.addends == [first] and first in mine[last].needs
    assert mine[first].level < mine[last].level


def test_a_shortcut_waits_for_the_long_way() -> None:
    """It comes last in the graph although its input is there early."""
    net = Net(17)
    x = start(net)
    long = net.conv(net.op("Relu", net.conv(x, 8, 6)), 6, 8)
    short = net.conv(x, 8, 8, 1)
    total = net.op("Add", short, long)
    _, found = aims(net.model(net.conv(net.op("Relu", total), 8, 4)))
    mine = by_output(found)
    assert mine[short].path.target == total and mine[short].path.addends == [long]
    assert mine[short].level > mine[long].level


def test_every_layer_has_its_own_output_where_sums_are_not_asked_for() -> None:
    net = Net(17)
    x = start(net)
    y = net.op("Add", x, net.conv(x, 8, 8))
    _, found = aims(net.model(net.conv(y, 8, 4)), joint=False)
    for output, aim in by_output(found).items():
        assert not aim.path.addends and aim.path.target == output


def test_levels_follow_the_data() -> None:
    net = Net(17)
    x = start(net)
    left, right = net.conv(x, 8, 4), net.conv(x, 8, 5)
    last = net.conv(net.op("Concat", left, right, axis=1), 9, 3)
    _, found = aims(net.model(last))
    assert [len(level) for level in found.levels] == [1, 2, 1]
    mine = by_output(found)
    assert [mine[n].level for n in (left, right, last)] == [2, 2, 3]


def test_normalisations_behind_a_layer_are_part_of_its_way() -> None:
    """Their scale and shift are not fitted a second time; those that follow no layer are."""
    net = Net(17)
    x = start(net)
    behind = net.norm(net.conv(x, 8, 8, bias=False), 8)
    apart = net.norm(net.op("Concat", x, net.op("Relu", behind), axis=1), 16)
    graph, found = aims(net.model(net.conv(net.op("Relu", apart), 16, 4)))
    mine = by_output(found)
    assert apart in mine and behind not in mine
    assert mine[graph.producer[behind].inputs[0]].path.target == behind


@pytest.mark.parametrize("how", ["two readers", "output", "activation", "widened", "data", "moved"])
def test_where_the_way_ends(how: str) -> None:
    net = Net(17)
    x = start(net)
    y = net.conv(net.op("GlobalAveragePool", x) if how == "widened" else x, 8, 8, 1)
    end, others = y, list[str]()
    if how in ("two readers", "output"):
        z = net.op("Mul", y, net.const(2.0))
        others.append(net.op("Sigmoid", y) if how == "two readers" else y)
    elif how == "activation":
        end = net.op("Mul", y, net.const(2.0))
        z = net.op("Tanh", end)
    elif how == "widened":
        z = net.op("Add", y, x)
    elif how == "data":
        z = net.op("Mul", y, net.op("Sigmoid", x))
    else:  # a shape is only known at the layer itself
        end = net.transpose(y, 0, 2, 3, 1)
        z = net.reshape(net.transpose(net.reshape(end, 0, 36, 8), 0, 2, 1), 0, 8, 6, 6)
    _, found = aims(net.model(net.conv(z, 8, 4), *others))
    assert by_output(found)[y].path.target == end


def test_weights_that_may_not_change_are_left_with_a_reason() -> None:
    net = Net(17)
    x = net.op("Tanh", net.linear(net.input("x", ["N", 5, 6]), 6, 6))
    shared = net.weight(6, 6)
    one = net.op("MatMul", x, shared)
    two = net.op("MatMul", net.op("Tanh", one), shared)
    last = net.op("MatMul", two, net.op("Concat", net.weight(6, 2), net.weight(6, 2), axis=1))
    graph, found = aims(net.model(last))
    left = {graph.producer[y].label: found.reasons.get(graph.producer[y].label, "") for y in (one, two, last)}
    assert ["shared" in left[graph.producer[y].label] for y in (one, two)] == [True, True]
    assert "computed from other tensors" in left[graph.producer[last].label]
    assert set(by_output(found)).isdisjoint([one, two, last])


def test_weights_that_leave_the_model_are_left_alone() -> None:
    """What is an output as well would change for whoever reads it."""
    net = Net(17)
    x = net.op("Tanh", net.linear(net.input("x", ["N", 6]), 6, 6))
    kernel = net.weight(6, 4)
    y = net.op("MatMul", x, kernel)
    _, found = aims(net.model(y, kernel, shapes={y: ["N", 4], kernel: [6, 4]}, check=False))
    assert y not in by_output(found)


# -- the way back ------------------------------------------------------------------------------------------------------


def behind_products(net: Net, y: str, z: str) -> dict[str, Callable[[], str]]:
    """Ways on from [N, 5, 6]; ``z`` is another activation of that shape."""
    return {
        "bias": lambda: net.op("Add", net.const(net.rng.standard_normal(6)), y),
        "per position": lambda: net.op("Add", y, net.const(net.rng.standard_normal((5, 6)))),
        "less": lambda: net.op("Sub", y, net.const(net.rng.standard_normal(6))),
        "from": lambda: net.op("Sub", net.const(net.rng.standard_normal(6)), y),
        "times": lambda: net.op("Mul", y, net.const(1.0 + net.rng.random(6))),
        "over": lambda: net.op("Div", y, net.const(-0.3)),
        "sum": lambda: net.op("Sum", y, z),
        "plus": lambda: net.op("Add", z, y),
        "minus": lambda: net.op("Sub", y, z),
        "minuend": lambda: net.op("Sub", z, y),
        "turned": lambda: net.transpose(y, 0, 2, 1),
        "turned round": lambda: net.transpose(y, 2, 0, 1),
        "normalised": lambda: net.norm(net.transpose(y, 0, 2, 1), 6),
        "flat": lambda: net.op("Flatten", y),
        "reshaped": lambda: net.op("Add", net.reshape(y, 0, 5, 2, 3), net.const(net.rng.standard_normal((5, 2, 3)))),
        "reshaped and turned": lambda: net.transpose(net.reshape(y, 0, 5, 2, 3), 0, 2, 1, 3),
        "passed": lambda: net.op("Identity", net.op("Dropout", y)),
        "all": lambda: net.op(
            "Mul", net.op("Sub", z, net.op("Add", y, net.const(net.rng.standard_normal(6)))), net.const(0.4)
        ),
    }


NAMES = list(behind_products(Net(), "y", "z"))


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_undoes_the_way(name: str) -> None:
    net = Net(17)
    x = net.op("Tanh", net.linear(net.input("x", ["N", 5, 4]), 4, 6))
    y = net.linear(x, 6, 6, bias=False)
    end = behind_products(net, y, x)[name]()
    model = net.model(net.op("Relu", end))
    _, found = aims(model)
    aim = by_output(found)[y]
    assert aim.path.target == end, "the way leads as far as it can"
    feed = {"x": np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)}
    values = all_values(model, feed)
    back = aim.path.back(values[end].astype(np.float64), [values[n] for n in aim.path.addends], values[y].shape)
    np.testing.assert_allclose(back, values[y], rtol=1e-4, atol=1e-5)
    marks = np.arange(values[y].size).reshape(values[y].shape)
    assert np.array_equal(aim.path.moved_back(_lay_out(name, marks), marks.shape), marks)


def _lay_out(name: str, marks: Array) -> Array:
    """Where the values of [N, 5, 6] lie at the end of the way."""
    if name in ("turned", "normalised"):
        return marks.transpose(0, 2, 1)
    if name == "turned round":
        return marks.transpose(2, 0, 1)
    if name == "flat":
        return marks.reshape(len(marks), -1)
    if name == "reshaped":
        return marks.reshape(-1, 5, 2, 3)
    if name == "reshaped and turned":
        return marks.reshape(-1, 5, 2, 3).transpose(0, 2, 1, 3)
    return marks


def test_a_channel_that_is_multiplied_by_0_wants_nothing() -> None:
    net = Net(17)
    y = net.linear(net.op("Tanh", net.linear(net.input("x", ["N", 4]), 4, 6)), 6, 3, bias=False)
    end = net.op("Mul", y, net.const([1.0, 0.0, 2.0]))
    _, found = aims(net.model(net.op("Tanh", end)))
    back = by_output(found)[y].path.back(np.array([[3.0, 0.0, 8.0]], np.float32), [], (1, 3))
    assert np.array_equal(back, [[3.0, 0.0, 4.0]])


# -- activations with flat parts ---------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable[[Net, str], str], Callable[[Array], Array]]] = {
    "Relu": (lambda n, y: n.op("Relu", y), lambda v: np.maximum(v, 0)),
    "Clip": (lambda n, y: n.op("Clip", y, n.const(-0.5), n.const(0.75)), lambda v: np.clip(v, -0.5, 0.75)),
    "Clip above": (lambda n, y: n.op("Clip", y, "", n.const(0.2)), lambda v: np.minimum(v, 0.2)),
    "HardSwish": (lambda n, y: n.op("HardSwish", y), lambda v: v * np.clip(v / 6 + 0.5, 0, 1)),
    "HardSigmoid": (lambda n, y: n.op("HardSigmoid", y, alpha=0.5), lambda v: np.clip(0.5 * v + 0.5, 0, 1)),
    "Tanh": (lambda n, y: n.op("Tanh", y), np.tanh),
}
WAYS: dict[str, tuple[Callable[[Net, str, str], str], Callable[[Array, Array], Array]]] = {
    "direct": (lambda n, y, z: y, lambda v, z: v),
    "bias": (lambda n, y, z: n.op("Add", y, n.const(np.linspace(-1, 1, 6))), lambda v, z: v + np.linspace(-1, 1, 6)),
    "per position": (
        lambda n, y, z: n.op("Add", y, n.const(np.linspace(-3, 3, 30).reshape(5, 6))),
        lambda v, z: v + np.linspace(-3, 3, 30).reshape(5, 6),
    ),
    "scaled by position": (
        lambda n, y, z: n.op("Mul", y, n.const([[-2.0], [1.0], [0.5], [-1.0], [3.0]])),
        lambda v, z: v * np.array([[-2.0], [1.0], [0.5], [-1.0], [3.0]]),
    ),
    "sum": (lambda n, y, z: n.op("Add", z, y), lambda v, z: z + v),
    "turned over": (lambda n, y, z: n.op("Sub", z, y), lambda v, z: z - v),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_wanted_outputs_give_what_the_original_gave(activation: str, way: str) -> None:
    """Whatever was fitted: behind the activation, what is wanted is what there was."""
    net = Net(17)
    x = net.op("Tanh", net.linear(net.input("x", ["N", 5, 4]), 4, 6))
    y = net.op("MatMul", x, net.weight(6, 6, scale=3.0))
    (on, forward), (build, act) = WAYS[way], ACTIVATIONS[activation]
    model = net.model(build(net, on(net, y, x)))
    _, found = aims(model)
    aim = by_output(found)[y]
    feeds = [{"x": 3 * np.random.default_rng(b).standard_normal((7, 5, 4)).astype(np.float32)} for b in range(6)]
    values = [all_values(model, feed) for feed in feeds]

    def get(name: str, batch: int) -> Array:
        return values[batch][name]

    problem = Problem(aim, (6, 6), 6, get, get, [], range(len(feeds)), 42)
    batches = [*problem.rows(False), *problem.rows(True)]
    assert sum(rows.data.shape[1] for rows in batches) == 6 * 35
    order = [b for b in range(6) if b % 5 != 4] + [4]
    original = np.concatenate([values[b][y] for b in order]).reshape(1, -1, 6)
    other = np.concatenate([values[b][x] for b in order])
    fitted = original + np.random.default_rng(9).standard_normal(original.shape).astype(np.float32)
    wanted, kept, start = [], [], 0
    for rows in batches:
        stop = start + rows.data.shape[1]
        wanted.append(rows.expected(fitted[:, start:stop]))
        kept.append(rows.expected(original[:, start:stop]))
        start = stop
    shape = (-1, 5, 6)
    goal = act(forward(original.reshape(shape), other))
    np.testing.assert_allclose(act(forward(np.concatenate(wanted, 1).reshape(shape), other)), goal, atol=2e-5)
    np.testing.assert_allclose(np.concatenate(kept, 1), original, atol=2e-5)
    free = np.concatenate(wanted, 1) == fitted
    assert free.any() == (activation != "Tanh"), "what is flat leaves the fit its freedom"


@pytest.mark.parametrize(("batches", "samples"), [(1, 1), (1, 2), (1, 9), (2, 3), (4, 1), (5, 2), (11, 2)])
def test_some_rows_are_held_out_however_few_there_are(batches: int, samples: int) -> None:
    net = Net(17)
    x = net.op("Tanh", net.linear(net.input("x", ["N", 4]), 4, 6, gemm=True))
    y = net.linear(x, 6, 3, gemm=True)
    model = net.model(y)
    _, found = aims(model)
    rng = np.random.default_rng(0)
    values = [all_values(model, {"x": rng.standard_normal((samples, 4)).astype(np.float32)}) for _ in range(batches)]

    def get(name: str, batch: int) -> Array:
        return values[batch][name]

    problem = Problem(by_output(found)[y], (6, 3), 6, get, get, [], range(batches), batches * samples)
    train, held, every = problem.sums(False), problem.sums(True), problem.sums()
    assert train.rows + held.rows == every.rows == batches * samples
    assert train.rows > 0 and (held.rows > 0 or batches * samples == 1)
    np.testing.assert_allclose((train + held).xx, every.xx)
    whole = np.concatenate([v[x] for v in values]).astype(np.float64)
    np.testing.assert_allclose(every.xx[0], whole.T @ whole, rtol=1e-5)
